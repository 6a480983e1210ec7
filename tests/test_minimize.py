"""`minimize` and its like: what they take, and how their search is saved."""

import inspect
import operator

import keras
import models
import numpy as np
import pytest
import tensorflow as tf

import keras_vo

X = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")


def objective(weights):
    return tf.reduce_sum((weights[0] - 1) ** 2)


def methods(optimizer):
    """Each that takes variables, by name."""
    return {
        "minimize": lambda v: optimizer.minimize(objective, v),
        "step": lambda v: optimizer.step(objective, v),
        "build": optimizer.build,
    }


def tf_variable():
    return tf.Variable([3.0, 4.0])


def keras_variable():
    return keras.Variable(np.array([3.0, 4.0], "float32"))


def model():
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])


NO_LISTS = {
    "tf": (tf_variable, "one variable, 'Variable:0'"),
    "keras": (keras_variable, "one variable, '(keras_)?variable"),
    "dict": (lambda: {"w": tf_variable()}, "{'w': <tf.Variable"),
    "model": (model, "Sequential"),
    "array": (lambda: np.ones(2), "array"),
    "tensor": (lambda: tf.ones(2), "tf.Tensor"),
    "None": (lambda: None, "None of type"),
}
NO_VARIABLES = {
    "arrays": lambda: [tf_variable(), np.ones(2)],
    "tensors": lambda: [tf_variable(), tf.ones(2)],
    "nested": lambda: [tf_variable(), [tf_variable()]],
    "layers": lambda: [tf_variable(), *model().layers],
    "names": lambda: [tf_variable(), "w"],
}


@pytest.mark.parametrize("method", ["minimize", "step", "build"])
@pytest.mark.parametrize("given", NO_LISTS)
def test_what_is_no_list(given, method):
    make, received = NO_LISTS[given]
    optimizer = models.make_optimizer()
    with pytest.raises(TypeError, match=f"Received: .*{received}") as error:
        methods(optimizer)[method](make())
    first = "" if method == "build" else "objective, "
    assert f"`{method}({first}[variable])`" in str(error.value)
    assert f"`{method}({first}list(variables.values()))`" in str(error.value)
    assert not optimizer.built


@pytest.mark.parametrize("method", ["minimize", "step", "build"])
@pytest.mark.parametrize("given", NO_VARIABLES)
def test_lists_of_something_else(given, method):
    optimizer = models.make_optimizer()
    with pytest.raises(TypeError, match=r"Keras or TensorFlow.*at place 1"):
        methods(optimizer)[method](NO_VARIABLES[given]())
    assert not optimizer.built


@pytest.mark.parametrize("method", ["minimize", "step", "build"])
def test_a_variable_that_is_there_twice(method):
    w, k = tf_variable(), keras_variable()
    for twice in ([w, k, w], [k, w, k], [k, w, k.value]):
        with pytest.raises(ValueError, match="once.* at places 0 and 2"):
            methods(models.make_optimizer())[method](twice)
    np.testing.assert_array_equal(w, [3.0, 4.0])


@pytest.mark.parametrize("method", ["minimize", "step"])
def test_what_is_no_objective(method):
    w = tf_variable()
    for given, received in (
        ([w], r"\[<tf.Variable"),
        (objective([w]), "<tf.Tensor"),
        (None, "None of type"),
    ):
        optimizer = models.make_optimizer()
        with pytest.raises(TypeError, match=rf"Received: objective={received}"):
            getattr(optimizer, method)(given, objective)
        with pytest.raises(TypeError, match=rf"`{method}\(objective, \[var"):
            getattr(optimizer, method)(given, [w])
    for takes in (lambda: tf.reduce_sum(w**2), lambda a, b: a + b):
        with pytest.raises(TypeError, match=r"the list.*`lambda weights: .*"):
            getattr(models.make_optimizer(), method)(takes, [w])


@pytest.mark.parametrize("error", [TypeError, ValueError])
def test_an_objective_whose_signature_cannot_be_read(error):
    class Unreadable:
        __signature__ = "(weights)"  # no `inspect.Signature`

        def __call__(self, weights):
            return objective(weights)

    class Builtin:
        __call__ = operator.itemgetter(0)  # a loss of one weight

    opaque = {TypeError: Unreadable, ValueError: Builtin}[error]()
    with pytest.raises(error):
        inspect.signature(opaque)
    w = tf_variable() if error is TypeError else tf.Variable(3.0)
    before = w.numpy()
    models.make_optimizer().minimize(opaque, [w])
    assert np.all(w.numpy() != before)


@pytest.mark.parametrize("method", ["minimize", "step", "build"])
def test_other_sequences_are_lists(method):
    values = []
    for make in (list, tuple, iter):
        w, optimizer = tf_variable(), models.make_optimizer()
        methods(optimizer)[method](make([w]))
        optimizer.minimize(objective, make([w]))
        values.append(w.numpy())
    np.testing.assert_array_equal(values[0], values[1])
    np.testing.assert_array_equal(values[0], values[2])
    assert np.all(values[0] != [3.0, 4.0])


# --- saved ---


def searched(make_variable, variance, compiled):
    """A variable, its optimizer and a function that takes a step."""
    w = make_variable()
    optimizer = models.make_optimizer(variance, seed=None)

    def step():
        return optimizer.minimize(objective, [w])

    return w, optimizer, tf.function(step) if compiled else step


def state(w, optimizer):
    return [w.numpy(), *(v.numpy() for v in optimizer.variables)]


@pytest.mark.parametrize(
    "make_variable, variance, compiled, when",
    [
        (tf_variable, "separable", False, "built"),
        (keras_variable, "layerwise", True, "begun"),
        (tf_variable, "isotropic", True, "before"),
    ],
)
def test_a_checkpoint_goes_on_as_uninterrupted(
    make_variable, variance, compiled, when, tmp_path
):
    w, optimizer, step = searched(make_variable, variance, compiled)
    for _ in range(3):
        step()
    search = tf.train.Checkpoint(w=w, optimizer=optimizer)
    path = search.save(str(tmp_path / "search"))
    for _ in range(3):
        step()
    other, resumed, other_step = searched(make_variable, variance, compiled)
    other.assign([7.0, 7.0])
    if when == "built":
        resumed.build([other])
    elif when == "begun":
        other_step()
    status = tf.train.Checkpoint(w=other, optimizer=resumed).restore(path)
    for _ in range(3):
        other_step()
    status.assert_consumed()
    models.assert_same_state(state(other, resumed), state(w, optimizer))


@pytest.mark.parametrize("cls", [keras.Sequential, keras_vo.VOSequential])
def test_a_keras_file_of_a_model_that_minimize_trains(cls, tmp_path):
    def stepper(model):
        def loss(weights):
            outputs, _ = model.stateless_call(weights, [], X)
            return tf.reduce_mean((outputs - 1) ** 2)

        return tf.function(
            lambda: model.optimizer.minimize(loss, model.trainable_variables)
        )

    model = cls([keras.Input((4,)), keras.layers.Dense(2)])
    model.compile(optimizer=models.make_optimizer(seed=None))
    step = stepper(model)
    for _ in range(3):
        step()
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    loaded_step = stepper(loaded)
    for _ in range(3):
        step(), loaded_step()
    assert int(loaded.optimizer.generations) == 6
    models.assert_same_state(
        models.search_state(loaded), models.search_state(model)
    )
