"""What is built before the first step is what the step would have built."""

import keras
import models
import numpy as np
import pytest
import tensorflow as tf

import keras_vo

X = np.random.default_rng(0).normal(size=(24, 4)).astype("float32")
LABELS = np.arange(24) % 3
ONE_HOT = np.eye(3, dtype="float32")[LABELS]


def compiled(cls, loss, metrics, layers=None):
    keras.utils.set_random_seed(1)
    layers = layers or [keras.Input((4,)), keras.layers.Dense(3, "softmax")]
    model = cls(layers)
    model.compile(
        optimizer=keras_vo.VOOptimizer(population_size=4, seed=1),
        loss=loss,
        metrics=metrics,
    )
    return model


def traces_of(model, x, y):
    """Of a step of `fit`, by the calls of a loss."""
    calls = []
    compute_loss = model.compute_loss

    def counted(*args, **kwargs):
        calls.append(1)
        return compute_loss(*args, **kwargs)

    model.compute_loss = counted
    model.fit(x, y, verbose=0)
    # The mean network's, and the two members' of a pair.
    assert len(calls) % 3 == 0
    return len(calls) // 3


@pytest.mark.parametrize(
    "y, loss",
    [
        (LABELS, "sparse_categorical_crossentropy"),
        (LABELS[:, None], "sparse_categorical_crossentropy"),
        (ONE_HOT, "categorical_crossentropy"),
    ],
)
def test_a_step_with_a_metric_is_traced_once(y, loss):
    model = compiled(keras_vo.VOSequential, loss, ["accuracy"])
    assert traces_of(model, X, y) == 1
    (metric,) = model._compile_metrics.metrics
    metric.reset_state()
    metric.update_state(y, model(X))
    accuracy = np.mean(model(X).numpy().argmax(-1) == LABELS)
    np.testing.assert_allclose(metric.result(), accuracy, rtol=1e-6)


class OneHotInTraining(keras_vo.VOSequential):
    def train_step(self, data):
        x, y = data
        return super().train_step((x, tf.one_hot(y, 3)))


class OneHotInTest(keras_vo.VOSequential):
    def test_step(self, data):
        x, y = data
        return super().test_step((x, tf.one_hot(y, 3)))


class OneHotInMetrics(keras_vo.VOSequential):
    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        return super().compute_metrics(x, tf.one_hot(y, 3), y_pred)


@pytest.mark.parametrize(
    "cls, loss, fit",
    [
        (OneHotInTraining, "categorical_crossentropy", True),
        (OneHotInTest, "categorical_crossentropy", False),
        (OneHotInMetrics, "sparse_categorical_crossentropy", True),
    ],
)
def test_other_labels_than_those_of_the_data(cls, loss, fit):
    """The metric is that of what the step makes of them."""
    model = compiled(cls, loss, ["accuracy"])
    if fit:
        model.fit(X, LABELS, verbose=0)
        (metric,) = model._compile_metrics.metrics
    else:
        accuracy = np.mean(model(X).numpy().argmax(-1) == LABELS)
        got = model.evaluate(X, LABELS, verbose=0)[1]
        np.testing.assert_allclose(got, accuracy, rtol=1e-6)
        (metric,) = model._compile_metrics.metrics
    assert isinstance(metric, keras.metrics.CategoricalAccuracy)


def test_metrics_that_the_model_object_computes():
    model = compiled(
        keras_vo.VOSequential, "sparse_categorical_crossentropy", ["accuracy"]
    )
    compute = model.compute_metrics
    model.compute_metrics = lambda x, y, y_pred, sample_weight=None: compute(
        x, tf.one_hot(y, 3), y_pred
    )
    model.fit(X, LABELS, verbose=0)
    (metric,) = model._compile_metrics.metrics
    assert isinstance(metric, keras.metrics.CategoricalAccuracy)


def test_an_output_whose_last_axis_is_known_to_the_step_only():
    layers = [
        keras.Input((None,)),
        keras.layers.Embedding(5, 1),
        keras.layers.Flatten(),
        keras.layers.Activation("sigmoid"),
    ]
    model = compiled(
        keras_vo.VOSequential, "binary_crossentropy", ["accuracy"], layers
    )
    model.fit(LABELS[:, None], LABELS[:, None] > 0, verbose=0)
    (metric,) = model._compile_metrics.metrics
    assert isinstance(metric, keras.metrics.BinaryAccuracy)


def test_labels_that_are_strings():
    words = np.array(["ab", "c"] * 4)

    class Lengths(keras.losses.Loss):
        def __call__(self, y_true, y_pred, sample_weight=None):
            length = tf.cast(tf.strings.length(y_true), tf.float32)
            return tf.reduce_mean(tf.abs(tf.reduce_sum(y_pred, -1) - length))

    class Length(keras.metrics.Mean):
        def update_state(self, y_true, y_pred, sample_weight=None):
            return super().update_state(tf.strings.length(y_true))

    model = compiled(keras_vo.VOSequential, Lengths(), [Length(name="length")])
    logs = model.train_on_batch(X[:8], words, return_dict=True)
    assert logs["length"] == 1.5


def test_what_a_callback_changes_before_the_first_step():
    """The optimizer is built when training has begun."""
    model = compiled(
        keras_vo.VOSequential,
        "mse",
        None,
        [keras.Input((4,)), *models.make_layers()],
    )
    model.run_eagerly = True

    def freeze(logs):
        model.layers[0].trainable = False
        model.optimizer.seed = 7

    before = model.layers[0].get_weights()
    model.fit(
        X,
        ONE_HOT,
        verbose=0,
        callbacks=[keras.callbacks.LambdaCallback(on_train_begin=freeze)],
    )
    for new, old in zip(model.layers[0].get_weights(), before, strict=True):
        np.testing.assert_array_equal(new, old)
    assert int(model.optimizer.base_seed) == 7
