"""Losses of single examples: what Keras adds up, and what is refused."""

import keras
import models
import numpy as np
import pytest
import tensorflow as tf

import keras_vo
from keras_vo.evaluation import per_example
from keras_vo.layers import LocalReparamDense

layers = keras.layers
REDUCTIONS = ["sum_over_batch_size", "sum", "mean", "mean_with_sample_weight"]
REDUCTIONS += [None]
BATCH = 5


def make_problem(masked, positions):
    """A compiled model, its data and (masked) predictions."""
    rng = np.random.default_rng(0)
    steps = (4,) if positions or masked else ()
    x = rng.integers(0, 3, size=(BATCH, 4)) if masked else None
    if x is None:
        x = rng.normal(size=(BATCH, *steps, 3)).astype("float32")
    y = rng.normal(size=(BATCH, *steps, 2)).astype("float32")
    body = [layers.Embedding(3, 3, mask_zero=True)] if masked else []
    return [*body, layers.Dense(2)], x, y


@pytest.mark.parametrize(
    "case",
    list(
        models.pairwise(
            reduction=REDUCTIONS,
            weighted=[False, True],
            masked=[False, True],
            positions=[False, True],
        )
    ),
    ids=models.name_of,
)
def test_their_mean_is_the_loss(case):
    reduction, weighted, masked, positions = case.values()
    body, x, y = make_problem(masked, positions)
    model = models.make_model(
        body, shape=x.shape[1:], loss=keras.losses.Huber(reduction=reduction)
    )
    rng = np.random.default_rng(1)
    weight = None
    if weighted:
        weight = tf.constant(rng.uniform(1, 2, BATCH), tf.float32)
        if positions or masked:
            weight = weight[:, None]
    y_pred = model(x)
    want = tf.reduce_mean(model.compute_loss(x, y, y_pred, weight))
    with per_example.by_example(model) as weights:
        losses = model.compute_loss(x, y, y_pred, weight)
    assert losses.shape == (BATCH,)
    np.testing.assert_allclose(tf.reduce_mean(losses), want, rtol=1e-5)
    # And each is its own: another target moves only its example's.
    other = y.copy()
    other[2] += 1.0
    with per_example.by_example(model):
        moved = model.compute_loss(x, other, y_pred, weight) - losses
    assert np.flatnonzero(np.abs(moved) > 1e-6).tolist() == [2]
    # The weights are what a loss of 1 everywhere would have.
    assert weights[0].shape == (BATCH,)
    if weighted and not masked:
        np.testing.assert_allclose(
            weights[0] / weights[0][0],
            tf.squeeze(weight) / tf.squeeze(weight)[0],
            rtol=1e-5,
        )
    # Nothing is left behind.
    np.testing.assert_array_equal(
        tf.reduce_mean(model.compute_loss(x, y, y_pred, weight)), want
    )


def test_ignored_labels():
    """A loss may have a mask of its own."""
    loss = keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, ignore_class=2
    )
    model = models.make_model([layers.Dense(3)], loss=loss)
    x, y = models.make_data()
    y_pred = model(x)
    want = model.compute_loss(x, y, y_pred)
    with per_example.by_example(model) as weights:
        losses = model.compute_loss(x, y, y_pred)
    ignored = np.squeeze(y) == 2
    assert np.all(losses[ignored] == 0) and np.all(weights[0][ignored] == 0)
    np.testing.assert_allclose(tf.reduce_mean(losses), want, rtol=1e-5)


def two_outputs(optimizer=None, **compiling):
    inputs = keras.Input((4,))
    hidden = LocalReparamDense(5, activation="relu")(inputs)
    model = keras_vo.VOModel(
        inputs,
        [
            LocalReparamDense(1, name="a")(hidden),
            LocalReparamDense(3, name="b")(hidden),
        ],
    )
    model.compile(
        optimizer=optimizer or models.make_optimizer(),
        run_eagerly=True,
        loss=[
            "mse",
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        ],
        **compiling,
    )
    model.optimizer.build(model.trainable_variables)
    return model


