"""Trains a controller that another program judges, which may crash or hang.

The objective is `examples/programs/cart_pole.py`, run as a process of its own
for each member: it reads the weights and prints a number. The network is a
Keras model, but is never called here. Members are evaluated at the same time
by the threads of an executor, each of which waits for a process.

    python examples/external_objective.py
    python examples/external_objective.py --crash=0.1 --hang=0.02 --retries=1

With --checkpoint the search is saved after each generation, and a run that was
interrupted goes on where it was.
"""

import concurrent.futures
import multiprocessing
import os
import pathlib
import subprocess
import sys
import time
import warnings

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf
from absl import app, flags, logging

import keras_vo

matplotlib.use("agg")

FLAGS = flags.FLAGS
PROGRAM = pathlib.Path(__file__).parent / "programs" / "cart_pole.py"

flags.DEFINE_integer("population_size", 32, "Members a generation.")
flags.DEFINE_integer("generations", 40, "Generations at most.")
flags.DEFINE_float("cost", 0.05, "Stop at this mean cost of a generation.")
flags.DEFINE_float("learning_rate", 0.1, "Of Adam.")
flags.DEFINE_float("crash", 0.0, "Probability that an evaluation crashes.")
flags.DEFINE_float("hang", 0.0, "Probability that an evaluation hangs.")
flags.DEFINE_float("timeout", 5.0, "Seconds that an evaluation may take.")
flags.DEFINE_integer("retries", 0, "Further tries of one that failed.")
flags.DEFINE_enum(
    "executor",
    "threads",
    ["threads", "processes", "dask"],
    "What runs evaluations: dask is a local cluster.",
)
flags.DEFINE_integer("workers", os.cpu_count(), "Evaluations at the same time.")
flags.DEFINE_integer("seed", 0, "Seed of the weights and of the noise.")
flags.DEFINE_string("checkpoint", "", "Folder of the saved search.")
flags.DEFINE_string("plot_dir", "out", "external_objective.png; empty: none.")


class Objective:
    """The cost of a member: what the program prints.

    Args:
        command: of the program.
        timeout: seconds after which it is killed.
    """

    def __init__(self, command, timeout):
        self.command = command
        self.timeout = timeout

    def __call__(self, weights):
        numbers = np.concatenate([w.ravel() for w in weights])
        done = subprocess.run(
            self.command,
            input=" ".join(map(repr, numbers.tolist())),
            capture_output=True,
            text=True,
            timeout=self.timeout,
        )
        if done.returncode:
            raise RuntimeError(
                f"The program ended with {done.returncode}: {done.stderr!r}"
            )
        return float(done.stdout)


def make_executor():
    """The executor, and a function that ends it."""
    if FLAGS.executor == "dask":
        import distributed

        cluster = distributed.LocalCluster(
            n_workers=1,
            threads_per_worker=FLAGS.workers,
            dashboard_address=None,
        )
        client = distributed.Client(cluster)
        return client.get_executor(), lambda: (client.close(), cluster.close())
    if FLAGS.executor == "threads":
        executor = concurrent.futures.ThreadPoolExecutor(FLAGS.workers)
    else:
        # TensorFlow, which has threads, does not survive a fork.
        context = multiprocessing.get_context("forkserver")
        executor = concurrent.futures.ProcessPoolExecutor(
            FLAGS.workers, context
        )
    return executor, executor.shutdown


def search(executor):
    """The model's weights at the end, and the reports of all generations."""
    keras.utils.set_random_seed(FLAGS.seed)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(5, activation="tanh"),
            keras.layers.Dense(1),
        ]
    )
    variables = model.trainable_variables
    optimizer = keras_vo.VOOptimizer(
        keras.optimizers.Adam(FLAGS.learning_rate),
        population_size=FLAGS.population_size,
        seed=FLAGS.seed,
        keep_best=True,
    )
    optimizer.build(variables)
    saved = tf.train.CheckpointManager(
        tf.train.Checkpoint(weights=variables, optimizer=optimizer),
        FLAGS.checkpoint or "unused",
        max_to_keep=1,
    )
    if FLAGS.checkpoint and saved.restore_or_initialize():
        print(f"goes on after generation {int(optimizer.generations)}")
    command = [sys.executable, str(PROGRAM)]
    command += [f"--crash={FLAGS.crash}", f"--hang={FLAGS.hang}"]
    objective = Objective(command, FLAGS.timeout)
    stop = keras_vo.stop_when(loss_below=FLAGS.cost)
    reports = []
    start = time.perf_counter()
    while int(optimizer.generations) < FLAGS.generations:
        with warnings.catch_warnings():
            # Missing results are in the report, and printed below.
            warnings.simplefilter("ignore")
            optimizer.minimize(
                objective, variables, executor=executor, retries=FLAGS.retries
            )
        report = optimizer.report
        reports.append(report)
        if FLAGS.checkpoint:
            saved.save()
        print(
            f"generation {report.generation:3d}   cost: mean "
            f"{report.mean_loss:.4f}, best {report.best_loss:.4f}   missing "
            f"{report.missing:2d}   sigma {report.sigma:.3f}   "
            f"{time.perf_counter() - start:5.1f} s"
        )
        if stop(report.mean_loss):  # the best member may have been lucky
            print(f"stopped: {stop.reason}")
            break
    print(f"best cost ever {optimizer.best_loss:.4f}")
    clean = Objective([sys.executable, str(PROGRAM)], None)
    mean = clean([v.numpy() for v in variables])
    print(f"cost of the mean of the search {mean:.4f}")
    return reports


def plot(reports, path):
    """Costs and missing results by generation."""
    generations = [report.generation for report in reports]
    figure, (top, bottom) = plt.subplots(
        2, 1, sharex=True, height_ratios=[3, 1], layout="constrained"
    )
    top.plot(generations, [r.mean_loss for r in reports], label="mean")
    top.plot(generations, [r.best_loss for r in reports], label="best")
    top.set_yscale("log")
    top.set_ylabel("cost")
    top.legend()
    bottom.bar(generations, [r.missing for r in reports])
    bottom.set_ylabel("missing")
    bottom.set_xlabel("generation")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"wrote {path}")


def main(argv):
    if argv[1:]:
        raise app.UsageError(f"Expected flags only. Received: {argv[1:]}")
    for name in ("population_size", "generations", "workers"):
        if FLAGS[name].value < 1:
            raise app.UsageError(
                f"Expected --{name} of 1 or more. "
                f"Received: --{name}={FLAGS[name].value}"
            )
    if not 0 <= FLAGS.crash + FLAGS.hang < 1 or FLAGS.crash < 0:
        raise app.UsageError(
            "Expected probabilities --crash and --hang whose sum is below 1. "
            f"Received: --crash={FLAGS.crash} --hang={FLAGS.hang}"
        )
    logging.set_verbosity(logging.WARNING)
    executor, end = make_executor()
    try:
        reports = search(executor)
    finally:
        end()
    if FLAGS.plot_dir and reports:
        plot(reports, pathlib.Path(FLAGS.plot_dir) / "external_objective.png")


if __name__ == "__main__":
    app.run(main)
