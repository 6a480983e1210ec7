"""Fitness shaping: from the losses of a population to its utilities.

A utility is what the search gradient weighs a member's noise with. Shaping
only has to keep the order (a higher loss, a higher utility) and the sum 0;
the choice trades the size of the loss for robustness to its scale and to
outliers. Equal losses get equal utilities.

Losses are [N], one a member. (Columns of losses [N, batch] are shaped each on
its own. The losses of examples are not shaped so in a search: see
`keras_vo.search.example_credit`.)

A member whose loss is not finite gets the worst utility: the highest finite
loss stands in for it here, and it ranks behind every finite loss. If no loss
is finite all utilities are 0.

References:
    [1] Wierstra et al., "Natural Evolution Strategies", JMLR 15, 2014.
    [2] Salimans et al., "Evolution Strategies as a Scalable Alternative to
        Reinforcement Learning", arXiv 1703.03864, 2017.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import tensorflow as tf

__all__ = [
    "canonical",
    "centered_rank",
    "get",
    "identity",
    "is_loss_scaled",
    "nes",
    "shaped_known",
    "standardize",
]

Shaping = Callable[[tf.Tensor], tf.Tensor]


def identity(losses: tf.Tensor, antithetic: bool = False) -> tf.Tensor:
    """The loss itself, less the mean loss of the other draws.

    u_n = f_n - b_n, where the baseline b_n is the mean over all members that
    do not share member n's noise. b_n is independent of z_n, so the search
    gradient stays unbiased.

    Args:
        losses: losses [N] or [N, batch].
        antithetic: whether member n and member n + N/2 mirror each other's
            noise. Both are then left out of either's baseline.

    Returns:
        Utilities like `losses`, of sum 0.
    """
    losses = _worst_finite_for_non_finite(losses)
    losses -= losses[:1]  # so that equal losses have a mean of exactly 0
    count = losses.shape[0]
    own = losses
    shared = 1
    if antithetic:
        own = losses + tf.roll(losses, count // 2, axis=0)
        shared = 2
    if count == shared:  # a single draw has no others to compare with
        return losses - tf.reduce_mean(losses, axis=0)
    # Centring first keeps the digits that a common offset would take.
    center = tf.reduce_mean(losses, axis=0)
    others = (shared * center - own) / (count - shared)
    return losses - center - others


def standardize(losses: tf.Tensor) -> tf.Tensor:
    """The z-score: u_n = (f_n - mean f) / std f.

    Args:
        losses: losses [N] or [N, batch].

    Returns:
        Utilities like `losses`, of mean 0 and variance 1; all 0 if the losses
        are equal.
    """
    losses = _worst_finite_for_non_finite(losses)
    # Losses of up to 1e30 would overflow when squared: scale them first.
    losses -= tf.reduce_mean(losses, axis=0)
    largest = tf.reduce_max(tf.abs(losses), axis=0)
    losses = tf.math.divide_no_nan(losses, largest)
    return tf.math.divide_no_nan(losses, tf.math.reduce_std(losses, axis=0))


def centered_rank(losses: tf.Tensor) -> tf.Tensor:
    """Ranks spread evenly over [-0.5, 0.5], the highest loss at 0.5 [2].

    u_n = rank_n / (N - 1) - 0.5 with ranks 0..N-1 of ascending loss.

    Args:
        losses: losses [N] or [N, batch].

    Returns:
        Utilities like `losses`, of sum 0. Equal losses share their mean rank.
    """
    return _by_rank(losses, np.linspace(-0.5, 0.5, losses.shape[0]))


def nes(losses: tf.Tensor) -> tf.Tensor:
    """The log-rank utilities of natural evolution strategies [1].

    Of the losses in ascending order, k = 1..N, member k has the weight

        w_k = max(0, log(N/2 + 1) - log k) / sum_j max(0, log(N/2 + 1) - log j)

    and the utility 1 - N w_k, so that 1/N sum_n u_n z_n = mean z - sum w z.

    Args:
        losses: losses [N] or [N, batch].

    Returns:
        Utilities like `losses`, of sum 0. Equal losses share their mean
        utility.
    """
    count = losses.shape[0]
    weights = np.maximum(
        0.0, np.log(count / 2 + 1) - np.log(np.arange(1, count + 1))
    )
    return _by_rank(losses, 1.0 - count * weights / weights.sum())


_SHAPINGS: dict[str, Shaping] = {
    "identity": identity,
    "standardize": standardize,
    "centered_rank": centered_rank,
    "nes": nes,
}


def canonical(shaping: str | Shaping) -> str | Shaping:
    """The name of one of this module's functions; anything else as it is."""
    names = [name for name, known in _SHAPINGS.items() if known is shaping]
    return names[0] if names else shaping


def get(shaping: str | Shaping, antithetic: bool) -> Shaping:
    """Looks a shaping up, and checks what a callable returns.

    Args:
        shaping: "identity", "standardize", "centered_rank", "nes", or a
            callable from finite losses [N] to utilities [N].
        antithetic: whether members n and n + N/2 are mirrored pairs.

    Raises:
        ValueError: an unknown name, or (when called) a callable that returns
            another shape than it was given.
    """
    shaping = canonical(shaping)
    if callable(shaping):
        return functools.partial(_checked, shaping)
    if shaping not in _SHAPINGS:
        raise ValueError(
            "`fitness_shaping` must be a callable or one of "
            f"{sorted(_SHAPINGS)}. Received: fitness_shaping={shaping!r}"
        )
    if shaping == "identity":
        return _LeaveOneOut(antithetic)
    return _SHAPINGS[shaping]


