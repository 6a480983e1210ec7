"""A population a chunk at a time: its noise, and sums over it.

A chunk is what is evaluated at once. The noise of weights is kept between the
evaluation and the gradient where it fits the memory budget, else drawn a
second time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from keras_vo.search import noise as noise_lib
from keras_vo.search.members import Members

__all__ = ["ChunkPlan", "Noise", "NoiseSource", "loop", "sum_over_chunks"]

# More directions than this in one chunk bring no speed, only memory; unless
# layers perturb activations, for which the members of all chunks but the first
# are evaluated a second time.
_MAX_CHUNK = 64
# Noise, perturbed weights and their copies of one chunk: what stays near the
# caches of a CPU. Measured: benchmarks/results/step_time.md.
_CHUNK_BYTES = 2**25


@dataclasses.dataclass(frozen=True)
class ChunkPlan:
    """How a population is cut into chunks of equal size.

    Attributes:
        directions: number of noise vectors in the population; a tensor where
            it depends on which are wanted.
        chunk: number of directions in a chunk; a tensor where it depends on
            the size of the batch. The last chunk may be padded.
        keep_noise: whether all noise of weights is kept until the gradient is
            summed.
    """

    directions: int | tf.Tensor
    chunk: int | tf.Tensor
    keep_noise: bool

    @property
    def chunks(self) -> int | tf.Tensor:
        """Number of chunks."""
        return -(-self.directions // self.chunk)

    @property
    def is_one(self) -> bool:
        """Whether there is one chunk, as is known before the step runs."""
        return not tf.is_tensor(self.chunks) and self.chunks == 1

    @classmethod
    def make(
        cls,
        directions: int,
        signs: int,
        noise_bytes: int,
        memory_budget: int,
        chunk_size: int | None,
        activation_bytes: int | tf.Tensor = 0,
    ) -> ChunkPlan:
        """Plans the chunks.

        Args:
            directions: number of noise vectors in the population.
            signs: members of a direction: 2 with antithetic pairs, else 1.
            noise_bytes: bytes of one noise vector of the weights.
            memory_budget: bytes for noise, perturbed weights and perturbed
                activations.
            chunk_size: members in a chunk at most; `None` to choose.
            activation_bytes: bytes of the perturbed activations of one
                direction.
        """
        # A direction, and per member its weights and their copy as a list.
        working = noise_bytes * (1 + 2 * signs) + activation_bytes
        unknown = tf.is_tensor(working)  # as is the size of the batch
        budget = min(_CHUNK_BYTES, memory_budget)
        if chunk_size is not None:
            chunk = min(directions, max(1, chunk_size // signs))
        elif unknown:
            fits = budget // tf.maximum(working, 1)  # 0: no examples
            chunk = tf.where(
                directions * working <= memory_budget,
                tf.constant(directions, tf.int64),
                tf.clip_by_value(fits, 1, min(directions, _MAX_CHUNK)),
            )
            chunk = tf.cast(chunk, tf.int32)
        elif activation_bytes and directions * working <= memory_budget:
            chunk = directions
        else:
            fits = max(budget // max(working, 1), 1)
            chunk = min(fits, directions, _MAX_CHUNK)
        chunk = -(-directions // -(-directions // chunk))  # evenly filled
        at_once = _CHUNK_BYTES if unknown else chunk * working
        kept = directions * noise_bytes + at_once
        return cls(directions, chunk, keep_noise=kept <= memory_budget)


class Noise(NamedTuple):
    """Standard-normal noise of one direction, or of a chunk of them.

    Attributes:
        weights: noise of the weights, [size].
        activations: noise of each call whose activations are perturbed, in
            the shape of its output.
    """

    weights: tf.Tensor
    activations: tuple[tf.Tensor, ...] = ()


@dataclasses.dataclass(frozen=True)
class NoiseSource:
    """The noise of a table of members, a chunk at a time.

    Attributes:
        plan: how the directions are cut into chunks.
        members: whose noise it is.
        size: number of normals of a direction that perturb weights.
        dtype: dtype of the noise.
        activations: tensors of the shapes of the activations' noise.
        kept: the chunks of the weights' noise, if they are kept.
        express: from noise [n, size] of the weights and the `origin` of its
            members [n] to what it is now; `None`: it is what it was.
        wanted: which of the members are to be evaluated, [D]; `None`: all.
    """

    plan: ChunkPlan
    members: Members
    size: int
    dtype: tf.DType
    activations: tuple[tf.Tensor, ...] = ()
    kept: tf.TensorArray | None = None
    express: Callable[[tf.Tensor, tf.Tensor], tf.Tensor] | None = None
    wanted: tf.Tensor | None = None

    def chunk(self, index: tf.Tensor) -> Noise:
        """Noise of a chunk, [chunk, ...]: kept or drawn again."""
        if self.kept is not None:
            weights = self.kept.read(index)
        else:
            weights = self._draw(index, (self.size,), None)
            if self.express is not None:
                origin = tf.gather(self.members.origin, self._rows(index))
                weights = self.express(weights, origin)
        return Noise(
            weights,
            tuple(
                tf.ensure_shape(
                    self._draw(index, tf.shape(like), stream),
                    [None, *like.shape],
                )
                for stream, like in enumerate(self.activations)
            ),
        )

    def _rows(self, chunk: tf.Tensor) -> tf.Tensor:
        """Those of the table that are in a chunk."""
        size = tf.cast(self.plan.chunk, tf.int32)
        first = tf.cast(chunk, tf.int32) * size
        # Padding repeats the last direction, with no weight in any sum.
        return tf.minimum(first + tf.range(size), self.plan.directions - 1)

    def _draw(
        self, chunk: tf.Tensor, shape: Any, stream: int | None
    ) -> tf.Tensor:
        rows = self._rows(chunk)
        return noise_lib.draw_noise(
            self.members.base_seed,
            tf.gather(self.members.generation, rows),
            tf.gather(self.members.index, rows),
            shape,
            self.dtype,
            # A number of Python would be traced anew for each stream.
            None if stream is None else tf.constant(stream, tf.int64),
            generator=self.members.generator,
        )

    def specs(self) -> Noise:
        """Static shapes of `chunk`."""
        count = None if tf.is_tensor(self.plan.chunk) else self.plan.chunk
        return Noise(
            tf.TensorSpec([count, self.size], self.dtype),
            tuple(
                tf.TensorSpec([count, *like.shape], self.dtype)
                for like in self.activations
            ),
        )


def loop(
    plan: ChunkPlan, body: Callable[..., Any], start: Sequence[Any]
) -> Sequence[Any]:
    """Runs `body` for the chunks after the first."""
    if plan.is_one:
        return start
    _, *values = tf.while_loop(
        lambda index, *_: index < plan.chunks,
        body,
        (tf.constant(1), *start),
        parallel_iterations=1,
    )
    return values


def sum_over_chunks(
    source: NoiseSource,
    first: Callable[[list[tf.Tensor]], Any],
    others: Callable[..., Any],
    weights: Sequence[tf.Tensor],
) -> Any:
    """The sum of `first(rows)` and of `others(index, noise, rows)`.

    Args:
        source: the noise.
        first: from the weights of the first chunk to its sums.
        others: from the index, the noise and the weights of another chunk to
            its sums, in the same structure.
        weights: tensors [directions, ...], cut into the same chunks.
    """
    plan = source.plan
    missing = plan.chunks * plan.chunk - plan.directions
    rows = [
        tf.reshape(
            tf.pad(w, [[0, missing]] + [[0, 0]] * (w.shape.rank - 1)),
            tf.concat([[plan.chunks, plan.chunk], tf.shape(w)[1:]], 0),
        )
        for w in weights
    ]
    start = first([row[0] for row in rows])

    def add(index: tf.Tensor, *totals: tf.Tensor) -> tuple[tf.Tensor, ...]:
        terms = others(index, source.chunk(index), [row[index] for row in rows])
        sums = [a + b for a, b in zip(totals, _flat(terms), strict=True)]
        return index + 1, *sums

    return tf.nest.pack_sequence_as(start, loop(plan, add, _flat(start)))


def _flat(structure: Any) -> list[tf.Tensor]:
    return list(tf.nest.flatten(structure))
