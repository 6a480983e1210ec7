"""A training step of Keras models that is one of variational optimization.

`VOTrainStep` replaces `train_step` and nothing else that a user sees.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import keras
import tensorflow as tf

from keras_vo import checks, layer_state, user_steps
from keras_vo.evaluation.isolation import Isolation
from keras_vo.keras_compat import (
    build_metrics,
    loss_tracker,
)
from keras_vo.losses_of_batch import LossesOfBatch
from keras_vo.optimizer import VOOptimizer, find_vo_optimizer
from keras_vo.perturbations.automatic import entered
from keras_vo.perturbations.calls import densified
from keras_vo.perturbations.scope import Recording
from keras_vo.perturbations.together import check_batch, levels, settle
from keras_vo.population_metrics import PopulationMetrics
from keras_vo.replicas import strategies
from keras_vo.replicas.communicator import current_replicas
from keras_vo.replicas.model import with_callback
from keras_vo.search.credit import EXAMPLE, Generation
from keras_vo.search.seeds import generation_seed
from keras_vo.step_functions import StepFunctions, scalar_losses

__all__ = ["VOTrainStep"]


class VOTrainStep(StepFunctions):
    """Mixin that trains a Keras model with a `VOOptimizer`.

    Put it before the Keras class:

        class MyModel(keras_vo.VOTrainStep, keras.Model): ...

    The model must be compiled with a `VOOptimizer`. Then `fit` and
    `train_on_batch` log, beside the loss and the metrics of the mean network
    (the model as it stands), `population_loss`, the mean loss of the perturbed
    members, and `nonfinite_members`, how many members' losses were not finite
    since the epoch began.

    Under a tf.distribute strategy each replica evaluates its shard of the
    population on its shard of the batch. Make the model, the optimizer and its
    inner optimizer under `strategy.scope()`.

    Each member's loss is that of `compute_loss` with all of its terms
    (regularizers, `add_loss`) at the member's weights and `training=True`.
    Batch statistics are the member's own; moving statistics follow the mean
    network. Random layers (dropout) show all members the same mask, a function
    of the optimizer's seed and generation.

    Losses of your own belong in `compute_loss`. A class behind this one with
    a `train_step` of its own is a TypeError when the class is defined: that
    step would never be called. What changes the data stands in front:

        class MyModel(keras_vo.VOTrainStep, keras.Model):
            def train_step(self, data):
                return super().train_step(mixup(data))
    """

    _by_example = False  # set by `LossesOfBatch`

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        user_steps.check_class(cls, VOTrainStep)

    @tf.autograph.experimental.do_not_convert  # as in Keras's `fit`
    def train_step(self, data: Any) -> dict[str, Any]:
        """One step: metrics of the mean network, then a generation.

        Args:
            data: what `fit` passes: x, (x, y) or (x, y, sample_weight).

        Returns:
            The metrics' results by name.

        Raises:
            TypeError: the model is compiled without a `VOOptimizer`.
            ValueError: it has no trainable weights.
        """
        optimizer = self._require_vo_optimizer()
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        self._prepare(optimizer, x)
        # What the mean network's pass is about to change.
        means = [tf.convert_to_tensor(v) for v in self.trainable_variables]
        state = layer_state.snapshot(self)
        recording = Recording(self.trainable_variables, optimizer.choice, means)
        isolation = self._isolation(optimizer)
        losses = LossesOfBatch(
            self, (x, y, sample_weight), state, optimizer, isolation
        )
        with entered(recording), isolation.of_mean():
            y_pred = losses.predict()
            recording.end_of_call()
            loss = losses.of(y_pred)
        losses.leave_other_axes(recording)
        losses.find_positions(y_pred, recording)
        settle(recording, isolation.read)
        isolation.check_read(recording.claimed)
        inputs = [i for i in keras.tree.flatten(x) if i is not None]
        examples = tf.shape(inputs[0])[0]
        layer_state.average_moving_statistics(
            self, examples, current_replicas()
        )
        credit_weights: Mapping[str, tf.Tensor] = {}
        if EXAMPLE in levels(recording):
            some = _row_for_each_example(inputs[0])
            check_batch(recording, some)
            credit_weights = losses.judge_examples(y_pred, some)
        loss = losses.reduced(loss)
        outputs = losses.outputs(y_pred, means, optimizer.dtype_of_search)
        report = optimizer.take_step(
            losses.of_member,
            self.trainable_variables,
            by_example=losses.of_examples,
            means=means,
            recording=recording,
            baseline=loss,
            credit_weights=credit_weights,
            examples=examples,
            isolation=isolation,
            outputs=outputs,
            jit_compile=self.jit_compile,
        )
        self._holds_members = isolation.holds
        self._population_metrics.update(
            Generation.of(report.losses), report.examples
        )
        loss_tracker(self).update_state(loss, sample_weight=examples)
        # A program that a metric calls, too, is called after the members'.
        with tf.control_dependencies([report.losses][: isolation.serial]):
            logs = self.compute_metrics(
                x, y, y_pred, sample_weight=sample_weight
            )
        return {**logs, **self._population_metrics.results()}

    def _prepare(self, optimizer: VOOptimizer, x: Any) -> None:
        """Builds what is not built yet, and seeds random layers."""
        if not (self.optimizer.built and self.trainable_variables):
            self(x)  # creates the weights of a model that is not built yet
        if not self.optimizer.built:
            with tf.init_scope():
                self.optimizer.build(self.trainable_variables)
        checks.check_variables(self.trainable_variables)
        self._introduce()
        layer_state.seed_random_layers(
            self,
            tf.convert_to_tensor(optimizer.base_seed),
            tf.convert_to_tensor(optimizer.generations),
        )

    def _isolation(self, optimizer: VOOptimizer) -> Isolation:
        """Of the members, which draw what is random from the search's seed."""
        seed = generation_seed(
            tf.convert_to_tensor(optimizer.base_seed),
            tf.convert_to_tensor(optimizer.generations),
        )
        return Isolation(self.trainable_variables, seed)

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """As in Keras; a `SearchMonitor` leaves when it ends by an error."""
        if type(self).reset_metrics is not VOTrainStep.reset_metrics:
            reset = keras.callbacks.LambdaCallback(
                on_epoch_begin=lambda *_: self._population_metrics.reset()
            )
            args, kwargs = (), with_callback(reset, args, kwargs)
        try:
            history = super().fit(*args, **kwargs)
            self._population_metrics.warn_if_blurred()
            return history
        finally:
            optimizer = find_vo_optimizer(getattr(self, "optimizer", None))
            observer = getattr(optimizer, "observer", None)
            if observer is not None and observer.leave_fit is not None:
                observer.leave_fit()

    def test_step(self, data: Any) -> Any:
        """As in Keras; the population's metrics belong to training."""
        with scalar_losses(self):
            logs = super().test_step(data)
        return (
            self._without_population(logs) if isinstance(logs, dict) else logs
        )

    def get_metrics_result(self) -> Any:
        """As in Keras; with those of the population, but in `evaluate`."""
        logs = self._without_population(super().get_metrics_result())
        if self._evaluating:
            return logs
        return {**logs, **self._population_metrics.results()}

    def reset_metrics(self) -> None:
        """As in Keras, and those of the population."""
        super().reset_metrics()
        self._population_metrics.reset()

    def _without_population(self, logs: dict[str, Any]) -> dict[str, Any]:
        population = {m.name for m in self._population_metrics.as_list()}
        return {k: v for k, v in logs.items() if k not in population}

    def build_from_data(
        self, build: Callable[..., None], iterator: Any, data_batch: Any
    ) -> None:
        """As in Keras, and metrics: a step that makes some is traced twice."""
        with scalar_losses(self):
            super().build_from_data(build, iterator, data_batch)
        own = {
            "train_step": (VOTrainStep.train_step,),
            "test_step": (VOTrainStep.test_step,),
        }
        build_metrics(self, iterator, data_batch, own)

    @property
    def losses(self) -> list[Any]:
        """As in Keras; none while the losses of examples are computed."""
        return [] if self._by_example else super().losses

    @property
    def metrics(self) -> list[Any]:
        """All metrics; those of the population are the last."""
        return [*super().metrics, *self._population_metrics.as_list()]

    @property
    def _population_metrics(self) -> PopulationMetrics:
        # Created on demand: make_variational() runs no constructor.
        if "_population_metrics_holder" not in self.__dict__:
            with tf.init_scope(), strategies.entered(self.made_under):
                self._population_metrics_holder = PopulationMetrics()
        return self._population_metrics_holder

    def _require_vo_optimizer(self) -> VOOptimizer:
        optimizer = find_vo_optimizer(self.optimizer)
        if optimizer is None:
            raise TypeError(
                f"{type(self).__name__} trains by variational optimization "
                "only. Expected: "
                "`model.compile(optimizer=keras_vo.VOOptimizer(...))`. "
                f"Received: optimizer={self.optimizer!r}"
            )
        return optimizer


def _row_for_each_example(inputs: Any) -> tf.Tensor:
    """A tensor with a row for each example of inputs of any kind."""
    if isinstance(inputs, tf.RaggedTensor):
        return tf.zeros([inputs.nrows()])
    return densified(inputs)
