"""Searches Himmelblau's function by three kinds of variational optimization.

f(x, y) = (x^2 + y - 11)^2 + (x + y^2 - 7)^2 has four minima, where it is 0.
An evolution strategy (ES), whose sigma is fixed, comes close to one and then
wanders. Variational optimization (VO) adapts sigma too: by regular gradients,
which grow as sigma falls and throw mu away again, or by natural gradients,
which arrive.

    python examples/himmelblau.py --seeds 20
"""

import os
import pathlib
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf
from absl import app, flags

import keras_vo

matplotlib.use("agg")

FLAGS = flags.FLAGS
_BOUNDS = keras_vo.GaussianSearchDistribution()  # of sigma

flags.DEFINE_list("start", ["0", "0"], "First mu: x,y.")
flags.DEFINE_float("stddev", 1.0, "First sigma.")
flags.DEFINE_integer("steps", 59, "Updates of mu and sigma.")
flags.DEFINE_integer("population_size", 200, "Members a step.")
flags.DEFINE_float("learning_rate", 0.5, "Of mu: SGD.")
flags.DEFINE_float(
    "regular_rate", 0.05, "Learning rate of log sigma^2, regular gradients."
)
flags.DEFINE_float(
    "natural_rate", 0.1, "Learning rate of log sigma^2, natural gradients."
)
flags.DEFINE_enum(
    "fitness_shaping",
    "nes",
    ["identity", "standardize", "centered_rank", "nes"],
    "How losses become utilities.",
)
flags.DEFINE_bool("antithetic", False, "Mirror every perturbation.")
flags.DEFINE_integer("seed", 0, "Seed of the noise; that of the plot.")
flags.DEFINE_integer("seeds", 5, "Searches a method: seed, seed + 1, ...")
flags.DEFINE_string("plot_dir", "out", "himmelblau.png; empty: none.")

MINIMA = np.array(
    [
        [3.0, 2.0],
        [-2.80511809, 3.13131252],
        [-3.77931025, -3.28318599],
        [3.58442834, -1.84812653],
    ]
)


def himmelblau(x, y):
    return (x**2 + y - 11) ** 2 + (x + y**2 - 7) ** 2


def methods():
    """(name, variance, natural gradient, learning rate of log sigma^2)."""
    return (
        ("ES, fixed sigma", "fixed", False, 1.0),
        ("VO, regular gradient", "isotropic", False, FLAGS.regular_rate),
        ("VO, natural gradient", "isotropic", True, FLAGS.natural_rate),
    )


def search(start, variance, natural_gradient, rate):
    """mu and sigma by step, from each seed: [seeds, steps + 1, 3].

    All seeds take the same compiled steps: only variables are set anew.
    """
    mean = tf.Variable(start, dtype=tf.float32)
    optimizer = keras_vo.VOOptimizer(
        keras.optimizers.SGD(FLAGS.learning_rate),
        FLAGS.population_size,
        keras_vo.GaussianSearchDistribution(
            variance, stddev=FLAGS.stddev, learning_rate=rate
        ),
        natural_gradient=natural_gradient,
        antithetic=FLAGS.antithetic,
        fitness_shaping=FLAGS.fitness_shaping,
    )
    optimizer.build([mean])
    variables = [mean, *optimizer.variables]
    initial = [v.numpy() for v in variables]

    @tf.function
    def run():
        path = tf.TensorArray(tf.float32, FLAGS.steps)
        for step in tf.range(FLAGS.steps):
            optimizer.minimize(lambda w: himmelblau(w[0][0], w[0][1]), [mean])
            now = tf.concat([mean, optimizer.stddevs[0][:1]], axis=0)
            path = path.write(step, now)
        return path.stack()

    paths = []
    for seed in range(FLAGS.seed, FLAGS.seed + FLAGS.seeds):
        for variable, value in zip(variables, initial, strict=True):
            variable.assign(value)
        optimizer.base_seed.assign(seed)
        paths.append(np.vstack([[*start, FLAGS.stddev], run().numpy()]))
    return np.array(paths)


def objective(path):
    """f(mu) by step, in float64."""
    return himmelblau(path[..., 0], path[..., 1])


def nearest(point):
    """The minimum that is nearest to a point's mu."""
    return MINIMA[np.linalg.norm(MINIMA - point[:2], axis=1).argmin()]


def summary(paths):
    """What is left after the last step: medians, and the range of f."""
    ends = paths[:, -1]
    values = objective(ends)
    return {
        "objective": np.median(values),
        "least": values.min(),
        "greatest": values.max(),
        "sigma": np.median(ends[:, 2]),
        "distance": np.median(
            [np.linalg.norm(end[:2] - nearest(end)) for end in ends]
        ),
        "position": ends[0, :2],
    }


def plot_trajectory(axes, path, color, center, reach):
    """mu, and sigma as a circle around it every tenth step."""
    x = np.linspace(center[0] - reach, center[0] + reach, 200)
    y = np.linspace(center[1] - reach, center[1] + reach, 200)
    axes.contour(
        x,
        y,
        himmelblau(*np.meshgrid(x, y)),
        levels=np.logspace(-1, 3.5, 19),
        colors="0.65",
        linewidths=0.6,
    )
    axes.plot(
        [],
        [],
        "o",
        mfc="none",
        color=color,
        ms=9,
        label=r"$\sigma$, every 10th step",
    )
    for step in range(0, len(path), 10):
        circle = plt.Circle(
            path[step, :2], path[step, 2], fill=False, color=color, lw=1.2
        )
        axes.add_patch(circle)
    axes.plot(*path[:, :2].T, ".-", color="k", lw=0.8, ms=4, label=r"$\mu$")
    axes.plot(*path[0, :2], "s", color="k", ms=6, label="start")
    axes.plot(*MINIMA.T, "*", color="tab:red", ms=11, label="minima of f")
    axes.set(xlabel="x", ylabel="y", aspect="equal")
    axes.set(xlim=x[[0, -1]], ylim=y[[0, -1]])


