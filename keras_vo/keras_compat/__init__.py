"""What keras_vo uses of Keras beyond its public interface, all in one place.

Each name is here because Keras offers no public way to the same. Whether all
of them exist is checked when the package is imported, and so is the backend.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

__all__ = [
    "REDUCE",
    "SCALES",
    "Functional",
    "TrainerHooks",
    "adapt_clones",
    "build_metrics",
    "in_stateless_scope",
    "initial_epoch",
    "layers_of",
    "loss_module",
    "loss_tracker",
    "take_gradients_as_they_are",
    "unpickle",
    "uses_weight_decay",
]


def _check_backend(name: str) -> None:
    if name != "tensorflow":
        raise ImportError(
            "keras_vo works with the TensorFlow backend of Keras. Expected: "
            "the environment variable KERAS_BACKEND unset or 'tensorflow', "
            "and no other backend in keras.json. "
            f"Received: {name!r}"
        )


if "keras" not in sys.modules:  # before Keras imports another backend
    _check_backend(os.environ.get("KERAS_BACKEND") or "tensorflow")

try:
    import keras
except ImportError as error:  # of a backend that keras.json names, say
    raise ImportError(
        "keras_vo works with the TensorFlow backend of Keras. Expected: a "
        "Keras that can be imported with it (KERAS_BACKEND unset or "
        f"'tensorflow', no other backend in keras.json). Received: {error}"
    ) from error

_check_backend(keras.backend.backend())

# Nothing public says whether a `keras.StatelessScope` is entered.
from keras.src.backend.common.stateless_scope import (  # noqa: E402
    in_stateless_scope,
)
from keras.src.backend.tensorflow import trainer as _tf_trainer  # noqa: E402
from keras.src.losses import loss as loss_module  # noqa: E402
from keras.src.models import cloning as _cloning  # noqa: E402

# Keras does not export the class that functional models are instances of.
from keras.src.models.functional import Functional  # noqa: E402
from keras.src.trainers import compile_utils as _compile_utils  # noqa: E402
from keras.src.trainers import trainer as _trainer_module  # noqa: E402

_CLONERS = ("_clone_sequential_model", "_clone_functional_model")
SCALES = ("scale_loss_for_distribution", "unscale_loss_for_distribution")
REDUCE = "reduce_weighted_values"


def _check_names() -> None:
    """Raises unless Keras has all names that this module uses."""

    def assigns(cls: type, *names: str) -> list[str]:
        """Attributes that the constructor of `cls` does not assign."""
        # Of the class as it is: no subclass is asked.
        known = cls.__init__.__code__.co_names  # type: ignore[misc]
        return [f"{cls.__name__}.{n}" for n in names if n not in known]

    missing = [
        f"{owner.__name__}.{name}"
        for owner, names in (
            (keras.Model, ("_make_function", "_maybe_symbolic_build")),
            (keras.Model, ("_flatten_layers", "_unpickle_model")),
            (
                keras.optimizers.Optimizer,
                ("_all_reduce_sum_gradients", "_use_weight_decay"),
            ),
            (loss_module, (*SCALES, REDUCE)),
            (_cloning, _CLONERS),
        )
        for name in names
        if not hasattr(owner, name)
    ]
    missing += assigns(_tf_trainer.TFEpochIterator, "_distributed_dataset")
    missing += assigns(
        _trainer_module.Trainer,
        "_compile_loss",
        "_compile_metrics",
        "_loss_tracker",
        "_initial_epoch",
    )
    missing += assigns(_compile_utils.CompileLoss, "_flat_losses")
    if missing:
        raise ImportError(
            "keras_vo uses names of Keras that are not public. Expected: a "
            f"version of Keras that has {missing}, see `install_requires` of "
            f"keras_vo. Received: Keras {keras.__version__}"
        )


_check_names()

if TYPE_CHECKING:  # what mixins are mixed into is as untyped as Keras
    from typing import Any as _Model
else:
    _Model = object


class TrainerHooks(_Model):
    """Mixin: two methods that `fit` goes through, given names."""

    def make_step_function(
        self, make: Callable[[Any], Any], step: Callable[[Any], Any]
    ) -> Any:
        """The function that is called for a step; `make` is Keras's way."""
        return make(step)

    def build_from_data(
        self, build: Callable[..., None], iterator: Any, data_batch: Any
    ) -> None:
        """Builds the model from the first batch; `build` is Keras's way."""
        build(iterator, data_batch)

    def _make_function(self, step: Callable[[Any], Any]) -> Any:
        return self.make_step_function(super()._make_function, step)

    def _maybe_symbolic_build(
        self, iterator: Any = None, data_batch: Any = None
    ) -> None:
        self.build_from_data(
            super()._maybe_symbolic_build, iterator, data_batch
        )


