"""Members of a generation, drawn to be decided on by `importance_mixing`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import tensorflow as tf

from keras_vo.search import credit
from keras_vo.search.chunks import ChunkPlan, NoiseSource
from keras_vo.search.gaussian import Gaussian
from keras_vo.search.layout import WeightLayout
from keras_vo.search.members import Members
from keras_vo.search.noise import draw_uniform

__all__ = ["SIGNS", "Drawing"]

SIGNS = (1.0,)  # members do not come in pairs
# The first stream of uniform numbers; noise on activations has those from 0.
_DECISIONS = 2**31


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How noise of members of a generation is gone through.

    Attributes:
        base_seed: of the search.
        generation: that of now.
        layout: of the weights.
        memory_budget: bytes of noise.
        generator: name of what draws it.
    """

    base_seed: tf.Tensor
    generation: tf.Tensor
    layout: WeightLayout
    memory_budget: int
    generator: str

    def log_ratios(
        self,
        members: Members,
        p: Gaussian,
        other: Gaussian,
        express: Callable[[tf.Tensor, tf.Tensor], tf.Tensor] | None,
    ) -> tf.Tensor:
        """log other(x) - log p(x) of members x of p, [N] float64."""
        dtype, size = self.layout.dtype, self.layout.size
        plan = ChunkPlan.make(
            members.directions, 1, size * dtype.size, self.memory_budget, None
        )
        source = NoiseSource(plan, members, size, dtype, express=express)
        found = credit.each(
            functools.partial(credit.reduce_noise, source),
            lambda noise: p.log_ratios(noise.weights, SIGNS, other)[0],
            members.directions,
        )
        return tf.cast(found, tf.float64)

    def uniform(self, size: int, number: tf.Tensor | int) -> tf.Tensor:
        """Those of the `number`-th decisions on so many members, float64."""
        stream = _DECISIONS + tf.cast(number, tf.int64)
        return draw_uniform(self.base_seed, self.generation, size, stream)

    def new(self, index: tf.Tensor) -> Members:
        """Members of this generation."""
        generation = tf.fill(tf.shape(index), self.generation)
        generation = tf.ensure_shape(generation, index.shape)
        return self.members(generation, index, None)

    def members(
        self, generation: tf.Tensor, index: tf.Tensor, origin: tf.Tensor | None
    ) -> Members:
        """Those of the numbers of each, see `Members`."""
        size, seed = int(index.shape[0]), self.base_seed
        table = generation, index, SIGNS, size, origin
        return Members(seed, *table, self.generator)
