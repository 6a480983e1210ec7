"""Shows norms of weights and gradient while sigma adapts, and when it is fixed.

The source's two figures on adapting the variance: above as keras_vo adapts
sigma by default; below as the source reports it, gradients that grow while
most sigmas fall, where log sigma^2 descends its regular gradient. An MLP
learns scikit-learn's digits by SGD with momentum. All searches have the same
first weights, sigma, batches and first step of the weights.

- By descent, sigma falls some tenfold, and the gradient the inner optimizer is
  handed grows as 1 / sigma: so do its steps, and with them the weights.
- By default, sigma goes down the natural gradient, which moves it by percents,
  and is raised where the mean moves further than it (try --stddev 0.01). The
  gradient stays about as it is when sigma is fixed: the noise of a population,
  or up to about sqrt(2) times it, which is what pairs of opposite losses make
  of it (bottom left).

    python examples/variance_adaptation.py --stddev 0.05 --seed 1
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
VARIANCES = ("fixed", "isotropic", "layerwise")
_DEFAULTS = keras_vo.GaussianSearchDistribution()

flags.DEFINE_list("variances", list(VARIANCES), "Which weights share a sigma.")
flags.DEFINE_float("stddev", 0.1, "First sigma.")
flags.DEFINE_integer("steps", 300, "Generations of each search.")
flags.DEFINE_integer("population_size", 128, "Members a generation.")
flags.DEFINE_integer("batch_size", 64, "Images in a mini-batch.")
flags.DEFINE_float(
    "learning_rate",
    1.0,
    "First one of mu, for natural gradients; cosine decay. For regular ones "
    "it is --stddev^2 times as much, which is the same first step.",
)
flags.DEFINE_float(
    "descent_rate", 0.2, "Of log sigma^2, where it descends its gradient."
)
flags.DEFINE_integer("seed", 0, "Seed of weights, batches and noise.")
flags.DEFINE_string(
    "plot_dir",
    "out",
    "variance_norms.png and, of layerwise, variance_layers.png; empty: none.",
)

UNITS = (64, 32, 16, 10)
MOMENTUM = 0.9  # of SGD, as in the source
WINDOW = 50  # generations that a gradient's norm is averaged over, as there
MEAN_COLOR, GRADIENT_COLOR, SIGMA_COLOR = "k", "tab:blue", "tab:red"
DESCENT_COLOR = "tab:orange"
LAYER_COLORS = ("tab:blue", "tab:orange", "tab:green")
LAYER_STYLES = ("-", "--", ":")


class Arm(NamedTuple):
    """A search: which weights share a sigma, and how it adapts.

    Attributes:
        variance: of the search distribution.
        descent: whether log sigma^2 descends its regular gradient, and mu
            too; else sigma adapts by default, and gradients are natural.
    """

    variance: str
    descent: bool = False

    @property
    def name(self):
        return self.variance + (", descent" if self.descent else "")


class Result(NamedTuple):
    """What a search did, by generation and layer.

    Attributes:
        means: norm of mu, [steps + 1, layers].
        gradients: norm of the gradient that the inner optimizer was handed,
            [steps, layers]. Its population is drawn with sigmas[:-1].
        sigmas: [steps + 1, layers].
        accuracy: on the test images, of mu.
    """

    means: np.ndarray
    gradients: np.ndarray
    sigmas: np.ndarray
    accuracy: float


# --- the searches ---


class WatchedSGD(keras.optimizers.SGD):
    """SGD that keeps the norms of the gradients it was handed last."""

    def build(self, variables):
        self.norms = tf.Variable(tf.zeros(len(variables)), trainable=False)
        super().build(variables)

    def apply(self, grads, trainable_variables=None):
        self.norms.assign([tf.norm(gradient) for gradient in grads])
        return super().apply(grads, trainable_variables)


def by_layer(norms):
    """Norms of kernel, bias, kernel, ... to those of the layers."""
    return np.hypot(norms[::2], norms[1::2])


class Watch(keras.callbacks.Callback):
    """Notes norms and sigma before the first and after each generation."""

    def __init__(self):
        super().__init__()
        self.means, self.gradients, self.sigmas = [], [], []

    def on_train_begin(self, logs=None):
        self._note_state()

    def on_train_batch_end(self, batch, logs=None):
        norms = self.model.optimizer.inner_optimizer.norms
        self.gradients.append(by_layer(norms.numpy()))
        self._note_state()

    def _note_state(self):
        weights = self.model.trainable_variables
        self.means.append(by_layer([np.linalg.norm(w) for w in weights]))
        kernels = self.model.optimizer.stddevs[::2]
        self.sigmas.append([sigma.numpy().flat[0] for sigma in kernels])


def load_data():
    """Training and test images [n, 64] in [0, 1] and labels [n]."""
    images, labels = load_digits(return_X_y=True)
    return train_test_split(
        images.astype("float32") / 16,
        labels,
        test_size=0.2,
        stratify=labels,
        random_state=0,
    )


def make_batches(x, y):
    """Without end; the same ones for every search."""
    images = tf.data.Dataset.from_tensor_slices((x, y)).cache()
    images = images.shuffle(len(x), seed=FLAGS.seed).repeat()
    return images.batch(FLAGS.batch_size)


def make_optimizer(arm):
    rate = FLAGS.learning_rate * (FLAGS.stddev**2 if arm.descent else 1.0)
    schedule = keras.optimizers.schedules.CosineDecay(rate, FLAGS.steps)
    return keras_vo.VOOptimizer(
        WatchedSGD(schedule, MOMENTUM),
        FLAGS.population_size,
        keras_vo.GaussianSearchDistribution(
            arm.variance,
            FLAGS.stddev,
            FLAGS.descent_rate if arm.descent else _DEFAULTS.learning_rate,
            follow_mean=not arm.descent,
        ),
        natural_gradient=not arm.descent,
        seed=FLAGS.seed,
    )


def make_model(arm):
    """The MLP, with the same first weights for every search."""
    keras.utils.set_random_seed(FLAGS.seed)
    *hidden, last = UNITS[1:]
    model = keras_vo.VOSequential(
        [
            keras.Input(UNITS[:1]),
            *[keras.layers.Dense(n, activation="relu") for n in hidden],
            keras.layers.Dense(last),
        ]
    )
    model.compile(
        optimizer=make_optimizer(arm),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    model.optimizer.build(model.trainable_variables)
    return model


def search(arm, data):
    x, x_test, y, y_test = data
    model, watch = make_model(arm), Watch()
    model.fit(
        make_batches(x, y),
        steps_per_epoch=FLAGS.steps,
        shuffle=False,
        verbose=0,
        callbacks=[watch],
    )
    right = np.argmax(model(x_test), axis=-1) == y_test
    noted = map(np.array, (watch.means, watch.gradients, watch.sigmas))
    return Result(*noted, right.mean())


# --- numbers ---


def total(norms):
    """Norms by layer [..., layers] to that of all layers."""
    return np.linalg.norm(norms, axis=-1)


def power(result):
    """p in |gradient| ~ sigma^p: least squares over layers and generations.

    Each layer has a factor of its own. NaN where no sigma moves by half.
    """
    x, y = (
        np.log(values) - np.log(values).mean(0)
        for values in (result.sigmas[:-1], result.gradients)
    )
    moves = np.ptp(x, axis=0).max() > np.log(1.5)
    return (x * y).sum() / (x**2).sum() if moves else np.nan


def layers_apart(arm):
    """How many sigmas an arm has."""
    return len(UNITS) - 1 if arm.variance == "layerwise" else 1


def layer_sizes():
    """Numbers of weights."""
    return [(n + 1) * m for n, m in zip(UNITS[:-1], UNITS[1:], strict=True)]


def noise_level():
    """Root mean square of a weight's sigma dU/dmu if losses told nothing.

    The mean of N products u z of centred ranks u, of variance
    (N + 1) / (12 (N - 1)), and noise z, independent of them. Where the losses
    of a pair, f(mu + sigma z) and f(mu - sigma z), are as far from the median
    on either side, it is sqrt(2) times as much: 2 u z, N / 2 times.
    """
    size = FLAGS.population_size
    return np.sqrt((size + 1) / (12 * (size - 1) * size))


def moving_average(values):
    """Centres and means of up to 50 consecutive generations."""
    width = min(WINDOW, len(values))
    centers = np.arange(len(values) - width + 1) + (width + 1) / 2
    return centers, np.convolve(values, np.full(width, 1 / width), "valid")


# --- table and plots ---


def summary(arm, result):
    """A row of the table."""
    gradients, slope = total(result.gradients), power(result)
    sigmas = result.sigmas[-1, : layers_apart(arm)]
    return (
        arm.name,
        " ".join(f"{sigma:.2g}" for sigma in sigmas),
        f"{np.median(gradients):.3g}",
        f"{gradients.max() / np.median(gradients):.2f}",
        "-" if np.isnan(slope) else f"{slope:.2f}",
        f"{total(result.means)[-1]:.1f}",
        f"{result.accuracy:.3f}",
    )


def print_table(results):
    line = "{:<18}  {:<17}  {:>6}  {:>7}  {:>5}  {:>5}  {:>8}"
    heads = ("search", "last sigma", "|g|", "max/med", "power", "|mu|")
    print(line.format(*heads, "accuracy"))
    for arm, result in results.items():
        print(line.format(*summary(arm, result)))


def plot_gradients(axes, gradients, color):
    """Each generation's, and their moving average."""
    steps = np.arange(1, len(gradients) + 1)
    axes.plot(steps, gradients, color=color, lw=0.6, alpha=0.4)
    axes.plot(*moving_average(gradients), color=color, lw=1.5)


