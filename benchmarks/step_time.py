"""Time and memory of one step through `train_on_batch`: 784-128-10, |B| = 128.

Beside it stands the same step written straight in TensorFlow: noise in one
draw, `tf.vectorized_map` over antithetic pairs, a weighted sum. Both run in
one process, taking turns. Peak memory is that of a process of its own, which
runs steps of keras_vo alone. One JSON line a cell.

    python benchmarks/step_time.py
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
from keras_vo.evaluation import graph
from keras_vo.search.chunks import ChunkPlan, NoiseSource
from keras_vo.search.credit import MEMBER
from keras_vo.search.estimators import weighted_excess, weighted_noise
from keras_vo.search.layout import WeightLayout
from keras_vo.search.members import Members

FLAGS = flags.FLAGS
flags.DEFINE_list("population_sizes", ["256", "1024", "16384"], "Cells.")
flags.DEFINE_integer("compare_up_to", 1024, "Largest N of the plain step.")
flags.DEFINE_integer("repeats", 15, "Timed steps of each kind.")
flags.DEFINE_enum("child", None, ["time", "parts", "memory"], "Internal.")

UNITS = (784, 128, 10)
BATCH = 128
STDDEV = 0.05


def make_batch():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(BATCH, UNITS[0])).astype("float32")
    return x, generator.integers(0, UNITS[-1], size=(BATCH, 1))


def keras_vo_step(population_size):
    """One step of keras_vo with its defaults, on a model of `UNITS`."""
    keras.utils.set_random_seed(0)
    model = keras_vo.VOSequential(
        [
            keras.Input(UNITS[:1]),
            keras.layers.Dense(UNITS[1], activation="relu"),
            keras.layers.Dense(UNITS[2]),
        ]
    )
    model.compile(
        optimizer=keras_vo.VOOptimizer(population_size=population_size),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    x, y = make_batch()
    return lambda: model.train_on_batch(x, y)


def tensorflow_step(population_size):
    """The same step without keras_vo: mu only, plain gradient descent."""
    x, y = (tf.constant(array) for array in make_batch())
    y = tf.reshape(y, [-1])
    shapes = [UNITS[:2], UNITS[1:2], UNITS[1:], UNITS[2:]]
    generator = np.random.default_rng(0)
    mean = [
        tf.Variable(generator.normal(size=s).astype("float32") * 0.05)
        for s in shapes
    ]
    pairs = population_size // 2
    step_count = tf.Variable(0)

    def loss(weights):
        hidden = tf.nn.relu(x @ weights[0] + weights[1])
        logits = hidden @ weights[2] + weights[3]
        return tf.reduce_mean(
            tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits)
        )

    @tf.function
    def step():
        weights = [tf.convert_to_tensor(m) for m in mean]
        noise = [
            tf.random.stateless_normal([pairs, *s], seed=[step_count, i])
            for i, s in enumerate(shapes)
        ]
        plus, minus = tf.vectorized_map(
            lambda z: (
                loss([m + STDDEV * e for m, e in zip(weights, z, strict=True)]),
                loss([m - STDDEV * e for m, e in zip(weights, z, strict=True)]),
            ),
            noise,
        )
        losses = tf.concat([plus, minus], axis=0)
        ranks = tf.argsort(tf.argsort(losses))
        utilities = tf.cast(ranks, tf.float32) / (population_size - 1) - 0.5
        weighting = utilities[:pairs] - utilities[pairs:]
        for m, z in zip(mean, noise, strict=True):
            gradient = tf.tensordot(weighting, z, 1)
            m.assign_sub(1e-4 * gradient / (population_size * STDDEV))
        step_count.assign_add(1)
        return tf.reduce_mean(losses)

    return lambda: step().numpy()


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure_time(population_size):
    steps = {"keras_vo": keras_vo_step(population_size)}
    if population_size <= FLAGS.compare_up_to:
        steps["tensorflow"] = tensorflow_step(population_size)
    first = {name: seconds(step) for name, step in steps.items()}
    repeats = FLAGS.repeats if population_size <= FLAGS.compare_up_to else 3
    times = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            times[name].append(seconds(step))
    medians = {k: float(np.median(v)) for k, v in times.items()}
    row = {"keras_vo_ms": round(1e3 * medians["keras_vo"], 1)}
    if "tensorflow" in medians:
        row["tensorflow_ms"] = round(1e3 * medians["tensorflow"], 1)
        ratios = np.divide(times["keras_vo"], times["tensorflow"])
        row["ratio"] = round(float(np.median(ratios)), 3)
    compiling = first["keras_vo"] - medians["keras_vo"]
    row["compile_s"] = round(compiling, 2)
    return row


def measure_parts(population_size):
    """Where a step's time goes: times of ever longer beginnings of a step."""
    x, y = (tf.constant(array) for array in make_batch())
    pairs = population_size // 2
    shapes = (UNITS[:2], UNITS[1:2], UNITS[1:], UNITS[2:])
    layout = WeightLayout(shapes, ("float32",) * 4, (0, 0, 1, 1))
    plan = ChunkPlan.make(pairs, 2, 4 * layout.size, 2**29, None)
    mean = tf.random.stateless_normal([layout.size], [0, 0]) * STDDEV
    calls = tf.Variable(0)

    def loss(vector):
        w = layout.unflatten(vector)
        hidden = tf.nn.relu(x @ w[0] + w[1])
        return tf.reduce_mean(
            tf.nn.sparse_softmax_cross_entropy_with_logits(
                tf.reshape(y, [-1]), hidden @ w[2] + w[3]
            )
        )

    def source():
        calls.assign_add(1)
        members = Members.of_generation(
            tf.constant(0), calls, population_size, antithetic=True
        )
        return NoiseSource(plan, members, layout.size, tf.float32)

    @tf.function
    def draw():
        noise = source()
        return tf.while_loop(
            lambda i, _: i < plan.chunks,
            lambda i, t: (i + 1, t + tf.reduce_sum(noise.chunk(i).weights)),
            (tf.constant(0), 0.0),
        )

    def gradient(noise, records, rows):
        return [
            weighted_noise(noise.weights, rows[0]),
            weighted_excess(noise.weights, rows[0], layout),
        ]

    def member(noise, sign):
        return {MEMBER: loss(mean + sign * STDDEV * noise.weights)}, ()

    def evaluate():
        return graph.evaluate(member, source())

    @tf.function
    def with_gradient():
        population = evaluate()
        losses = population.losses[MEMBER]
        return population.reduce(gradient, [losses[:pairs] - losses[pairs:]])

    parts = {
        "noise_ms": draw,
        "evaluation_ms": tf.function(lambda: evaluate().losses[MEMBER]),
        "gradient_ms": with_gradient,
        "rest_ms": keras_vo_step(population_size),
    }
    times = {name: [] for name in parts}
    for repeat in range(FLAGS.repeats + 1):
        for name, part in parts.items():
            elapsed = seconds(part)
            if repeat:  # the first call traces
                times[name].append(elapsed)
    medians = [1e3 * float(np.median(values)) for values in times.values()]
    ends = zip(parts, np.diff(medians, prepend=0.0), strict=True)
    return {name: round(float(part), 1) for name, part in ends}


def measure_memory(population_size):
    step = keras_vo_step(population_size)
    for _ in range(3):
        step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"peak_mib": round(peak)}


def main(argv):
    del argv
    sizes = [int(size) for size in FLAGS.population_sizes]
    if FLAGS.child:
        measure = {
            "time": measure_time,
            "parts": measure_parts,
            "memory": measure_memory,
        }
        print(json.dumps(measure[FLAGS.child](sizes[0])))
        return
    for size in sizes:
        row = {
            "network": "-".join(map(str, UNITS)),
            "batch": BATCH,
            "population_size": size,
        }
        children = ["time", "parts", "memory"]
        if size > FLAGS.compare_up_to:
            children.remove("parts")
        for child in children:
            command = [*sys.argv, f"--child={child}"]
            command += [f"--population_sizes={size}"]
            output = subprocess.run(
                [sys.executable, *command],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            ).stdout
            row |= json.loads(output.splitlines()[-1])
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    app.run(main)
