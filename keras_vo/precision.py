"""Weights of low precision: the search keeps their mean in float32.

A bfloat16 weight of 1 can be 1 or 1.0078, nothing between. So that small steps
add up, mu of such a variable is a float32 variable of the search, which the
inner optimizer moves (with slots in float32, so that Adam's beta_2 = 0.999
is not 1, and no square of a small gradient 0). The variable holds its
rounding R(mu).

Members are evaluated at R(mu + sigma z). What is minimised is E[f(R(w))],
w ~ N(mu, sigma^2): as for a constraint (see `keras_vo.constraints`), f o R is
what is searched over, and the score of w is as it was. The normal
distribution smooths the steps of R. With a spacing D of the numbers,

    d E[R(w)] / dmu = 1 + 2 sum_m (-1)^m exp(-2 (pi m sigma / D)^2)
                                         cos(2 pi m mu / D)

(by the Fourier series of R), so that nothing is lost where sigma is D / 2 (it
is within 1.5% of 1). At D / 4 it varies by a factor of 4 with where mu is, and
with less it vanishes beside a number: most members are equal then.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_vo.checks import variable_name

__all__ = ["is_low", "kept", "resolution", "warn_where_too_coarse", "wide"]

# The spacing of numbers from 1 to 2, of each dtype that is low precision.
_SPACING = {"float16": 2.0**-10, "bfloat16": 2.0**-7}
# Of which sigma is to be a quarter or more.
_LEAST_PART = 0.25


def is_low(variable: Any) -> bool:
    """Whether its mean is kept in float32."""
    return keras.backend.standardize_dtype(variable.dtype) in _SPACING


def wide(dtype: Any) -> str:
    """The name of the dtype in which the mean of a variable is kept."""
    name = keras.backend.standardize_dtype(dtype)
    return "float32" if name in _SPACING else name


def kept(mean: tf.Tensor, weight: tf.Tensor) -> tf.Tensor:
    """mu in float32.

    Args:
        mean: as it was kept.
        weight: the variable's value; where it is not the rounding of `mean`,
            someone has set it.
    """
    same = tf.equal(tf.cast(mean, weight.dtype), weight)
    return tf.where(same, mean, tf.cast(weight, mean.dtype))


def resolution(variable: Any) -> float:
    """The spacing of numbers of the size of a variable's weights."""
    weights = tf.cast(tf.convert_to_tensor(variable), tf.float32)
    scale = tf.sqrt(tf.reduce_mean(tf.square(weights)))
    name = keras.backend.standardize_dtype(variable.dtype)
    return float(scale) * _SPACING[name]


def warn_where_too_coarse(variables: Sequence[Any], stddev: Any) -> None:
    """Warns, once, of variables whose members would mostly be equal.

    Args:
        variables: the weights.
        stddev: sigma at the start, the same for all: a number or a tensor.
    """
    coarse = [
        f"{variable_name(v)!r} ({keras.backend.standardize_dtype(v.dtype)}, "
        f"steps of {resolution(v):.2g})"
        for v in variables
        if is_low(v) and float(stddev) < _LEAST_PART * resolution(v)
    ]
    if coarse:
        warnings.warn(
            f"stddev={float(stddev):.3g} is less than {_LEAST_PART:g} of the "
            "steps in which these weights can change, so that most members "
            "would be equal. Expected: a larger `stddev`, or weights in "
            "float32 (a policy such as 'mixed_bfloat16'). Received: "
            f"{', '.join(coarse)}",
            stacklevel=2,
        )
