"""A saved model always loads; its search is restored where it fits."""

import copy
import json
import re
import warnings

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from models import (
    assert_same_state,
    make_data,
    make_layers,
    make_optimizer,
    search_state,
    weights,
)

import keras_vo
from keras_vo import saved_search
from keras_vo.layers import LocalReparamDense, LowRankDense
from keras_vo.search.activation_scale import RESUMED

X, Y = make_data()
LOSS = "sparse_categorical_crossentropy"
NEW_SEARCH = "but not the state of the search"


def make(optimizer=None):
    keras.utils.set_random_seed(1)
    model = keras_vo.VOSequential([keras.Input((4,)), *make_layers()])
    model.compile(optimizer=optimizer or make_optimizer(), loss=LOSS)
    return model


def train(model, epochs=1):
    model.fit(X, Y, batch_size=8, epochs=epochs, shuffle=False, verbose=0)
    return model


def begun(model):
    """As if trained: each number of its search is another than at its start.

    But for Keras's own learning rate, of no use here and in no file.
    """
    model.optimizer.build(model.trainable_variables)
    for variable in model.optimizer.variables:
        if not getattr(variable, "path", "").endswith(
            "vo_optimizer/learning_rate"
        ):
            variable.assign(variable + 1)
    return model


def loaded(model, path):
    model.save(path)
    return keras.models.load_model(path)


def compiled(model, **kwargs):
    model.compile(optimizer=make_optimizer(**kwargs), loss=LOSS)
    return model


def frozen(model, *layers):
    for layer in layers:
        model.layers[layer].trainable = False
    return model


def with_lora(model):
    model.layers[0].enable_lora(2)
    return compiled(model)


def converted():
    plain = keras.Sequential([keras.Input((4,)), *make_layers()])
    plain.compile("adam", LOSS)
    return compiled(keras_vo.make_variational(plain))


QUIET = {
    "untrained": make,
    "recompiled": lambda: compiled(train(make())),
    "converted": converted,
    "lora": lambda: train(with_lora(make())),
}


@pytest.mark.parametrize("case", QUIET)
def test_a_model_whose_search_fits_or_has_not_begun(case, tmp_path):
    """Without a warning, which would be an error."""
    model = QUIET[case]()
    copy_ = loaded(model, tmp_path / "m.keras")
    np.testing.assert_allclose(copy_(X), model(X), rtol=1e-5)
    if case != "untrained":  # of which see below
        train(copy_)


def test_a_model_of_which_other_weights_are_trained(tmp_path):
    def loaded_with_warning(model, problem):
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            copy_ = loaded(model, tmp_path / "m.keras")
        (text,) = [str(w.message) for w in warned if w.category is UserWarning]
        assert NEW_SEARCH in text and problem in text
        np.testing.assert_array_equal(weights(copy_), weights(model))
        return copy_

    model = begun(frozen(make(), 0))
    model.layers[0].trainable = True
    loaded_with_warning(model, "inner.momentum")
    model = train(make())
    copy_ = loaded_with_warning(frozen(model, 0), "inner.momentum")
    train(copy_)
    assert not np.array_equal(weights(copy_), weights(model))
    copy_ = loaded_with_warning(frozen(model, 1), "no weight is trained")
    with pytest.raises(ValueError, match="is every layer frozen"):
        train(copy_)
    compiled(copy_).layers[1].trainable = True
    train(copy_)
    assert not np.array_equal(weights(copy_), weights(model))


