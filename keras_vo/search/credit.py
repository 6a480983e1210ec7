"""Credit: from what members were found to lose to their utilities.

Credit has levels. A loss of level "member" is one number for each member, one
of level "example" one for each member and example of the batch. A kind of
perturbation says which level its noise is weighted with. Losses of level
"position", parts of those of the examples, are found with them, of the same
members: noise at a position may be weighted with its own part.

Missing results are NaN. A result that is not finite is +inf, and is worth what
the worst one is (see `keras_vo.fitness_shaping`).

References:
    [1] Havtorn, "Variational Optimization of Neural Networks", 2018 (slides).
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import tensorflow as tf

from keras_vo.search.chunks import Noise, NoiseSource, sum_over_chunks
from keras_vo.search.communicator import Communicator
from keras_vo.search.members import Shard
from keras_vo.search.missing import (
    Shaping,
    shaped_where_known,
    with_former,
)

__all__ = [
    "EXAMPLE",
    "LEVELS",
    "MEMBER",
    "POSITION",
    "Evaluated",
    "Generation",
    "Outcomes",
    "Pooled",
    "Rows",
    "Shaping",
    "all_losses",
    "each",
    "is_blurred",
    "narrow",
    "narrowed",
    "pool",
    "reduce_noise",
]

# Those of populations, in the order in which their members are evaluated.
LEVELS = MEMBER, EXAMPLE = "member", "example"
POSITION = "position"


class Evaluated(Protocol):
    """An evaluation that can be gone through once more, by chunks."""

    def reduce(
        self,
        function: Callable[[Noise, Any, list[tf.Tensor]], Any],
        weights: list[tf.Tensor],
    ) -> Any:
        """Sums `function(noise, records, weights)` over all chunks.

        Args:
            function: from the noise, the records and the weights of a chunk
                to a structure of tensors, sums over the chunk.
            weights: tensors [directions, ...], cut into the same chunks.
        """


class Outcomes(NamedTuple):
    """What the evaluation of some members has found.

    Attributes:
        losses: by level: "member" [N], and "example" [N, batch] where there
            is noise of that level; with "position" [N, batch, ...], which
            add up to those of the examples, where positions have credit of
            their own. All of the first sign first.
        weights: what the losses of examples [batch] and of positions
            [batch, ...] are weighted with, by level; 1 where it is not there.
            Those of examples have the mean 1, those of positions any.
        examples: number of examples that this replica has, a scalar; 0: the
            members it has evaluated are missing. `None`: not a matter of
            examples.
        baseline: the loss of the mean on this replica's shard of the batch, a
            scalar; `None`: the members' mean loss takes its place.
        evaluated: the evaluation; `None`: the noise is to be drawn again.
        missing: which of the members [N] have no result; `None`: no one.
    """

    losses: Mapping[str, tf.Tensor]
    weights: Mapping[str, Any] = types.MappingProxyType({})
    examples: tf.Tensor | None = None
    baseline: tf.Tensor | None = None
    evaluated: Evaluated | None = None
    missing: tf.Tensor | None = None


class Rows(NamedTuple):
    """What the directions of a chunk are summed with, of one level.

    Attributes:
        utilities: [chunk, signs], or [chunk, signs, batch] of examples.
        shares: what each of a direction's members adds to a mean over this
            replica's members, [chunk]; 0 in padding.
        ids: numbers of the directions, [chunk]; `None`: the squared norms of
            `keras_vo.search.signal_to_noise` are not wanted.
        positions: utilities of positions, [chunk, signs, batch, ...]; `None`:
            they have their example's.
    """

    utilities: tf.Tensor
    shares: tf.Tensor
    ids: tf.Tensor | None = None
    positions: tf.Tensor | None = None


class Generation(NamedTuple):
    """What one step of the search evaluated.

    Attributes:
        losses: the members' losses [N]; inf for a member whose loss is not
            finite, NaN for one whose replica had no examples. With antithetic
            sampling, member n + N/2 mirrors member n.
        mean_loss: their mean, a scalar: an estimate of the upper bound
            U [1, eq. 6]. Non-finite losses are left out; NaN if all are.
        nonfinite_members: how many losses were not finite, int32.
    """

    losses: tf.Tensor
    mean_loss: tf.Tensor
    nonfinite_members: tf.Tensor

    @classmethod
    def of(cls, losses: tf.Tensor) -> Generation:
        """From losses as `Report` has them."""
        return cls(
            losses,
            tf.reduce_mean(tf.boolean_mask(losses, tf.math.is_finite(losses))),
            tf.math.count_nonzero(tf.math.is_inf(losses), dtype=tf.int32),
        )


class Pooled(NamedTuple):
    """The members' losses and utilities, those of all replicas.

    Attributes:
        losses: [N]; NaN where missing, inf where not finite.
        utilities: [N]; 0 where missing.
        known: how many are not missing, a scalar of the dtype of the losses.
        examples: number of examples of all replicas, alike; 1 where it is not
            a matter of examples.
        compared: losses less what the replicas' shards of a batch differ by,
            of which utilities are made [N].
    """

    losses: tf.Tensor
    utilities: tf.Tensor
    known: tf.Tensor
    examples: tf.Tensor
    compared: tf.Tensor

    @property
    def usable(self) -> tf.Tensor:
        """Which losses [N] are finite, if there is another to compare with.

        A loss that is not finite is one: the member is worse.
        """
        return tf.math.is_finite(self.losses) & (self.known > 1)


def pool(
    outcomes: Outcomes,
    shape: Shaping,
    shard: Shard,
    communicator: Communicator,
    former: tf.Tensor | None = None,
) -> Pooled:
    """Puts the replicas' losses together, and shapes them.

    The shards of a batch have different losses, whatever the member: what is
    compared are losses less the mean network's on the same shard. (Less the
    difference to that of one shard: where all have the same examples, nothing
    is subtracted.)

    Args:
        outcomes: of this replica's members.
        shape: fitness shaping, from losses [N] to utilities.
        shard: which members these are.
        communicator: to the other replicas.
        former: losses of members that were known before [N], as they were
            compared then; NaN of the others. `None`: no one's were.
    """
    losses = outcomes.losses[MEMBER]
    dtype = losses.dtype
    finite = tf.math.is_finite(losses)
    losses = tf.where(finite, losses, tf.constant(math.inf, dtype))
    missing = tf.constant(math.nan, dtype)
    if outcomes.missing is not None:
        losses = tf.where(outcomes.missing, missing, losses)
    examples = tf.ones([], dtype)
    if outcomes.examples is not None:
        examples = tf.cast(outcomes.examples, dtype)
    if communicator.count == 1:
        losses = with_former(losses, former, examples)
        if outcomes.missing is not None:
            signs = losses.shape[0] // shard.directions
            utilities, known = shaped_where_known(shape, losses, signs)
            return Pooled(losses, utilities, known, examples, losses)
        size = tf.constant(losses.shape[0], dtype)
        return Pooled(losses, shape(losses), size, examples, losses)
    own = tf.one_hot(communicator.index, communicator.count, dtype=dtype)
    losses = tf.where(examples > 0, losses, missing)
    baseline = _baseline(outcomes, losses)
    losses, baselines, seen = communicator.sum(
        [
            shard.place(losses),
            tf.where(own > 0, baseline, 0),
            own * examples,
        ]
    )
    signs = losses.shape[0] // shard.directions
    reference = baselines[tf.argmax(seen > 0)]
    owners = Shard.owners(shard.directions, communicator.count)
    offsets = tf.gather(baselines - reference, owners * signs)
    examples = tf.reduce_sum(seen)
    compared = with_former(losses - offsets, former, examples)
    losses = with_former(losses, former, examples)
    utilities, known = shaped_where_known(shape, compared, signs)
    return Pooled(losses, utilities, known, examples, compared)


def all_losses(pooled: Mapping[str, Pooled]) -> tf.Tensor:
    """Those of the members of all levels, [N]; NaN where missing, inf where
    not finite.
    """
    return tf.concat([p.losses for p in pooled.values()], axis=0)


def narrowed(pooled: Pooled, dtype: tf.DType) -> Pooled:
    """`pooled` with utilities for weights of `dtype`, see `narrow`."""
    return pooled._replace(
        utilities=narrow(pooled.utilities, pooled.losses, dtype),
        known=tf.cast(pooled.known, dtype),
        examples=tf.cast(pooled.examples, dtype),
    )


def narrow(wide: tf.Tensor, losses: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """Utilities for weights of `dtype`.

    Losses may be wider: they are compared in the precision that they come in.

    Raises:
        InvalidArgumentError: when it runs, if utilities have the scale of
            losses which `dtype` can't hold.
    """
    if wide.dtype == dtype:
        return wide
    utilities = tf.cast(wide, dtype)
    lost = tf.reduce_any(wide != 0) & tf.reduce_all(utilities == 0)
    fits = tf.reduce_all(tf.math.is_finite(utilities)) & ~lost
    message = (
        f"Expected losses whose differences a {dtype.name} can hold, as "
        "`fitness_shaping` gives utilities of their scale. Use "
        "'centered_rank', 'nes' or 'standardize', or scale the losses. "
        "Received: losses"
    )
    checked = tf.debugging.Assert(fits, [message, losses])
    with tf.control_dependencies([] if checked is None else [checked]):
        return tf.identity(utilities)


def is_blurred(losses: tf.Tensor) -> tf.Tensor:
    """Whether losses are too close to each other for their precision.

    They are if all lie within 64 of the smallest steps at their size. Equal
    ones are a plateau, unless they are float32 and larger than a loss should
    be (1e6).

    Args:
        losses: of members [N]; those that are not finite do not count.
    """
    finite = tf.math.is_finite(losses)
    zero = tf.zeros([], losses.dtype)
    size = tf.reduce_max(tf.where(finite, tf.abs(losses), zero))
    high = tf.reduce_max(tf.where(finite, losses, losses.dtype.min))
    low = tf.reduce_min(tf.where(finite, losses, losses.dtype.max))
    step = tf.constant(np.finfo(losses.dtype.as_numpy_dtype).eps, losses.dtype)
    close = high - low <= 64 * step * size
    if losses.dtype.size > 4:
        return close & (high > low)
    return close & ((high > low) | (size > 1e6))


def _baseline(outcomes: Outcomes, losses: tf.Tensor) -> tf.Tensor:
    """The mean's loss; where it is not finite, the members' mean loss."""
    finite = tf.math.is_finite(losses)
    total = tf.reduce_sum(tf.where(finite, losses, 0))
    count = tf.math.count_nonzero(finite, dtype=losses.dtype)
    of_members = tf.math.divide_no_nan(total, count)
    if outcomes.baseline is None:
        return of_members
    baseline = tf.cast(outcomes.baseline, losses.dtype)
    return tf.where(tf.math.is_finite(baseline), baseline, of_members)


def each(
    reduce: Callable[..., Any],
    function: Callable[[Noise], tf.Tensor],
    directions: int,
) -> tf.Tensor:
    """A row for each direction, of what else sums over chunks: [D, ...].

    Args:
        reduce: as `Evaluated.reduce`.
        function: from the noise of a chunk to its rows, of a known shape.
        directions: D.
    """

    def chunk(noise: Noise, records: Any, cut: list[tf.Tensor]) -> tf.Tensor:
        rows = function(noise)
        shape = [directions + 1, *rows.shape[1:]]
        return tf.scatter_nd(cut[0][:, None], rows, shape)

    # What repeats the last direction, in padding, has the number 0.
    return reduce(chunk, [tf.range(1, directions + 1)])[1:]


def reduce_noise(
    source: NoiseSource,
    function: Callable[[Noise, Any, list[tf.Tensor]], Any],
    weights: list[tf.Tensor],
) -> Any:
    """As `Evaluated.reduce`, without an evaluation: records are empty."""
    return sum_over_chunks(
        source,
        lambda rows: function(source.chunk(tf.constant(0)), (), rows),
        lambda index, noise, rows: function(noise, (), rows),
        weights,
    )
