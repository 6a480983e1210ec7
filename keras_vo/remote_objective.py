"""An objective that each worker builds once, where it runs."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

__all__ = ["RemoteObjective"]

_built = threading.local()
_MOST = 4  # of a thread, the last ones: models need memory


class RemoteObjective:
    """An objective whose parts are made in the worker, not sent to it.

    A model, a simulator or data need not be picklable, nor be made at each
    call: `make` is called at the first evaluation in each thread of each
    process, and what it returns evaluates all members there.

    >>> def make(seed):  # of a module, so that workers can import it
    ...     model = build_model()
    ...     def objective(weights):
    ...         for variable, w in zip(model.trainable_variables, weights):
    ...             variable.assign(w)
    ...         return simulate(model, seed)
    ...     return objective
    >>> objective = keras_vo.RemoteObjective(make, seed=3)
    >>> optimizer.minimize(objective, variables, executor=executor)

    Args:
        make: from `args` and `kwargs` to a function from a member's weights, a
            list of arrays, to its loss. It has to be picklable, as have they.
        *args: of `make`.
        **kwargs: of `make`.

    Raises:
        TypeError: `make` is no function, or (when it runs) does not return
            one.
    """

    def __init__(
        self, make: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> None:
        if not callable(make):
            raise TypeError(
                "Expected a function that makes the objective, and its "
                f"arguments. Received: {make!r} of type {type(make)}"
            )
        self._make, self._args, self._kwargs = make, args, kwargs
        self._key = uuid.uuid4().hex

    def __call__(self, weights: Sequence[np.ndarray]) -> Any:
        """The loss of a member."""
        objectives = _built.__dict__
        if self._key not in objectives:
            objective = self._make(*self._args, **self._kwargs)
            if not callable(objective):
                raise TypeError(
                    "Expected a function from a list of weights to a loss of "
                    f"`{self._make!r}`. Received: {objective!r:.80} of type "
                    f"{type(objective)}"
                )
            while len(objectives) >= _MOST:
                del objectives[next(iter(objectives))]
            objectives[self._key] = objective
        return objectives[self._key](weights)
