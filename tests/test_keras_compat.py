"""What is asked of Keras: its backend, its private names, its losses."""

import os
import subprocess
import sys
import threading
import types

import keras
import pytest
import tensorflow as tf
from keras.src.losses import loss as loss_module
from keras.src.models import cloning
from test_distribution import mirrored

import keras_vo
from keras_vo import keras_compat
from keras_vo.keras_compat.losses import losses_as_returned


def error_of(program, **environment):
    """What a Python process ends with, the lines of its only traceback."""
    env = {k: v for k, v in os.environ.items() if k != "KERAS_BACKEND"}
    root = os.path.dirname(os.path.dirname(keras_vo.__file__))
    process = subprocess.run(
        [sys.executable, "-c", program],
        env=env | environment,
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 1, process.stderr
    assert process.stderr.count("Traceback") == 1, process.stderr
    return process.stderr.splitlines()[-1]


def assert_names_backend(line, backend):
    assert line.startswith("ImportError: keras_vo works with the TensorFlow")
    assert "KERAS_BACKEND" in line
    assert line.endswith(f"Received: '{backend}'")


@pytest.mark.parametrize("backend", ["numpy", "jax"])
def test_another_backend_is_one_clear_error(backend):
    """Whether it is installed or not."""
    line = error_of("import keras_vo", KERAS_BACKEND=backend)
    assert_names_backend(line, backend)


@pytest.mark.parametrize(
    "module", ["optimizer", "layers", "callbacks", "search.engine"]
)
def test_so_it_is_by_whatever_way_the_package_is_imported(module):
    line = error_of(f"import keras_vo.{module}", KERAS_BACKEND="jax")
    assert_names_backend(line, "jax")


def test_a_keras_that_is_there_already_with_another_backend():
    """As keras.json may ask for one. (None but TensorFlow is installed.)"""
    line = error_of(
        "import sys, types\n"
        "keras = sys.modules['keras'] = types.ModuleType('keras')\n"
        "keras.backend = types.SimpleNamespace(backend=lambda: 'torch')\n"
        "import keras_vo\n"
    )
    assert_names_backend(line, "torch")


# --- private names ---


def lacking(owner, missing):
    """All that `owner` has but one name."""
    kept = {n: getattr(owner, n) for n in dir(owner) if n != missing}
    return types.SimpleNamespace(**kept | {"__name__": owner.__name__})


def fake_keras(**replaced):
    optimizers = types.SimpleNamespace(Optimizer=keras.optimizers.Optimizer)
    known = {
        "Model": keras.Model,
        "optimizers": optimizers,
        "__version__": keras.__version__,
    }
    return types.SimpleNamespace(**known | replaced)


def assert_missing(*names):
    with pytest.raises(ImportError) as error:
        keras_compat._check_names()
    message = str(error.value)
    assert "names of Keras that are not public" in message
    assert f"a version of Keras that has {list(names)}" in message
    assert message.endswith(f"Received: Keras {keras.__version__}")


def test_all_names_are_there():
    keras_compat._check_names()


@pytest.mark.parametrize(
    "name",
    [
        "_make_function",
        "_maybe_symbolic_build",
        "_flatten_layers",
        "_unpickle_model",
    ],
)
def test_a_missing_method_of_a_model(name, monkeypatch):
    fake = fake_keras(Model=lacking(keras.Model, name))
    monkeypatch.setattr(keras_compat, "keras", fake)
    assert_missing(f"Model.{name}")


def test_a_missing_method_of_an_optimizer(monkeypatch):
    name = "_all_reduce_sum_gradients"
    optimizer = lacking(keras.optimizers.Optimizer, name)
    fake = fake_keras(optimizers=types.SimpleNamespace(Optimizer=optimizer))
    monkeypatch.setattr(keras_compat, "keras", fake)
    assert_missing(f"Optimizer.{name}")


@pytest.mark.parametrize("name", keras_compat.SCALES)
def test_a_missing_function(name, monkeypatch):
    fake = lacking(loss_module, name)
    monkeypatch.setattr(keras_compat, "loss_module", fake)
    assert_missing(f"{loss_module.__name__}.{name}")


@pytest.mark.parametrize("name", keras_compat._CLONERS)
def test_a_missing_function_of_clones(name, monkeypatch):
    monkeypatch.setattr(keras_compat, "_cloning", lacking(cloning, name))
    assert_missing(f"{cloning.__name__}.{name}")


class Trainer:
    """It names three of its attributes otherwise."""

    def __init__(self):
        self._loss_of_compile = self._loss_metric = None
        self._metrics_of_compile = None
        self._initial_epoch = None


class TFEpochIterator:
    """It names its data otherwise."""

    def __init__(self):
        self._dataset = None


class CompileLoss:
    """It names its losses otherwise."""

    def __init__(self):
        self._list_of_losses = None


@pytest.mark.parametrize(
    "module, cls, names",
    [
        (
            "_trainer_module",
            Trainer,
            ["_compile_loss", "_compile_metrics", "_loss_tracker"],
        ),
        ("_tf_trainer", TFEpochIterator, ["_distributed_dataset"]),
        ("_compile_utils", CompileLoss, ["_flat_losses"]),
    ],
)
def test_a_missing_attribute(module, cls, names, monkeypatch):
    fake = types.SimpleNamespace(**{cls.__name__: cls})
    monkeypatch.setattr(keras_compat, module, fake)
    assert_missing(*(f"{cls.__name__}.{name}" for name in names))


# --- the scale of losses under a strategy ---


def scaled():
    """What 1 becomes by Keras's two functions."""
    one = tf.constant(1.0)
    return (
        float(loss_module.scale_loss_for_distribution(one)),
        float(loss_module.unscale_loss_for_distribution(one)),
    )


KERAS, UNDIVIDED = (0.5, 2.0), (1.0, 1.0)  # two replicas


def test_losses_are_undivided_in_the_block_only():
    with mirrored(2).scope():
        assert scaled() == KERAS
        with losses_as_returned(keras.Sequential()):
            assert scaled() == UNDIVIDED
            with losses_as_returned(keras.Sequential()):
                assert scaled() == UNDIVIDED
            assert scaled() == UNDIVIDED
        assert scaled() == KERAS
        with (
            pytest.raises(RuntimeError),
            losses_as_returned(keras.Sequential()),
        ):
            raise RuntimeError
        assert scaled() == KERAS


def test_overlapping_threads_leave_the_scale_as_it_was():
    """The first to enter leaves while the second is still inside.

    Were the functions of Keras replaced and put back, the second would put
    back what the first has set.
    """
    functions = [getattr(loss_module, n) for n in keras_compat.SCALES]
    strategy, seen, meeting = mirrored(2), {}, threading.Barrier(2, timeout=60)

    def first():
        with strategy.scope():
            with losses_as_returned(keras.Sequential()):
                meeting.wait()  # the second has not entered
                meeting.wait()  # it has
                seen["first, both inside"] = scaled()
            seen["first, has left"] = scaled()
            meeting.wait()
            meeting.wait()  # the second has left
            seen["first, both have left"] = scaled()

    def second():
        with strategy.scope():
            meeting.wait()
            seen["second, has not entered"] = scaled()
            with losses_as_returned(keras.Sequential()):
                meeting.wait()
                meeting.wait()  # the first has left
                seen["second, alone inside"] = scaled()
            seen["second, has left"] = scaled()
            meeting.wait()

    threads = [threading.Thread(target=f) for f in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {
        "first, both inside": UNDIVIDED,
        "first, has left": KERAS,
        "first, both have left": KERAS,
        "second, has not entered": KERAS,
        "second, alone inside": UNDIVIDED,
        "second, has left": KERAS,
    }
    with strategy.scope():
        assert scaled() == KERAS
    assert functions == [getattr(loss_module, n) for n in keras_compat.SCALES]
