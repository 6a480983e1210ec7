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

from keras_vo.perturbations import graph_ops
from keras_vo.perturbations.choice import Choice

if TYPE_CHECKING:
    from keras_vo.perturbations.base import Perturbation
    from keras_vo.perturbations.calls import LayerCall

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
        choice: the optimizer's, for all layers.
        means: the values of the variables; `None`: what they are now.

    Attributes:
        variables: those.
        means: those.
        choice: that.
        claims: what is perturbed, by kind.
        graph: in which the model is called; `None`: eagerly.
        in_call: whether the model is being called; else the loss is computed.
        left: reasons why variables are not perturbed as the optimizer wants,
            by their id.
        claimed: indices of the variables that were read by a claim.
        positions: the axes of the loss, [batch, ...], where positions have
            credit of their own; else `None`.
        horizon: how many of them the noise at one is judged by.
    """

    def __init__(
        self,
        variables: Sequence[Any],
        choice: Choice | None = None,
        means: Sequence[tf.Tensor] | None = None,
    ) -> None:
        self.variables = list(variables)
        self.means = means
        self.choice = choice or Choice()
        self.claims: dict[str, list[Any]] = {}
        self.graph = current_graph()
        self.in_call = True
        self.left: dict[int, str] = {}
        self.claimed: set[int] = set()
        self.positions: tf.TensorShape | None = None
        self.horizon = 1.0
        self._searched = {id(v) for v in variables}
        self._claimed: set[tuple[str, int]] = set()
        self._means = dict(zip(map(id, variables), means or (), strict=False))
        # In a layer that casts its weights, variables have no handles.
        self._handles = [v.handle for v in variables]
        self._uses = [graph_ops.uses(h) for h in self._handles]

    def read(self, variable: Any) -> Any:
        """The value of a variable that a layer asks for by a claim."""
        for index, (known, handle, before) in enumerate(
            zip(self.variables, self._handles, self._uses, strict=True)
        ):
            if known is variable:
                self.claimed.add(index)
                # Something else has to do with it, and may have changed it:
                # no claim will be kept.
                if graph_ops.uses(handle) > before:
                    return variable
        return self._means.get(id(variable), variable)

    def leave(self, call: LayerCall, reason: str) -> None:
        """Notes that a call can't be perturbed as the optimizer wants.

        Args:
            call: it. None of its variables' other calls is, then.
            reason: why, as part of a sentence.
        """
        for variable in (call.kernel, call.bias):
            if variable is not None:
                self.left.setdefault(id(variable), reason)

    def settle(self, kinds: Sequence[type[Perturbation]], read: Any) -> None:
        """Drops the automatic claims that can't be kept, after the pass.

        Args:
            kinds: of what is claimed.
            read: handles of variables that were read eagerly.
        """
        eagerly = set(map(id, read))
        for variable, handle, before in zip(
            self.variables, self._handles, self._uses, strict=True
        ):
            if graph_ops.uses(handle) > before or id(handle) in eagerly:
                self.left.setdefault(id(variable), "others read its weights")
        for kind in kinds:
            kept = kind.settled(self.claims[kind.name], self)
            self.claims[kind.name] = kept
        self.claims = {k: v for k, v in self.claims.items() if v}

    def searches(self, variable: Any) -> bool:
        """Whether `variable` is searched over."""
        return id(variable) in self._searched

    def claim(self, kind: str, key: Any, claim: Any) -> None:
        """Notes what a kind of perturbation claims, once for each key."""
        if (kind, id(key)) not in self._claimed:
            self._claimed.add((kind, id(key)))
            self.claims.setdefault(kind, []).append(claim)

    def call(self, kind: type[Perturbation], call: LayerCall) -> Any:
        """What a layer of that kind computes in the mean network; `None`: it
        is not perturbed by it.
        """
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
        shares_weights: whether weights are the same for all members, but for
            those of `perturbations`.

    Attributes:
        sources: those.
        shares_weights: that.
        choice: the optimizer's, for all layers.
    """

    def __init__(
        self,
        recording: Recording,
        perturbations: Sequence[Perturbation],
        states: Sequence[Any],
        sources: Sequence[tf.Tensor],
        shares_weights: bool,
    ) -> None:
        self.shares_weights = shares_weights
        self._recording = recording
        self.choice = recording.choice
        self._states = {
            p.name: (p, state)
            for p, state in zip(perturbations, states, strict=True)
        }
        self.sources = list(sources)

    def searches(self, variable: Any) -> bool:
        """Whether `variable` is searched over."""
        return self._recording.searches(variable)

    def call(self, kind: type[Perturbation], call: LayerCall) -> Any:
        """What a layer of that kind computes in the member; `None`: it is not
        perturbed by it.
        """
        if kind.name not in self._states:  # of another level; not called at mu
            return None if call.automatic else call.plain()
        perturbation, state = self._states[kind.name]
        return perturbation.call(call, state, self)

    def read(self, variable: Any) -> Any:
        """A variable, whose value is the member's."""
        return variable

    def finish(self) -> tuple[Any, ...]:
        """The records of each perturbation."""
        return tuple(p.finish(state) for p, state in self._states.values())
