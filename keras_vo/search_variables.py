"""The variables of a search: built, named, saved.

`SearchVariables` is what `VOOptimizer` is made of besides its arguments and
its steps.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_vo import checks, precision
from keras_vo import inner_optimizer as inner_lib
from keras_vo.constraints import constraint_of
from keras_vo.monitor.observer import StepObserver
from keras_vo.replicas import strategies
from keras_vo.search.gaussian import Gaussian, stddev_of
from keras_vo.search.layout import layer_groups, layer_names
from keras_vo.search.state import Settings
from keras_vo.search_distribution import GaussianSearchDistribution

__all__ = ["SearchVariables"]


class SearchVariables(keras.optimizers.Optimizer):
    """A Keras optimizer whose variables are those of a search.

    Attributes:
        inner_optimizer: moves the mean.
        search_distribution: says how sigma is shaped.
        observer: sees the steps; `None`: no one does.
    """

    inner_optimizer: Any
    search_distribution: GaussianSearchDistribution
    seed: int | None
    population_size: int
    sensitivity: Any
    importance_mixing: float | None
    _rate_by_name: float | None
    _trained: Callable[[], list[Any]]

    def __init__(self, name: str | None) -> None:
        super().__init__(learning_rate=0.0, name=name)
        self._strategy = strategies.current_strategy()
        self.observer: StepObserver | None = None
        self._kept_means: dict[str, Any] = {}

    def settings_for(self, variables: Sequence[Any]) -> Settings:
        """What does not change from step to step, for these weights."""
        raise NotImplementedError

    def build(self, variables: Sequence[Any]) -> None:
        """Creates sigma, the seed, and the inner optimizer's variables.

        Without variables there is nothing to build: a model whose layers are
        all frozen can be loaded, but not trained.

        Args:
            variables: the trainable variables, mu.

        Raises:
            TypeError: they are no list of variables.
            ValueError: one of them is not floating or there twice, or they
                and the optimizer are made under different strategies.
        """
        variables = checks.checked_variables(variables, "build({})")
        if self.built or not variables:
            return
        with strategies.entered(self._strategy):
            self._build(variables)

    def _build(self, variables: list[Any]) -> None:
        checks.check_variables(variables)
        if self._strategy is not None:
            inner_lib.check_no_overwriting(self.inner_optimizer)
        distribution = self.search_distribution
        self._layout = distribution.layout(variables)
        self._layers = layer_groups(variables), layer_names(variables)
        strategies.check_created_in_scope(
            [self.generations, self.iterations, *variables]
        )
        self._kept_means = {
            _key(i): self._keep_mean(variable)
            for i, variable in enumerate(variables)
            if precision.is_low(variable)
        }
        moved = self._moved(variables)
        inner_lib.build(self.inner_optimizer, variables, moved)
        self._trained = lambda: variables  # not a list: Keras would track it
        self._settings = self.settings_for(variables)
        seed = random.randint(0, 2**31 - 1) if self.seed is None else self.seed
        self._seed = self._add_state("seed", tf.constant(seed, tf.int64))
        beta = distribution.initial_log_variance(
            variables, self.population_size
        )
        self._first_log_variance = beta
        precision.warn_where_too_coarse(variables, stddev_of(beta))
        small = distribution.log_variance_of_trained(beta)
        self._small_start = tf.constant(small, self._layout.dtype)
        beta = tf.constant(beta, self._layout.dtype)
        self._log_variance = self._add_state(
            "log_variance", tf.fill([self._layout.num_groups], beta)
        )
        self._rule_state = {
            name: self._add_state(name, value)
            for name, value in self._initial_rule_state().items()
        }
        self._sensitivity = None
        if self.sensitivity is not None:
            ones = tf.ones([self._layout.size], self._layout.dtype)
            self._sensitivity = self._add_state("sensitivity", ones)
        super().build(variables)
        if self.observer is not None:
            self._build_observer(self.observer)

    def _initial_rule_state(self) -> dict[str, tf.Tensor]:
        beta = tf.convert_to_tensor(self._log_variance)
        return {
            name: value
            for rule in self._settings.rules
            for name, value in rule.init(beta).items()
        }

    def start_small(self) -> bool:
        """Makes smaller what is chosen by default, for trained weights.

        That is sigma with `stddev="auto"`, and the learning rate of an inner
        optimizer that is given by name. It does nothing once the search has
        begun.

        Returns:
            Whether anything is smaller now.
        """
        if keras.ops.convert_to_numpy(self.generations) > 0:
            return False
        beta = tf.convert_to_tensor(self._log_variance)
        self._log_variance.assign(tf.fill(beta.shape, self._small_start))
        for name, value in self._initial_rule_state().items():
            self._rule_state[name].assign(value)
        by_name = self._rate_by_name is not None
        if by_name:
            inner_lib.slow_down(self.inner_optimizer)
        return by_name or bool(np.any(beta.numpy() > self._small_start))

    def _add_state(self, name: str, value: tf.Tensor) -> Any:
        return self.add_variable(
            tuple(value.shape),
            # By an initializer: several machines then all have that of the
            # first.
            initializer=lambda shape, dtype: tf.cast(value, dtype),
            dtype=value.dtype.name,
            name=name,
        )

    def _keep_mean(self, variable: Any) -> Any:
        """The float32 mean of a variable of low precision."""
        name = checks.variable_name(variable)
        mean = self._add_state(
            f"mean_{name}".replace("/", "_").replace(":", "_"),
            tf.zeros(variable.shape),  # a step finds that it is out of date
        )
        mean.constraint = constraint_of(variable)
        return mean

    def _moved(self, variables: Sequence[Any]) -> list[Any]:
        """What the inner optimizer moves: variables, or their float32 mean."""
        return [
            self._kept_means.get(_key(i), variable)
            for i, variable in enumerate(variables)
        ]

    def _start_from(self, means: Sequence[tf.Tensor]) -> None:
        """Assigns the float32 means what a step begins with."""
        for i, mean in enumerate(means):
            if _key(i) in self._kept_means:
                self.assign(self._kept_means[_key(i)], mean)

    def _round(self, variables: Sequence[Any]) -> None:
        """Assigns variables of low precision their mean's rounding."""
        for variable, mean in zip(
            variables, self._moved(variables), strict=True
        ):
            if mean is not variable:
                self.assign(variable, tf.convert_to_tensor(mean))

    def _build_observer(self, observer: StepObserver) -> None:
        mixes = self.importance_mixing is not None
        observer.build(self._layout, *self._layers, mixes)

    def observe(self, observer: StepObserver | None) -> None:
        """Lets `observer` see each step whose graph is made from now on.

        Args:
            observer: it; `None`: no one.
        """
        self.observer = observer
        if self.built and observer is not None:
            with strategies.entered(self._strategy):
                self._build_observer(observer)

    @property
    def strategy(self) -> Any:
        """The tf.distribute strategy it is made under; `None`: no one."""
        return self._strategy

    @property
    def variables(self) -> list[Any]:
        """The search's own variables, then the inner optimizer's."""
        return super().variables + self.inner_optimizer.variables

    @property
    def iterations(self) -> Any:
        """Number of updates of the mean (and what its schedule counts)."""
        return self.inner_optimizer.iterations

    @property
    def generations(self) -> Any:
        """Number of populations drawn: updates, and steps without one."""
        return super().iterations

    @property
    def dtype_of_search(self) -> tf.DType:
        """Of noise and of what is computed of it."""
        self._check_built("dtype_of_search")
        return self._layout.dtype

    @property
    def base_seed(self) -> Any:
        """The variable that seeds all noise, a scalar int64."""
        self._check_built("base_seed")
        return self._seed

    @property
    def learning_rate(self) -> Any:
        """The learning rate of the mean: the inner optimizer's."""
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        self.inner_optimizer.learning_rate = learning_rate

    @property
    def stddevs(self) -> list[tf.Tensor]:
        """Current sigma, a tensor of each trainable variable's shape; with
        sensitivities s, sigma / s.

        Raises:
            ValueError: the optimizer is not built yet.
        """
        self._check_built("stddevs")
        return self._gaussian_around([], self._sensitivity_now()).stddevs

    def _sensitivity_now(self) -> tf.Tensor | None:
        """s [d], as it is; `None`: 1."""
        if self._sensitivity is None:
            return None
        return tf.convert_to_tensor(self._sensitivity)

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        self.inner_optimizer.finalize_variable_values(self._moved(var_list))
        if self.inner_optimizer.use_ema:
            self._round(var_list)

    @property
    def best_loss(self) -> float:
        """The least loss of any member so far, with `keep_best=True`.

        Raises:
            ValueError: it is not kept, or the optimizer is not built yet.
        """
        return float(self._kept("best_loss"))

    @property
    def best_weights(self) -> list[np.ndarray]:
        """Its weights, in the order of the variables; zeros before a step."""
        flat = tf.constant(self._kept("best_weights"))
        return [
            tf.cast(weight, variable.dtype).numpy()
            for weight, variable in zip(
                self._layout.unflatten(flat), self._trained(), strict=True
            )
        ]

    def _kept(self, name: str) -> np.ndarray:
        self._check_built(name)
        if name not in self._rule_state:
            raise ValueError(
                f"`{name}` is that of VOOptimizer(keep_best=True). "
                "Received: keep_best=False"
            )
        return np.asarray(tf.convert_to_tensor(self._rule_state[name]))

    def _check_built(self, what: str) -> None:
        if not self.built:
            raise ValueError(
                f"`{what}` exists once the optimizer is built: call "
                "`build(variables)`, `minimize` or a model's `fit` first. "
                "Received: an optimizer that is not built"
            )

    def _gaussian(
        self, weights: Sequence[Any], sensitivity: tf.Tensor | None
    ) -> Gaussian:
        """The search distribution where the variables have these values.

        Args:
            weights: those.
            sensitivity: s [d]; `None`: 1.
        """
        means = [tf.convert_to_tensor(weight) for weight in weights]
        for i, mean in enumerate(means):
            if (kept := self._kept_means.get(_key(i))) is not None:
                means[i] = precision.kept(tf.convert_to_tensor(kept), mean)
        return self._gaussian_around(means, sensitivity)

    def _gaussian_around(
        self, means: list[tf.Tensor], sensitivity: tf.Tensor | None
    ) -> Gaussian:
        beta = tf.convert_to_tensor(self._log_variance)
        return Gaussian(self._layout, means, beta, sensitivity)


def _key(index: int) -> str:
    """The name of the mean of a variable, by its index."""
    return f"mean.{index}"
