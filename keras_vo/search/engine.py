"""One step of the search: from tables of members to the next distribution.

    seeds -> noise -> perturbed weights -> losses -> credit -> utilities
          -> direction -> proposal -> rules -> mu, sigma

`Search` holds no variables and knows no model: tensors go in and come out.
`ask` says which members to evaluate, `tell` takes what was found of them, and
`step` does both with an evaluator in between.

Each level of credit has a population of its own. The members of one are
perturbed by the kinds of noise of that level only, so that no noise blurs the
credit of another level.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from keras_vo.search import (
    activation_scale,
    adaptation_sampling,
    asked,
    credit,
    estimators,
    example_credit,
    importance_mixing,
    of_examples,
)
from keras_vo.search.chunks import ChunkPlan, Noise, NoiseSource
from keras_vo.search.communicator import Communicator
from keras_vo.search.credit import EXAMPLE, MEMBER, Outcomes, Rows
from keras_vo.search.estimators import Direction
from keras_vo.search.members import Members, Shard
from keras_vo.search.rules import Proposal, State, Step
from keras_vo.search.signal_to_noise import Probe
from keras_vo.search.state import (
    Judged,
    OfReplica,
    Perturbations,
    Report,
    SearchState,
    Settings,
    preconditioned,
)

__all__ = ["Search"]

# From a level of credit and the noise of this replica's members to their
# outcomes.
Evaluator = Callable[[str, NoiseSource], Outcomes]
# From dU/dmu, a tensor for each variable, to mu' alike.
MoveMean = Callable[[list[tf.Tensor]], Sequence[tf.Tensor]]


@dataclasses.dataclass(frozen=True, eq=False)
class Search:
    """A search in one state.

    Attributes:
        settings: what does not change.
        state: what does.
        perturbations: of all variables.
        communicator: to the other replicas.
        probe: what of the gradient is measured; `None`: nothing.
        activations: the scale of noise on activations; `None`: there is none.
    """

    settings: Settings
    state: SearchState
    perturbations: Perturbations
    communicator: Communicator
    probe: Probe | None = None
    activations: activation_scale.ActivationScale | None = None

    def ask(self, level: str = MEMBER) -> Members:
        """The members of a level to evaluate, those of all replicas.

        Replicas share a population whose members are judged as a whole. Each
        has a full one for the credit of its own examples.
        """
        size, replicas = self.settings.population_size, 1
        if self.mixed is not None and level == MEMBER:
            return self.mixed.members
        if level != MEMBER:
            size = self.settings.examples_population_size
            replicas = self.communicator.count
        return Members.of_generation(
            self.state.base_seed,
            self.state.generation,
            size * replicas,
            self.settings.antithetic,
            self.settings.noise_generator,
        )

    @functools.cached_property
    def mixed(self) -> importance_mixing.Mixed | None:
        """The population, of which a part is a former one; `None`: no part."""
        alpha = self.settings.importance_mixing
        if alpha is None:
            return None
        state = self.state
        return importance_mixing.mix(
            state.gaussian,
            (state.base_seed, state.generation),
            state.rules,
            alpha,
            self.settings.memory_budget,
            self.settings.noise_generator,
        )

    def step(self, evaluator: Evaluator, move_mean: MoveMean) -> Report:
        """`tell` of what `evaluator` finds of this replica's members."""
        return self.tell(self.judged(evaluator), move_mean)

    def judged(self, evaluator: Evaluator) -> dict[str, Judged]:
        """What `evaluator` finds of this replica's members, by level."""
        populations = {}
        for level in self.perturbations.levels:
            members = self.ask(level)
            shard = self.shard(members)
            own = members.shard(shard)
            source = self.source(level, own, activations=True)
            if self.mixed is not None:
                wanted = shard.take(self.mixed.new)
                source = dataclasses.replace(source, wanted=wanted)
            populations[level] = Judged(members, evaluator(level, source))
        return populations

    def tell(
        self, populations: Mapping[str, Judged], move_mean: MoveMean
    ) -> Report:
        """What follows from the outcomes.

        Args:
            populations: by level.
            move_mean: makes the step of the mean, that of the inner optimizer.
        """
        pooled = {
            level: self._pooled(level, population)
            for level, population in populations.items()
        }
        direction, ties = self._direction(populations, pooled)
        direction = self._preconditioned(direction)
        # Where a batch can't be had (the end of the data), nothing is done.
        with tf.control_dependencies([p.losses for p in pooled.values()]):
            proposal, rules = self._proposed(
                direction,
                ties,
                move_mean,
                asked.about(self, populations, pooled),
            )
        # Not a constant: that would be folded, wrongly (see test_precision).
        usable = tf.concat([p.usable for p in pooled.values()], 0)
        return Report(pooled, direction, tf.reduce_any(usable), proposal, rules)

    def _pooled(self, level: str, population: Judged) -> credit.Pooled:
        shape = self.settings.shape
        if level != MEMBER:  # what is stepped down is judged by `of_examples`
            shape = functools.partial(
                example_credit.on_one_scale,
                signs=len(population.members.signs),
                loss_scaled=self.settings.loss_scaled,
            )
        shard = self.shard(population.members)
        return credit.narrowed(
            credit.pool(
                population.outcomes,
                shape,
                shard,
                self.communicator,
                self.mixed.losses if self.mixed and level == MEMBER else None,
            ),
            self.state.gaussian.layout.dtype,
        )

    def shard(self, members: Members) -> Shard:
        """Those of all replicas' members that this one evaluates."""
        together = self.communicator
        return Shard.make(members.directions, together.index, together.count)

    def source(
        self, level: str, members: Members, activations: bool
    ) -> NoiseSource:
        """The noise of some members: of weights, or of activations too."""
        kinds = self.perturbations.at(level)
        dtype = self.state.gaussian.layout.dtype
        signs = len(members.signs)
        plan = ChunkPlan.make(
            members.directions,
            signs,
            kinds.noise_size * dtype.size,
            self.settings.memory_budget,
            self.settings.chunk_size,
            kinds.activation_bytes(signs) if activations else 0,
        )
        return NoiseSource(
            plan,
            members,
            kinds.noise_size,
            dtype,
            kinds.activations if activations else (),
            express=self.mixed.express if self.mixed else None,
        )

    def _direction(
        self,
        populations: Mapping[str, Judged],
        pooled: Mapping[str, credit.Pooled],
    ) -> tuple[Direction, tf.Tensor | None]:
        """The gradient of U, from the members of all replicas, and how many
        losses of examples are ties.
        """
        together = self.communicator
        sums: dict[str, dict[str, tf.Tensor]] = {}
        counts, own, ties = {}, OfReplica({}, {}, {}, {}), None
        for level, population in populations.items():
            kinds, members = self.perturbations.at(level), population.members
            if level == MEMBER:
                counts[level] = pooled[level].known
                by_sign = tf.reshape(
                    pooled[level].utilities, [len(members.signs), -1]
                )
                utilities = {"utilities": tf.transpose(by_sign)}
                if together.count > 1 and together.reconstructs(
                    members.directions, kinds.noise_size, self._gradient_size
                ):
                    sums |= self._sums(level, members, utilities, None)
                    continue
                utilities = {
                    name: self.shard(members).take(values)
                    for name, values in utilities.items()
                }
            else:
                utilities = of_examples.utilities_of(
                    self, level, population, own
                )
            shard = members.shard(self.shard(members))
            evaluated = population.outcomes.evaluated
            own.sums.update(self._sums(level, shard, utilities, evaluated))
        if own.sums:
            flat = together.sum(tf.nest.flatten(tuple(own)))
            summed, totals, seen, equal = tf.nest.pack_sequence_as(
                tuple(own), flat
            )
            sums |= summed
            counts |= seen
            for kind, values in totals.items():
                sums[kind] = {**sums[kind], **values}
            ties = equal.get(EXAMPLE)
        return self.perturbations.direction(sums, counts), ties

    def _sums(
        self,
        level: str,
        members: Members,
        utilities: Mapping[str, tf.Tensor],
        evaluated: credit.Evaluated | None,
    ) -> dict[str, dict[str, tf.Tensor]]:
        """Sums over these members of their noise times their utilities.

        Without an evaluation, the noise of weights is drawn again.
        """
        kinds = self.perturbations.at(level)
        share = tf.constant(1 / len(members), self.state.gaussian.layout.dtype)
        weights = {**utilities, "shares": tf.fill([members.directions], share)}
        if self.probe is not None:
            directions = self.ask(level).directions
            weights["ids"] = self.probe.ids(members, directions)

        def chunk(noise: Noise, records: Any, cut: list[tf.Tensor]) -> Any:
            rows = Rows(**dict(zip(weights, cut, strict=True)))
            return kinds.sums(noise, records, rows)

        values = list(weights.values())
        if evaluated is None:
            source = self.source(level, members, activations=False)
            return credit.reduce_noise(source, chunk, values)
        return evaluated.reduce(chunk, values)

    @property
    def _gradient_size(self) -> int:
        """Numbers that replicas add up if each sums over its own noise."""
        layout = self.state.gaussian.layout
        return layout.size + layout.num_groups

    def _preconditioned(self, direction: Direction) -> Direction:
        """The gradients that steps go down, natural if they are to be."""
        if not self.settings.natural_gradient:
            return direction
        return direction._replace(
            mean=preconditioned(self.settings, self.state, direction.mean),
            log_variance=estimators.natural_log_variance_gradient(
                direction.log_variance, direction.fisher
            ),
        )

    def _proposed(
        self,
        direction: Direction,
        ties: tf.Tensor | None,
        move_mean: MoveMean,
        about_members: Mapping[str, Any],
    ) -> tuple[Proposal, State]:
        """The next distribution, and the next state of the rules."""
        state, rules = self.state, self.settings.rules
        layout = state.gaussian.layout
        step = Step(
            state.gaussian,
            direction,
            state.updates,
            self.activations,
            ties,
            learning_rate=state.learning_rate,
            **about_members,
        )
        step = activation_scale.steadied(step, state.rules)
        step = adaptation_sampling.with_rate(step, state.rules)
        mean = layout.flatten(move_mean(layout.unflatten(direction.mean)))
        proposal = Proposal(mean, state.gaussian.log_variance)
        for rule in rules:
            proposal = rule.propose(step, proposal, state.rules)
        settled: dict[str, tf.Tensor] = {}
        for rule in rules:
            settled |= rule.settle(step, proposal, state.rules)
        return proposal, settled
