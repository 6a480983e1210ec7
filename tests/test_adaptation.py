"""Sigma without a learning rate: the rule, its signal, its state, its effect.

tests/test_distribution.py has it on several replicas.
"""

import math

import keras
import models
import numpy as np
import pytest
import reference
import tensorflow as tf
from test_optimizer import (
    GROUPS,
    flat,
    make_variables,
    noise_of,
    objective,
    objective_np,
)

import keras_vo
from keras_vo import adaptation, low_rank
from keras_vo.layers import LocalReparamDense, LowRankDense
from keras_vo.layout import WeightLayout

ADAPTIVE = ["isotropic", "layerwise", "separable"]
BLOCKS = {
    "isotropic": GROUPS["isotropic"],
    "layerwise": GROUPS["layerwise"],
    "separable": GROUPS["layerwise"],
}


def make(variance, *, inner=None, stddev=0.5, bounds=(1e-6, 1e3), **kwargs):
    settings = {"seed": 3, "population_size": 8} | kwargs
    return keras_vo.VOOptimizer(
        inner or keras.optimizers.SGD(0.125),
        search_distribution=keras_vo.GaussianSearchDistribution(
            variance, stddev, None, *bounds
        ),
        **settings,
    )


# --- the rule ---


@pytest.mark.parametrize("shaping", ["centered_rank", "identity", "nes"])
@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("variance", ADAPTIVE)
def test_steps_match_the_reference(variance, antithetic, shaping):
    """Twelve of them; the floor acts in some and not in others."""
    variables = make_variables()
    optimizer = make(variance, antithetic=antithetic, fitness_shaping=shaping)
    mu = flat(variables)
    beta = np.full(len(GROUPS[variance]), 2 * math.log(0.5))
    average = mu
    for generation in range(12):
        optimizer.minimize(objective, variables)
        mu, beta = reference.adapted_step(
            objective_np,
            mu,
            beta,
            average,
            noise_of(optimizer, generation, 4 if antithetic else 8),
            GROUPS[variance],
            BLOCKS[variance],
            shaping=shaping,
            antithetic=antithetic,
            rate=0.125,
        )
        average = average + (mu - average) / 20
    np.testing.assert_allclose(flat(variables), mu, rtol=1e-9)
    sigma = np.empty(3)
    for value, indices in zip(beta, GROUPS[variance], strict=True):
        sigma[indices] = math.exp(value / 2)
    np.testing.assert_allclose(flat(optimizer.stddevs), sigma, rtol=1e-9)


def test_the_rule_by_hand():
    """Blocks of 2 and 1 weights; beta -1 and 2, N = 128, so rate = 2."""
    shared = WeightLayout(((2,), (1,)), ("float64",) * 2, (0, 1))
    separable = WeightLayout(((2,), (1,)), ("float64",) * 2, None)

    def adapted(layout, beta, gradient, distance, population_size=128):
        return adaptation.adapted_log_variance(
            *(
                tf.constant(values, tf.float64)
                for values in (beta, gradient, [0.2, -0.1], distance)
            ),
            population_size,
            layout,
            shared,
        ).numpy()

    # No floor, an excess of 5: -1 - 2 (.2 + .18), 2 - 2 (-.1 + .18).
    free = adapted(shared, [-1, 2], [9, 9], [0, 0, 0])
    np.testing.assert_allclose(free, [-1.76, 1.84])
    small = adapted(shared, [-1, 2], [9, 9], [0, 0, 0], population_size=32)
    np.testing.assert_allclose(small, [-1.19, 1.96])
    large = adapted(shared, [-1, 2], [9, 9], [0, 0, 0], population_size=512)
    np.testing.assert_allclose(large, free)
    # Floors: log of the mean of 1 and 49, and log e^-2, an excess of 4.
    held = adapted(shared, [-1, 2], [9, 9], [1, -7, math.exp(-1)])
    np.testing.assert_allclose(held, [math.log(25), 2 - 2 * 0.05])
    # Each weight its own: natural gradients 2 g = 4/3, -2/3 have the mean
    # 1/3: .03 (4/3 - 1/3) = .03.
    own = adapted(separable, [-2, 0, 2], [2 / 3, -1 / 3, 7], [0, 0, 0])
    np.testing.assert_allclose(own, [-2.76 - 0.03, -0.76 + 0.03, 1.84])
    own = adapted(separable, [-2, 0, 2], [2 / 3, -1 / 3, 7], [1, -7, 0])
    at = math.log(25)
    np.testing.assert_allclose(own, [at - 1.03, at + 1.03, 1.84])


