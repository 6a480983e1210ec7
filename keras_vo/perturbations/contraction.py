"""An einsum of inputs and a kernel, as a product of matrices.

    y = einsum("abc,cde->abde", x, W)

has x [.., in] times W [in, units]: of W's axes, those that it shares with x
are contracted (c), those that y has are its units (d e), and x and y share the
positions (a b), of which the first is the batch axis.
"""

from __future__ import annotations

import dataclasses
import re
import string
from collections.abc import Sequence

import tensorflow as tf

__all__ = ["Contraction"]


@dataclasses.dataclass(frozen=True)
class Contraction:
    """An equation, one letter an axis.

    Attributes:
        inputs: axes of x.
        kernel: axes of W.
        outputs: axes of y.
    """

    inputs: str
    kernel: str
    outputs: str

    @classmethod
    def parse(cls, equation: str, rank: int) -> Contraction | None:
        """The equation of an EinsumDense, if it is a product of matrices.

        Args:
            equation: such as "abc,cde->abde" or "...x,xy->...y".
            rank: of x.

        Returns:
            `None` where it sums over an axis that only one operand has, where
            x, W and y share an axis, or where y does not begin with x's first
            axis.
        """
        found = re.fullmatch(
            r"([a-zA-Z.]+),([a-zA-Z]+)->([a-zA-Z.]+)", equation.replace(" ", "")
        )
        if found is None:
            return None
        inputs, kernel, outputs = found.groups()
        if "..." in inputs:
            missing = rank - len(inputs) + 3
            free = [c for c in string.ascii_letters if c not in equation]
            letters = "".join(free[: max(missing, 0)])
            inputs = inputs.replace("...", letters)
            outputs = outputs.replace("...", letters)
        parts = set(inputs), set(kernel), set(outputs)
        once = all(
            len(axes) == len(part)
            for axes, part in zip((inputs, kernel, outputs), parts, strict=True)
        )
        x, w, y = parts
        if (
            not once
            or "." in inputs + outputs
            or len(inputs) != rank
            or x & w & y
            or x - w - y
            or w - x - y
            or y - x - w
            or outputs[:1] != inputs[:1]
        ):
            return None
        return cls(inputs, kernel, outputs)

    @property
    def contracted(self) -> str:
        """Axes that x and W share, in the order of W."""
        return "".join(c for c in self.kernel if c in self.inputs)

    @property
    def units(self) -> str:
        """Axes that W and y share, in the order of W."""
        return "".join(c for c in self.kernel if c in self.outputs)

    @property
    def positions(self) -> str:
        """Axes that x and y share, in the order of x."""
        return "".join(c for c in self.inputs if c in self.outputs)

    def arrange(self, inputs: tf.Tensor) -> tf.Tensor:
        """x [batch, ..., in]."""
        return _merged(
            _transposed(inputs, self.inputs, self.positions + self.contracted),
            len(self.contracted),
        )

    def flatten(self, outputs: tf.Tensor) -> tf.Tensor:
        """y as [batch, ..., units]."""
        return _merged(
            _transposed(outputs, self.outputs, self.positions + self.units),
            len(self.units),
        )

    def restore(self, outputs: tf.Tensor, kernel: Sequence[int]) -> tf.Tensor:
        """y from [batch, ..., units].

        Args:
            outputs: they.
            kernel: the shape of W.
        """
        sizes = dict(zip(self.kernel, kernel, strict=True))
        split = [sizes[c] for c in self.units]
        shape = tf.concat([tf.shape(outputs)[:-1], split], axis=0)
        static = [*outputs.shape[:-1], *split]
        outputs = tf.ensure_shape(tf.reshape(outputs, shape), static)
        return _transposed(outputs, self.positions + self.units, self.outputs)

    def matrix(self, kernel: tf.Tensor) -> tf.Tensor:
        """W, or what is shaped like it, as [in, units]; a scalar as it is."""
        if kernel.shape.rank == 0:
            return kernel
        ordered = _transposed(kernel, self.kernel, self.contracted + self.units)
        merged = _merged(ordered, len(self.units))
        return tf.reshape(merged, [-1, merged.shape[-1]])

    def unmatrix(self, matrix: tf.Tensor, kernel: Sequence[int]) -> tf.Tensor:
        """What is shaped like W, from `matrix`; a scalar as it is."""
        if matrix.shape.rank == 0:
            return matrix
        sizes = dict(zip(self.kernel, kernel, strict=True))
        order = self.contracted + self.units
        split = tf.reshape(matrix, [sizes[c] for c in order])
        return _transposed(split, order, self.kernel)


def _transposed(tensor: tf.Tensor, axes: str, order: str) -> tf.Tensor:
    if axes == order:
        return tensor
    return tf.transpose(tensor, [axes.index(c) for c in order])


def _merged(tensor: tf.Tensor, count: int) -> tf.Tensor:
    """The last `count` axes as one; a new one where there is none."""
    if count == 1:
        return tensor
    rank = tensor.shape.rank
    shape = tf.concat([tf.shape(tensor)[: rank - count], [-1]], axis=0)
    static = tensor.shape[: rank - count]
    size = tensor.shape[rank - count :].num_elements()
    return tf.ensure_shape(tf.reshape(tensor, shape), [*static, size])
