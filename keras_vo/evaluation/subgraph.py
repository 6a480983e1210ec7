"""Parts of a traced graph, computed again in another one."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

import tensorflow as tf

__all__ = ["between", "emitted"]


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


def emitted(
    fetches: Sequence[tf.Tensor], given: Mapping[str, tf.Tensor]
) -> list[tf.Tensor]:
    """Tensors of a graph, computed in the current graph.

    What only has to run before them (assertions) is left out.

    Args:
        fetches: the tensors, of one graph.
        given: from names of tensors of it to their values here; with them,
            `fetches` can be computed.
    """
    operations = between(fetches, given)
    if not operations:
        return [given[tensor.name] for tensor in fetches]
    source = operations[0].graph.as_graph_def()
    definition = tf.compat.v1.GraphDef(
        versions=source.versions, library=source.library
    )
    used: set[str] = set()
    for op in operations:
        node = definition.node.add()
        node.CopyFrom(op.node_def)
        node.attr.pop("_class", None)
        data = [name for name in node.input if not name.startswith("^")]
        node.ClearField("input")
        node.input.extend(data)
        used.update(tensor.name for tensor in op.inputs)
    graph = tf.compat.v1.get_default_graph()
    computed = [t for t in fetches if t.name not in given]
    values = iter(
        tf.graph_util.import_graph_def(
            definition,
            input_map={
                name: graph.capture(value)
                for name, value in given.items()
                if name in used
            },
            return_elements=[tensor.name for tensor in computed],
            name="",
        )
    )
    return [
        given[tensor.name] if tensor.name in given else next(values)
        for tensor in fetches
    ]
