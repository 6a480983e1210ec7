"""VOOptimizer: variational optimization as a Keras optimizer.

    seeds -> noise -> perturbed weights -> losses -> utilities
          -> search gradient -> natural gradient -> mu, sigma

Each arrow is a function of another module; this one owns the state (seed,
generation, sigma, and the inner optimizer that moves mu) and wires them.

References:
    [1] Havtorn, "Variational Optimization of Neural Networks", 2018 (slides).
    [2] Wierstra et al., "Natural Evolution Strategies", JMLR 15, 2014.
    [3] Salimans et al., "Evolution Strategies as a Scalable Alternative to
        Reinforcement Learning", arXiv 1703.03864, 2017.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from absl import logging

from keras_vo import adaptation, checks, distribution, estimators
from keras_vo import exchange as exchange_lib
from keras_vo import fitness_shaping as shaping_lib
from keras_vo import inner_optimizer as inner_lib
from keras_vo import noise as noise_lib
from keras_vo import search_distribution as distribution_lib
from keras_vo.chunks import ChunkPlan, NoiseSource
from keras_vo.diagnostics import ObservedStep, StepObserver
from keras_vo.evaluation import Outcome, evaluate_population
from keras_vo.layout import layer_groups, layer_names
from keras_vo.perturbation import Recording
from keras_vo.replicas import Share, shaped_where_evaluated, was_evaluated
from keras_vo.signal_to_noise import Probe
from keras_vo.spaces import SearchGradient, SearchSpaces

__all__ = ["Generation", "VOOptimizer", "find_vo_optimizer"]

Objective = Callable[[list[tf.Tensor]], Any]

_PLAIN_MODEL = (
    "VOOptimizer evaluates a population of perturbed models, which the "
    "training step of a plain Keras model cannot do. Expected one of: a model "
    "built as `keras_vo.VOModel(inputs, outputs)` or "
    "`keras_vo.VOSequential([...])`; a subclass "
    "`class MyModel(keras_vo.VOTrainStep, keras.Model)`; or "
    "`keras_vo.make_variational(model)` for a model that exists already. "
    "Without a model, call `optimizer.minimize(objective, variables)`. "
    "Received: gradients or a loss from another training step."
)


class Generation(NamedTuple):
    """What one step of the search evaluated.

    Attributes:
        losses: the members' losses [N], as evaluated; NaN for a member whose
            replica had no examples. With antithetic sampling, member n + N/2
            mirrors member n.
        mean_loss: their mean, a scalar: an estimate of the upper bound
            U [1, eq. 6]. Non-finite losses are left out; NaN if all are.
        nonfinite_members: how many losses were not finite, int32.
    """

    losses: tf.Tensor
    mean_loss: tf.Tensor
    nonfinite_members: tf.Tensor


@keras.saving.register_keras_serializable(package="keras_vo")
class VOOptimizer(keras.optimizers.Optimizer):
    """Trains weights by variational optimization, from forward passes only.

    Instead of the loss f(w), it minimises the upper bound

        U(mu, sigma) = E[f(w)],   w ~ N(mu, diag sigma^2)       [1, eq. 6]

    by search gradients: each step draws `population_size` weights around the
    model's own (mu), evaluates their losses, and moves mu and sigma towards
    the better ones. Neither f nor the network is ever differentiated.

    Compile it into a `VOModel`, `VOSequential`, a subclass of `VOTrainStep`
    or a model given to `make_variational`; or call `minimize`.

    Args:
        inner_optimizer: the Keras optimizer that moves mu by the search
            gradient. Its learning rate (and schedule), weight decay, EMA and
            clipping act as they do on any gradient. A name stands for that
            optimizer with learning rate 0.02 and otherwise Keras's defaults.
        population_size: number N of members evaluated a step; even if
            `antithetic`.
        search_distribution: a `GaussianSearchDistribution`, or its variance:
            "fixed", "isotropic", "layerwise" or "separable".
        natural_gradient: whether to precondition the search gradients with
            the inverse Fisher information [1, eq. 19-21]. Where sigma follows
            the mean, that of mu has the size that it would have if it did
            not.
        antithetic: whether members come in pairs mu + sigma z, mu - sigma z
            [1, eq. 22]. It removes the even part of f from the gradient of
            mu.
        fitness_shaping: how losses become utilities: "identity",
            "standardize", "centered_rank" [3], "nes" [2], or a callable from
            finite losses [N] to utilities [N] (higher for a higher loss; of a
            size that does not depend on that of the losses, if sigma follows
            the mean).
            For `LocalReparamDense` it is applied example by example, to the
            members that the example's replica evaluates.
        max_kl: bound, in nats, on the KL divergence between the search
            distributions before and after a step. A step beyond it, that of
            the inner optimizer included, is shrunk along its own direction.
            `None`: no bound. Not to be combined with an inner optimizer that
            keeps an EMA.
        seed: base seed of the noise, an integer in [0, 2^63). `None`: drawn
            from Python's `random`, as `keras.utils.set_random_seed` sets it.
        chunk_size: members evaluated at once, at least one draw's. `None`:
            as many as are fast and fit `memory_budget`. The search does not
            depend on it; lower it where the activations of a chunk take too
            much memory.
        memory_budget: bytes for noise, perturbed weights, and activations
            that `LocalReparamDense` perturbs. Within it noise is kept for the
            gradient, otherwise drawn a second time; and members with
            perturbed activations are evaluated once, otherwise twice. At
            least one member's weights must exist, so a model larger than the
            budget goes beyond it. Other activations come on top.
        exchange: what replicas of a tf.distribute strategy exchange.
            `"fitness"`: the losses only; each machine draws all noise and
            sums the gradient itself. `"gradient"`: the losses, and the
            gradients that replicas sum over their own members. `"auto"`: what
            `keras_vo.exchange.CostModel` finds cheaper. `LocalReparamDense`
            layers exchange their gradient in any case.
        name: name of the optimizer.

    Raises:
        ValueError: an argument out of its range, or an inner optimizer whose
            options cannot work here (gradient accumulation, loss scaling).

    Example:

    >>> model = keras_vo.VOSequential([keras.layers.Dense(10)])
    >>> model.compile(optimizer=keras_vo.VOOptimizer(), loss=zero_one_error)
    >>> model.fit(x, y)
    """

    def __init__(
        self,
        inner_optimizer: str | keras.optimizers.Optimizer = "adam",
        population_size: int = 128,
        search_distribution: (
            str | distribution_lib.GaussianSearchDistribution
        ) = "layerwise",
        *,
        natural_gradient: bool = True,
        antithetic: bool = True,
        fitness_shaping: str | shaping_lib.Shaping = "centered_rank",
        max_kl: float | None = None,
        seed: int | None = None,
        chunk_size: int | None = None,
        memory_budget: int = 2**29,
        exchange: str = "auto",
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs:
            raise ValueError(
                "VOOptimizer has no such argument; what concerns the step of "
                "the mean (learning rate, weight decay, clipping, EMA) is set "
                f"on `inner_optimizer`. Received: {kwargs}"
            )
        super().__init__(learning_rate=0.0, name=name)
        self.inner_optimizer = inner_lib.checked_inner(inner_optimizer, max_kl)
        self.population_size = checks.checked_size(population_size, antithetic)
        self.search_distribution = distribution_lib.get(search_distribution)
        self.natural_gradient = bool(natural_gradient)
        self.antithetic = bool(antithetic)
        self.fitness_shaping = shaping_lib.canonical(fitness_shaping)
        self._shape_fitness = shaping_lib.get(fitness_shaping, self.antithetic)
        self.max_kl = (
            None if max_kl is None else checks.checked_number("max_kl", max_kl)
        )
        self.seed = None if seed is None else checks.checked_seed(seed)
        if chunk_size is not None:
            chunk_size = checks.checked_integer("chunk_size", chunk_size)
        self.chunk_size = chunk_size
        self.memory_budget = checks.checked_integer(
            "memory_budget", memory_budget
        )
        self.exchange = exchange_lib.checked_exchange(exchange)
        self._strategy = distribution.current_strategy()
        self.observer: StepObserver | None = None

    # --- state ---

    def build(self, variables: Sequence[Any]) -> None:
        """Creates sigma, the seed, and the inner optimizer's variables.

        Args:
            variables: the trainable variables, mu.

        Raises:
            ValueError: there are none, one of them is not floating, or they
                and the optimizer are made under different strategies.
        """
        if self.built:
            return
        with distribution.entered(self._strategy):
            self._build(list(variables))

    def _build(self, variables: list[Any]) -> None:
        checks.check_variables(variables)
        if distribution.current_strategy() is not None:
            inner_lib.check_no_overwriting(self.inner_optimizer)
        self._layout = self.search_distribution.layout(variables)
        self._layers = layer_groups(variables), layer_names(variables)
        self._blocks = self.search_distribution.blocks(variables)
        self._variable_ids = tuple(id(v) for v in variables)
        self._variable_names = tuple(checks.variable_name(v) for v in variables)
        distribution.check_created_in_scope(
            [self.generations, self.iterations, *variables]
        )
        self.inner_optimizer.build(variables)
        seed = random.randint(0, 2**31 - 1) if self.seed is None else self.seed
        # By an initializer: several machines then all have that of the first.
        self._seed = self.add_variable(
            (),
            initializer=lambda shape, dtype: tf.constant(seed, dtype),
            dtype="int64",
            name="seed",
        )
        follows = self.search_distribution.follows_mean and any(
            adaptation.follows(self._blocks, self.population_size)
        )
        stddev = self.search_distribution.stddev
        if follows:
            stddev = adaptation.initial(stddev, self._blocks)
            if stddev != self.search_distribution.stddev:
                logging.info(
                    "Sigma starts at %.3g, 1 / sqrt(fan in): stddev=%g is "
                    "above 3 / sqrt(fan in), see `follow_mean`.",
                    stddev,
                    self.search_distribution.stddev,
                )
        self._log_variance = self._beta_variable("log_variance", stddev)
        self._base = self._averaged_mean = None
        if follows:
            self._base = self._beta_variable("base_log_variance", stddev)
            self._averaged_mean = self.add_variable(
                (self._layout.size,),
                dtype=self._layout.dtype.name,
                name="averaged_mean",
            )
            self._averaged_mean.assign(self._layout.flatten(variables))
        super().build(variables)
        if self.observer is not None:
            self.observer.build(self._layout, *self._layers)

    def _beta_variable(self, name: str, stddev: float) -> Any:
        """A log variance of each group, at first that of `stddev`."""
        variable = self.add_variable(
            (len(self._layout.group_sizes),),
            dtype=self._layout.dtype.name,
            name=name,
        )
        beta = tf.constant(2.0 * math.log(stddev), self._layout.dtype)
        beta = self.search_distribution.bounded(beta)
        # By assignment: an initializer's constant passes through float32.
        variable.assign(tf.fill(variable.shape, beta))
        return variable

    def observe(self, observer: StepObserver | None) -> None:
        """Lets `observer` see each step whose graph is made from now on.

        Args:
            observer: it; `None`: no one.
        """
        self.observer = observer
        if self.built and observer is not None:
            with distribution.entered(self._strategy):
                observer.build(self._layout, *self._layers)

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
        """Current sigma, a tensor of each trainable variable's shape.

        Raises:
            ValueError: the optimizer is not built yet.
        """
        self._check_built("stddevs")
        stddev = self._stddev(tf.convert_to_tensor(self._log_variance))
        return self._layout.unflatten(
            tf.broadcast_to(stddev, [self._layout.size])
        )

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        self.inner_optimizer.finalize_variable_values(var_list)

    # --- the search ---

    def minimize(
        self, objective: Objective, variables: Sequence[Any]
    ) -> tf.Tensor:
        """Takes one step on any objective; no Keras model is needed.

        Called eagerly, it calls `objective` once a member with concrete
        values, so that it may be any Python code. Called in a `tf.function`,
        it is compiled and vectorized over the population, which is fast.

        If the optimizer is made under `strategy.scope()`, each replica
        evaluates its share of the population, whether this is called in or
        outside of the scope, or in each replica by `strategy.run` (after
        `build`).

        Args:
            objective: from a list of weight tensors, shaped like `variables`,
                to a scalar loss.
            variables: Keras or TensorFlow variables, the mean mu. The same
                list in every call.

        Returns:
            The mean loss of the population, a scalar: see
            `Generation.mean_loss`.

        Raises:
            ValueError: no variables, others than before, or an objective
                whose value is not a scalar.
        """
        variables = list(variables)
        with distribution.entered(self._strategy):
            self._build_outside_of_replicas(variables)
            return distribution.on_each_replica(
                lambda: self.step(objective, variables).mean_loss
            )

    def step(
        self,
        objective: Objective,
        variables: Sequence[Any],
        jit_compile: bool = False,
        recording: Recording | None = None,
        example_weights: Any = 1.0,
        batch_size: tf.Tensor | None = None,
    ) -> Generation:
        """Evaluates one generation and updates mu and sigma.

        If no member's loss is finite, weights, sigma and the inner optimizer
        are left as they are; only the next generation's noise is another.

        Args:
            objective: see `minimize`. Where `recording` has calls whose
                activations are perturbed, it returns a pair: the scalar, and
                the losses [batch] of the examples.
            variables: see `minimize`.
            jit_compile: whether XLA compiles the evaluation of the members.
            recording: what the layers of `keras_vo.layers` have recorded;
                `None`: nothing.
            example_weights: what the examples' losses are weighted with,
                [batch]. Losses are shaped without it and utilities weighted
                with it: ranks know no weights.
            batch_size: number of examples that this replica has; 0: its
                members count for nothing. `None`: not a matter of examples.

        Returns:
            The evaluated generation.
        """
        variables = list(variables)
        self._build_outside_of_replicas(variables)
        self._check_same(variables)
        layout = self._layout
        log_variance = tf.convert_to_tensor(self._log_variance)
        mean = layout.flatten(variables)
        scale = self._mean_scale(log_variance)
        recording = recording or Recording(variables)
        spaces = SearchSpaces(
            layout,
            variables,
            log_variance,
            recording,
            self.search_distribution.adapts,
            self._probe(scale),
        )

        def outcome(weights: list[tf.Tensor]) -> Outcome:
            value = objective(weights)
            if not recording.sites:
                return Outcome(checks.checked_scalar(value, layout.dtype))
            loss, examples = value
            return Outcome(
                checks.checked_scalar(loss, layout.dtype),
                (tf.cast(examples, layout.dtype),),
            )

        replicas = distribution.current_replicas()
        share = self._share(replicas, recording)
        source = self._noise_source(spaces, share)
        population = evaluate_population(
            spaces.member(outcome),
            source,
            (1.0, -1.0) if self.antithetic else (1.0,),
            jit_compile=jit_compile,
        )
        losses, utilities, evaluated = self._judged(
            population.losses, batch_size, share, replicas
        )
        gradient = spaces.gradients(
            population,
            utilities,
            [
                self._example_utilities(examples, example_weights)
                for examples in population.examples
            ],
            self._signs,
            share,
            replicas,
            self._whole_noise(spaces, source, share, replicas),
        )
        gradient = self._preconditioned(gradient, scale)
        finite = tf.math.is_finite(losses)

        # Where a batch can't be had (the end of the data), nothing is counted.
        with tf.control_dependencies([losses]):
            self._update_where(
                tf.reduce_any(finite),
                variables,
                mean,
                log_variance,
                gradient,
            )
            if self.observer is not None:
                self.observer.observe(
                    ObservedStep(
                        layout,
                        tf.convert_to_tensor(self.generations),
                        spaces.means,
                        [tf.convert_to_tensor(v) for v in variables],
                        log_variance,
                        tf.convert_to_tensor(self._log_variance),
                        gradient,
                        self._signs,
                        losses,
                        utilities,
                        evaluated,
                    )
                )
            self.assign_add(self.generations, 1)
        return Generation(
            losses,
            tf.reduce_mean(tf.boolean_mask(losses, finite)),
            tf.math.count_nonzero(evaluated & ~finite, dtype=tf.int32),
        )

    @property
    def _signs(self) -> int:
        """Members of a draw."""
        return 2 if self.antithetic else 1

    def _share(
        self, replicas: distribution.Replicas, recording: Recording
    ) -> Share:
        """Which draws the current replica evaluates."""
        draws = self.population_size // self._signs
        if recording.sites and draws // replicas.count * self._signs < 2:
            raise ValueError(
                "LocalReparamDense compares the members that see the same "
                "examples. Expected: a population_size of "
                f"{2 * replicas.count} or more, two for each replica. "
                f"Received: population_size={self.population_size} on "
                f"{replicas.count} replicas"
            )
        return Share.make(draws, replicas.index, replicas.count)

    def _judged(
        self,
        losses: tf.Tensor,
        batch_size: tf.Tensor | None,
        share: Share,
        replicas: distribution.Replicas,
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """From this replica's losses to those of all members, their
        utilities, and which of them were evaluated, [N] each.
        """
        if replicas.count == 1:
            return (
                losses,
                self._shape_fitness(losses),
                tf.ones_like(losses, tf.bool),
            )
        some = True if batch_size is None else batch_size > 0
        (losses,) = replicas.sum([share.place(losses, some)])
        evaluated = was_evaluated(losses)
        utilities = shaped_where_evaluated(
            self._shape_fitness, losses, evaluated, self._signs
        )
        return tf.where(evaluated, losses, math.nan), utilities, evaluated

    def _whole_noise(
        self,
        spaces: SearchSpaces,
        source: NoiseSource,
        share: Share,
        replicas: distribution.Replicas,
    ) -> NoiseSource | None:
        """All draws' noise, to sum it here; `None`: each replica sums its own.

        Noise of activations belongs to the replica that has the examples.
        """
        if replicas.count == 1:
            return None
        exchange = self.exchange
        if exchange == "auto":
            costs = exchange_lib.cost_model(
                distribution.is_multi_worker(distribution.current_strategy())
            )
            exchange = costs.cheaper(
                share.draws,
                spaces.noise_size,
                spaces.gradient_size,
                replicas.count,
            )
        if exchange == "gradient":
            return None
        return dataclasses.replace(
            source,
            plan=self._chunk_plan(spaces, share.draws, 0),
            first=0,
            activations=(),
        )

    def _example_utilities(self, losses: tf.Tensor, weights: Any) -> tf.Tensor:
        """Utilities [N, batch] from losses alike, of weighted examples."""
        weights = tf.cast(weights, losses.dtype)
        return weights * self._shape_fitness(
            tf.math.divide_no_nan(losses, weights)
        )

    def _stddev(self, log_variance: tf.Tensor) -> tf.Tensor:
        return self._layout.expand(tf.exp(0.5 * log_variance))

    def _noise_source(self, spaces: SearchSpaces, share: Share) -> NoiseSource:
        seed = noise_lib.generation_seed(
            tf.convert_to_tensor(self._seed),
            tf.convert_to_tensor(self.generations),
        )
        return NoiseSource(
            self._chunk_plan(
                spaces, share.size, spaces.activation_bytes(self._signs)
            ),
            seed,
            spaces.noise_size,
            self._layout.dtype,
            spaces.activations,
            share.start,
        )

    def _chunk_plan(
        self, spaces: SearchSpaces, draws: int, activation_bytes: Any
    ) -> ChunkPlan:
        return ChunkPlan.make(
            draws,
            self._signs,
            spaces.noise_size * self._layout.dtype.size,
            self.memory_budget,
            self.chunk_size,
            activation_bytes,
        )

    def _update_where(
        self, condition: tf.Tensor, variables: list[Any], *step: Any
    ) -> None:
        """`_update`, or nothing; replicas can't take turns in a branch."""
        if not distribution.in_replica():

            def update() -> tf.Tensor:
                self._update(variables, *step)
                return tf.constant(True)

            tf.cond(condition, update, lambda: tf.constant(False))
            return
        changed = [*variables, *self.inner_optimizer.variables]
        changed.append(self._log_variance)
        if self._base is not None:
            changed += [self._base, self._averaged_mean]
        before = [tf.identity(v) for v in changed]
        self._update(variables, *step)
        for variable, value in zip(changed, before, strict=True):
            self.assign(variable, tf.where(condition, variable, value))

    def _preconditioned(
        self, gradient: SearchGradient, scale: tf.Tensor
    ) -> SearchGradient:
        """The gradients that steps go down, natural if they are to be."""
        if not self.natural_gradient:
            return gradient
        return gradient._replace(
            mean=self._layout.expand(scale) * gradient.mean,
            log_variance=estimators.natural_log_variance_gradient(
                gradient.log_variance, gradient.fisher
            ),
        )

    def _mean_scale(self, log_variance: tf.Tensor) -> tf.Tensor:
        """What dU/dmu is multiplied with for the inner optimizer, [groups].

        Where sigma follows the mean, the steps of the mean do not follow
        sigma.
        """
        stddev = tf.exp(0.5 * log_variance)
        one = tf.ones_like(stddev)
        if not self.natural_gradient:
            return one
        if self._base is None:
            return estimators.natural_mean_gradient(one, stddev)
        return estimators.based_mean_gradient(
            one,
            stddev,
            tf.exp(0.5 * tf.convert_to_tensor(self._base)),
            self.fitness_shaping == "identity",
        )

    def _probe(self, scale: tf.Tensor) -> Probe | None:
        """What the observer wants to know of the gradient."""
        if self.observer is None:
            return None
        return Probe(
            self._layout.per_tensor(scale),
            tf.convert_to_tensor(self.generations),
            self.observer.every,
        )

    def _update(
        self,
        variables: list[Any],
        mean: tf.Tensor,
        log_variance: tf.Tensor,
        gradient: SearchGradient,
    ) -> None:
        """Steps mu by the inner optimizer, and beta."""
        layout, follows = self._layout, self._base is not None
        base, average = log_variance, mean
        if follows:
            base = tf.convert_to_tensor(self._base)
            # Before the first step weights may have been loaded.
            average = tf.where(
                tf.equal(tf.convert_to_tensor(self.iterations), 0),
                mean,
                tf.convert_to_tensor(self._averaged_mean),
            )
        self.inner_optimizer.apply(layout.unflatten(gradient.mean), variables)
        new_mean = layout.flatten(variables)
        new_base = proposal = self._proposed_base(base, gradient)
        if follows:
            proposal = self.search_distribution.bounded(
                adaptation.lifted(
                    new_base,
                    new_mean - average,
                    layout,
                    self._blocks,
                    self.population_size,
                )
            )
        if self.max_kl is not None:
            change, log_change = new_mean - mean, proposal - log_variance
            share = distribution_lib.share_within(
                self.max_kl, change, log_variance, log_change, layout
            )
            new_mean = mean + share * change
            proposal = log_variance + share * log_change
            new_base = base + share * (new_base - base)
            shrunk = layout.unflatten(new_mean)
            for variable, value in zip(variables, shrunk, strict=True):
                self.assign(variable, tf.where(share < 1, value, variable))
        self.assign(self._log_variance, proposal)
        if follows:
            self.assign(self._base, new_base)
            average = adaptation.averaged_mean(
                average, new_mean, tf.convert_to_tensor(self.iterations)
            )
            self.assign(self._averaged_mean, average)

    def _proposed_base(
        self, base: tf.Tensor, gradient: SearchGradient
    ) -> tf.Tensor:
        """Where the gradient takes beta, unless `max_kl` forbids it."""
        if not self.search_distribution.adapts:
            return base
        if self._base is not None:
            base = adaptation.blind_growth(
                base, gradient.log_variance, gradient.mean
            )
        return self.search_distribution.update(base, gradient.log_variance)

    # --- checks ---

    def _check_built(self, what: str) -> None:
        if not self.built:
            raise ValueError(
                f"`{what}` exists once the optimizer is built: call "
                "`build(variables)`, `minimize` or a model's `fit` first. "
                "Received: an optimizer that is not built"
            )

    def _build_outside_of_replicas(self, variables: list[Any]) -> None:
        if self.built:
            return
        if distribution.in_replica():
            raise ValueError(
                "Expected a VOOptimizer that is built before a strategy runs "
                "it: call `build(variables)` first. Received: an optimizer "
                "that is not built, in a replica"
            )
        with tf.init_scope():
            self.build(variables)

    def _check_same(self, variables: list[Any]) -> None:
        if tuple(id(v) for v in variables) != self._variable_ids:
            raise ValueError(
                "Expected the variables this optimizer was built with, "
                f"{list(self._variable_names)}. Received: "
                f"{[checks.variable_name(v) for v in variables]}. After a "
                "change of what is trainable, compile the model with a new "
                "VOOptimizer."
            )

    def scale_loss(self, loss: Any) -> Any:
        raise ValueError(_PLAIN_MODEL)

    def apply(self, grads: Any, trainable_variables: Any = None) -> Any:
        raise ValueError(_PLAIN_MODEL)

    # --- saving ---

    def load_own_variables(self, store: Any) -> None:
        """Restores the search.

        Raises:
            ValueError: `store` was saved by an optimizer of other structure.
        """
        if self.built and len(store.keys()):
            expected = [tuple(v.shape) for v in self.variables]
            keys = sorted(store.keys(), key=int)
            received = [tuple(store[key].shape) for key in keys]
            if expected != received:
                raise ValueError(
                    "The checkpoint holds a search of another structure. "
                    "Expected, for a "
                    f"{self.search_distribution.variance!r} search "
                    "distribution with follow_mean="
                    f"{self.search_distribution.follow_mean}, "
                    f"population_size={self.population_size} and inner "
                    f"optimizer {self.inner_optimizer.name!r}, variables of "
                    f"shapes {expected}. Received: {received}. "
                    "(`model.load_weights(path, skip_mismatch=True)` loads "
                    "the model's weights and starts a new search.)"
                )
        super().load_own_variables(store)

    def get_config(self) -> dict[str, Any]:
        serialize = keras.saving.serialize_keras_object
        shaping = self.fitness_shaping
        return {
            "name": self.name,
            "inner_optimizer": serialize(self.inner_optimizer),
            "population_size": self.population_size,
            "search_distribution": serialize(self.search_distribution),
            "natural_gradient": self.natural_gradient,
            "antithetic": self.antithetic,
            "fitness_shaping": (
                shaping if isinstance(shaping, str) else serialize(shaping)
            ),
            "max_kl": self.max_kl,
            "seed": self.seed,
            "chunk_size": self.chunk_size,
            "memory_budget": self.memory_budget,
            "exchange": self.exchange,
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: Any = None
    ) -> VOOptimizer:
        config = dict(config)
        for key, value in config.items():
            if isinstance(value, dict):
                config[key] = keras.saving.deserialize_keras_object(
                    value, custom_objects=custom_objects
                )
        return cls(**config)


def find_vo_optimizer(optimizer: Any) -> VOOptimizer | None:
    """The VOOptimizer in a chain of wrappers such as LossScaleOptimizer."""
    while optimizer is not None and not isinstance(optimizer, VOOptimizer):
        optimizer = getattr(optimizer, "inner_optimizer", None)
    return optimizer
