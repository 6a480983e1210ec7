"""Noise on activations beside noise on weights, at equal seconds.

Networks and data that no default was chosen on, or only roughly: see
benchmarks/results/local_perturbation.md. Each is trained with
`VOOptimizer(perturbation=...)` and nothing else set, for some seconds after its
first step, on three quarters of the data; the rest is for the table. (It is
called validation, as defaults have been looked at by it.) Takes

    tasks * perturbations * seeds * (seconds + 5) seconds:

    python benchmarks/local_perturbation.py --tasks=digits,f1 --seeds=0,1
"""

import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags
from keras import layers
from sklearn import datasets

import keras_vo

FLAGS = flags.FLAGS
flags.DEFINE_list("tasks", [], "Of the functions below; empty: all.")
flags.DEFINE_list(
    "perturbations", ["full", "low_rank", "local_reparam"], "To compare."
)
flags.DEFINE_list("seeds", ["0", "1", "2", "3", "4"], "Of weights and noise.")
flags.DEFINE_float("seconds", 10.0, "Of training, after the first step.")
flags.DEFINE_integer("batch_size", 128, "Examples a step.")

FROM_LOGITS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def macro_f1(y_true, y_pred):
    """1 - macro F1 of the batch: one number, a step function."""
    classes = y_pred.shape[-1]
    labels = tf.cast(tf.reshape(y_true, [-1]), tf.int32)
    true = tf.one_hot(labels, classes)
    said = tf.one_hot(tf.argmax(y_pred, -1), classes)
    hits = tf.reduce_sum(true * said, 0)
    total = tf.reduce_sum(true, 0) + tf.reduce_sum(said, 0)
    return 1 - tf.reduce_mean(tf.math.divide_no_nan(2 * hits, total))


def zero_one(y_true, y_pred):
    labels = tf.cast(tf.reshape(y_true, [-1]), tf.int64)
    return tf.cast(labels != tf.argmax(y_pred, -1), tf.float32)


def images():
    data = datasets.load_digits()
    return (data.images[..., None] / 16).astype("float32"), data.target


def mlp():
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(10),
        ]
    )


def digits():
    return *images(), mlp, FROM_LOGITS


def zero_one_error():
    return *images(), mlp, zero_one


def f1():
    return *images(), mlp, macro_f1


def batch_normalization():
    def network():
        parts = [layers.Flatten()]
        for units in (64, 32):
            parts += [
                layers.Dense(units),
                layers.BatchNormalization(),
                layers.ReLU(),
            ]
        return keras.Sequential(
            [keras.Input((8, 8, 1)), *parts, layers.Dense(10)]
        )

    return *images(), network, FROM_LOGITS


def convolutions():
    def network():
        return keras.Sequential(
            [
                keras.Input((8, 8, 1)),
                layers.Conv2D(8, 3, use_bias=False),
                layers.BatchNormalization(),
                layers.ReLU(),
                layers.MaxPooling2D(),
                layers.Flatten(),
                layers.Dense(32, activation="relu"),
                layers.Dense(10),
            ]
        )

    return *images(), network, FROM_LOGITS


def gru():
    """Overlapping classes: a noisy sum over sequences of several lengths."""
    rng = np.random.default_rng(0)
    x = rng.integers(1, 30, (2000, 12))
    x[np.arange(12)[None] >= rng.integers(4, 13, 2000)[:, None]] = 0
    score = np.where(x > 0, rng.normal(size=30)[x], 0).sum(1)
    y = rng.random(2000) < 1 / (1 + np.exp(-0.7 * score))

    def network():
        return keras.Sequential(
            [
                keras.Input((12,)),
                layers.Embedding(30, 16, mask_zero=True),
                layers.GRU(16),
                layers.Dense(1, activation="sigmoid"),
            ]
        )

    return x, y.astype("float32"), network, "binary_crossentropy"


def transformer():
    """How many symbols both halves of a sequence have."""
    rng = np.random.default_rng(1)
    x = rng.integers(0, 12, (2000, 16))
    y = np.array([len(set(row[:8]) & set(row[8:])) for row in x])

    def network():
        inputs = keras.Input((16,))
        hidden = layers.Embedding(12, 32)(inputs)
        for _ in range(2):
            attended = layers.MultiHeadAttention(4, 8)(hidden, hidden)
            hidden = layers.LayerNormalization()(hidden + attended)
            wide = layers.Dense(64, activation="relu")(hidden)
            hidden = layers.LayerNormalization()(
                hidden + layers.Dense(32)(wide)
            )
        pooled = layers.GlobalAveragePooling1D()(hidden)
        return keras.Model(inputs, layers.Dense(5)(pooled))

    return x, np.clip(y - 1, 0, 4), network, FROM_LOGITS


