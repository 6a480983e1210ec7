"""How much of a search gradient is signal: split-half, over all splits.

The search gradient is a sum over draws, g = sum_n c_n. Split the draws at
random into two halves, whose own estimates of the gradient are g1 and g2, so
that g = (g1 + g2) / 2. Given what the draws have in common (the batch), both
are the true gradient and independent noise of one size, so that

    E <g1, g2>            = |E g|^2                    the power of the signal
    E |g1 - g2|^2 / 4     = E |g - E g|^2              the power of the noise

and <g1, g2> = |g|^2 - |g1 - g2|^2 / 4. One split depends on the luck of it.
The mean over all splits into equal halves needs none: it is the variance of a
mean [1, section 2], estimated from the D draws,

    noise  = D / (D - 1) (sum_n |c_n|^2 - |g|^2 / D)
    signal = |g|^2 - noise
    SNR    = signal / noise

which is 0 in expectation of its parts if utilities are unrelated to the noise,
then below 0 as often as above, and never below -1. It takes one number more
than the gradient, sum_n |c_n|^2, which is a sum over chunks and replicas.

Each kind of noise has its own c_n; none of them is formed:

    full        c_n = u_n f z_n:     |c_n|^2 = u_n^2 sum_i f_i^2 z_ni^2
    low rank    c_n = u_n f E_n:     |A^T B|^2 = tr(A A^T B B^T)
    local       c_n = f sum_b A_b s_b^T: one column of it, times the number of
                columns; which one changes from draw to draw

where f is what the optimizer multiplies the score with. Of the full noise, at
most `COLUMNS` weights are looked at: the z_i^2 of the others have the same
mean 1, whatever their f_i. Where noise is local, even a column a draw takes
time beside a step of few members: it is looked at in one of `EVERY` steps.

References:
    [1] Efron, Stein, "The Jackknife Estimate of Variance", Annals of
        Statistics 9(3), 1981.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import tensorflow as tf

__all__ = [
    "COLUMNS",
    "EVERY",
    "Probe",
    "column_squares",
    "full_squares",
    "kernel_squares",
    "signal_to_noise",
]

COLUMNS = 1024
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
        every = -(-EVERY // self.every) * self.every
        return (self.generation + 1) % every == 0

    def ids(self, draws: int, start: int, size: int) -> tf.Tensor:
        """Numbers [size] of a replica's draws, counted over generations."""
        first = tf.cast(self.generation, tf.int64) * draws + start
        return first + tf.range(size, dtype=tf.int64)


def full_squares(
    noise: tf.Tensor, weights: tf.Tensor, factor: tf.Tensor
) -> tf.Tensor:
    """sum_n u_n^2 |f z_n|^2: noise [n, d], weights u [n], f [d] or [1]."""
    size = noise.shape[-1]
    looked_at = min(size, COLUMNS)
    squares = tf.broadcast_to(tf.square(factor), [size])
    some = squares[:looked_at]
    norms = tf.linalg.matvec(tf.square(noise[:, :looked_at]), some)
    if looked_at < size:
        norms *= tf.reduce_sum(squares) / tf.reduce_sum(some)
    return tf.reduce_sum(tf.square(weights) * norms)


def kernel_squares(
    left: tf.Tensor, right: tf.Tensor, weights: tf.Tensor, factor: tf.Tensor
) -> tf.Tensor:
    """sum_n u_n^2 |f E_n|^2, E_n = A_n^T B_n / sqrt(r).

    Args:
        left: A [n, r, in].
        right: B [n, r, out].
        weights: u [n].
        factor: f, a scalar or [in, out]; f^2 is taken for the product of a
            term of the row and one of the column, as it is where low-rank
            noise has changed sigma.
    """
    rank = left.shape[-2]
    if factor.shape.rank:
        squares = tf.square(factor)
        total = tf.reduce_sum(squares)
        left *= tf.sqrt(tf.reduce_sum(squares, axis=1) / total)
        right *= tf.sqrt(tf.reduce_sum(squares, axis=0))
    else:
        left *= factor
    traces = tf.reduce_sum(
        tf.matmul(left, left, transpose_b=True)
        * tf.matmul(right, right, transpose_b=True),
        axis=[1, 2],
    )
    return tf.reduce_sum(tf.square(weights) * traces) / rank


def column_squares(columns: tf.Tensor, units: int) -> tf.Tensor:
    """sum_n |c_n|^2 from one of its `units` columns a draw, [n, rows]."""
    return units * tf.reduce_sum(tf.square(columns))


def signal_to_noise(
    squared_norm: tf.Tensor, squares: tf.Tensor, draws: tf.Tensor
) -> tf.Tensor:
    """The SNR; NaN of less than two draws, or if the noise is not above 0.

    That may be where its squares are estimated from few columns.

    Args:
        squared_norm: |g|^2.
        squares: sum_n |c_n|^2.
        draws: D.
    """
    noise = draws / (draws - 1) * (squares - squared_norm / draws)
    snr = squared_norm / noise - 1.0
    known = (noise > 0) & (draws > 1)
    return tf.where(known, snr, tf.constant(math.nan, snr.dtype))
