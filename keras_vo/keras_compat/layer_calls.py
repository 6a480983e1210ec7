"""Calls of Keras layers, seen while a population is evaluated.

Keras has no hook around a layer's `call`. While `intercepted` is entered, that
of some of its classes is replaced, for all threads; those that have not
entered it notice nothing.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras

__all__ = ["CLASSES", "WITH_KERNELS", "intercepted"]

# From the layer, its own `call` and its arguments to its outputs.
Handler = Callable[..., Any]


def _classes(*names: str) -> tuple[Any, ...]:
    found = (getattr(keras.layers, name, None) for name in names)
    return tuple(cls for cls in found if cls is not None)  # not in all versions


CLASSES = _classes(
    "Dense",
    "EinsumDense",
    "Embedding",
    "LayerNormalization",
    "RMSNormalization",
    "BatchNormalization",
    "Conv1D",
    "Conv2D",
    "Conv3D",
)
# All that have a kernel, or call a layer that has one: of recurrent layers, the
# class behind all of them.
WITH_KERNELS = CLASSES + _classes(
    "Conv1DTranspose",
    "Conv2DTranspose",
    "Conv3DTranspose",
    "DepthwiseConv1D",
    "DepthwiseConv2D",
    "SeparableConv1D",
    "SeparableConv2D",
    "RNN",
    "TimeDistributed",
    "MultiHeadAttention",
    "GroupQueryAttention",
)
_lock = threading.Lock()
_entered: collections.Counter[type] = collections.Counter()
_own: dict[type, Callable[..., Any] | None] = {}
_thread = threading.local()


@contextlib.contextmanager
def intercepted(
    handler: Handler, classes: Sequence[type] | None = None
) -> Iterator[None]:
    """Calls of some classes in this thread go to `handler`.

    So do those of subclasses that have no `call` of their own, or whose own
    calls that of the class behind it.

    Args:
        handler: is called with the layer, the `call` it would have had, and
            the arguments.
        classes: those, of `WITH_KERNELS`; `None`: `CLASSES`.
    """
    classes = CLASSES if classes is None else classes
    before = getattr(_thread, "handler", None)
    _replace(classes, +1)
    _thread.handler = handler
    try:
        yield
    finally:
        _thread.handler = before
        _replace(classes, -1)


def _replace(classes: Sequence[Any], change: int) -> None:
    """Counts who has entered; replaces with the first, restores with the
    last.
    """
    with _lock:
        for cls in classes:
            first = _entered[cls] == 0
            _entered[cls] += change
            if first:
                _own[cls] = vars(cls).get("call")
                cls.call = _asking(cls.call)
            elif _entered[cls] == 0:
                if (own := _own.pop(cls)) is None:  # that of a base class
                    del cls.call
                else:
                    cls.call = own


def _asking(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def asking(self: Any, *args: Any, **kwargs: Any) -> Any:
        handler = getattr(_thread, "handler", None)
        own = functools.partial(call, self)
        if handler is None:
            return own(*args, **kwargs)
        return handler(self, own, *args, **kwargs)

    return asking
