"""Credit by example for losses of the whole batch."""

import functools

import keras
import models
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import keras_vo
from keras_vo.evaluation import whole_batch
from keras_vo.evaluation.whole_batch import WholeBatch

B, K = 12, 4


def predictions(seed=0, shape=(B, K)):
    rng = np.random.default_rng(seed)
    return rng.uniform(0.05, 0.95, shape)


def by_example(loss, mean, member):
    """f_b of tensors, by the code of the package, in a graph."""
    mean, member = (
        tf.nest.map_structure(tf.constant, t) for t in (mean, member)
    )
    inputs = tf.zeros([tf.nest.flatten(mean)[0].shape[0], 1])

    @functools.partial(tf.function, autograph=False)
    def found():
        return WholeBatch.of(loss, mean, inputs).by_example(loss, member)

    return found().numpy()


def replaced(loss, mean, member):
    """The same in NumPy: the definition."""
    values = []
    for b in range(len(mean)):
        rows = mean.copy()
        rows[b] = member[b]
        values.append(len(mean) * loss(rows))
    return np.array(values)


# --- the definition ---


def macro_f1(labels, scores, classes=K):
    """1 - macro F1, in NumPy."""
    predicted = scores.argmax(-1)
    values = []
    for c in range(classes):
        true, said = labels == c, predicted == c
        hits = np.sum(true & said)
        total = true.sum() + said.sum()
        values.append(2 * hits / total if total else 0.0)
    return 1 - np.mean(values)


def macro_f1_loss(y_true, y_pred):
    classes = y_pred.shape[-1]
    labels = tf.cast(tf.reshape(y_true, [-1]), tf.int32)
    true = tf.one_hot(labels, classes, dtype=y_pred.dtype)
    said = tf.one_hot(tf.argmax(y_pred, -1), classes, dtype=y_pred.dtype)
    hits = tf.reduce_sum(true * said, 0)
    total = tf.reduce_sum(true, 0) + tf.reduce_sum(said, 0)
    return 1 - tf.reduce_mean(tf.math.divide_no_nan(2 * hits, total))


def pairwise(relevance, scores):
    """The logistic loss of all ordered pairs, in NumPy."""
    s, r = scores.ravel(), relevance.ravel()
    terms = [
        np.log1p(np.exp(s[j] - s[i]))
        for i in range(len(s))
        for j in range(len(s))
        if r[i] > r[j]
    ]
    return np.sum(terms) / len(terms)


def pairwise_loss(y_true, y_pred):
    s = tf.reshape(y_pred, [-1])
    r = tf.reshape(tf.cast(y_true, s.dtype), [-1])
    ahead = tf.cast(r[:, None] > r[None, :], s.dtype)
    terms = tf.math.softplus(s[None, :] - s[:, None])
    return tf.reduce_sum(ahead * terms) / tf.reduce_sum(ahead)


@pytest.mark.parametrize("numbers", [2**18, 5 * B * K, B * K, 1])
def test_f1(numbers, monkeypatch):
    """With all examples at once, five, and one."""
    monkeypatch.setattr(whole_batch, "_NUMBERS_AT_ONCE", numbers)
    labels = np.arange(B) % K
    mean, member = predictions(0), predictions(1)
    got = by_example(
        lambda p: macro_f1_loss(tf.constant(labels), p), mean, member
    )
    want = replaced(functools.partial(macro_f1, labels), mean, member)
    np.testing.assert_allclose(got, want, rtol=1e-12)
    assert len(set(np.round(want, 6))) > 2


def test_pairwise_ranking():
    relevance = np.arange(B) % 3
    mean, member = predictions(0, (B, 1)), predictions(1, (B, 1))
    got = by_example(
        lambda p: pairwise_loss(tf.constant(relevance), p), mean, member
    )
    want = replaced(functools.partial(pairwise, relevance), mean, member)
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_second_order():
    """sum_b (f_b - B L(Y)) / B is L(Y') - L(Y) to first order: closed form.

    L = (mean_b y_b)^2, Y' = Y + d: the first is 2 y sum d / B + sum d^2 / B^2,
    the second has (sum d / B)^2: apart by terms of second order in d.
    """
    y = np.linspace(0.5, 1.5, B)[:, None]
    loss = lambda p: tf.square(tf.reduce_mean(p))  # noqa: E731
    offs = []
    for size in (0.1, 0.01):
        d = size * np.cos(np.arange(B))[:, None] + size
        got = (by_example(loss, y, y + d) - B * y.mean() ** 2).sum() / B
        first = 2 * y.mean() * d.mean() + np.sum(d**2) / B**2
        np.testing.assert_allclose(got, first, rtol=1e-9)
        offs.append(abs(got - ((y + d).mean() ** 2 - y.mean() ** 2)))
    # The size of it: quadratic in d.
    assert offs[0] / offs[1] == pytest.approx(100, rel=1e-6)
    assert offs[1] < 2e-4


