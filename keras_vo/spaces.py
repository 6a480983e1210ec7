"""How each variable is perturbed, and the search gradient of each.

Three kinds of noise live side by side in one population:

    full        each weight has its own noise: all variables that no layer
                perturbs itself
    low rank    the kernels of LowRankDense
    local       activations in place of the weights of LocalReparamDense

The first two are judged by a member's loss and drawn as one vector a member;
the third is judged example by example.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from keras_vo import estimators, low_rank
from keras_vo.evaluation import Draws, Outcome, Population
from keras_vo.layout import WeightLayout
from keras_vo.local_reparameterization import ActivationNoise
from keras_vo.perturbation import (
    Evaluation,
    Recording,
    entered,
)

__all__ = ["SearchSpaces"]


class SearchSpaces:
    """The perturbation of a list of variables.

    Args:
        layout: of all variables.
        variables: the variables, mu.
        log_variance: beta, [groups] of the layout.
        recording: what layers have recorded in the mean network's pass.
        adapts: whether sigma is to be changed.
    """

    def __init__(
        self,
        layout: WeightLayout,
        variables: Sequence[Any],
        log_variance: tf.Tensor,
        recording: Recording,
        adapts: bool,
    ) -> None:
        index = {id(v): i for i, v in enumerate(variables)}
        self._layout = layout
        self._recording = recording
        self._adapts = adapts
        self._index = index
        self._means = [tf.convert_to_tensor(v) for v in variables]
        self._variances = layout.per_tensor(tf.exp(log_variance))
        self._low_rank = {
            index[id(kernel.variable)]: kernel for kernel in recording.low_rank
        }
        self._local = {
            index[id(v)]
            for site in recording.sites
            for v in (site.kernel, site.bias)
            if v is not None
        }
        clash = self._local & set(self._low_rank)
        if clash:
            raise ValueError(
                "Expected one kind of noise for each variable. Received: a "
                "LocalReparamDense and a LowRankDense that share "
                f"{variables[min(clash)]!r}"
            )
        self._activations = [
            ActivationNoise(
                site.inputs,
                self._variances[index[id(site.kernel)]],
                None
                if site.bias is None
                else self._variances[index[id(site.bias)]],
                adapts,
            )
            for site in recording.sites
        ]
        self._full = [
            i
            for i in range(len(variables))
            if i not in self._local and i not in self._low_rank
        ]
        self._full_layout = layout.select(self._full)
        self._full_mean = self._full_layout.flatten(
            [variables[i] for i in self._full]
        )
        self._full_stddev = self._full_layout.expand(
            layout.select_values(tf.exp(0.5 * log_variance), self._full)
        )

    @property
    def noise_size(self) -> int:
        """Number of normals of a draw that perturb weights."""
        return sum(self._noise_sizes())

    @property
    def activations(self) -> tuple[tf.Tensor, ...]:
        """Tensors of the shapes of a draw's further noise."""
        return tuple(site.outputs for site in self._recording.sites)

    def activation_bytes(self, members_per_draw: int) -> Any:
        """Bytes of perturbed activations a draw: an integer or a tensor."""
        numbers = 0
        for site in self._recording.sites:
            outputs, inputs = _size(site.outputs), _size(site.inputs)
            numbers += outputs + members_per_draw * (3 * outputs + inputs)
        return numbers * self._layout.dtype.size

    def member(
        self, objective: Callable[[list[tf.Tensor]], Outcome]
    ) -> Callable[[Draws, float], Outcome]:
        """From the noise of a draw and its sign to the member's outcome.

        Args:
            objective: from all weights to the outcome without records.
        """

        def evaluate(draws: Draws, sign: float) -> Outcome:
            full, factors = self._split(draws.weights)
            weights: list[Any] = list(self._means)
            perturbed = self._full_layout.unflatten(
                self._full_mean + sign * self._full_stddev * full
            )
            for i, weight in zip(self._full, perturbed, strict=True):
                weights[i] = weight
            products = {}
            for (i, kernel), (left, right) in zip(
                self._low_rank.items(), factors, strict=True
            ):
                stddev = tf.sqrt(self._variances[i])
                noise = (left, sign * right)
                products[id(kernel.variable)] = (self._means[i], stddev, *noise)
                # Only what is not a call of the layer reads this.
                weights[i] = self._means[i] + tf.cast(
                    stddev * low_rank.kernel_noise(*noise),
                    self._means[i].dtype,
                )
            evaluation = Evaluation(
                self._recording,
                products,
                [(a.variance_of, a.variance) for a in self._activations],
                [sign * noise for noise in draws.activations],
                [draws.weights, *draws.activations],
            )
            with entered(evaluation):
                outcome = objective(weights)
            return outcome._replace(records=evaluation.finish())

        return evaluate

    def gradients(
        self,
        population: Population,
        utilities: tf.Tensor,
        example_utilities: Sequence[tf.Tensor],
        antithetic: bool,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Gradients of U for mu [d] and for beta [groups], 0 if it is fixed.

        Args:
            population: the evaluated population.
            utilities: of the members, [N].
            example_utilities: empty, or those of their examples, [N, batch].
            antithetic: whether members n and n + N/2 are a pair.
        """
        adapts = self._adapts
        shared = self._layout.groups is not None

        def sums(
            draws: Draws, records: Any, odd: Any, even: Any, *examples: Any
        ) -> list[tf.Tensor]:
            full, factors = self._split(draws.weights)
            terms = [estimators.weighted_noise(full, odd)]
            if adapts:
                terms.append(
                    estimators.weighted_excess(full, even, self._full_layout)
                )
            for left, right in factors:
                terms.append(low_rank.mean_sums(left, right, odd))
                if adapts:
                    terms.append(
                        low_rank.log_variance_sums(left, right, even, shared)
                    )
            for activations, noise, record in zip(
                self._activations, draws.activations, records, strict=True
            ):
                terms += activations.sums(noise, record, *examples)
            return terms

        weights = list(estimators.pair_utilities(utilities, antithetic))
        size = utilities.shape[0]
        batch = tf.ones([], utilities.dtype)
        for by_example in example_utilities:
            batch = tf.cast(tf.shape(by_example)[1], utilities.dtype)
            weights.append(_by_draw(by_example, 2 if antithetic else 1))
        totals = iter(population.reduce(sums, weights))
        parts = _Parts(self._layout, adapts)
        noise_sum = next(totals)
        parts.add_many(
            self._full,
            self._full_layout,
            estimators.mean_gradient(noise_sum, self._full_stddev, size),
            estimators.log_variance_gradient(next(totals), size)
            if adapts
            else None,
        )
        for i in self._low_rank:
            stddev = tf.sqrt(self._variances[i])
            parts.add(
                i,
                estimators.mean_gradient(next(totals), stddev, size),
                estimators.log_variance_gradient(next(totals), size)
                if adapts
                else None,
            )
        for site in self._recording.sites:
            for variable in (site.kernel, site.bias):
                if variable is not None:
                    parts.add(
                        self._index[id(variable)],
                        next(totals) / (size * batch),
                        next(totals) / (size * batch) if adapts else None,
                    )
        return parts.concat()

    def _noise_sizes(self) -> list[int]:
        sizes = [self._full_layout.size]
        for i, kernel in self._low_rank.items():
            sizes += [kernel.rank * n for n in self._layout.shapes[i]]
        return sizes

    def _split(
        self, noise: tf.Tensor
    ) -> tuple[tf.Tensor, list[tuple[tf.Tensor, tf.Tensor]]]:
        """Noise [..., size] of all weights, of each low-rank A and B."""
        full, *parts = tf.split(noise, self._noise_sizes(), axis=-1)
        leading = [-1 if n is None else n for n in noise.shape[:-1]]
        factors = []
        for i, kernel in self._low_rank.items():
            pair = [
                tf.reshape(parts.pop(0), [*leading, kernel.rank, size])
                for size in self._layout.shapes[i]
            ]
            factors.append((pair[0], pair[1]))
        return full, factors


class _Parts:
    """Gradients of single variables, on the way to two flat vectors."""

    def __init__(self, layout: WeightLayout, adapts: bool) -> None:
        self._layout = layout
        self._adapts = adapts
        self._means: list[list[tf.Tensor]] = [[] for _ in layout.sizes]
        keys = layout.groups or range(len(layout.sizes))
        self._log_variances: dict[int, list[tf.Tensor]] = {k: [] for k in keys}

    def add(self, i: int, mean: tf.Tensor, log_variance: Any) -> None:
        """Adds the gradients of variable i, for mu and for its beta."""
        self._means[i].append(tf.reshape(mean, [-1]))
        if log_variance is not None:
            groups = self._layout.groups
            if groups is None:
                self._log_variances[i].append(tf.reshape(log_variance, [-1]))
            else:
                self._log_variances[groups[i]].append(log_variance)

    def add_many(
        self,
        indices: Sequence[int],
        layout: WeightLayout,
        mean: tf.Tensor,
        log_variance: Any,
    ) -> None:
        """Adds those of several variables with a layout of their own."""
        means = layout.split(mean)
        for i, part in zip(indices, means, strict=True):
            self._means[i].append(part)
        if log_variance is None:
            return
        groups = self._layout.groups
        if groups is None:
            parts = layout.split(log_variance)
            for i, part in zip(indices, parts, strict=True):
                self._log_variances[i].append(part)
            return
        keys = dict.fromkeys(groups[i] for i in indices)
        for key, part in zip(keys, tf.unstack(log_variance), strict=True):
            self._log_variances[key].append(part)

    def concat(self) -> tuple[tf.Tensor, tf.Tensor]:
        """The gradients for mu [d] and for beta [groups]."""
        mean = tf.concat([tf.add_n(parts) for parts in self._means], axis=0)
        if not self._adapts:
            count = len(self._layout.group_sizes)
            return mean, tf.zeros([count], self._layout.dtype)
        totals = [
            tf.add_n(self._log_variances[key])
            for key in sorted(self._log_variances)
        ]
        if self._layout.groups is None:
            return mean, tf.concat(totals, axis=0)
        return mean, tf.stack(totals)


def _by_draw(values: tf.Tensor, members: int) -> tf.Tensor:
    """[N, batch], by sign, as [draws, signs, batch]."""
    split = tf.split(values, members)
    return tf.stack(split, axis=1)


def _size(tensor: tf.Tensor) -> Any:
    if tensor.shape.is_fully_defined():
        return math.prod(tensor.shape)
    return tf.size(tensor)
