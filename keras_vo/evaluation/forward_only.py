"""Losses without the derivative that their op computes beside them.

TensorFlow's softmax cross entropy has two outputs, the losses and their
derivative by the logits. Members need the first only: they have the logarithm
of the softmax at the label, in half the time and less with many classes
(benchmarks/results/step_time.md), equal to rounding.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from keras_vo.tensorflow_compat import called_for_each_op

__all__ = ["values_alone"]


def _of_classes(logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """Losses [n] of logits [n, classes] and labels [n], integers.

    A label that is no class is an error on CPUs, else a NaN, as of the op.
    """
    losses = -tf.gather(
        tf.nn.log_softmax(logits), labels, batch_dims=1, name="of_label"
    )
    classes = tf.shape(logits, labels.dtype)[1]
    nan = tf.constant(math.nan, losses.dtype)
    return tf.where((labels >= 0) & (labels < classes), losses, nan)


def _of_probabilities(logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """Losses [n] of logits and labels, [n, classes] both."""
    return -tf.reduce_sum(labels * tf.nn.log_softmax(logits), axis=-1)


_LOSSES = {
    "SparseSoftmaxCrossEntropyWithLogits": _of_classes,
    "SoftmaxCrossEntropyWithLogits": _of_probabilities,
}


@contextlib.contextmanager
def values_alone() -> Iterator[None]:
    """A scope in whose graph these ops have their first output from others.

    Eagerly it does nothing.
    """
    if tf.executing_eagerly():
        yield
        return
    graph = tf.compat.v1.get_default_graph()

    def value(op_type: str, inputs: Any, outputs: Any, where: Any) -> Any:
        if op_type not in _LOSSES or where is not graph:
            return None
        losses = _LOSSES[op_type](*inputs)
        losses.set_shape(outputs[0].shape)
        return [losses, *outputs[1:]]

    with called_for_each_op(value):
        yield