def plot_progress(axes, paths, color):
    """The objective of every seed, and sigma of the first."""
    values = objective(paths)
    axes.plot(values[1:].T, color="k", lw=0.8, alpha=0.25)
    (first,) = axes.plot(values[0], color="k", lw=1.5)
    (others,) = axes.plot([], [], color="k", lw=0.8, alpha=0.25)
    axes.set(xlabel="step", ylabel=r"objective $f(\mu)$", yscale="log")
    axes.grid(alpha=0.3)
    right = axes.twinx()
    (sigma,) = right.plot(paths[0, :, 2], color=color, lw=1.5)
    right.set(yscale="log")
    right.set_ylabel(r"$\sigma$", color=color)
    right.tick_params(axis="y", colors=color, which="both")
    names = [r"$f(\mu)$", r"$f(\mu)$, other seeds", r"$\sigma$"]
    axes.legend([first, others, sigma], names, loc="lower left")
    return right


def share_limits(group):
    limits = np.array([axes.get_ylim() for axes in group])
    for axes in group:
        axes.set_ylim(limits[:, 0].min(), limits[:, 1].max())


def plot(results, path):
    """A row a method: the trajectory, its end, and progress by step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, rows = plt.subplots(
        len(results),
        3,
        figsize=(13, 3.9 * len(results)),
        width_ratios=(1, 1, 1.15),
        layout="constrained",
    )
    colors = ("tab:orange", "tab:purple", "tab:blue")
    twins = []
    for (name, paths), color, (left, middle, right) in zip(
        results.items(), colors, rows, strict=True
    ):
        reach = max(6.0, np.abs(paths[0, 0, :2]).max() + 1.0)
        plot_trajectory(left, paths[0], color, (0.0, 0.0), reach)
        plot_trajectory(middle, paths[0], color, nearest(paths[0, -1]), 1.2)
        twins.append(plot_progress(right, paths, color))
        left.set_title(name)
        middle.set_title("close to the minimum")
        right.set_title(rf"$f(\mu)$ = {objective(paths[0, -1]):.2g} at the end")
    share_limits(rows[:, 2])
    share_limits(twins)
    rows[0, 0].legend(loc="lower right", framealpha=0.9)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def print_table(summaries):
    line = "{:<20}  {:>7}  {:>17}  {:>5}  {:>8}  {:>13}"
    heads = ("method", "f(mu)", "range of f(mu)", "sigma", "distance")
    print(line.format(*heads, f"mu, seed {FLAGS.seed}"))
    for name, row in summaries.items():
        print(
            line.format(
                name,
                f"{row['objective']:.2g}",
                f"{row['least']:.2g} to {row['greatest']:.2g}",
                f"{row['sigma']:.2g}",
                f"{row['distance']:.2g}",
                "{:.3g}, {:.3g}".format(*row["position"]),
            )
        )


def check(condition, expected, name):
    if not condition:
        value = FLAGS[name].value
        if isinstance(value, list):
            value = ",".join(value)
        raise app.UsageError(f"Expected {expected}. Received: --{name}={value}")


def checked_start():
    try:
        start = [float(number) for number in FLAGS.start]
    except ValueError:
        start = []
    finite = len(start) == 2 and np.isfinite(start).all()
    check(finite, "two finite numbers, --start=x,y", "start")
    return start


def check_flags():
    least, greatest = _BOUNDS.min_stddev, _BOUNDS.max_stddev
    good = least <= FLAGS.stddev <= greatest
    check(good, f"--stddev in [{least:g}, {greatest:g}]", "stddev")
    for name in ("learning_rate", "regular_rate", "natural_rate"):
        value = FLAGS[name].value
        good = np.isfinite(value) and value > 0
        check(good, f"a positive, finite --{name}", name)
    for name in ("steps", "seeds"):
        check(FLAGS[name].value >= 1, f"--{name} of 1 or more", name)
    check(0 <= FLAGS.seed < 2**63, "--seed in [0, 2^63)", "seed")
    size = FLAGS.population_size
    good = size >= 2 and not (FLAGS.antithetic and size % 2)
    expected = "--population_size of 2 or more, even with --antithetic"
    check(good, expected, "population_size")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Expected flags only. Received: {argv[1:]}")
    check_flags()
    start = checked_start()
    began = time.perf_counter()
    results = {name: search(start, *how) for name, *how in methods()}
    elapsed = time.perf_counter() - began
    summaries = {name: summary(paths) for name, paths in results.items()}
    print(
        f"\nHimmelblau's function from mu = {tuple(start)}, sigma = "
        f"{FLAGS.stddev:g}: {FLAGS.seeds} searches a method,\neach of "
        f"{FLAGS.steps} steps of {FLAGS.population_size} members. Medians "
        "over the seeds after the last step;\ndistance: to the nearest "
        "minimum.\n"
    )
    print_table(summaries)
    print(f"\nsearches  {elapsed:.1f} s")
    if FLAGS.plot_dir:
        path = pathlib.Path(FLAGS.plot_dir) / "himmelblau.png"
        plot(results, path)
        print(f"plot      {path}")


if __name__ == "__main__":
    app.run(main)
