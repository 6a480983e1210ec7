"""Whether a model is trained already.

Every layer of Keras says what its weights began as: `bias_initializer` is of
`bias`, `gamma_initializer` of `gamma`, and so on. A layer is trained if any of
its weights that begin as a constant (biases, and the scales and statistics of
a normalization) is something else. A layer that has only others is trained if
its initializers, which have a seed, do not draw them once more. (The weights
of a new network may have been copied or loaded, so that this would be a poor
sign for layers that have the other one.)

A model is trained if all of its layers are: one with a new last layer knows
nothing yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_vo.keras_compat import layers_of

__all__ = ["is_trained"]

_SUFFIX = "_initializer"
_CONSTANTS = (
    keras.initializers.Zeros,
    keras.initializers.Ones,
    keras.initializers.Constant,
)


def is_trained(model: Any) -> bool:
    """Whether all layers that have trainable weights are trained already.

    Those that say nothing of their weights do not count.

    Args:
        model: a Keras model whose weights exist.
    """
    signs = [_is_trained_layer(layer) for layer in layers_of(model)]
    known = [sign for sign in signs if sign is not None]
    return bool(known) and all(known)


def _is_trained_layer(layer: Any) -> bool | None:
    """The same of one layer, without those in it; `None`: it says nothing."""
    if not layer.trainable_variables:
        return None
    constant, drawn = [], []
    for variable, initializer in _initialized(layer):
        if isinstance(initializer, _CONSTANTS):
            constant.append(_has_moved(variable, initializer))
        elif isinstance(getattr(initializer, "seed", None), int):
            drawn.append((variable, initializer))
    if constant:
        return any(constant)
    if drawn:
        return not any(_is_drawn(*pair) for pair in drawn)
    return None


def _initialized(layer: Any) -> Iterator[tuple[Any, Any]]:
    """Its own variables with their initializers."""
    for name in dir(layer):
        if name.endswith(_SUFFIX) and not name.startswith("_"):
            variable = getattr(layer, name.removesuffix(_SUFFIX), None)
            if isinstance(variable, keras.Variable):
                yield variable, getattr(layer, name)


def _has_moved(variable: Any, initializer: Any) -> bool:
    """Whether it is not the constant; an LSTM's bias begins as 0 and 1."""
    value = _numpy(variable)
    begun = _numpy(initializer(value.shape, variable.dtype))
    return bool(np.any((value != begun) & (value != 0) & (value != 1)))


def _is_drawn(variable: Any, initializer: Any) -> bool:
    """Whether the initializer draws it once more."""
    drawn = initializer(tuple(variable.shape), variable.dtype)
    return np.array_equal(_numpy(drawn), _numpy(variable))


def _numpy(value: Any) -> Any:
    return tf.convert_to_tensor(value).numpy()
