"""What a Keras model needs beside its training step, under a strategy.

Keras's own `fit` and `evaluate` work under MirroredStrategy, but not under
MultiWorkerMirroredStrategy, where they reduce batches and single numbers in
ways that are made for neither (keras#20585).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from keras_vo import distribution

__all__ = ["ReplicatedModel"]

if TYPE_CHECKING:  # what the mixin is mixed into is as untyped as Keras
    from typing import Any as _KerasModel
else:
    _KerasModel = object


class ReplicatedModel(_KerasModel):
    """Mixin: `fit`, `evaluate` and `predict` under tf.distribute."""

    @property
    def made_under(self) -> Any:
        """The strategy that the model was made under; `None`: no one."""
        strategy = self.distribute_strategy
        with distribution.entered(strategy):
            return distribution.current_strategy()

    def _maybe_symbolic_build(
        self, iterator: Any = None, data_batch: Any = None
    ) -> None:
        """Builds the model from the first batch, as it does in Keras.

        Private, since nothing public comes between the first batch and its
        use. Keras takes the mean of the batch over replicas, which fails
        unless all shards are of one size, and on several machines.
        """
        if iterator is not None and self.made_under is not None:
            for _, _, batches in iterator:
                data_batch = distribution.first_local(
                    next(batches), self.made_under
                )
                break
            iterator = None
        super()._maybe_symbolic_build(iterator, data_batch)

    def _make_function(self, step: Callable[[Any], Any]) -> Any:
        """The function of a training or test step, as it is in Keras.

        Private, since the public functions around it would have to be written
        anew. On several machines Keras takes the mean of a step's results over
        their first axis: numbers get one.
        """
        if distribution.is_multi_worker(self.made_under):
            step = _with_first_axis(step)
        return super()._make_function(step)


def _with_first_axis(step: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`step`, whose results have an axis of size 1 in front."""

    @functools.wraps(step)
    def wrapper(data: Any) -> Any:
        return keras.tree.map_structure(
            lambda value: tf.expand_dims(value, 0), step(data)
        )

    return wrapper
