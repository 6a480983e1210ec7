"""VOOptimizer(perturbation=): layers of Keras, perturbed as they are."""

import functools
import threading

import keras
import models
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import keras_vo
from keras_vo.keras_compat import layer_calls
from keras_vo.layers import LocalReparamDense, LowRankDense
from keras_vo.perturbations import placement
from keras_vo.perturbations.contraction import Contraction
from keras_vo.search import engine

FROM_LOGITS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def make(network, perturbation, loss="mse", structure="layerwise", **kwargs):
    """A functional model with the same weights every time, compiled."""
    compiling = {k: kwargs.pop(k) for k in ("run_eagerly",) if k in kwargs}
    keras.utils.set_random_seed(1)
    model = network() if callable(network) else network
    model = keras_vo.make_variational(model)
    model.compile(
        optimizer=models.make_optimizer(
            structure, perturbation=perturbation, **kwargs
        ),
        loss=loss,
        **compiling,
    )
    return model


def trajectory(model, *data, copy=None, **fitting):
    """All weights and sigmas after two epochs of three batches, flat.

    Args:
        model: compiled.
        data: of `fit`.
        copy: from the model's weights to what they are set to at first.
        fitting: other arguments of `fit`.
    """
    if copy is not None:
        model.set_weights(copy(model.get_weights()))
    models.fit(model, *data, **fitting)
    stddevs = [s.numpy() for s in model.optimizer.stddevs]
    return np.concatenate(
        [np.ravel(w) for w in [*model.get_weights(), *stddevs]]
    )


@pytest.fixture
def populations(monkeypatch):
    """The sizes of the populations of the steps that are traced, by level."""
    seen = []
    tell = engine.Search.tell

    def noted(self, by_level, move_mean):
        seen.append({k: len(p.members) for k, p in by_level.items()})
        return tell(self, by_level, move_mean)

    monkeypatch.setattr(engine.Search, "tell", noted)
    return seen


# --- the same as layers that say so themselves ---


def mlp(layer=layers.Dense):
    return keras.Sequential(
        [keras.Input((4,)), layer(6, activation="relu"), layer(3)]
    )


@pytest.mark.parametrize(
    "structure, eagerly", [("layerwise", True), ("separable", False)]
)
def test_dense_layers_are_perturbed_as_those_that_ask(eagerly, structure):
    x, y = models.make_data()

    def run(layer, perturbation):
        model = make(
            lambda: mlp(layer),
            perturbation,
            FROM_LOGITS,
            structure,
            run_eagerly=eagerly,
        )
        return trajectory(model, x, y, epochs=1 if eagerly else 2)

    plain = run(layers.Dense, "full")
    for perturbation, layer in (
        ("local_reparam", LocalReparamDense),
        ("low_rank", LowRankDense),
    ):
        want = run(layer, "full")
        np.testing.assert_allclose(
            run(layers.Dense, perturbation), want, rtol=1e-5, atol=1e-6
        )
        assert np.abs(plain - want).max() > 0.01


def test_a_layer_that_asks_has_its_own_way():
    def network():
        return keras.Sequential(
            [keras.Input((4,)), LowRankDense(6, "relu"), layers.Dense(3)]
        )

    x, y = models.make_data()
    asked = trajectory(make(network, "low_rank", FROM_LOGITS), x, y)
    both = trajectory(make(mlp, "low_rank", FROM_LOGITS), x, y)
    np.testing.assert_allclose(asked, both, rtol=1e-5, atol=1e-6)
    model = make(network, "local_reparam", FROM_LOGITS, run_eagerly=True)
    model.train_on_batch(x, y)
    assert [type(layer) for layer in model.layers] == [
        LowRankDense,
        layers.Dense,
    ]


# --- layers that are Dense in other words, with the same noise ---


def sequences(shape=(3, 4), n=24):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, *shape)).astype("float32")
    return x, x.reshape(n, -1)[:, :2].copy()


def ended(*parts):
    """With an end that is trained, too."""
    return keras.Sequential([*parts, layers.Flatten(), layers.Dense(2)])


