"""Trains a network of ternary weights, with and without derivatives.

Each kernel is rounded in the forward pass to {-s, 0, s}. No derivative says
which of the three a weight should be: that of rounding is zero. So
backpropagation needs a straight-through estimator, which pretends that rounding
is the identity. VOOptimizer needs nothing of the kind: it perturbs the weights
before they are rounded, and compares the losses of the rounded networks.

The data are the digits of 8 x 8 pixels that come with scikit-learn, split
80/20; the network is an MLP 64-64-10. A float network is trained by
backpropagation, and rounded. The rounded network is then trained further, or
from new weights:

- by keras_vo: VOOptimizer(), unless flags say otherwise;
- by backpropagation straight through the rounding, for more epochs and
  seconds;
- and without a straight-through estimator: by the derivatives of s and the
  biases.

    python examples/quantized.py --seeds 0,1,2,3,4
    python examples/quantized.py --activation step --loss zero_one

The network that keras_vo trained last from the float one is saved twice: as a
Keras model of plain Dense layers, whose kernels have three values, and packed,
five weights a byte.
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
from absl import app, flags, logging
from keras import ops
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_vo

matplotlib.use("agg")

FLAGS = flags.FLAGS
_DEFAULTS = keras_vo.VOOptimizer()
_DISTRIBUTION = _DEFAULTS.search_distribution

flags.DEFINE_list(
    "seeds", ["0"], "Of the split, first weights, batches and noise."
)
flags.DEFINE_list(
    "methods",
    ["straight-through", "backpropagation", "keras_vo"],
    "What trains the rounded network.",
)
flags.DEFINE_enum(
    "loss",
    "nll",
    ["nll", "zero_one"],
    "What keras_vo minimises; backpropagation can minimise nll only.",
)
flags.DEFINE_enum(
    "activation",
    "relu",
    ["relu", "step"],
    "Of the hidden units. step: -1 or 1, again with a straight-through "
    "estimator where that is used, and in the float network.",
)
flags.DEFINE_enum(
    "scale", "layer", ["layer", "unit"], "The weights that share an s."
)
flags.DEFINE_integer(
    "epochs", 60, "Of keras_vo, from the float network's weights."
)
flags.DEFINE_integer("scratch_epochs", 120, "Of keras_vo, from new weights.")
flags.DEFINE_integer(
    "backprop_factor", 6, "Times as many epochs of backpropagation."
)
flags.DEFINE_integer("float_epochs", 100, "Of the float network.")
flags.DEFINE_integer("batch_size", 128, "Images in a mini-batch.")
flags.DEFINE_float("float_rate", 0.003, "Of Adam, for the float network.")
flags.DEFINE_float(
    "backprop_rate", 0.01, "Of Adam, for the rounded one by backpropagation."
)
flags.DEFINE_enum(
    "perturbation",
    _DEFAULTS.perturbation,
    ["full", "low_rank"],
    "Noise of keras_vo, on the weights before they are rounded.",
)
flags.DEFINE_integer(
    "population_size", _DEFAULTS.population_size, "Members a step of keras_vo."
)
flags.DEFINE_float(
    "stddev", None, "First sigma of keras_vo; by default what it chooses."
)
flags.DEFINE_float(
    "learning_rate",
    None,
    "Of keras_vo's Adam; by default what it chooses.",
)
flags.DEFINE_bool("decay", False, "Of --learning_rate, to 0 by a cosine.")
flags.DEFINE_bool(
    "validation",
    False,
    "Leave the test images out: train on three quarters of the training "
    "images, and show accuracies on the others. For choosing settings.",
)
flags.DEFINE_string("plot_dir", "out", "quantized.png; empty: none.")
flags.DEFINE_string(
    "export_dir", "out/quantized", "Folder of the two files; empty: none."
)

UNITS = (64, 64, 10)
THRESHOLD = 0.7  # of the mean size of weights; Li et al., arXiv 1605.04711
PLACES = 3 ** np.arange(5, dtype=np.uint8)  # of five weights in a byte
POINTS = 20  # of a curve
COLORS = {
    "keras_vo": "tab:blue",
    "straight-through": "tab:orange",
    "backpropagation": "tab:gray",
    "float": "k",
    "rounded": "tab:red",
}


class Arm(NamedTuple):
    """A way to train: by what, and whether from the float network."""

    method: str
    tuned: bool = False

    @property
    def name(self):
        if self.method in ("float", "rounded"):
            return self.method
        start = "fine-tuned" if self.tuned else "from scratch"
        return f"{self.method}, {start}"


FLOAT, ROUNDED = Arm("float"), Arm("rounded", True)
SEARCH = Arm("keras_vo", True)
TRAINED = (
    Arm("straight-through", True),
    Arm("straight-through"),
    Arm("backpropagation"),
    SEARCH,
    Arm("keras_vo"),
)
METHODS = tuple(dict.fromkeys(arm.method for arm in TRAINED))


class Result(NamedTuple):
    """Of one training.

    Attributes:
        accuracy: on the test images, at the end.
        train_accuracy: on those that it was trained on.
        seconds: of training, with its first step.
        curve: pairs of seconds and accuracy on the test images.
    """

    accuracy: float
    train_accuracy: float
    seconds: float
    curve: list


# --- the network ---


def straight_through(rounded, smooth):
    """The values of `rounded` with the derivative of `smooth`."""
    return ops.stop_gradient(rounded) + (smooth - ops.stop_gradient(smooth))


@keras.saving.register_keras_serializable(package="keras_vo_examples")
class TernaryDense(keras.layers.Dense):
    """Dense, whose kernel is rounded to {-s, 0, s} whenever it is called.

    Weights of less than 0.7 times the mean size become 0; s is the mean size
    of the others.

    Args:
        units: number of outputs.
        scale: what has an s of its own, the "layer" or each "unit".
        estimator: whether derivatives go straight through the rounding.
        **kwargs: see `keras.layers.Dense`.
    """

    def __init__(self, units, scale="layer", estimator=False, **kwargs):
        super().__init__(units, **kwargs)
        self.scale, self.estimator = scale, estimator

    def signs_and_scale(self):
        """-1, 0 or 1 for each weight, and s."""
        axis = 0 if self.scale == "unit" else None
        size = ops.abs(self.kernel)
        large = size > THRESHOLD * ops.mean(size, axis, keepdims=True)
        large = ops.cast(large, size.dtype)
        number = ops.sum(large, axis, keepdims=True)
        total = ops.sum(size * large, axis, keepdims=True)
        return large * ops.sign(self.kernel), total / ops.maximum(number, 1)

    def rounded_kernel(self):
        signs, scale = self.signs_and_scale()
        return signs * scale

    def call(self, inputs):
        kernel = self.rounded_kernel()
        if self.estimator:
            latent = ops.convert_to_tensor(self.kernel)
            kernel = straight_through(kernel, latent)
        outputs = ops.matmul(inputs, kernel)
        if self.use_bias:
            outputs = outputs + self.bias
        return outputs if self.activation is None else self.activation(outputs)

    def get_config(self):
        own = {"scale": self.scale, "estimator": self.estimator}
        return {**super().get_config(), **own}


@keras.saving.register_keras_serializable(package="keras_vo_examples")
class Step(keras.layers.Layer):
    """-1 or 1.

    Args:
        estimator: whether it has the derivative of clip(inputs, -1, 1).
        **kwargs: see `keras.layers.Layer`.
    """

    def __init__(self, estimator=False, **kwargs):
        super().__init__(**kwargs)
        self.estimator = estimator

    def call(self, inputs):
        outputs = ops.where(inputs < 0, -1.0, 1.0)
        if self.estimator:
            outputs = straight_through(outputs, ops.clip(inputs, -1, 1))
        return outputs

    def get_config(self):
        return {**super().get_config(), "estimator": self.estimator}


def make_network(arm, dense=None):
    """The MLP of an arm, with new weights.

    Args:
        arm: what it is for.
        dense: makes a layer of some units; by default the arm's.
    """
    estimator = arm.method in ("float", "straight-through")
    if dense is None and arm == FLOAT:
        dense = keras.layers.Dense
    hidden, outputs = (
        dense(n) if dense else TernaryDense(n, FLAGS.scale, estimator)
        for n in UNITS[1:]
    )
    relu = FLAGS.activation == "relu"
    activation = keras.layers.ReLU() if relu else Step(estimator)
    return keras.Sequential(
        [keras.Input(UNITS[:1]), hidden, activation, outputs]
    )


# --- training ---


@keras.saving.register_keras_serializable(package="keras_vo_examples")
def zero_one_error(y_true, y_pred):
    """1 for every image whose greatest output is another class's, else 0."""
    labels = tf.cast(tf.reshape(y_true, [-1]), tf.int64)
    return tf.cast(tf.argmax(y_pred, -1) != labels, tf.float32)


