"""Where activations can be perturbed, and where not.

A layer that asks for it itself is an error where it can't be. One for which the
optimizer asks keeps noise on its weights there: if it is called in a loop, in a
`tf.function` or by the loss, has a regularizer or a constraint, if others read
its weights, its first axis is not that of the examples, or a BatchNormalization
is behind it. So it does if an example has more outputs than the kernel has
weights (twice as many where nothing else has noise on weights); and so do all
that have less than a tenth of all weights, but for credit by position.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import tensorflow as tf
from absl import logging as absl_logging

from keras_vo.constraints import constraint_of
from keras_vo.perturbations import graph_ops
from keras_vo.perturbations.calls import ConvCall, LayerCall
from keras_vo.perturbations.scope import current_graph

if TYPE_CHECKING:
    from keras_vo.perturbations.scope import Recording

__all__ = [
    "announce",
    "check_place",
    "check_weights",
    "has_positions",
    "warn_of_no_positions",
    "why_few",
    "why_left",
    "why_no_convolution",
    "why_noisier",
    "why_not",
]

# Outputs of an example for each weight of a kernel, at most. Measured:
# benchmarks/results/local_perturbation.md.
_MOST_OUTPUTS, _MOST_OUTPUTS_ALONE = 1, 2
# Of all weights, those that noise on activations has to perturb.
_LEAST_SHARE = 0.1
# Along axes whose size is not known when the step is traced.
_UNKNOWN_POSITIONS = 64

_announced: set[tuple[str, str]] = set()  # layers and reasons


def announce(layer: str, reason: str) -> None:
    """Says once that the optimizer's choice is not that of a layer."""
    if (layer, reason) not in _announced:
        _announced.add((layer, reason))
        absl_logging.info(
            "Layer %r keeps noise on its weights, not on its activations: %s.",
            layer,
            reason,
        )


def why_not(call: LayerCall, bias: Any, recording: Recording) -> str | None:
    """Why a call can't be perturbed; `None`: it can."""
    if not recording.in_call:
        return "the loss calls it"
    if _is_in_loop(call, recording):
        return "it is called in a loop or in a function of `tf.function`"
    for weight in (call.kernel, bias):
        if getattr(weight, "regularizer", None) is not None:
            return "its weights have a regularizer"
        if constraint_of(weight) is not None:
            return "its weights have a constraint"
    return None


def why_left(claim: Any, recording: Recording) -> str | None:
    """Why a claim is not kept after the mean network's pass; `None`: it is.

    Args:
        claim: with `variables`, the kernel first, and `outputs`
            [batch, ..., units].
        recording: of that pass.
    """
    for variable in claim.variables:
        if id(variable) in recording.left:
            return recording.left[id(variable)]
    return None


def why_noisier(
    claim: Any, recording: Recording, alone: bool = False
) -> str | None:
    """Why a claim would have more noise than its weights; `None`: it has not.

    The gradient of noise on outputs has a variance of their number (of those
    that are judged together), that of noise on weights has one of theirs. A
    scale always has more outputs.

    Args:
        claim: see `why_left`; with `by_position`.
        recording: of the mean network's pass.
        alone: whether to ask what is worth it if no member with noise on
            weights is needed then: somewhat more noise is, and that of scales.
    """
    if alone and len(claim.variables[0].shape) == 1:
        return None
    axes = claim.outputs.shape[1:-1]
    positions: Any = axes.num_elements()
    if claim.by_position:  # with later ones along the first axis alone
        positions = min(axes[0] or _UNKNOWN_POSITIONS, recording.horizon)
    elif positions is None:
        positions = _UNKNOWN_POSITIONS
    size = positions * claim.outputs.shape[-1]
    weights = claim.variables[0].shape.num_elements()
    most = _MOST_OUTPUTS_ALONE if alone else _MOST_OUTPUTS
    if size > most * weights:
        judged = "positions judged together have"
        judged = judged if claim.by_position else "an example has"
        return f"{judged} more of its outputs than it has weights"
    return None