def test_the_average_is_over_the_later_part_of_the_search():
    """The first horizon is 20; then weights grow with time.

    That is a mean age of a third of t: a mean that moves by 1 a step has
    moved t / 3 since.
    """
    average, lags = tf.zeros([1], tf.float64), []
    for t in range(1, 2001):
        mean = tf.constant([t], tf.float64)
        average = adaptation.averaged_mean(average, mean, tf.constant(t))
        lags.append((mean - average).numpy().item())
    np.testing.assert_allclose(lags[:2], [0.95, 1.8525])
    np.testing.assert_allclose(lags[-1], 2000 / 3, rtol=0.02)


def test_bounds_are_kept_whatever_the_floor():
    variables = make_variables()
    for bounds in ((0.5, 0.7), (0.3, 0.5)):
        optimizer = make("layerwise", bounds=bounds, inner="sgd")
        optimizer.inner_optimizer.learning_rate = 100.0
        seen = []
        for _ in range(8):
            optimizer.minimize(objective, variables)
            seen.append(flat(optimizer.stddevs))
        assert np.min(seen) >= bounds[0] - 1e-9
        assert np.max(seen) <= bounds[1] + 1e-9
        assert np.max(seen) > bounds[1] - 1e-9  # such steps want more


# --- the signal ---


def test_fisher_information_of_low_rank_noise():
    """The variance of the score over 20,000 draws; 1 % is one deviation."""
    rng = np.random.default_rng(0)
    for rank, shape in ((1, (5, 3)), (4, (2, 7))):
        noise = low_rank.KernelNoise(rank, shape, tf.constant(0.3))
        draws = tf.constant(rng.normal(size=(20000, noise.size)))
        scores = [
            noise.log_variance_sums(row[None], tf.ones([1], tf.float64)) / 2
            for row in tf.unstack(draws[:2])
        ]
        left, right = noise._split(draws)
        rows = tf.reduce_sum(left**2 - 1, axis=[1, 2])
        columns = tf.reduce_sum(right**2 - 1, axis=[1, 2])
        inputs, outputs = shape
        score = (outputs * rows + inputs * columns) / (inputs + outputs) / 2
        np.testing.assert_allclose(score[:2], scores, rtol=1e-9)
        np.testing.assert_allclose(np.var(score), noise.fisher, rtol=0.05)


