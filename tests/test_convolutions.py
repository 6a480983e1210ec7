"""Noise on the activations of convolutions: windows times a matrix."""

import functools

import keras
import models
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import keras_vo
from keras_vo.layers import LocalReparamDense
from keras_vo.perturbations import placement
from keras_vo.perturbations.local import LocalReparam
from keras_vo.perturbations.windows import Windows


def images(n=16, sizes=(6, 5), channels=2):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, *sizes, channels)).astype("float32")
    return x, (x.mean(axis=(1, 2)) if len(sizes) == 2 else x.mean(axis=1))


@pytest.mark.parametrize(
    "rank, padding",
    [
        (rank, padding)
        for rank in (1, 2, 3)
        for padding in ("valid", "same", "causal")
        if padding != "causal" or rank == 1
    ],
)
@pytest.mark.parametrize("strides, dilation", [(1, 1), (2, 1), (3, 1), (1, 2)])
def test_windows_times_the_kernel_are_the_convolution(
    rank, padding, strides, dilation
):
    """In float64, so that only rounding is between them."""
    sizes, kernel = (9, 8, 7)[:rank], (3, 2, 4)[:rank]
    x = np.random.default_rng(0).normal(size=(3, *sizes, 2))
    of_rank = [layers.Conv1D, layers.Conv2D, layers.Conv3D][rank - 1]
    layer = of_rank(
        5,
        kernel,
        strides=strides,
        dilation_rate=dilation,
        padding=padding,
        dtype="float64",
    )
    expected = layer(x)
    windows = Windows.of(
        sizes, layer.kernel_size, layer.strides, layer.dilation_rate, padding
    )
    rows = windows.of_inputs(tf.constant(x))
    got = rows @ tf.reshape(layer.kernel, [-1, 5])
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


def trained(parts, shape, x, y, **kwargs):
    """A model after two epochs of two batches, of the same weights at first.

    Args:
        parts: makes the layers.
    """
    settings = {
        "perturbation": "local_reparam",
        "convolutions": "local_reparam",
    } | kwargs
    epochs = settings.pop("epochs", 2)
    compiling = {k: settings.pop(k) for k in ("run_eagerly",) if k in settings}
    keras.utils.set_random_seed(1)
    model = keras_vo.VOSequential([keras.Input(shape), *parts()])
    model.compile(
        optimizer=models.make_optimizer(**settings), loss="mse", **compiling
    )
    models.fit(model, x, y, batch_size=8, epochs=epochs)
    return model


def set_same_weights(model):
    """Whatever the shapes of the kernels are, the same numbers."""
    rng = np.random.default_rng(3)
    model.set_weights(
        [
            0.3 * rng.normal(size=w.size).reshape(w.shape)
            for w in model.get_weights()
        ]
    )


def flat(model):
    return np.concatenate([np.ravel(w) for w in model.get_weights()])


def as_dense(rank, kernel):
    """Parts of a model: windows that do not overlap, then Dense."""
    if rank == 1:
        return [layers.Reshape((-1, kernel * 2)), layers.Dense(3)]
    return [layers.Flatten(), layers.Dense(3)]


@pytest.mark.parametrize(
    "rank, structure, eagerly",
    [
        (1, "separable", False),
        (2, "layerwise", True),
    ],
)
def test_windows_that_do_not_overlap_are_dense(rank, structure, eagerly):
    """Of one position, or of those that a Reshape makes: the same noise."""
    sizes = (6,) if rank == 1 else (6, 5)
    x, y = images(sizes=sizes)
    kernel = 3 if rank == 1 else sizes
    convolution = [layers.Conv1D, layers.Conv2D][rank - 1]

    def end():
        return [layers.Flatten(), layers.Dense(2)]

    def run(parts):
        keras.utils.set_random_seed(1)
        model = keras_vo.VOSequential(
            [keras.Input((*sizes, 2)), *parts, *end()]
        )
        set_same_weights(model)
        model.compile(
            optimizer=models.make_optimizer(
                structure,
                perturbation="local_reparam",
                convolutions="local_reparam",
            ),
            loss="mse",
            run_eagerly=eagerly,
        )
        models.fit(model, x, y)
        stddevs = [np.ravel(s) for s in model.optimizer.stddevs]
        return np.concatenate([flat(model), *stddevs])

    got = run([convolution(3, kernel, strides=kernel)])
    want = run(as_dense(rank, kernel))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


