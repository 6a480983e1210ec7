"""Chunks: plans, padding, kept or redrawn noise, ways to evaluate."""

import functools

import models
import numpy as np
import pytest
import tensorflow as tf

from keras_vo.evaluation.graph import evaluate
from keras_vo.evaluation.isolation import Isolation
from keras_vo.search.chunks import ChunkPlan, NoiseSource
from keras_vo.search.credit import MEMBER, each, reduce_noise
from keras_vo.search.members import Members, Shard

D = 5


def make_source(directions, chunk, keep, signs=(1.0,), activations=()):
    members = Members.of_generation(
        tf.constant(1), tf.constant(0), directions * len(signs), len(signs) == 2
    )
    assert members.signs == signs and members.directions == directions
    plan = ChunkPlan(directions, chunk, keep)
    return NoiseSource(plan, members, D, tf.float32, activations)


def drawn(directions):
    return models.draw_noise(1, 0, directions, (D,), tf.float32)


def cubes(z, signs):
    mean = np.arange(D)
    return np.concatenate([((mean + s * 0.5 * z) ** 3).sum(-1) for s in signs])


def cube(noise, sign):
    """The loss of the member with this noise and sign, and no records."""
    weights = tf.range(float(D)) + sign * 0.5 * noise.weights
    return {MEMBER: tf.reduce_sum(weights**3)}, ()


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
    directions = 7

    def run():
        found = evaluate(
            cube,
            make_source(directions, min(chunk, directions), keep, signs),
            Isolation([]),
        )
        losses = found.losses[MEMBER]
        return losses, found.reduce(weighted, [losses[:directions]])[0]

    losses, total = (tf.function(run, autograph=False) if graph else run)()
    z = drawn(directions)
    want = cubes(z, signs)
    np.testing.assert_allclose(losses, want, rtol=1e-5)
    np.testing.assert_allclose(total, want[:directions] @ z, rtol=1e-4)


def weighted(noise, records, rows):
    return [tf.linalg.matvec(noise.weights, rows[0], transpose_a=True)]


@pytest.mark.parametrize("chunk", [1, 3, 4, 7])
def test_a_row_for_each_direction(chunk):
    """Padding repeats the last direction: no row may have it twice."""
    source = make_source(7, chunk, keep=False)
    reduce = functools.partial(reduce_noise, source)
    rows = each(reduce, lambda noise: noise.weights[:, :2], 7)
    np.testing.assert_array_equal(rows, drawn(7)[:, :2])


@pytest.mark.parametrize(
    "chunk, keep, graph",
    [
        (1, True, False),
        (1, False, True),
        (4, True, True),
        (4, False, False),
        (6, True, True),
    ],
)
def test_a_table_of_several_generations(chunk, keep, graph):
    """Each row is the member that it was in the generation that drew it."""
    rows = [(4, 1), (0, 0), (4, 0), (7, 3), (0, 5), (4, 1)]
    generation, index = zip(*rows, strict=True)
    members = Members(
        tf.constant(1, tf.int64),
        tf.constant(generation, tf.int64),
        tf.constant(index, tf.int64),
        (1.0, -1.0),
        6,
    )
    activations = (tf.zeros([2]), tf.zeros([3]))

    def run():
        source = NoiseSource(
            ChunkPlan(len(rows), chunk, keep), members, D, tf.float32
        )
        found = evaluate(cube, source, Isolation([]))
        losses = found.losses[MEMBER]
        chunks = [
            NoiseSource(
                ChunkPlan(len(rows), chunk, False),
                members,
                D,
                tf.float32,
                activations,
            ).chunk(tf.constant(i))
            for i in range(-(-len(rows) // chunk))
        ]
        perturbed = [
            tf.concat(parts, 0)[: len(rows)]
            for parts in zip(*(c.activations for c in chunks), strict=True)
        ]
        sums = [
            found.reduce(weighted, [losses[: len(rows)]])[0],
            reduce_noise(source, weighted, [losses[: len(rows)]])[0],
        ]
        return losses, sums, perturbed

    losses, sums, perturbed = (
        tf.function(run, autograph=False) if graph else run
    )()
    z = np.concatenate(
        [models.draw_noise(1, t, [i], (D,), tf.float32) for t, i in rows]
    )
    want = cubes(z, members.signs)
    np.testing.assert_allclose(losses, want, rtol=1e-5)
    for total in sums:
        np.testing.assert_allclose(total, want[: len(rows)] @ z, rtol=1e-4)
    for stream, got in enumerate(perturbed):
        expected = [
            models.draw_noise(1, t, [i], (2 + stream,), tf.float32, stream)
            for t, i in rows
        ]
        np.testing.assert_array_equal(got, np.concatenate(expected))
    # A replica's rows of the table are those rows.
    some = members.shard(Shard.make(len(rows), 1, 2))
    np.testing.assert_array_equal(some.generation, generation[3:])
    np.testing.assert_array_equal(some.index, index[3:])
    assert len(some) == 6 and some.signs == members.signs


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

    @tf.function(autograph=False)
    def run():
        return evaluate(
            lambda noise, _: (
                {MEMBER: tf.ensure_shape(loss(noise.weights), [])},
                (),
            ),
            make_source(6, 4, True),
            Isolation([]),
            jit_compile,
        ).losses[MEMBER]

    want = value(drawn(6))
    np.testing.assert_allclose(run(), want, rtol=1e-4, atol=1e-5)


def test_the_objectives_own_error_is_raised():
    def broken(noise, sign):
        raise ValueError("my objective is broken")

    @tf.function(autograph=False)
    def run():
        return evaluate(broken, make_source(4, 4, True), Isolation([])).losses

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
    """Perturbed activations, of a batch of known or unknown size."""
    mebi = 2**20

    def chunk(directions, activation_bytes, chunk_size=None):
        if tensor:
            activation_bytes = tf.constant(activation_bytes, tf.int64)
        plan = ChunkPlan.make(
            directions, 2, 4, 512 * mebi, chunk_size, activation_bytes
        )
        return int(plan.chunk)

    assert chunk(128, 4 * mebi - 20) == 128
    assert chunk(128, 4 * mebi) == 7  # fewer than 32 MiB
    assert chunk(10**6, 512) == 10**6
    assert chunk(10**6, 1024) == 64
    assert chunk(1000, 100 * mebi) == 1  # 100 GB in all
    assert chunk(8, 4 * mebi, chunk_size=4) == 2
