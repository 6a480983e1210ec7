"""Observations in units of their running statistics."""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_vo.keras_compat import layers_of

__all__ = ["ObservationNormalization", "Statistics", "normalization_of"]


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Of observations, in float64.

    Attributes:
        count: how many there are, a scalar.
        mean: of each of their numbers.
        squares: sum of their squared distances from the mean, alike.
    """

    count: np.ndarray
    mean: np.ndarray
    squares: np.ndarray

    @classmethod
    def of_sums(
        cls, count: Any, total: Any, squares: Any, center: Any
    ) -> Statistics:
        """From sums of distances from `center`, and of their squares."""
        count = np.asarray(count, np.float64)
        mean = np.divide(total, np.maximum(count, 1))
        return cls(count, center + mean, squares - count * mean**2)

    def and_also(self, other: Statistics) -> Statistics:
        """Of both together (Chan, Golub, LeVeque, 1979)."""
        count = self.count + other.count
        part = other.count / np.maximum(count, 1)
        change = other.mean - self.mean
        return Statistics(
            count,
            self.mean + part * change,
            self.squares + other.squares + change**2 * self.count * part,
        )


@keras.saving.register_keras_serializable(package="keras_vo")
class ObservationNormalization(keras.layers.Layer):
    """The first layer of a policy: (x - mean) / standard deviation.

    The statistics are those of all observations of all members so far. They
    are weights that are not trained, so that they are saved with the model;
    `keras_vo.rl.Rollouts` updates them after each generation, whose members
    all see the same ones. Before the first update inputs pass unchanged.

    Args:
        clip: bound on the absolute value of what it returns; `None`: none.
        epsilon: added to the variance.
        **kwargs: of every layer.
    """

    def __init__(
        self, clip: float | None = 10.0, epsilon: float = 1e-8, **kwargs: Any
    ) -> None:
        # Of large numbers half precision would leave nothing.
        super().__init__(**{"autocast": False} | kwargs)
        self.clip, self.epsilon = clip, epsilon
        self._given: Any = None  # see `normalization_of`

    def build(self, input_shape: Any) -> None:
        shape = tuple(input_shape[1:])
        self.count, self.mean, self.squares = (
            self.add_weight(
                name=name,
                shape=shape if name != "count" else (),
                initializer="zeros",
                trainable=False,
                # Counts of millions, and sums over as many.
                dtype="float64",
                autocast=False,
            )
            for name in ("count", "mean", "squares")
        )

    def call(self, inputs: Any) -> Any:
        if self._given is not None:
            self._given(inputs)
        count, mean, squares = (
            ops.convert_to_tensor(v)
            for v in (self.count, self.mean, self.squares)
        )
        known = count > 1
        variance = ops.where(known, squares / ops.maximum(count, 1.0), 1.0)
        # A number that never changes has no scale.
        variance = ops.where(variance > 0, variance, 1.0)
        scale = ops.rsqrt(variance + self.epsilon)
        mean = ops.where(known, mean, 0.0)
        wide = "float64" if self.compute_dtype == "float64" else "float32"
        distance = ops.cast(inputs, wide) - ops.cast(mean, wide)
        outputs = distance * ops.cast(scale, wide)
        if self.clip is not None:
            outputs = ops.clip(outputs, -self.clip, self.clip)
        return ops.cast(outputs, self.compute_dtype)

    @property
    def statistics(self) -> Statistics:
        """What it has seen."""
        return Statistics(
            *(
                ops.convert_to_numpy(v)
                for v in (self.count, self.mean, self.squares)
            )
        )

    def update(self, statistics: Statistics) -> None:
        """Takes further observations into account."""
        new = self.statistics.and_also(statistics)
        self.count.assign(new.count)
        self.mean.assign(new.mean)
        self.squares.assign(new.squares)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(clip=self.clip, epsilon=self.epsilon)
        return dict(config)


def normalization_of(
    policy: Any, shape: tuple[int, ...]
) -> ObservationNormalization | None:
    """The layer of a policy that normalizes observations; `None`: none does.

    Args:
        policy: that was called.
        shape: of an observation.

    Raises:
        ValueError: there are several, or it is not given observations.
    """
    layers = [
        layer
        for layer in layers_of(policy)
        if isinstance(layer, ObservationNormalization)
    ]
    if not layers:
        return None
    shapes = [tuple(layer.mean.shape) for layer in layers]
    if shapes != [shape]:
        raise ValueError(
            "Expected one ObservationNormalization, the first layer of the "
            f"policy, for observations of shape {shape}. Received: "
            f"{len(layers)}, for inputs of the shapes {shapes}"
        )
    layer = layers[0]
    # Numbers of two binary digits, which every dtype has.
    probe = np.resize(np.arange(4, dtype=np.float32), (1, *shape))
    given: list[Any] = []
    layer._given = given.append
    try:
        policy(probe)
    finally:
        layer._given = None
    known = [ops.convert_to_numpy(x) for x in given if hasattr(x, "numpy")]
    if any(not np.array_equal(inputs, probe) for inputs in known):
        raise ValueError(
            "Expected an ObservationNormalization that is given the "
            "observations: the first layer of the policy. Received: "
            f"{layer.name!r}, whose inputs are what another layer has made of "
            "them"
        )
    return layer
