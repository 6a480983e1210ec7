"""Learns to rank by NDCG@10 itself.

The search engine finds images of digits (scikit-learn's, 8 x 8) that look like
a given one. Each image of a part of the data is the query of five lists of 30
other images of that part, drawn at random, its documents. A document's
relevance is 2 if it shows the same digit (some 3 of the 30), 1 if it shows the
look-alike of that digit, the one whose mean image is nearest (another 3), else
0. The scorer sees |query - document|, pixel by pixel, and not what the digits
are: a network 64-8-1 that is applied to each document, too small to get it all
right. Images are split 60/20/20, so that queries and documents of the test are
new.

One example is one query: features [queries, documents, 64], relevance and
scores [queries, documents], and a loss of each query, [queries].

- By backpropagation: RankNet (the logistic loss of all pairs), softmax
  (ListNet's cross-entropy), and LambdaRank (pairs weighted by what swapping
  them would change NDCG@10).
- By keras_vo: 1 - NDCG@10, with its sort, from new weights; and from those that
  the best rival (on validation data) ended with.

All keep the weights of the epoch that is best on validation data. As measured
(benchmarks/results/ranking.md), going on gains a little, and the search from
new weights ends below the rivals.

    python examples/ranking.py --seeds 5
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
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_vo

matplotlib.use("agg")

FLAGS = flags.FLAGS
flags.DEFINE_integer(
    "seeds", 1, "How many: of split, lists, first weights, batches and noise."
)
flags.DEFINE_integer("documents", 30, "In a list; 10 or more.")
flags.DEFINE_integer("units", 8, "Of the scorer's hidden layer.")
flags.DEFINE_integer("rival_epochs", 60, "Of backpropagation.")
flags.DEFINE_integer("epochs", 8, "Of the search.")
flags.DEFINE_float(
    "rival_rate", 0.01, "Learning rate of backpropagation; cosine decay."
)
flags.DEFINE_float(
    "learning_rate",
    None,
    "Of all searches, with cosine decay; by default those of `SETTINGS`.",
)
flags.DEFINE_float("stddev", None, "Sigma, the first one; likewise.")
flags.DEFINE_integer(
    "batch_size", None, "Queries in a mini-batch of all arms; likewise."
)
flags.DEFINE_string("plot_dir", "out", "ranking.png; empty: none.")

TOP = 10
CLASSES = 10
LISTS = 5  # of each query
PERTURBATIONS = ("local_reparam", "full")
RIVALS = ("RankNet", "softmax", "LambdaRank")
FROM_NEW = tuple(f"NDCG, {name}" for name in PERTURBATIONS)
GOING_ON = tuple(f"rival, then NDCG, {name}" for name in PERTURBATIONS)
ARMS = (*RIVALS, *FROM_NEW, *GOING_ON)


class Setting(NamedTuple):
    """Of a search, or of backpropagation."""

    learning_rate: float
    stddev: float | None = None
    batch_size: int = 64


# Chosen on the validation data of seed 0.
SETTINGS = {
    "NDCG, local_reparam": Setting(0.05, 0.1),
    "NDCG, full": Setting(0.02, 0.05),
    "rival, then NDCG, local_reparam": Setting(0.005, 0.05, 256),
    "rival, then NDCG, full": Setting(0.005, 0.05, 256),
}


class Lists(NamedTuple):
    """Queries with their documents.

    Attributes:
        x: features of pairs, [queries, documents, pixels].
        y: relevance 0, 1 or 2, [queries, documents].
    """

    x: np.ndarray
    y: np.ndarray


class Data(NamedTuple):
    train: Lists
    validation: Lists
    test: Lists


class Result(NamedTuple):
    """What an arm of a seed came to.

    Attributes:
        ndcg: mean NDCG@10 on the test lists.
        validation: on the validation lists, which chose the epoch.
        curve: on the validation lists, by epoch.
        seconds: of training; without the rival's, where it goes on from one.
    """

    ndcg: float
    validation: float
    curve: list
    seconds: float


# --- data ---


def look_alikes(images, labels):
    """Of each digit the one with the nearest mean image."""
    means = np.array([images[labels == c].mean(0) for c in range(CLASSES)])
    distances = ((means[:, None] - means) ** 2).sum(-1)
    np.fill_diagonal(distances, np.inf)
    return distances.argmin(1)


def make_lists(images, labels, alike, rng):
    """Of each image, with other images of the same part."""
    queries = np.tile(np.arange(len(images)), LISTS)
    others = [
        rng.permutation(len(images) - 1)[: FLAGS.documents] for _ in queries
    ]
    chosen = np.array(others) + (others >= queries[:, None])
    x = np.abs(images[queries][:, None] - images[chosen])
    same = labels[chosen] == labels[queries][:, None]
    similar = labels[chosen] == alike[labels[queries]][:, None]
    return Lists(x.astype("float32"), (2.0 * same + similar).astype("float32"))


def load(seed):
    """Split by the seed; features are standardized by the training lists."""
    images, labels = load_digits(return_X_y=True)
    images = images / 16
    parts = []
    for share in (0.6, 0.5):
        part, images, part_labels, labels = train_test_split(
            images,
            labels,
            train_size=share,
            stratify=labels,
            random_state=seed,
        )
        parts.append((part, part_labels))
    parts.append((images, labels))
    alike, rng = look_alikes(*parts[0]), np.random.default_rng(seed)
    data = Data(*(make_lists(*part, alike, rng) for part in parts))
    mean = data.train.x.mean((0, 1))
    std = data.train.x.std((0, 1)) + 1e-3
    return Data(
        *(Lists(((x - mean) / std).astype("float32"), y) for x, y in data)
    )


# --- losses, of each query ---


def gains(relevance):
    return 2.0**relevance - 1


def dcg(gains_by_rank):
    """Of gains [queries, ranks]."""
    ranks = tf.range(1, gains_by_rank.shape[-1] + 1, dtype=tf.float32)
    discounts = np.log(2) / tf.math.log(ranks + 1)
    return tf.reduce_sum(gains_by_rank * discounts, -1)


def best_dcg(relevance):
    return dcg(tf.math.top_k(gains(relevance), TOP).values)


def ndcg(relevance, scores):
    """NDCG@10 of each query; 0 where no document is relevant."""
    first = tf.math.top_k(scores, TOP).indices
    found = dcg(tf.gather(gains(relevance), first, batch_dims=1))
    return tf.math.divide_no_nan(found, best_dcg(relevance))


def ndcg_loss(relevance, scores):
    return 1 - ndcg(relevance, scores)


def pairs(relevance, scores):
    """Whether i is more relevant than j, and the logistic loss of that."""
    above = relevance[:, :, None] > relevance[:, None]
    losses = tf.nn.softplus(scores[:, None] - scores[:, :, None])
    return tf.cast(above, scores.dtype), losses


def ranknet(relevance, scores):
    above, losses = pairs(relevance, scores)
    return tf.math.divide_no_nan(
        tf.reduce_sum(above * losses, (1, 2)), tf.reduce_sum(above, (1, 2))
    )


def softmax(relevance, scores):
    """Cross-entropy of the scores' softmax and the share of each gain."""
    gain = gains(relevance)
    total = tf.reduce_sum(gain, -1, keepdims=True)
    shares = tf.math.divide_no_nan(gain, total)
    return -tf.reduce_sum(shares * tf.nn.log_softmax(scores), -1)


