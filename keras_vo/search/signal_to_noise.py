"""How much of a search gradient is signal: split-half, over all splits.

The search gradient is a sum over directions, g = sum_n c_n. Split them at
random into two halves, whose own estimates of the gradient are g1 and g2, so
that g = (g1 + g2) / 2. Given what the directions have in common (the batch),
both are the true gradient and independent noise of one size, so that

    E <g1, g2>            = |E g|^2                    the power of the signal
    E |g1 - g2|^2 / 4     = E |g - E g|^2              the power of the noise

and <g1, g2> = |g|^2 - |g1 - g2|^2 / 4. One split depends on the luck of it.
The mean over all splits into equal halves needs none: it is the variance of a
mean [1, section 2], estimated from the D directions,

    noise  = D / (D - 1) (sum_n |c_n|^2 - |g|^2 / D)
    signal = |g|^2 - noise
    SNR    = signal / noise

which is 0 in expectation of its parts if utilities are unrelated to the noise,
then below 0 as often as above, and never below -1. It takes one number more
than the gradient, sum_n |c_n|^2, which is a sum over chunks and replicas.
Populations of several levels of credit have gradients of other variables, whose
powers add up.

Each kind of noise has its own c_n; none of them is formed:

    full        c_n = u_n f z_n:     |c_n|^2 = u_n^2 sum_i f_i^2 z_ni^2
    low rank    c_n = u_n f E_n:     |A^T B|^2 = tr(A A^T B B^T)
    local       c_n = f sum_b A_b s_b^T: one column of it, times the number of
                columns; which one changes from one to the next

where f is what the optimizer multiplies the score with. Where noise is local,
even a column a direction takes time beside a step of few members: it is looked
at in one of `EVERY` steps.

References:
    [1] Efron, Stein, "The Jackknife Estimate of Variance", Annals of
        Statistics 9(3), 1981.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import tensorflow as tf

from keras_vo.search.members import Members

__all__ = [
    "EVERY",
    "Probe",
    "looks_now",
    "signal_to_noise",
]

EVERY = 8


class Probe(NamedTuple):
    """What a search gradient is to be measured by.

    Attributes:
        scales: what dU/dmu is multiplied with to be the gradient that the
            inner optimizer gets, for each variable a scalar or shaped like it.
        generation: scalar int64, so that other columns are looked at in each.
        every: of how many steps one is looked at.
    """

    scales: Sequence[tf.Tensor]
    generation: tf.Tensor
    every: int = 1

    @property
    def looks_at_columns(self) -> tf.Tensor:
        """Whether it does in this step: see `EVERY`."""
        return looks_now(self.generation, self.every)

    def ids(self, members: Members, population: int) -> tf.Tensor:
        """Numbers [directions] of those of some members, counted over
        generations of `population` directions.
        """
        return members.generation * population + members.index


def looks_now(generation: tf.Tensor, every: int) -> tf.Tensor:
    """Whether what takes long is measured in a step: in one of `EVERY`, of
    those that are looked at.

    Args:
        generation: of the step, a scalar.
        every: of how many steps one is looked at.
    """
    return (generation + 1) % (-(-EVERY // every) * every) == 0


def signal_to_noise(
    squared_norms: Sequence[tf.Tensor],
    squares: Sequence[tf.Tensor],
    directions: Sequence[tf.Tensor],
) -> tf.Tensor:
    """The SNR; NaN of less than two directions, or if the noise is not above 0.

    That may be where its squares are estimated from few columns.

    Args:
        squared_norms: |g|^2 of each part of the gradient that has directions
            of its own.
        squares: sum_n |c_n|^2, alike.
        directions: D, alike.
    """
    noise = tf.add_n(
        [
            count / (count - 1) * (square - norm / count)
            for norm, square, count in zip(
                squared_norms, squares, directions, strict=True
            )
        ]
    )
    snr = tf.add_n(squared_norms) / noise - 1.0
    known = (noise > 0) & (tf.reduce_min(directions) > 1)
    return tf.where(known, snr, tf.constant(math.nan, snr.dtype))
