"""The losses of single examples, from a compiled Keras model.

Keras reduces each compiled loss to one number. Here the same losses, with
their weights and masks, are left one number an example, scaled such that

    mean_b f_b = the scalar loss

for every reduction of Keras ("sum_over_batch_size", "sum", "mean",
"mean_with_sample_weight"). Where a loss has positions besides the batch axis,
an example's is the mean over its positions; unless those have credit of their
own: then they are left as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

from keras_vo import checks
from keras_vo.keras_compat.losses import (
    compiled_losses_replaced,
    keeps_mask,
    mask_of,
)

__all__ = [
    "NO_POSITIONS",
    "ExampleLoss",
    "OfWholeBatch",
    "by_example",
    "check_no_added_losses",
    "checked_examples",
    "mean_of_positions",
]


NO_POSITIONS = (
    'credit="position" needs a loss that has a value for each position. '
    "Expected: a loss of shape [batch, time] (or with more axes), as that of "
    "the next token, or of targets [batch, time, 1] for outputs "
    '[batch, time, 1]; or credit="example". Received: a loss of shape {}'
)


class OfWholeBatch(Exception):
    """A loss has one number for all examples, and none for each."""


class ExampleLoss:
    """A Keras loss without its reduction over the batch.

    Args:
        loss: a `keras.losses.Loss`.
        weight: its own among the losses of a model.
        weights: a list, to which each call appends the weights of the
            examples, like their losses.
        inputs: of the model, [batch, ...], to check that each example has a
            loss; `None`: not checked.
        positions: whether losses are those of positions.
    """

    def __init__(
        self,
        loss: Any,
        weight: Any,
        weights: list[tf.Tensor],
        inputs: tf.Tensor | None = None,
        positions: bool = False,
    ) -> None:
        self._loss = loss
        self._weight = 1.0 if weight is None else weight
        self._weights = weights
        self._inputs = inputs
        self._positions = positions

    def __call__(
        self, y_true: Any, y_pred: Any, sample_weight: Any = None
    ) -> tf.Tensor:
        """The examples' losses [batch]; those of positions [batch, ...].

        Raises:
            OfWholeBatch: the loss is a scalar. (A value of unknown shape, as
                of `tf.numpy_function`, counts as one:
                `value.set_shape([None])` says that it has one for each
                example.)
            ValueError: it has no value for each example, or not the
                positions of another loss.
        """
        arguments = (y_true, y_pred, sample_weight)
        ones = _Ones(self._loss)
        weights = _unreduced(ones, arguments)
        values = _unreduced(self._loss, arguments)
        if self._inputs is not None:
            checks.check_batch(
                values,
                self._inputs,
                "Noise on activations needs a loss with a value for each "
                f"example or for the batch, which {self._loss.name!r} has "
                "not.",
            )
        # The reduction divides by the batch, the valid positions, ...
        reduced = tf.reduce_mean(ones(*arguments))
        scale = tf.math.divide_no_nan(reduced, tf.reduce_mean(weights))
        weights, values = scale * weights, scale * values
        if self._positions:
            self._check_alike(values)
        else:
            weights, values = map(mean_of_positions, (weights, values))
        self._weights.append(self._weight * weights)
        return values

    def _check_alike(self, values: tf.Tensor) -> None:
        """Checks that losses of several outputs have the same positions."""
        for other in self._weights[:1]:
            if not values.shape.is_compatible_with(other.shape):
                raise ValueError(
                    'credit="position" needs losses that all have the same '
                    "positions. Expected: losses of one shape, or "
                    f'credit="example". Received: {self._loss.name!r} of shape '
                    f"{tuple(values.shape)} beside one of "
                    f"{tuple(other.shape)}"
                )


class _Ones(keras.losses.Loss):
    """1 in place of each value of `loss`; weighted, masked, reduced alike.

    Called, it raises `OfWholeBatch` if there is one value: with weights or a
    mask, that would be one for each example.
    """

    def __init__(self, loss: Any) -> None:
        super().__init__(reduction=loss.reduction, dtype=loss.dtype)
        self._of = loss

    def call(self, y_true: Any, y_pred: Any) -> Any:
        values = keras.ops.convert_to_tensor(self._of.call(y_true, y_pred))
        if not values.shape.rank:  # unknown: of a program
            raise OfWholeBatch
        # A mask is that of `ignore_class`, say.
        return keeps_mask(tf.ones_like(values), mask_of(values))


def _unreduced(loss: Any, arguments: tuple[Any, ...]) -> tf.Tensor:
    reduction = loss.reduction
    loss.reduction = None
    try:
        return tf.convert_to_tensor(loss(*arguments))
    finally:
        loss.reduction = reduction


def mean_of_positions(values: tf.Tensor) -> tf.Tensor:
    """[batch] from [batch, ...]."""
    return tf.reduce_mean(values, axis=list(range(1, values.shape.rank)))


@contextlib.contextmanager
def by_example(
    model: Any, inputs: tf.Tensor | None = None, positions: bool = False
) -> Iterator[list[tf.Tensor]]:
    """Lets the compiled losses of `model` return the losses of examples.

    Args:
        model: a Keras model.
        inputs: see `ExampleLoss`.
        positions: see `ExampleLoss`.

    Yields:
        A list, to which each compiled loss appends its examples' weights
        [batch], or those of positions [batch, ...], of mean 1 where there are
        no sample weights.
    """
    weights: list[tf.Tensor] = []
    with compiled_losses_replaced(
        model,
        lambda loss, weight: ExampleLoss(
            loss, weight, weights, inputs, positions
        ),
    ):
        yield weights


def checked_examples(
    losses: Any, inputs: tf.Tensor | None = None, positions: bool = False
) -> tf.Tensor:
    """What compute_loss returned, the losses [batch] of the examples.

    Args:
        losses: it.
        inputs: see `ExampleLoss`.
        positions: whether losses of positions [batch, ...] are wanted.

    Raises:
        OfWholeBatch: it is a scalar.
        ValueError: it is something else, or has no positions that are wanted.
    """
    losses = tf.convert_to_tensor(losses)
    if losses.shape.rank == 0:
        raise OfWholeBatch
    if positions:
        if losses.shape.rank == 1:
            raise ValueError(NO_POSITIONS.format(tuple(losses.shape)))
    elif losses.shape.rank != 1:
        raise ValueError(
            "Noise on activations needs the loss of each example, or of the "
            "batch. Expected: a `compute_loss` that returns a tensor [batch], "
            "a scalar, or the value of `super().compute_loss`. Received: a "
            f"tensor of shape {tuple(losses.shape)}"
        )
    if inputs is not None:
        checks.check_batch(
            losses,
            inputs,
            "`compute_loss` must return the loss of each example.",
        )
    return losses


def check_no_added_losses(added: list[Any]) -> None:
    """Raises if a model has losses that no example has."""
    if added:
        raise ValueError(
            "Noise on activations (`LocalReparamDense`, "
            'perturbation="local_reparam") needs a loss that is computed from '
            "the predictions, which `add_loss` and activity regularizers are "
            "not. Expected: all of the loss in `compile(loss=...)` or "
            '`compute_loss`, or noise on weights (perturbation="full" or '
            f'"low_rank"). Received: {len(added)} added losses'
        )
