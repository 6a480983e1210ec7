"""The kinds of perturbation there are, by name."""

from __future__ import annotations

from typing import TypeVar

from keras_vo.perturbations.base import Perturbation
from keras_vo.perturbations.full import Full
from keras_vo.perturbations.local import LocalReparam
from keras_vo.perturbations.low_rank import LowRank

__all__ = ["chosen", "get", "names", "register"]

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


def chosen(name: str) -> str:
    """The name of a kind that an optimizer can choose for all layers.

    Raises:
        ValueError: it is none.
    """
    known = [n for n, kind in _KINDS.items() if kind.automatic or n == "full"]
    if name not in known:
        raise ValueError(
            f"`perturbation` must be one of {known}. "
            f"Received: perturbation={name!r}"
        )
    return name


def names() -> list[str]:
    """Of all kinds, in the order in which their noise is laid out."""
    return list(_KINDS)
