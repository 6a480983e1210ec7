"""`fit` with a VOOptimizer: what Keras users expect of every option."""

import keras
import models
import numpy as np
import pytest
import tensorflow as tf

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


def test_the_log_is_of_the_mean_network_and_of_its_population():
    x, y = models.make_data(8)
    model = models.make_model(metrics=["accuracy"])
    before = model.predict(x, verbose=0)
    picked = before[np.arange(8), y[:, 0]]
    logs = model.train_on_batch(x, y, return_dict=True)
    np.testing.assert_allclose(logs["loss"], -np.log(picked).mean(), rtol=1e-5)
    np.testing.assert_allclose(
        logs["accuracy"], (before.argmax(-1) == y[:, 0]).mean()
    )
    # The same population once more, from the optimizer itself.
    twin = models.make_model()
    losses = population_losses(twin, x, y)
    np.testing.assert_allclose(logs["population_loss"], losses.mean(), 1e-5)
    assert logs["nonfinite_members"] == 0 and len(logs) == 4


def population_losses(model, x, y):
    """The losses of the next generation of a model with dense layers."""

    def objective(values):
        hidden = tf.nn.relu(x @ values[0] + values[1])
        p = tf.nn.softmax(hidden @ values[2] + values[3])
        return tf.reduce_mean(
            keras.losses.sparse_categorical_crossentropy(y, p)
        )

    optimizer = model.optimizer
    return optimizer.step(objective, model.trainable_variables).losses.numpy()


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
    assert len(model.evaluate(x, y, verbose=0)) == 2
    assert len(model.test_on_batch(x, y)) == 2
    assert len(model.train_on_batch(x, y)) == 4


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
    validated = models.fit(model, x, y, validation_split=0.5, epochs=1)
    want = model.evaluate(x[10:], y[10:], verbose=0)
    np.testing.assert_allclose(validated["val_loss"][0], want, rtol=1e-5)


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
    assert_same_weights(by_class, by_sample, rtol=1e-6)
    assert np.any(models.weights(by_class) != models.weights(trained(x, y)))


def test_an_example_of_weight_zero_is_not_seen():
    x, y = models.make_data(8)
    spoiled = np.concatenate([x[:6], 100 + x[6:]])
    mask = np.array([1.0] * 6 + [0.0] * 2)
    assert_same_weights(
        trained(x, y, sample_weight=mask),
        trained(spoiled, y, sample_weight=mask),
        rtol=1e-6,
    )


def test_weighted_metrics():
    x, y = models.make_data()
    weight = (y[:, 0] == 1).astype("float32")
    model = models.make_model(
        metrics=["accuracy"], weighted_metrics=[keras.metrics.Accuracy("w")]
    )
    model.compile(
        optimizer=models.make_optimizer(
            inner_optimizer=keras.optimizers.SGD(1e-12)
        ),
        loss="sparse_categorical_crossentropy",
        weighted_metrics=["accuracy"],
    )
    history = models.fit(model, x, y, sample_weight=weight, epochs=1)
    predicted = model.predict(x, verbose=0).argmax(-1)
    want = (predicted == y[:, 0])[weight > 0].mean()
    np.testing.assert_allclose(history["accuracy"][0], want, rtol=1e-6)


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
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        return super().compute_loss(x, y, y_pred, sample_weight) + (
            0.0 if training else 100.0
        )


@pytest.mark.parametrize("kind", [OwnLoss, OwnLossInTraining])
def test_an_overridden_compute_loss_without_y(kind):
    model = kind()
    model.compile(optimizer=models.make_optimizer())
    x = models.make_data(32)[0]
    history = models.fit(model, x, epochs=12)
    assert history["loss"][-1] < 0.5 * history["loss"][0] < 100
    if kind is OwnLossInTraining:
        assert model.evaluate(x, verbose=0) > 100


