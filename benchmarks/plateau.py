"""Does a search find its way after a time, or a region, without any signal?

    weights   MLP 4-32-3 and the 0-1 error of three classes: 100 epochs with
              sample weights of 0, then 300 without; beside it the 300 alone.
              A line: seed, training error alone, error after the plateau, and
              sigma when it ended.
    car       MountainCar from scratch, tanh MLP 2-16-3, 100 generations of 32:
              at first every member needs the whole time, 200 steps. A line:
              seed and, for some generations, the members' mean time, that of
              the mean network, and sigma.

    python benchmarks/plateau.py --task=weights --seeds=0,1,2,3,4
    python benchmarks/plateau.py --task=car --seeds=0,1,2,3,4

All settings are the defaults, but the seed and the 32 members.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

import keras_vo

FLAGS = flags.FLAGS
flags.DEFINE_enum("task", "weights", ["weights", "car"], "See above.")
flags.DEFINE_list("seeds", ["0"], "Seeds of weights and noise.")
EPISODES, STEPS = 3, 200
SHOWN = (0, 24, 49, 99)


def zero_one_error(y_true, y_pred):
    wrong = tf.argmax(y_pred, -1) != tf.cast(tf.squeeze(y_true, -1), tf.int64)
    return tf.cast(wrong, tf.float32)


def after_weights_of_zero(seed, plateau):
    """The training error, and sigma when the plateau ended."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, size=(180, 1))
    x = rng.normal(size=(180, 4)) + 4 * np.eye(3, 4)[y[:, 0]]
    keras.utils.set_random_seed(seed)
    model = keras_vo.VOSequential(
        [keras.layers.Dense(32, "relu"), keras.layers.Dense(3, "softmax")]
    )
    model.compile(keras_vo.VOOptimizer(seed=seed), loss=zero_one_error)
    sigma = None
    if plateau:
        weights = np.zeros(len(x))
        model.fit(x, y, 60, epochs=100, verbose=0, sample_weight=weights)
        sigma = float(np.max(model.optimizer.stddevs[0]))
    model.fit(x, y, 60, epochs=300, verbose=0)
    return model.evaluate(x, y, verbose=0), sigma


def time_to_goal(weights, seed):
    """Mean number of steps of MountainCar-v0 [Moore, 1990], at most 200."""
    hidden, hidden_bias, out, out_bias = weights
    rng, total = np.random.default_rng(seed), 0
    for _ in range(EPISODES):
        position, velocity, steps = rng.uniform(-0.6, -0.4), 0.0, 0
        while steps < STEPS and position < 0.5:
            seen = np.array([position, 10 * velocity])
            units = np.tanh(seen @ hidden + hidden_bias)
            push = np.argmax(units @ out + out_bias) - 1
            velocity += 0.001 * push - 0.0025 * np.cos(3 * position)
            velocity = np.clip(velocity, -0.07, 0.07)
            position = np.clip(position + velocity, -1.2, 0.6)
            if position == -1.2:
                velocity = max(velocity, 0.0)
            steps += 1
        total += steps
    return total / EPISODES


def car(seed):
    """Times and sigma of some generations."""
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.Input((2,)),
            keras.layers.Dense(16, "tanh"),
            keras.layers.Dense(3),
        ]
    )
    weights = model.trainable_variables
    optimizer = keras_vo.VOOptimizer(population_size=32, seed=seed)
    for generation in range(SHOWN[-1] + 1):
        loss = optimizer.minimize(
            lambda values, start=generation: time_to_goal(
                [np.asarray(value) for value in values], start
            ),
            weights,
        )
        if generation in SHOWN:
            mean = time_to_goal([w.numpy() for w in weights], SHOWN[-1] + 1)
            sigma = float(np.max(optimizer.stddevs[0]))
            yield f"{generation}: {float(loss):.1f} {mean:.1f} {sigma:.3f}"


def main(_):
    for seed in map(int, FLAGS.seeds):
        if FLAGS.task == "car":
            print(seed, *car(seed), sep="  ", flush=True)
            continue
        alone, _ = after_weights_of_zero(seed, plateau=False)
        error, sigma = after_weights_of_zero(seed, plateau=True)
        print(f"{seed}  {alone:.4f}  {error:.4f}  {sigma:.3f}", flush=True)


if __name__ == "__main__":
    app.run(main)