# Equation, shapes of the input and of the output, axes of the bias; the same by
# Dense; from Dense's kernel and bias to those of the equation.
EINSUMS = {
    "rank 2": ("ab,bc->ac", (12,), (5,), "c", [layers.Dense(5)], None),
    "ellipsis": ("...x,xy->...y", (3, 4), 5, "y", [layers.Dense(5)], None),
    "heads": (
        "abc,cde->abde",
        (3, 4),
        (3, 2, 5),
        "de",
        [layers.Dense(10)],
        lambda w, b: (w.reshape(4, 2, 5), b.reshape(2, 5)),
    ),
    "heads in": (
        "abcd,cde->abe",
        (3, 2, 4),
        (3, 5),
        "e",
        [layers.Reshape((3, 8)), layers.Dense(5)],
        lambda w, b: (w.reshape(2, 4, 5), b),
    ),
    "kernel turned": (
        "abc,dc->abd",
        (3, 4),
        (3, 5),
        "d",
        [layers.Dense(5)],
        lambda w, b: (w.T.copy(), b),
    ),
}


@pytest.mark.parametrize(
    "name, structure",
    [
        ("rank 2", "layerwise"),
        ("ellipsis", "separable"),
        ("heads", "separable"),
        ("heads in", "separable"),
        ("kernel turned", "separable"),
    ],
)
def test_einsum_dense_is_dense(name, structure):
    equation, shape, output, axes, dense, turned = EINSUMS[name]
    x, y = sequences(shape)

    def network():
        einsum = layers.EinsumDense(equation, output, bias_axes=axes)
        return ended(keras.Input(shape), einsum)

    def by_dense():
        copies = [type(d).from_config(d.get_config()) for d in dense]
        copies[-1].name = "first"
        return ended(keras.Input(shape), *copies)

    def flat(model, to_einsum=False):
        values = model.get_weights()
        stddevs = [s.numpy() for s in model.optimizer.stddevs]
        if to_einsum and turned is not None:
            values[:2] = turned(*values[:2])
            stddevs[:2] = turned(*stddevs[:2])
        return np.concatenate([np.ravel(v) for v in [*values, *stddevs]])

    run = functools.partial(
        make, perturbation="local_reparam", structure=structure
    )
    reference, model = run(by_dense, run_eagerly=True), run(network)
    start = reference.get_weights()
    if turned is not None:
        start[:2] = turned(*start[:2])
    model.set_weights(start)
    models.fit(reference, x, y, epochs=1)
    models.fit(model, x, y, epochs=1)
    np.testing.assert_allclose(
        flat(model), flat(reference, to_einsum=True), rtol=1e-4, atol=1e-5
    )


def test_an_embedding_is_dense_of_one_hot():
    rng = np.random.default_rng(0)
    ids, y = rng.integers(0, 7, (24, 3)), rng.normal(size=(24, 2))
    run = functools.partial(
        make, perturbation="local_reparam", structure="separable"
    )

    def embedded():
        return ended(keras.Input((3,)), layers.Embedding(7, 5))

    def dense():
        return ended(keras.Input((3, 7)), layers.Dense(5, use_bias=False))

    start = embedded().get_weights()
    settings = {"copy": lambda _: start, "epochs": 1}
    got = trajectory(run(embedded), ids, y, **settings)
    one_hot = np.eye(7, dtype="float32")[ids]
    want = trajectory(run(dense, run_eagerly=True), one_hot, y, **settings)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def gradients_of(model, steps, *data):
    """dU/dmu of the optimizer's steps from one place, [steps, d]."""
    start, found = model.get_weights(), []
    for _ in range(steps):
        model.train_on_batch(*data)
        moved = zip(start, model.get_weights(), strict=True)
        found.append(np.concatenate([np.ravel(a - b) for a, b in moved]))
        model.set_weights(start)
    return np.array(found)


@pytest.mark.parametrize(
    "name", ["LayerNormalization", "BatchNormalization", "RMSNormalization"]
)
def test_the_scale_of_a_normalization(name):
    """f_b = sum over positions and units of t Z, for Z = A gamma + beta.

    It is linear: dU/dgamma = mean_b sum t A, dU/dbeta = mean_b sum t, whatever
    sigma is. 40 steps of 512 members. Of 6 or 12 numbers one is beyond 5
    standard errors with a probability of 1e-4; the errors say that one off by
    20 % of the largest would be.
    """
    if not hasattr(layers, name):
        pytest.skip("not in this version of Keras")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 3, 6)).astype("float32")
    t = rng.normal(size=(8, 3, 6)).astype("float32")
    layer = getattr(layers, name)()
    model = make(
        lambda: keras.Sequential([keras.Input((3, 6)), layer]),
        "local_reparam",
        loss=lambda y_true, y_pred: tf.reduce_sum(y_true * y_pred, [1, 2]),
        structure="fixed",
        inner_optimizer=keras.optimizers.SGD(1.0),
        natural_gradient=False,
        fitness_shaping="identity",
        examples_population_size=512,
        seed=8,
    )
    a = np.array(layer(x, training=True))
    found = gradients_of(model, 40, x, t)
    want = [np.mean(np.sum(t * a, 1), 0)]
    if len(model.trainable_variables) > 1:
        want.append(np.mean(np.sum(t, 1), 0))
    want = np.concatenate(want)
    found = found[:, : len(want)]  # without moving statistics
    error = found.std(0, ddof=1) / 40**0.5
    assert np.abs((found.mean(0) - want) / error).max() < 5
    assert error.max() < 0.04 * np.abs(want).max()


