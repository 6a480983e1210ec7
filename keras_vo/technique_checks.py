"""Arguments of single techniques: checked, or refused with a clear error."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from keras_vo.checks import as_float, variable_name
from keras_vo.inner_optimizer import check_settable
from keras_vo.search.credit import EXAMPLE, POSITION

__all__ = [
    "check_densities",
    "checked_adaptation",
    "checked_alpha",
    "checked_credit",
    "warn_of_many_weights",
]

# Weights for each member from which on importance mixing is warned of.
_MANY = 10


def checked_credit(credit: str, discount: Any) -> tuple[str, float]:
    """The finest level of credit, and the discount of later positions."""
    if not isinstance(credit, str) or credit not in (EXAMPLE, POSITION):
        raise ValueError(
            f"`credit` must be one of {[EXAMPLE, POSITION]}. "
            f"Received: credit={credit!r}"
        )
    number = as_float(discount)
    if not 0 <= number <= 1:
        raise ValueError(
            "`position_discount` must be a number in [0, 1]. "
            f"Received: position_discount={discount!r}"
        )
    if number and credit != POSITION:
        raise ValueError(
            "`position_discount` is that of credit by position. Expected: "
            f'credit="position", or 0. Received: {discount!r} with '
            f"credit={credit!r}"
        )
    return credit, number


def _check_full(argument: str, perturbation: str) -> None:
    """Raises for noise under which members' weights have no density."""
    if perturbation != "full":
        raise ValueError(
            f"{argument} needs the density of members' weights under other "
            "search distributions, which noise of low rank and noise on "
            'activations have not. Expected: perturbation="full". '
            f"Received: perturbation={perturbation!r}"
        )


def check_densities(
    optimizer: Any, full: Sequence[int], variables: Sequence[Any]
) -> None:
    """Raises for layers with noise of their own kind, under which members'
    weights have no density.

    Args:
        optimizer: a VOOptimizer.
        full: indices of the variables with noise of full rank.
        variables: all that are searched over.
    """
    others = [
        variable_name(variable)
        for i, variable in enumerate(variables)
        if i not in full
    ]
    for argument in ("importance_mixing", "adaptation_sampling"):
        value = getattr(optimizer, argument)
        if others and value is not None and value is not False:
            raise ValueError(
                f"{argument}={value} needs the density of members' weights "
                "under other search distributions. Expected: noise of full "
                "rank on all weights. Received: layers with noise of their "
                f"own on {others[0]!r} (of {len(others)} variables)"
            )


def checked_adaptation(
    value: Any, perturbation: str, inner_optimizer: Any
) -> bool:
    """`adaptation_sampling`: True or False."""
    if value not in (True, False):
        raise ValueError(
            "`adaptation_sampling` must be True or False. Received: "
            f"adaptation_sampling={value!r}"
        )
    if value:
        _check_full("adaptation_sampling=True", perturbation)
        check_settable(inner_optimizer)
    return bool(value)


def checked_alpha(
    alpha: Any, perturbation: str, antithetic: bool
) -> float | None:
    """`importance_mixing`, in [0, 1]; `None`: no former members are used."""
    if alpha is None:
        return None
    number = as_float(alpha)
    if not 0 <= number <= 1:
        raise ValueError(
            "`importance_mixing` must be a number in [0, 1], the least share "
            "of members that is drawn anew, or None. Received: "
            f"importance_mixing={alpha!r}"
        )
    _check_full(f"importance_mixing={alpha}", perturbation)
    if antithetic:
        raise ValueError(
            "importance_mixing keeps single members, which mirror no other "
            "once the mean has moved. Expected: antithetic=False. Received: "
            f"importance_mixing={alpha} with antithetic=True"
        )
    return number


def warn_of_many_weights(weights: int, members: int) -> None:
    """Warns where importance mixing keeps the best members, whatever a step is:
    see `keras_vo.search.importance_mixing`.
    """
    if weights > _MANY * members:
        warnings.warn(
            f"importance_mixing pays for few weights. Received: {weights:,} of "
            f"them, and {members:,} members. The best members will stay "
            "whatever a step is, and repeat what they have said: see "
            "`effective_size` of `report.mixing` or SearchMonitor",
            stacklevel=2,
        )
