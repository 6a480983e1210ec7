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
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from keras_vo import estimators
from keras_vo.chunks import Draws, NoiseSource
from keras_vo.distribution import Replicas
from keras_vo.evaluation import Outcome, Population, reduce_noise
from keras_vo.layout import WeightLayout
from keras_vo.local_reparameterization import ActivationNoise
from keras_vo.low_rank import KernelNoise
from keras_vo.perturbation import Evaluation, Recording, entered
from keras_vo.replicas import Share
from keras_vo.signal_to_noise import (
    Probe,
    column_squares,
    full_squares,
)

__all__ = ["SearchGradient", "SearchSpaces"]


class SearchGradient(NamedTuple):
    """The gradient of U, and the metric of its space.

    Attributes:
        mean: dU/dmu [d].
        log_variance: dU/dbeta [groups]; 0 if sigma is fixed.
        fisher: Fisher information of beta, alike.
        squares: sum of the squared norms of the draws' terms of `mean`, as
            the inner optimizer gets it; `None` if it is not measured.
    """

    mean: tf.Tensor
    log_variance: tf.Tensor
    fisher: tf.Tensor
    squares: tf.Tensor | None = None


class _Gradient(NamedTuple):
    """What one kind of noise says of one variable.

    Attributes:
        variable: its index.
        mean: dU/dmu, with the variable's number of elements.
        log_variance: dU/dbeta, alike, or a scalar where its weights share a
            variance; `None` where it is fixed.
        fisher: Fisher information of the log variance common to its weights,
            under what is judged at once: a member, or a member's example.
    """

    variable: int
    mean: tf.Tensor
    log_variance: tf.Tensor | None
    fisher: Any


