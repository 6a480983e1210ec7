"""A population that is asked for: its members' weights, made when wanted.

`VOOptimizer.ask` makes it. It holds the search distribution of its generation
and the seeds of its members, so that it is small beside their weights, can be
pickled, and has the same members in any process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from keras_vo import checks
from keras_vo.member_weights import (
    Frame,
    Weight,
    identity,
    maker,
)

__all__ = ["Population", "Seeds", "check_seeds", "checked_seeds", "equal"]

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
        fingerprint: of the search distribution, and of which noise members
            have.
    """

    base_seed: int
    generation: int
    size: int
    antithetic: bool
    fingerprint: str


class Population(Sequence[list[np.ndarray]]):
    """N members, each a list of arrays in the order of the variables.

    It is a sequence: `len(population)`, `population[3]`, `for weights in
    population`. Weights are made when they are asked for, and not kept. They
    satisfy the constraints of their variables. With antithetic sampling member
    n + N/2 mirrors member n.

    Attributes:
        seeds: what it can be made of again, by `VOOptimizer.ask`.
        reused: how many members of former populations, with the losses that
            they had, the step has besides these: see `importance_mixing`.
        sensitivity: s [d] of the weights, see `VOOptimizer`; `None`: 1.
        own: indices of the members that this process is to evaluate: all, but
            for workers of a MultiWorkerMirroredStrategy, which have a part
            each.
    """

    def __init__(
        self,
        frame: Frame,
        means: Sequence[np.ndarray],
        log_variance: np.ndarray,
        sensitivity: np.ndarray | None,
        seeds: Seeds,
        own: Sequence[int],
        reused: int = 0,
        directions: np.ndarray | None = None,
    ) -> None:
        self._frame = frame
        self._means = list(means)
        self._log_variance = log_variance
        self.sensitivity = sensitivity
        self.seeds = seeds
        self.own = own
        self.reused = reused
        self._directions = directions
        self._kept: list[tf.Tensor] | None = None

    @property
    def generation(self) -> int:
        """Number of populations before this one."""
        return self.seeds.generation

    @property
    def needs_a_loss(self) -> bool:
        """Whether there is no step without one of these: not if a single
        member is new, and there are others to compare with each other.
        """
        return len(self) > 1 or self.reused < 2

    @property
    def means(self) -> list[np.ndarray]:
        """mu of the search distribution it is drawn from.

        In the variables' order; of variables of low precision in float32.
        """
        return [mean.copy() for mean in self._means]

    @property
    def center(self) -> tuple[list[tf.Tensor], tf.Tensor | None]:
        """`means` and `sensitivity`, as tensors."""
        means, s = self._means, self.sensitivity
        return (
            [tf.convert_to_tensor(mean) for mean in means],
            None if s is None else tf.convert_to_tensor(s),
        )

    @property
    def weights(self) -> tuple[Weight, ...]:
        """What stands for the variables."""
        return self._frame.weights

    @property
    def bytes_each(self) -> int:
        """Bytes of the weights of one member, at least in its search."""
        return self._frame.layout.size * self._frame.layout.dtype.size

    @property
    def rounded_means(self) -> list[np.ndarray]:
        """`means` in the dtypes of the variables, as these hold them."""
        return [
            np.asarray(tf.cast(mean, weight.dtype).numpy())
            for mean, weight in zip(self._means, self.weights, strict=True)
        ]

    def __getstate__(self) -> dict[str, Any]:
        for weight in self.weights:
            if isinstance(identity(weight), int):
                raise TypeError(
                    "Expected constraints that can be pickled, as the "
                    "population is: functions and classes of a module. "
                    f"Received: {weight.constraint!r} of {weight.name!r}"
                )
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
        return [array[0, ...] for array in self.stacked([index])]

    def __iter__(self) -> Iterator[list[np.ndarray]]:
        for arrays in self.chunks():
            for row in range(len(arrays[0])):
                yield [array[row, ...] for array in arrays]

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
        drawn = indices % directions
        if self._directions is not None:
            drawn = self._directions[drawn]
        means, s = self.center
        return list(
            maker(self._frame)(
                means,
                tf.convert_to_tensor(self._log_variance),
                s,
                tf.constant(self.seeds.base_seed, tf.int64),
                tf.constant(self.seeds.generation, tf.int64),
                tf.constant(drawn, tf.int64),
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
        if equal(self[last], values):
            return True
        return any(equal(weights, values) for weights in self)


def equal(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> bool:
    """Whether weights are the same, NaN where others are too."""
    return all(
        np.array_equal(x, y, equal_nan=True) for x, y in zip(a, b, strict=True)
    )


def checked_seeds(seeds: Any) -> Seeds:
    """Seeds as they come from elsewhere, a list of JSON, say."""
    try:
        return Seeds(*seeds)
    except TypeError as error:
        raise TypeError(
            "Expected the `seeds` of a population: "
            f"{', '.join(Seeds._fields)}. Received: {seeds!r:.80}"
        ) from error


def check_seeds(seeds: Seeds, here: Seeds) -> None:
    """Raises unless a population is that of the search as it is now.

    Args:
        seeds: of the population.
        here: of the search.
    """
    one_search = seeds.base_seed == here.base_seed
    if one_search and seeds.antithetic == here.antithetic:
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
