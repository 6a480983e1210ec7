"""Trains a classifier on MNIST without derivatives, with every kind of noise.

`--dense` says how the dense layers are perturbed: their activations
(local_reparam), their kernels by noise of low rank (low_rank), or every weight
(full). Nothing is differentiated, unless `--backpropagation` asks for what
that costs and gives in comparison.

    python examples/mnist.py --epochs 15
    python examples/mnist.py --network cnn --loss zero_one

The images are keras.datasets.mnist, downloaded once; `--data_path` takes an
.npz file with the same arrays.
"""

import json
import math
import os
import pathlib
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf
from absl import app, flags, logging

import keras_vo

matplotlib.use("agg")

FLAGS = flags.FLAGS

flags.DEFINE_string(
    "data_path", None, "An .npz with x_train, y_train, x_test and y_test."
)
flags.DEFINE_enum(
    "network",
    "mlp",
    ["mlp", "cnn", "patches", "frozen"],
    "mlp: dense layers. cnn: two strided convolutions, perturbed in weight "
    "space, before them. patches: a dense layer on patches, perturbed as the "
    "others are, before them. frozen: a convolution of random kernels that is "
    "not trained, before them.",
)
flags.DEFINE_list(
    "units", ["128"], "Units of the hidden dense layers; empty: none."
)
flags.DEFINE_enum(
    "loss",
    "nll",
    ["nll", "zero_one", "f1"],
    "Loss to minimise. f1: 1 less the batch's mean F1 of the classes, which "
    "has no value for each image, as local_reparam needs it.",
)
flags.DEFINE_enum(
    "dense",
    "local_reparam",
    ["local_reparam", "low_rank", "full"],
    "What is perturbed of the dense layers.",
)
flags.DEFINE_bool(
    "backpropagation", False, "Train by gradients instead, to compare."
)
flags.DEFINE_integer("epochs", 15, "Passes over the images.")
flags.DEFINE_integer("batch_size", 256, "Images in a mini-batch.")
flags.DEFINE_integer("population_size", 16, "Members a step.")
flags.DEFINE_float("learning_rate", 0.005, "Of Adam; decays to 0 by a cosine.")
flags.DEFINE_enum(
    "variance",
    "fixed",
    ["fixed", "isotropic", "layerwise", "separable"],
    "Which weights share a variance.",
)
flags.DEFINE_float("stddev", 0.1, "Initial sigma.")
flags.DEFINE_float(
    "variance_learning_rate",
    0.1,
    "Of log sigma^2, where it is not fixed.",
)
flags.DEFINE_float("min_stddev", 1e-6, "Least sigma.")
flags.DEFINE_enum(
    "fitness_shaping",
    "identity",
    ["identity", "standardize", "centered_rank", "nes"],
    "How losses become utilities.",
)
flags.DEFINE_float(
    "shift", 0, "Pixels that a training image is moved by, at most."
)
flags.DEFINE_bool("jit_compile", False, "Compile the evaluation by XLA.")
flags.DEFINE_integer("seed", 0, "Seed of initial weights, batches and noise.")
flags.DEFINE_string("plot_path", "out/mnist.png", "Plot; empty: none.")
flags.DEFINE_string("curve_path", None, "JSON of the accuracy over time.")


@keras.saving.register_keras_serializable(package="keras_vo_examples")
def zero_one_error(y_true, y_pred):
    """1 for every image whose most probable class is wrong, else 0."""
    labels = tf.cast(tf.reshape(y_true, [-1]), tf.int64)
    return tf.cast(tf.argmax(y_pred, axis=-1) != labels, tf.float32)


@keras.saving.register_keras_serializable(package="keras_vo_examples")
def f1_error(y_true, y_pred):
    """1 - the mean over classes of 2 TP / (images of it + predictions)."""
    labels = tf.one_hot(tf.cast(tf.reshape(y_true, [-1]), tf.int32), 10)
    predictions = tf.one_hot(tf.argmax(y_pred, axis=-1), 10)
    hits = tf.reduce_sum(labels * predictions, axis=0)
    total = tf.reduce_sum(labels + predictions, axis=0)
    return 1.0 - tf.reduce_mean(tf.math.divide_no_nan(2.0 * hits, total))


