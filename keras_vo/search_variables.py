"""The variables of a search, and the steps that change them.

`SearchVariables` is what `VOOptimizer` is made of, besides its arguments: it
hands the variables' values to `keras_vo.search` as tensors, and assigns what
comes back.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_vo import checks
from keras_vo import inner_optimizer as inner_lib
from keras_vo.evaluation import graph
from keras_vo.monitor.observer import StepObserver, observed
from keras_vo.perturbations.base import Space
from keras_vo.perturbations.scope import Recording
from keras_vo.perturbations.together import Perturbations
from keras_vo.replicas import strategies
from keras_vo.replicas.communicator import current_replicas
from keras_vo.search.chunks import NoiseSource
from keras_vo.search.credit import Generation, Outcomes
from keras_vo.search.engine import (
    Report,
    Search,
    SearchState,
    Settings,
    mean_scale,
)
from keras_vo.search.gaussian import Gaussian
from keras_vo.search.layout import layer_groups, layer_names
from keras_vo.search.signal_to_noise import Probe
from keras_vo.search_distribution import GaussianSearchDistribution

__all__ = ["SearchVariables"]


class SearchVariables(keras.optimizers.Optimizer):
    """A Keras optimizer whose variables are those of a search.

    Attributes:
        inner_optimizer: moves the mean.
        search_distribution: says how sigma is shaped.
        observer: sees the steps; `None`: no one does.
    """

    inner_optimizer: Any
    search_distribution: GaussianSearchDistribution
    seed: int | None
    population_size: int
    exchange: str

    def __init__(self, name: str | None) -> None:
        super().__init__(learning_rate=0.0, name=name)
        self._strategy = strategies.current_strategy()
        self.observer: StepObserver | None = None

    def settings_for(self, variables: Sequence[Any]) -> Settings:
        """What does not change from step to step, for these weights."""
        raise NotImplementedError

    def build(self, variables: Sequence[Any]) -> None:
        """Creates sigma, the seed, and the inner optimizer's variables.

        Args:
            variables: the trainable variables, mu.

        Raises:
            ValueError: there are none, one of them is not floating, or they
                and the optimizer are made under different strategies.
        """
        if self.built:
            return
        with strategies.entered(self._strategy):
            self._build(list(variables))

    def _build(self, variables: list[Any]) -> None:
        checks.check_variables(variables)
        if self._strategy is not None:
            inner_lib.check_no_overwriting(self.inner_optimizer)
        distribution = self.search_distribution
        self._layout = distribution.layout(variables)
        self._layers = layer_groups(variables), layer_names(variables)
        self._variable_ids = tuple(id(v) for v in variables)
        self._variable_names = tuple(checks.variable_name(v) for v in variables)
        strategies.check_created_in_scope(
            [self.generations, self.iterations, *variables]
        )
        self.inner_optimizer.build(variables)
        self._settings = self.settings_for(variables)
        seed = random.randint(0, 2**31 - 1) if self.seed is None else self.seed
        self._seed = self._add_state("seed", tf.constant(seed, tf.int64))
        beta = distribution.initial_log_variance(
            variables, self.population_size
        )
        beta = tf.constant(beta, self._layout.dtype)
        self._log_variance = self._add_state(
            "log_variance", tf.fill([self._layout.num_groups], beta)
        )
        start = self._gaussian(variables)
        self._rule_state = {
            name: self._add_state(name, value)
            for rule in self._settings.rules
            for name, value in rule.init(start).items()
        }
        super().build(variables)
        if self.observer is not None:
            self.observer.build(self._layout, *self._layers)

    def _add_state(self, name: str, value: tf.Tensor) -> Any:
        variable = self.add_variable(
            tuple(value.shape),
            # By an initializer: several machines then all have that of the
            # first.
            initializer=lambda shape, dtype: tf.cast(value, dtype),
            dtype=value.dtype.name,
            name=name,
        )
        return variable

    def observe(self, observer: StepObserver | None) -> None:
        """Lets `observer` see each step whose graph is made from now on.

        Args:
            observer: it; `None`: no one.
        """
        self.observer = observer
        if self.built and observer is not None:
            with strategies.entered(self._strategy):
                observer.build(self._layout, *self._layers)

    @property
    def strategy(self) -> Any:
        """The tf.distribute strategy it is made under; `None`: no one."""
        return self._strategy

    @property
    def variables(self) -> list[Any]:
        """The search's own variables, then the inner optimizer's."""
        return super().variables + self.inner_optimizer.variables

    @property
    def iterations(self) -> Any:
        """Number of updates of the mean (and what its schedule counts)."""
        return self.inner_optimizer.iterations

    @property
    def generations(self) -> Any:
        """Number of populations drawn: updates, and steps without one."""
        return super().iterations

    @property
    def base_seed(self) -> Any:
        """The variable that seeds all noise, a scalar int64."""
        self._check_built("base_seed")
        return self._seed

    @property
    def learning_rate(self) -> Any:
        """The learning rate of the mean: the inner optimizer's."""
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        self.inner_optimizer.learning_rate = learning_rate

    @property
    def stddevs(self) -> list[tf.Tensor]:
        """Current sigma, a tensor of each trainable variable's shape.

        Raises:
            ValueError: the optimizer is not built yet.
        """
        self._check_built("stddevs")
        beta = tf.convert_to_tensor(self._log_variance)
        return Gaussian(self._layout, [], beta).stddevs

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        self.inner_optimizer.finalize_variable_values(var_list)

    def step(
        self,
        objective: Callable[[list[tf.Tensor]], Any],
        variables: Sequence[Any],
        jit_compile: bool = False,
        recording: Recording | None = None,
        example_weights: Any = 1.0,
        examples: tf.Tensor | None = None,
    ) -> Generation:
        """Evaluates one generation and updates mu and sigma.

        If no member's loss is finite, weights, sigma and the inner optimizer
        are left as they are; only the next generation's noise is another.

        Args:
            objective: see `minimize`. Its value may also be a dict of losses
                by level of credit: `keras_vo.search.credit`.
            variables: see `minimize`.
            jit_compile: whether XLA compiles the evaluation of the members.
            recording: what the layers of `keras_vo.layers` have recorded;
                `None`: nothing.
            example_weights: see `Outcomes`.
            examples: see `Outcomes`.

        Returns:
            The evaluated generation.
        """
        variables = list(variables)
        self._build_outside_of_replicas(variables)
        self._check_same(variables)
        search, perturbations = self._search(
            variables, recording or Recording(variables)
        )
        member = perturbations.member(
            lambda weights: checks.checked_losses(
                objective(weights), self._layout.dtype
            )
        )

        def evaluator(source: NoiseSource) -> Outcomes:
            found = graph.evaluate(member, source, jit_compile)
            return Outcomes(found.losses, example_weights, examples, found)

        def move_mean(gradient: list[tf.Tensor]) -> list[Any]:
            self.inner_optimizer.apply(gradient, variables)
            return variables

        before = [tf.identity(v) for v in self.inner_optimizer.variables]
        report = search.step(evaluator, move_mean)
        self._take(search, report, variables, before)
        if self.observer is not None:
            self.observer.observe(observed(search, report, variables))
        with tf.control_dependencies([report.losses]):
            self.assign_add(self.generations, 1)
        return Generation.of(report.losses)

    def _search(
        self, variables: list[Any], recording: Recording
    ) -> tuple[Search, Perturbations]:
        """The search as it is now, and how it perturbs the variables."""
        state = SearchState(
            self._gaussian(variables),
            tf.convert_to_tensor(self._seed),
            tf.convert_to_tensor(self.generations),
            tf.convert_to_tensor(self.iterations),
            {k: tf.convert_to_tensor(v) for k, v in self._rule_state.items()},
        )
        probe = None
        if self.observer is not None:
            scales = self._layout.per_tensor(mean_scale(self._settings, state))
            probe = Probe(scales, state.generation, self.observer.every)
        space = Space(
            state.gaussian,
            {id(v): i for i, v in enumerate(variables)},
            self.search_distribution.adapts,
            probe,
        )
        perturbations = Perturbations(recording, space)
        replicas = current_replicas(self.exchange)
        return (
            Search(self._settings, state, perturbations, replicas, probe),
            perturbations,
        )

    def _gaussian(self, variables: Sequence[Any]) -> Gaussian:
        return Gaussian(
            self._layout,
            [tf.convert_to_tensor(v) for v in variables],
            tf.convert_to_tensor(self._log_variance),
        )

    def _take(
        self,
        search: Search,
        report: Report,
        variables: list[Any],
        before: list[tf.Tensor],
    ) -> None:
        """Assigns what a step proposes, where any loss was finite.

        Args:
            search: before the step.
            report: of the step.
            variables: mu; the inner optimizer has moved it.
            before: what the inner optimizer's variables were.
        """
        old, proposal = search.state, report.proposal
        means = self._layout.unflatten(proposal.mean)
        changes = [
            *zip(variables, means, old.gaussian.means, strict=True),
            *(
                (variable, tf.convert_to_tensor(variable), value)
                for variable, value in zip(
                    self.inner_optimizer.variables, before, strict=True
                )
            ),
            (
                self._log_variance,
                proposal.log_variance,
                old.gaussian.log_variance,
            ),
            *(
                (variable, report.rules[name], old.rules[name])
                for name, variable in self._rule_state.items()
            ),
        ]
        for variable, new, value in changes:
            self.assign(variable, tf.where(report.any_finite, new, value))

    def _check_built(self, what: str) -> None:
        if not self.built:
            raise ValueError(
                f"`{what}` exists once the optimizer is built: call "
                "`build(variables)`, `minimize` or a model's `fit` first. "
                "Received: an optimizer that is not built"
            )

    def _build_outside_of_replicas(self, variables: list[Any]) -> None:
        if self.built:
            return
        if strategies.in_replica():
            raise ValueError(
                "Expected a VOOptimizer that is built before a strategy runs "
                "it: call `build(variables)` first. Received: an optimizer "
                "that is not built, in a replica"
            )
        with tf.init_scope():
            self.build(variables)

    def _check_same(self, variables: list[Any]) -> None:
        if tuple(id(v) for v in variables) != self._variable_ids:
            raise ValueError(
                "Expected the variables this optimizer was built with, "
                f"{list(self._variable_names)}. Received: "
                f"{[checks.variable_name(v) for v in variables]}. After a "
                "change of what is trainable, compile the model with a new "
                "VOOptimizer."
            )

    def load_own_variables(self, store: Any) -> None:
        """Restores the search.

        Raises:
            ValueError: `store` was saved by an optimizer of other structure.
        """
        if self.built and len(store.keys()):
            expected = [tuple(v.shape) for v in self.variables]
            keys = sorted(store.keys(), key=int)
            received = [tuple(store[key].shape) for key in keys]
            if expected != received:
                raise ValueError(
                    "The checkpoint holds a search of another structure. "
                    "Expected, for a "
                    f"{self.search_distribution.variance!r} search "
                    "distribution with follow_mean="
                    f"{self.search_distribution.follow_mean}, "
                    f"population_size={self.population_size} and inner "
                    f"optimizer {self.inner_optimizer.name!r}, variables of "
                    f"shapes {expected}. Received: {received}. "
                    "(`model.load_weights(path, skip_mismatch=True)` loads "
                    "the model's weights and starts a new search.)"
                )
        super().load_own_variables(store)
