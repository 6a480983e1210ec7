"""`population_loss` and `nonfinite_members`, whatever a model does."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from models import make_data, make_layers, make_model, make_optimizer

import keras_vo

X, Y = make_data(33)


def fit(model, **kwargs):
    """Two batches of 16."""
    settings = {"batch_size": 16, "shuffle": False, "verbose": 0} | kwargs
    return model.fit(X[:32], Y[:32], **settings).history


def test_no_finite_member_is_no_best_value():
    model = make_model(loss=lambda y, out: tf.fill(tf.shape(out)[:1], np.nan))
    history = fit(model, epochs=2)
    assert np.isnan(history["population_loss"]).all()
    assert history["nonfinite_members"] == [16, 16]  # two batches, 8 members


def test_a_batch_without_a_finite_member_is_left_out():
    def loss(y_true, y_pred):
        bad = tf.reduce_any(tf.equal(y_true, 2), axis=0)
        return tf.where(bad, np.nan, tf.ones_like(y_pred[:, 0]))

    y = np.zeros((32, 1))
    y[-1] = 2
    history = make_model(loss=loss).fit(
        X[:32], y, batch_size=16, shuffle=False, verbose=0
    )
    assert history.history["population_loss"] == [1.0]


def test_batches_count_by_their_examples():
    """A member's loss is the batch's mean label, with sigma or without."""
    y = np.arange(33.0)[:, None]
    model = make_model(
        loss=lambda y_true, y_pred: tf.reduce_mean(y_true + 0 * y_pred, -1)
    )
    history = model.fit(X, y, batch_size=16, shuffle=False, verbose=0)
    assert history.history["population_loss"][0] == pytest.approx(16.0)
    assert history.history["loss"][0] == pytest.approx(16.0)


def compiled(cls):
    keras.utils.set_random_seed(1)
    model = cls([keras.Input((4,)), *make_layers()])
    model.compile(
        optimizer=make_optimizer(), loss="sparse_categorical_crossentropy"
    )
    model.optimizer.build(model.trainable_variables)
    return model


@pytest.fixture(scope="module")
def plain():
    """What a model without metrics of its own reports: `fit`, and batches."""
    model = compiled(keras_vo.VOSequential)
    return fit(model, epochs=3), by_batches(model)


def by_batches(model):
    losses = []
    for _ in range(3):
        model.reset_metrics()
        logs = model.train_on_batch(X[:16], Y[:16], return_dict=True)
        losses.append(logs["population_loss"])
    return losses


class OwnMetrics(keras_vo.VOSequential):
    """As in Keras's guides."""

    @property
    def metrics(self):
        if not hasattr(self, "seen"):
            self.seen = keras.metrics.Mean(name="seen")
        return [self.seen]


class OwnReset(keras_vo.VOSequential):
    def reset_metrics(self):
        pass


class OwnResult(keras_vo.VOSequential):
    def get_metrics_result(self):
        return {"mine": self.metrics[0].result()}


@pytest.mark.parametrize("cls", [OwnMetrics, OwnReset, OwnResult])
def test_a_model_with_metrics_of_its_own(cls, plain):
    """The same two entries as without, anew in each epoch or batch."""
    own = compiled(cls)
    want, got = plain[0], fit(own, epochs=3)
    for name in ("population_loss", "nonfinite_members"):
        np.testing.assert_allclose(got[name], want[name], rtol=1e-6)
    assert len(set(want["population_loss"])) == 3
    if cls is OwnMetrics:
        assert by_batches(own) == plain[1]


def test_evaluate_and_validation_have_neither():
    model = make_model(metrics=["accuracy"])
    history = fit(model, validation_data=(X[:16], Y[:16]))
    assert "val_loss" in history and "val_population_loss" not in history
    logs = model.evaluate(X[:16], Y[:16], return_dict=True, verbose=0)
    assert sorted(logs) == ["accuracy", "loss"]
    logs = model.train_on_batch(X[:16], Y[:16], return_dict=True)
    assert "population_loss" in logs
