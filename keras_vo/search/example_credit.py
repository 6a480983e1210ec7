"""Credit by example: from the losses of examples to their utilities.

Where the noise of an example is its own, so is its credit: what its loss is in
one member less what it is in the others. Where its loss is a sum over
positions (the tokens of a text), noise at a position may have the credit of
the position's own part, and of later ones.
"""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from keras_vo.fitness_shaping import identity
from keras_vo.search.communicator import Communicator
from keras_vo.search.credit import EXAMPLE, POSITION, Outcomes, narrow

__all__ = ["Scale", "later", "on_one_scale", "position_losses", "utilities"]


class Scale(NamedTuple):
    """How losses less their baselines are made utilities.

    Attributes:
        signs: members of a direction, 1 or 2.
        loss_scaled: whether utilities are to have the scale of the losses.
        counts: whether this replica's members do.
        communicator: to the other replicas.
        dtype: of the utilities, see `narrow`.
    """

    signs: int
    loss_scaled: bool
    counts: bool
    communicator: Communicator
    dtype: tf.DType


def utilities(
    outcomes: Outcomes, discount: float, scale: Scale
) -> dict[str, tf.Tensor]:
    """Utilities of the examples and positions of this replica.

    Args:
        outcomes: with losses of examples, and of positions or not.
        discount: see `position_losses`.
        scale: of the utilities.

    Returns:
        By the names of `Rows`: "utilities" [N, batch] and, if there are
        losses of positions, "positions" [N, batch, ...].
    """
    found = {
        "utilities": _utilities(
            outcomes.losses[EXAMPLE],
            outcomes.weights.get(EXAMPLE, 1.0),
            scale,
        )
    }
    if POSITION in outcomes.losses:
        losses, weights = position_losses(outcomes, discount)
        weights = _of_mean_one(weights, scale)
        found["positions"] = _utilities(losses, weights, scale)
    return found


def position_losses(
    outcomes: Outcomes, discount: float
) -> tuple[tf.Tensor, tf.Tensor]:
    """What noise at a position is judged by, and its weights.

    With the parts f_bt of which an example's loss is the sum,

        g_bt = f_bt + discount f_b(t+1) + discount^2 f_b(t+2) + ...

    What the noise at t does to other positions is not in it, but for later
    ones. Where there is nothing else, the gradient has the same mean as by
    example, without the noise of the other positions: a variance less by
    about their number. Elsewhere it is biased.

    Args:
        outcomes: with losses of positions [N, batch, time, ...]. Along axes
            behind that of time, each position has credit for itself.
        discount: of the part of the next position, in [0, 1].

    Returns:
        g [N, batch, time, ...], and like it without N what it is weighted by.
    """
    losses = outcomes.losses[POSITION]
    ones = tf.ones(tf.shape(losses)[1:], losses.dtype)
    weights = tf.cast(outcomes.weights.get(POSITION, 1.0), losses.dtype) * ones
    return later(losses, discount, axis=2), later(weights, discount, axis=1)


def later(values: tf.Tensor, discount: float, axis: int) -> tf.Tensor:
    """g_t = f_t + discount g_(t+1) along an axis."""
    if discount == 0:
        return values
    first = [axis, *(i for i in range(values.shape.rank) if i != axis)]
    back = [first.index(i) for i in range(values.shape.rank)]
    summed = tf.scan(
        lambda after, value: value + discount * after,
        tf.transpose(values, first),
        reverse=True,
    )
    return tf.transpose(summed, back)


def _of_mean_one(weights: tf.Tensor, scale: Scale) -> tf.Tensor:
    """Weights divided by their mean over all replicas."""
    counts = tf.cast(scale.counts, weights.dtype)
    total, count = scale.communicator.sum(
        [
            counts * tf.reduce_sum(weights),
            counts * tf.cast(tf.size(weights), weights.dtype),
        ]
    )
    return tf.math.divide_no_nan(weights, total / count)


def _utilities(
    losses: tf.Tensor, weights: tf.Tensor | float, scale: Scale
) -> tf.Tensor:
    """Utilities of what has losses f [N, ...] and weights a [...].

    f_n includes a. Of an example or a position b,

        u_nb = (f_nb - mean of f_mb) / s,   s^2 = mean of a_b (u_nb / a_b)^2

    where the mean is over the members m that do not share member n's noise,
    and s, unless utilities have the scale of losses, is one scale for all b
    and members of all replicas. So examples keep their say: shaped each by
    itself, one whose loss hardly depends on the noise would have as much as
    any other, and the search would go for the sign of each example's gradient.
    """
    weights = tf.cast(weights, losses.dtype)
    changes = identity(
        tf.math.divide_no_nan(losses, weights), antithetic=scale.signs == 2
    )
    if not scale.loss_scaled:
        own = tf.cast(scale.counts, tf.float64) * tf.cast(weights, tf.float64)
        own = tf.broadcast_to(own, tf.shape(losses)[1:])
        squares = tf.reduce_mean(_squared(changes), axis=0)
        changes = _over_root(
            changes,
            *scale.communicator.sum(
                [tf.reduce_sum(own * squares), tf.reduce_sum(own)]
            ),
        )
    return narrow(weights * changes, losses, scale.dtype)


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
