"""Derivatives of a network's outputs by its weights.

The one place of the package that differentiates: outputs, never a loss, and
only for `sensitivity="sum"` and "abs" (`keras_vo.search.sensitivity`). No
Jacobian is held: its rows are made a chunk at a time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_vo.evaluation.data_flow import DataFlow
from keras_vo.evaluation.vectorized import quiet_tensorflow

__all__ = ["Jacobian", "NoGradient", "absolute_rows", "as_units", "sum_rows"]

# From weights and inputs to outputs, each [batch, ..., units].
Network = Callable[[list[tf.Tensor], Any], list[tf.Tensor]]

# Rows of the Jacobians of examples that are made at once, at most.
_MOST_ROWS = 256
# Ops whose gradient is none, or zero; of functions and loops it is zero.
_STEPS = frozenset(
    """
    ArgMax ArgMin Bucketize Ceil Equal Floor FloorDiv Greater GreaterEqual Less
    LessEqual LogicalNot NotEqual PyFunc Rint Round Sign StopGradient
    """.split()
)
# What is vectorized: derivatives of other ops (loops, attention) have crashed
# TensorFlow 2.21 where they were.
_VECTORIZED = frozenset(
    """
    Abs Add AddN AddV2 AvgPool AvgPoolGrad BatchMatMulV2 BiasAdd BiasAddGrad
    BroadcastGradientArgs BroadcastTo Cast ConcatOffset ConcatV2 Const
    Conv2D Conv2DBackpropFilter Conv2DBackpropInput DivNoNan Elu EluGrad
    Equal Erf Erfc Exp ExpandDims Fill FloorDiv FloorMod GatherV2 Greater
    GreaterEqual Identity IdentityN LeakyRelu LeakyReluGrad Less LessEqual
    Log LogSoftmax MatMul Max MaxPool MaxPoolGrad Maximum Mean Minimum Mul
    Neg NoOp OnesLike Pack Pad Placeholder Pow Prod Range RealDiv Reciprocal
    ReciprocalGrad Relu Relu6 Relu6Grad ReluGrad Reshape Rsqrt RsqrtGrad
    Select SelectV2 Selu SeluGrad Shape ShapeN Sigmoid SigmoidGrad Slice
    Softmax Softplus SoftplusGrad Softsign SoftsignGrad Sqrt SqrtGrad Square
    SquaredDifference Squeeze StopGradient StridedSlice StridedSliceGrad Sub
    Sum Tanh TanhGrad Tile Transpose Unpack ZerosLike
    """.split()
)
_NAMED = 3  # ops that an error names


class NoGradient(Exception):
    """The outputs have no gradient by some weights they depend on.

    Attributes:
        weights: indices of these weights.
        ops: names of ops that may be why.
    """

    def __init__(self, weights: list[int], ops: list[str]) -> None:
        super().__init__(weights, ops)
        self.weights = weights
        self.ops = ops


def as_units(outputs: Any, dtype: tf.DType) -> list[tf.Tensor]:
    """Outputs as [batch, ..., units], but those that are not floating, or that
    no axis of examples or number of units is known of.
    """
    tensors = [t for t in keras.tree.flatten(outputs) if tf.is_tensor(t)]
    units = []
    for t in tensors:
        if isinstance(t, tf.Tensor) and t.dtype.is_floating and t.shape.rank:
            t = t[:, None] if t.shape.rank == 1 else t
            if t.shape[-1] is not None:
                units.append(tf.cast(t, dtype))
    return units


def sum_rows(jacobian: Jacobian, first: tf.Tensor, count: int) -> tf.Tensor:
    """sum_i dy_k(x_i)/dw for `count` units k from `first`, [count, d].

    Positions count as examples. Units that are not there have zeros. Of I
    examples the derivative is that of the sum over some sqrt(I) (a power of 2),
    so that those in float16 overflow as little as they vanish.

    Raises:
        NoGradient: see there.
    """

    total = tf.cast(jacobian.positions * _examples(jacobian.inputs), tf.float32)
    halved = tf.floor(tf.math.log(tf.maximum(total, 1.0)) / math.log(4.0))
    scale = tf.cast(tf.pow(2.0, halved), jacobian.dtype)

    def row(unit: tf.Tensor) -> tf.Tensor:
        def of(y: tf.Tensor) -> tf.Tensor:
            totals = tf.reduce_sum(tf.reshape(y, [-1, jacobian.units]), axis=0)
            return totals[tf.minimum(unit, jacobian.units - 1)] / scale

        found = jacobian.gradient(jacobian.inputs, of)
        return found * scale * tf.cast(unit < jacobian.units, found.dtype)

    return tf.map_fn(
        row,
        first + tf.range(count),
        fn_output_signature=tf.TensorSpec([jacobian.size], jacobian.dtype),
        parallel_iterations=1,
    )


def absolute_rows(
    jacobian: Jacobian, first: tf.Tensor, count: int
) -> tf.Tensor:
    """sum_i |dy_k(x_i)/dw| for `count` units k from `first`, [count, d].

    The network is called with one example at a time, or vectorized over them.

    Raises:
        NoGradient: see there.
    """
    examples = _examples(jacobian.inputs)
    chunk = jacobian.memory_budget // max(
        1, 4 * jacobian.size * jacobian.dtype.size
    )
    chunk = min(max(chunk, 1), _MOST_ROWS)
    each = jacobian.positions * count
    total = examples * each

    def row(at: tf.Tensor) -> tf.Tensor:
        example, position, unit = tf.unstack(at)
        one = keras.tree.map_structure(
            lambda x: None if x is None else tf.gather(x, example[None]),
            jacobian.inputs,
        )

        def of(y: tf.Tensor) -> tf.Tensor:
            return tf.reshape(y, [-1, jacobian.units])[position, unit]

        return tf.abs(jacobian.gradient(one, of))

    vectorizes = _is_vectorizable(row, chunk)
    spec = tf.TensorSpec([jacobian.size], jacobian.dtype)

    def rows(at: tf.Tensor) -> tf.Tensor:
        if vectorizes:
            with quiet_tensorflow():
                return tf.vectorized_map(row, at)
        return tf.map_fn(
            row, at, fn_output_signature=spec, parallel_iterations=1
        )

    def body(start: tf.Tensor, sums: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        numbers = start + tf.range(chunk)
        inside = numbers < total
        numbers = tf.minimum(numbers, total - 1)
        own = numbers % count
        unit = first + own
        inside &= unit < jacobian.units
        unit = tf.minimum(unit, jacobian.units - 1)
        at = [numbers // each, numbers % each // count, unit]
        found = rows(tf.stack(at, axis=1))
        found *= tf.cast(inside, found.dtype)[:, None]
        added = tf.math.unsorted_segment_sum(found, own, count)
        return start + chunk, sums + added

    zeros = tf.zeros([count, jacobian.size], jacobian.dtype)
    return tf.while_loop(
        lambda start, _: start < total,
        body,
        (tf.zeros([], tf.int32), zeros),
        parallel_iterations=1,
    )[1]


@dataclasses.dataclass(frozen=True)
class Jacobian:
    """Of one output by all weights; rows of it are made when asked for.

    Attributes:
        network: from weights and inputs to all outputs.
        variables: that the network has the weights in the place of.
        weights: where it is taken.
        inputs: of the batch.
        number: of the output.
        units: how many it has.
        positions: of an example, a scalar.
        dtype: of its numbers.
        memory_budget: bytes of rows of single examples that are made at once.
    """

    network: Network
    variables: Sequence[Any]
    weights: Sequence[tf.Tensor]
    inputs: Any
    number: int
    units: int
    positions: tf.Tensor
    dtype: tf.DType
    memory_budget: int

    @property
    def size(self) -> int:
        """d, the length of a row."""
        return sum(w.shape.num_elements() for w in self.weights)

    def gradient(
        self, inputs: Any, of: Callable[[tf.Tensor], tf.Tensor]
    ) -> tf.Tensor:
        """The gradient [d] of a number that is made of the output.

        Raises:
            NoGradient: see there.
        """
        own = [tf.identity(w) for w in self.weights]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(own)
            value = of(self.network(own, inputs)[self.number])
        found = tape.gradient(value, own)
        _check(value, own, found, self.variables)
        parts = [
            tf.zeros([tf.size(w)], self.dtype)
            if gradient is None
            else tf.reshape(
                tf.cast(tf.convert_to_tensor(gradient), self.dtype), [-1]
            )
            for w, gradient in zip(own, found, strict=True)
        ]
        return tf.concat(parts, axis=0)


def _examples(inputs: Any) -> tf.Tensor:
    parts = [x for x in keras.tree.flatten(inputs) if x is not None]
    return tf.shape(parts[0])[0]


def _is_vectorizable(row: Callable[[tf.Tensor], tf.Tensor], rows: int) -> bool:
    spec = tf.TensorSpec([rows, 3], tf.int32)
    one = tf.function(row, autograph=False).get_concrete_function(
        tf.TensorSpec([3], tf.int32)
    )
    definition = one.graph.as_graph_def()
    functions = definition.library.function
    nodes = [*definition.node, *(n for f in functions for n in f.node_def)]
    if not {node.op for node in nodes} <= _VECTORIZED:
        return False
    try:
        with quiet_tensorflow():
            tf.function(
                lambda at: tf.vectorized_map(row, at), autograph=False
            ).get_concrete_function(spec)
    except (NotImplementedError, ValueError):
        return False  # if it is the network's own, it is raised again
    return True


def _check(
    value: tf.Tensor,
    weights: Sequence[tf.Tensor],
    found: Any,
    variables: Sequence[Any],
) -> None:
    """Raises if a gradient is none, or always 0, of weights that matter."""
    if tf.executing_eagerly():
        return
    flow = DataFlow(value.graph)
    reached = flow.reached([value], weights)
    read = flow.variables([value])
    around = [
        i
        for i, (variable, is_reached) in enumerate(
            zip(variables, reached, strict=True)
        )
        if not is_reached and id(variable.handle) in read
    ]
    if around:
        raise NoGradient(around, ["a tf.function that reads variables itself"])
    smoothly = DataFlow(value.graph, _STEPS).reached([value], weights)
    without = [
        i
        for i, (gradient, reaches, smooth) in enumerate(
            zip(found, reached, smoothly, strict=True)
        )
        if reaches and (gradient is None or not smooth)
    ]
    if without:
        sources = [weights[i] for i in without]
        ops = flow.between([value], sources, _STEPS | {"EagerPyFunc"})
        raise NoGradient(without, ops[:_NAMED])
