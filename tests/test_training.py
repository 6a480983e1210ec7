"""`fit` with a VOOptimizer: what Keras users expect of every option."""

import functools

import keras
import models
import numpy as np
import pytest
import tensorflow as tf
from packaging.version import Version

import keras_vo


def assert_same_weights(first, second, **tolerance):
    np.testing.assert_allclose(
        models.weights(first), models.weights(second), **tolerance
    )


@functools.cache
def weights_of_a_fit():
    """What `fit`, as it is by default, makes of the default model."""
    model = models.make_model()
    models.fit(model)
    return models.weights(model)


def assert_same_fit(model, **tolerance):
    np.testing.assert_allclose(
        models.weights(model), weights_of_a_fit(), **tolerance
    )


# --- the log ---


def plain_twin(model, **compiling):
    """A model of Keras's own with the same layers and weights."""
    plain = keras.Sequential.from_config(model.get_config())
    plain.set_weights(model.get_weights())
    compiling.setdefault("loss", "sparse_categorical_crossentropy")
    plain.compile(optimizer="sgd", **compiling)
    return plain


def test_the_log_is_of_the_mean_network_and_of_its_population():
    x, y = models.make_data(8)
    spy = models.LossSpy()
    model = models.make_model(
        metrics=["accuracy"],
        optimizer=models.make_optimizer(fitness_shaping=spy),
    )
    before = model.predict(x, verbose=0)
    plain = plain_twin(model)
    rewind = models.rewinder(model)
    listed = model.train_on_batch(x, y)
    rewind()
    logs = model.train_on_batch(x, y, return_dict=True)
    names = ["loss", "accuracy", "population_loss", "nonfinite_members"]
    assert set(logs) == set(names)
    assert list(map(float, listed)) == [float(logs[name]) for name in names]
    picked = before[np.arange(8), y[:, 0]]
    np.testing.assert_allclose(logs["loss"], -np.log(picked).mean(), rtol=1e-5)
    np.testing.assert_allclose(
        logs["accuracy"], (before.argmax(-1) == y[:, 0]).mean()
    )
    want = models.member_losses(plain, models.make_optimizer(), x, y)
    np.testing.assert_allclose(spy.losses, want, rtol=1e-4)
    np.testing.assert_allclose(logs["population_loss"], want.mean(), 1e-5)
    assert logs["nonfinite_members"] == 0
    assert abs(logs["population_loss"] / logs["loss"] - 1) > 1e-3


def test_history_and_evaluate_of_a_training_that_learns():
    x, y = models.make_data(96)
    model = models.make_model(metrics=["accuracy"])
    history = models.fit(
        model, x, y, epochs=15, batch_size=32, validation_data=(x, y)
    )
    assert set(history) == {
        "loss",
        "accuracy",
        "population_loss",
        "nonfinite_members",
        "val_loss",
        "val_accuracy",
    }
    assert history["accuracy"][-1] > 0.9 > history["accuracy"][0]
    assert history["population_loss"][-1] < history["population_loss"][0]
    final = model.evaluate(x, y, verbose=0, return_dict=True)
    assert set(final) == {"loss", "accuracy"}
    np.testing.assert_allclose(final["loss"], history["val_loss"][-1], 1e-5)
    listed = [final["loss"], final["accuracy"]]
    np.testing.assert_allclose(model.evaluate(x, y, verbose=0), listed, 1e-5)
    np.testing.assert_allclose(model.test_on_batch(x, y), listed, 1e-5)
    assert model.test_on_batch(x, y, return_dict=True).keys() == final.keys()


def test_the_epochs_loss_weighs_batches_by_size():
    """20 examples in batches of 8, 8 and 4, weights that hardly move."""
    x, y = models.make_data(20)
    model = models.make_model(
        optimizer=models.make_optimizer(
            inner_optimizer=keras.optimizers.SGD(1e-12)
        )
    )
    want = model.evaluate(x, y, verbose=0)
    history = models.fit(model, x, y, epochs=1)
    np.testing.assert_allclose(history["loss"][0], want, rtol=1e-5)
    split = models.fit(model, x, y, validation_split=0.5, epochs=1)
    for key, half in (
        ("loss", slice(None, 10)),
        ("val_loss", slice(10, None)),
    ):
        want = model.evaluate(x[half], y[half], verbose=0)
        np.testing.assert_allclose(split[key][0], want, rtol=1e-5)


