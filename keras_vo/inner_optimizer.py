"""The Keras optimizer that moves the mean: checked, and made to fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import keras

from keras_vo.keras_compat import (
    take_gradients_as_they_are,
    uses_weight_decay,
)

__all__ = [
    "build",
    "check_no_overwriting",
    "check_settable",
    "checked_inner",
    "rate_by_name",
    "slow_down",
]

# Of an inner optimizer given by name. docs/decisions/0013-sizes-by-default.md.
_LEARNING_RATE = 0.02
# Where weights are trained already. docs/decisions/0030-trained-weights.md.
_SLOW = 0.1


def checked_inner(inner: Any, max_kl: float | None) -> Any:
    """The inner optimizer, for gradients that need no sum over replicas.

    Args:
        inner: a Keras optimizer or the name of one.
        max_kl: bound on the KL divergence of a step, or `None`.

    Raises:
        ValueError: it is none, wraps another one, or has options that cannot
            work here.
    """
    identifier = inner
    if isinstance(inner, str):
        identifier = {
            "class_name": inner,
            "config": {"learning_rate": _LEARNING_RATE},
        }
    try:
        inner = keras.optimizers.get(identifier)
    except ValueError as error:
        raise ValueError(
            "`inner_optimizer` must be a Keras optimizer or the name of one, "
            f"such as 'adam' or 'sgd'. Received: inner_optimizer={inner!r}"
        ) from error
    if hasattr(inner, "inner_optimizer"):  # VOOptimizer, loss scaling
        raise ValueError(
            "`inner_optimizer` must be a Keras optimizer that moves weights "
            f"by a gradient. Received: inner_optimizer={inner!r}"
        )
    for option in ("gradient_accumulation_steps", "loss_scale_factor"):
        if getattr(inner, option, None) is not None:
            raise ValueError(
                f"`{option}` of the inner optimizer must be None: each step "
                "is a search gradient of its own, with no loss to scale and "
                "none to accumulate (raise `population_size` instead). "
                f"Received: {option}={getattr(inner, option)}"
            )
    if max_kl is not None and inner.use_ema:
        raise ValueError(
            "`max_kl` must be None where the inner optimizer keeps an EMA: "
            "the average would hold steps that the bound took back. "
            f"Received: max_kl={max_kl} and use_ema=True"
        )
    take_gradients_as_they_are(inner)
    # `VOOptimizer` saves its variables by name. Keras would save them a second
    # time, and load them by position into any other optimizer.
    inner.save_own_variables = inner.load_own_variables = _nothing
    return inner


def rate_by_name(inner: Any) -> float | None:
    """The learning rate that a name stands for; `None`: it is no name."""
    return _LEARNING_RATE if isinstance(inner, str) else None


def build(inner: Any, variables: Sequence[Any], moved: Sequence[Any]) -> None:
    """Builds the inner optimizer, for others than the variables.

    Args:
        inner: the inner optimizer.
        variables: the weights.
        moved: what it moves, for each of them: the variable itself, or what
            is in its place.

    Raises:
        ValueError: it is built already, for variables that others replace.
    """
    pairs = list(zip(variables, moved, strict=True))
    if any(v is not mean for v, mean in pairs):
        if inner.built:
            raise ValueError(
                "Expected an inner optimizer that is not built yet, as it "
                "moves a float32 mean in the place of weights of low "
                "precision. Received: one that is built, for the weights"
            )
        inner.exclude_from_weight_decay(
            [mean for v, mean in pairs if not uses_weight_decay(inner, v)]
        )
    inner.build(list(moved))


def check_no_overwriting(inner: Any) -> None:
    """Raises if weights are to be overwritten by their average in a step."""
    frequency = getattr(inner, "ema_overwrite_frequency", None)
    if frequency is not None:
        raise ValueError(
            "`ema_overwrite_frequency` of the inner optimizer must be None "
            "under a tf.distribute strategy: Keras can't overwrite weights in "
            "a replica's step (keras#20582). (At the end of `fit` they are.) "
            f"Received: ema_overwrite_frequency={frequency}"
        )


def check_settable(inner: Any) -> None:
    """Raises if its learning rate is a schedule or a function."""
    if not hasattr(inner.learning_rate, "assign"):
        raise ValueError(
            "adaptation_sampling=True sets the learning rate of the inner "
            "optimizer. Expected: one whose learning rate is a number. "
            f"Received: {type(inner).__name__} with a schedule or a function"
        )


def slow_down(inner: Any) -> None:
    """Lowers the learning rate that a name stood for, if it still has it."""
    rate = keras.ops.convert_to_numpy(inner.learning_rate)
    if math.isclose(rate, _LEARNING_RATE, rel_tol=1e-6):
        inner.learning_rate = _SLOW * _LEARNING_RATE


def _nothing(store: Any) -> None:
    """Neither writes nor reads."""
