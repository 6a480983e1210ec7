"""Searches that must arrive: the source's figures and a hard quadratic."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_vo


def himmelblau(weights):
    x, y = weights[0][0], weights[0][1]
    return (x**2 + y - 11) ** 2 + (x + y**2 - 7) ** 2


def search(f, start, steps, seeds, inner, distribution, **kwargs):
    """The last value from each seed. All take the same compiled step."""
    mean = tf.Variable(start, dtype=tf.float32)
    optimizer = keras_vo.VOOptimizer(
        inner,
        search_distribution=distribution,
        fitness_shaping="nes",
        **kwargs,
    )
    optimizer.build([mean])
    initial = [v.numpy() for v in (mean, *optimizer.variables)]

    @tf.function
    def run():
        for _ in tf.range(steps):
            optimizer.minimize(f, [mean])

    for seed in seeds:
        for variable, value in zip(
            (mean, *optimizer.variables), initial, strict=True
        ):
            variable.assign(value)
        optimizer.base_seed.assign(seed)
        run()
        yield float(f([tf.convert_to_tensor(mean)]))


@pytest.mark.slow
def test_himmelblau_as_in_the_source():
    """Medians over 5 seeds of the objective after 59 steps from (0, 0).

    A NumPy implementation gave .24 to 1.4 (fixed), 3 to 30 (regular) and
    6e-5 to 6e-3 (natural) over 20 seeds; a median of 5 within the middle of
    these ranges. The order natural << fixed < regular is the source's.
    """
    medians = {}
    for name, variance, natural, rate in (
        ("fixed", "fixed", False, 0.1),
        ("regular", "isotropic", False, 0.05),
        ("natural", "isotropic", True, 0.1),
    ):
        ends = search(
            himmelblau,
            [0.0, 0.0],
            59,
            range(5),
            keras.optimizers.SGD(0.5),
            keras_vo.GaussianSearchDistribution(
                variance, stddev=1.0, learning_rate=rate
            ),
            population_size=200,
            natural_gradient=natural,
            antithetic=False,
        )
        medians[name] = np.median(list(ends))
    assert 0.4 < medians["fixed"] < 1.1
    assert 8 < medians["regular"] < 30
    assert 2e-4 < medians["natural"] < 4e-3


def quadratic(weights):
    """20 dimensions, curvatures from 1 to 1e4, f(start) = 1."""
    curvature = tf.constant(np.logspace(0, 4, 20), tf.float32)
    return tf.reduce_sum(curvature * weights[0] ** 2) / tf.reduce_sum(curvature)


def test_separable_adaptation_solves_an_ill_conditioned_quadratic():
    """SNES: natural gradient, rate 1 for mu, (3 + log d) / (5 sqrt d)."""
    ends = {
        variance: list(
            search(
                quadratic,
                [1.0] * 20,
                600,
                (0, 1),
                keras.optimizers.SGD(1.0),
                keras_vo.GaussianSearchDistribution(
                    variance,
                    stddev=1.0,
                    learning_rate=(3 + np.log(20)) / (5 * 20**0.5),
                    min_stddev=1e-12,
                ),
                population_size=40,
            )
        )
        for variance in ("separable", "fixed")
    }
    assert max(ends["separable"]) < 1e-6
    assert min(ends["fixed"]) > 1e-3