@keras.saving.register_keras_serializable(package="keras_vo_examples")
class Patches(keras.layers.Layer):
    """Patches of 6 x 6, four pixels apart: [batch, h, w, channels * 36]."""

    def call(self, inputs):
        return keras.ops.image.extract_patches(inputs, 6, 4, padding="same")


def load_data():
    """Images [n, 28, 28, 1] in [0, 1], and labels [n]."""
    if FLAGS.data_path:
        with np.load(FLAGS.data_path) as data:
            names = ("x_train", "y_train", "x_test", "y_test")
            x_train, y_train, x_test, y_test = (data[name] for name in names)
    else:
        (x_train, y_train), (x_test, y_test) = keras.datasets.mnist.load_data()
    x_train, x_test = (
        (x.astype("float32") / 255.0)[..., None] for x in (x_train, x_test)
    )
    return x_train, y_train.astype("int32"), x_test, y_test.astype("int32")


def make_batches(x, y):
    """Shuffled batches of images, each moved by up to `--shift` pixels."""
    data = tf.data.Dataset.from_tensor_slices((x, y))
    data = data.shuffle(len(x), seed=FLAGS.seed)
    data = data.batch(FLAGS.batch_size, drop_remainder=True)
    if FLAGS.shift:
        share = FLAGS.shift / x.shape[1]
        move = keras.layers.RandomTranslation(
            share, share, "constant", "nearest", seed=FLAGS.seed
        )
        data = data.map(lambda x, y: (move(x, training=True), y))
    return data.prefetch(2)


def make_layers():
    layers = keras.layers
    if FLAGS.network == "cnn":
        for filters in (8, 16):
            yield layers.Conv2D(filters, 5, strides=2, padding="same")
            yield layers.BatchNormalization()
            yield layers.ReLU()
    if FLAGS.network == "patches":
        yield Patches()
        yield layers.Dense(16, activation="relu")
    if FLAGS.network == "frozen":
        yield layers.Conv2D(
            64, 5, padding="same", activation="relu", trainable=False
        )
        yield layers.MaxPool2D(4)
    yield layers.Flatten()
    for units in map(int, FLAGS.units):
        yield layers.Dense(units, activation="relu")
    yield layers.Dense(10)


def make_model(steps):
    """The compiled network, for a run of `steps` steps."""
    model = keras.Sequential(
        [keras.Input((28, 28, 1)), *make_layers()], name="mnist"
    )
    optimizer = keras.optimizers.Adam(
        keras.optimizers.schedules.CosineDecay(FLAGS.learning_rate, steps)
    )
    if not FLAGS.backpropagation:
        model = keras_vo.make_variational(model, dense=FLAGS.dense)
        optimizer = keras_vo.VOOptimizer(
            optimizer,
            FLAGS.population_size,
            keras_vo.GaussianSearchDistribution(
                FLAGS.variance,
                stddev=FLAGS.stddev,
                learning_rate=FLAGS.variance_learning_rate,
                min_stddev=FLAGS.min_stddev,
            ),
            fitness_shaping=FLAGS.fitness_shaping,
            examples_population_size=FLAGS.population_size,
            seed=FLAGS.seed,
        )
    loss = {
        "nll": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        "zero_one": zero_one_error,
        "f1": f1_error,
    }[FLAGS.loss]
    model.compile(
        optimizer=optimizer,
        loss=loss,
        metrics=["accuracy"],
        jit_compile=FLAGS.jit_compile,
    )
    return model