def plot_norms(axes, arm, result):
    """Norms of mu and the gradient; sigma on an axis of its own, returned."""
    axes.plot(total(result.means), color=MEAN_COLOR, lw=1.5)
    plot_gradients(axes, total(result.gradients), GRADIENT_COLOR)
    axes.set(xlabel="generation", yscale="log", title=arm.name)
    axes.grid(alpha=0.3)
    right = axes.twinx()
    for layer in range(layers_apart(arm)):
        right.plot(
            result.sigmas[:, layer],
            color=SIGMA_COLOR,
            linestyle=LAYER_STYLES[layer],
            lw=1.2,
        )
    right.set(yscale="log")
    right.tick_params(axis="y", colors=SIGMA_COLOR, which="both")
    return right


def norm_legend(axes, layers):
    """Handles of what `plot_norms` draws, of no data."""
    sigma = {"color": SIGMA_COLOR, "lw": 1.2}
    axes.plot([], [], color=MEAN_COLOR, label=r"$|\mu|$")
    axes.plot([], [], color=GRADIENT_COLOR, label="|gradient|, averaged")
    for layer in range(layers):
        label = rf"$\sigma$, layer {layer + 1}" if layers > 1 else r"$\sigma$"
        axes.plot([], [], ls=LAYER_STYLES[layer], label=label, **sigma)
    return axes.get_legend_handles_labels()


