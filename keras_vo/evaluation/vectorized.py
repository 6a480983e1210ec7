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

__all__ = ["compiled"]

_announced: set[str] = set()  # ops


def compiled(
    function: Callable[[Any], Any], specs: Any, jit_compile: bool
) -> Callable[[Any], Any]:
    """`function` for each row of a structure of tensors, stacked.

    Args:
        function: from one row to a structure of tensors.
        specs: of the rows together.
        jit_compile: whether XLA compiles it.
    """

    def vectorized(rows: Any) -> Any:
        return tf.vectorized_map(function, rows, fallback_to_while_loop=False)

    def mapped(rows: Any) -> Any:
        first = tf.nest.map_structure(lambda t: t[0], rows)
        traced = tf.function(function, autograph=False).get_concrete_function(
            first
        )
        return tf.map_fn(
            function,
            rows,
            fn_output_signature=tf.nest.map_structure(
                tf.TensorSpec.from_tensor, traced.structured_outputs
            ),
        )

    def trace(over_rows: Callable[[Any], Any]) -> Any:
        return tf.function(
            over_rows, jit_compile=jit_compile or None, autograph=False
        ).get_concrete_function(specs)

    try:
        with _quiet_tensorflow():
            traced = trace(vectorized)
    except (NotImplementedError, ValueError) as error:
        # If it is the function's own, it is raised again here.
        traced = trace(mapped)
        _announce_slow_path(str(error))
        return traced
    if jit_compile and _uses_tensor_lists(traced.graph):
        traced = trace(mapped)
    return traced


def _announce_slow_path(reason: str) -> None:
    """Says once for each op that members are evaluated one after another."""
    found = re.search(
        r"(?:No pfor vectorization defined for|op) '?(\w+)", reason
    )
    op = found.group(1) if found else reason.partition("\n")[0]
    if op in _announced:
        return
    _announced.add(op)
    absl_logging.warning(
        "The members of a population are evaluated one after another, not "
        "vectorized, since TensorFlow has no vectorized form of %s.",
        op,
    )


@contextlib.contextmanager
def _quiet_tensorflow() -> Iterator[None]:
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