@pytest.mark.parametrize(
    "loss_weights, frozen_output", [({"a": 1.0, "b": 0.0}, 1), ([0.0, 1.0], 0)]
)
def test_several_outputs_and_their_weights(loss_weights, frozen_output):
    """A weight of 0 leaves that output's own layer a random direction.

    So compare with the model that has no such output: same noise, same step.
    """
    x, y = models.make_data()
    target = {"a": x[:, :1] * 3, "b": x[:, 1:2] - 2}

    def make(**compiling):
        keras.utils.set_random_seed(2)
        inputs = keras.Input((4,))
        outputs = {
            name: keras.layers.Dense(1, name=name)(inputs) for name in "ab"
        }
        model = keras_vo.VOModel(inputs, outputs)
        model.compile(optimizer=models.make_optimizer(), **compiling)
        return model

    if isinstance(loss_weights, list):
        loss_weights = dict(zip("ab", loss_weights, strict=True))
    weighted = make(loss={"a": "mse", "b": "mse"}, loss_weights=loss_weights)
    history = models.fit(weighted, x, target)
    assert {"a_loss", "b_loss", "loss", "population_loss"} <= set(history)
    kept = "ab"[1 - frozen_output]
    np.testing.assert_allclose(
        history["loss"], history[f"{kept}_loss"], rtol=1e-5
    )
    alone = make(loss={kept: "mse"})
    models.fit(alone, x, {kept: target[kept]})
    assert_same_weights(weighted, alone, rtol=1e-5, atol=1e-6)
    # The log's own trackers saw the mean network once a batch, not members.
    both = make(loss={"a": "mse", "b": "mse"})
    before = both.predict(x[:8], verbose=0)
    logs = both.train_on_batch(
        x[:8], {k: v[:8] for k, v in target.items()}, return_dict=True
    )
    np.testing.assert_allclose(
        logs["a_loss"], ((before["a"] - target["a"][:8]) ** 2).mean(), 1e-5
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
    history = models.fit(
        model, {"a": x[:, :2], "b": x[:, 2:]}, x[:, :1], epochs=6
    )
    assert history["loss"][-1] < history["loss"][0]


# --- ways to run ---


def test_steps_per_execution():
    assert_same_weights(
        trained(compiling={"steps_per_execution": 3}), trained(), rtol=1e-6
    )


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

    def run(seed):
        keras.utils.set_random_seed(seed)
        model = keras_vo.VOSequential(models.make_layers())
        model.compile(
            optimizer=models.make_optimizer(seed=None),
            loss="sparse_categorical_crossentropy",
        )
        models.fit(model, x, y, shuffle=True)
        return models.weights(model)

    np.testing.assert_array_equal(run(3), run(3))
    assert np.all(run(3) != run(4))


@pytest.mark.parametrize("chunk_size", [2, 3])
def test_chunks_do_not_matter(chunk_size):
    chunked = trained(
        compiling={"optimizer": models.make_optimizer(chunk_size=chunk_size)}
    )
    assert_same_weights(chunked, trained(), rtol=1e-4, atol=1e-6)


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
    # A population that moved frozen weights would have another loss.
    features = keras.Sequential([keras.Input((4,)), layers[0]])
    head = models.make_model(models.make_layers()[1:], shape=(5,))
    fresh = models.make_model(models.make_layers())
    fresh.layers[0].trainable = False
    fresh.compile(
        optimizer=models.make_optimizer(),
        loss="sparse_categorical_crossentropy",
    )
    fresh.layers[0].set_weights(frozen)
    head.layers[0].set_weights(fresh.layers[1].get_weights())
    a = models.fit(fresh, x, y)["population_loss"]
    b = models.fit(head, features.predict(x, verbose=0), y)["population_loss"]
    np.testing.assert_allclose(a, b, rtol=1e-4)


# --- errors ---


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_a_plain_model_is_told_three_ways_out(policy):
    keras.config.set_dtype_policy(policy)
    model = keras.Sequential(models.make_layers())
    model.compile(optimizer=models.make_optimizer(), loss="mse")
    with pytest.raises(
        ValueError, match="VOModel.*VOSequential.*VOTrainStep.*make_variational"
    ):
        models.fit(model)


def test_another_optimizer_is_refused():
    model = models.make_model()
    model.compile(optimizer="adam", loss="mse")
    with pytest.raises(TypeError, match=r"VOOptimizer\(.*Received.*Adam"):
        models.fit(model)
    model.evaluate(*models.make_data(), verbose=0)


def test_nothing_to_train():
    model = models.make_model()
    model.trainable = False
    model.compile(optimizer=models.make_optimizer(), loss="mse")
    with pytest.raises(ValueError, match="at least one trainable weight"):
        models.fit(model)


def test_trainable_changed_after_compiling():
    model = models.make_model()
    models.fit(model)
    model.layers[0].trainable = False
    model.make_train_function(force=True)
    x, y = models.make_data(8)
    with pytest.raises(ValueError, match="compile the model with a new"):
        model.train_on_batch(x, y)


def test_a_loss_that_is_no_scalar():
    class PerExample(OwnLoss):
        def compute_loss(self, x=None, y=None, y_pred=None, **kwargs):
            return y_pred[:, 0]

    model = PerExample()
    model.compile(optimizer=models.make_optimizer())
    with pytest.raises(ValueError, match=r"scalar.*shape \(8,\)"):
        model.train_on_batch(models.make_data(8)[0])
