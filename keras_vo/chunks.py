"""The noise of a population, a chunk of draws at a time.

A chunk is what is evaluated at once. The noise of the weights is kept between
the evaluation and the gradient where it fits the memory budget, else drawn a
second time.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import tensorflow as tf

from keras_vo import noise as noise_lib

__all__ = ["ChunkPlan", "Draws", "NoiseSource"]

# More draws than this in one chunk bring no speed, only memory; unless layers
# perturb activations, for which the members of all chunks but the first are
# evaluated a second time.
_MAX_CHUNK = 64
# Noise, perturbed weights and their copies of one chunk: what stays near the
# caches of a CPU. Measured in BUILD_NOTES.md, "Chunks".
_CHUNK_BYTES = 2**25


@dataclasses.dataclass(frozen=True)
class ChunkPlan:
    """How a population of draws is cut into chunks of equal size.

    Attributes:
        draws: number of noise vectors in the population.
        chunk: number of draws in a chunk; a tensor where it depends on the
            size of the batch. The last chunk may be padded.
        keep_noise: whether all noise of the weights is kept until the gradient
            is summed.
    """

    draws: int
    chunk: int | tf.Tensor
    keep_noise: bool

    @property
    def chunks(self) -> int | tf.Tensor:
        """Number of chunks."""
        return -(-self.draws // self.chunk)

    @classmethod
    def make(
        cls,
        draws: int,
        members_per_draw: int,
        draw_bytes: int,
        memory_budget: int,
        chunk_size: int | None,
        activation_bytes: int | tf.Tensor = 0,
    ) -> ChunkPlan:
        """Plans the chunks.

        Args:
            draws: number of noise vectors in the population.
            members_per_draw: 2 with antithetic pairs, else 1.
            draw_bytes: bytes of one noise vector of the weights.
            memory_budget: bytes for noise, perturbed weights and perturbed
                activations.
            chunk_size: members in a chunk at most; `None` to choose.
            activation_bytes: bytes of the perturbed activations of one draw.
        """
        # A draw, and per member its weights and their copy as a list.
        working = draw_bytes * (1 + 2 * members_per_draw) + activation_bytes
        unknown = tf.is_tensor(working)  # as is the size of the batch
        budget = min(_CHUNK_BYTES, memory_budget)
        if chunk_size is not None:
            chunk = min(draws, max(1, chunk_size // members_per_draw))
        elif unknown:
            fits = budget // tf.maximum(working, 1)  # 0: no examples
            chunk = tf.where(
                draws * working <= memory_budget,
                tf.constant(draws, tf.int64),
                tf.clip_by_value(fits, 1, min(draws, _MAX_CHUNK)),
            )
            chunk = tf.cast(chunk, tf.int32)
        elif activation_bytes and draws * working <= memory_budget:
            chunk = draws
        else:
            chunk = min(max(budget // max(working, 1), 1), draws, _MAX_CHUNK)
        chunk = -(-draws // -(-draws // chunk))  # evenly filled
        at_once = _CHUNK_BYTES if unknown else chunk * working
        kept = draws * draw_bytes + at_once
        return cls(draws, chunk, keep_noise=kept <= memory_budget)


class Draws(NamedTuple):
    """Standard-normal noise of one draw, or of a chunk of draws.

    Attributes:
        weights: noise of the weights, [d].
        activations: noise of each call whose activations are perturbed, in
            the shape of its output.
    """

    weights: tf.Tensor
    activations: tuple[tf.Tensor, ...] = ()


@dataclasses.dataclass(frozen=True)
class NoiseSource:
    """The noise of one generation, a chunk at a time.

    Attributes:
        plan: how the draws are cut into chunks.
        seed: stateless seed [2] of the generation.
        size: number of the weights' noise d.
        dtype: dtype of the noise.
        activations: tensors of the shapes of the activations' noise.
        first: index of the first draw.
        kept: the chunks of the weights' noise, if they are kept.
    """

    plan: ChunkPlan
    seed: tf.Tensor
    size: int
    dtype: tf.DType
    activations: tuple[tf.Tensor, ...] = ()
    first: int = 0
    kept: tf.TensorArray | None = None

    def chunk(self, index: tf.Tensor) -> Draws:
        """Noise of a chunk, [chunk, ...]: kept or drawn again."""
        start = self.first + tf.cast(index * self.plan.chunk, tf.int64)
        draws = start + tf.range(tf.cast(self.plan.chunk, tf.int64))
        if self.kept is not None:
            weights = self.kept.read(index)
        else:
            weights = noise_lib.draw_noise(
                self.seed, draws, (self.size,), self.dtype
            )
        return Draws(
            weights,
            tuple(
                tf.ensure_shape(
                    noise_lib.draw_noise(
                        noise_lib.stream_seed(self.seed, stream),
                        draws,
                        tf.shape(like),
                        self.dtype,
                    ),
                    [None, *like.shape],
                )
                for stream, like in enumerate(self.activations)
            ),
        )

    def specs(self) -> Draws:
        """Static shapes of `chunk`."""
        count = None if tf.is_tensor(self.plan.chunk) else self.plan.chunk
        return Draws(
            tf.TensorSpec([count, self.size], self.dtype),
            tuple(
                tf.TensorSpec([count, *like.shape], self.dtype)
                for like in self.activations
            ),
        )