LOSSES = [
    keras.losses.MeanSquaredError(),
    keras.losses.MeanAbsoluteError(),
    keras.losses.MeanAbsolutePercentageError(),
    keras.losses.MeanSquaredLogarithmicError(),
    keras.losses.Huber(),
    keras.losses.LogCosh(),
    keras.losses.CosineSimilarity(),
    keras.losses.KLDivergence(),
    keras.losses.Poisson(),
    keras.losses.Hinge(),
    keras.losses.SquaredHinge(),
    keras.losses.CategoricalHinge(),
    keras.losses.BinaryCrossentropy(),
    keras.losses.BinaryFocalCrossentropy(),
    keras.losses.CategoricalCrossentropy(),
    keras.losses.CategoricalFocalCrossentropy(),
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_losses_that_are_means(loss):
    """f_b less what it is at the mean is the example's own, exactly."""
    rng = np.random.default_rng(2)
    y = np.eye(K)[rng.integers(0, K, B)]
    mean, member = predictions(0), predictions(1)
    keras.config.set_floatx("float64")
    loss = type(loss).from_config(loss.get_config() | {"dtype": "float64"})
    got = by_example(lambda p: loss(tf.constant(y), p), mean, member)
    got = got - B * float(loss(y, mean))
    loss.reduction = None
    want = np.array(loss(y, member)) - np.array(loss(y, mean))
    np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-9)


# --- training ---


def make(loss, outputs=None, **kwargs):
    keras.utils.set_random_seed(1)
    inputs = keras.Input((4,))
    hidden = layers.Dense(6, activation="relu")(inputs)
    made = [layers.Dense(n)(hidden) for n in outputs or [3]]
    model = keras_vo.VOModel(inputs, made[0] if outputs is None else made)
    model.compile(
        optimizer=models.make_optimizer(
            perturbation="local_reparam", **kwargs.pop("optimizer", {})
        ),
        loss=loss,
        **kwargs,
    )
    return model


def losses(model, *data, **kwargs):
    history = models.fit(model, *data, **kwargs)
    assert np.all(np.isfinite(history["population_loss"]))
    return models.weights(model)


def mean_squares(y_true, y_pred):
    """Whole batch; and by example, the same."""
    return tf.reduce_mean(tf.square(y_true - y_pred))


def data(outputs=3):
    x, _ = models.make_data()
    rng = np.random.default_rng(3)
    return x, rng.normal(size=(len(x), outputs)).astype("float32")


@functools.cache
def trained(loss):
    """The weights after `fit` with this loss."""
    return losses(make(loss), *data())


@pytest.mark.parametrize(
    "option", [{}, {"run_eagerly": True}, {"jit_compile": True}]
)
def test_a_mean_is_trained_as_by_example(option):
    if option:
        whole = losses(make(mean_squares, **option), *data())
    else:
        whole = trained(mean_squares)
    np.testing.assert_allclose(whole, trained("mse"), rtol=1e-3, atol=1e-4)


class Own(keras_vo.VOModel):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        return tf.reduce_mean(tf.square(y_pred - y))


def test_a_scalar_compute_loss():
    model = make("mse")
    own = Own(model.inputs, model.outputs)
    own.compile(optimizer=models.make_optimizer(perturbation="local_reparam"))
    got = losses(own, *data())
    np.testing.assert_allclose(got, trained("mse"), rtol=1e-3, atol=1e-4)


def test_several_outputs_one_of_them_of_the_whole_batch():
    x, y = data()
    settings = {"outputs": [3, 2], "loss_weights": [0.5, 2.0]}
    mixed = make([mean_squares, "mse"], **settings)
    plain = make(["mse", "mse"], **settings, run_eagerly=True)
    targets = [y, y[:, :2]]
    got, want = (losses(m, x, targets, epochs=1) for m in (mixed, plain))
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


