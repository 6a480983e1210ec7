"""The optimizer's choice of a perturbation, for layers of Keras.

While a scope is entered whose kind is not "full", calls of the layers that are
linear in a kernel are perturbed by that kind. They stay layers of Keras: no
class and no attribute of theirs changes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from keras_vo.keras_compat.layer_calls import intercepted
from keras_vo.perturbations import graph_ops, placement, registry, scope
from keras_vo.perturbations.calls import (
    ConvCall,
    DenseCall,
    EinsumCall,
    LayerCall,
    LookupCall,
    ScaleCall,
    floating_inputs,
)
from keras_vo.perturbations.contraction import Contraction
from keras_vo.perturbations.windows import Windows

__all__ = ["call_of", "entered"]

_KERNELS = ("kernel", "embeddings", "gamma", "scale")


@contextlib.contextmanager
def entered(entering: scope.Recording | scope.Evaluation) -> Iterator[None]:
    """Makes a scope the current one, for layers of Keras too."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(scope.entered(entering))
        shares = getattr(entering, "shares_weights", False)
        if entering.choice.kind != "full" or shares:
            stack.enter_context(intercepted(_perturbed))
        yield


def _perturbed(
    layer: Any, own: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """What a layer computes whose own `call` is `own`."""
    current = scope.current_scope()
    if current is None or not args:
        return own(*args, **kwargs)
    if isinstance(current, scope.Recording) and _mixes_examples(
        layer, *args, **kwargs
    ):
        _leave_what_is_before(args[0], current)
    kind = registry.get(current.choice.kind)
    call, outputs = None, None
    shares = getattr(current, "shares_weights", False)
    if _is_plain(layer) and (
        _is_searched(layer, current)
        or (shares and isinstance(layer, keras.layers.Dense))
    ):
        convolution = _maker(layer) is _convolution
        if not convolution or current.choice.convolutions != "full":
            call = call_of(layer, own, current.read, args, kwargs)
    if call is not None and isinstance(call, kind.automatic):
        outputs = current.call(kind, call)
    if outputs is None and shares and isinstance(call, DenseCall):
        outputs = call.plain()  # right for an empty batch, see there
    if outputs is None:
        return own(*args, **kwargs)
    activation = getattr(layer, "activation", None)
    return outputs if activation is None else activation(outputs)


def call_of(
    layer: Any, own: Any, read: Any, args: Any, kwargs: Any
) -> LayerCall | None:
    """A call of a layer of `keras_compat.layer_calls.CLASSES`; `None`: it is
    not linear in its kernel.

    Args:
        layer: it.
        own: its own `call`, with the arguments that follow.
        read: from a variable to its value.
        args: of the call.
        kwargs: of the call.
    """
    return _maker(layer)(layer, own, read, args, kwargs)


def _maker(layer: Any) -> Callable[..., LayerCall | None]:
    return next(f for cls, f in _CALLS.items() if isinstance(layer, cls))


def _leave_what_is_before(inputs: Any, current: scope.Recording) -> None:
    """Leaves automatic calls that the inputs of a layer depend on, which mixes
    examples: what comes of a call is another example's too, then.
    """
    behind = graph_ops.ancestors(inputs)
    for name, claims in current.claims.items():
        for call in registry.get(name).mixed(claims, behind):
            current.leave(call, "a BatchNormalization is behind it")


def _is_plain(layer: Any) -> bool:
    """Whether its kernel is all there is: no LoRA, not quantized."""
    return not (
        getattr(layer, "lora_enabled", False)
        or getattr(layer, "quantization_mode", None)
    )


def _is_searched(layer: Any, current: Any) -> bool:
    """Whether the layer has a kernel that is searched over."""
    kernels = [getattr(layer, n) for n in _KERNELS if hasattr(layer, n)]
    return any(
        isinstance(k, keras.Variable) and current.searches(k) for k in kernels
    )


def _mixes_examples(layer: Any, *args: Any, **kwargs: Any) -> bool:
    """Whether a layer computes with statistics of the batch."""
    if not isinstance(layer, keras.layers.BatchNormalization):
        return False
    training = args[1] if len(args) > 1 else kwargs.get("training")
    return layer.trainable and training is not False


def _dense(
    layer: Any, own: Any, read: Any, args: Any, kwargs: Any
) -> LayerCall | None:
    return DenseCall(
        layer.name,
        layer.kernel,
        layer.bias,
        floating_inputs(layer, args[0]),
        automatic=True,
        read=read,
    )


def _einsum_dense(
    layer: Any, own: Any, read: Any, args: Any, kwargs: Any
) -> LayerCall | None:
    inputs = tf.convert_to_tensor(args[0])
    contraction = Contraction.parse(layer.equation, inputs.shape.rank)
    if contraction is None:
        return None
    return EinsumCall(
        layer.name,
        layer.kernel,
        layer.bias,
        floating_inputs(layer, inputs),
        automatic=True,
        read=read,
        contraction=contraction,
        bias_axes=layer.bias_axes,
    )


def _convolution(
    layer: Any, own: Any, read: Any, args: Any, kwargs: Any
) -> LayerCall | None:
    inputs = tf.convert_to_tensor(args[0])
    sizes = inputs.shape[1:-1]
    reasons = {
        "it has a `convolution_op` of its own": (
            type(layer).convolution_op is not keras.layers.Conv2D.convolution_op
        ),
        "its channels come first": layer.data_format != "channels_last",
        "it has groups": layer.groups != 1,
        f"the sizes of its inputs, {sizes}, are not known": (
            not sizes.is_fully_defined()
        ),
    }
    for reason in [why for why, holds in reasons.items() if holds]:
        placement.announce(layer.name, reason)
        return None
    windows = Windows.of(
        sizes.as_list(),
        layer.kernel_size,
        layer.strides,
        layer.dilation_rate,
        layer.padding,
    )
    own_product = layer.convolution_op
    if layer.padding == "causal":

        def own_product(x: Any, kernel: Any) -> Any:
            return keras.ops.conv(
                tf.pad(x, [(0, 0), *windows.padding, (0, 0)]),
                kernel,
                strides=list(layer.strides),
                padding="valid",
                dilation_rate=layer.dilation_rate,
                data_format=layer.data_format,
            )

    return ConvCall(
        layer.name,
        layer.kernel,
        layer.bias if layer.use_bias else None,
        floating_inputs(layer, inputs),
        automatic=True,
        read=read,
        windows=windows,
        product=own_product,
    )


def _embedding(
    layer: Any, own: Any, read: Any, args: Any, kwargs: Any
) -> LayerCall | None:
    if isinstance(args[0], tf.SparseTensor):
        return None
    inputs = tf.convert_to_tensor(args[0])
    if not inputs.dtype.is_integer:
        inputs = tf.cast(inputs, tf.int32)
    rows = tf.constant(layer.input_dim, inputs.dtype)
    inputs = tf.where(inputs < 0, inputs + rows, inputs)  # as in Keras
    return LookupCall(
        layer.name,
        layer.embeddings,
        None,
        inputs,
        automatic=True,
        read=read,
        dtype=layer.compute_dtype,
    )


def _normalization(
    layer: Any, own: Any, read: Any, args: Any, kwargs: Any
) -> LayerCall | None:
    """What is normalized, without scale and offset, is the input."""
    scale = next(getattr(layer, n) for n in _KERNELS if hasattr(layer, n))
    offset = getattr(layer, "beta", None)
    inputs = tf.convert_to_tensor(args[0])
    last = inputs.shape.rank - 1
    axes = layer.axis if isinstance(layer.axis, (list, tuple)) else [layer.axis]
    if [axis % inputs.shape.rank for axis in axes] != [last]:
        return None
    state = [(v, keras.ops.copy(v)) for v in layer.non_trainable_variables]
    neutral = [(scale, keras.ops.ones(scale.shape, scale.dtype))]
    if offset is not None:
        neutral += [(offset, keras.ops.zeros(offset.shape, offset.dtype))]
    with keras.StatelessScope([*state, *neutral]) as inner:
        normalized = own(*args, **kwargs)
    for variable, before in state:  # moving statistics
        if (now := inner.get_current_value(variable)) is not before:
            variable.assign(now)
    return ScaleCall(
        layer.name, scale, offset, normalized, automatic=True, read=read
    )


_CALLS: dict[type, Callable[..., LayerCall | None]] = {
    keras.layers.Dense: _dense,
    keras.layers.EinsumDense: _einsum_dense,
    keras.layers.Embedding: _embedding,
    keras.layers.Conv1D: _convolution,
    keras.layers.Conv2D: _convolution,
    keras.layers.Conv3D: _convolution,
    keras.layers.Layer: _normalization,
}
