"""Low-rank noise on kernels: see `keras_vo.search.low_rank`.

Where a product of the factors is written (Dense, EinsumDense, Embedding), no
member's kernel is formed for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from keras_vo.constraints import constraint_of
from keras_vo.perturbations.base import (
    Perturbation,
    Space,
    VariableGradient,
)
from keras_vo.perturbations.calls import (
    DenseCall,
    EinsumCall,
    LayerCall,
    LookupCall,
    shared_product,
)
from keras_vo.search import estimators
from keras_vo.search.chunks import Noise
from keras_vo.search.credit import Rows
from keras_vo.search.low_rank import (
    kernel_noise,
    kernel_squares,
    log_variance_sums,
    mean_sums,
    product,
    scaled,
)

if TYPE_CHECKING:
    from keras_vo.perturbations.scope import Evaluation, Recording

__all__ = ["LowRank"]


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """A kernel that is perturbed by noise of low rank.

    Attributes:
        variable: it, [..., out].
        index: of the variable.
        rank: r.
        mean: W, [in, out].
        stddev: sigma, a scalar or [in, out].
        shared: whether the kernel has a single log variance.
        formed: whether a member's W + sigma E is formed for each call.
        factor: what the score becomes the optimizer's gradient with, if that
            is measured.
    """

    variable: Any
    index: int
    rank: int
    mean: tf.Tensor
    stddev: tf.Tensor
    shared: bool
    formed: bool
    factor: tf.Tensor | None

    @property
    def size(self) -> int:
        """Number of normals of a direction: A, then B."""
        return self.rank * sum(self.mean.shape)

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
    """Noise of low rank on kernels of two axes and more."""

    name = "low_rank"
    automatic = (DenseCall, EinsumCall, LookupCall)

    def __init__(self, claims: Sequence[LayerCall], space: Space) -> None:
        gaussian = space.gaussian
        self._adapts = space.adapts
        self._kernels = []
        # Whose noise is whose does not depend on the order of the calls.
        for call in sorted(claims, key=lambda c: space.positions[id(c.kernel)]):
            index = space.positions[id(call.kernel)]
            stddev = _matrix(gaussian.tensor_stddevs[index])
            factor = None
            if space.probe is not None:
                factor = _matrix(space.probe.scales[index]) / stddev
            self._kernels.append(
                _Kernel(
                    call.kernel,
                    index,
                    call.options.get("rank", 1),
                    _matrix(gaussian.means[index]),
                    stddev,
                    gaussian.layout.groups is not None,
                    not _is_factored(call, stddev),
                    factor,
                )
            )
        self.variables = [kernel.index for kernel in self._kernels]
        self.noise_size = sum(kernel.size for kernel in self._kernels)

    @classmethod
    def record(cls, call: LayerCall, recording: Recording) -> Any:
        """Claims the kernel; an automatic call is left to the layer."""
        recording.claim(cls.name, call.kernel, call)
        return None if call.automatic else call.plain()

    @classmethod
    def adopt(cls, variables: Sequence[Any]) -> list[Any]:
        """All kernels: where no layer has called, they are formed."""
        return [
            LayerCall(v.name, v, None, None)
            for v in variables
            if len(v.shape) > 1
        ]

    def activation_bytes(self, signs: int) -> int:
        """The perturbed kernels that are formed, or that regularizers and
        constraints read.
        """
        return signs * sum(
            kernel.mean.shape.num_elements() * kernel.stddev.dtype.size
            for kernel in self._kernels
            if kernel.formed
            or getattr(kernel.variable, "regularizer", None)
            or constraint_of(kernel.variable)
        )

    def member(
        self, noise: Noise, sign: float
    ) -> tuple[Mapping[int, tf.Tensor], Any]:
        weights, products = {}, {}
        for kernel, (left, right) in self._factors(noise.weights):
            right = sign * right
            if not kernel.formed:
                factors = (kernel.stddev, left, right)
                products[id(kernel.variable)] = (kernel.mean, *factors)
            # Read by a regularizer, a constraint, by what has no product.
            change = kernel.stddev * kernel_noise(left, right)
            formed = kernel.mean + tf.cast(change, kernel.mean.dtype)
            weights[kernel.index] = tf.reshape(formed, kernel.variable.shape)
        return weights, products

    def call(self, call: LayerCall, state: Any, evaluation: Evaluation) -> Any:
        """x (W + sigma E) for the member's noise E.

        With a constraint, x P(W + sigma E): the kernel has to be formed.
        """
        formed = constraint_of(call.kernel) is not None
        if formed or id(call.kernel) not in state:  # not called at mu
            return None if call.automatic else call.plain()
        dtype = call.inputs.dtype
        if isinstance(call, LookupCall):
            dtype = tf.as_dtype(call.dtype)
        mean, stddev, left, right = (
            tf.cast(t, dtype) for t in state[id(call.kernel)]
        )
        return call.biased(
            _PRODUCTS[type(call)](call, mean, stddev, left, right)
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


def _dense_product(
    call: LayerCall,
    mean: tf.Tensor,
    stddev: tf.Tensor,
    left: tf.Tensor,
    right: tf.Tensor,
) -> tf.Tensor:
    shared = shared_product(call.inputs, mean)
    return shared + product(call.inputs, stddev, left, right)


def _einsum_product(
    call: EinsumCall,
    mean: tf.Tensor,
    stddev: tf.Tensor,
    left: tf.Tensor,
    right: tf.Tensor,
) -> tf.Tensor:
    """x W + (x A^T) B: of the units' axes, B has the last and A the others.

    By products of matrices: oneDNN's Einsum has written beyond its memory here
    (TensorFlow 2.21, two replicas).
    """
    c, shape = call.contraction, call.kernel.shape
    arranged = call.arranged
    rows = tf.reshape(arranged, [-1, arranged.shape[-1]])
    shared = tf.matmul(rows, c.matrix(tf.reshape(mean, shape)))
    factor = tf.reshape(stddev * scaled(left), [-1, *shape[:-1]])
    order = [1 + c.kernel.index(axis) for axis in c.contracted + c.units[:-1]]
    factor = tf.reshape(
        tf.transpose(factor, [*order, 0]), [arranged.shape[-1], -1]
    )
    inner = tf.reshape(tf.matmul(rows, factor), [-1, left.shape[-2]])
    noise = tf.reshape(tf.matmul(inner, right), [-1, shared.shape[-1]])
    leading = tf.shape(arranged)[:-1]
    outputs = tf.reshape(
        shared + noise, tf.concat([leading, [shared.shape[-1]]], axis=0)
    )
    static = [*arranged.shape[:-1], shared.shape[-1]]
    return c.restore(tf.ensure_shape(outputs, static), shape)


def _lookup_product(
    call: LayerCall,
    mean: tf.Tensor,
    stddev: tf.Tensor,
    left: tf.Tensor,
    right: tf.Tensor,
) -> tf.Tensor:
    """The rows of W, plus those of sigma A^T, times B."""
    rows = tf.gather(tf.transpose(stddev * scaled(left)), call.inputs)
    return tf.gather(mean, call.inputs) + tf.linalg.matmul(rows, right)


_PRODUCTS: dict[type, Any] = {
    DenseCall: _dense_product,
    EinsumCall: _einsum_product,
    LookupCall: _lookup_product,
}


def _is_factored(call: LayerCall, stddev: tf.Tensor) -> bool:
    """Whether a product is written that needs no perturbed kernel."""
    if isinstance(call, DenseCall):
        return True
    if isinstance(call, EinsumCall):
        # With the last axis contracted, x A would be an outer product.
        last = call.contraction.kernel[-1]
        return stddev.shape.rank == 0 and last in call.contraction.outputs
    return type(call) in _PRODUCTS and stddev.shape.rank == 0


def _matrix(values: tf.Tensor) -> tf.Tensor:
    """[..., out] as [in, out]; a scalar as it is."""
    if values.shape.rank == 0:
        return values
    return tf.reshape(values, [-1, values.shape[-1]])
