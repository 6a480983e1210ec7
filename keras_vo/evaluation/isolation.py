"""Members apart from each other and from the mean, whatever users' code does.

A member is a function of its weights. The code that computes its loss may do
more: set the weights that it is asked about, count in variables of its own,
draw random numbers, call Python, or read weights in a function that was traced
for the mean network. `Isolation` sees what the graph of a member does, and
says how members are evaluated then:

    what it does            what is done about it
    ----------------------  --------------------------------------------------
    assigns a variable      one after another; set back after each member (for
                            an objective of `minimize` those searched over)
    calls Python            one after another
    draws random numbers    in a model: all members draw the same
    reads variables that    in a model: functions are traced anew; if that is
    are searched over       not enough, the variables are set to the member's
                            weights. An objective may, but if it reads nothing
                            of what it is given, it is refused
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from keras_vo import checks
from keras_vo.evaluation import notices, resources
from keras_vo.evaluation.effects import EagerEffects, Effects, inlined
from keras_vo.evaluation.random_ops import (
    PythonRandomness,
    common_random_numbers,
)
from keras_vo.search.credit import is_blurred
from keras_vo.tensorflow_compat import resource_dtype

__all__ = ["Isolation"]


class Isolation:
    """How the members of one generation are kept apart.

    Args:
        variables: those that are searched over.
        seed: of the generation, see `seeds.generation_seed`, if the objective
            is a model's: it reads the variables. `None`: it is given the
            weights, and draws as it likes.

    Attributes:
        serial: whether members are evaluated one after another.
        holds: whether the variables have the member's weights meanwhile.
        reason: why members are serial, for a message; `None`: for an op's
            sake.
        after: tensors that are computed before the first member is evaluated,
            if members are serial.
        replicas: how many there are.
        full: indices of the variables of whose weights each member is given
            its own tensor, and no kind of perturbation knows better.
        read: handles of the variables that the mean's pass has read, eagerly.
    """

    def __init__(
        self, variables: Sequence[Any], seed: tf.Tensor | None = None
    ) -> None:
        self._names = [checks.variable_name(v) for v in variables]
        self._handles = [variable.handle for variable in variables]
        self._seed = seed
        eager = tf.executing_eagerly()
        self.serial = eager
        self.reason: str | None = None
        self.after: list[tf.Tensor] = []
        self.replicas = 1
        self.full: Sequence[int] = range(len(self._handles))
        self.read: list[tf.Tensor] = []
        self._inline = False
        self._may_inline = not eager
        self.holds = self._seeds_python = eager and seed is not None
        self._saved: dict[int, tuple[tf.Tensor, tf.Tensor]] = {}
        self._unread = [False] * len(self._handles)
        self._left: set[str] = set()
        self._python = PythonRandomness(seed)
        self._noted: EagerEffects | None = None
        if eager:
            self._save(self._handles)

    @contextlib.contextmanager
    def of_mean(self) -> Iterator[None]:
        """The mean network's pass: eagerly, it shows what members will do."""
        if not tf.executing_eagerly():
            yield
            return
        noted = EagerEffects()
        with noted.noted():
            yield
        self._save(noted.assigned)
        notices.warn_of_random(noted.random)
        notices.warn_of_state(noted.state)
        self.read = noted.read

    def check_read(self, claimed: set[int]) -> None:
        """Whether the mean's loss depends on the variables; eagerly.

        Args:
            claimed: indices of those that layers have read by a claim.
        """
        if tf.executing_eagerly():
            read = set(map(id, self.read))
            unread = [id(handle) not in read for handle in self._handles]
            for index in claimed:
                unread[index] = False
            self._check_read(unread)

    def adapt(self, effects: Effects) -> bool:
        """Adapts to what a member's graph does.

        Returns:
            Whether it is to be traced once more.
        """
        of_model = self._seed is not None
        read = set(map(id, effects.read))
        reads = any(id(handle) in read for handle in self._handles)
        if of_model and self._may_inline and (reads or effects.random):
            self._inline, self._may_inline = True, False
            return True
        if (
            not of_model
            and self._may_inline
            and (any(self._unread) or self._wrong(effects))
        ):
            self._inline, self._may_inline = True, False
            return True
        holds = of_model and bool(reads or effects.python)
        serial = bool(effects.assigned or effects.python or holds)
        if serial <= self.serial and holds <= self.holds:
            self._finish(effects)
            return False
        self.serial, self.holds = serial, holds
        self._seeds_python = of_model and bool(effects.python)
        if effects.assigned:
            self.reason = "they assign a variable"
            if of_model:
                self.reason += (
                    " that Keras does not know (a tf.Variable): it is set back "
                    "after each"
                )
        elif not effects.python:
            self.reason = (
                "a function of `tf.function` that was traced before, or that "
                "needs AutoGraph, reads the weights of the model"
            )
        if of_model:
            self._save(effects.assigned)
            self._save(self._handles if holds else ())
        else:
            # What Python assigns is not seen.
            assigned = set(map(id, effects.assigned))
            self._save(
                handle
                for handle in self._handles
                if effects.python or id(handle) in assigned
            )
        return True

    def adapt_to_error(self, error: Exception) -> bool:
        """Adapts to an error of a member's trace.

        A function of `tf.function` that needs what inlining takes from it (a
        signature, AutoGraph) is left as it is. One that was traced for another
        member, whose tensors it has taken, is inlined.

        Returns:
            Whether the member is to be traced once more.
        """
        if self._inline:
            self._inline = False
            return True
        if self._may_inline and "out of scope" in str(error):
            self._inline, self._may_inline = True, False
            return True
        return False

    def run(
        self, member: Callable[..., Any], *args: Any, after: Any = ()
    ) -> Any:
        """`member(*args)`, apart from all others.

        Args:
            member: from its arguments to a structure of tensors.
            *args: its arguments.
            after: the outcomes of the members before it.
        """
        if tf.executing_eagerly():
            return self._run_eagerly(member, *args)
        with contextlib.ExitStack() as scopes:
            if self._inline:
                scopes.enter_context(inlined())
            if self._inline and self._seed is not None:
                scopes.enter_context(
                    common_random_numbers(self._seed, self._left)
                )
            if not self.serial:
                return member(*args)
            before = tf.nest.flatten(after)
            scopes.enter_context(tf.control_dependencies(before))
            if self._seeds_python:
                seeded = self._python.seed()
                scopes.enter_context(tf.control_dependencies([seeded]))
            outcome = member(*args)
        with tf.control_dependencies(tf.nest.flatten(outcome)):
            restored = self._restore()
        with tf.control_dependencies(restored):
            return tf.nest.map_structure(tf.identity, outcome)

    def _run_eagerly(self, member: Callable[..., Any], *args: Any) -> Any:
        """The same; variables are set back whatever the member raises."""
        if self._seeds_python:
            self._python.seed()
        try:
            if self._noted is not None:
                return member(*args)
            self._noted = EagerEffects()  # the first one shows what all do
            with self._noted.noted():
                return member(*args)
        finally:
            self._restore()

    def beside(self, function: Callable[[], Any]) -> Any:
        """`function()`, which goes through the mean network's losses again.

        Variables that it assigns are set back.
        """
        if tf.executing_eagerly():
            return self._run_eagerly(function)
        traced = tf.function(function, autograph=False).get_concrete_function()
        values = [
            resources.read(handle) for handle in Effects.of(traced).assigned
        ]
        if not values:
            return function()
        outcome = traced()
        with tf.control_dependencies(tf.nest.flatten(outcome)):
            restored = [resources.assign(*value) for value in values]
        with tf.control_dependencies(restored):
            return tf.nest.map_structure(tf.identity, outcome)

    @contextlib.contextmanager
    def objective(self, weights: Sequence[tf.Tensor]) -> Iterator[None]:
        """The scope in which a member's objective is called with `weights`."""
        held: list[Any] = []
        if self.holds:
            held = [
                resources.assign(
                    handle, tf.cast(weight, resource_dtype(handle))
                )
                for handle, weight in zip(self._handles, weights, strict=True)
            ]
        with tf.control_dependencies([op for op in held if op is not None]):
            yield
        if not tf.executing_eagerly():
            self._unread = [
                index in self.full and not weight.consumers()
                for index, weight in enumerate(weights)
            ]

    def check_eagerly(self, losses: tf.Tensor) -> None:
        """Warns, eagerly, of losses that may not be those of the weights."""
        noted = self._noted
        if noted is None or self._seed is not None:
            return
        if noted.in_stateless_scope:
            notices.warn_once(notices.STATELESS)
        if bool(is_blurred(losses)):
            notices.warn_once(checks.blurred_message("in a step"))
        read, assigned = ({id(h) for h in hs} for hs in (noted.read, noted.set))
        names = [
            name
            for name, handle in zip(self._names, self._handles, strict=True)
            if id(handle) in read - assigned
        ]
        if names and bool(tf.reduce_all(losses == losses[0])):
            notices.warn_once(notices.EQUAL.format(names))

    def _finish(self, effects: Effects) -> None:
        """Says what can't be helped."""
        if self._seed is not None:
            if not self.holds:
                self._check_read(self._unread)
            notices.warn_of_state(effects.state)
            if effects.python and self.replicas > 1:
                notices.warn_of_python(effects.python, self.replicas)
            if self._inline:
                # Ops that draw from the seed are left in the graph, unused.
                notices.warn_of_random(self._left | effects.random_called)
            else:
                notices.warn_of_random(effects.random)
            return
        if wrong := self._wrong(effects):
            raise ValueError(
                "The objective must compute its loss from the weights that "
                "it is given, or assign them to the variables before it "
                f"reads these. Received: an objective that reads {wrong}, "
                "which hold the mean, and not the weights of the member"
            )

    def _wrong(self, effects: Effects) -> list[str]:
        """Variables that an objective reads in the place of its weights."""
        if effects.python and all(self._unread):
            return self._names  # in Python, it seems
        read = set(map(id, effects.read)) - set(map(id, effects.assigned))
        return [
            name
            for name, handle, unread in zip(
                self._names, self._handles, self._unread, strict=True
            )
            if unread and id(handle) in read
        ]

    def _check_read(self, unread: Sequence[bool]) -> None:
        """Whether a model's loss depends on the variables, one after another.

        Raises:
            ValueError: it does on none.
        """
        names = list(itertools.compress(self._names, unread))
        if names == self._names:
            raise ValueError(
                "Expected a loss that depends on the weights of the model. "
                f"Received: one that reads none of {names}. "
                f"{notices.TRACED_BEFORE}"
            )
        if names:
            notices.warn_once(
                f"The loss does not depend on the weights {names}: they are "
                f"not trained. {notices.TRACED_BEFORE}"
            )

    def _save(self, handles: Iterable[tf.Tensor]) -> None:
        """Notes values that are set again after each member."""
        for handle in handles:
            if resource_dtype(handle) is not None:
                self._saved.setdefault(id(handle), resources.read(handle))

    def _restore(self) -> list[Any]:
        done = [resources.assign(*saved) for saved in self._saved.values()]
        if self._seeds_python:
            done.append(self._python.restore())
        return [op for op in done if op is not None]
