"""The flat view of a list of weights, and its groups."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_vo.search.layout import WeightLayout, layer_groups

SHAPES = ((2, 3), (3,), (), (3, 1))


def make(groups, dtypes=("float32",) * 4):
    return WeightLayout(SHAPES, dtypes, groups)


def test_flatten_and_unflatten_are_inverse():
    layout = make((0, 0, 1, 2))
    vector = tf.range(13.0)
    tensors = layout.unflatten(vector)
    assert [tuple(t.shape) for t in tensors] == list(SHAPES)
    np.testing.assert_array_equal(tensors[0], [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(layout.flatten(tensors), vector)


def test_dtypes_are_kept_and_double_makes_all_noise_double():
    layout = make(None, ("float32", "bfloat16", "float64", "float16"))
    assert layout.dtype == tf.float64
    tensors = layout.unflatten(tf.zeros([13], tf.float64))
    assert [t.dtype.name for t in tensors] == list(layout.dtypes)
    assert make(None, ("bfloat16",) * 4).dtype == tf.float32


def test_groups_need_not_be_contiguous():
    layout = make((1, 0, 1, 0))
    assert layout.group_sizes == [6, 7] and layout.num_groups == 2
    expanded = layout.expand(tf.constant([5.0, 7.0]))
    np.testing.assert_array_equal(expanded, [7] * 6 + [5] * 3 + [7] + [5] * 3)
    vectors = tf.reshape(tf.range(26.0), [2, 13])
    sums = layout.group_sums(vectors).numpy()
    row = np.arange(13)
    first = row[6:9].sum() + row[10:].sum()
    np.testing.assert_array_equal(sums[0], [first, row.sum() - first])
    np.testing.assert_array_equal(sums[1] - sums[0], [13 * 6, 13 * 7])


def test_one_group_and_no_group():
    vectors = tf.ones([4, 13])
    one = make((0, 0, 0, 0))
    np.testing.assert_array_equal(one.group_sums(vectors), [[13]] * 4)
    assert one.expand(tf.constant([3.0])).shape == [1]
    own = make(None)
    assert own.num_groups == 13
    with pytest.raises(ValueError, match="shared variances"):
        _ = own.group_sizes  # a list as long as there are weights
    assert own.group_sums(vectors) is vectors


def test_layers_are_told_apart_by_path():
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(3),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(2),
        ]
    )
    assert layer_groups(model.trainable_variables) == (0, 0, 1, 1, 2, 2)


def test_variables_of_no_layer_and_layers_of_one_name():
    assert layer_groups([tf.Variable(1.0), tf.Variable(2.0)]) == (0, 1)
    twins = [keras.layers.Dense(1, name="same") for _ in range(2)]
    for layer in twins:
        layer.build((None, 2))
    variables = [v for layer in twins for v in layer.trainable_variables]
    assert [v.path for v in variables[:2]] == [v.path for v in variables[2:]]
    assert layer_groups(variables) == (0, 0, 1, 1)


def test_values_by_tensor():
    layout = make((1, 0, 1, 0))
    values = layout.per_tensor(tf.constant([5.0, 7.0]))
    assert [float(v) for v in values] == [7, 5, 7, 5]
    own = make(None).per_tensor(tf.range(13.0))
    assert [tuple(v.shape) for v in own] == list(SHAPES)
    np.testing.assert_array_equal(own[3], [[10], [11], [12]])


def test_sums_by_group():
    layout = make((1, 0, 1, 0))
    sums = layout.by_group([tf.constant(float(v)) for v in (1, 2, 3, 4)])
    np.testing.assert_array_equal(sums, [6, 4])
    own = make(None)
    values = tf.range(13.0)
    np.testing.assert_array_equal(own.by_group(own.per_tensor(values)), values)


def test_some_of_the_tensors():
    layout = make((2, 0, 1, 2), ("float32",) * 3 + ("float64",))
    some = layout.select([0, 2])
    assert some.shapes == ((2, 3), ()) and some.groups == (0, 1)
    assert some.dtype == tf.float64  # the noise of all is of one dtype
    assert make(None).select([1, 2]).groups is None


def test_none_of_the_tensors():
    for groups in ((0, 0, 1, 2), None):
        layout = make(groups)
        none = layout.select([])
        assert none.size == 0 and none.num_groups == 0
        assert groups is None or none.group_sizes == []
        values = none.by_group([])
        assert none.expand(values).shape == [0]
        assert none.flatten([]).shape == [0] and none.split(values) == []
        assert none.group_sums(tf.ones([3, 0])).shape == [3, 0]
