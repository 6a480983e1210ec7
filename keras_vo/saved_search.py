"""The state of a search in a file: by name, with a manifest.

The manifest says what the numbers depend on: the structure of the variance,
the class of the inner optimizer, the generator of the noise. Where a file's
search is another than the model's, nothing of it is taken.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from keras_vo.search.generators import FIRST

__all__ = ["NEWER", "named_variables", "noise_generator", "restore", "save"]

# What is kept on request: files and searches may or may not have it.
_REQUESTED = {"best_loss": float("inf"), "best_weights": 0.0}
# What files of earlier versions lack, and what it was there; "discrete": see
# `RESUMED` in `keras_vo.search.activation_scale`.
NEWER = {"blind_growth": 0.0, "blind": 0.0, "discrete": -3.0, **_REQUESTED}

_FORMAT = 1
_MANIFEST = "manifest"
_LOSS_SCALE = 4  # variables of a LossScaleOptimizer
_TOLD = 6  # differences that are named


def named_variables(
    own: Mapping[str, Any], inner: Sequence[Any], trained: Sequence[Any]
) -> dict[str, Any]:
    """The variables of a search by names that do not depend on the model's.

    Args:
        own: those of the search by name.
        inner: those of the inner optimizer. Keras names one of them
            `<weight>_<slot>`; here it is `inner.<slot>.<number>`.
        trained: the weights.
    """
    prefixes = sorted({_prefix(v) for v in trained}, key=len, reverse=True)
    count: collections.Counter[str] = collections.Counter()
    named = dict(own)
    for variable in inner:
        slot = variable.name
        for prefix in prefixes:
            if slot.startswith(prefix):
                slot = slot.removeprefix(prefix)
                break
        named[f"inner.{slot}.{count[slot]}"] = variable
        count[slot] += 1
    return named


def _prefix(variable: Any) -> str:
    """What Keras begins the names of a weight's optimizer variables with."""
    name = getattr(variable, "path", variable.name)
    return str(name).replace("/", "_").replace(":", "_") + "_"


def save(
    store: Any, manifest: Mapping[str, Any], variables: Mapping[str, Any]
) -> None:
    """Writes a search.

    Args:
        store: a mapping of arrays, as Keras passes it.
        manifest: what the search is, to be written as JSON.
        variables: its variables by name; none before it is built.
    """
    text = json.dumps({"format": _FORMAT, **manifest})
    store[_MANIFEST] = np.frombuffer(text.encode(), np.uint8)
    for name, variable in variables.items():
        store[name] = variable.numpy()


def noise_generator(store: Any) -> str:
    """The name of what drew the noise of a search; empty: there is none."""
    if _MANIFEST in store.keys():
        return str(_manifest(store).get("noise"))
    begun = "0" in store.keys() and np.asarray(store["0"]).any()
    return FIRST if begun else ""


def _manifest(store: Any) -> dict[str, Any]:
    text = np.asarray(store[_MANIFEST]).astype(np.uint8).tobytes().decode()
    return dict(json.loads(text))


def restore(
    store: Any,
    manifest: Mapping[str, Any],
    variables: Mapping[str, Any],
    former: Sequence[Any],
) -> list[str]:
    """Reads a search, or says why not.

    Args:
        store: see `save`.
        manifest: of the search that is to be.
        variables: its variables by name.
        former: the variables in the order in which files without a manifest
            have them.

    Returns:
        What does not fit, in words; then nothing is changed. Empty where the
        file holds no search that has begun.
    """
    values = {name: np.asarray(store[name]) for name in store.keys()}
    if values.pop(_MANIFEST, None) is not None:
        saved = _manifest(store)
        if not values:
            return []
        expected = {"format": _FORMAT, **manifest}
        if "weights" not in saved or "weights" not in expected:  # of no model
            saved.pop("weights", None)
            expected.pop("weights", None)
        differences = [
            f"{key}: {saved.get(key)!r} in the file, {expected.get(key)!r} here"
            for key in sorted({*saved, *expected})
            if saved.get(key) != expected.get(key)
        ]
        targets = dict(variables)
        values |= {
            name: np.full(tuple(targets[name].shape), value)
            for name, value in NEWER.items()
            if name in targets and name not in values
        }
        for name in _REQUESTED:
            if name not in targets:
                values.pop(name, None)
    else:
        if not values or not values["0"].any():
            return []  # that of an optimizer that has made no step
        differences = []
        values = _without_loss_scale(values, len(former))
        targets = {str(i): v for i, v in enumerate(former)}
    if not targets:
        return ["no weight is trained here"]
    differences += _other_shapes(values, targets)
    if differences and _MANIFEST not in store.keys():
        return [
            "the file has the state of another optimizer, or of a search of "
            f"other shapes ({len(values)} variables, {len(targets)} here)"
        ]
    if len(differences) > _TOLD:
        more = len(differences) - _TOLD
        differences = [*differences[:_TOLD], f"and {more} more"]
    if not differences:
        for name, variable in variables.items():
            if name in NEWER:
                variable.assign(np.full(tuple(variable.shape), NEWER[name]))
        for name, variable in targets.items():
            variable.assign(values[name])
    return differences


def _without_loss_scale(
    values: dict[str, np.ndarray], count: int
) -> dict[str, np.ndarray]:
    """Without the variables that a LossScaleOptimizer has before its inner's.

    Under mixed_float16 Keras wraps the optimizer in one, which it does not do
    again where the model is loaded under another policy.
    """
    own = len(values) - count
    scalars = own == _LOSS_SCALE and all(
        not values[str(i)].shape for i in range(own)
    )
    if not scalars:
        return values
    return {str(i): values[str(i + own)] for i in range(count)}


def _other_shapes(
    values: Mapping[str, np.ndarray], variables: Mapping[str, Any]
) -> list[str]:
    """Where names or shapes differ."""
    saved = {name: tuple(value.shape) for name, value in values.items()}
    here = {name: tuple(v.shape) for name, v in variables.items()}
    return [
        f"{name}: {_said(saved.get(name))} in the file, "
        f"{_said(here.get(name))} here"
        for name in sorted({*saved, *here})
        if saved.get(name) != here.get(name)
    ]


def _said(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else f"shape {shape}"
