"""The Gaussian: its arguments, bounds, KL divergence and bounded steps."""

import math

import keras
import numpy as np
import pytest
import reference
import tensorflow as tf

import keras_vo
from keras_vo import search_distribution
from keras_vo.search import gaussian, rules
from keras_vo.search.estimators import Direction
from keras_vo.search.layout import WeightLayout


def test_names_and_round_trip():
    for name in ("fixed", "isotropic", "layerwise", "separable"):
        distribution = search_distribution.get(name)
        assert distribution.variance == name
        assert distribution.adapts == (name != "fixed")
    original = keras_vo.GaussianSearchDistribution("separable", 0.3, 0.7, 0.1)
    config = keras.saving.serialize_keras_object(original)
    copy = keras.saving.deserialize_keras_object(config)
    assert copy.get_config() == original.get_config()
    assert search_distribution.get(original) is original


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"variance": "diagonal"}, "one of.*separable.*'diagonal'"),
        ({"stddev": 0.0}, "`stddev` must be a positive.*stddev=0.0"),
        ({"stddev": -1}, "stddev=-1"),
        ({"stddev": math.nan}, "stddev=nan"),
        ({"stddev": "big"}, "stddev='big'"),
        ({"learning_rate": 0}, "`learning_rate` must be.*learning_rate=0"),
        ({"min_stddev": 0.0}, "`min_stddev` must be.*min_stddev=0.0"),
        ({"max_stddev": math.inf}, "`max_stddev` must be.*max_stddev=inf"),
        ({"min_stddev": 2.0, "max_stddev": 1.0}, "min_stddev=2.0.*max_stdd"),
        ({"stddev": 2.0, "max_stddev": 1.0}, "stddev=2.0, max_stddev=1.0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        keras_vo.GaussianSearchDistribution(**arguments)


def test_unknown_distribution():
    with pytest.raises(ValueError, match="one of.*fixed.*Received.*'round'"):
        search_distribution.get("round")


def test_what_is_fixed_follows_nothing():
    for variance in ("fixed", "isotropic", "layerwise", "separable"):
        own = keras_vo.GaussianSearchDistribution(variance)
        assert own.follows_mean == (variance != "fixed")
        other = keras_vo.GaussianSearchDistribution(variance, follow_mean=False)
        assert not other.follows_mean
        for one in (own, other):
            copy = keras_vo.GaussianSearchDistribution.from_config(
                one.get_config()
            )
            assert copy.get_config() == one.get_config()


def test_update_is_a_step_within_bounds():
    distribution = keras_vo.GaussianSearchDistribution(
        "separable", 1.0, learning_rate=0.5, min_stddev=0.5, max_stddev=2.0
    )
    variable = tf.zeros([3])
    (descent,) = distribution.rules([variable], population_size=8)
    state = gaussian.Gaussian(
        distribution.layout([variable]), [variable], tf.zeros([3])
    )
    gradient = tf.constant([0.2, 1e3, -1e3])
    step = rules.Step(
        state, Direction(tf.zeros([3]), gradient, tf.ones([3])), tf.constant(0)
    )
    assert descent.init(state.log_variance) == {}
    assert descent.base_stddev({}) is None
    start = rules.Proposal(tf.ones([3]), state.log_variance)
    new = descent.propose(step, start, {})
    np.testing.assert_allclose(
        np.exp(new.log_variance / 2), [math.exp(-0.05), 0.5, 2.0], rtol=1e-6
    )
    assert new.mean is start.mean and new.fraction is None


def test_kl_divergence_matches_the_closed_form():
    rng = np.random.default_rng(0)
    change = rng.normal(size=6)
    log_variance, new = rng.normal(size=(2, 6))
    got = gaussian.kl_divergence(
        tf.constant(change), tf.constant(log_variance), tf.constant(new)
    )
    want = reference.kl_divergence(
        np.zeros(6), np.exp(log_variance / 2), change, np.exp(new / 2)
    )
    np.testing.assert_allclose(got, want, rtol=1e-12)
    # One shared variance counts once for every weight.
    shared = gaussian.kl_divergence(
        tf.zeros([6], tf.float64),
        tf.zeros([1], tf.float64),
        tf.ones([1], tf.float64),
    )
    np.testing.assert_allclose(shared, 6 * (math.exp(-1) / 2), rtol=1e-12)


@pytest.mark.parametrize("groups", [(0, 1), None])
def test_a_step_is_shrunk_along_its_own_direction(groups):
    """To just within the bound; a step that is within it is left as it is."""
    rng = np.random.default_rng(0)
    layout = WeightLayout(((4,), (2,)), ("float64",) * 2, groups)
    mean, change = rng.normal(size=(2, 6))
    beta, moved = rng.normal(size=(2, layout.num_groups))
    tensors = layout.unflatten(tf.constant(mean))
    state = gaussian.Gaussian(layout, tensors, tf.constant(beta))
    direction = Direction(tf.constant(change), tf.constant(moved), None)
    step = rules.Step(state, direction, tf.constant(0))
    whole = rules.Proposal(
        tf.constant(mean + change), tf.constant(beta + moved)
    )

    def divergence(proposal):
        sigma, new_sigma = (
            np.exp(np.broadcast_to(layout.expand(b), [6]) / 2)
            for b in (state.log_variance, proposal.log_variance)
        )
        return reference.kl_divergence(
            mean, sigma, proposal.mean.numpy(), new_sigma
        )

    assert divergence(whole) > 0.5
    shrunk = rules.MaxKL(0.01).propose(step, whole, {})
    assert 0.0099 < divergence(shrunk) <= 0.01
    part = shrunk.fraction.numpy()
    np.testing.assert_allclose(shrunk.mean, mean + part * change)
    np.testing.assert_allclose(shrunk.log_variance, beta + part * moved)
    far = rules.MaxKL(1e3).propose(step, whole, {})
    assert far.fraction == 1.0
    np.testing.assert_array_equal(far.mean, whole.mean)
    np.testing.assert_allclose(far.log_variance, whole.log_variance)


def test_largest_fraction():
    def find(max_kl, scale=1.0):
        return rules.largest_fraction(
            lambda part: scale * part**2, max_kl, tf.float64
        ).numpy()

    assert find(2.0) == 1.0
    for max_kl, scale in ((0.25, 1.0), (1e-3, 1.0), (0.5, 1e9)):
        part = find(max_kl, scale)
        assert scale * part**2 <= max_kl
        np.testing.assert_allclose(part, (max_kl / scale) ** 0.5, rtol=2e-3)
    # A divergence that is not a number admits no step at all.
    nothing = rules.largest_fraction(
        lambda part: part * np.nan, 1.0, tf.float64
    )
    assert nothing.numpy() == 0.0
