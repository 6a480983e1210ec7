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

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from keras_vo.constraints import constraint_of
from keras_vo.perturbations.base import (
    DenseCall,
    Perturbation,
    Space,
    VariableGradient,
    shared_product,
)
from keras_vo.search import estimators
from keras_vo.search.chunks import Noise
from keras_vo.search.credit import Rows

if TYPE_CHECKING:
    from keras_vo.perturbations.scope import Evaluation

__all__ = [
    "LowRank",
    "kernel_noise",
    "kernel_squares",
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


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """A kernel that is perturbed by noise of low rank.

    Attributes:
        variable: it, [in, out].
        index: of the variable.
        rank: r.
        mean: W.
        stddev: sigma, a scalar or [in, out].
        factor: what the score becomes the optimizer's gradient with, if that
            is measured.
    """

    variable: Any
    index: int
    rank: int
    mean: tf.Tensor
    stddev: tf.Tensor
    factor: tf.Tensor | None

    @property
    def size(self) -> int:
        """Number of normals of a direction: A, then B."""
        return self.rank * sum(self.mean.shape)

    @property
    def shared(self) -> bool:
        """Whether the kernel has a single variance."""
        return self.stddev.shape.rank == 0

    @property
    def fisher(self) -> float:
        """Variance of the score of one log variance, `log_variance_sums`.

        r in / 2 from A and r out / 2 from B, weighted by out and in. Where
        each weight has its own, an equal part of it.
        """
        inputs, outputs = self.mean.shape
        each = 0.5 * self.rank / (inputs + outputs)
        return inputs * outputs * each if self.shared else each

    def factors(self, noise: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """A [..., r, in] and B [..., r, out] from noise [..., size]."""
        leading = [-1 if n is None else n for n in noise.shape[:-1]]
        sizes = [self.rank * size for size in self.mean.shape]
        left, right = (
            tf.reshape(part, [*leading, self.rank, size])
            for part, size in zip(
                tf.split(noise, sizes, axis=-1), self.mean.shape, strict=True
            )
        )
        return left, right


class LowRank(Perturbation):
    """Noise of low rank on the kernels of `LowRankDense`."""

    name = "low_rank"

    def __init__(self, claims: Sequence[DenseCall], space: Space) -> None:
        gaussian = space.gaussian
        self._adapts = space.adapts
        self._kernels = []
        for call in claims:
            index = space.positions[id(call.kernel)]
            stddev = gaussian.tensor_stddevs[index]
            factor = None
            if space.probe is not None:
                factor = space.probe.scales[index] / stddev
            self._kernels.append(
                _Kernel(
                    call.kernel,
                    index,
                    call.options["rank"],
                    gaussian.means[index],
                    stddev,
                    factor,
                )
            )
        self.variables = [kernel.index for kernel in self._kernels]
        self.noise_size = sum(kernel.size for kernel in self._kernels)

    def activation_bytes(self, signs: int) -> int:
        """The perturbed kernels that regularizers and constraints read."""
        return signs * sum(
            kernel.mean.shape.num_elements() * kernel.stddev.dtype.size
            for kernel in self._kernels
            if getattr(kernel.variable, "regularizer", None)
            or constraint_of(kernel.variable)
        )

    def member(
        self, noise: Noise, sign: float
    ) -> tuple[Mapping[int, tf.Tensor], Any]:
        weights, products = {}, {}
        for kernel, (left, right) in self._factors(noise.weights):
            right = sign * right
            factors = (kernel.mean, kernel.stddev, left, right)
            products[id(kernel.variable)] = factors
            # Read by a regularizer, a constraint.
            change = kernel.stddev * kernel_noise(left, right)
            mean = kernel.mean
            weights[kernel.index] = mean + tf.cast(change, mean.dtype)
        return weights, products

    def call(
        self, call: DenseCall, state: Any, evaluation: Evaluation
    ) -> tf.Tensor:
        """x (W + sigma E) for the member's noise E.

        With a constraint, x P(W + sigma E): the kernel has to be formed.
        """
        formed = constraint_of(call.kernel) is not None
        if formed or id(call.kernel) not in state:  # not called at mu
            return call.plain()
        mean, stddev, left, right = (
            tf.cast(t, call.inputs.dtype) for t in state[id(call.kernel)]
        )
        return call.biased(
            shared_product(call.inputs, mean)
            + product(call.inputs, stddev, left, right)
        )

    def sums(
        self, noise: Noise, records: Any, rows: Rows
    ) -> dict[str, tf.Tensor]:
        odd, even = estimators.pair_utilities(rows.utilities)
        sums, squares = {}, []
        for number, (kernel, factors) in enumerate(
            self._factors(noise.weights)
        ):
            sums[f"mean/{number}"] = mean_sums(*factors, odd)
            if self._adapts:
                sums[f"log_variance/{number}"] = log_variance_sums(
                    *factors, even, kernel.shared
                )
            if rows.ids is not None and kernel.factor is not None:
                squares.append(kernel_squares(*factors, odd, kernel.factor))
        if squares:
            sums["squares"] = tf.add_n(squares)
        return sums

    def gradient(
        self, sums: Mapping[str, tf.Tensor], count: tf.Tensor
    ) -> Iterator[VariableGradient]:
        for number, kernel in enumerate(self._kernels):
            mean = estimators.mean_gradient(
                sums[f"mean/{number}"], kernel.stddev, count
            )
            beta = None
            if self._adapts:
                beta = estimators.log_variance_gradient(
                    sums[f"log_variance/{number}"], count
                )
            yield VariableGradient(kernel.index, mean, beta, kernel.fisher)

    def _factors(
        self, noise: tf.Tensor
    ) -> list[tuple[_Kernel, tuple[tf.Tensor, tf.Tensor]]]:
        parts = tf.split(noise, [k.size for k in self._kernels], axis=-1)
        return [
            (kernel, kernel.factors(part))
            for kernel, part in zip(self._kernels, parts, strict=True)
        ]


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


def _scaled(left: tf.Tensor) -> tf.Tensor:
    return left * left.shape[-2] ** -0.5
