"""Seeded noise: a function of (seed, generation, direction), and normal."""

import models
import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import tensorflow as tf
import tensorflow_probability as tfp

from keras_vo.search import generators, noise, seeds

each_generator = pytest.mark.parametrize("generator", generators.GENERATORS)


def draw(seed, generation, directions, size=1000, dtype=tf.float32, **kwargs):
    return models.draw_noise(
        seed, generation, directions, (size,), dtype, **kwargs
    )


def rows_of(generations, indices, size, stream=None, generator=None):
    """Rows of any generations, with base seed 3."""
    return noise.draw_noise(
        tf.constant(3, tf.int64),
        tf.constant(generations, tf.int64),
        tf.constant(indices, tf.int64),
        (size,),
        tf.float32,
        None if stream is None else tf.constant(stream, tf.int64),
        generator=generator or generators.NEWEST,
    )


@each_generator
def test_a_row_depends_on_its_own_index_only(generator):
    all_rows = draw(3, 5, range(7), generator=generator)
    np.testing.assert_array_equal(
        draw(3, 5, [4, 2], generator=generator), all_rows[[4, 2]]
    )
    np.testing.assert_array_equal(
        draw(3, 5, [3, 4, 5], generator=generator), all_rows[3:6]
    )


@each_generator
def test_seed_generation_and_direction_all_matter(generator):
    rows = [draw(3, 5, [0]), draw(4, 5, [0]), draw(3, 6, [0]), draw(3, 5, [1])]
    rows.append(draw(3 + 2**32, 5, [0]))  # all 64 bits of the seed
    rows.append(draw(3, 5 + 2**32, [0]))
    rows.append(draw(3, 5, [2**32]))
    rows = np.concatenate(rows)
    # Independent rows correlate by 0 +- 1/sqrt(1000): five deviations.
    correlation = np.corrcoef(rows) - np.eye(7)
    assert np.abs(correlation).max() < 5 / 1000**0.5


def test_graph_and_eager_agree():
    def run():
        return rows_of([2, 2, 2], [0, 1, 2], 50)

    np.testing.assert_array_equal(tf.function(run)(), run())


@each_generator
@pytest.mark.parametrize("stream", [None, 0, 1])
def test_each_row_is_that_of_its_own_generation(stream, generator):
    """In any order, some of a generation that others are of too."""
    generations, ids = [5, 2, 5, 2**40], [0, 3, 1, 0]
    rows = rows_of(generations, ids, 50, stream, generator)
    for row, generation, index in zip(rows, generations, ids, strict=True):
        alone = draw(
            3, generation, [index], 50, stream=stream, generator=generator
        )
        np.testing.assert_array_equal(row, alone[0])


@each_generator
def test_streams_are_independent(generator):
    rows = [
        draw(3, 5, 2, stream=stream, generator=generator)
        for stream in (None, 0, 1)
    ]
    correlation = np.corrcoef(np.concatenate(rows)) - np.eye(6)
    assert np.abs(correlation).max() < 5 / 1000**0.5


def test_the_first_generator_draws_by_seeds_of_tfp():
    """Those that random layers have too, with indices below 0."""
    seed = seeds.single_seed(
        seeds.generation_seed(tf.constant(3), tf.constant(5)),
        tf.constant(2, tf.int64),
    )
    normal = tfp.distributions.Normal(0.0, 1.0)
    np.testing.assert_array_equal(
        normal.sample((1000,), seed),
        draw(3, 5, [2], generator=generators.FIRST)[0],
    )


