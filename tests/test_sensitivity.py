"""Noise that is divided by the sensitivities of weights."""

import functools
import pickle

import keras
import models
import numpy as np
import pytest
import tensorflow as tf
from models import assert_replicas_are_equal, mirrored, scope

import keras_vo
from keras_vo.evaluation.data_flow import DataFlow
from keras_vo.keras_compat import layer_calls
from keras_vo.search import layout
from keras_vo.search.gaussian import Gaussian, kl_divergence, step_kl
from keras_vo.search.sensitivity import divergence, normalized

SIGMA = 0.25
layers = keras.layers


def optimizer(sensitivity, **arguments):
    """Nothing moves, so that sigma / s is what was measured."""
    arguments.setdefault("inner_optimizer", keras.optimizers.SGD(0.0))
    arguments.setdefault("population_size", 4)
    arguments.setdefault(
        "search_distribution",
        keras_vo.GaussianSearchDistribution("fixed", SIGMA),
    )
    return keras_vo.VOOptimizer(sensitivity=sensitivity, seed=1, **arguments)


def measured(model, *data, sensitivity, **arguments):
    """s of each variable after a step; sigma / s is what the search has."""
    model = keras_vo.make_variational(model)
    compiling = {
        name: arguments.pop(name)
        for name in ("loss", "run_eagerly")
        if name in arguments
    }
    model.compile(
        optimizer=optimizer(sensitivity, **arguments),
        **{"loss": "mse", **compiling},
    )
    model.train_on_batch(*data)
    search = keras_vo.optimizer.find_vo_optimizer(model.optimizer)
    return [SIGMA / s.numpy() for s in search.stddevs]


def of_layers(variables, raw):
    """`normalized`, in NumPy."""
    groups = layout.layer_groups(variables)
    scaled = [None] * len(raw)
    for group in set(groups):
        own = [i for i, g in enumerate(groups) if g == group]
        largest = max(raw[i].max() for i in own)
        clamped = {i: np.maximum(raw[i] / largest, 0.01) for i in own}
        mean = np.mean(
            np.concatenate([1 / c.ravel() ** 2 for c in clamped.values()])
        )
        for i in own:
            scaled[i] = clamped[i] * mean**0.5
    return scaled


def jacobians(model, x):
    """dy/dw of one example, position and unit after the other.

    Returns:
        For each output and weight an array [batch, positions, units, ...].
    """

    def outputs_of(i):
        one = keras.tree.map_structure(lambda a: tf.constant(a[i : i + 1]), x)
        outputs = keras.tree.flatten(model(one, training=False))
        return [tf.reshape(y, [-1, y.shape[-1]]) for y in outputs]

    def gradient(i, number, t, k):
        with tf.GradientTape() as tape:
            value = outputs_of(i)[number][t, k]
        found = tape.gradient(value, weights, unconnected_gradients="zero")
        return [tf.convert_to_tensor(g).numpy() for g in found]

    weights = [v.value for v in model.trainable_variables]
    examples = len(keras.tree.flatten(x)[0])
    found = []
    for number, y in enumerate(outputs_of(0)):
        shape = (examples, *y.shape)
        every = [gradient(i, number, t, k) for i, t, k in np.ndindex(shape)]
        found.append(
            [
                np.reshape(values, shape + np.shape(values[0]))
                for values in zip(*every, strict=True)
            ]
        )
    return found


def expected(model, x):
    """Eq. 35, normalized, for both kinds."""
    raw = {"sum": 0.0, "abs": 0.0}
    for by_weight in jacobians(model, x):
        for kind, values in (
            ("sum", by_weight),
            ("abs", list(map(np.abs, by_weight))),
        ):
            squares = [np.sum(j.mean((0, 1)) ** 2, axis=0) for j in values]
            known = raw[kind]
            raw[kind] = list(map(np.add, known, squares)) if known else squares
    return {
        kind: of_layers(model.trainable_variables, list(map(np.sqrt, squares)))
        for kind, squares in raw.items()
    }


def assert_all_close(got, want, rtol=1e-4):
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=rtol)


# --- networks ---


def rows(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def dense():
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(5, activation="tanh"),
            layers.Dropout(0.5),
            layers.Dense(3),
        ]
    )
    return model, rows(6, 4), rows(6, 3)


def convolutional():
    model = keras.Sequential(
        [
            keras.Input((7, 6, 2)),
            layers.Conv2D(3, 3, strides=2, padding="same", activation="relu"),
            layers.DepthwiseConv2D(2),
            layers.GlobalAveragePooling2D(),
            layers.Dense(2, use_bias=False),
        ]
    )
    return model, rows(4, 7, 6, 2), rows(4, 2)


def recurrent():
    model = keras.Sequential(
        [
            keras.Input((5,), dtype="int32"),
            layers.Embedding(7, 3, mask_zero=True),
            layers.GRU(4, return_sequences=True),
            layers.LayerNormalization(),
            layers.Dense(2),
        ]
    )
    x = np.random.default_rng(0).integers(1, 6, size=(4, 5))
    x[:, 3:] = 0
    return model, x, rows(4, 5, 2)


def attentive():
    inputs = keras.Input((4, 3))
    x = layers.MultiHeadAttention(2, 3)(inputs, inputs)
    x = layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, layers.Dense(1)(x)), rows(4, 4, 3), rows(4, 1)


def two_outputs():
    a, b = keras.Input((3,)), keras.Input((2,))
    joined = layers.Dense(4, activation="tanh")(layers.Concatenate()([a, b]))
    outputs = [layers.Dense(2)(joined), layers.Dense(1)(joined)]
    model = keras.Model([a, b], outputs)
    return model, [rows(5, 3), rows(5, 2)], [rows(5, 2), rows(5, 1)]


NETWORKS = [dense, convolutional, recurrent, attentive, two_outputs]


