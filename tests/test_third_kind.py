"""A further kind of perturbation, from the public protocol alone.

Signs +-1 in the place of normals: w = mu + sigma s with s = sign(z). Then
E[s] = 0 and E[s^2] = 1, so that 1/N sum u_n s_n / sigma is the gradient of the
mean up to terms of third order. |s|^2 = D always: sigma can't be learned.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from models import make_data, mirrored, weights

import keras_vo
from keras_vo.layers import PerturbedDense
from keras_vo.perturbations.base import Perturbation, VariableGradient
from keras_vo.perturbations.registry import get, register
from keras_vo.search.estimators import pair_utilities

X, Y = make_data()


@register
class Signs(Perturbation):
    name = "signs"

    def __init__(self, claims, space):
        gaussian = space.gaussian
        self.variables = [space.positions[id(c.kernel)] for c in claims]
        self._means = [gaussian.means[i] for i in self.variables]
        self._stddevs = [gaussian.stddevs[i] for i in self.variables]
        self._sizes = [m.shape.num_elements() for m in self._means]
        self.noise_size = sum(self._sizes)

    def _signs(self, noise):
        return tf.split(tf.sign(noise.weights), self._sizes, axis=-1)

    def member(self, noise, sign):
        perturbed = [
            mean + sign * stddev * tf.reshape(signs, mean.shape)
            for mean, stddev, signs in zip(
                self._means, self._stddevs, self._signs(noise), strict=True
            )
        ]
        return dict(zip(self.variables, perturbed, strict=True)), None

    def sums(self, noise, records, rows):
        odd, _ = pair_utilities(rows.utilities)
        return {
            f"mean/{i}": tf.linalg.matvec(signs, odd, transpose_a=True)
            for i, signs in zip(self.variables, self._signs(noise), strict=True)
        }

    def gradient(self, sums, count):
        for i, stddev in zip(self.variables, self._stddevs, strict=True):
            total = tf.reshape(sums[f"mean/{i}"], stddev.shape)
            yield VariableGradient(i, total / (count * stddev), None, 0.5)


@keras.saving.register_keras_serializable("test_third_kind")
class SignDense(PerturbedDense):
    perturbation = "signs"


def make(layer=SignDense, **kwargs):
    keras.utils.set_random_seed(1)
    model = keras_vo.VOSequential(
        [
            keras.Input((4,)),
            layer(6, activation="relu"),
            layer(3, activation="softmax"),
        ]
    )
    optimizer = keras_vo.VOOptimizer(
        keras.optimizers.Adam(0.05),
        population_size=32,
        search_distribution=keras_vo.GaussianSearchDistribution(
            "fixed", stddev=0.1
        ),
        seed=3,
        **kwargs,
    )
    model.compile(optimizer=optimizer, loss="sparse_categorical_crossentropy")
    return model


def fit(model, epochs=2):
    history = model.fit(
        X, Y, batch_size=12, epochs=epochs, shuffle=False, verbose=0
    )
    return history.history


def test_chunks_and_replicas_make_no_difference_and_it_trains():
    """Three separable classes: chance is a loss of 1.1."""
    model = make(chunk_size=6, memory_budget=1)
    first = fit(model)["loss"][0]
    whole = make()
    whole.run_eagerly = True
    fit(whole)
    strategy = mirrored(2)
    with strategy.scope():
        two = make(exchange="gradient")
    batches = tf.data.Dataset.from_tensor_slices((X, Y)).batch(12)
    twice = batches.flat_map(
        lambda *batch: tf.data.Dataset.from_tensors(batch).repeat(2)
    )
    data = strategy.distribute_datasets_from_function(lambda _: twice.repeat())
    two.fit(data, epochs=2, steps_per_epoch=2, verbose=0, shuffle=False)
    for other in (whole, two):
        np.testing.assert_allclose(weights(other), weights(model), rtol=1e-4)
    last = fit(model, epochs=38)["loss"][-1]
    assert first > 0.5 and last < 0.2


def test_members_weights_are_one_sigma_away():
    seen = []

    def loss(y_true, y_pred):
        return tf.reduce_mean(y_pred, axis=-1)

    model = make()
    model.compile(optimizer=model.optimizer, loss=loss, run_eagerly=True)
    means = [w.numpy() for w in model.trainable_weights]

    class Spy(SignDense):
        def call(self, inputs, training=None):
            seen.append(tf.convert_to_tensor(self.kernel).numpy())
            return super().call(inputs, training)

    for layer in model.layers:
        layer.__class__ = Spy
    model.train_on_batch(X[:4], Y[:4])
    away = [
        np.abs(kernel - mean)
        for kernel, mean in zip(seen[-2:], means[::2], strict=True)
    ]
    for distance in away:
        np.testing.assert_allclose(distance, 0.1, rtol=1e-5)


def test_a_name_has_one_kind():
    with pytest.raises(ValueError, match="no kind of perturbation has yet"):

        @register
        class Other(Perturbation):
            name = "signs"

    with pytest.raises(ValueError, match="'full'.*Received: 'sings'"):
        get("sings")