def load_data(seed):
    """Images [n, 64] in [0, 1] of training and test, then labels [n]."""
    images, labels = load_digits(return_X_y=True)

    def split(x, y, share):
        return train_test_split(
            x, y, test_size=share, stratify=y, random_state=seed
        )

    data = split(images.astype("float32") / 16, labels, 0.2)
    return split(data[0], data[2], 0.25) if FLAGS.validation else data


def accuracy(model, x, y):
    return float(np.mean(np.argmax(model(x), axis=-1) == y))


class Curve(keras.callbacks.Callback):
    """Notes the accuracy on test images and the seconds until then."""

    def __init__(self, x, y, every):
        super().__init__()
        self.x, self.y, self.every = x, y, every
        self.seconds, self.points = 0.0, []

    def on_train_begin(self, logs=None):
        self._began = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        if (epoch + 1) % self.every == 0:
            self.stop_clock()
            self.points.append(
                (self.seconds, accuracy(self.model, self.x, self.y))
            )
            self._began = time.perf_counter()

    def stop_clock(self):
        self.seconds += time.perf_counter() - self._began

    def on_train_end(self, logs=None):
        self.stop_clock()


def number_of_epochs(arm):
    if arm == FLOAT:
        return FLAGS.float_epochs
    epochs = FLAGS.epochs if arm.tuned else FLAGS.scratch_epochs
    factor = 1 if arm.method == "keras_vo" else FLAGS.backprop_factor
    return epochs * factor


