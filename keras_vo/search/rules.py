"""Update rules: from the gradient to the next search distribution.

A rule has named state, proposes a change of what the rules before it have
proposed, and settles its state once the step is known. `Search` applies a list
of them after the inner optimizer has moved the mean:

    Descent      sigma goes down its own search gradient
    FollowMean   ... and follows the mean: `keras_vo.search.follow_mean`
    Scheduled    sigma is a function of the number of updates
    ByExample    steps by noise on activations: `search.activation_scale`
    MaxKL        the step is shrunk to a bound on its KL divergence

References:
    [1] Havtorn, "Variational Optimization of Neural Networks", 2018 (slides).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import tensorflow as tf

from keras_vo.search.estimators import Direction
from keras_vo.search.gaussian import Gaussian, log_variance_of
from keras_vo.search.members import Members

if TYPE_CHECKING:
    from keras_vo.search.activation_scale import ActivationScale

__all__ = [
    "Best",
    "Bounds",
    "Descent",
    "MaxKL",
    "Proposal",
    "Rule",
    "Scheduled",
    "State",
    "Stateless",
    "Step",
    "Weighing",
    "largest_fraction",
]

State = Mapping[str, tf.Tensor]
# To a loss, and the weights of the member that has it: see `Step`.
Best = Callable[[], tuple[tf.Tensor, list[tf.Tensor]]]
# From other distributions to losses, and weights of the members: see `Step`.
Weighing = Callable[
    [Sequence[Gaussian]], tuple[tf.Tensor, tf.Tensor, tf.Tensor]
]


class Step(NamedTuple):
    """What is known when rules are asked.

    Attributes:
        gaussian: the search distribution before the step.
        direction: the gradients that the step goes down.
        updates: number of updates before this one, a scalar.
        activations: the scale of noise on activations; `None`: there is none.
        ties: see `activation_scale.first_ties`, summed over replicas; `None`:
            there are no losses of examples.
        steady: groups whose sigma does not follow the mean, [groups]; `None`:
            none.
        best: finds the least loss of a member with noise on its weights, a
            scalar float64 (inf: none is finite), and these weights; `None`:
            there are no such members.
        weighing: from k distributions to the losses [N] of these members, which
            of them are known [N], and the log of their density over that of the
            search distribution [k, N]; `None`: no rule asks.
        learning_rate: of the mean, a scalar.
        members: those with noise on their weights; `None`: there are none.
        compared: their losses [N], see `credit.Pooled`.
    """

    gaussian: Gaussian
    direction: Direction
    updates: tf.Tensor
    activations: ActivationScale | None = None
    ties: tf.Tensor | None = None
    steady: tf.Tensor | None = None
    best: Best | None = None
    weighing: Weighing | None = None
    learning_rate: tf.Tensor | None = None
    members: Members | None = None
    compared: tf.Tensor | None = None


class Proposal(NamedTuple):
    """The next search distribution, as far as it is known.

    Attributes:
        mean: mu', [d].
        log_variance: beta', [groups].
        fraction: how much of the move is taken, a scalar; `None`: all of it.
    """

    mean: tf.Tensor
    log_variance: tf.Tensor
    fraction: tf.Tensor | None = None


class Rule(Protocol):
    """One of the rules that a step goes through."""

    def init(self, log_variance: tf.Tensor) -> dict[str, tf.Tensor]:
        """Its state by name, before the first step; names differ by rule.

        Weights may be loaded until then: a mean in it has to be taken over in
        the first step.

        Args:
            log_variance: beta [groups].
        """

    def base_stddev(self, state: State) -> tf.Tensor | None:
        """The sigma [groups] that the steps of the mean take their size from;
        `None`: no other than sigma.
        """

    def propose(self, step: Step, proposal: Proposal, state: State) -> Proposal:
        """The proposal, changed."""

    def settle(
        self, step: Step, proposal: Proposal, state: State
    ) -> dict[str, tf.Tensor]:
        """The next state, where `proposal` is what is done."""

    def shifted(self, state: State, change: tf.Tensor) -> dict[str, tf.Tensor]:
        """What becomes of its state where `change` is added to beta."""


class Stateless:
    """What a rule is that has no state."""

    def init(self, log_variance: tf.Tensor) -> dict[str, tf.Tensor]:
        return {}

    def base_stddev(self, state: State) -> tf.Tensor | None:
        return None

    def settle(
        self, step: Step, proposal: Proposal, state: State
    ) -> dict[str, tf.Tensor]:
        return {}

    def shifted(self, state: State, change: tf.Tensor) -> dict[str, tf.Tensor]:
        return {}


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Bounds of sigma."""

    min_stddev: float
    max_stddev: float

    def within(self, stddev: float) -> float:
        """sigma within the bounds."""
        return min(max(stddev, self.min_stddev), self.max_stddev)

    def clip(self, log_variance: tf.Tensor) -> tf.Tensor:
        """beta = log sigma^2 within the bounds."""
        return tf.clip_by_value(
            log_variance,
            log_variance_of(self.min_stddev),
            log_variance_of(self.max_stddev),
        )


