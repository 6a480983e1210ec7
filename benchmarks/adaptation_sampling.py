"""What adaptation sampling is worth: from learning rates that are wrong.

    python benchmarks/adaptation_sampling.py             # both parts
    python benchmarks/adaptation_sampling.py --parts=functions

Parts:
    functions   evaluations to 1e-8 on the sphere and the ellipsoid (condition
                1e6) from (3, ..., 3), sigma 1, beside pycma (`pip install cma`)
                with its defaults. The settings are those of separable natural
                evolution strategies: N = 4 + 3 ln d, log-rank utilities, rates
                1 and (3 + ln d) / (5 sqrt d); times .1, 1 and 10.
    digits      64-64-10 on scikit-learn's digits by Adam, whose rate is .1, 1
                and 10 times the default; accuracy on validation images.

Medians over seeds, least and largest.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import math

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags
from sklearn.datasets import load_digits

import keras_vo

FLAGS = flags.FLAGS
flags.DEFINE_list("parts", ["functions", "digits"], "What to measure.")
flags.DEFINE_list("dimensions", ["2", "5", "10", "20", "40"], "Of functions.")
flags.DEFINE_list("factors", ["0.1", "1", "10"], "Of the learning rates.")
flags.DEFINE_list("seeds", ["0", "1", "2", "3", "4"], "Of each cell.")
flags.DEFINE_list("steps", ["50", "150", "300"], "When digits are validated.")
flags.DEFINE_integer("most", 30_000, "Evaluations on a function at most.")

TARGET = 1e-8
_EVERY = 20  # steps of a search between looks at its best member


def scales_of(name, d):
    powers = 6.0 * np.arange(d) / max(d - 1, 1) if name == "ellipsoid" else 0.0
    return np.broadcast_to(10.0**powers, d)


def by_keras_vo(name, d, factor, adapts, seed):
    """Evaluations to the target; infinite if it is not reached."""
    size = 4 + int(3 * math.log(d))
    weights = tf.Variable(np.full(d, 3.0))
    scales = tf.constant(scales_of(name, d))
    rate = factor * (3 + math.log(d)) / (5 * math.sqrt(d))
    optimizer = keras_vo.VOOptimizer(
        keras.optimizers.SGD(factor),
        size,
        keras_vo.GaussianSearchDistribution(
            "separable", 1.0, rate, min_stddev=1e-12, max_stddev=1e12
        ),
        antithetic=False,
        fitness_shaping="nes",
        adaptation_sampling=adapts,
        keep_best=True,
        seed=seed,
    )

    @tf.function
    def steps():
        for _ in tf.range(_EVERY):
            optimizer.minimize(
                lambda w: tf.reduce_sum(scales * tf.square(w[0])), [weights]
            )

    for evaluations in range(_EVERY * size, FLAGS.most, _EVERY * size):
        steps()
        if optimizer.best_loss < TARGET:
            return evaluations
        if not np.all(np.isfinite(weights.numpy())):
            break
    return math.inf


def by_cma(name, d, seed):
    import cma

    scales = scales_of(name, d)
    options = {
        "ftarget": TARGET,
        "maxfevals": FLAGS.most,
        "seed": seed + 1,
        "verbose": -9,
        "tolfun": 0,
        "tolx": 0,
        "tolfunhist": 0,
    }
    search = cma.CMAEvolutionStrategy(np.full(d, 3.0), 1.0, options)
    search.optimize(lambda w: float(np.sum(scales * np.square(w))))
    reached = search.result.fbest < TARGET
    return search.result.evaluations if reached else math.inf


def cell(values):
    values = np.sort(values)
    if np.isinf(values[0]):
        return "-"
    texts = ["-" if np.isinf(v) else f"{v:,.0f}" for v in values]
    return f"{texts[len(texts) // 2]} ({texts[0]} to {texts[-1]})"


def functions():
    seeds = list(map(int, FLAGS.seeds))
    arms = {"pycma": by_cma}
    for factor in map(float, FLAGS.factors):
        for adapts in (False, True):
            name = f"rates times {factor:g}" + (", adapting" * adapts)
            arms[name] = lambda f, d, s, x=factor, a=adapts: by_keras_vo(
                f, d, x, a, s
            )
    for function in ("sphere", "ellipsoid"):
        print(f"\n| {function}, d = | " + " | ".join(FLAGS.dimensions) + " |")
        print("|---" * (1 + len(FLAGS.dimensions)) + "|")
        for name, run in arms.items():
            cells = [
                cell([run(function, int(d), s) for s in seeds])
                for d in FLAGS.dimensions
            ]
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def on_digits(factor, adapts, seed):
    """Validation accuracies, by number of steps; and the last rate."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(seed)
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))[360:]  # not for tests
    order = np.random.default_rng(1 + seed).permutation(order)
    x, y = x[order].astype("float32") / 16, y[order]
    model = keras_vo.VOSequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(10),
        ]
    )
    model.compile(
        optimizer=keras_vo.VOOptimizer(
            keras.optimizers.Adam(0.02 * factor),
            adaptation_sampling=adapts,
            seed=seed,
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    batches = tf.data.Dataset.from_tensor_slices((x[288:], y[288:]))
    batches = batches.shuffle(2000, seed=seed).repeat().batch(256)
    found, done = [], 0
    for steps in map(int, FLAGS.steps):
        part = batches.skip(done).take(steps - done)
        model.fit(part, shuffle=False, verbose=0)
        logits = model.predict(x[:288], verbose=0)
        found.append(float(np.mean(logits.argmax(-1) == y[:288])))
        done = steps
    return [*found, float(model.optimizer.learning_rate)]


def digits():
    print("\n| digits, rate of Adam | " + " | ".join(FLAGS.steps), end="")
    print(" | last rate |")
    print("|---" * (2 + len(FLAGS.steps)) + "|")
    for factor in map(float, FLAGS.factors):
        for adapts in (False, True):
            runs = [on_digits(factor, adapts, int(s)) for s in FLAGS.seeds]
            *accuracies, rates = np.sort(np.transpose(runs), axis=1)
            cells = [
                f"{np.median(v):.3f} ({v[0]:.3f} to {v[-1]:.3f})"
                for v in accuracies
            ]
            name = f"{0.02 * factor:g}" + (", adapting" * adapts)
            print(f"| {name} | " + " | ".join(cells), end="")
            print(f" | {np.median(rates):.2g} |", flush=True)


def main(_):
    if "functions" in FLAGS.parts:
        functions()
    if "digits" in FLAGS.parts:
        digits()


if __name__ == "__main__":
    app.run(main)
