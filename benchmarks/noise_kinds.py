"""What the kinds of noise cost: time, memory and variance of the gradient.

Every cell is a process of its own; what is compared within a cell takes turns
in one process. One JSON line a cell.

    python benchmarks/noise_kinds.py                  # all of them
    python benchmarks/noise_kinds.py --cells=variance

Cells:
    variance     variance of the search gradient (summed over the weights) of
                 weight-space noise, as a multiple of local reparameterization
    low_rank     a step of full-rank over one of LowRankDense
    local        a step of LocalReparamDense over the same mathematics without
                 Keras and without layers
    chunks       a step of LocalReparamDense in four chunks over one in one
    memory       peak memory of LocalReparamDense as N, |B| and the width grow
"""

import json
import os
import resource
import subprocess
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

import keras_vo
from keras_vo.layers import LocalReparamDense, LowRankDense

FLAGS = flags.FLAGS
flags.DEFINE_list(
    "cells",
    ["variance", "low_rank", "local", "chunks", "memory"],
    "What to measure.",
)
flags.DEFINE_integer("repeats", 15, "Timed steps, or epochs, of each kind.")
flags.DEFINE_integer("steps", 200, "Gradients a variance is taken of.")
flags.DEFINE_string("child", None, "Internal: measure one cell.")

STDDEV = 0.05
KINDS = {
    "full": keras.layers.Dense,
    "low_rank": LowRankDense,
    "local": LocalReparamDense,
}


def make_model(kind, units, **kwargs):
    keras.utils.set_random_seed(0)
    kwargs["examples_population_size"] = kwargs["population_size"]
    layer = KINDS[kind]
    hidden = [layer(n, activation="relu") for n in units[1:-1]]
    model = keras_vo.VOSequential(
        [keras.Input(units[:1]), *hidden, layer(units[-1])]
    )
    model.compile(
        optimizer=keras_vo.VOOptimizer(**kwargs),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


def make_batch(units, batch):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(batch, units[0])).astype("float32")
    return x, generator.integers(0, units[-1], size=batch)


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def medians(functions):
    """Median seconds of each of several functions that take turns."""
    times = {name: [] for name in functions}
    for repeat in range(FLAGS.repeats + 1):
        for name, function in functions.items():
            elapsed = seconds(function)
            if repeat:  # the first call traces
                times[name].append(elapsed)
    return {name: float(np.median(values)) for name, values in times.items()}


def variance(percent):
    """64-32-10, |B| = 256, N = 128, all at the same weights.

    Args:
        percent: scale of the initial weights.
    """
    units, population_size = (64, 32, 10), 128
    x, y = make_batch(units, 256)
    rows = {}
    for name, antithetic, shaping in (
        ("iid", False, lambda losses: losses),
        ("iid_baseline", False, "identity"),
        ("antithetic", True, lambda losses: losses),
        ("antithetic_baseline", True, "identity"),
    ):
        variances = {}
        for kind in ("full", "local"):
            model = make_model(
                kind,
                units,
                inner_optimizer=keras.optimizers.SGD(1.0),
                population_size=population_size,
                search_distribution=keras_vo.GaussianSearchDistribution(
                    "fixed", stddev=STDDEV
                ),
                natural_gradient=False,
                antithetic=antithetic,
                fitness_shaping=shaping,
                seed=0,
            )
            start = [percent / 100 * w for w in model.get_weights()]
            model.set_weights(start)
            gradients = []
            for _ in range(FLAGS.steps):
                model.train_on_batch(x, y)
                gradients.append(
                    np.concatenate(
                        [
                            np.ravel(a - b)
                            for a, b in zip(
                                start, model.get_weights(), strict=True
                            )
                        ]
                    )
                )
                model.set_weights(start)
            variances[kind] = np.var(gradients, axis=0, ddof=1).sum()
        rows[name] = round(float(variances["full"] / variances["local"]), 1)
    return {"percent": percent, "full_over_local": rows}


def low_rank():
    """784-128-10, N = 256, |B| = 128: `train_on_batch`."""
    units = (784, 128, 10)
    x, y = make_batch(units, 128)
    steps = {}
    for kind in ("full", "low_rank"):
        model = make_model(kind, units, population_size=256, seed=0)
        steps[kind] = lambda model=model: model.train_on_batch(x, y)
    times = medians(steps)
    return {
        "full_ms": round(1e3 * times["full"], 1),
        "low_rank_ms": round(1e3 * times["low_rank"], 1),
        "ratio": round(times["full"] / times["low_rank"], 1),
    }


