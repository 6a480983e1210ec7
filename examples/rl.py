"""Trains a policy in an environment of gymnasium, from returns alone.

    python examples/rl.py --env=CartPole-v1
    python examples/rl.py --env=Pendulum-v1 --seeds=0,1,2,3,4

Linear policies (and one hidden layer where that is not enough), observations
in units of their running statistics, ClipUp with cosine decay, one episode a
member, standardized returns; a generation begins no episodes after a fiftieth
of the budget of time steps. For each seed: a search within the budget, and then
the mean return of the mean policy over 100 new episodes. Learning curves over
time steps, frames of the last policy, and the policy itself are written to
--out.
"""

import math
import os
import pathlib
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import gymnasium
import keras
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from absl import app, flags

import keras_vo

matplotlib.use("agg")

FLAGS = flags.FLAGS

# A generation has this part of the budget, and what is under way then.
GENERATIONS = 50
# The same for all environments, unless a flag or OVERRIDES says otherwise.
DEFAULTS = {
    "budget": 500_000,
    "population_size": 16,
    "episodes": 1,
    "hidden": 0,
    "learning_rate": 0.05,
    "stddev": 0.15,
}
OVERRIDES = {
    "CartPole-v1": {"budget": 50_000},
    "LunarLanderContinuous-v3": {"budget": 1_000_000},
    "Pendulum-v1": {
        "budget": 2_000_000,
        "population_size": 8,
        "hidden": 16,
        "stddev": 0.2,
    },
}

flags.DEFINE_string("env", "CartPole-v1", "Id of the environment.")
flags.DEFINE_list("seeds", ["0"], "A search for each.")
flags.DEFINE_integer("budget", None, "Time steps of training.", lower_bound=1)
flags.DEFINE_integer(
    "population_size", None, "Members of a generation.", lower_bound=2
)
flags.DEFINE_integer("episodes", None, "Of each member.", lower_bound=1)
flags.DEFINE_integer(
    "hidden", None, "Units of a hidden layer; 0: none.", lower_bound=0
)
flags.DEFINE_float("learning_rate", None, "Of ClipUp at first: it decays.")
flags.DEFINE_float("stddev", None, "First sigma.")
flags.DEFINE_float("action_noise", 0.0, "Noise of actions in training.")
flags.DEFINE_integer(
    "evaluation_episodes", 100, "Of the mean policy.", lower_bound=1
)
flags.DEFINE_string("out", "out", "Folder of plots and policies; empty: none.")


def setting(name):
    """A flag if it is given, else that of the environment."""
    value = FLAGS[name].value
    if value is not None:
        return value
    return OVERRIDES.get(FLAGS.env, {}).get(name, DEFAULTS[name])


def make_policy():
    environment = gymnasium.make(FLAGS.env)
    observations, actions = (
        environment.observation_space,
        environment.action_space,
    )
    spaces = gymnasium.spaces
    if not isinstance(observations, spaces.Box) or not isinstance(
        actions, (spaces.Box, spaces.Discrete)
    ):
        raise app.UsageError(
            "Expected an --env whose observations are Box, and its actions "
            f"Box or Discrete. Received: --env={FLAGS.env}, with "
            f"{observations} and {actions}"
        )
    outputs = spaces.flatdim(actions)
    layers = [
        keras.Input(observations.shape),
        keras_vo.rl.ObservationNormalization(),
    ]
    if setting("hidden"):
        layers.append(keras.layers.Dense(setting("hidden"), activation="relu"))
    layers.append(keras.layers.Dense(outputs, kernel_initializer="zeros"))
    environment.close()
    return keras.Sequential(layers)


def decayed(part):
    """The learning rate after a part of the budget."""
    return setting("learning_rate") * (1 + math.cos(math.pi * part)) / 2


