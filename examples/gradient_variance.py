"""Measures the variance of search gradients, beside what is predicted for it.

Equations are those of Havtorn, "Variational Optimization of Neural Networks"
(2018). All variances are over the noise z of populations of N members, and
those of vectors are sums over their entries (traces). Ratios are given with
their standard error; those of one curve in (b) and (c) share the sample that
it is predicted from, so they are off together.

(a) One weight, f(w) = (w^2 + 1) / 2 at w = 1, where f = f' = f'' = 1: dU/dmu
    = 1/N sum_n f_n z_n / sigma. Eq. 5 has f^2 / (N sigma^2) + 2 f'^2 / N for
    small sigma; all terms of the quadratic are

        iid            f^2 / sigma^2 + 2 f'^2 + 3 f f'' + 15/4 f''^2 sigma^2
        with baseline  2 f'^2 N / (N-1) + f''^2 sigma^2 (5/2 + 1/2 / (N-1))
        antithetic     4 f'^2

    over N. (3 f f'' is of the order of eq. 5's second term: eq. 5 holds for
    straight f, or to its first term.) The baseline is that of the "identity"
    shaping, the mean loss of the other members.

(b) An MLP 64-32-10 before, half way through and after training; f is its mean
    loss on 64 of the digits. With g = f(mu + sigma z) score(z), and g_e its
    part that is even in z, the variance is Var[g] / N for iid members (eq. 4)
    and 2 Var[g_e] / N for antithetic pairs (eq. 23). Var[g] and Var[g_e] are
    estimated from draws of their own; the points are search gradients of
    populations of N. Pairs need no baseline for mu: (f+ - f-) z has none in
    it. Pairs beat a baseline where f is more even than odd, as it is after
    training, not before. For beta = log sigma^2 (one for each weight) pairs
    need a baseline: without it f is nearly even, and the variance doubles.

(c) The same MLP before training (where images differ least, so that few
    batches do), and batches of |B| out of 256 digits. If a batch shares a
    member's noise (eq. 25, with the factor of its second term corrected),

        Var[U] = Var[f_b] / (N |B|) + (|B| - 1) / (N |B|) Cov[f_b, f_b'].

    With noise of its own for each example, as in LocalReparamDense, only the
    first term is left (eq. 26). Var and Cov are over the noise, for given
    images, then averaged over the 256 images and their pairs. So the sum is
    what one expects, for a batch drawn at random, of the variance over the
    noise with that batch held fixed. This is what is measured: the variance
    between populations that see the same batch, averaged over batches.
    Var[f_b] is estimated from draws of weights in both cases. dU/dmu, with a
    baseline, has an equation of the same form with g_b for f_b. Where
    activations are perturbed, g_b is f_b A xi / sqrt(v) (eq. 30), which has
    less variance for a single example already: as many terms as units, not as
    weights.

Nothing is differentiated. It takes half a minute:

    python examples/gradient_variance.py
"""

import itertools
import math
import os
import pathlib
from typing import NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf
from absl import app, flags, logging
from sklearn.datasets import load_digits

import keras_vo
from keras_vo import fitness_shaping
from keras_vo.search import estimators

matplotlib.use("agg")

FLAGS = flags.FLAGS
_BOUNDS = keras_vo.GaussianSearchDistribution()  # of sigma

flags.DEFINE_integer("seed", 0, "Seed of weights, batches and noise.")
flags.DEFINE_string("plot_dir", "out", "gradient_variance.png; empty: none.")
flags.DEFINE_integer(
    "population_size", 8, "Members N of the populations of (a) and (c)."
)
flags.DEFINE_list(
    "sigmas", ["0.01", "0.03", "0.1", "0.3", "1", "3"], "Sigmas of (a)."
)
flags.DEFINE_integer("repeats", 32768, "Populations for each point of (a).")
flags.DEFINE_integer("epochs", 8, "Epochs that the network of (b) is trained.")
flags.DEFINE_float("stddev", 0.1, "Sigma in training, (b) and (c).")
flags.DEFINE_list("population_sizes", ["8", "32", "128"], "N of (b).")
flags.DEFINE_integer(
    "members", 4096, "Members evaluated for each point of (b), at least 2 N."
)
flags.DEFINE_list(
    "batch_sizes", ["1", "4", "16", "64", "256"], "|B| of (c), at most 256."
)
flags.DEFINE_integer("batches", 64, "Batches for each point of (c).")
flags.DEFINE_integer(
    "samples", 4096, "Draws that the predictions of (b) and (c) are made from."
)

