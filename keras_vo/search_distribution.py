"""The Gaussian search distribution N(mu, diag sigma^2) and its geometry.

References:
    [1] Havtorn, "Variational Optimization of Neural Networks", 2018 (slides).
    [2] Wierstra et al., "Natural Evolution Strategies", JMLR 15, 2014.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf
import tensorflow_probability as tfp

from keras_vo.layout import WeightLayout, layer_groups

__all__ = [
    "GaussianSearchDistribution",
    "get",
    "kl_divergence",
    "largest_step",
    "share_within",
]

_VARIANCES = ("fixed", "isotropic", "layerwise", "separable")


@keras.saving.register_keras_serializable(package="keras_vo")
class GaussianSearchDistribution:
    """How the variance of the Gaussian search distribution is shaped.

    The distribution over the weights is N(mu, diag sigma^2). What is stored
    and learned is beta = log sigma^2, by plain gradient descent on the search
    gradient of beta with a learning rate of its own:

        beta <- clip(beta - learning_rate * grad_beta)

    Args:
        variance: which weights share one variance. `"fixed"`: all, and it is
            never changed (an evolution strategy). `"isotropic"`: all.
            `"layerwise"`: those of one layer. `"separable"`: none.
        stddev: initial standard deviation sigma, in units of the weights; but
            see `follow_mean`.
        learning_rate: learning rate of beta. With natural gradients, centred
            ranks and a population that agrees, one step changes sigma by a
            factor of about exp(learning_rate / 4) at most.
        min_stddev: sigma never falls below this.
        max_stddev: sigma never rises above this.
        follow_mean: whether sigma follows the mean where it is learned and a
            layer (with `"isotropic"`, all) has more weights than the
            population has members, and more than 100: see
            `keras_vo/adaptation.py`. It is then at least the root mean square
            distance of the mean from where it has lately been, up to 1.5 /
            sqrt(fan in), and a `stddev` above 3 / sqrt(fan in) starts at 1 /
            sqrt(fan in), where the fan in is a mean over all kernels. The
            search of a network then starts well from any `stddev`.

    Raises:
        ValueError: an unknown `variance`; a standard deviation or learning
            rate that is not a positive, finite number; bounds that are
            inverted or do not enclose `stddev`.
    """

    def __init__(
        self,
        variance: str = "layerwise",
        stddev: float = 0.2,
        learning_rate: float = 0.1,
        min_stddev: float = 1e-6,
        max_stddev: float = 1e3,
        follow_mean: bool = True,
    ) -> None:
        if variance not in _VARIANCES:
            raise ValueError(
                f"`variance` must be one of {list(_VARIANCES)}. "
                f"Received: variance={variance!r}"
            )
        for name, value in (
            ("stddev", stddev),
            ("learning_rate", learning_rate),
            ("min_stddev", min_stddev),
            ("max_stddev", max_stddev),
        ):
            if not (
                isinstance(value, (int, float))
                and math.isfinite(value)
                and value > 0
            ):
                raise ValueError(
                    f"`{name}` must be a positive, finite number. "
                    f"Received: {name}={value!r}"
                )
        if not min_stddev <= stddev <= max_stddev:
            raise ValueError(
                "Expected `min_stddev` <= `stddev` <= `max_stddev`. Received: "
                f"min_stddev={min_stddev}, stddev={stddev}, "
                f"max_stddev={max_stddev}"
            )
        self.variance = variance
        self.stddev = float(stddev)
        self.learning_rate = float(learning_rate)
        self.min_stddev = float(min_stddev)
        self.max_stddev = float(max_stddev)
        self.follow_mean = bool(follow_mean)

    @property
    def adapts(self) -> bool:
        """Whether the variance is learned."""
        return self.variance != "fixed"

    @property
    def follows_mean(self) -> bool:
        """Whether sigma follows the mean in layers of many weights."""
        return self.adapts and self.follow_mean

    def layout(self, variables: Sequence[Any]) -> WeightLayout:
        """The layout of `variables`, grouped as this distribution wants."""
        if self.variance == "separable":
            return self._grouped(variables, None)
        return self.blocks(variables)

    def blocks(self, variables: Sequence[Any]) -> WeightLayout:
        """The layout of `variables`, of which each group adapts as a whole:

        a layer where sigma differs within it or between them, else all.
        """
        if self.variance in ("layerwise", "separable"):
            return self._grouped(variables, layer_groups(variables))
        return self._grouped(variables, (0,) * len(variables))

    @staticmethod
    def _grouped(
        variables: Sequence[Any], groups: tuple[int, ...] | None
    ) -> WeightLayout:
        return WeightLayout(
            shapes=tuple(tuple(v.shape) for v in variables),
            dtypes=tuple(
                keras.backend.standardize_dtype(v.dtype) for v in variables
            ),
            groups=groups,
        )

    def update(self, log_variance: tf.Tensor, gradient: tf.Tensor) -> tf.Tensor:
        """One bounded descent step on beta, with a learning rate of its own."""
        return self.bounded(log_variance - self.learning_rate * gradient)

    def bounded(self, log_variance: tf.Tensor) -> tf.Tensor:
        """beta = log sigma^2 within the bounds of sigma."""
        return tf.clip_by_value(
            log_variance,
            2.0 * math.log(self.min_stddev),
            2.0 * math.log(self.max_stddev),
        )

    def get_config(self) -> dict[str, Any]:
        return {
            "variance": self.variance,
            "stddev": self.stddev,
            "learning_rate": self.learning_rate,
            "min_stddev": self.min_stddev,
            "max_stddev": self.max_stddev,
            "follow_mean": self.follow_mean,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> GaussianSearchDistribution:
        return cls(**config)


def get(
    search_distribution: str | GaussianSearchDistribution,
) -> GaussianSearchDistribution:
    """The search distribution that a name stands for.

    Raises:
        ValueError: neither a known name nor a `GaussianSearchDistribution`.
    """
    if isinstance(search_distribution, GaussianSearchDistribution):
        return search_distribution
    if search_distribution in _VARIANCES:
        return GaussianSearchDistribution(search_distribution)
    raise ValueError(
        "`search_distribution` must be a `GaussianSearchDistribution` or one "
        f"of {list(_VARIANCES)}. "
        f"Received: search_distribution={search_distribution!r}"
    )


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
    normal = tfp.distributions.Normal
    old = normal(tf.zeros_like(mean_change), tf.exp(0.5 * log_variance))
    new = normal(mean_change, tf.exp(0.5 * new_log_variance))
    return tf.reduce_sum(tfp.distributions.kl_divergence(old, new))


def largest_step(
    divergence: Callable[[tf.Tensor], tf.Tensor],
    max_kl: float,
    dtype: tf.DType,
) -> tf.Tensor:
    """The largest share of a move whose divergence is within `max_kl`.

    Args:
        divergence: from the share in [0, 1] of the move to its KL divergence,
            continuous and 0 at 0.
        max_kl: the bound, in nats.
        dtype: dtype of the share.

    Returns:
        A scalar found by bisection: 1 if the whole move is within the bound,
        else a share whose divergence is at most `max_kl`.
    """
    one = tf.ones([], dtype)

    def halve(low: tf.Tensor, high: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        middle = 0.5 * (low + high)
        inside = divergence(middle) <= max_kl
        return tf.where(inside, middle, low), tf.where(inside, high, middle)

    def bisect() -> tf.Tensor:
        return tf.while_loop(
            lambda low, high: high - low > 1e-3 * high,
            halve,
            (tf.zeros([], dtype), one),
            maximum_iterations=60,
        )[0]

    return tf.cond(divergence(one) <= max_kl, lambda: one, bisect)


def share_within(
    max_kl: float,
    mean_change: tf.Tensor,
    log_variance: tf.Tensor,
    log_change: tf.Tensor,
    layout: WeightLayout,
) -> tf.Tensor:
    """The largest share of a step whose KL divergence is within `max_kl`.

    Args:
        max_kl: the bound, in nats.
        mean_change: mu' - mu, [d].
        log_variance: beta, [groups].
        log_change: beta' - beta, [groups].
        layout: which weights share a variance.

    Returns:
        A scalar in [0, 1]; see `largest_step`.
    """
    return largest_step(
        lambda share: kl_divergence(
            share * mean_change,
            layout.expand(log_variance),
            layout.expand(log_variance + share * log_change),
        ),
        max_kl,
        layout.dtype,
    )