@dataclasses.dataclass(frozen=True)
class _LeaveOneOut:
    """`identity`, of members some of which may be missing."""

    antithetic: bool

    def __call__(self, losses: tf.Tensor) -> tf.Tensor:
        return identity(losses, self.antithetic)

    def of_known(self, losses: tf.Tensor, known: tf.Tensor) -> tf.Tensor:
        """See `shaped_known`: u_n = f_n - b_n, where the baseline b_n is the
        mean over the known members that do not share member n's noise.
        """
        count = losses.shape[0]
        losses = _worst_finite_for_non_finite(losses)
        weights = tf.cast(known, losses.dtype)
        total = tf.reduce_sum(weights)
        center = tf.reduce_sum(weights * losses) / total
        losses = weights * (losses - center)
        own, shared = losses, weights
        if self.antithetic:
            own = losses + tf.roll(losses, count // 2, axis=0)
            shared = weights + tf.roll(weights, count // 2, axis=0)
        others = tf.math.divide_no_nan(-own, total - shared)
        return weights * (losses - others)


def shaped_known(
    shaping: Shaping, losses: tf.Tensor, known: tf.Tensor
) -> tf.Tensor:
    """Utilities of the members whose losses are known; those of others are 0.

    They are what they were if there were no other members. Eagerly only.

    Args:
        shaping: as `get` returns it.
        losses: [N].
        known: which of them are, [N].
    """
    if bool(tf.reduce_all(known)):
        return shaping(losses)
    where = tf.where(known)
    if where.shape[0] < 2:  # no one to compare with
        return tf.zeros_like(losses)
    if isinstance(shaping, _LeaveOneOut):
        return shaping.of_known(losses, known)
    utilities = shaping(tf.gather(losses, where[:, 0]))
    return tf.scatter_nd(where, utilities, tf.shape(losses, tf.int64))


def is_loss_scaled(
    shaping: str | Shaping,
    population_size: int,
    dtype: tf.DType = tf.float32,
) -> bool:
    """Whether utilities have the scale of the losses, as those of `identity`.

    A callable is asked: whether twice the losses have twice the utilities. One
    that has no answer for these losses (between 1 and 4) has none.

    Args:
        shaping: as in `get`, checked.
        population_size: N.
        dtype: of the losses.
    """
    shaping = canonical(shaping)
    if isinstance(shaping, str):
        return shaping == "identity"
    with tf.init_scope():
        # Of an order that no formula of the index follows.
        losses = 1 + tf.random.stateless_uniform(
            [population_size], [1, 2], dtype=dtype
        )
        try:
            once, twice = (
                tf.convert_to_tensor(_checked(shaping, scale * losses)).numpy()
                for scale in (1.0, 2.0)
            )
        except (
            ArithmeticError,
            AttributeError,
            TypeError,
            ValueError,
            tf.errors.OpError,
        ):
            return False
    return bool(np.any(once) and np.allclose(twice, 2 * once, rtol=1e-3))


def _checked(shaping: Shaping, losses: tf.Tensor) -> tf.Tensor:
    safe = _worst_finite_for_non_finite(losses)
    utilities = tf.convert_to_tensor(shaping(safe))
    if utilities.shape != losses.shape:
        raise ValueError(
            "A callable `fitness_shaping` must return one utility per member, "
            f"a tensor of shape {tuple(losses.shape)}. Received: "
            f"shape {tuple(utilities.shape)} from {shaping!r}"
        )
    return tf.cast(utilities, losses.dtype)


def _by_rank(losses: tf.Tensor, table: np.ndarray) -> tf.Tensor:
    """Entry k of `table` for the member of rank k; ties share their mean."""
    finite = tf.math.is_finite(losses)
    losses = tf.where(finite, losses, tf.constant(np.inf, losses.dtype))
    losses = tf.transpose(losses)  # members last
    ascending = tf.sort(losses)
    first = tf.searchsorted(ascending, losses, side="left")
    end = tf.searchsorted(ascending, losses, side="right")
    cumulative = np.concatenate([[0.0], np.cumsum(table)])
    cumulative[-1] = 0.0  # not almost: all losses equal, all utilities 0
    cumulative = tf.constant(cumulative)
    total = tf.gather(cumulative, end) - tf.gather(cumulative, first)
    mean = total / tf.cast(end - first, total.dtype)
    return tf.cast(tf.transpose(mean), losses.dtype)


def _worst_finite_for_non_finite(losses: tf.Tensor) -> tf.Tensor:
    finite = tf.math.is_finite(losses)
    lowest = tf.constant(losses.dtype.min, losses.dtype)
    worst = tf.reduce_max(tf.where(finite, losses, lowest), axis=0)
    worst = tf.where(tf.reduce_any(finite, axis=0), worst, 0)
    return tf.where(finite, losses, worst)
