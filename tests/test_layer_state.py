"""What layers keep beside weights: members start from where the mean did."""

import keras
import models
import numpy as np
import pytest
import tensorflow as tf

import keras_vo
from keras_vo import layer_state


@keras.saving.register_keras_serializable("test_layer_state")
class Counter(keras.layers.Layer):
    """Adds 1 a call, and returns inputs times the count."""

    def build(self, shape):
        self.count = self.add_weight(
            shape=(), initializer="zeros", trainable=False, name="count"
        )

    def call(self, inputs):
        self.count.assign_add(1.0)
        return inputs * self.count


@keras.saving.register_keras_serializable("test_layer_state")
class RunningMean(keras.layers.Layer):
    """Subtracts a mean that it keeps, after it has seen the batch."""

    def build(self, shape):
        self.mean = self.add_weight(
            shape=shape[-1:], initializer="zeros", trainable=False, name="mean"
        )

    def call(self, inputs):
        batch = tf.reduce_mean(inputs, list(range(len(inputs.shape) - 1)))
        self.mean.assign(0.5 * self.mean + 0.5 * batch)
        return inputs - self.mean


@pytest.mark.filterwarnings("ignore:The members' losses differ")
def test_members_without_noise_lose_what_the_mean_network_loses():
    """Three steps, with sigma 1e-6 and a mean that stands still.

    Members that start from the state that the mean network leaves, in any of
    these layers, lose something else.
    """
    keras.utils.set_random_seed(1)
    rng = np.random.default_rng(0)
    model = keras_vo.VOSequential(
        [
            keras.Input(batch_shape=(4, 3, 2)),
            Counter(),
            keras.layers.LSTM(
                4, stateful=True, return_sequences=True, unroll=True
            ),
            RunningMean(),
            keras.layers.SimpleRNN(4, stateful=True),
            keras.layers.BatchNormalization(momentum=0.5),
            keras.layers.SpectralNormalization(keras.layers.Dense(4)),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(1),
        ]
    )
    model.compile(
        optimizer=keras_vo.VOOptimizer(
            keras.optimizers.SGD(0.0),
            population_size=4,
            search_distribution=keras_vo.GaussianSearchDistribution(
                "fixed", stddev=1e-6
            ),
            seed=3,
        ),
        loss="mse",
    )
    losses = []
    for _ in range(3):
        x = rng.normal(size=(4, 3, 2)).astype("float32")
        y = rng.normal(size=(4, 1)).astype("float32")
        logs = model.train_on_batch(x, y, return_dict=True)
        model.reset_metrics()
        losses.append(logs["loss"])
        np.testing.assert_allclose(
            logs["population_loss"], logs["loss"], rtol=1e-4
        )
    assert np.ptp(losses) > 1e-3


class Three:
    """Three replicas, of which this one sees the values of all."""

    index, count = 0, 3

    def sum(self, tensors):
        return [3 * tf.identity(t) for t in tensors]

    def reconstructs(self, *sizes):
        return False


def test_what_is_averaged_over_replicas():
    """Moving statistics of BatchNormalization that are not frozen, alone."""
    model = keras.Sequential(
        [
            keras.Input(batch_shape=(4, 3, 2)),
            keras.layers.BatchNormalization(),
            keras.layers.BatchNormalization(trainable=False),
            Counter(),
            keras.layers.SimpleRNN(4, stateful=True),
        ]
    )
    before = {v.path: v.numpy() for v in model.non_trainable_variables}
    assigned = []

    class Spy(Three):
        def sum(self, tensors):
            assigned.extend(tensors)
            return super().sum(tensors)

    layer_state.average_moving_statistics(model, tf.constant(4), Spy())
    assert len(assigned) == 3  # mean and variance, and the number of examples
    for variable in model.non_trainable_variables:
        np.testing.assert_array_equal(variable.numpy(), before[variable.path])


def test_a_layer_that_was_never_called_has_no_statistics():
    class Unused(keras.Model):
        def __init__(self):
            super().__init__()
            self.unused = keras.layers.BatchNormalization()

    layer_state.average_moving_statistics(Unused(), tf.constant(4), Three())


def test_states_on_replicas():
    """A counter counts steps on each. Synchronized statistics are those of

    whole batches, and no matter of the members: an all-reduce inside of their
    loop would never return, or be of members that are not the same.
    """
    strategy = models.mirrored(2)
    with strategy.scope():
        normalization = keras.layers.BatchNormalization(synchronized=True)
        counter = Counter()
        model = keras_vo.VOSequential(
            [keras.Input((2,)), normalization, counter, keras.layers.Dense(1)]
        )
        model.compile(
            optimizer=keras_vo.VOOptimizer(population_size=4, seed=0),
            loss="mse",
        )
    x = np.arange(16, dtype="float32").reshape(8, 2)
    model.fit(
        x, np.zeros((8, 1)), batch_size=4, epochs=1, shuffle=False, verbose=0
    )
    counts = strategy.experimental_local_results(counter.count.value)
    np.testing.assert_array_equal([c.numpy() for c in counts], 2)
    mean = np.zeros(2)
    for batch in (x[:4], x[4:]):
        mean = 0.99 * mean + 0.01 * batch.mean(axis=0)
    np.testing.assert_allclose(
        normalization.moving_mean.numpy(), mean, rtol=1e-4
    )
    assert normalization.synchronized
