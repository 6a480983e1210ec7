"""A function over the rows of its argument, as fast as its ops allow.

Vectorized, unless an op (a convolution, say) has no vectorized form or would
have none that XLA can compile: then one row after another.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf
from absl import logging as absl_logging

from keras_vo.evaluation.effects import Effects
from keras_vo.evaluation.isolation import Isolation
from keras_vo.perturbations.shared_inputs import TraceAgainError

__all__ = ["compiled", "quiet_tensorflow"]

_announced: set[str] = set()  # reasons


def compiled(
    function: Callable[[Any], Any],
    specs: Any,
    jit_compile: bool,
    isolation: Isolation,
) -> Callable[[Any, tf.Tensor], Any]:
    """`function` for each row of a structure of tensors, stacked.

    Args:
        function: from one row to a structure of tensors.
        specs: of the rows together.
        jit_compile: whether XLA compiles it.
        isolation: of the rows.

    Returns:
        A function of the rows, and of how many of them count. (Of the rest
        the values are zeros if rows are evaluated one after another.)
    """
    slow = None
    while True:
        try:
            run, effects, reason = _traced(
                function, specs, jit_compile, isolation.serial
            )
        except TraceAgainError:
            continue
        except Exception as error:
            if not isolation.adapt_to_error(error):
                raise
            continue
        slow = slow or reason
        if not isolation.adapt(effects):
            why = isolation.reason or slow
            if why is not None:
                _announce_slow_path(why)
            return run


def _traced(
    function: Callable[[Any], Any], specs: Any, jit_compile: bool, serial: bool
) -> tuple[Callable[[Any, tf.Tensor], Any], Effects, str | None]:
    """`function` over rows; what it does; why it is not vectorized."""

    def trace(over_rows: Callable[..., Any], *more: Any) -> Any:
        return tf.function(
            over_rows, jit_compile=jit_compile or None, autograph=False
        ).get_concrete_function(specs, *more)

    def vectorized(rows: Any) -> Any:
        return tf.vectorized_map(function, rows, fallback_to_while_loop=False)

    slow = None
    if not serial:
        try:
            with quiet_tensorflow():
                traced = trace(vectorized)
            if not (jit_compile and _uses_tensor_lists(traced.graph)):
                return lambda rows, _: traced(rows), Effects.of(traced), None
        except (NotImplementedError, ValueError) as error:
            # If it is the function's own, it is raised again here.
            slow = _slow_op(str(error))
    row = tf.nest.map_structure(
        lambda spec: tf.TensorSpec(spec.shape[1:], spec.dtype), specs
    )
    single = tf.function(function, autograph=False).get_concrete_function(row)
    signature = tf.nest.map_structure(
        tf.TensorSpec.from_tensor, single.structured_outputs
    )

    def mapped(rows: Any, count: tf.Tensor) -> Any:
        size = tf.shape(tf.nest.flatten(rows)[0])[0]
        if not jit_compile:  # which takes no shapes that depend on numbers
            rows = tf.nest.map_structure(lambda t: t[:count], rows)
        values = tf.map_fn(
            function,
            rows,
            fn_output_signature=signature,
            parallel_iterations=1,
        )
        if jit_compile:
            return values
        return tf.nest.map_structure(lambda t: _padded(t, size), values)

    run = trace(mapped, tf.TensorSpec([], tf.int32))
    return run, Effects.of(single), slow


def _padded(values: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
    """`values` [n, ...] with rows of zeros up to `size`."""
    missing = size - tf.shape(values)[0]
    shape = tf.concat([[missing], tf.shape(values)[1:]], axis=0)
    return tf.concat([values, tf.zeros(shape, values.dtype)], axis=0)


def _slow_op(error: str) -> str:
    """What TensorFlow's error says can't be vectorized."""
    found = re.search(
        r"(?:No pfor vectorization defined for|op) '?(\w+)", error
    )
    op = found.group(1) if found else error.partition("\n")[0]
    return f"TensorFlow has no vectorized form of {op}"


def _announce_slow_path(reason: str) -> None:
    """Says once for each reason that members are evaluated one by one."""
    if reason in _announced:
        return
    _announced.add(reason)
    absl_logging.warning(
        "The members of a population are evaluated one after another, not "
        "vectorized, since %s.",
        reason,
    )


@contextlib.contextmanager
def quiet_tensorflow() -> Iterator[None]:
    """Silences what TensorFlow logs when it finds no vectorized form."""
    logger = tf.get_logger()
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _uses_tensor_lists(graph: Any) -> bool:
    """Whether a loop's TensorArray was vectorized, which XLA can't compile."""
    definition = graph.as_graph_def()
    nodes = list(definition.node)
    for function in definition.library.function:
        nodes.extend(function.node_def)
    return any(node.op.startswith("TensorList") for node in nodes)