def made(network):
    keras.utils.set_random_seed(0)
    model, x, y = network()
    for v in model.trainable_variables:  # biases, too
        v.assign(v + 0.1 * rows(*v.shape, seed=3))
    return model, x, y


@pytest.mark.parametrize("network", NETWORKS)
def test_derivatives_of_outputs(network):
    """Eq. 35, of example by example, position by position, unit by unit."""
    model, x, y = made(network)
    loss = ["mse"] * 2 if isinstance(y, list) else "mse"
    for kind, want in expected(model, x).items():
        got = measured(model, x, y, sensitivity=kind, loss=loss)
        assert_all_close(got, want, 1e-3)


@pytest.mark.parametrize("kind", ["sum", "abs"])
def test_rows_by_rows_and_eagerly(kind):
    """A row of the Jacobian at a time; and with run_eagerly=True."""
    model, x, y = made(dense)
    whole = measured(model, x, y, sensitivity=kind)
    cut = measured(model, x, y, sensitivity=kind, memory_budget=1)
    eager = measured(model, x, y, sensitivity=kind, run_eagerly=True)
    assert_all_close(cut, whole, 1e-5)
    assert_all_close(eager, whole, 1e-5)


@pytest.mark.parametrize("kind", ["sum", "abs"])
def test_batch_normalization_has_the_statistics_of_the_batch(kind):
    """As constants: they are not differentiated."""
    keras.utils.set_random_seed(0)
    normalization = layers.BatchNormalization(momentum=0.7)
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(5), normalization, layers.Dense(3)]
    )
    x, y = rows(6, 4), rows(6, 3)
    hidden = model.layers[0](x).numpy()
    normalization.moving_mean.assign(hidden.mean(0))
    normalization.moving_variance.assign(hidden.var(0))
    want = expected(model, x)[kind]
    normalization.moving_mean.assign(np.zeros(5))
    normalization.moving_variance.assign(np.ones(5))
    got = measured(model, x, y, sensitivity=kind)
    assert_all_close(got, want, 1e-3)
    assert normalization.momentum == 0.7
    np.testing.assert_allclose(  # those of one step, and no more
        normalization.moving_mean, 0.3 * hidden.mean(0), rtol=1e-4, atol=1e-6
    )


# --- inputs ---


def test_inputs_of_dense_layers():
    model, x, y = made(dense)
    hidden = np.tanh(
        x @ model.layers[0].kernel.numpy() + model.layers[0].bias.numpy()
    )
    model = keras.Sequential([model.layers[0], model.layers[-1]])
    raw = []
    for inputs, units in ((x, 5), (hidden, 3)):
        squares = np.sqrt((inputs**2).mean(0))
        raw += [np.repeat(squares[:, None], units, axis=1), np.ones(units)]
    want = of_layers(model.trainable_variables, raw)
    got = measured(model, x, y, sensitivity="inputs")
    assert_all_close(got, want)


def patches(x, size, stride, padding):
    """Windows of images, by NumPy: [batch, places, size, size, channels]."""
    x = np.pad(x, [(0, 0), *padding, (0, 0)])
    found = []
    for i in range(0, x.shape[1] - size + 1, stride):
        for j in range(0, x.shape[2] - size + 1, stride):
            found.append(x[:, i : i + size, j : j + size])
    return np.stack(found, axis=1)


@pytest.mark.parametrize(
    "options, padding",
    [
        ({"strides": 2, "padding": "same"}, [(1, 1), (0, 1)]),
        ({}, [(0, 0), (0, 0)]),
    ],
)
def test_inputs_of_a_convolution(options, padding):
    model = keras.Sequential(
        [
            keras.Input((7, 6, 2)),
            layers.Conv2D(4, 3, **options),
            layers.GlobalAveragePooling2D(),
        ]
    )
    x = rows(5, 7, 6, 2)
    found = patches(x, 3, options.get("strides", 1), padding)
    squares = np.sqrt((found**2).mean((0, 1)))[..., None]
    raw = [np.broadcast_to(squares, (3, 3, 2, 4)), np.ones(4)]
    got = measured(model, x, rows(5, 4), sensitivity="inputs")
    assert_all_close(got, of_layers(model.trainable_variables, raw))


def by_channel(squares, shape, axis):
    new = [1] * len(shape)
    new[axis] = -1
    return np.broadcast_to(np.reshape(squares, new), shape)


@pytest.mark.parametrize(
    "layer, axis",
    [
        (layers.DepthwiseConv2D(2, depth_multiplier=2), -2),
        (layers.Conv2DTranspose(3, 2), -1),
        (layers.SeparableConv2D(3, 2), -2),
    ],
    ids=["depthwise", "transposed", "separable"],
)
def test_inputs_by_channel(layer, axis):
    model = keras.Sequential(
        [keras.Input((5, 5, 4)), layer, layers.GlobalAveragePooling2D()]
    )
    x = rows(3, 5, 5, 4) * [1, 2, 3, 4]
    y = rows(3, model.output_shape[-1])
    squares = np.sqrt((x**2).mean((0, 1, 2)))
    raw = [np.ones(v.shape) for v in model.trainable_variables]
    raw[0] = by_channel(squares, raw[0].shape, axis)
    got = measured(model, x, y, sensitivity="inputs")
    assert_all_close(got, of_layers(model.trainable_variables, raw))


def test_inputs_of_a_convolution_in_groups():
    """A filter has the rows of its group's channels."""
    layer = layers.Conv2D(6, 2, groups=2, use_bias=False)
    model = keras.Sequential(
        [keras.Input((5, 5, 4)), layer, layers.GlobalAveragePooling2D()]
    )
    x = rows(3, 5, 5, 4) * [1, 2, 3, 4]
    squares = np.sqrt((x**2).mean((0, 1, 2)))
    raw = np.empty((2, 2, 2, 6))
    raw[..., :3] = squares[:2, None]
    raw[..., 3:] = squares[2:, None]
    got = measured(model, x, rows(3, 6), sensitivity="inputs")
    assert_all_close(got, of_layers(model.trainable_variables, [raw]))


