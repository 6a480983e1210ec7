"""The scopes that layers are perturbed in."""

import threading

import keras
import models
import numpy as np
import pytest
import tensorflow as tf

import keras_vo
from keras_vo.layers import LocalReparamDense, LowRankDense
from keras_vo.perturbations import graph_ops, scope
from keras_vo.search import local_reparameterization


def test_a_scope_is_of_its_thread_and_ends_with_its_block():
    outer, inner = (scope.Recording([]) for _ in range(2))
    seen = []
    with scope.entered(outer):
        with scope.entered(inner):
            assert scope.current_scope() is inner
        thread = threading.Thread(
            target=lambda: seen.append(scope.current_scope())
        )
        thread.start()
        thread.join()
        with pytest.raises(RuntimeError), scope.entered(inner):
            raise RuntimeError
        assert scope.current_scope() is outer
    assert scope.current_scope() is None and seen == [None]


def test_a_layer_outside_of_the_search_is_not_recorded():
    layer = LocalReparamDense(2)
    layer.build((None, 3))
    recording = scope.Recording([])
    with scope.entered(recording):
        layer(np.ones([4, 3]))
    assert not recording.claims
    recording = scope.Recording(layer.trainable_variables)
    with scope.entered(recording):
        layer(np.ones([4, 3]))
    (claims,) = recording.claims.values()
    assert [claim.call.name for claim in claims] == [layer.name]
    assert list(recording.claims) == [layer.perturbation]


class CallsTwice(keras.layers.Layer):
    """Calls its layer a second time in every pass but the first."""

    def __init__(self, first, later):
        super().__init__()
        self.dense = LocalReparamDense(4)
        self.left = [first]
        self.later = later

    def build(self, input_shape):
        self.dense.build(input_shape)

    def call(self, inputs):
        for _ in range(self.left.pop() if self.left else self.later):
            inputs = self.dense(inputs)
        return inputs


@pytest.mark.parametrize("first, later", [(1, 2), (2, 1)])
def test_other_calls_than_those_of_the_mean_network(first, later):
    model = keras_vo.VOSequential([CallsTwice(first, later)])
    model.build((None, 4))
    model.compile(
        optimizer=models.make_optimizer(), loss="mse", run_eagerly=True
    )
    model.optimizer.build(model.trainable_variables)
    model.layers[0].left = [first]
    x, _ = models.make_data()
    with pytest.raises(ValueError, match="as often, and in the same"):
        model.train_on_batch(x, x)


@pytest.mark.parametrize("variance", ["layerwise", "separable"])
def test_a_layer_that_is_called_twice(variance):
    """Each call has noise of its own; the gradients add up.

    They are those of two layers of equal weights, which have the same noise.
    """

    def changes(twice):
        inputs = keras.Input((4,))
        keras.utils.set_random_seed(0)
        first, other = (
            LocalReparamDense(4, activation="tanh", name=n) for n in "ab"
        )
        second = first if twice else other
        model = keras_vo.VOModel(inputs, second(first(inputs)))
        second.set_weights(first.get_weights())
        optimizer = models.make_optimizer(
            variance, inner_optimizer=keras.optimizers.SGD(1.0)
        )
        model.compile(optimizer=optimizer, loss="mse", run_eagerly=True)
        start = models.weights(model)
        x, _ = models.make_data()
        model.train_on_batch(x, np.tanh(x))
        return models.weights(model) - start

    one, two = changes(True), changes(False)
    np.testing.assert_allclose(
        one, two[: len(one)] + two[len(one) :], rtol=1e-4, atol=1e-6
    )
    assert np.abs(one).max() > 1e-4


def test_one_kernel_of_two_kinds():
    local, low_rank = LocalReparamDense(4), LowRankDense(4)
    for layer in (local, low_rank):
        layer.build((None, 4))
    low_rank.__dict__["_kernel"] = local._kernel
    model = keras_vo.VOSequential([keras.Input((4,)), local, low_rank])
    model.compile(optimizer=models.make_optimizer(), loss="mse")
    x, _ = models.make_data()
    with pytest.raises(ValueError, match="one kind of noise"):
        model.train_on_batch(x, x)


def test_what_does_not_depend_on_the_noise_is_taken_once():
    """The first layer's A and v; with a random layer before it, not."""

    @tf.function
    def run(noise, x):
        seen.append(graph_ops.depends(x * 2.0, [noise]))
        seen.append(graph_ops.depends(x * noise, [noise]))
        random = tf.random.stateless_uniform([2], [1, 2])
        seen.append(graph_ops.depends(x + random, [noise]))
        return x

    seen = []
    run(tf.ones([2]), tf.ones([2]))
    assert seen == [False, True, True]


def test_the_first_layers_moments_are_computed_once(monkeypatch):
    """A second layer's, whose inputs are perturbed, for both signs besides."""
    kernels = []
    variance = local_reparameterization.ActivationNoise.variance_of

    def counted(self, inputs):
        kernels.append(inputs.shape[-1])
        return variance(self, inputs)

    monkeypatch.setattr(
        local_reparameterization.ActivationNoise, "variance_of", counted
    )
    model = models.make_model(
        [LocalReparamDense(5, activation="relu"), LocalReparamDense(3)]
    )
    model.train_on_batch(*models.make_data())
    # Each trace: a mean network, and two members of it.
    assert kernels.count(5) == 3 * kernels.count(4) > 0


class Maps(keras.layers.Layer):
    """Calls its layer for one row after another, vectorized."""

    def __init__(self):
        super().__init__()
        self.dense = LocalReparamDense(2)

    def build(self, input_shape):
        self.dense.build((None, 4))

    def call(self, inputs):
        return tf.vectorized_map(lambda row: self.dense(row[None])[0], inputs)

    def compute_output_shape(self, shape):
        return (*shape[:-1], 2)


def test_a_call_in_a_vectorized_loop():
    model = models.make_model([Maps()], loss="mse")
    x, _ = models.make_data()
    with pytest.raises(ValueError, match="is called in a loop"):
        model.train_on_batch(x, x[:, :2])


class Autoencoder(keras_vo.VOTrainStep, keras.Model):
    """Decodes in its loss."""

    def __init__(self, decoder):
        super().__init__()
        self.encoder = LowRankDense(2)
        self.decoder = decoder
        self.decoder.build((None, 2))

    def call(self, inputs):
        return self.encoder(inputs)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        return tf.reduce_mean(tf.square(self.decoder(y_pred) - x))


def test_layers_that_only_the_loss_calls():
    """The step is that of a model which calls both layers."""
    x, _ = models.make_data()
    keras.utils.set_random_seed(0)
    model = Autoencoder(LowRankDense(4))
    model.compile(optimizer=models.make_optimizer())
    model(x)
    both = keras_vo.VOSequential(
        [keras.Input((4,)), LowRankDense(2), LowRankDense(4)]
    )
    both.compile(
        optimizer=models.make_optimizer(), loss="mse", run_eagerly=True
    )
    start = dict(
        zip(
            (id(w) for w in (*model.encoder.weights, *model.decoder.weights)),
            both.get_weights(),
            strict=True,
        )
    )
    for weight in model.weights:
        weight.assign(start[id(weight)])
    model.train_on_batch(x)
    both.train_on_batch(x, x)
    moved = [*model.encoder.get_weights(), *model.decoder.get_weights()]
    for got, want, before in zip(
        moved, both.get_weights(), start.values(), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
        assert np.any(got != before)
    model = Autoencoder(LocalReparamDense(4))
    model.compile(optimizer=models.make_optimizer())
    with pytest.raises(ValueError, match="call by `compute_loss`"):
        model.train_on_batch(x)
