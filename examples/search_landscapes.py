"""Shows what variational optimization (VO) minimises: f, smoothed.

VO minimises U(mu, sigma) = E[f(w)], w ~ N(mu, sigma^2). Two functions of one
variable show how U differs from f:

- a sinc cut into steps, whose derivative is 0 wherever it exists: U is smooth,
  and the greater sigma is, the fewer minima it has;
- a wide, shallow minimum beside a narrow, deep one: at all but small sigma, U
  is least over the wide one. A search that starts in the narrow one, with a
  sigma that sees both, leaves it for the wide one.

U is computed in closed form, to 1e-12. The searches are keras_vo's, by natural
gradients.

    python examples/search_landscapes.py --start 1 --stddev 3
"""

import os
import pathlib
import time
from collections.abc import Callable
from typing import NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf
from absl import app, flags
from scipy.special import ndtr

import keras_vo

matplotlib.use("agg")

FLAGS = flags.FLAGS
_BOUNDS = keras_vo.GaussianSearchDistribution()  # of sigma

flags.DEFINE_float("start", 2.25, "First mu; by default in the narrow minimum.")
flags.DEFINE_float("stddev", 2.0, "First sigma of the search drawn in bold.")
flags.DEFINE_list(
    "stddevs", ["0.1", "0.3", "1.0", "1.5", "4.0"], "Of other searches."
)
flags.DEFINE_integer("steps", 200, "Updates of mu and sigma.")
flags.DEFINE_integer("population_size", 200, "Members a step.")
flags.DEFINE_float(
    "learning_rate", 0.5, "Of mu (SGD) and of log sigma^2: one geometry."
)
flags.DEFINE_integer("seed", 0, "Seed of the noise.")
flags.DEFINE_string("plot_dir", "out", "search_landscapes.png; empty: none.")


# --- the functions and their bounds ---

CELLS = np.arange(-15, 16)  # of width 1; the sinc is 0 beyond them
# The minima a (x - left) (x - right), cut off at 0: (left, right, a).
WIDE = (-4.5, 0.5, 0.2)
NARROW = (2.0, 2.5, 26.0)


def sinc_steps(x):
    """-sin(i)/i at the integer i that is nearest to x."""
    nearest = np.rint(x)
    inside = np.abs(nearest) <= CELLS[-1]
    return np.where(inside, -np.sinc(nearest / np.pi), 0.0)


def sinc_steps_bound(mu, sigma):
    """E[sinc_steps(w)]: each step's value times the mass that falls on it."""
    mu, sigma = np.expand_dims(mu, -1), np.expand_dims(sigma, -1)
    mass = ndtr((CELLS + 0.5 - mu) / sigma) - ndtr((CELLS - 0.5 - mu) / sigma)
    return mass @ sinc_steps(CELLS)


def two_minima(x, minimum=np.minimum):
    """A parabola for each minimum, where it is below 0; else 0."""
    return sum(
        minimum(a * (x - left) * (x - right), 0.0)
        for left, right, a in (WIDE, NARROW)
    )


def two_minima_bound(mu, sigma):
    """E[two_minima(w)], by the moments of the Gaussian between the roots.

    With w = mu + sigma z and p < z < q between the roots, the moments of z
    are m0 = Phi(q) - Phi(p), m1 = phi(p) - phi(q) and
    m2 = m0 + p phi(p) - q phi(q), and (x - left)(x - right) is
    sigma^2 (z - p)(z - q).
    """

    def density(z):
        return np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)

    total = 0.0
    for left, right, a in (WIDE, NARROW):
        p, q = (left - mu) / sigma, (right - mu) / sigma
        m0 = ndtr(q) - ndtr(p)
        m1 = density(p) - density(q)
        m2 = m0 + p * density(p) - q * density(q)
        total = total + a * sigma**2 * (m2 - (p + q) * m1 + p * q * m0)
    return total


class Landscape(NamedTuple):
    """A function, its bound U, and what is looked at and drawn of them."""

    name: str
    f: Callable
    bound: Callable
    grid: np.ndarray
    sigmas: tuple  # whose U is drawn over f


SINC = Landscape(
    "sinc in steps",
    sinc_steps,
    sinc_steps_bound,
    np.linspace(-20, 20, 2001),
    (0.5, 1.5, 4.0),
)
TWO_MINIMA = Landscape(
    "two minima",
    two_minima,
    two_minima_bound,
    np.linspace(-7, 5, 2401),
    (0.1, 0.5, 2.0),
)


def minima(x, values):
    """Positions and values of the local minima [n, 2]; middles of flat ones."""
    values = np.round(values, 9)  # what differs less is flat
    first = np.flatnonzero(np.diff(values, prepend=np.nan) != 0)
    last = np.append(first[1:], len(values)) - 1
    level = values[first]
    low = 1 + np.flatnonzero(
        (level[1:-1] < level[:-2]) & (level[1:-1] < level[2:])
    )
    return np.column_stack([(x[first] + x[last])[low] / 2, level[low]])


def bound_minima(landscape, sigma):
    """The local minima of U(., sigma) over mu, as `minima` gives them."""
    return minima(landscape.grid, landscape.bound(landscape.grid, sigma))


