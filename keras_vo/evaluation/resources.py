"""Variables by their handles, whatever made them."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from keras_vo.tensorflow_compat import resource_dtype

__all__ = ["assign", "read"]


def read(handle: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """A handle with the value of its variable now: arguments of `assign`."""
    dtype = resource_dtype(handle)
    return handle, tf.raw_ops.ReadVariableOp(resource=handle, dtype=dtype)


def assign(handle: tf.Tensor, value: tf.Tensor) -> Any:
    """Assigns a variable; in a graph, an op that does."""
    return tf.raw_ops.AssignVariableOp(resource=handle, value=value)