def philox(key, counter, size):
    """Random words [size]: Philox4x32-10 of Salmon et al., 2011.

    Args:
        key: an integer of 64 bits.
        counter: an integer of 128 bits, that of the first four words.
        size: a multiple of 4.
    """
    mask = 2**32 - 1
    words = []
    for now in range(counter, counter + size // 4):
        k = [key & mask, key >> 32 & mask]
        x = [now >> 32 * i & mask for i in range(4)]
        for _ in range(10):
            a, b = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
            x = [b >> 32 ^ x[1] ^ k[0], b & mask, a >> 32 ^ x[3] ^ k[1], a]
            x[3] &= mask
            k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
        words += x
    return np.array(words, np.uint32)


def philox_hadamard(seed, generation, index, size, stream=-1, bent=True):
    """A row of "philox-hadamard-2" in float64; not `bent`: of -1."""
    blocks = -(-size // 64)
    counter = generation % 2**64 + (stream % 2**64 << 64)
    low, high = map(int, philox(seed % 2**64, counter, 4)[:2])
    words = philox(low + (high << 32), index * blocks * 4, blocks * 16)
    odd = (words.view(np.int8) | 1).astype(np.float64)
    every = np.arange(-127.0, 128.0, 2.0)
    y, of_every = (o * (o**2 + 5615.0) for o in (odd, every))
    z = y.reshape(-1, 64) @ scipy.linalg.hadamard(64)
    if bent:
        bits = np.arange(64)[:, None] >> np.arange(6) & 1
        z = z * (-1.0) ** np.sum(bits[:, ::2] * bits[:, 1::2], axis=1)
    return (z / 8 / np.sqrt(np.mean(of_every**2))).ravel()[:size]


@pytest.mark.parametrize(
    ("generator", "bent"),
    [("philox-hadamard-1", False), (generators.NEWEST, True)],
)
@pytest.mark.parametrize(
    ("seed", "generation", "index", "size", "stream"),
    [
        (0, 0, 0, 64, None),
        (2**63 - 1, 2**40 + 7, 2**33 + 1, 130, None),
        (12345, 6, 7, 1, 3),
    ],
)
def test_numbers_are_those_of_a_reference(
    seed, generation, index, size, stream, generator, bent
):
    """In float64 to its last bits, in float32 to a rounding."""
    expected = philox_hadamard(
        seed, generation, index, size, -1 if stream is None else stream, bent
    )
    args = seed, generation, [index], size
    which = {"stream": stream, "generator": generator}
    found = draw(*args, tf.float64, **which)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-15)
    found = draw(*args, tf.float32, **which)[0]
    np.testing.assert_allclose(found, expected, rtol=2e-7)


@pytest.mark.parametrize("stream", [None, 1])
@pytest.mark.parametrize(
    ("generations", "indices"),
    [([5, 5, 5], [3, 4, 5]), ([5, 2**40, 5], [0, 7, 2**33])],
)
def test_xla_draws_the_same(generations, indices, stream):
    def run():
        return rows_of(generations, indices, 70, stream)

    np.testing.assert_array_equal(tf.function(run, jit_compile=True)(), run())


def test_the_shape_of_a_row_may_be_a_tensor():
    """As those of noise on activations of batches of any size are."""
    expected = draw(3, 5, range(2), 6 * 35)
    rows = models.draw_noise(3, 5, range(2), (6, 35), tf.float32)
    np.testing.assert_array_equal(rows, expected.reshape(2, 6, 35))
    for dtype in (tf.int32, tf.int64):
        shape = tf.constant([6, 35], dtype)
        unknown = noise.draw_noise(
            tf.constant(3, tf.int64),
            tf.constant([5, 5], tf.int64),
            tf.constant([0, 1], tf.int64),
            shape,
            tf.float32,
        )
        np.testing.assert_array_equal(unknown, rows)
    assert models.draw_noise(3, 5, 2, (0,), tf.float32).shape == (2, 0)
    assert models.draw_noise(3, 5, 2, (), tf.float32).shape == (2,)


def test_two_terms_for_tensorfloat_32(monkeypatch):
    """GPUs may round factors of a product to 11 bits: these have no more."""
    odd = tf.range(-127.0, 128.0, 2.0)
    values = odd * (odd * odd + generators._CUBIC)
    terms = generators._halves(values)
    np.testing.assert_array_equal(terms[0] + terms[1], values)
    for term in terms:
        bits = tf.bitcast(term, tf.int32)
        np.testing.assert_array_equal(bits % 2**13, tf.zeros_like(bits))
    expected = draw(3, 5, 2)
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [kind])
    found = generators.GENERATORS[generators.NEWEST](
        tf.constant(3, tf.int64),
        tf.constant([5, 5], tf.int64),
        tf.constant([0, 1], tf.int64),
        (1000,),
        tf.float32,
        None,
    )
    np.testing.assert_array_equal(found, expected)


@each_generator
def test_is_standard_normal(generator):
    """200,000 numbers; false-failure rate 1e-4 by construction of the bound.

    The Kolmogorov-Smirnov distance at that size would show a shift of the
    mean of 0.013 or a standard deviation off by 2 %.
    """
    values = draw(0, 0, range(200), generator=generator).ravel()
    assert scipy.stats.kstest(values, "norm").pvalue > 1e-4
    double = draw(0, 0, [0], dtype=tf.float64, generator=generator)
    assert double.dtype == np.float64


@pytest.fixture(scope="module")
def many():
    """8.4 M numbers of the newest generator, [generations, rows, blocks, 64]:
    4 generations of 256 directions.
    """
    rows = [draw(7, t, 256, 8192) for t in range(4)]
    return np.stack(rows).reshape(4, 256, 128, 64).astype(np.float64)


# Bounds of five standard errors: a false failure of one in 1.7 million for each
# number that is looked at.
_ERRORS = 5.0


def test_moments_to_the_sixth(many):
    """At 8.4 M numbers five errors are 0.0017 of the mean, 0.0024 of the
    variance, and 1.1 % of the fourth moment (kurtosis off by 0.017) and 5 %
    of the sixth.
    """
    z = many.ravel()
    moments = [1, 0, 1, 0, 3, 0, 15, 0, 105, 0, 945, 0, 10395]
    for order in range(1, 7):
        variance = moments[2 * order] - moments[order] ** 2
        error = (np.mean(z**order) - moments[order]) * z.size**0.5
        assert abs(error) < _ERRORS * variance**0.5, order


