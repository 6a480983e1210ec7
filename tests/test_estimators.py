"""Search gradients: the reference, exact expectations, Fisher information."""

import numpy as np
import pytest
import reference
import tensorflow as tf
import tensorflow_probability as tfp

from keras_vo import fitness_shaping
from keras_vo.search import estimators
from keras_vo.search.layout import WeightLayout

SHAPES = ((2, 2), (2,), (3,))  # d = 9
GROUPS = {
    "isotropic": (0, 0, 0),
    "layerwise": (0, 0, 1),
    "separable": None,
}
INDICES = {
    "isotropic": [range(9)],
    "layerwise": [range(6), range(6, 9)],
    "separable": [[j] for j in range(9)],
}


def make_layout(structure):
    return WeightLayout(SHAPES, ("float64",) * 3, GROUPS[structure])


def sizes(layout):
    """Number of weights of each variance, float64."""
    if layout.groups is None:
        return tf.ones([layout.num_groups], tf.float64)
    return tf.constant(layout.group_sizes, tf.float64)


def by_sign(utilities, antithetic):
    """[N], members n and n + N/2 a pair, to [directions, signs]."""
    return tf.transpose(tf.reshape(utilities, [1 + antithetic, -1]))


def estimate(noise, utilities, stddev, layout, antithetic, natural):
    """What the optimizer computes, from the pure functions."""
    odd, even = estimators.pair_utilities(by_sign(utilities, antithetic))
    n = utilities.shape[0]
    grad = estimators.mean_gradient(
        estimators.weighted_noise(noise, odd), stddev, n
    )
    grad_beta = estimators.log_variance_gradient(
        estimators.weighted_excess(noise, even, layout), n
    )
    if natural:
        grad *= estimators.natural_mean_scale(stddev)
        grad_beta = estimators.natural_log_variance_gradient(
            grad_beta, sizes(layout) / 2
        )
    return grad, grad_beta


@pytest.mark.parametrize("structure", GROUPS)
@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("natural", [False, True])
def test_matches_the_reference(structure, antithetic, natural):
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(5, 9))
    utilities = rng.normal(size=10 if antithetic else 5)
    layout = make_layout(structure)
    beta = rng.normal(size=layout.num_groups)
    sigma = np.broadcast_to(layout.expand(tf.constant(np.exp(beta / 2))), [9])
    got = estimate(
        tf.constant(noise),
        tf.constant(utilities),
        tf.constant(sigma),
        layout,
        antithetic,
        natural,
    )
    want = reference.gradients(
        reference.members(noise, antithetic),
        utilities,
        sigma,
        INDICES[structure],
        natural,
    )
    np.testing.assert_allclose(got[0], want[0], rtol=1e-12)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-12)


def replicate(f, structure, antithetic, repeats, draws=8, seed=0):
    """Gradient estimates [repeats, ...] with identity shaping, sigma = 0.5."""
    rng = np.random.default_rng(seed)
    layout = make_layout(structure)
    mu = np.linspace(-1.0, 1.0, 9)
    shape = fitness_shaping.get("identity", antithetic)
    stddev = tf.constant([0.5], tf.float64)

    @tf.function(autograph=False)
    def gradients(noise, losses):
        return tf.concat(
            estimate(
                noise, shape(losses), stddev, layout, antithetic, natural=False
            ),
            axis=0,
        )

    estimates = []
    for _ in range(repeats):
        noise = rng.normal(size=(draws, 9))
        z = reference.members(noise, antithetic)
        losses = tf.constant([f(mu + 0.5 * row) for row in z])
        estimates.append(gradients(tf.constant(noise), losses))
    return mu, np.array(estimates)


SLOPE = np.arange(1.0, 10.0)


@pytest.mark.parametrize("structure", GROUPS)
@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("kind", ["linear", "quadratic"])
def test_identity_shaping_is_unbiased(structure, antithetic, kind):
    """600 estimates of 8 draws; z-score below 4.5 in each component.

    At most 18 components: false-failure rate 18 * 7e-6 = 1e-4. A factor
    N / (N - 1) in the pair baseline (16/15) would show at 10 deviations.
    """

    def linear(w):
        return 7.0 + SLOPE @ w

    def quadratic(w):
        return 7.0 + 0.5 * SLOPE @ w**2

    f = linear if kind == "linear" else quadratic
    mu, estimates = replicate(f, structure, antithetic, repeats=600)
    if kind == "linear":
        want_mu, per_weight = SLOPE, np.zeros(9)
    else:  # U = f(mu) + sum c sigma^2 / 2: dU/dbeta_j = c_j sigma^2 / 2
        want_mu, per_weight = SLOPE * mu, SLOPE * 0.5**2 / 2
    want_beta = [per_weight[list(i)].sum() for i in INDICES[structure]]
    want = np.concatenate([want_mu, want_beta])
    error = estimates.std(axis=0, ddof=1) / 600**0.5
    deviation = estimates.mean(axis=0) - want
    assert np.all(np.abs(deviation) < 4.5 * error + 1e-12)
    if antithetic and kind == "linear":
        # Odd f: pairs cancel, no noise is left in the gradient of beta.
        np.testing.assert_allclose(estimates[:, 9:], 0.0, atol=1e-12)


