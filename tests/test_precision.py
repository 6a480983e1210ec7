"""Weights of bfloat16 and float16: the search keeps their mean in float32."""

import warnings

import keras
import models
import numpy as np
import pytest
import tensorflow as tf

import keras_vo
from keras_vo import precision

LOW = ["bfloat16", "float16"]
KINDS = {
    "full": keras.layers.Dense,
    "low_rank": keras_vo.layers.LowRankDense,
    "local_reparam": keras_vo.layers.LocalReparamDense,
}


def values(variable):
    """In float32."""
    return tf.cast(tf.convert_to_tensor(variable), tf.float32).numpy()


def fixed(stddev):
    return keras_vo.GaussianSearchDistribution("fixed", stddev=stddev)


def square(weights):
    """The squared distance from .5, in float32."""
    wide = [tf.cast(w, tf.float32) for w in weights]
    return tf.add_n([tf.reduce_sum(tf.square(w - 0.5)) for w in wide])


def take_steps(optimizer, variables, count, f=square):
    step = tf.function(
        lambda: optimizer.minimize(f, variables), autograph=False
    )
    for _ in range(count):
        step()


@pytest.mark.parametrize(
    "inner, steps, dtypes",
    [
        (lambda: keras.optimizers.Adam(0.002), 350, LOW),
        (lambda: keras.optimizers.SGD(1.0), 600, ["bfloat16"]),
    ],
    ids=["adam", "sgd"],
)
def test_small_steps_add_up(inner, steps, dtypes):
    """As in float32: steps of .002 where numbers near 1 are .0039 apart.

    The variables did not move in bfloat16 (Adam: beta_2 = 0.999 is 1 there),
    and jumped to 0 with Adam in float16. Seeds 0 to 4: at most .017 from
    float32, which ends at .767 or less.
    """
    ends = []
    for name in ("float32", *dtypes):
        w = tf.Variable(tf.ones([8], name))
        optimizer = models.make_optimizer(
            fixed(0.004), inner_optimizer=inner(), population_size=64
        )
        take_steps(optimizer, [w], steps)
        assert w.dtype.name == name
        ends.append(values(w))
    assert np.max(ends[0]) < 0.9
    for end in ends[1:]:
        np.testing.assert_allclose(end, ends[0], atol=0.03)


@pytest.mark.parametrize(
    "dtype, graph", [("bfloat16", True), ("float16", False)]
)
def test_variables_and_members_are_rounded(dtype, graph):
    """mu is kept, the variable is its rounding; so are members of mu + noise.

    What the objective is given has the variable's dtype.
    """
    w = keras.Variable([1.0, -0.3, 0.01], dtype=dtype)
    free = tf.Variable([1.0])
    optimizer = models.make_optimizer(inner_optimizer=keras.optimizers.SGD(0.1))
    dtypes = []

    def f(weights):
        dtypes.append([v.dtype.name for v in weights])
        return square(weights)

    def step():
        return optimizer.minimize(f, [w, free])

    if graph:
        step = tf.function(step)
    for _ in range(3):
        step()
        (mean,) = optimizer._kept_means.values()
        assert mean.dtype == "float32"
        rounded = values(tf.cast(mean.value, dtype))
        np.testing.assert_array_equal(values(w), rounded)
        assert np.any(rounded != values(mean))
    assert all(d == [dtype, "float32"] for d in dtypes)


def test_float32_is_as_it_was():
    w = tf.Variable([1.0])
    optimizer = models.make_optimizer()
    optimizer.build([w])
    assert optimizer._kept_means == {}


