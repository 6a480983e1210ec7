"""A model of characters: credit by position, by example, and rivals.

The text is that of the docstrings of Python's own standard library, the
network two transformer blocks over 64 characters, the loss the negative
log-likelihood of each next character. Every arm has the same seconds of
training, after its first step; validation does not count. Arms:

    position    noise on activations, credit by position
    example     noise on activations, credit by example
    low_rank    noise of rank 1 on weights
    full        noise on each weight
    adam        backpropagation

Curves are kept in --folder; those that are there are not run again.

    python benchmarks/char_model.py
"""

import ast
import json
import math
import os
import pathlib
import sysconfig
import time
import zlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from absl import app, flags
from keras import layers, ops

import keras_vo

matplotlib.use("agg")

FLAGS = flags.FLAGS
flags.DEFINE_list(
    "arms", ["position", "example", "low_rank", "full", "adam"], "Of ARMS."
)
flags.DEFINE_list("seeds", ["0"], "Of weights, batches and noise.")
flags.DEFINE_float("seconds", 200.0, "Of training, after the first step.")
flags.DEFINE_integer("points", 12, "Of each curve, evenly over the seconds.")
flags.DEFINE_integer("width", 64, "Of the transformer.")
flags.DEFINE_integer("blocks", 2, "Of the transformer.")
flags.DEFINE_integer("batch_size", 16, "Windows a step.")
flags.DEFINE_float("discount", 0.0, "position_discount.")
flags.DEFINE_float("learning_rate", None, "If not the arm's own.")
flags.DEFINE_bool("decay", False, "The rate falls to 1% along a cosine.")
flags.DEFINE_float("stddev", None, "If not the arm's own.")
flags.DEFINE_string("folder", "out/char_model", "Curves; those there are kept.")
flags.DEFINE_string("plot_path", "benchmarks/char_model.png", "Empty: none.")

CONTEXT = 64
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
ARMS = {  # of VOOptimizer
    "position": {"perturbation": "local_reparam", "credit": "position"},
    "example": {"perturbation": "local_reparam"},
    "low_rank": {"perturbation": "low_rank"},
    "full": {},
    "adam": None,
}
# First sigma and Adam's rate; see benchmarks/results/char_model.md.
SETTINGS = {
    "position": (0.01, 0.003),
    "example": (0.01, 0.003),
    "low_rank": (0.02, 0.01),
    "full": (0.02, 0.01),
    "adam": (None, 0.001),
}
LABELS = {
    "position": "noise on activations, credit by position",
    "example": "noise on activations, credit by example",
    "low_rank": "low-rank noise on weights",
    "full": "noise on weights",
    "adam": "backpropagation (Adam)",
}