def test_several_outputs_with_weights():
    """The log and the step are the sums of those of the outputs."""
    x, y = models.make_data()
    targets, steps = [x[:, :1], y], []
    for loss_weights in ([0.5, 2.0], [1.0, 0.0], [0.0, 1.0]):
        keras.utils.set_random_seed(0)
        model = two_outputs(
            models.make_optimizer(
                inner_optimizer=keras.optimizers.SGD(1.0),
                fitness_shaping="identity",
            ),
            loss_weights=loss_weights,
        )
        before = models.weights(model)
        y_pred = model(x)
        want = model.compute_loss(x, targets, y_pred)
        with per_example.by_example(model):
            losses = model.compute_loss(x, targets, y_pred)
        np.testing.assert_allclose(tf.reduce_mean(losses), want, rtol=1e-5)
        logs = model.train_on_batch(x, targets, return_dict=True)
        np.testing.assert_allclose(logs["loss"], want, rtol=1e-5)
        parts = np.array([logs["a_loss"], logs["b_loss"]])
        np.testing.assert_allclose(want, parts @ loss_weights, rtol=1e-5)
        steps.append(models.weights(model) - before)
    both, a, b = steps
    np.testing.assert_allclose(both, 0.5 * a + 2 * b, rtol=1e-3, atol=1e-5)
    assert np.abs(a).max() > 1e-3 < np.abs(b).max()


def test_several_outputs_with_weights_of_examples():
    x, y = models.make_data()
    model = two_outputs()
    rng = np.random.default_rng(0)
    weight = [rng.uniform(size=len(x)).astype("float32") for _ in range(2)]
    targets, y_pred = [x[:, :1], y], model(x)
    want = model.compute_loss(x, targets, y_pred, weight)
    with per_example.by_example(model) as weights:
        losses = model.compute_loss(x, targets, y_pred, weight)
    np.testing.assert_allclose(tf.reduce_mean(losses), want, rtol=1e-5)
    np.testing.assert_allclose(weights, weight, rtol=1e-5)


def test_losses_of_weights_that_cancel():
    """Maximised and minimised: the layer learns all the same."""
    x, y = models.make_data()
    model = two_outputs(loss_weights=[-1.0, 1.0])
    before = models.weights(model)
    model.train_on_batch(x, [x[:, :1], y])
    assert np.all(models.weights(model) != before)


# --- weights of examples, in training ---


@pytest.mark.parametrize("shaping", ["identity", "centered_rank"])
def test_weights_of_examples(shaping):
    """The gradient is linear in them, up to the one scale of all utilities; one
    of 0 teaches nothing, whatever its label is.
    """
    model = models.make_model(
        [LocalReparamDense(5, activation="relu"), LocalReparamDense(3)],
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        optimizer=models.make_optimizer(
            inner_optimizer=keras.optimizers.SGD(1.0), fitness_shaping=shaping
        ),
        run_eagerly=True,
    )
    rewind = models.rewinder(model)
    before = models.weights(model)
    x, y = models.make_data(8)

    def step(weight, labels=y):
        rewind()
        weight = np.float32(weight)
        model.train_on_batch(x, labels, sample_weight=weight)
        return models.weights(model) - before

    some = np.array([1.0, 0, 2, 0, 1, 3, 0, 1])
    right = step(some)
    state = models.search_state(model)
    wrong = step(some, np.where(some[:, None] == 0, (y + 1) % 3, y))
    np.testing.assert_array_equal(wrong, right)
    models.assert_same_state(models.search_state(model), state)

    base, one, other = np.ones(8), np.eye(8)[3], np.eye(8)[5]
    steps = np.stack([step(base), step(base + one)], 1)

    def off(weight):
        """How far its step is from a combination of those two."""
        want = step(weight)
        combined = steps @ np.linalg.lstsq(steps, want, rcond=None)[0]
        return np.abs(combined - want).max() / np.abs(want).max()

    assert off(base + 2 * one) < 1e-3
    # It is that example's own change, not one of the whole step.
    assert off(base + other) > 1e-2
    assert off(base * 2 + one) < 1e-3
    if shaping == "identity":  # no scale at all
        twice = 2 * steps[:, 1] - steps[:, 0]
        got = step(base + 2 * one)
        np.testing.assert_allclose(got, twice, rtol=1e-3, atol=1e-6)


# --- compute_loss ---


class OwnLoss(keras_vo.VOModel):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        return tf.reduce_sum(tf.square(y_pred - y), axis=-1)


class SupersLoss(keras_vo.VOModel):
    def compute_loss(self, *args, **kwargs):
        return 2.0 * super().compute_loss(*args, **kwargs)


def make_own(cls, **compiling):
    inputs = keras.Input((4,))
    keras.utils.set_random_seed(0)
    model = cls(inputs, LocalReparamDense(1)(inputs))
    model.compile(
        optimizer=models.make_optimizer(), run_eagerly=True, **compiling
    )
    model.optimizer.build(model.trainable_variables)
    return model


