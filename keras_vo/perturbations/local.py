"""Local reparameterization: noise on the activations of a layer.

Z = m + sqrt(v) xi with m and v of `keras_vo.search.local_reparameterization`,
which has the equations and their sources. A and v are those of the same
member: they depend on its noise in earlier layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import tensorflow as tf

from keras_vo import checks
from keras_vo.constraints import constraint_of
from keras_vo.keras_compat.losses import mask_of
from keras_vo.perturbations import graph_ops
from keras_vo.perturbations.base import (
    DenseCall,
    Perturbation,
    Space,
    VariableGradient,
)
from keras_vo.perturbations.scope import current_graph
from keras_vo.search.chunks import Noise
from keras_vo.search.credit import EXAMPLE, Rows
from keras_vo.search.local_reparameterization import (
    ActivationNoise,
    column_squares,
)

if TYPE_CHECKING:
    from keras_vo.perturbations.scope import Evaluation, Recording

__all__ = ["LocalReparam"]


class _Claim(NamedTuple):
    """A call of a layer whose activations are perturbed.

    Attributes:
        call: its kernel and bias are searched over; no bias: `None`.
        outputs: m [batch, ..., units] in the mean network.
        mask: which positions count, [batch, ...]; `None`: all.
    """

    call: DenseCall
    outputs: tf.Tensor
    mask: Any


class _State(NamedTuple):
    """The noise of a member, with its sign, and the records of its calls."""

    noise: list[tf.Tensor]
    records: list[tuple[tf.Tensor, ...]]


class LocalReparam(Perturbation):
    """Noise on the activations of `LocalReparamDense`."""

    name = "local_reparam"
    level = EXAMPLE

    def __init__(self, claims: Sequence[_Claim], space: Space) -> None:
        gaussian = space.gaussian
        self._claims = claims
        self._probe = space.probe
        self._shapes = gaussian.layout.shapes
        self._adapts = space.adapts
        self._sites = []
        for call, _, mask in claims:
            weights = [
                space.positions[id(v)]
                for v in (call.kernel, call.bias)
                if v is not None
            ]
            noise = ActivationNoise(
                call.inputs,
                self._shapes[weights[0]][-1],
                [gaussian.variances[i] for i in weights],
                space.adapts,
                mask,
            )
            self._sites.append((weights, noise))
        self.variables = sorted({i for ids, _ in self._sites for i in ids})
        self.activations = tuple(claim.outputs for claim in claims)
        self._dtype = gaussian.layout.dtype

    @classmethod
    def record(cls, call: DenseCall, recording: Recording) -> tf.Tensor:
        """Claims the call, unless it is one that can't be perturbed.

        Raises:
            ValueError: the call is in a loop, in a function of `tf.function`
                or in the loss, or a regularizer would read the layer's
                weights, or a constraint project them.
        """
        if not recording.in_call:
            raise ValueError(
                f"Layer {call.name!r}, a LocalReparamDense, must be called by "
                "the model's `call`. Expected: Dense or LowRankDense where "
                "only the loss calls a layer. Received: a call by "
                "`compute_loss`"
            )
        if (
            current_graph() is not recording.graph
            or graph_ops.is_in_vectorized_loop(call.inputs)
        ):
            raise ValueError(
                f"Layer {call.name!r}, a LocalReparamDense, is called in a "
                "loop (a recurrent cell, TimeDistributed, tf.while_loop, "
                "vectorized_map) or in a function of `tf.function`. Expected: "
                "a call with all positions at once, as Dense has for inputs "
                "of rank 3 and higher, in a `call` that is not decorated "
                "(`fit` compiles it), or noise of another kind, LowRankDense "
                "or Dense. Received: a call in a graph of its own"
            )
        bias = call.bias
        bias = bias if bias is not None and recording.searches(bias) else None
        _check_weights(call.name, [call.kernel, bias])
        mask = mask_of(call.inputs)
        if mask is not None and mask.shape.rank != call.inputs.shape.rank - 1:
            mask = None
        outputs = call.plain()
        searched = DenseCall(call.name, call.kernel, bias, call.inputs)
        recording.claim(cls.name, searched, _Claim(searched, outputs, mask))
        return outputs

    @classmethod
    def check_batch(cls, claims: Sequence[Any], inputs: tf.Tensor) -> None:
        """Checks that each call had the examples along its first axis."""
        for claim in claims:
            checks.check_batch(
                claim.outputs,
                inputs,
                f"Layer {claim.call.name!r}, a LocalReparamDense, must be "
                "called with the examples along the first axis.",
            )

    def activation_bytes(self, signs: int) -> Any:
        numbers: Any = 0
        for call, outputs, _ in self._claims:
            size = _size(outputs)
            numbers += size + signs * (3 * size + _size(call.inputs))
        return numbers * self._dtype.size

    def member(
        self, noise: Noise, sign: float
    ) -> tuple[Mapping[int, tf.Tensor], Any]:
        return {}, _State([sign * xi for xi in noise.activations], [])

    def call(
        self, call: DenseCall, state: _State, evaluation: Evaluation
    ) -> tf.Tensor:
        """Z = m + sqrt(v) xi; leaves what the score needs."""
        index = len(state.records)
        if (
            index == len(self._claims)
            or self._claims[index].call.kernel is not call.kernel
        ):
            self._raise_other_calls(f"{call.name!r} as call {index}")
        xi = state.noise[index]
        _, site = self._sites[index]
        outputs, variance = self._claims[index].outputs, site.variance
        if graph_ops.depends(call.inputs, evaluation.sources):
            outputs = call.plain()
            wide = tf.cast(call.inputs, xi.dtype)
            variance = site.variance_of(wide)
            state.records.append((wide, variance))
        else:  # m and v are the mean network's, the same for every member
            state.records.append(())
        return outputs + tf.cast(tf.sqrt(variance) * xi, outputs.dtype)

    def finish(self, state: _State) -> Any:
        """A and v of each claimed call, in the dtype of the noise.

        Empty for a call where they are those of the mean network.

        Raises:
            ValueError: not all of the claimed calls were made.
        """
        if len(state.records) < len(self._claims):
            self._raise_other_calls(f"{len(state.records)} calls")
        return tuple(state.records)

    def _raise_other_calls(self, received: str) -> None:
        raise ValueError(
            "A LocalReparamDense must be called as often, and in the same "
            "order, by a perturbed model as by the mean network. Expected: "
            f"{[claim.call.name for claim in self._claims]}, call by call. "
            f"Received: {received}"
        )

    def sums(
        self, noise: Noise, records: Any, rows: Rows
    ) -> dict[str, tf.Tensor]:
        sums = {}
        for number, ((weights, site), xi, record) in enumerate(
            zip(self._sites, noise.activations, records, strict=True)
        ):
            terms = iter(site.sums(xi, record, rows))
            for i in weights:
                sums[f"mean/{number}/{i}"] = next(terms)
                if self._adapts:
                    sums[f"log_variance/{number}/{i}"] = next(terms)
                    if not site.shared:
                        sums[f"fisher/{number}/{i}"] = next(terms)
        if rows.ids is not None and self._probe is not None:
            sums["squares"] = tf.cond(
                self._probe.looks_at_columns,
                lambda: self._squares(noise, records, rows),
                lambda: tf.constant(math.nan, rows.utilities.dtype),
            )
        return sums

    def _squares(self, noise: Noise, records: Any, rows: Rows) -> tf.Tensor:
        """Of one column of each variable and direction."""
        columns: dict[int, list[tf.Tensor]] = {}
        units: dict[int, tf.Tensor] = {}
        for (weights, site), xi, record in zip(
            self._sites, noise.activations, records, strict=True
        ):
            unit = tf.math.floormod(rows.ids, self._shapes[weights[0]][-1])
            parts = site.columns(xi, record, rows.utilities, unit)
            for i, column in zip(weights, parts, strict=True):
                columns.setdefault(i, []).append(column)
                units[i] = unit
        terms = []
        for i, parts in columns.items():
            # Squares are asked for where there is a probe only.
            scale = self._probe.scales[i]  # type: ignore[union-attr]
            if scale.shape.rank:
                # [in, units] or [units] to [chunk, in] or [chunk, 1]
                by_unit = tf.reshape(scale, [-1, scale.shape[-1]])
                scale = tf.transpose(tf.gather(by_unit, units[i], axis=1))
            column = scale * tf.add_n(parts)
            terms.append(column_squares(column, self._shapes[i][-1]))
        return tf.add_n(terms)

    def totals(self) -> dict[str, tf.Tensor]:
        # Kernel and bias perturb the same activations: half of it each.
        return {
            f"fisher/{number}/{i}": site.shared_fisher() / len(weights)
            for number, (weights, site) in enumerate(self._sites)
            if site.shared
            for i in weights
        }

    def gradient(
        self, sums: Mapping[str, tf.Tensor], count: tf.Tensor
    ) -> Iterator[VariableGradient]:
        scale = tf.math.reciprocal_no_nan(count)
        for number, (weights, _) in enumerate(self._sites):
            for i in weights:
                beta = None
                if self._adapts:
                    beta = scale * sums[f"log_variance/{number}/{i}"]
                mean = scale * sums[f"mean/{number}/{i}"]
                fisher = scale * sums[f"fisher/{number}/{i}"]
                yield VariableGradient(i, mean, beta, fisher)


def _check_weights(layer: str, weights: Sequence[Any]) -> None:
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


def _size(tensor: tf.Tensor) -> Any:
    if tensor.shape.is_fully_defined():
        return math.prod(tensor.shape)
    return tf.size(tensor, tf.int64)
