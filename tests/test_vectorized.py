"""How members are evaluated: what is slow is said, what is large is not."""

import logging

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl import logging as absl_logging

import keras_vo
from keras_vo.evaluation import vectorized
from keras_vo.evaluation.isolation import Isolation


@pytest.fixture
def warned(monkeypatch):
    """What is logged, by a process that has said nothing yet."""
    monkeypatch.setattr(vectorized, "_announced", set())
    messages = []

    class Keep(logging.Handler):
        def emit(self, record):
            messages.append(record.getMessage())

    handler = Keep(level=logging.WARNING)
    absl_logging.get_absl_logger().addHandler(handler)
    yield messages
    absl_logging.get_absl_logger().removeHandler(handler)


def run(function):
    specs = tf.TensorSpec([3, 4], tf.float32)

    @tf.function
    def all_rows(rows):
        over_rows = vectorized.compiled(function, specs, False, Isolation([]))
        return over_rows(rows, tf.constant(3))

    return all_rows(tf.ones([3, 4]))


def uses_numpy(row):
    return tf.ensure_shape(tf.numpy_function(np.sum, [row], tf.float32), [])


def convolves(row):
    image = tf.reshape(row, [1, 2, 2, 1])
    kernel = tf.reshape(row, [2, 2, 1, 1])
    return tf.reduce_sum(tf.nn.conv2d(image, kernel, 1, "VALID"))


def test_the_slow_path_is_announced_once_for_each_op(warned):
    for _ in range(2):
        np.testing.assert_allclose(run(convolves), 4.0)
        np.testing.assert_allclose(run(uses_numpy), 4.0)
    assert len(warned) == 2
    assert "vectorized form of Conv2D." in warned[0]
    assert "vectorized form of PyFunc." in warned[1]


def test_the_fast_path_says_nothing(warned):
    np.testing.assert_allclose(run(tf.reduce_sum), 4.0)
    assert warned == []


def test_the_functions_own_error_is_raised_and_nothing_announced(warned):
    def broken(row):
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        run(broken)
    assert warned == []


def size_of_a_step(units, structure):
    """Bytes of the graph of a step, and of its largest constant."""
    model = keras_vo.VOSequential(
        [keras.Input((20,)), keras.layers.Dense(units)]
    )
    model.compile(
        optimizer=keras_vo.VOOptimizer(
            population_size=4, search_distribution=structure, max_kl=1.0
        ),
        loss="mse",
    )
    model.optimizer.build(model.trainable_variables)

    @tf.function(autograph=False)
    def step(x, y):
        return model.train_step((x, y))

    x, y = tf.zeros([2, 20]), tf.zeros([2, units])
    graph = step.get_concrete_function(x, y).graph.as_graph_def()
    return graph.ByteSize()


@pytest.mark.parametrize("structure", ["layerwise", "separable"])
def test_the_graph_does_not_grow_with_the_weights(structure):
    """From 210 to 21,000 weights; a constant for each would be 80 kB."""
    small, large = (size_of_a_step(units, structure) for units in (10, 1000))
    assert large < small + 5000
