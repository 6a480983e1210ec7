"""Replicas of a tf.distribute strategy: the only module that calls it.

A training step runs once in each replica. Losses, and gradients where they
are exchanged, are summed over replicas; all else each replica computes for
itself from the same numbers, so that all hold the same bits afterwards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_vo import checks, cluster

__all__ = [
    "DistributedIterator",
    "Replicas",
    "check_created_in_scope",
    "compare_workers",
    "current_replicas",
    "current_strategy",
    "entered",
    "first_local",
    "in_replica",
    "is_first_worker",
    "is_multi_worker",
    "lost_workers_explained",
    "multi_worker_strategy",
    "on_each_replica",
    "replica_local_variable",
    "undivided_losses",
    "wait_for_workers",
    "worker_name",
]


DistributedIterator = tf.distribute.DistributedIterator


@dataclasses.dataclass(frozen=True)
class Replicas:
    """The replicas in sync, as one of them sees them.

    Attributes:
        index: of this one.
        count: how many there are.
    """

    index: int = 0
    count: int = 1

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


def current_replicas() -> Replicas:
    """Which replica this is called in; the only one, outside of strategies."""
    context = tf.distribute.get_replica_context()
    if context is None or not tf.distribute.has_strategy():
        return Replicas()
    index = tf.get_static_value(context.replica_id_in_sync_group)
    return Replicas(int(index), context.num_replicas_in_sync)


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


@contextlib.contextmanager
def undivided_losses() -> Iterator[None]:
    """Lets Keras leave a mean as it is, and not divide it for a sum.

    Under a strategy Keras divides means over the batch, but not numbers that a
    loss function or an overridden `compute_loss` returns, by the number of
    replicas. Private, since Keras offers no way around it.
    """
    from keras.src.losses import loss as module

    names = ("scale_loss_for_distribution", "unscale_loss_for_distribution")
    functions = {name: getattr(module, name) for name in names}
    for name in names:
        setattr(module, name, lambda value: value)
    try:
        yield
    finally:
        for name, function in functions.items():
            setattr(module, name, function)


def multi_worker_strategy(start_timeout: float = 600.0) -> Any:
    """A MultiWorkerMirroredStrategy whose workers have met and agree.

    `tf.distribute.MultiWorkerMirroredStrategy()` works as well, but waits
    without end for a worker that does not come or was told another TF_CONFIG.
    Call it at the beginning of the program, before anything else of
    TensorFlow.

    Args:
        start_timeout: seconds to wait for the other workers.

    Returns:
        The strategy; without TF_CONFIG that of a single worker.

    Raises:
        ValueError: TF_CONFIG is not valid, or workers differ in it or in the
            versions of keras_vo, Keras or TensorFlow.
        TimeoutError: a worker did not come.
    """
    if os.environ.get("TF_CONFIG"):
        cluster.meet(cluster.Cluster.from_environment(), start_timeout)
    return tf.distribute.MultiWorkerMirroredStrategy()


def compare_workers(strategy: Any, facts: dict[str, Any]) -> None:
    """Raises unless all workers of the strategy have the same facts.

    All workers have to call it.

    Args:
        strategy: a MultiWorkerMirroredStrategy.
        facts: by name, what has to be the same, to be written as JSON.

    Raises:
        ValueError: on each worker, which one differs from the first in what.
    """
    text = json.dumps(facts, default=lambda value: type(value).__name__)
    own = tf.constant(list(text.encode()), tf.int32)
    lengths = _gather(strategy, tf.reshape(tf.size(own), [1]))
    parts = tf.split(_gather(strategy, own), lengths)
    received = [json.loads(bytes(part.numpy().tolist())) for part in parts]
    per_worker = len(strategy.extended.worker_devices)
    first, *others = received[::per_worker]
    differences = [
        f"worker {number} has {name}={other.get(name)!r}, worker 0 "
        f"{first.get(name)!r}"
        for number, other in enumerate(others, start=1)
        for name in sorted({*first, *other})
        if first.get(name) != other.get(name)
    ]
    if differences:
        raise ValueError(
            "Expected all workers to run the same search from the same "
            f"state. Received: {'; '.join(differences)}"
        )


def wait_for_workers(strategy: Any) -> None:
    """Returns when all workers of the strategy have called it."""
    _gather(strategy, tf.zeros([1], tf.int32))


def worker_name(strategy: Any) -> str:
    """ "worker0", say: of this process among those of the strategy."""
    resolver = strategy.cluster_resolver
    return f"{resolver.task_type}{resolver.task_id}"


def is_first_worker(strategy: Any) -> bool:
    """Whether this is the chief: the one to show progress, say."""
    if not is_multi_worker(strategy):
        return True
    jobs = strategy.cluster_resolver.cluster_spec().as_dict()
    return worker_name(strategy) == ("chief0" if "chief" in jobs else "worker0")


@contextlib.contextmanager
def lost_workers_explained(strategy: Any) -> Iterator[None]:
    """Turns what TensorFlow says of a lost worker into a clear error."""
    try:
        yield
    except tf.errors.OpError as error:
        if not is_multi_worker(strategy) or not (
            isinstance(error, tf.errors.UnavailableError)
            or "Collective ops is aborted" in str(error)
        ):
            raise
        raise RuntimeError(
            "A worker was lost, or runs another program than this one. "
            "Expected: all workers to take every step. Start all of them "
            "again: with keras.callbacks.BackupAndRestore they go on from the "
            f"last backup, without it from the beginning. Received: {error}"
        ) from error


def _gather(strategy: Any, values: tf.Tensor) -> tf.Tensor:
    """The values [n] of all replicas, [sum of n]."""
    return strategy.gather(
        strategy.experimental_distribute_values_from_function(
            lambda _: tf.identity(values)
        ),
        axis=0,
    )