# --- weights and losses ---


def test_weights_of_classes_and_of_examples():
    """Ranks do not see that the mean is over all eight examples."""
    x, y = models.make_data(8)
    weight = np.array([1.0, 5.0, 0.0], "float32")[y[:, 0]]
    keep = weight != 0
    assert 0 < keep.sum() < 8
    model = models.make_model(optimizer=models.make_optimizer(seed=8))
    rewind = models.rewinder(model)
    steps = []
    for examples, kwargs in (
        (slice(None), {"class_weight": {0: 1.0, 1: 5.0, 2: 0.0}}),
        (slice(None), {"sample_weight": weight}),
        (keep, {"sample_weight": weight[keep]}),
        (keep, {"sample_weight": np.ones_like(weight[keep])}),
    ):
        rewind()
        model.train_on_batch(x[examples], y[examples], **kwargs)
        steps.append(models.weights(model))
    by_class, by_sample, present, unweighted = steps
    np.testing.assert_array_equal(by_class, by_sample)
    np.testing.assert_allclose(present, by_sample, rtol=1e-5, atol=1e-6)
    assert np.any(unweighted != present)


def test_custom_loss_and_metrics_and_weights_of_examples():
    def loss(y_true, y_pred):
        del y_true
        return tf.reduce_sum(tf.square(y_pred - 0.2), -1)

    def largest(y_true, y_pred):
        del y_true
        return tf.reduce_max(y_pred, -1)

    x, y = models.make_data(8)
    weight = np.arange(8, dtype="float32")
    model = models.make_model(
        loss=loss, metrics=[largest], weighted_metrics=[largest]
    )
    before = model.predict(x, verbose=0)
    logs = model.train_on_batch(x, y, weight, return_dict=True)
    losses = ((before - 0.2) ** 2).sum(-1)
    np.testing.assert_allclose(logs["loss"], (weight * losses).mean(), 1e-5)
    plain = before.max(-1).mean()
    weighted = np.average(before.max(-1), weights=weight)
    assert abs(plain / weighted - 1) > 1e-2
    np.testing.assert_allclose(logs["largest"], plain, rtol=1e-5)
    np.testing.assert_allclose(logs["weighted_largest"], weighted, rtol=1e-5)


