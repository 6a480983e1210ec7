"""Sigma, step and place of noise on activations, where nothing is set."""

import math

import keras
import models
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import keras_vo
from keras_vo.perturbations.calls import EinsumCall
from keras_vo.perturbations.contraction import Contraction
from keras_vo.search.activation_scale import ActivationScale, Site, ties
from keras_vo.search.layout import WeightLayout
from keras_vo.search.rules import Bounds

G = keras_vo.GaussianSearchDistribution


def zero_one(y_true, y_pred):
    predicted = tf.argmax(y_pred, axis=-1, output_type=tf.int32)
    wrong = tf.cast(tf.reshape(y_true, [-1]), tf.int32) != predicted
    return tf.cast(wrong, tf.float32)


def scale_of(sites, chosen=True, first=0.2, bounds=(1e-6, 1e3)):
    return ActivationScale.of(
        sites, chosen=chosen, first=first, bounds=Bounds(*bounds), rate=0.02
    )


SITES = [
    Site([0, 1], 64, True),
    Site([2], 1, False),  # a scale, which is no layer
    Site([4], 1, True),  # a row of a table
    Site([5, 6], 10, True),
    Site([7], 784, True),
]


def test_sigma_by_hand():
    scale = scale_of(SITES)
    assert scale.narrow == pytest.approx(
        {
            0: 0.046875,  # 3/4 1/8 / sqrt(4)
            1: 0.046875,
            2: 0.075,  # 3/4 0.2 / sqrt(4)
            4: 0.075,
            5: 0.075,
            6: 0.075,
            7: 0.75 / 28 / 2,
        }
    )
    assert scale.wide == pytest.approx(
        {0: 0.2, 1: 0.2, 2: 0.2, 4: 0.2, 5: 0.2, 6: 0.2, 7: 3 / 28}
    )


def test_a_number_is_that_of_all():
    scale = scale_of(SITES, chosen=False, first=0.03)
    assert set(scale.narrow.values()) == {0.03} == set(scale.wide.values())


@pytest.mark.parametrize(
    "discrete, parts",
    [  # sigma / 10 / 0.02 and sigma / 20 / 0.02
        (False, [0.5 * 0.75 * 2, 1.0, 0.5 * 0.75 * 2]),
        (True, [0.5, 1.0, 0.5]),
    ],
)
def test_parts_of_a_step(discrete, parts):
    layout = WeightLayout(((4, 2), (3,), (2,)), ("float32",) * 3, (0, 1, 0))
    scale = scale_of([Site([0, 2], 4, True)])
    got = scale.parts(layout, tf.constant(discrete))
    np.testing.assert_allclose(got, parts, rtol=1e-6)


@pytest.mark.parametrize(
    "groups, expected",
    [
        ((0, 1, 0), [1.0, 0.0]),
        ((0, 0, 0), [10 / 13]),  # a mean over all weights
        (None, [1.0] * 8 + [0.0] * 3 + [1.0] * 2),
    ],
)
def test_groups(groups, expected):
    layout = WeightLayout(((4, 2), (3,), (2,)), ("float32",) * 3, groups)
    scale = scale_of([Site([0, 2], 4, True)])
    change = 2 * math.log(0.75)
    to_narrow, to_wide = scale.changes(layout)
    np.testing.assert_allclose(to_narrow, change * np.array(expected), 1e-5)
    np.testing.assert_allclose(to_wide, -change * np.array(expected), 1e-5)
    np.testing.assert_array_equal(
        scale.groups(layout), np.array(expected) == 1.0
    )


def test_within_bounds():
    scale = scale_of(SITES, bounds=(0.05, 0.1))
    assert set(scale.wide.values()) == {0.1}
    assert scale.narrow[7] == 0.05 and scale.narrow[2] == pytest.approx(0.075)


def test_ties_by_hand():
    losses = tf.constant(
        [  # different, all the same, not finite, few values
            [0.5, 1.5, 0.0, np.nan, 0.0],
            [1.0, 2.0, 0.0, np.nan, 3.0],
            [0.7, 3.0, 0.0, 1.0, 3.0],
            [1.1, 4.0, 0.0, np.inf, 3.0],
        ]
    )
    np.testing.assert_array_equal(ties(losses, 1.0), [2, 3 + 3 + 2])
    weights = tf.constant([1.0, 2.0, 1.0, 1.0, 0.0])  # the last is padding
    np.testing.assert_array_equal(ties(losses, weights), [0, 6])
    hinge = tf.nn.relu(losses[:, :2] - 1.0)  # 0 for two of the first
    np.testing.assert_array_equal(ties(hinge, 1.0), [0, 3])


def test_fan_in_of_an_einsum():
    """The axes that are contracted, not all but the last."""
    kernel = keras.Variable(np.zeros((6, 4, 3), "float32"))
    for equation, inputs, fan_in in [
        ("abc,cde->abde", (2, 5, 6), 6),
        ("abef,efd->abd", (2, 5, 6, 4), 24),
    ]:
        contraction = Contraction.parse(equation, len(inputs))
        call = EinsumCall(
            "", kernel, None, tf.zeros(inputs), contraction=contraction
        )
        assert call.fan_in == fan_in


