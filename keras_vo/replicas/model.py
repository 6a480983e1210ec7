"""What a Keras model needs beside its training step, under a strategy.

Keras's own `fit` and `evaluate` work under MirroredStrategy, but not under
MultiWorkerMirroredStrategy, where they reduce batches and single numbers in
ways that are made for neither (keras#20585).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_vo.keras_compat import TrainerHooks, initial_epoch
from keras_vo.replicas import strategies, workers

__all__ = ["ReplicatedModel", "with_callback"]


class ReplicatedModel(TrainerHooks):
    """Mixin: `fit`, `evaluate` and `predict` under tf.distribute."""

    jit_compile: bool  # Keras's property
    steps_per_execution: int  # Keras's attribute

    @property
    def made_under(self) -> Any:
        """The strategy that the model was made under; `None`: no one."""
        strategy = self.distribute_strategy
        with strategies.entered(strategy):
            return strategies.current_strategy()

    _evaluating = False
    _facts: dict[str, Any] | None = None

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """As in Keras.

        On several machines, workers that differ in the search, the weights or
        the number of steps are an error before the first step, and so is,
        within seconds, the loss of a worker.

        Raises:
            ValueError: workers differ.
            RuntimeError: a worker was lost.
        """
        strategy = self.made_under
        if not strategies.is_multi_worker(strategy):
            return super().fit(*args, **kwargs)
        compare = keras.callbacks.LambdaCallback(
            on_train_begin=lambda logs: self._compare_workers()
        )
        given = with_callback(compare, args, kwargs)
        callbacks = _as_list(given.get("callbacks"))
        _make_directories(callbacks)
        backups = [
            callback
            for callback in callbacks
            if isinstance(callback, keras.callbacks.BackupAndRestore)
        ]
        self._facts = {
            "epochs": given.get("epochs", 1),
            "validation_freq": given.get("validation_freq", 1),
            "validation": given.get("validation_data") is not None
            or bool(given.get("validation_split")),
        }
        try:
            with workers.lost_workers_explained(strategy):
                with _kept(backups):
                    history = super().fit(**given)
                # Not before all have written their last backup.
                workers.wait_for_workers(strategy)
        finally:
            self._facts = None
        for backup in backups:
            if backup.delete_checkpoint:
                _remove(backup.backup_dir)
        return history

    def _compare_workers(self) -> None:
        """Before the first step, when a backup has been restored."""
        workers.compare_workers(
            self.made_under,
            (self._facts or {})
            | {
                # Where BackupAndRestore lets Keras begin.
                "initial_epoch": initial_epoch(self),
                "steps_per_execution": self.steps_per_execution,
                "SearchMonitor": getattr(self.optimizer, "observer", None)
                is not None,
                "weights": [list(v.shape) for v in self.weights],
                "values of weights": _digest(self.weights),
                "state of the search": _digest(self.optimizer.variables),
                **_shared_settings(self.optimizer.get_config()),
            },
        )

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """As in Keras."""
        self._evaluating = True
        try:
            with workers.lost_workers_explained(self.made_under):
                return super().evaluate(*args, **kwargs)
        finally:
            self._evaluating = False

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """As in Keras."""
        with workers.lost_workers_explained(self.made_under):
            return super().predict(*args, **kwargs)

    def save(self, filepath: Any, *args: Any, **kwargs: Any) -> Any:
        """As in Keras; all workers may save to the same place."""
        plain = not args and kwargs.get("zipped") is not False
        if not plain or not kwargs.get("overwrite", True):
            return super().save(filepath, *args, **kwargs)
        with self._replaced(filepath) as path:
            return super().save(path, **kwargs)

    def save_weights(self, filepath: Any, *args: Any, **kwargs: Any) -> Any:
        """As in Keras; all workers may save to the same place."""
        if args or not kwargs.get("overwrite", True):
            return super().save_weights(filepath, *args, **kwargs)
        with self._replaced(filepath) as path:
            return super().save_weights(path, **kwargs)

    def export(self, *args: Any, **kwargs: Any) -> Any:
        """As in Keras; of several workers, only the first writes."""
        if workers.is_first_worker(self.made_under):
            return super().export(*args, **kwargs)
        return None

    @contextlib.contextmanager
    def _replaced(self, filepath: Any) -> Iterator[Any]:
        """A file to write, which then is put into the place of `filepath`.

        Workers may share the file system or not: each writes its own file, the
        same as the others', and never leaves half of one.
        """
        strategy = self.made_under
        if not strategies.is_multi_worker(strategy) or "://" in str(filepath):
            yield filepath
            return
        target = pathlib.Path(filepath)
        written = target.with_name(
            f"{workers.worker_name(strategy)}-{target.name}"
        )
        try:
            yield str(written)
            os.replace(written, target)
        finally:
            written.unlink(missing_ok=True)

    def build_from_data(
        self, build: Callable[..., None], iterator: Any, data_batch: Any
    ) -> None:
        """Builds the model from the first batch, as it does in Keras.

        Keras takes the mean of the batch over replicas, which fails unless all
        shards are of one size, and on several machines.
        """
        if iterator is not None and self._facts is not None:
            self._facts.setdefault("steps_per_epoch", iterator.num_batches)
        if iterator is not None and self.made_under is not None:
            for *_, batches in iterator:  # one number or two before it
                data_batch = strategies.first_local(
                    next(batches), self.made_under
                )
                break
            iterator = None
        build(iterator, data_batch)

    def make_step_function(
        self, make: Callable[[Any], Any], step: Callable[[Any], Any]
    ) -> Any:
        """The function of a training or test step, as it is in Keras.

        On several machines Keras takes the mean of a step's results over their
        first axis: numbers get one. Sums over replicas can't be in the loop in
        which Keras takes `steps_per_execution` steps (keras#19246): they are
        taken one after another.
        """
        if self.made_under is None:
            return make(step)
        if strategies.is_multi_worker(self.made_under):
            step = _with_first_axis(step)
        # XLA can compile neither sums over replicas nor what is around them.
        jit_compile, self.jit_compile = self.jit_compile, False
        try:
            one_step = make(step)
        finally:
            self.jit_compile = jit_compile

        def function(iterator: Any) -> Any:
            is_dataset = isinstance(
                iterator, (tf.data.Iterator, strategies.DistributedIterator)
            )
            steps, self.steps_per_execution = self.steps_per_execution, 1
            outputs = None
            try:
                for _ in range(steps):
                    outputs = one_step(
                        iterator if is_dataset else iter([next(iterator)])
                    )
            except (StopIteration, tf.errors.OutOfRangeError):
                if outputs is None:
                    raise
            finally:
                self.steps_per_execution = steps
            return outputs

        return function


@contextlib.contextmanager
def _kept(backups: list[Any]) -> Iterator[None]:
    """Lets callbacks leave their backups, which workers may share."""
    delete = [backup.delete_checkpoint for backup in backups]
    for backup in backups:
        backup.delete_checkpoint = False
    try:
        yield
    finally:
        for backup, value in zip(backups, delete, strict=True):
            backup.delete_checkpoint = value


def _make_directories(callbacks: list[Any]) -> None:
    """Makes those that callbacks write to: in Keras, a second worker fails."""
    for callback in callbacks:
        if isinstance(callback, keras.callbacks.BackupAndRestore):
            tf.io.gfile.makedirs(callback.backup_dir)
        elif isinstance(callback, keras.callbacks.ModelCheckpoint):
            directory = os.path.dirname(callback.filepath)
            if directory and "{" not in directory:
                tf.io.gfile.makedirs(directory)


def _remove(directory: Any) -> None:
    """Removes a directory that another worker may be removing."""
    try:
        tf.io.gfile.rmtree(str(directory))
    except tf.errors.NotFoundError:
        pass


def _shared_settings(config: Any) -> Any:
    """What all workers have to agree on.

    That is neither how each uses its memory, nor names: these count the
    objects that a process has made.
    """
    if not isinstance(config, dict):
        return config
    own = ("name", "chunk_size", "memory_budget")
    return {k: _shared_settings(v) for k, v in config.items() if k not in own}


def with_callback(
    callback: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of `fit`, by name, with a further callback.

    Args:
        callback: it, called after the others.
        args: positional arguments.
        kwargs: the others.
    """
    signature = inspect.signature(keras.Model.fit)
    given = signature.bind(None, *args, **kwargs).arguments
    del given["self"]
    callbacks = given.get("callbacks")
    if isinstance(callbacks, keras.callbacks.CallbackList):
        callbacks.append(callback)
    else:
        given["callbacks"] = [*_as_list(callbacks), callback]
    return given


def _as_list(callbacks: Any) -> list[Any]:
    if isinstance(callbacks, keras.callbacks.CallbackList):
        return list(callbacks.callbacks)
    return keras.tree.flatten(callbacks or [])


def _digest(variables: list[Any]) -> str:
    """A short name of the variables' values."""
    total = hashlib.sha256()
    for variable in variables:
        total.update(np.ascontiguousarray(variable.numpy()).tobytes())
    return total.hexdigest()[:16]


def _with_first_axis(step: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`step`, whose results have an axis of size 1 in front."""

    @functools.wraps(step)
    def wrapper(data: Any) -> Any:
        return keras.tree.map_structure(
            lambda value: tf.expand_dims(value, 0), step(data)
        )

    return wrapper
