"""Evaluates a population in chunks, and sums over its noise.

    seeds -> noise -> perturbed weights -> losses        (evaluate)
    seeds -> noise -> sums weighted by utilities         (reduce)

Only one chunk of perturbed weights exists at a time. The noise is kept
between the two passes where it fits the memory budget, else drawn again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from keras_vo.chunks import ChunkPlan, Draws, NoiseSource

__all__ = [
    "Outcome",
    "Population",
    "evaluate_population",
    "reduce_noise",
]


class Outcome(NamedTuple):
    """What the evaluation of one member leaves; members are stacked.

    Attributes:
        loss: its loss, a scalar.
        examples: empty, or the losses of its examples, [batch].
        records: what the score of each perturbed activation needs.
    """

    loss: tf.Tensor
    examples: tuple[tf.Tensor, ...] = ()
    records: tuple[tuple[tf.Tensor, ...], ...] = ()


Member = Callable[[Draws, float], Outcome]


@dataclasses.dataclass(frozen=True)
class Population:
    """An evaluated population.

    Attributes:
        losses: the members' losses [N], all of the first sign first.
        examples: empty, or the losses [N, batch] of their examples.
        source: the generation's noise, kept if its plan says so.
        evaluate: from a chunk's index and noise to its members' outcomes.
        first: the noise and the records of the first chunk.
    """

    losses: tf.Tensor
    examples: tuple[tf.Tensor, ...]
    source: NoiseSource
    evaluate: Callable[[tf.Tensor, Draws], Outcome]
    first: tuple[Draws, Any]

    def reduce(
        self,
        function: Callable[..., Sequence[tf.Tensor]],
        weights: Sequence[tf.Tensor],
    ) -> Sequence[tf.Tensor]:
        """Sums `function(draws, records, *weights)` over all chunks.

        Records are those of the first evaluation in the first chunk; the
        members of other chunks are evaluated again where there are any.

        Args:
            function: from the noise, the records and the weights of a chunk
                to a sequence of tensors, sums over the chunk.
            weights: tensors [draws, ...], cut into the same chunks.
        """

        def chunk(index: tf.Tensor, draws: Draws, *rows: tf.Tensor) -> Any:
            records = self.first[1]
            if tf.nest.flatten(records):
                records = self.evaluate(index, draws).records
            return function(draws, records, *rows)

        return _sum_over_chunks(
            self.source,
            lambda rows: function(*self.first, *rows),
            chunk,
            weights,
        )


def reduce_noise(
    source: NoiseSource,
    function: Callable[..., Sequence[tf.Tensor]],
    weights: Sequence[tf.Tensor],
) -> Sequence[tf.Tensor]:
    """Sums `function(draws, *weights)` over all chunks, which it draws.

    Args:
        source: the noise.
        function: from the noise and the weights of a chunk to a sequence of
            tensors, sums over the chunk.
        weights: tensors [draws, ...], cut into the same chunks.
    """
    return _sum_over_chunks(
        source,
        lambda rows: function(source.chunk(tf.constant(0)), *rows),
        lambda index, draws, *rows: function(draws, *rows),
        weights,
    )


def _sum_over_chunks(
    source: NoiseSource,
    first: Callable[[list[tf.Tensor]], Sequence[tf.Tensor]],
    others: Callable[..., Sequence[tf.Tensor]],
    weights: Sequence[tf.Tensor],
) -> Sequence[tf.Tensor]:
    """The sum of `first(rows)` and of `others(index, draws, *rows)`."""
    plan = source.plan
    missing = plan.chunks * plan.chunk - plan.draws
    rows = [
        tf.reshape(
            tf.pad(w, [[0, missing]] + [[0, 0]] * (w.shape.rank - 1)),
            tf.concat([[plan.chunks, plan.chunk], tf.shape(w)[1:]], 0),
        )
        for w in weights
    ]

    def add(index: tf.Tensor, *totals: tf.Tensor) -> tuple[tf.Tensor, ...]:
        draws = source.chunk(index)
        terms = others(index, draws, *(row[index] for row in rows))
        sums = [a + b for a, b in zip(totals, terms, strict=True)]
        return index + 1, *sums

    return _loop(plan, add, first([row[0] for row in rows]))


def evaluate_population(
    member: Member,
    source: NoiseSource,
    signs: tuple[float, ...],
    jit_compile: bool = False,
) -> Population:
    """Evaluates all members: each draw once with every sign.

    Args:
        member: from the noise of one draw and its sign to the outcome.
        source: the generation's noise, not yet kept.
        signs: (1, -1) if antithetic, else (1,).
        jit_compile: whether XLA compiles the evaluation (not the noise: XLA
            draws other normals from the same seed).
    """
    plan = source.plan

    def both_signs(draws: Draws) -> Outcome:
        outcomes = [member(draws, sign) for sign in signs]
        return tf.nest.map_structure(lambda *t: tf.stack(t), *outcomes)

    evaluate = _chunk_evaluator(both_signs, plan, source.specs(), jit_compile)
    first_draws = source.chunk(tf.constant(0))
    first = evaluate(tf.constant(0), first_draws)
    outputs = (first.loss, *first.examples)
    if _is_one(plan):
        values = list(outputs)
    else:
        values, source = _evaluate_rest(source, evaluate, first_draws, outputs)
    losses, *examples = [_by_sign(value, plan, len(signs)) for value in values]
    return Population(
        losses, tuple(examples), source, evaluate, (first_draws, first.records)
    )


def _evaluate_rest(
    source: NoiseSource,
    evaluate: Callable[[tf.Tensor, Draws], Outcome],
    first_draws: Draws,
    first: tuple[tf.Tensor, ...],
) -> tuple[list[tf.Tensor], NoiseSource]:
    """Losses [draws, signs, ...] of all chunks, padded; and the noise, kept
    if the plan says so.
    """
    plan = source.plan
    outputs = (*first, first_draws.weights) if plan.keep_noise else first
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
        draws = source.chunk(index)
        outcome = evaluate(index, draws)
        outputs = (outcome.loss, *outcome.examples, draws.weights)
        written = [
            array.write(index, output)
            for array, output in zip(arrays, outputs, strict=False)
        ]
        return index + 1, *written

    arrays = list(_loop(plan, step, arrays))
    if plan.keep_noise:
        source = dataclasses.replace(source, kept=arrays.pop())
    return [array.concat() for array in arrays], source


def _is_one(plan: ChunkPlan) -> bool:
    """Whether there is one chunk, as is known before the step runs."""
    return not tf.is_tensor(plan.chunks) and plan.chunks == 1


def _loop(
    plan: ChunkPlan, body: Callable[..., Any], start: Sequence[Any]
) -> Sequence[Any]:
    """Runs `body` for the chunks after the first."""
    if _is_one(plan):
        return start
    _, *values = tf.while_loop(
        lambda index, *_: index < plan.chunks,
        body,
        (tf.constant(1), *start),
        parallel_iterations=1,
    )
    return values


def _by_sign(values: tf.Tensor, plan: ChunkPlan, signs: int) -> tf.Tensor:
    """From [draws, signs, ...], padded, to [members, ...], by sign."""
    rest = values.shape[2:]
    by_sign = tf.transpose(
        values[: plan.draws], [1, 0, *range(2, 2 + rest.rank)]
    )
    flat = tf.reshape(by_sign, tf.concat([[-1], tf.shape(values)[2:]], axis=0))
    return tf.ensure_shape(flat, [signs * plan.draws, *rest])


def _chunk_evaluator(
    draw: Callable[[Draws], Outcome],
    plan: ChunkPlan,
    specs: Draws,
    jit_compile: bool,
) -> Callable[[tf.Tensor, Draws], Outcome]:
    """`draw` over the rows of chunk `index`, as fast as its ops allow.

    Eagerly: one row after another, with concrete values, and none for
    padding. In a graph: vectorized, unless an op (a convolution, say) has no
    vectorized form or would have none that XLA can compile: then one row
    after another.
    """
    stack = functools.partial(tf.nest.map_structure, lambda *t: tf.stack(t))
    if tf.executing_eagerly():

        def eager(index: tf.Tensor, chunk: Draws) -> Outcome:
            count = min(plan.chunk, plan.draws - int(index) * plan.chunk)
            rows = [
                draw(tf.nest.map_structure(operator.itemgetter(row), chunk))
                for row in range(count)
            ]
            rows += [tf.nest.map_structure(tf.zeros_like, rows[0])] * (
                plan.chunk - count
            )
            return stack(*rows)

        return eager

    def vectorized(chunk: Draws) -> Outcome:
        return tf.vectorized_map(draw, chunk, fallback_to_while_loop=False)

    def mapped(chunk: Draws) -> Outcome:
        first = tf.nest.map_structure(lambda t: t[0], chunk)
        traced = tf.function(draw, autograph=False).get_concrete_function(first)
        return tf.map_fn(
            draw,
            chunk,
            fn_output_signature=tf.nest.map_structure(
                tf.TensorSpec.from_tensor, traced.structured_outputs
            ),
        )

    def compiled(function: Callable[[Draws], Outcome]) -> Any:
        return tf.function(
            function, jit_compile=jit_compile or None, autograph=False
        ).get_concrete_function(specs)

    try:
        with _quiet_tensorflow():
            evaluate = compiled(vectorized)
        graph = evaluate.graph.as_graph_def()
        if jit_compile and _uses_tensor_lists(graph):
            evaluate = compiled(mapped)
    except (NotImplementedError, ValueError):
        # No vectorized form; or the objective's own error, raised again here.
        evaluate = compiled(mapped)
    return lambda index, draws: evaluate(draws)


@contextlib.contextmanager
def _quiet_tensorflow() -> Iterator[None]:
    """Silences what TensorFlow logs when it finds no vectorized form."""
    logger = tf.get_logger()
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _uses_tensor_lists(graph: Any) -> bool:
    """Whether a loop's TensorArray was vectorized, which XLA can't compile."""
    nodes = list(graph.node)
    for function in graph.library.function:
        nodes.extend(function.node_def)
    return any(node.op.startswith("TensorList") for node in nodes)
