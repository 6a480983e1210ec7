"""Trains on F1 itself, for imbalanced classes, after the cross-entropy.

F1 of the positive class counts hard decisions, p > 0.5: a step function of the
weights, which says nothing of single examples. Backpropagation has to train on
something else, as a rule the cross-entropy, and to move the threshold of its
decisions afterwards. Here keras_vo goes on from there, on 1 - F1 of the batch.

- make_classification: 16,000 examples of 20 features, 7.8 % of them positive,
  classes that overlap, 2 % of labels drawn anew; 4,000 to train, 2,000 to
  validate. The others test, so that chance plays a small part.
- breast_cancer: 569 patients, 30 features, 37 % malignant (the positive class);
  half to train, a quarter to validate, a quarter (143) to test.

An MLP n-32-1 is trained in each of these ways. Its threshold is tuned on
validation data in the end, for all alike, and the table has F1 at 0.5 too.

- cross-entropy: Adam with weight decay, until the validation loss ceases to
  fall. So is "class-weighted", by weights that make both classes equal.
- F1, full; F1, local_reparam: from the first one's weights, its tuned
  threshold moved into the last bias, on 1 - F1 by the named perturbation.
- cross-entropy, noise: as "F1, full", but on the cross-entropy. What F1 has
  more than this is due to the loss, and not to noise or to longer training.

As measured (benchmarks/results/f1.md), F1 as the loss makes decisions at 0.5
about as good as those of a tuned threshold, but does not beat the cross-entropy
with one.

    python examples/f1.py --data make_classification --seeds 5
"""

import os
import pathlib
import time
from typing import NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf
from absl import app, flags
from sklearn.datasets import load_breast_cancer, make_classification
from sklearn.metrics import f1_score
from sklearn.model_selection import train_test_split

import keras_vo

matplotlib.use("agg")

FLAGS = flags.FLAGS
SIZES = {  # of training and validation; the rest is for the test
    "make_classification": (4000, 2000),
    "breast_cancer": (284, 142),
}
flags.DEFINE_enum("data", "all", [*SIZES, "all"], "Data set.")
flags.DEFINE_integer(
    "seeds", 2, "How many: of split, first weights, batches and noise."
)
flags.DEFINE_integer("epochs", 40, "On F1.")
flags.DEFINE_integer(
    "batch_size", 500, "On F1, which is that of a batch. Few positives: noise."
)
flags.DEFINE_float(
    "learning_rate", 0.005, "On F1; the first one, cosine decay."
)
flags.DEFINE_float("stddev", 0.1, "Sigma on F1.")
flags.DEFINE_float("weight_decay", 0.5, "Of Adam, in all arms.")
flags.DEFINE_integer(
    "most_epochs", 300, "On the cross-entropy, unless it is stopped before."
)
flags.DEFINE_string("plot_dir", "out", "f1.png; empty: none.")

UNITS = 32
RIVAL_RATE, RIVAL_BATCH, PATIENCE = 0.004, 256, 20
RIVALS = ("cross-entropy", "class-weighted")
CONTROL = "cross-entropy, noise"
OURS = ("F1, full", "F1, local_reparam")
ARMS = (*RIVALS, CONTROL, *OURS)


class Part(NamedTuple):
    x: np.ndarray
    y: np.ndarray


class Data(NamedTuple):
    train: Part
    validation: Part
    test: Part


class Result(NamedTuple):
    """What an arm of a seed came to.

    Attributes:
        half: test F1 of p > 0.5.
        tuned: test F1 of p > threshold.
        threshold: of the greatest F1 on validation data.
        seconds: of training, that of the start included.
    """

    half: float
    tuned: float
    threshold: float
    seconds: float


# --- data ---


def raw_data(name):
    """Features, and labels 0 and 1."""
    if name == "breast_cancer":
        x, benign = load_breast_cancer(return_X_y=True)
        return x, 1 - benign
    return make_classification(
        16000,
        20,
        n_informative=6,
        weights=[0.93],
        class_sep=0.8,
        flip_y=0.02,
        random_state=0,
    )


def load(name, seed):
    """Split by the seed; features are standardized by the training part."""
    x, y = raw_data(name)
    train, validation = SIZES[name]
    parts = []
    for size in (train, validation):
        taken, x, y_taken, y = train_test_split(
            x, y, train_size=size, stratify=y, random_state=seed
        )
        parts.append((taken, y_taken))
    mean, std = parts[0][0].mean(0), parts[0][0].std(0)
    return Data(
        *(
            Part(((x - mean) / std).astype("float32"), y.astype("float32"))
            for x, y in (*parts, (x, y))
        )
    )


