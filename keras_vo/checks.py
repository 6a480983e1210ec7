"""What VOOptimizer is given: checked, or refused with a clear error.

Every error says what was expected and what was received.
"""

from __future__ import annotations

import decimal
import inspect
import math
import numbers
import operator
from collections.abc import Iterable, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_vo.search.credit import EXAMPLE, MEMBER, POSITION

__all__ = [
    "as_float",
    "blurred_message",
    "check_batch",
    "check_variables",
    "checked_integer",
    "checked_losses",
    "checked_number",
    "checked_objective",
    "checked_scalar",
    "checked_seed",
    "checked_size",
    "checked_variables",
    "variable_name",
]


def checked_size(name: str, population_size: int, antithetic: bool) -> int:
    """An even number of members if antithetic, at least 2."""
    try:
        size = operator.index(population_size)
    except TypeError:
        size = 0
    if size < 2 or (antithetic and size % 2):
        expected = "an even integer" if antithetic else "an integer"
        raise ValueError(
            f"`{name}` must be {expected} of 2 or more with "
            f"antithetic={antithetic}. Received: {name}={population_size!r}"
        )
    return size


def checked_seed(seed: int) -> int:
    """An integer that a stateless seed can hold."""
    try:
        value = operator.index(seed)
    except TypeError:
        value = -1
    if not 0 <= value < 2**63:
        raise ValueError(
            "`seed` must be None or an integer in [0, 2**63). "
            f"Received: seed={seed!r}"
        )
    return value


def checked_number(name: str, value: Any) -> float:
    """`value`, which is positive and finite: Python's, NumPy's, a tensor's."""
    number = as_float(value)
    if not 0 < number < math.inf:
        raise ValueError(
            f"`{name}` must be a positive, finite number. "
            f"Received: {name}={value!r}"
        )
    return number


def checked_integer(name: str, value: Any, least: int = 1) -> int:
    """`value`, at least `least`, as an integer."""
    number = as_float(value)
    if not least <= number < math.inf or number != int(number):
        raise ValueError(
            f"`{name}` must be an integer of {least} or more. "
            f"Received: {name}={value!r}"
        )
    return int(value)


def as_float(value: Any) -> float:
    """A number as a float; NaN if it is none."""
    if isinstance(value, (str, bytes, bool, np.bool_)) or np.ndim(value):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def check_variables(variables: list[Any]) -> None:
    """Raises unless there are variables, all of which can be perturbed."""
    if not variables:
        raise ValueError(
            "Expected at least one trainable weight to search over. "
            "Received: none (is every layer frozen?)"
        )
    for variable in variables:
        dtype = keras.backend.standardize_dtype(variable.dtype)
        if "float" not in dtype or getattr(
            variable, "overwrite_with_gradient", False
        ):
            raise ValueError(
                "Expected trainable weights of a floating dtype that an "
                "optimizer updates by a step. Received: "
                f"{variable_name(variable)!r} of dtype {dtype}"
            )


def checked_objective(
    objective: Any, method: str, credit: str = EXAMPLE
) -> Any:
    """`objective`, which can be called.

    Args:
        objective: it.
        method: that has it as its first argument.
        credit: of the optimizer, which is of no use here if by position.
    """
    if credit == POSITION:
        raise ValueError(
            f"The objective of `{method}` has one loss, and none of positions. "
            'Expected: credit="example", the default. '
            f"Received: credit={credit!r}"
        )
    if not callable(objective):
        raise TypeError(
            "The objective must be a function from a list of weight tensors "
            f"to a scalar loss. Expected: `{method}(objective, [variable])`, "
            "in this order. "
            f"Received: objective={objective!r} of type {type(objective)}"
        )
    try:
        signature = inspect.signature(objective)
    except (TypeError, ValueError):  # a builtin that does not say what it takes
        return objective
    try:
        signature.bind([])
    except TypeError as error:
        raise TypeError(
            "The objective is given one argument, the list of the weights' "
            "tensors, of a member of the population: `lambda weights: ...`. "
            f"Received: objective={objective!r}, of which Python says: {error}"
        ) from error
    return objective


