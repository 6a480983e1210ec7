"""The best member there ever was, as a rule that changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable

import tensorflow as tf

from keras_vo.search.chunks import Noise, NoiseSource
from keras_vo.search.layout import WeightLayout
from keras_vo.search.members import Members
from keras_vo.search.rules import Proposal, State, Stateless, Step

__all__ = ["KeepBest", "best_member"]


def best_member(
    members: Members,
    losses: tf.Tensor,
    source: Callable[[Members], NoiseSource],
    weights: Callable[[Noise, tf.Tensor], list[tf.Tensor]],
) -> tuple[tf.Tensor, list[tf.Tensor]]:
    """The least loss, and the weights of its member, drawn once more.

    Args:
        members: all of them.
        losses: [N]; those that are not finite do not count.
        source: of the noise of some members.
        weights: from the noise of a direction and a sign to weights.

    Returns:
        A scalar float64, inf if no loss is finite, and a list of tensors.
    """
    infinite = tf.constant(math.inf, losses.dtype)
    ranked = tf.where(tf.math.is_finite(losses), losses, infinite)
    best = tf.argmin(ranked, output_type=tf.int32)
    one = members.direction(best % members.directions)
    noise = source(one).chunk(tf.constant(0)).weights[0]
    signs = tf.constant(members.signs, noise.dtype)
    sign = tf.gather(signs, best // members.directions)
    return tf.cast(ranked[best], tf.float64), weights(Noise(noise), sign)


class KeepBest(Stateless):
    """Keeps the weights of the member with the least loss, and that loss.

    Its state is `best_loss`, a scalar, inf at first; and `best_weights` [d],
    as the member's variables had them (rounded, and within constraints).

    Args:
        layout: of the weights.
    """

    def __init__(self, layout: WeightLayout) -> None:
        self._layout = layout

    def init(self, log_variance: tf.Tensor) -> dict[str, tf.Tensor]:
        return {
            "best_loss": tf.constant(math.inf, tf.float64),
            "best_weights": tf.zeros([self._layout.size], log_variance.dtype),
        }

    def propose(self, step: Step, proposal: Proposal, state: State) -> Proposal:
        return proposal

    def settle(
        self, step: Step, proposal: Proposal, state: State
    ) -> dict[str, tf.Tensor]:
        if step.best is None:
            raise ValueError(
                "`keep_best` is for members that have weights of their own. "
                "Received: a search all of whose noise is on activations "
                '(perturbation="local_reparam", "auto", or such layers)'
            )
        loss, weights = step.best()
        better = loss < state["best_loss"]
        return {
            "best_loss": tf.where(better, loss, state["best_loss"]),
            "best_weights": tf.where(
                better, self._layout.flatten(weights), state["best_weights"]
            ),
        }
