"""Episodes of a population: what its members' policies are worth."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_vo import checks, interrupts
from keras_vo.population import Population
from keras_vo.replicas.communicator import sum_over_workers
from keras_vo.replicas.strategies import worker_count
from keras_vo.rl.environments import Environments, maker
from keras_vo.rl.episodes import Episodes, Player
from keras_vo.rl.normalization import Statistics, normalization_of
from keras_vo.told import Report

__all__ = ["Rollouts"]

# Streams of seeds: of training, and of evaluation.
_TRAINING, _EVALUATION = 0, 1


class Rollouts:
    """Trains a policy in an environment of gymnasium.

    >>> policy = keras.Sequential([
    ...     keras.Input((4,)),
    ...     keras_vo.rl.ObservationNormalization(),
    ...     keras.layers.Dense(2, kernel_initializer="zeros"),
    ... ])
    >>> optimizer = keras_vo.VOOptimizer(
    ...     keras_vo.rl.ClipUp(0.05),
    ...     population_size=16,
    ...     fitness_shaping="standardize",
    ... )
    >>> rollouts = keras_vo.rl.Rollouts(
    ...     "CartPole-v1", policy, num_interactions=1_000
    ... )
    >>> while rollouts.interactions < 50_000:
    ...     report = rollouts.step(optimizer)
    >>> rollouts.evaluate(episodes=100).mean()

    Begin with outputs of zero, as here: a policy that always acts alike until
    its weights are turned round learns slowly, or not at all.

    All members play at the same time, with one call of the policy for all of
    them at each time step. Those whose episodes have ended are not stepped.

    Its environments are its own, and not for several threads at once.

    By default all members of a generation play the same episodes (the same
    seeds of environments and of action noise: common random numbers), and
    those of the next generation others: what is compared are policies, not
    luck. (With `importance_mixing` members that are used once more have scores
    of former episodes: then it is luck, too.) Seeds follow from `seed` and the
    generation, so that a search that is resumed sees what it would have seen.

    Args:
        env: the id of an environment, or a function that makes one. Its
            observations are Box, Discrete (the policy gets one-hot vectors),
            MultiDiscrete or MultiBinary.
        policy: a Keras model from observations [batch, ...] to outputs. Of
            Box actions, outputs are the actions, clipped to their bounds; of
            Discrete(n) n numbers, of which the largest acts; of MultiDiscrete
            those of all parts one after the other; of MultiBinary a number
            each, of which those above 0 act.
        episodes: of each member, in a generation. Its score is their mean
            return.
        num_interactions: budget of a generation in time steps: members are
            evaluated, some at a time, until it is spent, and the others are
            missing; so `population_size` is the largest population. (Members
            that are playing end their episodes.) On several workers each has
            its part. `None`: all members are evaluated.
        max_episode_steps: time steps of an episode at most; `None`: what the
            environment says.
        action_noise: of Box actions, standard deviation of normal noise in
            units of half of their range; of others, the probability of a
            random action.
        common_random_numbers: see above; else each member has episodes of its
            own.
        seed: of all episodes, in [0, 2^63).
        env_options: further arguments of what makes an environment.

    Attributes:
        interactions: time steps of training so far, of all workers. It is not
            saved: set it where a search is resumed, if your loop counts by it.

    Raises:
        ImportError: gymnasium is not installed.
        ValueError: the policy does not fit the spaces, or an argument is out
            of its range.
    """

    def __init__(
        self,
        env: Any,
        policy: Any,
        *,
        episodes: int = 1,
        num_interactions: int | None = None,
        max_episode_steps: int | None = None,
        action_noise: float = 0.0,
        common_random_numbers: bool = True,
        seed: int = 0,
        env_options: dict[str, Any] | None = None,
    ) -> None:
        if not isinstance(policy, keras.Model):
            raise TypeError(
                "Expected a Keras model as the policy. Received: "
                f"{policy!r:.80} of type {type(policy)}"
            )
        self.policy = policy
        self._episodes = checks.checked_integer("episodes", episodes)
        if num_interactions is not None:
            num_interactions = checks.checked_integer(
                "num_interactions", num_interactions
            )
        self._budget = num_interactions
        if max_episode_steps is not None:
            max_episode_steps = checks.checked_integer(
                "max_episode_steps", max_episode_steps
            )
        number = isinstance(action_noise, (int, float))
        if not number or not 0 <= action_noise < math.inf:
            raise ValueError(
                "`action_noise` must be a finite number of 0 or more. "
                f"Received: action_noise={action_noise!r}"
            )
        self._common = bool(common_random_numbers)
        self._seed = checks.checked_seed(seed)
        environments = Environments(
            maker(env, max_episode_steps, env_options or {})
        )
        self._player = Player(policy, environments, float(action_noise))
        self._normalization = normalization_of(policy, environments.shape)
        self.interactions = 0

    def step(self, optimizer: Any) -> Report:
        """One generation: its episodes, and a step of the search.

        Args:
            optimizer: a `VOOptimizer`, that of this policy.

        Returns:
            The report of the step; losses are minus the mean returns. Those
            of a member whose outputs were not finite, or whose rewards were
            NaN, are inf.

        Raises:
            TypeError: `optimizer` is none.
            ValueError: no member's outputs are finite, or the environment
                returns what its spaces do not have.
        """
        if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            optimizer = optimizer.inner_optimizer  # of mixed_float16
        if not hasattr(optimizer, "ask"):
            raise TypeError(
                "Expected a VOOptimizer: `rollouts.step(optimizer)`. Received: "
                f"{optimizer!r:.80} of type {type(optimizer)}"
            )
        strategy = optimizer.strategy
        workers = worker_count(strategy)
        population = optimizer.ask(self.policy.trainable_variables)
        scores: dict[int, float] = {}
        steps, seen = 0, None
        for members in self._slices(population):
            if not members:  # more workers than directions
                continue
            played = self.play(population, members)
            scores |= dict(
                zip(members, played.returns.mean(axis=1), strict=True)
            )
            steps += int(played.lengths.sum())
            seen = (
                played.statistics
                if seen is None
                else seen.and_also(played.statistics)
            )
            if self._budget is not None and steps * workers >= self._budget:
                break
        steps = int(sum_over_workers(strategy, steps))
        if not steps and population.reused < 2:
            # A loop until some time steps have been would not end.
            raise ValueError(
                "Expected a policy whose outputs are finite numbers for the "
                "first observations, with the weights of one member at least. "
                "Received: others from all of them; so no one has acted"
            )
        with interrupts.deferred():
            report = optimizer.tell(population, scores, maximize=True)
            self.interactions += steps
            self._normalize(strategy, seen)
        return report

    def play(self, population: Population, members: Sequence[int]) -> Episodes:
        """The episodes of some members.

        Args:
            population: of the policy's weights.
            members: indices.
        """
        count = 1 if self._common else len(population)
        seeds = self._seeds(
            (_TRAINING, population.generation), count, self._episodes
        )
        rows = np.zeros(len(members), int) if self._common else list(members)
        return self._player.play(
            population.tensors(members),
            seeds[rows],
            members=members,
            where=f"{len(population)}, generation {population.generation}",
        )

    def evaluate(self, episodes: int = 100, seed: int = 0) -> np.ndarray:
        """Returns [episodes] of the policy with the weights that it has.

        Args:
            episodes: how many; no one is one of training.
            seed: of the episodes.
        """
        episodes = checks.checked_integer("episodes", episodes)
        seed = checks.checked_seed(seed)
        weights = [
            tf.convert_to_tensor(v)[None]
            for v in self.policy.trainable_variables
        ]
        seeds = self._seeds((_EVALUATION, seed), 1, episodes)
        return self._player.play(weights, seeds, noisy=False).returns[0]

    def close(self) -> None:
        """Closes all environments."""
        self._player.environments.close()

    def _slices(self, population: Population) -> Iterator[list[int]]:
        """Members that are evaluated together; halves of pairs are."""
        own = list(population.own)
        if self._budget is None:
            yield own
            return
        signs = 1 + population.seeds.antithetic
        directions = own[: len(own) // signs]
        half = len(population) // signs
        # Two members at least: one alone is compared with no one.
        size = max(len(directions) // 8, 2 // signs)
        for first in range(0, len(directions), size):
            some = directions[first : first + size]
            yield [i + sign * half for sign in range(signs) for i in some]

    def _seeds(
        self, stream: tuple[int, int], members: int, episodes: int
    ) -> np.ndarray:
        """Seeds of episodes, [members, episodes]."""
        sequence = np.random.SeedSequence(self._seed, spawn_key=stream)
        words = sequence.generate_state(members * episodes, np.uint64)
        return (words >> 1).reshape(members, episodes)

    def _normalize(self, strategy: Any, seen: Statistics | None) -> None:
        """Updates the layer that normalizes observations.

        Args:
            strategy: of the optimizer, all of whose workers call this.
            seen: by this worker; `None`: nothing.
        """
        if self._normalization is None:
            return
        center = self._normalization.statistics.mean
        sums = np.zeros([3, *center.shape])
        if seen is not None:
            shift = seen.mean - center
            sums[0] = seen.count * shift
            sums[1] = seen.squares + seen.count * shift**2
            sums[2] = seen.count
        total, squares, count = sum_over_workers(strategy, sums)
        self._normalization.update(
            Statistics.of_sums(count.flat[0], total, squares, center)
        )
