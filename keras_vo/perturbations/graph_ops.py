"""What the graph around a tensor says of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf

__all__ = [
    "ancestors",
    "depends",
    "is_in_vectorized_loop",
    "uses",
]


def depends(tensor: tf.Tensor, sources: Sequence[tf.Tensor]) -> bool:
    """Whether `tensor` may differ between members.

    It does if it is computed from their noise, and it may if an op on the way
    is random, has a state, or calls a function. (XLA draws other random
    numbers than the mean network's pass.) Eagerly nothing is known.

    Args:
        tensor: in the graph of the members' evaluation.
        sources: the tensors of a member's noise.
    """
    if tf.executing_eagerly():
        return True
    targets = {id(source.op) for source in sources}
    return any(
        id(op) in targets
        or "Random" in op.type
        or "Call" in op.type
        or (op.op_def.is_stateful and op.type != "ReadVariableOp")
        for op in _ancestors(tensor)
    )


def is_in_vectorized_loop(tensor: tf.Tensor) -> bool:
    """Whether `tensor` depends on the index of a tf.vectorized_map.

    Its body is traced into the graph around it, with a placeholder for the
    index.
    """
    return not tf.executing_eagerly() and any(
        op.type == "PlaceholderWithDefault" for op in _ancestors(tensor)
    )


def ancestors(tensor: tf.Tensor) -> set[int] | None:
    """Ids of the ops that a tensor is computed by; `None`: eagerly."""
    if tf.executing_eagerly():
        return None
    return {id(op) for op in _ancestors(tensor)}


def uses(handle: tf.Tensor | None) -> int:
    """How many ops of the current graph take the variable of a handle; eagerly
    0. `None`: that of no variable.
    """
    graph = tf.compat.v1.get_default_graph()
    if tf.executing_eagerly() or not hasattr(graph, "capture"):
        return 0
    if handle is None:
        return 0
    return len(graph.capture(handle).consumers())


def _ancestors(tensor: tf.Tensor) -> Iterator[Any]:
    """The ops of the graph that a tensor is computed by."""
    seen = set()
    todo = [tensor.op]
    while todo:
        op = todo.pop()
        if id(op) in seen:
            continue
        seen.add(id(op))
        yield op
        todo.extend(source.op for source in op.inputs)
        todo.extend(op.control_inputs)
