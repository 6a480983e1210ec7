"""Seeded standard-normal noise: the only place where noise is drawn.

The noise of direction n of generation t comes from the seed fold_in(fold_in(
base seed, t), n), so it depends neither on how the population is cut into
chunks nor on what was drawn before it, and can be drawn again instead of being
kept. `GENERATOR` names what the numbers depend on: it changes when they do.
"""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf
import tensorflow_probability as tfp

__all__ = [
    "GENERATOR",
    "draw_noise",
    "draw_uniform",
    "generation_seed",
    "single_seed",
]

GENERATOR = "tfp-normal-1"

# Streams are folded in below all indices of directions.
_STREAMS = -(2**32)


def generation_seed(seed: tf.Tensor, generation: tf.Tensor) -> tf.Tensor:
    """The stateless seed [2] int64 of one generation.

    Args:
        seed: scalar int64, the base seed of the search.
        generation: scalar integer, the number of generations before this one.
    """
    base = tf.stack([tf.cast(seed, tf.int64), tf.zeros([], tf.int64)])
    return tf.random.fold_in(base, tf.cast(generation, tf.int64))


def single_seed(seed: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
    """The stateless seed [2] int32, as TFP takes it, of one direction.

    Args:
        seed: stateless seed [2] of the generation, from `generation_seed`.
        index: scalar int64, that of the direction in its generation.
    """
    return _as_tfp(tf.random.fold_in(seed, index))


@tf.function(reduce_retracing=True, autograph=False)
def draw_noise(
    base_seed: tf.Tensor,
    generation: tf.Tensor,
    index: tf.Tensor,
    shape: Sequence[int] | tf.Tensor,
    dtype: tf.DType,
    stream: tf.Tensor | None = None,
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

    Returns:
        Noise [n, *shape]. Row i depends on the base seed, the stream and the
        i-th generation and index only.
    """
    standard_normal = tfp.distributions.Normal(
        tf.zeros([], dtype), tf.ones([], dtype)
    )

    def head(generation: tf.Tensor) -> tf.Tensor:
        seed = generation_seed(base_seed, generation)
        if stream is not None:
            seed = tf.random.fold_in(seed, _STREAMS - stream)
        # fold_in(seed, n) is [h(seed), n]: h once for each generation.
        return tf.random.fold_in(seed, tf.zeros([], tf.int64))[0]

    generations, which = tf.unique(generation)
    heads = tf.gather(tf.map_fn(head, generations), which)
    seeds = tf.stack([heads, index], axis=1)
    return tf.map_fn(
        lambda seed: standard_normal.sample(shape, _as_tfp(seed)),
        seeds,
        fn_output_signature=tf.TensorSpec(
            None if tf.is_tensor(shape) else shape, dtype
        ),
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
    seed = generation_seed(base_seed, generation)
    seed = tf.random.fold_in(seed, _STREAMS - stream)
    return tf.random.stateless_uniform([count], seed, dtype=tf.float64)


def _as_tfp(seed: tf.Tensor) -> tf.Tensor:
    return tf.random.stateless_uniform([2], seed, None, None, tf.int32)