# --- metric ---


def f1_loss(y_true, y_pred):
    """1 - F1 of the positive class: one number for the batch."""
    said = tf.cast(y_pred > 0.5, tf.float32)
    true = tf.cast(tf.reshape(y_true, tf.shape(y_pred)), tf.float32)
    hits = tf.reduce_sum(true * said)
    total = tf.reduce_sum(true) + tf.reduce_sum(said)
    return 1 - tf.math.divide_no_nan(2 * hits, total)


def best_threshold(labels, probabilities):
    """The middle between two probabilities where F1 is greatest."""
    order = np.argsort(-probabilities)
    p = probabilities[order]
    positives = np.arange(1, len(p) + 1)
    f1 = 2 * np.cumsum(labels[order]) / (positives + labels.sum())
    below = np.append(p[1:], 0)
    best = np.argmax(np.where(p > below, f1, -1))  # equal ones stay together
    return float(p[best] + below[best]) / 2


def predict(model, x):
    return model(x).numpy()[:, 0]


def tuned_threshold(model, data):
    """On validation data."""
    part = data.validation
    return best_threshold(part.y, predict(model, part.x))


def result(model, data, seconds):
    threshold = tuned_threshold(model, data)
    p = predict(model, data.test.x)
    half, tuned = (f1_score(data.test.y, p > t) for t in (0.5, threshold))
    return Result(half, tuned, threshold, seconds)


# --- training ---


def network(data, start=None):
    """An MLP of new weights, or of those of another one."""
    model = keras.Sequential(
        [
            keras.Input(data.train.x.shape[1:]),
            keras.layers.Dense(UNITS, activation="relu"),
            keras.layers.Dense(1, activation="sigmoid"),
        ]
    )
    if start is not None:
        model.set_weights(start.get_weights())
    return model


def by_backpropagation(data, seed, weighted):
    """Cross-entropy, until it ceases to fall on validation data."""
    keras.utils.set_random_seed(seed)
    weight = np.sum(data.train.y == 0) / data.train.y.sum() if weighted else 1.0
    parts = [
        (x, y, np.where(y == 1, weight, 1.0))
        for x, y in (data.train, data.validation)
    ]
    model = network(data)
    model.compile(
        keras.optimizers.AdamW(RIVAL_RATE, FLAGS.weight_decay),
        "binary_crossentropy",
    )
    x, y, weights = parts[0]
    model.fit(
        x,
        y,
        sample_weight=weights,
        batch_size=RIVAL_BATCH,
        epochs=FLAGS.most_epochs,
        validation_data=parts[1],
        validation_batch_size=len(data.validation.y),
        callbacks=[
            keras.callbacks.EarlyStopping(
                patience=PATIENCE, restore_best_weights=True
            )
        ],
        verbose=0,
    )
    return model


def move_threshold(model, threshold):
    """Makes the decisions of `threshold` those of 0.5, by the last bias."""
    *weights, bias = model.get_weights()
    bias = bias - np.log(threshold / (1 - threshold))
    model.set_weights([*weights, bias])


