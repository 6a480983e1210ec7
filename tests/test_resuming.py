"""What a run that is interrupted and resumed needs to end as it would have.

The README says so: each condition is met here, and then is not.
"""

import keras
import models
import pytest
import tensorflow as tf
import test_saving

EPOCHS = 4


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


def make(layers):
    if layers == "random":  # and schedules, EMA, batch statistics
        return test_saving.make("random", "separable")
    keras.utils.set_random_seed(1)
    layers = [Unseeded()] if layers == "unseeded" else []
    return models.make_model(
        [keras.layers.Dense(3, activation="softmax"), *layers],
        optimizer=models.make_optimizer(seed=None),
    )


class Interrupt(keras.callbacks.Callback):
    """In the middle of the third epoch, which has to be begun again."""

    def __init__(self):
        super().__init__()
        self.batches = 0

    def on_train_batch_end(self, batch, logs=None):
        self.batches += 1
        if self.batches == 8:
            raise InterruptedError


def fitted(model, data, seed, *callbacks, **kwargs):
    keras.utils.set_random_seed(seed)  # that of the program
    if len(data) == 1:
        kwargs |= {"batch_size": None, "shuffle": True}
    return models.fit(
        model, *data, epochs=EPOCHS, callbacks=list(callbacks), **kwargs
    )


SHUFFLED = {"shuffle": True}


@pytest.mark.parametrize(
    "data, layers, seed, save_freq, settings, same",
    [
        (arrays, "random", 2, "epoch", {}, True),
        (arrays, None, 1, "epoch", SHUFFLED, True),
        (in_one_order, None, 1, "epoch", {}, True),
        (dataset, None, 1, "epoch", {}, False),
        (arrays, "unseeded", 2, "epoch", {}, False),
        (arrays, None, 1, 2, {}, False),
    ],
)
# Keras's, of a data set: it is shuffled by itself.
@pytest.mark.filterwarnings("ignore:`shuffle=True` was passed")
def test_resumed(data, layers, seed, save_freq, settings, same, tmp_path):
    """The run that is resumed has the seed `seed`, the others have 1.

    All three are of one model, which is put back to its start: TensorFlow
    traces a step once. Not so where the trace has the state of the seed.
    """

    def backup():
        return keras.callbacks.BackupAndRestore(
            tmp_path / "backup", save_freq=save_freq
        )

    model = make(layers)
    rewind = models.rewinder(model)

    def begun():
        if layers == "unseeded":
            return make(layers)
        rewind()
        return model

    want = begun()
    fitted(want, data(), 1, **settings)
    want = models.search_state(want)
    with pytest.raises(InterruptedError):  # in the third epoch
        fitted(begun(), data(), 1, backup(), Interrupt(), **settings)
    resumed = begun()
    history = fitted(resumed, data(), seed, backup(), **settings)
    assert len(history["loss"]) == EPOCHS - 2
    states = models.search_state(resumed), want
    if same:
        models.assert_same_state(*states)
    else:
        with pytest.raises(AssertionError):
            models.assert_same_state(*states)
