"""What goes into a step of the search, and what comes out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import tensorflow as tf

from keras_vo.search import estimators
from keras_vo.search.chunks import Noise
from keras_vo.search.credit import Outcomes, Pooled, Rows, Shaping, all_losses
from keras_vo.search.estimators import Direction
from keras_vo.search.gaussian import Gaussian
from keras_vo.search.generators import NEWEST
from keras_vo.search.members import Members
from keras_vo.search.rules import Proposal, Rule, State

__all__ = [
    "Judged",
    "OfReplica",
    "Perturbations",
    "PerturbationsOfLevel",
    "Report",
    "SearchState",
    "Settings",
    "mean_scale",
    "mean_scales",
    "preconditioned",
]


class PerturbationsOfLevel(Protocol):
    """How the members of one level are perturbed.

    Attributes:
        noise_size: normals of a direction that perturb weights.
        activations: tensors of the shapes of a direction's further noise.
        variables: indices of those that are perturbed.
        full: of those with noise of full rank.
    """

    noise_size: int
    activations: tuple[tf.Tensor, ...]
    variables: Sequence[int]

    @property
    def full(self) -> Sequence[int]: ...

    def activation_bytes(self, signs: int) -> Any: ...

    def sums(
        self, noise: Noise, records: Any, rows: Rows
    ) -> dict[str, dict[str, tf.Tensor]]:
        """By kind."""

    def totals(self) -> dict[str, dict[str, tf.Tensor]]: ...

    def log_ratios(
        self, noise: Noise, signs: Sequence[float], other: Gaussian
    ) -> tf.Tensor: ...

    def weights(self, noise: Noise, sign: Any) -> list[tf.Tensor]: ...


class Perturbations(Protocol):
    """How all variables are perturbed: `keras_vo.perturbations.Perturbations`.

    Attributes:
        levels: of the credit that is needed, in the order of evaluation.
    """

    levels: tuple[str, ...]

    def at(self, level: str) -> PerturbationsOfLevel: ...

    def direction(
        self,
        sums: Mapping[str, Mapping[str, tf.Tensor]],
        counts: Mapping[str, tf.Tensor],
    ) -> Direction: ...


@dataclasses.dataclass(frozen=True)
class Settings:
    """What does not change from step to step.

    Attributes:
        population_size: number N of members that are judged as a whole.
        examples_population_size: number of those that are judged example by
            example, for each replica.
        position_discount: see `example_credit.position_losses`.
        antithetic: whether they come in mirrored pairs.
        shape: fitness shaping.
        loss_scaled: whether utilities have the scale of the losses.
        natural_gradient: whether gradients are preconditioned.
        rules: what the proposal goes through, in this order.
        chunk_size: members evaluated at once; `None`: chosen.
        memory_budget: bytes, see `ChunkPlan`.
        importance_mixing: see `keras_vo.search.importance_mixing`; `None`: all
            members are new.
        noise_generator: name of what draws the noise.
    """

    population_size: int
    examples_population_size: int
    position_discount: float
    antithetic: bool
    shape: Shaping
    loss_scaled: bool
    natural_gradient: bool
    rules: Sequence[Rule]
    chunk_size: int | None
    memory_budget: int
    importance_mixing: float | None = None
    noise_generator: str = NEWEST


class SearchState(NamedTuple):
    """What changes from step to step.

    Attributes:
        gaussian: the search distribution.
        base_seed: of all noise, a scalar.
        generation: number of populations before this one, a scalar.
        updates: number of updates of the mean before this one, a scalar.
        rules: the state of all rules, by name.
        learning_rate: of the mean, a scalar; `None`: it does not matter.
    """

    gaussian: Gaussian
    base_seed: tf.Tensor
    generation: tf.Tensor
    updates: tf.Tensor
    rules: State
    learning_rate: tf.Tensor | None = None


class Judged(NamedTuple):
    """The members of one level, and what was found of them.

    Attributes:
        members: of all replicas.
        outcomes: of this replica's.
    """

    members: Members
    outcomes: Outcomes


class OfReplica(NamedTuple):
    """What replicas add up, to be filled.

    Attributes:
        sums: by kind, over members.
        totals: by kind, over examples.
        counts: by level, of examples.
        ties: by level, see `activation_scale.ties`.
    """

    sums: dict[str, dict[str, tf.Tensor]]
    totals: dict[str, dict[str, tf.Tensor]]
    counts: dict[str, tf.Tensor]
    ties: dict[str, tf.Tensor]


class Report(NamedTuple):
    """What a step has found, and what it proposes.

    Attributes:
        pooled: what was found of the members, by level.
        direction: the gradients, as they are stepped down.
        any_finite: whether any loss is finite, and there is another one to
            compare it with. Else the step is none: all that it proposes is
            to be left.
        proposal: the next search distribution.
        rules: the next state of the rules.
    """

    pooled: Mapping[str, Pooled]
    direction: Direction
    any_finite: tf.Tensor
    proposal: Proposal
    rules: State

    @property
    def losses(self) -> tf.Tensor:
        """Those of the members of all levels, see `credit.all_losses`."""
        return all_losses(self.pooled)

    @property
    def examples(self) -> tf.Tensor:
        """Number of examples of all replicas, a scalar."""
        return next(iter(self.pooled.values())).examples


def mean_scale(settings: Settings, state: SearchState) -> tf.Tensor:
    """What dU/dmu is multiplied with for the inner optimizer, [groups]; and
    natural gradients with 1 / s^2, see `Gaussian`.
    """
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


def preconditioned(
    settings: Settings, state: SearchState, gradient: tf.Tensor
) -> tf.Tensor:
    """dU/dmu [d] times `mean_scale`, of natural gradients."""
    gaussian = state.gaussian
    scale = gaussian.layout.expand(mean_scale(settings, state))
    if gaussian.sensitivity is not None:
        scale = scale / tf.square(gaussian.sensitivity)
    return scale * gradient


def mean_scales(settings: Settings, state: SearchState) -> list[tf.Tensor]:
    """`mean_scale` of each weight tensor, a scalar or shaped like it."""
    scale, gaussian = mean_scale(settings, state), state.gaussian
    if not settings.natural_gradient:
        return gaussian.layout.per_tensor(scale)
    return gaussian.over_squares(scale)
