"""LocalReparamDense: its search gradients, against closed forms and NumPy."""

import keras
import models
import numpy as np
import pytest
import reference
import tensorflow as tf

import keras_vo
from keras_vo.layers import LocalReparamDense, LowRankDense

BATCH, IN = 4, 3


def squared_error(y_true, y_pred):
    return tf.reduce_sum(tf.square(y_pred - y_true), axis=-1)


def make_data(units=2, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(BATCH, IN)), rng.normal(size=(BATCH, units))


def make_model(
    layers, x, *, variance="separable", loss=squared_error, **kwargs
):
    """Float64; mu and beta move by minus their gradients, with rate 1."""
    keras.config.set_floatx("float64")  # of the losses
    keras.config.set_dtype_policy("float64")
    keras.utils.set_random_seed(3)
    settings = {
        "inner_optimizer": keras.optimizers.SGD(1.0),
        "population_size": 8,
        "examples_population_size": 8,
        "search_distribution": keras_vo.GaussianSearchDistribution(
            variance,
            stddev=0.3,
            learning_rate=1.0,
            min_stddev=1e-6,
            max_stddev=1e6,
        ),
        "natural_gradient": False,
        "fitness_shaping": "identity",
        "seed": 5,
    }
    compiling = {
        key: kwargs.pop(key)
        for key in ("jit_compile", "run_eagerly", "loss_weights")
        if key in kwargs
    }
    model = keras_vo.VOSequential(
        [keras.Input(np.shape(x)[1:]), *(layer() for layer in layers)]
    )
    model.compile(
        optimizer=keras_vo.VOOptimizer(**settings | kwargs),
        loss=loss,
        **compiling,
    )
    return model


def gradients(model, *data):
    """dU/dmu [d] and dU/dbeta [groups] of one step, which is taken back."""
    mu = model.get_weights()
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    beta = model.optimizer._log_variance.numpy()
    model.train_on_batch(*data)
    moved = [
        np.ravel(a - b) for a, b in zip(mu, model.get_weights(), strict=True)
    ]
    new = model.optimizer._log_variance.numpy()
    model.set_weights(mu)
    model.optimizer._log_variance.assign(beta)
    return np.concatenate(moved), beta - new


def two_layers(first=LocalReparamDense):
    return [
        lambda: first(3, activation="relu", bias_initializer="normal"),
        lambda: LocalReparamDense(2, bias_initializer="normal"),
    ]


# --- the reference ---


def separable_sigma(model, rng):
    """A sigma of its own for each weight, set on the model."""
    model.optimizer.build(model.trainable_variables)
    beta = np.log(rng.uniform(0.1, 0.5, size=model.count_params())) * 2
    model.optimizer._log_variance.assign(beta)
    shapes = [w.shape for w in model.get_weights()]
    ends = np.cumsum([np.prod(s) for s in shapes])[:-1]
    parts = np.split(np.exp(beta / 2), ends.astype(int))
    return [p.reshape(s) for p, s in zip(parts, shapes, strict=True)]


@pytest.mark.parametrize(
    "first, antithetic, shaping, option",
    [
        (LocalReparamDense, True, "identity", None),
        (LocalReparamDense, False, "standardize", "run_eagerly"),
        (LocalReparamDense, True, "centered_rank", "jit_compile"),
        (LocalReparamDense, False, "identity", "run_eagerly"),
        (keras.layers.Dense, True, "nes", "run_eagerly"),
        (keras.layers.Dense, False, "identity", None),
        (keras.layers.Dense, True, "centered_rank", "run_eagerly"),
        (keras.layers.Dense, False, "standardize", "run_eagerly"),
    ],
)
def test_gradients_are_those_of_the_reference(
    first, antithetic, shaping, option
):
    """Two layers, the same noise: exactly, up to the order of summation."""
    x, y = make_data()
    model = make_model(
        two_layers(first),
        x,
        antithetic=antithetic,
        fitness_shaping=shaping,
        **({option: True} if option else {}),
    )
    sigma = separable_sigma(model, np.random.default_rng(1))
    weights = model.get_weights()
    draws = 4 if antithetic else 8
    in_weight_space = first is keras.layers.Dense
    units = [2] if in_weight_space else [3, 2]
    xi = [
        models.draw_noise(5, 0, draws, (BATCH, n), stream=k)
        for k, n in enumerate(units)
    ]
    relu = lambda a: np.maximum(a, 0)  # noqa: E731
    layers = [
        (*weights[:2], *sigma[:2], relu),
        (*weights[2:], *sigma[2:], lambda a: a),
    ]
    full = None
    if in_weight_space:
        z = models.draw_noise(5, 0, draws, (12,))
        full = (*layers.pop(0), z[:, :9].reshape(-1, 3, 3), z[:, 9:])
    losses, want = reference.local_reparameterization(
        x,
        lambda z: ((z - y) ** 2).sum(1),
        layers,
        xi,
        full=full,
        shaping=shaping,
        antithetic=antithetic,
    )
    got_mu, got_beta = gradients(model, x, y)
    flat = [np.ravel(p) for parts in want for p in parts[:2]]
    np.testing.assert_allclose(got_mu, np.concatenate(flat), rtol=1e-9)
    flat = [np.ravel(p) for parts in want for p in parts[2:]]
    np.testing.assert_allclose(
        got_beta, np.concatenate(flat), rtol=1e-7, atol=1e-12
    )
    got = model.get_metrics_result()["population_loss"]
    np.testing.assert_allclose(got, losses.mean(), rtol=1e-6)


