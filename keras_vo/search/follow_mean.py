"""What keeps the sigma of a network's layers within reason.

The search gradient of a variance that many weights share is too weak to lead
it: what a member's radius |z|^2 says of its loss is little beside the noise of
a population of N, and the natural gradient divides that by sqrt(D) for the D
weights of a layer. So where D > max(N, 100), sigma has two sources. One is a
base s, that starts at sigma_0, goes down the natural gradient, and grows where
all losses are equal. The other is where the mean has lately been: with the
means over the weights of layer b,

    phi_b   = log mean_b (mu' - m)^2
    sigma_i = s_i exp(max(0, phi_b - mean_b log s^2) / 2)
    m      <- m + (mu' - m) / max(20, t / 2)

Sigma is at least the root mean square distance of the mean from its own
moving average m over the later part of the search's t updates, so that where
the mean has been stays within the search distribution. Steps that go one way
add up in it and steps that go to and fro cancel, as in the evolution paths of
[1]; where the mean comes to rest, sigma falls back to s. With natural
gradients the steps of the mean take their size from s
(`estimators.based_mean_scale`): there is no loop that could run away.

From above, the network's shape says what is too much: noise of sigma on the
weights of a unit adds noise of sigma sqrt(fan in) to its input, in units of
what comes in. So the mean raises sigma to 1.5 / sqrt(fan in) at most. The fan
in is a mean over all kernels.

docs/decisions/0015-sigma-follows-the-mean.md has what else was tried.

References:
    [1] Hansen, Ostermeier, "Completely Derandomized Self-Adaptation in
        Evolution Strategies", Evolutionary Computation 9, 2001.
"""

from __future__ import annotations

import dataclasses
import math

import tensorflow as tf

from keras_vo.search.estimators import Direction
from keras_vo.search.gaussian import Gaussian, stddev_of
from keras_vo.search.layout import WeightLayout
from keras_vo.search.rules import Descent, Proposal, State, Step

__all__ = [
    "FollowMean",
    "MOST_NOISE",
    "averaged_mean",
    "blind_growth",
    "follows",
    "lifted",
    "noise_scale",
    "too_large",
]

_FEW_WEIGHTS = 100
_LEAST_HORIZON = 20.0
_MOST_LIFTED, MOST_NOISE = 1.5, 3.0
_BLIND_RATE = 0.06


@dataclasses.dataclass(frozen=True)
class FollowMean:
    """The rule: beta descends from a base, and sigma follows the mean.

    Its state is `base_log_variance`, log s^2 [groups], and `averaged_mean`, m
    [d].

    Attributes:
        descent: of the base.
        blocks: which weights adapt as a whole, each a union of groups.
        population_size: N.
    """

    descent: Descent
    blocks: WeightLayout
    population_size: int

    def init(self, gaussian: Gaussian) -> dict[str, tf.Tensor]:
        return {
            "base_log_variance": gaussian.log_variance,
            "averaged_mean": gaussian.mean,
        }

    def base_stddev(self, state: State) -> tf.Tensor | None:
        return stddev_of(state["base_log_variance"])

    def propose(self, step: Step, proposal: Proposal, state: State) -> Proposal:
        lift = lifted(
            self._next_base(step, state),
            proposal.mean - self._average(step, state),
            step.gaussian.layout,
            self.blocks,
            self.population_size,
        )
        return proposal._replace(log_variance=self.descent.bounds.clip(lift))

    def settle(
        self, step: Step, proposal: Proposal, state: State
    ) -> dict[str, tf.Tensor]:
        base, new_base = (
            state["base_log_variance"],
            self._next_base(step, state),
        )
        if proposal.fraction is not None:
            new_base = base + proposal.fraction * (new_base - base)
        average = averaged_mean(
            self._average(step, state), proposal.mean, step.updates + 1
        )
        return {"base_log_variance": new_base, "averaged_mean": average}

    def _next_base(self, step: Step, state: State) -> tf.Tensor:
        base = blind_growth(state["base_log_variance"], step.direction)
        return self.descent.descend(base, step.direction)

    def _average(self, step: Step, state: State) -> tf.Tensor:
        """m; before the first step weights may have been loaded."""
        return tf.where(
            tf.equal(step.updates, 0),
            step.gaussian.mean,
            state["averaged_mean"],
        )


def follows(blocks: WeightLayout, population_size: int) -> list[bool]:
    """Whether sigma follows the mean, for each block: where D > max(N, 100).

    The gradient of a variance that few weights share can be trusted.
    """
    few = max(population_size, _FEW_WEIGHTS)
    return [size > few for size in blocks.group_sizes]


def noise_scale(blocks: WeightLayout) -> float:
    """1 / sqrt(fan in), the sigma that makes as much noise as what comes in.

    A root mean square over all weights in tensors of two axes or more, of
    which the last is that of the units; infinite if there are none.
    """
    units = weights = 0
    for shape in blocks.shapes:
        if len(shape) > 1:
            units += shape[-1]  # size / fan in
            weights += math.prod(shape)
    return math.sqrt(units / weights) if weights else math.inf


def too_large(stddev: float, blocks: WeightLayout) -> bool:
    """Whether sigma_0 is more than 3 / sqrt(fan in)."""
    return stddev > MOST_NOISE * noise_scale(blocks)


def averaged_mean(
    average: tf.Tensor, mean: tf.Tensor, updates: tf.Tensor
) -> tf.Tensor:
    """m <- m + (mu - m) / max(20, t / 2). It starts where mu does.

    Args:
        average: m, [d].
        mean: mu after the update, [d].
        updates: t, their number up to now, a scalar.
    """
    horizon = tf.maximum(0.5 * tf.cast(updates, mean.dtype), _LEAST_HORIZON)
    return average + (mean - average) / horizon


def blind_growth(log_variance: tf.Tensor, direction: Direction) -> tf.Tensor:
    """log s^2 grows by .06 where all losses are equal, else as it is.

    Then both gradients are exactly zero: sigma is too small to see a step of
    the loss.

    Args:
        log_variance: log s^2, [groups].
        direction: the gradients.
    """
    blind = tf.reduce_all(tf.equal(direction.log_variance, 0))
    blind &= tf.reduce_all(tf.equal(direction.mean, 0))
    return tf.where(blind, log_variance + _BLIND_RATE, log_variance)


def lifted(
    base: tf.Tensor,
    distance: tf.Tensor,
    layout: WeightLayout,
    blocks: WeightLayout,
    population_size: int,
) -> tf.Tensor:
    """beta = log sigma^2 from log s^2, without bounds.

    Args:
        base: log s^2, [groups] of `layout`.
        distance: mu' - m, [d].
        layout: which weights share a variance.
        blocks: which weights belong to a block, each a union of groups.
        population_size: N, see `follows`.
    """
    squares = blocks.group_means(tf.square(distance))
    most = (_MOST_LIFTED * noise_scale(blocks)) ** 2
    # The log of 0 is -inf: no floor.
    floor = tf.math.log(tf.minimum(squares, tf.constant(most, squares.dtype)))
    shared = layout.groups is not None  # groups are the blocks
    block = base if shared else blocks.group_means(base)
    lift = tf.where(
        follows(blocks, population_size),
        tf.nn.relu(floor - block),
        tf.zeros_like(block),
    )
    return base + (lift if shared else blocks.expand(lift))