def decaying_adam(rate, steps):
    schedule = keras.optimizers.schedules.CosineDecay(rate, steps)
    return keras.optimizers.Adam(schedule)


def make_optimizer(arm, seed, steps):
    """Of an arm, for a training of `steps` steps."""
    if arm.method != "keras_vo":
        rate = FLAGS.float_rate if arm == FLOAT else FLAGS.backprop_rate
        return decaying_adam(rate, steps)
    inner, rate = "adam", FLAGS.learning_rate
    if FLAGS.decay:
        inner = decaying_adam(rate, steps)
    elif rate is not None:
        inner = keras.optimizers.Adam(rate)
    stddev = "auto" if FLAGS.stddev is None else FLAGS.stddev
    return keras_vo.VOOptimizer(
        inner,
        FLAGS.population_size,
        keras_vo.GaussianSearchDistribution(stddev=stddev),
        perturbation=FLAGS.perturbation,
        seed=seed,
    )


def make_model(arm, seed, steps, weights):
    """Compiled; with `weights`, if it is to be fine-tuned."""
    keras.utils.set_random_seed(seed)
    model = make_network(arm)
    if arm.tuned:
        model.set_weights(weights)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    if arm.method == "keras_vo":
        model = keras_vo.make_variational(model)
        loss = loss if FLAGS.loss == "nll" else zero_one_error
    model.compile(optimizer=make_optimizer(arm, seed, steps), loss=loss)
    return model