def test_antithetic_pairs_on_an_even_function():
    """Zero variance for mu; twice the variance for beta.

    Var doubles because N members hold N / 2 independent values of an even f.
    20,000 estimates each: the ratio of two variances has a relative deviation
    of about 2 %, so [1.85, 2.15] fails falsely with a rate below 1e-6 and
    would show a ratio of 1 or 4 at once.
    """
    rng = np.random.default_rng(1)
    layout = WeightLayout(((2,),), ("float64",), (0,))
    members, repeats = 4, 20_000
    variances = {}
    for antithetic in (False, True):
        draws = members // 2 if antithetic else members
        noise = rng.normal(size=(repeats, draws, 2))
        mirrored = np.concatenate([noise, -noise], axis=1)
        z = mirrored if antithetic else noise
        utilities = (z**2).sum(-1) - 2.0  # a known baseline
        pairs = tf.vectorized_map(
            lambda row, pairs=antithetic: estimators.pair_utilities(
                by_sign(row, pairs)
            ),
            tf.constant(utilities),
        )
        odd, even = (values.numpy() for values in pairs)
        if antithetic:
            assert not odd.any()
        estimates = list(zip(even, noise, strict=True))
        sums = [w @ ((n**2).sum(-1) - 2.0) for w, n in estimates]
        variances[antithetic] = np.var(sums)
    # The estimator is those sums, up to a constant:
    even, noise = estimates[0]
    got = estimators.weighted_excess(
        tf.constant(noise), tf.constant(even), layout
    )
    np.testing.assert_allclose(got[0], sums[0], rtol=1e-12)
    assert 1.85 < variances[True] / variances[False] < 2.15


@pytest.mark.parametrize("structure", GROUPS)
def test_natural_gradient_is_inverse_fisher_times_gradient(structure):
    """F from the scores of 40,000 samples of a TFP distribution.

    Entries of the Monte-Carlo F deviate by about 1 % (sd of squared scores);
    rtol 6 % fails falsely with a rate below 1e-6 and shows a missing factor
    D or 1/2.
    """
    layout = make_layout(structure)
    groups = layout.num_groups
    beta = tf.constant(np.linspace(-1, 1, groups))
    group_of = [
        g for j in range(9) for g in range(groups) if j in INDICES[structure][g]
    ]
    sigma = tf.gather(tf.exp(beta / 2), group_of)
    normal = tfp.distributions.Normal(tf.zeros([9], tf.float64), sigma)
    samples = normal.sample(40_000, seed=(1, 2))

    parameters = tf.concat([tf.zeros([9], tf.float64), beta], axis=0)
    rows = tf.tile(parameters[tf.newaxis], [40_000, 1])
    with tf.GradientTape() as tape:
        tape.watch(rows)
        scale = tf.gather(tf.exp(rows[:, 9:] / 2), group_of, axis=-1)
        normal = tfp.distributions.Normal(rows[:, :9], scale)
        total = tf.reduce_sum(normal.log_prob(samples))
    scores = tape.gradient(total, rows).numpy()
    fisher = scores.T @ scores / len(scores)
    diagonal = np.diag(fisher)
    # Off the diagonal F is 0.
    scaled = fisher / np.sqrt(np.outer(diagonal, diagonal))
    np.testing.assert_allclose(scaled, np.eye(len(diagonal)), atol=0.05)

    gradient = tf.constant(np.random.default_rng(0).normal(size=9))
    np.testing.assert_allclose(
        estimators.natural_mean_scale(sigma) * gradient,
        gradient / diagonal[:9],
        rtol=0.06,
    )
    gradient = tf.constant(np.random.default_rng(1).normal(size=groups))
    np.testing.assert_allclose(
        estimators.natural_log_variance_gradient(gradient, sizes(layout) / 2),
        gradient / diagonal[9:],
        rtol=0.06,
    )
