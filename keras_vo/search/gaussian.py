"""The Gaussian search distribution N(mu, diag sigma^2), as tensors.

The only place that knows what sigma is. What is stored is beta = log sigma^2,
one for each group of weights that share a variance.

References:
    [1] Havtorn, "Variational Optimization of Neural Networks", 2018 (slides).
    [2] Wierstra et al., "Natural Evolution Strategies", JMLR 15, 2014.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import tensorflow as tf

from keras_vo.search.layout import WeightLayout
from keras_vo.search.probability import distributions

__all__ = [
    "Gaussian",
    "around",
    "kl_divergence",
    "log_variance_of",
    "step_kl",
    "stddev_of",
]


def stddev_of(log_variance: tf.Tensor) -> tf.Tensor:
    """sigma from beta = log sigma^2."""
    return tf.exp(0.5 * log_variance)


def log_variance_of(stddev: float) -> float:
    """beta = log sigma^2 from sigma, a number."""
    return 2.0 * math.log(stddev)


@dataclasses.dataclass(frozen=True, eq=False)
class Gaussian:
    """A search distribution over a list of weight tensors.

    With sensitivities s it is N(mu, sigma^2 / s^2): weights that share sigma
    have standard deviations of their own, sigma / s. What is said of
    "standard deviations" and "variances" here is theirs.

    Attributes:
        layout: of the weights.
        means: mu, a tensor for each of them.
        log_variance: beta, [groups].
        sensitivity: s, [d]; `None`: 1.
    """

    layout: WeightLayout
    means: list[tf.Tensor]
    log_variance: tf.Tensor
    sensitivity: tf.Tensor | None = None

    @functools.cached_property
    def mean(self) -> tf.Tensor:
        """mu, [d]."""
        return self.layout.flatten(self.means)

    @functools.cached_property
    def stddev(self) -> tf.Tensor:
        """sigma by group, [groups]."""
        return stddev_of(self.log_variance)

    @functools.cached_property
    def variances(self) -> list[tf.Tensor]:
        """sigma^2 / s^2 of each weight tensor: shaped like it, or a scalar
        where its weights share one.
        """
        return self.over_squares(tf.exp(self.log_variance))

    def over_squares(self, values: tf.Tensor) -> list[tf.Tensor]:
        """One value a group, [groups], over s^2: for each weight tensor, in
        the shapes of `variances`.
        """
        parts = self.layout.per_tensor(values)
        if self.sensitivity is None:
            return parts
        return [
            value / tf.square(s)
            for value, s in zip(parts, self._sensitivities, strict=True)
        ]

    @property
    def _sensitivities(self) -> list[tf.Tensor]:
        """s of each weight tensor."""
        layout = self.layout
        return [
            tf.reshape(part, shape)
            for part, shape in zip(
                layout.split(self.sensitivity), layout.shapes, strict=True
            )
        ]

    @functools.cached_property
    def tensor_stddevs(self) -> list[tf.Tensor]:
        """sigma / s, in the shapes of `variances`."""
        return [tf.sqrt(variance) for variance in self.variances]

    @property
    def stddevs(self) -> list[tf.Tensor]:
        """sigma / s of each weight, in the shapes and dtypes of the weights."""
        layout = self.layout
        by_weight = tf.broadcast_to(layout.expand(self.stddev), [layout.size])
        if self.sensitivity is not None:
            by_weight = by_weight / self.sensitivity
        return layout.unflatten(by_weight)

    @functools.cached_property
    def log_variances(self) -> tf.Tensor:
        """log(sigma^2 / s^2), broadcasts against [d]."""
        beta = self.layout.expand(self.log_variance)
        if self.sensitivity is None:
            return beta
        return beta - 2.0 * tf.math.log(self.sensitivity)

    def scaled(self, change: tf.Tensor) -> tf.Tensor:
        """s times a change of the mean [d], whose sigma is then its group's."""
        if self.sensitivity is None:
            return change
        return self.sensitivity * change

    def log_ratios(
        self, noise: tf.Tensor, signs: Sequence[float], other: Gaussian
    ) -> tf.Tensor:
        """log p'(x_n) - log p(x_n) of x = mu + sigma z, [signs, n]: the sum
        over all weights (of which sigma / s stands for sigma), with
        r = sigma / sigma' and e = (mu' - mu) / sigma',

            sum_i log r + (z^2 - (r z - e)^2) / 2
              = sum_i log r - e^2 / 2 + (1 - r^2) z^2 / 2 + r e z.

        Args:
            noise: z [n, d]; with the sign -1, -z.
            signs: those.
            other: p', of the same layout.
        """
        change = self.log_variances - other.log_variances
        change = tf.broadcast_to(change, [self.layout.size])
        e = (other.mean - self.mean) / stddev_of(other.log_variances)
        constant = tf.reduce_sum(change - tf.square(e))
        even = -tf.linalg.matvec(tf.square(noise), tf.math.expm1(change))
        odd = 2.0 * tf.linalg.matvec(noise, tf.exp(0.5 * change) * e)
        return 0.5 * tf.stack([constant + even + s * odd for s in signs])

    def express(
        self, noise: tf.Tensor, means: tf.Tensor, log_variances: tf.Tensor
    ) -> tf.Tensor:
        """The noise z' [n, d] of members of other distributions, as they are
        members of this one: mu + sigma z' = mu_n + sigma_n z_n,

            z' = (sigma_n / sigma) z_n + (mu_n - mu) / sigma.

        Args:
            noise: z_n [n, d].
            means: mu_n [n, d].
            log_variances: of each, as `log_variances`: broadcasts against it.
        """
        ratio = stddev_of(log_variances - self.log_variances)
        moved = (means - self.mean) / stddev_of(self.log_variances)
        return ratio * noise + moved

    def select(self, indices: Sequence[int]) -> Gaussian:
        """That of some of the weight tensors, in the given order."""
        layout = self.layout
        own = layout.select(indices)
        betas = layout.per_tensor(self.log_variance)
        sensitivity = None
        if self.sensitivity is not None:
            parts = layout.split(self.sensitivity)
            sensitivity = tf.concat([parts[i] for i in indices], axis=0)
        return Gaussian(
            own,
            [self.means[i] for i in indices],
            own.by_group([betas[i] for i in indices]),
            sensitivity,
        )

    def kl(self, mean_change: tf.Tensor, log_variance: tf.Tensor) -> tf.Tensor:
        """KL(this || N(mu + mean_change, sigma'^2 / s^2)) in nats, a scalar.

        Args:
            mean_change: [d].
            log_variance: beta', [groups].
        """
        return kl_divergence(
            self.scaled(mean_change),
            self.layout.expand(self.log_variance),
            self.layout.expand(log_variance),
        )


