"""How a population is shared out over replicas: pure functions.

Replica r of R evaluates a contiguous range of the draws. All replicas then
know all losses, from which each computes the same utilities. A draw is a
function of (seed, generation, index), so that nothing else has to be
communicated for any of them to reconstruct the gradient [1, algorithm 2].

A replica whose shard of the batch is empty has evaluated nothing; its members
count for nothing.

References:
    [1] Salimans et al., "Evolution Strategies as a Scalable Alternative to
        Reinforcement Learning", arXiv 1703.03864, 2017.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import tensorflow as tf

__all__ = ["Share", "shaped_where_evaluated", "was_evaluated"]


@dataclasses.dataclass(frozen=True)
class Share:
    """The draws that one of several replicas evaluates.

    Attributes:
        draws: number of draws of the whole population.
        start: index of the first one of this replica.
        size: how many it evaluates, at least one.
        counts: False where there are more replicas than draws and this one
            has none: what it evaluates is another one's.
    """

    draws: int
    start: int
    size: int
    counts: bool = True

    @classmethod
    def make(cls, draws: int, replica: int, replicas: int) -> Share:
        """Shares as equal as they can be."""
        start = replica * draws // replicas
        end = (replica + 1) * draws // replicas
        if start == end:
            return cls(draws, start, 1, counts=False)
        return cls(draws, start, end - start)

    def take(self, values: tf.Tensor) -> tf.Tensor:
        """This replica's rows of [draws, ...]; zeros if none count."""
        own = values[self.start : self.start + self.size]
        return own if self.counts else tf.zeros_like(own)

    def place(self, losses: tf.Tensor, evaluated: tf.Tensor) -> tf.Tensor:
        """This replica's losses among all: the terms of a sum over replicas.

        Args:
            losses: [signs size], all of the first sign first.
            evaluated: scalar bool, whether there was anything to evaluate.

        Returns:
            [signs draws]: 0 for the members of other replicas, and the lowest
            finite number for a member that was not evaluated.
        """
        by_sign = tf.reshape(losses, [-1, self.size])
        by_sign = tf.where(evaluated, by_sign, losses.dtype.min)
        if not self.counts:
            by_sign = tf.zeros_like(by_sign)
        after = self.draws - self.start - self.size
        return tf.reshape(tf.pad(by_sign, [[0, 0], [self.start, after]]), [-1])


def was_evaluated(losses: tf.Tensor) -> tf.Tensor:
    """Which members [N] were: from the sum of `Share.place` over replicas."""
    return tf.not_equal(losses, losses.dtype.min)


def shaped_where_evaluated(
    shape_fitness: Callable[[tf.Tensor], tf.Tensor],
    losses: tf.Tensor,
    evaluated: tf.Tensor,
    signs: int,
) -> tf.Tensor:
    """Utilities [N] of a population of which some were not evaluated.

    Those take part in the shaping with the losses of other draws, in turn,
    and have the utility 0. The utilities of the others are scaled such that
    1/N sum_n u_n z_n is the mean over those that were evaluated. (With
    "identity" and M evaluated, what pairs have in common is weighted by
    N (M - signs) / (M (N - signs)): stand-ins are no other members.)

    Args:
        shape_fitness: from losses [N] to utilities [N].
        losses: [N], all of the first sign first.
        evaluated: [N]; of both or none of a pair.
        signs: members of a draw, 1 or 2.
    """
    draws = losses.shape[0] // signs
    known = evaluated[:draws]
    count = tf.math.count_nonzero(known, dtype=tf.int32)
    known_first = tf.argsort(tf.cast(~known, tf.int32), stable=True)
    turn = tf.cumsum(tf.cast(~known, tf.int32)) - 1
    stand_in = tf.where(
        known,
        tf.range(draws),
        tf.gather(known_first, tf.math.floormod(turn, tf.maximum(count, 1))),
    )
    by_sign = tf.reshape(losses, [signs, draws])
    complete = tf.reshape(tf.gather(by_sign, stand_in, axis=1), [-1])
    complete = tf.ensure_shape(complete, losses.shape)
    utilities = shape_fitness(complete)
    weights = tf.cast(evaluated, utilities.dtype)
    members = tf.reduce_sum(weights)
    mean = tf.math.divide_no_nan(tf.reduce_sum(weights * utilities), members)
    scale = tf.math.divide_no_nan(
        tf.cast(losses.shape[0], utilities.dtype), members
    )
    return tf.where(
        tf.reduce_all(evaluated),
        utilities,
        scale * weights * (utilities - mean),
    )
