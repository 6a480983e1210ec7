"""Episodes of many members at the same time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from keras_vo.population_calls import function_of
from keras_vo.rl.environments import Environments
from keras_vo.rl.normalization import Statistics
from keras_vo.rl.spaces import actions_of, check_policy

__all__ = ["Episodes", "Player"]


class Episodes(NamedTuple):
    """What some members' episodes were.

    Attributes:
        returns: sums of rewards, [members, episodes] float64.
        lengths: numbers of time steps, alike.
        statistics: of all that was observed.
    """

    returns: np.ndarray
    lengths: np.ndarray
    statistics: Statistics


class Player:
    """Plays episodes with a policy.

    Args:
        model: the policy.
        environments: copies of one.
        action_noise: see `Rollouts`.

    Raises:
        ValueError: the policy does not fit the spaces.
    """

    def __init__(
        self, model: Any, environments: Environments, action_noise: float
    ) -> None:
        self.environments = environments
        self._model = model
        self._action_noise = action_noise
        first = environments.first
        self._actions = actions_of(first.action_space, action_noise)
        check_policy(model, first, self._actions.shape)

    def play(
        self,
        weights: Sequence[tf.Tensor],
        seeds: np.ndarray,
        noisy: bool = True,
        members: Sequence[int] = (0,),
        where: str = "the mean policy",
    ) -> Episodes:
        """An episode from each of the seeds.

        Args:
            weights: of each variable of the model, [members, ...].
            seeds: of the episodes, [members, episodes].
            noisy: whether actions have noise.
            members: numbers of the members, for errors.
            where: what they are members of, alike.
        """
        episodes = seeds.shape[1]

        def name(copy: int) -> str:
            member, episode = divmod(int(copy), episodes)
            return (
                f"(keras_vo: member {members[member]} of {where}, episode "
                f"{episode})"
            )

        observations = self.environments.reset(seeds.reshape(-1))
        returns = np.zeros(seeds.size)
        lengths = np.zeros(seeds.size, int)
        noise = None
        if noisy and self._action_noise:
            # Environments draw from the stream of the seed itself.
            noise = [np.random.default_rng([s, 1]) for s in seeds.reshape(-1)]
        policy = _Weights(self._model, weights, seeds.shape)
        running = np.arange(seeds.size)
        tally = _Tally(observations)
        while running.size:
            tally.add(observations[running])
            outputs = policy(observations, running)
            known = np.isfinite(outputs).reshape(len(outputs), -1).all(axis=1)
            if not known.all():  # nothing is worse than no action
                returns[running[~known]] = -np.inf
                running, outputs = running[known], outputs[known]
                if not running.size:
                    break
            actions = self._actions.choose(outputs, self._drawn(noise, running))
            lengths[running] += 1
            goes_on = self.environments.step(
                running, actions, observations, returns, name
            )
            running = running[goes_on]
        unknown = np.isnan(returns)
        if unknown.any():
            returns[unknown] = -np.inf  # as where there are no actions
            warnings.warn(
                "Rewards of an environment are NaN. The returns of such "
                "episodes count as -inf: nothing is worse.",
                RuntimeWarning,
                stacklevel=2,
            )
        return Episodes(
            returns.reshape(seeds.shape),
            lengths.reshape(seeds.shape),
            tally.statistics(),
        )

    def _drawn(
        self, noise: list[np.random.Generator] | None, running: np.ndarray
    ) -> np.ndarray | None:
        """Noise of the actions of the episodes that go on."""
        if noise is None:
            return None
        return np.stack([self._actions.noise(noise[i]) for i in running])


class _Weights:
    """A policy with the weights of several members.

    Members whose episodes have all ended are left out when they are half of
    those that are not.

    Args:
        model: the policy.
        weights: [members, ...] each.
        shape: numbers of members and of episodes of each.
    """

    def __init__(
        self,
        model: Any,
        weights: Sequence[tf.Tensor],
        shape: tuple[int, ...],
    ) -> None:
        self._function: Any = function_of(model, False)
        self._concrete: Callable[..., Any] | None = None
        self._weights = list(weights)
        self._episodes = shape[1]
        self._members = np.arange(shape[0])

    def __call__(
        self, observations: np.ndarray, running: np.ndarray
    ) -> np.ndarray:
        """Outputs for the observations of the episodes that go on."""
        playing = np.unique(running // self._episodes)
        if 2 * len(playing) <= len(self._members):
            rows = np.searchsorted(self._members, playing)
            self._weights = [tf.gather(w, rows) for w in self._weights]
            self._members = playing
            self._concrete = None
        shape = observations.shape[1:]
        by_member = observations.reshape(-1, self._episodes, *shape)
        inputs = tf.constant(by_member[self._members])
        if self._concrete is None:  # found once: that takes as long as a call
            self._concrete = self._function.get_concrete_function(
                self._weights, inputs
            )
        outputs = self._concrete(self._weights, inputs).numpy()
        rows = np.searchsorted(self._members, running // self._episodes)
        return np.asarray(outputs[rows, running % self._episodes])


class _Tally:
    """Sums over observations that are finite, of distances from the first
    ones' mean.
    """

    def __init__(self, observations: np.ndarray) -> None:
        finite = self._finite(observations)
        self._center = np.zeros(observations.shape[1:])
        if len(finite):
            self._center = finite.mean(axis=0, dtype=np.float64)
        self._total = np.zeros_like(self._center)
        self._squares = np.zeros_like(self._center)
        self._count = 0

    def add(self, observations: np.ndarray) -> None:
        """Takes observations [n, ...] into account."""
        observations = self._finite(observations)
        distances = observations - self._center
        self._total += distances.sum(axis=0)
        self._squares += (distances**2).sum(axis=0)
        self._count += len(observations)

    @staticmethod
    def _finite(observations: np.ndarray) -> np.ndarray:
        rows = np.isfinite(observations).reshape(len(observations), -1)
        return observations[rows.all(axis=1)]

    def statistics(self) -> Statistics:
        """Of all of them."""
        return Statistics.of_sums(
            self._count, self._total, self._squares, self._center
        )
