"""The scope in which layers are perturbed in ways of their own.

A structured layer asks for the current scope when it is called. There is none
outside of training, and the layer is plain. In a training step there are two:

    Recording   the mean network's pass: the layer says that it exists, and
                what its noise has to look like;
    Evaluation  a member's pass: the layer asks for its perturbation, and
                leaves what its score needs.

The scopes hold tensors only. Layers know nothing of the optimizer, and the
optimizer nothing of layers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_vo import checks, low_rank

__all__ = [
    "Evaluation",
    "LocalSite",
    "LowRankKernel",
    "Recording",
    "current_scope",
    "entered",
    "shared_product",
]

_scopes = threading.local()


def current_scope() -> Recording | Evaluation | None:
    """The innermost scope that is entered in this thread."""
    stack = getattr(_scopes, "stack", ())
    return stack[-1] if stack else None


@contextlib.contextmanager
def entered(scope: Recording | Evaluation) -> Iterator[None]:
    """Makes `scope` the current one."""
    if not hasattr(_scopes, "stack"):
        _scopes.stack = []
    _scopes.stack.append(scope)
    try:
        yield
    finally:
        _scopes.stack.pop()


def shared_product(inputs: tf.Tensor, kernel: Any) -> tf.Tensor:
    """x W [..., out] for a kernel [in, out] that all members share.

    Vectorized over members, the product of an empty batch of rank 2 would
    come out as [0, 0].
    """
    outputs = keras.ops.matmul(inputs, kernel)
    if outputs.shape.is_fully_defined():
        return outputs
    shape = tf.concat([tf.shape(inputs)[:-1], tf.shape(kernel)[1:]], axis=0)
    return tf.ensure_shape(tf.reshape(outputs, shape), outputs.shape)


@dataclasses.dataclass(frozen=True)
class LowRankKernel:
    """A kernel that is perturbed by noise of low rank.

    Attributes:
        variable: the kernel [in, out].
        rank: the rank r.
    """

    variable: Any
    rank: int


@dataclasses.dataclass(frozen=True)
class LocalSite:
    """A call of a layer whose activations are perturbed.

    Attributes:
        name: the layer's, for messages.
        kernel: its kernel, a variable [in, units].
        bias: its bias, a variable [units], or None.
        inputs: A [batch, ..., in] in the mean network.
        outputs: m [batch, ..., units] in the mean network.
        mask: which positions count, [batch, ...]; `None`: all.
    """

    name: str
    kernel: Any
    bias: Any
    inputs: tf.Tensor
    outputs: tf.Tensor
    mask: Any = None


class Recording:
    """The scope of the mean network's pass.

    Args:
        variables: the variables that are searched over. A layer whose kernel
            is not among them is plain.

    Attributes:
        sites: calls of layers whose activations are to be perturbed.
        low_rank: kernels that are to be perturbed by noise of low rank.
    """

    def __init__(self, variables: Sequence[Any]) -> None:
        self._searched = {id(v) for v in variables}
        self._graph = _graph()
        self._in_call = True
        self.sites: list[LocalSite] = []
        self.low_rank: list[LowRankKernel] = []

    def searches(self, variable: Any) -> bool:
        """Whether `variable` is searched over."""
        return id(variable) in self._searched

    def low_rank_product(
        self, kernel: Any, rank: int, inputs: tf.Tensor
    ) -> tf.Tensor:
        """Notes that `kernel` takes noise of low rank; returns x W."""
        if not any(known.variable is kernel for known in self.low_rank):
            self.low_rank.append(LowRankKernel(kernel, rank))
        return shared_product(inputs, kernel)

    def perturb_activations(
        self,
        name: str,
        kernel: Any,
        bias: Any,
        inputs: tf.Tensor,
        outputs: tf.Tensor,
    ) -> tf.Tensor:
        """Notes a call; returns `outputs`.

        Raises:
            ValueError: the call is in a loop or in the loss, or a regularizer
                would read the layer's weights.
        """
        if not self._in_call:
            raise ValueError(
                f"Layer {name!r}, a LocalReparamDense, must be called by the "
                "model's `call`. Expected: Dense or LowRankDense where only "
                "the loss calls a layer. Received: a call by `compute_loss`"
            )
        if _graph() is not self._graph or _is_in_vectorized_loop(inputs):
            raise ValueError(
                f"Layer {name!r}, a LocalReparamDense, is called in a loop (a "
                "recurrent cell, TimeDistributed, tf.while_loop, "
                "vectorized_map). Expected: a call with all positions at "
                "once, as Dense has for inputs of rank 3 and higher, or noise "
                "of another kind, LowRankDense or Dense. Received: a call in "
                "the body of a loop"
            )
        bias = bias if bias is not None and self.searches(bias) else None
        for weight in (kernel, bias):
            if getattr(weight, "regularizer", None) is not None:
                raise ValueError(
                    f"Layer {name!r}, a LocalReparamDense, must have no "
                    "regularizer of its weights: its activations are "
                    "perturbed, not its weights, so that no search gradient "
                    "would reach them. Expected: `weight_decay` of the inner "
                    "optimizer instead. Received: "
                    f"{weight.path!r} with {weight.regularizer!r}"
                )
        # Private: Keras attaches masks to tensors, and has no public reader.
        mask = getattr(inputs, "_keras_mask", None)
        if mask is not None and mask.shape.rank != inputs.shape.rank - 1:
            mask = None
        self.sites.append(LocalSite(name, kernel, bias, inputs, outputs, mask))
        return outputs

    def end_of_call(self) -> None:
        """Says that from now on the loss is computed."""
        self._in_call = False

    def check_batch(self, inputs: tf.Tensor) -> None:
        """Checks that each call had the examples along its first axis.

        Args:
            inputs: of the model, [batch, ...].
        """
        for site in self.sites:
            checks.check_batch(
                site.outputs,
                inputs,
                f"Layer {site.name!r}, a LocalReparamDense, must be called "
                "with the examples along the first axis.",
            )


class Evaluation:
    """The scope of one member's pass.

    Args:
        recording: what the mean network's pass has recorded.
        low_rank: for each kernel of low-rank noise, by its id: the mean
            [in, out], sigma (a scalar or [in, out]), and the factors A [r, in]
            and B [r, out] with the member's sign.
        local: for each recorded call, how v follows from A, and v in the mean
            network.
        noise: xi of each recorded call, with the member's sign.
        sources: all tensors of the member's noise.
    """

    def __init__(
        self,
        recording: Recording,
        low_rank: dict[int, tuple[tf.Tensor, ...]],
        local: Sequence[tuple[Callable[[tf.Tensor], tf.Tensor], tf.Tensor]],
        noise: Sequence[tf.Tensor],
        sources: Sequence[tf.Tensor],
    ) -> None:
        self._recording = recording
        self._low_rank = low_rank
        self._local = local
        self._noise = noise
        self._sources = sources
        self._records: list[tuple[tf.Tensor, ...]] = []

    def searches(self, variable: Any) -> bool:
        """Whether `variable` is searched over."""
        return self._recording.searches(variable)

    def low_rank_product(
        self, kernel: Any, rank: int, inputs: tf.Tensor
    ) -> tf.Tensor:
        """x (W + sigma E) for the member's noise E of low rank."""
        mean, stddev, *factors = (
            tf.cast(t, inputs.dtype) for t in self._low_rank[id(kernel)]
        )
        return shared_product(inputs, mean) + low_rank.product(
            inputs, stddev, *factors
        )

    def perturb_activations(
        self,
        name: str,
        kernel: Any,
        bias: Any,
        inputs: tf.Tensor,
        outputs: tf.Tensor,
    ) -> tf.Tensor:
        """Z = m + sqrt(v) xi, from m; leaves what the score needs."""
        index = len(self._records)
        sites = self._recording.sites
        if index == len(sites) or sites[index].kernel is not kernel:
            self._raise_other_calls(f"{name!r} as call {index}")
        noise = self._noise[index]
        variance_of, variance = self._local[index]
        if _depends(inputs, self._sources):
            wide = tf.cast(inputs, noise.dtype)
            variance = variance_of(wide)
            self._records.append((wide, variance))
        else:  # m and v are the mean network's, the same for every member
            outputs = sites[index].outputs
            self._records.append(())
        return outputs + tf.cast(tf.sqrt(variance) * noise, outputs.dtype)

    def finish(self) -> tuple[tuple[tf.Tensor, ...], ...]:
        """A and v of each recorded call, in the dtype of the noise.

        Empty for a call where they are those of the mean network.

        Raises:
            ValueError: not all of the recorded calls were made.
        """
        if len(self._records) < len(self._recording.sites):
            self._raise_other_calls(f"{len(self._records)} calls")
        return tuple(self._records)

    def _raise_other_calls(self, received: str) -> None:
        raise ValueError(
            "A LocalReparamDense must be called as often, and in the same "
            "order, by a perturbed model as by the mean network. Expected: "
            f"{[site.name for site in self._recording.sites]}, call by call. "
            f"Received: {received}"
        )


