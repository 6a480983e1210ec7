"""A model for all members at once, against one member after another."""

import keras
import models
import numpy as np
import pytest

import keras_vo
from keras_vo import population_calls


def dense():
    return keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(8, activation="tanh"),
            keras.layers.Dense(2),
        ]
    )


def convolutions():
    return keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            keras.layers.Conv2D(4, 3),
            keras.layers.BatchNormalization(),
            keras.layers.Flatten(),
            keras.layers.Dense(2),
        ]
    )


def recurrent():
    return keras.Sequential(
        [
            keras.Input((6, 3)),
            keras.layers.Masking(),
            keras.layers.GRU(5),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(2),
        ]
    )


def attention():
    """Two inputs, a dict of outputs, a layer that is not trained."""
    a, b = keras.Input((6, 4)), keras.Input((6, 4))
    mixed = keras.layers.MultiHeadAttention(2, 3)(a, b)
    fixed = keras.layers.Dense(3, trainable=False)(mixed)
    return keras.Model([a, b], {"x": keras.layers.Dense(1)(fixed), "y": mixed})


def unbuilt():
    return keras.Sequential([keras.layers.Dense(3)])


class Plain(keras.Model):
    """Its `call` does not take `training`."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(3)

    def call(self, inputs):
        return self.dense(inputs)


def subclass():
    model = Plain()
    model(np.zeros([1, 4]))
    return model


NETWORKS = {
    make.__name__: make
    for make in (dense, convolutions, recurrent, attention, unbuilt, subclass)
}
SHAPES = {"convolutions": (6, 6, 1), "recurrent": (6, 3), "attention": (6, 4)}


def data(name, *leading):
    rng = np.random.default_rng(0)
    shape = (*leading, *SHAPES.get(name, (4,)))
    x = rng.normal(size=shape).astype("float32")
    return [x, x[..., ::-1]] if name == "attention" else x


def one_by_one(model, population, inputs, shared):
    before = model.get_weights()
    outputs = []
    for n, weights in enumerate(population):
        for variable, w in zip(model.trainable_variables, weights, strict=True):
            variable.assign(w)
        own = inputs
        if not shared:
            own = keras.tree.map_structure(lambda x, n=n: x[n], inputs)
        outputs.append(model(own, training=False))
    model.set_weights(before)
    return keras.tree.map_structure(lambda *x: np.stack(x), *outputs)


def assert_close(got, expected):
    keras.tree.map_structure(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        got,
        expected,
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_all_members_at_once(name):
    keras.utils.set_random_seed(0)
    model = NETWORKS[name]()
    if name == "unbuilt":
        model.build((None, 4))
    if name == "recurrent":
        model.compile(optimizer="adam", loss="mse")
    optimizer = models.make_optimizer()
    for shared in (True, False):
        inputs = data(name, *(() if shared else (8,)), 5)
        population = optimizer.ask(model.trainable_variables)
        for _ in range(2):
            outputs = keras_vo.population_call(
                model, population, inputs, shared_inputs=shared
            )
            assert_close(outputs, one_by_one(model, population, inputs, shared))
            optimizer.tell(population, np.arange(8.0))
            population = optimizer.ask(model.trainable_variables)
        function = population_calls.function_of(model, shared)
        assert function.experimental_get_tracing_count() == 1


def test_by_chunks(monkeypatch):
    model = dense()
    population = models.make_optimizer().ask(model.trainable_variables)
    inputs = data("dense", 8, 5)
    expected = keras_vo.population_call(model, population, inputs, False)
    shared = keras_vo.population_call(model, population, inputs[0])
    # Three members at once, and two that are left.
    monkeypatch.setattr(
        population_calls, "_MOST_BYTES", 3 * population.bytes_each
    )
    got = keras_vo.population_call(model, population, inputs, False)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    got = keras_vo.population_call(model, population, inputs[0])
    np.testing.assert_allclose(got, shared, rtol=1e-6)


def test_what_is_not_trained_is_the_models():
    model = convolutions()
    population = models.make_optimizer().ask(model.trainable_variables)
    inputs = data("convolutions", 5)
    before = keras_vo.population_call(model, population, inputs)
    model.layers[1].moving_mean.assign(np.full(4, 0.5))
    after = keras_vo.population_call(model, population, inputs)
    assert np.all(before != after)
    assert_close(after, one_by_one(model, population, inputs, True))
    model.layers[0].trainable = False
    fewer = models.make_optimizer().ask(model.trainable_variables)
    got = keras_vo.population_call(model, fewer, inputs)
    assert_close(got, one_by_one(model, fewer, inputs, True))


def outputs_of(model, shared_inputs=True):
    """Of the mean, by `population_call` and by the model."""
    tiny = keras_vo.GaussianSearchDistribution("fixed", stddev=1e-6)
    search = models.make_optimizer(search_distribution=tiny, population_size=2)
    population = search.ask(model.trainable_variables)
    x = np.ones((2, 3, 4) if not shared_inputs else (3, 4), np.float32)
    got = keras_vo.population_call(model, population, x, shared_inputs)
    return got[0], model(x if shared_inputs else x[0])


@pytest.mark.parametrize("shared_inputs", [True, False])
def test_a_model_that_has_changed_is_another(shared_inputs):
    """Layers without weights too."""
    model = dense()
    outputs_of(model, shared_inputs)
    model.add(keras.layers.Softmax())
    got, expected = outputs_of(model, shared_inputs)
    np.testing.assert_allclose(got, expected, atol=1e-4)
    model.layers[0].activation = keras.activations.sigmoid
    model.compile()
    got, expected = outputs_of(model, shared_inputs)
    np.testing.assert_allclose(got, expected, atol=1e-4)
    function = population_calls.function_of(model, shared_inputs)
    model.set_weights([2 * w for w in model.get_weights()])
    assert population_calls.function_of(model, shared_inputs) is function


def test_no_model_is_kept_alive():
    model = dense()
    population = models.make_optimizer().ask(model.trainable_variables)
    keras_vo.population_call(model, population, data("dense", 5))
    assert model in population_calls._functions
    count = len(population_calls._functions)
    del model, population
    import gc

    gc.collect()
    assert len(population_calls._functions) < count


def test_wrong_arguments():
    model, other = dense(), convolutions()
    optimizer = models.make_optimizer()
    population = optimizer.ask(model.trainable_variables)
    x = data("dense", 5)
    with pytest.raises(TypeError, match="Expected a Keras model"):
        keras_vo.population_call(population, model, x)
    with pytest.raises(TypeError, match="Expected a population that `ask`"):
        keras_vo.population_call(model, list(population), x)
    with pytest.raises(ValueError, match="the model's trainable variables"):
        keras_vo.population_call(other, population, data("convolutions", 5))
    with pytest.raises(ValueError, match=r"Expected inputs \[8, batch, ...\]"):
        keras_vo.population_call(model, population, x, shared_inputs=False)
