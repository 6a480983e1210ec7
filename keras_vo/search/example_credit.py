"""Credit by example: from the losses of examples to their utilities.

Where the noise of an example is its own, so is its credit: what its loss is in
one member less what it is in the others.
"""

from __future__ import annotations

import tensorflow as tf

from keras_vo.fitness_shaping import identity
from keras_vo.search.communicator import Communicator
from keras_vo.search.credit import EXAMPLE, Outcomes, narrow

__all__ = ["example_utilities", "on_one_scale"]


def example_utilities(
    outcomes: Outcomes,
    signs: int,
    loss_scaled: bool,
    counts: bool,
    communicator: Communicator,
    dtype: tf.DType,
) -> tf.Tensor:
    """Utilities [N, batch] of the examples of this replica.

    With losses f and weights a of examples (f_nb includes a_b),

        u_nb = (f_nb - mean of f_mb) / s,   s^2 = mean of a_b (u_nb / a_b)^2

    where the mean is over the members m that do not share member n's noise,
    and s, if losses have it, is one scale for all examples and members of all
    replicas. So examples keep their say: shaped each by itself, one whose loss
    hardly depends on the noise would have as much as any other, and the
    search would go for the sign of each example's gradient.

    Args:
        outcomes: with losses of examples.
        signs: members of a direction, 1 or 2.
        loss_scaled: whether utilities are to have the scale of the losses:
            then s is 1.
        counts: whether this replica's members do.
        communicator: to the other replicas.
        dtype: of the utilities, see `narrow`.
    """
    losses = outcomes.losses[EXAMPLE]
    weights = tf.cast(outcomes.example_weights, losses.dtype)
    changes = identity(
        tf.math.divide_no_nan(losses, weights), antithetic=signs == 2
    )
    if not loss_scaled:
        own = tf.cast(counts, tf.float64) * tf.cast(weights, tf.float64)
        own = tf.broadcast_to(own, tf.shape(losses)[1:])
        squares = tf.reduce_mean(_squared(changes), axis=0)
        changes = _over_root(
            changes,
            *communicator.sum(
                [tf.reduce_sum(own * squares), tf.reduce_sum(own)]
            ),
        )
    return narrow(weights * changes, losses, dtype)


def on_one_scale(losses: tf.Tensor, signs: int, loss_scaled: bool) -> tf.Tensor:
    """The losses [N] less those of the others, of mean square 1.

    Args:
        losses: of members.
        signs: members of a direction, 1 or 2.
        loss_scaled: whether they keep their scale.
    """
    changes = identity(losses, antithetic=signs == 2)
    if loss_scaled:
        return changes
    squares = _squared(changes)
    return _over_root(changes, tf.reduce_mean(squares), tf.ones([], tf.float64))


def _squared(values: tf.Tensor) -> tf.Tensor:
    """Squares, of which float32 could not hold all."""
    return tf.square(tf.cast(values, tf.float64))


def _over_root(
    values: tf.Tensor, squares: tf.Tensor, count: tf.Tensor
) -> tf.Tensor:
    """values / sqrt(squares / count); 0 where that is 0."""
    scale = tf.sqrt(tf.math.divide_no_nan(squares, count))
    wide = tf.math.divide_no_nan(tf.cast(values, tf.float64), scale)
    return tf.cast(wide, values.dtype)