def test_many_numbers_are_normal(many):
    """The Kolmogorov-Smirnov distance of 8.4 M: at a false-failure rate of
    1e-4 a shift of the mean of 0.002 shows, or a standard deviation off by
    0.3 %.
    """
    assert scipy.stats.kstest(many.ravel(), "norm").pvalue > 1e-4


def test_tails_to_five_standard_deviations(many):
    """Of 8.4 M numbers 22,653 are beyond 3, 531 beyond 4 and 4.8 beyond 5,
    counts of Poisson's; found wrong is a tail off by 4 % at 3 standard
    deviations and by 25 % at 4, and at 5 only one three times too heavy.
    """
    z = np.abs(many.ravel())
    for limit in (3.0, 3.5, 4.0, 4.5, 5.0):
        expected = 2 * scipy.stats.norm.sf(limit) * z.size
        found = np.count_nonzero(z > limit)
        below, above = scipy.stats.poisson(expected).interval(1 - 1e-6)
        assert below <= found <= above, limit


def test_blocks_are_uncorrelated_and_of_the_right_norm(many):
    """Within blocks: the second moments of 131,072 blocks, to 0.017 (six
    errors, as there are 2,080 of them); and their squared norms, chi-squared
    of 64 degrees of freedom in mean and variance (to 1 % and 3 %).
    """
    blocks = many.reshape(-1, 64)
    covariance = blocks.T @ blocks / len(blocks)
    assert np.abs(covariance - np.eye(64)).max() < 6 * (2 / len(blocks)) ** 0.5
    squares = np.sum(blocks**2, axis=1)
    errors = np.array([128, 2 * 128**2 + 128 * 96]) / len(blocks)
    found = np.array([np.mean(squares) - 64, np.var(squares) - 128])
    assert np.all(np.abs(found) < _ERRORS * errors**0.5)


def test_sums_of_a_block_are_normal(many):
    """Of all 64 and of 32, 16 and 8 neighbours, and with the signs of any row
    of the Hadamard matrix; the Kolmogorov-Smirnov distance of 131,072 and
    more, at a false-failure rate of 1e-4 each, and moments to the sixth (five
    errors). Single cubics of bytes, as sums of 64 were without signs of a
    bent function, are none beyond 2.33 and have a sixth moment of 10.
    """
    blocks = many.reshape(-1, 64)
    for count in (64, 32, 16, 8):
        sums = blocks.reshape(-1, count).sum(axis=1) / count**0.5
        assert scipy.stats.kstest(sums, "norm").pvalue > 1e-4
        error = (np.mean(sums**6) - 15) * sums.size**0.5
        assert abs(error) < _ERRORS * (10395 - 15**2) ** 0.5
    projected = (blocks @ scipy.linalg.hadamard(64) / 8).ravel()
    assert scipy.stats.kstest(projected, "norm").pvalue > 1e-4
    assert np.abs(projected).max() > 4.5


def test_squares_of_a_block_are_uncorrelated(many):
    """E z_i^2 z_j^2 = 1 for i != j, which estimates of sigma need: the mean of
    all pairs, from the fourth moments of 131,072 blocks. It would be 0.98 with
    bytes as they are.
    """
    squares = many.reshape(-1, 64) ** 2
    pairs = (np.sum(squares, axis=1) ** 2 - np.sum(squares**2, axis=1)) / 4032
    error = np.std(pairs) / len(pairs) ** 0.5
    assert error < 2e-3
    assert abs(np.mean(pairs) - 1) < _ERRORS * error


def test_members_and_generations_are_uncorrelated(many):
    """Rows of 8,192 numbers: 1,024 of them, so 523,776 correlations of
    standard error 0.011; a false failure of one in a million each by 6.2 of
    them, and of all together by their mean square.
    """
    rows = many.reshape(1024, 8192)
    apart = (rows @ rows.T)[np.triu_indices(1024, 1)] / 8192**0.5
    assert np.abs(apart).max() < 6.2
    errors = (np.mean(apart**2) - 1) / (2 / apart.size) ** 0.5
    assert abs(errors) < _ERRORS


def test_places_of_a_row_are_independent_of_those_of_the_next(many):
    """Cross moments of the same place of neighbouring members and of
    neighbouring blocks, of z and of z^2, at 8.3 M pairs each: to 0.0018.
    """
    for z in (many, (many**2 - 1) / 2**0.5):
        for a, b in ((z[:, 1:], z[:, :-1]), (z[:, :, 1:], z[:, :, :-1])):
            products = (a * b).ravel()
            error = np.std(products) / products.size**0.5
            assert abs(np.mean(products)) < _ERRORS * error
