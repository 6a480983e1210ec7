"""What keras_vo uses of TensorFlow beyond its public interface.

TensorFlow offers no public way to see, and to replace, the ops that a user's
code makes, nor to see what compiles them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

try:
    from tensorflow.python.eager.record import VariableWatcher as _Watcher
    from tensorflow.python.framework import op_callbacks as _op_callbacks
    from tensorflow.python.ops import control_flow_util as _control_flow
except ImportError as error:
    raise ImportError(
        "keras_vo uses names of TensorFlow that are not public. Expected: a "
        "version of TensorFlow that has them, see `install_requires` of "
        f"keras_vo. Received: TensorFlow {tf.__version__}, {error}"
    ) from error

__all__ = [
    "called_for_each_op",
    "is_compiled_by_xla",
    "resource_dtype",
    "variables_read",
]


@contextlib.contextmanager
def called_for_each_op(
    callback: Callable[[str, tuple[Any, ...], Any, Any], Any],
) -> Iterator[None]:
    """Calls `callback` for each op that this thread makes or runs.

    Args:
        callback: from the type of an op, its inputs, its outputs and its graph
            (`None`: it ran eagerly) to what takes the place of the outputs
            (eagerly nothing does); `None`: nothing.
    """

    def called(
        op_type: Any,
        inputs: Any,
        attributes: Any,
        outputs: Any,
        op_name: Any = None,
        graph: Any = None,
    ) -> Any:
        name = op_type.decode() if isinstance(op_type, bytes) else op_type
        replaced = callback(name, inputs, outputs, graph)
        return outputs if replaced is None else replaced

    _op_callbacks.add_op_callback(called)
    try:
        yield
    finally:
        _op_callbacks.remove_op_callback(called)


@contextlib.contextmanager
def variables_read() -> Iterator[list[Any]]:
    """A scope; once it is left, its list has the variables read in it.

    Eagerly, by this thread; of those that were made trainable.
    """
    variables: list[Any] = []
    with _Watcher() as watcher:
        yield variables
        variables += watcher.watched_variables()


def is_compiled_by_xla() -> bool:
    """Whether a `tf.function(jit_compile=True)` is traced."""
    graph = tf.compat.v1.get_default_graph()
    return bool(_control_flow.GraphOrParentsInXlaContext(graph))


def resource_dtype(handle: tf.Tensor) -> tf.DType | None:
    """The dtype of the variable of a handle; `None`: it is none's."""
    data = getattr(handle, "_handle_data", None)
    if data is None or not data.is_set:
        return None
    return tf.as_dtype(data.shape_and_type[0].dtype)
