"""Calls of Keras layers, seen while a population is evaluated.

Keras has no hook around a layer's `call`. While `intercepted` is entered, that
of some of its classes is replaced, for all threads; those that have not
entered it notice nothing.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import keras

__all__ = ["CLASSES", "intercepted"]

# From the layer, its own `call` and its arguments to its outputs.
Handler = Callable[..., Any]

CLASSES = tuple(
    getattr(keras.layers, name)
    for name in (
        "Dense",
        "EinsumDense",
        "Embedding",
        "LayerNormalization",
        "RMSNormalization",  # not in all versions
        "BatchNormalization",
        "Conv1D",
        "Conv2D",
        "Conv3D",
    )
    if hasattr(keras.layers, name)
)
_lock = threading.Lock()
_entered = 0
_own: dict[type, Callable[..., Any] | None] = {}
_thread = threading.local()


@contextlib.contextmanager
def intercepted(handler: Handler) -> Iterator[None]:
    """Calls of `CLASSES` in this thread go to `handler`.

    So do those of subclasses that have no `call` of their own, or whose own
    calls that of the class behind it.

    Args:
        handler: is called with the layer, the `call` it would have had, and
            the arguments.
    """
    before = getattr(_thread, "handler", None)
    _replace(+1)
    _thread.handler = handler
    try:
        yield
    finally:
        _thread.handler = before
        _replace(-1)


def _replace(change: int) -> None:
    """Counts who has entered; replaces with the first, restores with the
    last.
    """
    global _entered
    with _lock:
        first = _entered == 0
        _entered += change
        for cls in CLASSES:
            if first:
                _own[cls] = vars(cls).get("call")
                cls.call = _asking(cls.call)
            elif _entered == 0:
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