def layers_of(model: Any) -> list[Any]:
    """The model itself and all layers in it, those inside of layers too."""
    return list(model._flatten_layers())


def parts_of(model: Any) -> list[Any]:
    """What a compiled function of a model depends on: each is another object
    where the model has been changed, or compiled again.
    """
    compiled = getattr(model, "_compile_config", None)
    return [
        *layers_of(model),
        *model.trainable_variables,
        *model.non_trainable_variables,
        compiled,
    ]


def build_metrics(
    model: Any,
    iterator: Any,
    data_batch: Any,
    steps: Mapping[str, tuple[Any, ...]],
) -> None:
    """Builds compiled metrics, if the shapes of their arguments are known.

    They are for functional models of one output, whose `call` and
    `compute_metrics` are Keras's own, and if no other step than `steps` gives
    them other labels than the data's.

    Args:
        model: a compiled Keras model.
        iterator: of `fit`, with the data's specification.
        data_batch: if there is no iterator, a batch: (x, y, sample_weight).
        steps: the functions that may be the model's methods, by name.
    """
    metrics = model._compile_metrics
    outputs = getattr(model, "outputs", None) or []
    functions = {
        "call": (Functional.call, keras.Sequential.call),
        "compute_metrics": (keras.Model.compute_metrics,),
        **steps,
    }
    if (
        metrics is None
        or metrics.built
        or len(outputs) != 1
        or any(
            getattr(getattr(model, name), "__func__", None) not in own
            for name, own in functions.items()
        )
    ):
        return
    if iterator is not None:
        dataset = iterator._distributed_dataset
        data_batch = getattr(dataset, "element_spec", None)
    _, y, _ = keras.utils.unpack_x_y_sample_weight(data_batch)
    shape = getattr(y, "shape", None)
    if shape is None or getattr(shape, "rank", 0) is None:
        return
    # Which accuracy is meant depends on ranks and last axes, on no type.
    y, axes = keras.KerasTensor(shape), (*shape[1:], *outputs[0].shape[-1:])
    if None not in axes:
        metrics.build(y, outputs[0])


def loss_tracker(model: Any) -> Any:
    """The metric of the loss: the user may have one that is called "loss"."""
    return model._loss_tracker


def initial_epoch(model: Any) -> Any:
    """Where a BackupAndRestore lets `fit` begin; `None`: no one does."""
    return model._initial_epoch


def unpickle(model_class: Any) -> Any:
    """What makes a model of what pickling has made of one."""
    return model_class._unpickle_model


def adapt_clones(model_class: type, adapt: Callable[[Any, Any], Any]) -> None:
    """Lets `keras.models.clone_model` return what `adapt` makes of a clone.

    It makes a plain Sequential of a subclass's instance. Others of Keras
    import it by name: what it calls is wrapped.

    Args:
        model_class: of whose instances clones are adapted.
        adapt: from a Sequential or functional model and its clone, which is
            compiled as it is, to what is returned for it.
    """

    def adapted(make: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(make)
        def clone_of(model: Any, *args: Any, **kwargs: Any) -> Any:
            clone = make(model, *args, **kwargs)
            ours = isinstance(model, model_class)
            return adapt(model, clone) if ours else clone

        return clone_of

    for name in _CLONERS:
        setattr(_cloning, name, adapted(getattr(_cloning, name)))


def take_gradients_as_they_are(optimizer: Any) -> None:
    """Lets a Keras optimizer apply gradients without summing over replicas.

    In a replica it would add up those of all replicas, though each has the
    whole gradient.
    """
    optimizer._all_reduce_sum_gradients = list


def uses_weight_decay(optimizer: Any, variable: Any) -> bool:
    """Whether weight decay of a Keras optimizer acts on a variable."""
    if isinstance(variable, keras.Variable):
        variable = variable.value  # as in Keras, which looks at its name
    return bool(optimizer._use_weight_decay(variable))
