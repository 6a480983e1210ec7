"""Copies of one environment, of which those that go on are stepped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from keras_vo import interrupts
from keras_vo.rl.spaces import encoded, observation_shape

__all__ = ["Environments", "maker"]


def maker(
    env: Any, max_episode_steps: int | None, options: dict[str, Any]
) -> Callable[..., Any]:
    """A function that makes a copy of an environment.

    Args:
        env: its id in gymnasium, or a function that makes one.
        max_episode_steps: of an episode; `None`: as registered.
        options: of the function.

    Raises:
        ImportError: gymnasium is not installed.
        TypeError: neither an id nor a function.
    """
    try:
        import gymnasium
    except ImportError as error:
        raise ImportError(
            "keras_vo.rl needs gymnasium, which is not installed: "
            "`pip install keras_vo[rl]`"
        ) from error
    if isinstance(env, str):

        def make(**more: Any) -> Any:
            return gymnasium.make(
                env,
                max_episode_steps=max_episode_steps,
                disable_env_checker=True,
                **options,
                **more,
            )

        return make
    if not callable(env) or isinstance(env, gymnasium.Env):
        raise TypeError(
            "Expected the id of an environment, or a function that makes one "
            "(a population needs many). Received: "
            f"env={env!r:.80} of type {type(env)}"
        )

    def call(**more: Any) -> Any:
        made = env(**options, **more)
        if max_episode_steps is not None:
            limit = gymnasium.wrappers.TimeLimit
            made = limit(made, max_episode_steps=max_episode_steps)
        return made

    return call


class Environments:
    """As many copies of an environment as are needed, made when they are.

    A gymnasium vector environment steps all of its copies until the last one
    has ended; here those that have ended rest.

    Args:
        make: makes one.

    Attributes:
        first: the first one, which has the spaces of all.
        shape: of what a policy is given of an observation.
    """

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make
        self._copies = [make()]
        self.first = self._copies[0]
        self._unwrapped = getattr(self.first, "unwrapped", self.first)
        self._space = self.first.observation_space
        self.shape = observation_shape(self._space)

    def reset(self, seeds: np.ndarray) -> np.ndarray:
        """Begins an episode in each of so many copies.

        Returns:
            What policies are given, [copies, *shape] float32.
        """
        while len(self._copies) < len(seeds):
            self._copies.append(self._another())
        observations = np.empty([len(seeds), *self.shape], np.float32)
        for copy, (environment, seed) in enumerate(
            zip(self._copies, seeds, strict=False)
        ):
            observation, _ = environment.reset(seed=int(seed))
            observations[copy] = self._read(observation)
        return observations

    def step(
        self,
        copies: np.ndarray,
        actions: Any,
        observations: np.ndarray,
        returns: np.ndarray,
        name: Callable[[int], str],
    ) -> np.ndarray:
        """A time step of some copies.

        Args:
            copies: their indices.
            actions: one for each.
            observations: of all copies, into which the new ones are written.
            returns: of all copies, to which rewards are added.
            name: says whose a copy is, for errors.

        Returns:
            Which of them go on.
        """
        goes_on = np.ones(len(copies), bool)
        for i, copy in enumerate(copies):
            with interrupts.named(name(copy)):
                result = self._copies[copy].step(actions[i])
                observation, reward, terminated, truncated, _ = result
                observations[copy] = self._read(observation)
                if not isinstance(reward, (int, float)):
                    reward = _number(reward)
            returns[copy] += reward
            goes_on[i] = not (terminated or truncated)
        return goes_on

    def _another(self) -> Any:
        """A further copy."""
        copy = self._make()
        if getattr(copy, "unwrapped", copy) is self._unwrapped:
            raise ValueError(
                "Expected a function that makes an environment each time it "
                "is called: all members play at the same time. Received: one "
                f"that returned {copy} again"
            )
        return copy

    def _read(self, observation: Any) -> Any:
        """An observation as the policy is given it."""
        observation = encoded(self._space, observation)
        if np.shape(observation) != self.shape:
            raise ValueError(
                "Expected observations of the shape of the environment's "
                f"space, {self.shape}. Received: {observation!r:.80} of "
                f"shape {np.shape(observation)}"
            )
        return observation

    def close(self) -> None:
        """Closes all copies."""
        for environment in self._copies:
            environment.close()


def _number(reward: Any) -> float:
    """A reward that is an array of one number."""
    array = np.asarray(reward)
    if array.size != 1:
        raise ValueError(
            f"Expected a reward of one number. Received: {reward!r:.80} of "
            f"shape {array.shape}"
        )
    return float(array.item())
