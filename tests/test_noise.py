"""Seeded noise: a function of (seed, generation, draw), and normal."""

import numpy as np
import scipy.stats
import tensorflow as tf

from keras_vo import noise


def draw(seed, generation, draws, size=1000, dtype=tf.float32):
    key = noise.generation_seed(tf.constant(seed), tf.constant(generation))
    ids = tf.constant(draws, tf.int64)
    return noise.draw_noise(key, ids, (size,), dtype).numpy()


def test_a_row_depends_on_its_own_index_only():
    all_rows = draw(3, 5, range(7))
    np.testing.assert_array_equal(draw(3, 5, [4, 2]), all_rows[[4, 2]])


def test_seed_generation_and_draw_all_matter():
    rows = [draw(3, 5, [0]), draw(4, 5, [0]), draw(3, 6, [0]), draw(3, 5, [1])]
    rows.append(draw(3 + 2**32, 5, [0]))  # all 64 bits of the seed
    rows = np.concatenate(rows)
    # Independent rows correlate by 0 +- 1/sqrt(1000): five deviations.
    correlation = np.corrcoef(rows) - np.eye(5)
    assert np.abs(correlation).max() < 5 / 1000**0.5


def test_graph_and_eager_agree():
    key = noise.generation_seed(tf.constant(1), tf.constant(2))
    ids = tf.range(3, dtype=tf.int64)

    @tf.function
    def in_graph():
        return noise.draw_noise(key, ids, (50,), tf.float32)

    np.testing.assert_array_equal(
        in_graph(), noise.draw_noise(key, ids, (50,), tf.float32)
    )


def test_is_standard_normal():
    """200,000 numbers; false-failure rate 1e-4 by construction of the bound.

    The Kolmogorov-Smirnov distance at that size would show a shift of the
    mean of 0.013 or a standard deviation off by 2 %.
    """
    values = draw(0, 0, range(200)).ravel()
    assert scipy.stats.kstest(values, "norm").pvalue > 1e-4
    assert draw(0, 0, [0], dtype=tf.float64).dtype == np.float64
