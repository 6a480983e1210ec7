"""Train Keras models by variational optimization, from forward passes only."""

# First: it checks Keras and its backend before anything else needs them.
from keras_vo import keras_compat as _first  # noqa: F401  # isort: skip
from keras_vo import (
    callbacks,
    distribution,
    exchange,
    fitness_shaping,
    layers,
    optimizers,
    rl,
)
from keras_vo.models import VOModel, VOSequential, make_variational
from keras_vo.optimizer import Generation, VOOptimizer
from keras_vo.population import Population
from keras_vo.population_calls import population_call
from keras_vo.remote_objective import RemoteObjective
from keras_vo.search_distribution import GaussianSearchDistribution
from keras_vo.stopping import stop_when
from keras_vo.told import Report
from keras_vo.training import VOTrainStep
from keras_vo.version import __version__

__all__ = [
    "GaussianSearchDistribution",
    "Generation",
    "Population",
    "RemoteObjective",
    "Report",
    "VOModel",
    "VOOptimizer",
    "VOSequential",
    "VOTrainStep",
    "__version__",
    "callbacks",
    "distribution",
    "exchange",
    "fitness_shaping",
    "layers",
    "make_variational",
    "optimizers",
    "population_call",
    "rl",
    "stop_when",
]
