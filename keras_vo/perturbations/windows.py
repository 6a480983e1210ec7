"""A convolution's windows, as rows of a matrix.

    y[b, p] = sum_k x[b, s p + d k - a] W[k]       (of each spatial axis)

is a product of matrices: the rows are the windows [.., k channels] of x around
the positions p, and W has the axes k and channels as one. s are the strides, d
the dilations, and a is what is padded before the first position.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

__all__ = ["Windows"]


@dataclasses.dataclass(frozen=True)
class Windows:
    """Where the windows are; a number for each spatial axis.

    Attributes:
        kernel: sizes of a window.
        outputs: numbers of positions.
        strides: from a position to the next.
        dilations: from an input of a window to the next.
        padding: zeros before and after the inputs.
    """

    kernel: Sequence[int]
    outputs: Sequence[int]
    strides: Sequence[int]
    dilations: Sequence[int]
    padding: Sequence[tuple[int, int]]

    @classmethod
    def of(
        cls,
        sizes: Sequence[int],
        kernel: Sequence[int],
        strides: Sequence[int],
        dilations: Sequence[int],
        padding: str,
    ) -> Windows:
        """Those of a convolution of inputs of these sizes.

        Args:
            sizes: of the inputs.
            kernel: see above, and so are the next two.
            padding: "valid"; "same", of which the larger half is behind; or
                "causal", all before.
        """
        outputs, padded = [], []
        for size, k, stride, dilation in zip(
            sizes, kernel, strides, dilations, strict=True
        ):
            reach = (k - 1) * dilation + 1
            before, after = 0, 0
            if padding == "causal":
                before = reach - 1
            elif padding == "same":
                missing = (-(-size // stride) - 1) * stride + reach - size
                before = max(missing, 0) // 2
                after = max(missing, 0) - before
            outputs.append((size + before + after - reach) // stride + 1)
            padded.append((before, after))
        return cls(kernel, outputs, strides, dilations, padded)

    def row_sums(self, inputs: tf.Tensor) -> tf.Tensor:
        """Sums over examples and positions of `of_inputs`, like the kernel:
        [*kernel, channels].
        """
        summed = tf.pad(tf.reduce_sum(inputs, axis=0), [*self.padding, (0, 0)])
        for i, places in enumerate(self._places()):
            summed = tf.gather(summed, places.T, axis=i)
            summed = tf.reduce_sum(summed, axis=i + 1)
        return summed

    def _places(self) -> list[np.ndarray]:
        """Of each axis the inputs of all windows, [outputs, kernel]."""
        return [
            np.add.outer(stride * np.arange(count), dilation * np.arange(k))
            for count, k, stride, dilation in zip(
                self.outputs,
                self.kernel,
                self.strides,
                self.dilations,
                strict=True,
            )
        ]

    def of_inputs(self, inputs: tf.Tensor) -> tf.Tensor:
        """Inputs [batch, *sizes, channels] as [batch, *outputs, row].

        The axes of a window come in the order of the kernel's.
        """
        rank = len(self.kernel)
        inputs = tf.pad(inputs, [(0, 0), *self.padding, (0, 0)])
        for i, places in enumerate(self._places()):
            inputs = tf.gather(inputs, places, axis=1 + 2 * i)
        positions = range(1, 1 + 2 * rank, 2)
        within = range(2, 2 + 2 * rank, 2)
        ordered = tf.transpose(inputs, [0, *positions, *within, 1 + 2 * rank])
        row = math.prod(self.kernel) * inputs.shape[-1]
        shape = tf.concat([tf.shape(inputs)[:1], [*self.outputs, row]], axis=0)
        static = [inputs.shape[0], *self.outputs, row]
        return tf.ensure_shape(tf.reshape(ordered, shape), static)
