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
from keras_vo.keras_compat.losses import mask_of
from keras_vo.perturbations import claims as claims_lib
from keras_vo.perturbations import graph_ops, placement
from keras_vo.perturbations.base import (
    Perturbation,
    Space,
    VariableGradient,
)
from keras_vo.perturbations.calls import (
    ConvCall,
    DenseCall,
    EinsumCall,
    LayerCall,
    LookupCall,
    ScaleCall,
)
from keras_vo.perturbations.claims import Claim
from keras_vo.search.chunks import Noise
from keras_vo.search.credit import EXAMPLE, Rows
from keras_vo.search.local_reparameterization import (
    ActivationNoise,
    column_squares,
)

if TYPE_CHECKING:
    from keras_vo.perturbations.scope import Evaluation, Recording

__all__ = ["LocalReparam"]


class _State(NamedTuple):
    """The noise of a member, with its sign, and the records of its calls."""

    noise: list[tf.Tensor]
    records: list[tuple[tf.Tensor, ...]]


class LocalReparam(Perturbation):
    """Noise on the activations of layers that are linear in a kernel."""

    name = "local_reparam"
    level = EXAMPLE
    automatic = (DenseCall, EinsumCall, ConvCall, LookupCall, ScaleCall)

    def __init__(self, claims: Sequence[Claim], space: Space) -> None:
        gaussian = space.gaussian
        self._claims = claims
        self._probe = space.probe
        self._shapes = gaussian.layout.shapes
        self._adapts = space.adapts
        self._sites = []
        for call, bias, _, outputs, mask, _ in claims:
            kernel = space.positions[id(call.kernel)]
            weights, variances = (
                [kernel],
                [call.matrix(gaussian.variances[kernel])],
            )
            if bias is not None:
                weights.append(space.positions[id(bias)])
                variance = gaussian.variances[weights[1]]
                flat = tf.reshape(variance, [-1] * bool(variance.shape.rank))
                variances.append(flat)
            noise = ActivationNoise(
                call.operand,
                call.arranged,
                outputs.shape[-1],
                variances,
                space.adapts,
                mask,
            )
            self._sites.append((weights, noise))
        self.variables = sorted({i for ids, _ in self._sites for i in ids})
        self.activations = tuple(claim.outputs for claim in claims)
        self._kernels = {id(claim.call.kernel) for claim in claims}
        self._dtype = gaussian.layout.dtype

    @classmethod
    def record(cls, call: LayerCall, recording: Recording) -> Any:
        """Claims the call, unless it is one that can't be perturbed.

        Then it is left as it is if it is automatic.

        Raises:
            ValueError: it is not, and the call is in a loop, in a function of
                `tf.function` or in the loss, or a regularizer would read the
                layer's weights, or a constraint project them.
        """
        bias = call.bias_of_units
        bias = bias if bias is not None and recording.searches(bias) else None
        if call.automatic:
            reason = placement.why_not(call, bias, recording)
            if reason is not None:
                recording.leave(call, reason)
                placement.announce(call.name, reason)
                return None
        else:
            placement.check_place(call, recording)
            placement.check_weights(call.name, [call.kernel, bias])
        plain = call.plain()
        outputs = call.flatten(plain)
        # What an automatic call computes where a mask is may be read by a
        # layer that knows of no masks.
        mask = None if call.automatic else mask_of(call.inputs)
        if mask is not None and mask.shape.rank != outputs.shape.rank - 1:
            mask = None
        claim = Claim(call, bias, plain, outputs, mask)
        recording.claim(cls.name, claim, claim)
        return plain

    @classmethod
    def mixed(
        cls, claims: Sequence[Any], ancestors: set[int] | None
    ) -> list[LayerCall]:
        return [
            claim.call
            for claim in claims
            if claim.call.automatic
            and (ancestors is None or id(claim.plain.op) in ancestors)
        ]

    @classmethod
    def settled(cls, claims: Sequence[Any], recording: Recording) -> list[Any]:
        """All but automatic ones that can't be kept, or would not pay."""
        return claims_lib.kept(claims, recording)

    @classmethod
    def fans(cls, claims: Sequence[Any]) -> list[tuple[list[Any], int]]:
        return [(claim.variables, claim.call.fan_in) for claim in claims]

    @classmethod
    def check_batch(cls, claims: Sequence[Any], inputs: tf.Tensor) -> None:
        """Checks that each call had the examples along its first axis."""
        for claim in claims:
            checks.check_batch(
                claim.outputs,
                inputs,
                f"Layer {claim.call.name!r}, which is locally reparameterized, "
                "must be called with the examples along the first axis.",
            )

    def activation_bytes(self, signs: int) -> Any:
        numbers: Any = 0
        for claim, (_, site) in zip(self._claims, self._sites, strict=True):
            size = _size(claim.outputs)
            numbers += size + signs * (3 * size + _size(site.inputs))
        return numbers * self._dtype.size

    def member(
        self, noise: Noise, sign: float
    ) -> tuple[Mapping[int, tf.Tensor], Any]:
        return {}, _State([sign * xi for xi in noise.activations], [])

    def call(
        self, call: LayerCall, state: _State, evaluation: Evaluation
    ) -> Any:
        """Z = m + sqrt(v) xi; leaves what the score needs."""
        if call.automatic and id(call.kernel) not in self._kernels:
            return None
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
            outputs = call.flatten(call.plain())
            inputs = site.prepared(call.arranged)
            variance = site.variance_of(inputs)
            state.records.append((inputs, variance))
        else:  # m and v are the mean network's, the same for every member
            state.records.append(())
        noise = tf.cast(tf.sqrt(variance) * xi, outputs.dtype)
        return call.restore(outputs + noise)

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
            "Layers that are locally reparameterized must be called as often, "
            "and in the same order, by a perturbed model as by the mean "
            "network. Expected: "
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
            terms = iter(site.sums(xi, record, self._credit(number, rows)))
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

    def _credit(self, number: int, rows: Rows) -> Rows:
        """`rows` with the utilities of one call: those of its positions, if
        they are the loss's.
        """
        claim, positions = self._claims[number], rows.positions
        if not claim.by_position or positions is None:
            return rows
        axes = positions.shape[3:]
        if claim.outputs.shape[1:-1].is_fully_defined() and (
            axes.is_fully_defined()
        ):
            return rows._replace(utilities=positions)
        own = tf.shape(claim.outputs)[1:-1]

        def by_example() -> tf.Tensor:
            ones = [1] * axes.rank
            shape = tf.concat([tf.shape(rows.utilities), ones], axis=0)
            repeated = tf.reshape(rows.utilities, shape)
            shape = tf.concat([tf.shape(rows.utilities), own], axis=0)
            return tf.broadcast_to(repeated, shape)

        utilities = tf.cond(
            tf.reduce_all(own == tf.shape(positions)[3:]),
            lambda: positions,
            by_example,
        )
        return rows._replace(utilities=utilities)

    def _squares(self, noise: Noise, records: Any, rows: Rows) -> tf.Tensor:
        """Of one column of each variable and direction."""
        columns: dict[int, list[tf.Tensor]] = {}
        units: dict[int, tuple[tf.Tensor, int]] = {}
        scales: dict[int, tf.Tensor] = {}
        for number, ((weights, site), xi, record) in enumerate(
            zip(self._sites, noise.activations, records, strict=True)
        ):
            claim, credit = self._claims[number], self._credit(number, rows)
            unit = tf.math.floormod(rows.ids, xi.shape[-1])
            parts = site.columns(xi, record, credit.utilities, unit)
            for i, column in zip(weights, parts, strict=True):
                # Squares are asked for where there is a probe only.
                scale = self._probe.scales[i]  # type: ignore[union-attr]
                if scale.shape.rank:
                    if i == weights[0]:
                        scale = claim.call.matrix(scale)
                    scale = tf.reshape(scale, [-1, xi.shape[-1]])
                columns.setdefault(i, []).append(column)
                units[i], scales[i] = (unit, xi.shape[-1]), scale
        terms = []
        for i, parts in columns.items():
            (unit, count), scale = units[i], scales[i]
            if scale.shape.rank:  # to [chunk, in] or [chunk, 1]
                scale = tf.transpose(tf.gather(scale, unit, axis=1))
            terms.append(column_squares(scale * tf.add_n(parts), count))
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
                values = [sums[f"mean/{number}/{i}"]]
                # Not there of single weights where sigma is fixed.
                values.append(sums.get(f"fisher/{number}/{i}", count))
                if self._adapts:
                    values.append(sums[f"log_variance/{number}/{i}"])
                mean, fisher, *beta = (
                    self._like_variable(number, i, scale * v) for v in values
                )
                yield VariableGradient(
                    i, mean, beta[0] if beta else None, fisher
                )

    def _like_variable(
        self, number: int, index: int, values: tf.Tensor
    ) -> tf.Tensor:
        """Values of one variable of a call in its shape; a scalar as it is."""
        if values.shape.rank == 0:
            return values
        if index == self._sites[number][0][0]:
            return self._claims[number].call.unmatrix(values)
        return tf.reshape(values, self._shapes[index])


def _size(tensor: tf.Tensor) -> Any:
    if tensor.shape.is_fully_defined():
        return math.prod(tensor.shape)
    return tf.size(tensor, tf.int64)
