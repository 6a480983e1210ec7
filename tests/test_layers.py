"""Kinds of layers under a population: random, normalising, recurrent, ..."""

import keras
import models
import numpy as np
import pytest
import tensorflow as tf

import keras_vo
from keras_vo.search import seeds

layers = keras.layers


def sequences():
    rng = np.random.default_rng(0)
    return rng.integers(0, 6, size=(16, 5)), rng.normal(size=(16, 1))


def images():
    rng = np.random.default_rng(0)
    return rng.normal(size=(16, 6, 6, 1)).astype("float32"), rng.normal(
        size=(16, 1)
    )


def of_sequences(inputs):
    x = layers.Embedding(6, 3, mask_zero=True)(inputs)
    x = layers.Bidirectional(layers.LSTM(2, return_sequences=True))(x)
    x = layers.MultiHeadAttention(2, 2)(x, x)
    return layers.GlobalAveragePooling1D()(x)


def of_images(inputs):
    x = layers.Conv2D(2, 3, activation="relu")(inputs)
    x = layers.DepthwiseConv2D(2)(x)
    x = layers.Flatten()(layers.MaxPooling2D(2, 1)(x))
    return layers.LayerNormalization()(layers.Dense(4)(x))


# Member by member in float32, in another order of summation.
TOLERANCE = {"rtol": 1e-3, "atol": 1e-5}


@pytest.mark.parametrize(
    "data, body, option",
    [
        (sequences, of_sequences, None),
        (images, of_images, "jit_compile"),
        (images, of_images, "run_eagerly"),
    ],
)
def test_members_are_the_networks_of_their_weights(data, body, option):
    """Each member's loss is that of a plain Keras model with its weights.

    The noise is the same in a graph, under XLA and eagerly.
    """
    x, y = data()
    spy = models.LossSpy()
    inputs = keras.Input(x.shape[1:])
    model = keras_vo.VOModel(inputs, layers.Dense(1)(body(inputs)))
    model.compile(
        optimizer=models.make_optimizer(fitness_shaping=spy),
        loss="mse",
        **({option: True} if option else {}),
    )
    model.optimizer.build(model.trainable_variables)
    if option:
        assert getattr(model, option) is True  # Keras did not fall back
    plain = keras.Model(inputs, layers.Dense(1)(body(inputs)))
    plain.set_weights(model.get_weights())
    plain.compile(loss="mse")
    before = model.get_weights()
    model.train_on_batch(x, y)
    want = models.member_losses(plain, models.make_optimizer(), x, y)
    assert np.std(want) > 1e-3
    np.testing.assert_allclose(spy.losses, want, **TOLERANCE)
    moved = [
        np.mean(new != old)
        for new, old in zip(model.get_weights(), before, strict=True)
    ]
    assert min(moved) > 0.5


def test_batch_norm_statistics_follow_the_mean_network():
    """After one step, exactly what one pass of the initial network gives."""

    def make():
        keras.utils.set_random_seed(1)
        return models.make_model(
            [layers.Dense(3), layers.BatchNormalization(), layers.Dense(1)],
            loss="mse",
        )

    x, _ = models.make_data(16)
    model, twin = make(), make()
    model.train_on_batch(x, x[:, :1])
    twin(x, training=True)
    for got, want in zip(
        model.layers[1].non_trainable_variables,
        twin.layers[1].non_trainable_variables,
        strict=True,
    ):
        np.testing.assert_array_equal(got, want)
    assert np.all(model.layers[1].moving_mean.numpy() != 0)


def test_members_and_mean_share_a_dropout_mask_that_changes_each_step():
    seen = []

    class Spy(layers.Layer):
        def call(self, inputs):
            tf.py_function(lambda v: seen.append(v.numpy()), [inputs], [])
            return inputs

    model = models.make_model(
        [layers.Dropout(0.5), Spy(), layers.Dense(1)],
        loss="mse",
        run_eagerly=True,
    )
    x = np.ones([2, 4], "float32")
    for _ in range(2):
        model.train_on_batch(x, x[:, :1])
    mean_1, *members_1 = seen[-18:-9]
    mean_2, *members_2 = seen[-9:]
    for mean, members in ((mean_1, members_1), (mean_2, members_2)):
        for member in members:
            np.testing.assert_array_equal(member, mean)
    assert not np.array_equal(mean_1, mean_2)
    assert set(np.unique([mean_1, mean_2])) == {0.0, 2.0}


