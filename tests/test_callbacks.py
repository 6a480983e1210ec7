"""Keras callbacks around a VO model."""

import csv

import keras
import models
import numpy as np


class EpochWeights(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.seen = []

    def on_epoch_end(self, epoch, logs=None):
        self.seen.append(models.weights(self.model))


def test_early_stopping_restores_the_best_weights():
    x, y = models.make_data()
    model = models.make_model(
        optimizer=models.make_optimizer(
            inner_optimizer=keras.optimizers.SGD(30.0)  # runs away
        )
    )
    stop = keras.callbacks.EarlyStopping(
        "population_loss", patience=2, mode="min", restore_best_weights=True
    )
    spy = EpochWeights()
    history = models.fit(model, x, y, epochs=40, callbacks=[spy, stop])
    losses = history["population_loss"]
    best = int(np.argmin(losses))
    assert len(losses) == best + 3 < 40
    np.testing.assert_array_equal(models.weights(model), spy.seen[best])
    assert np.any(spy.seen[best] != spy.seen[-1])


def test_callbacks_that_write_or_set_the_learning_rate(tmp_path):
    """Keras's monitors, files and rates are those of the search."""
    model = models.make_model()
    history = models.fit(
        model,
        epochs=4,
        callbacks=[
            keras.callbacks.ReduceLROnPlateau(
                "loss", factor=0.5, patience=1, min_delta=1e9, min_lr=0.0
            ),
            keras.callbacks.CSVLogger(tmp_path / "log.csv"),
            keras.callbacks.TensorBoard(tmp_path, write_graph=False),
            keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras"),
            keras.callbacks.ModelCheckpoint(
                tmp_path / "{epoch}.weights.h5", save_weights_only=True
            ),
        ],
    )
    np.testing.assert_allclose(
        history["learning_rate"], [0.05, 0.05, 0.025, 0.0125], rtol=1e-6
    )
    inner = model.optimizer.inner_optimizer
    assert float(inner.learning_rate) < 0.0126

    with (tmp_path / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    (events,) = (tmp_path / "train").glob("events*")
    for key in ("loss", "population_loss", "nonfinite_members"):
        np.testing.assert_allclose(
            [float(row[key]) for row in rows], history[key], rtol=1e-6
        )
        assert f"epoch_{key}".encode() in events.read_bytes()

    whole = keras.models.load_model(tmp_path / "4.keras")
    only_weights = models.make_model()
    only_weights.load_weights(tmp_path / "4.weights.h5")
    for copy in (whole, only_weights):
        models.assert_same_state(
            models.search_state(copy), models.search_state(model)
        )
    first = keras.models.load_model(tmp_path / "1.keras")
    assert np.any(models.weights(first) != models.weights(model))

    schedule = keras.callbacks.LearningRateScheduler(lambda e: 0.1 / (e + 1))
    models.fit(model, epochs=2, callbacks=[schedule])
    np.testing.assert_allclose(float(inner.learning_rate), 0.05, rtol=1e-6)


def test_terminate_on_nan():
    model = models.make_model(
        loss=lambda y, p: 0.0 * p[:, 0] + np.nan, run_eagerly=True
    )
    history = models.fit(
        model, epochs=5, callbacks=[keras.callbacks.TerminateOnNaN()]
    )
    assert len(history["loss"]) == 1


def test_swap_ema_weights_validates_the_average():
    """Keras's callback finds the average in the inner optimizer."""
    x, y = models.make_data()
    inner = keras.optimizers.SGD(1.0, use_ema=True, ema_momentum=0.9)
    model = models.make_model(
        optimizer=models.make_optimizer(inner_optimizer=inner)
    )
    plain, averages = [], []

    def keep(epoch, logs):
        plain.append(model.get_weights())
        values = [v for v in inner.variables if "average" in v.path]
        averages.append([v.numpy() for v in values])

    history = models.fit(
        model,
        x,
        y,
        validation_data=(x, y),
        callbacks=[
            keras.callbacks.LambdaCallback(on_epoch_end=keep),
            keras.callbacks.SwapEMAWeights(),
        ],
    )

    def loss_of(weights):
        model.set_weights(weights)
        return model.evaluate(x, y, verbose=0)

    for epoch, swapped in enumerate(history["val_loss"]):
        want = loss_of(averages[epoch])
        np.testing.assert_allclose(swapped, want, rtol=1e-4)
        assert abs(loss_of(plain[epoch]) / want - 1) > 1e-3
