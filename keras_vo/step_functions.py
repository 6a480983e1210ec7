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


class StepFunctions(ModelFiles):
    """Mixin: the functions that run `train_step`."""

    jit_compile: bool  # Keras's property
    # Whether the variables may hold a member's weights during a step.
    _holds_members = True

    def make_train_function(self, force: bool = False) -> Any:
        """As in Keras, but XLA compiles the evaluation of members only.

        The same seed gives other normals under XLA, and whether "auto" means
        XLA depends on the machine.
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

    Keras takes none; this package's own step does.
    """
    compute_loss = model.compute_loss
    own = vars(model).get("compute_loss")

    @functools.wraps(compute_loss)
    def checked(*args: Any, **kwargs: Any) -> Any:
        loss = compute_loss(*args, **kwargs)
        shapeless = tf.is_tensor(loss) and loss.shape.rank is None
        return checks.checked_scalar(loss) if shapeless else loss

    model.compute_loss = checked
    try:
        yield
    finally:
        if own is None:
            del model.compute_loss
        else:
            model.compute_loss = own