def docstrings():
    """Training and validation text; a tenth of the files is for validation."""
    texts = {False: [], True: []}
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.glob("**/*.py")):
        name = path.relative_to(library)
        if {"site-packages", "test", "tests", "idlelib"} & set(name.parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        nodes = (ast.Module, ast.ClassDef, ast.FunctionDef)
        for node in ast.walk(tree):
            if isinstance(node, nodes) and (text := ast.get_docstring(node)):
                held_out = zlib.crc32(str(name).encode()) % 10 == 0
                texts[held_out].append(text + "\n\n")
    return "".join(texts[False]), "".join(texts[True])


def encoded(text):
    codes = {c: i for i, c in enumerate(CHARACTERS)}
    return np.array([codes[c] for c in text if c in codes], "int32")


def windows(codes, starts):
    """Characters, and those that follow each, [n, CONTEXT]."""
    rows = codes[starts[:, None] + np.arange(CONTEXT + 1)]
    return rows[:, :-1], rows[:, 1:]


class Batches(keras.utils.PyDataset):
    """Random windows, the same for all arms of a seed."""

    def __init__(self, codes, seed):
        super().__init__()
        self._codes, self._seed = codes, seed

    def __len__(self):
        return 1_000_000

    def __getitem__(self, index):
        rng = np.random.default_rng([self._seed, index])
        last = len(self._codes) - CONTEXT - 1
        return windows(self._codes, rng.integers(0, last, FLAGS.batch_size))


def network():
    """Characters [n, CONTEXT] to logits [n, CONTEXT, characters]."""
    inputs = keras.Input((CONTEXT,), dtype="int32")
    width = FLAGS.width
    # Of each example, as a layer with noise on activations has to be called.
    places = ops.cumsum(ops.ones_like(inputs), axis=1) - 1
    hidden = layers.Embedding(len(CHARACTERS), width)(inputs)
    hidden = hidden + layers.Embedding(CONTEXT, width)(places)
    for _ in range(FLAGS.blocks):
        normalized = layers.LayerNormalization()(hidden)
        attention = layers.MultiHeadAttention(4, width // 4)
        hidden = hidden + attention(
            normalized, normalized, use_causal_mask=True
        )
        normalized = layers.LayerNormalization()(hidden)
        wide = layers.Dense(4 * width, activation="relu")(normalized)
        hidden = hidden + layers.Dense(width)(wide)
    hidden = layers.LayerNormalization()(hidden)
    return keras.Model(inputs, layers.Dense(len(CHARACTERS))(hidden))


def optimizer(arm, seed):
    stddev, rate = SETTINGS[arm]
    stddev = stddev if FLAGS.stddev is None else FLAGS.stddev
    adam = keras.optimizers.Adam(FLAGS.learning_rate or rate)
    if ARMS[arm] is None:
        return adam
    settings = dict(ARMS[arm])
    if arm == "position":
        settings["position_discount"] = FLAGS.discount
    return keras_vo.VOOptimizer(
        adam,
        search_distribution=keras_vo.GaussianSearchDistribution(stddev=stddev),
        seed=seed,
        **settings,
    )


class Curve(keras.callbacks.Callback):
    """Validation loss over seconds of training; ends it in time."""

    def __init__(self, data):
        super().__init__()
        self.data = data
        self.start, self.steps, self.rows = None, 0, []

    def on_train_begin(self, logs=None):
        optimizer = self.model.optimizer
        self.inner = getattr(optimizer, "inner_optimizer", optimizer)
        self.rate = float(self.inner.learning_rate)

    def on_train_batch_end(self, batch, logs=None):
        now = time.perf_counter()
        self.steps += 1
        self.start = self.start or now
        seconds = now - self.start
        if FLAGS.decay:
            part = min(seconds / FLAGS.seconds, 1.0)
            share = 0.01 + 0.99 * (1 + math.cos(math.pi * part)) / 2
            self.inner.learning_rate = self.rate * share
        if seconds < FLAGS.seconds * len(self.rows) / FLAGS.points:
            return
        loss = float(np.mean(self._losses()))
        self.rows.append([seconds, self.steps, loss])
        print(f"  {seconds:5.0f} s, step {self.steps}: {loss:.3f}", flush=True)
        self.start += time.perf_counter() - now
        if seconds >= FLAGS.seconds:
            self.model.stop_training = True

    def _losses(self):
        x, y = self.data
        logits = ops.convert_to_tensor(self.model.predict_on_batch(x))
        return keras.losses.sparse_categorical_crossentropy(
            y, logits, from_logits=True
        )


def run(arm, seed, train, valid):
    """The curve of one arm: rows of seconds, steps and validation loss."""
    keras.utils.set_random_seed(seed)
    model = network()
    if ARMS[arm] is not None:
        model = keras_vo.make_variational(model)
    model.compile(
        optimizer=optimizer(arm, seed),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    starts = np.arange(0, len(valid) - CONTEXT - 1, CONTEXT)
    some = np.random.default_rng(0).choice(starts, 512, replace=False)
    curve = Curve(windows(valid, some))
    model.fit(Batches(train, seed), epochs=1, verbose=0, callbacks=[curve])
    return curve.rows


def plot(curves, unigram):
    """Loss over seconds, an arm a colour, a seed a line."""
    figure, axes = plt.subplots(figsize=(8, 5))
    for number, arm in enumerate(ARMS):
        for name, rows in curves.items():
            if name.rsplit("-", 1)[0] != arm:
                continue
            seconds, _, losses = np.transpose(rows)
            first = name.rsplit("-", 1)[1] == FLAGS.seeds[0]
            axes.plot(
                seconds,
                losses,
                color=f"C{number}",
                label=LABELS[arm] if first else None,
            )
    axes.axhline(unigram, color="gray", lw=1, ls=":", label="character counts")
    axes.set(
        xlabel="seconds of training",
        ylabel="validation loss, nats per character",
        title="Two transformer blocks on docstrings",
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(FLAGS.plot_path, dpi=120, bbox_inches="tight")


def counted(train, valid):
    """The loss of the characters' counts, in nats."""
    counts = np.bincount(train, minlength=len(CHARACTERS)) + 1
    return float(-np.log(counts / counts.sum())[valid].mean())


def main(_):
    if unknown := set(FLAGS.arms) - set(ARMS):
        raise ValueError(
            f"Expected --arms of {list(ARMS)}. Received: {sorted(unknown)}"
        )
    train, valid = map(encoded, docstrings())
    unigram = counted(train, valid)
    print(f"{len(train)} characters, {len(valid)} of validation data")
    folder = pathlib.Path(FLAGS.folder)
    folder.mkdir(parents=True, exist_ok=True)
    curves = {}
    for arm in FLAGS.arms:
        for seed in FLAGS.seeds:
            path = folder / f"{arm}-{seed}.json"
            if not path.exists():
                print(f"{arm}, seed {seed}")
                rows = run(arm, int(seed), train, valid)
                path.write_text(json.dumps(rows))
            curves[f"{arm}-{seed}"] = json.loads(path.read_text())
    print("| arm | seed | steps | validation loss, nats |\n|---|---|---|---|")
    print(f"| character counts | | | {unigram:.3f} |")
    for name, rows in curves.items():
        arm, seed = name.rsplit("-", 1)
        print(f"| {arm} | {seed} | {rows[-1][1]} | {rows[-1][2]:.3f} |")
    if FLAGS.plot_path:
        plot(curves, unigram)


if __name__ == "__main__":
    app.run(main)
