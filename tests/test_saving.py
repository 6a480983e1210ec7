"""Saved, loaded, resumed and exported: nothing of the search is lost."""

import pathlib
import subprocess
import sys

import keras
import models
import numpy as np
import pytest
from test_make_variational import Subclassed

import keras_vo

ROOT = pathlib.Path(__file__).parent.parent
LAYERS = {
    "plain": models.make_layers,
    "random": lambda: [
        keras.layers.Dense(5, activation="relu"),
        keras.layers.BatchNormalization(),
        keras.layers.Dropout(0.5),
        keras_vo.layers.LocalReparamDense(models.CLASSES, activation="softmax"),
    ],
    "perturbed": lambda: [
        keras_vo.layers.LowRankDense(5, rank=2, activation="relu"),
        keras.layers.BatchNormalization(),
        keras_vo.layers.LocalReparamDense(4, activation="relu"),
        keras.layers.Dropout(0.5),
        keras.layers.Dense(models.CLASSES, activation="softmax"),
    ],
}
OPTIMIZERS = {
    "layerwise": lambda: models.make_optimizer(seed=None),
    "separable": lambda: models.make_optimizer(
        search_distribution="separable",
        inner_optimizer=keras.optimizers.SGD(
            keras.optimizers.schedules.CosineDecay(1.0, 20),
            momentum=0.9,
            use_ema=True,
        ),
    ),
}


def make(layers="plain", optimizer="layerwise"):
    keras.utils.set_random_seed(1)
    return models.make_model(
        LAYERS[layers](), optimizer=OPTIMIZERS[optimizer]()
    )


def test_resumed_is_uninterrupted(tmp_path):
    """From a .keras file, and as much from a weights file into another model.

    Dropout, batch statistics, schedules and EMA; others: test_conformance.py.
    """
    layers, optimizer = "random", "separable"
    model = make(layers, optimizer)
    models.fit(model)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    keras.utils.set_random_seed(99)
    fresh = keras_vo.VOSequential([keras.Input((4,)), *LAYERS[layers]()])
    fresh.compile(
        optimizer=OPTIMIZERS[optimizer](),
        loss="sparse_categorical_crossentropy",
    )
    fresh.load_weights(tmp_path / "model.weights.h5")  # not built before

    # The state of Dropout is a function of these.
    for other in (loaded, fresh):
        models.assert_same_state(
            models.search_state(other), models.search_state(model)
        )
    for resumed in (model, loaded):
        models.fit(resumed)
    models.assert_same_state(
        models.search_state(loaded), models.search_state(model)
    )
    assert isinstance(loaded, keras_vo.VOSequential)
    x, _ = models.make_data()
    np.testing.assert_array_equal(loaded(x), model(x))


def test_weights_of_a_plain_model(tmp_path):
    plain = keras.Sequential([keras.Input((4,)), *models.make_layers()])
    plain.save_weights(tmp_path / "plain.weights.h5")
    model = make()
    model.load_weights(tmp_path / "plain.weights.h5")  # has no search at all
    np.testing.assert_array_equal(models.weights(model), models.weights(plain))


@pytest.mark.parametrize(
    "kind",
    [keras_vo.layers.LocalReparamDense, keras_vo.layers.LowRankDense],
)
def test_weights_are_those_of_dense_both_ways(kind, tmp_path):
    """`.weights.h5` files name layers by their classes."""
    path = tmp_path / "model.weights.h5"
    x, _ = models.make_data()
    dense = keras.layers.Dense

    def make_model(cls, *layer_classes):
        shape = keras.Input((4,))
        return cls([shape, *(layer(3) for layer in layer_classes)])

    plain = make_model(keras.Sequential, dense, dense, dense)
    ours = make_model(keras_vo.VOSequential, dense, kind, dense)
    for source, target in ((plain, ours), (ours, plain), (ours, ours)):
        source.set_weights([w + 0.1 for w in source.get_weights()])
        source.save_weights(path)
        target.load_weights(path)
        np.testing.assert_array_equal(source(x), target(x))
    assert type(ours.layers[1]) is kind


PROCESS = """
import sys
import numpy as np
import tensorflow as tf
folder, *resumed = sys.argv[1:]
x, want = np.load(f"{folder}/served.npz").values()
served = tf.saved_model.load(f"{folder}/served")
got = served.serve(x)
np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
assert not any(name.startswith("keras_vo") for name in sys.modules)

sys.path.insert(0, "tests")
import keras
import models
import keras_vo

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

for name in resumed:
    model = keras.models.load_model(f"{folder}/{name}.keras")
    assert isinstance(model, keras_vo.VOTrainStep), type(model)
    models.fit(model, epochs=1)
    want = np.load(f"{folder}/{name}.npy")
    np.testing.assert_array_equal(models.weights(model), want)

tf.config.experimental.enable_op_determinism()  # of a whole process
def train():
    keras.utils.set_random_seed(3)
    layers = [keras.layers.Dropout(0.5), keras.layers.Dense(3)]
    model = models.make_model(
        layers, loss="mse", optimizer=models.make_optimizer(seed=None)
    )
    models.fit(model, x, x[:, :3], shuffle=True, epochs=1)
    return models.weights(model)
np.testing.assert_array_equal(train(), train())

# Imported where a divergence is first needed.
assert "tensorflow_probability" not in sys.modules
"""


@pytest.mark.slow
def test_another_process_serves_and_resumes_and_ops_can_be_deterministic(
    tmp_path,
):
    x, _ = models.make_data()
    own = keras_vo.make_variational(Subclassed(6))
    own(x)
    inputs = outputs = keras.Input((4,))
    for layer in LAYERS["perturbed"]():
        outputs = layer(outputs)
    functional = keras_vo.VOModel(inputs, outputs)
    functional.export(tmp_path / "served", verbose=False)
    np.savez(tmp_path / "served.npz", x=x, want=functional(x))
    for name, model in (("functional", functional), ("own", own)):
        model.compile(
            optimizer=models.make_optimizer(seed=None),
            loss="sparse_categorical_crossentropy",
        )
        models.fit(model, epochs=1)
        model.save(tmp_path / f"{name}.keras")
        models.fit(model, epochs=1)
        np.save(tmp_path / f"{name}.npy", models.weights(model))
    result = subprocess.run(
        [sys.executable, "-c", PROCESS, str(tmp_path), "functional", "own"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr[-3000:]