@pytest.mark.parametrize(
    "cls, loss", [(OwnLoss, None), (OwnLoss, "mae"), (SupersLoss, "mse")]
)
def test_an_overridden_compute_loss(cls, loss):
    """Of one output, they are the mean squared error or twice of it."""
    x, _ = models.make_data()
    model, twin = (
        make_own(cls, loss=loss),
        make_own(keras_vo.VOModel, loss="mse"),
    )
    before = models.weights(model)
    logs, want = (
        m.train_on_batch(x, x[:, :1], return_dict=True) for m in (model, twin)
    )
    np.testing.assert_allclose(
        logs["loss"], want["loss"] * (2 if cls is SupersLoss else 1), rtol=1e-5
    )
    np.testing.assert_allclose(
        models.weights(model), models.weights(twin), rtol=1e-5
    )
    assert np.all(models.weights(model) != before)


# --- refused ---


def loss_of_classes(y_true, y_pred):
    return tf.reduce_mean(tf.square(y_true - y_pred), axis=0)


class AddsLoss(layers.Layer):
    def call(self, inputs):
        self.add_loss(tf.reduce_mean(inputs))
        return inputs


LR = LocalReparamDense


class Cell(layers.Layer):
    """A recurrent cell of a LocalReparamDense: a call for each time step."""

    def __init__(self):
        super().__init__()
        self.state_size = self.output_size = 2
        self.dense = LR(2)

    def build(self, input_shape):
        self.dense.build((None, 2))

    def call(self, inputs, states, training=False):
        output = self.dense(inputs + states[0])
        return output, [output]


REFUSED = {
    "classes": (lambda: [LR(1)], "which 'loss_of_classes' has not.*first axis"),
    "add_loss": (lambda: [AddsLoss(), LR(1)], "`add_loss`.*1 added"),
    "activity": (
        lambda: [layers.Dense(2, activity_regularizer="l2"), LR(1)],
        "activity regularizers",
    ),
    "regularizer": (lambda: [LR(1, kernel_regularizer="l2")], "`weight_decay`"),
    "loop": (
        lambda: [layers.Reshape((2, 2)), layers.RNN(Cell()), LR(1)],
        "called in a loop",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_value_for_each_example(name):
    make, message = REFUSED[name]
    x, _ = models.make_data()
    loss = {"classes": loss_of_classes}.get(name, "mse")
    model = models.make_model(make(), loss=loss)
    before = model.get_weights()
    # `fit` knows the size of a batch, and so the shape of a loss, only then.
    errors = (ValueError, tf.errors.InvalidArgumentError)
    with pytest.raises(errors, match=f"(?s){message}.*"):
        models.fit(model, x, x[:, :1])
    models.assert_same_state(before, model.get_weights())


class Folds(layers.Layer):
    def call(self, inputs):
        return tf.reshape(inputs, [-1, 2])


class Unfolds(layers.Layer):
    def call(self, inputs):
        return tf.reshape(inputs, [-1, 2])


def test_examples_not_along_the_first_axis():
    x, _ = models.make_data()
    model = keras_vo.VOSequential([Folds(), LR(1), Unfolds()])
    model.compile(optimizer=models.make_optimizer(), loss="mse")
    with pytest.raises(ValueError, match="first axis"):
        models.fit(model, x, x[:, :2])


def test_regularizers_of_other_layers_are_those_of_the_member():
    """A weight-space layer is judged by the whole loss of a member."""
    x, _ = models.make_data()

    def loss_of(strength):
        keras.utils.set_random_seed(0)
        model = models.make_model(
            [
                layers.Dense(
                    2, kernel_regularizer=keras.regularizers.L2(strength)
                ),
                LR(1),
            ],
            loss="mse",
            run_eagerly=True,
        )
        kernel = model.get_weights()[0]
        logs = model.train_on_batch(x, x[:, :1], return_dict=True)
        return logs, kernel

    (plain, kernel), (strong, _) = loss_of(0.0), loss_of(1.0)
    np.testing.assert_allclose(
        strong["loss"] - plain["loss"], (kernel**2).sum(), rtol=1e-4
    )
    # E|W + sigma z|^2 = |W|^2 + d sigma^2, four pairs: within a factor 2.
    extra = strong["population_loss"] - plain["population_loss"]
    assert extra > (kernel**2).sum()