def test_shared_variances():
    """The same noise, sigma equal for all weights, each structure.

    Shared variances have the sum of the gradients of separate ones.
    """
    first = keras.layers.Dense  # beside local noise, that of the second
    x, y = make_data()
    mu, beta = gradients(
        make_model(two_layers(first), x, run_eagerly=True), x, y
    )
    for variance, want in {
        "fixed": [0.0],
        "isotropic": [beta.sum()],
        "layerwise": [beta[:12].sum(), beta[12:].sum()],
    }.items():
        got_mu, got_beta = gradients(
            make_model(
                two_layers(first), x, variance=variance, run_eagerly=True
            ),
            x,
            y,
        )
        np.testing.assert_allclose(got_mu, mu, rtol=1e-9)
        np.testing.assert_allclose(got_beta, want, rtol=1e-7, atol=1e-12)


# --- closed forms ---


def z_scores(samples, want):
    """Deviation of the means from `want`, in standard errors."""
    samples = np.array(samples)
    error = samples.std(0, ddof=1) / len(samples) ** 0.5
    return (samples.mean(0) - want) / error, error


def test_unbiased_on_a_quadratic_loss():
    """f_b = |Z_b - t_b|^2: dU/dmu = 2 (m - t) A, dU/dsigma^2 = A^2.

    Examples are averaged; so are, in inputs of rank 3, positions. 60 steps of
    2048 members. A Student-t with 59 degrees of freedom is beyond 5 with a
    probability of 6e-6: of 16 numbers, 1e-4. The bound on the standard
    error says that a factor off by 15 % would be beyond 5.
    """
    rng = np.random.default_rng(0)
    shape = BATCH, 2, IN
    x, y = rng.normal(size=shape), 2 + rng.normal(size=(*shape[:-1], 2))
    model = make_model(
        [lambda: LocalReparamDense(2, bias_initializer="normal")],
        x,
        examples_population_size=2048,
    )
    kernel, bias = model.get_weights()
    a = np.concatenate([x, np.ones((*shape[:-1], 1))], -1).reshape(-1, IN + 1)
    t = y.reshape(-1, 2)
    m = a @ np.concatenate([kernel, bias[None]])
    want_mu = 2 * a.T @ (m - t) / len(a)
    want_beta = 0.3**2 * np.repeat((a**2).mean(0)[:, None], 2, 1)
    samples = [gradients(model, x, y) for _ in range(60)]
    for values, want in zip(
        zip(*samples, strict=True), (want_mu, want_beta), strict=True
    ):
        scores, error = z_scores(values, want.ravel())
        assert np.abs(scores).max() < 5
        assert np.median(error / np.abs(want.ravel())) < 0.03


def test_far_less_variance_than_weight_space_noise():
    """The reason for it: examples do not blur each other's gradient."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(64, 8)), rng.normal(size=(64, 2))

    def variance(layer):
        model = make_model([lambda: layer(2)], x)
        samples = [gradients(model, x, y)[0] for _ in range(40)]
        return np.var(samples, 0).sum()

    # 64 examples; the ratio of two estimates of 18 variances varies by 15 %.
    assert variance(keras.layers.Dense) > 10 * variance(LocalReparamDense)


# --- what becomes of the gradients ---


def test_the_natural_gradient_is_the_gradient_over_the_fisher_information():
    """mu: sigma^2 times; beta: 2 / units times.

    An example sees the noise of the units, whose variance has the common
    factor sigma^2: 1/2 for each.
    """
    x, y = make_data()
    plain, natural = (
        gradients(
            make_model(
                two_layers(),
                x,
                variance="layerwise",
                natural_gradient=natural,
                run_eagerly=True,
            ),
            x,
            y,
        )
        for natural in (False, True)
    )
    np.testing.assert_allclose(natural[0], 0.3**2 * plain[0], rtol=1e-9)
    np.testing.assert_allclose(
        natural[1], plain[1] * 2 / np.array([3, 2]), rtol=1e-6
    )


@pytest.mark.parametrize("layer", [LocalReparamDense, LowRankDense])
def test_max_kl_bounds_the_step(layer):
    """The step of mu alone: KL = |mu' - mu|^2 / (2 sigma^2)."""
    x, y = make_data()
    layers = [lambda: layer(3, activation="relu"), lambda: layer(2)]

    def divergence(max_kl):
        model = make_model(
            layers,
            x,
            variance="fixed",
            inner_optimizer=keras.optimizers.SGD(99.0),
            max_kl=max_kl,
            run_eagerly=True,
        )
        return (gradients(model, x, y)[0] ** 2).sum() / (2 * 0.3**2)

    assert divergence(None) > 1
    assert 0.49 < divergence(0.5) < 0.5 + 1e-9