WEIGHTS = {
    "untrained": (make, make, None),
    "untrained into trained": (make, lambda: begun(make()), None),
    "Adamax": (
        lambda: begun(make()),
        lambda: make(make_optimizer(inner_optimizer="adamax")),
        "inner_optimizer: 'Adam' in the file, 'Adamax' here",
    ),
    "SGD": (
        lambda: begun(make()),
        lambda: make(make_optimizer(inner_optimizer="sgd")),
        "inner_optimizer",
    ),
    "isotropic": (
        lambda: begun(make(make_optimizer("fixed"))),
        lambda: make(make_optimizer("isotropic")),
        "variance: 'fixed' in the file, 'isotropic' here",
    ),
    "separable": (
        lambda: begun(make(make_optimizer("separable"))),
        make,
        "log_variance: shape",
    ),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_a_weights_file(case, tmp_path):
    saved, into, problem = WEIGHTS[case]
    saved, into = saved(), into()
    into.optimizer.build(into.trainable_variables)
    before = [v.numpy() for v in into.optimizer.variables]
    path = tmp_path / "m.weights.h5"
    saved.save_weights(path)
    if problem is None:
        into.load_weights(path)
    else:
        with pytest.warns(UserWarning, match=f"{NEW_SEARCH}.*{problem}"):
            into.load_weights(path)
    np.testing.assert_array_equal(weights(into), weights(saved))
    for variable, value in zip(into.optimizer.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)


def test_the_weights_file_of_a_plain_model(tmp_path):
    plain = keras.Sequential([keras.Input((4,)), *make_layers()])
    plain.compile("adam", LOSS)
    plain.optimizer.build(plain.trainable_variables)
    plain.optimizer.iterations.assign(1)
    plain.save_weights(tmp_path / "m.weights.h5")
    model = make()
    with pytest.warns(UserWarning, match="another optimizer.*10 variables"):
        model.load_weights(tmp_path / "m.weights.h5")
    np.testing.assert_array_equal(weights(model), weights(plain))


def test_the_search_is_restored_bit_by_bit(tmp_path):
    """Also where a LossScaleOptimizer is around it, or is not any more."""
    keras.config.set_dtype_policy("mixed_float16")
    model = train(make(make_optimizer(population_size=4)), 2)
    copies = []
    for policy in ("mixed_float16", "float32"):
        keras.config.set_dtype_policy(policy)
        copies.append(loaded(model, tmp_path / "m.keras"))
    for copy_ in copies:
        for a, b in zip(model.weights, copy_.weights, strict=True):
            assert a.dtype == b.dtype
    for each in (model, *copies):
        train(each)
    for copy_ in copies:
        np.testing.assert_array_equal(weights(copy_), weights(model))


def three_layers(frozen_layer, policy="float32", inner="sgd"):
    """Three layers of the same shapes, of which one is frozen."""
    keras.utils.set_random_seed(1)
    keras.config.set_dtype_policy(policy)
    layers = [keras.layers.Dense(4) for _ in range(3)]
    model = keras_vo.VOSequential([keras.Input((4,)), *layers])
    layers[frozen_layer].trainable = False
    inner = keras.optimizers.get(
        {"class_name": inner, "config": {"learning_rate": 0.01}}
    )
    model.compile(optimizer=make_optimizer(inner_optimizer=inner), loss="mse")
    model.optimizer.build(model.trainable_variables)
    keras.config.set_dtype_policy("float32")
    return model


def generations(model):
    optimizer = keras_vo.optimizer.find_vo_optimizer(model.optimizer)
    return int(optimizer.generations.numpy())


@pytest.mark.parametrize(
    "there, here, problem",
    [
        ((0,), (0,), None),
        ((0,), (1,), "weights: .2, 3, 4, 5. in the file, .0, 1, 4, 5. here"),
        ((0, "float32"), (0, "mixed_float16"), None),
        ((0, "mixed_float16"), (0, "float32"), None),
        (
            (0, "mixed_float16", "adam"),
            (0, "mixed_float16", "adamax"),
            "'Adam' in the file, 'Adamax' here",
        ),
    ],
    ids=str,
)
def test_equal_shapes_are_not_enough(there, here, problem, tmp_path):
    """Also where Keras puts a LossScaleOptimizer around the search."""
    model, other = three_layers(*there), three_layers(*here)
    begun(model).save_weights(tmp_path / "m.weights.h5")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        other.load_weights(tmp_path / "m.weights.h5")
    texts = [str(w.message) for w in warned if w.category is UserWarning]
    if problem is None:
        assert texts == [] and generations(other) == 1
    else:
        assert len(texts) == 1 and re.search(problem, texts[0])
        assert generations(other) == 0
    np.testing.assert_array_equal(weights(other), weights(model))


def test_deepcopy_of_a_search_that_has_not_begun():
    model = make()
    copy_ = copy.deepcopy(model)
    train(model), train(copy_)
    np.testing.assert_array_equal(weights(copy_), weights(model))


def test_a_file_of_the_version_before(tmp_path):
    """By position, without a manifest: as long as it fits."""
    model = begun(make())
    values = [
        v.numpy() for v in model.optimizer.variables if v.name != "discrete"
    ]
    path = tmp_path / "m.weights.h5"
    model.save_weights(path)
    with h5py.File(path, "r+") as file:
        group = file["optimizer/vars"]
        assert json.loads(bytes(group["manifest"][()]))["variance"]
        for name in list(group):
            del group[name]
        for number, value in enumerate(values):
            group[str(number)] = value
    copy_ = make()
    copy_.load_weights(path)
    model.optimizer._rule_state["discrete"].assign(RESUMED)
    assert_same_state(search_state(copy_), search_state(model))


@pytest.mark.parametrize("manifest", [True, False])
def test_a_file_from_before_growth_was_taken_back(manifest, tmp_path):
    """As if there had been none."""

    def wide():
        keras.utils.set_random_seed(2)
        layers = [keras.layers.Dense(30), keras.layers.Dense(3, "softmax")]
        return compiled(keras_vo.VOSequential([keras.Input((4,)), *layers]))

    model = begun(wide())
    new = {"blind_growth": 0.0, "blind": 0.0, "discrete": RESUMED}
    names = [name for name in model.optimizer._rule_state if name in new]
    assert set(names) == set(new)
    for name in names:
        model.optimizer._rule_state[name].assign(new[name])
    former = [v for v in model.optimizer.variables if v.name not in new]
    path = tmp_path / "m.weights.h5"
    model.save_weights(path)
    with h5py.File(path, "r+") as file:
        group = file["optimizer/vars"]
        for name in names if manifest else list(group):
            del group[name]
        for number, value in enumerate([] if manifest else former):
            group[str(number)] = value.numpy()
    copy_ = wide()
    copy_.optimizer.build(copy_.trainable_variables)
    for name in names:
        copy_.optimizer._rule_state[name].assign(1.0)
    copy_.load_weights(path)
    assert_same_state(search_state(copy_), search_state(model))


def test_names_do_not_depend_on_those_of_the_model():
    variables = [tf.Variable([1.0]), keras.Variable([2.0], name="kernel")]
    inner = keras.optimizers.Adam()
    inner.build(variables)
    names = list(
        saved_search.named_variables({"seed": None}, inner.variables, variables)
    )
    assert names == [
        "seed",
        "inner.iteration.0",
        "inner.learning_rate.0",
        "inner.momentum.0",
        "inner.velocity.0",
        "inner.momentum.1",
        "inner.velocity.1",
    ]


@pytest.mark.parametrize("variance", ["isotropic", "separable"])
def test_a_checkpoint_that_is_restored_before_the_optimizer_is_built(
    variance, tmp_path
):
    def make_search():
        return tf.Variable([4.0, -3.0]), make_optimizer(variance)

    def step(w, optimizer):
        optimizer.minimize(lambda ws: tf.reduce_sum(ws[0] ** 2), [w])

    w, optimizer = make_search()
    for _ in range(3):
        step(w, optimizer)
    saved = tf.train.Checkpoint(w=w, optimizer=optimizer)
    path = saved.save(str(tmp_path / "search"))
    other, restored = make_search()
    status = tf.train.Checkpoint(w=other, optimizer=restored).restore(path)
    restored.build([other])
    status.assert_consumed()
    np.testing.assert_array_equal(restored.stddevs[0], optimizer.stddevs[0])
    step(w, optimizer), step(other, restored)
    np.testing.assert_array_equal(other, w)
    np.testing.assert_array_equal(restored.stddevs[0], optimizer.stddevs[0])


def test_a_checkpoint_of_a_model_whose_sigma_follows_the_mean(tmp_path):
    """16 weights of a layer would be too few."""

    def model():
        keras.utils.set_random_seed(2)
        layers = [keras.layers.Dense(30), keras.layers.Dense(3, "softmax")]
        model = keras_vo.VOSequential([keras.Input((4,)), *layers])
        return compiled(model)

    first, second = begun(model()), model()
    path = tf.train.Checkpoint(model=first).save(str(tmp_path / "model"))
    tf.train.Checkpoint(model=second).restore(path)
    second.optimizer.build(second.trainable_variables)
    assert first.optimizer._rule_state
    assert_same_state(search_state(second), search_state(first))


@keras.saving.register_keras_serializable("test_saved_search")
class Mixed(keras_vo.VOTrainStep, keras.Model):
    """Of which an argument is called as one of `make_variational`."""

    def __init__(self, dense=5, **kwargs):
        super().__init__(**kwargs)
        self.units = dense
        self.hidden = keras.layers.Dense(dense, activation="relu")
        self.out = keras.layers.Dense(3, activation="softmax")

    def call(self, inputs):
        return self.out(self.hidden(inputs))

    def get_config(self):
        return {**super().get_config(), "dense": self.units}


@keras.saving.register_keras_serializable("test_saved_search")
class Imperative(keras_vo.VOModel):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.hidden = keras.layers.Dense(5, activation="relu")
        self.out = keras.layers.Dense(3, activation="softmax")

    def call(self, inputs):
        return self.out(self.hidden(inputs))


@pytest.mark.parametrize(
    "cls, dense, kind",
    [
        (Mixed, "local_reparam", LocalReparamDense),
        (Imperative, "low_rank", LowRankDense),
    ],
)
def test_converted_layers_of_subclasses_stay_so(cls, dense, kind, tmp_path):
    model = keras_vo.make_variational(compiled(cls()), dense)
    model(X)
    begun(model)
    copy_ = loaded(model, tmp_path / "m.keras")
    assert type(copy_) is cls
    assert type(copy_.hidden) is type(copy_.out) is kind
    assert_same_state(search_state(copy_), search_state(model))
    again = loaded(copy_, tmp_path / "n.keras")
    assert type(again.hidden) is kind