@pytest.mark.parametrize("option", [{}, {"jit_compile": True}])
def test_all_chunks_share_the_dropout_mask_in_a_graph(option):
    """Members that could differ in nothing but the mask have equal losses.

    The loss of a mask of 20 units is a sum of distinct powers of two: chance
    makes two masks equal once in a million.
    """
    spy = models.LossSpy()

    class Unsearched(layers.Layer):
        """Has a weight, for the search's sake, that changes nothing."""

        def build(self, shape):
            self.weight = self.add_weight(shape=())

        def call(self, inputs):
            powers = 2.0 ** tf.range(-10.0, 10.0)
            return inputs * powers + 0.0 * self.weight

    model = models.make_model(
        [layers.Dropout(0.5), Unsearched()],
        shape=(20,),
        optimizer=models.make_optimizer(fitness_shaping=spy, chunk_size=2),
        loss=lambda y_true, y_pred: tf.reduce_sum(y_pred, -1),
        **option,
    )
    x = np.ones([1, 20], "float32")
    losses = []
    for _ in range(2):
        model.train_on_batch(x, x)
        losses.append(spy.losses.numpy())
    assert np.ptp(losses, axis=1).tolist() == [0.0, 0.0]
    assert losses[0][0] != losses[1][0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_without_input_shape_trains_as_one_with(dtype):
    """Its weights have no value yet where the search is built in the first
    step. There are enough of them for sigma to follow the mean.
    """

    def trained(*given, **compiling):
        keras.utils.set_random_seed(1)
        made = [layers.Dense(n, dtype=dtype) for n in (32, models.CLASSES)]
        model = keras_vo.VOSequential([*given, *made])
        optimizer = keras_vo.VOOptimizer(population_size=8, seed=7)
        model.compile(optimizer, loss="mse", **compiling)
        models.fit(model, x, x[:, :3], epochs=1)
        assert optimizer.search_distribution.follows_mean
        return models.weights(model).astype("float32")

    x, _ = models.make_data()
    want = trained(keras.Input((4,)), run_eagerly=True)
    np.testing.assert_allclose(trained(), want, rtol=1e-4, atol=1e-6)


def test_an_optimizer_of_another_model():
    """It is told so, where the model has no weights yet, too."""
    optimizer = models.make_optimizer()
    x, _ = models.make_data()

    def train():
        model = keras_vo.VOSequential([layers.Dense(3)])
        model.compile(optimizer, loss="mse", run_eagerly=True)
        model.train_on_batch(x, x[:, :3])

    train()
    with pytest.raises(ValueError, match=r"another model.*new VOOptimizer"):
        train()


def test_noise_of_random_layers_is_not_that_of_the_population():
    seed = seeds.generation_seed(tf.constant(0), tf.constant(0))
    draws = [
        seeds.single_seed(seed, tf.constant(i, tf.int64)).numpy()
        for i in range(-3, 3)
    ]
    assert len({d.tobytes() for d in draws}) == 6


# --- layers with noise of their own, among others ---

LR, LOW_RANK = keras_vo.layers.LocalReparamDense, keras_vo.layers.LowRankDense
MIXTURES = {
    "images": (
        images,
        lambda: [
            layers.Conv2D(2, 3),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Dropout(0.5),
            layers.Flatten(),
            LOW_RANK(4, activation="relu"),
            LR(3, activation="relu"),
            layers.LayerNormalization(),
            LR(1),
        ],
    ),
    "sequences": (
        sequences,
        lambda: [
            layers.Embedding(6, 3, mask_zero=True),
            LR(4, activation="relu"),
            layers.GRU(4),
            LR(1),
        ],
    ),
}


@pytest.mark.parametrize(
    "name, variance, option",
    [
        ("images", "separable", {}),  # dropout's masks differ under XLA
        ("sequences", "layerwise", {"jit_compile": True}),
    ],
)
def test_other_noise_among_other_layers(name, variance, option):
    """All weights move; chunk by chunk in a graph as at once and eagerly."""
    data, body = MIXTURES[name]
    x, y = data()
    states = []
    ways = [({}, {"run_eagerly": True}), ({"chunk_size": 2}, option)]
    for kwargs, compiling in ways:
        keras.utils.set_random_seed(0)
        model = models.make_model(
            body(),
            shape=x.shape[1:],
            loss="mse",
            optimizer=models.make_optimizer(
                variance,
                inner_optimizer=keras.optimizers.SGD(0.1),
                fitness_shaping="identity",
                **kwargs,
            ),
            **compiling,
        )
        before = model.get_weights()
        model.train_on_batch(x, y)
        moved = [
            np.mean(new != old)
            for new, old in zip(model.get_weights(), before, strict=True)
        ]
        assert min(moved) > 0.5
        states.append(models.weights(model))
    np.testing.assert_allclose(*states, rtol=1e-3, atol=2e-5)


@keras.saving.register_keras_serializable("test_layers")
class CallsAnotherLayerInMembers(keras_vo.VOModel):
    """Whose mean network's pass, the first one, leaves a layer out."""

    def __init__(self, layer, **kwargs):
        super().__init__(**kwargs)
        self.always = LOW_RANK(2)
        self.sometimes = layer(2)
        self.calls = 0

    def call(self, inputs):
        self.calls += 1
        outputs = self.always(inputs)
        return outputs + self.sometimes(inputs) if self.calls > 1 else outputs


@pytest.mark.filterwarnings("ignore:The loss does not depend on the weights")
def test_a_layer_that_the_mean_network_does_not_call():
    """Its kernel has full-rank noise: that of Dense in its place."""
    moved = []
    for layer in (LOW_RANK, keras.layers.Dense):
        model = CallsAnotherLayerInMembers(layer)
        for part in (model.always, model.sometimes):
            part.build((None, 3))
            part.kernel.assign(np.zeros((3, 2)))
        model.compile(
            optimizer=models.make_optimizer(population_size=4),
            loss="mse",
            run_eagerly=True,
        )
        model.optimizer.build(model.trainable_variables)
        model.train_on_batch(np.ones((4, 3)), np.ones((4, 2)))
        assert model.calls == 5
        moved.append(models.weights(model))
    assert moved[0].any()
    np.testing.assert_array_equal(moved[0], moved[1])
