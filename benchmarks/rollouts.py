"""Time steps a second of a population's episodes, beside a loop over members.

Pendulum-v1 (200 time steps an episode), a policy with 16 hidden units. The
loop plays one member after the other, its weights assigned to the model, with
one compiled call of the policy a time step.

    python benchmarks/rollouts.py
"""

import os
import statistics
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import gymnasium
import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

import keras_vo

FLAGS = flags.FLAGS
flags.DEFINE_list("sizes", ["1", "16", "256", "1024"], "Members.")
flags.DEFINE_integer("repeats", 3, "Of each, of which the median counts.")
flags.DEFINE_string("env", "Pendulum-v1", "Id of the environment.")
flags.DEFINE_integer("hidden", 16, "Units of the policy's hidden layer.")


def make_policy():
    environment = gymnasium.make(FLAGS.env)
    actions = environment.action_space
    discrete = isinstance(actions, gymnasium.spaces.Discrete)
    return keras.Sequential(
        [
            keras.Input(environment.observation_space.shape),
            keras.layers.Dense(FLAGS.hidden, activation="tanh"),
            keras.layers.Dense(
                int(actions.n) if discrete else actions.shape[0]
            ),
        ]
    )


def play_one_by_one(policy, population, members, environment):
    """Time steps played."""
    discrete = isinstance(environment.action_space, gymnasium.spaces.Discrete)
    call = tf.function(policy)
    steps = 0
    for member in members:
        for variable, weights in zip(
            policy.trainable_variables, population[member], strict=True
        ):
            variable.assign(weights)
        observation, _ = environment.reset(seed=0)
        ended = False
        while not ended:
            outputs = call(observation[None].astype("float32")).numpy()[0]
            action = outputs.argmax() if discrete else np.clip(outputs, -2, 2)
            observation, _, over, late, _ = environment.step(action)
            ended = over or late
            steps += 1
    return steps


def rate(play):
    """Steps a second, a median; the first run does not count."""
    play()
    rates = []
    for _ in range(FLAGS.repeats):
        start = time.perf_counter()
        steps = play()
        rates.append(steps / (time.perf_counter() - start))
    return statistics.median(rates)


def main(argv):
    if argv[1:]:
        raise app.UsageError(f"Expected flags only. Received: {argv[1:]}")
    environment = gymnasium.make(FLAGS.env, disable_env_checker=True)
    print(f"{FLAGS.env}, steps a second")
    print("members   keras_vo.rl   loop   ratio")
    for size in map(int, FLAGS.sizes):
        policy = make_policy()
        optimizer = keras_vo.VOOptimizer(population_size=max(size, 2), seed=0)
        population = optimizer.ask(policy.trainable_variables)
        rollouts = keras_vo.rl.Rollouts(FLAGS.env, policy)
        together = rate(
            lambda p=population, r=rollouts, n=size: int(
                r.play(p, range(n)).lengths.sum()
            )
        )
        # The loop's rate does not depend on how many there are.
        alone = rate(
            lambda m=policy, p=population, n=size: play_one_by_one(
                m, p, range(min(n, 4)), environment
            )
        )
        print(
            f"{size:7d} {together:13.0f} {alone:6.0f} {together / alone:7.1f}",
            flush=True,
        )
        rollouts.close()


if __name__ == "__main__":
    app.run(main)
