"""The MNIST arms of the author of variational optimization, run again.

The network, population and mini-batches of Havtorn, "Variational Optimization
of Neural Networks", 2018: two convolutions and two dense layers, 22,000
weights, N = 100, |B| = 1000, a fixed sigma of .05, SGD with momentum .9, L2 of
1e-3, log-rank utilities, 250 generations. Each arm changes one thing of the
first. Prints a line for each evaluation on the 10,000 test images, then a table
of the test accuracy beside the author's, which are means of 30 seeds.

    python benchmarks/thesis_mnist.py --data_path PATH/mnist.npz

The author's learning rate of .05 belongs to utilities that are 1/N of these and
to a gradient with 1/N once more, which is not the natural one. In the scaling
of VOOptimizer it is .05 / (N sigma^2) = .2. All arms have that rate, so that
steps without momentum add up to a tenth of the way, as the author's did.

The author's .949 also rescaled the noise by sensitivities, as the arm "sum"
does (.921 without). Weights decay by the learning rate times L2 a step, apart
from the momentum.
"""

import json
import os
import pathlib
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

import keras_vo

FLAGS = flags.FLAGS

# name: (what it changes, test accuracy of the author's at generation 250)
ARMS = {
    "antithetic": ({}, 0.949),
    "iid": ({"antithetic": False}, 0.930),
    "momentum 0": ({"momentum": 0.0}, 0.852),
    "no batch norm": ({"batch_norm": False}, 0.910),
    "sum": ({"sensitivity": "sum"}, 0.949),
    "abs": ({"sensitivity": "abs"}, None),
    "inputs": ({"sensitivity": "inputs"}, None),
    "mixed": ({"antithetic": False, "importance_mixing": 0.0}, None),
    "adapting": ({"adaptation_sampling": True}, None),
    "rate times .1": ({"factor": 0.1}, None),
    "rate times .1 adapting": (
        {"factor": 0.1, "adaptation_sampling": True},
        None,
    ),
    "rate times 10": ({"factor": 10.0}, None),
    "rate times 10 adapting": (
        {"factor": 10.0, "adaptation_sampling": True},
        None,
    ),
}


def define_flags():
    """Apart from import: other benchmarks use the functions below."""
    flags.DEFINE_string("data_path", None, "mnist.npz; none: downloads it.")
    flags.DEFINE_list("arms", list(ARMS), "Names of arms.")
    flags.DEFINE_integer("generations", 250, "Steps of each arm.")
    flags.DEFINE_integer("every", 25, "Steps from one evaluation to the next.")
    flags.DEFINE_integer("batch_size", 1000, "Images in a mini-batch.")
    flags.DEFINE_integer("population_size", 100, "Members a step.")
    flags.DEFINE_float("stddev", 0.05, "Sigma, fixed.")
    flags.DEFINE_enum("optimizer", "sgd", ["sgd", "adam"], "Moves the mean.")
    flags.DEFINE_float("learning_rate", 0.2, "Of the optimizer.")
    flags.DEFINE_bool("cosine", False, "Learning rate falls to 0 by a cosine.")
    flags.DEFINE_float("momentum", 0.9, "Of SGD.")
    flags.DEFINE_float("l2", 1e-3, "Weight decay, times the learning rate.")
    flags.DEFINE_enum(
        "fitness_shaping",
        "nes",
        ["identity", "standardize", "centered_rank", "nes"],
        "How losses become utilities.",
    )
    flags.DEFINE_bool("jit_compile", False, "Compile the evaluation by XLA.")
    flags.DEFINE_integer("seed", 0, "Seed of initial weights, batches, noise.")
    flags.DEFINE_string("log_path", None, "File to append the lines to.")


def load(path=None):
    """Standardized images [n, 28, 28, 1] and labels: train, then test."""
    if path:
        with np.load(path) as data:
            names = ("x_train", "y_train", "x_test", "y_test")
            x_train, y_train, x_test, y_test = (data[name] for name in names)
    else:
        (x_train, y_train), (x_test, y_test) = keras.datasets.mnist.load_data()
    x_train, x_test = (
        ((x.astype("float32") / 255.0 - 0.1307) / 0.3081)[..., None]
        for x in (x_train, x_test)
    )
    return x_train, y_train.astype("int32"), x_test, y_test.astype("int32")


def make_network(batch_norm=True):
    """The author's network, of logits, to be compiled with a VOOptimizer."""
    layers = keras.layers

    def normalized():
        return [layers.BatchNormalization(momentum=0.9)] if batch_norm else []

    def convolution(filters):
        return [
            layers.Conv2D(filters, 5, kernel_initializer="glorot_normal"),
            *normalized(),
            layers.MaxPool2D(2),
            layers.ReLU(),
        ]

    return keras_vo.VOSequential(
        [
            keras.Input((28, 28, 1)),
            *convolution(10),
            *convolution(20),
            layers.Flatten(),
            layers.Dense(50, kernel_initializer="glorot_normal"),
            *normalized(),
            layers.ReLU(),
            layers.Dense(10, kernel_initializer="glorot_normal"),
        ]
    )