UNITS = (64, 32, 10)
POOL = 256  # images that batches are made of
STEP = 64  # members of a training step in (c)
STYLES = {
    "iid": {"color": "tab:blue", "marker": "o", "linestyle": "-"},
    "iid, baseline": {"color": "tab:orange", "marker": "s", "linestyle": "-"},
    "antithetic": {"color": "tab:green", "marker": "^", "linestyle": "--"},
}


class Row(NamedTuple):
    """A measured variance and its prediction.

    Attributes:
        quantity: whose variance it is, with the weights where it is taken.
        estimator: how the population is drawn.
        setting: sigma, N or |B|.
        predicted: from the equation.
        measured: from populations.
        error: standard error of measured / predicted.
    """

    quantity: str
    estimator: str
    setting: float
    predicted: float
    measured: float
    error: float

    @property
    def ratio(self):
        return self.measured / self.predicted


def make_row(quantity, estimator, setting, predicted, measured):
    """A row from two pairs of a value and its standard error."""
    errors = [error / value for value, error in (predicted, measured)]
    error = measured[0] / predicted[0] * math.hypot(*errors)
    return Row(quantity, estimator, setting, predicted[0], measured[0], error)


def variance(samples):
    """The variance of `samples` [n, d], summed over d, and its error."""
    squares = ((samples - samples.mean(0)) ** 2).sum(1)
    count = len(samples)
    scale = count / (count - 1)
    return squares.mean() * scale, squares.std() * scale / math.sqrt(count)


def search_gradients(losses, noise, sigma, baseline=False):
    """dU/dmu and dU/dbeta (a beta for each weight) of many populations.

    Args:
        losses: [populations, N]; if N is twice the number of draws, members n
            and n + N/2 are an antithetic pair.
        noise: z [populations, draws, d].
        sigma: a number.
        baseline: whether losses are shaped by "identity", or not at all.

    Returns:
        Arrays [populations, d] by name.
    """
    size = losses.shape[1]
    antithetic = size != noise.shape[1]
    utilities = tf.transpose(tf.convert_to_tensor(losses))
    if baseline:
        utilities = fitness_shaping.identity(utilities, antithetic)
    by_sign = tf.reshape(utilities, [1 + antithetic, noise.shape[1], -1])
    odd, even = map(
        tf.transpose,
        estimators.pair_utilities(tf.transpose(by_sign, [1, 0, 2])),
    )
    distribution = keras_vo.GaussianSearchDistribution("separable")
    layout = distribution.layout([noise[0, 0]])
    return {
        "dU/dmu": estimators.mean_gradient(
            estimators.weighted_noise(noise, odd), sigma, size
        ).numpy(),
        "dU/dbeta": estimators.log_variance_gradient(
            estimators.weighted_excess(noise, even, layout), size
        ).numpy(),
    }


# --- (a) one weight ---


def parabola(w):
    return (w**2 + 1) / 2


def univariate_variances(sigma, size):
    """The exact variances of dU/dmu, and eq. 5, for f = f' = f'' = 1."""
    return {
        "iid": (1 / sigma**2 + 2 + 3 + 15 / 4 * sigma**2) / size,
        "iid, baseline": (
            2 * size / (size - 1) + sigma**2 * (2.5 + 0.5 / (size - 1))
        )
        / size,
        "antithetic": 4 / size,
        "iid by eq. 5": (1 / sigma**2 + 2) / size,
    }


