"""Bad input to `fit`: an error that says what was expected and received."""

import keras
import models
import pytest
import tensorflow as tf

import keras_vo


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_a_plain_model_is_told_three_ways_out(policy):
    keras.config.set_dtype_policy(policy)
    model = keras.Sequential(models.make_layers())
    model.compile(optimizer=models.make_optimizer(), loss="mse")
    with pytest.raises(
        ValueError, match="VOModel.*VOSequential.*VOTrainStep.*make_variational"
    ):
        models.fit(model)


def test_another_optimizer_is_refused():
    model = models.make_model()
    model.compile(optimizer="adam", loss="mse")
    with pytest.raises(TypeError, match=r"VOOptimizer\(.*Received.*Adam"):
        models.fit(model)
    model.evaluate(*models.make_data(), verbose=0)


def test_nothing_to_train():
    model = models.make_model()
    model.trainable = False
    model.compile(optimizer=models.make_optimizer(), loss="mse")
    with pytest.raises(ValueError, match="at least one trainable weight"):
        models.fit(model)


def test_trainable_changed_after_compiling():
    model = models.make_model()
    models.fit(model)
    model.layers[0].trainable = False
    model.make_train_function(force=True)
    x, y = models.make_data(8)
    with pytest.raises(ValueError, match="compile the model with a new"):
        model.train_on_batch(x, y)


class OwnLoss(keras_vo.VOTrainStep, keras.Model):
    def __init__(self, result):
        super().__init__()
        self.dense = keras.layers.Dense(1)
        self.result = result

    def call(self, inputs):
        return self.dense(inputs)

    def compute_loss(self, x=None, y=None, y_pred=None, **kwargs):
        return self.result(y_pred)


@pytest.mark.parametrize("run_eagerly", [False, True])
@pytest.mark.parametrize(
    "result, message",
    [
        (lambda y: y[:, 0], r"scalar.*shape \(8,\)"),
        (lambda y: None, "scalar.*None"),
    ],
)
def test_a_loss_that_is_no_scalar(result, message, run_eagerly):
    model = OwnLoss(result)
    model.compile(optimizer=models.make_optimizer(), run_eagerly=run_eagerly)
    with pytest.raises(ValueError, match=message):
        model.train_on_batch(models.make_data(8)[0])


def test_a_member_that_xla_cannot_compile():
    """The error is XLA's own; without jit_compile the model trains."""

    def python(y_true, y_pred):
        del y_true
        first = tf.numpy_function(lambda v: v[:, 0], [y_pred], tf.float32)
        return tf.ensure_shape(first, [None])

    x, y = models.make_data(8)
    model = models.make_model(loss=python, jit_compile=True)
    with pytest.raises(tf.errors.InvalidArgumentError, match="XLA|compil"):
        model.train_on_batch(x, y)
    models.make_model(loss=python).train_on_batch(x, y)


def test_no_model_to_convert():
    for thing in (keras.layers.Dense(1), models.make_optimizer(), keras.Model):
        with pytest.raises(TypeError, match="keras.Model.*Received"):
            keras_vo.make_variational(thing)
