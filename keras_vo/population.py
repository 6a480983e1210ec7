"""A population that is asked for: its members' weights, made when wanted.

`VOOptimizer.ask` makes it. It holds the search distribution of its generation
and the seeds of its members, so that it is small beside their weights, can be
pickled, and has the same members in any process.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

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
from keras_vo.search.layout import WeightLayout

__all__ = [
    "Frame",
    "Population",
    "Seeds",
    "Weight",
    "check_seeds",
    "fingerprint",
]

# Members' weights that are made at once.
_CHUNK_BYTES = 2**25


class Seeds(NamedTuple):
    """What a population is made of, given the search: a few numbers.

    All are of Python, so that JSON or any message can hold them.

    Attributes:
        base_seed: of the search.
        generation: number of populations before this one.
        size: number of members.
        antithetic: whether members n and n + size / 2 mirror each other.
        fingerprint: of the search distribution.
    """

    base_seed: int
    generation: int
    size: int
    antithetic: bool
    fingerprint: str


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
    """

    weights: tuple[Weight, ...]
    layout: WeightLayout
    choice: Choice

    def perturbations(
        self, means: Sequence[tf.Tensor], log_variance: tf.Tensor
    ) -> Perturbations:
        """How they are perturbed around these means."""
        space = Space(
            Gaussian(self.layout, list(means), log_variance),
            {id(weight): i for i, weight in enumerate(self.weights)},
            adapts=False,
        )
        recording = Recording(self.weights, self.choice, means)
        return Perturbations(recording, space)


@functools.lru_cache(maxsize=8)
def _maker(frame: Frame) -> Any:
    """From a search distribution, seeds, and indices and signs of members to
    their weights, [n, ...] each.
    """

    @tf.function(reduce_retracing=True, autograph=False)
    def make(
        means: list[tf.Tensor],
        log_variance: tf.Tensor,
        base_seed: tf.Tensor,
        generation: tf.Tensor,
        directions: tf.Tensor,
        signs: tf.Tensor,
    ) -> list[tf.Tensor]:
        kinds = frame.perturbations(means, log_variance).at(MEMBER)
        drawn = noise_lib.draw_noise(
            base_seed,
            tf.fill(tf.shape(directions), generation),
            directions,
            (kinds.noise_size,),
            frame.layout.dtype,
        )
        # Not as an objective of `member`: its scope is for losses.
        return tf.vectorized_map(
            lambda row: kinds.weights(Noise(row[0]), row[1]), (drawn, signs)
        )

    return make