def test_positions_that_are_masked_do_not_count_in_attention():
    """Those of padding are what an attention layer computes, all the same."""
    inputs = keras.Input((5,), dtype="int32")
    embedding = layers.Embedding(7, 3, mask_zero=True)
    attention = layers.MultiHeadAttention(1, 2)
    h = embedding(inputs)
    h = layers.GlobalAveragePooling1D()(attention(h, h))
    model = keras.Model(inputs, h)
    x = np.random.default_rng(0).integers(1, 6, size=(4, 5))
    x[:, 3:] = 0
    embedding.embeddings.assign(rows(7, 3) * np.arange(1, 8)[:, None])
    got = measured(model, x, rows(4, 3), sensitivity="inputs")
    embedded = embedding.embeddings.numpy()[x[:, :3]]
    squares = np.sqrt((embedded**2).mean((0, 1)))
    kernel = [np.broadcast_to(squares[:, None, None], (3, 1, 2))]
    paths = [v.path for v in model.trainable_variables]
    for name in ("query", "key", "value"):
        own = [i for i, p in enumerate(paths) if f"/{name}/" in p]
        weights = [model.trainable_variables[i] for i in own]
        want = of_layers(weights, [*kernel, np.ones((1, 2))])
        assert_all_close([got[i] for i in own], want)


def test_inputs_by_keyword_and_of_distributed_convolutions():
    class Network(keras.Model):
        def __init__(self):
            super().__init__()
            self.convolution = layers.Conv1D(3, 2, use_bias=False)
            self.distributed = layers.TimeDistributed(self.convolution)
            self.dense = layers.Dense(2, use_bias=False)

        def call(self, inputs):
            h = self.distributed(inputs=inputs)
            return self.dense(inputs=keras.ops.mean(h, axis=(1, 2)))

    model, x = Network(), rows(4, 3, 5, 2) * [1, 3]
    hidden = keras.ops.convert_to_numpy(model.distributed(x)).mean((1, 2))
    model(x)
    got = measured(model, x, rows(4, 2), sensitivity="inputs")
    raw = [
        by_channel(np.sqrt((x**2).mean((0, 1, 2))), (2, 2, 3), -2),
        np.repeat(np.sqrt((hidden**2).mean(0))[:, None], 2, axis=1),
    ]
    assert_all_close(got, of_layers(model.trainable_variables, raw))


def test_inputs_of_embeddings_recurrent_layers_and_normalizations():
    """What is masked does not count; recurrent kernels count as biases.

    And layers are as they were after a pass.
    """
    own = {cls: cls.call for cls in layer_calls.WITH_KERNELS}
    model, x, y = made(recurrent)
    embedding, gru, normalization, last = model.layers
    want = []
    counts = np.bincount(x.ravel(), minlength=7) / np.sum(x > 0)
    counts[0] = 0.0  # a mask: no row is looked up
    want.append(np.repeat(np.sqrt(counts)[:, None], 3, axis=1))
    embedded = embedding.embeddings.numpy()[x[:, :3]]
    squares = np.sqrt((embedded**2).mean((0, 1)))
    want.append(np.repeat(squares[:, None], 12, axis=1))
    want += [np.ones((4, 12)), np.ones((2, 12))]
    hidden = gru(embedding(x), mask=x > 0).numpy()[:, :3]
    centred = hidden - hidden.mean(-1, keepdims=True)
    scaled = centred / np.sqrt(hidden.var(-1, keepdims=True) + 1e-3)
    want += [np.sqrt((scaled**2).mean((0, 1))), np.ones(4)]
    outputs = normalization(hidden).numpy()
    squares = np.sqrt((outputs**2).mean((0, 1)))
    want += [np.repeat(squares[:, None], 2, axis=1), np.ones(2)]
    got = measured(model, x, y, sensitivity="inputs")
    assert_all_close(got, of_layers(model.trainable_variables, want), 1e-3)
    assert {cls: cls.call for cls in layer_calls.WITH_KERNELS} == own


@pytest.mark.parametrize(
    "first",
    [
        layers.TimeDistributed(layers.Dense(2, name="inner")),
        layers.EinsumDense("btc,cd->btd", (None, 2), bias_axes="d"),
        layers.Dense(2),
    ],
    ids=["distributed", "einsum", "dense"],
)
def test_inputs_with_positions(first):
    model = keras.Sequential([keras.Input((4, 3)), first])
    x = rows(5, 4, 3) * [1, 2, 3]
    squares = np.sqrt((x**2).mean((0, 1)))
    raw = [np.repeat(squares[:, None], 2, axis=1), np.ones(2)]
    got = measured(model, x, rows(5, 4, 2), sensitivity="inputs")
    assert_all_close(got, of_layers(model.trainable_variables, raw))


def test_calls_of_a_shared_layer_add_up():
    shared, inputs = layers.Dense(3, use_bias=False), keras.Input((3,))
    model = keras.Model(inputs, shared(shared(inputs)))
    x = rows(5, 3)
    both = np.concatenate([x, x @ shared.kernel.numpy()])
    raw = np.repeat(np.sqrt((both**2).mean(0))[:, None], 3, axis=1)
    got = measured(model, x, rows(5, 3), sensitivity="inputs")
    assert_all_close(got, of_layers(model.trainable_variables, [raw]))


def test_step_units_have_no_derivative_but_inputs():
    """A fixed seed; seeds 0 to 4 of the search all end at 1."""
    x, y = models.make_data(120)
    keras.utils.set_random_seed(0)
    model = models.make_model(
        [
            layers.Dense(12, activation=lambda x: tf.cast(x > 0, tf.float32)),
            layers.Dense(3),
        ],
        optimizer=models.make_optimizer(
            population_size=64, sensitivity="inputs"
        ),
        loss=models.zero_one_error,
    )
    batches = tf.data.Dataset.from_tensors((x, y)).repeat(100)
    model.fit(batches, shuffle=False, verbose=0)
    assert models.accuracy(model, x, y) > 0.9