def test_moving_statistics_are_those_of_the_mean_network():
    x, y = sequences((4,))
    moving = []
    for perturbation in ("full", "local_reparam"):
        model = make(
            lambda: ended(keras.Input((4,)), layers.BatchNormalization()),
            perturbation,
            run_eagerly=perturbation == "full",
        )
        models.fit(model, x, y, epochs=1)
        moving.append([w.numpy() for w in model.non_trainable_variables])
    np.testing.assert_allclose(*[np.concatenate(m) for m in moving], rtol=1e-6)
    assert np.abs(moving[0][0]).max() > 0


# --- what is covered, and what is not ---


def attention():
    inputs = keras.Input((4, 8))
    hidden = layers.MultiHeadAttention(2, 4)(inputs, inputs)
    hidden = layers.LayerNormalization()(inputs + hidden)
    outputs = layers.Dense(1)(layers.GlobalAveragePooling1D()(hidden))
    return keras.Model(inputs, outputs)


def test_attention_needs_no_noise_on_weights(populations):
    x, y = sequences((4, 8))
    model = make(attention, "local_reparam", examples_population_size=6)
    before = model.get_weights()
    models.fit(model, x, y[:, :1], epochs=1)
    assert populations == [{"example": 6}]
    for a, b in zip(before, model.get_weights(), strict=True):
        assert np.all(a != b)


def regularized():
    return layers.Dense(5, kernel_regularizer="l2")


def constrained():
    return layers.Dense(5, bias_constraint="non_neg")


class Tied(layers.Layer):
    """x W, and that times W^T."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(5, use_bias=False)

    def build(self, shape):
        self.dense.build(shape)

    def call(self, inputs):
        hidden = self.dense(inputs)
        return keras.ops.matmul(hidden, keras.ops.transpose(self.dense.kernel))


class InFunction(layers.Layer):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(5)

    def build(self, shape):
        self.dense.build(shape)

    @tf.function(autograph=False)
    def call(self, inputs):
        return self.dense(inputs)


class OwnProduct(layers.Dense):
    def call(self, inputs):
        return keras.ops.matmul(inputs, self.kernel) + self.bias


class Positions(layers.Layer):
    """Adds what an embedding has for each position, as Keras's examples do."""

    def __init__(self):
        super().__init__()
        self.table = layers.Embedding(8, 4)

    def call(self, inputs):
        count = inputs.shape[1]
        added = self.table(keras.ops.arange(count))
        return keras.ops.reshape(inputs, (-1, count, 1)) + added


