"""The last population, as a rule keeps it for `search.importance_mixing`.

Of its members the seeds and losses are kept; and of the last 16 steps (of as
many as there are members, if that is less) the search distributions, which make
the weights of members of their seeds.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import tensorflow as tf

from keras_vo.search.gaussian import Gaussian, around
from keras_vo.search.layout import WeightLayout
from keras_vo.search.rules import Proposal, State, Stateless, Step

__all__ = ["FormerMembers", "Ring"]

# Steps that a member is used in, at most.
_LIFE = 16


class Ring(NamedTuple):
    """The search distributions of the last L steps.

    Attributes:
        layout: of the weights.
        means: mu, [L, d].
        log_variances: beta, [L, groups].
        sensitivities: s, [L, d]; `None`: 1.
    """

    layout: WeightLayout
    means: tf.Tensor
    log_variances: tf.Tensor
    sensitivities: tf.Tensor | None

    @classmethod
    def of(cls, layout: WeightLayout, state: State) -> Ring:
        """As it is in the state of the rule."""
        return cls(
            layout,
            state["mixing_means"],
            state["mixing_log_variances"],
            state.get("mixing_sensitivities"),
        )

    def at(self, place: tf.Tensor) -> Gaussian:
        """One of them."""
        s = self.sensitivities
        return around(
            self.layout,
            self.means[place],
            self.log_variances[place],
            None if s is None else s[place],
        )

    def express(
        self, gaussian: Gaussian, noise: tf.Tensor, origin: tf.Tensor
    ) -> tf.Tensor:
        """Noise [n, d] of members that were drawn from these [n], as that of
        members of `gaussian`; with the origin -1 as it is.
        """
        place = tf.maximum(origin, 0)
        beta = self.layout.expand(tf.gather(self.log_variances, place))
        if self.sensitivities is not None:
            s = tf.gather(self.sensitivities, place)
            beta = beta - 2.0 * tf.math.log(s)
        means = tf.gather(self.means, place)
        expressed = gaussian.express(noise, means, beta)
        return tf.where(origin[:, None] < 0, noise, expressed)


@dataclasses.dataclass(frozen=True)
class FormerMembers(Stateless):
    """The rule: it keeps the population for the next step.

    Its state is `mixing_steps`, how many there were; of each place,
    `mixing_generation`, `mixing_index`, `mixing_origin` and `mixing_losses`
    [N]; and the ring, `mixing_means`, `mixing_log_variances` and, where weights
    have them, `mixing_sensitivities` [L, ...].

    Attributes:
        size: N.
        weights: d.
        scaled: whether weights have sensitivities.
    """

    size: int
    weights: int
    scaled: bool

    def init(self, log_variance: tf.Tensor) -> dict[str, tf.Tensor]:
        life = min(self.size, _LIFE)
        numbers = tf.zeros([self.size], tf.int64)
        means = tf.zeros([life, self.weights], log_variance.dtype)
        state = {
            "mixing_steps": tf.zeros([], tf.int64),
            "mixing_generation": numbers,
            "mixing_index": numbers,
            "mixing_origin": numbers,
            "mixing_losses": tf.fill(
                [self.size], tf.constant(math.nan, tf.float64)
            ),
            "mixing_means": means,
            "mixing_log_variances": tf.zeros(
                [life, *log_variance.shape], log_variance.dtype
            ),
        }
        if self.scaled:
            state["mixing_sensitivities"] = tf.ones_like(means)
        return state

    def propose(self, step: Step, proposal: Proposal, state: State) -> Proposal:
        return proposal

    def settle(
        self, step: Step, proposal: Proposal, state: State
    ) -> dict[str, tf.Tensor]:
        members, gaussian = step.members, step.gaussian
        if members is None or members.origin is None or step.compared is None:
            raise ValueError("Expected a mixed population")
        steps, losses = state["mixing_steps"], step.compared
        place = tf.math.floormod(steps, min(self.size, _LIFE))
        now: dict[str, Any] = {
            "mixing_means": gaussian.mean,
            "mixing_log_variances": gaussian.log_variance,
        }
        if self.scaled:
            now["mixing_sensitivities"] = gaussian.sensitivity
        return {
            "mixing_steps": steps + 1,
            "mixing_generation": members.generation,
            "mixing_index": members.index,
            "mixing_origin": tf.where(
                members.origin < 0, place, members.origin
            ),
            "mixing_losses": tf.cast(losses, tf.float64),
            **{
                name: tf.tensor_scatter_nd_update(
                    state[name], place[None, None], value[None]
                )
                for name, value in now.items()
            },
        }