# --- what has no derivative ---


@tf.custom_gradient
def straight_through(x):
    return tf.sign(x), lambda upstream: upstream


class Lambda(layers.Layer):
    def __init__(self, function, **kwargs):
        super().__init__(**kwargs)
        self.function = function

    def call(self, inputs):
        return self.function(inputs)


def with_activation(function):
    inputs = keras.Input((4,))
    hidden = layers.Dense(5, name="first")(inputs)
    hidden = Lambda(function, name="quantizer")(hidden)
    return keras.Model(inputs, layers.Dense(3, name="last")(hidden))


@pytest.mark.parametrize(
    "kind, run_eagerly, function, op",
    [
        ("sum", False, lambda x: tf.cast(x > 0, tf.float32), "Greater"),
        ("abs", True, lambda x: tf.cast(x > 0, tf.float32), "Greater"),
        ("abs", False, tf.sign, "Sign"),
        ("sum", True, tf.sign, "Sign"),
        ("sum", False, tf.round, "Round"),
        ("sum", False, tf.function(tf.sign), "Sign"),
        ("abs", False, lambda x: tf.map_fn(tf.sign, x), "Sign"),
        (
            "sum",
            False,
            lambda x: tf.cond(
                x[0, 0] > 0, lambda: tf.round(x), lambda: tf.sign(x)
            ),
            "Round",
        ),
    ],
    ids=range(8),
)
def test_no_gradient_is_an_error(function, op, kind, run_eagerly):
    """TensorFlow's gradient is none, or (of `sign`) zero."""
    with pytest.raises(ValueError) as caught:
        measured(
            with_activation(function),
            rows(6, 4),
            rows(6, 3),
            sensitivity=kind,
            run_eagerly=run_eagerly,
        )
    message = str(caught.value)
    for part in ("'first'", "sensitivity=None", '"inputs"', f"{op} in "):
        assert part in message
    assert "'last'" not in message and "quantizer" in message


