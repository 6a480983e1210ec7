"""Parts of a traced graph, computed again in another one."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

import tensorflow as tf

__all__ = ["between", "emitted", "has_functions"]


def between(fetches: Sequence[tf.Tensor], given: Container[str]) -> list[Any]:
    """The ops that tensors are computed by, in the order of their graph.

    Args:
        fetches: the tensors, of one graph.
        given: names of tensors of it, behind which nothing is looked for.
    """
    found, todo = set(), list(fetches)
    while todo:
        tensor = todo.pop()
        if tensor.name in given or tensor.op.name in found:
            continue
        found.add(tensor.op.name)
        todo += tensor.op.inputs
    operations = fetches[0].graph.get_operations() if found else []
    return [op for op in operations if op.name in found]


def has_functions(op: Any) -> bool:
    """Whether an op calls functions, as loops do."""
    return any("func" in attribute.type for attribute in op.op_def.attr)


def emitted(
    fetches: Sequence[tf.Tensor], given: Mapping[str, tf.Tensor]
) -> list[tf.Tensor]:
    """Tensors of a graph, computed in the current graph.

    What only has to run before them (assertions) is left out. Ops that call
    functions can't be among them.

    Args:
        fetches: the tensors, of one graph.
        given: from names of tensors of it to their values here; with them,
            `fetches` can be computed.
    """
    values = dict(given)
    graph = tf.compat.v1.get_default_graph()
    for op in between(fetches, given):
        attributes = dict(op.node_def.attr)
        attributes.pop("_class", None)
        made = graph.create_op(
            op.type,
            [values[tensor.name] for tensor in op.inputs],
            [tensor.dtype for tensor in op.outputs],
            attrs=attributes,
            op_def=op.op_def,
            name=op.name.rsplit("/", 1)[-1],
        )
        names = [tensor.name for tensor in op.outputs]
        values.update(zip(names, made.outputs, strict=True))
    return [values[tensor.name] for tensor in fetches]
