"""What AutoGraph is to convert: functions of users, and nothing of keras_vo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

__all__ = ["as_around"]

# TensorFlow's names for whatever calls functions of its users.
_autograph = tf.__internal__.autograph


def as_around(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, converted where it is called if this call is.

    For what is called where nothing is converted: keras_vo has nothing to
    convert, and AutoGraph would need five seconds for it.
    """
    context = _autograph.control_status_ctx()
    if tf.executing_eagerly() or context.status.name == "DISABLED":
        return function
    return _autograph.tf_convert(function, context)
