"""Losses in which the rows of a batch meet only in sums.

F1, Matthews' correlation, a Dice score, an error at a fixed cost and every
mean over examples have the form

    L(Y) = g(sum_b t_1(Y_b), sum_b t_2(Y_b), ...),

whose terms t depend on one example's predictions each. With row b of Y replaced
by another one, a sum is

    sum_{a != b} t(Y_a) + t(Y'_b):

the terms of all Y' are evaluated once, and g once for each example, on a few
numbers. The graph of L says whether it has this form: its ops are followed from
the predictions on, each tensor being the same for all predictions (FIXED), by
row (ROWS) or computed from the sums (WHOLE). An op that is not known to be one
of these ends the search: L has to be evaluated as it is.
"""

from __future__ import annotations

import dataclasses
import enum
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_vo.evaluation.effects import Effects, inlined
from keras_vo.evaluation.row_rules import is_by_row, rows_summed
from keras_vo.evaluation.subgraph import between, emitted, has_functions
from keras_vo.keras_compat.losses import keeps_mask, mask_of

__all__ = ["RowSums"]

# Of the shape of an input, whatever its values.
_OF_SHAPES = ("Shape", "ShapeN", "Size", "Rank", "ZerosLike", "OnesLike")
# Numbers in a sum, or in what is computed from it: the mean network's is kept
# for each example.
_LARGEST = 2**14

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
        largest: numbers in the largest tensor that is computed from them.
    """

    function: Any
    sums: tuple[_Sum, ...]
    largest: int

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
        effects = Effects.of(traced)
        if effects.assigned or effects.random or effects.state:
            return None
        found = _sums_of(traced, len(specs))
        return None if found is None else cls(traced, *found)

    def terms(self, predictions: Any) -> Terms:
        """What each sum adds up: those of its inputs that have rows, and one
        row of zeros more.
        """
        inputs = [s.op.inputs[i] for s in self.sums for i in s.rows]
        values = iter(self._emitted(inputs, predictions))
        return [
            [_padded(next(values), axis) for axis in s.rows.values()]
            for s in self.sums
        ]

    def rest(self, predictions: Any) -> list[tf.Tensor]:
        """For each sum and example b, what all others add up to, [B, ...].

        Not the sum less the example's term: a difference may be off by much
        more than the result, or negative, and is NaN where the term is
        infinite.
        """
        terms = self.terms(predictions)

        def own(example: tf.Tensor) -> list[tf.Tensor]:
            return [
                self._term(s, of_sum, predictions, example)
                for s, of_sum in zip(self.sums, terms, strict=True)
            ]

        examples = tf.maximum(self._examples(predictions), 1)
        return [
            tf.cumsum(by_row, exclusive=True)
            + tf.cumsum(by_row, exclusive=True, reverse=True)
            for by_row in tf.vectorized_map(own, tf.range(examples))
        ]

    def replaced(
        self,
        example: tf.Tensor,
        rest: list[tf.Tensor],
        terms: Terms,
        predictions: Any,
    ) -> tf.Tensor:
        """L with one row replaced.

        Args:
            example: its index.
            rest: of the predictions in which it is replaced.
            terms: of the predictions that it is taken from.
            predictions: those of `rest`, for their shapes.
        """
        examples = self._examples(predictions)
        feed = {}
        for s, others, own in zip(self.sums, rest, terms, strict=True):
            total = tf.gather(others, example) + self._term(
                s, own, predictions, example
            )
            if s.op.type == "Mean":
                total /= tf.cast(examples, total.dtype)
            output = s.op.outputs[0]
            feed[output.name] = tf.cast(total, output.dtype)
        return self._emitted(self.function.outputs, predictions, feed)[0]

    @staticmethod
    def _examples(predictions: Any) -> tf.Tensor:
        return tf.shape(keras.tree.flatten(predictions)[0])[0]

    def _term(
        self,
        s: _Sum,
        terms: list[tf.Tensor],
        predictions: Any,
        example: tf.Tensor,
    ) -> tf.Tensor:
        """That of one example in a sum; of 16 bits, in float32."""
        feed = {
            s.op.inputs[index].name: tf.gather(term, [example], axis=axis)
            for (index, axis), term in zip(s.rows.items(), terms, strict=True)
        }
        (term,) = self._emitted([s.op.outputs[0]], predictions, feed)
        half = term.dtype.is_floating and term.dtype.size == 2
        return tf.cast(term, tf.float32) if half else term

    def _emitted(
        self,
        fetches: Sequence[tf.Tensor],
        predictions: Any,
        feed: Mapping[str, tf.Tensor] = types.MappingProxyType({}),
    ) -> list[tf.Tensor]:
        """Tensors of L's graph, computed in the current one."""
        given = keras.tree.flatten(predictions)
        given += self.function.captured_inputs
        inputs = self.function.inputs[len(self.function.inputs) - len(given) :]
        names = [tensor.name for tensor in inputs]
        known = dict(zip(names, given, strict=True))
        return emitted(fetches, {**known, **feed})


def _padded(rows: tf.Tensor, axis: int) -> tf.Tensor:
    """With one more row, of zeros: there is one to take if it is empty."""
    shape = tf.shape(rows)
    one = tf.concat([shape[:axis], [1], shape[axis + 1 :]], 0)
    return tf.concat([rows, tf.zeros(one, rows.dtype)], axis)


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
    largest = 1
    for op in between([output], kinds):
        found = _kind(op, [kinds[tensor.name] for tensor in op.inputs])
        if found is None:
            return None
        if isinstance(found, _Sum):
            sums.append(found)
            found = _Kind.WHOLE
        kinds.update((tensor.name, found) for tensor in op.outputs)
        if found is _Kind.WHOLE:
            sizes = [tensor.shape.num_elements() for tensor in op.outputs]
            if None in sizes:
                return None
            largest = max(largest, *sizes)
    whole = kinds[output.name] is _Kind.WHOLE and largest <= _LARGEST
    return (tuple(sums), largest) if whole else None


def _kind(op: Any, inputs: list[_Kind]) -> _Kind | _Sum | None:
    """That of an op's outputs, the sum that it is, or `None`: not known."""
    stateful = op.op_def.is_stateful and op.type != "ReadVariableOp"
    if stateful or has_functions(op):
        return None
    if op.type in _OF_SHAPES or all(kind is _Kind.FIXED for kind in inputs):
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
