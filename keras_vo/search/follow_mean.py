"""What keeps the sigma of a network's layers within reason.

The search gradient of a variance that many weights share is too weak to lead
it: what a member's radius |z|^2 says of its loss is little beside the noise of
a population of N, and the natural gradient divides that by sqrt(D) for the D
weights of a layer. So where D > max(N, 100), sigma has two sources. One is a
base s, that starts at sigma_0 and goes down the natural gradient; where all
losses are equal, more than that is tried: see `Growth`. The other is where the
mean has lately been: with the means over the weights of layer b,

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
what comes in. So neither the mean nor equal losses raise sigma to more than
1.5 / sqrt(fan in). The fan in is a mean over all kernels.

docs/decisions/0015-sigma-follows-the-mean.md has what else was tried,
docs/decisions/0029-growth-is-taken-back.md why growth goes back.

References:
    [1] Hansen, Ostermeier, "Completely Derandomized Self-Adaptation in
        Evolution Strategies", Evolutionary Computation 9, 2001.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import tensorflow as tf

from keras_vo.search.estimators import Direction
from keras_vo.search.gaussian import log_variance_of, stddev_of
from keras_vo.search.layout import WeightLayout
from keras_vo.search.rules import Descent, Proposal, State, Step

__all__ = [
    "FollowMean",
    "Growth",
    "MOST_NOISE",
    "averaged_mean",
    "follows",
    "is_blind",
    "lifted",
    "noise_scale",
    "too_large",
]

_FEW_WEIGHTS = 100
_LEAST_HORIZON = 20.0
_MOST_LIFTED, MOST_NOISE = 1.5, 3.0
_BLIND_RATE, _KEPT = 0.06, 0.8
# A plateau alone makes sigma 100 s at most, where no fan in says what is large.
_MOST_GROWTH = 2 * math.log(100.0)


class Growth(NamedTuple):
    """By how much sigma is more than its base s, where losses were equal.

    On a plateau, where the losses of all members are equal, a wider population
    may see over its edge: g = log sigma^2 / s^2 grows by .06 a step. Once
    losses differ, either the plateau has ended, and the growth has to be
    undone; or they differ because of it, and it must be kept. Going back tells
    the two apart:

        losses are equal                 g <- g + .06
        they differ                      g <- .8 g
        ... and are equal once more      s <- s exp(g / 2), g <- .06

    So s is again what it was before the plateau if there is a signal all the
    way to it, and else the least sigma that was found to have one. No sigma
    grows beyond `most`; without a fan in g is at most log 100^2.

    Attributes:
        log_base: log s^2 [groups].
        amount: g, a scalar.
        blind: 1 if the last step saw equal losses, else 0.
    """

    log_base: tf.Tensor
    amount: tf.Tensor
    blind: tf.Tensor

    def log_variance(self, most: float) -> tf.Tensor:
        """log s^2 + g, [groups], where that is at most log most^2."""
        grown = tf.minimum(self.log_base + self.amount, log_variance_of(most))
        return tf.maximum(self.log_base, grown)

    def after(
        self, blind: tf.Tensor, most: float, most_amount: float = math.inf
    ) -> Growth:
        """The growth after a step.

        Args:
            blind: whether the step saw equal losses.
            most: the largest sigma it grows to.
            most_amount: the largest g.
        """
        lost = tf.logical_and(blind, tf.equal(self.blind, 0))
        base = tf.where(lost, self.log_variance(most), self.log_base)
        room = tf.nn.relu(log_variance_of(most) - tf.reduce_min(base))
        room = tf.minimum(room, tf.cast(most_amount, room.dtype))
        grown = tf.where(lost, tf.zeros_like(room), self.amount) + _BLIND_RATE
        return Growth(
            base,
            tf.where(blind, tf.minimum(grown, room), _KEPT * self.amount),
            tf.cast(blind, base.dtype),
        )


@dataclasses.dataclass(frozen=True)
class FollowMean:
    """The rule: beta descends from a base, and sigma follows the mean.

    Its state is `base_log_variance`, log s^2 [groups]; `averaged_mean`, m [d];
    and the scalars of `Growth`, `blind_growth` and `blind`.

    Attributes:
        descent: of the base.
        blocks: which weights adapt as a whole, each a union of groups.
        population_size: N.
    """

    descent: Descent
    blocks: WeightLayout
    population_size: int

    def init(self, log_variance: tf.Tensor) -> dict[str, tf.Tensor]:
        zero = tf.zeros([], log_variance.dtype)
        return {
            "base_log_variance": log_variance,
            "averaged_mean": tf.zeros([self.blocks.size], zero.dtype),
            "blind_growth": zero,
            "blind": zero,
        }

    def base_stddev(self, state: State) -> tf.Tensor | None:
        return stddev_of(state["base_log_variance"])

    def propose(self, step: Step, proposal: Proposal, state: State) -> Proposal:
        grown = self._next_growth(step, state).log_variance(self._most_grown)
        lift = lifted(
            grown,
            step.gaussian.scaled(proposal.mean - self._average(step, state)),
            step.gaussian.layout,
            self.blocks,
            self.population_size,
        )
        if step.steady is not None:
            lift = tf.where(step.steady, grown, lift)
        return proposal._replace(log_variance=self.descent.bounds.clip(lift))

    def settle(
        self, step: Step, proposal: Proposal, state: State
    ) -> dict[str, tf.Tensor]:
        old, new = self._growth(state), self._next_growth(step, state)
        base, amount = new.log_base, new.amount
        if proposal.fraction is not None:
            base = old.log_base + proposal.fraction * (base - old.log_base)
            amount = old.amount + proposal.fraction * (amount - old.amount)
        average = averaged_mean(
            self._average(step, state), proposal.mean, step.updates + 1
        )
        return {
            "base_log_variance": base,
            "averaged_mean": average,
            "blind_growth": amount,
            "blind": new.blind,
        }

    def shifted(self, state: State, change: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"base_log_variance": state["base_log_variance"] + change}

    @property
    def _most_grown(self) -> float:
        most = _MOST_LIFTED * noise_scale(self.blocks)
        return min(most, self.descent.bounds.max_stddev)

    @staticmethod
    def _growth(state: State) -> Growth:
        return Growth(
            state["base_log_variance"], state["blind_growth"], state["blind"]
        )

    def _next_growth(self, step: Step, state: State) -> Growth:
        blind = is_blind(step.direction)
        shapeless = math.isinf(noise_scale(self.blocks))
        new = self._growth(state).after(
            blind, self._most_grown, _MOST_GROWTH if shapeless else math.inf
        )
        base = self.descent.descend(new.log_base, step.direction)
        return new._replace(log_base=base)

    def _average(self, step: Step, state: State) -> tf.Tensor:
        """m, which is mu in the first step."""
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


def is_blind(direction: Direction) -> tf.Tensor:
    """Whether all losses are equal: both gradients are exactly zero.

    Then sigma may be too small to see a step of the loss.
    """
    blind = tf.reduce_all(tf.equal(direction.log_variance, 0))
    return blind & tf.reduce_all(tf.equal(direction.mean, 0))


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
        distance: s (mu' - m), [d], see `Gaussian`.
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
