"""Strategies of tf.distribute: scopes, replicas, variables.

A training step runs once in each replica. Losses, and gradients where they
are communicated, are summed over replicas; all else each replica computes for
itself from the same numbers, so that all hold the same bits afterwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_vo import checks
from keras_vo.search.members import Shard

__all__ = [
    "DistributedIterator",
    "check_created_in_scope",
    "current_strategy",
    "entered",
    "first_local",
    "in_replica",
    "is_multi_worker",
    "local_replicas",
    "on_each_replica",
    "own_directions",
    "replica_local_variable",
    "worker_count",
]


DistributedIterator = tf.distribute.DistributedIterator


def current_strategy() -> Any:
    """The strategy in whose scope or replica this is called; `None` if none.

    Raises:
        NotImplementedError: it is one that keras_vo does not work with.
    """
    if not tf.distribute.has_strategy():
        return None
    strategy = tf.distribute.get_strategy()
    unsupported = {
        "TPUStrategy": (
            tf.distribute.TPUStrategy,
            tf.distribute.experimental.TPUStrategy,
        ),
        "ParameterServerStrategy": tf.distribute.ParameterServerStrategy,
        "CentralStorageStrategy": (
            tf.distribute.experimental.CentralStorageStrategy
        ),
    }
    for name, kind in unsupported.items():
        if isinstance(strategy, kind):
            raise NotImplementedError(
                "keras_vo evaluates its population on replicas that each hold "
                "all weights. Expected: tf.distribute.MirroredStrategy (one "
                "machine) or tf.distribute.MultiWorkerMirroredStrategy "
                f"(several). Received: {name}"
            )
    return strategy


def is_multi_worker(strategy: Any) -> bool:
    """Whether replicas are in several processes, with a network between."""
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return False
    jobs = strategy.cluster_resolver.cluster_spec().as_dict()
    return sum(map(len, jobs.values())) > 1


def check_created_in_scope(variables: Sequence[Any]) -> None:
    """Raises unless each replica of the current strategy has the variables.

    Args:
        variables: Keras or TensorFlow variables.
    """
    strategy = current_strategy()
    if strategy is None:
        return
    for variable in variables:
        if not strategy.extended.variable_created_in_scope(
            variable.value if isinstance(variable, keras.Variable) else variable
        ):
            raise ValueError(
                "Expected a model, a VOOptimizer and its inner optimizer that "
                "are made under `strategy.scope()`. Received: "
                f"{checks.variable_name(variable)!r}, which was made outside "
                f"of the scope of the {type(strategy).__name__}"
            )


def in_replica() -> bool:
    """Whether this is called in a replica of a strategy."""
    return bool(
        tf.distribute.has_strategy()
        and not tf.distribute.in_cross_replica_context()
    )


def entered(strategy: Any) -> Any:
    """The scope of the strategy, or nothing to enter if it is entered."""
    if strategy is None or strategy is tf.distribute.get_strategy():
        return contextlib.nullcontext()
    return strategy.scope()


def on_each_replica(function: Callable[[], Any]) -> Any:
    """`function()` in each replica; what the first one here returns.

    Called in a replica, or where there is no strategy, it is called plainly.
    """
    if not tf.distribute.in_cross_replica_context():
        return function()
    return first_local(current_strategy().run(function))


def worker_count(strategy: Any) -> int:
    """How many processes a strategy has."""
    if not is_multi_worker(strategy):
        return 1
    jobs = strategy.cluster_resolver.cluster_spec().as_dict()
    return sum(map(len, jobs.values()))


def local_replicas() -> list[int]:
    """Indices of the current strategy's replicas in this process."""
    strategy = tf.distribute.get_strategy()
    replica = tf.distribute.get_replica_context
    indices = strategy.experimental_local_results(
        strategy.run(
            lambda: tf.convert_to_tensor(replica().replica_id_in_sync_group)
        )
    )
    return list(map(int, indices))


def own_directions(directions: int) -> list[int]:
    """Those that the replicas of this process evaluate, of so many."""
    count = tf.distribute.get_strategy().num_replicas_in_sync
    shards = [Shard.make(directions, i, count) for i in local_replicas()]
    return [
        direction
        for shard in shards
        if shard.counts
        for direction in range(shard.start, shard.start + shard.size)
    ]


def first_local(values: Any, strategy: Any = None) -> Any:
    """A structure of values, those of the first replica of this machine."""
    strategy = strategy or tf.distribute.get_strategy()
    return keras.tree.map_structure(
        lambda value: strategy.experimental_local_results(value)[0], values
    )


def replica_local_variable(value: Any) -> tf.Variable:
    """A variable that each replica assigns for itself, and no one saves.

    Outside of replicas it is read by `first_local`.
    """
    return tf.Variable(
        value,
        trainable=False,
        synchronization=tf.VariableSynchronization.ON_READ,
        aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
    )