def swap_weights(relevance, scores):
    """How much NDCG@10 changes if documents i and j change places."""
    order = tf.argsort(scores, direction="DESCENDING")
    rank = tf.cast(tf.argsort(order), tf.float32)
    discount = tf.where(rank < TOP, np.log(2) / tf.math.log(rank + 2), 0.0)
    gain = gains(relevance)
    change = (gain[:, :, None] - gain[:, None]) * (
        discount[:, :, None] - discount[:, None]
    )
    best = best_dcg(relevance)[:, None, None]
    return tf.math.divide_no_nan(tf.abs(change), best)


def lambdarank(relevance, scores):
    above, losses = pairs(relevance, scores)
    weights = tf.stop_gradient(above * swap_weights(relevance, scores))
    return tf.reduce_sum(weights * losses, (1, 2))


RIVAL_LOSSES = dict(zip(RIVALS, (ranknet, softmax, lambdarank), strict=True))


# --- training ---


def scorer(start=None):
    """Of new weights, or of those of another one."""
    model = keras.Sequential(
        [
            keras.Input((FLAGS.documents, 64)),
            keras.layers.Dense(FLAGS.units, activation="relu"),
            keras.layers.Dense(1),
            keras.layers.Reshape((FLAGS.documents,)),
        ]
    )
    if start is not None:
        model.set_weights(start.get_weights())
    return model


