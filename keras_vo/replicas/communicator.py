"""What the search is told of the replicas of a strategy."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from keras_vo.replicas import cost
from keras_vo.replicas.strategies import (
    current_strategy,
    entered,
    is_multi_worker,
    local_replicas,
    on_each_replica,
)

__all__ = ["Replicas", "current_replicas", "sum_over_workers"]


@dataclasses.dataclass(frozen=True)
class Replicas:
    """The replicas in sync, as one of them sees them.

    It is the `Communicator` of a search.

    Attributes:
        index: of this one.
        count: how many there are.
        exchange: how gradients come together, see `keras_vo.exchange`.
        network: whether there is one between them.
    """

    index: int = 0
    count: int = 1
    exchange: str = "auto"
    network: bool = False

    def sum(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Sums over replicas, in one message; of one dtype."""
        tensors = list(tensors)
        if self.count == 1 or not tensors:
            return tensors
        flat = tf.concat([tf.reshape(t, [-1]) for t in tensors], axis=0)
        total = tf.distribute.get_replica_context().all_reduce(
            tf.distribute.ReduceOp.SUM, flat
        )
        parts = tf.split(total, [tf.size(t) for t in tensors])
        return [
            tf.ensure_shape(tf.reshape(part, tf.shape(t)), t.shape)
            for part, t in zip(parts, tensors, strict=True)
        ]

    def reconstructs(
        self, directions: int, noise_size: int, gradient_size: int
    ) -> bool:
        """Whether each replica sums the gradient over all noise itself."""
        exchange = self.exchange
        if exchange == "auto":
            exchange = cost.cost_model(self.network).cheaper(
                directions, noise_size, gradient_size, self.count
            )
        return exchange == "fitness"


def current_replicas(exchange: str = "auto") -> Replicas:
    """Those that this is called in; the only one, outside of strategies."""
    context = tf.distribute.get_replica_context()
    if context is None or not tf.distribute.has_strategy():
        return Replicas()
    index = tf.get_static_value(context.replica_id_in_sync_group)
    return Replicas(
        int(index),
        context.num_replicas_in_sync,
        exchange,
        is_multi_worker(current_strategy()),
    )


def sum_over_workers(strategy: Any, values: Any) -> np.ndarray:
    """The sum of numbers that each process of a strategy has, float64.

    Args:
        strategy: all of whose processes call this; `None`: there is none.
        values: an array, or a number, of this process.
    """
    values = np.asarray(values, np.float64)
    if not is_multi_worker(strategy):
        return values

    def total() -> tf.Tensor:
        replicas = current_replicas()
        first = replicas.index % replicas_here == 0
        own = tf.constant(values if first else np.zeros_like(values))
        return replicas.sum([own])[0]

    with entered(strategy):
        replicas_here = len(local_replicas())
        return np.asarray(on_each_replica(total).numpy())
