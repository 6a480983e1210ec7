"""All perturbations of a step together, each with the variables it claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from keras_vo import checks
from keras_vo.perturbations import registry
from keras_vo.perturbations.base import Perturbation, Space, VariableGradient
from keras_vo.perturbations.full import Full
from keras_vo.perturbations.of_level import PerturbationsOfLevel
from keras_vo.perturbations.scope import Recording
from keras_vo.search.activation_scale import Site
from keras_vo.search.credit import LEVELS
from keras_vo.search.estimators import Direction

__all__ = [
    "Perturbations",
    "check_batch",
    "levels",
    "settle",
    "sites",
]


class Perturbations:
    """How all variables are perturbed in one step.

    Variables that no layer has claimed have noise of the optimizer's kind if it
    adopts them, else of full rank. What several
    kinds say of single variables is put together here. A member's weights
    satisfy the constraints of their variables.

    Args:
        recording: what layers have claimed in the mean network's pass.
        space: what they are bound to.

    Attributes:
        levels: of the credit that is needed, in the order of evaluation.

    Raises:
        ValueError: layers of two kinds share a variable.
    """

    def __init__(self, recording: Recording, space: Space) -> None:
        self._space = space
        claims, variables = recording.claims, recording.variables
        kinds = {
            name: registry.get(name)(claims[name], space) for name in claims
        }
        rest = _rest(kinds, variables)
        chosen = registry.get(recording.choice.kind)
        if adopted := chosen.adopt([variables[i] for i in rest]):
            all_claims = [*claims.get(chosen.name, ()), *adopted]
            kinds[chosen.name] = chosen(all_claims, space)
            rest = _rest(kinds, variables)
        if rest or not kinds:
            kinds[Full.name] = Full(rest, space)
        self._kinds = [
            kinds[name] for name in registry.names() if name in kinds
        ]
        used = {kind.level for kind in self._kinds}
        self.levels = tuple(level for level in LEVELS if level in used)
        self._by_level = {
            level: PerturbationsOfLevel(
                [kind for kind in self._kinds if kind.level == level],
                recording,
                space.gaussian,
            )
            for level in self.levels
        }

    def at(self, level: str) -> PerturbationsOfLevel:
        """Those of one of `levels`."""
        return self._by_level[level]

    def direction(
        self,
        sums: Mapping[str, Mapping[str, tf.Tensor]],
        counts: Mapping[str, tf.Tensor],
    ) -> Direction:
        """The gradient of U.

        Args:
            sums: by kind, over all members and replicas.
            counts: by level, over how many members or examples.
        """
        gradients: list[VariableGradient] = []
        squares = dict.fromkeys(
            self.levels, tf.zeros([], self._space.gaussian.layout.dtype)
        )
        for kind in self._kinds:
            count = counts[kind.level]
            gradients += kind.gradient(sums[kind.name], count)
            if "squares" in sums[kind.name]:
                scale = tf.square(tf.math.reciprocal_no_nan(count))
                squares[kind.level] += scale * sums[kind.name]["squares"]
        direction = self._collected(gradients)
        if self._space.probe is None:
            return direction
        return direction._replace(squares=squares)

    def _collected(self, gradients: Sequence[VariableGradient]) -> Direction:
        """Sums the gradients by variable, then by group."""
        layout, adapts = self._space.gaussian.layout, self._space.adapts
        means: list[list[tf.Tensor]] = [[] for _ in layout.shapes]
        betas: list[list[tf.Tensor]] = [[] for _ in layout.shapes]
        fishers: list[list[tf.Tensor]] = [[] for _ in layout.shapes]
        for i, mean, beta, fisher in gradients:
            means[i].append(tf.reshape(mean, [-1]))
            fisher = tf.cast(fisher, layout.dtype)
            if layout.groups is None:
                fisher = tf.broadcast_to(fisher, layout.shapes[i])
            # Of weights that share a variance: the sum of theirs.
            shared = layout.groups is not None
            fishers[i].append(_total(fisher) if shared else fisher)
            if beta is not None:
                betas[i].append(_total(beta) if shared else beta)
        mean_gradient = tf.concat([tf.add_n(m) for m in means], axis=0)
        fisher = layout.by_group([tf.add_n(f) for f in fishers])
        beta_gradient = tf.zeros_like(fisher)
        if adapts:
            beta_gradient = layout.by_group([tf.add_n(b) for b in betas])
        return Direction(mean_gradient, beta_gradient, fisher)


def _total(values: tf.Tensor) -> tf.Tensor:
    """The sum of what is said of single weights; a scalar as it is."""
    return tf.reduce_sum(values) if values.shape.rank else values


def settle(recording: Recording, read: Sequence[tf.Tensor]) -> None:
    """Ends the mean network's pass: `Recording.settle`."""
    recording.settle([registry.get(name) for name in recording.claims], read)


def levels(recording: Recording) -> frozenset[str]:
    """The levels of credit that what was recorded needs."""
    return frozenset(registry.get(name).level for name in recording.claims)


def sites(recording: Recording, positions: Mapping[int, int]) -> list[Site]:
    """The calls that were recorded with noise on their outputs.

    Args:
        recording: of the mean network's pass.
        positions: of each variable that is searched over, by its id.
    """
    return [
        Site(
            [positions[id(v)] for v in variables],
            fan_in,
            len(variables[0].shape) > 1,
        )
        for name, claims in recording.claims.items()
        for variables, fan_in in registry.get(name).fans(claims)
    ]


def check_batch(recording: Recording, inputs: tf.Tensor) -> None:
    """Checks that what was recorded fits the batch, [batch, ...]."""
    for name, claims in recording.claims.items():
        registry.get(name).check_batch(claims, inputs)


def _rest(
    kinds: Mapping[str, Perturbation], variables: Sequence[Any]
) -> list[int]:
    """Indices of the variables that no kind perturbs; others are of one."""
    owners: dict[int, str] = {}
    for name, kind in kinds.items():
        for i in kind.variables:
            if owners.setdefault(i, name) != name:
                raise ValueError(
                    "Expected one kind of noise for each variable. Received: "
                    f"{checks.variable_name(variables[i])!r}, which layers of "
                    f"the kinds {owners[i]!r} and {name!r} share"
                )
    return [i for i in range(len(variables)) if i not in owners]
