"""Seeded standard-normal noise: the only place where noise is drawn.

The noise of direction n of generation t depends on the base seed, t and n, so
neither on how the population is cut into chunks nor on what was drawn before
it, and can be drawn again instead of being kept. How it depends on them is
said by one of `keras_vo.search.generators`.
"""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from keras_vo.search.generators import GENERATORS, NEWEST
from keras_vo.search.seeds import generation_seed, stream_seed

__all__ = ["draw_noise", "draw_uniform"]


@tf.function(reduce_retracing=True, autograph=False)
def draw_noise(
    base_seed: tf.Tensor,
    generation: tf.Tensor,
    index: tf.Tensor,
    shape: Sequence[int] | tf.Tensor,
    dtype: tf.DType,
    stream: tf.Tensor | None = None,
    generator: str = NEWEST,
) -> tf.Tensor:
    """Draws z ~ N(0, I), a row for each direction.

    Args:
        base_seed: scalar int64, the base seed of the search.
        generation: of each direction, [n] int64.
        index: of each direction in its generation, [n] int64.
        shape: shape of one row.
        dtype: floating dtype of the noise.
        stream: number of a further stream of the same directions, scalar
            int64; `None`: the first.
        generator: name of one of `GENERATORS`.

    Returns:
        Noise [n, *shape]. Row i depends on the base seed, the stream, the
        i-th generation and index, and the size of a row only.
    """
    return GENERATORS[generator](
        base_seed, generation, index, shape, dtype, stream
    )


def draw_uniform(
    base_seed: tf.Tensor, generation: tf.Tensor, count: int, stream: tf.Tensor
) -> tf.Tensor:
    """Draws u ~ U(0, 1) for what is decided in a generation, [count] float64.

    Args:
        base_seed: scalar int64, the base seed of the search.
        generation: scalar integer.
        count: how many.
        stream: scalar int64, one that no noise of the generation has.
    """
    seed = stream_seed(generation_seed(base_seed, generation), stream)
    return tf.random.stateless_uniform([count], seed, dtype=tf.float64)
