"""What Keras calls for a step, and what is around it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from keras_vo import checks
from keras_vo.model_files import ModelFiles

__all__ = ["StepFunctions", "scalar_losses"]

_INSIDE, _OWN = "_in_scalar_losses", "_own_compute_loss"


class StepFunctions(ModelFiles):
    """Mixin: the functions that run `train_step`."""

    jit_compile: bool  # Keras's property
    # Whether the variables may hold a member's weights during a step.
    _holds_members = True

    def make_train_function(self, force: bool = False) -> Any:
        """As in Keras, but XLA compiles the evaluation of members only.

        The noise of a search that began with "tfp-normal-1" is another one
        under XLA, and whether "auto" means XLA depends on the machine.
        """
        jit_compile = self.jit_compile
        self.jit_compile = False
        try:
            return super().make_train_function(force)
        finally:
            self.jit_compile = jit_compile

    def make_step_function(
        self, make: Callable[[Any], Any], step: Callable[[Any], Any]
    ) -> Any:
        """As in Keras; what the optimizer creates is there before the first
        step is traced, or it would be traced twice."""
        function = super().make_step_function(make, step)
        if step != self.train_step:
            return function

        begun = False

        def train_function(iterator: Any) -> Any:
            nonlocal begun
            if not begun:
                self._begin_search()
                begun = True
            if not self._holds_members:
                return function(iterator)
            variables = self.trainable_variables
            means = [tf.identity(tf.convert_to_tensor(v)) for v in variables]
            try:
                return function(iterator)
            except (StopIteration, tf.errors.OutOfRangeError):
                raise  # the end of the data: steps before it were made
            except BaseException:
                if self._holds_members:
                    for variable, mean in zip(variables, means, strict=True):
                        variable.assign(mean)
                raise

        return train_function


@contextlib.contextmanager
def scalar_losses(model: Any) -> Iterator[None]:
    """Lets `compute_loss` return a loss without a static shape.

    Keras takes none; this package's own step does. Threads of replicas may be
    in it at once: the first one wraps the method, the last one leaves it as it
    was.
    """
    attributes = vars(model)  # without Keras's tracking
    inside = attributes.get(_INSIDE, 0)
    if not inside:
        attributes[_OWN] = attributes.get("compute_loss")
        attributes["compute_loss"] = _scalar(model.compute_loss)
    attributes[_INSIDE] = inside + 1
    try:
        yield
    finally:
        attributes[_INSIDE] -= 1
        if not attributes[_INSIDE]:
            own = attributes.pop(_OWN)
            del attributes["compute_loss"], attributes[_INSIDE]
            if own is not None:
                attributes["compute_loss"] = own


def _scalar(compute_loss: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(compute_loss)
    def checked(*args: Any, **kwargs: Any) -> Any:
        loss = compute_loss(*args, **kwargs)
        shapeless = tf.is_tensor(loss) and loss.shape.rank is None
        return checks.checked_scalar(loss) if shapeless else loss

    return checked
