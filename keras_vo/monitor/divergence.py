"""The divergence of a member's outputs, with and without sensitivities.

D(eps|w) of `keras_vo.search.sensitivity`, of one draw of full-rank noise that
no member has, on the examples of each replica: eps = sigma z / s, and sigma z.
Where there are no sensitivities, one more member is evaluated for it; else two.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import tensorflow as tf

from keras_vo.search.gaussian import Gaussian
from keras_vo.search.noise import draw_noise
from keras_vo.search.sensitivity import divergence

__all__ = ["DIVERGENCES", "Outputs", "divergences"]

DIVERGENCES = ("divergence", "divergence_unscaled")
_STREAM = 2**31  # of noise


class Outputs(Protocol):
    """Of a network, each [batch, ..., units].

    Attributes:
        at_mean: those at mu.
    """

    @property
    def at_mean(self) -> list[tf.Tensor]: ...

    def apart(self, function: Callable[[], Any]) -> Any:
        """`function()`; variables that it assigns are set back."""

    def in_training(self, weights: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Those of a member."""


def divergences(
    gaussian: Gaussian,
    outputs: Outputs | None,
    seeds: tuple[tf.Tensor, tf.Tensor],
    now: tf.Tensor,
) -> list[tf.Tensor]:
    """Of sigma z / s and of sigma z, scalars float64.

    Args:
        gaussian: the search distribution.
        outputs: of the network on this replica's examples; `None`, and if none
            is floating: there is none.
        seeds: base seed and generation.
        now: whether it is measured; else both are NaN, as without outputs.
    """
    unknown = [tf.constant(math.nan, tf.float64)] * 2
    if outputs is None or not outputs.at_mean:
        return unknown
    layout = gaussian.layout

    def measured() -> list[tf.Tensor]:
        base_seed, generation = (tf.cast(seed, tf.int64) for seed in seeds)
        z = draw_noise(
            base_seed,
            generation[None],
            tf.zeros([1], tf.int64),
            (layout.size,),
            layout.dtype,
            tf.constant(_STREAM, tf.int64),
        )[0]

        def of(noise: tf.Tensor) -> tf.Tensor:
            weights = layout.unflatten(gaussian.mean + noise)
            return outputs.apart(
                lambda: divergence(
                    outputs.at_mean, outputs.in_training(weights)
                )
            )

        plain = dataclasses.replace(gaussian, sensitivity=None)
        unscaled = layout.expand(plain.stddev) * z
        if gaussian.sensitivity is None:
            return [of(unscaled)] * 2
        return [of(unscaled / gaussian.sensitivity), of(unscaled)]

    return list(tf.cond(now, measured, lambda: unknown))
