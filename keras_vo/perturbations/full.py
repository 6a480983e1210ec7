"""Noise of full rank: each weight has its own.

w = mu + sigma z, z ~ N(0, I); the gradients are those of
`keras_vo.search.estimators`, and the Fisher information of a log variance that
D weights share is D / 2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf

from keras_vo.perturbations.base import Perturbation, Space, VariableGradient
from keras_vo.perturbations.shared_inputs import Terms
from keras_vo.search import estimators
from keras_vo.search.chunks import Noise
from keras_vo.search.credit import Rows
from keras_vo.search.gaussian import Gaussian

__all__ = ["Full", "full_squares"]

# Weights that are looked at for the squared norms of a gradient's terms.
_COLUMNS = 1024


class Full(Perturbation):
    """Full-rank noise on all variables that nothing else perturbs."""

    name = "full"

    def __init__(self, claims: Sequence[int], space: Space) -> None:
        gaussian = space.gaussian
        self.variables = list(claims)
        self._gaussian = gaussian
        self._adapts = space.adapts
        self._sizes = gaussian.layout.sizes
        self._layout = gaussian.layout.select(self.variables)
        dtype = self._layout.dtype
        self._means = {
            i: tf.cast(tf.convert_to_tensor(gaussian.means[i]), dtype)
            for i in self.variables
        }
        self._last: tuple[tf.Tensor, dict[int, Terms]] | None = None
        self._stddev = self._expanded(
            [gaussian.tensor_stddevs[i] for i in self.variables]
        )
        self._factor = None
        if space.probe is not None and self.variables:
            scales = [space.probe.scales[i] for i in self.variables]
            self._factor = self._expanded(scales) / self._stddev
        self.noise_size = self._layout.size

    def _expanded(self, values: Sequence[tf.Tensor]) -> tf.Tensor:
        """A number or tensor for each variable, by weight."""
        if any(value.shape.rank for value in values):
            return self._layout.flatten(values)
        return self._layout.expand(self._layout.by_group(values))

    def member(
        self, noise: Noise, sign: float
    ) -> tuple[Mapping[int, tf.Tensor], Any]:
        terms = {
            i: of._replace(sign=sign)
            for i, of in self._terms_of(noise.weights).items()
        }
        dtypes = self._gaussian.layout.dtypes
        weights = {i: tf.cast(of.sum(), dtypes[i]) for i, of in terms.items()}
        return weights, terms

    def terms(self, state: Any) -> Mapping[int, Terms]:
        return dict(state)

    def _terms_of(self, noise: tf.Tensor) -> dict[int, Terms]:
        """Of the weights of a direction's first member, by index; the same
        tensors for its second.
        """
        if self._last is None or self._last[0] is not noise:
            terms = {}
            parts = self._layout.split(noise)
            for i, part in zip(self.variables, parts, strict=True):
                mean = self._means[i]
                part = tf.reshape(part, mean.shape)
                stddev = self._gaussian.tensor_stddevs[i]
                if stddev.shape.rank:
                    part, stddev = stddev * part, tf.ones([], part.dtype)
                terms[i] = Terms(mean, 1.0, stddev, part, {})
            self._last = noise, terms
        return self._last[1]

    def sums(
        self, noise: Noise, records: Any, rows: Rows
    ) -> dict[str, tf.Tensor]:
        odd, even = estimators.pair_utilities(rows.utilities)
        sums = {"mean": estimators.weighted_noise(noise.weights, odd)}
        if self._adapts:
            sums["log_variance"] = estimators.weighted_excess(
                noise.weights, even, self._layout
            )
        if rows.ids is not None and self._factor is not None:
            sums["squares"] = full_squares(noise.weights, odd, self._factor)
        return sums

    def log_ratios(
        self, noise: Noise, signs: Sequence[float], other: Gaussian
    ) -> tf.Tensor:
        own = self._gaussian.select(self.variables)
        return own.log_ratios(
            noise.weights, signs, other.select(self.variables)
        )

    def gradient(
        self, sums: Mapping[str, tf.Tensor], count: tf.Tensor
    ) -> Iterator[VariableGradient]:
        means = self._layout.split(
            estimators.mean_gradient(sums["mean"], self._stddev, count)
        )
        betas: list[Any] = [None] * len(means)
        if self._adapts:
            by_group = estimators.log_variance_gradient(
                sums["log_variance"], count
            )
            betas = self._layout.per_tensor(by_group)
        for i, mean, beta in zip(self.variables, means, betas, strict=True):
            shared = self._layout.groups is not None
            fisher = 0.5 * self._sizes[i] if shared else 0.5
            yield VariableGradient(i, mean, beta, fisher)


def full_squares(
    noise: tf.Tensor, weights: tf.Tensor, factor: tf.Tensor
) -> tf.Tensor:
    """sum_n u_n^2 |f z_n|^2: noise [n, d], weights u [n], f [d] or [1].

    At most 1024 weights are looked at: the z_i^2 of the others have the same
    mean 1, whatever their f_i.
    """
    size = noise.shape[-1]
    looked_at = min(size, _COLUMNS)
    squares = tf.broadcast_to(tf.square(factor), [size])
    some = squares[:looked_at]
    norms = tf.linalg.matvec(tf.square(noise[:, :looked_at]), some)
    if looked_at < size:
        norms *= tf.reduce_sum(squares) / tf.reduce_sum(some)
    return tf.reduce_sum(tf.square(weights) * norms)