class Patches(layers.Layer):
    def call(self, x):
        return keras.ops.image.extract_patches(x, 3, 1, padding="valid")


def behind_noise(*parts, **compiling):
    """A model in which the convolution's inputs differ between members."""
    model = keras_vo.VOSequential(
        [
            keras.Input((12,)),
            layers.Dense(72, activation="relu"),
            layers.Reshape((6, 6, 2)),
            *parts,
            layers.Flatten(),
            layers.Dense(2),
        ]
    )
    set_same_weights(model)
    model.compile(
        optimizer=models.make_optimizer(
            perturbation="local_reparam", convolutions="local_reparam"
        ),
        loss="mse",
        **compiling,
    )
    return model


def test_windows_that_overlap_are_patches_and_dense():
    x = np.random.default_rng(0).normal(size=(16, 12)).astype("float32")
    runs = []
    for parts, eagerly in (
        ([layers.Conv2D(2, 3, activation="relu")], False),
        ([Patches(), layers.Dense(2, activation="relu")], True),
    ):
        model = behind_noise(*parts, run_eagerly=eagerly)
        models.fit(model, x, x[:, :2], epochs=1)
        runs.append(flat(model))
    np.testing.assert_allclose(*runs, rtol=1e-4, atol=1e-5)


@pytest.fixture
def said(monkeypatch):
    """What is logged of layers that keep noise on their weights."""
    seen = {}
    monkeypatch.setattr(
        placement, "announce", lambda layer, why: seen.update({layer: why})
    )
    return seen


class Standardized(layers.Conv2D):
    def convolution_op(self, inputs, kernel):
        return super().convolution_op(inputs, kernel - tf.reduce_mean(kernel))


# Layers named "c", and why they are left.
LEFT = [
    (lambda: layers.Conv2D(16, 2, padding="same", name="c"), "more of its out"),
    (
        lambda: layers.Conv2D(
            4, (6, 2), data_format="channels_first", name="c"
        ),
        "its channels come first",
    ),
    (lambda: layers.Conv2D(4, 6, groups=2, name="c"), "it has groups"),
    (lambda: Standardized(4, 6, name="c"), "`convolution_op` of its own"),
    (
        lambda: layers.Conv2D(4, 6, kernel_regularizer="l2", name="c"),
        "a regularizer",
    ),
]


