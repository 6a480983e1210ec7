"""The steps of a search over variables.

`SearchSteps` hands the variables' values to `keras_vo.search` as tensors, and
assigns what comes back.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from keras_vo import checks, interrupts
from keras_vo import inner_optimizer as inner_lib
from keras_vo import technique_checks as techniques
from keras_vo.autograph import converted_as_caller
from keras_vo.evaluation import graph
from keras_vo.evaluation.isolation import Isolation
from keras_vo.monitor.observer import observed
from keras_vo.outputs_of_batch import OutputsOfBatch
from keras_vo.perturbations import registry, together
from keras_vo.perturbations.base import Space
from keras_vo.perturbations.choice import Choice
from keras_vo.perturbations.scope import Recording
from keras_vo.perturbations.together import Perturbations
from keras_vo.replicas import strategies
from keras_vo.replicas.communicator import current_replicas
from keras_vo.search.activation_scale import ActivationScale, Site
from keras_vo.search.adaptation_sampling import MEAN_RATE
from keras_vo.search.chunks import NoiseSource
from keras_vo.search.credit import EXAMPLE, MEMBER, Generation, Outcomes
from keras_vo.search.engine import Search
from keras_vo.search.signal_to_noise import Probe
from keras_vo.search.state import Judged, Report, SearchState, mean_scales
from keras_vo.search_files import SearchFiles
from keras_vo.sensitivity import Measurement

__all__ = ["SearchSteps"]

Objective = Callable[[list[tf.Tensor]], Any]


class SearchSteps(SearchFiles):
    """Variables of a search, with the steps that change them.

    Attributes:
        exchange: how gradients of replicas come together.
        perturbation: the kind of noise of what does not say so itself.
        convolutions: that of convolutions.
        credit: the level that noise on activations has, at most.
        position_discount: of the credit of later positions.
        sensitivity: how those of weights are measured; `None`: they are 1.
        sensitivity_period: in how many generations once.
    """

    exchange: str
    perturbation: str
    convolutions: str
    credit: str
    position_discount: float
    memory_budget: int
    sensitivity: Any
    sensitivity_period: int

    @property
    def choice(self) -> Choice:
        """How what does not say so itself is perturbed."""
        return registry.chosen(self.perturbation, self.convolutions)

    def step(
        self, objective: Objective, variables: Sequence[Any], **kwargs: Any
    ) -> Generation:
        """`take_step`, and what it evaluated."""
        checks.checked_objective(objective, "step")
        variables = checks.checked_variables(variables, "step(objective, {})")
        report = self.take_step(
            converted_as_caller(objective), variables, **kwargs
        )
        return Generation.of(report.losses)

    @tf.autograph.experimental.do_not_convert
    def take_step(
        self,
        objective: Objective,
        variables: list[Any],
        *,
        by_example: Objective | None = None,
        means: Sequence[tf.Tensor] | None = None,
        recording: Recording | None = None,
        baseline: tf.Tensor | None = None,
        credit_weights: Mapping[str, tf.Tensor] | None = None,
        examples: tf.Tensor | None = None,
        isolation: Isolation | None = None,
        outputs: OutputsOfBatch | None = None,
        jit_compile: bool = False,
    ) -> Report:
        """Evaluates one generation and updates mu and sigma.

        If no member's loss is finite, weights, sigma (and sensitivities) and
        the inner optimizer are left as they are; only the next generation's
        noise is another.

        Args:
            objective: from a list of weight tensors to a scalar loss.
            variables: those that the search was built with.
            by_example: from the same to a dict of losses by level of credit
                (see `keras_vo.search.credit`), for members that are judged
                example by example; `None`: there are none.
            means: mu, if it is not what the variables are now.
            recording: what the layers of `keras_vo.layers` have recorded;
                `None`: nothing.
            baseline: the objective's value at mu, for several replicas;
                `None`: it is evaluated there.
            credit_weights: see `Outcomes.weights`; `None`: all are 1.
            examples: see `Outcomes`.
            isolation: of the members; `None`: that of an objective which is
                given the weights.
            outputs: of the network on this batch; `None`: there is none.
            jit_compile: whether XLA compiles the evaluation of the members.
        """
        self._build_outside_of_replicas(variables)
        self._check_same(variables)
        recording = recording or Recording(variables, self.choice)
        search, perturbations = self.search(
            variables,
            means or variables,
            self.measured_sensitivity(outputs),
            recording,
        )
        dtype = self._layout.dtype

        isolation = isolation or Isolation(variables)
        isolation.after = [] if baseline is None else [baseline]
        isolation.replicas = search.communicator.count
        of_level = {MEMBER: objective, EXAMPLE: by_example or objective}

        def losses(
            level: str, weights: list[tf.Tensor]
        ) -> dict[str, tf.Tensor]:
            with isolation.objective(weights):
                return checks.checked_losses(of_level[level](weights), dtype)

        if baseline is None and search.communicator.count > 1:
            now = [tf.convert_to_tensor(v) for v in means or variables]
            baseline = losses(MEMBER, now)[MEMBER]

        def evaluator(level: str, source: NoiseSource) -> Outcomes:
            kinds = perturbations.at(level)
            isolation.full = kinds.full
            member = kinds.member(functools.partial(losses, level))
            found = graph.evaluate(member, source, isolation, jit_compile)
            isolation.after = [*isolation.after, found.losses[MEMBER]]
            isolation.check_eagerly(found.losses[MEMBER])
            return Outcomes(
                found.losses, credit_weights or {}, examples, baseline, found
            )

        return self.take(search, search.judged(evaluator), outputs)

    def measured_sensitivity(
        self, outputs: OutputsOfBatch | None
    ) -> tf.Tensor | None:
        """s [d] of this generation, measured where it is due; `None`: 1.

        Args:
            outputs: see `take_step`.
        """
        former = self._sensitivity_now()
        if former is None:
            return None
        measurement = Measurement(
            self.sensitivity,
            self._trained(),
            outputs,
            current_replicas(),
            self._layout.dtype,
            self.memory_budget,
        )
        due = tf.equal(self.generations % self.sensitivity_period, 0)
        return measurement.refreshed(due, former)

    def take(
        self,
        search: Search,
        populations: Mapping[str, Judged],
        outputs: OutputsOfBatch | None = None,
    ) -> Report:
        """Updates mu and sigma by what was found of a generation.

        Args:
            search: as it is now.
            populations: by level.
            outputs: see `take_step`.
        """
        variables = self._trained()
        moved = self._moved(variables)

        def move_mean(gradient: list[tf.Tensor]) -> list[Any]:
            self._start_from(search.state.gaussian.means)
            self.inner_optimizer.apply(gradient, moved)
            return moved

        with interrupts.deferred():
            before = [tf.identity(v) for v in self.inner_optimizer.variables]
            report = search.tell(populations, move_mean)
            self._take(search, report, variables, before)
            if self.observer is not None:
                self.observer.observe(observed(search, report, moved, outputs))
            with tf.control_dependencies([report.losses]):
                self.assign_add(self.generations, 1)
        return report

    def search(
        self,
        variables: Sequence[Any],
        means: Sequence[Any],
        sensitivity: tf.Tensor | None,
        recording: Recording,
        probed: bool = False,
    ) -> tuple[Search, Perturbations]:
        """The search as it is now, and how it perturbs the variables.

        Args:
            variables: those, or what stands for them.
            means: mu, their values.
            sensitivity: s [d] of this generation; `None`: 1.
            recording: of the mean network's pass.
            probed: whether its gradient is measured, even if no one observes.
        """
        if MEAN_RATE in self._rule_state:
            inner_lib.check_settable(self.inner_optimizer)
        positions = {id(v): i for i, v in enumerate(variables)}
        sites = together.sites(recording, positions)
        scale = self._scale_of(sites) if sites else None
        state = SearchState(
            self._gaussian(means, sensitivity),
            tf.convert_to_tensor(self._seed),
            tf.convert_to_tensor(self.generations),
            tf.convert_to_tensor(self.iterations),
            {k: tf.convert_to_tensor(v) for k, v in self._rule_state.items()},
            tf.convert_to_tensor(self.inner_optimizer.learning_rate),
        )
        if scale is not None:
            state = scale.started(state, self._settings.rules)
        probe = None
        if probed or self.observer is not None:
            every = 1 if self.observer is None else self.observer.every
            scales = mean_scales(self._settings, state)
            probe = Probe(scales, state.generation, every)
        space = Space(
            state.gaussian,
            positions,
            self.search_distribution.adapts,
            probe,
        )
        perturbations = Perturbations(recording, space)
        full = perturbations.at(perturbations.levels[0]).full
        techniques.check_densities(self, full, variables)
        replicas = current_replicas(self.exchange)
        parts = (self._settings, state, perturbations, replicas, probe, scale)
        return Search(*parts), perturbations

    def _scale_of(self, sites: Sequence[Site]) -> ActivationScale:
        """Of the noise on the outputs of these calls."""
        return ActivationScale.of(
            sites,
            chosen=self.search_distribution.chooses_stddev,
            first=math.exp(self._first_log_variance / 2),
            bounds=self.search_distribution.bounds,
            rate=self._rate_by_name,
            scheduled=self.search_distribution.is_scheduled,
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
            *zip(
                self._moved(variables), means, old.gaussian.means, strict=True
            ),
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
        if MEAN_RATE in report.rules:
            variable: Any = self.inner_optimizer.learning_rate
            new = tf.cast(report.rules[MEAN_RATE], variable.dtype)
            changes.append((variable, new, old.learning_rate))
        if self._sensitivity is not None:
            new, former = old.gaussian.sensitivity, self._sensitivity_now()
            changes.append((self._sensitivity, new, former))
        for variable, new, value in changes:
            self.assign(variable, tf.where(report.any_finite, new, value))
        self._round(variables)

    def _build_outside_of_replicas(self, variables: list[Any]) -> None:
        if self.built:
            return
        checks.check_variables(variables)
        if strategies.in_replica():
            raise ValueError(
                "Expected a VOOptimizer that is built before a strategy runs "
                "it: call `build(variables)` first. Received: an optimizer "
                "that is not built, in a replica"
            )
        with tf.init_scope():
            self.build(variables)

    def _check_same(self, variables: list[Any]) -> None:
        if list(map(id, variables)) != list(map(id, self._trained())):
            raise ValueError(
                "Expected the variables this optimizer was built with, "
                f"{[checks.variable_name(v) for v in self._trained()]}. "
                f"Received: {[checks.variable_name(v) for v in variables]}. "
                "For another model, or after a change of what is trainable, "
                "compile the model with a new VOOptimizer."
            )