class InFunction(layers.Layer):
    """A Dense in a function of TensorFlow, which reads its variables."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(4)

    def build(self, shape):
        self.dense.build(shape)

    @tf.function(autograph=False)
    def call(self, inputs):
        return self.dense(inputs)


@pytest.mark.parametrize("kind", ["sum", "abs"])
def test_weights_that_a_function_reads_itself(kind):
    """They are not those that outputs are differentiated by."""
    inputs = keras.Input((4,))
    hidden = layers.Dense(4, name="first")(inputs)
    model = keras.Model(inputs, InFunction(name="inside")(hidden))
    with pytest.raises(ValueError) as caught:
        measured(model, rows(6, 4), rows(6, 4), sensitivity=kind)
    assert "'inside/dense" in str(caught.value)
    assert "a tf.function that reads" in str(caught.value)
    assert "'first'" not in str(caught.value)


def counted_up(x):
    """(x, sign(x)) in a loop, then in a function; the sum of both is smooth."""

    def body(i, smooth, steps):
        return i + 1, steps + smooth, tf.sign(smooth)

    _, smooth, steps = tf.while_loop(
        lambda i, *_: i < 3, body, [0, x, tf.zeros_like(x)]
    )
    return tf.function(lambda a, b: (a, b, a + b))(smooth, steps)


@pytest.mark.parametrize(
    "output, is_smooth", [(0, True), (1, False), (2, True)]
)
def test_each_output_of_a_function_and_a_loop(output, is_smooth):
    """The second one is a sign, the others depend on the inputs smoothly."""

    @tf.function(autograph=False)
    def found():
        x, other = tf.ones([2]), tf.ones([2])
        ends = [counted_up(x)[output]]
        reached = DataFlow(ends[0].graph).reached(ends, [x, other])
        smoothly = DataFlow(ends[0].graph, ["Sign"]).reached(ends, [x, other])
        assert reached == [True, False]
        assert smoothly == [is_smooth, False]
        names = DataFlow(ends[0].graph).between(ends, [x], ["Sign"])
        assert len(names) == 1 and names[0].startswith("Sign in 'while/")
        return ends

    found()


def test_a_recurrent_layer_with_step_units():
    """Its weights are behind a sign in the loop. A GRU's kernel is so in part:
    its gates have no derivative, and least sensitivity.
    """

    def network(layer):
        inputs = keras.Input((5, 4))
        return keras.Model(inputs, layers.Dense(3)(layer(inputs)))

    x, y = rows(6, 5, 4), rows(6, 3)
    with pytest.raises(
        ValueError, match="'rnn/simple_rnn_cell'.* behind Sign in "
    ):
        rnn = layers.SimpleRNN(3, activation=tf.sign, name="rnn")
        measured(network(rnn), x, y, sensitivity="sum")
    gru = layers.GRU(3, recurrent_activation=tf.round)
    kernel, *_ = measured(network(gru), x, y, sensitivity="sum")
    gates, candidate = kernel[:, :6], kernel[:, 6:]
    np.testing.assert_allclose(gates, 0.01 * kernel.max(), rtol=1e-5)
    assert candidate.min() > 0.02 * kernel.max()


@pytest.mark.parametrize("kind", ["sum", "abs"])
def test_a_gradient_of_the_users_own(kind):
    model = with_activation(straight_through)
    x, y = rows(6, 4), rows(6, 3)
    want = expected(model, x)[kind]
    assert_all_close(measured(model, x, y, sensitivity=kind), want, 1e-3)


class Network(keras_vo.VOModel):
    """Any function of what a Dense layer makes, and its mean as the loss."""

    def __init__(self, function, optional=False):
        super().__init__()
        self.dense = layers.Dense(3, name="first")
        self.function = function
        self.optional = optional

    def call(self, inputs):
        hidden = self.dense(inputs["x"] if self.optional else inputs)
        self.hidden = hidden
        return self.function(hidden)

    def compute_loss(self, x=None, y=None, y_pred=None, **kwargs):
        return tf.reduce_mean(self.hidden**2)


OUTPUTS = {
    "none": lambda h: {"a": h, "b": None},
    "ragged": tf.RaggedTensor.from_tensor,
    "unknown": lambda h: tf.numpy_function(lambda a: a, [h], tf.float32),
    "integers": lambda h: tf.argmax(h, -1),
    "scalar": tf.reduce_mean,
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_the_monitor_of_any_outputs(kind):
    """What is no tensor of units has no divergence."""
    model = Network(OUTPUTS[kind])
    model.compile(optimizer=optimizer(None))
    monitor = keras_vo.callbacks.SearchMonitor("step")
    x = tf.data.Dataset.from_tensors(rows(6, 4)).repeat(8)
    model.fit(x, shuffle=False, verbose=0, callbacks=[monitor])
    assert np.isnan(monitor.history["divergence"][-1]) == (kind != "none")


@pytest.mark.parametrize("kind", [k for k in OUTPUTS if k != "none"])
def test_outputs_without_units_are_an_error(kind):
    model = Network(OUTPUTS[kind])
    for sensitivity in ("sum", "abs"):
        model.compile(optimizer=optimizer(sensitivity))
        with pytest.raises(ValueError, match="sensitivity=None") as caught:
            model.train_on_batch(rows(6, 4))
        assert '"inputs"' in str(caught.value)
    model.compile(optimizer=optimizer("inputs"))
    model.train_on_batch(rows(6, 4))


@pytest.mark.parametrize("sensitivity", ["sum", "abs", "inputs"])
def test_inputs_that_are_none(sensitivity):
    model = Network(lambda h: h, optional=True)
    model.compile(optimizer=optimizer(sensitivity))
    data = {"a": None, "x": tf.constant(rows(6, 4))}
    model.train_step((data,))
    sigmas = model.optimizer.stddevs
    assert np.all(np.isfinite(sigmas[0]))


def test_what_abs_can_not_do_is_an_error():
    sparse = keras.Sequential([keras.Input((4,), sparse=True), layers.Dense(3)])
    x = tf.sparse.from_dense(rows(6, 4))
    stateful = keras.Sequential(
        [keras.Input(batch_shape=(6, 5, 4)), layers.LSTM(3, stateful=True)]
    )
    for model, inputs in ((sparse, x), (stateful, rows(6, 5, 4))):
        for kind in ("sum", "inputs"):
            measured(model, inputs, rows(6, 3), sensitivity=kind)
        with pytest.raises(ValueError, match='Expected: dense inputs.*"sum"'):
            measured(model, inputs, rows(6, 3), sensitivity="abs")


@pytest.mark.parametrize("sensitivity", [None, "sum", "abs", "inputs"])
def test_variables_of_layers_are_set_back(sensitivity):
    """Three steps count three, also where a monitor looks at the outputs."""

    class Counter(layers.Layer):
        def __init__(self):
            super().__init__()
            self.count = tf.Variable(0.0, trainable=False)

        def call(self, inputs):
            self.count.assign_add(1.0)
            return inputs

    counter = Counter()
    model = keras_vo.VOSequential([keras.Input((4,)), layers.Dense(3), counter])
    model.compile(
        optimizer=optimizer(sensitivity, sensitivity_period=1), loss="mse"
    )
    monitor = keras_vo.callbacks.SearchMonitor("step")
    before = counter.count.numpy()
    data = tf.data.Dataset.from_tensors((rows(6, 4), rows(6, 3))).repeat(8)
    model.fit(data, shuffle=False, verbose=0, callbacks=[monitor])
    assert counter.count.numpy() == before + 8
    assert np.isfinite(monitor.history["divergence"][-1])


def test_weights_that_no_output_depends_on_have_the_sensitivity_1():
    class WithScale(keras_vo.VOModel):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(3)
            self.log_scale = self.add_weight(shape=(2,), name="log_scale")

        def call(self, inputs):
            return self.dense(inputs)

        def compute_loss(self, x=None, y=None, y_pred=None, **kwargs):
            error = tf.reduce_mean(tf.square(y - y_pred))
            return error + tf.reduce_sum(tf.square(self.log_scale))

    model = WithScale()
    model.compile(optimizer=optimizer("sum"))
    model.train_on_batch(rows(6, 4), rows(6, 3))
    found = dict(
        zip(
            [v.name for v in model.trainable_variables],
            [SIGMA / s.numpy() for s in model.optimizer.stddevs],
            strict=True,
        )
    )
    np.testing.assert_allclose(found["log_scale"], 1)
    assert np.ptp(found["kernel"]) > 0.1


# --- s as a list of numbers ---


def test_normalized():
    raw = [
        np.array([[1.0, 2.0], [0.0, 1e-6]]),
        np.array([4.0, np.nan]),
        np.array(0.0),
        np.array([3.0]),
        np.array([np.nan, np.inf]),
    ]
    groups = (0, 0, 1, 2, 3)
    former = tf.range(10, 20, dtype=tf.float64)
    got = normalized([tf.constant(r) for r in raw], groups, former)
    first = np.array([0.25, 0.5, 0.01, 0.01, 1.0, 1.0])
    first *= np.sqrt(np.mean(1 / first**2))
    np.testing.assert_allclose(got, [*first, 1.0, 1.0, 18.0, 19.0])
    np.testing.assert_allclose(np.mean(1 / got[:6] ** 2), 1.0)


@pytest.mark.parametrize("groups", [(0, 0), (0, 1), None])
def test_divergences_of_a_scaled_gaussian(groups):
    weights = layout.WeightLayout(((2, 3), (4,)), ("float64",) * 2, groups)
    rng = np.random.default_rng(0)
    mean, new = rng.normal(size=(2, 10))
    s = rng.uniform(0.5, 2, size=10)
    beta, new_beta = rng.normal(size=(2, weights.num_groups))
    search = Gaussian(
        weights,
        weights.unflatten(tf.constant(mean)),
        tf.constant(beta),
        tf.constant(s),
    )
    own, moved = (
        np.broadcast_to(weights.expand(tf.constant(b)), 10) - 2 * np.log(s)
        for b in (beta, new_beta)
    )
    want = kl_divergence(*map(tf.constant, (new - mean, own, moved)))
    got = step_kl(
        search, weights.unflatten(tf.constant(new)), tf.constant(new_beta)
    )
    np.testing.assert_allclose(got, want, rtol=1e-12)
    got = search.kl(tf.constant(new - mean), tf.constant(new_beta))
    np.testing.assert_allclose(got, want, rtol=1e-12)
    np.testing.assert_allclose(
        weights.flatten(search.stddevs), np.exp(own / 2), rtol=1e-12
    )


def test_divergence():
    one, other = rows(2, 3, 4), rows(2, 3, 4, seed=1)
    want = np.mean(np.sum((one - other) ** 2, -1))
    got = divergence([tf.constant(one)] * 2, [tf.constant(other)] * 2)
    np.testing.assert_allclose(got, 2 * want, rtol=1e-6)


def test_the_monitor_has_divergences():
    """Of y = x W they are chi squares with expectations in closed form:
    sum_jk E[x_j^2] sigma^2 / s_j^2, and sum_jk E[x_j^2] sigma^2.

    Means over 40 draws. With sensitivities all 12 weights have equal parts, a
    standard deviation of (2 / 12)^.5 / 40^.5 = .06; without, three have most
    of it: (2 / 3)^.5 / 40^.5 = .13, so that .25 is 2 of them, and some 5% of
    other seeds would fail. Noise that is off by half is seen.
    """
    model = keras_vo.VOSequential(
        [keras.Input((4,)), layers.Dense(3, use_bias=False)]
    )
    x = rows(50, 4) * [0.2, 1, 3, 9]
    model.compile(optimizer=optimizer("inputs"), loss="mse")
    monitor = keras_vo.callbacks.SearchMonitor("step")
    batches = tf.data.Dataset.from_tensors((x, rows(50, 3))).repeat(320)
    model.fit(batches, shuffle=False, verbose=0, callbacks=[monitor])
    squares = (x**2).mean(0)
    s = of_layers(
        model.trainable_variables, [np.repeat(squares[:, None], 3, 1) ** 0.5]
    )[0]
    for name, scale in (("divergence", s), ("divergence_unscaled", 1.0)):
        values = np.array(monitor.history[name])
        known = ~np.isnan(values)
        assert np.array_equal(np.flatnonzero(known), np.arange(7, 320, 8))
        want = np.sum(squares[:, None] * SIGMA**2 / scale**2 * np.ones((4, 3)))
        assert abs(np.mean(values[known]) / want - 1) < 0.25
    ratio = monitor.history["divergence_unscaled"][7]
    assert ratio > 10 * monitor.history["divergence"][7]


# --- callables ---


def graded(variables, inputs=None):
    """Any numbers, of which no two of a layer are equal."""
    return [
        tf.reshape(
            1.0 + tf.range(int(np.prod(v.shape)), dtype=tf.float32), v.shape
        )
        for v in variables
    ]


def test_a_callable_gets_variables_and_inputs():
    received = []

    def sensitivity(variables, inputs):
        received.append(([v.path for v in variables], inputs.shape))
        return graded(variables)

    model, x, y = made(dense)
    got = measured(model, x, y, sensitivity=sensitivity)
    paths = [v.path for v in model.trainable_variables]
    assert received[0] == (paths, tf.TensorShape([6, 4]))
    raw = [np.asarray(s) for s in graded(model.trainable_variables)]
    assert_all_close(got, of_layers(model.trainable_variables, raw))


@pytest.mark.parametrize(
    "returned, received",
    [
        (lambda variables: graded(variables)[:-1], "shapes"),
        (lambda variables: graded(variables[::-1]), "shapes"),
        (lambda variables: None, "None"),
        (lambda variables: ["a", "b"], "'a'"),
    ],
    ids=range(4),
)
def test_what_a_callable_may_not_return(returned, received):
    variables = [tf.Variable(tf.ones([2, 3])), tf.Variable(tf.ones([3]))]
    search = optimizer(lambda variables, inputs: returned(variables))
    with pytest.raises(ValueError, match="Expected a `sensitivity`") as caught:
        search.minimize(lambda w: tf.reduce_sum(w[0]), variables)
    assert received in str(caught.value)


@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf])
def test_numbers_that_are_no_sensitivities(value):
    variables = [tf.Variable(tf.ones([2, 3]))]
    search = optimizer(lambda variables, inputs: [tf.fill([2, 3], value)])
    with pytest.raises(tf.errors.InvalidArgumentError, match="of 0 or more"):
        search.minimize(lambda w: tf.reduce_sum(w[0]), variables)


# --- the search ---


def regression():
    x = rows(20, 4)
    return x, x @ rows(4, 3, seed=1)


def network(sensitivity, kind="full", batch_norm=False, **arguments):
    keras.utils.set_random_seed(1)
    more = [layers.BatchNormalization()] * batch_norm
    model = keras_vo.VOSequential(
        [
            keras.Input((4,)),
            layers.Dense(5, activation="tanh"),
            *more,
            layers.Dense(3),
        ]
    )
    settings = {
        "inner_optimizer": keras.optimizers.Adam(0.05),
        "population_size": 16,
        "perturbation": kind,
        "sensitivity": sensitivity,
        "sensitivity_period": 2,
        "seed": 4,
    }
    model.compile(
        optimizer=keras_vo.VOOptimizer(**settings | arguments), loss="mse"
    )
    return model


def fitted(model, epochs=2):
    model.fit(
        *regression(), epochs=epochs, batch_size=8, shuffle=False, verbose=0
    )
    return models.search_state(model)


@pytest.mark.parametrize("kind", ["full", "low_rank", "local_reparam"])
def test_equal_sensitivities_are_none(kind):
    """Also where sigma is learned."""

    def equal(variables, inputs):
        return [2.0 * tf.ones(v.shape) for v in variables]

    one, other = network(equal, kind), network(None, kind)
    fitted(one), fitted(other)
    np.testing.assert_allclose(
        models.weights(one), models.weights(other), rtol=1e-3, atol=1e-5
    )
    assert_all_close(one.optimizer.stddevs, other.optimizer.stddevs)


# Kinds and structures meet in test_conformance.py.
CASES = list(
    models.in_turn(
        models.pairwise(
            kind=["full", "low_rank", "local_reparam"],
            antithetic=[True, False],
            natural=[True, False],
            max_kl=[None, 0.1],
            again=["resumed", "cut"],
        ),
        structure=["fixed", "isotropic", "layerwise", "separable"],
        shaping=["identity", "standardize", "centered_rank", "nes"],
        sensitivity=["sum", "abs", "inputs", "callable"],
    )
)


@pytest.mark.parametrize("case", CASES, ids=models.name_of)
def test_everything_with_everything(case, tmp_path):
    """A search that is saved and resumed is the one that goes on, bit by bit,
    in the middle of a period; and so is one that is cut into other chunks.
    """

    def make(**cuts):
        return network(
            {"callable": graded}.get(case["sensitivity"], case["sensitivity"]),
            case["kind"],
            search_distribution=case["structure"],
            fitness_shaping=case["shaping"],
            antithetic=case["antithetic"],
            natural_gradient=case["natural"],
            max_kl=case["max_kl"],
            **cuts,
        )

    models.assert_goes_on(
        make,
        functools.partial(fitted, epochs=1),  # three steps
        case["again"],
        tmp_path / "model.weights.h5",
    )


def test_it_is_measured_once_a_period():
    model = network("inputs", sensitivity_period=3, search_distribution="fixed")
    x, y = regression()
    found = []
    for i in range(7):
        model.train_on_batch(
            x[i : i + 8] * (1 + i * np.arange(4)), y[i : i + 8]
        )
        found.append(
            np.concatenate([np.ravel(s) for s in model.optimizer.stddevs])
        )
    same = [
        np.array_equal(a, b) for a, b in zip(found, found[1:], strict=False)
    ]
    assert same == [True, True, False, True, True, False]


def test_batches_without_examples_leave_it():
    model = network("sum", sensitivity_period=1)
    x, y = regression()
    model.train_on_batch(x, y)
    before = [s.numpy() for s in model.optimizer.stddevs]
    assert any(np.ptp(s) > 0.01 for s in before)
    model.optimizer.search_distribution.learning_rate = 0.0
    sensitivity = model.optimizer._sensitivity.numpy()
    model.train_on_batch(x[:0], y[:0])
    np.testing.assert_array_equal(model.optimizer._sensitivity, sensitivity)


@pytest.mark.parametrize("sensitivity", ["sum", "inputs"])
def test_without_a_finite_loss_they_stay(sensitivity):
    """A NaN in the batch they are due in, and then in the losses."""
    model = network(sensitivity, sensitivity_period=1)
    x, y = regression()
    model.train_on_batch(x, y)
    before = model.optimizer._sensitivity.numpy()
    assert np.ptp(before) > 0.01
    x[0, 0] = np.nan
    model.train_on_batch(3 * x, y)
    np.testing.assert_array_equal(model.optimizer._sensitivity, before)
    assert np.all(np.isfinite(models.weights(model)))


@pytest.mark.parametrize(
    "policy, sensitivity",
    [
        ("mixed_float16", "sum"),
        ("mixed_bfloat16", "inputs"),
        ("bfloat16", "sum"),
        ("float64", "abs"),
    ],
)
def test_policies(policy, sensitivity):
    keras.config.set_dtype_policy(policy)
    model = network(sensitivity, batch_norm=True, inner_optimizer="sgd")
    model.fit(*regression(), batch_size=8, verbose=0)
    optimizer = keras_vo.optimizer.find_vo_optimizer(model.optimizer)
    kernel = np.asarray(tf.cast(optimizer.stddevs[0], tf.float64))
    assert np.all(np.isfinite(kernel)) and np.ptp(kernel) > 0.01


def test_sums_that_float16_has_no_number_for():
    """Over 256 examples of 1,024 positions."""

    def found():
        keras.utils.set_random_seed(0)
        inputs = keras.Input((32, 32, 2))
        model = keras.Model(inputs, layers.Conv2D(2, 1)(inputs))
        x = np.abs(rows(256, 32, 32, 2)) * [1, 4]
        return measured(model, x, rows(256, 32, 32, 2), sensitivity="sum")

    want = found()
    keras.config.set_dtype_policy("mixed_float16")
    for got, wanted in zip(found(), want, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=2e-2)
    assert np.ptp(want[0]) > 1


def test_from_its_config():
    search = keras_vo.VOOptimizer(sensitivity="abs", sensitivity_period=7)
    again = keras_vo.VOOptimizer.from_config(search.get_config())
    assert again.sensitivity == "abs" and again.sensitivity_period == 7
    registered = keras.saving.register_keras_serializable("tests")(graded)
    search = keras_vo.VOOptimizer(sensitivity=registered)
    again = keras_vo.VOOptimizer.from_config(search.get_config())
    assert again.sensitivity is registered


@pytest.mark.parametrize("sensitivity", ["maximum", 3, ["sum"]])
def test_other_arguments(sensitivity):
    with pytest.raises(ValueError, match="`sensitivity` must be None, one of"):
        keras_vo.VOOptimizer(sensitivity=sensitivity)


def test_callables_of_other_arguments():
    with pytest.raises(TypeError, match="two arguments: .* too many positio"):
        keras_vo.VOOptimizer(sensitivity=lambda variables: variables)


def test_a_file_without_sensitivities_does_not_fit(tmp_path):
    path = tmp_path / "model.weights.h5"
    model = network(None)
    fitted(model)
    model.save_weights(path)
    other = network("sum")
    with pytest.warns(UserWarning, match="sensitivity"):
        other.load_weights(path)


# --- without a model ---


def quadratic(weights):
    return tf.reduce_sum((weights[0] - 1.0) ** 2) + tf.reduce_sum(weights[1])


def weights_of_a_search():
    return [tf.Variable(tf.zeros([2, 3])), tf.Variable(tf.ones([3]))]


def search_of_any(sensitivity=graded, **arguments):
    return keras_vo.VOOptimizer(
        keras.optimizers.SGD(0.1),
        8,
        sensitivity=sensitivity,
        sensitivity_period=3,
        seed=2,
        **arguments,
    )


@pytest.mark.parametrize("kind", ["full", "low_rank"])
def test_ask_and_tell_are_minimize(kind):
    a, b = weights_of_a_search(), weights_of_a_search()
    one = search_of_any(by_weights, perturbation=kind)
    other = search_of_any(by_weights, perturbation=kind)
    for _ in range(5):
        one.minimize(quadratic, a)
        population = other.ask(b)
        report = other.tell(
            population, [float(quadratic(w)) for w in population]
        )
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)
    assert_all_close(one.stddevs, other.stddevs, 1e-7)
    flat = np.concatenate([np.ravel(s) for s in other.stddevs])
    np.testing.assert_allclose(
        report.sigma, np.sqrt(np.mean(flat**2)), rtol=1e-5
    )


def by_weights(variables, inputs):
    """Others wherever the mean is."""
    return [1.0 + (v + 0.5) ** 2 for v in variables]


def test_a_population_in_another_process(tmp_path):
    """Pickled, and asked for by its seeds."""
    a = weights_of_a_search()
    search = search_of_any(by_weights)
    search.minimize(quadratic, a)
    population = search.ask(a)
    again = pickle.loads(pickle.dumps(population))
    for one, other in zip(population, again, strict=True):
        for x, y in zip(one, other, strict=True):
            np.testing.assert_array_equal(x, y)
    flat = np.concatenate([np.ravel(s) for s in search.stddevs])
    stacked = np.concatenate(
        [np.reshape(s, (8, -1)) for s in population.stacked()], axis=1
    )
    mean = np.concatenate([np.ravel(m) for m in population.means])
    z = (stacked - mean) / flat
    drawn = models.draw_noise(2, 1, 4, (9,), tf.float32)
    np.testing.assert_allclose(z[:4], drawn, rtol=1e-3, atol=1e-4)
    assert search.ask(a, population.seeds).seeds == population.seeds


def test_an_objective_that_assigns_its_members():
    """s is that of the mean, whatever the variables hold."""
    a = weights_of_a_search()
    search = search_of_any(by_weights)
    population = search.ask(a)
    losses = []
    for weights in population:
        for v, w in zip(a, weights, strict=True):
            v.assign(w)
        losses.append(float(quadratic(a)))
    search.tell(population, losses)
    b = weights_of_a_search()
    other = search_of_any(by_weights)
    other.minimize(quadratic, b)
    assert_all_close(a, b, 1e-6)
    assert_all_close(search.stddevs, other.stddevs, 1e-6)


@pytest.mark.parametrize("method", ["minimize", "ask", "graph"])
@pytest.mark.parametrize("sensitivity", ["sum", "abs", "inputs"])
def test_an_objective_has_no_outputs(sensitivity, method):
    search, variables = search_of_any(sensitivity), weights_of_a_search()
    with pytest.raises(ValueError, match="which an objective does not show"):
        if method == "ask":
            search.ask(variables)
        elif method == "graph":
            tf.function(lambda: search.minimize(quadratic, variables))()
        else:
            search.minimize(quadratic, variables)


# --- replicas ---


@pytest.mark.parametrize("sensitivity", ["sum", "abs", "inputs"])
def test_parts_of_a_batch_are_the_whole_one(sensitivity):
    """Uneven ones, too: 7 examples on two replicas."""
    x, y = rows(7, 4), rows(7, 3)
    found = []
    for strategy in (None, mirrored(2)):
        with scope(strategy):
            keras.utils.set_random_seed(1)
            model = keras_vo.VOSequential(
                [keras.Input((4,)), layers.Dense(5, "tanh"), layers.Dense(3)]
            )
            model.compile(
                optimizer=optimizer(sensitivity),
                loss="mse",
                run_eagerly=not strategy,
            )
        model.fit(x, y, batch_size=7, verbose=0)
        found.append([s.numpy() for s in model.optimizer.stddevs])
        if strategy:
            assert_replicas_are_equal(strategy, model.optimizer.variables)
    assert_all_close(*found)
    assert np.ptp(found[0][0]) > 0.05


@pytest.mark.parametrize(
    "sensitivity, kind",
    [("abs", "low_rank"), (graded, "full")],
    ids=["abs", "callable"],
)
def test_one_replica_and_two(sensitivity, kind):
    """Each has every whole batch: the trajectory is that of one."""
    x, y = regression()
    found = []
    for strategy in (None, mirrored(2)):
        with scope(strategy):
            model = network(
                sensitivity, kind, inner_optimizer=keras.optimizers.SGD(0.01)
            )
        batches = tf.data.Dataset.from_tensors((x, y)).repeat()
        if strategy:
            own = batches
            batches = strategy.distribute_datasets_from_function(
                lambda _, own=own: own
            )
        model.fit(batches, steps_per_epoch=5, shuffle=False, verbose=0)
        found.append(
            [models.weights(model)]
            + [s.numpy() for s in model.optimizer.stddevs]
        )
    assert_all_close(*found, 1e-3)
