"""The Gaussian: its arguments, bounds, KL divergence and bounded steps."""

import math

import keras
import numpy as np
import pytest
import reference
import tensorflow as tf

import keras_vo
from keras_vo import search_distribution


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
    new = distribution.update(
        tf.zeros([3]), tf.constant([0.2, 1e3, -1e3])
    ).numpy()
    np.testing.assert_allclose(
        np.exp(new / 2), [math.exp(-0.05), 0.5, 2.0], rtol=1e-6
    )


def test_kl_divergence_matches_the_closed_form():
    rng = np.random.default_rng(0)
    change = rng.normal(size=6)
    log_variance, new = rng.normal(size=(2, 6))
    got = search_distribution.kl_divergence(
        tf.constant(change), tf.constant(log_variance), tf.constant(new)
    )
    want = reference.kl_divergence(
        np.zeros(6), np.exp(log_variance / 2), change, np.exp(new / 2)
    )
    np.testing.assert_allclose(got, want, rtol=1e-12)
    # One shared variance counts once for every weight.
    shared = search_distribution.kl_divergence(
        tf.zeros([6], tf.float64),
        tf.zeros([1], tf.float64),
        tf.ones([1], tf.float64),
    )
    np.testing.assert_allclose(shared, 6 * (math.exp(-1) / 2), rtol=1e-12)


def test_largest_step():
    def find(max_kl, scale=1.0):
        return search_distribution.largest_step(
            lambda share: scale * share**2, max_kl, tf.float64
        ).numpy()

    assert find(2.0) == 1.0
    for max_kl, scale in ((0.25, 1.0), (1e-3, 1.0), (0.5, 1e9)):
        share = find(max_kl, scale)
        assert scale * share**2 <= max_kl
        np.testing.assert_allclose(share, (max_kl / scale) ** 0.5, rtol=2e-3)
    # A divergence that is not a number admits no step at all.
    nothing = search_distribution.largest_step(
        lambda share: share * np.nan, 1.0, tf.float64
    )
    assert nothing.numpy() == 0.0
