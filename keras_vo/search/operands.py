"""How a layer's outputs depend on its kernel, linearly.

Under noise on activations a layer adds to its outputs what its weights' noise
would: m = L(A, mu), v = L(A^2, sigma^2) for outputs L(A, W) that are linear in
the kernel W (see `keras_vo.search.local_reparameterization`). An operand is
such an L, with the sums over its inputs A that the gradients need:

    Matrix    Z = A W             Dense, EinsumDense; A [..., in]
    Rows      Z = W[A]            Embedding; A [...], indices
    Diagonal  Z = A * W           the scale of a normalization; A [..., units]

Scores are [M, units], inputs [M, ...]: all members, examples and positions.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import tensorflow as tf

__all__ = ["Diagonal", "Matrix", "Operand", "Rows"]


class Operand(Protocol):
    """An L(A, W)."""

    def prepared(self, inputs: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
        """The inputs as the other methods take them."""

    def flat(self, inputs: tf.Tensor) -> tf.Tensor:
        """All axes but those of one position as one, [M, ...]."""

    def variance(self, inputs: tf.Tensor, variance: tf.Tensor) -> tf.Tensor:
        """L(A^2, sigma^2), or its one value [..., 1] for all units."""

    def sums(self, inputs: tf.Tensor, score: tf.Tensor) -> tf.Tensor:
        """sum A dL/dW score, like the kernel."""

    def square_sums(
        self, inputs: tf.Tensor, score: tf.Tensor, variance: tf.Tensor
    ) -> tf.Tensor:
        """sigma^2 sum A^2 dL/dW score, like the kernel; their total where all
        its weights share one variance.
        """

    def row_squares(self, inputs: tf.Tensor) -> tf.Tensor:
        """sum A^2 of the flat inputs of each row, broadcasts against the
        kernel.
        """

    def columns(
        self, inputs: tf.Tensor, score: tf.Tensor, units: tf.Tensor
    ) -> tf.Tensor:
        """Of each direction, what the sums have for one unit.

        Args:
            inputs: [M, ...], the same for all, or [chunk, M, ...].
            score: of that unit, [chunk, M].
            units: it, [chunk].

        Returns:
            [chunk, ...].
        """


class Matrix:
    """Z = A W: inputs A [..., in], kernel [in, units]."""

    def prepared(self, inputs: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
        return tf.cast(inputs, dtype)

    def flat(self, inputs: tf.Tensor) -> tf.Tensor:
        return tf.reshape(inputs, [-1, inputs.shape[-1]])

    def variance(self, inputs: tf.Tensor, variance: tf.Tensor) -> tf.Tensor:
        squares = tf.square(inputs)
        if variance.shape.rank == 0:
            return variance * tf.reduce_sum(squares, axis=-1, keepdims=True)
        return tf.linalg.matmul(squares, variance)

    def sums(self, inputs: tf.Tensor, score: tf.Tensor) -> tf.Tensor:
        return tf.linalg.matmul(inputs, score, transpose_a=True)

    def square_sums(
        self, inputs: tf.Tensor, score: tf.Tensor, variance: tf.Tensor
    ) -> tf.Tensor:
        squares = tf.square(inputs)
        if variance.shape.rank == 0:
            shared = tf.linalg.matvec(
                score, tf.reduce_sum(squares, axis=-1), transpose_a=True
            )
            return variance * tf.reduce_sum(shared)
        return variance * tf.linalg.matmul(squares, score, transpose_a=True)

    def row_squares(self, inputs: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(tf.square(inputs), axis=0)[:, None]

    def columns(
        self, inputs: tf.Tensor, score: tf.Tensor, units: tf.Tensor
    ) -> tf.Tensor:
        if inputs.shape.rank == 2:
            return score @ inputs
        return tf.matmul(score[:, None], inputs)[:, 0]


@dataclasses.dataclass(frozen=True)
class Rows:
    """Z = W[A]: inputs A [...], indices of rows of a kernel [rows, units].

    A row that is looked up is multiplied with 1.

    Attributes:
        rows: their number.
    """

    rows: int

    def prepared(self, inputs: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
        return tf.cast(inputs, tf.int32)

    def flat(self, inputs: tf.Tensor) -> tf.Tensor:
        return tf.reshape(inputs, [-1])

    def variance(self, inputs: tf.Tensor, variance: tf.Tensor) -> tf.Tensor:
        if variance.shape.rank == 0:
            shape = tf.concat([tf.shape(inputs), [1]], axis=0)
            filled = tf.fill(shape, variance)
            return tf.ensure_shape(filled, [*inputs.shape, 1])
        return tf.gather(variance, inputs)

    def sums(self, inputs: tf.Tensor, score: tf.Tensor) -> tf.Tensor:
        return tf.math.unsorted_segment_sum(score, inputs, self.rows)

    def square_sums(
        self, inputs: tf.Tensor, score: tf.Tensor, variance: tf.Tensor
    ) -> tf.Tensor:
        if variance.shape.rank == 0:
            return variance * tf.reduce_sum(score)
        return variance * self.sums(inputs, score)

    def row_squares(self, inputs: tf.Tensor) -> tf.Tensor:
        counts = tf.math.bincount(inputs, minlength=self.rows)
        return counts[: self.rows, None]

    def columns(
        self, inputs: tf.Tensor, score: tf.Tensor, units: tf.Tensor
    ) -> tf.Tensor:
        count = tf.shape(units)[0]
        first = self.rows * tf.range(count)[:, None]
        ids = tf.broadcast_to(inputs, tf.shape(score)) + first
        total = count * self.rows
        summed = tf.math.unsorted_segment_sum(score, ids, total)
        return tf.reshape(summed, [-1, self.rows])


class Diagonal:
    """Z = A * W: inputs A [..., units], kernel [units]."""

    def prepared(self, inputs: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
        return tf.cast(inputs, dtype)

    def flat(self, inputs: tf.Tensor) -> tf.Tensor:
        return tf.reshape(inputs, [-1, inputs.shape[-1]])

    def variance(self, inputs: tf.Tensor, variance: tf.Tensor) -> tf.Tensor:
        return variance * tf.square(inputs)

    def sums(self, inputs: tf.Tensor, score: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(inputs * score, axis=0)

    def square_sums(
        self, inputs: tf.Tensor, score: tf.Tensor, variance: tf.Tensor
    ) -> tf.Tensor:
        summed = variance * tf.reduce_sum(tf.square(inputs) * score, axis=0)
        return tf.reduce_sum(summed) if variance.shape.rank == 0 else summed

    def row_squares(self, inputs: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(tf.square(inputs), axis=0)

    def columns(
        self, inputs: tf.Tensor, score: tf.Tensor, units: tf.Tensor
    ) -> tf.Tensor:
        if inputs.shape.rank == 2:
            own: Any = tf.transpose(tf.gather(inputs, units, axis=1))
        else:
            own = tf.gather(inputs, units, axis=-1, batch_dims=1)
        return tf.reduce_sum(own * score, axis=1, keepdims=True)
