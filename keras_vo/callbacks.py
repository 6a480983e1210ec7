"""A look at the search itself, while it goes on."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import time
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from keras_vo import checks
from keras_vo.monitor import dashboard, records
from keras_vo.monitor.observer import NUMBERS, StepObserver
from keras_vo.optimizer import VOOptimizer, find_vo_optimizer
from keras_vo.replicas import workers

__all__ = ["SearchMonitor"]

_TIME, _STEP = NUMBERS.index("time"), NUMBERS.index("step")
_MEANS = slice(2, len(NUMBERS) - 1)  # all but time and counters
# The numbers are read in that many steps or seconds.
_STEPS, _SECONDS = 32, 1.0
# Of long epochs, one of that many steps is looked at.
_STRIDE = 8
# Drawing takes this share of the time of training at most.
_DRAWING = 0.01


class SearchMonitor(keras.callbacks.Callback):
    """Records numbers that say how the search is going.

    Pass it to `fit`, or put it around calls of `VOOptimizer.minimize`:

    >>> monitor = keras_vo.callbacks.SearchMonitor(csv="search.csv")
    >>> with monitor.attached(optimizer):
    ...     for _ in range(100):
    ...         optimizer.minimize(objective, variables)
    ...         monitor.record()

    A row has the columns

    - `epoch`, where there is one (from 0), and `step`: the generations of the
      optimizer, this one included.
    - `parameter_norm`: norm of the weights mu after the step.
    - `gradient_norm`, `gradient_cosine`: norm of the search gradient that the
      inner optimizer gets, and the cosine between it and the one before.
    - `gradient_snr`: power of its signal over power of its noise, as halves of
      the population show them (`keras_vo.search.signal_to_noise`): near 0 for
      noise alone, -1 at least. It is the noise of the perturbations, not that
      of the choice of the batch.
    - `kl`: divergence between the search distributions before and after the
      step, in nats (with the sensitivities of the step, not the next ones).
    - `utility_spread`: standard deviation of the members' utilities.
    - `divergence` of a member's outputs (`keras_vo.monitor.divergence`), in one
      of eight steps of `fit`; without `sensitivity`, `divergence_unscaled`.
    - with `importance_mixing`, what `keras_vo.search.importance_mixing.Mixing`
      says; of an epoch its last values.
    - `nonfinite_share`: of the members, those whose loss is not finite.
    - `evaluations`: members evaluated since the monitor is attached, and
      `evaluations_per_second` (the first row's has the tracing of the step).
    - `sigma/<layer>/min`, `/median`, `/max`: over the weights of a layer, after
      the step; the median is that of a random sample of 1001 where a layer
      has more sigmas than that.

    A step without a finite loss moves nothing: its `kl` is 0, and NaN stands
    for its utilities and its gradient. NaN are the cosine of the first step
    and the SNR of a single direction, too, and (as with noise on activations in
    seven of eight steps) what is not measured. Means leave NaN out.

    The numbers are computed within the step, which changes nothing else, and
    written to files in 32 steps or a second. Under a strategy the first worker
    alone writes files; pass the monitor on all workers.

    Args:
        every: `"step"`, `"epoch"` (means over its steps, of which one in
            eight is looked at from 64 on; of sigma and of the counters the
            last values) or an integer: a row in that many steps, with the
            numbers of that step.
        csv: path of a CSV file, one row after another.
        tensorboard: directory for event files, which `pip install
            keras_vo[tensorboard]` shows.
        png: path of a plot of all of it, drawn at the end, and at ends of
            epochs as often as it takes a hundredth of the time. Needs
            matplotlib.
        append: whether to add to `history` and to a CSV file of a training
            before, instead of beginning anew.

    Attributes:
        history: a dict of lists, the columns.

    Raises:
        ValueError: `every` is none of these.
        ImportError: a plot is asked for without matplotlib.
    """

    _epoch: int | None
    _of_epoch: list[np.ndarray]
    _last_step: float
    _row_count: float
    _row_time: float
    _step_time: float

    def __init__(
        self,
        every: str | int = "epoch",
        *,
        csv: str | os.PathLike[str] | None = None,
        tensorboard: str | os.PathLike[str] | None = None,
        png: str | os.PathLike[str] | None = None,
        append: bool = False,
    ) -> None:
        super().__init__()
        self.every = _checked_every(every)
        self._history: dict[str, list[float]] = {}
        self._append = append
        self._png = None if png is None else os.fspath(png)
        if png is not None and not importlib.util.find_spec("matplotlib"):
            raise ImportError(
                "The plot needs matplotlib: `pip install keras_vo[plots]`. "
                f"Received: png={png!r}"
            )
        self._records: list[Any] = []
        if csv is not None:
            self._records.append(records.CsvRecord(os.fspath(csv), append))
        if tensorboard is not None:
            folder = os.fspath(tensorboard)
            self._records.append(records.TensorBoardRecord(folder))
        self._optimizer: VOOptimizer | None = None
        self._begin(StepObserver())

    # --- around `minimize` ---

    @contextlib.contextmanager
    def attached(self, optimizer: VOOptimizer) -> Iterator[SearchMonitor]:
        """Watches what `optimizer.minimize` does; call `record` after each.

        A `tf.function` around `minimize` has to be called for the first time
        within.

        Args:
            optimizer: a `VOOptimizer`.

        Raises:
            ValueError: `every="epoch"`, or the optimizer is watched already.
        """
        if self.every == "epoch":
            raise ValueError(
                "There are no epochs around `minimize`. Expected: "
                'every="step" or an integer. Received: every="epoch"'
            )
        self._attach(optimizer)
        try:
            yield self
            self._read()
            self._draw()
        finally:
            self.detach()

    def record(self) -> None:
        """Takes the numbers of the step that was made: call it after each.

        Raises:
            ValueError: the monitor is not attached, or has seen no step.
        """
        if self._optimizer is None:
            raise ValueError(
                "Expected `record` within `with monitor.attached(optimizer):`. "
                "Received: a monitor that is not attached"
            )
        if self._last_step and not self._is_due():
            return
        self._read()
        if not self._observer.evaluations:
            raise ValueError(
                "Expected a step of the optimizer before `record`. Received: "
                "none that the monitor has seen (a tf.function that was "
                "called before the monitor was attached does not know of it)"
            )

    @property
    def history(self) -> dict[str, list[float]]:
        """The rows so far: a list for each column."""
        if self._optimizer is not None:
            self._read()
        return self._history

    def detach(self) -> None:
        """Stops watching and closes the files; `fit` and `attached` do."""
        if self._optimizer is None:
            return
        self._optimizer.observe(None)
        self._optimizer = None
        for record in self._records:
            record.close()

    # --- in `fit` ---

    def on_train_begin(self, logs: Any = None) -> None:
        optimizer = find_vo_optimizer(getattr(self.model, "optimizer", None))
        if optimizer is None:
            raise ValueError(
                "SearchMonitor watches a model that is compiled with a "
                "`keras_vo.VOOptimizer`. Received: "
                f"optimizer={getattr(self.model, 'optimizer', None)!r}"
            )
        self._attach(optimizer)
        self._observer.leave_fit = self._leave_fit
        # Made before this, it knows no observer.
        self.model.make_train_function(force=True)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._epoch = epoch
        # Validation and what callbacks do between epochs are not counted.
        self._row_time += time.time() - self._step_time
        self._step_time = time.time()
        self._of_epoch = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self._is_due():
            self._read()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._read()
        if self._of_epoch:
            rows = np.stack(self._of_epoch)
            row = rows[-1].copy()
            row[_MEANS] = records.known_means(rows[:, _MEANS])
            self._write(row)
        passed = time.time() - self._drawn
        if self._drawing < _DRAWING * passed:
            self._draw()

    def on_train_end(self, logs: Any = None) -> None:
        self._draw()
        self._leave_fit()

    def _leave_fit(self) -> None:
        self.detach()
        self.model.train_function = None  # the next one watches nothing

    # --- both ---

    def _begin(self, observer: StepObserver) -> None:
        """Forgets what it knows of another search."""
        self._observer = observer
        self._epoch = None
        self._of_epoch = []
        self._waiting = 0  # steps since the numbers were read
        self._last_step = self._row_count = 0.0
        now = time.time()
        self._read_time = self._step_time = self._row_time = now
        self._drawn, self._drawing = now, 1.0  # a guess of the seconds

    def _attach(self, optimizer: VOOptimizer) -> None:
        if optimizer.observer is not None:
            raise ValueError(
                "Expected one SearchMonitor at a time. Received: an optimizer "
                "that another one is attached to (`detach()` it first)"
            )
        if self._optimizer is not None:
            raise ValueError(
                "Expected one optimizer at a time. Received: a monitor that "
                "is attached to another one (`detach()` it first)"
            )
        self._writes = workers.is_first_worker(optimizer.strategy)
        if self._writes:  # first: it may fail
            for record in self._records:
                record.open()
        self._begin(StepObserver(*self._every_and_capacity()))
        optimizer.observe(self._observer)
        self._optimizer = optimizer
        if not self._append:
            self._history = {}

    def _every_and_capacity(self) -> tuple[int, int]:
        """One of how many steps is looked at, and how many are kept."""
        # Rows that one call of a compiled function makes are not to get lost.
        capacity = (
            2 * _STEPS * int(getattr(self.model, "steps_per_execution", 1))
        )
        if self.every != "epoch":
            return self.every, capacity
        steps = (self.params or {}).get("steps") or 0
        return (_STRIDE if steps >= 8 * _STRIDE else 1), capacity

    def _is_due(self) -> bool:
        """Whether there may be enough to read, called once a step."""
        self._waiting += 1
        self._step_time = time.time()
        late = self._step_time - self._read_time > _SECONDS
        return late or self._waiting >= _STEPS

    def _read(self) -> None:
        """Takes the rows of the steps since the last time."""
        self._waiting, self._read_time = 0, time.time()
        if not self._observer.names:  # the optimizer is not built yet
            return
        rows = self._observer.read()
        for row in rows[rows[:, _STEP] > self._last_step]:
            self._last_step = row[_STEP]
            if self.every == "epoch":
                self._of_epoch.append(row)
            else:
                self._write(row)

    def _write(self, numbers: np.ndarray) -> None:
        """Writes a row; its rate is that since the row before."""
        values = dict(zip(self._observer.names, numbers.tolist(), strict=True))
        seconds = values.pop("time") - self._row_time
        done = values["evaluations"] - self._row_count
        self._row_time, self._row_count = numbers[_TIME], values["evaluations"]
        row = {} if self._epoch is None else {"epoch": float(self._epoch)}
        row |= {name: values.pop(name) for name in NUMBERS[1:]}
        row["evaluations_per_second"] = done / seconds if seconds else math.nan
        row |= values
        if self._history and list(row) != list(self._history):
            raise ValueError(
                "Expected the columns of the training before, to append to: "
                f"{list(self._history)}. Received: {list(row)}"
            )
        for name, value in row.items():
            self._history.setdefault(name, []).append(value)
        if self._writes:
            for record in self._records:
                record.write(row)

    def _draw(self) -> None:
        if self._png is None or not self._writes or not self._history:
            return
        began = time.time()
        dashboard.draw(self._history, self._png)
        self._drawn = time.time()
        self._drawing = self._drawn - began


def _checked_every(every: Any) -> Any:
    if every in ("step", "epoch"):
        return 1 if every == "step" else every
    if isinstance(every, str):
        raise ValueError(
            '`every` must be "step", "epoch" or a number of steps. '
            f"Received: every={every!r}"
        )
    return checks.checked_integer("every", every)
