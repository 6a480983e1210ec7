"""Populations of which some members have no result."""

from __future__ import annotations

import math
from collections.abc import Callable

import tensorflow as tf

from keras_vo.fitness_shaping import shaped_known

__all__ = ["Shaping", "shaped_where_known", "with_former"]

Shaping = Callable[[tf.Tensor], tf.Tensor]


def shaped_where_known(
    shape: Shaping, losses: tf.Tensor, signs: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """Utilities of a population of which some members are missing.

    Those have the utility 0. Eagerly, the others are shaped as if there were
    no more than them. In a graph, where shapes have to be static, the missing
    ones take part with the losses of other directions, in turn; the utilities
    of the others have the mean 0 then. (With "identity" and M of N known, what
    pairs have in common is weighted by N (M - signs) / (M (N - signs)):
    stand-ins are no other members.)

    Args:
        shape: from losses [N] to utilities [N].
        losses: [N], all of the first sign first; NaN where missing. In a
            graph for both or none of a pair.
        signs: members of a direction, 1 or 2.

    Returns:
        Utilities [N], and how many members are known.
    """
    known = ~tf.math.is_nan(losses)
    if tf.executing_eagerly():
        count = tf.math.count_nonzero(known, dtype=losses.dtype)
        return shaped_known(shape, losses, known), count
    directions = losses.shape[0] // signs
    first = known[:directions]
    count = tf.math.count_nonzero(first, dtype=tf.int32)
    known_first = tf.argsort(tf.cast(~first, tf.int32), stable=True)
    turn = tf.cumsum(tf.cast(~first, tf.int32)) - 1
    stand_in = tf.where(
        first,
        tf.range(directions),
        tf.gather(known_first, tf.math.floormod(turn, tf.maximum(count, 1))),
    )
    by_sign = tf.reshape(losses, [signs, directions])
    complete = tf.reshape(tf.gather(by_sign, stand_in, axis=1), [-1])
    complete = tf.ensure_shape(complete, losses.shape)
    utilities = shape(complete)
    weights = tf.cast(known, utilities.dtype)
    members = tf.reduce_sum(weights)
    mean = tf.math.divide_no_nan(tf.reduce_sum(weights * utilities), members)
    utilities = tf.where(
        tf.reduce_all(known), utilities, weights * (utilities - mean)
    )
    return utilities, members


def with_former(
    losses: tf.Tensor, former: tf.Tensor | None, examples: tf.Tensor
) -> tf.Tensor:
    """Losses with those that were known before. Of an empty batch, which says
    nothing beside these, none are finite: there is no step of it.
    """
    if former is None:
        return losses
    former = tf.cast(former, losses.dtype)
    losses = tf.where(tf.math.is_nan(former), losses, former)
    return tf.where(examples > 0, losses, math.inf)
