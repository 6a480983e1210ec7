"""What AutoGraph is to convert: functions of users, and nothing of keras_vo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

__all__ = ["converted_as_caller"]

# TensorFlow's names for whatever calls functions of its users.
_autograph = tf.__internal__.autograph


def converted_as_caller(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which AutoGraph converts if it converts what calls this.

    It does so wherever `function` is called, in code too that is not converted
    itself: keras_vo has nothing to convert, which would take five seconds.
    """
    context = _autograph.control_status_ctx()
    if tf.executing_eagerly() or context.status.name == "DISABLED":
        return function
    return _autograph.tf_convert(function, context)
