"""Where each exchange wins, and where more workers no longer help.

Simulates steps of 1 to 10,000 workers of one core with the cost model that
`benchmarks/replicas.py --cells=model` is fitted by: one population of fixed
size, each worker with a batch of its own, networks of 1, 10 and 100 Gbit/s.

    python benchmarks/scaling.py                # table, and scaling.png

`ring` is the all-reduce that TensorFlow uses between CPUs, whose latency grows
with the number of workers; `tree` has 2 log2(R) messages one after another.
"""

import dataclasses
import math
import pathlib

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from absl import app, flags

from keras_vo.exchange import CostModel

matplotlib.use("agg")

FLAGS = flags.FLAGS
_COSTS = CostModel()
flags.DEFINE_integer("population_size", 10_000, "Members of all workers.")
flags.DEFINE_integer("batch_size", 128, "Examples of each worker.")
flags.DEFINE_list("weights", ["1e4", "1e6", "1e8"], "Numbers of weights d.")
flags.DEFINE_list("gigabits", ["1", "10", "100"], "Of the network, a second.")
flags.DEFINE_float("normals", _COSTS.normals, "Drawn a second and worker.")
flags.DEFINE_float("sums", _COSTS.sums, "Of noise, a second and worker.")
flags.DEFINE_float("perturbed", _COSTS.perturbed, "Weights made a second.")
flags.DEFINE_float(
    "evaluation", _COSTS.evaluation, "Weights times examples a second."
)
flags.DEFINE_float("overhead", _COSTS.overhead, "Seconds of a step.")
flags.DEFINE_float("latency", _COSTS.latency, "Seconds of a message.")
flags.DEFINE_float(
    "software_bandwidth",
    4.7e8,
    "Bytes a second of TensorFlow's all-reduce on a network without end.",
)
flags.DEFINE_string(
    "plot", "benchmarks/scaling.png", "Where the plot goes; empty: nowhere."
)

WORKERS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000]
EXCHANGES = ("fitness", "gradient")


def step_seconds(exchange, weights, gigabits, workers, tree=False):
    latency = FLAGS.latency
    if tree and workers > 1:  # in place of R - 1 messages
        latency *= math.log2(workers) / (workers - 1)
    costs = CostModel(
        FLAGS.normals,
        FLAGS.sums,
        FLAGS.perturbed,
        FLAGS.evaluation,
        FLAGS.overhead,
        latency,
        1 / (8 / (gigabits * 1e9) + 1 / FLAGS.software_bandwidth),
    )
    return costs.step(
        exchange, FLAGS.population_size, weights, FLAGS.batch_size, workers
    )


@dataclasses.dataclass
class Curve:
    """Step times by number of workers, and what they say."""

    seconds: np.ndarray

    @property
    def speedup(self):
        return self.seconds[0] / self.seconds

    def summary(self):
        """Best number of workers, its speedup, last one of efficiency 1/2."""
        best = int(np.argmin(self.seconds))
        efficient = self.speedup / np.array(WORKERS) >= 0.5
        last = WORKERS[int(np.flatnonzero(efficient)[-1])]
        return WORKERS[best], float(self.speedup[best]), last


def curves(weights, gigabits, tree):
    return {
        exchange: Curve(
            np.array(
                [
                    step_seconds(exchange, weights, gigabits, r, tree)
                    for r in WORKERS
                ]
            )
        )
        for exchange in EXCHANGES
    }


def wins(both):
    """Numbers of workers, more than one, for which fitness is cheaper."""
    cheaper = both["fitness"].seconds <= both["gradient"].seconds
    won = [r for r, w in zip(WORKERS, cheaper, strict=True) if w and r > 1]
    return f"{won[0]} to {won[-1]}" if won else "never"


def print_table(all_weights, all_gigabits):
    print("best R (speed-up): largest R of which half the speed is ideal")
    print(
        "| d | Gbit/s | all-reduce | fitness is cheaper | fitness | gradient |"
    )
    for weights in all_weights:
        for gigabits in all_gigabits:
            for tree in (False, True):
                both = curves(weights, gigabits, tree)
                cells = [
                    f"{best} ({speedup:.3g}x): {last}"
                    for best, speedup, last in (
                        both[exchange].summary() for exchange in EXCHANGES
                    )
                ]
                print(
                    f"| {weights:.0e} | {gigabits:g} | "
                    f"{'tree' if tree else 'ring'} | {wins(both)} | "
                    f"{' | '.join(cells)} |"
                )


def plot(all_weights, all_gigabits, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, rows = plt.subplots(
        len(all_weights),
        len(all_gigabits),
        figsize=(4 * len(all_gigabits), 3.2 * len(all_weights)),
        squeeze=False,
        sharex=True,
    )
    for weights, row in zip(all_weights, rows, strict=True):
        for gigabits, axes in zip(all_gigabits, row, strict=True):
            for tree, style in ((False, "-"), (True, ":")):
                for (exchange, curve), color in zip(
                    curves(weights, gigabits, tree).items(),
                    ("tab:blue", "tab:orange"),
                    strict=True,
                ):
                    axes.loglog(
                        WORKERS,
                        curve.seconds,
                        style,
                        color=color,
                        label=f"{exchange}, {'tree' if tree else 'ring'}",
                    )
            ideal = curves(weights, gigabits, False)["gradient"].seconds[0]
            axes.loglog(
                WORKERS,
                ideal / np.array(WORKERS),
                color="tab:gray",
                lw=0.8,
                label="ideal",
            )
            axes.set_title(f"d = {weights:.0e}, {gigabits:g} Gbit/s")
            axes.grid(alpha=0.3)
    for axes in rows[-1]:
        axes.set_xlabel("workers")
    for row in rows:
        row[0].set_ylabel("seconds a step")
    rows[0][0].legend(frameon=False, fontsize=8)
    figure.suptitle(
        f"Simulated: {FLAGS.population_size} members a step, batches of "
        f"{FLAGS.batch_size}, one core a worker"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Expected flags only. Received: {argv[1:]}")
    all_weights = [int(float(d)) for d in FLAGS.weights]
    all_gigabits = [float(g) for g in FLAGS.gigabits]
    print_table(all_weights, all_gigabits)
    if FLAGS.plot:
        plot(all_weights, all_gigabits, pathlib.Path(FLAGS.plot))


if __name__ == "__main__":
    app.run(main)
