"""Products of inputs that members share, made by terms of their weights."""

import contextlib

import keras
import models
import numpy as np
import pytest
import tensorflow as tf

import keras_vo
from keras_vo.perturbations import of_level, shared_inputs

Dense = keras.layers.Dense
EXAMPLES = 12


def dense(**kwargs):
    return keras_vo.VOSequential(
        [keras.Input((6,)), Dense(5, activation="tanh", **kwargs), Dense(3)]
    )


def sequence():
    return keras_vo.VOSequential(
        [
            keras.Input((4, 6)),
            Dense(5, activation="tanh"),
            keras.layers.GlobalAveragePooling1D(),
            Dense(3),
        ]
    )


def two_branches():
    """The same inputs into two layers, one of them twice."""
    inputs = keras.Input((6,))
    shared = Dense(5)
    outputs = keras.layers.concatenate(
        [shared(inputs), Dense(2)(inputs), shared(2.0 * inputs)]
    )
    return keras_vo.VOModel(inputs, Dense(3)(outputs))


def noisy_inputs():
    """Inputs of the second layer are the first one's, of no member twice."""
    inputs = keras.Input((6,))
    hidden = Dense(6)(inputs)
    return keras_vo.VOModel(inputs, Dense(3)(inputs + hidden))


CASES = {
    "dense": (dense, {}),
    "no-pairs": (dense, {"antithetic": False}),
    "separable": (dense, {"search_distribution": "separable"}),
    "redrawn": (dense, {"chunk_size": 6, "memory_budget": 1}),
    "constraint": (
        lambda: dense(kernel_constraint=keras.constraints.MaxNorm(0.5)),
        {},
    ),
    "sequence": (sequence, {}),
    "two-branches": (two_branches, {}),
    "noisy-inputs": (noisy_inputs, {}),
}


