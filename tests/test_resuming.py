"""What a run that is interrupted and resumed needs to end as it would have.

The README says so: each condition is met here, and then is not.
"""

import keras
import models
import pytest
import tensorflow as tf
from test_saving import Interrupt

EPOCHS = 4


class Seeded(keras.layers.Layer):
    """Random as layers of Keras are."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seed = keras.random.SeedGenerator(0)

    def call(self, inputs):
        return inputs + keras.random.normal(tf.shape(inputs), seed=self.seed)


class Unseeded(keras.layers.Layer):
    def call(self, inputs):
        return inputs + keras.random.normal(tf.shape(inputs))


def arrays():
    return models.make_data()


def dataset(**kwargs):
    data = tf.data.Dataset.from_tensor_slices(models.make_data())
    return (data.shuffle(24, seed=3, **kwargs).batch(8),)


def in_one_order():
    return dataset(reshuffle_each_iteration=False)


def make(layer):
    keras.utils.set_random_seed(1)
    return models.make_model(
        [keras.layers.Dense(3, activation="softmax"), *layer],
        optimizer=models.make_optimizer(seed=None),
    )


def fitted(model, data, seed, *callbacks, **kwargs):
    keras.utils.set_random_seed(seed)  # that of the program
    if len(data) == 1:
        kwargs |= {"batch_size": None, "shuffle": True}
    return models.fit(
        model, *data, epochs=EPOCHS, callbacks=list(callbacks), **kwargs
    )


SHUFFLED = {"shuffle": True}


@pytest.mark.parametrize(
    "data, layer, seed, save_freq, settings, same",
    [
        (arrays, Seeded, 2, "epoch", {}, True),
        (arrays, None, 1, "epoch", SHUFFLED, True),
        (in_one_order, None, 1, "epoch", {}, True),
        (dataset, None, 1, "epoch", {}, False),
        (arrays, Unseeded, 2, "epoch", {}, False),
        (arrays, None, 1, 2, {}, False),
    ],
)
# Keras's, of a data set: it is shuffled by itself.
@pytest.mark.filterwarnings("ignore:`shuffle=True` was passed")
def test_resumed(data, layer, seed, save_freq, settings, same, tmp_path):
    """The run that is resumed has the seed `seed`, the others have 1."""
    layers = [layer()] if layer else []

    def backup():
        return keras.callbacks.BackupAndRestore(
            tmp_path / "backup", save_freq=save_freq
        )

    want = make(layers)
    fitted(want, data(), 1, **settings)
    with pytest.raises(InterruptedError):  # in the third epoch
        fitted(make(layers), data(), 1, backup(), Interrupt(), **settings)
    resumed = make(layers)
    history = fitted(resumed, data(), seed, backup(), **settings)
    assert len(history["loss"]) == EPOCHS - 2
    states = models.search_state(resumed), models.search_state(want)
    if same:
        models.assert_same_state(*states)
    else:
        with pytest.raises(AssertionError):
            models.assert_same_state(*states)
