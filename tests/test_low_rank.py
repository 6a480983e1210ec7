"""LowRankDense: noise of low rank, its search gradients, a plain Dense."""

import keras
import models
import numpy as np
import pytest
import tensorflow as tf
from test_local_reparameterization import gradients, make_model, z_scores

import keras_vo
from keras_vo.layers import LowRankDense
from keras_vo.search import low_rank

IN, OUT, BATCH = 3, 2, 4


def factors(rank, n, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, rank, IN)), rng.normal(size=(n, rank, OUT))


@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("separable", [False, True])
def test_the_product_is_that_with_the_noise_of_the_kernel(rank, separable):
    left, right = (f[0] for f in factors(rank, 1))
    rng = np.random.default_rng(1)
    x = rng.normal(size=(BATCH, IN))
    stddev = rng.uniform(1, 2, size=(IN, OUT)) if separable else np.array(0.3)
    noise = left.T @ right / rank**0.5
    np.testing.assert_allclose(low_rank.kernel_noise(left, right), noise)
    got = low_rank.product(*map(tf.constant, (x, stddev, left, right)))
    np.testing.assert_allclose(got, x @ (stddev * noise))


@pytest.mark.parametrize("rank", [1, 3])
def test_the_sums_are_those_over_the_members(rank):
    left, right = factors(rank, 5)
    u = np.random.default_rng(1).normal(size=5)
    noise = np.einsum("nri,nro->nio", left, right) / rank**0.5
    np.testing.assert_allclose(
        low_rank.mean_sums(*map(tf.constant, (left, right, u))),
        np.einsum("n,nio->io", u, noise),
    )
    rows = np.einsum("n,ni->i", u, (left**2 - 1).sum(1))
    columns = np.einsum("n,no->o", u, (right**2 - 1).sum(1))
    total = (OUT * rows.sum() + IN * columns.sum()) / (IN + OUT)
    arguments = [tf.constant(a) for a in (left, right, u)]
    np.testing.assert_allclose(
        low_rank.log_variance_sums(*arguments, shared=True), total
    )
    np.testing.assert_allclose(
        low_rank.log_variance_sums(*arguments, shared=False),
        rows[:, None] / OUT + columns / IN - total / (IN * OUT),
    )


# --- closed forms, through training ---


def linear_and_squares(y_true, y_pred):
    """t . Z + q |Z|^2"""
    t, q = y_true[:, :-1], y_true[:, -1:]
    return tf.reduce_sum(t * y_pred + q * y_pred**2, axis=-1)


def cubes(y_true, y_pred):
    return tf.reduce_sum(y_pred**3, axis=-1)


@pytest.mark.parametrize(
    "rank, variance, antithetic",
    [
        (1, "separable", True),
        (4, "isotropic", False),
    ],
)
def test_unbiased(rank, variance, antithetic):
    """A linear f for mu, a quadratic one for beta, in closed form.

    f = t . Z has dU/dmu = t A; f = |Z|^2 has dU/dsigma^2 = A^2, of which each
    weight's own estimate is the mean of its row and of its column (A^2 does
    not differ between columns: the projection changes nothing). 60 steps of
    1024 members. A Student-t with 59 degrees of freedom is beyond 5 with a
    probability of 6e-6: of 2 tests of 16 numbers, 2e-4.
    """
    rng = np.random.default_rng(0)
    x, t = rng.normal(size=(BATCH, IN)), rng.normal(size=(BATCH, OUT))
    a = np.concatenate([x, np.ones((BATCH, 1))], 1)
    model = make_model(
        [lambda: LowRankDense(OUT, rank=rank, bias_initializer="normal")],
        x,
        loss=linear_and_squares,
        population_size=1024,
        variance=variance,
        antithetic=antithetic,
    )

    y = np.concatenate([t, np.zeros((BATCH, 1))], 1)
    samples = [gradients(model, x, y)[0] for _ in range(60)]
    want = (a.T @ t / BATCH).ravel()
    scores, error = z_scores(samples, want)
    assert np.abs(scores).max() < 5
    assert np.median(error / np.abs(want)) < 0.05

    y = np.concatenate([0 * t, np.ones((BATCH, 1))], 1)
    samples = [gradients(model, x, y)[1] for _ in range(60)]
    want = 0.3**2 * np.repeat((a**2).mean(0)[:, None], OUT, 1)
    want = want.ravel() if variance == "separable" else [want.sum()]
    scores, error = z_scores(samples, want)
    assert np.abs(scores).max() < 5
    assert np.median(error / np.abs(want)) < 0.1