@pytest.mark.parametrize("layer, reason", LEFT, ids=[why for _, why in LEFT])
def test_what_keeps_noise_on_its_weights(layer, reason, said, monkeypatch):
    """It says so, and is not among what has noise on its outputs."""
    x, y = images(sizes=(6, 6))
    bound = []
    own = LocalReparam.__init__

    def noted(self, claims, space):
        own(self, claims, space)
        bound.append([claim.call.name for claim in claims])

    monkeypatch.setattr(LocalReparam, "__init__", noted)
    trained(
        lambda: [
            layer(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(16, name="d"),  # or too few weights are left
            layers.Dense(2, name="e"),
        ],
        (6, 6, 2),
        x,
        y,
        epochs=1,
    )
    assert reason in said["c"]
    assert bound and all(names == ["d", "e"] for names in bound)


def test_why_a_convolution_is_left(said):
    x, y = images(sizes=(6, 6))
    trained(
        lambda: [
            layers.Conv2D(8, 3, name="early"),
            layers.Conv2D(8, 3, padding="same", name="wide"),
            layers.Conv2D(8, 4, name="late"),
            layers.BatchNormalization(),
            layers.Flatten(),
            layers.Dense(2),
        ],
        (6, 6, 2),
        x,
        y,
        epochs=1,
    )
    before = [said[name] for name in ("early", "wide", "late")]
    assert all("BatchNormalization" in why for why in before)
    said.clear()
    trained(
        lambda: [
            layers.Conv2D(12, 3, padding="same", name="early"),
            layers.Conv2D(8, 4, name="late"),
            layers.Flatten(),
            layers.Dense(2),
        ],
        (6, 6, 1),
        x[..., :1],
        y,
        epochs=1,
        run_eagerly=True,
    )
    assert "late" not in said
    assert (
        "an example has more of its outputs than it has weights"
        in (said["early"])
    )


def small(end=layers.Flatten):
    return [
        layers.Conv2D(8, 5, activation="relu"),
        end(),
        layers.Dense(2),
    ]


def run_small(end=layers.Flatten, **kwargs):
    x, y = images(sizes=(6, 6))
    parts = functools.partial(small, end)
    return flat(trained(parts, (6, 6, 2), x, y, **kwargs))


@functools.cache
def small_by(convolutions, end=layers.Flatten):
    """The weights, with noise on what `convolutions` says."""
    return run_small(end, convolutions=convolutions)


def test_chunks():
    np.testing.assert_allclose(
        run_small(chunk_size=2),
        small_by("local_reparam"),
        rtol=1e-4,
        atol=1e-6,
    )


@pytest.mark.parametrize(
    "end, same",
    [
        # 66 of 474 weights are the Dense layer's,
        (layers.Flatten, "full"),
        # 18 of 426.
        (layers.GlobalAveragePooling2D, "local_reparam"),
    ],
)
def test_auto_leaves_convolutions_where_other_layers_pay(end, same, said):
    auto = run_small(end, perturbation="auto", convolutions="full")
    assert any("better without" in why for why in said.values()) == (
        same == "full"
    )
    np.testing.assert_array_equal(auto, small_by(same, end))
    if end is layers.Flatten:
        assert np.abs(auto - small_by("local_reparam")).max() > 0.01


def test_the_mean_network_computes_what_the_layer_does():
    """And the class has no `call` of its own afterwards."""
    x, y = images(sizes=(6, 6))
    model = trained(
        lambda: [layers.Conv2D(2, 6)], (6, 6, 2), x, y[:, None, None]
    )
    assert "call" not in vars(layers.Conv2D)
    expected = float(np.mean((model(x) - y[:, None, None]) ** 2))
    logs = model.train_on_batch(x, y[:, None, None], return_dict=True)
    assert logs["loss"] == pytest.approx(expected, rel=1e-5)


def test_auto_beside_a_layer_that_asks():
    """17 of 425 weights have noise on outputs in any case."""
    x, y = images(sizes=(6, 6))

    def run(**kwargs):
        def parts():
            return [
                layers.Conv2D(8, 5),
                layers.GlobalAveragePooling2D(),
                LocalReparamDense(2),
            ]

        return flat(trained(parts, (6, 6, 2), x, y, **kwargs))

    auto = run(perturbation="auto", convolutions="full")
    np.testing.assert_array_equal(auto, run())


def test_causal_is_padded():
    x, y = images(sizes=(6,))
    runs = [
        flat(
            trained(
                lambda p=p: [*p(), layers.Flatten()],
                (6, 2),
                x,
                np.tile(y, [1, 9]),
                epochs=1,
                run_eagerly=eagerly,
            )
        )
        for p, eagerly in (
            (lambda: [layers.Conv1D(3, 3, padding="causal")], False),
            (
                lambda: [layers.ZeroPadding1D((2, 0)), layers.Conv1D(3, 3)],
                True,
            ),
        )
    ]
    np.testing.assert_allclose(*runs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("padding", ["valid", "same"])
def test_an_empty_batch(padding):
    """It changes no weight but by momentum, of which SGD has none."""
    x, y = images(sizes=(6, 6))
    keras.utils.set_random_seed(1)
    model = keras_vo.VOSequential(
        [
            keras.Input((6, 6, 2)),
            layers.Conv2D(8, 5, padding=padding),
            layers.GlobalAveragePooling2D(),
            layers.Dense(2),
        ]
    )
    model.compile(
        optimizer=models.make_optimizer(
            perturbation="local_reparam",
            convolutions="local_reparam",
            inner_optimizer=keras.optimizers.SGD(0.1),
        ),
        loss="mse",
    )
    model.optimizer.build(model.trainable_variables)
    rewind = models.rewinder(model)

    def run(*sizes):
        rewind()
        batches = tf.data.Dataset.from_generator(
            lambda: ((x[:n], y[:n]) for n in sizes),
            output_signature=(
                tf.TensorSpec([None, 6, 6, 2]),
                tf.TensorSpec([None, 2]),
            ),
        )
        known = tf.data.experimental.assert_cardinality(len(sizes))
        batches = batches.apply(known)
        model.fit(batches, shuffle=False, verbose=0)
        return flat(model)

    np.testing.assert_array_equal(run(8, 0), run(8))


def test_a_bias_that_is_switched_off():
    x, y = images(sizes=(6, 6))
    model = trained(small, (6, 6, 2), x, y)
    model.layers[0].use_bias = False
    model.layers[0].bias.assign(np.full(8, 5.0))
    expected = float(np.mean((model(x) - y) ** 2))
    with pytest.warns(UserWarning, match="does not depend on .*conv2d.*bias"):
        loss = model.train_on_batch(x, y, return_dict=True)["loss"]
    assert loss == pytest.approx(expected, rel=1e-5)


def test_mixed_precision():
    """The same noise, and outputs that are rounded."""
    exact = small_by("local_reparam")
    keras.config.set_dtype_policy("mixed_bfloat16")
    rounded = run_small()
    assert 0 < np.abs(rounded - exact).mean() < 0.05


def test_arguments():
    with pytest.raises(ValueError, match="`convolutions` must be one of"):
        keras_vo.VOOptimizer(
            perturbation="local_reparam", convolutions="low_rank"
        )
    for perturbation in ("full", "low_rank", "auto"):
        with pytest.raises(ValueError, match="Expected: perturbation="):
            keras_vo.VOOptimizer(
                perturbation=perturbation, convolutions="local_reparam"
            )
    optimizer = keras_vo.VOOptimizer(
        perturbation="local_reparam", convolutions="local_reparam"
    )
    config = optimizer.get_config()
    assert config["convolutions"] == "local_reparam"
    again = keras_vo.VOOptimizer.from_config(config)
    assert again.get_config() == config
    del config["convolutions"]  # of a file from before
    again = keras_vo.VOOptimizer.from_config(config)
    assert again.convolutions == "full"


def test_auto_in_minimize_is_noise_on_weights():
    values = []
    for perturbation in ("auto", "full"):
        w = tf.Variable(np.ones((3, 3), "float32"))
        optimizer = models.make_optimizer(perturbation=perturbation)
        for _ in range(3):
            optimizer.minimize(lambda v: tf.reduce_sum(v[0] ** 2), [w])
        values.append(w.numpy())
    np.testing.assert_array_equal(*values)


def test_windows_count_in_the_memory_budget(monkeypatch):
    """Behind noise each member has windows of its own, 9 times its inputs."""
    seen = []
    own = LocalReparam.activation_bytes

    def noted(self, signs):
        seen.append(own(self, signs))
        return seen[-1]

    monkeypatch.setattr(LocalReparam, "activation_bytes", noted)
    x = np.ones((8, 12), "float32")
    behind_noise(layers.Conv2D(2, 3)).train_on_batch(x, x[:, :2])
    outputs = [72, 4 * 4 * 2, 2]
    inputs = [12, 4 * 4 * 9 * 2, 4 * 4 * 2]
    pairs = zip(outputs, inputs, strict=True)
    numbers = sum(out + 2 * (3 * out + into) for out, into in pairs)
    assert seen == [4 * 8 * numbers]
