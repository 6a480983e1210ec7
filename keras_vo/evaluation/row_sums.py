"""Losses in which the rows of a batch meet only in sums.

F1, Matthews' correlation, a Dice score, an error at a fixed cost and every
mean over examples have the form

    L(Y) = g(sum_b t_1(Y_b), sum_b t_2(Y_b), ...),

whose terms t depend on one example's predictions each. With row b of Y replaced
by another one, a sum is

    sum_a t(Y_a) + t(Y'_b) - t(Y_b):

the terms of all Y' are evaluated once, and g once for each example, on a few
numbers. The graph of L says whether it has this form: its ops are followed from
the predictions on, each tensor being the same for all predictions (FIXED), by
row (ROWS) or computed from the sums (WHOLE). An op that is not known to be one
of these ends the search: L has to be evaluated as it is.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_vo.evaluation.effects import inlined
from keras_vo.evaluation.row_rules import is_by_row, rows_summed
from keras_vo.evaluation.subgraph import between, emitted
from keras_vo.keras_compat.losses import keeps_mask, mask_of

__all__ = ["RowSums"]

# The inputs of each sum that have rows.
Terms = list[list[tf.Tensor]]


class _Kind(enum.Enum):
    FIXED = "the same for all predictions"
    ROWS = "[B, ...], row b of which depends on that of the predictions"
    WHOLE = "computed from sums over rows"


@dataclasses.dataclass(frozen=True)
class _Sum:
    """An op that adds up rows.

    Attributes:
        op: it.
        rows: from the index of each input that has rows to the axis of them.
    """

    op: Any
    rows: dict[int, int]


@dataclasses.dataclass(frozen=True)
class RowSums:
    """L, taken apart.

    Attributes:
        function: L, traced.
        sums: the sums over rows.
        numbers: in the largest tensor that is computed from them.
    """

    function: Any
    sums: tuple[_Sum, ...]
    numbers: int

    @classmethod
    def of(cls, loss: Callable[[Any], Any], like: Any) -> RowSums | None:
        """L taken apart; `None` where its graph does not show how.

        Args:
            loss: L, from predictions to a scalar.
            like: predictions, tensors [B, ...]; only their shapes and dtypes
                are used.
        """
        specs = [
            tf.TensorSpec(tensor.shape, tensor.dtype)
            for tensor in keras.tree.flatten(like)
        ]

        def flat(*tensors: tf.Tensor) -> tf.Tensor:
            predictions = keras.tree.pack_sequence_as(like, tensors)
            return tf.convert_to_tensor(
                loss(
                    keras.tree.map_structure(
                        lambda t, of: keeps_mask(t, mask_of(of)),
                        predictions,
                        like,
                    )
                )
            )

        with inlined():
            function = tf.function(flat, autograph=False)
            traced = function.get_concrete_function(*specs)
        found = _sums_of(traced, len(specs))
        return None if found is None else cls(traced, *found)

    def terms(self, predictions: Any) -> Terms:
        """What each sum adds up: those of its inputs that have rows."""
        inputs = [s.op.inputs[i] for s in self.sums for i in s.rows]
        values = iter(self._emitted(inputs, predictions))
        return [[next(values) for _ in s.rows] for s in self.sums]

    def totals(self, predictions: Any) -> list[tf.Tensor]:
        """The sums."""
        outputs = [s.op.outputs[0] for s in self.sums]
        return self._emitted(outputs, predictions)

    def replaced(
        self,
        example: tf.Tensor,
        totals: list[tf.Tensor],
        terms: Terms,
        of_member: Terms,
        predictions: Any,
    ) -> tf.Tensor:
        """L with one row replaced.

        Args:
            example: its index.
            totals: of the mean network's predictions.
            terms: of them.
            of_member: those of the predictions that the row is taken from.
            predictions: the mean network's, for their shapes.
        """
        examples = tf.shape(keras.tree.flatten(predictions)[0])[0]
        feed = {}
        for s, total, old, new in zip(
            self.sums, totals, terms, of_member, strict=True
        ):
            change = self._term(s, new, example) - self._term(s, old, example)
            if s.op.type == "Mean":
                change /= tf.cast(examples, change.dtype)
            feed[s.op.outputs[0].name] = total + change
        output = self.function.outputs
        return self._emitted(output, predictions, feed)[0]

    def _term(
        self, s: _Sum, terms: list[tf.Tensor], example: tf.Tensor
    ) -> tf.Tensor:
        """That of one example in a sum."""
        feed = {
            s.op.inputs[index].name: tf.gather(term, [example], axis=axis)
            for (index, axis), term in zip(s.rows.items(), terms, strict=True)
        }
        return self._emitted([s.op.outputs[0]], None, feed)[0]

    def _emitted(
        self,
        fetches: Sequence[tf.Tensor],
        predictions: Any,
        feed: dict[str, tf.Tensor] | None = None,
    ) -> list[tf.Tensor]:
        """Tensors of L's graph, computed in the current one."""
        given = keras.tree.flatten(predictions)
        given += self.function.captured_inputs
        inputs = self.function.inputs[len(self.function.inputs) - len(given) :]
        names = [tensor.name for tensor in inputs]
        return emitted(
            fetches, {**dict(zip(names, given, strict=True)), **(feed or {})}
        )


def _sums_of(function: Any, count: int) -> tuple[tuple[_Sum, ...], int] | None:
    """The sums of a traced function of predictions, and the largest number of
    numbers in what is computed from them.

    Args:
        function: a concrete function.
        count: how many of its inputs are predictions.
    """
    kinds = {tensor.name: _Kind.FIXED for tensor in function.inputs}
    for tensor in function.inputs[:count]:
        if not tensor.shape.rank:
            return None
        kinds[tensor.name] = _Kind.ROWS
    output = function.outputs[0]
    sums: list[_Sum] = []
    numbers = 1
    for op in between([output], kinds):
        found = _kind(op, [kinds[tensor.name] for tensor in op.inputs])
        if found is None:
            return None
        if isinstance(found, _Sum):
            sums.append(found)
            found = _Kind.WHOLE
        kinds.update((tensor.name, found) for tensor in op.outputs)
        if found is _Kind.WHOLE:
            for tensor in op.outputs:
                size = tensor.shape.num_elements()
                if size is None:
                    return None
                numbers = max(numbers, size)
    return (tuple(sums), numbers) if kinds[output.name] is _Kind.WHOLE else None


def _kind(op: Any, inputs: list[_Kind]) -> _Kind | _Sum | None:
    """That of an op's outputs, the sum that it is, or `None`: not known."""
    if op.op_def.is_stateful and op.type != "ReadVariableOp":
        return None
    of_shape = op.type in (
        "Shape",
        "ShapeN",
        "Size",
        "Rank",
        "ZerosLike",
        "OnesLike",
    )
    if of_shape or all(kind is _Kind.FIXED for kind in inputs):
        return _Kind.FIXED
    if _Kind.ROWS not in inputs:
        return _Kind.WHOLE
    if _Kind.WHOLE in inputs:
        return None
    rows = [kind is _Kind.ROWS for kind in inputs]
    if is_by_row(op, rows):
        return _Kind.ROWS
    summed = rows_summed(op, rows)
    return None if summed is None else _Sum(op, summed)
