"""The weights of members, made of a search distribution and seeds.

There are no variables: a `Frame` says all that is to be known of them, and can
be sent to another process.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_vo import checks
from keras_vo.perturbations.base import Space
from keras_vo.perturbations.choice import Choice
from keras_vo.perturbations.scope import Recording
from keras_vo.perturbations.together import Perturbations
from keras_vo.search import noise as noise_lib
from keras_vo.search.chunks import Noise
from keras_vo.search.credit import MEMBER
from keras_vo.search.gaussian import Gaussian
from keras_vo.search.generators import FIRST
from keras_vo.search.layout import WeightLayout

__all__ = ["Frame", "Weight", "fingerprint", "identity", "maker"]


@dataclasses.dataclass(frozen=True)
class Weight:
    """What stands for a variable where there is none.

    Attributes:
        name: the variable's.
        shape: its shape.
        dtype: the name of its dtype.
        constraint: its constraint, or `None`.
        handle: there is none.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    constraint: Any = None
    handle: None = None

    @classmethod
    def of(cls, variable: Any) -> Weight:
        """What stands for `variable`."""
        dtype = keras.backend.standardize_dtype(variable.dtype)
        constraint = getattr(variable, "constraint", None)
        name = checks.variable_name(variable)
        return cls(name, tuple(variable.shape), dtype, constraint)


@dataclasses.dataclass(frozen=True)
class Frame:
    """What all populations of a search have in common.

    Attributes:
        weights: what stands for the variables.
        layout: of them.
        choice: how they are perturbed.
        generator: name of what draws their noise. Populations that were
            pickled before there was a choice have the first.
    """

    weights: tuple[Weight, ...]
    layout: WeightLayout
    choice: Choice
    generator: str = FIRST

    def perturbations(
        self,
        means: Sequence[tf.Tensor],
        log_variance: tf.Tensor,
        sensitivity: tf.Tensor | None,
    ) -> Perturbations:
        """How they are perturbed around these means."""
        space = Space(
            Gaussian(self.layout, list(means), log_variance, sensitivity),
            {id(weight): i for i, weight in enumerate(self.weights)},
            adapts=False,
        )
        recording = Recording(self.weights, self.choice, means)
        return Perturbations(recording, space)


_makers: dict[Any, tuple[Frame, Any]] = {}
_MOST_MAKERS = 8


def maker(frame: Frame) -> Any:
    """The function of `_new_maker`, one for all frames that are equal."""
    key = (
        frame.layout,
        frame.choice,
        frame.generator,
        tuple((w.shape, w.dtype, identity(w)) for w in frame.weights),
    )
    if key not in _makers:
        while len(_makers) >= _MOST_MAKERS:
            del _makers[next(iter(_makers))]
        # The frame is kept: what is told apart by its id has to live on.
        _makers[key] = frame, _new_maker(frame)
    return _makers[key][1]


def identity(weight: Weight) -> Any:
    """What tells a constraint from others, in other processes too."""
    if weight.constraint is None:
        return None
    try:
        return pickle.dumps(weight.constraint)
    except Exception:  # as of a lambda
        return id(weight.constraint)


def _new_maker(frame: Frame) -> Any:
    """From a search distribution, seeds, and indices and signs of members to
    their weights, [n, ...] each.
    """

    @tf.function(reduce_retracing=True, autograph=False)
    def make(
        means: list[tf.Tensor],
        log_variance: tf.Tensor,
        sensitivity: tf.Tensor | None,
        base_seed: tf.Tensor,
        generation: tf.Tensor,
        directions: tf.Tensor,
        signs: tf.Tensor,
    ) -> list[tf.Tensor]:
        kinds = frame.perturbations(means, log_variance, sensitivity).at(MEMBER)
        drawn = noise_lib.draw_noise(
            base_seed,
            tf.fill(tf.shape(directions), generation),
            directions,
            (kinds.noise_size,),
            frame.layout.dtype,
            generator=frame.generator,
        )
        # Not as an objective of `member`: its scope is for losses.
        return tf.vectorized_map(
            lambda row: kinds.weights(Noise(row[0]), row[1]), (drawn, signs)
        )

    return make


def fingerprint(
    frame: Frame,
    means: Sequence[np.ndarray],
    log_variance: np.ndarray,
    *more: np.ndarray | None,
) -> str:
    """Of a search distribution, and what else there is: others have another
    one.
    """
    digest = hashlib.blake2b(digest_size=8)
    shapes = [(weight.shape, weight.dtype) for weight in frame.weights]
    said: tuple[Any, ...] = shapes, frame.layout.groups, frame.choice
    if frame.generator != FIRST:
        said = (*said, frame.generator)
    digest.update(repr(said).encode())
    for array in (*means, log_variance, *more):
        if array is not None:
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
