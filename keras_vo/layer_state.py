"""What layers keep beside trained weights: seeds, statistics, states.

The mean network's pass of a training step updates them as in Keras. Members
start from what it started from, and leave nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

from keras_vo.keras_compat import layers_of
from keras_vo.search import seeds
from keras_vo.search.communicator import Communicator

__all__ = [
    "average_moving_statistics",
    "seed_random_layers",
    "snapshot",
    "unsynchronized",
]

State = list[tuple[Any, tf.Tensor]]


def seed_random_layers(
    model: Any, base_seed: tf.Tensor, generation: tf.Tensor
) -> None:
    """Sets the seeds of random layers from those of the search.

    Keras does not save them: a resumed run would draw other masks.

    Args:
        model: a Keras model.
        base_seed: of the search, a scalar.
        generation: number of generations before this one, a scalar.
    """
    weights = {id(v) for v in model.weights}
    states = [v for v in model.variables if id(v) not in weights]
    if not states:
        return
    seed = seeds.generation_seed(base_seed, generation)
    for index, state in enumerate(states):
        # Negative: the population's directions have the indices from 0.
        own = seeds.single_seed(seed, tf.constant(-1 - index, tf.int64))
        state.assign(tf.bitcast(own, tf.uint32))


def snapshot(model: Any) -> State:
    """All variables that are not trained, with their values now.

    Those of stateful recurrent layers too, which Keras counts to no layer.
    """
    variables = list(model.non_trainable_variables)
    for layer in layers_of(model):
        if isinstance(layer, keras.layers.RNN):
            variables += keras.tree.flatten(layer.states or [])
    return [(v, tf.convert_to_tensor(v)) for v in variables]


@contextlib.contextmanager
def unsynchronized(model: Any) -> Iterator[None]:
    """Lets no layer wait for other replicas: members are not run in step."""
    layers = [
        layer
        for layer in layers_of(model)
        if getattr(layer, "synchronized", False)
    ]
    for layer in layers:
        layer.synchronized = False
    try:
        yield
    finally:
        for layer in layers:
            layer.synchronized = True


def average_moving_statistics(
    model: Any, examples: tf.Tensor, replicas: Communicator
) -> None:
    """Gives all replicas the mean, by examples, of what each has seen.

    That is, of the moving statistics of BatchNormalization layers that are not
    frozen. What other layers keep (states, counters) is each replica's own,
    as in Keras: a variable made with `aggregation="mean"` is averaged when it
    is assigned.

    Args:
        model: a Keras model, after the mean network's pass.
        examples: number of those that this replica has, a scalar.
        replicas: to average over.
    """
    if replicas.count == 1:
        return
    statistics = [
        variable
        for layer in layers_of(model)
        if isinstance(layer, keras.layers.BatchNormalization)
        and layer.trainable
        and layer.moving_mean is not None  # not built: never called
        for variable in (layer.moving_mean, layer.moving_variance)
    ]
    if not statistics:
        return
    wide = any(v.dtype == "float64" for v in statistics)
    dtype = tf.float64 if wide else tf.float32
    weight = tf.cast(examples, dtype)
    sums = replicas.sum(
        [
            tf.where(examples > 0, weight * tf.cast(v, dtype), 0)
            for v in statistics
        ]
        + [weight]
    )
    total = sums.pop()
    for variable, value in zip(statistics, sums, strict=True):
        variable.assign(tf.cast(value / total, variable.dtype))
