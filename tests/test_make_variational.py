"""The model classes, and conversion of models that exist already."""

import copy
import pickle
import warnings

import keras
import models
import numpy as np
import pytest

import keras_vo


def functional():
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(5, activation="relu")(inputs)
    outputs = keras.layers.Dense(3, activation="softmax")(hidden)
    return keras.Model(inputs, outputs, name="mine")


def sequential():
    return keras.Sequential([keras.Input((4,)), *models.make_layers()])


@keras.saving.register_keras_serializable(package="keras_vo_tests")
class Subclassed(keras.Model):
    def __init__(self, units=5, **kwargs):
        super().__init__(**kwargs)
        self.hidden = keras.layers.Dense(units, activation="relu")
        self.out = keras.layers.Dense(3, activation="softmax")
        self.units = units

    def call(self, inputs):
        return self.out(self.hidden(inputs))

    def get_config(self):
        return {"units": self.units, "name": self.name}


def subclassed():
    model = Subclassed(6)
    model(np.zeros([1, 4], "float32"))
    return model


def nested():
    inputs = keras.Input((4,))
    return keras.Model(inputs, sequential()(keras.layers.Rescaling(2)(inputs)))


def eagerly(model):
    """Compiled, and trained by a batch, which TensorFlow does not trace."""
    model.compile(
        optimizer=models.make_optimizer(),
        loss="sparse_categorical_crossentropy",
        run_eagerly=True,
    )
    return model.train_on_batch(*models.make_data(8), return_dict=True)


MODELS = [functional, sequential, subclassed, nested]


def compile_and_fit(model):
    model.compile(
        optimizer=models.make_optimizer(),
        loss="sparse_categorical_crossentropy",
    )
    if model.built:  # as in `models.make_model`
        model.optimizer.build(model.trainable_variables)
    return models.fit(model)


@pytest.mark.parametrize("make", MODELS)
def test_same_object_same_weights_and_it_trains(make):
    """As what is built as VOSequential, from the same weights."""
    model = make()
    original, layers = type(model), list(model.layers)
    values = models.weights(model)
    x, _ = models.make_data()
    before = model(x)
    converted = keras_vo.make_variational(model)
    assert converted is model and isinstance(model, keras_vo.VOTrainStep)
    assert isinstance(model, original)
    assert all(a is b for a, b in zip(model.layers, layers, strict=True))
    np.testing.assert_array_equal(models.weights(model), values)
    np.testing.assert_array_equal(model(x), before)
    keras.utils.set_random_seed(0)
    twin = keras_vo.VOSequential(
        [
            keras.Input((4,)),
            *([keras.layers.Rescaling(2)] if make is nested else []),
            keras.layers.Dense(6 if make is subclassed else 5, "relu"),
            keras.layers.Dense(3, "softmax"),
        ]
    )
    twin.set_weights(model.get_weights())
    assert "population_loss" in compile_and_fit(model)
    compile_and_fit(twin)
    assert np.all(models.weights(model) != values)
    np.testing.assert_allclose(
        models.weights(model), models.weights(twin), rtol=1e-5
    )
    assert keras_vo.make_variational(model) is model


def test_a_compiled_and_trained_model():
    model = sequential()
    model.compile(optimizer="sgd", loss="sparse_categorical_crossentropy")
    models.fit(model)
    model.evaluate(*models.make_data(), verbose=0)
    keras_vo.make_variational(model)
    with pytest.raises(TypeError, match="VOOptimizer"):
        models.fit(model)
    compile_and_fit(model)

    early = keras.Sequential(models.make_layers())  # nor is it built
    early.compile(
        optimizer=models.make_optimizer(),
        loss="sparse_categorical_crossentropy",
    )
    keras_vo.make_variational(early)
    assert "population_loss" in models.fit(early)


def test_an_unbuilt_model():
    model = keras_vo.make_variational(Subclassed())
    assert "population_loss" in compile_and_fit(model)


