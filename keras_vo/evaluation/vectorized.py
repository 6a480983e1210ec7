"""A function over the rows of its argument, as fast as its ops allow.

Vectorized, unless an op (a convolution, say) has no vectorized form or would
have none that XLA can compile: then one row after another.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

__all__ = ["compiled"]


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
        graph = traced.graph.as_graph_def()
        if jit_compile and _uses_tensor_lists(graph):
            traced = trace(mapped)
    except (NotImplementedError, ValueError):
        # No vectorized form; or the function's own error, raised again here.
        traced = trace(mapped)
    return traced


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
    nodes = list(graph.node)
    for function in graph.library.function:
        nodes.extend(function.node_def)
    return any(node.op.startswith("TensorList") for node in nodes)
