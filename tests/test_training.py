"""`fit` with a VOOptimizer: what Keras users expect of every option."""

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


def trained(*data, compiling=None, **fitting):
    model = models.make_model(**(compiling or {}))
    models.fit(model, *data, **fitting)
    return model


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
    logs = model.train_on_batch(x, y, return_dict=True)
    assert set(logs) == {
        "loss",
        "accuracy",
        "population_loss",
        "nonfinite_members",
    }
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


def test_history_and_evaluate():
    x, y = models.make_data()
    model = models.make_model(metrics=["accuracy"])
    history = models.fit(model, x, y, validation_data=(x, y))
    assert set(history) == {
        "loss",
        "accuracy",
        "population_loss",
        "nonfinite_members",
        "val_loss",
        "val_accuracy",
    }
    final = model.evaluate(x, y, verbose=0, return_dict=True)
    assert set(final) == {"loss", "accuracy"}
    np.testing.assert_allclose(final["loss"], history["val_loss"][-1], 1e-5)
    listed = [final["loss"], final["accuracy"]]
    np.testing.assert_allclose(model.evaluate(x, y, verbose=0), listed, 1e-5)
    np.testing.assert_allclose(model.test_on_batch(x, y), listed, 1e-5)
    assert model.test_on_batch(x, y, return_dict=True).keys() == final.keys()


def test_train_on_batch_returns_a_list_or_a_dictionary():
    x, y = models.make_data(8)
    model = models.make_model(metrics=["accuracy"])
    rewind = models.rewinder(model)
    as_list = model.train_on_batch(x, y)
    rewind()
    as_dict = model.train_on_batch(x, y, return_dict=True)
    names = ["loss", "accuracy", "population_loss", "nonfinite_members"]
    assert list(map(float, as_list)) == [float(as_dict[n]) for n in names]


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


def test_training_learns():
    x, y = models.make_data(96)
    model = models.make_model(metrics=["accuracy"])
    history = models.fit(model, x, y, epochs=15, batch_size=32)
    assert history["accuracy"][-1] > 0.9 > history["accuracy"][0]
    assert history["population_loss"][-1] < history["population_loss"][0]


# --- weights and losses ---


def test_class_weight_is_sample_weight():
    x, y = models.make_data()
    by_class = trained(x, y, class_weight={0: 1.0, 1: 5.0, 2: 0.0})
    by_sample = trained(x, y, sample_weight=np.array([1.0, 5.0, 0.0])[y[:, 0]])
    assert_same_weights(by_class, by_sample, rtol=0)
    assert np.any(models.weights(by_class) != models.weights(trained(x, y)))


def test_examples_of_weight_zero_are_as_good_as_absent():
    """Ranks do not see that the mean is over all eight examples."""
    x, y = models.make_data(8)
    keep = np.array([0, 1, 1, 1, 0, 1, 1, 1], bool)
    assert_same_weights(
        trained(x, y, sample_weight=keep.astype("float32")),
        trained(x[keep], y[keep]),
        rtol=1e-5,
        atol=1e-6,
    )


def test_weighted_metrics():
    def largest(y_true, y_pred):
        del y_true
        return tf.reduce_max(y_pred, -1)

    x, y = models.make_data(8)
    weight = np.arange(8, dtype="float32")
    model = models.make_model(metrics=[largest], weighted_metrics=[largest])
    before = model.predict(x, verbose=0).max(-1)
    logs = model.train_on_batch(x, y, weight, return_dict=True)
    plain, weighted = before.mean(), np.average(before, weights=weight)
    assert abs(plain / weighted - 1) > 1e-2
    np.testing.assert_allclose(logs["largest"], plain, rtol=1e-5)
    np.testing.assert_allclose(logs["weighted_largest"], weighted, rtol=1e-5)


def test_custom_loss_and_metric():
    def loss(y_true, y_pred):
        del y_true
        return tf.reduce_sum(tf.square(y_pred - 0.2), -1)

    def largest(y_true, y_pred):
        del y_true
        return tf.reduce_max(y_pred, -1)

    x, y = models.make_data(8)
    model = models.make_model(loss=loss, metrics=[largest])
    before = model.predict(x, verbose=0)
    logs = model.train_on_batch(x, y, return_dict=True)
    np.testing.assert_allclose(
        logs["loss"], ((before - 0.2) ** 2).sum(-1).mean(), rtol=1e-5
    )
    np.testing.assert_allclose(
        logs["largest"], before.max(-1).mean(), rtol=1e-5
    )


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


@pytest.mark.parametrize("kind", [OwnLoss, OwnLossInTraining])
def test_an_overridden_compute_loss_without_y(kind):
    model = kind()
    model.compile(optimizer=models.make_optimizer())
    x = models.make_data(32)[0]
    model(x)
    model.optimizer.build(model.trainable_variables)
    history = models.fit(model, x, epochs=12)
    assert history["loss"][-1] < 0.5 * history["loss"][0] < 100
    if kind is OwnLossInTraining:
        assert model.evaluate(x, verbose=0) > 100