def measure_univariate(sigmas, size, repeats, rng):
    rows = []
    for sigma in sigmas:
        exact = univariate_variances(sigma, size)
        for estimator in ("iid", "iid, baseline", "antithetic"):
            pairs = estimator == "antithetic"
            draws = size // 2 if pairs else size
            noise = rng.standard_normal((repeats, draws, 1))
            signed = np.concatenate([noise, -noise], 1) if pairs else noise
            gradients = search_gradients(
                parabola(1 + sigma * signed[..., 0]),
                noise,
                sigma,
                baseline="baseline" in estimator,
            )
            measured = variance(gradients["dU/dmu"])
            rows.extend(
                make_row("dU/dmu", name, sigma, (value, 0.0), measured)
                for name, value in exact.items()
                if name.removesuffix(" by eq. 5") == estimator
            )
    return rows


# --- the network, in NumPy: many weights at once ---


def load_data(rng):
    """Images [n, 64] in [0, 1] and labels [n], shuffled."""
    images, labels = load_digits(return_X_y=True)
    order = rng.permutation(len(images))
    return images[order].astype("float32") / 16, labels[order]


def flatten(weights):
    return np.concatenate([np.ravel(w) for w in weights])


def unflatten(vectors):
    """[n, d] to the two layers' kernels [n, in, out] and biases [n, 1, out]."""
    inputs, hidden, outputs = UNITS
    shapes = [(inputs, hidden), (1, hidden), (hidden, outputs), (1, outputs)]
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    parts = np.split(vectors, ends[:-1], axis=1)
    return [
        part.reshape(-1, *shape)
        for part, shape in zip(parts, shapes, strict=True)
    ]


def cross_entropy(logits, labels):
    """[n, images, 10] and [images] to [n, images]."""
    logits = logits - logits.max(-1, keepdims=True)
    chosen = np.take_along_axis(logits, labels[None, :, None], -1)[..., 0]
    return np.log(np.exp(logits).sum(-1)) - chosen


def network_losses(vectors, x, y):
    """The loss of each image under each of `vectors` [n, d]: [n, images]."""
    w1, b1, w2, b2 = unflatten(vectors)
    return cross_entropy(np.maximum(x @ w1 + b1, 0) @ w2 + b2, y)


def perturbed_losses(mean, sigma, noise, x, y):
    """The losses [n, images] at mean + sigma * noise, noise [n, d]."""
    chunks = np.array_split(noise, math.ceil(len(noise) / 512))  # for memory
    return np.concatenate(
        [network_losses(mean + np.float32(sigma) * z, x, y) for z in chunks]
    )


