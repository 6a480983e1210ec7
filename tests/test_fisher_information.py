"""Natural steps of log sigma^2 under local noise; test_conformance.py: all."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_vo
from keras_vo.layers import LocalReparamDense


def natural_step(layer, structure, fan_in, units=1, bias=False, inputs=None):
    """-d log sigma^2 / learning rate of a layer whose loss is |outputs|^2.

    Its weights are 0. Utilities have one scale.
    """
    model = keras_vo.VOSequential(
        [
            keras.Input((fan_in,)),
            layer(units, kernel_initializer="zeros", use_bias=bias),
        ]
    )
    distribution = keras_vo.GaussianSearchDistribution(
        structure, stddev=0.1, learning_rate=0.1, follow_mean=False
    )
    model.compile(
        optimizer=keras_vo.VOOptimizer(
            keras.optimizers.SGD(0.0),
            examples_population_size=2000,
            seed=0,
            fitness_shaping="standardize",
            search_distribution=distribution,
        ),
        loss=lambda y_true, y_pred: tf.reduce_sum(y_pred**2, -1),
    )
    if inputs is None:
        inputs = np.ones((4, fan_in))
    model.train_on_batch(inputs.astype("float32"), np.zeros((len(inputs), 1)))
    return [-2 * np.log(s / 0.1) / 0.1 for s in model.optimizer.stddevs]


def test_local_noise_where_each_weight_has_its_variance():
    """A common change of all is that of one variance that all share.

    Both see the same noise: the steps agree but for rounding. An information
    of 1/2 for each weight makes them smaller by the fan in of 64.
    """
    (shared,) = natural_step(LocalReparamDense, "layerwise", 64)
    (own,) = natural_step(LocalReparamDense, "separable", 64)
    # Utilities of mean square 1 over 2000 members: sqrt(2), as standardized.
    assert shared.mean() == pytest.approx(2**0.5, abs=0.2)
    np.testing.assert_allclose(own, shared, rtol=1e-3)


def test_local_noise_with_a_bias_and_several_units():
    shared = natural_step(LocalReparamDense, "layerwise", 3, units=2, bias=True)
    own = natural_step(LocalReparamDense, "separable", 3, units=2, bias=True)
    both = np.concatenate([np.ravel(s) for s in own])
    # Each unit's weights share what its output says; layerwise is their mean.
    np.testing.assert_allclose(both.mean(), np.ravel(shared[0])[0], rtol=1e-3)


def test_local_noise_of_inputs_that_differ():
    """Of two inputs an example has one: each weight has its own step, of the

    same size, however many examples it is seen by. A third is always 0.
    """
    inputs = np.repeat(np.eye(2, 3), [7, 1], axis=0)
    (own,) = natural_step(LocalReparamDense, "separable", 3, inputs=inputs)
    np.testing.assert_allclose(own[:2, 0], 2**0.5, atol=0.2)
    assert own[2, 0] == pytest.approx(0, abs=1e-4)