def test_sample_weights():
    """Keras multiplies the one number by them, and takes the mean: a factor of
    the loss, which one scale takes out again.
    """
    x, y = data()
    weights = np.full(len(x), 2.0, "float32")
    got = losses(make(mean_squares), x, y, sample_weight=weights)
    np.testing.assert_allclose(got, trained(mean_squares), rtol=1e-3, atol=1e-4)


def test_masks_of_outputs():
    """As without one: one number for all is not one for each, masked or not."""
    rng = np.random.default_rng(0)
    ids, y = rng.integers(1, 7, (24, 3)), rng.normal(size=(24, 3, 2))
    states = []
    for mask_zero in (True, False):
        keras.utils.set_random_seed(1)
        model = keras_vo.VOSequential(
            [
                keras.Input((3,)),
                layers.Embedding(7, 4, mask_zero=mask_zero),
                layers.Dense(2),
            ]
        )
        model.compile(
            optimizer=models.make_optimizer(perturbation="local_reparam"),
            loss=mean_squares,
            run_eagerly=not mask_zero,
        )
        states.append(losses(model, ids, y, epochs=1))
    np.testing.assert_allclose(*states, rtol=1e-3, atol=1e-4)


def macro_f1_of_numpy(y_true, y_pred):
    return tf.numpy_function(
        lambda y, p: np.float32(macro_f1(y.ravel().astype(int), p, 3)),
        [y_true, y_pred],
        tf.float32,
    )


def test_python_is_called_for_each_member_and_example():
    calls = []

    def counted(y, p):
        calls.append(len(p))
        return np.float32(macro_f1(y.ravel().astype(int), p, 3))

    def loss(y_true, y_pred):
        return tf.numpy_function(counted, [y_true, y_pred], tf.float32)

    x, y = models.make_data(8)
    model = make(loss, optimizer={"examples_population_size": 6})
    with pytest.warns(UserWarning, match="N times B.*Expected"):
        model.train_on_batch(x, y)
    del calls[:]
    model.train_on_batch(x, y)
    # Members and examples; each member's own; the mean's, by fit and metrics.
    assert 6 * 8 + 6 <= len(calls) <= 6 * 8 + 6 + 3
    assert set(calls) == {8}


@pytest.mark.filterwarnings("ignore:The loss calls Python")
def test_python_is_as_tensorflow():
    x, y = models.make_data()
    got = losses(make(macro_f1_of_numpy), x, y, epochs=1)
    eager = make(macro_f1_loss, run_eagerly=True)
    want = losses(eager, x, y, epochs=1)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


def test_f1_is_learned():
    """12 classes of 3; the loss is a step function of the weights."""
    x, y = models.make_data(96)
    model = make(macro_f1_loss)
    history = models.fit(model, x, y, epochs=20, batch_size=32)["loss"]
    assert history[-1] < 0.5 * history[0]


# --- what is refused ---


class AddsLoss(layers.Layer):
    def call(self, inputs):
        self.add_loss(tf.reduce_sum(inputs))
        return inputs


def test_added_losses():
    x, y = data()
    inputs = keras.Input((4,))
    model = keras_vo.VOModel(inputs, AddsLoss()(layers.Dense(3)(inputs)))
    model.compile(
        optimizer=models.make_optimizer(perturbation="local_reparam"),
        loss=mean_squares,
    )
    before = model.get_weights()
    with pytest.raises(ValueError, match="`add_loss`.*1 added"):
        models.fit(model, x, y)
    models.assert_same_state(before, model.get_weights())


def test_predictions_without_a_row_for_each_example():
    x, y = data()
    inputs = keras.Input((4,))
    outputs = layers.Lambda(lambda t: tf.reduce_mean(t, 0))(
        layers.Dense(3)(inputs)
    )
    model = keras_vo.VOModel(inputs, outputs)
    model.compile(
        optimizer=models.make_optimizer(perturbation="local_reparam"),
        loss=lambda y_true, y_pred: tf.reduce_mean(tf.square(y_pred)),
    )
    errors = (ValueError, tf.errors.InvalidArgumentError)
    with pytest.raises(errors, match="a row for each example"):
        models.fit(model, x, y)
