"""What a step of the search looks like, in a handful of numbers.

`StepObserver` computes them in the graph of the step, from tensors that are
there anyway, and keeps those of the last steps in one variable, which the host
reads now and then: a read takes longer than a small step's numbers do. An
optimizer without an observer has not a single op of it.

References:
    [1] Havtorn, "Variational Optimization of Neural Networks", 2018 (slides).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from keras_vo.monitor.divergence import DIVERGENCES, Outputs, divergences
from keras_vo.replicas import strategies
from keras_vo.search.credit import Pooled, all_losses
from keras_vo.search.engine import Search
from keras_vo.search.estimators import Direction
from keras_vo.search.gaussian import Gaussian, stddev_of, step_kl
from keras_vo.search.importance_mixing import Mixing
from keras_vo.search.layout import WeightLayout
from keras_vo.search.signal_to_noise import looks_now, signal_to_noise
from keras_vo.search.state import Report

__all__ = [
    "NUMBERS",
    "ObservedStep",
    "StepObserver",
    "kl_of",
    "observed",
    "signal_to_noise_of",
]

# In the order of the variable; sigma of each layer comes after them.
NUMBERS = (
    "time",
    "step",
    "parameter_norm",
    "gradient_norm",
    "gradient_cosine",
    "gradient_snr",
    "kl",
    "utility_spread",
    *DIVERGENCES,
    "nonfinite_share",
    "evaluations",
)
# Weights of a layer at most whose sigma is sorted for the median.
_MEDIAN_SAMPLE = 1001


class ObservedStep(NamedTuple):
    """What a step of the search hands to its observer.

    Attributes:
        gaussian: before the step.
        generation: number of populations before this one.
        new_means: the weight tensors mu after the step.
        new_log_variance: beta [groups] after it.
        direction: that of the mean is as the inner optimizer gets it.
        signs: members of a direction.
        pooled: what was found of the members, by level.
        variables: indices of those that they perturb, alike.
        base_seed: of the search.
        outputs: of the network on the batch; `None`: there is none.
        mixing: of the last population; `None`: all members are new.
    """

    gaussian: Gaussian
    generation: tf.Tensor
    new_means: list[tf.Tensor]
    new_log_variance: tf.Tensor
    direction: Direction
    signs: int
    pooled: Mapping[str, Pooled]
    variables: Mapping[str, Sequence[int]]
    base_seed: tf.Tensor
    outputs: Outputs | None = None
    mixing: Mixing | None = None

    @property
    def layout(self) -> WeightLayout:
        """Of the weights."""
        return self.gaussian.layout

    @property
    def losses(self) -> tf.Tensor:
        """Those of the members of all levels, see `credit.all_losses`."""
        return all_losses(self.pooled)

    @property
    def evaluated(self) -> tf.Tensor:
        """Which members [N] were."""
        return ~tf.math.is_nan(self.losses)


def observed(
    search: Search,
    report: Report,
    variables: Sequence[Any],
    outputs: Outputs | None = None,
) -> ObservedStep:
    """A step as its observer sees it.

    Args:
        search: before the step.
        report: of the step.
        variables: mu, after it.
        outputs: of the network on the batch; `None`: there is none.
    """
    gaussian, kinds = search.state.gaussian, search.perturbations
    return ObservedStep(
        gaussian,
        search.state.generation,
        [tf.convert_to_tensor(v) for v in variables],
        tf.where(
            report.any_finite,
            report.proposal.log_variance,
            gaussian.log_variance,
        ),
        report.direction,
        2 if search.settings.antithetic else 1,
        report.pooled,
        {level: kinds.at(level).variables for level in report.pooled},
        search.state.base_seed,
        outputs,
        search.mixed.mixing if search.mixed else None,
    )


class StepObserver:
    """Sees the steps of one optimizer.

    Args:
        every: of how many steps one is looked at.
        capacity: of how many steps the numbers are kept.

    Attributes:
        names: of the numbers, known once it is built.
        every: see above.
        leave_fit: what `fit` calls when it ends, also by an error.
        strategy: that the optimizer is made under; `None`: no one.
    """

    def __init__(self, every: int = 1, capacity: int = 64) -> None:
        self.names: tuple[str, ...] = ()
        self.strategy: Any = None
        self.every = every
        self.leave_fit: Callable[[], None] | None = None
        self._capacity = capacity

    def build(
        self,
        layout: WeightLayout,
        groups: Sequence[int],
        names: Sequence[str],
        mixes: bool = False,
    ) -> None:
        """Makes the variables; under a strategy, in its scope.

        Args:
            layout: of the weights.
            groups: for each weight tensor, its layer.
            names: of the layers.
            mixes: whether former members are used once more.
        """
        self.strategy = strategies.current_strategy()
        self._layers = [
            [i for i, group in enumerate(groups) if group == layer]
            for layer in range(len(names))
        ]
        mixing = Mixing._fields if mixes else ()
        self.names = (*NUMBERS, *mixing) + tuple(
            f"sigma/{name}/{statistic}"
            for name in names
            for statistic in ("min", "median", "max")
        )
        with tf.init_scope():
            self._rows = strategies.replica_local_variable(
                tf.zeros([self._capacity, len(self.names)], tf.float64)
            )
            self._evaluations = strategies.replica_local_variable(
                tf.zeros([], tf.float64)
            )
            self._previous = strategies.replica_local_variable(
                tf.zeros([layout.size], layout.dtype)
            )

    def observe(self, step: ObservedStep) -> None:
        """Computes the numbers, in a graph or eagerly, and keeps them."""
        reused = step.mixing.reused if step.mixing else 0.0
        self._evaluations.assign_add(_count(step.evaluated) - reused)
        if self.every == 1:
            self._keep(step)
            self._previous.assign(step.direction.mean)
            return
        number = step.generation + 1
        _only_if(number % self.every == 0, lambda: self._keep(step))
        _only_if(
            (number + 1) % self.every == 0,
            lambda: self._previous.assign(step.direction.mean),
        )

    def _keep(self, step: ObservedStep) -> None:
        rows = tf.convert_to_tensor(self._rows)
        numbers = _numbers(step, tf.convert_to_tensor(self._previous))
        seeds = (step.base_seed, step.generation)
        now = looks_now(step.generation, self.every)
        found = divergences(step.gaussian, step.outputs, seeds, now)
        numbers |= dict(zip(DIVERGENCES, found, strict=True))
        numbers["evaluations"] = tf.convert_to_tensor(self._evaluations)
        numbers |= {} if step.mixing is None else step.mixing._asdict()
        shown = self.names[1 : len(self.names) - 3 * len(self._layers)]
        after, sigma = tf.stack([numbers[n] for n in shown]), self._sigmas(step)
        with tf.control_dependencies([after]):
            now = tf.timestamp()[None]
        row = tf.concat([now, after, tf.cast(sigma, tf.float64)], axis=0)
        self._rows.assign(tf.concat([rows[1:], row[None]], axis=0))

    def read(self) -> np.ndarray:
        """The numbers of the last steps, [capacity, names]; 0 before them."""
        return strategies.first_local(self._rows, self.strategy).numpy()

    @property
    def evaluations(self) -> float:
        """Members evaluated so far."""
        if not self.names:  # not built
            return 0.0
        count = strategies.first_local(self._evaluations, self.strategy)
        return float(count.numpy())

    def _sigmas(self, step: ObservedStep) -> tf.Tensor:
        """Least, median and largest sigma of each layer, [3 layers]."""
        sensitivity = step.gaussian.sensitivity
        if step.layout.groups is not None and sensitivity is None:
            groups = [step.layout.groups[layer[0]] for layer in self._layers]
            beta = tf.gather(step.new_log_variance, np.repeat(groups, 3))
            return stddev_of(beta)
        parts = step.layout.per_tensor(step.new_log_variance)
        if sensitivity is not None:
            after = step.gaussian.over_squares(tf.exp(step.new_log_variance))
            parts = [tf.math.log(variance) for variance in after]
        values = []
        for layer in self._layers:
            flat = [tf.reshape(parts[i], [-1]) for i in layer]
            values += [
                stddev_of(tf.reduce_min([tf.reduce_min(x) for x in flat])),
                _median_of_sigma(tf.concat(flat, axis=0)),
                stddev_of(tf.reduce_max([tf.reduce_max(x) for x in flat])),
            ]
        return tf.stack(values)


def _only_if(condition: tf.Tensor, function: Callable[[], Any]) -> None:
    def branch() -> tf.Tensor:
        function()
        return tf.constant(True)

    tf.cond(condition, branch, lambda: tf.constant(False))


def _numbers(step: ObservedStep, previous: tf.Tensor) -> dict[str, tf.Tensor]:
    """All but time, evaluations and sigma."""
    finite = tf.math.is_finite(step.losses) & step.evaluated
    evaluated = _count(step.evaluated)
    nonfinite = evaluated - _count(finite)
    gradient, dtype = step.direction.mean, step.layout.dtype
    norms = tf.sqrt(
        2.0 * tf.stack([tf.nn.l2_loss(gradient), tf.nn.l2_loss(previous)])
    )
    # A product of two vectors by tensordot takes 20 times as long on a CPU.
    cosine = tf.reduce_sum(gradient * previous) / tf.reduce_prod(norms)
    snr = signal_to_noise_of(step)
    spread = _spread(next(iter(step.pooled.values())))
    # Without a finite loss there is no gradient, and no step.
    norm, cosine, snr, spread = tf.unstack(
        tf.where(
            nonfinite < evaluated,
            tf.cast(tf.stack([norms[0], cosine, snr, spread]), tf.float64),
            math.nan,
        )
    )
    squares = [tf.nn.l2_loss(tf.cast(x, dtype)) for x in step.new_means]
    return {
        "step": tf.cast(step.generation + 1, tf.float64),
        "parameter_norm": tf.sqrt(2.0 * tf.cast(tf.add_n(squares), tf.float64)),
        "gradient_norm": norm,
        "gradient_cosine": cosine,
        "gradient_snr": snr,
        "kl": kl_of(step),
        "utility_spread": spread,
        "nonfinite_share": nonfinite / evaluated,
    }


def kl_of(step: ObservedStep) -> tf.Tensor:
    """KL divergence of the step in nats, a scalar float64."""
    return step_kl(step.gaussian, step.new_means, step.new_log_variance)


def _count(where: tf.Tensor) -> tf.Tensor:
    return tf.math.count_nonzero(where, dtype=tf.float64)


def signal_to_noise_of(step: ObservedStep) -> tf.Tensor:
    """SNR of the gradient of the mean; each level has directions of its own."""
    parts = step.layout.split(step.direction.mean)
    of_level = step.direction.squares or {}
    norms, squares, directions = [], [], []
    for level, pooled in step.pooled.items():
        norm = tf.add_n(
            [tf.nn.l2_loss(parts[i]) for i in step.variables[level]]
        )
        evaluated = _count(~tf.math.is_nan(pooled.losses))
        norms.append(2.0 * norm)
        squares.append(of_level[level])
        directions.append(tf.cast(evaluated, step.layout.dtype) / step.signs)
    return signal_to_noise(norms, squares, directions)


def _spread(pooled: Pooled) -> tf.Tensor:
    """Standard deviation of utilities over the members that were evaluated."""
    utilities = pooled.utilities
    weights = tf.cast(~tf.math.is_nan(pooled.losses), utilities.dtype)
    count = tf.reduce_sum(weights)
    mean = tf.reduce_sum(weights * utilities) / count
    squares = weights * tf.square(utilities - mean)
    return tf.sqrt(tf.reduce_sum(squares) / count)


def _median_of_sigma(values: tf.Tensor) -> tf.Tensor:
    """From many beta, that of a fixed random sample of them."""
    size = values.shape[0]
    if size > _MEDIAN_SAMPLE:
        generator = np.random.default_rng(0)
        sample = generator.choice(size, _MEDIAN_SAMPLE, replace=False)
        values = tf.gather(values, np.sort(sample))
        size = _MEDIAN_SAMPLE
    ascending = tf.sort(values)
    middle = tf.stack([ascending[(size - 1) // 2], ascending[size // 2]])
    return tf.reduce_mean(stddev_of(middle))