def test_vo_model_is_functional_and_can_be_subclassed_in_both_styles():
    class Functional(keras_vo.VOModel):
        def __init__(self):
            inputs = keras.Input((4,))
            super().__init__(inputs, keras.layers.Dense(3)(inputs))

    class Imperative(keras_vo.VOModel):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(3)

        def call(self, inputs):
            return self.dense(inputs)

    inputs = keras.Input((4,))
    plain = keras_vo.VOModel(inputs, keras.layers.Dense(3)(inputs))
    Functional()  # must not make the others, before or after, functional
    later = keras_vo.VOModel(inputs, keras.layers.Dense(3)(inputs))
    for model in (Imperative(), Functional(), Imperative(), plain, later):
        assert isinstance(model, keras_vo.VOModel)
        assert "population_loss" in eagerly(model)
    assert plain.input_shape == (None, 4)


@keras.saving.register_keras_serializable(package="keras_vo_tests")
class Block(keras.layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = keras.layers.Dense(5, activation="relu")

    def build(self, input_shape):
        self.dense.build(input_shape)

    def call(self, inputs):
        return self.dense(inputs)


def with_block():
    inputs = keras.Input((4,))
    outputs = keras.layers.Dense(3, activation="softmax")(Block()(inputs))
    return keras.Model(inputs, outputs)


def sequential_with_block():
    return keras.Sequential(
        [keras.Input((4,)), Block(), models.make_layers()[1]]
    )


@pytest.mark.parametrize(
    "make, dense, duplicate",
    [
        (functional, None, "pickle"),
        (sequential, None, "deepcopy"),
        (subclassed, None, "pickle"),
        (subclassed, "local_reparam", "deepcopy"),
        (with_block, "low_rank", "pickle"),
        (sequential_with_block, "local_reparam", "pickle"),
    ],
)
def test_copies_go_on_as_the_original(make, dense, duplicate):
    model = keras_vo.make_variational(make(), dense=dense)
    eagerly(model)
    if duplicate == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        twin = pickle.loads(pickle.dumps(model))
    if models.KERAS_3_10:  # restores the input as a list of one
        warnings.filterwarnings("ignore", "(?s).*structure of `inputs`")
    assert type(twin) is type(model)
    before = models.search_state(model)
    models.assert_same_state(models.search_state(twin), before)
    data = models.make_data()
    twin.train_on_batch(*data)
    models.assert_same_state(models.search_state(model), before)
    model.train_on_batch(*data)
    models.assert_same_state(
        models.search_state(twin), models.search_state(model)
    )


KINDS = {
    "full": keras.layers.Dense,
    "local_reparam": keras_vo.layers.LocalReparamDense,
    "low_rank": keras_vo.layers.LowRankDense,
}


@pytest.mark.parametrize(
    "make, dense",
    [
        (functional, "full"),
        (subclassed, "full"),
        (nested, "full"),
        (functional, "low_rank"),
        (subclassed, "local_reparam"),
        (nested, "local_reparam"),
    ],
)
def test_dense_layers_become_another_kind_with_their_weights(make, dense):
    x, y = models.make_data()
    model = make()
    model(x)
    before, want = model.get_weights(), model(x)
    for kind in ("low_rank", dense):
        converted = keras_vo.make_variational(model, dense=kind)
        assert converted is model
    kinds = {
        type(layer)
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.Dense)
    }
    assert kinds == {KINDS[dense]}
    models.assert_same_state(before, model.get_weights())
    np.testing.assert_array_equal(model(x), want)
    eagerly(model)
    assert np.any(
        models.weights(model) != np.concatenate([np.ravel(w) for w in before])
    )


def test_layers_inside_of_layers_and_subclasses_of_dense():
    class MyDense(keras.layers.Dense):
        pass

    inputs = keras.Input((4,))
    model = keras.Model(inputs, MyDense(3)(Block()(inputs)))
    keras_vo.make_variational(model, dense="local_reparam")
    assert type(model.layers[1].dense) is keras_vo.layers.LocalReparamDense
    assert type(model.layers[2]) is MyDense


def test_no_such_kind():
    with pytest.raises(ValueError, match="`dense` must be one of.*'sparse'"):
        keras_vo.make_variational(sequential(), dense="sparse")
