"""What rules may ask of the members of a step: see `keras_vo.search.rules`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from keras_vo.search import credit
from keras_vo.search.best import best_member
from keras_vo.search.chunks import Noise
from keras_vo.search.credit import MEMBER, Pooled
from keras_vo.search.gaussian import Gaussian
from keras_vo.search.rules import Best, Weighing
from keras_vo.search.state import Judged

if TYPE_CHECKING:
    from keras_vo.search.engine import Search

__all__ = ["about"]


def about(
    search: Search,
    populations: Mapping[str, Judged],
    pooled: Mapping[str, Pooled],
) -> dict[str, Any]:
    """Of `rules.Step`: what is said of members, and what says more."""
    asked: dict[str, Any] = {
        "best": _best(search, populations, pooled),
        "weighing": _weighing(search, populations, pooled),
    }
    if MEMBER in populations:
        asked["members"] = populations[MEMBER].members
        asked["compared"] = pooled[MEMBER].compared
    return asked


def _best(
    search: Search,
    populations: Mapping[str, Judged],
    pooled: Mapping[str, Pooled],
) -> Best | None:
    """See `rules.Step`."""
    if MEMBER not in populations:
        return None
    members = populations[MEMBER].members
    return functools.partial(
        best_member,
        members,
        pooled[MEMBER].losses,
        lambda one: search.source(MEMBER, one, activations=False),
        search.perturbations.at(MEMBER).weights,
    )


def _weighing(
    search: Search,
    populations: Mapping[str, Judged],
    pooled: Mapping[str, Pooled],
) -> Weighing:
    """See `rules.Step`."""

    def asked(
        others: Sequence[Gaussian],
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        losses = pooled[MEMBER].losses
        ratios = _log_ratios(search, populations[MEMBER], others)
        return losses, ~tf.math.is_nan(losses), ratios

    return asked


def _log_ratios(
    search: Search, population: Judged, others: Sequence[Gaussian]
) -> tf.Tensor:
    """log p'(x_n) / p(x_n) of all replicas' members x_n, [others, N].

    Args:
        search: whose members have the density p.
        population: they.
        others: p'.
    """
    members, evaluated = population.members, population.outcomes.evaluated
    kinds, signs = search.perturbations.at(MEMBER), members.signs
    shard = search.shard(members)

    def ratios(noise: Noise) -> tf.Tensor:
        found = tf.stack([kinds.log_ratios(noise, signs, o) for o in others])
        by_row = tf.transpose(found, [2, 0, 1])
        return tf.ensure_shape(by_row, [None, len(others), len(signs)])

    reduce: Callable[..., Any]
    if evaluated is None:
        own = members.shard(shard)
        source = search.source(MEMBER, own, activations=False)
        reduce = functools.partial(credit.reduce_noise, source)
    else:
        reduce = evaluated.reduce
    found = credit.each(reduce, ratios, shard.size)
    by_other = tf.unstack(tf.transpose(found, [1, 2, 0]), num=len(others))
    placed = [shard.place(tf.reshape(part, [-1])) for part in by_other]
    return search.communicator.sum([tf.stack(placed)])[0]
