"""Common random numbers where a user's code draws its own.

Layers and losses that draw by `tf.random`, `tf.nn.dropout` or a
`tf.random.Generator` would show each member other numbers, and what members
lose would differ by what they drew. Here their ops draw from a seed instead,
the same for all members.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from keras_vo.evaluation.effects import is_random
from keras_vo.search import seeds
from keras_vo.tensorflow_compat import called_for_each_op

__all__ = ["PythonRandomness", "common_random_numbers"]

# Of the generation: indices from 0 are those of directions, small negative
# ones those of random layers.
_FIRST = -(2**40)
_OF_PYTHON = -(2**41)


def _with_parameter(draw: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Of an op that draws `shape` numbers for each of its parameters."""

    def drawn(
        shape: tf.Tensor, parameter: tf.Tensor, seed: tf.Tensor, dtype: Any
    ) -> tf.Tensor:
        full = tf.concat([shape, tf.shape(parameter, shape.dtype)], axis=0)
        return draw(full, seed, dtype=dtype, **{name: parameter})

    return drawn


# From the inputs of an op, a seed and the dtype of its output to what it draws.
_DRAWS: dict[str, Callable[..., tf.Tensor]] = {
    "RandomStandardNormal": tf.random.stateless_normal,
    "TruncatedNormal": tf.random.stateless_truncated_normal,
    "RandomUniform": tf.random.stateless_uniform,
    "RandomUniformInt": lambda shape, low, high, seed, dtype: (
        tf.random.stateless_uniform(shape, seed, low, high, dtype)
    ),
    "Multinomial": tf.random.stateless_categorical,
    "RandomGamma": _with_parameter(tf.random.stateless_gamma, "alpha"),
    "RandomPoissonV2": _with_parameter(tf.random.stateless_poisson, "lam"),
    "RandomShuffle": lambda value, seed, dtype: (
        tf.random.experimental.stateless_shuffle(value, seed)
    ),
    # What a `tf.random.Generator` draws from: its state.
    "RngReadAndSkip": lambda state, algorithm, delta, seed, dtype: (
        tf.random.stateless_uniform([3], seed, None, None, dtype)
    ),
}


@contextlib.contextmanager
def common_random_numbers(seed: tf.Tensor, left: set[str]) -> Iterator[None]:
    """A scope in whose graph random ops draw from a seed.

    Args:
        seed: of the generation, as `seeds.generation_seed` makes it.
        left: a set, to which the types of ops are added that go on drawing
            other numbers for each member: those in the body of a loop (one op
            of a graph, which would draw the same in each round), and those
            that have no form with a seed.
    """
    own = tf.compat.v1.get_default_graph()
    drawn = 0

    def in_loop(graph: Any) -> bool:
        while graph is not None and graph is not own:
            if "While" in type(graph).__name__:
                return True
            graph = getattr(graph, "outer_graph", None)
        return False

    def from_seed(op_type: str, inputs: Any, outputs: Any, graph: Any) -> Any:
        nonlocal drawn
        if not is_random(op_type):
            return None
        if op_type not in _DRAWS or in_loop(graph):
            left.add(op_type)
            return None
        index = tf.constant(_FIRST - drawn, tf.int64)
        drawn += 1
        result = _DRAWS[op_type](
            *inputs,
            seed=seeds.single_seed(seed, index),
            dtype=outputs[0].dtype,
        )
        result.set_shape(outputs[0].shape)
        return [result]

    with called_for_each_op(from_seed):
        yield


class PythonRandomness:
    """The states of `random` and `np.random`, for Python in a member.

    Args:
        seed: as that of `common_random_numbers`; `None`: of no use.
    """

    def __init__(self, seed: tf.Tensor | None) -> None:
        self._seed = seed
        self._states: list[Any] = []

    def seed(self) -> tf.Tensor:
        """An op that lets them draw the same in each member."""
        index = tf.constant(_OF_PYTHON, tf.int64)
        return _called(self._push, seeds.single_seed(self._seed, index)[0])

    def restore(self) -> tf.Tensor:
        """An op that lets them go on from where they were before `seed`."""
        return _called(self._pop, tf.zeros([]))

    def _push(self, seed: Any) -> None:
        self._states.append((random.getstate(), np.random.get_state()))
        random.seed(int(seed))
        np.random.seed(int(seed) % 2**32)

    def _pop(self, _: Any) -> None:
        python, numpy = self._states.pop()
        random.setstate(python)
        np.random.set_state(numpy)


def _called(function: Callable[[Any], None], value: tf.Tensor) -> tf.Tensor:
    """An op that calls `function`."""

    def called(value: Any) -> Any:
        function(value)
        return np.int32(0)

    return tf.numpy_function(called, [value], tf.int32)