def plot_power(axes, results):
    """Each layer's gradient over its sigma, and what noise alone would give.

    Regular gradients are times stddev^2, as their learning rate is.
    """
    every = np.concatenate([result.sigmas for result in results.values()])
    sigmas = np.geomspace(every.min(), every.max(), 2)
    for descent, color, slope in (
        (False, GRADIENT_COLOR, 0),
        (True, DESCENT_COLOR, -1),
    ):
        scale = FLAGS.stddev**2 if descent else 1.0
        label = "by descent" if descent else "by default, or fixed"
        axes.plot([], [], "o", ms=4, color=color, label=label)
        for arm, result in results.items():
            if arm.descent == descent:
                rms = scale * result.gradients / np.sqrt(layer_sizes())
                x, y = result.sigmas[:-1].ravel(), rms.ravel()
                axes.plot(x, y, ".", ms=1.5, alpha=0.5, color=color)
        level = FLAGS.stddev * noise_level() * (sigmas / FLAGS.stddev) ** slope
        axes.plot(sigmas, level, "k--", lw=1)
        axes.plot(sigmas, np.sqrt(2) * level, "k:", lw=1)
    axes.plot([], [], "k--", lw=1, label="noise alone")
    axes.plot([], [], "k:", lw=1, label="of opposite pairs")
    axes.set(
        title=r"rms gradient of a weight (descent: times $\sigma_0^2$)",
        xlabel=r"$\sigma$ of its layer",
        xscale="log",
        yscale="log",
    )
    axes.legend()
    axes.grid(alpha=0.3)


def same_spans(group):
    """Log axes of one scale, each around what it shows."""
    limits = np.log([axes.get_ylim() for axes in group])
    half = np.ptp(limits, axis=1).max() / 2
    for axes, center in zip(group, limits.mean(1), strict=True):
        axes.set_ylim(np.exp([center - half, center + half]))


def share_limits(group):
    limits = np.array([axes.get_ylim() for axes in group])
    for axes in group:
        axes.set_ylim(limits[:, 0].min(), limits[:, 1].max())


