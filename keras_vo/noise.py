"""Seeded standard-normal noise, one stream a member of the population.

Draw n of generation t comes from the seed fold_in(fold_in(seed, t), n), so a
member's noise depends neither on how the population is cut into chunks nor on
what was drawn before it, and can be drawn again instead of being kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf
import tensorflow_probability as tfp

__all__ = ["draw_noise", "draw_seed", "generation_seed", "stream_seed"]

# Streams are folded in below all indices of draws.
_STREAMS = -(2**32)


def generation_seed(seed: tf.Tensor, generation: tf.Tensor) -> tf.Tensor:
    """The stateless seed [2] int64 of one generation.

    Args:
        seed: scalar int64, the base seed of the search.
        generation: scalar integer, the number of generations before this one.
    """
    base = tf.stack([tf.cast(seed, tf.int64), tf.zeros([], tf.int64)])
    return tf.random.fold_in(base, tf.cast(generation, tf.int64))


def stream_seed(seed: tf.Tensor, stream: int) -> tf.Tensor:
    """The seed [2] of a further stream of draws in the same generation."""
    return tf.random.fold_in(seed, tf.constant(_STREAMS - stream, tf.int64))


def draw_seed(seed: tf.Tensor, draw: tf.Tensor) -> tf.Tensor:
    """The stateless seed [2] int32, as TFP takes it, of one draw.

    Args:
        seed: stateless seed [2] of the generation, from `generation_seed`.
        draw: scalar int64, the index of the draw in its generation.
    """
    return tf.random.stateless_uniform(
        [2], tf.random.fold_in(seed, draw), None, None, tf.int32
    )


@tf.function(reduce_retracing=True, autograph=False)
def draw_noise(
    seed: tf.Tensor,
    draws: tf.Tensor,
    shape: Sequence[int] | tf.Tensor,
    dtype: tf.DType,
) -> tf.Tensor:
    """Draws z ~ N(0, I), one row for each entry of `draws`.

    Args:
        seed: stateless seed [2] of the generation, from `generation_seed`.
        draws: indices [n] of the draws in their generation, int64.
        shape: shape of one draw.
        dtype: floating dtype of the noise.

    Returns:
        Noise [n, *shape]. Row i depends on `seed` and `draws[i]` only.
    """
    standard_normal = tfp.distributions.Normal(
        tf.zeros([], dtype), tf.ones([], dtype)
    )
    return tf.map_fn(
        lambda draw: standard_normal.sample(shape, draw_seed(seed, draw)),
        draws,
        fn_output_signature=tf.TensorSpec(
            None if tf.is_tensor(shape) else shape, dtype
        ),
    )
