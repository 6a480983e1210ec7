"""The scopes that layers are perturbed in."""

import threading

import keras
import models
import numpy as np
import pytest
import tensorflow as tf

import keras_vo
from keras_vo import perturbation
from keras_vo.layers import LocalReparamDense, LowRankDense


def test_a_scope_is_of_its_thread_and_ends_with_its_block():
    outer, inner = (perturbation.Recording([]) for _ in range(2))
    seen = []
    with perturbation.entered(outer):
        with perturbation.entered(inner):
            assert perturbation.current_scope() is inner
        thread = threading.Thread(
            target=lambda: seen.append(perturbation.current_scope())
        )
        thread.start()
        thread.join()
        with pytest.raises(RuntimeError), perturbation.entered(inner):
            raise RuntimeError
        assert perturbation.current_scope() is outer
    assert perturbation.current_scope() is None and seen == [None]


def test_a_layer_outside_of_the_search_is_not_recorded():
    layer = LocalReparamDense(2)
    layer.build((None, 3))
    recording = perturbation.Recording([])
    with perturbation.entered(recording):
        layer(np.ones([4, 3]))
    assert not recording.sites
    recording = perturbation.Recording(layer.trainable_variables)
    with perturbation.entered(recording):
        layer(np.ones([4, 3]))
    assert [site.name for site in recording.sites] == [layer.name]


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


def test_a_layer_that_is_called_twice():
    """Each call has noise of its own; the gradients add up."""
    inputs = keras.Input((4,))
    keras.utils.set_random_seed(0)
    layer = LocalReparamDense(4, activation="tanh")
    model = keras_vo.VOModel(inputs, layer(layer(inputs)))
    model.compile(optimizer=models.make_optimizer(), loss="mse")
    x, _ = models.make_data()
    history = models.fit(model, x, np.tanh(x), epochs=15)
    assert history["loss"][-1] < 0.7 * history["loss"][0]


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
        seen.append(perturbation._depends(x * 2.0, [noise]))
        seen.append(perturbation._depends(x * noise, [noise]))
        random = tf.random.stateless_uniform([2], [1, 2])
        seen.append(perturbation._depends(x + random, [noise]))
        return x

    seen = []
    run(tf.ones([2]), tf.ones([2]))
    assert seen == [False, True, True]