def run_one(layer, variance, **kwargs):
    """The correlation c in a step of a layer 1-1 without mean.

    Inputs are 1, the loss is the squared output: sigma^2 z^2.
    """
    seen = []
    original = adaptation.correlation

    def spy(*args):
        seen.append(original(*args))
        return seen[-1]

    model = keras_vo.VOSequential(
        [
            keras.Input((1,)),
            layer(1, kernel_initializer="zeros", use_bias=False),
        ]
    )
    model.compile(
        optimizer=make(
            variance, seed=0, fitness_shaping="standardize", **kwargs
        ),
        loss=lambda y_true, y_pred: tf.reduce_sum(y_pred**2, -1),
        run_eagerly=True,
    )
    x = np.ones((4, 1), "float32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adaptation, "correlation", spy)
        model.train_on_batch(x, np.zeros((4, 1), "float32"))
    return seen[0].numpy().item()


@pytest.mark.parametrize("variance", ["layerwise", "separable"])
@pytest.mark.parametrize(
    "layer, want",
    [(keras.layers.Dense, 1.0), (LowRankDense, 0.707), (LocalReparamDense, 1)],
)
def test_correlation_is_that_of_utility_and_score(layer, want, variance):
    """The loss is sigma^2 z^2 and the radius z^2 - 1: they agree.

    Of rank 1, z = a b and the score is (a^2 + b^2 - 2) / 4, so that c is
    corr(a^2 b^2, a^2 + b^2) = 2 * 2 / sqrt(8 * 4) = .707. 200 draws (times
    four examples of local noise) have a standard deviation below .15: .5
    away, what a wrong Fisher information by a factor of 2 would do, is seen.
    """
    got = run_one(layer, variance, population_size=400)
    assert abs(got - want) < 0.3


# --- the step of the mean ---


@pytest.mark.parametrize("shaping", ["centered_rank", "identity"])
@pytest.mark.parametrize("variance", ADAPTIVE)
def test_the_mean_moves_alike_whatever_sigma(variance, shaping):
    """On a linear objective, at sigma_0 = .5 and at a hundredth of it.

    At sigma_0 it is the natural gradient's step.
    """

    def linear(weights):
        return tf.reduce_sum(weights[0]) - 3 * tf.reduce_sum(weights[1])

    moves = []
    for factor in (1.0, 0.01):
        variables = make_variables()
        optimizer = make(variance, fitness_shaping=shaping)
        optimizer.build(variables)
        beta = np.full(
            optimizer._log_variance.shape, 2 * math.log(0.5 * factor)
        )
        optimizer._log_variance.assign(beta)
        before = flat(variables)
        optimizer.minimize(linear, variables)
        moves.append(flat(variables) - before)
    np.testing.assert_allclose(moves[0], moves[1], rtol=1e-9)
    natural = make_variables()
    optimizer = keras_vo.VOOptimizer(
        keras.optimizers.SGD(0.125),
        population_size=8,
        search_distribution=keras_vo.GaussianSearchDistribution("fixed", 0.5),
        fitness_shaping=shaping,
        seed=3,
    )
    optimizer.minimize(linear, natural)
    np.testing.assert_allclose(flat(natural) - before, moves[0], rtol=1e-9)


# --- its state ---


def test_a_resumed_search_is_the_uninterrupted_one():
    for variance in ADAPTIVE:
        variables = make_variables()
        optimizer = make(variance, inner=keras.optimizers.Adam(0.1))
        store = {}
        for step in range(6):
            if step == 3:
                optimizer.save_own_variables(store)
                resumed = [tf.Variable(v) for v in variables]
            optimizer.minimize(objective, variables)
        copy = keras_vo.VOOptimizer.from_config(optimizer.get_config())
        assert copy.search_distribution.learning_rate is None
        copy.build(resumed)
        copy.load_own_variables(store)
        for _ in range(3):
            copy.minimize(objective, resumed)
        np.testing.assert_array_equal(flat(resumed), flat(variables))
        np.testing.assert_array_equal(
            flat(copy.stddevs), flat(optimizer.stddevs)
        )


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_step_without_any_finite_loss_changes_nothing(replicas):
    strategy = tf.distribute.MirroredStrategy(
        [f"CPU:{i}" for i in range(replicas)],
        cross_device_ops=tf.distribute.ReductionToOneDevice(),
    )
    with strategy.scope():
        variables = make_variables()
        scale = tf.Variable(1.0, dtype=tf.float64)
        optimizer = make("layerwise")
        optimizer.build(variables)
    step = tf.function(
        lambda: optimizer.minimize(lambda w: objective(w) * scale, variables)
    )
    for value, changes in ((1.0, True), (math.nan, False), (1.0, True)):
        scale.assign(value)
        before = [v.numpy() for v in (*variables, *optimizer.variables)]
        step()
        after = [v.numpy() for v in (*variables, *optimizer.variables)]
        changed = sum(
            np.any(a != b) for a, b in zip(before, after, strict=True)
        )
        # Weights, beta, the averaged mean and two counters, or one counter.
        assert changed == (2 + 2 + 2 if changes else 1)


def test_the_average_is_that_of_the_steps_taken():
    """What `max_kl` takes back is not in it."""
    variables = make_variables()
    optimizer = make("layerwise", max_kl=1e-4)
    before = flat(variables)
    optimizer.minimize(objective, variables)
    np.testing.assert_allclose(
        optimizer._averaged_mean.numpy(),
        0.95 * before + 0.05 * flat(variables),
        rtol=1e-12,
    )


def test_weights_that_are_loaded_before_the_first_step_are_no_move():
    """The floor would be the distance from the initial weights."""
    variables = make_variables()
    optimizer = make("layerwise", stddev=0.01)
    optimizer.build(variables)
    for variable in variables:
        variable.assign_add(10.0 * tf.ones_like(variable))
    optimizer.minimize(objective, variables)
    assert np.max(flat(optimizer.stddevs)) < 0.02


# --- its effect ---


def test_sigma_grows_where_all_losses_are_equal():
    """beta by rate * .03 = 2 * 8/128 * .03 a step, until some differ."""
    variables = make_variables()
    optimizer = make("layerwise", stddev=0.01)
    for _ in range(3):
        optimizer.minimize(lambda w: tf.constant(2.0), variables)
    np.testing.assert_allclose(
        flat(optimizer.stddevs), 0.01 * math.exp(3 * 0.00375 / 2), rtol=1e-6
    )


@pytest.mark.parametrize("variance", ["fixed", *ADAPTIVE])
def test_it_finds_its_way_from_a_sigma_that_is_far_too_small(variance):
    """The 0-1 error of a network: at sigma = .001 hardly a member differs.

    On three seeds each, fixed ended at .32 to .57, the others at 1.
    """
    model = models.make_model(
        optimizer=models.make_optimizer(
            keras_vo.GaussianSearchDistribution(variance, 0.001, None),
            population_size=16,
            seed=1,
            inner_optimizer=keras.optimizers.Adam(
                keras.optimizers.schedules.CosineDecay(0.05, 300)
            ),
        ),
        loss=models.zero_one_error,
    )
    x, y = models.make_data(60)
    step = tf.function(lambda: model.train_step((x, y)))
    for _ in range(300):
        step()
    accuracy = models.accuracy(model, x, y)
    assert accuracy < 0.7 if variance == "fixed" else accuracy > 0.95
