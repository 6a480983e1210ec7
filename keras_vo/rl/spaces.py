"""Spaces of gymnasium, and what a policy has to do with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Actions", "actions_of", "check_policy", "observation_shape"]


class Actions(NamedTuple):
    """How a policy's outputs become actions.

    Attributes:
        shape: of the outputs for one observation.
        choose: from outputs [n, *shape] and noise [n, ...], or `None`, to n
            actions.
        noise: from a NumPy generator to the noise of one action.
    """

    shape: tuple[int, ...]
    choose: Callable[[np.ndarray, np.ndarray | None], Any]
    noise: Callable[[np.random.Generator], np.ndarray]


def _kind(space: Any) -> str:
    """The name of the kind of space that it is (of); empty: another one."""
    kinds = ("Box", "Discrete", "MultiDiscrete", "MultiBinary")
    names = [cls.__name__ for cls in type(space).__mro__]
    return next((name for name in names if name in kinds), "")


def observation_shape(space: Any) -> tuple[int, ...]:
    """Of what the policy is given for one observation.

    Raises:
        ValueError: the space is not made of numbers.
    """
    shape = getattr(space, "shape", None)
    kind = _kind(space)
    if kind == "Discrete":
        return (int(space.n),)
    if not kind or shape is None:
        raise ValueError(
            "Expected an environment whose observations are arrays: wrap it, "
            "by `gymnasium.wrappers.FlattenObservation`, say. Received: "
            f"observation_space={space}"
        )
    return tuple(shape)


def encoded(space: Any, observation: Any) -> Any:
    """An observation as the policy is given it: one-hot if discrete."""
    if _kind(space) == "Discrete":
        return np.eye(int(space.n), dtype=np.float32)[observation - space.start]
    return observation


def actions_of(space: Any, action_noise: float) -> Actions:
    """The actions of a space.

    Box: the outputs (rounded where actions are integers), with normal noise of
    `action_noise` times half the range (times 1 where there is none), within
    bounds. Discrete, MultiDiscrete: the largest of the outputs; a random one
    with probability `action_noise`. MultiBinary: whether outputs are above 0,
    alike.

    Raises:
        ValueError: another space, or a probability above 1.
    """
    kind = _kind(space)
    if kind in ("Discrete", "MultiDiscrete", "MultiBinary"):
        if action_noise > 1:
            raise ValueError(
                "`action_noise` of discrete actions is a probability. "
                f"Received: action_noise={action_noise}"
            )
    if kind == "Box":
        return _box(space, action_noise)
    if kind == "Discrete":
        return _largest(np.array([space.n]), space.start, action_noise, False)
    if kind == "MultiDiscrete" and len(space.shape) == 1:
        return _largest(space.nvec, space.start, action_noise, True)
    if kind == "MultiBinary" and len(space.shape) == 1:
        return _binary(space, action_noise)
    raise ValueError(
        "Expected an environment whose actions are Box, Discrete, "
        "MultiDiscrete or MultiBinary (of one axis). Received: "
        f"action_space={space}"
    )


def _box(space: Any, action_noise: float) -> Actions:
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    finite = np.isfinite(low) & np.isfinite(high)
    half = np.where(finite, high - np.where(finite, low, 0), 2) / 2
    whole = np.issubdtype(space.dtype, np.integer)

    def choose(outputs: np.ndarray, normal: np.ndarray | None) -> np.ndarray:
        if normal is not None:
            outputs = outputs + action_noise * half * normal
        clipped = np.clip(outputs, low, high)
        clipped = np.round(clipped) if whole else clipped
        return np.asarray(clipped.astype(space.dtype))

    shape = tuple(space.shape)
    return Actions(shape, choose, lambda rng: rng.standard_normal(shape))


def _largest(
    sizes: np.ndarray, start: Any, action_noise: float, several: bool
) -> Actions:
    ends = np.cumsum(sizes)

    def choose(outputs: np.ndarray, uniform: np.ndarray | None) -> np.ndarray:
        parts = np.split(outputs, ends[:-1], axis=-1)
        chosen = np.stack([part.argmax(-1) for part in parts], axis=-1)
        if uniform is not None:
            random = np.floor(uniform[..., 1] * sizes).astype(chosen.dtype)
            chosen = np.where(uniform[..., 0] < action_noise, random, chosen)
        return np.asarray(chosen + start if several else chosen[:, 0] + start)

    shape = (int(ends[-1]),)
    return Actions(shape, choose, lambda rng: rng.random((len(sizes), 2)))


def _binary(space: Any, action_noise: float) -> Actions:
    def choose(outputs: np.ndarray, uniform: np.ndarray | None) -> np.ndarray:
        chosen = outputs > 0
        if uniform is not None:
            random = uniform[..., 1] < 0.5
            chosen = np.where(uniform[..., 0] < action_noise, random, chosen)
        return np.asarray(chosen.astype(space.dtype))

    shape = tuple(space.shape)
    return Actions(shape, choose, lambda rng: rng.random((*shape, 2)))


def check_policy(model: Any, environment: Any, shape: tuple[int, ...]) -> None:
    """Raises unless a policy fits an environment.

    Args:
        model: the policy.
        environment: that has the spaces.
        shape: of the outputs that its actions are made of.
    """
    observations, actions = (
        environment.observation_space,
        environment.action_space,
    )
    inputs = np.zeros([1, *observation_shape(observations)], np.float32)
    expected = (
        f"Expected a policy from inputs {inputs.shape} to outputs "
        f"{(1, *shape)}, for the observations {observations} and the actions "
        f"{actions}. Received: "
    )
    try:
        outputs = model(inputs)
    except Exception as error:
        name = getattr(model, "name", model)
        raise ValueError(
            f"{expected}{name!r}, whose inputs are "
            f"{getattr(model, 'input_shape', 'others')}: {error}"
        ) from error
    received = tuple(getattr(outputs, "shape", ()))
    if received != (1, *shape):
        raise ValueError(f"{expected}outputs {received}")