@pytest.mark.parametrize(
    ("kind", "policy"),
    [
        ("full", "bfloat16"),
        ("low_rank", "float16"),
        ("local_reparam", "bfloat16"),
    ],
)
def test_fit(kind, policy, tmp_path):
    """Under pure policies, with Adam. Three classes: chance is 1.1.

    One of them is also saved, and restored bit by bit.
    """
    keras.config.set_dtype_policy(policy)
    x, y = models.make_data(48)
    model = models.make_model(
        [KINDS[kind](5, activation="relu"), KINDS[kind](3)],
        models.make_optimizer(
            population_size=32, inner_optimizer=keras.optimizers.Adam(0.02)
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    history = models.fit(model, x, y, epochs=20, batch_size=16)
    assert history["loss"][-1] < 0.6 * history["loss"][0]
    assert {w.dtype for w in model.trainable_variables} == {policy}
    if kind != "full":
        return
    model.save(tmp_path / "m.keras")
    copy = keras.saving.load_model(tmp_path / "m.keras")
    for m in (model, copy):
        models.fit(m, x, y, batch_size=16)
    for mine, other in zip(
        [*model.weights, *model.optimizer.variables],
        [*copy.weights, *copy.optimizer.variables],
        strict=True,
    ):
        np.testing.assert_array_equal(values(mine), values(other))


def test_weights_that_are_set_count():
    w = tf.Variable(tf.ones([4], "bfloat16"))
    optimizer = models.make_optimizer(
        fixed(0.05), inner_optimizer=keras.optimizers.SGD(1e-4)
    )
    take_steps(optimizer, [w], 2)
    w.assign([3.0, 1.0, 1.0, 1.0])
    take_steps(optimizer, [w], 1)
    (mean,) = optimizer._kept_means.values()
    np.testing.assert_allclose(values(mean), [3, 1, 1, 1], atol=1e-3)
    assert values(mean)[0] != 3


def test_a_generation_without_a_finite_loss_changes_nothing():
    w = tf.Variable(tf.ones([4], "bfloat16"))
    optimizer = models.make_optimizer()
    take_steps(optimizer, [w], 2)
    (mean,) = optimizer._kept_means.values()
    before = values(w), values(mean)
    take_steps(optimizer, [w], 1, lambda weights: tf.constant(np.nan))
    np.testing.assert_array_equal(values(w), before[0])
    np.testing.assert_array_equal(values(mean), before[1])


def test_averages_are_written_at_the_end():
    """Of a mean of float32, to a variable of bfloat16."""
    keras.config.set_dtype_policy("bfloat16")
    inner = keras.optimizers.SGD(0.5, use_ema=True, ema_momentum=0.9)
    model = models.make_model(
        optimizer=models.make_optimizer(inner_optimizer=inner)
    )
    models.fit(model)
    averages = [v for v in inner.variables if "average" in v.name]
    assert len(averages) == len(model.trainable_variables) == 4
    for average, weight in zip(
        averages, model.trainable_variables, strict=True
    ):
        rounded = values(tf.cast(average.value, "bfloat16"))
        np.testing.assert_array_equal(values(weight), rounded)


@pytest.mark.parametrize("by", ["var_list", "var_names"])
def test_weight_decay_is_left_out_where_it_was(by):
    """All losses are equal: only weight decay moves the means."""
    made = [
        keras.Variable(tf.ones([2]), dtype=dtype, name=name)
        for dtype, name in (
            ("bfloat16", "low_kernel"),
            ("bfloat16", "low_bias"),
            ("float32", "kernel"),
            ("float32", "bias"),
        )
    ]
    inner = keras.optimizers.SGD(0.1, weight_decay=0.1)
    inner.exclude_from_weight_decay(
        **{by: made[1::2] if by == "var_list" else ["bias"]}
    )
    optimizer = models.make_optimizer(fixed(0.1), inner_optimizer=inner)
    take_steps(optimizer, made, 1, lambda weights: tf.constant(1.0))
    moved = [values(v)[0] for v in optimizer._moved(made)]
    np.testing.assert_allclose(moved, [0.99, 1, 0.99, 1], rtol=1e-6)


def test_an_inner_optimizer_that_is_built():
    w = tf.Variable(tf.ones([2], "bfloat16"))
    inner = keras.optimizers.SGD(0.1)
    inner.build([w])
    optimizer = models.make_optimizer(inner_optimizer=inner)
    with pytest.raises(ValueError, match="that is not built yet"):
        optimizer.build([w])


def test_two_replicas_are_one():
    """With a constraint, which the mean in float32 satisfies."""

    def run(strategy):
        with models.scope(strategy):
            w = keras.Variable([0.2, -0.4, 0.6], dtype="bfloat16")
            w.constraint = keras.constraints.NonNeg()
            optimizer = models.make_optimizer(
                population_size=16, exchange="gradient"
            )
        take_steps(
            optimizer,
            [w],
            5,
            lambda weights: tf.reduce_sum(tf.cast(weights[0], tf.float32)),
        )
        (mean,) = optimizer._kept_means.values()
        if strategy:
            models.assert_replicas_are_equal(strategy, [w.value, mean.value])
        assert values(mean).min() >= 0
        return values(mean)

    two, one = run(models.mirrored(2)), run(None)
    np.testing.assert_allclose(two, one, rtol=1e-5, atol=1e-6)


# --- a sigma that no weight can show ---


def warned(dtype, stddev, scale=1.0):
    variables = [
        keras.Variable(scale * np.ones(4), dtype=dtype, name="coarse"),
        keras.Variable(np.zeros(4), dtype=dtype, name="zero"),
    ]
    optimizer = models.make_optimizer(fixed(stddev))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.build(variables)
        take_steps(optimizer, variables, 2)
    return [str(w.message) for w in caught if "stddev" in str(w.message)]


@pytest.mark.parametrize(
    "dtype, spacing, scale",
    [("bfloat16", 2**-7, 1.0), ("float16", 2**-10, 16.0)],
)
def test_a_warning_where_members_are_equal(dtype, spacing, scale):
    """Once, where sigma is less than a quarter of the spacing."""
    assert warned(dtype, 0.26 * spacing * scale, scale) == []
    (text,) = warned(dtype, 0.24 * spacing * scale, scale)
    assert f"'coarse' ({dtype}, steps of {spacing * scale:.2g})" in text
    assert "zero" not in text and "mixed_bfloat16" in text
    assert "Received" in text


def test_no_warning_in_float32_and_mixed_policies():
    assert warned("float32", 1e-5) == []
    for policy in ("mixed_bfloat16", "mixed_float16"):
        keras.config.set_dtype_policy(policy)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            models.make_model(optimizer=models.make_optimizer(fixed(1e-4)))


@pytest.mark.parametrize("dtype", LOW)
def test_resolution_is_the_spacing_of_numbers(dtype):
    step = precision.resolution(tf.Variable(tf.ones([3], dtype)))
    numbers = tf.cast(tf.constant([1 + 0.49 * step, 1 + 0.51 * step]), dtype)
    np.testing.assert_array_equal(values(numbers), [1, 1 + step])
