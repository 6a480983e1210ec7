"""Derivatives of a network's outputs by its weights.

The one place of the package that differentiates: outputs, never a loss, and
only for `sensitivity="sum"` and "abs" (`keras_vo.search.sensitivity`). No
Jacobian is held: its rows are made a chunk at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_vo.evaluation.vectorized import quiet_tensorflow
from keras_vo.perturbations import graph_ops

__all__ = ["NoGradient", "absolute_rows", "as_units", "sum_rows"]

# From weights and inputs to outputs, each [batch, ..., units].
Network = Callable[[list[tf.Tensor], Any], list[tf.Tensor]]

# Rows of the Jacobians of examples that are made at once, at most.
_MOST_ROWS = 256
# Ops whose gradient is none, or zero.
_ZERO = {"Sign"}
_STEPS = _ZERO | {
    "ArgMax",
    "ArgMin",
    "Bucketize",
    "Ceil",
    "Equal",
    "EagerPyFunc",
    "Floor",
    "FloorDiv",
    "Greater",
    "GreaterEqual",
    "Less",
    "LessEqual",
    "LogicalNot",
    "NotEqual",
    "PyFunc",
    "Rint",
    "Round",
    "StopGradient",
}
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
    """All floating outputs as [batch, ..., units]."""
    tensors = [tf.convert_to_tensor(t) for t in keras.tree.flatten(outputs)]
    return [
        tf.cast(t if t.shape.rank != 1 else t[:, None], dtype)
        for t in tensors
        if t.dtype.is_floating
    ]


def sum_rows(
    network: Network,
    weights: Sequence[tf.Tensor],
    inputs: Any,
    units: range,
    dtype: tf.DType,
) -> tf.Tensor:
    """sum_i dy_k(x_i)/dw for each unit k of `units`, [units, d].

    Positions count as examples. Units are counted over all outputs.

    Raises:
        NoGradient: see there.
    """

    def row(unit: tf.Tensor) -> tf.Tensor:
        def of(outputs: list[tf.Tensor]) -> tf.Tensor:
            totals = [
                tf.reduce_sum(tf.reshape(y, [-1, y.shape[-1]]), axis=0)
                for y in outputs
            ]
            return tf.concat(totals, axis=0)[unit]

        return _gradient(network, weights, inputs, of, dtype)

    return tf.map_fn(
        row,
        tf.range(units.start, units.stop),
        fn_output_signature=tf.TensorSpec([_size(weights)], dtype),
        parallel_iterations=1,
    )


def absolute_rows(
    network: Network,
    weights: Sequence[tf.Tensor],
    inputs: Any,
    units: range,
    dtype: tf.DType,
    *,
    sizes: Sequence[tuple[int, tf.Tensor]],
    memory_budget: int,
) -> tf.Tensor:
    """sum_i |dy_k(x_i)/dw| for each unit k of `units`, [units, d].

    The network is called with one example at a time, or vectorized over them.

    Args:
        network: and so on, see `sum_rows`.
        sizes: of each output its units, and its positions of an example.
        memory_budget: bytes of the rows that are made at once.

    Raises:
        NoGradient: see there.
    """
    size = _size(weights)
    chunk = memory_budget // max(1, 4 * size * dtype.size)
    chunk = min(max(chunk, 1), _MOST_ROWS)
    examples = tf.shape(keras.tree.flatten(inputs)[0])[0]
    sums, start = [], 0
    for number, (count, positions) in enumerate(sizes):
        own = range(max(units.start - start, 0), min(units.stop - start, count))
        start += count
        if len(own):
            sums.append(
                _absolute_sums(
                    _row_of(network, weights, inputs, number, dtype),
                    (examples, positions, own),
                    (chunk, size, dtype),
                )
            )
    return tf.concat(sums, axis=0)


def _row_of(
    network: Network,
    weights: Sequence[tf.Tensor],
    inputs: Any,
    number: int,
    dtype: tf.DType,
) -> Callable[[tf.Tensor], tf.Tensor]:
    """From an example, a position and a unit of an output to |dy/dw| [d]."""

    def row(at: tf.Tensor) -> tf.Tensor:
        example, position, unit = tf.unstack(at)

        def of(outputs: list[tf.Tensor]) -> tf.Tensor:
            y = outputs[number]
            return tf.reshape(y, [-1, y.shape[-1]])[position, unit]

        one = keras.tree.map_structure(
            lambda x: None if x is None else tf.gather(x, example[None]), inputs
        )
        return tf.abs(_gradient(network, weights, one, of, dtype))

    return row


def _absolute_sums(
    row: Callable[[tf.Tensor], tf.Tensor],
    among: tuple[tf.Tensor, tf.Tensor, range],
    cut: tuple[int, int, tf.DType],
) -> tf.Tensor:
    """Sums of rows over all examples and positions, [units, d]."""
    examples, positions, units = among
    chunk, size, dtype = cut
    each = positions * len(units)
    total = examples * each
    spec = tf.TensorSpec([size], dtype)

    vectorizes = _is_vectorizable(row, chunk)

    def rows(at: tf.Tensor) -> tf.Tensor:
        if vectorizes:
            with quiet_tensorflow():
                return tf.vectorized_map(row, at)
        return tf.map_fn(
            row, at, fn_output_signature=spec, parallel_iterations=1
        )

    def body(first: tf.Tensor, sums: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        numbers = first + tf.range(chunk)
        inside = numbers < total
        numbers = tf.minimum(numbers, total - 1)
        unit = numbers % len(units)
        at = tf.stack(
            [
                numbers // each,
                numbers % each // len(units),
                unit + units.start,
            ],
            axis=1,
        )
        found = rows(at) * tf.cast(inside, dtype)[:, None]
        added = tf.math.unsorted_segment_sum(found, unit, len(units))
        return first + chunk, sums + added

    _, sums = tf.while_loop(
        lambda first, _: first < total,
        body,
        (tf.zeros([], tf.int32), tf.zeros([len(units), size], dtype)),
        parallel_iterations=1,
    )
    return sums


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


def _gradient(
    network: Network,
    weights: Sequence[tf.Tensor],
    inputs: Any,
    of: Callable[[list[tf.Tensor]], tf.Tensor],
    dtype: tf.DType,
) -> tf.Tensor:
    """The gradient [d] of a number that is made of the outputs.

    Raises:
        NoGradient: see there.
    """
    own = [tf.identity(w) for w in weights]
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(own)
        value = of(network(own, inputs))
    found = tape.gradient(value, own)
    _check(value, own, found)
    return tf.concat(
        [
            tf.zeros([tf.size(w)], dtype)
            if gradient is None
            else tf.reshape(
                tf.cast(tf.convert_to_tensor(gradient), dtype), [-1]
            )
            for w, gradient in zip(own, found, strict=True)
        ],
        axis=0,
    )


def _check(value: tf.Tensor, weights: Sequence[tf.Tensor], found: Any) -> None:
    """Raises if a gradient is none, or always 0, of weights that matter."""
    if tf.executing_eagerly():
        return
    reached = graph_ops.reached([value], weights)
    smoothly = graph_ops.reached([value], weights, _ZERO)
    without = [
        i
        for i, (gradient, reaches, smooth) in enumerate(
            zip(found, reached, smoothly, strict=True)
        )
        if reaches and (gradient is None or not smooth)
    ]
    if without:
        ops = graph_ops.between([value], [weights[i] for i in without], _STEPS)
        raise NoGradient(without, ops[:_NAMED])


def _size(weights: Sequence[tf.Tensor]) -> int:
    return sum(w.shape.num_elements() for w in weights)
