"""Utilities of the examples of a replica, where noise has their credit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import tensorflow as tf

from keras_vo.search import activation_scale, example_credit
from keras_vo.search.state import Judged, OfReplica

if TYPE_CHECKING:
    from keras_vo.search.engine import Search

__all__ = ["utilities_of"]


def utilities_of(
    search: Search, level: str, population: Judged, own: OfReplica
) -> dict[str, tf.Tensor]:
    """Utilities of this replica's examples, and of their positions.

    By the names that `Rows` has for them, [directions, signs, batch, ...].
    Notes in `own` how many examples there are, and the sums over them
    alone. Each counts the same, by how many members it was seen.
    """
    members, outcomes = population.members, population.outcomes
    shard, signs = search.shard(members), len(members.signs)
    utilities = example_credit.utilities(
        outcomes,
        search.settings.position_discount,
        example_credit.Scale(
            signs,
            search.settings.loss_scaled,
            shard.counts,
            search.communicator,
            search.state.gaussian.layout.dtype,
        ),
    )
    dtype = search.state.gaussian.layout.dtype
    own.ties[level] = activation_scale.first_ties(
        outcomes, search.state.rules, dtype
    )
    counts = tf.cast(shard.counts, dtype)
    seen = tf.shape(utilities["utilities"])[1]
    own.counts[level] = counts * tf.cast(seen, dtype)
    own.totals.update(
        tf.nest.map_structure(
            lambda total: counts * total,
            search.perturbations.at(level).totals(),
        )
    )
    share = counts / (shard.size * signs)
    return {
        name: share * tf.stack(tf.split(values, signs), axis=1)
        for name, values in utilities.items()
    }
