"""Low-rank noise for a kernel.

The kernel [in, out] of a member is W + sigma E with

    E = A^T B / sqrt(r),   A [r, in], B [r, out] ~ N(0, 1)            [1]

so that x (W + sigma E) = x W + sigma (x A^T) B / sqrt(r): members share the
product with W, no perturbed kernel is formed, and r (in + out) numbers are
drawn instead of in * out. The entries of E have mean 0, variance 1 and no
correlation.

A kernel of more axes has its last one as out, all others as in.

Search gradient of the mean: the score of a Gaussian with E in the place of z,
1/N sum u_n E_n / sigma [1]. It is unbiased where f is linear, and tends to
that of full-rank noise as r grows.

Search gradient of beta = log sigma^2: E is not Gaussian (its entries are
uncorrelated but dependent), so that the score of a Gaussian would be wrong by
a factor of about 1 + (in + out) / r. But sigma is a scale of the Gaussian A,
and as well of the Gaussian B: the columns of
sigma A have the exact score

    a_j = (|A_j|^2 - r) / 2     for the log variance of input j's row,
    b_i = (|B_i|^2 - r) / 2     for that of output i's column.

Where the kernel shares one variance, sum_j a_j and sum_i b_i are two unbiased
estimates of the same derivative; they are averaged with weights out and in,
which has the least variance. Where each weight has its own, noise of low rank
shows only what whole rows and columns contribute; the estimate

    a_j / out + b_i / in - (their common total) / (in out)

is the projection of the gradient onto such effects, so that log sigma^2
changes by a term of the row and a term of the column.

References:
    [1] Sarkar et al., "Evolution Strategies at the Hyperscale", 2025,
        arXiv 2511.16652.
"""

from __future__ import annotations

import tensorflow as tf

__all__ = [
    "kernel_noise",
    "kernel_squares",
    "log_variance_sums",
    "mean_sums",
    "product",
    "scaled",
]


def kernel_noise(left: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
    """E [in, out] from A [r, in] and B [r, out]."""
    return tf.linalg.matmul(scaled(left), right, transpose_a=True)


def product(
    inputs: tf.Tensor, stddev: tf.Tensor, left: tf.Tensor, right: tf.Tensor
) -> tf.Tensor:
    """x (sigma E), without E.

    Args:
        inputs: x [..., in].
        stddev: sigma, a scalar or [in, out].
        left: A [r, in].
        right: B [r, out].

    Returns:
        [..., out].
    """
    left = scaled(left)
    if stddev.shape.rank == 0:
        inner = tf.linalg.matmul(inputs, stddev * left, transpose_b=True)
        return tf.linalg.matmul(inner, right)
    # x (S * a^T b) = ((x * a) S) * b, for each row a of A and b of B.
    pairs = zip(tf.unstack(left), tf.unstack(right), strict=True)
    return tf.add_n(
        [tf.linalg.matmul(inputs * a, stddev) * b for a, b in pairs]
    )


def mean_sums(
    left: tf.Tensor, right: tf.Tensor, weights: tf.Tensor
) -> tf.Tensor:
    """sum_n u_n E_n [in, out]: A [n, r, in], B [n, r, out] and u [n]."""
    weighted = scaled(left) * tf.reshape(weights, [-1, 1, 1])
    return tf.linalg.matmul(
        tf.reshape(weighted, [-1, left.shape[-1]]),
        tf.reshape(right, [-1, right.shape[-1]]),
        transpose_a=True,
    )


def log_variance_sums(
    left: tf.Tensor, right: tf.Tensor, weights: tf.Tensor, shared: bool
) -> tf.Tensor:
    """Twice the sums for dU/dbeta: A [n, r, in], B [n, r, out] and u [n].

    Args:
        left: A.
        right: B.
        weights: u.
        shared: whether the kernel has a single variance.

    Returns:
        A scalar if `shared`, else [in, out].
    """
    inputs, outputs = left.shape[-1], right.shape[-1]
    rows = _excess(left, weights)
    columns = _excess(right, weights)
    total = (
        outputs * tf.reduce_sum(rows) + inputs * tf.reduce_sum(columns)
    ) / (inputs + outputs)
    if shared:
        return total
    return (
        rows[:, None] / outputs
        + columns[None, :] / inputs
        - total / (inputs * outputs)
    )


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


def _excess(factor: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    """sum_n u_n (|F_k|^2 - r), for each column k of F [n, r, size]."""
    squares = tf.reduce_sum(tf.square(factor) - 1.0, axis=1)
    return tf.linalg.matvec(squares, weights, transpose_a=True)


def scaled(left: tf.Tensor) -> tf.Tensor:
    """A / sqrt(r)."""
    return left * left.shape[-2] ** -0.5
