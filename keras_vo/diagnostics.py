"""What a step of the search looks like, in a handful of numbers.

`StepObserver` computes them in the graph of the step, from tensors that are
there anyway, and leaves them in one variable, which the host reads when it
wants to. An optimizer without an observer has not a single op of it.

References:
    [1] Havtorn, "Variational Optimization of Neural Networks", 2018 (slides).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from keras_vo import distribution
from keras_vo.layout import WeightLayout
from keras_vo.signal_to_noise import signal_to_noise
from keras_vo.spaces import SearchGradient

__all__ = ["NUMBERS", "ObservedStep", "StepObserver", "step_kl"]

# In the order of the variable; sigma of each layer comes after them.
NUMBERS = (
    "step",
    "parameter_norm",
    "gradient_norm",
    "gradient_cosine",
    "gradient_snr",
    "kl",
    "utility_spread",
    "nonfinite_share",
    "evaluations",
)
# Weights of a layer at most whose sigma is sorted for the median.
_MEDIAN_SAMPLE = 1001


class ObservedStep(NamedTuple):
    """What a step of the search hands to its observer.

    Attributes:
        layout: of the weights.
        generation: number of populations before this one.
        mean: mu [d] before the step.
        new_mean: mu [d] after it.
        log_variance: beta [groups] before the step.
        new_log_variance: beta [groups] after it.
        gradient: that of the mean is as the inner optimizer gets it.
        signs: members of a draw.
        losses: of the members [N].
        utilities: of the members [N].
        evaluated: which members [N] were.
    """

    layout: WeightLayout
    generation: tf.Tensor
    mean: tf.Tensor
    new_mean: tf.Tensor
    log_variance: tf.Tensor
    new_log_variance: tf.Tensor
    gradient: SearchGradient
    signs: int
    losses: tf.Tensor
    utilities: tf.Tensor
    evaluated: tf.Tensor


class StepObserver:
    """Sees the steps of one optimizer.

    Attributes:
        names: of the numbers, known once it is built.
        strategy: that the optimizer is made under; `None`: no one.
    """

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self.strategy: Any = None

    def build(
        self, layout: WeightLayout, groups: Sequence[int], names: Sequence[str]
    ) -> None:
        """Makes the variables; under a strategy, in its scope.

        Args:
            layout: of the weights.
            groups: for each weight tensor, its layer.
            names: of the layers.
        """
        self.strategy = distribution.current_strategy()
        self._layers = [
            [i for i, group in enumerate(groups) if group == layer]
            for layer in range(len(names))
        ]
        self.names = NUMBERS + tuple(
            f"sigma/{name}/{statistic}"
            for name in names
            for statistic in ("min", "median", "max")
        )
        with tf.init_scope():
            self._numbers = distribution.replica_local_variable(
                tf.zeros([len(self.names)], tf.float64)
            )
            self._previous = distribution.replica_local_variable(
                tf.zeros([layout.size], layout.dtype)
            )

    def observe(self, step: ObservedStep) -> None:
        """Computes the numbers, in a graph or eagerly, and keeps them."""
        finite = tf.math.is_finite(step.losses) & step.evaluated
        any_finite = tf.reduce_any(finite)
        evaluated = _count(step.evaluated)
        gradient = step.gradient.mean
        norm = _norm(gradient)
        previous = tf.convert_to_tensor(self._previous)
        cosine = _dot(gradient, previous) / (norm * _norm(previous))
        snr = signal_to_noise(
            tf.square(norm),
            step.gradient.squares,
            tf.cast(evaluated, norm.dtype) / step.signs,
        )
        spread = _spread(step.utilities, step.evaluated)
        # Without a finite loss there is no gradient, and no step.
        of_gradient = tf.where(
            any_finite, tf.stack([norm, cosine, snr, spread]), math.nan
        )
        norm, cosine, snr, spread = tf.unstack(of_gradient)
        total = tf.convert_to_tensor(self._numbers)[NUMBERS.index("evaluations")]
        numbers = [
            step.generation + 1,
            _norm(step.new_mean),
            norm,
            cosine,
            snr,
            step_kl(
                step.new_mean - step.mean,
                step.log_variance,
                step.new_log_variance,
                step.layout,
            ),
            spread,
            (evaluated - _count(finite)) / evaluated,
            total + evaluated,
        ]
        sigma = tf.exp(0.5 * self._log_variances(step))
        self._numbers.assign(
            tf.concat(
                [
                    tf.stack([tf.cast(x, tf.float64) for x in numbers]),
                    tf.cast(sigma, tf.float64),
                ],
                axis=0,
            )
        )
        self._previous.assign(tf.where(any_finite, gradient, previous))

    def read(self) -> np.ndarray:
        """The numbers of the last step; 0 before the first."""
        return distribution.first_local(self._numbers, self.strategy).numpy()

    def _log_variances(self, step: ObservedStep) -> tf.Tensor:
        """Least, median and largest beta of each layer, [3 layers]."""
        parts = step.layout.per_tensor(step.new_log_variance)
        values = []
        for layer in self._layers:
            if step.layout.groups is not None:
                values += [parts[layer[0]]] * 3
                continue
            flat = [tf.reshape(parts[i], [-1]) for i in layer]
            values += [
                tf.reduce_min([tf.reduce_min(part) for part in flat]),
                _median(tf.concat(flat, axis=0)),
                tf.reduce_max([tf.reduce_max(part) for part in flat]),
            ]
        return tf.stack(values)


def step_kl(
    mean_change: tf.Tensor,
    log_variance: tf.Tensor,
    new_log_variance: tf.Tensor,
    layout: WeightLayout,
) -> tf.Tensor:
    """KL of a step, eq. (14) of [1], by group: a scalar.

    `search_distribution.kl_divergence` of the same step, but with one
    logarithm for each variance instead of for each weight:

        sum_g D_g (exp(x_g) - 1 - x_g) / 2 + |mu'_g - mu_g|^2 / (2 sigma'_g^2)

    with x = beta - beta'.

    Args:
        mean_change: mu' - mu, [d].
        log_variance: beta, [groups].
        new_log_variance: beta', [groups].
        layout: which weights share a variance.
    """
    change = layout.group_sums(tf.square(mean_change)[None])[0]
    sizes: Any = 1.0
    if layout.groups is not None:  # few numbers, of which large ones are taken
        wide = [change, log_variance, new_log_variance]
        change, log_variance, new_log_variance = (
            tf.cast(values, tf.float64) for values in wide
        )
        sizes = tf.constant(layout.group_sizes, tf.float64)
    x = log_variance - new_log_variance
    moved = change * tf.exp(-new_log_variance)
    return 0.5 * tf.reduce_sum(sizes * (tf.math.expm1(x) - x) + moved)


def _dot(first: tf.Tensor, second: tf.Tensor) -> tf.Tensor:
    return tf.tensordot(first, second, 1)


def _norm(vector: tf.Tensor) -> tf.Tensor:
    return tf.sqrt(_dot(vector, vector))


def _count(where: tf.Tensor) -> tf.Tensor:
    return tf.math.count_nonzero(where, dtype=tf.float64)


def _spread(utilities: tf.Tensor, evaluated: tf.Tensor) -> tf.Tensor:
    """Standard deviation over the members that were evaluated."""
    weights = tf.cast(evaluated, utilities.dtype)
    count = tf.reduce_sum(weights)
    mean = tf.reduce_sum(weights * utilities) / count
    squares = weights * tf.square(utilities - mean)
    return tf.sqrt(tf.reduce_sum(squares) / count)


def _median(values: tf.Tensor) -> tf.Tensor:
    """The median, of a fixed random sample where there are many values."""
    size = values.shape[0]
    if size > _MEDIAN_SAMPLE:
        generator = np.random.default_rng(0)
        sample = generator.choice(size, _MEDIAN_SAMPLE, replace=False)
        values = tf.gather(values, np.sort(sample))
        size = _MEDIAN_SAMPLE
    ascending = tf.sort(values)
    return 0.5 * (ascending[(size - 1) // 2] + ascending[size // 2])
