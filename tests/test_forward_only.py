"""Losses of members without their derivatives."""

import contextlib

import keras
import models
import numpy as np
import pytest
import tensorflow as tf

from keras_vo.evaluation import graph
from keras_vo.evaluation.forward_only import values_alone

OPS = ("SparseSoftmaxCrossEntropyWithLogits", "SoftmaxCrossEntropyWithLogits")


def in_a_graph(function, *args):
    """What `function` returns in a graph, with and without the scope."""

    @tf.function(autograph=False)
    def alone(*args):
        with values_alone():
            return function(*args)

    return alone(*args), tf.function(function, autograph=False)(*args)


def logits():
    """Those of usual and of extreme sizes, and some that are not finite."""
    rows = np.random.default_rng(0).normal(size=(9, 5)).astype("float32")
    rows[1] *= 1e4
    rows[2] = 0.0
    rows[3, 1] = -np.inf
    rows[4, 0] = -np.inf  # the label's
    rows[5, 2] = np.inf
    rows[6, 3] = np.nan
    return tf.constant(rows)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_classes(dtype):
    labels = tf.constant([0, 1, 2, 3, 0, 1, 2, 3, 4])
    found, expected = in_a_graph(
        lambda x: tf.nn.sparse_softmax_cross_entropy_with_logits(labels, x),
        tf.cast(logits(), dtype),
    )
    assert found.dtype == expected.dtype
    rtol = {"float64": 1e-13, "float32": 2e-6}.get(dtype, 1e-2)
    np.testing.assert_allclose(
        tf.cast(found, "float64"), tf.cast(expected, "float64"), rtol=rtol
    )


@pytest.mark.parametrize("jit_compile", [False, True])
def test_labels_that_are_no_class(jit_compile):
    """An error on a CPU; under XLA, which has none, a NaN."""

    @tf.function(autograph=False, jit_compile=jit_compile)
    def losses(alone):
        labels = tf.constant([0, 3, 5, -1])
        with values_alone() if alone else contextlib.nullcontext():
            return tf.nn.sparse_softmax_cross_entropy_with_logits(
                labels, tf.zeros([4, 5])
            )

    if jit_compile:
        expected = losses(False)
        assert np.isnan(expected).tolist() == [False, False, True, True]
        np.testing.assert_allclose(losses(True), expected, rtol=2e-6)
        return
    for alone in (False, True):
        with pytest.raises(tf.errors.InvalidArgumentError, match="CrossEnt"):
            losses(alone)


def test_a_derivative_of_forward_mode():
    """Of the losses by the logits, beside them."""

    def function(x):
        with tf.autodiff.ForwardAccumulator(x, tf.ones_like(x)) as forward:
            y = tf.square(x)
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits([0, 2], y)
        return losses, forward.jvp(losses)

    found, expected = in_a_graph(function, tf.constant([[1.0, 2, 3]] * 2))
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_probabilities(smoothing):
    labels = tf.one_hot([0, 1, 2, 3, 0, 1, 2, 3, 4], 5) + smoothing
    found, expected = in_a_graph(
        lambda x: tf.nn.softmax_cross_entropy_with_logits(labels, x), logits()
    )
    np.testing.assert_allclose(found, expected, rtol=2e-6)


def test_positions_and_an_empty_batch():
    for batch in (3, 0):
        x = tf.random.stateless_normal([batch, 4, 5], [0, 1])
        y = tf.zeros([batch, 4], tf.int32) + 2
        found, expected = in_a_graph(
            lambda x, y: tf.nn.sparse_softmax_cross_entropy_with_logits(y, x),
            x,
            y,
        )
        assert found.shape == (batch, 4)
        np.testing.assert_allclose(found, expected, rtol=2e-6)


def classifier(loss, **compiling):
    layers = [keras.layers.Dense(5, activation="tanh"), keras.layers.Dense(3)]
    return models.make_model(layers, loss=loss, **compiling)


LOSSES = {
    "classes": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    "ignored": keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, ignore_class=1
    ),
    "probabilities": keras.losses.CategoricalCrossentropy(
        from_logits=True, label_smoothing=0.1
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_members_lose_what_their_networks_lose(name):
    spy = models.LossSpy()
    model = classifier(
        LOSSES[name], optimizer=models.make_optimizer(fitness_shaping=spy)
    )
    x, y = models.make_data()
    if name == "probabilities":
        y = np.eye(3, dtype="float32")[np.ravel(y)]
    plain = keras.Sequential.from_config(
        keras.Sequential(model.layers).get_config()
    )
    plain.build(model.input_shape)
    plain.set_weights(model.get_weights())
    plain.compile(loss=LOSSES[name])
    want = models.member_losses(plain, models.make_optimizer(), x, y)
    model.train_on_batch(x, y)
    np.testing.assert_allclose(spy.losses, want, rtol=1e-5)


def test_the_op_of_members_has_no_vectorized_form(monkeypatch):
    """It is made, and dropped; without the scope it has one."""

    def found():
        nodes = models.nodes_of_a_step(classifier(LOSSES["classes"]))
        return [n.name for n in nodes if n.op in OPS and "pfor" in n.name]

    assert not found()
    monkeypatch.setattr(graph, "values_alone", contextlib.nullcontext)
    assert found()


def test_labels_that_are_no_classes_are_an_error():
    model = classifier(LOSSES["classes"])
    x, y = models.make_data()
    with pytest.raises(tf.errors.InvalidArgumentError, match="label|indices"):
        model.train_on_batch(x, y + 100)
    assert all(np.all(np.isfinite(w)) for w in model.get_weights())
