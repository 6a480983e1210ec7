"""What ops do to the rows of a batch: the first axis of some of their inputs.

Each rule answers for one op of a graph. An op that no rule knows is neither by
row nor a sum of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

__all__ = ["is_by_row", "rows_summed"]

# With inputs that are broadcast.
_ELEMENTWISE = frozenset(
    """
    Abs Acos Acosh Add AddN AddV2 Asin Asinh Atan Atan2 Atanh Betainc BitwiseAnd
    BitwiseOr BitwiseXor BroadcastTo Bucketize Cast Ceil CheckNumerics
    ClipByValue Cos Cosh Digamma Div DivNoNan Elu EnsureShape Equal Erf Erfc
    Erfinv Exp Expm1 Floor FloorDiv FloorMod Greater GreaterEqual Identity
    Igamma Igammac Inv Invert IsFinite IsInf IsNan LeakyRelu Less LessEqual
    Lgamma Log Log1p LogicalAnd LogicalNot LogicalOr Maximum Minimum Mod Mul
    MulNoNan Ndtri Neg NextAfter NotEqual Polygamma Pow PreventGradient RealDiv
    Reciprocal Relu Relu6 Rint Round Rsqrt SelectV2 Selu Sigmoid Sign Sin Sinh
    Snapshot Softplus Softsign Sqrt Square SquaredDifference StopGradient Sub
    Tan Tanh TruncateDiv TruncateMod Xdivy Xlog1py Xlogy Zeta
    """.split()
)
# The last axis only.
_LAST_AXIS = frozenset(("Softmax", "LogSoftmax", "TopKV2"))
# Predictions [B, K], and a label or K numbers for each example.
_OF_CLASSES = frozenset(
    (
        "InTopK",
        "InTopKV2",
        "SoftmaxCrossEntropyWithLogits",
        "SparseSoftmaxCrossEntropyWithLogits",
    )
)
_REDUCTIONS = frozenset(
    ("All", "Any", "EuclideanNorm", "Max", "Mean", "Min", "Prod", "Sum")
)
# Index of the input that has the axis, or the axes, an op is along.
_AXIS_INPUT = {
    "ArgMax": 1,
    "ArgMin": 1,
    "Cumprod": 1,
    "Cumsum": 1,
    "ReverseV2": 1,
    "Split": 0,
    "SplitV": 2,
}
# The attribute that has it.
_AXIS_ATTRIBUTE = {"OneHot": "axis", "Pack": "axis", "Unpack": "axis"}


def is_by_row(op: Any, rows: Sequence[bool]) -> bool:
    """Whether row b of each output depends on row b of some inputs alone.

    Args:
        op: of a graph.
        rows: of each input, whether it is one of those, [B, ...]. The others
            do not depend on them, and may have an axis of examples or not.
    """
    rule = _RULES.get(op.type)
    if rule is None or not _ranks_known(op) or not rule(op, rows):
        return False
    known = {t.shape[0] for t, row in zip(op.inputs, rows, strict=True) if row}
    return all(tensor.shape[0] in {None, *known} for tensor in op.outputs)


def rows_summed(op: Any, rows: Sequence[bool]) -> dict[int, int] | None:
    """Of which rows an op's output is the sum, or the mean.

    Args:
        op: of a graph.
        rows: as for `is_by_row`.

    Returns:
        From the index of an input to the axis of the rows in it: the op of
        one row of each of those inputs is that row's term. `None`: it is no
        such sum.
    """
    rule = _SUMS.get(op.type)
    dtype = op.outputs[0].dtype if op.outputs else tf.bool
    numeric = dtype.is_floating or dtype.is_integer or dtype.is_complex
    if rule is None or not numeric or not _ranks_known(op):
        return None
    return rule(op, rows)


def _ranks_known(op: Any) -> bool:
    tensors = (*op.inputs, *op.outputs)
    return all(tensor.shape.rank is not None for tensor in tensors)


def _is_broadcast_by_row(op: Any, rows: Sequence[bool]) -> bool:
    """Elementwise: rows stay on the first axis."""
    rank = op.outputs[0].shape.rank
    by_row = [t for t, row in zip(op.inputs, rows, strict=True) if row]
    return rank > 0 and all(tensor.shape.rank == rank for tensor in by_row)


def _axes(op: Any, index: int, rank: int) -> set[int] | None:
    """Axes that an input has, from 0; `None` if they are not known."""
    value = tf.get_static_value(op.inputs[index])
    return None if value is None else {int(v) % rank for v in np.ravel(value)}


def _not_along_rows(op: Any, rows: Sequence[bool]) -> bool:
    """An op along axes that an attribute or an input names."""
    if op.type in _AXIS_ATTRIBUTE:
        longest = max(t.shape.rank for t in (*op.inputs, *op.outputs))
        along = op.get_attr(_AXIS_ATTRIBUTE[op.type]) % longest
        return bool(along) and not (op.type == "OneHot" and any(rows[1:]))
    at = _AXIS_INPUT[op.type]
    data = 1 if at == 0 else 0
    axes = _axes(op, at, op.inputs[data].shape.rank)
    only = all(index == data for index, row in enumerate(rows) if row)
    return only and axes is not None and 0 not in axes


def _reduction(op: Any, rows: Sequence[bool]) -> bool:
    axes = _axes(op, 1, max(op.inputs[0].shape.rank, 1))
    return not rows[1] and axes is not None and 0 not in axes


def _reshape(op: Any, rows: Sequence[bool]) -> bool:
    """Only what is within a row."""
    before, after = op.inputs[0].shape, op.outputs[0].shape
    if rows[1] or not before.rank or not after.rank:
        return False
    inner = (before[1:].num_elements(), after[1:].num_elements())
    return inner[0] == inner[1] and bool(inner[0])


def _expand_dims(op: Any, rows: Sequence[bool]) -> bool:
    axes = _axes(op, 1, op.outputs[0].shape.rank)
    return not rows[1] and axes is not None and 0 not in axes


def _squeeze(op: Any, rows: Sequence[bool]) -> bool:
    axes = op.get_attr("squeeze_dims")
    return bool(axes) and all(a % op.inputs[0].shape.rank for a in axes)


def _transpose(op: Any, rows: Sequence[bool]) -> bool:
    order = tf.get_static_value(op.inputs[1])
    return not rows[1] and order is not None and order[0] == 0


def _tile(op: Any, rows: Sequence[bool]) -> bool:
    times = tf.get_static_value(op.inputs[1], partial=True)
    return not rows[1] and times is not None and times[0] == 1


def _pad(op: Any, rows: Sequence[bool]) -> bool:
    paddings = tf.get_static_value(op.inputs[1])
    return rows[0] and paddings is not None and not paddings[0].any()


def _concat(op: Any, rows: Sequence[bool]) -> bool:
    axes = _axes(op, len(op.inputs) - 1, op.outputs[0].shape.rank)
    return not rows[-1] and axes is not None and 0 not in axes


def _strided_slice(op: Any, rows: Sequence[bool]) -> bool:
    """Slices that take the first axis whole."""
    if any(rows[1:]):
        return False
    masks = {
        name: op.get_attr(f"{name}_mask")
        for name in ("begin", "end", "ellipsis", "new_axis", "shrink_axis")
    }
    if masks["ellipsis"] & 1:
        count = op.inputs[1].shape[0]
        new = bin(masks["new_axis"]).count("1")
        return count is not None and count - 1 - new < op.inputs[0].shape.rank
    strides = tf.get_static_value(op.inputs[3])
    whole = masks["begin"] & masks["end"] & 1
    taken = (masks["new_axis"] | masks["shrink_axis"]) & 1
    return bool(whole and not taken and strides is not None and strides[0] == 1)


def _gather(op: Any, rows: Sequence[bool]) -> bool:
    params, indices = op.inputs[:2]
    if rows[2]:
        return False
    batch_dims = op.get_attr("batch_dims")
    if batch_dims + (indices.shape.rank if batch_dims < 0 else 0):
        return True
    axes = _axes(op, 2, max(params.shape.rank, 1))
    if axes is None:
        return False
    if rows[0]:
        return not rows[1] and 0 not in axes
    return axes == {0} and indices.shape.rank > 0


def _gather_nd(op: Any, rows: Sequence[bool]) -> bool:
    """Rows say which elements of something fixed are taken."""
    return not rows[0] and op.inputs[1].shape.rank > 1


def _last_axis(op: Any, rows: Sequence[bool]) -> bool:
    return not any(rows[1:]) and op.inputs[0].shape.rank > 1


def _of_classes(op: Any, rows: Sequence[bool]) -> bool:
    return op.inputs[0].shape.rank == 2


def _matmul(op: Any, rows: Sequence[bool]) -> bool:
    return not rows[1] and not op.get_attr("transpose_a")


def _batch_matmul(op: Any, rows: Sequence[bool]) -> bool:
    rank = op.outputs[0].shape.rank
    by_row = [t for t, row in zip(op.inputs, rows, strict=True) if row]
    return rank > 2 and all(tensor.shape.rank == rank for tensor in by_row)


def _summed_rows(op: Any, rows: Sequence[bool]) -> dict[int, int] | None:
    """Of a sum over axes with that of the rows; an integer mean is rounded."""
    axes = _axes(op, 1, max(op.inputs[0].shape.rank, 1))
    if rows[1] or axes is None or 0 not in axes:
        return None
    linear = op.type == "Sum" or op.inputs[0].dtype.is_floating
    return {0: 0} if linear else None


def _scattered_rows(op: Any, rows: Sequence[bool]) -> dict[int, int] | None:
    """Of rows that are added at indices, or to segments, of their own."""
    is_scatter = op.type == "ScatterNd"
    indices = op.inputs[0 if is_scatter else 1].shape.rank
    known = not rows[2] and indices > (1 if is_scatter else 0)
    return {0: 0, 1: 0} if known else None


def _contracted_rows(op: Any, rows: Sequence[bool]) -> dict[int, int] | None:
    """Of a product of matrices, where rows are what is summed over."""
    axes = {
        0: 0 if op.get_attr("transpose_a") else 1,
        1: 1 if op.get_attr("transpose_b") else 0,
    }
    first = all(axes[i] == 0 for i in range(2) if rows[i])
    return axes if first else None


def _einsum_letters(op: Any, rows: Sequence[bool]) -> tuple[Any, ...] | None:
    """The axes of each operand and of the output, and that of the rows."""
    equation = op.get_attr("equation").decode().replace(" ", "")
    if "..." in equation or "->" not in equation:
        return None
    given, output = equation.split("->")
    operands = given.split(",")
    first = {
        letters[:1] for letters, row in zip(operands, rows, strict=True) if row
    }
    if len(first) != 1:
        return None
    (row,) = first
    once = all(letters.count(row) <= 1 for letters in operands)
    return (operands, output, row) if row and once else None


def _einsum(op: Any, rows: Sequence[bool]) -> bool:
    found = _einsum_letters(op, rows)
    return found is not None and found[1].startswith(found[2])


def _einsum_rows(op: Any, rows: Sequence[bool]) -> dict[int, int] | None:
    found = _einsum_letters(op, rows)
    if found is None or found[2] in found[1]:
        return None
    operands, _, row = found
    return {
        index: letters.index(row)
        for index, letters in enumerate(operands)
        if row in letters
    }


_RULES = {
    **dict.fromkeys(_ELEMENTWISE, _is_broadcast_by_row),
    **dict.fromkeys((*_AXIS_INPUT, *_AXIS_ATTRIBUTE), _not_along_rows),
    **dict.fromkeys(_REDUCTIONS, _reduction),
    **dict.fromkeys(_LAST_AXIS, _last_axis),
    **dict.fromkeys(_OF_CLASSES, _of_classes),
    **dict.fromkeys(("BatchMatMulV2", "BatchMatMulV3"), _batch_matmul),
    **dict.fromkeys(("Pad", "PadV2", "MirrorPad"), _pad),
    "ConcatV2": _concat,
    "Einsum": _einsum,
    "ExpandDims": _expand_dims,
    "GatherNd": _gather_nd,
    "GatherV2": _gather,
    "MatMul": _matmul,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "StridedSlice": _strided_slice,
    "Tile": _tile,
    "Transpose": _transpose,
}

_SUMS = {
    "Einsum": _einsum_rows,
    "L2Loss": lambda *_: {0: 0},
    "MatMul": _contracted_rows,
    "Mean": _summed_rows,
    "ScatterNd": _scattered_rows,
    "Sum": _summed_rows,
    "UnsortedSegmentSum": _scattered_rows,
}
