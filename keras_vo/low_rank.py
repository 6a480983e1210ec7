"""Low-rank noise for a dense kernel.

The kernel [in, out] of a member is W + sigma E with

    E = A^T B / sqrt(r),   A [r, in], B [r, out] ~ N(0, 1)            [1]

so that x (W + sigma E) = x W + sigma (x A^T) B / sqrt(r): members share the
product with W, no perturbed kernel is formed, and r (in + out) numbers are
drawn instead of in * out. The entries of E have mean 0, variance 1 and no
correlation.

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

from keras_vo.signal_to_noise import kernel_squares

__all__ = [
    "KernelNoise",
    "kernel_noise",
    "log_variance_sums",
    "mean_sums",
    "product",
]


def kernel_noise(left: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
    """E [in, out] from A [r, in] and B [r, out]."""
    return tf.linalg.matmul(_scaled(left), right, transpose_a=True)


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
    left = _scaled(left)
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
    weighted = _scaled(left) * tf.reshape(weights, [-1, 1, 1])
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


class KernelNoise:
    """The noise of one kernel, from a vector of normals a draw: A, then B.

    Args:
        rank: r.
        shape: of the kernel, (in, out).
        variance: sigma^2, a scalar or [in, out].
    """

    def __init__(
        self, rank: int, shape: tuple[int, ...], variance: tf.Tensor
    ) -> None:
        self._rank = rank
        self._shape = shape
        self._sizes = [rank * size for size in shape]
        self._shared = variance.shape.rank == 0
        self._stddev = tf.sqrt(variance)

    @property
    def size(self) -> int:
        """Number of normals of a draw."""
        return sum(self._sizes)

    @property
    def fisher(self) -> float:
        """Variance of the score of one log variance, `log_variance_sums`.

        r in / 2 from A and r out / 2 from B, weighted by out and in.
        """
        inputs, outputs = self._shape
        return 0.5 * self._rank * inputs * outputs / (inputs + outputs)

    def factors(
        self, noise: tf.Tensor, sign: float
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Sigma, A [r, in] and sign B [r, out]."""
        left, right = self._split(noise)
        return self._stddev, left, sign * right

    def change(self, noise: tf.Tensor, sign: float) -> tf.Tensor:
        """sign sigma E [in, out]."""
        stddev, left, right = self.factors(noise, sign)
        return stddev * kernel_noise(left, right)

    def mean_sums(self, noise: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
        """`mean_sums` over the noise [n, size]."""
        return mean_sums(*self._split(noise), weights)

    def log_variance_sums(
        self, noise: tf.Tensor, weights: tf.Tensor
    ) -> tf.Tensor:
        """`log_variance_sums` over the noise [n, size]."""
        return log_variance_sums(*self._split(noise), weights, self._shared)

    def squares(
        self, noise: tf.Tensor, weights: tf.Tensor, scale: tf.Tensor
    ) -> tf.Tensor:
        """`signal_to_noise.kernel_squares` over the noise [n, size].

        Args:
            noise: of a chunk's draws.
            weights: theirs, [n].
            scale: what dU/dmu is multiplied with, a scalar or [in, out].
        """
        factor = scale / self._stddev
        return kernel_squares(*self._split(noise), weights, factor)

    def _split(self, noise: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        leading = [-1 if n is None else n for n in noise.shape[:-1]]
        left, right = (
            tf.reshape(part, [*leading, self._rank, size // self._rank])
            for part, size in zip(
                tf.split(noise, self._sizes, axis=-1), self._sizes, strict=True
            )
        )
        return left, right


def _excess(factor: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    """sum_n u_n (|F_k|^2 - r), for each column k of F [n, r, size]."""
    squares = tf.reduce_sum(tf.square(factor) - 1.0, axis=1)
    return tf.linalg.matvec(squares, weights, transpose_a=True)


def _scaled(left: tf.Tensor) -> tf.Tensor:
    return left * left.shape[-2] ** -0.5
