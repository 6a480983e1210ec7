"""The calls of layers whose activations are perturbed."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import tensorflow as tf

from keras_vo.perturbations import placement
from keras_vo.perturbations.calls import LayerCall

if TYPE_CHECKING:
    from keras_vo.perturbations.scope import Recording

__all__ = ["Claim", "kept"]


class Claim(NamedTuple):
    """A call of a layer whose activations are perturbed.

    Attributes:
        call: it.
        bias: its bias, if there is one that is searched over and has a number
            for each unit; `None`: none is perturbed.
        plain: what the layer computes in the mean network.
        outputs: m [batch, ..., units], the same.
        mask: which positions count, [batch, ...]; `None`: all.
        by_position: whether its positions have credit of their own.
    """

    call: LayerCall
    bias: Any
    plain: tf.Tensor
    outputs: tf.Tensor
    mask: Any
    by_position: bool = False

    @property
    def variables(self) -> list[Any]:
        """Those that are perturbed, the kernel first."""
        return [self.call.kernel] + [self.bias] * (self.bias is not None)


def kept(claims: Sequence[Claim], recording: Recording) -> list[Claim]:
    """All but automatic ones that can't be kept, or would not pay.

    Those that have credit by position are marked.

    Args:
        claims: in the order in which they were made.
        recording: of the mean network's pass, after it.
    """
    axes = recording.positions
    claims = [
        claim._replace(by_position=placement.has_positions(claim.outputs, axes))
        for claim in claims
    ]
    left = _worth_it(
        _without(claims, lambda c: placement.why_left(c, recording)), recording
    )
    if axes is not None and not any(claim.by_position for claim in left):
        placement.warn_of_no_positions(axes, [c.outputs for c in claims])
    return left


def _worth_it(claims: list[Claim], recording: Recording) -> list[Claim]:
    """Those that pay; of convolutions, as the optimizer chooses."""
    if recording.choice.convolutions == "auto":
        others = _without(claims, placement.why_no_convolution, announced=False)
        others = _paying(others, recording, announced=False)
        if placement.why_few(_covers(others, recording)) is None:
            claims = _without(claims, placement.why_no_convolution)
    return _paying(claims, recording)


def _paying(
    claims: list[Claim], recording: Recording, announced: bool = True
) -> list[Claim]:
    """Those that pay.

    If all weights can have noise on outputs, no member is needed that has
    noise on weights, which is worth some noise. Where such members are needed
    anyway, noise on few of the outputs makes theirs hardly less, and costs
    members of its own.
    """
    tolerant = functools.partial(
        placement.why_noisier, recording=recording, alone=True
    )
    strict = functools.partial(placement.why_noisier, recording=recording)
    alone = _without(claims, tolerant, announced=False)
    if _covers(alone, recording) == 1:
        return alone
    left = _without(claims, strict, announced)
    if recording.positions is not None or not all(
        claim.call.automatic for claim in left
    ):  # what the user wants of single layers
        return left
    share = _covers(left, recording)
    return _without(left, lambda _: placement.why_few(share), announced)


def _covers(claims: Sequence[Claim], recording: Recording) -> float:
    """The part of all weights that is perturbed by these."""
    covered = {id(v) for claim in claims for v in claim.variables}
    sizes = [(id(v), math.prod(v.shape)) for v in recording.variables]
    own = sum(size for key, size in sizes if key in covered)
    return own / max(1, sum(size for _, size in sizes))


def _without(
    claims: Sequence[Claim],
    why: Callable[[Claim], str | None],
    announced: bool = True,
) -> list[Claim]:
    """All but automatic claims that there is a reason against, and those of
    the same variables.
    """
    left: set[int] = set()
    for claim in claims:
        if claim.call.automatic and (reason := why(claim)) is not None:
            if announced:
                placement.announce(claim.call.name, reason)
            left.update(map(id, claim.variables))
    return [
        claim
        for claim in claims
        if not claim.call.automatic or left.isdisjoint(map(id, claim.variables))
    ]