def mean_ndcg(model, lists):
    return float(tf.reduce_mean(ndcg(lists.y, model(lists.x))))


class Best(keras.callbacks.Callback):
    """Notes NDCG@10 after each epoch and sets the best weights in the end."""

    def __init__(self, lists):
        super().__init__()
        self.lists, self.curve = lists, []

    def on_train_begin(self, logs=None):
        self._note()

    def on_epoch_end(self, epoch, logs=None):
        self._note()

    def on_train_end(self, logs=None):
        self.model.set_weights(self.weights)

    def _note(self):
        value = mean_ndcg(self.model, self.lists)
        if value > max(self.curve, default=-1):
            self.weights = self.model.get_weights()
        self.curve.append(value)


def setting(arm):
    """That of the flags, where they are given."""
    chosen = SETTINGS.get(arm, Setting(FLAGS.rival_rate))
    names = Setting._fields if arm not in RIVALS else ("batch_size",)
    given = {name: FLAGS[name].value for name in names}
    return chosen._replace(**{k: v for k, v in given.items() if v is not None})


def epochs(arm):
    return FLAGS.rival_epochs if arm in RIVALS else FLAGS.epochs


def make_optimizer(arm, queries, seed):
    """Adam, or a search whose mean is moved by it; cosine decay of its rate."""
    rate, stddev, batch_size = setting(arm)
    steps = epochs(arm) * -(-queries // batch_size)
    adam = keras.optimizers.Adam(
        keras.optimizers.schedules.CosineDecay(rate, steps)
    )
    if arm in RIVALS:
        return adam
    return keras_vo.VOOptimizer(
        adam,
        search_distribution=keras_vo.GaussianSearchDistribution(stddev=stddev),
        perturbation=arm.split(", ")[-1],
        seed=seed,
    )


def train(arm, data, seed, start=None):
    """The scorer of an arm, and its result."""
    keras.utils.set_random_seed(seed)
    model, best = scorer(start), Best(data.validation)
    if arm not in RIVALS:
        model = keras_vo.make_variational(model)
    loss = RIVAL_LOSSES.get(arm, ndcg_loss)
    model.compile(make_optimizer(arm, len(data.train.y), seed), loss)
    began = time.perf_counter()
    model.fit(
        *data.train,
        batch_size=setting(arm).batch_size,
        epochs=epochs(arm),
        callbacks=[best],
        verbose=0,
    )
    seconds = time.perf_counter() - began
    test = mean_ndcg(model, data.test)
    return model, Result(test, max(best.curve), best.curve, seconds)


def start_of(results):
    """The rival that is best on validation data: where searches go on."""
    return max(RIVALS, key=lambda arm: results[arm].validation)


def run_seed(seed):
    """The results of one split, by arm."""
    data = load(seed)
    models, results, start = {}, {}, None
    for arm in ARMS:
        if arm in GOING_ON:
            start = models[start_of(results)]
        models[arm], results[arm] = train(arm, data, seed, start)
        print(
            f"seed {seed}: {arm:<31}  test NDCG@10 {results[arm].ndcg:.3f}  "
            f"{results[arm].seconds:.1f} s",
            flush=True,
        )
    return results


# --- table and plot ---


def by_seed(runs, arm):
    """Test NDCG@10."""
    return np.array([results[arm].ndcg for results in runs])


def best_rival(runs):
    """That of the greatest mean on the test data: the hardest to beat."""
    return max(RIVALS, key=lambda arm: by_seed(runs, arm).mean())


def difference(values):
    """Mean of paired differences, and its standard error if there is one."""
    if len(values) < 2:
        return f"{values.mean():+.4f}"
    error = values.std(ddof=1) / np.sqrt(len(values))
    return f"{values.mean():+.4f} ({error:.4f})"


def row(arm, runs):
    """Of the table."""
    values, start = by_seed(runs, arm), "-"
    if arm in GOING_ON:
        starts = [results[start_of(results)].ndcg for results in runs]
        start = difference(values - starts)
    seconds = np.mean([results[arm].seconds for results in runs])
    return (
        arm,
        f"{values.mean():.4f}",
        difference(values - by_seed(runs, best_rival(runs))),
        start,
        f"{seconds:.1f}",
        " ".join(f"{value:.4f}" for value in values),
    )


def print_table(runs):
    print(
        f"\nTest NDCG@10, mean of {len(runs)} seeds, then each seed; "
        f"differences to '{best_rival(runs)}'\nand to the rival a search "
        "went on from, seed by seed, their mean and standard\nerror; seconds "
        "of its own training.\n"
    )
    line = "{:<31}  {:>6}  {:<16}  {:<16}  {:>7}  {}"
    print(line.format("arm", "mean", "less rival", "less start", "seconds", ""))
    for arm in ARMS:
        print(line.format(*row(arm, runs)))


def color_of(arm):
    if arm in RIVALS:
        return "0.4"
    return "tab:blue" if arm in FROM_NEW else "tab:green"


def plot_seeds(axes, runs):
    """A dot a seed, joined with those of the same seed; a bar the mean."""
    values = np.array([by_seed(runs, arm) for arm in ARMS])
    axes.plot(values, np.arange(len(ARMS)), "-", color="0.88", lw=1, zorder=1)
    for i, (arm, dots) in enumerate(zip(ARMS, values, strict=True)):
        color = color_of(arm)
        axes.scatter(dots, np.full(len(dots), i), s=22, color=color)
        axes.vlines(dots.mean(), i - 0.3, i + 0.3, color=color, lw=2.5)
    axes.set_yticks(np.arange(len(ARMS)), ARMS)
    axes.invert_yaxis()
    axes.set(xlabel="test NDCG@10", title="A dot a seed, a bar their mean")
    axes.grid(alpha=0.3, axis="x")


def plot_curves(axes, results):
    """Validation over seconds, of the first seed."""
    styles = dict(
        zip(ARMS, ("-", "--", ":", "-", "--", "-", "--"), strict=True)
    )
    for arm in ARMS:
        curve = results[arm].curve
        seconds = np.linspace(0, results[arm].seconds, len(curve))
        axes.plot(
            seconds,
            curve,
            styles[arm],
            color=color_of(arm),
            lw=1.3,
            label=arm,
        )
    axes.set(
        xlabel="seconds, that of the first step too",
        ylabel="validation NDCG@10",
        title="Seed 0, without its first steps",
    )
    low = min(results[arm].curve[-1] for arm in ARMS)
    high = max(results[arm].validation for arm in ARMS)
    axes.set_ylim(2 * low - high - 0.01, high + 0.01)
    axes.legend(fontsize=8, loc="lower right")
    axes.grid(alpha=0.3)


def plot(runs, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 4.5), layout="constrained"
    )
    plot_seeds(left, runs)
    plot_curves(right, runs[0])
    figure.savefig(path, dpi=110)
    plt.close(figure)


# --- flags ---


def check(condition, expected, name):
    if not condition:
        value = FLAGS[name].value
        raise app.UsageError(f"Expected {expected}. Received: --{name}={value}")


def check_flags():
    for name in ("seeds", "units", "batch_size", "rival_epochs", "epochs"):
        value = FLAGS[name].value
        check(value is None or value >= 1, f"--{name} of 1 or more", name)
    good = TOP <= FLAGS.documents <= 300  # of 359 images
    check(good, f"--documents in [{TOP}, 300]", "documents")
    for name in ("rival_rate", "learning_rate", "stddev"):
        value = FLAGS[name].value
        good = value is None or (np.isfinite(value) and value > 0)
        check(good, f"a positive, finite --{name}", name)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Expected flags only. Received: {argv[1:]}")
    check_flags()
    tf.get_logger().setLevel("ERROR")  # every network is traced anew
    runs = [run_seed(seed) for seed in range(FLAGS.seeds)]
    print_table(runs)
    if FLAGS.plot_dir:
        path = pathlib.Path(FLAGS.plot_dir) / "ranking.png"
        plot(runs, path)
        print(f"\nplot  {path}")


if __name__ == "__main__":
    app.run(main)
