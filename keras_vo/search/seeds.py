"""Stateless seeds of a generation, and of what is drawn in it."""

from __future__ import annotations

import tensorflow as tf

__all__ = ["as_tfp", "generation_seed", "single_seed", "stream_seed"]

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


def stream_seed(seed: tf.Tensor, stream: tf.Tensor) -> tf.Tensor:
    """That of a stream of a generation, [2] int64.

    Args:
        seed: of the generation.
        stream: scalar int64, from 0 on.
    """
    return tf.random.fold_in(seed, _STREAMS - stream)


def single_seed(seed: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
    """The stateless seed [2] int32, as TFP takes it, of what has an index.

    Args:
        seed: stateless seed [2] of the generation, from `generation_seed`.
        index: scalar int64; below 0 for what is no direction.
    """
    return as_tfp(tf.random.fold_in(seed, index))


def as_tfp(seed: tf.Tensor) -> tf.Tensor:
    """A stateless seed [2] int64 as TFP takes it, [2] int32."""
    return tf.random.stateless_uniform([2], seed, None, None, tf.int32)