class SearchSpaces:
    """The perturbation of a list of variables.

    Args:
        layout: of all variables.
        variables: the variables, mu.
        log_variance: beta, [groups] of the layout.
        recording: what layers have recorded in the mean network's pass.
        adapts: whether sigma is to be changed.
        probe: what the gradient is measured by; `None`: it is not.

    Attributes:
        means: mu, a tensor for each variable.

    Raises:
        ValueError: layers of two kinds share a variable.
    """

    def __init__(
        self,
        layout: WeightLayout,
        variables: Sequence[Any],
        log_variance: tf.Tensor,
        recording: Recording,
        adapts: bool,
        probe: Probe | None = None,
    ) -> None:
        self._layout = layout
        self._probe = probe
        self._recording = recording
        self._adapts = adapts
        self.means = [tf.convert_to_tensor(v) for v in variables]
        self._variances = layout.per_tensor(tf.exp(log_variance))
        index = {id(v): i for i, v in enumerate(variables)}
        self._low_rank = {
            index[id(kernel.variable)]: KernelNoise(
                kernel.rank,
                layout.shapes[index[id(kernel.variable)]],
                self._variances[index[id(kernel.variable)]],
            )
            for kernel in recording.low_rank
        }
        self._local = []
        for site in recording.sites:
            weights = [
                index[id(v)] for v in (site.kernel, site.bias) if v is not None
            ]
            noise = ActivationNoise(
                site.inputs,
                layout.shapes[weights[0]][-1],
                [self._variances[i] for i in weights],
                adapts,
                site.mask,
            )
            self._local.append((weights, noise))
        claimed = {i for weights, _ in self._local for i in weights}
        for i in claimed & set(self._low_rank):
            raise ValueError(
                "Expected one kind of noise for each variable. Received: a "
                "LocalReparamDense and a LowRankDense that share "
                f"{variables[i]!r}"
            )
        claimed |= set(self._low_rank)
        self._full = [i for i in range(len(variables)) if i not in claimed]
        self._full_layout = layout.select(self._full)
        self._full_mean = self._full_layout.flatten(
            [variables[i] for i in self._full]
        )
        variances = [self._variances[i] for i in self._full]
        self._full_stddev = tf.sqrt(self._expanded(variances))

    def _expanded(self, values: Sequence[tf.Tensor]) -> tf.Tensor:
        """A number or tensor for each variable of full noise, by weight."""
        return self._full_layout.expand(self._full_layout.by_group(values))

    @property
    def noise_size(self) -> int:
        """Number of normals of a draw that perturb weights."""
        return sum(self._noise_sizes())

    @property
    def gradient_size(self) -> int:
        """Numbers that replicas add up if each sums over its own noise."""
        layout = self._layout
        return layout.size + (len(layout.group_sizes) if self._adapts else 0)

    @property
    def activations(self) -> tuple[tf.Tensor, ...]:
        """Tensors of the shapes of a draw's further noise."""
        return tuple(site.outputs for site in self._recording.sites)

    def activation_bytes(self, members_per_draw: int) -> Any:
        """Bytes of perturbed activations a draw: an integer or a tensor.

        And of the perturbed kernels that regularizers of low-rank ones read.
        """
        numbers: Any = members_per_draw * sum(
            self._layout.sizes[i]
            for kernel, i in zip(
                self._recording.low_rank, self._low_rank, strict=True
            )
            if getattr(kernel.variable, "regularizer", None) is not None
        )
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
        kernels = [kernel.variable for kernel in self._recording.low_rank]

        def evaluate(draws: Draws, sign: float) -> Outcome:
            full, *factors = self._split(draws.weights)
            weights: list[Any] = list(self.means)
            perturbed = self._full_layout.unflatten(
                self._full_mean + sign * self._full_stddev * full
            )
            for i, weight in zip(self._full, perturbed, strict=True):
                weights[i] = weight
            products = {}
            for kernel, (i, noise), part in zip(
                kernels, self._low_rank.items(), factors, strict=True
            ):
                mean = self.means[i]
                products[id(kernel)] = (mean, *noise.factors(part, sign))
                # Read by what is not a call of the layer (a regularizer).
                change = noise.change(part, sign)
                weights[i] = mean + tf.cast(change, mean.dtype)
            evaluation = Evaluation(
                self._recording,
                products,
                [
                    (noise.variance_of, noise.variance)
                    for _, noise in self._local
                ],
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
        signs: int,
        share: Share,
        replicas: Replicas,
        whole: NoiseSource | None = None,
    ) -> SearchGradient:
        """The gradient of U.

        Args:
            population: the members that this replica has evaluated.
            utilities: of all members, [N], all of the first sign first.
            example_utilities: empty, or those of this replica's members on
                its examples, [signs share.size, batch].
            signs: members of a draw, 1 or 2.
            share: which draws this replica has.
            replicas: whose sums are added up.
            whole: the noise of all draws, to sum that of the weights here;
                `None`: each replica sums over its own, and these are added.
        """
        pairs = list(estimators.pair_utilities(utilities, signs == 2))
        # Each example counts the same, by how many members it was seen.
        scale = share.counts / (signs * share.size)
        own = [
            scale * tf.stack(tf.split(by_example, signs), axis=1)
            for by_example in example_utilities  # [draws, signs, batch]
        ]
        counts: list[tf.Tensor] = []
        for by_example in example_utilities:
            counts += self._example_counts(by_example, share.counts)
        if self._probe is not None and own:
            own.append(self._probe.ids(share.draws, share.start, share.size))
        if whole is None:
            weights = [*map(share.take, pairs), *own]
            sums = population.reduce(self._sums, weights)
            totals = replicas.sum([*sums, *counts])
        else:
            totals = list(reduce_noise(whole, self._weight_sums, pairs))
            if own:
                sums = population.reduce(self._local_sums, own)
                totals += replicas.sum([*sums, *counts])
        counts = totals[len(totals) - len(counts) :]
        squares = self._take_squares(totals, utilities.shape[0], counts)
        gradient = self._collect(self._each(iter(totals), utilities, counts))
        return gradient._replace(squares=squares)

    def _example_counts(
        self, utilities: tf.Tensor, counts: bool
    ) -> list[tf.Tensor]:
        """Sums over examples: of 1, and of the Fisher information of each call
        whose activations are perturbed.
        """
        examples = tf.cast(tf.shape(utilities)[1], utilities.dtype)
        return [
            counts * examples,
            *(counts * noise.fisher for _, noise in self._local),
        ]

    def _sums(
        self, draws: Draws, records: Any, odd: Any, even: Any, *examples: Any
    ) -> list[tf.Tensor]:
        """Sums over a chunk: of all kinds of noise."""
        return [
            *self._weight_sums(draws, odd, even),
            *self._local_sums(draws, records, *examples),
        ]

    def _weight_sums(
        self, draws: Draws, odd: tf.Tensor, even: tf.Tensor
    ) -> list[tf.Tensor]:
        """Sums over a chunk: of the noise of weights."""
        full, *factors = self._split(draws.weights)
        terms = self._weight_squares(full, factors, odd)
        terms.append(estimators.weighted_noise(full, odd))
        if self._adapts:
            terms.append(
                estimators.weighted_excess(full, even, self._full_layout)
            )
        for noise, part in zip(self._low_rank.values(), factors, strict=True):
            terms.append(noise.mean_sums(part, odd))
            if self._adapts:
                terms.append(noise.log_variance_sums(part, even))
        return terms

    def _local_sums(
        self, draws: Draws, records: Any, *examples: Any
    ) -> list[tf.Tensor]:
        """Sums over a chunk: of the noise of activations."""
        squares = self._local_squares(draws, records, *examples)
        return squares + [
            term
            for (_, local), xi, record in zip(
                self._local, draws.activations, records, strict=True
            )
            for term in local.sums(xi, record, examples[0])
        ]

    def _weight_squares(
        self, full: tf.Tensor, factors: Sequence[tf.Tensor], odd: tf.Tensor
    ) -> list[tf.Tensor]:
        """Squared norms of the draws' terms, summed over a chunk; or nothing.

        Of the mean's gradient, as the inner optimizer gets it.
        """
        probe = self._probe
        if probe is None:
            return []
        terms = [
            noise.squares(part, odd, probe.scales[i])
            for (i, noise), part in zip(
                self._low_rank.items(), factors, strict=True
            )
        ]
        if self._full:
            scale = self._expanded([probe.scales[i] for i in self._full])
            factor = scale / self._full_stddev
            terms.append(full_squares(full, odd, factor))
        return [tf.add_n(terms) if terms else tf.zeros([], odd.dtype)]

    def _local_squares(
        self, draws: Draws, records: Any, *examples: Any
    ) -> list[tf.Tensor]:
        """The same, of the noise of activations."""
        if self._probe is None or not self._local:
            return []
        probe, (utilities, ids) = self._probe, examples

        def squares() -> tf.Tensor:
            return self._local_squares_of(probe, draws, records, utilities, ids)

        nothing = tf.constant(math.nan, utilities.dtype)
        return [tf.cond(probe.looks_at_columns, squares, lambda: nothing)]

    def _local_squares_of(
        self,
        probe: Probe,
        draws: Draws,
        records: Any,
        utilities: tf.Tensor,
        ids: tf.Tensor,
    ) -> tf.Tensor:
        """Of one column of each variable and draw."""
        columns: dict[int, list[tf.Tensor]] = {}
        units: dict[int, tf.Tensor] = {}
        for (weights, local), xi, record in zip(
            self._local, draws.activations, records, strict=True
        ):
            size = self._layout.shapes[weights[0]][-1]
            unit = tf.math.floormod(ids, size)
            parts = local.columns(xi, record, utilities, unit)
            for i, column in zip(weights, parts, strict=True):
                columns.setdefault(i, []).append(column)
                units[i] = unit
        terms = []
        for i, parts in columns.items():
            scale = probe.scales[i]
            if scale.shape.rank:
                # [in, units] or [units] to [chunk, in] or [chunk, 1]
                by_unit = tf.reshape(scale, [-1, scale.shape[-1]])
                scale = tf.transpose(tf.gather(by_unit, units[i], axis=1))
            column = scale * tf.add_n(parts)
            terms.append(column_squares(column, self._layout.shapes[i][-1]))
        return tf.add_n(terms)

    def _take_squares(
        self,
        totals: list[tf.Tensor],
        size: int,
        counts: Sequence[tf.Tensor],
    ) -> tf.Tensor | None:
        """Takes the squared norms out of the sums."""
        if self._probe is None:
            return None
        squares = totals.pop(0) / size**2
        if self._local:
            kinds = 1 + len(self._low_rank)
            local = totals.pop(kinds * (1 + self._adapts))
            scale = tf.math.reciprocal_no_nan(counts[0])
            squares += local * tf.square(scale)
        return squares

    def _each(
        self,
        totals: Iterator[tf.Tensor],
        utilities: tf.Tensor,
        counts: Sequence[tf.Tensor],
    ) -> Iterator[_Gradient]:
        """The gradients of single variables from the sums, in their order."""
        size = utilities.shape[0]

        def log_variance() -> tf.Tensor | None:
            if not self._adapts:
                return None
            return estimators.log_variance_gradient(next(totals), size)

        means = self._full_layout.split(
            estimators.mean_gradient(next(totals), self._full_stddev, size)
        )
        by_weight = log_variance()
        betas: list[Any] = [None] * len(means)
        if by_weight is not None:
            betas = self._full_layout.per_tensor(by_weight)
        for i, mean, beta in zip(self._full, means, betas, strict=True):
            fisher = 0.5 * self._layout.sizes[i]
            yield _Gradient(i, mean, beta, fisher)
        for i, noise in self._low_rank.items():
            stddev = tf.sqrt(self._variances[i])
            mean = estimators.mean_gradient(next(totals), stddev, size)
            yield _Gradient(i, mean, log_variance(), noise.fisher)
        if not self._local:
            return
        scale = tf.math.reciprocal_no_nan(counts[0])
        for (weights, _), fisher in zip(self._local, counts[1:], strict=True):
            for i in weights:
                mean = scale * next(totals)
                beta = scale * next(totals) if self._adapts else None
                # Kernel and bias perturb the same activations.
                share = scale * fisher / len(weights)
                yield _Gradient(i, mean, beta, share)

    def _collect(self, gradients: Iterable[_Gradient]) -> SearchGradient:
        """Sums the gradients by variable, then by group."""
        means: list[list[tf.Tensor]] = [[] for _ in self.means]
        betas: list[list[tf.Tensor]] = [[] for _ in self.means]
        fishers: list[list[tf.Tensor]] = [[] for _ in self.means]
        dtype = self._layout.dtype
        for i, mean, beta, fisher in gradients:
            means[i].append(tf.reshape(mean, [-1]))
            fishers[i].append(tf.cast(fisher, dtype))
            if beta is not None:
                betas[i].append(beta)
        mean_gradient = tf.concat([tf.add_n(m) for m in means], axis=0)
        if self._layout.groups is None:
            fisher = tf.fill([self._layout.size], tf.constant(0.5, dtype))
        else:
            fisher = self._layout.by_group([tf.add_n(f) for f in fishers])
        beta_gradient = tf.zeros_like(fisher)
        if self._adapts:
            beta_gradient = self._layout.by_group([tf.add_n(b) for b in betas])
        return SearchGradient(mean_gradient, beta_gradient, fisher)

    def _noise_sizes(self) -> list[int]:
        low_rank = [noise.size for noise in self._low_rank.values()]
        return [self._full_layout.size, *low_rank]

    def _split(self, noise: tf.Tensor) -> list[tf.Tensor]:
        """Noise [..., size] of all weights, that of each low-rank kernel."""
        return tf.split(noise, self._noise_sizes(), axis=-1)


def _size(tensor: tf.Tensor) -> Any:
    if tensor.shape.is_fully_defined():
        return math.prod(tensor.shape)
    return tf.size(tensor, tf.int64)
