"""The losses of one batch in a training step: the mean's and the members'."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import keras
import tensorflow as tf

from keras_vo import layer_state
from keras_vo.evaluation import per_example
from keras_vo.evaluation.isolation import Isolation
from keras_vo.evaluation.whole_batch import WholeBatch
from keras_vo.keras_compat.losses import losses_as_returned
from keras_vo.replicas.communicator import current_replicas
from keras_vo.search.credit import EXAMPLE, MEMBER

__all__ = ["LossesOfBatch"]


class LossesOfBatch:
    """What a model loses on a batch, at the mean and at members' weights.

    Args:
        model: a compiled Keras model.
        data: x, y and sample_weight.
        state: what members start from, see `layer_state.snapshot`.
    """

    def __init__(
        self, model: Any, data: tuple[Any, Any, Any], state: Any
    ) -> None:
        self._model = model
        self._x, self._y, self._sample_weight = data
        self._state = state
        self._by_example = False
        self._whole: WholeBatch | None = None

    def predict(self) -> Any:
        """The predictions of the model as it is, in training."""
        if "training" in inspect.signature(self._model.call).parameters:
            return self._model(self._x, training=True)
        return self._model(self._x)

    def of(self, y_pred: Any) -> Any:
        """The loss of predictions, as `compute_loss` returns it."""
        compute = self._model.compute_loss
        kwargs = {}
        if "training" in inspect.signature(compute).parameters:
            kwargs["training"] = True
        with losses_as_returned(self._model):
            return compute(
                x=self._x,
                y=self._y,
                y_pred=y_pred,
                sample_weight=self._sample_weight,
                **kwargs,
            )

    def of_member(self, weights: list[tf.Tensor]) -> Any:
        """The loss of a member."""
        return self._at(weights, by_example=False)

    def of_examples(self, weights: list[tf.Tensor]) -> Any:
        """The losses of a member by level of credit."""
        return self._at(weights, by_example=True)

    def _at(self, weights: list[tf.Tensor], by_example: bool) -> Any:
        model = self._model
        trained = zip(model.trainable_variables, weights, strict=True)
        values = [*trained, *self._state]
        # One scope around both calls: regularizers and add_loss are
        # evaluated at the member's weights, and all updates dropped.
        with (
            layer_state.unsynchronized(model),
            keras.StatelessScope(values, collect_losses=True) as scope,
        ):
            y_pred = self.predict()
            loss = self.of(y_pred)
            if self._by_example:  # `compute_loss` may return those of examples
                loss = tf.reduce_mean(loss)
            if not by_example:
                return loss
            per_example.check_no_added_losses(scope.losses)
            return {MEMBER: loss, EXAMPLE: self._examples_of(y_pred, values)}

    def _examples_of(
        self, y_pred: Any, values: list[tuple[Any, Any]]
    ) -> tf.Tensor:
        """Losses [batch] of a member's predictions.

        Args:
            y_pred: they.
            values: of the member's variables.
        """
        if self._whole is None:
            return self._own_losses(y_pred)[0]
        return self._whole.by_example(
            functools.partial(self._of_batch, values), y_pred
        )

    def _of_batch(self, values: Any, y_pred: Any) -> Any:
        """The loss of predictions alone, and no update of metrics."""
        self._model._by_example = True
        try:
            with keras.StatelessScope(values):
                return self.of(y_pred)
        finally:
            self._model._by_example = False

    def _own_losses(
        self, y_pred: Any, inputs: tf.Tensor | None = None
    ) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """Losses [batch], and those of all examples' weights."""
        self._model._by_example = True
        try:
            with per_example.by_example(self._model, inputs) as weights:
                losses = self.of(y_pred)
        finally:
            self._model._by_example = False
        return per_example.checked_examples(losses, inputs), weights

    def judge_examples(
        self, y_pred: Any, inputs: tf.Tensor, isolation: Isolation
    ) -> Any:
        """Lets members be judged example by example.

        Args:
            y_pred: the mean's predictions.
            inputs: of the model, [batch, ...].
            isolation: of the members.

        Returns:
            The examples' weights [batch], of mean 1; 1 if there are none. The
            mean is that over all replicas. Weights of losses may be negative:
            they count by their size.
        """
        self._by_example = True

        def evaluated() -> tuple[tf.Tensor, list[tf.Tensor]]:
            with keras.StatelessScope():  # no update of metrics
                return self._own_losses(y_pred, inputs)

        try:
            losses, weights = isolation.beside(evaluated)
        except per_example.OfWholeBatch:
            loss = functools.partial(self._of_batch, ())
            self._whole = WholeBatch.of(loss, y_pred, inputs)
            return 1.0
        if not weights:
            return 1.0
        total = tf.add_n([tf.abs(tf.cast(w, losses.dtype)) for w in weights])
        # Their mean over the examples of all replicas.
        weight, examples = current_replicas().sum(
            [tf.reduce_sum(total), tf.reduce_sum(tf.ones_like(total))]
        )
        return tf.math.divide_no_nan(total, weight / examples)
