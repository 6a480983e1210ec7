"""VOOptimizer: variational optimization as a Keras optimizer.

This module has the arguments; `keras_vo.search_variables` owns the variables,
`keras_vo.search_steps` makes their steps of `keras_vo.search.engine.Search`.

References:
    [1] Havtorn, "Variational Optimization of Neural Networks", 2018 (slides).
    [2] Wierstra et al., "Natural Evolution Strategies", JMLR 15, 2014.
    [3] Salimans et al., "Evolution Strategies as a Scalable Alternative to
        Reinforcement Learning", arXiv 1703.03864, 2017.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras

from keras_vo import checks
from keras_vo import fitness_shaping as shaping_lib
from keras_vo import inner_optimizer as inner_lib
from keras_vo import search_distribution as distribution_lib
from keras_vo import technique_checks as techniques
from keras_vo.minimize import Minimize
from keras_vo.perturbations import registry
from keras_vo.replicas import cost
from keras_vo.search.credit import Generation
from keras_vo.search.state import Settings
from keras_vo.search_files import BESIDE
from keras_vo.search_rules import rules_for
from keras_vo.sensitivity import checked_sensitivity
from keras_vo.user_steps import PLAIN_MODEL

__all__ = ["Generation", "VOOptimizer", "find_vo_optimizer"]


@keras.saving.register_keras_serializable(package="keras_vo")
class VOOptimizer(Minimize):
    """Trains weights by variational optimization, from forward passes only.

    Instead of the loss f(w), it minimises the upper bound

        U(mu, sigma) = E[f(w)],   w ~ N(mu, diag sigma^2)       [1, eq. 6]

    by search gradients: each step draws `population_size` weights around the
    model's own (mu), evaluates their losses, and moves mu and sigma towards
    the better ones. Neither f nor the network is ever differentiated. Of
    variables with a `constraint`, members have weights that satisfy it, and so
    has the model after each step: see `keras_vo.constraints`. Weights of
    bfloat16 and float16 have a mean in float32: see `keras_vo.precision`.

    Compile it into a `VOModel`, `VOSequential`, a subclass of `VOTrainStep`
    or a model given to `make_variational`; or call `minimize`.

    Args:
        inner_optimizer: the Keras optimizer that moves mu by the search
            gradient. Its learning rate (and schedule), weight decay, EMA and
            clipping act as they do on any gradient. A name stands for that
            optimizer with learning rate 0.02 (0.002 for a model that is
            trained already when `fit` begins), otherwise Keras's defaults;
            weights with noise on activations take steps in units of sigma
            instead: see `keras_vo.search.activation_scale`.
        population_size: number N of members evaluated a step that have noise
            on their weights; even if `antithetic`.
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
            finite losses [N] to utilities [N] (higher for a higher loss), which
            is called as the optimizer is built: do they scale with the losses?
            The losses of single examples (see `perturbation`) are not
            shaped: less what they are in the other members, they are divided
            by one scale for all examples; by none where utilities have the
            scale of the losses.
        max_kl: bound, in nats, on the KL divergence between the search
            distributions before and after a step. A step beyond it, that of
            the inner optimizer included, is shrunk along its own direction.
            `None`: no bound. New sensitivities change the distribution apart
            from it, unbounded. Not with an inner optimizer that keeps an EMA.
        perturbation: how weights are perturbed while a population is evaluated,
            of layers that do not say so themselves (as those of
            `keras_vo.layers` do). "full": each weight has noise of its own.
            "low_rank": that of kernels of two axes and more has rank 1 (the
            last axis against the others). "local_reparam": noise on the
            activations of Dense, EinsumDense (so in MultiHeadAttention too),
            Embedding and the scale of normalizations: each example is judged
            by its own loss. All other weights keep noise of their own, as do
            layers that can't be perturbed so, or should not
            (`keras_vo.perturbations.placement`). "auto": that; and of
            convolutions, where that of other layers would not pay.
        convolutions: how those are perturbed under "local_reparam": "full", or
            "local_reparam" too, where an example has no more outputs than there
            are weights (early convolutions have more, and keep "full").
        credit: what noise on activations is judged by: "example", its
            example's loss; or "position": where a layer's outputs have the
            axes of the loss, [batch, time], the loss at its own position.
            What it does elsewhere is ignored, but for `position_discount`.
        position_discount: the part, in [0, 1], of the loss at the next
            position along time; its square at the one after it, and so on.
        examples_population_size: number of members a step, on each replica,
            that have noise on activations (see `LocalReparamDense`); even if
            `antithetic`. They have no noise on weights, and none are
            evaluated where no layer asks for them; nor are those of
            `population_size` where all weights are searched over by noise on
            activations.
        sensitivity: of each weight, by which its noise is divided, so that
            noise is small where outputs depend on a weight much (`None`: all
            1). Sigma is then the root mean square of a layer's noise, and
            sigma / s that of a weight: see `keras_vo.search.sensitivity`
            [1, eq. 32-35]. "sum" and "abs": by derivatives of the network's
            outputs (never of the loss), of their mean over the batch, and of
            the absolute values of those of each example, which takes as many
            backward passes as there are outputs ("abs": and examples). The last
            axis of outputs is that of units; positions count as examples.
            "inputs": by the root mean square of what each row of a kernel is
            multiplied with, from a forward pass; it works with step units. Or
            a callable from the list of variables and the batch's inputs (`None`
            without a model) to a list of tensors like the variables. It has not
            paid on digits and MNIST (benchmarks/results/sensitivity.md).
        adaptation_sampling: whether the learning rates of the mean and of the
            log variance adapt [2] (for rates that are not known, on whole
            batches and functions: where losses say little of many weights they
            go to ten times the first): up by a tenth where members, weighted as
            if a step 3 times as large had been taken, have better losses, else
            back to where they began, a tenth of the way: see
            `keras_vo.search.adaptation_sampling`. For noise of full rank, and
            an inner optimizer without a schedule.
        importance_mixing: the least share of members that is drawn anew, in
            [0, 1]; others may be members of the last population, with the
            losses that they had, so chosen that all are distributed as new
            ones are (`None`: all are new). See
            `keras_vo.search.importance_mixing` for how many stay, where it
            pays and what it keeps. Call `forget_members()` where the objective
            or the data change. For noise of full rank, `antithetic=False`, and
            no tf.function with `jit_compile` around `minimize`.
        sensitivity_period: steps after which it is measured again, from the
            batch of that step.
        seed: base seed of the noise, an integer in [0, 2^63). `None`: drawn
            from Python's `random`, as `keras.utils.set_random_seed` sets it.
        chunk_size: members evaluated at once, at least one draw's. `None`:
            as many as are fast and fit `memory_budget`. The search does not
            depend on it; lower it where the activations of a chunk take too
            much memory.
        memory_budget: bytes for noise, perturbed weights, and activations
            that are perturbed. Within it noise is kept for the
            gradient, otherwise drawn a second time; and members with
            perturbed activations are evaluated once, otherwise twice. At
            least one member's weights must exist, so a model larger than the
            budget goes beyond it. Other activations come on top.
        exchange: what replicas of a tf.distribute strategy exchange.
            `"fitness"`: the losses only; each machine draws all noise and
            sums the gradient itself. `"gradient"`: the losses, and the
            gradients that replicas sum over their own members. `"auto"`: what
            `keras_vo.exchange.CostModel` finds cheaper. What has noise on
            activations exchanges its gradient in any case.
        keep_best: whether the best member there ever was, and its loss, are
            kept, as `best_weights` and `best_loss`; they are saved with the
            search. Of a noisy objective, or of batches, that is the luckiest
            one: evaluate it again, and mu, which averages over many.
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
        perturbation: str = "full",
        convolutions: str = "full",
        credit: str = "example",
        position_discount: float = 0.0,
        examples_population_size: int = 16,
        sensitivity: str | Callable[..., Any] | None = None,
        sensitivity_period: int = 10,
        adaptation_sampling: bool = False,
        importance_mixing: float | None = None,
        seed: int | None = None,
        chunk_size: int | None = None,
        memory_budget: int = 2**29,
        exchange: str = "auto",
        keep_best: bool = False,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs:
            raise ValueError(
                "VOOptimizer has no such argument; what concerns the step of "
                "the mean (learning rate, weight decay, clipping, EMA) is set "
                f"on `inner_optimizer`. Received: {kwargs}"
            )
        super().__init__(name)
        self.inner_optimizer = inner_lib.checked_inner(inner_optimizer, max_kl)
        self._rate_by_name = inner_lib.rate_by_name(inner_optimizer)
        self.population_size = checks.checked_size(
            "population_size", population_size, antithetic
        )
        self.search_distribution = distribution_lib.get(search_distribution)
        self.natural_gradient = bool(natural_gradient)
        self.antithetic = bool(antithetic)
        self.fitness_shaping = shaping_lib.canonical(fitness_shaping)
        self._shape_fitness = shaping_lib.get(fitness_shaping, self.antithetic)
        self.max_kl = (
            None if max_kl is None else checks.checked_number("max_kl", max_kl)
        )
        registry.chosen(perturbation, convolutions)  # or an error
        self.perturbation, self.convolutions = perturbation, convolutions
        self.credit, self.position_discount = techniques.checked_credit(
            credit, position_discount
        )
        self.examples_population_size = checks.checked_size(
            "examples_population_size", examples_population_size, antithetic
        )
        self.sensitivity = checked_sensitivity(sensitivity)
        self.sensitivity_period = checks.checked_integer(
            "sensitivity_period", sensitivity_period
        )
        self.adaptation_sampling = techniques.checked_adaptation(
            adaptation_sampling, perturbation, self.inner_optimizer
        )
        self.importance_mixing = techniques.checked_alpha(
            importance_mixing, perturbation, self.antithetic
        )
        self.seed = None if seed is None else checks.checked_seed(seed)
        if chunk_size is not None:
            chunk_size = checks.checked_integer("chunk_size", chunk_size)
        self.chunk_size = chunk_size
        self.memory_budget = checks.checked_integer(
            "memory_budget", memory_budget
        )
        self.exchange = cost.checked_exchange(exchange)
        self.keep_best = bool(keep_best)

    def settings_for(self, variables: Sequence[Any]) -> Settings:
        """What does not change from step to step, for these weights."""
        rules = rules_for(
            variables,
            self.search_distribution.layout(variables),
            self.search_distribution,
            self.population_size,
            max_kl=self.max_kl,
            adaptation_sampling=self.adaptation_sampling,
            importance_mixing=self.importance_mixing,
            scaled=self.sensitivity is not None,
            keep_best=self.keep_best,
        )
        return Settings(
            self.population_size,
            self.examples_population_size,
            self.position_discount,
            self.antithetic,
            self._shape_fitness,
            shaping_lib.is_loss_scaled(
                self.fitness_shaping, self.population_size, self._layout.dtype
            ),
            self.natural_gradient,
            rules,
            self.chunk_size,
            self.memory_budget,
            self.importance_mixing,
            self.noise_generator,
        )

    def scale_loss(self, loss: Any) -> Any:
        raise ValueError(PLAIN_MODEL)

    def apply(self, grads: Any, trainable_variables: Any = None) -> Any:
        raise ValueError(PLAIN_MODEL)

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
            "perturbation": self.perturbation,
            "convolutions": self.convolutions,
            "credit": self.credit,
            "position_discount": self.position_discount,
            **self.beside_arguments(),
            "examples_population_size": self.examples_population_size,
            "sensitivity": (
                serialize(self.sensitivity)
                if callable(self.sensitivity)
                else self.sensitivity
            ),
            "sensitivity_period": self.sensitivity_period,
            "adaptation_sampling": self.adaptation_sampling,
            "importance_mixing": self.importance_mixing,
            "seed": self.seed,
            "chunk_size": self.chunk_size,
            "memory_budget": self.memory_budget,
            "exchange": self.exchange,
            "keep_best": self.keep_best,
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: Any = None
    ) -> VOOptimizer:
        config = dict(config)
        beside = {name: config.pop(name) for name in BESIDE if name in config}
        for key, value in config.items():
            if isinstance(value, dict):
                config[key] = keras.saving.deserialize_keras_object(
                    value, custom_objects=custom_objects
                )
        optimizer = cls(**config)
        optimizer.set_beside_arguments(beside, config)
        return optimizer


def find_vo_optimizer(optimizer: Any) -> VOOptimizer | None:
    """The VOOptimizer in a chain of wrappers such as LossScaleOptimizer."""
    while optimizer is not None and not isinstance(optimizer, VOOptimizer):
        optimizer = getattr(optimizer, "inner_optimizer", None)
    return optimizer
