"""One step of the search: from a table of members to the next distribution.

    seeds -> noise -> perturbed weights -> losses -> credit -> utilities
          -> direction -> proposal -> rules -> mu, sigma

`Search` holds no variables and knows no model: tensors go in and come out.
`ask` says which members to evaluate, `tell` takes what was found of them, and
`step` does both with an evaluator in between.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from keras_vo.search import credit, estimators
from keras_vo.search.chunks import ChunkPlan, Noise, NoiseSource
from keras_vo.search.communicator import Communicator
from keras_vo.search.credit import EXAMPLE, MEMBER, Outcomes, Rows
from keras_vo.search.estimators import Direction
from keras_vo.search.layout import WeightLayout
from keras_vo.search.members import Members, Shard
from keras_vo.search.rules import Proposal, State, Step
from keras_vo.search.signal_to_noise import Probe
from keras_vo.search.state import (
    Perturbations,
    Report,
    SearchState,
    Settings,
)

__all__ = ["Search", "mean_scale"]


# From the noise of this replica's members to their outcomes.
Evaluator = Callable[[NoiseSource], Outcomes]
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
    """

    settings: Settings
    state: SearchState
    perturbations: Perturbations
    communicator: Communicator
    probe: Probe | None = None

    def ask(self) -> Members:
        """The members to evaluate, those of all replicas."""
        return Members.of_generation(
            self.state.base_seed,
            self.state.generation,
            self.settings.population_size,
            self.settings.antithetic,
        )

    def step(self, evaluator: Evaluator, move_mean: MoveMean) -> Report:
        """`tell` of what `evaluator` finds of this replica's members."""
        members = self.ask()
        own = members.shard(self._shard(members))
        outcomes = evaluator(self._source(own, activations=True))
        return self.tell(members, outcomes, move_mean)

    def tell(
        self, members: Members, outcomes: Outcomes, move_mean: MoveMean
    ) -> Report:
        """What follows from the outcomes.

        Args:
            members: of all replicas.
            outcomes: of this replica's.
            move_mean: makes the step of the mean, that of the inner optimizer.
        """
        shard, settings = self._shard(members), self.settings
        pooled = credit.narrowed(
            credit.pool(outcomes, settings.shape, shard, self.communicator),
            self.state.gaussian.layout.dtype,
        )
        direction = self._preconditioned(
            self._direction(members, outcomes, pooled, shard)
        )
        # Where a batch can't be had (the end of the data), nothing is done.
        with tf.control_dependencies([pooled.losses]):
            proposal, rules = self._proposed(direction, move_mean)
        return Report(
            pooled.losses,
            pooled.utilities,
            direction,
            pooled.examples,
            tf.reduce_any(tf.math.is_finite(pooled.losses)),
            proposal,
            rules,
        )

    def _shard(self, members: Members) -> Shard:
        directions, replicas = members.directions, self.communicator.count
        signs = len(members.signs)
        if (
            EXAMPLE in self.perturbations.levels
            and directions // replicas * signs < 2
        ):
            raise ValueError(
                "LocalReparamDense compares the members that see the same "
                "examples. Expected: a population_size of "
                f"{2 * replicas} or more, two for each replica. "
                f"Received: population_size={len(members)} on "
                f"{replicas} replicas"
            )
        return Shard.make(directions, self.communicator.index, replicas)

    def _source(self, members: Members, activations: bool) -> NoiseSource:
        """The noise of some members: of weights, or of activations too."""
        kinds, dtype = self.perturbations, self.state.gaussian.layout.dtype
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
        )

    def _direction(
        self,
        members: Members,
        outcomes: Outcomes,
        pooled: credit.Pooled,
        shard: Shard,
    ) -> Direction:
        """The gradient of U, from the members of all replicas."""
        kinds, together = self.perturbations, self.communicator
        signs, own = len(members.signs), members.shard(shard)
        by_sign = tf.reshape(pooled.utilities, [signs, -1])
        everyones = tf.transpose(by_sign)
        weights = {MEMBER: shard.take(everyones)}
        counts, totals = {}, {}
        if EXAMPLE in kinds.levels:
            # Each example counts the same, by how many members it was seen.
            scale = shard.counts / len(own)
            examples = credit.example_utilities(
                outcomes, self.settings.shape, self.state.gaussian.layout.dtype
            )
            weights[EXAMPLE] = scale * tf.stack(
                tf.split(examples, signs), axis=1
            )
            seen = tf.cast(tf.shape(examples)[1], examples.dtype)
            counts[EXAMPLE] = shard.counts * seen
            totals = {
                kind: {k: shard.counts * v for k, v in values.items()}
                for kind, values in kinds.totals().items()
            }
        sums = {}
        if together.count > 1 and together.reconstructs(
            members.directions, kinds.noise_size, self._gradient_size
        ):
            sums = self._sums(members, {MEMBER: everyones}, None)
            del weights[MEMBER]
        if weights:
            summed = self._sums(own, weights, outcomes.evaluated)
            flat = together.sum(tf.nest.flatten([summed, totals, counts]))
            summed, totals, counts = tf.nest.pack_sequence_as(
                [summed, totals, counts], flat
            )
            sums |= summed
        merged = {
            kind: {**v, **totals.get(kind, {})} for kind, v in sums.items()
        }
        return kinds.direction(merged, {MEMBER: pooled.known, **counts})

    def _sums(
        self,
        members: Members,
        utilities: Mapping[str, tf.Tensor],
        evaluated: credit.Evaluated | None,
    ) -> dict[str, dict[str, tf.Tensor]]:
        """Sums over these members of their noise times their utilities.

        Without an evaluation, the noise of weights is drawn again.
        """
        share = tf.constant(1 / len(members), self.state.gaussian.layout.dtype)
        weights = [*utilities.values(), tf.fill([members.directions], share)]
        if self.probe is not None:
            population = self.settings.population_size // len(members.signs)
            weights.append(self.probe.ids(members, population))

        def chunk(noise: Noise, records: Any, cut: list[tf.Tensor]) -> Any:
            rest = cut[len(utilities) :]
            rows = {
                level: Rows(values, *rest)
                for level, values in zip(utilities, cut, strict=False)
            }
            return self.perturbations.sums(noise, records, rows)

        if evaluated is None:
            source = self._source(members, activations=False)
            return credit.reduce_noise(source, chunk, weights)
        return evaluated.reduce(chunk, weights)

    @property
    def _gradient_size(self) -> int:
        """Numbers that replicas add up if each sums over its own noise."""
        layout = self.state.gaussian.layout
        return layout.size + layout.num_groups

    def _preconditioned(self, direction: Direction) -> Direction:
        """The gradients that steps go down, natural if they are to be."""
        if not self.settings.natural_gradient:
            return direction
        layout: WeightLayout = self.state.gaussian.layout
        scale = mean_scale(self.settings, self.state)
        return direction._replace(
            mean=layout.expand(scale) * direction.mean,
            log_variance=estimators.natural_log_variance_gradient(
                direction.log_variance, direction.fisher
            ),
        )

    def _proposed(
        self, direction: Direction, move_mean: MoveMean
    ) -> tuple[Proposal, State]:
        """The next distribution, and the next state of the rules."""
        state, rules = self.state, self.settings.rules
        layout = state.gaussian.layout
        step = Step(state.gaussian, direction, state.updates)
        mean = layout.flatten(move_mean(layout.unflatten(direction.mean)))
        proposal = Proposal(mean, state.gaussian.log_variance)
        for rule in rules:
            proposal = rule.propose(step, proposal, state.rules)
        settled: dict[str, tf.Tensor] = {}
        for rule in rules:
            settled |= rule.settle(step, proposal, state.rules)
        return proposal, settled


def mean_scale(settings: Settings, state: SearchState) -> tf.Tensor:
    """What dU/dmu is multiplied with for the inner optimizer, [groups]."""
    stddev = state.gaussian.stddev
    if not settings.natural_gradient:
        return tf.ones_like(stddev)
    for rule in settings.rules:
        base = rule.base_stddev(state.rules)
        if base is not None:
            return estimators.based_mean_scale(
                stddev, base, settings.loss_scaled
            )
    return estimators.natural_mean_scale(stddev)
