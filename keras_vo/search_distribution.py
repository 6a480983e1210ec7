"""The Gaussian search distribution N(mu, diag sigma^2) and its geometry.

References:
    [1] Havtorn, "Variational Optimization of Neural Networks", 2018 (slides).
    [2] Wierstra et al., "Natural Evolution Strategies", JMLR 15, 2014.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import keras

from keras_vo import checks, precision
from keras_vo.search import follow_mean
from keras_vo.search.gaussian import log_variance_of
from keras_vo.search.layout import WeightLayout, layer_groups
from keras_vo.search.rules import Bounds, Descent, Rule, Scheduled

__all__ = ["GaussianSearchDistribution", "get"]

_AUTO = 0.2
# Of that, for trained weights. docs/decisions/0030-trained-weights.md.
_TRAINED = 0.1
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
            never changed once the search has begun (an evolution strategy).
            `"isotropic"`: all. `"layerwise"`: those of one layer.
            `"separable"`: none.
        stddev: initial standard deviation sigma, in units of the weights.
            `"auto"`: 0.2; or, where sigma follows the mean (see
            `follow_mean`) and that is more than 3 / sqrt(fan in), 1 /
            sqrt(fan in). Of a model that is trained already when `fit`
            begins, a tenth of that. Of noise on activations, it is less in
            deep networks, and more where losses take few values: see
            `keras_vo.search.activation_scale`. A number is kept, with a
            warning where it is more than 3 / sqrt(fan in). A
            `LearningRateSchedule` of `keras.optimizers.schedules` is sigma as
            a function of the number of updates, for the variance "fixed".
        learning_rate: learning rate of beta. With natural gradients, centred
            ranks and a population that agrees, one step changes sigma by a
            factor of about exp(learning_rate / 4) at most.
        min_stddev: sigma never falls below this.
        max_stddev: sigma never rises above this.
        follow_mean: whether sigma follows the mean where it is learned and a
            layer (with `"isotropic"`, all) has more weights than the
            population has members, and more than 100: see
            `keras_vo.search.follow_mean`. (Noise on activations: only where
            losses take few values.) It is then at least the root mean
            square distance of the mean from where it has lately been, up to
            1.5 / sqrt(fan in), where the fan in is a mean over all kernels.

    Raises:
        ValueError: an unknown `variance`; a standard deviation or learning
            rate that is not a positive, finite number; bounds that are
            inverted or do not enclose `stddev`; a schedule of a variance that
            is learned.
    """

    def __init__(
        self,
        variance: str = "layerwise",
        stddev: float | str | Any = "auto",
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
        numbers: dict[str, Any] = {
            "learning_rate": learning_rate,
            "min_stddev": min_stddev,
            "max_stddev": max_stddev,
        }
        if _is_schedule(stddev):
            if variance != "fixed":
                raise ValueError(
                    "A schedule of `stddev` needs a sigma that nothing else "
                    'changes. Expected: variance="fixed". '
                    f"Received: variance={variance!r}, stddev={stddev!r}"
                )
        elif not _is_auto(stddev):
            numbers["stddev"] = stddev
        numbers = {
            name: checks.checked_number(name, value)
            for name, value in numbers.items()
        }
        start = numbers.get("stddev", min_stddev)
        if not min_stddev <= start <= max_stddev:
            raise ValueError(
                "Expected `min_stddev` <= `stddev` <= `max_stddev`. Received: "
                f"min_stddev={min_stddev}, stddev={stddev}, "
                f"max_stddev={max_stddev}"
            )
        self.variance = variance
        self.stddev = numbers.pop("stddev", stddev)
        self.learning_rate = numbers["learning_rate"]
        self.min_stddev = numbers["min_stddev"]
        self.max_stddev = numbers["max_stddev"]
        self.follow_mean = bool(follow_mean)

    @property
    def adapts(self) -> bool:
        """Whether the variance is learned."""
        return self.variance != "fixed"

    @property
    def follows_mean(self) -> bool:
        """Whether sigma follows the mean in layers of many weights."""
        return self.adapts and self.follow_mean

    @property
    def chooses_stddev(self) -> bool:
        """Whether sigma is chosen by default at first."""
        return _is_auto(self.stddev)

    @property
    def is_scheduled(self) -> bool:
        """Whether sigma is a function of the number of updates."""
        return _is_schedule(self.stddev)

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
            dtypes=tuple(precision.wide(v.dtype) for v in variables),
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
        """beta = log sigma^2 before the first step, the same for all.

        Warns where `stddev` is a number that is far too large.
        """
        stddev: Any = self.stddev
        if _is_schedule(stddev):
            stddev = float(stddev(0))
        else:
            blocks = self.blocks(variables)
            value = _AUTO if _is_auto(stddev) else stddev
            scale = follow_mean.noise_scale(blocks)
            large = self.follows(variables, population_size)
            large = large and follow_mean.too_large(value, blocks)
            if _is_auto(stddev):
                value = scale if large else value
            elif large:
                warnings.warn(
                    f"stddev={stddev} is more than {follow_mean.MOST_NOISE:g} "
                    "/ sqrt(fan in) of these layers: members have far more "
                    "noise than signal, and a search may not start. Expected: "
                    f'about {scale:.2g}, as stddev="auto" chooses',
                    stacklevel=2,
                )
            stddev = value
        return log_variance_of(
            min(max(stddev, self.min_stddev), self.max_stddev)
        )

    def log_variance_of_trained(self, log_variance: float) -> float:
        """beta before the first step, of weights that are trained already.

        Args:
            log_variance: beta of new weights.
        """
        if not _is_auto(self.stddev):
            return log_variance
        smaller = log_variance + log_variance_of(_TRAINED)
        return max(smaller, log_variance_of(self.min_stddev))

    def rules(
        self, variables: Sequence[Any], population_size: int
    ) -> list[Rule]:
        """How sigma changes."""
        if _is_schedule(self.stddev):
            return [Scheduled(self.stddev, self.bounds)]
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
            "stddev": (
                keras.saving.serialize_keras_object(self.stddev)
                if _is_schedule(self.stddev)
                else self.stddev
            ),
            "learning_rate": self.learning_rate,
            "min_stddev": self.min_stddev,
            "max_stddev": self.max_stddev,
            "follow_mean": self.follow_mean,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> GaussianSearchDistribution:
        config = dict(config)
        if isinstance(config.get("stddev"), dict):
            config["stddev"] = keras.saving.deserialize_keras_object(
                config["stddev"]
            )
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


def _is_schedule(stddev: Any) -> bool:
    schedule = keras.optimizers.schedules.LearningRateSchedule
    return isinstance(stddev, schedule)


def _is_auto(stddev: Any) -> bool:
    return isinstance(stddev, str) and stddev == "auto"
