"""Trains a classifier on handwritten digits without derivatives.

The data are the 1797 digits of 8 x 8 pixels that come with scikit-learn, split
80/20; the network is an MLP 64-64-10; the loss is the negative log-likelihood
or, without a surrogate, the 0-1 error itself.

    python examples/digits.py --loss zero_one
"""

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
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_vo

matplotlib.use("agg")

FLAGS = flags.FLAGS
_DEFAULTS = keras_vo.VOOptimizer()
_DISTRIBUTION = _DEFAULTS.search_distribution

flags.DEFINE_enum("loss", "nll", ["nll", "zero_one"], "Loss to minimise.")
flags.DEFINE_integer(
    "epochs", None, "Passes over the images; by default 100 (nll) or 200."
)
flags.DEFINE_integer(
    "batch_size",
    None,
    "Images in a mini-batch; by default 64 (nll) or 128: with few images the "
    "0-1 error of most members is the same.",
)
flags.DEFINE_integer("seed", 0, "Seed of initial weights, batches and noise.")
flags.DEFINE_string("inner_optimizer", "adam", "Keras optimizer of the mean.")
flags.DEFINE_float(
    "learning_rate",
    float(_DEFAULTS.learning_rate),
    "Of the inner optimizer; the first one, with a schedule.",
)
flags.DEFINE_enum(
    "schedule", "cosine", ["constant", "cosine"], "Learning rate schedule."
)
flags.DEFINE_integer(
    "population_size", _DEFAULTS.population_size, "Members a step."
)
flags.DEFINE_enum(
    "variance",
    _DISTRIBUTION.variance,
    ["fixed", "isotropic", "layerwise", "separable"],
    "Which weights share a variance.",
)
flags.DEFINE_string("stddev", "auto", 'Initial sigma: a number or "auto".')
flags.DEFINE_float(
    "variance_learning_rate",
    _DISTRIBUTION.learning_rate,
    "Of log sigma^2.",
)
flags.DEFINE_float("min_stddev", _DISTRIBUTION.min_stddev, "Least sigma.")
flags.DEFINE_float("max_stddev", _DISTRIBUTION.max_stddev, "Greatest sigma.")
flags.DEFINE_bool("natural_gradient", True, "Precondition by the Fisher.")
flags.DEFINE_bool("antithetic", True, "Mirror every perturbation.")
flags.DEFINE_enum(
    "fitness_shaping",
    _DEFAULTS.fitness_shaping,
    ["identity", "standardize", "centered_rank", "nes"],
    "How losses become utilities.",
)
flags.DEFINE_float("max_kl", None, "Bound on the KL divergence of a step.")
flags.DEFINE_string("export_dir", "out/digits", "SavedModel; empty: none.")
flags.DEFINE_string("plot_dir", "out", "learning_curve.png; empty: none.")


@keras.saving.register_keras_serializable(package="keras_vo_examples")
def zero_one_error(y_true, y_pred):
    """1 for every image whose most probable class is wrong, else 0."""
    wrong = tf.not_equal(
        tf.argmax(y_pred, axis=-1), tf.cast(tf.squeeze(y_true, -1), tf.int64)
    )
    return tf.cast(wrong, tf.float32)


def load_data():
    """Training and test images [n, 64] in [0, 1] and labels [n, 1]."""
    images, labels = load_digits(return_X_y=True)
    return train_test_split(
        images.astype("float32") / 16.0,
        labels.reshape(-1, 1),
        test_size=0.2,
        stratify=labels,
        random_state=0,
    )


def _number_or_auto(text):
    """A number that a flag gives, or the word "auto"."""
    try:
        return float(text)
    except ValueError:
        return text  # anything else is refused by the search distribution


def make_optimizer(steps):
    """The optimizer that the flags describe, for a run of `steps` steps."""
    rate = FLAGS.learning_rate
    if FLAGS.schedule == "cosine":
        rate = keras.optimizers.schedules.CosineDecay(rate, steps)
    inner = keras.optimizers.get(
        {
            "class_name": FLAGS.inner_optimizer,
            "config": {"learning_rate": rate},
        }
    )
    return keras_vo.VOOptimizer(
        inner,
        FLAGS.population_size,
        keras_vo.GaussianSearchDistribution(
            FLAGS.variance,
            stddev=_number_or_auto(FLAGS.stddev),
            learning_rate=FLAGS.variance_learning_rate,
            min_stddev=FLAGS.min_stddev,
            max_stddev=FLAGS.max_stddev,
        ),
        natural_gradient=FLAGS.natural_gradient,
        antithetic=FLAGS.antithetic,
        fitness_shaping=FLAGS.fitness_shaping,
        max_kl=FLAGS.max_kl,
        seed=FLAGS.seed,
    )


