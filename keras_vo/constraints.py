"""Constraints of variables: a member's weights and the mean satisfy them.

A Keras (or TensorFlow) variable may have a `constraint`, a function P that
Keras applies to it after each step of an optimizer. Mu satisfies it so, but
w = mu + sigma z would not. So members are evaluated at P(w): what is minimised
is

    U(mu, sigma) = E[f(P(w))],   w ~ N(mu, diag sigma^2)

which is a search over the function f o P. The log-derivative trick asks
nothing of the function that is searched over, so that with z as it was drawn

    dU/dmu   = E[f(P(w)) z / sigma]
    dU/dbeta = E[f(P(w)) (z^2 - 1) / 2]

are eq. (9) of [1] as they stand: noise, scores, Fisher information and
KL divergences are those of w, and only what f sees is projected. (A density of
P(w) itself would have none: P maps many w to one point of the boundary.)

References:
    [1] Havtorn, "Variational Optimization of Neural Networks", 2018 (slides).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from keras_vo.search.layout import WeightLayout

__all__ = ["Constraint", "constraint_of", "projected", "projection"]

Constraint = Callable[[Any], Any]


def constraint_of(variable: Any) -> Constraint | None:
    """P of a Keras or TensorFlow variable; `None`: it has none."""
    return getattr(variable, "constraint", None)


def projected(constraint: Constraint, weight: tf.Tensor) -> tf.Tensor:
    """P(w), in shape and dtype of w.

    Raises:
        ValueError: the constraint's value has another shape.
    """
    value = tf.convert_to_tensor(constraint(weight))
    if not value.shape.is_compatible_with(weight.shape):
        raise ValueError(
            "Expected a constraint whose value has the shape of the weight, "
            f"{tuple(weight.shape)}. Received: {constraint!r} with a value of "
            f"shape {tuple(value.shape)}"
        )
    return tf.ensure_shape(tf.cast(value, weight.dtype), weight.shape)


def projection(
    variables: Sequence[Any], layout: WeightLayout
) -> Callable[[tf.Tensor], tf.Tensor] | None:
    """P of all weights, from one vector [d] to another.

    Args:
        variables: with the constraints that they have now.
        layout: of them.

    Returns:
        The function; `None`: no variable has a constraint.
    """
    constraints = [constraint_of(variable) for variable in variables]
    if all(constraint is None for constraint in constraints):
        return None

    def project(vector: tf.Tensor) -> tf.Tensor:
        parts = layout.split(vector)
        for i, constraint in enumerate(constraints):
            if constraint is not None:
                weight = tf.reshape(parts[i], layout.shapes[i])
                weight = tf.cast(weight, layout.dtypes[i])
                weight = projected(constraint, weight)
                parts[i] = tf.reshape(tf.cast(weight, layout.dtype), [-1])
        return tf.concat(parts, axis=0)

    return project