def handwritten_step(units, pairs, batch):
    """Local reparameterization in TensorFlow: fixed sigma, ranks, Adam."""
    generator = np.random.default_rng(0)
    weights = [
        tf.Variable(0.05 * generator.normal(size=s).astype("float32"))
        for s in ((units[0], units[1]), units[1:2], units[1:], units[2:])
    ]
    adam = keras.optimizers.Adam(0.02)
    adam.build(weights)
    count = tf.Variable(0)

    def forward(x, y, xi, sign):
        """Losses [batch], and of the second layer A and v."""
        w1, b1, w2, b2 = weights
        v1 = STDDEV**2 * (tf.reduce_sum(x * x, -1, keepdims=True) + 1)
        hidden = tf.nn.relu(x @ w1 + b1 + sign * tf.sqrt(v1) * xi[0])
        v2 = STDDEV**2 * (tf.reduce_sum(hidden * hidden, -1, keepdims=True) + 1)
        logits = hidden @ w2 + b2 + sign * tf.sqrt(v2) * xi[1]
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits)
        return losses, hidden, v2

    @tf.function
    def step(x, y):
        xi = [
            tf.random.stateless_normal([pairs, batch, n], [count, i])
            for i, n in enumerate(units[1:])
        ]
        losses, hidden, v2 = tf.vectorized_map(
            lambda xi: [
                tf.stack(parts)
                for parts in zip(
                    forward(x, y, xi, 1.0), forward(x, y, xi, -1.0), strict=True
                )
            ],
            xi,
        )
        flat = tf.reshape(losses, [2 * pairs, batch])
        ranks = tf.argsort(tf.argsort(flat, axis=0), axis=0)
        u = tf.cast(ranks, tf.float32) / (2 * pairs - 1) - 0.5
        u = tf.reshape(u, [pairs, 2, batch, 1]) / (2 * pairs * batch)
        v1 = STDDEV**2 * (tf.reduce_sum(x * x, -1, keepdims=True) + 1)
        d1 = tf.reduce_sum((u[:, 0] - u[:, 1]) * xi[0], 0) / tf.sqrt(v1)
        d2 = u * tf.stack([xi[1], -xi[1]], 1) / tf.sqrt(v2)
        d2 = tf.reshape(d2, [-1, units[2]])
        hidden = tf.reshape(hidden, [-1, units[1]])
        gradients = [
            tf.matmul(x, d1, transpose_a=True),
            tf.reduce_sum(d1, 0),
            tf.matmul(hidden, d2, transpose_a=True),
            tf.reduce_sum(d2, 0),
        ]
        adam.apply([STDDEV**2 * g for g in gradients], weights)
        count.assign_add(1)
        return tf.reduce_mean(losses)

    return step


def local():
    """784-128-10, N = 16, |B| = 256: epochs of 100 batches of `fit`."""
    units, batch, batches = (784, 128, 10), 256, 100
    x, y = make_batch(units, batch * batches)
    model = make_model(
        "local",
        units,
        population_size=16,
        search_distribution=keras_vo.GaussianSearchDistribution(
            "fixed", stddev=STDDEV
        ),
        seed=0,
    )
    step = handwritten_step(units, 8, batch)
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(
        batch, drop_remainder=True
    )

    def epoch():
        for x, y in data:
            step(x, y)

    times = medians(
        {
            "fit": lambda: model.fit(
                x, y, batch_size=batch, shuffle=False, verbose=0
            ),
            "handwritten": epoch,
            "handwritten_in_graph": tf.function(epoch),
        }
    )
    fit, *others = times.values()
    return {
        f"{name}_ms": round(1e3 * seconds / batches, 2)
        for name, seconds in times.items()
    } | {"ratio": round(fit / min(others), 2)}


def chunks(population_size, batch):
    """784-128-10: `train_on_batch`; the members of three chunks twice."""
    units = (784, 128, 10)
    x, y = make_batch(units, batch)
    steps = {}
    for count in (1, 4):
        model = make_model(
            "local",
            units,
            population_size=population_size,
            chunk_size=population_size // count,
            seed=0,
        )
        steps[count] = lambda model=model: model.train_on_batch(x, y)
    times = medians(steps)
    return {
        "population_size": population_size,
        "batch": batch,
        "four_ms": round(1e3 * times[4], 1),
        "one_ms": round(1e3 * times[1], 1),
        "ratio": round(times[4] / times[1], 2),
    }


def memory(width, population_size, batch):
    units = (784, width, 10)
    model = make_model("local", units, population_size=population_size, seed=0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    x, y = make_batch(units, batch)
    for _ in range(3):
        model.train_on_batch(x, y)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "width": width,
        "population_size": population_size,
        "batch": batch,
        "step_mib": round(peak - before),
    }


CHILDREN = {
    "variance": [f"variance:{percent}" for percent in (100, 25, 50, 200)],
    "low_rank": ["low_rank"],
    "local": ["local"],
    "chunks": ["chunks:64:256", "chunks:256:256", "chunks:16:4096"],
    "memory": [
        f"memory:{width}:{n}:{batch}"
        for width, n, batch in (
            (128, 16, 256),
            (128, 64, 256),
            (128, 256, 256),
            (128, 16, 1024),
            (1024, 16, 256),
            (4096, 16, 256),
            (4096, 64, 256),
        )
    ],
}


def main(argv):
    del argv
    if FLAGS.child:
        name, *sizes = FLAGS.child.split(":")
        print(json.dumps(globals()[name](*map(int, sizes))))
        return
    for cell in FLAGS.cells:
        for child in CHILDREN[cell]:
            output = subprocess.run(
                [sys.executable, *sys.argv, f"--child={child}"],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            ).stdout
            result = json.loads(output.splitlines()[-1])
            print(json.dumps({"cell": cell} | result), flush=True)


if __name__ == "__main__":
    app.run(main)
