"""What a function of a user does besides computing its value."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from keras_vo.keras_compat import in_stateless_scope
from keras_vo.tensorflow_compat import called_for_each_op, variables_read

__all__ = ["EagerEffects", "Effects", "is_random", "inlined"]

# Ops that keep a state, each run of which draws other numbers.
_RANDOM = re.compile(
    "Random|CandidateSampler|Multinomial|SampleDistortedBoundingBox"
    "|TruncatedNormal|NonDeterministicInts|StatefulUniform"
    "|StatefulStandardNormal|RngReadAndSkip"
)
# Of those, ops that have a seed among their inputs all the same.
_SEEDED = ("Stateless", "Dataset", "RandomIndexShuffle")
# Ops that change, or read, a state which is no variable.
_STATE = re.compile(
    "LookupTable(Insert|Remove|Import)|Queue(Enqueue|Dequeue)|Stack(Push|Pop)"
    "|IteratorGetNext|Barrier|^(Uns|S)tage|^Timestamp$"
)
_PYTHON = frozenset({"EagerPyFunc", "PyFunc", "PyFuncStateless"})
_ASSIGNS = re.compile("Assign|Resource(Apply|Scatter|Sparse)")
_GENERATOR = "Rng"  # what assigns the state of a tf.random.Generator


@dataclasses.dataclass(frozen=True)
class Effects:
    """What a traced function does.

    Attributes:
        read: handles of the variables that it is given from outside.
        assigned: those of them that it may assign.
        random: the types of its random ops that keep a state.
        random_called: of them, those that may be in a function of its own
            which it calls (not a branch or a loop).
        python: the types of its ops that call Python.
        state: the types of its ops with a state that is no variable.
    """

    read: tuple[tf.Tensor, ...]
    assigned: tuple[tf.Tensor, ...]
    random: frozenset[str]
    random_called: frozenset[str]
    python: frozenset[str]
    state: frozenset[str]

    @classmethod
    def of(cls, function: Any) -> Effects:
        """Those of a concrete function.

        Functions that it calls are taken together: if any of them assigns a
        variable, each may assign all variables that it is given.
        """
        graph = function.graph
        operations = graph.get_operations()
        types = {op.type for op in operations}
        called: set[str] = set()
        if any(map(_calls, operations)):
            called = {
                node.op
                for definition in graph.as_graph_def().library.function
                for node in definition.node_def
            }
        calls_assign = any(map(_ASSIGNS.search, called))
        captured = function.captured_inputs
        given = function.inputs[len(function.inputs) - len(captured) :]
        read, assigned = [], []
        for handle, inside in zip(captured, given, strict=True):
            if handle.dtype != tf.resource:
                continue
            read.append(handle)
            if any(
                _ASSIGNS.search(op.type) or (calls_assign and _calls(op))
                for op in inside.consumers()
            ):
                assigned.append(handle)
        calls = any(type_.endswith("PartitionedCall") for type_ in types)
        return cls(
            tuple(read),
            tuple(assigned),
            frozenset(filter(is_random, types | called)),
            frozenset(filter(is_random, called if calls else ())),
            _PYTHON & (types | called),
            frozenset(filter(_STATE.search, types | called)),
        )


def is_random(op_type: str) -> bool:
    """Whether an op draws numbers that no seed among its inputs decides."""
    seeded = any(name in op_type for name in _SEEDED)
    return bool(_RANDOM.search(op_type)) and not seeded


def _calls(op: Any) -> bool:
    """Whether an op of a graph calls functions (as `tf.cond` does)."""
    return bool(op.type.endswith(("Call", "If", "While", "Case")))


class EagerEffects:
    """What is done eagerly, noted.

    Attributes:
        read: handles of variables, or of those that a function was given.
        set: handles of variables that were assigned.
        given: handles of what was given to functions, which may assign it.
        random: as that of `Effects`, but for those whose state is a variable.
        state: as that of `Effects`.
        in_stateless_scope: whether a traced function was called in one.
    """

    def __init__(self) -> None:
        self.read: list[tf.Tensor] = []
        self.set: list[tf.Tensor] = []
        self.given: list[tf.Tensor] = []
        self.random: set[str] = set()
        self.state: set[str] = set()
        self.in_stateless_scope = False

    @property
    def assigned(self) -> list[tf.Tensor]:
        """Handles of variables that may have been assigned."""
        return self.set + self.given

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """A scope: what is done in it is noted."""
        with called_for_each_op(self._note), variables_read() as variables:
            yield
        # What TensorFlow reads for an op that is given a variable, and what a
        # function is given: each sees what the other does not.
        self.read += [variable.handle for variable in variables]

    def _note(self, op_type: str, inputs: Any, *_: Any) -> None:
        handles = [tensor for tensor in inputs if tensor.dtype == tf.resource]
        if _ASSIGNS.search(op_type) or op_type.startswith(_GENERATOR):
            self.set += handles
        elif is_random(op_type):
            self.random.add(op_type)
        elif _STATE.search(op_type):
            self.state.add(op_type)
        else:
            self.read += handles
        if op_type.startswith("__inference"):
            self.given += handles
            self.in_stateless_scope |= in_stateless_scope()


@contextlib.contextmanager
def inlined() -> Iterator[None]:
    """Functions of `tf.function` become part of the graph that calls them.

    One that was traced for the mean network reads the variables.
    """
    before = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(before)