def by_search(start, data, seed, loss, perturbation):
    """A network that goes on from another one's weights."""
    keras.utils.set_random_seed(seed)
    model = keras_vo.make_variational(network(data, start))
    if loss is f1_loss:
        move_threshold(model, tuned_threshold(model, data))
    size = min(FLAGS.batch_size, len(data.train.y))
    steps = FLAGS.epochs * -(-len(data.train.y) // size)
    rate = keras.optimizers.schedules.CosineDecay(FLAGS.learning_rate, steps)
    optimizer = keras_vo.VOOptimizer(
        keras.optimizers.AdamW(rate, FLAGS.weight_decay),
        search_distribution=keras_vo.GaussianSearchDistribution(
            "fixed", FLAGS.stddev
        ),
        perturbation=perturbation,
        seed=seed,
    )
    model.compile(optimizer, loss)
    model.fit(*data.train, batch_size=size, epochs=FLAGS.epochs, verbose=0)
    return model


def trained(arm, start, data, seed):
    """The network of an arm; `start` is that of the first one."""
    if arm in RIVALS:
        return by_backpropagation(data, seed, arm == "class-weighted")
    if arm == CONTROL:
        return by_search(start, data, seed, "binary_crossentropy", "full")
    return by_search(start, data, seed, f1_loss, arm.split(", ")[1])


def run_seed(name, seed):
    """The results of one split, by arm."""
    data = load(name, seed)
    start, results = None, {}
    for arm in ARMS:
        began = time.perf_counter()
        model = trained(arm, start, data, seed)
        seconds = time.perf_counter() - began
        if arm == ARMS[0]:
            start = model
        elif arm not in RIVALS:
            seconds += results[ARMS[0]].seconds
        results[arm] = result(model, data, seconds)
        print(
            f"{name}, seed {seed}: {arm:<20}  test F1 "
            f"{results[arm].tuned:.3f}  {seconds:.1f} s",
            flush=True,
        )
    return results


# --- table and plot ---


def tuned(runs, arm):
    """Test F1 at the tuned threshold, by seed."""
    return np.array([results[arm].tuned for results in runs])


def best_rival(runs):
    """That of the greatest mean on the test data: the hardest to beat."""
    return max(RIVALS, key=lambda arm: tuned(runs, arm).mean())


def difference(values):
    """Mean of paired differences, and its standard error if there is one."""
    if len(values) < 2:
        return f"{values.mean():+.3f}"
    error = values.std(ddof=1) / np.sqrt(len(values))
    return f"{values.mean():+.3f} ({error:.3f})"


def print_table(name, runs):
    rival = best_rival(runs)
    print(
        f"\n{name}: test F1, means of {len(runs)} seeds, then each seed. The "
        f"last column:\nless that of '{rival}', seed by seed, mean and "
        "standard error.\n"
    )
    line = "{:<20}  {:>6}  {:>6}  {:>7}  {:<15}  {}"
    print(line.format("arm", "at 0.5", "tuned", "seconds", "less rival", ""))
    for arm in ARMS:
        values = tuned(runs, arm)
        columns = np.mean([results[arm] for results in runs], axis=0)
        print(
            line.format(
                arm,
                f"{columns[0]:.3f}",
                f"{values.mean():.3f}",
                f"{columns[3]:.1f}",
                difference(values - tuned(runs, rival)),
                " ".join(f"{value:.3f}" for value in values),
            )
        )


def plot(runs_by_name, path):
    """A dot a seed, joined with those of the same seed; a bar the mean."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, row = plt.subplots(
        1,
        len(runs_by_name),
        figsize=(1 + 5.5 * len(runs_by_name), 4.5),
        layout="constrained",
        squeeze=False,
    )
    for axes, (name, runs) in zip(row[0], runs_by_name.items(), strict=True):
        values = np.array([tuned(runs, arm) for arm in ARMS])
        places = np.arange(len(ARMS))
        axes.plot(places, values, "-", color="0.85", lw=1, zorder=1)
        for i, (arm, dots) in enumerate(zip(ARMS, values, strict=True)):
            color = "tab:blue" if arm in OURS else "0.4"
            axes.scatter(np.full(len(dots), i), dots, s=22, color=color)
            axes.hlines(dots.mean(), i - 0.25, i + 0.25, color=color, lw=2.5)
        labels = [arm.replace(", ", ",\n") for arm in ARMS]
        axes.set_xticks(places, labels, fontsize=8)
        axes.set(title=name, ylabel="test F1, tuned threshold")
        axes.grid(alpha=0.3, axis="y")
    figure.savefig(path, dpi=110)
    plt.close(figure)


# --- flags ---


def check(condition, expected, name):
    if not condition:
        value = FLAGS[name].value
        raise app.UsageError(f"Expected {expected}. Received: --{name}={value}")


def check_flags():
    for name in ("seeds", "epochs", "batch_size", "most_epochs"):
        check(FLAGS[name].value >= 1, f"--{name} of 1 or more", name)
    for name in ("learning_rate", "stddev"):
        value = FLAGS[name].value
        good = np.isfinite(value) and value > 0
        check(good, f"a positive, finite --{name}", name)
    good = np.isfinite(FLAGS.weight_decay) and FLAGS.weight_decay >= 0
    check(good, "a finite --weight_decay of 0 or more", "weight_decay")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Expected flags only. Received: {argv[1:]}")
    check_flags()
    tf.get_logger().setLevel("ERROR")  # every network is traced anew
    names = list(SIZES) if FLAGS.data == "all" else [FLAGS.data]
    runs = {
        name: [run_seed(name, seed) for seed in range(FLAGS.seeds)]
        for name in names
    }
    for name in names:
        print_table(name, runs[name])
    if FLAGS.plot_dir:
        path = pathlib.Path(FLAGS.plot_dir) / "f1.png"
        plot(runs, path)
        print(f"\nplot  {path}")


if __name__ == "__main__":
    app.run(main)