class Folded(layers.Layer):
    """Dense over examples and positions in one axis."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(4)

    def build(self, shape):
        self.dense.build((None, 2))

    def call(self, inputs):
        rows = self.dense(keras.ops.reshape(inputs, (-1, 2)))
        return keras.ops.reshape(rows, (-1, 8))


LEFT = {
    "regularizer": lambda: [regularized()],
    "constraint": lambda: [constrained()],
    "tied": lambda: [Tied()],
    "loop": lambda: [layers.Reshape((2, 2)), layers.SimpleRNN(5)],
    "own call": lambda: [OwnProduct(5)],
    "assigned in a call": lambda: [
        layers.SpectralNormalization(layers.Dense(5))
    ],
    "position embedding": lambda: [Positions(), layers.Flatten()],
    "folded": lambda: [Folded()],
    "batch normalization": lambda: [
        layers.Dense(5),
        layers.BatchNormalization(scale=False, center=False),
    ],
}
SIZES = {"population_size": 10, "examples_population_size": 6}


@pytest.mark.parametrize(
    "name, eagerly",
    [
        *((name, False) for name in LEFT),
        *((name, True) for name in ("regularizer", "tied", "folded")),
        ("batch normalization", True),
    ],
)
def test_what_keeps_noise_on_its_weights(name, eagerly, populations):
    """Before a Dense, which has noise on its outputs."""
    x, y = sequences((4,))
    model = make(
        lambda: ended(keras.Input((4,)), *LEFT[name]()),
        "local_reparam",
        run_eagerly=eagerly,
        **SIZES,
    )
    models.fit(model, x[:8], y[:8], epochs=1)
    assert populations and all(
        p == {"member": 10, "example": 6} for p in populations
    )


@pytest.mark.parametrize(
    "name, eagerly",
    [
        ("tied", True),
        ("loop", False),
        ("assigned in a call", False),
        ("folded", False),
        ("batch normalization", False),
        ("batch normalization", True),
    ],
)
def test_what_is_left_alone_is_trained_as_in_full(name, eagerly, populations):
    x, y = sequences((4,))
    y = np.tile(y, [1, 8])

    def alone():
        return keras.Sequential([keras.Input((4,)), *LEFT[name]()])

    columns = alone().output_shape[-1]
    runs = [
        trajectory(
            make(alone, kind, run_eagerly=eagerly, **SIZES),
            x,
            y[:, :columns],
            epochs=1,
        )
        for kind in ("local_reparam", "full")
    ]
    np.testing.assert_array_equal(*runs)
    assert all(p == {"member": 10} for p in populations)


def test_a_function_that_was_decorated(populations):
    x, y = sequences((4,))
    model = make(
        lambda: ended(keras.Input((4,)), InFunction()), "local_reparam"
    )
    models.fit(model, x, y)
    assert populations[-1] == {"member": 8, "example": 8}


def test_what_is_left_is_logged_once(monkeypatch):
    said = []
    monkeypatch.setattr(placement, "_announced", set())
    monkeypatch.setattr(
        placement.absl_logging, "info", lambda text, *args: said.append(args)
    )
    x, y = sequences((4,))
    model = make(
        lambda: ended(keras.Input((4,)), regularized()), "local_reparam"
    )
    for _ in range(2):
        models.fit(model, x, y, epochs=1)
    assert said == [(model.layers[0].name, "its weights have a regularizer")]


def test_first_axes_that_have_the_size_of_the_batch(populations):
    """4 positions, 4 examples: the embedding is no one's all the same."""
    x, y = sequences((4,))
    model = make(lambda: ended(keras.Input((4,)), Positions()), "local_reparam")
    models.fit(model, x[:4], y[:4], batch_size=4)
    assert populations == [{"member": 8, "example": 8}]


def test_a_layer_of_two_calls_one_of_which_has_many_positions(populations):
    def network():
        short, long = keras.Input((4,)), keras.Input((100, 4))
        dense = layers.Dense(3)
        pooled = layers.GlobalAveragePooling1D()(dense(long))
        return keras.Model([short, long], dense(short) + pooled)

    rng = np.random.default_rng(0)
    short, long = rng.normal(size=(24, 4)), rng.normal(size=(24, 100, 4))
    y = rng.normal(size=(24, 3))
    models.fit(make(network, "local_reparam"), [short, long], y)
    assert populations == [{"member": 8}]


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16"])
def test_layers_that_cast_their_weights(policy, populations):
    """Their variables are tensors while they are called."""
    keras.config.set_dtype_policy(policy)
    x, y = models.make_data()
    model = make(mlp, "local_reparam", FROM_LOGITS)
    before = models.weights(model)
    models.fit(model, x, y)
    assert populations == [{"example": 8}]
    assert np.any(models.weights(model) != before)


def test_ids_below_zero_are_those_from_the_end():
    rng = np.random.default_rng(0)
    ids, y = rng.integers(0, 7, (24, 3)), rng.normal(size=(24, 2))
    for perturbation in ("local_reparam", "low_rank"):
        model = make(
            lambda: ended(keras.Input((3,)), layers.Embedding(7, 5)),
            perturbation,
        )
        model.optimizer.build(model.trainable_variables)
        rewind = models.rewinder(model)
        above = trajectory(model, ids, y)
        rewind()
        np.testing.assert_array_equal(above, trajectory(model, ids - 7, y))