def train(seed):
    """A policy, and its learning curve: (time steps, mean return) rows."""
    keras.utils.set_random_seed(seed)
    policy = make_policy()
    optimizer = keras_vo.VOOptimizer(
        keras_vo.rl.ClipUp(setting("learning_rate")),
        population_size=setting("population_size"),
        search_distribution=keras_vo.GaussianSearchDistribution(
            stddev=setting("stddev")
        ),
        # How much better a return is counts: ranks cut off the few members
        # that balance the pole longest.
        fitness_shaping="standardize",
        seed=seed,
    )
    policy.compile(optimizer=optimizer)  # saved with the policy
    rollouts = keras_vo.rl.Rollouts(
        FLAGS.env,
        policy,
        episodes=setting("episodes"),
        num_interactions=max(setting("budget") // GENERATIONS, 1),
        action_noise=FLAGS.action_noise,
        seed=seed,
    )
    curve, steps = [], 0
    start = time.perf_counter()
    while True:
        weights = policy.get_weights()
        optimizer.learning_rate = decayed(steps / setting("budget"))
        report = rollouts.step(optimizer)
        if rollouts.interactions > setting("budget"):
            policy.set_weights(weights)  # as if it had not been played
            break
        steps = rollouts.interactions
        curve.append((steps, -report.mean_loss))
    seconds = time.perf_counter() - start
    # Episodes of seeds that no search has.
    returns = rollouts.evaluate(FLAGS.evaluation_episodes, seed=seed)
    rollouts.close()
    print(
        f"{FLAGS.env} seed {seed}: mean return {returns.mean():.2f} "
        f"(standard deviation {returns.std():.2f}) of "
        f"{len(returns)} episodes, {steps} time steps, "
        f"{len(curve)} generations, {seconds:.1f} s"
    )
    return policy, curve, returns


def film(policy, seed):
    """The frames of an episode of the policy, [time, height, width, 3]."""
    environment = gymnasium.make(FLAGS.env, render_mode="rgb_array")
    actions = environment.action_space
    observation, _ = environment.reset(seed=seed)
    frames, ended = [environment.render()], False
    while not ended:
        outputs = np.asarray(policy(observation[None]))[0]
        if isinstance(actions, gymnasium.spaces.Discrete):
            action = actions.start + outputs.argmax()
        else:
            action = np.clip(outputs, actions.low, actions.high)
        observation, _, terminated, truncated, _ = environment.step(action)
        frames.append(environment.render())
        ended = terminated or truncated
    environment.close()
    return np.stack(frames)


def plot_curves(curves, path):
    """Mean returns of the population over time steps, one line a seed."""
    figure, axes = plt.subplots(layout="constrained")
    for seed, curve in curves.items():
        steps, returns = np.transpose(curve)
        axes.plot(steps, returns, label=f"seed {seed}")
    axes.set_xlabel("time steps")
    axes.set_ylabel("mean return of the population")
    axes.set_title(FLAGS.env)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_frames(frames, path, count=8):
    """Some frames of an episode, side by side."""
    chosen = np.linspace(0, len(frames) - 1, count).round().astype(int)
    figure, axes = plt.subplots(
        1, count, figsize=(2 * count, 1.6), layout="constrained"
    )
    for ax, index in zip(axes, chosen, strict=True):
        ax.imshow(frames[index])
        ax.set_title(f"t = {index}")
        ax.axis("off")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(argv):
    if argv[1:]:
        raise app.UsageError(f"Expected flags only. Received: {argv[1:]}")
    try:
        seeds = [int(seed) for seed in FLAGS.seeds]
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0:
        raise app.UsageError(
            "Expected integers for --seeds, of 0 or more, as in --seeds=0,1. "
            f"Received: --seeds={','.join(FLAGS.seeds)}"
        )
    curves, means = {}, []
    for seed in seeds:
        policy, curves[seed], returns = train(seed)
        if not curves[seed]:
            raise app.UsageError(
                "Expected a budget for one generation at least. Received: "
                f"--budget={setting('budget')}, less than a generation's time "
                "steps; the policy was not trained"
            )
        means.append(returns.mean())
    print(
        f"{FLAGS.env}: median over seeds {np.median(means):.2f}, "
        f"worst {np.min(means):.2f}"
    )
    if FLAGS.out:
        folder = pathlib.Path(FLAGS.out)
        folder.mkdir(parents=True, exist_ok=True)
        plot_curves(curves, folder / f"rl_{FLAGS.env}.png")
        plot_frames(
            film(policy, seeds[-1]), folder / f"rl_{FLAGS.env}_frames.png"
        )
        policy.save(folder / f"rl_{FLAGS.env}.keras")
        print(f"wrote rl_{FLAGS.env}.png, _frames.png and .keras in {folder}")


if __name__ == "__main__":
    app.run(main)
