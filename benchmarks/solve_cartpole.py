"""Evaluations and seconds until CartPole-v1 is solved, beside evosax.

A linear policy that begins with zeros. In a generation each of N members plays
one episode, all from the same seed. After it the mean policy is judged: it has
solved the environment if its mean return over 100 other episodes is 475
(gymnasium's threshold). Evaluations are episodes of members; seconds are those
of generations, not of judging, without the first, in which functions are
compiled.

    python benchmarks/solve_cartpole.py
    python benchmarks/solve_cartpole.py --normalize=false

evosax has an environment of its own; its members' policies are computed by
NumPy, which is faster here than a compiled call:

    python -m venv evosax_environment
    evosax_environment/bin/pip install evosax "gymnasium[classic-control]" \
        absl-py
    evosax_environment/bin/python benchmarks/solve_cartpole.py --search=PGPE

PGPE has the settings of keras_vo (ClipUp, its rates, sigma, standardized
returns); Open_ES Adam with the rate of --learning_rate; CMA_ES its defaults.
"""

import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import gymnasium
import numpy as np
from absl import app, flags

FLAGS = flags.FLAGS
flags.DEFINE_enum(
    "search", "keras_vo", ["keras_vo", "PGPE", "Open_ES", "CMA_ES"], "Which."
)
flags.DEFINE_list("sizes", ["16", "64"], "Members.")
flags.DEFINE_list("seeds", ["0", "1", "2", "3", "4"], "Searches.")
flags.DEFINE_float("learning_rate", 0.05, "Of the inner optimizer.")
flags.DEFINE_float("stddev", 0.15, "First sigma.")
flags.DEFINE_bool("normalize", True, "Observations, by keras_vo.")
flags.DEFINE_integer("generations", 100, "At most.")

ENV, THRESHOLD = "CartPole-v1", 475
OBSERVATIONS, ACTIONS = 4, 2


class Games:
    """Episodes of linear policies, of NumPy."""

    def __init__(self):
        self.copies = []

    def play(self, kernels, biases, seeds):
        """Returns [n] of policies [n, 4, 2] and [n, 2]."""
        while len(self.copies) < len(seeds):
            self.copies.append(gymnasium.make(ENV, disable_env_checker=True))
        seen = np.stack(
            [
                copy.reset(seed=int(seed))[0]
                for copy, seed in zip(self.copies, seeds, strict=False)
            ]
        )
        returns = np.zeros(len(seeds))
        running = np.arange(len(seeds))
        while running.size:
            outputs = (
                np.einsum("no,noa->na", seen[running], kernels[running])
                + biases[running]
            )
            goes_on = []
            for i, action in zip(running, outputs.argmax(axis=1), strict=True):
                seen[i], reward, over, late, _ = self.copies[i].step(action)
                returns[i] += reward
                if not (over or late):
                    goes_on.append(i)
            running = np.array(goes_on, int)
        return returns


class KerasVO:
    """A search of keras_vo."""

    def __init__(self, size, seed):
        import keras

        import keras_vo

        keras.utils.set_random_seed(seed)
        layers = [keras.layers.Dense(ACTIONS, kernel_initializer="zeros")]
        if FLAGS.normalize:
            layers.insert(0, keras_vo.rl.ObservationNormalization())
        self.policy = keras.Sequential([keras.Input((OBSERVATIONS,)), *layers])
        self.optimizer = keras_vo.VOOptimizer(
            keras_vo.rl.ClipUp(FLAGS.learning_rate),
            population_size=size,
            search_distribution=keras_vo.GaussianSearchDistribution(
                stddev=FLAGS.stddev
            ),
            fitness_shaping="standardize",
            seed=seed,
        )
        self.rollouts = keras_vo.rl.Rollouts(ENV, self.policy, seed=seed)

    def step(self):
        """A generation."""
        self.rollouts.step(self.optimizer)

    def solved(self):
        """Whether the mean policy is good enough."""
        return any_then_all(lambda n: self.rollouts.evaluate(n, seed=1))


class Evosax:
    """A search of evosax, by its name there."""

    def __init__(self, size, seed):
        import evosax.algorithms
        import jax
        import optax
        from evosax.core import fitness_shaping, optimizer

        more, params = {}, {}
        if FLAGS.search == "PGPE":
            more = {
                "optimizer": optimizer.clipup(
                    learning_rate=FLAGS.learning_rate,
                    max_velocity=2 * FLAGS.learning_rate,
                ),
                "fitness_shaping_fn": (
                    fitness_shaping.standardize_fitness_shaping_fn
                ),
            }
            params = {"std_init": FLAGS.stddev}
        elif FLAGS.search == "Open_ES":
            more = {
                "optimizer": optax.adam(FLAGS.learning_rate),
                "std_schedule": optax.constant_schedule(FLAGS.stddev),
            }
        zeros = {
            "kernel": np.zeros([OBSERVATIONS, ACTIONS], np.float32),
            "bias": np.zeros(ACTIONS, np.float32),
        }
        self.split = jax.random.split
        self.search = getattr(evosax.algorithms, FLAGS.search)(
            population_size=size, solution=zeros, **more
        )
        self.params = self.search.default_params.replace(**params)
        self.key, key = self.split(jax.random.key(seed))
        self.state = self.search.init(key, zeros, self.params)
        self.size, self.games = size, Games()
        self.seeds = np.random.default_rng(seed)

    def step(self):
        """A generation."""
        self.key, asking, telling = self.split(self.key, 3)
        population, self.state = self.search.ask(
            asking, self.state, self.params
        )
        seeds = [self.seeds.integers(2**31)] * self.size
        returns = self.games.play(
            np.asarray(population["kernel"]),
            np.asarray(population["bias"]),
            seeds,
        )
        self.state, _ = self.search.tell(
            telling, population, -returns, self.state, self.params
        )

    def solved(self):
        """Whether the mean policy is good enough."""
        mean = self.search.get_mean(self.state)

        def evaluate(episodes):
            return self.games.play(
                *(
                    np.broadcast_to(mean[name], (episodes, *mean[name].shape))
                    for name in ("kernel", "bias")
                ),
                2**31 + np.arange(episodes),
            )

        return any_then_all(evaluate)


def any_then_all(evaluate):
    """Of 100 episodes, if 5 are good."""
    return all(evaluate(n).mean() >= THRESHOLD for n in (5, 100))


def solve(size, seed):
    """Generations, and seconds without the first one's, or `None`."""
    search = (KerasVO if FLAGS.search == "keras_vo" else Evosax)(size, seed)
    seconds = 0.0
    for generation in range(FLAGS.generations):
        start = time.perf_counter()
        search.step()
        if generation:
            seconds += time.perf_counter() - start
        if search.solved():
            return generation + 1, seconds
    return None


def main(argv):
    if argv[1:]:
        raise app.UsageError(f"Expected flags only. Received: {argv[1:]}")
    for size in map(int, FLAGS.sizes):
        found = [solve(size, int(seed)) for seed in FLAGS.seeds]
        done = [result for result in found if result]
        rows = ", ".join(
            f"{size * result[0]} ({result[1]:.1f} s)" if result else "none"
            for result in found
        )
        print(f"{FLAGS.search} N = {size}: evaluations {rows}", flush=True)
        if done:
            generations, seconds = np.median(done, axis=0)
            print(
                f"  median of {len(done)}: {size * generations:.0f} "
                f"evaluations, {seconds:.2f} s",
                flush=True,
            )


if __name__ == "__main__":
    app.run(main)
