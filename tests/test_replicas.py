"""How a population is shared out: pure functions."""

import numpy as np
import pytest
import tensorflow as tf

from keras_vo import fitness_shaping
from keras_vo.replicas import Share, shaped_where_evaluated, was_evaluated


@pytest.mark.parametrize("draws", [1, 2, 5, 12])
@pytest.mark.parametrize("replicas", [1, 2, 3, 7])
def test_each_draw_has_one_replica(draws, replicas):
    shares = [Share.make(draws, r, replicas) for r in range(replicas)]
    counted = [range(s.start, s.start + s.size) for s in shares if s.counts]
    assert sorted(i for r in counted for i in r) == list(range(draws))
    sizes = [len(r) for r in counted]
    assert max(sizes) - min(sizes) <= 1
    assert all(0 <= s.start < s.start + s.size <= draws for s in shares)


@pytest.mark.parametrize("replicas", [1, 2, 3, 7])
def test_placed_losses_add_up_to_all(replicas):
    """[+0, +1, ..., -0, -1, ...], with a replica that has evaluated none."""
    losses = np.arange(10, dtype="float32")
    losses[[2, 6]] = np.inf, np.nan
    total = np.zeros(10, "float32")
    missing = np.zeros(10, bool)
    for replica in range(replicas):
        share = Share.make(5, replica, replicas)
        own = losses.reshape(2, 5)[:, share.start : share.start + share.size]
        evaluated = replica != 1
        if not evaluated and share.counts:
            columns = missing.reshape(2, 5)
            columns[:, share.start : share.start + share.size] = True
        total += share.place(
            tf.constant(own.ravel()), tf.constant(evaluated)
        ).numpy()
    np.testing.assert_array_equal(was_evaluated(tf.constant(total)), ~missing)
    np.testing.assert_array_equal(total[~missing], losses[~missing])


def test_taken_rows():
    values = tf.reshape(tf.range(10), [5, 2])
    share = Share.make(5, 1, 2)
    np.testing.assert_array_equal(share.take(values), values[2:])
    idle = Share.make(1, 0, 2)
    assert not idle.counts
    np.testing.assert_array_equal(idle.take(values[:1]), [[0, 0]])


def shaped(name, losses, evaluated, signs):
    return shaped_where_evaluated(
        fitness_shaping.get(name, antithetic=signs == 2),
        tf.constant(losses, tf.float32),
        tf.constant(evaluated),
        signs,
    ).numpy()


@pytest.mark.parametrize("name", ["identity", "centered_rank", "nes"])
def test_all_evaluated_changes_no_bit(name):
    losses = np.random.default_rng(0).normal(size=12).astype("float32")
    expected = fitness_shaping.get(name, antithetic=True)(tf.constant(losses))
    np.testing.assert_array_equal(
        shaped(name, losses, np.ones(12, bool), 2), expected
    )


def test_half_evaluated_is_a_population_of_half_the_size():
    """Draws 0, 2, 4 of 6: each stands in for one other, so that standardized
    utilities are twice those of the three alone, and ranks are close."""
    losses = np.random.default_rng(1).normal(size=12).astype("float32")
    known = np.tile([True, False], 6)
    alone = tf.constant(losses[known])
    for name, tolerance in (("standardize", 1e-5), ("centered_rank", 0.2)):
        utilities = shaped(name, losses, known, 2)
        assert (utilities[~known] == 0).all()
        np.testing.assert_allclose(utilities.sum(), 0, atol=1e-5)
        expected = fitness_shaping.get(name, antithetic=True)(alone)
        np.testing.assert_allclose(
            utilities[known], 2 * expected.numpy(), rtol=tolerance
        )


def test_what_was_not_evaluated_has_no_say():
    losses = np.array([1.0, 2.0, 3.0, 4.0], "float32")
    known = np.array([True, False, True, True])
    for value in (0.0, -1e30, np.nan):
        losses[1] = value
        utilities = shaped("identity", losses, known, 1)
        assert utilities[1] == 0
        assert utilities[0] < utilities[2] < utilities[3]
        np.testing.assert_allclose(utilities.sum(), 0, atol=1e-6)


def test_none_evaluated():
    np.testing.assert_array_equal(
        shaped("centered_rank", np.zeros(4), np.zeros(4, bool), 2), 0
    )
