"""Keras optimizers that evolution strategies are used with.

References:
    [1] Toklu, Liskowski, Srivastava, "ClipUp: A Simple and Powerful Optimizer
        for Distribution-based Policy Evolution", PPSN 2020, arXiv 2008.02387.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_vo import checks

__all__ = ["ClipUp"]


_REFUSED = (
    "clipnorm",
    "clipvalue",
    "global_clipnorm",
    "loss_scale_factor",
    "gradient_accumulation_steps",
)


@keras.saving.register_keras_serializable(package="keras_vo")
class ClipUp(keras.optimizers.Optimizer):
    """Steps of one length, and a velocity that is bounded [1, algorithm 1].

        v <- momentum v + learning_rate g / |g|
        v <- v min(1, max_speed / |v|)
        w <- w - v

    Norms are those of all weights together. The length of the gradient does
    not matter, only its direction: so the rates are in units of the weights,
    whatever the loss is scaled by. It is the usual choice for policies. [1]
    chooses max_speed first, learning_rate half of it, and sigma so that the
    population's radius, sigma sqrt(d) for d weights, is some 15 times
    max_speed.

    It is meant for the `inner_optimizer` of a `VOOptimizer`. In a plain Keras
    model under several replicas each would clip its own part.

    Args:
        learning_rate: length of what a gradient adds to the velocity: a
            number, or a schedule.
        momentum: part of the velocity that is kept, in [0, 1).
        max_speed: length of the velocity at most; `None`: twice the learning
            rate (as it is at the time).
        name: name of the optimizer.
        **kwargs: of every Keras optimizer: weight decay, EMA. (Clipping a
            gradient would change nothing, and of its scale nothing is left.)

    Raises:
        ValueError: a number out of its range; clipping, loss scaling or
            gradient accumulation.
    """

    def __init__(
        self,
        learning_rate: Any = 0.1,
        momentum: float = 0.9,
        max_speed: float | None = None,
        name: str = "clip_up",
        **kwargs: Any,
    ) -> None:
        for option in _REFUSED:
            if kwargs.get(option) is not None:
                raise ValueError(
                    f"`{option}` has no meaning where all steps have one "
                    "length. Expected: weight decay and EMA at most. "
                    f"Received: {option}={kwargs[option]!r}"
                )
        if isinstance(learning_rate, (int, float)) and not (
            0 <= learning_rate < math.inf
        ):
            raise ValueError(
                "`learning_rate` must be a finite number of 0 or more, or a "
                f"schedule. Received: learning_rate={learning_rate!r}"
            )
        super().__init__(learning_rate=learning_rate, name=name, **kwargs)
        if not isinstance(momentum, (int, float)) or not 0 <= momentum < 1:
            raise ValueError(
                "`momentum` must be a number in [0, 1). "
                f"Received: momentum={momentum!r}"
            )
        if max_speed is not None:
            max_speed = checks.checked_number("max_speed", max_speed)
        self.momentum = float(momentum)
        self.max_speed = max_speed

    def build(self, variables: Sequence[Any]) -> None:
        """Makes a velocity for each variable."""
        if self.built:
            return
        super().build(variables)
        self.velocities = [
            self.add_variable_from_reference(variable, name="velocity")
            for variable in variables
        ]
        self._places = {id(v): i for i, v in enumerate(variables)}

    def apply(
        self,
        grads: Sequence[Any],
        trainable_variables: Sequence[Any] | None = None,
    ) -> None:
        """Takes a step; see `keras.optimizers.Optimizer.apply`."""
        if trainable_variables is not None and not self.built:
            self.build(list(trainable_variables))
        velocities = self.velocities if self.built else []
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
            velocities = [
                self.velocities[self._places[id(variable)]]
                for variable in trainable_variables
                if id(variable) in self._places
            ]
        grads = list(grads)
        none = all(grad is None for grad in grads)
        if none or len(velocities) != len(grads):  # Keras says what is wrong
            super().apply(grads, trainable_variables)
            return
        grads = [
            tf.zeros_like(velocity) if grad is None else grad
            for grad, velocity in zip(grads, velocities, strict=True)
        ]
        steps = self._steps(grads, velocities)
        for velocity, step in zip(velocities, steps, strict=True):
            self.assign(velocity, step)
        super().apply(steps, trainable_variables)

    def _steps(
        self, grads: Sequence[tf.Tensor], velocities: Sequence[Any]
    ) -> list[tf.Tensor]:
        """The next velocities."""
        wide = "float64" if "float64" in {v.dtype for v in velocities} else None
        grads = [tf.cast(grad, wide or "float32") for grad in grads]
        # So that no square is 0 or infinite.
        largest = tf.reduce_max([tf.reduce_max(tf.abs(g)) for g in grads])
        grads = [tf.math.divide_no_nan(grad, largest) for grad in grads]
        norm = tf.linalg.global_norm(grads)
        rate = tf.cast(self.learning_rate, norm.dtype)
        scale = tf.math.divide_no_nan(rate, norm)
        moved = [
            self.momentum * tf.cast(velocity, norm.dtype) + scale * grad
            for velocity, grad in zip(velocities, grads, strict=True)
        ]
        most = 2 * rate if self.max_speed is None else self.max_speed
        speed = tf.linalg.global_norm(moved)
        part = tf.math.divide_no_nan(tf.cast(most, norm.dtype), speed)
        part = tf.where(speed > most, part, tf.ones_like(part))
        return [
            tf.cast(part * step, velocity.dtype)
            for step, velocity in zip(moved, velocities, strict=True)
        ]

    def update_step(
        self, gradient: Any, variable: Any, learning_rate: Any
    ) -> None:
        """Moves a variable by its velocity."""
        self.assign_sub(variable, tf.cast(gradient, variable.dtype))

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(momentum=self.momentum, max_speed=self.max_speed)
        return dict(config)
