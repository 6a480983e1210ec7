"""What several workers cost and gain: bytes, times and a model of both.

Workers are processes of one core each on this machine; the network is the
loopback device. One JSON line a cell.

    python benchmarks/replicas.py                       # all of them
    python benchmarks/replicas.py --cells=bytes

Cells:
    bytes           sent over the network a step and worker
    efficiency      time of one worker over twice that of two, which share the
                    population and have the same batch: the same total work
    reconstruction  time to draw and sum the noise again, and to all-reduce a
                    gradient instead
    model           keras_vo.exchange.CostModel, fitted to times of steps, of
                    reconstructions and of all-reduces; and to half of the
                    steps, to predict the others
"""

import json
import os
import socket
import subprocess
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import scipy.optimize
import tensorflow as tf
from absl import app, flags, logging

import keras_vo
from keras_vo.exchange import CostModel
from keras_vo.search.chunks import ChunkPlan, NoiseSource
from keras_vo.search.credit import reduce_noise
from keras_vo.search.members import Members

FLAGS = flags.FLAGS
flags.DEFINE_list(
    "cells",
    ["bytes", "efficiency", "reconstruction", "model"],
    "What to measure.",
)
flags.DEFINE_integer("repeats", 15, "Timed steps of each kind in a process.")
flags.DEFINE_integer("rounds", 3, "Times that processes take turns.")
flags.DEFINE_string("jobs", None, "Internal: what a worker measures, JSON.")

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
# Numbers of weights: 784 h + h + 10 h + 10.
HIDDEN = {13: 10345, 64: 50890, 128: 101770, 512: 407050}


_TIMES = ("overhead", "latency")  # of the cost model; the others are rates


# --- in a worker ---