@pytest.mark.parametrize("rank", [1, 4])
def test_tends_to_full_rank_as_r_grows(rank):
    """f = w^3, one weight at 0: E[f E] / sigma = sigma^2 (3 + 6 / r).

    E[E^4] = 3 + 6/r, and 3 for a normal number. 60 steps of 4096 members; a
    Student-t with 59 degrees of freedom is beyond 5 with probability 6e-6.
    Rank 1 has three times as much as full rank, and 4 half as much again.
    """
    model = make_model(
        [lambda: LowRankDense(1, rank=rank, use_bias=False)],
        np.zeros((1, 1)),
        loss=cubes,
        population_size=4096,
        variance="fixed",
        seed=1005,
    )
    model.set_weights([np.zeros((1, 1))])
    one = np.ones((1, 1))
    samples = [gradients(model, one, one)[0] for _ in range(60)]
    want = 0.3**2 * (3 + 6 / rank)
    scores, error = z_scores(samples, [want])
    assert abs(scores[0]) < 5
    assert error[0] / want < 0.03


# --- it is Dense ---


def test_outside_of_training_it_is_dense():
    x, _ = models.make_data()
    model = models.make_model([LowRankDense(3, activation="softmax")])
    twin = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3, activation="softmax")]
    )
    twin.set_weights(model.get_weights())
    np.testing.assert_array_equal(model(x, training=True), twin(x))


@pytest.mark.parametrize(
    "layer, formed", [(keras.layers.Dense, True), (LowRankDense, False)]
)
def test_no_perturbed_kernel_is_formed(layer, formed):
    """No tensor has the axes of members and of a kernel, as Dense's has."""
    model = models.make_model(
        [layer(37, activation="relu"), layer(3)],
        shape=(53,),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    shapes = {
        tuple(dim.size for dim in shape.dim)
        for node in models.nodes_of_a_step(model, 53)
        for shape in node.attr["_output_shapes"].list.shape
    }
    kernels = {s for s in shapes if len(s) > 2 and s[-2:] == (53, 37)}
    assert bool(kernels) == formed


@pytest.mark.parametrize("rank", [0, -1, 1.5, "1", None])
def test_a_rank_that_is_none(rank):
    with pytest.raises(ValueError, match="`rank` must be a positive integer"):
        LowRankDense(3, rank=rank)


def test_regularizers_see_the_members_kernel():
    """On inputs and targets of zeros the loss is the regularizer's alone."""
    x, _ = models.make_data()
    spy = models.LossSpy()
    model = models.make_model(
        [LowRankDense(2, use_bias=False, kernel_regularizer="l2")],
        loss="mse",
        optimizer=models.make_optimizer(fitness_shaping=spy),
    )
    model.train_on_batch(0 * x, 0 * x[:, :2])
    assert np.std(spy.losses) > 1e-4


def test_inputs_of_integers_and_of_rank_3():
    """As in Dense; without sigma the members are the mean network."""
    model = models.make_model(
        [LowRankDense(5, activation="relu"), LowRankDense(3)],
        shape=(2, 4),
        loss="mse",
        run_eagerly=True,
        optimizer=models.make_optimizer(
            search_distribution=keras_vo.GaussianSearchDistribution(
                "fixed", stddev=1e-9, min_stddev=1e-9
            )
        ),
    )
    x = np.random.default_rng(0).integers(0, 9, size=(6, 2, 4))
    y = np.zeros((6, 2, 3), "float32")
    want = np.mean(np.square(model(x) - y))
    logs = model.train_on_batch(x.astype("float32"), y, return_dict=True)
    np.testing.assert_allclose(logs["population_loss"], want, rtol=1e-5)

    inputs = keras.Input((4,), dtype="int32")
    integers = keras_vo.VOModel(inputs, LowRankDense(3)(inputs))
    integers.compile(
        optimizer=models.make_optimizer(), loss="mse", run_eagerly=True
    )
    assert np.all(np.isfinite(integers.train_on_batch(x[:, 0], y[:, 0])))
