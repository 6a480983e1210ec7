"""Losses of Keras: their masks, their reductions, other ones in their place."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from keras_vo.keras_compat import REDUCE, SCALES, loss_module

__all__ = [
    "compiled_losses_replaced",
    "keeps_mask",
    "losses_as_returned",
    "mask_of",
]

# The name of an op, which TensorFlow's error shows.
_SCALAR = "a_loss_of_unknown_shape_must_be_a_scalar_else_call_set_shape"


def mask_of(tensor: Any) -> Any:
    """The mask that Keras has attached to a tensor; `None`: none."""
    return getattr(tensor, "_keras_mask", None)


def keeps_mask(tensor: Any, mask: Any) -> Any:
    """`tensor`, with a mask attached."""
    if mask is not None:
        tensor._keras_mask = mask
    return tensor


@contextlib.contextmanager
def compiled_losses_replaced(
    model: Any, replace: Callable[[Any, Any], Any]
) -> Iterator[None]:
    """Lets the compiled losses of `model` be others.

    Args:
        model: a Keras model. Nothing is done if it is not compiled, or if an
            overridden `compute_loss` does not call the losses.
        replace: from a `keras.losses.Loss` and its weight among the losses to
            another one.
    """
    compiled = model._compile_loss
    if compiled is None or not compiled.built:
        yield
        return
    losses: Sequence[Any] = compiled._flat_losses
    compiled._flat_losses = [
        entry._replace(loss=replace(entry.loss, entry.loss_weights))
        for entry in losses
    ]
    try:
        yield
    finally:
        compiled._flat_losses = losses


_own = threading.local()


@contextlib.contextmanager
def losses_as_returned(model: Any) -> Iterator[None]:
    """Lets Keras leave losses as functions of users return them.

    Under a strategy Keras divides means over the batch, but not numbers that a
    loss function or an overridden `compute_loss` returns, by the number of
    replicas: here it leaves means as they are. It casts losses to float32:
    here one that is float64 stays so, if it is the model's only one. Both hold
    for the thread that enters it.

    Args:
        model: a compiled Keras model, after its call.
    """
    compiled = model._compile_loss
    alone = compiled is not None and len(compiled._flat_losses or ()) == 1
    dtype = getattr(compiled, "_dtype", None)
    before = getattr(_own, "compiled", None)
    _own.compiled = [compiled] if alone and not model.losses else []
    try:
        yield
    finally:
        _own.compiled = before
        if compiled is not None:
            compiled._dtype = dtype


def _unless_own(scale: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def scaled(value: Any) -> Any:
        return scale(value) if _may_be_float64() is None else value

    return scaled


def _reduced_as_returned(reduce: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(reduce)
    def reduced(values: Any, *args: Any, **kwargs: Any) -> Any:
        if tf.is_tensor(values) and values.shape.rank is None:
            values = tf.ensure_shape(values, [], name=_SCALAR)
        for compiled in _may_be_float64() or ():
            if tf.as_dtype(values.dtype) == tf.float64:
                kwargs["dtype"] = compiled._dtype = "float64"
        return reduce(values, *args, **kwargs)

    return reduced


def _may_be_float64() -> list[Any] | None:
    """Compiled losses that may; `None`: not in `losses_as_returned`."""
    return getattr(_own, "compiled", None)


# Once, at import: elsewhere the functions do what they did. But a loss without
# a static shape (of `tf.numpy_function`, say), which Keras can't reduce, is a
# scalar now, in `evaluate` too. Whether it is one is checked when it runs.
for _name in SCALES:
    setattr(loss_module, _name, _unless_own(getattr(loss_module, _name)))
setattr(loss_module, REDUCE, _reduced_as_returned(getattr(loss_module, REDUCE)))
