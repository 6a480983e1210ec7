"""Sensitivities: how much a weight's noise changes what a network puts out.

A perturbation eps of the weights changes the outputs y_k(x_i) of I examples by
the divergence

    D(eps|w) = 1/I sum_k sum_i (y_k(x_i|w) - y_k(x_i|w + eps))^2    [1, eq. 32]

"Safe" perturbations [2] are eps / s, with a sensitivity s of each weight
[1, eq. 33]. To first order the outputs change by eps dy/dw [1, eq. 34], so

    sum     s = sqrt(sum_k (1/I sum_i  dy_k(x_i)/dw )^2)
    abs     s = sqrt(sum_k (1/I sum_i |dy_k(x_i)/dw|)^2)            [1, eq. 35]

(with |.| inside the mean over the examples). They take derivatives of the
network's outputs, none of the loss. A pre-activation Z = A W depends on W by
its inputs A alone, which needs no derivative at all:

    inputs  s = sqrt(1/I sum_i A_j(x_i)^2)

for all weights W_ji of row j of a kernel; a bias has the input 1.

The search distribution is N(mu, sigma^2 / s^2): its scores have sigma / s, and
search gradients stay unbiased, whatever s is. Within each layer s is clamped to
at least a hundredth of its largest value, and divided so that the root mean
square of 1 / s is 1: sigma stays the size of the layer's noise.

References:
    [1] Havtorn, "Variational Optimization of Neural Networks", 2018 (slides).
    [2] Lehman et al., "Safe Mutations for Deep and Recurrent Neural Networks
        through Output Gradients", GECCO 2018.
"""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

__all__ = ["LEAST", "divergence", "normalized"]

# The least sensitivity of a weight, in units of the largest one of its layer.
LEAST = 0.01


def normalized(
    raw: Sequence[tf.Tensor],
    layers: Sequence[int],
    former: tf.Tensor,
) -> tf.Tensor:
    """s [d] from sensitivities as they are measured.

    Where a layer has none that is above 0, s is 1. What is not finite counts as
    the largest one of its layer, so that it gets the least noise; a layer of
    which nothing is finite (as by a NaN in the batch) keeps its former s.

    Args:
        raw: sensitivities of each weight tensor, not negative.
        layers: the layer of each tensor, numbered from 0.
        former: s as it was, [d], of the dtype that s has.
    """
    dtype = former.dtype
    flat = [tf.reshape(tf.cast(part, dtype), [-1]) for part in raw]
    kept = tf.split(former, [part.shape[0] for part in flat])
    found: dict[int, tf.Tensor] = {}
    for layer in sorted(set(layers)):
        own = [i for i, of in enumerate(layers) if of == layer]
        values = tf.concat([flat[i] for i in own], axis=0)
        sizes = [flat[i].shape[0] for i in own]
        before = tf.concat([kept[i] for i in own], axis=0)
        parts = tf.split(_of_layer(values, before), sizes)
        found |= dict(zip(own, parts, strict=True))
    return tf.concat([found[i] for i in range(len(flat))], axis=0)


def _of_layer(values: tf.Tensor, former: tf.Tensor) -> tf.Tensor:
    finite = tf.math.is_finite(values)
    largest = tf.reduce_max(tf.where(finite, values, 0))
    known = tf.where(finite, values, largest)
    relative = tf.clip_by_value(
        tf.math.divide_no_nan(known, largest), LEAST, 1.0
    )
    mean = tf.reduce_mean(tf.math.reciprocal(tf.square(relative)))
    scaled = relative * tf.sqrt(mean)
    found = tf.where(largest > 0, scaled, tf.ones_like(scaled))
    return tf.where(tf.reduce_any(finite), found, former)


def divergence(
    outputs: Sequence[tf.Tensor], perturbed: Sequence[tf.Tensor]
) -> tf.Tensor:
    """D(eps|w) [1, eq. 32], a scalar float64.

    Args:
        outputs: of the network at w, each [batch, ..., units]; positions count
            as examples.
        perturbed: those at w + eps.
    """
    total = tf.zeros([], tf.float64)
    for before, after in zip(outputs, perturbed, strict=True):
        change = tf.cast(after, tf.float64) - tf.cast(before, tf.float64)
        units = tf.shape(change)[-1] if change.shape.rank > 1 else 1
        count = tf.size(change, tf.int64) // tf.cast(units, tf.int64)
        squares = tf.reduce_sum(tf.square(change))
        total += squares / tf.cast(tf.maximum(count, 1), tf.float64)
    return total
