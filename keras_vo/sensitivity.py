"""What `VOOptimizer(sensitivity=...)` measures: see `search.sensitivity`."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from keras_vo.autograph import converted_as_caller
from keras_vo.evaluation import jacobians
from keras_vo.outputs_of_batch import OutputsOfBatch
from keras_vo.search import sensitivity as sensitivity_lib
from keras_vo.search.communicator import Communicator
from keras_vo.search.layout import layer_groups, layer_names

__all__ = ["Measurement", "checked_sensitivity"]

SUM, ABS, INPUTS = "sum", "abs", "inputs"
_KINDS = (SUM, ABS, INPUTS)


def checked_sensitivity(sensitivity: Any) -> Any:
    """`None`, one of the names, or a callable.

    Raises:
        ValueError: anything else.
    """
    if sensitivity is None or callable(sensitivity):
        return sensitivity
    if isinstance(sensitivity, str) and sensitivity in _KINDS:
        return sensitivity
    raise ValueError(
        f"`sensitivity` must be None, one of {list(_KINDS)}, or a callable "
        "from the variables and a batch of inputs to the sensitivity of each "
        f"weight. Received: sensitivity={sensitivity!r}"
    )


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Sensitivities of weights, from one batch and all replicas.

    Attributes:
        kind: see `checked_sensitivity`; not `None`.
        variables: that are searched over.
        outputs: the network on the batch; `None`: there is none.
        together: the replicas.
        dtype: of s.
        memory_budget: bytes of the rows of Jacobians that are there at once.
    """

    kind: Any
    variables: Sequence[Any]
    outputs: OutputsOfBatch | None
    together: Communicator
    dtype: tf.DType
    memory_budget: int

    @property
    def network(self) -> OutputsOfBatch:
        """That there has to be.

        Raises:
            ValueError: there is none.
        """
        if self.outputs is not None:
            return self.outputs
        raise ValueError(
            f"sensitivity={self.kind!r} is that of a network's outputs, which "
            "an objective does not show. Expected: a model trained by `fit` or "
            "`train_on_batch`; or a callable as `sensitivity`, from the "
            "variables (and None) to the sensitivity of each weight; or "
            f"sensitivity=None. Received: sensitivity={self.kind!r} in "
            "`minimize` or `ask`"
        )

    def refreshed(self, due: tf.Tensor, former: tf.Tensor) -> tf.Tensor:
        """s [d] of this batch if it is due and has examples, else `former`.

        Args:
            due: a scalar, the same on all replicas.
            former: s as it was.

        Raises:
            ValueError: the outputs have no gradient, or a callable returns
                something else than sensitivities.
        """
        if self.kind in (SUM, ABS):
            squares, examples = self._of_outputs(due)
        elif self.kind == INPUTS:
            squares, examples = self._of_inputs(due)
        else:
            squares, examples = self._of_callable(due)

        def measured() -> tf.Tensor:
            raw = tf.split(tf.sqrt(squares), _sizes(self.variables))
            layers = layer_groups(self.variables)
            return sensitivity_lib.normalized(raw, layers, self.dtype)

        return tf.cond(due & (examples > 0), measured, lambda: former)

    def _of_outputs(self, due: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """sum_k (1/I sum_i dy_k(x_i)/dw)^2 [d], and I."""
        outputs = self.network
        sizes = outputs.sizes
        units = [count for count, _ in sizes]
        size = sum(_sizes(self.variables))
        # As many units at once as their rows fit.
        most = max(self.memory_budget // (4 * size * self.dtype.size), 1)
        squares = tf.zeros([size], self.dtype)
        counts = tf.concat(
            [
                tf.fill([n], tf.cast(positions * outputs.examples, self.dtype))
                for n, positions in sizes
            ],
            axis=0,
        )
        for start in range(0, sum(units), most):
            chunk = range(start, min(start + most, sum(units)))
            own = counts[chunk.start : chunk.stop, None]
            found = functools.partial(self._rows, chunk, own)
            rows, totals = self._sum(due, found, [size, 1])
            means = tf.math.divide_no_nan(rows, totals)
            squares += tf.reduce_sum(tf.square(means), axis=0)
        return squares, self._examples()

    def _rows(self, units: range, counts: tf.Tensor) -> list[tf.Tensor]:
        """Rows of the Jacobian, summed over this replica's examples; and
        over how many of them.
        """
        outputs = self.network
        outputs.begin()

        def rows() -> tf.Tensor:
            what = outputs.in_use, outputs.means, outputs.inputs, units
            if self.kind == SUM:
                return jacobians.sum_rows(*what, self.dtype)
            return jacobians.absolute_rows(
                *what,
                self.dtype,
                sizes=outputs.sizes,
                memory_budget=self.memory_budget,
            )

        if tf.executing_eagerly():  # a graph shows why there is no gradient
            rows = tf.function(rows, autograph=False)
        try:
            return [rows(), counts]
        except jacobians.NoGradient as error:
            raise ValueError(self._no_gradient(error)) from None

    def _no_gradient(self, error: jacobians.NoGradient) -> str:
        groups, names = (
            layer_groups(self.variables),
            layer_names(self.variables),
        )
        layers = sorted({names[groups[i]] for i in error.weights})
        behind = f", behind {', '.join(error.ops)}" if error.ops else ""
        return (
            f"sensitivity={self.kind!r} differentiates the network's outputs "
            "(never the loss). Expected: outputs with a gradient by all "
            f'weights; or sensitivity="{INPUTS}", which needs forward passes '
            "only; or sensitivity=None. Received: outputs without a gradient "
            f"by the weights of {layers}{behind}"
        )

    def _of_inputs(self, due: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """1/I sum_i A(x_i)^2 of each weight [d], and the examples."""
        sizes = _sizes(self.variables)

        def found() -> list[tf.Tensor]:
            sums, counts = self.network.input_squares()
            return [sums[None], counts[None]]

        sums, counts = self._sum(due, found, [sum(sizes), len(sizes)])
        counts = tf.repeat(tf.reduce_sum(counts, axis=0), sizes)
        means = tf.math.divide_no_nan(tf.reduce_sum(sums, axis=0), counts)
        return tf.where(counts > 0, means, 1.0), self._examples()

    def _of_callable(self, due: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The mean square over replicas of what the callable returns."""
        sizes = _sizes(self.variables)

        def found() -> list[tf.Tensor]:
            inputs = None if self.outputs is None else self.outputs.inputs
            values = converted_as_caller(self.kind)(
                list(self.variables), inputs
            )
            return [tf.square(self._checked(values))[None]]

        (squares,) = self._sum(due, found, [sum(sizes)])
        mean = tf.reduce_sum(squares, axis=0) / self.together.count
        return mean, tf.ones([], self.dtype)

    def _checked(self, values: Any) -> tf.Tensor:
        """What the callable has returned, as one vector [d]."""
        expected = [tuple(v.shape) for v in self.variables]
        try:
            tensors = [tf.cast(value, self.dtype) for value in values]
            shapes = [tuple(t.shape) for t in tensors]
        except (TypeError, ValueError, tf.errors.OpError):
            shapes = None
        if shapes != expected:
            raise ValueError(
                "Expected a `sensitivity` that returns a list of tensors, one "
                f"for each variable, of the shapes {expected}. Received: "
                + (f"{values!r:.200}" if shapes is None else f"shapes {shapes}")
            )
        flat = [tf.reshape(t, [-1]) for t in tensors]
        joined = tf.concat(flat, axis=0)
        with tf.control_dependencies(
            [
                tf.debugging.assert_non_negative(
                    joined,
                    "Expected a `sensitivity` that returns numbers of 0 or "
                    "more. Received: others",
                )
            ]
        ):
            return tf.identity(joined)

    def _examples(self) -> tf.Tensor:
        own = tf.cast(self.network.examples, self.dtype)
        return self.together.sum([own])[0]

    def _sum(
        self,
        due: tf.Tensor,
        found: Callable[[], list[tf.Tensor]],
        columns: Sequence[int],
    ) -> list[tf.Tensor]:
        """Sums over replicas of what is found, [n, columns]; [0, columns] if
        not due, as replicas can't exchange anything within a condition.
        """
        own = tf.cond(
            due,
            found,
            lambda: [tf.zeros([0, n], self.dtype) for n in columns],
        )
        own = [
            tf.ensure_shape(t, [None, n])
            for t, n in zip(own, columns, strict=True)
        ]
        return self.together.sum(own)


def _sizes(variables: Sequence[Any]) -> list[int]:
    return [math.prod(v.shape) for v in variables]
