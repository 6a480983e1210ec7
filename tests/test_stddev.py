"""Initial sigma: chosen, a number, a schedule."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_vo

SCHEDULES = keras.optimizers.schedules


def model_with(
    stddev, structure="layerwise", inputs=784, run_eagerly=False, **kwargs
):
    model = keras_vo.VOSequential(
        [keras.Input((inputs,)), keras.layers.Dense(16)]
    )
    model.compile(
        optimizer=keras_vo.VOOptimizer(
            keras.optimizers.SGD(0.0),
            population_size=4,
            seed=0,
            search_distribution=keras_vo.GaussianSearchDistribution(
                structure, stddev=stddev, **kwargs
            ),
        ),
        loss="mse",
        run_eagerly=run_eagerly,
    )
    model.optimizer.build(model.trainable_variables)
    return model


def sigma(model):
    return model.optimizer.stddevs[0].numpy().flat[0]


def test_auto_is_chosen_by_the_shape():
    # 784 weights of a unit, and a bias: 3 / sqrt(784) < .2.
    assert sigma(model_with("auto")) == pytest.approx(1 / 28, rel=1e-5)
    assert sigma(model_with("auto", inputs=100)) == pytest.approx(0.2)
    assert sigma(model_with("auto", "fixed")) == pytest.approx(0.2)
    assert sigma(model_with("auto", follow_mean=False)) == pytest.approx(0.2)
    default = keras_vo.GaussianSearchDistribution()
    assert default.stddev == "auto"
    assert sigma(model_with("auto", max_stddev=0.01)) == pytest.approx(0.01)


def test_a_number_is_kept():
    assert sigma(model_with(0.1)) == pytest.approx(0.1)  # below 3 / 28
    with pytest.warns(UserWarning, match="stddev=0.2.*about 0.036"):
        model = model_with(0.2)
    assert sigma(model) == pytest.approx(0.2)
    assert model.optimizer.search_distribution.stddev == 0.2
    # Where nothing else would be chosen, nothing is warned about.
    assert sigma(model_with(0.2, "fixed")) == pytest.approx(0.2)


@pytest.mark.parametrize(
    "value", [np.float32(0.3), np.float64(0.3), np.array(0.3), tf.constant(0.3)]
)
def test_numbers_of_other_libraries(value):
    distribution = keras_vo.GaussianSearchDistribution(
        stddev=value, learning_rate=value, max_stddev=np.int64(2)
    )
    assert distribution.stddev == pytest.approx(0.3)
    json.dumps(distribution.get_config())
    optimizer = keras_vo.VOOptimizer(
        population_size=np.int64(4),
        max_kl=np.float32(0.5),
        seed=np.int32(3),
        chunk_size=np.int16(2),
        memory_budget=np.float64(1e6),
    )
    json.dumps(optimizer.get_config())


@pytest.mark.parametrize(
    "value",
    ["large", 0, -1.0, np.nan, np.inf, None, True, np.array([0.1]), [0.1]],
)
def test_what_is_no_sigma(value):
    with pytest.raises(ValueError, match="`stddev` must be a positive, finite"):
        keras_vo.GaussianSearchDistribution(stddev=value)


def test_a_schedule_counts_updates():
    schedule = SCHEDULES.PiecewiseConstantDecay([1, 3], [0.4, 0.2, 0.1])
    model = model_with(schedule, "fixed", inputs=3, run_eagerly=True)
    seen = [sigma(model)]
    x, y = np.ones((2, 3)), np.ones((2, 16))
    for _ in range(4):
        model.train_on_batch(x, y)
        seen.append(sigma(model))
    # Updates 0 and 1, 2 and 3, 4.
    np.testing.assert_allclose(seen, [0.4, 0.4, 0.2, 0.2, 0.1], rtol=1e-6)
    model.train_on_batch(x * np.nan, y)  # no update
    assert sigma(model) == pytest.approx(0.1)


def test_a_schedule_is_saved_and_resumed(tmp_path):
    x, y = np.ones((4, 3), "float32"), np.ones((4, 16), "float32")
    schedule = SCHEDULES.ExponentialDecay(0.5, 2, 0.5)
    model = model_with(schedule, "fixed", inputs=3)
    for epoch in (1, 2):
        model.fit(x, y, batch_size=1, shuffle=False, verbose=0)
        assert sigma(model) == pytest.approx(0.5 ** (1 + 2 * epoch))
        model.save(tmp_path / "m.keras")
        model = keras.models.load_model(tmp_path / "m.keras")
        assert sigma(model) == pytest.approx(0.5 ** (1 + 2 * epoch))


def test_a_schedule_stays_in_bounds_and_needs_a_fixed_variance():
    schedule = SCHEDULES.ExponentialDecay(10.0, 1, 1e-9)
    model = model_with(
        schedule,
        "fixed",
        inputs=3,
        run_eagerly=True,
        min_stddev=0.01,
        max_stddev=1.0,
    )
    assert sigma(model) == pytest.approx(1.0)
    model.train_on_batch(np.ones((2, 3)), np.ones((2, 16)))
    assert sigma(model) == pytest.approx(0.01)
    with pytest.raises(ValueError, match='variance="fixed".*layerwise'):
        keras_vo.GaussianSearchDistribution(stddev=schedule)


def scaled_search(shaping):
    model = model_with(0.05, inputs=40)
    config = model.optimizer.get_config()
    config["fitness_shaping"] = shaping
    return keras_vo.VOOptimizer(**{**config, "inner_optimizer": "sgd"})


@pytest.mark.parametrize(
    "shaping, expected",
    [
        (lambda f: f - tf.reduce_mean(f), True),
        (lambda f: 3 * (f - tf.reduce_mean(f)) / 7, True),
        (lambda f: tf.sign(f - tf.reduce_mean(f)), False),
        (keras_vo.fitness_shaping.standardize, False),
        (keras_vo.fitness_shaping.identity, True),
        ("centered_rank", False),
        (lambda f: 0 * f, False),
        (lambda f: f.no_such_thing, False),
        (lambda f: f - tf.constant(1.0, tf.float64), False),
    ],
)
def test_a_shaping_is_asked_for_its_scale(shaping, expected):
    found = keras_vo.fitness_shaping.is_loss_scaled(shaping, 10)
    assert found is expected


def test_the_mean_moves_as_with_identity_where_a_callable_is_the_same():
    """Where sigma follows the mean: 16 x 40 weights, 4 members."""

    def centered(losses):  # identity, but for a factor of N / (N - 2)
        return keras_vo.fitness_shaping.identity(losses, antithetic=True)

    rng = np.random.default_rng(0)
    start, x = rng.normal(size=(40, 16)), rng.normal(size=(8, 40))

    def loss(weights):
        return tf.reduce_mean(tf.square(tf.matmul(x, weights[0]) - 1.0))

    weights = []
    for shaping in ("identity", centered):
        kernel = tf.Variable(start)
        optimizer = keras_vo.VOOptimizer(
            keras.optimizers.SGD(500.0),
            population_size=4,
            seed=0,
            fitness_shaping=shaping,
            search_distribution=keras_vo.GaussianSearchDistribution(
                stddev=0.001
            ),
        )
        for _ in range(5):
            optimizer.minimize(loss, [kernel])
        weights.append(kernel.numpy())
    assert optimizer.stddevs[0].numpy().max() > 0.002  # it is lifted
    np.testing.assert_allclose(weights[1], weights[0], rtol=1e-9)
