"""Keras models that train by variational optimization.

Classes with the training step of `VOTrainStep` for functional, Sequential and
subclassed models, and the conversion of models that exist already.
"""

from __future__ import annotations

import functools
from typing import Any

import keras

from keras_vo import layers, user_steps
from keras_vo.keras_compat import Functional, adapt_clones, unpickle
from keras_vo.training import VOTrainStep

__all__ = ["VOModel", "VOSequential", "make_variational"]


@keras.saving.register_keras_serializable(package="keras_vo")
class VOModel(VOTrainStep, keras.Model):
    """`keras.Model` trained by variational optimization.

    Use it as `keras_vo.VOModel(inputs, outputs)`, or subclass it. See
    `VOTrainStep` for what training does.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> VOModel:
        if cls is VOModel and _functional_arguments(args, kwargs):
            return Functional.__new__(VOFunctional, *args, **kwargs)
        return super().__new__(cls, *args, **kwargs)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if not _functional_arguments(args, kwargs):
            super().__init__(*args, **kwargs)
            return
        # A subclass that calls `super().__init__(inputs, outputs)`. Keras
        # would make VOModel itself functional, for all its subclasses.
        _make_functional(type(self))
        VOFunctional.__init__(self, *args, **kwargs)


class _KeepsDense(VOTrainStep):
    """Saves what `make_variational(dense=)` has made of Dense layers.

    A layer inside of another layer is made anew by that one when it is
    loaded, as Dense.
    """

    def get_config(self) -> dict[str, Any]:
        config: dict[str, Any] = super().get_config()
        return (
            config if self._dense is None else config | {"dense": self._dense}
        )

    @classmethod
    def from_config(
        cls, config: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        config = dict(config)
        dense = config.pop("dense", None)
        model = super().from_config(config, *args, **kwargs)
        return model if dense is None else make_variational(model, dense)


@keras.saving.register_keras_serializable(package="keras_vo")
class VOFunctional(_KeepsDense, VOModel, Functional):
    """What `VOModel(inputs, outputs)` is an instance of."""

    __init__ = Functional.__init__


def _functional_arguments(args: Any, kwargs: Any) -> bool:
    return len(args) >= 2 or "inputs" in kwargs or "outputs" in kwargs


def _make_functional(cls: type) -> type:
    """Puts `VOFunctional` in the place of `VOModel` among the bases."""
    if cls is VOModel:
        return VOFunctional
    if issubclass(cls, VOModel):
        cls.__bases__ = tuple(_make_functional(base) for base in cls.__bases__)
    return cls


@keras.saving.register_keras_serializable(package="keras_vo")
class VOSequential(_KeepsDense, keras.Sequential):
    """`keras.Sequential` trained by variational optimization.

    See `VOTrainStep` for what training does.
    """


@keras.saving.register_keras_serializable(package="keras_vo")
class VariationalSubclass(_KeepsDense):
    """What `make_variational` makes of a user's own subclass of `keras.Model`.

    It is saved as the original inside this class, so that a process that
    converted no model before can load it.
    """

    original_class: type

    def __reduce__(self) -> Any:
        # Keras would pickle a method of the class, which is not importable.
        _, arguments = super().__reduce__()
        return unpickle(keras.Model), arguments

    def get_config(self) -> dict[str, Any]:
        variational = type(self)
        self.__class__ = variational.original_class
        try:
            config = keras.saving.serialize_keras_object(self)
        finally:
            self.__class__ = variational
        config.pop("compile_config", None)  # the outer object has it
        return {"model": config, "dense": self._dense}

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: Any = None
    ) -> Any:
        return make_variational(
            keras.saving.deserialize_keras_object(
                config["model"], custom_objects=custom_objects
            ),
            config.get("dense"),
        )


@functools.cache
def _variational_subclass(original: Any) -> type:
    variational = type(
        f"Variational{original.__name__}",
        (VariationalSubclass, original),
        {"original_class": original, "__module__": __name__},
    )
    # Under the one name that a fresh process knows as well.
    return keras.saving.register_keras_serializable(
        package="keras_vo", name=VariationalSubclass.__name__
    )(variational)


def make_variational(model: Any, dense: str | None = None) -> Any:
    """Makes an existing Keras model trainable by variational optimization.

    Args:
        model: a functional, Sequential or subclassed `keras.Model`, built or
            not, compiled or not.
        dense: what the model's Dense layers, those inside of other layers
            included, become in place, with their weights: "full"
            (`keras.layers.Dense`), "local_reparam" (`LocalReparamDense`) or
            "low_rank" (`LowRankDense`, of rank 1 unless they are already).
            `None` leaves them as they are, and so are subclasses of Dense and
            layers that do not exist yet, as those which another layer makes
            when it is built.

    Returns:
        The same object with the same layers, weights and compile settings,
        whose class now has `VOTrainStep`. Compile it with a `VOOptimizer`
        before `fit`. Its clones (`keras.models.clone_model`, scikit-learn
        wrappers) are trained alike, and have the same `dense`.

    Raises:
        TypeError: `model` is not a `keras.Model`, or it has a `train_step` of
            its own, which would never be called.
        ValueError: `dense` is none of these.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(
            "`model` must be a functional, Sequential or subclassed "
            f"keras.Model. Received: model={model!r} of type {type(model)}"
        )
    user_steps.check_model(model, VOTrainStep)
    if dense is not None:
        layers.convert_dense(model, dense)
    if isinstance(model, VOTrainStep):
        pass
    elif type(model) is Functional:
        model.__class__ = VOFunctional
    elif type(model) is keras.Sequential:
        model.__class__ = VOSequential
    else:
        original: Any = type(model)
        model.__class__ = _variational_subclass(original)
    if dense is not None:
        model._dense = dense
    model.train_function = None  # it would run the former class's train_step
    model.test_function = None
    return model


def _variational_clone(model: Any, clone: Any) -> Any:
    """What Keras makes plain, or of Dense layers, as the original has it."""
    clone = make_variational(clone, model._dense)
    own: Any = type(model)
    if own.__init__ is keras.Sequential.__init__:
        clone.__class__ = own  # Keras does so for functional models
    lost = [
        name
        for name in ("call", "compute_loss", "train_step")
        if getattr(type(clone), name) is not getattr(own, name)
    ]
    if lost:
        raise ValueError(
            f"A clone of {own.__name__}, which has a constructor of its own, "
            f"is a {type(clone).__name__} for Keras, without its {lost}. "
            "Expected: a class that leaves `__init__` to Keras, or a function "
            "that makes another such model (which scikit-learn's wrappers "
            f"take, too). Received: clone_model of {model!r}"
        )
    return clone


adapt_clones(VOTrainStep, _variational_clone)
