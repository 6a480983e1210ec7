"""Seeded noise: a function of (seed, generation, direction), and normal."""

import models
import numpy as np
import pytest
import scipy.stats
import tensorflow as tf
import tensorflow_probability as tfp

from keras_vo.search import noise


def draw(seed, generation, directions, size=1000, dtype=tf.float32):
    return models.draw_noise(seed, generation, directions, (size,), dtype)


def test_a_row_depends_on_its_own_index_only():
    all_rows = draw(3, 5, range(7))
    np.testing.assert_array_equal(draw(3, 5, [4, 2]), all_rows[[4, 2]])


def test_seed_generation_and_direction_all_matter():
    rows = [draw(3, 5, [0]), draw(4, 5, [0]), draw(3, 6, [0]), draw(3, 5, [1])]
    rows.append(draw(3 + 2**32, 5, [0]))  # all 64 bits of the seed
    rows = np.concatenate(rows)
    # Independent rows correlate by 0 +- 1/sqrt(1000): five deviations.
    correlation = np.corrcoef(rows) - np.eye(5)
    assert np.abs(correlation).max() < 5 / 1000**0.5


def test_graph_and_eager_agree():
    seed = tf.constant(1, tf.int64)
    generations = tf.fill([3], tf.constant(2, tf.int64))
    ids = tf.range(3, dtype=tf.int64)

    def run():
        return noise.draw_noise(seed, generations, ids, (50,), tf.float32)

    np.testing.assert_array_equal(tf.function(run)(), run())


@pytest.mark.parametrize("stream", [None, 0, 1])
def test_each_row_is_that_of_its_own_generation(stream):
    """In any order, some of a generation that others are of too."""
    generations, ids = [5, 2, 5, 2**40], [0, 3, 1, 0]
    rows = noise.draw_noise(
        tf.constant(3, tf.int64),
        tf.constant(generations, tf.int64),
        tf.constant(ids, tf.int64),
        (50,),
        tf.float32,
        stream,
    )
    for row, generation, index in zip(rows, generations, ids, strict=True):
        alone = models.draw_noise(
            3, generation, [index], (50,), tf.float32, stream
        )
        np.testing.assert_array_equal(row, alone[0])


def test_streams_are_independent():
    rows = [
        models.draw_noise(3, 5, 2, (1000,), tf.float32, stream)
        for stream in (None, 0, 1)
    ]
    correlation = np.corrcoef(np.concatenate(rows)) - np.eye(6)
    assert np.abs(correlation).max() < 5 / 1000**0.5


def test_a_single_seed_is_that_of_the_directions_noise():
    """Which is what random layers are seeded by, with indices below 0."""
    seed = noise.single_seed(
        noise.generation_seed(tf.constant(3), tf.constant(5)),
        tf.constant(2, tf.int64),
    )
    normal = tfp.distributions.Normal(0.0, 1.0)
    np.testing.assert_array_equal(
        normal.sample((1000,), seed), draw(3, 5, [2])[0]
    )


def test_is_standard_normal():
    """200,000 numbers; false-failure rate 1e-4 by construction of the bound.

    The Kolmogorov-Smirnov distance at that size would show a shift of the
    mean of 0.013 or a standard deviation off by 2 %.
    """
    values = draw(0, 0, range(200)).ravel()
    assert scipy.stats.kstest(values, "norm").pvalue > 1e-4
    assert draw(0, 0, [0], dtype=tf.float64).dtype == np.float64