def test_masks_that_a_later_layer_does_not_know(populations):
    """A mean over all positions: those of the mask move the weights, too."""
    rng = np.random.default_rng(0)
    ids, y = rng.integers(1, 7, (24, 3)), rng.normal(size=(24, 2))
    ids[:, -1] = 0

    class Mean(layers.Layer):
        def call(self, inputs):
            return keras.ops.mean(inputs, 1)

    def network(mask_zero):
        return lambda: keras.Sequential(
            [
                keras.Input((3,)),
                layers.Embedding(7, 8, mask_zero=mask_zero),
                layers.Dense(5, activation="relu"),
                Mean(),
                layers.Dense(2),
            ]
        )

    with pytest.warns(UserWarning, match="destroy the mask"):
        model = make(network(True), "local_reparam")
        masked = trajectory(model, ids, y, epochs=1)
    model = make(network(False), "local_reparam", run_eagerly=True)
    plain = trajectory(model, ids, y, epochs=1)
    np.testing.assert_allclose(masked, plain, rtol=1e-5, atol=1e-6)


class ConvolutionWithLosses(keras_vo.VOModel):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        return tf.reduce_mean(tf.square(y - y_pred), -1)


def test_losses_of_examples_where_no_layer_is_covered(populations):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(24, 5, 3)), rng.normal(size=(24, 2))
    inputs = keras.Input((5, 3))
    outputs = layers.GlobalAveragePooling1D()(layers.Conv1D(2, 3)(inputs))
    model = ConvolutionWithLosses(inputs, outputs)
    model.compile(optimizer=models.make_optimizer(perturbation="local_reparam"))
    models.fit(model, x, y)
    assert populations == [{"member": 8}]


# --- populations ---


