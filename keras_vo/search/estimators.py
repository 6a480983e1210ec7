"""Search gradients: Monte-Carlo estimates of the gradient of the upper bound.

U(mu, sigma) = E[f(w)], w = mu + sigma z, z ~ N(0, I). From N members with
noise z_n and utilities u_n (losses less a baseline, or any shaping of them),
with beta = log sigma^2 and products taken elementwise:

    dU/dmu     = 1/N sum_n u_n z_n / sigma                         [1, eq. 12]
    dU/dbeta_g = 1/N sum_n u_n (|z_ng|^2 - D_g) / 2                [1, eq. 12]

where g is a group of D_g weights that share one variance. (Eq. 12 is in terms
of sigma^2: dU/dbeta = sigma^2 dU/dsigma^2; the factor 1/2 and |z|^2 - D are
corrections of misprints in eq. 9 and 11.)

References:
    [1] Havtorn, "Variational Optimization of Neural Networks", 2018 (slides).
    [2] Wierstra et al., "Natural Evolution Strategies", JMLR 15, 2014.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import tensorflow as tf

from keras_vo.search.layout import WeightLayout

__all__ = [
    "Direction",
    "based_mean_scale",
    "log_variance_gradient",
    "mean_gradient",
    "natural_log_variance_gradient",
    "natural_mean_scale",
    "pair_utilities",
    "weighted_excess",
    "weighted_noise",
]


class Direction(NamedTuple):
    """The gradient of U, and the metric of its space.

    Attributes:
        mean: dU/dmu [d].
        log_variance: dU/dbeta [groups]; 0 if sigma is fixed.
        fisher: Fisher information of beta, alike.
        squares: by level of credit, the sum of the squared norms of the terms
            that single noise vectors contribute to `mean`, as the inner
            optimizer gets it; `None` if it is not measured.
    """

    mean: tf.Tensor
    log_variance: tf.Tensor
    fisher: tf.Tensor
    squares: Mapping[str, tf.Tensor] | None = None


def pair_utilities(utilities: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """What each direction's noise is weighted with, for mu and for beta.

    An antithetic direction z serves two members, mu + sigma z and mu - sigma z
    [1, eq. 22]. As z is odd and z^2 even, their terms add up to

        u+ z + u- (-z) = (u+ - u-) z,   (u+ + u-)(z^2 - 1).

    Args:
        utilities: [directions, signs], 1 or 2 signs.

    Returns:
        Weights for z and weights for z^2 - 1, each [directions].
    """
    if utilities.shape[1] == 1:
        return utilities[:, 0], utilities[:, 0]
    plus, minus = tf.unstack(utilities, axis=1)
    return plus - minus, plus + minus


def weighted_noise(noise: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    """sum_n a_n z_n: noise [n, d] and weights [n] to [d]."""
    return tf.linalg.matvec(noise, weights, transpose_a=True)


def weighted_excess(
    noise: tf.Tensor, weights: tf.Tensor, layout: WeightLayout
) -> tf.Tensor:
    """sum_n b_n (|z_ng|^2 - D_g): noise [..., n, d], weights [..., n] to
    [..., groups]. By weight first, so that noise is gone through once.
    """
    squares = tf.linalg.matvec(tf.square(noise), weights, transpose_a=True)
    excess = squares - tf.reduce_sum(weights, axis=-1, keepdims=True)
    return layout.group_sums(excess)


def mean_gradient(
    noise_sum: tf.Tensor, stddev: tf.Tensor, members: tf.Tensor
) -> tf.Tensor:
    """dU/dmu [d] from `weighted_noise` summed over so many members."""
    return noise_sum / (members * stddev)


def log_variance_gradient(
    excess_sum: tf.Tensor, members: tf.Tensor
) -> tf.Tensor:
    """dU/dbeta [groups] from `weighted_excess` summed over so many members."""
    return excess_sum / (2 * members)


def natural_mean_scale(stddev: tf.Tensor) -> tf.Tensor:
    """F^-1 of mu: F_mu = 1 / sigma^2 [1, eq. 20-21]."""
    return tf.square(stddev)


def based_mean_scale(
    stddev: tf.Tensor, base: tf.Tensor, loss_scaled: bool
) -> tf.Tensor:
    """What makes dU/dmu the natural gradient that stddev s would give.

    It is F^-1 if sigma is s. Else it is what that would be, were the utilities
    those that s gives: where they have a scale of their own (ranks), s sigma,
    in which sigma cancels; where they have that of the losses, they grow with
    sigma themselves, and it is s^2.

    Args:
        stddev: sigma.
        base: s, broadcasts against it.
        loss_scaled: whether utilities have the scale of the losses.
    """
    return base * (base if loss_scaled else stddev)


def natural_log_variance_gradient(
    gradient: tf.Tensor, fisher: tf.Tensor
) -> tf.Tensor:
    """F^-1 dU/dbeta; a variance shared by D weights has F_beta = D / 2.

    (One weight has F_beta = 1/2: eq. 20 of [1] gives 1 / (2 sigma^4) for
    sigma^2, and d sigma^2 / d beta = sigma^2. Weights add up. That is full
    noise; other kinds have less, see `keras_vo.perturbations`.)

    Args:
        gradient: dU/dbeta [groups].
        fisher: F_beta [groups].
    """
    return tf.math.divide_no_nan(gradient, fisher)