def pooled_positions():
    """Dense over 50 positions, whose mean one output reads."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(1000, 50, 16)).astype("float32")
    y = np.tanh(x[..., 0] + x[..., 1] * x[..., 2]).mean(1) > 0

    def network():
        return keras.Sequential(
            [
                keras.Input((50, 16)),
                layers.Dense(32, activation="relu"),
                layers.Dense(32, activation="relu"),
                layers.GlobalAveragePooling1D(),
                layers.Dense(1, activation="sigmoid"),
            ]
        )

    return x, y.astype("float32"), network, "binary_crossentropy"


def imbalanced():
    x, y = datasets.make_classification(
        4000,
        20,
        n_informative=6,
        weights=[0.93],
        class_sep=0.8,
        flip_y=0.02,
        random_state=0,
    )

    def network():
        return keras.Sequential(
            [
                keras.Input((20,)),
                layers.Dense(32, activation="relu"),
                layers.Dense(1, activation="sigmoid"),
            ]
        )

    x = x.astype("float32")
    return x, y.astype("float32"), network, "binary_crossentropy"


def overlapping():
    rng = np.random.default_rng(2)
    y = rng.integers(0, 3, 1500)
    x = rng.normal(size=(1500, 8)) + 0.8 * np.eye(3, 8)[y]

    def network():
        return keras.Sequential(
            [
                keras.Input((8,)),
                layers.Dense(64, activation="relu"),
                layers.Dense(64, activation="relu"),
                layers.Dense(3),
            ]
        )

    return x.astype("float32"), y, network, FROM_LOGITS


def regression():
    data = datasets.load_diabetes()
    x, y = data.data * 20, (data.target - 152) / 77

    def network():
        return keras.Sequential(
            [
                keras.Input((10,)),
                layers.Dense(32, activation="relu"),
                layers.Dense(32, activation="relu"),
                layers.Dense(1),
            ]
        )

    return x.astype("float32"), y.astype("float32"), network, "mse"


def sign_activations():
    def network():
        return keras.Sequential(
            [
                keras.Input((8, 8, 1)),
                layers.Flatten(),
                layers.Dense(64, activation=tf.sign),
                layers.Dense(32, activation=tf.sign),
                layers.Dense(10),
            ]
        )

    return *images(), network, FROM_LOGITS


TASKS = {
    task.__name__: task
    for task in (
        digits,
        zero_one_error,
        f1,
        sign_activations,
        batch_normalization,
        convolutions,
        gru,
        transformer,
        pooled_positions,
        imbalanced,
        overlapping,
        regression,
    )
}


class Until(keras.callbacks.Callback):
    """Ends training some seconds after its first step."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds
        self.first, self.steps = None, 0

    def on_train_batch_end(self, batch, logs=None):
        self.steps += 1
        self.first = self.first or time.perf_counter()
        if time.perf_counter() - self.first > self.seconds:
            self.model.stop_training = True


def steps_of(model, x, y):
    """Trains for --seconds; how many steps it takes."""
    until = Until(FLAGS.seconds)
    model.fit(
        x,
        y,
        batch_size=FLAGS.batch_size,
        epochs=1_000_000,
        verbose=0,
        callbacks=[until],
    )
    return until.steps


def trained(task, perturbation, seed):
    """Steps, and the loss on training and validation data."""
    x, y, network, loss = TASKS[task]()
    order = np.random.default_rng(0).permutation(len(y))
    held_out, rest = np.split(order, [len(y) // 4])
    keras.utils.set_random_seed(seed)
    model = keras_vo.make_variational(network())
    model.compile(
        optimizer=keras_vo.VOOptimizer(perturbation=perturbation, seed=seed),
        loss=loss,
    )
    steps = steps_of(model, x[rest], y[rest])
    evaluate = {"batch_size": len(y), "verbose": 0}
    return (
        steps,
        model.evaluate(x[rest], y[rest], **evaluate),
        model.evaluate(x[held_out], y[held_out], **evaluate),
    )


def main(_):
    tasks = FLAGS.tasks or list(TASKS)
    if unknown := set(tasks) - set(TASKS):
        raise ValueError(
            f"Expected --tasks of {list(TASKS)}. Received: {sorted(unknown)}"
        )
    print("| task | perturbation | steps | training loss | validation loss |")
    print("|---|---|---|---|---|")
    for task in tasks:
        for perturbation in FLAGS.perturbations:
            runs = np.array(
                [trained(task, perturbation, int(s)) for s in FLAGS.seeds]
            )
            steps, train, valid = np.median(runs, axis=0)
            low, high = runs[:, 2].min(), runs[:, 2].max()
            print(
                f"| {task} | {perturbation} | {steps:.0f} | {train:.4f} | "
                f"{valid:.4f} ({low:.4f} to {high:.4f}) |",
                flush=True,
            )


if __name__ == "__main__":
    app.run(main)