def make_optimizer(antithetic, momentum, sensitivity, factor=1.0, **more):
    rate = factor * FLAGS.learning_rate
    if FLAGS.cosine:
        schedules = keras.optimizers.schedules
        rate = schedules.CosineDecay(rate, FLAGS.generations)
    if FLAGS.optimizer == "adam":
        inner = keras.optimizers.Adam(rate, weight_decay=FLAGS.l2)
    else:
        inner = keras.optimizers.SGD(rate, momentum, weight_decay=FLAGS.l2)
    return keras_vo.VOOptimizer(
        inner,
        FLAGS.population_size,
        keras_vo.GaussianSearchDistribution("fixed", stddev=FLAGS.stddev),
        antithetic=antithetic,
        fitness_shaping=FLAGS.fitness_shaping,
        sensitivity=sensitivity,
        seed=FLAGS.seed,
        **more,
    )


class Log(keras.callbacks.Callback):
    """A line for each evaluation; the time for testing does not count."""

    def __init__(self, arm, x_test, y_test, monitor):
        super().__init__()
        self.arm = arm
        self.monitor = monitor
        self.test = x_test, y_test
        self.points = []
        self.seconds = 0.0

    def on_train_begin(self, logs=None):
        self.started = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds += time.perf_counter() - self.started
        logits = self.model.predict(self.test[0], batch_size=1000, verbose=0)
        point = {
            "arm": self.arm,
            "generation": (epoch + 1) * FLAGS.every,
            "evaluations": self.monitor.history["evaluations"][-1],
            "kl": round(self.monitor.history["kl"][-1], 2),
            "accuracy": float(np.mean(logits.argmax(-1) == self.test[1])),
            "population_loss": round(float(logs["population_loss"]), 4),
            "seconds": round(self.seconds, 1),
        }
        self.points.append(point)
        print(json.dumps(point), flush=True)
        if FLAGS.log_path:
            with open(FLAGS.log_path, "a", encoding="utf-8") as file:
                file.write(json.dumps(point) + "\n")
        self.started = time.perf_counter()


def run(arm, data):
    """What an arm's evaluations found."""
    changes = {"antithetic": True, "momentum": FLAGS.momentum}
    changes |= {"batch_norm": True, "sensitivity": None} | ARMS[arm][0]
    keras.backend.clear_session()
    keras.utils.set_random_seed(FLAGS.seed)
    model = make_network(changes.pop("batch_norm"))
    model.compile(
        optimizer=make_optimizer(**changes),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=FLAGS.jit_compile,
    )
    x_train, y_train, x_test, y_test = data
    batches = tf.data.Dataset.from_tensor_slices((x_train, y_train))
    batches = batches.shuffle(len(x_train), seed=FLAGS.seed).repeat()
    monitor = keras_vo.callbacks.SearchMonitor()
    log = Log(arm, x_test, y_test, monitor)
    model.fit(
        batches.batch(FLAGS.batch_size).prefetch(2),
        epochs=FLAGS.generations // FLAGS.every,
        steps_per_epoch=FLAGS.every,
        callbacks=[monitor, log],
        shuffle=False,  # the batches are
        verbose=0,
    )
    return log.points


def print_table(results):
    shown = sorted({25, 50, 100, FLAGS.generations})
    heads = ["arm", *map(str, shown), "the author's at 250", "seconds"]
    print("| " + " | ".join(heads) + " |")
    print("|---" * len(heads) + "|")
    for arm, points in results.items():
        at = {point["generation"]: point["accuracy"] for point in points}
        cells = [f"{at[g]:.4f}" if g in at else "-" for g in shown]
        author = ARMS[arm][1]
        cells += ["" if author is None else f"{author:.3f}"]
        cells += [f"{points[-1]['seconds']:.0f}"]
        print("| " + " | ".join([arm, *cells]) + " |", flush=True)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Expected flags only. Received: {argv[1:]}")
    unknown = [arm for arm in FLAGS.arms if arm not in ARMS]
    if unknown:
        raise app.UsageError(
            f"Expected --arms of {list(ARMS)}. Received: {unknown}"
        )
    if FLAGS.log_path:
        pathlib.Path(FLAGS.log_path).parent.mkdir(parents=True, exist_ok=True)
    data = load(FLAGS.data_path)
    print_table({arm: run(arm, data) for arm in FLAGS.arms})


if __name__ == "__main__":
    define_flags()
    app.run(main)
