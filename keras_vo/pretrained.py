"""Which layers of a model are trained already.

Every layer of Keras says what its weights began as: `bias_initializer` is of
`bias`, `gamma_initializer` of `gamma`, and so on. So a layer is trained if any
of its weights that begin as a constant (biases, and the scales and statistics
of a normalization) is something else. For one that has only weights of other
kinds there is a second sign: an initializer with a seed draws what it drew
before. But the weights of a new network may have been copied or loaded, so
that alone says something only where no layer has a constant to begin with,
and none still has what its initializer draws.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from keras_vo.keras_compat import layers_of

__all__ = ["trained_weights"]

_SUFFIX = "_initializer"
_CONSTANTS = (
    keras.initializers.Zeros,
    keras.initializers.Ones,
    keras.initializers.Constant,
)


def trained_weights(model: Any) -> list[Any]:
    """The trainable weights of the layers that are trained already.

    Args:
        model: a Keras model whose weights exist.
    """
    layers = [layer for layer in layers_of(model) if _own(layer)]
    moved: dict[int, bool] = {}
    for index, layer in enumerate(layers):
        signs = [
            _moved(variable, initializer)
            for variable, initializer in _initialized(layer)
            if isinstance(initializer, _CONSTANTS)
        ]
        if signs:
            moved[index] = any(signs)
    if moved and not any(moved.values()):
        return []
    others = {
        index: _is_drawn_no_more(layer)
        for index, layer in enumerate(layers)
        if index not in moved
    }
    if not moved and not all(others.values()):
        return []
    trained = moved | others
    return [
        v for i, layer in enumerate(layers) if trained[i] for v in _own(layer)
    ]


def _own(layer: Any) -> list[Any]:
    """Its trainable weights, but those of layers in it."""
    inner = {id(v) for part in layers_of(layer)[1:] for v in part.variables}
    return [v for v in layer.trainable_variables if id(v) not in inner]


def _initialized(layer: Any) -> Iterator[tuple[Any, Any]]:
    """Its variables with their initializers."""
    for name in dir(layer):
        if name.endswith(_SUFFIX) and not name.startswith("_"):
            variable = getattr(layer, name.removesuffix(_SUFFIX), None)
            if isinstance(variable, keras.Variable):
                yield variable, getattr(layer, name)


def _moved(variable: Any, initializer: Any) -> bool:
    """Whether it is not the constant; an LSTM's bias begins as 0 and 1."""
    value = keras.ops.convert_to_numpy(variable)
    begun = keras.ops.convert_to_numpy(initializer(value.shape, variable.dtype))
    return bool(np.any((value != begun) & (value != 0) & (value != 1)))


def _is_drawn_no_more(layer: Any) -> bool:
    """Whether initializers that can draw a weight once more draw another."""
    return all(
        bool(
            keras.ops.any(
                keras.ops.not_equal(
                    initializer(tuple(variable.shape), variable.dtype), variable
                )
            )
        )
        for variable, initializer in _initialized(layer)
        if isinstance(getattr(initializer, "seed", None), int)
    )
