"""Sparse inputs train as the dense ones that they are."""

import keras
import models
import numpy as np
import pytest
import scipy.sparse
import tensorflow as tf

import keras_vo
from keras_vo.evaluation import vectorized
from keras_vo.layers import LocalReparamDense, LowRankDense

LABELS = models.make_data()[1]


def dense_data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(24, 6)) * (rng.random((24, 6)) < 0.4)
    x[3] = 0  # a row without an entry
    return x.astype("float32")


X = dense_data()


def scipy_matrix():
    return scipy.sparse.csr_matrix(X), LABELS


def sparse_tensor():
    return tf.sparse.from_dense(X), LABELS


def in_halves():
    """Each entry is there twice, with half of it: they add up."""
    x, _ = sparse_tensor()
    order = np.arange(2 * len(x.values)) // 2
    return (
        tf.SparseTensor(
            tf.gather(x.indices, order),
            tf.gather(x.values, order) / 2,
            x.dense_shape,
        ),
        LABELS,
    )


def dataset():
    return (tf.data.Dataset.from_tensor_slices(sparse_tensor()).batch(8),)


def make(kind, sparse=None, *, variance="layerwise", stddev=0.2, **compiling):
    """A model whose inputs are sparse or not; `None`: it is not built yet."""
    keras.utils.set_random_seed(1)
    layers = [kind(5, activation="relu"), keras.layers.Dense(3, "softmax")]
    if sparse is not None:
        layers = [keras.Input((6,), sparse=sparse), *layers]
    model = keras_vo.VOSequential(layers)
    distribution = keras_vo.GaussianSearchDistribution(variance, stddev)
    model.compile(
        models.make_optimizer(distribution),
        "sparse_categorical_crossentropy",
        **compiling,
    )
    return model


def loss(model):
    """Of the model for dense inputs."""
    losses = keras.losses.sparse_categorical_crossentropy(LABELS, model(X))
    return np.mean(losses)


def trained(model, data):
    batches = {"batch_size": None} if len(data) == 1 else {}
    history = models.fit(model, *data, epochs=1, **batches)
    return history, models.weights(model)


SEPARABLE, EAGER = {"variance": "separable"}, {"run_eagerly": True}


@pytest.mark.parametrize(
    "kind, data, sparse, settings",
    [
        (keras.layers.Dense, sparse_tensor, None, {}),
        (LowRankDense, dataset, True, SEPARABLE),
        (LocalReparamDense, scipy_matrix, False, SEPARABLE),
        (LocalReparamDense, in_halves, True, EAGER),
    ],
)
def test_as_dense_inputs(kind, data, sparse, settings):
    want, want_weights = trained(
        make(kind, sparse and False, **settings | EAGER), (X, LABELS)
    )
    model = make(kind, sparse, **settings)
    before = model.get_weights()
    got, got_weights = trained(model, data())
    for name in ("loss", "population_loss"):
        np.testing.assert_allclose(got[name], want[name], rtol=1e-4)
    np.testing.assert_allclose(got_weights, want_weights, atol=1e-4)
    if before:
        assert np.any(models.weights(model) != np.concatenate(before, None))
    np.testing.assert_allclose(
        model.evaluate(*data(), verbose=0), loss(model), rtol=1e-5
    )


@pytest.mark.filterwarnings("ignore:The members' losses differ")
def test_without_noise_it_is_the_mean_network(monkeypatch):
    """Which is Dense, sparse as it is given.

    Only Dense is evaluated one member after another: TensorFlow vectorizes no
    product with sparse inputs.
    """
    announced = set()
    monkeypatch.setattr(vectorized, "_announced", announced)
    want = loss(make(keras.layers.Dense, False))
    for kind in (LowRankDense, LocalReparamDense, keras.layers.Dense):
        assert not announced
        history = models.fit(
            make(kind, True, stddev=1e-6),
            *scipy_matrix(),
            epochs=1,
            batch_size=24,
        )
        for name in ("loss", "population_loss"):
            np.testing.assert_allclose(history[name], [want], rtol=1e-5)
    assert len(announced) == 1


def test_sparse_and_dense_inputs_of_a_converted_model():
    """The first of a model's inputs says how many examples there are."""

    def fitted(sparse):
        keras.utils.set_random_seed(1)
        wide = keras.Input((6,), sparse=sparse)
        deep = keras.Input((4,))
        both = [keras.layers.Dense(3)(wide), keras.layers.Dense(3)(deep)]
        outputs = keras.layers.Softmax()(keras.layers.add(both))
        model = keras.Model([wide, deep], outputs)
        keras_vo.make_variational(model, dense="local_reparam")
        model.compile(
            models.make_optimizer(),
            "sparse_categorical_crossentropy",
            run_eagerly=not sparse,
        )
        x = scipy_matrix()[0] if sparse else X
        inputs = [x, models.make_data()[0]]
        history = models.fit(model, inputs, LABELS, epochs=1)
        return history["loss"], models.weights(model)

    for got, want in zip(fitted(True), fitted(False), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