def make_model(network, hidden, **arguments):
    keras.utils.set_random_seed(0)
    layers = [
        keras.Input((784,)),
        keras.layers.Dense(hidden, activation="relu"),
        keras.layers.Dense(10),
    ]
    if network == "cnn":
        layers = [
            keras.Input((28, 28, 1)),
            keras.layers.Conv2D(8, 5, strides=2, activation="relu"),
            keras.layers.Conv2D(16, 5, strides=2, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(10),
        ]
    model = keras_vo.VOSequential(layers)
    model.compile(
        optimizer=keras_vo.VOOptimizer(seed=0, **arguments), loss=LOSS
    )
    model.optimizer.build(model.trainable_variables)
    return model


def sent_bytes():
    """Of the loopback device since the machine was started."""
    with open("/proc/net/dev", encoding="ascii") as file:
        (line,) = [row for row in file if row.strip().startswith("lo:")]
    return int(line.split(":")[1].split()[8])


def timed(function, repeats):
    """Median seconds of a call, and bytes of the device a call."""
    for _ in range(2):
        function()
    before = sent_bytes()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return float(np.median(times)), (sent_bytes() - before) / repeats


def step_job(strategy, network="mlp", hidden=128, batch=128, **arguments):
    """A training step, on the same batch in all workers."""
    with strategy.scope():
        model = make_model(network, hidden, **arguments)
    generator = np.random.default_rng(0)
    x = generator.normal(size=(batch, *model.input_shape[1:]))
    data = (
        tf.constant(x, tf.float32),
        tf.constant(generator.integers(0, 10, batch)),
    )

    @tf.function
    def step():
        return strategy.run(lambda: model.train_step(data)["loss"])

    return lambda: strategy.experimental_local_results(step())[0].numpy()


def reconstruct_job(strategy, size, draws):
    """Draws all noise again, and sums it."""
    plan = ChunkPlan.make(draws, 2, 4 * size, 2**29, None)
    utilities = tf.random.normal([draws])

    @tf.function
    def reconstruct(generation):
        members = Members.of_generation(
            tf.constant(0), generation, 2 * draws, antithetic=True
        )
        return reduce_noise(
            NoiseSource(plan, members, size, tf.float32),
            lambda noise, _, rows: [
                tf.linalg.matvec(noise.weights, rows[0], True)
            ],
            [utilities],
        )[0]

    return lambda: reconstruct(tf.constant(1)).numpy()


def all_reduce_job(strategy, size):
    """Sums as many numbers over the workers."""
    values = tf.random.normal([size])

    @tf.function
    def total():
        return strategy.run(
            lambda: tf.distribute.get_replica_context().all_reduce(
                "SUM", values
            )
        )

    return lambda: strategy.experimental_local_results(total())[0].numpy()


JOBS = {
    "step": step_job,
    "reconstruct": reconstruct_job,
    "all_reduce": all_reduce_job,
}


def work(jobs):
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(2)
    strategy = (
        tf.distribute.MultiWorkerMirroredStrategy()
        if os.environ.get("TF_CONFIG")
        else tf.distribute.get_strategy()
    )
    results = []
    for job in jobs:
        job = dict(job)
        repeats = job.pop("repeats", FLAGS.repeats)
        function = JOBS[job.pop("job")](strategy, **job)
        results.append(timed(function, repeats))
    print("RESULT" + json.dumps(results), flush=True)


# --- in the parent ---


def measure(workers, jobs):
    """[seconds, bytes of all workers] of each job, in new processes."""
    servers = [socket.create_server(("localhost", 0)) for _ in range(workers)]
    addresses = [f"localhost:{s.getsockname()[1]}" for s in servers]
    for server in servers:
        server.close()
    processes = []
    for index in range(workers):
        environment = dict(os.environ)
        if workers > 1:
            environment["TF_CONFIG"] = json.dumps(
                {
                    "cluster": {"worker": addresses},
                    "task": {"type": "worker", "index": index},
                }
            )
        processes.append(
            subprocess.Popen(
                [
                    *("taskset", "-c", str(index % os.cpu_count())),
                    *(sys.executable, __file__),
                    f"--jobs={json.dumps(jobs)}",
                    f"--repeats={FLAGS.repeats}",
                ],
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError(f"Expected results. Received: {outputs}")
    return json.loads(outputs[0].split("RESULT")[1])


def show(cell, rows):
    for row in rows:
        print(json.dumps({"cell": cell} | row), flush=True)


def bytes_cell():
    jobs = [
        {
            "job": "step",
            "hidden": hidden,
            "population_size": size,
            "exchange": exchange,
            "batch": 8,
            "repeats": 8,
        }
        for exchange in ("fitness", "gradient")
        for size, hidden in [(32, 13), (512, 13), (32, 128), (32, 512)]
    ]
    for job, (_, sent) in zip(jobs, measure(2, jobs), strict=True):
        yield {
            "exchange": job["exchange"],
            "N": job["population_size"],
            "d": HIDDEN[job["hidden"]],
            "bytes": round(sent / 2),
        }


def efficiency_cell():
    cases = {
        "MLP 784-128-10": {"population_size": 512, "batch": 128},
        "CNN": {"network": "cnn", "population_size": 512, "batch": 128},
    }
    for name, case in cases.items():
        for exchange in ("auto", "fitness"):  # auto: gradient, here
            job = {"job": "step", "exchange": exchange} | case
            ratios, times = [], []
            for _ in range(FLAGS.rounds):
                (one, _), *_ = measure(1, [job])
                (two, _), *_ = measure(2, [job])
                ratios.append(one / (2 * two))
                times.append((one, two))
            one, two = np.median(times, axis=0)
            yield {
                "network": name,
                "exchange": exchange,
                "one_ms": round(1e3 * one, 1),
                "two_ms": round(1e3 * two, 1),
                "efficiency": round(float(np.median(ratios)), 2),
                "range": [round(min(ratios), 2), round(max(ratios), 2)],
            }


def reconstruction_cell(draws=16):
    sizes = [10**4, 10**5, 10**6, 10**7]
    again = measure(
        1,
        [
            {"job": "reconstruct", "size": s, "draws": draws, "repeats": 5}
            for s in sizes
        ],
    )
    reduced = measure(2, [{"job": "all_reduce", "size": s} for s in sizes])
    for size, (one, _), (two, sent) in zip(sizes, again, reduced, strict=True):
        yield {
            "d": size,
            "draws": draws,
            "reconstruction_ms": round(1e3 * one, 2),
            "all_reduce_ms": round(1e3 * two, 2),
            "bytes": round(sent / 2),
        }


def model_cell(draws=16):
    """Fits on all times; then on every other step, to predict the rest."""
    cases = [
        (workers, exchange, size, hidden, batch)
        for hidden in (13, 64, 128, 512)
        for size, batch in [(32, 128), (128, 32), (128, 128), (256, 64)]
        for workers, exchange in [
            (1, "fitness"),
            (2, "fitness"),
            (2, "gradient"),
        ]
    ]
    sizes = [10**4, 10**5, 10**6]
    parts = {
        1: [{"job": "reconstruct", "size": n, "draws": draws} for n in sizes],
        2: [{"job": "all_reduce", "size": n} for n in sizes],
    }
    steps, others = [], []
    for workers in (1, 2):
        own = [case for case in cases if case[0] == workers]
        jobs = [
            {
                "job": "step",
                "exchange": exchange,
                "population_size": size,
                "hidden": hidden,
                "batch": batch,
            }
            for _, exchange, size, hidden, batch in own
        ]
        seconds = [t for t, _ in measure(workers, jobs + parts[workers])]
        steps += zip(own, seconds[: len(own)], strict=True)
        others += zip(sizes, seconds[len(own) :], strict=True)

    def step(case):
        workers, exchange, size, hidden, batch = case
        return lambda costs: costs.step(
            exchange, size, HIDDEN[hidden], batch, workers
        )

    def rows(cases_and_seconds):
        return [(step(case), t) for case, t in cases_and_seconds]

    reconstructions, all_reduces = others[: len(sizes)], others[len(sizes) :]
    components = [
        (lambda c, n=n: draws * n * (1 / c.normals + 1 / c.sums), t)
        for n, t in reconstructions
    ] + [(lambda c, n=n: c.message(n, 2), t) for n, t in all_reduces]
    fitted = fit(rows(steps) + components)
    of_half = fit(rows(steps[::2]) + components)
    for index, (case, seconds) in enumerate(steps):
        workers, exchange, size, hidden, batch = case
        yield {
            "workers": workers,
            "exchange": exchange,
            "N": size,
            "d": HIDDEN[hidden],
            "batch": batch,
            "ms": round(1e3 * seconds, 1),
            "error": round(step(case)(fitted) / seconds - 1, 3),
            "of_half": round(step(case)(of_half) / seconds - 1, 3),
            "held_out": index % 2 == 1,
        }
    yield {"model": {k: float(f"{v:.3g}") for k, v in vars(fitted).items()}}


def fit(rows):
    """The cost model with the least sum of squares of relative errors.

    Times are linear in the overhead, the latency and the inverse of each rate,
    which are not negative.

    Args:
        rows: pairs of a function from a CostModel to seconds, and seconds.
    """
    names = list(vars(CostModel()))
    free = {name: 0.0 if name in _TIMES else np.inf for name in names}
    single = [CostModel(**free | {name: 1.0}) for name in names]
    solution, _ = scipy.optimize.nnls(
        np.array([[f(costs) / t for costs in single] for f, t in rows]),
        np.ones(len(rows)),
    )
    with np.errstate(divide="ignore"):
        return CostModel(
            **{
                name: float(x if name in _TIMES else 1 / x)
                for name, x in zip(names, solution, strict=True)
            }
        )


CELLS = {
    "bytes": bytes_cell,
    "efficiency": efficiency_cell,
    "reconstruction": reconstruction_cell,
    "model": model_cell,
}


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Expected flags only. Received: {argv[1:]}")
    logging.set_verbosity(logging.WARNING)
    tf.get_logger().setLevel("ERROR")
    if FLAGS.jobs:
        work(json.loads(FLAGS.jobs))
        return
    for cell in FLAGS.cells:
        show(cell, CELLS[cell]())


if __name__ == "__main__":
    app.run(main)