# --- in training ---


def network(hidden=16):
    keras.utils.set_random_seed(1)
    return [
        layers.Dense(hidden, activation="relu"),
        layers.Dense(models.CLASSES, activation="softmax"),
    ]


def trained(loss, steps, model=None, **kwargs):
    kwargs.setdefault("perturbation", "local_reparam")
    model = model or models.make_model(
        network(), keras_vo.VOOptimizer(seed=2, **kwargs), loss=loss
    )
    x, y = models.make_data(8 * steps)
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    return model


def sigmas(model):
    return [float(np.median(s)) for s in model.optimizer.stddevs]


SMOOTH = "sparse_categorical_crossentropy"


def test_smooth_losses_are_narrow():
    """And sigma goes down its gradient only, by less than 3 % in two steps."""
    optimizer = keras_vo.VOOptimizer(seed=2, perturbation="local_reparam")
    model = trained(SMOOTH, 2, models.make_model(network(100), optimizer))
    fans = (4, 4, 100, 100)
    narrow = [0.75 * min(0.2, d**-0.5) / math.sqrt(2) for d in fans]
    np.testing.assert_allclose(sigmas(model), narrow, rtol=0.03)
    assert float(model.optimizer._rule_state["discrete"]) == 0.0


def test_losses_of_few_values_are_wide_after_one_population():
    model = trained(zero_one, 1)
    np.testing.assert_allclose(sigmas(model), [0.1061] * 4, rtol=0.05)
    trained(zero_one, 1, model)
    np.testing.assert_allclose(sigmas(model), [0.2] * 4, rtol=0.05)


@pytest.mark.parametrize("loss", [SMOOTH, zero_one])
def test_a_number_stays(loss):
    model = trained(loss, 3, search_distribution=G("fixed", stddev=0.05))
    np.testing.assert_allclose(sigmas(model), [0.05] * 4, rtol=1e-6)


@pytest.mark.parametrize("variance", ["fixed", "layerwise"])
def test_bounds_hold(variance):
    """Where no rule looks after them, too."""
    distribution = G(variance, max_stddev=0.08)
    model = trained(zero_one, 2, search_distribution=distribution)
    assert max(sigmas(model)) <= 0.08 * (1 + 1e-6)
    distribution = G(variance, min_stddev=0.15)
    model = trained(SMOOTH, 1, search_distribution=distribution)
    assert min(sigmas(model)) >= 0.15 * (1 - 1e-6)


def test_a_first_population_that_finds_nothing():
    """No loss is finite: the next one is the first, as narrow as it."""
    now = tf.Variable(np.inf, trainable=False)
    model = models.make_model(
        network(),
        keras_vo.VOOptimizer(seed=2, perturbation="local_reparam"),
        loss=lambda t, p: zero_one(t, p) + now - now,
    )
    x, y = models.make_data(8)
    seen = []
    for value in (np.inf, 0.0, 0.0):
        now.assign(value)
        model.fit(x, y, batch_size=8, verbose=0)
        seen.append(sigmas(model)[0])
    np.testing.assert_allclose(seen, [0.1061, 0.1061, 0.2], rtol=0.05)


def test_a_schedule_sets_steps_too():
    """Of sigma now, not of the first one."""
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay(
        [0], [0.02, 0.08]
    )
    model = models.make_model(
        network(),
        keras_vo.VOOptimizer(
            seed=2,
            perturbation="local_reparam",
            search_distribution=G("fixed", stddev=schedule),
        ),
    )
    np.testing.assert_allclose(moved(model), [0.002] * 4, rtol=0.01)
    assert 0.004 < max(moved(model)) < 0.0081


def test_positions_are_asked_for_ties():
    """Their sum over an example takes many values."""
    x = np.random.default_rng(0).normal(size=(16, 200, 3)).astype("float32")
    y = np.argmax(x, axis=-1)
    layer_list = [layers.Dense(4, activation="relu"), layers.Dense(3)]

    def wrong(y_true, y_pred):
        predicted = tf.argmax(y_pred, axis=-1)
        return tf.cast(predicted != tf.cast(y_true, tf.int64), tf.float32)

    model = models.make_model(
        layer_list,
        keras_vo.VOOptimizer(
            seed=2, perturbation="local_reparam", credit="position"
        ),
        (200, 3),
        loss=wrong,
    )
    model.fit(x, y, batch_size=8, verbose=0)
    np.testing.assert_allclose(sigmas(model), [0.2] * 4, rtol=0.1)


@pytest.mark.parametrize("variance", ["isotropic", "separable"])
def test_other_variances(variance):
    model = trained(SMOOTH, 1, search_distribution=G(variance))
    np.testing.assert_allclose(sigmas(model), [0.1061] * 4, rtol=0.05)


def moved(model):
    """The largest change of each weight in the first step, of Adam."""
    before = model.get_weights()
    x, y = models.make_data(8)
    model.fit(x, y, batch_size=8, verbose=0)
    return [
        float(np.abs(now - was).max())
        for now, was in zip(model.get_weights(), before, strict=True)
    ]


