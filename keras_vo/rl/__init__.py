"""Policies trained in environments of gymnasium.

`Rollouts` plays the episodes of a population. `ObservationNormalization` is
the first layer of a policy, and `ClipUp` the optimizer that is used most.
gymnasium is an extra: `pip install keras_vo[rl]`.
"""

from keras_vo.optimizers import ClipUp
from keras_vo.rl.episodes import Episodes
from keras_vo.rl.normalization import ObservationNormalization
from keras_vo.rl.rollouts import Rollouts

__all__ = ["ClipUp", "Episodes", "ObservationNormalization", "Rollouts"]
