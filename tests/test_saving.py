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
    """From a .keras file and from a weights file into another model.

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
    models.assert_same_state(
        models.search_state(loaded), models.search_state(model)
    )
    for resumed in (model, loaded, fresh):
        models.fit(resumed)
    for resumed in (loaded, fresh):
        models.assert_same_state(
            models.search_state(resumed), models.search_state(model)
        )
    assert isinstance(loaded, keras_vo.VOSequential)
    x, _ = models.make_data()
    np.testing.assert_array_equal(
        loaded.predict(x, verbose=0), model.predict(x, verbose=0)
    )


def test_mixed_precision_resumes(tmp_path):
    keras.config.set_dtype_policy("mixed_float16")
    model = make()
    models.fit(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    models.fit(model)
    models.fit(loaded)
    models.assert_same_state(
        models.search_state(loaded), models.search_state(model)
    )


class Interrupt(keras.callbacks.Callback):
    """In the middle of the third epoch, which has to be begun again."""

    def __init__(self):
        super().__init__()
        self.batches = 0

    def on_train_batch_end(self, batch, logs=None):
        self.batches += 1
        if self.batches == 8:
            raise InterruptedError


def test_backup_and_restore(tmp_path):
    layers = "random"
    want = make(layers, "separable")
    models.fit(want, epochs=4)

    def backup():
        return keras.callbacks.BackupAndRestore(tmp_path / "backup")

    with pytest.raises(InterruptedError):
        models.fit(
            make(layers, "separable"),
            epochs=4,
            callbacks=[backup(), Interrupt()],
        )
    resumed = make(layers, "separable")
    history = models.fit(resumed, epochs=4, callbacks=[backup()])
    assert len(history["loss"]) == 2
    models.assert_same_state(
        models.search_state(resumed), models.search_state(want)
    )


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


def run(code, *arguments):
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr[-3000:]


SERVE = """
import sys
import numpy as np
import tensorflow as tf
end = sys.argv.index("resume")
served, resumed = sys.argv[1:end], sys.argv[end + 1:]
for folder, data in zip(served[::2], served[1::2]):
    x, want = np.load(data).values()
    model = tf.saved_model.load(folder)
    got = model.serve(x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
assert not any(name.startswith("keras_vo") for name in sys.modules)
"""

RESUME = """
sys.path.insert(0, "tests")
import keras
import models
import numpy as np
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

for path, want in zip(resumed[::2], resumed[1::2]):
    model = keras.models.load_model(path)
    assert isinstance(model, keras_vo.VOTrainStep), type(model)
    models.fit(model)
    np.testing.assert_array_equal(models.weights(model), np.load(want))
"""


@pytest.mark.slow
def test_another_process_serves_and_resumes(tmp_path):
    x, _ = models.make_data()
    own = keras_vo.make_variational(Subclassed(6))
    own(x)
    own.compile(
        optimizer=models.make_optimizer(seed=None),
        loss="sparse_categorical_crossentropy",
    )
    inputs = keras.Input((4,))
    functional = keras_vo.VOModel(inputs, keras.layers.Dense(3)(inputs))
    functional.compile(optimizer=models.make_optimizer(), loss="mse")
    functional.compile(
        optimizer=models.make_optimizer(seed=None),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    served, resumed = [], []
    for name, model in (
        ("sequential", make("random")),
        ("perturbed", make("perturbed")),
        ("functional", functional),
        ("own", own),
    ):
        if name in ("sequential", "perturbed"):
            model.export(tmp_path / name, verbose=False)
            data = tmp_path / f"{name}.npz"
            np.savez(data, x=x, want=model.predict(x, verbose=0))
            served += [tmp_path / name, data]
        if name == "sequential":
            continue
        models.fit(model)
        model.save(tmp_path / f"{name}.keras")
        models.fit(model)
        want = tmp_path / f"{name}.npy"
        np.save(want, models.weights(model))
        resumed += [tmp_path / f"{name}.keras", want]
    run(SERVE + RESUME, *served, "resume", *resumed)


DETERMINISM = """
import sys
sys.path.insert(0, "tests")
import keras, models, numpy as np, tensorflow as tf
tf.config.experimental.enable_op_determinism()
def train():
    keras.utils.set_random_seed(3)
    model = models.make_model([
        keras.layers.Dense(5), keras.layers.Dropout(0.5), keras.layers.Dense(3)
    ], loss="mse", optimizer=models.make_optimizer(seed=None))
    x, _ = models.make_data()
    models.fit(model, x, x[:, :3], shuffle=True)
    return models.weights(model)
np.testing.assert_array_equal(train(), train())
"""


@pytest.mark.slow
def test_ops_can_be_deterministic():
    """A setting of a whole process."""
    run(DETERMINISM)