def why_few(share: float) -> str | None:
    """Why noise on activations of this part of all weights does not pay."""
    if share < _LEAST_SHARE:
        return f"it would perturb {share:.0%} of all weights only"
    return None


def why_no_convolution(claim: Any) -> str | None:
    """Why a claim is not kept where those of other layers pay.

    The more outputs are perturbed at once, the less is known of each, so that
    what layers behind a convolution learn from is worse. Measured:
    benchmarks/results/local_perturbation.md.
    """
    if isinstance(claim.call, ConvCall):
        return "noise on the activations of other layers is better without"
    return None


def has_positions(outputs: tf.Tensor, axes: tf.TensorShape | None) -> bool:
    """Whether outputs [batch, ..., units] may have the axes of the loss.

    Where sizes are not known when the step is traced, each step compares them.

    Args:
        outputs: of a layer.
        axes: [batch, ...], those of the loss; `None`: positions have no
            credit of their own.
    """
    if axes is None:
        return False
    own = outputs.shape[1:-1]
    return own.rank > 0 and bool(own.is_compatible_with(axes[1:]))


def warn_of_no_positions(
    axes: tf.TensorShape, outputs: Sequence[tf.Tensor]
) -> None:
    """Warns that no layer is judged by position.

    Args:
        axes: of the loss.
        outputs: of the layers that could have had noise on them.
    """
    warnings.warn(
        'credit="position" changes nothing: no layer with noise on its '
        "activations has the axes of the loss. Expected: outputs "
        f"{[*_named(axes), 'units']}, of a layer that can have such noise "
        "(`absl.logging` says which can't, and why). Received: "
        f"{[_named(t.shape) for t in outputs]}",
        stacklevel=2,
    )


def _named(shape: tf.TensorShape) -> list[Any]:
    return ["batch", *shape[1:].as_list()]


def _is_in_loop(call: LayerCall, recording: Recording) -> bool:
    return (
        current_graph() is not recording.graph
        or graph_ops.is_in_vectorized_loop(call.inputs)
    )


def check_place(call: LayerCall, recording: Recording) -> None:
    """Raises where a call is not one that can be perturbed."""
    if not recording.in_call:
        raise ValueError(
            f"Layer {call.name!r}, a LocalReparamDense, must be called by "
            "the model's `call`. Expected: Dense or LowRankDense where "
            "only the loss calls a layer. Received: a call by "
            "`compute_loss`"
        )
    if _is_in_loop(call, recording):
        raise ValueError(
            f"Layer {call.name!r}, a LocalReparamDense, is called in a "
            "loop (a recurrent cell, TimeDistributed, tf.while_loop, "
            "vectorized_map) or in a function of `tf.function`. Expected: "
            "a call with all positions at once, as Dense has for inputs "
            "of rank 3 and higher, in a `call` that is not decorated "
            "(`fit` compiles it), or noise of another kind, LowRankDense "
            "or Dense. Received: a call in a graph of its own"
        )


def check_weights(layer: str, weights: Sequence[Any]) -> None:
    """Raises where the weights of members, which have none, would be read."""
    for weight in weights:
        if getattr(weight, "regularizer", None) is not None:
            raise ValueError(
                f"Layer {layer!r}, a LocalReparamDense, must have no "
                "regularizer of its weights: its activations are "
                "perturbed, not its weights, so that no search gradient "
                "would reach them. Expected: `weight_decay` of the inner "
                "optimizer instead. Received: "
                f"{weight.path!r} with {weight.regularizer!r}"
            )
        if constraint_of(weight) is not None:
            raise ValueError(
                f"Layer {layer!r}, a LocalReparamDense, must have no "
                "constraint of its weights: its activations are perturbed, "
                "and no member has weights that could satisfy it. Expected: "
                "LowRankDense or Dense for this layer, whose members' weights "
                "are projected. Received: "
                f"{weight.path!r} with {constraint_of(weight)!r}"
            )