def losses_of_members(
    make, jit_compile=False, run_eagerly=False, dtype=None, **kwargs
):
    """Losses [N] of the members of one step of `fit`."""
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(dtype or policy)
    try:
        keras.utils.set_random_seed(0)
        model = make()
    finally:
        keras.config.set_dtype_policy(policy)
    seen = []

    def shaping(losses):
        tf.py_function(lambda t: seen.append(t.numpy()), [losses], [])
        return losses - tf.reduce_mean(losses)

    model.compile(
        optimizer=keras_vo.VOOptimizer(
            population_size=16, seed=1, fitness_shaping=shaping, **kwargs
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=jit_compile,
        run_eagerly=run_eagerly,
    )
    generator = np.random.default_rng(0)
    x = generator.normal(size=(EXAMPLES, *model.input_shape[1:]))
    y = generator.integers(0, 3, size=(EXAMPLES, 1))
    model.fit(x, y, batch_size=EXAMPLES, verbose=0)
    return seen[-1]


@pytest.fixture
def plain(monkeypatch):
    """A context in which products are those of members' weights."""

    @contextlib.contextmanager
    def context():
        with monkeypatch.context() as patch:
            patch.setattr(
                of_level,
                "products_by_terms",
                lambda *args: contextlib.nullcontext(shared_inputs.Products()),
            )
            yield

    return context


@pytest.mark.parametrize("name", CASES)
def test_losses_are_those_of_members_weights(name, plain):
    make, kwargs = CASES[name]
    found = losses_of_members(make, **kwargs)
    with plain():
        expected = losses_of_members(make, run_eagerly=True, **kwargs)
    assert np.unique(expected).size > 8
    np.testing.assert_allclose(found, expected, rtol=3e-6)


@pytest.mark.parametrize("dtype", ["float64", "mixed_bfloat16", "bfloat16"])
def test_other_precisions(dtype, plain):
    """In low precision nothing is taken apart: the losses are the same."""
    found = losses_of_members(dense, dtype=dtype)
    with plain():
        expected = losses_of_members(dense, dtype=dtype)
    rtol = 1e-14 if dtype == "float64" else 0
    np.testing.assert_allclose(found, expected, rtol=rtol)


def test_under_xla(plain):
    found = losses_of_members(dense, jit_compile=True)
    with plain():
        expected = losses_of_members(dense, run_eagerly=True)
    np.testing.assert_allclose(found, expected, rtol=3e-6)


def formed_kernels(model, shape):
    """Sums in the graph of a step that have the shape of members' kernels.

    Not in branches: kernels are formed for inputs that are not finite.
    """
    nodes = models.nodes_of_a_step(model, 6, branches=False)
    shapes = [
        [d.size for d in node.attr["_output_shapes"].list.shape[0].dim]
        for node in nodes
        if node.op in ("Add", "AddV2") and "_output_shapes" in node.attr
    ]
    return [s for s in shapes if s[-2:] == list(shape) and len(s) > 2]


def test_kernels_of_the_first_layer_are_not_formed(plain):
    """But those of the second are."""

    def model():
        made = keras_vo.VOSequential([keras.Input((6,)), Dense(5), Dense(3)])
        made.compile(
            keras_vo.VOOptimizer(population_size=16),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        return made

    with plain():
        assert formed_kernels(model(), (6, 5))
    assert not formed_kernels(model(), (6, 5))
    assert formed_kernels(model(), (5, 3))


@pytest.mark.parametrize("jit_compile", [False, True])
def test_an_objective_of_minimize(jit_compile):
    """With transposed and other products, in a graph as eagerly."""
    x = tf.random.stateless_normal([7, 4], [0, 1])

    def objective(weights):
        a, b, c = weights
        first = tf.matmul(x, a) + tf.matmul(x, b, transpose_b=True)
        return tf.reduce_sum(tf.tanh(first) @ c) + tf.reduce_sum(a @ c)

    def steps(wrap):
        shapes = ((4, 3), (3, 4), (3, 1))
        w = [tf.Variable(tf.fill(shape, 0.1)) for shape in shapes]
        optimizer = keras_vo.VOOptimizer(
            population_size=16, seed=1, fitness_shaping="standardize"
        )
        optimizer.build(w)
        step = wrap(lambda: optimizer.minimize(objective, w))
        for _ in range(3):
            step()
        return np.concatenate([v.numpy().ravel() for v in w])

    found = steps(lambda f: tf.function(f, jit_compile=jit_compile))
    np.testing.assert_allclose(found, steps(lambda f: f), rtol=1e-4, atol=1e-6)


def test_weights_of_two_precisions():
    """Noise is in float64: float32 weights are rounded."""
    x = tf.random.stateless_normal([7, 3], [0, 1])

    def objective(weights):
        hidden = tf.cast(tf.tanh(x @ weights[0]), tf.float64)
        return tf.reduce_sum((hidden @ weights[1] - 1.0) ** 2)

    def steps(wrap):
        w = [tf.Variable(np.full((3, 2), 0.1, "float32"))]
        w.append(tf.Variable(np.full((2, 1), 0.1)))
        optimizer = keras_vo.VOOptimizer(population_size=16, seed=1)
        optimizer.build(w)
        step = wrap(lambda: optimizer.minimize(objective, w))
        return [float(step()) for _ in range(3)]

    found = steps(lambda f: tf.function(f))
    np.testing.assert_allclose(found, steps(lambda f: f), rtol=1e-5)


def test_an_empty_batch():
    model = dense()
    model.compile(
        keras_vo.VOOptimizer(
            keras.optimizers.SGD(0.1), population_size=16, seed=1
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )

    def batches():
        yield np.ones((4, 6), "float32"), np.ones((4, 1), "int32")
        yield np.ones((0, 6), "float32"), np.ones((0, 1), "int32")

    data = tf.data.Dataset.from_generator(
        batches,
        output_signature=(
            tf.TensorSpec([None, 6]),
            tf.TensorSpec([None, 1], tf.int32),
        ),
    )
    model.fit(data.repeat(), steps_per_epoch=2, verbose=0, shuffle=False)
    assert all(np.all(np.isfinite(w)) for w in model.get_weights())


# --- what is apart from terms, within a member ---


INPUTS = tf.constant(np.random.default_rng(0).normal(size=(8, 4)), tf.float32)


def population_loss(objective, wrap=tf.function):
    """The mean loss of a generation of `minimize`."""
    weights = tf.Variable(tf.fill([4, 4], 0.1))
    optimizer = keras_vo.VOOptimizer(population_size=8, seed=1)
    optimizer.build([weights])
    return float(wrap(lambda: optimizer.minimize(objective, [weights]))())


def in_xla(function):
    return tf.function(function, jit_compile=True)


def of_tape(loss, weights):
    with tf.GradientTape() as tape:
        tape.watch(weights)
        value = loss(weights)
    return tape.gradient(value, weights)


DERIVATIVES = {
    "tape": of_tape,
    "tf.gradients": lambda loss, w: tf.gradients(loss(w), w)[0],
    "given": lambda loss, w: tf.gradients(loss(w), w, [2.0], name="own")[0],
    "hessians": lambda loss, w: tf.hessians(loss(w), w)[0],
}


@pytest.mark.parametrize(
    ("name", "penalty", "wrap"),
    [
        ("tape", 0.01, tf.function),
        ("tf.gradients", 0.0, tf.function),
        ("tf.gradients", 0.01, tf.function),
        ("tf.gradients", 0.01, in_xla),
        ("given", 0.01, tf.function),
        ("hessians", 0.0, tf.function),
    ],
)
def test_derivatives_by_the_weights(name, penalty, wrap, plain):
    """Squared norms of gradients: without a penalty W is used once only."""

    def objective(weights):
        def loss(w):
            own = penalty * tf.reduce_sum(w**2) if penalty else 0.0
            return tf.reduce_mean(tf.tanh(INPUTS @ w) ** 2) + own

        return tf.reduce_sum(DERIVATIVES[name](loss, weights[0]) ** 2)

    found = population_loss(objective, wrap)
    with plain():
        expected = population_loss(objective, wrap)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


class OneStepAhead(keras.layers.Layer):
    """Products with W less a step of its own, by tf.gradients."""

    def build(self, shape):
        self.w = self.add_weight(shape=(shape[-1], 3))

    def call(self, x):
        w = tf.convert_to_tensor(self.w)
        step = tf.gradients(tf.reduce_sum(tf.tanh(x @ w) ** 2), w)[0]
        return x @ (w - 0.1 * step)


def test_a_layer_that_differentiates(plain):
    def make():
        return keras_vo.VOSequential([keras.Input((6,)), OneStepAhead()])

    found = losses_of_members(make)
    with plain():
        expected = losses_of_members(make)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_forward_mode_by_the_inputs(plain):
    def objective(weights):
        with tf.autodiff.ForwardAccumulator(INPUTS, INPUTS) as forward:
            outputs = tf.tanh(INPUTS @ weights[0])
        return tf.reduce_sum(forward.jvp(outputs) ** 2)

    found = population_loss(objective)
    with plain():
        expected = population_loss(objective)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("values", "wrap"),
    [
        ((np.inf, -np.inf), tf.function),
        ((np.inf, np.nan), tf.function),
        ((np.inf, -np.inf), in_xla),
    ],
)
def test_inputs_that_are_not_finite(values, wrap, plain):
    """In two examples; the others, which stay finite, are looked at alone,
    too.
    """
    x = tf.tensor_scatter_nd_update(INPUTS, [[0, 0], [1, 1]], values)

    def objective(weights):
        outputs = tf.tanh(x @ weights[0])
        outputs = tf.where(tf.math.is_nan(outputs), 7.0, outputs)
        return tf.reduce_mean(outputs**2) + tf.reduce_mean(outputs[:2])

    found = population_loss(objective, wrap)
    with plain():
        expected = population_loss(objective, wrap)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_an_error_of_a_member_is_its_own():
    def objective(weights):
        raise RuntimeError(f"mine: {(INPUTS @ weights[0]).shape}")

    with pytest.raises(RuntimeError, match=r"mine: \(8, 4\)"):
        population_loss(objective)
