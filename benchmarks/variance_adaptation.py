"""Does an adapted variance find its way from every initial sigma?

Every variance structure of the search distribution, as it adapts by default
(`keras_vo/search/follow_mean.py`), from initial sigmas that are far too small,
right, and far too large; beside it the same sigmas held fixed. Each run is a
process of its own and one JSON line, with the largest gradient norm over its
median and the range of sigma.

    digits   MLP 64-64-10, |B| = 64, 2000 steps, cosine decay of the rate
    local    MNIST MLP 784-128-10 of LocalReparamDense layers, N = 16,
             |B| = 256, `--seconds` of training (or `--steps`)
    cnn      the MNIST network of `thesis_mnist.py`, N = 100, |B| = 200,
             300 generations, cosine decay

    python benchmarks/variance_adaptation.py --task=digits --seeds=0,1,2,3,4
    python benchmarks/variance_adaptation.py --table

The second makes a table and `variance_adaptation.png` of the runs.
"""

import json
import os
import statistics
import subprocess
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_vo

FLAGS = flags.FLAGS
VARIANCES = ("fixed", "isotropic", "layerwise", "separable")
STDDEVS = {
    "digits": (0.001, 0.01, 0.05, 0.2, 1.0),
    "local": (0.005, 0.05, 0.5),
    "cnn": (0.005, 0.05, 0.5),
}
flags.DEFINE_enum("task", "digits", list(STDDEVS), "What is trained.")
flags.DEFINE_string("mnist", None, "Path of mnist.npz, for local and cnn.")
flags.DEFINE_list("variances", list(VARIANCES), "Structures to run.")
flags.DEFINE_list("stddevs", None, "Initial sigmas; none: those of the task.")
flags.DEFINE_list("seeds", ["0"], "Seeds of each.")
flags.DEFINE_float(
    "seconds", 60.0, "Seconds of training, for local without --steps."
)
flags.DEFINE_integer("steps", 0, "Steps; 0: those of the task.")
flags.DEFINE_string("out", "runs.jsonl", "File of JSON lines, added to.")
flags.DEFINE_bool("table", False, "Print a table of the file, draw a plot.")
flags.DEFINE_string("plot_dir", "benchmarks", "Where the plot goes.")
flags.DEFINE_string("child", None, "Internal: variance:stddev:seed.")


class Watch(keras.callbacks.Callback):
    """Notes gradient norms and sigma; stops after some seconds."""

    def __init__(self, optimizer, seconds=None):
        super().__init__()
        self.norms, self.sigmas, self.layers = [], [], []
        self._norm = tf.Variable(0.0)
        self._optimizer, self._seconds = optimizer, seconds
        apply = optimizer.inner_optimizer.apply

        def watched(gradients, variables):
            self._norm.assign(tf.linalg.global_norm(gradients))
            return apply(gradients, variables)

        optimizer.inner_optimizer.apply = watched

    def on_train_batch_end(self, batch, logs=None):
        self.norms.append(float(self._norm))
        if len(self.norms) == 1:
            self._start = time.perf_counter()  # the first step compiles
        if len(self.norms) % 20 == 1:
            stddevs = [np.ravel(s) for s in self._optimizer.stddevs]
            # Of each layer's first weights, the geometric mean.
            self.layers = [
                float(f"{np.exp(np.log(s).mean()):.3g}") for s in stddevs[::2]
            ]
            self.sigmas += [s.min() for s in stddevs]
            self.sigmas += [s.max() for s in stddevs]
        elapsed = time.perf_counter() - self._start
        if self._seconds and elapsed > self._seconds:
            self.model.stop_training = True

    def summary(self):
        return {
            "steps": len(self.norms),
            "norm_ratio": max(self.norms) / statistics.median(self.norms),
            "sigma_min": float(min(self.sigmas)),
            "sigma_max": float(max(self.sigmas)),
            "sigma_end": self.layers,
        }


def mlp(layer, units):
    hidden = [layer(n, activation="relu") for n in units[1:-1]]
    return keras_vo.VOSequential(
        [keras.Input(units[:1]), *hidden, layer(units[-1])]
    )


def mnist():
    with np.load(FLAGS.mnist) as data:
        return (
            data["x_train"].reshape(-1, 784).astype("float32") / 255,
            data["x_test"].reshape(-1, 784).astype("float32") / 255,
            data["y_train"],
            data["y_test"],
        )


def digits():
    x, y = load_digits(return_X_y=True)
    data = train_test_split(
        x.astype("float32") / 16,
        y,
        test_size=0.2,
        stratify=y,
        random_state=0,
    )
    steps = FLAGS.steps or 2000
    optimizer = {
        "inner_optimizer": keras.optimizers.Adam(
            keras.optimizers.schedules.CosineDecay(0.02, steps)
        ),
    }
    model = mlp(keras.layers.Dense, (64, 64, 10))
    return model, data, 64, steps, None, optimizer


def local():
    optimizer = {
        "inner_optimizer": keras.optimizers.Adam(0.005),
        "population_size": 16,
        "fitness_shaping": "identity",
    }
    model = mlp(keras_vo.layers.LocalReparamDense, (784, 128, 10))
    steps = FLAGS.steps or 10**6
    seconds = None if FLAGS.steps else FLAGS.seconds
    return model, mnist(), 256, steps, seconds, optimizer