def make_model(steps):
    """The compiled MLP 64-64-10."""
    model = keras_vo.VOSequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(10, activation="softmax"),
        ],
        name="digits",
    )
    loss = {
        "nll": keras.losses.SparseCategoricalCrossentropy(),
        "zero_one": zero_one_error,
    }[FLAGS.loss]
    model.compile(
        optimizer=make_optimizer(steps), loss=loss, metrics=["accuracy"]
    )
    return model


def plot(history, path):
    """Loss of the network and its population, and accuracy, by epoch."""
    path.parent.mkdir(parents=True, exist_ok=True)
    epochs = np.arange(1, len(history["loss"]) + 1)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for key, label, color in (
        ("population_loss", "population (training)", "tab:gray"),
        ("loss", "network (training)", "tab:blue"),
        ("val_loss", "network (test)", "tab:orange"),
    ):
        left.plot(epochs, history[key], label=label, color=color, lw=1.2)
    left.set(
        title="Loss that is minimised",
        xlabel="epoch",
        ylabel={"nll": "negative log-likelihood", "zero_one": "0-1 error"}[
            FLAGS.loss
        ],
        yscale="log",
    )
    for key, label, color in (
        ("accuracy", "training", "tab:blue"),
        ("val_accuracy", "test", "tab:orange"),
    ):
        error = 1.0 - np.asarray(history[key])
        right.plot(epochs, 100 * error, label=label, color=color, lw=1.2)
    right.set(
        title=f"Test accuracy {history['val_accuracy'][-1]:.3f}",
        xlabel="epoch",
        ylabel="misclassified, %",
        yscale="log",
    )
    right.yaxis.set_major_formatter("{x:g}")
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.grid(alpha=0.3, which="both")
    figure.suptitle(
        f"Digits, MLP 64-64-10, {FLAGS.population_size} members a step, "
        "no derivatives"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def print_table(rows):
    width = max(len(name) for name, _ in rows)
    print("\n" + "-" * (width + 22))
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    print("-" * (width + 22))


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Expected flags only. Received: {argv[1:]}")
    logging.set_verbosity(logging.WARNING)
    epochs = FLAGS.epochs or {"nll": 100, "zero_one": 200}[FLAGS.loss]
    batch_size = FLAGS.batch_size or {"nll": 64, "zero_one": 128}[FLAGS.loss]
    keras.utils.set_random_seed(FLAGS.seed)
    x_train, x_test, y_train, y_test = load_data()
    steps_per_epoch = math.ceil(len(x_train) / batch_size)
    model = make_model(epochs * steps_per_epoch)
    start = time.perf_counter()
    history = model.fit(
        x_train,
        y_train,
        batch_size=batch_size,
        epochs=epochs,
        validation_data=(x_test, y_test),
        validation_batch_size=len(x_test),
    ).history
    elapsed = time.perf_counter() - start

    generations = int(model.optimizer.generations)
    stddevs = [float(tf.reduce_mean(s)) for s in model.optimizer.stddevs]
    rows = [
        ("test accuracy", f"{history['val_accuracy'][-1]:.4f}"),
        ("test loss", f"{history['val_loss'][-1]:.4f} ({FLAGS.loss})"),
        ("training accuracy", f"{history['accuracy'][-1]:.4f}"),
        ("training time", f"{elapsed:.1f} s"),
        ("generations", f"{generations}"),
        ("evaluations", f"{generations * FLAGS.population_size}"),
        ("sigma, by weight tensor", " ".join(f"{s:.3g}" for s in stddevs)),
    ]
    if FLAGS.plot_dir:
        path = pathlib.Path(FLAGS.plot_dir) / "learning_curve.png"
        plot(history, path)
        rows.append(("learning curve", str(path)))
    if FLAGS.export_dir:
        model.export(FLAGS.export_dir, verbose=False)
        rows.append(("SavedModel", FLAGS.export_dir))
    print_table(rows)


if __name__ == "__main__":
    app.run(main)
