"""Calls of layers whose outputs are linear in a kernel.

    DenseCall      inputs times a matrix, any kernel of `Dense`
    EinsumCall     a product of higher rank, `EinsumDense`
    ConvCall       a product with windows of the inputs, convolutions
    LookupCall     rows of a table, `Embedding`
    ScaleCall      a factor for each unit, the normalizations

A call says what a kind of perturbation needs of it: what the layer computes,
and its form for noise on activations, outputs [batch, ..., units] with a
kernel and inputs as `operand` takes them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import keras
import tensorflow as tf

from keras_vo.keras_compat.losses import keeps_mask, mask_of
from keras_vo.perturbations.contraction import Contraction
from keras_vo.perturbations.windows import Windows
from keras_vo.search.operands import Diagonal, Matrix, Operand, Rows

__all__ = [
    "ConvCall",
    "DenseCall",
    "EinsumCall",
    "LayerCall",
    "LookupCall",
    "ScaleCall",
    "densified",
    "floating_inputs",
    "shared_product",
]


@dataclasses.dataclass(frozen=True)
class LayerCall:
    """A call of a layer, without its activation.

    Attributes:
        name: the layer's, for messages.
        kernel: its kernel, a variable.
        bias: its bias, a variable, or `None`.
        inputs: what the kernel is applied to.
        options: what the layer says to its kind of perturbation.
        automatic: whether the kind is the optimizer's choice, not the layer's:
            a layer that it can't perturb keeps noise on its weights.
        read: from a variable to the value that it has in this pass.
    """

    name: str
    kernel: Any
    bias: Any
    inputs: tf.Tensor
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    automatic: bool = False
    read: Callable[[Any], Any] = lambda variable: variable

    @property
    def operand(self) -> Operand:
        """How outputs depend on the kernel."""
        raise NotImplementedError

    def plain(self) -> tf.Tensor:
        """The outputs, as the variables are now."""
        raise NotImplementedError

    @property
    def bias_of_units(self) -> Any:
        """The bias, if it has a number for each unit; else `None`."""
        return self.bias

    @property
    def fan_in(self) -> int:
        """The number of weights of the kernel that an output depends on."""
        return 1

    @property
    def arranged(self) -> tf.Tensor:
        """The inputs as `operand` takes them."""
        return self.inputs

    def flatten(self, outputs: tf.Tensor) -> tf.Tensor:
        """Outputs as [batch, ..., units]."""
        return outputs

    def restore(self, outputs: tf.Tensor) -> tf.Tensor:
        """The inverse of `flatten`."""
        return outputs

    def matrix(self, values: tf.Tensor) -> tf.Tensor:
        """What is shaped like the kernel, as `operand` takes it."""
        return values

    def unmatrix(self, values: tf.Tensor) -> tf.Tensor:
        """The inverse of `matrix`."""
        return values

    def biased(self, outputs: tf.Tensor) -> tf.Tensor:
        """`outputs` plus the bias."""
        if self.bias is None:
            return outputs
        return keras.ops.add(outputs, self._cast(self.bias))

    def _cast(self, variable: Any) -> Any:
        """A variable's value, in the dtype of the inputs if it is not its own.

        (In a layer's call, that of a variable is cast by Keras.)
        """
        value = self.read(variable)
        return (
            keras.ops.cast(value, self.inputs.dtype)
            if self.automatic
            else value
        )


@dataclasses.dataclass(frozen=True)
class DenseCall(LayerCall):
    """inputs [batch, ..., in] times a kernel [in, units]."""

    @property
    def operand(self) -> Operand:
        return Matrix()

    @property
    def fan_in(self) -> int:
        return int(self.kernel.shape[0])

    def plain(self) -> tf.Tensor:
        return self.biased(shared_product(self.inputs, self._cast(self.kernel)))


@dataclasses.dataclass(frozen=True)
class EinsumCall(LayerCall):
    """An einsum of inputs and kernel.

    Attributes:
        contraction: the equation.
        bias_axes: of the outputs, those that the bias has; `None`: no bias.
    """

    contraction: Contraction = Contraction("ab", "bc", "ac")
    bias_axes: str | None = None

    @property
    def operand(self) -> Operand:
        return Matrix()

    @property
    def fan_in(self) -> int:
        axes = dict(
            zip(self.contraction.kernel, self.kernel.shape, strict=True)
        )
        return math.prod(axes[c] for c in self.contraction.contracted)

    def plain(self) -> tf.Tensor:
        c = self.contraction
        equation = f"{c.inputs},{c.kernel}->{c.outputs}"
        kernel = self._cast(self.kernel)
        return self.biased(keras.ops.einsum(equation, self.inputs, kernel))

    @property
    def bias_of_units(self) -> Any:
        units = set(self.contraction.units) == set(self.bias_axes or "")
        flat = "".join(
            c for c in self.contraction.outputs if c in (self.bias_axes or "")
        )
        return self.bias if units and flat == self.contraction.units else None

    @property
    def arranged(self) -> tf.Tensor:
        return self.contraction.arrange(self.inputs)

    def flatten(self, outputs: tf.Tensor) -> tf.Tensor:
        return self.contraction.flatten(outputs)

    def restore(self, outputs: tf.Tensor) -> tf.Tensor:
        return self.contraction.restore(outputs, self.kernel.shape)

    def matrix(self, values: tf.Tensor) -> tf.Tensor:
        return self.contraction.matrix(values)

    def unmatrix(self, values: tf.Tensor) -> tf.Tensor:
        return self.contraction.unmatrix(values, self.kernel.shape)


@dataclasses.dataclass(frozen=True)
class ConvCall(LayerCall):
    """A convolution of inputs [batch, ..., channels], which are not padded.

    Attributes:
        windows: where the kernel [..., channels, units] is applied.
        product: from inputs and a kernel to the outputs without a bias.
    """

    windows: Windows = Windows((), (), (), (), ())
    product: Callable[[Any, Any], Any] = keras.ops.conv

    @property
    def operand(self) -> Operand:
        return Matrix()

    @property
    def fan_in(self) -> int:
        return math.prod(self.kernel.shape[:-1])

    def plain(self) -> tf.Tensor:
        inputs, kernel = self.inputs, self._cast(self.kernel)
        if inputs.shape[0] is not None:
            return self.biased(self.product(inputs, kernel))
        # Of an empty batch, TensorFlow's has the shape of the inputs on CPUs.
        examples = tf.shape(inputs)[0]
        one = tf.cast(tf.equal(examples, 0), tf.int32)
        shape = tf.concat([[one], tf.shape(inputs)[1:]], axis=0)
        filled = tf.concat([inputs, tf.zeros(shape, inputs.dtype)], axis=0)
        return self.biased(self.product(filled, kernel)[:examples])

    @property
    def arranged(self) -> tf.Tensor:
        return self.windows.of_inputs(self.inputs)

    def matrix(self, values: tf.Tensor) -> tf.Tensor:
        if values.shape.rank == 0:
            return values
        return tf.reshape(values, [-1, values.shape[-1]])

    def unmatrix(self, values: tf.Tensor) -> tf.Tensor:
        if values.shape.rank == 0:
            return values
        return tf.reshape(values, self.kernel.shape)


@dataclasses.dataclass(frozen=True)
class LookupCall(LayerCall):
    """Rows of a kernel [rows, units], by indices [batch, ...].

    Attributes:
        dtype: of the outputs.
    """

    dtype: str = "float32"

    @property
    def operand(self) -> Operand:
        return Rows(self.kernel.shape[0])

    def plain(self) -> tf.Tensor:
        rows = keras.ops.take(self.read(self.kernel), self.inputs, axis=0)
        return keras.ops.cast(rows, self.dtype)


@dataclasses.dataclass(frozen=True)
class ScaleCall(LayerCall):
    """inputs [batch, ..., units] times a kernel [units], plus the bias."""

    @property
    def operand(self) -> Operand:
        return Diagonal()

    def plain(self) -> tf.Tensor:
        return self.biased(self.inputs * self._cast(self.kernel))


def shared_product(inputs: tf.Tensor, kernel: Any) -> tf.Tensor:
    """x W [..., out] for a kernel [in, out] that all members share.

    Vectorized over members, the product of an empty batch of rank 2 would
    come out as [0, 0].
    """
    outputs = keras.ops.matmul(inputs, kernel)
    if outputs.shape.is_fully_defined():
        return outputs
    shape = tf.concat([tf.shape(inputs)[:-1], tf.shape(kernel)[1:]], axis=0)
    return tf.ensure_shape(tf.reshape(outputs, shape), outputs.shape)


def densified(inputs: Any) -> tf.Tensor:
    """A dense tensor of inputs that may be sparse; what is twice adds up."""
    if not isinstance(inputs, tf.SparseTensor):
        return tf.convert_to_tensor(inputs)
    dense = tf.scatter_nd(inputs.indices, inputs.values, inputs.dense_shape)
    return tf.ensure_shape(dense, inputs.shape)


def floating_inputs(layer: Any, inputs: Any) -> tf.Tensor:
    """A layer's inputs, dense and floating, as the product takes them."""
    # The product of a member's weights and sparse inputs is not vectorized.
    inputs = densified(inputs)
    if tf.as_dtype(inputs.dtype).is_floating:
        return inputs
    mask = mask_of(inputs)
    return keeps_mask(keras.ops.cast(inputs, layer.compute_dtype), mask)
