"""A training step of Keras models that is one of variational optimization.

`VOTrainStep` replaces `train_step` and nothing else that a user of
`compile`, `fit`, callbacks, saving and export sees.
"""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import keras
import tensorflow as tf

from keras_vo.evaluation import per_example
from keras_vo.keras_compat import loss_tracker, undivided_losses
from keras_vo.layers import as_dense, updated_weights
from keras_vo.optimizer import Generation, VOOptimizer, find_vo_optimizer
from keras_vo.perturbations.scope import Recording, entered
from keras_vo.perturbations.together import check_batch, levels
from keras_vo.replicas import strategies
from keras_vo.replicas.communicator import current_replicas
from keras_vo.replicas.model import ReplicatedModel
from keras_vo.search import noise
from keras_vo.search.credit import EXAMPLE, MEMBER

__all__ = ["VOTrainStep"]


class _OfFirstReplica:
    """Metrics of values that are the same in all replicas."""

    def add_variable(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["aggregation"] = "only_first_replica"  # not their sum
        return super().add_variable(*args, **kwargs)  # type: ignore[misc]


class _PopulationMean(_OfFirstReplica, keras.metrics.Mean):
    pass


class _PopulationSum(_OfFirstReplica, keras.metrics.Sum):
    pass


class _PopulationMetrics:
    """The metrics of the population, in the epoch's log.

    A plain holder: a Keras model may not be given further metrics of its own
    once it is built.
    """

    def __init__(self) -> None:
        self.loss = _PopulationMean(name="population_loss")
        self.nonfinite = _PopulationSum(name="nonfinite_members")

    def update(self, generation: Generation) -> None:
        any_finite = tf.math.is_finite(generation.mean_loss)
        self.loss.update_state(
            tf.where(any_finite, generation.mean_loss, 0.0),
            sample_weight=tf.cast(any_finite, tf.float32),
        )
        self.nonfinite.update_state(generation.nonfinite_members)

    def as_list(self) -> list[Any]:
        return [self.loss, self.nonfinite]


class VOTrainStep(ReplicatedModel):
    """Mixin that trains a Keras model with a `VOOptimizer`.

    Put it before the Keras class:

        class MyModel(keras_vo.VOTrainStep, keras.Model): ...

    The model must be compiled with a `VOOptimizer`. Then `fit` and
    `train_on_batch` log, beside the loss and the metrics of the mean network
    (the model as it stands), `population_loss`, the mean loss of the perturbed
    members, and `nonfinite_members`, how many members' losses were not finite
    since the epoch began.

    Under a tf.distribute strategy each replica evaluates its share of the
    population on its shard of the batch. Make the model, the optimizer and its
    inner optimizer under `strategy.scope()`.

    Each member's loss is that of `compute_loss` with all of its terms
    (regularizers, `add_loss`) at the member's weights and `training=True`.
    Batch statistics are the member's own; moving statistics follow the mean
    network. Random layers (dropout) show all members the same mask, a function
    of the optimizer's seed and generation.
    """

    jit_compile: bool  # Keras's property
    _by_example = False

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
        if not self.optimizer.built:
            self(x)  # creates the weights of a model that is not built yet
            with tf.init_scope():
                self.optimizer.build(self.trainable_variables)
        self._seed_random_layers(optimizer)
        recording = Recording(self.trainable_variables)
        with entered(recording):
            y_pred = self._call_in_training(x)
            recording.end_of_call()
            loss = self._training_loss(x, y, y_pred, sample_weight)
        inputs = [i for i in keras.tree.flatten(x) if i is not None]
        batch_size = tf.shape(inputs[0])[0]
        self._average_statistics(batch_size)
        example_weights: Any = 1.0
        by_example = EXAMPLE in levels(recording)
        if by_example:
            some_input = tf.convert_to_tensor(inputs[0])
            check_batch(recording, some_input)
            example_weights = self._example_weights(
                x, y, y_pred, sample_weight, inputs=some_input
            )
            loss = tf.reduce_mean(loss)

        def objective(weights: list[tf.Tensor]) -> Any:
            mapping = zip(self.trainable_variables, weights, strict=True)
            # One scope around both calls: regularizers and add_loss are
            # evaluated at the member's weights, and all updates dropped.
            with keras.StatelessScope(mapping, collect_losses=True) as scope:
                y_pred = self._call_in_training(x)
                loss = self._training_loss(x, y, y_pred, sample_weight)
                if not by_example:
                    return loss
                self._check_no_added_losses(scope.losses)
                examples, _ = self._example_losses(x, y, y_pred, sample_weight)
                return {MEMBER: tf.reduce_mean(loss), EXAMPLE: examples}

        generation = optimizer.step(
            objective,
            self.trainable_variables,
            self.jit_compile,
            recording,
            example_weights,
            batch_size,
        )
        self._population_metrics.update(generation)
        # After the step, which refuses a loss that is not a scalar.
        # Not the metric called "loss": the user may have one of that name.
        loss_tracker(self).update_state(loss, sample_weight=batch_size)
        return self.compute_metrics(x, y, y_pred, sample_weight=sample_weight)

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """As in Keras; a `SearchMonitor` leaves when it ends by an error."""
        try:
            return super().fit(*args, **kwargs)
        finally:
            optimizer = find_vo_optimizer(getattr(self, "optimizer", None))
            observer = getattr(optimizer, "observer", None)
            if observer is not None and observer.leave_fit is not None:
                observer.leave_fit()

    def test_step(self, data: Any) -> Any:
        """As in Keras; the population's metrics belong to training."""
        logs = super().test_step(data)
        return (
            self._without_population(logs) if isinstance(logs, dict) else logs
        )

    def get_metrics_result(self) -> Any:
        """As in Keras; in `evaluate` without those of the population."""
        logs = super().get_metrics_result()
        return self._without_population(logs) if self._evaluating else logs

    def _without_population(self, logs: dict[str, Any]) -> dict[str, Any]:
        population = {m.name for m in self._population_metrics.as_list()}
        return {k: v for k, v in logs.items() if k not in population}

    def make_train_function(self, force: bool = False) -> Any:
        """As in Keras, but XLA compiles the evaluation of members only.

        The same seed gives other normals under XLA, and whether "auto" means
        XLA depends on the machine.
        """
        jit_compile = self.jit_compile
        self.jit_compile = False
        try:
            return super().make_train_function(force)
        finally:
            self.jit_compile = jit_compile

    def save_weights(self, filepath: Any, *args: Any, **kwargs: Any) -> None:
        """As in Keras, under the names that layers of Dense would have.

        A `.weights.h5` file names each layer by its class.
        """
        with as_dense(self):
            super().save_weights(filepath, *args, **kwargs)

    def load_weights(self, filepath: Any, *args: Any, **kwargs: Any) -> None:
        """As in Keras, but never leaves out the state of the search.

        Keras skips an optimizer that is not built yet. The layers of
        `keras_vo.layers` load `.weights.h5` files of Dense, and their own.
        """
        if (
            self.compiled
            and self.built
            and find_vo_optimizer(self.optimizer)
            and not self.optimizer.built
        ):
            self.optimizer.build(self.trainable_variables)
        whole_model = str(filepath).endswith(".keras")
        with contextlib.nullcontext() if whole_model else as_dense(self):
            super().load_weights(filepath, *args, **kwargs)

    @property
    def losses(self) -> list[Any]:
        """As in Keras; none while the losses of examples are computed."""
        return [] if self._by_example else super().losses

    @property
    def metrics(self) -> list[Any]:
        """All metrics; those of the population are the last."""
        return [*super().metrics, *self._population_metrics.as_list()]

    @property
    def _population_metrics(self) -> _PopulationMetrics:
        # Created on demand: make_variational() runs no constructor.
        if "_population_metrics_holder" not in self.__dict__:
            with tf.init_scope(), strategies.entered(self.made_under):
                self._population_metrics_holder = _PopulationMetrics()
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

    def _seed_random_layers(self, optimizer: VOOptimizer) -> None:
        """Sets the seeds of random layers from seed and generation.

        Keras does not save them: a resumed run would draw other masks.
        """
        weights = {id(v) for v in self.weights}
        states = [v for v in self.variables if id(v) not in weights]
        if not states:
            return
        seed = noise.generation_seed(
            tf.convert_to_tensor(optimizer.base_seed),
            tf.convert_to_tensor(optimizer.generations),
        )
        for index, state in enumerate(states):
            # Negative: the population's draws have the indices from 0.
            own = noise.single_seed(seed, tf.constant(-1 - index, tf.int64))
            state.assign(tf.bitcast(own, tf.uint32))

    def _average_statistics(self, batch_size: tf.Tensor) -> None:
        """Gives all replicas the mean of what the mean network's pass updated.

        That is, of moving statistics (BatchNorm), by examples.
        """
        replicas = current_replicas()
        if replicas.count == 1:
            return
        updated = updated_weights(self)
        if not updated:
            return
        wide = any(v.dtype == "float64" for v in updated)
        dtype = tf.float64 if wide else tf.float32
        weight = tf.cast(batch_size, dtype)
        sums = replicas.sum(
            [
                tf.where(batch_size > 0, weight * tf.cast(v, dtype), 0)
                for v in updated
            ]
            + [weight]
        )
        examples = sums.pop()
        for variable, total in zip(updated, sums, strict=True):
            variable.assign(tf.cast(total / examples, variable.dtype))

    def _call_in_training(self, x: Any) -> Any:
        if "training" in inspect.signature(self.call).parameters:
            return self(x, training=True)
        return self(x)

    def _training_loss(
        self, x: Any, y: Any, y_pred: Any, sample_weight: Any
    ) -> Any:
        kwargs = {}
        if "training" in inspect.signature(self.compute_loss).parameters:
            kwargs["training"] = True
        with undivided_losses():
            return self.compute_loss(
                x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, **kwargs
            )

    def _example_losses(
        self, *data: Any, inputs: tf.Tensor | None = None
    ) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """Losses [batch], and those of all examples' weights."""
        self._by_example = True
        try:
            with per_example.by_example(self, inputs) as weights:
                losses = self._training_loss(*data)
        finally:
            self._by_example = False
        return per_example.checked_examples(losses, inputs), weights

    def _example_weights(self, *data: Any, inputs: tf.Tensor) -> Any:
        """The examples' weights [batch], of mean 1; 1 if there are none.

        The mean is that over all replicas.

        Weights of losses may be negative: they count by their size.
        """
        with keras.StatelessScope():  # no update of metrics
            losses, weights = self._example_losses(*data, inputs=inputs)
        if not weights:
            return 1.0
        total = tf.add_n([tf.abs(tf.cast(w, losses.dtype)) for w in weights])
        # Their mean over the examples of all replicas.
        weight, examples = current_replicas().sum(
            [tf.reduce_sum(total), tf.reduce_sum(tf.ones_like(total))]
        )
        return tf.math.divide_no_nan(total, weight / examples)

    def _check_no_added_losses(self, added: list[Any]) -> None:
        if added:
            raise ValueError(
                "LocalReparamDense needs a loss with a value for each "
                "example, which `add_loss` and activity regularizers have "
                "not. Expected: all of the loss in `compile(loss=...)` or "
                f"`compute_loss`. Received: {len(added)} added losses"
            )
