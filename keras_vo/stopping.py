"""When a loop without `fit` ends."""

from __future__ import annotations

from typing import Any

import numpy as np

from keras_vo import checks

__all__ = ["StopWhen", "stop_when"]


def stop_when(
    *,
    loss_below: float | None = None,
    no_progress_for: int | None = None,
    evaluations: int | None = None,
) -> StopWhen:
    """What says when to stop: call it with each step's report.

    >>> stop = keras_vo.stop_when(loss_below=1e-3, evaluations=100_000)
    >>> while True:
    ...     population = optimizer.ask(variables)
    ...     report = optimizer.tell(population, evaluate(population))
    ...     if stop(report):
    ...         break
    >>> print(stop.reason)

    With several criteria, the first one that is met ends it.

    Args:
        loss_below: a member has had a loss below it. (If the loss is noisy,
            that is luck: look at `report.mean_loss` instead.)
        no_progress_for: in so many steps neither the least mean loss of a
            population nor the least loss of a member has fallen. Steps
            without a finite loss count.
        evaluations: so many members or more were evaluated (those that have a
            result), since it was made.

    Raises:
        ValueError: no criterion, or one that is out of its range.
    """
    return StopWhen(loss_below, no_progress_for, evaluations)


class StopWhen:
    """Criteria, and what they have seen. Made by `stop_when`.

    Attributes:
        reason: which one is met, in words; `None`: none is.
        evaluations: members seen so far.
    """

    def __init__(
        self,
        loss_below: float | None,
        no_progress_for: int | None,
        evaluations: int | None,
    ) -> None:
        if (loss_below, no_progress_for, evaluations) == (None, None, None):
            raise ValueError(
                "Expected one criterion at least: loss_below, no_progress_for "
                "or evaluations. Received: none"
            )
        self._loss_below = None
        if loss_below is not None:
            self._loss_below = float(loss_below)
            if np.isnan(self._loss_below):
                raise ValueError(
                    "`loss_below` must be a number. Received: "
                    f"loss_below={loss_below!r}"
                )
        self._no_progress_for = _checked("no_progress_for", no_progress_for)
        self._most = _checked("evaluations", evaluations)
        self._least_mean = self._least = np.inf
        self._steps_without = 0
        self.evaluations = 0
        self.reason: str | None = None

    def __call__(self, report: Any) -> bool:
        """Whether to stop after this step.

        Args:
            report: of `tell` (or of the last step by an executor,
                `optimizer.report`), or what `step` returns. Of a step by
                `minimize` the mean loss that it returns will do, where
                `evaluations` are not counted.
        """
        losses = self._losses(report)
        finite = losses[np.isfinite(losses)]
        self.evaluations += int(np.count_nonzero(~np.isnan(losses)))
        mean = finite.mean() if finite.size else np.inf
        least = finite.min() if finite.size else np.inf
        progress = mean < self._least_mean or least < self._least
        self._steps_without = 0 if progress else self._steps_without + 1
        self._least_mean = min(self._least_mean, mean)
        self._least = min(self._least, least)
        self.reason = self._met()
        return self.reason is not None

    def _losses(self, report: Any) -> np.ndarray:
        """The members' losses, or their mean alone."""
        if hasattr(report, "losses"):
            return np.asarray(report.losses, np.float64)
        try:
            loss = np.asarray(report, np.float64)
        except (TypeError, ValueError):
            loss = np.zeros([0])
        if loss.size != 1 or self._most is not None:
            wanted = "the report of a step"
            if self._most is None:
                wanted += ", or its mean loss"
            raise TypeError(f"Expected {wanted}. Received: {report!r:.80}")
        return loss.reshape(1)

    def _met(self) -> str | None:
        if self._loss_below is not None and self._least < self._loss_below:
            return f"loss {self._least:.6g} below {self._loss_below:g}"
        patience = self._no_progress_for
        if patience is not None and self._steps_without >= patience:
            return f"no progress for {self._steps_without} steps"
        if self._most is not None and self.evaluations >= self._most:
            return f"{self.evaluations} evaluations"
        return None


def _checked(name: str, value: Any) -> int | None:
    return None if value is None else checks.checked_integer(name, value)