def make_model(layer, sigma, optimizer_class=keras_vo.VOOptimizer, **kwargs):
    """The MLP 64-32-10 with dense layers of a class, compiled."""
    model = keras_vo.VOSequential(
        [
            keras.Input(UNITS[:1]),
            layer(UNITS[1], activation="relu"),
            layer(UNITS[2]),
        ]
    )
    model.compile(
        optimizer=optimizer_class(
            search_distribution=keras_vo.GaussianSearchDistribution(
                "fixed", stddev=sigma
            ),
            fitness_shaping="identity",
            **kwargs,
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


def train(x, y, epochs, sigma, seed):
    """Weights before, half way through and after training, by name."""
    model = make_model(
        keras_vo.layers.LocalReparamDense,
        sigma,
        inner_optimizer=keras.optimizers.Adam(0.005),
        population_size=16,
        seed=seed,
    )
    means = {"initial": flatten(model.get_weights())}
    half = epochs // 2
    for state, count in (("half way", half), ("trained", epochs - half)):
        model.fit(x, y, epochs=count, batch_size=32, verbose=0)
        means[state] = flatten(model.get_weights())
    return means


# --- (b) antithetic pairs ---


class Moments(NamedTuple):
    """Of a loss f (less its mean, for a baseline) and a score s, per draw.

    Attributes:
        second: f^2 |s|^2 of each draw of the sample, [samples].
        first: |E[f s]|^2.
        scale: E[f^2] E[|s|^2].
    """

    second: np.ndarray
    first: float
    scale: float

    @classmethod
    def of(cls, losses, scores, baseline):
        if baseline:
            losses = losses - losses.mean()
        norms = (scores**2).sum(1)
        return cls(
            losses**2 * norms,
            ((losses @ scores / len(losses)) ** 2).sum(),
            (losses**2).mean() * norms.mean(),
        )

    def variance(self, draws, baseline):
        """Of 1/n sum (f - b) s over n independent draws, and its error.

        With b the mean of the others' f it is the covariance of a sample, and
        its variance has terms of order 1/n^2.
        """
        value = (self.second.mean() - self.first) / draws
        if baseline:
            value += (self.first + self.scale) / (draws * (draws - 1))
        return value, self.second.std() / math.sqrt(len(self.second)) / draws

    def over(self, examples):
        """Those of a mean over independent examples."""
        return Moments(*(value / examples for value in self))


def single_draw_moments(losses, mirrored, noise, sigma):
    """Moments by (quantity, antithetic, baseline), from draws z.

    Args:
        losses: f(mu + sigma z) [samples].
        mirrored: f(mu - sigma z).
        noise: z [samples, d].
        sigma: a number.
    """
    scores = {"dU/dmu": noise / sigma}
    scores["dU/dbeta"] = (noise**2 - 1) / 2
    # g_e: the score of mu is odd in z, that of beta even.
    parts = {
        "dU/dmu": (losses - mirrored) / 2,
        "dU/dbeta": (losses + mirrored) / 2,
    }
    return {
        (quantity, antithetic, baseline): Moments.of(
            parts[quantity] if antithetic else losses, score, baseline
        )
        for quantity, score in scores.items()
        for antithetic in (False, True)
        for baseline in (False, True)
        if (quantity, antithetic, baseline) != ("dU/dmu", True, True)
    }


def draw_populations(mean, sigma, images, repeats, size, antithetic, rng):
    """Losses [repeats, size], and the noise [repeats, draws, d]."""
    draws = size // 2 if antithetic else size
    noise = rng.standard_normal((repeats * draws, mean.size), dtype="float32")
    losses = [
        perturbed_losses(mean, sign * sigma, noise, *images).mean(1)
        for sign in ((1, -1) if antithetic else (1,))
    ]
    losses = [part.reshape(repeats, draws) for part in losses]
    return np.concatenate(losses, 1), noise.reshape(repeats, draws, -1)


def measure_pairs(means, sigma, images, sizes, members, samples, rng):
    """Rows for each state of the network, estimator and N.

    Args:
        means: mu [d] by the name of the state.
        sigma: a number.
        images: x and y.
        sizes: the N; the last is that of dU/dbeta.
        members: how many are evaluated for each point.
        samples: how many draws the predictions are made from.
        rng: the source of noise.
    """
    rows = []
    for state, mean in means.items():
        losses, noise = draw_populations(
            mean, sigma, images, 1, 2 * samples, True, rng
        )
        moments = single_draw_moments(*np.split(losses[0], 2), noise[0], sigma)
        for size, antithetic in itertools.product(sizes, (False, True)):
            losses, noise = draw_populations(
                mean, sigma, images, members // size, size, antithetic, rng
            )
            gradients = {
                baseline: search_gradients(losses, noise, sigma, baseline)
                for baseline in (False, True)
            }
            for (quantity, paired, baseline), moment in moments.items():
                if paired != antithetic or (
                    quantity == "dU/dbeta" and size != sizes[-1]
                ):
                    continue
                estimator = "antithetic" if antithetic else "iid"
                rows.append(
                    make_row(
                        f"{quantity}, {state}",
                        estimator + ", baseline" * baseline,
                        size,
                        moment.variance(noise.shape[1], baseline),
                        variance(gradients[baseline][quantity]),
                    )
                )
    return rows


# --- (c) mini-batches ---


def shared_moments(losses, noise, sigma, batch):
    """Moments of U and of dU/dmu, where a batch shares its noise (eq. 25).

    Averaged over the pool's images, for what an image has by itself, and over
    its pairs of images.

    Args:
        losses: f_b(mu + sigma z) [samples, images].
        noise: z [samples, d].
        sigma: a number.
        batch: |B|.
    """
    images = losses.shape[1]
    losses = losses - losses.mean(0)

    def blend(singles, mean):
        """From mean_b q(b, b) and q(mean, mean) to Var and Cov in eq. 25."""
        pairs = (images * mean - singles) / (images - 1)
        return singles / batch + (batch - 1) / batch * pairs

    squares = blend((losses**2).mean(1), losses.mean(1) ** 2)
    expected = losses.T @ noise / (len(noise) * sigma)
    norms = (noise**2).sum(1) / sigma**2
    return {
        "U": Moments(squares, 0.0, 0.0),
        "dU/dmu": Moments(
            squares * norms,
            blend((expected**2).sum(1).mean(), (expected.mean(0) ** 2).sum()),
            squares.mean() * norms.mean(),
        ),
    }


def local_moments(mean, sigma, x, y, draws, rng):
    """Moments of an image's dU/dmu, where activations are perturbed.

    The mean over the images of x (eq. 28-31).
    """
    w1, b1, w2, b2 = (w[0] for w in unflatten(mean[None]))

    def perturbed(a, kernel, bias):
        xi = rng.standard_normal((draws, len(x), bias.size), dtype="float32")
        v = sigma**2 * ((a**2).sum(-1, keepdims=True) + 1)
        return a @ kernel + bias + np.sqrt(v) * xi, xi, xi / np.sqrt(v)

    z1, xi1, score1 = perturbed(x, w1, b1)
    hidden = np.maximum(z1, 0)
    z2, xi2, score2 = perturbed(hidden, w2, b2)
    losses = cross_entropy(z2, y)
    losses = losses - losses.mean(0)
    norms = ((xi1**2).sum(-1) + (xi2**2).sum(-1)) / sigma**2
    # E[f_b score], by layer: A is 1 for the bias.
    expected1 = (losses[..., None] * score1).mean(0)
    expected2 = np.einsum(
        "nb,nbi,nbj->bij",
        losses,
        np.concatenate([hidden, np.ones_like(hidden[..., :1])], -1),
        score2,
        optimize=True,
    ) / len(losses)
    first = ((x**2).sum(-1) + 1) * (expected1**2).sum(-1)
    first = first + (expected2**2).sum((1, 2))
    return Moments(
        (losses**2 * norms).mean(1),
        first.mean(),
        ((losses**2).mean(0) * norms.mean(0)).mean(),
    )


class RecordingOptimizer(keras_vo.VOOptimizer):
    """Keeps what the last step evaluated: `generation`."""

    def take_step(self, *args, **kwargs):
        report = super().take_step(*args, **kwargs)
        self.generation = keras_vo.Generation.of(report.losses)
        return report


def make_step(layer, mean, sigma, seed):
    """A training step that always starts at the same mean.

    Returns:
        From x and y of a batch to the losses of STEP iid members and the
        search gradient of mu, with a baseline: SGD(1.0) moves mu by it.
    """
    model = make_model(
        layer,
        sigma,
        RecordingOptimizer,
        inner_optimizer=keras.optimizers.SGD(1.0),
        population_size=STEP,
        examples_population_size=STEP,
        natural_gradient=False,
        antithetic=False,
        seed=seed,
    )
    weights = zip(unflatten(mean[None]), model.get_weights(), strict=True)
    model.set_weights([part.reshape(old.shape) for part, old in weights])
    model.optimizer.build(model.trainable_variables)
    before = [tf.constant(v) for v in model.trainable_variables]

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, UNITS[0]]),
            tf.TensorSpec([None], tf.int64),
        ],
        autograph=False,
    )
    def step(x, y):
        model.train_step((x, y))
        moved = []
        for variable, value in zip(
            model.trainable_variables, before, strict=True
        ):
            moved.append(tf.reshape(value - variable, [-1]))
            variable.assign(value)
        return model.optimizer.generation.losses, tf.concat(moved, 0)

    return step


