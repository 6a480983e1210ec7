"""What `VOOptimizer(sensitivity=...)` measures: see `search.sensitivity`."""

from __future__ import annotations

import dataclasses
import functools
import inspect
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
        TypeError: a callable that can not be given two arguments.
    """
    if callable(sensitivity):
        _check_arguments(sensitivity)
        return sensitivity
    if sensitivity is None:
        return None
    if isinstance(sensitivity, str) and sensitivity in _KINDS:
        return sensitivity
    raise ValueError(
        f"`sensitivity` must be None, one of {list(_KINDS)}, or a callable "
        "from the variables and a batch of inputs to the sensitivity of each "
        f"weight. Received: sensitivity={sensitivity!r}"
    )


def _check_arguments(function: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a builtin that does not say what it takes
        return
    try:
        signature.bind([], None)
    except TypeError as error:
        raise TypeError(
            "A callable `sensitivity` is given two arguments: the list of "
            "variables, and the batch's inputs (None without a model). "
            f"Received: sensitivity={function!r}, of which Python says: {error}"
        ) from error


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
            return sensitivity_lib.normalized(raw, layers, former)

        return tf.cond(due & (examples > 0), measured, lambda: former)

    def _of_outputs(self, due: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """sum_k (1/I sum_i dy_k(x_i)/dw)^2 [d], and I."""
        network = self.network
        sizes = network.sizes
        size = sum(_sizes(self.variables))
        # As many units at once as their rows fit.
        most = max(self.memory_budget // (4 * size * self.dtype.size), 1)
        squares = tf.zeros([size], self.dtype)
        for number, (units, positions) in enumerate(sizes):
            jacobian = jacobians.Jacobian(
                network.in_use,
                self.variables,
                network.means,
                network.inputs,
                number,
                units,
                positions,
                self.dtype,
                self.memory_budget,
            )
            count = tf.cast(positions * network.examples, self.dtype)
            if self.together.count == 1:
                found = functools.partial(
                    self._all_squares, jacobian, min(most, units), count
                )
                (own,) = self._sum(due, found, [size])
                squares += tf.reduce_sum(own, axis=0)
                continue
            for start in range(0, units, most):  # each is exchanged
                first = tf.constant(start)
                chunk = min(most, units - start)
                found = functools.partial(
                    self._counted_rows, jacobian, first, chunk, count
                )
                rows, totals = self._sum(due, found, [size, 1])
                squares += _squares(rows, totals)
        return squares, self._examples()

    def _all_squares(
        self, jacobian: jacobians.Jacobian, chunk: int, count: tf.Tensor
    ) -> list[tf.Tensor]:
        """sum_k (1/I sum_i dy_k(x_i)/dw)^2 of an output, [1, d]."""

        def of(first: tf.Tensor) -> tf.Tensor:
            return _squares(self._rows(jacobian, first, chunk), count)

        def all_of() -> tf.Tensor:
            self.network.begin()
            if chunk == jacobian.units:
                return of(tf.constant(0))
            return tf.while_loop(
                lambda first, _: first < jacobian.units,
                lambda first, squares: (first + chunk, squares + of(first)),
                (tf.constant(0), tf.zeros([jacobian.size], self.dtype)),
                parallel_iterations=1,
            )[1]

        return [self._apart(all_of)[None]]

    def _counted_rows(
        self,
        jacobian: jacobians.Jacobian,
        first: tf.Tensor,
        chunk: int,
        count: tf.Tensor,
    ) -> list[tf.Tensor]:
        """Rows [chunk, d], summed over this replica's examples; and over how
        many, [chunk, 1].
        """

        def rows() -> tf.Tensor:
            self.network.begin()
            return self._rows(jacobian, first, chunk)

        return [self._apart(rows), tf.fill([chunk, 1], count)]

    def _rows(
        self, jacobian: jacobians.Jacobian, first: tf.Tensor, chunk: int
    ) -> tf.Tensor:
        if self.kind == SUM:
            return jacobians.sum_rows(jacobian, first, chunk)
        try:
            return jacobians.absolute_rows(jacobian, first, chunk)
        except (TypeError, ValueError, NotImplementedError) as error:
            raise ValueError(
                f'sensitivity="{ABS}" calls the network with one example at a '
                "time. Expected: dense inputs, and a network that takes any "
                f'number of examples; or "{SUM}", "{INPUTS}" or None. '
                f"Received: {type(error).__name__}: {error}"
            ) from error

    def _apart(self, function: Callable[[], tf.Tensor]) -> tf.Tensor:
        """`function()`, in a graph, which shows why there is no gradient."""
        if tf.executing_eagerly():
            function = tf.function(function, autograph=False)
        try:
            return self.network.apart(function)
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
            sums, counts = self.network.apart(self.network.input_squares)
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
                tf.debugging.Assert(
                    tf.reduce_all(tf.math.is_finite(joined) & (joined >= 0)),
                    [
                        "Expected a `sensitivity` that returns finite numbers "
                        "of 0 or more. Received:",
                        joined,
                    ],
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


def _squares(rows: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
    means = tf.math.divide_no_nan(rows, count)
    return tf.reduce_sum(tf.square(means), axis=0)


def _sizes(variables: Sequence[Any]) -> list[int]:
    return [math.prod(v.shape) for v in variables]
