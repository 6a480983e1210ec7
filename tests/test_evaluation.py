"""Chunks: plans, padding, kept or redrawn noise, ways to evaluate."""

import models
import numpy as np
import pytest
import tensorflow as tf

from keras_vo import noise
from keras_vo.chunks import ChunkPlan, NoiseSource
from keras_vo.evaluation import Outcome, evaluate_population

D = 5


def make_source(draws, chunk, keep):
    seed = noise.generation_seed(tf.constant(1), tf.constant(0))
    return NoiseSource(ChunkPlan(draws, chunk, keep), seed, D, tf.float32)


def expected_losses(draws, signs):
    seed = noise.generation_seed(tf.constant(1), tf.constant(0))
    z = noise.draw_noise(
        seed, tf.range(draws, dtype=tf.int64), (D,), tf.float32
    )
    mean = np.arange(D)
    return np.concatenate(
        [((mean + s * 0.5 * z.numpy()) ** 3).sum(-1) for s in signs]
    ), z.numpy()


@pytest.mark.parametrize(
    "case",
    list(
        models.pairwise(
            chunk=[1, 3, 7, 10],
            signs=[(1.0,), (1.0, -1.0)],
            graph=[False, True],
            keep=[False, True],
        )
    ),
    ids=models.name_of,
)
def test_losses_and_sums_do_not_depend_on_chunks(case):
    chunk, signs, graph, keep = case.values()
    draws = 7

    def run():
        population = evaluate_population(
            lambda draws, sign: Outcome(
                tf.reduce_sum(
                    (tf.range(float(D)) + sign * 0.5 * draws.weights) ** 3
                )
            ),
            make_source(draws, min(chunk, draws), keep),
            signs,
        )
        (total,) = population.reduce(
            lambda draws, _, w: [
                tf.linalg.matvec(draws.weights, w, transpose_a=True)
            ],
            [population.losses[:draws]],
        )
        return population.losses, total

    losses, total = (tf.function(run) if graph else run)()
    want, z = expected_losses(draws, signs)
    np.testing.assert_allclose(losses, want, rtol=1e-5)
    np.testing.assert_allclose(total, want[:draws] @ z, rtol=1e-4)


def conv(w):
    image = tf.ones([1, 3, 3, 1]) * w[0]
    kernel = tf.reshape(w[1:5], [2, 2, 1, 1])
    return tf.reduce_sum(tf.nn.conv2d(image, kernel, 1, "VALID"))


def loop(w):
    return tf.while_loop(
        lambda i, _: i < 3, lambda i, a: (i + 1, a + w[0]), (0, w[1])
    )[1]


LOSSES = {
    "conv": (conv, lambda w: 4 * w[:, 0] * w[:, 1:5].sum(-1)),
    "loop": (loop, lambda w: 3 * w[:, 0] + w[:, 1]),
    "cond": (
        lambda w: tf.cond(w[0] > 0, lambda: w[1], lambda: w[2]),
        lambda w: np.where(w[:, 0] > 0, w[:, 1], w[:, 2]),
    ),
    "numpy": (
        lambda w: tf.numpy_function(np.prod, [w], tf.float32),
        lambda w: w.prod(-1),
    ),
}


@pytest.mark.parametrize(
    "name, jit_compile",
    # XLA compiles no Python function, here as anywhere.
    [(n, jit) for n in LOSSES for jit in (False, True)][:-1],
)
def test_ops_with_and_without_a_vectorized_form(name, jit_compile):
    loss, value = LOSSES[name]

    @tf.function
    def run():
        return evaluate_population(
            lambda draws, _: Outcome(tf.ensure_shape(loss(draws.weights), [])),
            make_source(6, 4, True),
            (1.0,),
            jit_compile,
        ).losses

    _, z = expected_losses(6, (1.0,))
    np.testing.assert_allclose(run(), value(z), rtol=1e-4, atol=1e-5)


def test_the_objectives_own_error_is_raised():
    def broken(draws, sign):
        raise ValueError("my objective is broken")

    @tf.function
    def run():
        return evaluate_population(
            broken, make_source(4, 4, True), (1.0,)
        ).losses

    with pytest.raises(ValueError, match="my objective is broken"):
        run()


def test_plan_keeps_within_the_budget():
    mebi = 2**20
    small = ChunkPlan.make(128, 2, 4 * 5000, 512 * mebi, None)
    assert small.keep_noise and small.chunks * small.chunk == 128
    large = ChunkPlan.make(8192, 2, 4 * 100_000, 512 * mebi, None)
    assert not large.keep_noise
    assert large.chunk * 4 * 100_000 * 5 <= 512 * mebi
    # The same peak, however large the population.
    huge = ChunkPlan.make(10**6, 2, 4 * 100_000, 512 * mebi, None)
    assert huge.chunk <= large.chunk + 1
    tight = ChunkPlan.make(10, 2, 100 * mebi, mebi, None)
    assert tight.chunk == 1 and not tight.keep_noise
    assert ChunkPlan.make(10, 2, 4, mebi, 6).chunk == 3
    assert ChunkPlan.make(10, 2, 4, mebi, 1).chunk == 1
    assert ChunkPlan.make(10, 1, 4, mebi, 10**6).chunk == 10


@pytest.mark.parametrize("tensor", [False, True])
def test_plan_evaluates_once_what_fits_the_budget(tensor):
    """Perturbed activations of draws, of a batch of known or unknown size."""
    mebi = 2**20

    def chunk(draws, activation_bytes, chunk_size=None):
        if tensor:
            activation_bytes = tf.constant(activation_bytes, tf.int64)
        plan = ChunkPlan.make(
            draws, 2, 4, 512 * mebi, chunk_size, activation_bytes
        )
        return int(plan.chunk)

    assert chunk(128, 4 * mebi - 20) == 128
    assert chunk(128, 4 * mebi) == 7  # fewer than 32 MiB
    assert chunk(10**6, 512) == 10**6
    assert chunk(10**6, 1024) == 64
    assert chunk(1000, 100 * mebi) == 1  # 100 GB in all
    assert chunk(8, 4 * mebi, chunk_size=4) == 2
