"""The Gaussian search distribution N(mu, diag sigma^2) and its geometry.

References:
    [1] Havtorn, "Variational Optimization of Neural Networks", 2018 (slides).
    [2] Wierstra et al., "Natural Evolution Strategies", JMLR 15, 2014.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import keras

from keras_vo.search import follow_mean
from keras_vo.search.gaussian import log_variance_of
from keras_vo.search.layout import WeightLayout, layer_groups
from keras_vo.search.rules import Bounds, Descent, Rule

__all__ = ["GaussianSearchDistribution", "get"]

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
            `keras_vo/search/follow_mean.py`. It is then at least the root mean square
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

    @property
    def bounds(self) -> Bounds:
        """Those of sigma."""
        return Bounds(self.min_stddev, self.max_stddev)

    def follows(self, variables: Sequence[Any], population_size: int) -> bool:
        """Whether sigma follows the mean in any layer of these weights."""
        return self.follows_mean and any(
            follow_mean.follows(self.blocks(variables), population_size)
        )

    def initial_log_variance(
        self, variables: Sequence[Any], population_size: int
    ) -> float:
        """beta = log sigma^2 before the first step, the same for all."""
        stddev = self.stddev
        if self.follows(variables, population_size):
            stddev = follow_mean.initial(stddev, self.blocks(variables))
        stddev = min(max(stddev, self.min_stddev), self.max_stddev)
        return log_variance_of(stddev)

    def rules(
        self, variables: Sequence[Any], population_size: int
    ) -> list[Rule]:
        """How sigma changes."""
        if not self.adapts:
            return []
        descent = Descent(self.learning_rate, self.bounds)
        if not self.follows(variables, population_size):
            return [descent]
        blocks = self.blocks(variables)
        return [follow_mean.FollowMean(descent, blocks, population_size)]

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
