"""Convolutions: noise on their weights, or on their activations.

Cosines of search gradients with the true one, layer by layer, at the start and
after some training (by backpropagation, so that all arms are asked at the same
weights); then training at equal seconds. Digits of scikit-learn; --data_path
takes MNIST.

    python benchmarks/convolutions.py --parts=cosines
    python benchmarks/convolutions.py --parts=training --seconds=8
"""

import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags
from keras import layers
from local_perturbation import FROM_LOGITS, images, steps_of

import keras_vo

FLAGS = flags.FLAGS
flags.DEFINE_list("parts", ["cosines", "training"], "Of both.")
flags.DEFINE_list("networks", [], "Of the functions below; empty: all.")
flags.DEFINE_list("arms", [], "Of ARMS; empty: all.")
flags.DEFINE_string("data_path", None, "mnist.npz of Keras; None: digits.")
flags.DEFINE_integer("draws", 10, "Gradients that a cosine is a mean of.")
flags.DEFINE_integer("trained_steps", 150, "Of backpropagation.")
FLAGS.set_default("seconds", 8.0)

ARMS = {
    "weights": {"perturbation": "full"},
    "local": {"perturbation": "local_reparam"},
    "convolutions too": {
        "perturbation": "local_reparam",
        "convolutions": "local_reparam",
    },
    "auto": {"perturbation": "auto"},
}


def load():
    """Shuffled images and labels; validation data is the last quarter."""
    if FLAGS.data_path:
        with np.load(FLAGS.data_path) as data:
            x = (data["x_train"][..., None] / 255).astype("float32")
            y = data["y_train"].astype("int64")
    else:
        x, y = images()
    order = np.random.default_rng(0).permutation(len(y))
    return x[order], y[order]


def two(size):
    """Two convolutions with pooling between them."""
    k = 5 if size == 28 else 2
    return [
        layers.Conv2D(10, k, activation="relu"),
        layers.MaxPooling2D(),
        layers.Conv2D(20, k, activation="relu"),
        layers.MaxPooling2D(),
        layers.Flatten(),
        layers.Dense(50, activation="relu"),
        layers.Dense(10),
    ]


def strided(size):
    """Patches that do not overlap, then windows of them."""
    return [
        layers.Conv2D(16, size // 4, size // 4, activation="relu"),
        layers.Conv2D(32, 2, activation="relu"),
        layers.Flatten(),
        layers.Dense(10),
    ]


def rows(size):
    """Rows of the image as a sequence."""
    return [
        layers.Reshape((size, size)),
        layers.Conv1D(32, 3, activation="relu"),
        layers.Conv1D(32, 3, strides=2, activation="relu"),
        layers.GlobalMaxPooling1D(),
        layers.Dense(10),
    ]


NETWORKS = {f.__name__: f for f in (two, strided, rows)}


def compiled(name, size, arm, seed, **kwargs):
    keras.utils.set_random_seed(seed)
    model = keras_vo.VOSequential(
        [keras.Input((size, size, 1)), *NETWORKS[name](size)]
    )
    optimizer = keras_vo.VOOptimizer(seed=seed, **ARMS[arm], **kwargs)
    model.compile(optimizer=optimizer, loss=FROM_LOGITS)
    return model


def true_gradient(model, x, y):
    with tf.GradientTape() as tape:
        loss = FROM_LOGITS(y, model(x, training=True))
    return [g.numpy() for g in tape.gradient(loss, model.trainable_variables)]


def cosine(a, b):
    return float(np.sum(a * b) / np.sqrt(np.sum(a**2) * np.sum(b**2) + 1e-30))


def cosines(x, y):
    """Of each kernel's search gradient; -1 times a step of plain SGD."""
    print("| network | after | arm | ms | cosine of each kernel |")
    print("|---|---|---|---|---|")
    size, batch = x.shape[1], slice(0, 128)
    for name in FLAGS.networks or NETWORKS:
        for steps in (0, FLAGS.trained_steps):
            for arm in FLAGS.arms or ARMS:
                model = compiled(
                    name,
                    size,
                    arm,
                    0,
                    inner_optimizer=keras.optimizers.SGD(1.0),
                    natural_gradient=False,
                )
                adam = keras.optimizers.Adam()
                rng = np.random.default_rng(0)
                for _ in range(steps):
                    some = rng.integers(0, len(y), 128)
                    gradient = true_gradient(model, x[some], y[some])
                    adam.apply(gradient, model.trainable_variables)
                start = model.get_weights()
                true = true_gradient(model, x[batch], y[batch])
                found, seconds = [], []
                for _ in range(FLAGS.draws):
                    model.set_weights(start)
                    began = time.perf_counter()
                    model.train_on_batch(x[batch], y[batch])
                    seconds.append(time.perf_counter() - began)
                    found.append(
                        [
                            cosine(a - b.numpy(), g)
                            for a, b, g in zip(
                                start,
                                model.trainable_variables,
                                true,
                                strict=True,
                            )
                            if g.ndim > 1
                        ]
                    )
                means = " ".join(f"{c:.2f}" for c in np.mean(found, axis=0))
                print(
                    f"| {name} | {steps} | {arm} | "
                    f"{1000 * np.median(seconds):.0f} | {means} |",
                    flush=True,
                )


def training(x, y):
    print("| network | arm | steps | validation loss |")
    print("|---|---|---|---|")
    rest, held_out = np.split(np.arange(len(y)), [3 * len(y) // 4])
    for name in FLAGS.networks or NETWORKS:
        for arm in FLAGS.arms or ARMS:
            runs = []
            for seed in map(int, FLAGS.seeds):
                model = compiled(name, x.shape[1], arm, seed)
                steps = steps_of(model, x[rest], y[rest])
                loss = model.evaluate(
                    x[held_out], y[held_out], batch_size=1000, verbose=0
                )
                runs.append((steps, loss))
            steps, loss = np.median(runs, axis=0)
            each = ", ".join(f"{run[1]:.3f}" for run in runs)
            print(
                f"| {name} | {arm} | {steps:.0f} | {loss:.3f} ({each}) |",
                flush=True,
            )


def main(_):
    x, y = load()
    if "cosines" in FLAGS.parts:
        cosines(x, y)
    if "training" in FLAGS.parts:
        training(x, y)


if __name__ == "__main__":
    app.run(main)