def test_steps_are_in_units_of_sigma():
    """The first step of Adam has the size of its rate in every weight."""

    def make(inner="adam", **kwargs):
        optimizer = keras_vo.VOOptimizer(
            inner, seed=2, perturbation="local_reparam", **kwargs
        )
        return models.make_model(network(), optimizer, run_eagerly=True)

    np.testing.assert_allclose(moved(make()), [0.0106066] * 4, rtol=1e-3)
    own = keras.optimizers.Adam(0.02)
    np.testing.assert_allclose(moved(make(own)), [0.02] * 4, rtol=1e-3)
    number = {"search_distribution": G(stddev=0.05)}
    np.testing.assert_allclose(moved(make(**number)), [0.005] * 4, rtol=1e-3)


def test_steps_of_a_clone():
    """What a name stood for is an object in a config."""
    optimizer = keras_vo.VOOptimizer(seed=2, perturbation="local_reparam")
    clone = keras_vo.VOOptimizer.from_config(optimizer.get_config())
    model = models.make_model(network(), clone, run_eagerly=True)
    np.testing.assert_allclose(moved(model), [0.0106066] * 4, rtol=1e-3)


@pytest.mark.parametrize("loss", [SMOOTH, zero_one])
def test_only_under_few_values_sigma_follows_the_mean(loss):
    """By long steps, and a sigma that does not go down."""
    distribution = G(learning_rate=1e-9)
    model = models.make_model(
        network(64),
        keras_vo.VOOptimizer(
            keras.optimizers.SGD(1000.0),
            perturbation="local_reparam",
            search_distribution=distribution,
            natural_gradient=False,
            seed=2,
        ),
        loss=loss,
    )
    trained(loss, 3, model)
    follows = sigmas(model)[0] > 0.21
    assert follows == (loss is zero_one)


def test_resumed_between_the_first_two_populations(tmp_path):
    """Where the second one is to be wide."""
    x, y = models.make_data(24)
    whole = models.make_model(
        network(),
        keras_vo.VOOptimizer(seed=2, perturbation="local_reparam"),
        loss=zero_one,
    )
    whole.fit(x[:8], y[:8], batch_size=8, shuffle=False, verbose=0)
    whole.save(tmp_path / "m.keras")
    half = keras.models.load_model(
        tmp_path / "m.keras", custom_objects={"zero_one": zero_one}
    )
    for model in (whole, half):
        model.fit(x[8:], y[8:], batch_size=8, shuffle=False, verbose=0)
    np.testing.assert_allclose(sigmas(whole), [0.2] * 4, rtol=0.05)
    for one, other in zip(whole.get_weights(), half.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert sigmas(half) == sigmas(whole)


def test_replicas_agree():
    """All count the same ties, whatever their own examples."""
    strategy = models.mirrored(2)
    with strategy.scope():
        model = models.make_model(
            network(),
            keras_vo.VOOptimizer(seed=2, perturbation="local_reparam"),
            loss=zero_one,
        )
    trained(zero_one, 3, model)
    np.testing.assert_allclose(sigmas(model), [0.2] * 4, rtol=0.05)
    models.assert_replicas_are_equal(strategy, model.optimizer.variables)


# --- which layers ---


def fitted(layer_list, shape, y, perturbation="local_reparam", **kwargs):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 6, (len(y), *shape)).astype("float32")
    keras.utils.set_random_seed(1)
    model = keras_vo.VOSequential([keras.Input(shape), *layer_list()])
    optimizer = keras_vo.VOOptimizer(
        seed=2, perturbation=perturbation, population_size=16
    )
    model.compile(optimizer, **kwargs)
    model.fit(x, y, batch_size=8, verbose=0)
    return model


def test_somewhat_more_outputs_where_no_other_member_is_needed():
    """Rows of 5 positions for a table of 6 by 4: 20 outputs, 24 weights; of a
    Dense(4): 20 outputs, 16 weights."""

    def make():
        return [
            layers.Embedding(6, 4),
            layers.Dense(4, activation="tanh"),
            layers.Flatten(),
            layers.Dense(1),
        ]

    y = np.zeros((16, 1), "float32")
    model = fitted(make, (5,), y, loss="mse")
    narrow = 0.75 * 0.2 / math.sqrt(3)
    np.testing.assert_allclose(sigmas(model)[:3], [narrow] * 3, rtol=0.05)

    def recurrent():
        return [
            layers.Embedding(6, 4),
            layers.Dense(4, activation="tanh"),
            layers.SimpleRNN(4),
            layers.Dense(1),
        ]

    model = fitted(recurrent, (5,), y, loss="mse")
    embedding, kernel, *_ = sigmas(model)
    assert embedding < 0.15 < 0.19 < kernel


def test_few_weights_are_not_worth_a_population():
    """The same, bit by bit, as noise on all weights."""

    def make():
        return [
            layers.Reshape((6, 1)),
            layers.LSTM(12),
            layers.Dense(1, activation="sigmoid"),
        ]

    y = np.arange(16)[:, None] % 2
    one, other = (
        fitted(make, (6,), y, kind, loss="binary_crossentropy").get_weights()
        for kind in ("local_reparam", "full")
    )
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)
