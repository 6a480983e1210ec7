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

__all__ = ["WeightLayout", "layer_groups", "layer_names"]


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


def layer_names(variables: Sequence[Any]) -> tuple[str, ...]:
    """The name of each layer that `layer_groups` numbers, all different.

    That is its path without what all paths begin with (the model's name), or
    the name of a variable without a parent.
    """
    groups = layer_groups(variables)
    paths: list[list[str]] = []
    for group, variable in zip(groups, variables, strict=True):
        if group == len(paths):
            path = getattr(variable, "path", variable.name.rpartition(":")[0])
            parts = path.split("/")
            paths.append(parts[:-1] or parts)
    common = 0
    while (
        all(len(parts) > common + 1 for parts in paths)
        and len({parts[common] for parts in paths}) == 1
    ):
        common += 1
    names: list[str] = []
    for index, parts in enumerate(paths):
        name = "/".join(parts[common:])
        while name in names:
            name = f"{name}_{index}"
        names.append(name)
    return tuple(names)


@dataclasses.dataclass(frozen=True)
class WeightLayout:
    """The flat view of a list of weight tensors.

    Attributes:
        shapes: shape of each weight tensor.
        dtypes: dtype name of each weight tensor.
        groups: for each weight tensor, the index of the variance it shares,
            or `None` where every weight has a variance of its own.
        float64: whether `dtype` is float64 though no weight tensor is.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    groups: tuple[int, ...] | None
    float64: bool = False

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
        wide = self.float64 or "float64" in self.dtypes
        return tf.float64 if wide else tf.float32

    @property
    def num_groups(self) -> int:
        """Number of variances."""
        if self.groups is None:
            return self.size
        return max(self.groups, default=-1) + 1

    @property
    def group_sizes(self) -> list[int]:
        """Number of weights that share each variance.

        Raises:
            ValueError: every weight has its own; a list of ones, as long as
                there are weights, has no place in a graph.
        """
        if self.groups is None:
            raise ValueError("Expected shared variances. Received: none")
        totals = [0] * self.num_groups
        for group, size in zip(self.groups, self.sizes, strict=True):
            totals[group] += size
        return totals

    def flatten(self, weights: Sequence[Any]) -> tf.Tensor:
        """The weight tensors as one vector [d] of `dtype`."""
        parts = [
            tf.reshape(tf.cast(tf.convert_to_tensor(w), self.dtype), [-1])
            for w in weights
        ]
        return tf.concat([tf.zeros([0], self.dtype), *parts], axis=0)

    def split(self, vector: tf.Tensor) -> list[tf.Tensor]:
        """The vector [d] as a list of vectors, one for each weight tensor."""
        return tf.split(vector, self.sizes) if self.sizes else []

    def unflatten(self, vector: tf.Tensor) -> list[tf.Tensor]:
        """The vector [d] as a list of weight tensors."""
        return [
            tf.cast(tf.reshape(part, shape), dtype)
            for part, shape, dtype in zip(
                self.split(vector), self.shapes, self.dtypes, strict=True
            )
        ]

    def per_tensor(self, values: tf.Tensor) -> list[tf.Tensor]:
        """One value a group, [groups], as one for each weight tensor.

        A scalar where the tensor's weights share one value, else shaped like
        the tensor.
        """
        if self.groups is not None:
            by_group = tf.unstack(values, self.num_groups)
            return [by_group[group] for group in self.groups]
        return [
            tf.reshape(part, shape)
            for part, shape in zip(self.split(values), self.shapes, strict=True)
        ]

    def by_group(self, values: Sequence[tf.Tensor]) -> tf.Tensor:
        """One value for each weight tensor, as `per_tensor` has them: their
        sums by group, [groups].
        """
        if self.groups is None:
            return self.flatten(values)
        totals: list[list[tf.Tensor]] = [[] for _ in range(self.num_groups)]
        for group, value in zip(self.groups, values, strict=True):
            totals[group].append(value)
        sums = [tf.reshape(tf.add_n(total), [1]) for total in totals]
        return tf.concat([tf.zeros([0], self.dtype), *sums], axis=0)

    def select(self, indices: Sequence[int]) -> WeightLayout:
        """The layout of some of the weight tensors, in the given order.

        Where variances are shared, each tensor is a group of its own in it.
        """
        return WeightLayout(
            tuple(self.shapes[i] for i in indices),
            tuple(self.dtypes[i] for i in indices),
            None if self.groups is None else tuple(range(len(indices))),
            self.dtype == tf.float64,
        )

    def expand(self, values: tf.Tensor) -> tf.Tensor:
        """One value a group, [..., groups], as one value a weight.

        Returns a tensor that broadcasts against [..., d]: that, or [..., 1]
        where all weights share one value.
        """
        if not self.groups or self.num_groups == 1:
            return values
        by_group = tf.split(values, self.num_groups, axis=-1)
        rest = tf.shape(values)[:-1]
        runs = zip(self.groups, self.sizes, strict=True)
        return tf.concat(
            [
                tf.broadcast_to(by_group[group], tf.concat([rest, [size]], 0))
                for group, size in runs
            ],
            axis=-1,
        )

    def group_sums(self, vectors: tf.Tensor) -> tf.Tensor:
        """Sums [n, d] over the weights of each group: [n, groups]."""
        if not self.groups:
            return vectors
        if self.num_groups == 1:
            return tf.reduce_sum(vectors, axis=-1, keepdims=True)
        runs = [
            (group, sum(size for _, size in members))
            for group, members in itertools.groupby(
                zip(self.groups, self.sizes, strict=True), lambda item: item[0]
            )
        ]
        totals: list[list[tf.Tensor]] = [[] for _ in range(self.num_groups)]
        parts = tf.split(vectors, [size for _, size in runs], axis=-1)
        for (group, _), part in zip(runs, parts, strict=True):
            totals[group].append(tf.reduce_sum(part, axis=-1))
        return tf.stack([tf.add_n(total) for total in totals], axis=-1)

    def group_means(self, vector: tf.Tensor) -> tf.Tensor:
        """Means of a vector [d] over the weights of each group: [groups]."""
        if self.groups is None:
            return vector
        sizes = tf.cast(tf.constant(self.group_sizes), vector.dtype)
        return self.group_sums(vector[None])[0] / sizes
