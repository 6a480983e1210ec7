"""What members of the last population are worth, by the trust region.

    python benchmarks/importance_mixing.py                    # all problems
    python benchmarks/importance_mixing.py --problems=quadratic --seeds=0,1,2

For each problem and bound on the KL divergence of a step: evaluations to the
target with antithetic pairs, without, and with importance mixing; and of the
latter the share of members that is reused, its prediction, and the effective
sample size. `scaled` is a bound times the signal-to-noise ratio of the
gradient, smoothed over steps, at most 1 ("signal-aware trust region").

Problems:
    himmelblau  from (0, 0), sigma 1; until f(mu) < 0.01
    sphere      10 weights, from (3, ..., 3), sigma 1; until f(mu) < 1e-8;
                sphere40: 40 weights
    quadratic   100 weights, condition 100, from (3, ..., 3), sigma 1; until
                f(mu) is a thousandth
    digits      64-32-10 on scikit-learn's digits, whole training set; until
                .93 of 360 validation images are right
    batches     the same on mini-batches of 128
    mnist       784-32-10 on mini-batches of 500 of --data_path; until .80 of
                5,000 validation images are right
    pendulum    a policy 3-16-1, the mean return of 8 episodes of Pendulum-v1
                with fixed starts; until that of the mean is above -300

Medians over seeds, least and largest; - : not reached, in the problem's
evaluations or in 15 minutes.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import json
import math
import time
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags
from sklearn.datasets import load_digits

import keras_vo
from keras_vo.search.rules import MaxKL
from keras_vo.search.signal_to_noise import signal_to_noise

FLAGS = flags.FLAGS
flags.DEFINE_list("problems", ["himmelblau", "quadratic", "digits"], "Which.")
flags.DEFINE_list("max_kls", ["none", "10", "1", "0.1", "0.03"], "Bounds.")
flags.DEFINE_list("arms", ["pairs", "single", "mixed"], "Of each bound.")
flags.DEFINE_list("seeds", ["0", "1", "2", "3", "4"], "Of each cell.")
flags.DEFINE_float("alpha", 0.0, "Least share of members that is new.")
flags.DEFINE_string("data_path", None, "mnist.npz.")
flags.DEFINE_string("out", None, "JSON file of all runs.")


class Problem(NamedTuple):
    """A search, and when it ends.

    Attributes:
        step: takes some steps.
        optimizer: that takes them.
        reached: whether the mean is at the target.
        most: evaluations at most.
    """

    step: object
    optimizer: object
    reached: object
    most: int


class BySignal(MaxKL):
    """A bound that is scaled with the signal-to-noise ratio of the gradient."""

    def init(self, log_variance):
        return {"signal": tf.ones([], log_variance.dtype)}

    def _signal(self, step, state):
        direction, layout = step.direction, step.gaussian.layout
        norm = 2.0 * tf.nn.l2_loss(direction.mean)
        members = tf.cast(len(step.members), layout.dtype)
        pairs = members / len(step.members.signs)
        found = signal_to_noise([norm], [direction.squares["member"]], [pairs])
        found = tf.where(tf.math.is_nan(found), 0.0 * found, found)
        return 0.9 * state["signal"] + 0.1 * found

    def propose(self, step, proposal, state):
        signal = tf.clip_by_value(self._signal(step, state), 1e-2, 1.0)
        bound = MaxKL(self.max_kl * signal, self.project)
        return bound.propose(step, proposal, state)

    def settle(self, step, proposal, state):
        return {"signal": self._signal(step, state)}


class Scaled(keras_vo.VOOptimizer):
    """An optimizer with `BySignal` in the place of `MaxKL`."""

    def settings_for(self, variables):
        import dataclasses

        settings = super().settings_for(variables)
        rules = [
            BySignal(r.max_kl, r.project) if isinstance(r, MaxKL) else r
            for r in settings.rules
        ]
        return dataclasses.replace(settings, rules=rules)


def optimizer_of(arm, max_kl, seed, **arguments):
    kind = Scaled if max_kl.startswith("scaled") else keras_vo.VOOptimizer
    bound = max_kl.removeprefix("scaled")
    return kind(
        max_kl=None if bound == "none" else float(bound),
        antithetic=arm == "pairs",
        importance_mixing=FLAGS.alpha if arm == "mixed" else None,
        seed=seed,
        **arguments,
    )


def function(objective, start, size, target, most, every):
    def problem(arm, max_kl, seed):
        weights = tf.Variable(start)
        d = len(start)
        optimizer = optimizer_of(
            arm,
            max_kl,
            seed,
            inner_optimizer=keras.optimizers.SGD(1.0),
            population_size=size,
            search_distribution=keras_vo.GaussianSearchDistribution(
                "separable",
                1.0,
                (3 + math.log(d)) / (5 * math.sqrt(d)),
                min_stddev=1e-12,
                max_stddev=1e12,
            ),
            fitness_shaping="nes",
        )

        @tf.function
        def steps():
            for _ in tf.range(every):
                optimizer.minimize(lambda w: objective(w[0]), [weights])

        return Problem(
            steps,
            optimizer,
            lambda: float(objective(tf.convert_to_tensor(weights))) < target,
            most,
        )

    return problem


def himmelblau(w):
    x, y = w[0], w[1]
    return tf.square(x**2 + y - 11) + tf.square(x + y**2 - 7)


def quadratic(w):
    return tf.reduce_sum(tf.constant(10 ** np.linspace(0, 2, 100)) * w**2)


def sphere(d):
    size = 4 + int(3 * math.log(d))
    size += size % 2  # for pairs
    start = np.full(d, 3.0)
    return function(lambda w: tf.reduce_sum(w**2), start, size, 1e-8, 30_000, 2)


def network(sizes, x, y, batch_size, right, population_size, most):
    """Until so many of the first validation images are right."""

    def problem(arm, max_kl, seed):
        keras.backend.clear_session()
        keras.utils.set_random_seed(seed)
        layers = [
            keras.layers.Dense(size, activation="relu") for size in sizes[:-1]
        ]
        model = keras_vo.VOSequential(
            [
                keras.Input(x.shape[1:]),
                *layers,
                keras.layers.Dense(sizes[-1]),
            ]
        )
        optimizer = optimizer_of(
            arm, max_kl, seed, population_size=population_size
        )
        model.compile(
            optimizer=optimizer,
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        held = len(x) // 5
        data = tf.data.Dataset.from_tensor_slices((x[held:], y[held:]))
        if batch_size is None:
            data = data.batch(len(x)).repeat()
        else:
            data = data.shuffle(len(x), seed=seed).repeat().batch(batch_size)
        batches = iter(data)

        @tf.function
        def steps():
            for _ in tf.range(10):
                model.train_step(next(batches))

        def reached():
            logits = model(x[:held], training=False).numpy()
            return np.mean(logits.argmax(-1) == y[:held]) >= right

        model.optimizer.build(model.trainable_variables)
        return Problem(steps, optimizer, reached, most)

    return problem


def digits(batch_size):
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))[360:]  # not for tests
    x, y = x[order].astype("float32") / 16, y[order]
    return network([32, 10], x, y, batch_size, 0.93, 64, 200_000)


def mnist():
    with np.load(FLAGS.data_path) as data:
        x, y = data["x_train"], data["y_train"]
    order = np.random.default_rng(0).permutation(len(x))[:25_000]
    x = x[order].reshape(-1, 784).astype("float32") / 255
    return network([32, 10], x, y[order], 500, 0.80, 100, 100_000)


def swing_up(weights):
    """Minus the mean return of 8 episodes of Pendulum-v1, in TensorFlow."""
    first, first_bias, last, last_bias = weights
    low, high = [-math.pi, -1.0], [math.pi, 1.0]
    starts = np.random.default_rng(0).uniform(low, high, [8, 2])
    angles, speeds = tf.unstack(tf.constant(starts, tf.float32), axis=1)

    def step(i, angle, speed, cost):
        seen = [tf.cos(angle), tf.sin(angle), speed / 8.0]
        hidden = tf.tanh(tf.stack(seen, axis=1) @ first + first_bias)
        torque = 2.0 * tf.tanh(hidden @ last + last_bias)[:, 0]
        turned = tf.math.floormod(angle + math.pi, 2 * math.pi) - math.pi
        cost += turned**2 + 0.1 * speed**2 + 0.001 * torque**2
        speed += 0.05 * (15.0 * tf.sin(angle) + 3.0 * torque)
        speed = tf.clip_by_value(speed, -8.0, 8.0)
        return i + 1, angle + 0.05 * speed, speed, cost

    *_, cost = tf.while_loop(
        lambda i, *_: i < 200, step, [0, angles, speeds, tf.zeros([8])]
    )
    return tf.reduce_mean(cost)


def pendulum(arm, max_kl, seed):
    keras.utils.set_random_seed(seed)
    policy = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(16, activation="tanh"),
            keras.layers.Dense(1, activation="tanh"),
        ]
    )
    weights = policy.trainable_variables
    optimizer = optimizer_of(
        arm,
        max_kl,
        seed,
        inner_optimizer=keras_vo.optimizers.ClipUp(0.1),
        population_size=32,
        search_distribution=keras_vo.GaussianSearchDistribution(
            "layerwise", 0.2
        ),
        fitness_shaping="standardize",
    )

    @tf.function
    def steps():
        for _ in tf.range(5):
            optimizer.minimize(swing_up, weights)

    value = tf.function(swing_up, autograph=False)

    def reached():
        return float(value([tf.convert_to_tensor(w) for w in weights])) < 300.0

    optimizer.build(weights)
    return Problem(steps, optimizer, reached, 60_000)


PROBLEMS = {
    "himmelblau": lambda: function(
        himmelblau, np.zeros(2), 20, 0.01, 20_000, 1
    ),
    "sphere": lambda: sphere(10),
    "sphere40": lambda: sphere(40),
    "quadratic": lambda: function(
        quadratic,
        np.full(100, 3.0),
        50,
        1e-3 * float(quadratic(np.full(100, 3.0))),
        100_000,
        5,
    ),
    "digits": lambda: digits(None),
    "batches": lambda: digits(128),
    "mnist": mnist,
    "pendulum": lambda: pendulum,
}


def run(problem, most_seconds=900):
    """Evaluations to the target, and means of what mixing says."""
    monitor = keras_vo.callbacks.SearchMonitor(every="step")
    began, history, found = time.time(), {}, math.inf
    with monitor.attached(problem.optimizer):
        while time.time() - began < most_seconds:
            problem.step()
            monitor.record()
            history = monitor.history
            if not history:
                continue
            evaluations = history["evaluations"][-1]
            if problem.reached():
                found = evaluations
                break
            if evaluations > problem.most:
                break
    history = monitor.history
    names = ("acceptance", "predicted_acceptance", "effective_size", "kl")
    means = {n: float(np.nanmean(history[n])) for n in names if n in history}
    return {
        "evaluations": found,
        "steps": len(history["kl"]),
        "largest_kl": float(np.max(history["kl"])),
        **means,
    }


def cell(values):
    values = np.sort(values)
    texts = ["-" if np.isinf(v) else f"{v:,.0f}" for v in values]
    return f"{texts[len(texts) // 2]} ({texts[0]} to {texts[-1]})"


def main(_):
    runs = []
    for name in FLAGS.problems:
        make = PROBLEMS[name]()
        print(f"\n| {name}, max_kl | " + " | ".join(FLAGS.arms), end=" | ")
        print("kept | predicted | effective size |")
        print("|---" * (4 + len(FLAGS.arms)) + "|", flush=True)
        for max_kl in FLAGS.max_kls:
            cells, last = [], {}
            for arm in FLAGS.arms:
                found = []
                for seed in map(int, FLAGS.seeds):
                    last = run(make(arm, max_kl, seed))
                    found.append(last)
                    key = {"problem": name, "max_kl": max_kl, "arm": arm}
                    runs.append(key | {"seed": seed} | last)
                    if FLAGS.out:
                        with open(FLAGS.out, "w") as file:
                            json.dump(runs, file)
                cells.append(cell([f["evaluations"] for f in found]))
                if arm == "mixed":
                    for what in (
                        "acceptance",
                        "predicted_acceptance",
                        "effective_size",
                    ):
                        last[what] = np.median([f[what] for f in found])
            texts = (
                [
                    f"{last[what]:.2f}"
                    for what in ("acceptance", "predicted_acceptance")
                ]
                + [f"{last['effective_size']:.0f}"]
                if last.get("acceptance") is not None
                else ["", "", ""]
            )
            print(
                f"| {max_kl} | " + " | ".join(cells + texts) + " |", flush=True
            )


if __name__ == "__main__":
    app.run(main)
