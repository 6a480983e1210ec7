"""Generators of standard-normal noise, by name.

A name stands for its numbers: what draws others gets another name, so that a
search that was saved goes on with its own. A generator is called as
`keras_vo.search.noise.draw_noise` is, which says what it returns.

"philox-hadamard-2" takes a byte for each normal from the counter-based
generator Philox [1]. (Its key is Philox's number for the base seed, generation
and stream; its counter begins at the direction's index times what a row takes.)
The last bit is set, which leaves an odd number o from -127 to 127. Of 64 of
them come 64 normals,

    z = D H y / (8 s),   y = o (o^2 + 5615),

with H the Hadamard matrix of 64 x 64 signs, s^2 the mean of y^2, as in [2, 3],
and D the signs of a bent function [4]. D H / 8 is orthogonal: z are
uncorrelated, and sums of 64 independent numbers, so near normal. y has the
kurtosis of a normal, 3 (to 7e-5), and so all moments of z up to the fifth,
those of several numbers of a block too, are those of independent normals. (The
bytes themselves have a kurtosis of 1.8, and so would projections of z on a row
of H, which estimates for sigma see.) D makes the projections on rows of H, as
the sum of a block is one, sums of 64 independent numbers, too.
"philox-hadamard-1" has no D: there they are single y, none beyond 2.33
standard deviations.

Up to the factor 1 / (8 s) all of it is exact in float32, in whatever order sums
are taken: y / 8 is an integer, and sums of more than 2^24 are 14 standard
deviations away. So the noise is the same, bit by bit, with XLA and without, on
CPUs and GPUs; and that in float64 differs by a rounding.

References:
    [1] Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
    [2] Rader, "A New Method of Generating Gaussian Random Variables by
        Computer", Lincoln Laboratory Technical Note 1969-49, 1969.
    [3] Thomas, "Parallel Generation of Gaussian Random Numbers Using the
        Table-Hadamard Transform", FCCM 2013.
    [4] Rothaus, "On Bent Functions", Journal of Combinatorial Theory A 20,
        1976.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import tensorflow as tf

from keras_vo.search.probability import distributions
from keras_vo.search.seeds import as_tfp, generation_seed, stream_seed

__all__ = ["FIRST", "GENERATORS", "NEWEST"]

Shape: TypeAlias = Sequence[int] | tf.Tensor

_BLOCK = 64  # normals that are made of each other's bytes
_WORDS = _BLOCK // 4  # of 32 bits, for a block
_STEP = 4  # words for each step of the counter
_CUBIC = 5615.0


def _heads(
    head: Callable[[tf.Tensor], tf.Tensor], generation: tf.Tensor
) -> tf.Tensor:
    """`head` of each row [n], once for each generation."""
    generations, which = tf.unique(generation)
    return tf.gather(tf.map_fn(head, generations), which)


def _tfp_normal(
    base_seed: tf.Tensor,
    generation: tf.Tensor,
    index: tf.Tensor,
    shape: Shape,
    dtype: tf.DType,
    stream: tf.Tensor | None,
) -> tf.Tensor:
    """TensorFlow Probability's normals, of a seed for each row.

    Under XLA it draws others from the same seeds.
    """
    standard_normal = distributions().Normal(
        tf.zeros([], dtype), tf.ones([], dtype)
    )

    def head(generation: tf.Tensor) -> tf.Tensor:
        seed = generation_seed(base_seed, generation)
        if stream is not None:
            seed = stream_seed(seed, stream)
        # fold_in(seed, n) is [h(seed), n]: h once for each generation.
        return tf.random.fold_in(seed, tf.zeros([], tf.int64))[0]

    seeds = tf.stack([_heads(head, generation), index], axis=1)
    return tf.map_fn(
        lambda seed: standard_normal.sample(shape, as_tfp(seed)),
        seeds,
        fn_output_signature=tf.TensorSpec(
            None if tf.is_tensor(shape) else shape, dtype
        ),
    )


def _philox_hadamard(
    base_seed: tf.Tensor,
    generation: tf.Tensor,
    index: tf.Tensor,
    shape: Shape,
    dtype: tf.DType,
    stream: tf.Tensor | None,
    *,
    bent: bool,
) -> tf.Tensor:
    """See the module; rows that follow each other are one operation.

    Args:
        bent: whether there is D.
    """
    sizes = tf.cast(shape, tf.int32)
    size = tf.reduce_prod(sizes) if tf.is_tensor(shape) else math.prod(shape)
    blocks = -(-size // _BLOCK)
    rows = tf.size(index)

    def key(generation: tf.Tensor) -> tf.Tensor:
        number = -1 if stream is None else stream
        counter = tf.stack([generation, tf.cast(number, tf.int64)])
        return _philox(base_seed, counter, 1, tf.int64)[0]

    def words(key: tf.Tensor, row: tf.Tensor, rows: Any) -> tf.Tensor:
        """Those of whole rows, [n] int32."""
        of_row = tf.cast(blocks, tf.int64) * _WORDS
        counter = tf.stack([row * of_row // _STEP, tf.zeros([], tf.int64)])
        return _philox(key, counter, of_row * tf.cast(rows, tf.int64), tf.int32)

    def following() -> tf.Tensor:
        return words(key(generation[0]), index[0], rows)

    def any_rows() -> tf.Tensor:
        each = tf.map_fn(
            lambda row: words(row[0], row[1], 1),
            (_heads(key, generation), index),
            fn_output_signature=tf.TensorSpec(
                [None if tf.is_tensor(blocks) else blocks * _WORDS], tf.int32
            ),
        )
        return tf.reshape(each, [-1])

    follows = index - tf.range(tf.size(index, tf.int64)) == index[:1]
    follows &= generation == generation[:1]
    drawn = tf.cond(tf.reduce_all(follows), following, any_rows)
    normals = _normals(drawn, tf.constant(_matrix(bent)), dtype)
    normals = tf.reshape(normals, [rows, blocks * _BLOCK])
    every = tf.concat([[rows], sizes], axis=0)
    return tf.reshape(normals[:, :size], every)


def _philox(
    key: tf.Tensor, counter: tf.Tensor, size: Any, dtype: tf.DType
) -> tf.Tensor:
    """Random bits [size]: of a key, int64, and a counter, [2] int64."""
    return tf.raw_ops.StatelessRandomUniformFullIntV2(
        shape=tf.reshape(size, [1]),
        key=tf.bitcast(key[None], tf.uint64),
        counter=tf.bitcast(counter, tf.uint64),
        alg=1,  # as TensorFlow numbers Philox
        dtype=dtype,
    )


def _normals(words: tf.Tensor, matrix: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """Those of words of whole blocks, [blocks, 64]."""
    one = tf.constant(1, tf.int8)
    odd = tf.bitwise.bitwise_or(tf.bitcast(words, tf.int8), one)
    odd = tf.reshape(tf.cast(odd, tf.float32), [-1, _BLOCK])
    sums = _signed_sums(odd * (tf.square(odd) + _CUBIC), matrix)
    sums = tf.cast(sums, dtype)
    return sums * tf.constant(_scale(), dtype)


def _signed_sums(values: tf.Tensor, signs: tf.Tensor) -> tf.Tensor:
    """`values` [n, 64], integers, times a matrix of signs."""
    if not tf.config.list_physical_devices("GPU"):
        return values @ signs
    high, low = _halves(values)
    return high @ signs + low @ signs


def _halves(values: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Two terms of 11 bits, which is what TensorFloat-32 keeps of a factor."""
    high = tf.round(values / 2**13) * 2**13
    return high, values - high


def _matrix(bent: bool) -> np.ndarray:
    """(D H)^T: H is Sylvester's matrix [64, 64].

    D_i = (-1)^(i1 i2 + i3 i4 + i5 i6) of the bits of i: H D H has no entry but
    8 and -8.
    """
    matrix, signs = np.ones([1, 1], np.float32), np.ones([1], np.float32)
    while len(matrix) < _BLOCK:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    while len(signs) < _BLOCK:
        signs = np.concatenate([signs, signs, signs, -signs])
    return matrix * signs if bent else matrix


def _scale() -> float:
    """1 / (8 s)."""
    odd = np.arange(-127.0, 128.0, 2.0)
    squares = np.square(odd * (np.square(odd) + _CUBIC))
    return float((_BLOCK * np.mean(squares)) ** -0.5)


FIRST = "tfp-normal-1"
NEWEST = "philox-hadamard-2"
GENERATORS: Mapping[str, Callable[..., tf.Tensor]] = {
    FIRST: _tfp_normal,
    "philox-hadamard-1": functools.partial(_philox_hadamard, bent=False),
    NEWEST: functools.partial(_philox_hadamard, bent=True),
}
