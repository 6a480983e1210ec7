"""What layers keep beside weights: members start from where the mean did."""

import keras
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


STATEFUL = {
    "SimpleRNN": lambda: [keras.layers.SimpleRNN(4, stateful=True)],
    "LSTM": lambda: [keras.layers.LSTM(4, stateful=True)],
    "counter": lambda: [Counter(), keras.layers.Flatten()],
    "running mean": lambda: [RunningMean(), keras.layers.Flatten()],
    "dropout": lambda: [keras.layers.Flatten(), keras.layers.Dropout(0.5)],
    "SpectralNormalization": lambda: [
        keras.layers.Flatten(),
        keras.layers.SpectralNormalization(keras.layers.Dense(4)),
    ],
    "BatchNormalization": lambda: [
        keras.layers.Flatten(),
        keras.layers.BatchNormalization(),
    ],
}


@pytest.mark.filterwarnings("ignore:The members' losses differ")
@pytest.mark.parametrize("case", STATEFUL)
def test_members_without_noise_lose_what_the_mean_network_loses(case):
    """Three steps, with sigma 1e-6 and a mean that stands still.

    Members that start from the state that the mean network leaves lose
    something else: 1.116 instead of 1.484 for the SimpleRNN, say.
    """
    keras.utils.set_random_seed(1)
    rng = np.random.default_rng(0)
    model = keras_vo.VOSequential(
        [
            keras.Input(batch_shape=(4, 3, 2)),
            *STATEFUL[case](),
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


def on_replicas(layer, steps=2):
    """A layer's state on two replicas, each of which has half of a batch."""
    strategy = tf.distribute.MirroredStrategy(
        ["CPU:0", "CPU:1"],
        cross_device_ops=tf.distribute.ReductionToOneDevice(),
    )
    with strategy.scope():
        model = keras_vo.VOSequential(
            [keras.Input((2, 2)), layer, keras.layers.Dense(1)]
        )
        model.compile(
            optimizer=keras_vo.VOOptimizer(population_size=4, seed=0),
            loss="mse",
        )
    x = np.arange(16 * steps, dtype="float32").reshape(-1, 2, 2)
    y = np.zeros((len(x), 2, 1))
    model.fit(x, y, batch_size=4, epochs=1, shuffle=False, verbose=0)
    return strategy, model


def test_a_counter_counts_steps_on_each_replica():
    strategy, model = on_replicas(Counter())
    counts = strategy.experimental_local_results(model.layers[0].count.value)
    np.testing.assert_array_equal([c.numpy() for c in counts], 2)


def test_synchronized_statistics_are_no_matter_of_the_members():
    """An all-reduce inside of the members' loop would never return, or be of

    members that are not the same. The moving mean is that of whole batches.
    """
    _, model = on_replicas(keras.layers.BatchNormalization(synchronized=True))
    x = np.arange(32, dtype="float32").reshape(2, 16 // 2, 2)
    mean = np.zeros(2)
    for batch in x:
        mean = 0.99 * mean + 0.01 * batch.mean(axis=0)
    np.testing.assert_allclose(
        model.layers[0].moving_mean.numpy(), mean, rtol=1e-4
    )
    assert model.layers[0].synchronized