def step_variances(step, size, batches):
    """Variances of U and dU/dmu between steps on the same batch.

    Args:
        step: see `make_step`.
        size: N of the populations that U is estimated by: parts of a step's.
        batches: images and labels of each.

    Returns:
        For either, the mean over the batches and its standard error.
    """
    variances = {"U": [], "dU/dmu": []}
    for x, y in batches:
        losses, gradients = zip(*(step(x, y) for _ in range(2)), strict=True)
        bounds = np.stack(losses)[:, : STEP // size * size]
        bounds = bounds.reshape(-1, size).mean(1)
        variances["U"].append(bounds.var(ddof=1))
        difference = gradients[0].numpy() - gradients[1].numpy()
        variances["dU/dmu"].append((difference**2).sum() / 2)
    return {
        name: (np.mean(values), np.std(values, ddof=1) / len(values) ** 0.5)
        for name, values in variances.items()
    }


def measure_batches(mean, sigma, images, size, sizes, batches, samples, rng):
    """Rows for shared noise and for noise of each example, and each |B|.

    Args:
        mean: mu [d].
        sigma: a number.
        images: x and y of the pool that batches are drawn from.
        size: N, for U; that of the gradient is STEP.
        sizes: the |B|.
        batches: how many are measured for each |B|.
        samples: how many draws the predictions are made from.
        rng: the source of noise and batches.
    """
    x, y = images
    noise = rng.standard_normal((samples, mean.size), dtype="float32")
    losses = perturbed_losses(mean, sigma, noise, x, y)
    single = {
        "U": shared_moments(losses, noise, sigma, 1)["U"],
        "dU/dmu": local_moments(mean, sigma, x, y, samples // 8, rng),
    }
    rows = []
    for estimator, layer in (
        ("shared noise", keras.layers.Dense),
        ("noise of each example", keras_vo.layers.LocalReparamDense),
    ):
        step = make_step(layer, mean, sigma, int(rng.integers(2**31)))
        for batch in sizes:
            if layer is keras.layers.Dense:
                moments = shared_moments(losses, noise, sigma, batch)
            else:
                moments = {k: m.over(batch) for k, m in single.items()}
            drawn = [rng.permutation(len(x))[:batch] for _ in range(batches)]
            measured = step_variances(
                step, size, [(x[chosen], y[chosen]) for chosen in drawn]
            )
            predicted = {
                "U": moments["U"].variance(size, baseline=False),
                "dU/dmu": moments["dU/dmu"].variance(STEP, baseline=True),
            }
            rows.extend(
                make_row(name, estimator, batch, predicted[name], value)
                for name, value in measured.items()
            )
    return rows


# --- results ---


def print_rows(title, setting, rows):
    """A table, all settings of one estimator together."""
    print(f"\n{title}")
    order = {}
    for row in rows:
        order.setdefault((row.quantity, row.estimator), len(order))
    rows = sorted(rows, key=lambda row: order[row.quantity, row.estimator])
    widths = [
        max(len(getattr(row, name)) for row in rows)
        for name in ("quantity", "estimator")
    ]
    print(
        f"{'variance of':<{widths[0]}}  {'estimator':<{widths[1]}}  "
        f"{setting:>5}  {'predicted':>9}  {'measured':>9}  ratio"
    )
    for row in rows:
        print(
            f"{row.quantity:<{widths[0]}}  {row.estimator:<{widths[1]}}  "
            f"{row.setting:>5g}  {row.predicted:>9.3g}  {row.measured:>9.3g}"
            f"  {row.ratio:.3f} +- {row.error:.3f}"
        )


def columns(rows, quantity, estimator):
    """Settings, predictions, measurements, and two standard errors of them."""
    chosen = sorted(
        (row.setting, row.predicted, row.measured, 2 * row.error)
        for row in rows
        if (row.quantity, row.estimator) == (quantity, estimator)
    )
    settings, predicted, measured, errors = np.array(chosen).T
    return settings, predicted, measured, predicted * errors


def draw(axes, curve, settings, measured, errors, label=None, **style):
    """Measured points on a predicted curve; in the legend as one."""
    style = {"lw": 1, "markerfacecolor": "none", "markersize": 5} | style
    axes.plot(*curve, label=label, markevery=[], **style)
    style["linestyle"] = "none"
    axes.errorbar(settings, measured, errors, elinewidth=1, **style)


def plot_univariate(axes, rows, size):
    ends = sorted(row.setting for row in rows)
    sigmas = np.geomspace(ends[0], ends[-1], 200)
    exact = univariate_variances(sigmas, size)
    for estimator, style in STYLES.items():
        settings, _, *measured = columns(rows, "dU/dmu", estimator)
        curve = np.broadcast_to(exact[estimator], sigmas.shape)
        draw(axes, (sigmas, curve), settings, *measured, estimator, **style)
    axes.plot(sigmas, exact["iid by eq. 5"], "k:", label="iid by eq. 5")
    axes.set(
        title=f"(a) One weight, f = (w\u00b2 + 1) / 2 at w = 1, N = {size}",
        xlabel="sigma (in units of the weight)",
        ylabel="variance of dU/d\u03bc, (loss / weight)\u00b2",
        xscale="log",
        yscale="log",
    )
    axes.legend(frameon=False)


def plot_pairs(upper, lower, rows):
    """All estimators; below, times N, those without the mean of f."""
    colors = {
        "initial": "tab:purple",
        "half way": "tab:red",
        "trained": "tab:cyan",
    }
    for state, color in colors.items():
        for estimator, style in STYLES.items():
            style = style | {"color": color}
            sizes, *values = columns(rows, f"dU/dmu, {state}", estimator)
            predicted, *measured = values
            draw(upper, (sizes, predicted), sizes, *measured, **style)
            if estimator != "iid":
                predicted, *measured = (sizes * value for value in values)
                draw(lower, (sizes, predicted), sizes, *measured, **style)
        upper.plot([], [], color=color, label=state)
    for estimator, style in STYLES.items():
        style = style | {"color": "black", "markerfacecolor": "none", "lw": 1}
        upper.plot([], [], label=estimator, **style)
    upper.set(
        title="(b) MLP 64-32-10 on 64 digits, dU/d\u03bc",
        ylabel="total variance, (loss / weight)\u00b2",
        xscale="log",
        yscale="log",
    )
    upper.set_ylim(top=300 * upper.get_ylim()[1])  # for the legend
    upper.legend(frameon=False, ncols=2)
    upper.tick_params(labelbottom=False)
    lower.set(
        xlabel="members N", ylabel="N \u00d7 total variance", xscale="log"
    )
    lower.set_ylim(bottom=0)
    for axes in (upper, lower):
        only_ticks(axes, sizes)


def plot_batches(axes, rows):
    """In units of the variance of one example with shared noise."""
    for (quantity, symbol), (estimator, color) in itertools.product(
        (("U", "U"), ("dU/dmu", "dU/d\u03bc")),
        (
            ("shared noise", "tab:blue"),
            ("noise of each example", "tab:orange"),
        ),
    ):
        unit = columns(rows, quantity, "shared noise")[1][0]
        sizes, *values = columns(rows, quantity, estimator)
        predicted, *measured = (value / unit for value in values)
        # The equations are linear in 1/|B|.
        fine = np.geomspace(sizes[0], sizes[-1], 200)
        curve = np.interp(-1 / fine, -1 / sizes, predicted)
        style = STYLES["iid" if quantity == "U" else "antithetic"]
        draw(
            axes,
            (fine, curve),
            sizes,
            *measured,
            f"{symbol}, {estimator}",
            **style | {"color": color},
        )
    axes.set(
        title="(c) Mini-batches of digits, initial MLP",
        xlabel="examples in the batch |B|",
        ylabel=f"variance / variance with shared noise at |B| = {sizes[0]:g}",
        xscale="log",
        yscale="log",
    )
    only_ticks(axes, sizes)
    axes.legend(frameon=False)


def only_ticks(axes, values):
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.minorticks_off()


def plot(univariate, pairs, batches, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = plt.figure(figsize=(15, 5.5), layout="constrained")
    grid = figure.add_gridspec(2, 3, height_ratios=(3, 2))
    left, right = (figure.add_subplot(grid[:, i]) for i in (0, 2))
    upper, lower = (figure.add_subplot(grid[i, 1]) for i in (0, 1))
    plot_univariate(left, univariate, FLAGS.population_size)
    plot_pairs(upper, lower, pairs)
    plot_batches(right, batches)
    for axes in (left, upper, lower, right):
        axes.grid(alpha=0.3)
    figure.suptitle(
        "Variance of search gradients. Lines: predicted; "
        "points: measured, with two standard errors"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def checked(name, valid, expected):
    """The value of a flag, which must be valid; so must a list's items."""
    value = FLAGS[name].value
    items = value if isinstance(value, list) else [value]
    if not items or not all(map(valid, items)):
        received = ",".join(map(str, items))
        raise app.UsageError(
            f"Expected --{name} to be {expected}. Received: --{name}={received}"
        )
    return value


def checked_flags():
    """Checks all flags; returns sigmas, population sizes and batch sizes."""

    least, greatest = _BOUNDS.min_stddev, _BOUNDS.max_stddev

    def is_sigma(text):
        try:
            return least <= float(text) <= greatest
        except ValueError:
            return False

    def between(low, high, step=1):
        numbers = range(low, high + 1, step)
        return lambda text: str(text).isdecimal() and int(text) in numbers

    checked("seed", between(0, 2**31 - 1), "in [0, 2^31)")
    checked("stddev", is_sigma, f"in [{least:g}, {greatest:g}]")
    checked("epochs", between(2, 10**6), "at least 2")
    for name in ("repeats", "members", "batches", "samples"):
        checked(name, between(16, 10**9), "at least 16")
    checked("population_size", between(2, STEP, 2), f"even and in [2, {STEP}]")
    half = FLAGS.members // 2
    sigmas = checked(
        "sigmas", is_sigma, f"numbers in [{least:g}, {greatest:g}]"
    )
    population_sizes = checked(
        "population_sizes",
        between(4, half, 2),
        f"even integers in [4, {half}], half of --members",
    )
    batch_sizes = checked(
        "batch_sizes", between(1, POOL), f"integers in [1, {POOL}]"
    )
    return (
        sorted(set(map(float, sigmas))),
        sorted(set(map(int, population_sizes))),
        sorted(set(map(int, batch_sizes))),
    )


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Expected flags only. Received: {argv[1:]}")
    logging.set_verbosity(logging.WARNING)
    sigmas, population_sizes, batch_sizes = checked_flags()
    seed, sigma, size = FLAGS.seed, FLAGS.stddev, FLAGS.population_size
    keras.utils.set_random_seed(seed)
    rngs = [np.random.default_rng([seed, stream]) for stream in range(4)]
    x, y = load_data(rngs[0])

    univariate = measure_univariate(sigmas, size, FLAGS.repeats, rngs[1])
    print_rows(
        f"(a) f(w) = (w^2 + 1) / 2 at w = 1, N = {size}", "sigma", univariate
    )
    means = train(x, y, FLAGS.epochs, sigma, seed)
    pairs = measure_pairs(
        means,
        sigma,
        (x[:64], y[:64]),
        population_sizes,
        FLAGS.members,
        FLAGS.samples,
        rngs[2],
    )
    losses = ", ".join(
        f"{network_losses(mean[None], x[:64], y[:64]).mean():.3g} {state}"
        for state, mean in means.items()
    )
    print_rows(
        f"(b) MLP 64-32-10, sigma = {sigma:g}; loss at mu: {losses}",
        "N",
        pairs,
    )
    batches = measure_batches(
        means["initial"],
        sigma,
        (x[:POOL], y[:POOL]),
        size,
        batch_sizes,
        FLAGS.batches,
        FLAGS.samples,
        rngs[3],
    )
    print_rows(
        f"(c) initial MLP, N = {size} for U, N = {STEP} for dU/dmu",
        "|B|",
        batches,
    )
    if FLAGS.plot_dir:
        path = pathlib.Path(FLAGS.plot_dir) / "gradient_variance.png"
        plot(univariate, pairs, batches, path)
        print(f"\nplot  {path}")


if __name__ == "__main__":
    app.run(main)
