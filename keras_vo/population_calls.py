"""A Keras model evaluated for all members of a population at once."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_vo.evaluation.vectorized import quiet_tensorflow
from keras_vo.keras_compat import parts_of
from keras_vo.member_weights import Weight
from keras_vo.population import Population

__all__ = ["function_of", "population_call"]

# Weights that are there at once; a larger population goes by chunks.
_MOST_BYTES = 2**28


class _Kept(NamedTuple):
    """A compiled function, and what its model was made of."""

    parts: list[Any]
    function: Callable[..., Any]


_functions: weakref.WeakKeyDictionary[Any, dict[bool, _Kept]] = (
    weakref.WeakKeyDictionary()
)


def population_call(
    model: Any,
    population: Population,
    inputs: Any,
    shared_inputs: bool = True,
) -> Any:
    """What a model returns with the weights of each member, in inference.

    It is one compiled function of the weights, vectorized over the members,
    and is traced once for a model and the shapes of its inputs: not again in
    the next generation. Where layers are added or replaced it is another one;
    after a change inside of a layer (`layer.activation = ...`), compile the
    model again, as for its `predict`.

    Args:
        model: a Keras model; compiled or not, of whatever optimizer.
        population: from `ask` for `model.trainable_variables`. Weights that
            are not trained, and states, are those that the model has.
        inputs: of the model, in its structure: arrays or tensors (a list is
            the structure of several inputs, not rows of one). With
            `shared_inputs` [batch, ...], the same for all members; else [N,
            batch, ...], those of member n at n.
        shared_inputs: which of both.

    Returns:
        The outputs [N, batch, ...], in their structure, as tensors.

    Raises:
        TypeError: `model` is no Keras model, or `population` none of `ask`.
        ValueError: the population is that of other variables, or `inputs` do
            not have a first axis of its size.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(
            "Expected a Keras model: `population_call(model, population, "
            f"inputs)`. Received: {model!r:.80} of type {type(model)}"
        )
    if not isinstance(population, Population):
        raise TypeError(
            "Expected a population that `ask` returned: `population_call("
            f"model, population, inputs)`. Received: {population!r:.80} of "
            f"type {type(population)}"
        )
    inputs = keras.tree.map_structure(tf.convert_to_tensor, inputs)
    if not shared_inputs:
        _check_first_axis(inputs, len(population))
    if not model.built:
        model(
            inputs
            if shared_inputs
            else keras.tree.map_structure(lambda x: x[0], inputs)
        )
    _check_variables(model, population)
    function = function_of(model, shared_inputs)
    size = max(_MOST_BYTES // max(population.bytes_each, 1), 1)
    if size >= len(population):
        return function(population.kept_tensors(), inputs)
    chunks = []
    for first in range(0, len(population), size):
        members = range(first, min(first + size, len(population)))
        own = inputs
        if not shared_inputs:
            own = keras.tree.map_structure(
                lambda x, rows=members: x[rows.start : rows.stop], inputs
            )
        chunks.append(function(population.tensors(members), own))
    return keras.tree.map_structure(lambda *x: tf.concat(x, 0), *chunks)


def function_of(model: Any, shared_inputs: bool) -> Callable[..., Any]:
    """From weights [n, ...] and inputs to outputs [n, batch, ...]."""
    parts = parts_of(model)
    functions = _functions.setdefault(model, {})
    kept = functions.get(shared_inputs)
    if kept is None or not _are(kept.parts, parts):
        kept = _Kept(
            [None if part is None else weakref.ref(part) for part in parts],
            _traceable(weakref.ref(model), shared_inputs),
        )
        functions[shared_inputs] = kept
    return kept.function


def _are(references: Sequence[Any], parts: Sequence[Any]) -> bool:
    """Whether these references are to these objects."""
    return len(references) == len(parts) and all(
        part is (reference and reference())
        for reference, part in zip(references, parts, strict=True)
    )


def _traceable(model: Any, shared_inputs: bool) -> Callable[..., Any]:
    """See `function_of`; of a reference, so that no model is kept alive."""

    def member(weights: Sequence[tf.Tensor], inputs: Any) -> Any:
        network = model()
        states = [
            tf.convert_to_tensor(v) for v in network.non_trainable_variables
        ]
        outputs, _ = network.stateless_call(
            list(weights), states, inputs, **_inference(network)
        )
        return outputs

    @tf.function(reduce_retracing=True, autograph=False)
    def call(weights: Sequence[tf.Tensor], inputs: Any) -> Any:
        with quiet_tensorflow():
            if shared_inputs:
                return tf.vectorized_map(lambda w: member(w, inputs), weights)
            return tf.vectorized_map(
                lambda both: member(*both), (weights, inputs)
            )

    return call


def _check_variables(model: Any, population: Population) -> None:
    here = [Weight.of(v) for v in model.trainable_variables]
    asked = population.weights
    if list(map(_kind, here)) != list(map(_kind, asked)):
        raise ValueError(
            "Expected a population of the model's trainable variables, "
            f"{[(w.name, w.shape) for w in here]}. Received: one of "
            f"{[(w.name, w.shape) for w in asked]}"
        )


def _inference(model: Any) -> dict[str, bool]:
    """What a model is called with, if its `call` takes it."""
    takes = "training" in inspect.signature(model.call).parameters
    return {"training": False} if takes else {}


def _kind(weight: Weight) -> tuple[Any, ...]:
    return weight.shape, weight.dtype


def _check_first_axis(inputs: Any, size: int) -> None:
    shapes = [tuple(x.shape) for x in keras.tree.flatten(inputs)]
    if any(not shape or shape[0] != size for shape in shapes):
        raise ValueError(
            f"Expected inputs [{size}, batch, ...] of a population of {size} "
            "members, or `shared_inputs=True`. Received: inputs of the shapes "
            f"{shapes}"
        )