def around(
    layout: WeightLayout,
    mean: tf.Tensor,
    log_variance: tf.Tensor,
    sensitivity: tf.Tensor | None,
) -> Gaussian:
    """A Gaussian of its mean [d], whatever the dtypes of the variables."""
    means = [
        tf.reshape(part, shape)
        for part, shape in zip(layout.split(mean), layout.shapes, strict=True)
    ]
    return Gaussian(layout, means, log_variance, sensitivity)


def kl_divergence(
    mean_change: tf.Tensor,
    log_variance: tf.Tensor,
    new_log_variance: tf.Tensor,
) -> tf.Tensor:
    """KL(N(mu, sigma^2) || N(mu + mean_change, sigma'^2)), eq. (14) of [1].

    Args:
        mean_change: change of the mean, [d].
        log_variance: log sigma^2, broadcasts against [d].
        new_log_variance: log sigma'^2, broadcasts against [d].

    Returns:
        The divergence in nats, a scalar: the sum over all weights.
    """
    tfd = distributions()
    normal = tfd.Normal
    old = normal(tf.zeros_like(mean_change), stddev_of(log_variance))
    new = normal(mean_change, stddev_of(new_log_variance))
    return tf.reduce_sum(tfd.kl_divergence(old, new))


def step_kl(
    gaussian: Gaussian,
    new_means: Sequence[tf.Tensor],
    new_log_variance: tf.Tensor,
) -> tf.Tensor:
    """KL of a step, eq. (14) of [1], by group: a scalar float64.

    `kl_divergence` of the same step, but with one logarithm for each variance
    instead of for each weight:

        sum_g D_g (exp(x_g) - 1 - x_g) / 2
              + |s (mu'_g - mu_g)|^2 / (2 sigma'_g^2)

    with x = beta - beta'.

    Args:
        gaussian: before the step.
        new_means: the weight tensors after it.
        new_log_variance: beta', [groups].
    """
    layout, log_variance = gaussian.layout, gaussian.log_variance
    changes = [
        tf.cast(new, layout.dtype) - tf.cast(old, layout.dtype)
        for old, new in zip(gaussian.means, new_means, strict=True)
    ]
    if gaussian.sensitivity is not None:
        changes = [
            s * change
            for s, change in zip(gaussian._sensitivities, changes, strict=True)
        ]
    if layout.groups is None:
        sizes = tf.ones([], layout.dtype)
        squares = layout.by_group([tf.square(x) for x in changes])
        beta, new_beta = log_variance, new_log_variance
    else:  # few numbers, of which large ones are taken
        sizes = tf.constant(layout.group_sizes, tf.float64)
        squares, beta, new_beta = tf.unstack(
            tf.cast(
                tf.stack(
                    [
                        layout.by_group(
                            [2.0 * tf.nn.l2_loss(x) for x in changes]
                        ),
                        log_variance,
                        new_log_variance,
                    ]
                ),
                tf.float64,
            )
        )
    x = beta - new_beta
    moved = squares * tf.exp(-new_beta)
    terms = sizes * (tf.math.expm1(x) - x) + moved
    return 0.5 * tf.cast(tf.reduce_sum(terms), tf.float64)
