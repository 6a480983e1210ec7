"""The generator of a search's noise: chosen, saved, gone on with.

That searches of before there was a choice go on as they did: the golden
trajectories "first-generator".
"""

import keras
import models
import numpy as np
import pytest

import keras_vo
from keras_vo.search.generators import FIRST, NEWEST

EPOCHS = 3


def make(generator=None, **kwargs):
    keras.utils.set_random_seed(1)
    optimizer = models.make_optimizer(**kwargs)
    if generator is not None:
        optimizer.noise_generator = generator
    return models.make_model(optimizer=optimizer)


def fit(model, epochs=1, *callbacks, **kwargs):
    x, y = models.make_data()
    models.fit(model, x, y, epochs=epochs, callbacks=list(callbacks), **kwargs)
    return models.search_state(model)


def test_the_newest_by_default_and_each_draws_its_own():
    model = make()
    assert model.optimizer.noise_generator == NEWEST
    newest, first = fit(model), fit(make(FIRST))
    assert np.any(newest[0] != first[0])
    models.assert_same_state(newest, fit(make(NEWEST)))


@pytest.mark.parametrize("mixing", [{}, {"importance_mixing": 0.1}])
@pytest.mark.parametrize(
    ("suffix", "trained"),
    [(".keras", False), (".weights.h5", False), (".weights.h5", True)],
)
def test_a_search_goes_on_with_its_own(tmp_path, suffix, trained, mixing):
    """Loaded into a model of the newest, whose step is traced or not."""
    if mixing:
        mixing = mixing | {"antithetic": False}
    path = tmp_path / f"model{suffix}"
    model = make(FIRST, **mixing)
    fit(model)
    (model.save if suffix == ".keras" else model.save_weights)(path)
    expected = fit(model)
    if suffix == ".keras":
        loaded = keras.saving.load_model(path)
    else:
        loaded = make(**mixing)
        if trained:
            fit(loaded)
        loaded.load_weights(path)
    assert loaded.optimizer.noise_generator == FIRST
    models.assert_same_state(fit(loaded), expected)


class Interrupt(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 1:
            raise InterruptedError


def test_a_run_that_is_restored_as_it_begins(tmp_path):
    """By then, `fit` has made the function that it calls."""

    def backup():
        return keras.callbacks.BackupAndRestore(tmp_path / "backup")

    expected = fit(make(FIRST), EPOCHS)
    with pytest.raises(InterruptedError):
        fit(make(FIRST), EPOCHS, backup(), Interrupt())
    resumed = make()
    models.assert_same_state(fit(resumed, EPOCHS, backup()), expected)
    assert resumed.optimizer.noise_generator == FIRST


def test_configs():
    """Those of files of before have no generator: theirs is the first."""
    optimizer = models.make_optimizer()
    config = optimizer.get_config()
    again = keras_vo.VOOptimizer.from_config(config)
    assert again.noise_generator == NEWEST
    optimizer.noise_generator = FIRST
    again = keras_vo.VOOptimizer.from_config(optimizer.get_config())
    assert again.noise_generator == FIRST
    del config["noise_generator"]
    assert keras_vo.VOOptimizer.from_config(config).noise_generator == FIRST
    by_hand = keras_vo.VOOptimizer.from_config({"population_size": 8})
    assert by_hand.noise_generator == NEWEST


def test_what_can_not_be():
    optimizer = models.make_optimizer()
    with pytest.raises(ValueError, match="one of.*philox.*Received: 'other'"):
        optimizer.noise_generator = "other"
    model = make()
    fit(model)
    with pytest.raises(ValueError, match="before the optimizer is built"):
        model.optimizer.noise_generator = FIRST


def test_a_search_that_does_not_fit_leaves_the_generator(tmp_path):
    path = tmp_path / "model.weights.h5"
    model = make(FIRST, search_distribution="separable")
    fit(model)
    model.save_weights(path)
    other = make()
    with pytest.warns(UserWarning, match="variance: 'separable' in the file"):
        other.load_weights(path)
    assert other.optimizer.noise_generator == NEWEST


def test_a_population_of_another_generator_is_another_one():
    """The same seeds are other members: their losses are refused."""

    def searched(generator):
        variables = models.make_model().trainable_variables
        optimizer = models.make_optimizer()
        optimizer.noise_generator = generator
        optimizer.build(variables)
        return optimizer, optimizer.ask(variables)

    (first, asked), (newest, other) = map(searched, (FIRST, NEWEST))
    assert np.any(asked[0][0] != other[0][0])
    losses = np.arange(len(asked), dtype="float32")
    with pytest.raises(ValueError, match="another"):
        newest.tell(asked, losses)
    first.tell(asked, losses)
