"""The workers of a MultiWorkerMirroredStrategy: met, compared, lost."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from keras_vo.replicas import cluster
from keras_vo.replicas.strategies import is_multi_worker

__all__ = [
    "compare_workers",
    "is_first_worker",
    "lost_workers_explained",
    "multi_worker_strategy",
    "wait_for_workers",
    "worker_name",
]


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
