"""The inputs of a network's kernels, squared and summed.

For `sensitivity="inputs"` (`keras_vo.search.sensitivity`): a pass of the
network as it is, in which calls of layers of Keras are looked at. Nothing is
differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from absl import logging as absl_logging

from keras_vo.keras_compat.layer_calls import WITH_KERNELS, intercepted
from keras_vo.keras_compat.losses import mask_of
from keras_vo.perturbations import graph_ops
from keras_vo.perturbations.automatic import call_of
from keras_vo.perturbations.calls import LookupCall, densified
from keras_vo.perturbations.scope import current_graph
from keras_vo.perturbations.windows import Windows

__all__ = ["InputSquares"]

_announced: set[str] = set()  # names of weights


class _Rows(NamedTuple):
    """What one call says of a kernel.

    Attributes:
        kernel: a variable.
        squares: sum of A^2 of each row, broadcasts against it.
        count: of the A that are summed, a scalar.
    """

    kernel: Any
    squares: tf.Tensor
    count: Any


class InputSquares:
    """Sums over a batch of the squared inputs of each row of each kernel.

    Known are the inputs of Dense, EinsumDense (so of MultiHeadAttention),
    Embedding, convolutions, recurrent layers and normalizations; in a
    TimeDistributed those of Dense and convolutions. All other weights
    (recurrent kernels, those of other layers, LoRA's, of calls in loops) count
    as biases, whose input is 1. Of convolutions that are grouped, depthwise or
    transposed, a row is that of its channel; positions that are masked do not
    count.

    Args:
        variables: that are searched over.
        dtype: of the sums.
    """

    def __init__(self, variables: Sequence[Any], dtype: tf.DType) -> None:
        self._variables = list(variables)
        self._dtype = dtype
        self._positions = {id(v): i for i, v in enumerate(variables)}
        self._sums: dict[int, tf.Tensor] = {}
        self._counts: dict[int, tf.Tensor] = {}
        self._masks: dict[int, Any] = {}
        self._inside = 0

    def of(self, call: Callable[[], Any]) -> tuple[tf.Tensor, tf.Tensor]:
        """What a call of the network shows.

        Returns:
            The sums [d], and of how many numbers each is, [variables]; both 0
            of weights whose inputs are not known.
        """
        graph = current_graph()

        def seen(layer: Any, own: Any, *args: Any, **kwargs: Any) -> Any:
            if current_graph() is graph and not self._inside:
                given, more = _positional(args, kwargs)
                mask = self._mask_of(layer, given, more)
                for rows in _rows(layer, own, given, more, mask, self._dtype):
                    self._add(rows)
            # It calls the layer in it for each step.
            inside = isinstance(layer, keras.layers.TimeDistributed)
            self._inside += inside
            try:
                return own(*args, **kwargs)
            finally:
                self._inside -= inside

        with intercepted(seen, WITH_KERNELS):
            call()
        self._announce()
        zero = tf.zeros([], self._dtype)
        sums = [
            tf.reshape(self._sums.get(i, tf.zeros(v.shape, self._dtype)), [-1])
            for i, v in enumerate(self._variables)
        ]
        counts = [self._counts.get(i, zero) for i in range(len(sums))]
        return tf.concat(sums, axis=0), tf.stack(counts)

    def _mask_of(self, layer: Any, args: Any, kwargs: Any) -> Any:
        """Which positions count, [batch, ...]; `None`: all."""
        if isinstance(layer, keras.layers.Embedding):
            return layer.compute_mask(tf.convert_to_tensor(args[0]))
        if isinstance(layer, _ATTENTION):  # which takes the masks away
            for tensor in [*args, *kwargs.values()]:
                if (mask := mask_of(tensor)) is not None:
                    self._masks[id(tensor)] = mask
        if kwargs.get("mask") is not None:
            return kwargs["mask"]
        mask = mask_of(args[0])
        return self._masks.get(id(args[0])) if mask is None else mask

    def _add(self, rows: _Rows) -> None:
        i = self._positions.get(id(rows.kernel))
        if i is None or graph_ops.is_in_vectorized_loop(rows.squares):
            return
        squares = tf.cast(rows.squares, self._dtype)
        squares = tf.broadcast_to(squares, rows.kernel.shape)
        count = tf.cast(rows.count, self._dtype)
        self._sums[i] = self._sums.get(i, 0.0) + squares
        self._counts[i] = self._counts.get(i, 0.0) + count

    def _announce(self) -> None:
        """Says once of which matrices the inputs are not known."""
        unknown = {
            getattr(v, "path", v.name)
            for i, v in enumerate(self._variables)
            if len(v.shape) > 1 and i not in self._sums
        }
        for name in sorted(unknown - _announced):
            _announced.add(name)
            absl_logging.info(
                'sensitivity="inputs": the inputs of %r are not known, and '
                "count as 1.",
                name,
            )


def _positional(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments of a call, of which the first one is no keyword."""
    if args or not kwargs:
        return args, kwargs
    (_, first), *others = kwargs.items()
    return (first,), dict(others)


def _rows(
    layer: Any, own: Any, args: Any, kwargs: Any, mask: Any, dtype: tf.DType
) -> list[_Rows]:
    """What a call of a layer says of its kernels."""
    if isinstance(layer, keras.layers.TimeDistributed):
        inner = layer.layer
        kernels = _kernels(inner)
        if isinstance(inner, _CONVOLUTIONS) and inner.groups == 1:
            kernels = [(inner.kernel, -2)]
        return _by_channel(inner, kernels, args, mask, dtype)
    kernels = _kernels(layer)
    if kernels:
        return _by_channel(layer, kernels, args, mask, dtype)
    if isinstance(layer, _CONVOLUTIONS):
        return _of_convolution(layer, args, dtype)
    if not any(hasattr(getattr(layer, name, None), "path") for name in _OTHERS):
        return []  # a normalization without a scale
    call = call_of(layer, own, lambda variable: variable, args, kwargs)
    if call is None:
        return []
    operand = call.operand
    inputs = operand.prepared(call.arranged, dtype)
    flat = operand.flat(inputs)
    axes = call.arranged.shape.rank
    if not isinstance(call, LookupCall):
        axes -= 1
    if mask is not None and mask.shape.rank == axes:
        flat = tf.boolean_mask(flat, tf.reshape(mask, [-1]))
    squares = operand.row_squares(flat)
    shape = call.matrix(tf.zeros(call.kernel.shape, dtype)).shape
    like = tf.broadcast_to(tf.cast(squares, dtype), shape)
    return [_Rows(call.kernel, call.unmatrix(like), tf.shape(flat)[0])]


_OTHERS = ("kernel", "embeddings", "gamma", "scale")
_ATTENTION = (
    keras.layers.MultiHeadAttention,
    keras.layers.GroupQueryAttention,
)
_CONVOLUTIONS = (
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
)


def _kernels(layer: Any) -> list[tuple[Any, int]]:
    """Kernels of a layer, and the axis of each that is that of its inputs'
    channels; none if more is to be known of it.
    """
    if isinstance(layer, keras.layers.RNN):
        cells = getattr(layer.cell, "cells", [layer.cell])
        kernel = getattr(cells[0], "kernel", None)
        return [] if kernel is None else [(kernel, -2)]
    for names, attribute, axis in _AXES:
        classes = [getattr(keras.layers, n, None) for n in names.split()]
        if any(cls is not None and isinstance(layer, cls) for cls in classes):
            kernel = getattr(layer, attribute, None)
            return [] if kernel is None else [(kernel, axis)]
    return []


_AXES = (
    ("Conv1DTranspose Conv2DTranspose Conv3DTranspose", "kernel", -1),
    ("DepthwiseConv1D DepthwiseConv2D", "kernel", -2),
    ("SeparableConv1D SeparableConv2D", "depthwise_kernel", -2),
    ("Dense", "kernel", -2),
)


def _by_channel(
    layer: Any, kernels: Any, args: Any, mask: Any, dtype: tf.DType
) -> list[_Rows]:
    """Rows that are those of their channel, the same for all of a window."""
    inputs = densified(args[0])
    channels = -1
    if getattr(layer, "data_format", "channels_last") == "channels_first":
        channels = inputs.shape.rank - layer.rank - 1
    summed, count = _of_channels(inputs, channels, mask, dtype)
    found = []
    for kernel, axis in kernels:
        shape = [1] * len(kernel.shape)
        shape[axis] = -1
        if kernel.shape[axis] == inputs.shape[channels]:
            found.append(_Rows(kernel, tf.reshape(summed, shape), count))
    return found


def _of_channels(
    inputs: tf.Tensor, channels: int, mask: Any, dtype: tf.DType
) -> tuple[tf.Tensor, tf.Tensor]:
    """Sums of squares [channels], and of how many numbers each is."""
    squares = tf.square(tf.cast(inputs, dtype))
    axis = channels % inputs.shape.rank
    others = [i for i in range(inputs.shape.rank) if i != axis]
    count = tf.size(inputs) // tf.maximum(tf.shape(inputs)[axis], 1)
    if mask is not None and mask.shape.rank == inputs.shape.rank - 1:
        count = tf.math.count_nonzero(mask, dtype=tf.int32)
        squares *= tf.cast(mask, dtype)[..., None]
    return tf.reduce_sum(squares, axis=others), count


def _of_groups(layer: Any, args: Any, dtype: tf.DType) -> list[_Rows]:
    """Rows of a convolution in groups, each of which has its own channels."""
    inputs = tf.convert_to_tensor(args[0])
    first = layer.data_format == "channels_first"
    summed, count = _of_channels(inputs, 1 if first else -1, None, dtype)
    groups, filters = layer.groups, layer.kernel.shape[-1]
    by_group = tf.transpose(tf.reshape(summed, [groups, -1]))
    squares = tf.repeat(by_group, filters // groups, axis=1)
    return [_Rows(layer.kernel, squares, count)]


def _of_convolution(layer: Any, args: Any, dtype: tf.DType) -> list[_Rows]:
    """Rows of a convolution, one for each place of a window."""
    inputs = tf.convert_to_tensor(args[0])
    sizes, kernel = inputs.shape[1:-1], layer.kernel
    channels_last = layer.data_format == "channels_last"
    if layer.groups > 1:
        return _of_groups(layer, args, dtype)
    if not (channels_last and sizes.is_fully_defined()):
        return _by_channel(layer, [(kernel, -2)], args, None, dtype)
    windows = Windows.of(
        sizes.as_list(),
        layer.kernel_size,
        layer.strides,
        layer.dilation_rate,
        layer.padding,
    )
    squares = windows.row_sums(tf.square(tf.cast(inputs, dtype)))
    count = tf.shape(inputs)[0] * tf.reduce_prod(windows.outputs)
    return [_Rows(kernel, squares[..., None], count)]
