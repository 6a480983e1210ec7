"""Where each weight tensor lies in one flat vector, and in which group.

A search distribution over a network's weights is a distribution over one
vector of d numbers. `WeightLayout` maps that vector to the list of weight
tensors and back, and knows which weights share a variance.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

__all__ = ["WeightLayout", "layer_groups"]


def layer_groups(variables: Sequence[Any]) -> tuple[int, ...]:
    """Numbers the layer that each variable belongs to: 0, 1, 2, ...

    Keras names a variable `layer/.../name`: variables whose path has the same
    parent belong to one layer. A variable without a parent (a `tf.Variable`,
    say) is a layer of its own, and so is a second layer of the same name.
    """
    seen: collections.Counter[str] = collections.Counter()
    keys: dict[tuple[object, ...], int] = {}
    groups = []
    for index, variable in enumerate(variables):
        path = getattr(variable, "path", "")
        parent, slash, _ = path.rpartition("/")
        key = (parent, seen[path]) if slash else (index,)
        seen[path] += 1
        groups.append(keys.setdefault(key, len(keys)))
    return tuple(groups)


@dataclasses.dataclass(frozen=True)
class WeightLayout:
    """The flat view of a list of weight tensors.

    Attributes:
        shapes: shape of each weight tensor.
        dtypes: dtype name of each weight tensor.
        groups: for each weight tensor, the index of the variance it shares,
            or `None` where every weight has a variance of its own.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    groups: tuple[int, ...] | None

    @property
    def sizes(self) -> list[int]:
        """Number of weights in each tensor."""
        return [math.prod(shape) for shape in self.shapes]

    @property
    def size(self) -> int:
        """d, the number of weights."""
        return sum(self.sizes)

    @property
    def dtype(self) -> tf.DType:
        """Float64 if a weight tensor is float64, otherwise float32."""
        return tf.float64 if "float64" in self.dtypes else tf.float32

    @property
    def group_sizes(self) -> list[int]:
        """Number of weights that share each variance."""
        if self.groups is None:
            return [1] * self.size
        totals = [0] * (max(self.groups) + 1)
        for group, size in zip(self.groups, self.sizes, strict=True):
            totals[group] += size
        return totals

    def flatten(self, weights: Sequence[Any]) -> tf.Tensor:
        """The weight tensors as one vector [d] of `dtype`."""
        parts = [
            tf.reshape(tf.cast(tf.convert_to_tensor(w), self.dtype), [-1])
            for w in weights
        ]
        return tf.concat(parts, axis=0)

    def unflatten(self, vector: tf.Tensor) -> list[tf.Tensor]:
        """The vector [d] as a list of weight tensors."""
        parts = tf.split(vector, self.sizes)
        return [
            tf.cast(tf.reshape(part, shape), dtype)
            for part, shape, dtype in zip(
                parts, self.shapes, self.dtypes, strict=True
            )
        ]

    def expand(self, values: tf.Tensor) -> tf.Tensor:
        """One value a group, [groups], as one value a weight.

        Returns a tensor that broadcasts against [d]: [d], or [1] where all
        weights share one value.
        """
        if self.groups is None or len(self.group_sizes) == 1:
            return values
        return tf.repeat(tf.gather(values, self.groups), self.sizes)

    def group_sums(self, vectors: tf.Tensor) -> tf.Tensor:
        """Sums [n, d] over the weights of each group: [n, groups]."""
        if self.groups is None:
            return vectors
        if len(self.group_sizes) == 1:
            return tf.reduce_sum(vectors, axis=-1, keepdims=True)
        runs = [
            (group, sum(size for _, size in members))
            for group, members in itertools.groupby(
                zip(self.groups, self.sizes, strict=True), lambda item: item[0]
            )
        ]
        totals: list[list[tf.Tensor]] = [[] for _ in self.group_sizes]
        parts = tf.split(vectors, [size for _, size in runs], axis=-1)
        for (group, _), part in zip(runs, parts, strict=True):
            totals[group].append(tf.reduce_sum(part, axis=-1))
        return tf.stack([tf.add_n(total) for total in totals], axis=-1)
