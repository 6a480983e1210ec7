"""Importance mixing: members of the last population that are used once more.

A population that was drawn from p is one of the next search distribution p'
after two rules [1]. With a, the least share that is drawn anew,

    a former member x is kept with         min(1, (1 - a) p'(x) / p(x)),
    x, drawn from p', takes its place with max(a, 1 - p(x) / p'(x)), else

so that each place has p', whatever p and p' are: what is kept has the density
min(p, (1 - a) p'), and the rest what is missing of it. A member that is kept
keeps its loss. Its noise is what it is under p': see `Gaussian.express`.

For a move of the mean by d standard deviations and a = 0 the share
2 Phi(-d / 2) is kept, whatever the number of weights (`kept_share`).

Members know the generation and index that their noise is drawn with, and
`former_members` has the search distributions of the last 16 steps (as many as
there are members, if that is less): so many times the size of the weights, of a
variance by weight twice as much, and with sensitivities once more. So that none
is needed any longer than that, each place gets a new member once in as many
steps, in turn, which is without regard to the member that was there.

Sensitivities that are measured anew exchange the distribution: few members stay
in that step, once in `sensitivity_period`.

A member without a result is replaced. (If that depends on its weights, those
that are kept are not distributed as they should be.)

Where it pays: with expensive losses of few weights, up to some tens. p' depends
on the members of p, of which its step is made. Of d weights and N members,
log p'(x) / p(x) of these is some sqrt(d / N) times what it is of others: with
many weights the best ones stay whatever the step is, `effective_size` is a few,
and they repeat what they have said (no better than antithetic pairs from 100
weights on). And where the loss is that of a batch, it is that of a former one:
worse than without on MNIST. See benchmarks/results/importance_mixing.md and
docs/decisions/0045-importance-mixing.md.

References:
    [1] Sun, Wierstra, Schaul, Schmidhuber, "Efficient Natural Evolution
        Strategies", GECCO 2009.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from keras_vo.search.drawing import Drawing
from keras_vo.search.former_members import Ring
from keras_vo.search.gaussian import Gaussian, around, kl_divergence
from keras_vo.search.layout import WeightLayout
from keras_vo.search.members import Members
from keras_vo.search.rules import State

__all__ = ["Mixed", "Mixing", "kept_share", "mix"]

# Candidates for each place, at most; then one is taken as it is.
_TRIES = 64


class Mixing(NamedTuple):
    """What came of the members of the last population, as scalars.

    Attributes:
        reused: how many are members once more, with the losses they had.
        effective_size: (sum w)^2 / sum w^2 with w = p'(x) / p(x), of all that
            had a loss. NaN in the first step.
        acceptance: the share that was kept of those that were not to be
            replaced in any case. NaN in the first step.
        predicted_acceptance: `kept_share`, alike.
    """

    reused: tf.Tensor
    effective_size: tf.Tensor
    acceptance: tf.Tensor
    predicted_acceptance: tf.Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Mixed:
    """A mixed population.

    Attributes:
        members: N of them, one in each place.
        losses: those that are known [N] float64; NaN where the member is new.
        express: see `NoiseSource`.
        mixing: what came of the last population.
    """

    members: Members
    losses: tf.Tensor
    express: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
    mixing: Mixing

    @property
    def new(self) -> tf.Tensor:
        """Which members [N] are to be evaluated."""
        return tf.math.is_nan(self.losses)


def kept_share(divergence: tf.Tensor, alpha: float) -> tf.Tensor:
    """The share of members that is kept, in expectation.

    For a move of the mean by d standard deviations and c = 1 - alpha,

        E min(1, c p' / p) = Phi(-d / 2 + l) + c Phi(-d / 2 - l),
        l = log(c) / d,

    2 Phi(-d / 2) for alpha = 0. Of other steps d is that of the move of the
    mean with the same divergence.

    Args:
        divergence: KL(p || p') in nats, d^2 / 2.
        alpha: the least share that is drawn anew.
    """
    if alpha == 1:
        return tf.zeros_like(divergence)
    d = tf.sqrt(tf.maximum(2.0 * divergence, 1e-24))
    shift = math.log1p(-alpha) / d

    def phi(x: tf.Tensor) -> tf.Tensor:
        return 0.5 * tf.math.erfc(-x / math.sqrt(2.0))

    return phi(-d / 2 + shift) + (1 - alpha) * phi(-d / 2 - shift)


def mix(
    gaussian: Gaussian,
    seeds: tuple[tf.Tensor, tf.Tensor],
    state: State,
    alpha: float,
    memory_budget: int,
    generator: str,
) -> Mixed:
    """The population of this step, of which a part is that of the last one.

    Args:
        gaussian: the search distribution p'.
        seeds: of the noise: the base seed, and the generation.
        state: of `FormerMembers`.
        alpha: the least share that is drawn anew.
        memory_budget: bytes of noise that are there at once.
        generator: name of what draws it.
    """
    own = {k: v for k, v in state.items() if k.startswith("mixing_")}
    base_seed, generation = (tf.cast(seed, tf.int64) for seed in seeds)
    size = int(own["mixing_losses"].shape[0])
    fixed = size, alpha, memory_budget, generator
    mixture = _mixture(gaussian.layout, *fixed)
    table, losses, mixing = mixture(
        gaussian.mean,
        gaussian.log_variance,
        gaussian.sensitivity,
        base_seed,
        generation,
        own,
    )
    drawing = Drawing(base_seed, generation, gaussian.layout, *fixed[2:])
    members = drawing.members(
        table["generation"], table["index"], table["origin"]
    )
    ring = Ring.of(gaussian.layout, own)
    express = functools.partial(ring.express, gaussian)
    return Mixed(members, losses, express, mixing)


@functools.lru_cache(maxsize=8)
def _mixture(
    layout: WeightLayout,
    size: int,
    alpha: float,
    memory_budget: int,
    generator: str,
) -> Any:
    """What `mix` does for populations of so many members, compiled."""

    @tf.function(autograph=False)
    def mixture(
        mean: tf.Tensor,
        log_variance: tf.Tensor,
        sensitivity: tf.Tensor | None,
        base_seed: tf.Tensor,
        generation: tf.Tensor,
        state: dict[str, tf.Tensor],
    ) -> tuple[dict[str, tf.Tensor], tf.Tensor, Mixing]:
        seeds = base_seed, generation
        drawing = Drawing(*seeds, layout, memory_budget, generator)
        gaussian = around(layout, mean, log_variance, sensitivity)
        return _mixed(drawing, gaussian, state, size, alpha)

    return mixture


def _mixed(
    drawing: Drawing,
    gaussian: Gaussian,
    state: State,
    size: int,
    alpha: float,
) -> tuple[dict[str, tf.Tensor], tf.Tensor, Mixing]:
    """The table of members, their losses, and what there is to say of them."""
    ring, steps = Ring.of(gaussian.layout, state), state["mixing_steps"]
    life = int(ring.means.shape[0])
    last = ring.at(tf.math.floormod(steps - 1, life))
    losses, begun = state["mixing_losses"], steps > 0
    places = tf.range(size, dtype=tf.int64)
    known = ~tf.math.is_nan(losses) & begun
    tested = known & (tf.math.floormod(steps + places, life) != 0)
    former = drawing.members(
        state["mixing_generation"],
        state["mixing_index"],
        state["mixing_origin"],
    )
    express = functools.partial(ring.express, last)
    ratios = drawing.log_ratios(former, last, gaussian, express)
    least = math.log1p(-alpha) if alpha < 1 else -math.inf
    uniform = drawing.uniform(size, 0)
    kept = tested & (tf.math.log(uniform) < least + ratios)
    replaced = tested & ~kept
    rank = tf.cumsum(tf.cast(replaced, tf.int32)) - 1
    found = _taken(drawing, gaussian, last, alpha, replaced)
    anew = tf.where(replaced, tf.gather(found, tf.maximum(rank, 0)), places)
    table = {
        "generation": tf.where(kept, former.generation, drawing.generation),
        "index": tf.where(kept, former.index, anew),
        "origin": tf.where(kept, state["mixing_origin"], -1),
    }
    divergence = kl_divergence(
        gaussian.mean - last.mean, last.log_variances, gaussian.log_variances
    )
    share = kept_share(tf.cast(divergence, tf.float64), alpha)
    nan = tf.constant(math.nan, tf.float64)
    mixing = Mixing(
        _count(kept),
        tf.where(begun, _effective_size(ratios, known), nan),
        _count(kept) / _count(tested),
        tf.where(begun, share, nan),
    )
    return table, tf.where(kept, losses, nan), mixing


def _taken(
    drawing: Drawing,
    gaussian: Gaussian,
    last: Gaussian,
    alpha: float,
    replaced: tf.Tensor,
) -> tf.Tensor:
    """Indices [N] of the noise that comes in the places of members.

    As many of them count as `replaced` [N] has; candidates have indices from N
    on.
    """
    size = int(replaced.shape[0])
    needed = tf.math.count_nonzero(replaced, dtype=tf.int32)
    span = tf.range(size, dtype=tf.int64)

    def look(
        tries: tf.Tensor, count: tf.Tensor, found: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        index = tf.cast(tries, tf.int64) * size + span
        ratios = drawing.log_ratios(drawing.new(index), gaussian, last, None)
        share = tf.maximum(-tf.math.expm1(ratios), alpha)
        taken = drawing.uniform(size, tries) < share
        number = count + tf.cumsum(tf.cast(taken, tf.int32)) - 1
        # What is too many goes to the end, which no one looks at.
        place = tf.where(taken & (number < size), number, size)
        found = tf.tensor_scatter_nd_update(found, place[:, None], index)
        return tries + 1, count + _count(taken, tf.int32), found

    rest = (_TRIES + 1) * size + tf.range(size + 1, dtype=tf.int64)
    _, _, found = tf.while_loop(
        lambda tries, count, _: (count < needed) & (tries <= _TRIES),
        look,
        (tf.constant(1), tf.constant(0), rest),
        parallel_iterations=1,
    )
    return found[:size]


def _effective_size(ratios: tf.Tensor, known: tf.Tensor) -> tf.Tensor:
    """(sum w)^2 / sum w^2 of weights w = exp(ratios) [N], where known."""
    ratios = tf.where(known, ratios, -math.inf)
    total = 2.0 * tf.reduce_logsumexp(ratios)
    return tf.exp(total - tf.reduce_logsumexp(2.0 * ratios))


def _count(where: tf.Tensor, dtype: tf.DType = tf.float64) -> tf.Tensor:
    return tf.math.count_nonzero(where, dtype=dtype)
