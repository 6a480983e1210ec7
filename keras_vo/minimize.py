"""Steps on an objective that is any function of the weights."""

from __future__ import annotations

import concurrent.futures as futures
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from keras_vo import checks
from keras_vo.ask_tell import AskTell
from keras_vo.autograph import converted_as_caller
from keras_vo.evaluation import executor as executor_lib
from keras_vo.population import Population
from keras_vo.replicas import strategies
from keras_vo.search_steps import Objective

__all__ = ["Minimize"]


class Minimize(AskTell):
    """`minimize`: in a graph, eagerly, or by an executor.

    Attributes:
        credit: the level that noise on activations has, at most.
    """

    credit: str

    def minimize(
        self,
        objective: Objective,
        variables: Sequence[Any],
        *,
        maximize: bool = False,
        executor: futures.Executor | None = None,
        timeout: float | None = None,
        retries: int = 0,
        progress: bool = False,
    ) -> tf.Tensor:
        """Takes one step on any objective; no Keras model is needed.

        Called eagerly, it calls `objective` once a (new) member with concrete
        values, so that it may be any Python code. Called in a `tf.function`,
        it is compiled and vectorized over the population, which is fast.
        AutoGraph converts an `objective` that is a function, as it converts
        what is around this call. In a function that XLA compiles
        (`jit_compile=True`), Python's control flow on tensors is an error.

        If the optimizer is made under `strategy.scope()`, each replica
        evaluates its shard of the population, whether this is called in or
        outside of the scope, or in each replica by `strategy.run` (after
        `build`). There each replica may have an objective of its own: it is
        evaluated once more, at the mean, to compare members by what they
        change.

        A search is saved with its variables, and goes on bit by bit where it
        was, by `tf.train.Checkpoint(w=w, optimizer=optimizer)`, restored
        before or after the first step; or, of a Keras model that is compiled
        with this optimizer, in the model's `.keras` file.

        **By an executor**, members are evaluated at the same time, as many as
        it has workers, each given as a list of NumPy arrays. Any executor of
        `concurrent.futures` will do (threads, processes, Dask's, Ray's,
        mpi4py's); for processes the objective must be picklable: see
        `keras_vo.RemoteObjective`. The step is the same, bit for bit. An
        evaluation that raises, takes longer than `timeout`, or is lost with
        its worker, is a missing result, as of `tell`; a warning says which.
        `report` has what the step has found. Workers of a
        MultiWorkerMirroredStrategy evaluate a part each.

        Args:
            objective: from a list of weight tensors, shaped like `variables`,
                to a scalar loss.
            variables: Keras or TensorFlow variables, the mean mu. The same
                list in every call.
            maximize: whether `objective` returns a score, of which higher
                ones are better. Losses are minus the scores then.
            executor: that evaluates members; `None`: no one.
            timeout: seconds that an evaluation may take. One that does is
                interrupted in a process; a thread can't be, and is given up.
            retries: further tries of an evaluation that has failed.
            progress: whether a progress bar shows the members that are done.

        Returns:
            The mean loss of the population, a scalar: see
            `Generation.mean_loss`.

        Raises:
            TypeError: `variables` is no list of variables, `objective` no
                function, or `executor` no executor.
            ValueError: no variables, others than before, one of them twice,
                credit by position, or an objective that is not a scalar.
            RuntimeError: all evaluations of an executor have failed (from the
                error of the first; not if one member alone is new, see
                `importance_mixing`); or it is used in a `tf.function`.
        """
        checks.checked_objective(objective, "minimize", self.credit)
        variables = checks.checked_variables(
            variables, "minimize(objective, {})"
        )
        terms = executor_lib.Terms.checked(timeout, retries, progress)
        if executor is None:
            if terms != executor_lib.Terms():
                raise ValueError(
                    "`timeout`, `retries` and `progress` are those of an "
                    "executor. Expected: `minimize(objective, variables, "
                    "executor=concurrent.futures.ThreadPoolExecutor())`, say. "
                    f"Received: {terms} without an executor"
                )
            converted = converted_as_caller(objective)
            if maximize:
                return self._minimize(_negated(converted), variables)
            return self._minimize(converted, variables)
        if not isinstance(executor, futures.Executor):
            raise TypeError(
                "Expected an executor of `concurrent.futures`. Received: "
                f"executor={executor!r} of type {type(executor)}"
            )
        return self._minimize_by(
            executor, objective, variables, terms, maximize
        )

    @tf.autograph.experimental.do_not_convert
    def _minimize(
        self, objective: Objective, variables: list[Any]
    ) -> tf.Tensor:
        with strategies.entered(self._strategy):
            self._build_outside_of_replicas(variables)
            # Called outside of replicas, the objective is one and the same for
            # all of them: no shard has a loss of its own.
            baseline = None
            if not strategies.in_replica():
                baseline = tf.zeros([], self._layout.dtype)
            return strategies.on_each_replica(
                lambda: (
                    self.step(objective, variables, baseline=baseline).mean_loss
                )
            )

    def _minimize_by(
        self,
        executor: futures.Executor,
        objective: Callable[[Any], Any],
        variables: list[Any],
        terms: executor_lib.Terms,
        maximize: bool,
    ) -> tf.Tensor:
        """A step whose members an executor evaluates."""
        self._check_outside("minimize(executor=...)")
        population = self.ask(variables)
        try:
            found = executor_lib.evaluate(
                objective,
                population,
                population.own,
                executor,
                terms,
                maximize,
            )
            self._check_not_assigned(executor, population)
        except BaseException:  # Ctrl-C, too
            self._set_back(population)
            raise
        others = strategies.worker_count(self._strategy) - 1
        none = not found.losses and population.needs_a_loss
        if found.failures and none and not others:
            self._set_back(population)
            raise RuntimeError(
                "All evaluations of the objective have failed (generation "
                f"{population.generation}): {found.summary()}"
            ) from next(iter(found.failures.values()))
        if found.failures:
            warnings.warn(
                f"{len(found.failures)} of {len(population.own)} members have "
                f"no result (generation {population.generation}): "
                f"{found.summary()}",
                stacklevel=3,
            )
        report = self.tell(population, found.losses)
        return tf.constant(report.mean_loss, report.losses.dtype)

    def _check_not_assigned(
        self, executor: futures.Executor, population: Population
    ) -> None:
        """Raises if threads have assigned the variables, which they share."""
        alone = getattr(executor, "_max_workers", None) == 1
        if not alone and self._is_assigned(population):
            raise RuntimeError(
                "Expected an objective that leaves the variables alone where "
                "members are evaluated at the same time in this process: each "
                "would see the weights of another. Received: one that assigns "
                "them. Let it have a model of its own in each thread: "
                "`keras_vo.RemoteObjective`"
            )


def _negated(objective: Objective) -> Objective:
    """Minus an objective, as a loss."""
    return tf.autograph.experimental.do_not_convert(
        lambda weights: -checks.checked_scalar(objective(weights))
    )