def width(landscape, position):
    """Length of the interval around a minimum where f < 0."""
    x = landscape.grid
    outside = x[landscape.f(x) >= 0]
    left, right = outside[outside < position], outside[outside > position]
    return right.min() - left.max()


def which(position):
    """The minimum of `two_minima` that a position lies in."""
    for name, (left, right, _) in (("wide", WIDE), ("narrow", NARROW)):
        if left < position < right:
            return name
    return "neither"


def last_sigma(condition, low, high):
    """Where a condition that holds from `low` on ceases to, by bisection."""
    for _ in range(40):
        middle = np.sqrt(low * high)
        low, high = (middle, high) if condition(middle) else (low, middle)
    return low


def least(sigma):
    """Position and value of the least U(., sigma) of `two_minima`."""
    values = two_minima_bound(TWO_MINIMA.grid, sigma)
    return TWO_MINIMA.grid[values.argmin()], values.min()


def narrow_is_least(sigma):
    return which(least(sigma)[0]) == "narrow"


def narrow_has_a_minimum(sigma):
    return bound_minima(TWO_MINIMA, sigma)[-1, 0] > WIDE[1]


# --- the search ---


def search(stddev):
    """mu and sigma by step, [steps + 1, 2], on `two_minima`."""
    mean = tf.Variable(FLAGS.start, dtype=tf.float32)
    optimizer = keras_vo.VOOptimizer(
        keras.optimizers.SGD(FLAGS.learning_rate),
        FLAGS.population_size,
        keras_vo.GaussianSearchDistribution(
            "isotropic", stddev=stddev, learning_rate=FLAGS.learning_rate
        ),
        fitness_shaping="identity",  # U is the mean of f, not of its ranks
        seed=FLAGS.seed,
    )
    optimizer.build([mean])

    @tf.function
    def run():
        path = tf.TensorArray(tf.float32, FLAGS.steps)
        for step in tf.range(FLAGS.steps):
            optimizer.minimize(lambda w: two_minima(w[0], tf.minimum), [mean])
            path = path.write(step, tf.stack([mean, *optimizer.stddevs]))
        return path.stack()

    return np.vstack([[FLAGS.start, stddev], run().numpy()])


# --- tables and plots ---


def print_minima():
    print(f"\n{'minima of f':<13}  position        f  width (f < 0)")
    for landscape in (SINC, TWO_MINIMA):
        grid = landscape.grid
        for position, value in minima(grid, landscape.f(grid)):
            print(
                f"{landscape.name:<13}  {position:>8.2f}  {value:>7.4f}  "
                f"{width(landscape, position):>13.2f}"
            )


def print_bound_minima():
    line = "{:>5}  {:<33}  {}"
    print("\nsigma  minima of U over mu:")
    print(line.format("", SINC.name, TWO_MINIMA.name))
    for sigma in (0.1, 0.5, 1.0, 1.5, 2.0, 4.0):
        texts = (
            " ".join(f"{mu:.2f}" for mu, _ in bound_minima(landscape, sigma))
            for landscape in (SINC, TWO_MINIMA)
        )
        print(line.format(sigma, *texts))


def print_searches(paths):
    line = "{:>5}  {:>6}  {:>6}  {:<6}  {:>6}  {:>6}  {:>6}  {:>6}  {}"
    print(f"\n{'first':>5}  {'least U at that sigma':<22}  search ends at")
    heads = ("sigma", "mu", "U", "", "mu", "sigma", "f(mu)", "U", "")
    print(line.format(*heads).rstrip())
    for stddev, path in paths.items():
        best, value = least(stddev)
        mu, sigma = path[-1]
        numbers = (two_minima(mu), two_minima_bound(mu, sigma))
        print(
            line.format(
                f"{stddev:g}",
                f"{best:.2f}",
                f"{value:.3f}",
                which(best),
                f"{mu:.2f}",
                f"{sigma:.3f}",
                *(f"{number:.3f}" for number in numbers),
                which(mu),
            )
        )


def plot_function(axes, landscape):
    """f, and U as a function of mu at some sigma."""
    x = landscape.grid
    axes.plot(x, landscape.f(x), color="k", lw=1.2, label="f(w)")
    shades = plt.get_cmap("plasma")(np.linspace(0.15, 0.8, 3))
    for sigma, color in zip(landscape.sigmas, shades, strict=True):
        label = rf"$U(\mu, \sigma={sigma:g})$"
        values = landscape.bound(x, sigma)
        axes.plot(x, values, color=color, lw=1.4, label=label)
    axes.set(xlabel=r"w or $\mu$", ylabel="f or U", xlim=x[[0, -1]])
    axes.set_title(f"{landscape.name}: f, and U at three sigma")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")