def plot_all_norms(results, path):
    """A column a variance: by default above, descent below."""
    columns = list(dict.fromkeys(["fixed", *(arm.variance for arm in results)]))
    figure, rows = plt.subplots(
        2,
        len(columns),
        figsize=(1 + 4 * len(columns), 8),
        layout="constrained",
        squeeze=False,
    )
    drawn, twins = [], []
    for arm, result in results.items():
        axes = rows[int(arm.descent), columns.index(arm.variance)]
        drawn.append(axes)
        twins.append(plot_norms(axes, arm, result))
    share_limits(drawn)
    share_limits(twins)
    twins[-1].set_ylabel(r"$\sigma$", color=SIGMA_COLOR)
    drawn[0].set_ylabel("2-norm")
    if drawn[0] is not rows[0, 0]:
        rows[0, 0].set_axis_off()
    plot_power(rows[1, 0], results)
    legend = norm_legend(drawn[0], max(map(layers_apart, results)))
    figure.legend(*legend, loc="outside lower center", ncols=6)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def plot_layers(results, path):
    """A row a quantity, a line a layer; by default and by descent."""
    arms = [arm for arm in results if arm.variance == "layerwise"]
    figure, rows = plt.subplots(
        3, len(arms), figsize=(10, 9), layout="constrained", sharex=True
    )
    for column, arm in zip(rows.T, arms, strict=True):
        means, gradients, sigmas, _ = results[arm]
        for layer, color in enumerate(LAYER_COLORS):
            label = f"layer {layer + 1}: {UNITS[layer]}-{UNITS[layer + 1]}"
            column[0].plot(sigmas[:, layer], color=color, lw=1.2, label=label)
            column[1].plot(means[:, layer], color=color, lw=1.5)
            plot_gradients(column[2], gradients[:, layer], color)
        column[0].set_title(arm.name)
        column[2].set_xlabel("generation")
        for axes in column:
            axes.set_yscale("log")
            axes.grid(alpha=0.3, which="both")
    share_limits(rows[0])
    share_limits(rows[1])
    same_spans(rows[2])
    figure.align_ylabels()
    names = (r"$\sigma$", r"$|\mu|$", "|gradient|")
    for axes, name in zip(rows[:, 0], names, strict=True):
        axes.set_ylabel(name)
    rows[0, 0].legend(loc="lower left")
    figure.savefig(path, dpi=100)
    plt.close(figure)


# --- flags ---


def check(condition, expected, name):
    if not condition:
        value = FLAGS[name].value
        if isinstance(value, list):
            value = ",".join(value)
        raise app.UsageError(f"Expected {expected}. Received: --{name}={value}")


def check_flags():
    least, greatest = _DEFAULTS.min_stddev, _DEFAULTS.max_stddev
    greatest = min(greatest, 0.4)  # adaptation by default would start lower
    good = least <= FLAGS.stddev <= greatest
    check(good, f"--stddev in [{least:g}, {greatest:g}]", "stddev")
    for name in ("learning_rate", "descent_rate"):
        value = FLAGS[name].value
        good = np.isfinite(value) and value > 0
        check(good, f"a positive, finite --{name}", name)
    check(FLAGS.steps >= 2, "--steps of 2 or more", "steps")
    check(FLAGS.batch_size >= 1, "--batch_size of 1 or more", "batch_size")
    check(0 <= FLAGS.seed < 2**32, "--seed in [0, 2^32)", "seed")
    size = FLAGS.population_size
    good = size >= 2 and size % 2 == 0
    check(good, "an even --population_size of 2 or more", "population_size")
    chosen = FLAGS.variances
    good = chosen and len({*chosen} & {*VARIANCES}) == len(chosen)
    expected = f"--variances to be some of {','.join(VARIANCES)}, each once"
    check(good, expected, "variances")


def chosen_arms():
    """Each variance by default; those that adapt by descent, too."""
    return [
        Arm(variance, descent)
        for variance in FLAGS.variances
        for descent in (False, True)
        if not (variance == "fixed" and descent)
    ]


def plot(results, folder):
    """Returns the paths of the plots."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "variance_norms.png"]
    plot_all_norms(results, paths[0])
    if any(arm.variance == "layerwise" for arm in results):
        paths.append(folder / "variance_layers.png")
        plot_layers(results, paths[1])
    return paths


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Expected flags only. Received: {argv[1:]}")
    check_flags()
    tf.get_logger().setLevel("ERROR")  # every search is traced anew
    data = load_data()
    began = time.perf_counter()
    results = {arm: search(arm, data) for arm in chosen_arms()}
    elapsed = time.perf_counter() - began
    first = next(iter(results.values()))
    print(
        f"\nDigits, MLP {'-'.join(map(str, UNITS))}: {FLAGS.steps} generations "
        f"of {FLAGS.population_size} members, all from\n"
        f"sigma = {FLAGS.stddev:g} and |mu| = {total(first.means)[0]:.1f}. "
        "g: gradient handed to the inner optimizer,\nthe median of its norm, "
        "maximum over median, and p in |g| ~ sigma^p. By\ndescent g is "
        "regular, else natural: sigma^2 times as much at first, with\na "
        "learning rate as much greater.\n"
    )
    print_table(results)
    print(f"\nsearches  {elapsed:.1f} s")
    if FLAGS.plot_dir:
        for path in plot(results, pathlib.Path(FLAGS.plot_dir)):
            print(f"plot      {path}")


if __name__ == "__main__":
    app.run(main)
