"""How a population is shared out, and its losses come together again."""

import numpy as np
import pytest
import tensorflow as tf

from keras_vo import fitness_shaping
from keras_vo.replicas.communicator import Replicas
from keras_vo.search import credit
from keras_vo.search.members import Shard
from keras_vo.search.missing import shaped_where_known


@pytest.mark.parametrize("directions", [1, 2, 5, 12])
@pytest.mark.parametrize("replicas", [1, 2, 3, 7])
def test_each_direction_has_one_replica(directions, replicas):
    shards = [Shard.make(directions, r, replicas) for r in range(replicas)]
    counted = [range(s.start, s.start + s.size) for s in shards if s.counts]
    assert sorted(i for r in counted for i in r) == list(range(directions))
    sizes = [len(r) for r in counted]
    assert max(sizes) - min(sizes) <= 1
    assert all(0 <= s.start < s.start + s.size <= directions for s in shards)


class Replica:
    """One of several, asked one after another.

    The first time each adds its message to that of all, and the second it
    gets what they have added up to.
    """

    def __init__(self, index, count, messages):
        self.index, self.count = index, count
        self.messages = messages

    def sum(self, tensors):
        if tf.executing_eagerly():
            self.messages.append([tensor.numpy() for tensor in tensors])
        everyones = zip(*self.messages[: self.count], strict=True)
        return [tf.constant(np.sum(values, axis=0)) for values in everyones]


@pytest.mark.parametrize("replicas", [1, 2, 3, 7])
def test_placed_losses_add_up_to_all(replicas):
    """[+0, +1, ..., -0, -1, ...], with a replica that has evaluated none.

    What is not finite is the worst, inf; what is missing NaN.
    """
    losses = np.arange(10, dtype="float32")
    losses[[2, 6]] = np.inf, np.nan
    missing = np.zeros(10, bool)
    messages = []
    for replica in [*range(replicas)] * 2:
        shard = Shard.make(5, replica, replicas)
        own = losses.reshape(2, 5)[:, shard.start : shard.start + shard.size]
        evaluated = replica != 1
        if not evaluated and shard.counts:
            columns = missing.reshape(2, 5)
            columns[:, shard.start : shard.start + shard.size] = True
        pooled = credit.pool(
            credit.Outcomes(
                {credit.MEMBER: tf.constant(own.ravel())},
                examples=tf.constant(3 * evaluated),
            ),
            lambda values: tf.where(tf.math.is_inf(values), 100.0, values),
            shard,
            Replica(replica, replicas, messages)
            if replicas > 1
            else Replicas(),
        )
    want = np.where(np.isnan(losses), np.inf, losses)
    np.testing.assert_array_equal(np.isnan(pooled.losses), missing)
    np.testing.assert_array_equal(pooled.losses[~missing], want[~missing])
    assert pooled.known == np.sum(~missing)
    assert (pooled.utilities.numpy()[missing] == 0).all()


def test_taken_rows():
    values = tf.reshape(tf.range(10), [5, 2])
    shard = Shard.make(5, 1, 2)
    np.testing.assert_array_equal(shard.take(values), values[2:])
    idle = Shard.make(1, 0, 2)
    assert not idle.counts
    np.testing.assert_array_equal(idle.take(values[:1]), [[0, 0]])


def shaped(name, losses, known, signs):
    """The utilities; they are a mean over as many members as are known.

    In a graph: eagerly there are no stand-ins, see test_fitness_shaping.
    """
    utilities, count = tf.function(
        lambda losses: shaped_where_known(
            fitness_shaping.get(name, antithetic=signs == 2), losses, signs
        )
    )(tf.constant(np.where(known, losses, np.nan), tf.float32))
    assert count == np.sum(known)
    return utilities.numpy()


@pytest.mark.parametrize("name", ["identity", "centered_rank", "nes"])
def test_all_known_changes_no_bit(name):
    losses = np.random.default_rng(0).normal(size=12).astype("float32")
    expected = fitness_shaping.get(name, antithetic=True)(tf.constant(losses))
    np.testing.assert_array_equal(
        shaped(name, losses, np.ones(12, bool), 2), expected
    )


def test_half_of_it_is_a_population_of_half_the_size():
    """Directions 0, 2, 4 of 6: each stands in for one other, so that
    standardized utilities are those of the three alone, and ranks are close."""
    losses = np.random.default_rng(1).normal(size=12).astype("float32")
    known = np.tile([True, False], 6)
    alone = tf.constant(losses[known])
    for name, tolerance in (("standardize", 1e-5), ("centered_rank", 0.2)):
        utilities = shaped(name, losses, known, 2)
        assert (utilities[~known] == 0).all()
        np.testing.assert_allclose(utilities.sum(), 0, atol=1e-5)
        expected = fitness_shaping.get(name, antithetic=True)(alone)
        np.testing.assert_allclose(
            utilities[known], expected.numpy(), rtol=tolerance
        )


def test_what_is_missing_has_no_say():
    losses = np.array([1.0, 2.0, 3.0, 4.0], "float32")
    known = np.array([True, False, True, True])
    utilities = shaped("identity", losses, known, 1)
    assert utilities[1] == 0
    assert utilities[0] < utilities[2] < utilities[3]
    np.testing.assert_allclose(utilities.sum(), 0, atol=1e-6)


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("value", [0.0, -1e30, np.nan])
def test_what_a_replica_without_examples_says_of_its_members(value, eager):
    """Nothing, whatever the number is. (Of "identity", see the docstring.)"""
    losses, messages = [[1.0, value], [3.0, 4.0]], []

    def pool(replica):
        return credit.pool(
            credit.Outcomes(
                {credit.MEMBER: tf.constant(losses[replica])},
                examples=tf.constant(replica),
            ),
            fitness_shaping.get("identity", antithetic=False),
            Shard.make(4, replica, 2),
            Replica(replica, 2, messages),
        )

    for replica in [0, 1] * 2:
        pooled = pool(replica)
    if not eager:
        pooled = tf.function(pool)(1)
    np.testing.assert_array_equal(pooled.losses, [np.nan, np.nan, 3, 4])
    share = 4 * (2 - 1) / (2 * (4 - 1))  # N (M - 1) / (M (N - 1))
    share = 1 if eager else share
    np.testing.assert_allclose(
        pooled.utilities, [0, 0, -share, share], rtol=1e-6
    )
    assert pooled.known == 2


def test_none_known():
    np.testing.assert_array_equal(
        shaped("centered_rank", np.zeros(4), np.zeros(4, bool), 2), 0
    )