def cnn():
    import thesis_mnist

    steps = FLAGS.steps or 300
    optimizer = {
        "inner_optimizer": keras.optimizers.Adam(
            keras.optimizers.schedules.CosineDecay(0.02, steps)
        ),
        "population_size": 100,
    }
    x, y, x_test, y_test = thesis_mnist.load(FLAGS.mnist)
    data = (x, x_test, y, y_test)
    return thesis_mnist.make_network(), data, 200, steps, None, optimizer


def run(variance, stddev, seed):
    keras.utils.set_random_seed(seed)
    model, data, batch, steps, seconds, optimizer = globals()[FLAGS.task]()
    x, x_test, y, y_test = data
    vo = keras_vo.VOOptimizer(
        search_distribution=keras_vo.GaussianSearchDistribution(
            variance, stddev
        ),
        seed=seed,
        **optimizer,
    )
    model.compile(
        optimizer=vo,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    vo.build(model.trainable_variables)
    watch = Watch(vo, seconds)
    batches = tf.data.Dataset.from_tensor_slices((x, y)).cache()
    batches = batches.shuffle(len(x), seed=seed).repeat().batch(batch)
    start = time.perf_counter()
    model.fit(batches, steps_per_epoch=steps, verbose=0, callbacks=[watch])
    elapsed = time.perf_counter() - start
    accuracy = model.evaluate(x_test, y_test, batch_size=1000, verbose=0)[1]
    return {
        "task": FLAGS.task,
        "variance": variance,
        "stddev": stddev,
        "seed": seed,
        "accuracy": round(accuracy, 4),
        "seconds": round(elapsed, 1),
        **watch.summary(),
    }


def run_all():
    stddevs = FLAGS.stddevs or STDDEVS[FLAGS.task]
    waiting = [
        f"--child={variance}:{stddev}:{seed}"
        for seed in FLAGS.seeds
        for stddev in stddevs
        for variance in FLAGS.variances
    ]
    for child in waiting:
        output = subprocess.run(
            [sys.executable, *sys.argv, child],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout
        line = output.splitlines()[-1]
        print(line, flush=True)
        with open(FLAGS.out, "a") as file:
            file.write(line + "\n")


def grouped(runs):
    """Tasks, each a dict from (variance, sigma) to its runs."""
    tasks = {}
    for run in runs:
        cells = tasks.setdefault(run["task"], {})
        cells.setdefault((run["variance"], run["stddev"]), []).append(run)
    return tasks


def print_table(runs):
    for task, cells in grouped(runs).items():
        stddevs = sorted({stddev for _, stddev in cells})
        print(f"\n| {task}: sigma_0 |", *(f"{s:g} |" for s in stddevs), end="")
        print(" gradient norm, largest / median | sigma |")
        print("|---" * (len(stddevs) + 3) + "|")
        for variance in VARIANCES:
            row = [cells.get((variance, stddev), []) for stddev in stddevs]
            of_all = [run for cell in row for run in cell]
            if not of_all:
                continue
            texts = [_accuracy([r["accuracy"] for r in cell]) for cell in row]
            ratio = max(run["norm_ratio"] for run in of_all)
            least = min(run["sigma_min"] for run in of_all)
            most = max(run["sigma_max"] for run in of_all)
            texts += [f"{ratio:.1f}", f"{least:.2g} to {most:.2g}"]
            print(f"| {variance} |", " | ".join(texts), "|")


def _mean_accuracy(runs):
    return statistics.mean(run["accuracy"] for run in runs)


def _accuracy(values):
    if not values:
        return "-"
    text = f"{statistics.mean(values):.3f}"
    if len(values) > 1:
        text += f" ({min(values):.3f} to {max(values):.3f})"
    return text


def draw(runs):
    tasks = grouped(runs)
    figure = Figure(figsize=(4 * len(tasks), 3.6), layout="constrained")
    for axes, (task, cells) in zip(
        np.ravel(figure.subplots(1, len(tasks), squeeze=False)),
        tasks.items(),
        strict=True,
    ):
        for index, variance in enumerate(VARIANCES):
            points = sorted(
                (stddev, 100 - 100 * _mean_accuracy(cell))
                for (name, stddev), cell in cells.items()
                if name == variance
            )
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    "s--" if variance == "fixed" else "o-",
                    color=f"C{index}",
                    label=variance,
                )
        axes.set(xscale="log", xlabel="initial sigma", title=task)
        axes.set(yscale="log", ylabel="test error, %")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    figure.savefig(os.path.join(FLAGS.plot_dir, "variance_adaptation.png"))


def main(argv):
    if FLAGS.child:
        variance, stddev, seed = FLAGS.child.split(":")
        print(json.dumps(run(variance, float(stddev), int(seed))))
        return
    if FLAGS.table:
        with open(FLAGS.out) as file:
            runs = [json.loads(line) for line in file]
        print_table(runs)
        draw(runs)
        return
    run_all()


if __name__ == "__main__":
    app.run(main)
