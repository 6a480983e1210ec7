"""The losses of one batch in a training step: the mean's and the members'."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_vo import checks, layer_state
from keras_vo.evaluation import per_example
from keras_vo.evaluation.isolation import Isolation
from keras_vo.evaluation.whole_batch import WholeBatch
from keras_vo.keras_compat.losses import losses_as_returned
from keras_vo.outputs_of_batch import OutputsOfBatch
from keras_vo.perturbations.automatic import entered
from keras_vo.perturbations.local import LocalReparam
from keras_vo.perturbations.scope import Recording
from keras_vo.replicas.communicator import current_replicas
from keras_vo.search.credit import EXAMPLE, MEMBER, POSITION

__all__ = ["LossesOfBatch"]

_MANY = 7919  # a prime that no axis is likely to have


class LossesOfBatch:
    """What a model loses on a batch, at the mean and at members' weights.

    Args:
        model: a compiled Keras model.
        data: x, y and sample_weight.
        state: what members start from, see `layer_state.snapshot`.
        optimizer: the `VOOptimizer`. With its perturbation "local_reparam",
            and for layers that ask for it, `compute_loss` may return the
            losses of examples; with its credit by position, those of
            positions.
        isolation: of the members.
    """

    def __init__(
        self,
        model: Any,
        data: tuple[Any, Any, Any],
        state: Any,
        optimizer: Any,
        isolation: Isolation,
    ) -> None:
        self._model = model
        self._x, self._y, self._sample_weight = data
        self._state = state
        self._isolation = isolation
        self._by_example = optimizer.choice.kind == LocalReparam.name
        self._by_position = optimizer.credit == POSITION
        self._discount = optimizer.position_discount
        self._whole: WholeBatch | None = None

    def predict(self) -> Any:
        """The predictions of the model as it is, in training."""
        return self._called(self._x)

    def outputs(
        self, y_pred: Any, means: Sequence[tf.Tensor], dtype: tf.DType
    ) -> OutputsOfBatch:
        """What the network puts out at other weights.

        Args:
            y_pred: the mean's predictions.
            means: mu, the values of the trainable variables.
            dtype: of what is computed.
        """
        first = next(i for i in keras.tree.flatten(self._x) if i is not None)
        return OutputsOfBatch(
            self._model,
            self._x,
            self._state,
            means,
            y_pred,
            tf.shape(first)[0],
            self._isolation,
            dtype,
        )

    def _called(self, x: Any) -> Any:
        if "training" in inspect.signature(self._model.call).parameters:
            return self._model(x, training=True)
        return self._model(x)

    def leave_other_axes(self, recording: Recording) -> None:
        """Leaves automatic calls whose first axis is not that of the examples.

        The model is traced once more, for a batch of a size that nothing else
        has: what has another one is not of examples, whatever its size is now.
        (Where that can't be traced, or sizes are not known then, the step
        itself compares them.)
        """
        if recording.choice.kind != LocalReparam.name or not recording.claims:
            return
        trials: list[Recording] = []

        def traced(x: Any) -> tf.Tensor:
            trial = Recording(
                recording.variables, recording.choice, recording.means
            )
            trials.append(trial)
            with (
                layer_state.unsynchronized(self._model),
                keras.StatelessScope(self._state),
                entered(trial),
            ):
                self._called(x)
            return tf.zeros([])

        try:
            specs = keras.tree.map_structure(_for_many_examples, self._x)
            tf.function(traced, autograph=False).get_concrete_function(specs)
        except Exception:  # whatever users' code raises for this size alone
            return
        for claim in trials[-1].claims.get(LocalReparam.name, ()):
            if claim.outputs.shape[0] not in (None, _MANY):
                recording.leave(
                    claim.call, "its first axis is not that of the examples"
                )

    def find_positions(self, y_pred: Any, recording: Recording) -> None:
        """Notes the axes of the loss, where positions have their own credit.

        Args:
            y_pred: the mean's predictions.
            recording: of the mean's pass, where they are noted.

        Raises:
            ValueError: no activations are perturbed, or the loss has no
                positions.
        """
        if not self._by_position:
            return
        if LocalReparam.name not in recording.claims:
            raise ValueError(
                'credit="position" is that of noise on activations. Expected: '
                "layers that have some (Dense, EinsumDense or Embedding under "
                'perturbation="local_reparam", or a `LocalReparamDense`), or '
                'credit="example". Received: a model without, under '
                f"perturbation={recording.choice.kind!r}"
            )
        try:
            losses, _ = self._judged(y_pred)
        except per_example.OfWholeBatch:
            raise ValueError(per_example.NO_POSITIONS.format("()")) from None
        recording.positions = losses.shape
        rest = 1 - self._discount
        recording.horizon = 1 / rest if rest else math.inf

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

    def reduced(self, loss: Any) -> tf.Tensor:
        """A scalar, of what `of` returns."""
        if self._by_example:
            rank = tf.convert_to_tensor(loss).shape.rank
            if rank == 1 or (rank and self._by_position):
                loss = tf.reduce_mean(loss)
        return checks.checked_scalar(loss)

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
            loss = self.reduced(self.of(y_pred))
            if not by_example:
                return loss
            per_example.check_no_added_losses(scope.losses)
            return {MEMBER: loss, **self._examples_of(y_pred, values)}

    def _examples_of(
        self, y_pred: Any, values: list[tuple[Any, Any]]
    ) -> dict[str, tf.Tensor]:
        """Losses of a member's predictions, those of examples and positions.

        Args:
            y_pred: they.
            values: of the member's variables.
        """
        if self._whole is not None:
            of_batch = functools.partial(self._of_batch, values)
            return {EXAMPLE: self._whole.by_example(of_batch, y_pred)}
        losses, _ = self._own_losses(y_pred)
        if not self._by_position:
            return {EXAMPLE: losses}
        positions = tf.reduce_prod(tf.shape(losses)[1:])
        return {
            EXAMPLE: per_example.mean_of_positions(losses),
            POSITION: losses / tf.cast(positions, losses.dtype),
        }

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
        """Losses [batch] of examples or [batch, ...] of positions, and the
        weights of each loss.
        """
        positions = self._by_position
        self._model._by_example = True
        try:
            with per_example.by_example(
                self._model, inputs, positions
            ) as weights:
                losses = self.of(y_pred)
        finally:
            self._model._by_example = False
        losses = per_example.checked_examples(losses, inputs, positions)
        return losses, weights

    def _judged(
        self, y_pred: Any, inputs: tf.Tensor | None = None
    ) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """`_own_losses` at the mean, and nothing else of it."""

        def evaluated() -> tuple[tf.Tensor, list[tf.Tensor]]:
            with keras.StatelessScope():  # no update of metrics
                return self._own_losses(y_pred, inputs)

        return self._isolation.beside(evaluated)

    def judge_examples(
        self, y_pred: Any, inputs: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        """Lets members be judged example by example.

        Args:
            y_pred: the mean's predictions.
            inputs: of the model, [batch, ...].

        Returns:
            The weights by level: of examples, of mean 1 over all replicas, and
            of positions, of any; none if they are 1. Weights of losses may be
            negative: they count by their size.
        """
        self._by_example = True
        try:
            losses, weights = self._judged(y_pred, inputs)
        except per_example.OfWholeBatch:
            loss = functools.partial(self._of_batch, ())
            self._whole = WholeBatch.of(loss, y_pred, inputs)
            return {}
        if not weights:
            return {}
        total = tf.add_n([tf.abs(tf.cast(w, losses.dtype)) for w in weights])
        if not self._by_position:
            return {EXAMPLE: _of_mean_one(total)}
        of_examples = per_example.mean_of_positions(total)
        return {EXAMPLE: _of_mean_one(of_examples), POSITION: total}


def _of_mean_one(weights: tf.Tensor) -> tf.Tensor:
    """Weights divided by their mean over all replicas."""
    total, count = current_replicas().sum(
        [tf.reduce_sum(weights), tf.reduce_sum(tf.ones_like(weights))]
    )
    return tf.math.divide_no_nan(weights, total / count)


def _for_many_examples(inputs: Any) -> Any:
    """What inputs are for `_MANY` examples."""
    if inputs is None:
        return None
    return tf.TensorSpec([_MANY, *inputs.shape[1:]], inputs.dtype)
