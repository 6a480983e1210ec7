"""Losses are compared in the precision that they come in."""

import decimal
import fractions
import functools

import keras
import models
import numpy as np
import pytest
import tensorflow as tf

import keras_vo
from keras_vo.evaluation import notices
from keras_vo.search import credit

START = [4.0, -3.0]


def minimized(objective, graph=False, shaping="centered_rank", steps=3):
    """Where a search from `START` gets to, and the loss it returns last."""
    w = tf.Variable(START)
    optimizer = models.make_optimizer("separable", fitness_shaping=shaping)

    def step():
        return optimizer.minimize(lambda weights: objective(weights[0]), [w])

    step = tf.function(step) if graph else step
    for _ in range(steps):
        loss = step()
    return w.numpy(), loss


def square(w):
    return tf.reduce_sum(tf.square(tf.cast(w, tf.float64)))


def number(w):
    return float(square(w))


OFFSET = 10**9
EAGER = {
    "float": lambda w: OFFSET + number(w),
    "np.float64": lambda w: np.float64(OFFSET + number(w)),
    "array": lambda w: np.array(OFFSET + number(w)),
    "integer": lambda w: OFFSET**2 // 1000 + int(1e6 * number(w)),
    "np.int64": lambda w: np.int64(OFFSET + 1e6 * number(w)),
    "decimal": lambda w: decimal.Decimal(number(w)),
    "fraction": lambda w: fractions.Fraction(number(w)),
    "np.longdouble": lambda w: np.longdouble(number(w)),
    "tensor": lambda w: OFFSET + square(w),
    "now and then": lambda w: number(w) if w[0] > 3 else square(w),
    "tiny": lambda w: 1e-60 * number(w),
    "huge": lambda w: 1e60 * number(w),
}
GRAPH = {
    "offset": lambda w: OFFSET + square(w),
    "integer": lambda w: tf.cast(1e9 * square(w), tf.int64),
    "tiny": lambda w: 1e-60 * square(w),
    "huge": lambda w: 1e60 * square(w),
    "program": lambda w: tf.numpy_function(
        lambda w: OFFSET + np.sum(w.astype(float) ** 2), [w], tf.float64
    ),
}


@pytest.fixture(scope="module")
def ranked():
    return minimized(number)[0]


@pytest.mark.parametrize("name", [*EAGER, *(f"graph {n}" for n in GRAPH)])
def test_ranks_take_no_notice_of_scale_and_offset(name, ranked):
    graph = name.startswith("graph ")
    objective = GRAPH[name[6:]] if graph else EAGER[name]
    np.testing.assert_array_equal(minimized(objective, graph)[0], ranked)


@pytest.mark.parametrize(
    ("shaping", "graph"), [("identity", True), ("standardize", False)]
)
def test_losses_are_centred_before_they_are_narrowed(shaping, graph):
    """Of 1e9, float64 has steps of 1e-7."""
    objective = (lambda w: OFFSET + square(w)) if graph else EAGER["float"]
    got, loss = minimized(objective, graph, shaping)
    want, _ = minimized(number, shaping=shaping)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert loss.dtype == tf.float64 and OFFSET < float(loss) < OFFSET + 100


def test_a_float32_loss_stays_float32():
    _, loss = minimized(lambda w: tf.reduce_sum(w**2))
    assert loss.dtype == tf.float32


@pytest.mark.parametrize(("name", "graph"), [("tiny", True), ("huge", False)])
def test_utilities_that_a_weight_cannot_hold(name, graph):
    """Those of "identity" have the scale of the losses."""
    objective = (GRAPH if graph else EAGER)[name]
    with pytest.raises(
        tf.errors.InvalidArgumentError, match="float32 can hold.*centered_rank"
    ):
        minimized(objective, graph, "identity")


@pytest.mark.parametrize("shaping", ["identity", "centered_rank"])
def test_equal_losses_are_equal_in_any_precision(shaping):
    got, _ = minimized(lambda w: 1e300, shaping=shaping)
    np.testing.assert_array_equal(got, START)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (10**400, "range of float64.*Received: 1000"),
        (1j, "scalar loss.*complex"),
        ("3", "scalar loss.*string"),
        ([1.0, 2.0], r"scalar loss.*\(2,\)"),
        (None, "Received: None"),
        ((tf.constant(1.0), {"steps": 3}), "scalar loss.*'steps': 3"),
    ],
)
def test_no_losses(value, message):
    with pytest.raises(ValueError, match=message):
        minimized(lambda w: value)


# Models.


def mean_square(y_true, y_pred):
    return tf.reduce_mean(tf.square(y_true - y_pred), axis=-1)


def wide(y_true, y_pred):
    return tf.cast(mean_square(y_true, y_pred), tf.float64) + 1e8


class Wide(keras.losses.Loss):
    def __init__(self):
        super().__init__(dtype="float64")

    def call(self, y_true, y_pred):
        return mean_square(y_true, y_pred) + 1e8


class WideModel(keras_vo.VOSequential):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        return tf.reduce_mean(wide(y, y_pred))


def compiled(
    loss,
    eager=False,
    cls=keras_vo.VOSequential,
    layer=keras.layers.Dense,
    shaping="centered_rank",
):
    keras.utils.set_random_seed(1)
    model = cls([keras.Input((4,)), layer(4)])
    optimizer = models.make_optimizer(fitness_shaping=shaping)
    model.compile(optimizer=optimizer, loss=loss, run_eagerly=eager)
    model.optimizer.build(model.trainable_variables)
    return model


def fitted(model):
    x, _ = models.make_data()
    models.fit(model, x, x, epochs=1)
    return models.weights(model)


