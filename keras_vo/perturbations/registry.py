"""The kinds of perturbation there are, by name."""

from __future__ import annotations

from typing import TypeVar

from keras_vo.perturbations.base import Perturbation
from keras_vo.perturbations.choice import Choice
from keras_vo.perturbations.full import Full
from keras_vo.perturbations.local import LocalReparam
from keras_vo.perturbations.low_rank import LowRank

__all__ = ["AUTO", "chosen", "get", "names", "register"]

AUTO = "auto"

Kind = TypeVar("Kind", bound=type[Perturbation])

# In this order the noise of a direction is laid out.
_KINDS: dict[str, type[Perturbation]] = {
    kind.name: kind for kind in (Full, LowRank, LocalReparam)
}


def register(kind: Kind) -> Kind:
    """Makes a kind of perturbation known by its name; usable as a decorator.

    Raises:
        ValueError: another one has the name.
    """
    if _KINDS.setdefault(kind.name, kind) is not kind:
        raise ValueError(
            "Expected a name that no kind of perturbation has yet. Received: "
            f"{kind.name!r}, the name of {_KINDS[kind.name]}"
        )
    return kind


def get(name: str) -> type[Perturbation]:
    """The kind of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in _KINDS:
        raise ValueError(
            f"Expected a kind of perturbation, one of {list(_KINDS)}. "
            f"Received: {name!r}"
        )
    return _KINDS[name]


def chosen(perturbation: str, convolutions: str = Full.name) -> Choice:
    """What an optimizer of these arguments chooses for all layers.

    Raises:
        ValueError: they are none, or contradict each other.
    """
    local = LocalReparam.name
    own = [n for n, kind in _KINDS.items() if kind.automatic or n == Full.name]
    if perturbation not in (known := [*own, AUTO]):
        raise ValueError(
            f"`perturbation` must be one of {known}. "
            f"Received: perturbation={perturbation!r}"
        )
    if convolutions not in (Full.name, local):
        raise ValueError(
            f"`convolutions` must be one of {[Full.name, local]}. "
            f"Received: convolutions={convolutions!r}"
        )
    if convolutions == local != perturbation:
        raise ValueError(
            f"`convolutions` says how they are perturbed under {local!r} "
            f"({AUTO!r} decides it). Expected: perturbation={local!r} with "
            f"convolutions={local!r}. Received: perturbation={perturbation!r}"
        )
    if perturbation == AUTO:
        return Choice(local, convolutions=AUTO)
    return Choice(perturbation, convolutions)


def names() -> list[str]:
    """Of all kinds, in the order in which their noise is laid out."""
    return list(_KINDS)
