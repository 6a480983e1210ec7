"""Shards of a batch: members are compared by what they change."""

import keras
import models
import numpy as np
import pytest
import reference
import tensorflow as tf

import keras_vo
from keras_vo import fitness_shaping
from keras_vo.search.credit import MEMBER, Outcomes, pool
from keras_vo.search.members import Shard

DIRECTIONS = 32


class One:
    """One of several replicas: what the others sent is added."""

    def __init__(self, index, others):
        self.index, self.count = index, len(others)
        self.others, self.sent = others, None

    def sum(self, tensors):
        self.sent = [t.numpy() for t in tensors]
        return [
            tf.add_n([tf.constant(sent[i]) for sent in self.others if sent]) + t
            for i, t in enumerate(tensors)
        ]


def pooled(shard_losses, baselines, examples=None, shaping="centered_rank"):
    """Utilities [N] and losses [N] that the last replica comes to.

    Args:
        shard_losses: of each replica's members, [signs size].
        baselines: the mean's loss on each replica's shard.
        examples: that each has.
    """
    count = len(shard_losses)
    directions = sum(len(losses) for losses in shard_losses) // 2
    shape = fitness_shaping.get(shaping, antithetic=True)
    sent, result = [None] * count, None
    nothing = [
        np.zeros(2 * directions, "float32"),
        np.zeros(count, "float32"),
        np.zeros(count, "float32"),
    ]
    for replica in range(count):
        others = [*sent]
        others[replica] = nothing
        communicator = One(replica, others)
        outcomes = Outcomes(
            {MEMBER: tf.constant(shard_losses[replica], tf.float32)},
            baseline=tf.constant(baselines[replica], tf.float32),
            examples=None
            if examples is None
            else tf.constant(examples[replica]),
        )
        shard = Shard.make(directions, replica, count)
        result = pool(outcomes, shape, shard, communicator)
        sent[replica] = communicator.sent
    return result


def split(losses, replicas):
    """Of each replica, from losses [2 directions] of all."""
    by_sign = np.reshape(losses, [2, -1])
    return [
        by_sign[:, s.start : s.start + s.size].ravel()
        for s in (
            Shard.make(by_sign.shape[1], r, replicas) for r in range(replicas)
        )
    ]


@pytest.mark.parametrize("replicas", [2, 3])
@pytest.mark.parametrize("shaping", ["centered_rank", "nes", "identity"])
def test_offsets_of_shards_change_nothing(replicas, shaping):
    rng = np.random.default_rng(0)
    losses = rng.normal(size=2 * DIRECTIONS)
    want = fitness_shaping.get(shaping, True)(tf.constant(losses, tf.float32))
    offsets = 5.0 * np.arange(replicas)
    shifted = [
        part + offset
        for part, offset in zip(split(losses, replicas), offsets, strict=True)
    ]
    result = pooled(shifted, offsets, shaping=shaping)
    np.testing.assert_allclose(result.utilities, want, atol=1e-5)
    # What is reported is what was evaluated.
    assert result.losses.numpy().mean() > losses.mean() + 1


@pytest.mark.parametrize("replicas", [2, 3])
def test_the_same_shards_have_the_same_bits_as_one_replica(replicas):
    rng = np.random.default_rng(0)
    losses = rng.normal(size=2 * DIRECTIONS).astype("float32")
    result = pooled(
        split(losses, replicas), [0.1] * replicas, shaping="identity"
    )
    want = fitness_shaping.identity(tf.constant(losses), antithetic=True)
    np.testing.assert_array_equal(result.utilities, want)
    np.testing.assert_array_equal(result.losses, losses)


def test_a_shard_whose_mean_has_no_finite_loss():
    """Its members are compared with their own mean."""
    losses = [np.arange(8.0), 100 + np.arange(8.0)]
    result = pooled(losses, [3.5, np.nan])
    utilities = np.reshape(result.utilities, [2, -1])
    np.testing.assert_allclose(utilities[:, :4], utilities[:, 4:], atol=1e-6)


def test_a_shard_without_examples_and_a_member_without_a_finite_loss():
    losses = [
        np.array([1.0, 2, 3, np.nan]),
        np.zeros(4),
        np.array([4.0, 5, 6, 7]),
    ]
    result = pooled(losses, [0.0, np.nan, 3.0], examples=[2, 0, 2])
    values = result.losses.numpy().reshape(2, 3, 2)
    np.testing.assert_array_equal(values[:, 0], [[1, 2], [3, np.inf]])
    assert np.isnan(values[:, 1]).all()
    utilities = result.utilities.numpy().reshape(2, 3, 2)
    assert not utilities[:, 1].any()
    assert utilities[1, 0, 1] == utilities.max()  # the worst
    assert utilities[0, 0, 0] == utilities[0, 2, 0] == utilities.min()
    assert result.known.numpy() == 8 and result.examples.numpy() == 4


SIGMA, SIZE, STEPS = 0.1, 64, 10


def make_optimizer():
    return keras_vo.VOOptimizer(
        keras.optimizers.SGD(1.0),
        population_size=SIZE,
        search_distribution=keras_vo.GaussianSearchDistribution(
            "fixed", stddev=SIGMA
        ),
        natural_gradient=False,
        fitness_shaping="centered_rank",
        seed=0,
    )


def test_a_step_on_shards_is_as_long_as_on_one_replica():
    """On the loss y + w, where y is 0 and 1 by shard; ten steps of rate 1.

    None depends on where w is. Ranks of one weight: E|z u| / sigma = 2.85 or
    so from 64 members. A step has a relative deviation of about 4 %, the mean
    of ten 1.3 %; pooling without a baseline makes 1.41 of it.
    """
    one = []
    for generation in range(STEPS):
        z = models.draw_noise(
            0, generation, SIZE // 2, (1,), tf.float32
        ).ravel()
        z = reference.members(z, antithetic=True)
        one.append(np.mean(reference.centered_rank(z) * z) / SIGMA)
    one = np.mean(one)
    assert one == pytest.approx(2.8, rel=0.1)
    strategy = models.mirrored(2)
    with strategy.scope():
        layer = keras.layers.Dense(
            1, use_bias=False, kernel_initializer="zeros"
        )
        model = keras_vo.VOSequential([keras.Input((1,)), layer])
        model.compile(
            optimizer=make_optimizer(),
            loss=lambda y, out: tf.reduce_mean(y + out, axis=-1),
        )
        model.optimizer.build(model.trainable_variables)
    y = np.repeat([[0.0], [1.0]], 2, axis=0)
    batches = tf.data.Dataset.from_tensors((np.ones((4, 1)), y)).repeat(STEPS)
    model.fit(batches, shuffle=False, verbose=0)
    two = -model.get_weights()[0].item() / STEPS
    assert two == pytest.approx(one, rel=0.05)


def test_minimize_on_replicas_that_have_objectives_of_their_own():
    """Without a model the mean's loss is evaluated on each replica."""
    strategy = models.mirrored(2)
    with strategy.scope():
        w = tf.Variable([0.0])
        optimizer = make_optimizer()
        optimizer.build([w])

    def objective(weights):
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        return 100.0 * tf.cast(replica, tf.float32) + weights[0][0]

    @tf.function(autograph=False)
    def step():
        strategy.run(lambda: optimizer.minimize(objective, [w]))

    step()
    assert -w.numpy()[0] == pytest.approx(2.8, rel=0.2)