def _graph() -> Any:
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


def _depends(tensor: tf.Tensor, sources: Sequence[tf.Tensor]) -> bool:
    """Whether `tensor` may differ between members.

    It does if it is computed from their noise, and it may if an op on the way
    is random, has a state, or calls a function. (XLA draws other random
    numbers than the mean network's pass.) Eagerly nothing is known.
    """
    if tf.executing_eagerly():
        return True
    targets = {id(source.op) for source in sources}
    return any(
        id(op) in targets
        or "Random" in op.type
        or "Call" in op.type
        or (op.op_def.is_stateful and op.type != "ReadVariableOp")
        for op in _ancestors(tensor)
    )


def _is_in_vectorized_loop(tensor: tf.Tensor) -> bool:
    """Whether `tensor` depends on the index of a tf.vectorized_map.

    Its body is traced into the graph around it, with a placeholder for the
    index.
    """
    return not tf.executing_eagerly() and any(
        op.type == "PlaceholderWithDefault" for op in _ancestors(tensor)
    )


def _ancestors(tensor: tf.Tensor) -> Iterator[Any]:
    """The ops of the graph that a tensor is computed by."""
    seen = set()
    todo = [tensor.op]
    while todo:
        op = todo.pop()
        if id(op) in seen:
            continue
        seen.add(id(op))
        yield op
        todo.extend(source.op for source in op.inputs)
        todo.extend(op.control_inputs)