class OwnLoss(keras_vo.VOTrainStep, keras.Model):
    """Pulls the output towards 1; has no use for y."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(1)

    def call(self, inputs):
        return self.dense(inputs)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        assert y is None
        return tf.reduce_mean(tf.square(y_pred - 1.0)) + sum(self.losses)


class OwnLossInTraining(OwnLoss):
    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=False
    ):
        return super().compute_loss(x, y, y_pred, sample_weight) + (
            0.0 if training else 100.0
        )


def test_an_overridden_compute_loss_without_y():
    """It is told whether it is in training; test_perturbation.py: not told."""
    model = OwnLossInTraining()
    model.compile(optimizer=models.make_optimizer())
    x = models.make_data(32)[0]
    model(x)
    model.optimizer.build(model.trainable_variables)
    history = models.fit(model, x, epochs=12)
    assert history["loss"][-1] < 0.5 * history["loss"][0] < 100
    assert model.evaluate(x, verbose=0) > 100


def test_dictionaries_of_inputs_and_outputs_and_their_weights():
    """A loss of weight 0 is as good as none: same noise, same steps.

    Lists: test_per_example.py.
    """
    data, _ = models.make_data(8)
    x = {"left": data[:, :2], "right": data[:, 2:]}
    targets = {"a": data[:, :1] * 3, "b": data[:, 1:2] - 2}

    def make(cls, spy=None, **compiling):
        keras.utils.set_random_seed(2)
        inputs = {name: keras.Input((2,), name=name) for name in x}
        joined = keras.layers.Concatenate()(list(inputs.values()))
        model = cls(
            inputs, {n: keras.layers.Dense(1, name=n)(joined) for n in "ab"}
        )
        optimizer = spy and models.make_optimizer(fitness_shaping=spy)
        model.compile(optimizer=optimizer or "sgd", **compiling)
        return model

    spy = models.LossSpy()
    both = {
        "loss": {"a": "mse", "b": "mse"},
        "loss_weights": {"a": 0.0, "b": 2.0},
    }
    weighted = make(keras_vo.VOModel, spy, **both)
    before = weighted(x)
    logs = weighted.train_on_batch(x, targets, return_dict=True)
    want = models.member_losses(
        make(keras.Model, **both), models.make_optimizer(), x, targets
    )
    np.testing.assert_allclose(spy.losses, want, rtol=1e-4)
    alone = make(
        keras_vo.VOModel, models.LossSpy(), loss={"a": None, "b": "mse"}
    )
    # Keras before 3.12 takes no None among the targets.
    if Version(keras.__version__) >= Version("3.12"):
        targets = targets | {"a": None}
    alone.train_on_batch(x, targets)
    assert_same_weights(weighted, alone, rtol=1e-5, atol=1e-6)
    # Each output's own loss is that of the mean network, not of members.
    errors = {
        "a": np.mean((before["a"] - data[:, :1] * 3) ** 2),
        "b": np.mean((before["b"] - (data[:, 1:2] - 2)) ** 2),
    }
    for name, error in errors.items():
        np.testing.assert_allclose(logs[f"{name}_loss"], error, rtol=1e-5)
    np.testing.assert_allclose(logs["loss"], 2 * errors["b"], rtol=1e-5)


def test_regularizers_and_add_loss_are_those_of_the_members():
    """The only loss is weight-dependent: its mean over members is known."""

    class Penalty(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.center = self.add_weight(shape=(2,), initializer="ones")

        def call(self, inputs):
            self.add_loss(tf.reduce_sum(self.center**2))
            return inputs

    layers = [
        Penalty(),
        keras.layers.Dense(
            1, use_bias=False, kernel_regularizer=keras.regularizers.L2(0.5)
        ),
    ]
    model = models.make_model(layers, loss=None)
    twin = models.make_model(
        [Penalty(), keras.layers.Dense(1, use_bias=False)], loss="mse"
    )
    twin.set_weights(model.get_weights())
    initial = models.weights(twin)
    logs = model.train_on_batch(models.make_data(8)[0], return_dict=True)
    want = twin.optimizer.step(
        lambda w: tf.reduce_sum(w[0] ** 2) + 0.5 * tf.reduce_sum(w[1] ** 2),
        twin.trainable_variables,
    )
    np.testing.assert_allclose(logs["population_loss"], want.mean_loss, 1e-5)
    np.testing.assert_allclose(
        logs["loss"],
        (initial[:2] ** 2).sum() + 0.5 * (initial[2:] ** 2).sum(),
        rtol=1e-5,
    )
    assert_same_weights(model, twin, rtol=1e-5)


# --- data ---


def test_sources_of_data():
    x, y = models.make_data()
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)

    def generator():
        for _ in range(2):
            yield from ((x[i : i + 8], y[i : i + 8]) for i in (0, 8, 16))

    class Sequence(keras.utils.PyDataset):
        def __len__(self):
            return 3

        def __getitem__(self, i):
            return x[8 * i : 8 * i + 8], y[8 * i : 8 * i + 8]

    model = models.make_model()
    rewind = models.rewinder(model)
    for data, more in (
        (dataset, {}),
        (generator(), {"steps_per_epoch": 3}),
        (Sequence(), {}),
    ):
        models.fit(model, data, batch_size=None, **more)
        assert_same_fit(model, rtol=1e-6)
        rewind()
    for batch in generator():
        model.train_on_batch(*batch)
    assert_same_fit(model, rtol=1e-6)


# --- ways to run ---


@pytest.mark.parametrize(
    "option, tolerance",
    [
        ({"steps_per_execution": 3}, {"rtol": 0}),
        # The noise is the same; sums may be rounded otherwise.
        ({"run_eagerly": True}, {"rtol": 1e-3, "atol": 1e-5}),
        ({"jit_compile": True}, {"rtol": 1e-3, "atol": 1e-5}),
    ],
)
def test_all_ways_to_run_take_the_same_steps(option, tolerance):
    model = models.make_model(**option)
    models.fit(model)
    assert_same_fit(model, **tolerance)
    assert int(model.optimizer.generations) == 6


def test_set_random_seed_repeats_a_run():
    x, y = models.make_data()

    def make(seed, **compiling):
        keras.utils.set_random_seed(seed)
        model = keras_vo.VOSequential(
            [keras.Input((4,)), *models.make_layers()]
        )
        model.compile(
            optimizer=models.make_optimizer(seed=None),
            loss="sparse_categorical_crossentropy",
            **compiling,
        )
        return model

    def fitted(seed):
        model = make(seed)
        models.fit(model, x, y, shuffle=True)
        return models.weights(model)

    def searched(seed):  # only the search is random
        model = make(seed, run_eagerly=True)
        model.set_weights([np.ones_like(w) for w in model.get_weights()])
        model.train_on_batch(x, y)
        return models.weights(model)

    np.testing.assert_array_equal(fitted(3), fitted(3))
    assert np.all(searched(3) != searched(4))


# --- losses that are not finite ---


def nan_above(limit):
    def loss(y_true, y_pred):
        del y_true
        value = tf.reduce_mean(y_pred[:, 0])
        return tf.where(value > limit, np.nan, value)

    return loss


def test_members_with_nan_are_counted_and_trained_away_from():
    x, y = models.make_data(8)
    model = models.make_model(loss="mse")
    start = float(model.predict(x, verbose=0)[:, 0].mean())
    model.compile(
        optimizer=models.make_optimizer(), loss=nan_above(start + 1e-6)
    )
    history = models.fit(model, x, y, epochs=5)
    assert 0 < history["nonfinite_members"][0] < 8
    assert np.all(np.isfinite(history["population_loss"]))
    assert model.predict(x, verbose=0)[:, 0].mean() < start


def test_nothing_changes_without_a_finite_member():
    x, y = models.make_data(8)
    model = models.make_model(loss=nan_above(-1.0))
    model.optimizer.build(model.trainable_variables)
    before = models.search_state(model)
    history = models.fit(model, x, y, epochs=2)
    assert history["nonfinite_members"] == [8, 8]
    assert np.isnan(history["loss"][0])  # of the network itself
    after = models.search_state(model)
    changed = [
        not np.array_equal(a, b) for a, b in zip(before, after, strict=True)
    ]
    assert sum(changed) == 1  # the generation counter
    assert int(model.optimizer.iterations) == 0


def test_an_integer_loss():
    """How many outputs are positive: no float is needed, nor a slope."""

    class Count(OwnLoss):
        def compute_loss(self, x=None, y=None, y_pred=None, **kwargs):
            return tf.reduce_sum(tf.cast(y_pred > 0, tf.int32))

    model = Count()
    model.compile(optimizer=models.make_optimizer(seed=1007))
    history = models.fit(model, models.make_data(32)[0], epochs=12)
    assert history["loss"][-1] == 0 < history["loss"][0]


# --- what is not searched ---


def test_frozen_layers_are_never_perturbed():
    x, y = models.make_data()
    layers = models.make_layers()
    layers[0].trainable = False
    # A population that moved frozen weights would have other losses.
    spy = models.LossSpy()
    model = models.make_model(
        layers, optimizer=models.make_optimizer(fitness_shaping=spy)
    )
    frozen = [w.numpy() for w in layers[0].weights]
    assert len(model.optimizer.stddevs) == 2
    plain = plain_twin(model)
    assert len(plain.trainable_variables) == 2
    model.train_on_batch(x, y)
    want = models.member_losses(plain, models.make_optimizer(), x, y)
    np.testing.assert_allclose(spy.losses, want, rtol=1e-4)
    for weight, before in zip(layers[0].weights, frozen, strict=True):
        np.testing.assert_array_equal(weight, before)
