"""How sigma adapts when it has no learning rate of its own.

The search gradient of a variance that many weights share is a weak signal:
what a member's radius |z|^2 says of its loss is little beside the noise of a
population, and at a minimum U = E[f] falls with sigma whatever sigma does to
the search. So sigma takes its scale from what is known well, where the mean
has lately been, and only its excess over that from the gradient. With beta_b
the mean of beta = log sigma^2 over a block b of D weights (a layer; all
weights if sigma is isotropic):

    c_b    = dU/dbeta_b / (rms(u) sqrt(F_b))
    phi_b  = log mean_b (mu' - m)^2
    beta_b <- max(phi_b, beta_b - rate (c_b + .03 + .03 (beta_b - phi_b)))
    m      <- m + (mu' - m) / max(20, t / 2)

c_b is the correlation of the utilities with the radius: the step in whitened
coordinates, F^-1/2 dU/dbeta, in units of the utilities. F_b is D / 2 for noise
of full rank, for others see `spaces`; the noise of c_b is 1 / sqrt(N) whatever
D (less for noise that examples judge). What is added to it leans towards the
floor phi, the more so the further sigma is above it (an excess beyond 5 counts
as 5): without that the walk of a sigma that the losses do not restore has no
home. Where all losses are equal sigma grows instead.

The floor keeps where the mean has been within the search distribution: sigma
is at least the root mean square distance of the mean from its own moving
average m over the later part of the search's t updates. Steps that go one way
add up in it and steps that go to and fro cancel, as in the evolution paths of
[1]; where the mean comes to rest, sigma falls. With natural gradients, sigma
in turn has no say in the steps of the mean, see
`estimators.whitened_mean_gradient`: there is no loop that could run away.

Where each weight has its own sigma, weights depart from their block by plain
descent on the natural gradient,

    beta_i <- beta_i - 0.03 (nat_i - mean_b nat) / rms(u).

BUILD_NOTES.md, "Adapting the variance", has what else was tried.

References:
    [1] Hansen, Ostermeier, "Completely Derandomized Self-Adaptation in
        Evolution Strategies", Evolutionary Computation 9, 2001.
"""

from __future__ import annotations

import math

import tensorflow as tf

from keras_vo.layout import WeightLayout

__all__ = ["adapted_log_variance", "averaged_mean", "correlation"]

_RATE = 2.0
_FULL_RATE_POPULATION = 128
_PULL = 0.03
_MOST_EXCESS = 5.0
_DEVIATION_RATE = 0.03
_LEAST_HORIZON = 20.0


def correlation(
    scaled_gradient: tf.Tensor, fisher: tf.Tensor, utility: tf.Tensor
) -> tf.Tensor:
    """c_b = (dU/dbeta_b / rms(u)) / sqrt(F_b); 0 where F is 0.

    Where all members have the same loss there is none: NaN.

    Args:
        scaled_gradient: dU/dbeta over the root mean square of the utilities,
            [blocks].
        fisher: Fisher information of a block's common log variance, alike.
        utility: 0 where all utilities are 0, alike.
    """
    c = tf.math.divide_no_nan(scaled_gradient, tf.sqrt(fisher))
    return tf.where(utility > 0, c, tf.constant(math.nan, c.dtype))


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


def adapted_log_variance(
    log_variance: tf.Tensor,
    scaled_gradient: tf.Tensor,
    correlations: tf.Tensor,
    distance: tf.Tensor,
    population_size: int,
    layout: WeightLayout,
    blocks: WeightLayout,
) -> tf.Tensor:
    """beta after one step, without bounds.

    Args:
        log_variance: beta, [groups] of `layout`.
        scaled_gradient: dU/dbeta over the root mean square of the utilities,
            alike; read only where each weight has its own.
        correlations: c, [blocks]. Where it is NaN all losses are equal: sigma
            is too small to see a step of them, and grows by rate * .03.
        distance: mu' - m, [d].
        population_size: N. Below 128 members c has more noise, and `rate` is
            smaller in proportion to N.
        layout: which weights share a variance.
        blocks: which weights belong to a block, each a union of groups.
    """
    rate = _RATE * min(1.0, population_size / _FULL_RATE_POPULATION)
    # The log of 0 is -inf: no floor.
    floor = tf.math.log(blocks.group_means(tf.square(distance)))

    def step(block: tf.Tensor) -> tf.Tensor:
        excess = tf.clip_by_value(block - floor, 0.0, _MOST_EXCESS)
        change = correlations + _PULL * (1.0 + excess)
        blind = tf.constant(-_PULL, block.dtype)
        change = tf.where(tf.math.is_nan(correlations), blind, change)
        return tf.maximum(block - rate * change, floor)

    if layout.groups is not None:  # groups are the blocks
        return step(log_variance)
    block = blocks.group_means(log_variance)
    natural = 2.0 * scaled_gradient  # F = 1/2 for each weight
    deviation = natural - blocks.expand(blocks.group_means(natural))
    change = blocks.expand(step(block) - block)
    return log_variance - _DEVIATION_RATE * deviation + change
