"""The scope in which layers are perturbed in ways of their own.

A layer asks for the current scope when it is called. There is none outside of
training, and the layer is plain. In a training step there are two:

    Recording   the mean network's pass: the layer's kind of perturbation says
                what it claims;
    Evaluation  a member's pass: the kind says what the layer computes, and
                leaves what its score needs.

Layers know nothing of the optimizer, and the optimizer nothing of layers.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import tensorflow as tf

if TYPE_CHECKING:
    from keras_vo.perturbations.base import DenseCall, Perturbation

__all__ = [
    "Evaluation",
    "Recording",
    "current_graph",
    "current_scope",
    "entered",
]

_scopes = threading.local()


def current_scope() -> Recording | Evaluation | None:
    """The innermost scope that is entered in this thread."""
    stack = getattr(_scopes, "stack", ())
    return stack[-1] if stack else None


@contextlib.contextmanager
def entered(scope: Recording | Evaluation) -> Iterator[None]:
    """Makes `scope` the current one."""
    if not hasattr(_scopes, "stack"):
        _scopes.stack = []
    _scopes.stack.append(scope)
    try:
        yield
    finally:
        _scopes.stack.pop()


def current_graph() -> Any:
    """The graph that is being made; `None`: eagerly, none is."""
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


class Recording:
    """The scope of the mean network's pass.

    Args:
        variables: the variables that are searched over. A layer whose kernel
            is not among them is plain.

    Attributes:
        variables: those.
        claims: what is perturbed, by kind.
        graph: in which the model is called; `None`: eagerly.
        in_call: whether the model is being called; else the loss is computed.
    """

    def __init__(self, variables: Sequence[Any]) -> None:
        self.variables = list(variables)
        self.claims: dict[str, list[Any]] = {}
        self.graph = current_graph()
        self.in_call = True
        self._searched = {id(v) for v in variables}
        self._claimed: set[tuple[str, int]] = set()

    def searches(self, variable: Any) -> bool:
        """Whether `variable` is searched over."""
        return id(variable) in self._searched

    def claim(self, kind: str, key: Any, claim: Any) -> None:
        """Notes what a kind of perturbation claims, once for each key."""
        if (kind, id(key)) not in self._claimed:
            self._claimed.add((kind, id(key)))
            self.claims.setdefault(kind, []).append(claim)

    def call(self, kind: type[Perturbation], call: DenseCall) -> tf.Tensor:
        """What a layer of that kind computes in the mean network."""
        return kind.record(call, self)

    def end_of_call(self) -> None:
        """Says that from now on the loss is computed."""
        self.in_call = False


class Evaluation:
    """The scope of one member's pass.

    Args:
        recording: what the mean network's pass has recorded.
        perturbations: of all variables.
        states: of the member, one for each perturbation.
        sources: all tensors of the member's noise.

    Attributes:
        sources: those.
    """

    def __init__(
        self,
        recording: Recording,
        perturbations: Sequence[Perturbation],
        states: Sequence[Any],
        sources: Sequence[tf.Tensor],
    ) -> None:
        self._recording = recording
        self._states = {
            p.name: (p, state)
            for p, state in zip(perturbations, states, strict=True)
        }
        self.sources = list(sources)

    def searches(self, variable: Any) -> bool:
        """Whether `variable` is searched over."""
        return self._recording.searches(variable)

    def call(self, kind: type[Perturbation], call: DenseCall) -> tf.Tensor:
        """What a layer of that kind computes in the member."""
        if kind.name not in self._states:  # no call in the mean network
            return call.plain()
        perturbation, state = self._states[kind.name]
        return perturbation.call(call, state, self)

    def finish(self) -> tuple[Any, ...]:
        """The records of each perturbation."""
        return tuple(p.finish(state) for p, state in self._states.values())