def trained(*args, **kwargs):
    return fitted(compiled(*args, **kwargs))


@functools.cache
def twin():
    return trained(mean_square)


@pytest.mark.parametrize(
    ("name", "eager"),
    [
        ("function", False),
        ("function", True),
        ("class", False),
        ("compute_loss", False),
    ],
)
def test_a_model_with_an_offset_in_its_loss(name, eager):
    cls = WideModel if name == "compute_loss" else keras_vo.VOSequential
    loss = {"function": wide, "class": Wide()}.get(name)
    # Ranks of losses that differ by less than 1e-8 may.
    np.testing.assert_allclose(trained(loss, eager, cls), twin(), atol=1e-5)


@pytest.mark.parametrize(
    "shaping, eager", [("identity", False), ("centered_rank", True)]
)
def test_an_offset_in_the_losses_of_examples(shaping, eager):
    layer = keras_vo.layers.LocalReparamDense
    settings = {"layer": layer, "shaping": shaping, "eager": eager}
    got = trained(wide, **settings)
    want = trained(mean_square, **settings)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_losses_of_examples_that_float32_can_not_hold():
    def tiny(y_true, y_pred):
        return 1e-60 * tf.cast(mean_square(y_true, y_pred), tf.float64)

    layer = keras_vo.layers.LocalReparamDense
    with pytest.raises(
        tf.errors.InvalidArgumentError, match="float32 can hold"
    ):
        trained(tiny, layer=layer, shaping="identity")


def narrow(y_true, y_pred):
    return mean_square(y_true, y_pred) + 1e8  # in steps of 8


@pytest.mark.parametrize("how", ["fit", "minimize"])
def test_what_float32_has_lost_already_is_said(how, monkeypatch):
    monkeypatch.setattr(notices, "_said", set())
    with pytest.warns(UserWarning, match="by no more than what rounding") as w:
        if how == "fit":
            trained(narrow)
        else:
            minimized(lambda w: 1e8 + tf.reduce_sum(w**2))
    assert len(w) == 1


@pytest.mark.parametrize(
    ("losses", "blurred"),
    [
        ([1e8, 1e8 + 8], True),
        ([1e8, 1e8], True),
        ([1e8, 1e8 + 1000], False),
        ([0.25, 0.25], False),  # a plateau of a 0-1 error
        ([0.25, 0.375], False),
        ([1.0, np.inf], False),
        ([np.inf, np.inf], False),
        ([np.nan, np.nan], False),
        ([1.0, 1.0000001], True),
    ],
)
def test_which_losses_are_too_close(losses, blurred):
    assert bool(credit.is_blurred(tf.constant(losses))) == blurred
    assert not credit.is_blurred(tf.constant([1e8, 1e8 + 8], tf.float64))


def test_replicas_compare_in_the_precision_that_came():
    with models.mirrored(2).scope():
        offset = tf.Variable(0.0, dtype=tf.float64)
        model = compiled(
            lambda y_true, y_pred: (
                tf.cast(mean_square(y_true, y_pred), tf.float64) + offset
            )
        )
    rewind = models.rewinder(model)
    want = fitted(model)
    rewind()
    offset.assign(1e8)
    np.testing.assert_allclose(fitted(model), want, atol=1e-5)


def program(dtype):
    def loss(y_true, y_pred):
        return tf.numpy_function(
            lambda a, b: np.mean((a - b) ** 2).astype(dtype),
            [y_true, y_pred],
            tf.as_dtype(dtype),
        )

    return loss


def py_function(y_true, y_pred):
    return tf.py_function(
        lambda a, b: tf.reduce_mean(tf.square(a - b)),
        [y_true, y_pred],
        tf.float32,
    )


class ProgramModel(keras_vo.VOSequential):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        return program("float32")(y, y_pred)


@pytest.mark.parametrize("name", ["float64", "py_function", "compute_loss"])
def test_a_loss_of_another_program_has_no_static_shape(name):
    cls = ProgramModel if name == "compute_loss" else keras_vo.VOSequential
    loss = {
        "py_function": py_function,
        "float64": program("float64"),
    }.get(name)
    np.testing.assert_allclose(trained(loss, cls=cls), twin(), atol=1e-5)


@pytest.mark.parametrize("name", ["compile", "compute_loss"])
def test_validation_with_a_loss_of_another_program(name):
    layers = [keras.Input((4,)), keras.layers.Dense(4)]
    cls = ProgramModel if name == "compute_loss" else keras_vo.VOSequential
    model = cls(layers)
    model.compile(
        optimizer=models.make_optimizer(),
        loss=py_function if name == "compile" else None,
    )
    x, _ = models.make_data()
    history = models.fit(model, x, x, validation_data=(x, x), epochs=1)
    loss = model.evaluate(x, x, verbose=0)
    np.testing.assert_allclose(history["val_loss"][-1], loss, rtol=1e-5)
    np.testing.assert_allclose(loss, np.mean((model(x) - x) ** 2), rtol=1e-5)


@pytest.mark.parametrize("cls", [ProgramModel, keras_vo.VOSequential])
def test_a_program_that_returns_more_than_a_number(cls, monkeypatch):
    def losses(y_true, y_pred):
        return tf.numpy_function(
            lambda a, b: np.mean((a - b) ** 2, axis=-1),
            [y_true, y_pred],
            tf.float32,
        )

    monkeypatch.setattr(
        ProgramModel,
        "compute_loss",
        lambda self, x=None, y=None, y_pred=None, sample_weight=None: losses(
            y, y_pred
        ),
    )
    with pytest.raises(
        tf.errors.InvalidArgumentError, match="unknown_shape_must_be_a_scalar"
    ):
        trained(losses, cls=cls)
