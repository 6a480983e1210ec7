"""How wide noise on activations is at first, and how long its steps are.

Noise of sigma on a kernel with a fan in of d adds noise of sigma sqrt(d) to a
unit's input, in units of what comes in, and L layers add up. So that the
outputs of a deep network are not all noise, layer i begins with

    narrow    sigma_i = 3/4 min(0.2, 1 / sqrt(d_i)) / sqrt(L)

which costs nothing: the variance of the gradient hardly depends on sigma, its
bias falls with it. But a loss that takes few values (the 0-1 error, F1) has
plateaus, and noise has to reach beyond them, whatever it does to other
examples:

    wide      sigma_i = min(0.2, 3 / sqrt(d_i))

The first population tells the two apart: where losses are discrete, most of an
example's are equal to that of another member (`ties`). Then all that comes
later is wide, and sigma follows the mean (`keras_vo.search.follow_mean`), as
that of weights does; else it goes down its gradient only.

Steps of an inner optimizer that is given by name are sigma_i / 10, or
sigma_i / 20 where it is wide.
docs/decisions/0038-scale-of-local-noise.md has what was measured.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import tensorflow as tf

from keras_vo.search.credit import EXAMPLE, POSITION, Outcomes
from keras_vo.search.gaussian import log_variance_of
from keras_vo.search.layout import WeightLayout
from keras_vo.search.rules import (
    Bounds,
    Proposal,
    Rule,
    State,
    Stateless,
    Step,
)
from keras_vo.search.state import SearchState

__all__ = [
    "ActivationScale",
    "ByExample",
    "RESUMED",
    "Site",
    "first_ties",
    "is_discrete",
    "steadied",
    "ties",
]

_MOST = 0.2
_NARROW, _WIDE = 0.75, 3.0  # in units of 1 / sqrt(fan in)
_STEP, _WIDE_STEP = 0.1, 0.05
_DISCRETE = "discrete"
_LEAST_TIES = 0.5
# Before ties are known: nothing has begun; it has; it had without them.
_NEW, _BEGUN, RESUMED = -2.0, -1.0, -3.0


class Site(NamedTuple):
    """A call with noise on its outputs.

    Attributes:
        variables: indices of its weights.
        fan_in: the number of inputs of a unit.
        mixes: whether its kernel is a matrix; else it is a factor for each
            unit, which adds no layer.
    """

    variables: Sequence[int]
    fan_in: int
    mixes: bool


@dataclasses.dataclass(frozen=True)
class ActivationScale:
    """The scale of all weights that are perturbed by noise on activations.

    Attributes:
        narrow: sigma by variable.
        wide: that where losses are discrete.
        starts: whether sigma begins there; else that is the user's.
        first: sigma of all weights before that.
        bounds: of sigma.
        rate: the step of the inner optimizer, where it is to be as long as
            sigma says; `None`: it is right as it is.
        scheduled: whether sigma is a function of the number of updates.
    """

    narrow: Mapping[int, float]
    wide: Mapping[int, float]
    starts: bool
    first: float
    bounds: Bounds
    rate: float | None
    scheduled: bool

    @classmethod
    def of(
        cls,
        sites: Sequence[Site],
        *,
        chosen: bool,
        first: float,
        bounds: Bounds,
        rate: float | None,
        scheduled: bool = False,
    ) -> ActivationScale:
        """That of a network.

        Args:
            sites: calls with noise on their outputs.
            chosen: whether sigma is chosen here, or the user's.
            first: see above, and so are the others.
        """
        layers = math.sqrt(max(1, sum(site.mixes for site in sites)))
        narrow: dict[int, float] = {}
        wide: dict[int, float] = {}
        for site in sites:
            unit = 1 / math.sqrt(max(1, site.fan_in))
            sigmas = (
                _NARROW * min(_MOST, unit) / layers,
                min(_MOST, _WIDE * unit),
            )
            for i in site.variables:
                narrow[i], wide[i] = (
                    bounds.within(sigma) if chosen else first
                    for sigma in sigmas
                )
        return cls(narrow, wide, chosen, first, bounds, rate, scheduled)

    def changes(self, layout: WeightLayout) -> tuple[tf.Tensor, tf.Tensor]:
        """What is added to beta [groups] at first, and where losses turn out
        to be discrete.
        """
        first = log_variance_of(self.first)
        to_narrow = {
            i: log_variance_of(s) - first for i, s in self.narrow.items()
        }
        to_wide = {
            i: log_variance_of(s) - log_variance_of(self.narrow[i])
            for i, s in self.wide.items()
        }
        return _by_group(to_narrow, layout), _by_group(to_wide, layout)

    def parts(
        self, layout: WeightLayout, discrete: tf.Tensor
    ) -> list[tf.Tensor]:
        """The part of the inner optimizer's step of each variable, scalars.

        Args:
            layout: of the variables.
            discrete: whether losses are.
        """
        rate = self.rate or 1.0
        return [
            tf.where(
                discrete,
                tf.constant(_WIDE_STEP * self.wide[i] / rate, layout.dtype),
                tf.constant(_STEP * self.narrow[i] / rate, layout.dtype),
            )
            if i in self.narrow
            else tf.ones([], layout.dtype)
            for i in range(len(layout.shapes))
        ]

    def started(self, state: SearchState, rules: Sequence[Rule]) -> SearchState:
        """The state, with this scale where the search begins.

        The first population is narrow, and the one after it wide if it has
        found that losses are discrete. (One that has found nothing, as no loss
        was finite, is followed by another first one.)
        """
        if not self.starts:
            return state
        gaussian, found = state.gaussian, state.rules[_DISCRETE]
        to_narrow, to_wide = self.changes(gaussian.layout)
        new = tf.equal(found, _NEW)
        again = is_discrete(state.rules) & (found <= 1)
        change = tf.where(again, to_wide, tf.zeros_like(to_wide))
        change = tf.where(new, to_narrow, change)
        changed = dict(state.rules)
        for rule in rules:
            changed |= rule.shifted(state.rules, change)
        changed[_DISCRETE] = tf.where(
            new,
            tf.constant(_BEGUN, found.dtype),
            found + tf.cast(again, found.dtype),
        )
        beta = self.bounds.clip(gaussian.log_variance + change)
        return state._replace(
            gaussian=dataclasses.replace(
                gaussian,
                log_variance=tf.where(new | again, beta, gaussian.log_variance),
            ),
            rules=changed,
        )

    def groups(self, layout: WeightLayout) -> tf.Tensor:
        """Which groups have such weights only, [groups]."""
        own = _by_group(dict.fromkeys(self.narrow, 1.0), layout)
        return tf.equal(own, 1.0)


def _by_group(values: Mapping[int, float], layout: WeightLayout) -> tf.Tensor:
    """Means over the weights of each group, of values by variable, else 0."""
    of_all = [values.get(i, 0.0) for i in range(len(layout.shapes))]
    if layout.groups is None:
        return tf.concat(
            [
                tf.fill([size], tf.constant(value, layout.dtype))
                for size, value in zip(layout.sizes, of_all, strict=True)
            ],
            axis=0,
        )
    totals = [0.0] * layout.num_groups
    for group, size, value in zip(
        layout.groups, layout.sizes, of_all, strict=True
    ):
        totals[group] += size * value
    means = [
        total / max(1, size)
        for total, size in zip(totals, layout.group_sizes, strict=True)
    ]
    return tf.constant(means, layout.dtype)


def is_discrete(state: State) -> tf.Tensor:
    """Whether the losses are, as far as is known, a scalar."""
    return state[_DISCRETE] > _LEAST_TIES


def steadied(step: Step, state: State) -> Step:
    """The step, with the groups whose sigma does not follow the mean."""
    if step.activations is None:
        return step
    own = step.activations.groups(step.gaussian.layout)
    return step._replace(steady=own & ~is_discrete(state))


def first_ties(outcomes: Outcomes, state: State, dtype: tf.DType) -> tf.Tensor:
    """`ties`, unless they are known: then none."""
    level = POSITION if POSITION in outcomes.losses else EXAMPLE
    return tf.cond(
        state[_DISCRETE] < 0,
        lambda: tf.cast(
            ties(outcomes.losses[level], outcomes.weights.get(level, 1.0)),
            dtype,
        ),
        lambda: tf.zeros([2], dtype),
    )


def ties(losses: tf.Tensor, weights: tf.Tensor | float) -> tf.Tensor:
    """How many losses of examples are those of other members too.

    What tells nothing does not count: losses that are not finite, the least of
    all (hinge losses are 0 beyond the margin), and examples whose losses are
    all equal.

    Args:
        losses: [N, batch, ...].
        weights: of the examples, [batch, ...] or a scalar; those of weight 0
            do not count.

    Returns:
        Their number and that of all, [2], where one of each value is left out.
    """
    ordered = tf.sort(losses, axis=0)
    known = tf.math.is_finite(ordered)
    least = tf.reduce_min(tf.where(known, ordered, ordered.dtype.max))
    lower, upper = ordered[:-1], ordered[1:]
    counts = (
        (tf.cast(weights, losses.dtype) > 0)
        & (lower > least)
        & known[1:]
        & (ordered[0] < ordered[-1])
    )
    return tf.stack(
        [
            tf.math.count_nonzero(x, dtype=losses.dtype)
            for x in (counts & tf.equal(lower, upper), counts)
        ]
    )


class ByExample(Stateless):
    """The rule: where losses of examples lead, steps are as long as sigma says.

    Its state is `discrete`, the part of ties in the first population; plus 1
    once sigma is wide, and less than 0 before it is known.
    """

    def init(self, log_variance: tf.Tensor) -> dict[str, tf.Tensor]:
        return {_DISCRETE: tf.constant(_NEW, log_variance.dtype)}

    def propose(self, step: Step, proposal: Proposal, state: State) -> Proposal:
        scale, layout = step.activations, step.gaussian.layout
        if scale is None or scale.rate is None:
            return proposal
        old = step.gaussian.mean
        parts = tf.concat(
            [
                tf.fill([size], part)
                for size, part in zip(
                    layout.sizes,
                    scale.parts(layout, is_discrete(state)),
                    strict=True,
                )
            ],
            axis=0,
        )
        if scale.scheduled:
            now = layout.expand(step.gaussian.stddev)
            parts = tf.where(parts == 1, parts, parts * now / scale.first)
        mean = old + parts * (proposal.mean - old)
        return proposal._replace(mean=tf.where(parts == 1, proposal.mean, mean))

    def settle(
        self, step: Step, proposal: Proposal, state: State
    ) -> dict[str, tf.Tensor]:
        found = state[_DISCRETE]
        if step.ties is None:
            return {_DISCRETE: found}
        equal, count = tf.unstack(tf.cast(step.ties, found.dtype))
        part = tf.math.divide_no_nan(equal, count)
        # Its sigma has had time to adapt: it is left as it is.
        resumed = tf.equal(found, RESUMED) & (part > _LEAST_TIES)
        part += tf.cast(resumed, found.dtype)
        return {_DISCRETE: tf.where((found < 0) & (count > 0), part, found)}
