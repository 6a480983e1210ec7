"""What is told of a population, and what is reported of the step it made."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from keras_vo.search.importance_mixing import Mixed, Mixing

__all__ = ["Found", "Report", "checked_results"]

_EXPECTED = (
    "Expected the losses of a population of {size} members: {size} numbers, "
    "that of member i at place i; a dict from i to its loss; or pairs "
    "(i, loss), in any order. A missing one is None or NaN, or not there. "
    "Received: {received}"
)


class Found(NamedTuple):
    """What a step has found, as tensors: see `Report`."""

    losses: tf.Tensor
    updated: tf.Tensor
    kl: tf.Tensor
    gradient_snr: tf.Tensor
    mixed: Mixed | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Report:
    """What a step of the search has found.

    Where scores are maximised, losses are minus the scores.

    Attributes:
        generation: number of populations before this one.
        losses: the members' [N]; NaN where missing, inf where not finite. As
            the population, with `importance_mixing` they are the new ones.
        mean_loss: the mean of the finite ones, an estimate of the upper bound
            U. It includes members that are used once more.
        best_loss: the least of them.
        best_member: its index; `None`: no loss is finite.
        evaluations: number of members with a result.
        missing: number of those without.
        nonfinite: number of results that are not finite.
        sigma: standard deviation of the search distribution after the step,
            the root mean square over all weights.
        kl: KL divergence of the step in nats, from the old search
            distribution to the new one.
        gradient_snr: signal-to-noise ratio of the search gradient of mu: see
            `keras_vo.callbacks.SearchMonitor`. NaN if there are fewer than two
            directions.
        updated: whether mu and sigma have moved: not if less than two members
            (those that are used once more included) had a result, or none a
            finite one.
        mixing: what became of the last population, with `importance_mixing`
            (else `None`), as numbers.
    """

    generation: int
    losses: np.ndarray
    mean_loss: float
    best_loss: float
    best_member: int | None
    evaluations: int
    missing: int
    nonfinite: int
    sigma: float
    kl: float
    gradient_snr: float
    updated: bool
    mixing: Mixing | None = None

    @classmethod
    def of(cls, generation: int, found: Found, sigma: float) -> Report:
        """From what was found, with the new sigma."""
        losses = found.losses.numpy()
        every, mixing = losses[np.isfinite(losses)], None
        if found.mixed is not None:
            losses = losses[found.mixed.new.numpy()]
            mixing = Mixing(*(float(x) for x in found.mixed.mixing))
            mixing = mixing._replace(reused=int(mixing.reused))
        finite = np.isfinite(losses)
        missing = int(np.isnan(losses).sum())
        best = int(np.argmin(np.where(finite, losses, np.inf)))
        updated = bool(found.updated)
        return cls(
            generation,
            losses,
            float(every.mean(dtype=np.float64)) if len(every) else np.nan,
            float(losses[best]) if finite.any() else np.nan,
            best if finite.any() else None,
            len(losses) - missing,
            missing,
            int(np.isinf(losses).sum()),
            sigma,
            float(found.kl),
            float(found.gradient_snr) if updated else np.nan,
            updated,
            mixing,
        )


def checked_results(losses: Any, size: int) -> np.ndarray:
    """The members' losses as an array [N]; NaN where missing.

    Args:
        losses: N numbers, a mapping from indices to them, or pairs.
        size: N.

    Returns:
        An array of the widest dtype that they come in, float32 or float64.

    Raises:
        ValueError: they do not fit the population, or a member is there twice.
        TypeError: one is no number.
    """
    if isinstance(losses, Mapping) or hasattr(losses, "items"):  # a Series
        return _placed(list(losses.items()), size)
    if not isinstance(losses, (list, tuple)):
        losses = _listed(losses, size)
    if isinstance(losses, np.ndarray):
        return _checked_array(losses, size)
    if losses and all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in losses
    ):
        return _placed(losses, size)
    if len(losses) != size:
        raise _unfit(size, f"{len(losses)} of them")
    return _placed(list(enumerate(losses)), size)


def _listed(losses: Any, size: int) -> Any:
    """An array, or a list of what `losses` yields."""
    if isinstance(losses, (str, bytes, Set)) or losses is None:
        raise _unfit(size, repr(losses))
    if np.ma.isMaskedArray(losses):
        wide = np.result_type(losses.dtype, np.float32)
        return np.ma.filled(losses.astype(wide), np.nan)
    if hasattr(losses, "__array__"):
        array = np.asarray(losses)
        return array.tolist() if array.dtype == object else array
    if isinstance(losses, Iterable):
        return list(losses)
    raise _unfit(size, repr(losses))


def _checked_array(losses: np.ndarray, size: int) -> np.ndarray:
    if losses.dtype.name == "bfloat16":
        losses = losses.astype(np.float32)
    if losses.shape != (size,):
        raise _unfit(size, f"an array of shape {losses.shape}")
    if losses.dtype.kind not in "biuf":
        raise TypeError(_message(size, f"an array of dtype {losses.dtype}"))
    wide = losses.dtype.kind != "f" or losses.dtype.itemsize > 4
    return losses.astype(np.float64 if wide else np.float32)


def _placed(pairs: Sequence[Any], size: int) -> np.ndarray:
    """The losses of (index, loss) pairs, at their places."""
    values: dict[int, np.ndarray] = {}
    for index, loss in pairs:
        whole = isinstance(index, numbers.Integral)
        whole = whole and not isinstance(index, bool)
        if not whole or index not in range(size):
            raise _unfit(size, f"a loss of member {index!r}")
        if int(index) in values:
            raise _unfit(size, f"two losses of member {index}")
        values[int(index)] = _number(loss, int(index), size)
    known = [value.dtype for value in values.values()]
    placed = np.full(size, np.nan, np.result_type(np.float32, *known))
    for index, value in values.items():
        placed[index] = value
    return placed


def _number(loss: Any, index: int, size: int) -> np.ndarray:
    """One loss as a scalar array; NaN if it is `None`, in no wider dtype."""
    if loss is None or type(loss).__name__ == "NAType":  # pandas.NA
        return np.array(np.nan, np.float32)
    if isinstance(loss, (str, bytes)):
        raise _no_number(loss, index, size)
    try:
        value = np.asarray(loss.numpy() if tf.is_tensor(loss) else loss)
        if value.dtype.name == "bfloat16":
            value = value.astype(np.float32)
        if value.size != 1 or value.dtype.kind not in "biuf":
            value = np.asarray(float(loss))
    except (OverflowError, TypeError, ValueError) as error:
        raise _no_number(loss, index, size) from error
    return _checked_array(value.reshape(1), 1)[0]


def _no_number(loss: Any, index: int, size: int) -> TypeError:
    return TypeError(
        _message(size, f"{loss!r:.80} as the loss of member {index}")
    )


def _message(size: int, received: str) -> str:
    return _EXPECTED.format(size=size, received=received)


def _unfit(size: int, received: str) -> ValueError:
    return ValueError(_message(size, received))