class Masks(keras.layers.Layer):
    """Leaves out the last position of each example."""

    def call(self, inputs):
        return inputs * 1.0  # the mask is attached to it

    def compute_mask(self, inputs, previous=None):
        ones = keras.ops.ones_like(inputs[:, :, 0], dtype="bool")
        return keras.ops.logical_and(ones, [True, True, False])


def test_positions_that_a_mask_leaves_out_have_no_score():
    """The masked position's input would move the weights, were it scored.

    Each with a loss of its own; pooled positions: test_conformance.py.
    """
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(BATCH, 3, IN)), rng.normal(size=(BATCH, 3, 2))
    other = x.copy()
    other[:, -1] = rng.normal(size=(BATCH, IN))

    def both(layers):
        model = make_model(layers, x, run_eagerly=True)
        for inputs in (x, other):
            yield gradients(model, inputs, y)
            model.optimizer.generations.assign(0)  # for the same noise

    for a, b in zip(*both([Masks, *two_layers()]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-13)
    unmasked, changed = both(two_layers())
    assert np.abs(unmasked[0] - changed[0]).max() > 1e-3


# --- it is Dense ---


def test_outside_of_training_it_is_dense():
    x, y = models.make_data()
    dense = keras.layers.Dense(3, activation="relu")
    model = models.make_model([LocalReparamDense(3, activation="relu")])
    twin = keras.Sequential([keras.Input((4,)), dense])
    twin.set_weights(model.get_weights())
    np.testing.assert_array_equal(model(x), twin(x))
    np.testing.assert_array_equal(model(x, training=True), twin(x))
    np.testing.assert_array_equal(
        model.predict(x, verbose=0), twin.predict(x, verbose=0)
    )


def test_a_frozen_layer_and_inputs_of_zeros():
    """It is not perturbed; v = 0 without a bias: no division by it."""
    x, y = models.make_data()
    x[3] = 0.0
    model = models.make_model(
        [
            LocalReparamDense(5, use_bias=False, trainable=False),
            LocalReparamDense(3, use_bias=False),
        ],
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        run_eagerly=True,
    )
    frozen, before = model.get_weights()
    for _ in range(2):
        model.train_on_batch(x, y)
    still, after = model.get_weights()
    np.testing.assert_array_equal(still, frozen)
    assert np.all(after != before) and np.all(np.isfinite(after))


# --- batches of a size that only running the step tells ---


@pytest.mark.parametrize(
    "layers",
    [
        (LocalReparamDense, LocalReparamDense),
        (LowRankDense, keras.layers.Dense),
    ],
)
def test_an_empty_batch_and_nan_in_fit_lose_nothing(layers):
    """Only the batch before them changes the weights.

    (By SGD: the empty one's gradient is 0, with which momentum would go on.)
    """
    x, y = models.make_data(16)
    broken = np.full_like(x[:8], np.nan)

    def batches():
        yield x[:8], y[:8]
        yield x[:0], y[:0]
        yield broken, y[:8]

    first, last = layers
    model = models.make_model(
        [first(5, activation="relu"), last(3)],
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        optimizer=models.make_optimizer(
            inner_optimizer=keras.optimizers.SGD(10.0)
        ),
    )
    data = tf.data.Dataset.from_generator(
        batches,
        output_signature=(
            tf.TensorSpec([None, 4]),
            tf.TensorSpec([None, 1], tf.int64),
        ),
    ).apply(tf.data.experimental.assert_cardinality(3))
    states = [models.weights(model)]
    keep = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: states.append(
            models.weights(model)
        )
    )
    model.fit(data, shuffle=False, verbose=0, callbacks=[keep])
    start, want, *others = states
    assert np.abs(want - start).max() > 0.01
    for state in others:
        np.testing.assert_array_equal(state, want)
    assert int(model.optimizer.generations) == 3
    assert int(model.optimizer.iterations) == 2  # the empty one's is 0
