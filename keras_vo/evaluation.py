"""Evaluates a population in chunks, and sums over its noise.

    seeds -> noise -> perturbed weights -> losses        (evaluate)
    seeds -> noise -> sums weighted by utilities         (Noise.reduce)

Only one chunk of perturbed weights exists at a time. The noise is kept
between the two passes where it fits the memory budget, else drawn again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from keras_vo import noise as noise_lib

__all__ = ["ChunkPlan", "NoiseSource", "evaluate_population"]

# More draws than this in one chunk bring no speed, only memory.
_MAX_CHUNK = 64
# Noise, perturbed weights and their copies of one chunk: what stays near the
# caches of a CPU. Measured in BUILD_NOTES.md, "Chunks".
_CHUNK_BYTES = 2**25


@dataclasses.dataclass(frozen=True)
class ChunkPlan:
    """How a population of draws is cut into chunks of equal size.

    Attributes:
        draws: number of noise vectors in the population.
        chunk: number of draws in a chunk. The last chunk may be padded.
        keep_noise: whether all noise is kept until the gradient is summed.
    """

    draws: int
    chunk: int
    keep_noise: bool

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return math.ceil(self.draws / self.chunk)

    @classmethod
    def make(
        cls,
        draws: int,
        members_per_draw: int,
        draw_bytes: int,
        memory_budget: int,
        chunk_size: int | None,
    ) -> ChunkPlan:
        """Plans the chunks.

        Args:
            draws: number of noise vectors in the population.
            members_per_draw: 2 with antithetic pairs, else 1.
            draw_bytes: bytes of one noise vector.
            memory_budget: bytes for noise and perturbed weights.
            chunk_size: members in a chunk at most; `None` to choose.
        """
        # A draw, and per member its weights and their copy as a list.
        working = draw_bytes * (1 + 2 * members_per_draw)
        if chunk_size is None:
            fits = min(_CHUNK_BYTES, memory_budget) // working
            chunk = min(draws, _MAX_CHUNK, max(1, fits))
        else:
            chunk = min(draws, max(1, chunk_size // members_per_draw))
        chunk = math.ceil(draws / math.ceil(draws / chunk))  # evenly filled
        kept = draws * draw_bytes + chunk * working
        return cls(draws, chunk, keep_noise=kept <= memory_budget)


@dataclasses.dataclass(frozen=True)
class NoiseSource:
    """The noise of one generation, a chunk at a time.

    Attributes:
        plan: how the draws are cut into chunks.
        seed: stateless seed [2] of the generation.
        size: number of weights d.
        dtype: dtype of the noise.
        kept: the chunks, if they are kept.
    """

    plan: ChunkPlan
    seed: tf.Tensor
    size: int
    dtype: tf.DType
    kept: tf.TensorArray | None = None

    def chunk(self, index: tf.Tensor) -> tf.Tensor:
        """Noise [chunk, d] of a chunk: kept or drawn again."""
        if self.kept is not None:
            return self.kept.read(index)
        draws = tf.cast(index, tf.int64) * self.plan.chunk
        draws += tf.range(self.plan.chunk, dtype=tf.int64)
        return noise_lib.draw_noise(self.seed, draws, self.size, self.dtype)

    def reduce(
        self,
        function: Callable[..., Sequence[tf.Tensor]],
        weights: Sequence[tf.Tensor],
    ) -> Sequence[tf.Tensor]:
        """Sums `function(noise, *weights)` over all chunks.

        Args:
            function: from noise [chunk, d] and weights [chunk] each to a
                sequence of tensors, sums over the chunk.
            weights: tensors [draws], cut into the same chunks.
        """
        plan = self.plan
        padding = [[0, plan.chunks * plan.chunk - plan.draws]]
        rows = [
            tf.reshape(tf.pad(w, padding), [plan.chunks, plan.chunk])
            for w in weights
        ]

        def add(index: tf.Tensor, *totals: tf.Tensor) -> tuple[tf.Tensor, ...]:
            terms = function(self.chunk(index), *(row[index] for row in rows))
            sums = [a + b for a, b in zip(totals, terms, strict=True)]
            return index + 1, *sums

        start = function(self.chunk(tf.constant(0)), *(r[0] for r in rows))
        if plan.chunks == 1:
            return start
        _, *totals = tf.while_loop(
            lambda index, *_: index < plan.chunks,
            add,
            (tf.constant(1), *start),
            parallel_iterations=1,
        )
        return totals


def evaluate_population(
    loss: Callable[[tf.Tensor], tf.Tensor],
    mean: tf.Tensor,
    stddev: tf.Tensor,
    source: NoiseSource,
    signs: tuple[float, ...],
    jit_compile: bool = False,
) -> tuple[tf.Tensor, NoiseSource]:
    """The losses of all members, f(mu + sign sigma z_n).

    Args:
        loss: from a weight vector [d] to a scalar of the noise's dtype.
        mean: mu [d].
        stddev: sigma, broadcasts against [d].
        source: the generation's noise, not yet kept.
        signs: what each draw is multiplied with; (1, -1) if antithetic.
        jit_compile: whether XLA compiles the evaluation (not the noise: XLA
            draws other normals from the same seed).

    Returns:
        Losses [N], all members of the first sign first, and the source with
        the noise kept if its plan says so.
    """

    def draw_losses(noise: tf.Tensor) -> tf.Tensor:
        return tf.stack([loss(mean + sign * stddev * noise) for sign in signs])

    plan = source.plan
    evaluate = _chunk_evaluator(
        draw_losses,
        tf.TensorSpec([plan.chunk, source.size], source.dtype),
        tf.TensorSpec([len(signs)], source.dtype),
        jit_compile,
    )
    array = functools.partial(
        tf.TensorArray, source.dtype, plan.chunks, clear_after_read=False
    )
    losses = array(element_shape=[plan.chunk, len(signs)])
    kept = array(element_shape=[plan.chunk, source.size])

    def step(
        index: tf.Tensor, losses: tf.TensorArray, kept: tf.TensorArray
    ) -> tuple[tf.Tensor, tf.TensorArray, tf.TensorArray]:
        noise = source.chunk(index)
        if plan.keep_noise:
            kept = kept.write(index, noise)
        if tf.executing_eagerly():  # no call of the objective for padding
            noise = noise[: plan.draws - index * plan.chunk]
            padding = [[0, plan.chunk - noise.shape[0]], [0, 0]]
            return (
                index + 1,
                losses.write(index, tf.pad(evaluate(noise), padding)),
                kept,
            )
        return index + 1, losses.write(index, evaluate(noise)), kept

    _, losses, kept = tf.while_loop(
        lambda index, *_: index < plan.chunks,
        step,
        (tf.constant(0), losses, kept),
        parallel_iterations=1,
    )
    flat = tf.reshape(losses.stack(), [-1, len(signs)])[: plan.draws]
    if plan.keep_noise:
        source = dataclasses.replace(source, kept=kept)
    return tf.reshape(tf.transpose(flat), [-1]), source


def _chunk_evaluator(
    draw_losses: Callable[[tf.Tensor], tf.Tensor],
    noise: tf.TensorSpec,
    losses: tf.TensorSpec,
    jit_compile: bool,
) -> Callable[[tf.Tensor], tf.Tensor]:
    """`draw_losses` over the rows of a chunk, as fast as its ops allow.

    Eagerly: one row after another, with concrete values. In a graph:
    vectorized, unless an op (a convolution, say) has no vectorized form or
    would have none that XLA can compile: then one row after another.
    """
    if tf.executing_eagerly():
        return lambda chunk: tf.stack([draw_losses(z) for z in chunk])

    def vectorized(chunk: tf.Tensor) -> tf.Tensor:
        return tf.vectorized_map(
            draw_losses, chunk, fallback_to_while_loop=False
        )

    def mapped(chunk: tf.Tensor) -> tf.Tensor:
        return tf.map_fn(draw_losses, chunk, fn_output_signature=losses)

    compiled = functools.partial(
        tf.function, jit_compile=jit_compile or None, autograph=False
    )
    try:
        with _quiet_tensorflow():
            evaluate = compiled(vectorized).get_concrete_function(noise)
    except (NotImplementedError, ValueError):
        # No vectorized form; or the objective's own error, raised again here.
        return compiled(mapped).get_concrete_function(noise)
    if jit_compile and _uses_tensor_lists(evaluate.graph.as_graph_def()):
        return compiled(mapped).get_concrete_function(noise)
    return evaluate


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