@dataclasses.dataclass(frozen=True)
class Descent(Stateless):
    """beta <- clip(beta - learning_rate dU/dbeta).

    Attributes:
        learning_rate: of beta.
        bounds: of sigma.
    """

    learning_rate: float
    bounds: Bounds

    def descend(
        self, log_variance: tf.Tensor, direction: Direction
    ) -> tf.Tensor:
        """One step from `log_variance`."""
        return self.bounds.clip(
            log_variance - self.learning_rate * direction.log_variance
        )

    def propose(self, step: Step, proposal: Proposal, state: State) -> Proposal:
        beta = self.descend(step.gaussian.log_variance, step.direction)
        return proposal._replace(log_variance=beta)


@dataclasses.dataclass(frozen=True)
class Scheduled(Stateless):
    """sigma <- schedule(t), where t counts the updates made so far.

    Attributes:
        schedule: from t, a scalar, to sigma.
        bounds: of sigma.
    """

    schedule: Callable[[tf.Tensor], tf.Tensor]
    bounds: Bounds

    def propose(self, step: Step, proposal: Proposal, state: State) -> Proposal:
        beta = step.gaussian.log_variance
        stddev = tf.cast(self.schedule(step.updates + 1), beta.dtype)
        scheduled = self.bounds.clip(2.0 * tf.math.log(stddev))
        return proposal._replace(
            log_variance=tf.broadcast_to(scheduled, beta.shape)
        )


@dataclasses.dataclass(frozen=True)
class MaxKL(Stateless):
    """Shrinks the move along its own direction until its KL is in bounds.

    Eq. 18 of [1] fixes the KL divergence of a step; this bounds that of the
    step really taken, the inner optimizer's included. Where weights are
    constrained, the shrunk mean is projected before its divergence is
    measured: on a convex set it was in the set already. Only where mu was
    outside of the set (as initial weights may be), and even its projection
    alone is beyond the bound, the step is that projection.

    Attributes:
        max_kl: the bound, in nats.
        project: from a mean [d] to one that satisfies all constraints, which
            the proposal does; `None`: there are none.
    """

    max_kl: float
    project: Callable[[tf.Tensor], tf.Tensor] | None = None

    def propose(self, step: Step, proposal: Proposal, state: State) -> Proposal:
        old = step.gaussian
        change = proposal.mean - old.mean
        log_change = proposal.log_variance - old.log_variance

        def moved(part: tf.Tensor) -> tf.Tensor:
            mean = old.mean + part * change
            return mean if self.project is None else self.project(mean)

        def divergence(part: tf.Tensor) -> tf.Tensor:
            way = part * change
            if self.project is not None:  # the proposal is projected already
                way = tf.where(part < 1, moved(part) - old.mean, change)
            return old.kl(way, old.log_variance + part * log_change)

        fraction = largest_fraction(divergence, self.max_kl, old.layout.dtype)
        shrunk = moved(fraction)
        return Proposal(
            tf.where(fraction < 1, shrunk, proposal.mean),
            old.log_variance + fraction * log_change,
            fraction,
        )


def largest_fraction(
    divergence: Callable[[tf.Tensor], tf.Tensor],
    max_kl: float,
    dtype: tf.DType,
) -> tf.Tensor:
    """The largest fraction of a move whose divergence is within `max_kl`.

    Args:
        divergence: from the fraction in [0, 1] of the move to its KL
            divergence, continuous and 0 at 0.
        max_kl: the bound, in nats.
        dtype: dtype of the fraction.

    Returns:
        A scalar found by bisection: 1 if the whole move is within the bound,
        else a fraction whose divergence is at most `max_kl`.
    """
    one = tf.ones([], dtype)

    def halve(low: tf.Tensor, high: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        middle = 0.5 * (low + high)
        inside = divergence(middle) <= max_kl
        return tf.where(inside, middle, low), tf.where(inside, high, middle)

    def bisect() -> Any:
        return tf.while_loop(
            lambda low, high: high - low > 1e-3 * high,
            halve,
            (tf.zeros([], dtype), one),
            maximum_iterations=60,
        )[0]

    return tf.cond(divergence(one) <= max_kl, lambda: one, bisect)
