"""Adaptation sampling: learning rates that follow what the members say [1].

Would a larger learning rate have been better? After a step from theta to
theta', the population that is drawn from theta' answers: it is weighted with

    w_n = p(x_n | theta'') / p(x_n | theta'),

as if it were from theta'', where the step had been 3 times as large (1.1 times
says next to nothing: docs/decisions/0044-adaptation-sampling.md). If the losses
with these weights are better than without, by a weighted Mann-Whitney test, the
learning rate rises; else it falls back to where it began [1]:

    p < 1/2 - 1 / (3 (d + 1)):   eta <- min(1.1 eta, eta_max)
    else:                        eta <- .9 eta + .1 eta_0

For the rate of the mean and that of the log variance by themselves: theta'' has
the larger step of one and the step as it was of the other. (The inner
optimizer's step is taken to be proportional to its learning rate, as it is but
for what it has accumulated.)

References:
    [1] Wierstra et al., "Natural Evolution Strategies", JMLR 15, 2014.
"""

from __future__ import annotations

import dataclasses
import math

import tensorflow as tf

from keras_vo.search.rules import Proposal, State, Stateless, Step

__all__ = [
    "AdaptationSampling",
    "MEAN_RATE",
    "mann_whitney",
    "threshold",
    "with_rate",
]

MEAN_RATE, _VARIANCE_RATE = "mean_rate", "variance_rate"
# The larger step, of the one that was taken.
_LARGER = 3.0
_UP, _BACK = 1.1, 0.1
# The largest rate of the mean, in units of the one it returns to, and of the
# log variance.
_MOST, _MOST_OF_VARIANCE = 100.0, 1.0


def threshold(size: int) -> float:
    """Of p, for so many weights."""
    return 0.5 - 1 / (3 * (size + 1))


def mann_whitney(
    losses: tf.Tensor, weights: tf.Tensor, known: tf.Tensor
) -> tf.Tensor:
    """How likely the losses with weights are that much better by chance.

    The one-sided p-value, by its normal approximation with a correction for
    ties, of

        U = sum_ij k_i w_j ([f_j < f_i] + [f_j = f_i] / 2)

    for a sample of weights k and one of weights w, which counts as
    (sum w)^2 / sum w^2 members. With weights 0 and 1 it is that of SciPy.

    Args:
        losses: f [N].
        weights: w [N], not negative.
        known: k [N], whether there is a loss.

    Returns:
        p, a scalar float64; 1/2 where all losses are equal.
    """
    dtype = tf.float64  # small differences of large sums
    highest = losses.dtype.max
    losses = tf.where(known, tf.minimum(losses, highest), highest)
    order = tf.argsort(losses)
    f = tf.gather(losses, order)
    k = tf.gather(tf.cast(known, dtype), order)
    w = k * tf.gather(tf.cast(weights, dtype), order)
    count = tf.reduce_sum(k)
    share = tf.math.divide_no_nan(w, tf.reduce_sum(w))
    # As many as all that are known, if all weigh the same.
    size = tf.math.divide_no_nan(
        tf.ones([], dtype), tf.reduce_sum(tf.square(share))
    )
    group = tf.cumsum(
        tf.concat([[0], tf.cast(f[1:] != f[:-1], tf.int32)], axis=0)
    )

    def by_group(values: tf.Tensor) -> tf.Tensor:
        return tf.math.unsorted_segment_sum(values, group, tf.size(f))

    of_known, of_weighted = by_group(k), by_group(share)
    # Of the known ones, those that are more than each.
    more = count - tf.cumsum(of_known) + 0.5 * of_known
    better = tf.math.divide_no_nan(tf.reduce_sum(of_weighted * more), count)
    ties = of_known + size * of_weighted
    total = count + size
    correction = tf.math.divide_no_nan(
        tf.reduce_sum(ties**3 - ties), total * (total - 1)
    )
    variance = tf.math.divide_no_nan(total + 1 - correction, 12 * count * size)
    differ = tf.reduce_max(of_known) < count
    z = tf.math.divide_no_nan(better - 0.5, tf.sqrt(tf.nn.relu(variance)))
    z = tf.where(differ, z, tf.zeros_like(z))
    return 0.5 * tf.math.erfc(z / math.sqrt(2.0))


