"""Evaluates a population in chunks, in a graph or eagerly.

    seeds -> noise -> perturbed weights -> losses        (evaluate)
    seeds -> noise -> sums weighted by utilities         (reduce)

Only one chunk of perturbed weights exists at a time. The noise is kept
between the two passes where it fits the memory budget, else drawn again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import tensorflow as tf

from keras_vo import interrupts
from keras_vo.evaluation.forward_only import values_alone
from keras_vo.evaluation.isolation import Isolation
from keras_vo.evaluation.vectorized import compiled
from keras_vo.search.chunks import (
    ChunkPlan,
    Noise,
    NoiseSource,
    loop,
    sum_over_chunks,
)
from keras_vo.tensorflow_compat import is_compiled_by_xla

__all__ = ["Evaluation", "Found", "evaluate"]

# From the noise of one direction and its sign to the member's losses by level,
# and its records.
Member = Callable[[Noise, float], tuple[Mapping[str, tf.Tensor], Any]]


class Found(NamedTuple):
    """What the evaluation of one member leaves; members are stacked.

    Attributes:
        losses: by level of credit.
        records: what the score of each perturbed activation needs.
    """

    losses: Mapping[str, tf.Tensor]
    records: Any


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """An evaluated population, see `keras_vo.search.credit.Evaluated`.

    Attributes:
        losses: of the members by level, [N, ...], all of the first sign first.
        source: the noise, kept if its plan says so.
        evaluate: from a chunk's index and noise to what its members leave.
        first: the noise and the records of the first chunk.
    """

    losses: dict[str, tf.Tensor]
    source: NoiseSource
    evaluate: Callable[[tf.Tensor, Noise], Found]
    first: tuple[Noise, Any]

    def reduce(
        self,
        function: Callable[[Noise, Any, list[tf.Tensor]], Any],
        weights: list[tf.Tensor],
    ) -> Any:
        """Sums `function(noise, records, weights)` over all chunks.

        Records are those of the first evaluation in the first chunk; the
        members of other chunks are evaluated again where there are any.
        """

        def chunk(index: tf.Tensor, noise: Noise, rows: list[tf.Tensor]) -> Any:
            records = self.first[1]
            if tf.nest.flatten(records):
                records = self.evaluate(index, noise).records
            return function(noise, records, rows)

        return sum_over_chunks(
            self.source,
            lambda rows: function(*self.first, rows),
            chunk,
            weights,
        )


def evaluate(
    member: Member,
    source: NoiseSource,
    isolation: Isolation,
    jit_compile: bool = False,
) -> Evaluation:
    """Evaluates all members: each direction once with every sign.

    Args:
        member: from the noise of one direction and its sign to its outcome.
        source: the members' noise, not yet kept.
        isolation: of the members.
        jit_compile: whether XLA compiles the evaluation (not the noise, which
            would be the same, and slower on a CPU).
    """
    if source.wanted is not None:
        return _evaluate_some(
            source.wanted, member, source, isolation, jit_compile
        )
    plan, signs = source.plan, source.members.signs

    def both_signs(noise: Noise, row: int | None = None) -> Found:
        outcomes: list[Found] = []
        for sign in signs:
            with _member_named(source, row, sign), values_alone():
                found = isolation.run(member, noise, sign, after=outcomes)
            outcomes.append(Found(*found))
        return tf.nest.map_structure(_stacked, *outcomes)

    run = _chunk_evaluator(
        both_signs, plan, source.specs(), isolation, jit_compile
    )
    first_noise = source.chunk(tf.constant(0))
    first = run(tf.constant(0), first_noise)
    losses = first.losses
    if not plan.is_one:
        losses, source = _evaluate_rest(source, run, first_noise, losses)
    losses = {
        level: _by_sign(values, plan, len(signs))
        for level, values in losses.items()
    }
    return Evaluation(losses, source, run, (first_noise, first.records))


def _evaluate_some(
    wanted: tf.Tensor,
    member: Member,
    source: NoiseSource,
    isolation: Isolation,
    jit_compile: bool,
) -> Evaluation:
    """Evaluates the members that are wanted, one at least; the losses of
    others are NaN. They have one sign.

    Raises:
        ValueError: XLA compiles this: its loops and arrays have sizes that are
            known.
    """
    if is_compiled_by_xla():
        raise ValueError(
            "importance_mixing evaluates the new members of a population, and "
            "how many they are is not known to XLA. Expected: `minimize` "
            "eagerly, by an executor, or in a tf.function without jit_compile; "
            "or `fit` (jit_compile=True in `compile` is no problem). Received: "
            "a function with jit_compile=True"
        )
    count = tf.math.count_nonzero(wanted, dtype=tf.int32)
    order = tf.argsort(tf.cast(~wanted, tf.int32), stable=True)
    directions, chunk = tf.maximum(count, 1), source.plan.chunk
    if tf.executing_eagerly():
        directions = int(directions)
    elif not jit_compile:  # which would compile it for each number of them
        chunks = -(-directions // chunk)
        chunk = -(-directions // chunks)
    some = dataclasses.replace(
        source,
        members=source.members.rows(order),
        plan=ChunkPlan(directions, chunk, keep_noise=False),
        wanted=None,
    )
    found = evaluate(member, some, isolation, jit_compile)
    losses = {}
    for level, values in found.losses.items():
        size = source.members.directions
        placed = tf.scatter_nd(order[:directions, None], values, [size])
        nan = tf.constant(math.nan, values.dtype)
        losses[level] = tf.where(wanted, placed, nan)
    # No records: of all noise, only that of weights may be of another member.
    first = source.chunk(tf.constant(0)), ()
    return Evaluation(losses, source, found.evaluate, first)


def _member_named(source: NoiseSource, row: int | None, sign: float) -> Any:
    """The scope of a member that errors name, evaluated eagerly."""
    if row is None:
        return contextlib.nullcontext()
    members = source.members
    number, total = row, source.plan.directions
    if members.origin is None:  # else it is that of those that are wanted
        number = members.number(row, sign)
        total = members.total * len(members.signs)
    return interrupts.named(
        f"(keras_vo: member {number} of {total}, "
        f"generation {int(members.generation[row])})"
    )


def _evaluate_rest(
    source: NoiseSource,
    run: Callable[[tf.Tensor, Noise], Found],
    first_noise: Noise,
    first: Mapping[str, tf.Tensor],
) -> tuple[dict[str, tf.Tensor], NoiseSource]:
    """Losses [directions, signs, ...] of all chunks, padded; and the noise,
    kept if the plan says so.
    """
    plan = source.plan
    outputs = [*first.values(), first_noise.weights]
    if not plan.keep_noise:
        outputs.pop()
    arrays = [
        tf.TensorArray(
            output.dtype,
            plan.chunks,
            clear_after_read=False,
            element_shape=output.shape,
        ).write(0, output)
        for output in outputs
    ]

    def step(index: tf.Tensor, *arrays: tf.TensorArray) -> tuple[Any, ...]:
        noise = source.chunk(index)
        losses = run(index, noise).losses
        outputs = (*(losses[level] for level in first), noise.weights)
        written = [
            array.write(index, output)
            for array, output in zip(arrays, outputs, strict=False)
        ]
        return index + 1, *written

    arrays = list(loop(plan, step, arrays))
    if plan.keep_noise:
        source = dataclasses.replace(source, kept=arrays.pop())
    values = [array.concat() for array in arrays]
    return dict(zip(first, values, strict=True)), source


def _by_sign(values: tf.Tensor, plan: ChunkPlan, signs: int) -> tf.Tensor:
    """From [directions, signs, ...], padded, to [members, ...], by sign."""
    rest = values.shape[2:]
    by_sign = tf.transpose(
        values[: plan.directions], [1, 0, *range(2, 2 + rest.rank)]
    )
    flat = tf.reshape(by_sign, tf.concat([[-1], tf.shape(values)[2:]], axis=0))
    unknown = tf.is_tensor(plan.directions)
    size = None if unknown else signs * plan.directions
    return tf.ensure_shape(flat, [size, *rest])


def _chunk_evaluator(
    direction: Callable[..., Found],
    plan: ChunkPlan,
    specs: Noise,
    isolation: Isolation,
    jit_compile: bool,
) -> Callable[[tf.Tensor, Noise], Found]:
    """`direction` over the rows of chunk `index`.

    Eagerly: one row after another, with concrete values, and none for
    padding. In a graph: as fast as its ops allow.
    """
    if not tf.executing_eagerly():
        run = compiled(direction, specs, jit_compile, isolation)

        def in_graph(index: tf.Tensor, chunk: Noise) -> Found:
            rest = plan.directions - tf.cast(index, tf.int32) * plan.chunk
            after = isolation.after if isolation.serial else []
            with tf.control_dependencies(after):
                return run(chunk, tf.minimum(plan.chunk, rest))

        return in_graph

    def eager(index: tf.Tensor, chunk: Noise) -> Found:
        first = int(index) * plan.chunk
        count = min(plan.chunk, plan.directions - first)
        rows = [
            direction(
                tf.nest.map_structure(operator.itemgetter(row), chunk),
                first + row,
            )
            for row in range(count)
        ]
        rows += [tf.nest.map_structure(tf.zeros_like, rows[0])] * (
            plan.chunk - count
        )
        return tf.nest.map_structure(_stacked, *rows)

    return eager


def _stacked(*tensors: tf.Tensor) -> tf.Tensor:
    """Stacked in the widest dtype: losses may be now a number, now a tensor."""
    dtypes = {t.dtype for t in tensors}
    if len(dtypes) > 1:
        widest = max(dtypes, key=lambda dtype: dtype.size)
        return tf.stack([tf.cast(t, widest) for t in tensors])
    return tf.stack(tensors)