@pytest.mark.parametrize("structure", [dict, list])
def test_several_outputs_and_their_weights(structure):
    """A loss of weight 0 is as good as none: same noise, same steps."""
    x, y = models.make_data()

    def pack(a, b):
        return {"a": a, "b": b} if structure is dict else [a, b]

    def make(**compiling):
        keras.utils.set_random_seed(2)
        inputs = keras.Input((4,))
        a, b = (keras.layers.Dense(1, name=n)(inputs) for n in "ab")
        model = keras_vo.VOModel(inputs, pack(a, b))
        model.compile(optimizer=models.make_optimizer(), **compiling)
        return model

    targets = pack(x[:, :1] * 3, x[:, 1:2] - 2)
    both = pack("mse", "mse")
    weighted = make(loss=both, loss_weights=pack(0.0, 2.0))
    history = models.fit(weighted, x, targets)
    alone = make(loss=pack(None, "mse"))
    # Keras before 3.12 takes no None among the targets.
    unused = x[:, :1] if Version(keras.__version__) < Version("3.12") else None
    models.fit(alone, x, pack(unused, x[:, 1:2] - 2))
    assert_same_weights(weighted, alone, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        history["loss"], 2 * np.array(history["b_loss"]), rtol=1e-5
    )
    # Each output's own loss is that of the mean network, not of members.
    fresh = make(loss=both)
    before = fresh.predict(x[:8], verbose=0)
    first = pack(x[:8, :1] * 3, x[:8, 1:2] - 2)
    logs = fresh.train_on_batch(x[:8], first, return_dict=True)
    for name, got, want in zip(
        "ab", keras.tree.flatten(before), keras.tree.flatten(first), strict=True
    ):
        np.testing.assert_allclose(
            logs[f"{name}_loss"], ((got - want) ** 2).mean(), 1e-5
        )


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
    want = trained(x, y)
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)

    def generator():
        for _ in range(2):
            yield from ((x[i : i + 8], y[i : i + 8]) for i in (0, 8, 16))

    class Sequence(keras.utils.PyDataset):
        def __len__(self):
            return 3

        def __getitem__(self, i):
            return x[8 * i : 8 * i + 8], y[8 * i : 8 * i + 8]

    for data, more in (
        (dataset, {}),
        (generator(), {"steps_per_epoch": 3}),
        (Sequence(), {}),
    ):
        model = models.make_model()
        models.fit(model, data, batch_size=None, **more)
        assert_same_weights(model, want, rtol=1e-6)


def test_dictionary_inputs():
    x, _ = models.make_data()
    inputs = {name: keras.Input((2,), name=name) for name in "ab"}
    joined = keras.layers.Concatenate()([inputs["a"], inputs["b"]])
    model = keras_vo.VOModel(inputs, keras.layers.Dense(1)(joined))
    model.compile(optimizer=models.make_optimizer(), loss="mse")
    model.optimizer.build(model.trainable_variables)
    history = models.fit(
        model, {"a": x[:, :2], "b": x[:, 2:]}, x[:, :1], epochs=30
    )
    # Seeds 0 to 5 gave .003 at most; a constant has a third of it.
    assert history["loss"][-1] < 0.05 * history["loss"][0]


# --- ways to run ---


def test_steps_per_execution():
    several = trained(compiling={"steps_per_execution": 3})
    assert_same_weights(several, trained(), rtol=0)
    assert int(several.optimizer.generations) == 6


@pytest.mark.parametrize("option", ["run_eagerly", "jit_compile"])
def test_eager_and_xla_take_the_same_steps(option):
    """The noise is the same; sums may be rounded otherwise."""
    assert_same_weights(
        trained(compiling={option: True}), trained(), rtol=1e-3, atol=1e-5
    )


def test_batch_by_batch():
    x, y = models.make_data()
    model = models.make_model()
    for _ in range(2):
        for i in (0, 8, 16):
            model.train_on_batch(x[i : i + 8], y[i : i + 8])
    assert_same_weights(model, trained(x, y), rtol=1e-6)


def test_set_random_seed_repeats_a_run():
    x, y = models.make_data()

    def run(seed, **fitting):
        keras.utils.set_random_seed(seed)
        model = keras_vo.VOSequential(
            [keras.Input((4,)), *models.make_layers()]
        )
        model.compile(
            optimizer=models.make_optimizer(seed=None),
            loss="sparse_categorical_crossentropy",
        )
        if not fitting["shuffle"]:  # then only the search is random
            model.set_weights([np.ones_like(w) for w in model.get_weights()])
        models.fit(model, x, y, **fitting)
        return models.weights(model)

    np.testing.assert_array_equal(run(3, shuffle=True), run(3, shuffle=True))
    assert np.all(run(3, shuffle=False) != run(4, shuffle=False))


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
    model.compile(optimizer=models.make_optimizer())
    history = models.fit(model, models.make_data(32)[0], epochs=12)
    assert history["loss"][-1] == 0 < history["loss"][0]


# --- what is not searched ---


def test_frozen_layers_are_never_perturbed():
    x, y = models.make_data()
    layers = models.make_layers()
    layers[0].trainable = False
    model = models.make_model(layers)
    frozen = [w.numpy() for w in layers[0].weights]
    models.fit(model, x, y)
    for weight, before in zip(layers[0].weights, frozen, strict=True):
        np.testing.assert_array_equal(weight, before)
    assert len(model.optimizer.stddevs) == 2
    # A population that moved frozen weights would have other losses.
    spy = models.LossSpy()
    model.compile(
        optimizer=models.make_optimizer(fitness_shaping=spy),
        loss="sparse_categorical_crossentropy",
    )
    plain = plain_twin(model)
    assert len(plain.trainable_variables) == 2
    model.train_on_batch(x, y)
    want = models.member_losses(plain, models.make_optimizer(), x, y)
    np.testing.assert_allclose(spy.losses, want, rtol=1e-4)
