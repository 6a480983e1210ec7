"""The perturbations of the members of one level of credit."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from keras_vo.constraints import constraint_of, projected
from keras_vo.perturbations.automatic import entered
from keras_vo.perturbations.base import Perturbation
from keras_vo.perturbations.full import Full
from keras_vo.perturbations.scope import Evaluation, Recording
from keras_vo.perturbations.shared_inputs import (
    TraceAgainError,
    products_by_terms,
)
from keras_vo.search.chunks import Noise
from keras_vo.search.credit import Rows
from keras_vo.search.gaussian import Gaussian

__all__ = ["PerturbationsOfLevel"]

Objective = Callable[[list[tf.Tensor]], Mapping[str, tf.Tensor]]


class PerturbationsOfLevel:
    """How the members of one level of credit are perturbed.

    All other variables have their mean.

    Args:
        kinds: of that level.
        recording: what layers have claimed in the mean network's pass.
        gaussian: the search distribution.

    Attributes:
        noise_size: number of normals of a direction that perturb weights.
        activations: tensors of the shapes of a direction's further noise.
        variables: indices of those that are perturbed.
    """

    def __init__(
        self,
        kinds: Sequence[Perturbation],
        recording: Recording,
        gaussian: Gaussian,
    ) -> None:
        self._kinds = kinds
        self._recording = recording
        self._gaussian = gaussian
        self._last: tuple[tf.Tensor, list[Noise]] | None = None
        self._by_terms = True
        self.noise_size = sum(kind.noise_size for kind in kinds)
        self.activations = tuple(
            tensor for kind in kinds for tensor in kind.activations
        )
        self.variables: Sequence[int] = [
            i for kind in kinds for i in kind.variables
        ]

    @property
    def full(self) -> Sequence[int]:
        """Indices of the variables with noise of full rank."""
        return [
            i
            for kind in self._kinds
            if kind.name == Full.name
            for i in kind.variables
        ]

    def activation_bytes(self, signs: int) -> Any:
        """Bytes of perturbed activations of a direction."""
        total: Any = 0
        for kind in self._kinds:
            total += kind.activation_bytes(signs)
        return total

    def member(
        self, objective: Objective
    ) -> Callable[[Noise, float], tuple[Mapping[str, tf.Tensor], Any]]:
        """From a direction's noise and a sign to what the member leaves.

        Args:
            objective: from all weights to the member's losses by level.

        Returns:
            A function whose value is that of `objective`, and the records.
            It raises `TraceAgainError` where it has found that products by
            terms are none for this objective.
        """

        def evaluate(noise: Noise, sign: float) -> tuple[Any, Any]:
            perturbed, states = self._perturbed(noise, sign)
            weights = self._as_variables(perturbed)
            evaluation = Evaluation(
                self._recording,
                self._kinds,
                states,
                [noise.weights, *noise.activations],
                self.noise_size == 0,
            )
            terms = [
                (weights[i], of)
                for kind, state in zip(self._kinds, states, strict=True)
                for i, of in kind.terms(state).items()
                if weights[i] is perturbed[i]  # neither projected nor rounded
            ] * self._by_terms
            with (
                entered(evaluation),
                products_by_terms(terms, evaluation.sources) as products,
            ):
                try:
                    losses = objective(weights)
                except Exception:
                    if not products.differentiated:
                        raise
            if products.differentiated:
                self._by_terms = False
                raise TraceAgainError
            return losses, evaluation.finish()

        return evaluate

    def weights(self, noise: Noise, sign: Any) -> list[tf.Tensor]:
        """The weights of a member, as its variables have them.

        Args:
            noise: of its direction.
            sign: a number or a scalar of the dtype of the noise.
        """
        return self._as_variables(self._perturbed(noise, sign)[0])

    def _perturbed(
        self, noise: Noise, sign: Any
    ) -> tuple[dict[int, tf.Tensor], list[Any]]:
        """A member's weights by variable, and what each kind needs of it."""
        weights = dict(enumerate(self._gaussian.means))
        states = []
        parts = self._split(noise)
        for kind, part in zip(self._kinds, parts, strict=True):
            perturbed, state = kind.member(part, sign)
            states.append(state)
            weights |= perturbed
        return weights, states

    def _as_variables(
        self, weights: Mapping[int, tf.Tensor]
    ) -> list[tf.Tensor]:
        """A member's weights as its variables have them: they satisfy their
        constraints, and are rounded.
        """
        values = []
        for i, variable in enumerate(self._recording.variables):
            constraint = constraint_of(variable)
            value = weights[i]
            if constraint is not None:
                value = projected(constraint, value)
            values.append(tf.cast(value, variable.dtype))
        return values

    def sums(
        self, noise: Noise, records: Any, rows: Rows
    ) -> dict[str, dict[str, tf.Tensor]]:
        """Sums over a chunk, by kind: see `Perturbation.sums`.

        Args:
            noise: [chunk, ...].
            records: of each kind; empty: there are none.
            rows: what they are summed with.
        """
        parts = self._split(noise)
        records = records or [()] * len(self._kinds)
        return {
            kind.name: kind.sums(part, record, rows)
            for kind, part, record in zip(
                self._kinds, parts, records, strict=True
            )
        }

    def log_ratios(
        self, noise: Noise, signs: Sequence[float], other: Gaussian
    ) -> tf.Tensor:
        """See `Gaussian.log_ratios`: [signs, chunk]."""
        parts = zip(self._kinds, self._split(noise), strict=True)
        return tf.add_n([k.log_ratios(part, signs, other) for k, part in parts])

    def totals(self) -> dict[str, dict[str, tf.Tensor]]:
        """Sums over the examples of this replica, by kind."""
        return {kind.name: kind.totals() for kind in self._kinds}

    def _split(self, noise: Noise) -> list[Noise]:
        """The noise [..., noise_size] of all, as that of each kind.

        Both members of a pair get the same tensors.
        """
        if self._last is not None and self._last[0] is noise.weights:
            return self._last[1]
        sizes = [kind.noise_size for kind in self._kinds]
        parts = tf.split(noise.weights, sizes, axis=-1)
        given = iter(noise.activations)
        split = [
            Noise(part, tuple(itertools.islice(given, len(kind.activations))))
            for kind, part in zip(self._kinds, parts, strict=True)
        ]
        self._last = noise.weights, split
        return split
