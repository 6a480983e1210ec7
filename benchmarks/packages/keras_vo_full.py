"""keras_vo through `train_on_batch`, with noise of full rank."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras

import keras_vo


def make_step(cell, perturbation="full"):
    """A step; it returns the loss of the mean."""
    inputs, *hidden, outputs = cell.units
    layers = [keras.layers.Dense(m, activation="relu") for m in hidden]
    model = keras_vo.VOSequential(
        [keras.Input([inputs]), *layers, keras.layers.Dense(outputs)]
    )
    model.set_weights([w for layer in cell.weights() for w in layer])
    model.compile(
        optimizer=keras_vo.VOOptimizer(
            keras.optimizers.Adam(cell.learning_rate),
            population_size=cell.population_size,
            perturbation=perturbation,
            seed=0,
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    x, y = cell.data()
    return lambda: float(model.train_on_batch(x, y)[0])