def plot_bound(axes, landscape):
    """Contours of U over mu and sigma, and its minima over mu."""
    x = landscape.grid[::4]
    sigmas = np.geomspace(0.05, 8.0, 120)
    values = landscape.bound(x[None, :], sigmas[:, None]).round(9)
    first, last = np.floor(20 * values.min()), np.ceil(20 * values.max())
    levels = np.arange(first, last + 1) / 20
    shown = axes.contourf(x, sigmas, values, levels, cmap="YlGnBu_r")
    axes.contour(
        x,
        sigmas,
        values,
        levels[levels != 0],  # where f is flat, U is about 0
        colors="0.3",
        linewidths=0.3,
        linestyles="solid",
    )
    axes.figure.colorbar(
        shown,
        ax=axes,
        label=r"$U(\mu, \sigma)$",
        ticks=matplotlib.ticker.MultipleLocator(0.2),
    )
    points = [
        (mu, sigma)
        for sigma in sigmas
        for mu, _ in bound_minima(landscape, sigma)
    ]
    label = r"minima of U over $\mu$"
    axes.plot(*np.transpose(points), "k.", ms=3, label=label)
    axes.set(xlabel=r"$\mu$", ylabel=r"$\sigma$", yscale="log")
    axes.set(xlim=x[[0, -1]], ylim=sigmas[[0, -1]])
    axes.set_yticks([0.05, 0.1, 0.2, 0.5, 1, 2, 5], minor=False)
    axes.set_yticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_title(f"{landscape.name}: U")


def plot_searches(axes, paths, switch):
    """Paths over the contours; squares where they start, dots at the end."""
    for stddev, path in paths.items():
        bold = stddev == FLAGS.stddev
        label = rf"search from $\sigma$ = {stddev:g}" if bold else None
        style = {"color": "tab:red" if bold else "tab:orange"}
        style |= {"zorder": 4 if bold else 3, "markeredgecolor": "k"}
        axes.plot(*path.T, lw=2.5 if bold else 1.3, label=label, **style)
        axes.plot(*path[0], "s", ms=6, **style)
        axes.plot(*path[-1], "o", ms=7, **style)
    axes.plot([], [], color="tab:orange", lw=1.3, label="other searches")
    label = rf"equal minima, $\sigma$ = {switch:.3f}"
    axes.axhline(switch, color="k", ls="--", lw=1, label=label)


def plot(paths, switch, path):
    """A row a function: f and U on the left, contours of U on the right."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, rows = plt.subplots(2, 2, figsize=(12, 9), layout="constrained")
    for (left, right), landscape in zip(rows, (SINC, TWO_MINIMA), strict=True):
        plot_function(left, landscape)
        plot_bound(right, landscape)
    plot_searches(rows[1, 1], paths, switch)
    rows[0, 1].legend(loc="upper left", framealpha=0.9)
    figure.legend(
        *rows[1, 1].get_legend_handles_labels(),
        loc="outside lower right",
        ncols=4,
    )
    figure.savefig(path, dpi=100)
    plt.close(figure)


def check(condition, expected, name):
    if not condition:
        value = FLAGS[name].value
        if isinstance(value, list):
            value = ",".join(value)
        raise app.UsageError(f"Expected {expected}. Received: --{name}={value}")


def check_stddevs(name, *stddevs):
    least, greatest = _BOUNDS.min_stddev, _BOUNDS.max_stddev
    good = all(least <= stddev <= greatest for stddev in stddevs)
    check(good, f"--{name} in [{least:g}, {greatest:g}]", name)


def checked_stddevs():
    try:
        stddevs = [float(number) for number in FLAGS.stddevs]
    except ValueError:
        stddevs = [np.nan]
    check_stddevs("stddevs", *stddevs)
    return sorted({*stddevs, FLAGS.stddev})


def check_flags():
    check(np.isfinite(FLAGS.start), "a finite --start", "start")
    check_stddevs("stddev", FLAGS.stddev)
    rate = FLAGS.learning_rate
    good = np.isfinite(rate) and rate > 0
    check(good, "a positive, finite --learning_rate", "learning_rate")
    check(FLAGS.steps >= 1, "--steps of 1 or more", "steps")
    check(0 <= FLAGS.seed < 2**63, "--seed in [0, 2^63)", "seed")
    size = FLAGS.population_size
    good = size >= 2 and size % 2 == 0
    check(good, "an even --population_size of 2 or more", "population_size")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Expected flags only. Received: {argv[1:]}")
    check_flags()
    stddevs = checked_stddevs()
    tf.get_logger().setLevel("ERROR")  # every search is traced anew
    began = time.perf_counter()
    paths = {stddev: search(stddev) for stddev in stddevs}
    elapsed = time.perf_counter() - began
    switch = last_sigma(narrow_is_least, 0.01, 1.0)
    own = last_sigma(narrow_has_a_minimum, 0.1, 8.0)
    print_minima()
    print_bound_minima()
    print_searches(paths)
    print(
        "\nU is least over the narrow minimum up to sigma = "
        f"{switch:.3f}, over the wide one\nbeyond. The narrow one has a "
        f"minimum of U of its own up to sigma = {own:.2f}.\n"
    )
    print(f"searches  {elapsed:.1f} s")
    if FLAGS.plot_dir:
        path = pathlib.Path(FLAGS.plot_dir) / "search_landscapes.png"
        plot(paths, switch, path)
        print(f"plot      {path}")


if __name__ == "__main__":
    app.run(main)
