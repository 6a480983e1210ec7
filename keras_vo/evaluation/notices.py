"""What is said once about what users' code does in a member."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import tensorflow as tf

__all__ = [
    "EQUAL",
    "STATELESS",
    "TRACED_BEFORE",
    "warn_of_python",
    "warn_of_random",
    "warn_of_state",
    "warn_once",
]

_said: set[str] = set()
TRACED_BEFORE = (
    "(A function of `tf.function` that was traced before its layers were "
    "built has weights of its own: `model.build(input_shape)` first, or take "
    "the decorator away.)"
)
_EAGERLY = " (with run_eagerly=False members would draw the same)"
STATELESS = (
    "The objective calls a function of `tf.function` in a "
    "`keras.StatelessScope`. Layers in it have the weights that it was traced "
    "with, not those of the scope. Expected: layers that are called without "
    "the function, `minimize` in a `tf.function`, or weights that are assigned "
    "to the variables."
)
EQUAL = (
    "All members of the population have exactly the same loss, and the "
    "objective reads {}, which hold the mean. Expected: an objective that "
    "computes its value from the weights that it is given, or assigns them to "
    "the variables before it reads these."
)


def warn_once(message: str) -> None:
    """Warns, unless this process has been told so before."""
    if message not in _said:
        _said.add(message)
        warnings.warn(message, stacklevel=2)


def warn_of_python(ops: Iterable[str], replicas: int) -> None:
    """Of ops that call Python in all replicas, which share its objects."""
    warn_once(
        f"A layer or a loss calls Python ({', '.join(sorted(ops))}) on "
        f"{replicas} replicas at once. Expected: Python that reads nothing "
        "but its arguments. What it reads of the model (`get_weights`) is "
        "what the first replica evaluates."
    )


def warn_of_random(ops: Iterable[str]) -> None:
    """Of ops that draw other numbers for each member, once for each type."""
    for op in sorted(ops):
        warn_once(
            f"The op {op} of a layer or loss draws other random numbers for "
            "each member of the population, which adds to the differences of "
            "their losses, and a resumed run draws others"
            f"{_EAGERLY if tf.executing_eagerly() else ''}. Draw by "
            "`keras.random` with a `keras.random.SeedGenerator`: then all "
            "members see the same numbers, a function of the search's seed."
        )


def warn_of_state(ops: Iterable[str]) -> None:
    """Of ops whose state is no variable, once for each type."""
    for op in sorted(ops):
        warn_once(
            f"The op {op} of a layer or loss has a state that is no variable "
            "(a table, a queue, an iterator, the time). It runs once more for "
            "each member of the population, and shows each another state, "
            "which adds to the differences of their losses. Expected: a "
            "`keras.Variable`, or a value that comes with the data."
        )