def train(arm, data, seed, weights=None):
    """A trained model and its `Result`."""
    x, x_test, y, y_test = data
    epochs = number_of_epochs(arm)
    steps = epochs * -(-len(x) // FLAGS.batch_size)
    model = make_model(arm, seed, steps, weights)
    curve = Curve(x_test, y_test, max(1, epochs // POINTS))
    model.fit(
        x,
        y,
        batch_size=FLAGS.batch_size,
        epochs=epochs,
        verbose=0,
        callbacks=[curve],
    )
    values = accuracy(model, x_test, y_test), accuracy(model, x, y)
    return model, Result(*values, curve.seconds, curve.points)


def round_network(weights, data):
    """The float network's weights, rounded."""
    x, x_test, y, y_test = data
    model = make_network(ROUNDED)
    model.set_weights(weights)
    values = accuracy(model, x_test, y_test), accuracy(model, x, y)
    return model, Result(*values, 0.0, [])


def chosen_arms():
    trained = [arm for arm in TRAINED if arm.method in FLAGS.methods]
    return [FLOAT, ROUNDED, *trained]


def run_seed(seed):
    """Of all arms, by arm: the model and its result."""
    data = load_data(seed)
    found = {FLOAT: train(FLOAT, data, seed)}
    weights = found[FLOAT][0].get_weights()
    found[ROUNDED] = round_network(weights, data)
    for arm in chosen_arms():
        if arm not in found:
            found[arm] = train(arm, data, seed, weights)
        result = found[arm][1]
        print(
            f"seed {seed}  {arm.name:<30}  accuracy {result.accuracy:.3f}, "
            f"{result.seconds:5.1f} s",
            flush=True,
        )
    return found


# --- what is saved ---


def ternary_layers(model):
    return [x for x in model.layers if isinstance(x, TernaryDense)]


def plain_network(kernels_and_biases):
    """Of Dense layers, with these weights: no rounding."""
    model = make_network(ROUNDED, keras.layers.Dense)
    model.set_weights(kernels_and_biases)
    return model


def pack(model, path):
    """Writes signs, scales and biases: five signs a byte, all else float32."""
    arrays = {}
    for i, layer in enumerate(ternary_layers(model)):
        signs, scale = map(np.asarray, layer.signs_and_scale())
        digits = (signs.ravel() + 1).astype(np.uint8)
        digits = np.pad(digits, (0, -len(digits) % 5)).reshape(-1, 5)
        arrays[f"signs{i}"] = digits @ PLACES
        arrays[f"shape{i}"] = np.array(signs.shape, np.uint16)
        arrays[f"scale{i}"] = scale.ravel()
        arrays[f"bias{i}"] = np.asarray(layer.bias)
    np.savez(path, **arrays)


def unpack(path):
    """The plain network of a packed one."""
    weights = []
    with np.load(path) as arrays:
        for i in range(len(UNITS) - 1):
            digits = arrays[f"signs{i}"][:, None] // PLACES % 3
            shape = arrays[f"shape{i}"]
            signs = digits.ravel()[: np.prod(shape)].reshape(shape) - 1.0
            kernel = signs * arrays[f"scale{i}"]
            weights += [kernel.astype("float32"), arrays[f"bias{i}"]]
    return plain_network(weights)


def export(model, folder):
    """Saves a network as plain Dense layers, and packed.

    Returns:
        Paths of the two files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "quantized.keras", folder / "quantized.npz"
    weights = []
    for layer in ternary_layers(model):
        weights += [layer.rounded_kernel(), layer.bias]
    plain_network([np.asarray(w) for w in weights]).save(paths[0])
    pack(model, paths[1])
    return paths


def count_values(kernel):
    """The most distinct values that weights of one s have."""
    if FLAGS.scale == "layer":
        return len(np.unique(kernel))
    return max(len(np.unique(unit)) for unit in kernel.T)


def print_files(paths, model, images):
    """What is in the files, and whether they are the network."""
    plain, packed = keras.models.load_model(paths[0]), unpack(paths[1])
    with np.load(paths[1]) as arrays:
        sizes = {name: array.nbytes for name, array in arrays.items()}
    print(f"\nSaved: {SEARCH.name}, of the last seed\n")
    print("layer  weights  distinct values  bytes  in float32")
    for i, kernel in enumerate(plain.get_weights()[::2]):
        print(
            f"{i + 1:>5}  {kernel.size:>7}  {count_values(kernel):>15}"
            f"  {sizes[f'signs{i}']:>5}  {kernel.nbytes:>10}"
        )
    others = sum(sizes.values()) - sum(
        size for name, size in sizes.items() if name.startswith("signs")
    )
    print(f"\nscales, biases, shapes: {others} bytes")
    outputs = np.asarray(model(images))
    for path, saved in zip(paths, (plain, packed), strict=True):
        difference = np.abs(np.asarray(saved(images)) - outputs).max()
        print(f"{path}: outputs differ by {difference:.1g} at most")


# --- table and plot ---


def print_table(results):
    """Results by seed, of each by arm."""
    kind = "Validation" if FLAGS.validation else "Test"
    print(
        f"\n{kind} accuracy at the end, by seed; training: mean accuracy on "
        "the images\ntrained on. Digits, MLP 64-64-10, hidden units: "
        f"{FLAGS.activation}\n"
    )
    heads = "  ".join(f"{f'seed {seed}':>6}" for seed in results)
    print(f"{'':<30}    mean  {heads}  training  seconds")
    for arm in chosen_arms():
        runs = [by_arm[arm] for by_arm in results.values()]
        values = [run.accuracy for run in runs]
        row = "  ".join(f"{value:>6.3f}" for value in values)
        train = np.mean([run.train_accuracy for run in runs])
        seconds = np.mean([run.seconds for run in runs])
        print(
            f"{arm.name:<30}  {np.mean(values):.4f}  {row}  {train:>8.3f}"
            f"  {seconds:>7.1f}"
        )


def style(arm):
    tuned = arm.tuned or arm == FLOAT
    return {"color": COLORS[arm.method], "ls": "-" if tuned else "--"}


def set_log_ticks(axis):
    """Ticks at 1, 2, 5, 10, 20, ..."""
    axis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(matplotlib.ticker.NullLocator())
    axis.set_major_formatter("{x:g}")


def plot_curves(axes, results):
    """Mean error of the seeds over their mean seconds."""
    for arm in chosen_arms():
        runs = [by_arm[arm] for by_arm in results]
        if arm in (FLOAT, ROUNDED):
            level = 100 * (1 - np.mean([run.accuracy for run in runs]))
            axes.axhline(
                level, label=arm.name, lw=1, **style(arm) | {"ls": ":"}
            )
            continue
        seconds, values = np.mean([run.curve for run in runs], 0).T
        error = 100 * (1 - values)
        axes.plot(seconds, error, label=arm.name, lw=1.5, **style(arm))
    axes.set(xlabel="seconds of training", title="mean of the seeds")
    axes.set(yscale="log")
    set_log_ticks(axes.yaxis)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def plot_ends(axes, results):
    """A dot for the error of each seed at the end, a bar for their mean."""
    arms = chosen_arms()
    for i, arm in enumerate(arms):
        error = [100 * (1 - by_arm[arm].accuracy) for by_arm in results]
        color, filled = style(arm)["color"], style(arm)["ls"] == "-"
        axes.plot(
            error,
            np.full(len(error), i),
            "o",
            color=color,
            mfc=color if filled else "w",
            alpha=0.7,
        )
        axes.plot(np.mean(error), i, "|", color=color, ms=22, mew=2)
    axes.set_yticks(range(len(arms)), [arm.name for arm in arms])
    axes.invert_yaxis()
    axes.set(title="at the end: dots are seeds, bars their mean")
    axes.set(xlabel="wrong, %", xscale="log")
    set_log_ticks(axes.xaxis)
    axes.grid(alpha=0.3, axis="x")


def plot(results, path):
    """The errors of all arms, from a list of results by arm."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(13, 5), layout="constrained"
    )
    plot_curves(left, results)
    plot_ends(right, results)
    kind = "validation" if FLAGS.validation else "test"
    left.set_ylabel(f"wrong, % of {kind} images")
    figure.suptitle("Digits, MLP 64-64-10 with ternary weights")
    figure.savefig(path, dpi=110)
    plt.close(figure)


# --- flags ---


def check(condition, expected, name):
    if not condition:
        value = FLAGS[name].value
        if isinstance(value, bool):
            value = str(value).lower()
        if isinstance(value, list):
            value = ",".join(value)
        raise app.UsageError(f"Expected {expected}. Received: --{name}={value}")


def check_flags():
    texts = FLAGS.seeds
    good = texts and all(text.isdecimal() for text in texts)
    good = good and len(set(map(int, texts))) == len(texts)
    good = good and max(map(int, texts)) < 2**32
    check(good, "--seeds in [0, 2^32), each once", "seeds")
    chosen = FLAGS.methods
    good = chosen and len({*chosen} & {*METHODS}) == len(chosen)
    expected = f"--methods to be some of {','.join(METHODS)}, each once"
    check(good, expected, "methods")
    for name in (
        "epochs",
        "scratch_epochs",
        "float_epochs",
        "backprop_factor",
        "batch_size",
    ):
        check(FLAGS[name].value >= 1, f"--{name} of 1 or more", name)
    size = FLAGS.population_size
    good = size >= 2 and size % 2 == 0
    check(good, "an even --population_size of 2 or more", "population_size")
    for name in ("float_rate", "backprop_rate", "learning_rate"):
        rate = FLAGS[name].value
        good = rate is None or (np.isfinite(rate) and rate > 0)
        check(good, f"a positive, finite --{name}", name)
    good = not FLAGS.decay or FLAGS.learning_rate is not None
    check(good, "a --learning_rate with --decay", "decay")
    least, greatest = _DISTRIBUTION.min_stddev, _DISTRIBUTION.max_stddev
    good = FLAGS.stddev is None or least <= FLAGS.stddev <= greatest
    check(good, f"--stddev in [{least:g}, {greatest:g}]", "stddev")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Expected flags only. Received: {argv[1:]}")
    check_flags()
    logging.set_verbosity(logging.ERROR)  # one line for each fine-tuning
    tf.get_logger().setLevel("ERROR")  # every network is traced anew
    results = {}
    for seed in map(int, FLAGS.seeds):
        found = run_seed(seed)
        results[seed] = {arm: result for arm, (_, result) in found.items()}
    print_table(results)
    if FLAGS.plot_dir:
        path = pathlib.Path(FLAGS.plot_dir) / "quantized.png"
        plot(list(results.values()), path)
        print(f"\nplot: {path}")
    if FLAGS.export_dir and SEARCH in found:
        model, _ = found[SEARCH]
        paths = export(model, pathlib.Path(FLAGS.export_dir))
        print_files(paths, model, load_data(seed)[1])


if __name__ == "__main__":
    app.run(main)
