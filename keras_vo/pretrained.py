"""Whether a model is trained already.

Every layer of Keras says what its weights began as: `bias_initializer` is of
`bias`, `gamma_initializer` of `gamma`, and so on. Two things are asked.

*Is a layer new?* It is if its weights that begin as a constant (biases, and
the scales and statistics of a normalization) are that constant. A layer
without any is if its initializers, which have a seed, draw its weights once
more. (The weights of a new network may have been copied or loaded, so that
this is a poor sign for layers that have the other one.)

*Has the model learned much?* Weights that were drawn grow as it does: the root
mean square of some kernel is then another than that of a draw, by more than 5%
and than chance, 1.9 / sqrt(n) for n weights. Measured, of all kernels but one:
1.2 and more times as much once digits are right to 0.93 and MNIST to 0.99; 1.01
to 1.04 after one epoch of Adam on digits (0.45), or two steps of a search.
docs/decisions/0030-trained-weights.md has the table.

A model is trained if none of its layers is new and it has learned much: one
with a new last layer knows nothing yet.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_vo.keras_compat import layers_of

__all__ = ["is_trained"]

_SUFFIX = "_initializer"
# The quotient of two root mean squares over n normals has a standard deviation
# of 1 / sqrt(n), over n uniform numbers of 0.63 / sqrt(n).
_LEAST_GROWTH, _CHANCE = 0.05, 1.9
_CONSTANTS = (
    keras.initializers.Zeros,
    keras.initializers.Ones,
    keras.initializers.Constant,
)


def is_trained(model: Any) -> bool:
    """Whether no layer is new, and the model has learned much.

    Layers that say nothing of their weights do not count.

    Args:
        model: a Keras model whose weights exist.
    """
    layers = [x for x in layers_of(model) if x.trainable_variables]
    new = [sign for sign in map(_is_new, layers) if sign is not None]
    if not new or any(new):
        return False
    grown = [
        _has_grown(variable, initializer)
        for layer in layers
        for variable, initializer in _initialized(layer)
        if _is_seeded(initializer)
    ]
    return any(grown) or not grown


def _is_new(layer: Any) -> bool | None:
    """Whether a layer is, without those in it; `None`: it says nothing."""
    constant, drawn = [], []
    for variable, initializer in _initialized(layer):
        if isinstance(initializer, _CONSTANTS):
            constant.append(_has_moved(variable, initializer))
        elif _is_seeded(initializer):
            drawn.append((variable, initializer))
    if constant:
        return not any(constant)
    if drawn:
        return any(_is_drawn(*pair) for pair in drawn)
    return None


def _is_seeded(initializer: Any) -> bool:
    return isinstance(getattr(initializer, "seed", None), int)


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


def _has_grown(variable: Any, initializer: Any) -> bool:
    """Whether the size of its weights is no longer that of a draw."""
    drawn = _root_mean_square(initializer(tuple(variable.shape)))
    if drawn == 0:
        return False
    ratio = _root_mean_square(variable) / drawn
    chance = _CHANCE / math.sqrt(math.prod(variable.shape))
    return abs(ratio - 1) > max(_LEAST_GROWTH, chance)


def _root_mean_square(value: Any) -> float:
    wide = tf.cast(tf.convert_to_tensor(value), tf.float64)
    return float(tf.sqrt(tf.reduce_mean(tf.square(wide))))


def _numpy(value: Any) -> Any:
    return tf.convert_to_tensor(value).numpy()
