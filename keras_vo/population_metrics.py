"""The metrics of the population, in the log of `fit`."""

from __future__ import annotations

import warnings
from typing import Any

import keras
import tensorflow as tf

from keras_vo.checks import blurred_message
from keras_vo.search.credit import Generation, is_blurred

__all__ = ["PopulationMetrics"]


class _OfFirstReplica:
    """Metrics of values that are the same in all replicas."""

    def add_variable(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["aggregation"] = "only_first_replica"  # not their sum
        # That of the metric which this class is mixed into.
        return super().add_variable(*args, **kwargs)  # type: ignore[misc]


class _PopulationMean(_OfFirstReplica, keras.metrics.Mean):
    """A mean that is NaN, not 0, of no value."""

    def result(self) -> Any:
        mean = super().result()
        nan = tf.constant(float("nan"), mean.dtype)
        return tf.where(tf.convert_to_tensor(self.count) > 0, mean, nan)


class _PopulationSum(_OfFirstReplica, keras.metrics.Sum):
    pass


class PopulationMetrics:
    """`population_loss` and `nonfinite_members`, since the epoch began.

    A plain holder: a Keras model may not be given further metrics of its own
    once it is built.
    """

    def __init__(self) -> None:
        self.loss = _PopulationMean(name="population_loss")
        self.nonfinite = _PopulationSum(name="nonfinite_members")

        # Of steps; no entry of the log.
        self._said = False
        self._blurred = _PopulationSum(name="blurred_generations")

    def update(self, generation: Generation, examples: tf.Tensor) -> None:
        """Takes a generation in.

        Args:
            generation: its mean loss counts by examples, unless no member's
                loss was finite.
            examples: of all replicas, a scalar.
        """
        finite = tf.math.is_finite(generation.mean_loss)
        self.loss.update_state(
            tf.where(finite, generation.mean_loss, 0.0),
            sample_weight=tf.where(finite, tf.cast(examples, tf.float32), 0.0),
        )
        self.nonfinite.update_state(generation.nonfinite_members)
        self._blurred.update_state(
            tf.cast(is_blurred(generation.losses), tf.float32)
        )

    def as_list(self) -> list[Any]:
        return [self.loss, self.nonfinite]

    def results(self) -> dict[str, Any]:
        """By name."""
        return {metric.name: metric.result() for metric in self.as_list()}

    def reset(self) -> None:
        """Begins an epoch."""
        self.warn_if_blurred()
        for metric in [*self.as_list(), self._blurred]:
            metric.reset_state()

    def warn_if_blurred(self) -> None:
        """Says, at an end of an epoch, if losses could not be told apart."""
        if self._said or not tf.executing_eagerly():
            return
        if (steps := float(self._blurred.result())) > 0:
            self._said = True
            warnings.warn(
                blurred_message(f"in {steps:.0f} steps"), stacklevel=2
            )
