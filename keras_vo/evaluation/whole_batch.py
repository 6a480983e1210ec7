"""Credit by example for a loss of the whole batch.

A loss L(y, Y) of all predictions Y of a batch (F1, a ranking score) has no
term for each example. Example b of a member is given the loss that the batch
would have if it alone were perturbed,

    f_b = B L(y, Y with row b replaced by the member's),

where Y are the mean network's predictions and B is the number of examples. To
first order in the examples' effects that is what it contributes to the
member's loss; where L is a mean over examples it is exactly the example's own
loss, but for a term that all members share. No forward pass is needed, only B
evaluations of L; where rows meet only in sums, as those of F1 do, one of the
terms and B of what is done with the sums (`keras_vo.evaluation.row_sums`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from keras_vo import checks
from keras_vo.evaluation import notices
from keras_vo.evaluation.effects import Effects
from keras_vo.evaluation.row_sums import RowSums
from keras_vo.keras_compat.losses import keeps_mask, mask_of

__all__ = ["WholeBatch"]

# Numbers of predictions, or of pairs of examples, over the examples that are
# replaced at once.
_NUMBERS_AT_ONCE = 2**18


@dataclasses.dataclass(frozen=True)
class WholeBatch:
    """L on one batch.

    Attributes:
        mean: the mean network's predictions, tensors [B, ...].
        examples: B.
        dtype: of L.
        one_by_one: whether it is evaluated for one example after another, as
            it calls Python (or runs eagerly).
    """

    mean: Any
    examples: tf.Tensor
    dtype: tf.DType
    one_by_one: bool

    @classmethod
    def of(
        cls, loss: Callable[[Any], Any], mean: Any, inputs: tf.Tensor
    ) -> WholeBatch:
        """Looks at what L does.

        Args:
            loss: L, from predictions to a scalar.
            mean: the mean network's predictions.
            inputs: of the model, [B, ...].

        Raises:
            TypeError: predictions that are no tensors.
            ValueError: they have no row for each example.
        """
        for tensor in keras.tree.flatten(mean):
            if not tf.is_tensor(tensor) or isinstance(tensor, tf.RaggedTensor):
                raise TypeError(
                    "Noise on activations judges examples by a loss of the "
                    "whole batch, in which their predictions are replaced. "
                    "Expected: predictions that are dense tensors "
                    f"[batch, ...]. Received: {tensor!r}"
                )
            checks.check_batch(
                tensor,
                inputs,
                "A loss of the whole batch needs predictions with a row for "
                "each example.",
            )

        def evaluated() -> tf.Tensor:
            return tf.convert_to_tensor(loss(mean))

        examples = tf.shape(inputs)[0]
        if tf.executing_eagerly():
            return cls(mean, examples, evaluated().dtype, one_by_one=True)
        traced = tf.function(evaluated, autograph=False).get_concrete_function()
        python = Effects.of(traced).python
        if python:
            notices.warn_once(
                f"The loss calls Python ({', '.join(sorted(python))}), and "
                "has one number for the whole batch. Noise on activations "
                '(`LocalReparamDense`, perturbation="local_reparam") calls '
                "it once for each member and example, N times B in a step. "
                "Expected: a loss of TensorFlow's ops, which is vectorized, "
                'or perturbation="low_rank", which calls it once a member'
            )
        return cls(
            mean, examples, traced.structured_outputs.dtype, bool(python)
        )

    def by_example(self, loss: Callable[[Any], Any], member: Any) -> tf.Tensor:
        """f_b of all examples of a member, [B].

        Args:
            loss: L.
            member: the member's predictions.
        """

        if self.one_by_one:
            return tf.map_fn(
                functools.partial(self._replaced, loss, member),
                tf.range(self.examples),
                fn_output_signature=tf.TensorSpec([], self.dtype),
                parallel_iterations=1,
            )
        sums = RowSums.of(loss, self.mean)
        if sums is not None:
            values = self._vectorized(*self._of_sums(sums, member))
            # Only one example can be broadcast to more rows.
            alone = self._scaled(loss(member))
            return tf.where(tf.equal(self.examples, 1), alone, values)
        numbers = tf.add_n([tf.size(t) for t in keras.tree.flatten(member)])
        numbers = tf.maximum(numbers, self.examples**2)  # a loss of pairs
        return self._vectorized(
            functools.partial(self._replaced, loss, member), numbers
        )

    def _replaced(
        self, loss: Callable[[Any], Any], member: Any, example: tf.Tensor
    ) -> tf.Tensor:
        """f_b of one example, by the definition."""
        rows = tf.equal(tf.range(self.examples), example)
        predictions = keras.tree.map_structure(
            functools.partial(_merged, rows), self.mean, member
        )
        return self._scaled(loss(predictions))

    def _of_sums(
        self, sums: RowSums, member: Any
    ) -> tuple[Callable[[tf.Tensor], tf.Tensor], tf.Tensor]:
        """The same function where rows meet only in sums, and how many
        numbers it computes.
        """
        rest, terms = sums.rest(self.mean), sums.terms(member)

        def replaced(example: tf.Tensor) -> tf.Tensor:
            return self._scaled(sums.replaced(example, rest, terms, self.mean))

        in_a_row = tf.add_n([tf.size(t) for t in tf.nest.flatten(terms)])
        in_a_row //= tf.maximum(self.examples, 1)
        return replaced, in_a_row + sums.largest

    def _scaled(self, value: Any) -> tf.Tensor:
        value = tf.cast(value, self.dtype)
        return tf.cast(self.examples, self.dtype) * value

    def _vectorized(
        self, replaced: Callable[[tf.Tensor], tf.Tensor], numbers: tf.Tensor
    ) -> tf.Tensor:
        """`replaced` of all examples, as many at once as memory allows.

        Args:
            replaced: from the index of an example to its f_b.
            numbers: that it computes at least.
        """
        at_once = tf.clip_by_value(
            _NUMBERS_AT_ONCE // tf.maximum(numbers, 1),
            1,
            tf.maximum(self.examples, 1),
        )
        # One at least: an empty loop has no vectorized form.
        chunks = tf.maximum(-(-self.examples // at_once), 1)
        # The last chunk repeats the last example.
        last = tf.maximum(self.examples - 1, 0)
        padded = tf.minimum(tf.range(chunks * at_once), last)
        values = tf.map_fn(
            lambda chunk: tf.vectorized_map(replaced, chunk),
            tf.reshape(padded, [chunks, at_once]),
            fn_output_signature=tf.TensorSpec([None], self.dtype),
            parallel_iterations=1,
        )
        return tf.reshape(values, [-1])[: self.examples]


def _merged(rows: tf.Tensor, mean: tf.Tensor, member: tf.Tensor) -> tf.Tensor:
    """`mean` with some rows [B] of `member`."""
    where = tf.reshape(rows, [-1] + [1] * (mean.shape.rank - 1))
    return keeps_mask(tf.where(where, member, mean), mask_of(mean))
