"""Which tensors of a graph another one is computed by.

As a gradient goes: by values, not by shapes alone; through the functions,
conditions and loops that the graph calls.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import tensorflow as tf

__all__ = ["DataFlow"]

_CALLS = ("PartitionedCall", "StatefulPartitionedCall")
_CONDITIONS = ("If", "StatelessIf", "Case", "StatelessCase")
_LOOPS = ("While", "StatelessWhile")
# What depends on the shape of its inputs alone.
_OF_SHAPES = frozenset(
    """
    OnesLike Rank Shape ShapeN Size TensorListElementShape TensorListLength
    ZerosLike
    """.split()
)


class DataFlow:
    """The ways of data through a graph.

    Args:
        graph: it.
        without: types of ops that no way leads through.
    """

    def __init__(self, graph: Any, without: Collection[str] = ()) -> None:
        library = graph.as_graph_def().library.function
        self._functions = {f.signature.name: f for f in library}
        self._without = _OF_SHAPES.union(without)
        self._found: dict[tuple[str, int], set[int]] = {}

    def reached(
        self, tensors: Sequence[tf.Tensor], sources: Sequence[tf.Tensor]
    ) -> list[bool]:
        """Which of `sources` some of `tensors` is computed by."""
        seen = {_key(t) for t in self._ancestors(tensors)}
        return [_key(source) in seen for source in sources]

    def variables(self, tensors: Sequence[tf.Tensor]) -> set[int]:
        """Ids of the handles of the variables that `tensors` are read from."""
        handles = set()
        for tensor in self._ancestors(tensors):
            if tensor.dtype == tf.resource:
                handles.add(id(_outermost(tensor)))
        return handles

    def between(
        self,
        tensors: Sequence[tf.Tensor],
        sources: Sequence[tf.Tensor],
        types: Collection[str],
    ) -> list[str]:
        """Names of the ops of some types that are on the way from `sources`."""
        names: dict[str, None] = {}
        for op in {id(t.op): t.op for t in self._ancestors(tensors)}.values():
            if op.type not in types and not _called(op.node_def):
                continue
            inputs = [any(self.reached([t], sources)) for t in op.inputs]
            own = {i for i, is_reached in enumerate(inputs) if is_reached}
            names |= dict.fromkeys(
                self._named(op.node_def, op.name, own, types)
            )
        return list(names)

    def _ancestors(self, tensors: Sequence[tf.Tensor]) -> Iterator[tf.Tensor]:
        """`tensors`, and those they are computed by."""
        seen = set()
        todo = list(tensors)
        while todo:
            tensor = todo.pop()
            op = tensor.op
            if _key(tensor) in seen or op.type in self._without:
                continue
            seen.add(_key(tensor))
            yield tensor
            inputs = list(op.inputs)
            places = self._inputs(op.node_def, tensor.value_index, len(inputs))
            todo += [inputs[i] for i in places]

    def _inputs(self, node: Any, output: int, count: int) -> Iterable[int]:
        """Which inputs of an op an output of it is computed by."""
        names = _called(node)
        if not all(name in self._functions for name in names) or not names:
            return range(count)
        if node.op in _CONDITIONS:
            return {
                1 + i for name in names for i in self._arguments(name, output)
            }
        if node.op not in _LOOPS:
            return self._arguments(names[0], output)
        found, todo = set(), [output]  # in any number of iterations
        while todo:
            i = todo.pop()
            if i not in found:
                found.add(i)
                todo += self._arguments(names[0], i)
        return found

    def _arguments(self, name: str, output: int) -> set[int]:
        """Which arguments an output of a function is computed by."""
        key = name, output
        if key not in self._found:
            function = self._functions[name]
            end = function.ret[function.signature.output_arg[output].name]
            self._found[key] = self._from(function, end)
        return self._found[key]

    def _from(self, function: Any, tensor: str) -> set[int]:
        """Which arguments a tensor in a function is computed by."""
        nodes = {node.name: node for node in function.node_def}
        arguments = {
            argument.name: i
            for i, argument in enumerate(function.signature.input_arg)
        }
        found, seen, todo = set(), set(), [tensor]
        while todo:
            tensor = todo.pop()
            if tensor in seen:
                continue
            seen.add(tensor)
            name, *place = tensor.split(":")  # node:output:index
            if name in arguments:
                found.add(arguments[name])
            elif nodes[name].op not in self._without:
                inputs = _data(nodes[name])
                output = int(place[1]) if len(place) > 1 else 0
                places = self._inputs(nodes[name], output, len(inputs))
                todo += [inputs[i] for i in places]
        return found

    def _named(
        self, node: Any, name: str, own: set[int], types: Collection[str]
    ) -> Iterator[str]:
        """Names of an op, or of those in the functions it calls, that have data
        from some of the op's inputs.

        Args:
            node: the op.
            name: that it is given.
            own: the numbers of these inputs.
            types: of the ops that are named.
        """
        if own and node.op in types:
            yield f"{node.op} in {name!r}"
        if node.op in _CONDITIONS:
            own = {i - 1 for i in own if i}
        for called in _called(node):
            if not own or called not in self._functions:
                continue
            if node.op in _LOOPS:
                own = self._after_some_iterations(called, own)
            function = self._functions[called]
            for inner in function.node_def:
                if inner.op not in types and not _called(inner):
                    continue
                inside = {
                    i
                    for i, tensor in enumerate(_data(inner))
                    if self._from(function, tensor) & own
                }
                has_scope = inner.name.startswith(f"{node.name}/")
                scope = "" if has_scope else f"{name}/"
                yield from self._named(inner, scope + inner.name, inside, types)

    def _after_some_iterations(self, body: str, own: set[int]) -> set[int]:
        """Variables of a loop that some of them get to."""
        count = len(self._functions[body].signature.output_arg)
        for _ in range(count):
            own = own | {
                i for i in range(count) if self._arguments(body, i) & own
            }
        return own


def _key(tensor: tf.Tensor) -> tuple[int, int]:
    return id(tensor.op), tensor.value_index


def _outermost(tensor: Any) -> Any:
    """What a graph in graphs has captured as `tensor`."""
    while hasattr(tensor, "graph"):
        graph = tensor.graph
        captured = {id(own): of for of, own in getattr(graph, "captures", ())}
        if id(tensor) not in captured:
            break
        tensor = captured[id(tensor)]
    return tensor


def _data(node: Any) -> list[str]:
    return [name for name in node.input if not name.startswith("^")]


def _called(node: Any) -> list[str]:
    """Names of the functions whose outputs are those of an op."""
    if node.op in _CALLS:
        return [node.attr["f"].func.name]
    if node.op in _LOOPS:
        return [node.attr["body"].func.name]
    if "Case" in node.op:
        return [f.name for f in node.attr["branches"].list.func]
    if node.op in _CONDITIONS:
        parts = ("then_branch", "else_branch")
        return [node.attr[part].func.name for part in parts]
    return []
