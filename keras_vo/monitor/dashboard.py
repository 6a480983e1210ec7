"""The record of a search, drawn on one page.

Drawing alone imports matplotlib, and no more of it than figures and the
renderer of PNG files: neither a display nor the state of `pyplot`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from keras_vo.monitor.records import make_parent

__all__ = ["draw"]

History = Mapping[str, Sequence[float]]

# Layers that get a legend of their own; of more, the first and the last ones.
_LAYERS = 8


@dataclasses.dataclass(frozen=True)
class _Panel:
    """One plot of one column.

    Attributes:
        column: its name.
        title: of the plot.
        unit: of its vertical axis.
        log: whether that is logarithmic.
        level: where a line marks what a value of it means, and that.
        limits: of the axis, where they are known.
        other: a column that is drawn too where it differs, and its meaning.
    """

    column: str
    title: str
    unit: str = ""
    log: bool = False
    level: tuple[float, str] | None = None
    limits: tuple[float, float] | None = None
    other: tuple[str, str] | None = None


_PANELS: tuple[_Panel, ...] = (
    _Panel("gradient_norm", "Search gradient", "norm", log=True),
    _Panel(
        "gradient_snr",
        "Signal to noise of the gradient",
        "signal / noise (power)",
        level=(0.0, "noise alone"),
    ),
    _Panel(
        "gradient_cosine",
        "Gradient and the one before",
        "cosine",
        level=(0.0, "unrelated"),
    ),
    _Panel("kl", "KL divergence of a step", "nats", log=True),
    _Panel("parameter_norm", "Weights (mean)", "norm"),
    _Panel("utility_spread", "Utilities", "standard deviation"),
    _Panel(
        "divergence",
        "Divergence of a member's outputs",
        "squared distance",
        log=True,
        other=("divergence_unscaled", "without sensitivities"),
    ),
    _Panel(
        "nonfinite_share",
        "Members without a finite loss",
        "%",
        limits=(-2, 102),
    ),
    _Panel("evaluations_per_second", "Speed", "evaluations / s", log=True),
)
_PANELS_OF_MIXING = (
    _Panel(
        "acceptance",
        "Share of members that is kept",
        limits=(-0.02, 1.02),
        other=("predicted_acceptance", "predicted"),
    ),
    _Panel(
        "effective_size", "Effective size of the last population", "members"
    ),
)


def draw(history: History, path: str) -> None:
    """Draws all columns of `history` to a PNG file.

    Args:
        history: the columns of a `SearchMonitor`.
        path: of the file, which is replaced at once.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = {name: np.asarray(v, float) for name, v in history.items()}
    panels = _PANELS
    if "acceptance" in columns:
        panels += _PANELS_OF_MIXING
    wide = (1 + len(panels)) // 2
    figure = Figure(figsize=(4.4 * wide, 9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, wide, sharex=True)
    steps = columns["step"]
    _draw_sigma(axes[0, 0], steps, columns)
    for axis, panel in zip(axes.flat[1:], panels, strict=True):
        other = columns[panel.other[0]] if panel.other else None
        _draw_panel(axis, steps, columns[panel.column], panel, other)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    figure.suptitle(
        f"Search after {int(steps[-1]):,} steps and "
        f"{int(columns['evaluations'][-1]):,} evaluations"
    )
    make_parent(path)
    written = f"{path}.part"
    figure.savefig(written, dpi=100, format="png")
    os.replace(written, path)


def _draw_sigma(
    axis: Any, steps: np.ndarray, columns: Mapping[str, np.ndarray]
) -> None:
    """A line and a band, from least to largest, for each layer."""
    names = [
        name.removeprefix("sigma/").removesuffix("/median")
        for name in columns
        if name.startswith("sigma/") and name.endswith("/median")
    ]
    shown = names
    if len(names) > _LAYERS:
        half = _LAYERS // 2
        shown = [*names[:half], *names[-half:]]
    marker = _marker(steps)
    for name in shown:
        low, middle, high = (
            columns[f"sigma/{name}/{statistic}"]
            for statistic in ("min", "median", "max")
        )
        (line,) = axis.plot(steps, middle, marker, label=_shortened(name))
        if np.any(low < high):
            axis.fill_between(
                steps, low, high, color=line.get_color(), alpha=0.2, lw=0
            )
    lows = [columns[f"sigma/{name}/min"].min() for name in shown]
    highs = [columns[f"sigma/{name}/max"].max() for name in shown]
    _scale(axis, np.array([*lows, *highs]), log=True)
    band = any(
        np.any(columns[f"sigma/{n}/min"] < columns[f"sigma/{n}/max"])
        for n in shown
    )
    title = "Sigma by layer" + (" (median; min to max)" if band else "")
    if len(shown) < len(names):
        title += f", {len(shown)} of {len(names)} layers"
    axis.set_title(title, fontsize="medium")
    axis.set_ylabel("sigma")
    axis.grid(alpha=0.3)
    if shown:
        axis.legend(fontsize="small", framealpha=0.6)


def _draw_panel(
    axis: Any,
    steps: np.ndarray,
    values: np.ndarray,
    panel: _Panel,
    other: np.ndarray | None = None,
) -> None:
    if panel.unit == "%":
        values = 100.0 * values
    known = np.isfinite(values)
    axis.set_title(panel.title, fontsize="medium")
    axis.set_ylabel(panel.unit)
    axis.grid(alpha=0.3)
    if panel.level is not None:
        value, meaning = panel.level
        axis.axhline(value, color="0.4", lw=1, ls="--", label=meaning)
        axis.legend(fontsize="small", framealpha=0.6)
    if not known.any():
        axis.text(0.5, 0.5, "no values", transform=axis.transAxes, ha="center")
        return
    # Without gaps where a number is not measured in each step.
    axis.plot(steps[known], values[known], _marker(steps[known]))
    if (
        other is not None
        and panel.other
        and np.any(other[known] != values[known])
    ):
        label = panel.other[1]
        axis.plot(
            steps[known], other[known], _marker(steps[known]), label=label
        )
        axis.legend(fontsize="small", framealpha=0.6)
    if panel.limits is not None:
        axis.set_ylim(panel.limits)
    _scale(axis, values[known], panel.log)


def _scale(axis: Any, values: np.ndarray, log: bool) -> None:
    """Logarithmic where asked for and possible: then zeros are left out."""
    positive = values[values > 0]
    if log and positive.size and positive.max() > 1.2 * positive.min():
        from matplotlib.ticker import LogFormatter

        axis.set_yscale("log", nonpositive="mask")
        for which in (
            axis.yaxis.set_major_formatter,
            axis.yaxis.set_minor_formatter,
        ):
            which(LogFormatter(minor_thresholds=(2, 0.5)))
        return
    axis.ticklabel_format(axis="y", useOffset=False)
    if np.ptp(values) <= 1e-3 * np.abs(values).max():  # all but constant
        middle = float(values.mean())
        half = max(abs(middle), 1e-3) * 0.1
        if axis.get_autoscaley_on():
            axis.set_ylim(middle - half, middle + half)


def _marker(steps: np.ndarray) -> str:
    return ".-" if len(steps) <= 50 else "-"


def _shortened(name: str) -> str:
    return name if len(name) <= 24 else f"...{name[-21:]}"
