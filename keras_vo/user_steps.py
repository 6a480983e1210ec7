"""A `train_step` of a user's own, which that of keras_vo would replace.

A class after `VOTrainStep` in the order of resolution has its `train_step`
never called: what it does to the data or adds to the loss would be lost.
"""

from __future__ import annotations

from typing import Any

import keras

__all__ = ["PLAIN_MODEL", "check_class", "check_model"]

PLAIN_MODEL = (
    "VOOptimizer evaluates a population of perturbed models, which the "
    "training step of a plain Keras model cannot do. Expected one of: a model "
    "built as `keras_vo.VOModel(inputs, outputs)` or "
    "`keras_vo.VOSequential([...])`; a subclass "
    "`class MyModel(keras_vo.VOTrainStep, keras.Model)`; or "
    "`keras_vo.make_variational(model)` for a model that exists already. "
    "A model that is one of these keeps its losses in `compute_loss`, and a "
    "`train_step` of its own ends in `super().train_step(data)`. "
    "Without a model, call `optimizer.minimize(objective, [variable])`. "
    "Received: gradients or a loss from another training step."
)

_CURES = (
    "Expected: losses and terms of losses in "
    "`compute_loss(self, x, y, y_pred, sample_weight)`, which every member of "
    "the population is evaluated by (see 'Your model' in the README for an "
    "example); and what changes the data (mixup, say) in a class "
    "`class MyModel(keras_vo.VOTrainStep, keras.Model)` whose own "
    "`train_step(self, data)` ends in "
    "`return super().train_step(new_data)`."
)


def check_class(cls: type, variational: type) -> None:
    """Raises if `variational` takes the place of another `train_step`.

    A class below `variational` whose own `train_step` stands for both is
    taken at its word.

    Args:
        cls: a subclass of `variational`.
        variational: the class whose `train_step` is to be called.

    Raises:
        TypeError: it does.
    """
    order = cls.__mro__
    place = order.index(variational)
    knowing = [
        before
        for before in order[:place]
        if "train_step" in vars(before) and issubclass(before, variational)
    ]
    for owner in _own_steps(order[place + 1 :]):
        if not any(issubclass(before, owner) for before in knowing):
            raise _replaced(cls, owner)


def check_model(model: Any, variational: type) -> None:
    """Raises if a model that is to be `variational` has another `train_step`.

    Args:
        model: a `keras.Model`.
        variational: the class whose `train_step` is to be called.

    Raises:
        TypeError: its class has one, or the model itself.
    """
    if isinstance(model, variational):
        check_class(type(model), variational)
        return
    if "train_step" in vars(model):
        raise TypeError(
            f"The model {model.name!r} has a function as its attribute "
            "`train_step`, which would be called in the place of that of "
            f"keras_vo. {_CURES} Or set it after "
            "`model = keras_vo.make_variational(model)`, and let it call the "
            "`model.train_step` that was there. Received: "
            f"train_step={vars(model)['train_step']!r}"
        )
    for owner in _own_steps(type(model).__mro__):
        raise _replaced(type(model), owner)


def _replaced(cls: type, owner: type) -> TypeError:
    return TypeError(
        "keras_vo trains by a `train_step` of its own, so that "
        f"`{owner.__name__}.train_step` of `{cls.__name__}` would never be "
        f"called. {_CURES} Received: {owner.__module__}.{owner.__qualname__}, "
        "which defines `train_step`"
    )


def _own_steps(order: tuple[type, ...]) -> list[type]:
    """The classes whose `train_step` Keras would call, the first ones first.

    None behind Keras's own: that is not called in a plain model either.
    """
    own = []
    for cls in order:
        if "train_step" in vars(cls):
            if cls in keras.Model.__mro__:
                break
            own.append(cls)
    return own
