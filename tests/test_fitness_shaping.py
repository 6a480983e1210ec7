"""Fitness shaping: values by hand, ties, order, sum 0, non-finite losses."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import reference
import tensorflow as tf

from keras_vo import fitness_shaping

NAMES = ["identity", "standardize", "centered_rank", "nes"]


def shape(name, losses, antithetic=False, dtype="float64"):
    losses = tf.constant(losses, dtype)
    return fitness_shaping.get(name, antithetic)(losses).numpy()


def test_values_by_hand():
    losses = [3.0, 1.0, 2.0, 6.0]
    # 3 - 9/3, 1 - 11/3, 2 - 10/3, 6 - 6/3
    np.testing.assert_allclose(
        shape("identity", losses), [0, -8 / 3, -4 / 3, 4]
    )
    # Pairs (3, 2) and (1, 6): baselines 7/2 and 5/2.
    np.testing.assert_allclose(
        shape("identity", losses, antithetic=True), [-0.5, -1.5, -1.5, 3.5]
    )
    # mean 3, variance (0 + 4 + 1 + 9) / 4
    np.testing.assert_allclose(
        shape("standardize", losses), np.array([0, -2, -1, 3]) / 3.5**0.5
    )
    np.testing.assert_allclose(
        shape("centered_rank", losses), [1 / 6, -0.5, -1 / 6, 0.5]
    )
    # log 3 - log 1, log 3 - log 2 for the best two: weights .7304, .2696.
    np.testing.assert_allclose(
        shape("nes", losses),
        [1, 1 - 4 * 0.7304226, 1 - 4 * 0.2695774, 1],
        rtol=1e-5,
    )


def test_equal_losses_share_their_rank():
    np.testing.assert_allclose(
        shape("centered_rank", [1.0, 0.0, 1.0, 0.0, 1.0]),
        [0.25, -0.375, 0.25, -0.375, 0.25],
    )


@pytest.mark.parametrize("name", NAMES)
def test_all_equal_means_no_preference(name):
    np.testing.assert_allclose(shape(name, [0.3] * 6), np.zeros(6), atol=1e-15)


@hypothesis.settings(max_examples=60, derandomize=True, deadline=None)
@hypothesis.given(
    losses=st.lists(
        st.integers(-20, 20).map(float), min_size=4, max_size=24
    ).filter(lambda v: len(set(v)) > 1 and len(v) % 2 == 0),
    name=st.sampled_from(NAMES),
)
def test_matches_reference_keeps_order_sums_to_zero(losses, name):
    utilities = shape(name, losses)
    np.testing.assert_allclose(
        utilities, reference.SHAPINGS[name](np.array(losses)), atol=1e-12
    )
    assert abs(utilities.sum()) < 1e-10
    order = np.argsort(losses, kind="stable")
    assert np.all(np.diff(utilities[order]) > -1e-12)
    if name == "identity":
        np.testing.assert_allclose(
            shape(name, losses, antithetic=True),
            reference.identity(np.array(losses), antithetic=True),
            atol=1e-12,
        )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_non_finite_loss_gets_the_worst_utility(name, bad):
    utilities = shape(name, [2.0, bad, 5.0, 1.0, 3.0, 0.0])
    assert np.all(np.isfinite(utilities))
    np.testing.assert_allclose(utilities[1], utilities.max(), rtol=1e-12)
    assert abs(utilities.sum()) < 1e-12


@pytest.mark.parametrize("name", ["centered_rank", "nes"])
def test_a_non_finite_loss_ranks_behind_every_finite_one(name):
    np.testing.assert_allclose(
        shape(name, [2.0, np.nan, 5.0, 1.0]), shape(name, [2.0, 9.0, 5.0, 1.0])
    )


@pytest.mark.parametrize("name", NAMES)
def test_no_finite_loss_gives_zeros(name):
    utilities = shape(name, [np.nan, np.inf, np.nan, -np.inf])
    np.testing.assert_allclose(utilities, np.zeros(4), atol=1e-15)


@pytest.mark.parametrize("name", NAMES)
def test_huge_losses_stay_finite(name):
    utilities = shape(name, [1e30, -1e30, 1.0, 2.0], dtype="float32")
    assert np.all(np.isfinite(utilities))


def test_a_callable_sees_finite_losses_only():
    seen = []

    def shaping(losses):
        seen.append(losses.numpy())
        return losses

    fitness_shaping.get(shaping, True)(tf.constant([1.0, np.nan, 4.0, 2.0]))
    np.testing.assert_array_equal(seen[0], [1, 4, 4, 2])


def test_a_function_of_the_package_is_its_name():
    losses = tf.constant([3.0, 1.0, 2.0, 6.0])
    for name in NAMES:
        function = getattr(fitness_shaping, name)
        assert fitness_shaping.canonical(function) == name
        np.testing.assert_array_equal(
            fitness_shaping.get(function, True)(losses),
            fitness_shaping.get(name, True)(losses),
        )
    assert fitness_shaping.canonical(len) is len


def test_errors():
    with pytest.raises(ValueError, match="one of.*centered_rank.*'rank'"):
        fitness_shaping.get("rank", False)
    wrong = fitness_shaping.get(lambda losses: losses[:2], False)
    with pytest.raises(ValueError, match=r"shape \(3,\).*shape \(2,\)"):
        wrong(tf.constant([1.0, 2.0, 3.0]))


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_columns_are_shaped_one_by_one(name, antithetic):
    """Losses [N, batch]: each column as if it were alone; ties, inf, NaN."""
    rng = np.random.default_rng(0)
    losses = rng.integers(0, 4, size=(6, 5)).astype(float)
    losses[2, 1], losses[3, 2], losses[:, 4] = np.nan, np.inf, np.nan
    got = shape(name, losses, antithetic)
    columns = [shape(name, column, antithetic) for column in losses.T]
    np.testing.assert_allclose(got, np.stack(columns, 1), atol=1e-12)
    np.testing.assert_allclose(got[:, 4], 0, atol=1e-12)


@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_equal_losses_have_utilities_of_exactly_zero(name, antithetic):
    for count in (6, 10, 128):
        for dtype in ("float32", "float64"):
            got = shape(name, [0.1] * count, antithetic, dtype)
            np.testing.assert_array_equal(got, np.zeros(count))