@dataclasses.dataclass(frozen=True)
class AdaptationSampling(Stateless):
    """The rule: rates of the mean and of the log variance adapt.

    Its state is `adapting`, whether there was a step; `mean_rate`, that of the
    inner optimizer, and `initial_mean_rate`, to which it returns;
    `variance_rate`, a factor of the rate of the log variance; and the larger
    steps, `larger_mean` [d] and `larger_log_variance` [groups]. A learning rate
    that is set meanwhile is what it returns to if it is less than that, or more
    than it was: callbacks that lower an adapted rate by a factor leave that.

    Attributes:
        size: d.
        variance_rate: the rate of the log variance; `None`: it is not learned.
    """

    size: int
    variance_rate: float | None

    def init(self, log_variance: tf.Tensor) -> dict[str, tf.Tensor]:
        zero = tf.zeros([], log_variance.dtype)
        return {
            "adapting": zero,
            MEAN_RATE: zero,
            "initial_mean_rate": zero,
            _VARIANCE_RATE: zero + 1,
            "larger_mean": tf.zeros([self.size], zero.dtype),
            "larger_log_variance": log_variance,
        }

    def propose(self, step: Step, proposal: Proposal, state: State) -> Proposal:
        return proposal

    def settle(
        self, step: Step, proposal: Proposal, state: State
    ) -> dict[str, tf.Tensor]:
        old = step.gaussian
        rate, first, factor = self._rates(step, state)
        # A step that was shrunk would not have been another.
        larger = tf.constant(_LARGER, rate.dtype)
        if proposal.fraction is not None:
            larger = tf.where(proposal.fraction < 1, 1.0, larger)
        return {
            "adapting": tf.ones_like(rate),
            MEAN_RATE: rate,
            "initial_mean_rate": first,
            _VARIANCE_RATE: factor,
            "larger_mean": old.mean + larger * (proposal.mean - old.mean),
            "larger_log_variance": old.log_variance
            + larger * (proposal.log_variance - old.log_variance),
        }

    def shifted(self, state: State, change: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"larger_log_variance": state["larger_log_variance"] + change}

    def _rates(
        self, step: Step, state: State
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """The next rate of the mean, the one it returns to, and the next
        factor of that of the log variance.
        """
        factor = state[_VARIANCE_RATE]
        if step.learning_rate is None:
            raise ValueError("Expected a learning rate of the mean")
        now = tf.cast(step.learning_rate, factor.dtype)
        begun, first = state["adapting"] > 0, state["initial_mean_rate"]
        first = tf.where(now < state[MEAN_RATE], tf.minimum(now, first), first)
        raised = (now > state[MEAN_RATE]) | ~begun
        first = tf.where(raised, now, first)
        mean_better, variance_better = self._better(step, state)
        rate = _next(now, first, mean_better & begun, _MOST * first)
        # As the inner optimizer's variable has it.
        rate = tf.cast(tf.cast(rate, step.learning_rate.dtype), rate.dtype)
        if self.variance_rate is not None:
            most = max(1.0, _MOST_OF_VARIANCE / self.variance_rate)
            factor = _next(
                factor, tf.ones_like(factor), variance_better & begun, most
            )
        return rate, first, factor

    def _better(self, step: Step, state: State) -> tuple[tf.Tensor, tf.Tensor]:
        """Whether larger steps would have been better."""
        old = step.gaussian
        means = old.layout.unflatten(state["larger_mean"])
        others = [
            dataclasses.replace(old, means=means),
            dataclasses.replace(old, log_variance=state["larger_log_variance"]),
        ]
        if step.weighing is None:
            raise ValueError("Expected members with noise on their weights")
        losses, known, ratios = step.weighing(others)
        found = []
        for ratio in tf.unstack(ratios, num=len(others)):
            ratio = tf.where(known, ratio, ratio.dtype.min)
            weights = tf.exp(ratio - tf.reduce_max(ratio))
            p = mann_whitney(losses, weights, known)
            found.append(p < threshold(self.size))
        return found[0], found[1]


def _next(
    rate: tf.Tensor, first: tf.Tensor, better: tf.Tensor, most: tf.Tensor
) -> tf.Tensor:
    return tf.where(
        better,
        tf.minimum(_UP * rate, most),
        (1 - _BACK) * rate + _BACK * first,
    )


def with_rate(step: Step, state: State) -> Step:
    """The step, whose gradient of beta is multiplied with its factor."""
    if _VARIANCE_RATE not in state:
        return step
    direction = step.direction
    scaled = state[_VARIANCE_RATE] * direction.log_variance
    return step._replace(direction=direction._replace(log_variance=scaled))
