"""What a network puts out on a batch of a training step, at other weights."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_vo import layer_state
from keras_vo.evaluation.isolation import Isolation
from keras_vo.evaluation.jacobians import as_units
from keras_vo.keras_compat import layers_of
from keras_vo.perturbations.input_squares import InputSquares

__all__ = ["OutputsOfBatch"]


class OutputsOfBatch:
    """A model's outputs on a batch; nothing of the model is changed.

    Args:
        model: a Keras model.
        inputs: of the batch, which replicas have a part each of.
        state: what members start from, see `layer_state.snapshot`.
        means: mu, the values of the trainable variables.
        outputs: at mu, in training.
        examples: their number, a scalar.
        isolation: of the members.
        dtype: of what is computed.

    Attributes:
        inputs: those.
        means: those.
        examples: that.
    """

    def __init__(
        self,
        model: Any,
        inputs: Any,
        state: Any,
        means: Sequence[tf.Tensor],
        outputs: Any,
        examples: tf.Tensor,
        isolation: Isolation,
        dtype: tf.DType,
    ) -> None:
        self._model = model
        self.inputs = inputs
        self._state = state
        self.means = means
        self.examples = examples
        self._outputs = outputs
        self._isolation = isolation
        self._dtype = dtype
        self._statistics: list[tuple[Any, tf.Tensor]] | None = None

    def apart(self, function: Callable[[], Any]) -> Any:
        """`function()`; variables that it assigns are set back."""
        return self._isolation.beside(function)

    @property
    def at_mean(self) -> list[tf.Tensor]:
        """`in_training` at mu."""
        return as_units(self._outputs, self._dtype)

    @property
    def sizes(self) -> list[tuple[int, tf.Tensor]]:
        """Of each output its units, and its positions of an example.

        Raises:
            ValueError: there is none that is floating, or its number of units
                is not known.
        """
        outputs = self.at_mean
        every = keras.tree.flatten(self._outputs)
        floating = [
            y
            for y in every
            if y is not None and tf.as_dtype(y.dtype).is_floating
        ]
        if not outputs or len(outputs) < len(floating):
            raise ValueError(
                "Sensitivities need outputs with a gradient: floating tensors "
                "[batch, ..., units] whose number of units is known. Expected: "
                "a network with such outputs only, or integer ones beside "
                'them; or sensitivity="inputs", which needs forward passes '
                "only; or sensitivity=None. Received: the outputs "
                f"{every!r:.300} of {self._model.name!r}"
            )
        return [
            (int(y.shape[-1]), tf.reduce_prod(tf.shape(y)[1:-1]))
            for y in outputs
        ]

    def in_training(self, weights: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Outputs as members have them, each [batch, ..., units]."""
        with self._apart([*self._pairs(weights), *self._state]):
            return as_units(self._called(self.inputs, True), self._dtype)

    def in_use(
        self, weights: Sequence[tf.Tensor], inputs: Any
    ) -> list[tf.Tensor]:
        """Outputs of an example that do not depend on the others: without
        dropout, and BatchNormalization has the statistics of this batch.
        """
        statistics = self._of_batch()
        with self._apart([*self._pairs(weights), *self._state, *statistics]):
            return as_units(self._called(inputs, False), self._dtype)

    def input_squares(self) -> tuple[tf.Tensor, tf.Tensor]:
        """`InputSquares.of` the network at mu."""
        squares = InputSquares(self._model.trainable_variables, self._dtype)
        with self._apart([*self._pairs(self.means), *self._state]):
            return squares.of(lambda: self._called(self.inputs, True))

    def begin(self) -> None:
        """Finds the statistics of the batch that `in_use` needs."""
        self._statistics = None
        self._statistics = self._of_batch()

    def _of_batch(self) -> list[tuple[Any, tf.Tensor]]:
        """The statistics that BatchNormalization layers have of the batch."""
        if self._statistics is not None:
            return self._statistics
        layers = [
            layer
            for layer in layers_of(self._model)
            if isinstance(layer, keras.layers.BatchNormalization)
            and layer.trainable
            and layer.moving_mean is not None  # else never called
        ]
        if not layers:
            return []
        former = [layer.momentum for layer in layers]
        values = [*self._pairs(self.means), *self._state]
        try:
            for layer in layers:
                layer.momentum = 0.0  # moving statistics are the batch's
            with self._apart(values) as scope:
                self._called(self.inputs, True)
        finally:
            for layer, momentum in zip(layers, former, strict=True):
                layer.momentum = momentum
        return [
            (v, tf.convert_to_tensor(scope.get_current_value(v)))
            for layer in layers
            for v in (layer.moving_mean, layer.moving_variance)
        ]

    def _pairs(self, weights: Sequence[tf.Tensor]) -> list[tuple[Any, Any]]:
        """Variables with their values, which are rounded as they are."""
        return [
            (variable, tf.cast(weight, variable.dtype))
            for variable, weight in zip(
                self._model.trainable_variables, weights, strict=True
            )
        ]

    @contextlib.contextmanager
    def _apart(self, values: Any) -> Iterator[Any]:
        with (
            layer_state.unsynchronized(self._model),
            keras.StatelessScope(values, collect_losses=True) as scope,
        ):
            yield scope

    def _called(self, inputs: Any, training: bool) -> Any:
        if "training" in inspect.signature(self._model.call).parameters:
            return self._model(inputs, training=training)
        return self._model(inputs)