def test_noise_on_weights_does_not_blur_that_of_examples(populations):
    """Local noise of a Dense is the same whether weights before it have noise.

    A convolution, which has: in the first step, Dense moves as if it were
    frozen.
    """
    rng = np.random.default_rng(0)
    x, y = (
        rng.normal(size=(8, 6, 6, 1)).astype("float32"),
        rng.normal(size=(8, 2)),
    )

    def network(trainable):
        return keras.Sequential(
            [
                keras.Input((6, 6, 1)),
                layers.Conv2D(3, 3, trainable=trainable),
                layers.Flatten(),
                layers.Dense(2, name="dense"),
            ]
        )

    moved = []
    for trainable in (True, False):
        model = make(
            functools.partial(network, trainable),
            "local_reparam",
            run_eagerly=not trainable,
            **SIZES,
        )
        model.train_on_batch(x, y)
        moved.append(model.get_layer("dense").get_weights())
    for one, other in zip(*moved, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    assert populations == [{"member": 10, "example": 6}, {"example": 6}]


def trained_attention(perturbation, **kwargs):
    x, y = sequences((4, 8))
    model = make(attention, perturbation, examples_population_size=10, **kwargs)
    return trajectory(model, x, y[:, :1], epochs=1)


@pytest.mark.parametrize("perturbation", ["local_reparam", "low_rank"])
def test_the_same_in_chunks_of_examples_population_and_eagerly(perturbation):
    whole = trained_attention(perturbation)
    eager = trained_attention(perturbation, run_eagerly=True)
    np.testing.assert_allclose(eager, whole, rtol=1e-3, atol=1e-4)
    if perturbation == "local_reparam":
        cut = trained_attention(perturbation, chunk_size=4)
        np.testing.assert_allclose(cut, whole, rtol=1e-4, atol=1e-5)


def test_part_of_a_step_by_default():
    """In units of sigma where losses of examples lead."""
    rng = np.random.default_rng(0)
    x, y = (
        rng.normal(size=(8, 6, 6, 1)).astype("float32"),
        rng.normal(size=(8, 2)),
    )

    def moved(inner, *first, **compiling):
        model = keras_vo.VOSequential(
            [keras.Input((6, 6, 1)), *first, layers.Flatten(), layers.Dense(2)]
        )
        model.compile(
            optimizer=keras_vo.VOOptimizer(
                inner, 10, perturbation="local_reparam", seed=1
            ),
            loss="mse",
            **compiling,
        )
        generator = np.random.default_rng(1)
        before = [  # biases that are not 0 would look trained
            generator.normal(size=w.shape) * (w.ndim > 1)
            for w in model.get_weights()
        ]
        model.set_weights(before)
        before = model.get_weights()
        model.train_on_batch(x, y)
        after = zip(before, model.get_weights(), strict=True)
        return [b - a for a, b in after]

    rate = keras_vo.VOOptimizer("sgd").learning_rate
    for first, parts in {
        (): [0.625] * 2,  # 0.1 * 0.75 / sqrt(36) / 0.02
        (layers.Conv2D(3, 3),): [1, 1] + [0.1 * 0.75 / 48**0.5 / 0.02] * 2,
    }.items():
        copies = [type(f).from_config(f.get_config()) for f in first]
        named = moved("sgd", *first)
        inner = keras.optimizers.SGD(float(rate))
        given = moved(inner, *copies, run_eagerly=True)
        for one, other, part in zip(named, given, parts, strict=True):
            assert np.abs(other).max() > 0
            np.testing.assert_allclose(one, part * other, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("steps", [3, 20])
def test_layers_of_more_outputs_than_weights(steps, populations):
    """A Dense of 4 inputs, at 3 positions or at 20."""
    x, y = sequences((steps, 4))

    def network():
        return keras.Sequential(
            [
                keras.Input((steps, 4)),
                layers.Dense(5, activation="relu"),
                layers.LayerNormalization(),
                layers.GlobalAveragePooling1D(),
                layers.Dense(2),
            ]
        )

    models.fit(make(network, "local_reparam"), x, y)
    few = {3: {"example": 8}, 20: {"member": 8, "example": 8}}
    assert populations == [few[steps]]


def test_two_replicas():
    """They have shards of 4 and 4, then of 1 and 1; and the same weights.

    Low rank: test_conformance.py.
    """
    x, y = sequences((3, 4), 10)
    with models.mirrored(2).scope():
        model = make(
            lambda: ended(keras.Input((3, 4)), layers.Dense(5)),
            "local_reparam",
        )
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
    history = models.fit(model, batches.repeat(4), batch_size=None)["loss"]
    assert history[-1] < history[0]
    for variable in model.trainable_variables:
        first, second = variable.value.values
        np.testing.assert_array_equal(first, second)


# --- low rank ---


def everything():
    """A kernel of each kind: embedding, einsum, recurrent, convolution."""
    inputs = keras.Input((6,))
    hidden = layers.Embedding(7, 8)(inputs)
    hidden = layers.MultiHeadAttention(2, 4)(hidden, hidden)
    hidden = layers.Conv1D(4, 3)(hidden)
    hidden = layers.GRU(5)(hidden)
    return keras.Model(inputs, layers.Dense(2)(hidden))


def test_low_rank_draws_few_normals(monkeypatch):
    """Per kernel its last axis and the product of the others; each bias."""
    sizes = []
    source = engine.Search.source

    def noted(self, level, members, activations):
        sizes.append(self.perturbations.at(level).noise_size)
        return source(self, level, members, activations)

    monkeypatch.setattr(engine.Search, "source", noted)
    rng = np.random.default_rng(0)
    ids, y = rng.integers(0, 7, (24, 6)), rng.normal(size=(24, 2))
    model = make(everything, "low_rank")
    before = model.get_weights()
    models.fit(model, ids, y)
    want = sum(
        np.prod(w.shape[:-1]) + w.shape[-1] if w.ndim > 1 else w.size
        for w in before
    )
    assert set(sizes) == {want}
    for a, b in zip(before, model.get_weights(), strict=True):
        assert np.all(a != b)


def test_factored_products_are_those_of_formed_kernels(monkeypatch):
    """Embedding, EinsumDense and Dense: with the products, and without."""
    rng = np.random.default_rng(0)
    ids, y = rng.integers(0, 7, (24, 6)), rng.normal(size=(24, 2))

    def network():
        inputs = keras.Input((6,))
        hidden = layers.Embedding(7, 8)(inputs)
        hidden = layers.MultiHeadAttention(2, 4)(hidden, hidden)
        hidden = layers.GlobalAveragePooling1D()(hidden)
        return keras.Model(inputs, layers.Dense(2)(hidden))

    run = functools.partial(make, network, "low_rank", structure="separable")
    factored = trajectory(run(), ids, y)
    monkeypatch.setattr(layer_calls, "CLASSES", ())
    formed = trajectory(run(), ids, y)
    np.testing.assert_allclose(factored, formed, rtol=1e-3, atol=1e-4)


def test_low_rank_of_minimize():
    """f = sum w: E of low rank has mean 0; a kernel learns, and is one."""
    kernel = keras.Variable(np.ones((5, 6), "float32"))
    optimizer = keras_vo.VOOptimizer(
        keras.optimizers.SGD(1.0),
        population_size=4000,
        perturbation="low_rank",
        search_distribution=keras_vo.GaussianSearchDistribution(
            "fixed", stddev=0.5
        ),
        natural_gradient=False,
        fitness_shaping="identity",
        seed=0,
    )
    seen = []

    def objective(weights):
        seen.append(weights[0].shape)
        return tf.reduce_sum(weights[0] * tf.reshape(tf.range(30.0), [5, 6]))

    tf.function(
        lambda: optimizer.minimize(objective, [kernel]), autograph=False
    )()
    # dU/dmu = 0..29; the standard error of 4000 members is |t| / sqrt(4000).
    error = np.sqrt((np.arange(30.0) ** 2).sum()) / 4000**0.5
    change = 1 - kernel.numpy() - np.arange(30.0).reshape(5, 6)
    assert np.abs(change).max() < 5 * 2 * error
    assert seen[0] == (5, 6)


# --- nothing of Keras's changes ---


def test_layers_and_files_are_those_of_keras(tmp_path):
    own = {cls: cls.call for cls in layer_calls.CLASSES}
    x, y = sequences((4, 8))
    model = make(attention, "local_reparam")
    models.fit(model, x, y[:, :1])
    assert {cls: cls.call for cls in layer_calls.CLASSES} == own
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.perturbation == "local_reparam"
    for copy in (loaded, keras.models.clone_model(model)):
        assert {
            type(layer).__module__.split(".")[0] for layer in copy.layers
        } == {"keras"}
    models.fit(model, x, y[:, :1], epochs=1)
    models.fit(loaded, x, y[:, :1], epochs=1)
    models.assert_same_state(
        models.search_state(model), models.search_state(loaded)
    )


def test_a_loaded_model_takes_the_same_part_of_steps(tmp_path):
    x, y = sequences((4,))
    model = keras_vo.VOSequential([keras.Input((4,)), layers.Dense(2)])
    model.compile(
        optimizer=keras_vo.VOOptimizer(perturbation="local_reparam", seed=1),
        loss="mse",
    )
    models.fit(model, x, y, epochs=1)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for one in (model, loaded):
        models.fit(one, x, y, epochs=1)
    models.assert_same_state(
        models.search_state(model), models.search_state(loaded)
    )


def test_calls_in_other_threads_and_after_an_error():
    own = layers.Dense.call
    dense = layers.Dense(3)
    x = np.ones((2, 4), "float32")
    want = dense(x).numpy()
    called, seen = [], []

    def handler(layer, call, *args, **kwargs):
        called.append(threading.get_ident())
        return call(*args, **kwargs) + 1

    with layer_calls.intercepted(handler):
        other = threading.Thread(target=lambda: seen.append(dense(x).numpy()))
        other.start()
        other.join()
        np.testing.assert_allclose(dense(x), want + 1)
    np.testing.assert_array_equal(seen[0], want)
    assert called == [threading.get_ident()]

    def fails(*args, **kwargs):
        raise ArithmeticError

    with pytest.raises(ArithmeticError), layer_calls.intercepted(fails):
        dense(x)
    assert layers.Dense.call is own


def test_the_argument_is_checked():
    with pytest.raises(
        ValueError, match="`perturbation` must be one of .*Received: .*'local'"
    ):
        keras_vo.VOOptimizer(perturbation="local")
    with pytest.raises(ValueError, match="`examples_population_size` .* even"):
        keras_vo.VOOptimizer(examples_population_size=7)
    optimizer = keras_vo.VOOptimizer(
        perturbation="low_rank", examples_population_size=6
    )
    config = optimizer.get_config()
    again = keras_vo.VOOptimizer.from_config(config)
    assert again.get_config() == config


@pytest.mark.parametrize(
    "equation, rank",
    [
        ("abc,cd->abd", 2),  # of another rank
        ("abc,abcd->abd", 3),  # an axis of all three
        ("abc,cde->abd", 3),  # a sum over the kernel alone
        ("abc,cd->ad", 3),  # and over the inputs alone
        ("aab,bc->ac", 3),  # a diagonal
        ("abc,cd->bad", 3),  # examples not first
    ],
)
def test_equations_that_are_no_product_of_matrices(equation, rank):
    assert Contraction.parse(equation, rank) is None