class Curve(keras.callbacks.Callback):
    """Test accuracy over seconds of training and over evaluations.

    An evaluation is a forward pass of a member for one image (that of the mean
    network, for the log, is not counted). The time for testing does not count.
    """

    def __init__(self, x_test, y_test, every):
        super().__init__()
        self.test = x_test, y_test
        self.every = every
        self.points = []
        self.seconds = 0.0
        self.steps = 0

    def on_train_begin(self, logs=None):
        self.started = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        self.steps += 1
        if self.steps % self.every == 0:
            self.record()

    def record(self):
        self.seconds += time.perf_counter() - self.started
        logits = self.model.predict(self.test[0], batch_size=1000, verbose=0)
        accuracy = np.mean(logits.argmax(-1) == self.test[1])
        # Backpropagation: a pass forward and two of its cost backward.
        passes = 3
        if not FLAGS.backpropagation:  # convolutions have members of their own
            both = FLAGS.network == "cnn" and FLAGS.dense == "local_reparam"
            passes = FLAGS.population_size * (1 + both)
        self.points.append(
            {
                "seconds": round(self.seconds, 2),
                "evaluations": self.steps * FLAGS.batch_size * passes,
                "accuracy": float(accuracy),
            }
        )
        self.started = time.perf_counter()


def plot(points, path):
    """Misclassified test images over seconds of training."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(figsize=(6, 4))
    seconds = [point["seconds"] for point in points]
    errors = [100 * (1 - point["accuracy"]) for point in points]
    axes.plot(seconds, errors, marker=".")
    axes.set(
        xlabel="seconds of training",
        ylabel="misclassified test images, %",
        yscale="log",
        title=f"MNIST, test accuracy {points[-1]['accuracy']:.4f}",
    )
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Expected flags only. Received: {argv[1:]}")
    logging.set_verbosity(logging.WARNING)
    if FLAGS.backpropagation and FLAGS.loss != "nll":
        raise app.UsageError(
            "Expected --loss=nll with --backpropagation: the other losses "
            f"have no gradient. Received: --loss={FLAGS.loss}"
        )
    if FLAGS.loss == "f1" and FLAGS.dense == "local_reparam":
        raise app.UsageError(
            "Expected --dense=low_rank or --dense=full with --loss=f1, which "
            "has no value for each image. Received: --dense=local_reparam"
        )
    keras.utils.set_random_seed(FLAGS.seed)
    x_train, y_train, x_test, y_test = load_data()
    steps_per_epoch = len(x_train) // FLAGS.batch_size
    if not steps_per_epoch:
        raise app.UsageError(
            f"Expected --batch_size of at most {len(x_train)}, the training "
            f"images. Received: --batch_size={FLAGS.batch_size}"
        )
    model = make_model(FLAGS.epochs * steps_per_epoch)
    curve = Curve(x_test, y_test, math.ceil(steps_per_epoch / 2))
    start = time.perf_counter()
    model.fit(
        make_batches(x_train, y_train),
        epochs=FLAGS.epochs,
        callbacks=[curve],
        shuffle=False,  # the batches are
        verbose=2,
    )
    elapsed = time.perf_counter() - start
    curve.record()
    print(f"test accuracy   {curve.points[-1]['accuracy']:.4f}")
    print(f"training time   {curve.seconds:.1f} s ({elapsed:.1f} with tests)")
    print(f"steps           {curve.steps}")
    print(f"evaluations     {curve.points[-1]['evaluations']:.3g}")
    if not FLAGS.backpropagation:
        stddevs = [float(tf.reduce_mean(s)) for s in model.optimizer.stddevs]
        print("sigma           " + " ".join(f"{s:.3g}" for s in stddevs))
    if FLAGS.plot_path:
        plot(curve.points, pathlib.Path(FLAGS.plot_path))
        print(f"plot            {FLAGS.plot_path}")
    if FLAGS.curve_path:
        path = pathlib.Path(FLAGS.curve_path)
        path.parent.mkdir(parents=True, exist_ok=True)
        settings = {name: FLAGS[name].value for name in FLAGS}
        path.write_text(
            json.dumps({"settings": settings, "points": curve.points}),
            encoding="utf-8",
        )


if __name__ == "__main__":
    app.run(main)
