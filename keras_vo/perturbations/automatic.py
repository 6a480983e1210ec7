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
from keras_vo.perturbations import graph_ops, registry, scope
from keras_vo.perturbations.calls import (
    DenseCall,
    EinsumCall,
    LayerCall,
    LookupCall,
    ScaleCall,
    floating_inputs,
)
from keras_vo.perturbations.contraction import Contraction

__all__ = ["entered"]

_KERNELS = ("kernel", "embeddings", "gamma", "scale")


@contextlib.contextmanager
def entered(entering: scope.Recording | scope.Evaluation) -> Iterator[None]:
    """Makes a scope the current one, for layers of Keras too."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(scope.entered(entering))
        if entering.perturbation != "full":
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
        layer, *args[1:], **kwargs
    ):
        _leave_what_is_before(args[0], current)
    kind = registry.get(current.perturbation)
    call, outputs = None, None
    if _is_searched(layer, current):
        make = next(f for cls, f in _CALLS.items() if isinstance(layer, cls))
        call = make(layer, own, current.read, args, kwargs)
    if call is not None and isinstance(call, kind.automatic):
        outputs = current.call(kind, call)
    if outputs is None:
        return own(*args, **kwargs)
    activation = getattr(layer, "activation", None)
    return outputs if activation is None else activation(outputs)


def _leave_what_is_before(inputs: Any, current: scope.Recording) -> None:
    """Leaves automatic calls that the inputs of a layer depend on, which mixes
    examples: what comes of a call is another example's too, then.
    """
    behind = graph_ops.ancestors(inputs)
    for name, claims in current.claims.items():
        for call in registry.get(name).mixed(claims, behind):
            current.leave(call, "a BatchNormalization is behind it")


def _is_searched(layer: Any, current: Any) -> bool:
    """Whether the layer has a kernel that is searched over, as it is."""
    if getattr(layer, "lora_enabled", False) or getattr(
        layer, "quantization_mode", None
    ):
        return False
    kernels = [getattr(layer, n) for n in _KERNELS if hasattr(layer, n)]
    return any(
        isinstance(k, keras.Variable) and current.searches(k) for k in kernels
    )


def _mixes_examples(layer: Any, training: Any = None, mask: Any = None) -> bool:
    """Whether a layer computes with statistics of the batch."""
    return (
        isinstance(layer, keras.layers.BatchNormalization)
        and training is not False
        and layer.trainable
    )


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


def _embedding(
    layer: Any, own: Any, read: Any, args: Any, kwargs: Any
) -> LayerCall | None:
    if isinstance(args[0], tf.SparseTensor):
        return None
    inputs = tf.convert_to_tensor(args[0])
    return LookupCall(
        layer.name,
        layer.embeddings,
        None,
        inputs if inputs.dtype.is_integer else tf.cast(inputs, tf.int32),
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
    keras.layers.Layer: _normalization,
}