class Population(Sequence[list[np.ndarray]]):
    """N members, each a list of arrays in the order of the variables.

    It is a sequence: `len(population)`, `population[3]`, `for weights in
    population`. Weights are made when they are asked for, and not kept. They
    satisfy the constraints of their variables. With antithetic sampling member
    n + N/2 mirrors member n.

    Attributes:
        seeds: what it can be made of again, by `VOOptimizer.ask`.
        own: indices of the members that this process is to evaluate: all, but
            for workers of a MultiWorkerMirroredStrategy, which have a part
            each.
    """

    def __init__(
        self,
        frame: Frame,
        means: Sequence[np.ndarray],
        log_variance: np.ndarray,
        seeds: Seeds,
        own: Sequence[int],
    ) -> None:
        self._frame = frame
        self._means = list(means)
        self._log_variance = log_variance
        self.seeds = seeds
        self.own = own
        self._kept: list[tf.Tensor] | None = None

    @property
    def generation(self) -> int:
        """Number of populations before this one."""
        return self.seeds.generation

    @property
    def means(self) -> list[np.ndarray]:
        """mu of the search distribution it is drawn from.

        In the variables' order; of variables of low precision in float32.
        """
        return [mean.copy() for mean in self._means]

    @property
    def weights(self) -> tuple[Weight, ...]:
        """What stands for the variables."""
        return self._frame.weights

    @property
    def bytes_each(self) -> int:
        """Bytes of the weights of one member, at least in its search."""
        return self._frame.layout.size * self._frame.layout.dtype.size

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def __len__(self) -> int:
        return self.seeds.size

    def __repr__(self) -> str:
        return (
            f"<Population of generation {self.generation}: {len(self)} members "
            f"of {self._frame.layout.size} weights>"
        )

    def __getitem__(self, index: Any) -> Any:
        """The weights of one member; of a slice, a list of members."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return [array[0] for array in self.stacked([index])]

    def __iter__(self) -> Iterator[list[np.ndarray]]:
        for arrays in self.chunks():
            for row in range(len(arrays[0])):
                yield [array[row] for array in arrays]

    def chunks(self, size: int | None = None) -> Iterator[list[np.ndarray]]:
        """The members in order, `size` at a time: lists of arrays [n, ...].

        Args:
            size: members in a chunk, at most; `None`: some 32 MiB of weights.
        """
        if size is None:
            size = max(_CHUNK_BYTES // max(self.bytes_each, 1), 1)
        size = checks.checked_integer("size", size)
        for first in range(0, len(self), size):
            yield self.stacked(range(first, min(first + size, len(self))))

    def stacked(self, members: Iterable[int] | None = None) -> list[np.ndarray]:
        """The weights of some members, an array [n, ...] for each variable.

        Args:
            members: their indices; `None`: all.
        """
        return [tensor.numpy() for tensor in self.tensors(members)]

    def tensors(self, members: Iterable[int] | None = None) -> list[tf.Tensor]:
        """`stacked`, as tensors."""
        indices = np.arange(len(self)) if members is None else self._at(members)
        directions = len(self) // (2 if self.seeds.antithetic else 1)
        signs = np.where(indices < directions, 1.0, -1.0)
        return list(
            _maker(self._frame)(
                [tf.convert_to_tensor(mean) for mean in self._means],
                tf.convert_to_tensor(self._log_variance),
                tf.constant(self.seeds.base_seed, tf.int64),
                tf.constant(self.seeds.generation, tf.int64),
                tf.constant(indices % directions, tf.int64),
                tf.constant(signs, self._frame.layout.dtype),
            )
        )

    def kept_tensors(self) -> list[tf.Tensor]:
        """`tensors` of all members, which are made once."""
        if self._kept is None:
            self._kept = self.tensors()
        return self._kept

    def _at(self, members: Iterable[int]) -> np.ndarray:
        """Checked indices of members, counted from 0."""
        indices = []
        for member in members:
            try:
                index = range(len(self))[member]
            except (IndexError, TypeError) as error:
                raise type(error)(
                    f"Expected indices of members, from 0 to {len(self) - 1}. "
                    f"Received: {member!r}"
                ) from None
            indices.append(index)
        return np.array(indices, np.int64)

    def holds(self, values: Sequence[np.ndarray]) -> bool:
        """Whether `values` are the weights of one of the members.

        The last one is looked at first.
        """
        last = len(self) - 1
        if _equal(self[last], values):
            return True
        return any(_equal(weights, values) for weights in self)


def _equal(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> bool:
    return all(map(np.array_equal, a, b))


def fingerprint(
    frame: Frame, means: Sequence[np.ndarray], log_variance: np.ndarray
) -> str:
    """Of a search distribution: others have another one."""
    digest = hashlib.blake2b(digest_size=8)
    shapes = [(weight.shape, weight.dtype) for weight in frame.weights]
    digest.update(repr((shapes, frame.layout.groups, frame.choice)).encode())
    for array in (*means, log_variance):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def check_seeds(seeds: Seeds, here: Seeds) -> None:
    """Raises unless a population is that of the search as it is now.

    Args:
        seeds: of the population.
        here: of the search.
    """
    if seeds[:1] + seeds[2:4] == here[:1] + here[2:4]:  # but generations
        if seeds.generation < here.generation:
            raise ValueError(
                "Expected a population of generation "
                f"{here.generation}, where the search is: `ask` again. "
                f"Received: one of generation {seeds.generation}, which "
                "was told already"
            )
        if seeds.generation > here.generation:
            raise ValueError(
                "Expected a population of generation "
                f"{here.generation}, where the search is. Received: one of "
                f"generation {seeds.generation}: restore the search (its "
                "`.keras` file or checkpoint) as it was when it was asked"
            )
    if seeds != here:
        raise ValueError(
            "Expected a population of this search. Received: one of "
            f"another, or of other weights: {seeds}, and not {here}"
        )