def checked_variables(variables: Any, call: str) -> list[Any]:
    """`variables` as a list, each of which stands in it once.

    Args:
        variables: a sequence of Keras or TensorFlow variables.
        call: what they are an argument of, with {} in their place.
    """
    one = hasattr(variables, "assign")
    if one or isinstance(variables, (str, Mapping, tf.Tensor, np.ndarray)):
        listed = None
    else:
        listed = list(variables) if isinstance(variables, Iterable) else None
    if listed is None:
        received = (
            f"one variable, {variable_name(variables)!r}"
            if one
            else (f"{variables!r} of type {type(variables)}")
        )
        raise TypeError(
            "Expected a list of variables: "
            f"`{call.format('[variable]')}`, "
            f"`{call.format('list(variables.values())')}` for those of a "
            f"dict, or `{call.format('model.trainable_variables')}` for those "
            f"of a model. Received: {received}"
        )
    values = [v.value if isinstance(v, keras.Variable) else v for v in listed]
    places: dict[int, int] = {}
    for place, (variable, value) in enumerate(zip(listed, values, strict=True)):
        if not hasattr(variable, "assign"):
            raise TypeError(
                "Expected a list of Keras or TensorFlow variables, which a "
                "step can assign: "
                f"`{call.format('[tf.Variable(value)]')}`. Received: "
                f"{variable!r} of type {type(variable)} at place {place}"
            )
        first = places.setdefault(id(value), place)
        if first != place:
            raise ValueError(
                "Expected each variable once. Received: "
                f"{variable_name(variable)!r} at places {first} and {place}"
            )
    return listed


def variable_name(variable: Any) -> str:
    """A Keras variable's path, a TensorFlow variable's name."""
    return str(getattr(variable, "path", variable.name))


def checked_scalar(loss: Any, dtype: tf.DType | None = None) -> tf.Tensor:
    """An objective's value, one number, in the precision that it came in.

    Numbers of Python, and integers, are float64.

    Args:
        loss: the value.
        dtype: floating; a narrower value is cast to it. `None`: it is not.
    """
    if isinstance(loss, (numbers.Real, decimal.Decimal)) and not isinstance(
        loss, (np.float16, np.float32)
    ):
        loss = tf.constant(_checked_float(loss), tf.float64)
    if loss is None:
        raise ValueError(
            "The objective must return a scalar loss. Received: None"
        )
    try:
        loss = tf.convert_to_tensor(loss)
    except (TypeError, ValueError) as error:  # (loss, aux), say
        raise ValueError(
            f"The objective must return a scalar loss. Received: {loss!r}"
        ) from error
    if loss.shape.rank is None:
        # The name stands in TensorFlow's error.
        name = "a_loss_of_unknown_shape_must_be_a_scalar"
        loss = tf.ensure_shape(loss, [], name=name)
    if loss.shape.rank != 0 or loss.dtype.is_complex or loss.dtype == tf.string:
        raise ValueError(
            "The objective must return a scalar loss. Received: a tensor of "
            f"shape {tuple(loss.shape)} and dtype {loss.dtype.name}"
        )
    if not loss.dtype.is_floating:
        loss = tf.cast(loss, tf.float64)
    if dtype is not None and loss.dtype.size < dtype.size:
        loss = tf.cast(loss, dtype)
    return loss


def _checked_float(number: Any) -> float:
    try:
        return float(number)
    except OverflowError as error:
        raise ValueError(
            "The objective must return a loss within the range of float64, "
            f"up to 1.8e308. Received: {number!r:.40}"
        ) from error


def checked_losses(value: Any, dtype: tf.DType) -> dict[str, tf.Tensor]:
    """An objective's value, a scalar or a dict of losses by level of credit.

    Args:
        value: it.
        dtype: that the losses get, unless they have a wider one.
    """
    by_level = value if isinstance(value, dict) else {MEMBER: value}
    if MEMBER not in by_level:
        raise ValueError(
            "The objective must return a scalar loss. "
            f"Received: a dict with the keys {list(by_level)}"
        )
    losses = {
        level: value if value.dtype.size > dtype.size else tf.cast(value, dtype)
        for level, value in by_level.items()
        if level != MEMBER
    }
    return {MEMBER: checked_scalar(by_level[MEMBER], dtype), **losses}


def blurred_message(where: str) -> str:
    """What is said of members' losses that can't be told apart.

    Args:
        where: when it was.
    """
    return (
        f"The members' losses differ, {where}, by no more than what rounding "
        "does to numbers of their size: they can't be ranked. Expected: a loss "
        "without a large constant, or one in float64. (Or sigma is too small.)"
    )


def check_batch(values: tf.Tensor, inputs: tf.Tensor, requirement: str) -> None:
    """Checks that `values` has an entry for each example of the batch.

    Args:
        values: [batch, ...].
        inputs: of the model, [batch, ...].
        requirement: what is to be so, a sentence of the message.

    Raises:
        ValueError: it has not; where only running the step tells, an
            InvalidArgumentError then.
    """
    size = "of the size of the batch"
    if inputs.shape[0] is not None:
        size = f"of size {inputs.shape[0]}"
    message = (
        f"{requirement} Expected: a first axis {size}, as the model's inputs. "
        f"Received: shape {tuple(values.shape)}"
    )
    if not values.shape[:1].is_compatible_with(inputs.shape[:1]):
        raise ValueError(message)
    tf.debugging.assert_equal(tf.shape(values)[0], tf.shape(inputs)[0], message)
