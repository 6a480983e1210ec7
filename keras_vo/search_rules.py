"""The rules that the arguments of `VOOptimizer` ask for, in their order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from keras_vo import constraints
from keras_vo.search.activation_scale import ByExample
from keras_vo.search.adaptation_sampling import AdaptationSampling
from keras_vo.search.best import KeepBest
from keras_vo.search.former_members import FormerMembers
from keras_vo.search.layout import WeightLayout
from keras_vo.search.rules import MaxKL, Rule
from keras_vo.search_distribution import GaussianSearchDistribution
from keras_vo.technique_checks import warn_of_many_weights

__all__ = ["rules_for"]


def rules_for(
    variables: Sequence[Any],
    layout: WeightLayout,
    distribution: GaussianSearchDistribution,
    population_size: int,
    *,
    max_kl: float | None,
    adaptation_sampling: bool,
    importance_mixing: float | None,
    scaled: bool,
    keep_best: bool,
) -> list[Rule]:
    """See the arguments of `VOOptimizer`.

    Warns of importance mixing with many weights.

    Args:
        variables: that are searched over.
        layout: of them.
        distribution: of weights.
        population_size: N.
        max_kl: as there.
        adaptation_sampling: as there.
        importance_mixing: as there.
        scaled: whether weights have sensitivities.
        keep_best: as there.
    """
    rules: list[Rule] = [
        ByExample(),
        *distribution.rules(variables, population_size),
    ]
    if max_kl is not None:
        project = constraints.projection(variables, layout)
        rules.append(MaxKL(max_kl, project))
    if adaptation_sampling:
        rate = distribution.learning_rate if distribution.adapts else None
        rules.append(AdaptationSampling(layout.size, rate))
    if importance_mixing is not None:
        warn_of_many_weights(layout.size, population_size)
        rules.append(FormerMembers(population_size, layout.size, scaled))
    if keep_best:
        rules.append(KeepBest(layout))
    return rules
