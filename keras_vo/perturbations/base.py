"""What a kind of perturbation is.

A kind says, in one file, all that there is to say of its noise: how it
perturbs, what is summed over the population, and the gradient, the Fisher
information and the signal-to-noise ratio that follow. It is a subclass of
`Perturbation` that `keras_vo.perturbations.registry.register` makes known. A
layer names it in its attribute `perturbation` (see `keras_vo.layers`).

In each training step,

    record    is asked in the mean network's pass, for each call of a layer of
              this kind, what it computes, and notes what it claims;
    __init__  binds what was claimed to the search distribution of this step;
    member    turns a direction's noise into a member's perturbation;
    call      is asked for each call of a layer in the member's pass;
    sums      weights the noise of a chunk of members with their utilities;
    gradient  makes the gradients of the variables of these sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import tensorflow as tf

from keras_vo.perturbations.calls import LayerCall
from keras_vo.search.chunks import Noise
from keras_vo.search.credit import MEMBER, Rows
from keras_vo.search.gaussian import Gaussian
from keras_vo.search.signal_to_noise import Probe

if TYPE_CHECKING:
    from keras_vo.perturbations.scope import Evaluation, Recording
    from keras_vo.perturbations.shared_inputs import Terms

__all__ = [
    "Perturbation",
    "Space",
    "VariableGradient",
]


class Space(NamedTuple):
    """What perturbations are bound to in a step.

    Attributes:
        gaussian: the search distribution.
        positions: of each variable that is searched over, by its id.
        adapts: whether sigma is to be changed.
        probe: what the gradient is measured by; `None`: it is not.
    """

    gaussian: Gaussian
    positions: Mapping[int, int]
    adapts: bool
    probe: Probe | None = None


class VariableGradient(NamedTuple):
    """What one kind of perturbation says of one variable.

    Attributes:
        variable: its index.
        mean: dU/dmu, with the variable's number of elements.
        log_variance: dU/dbeta, alike, or a scalar where its weights share a
            variance; `None` where it is fixed.
        fisher: Fisher information of beta under what gets credit at once, a
            member or a member's example; a number or a tensor like
            `log_variance`. Of a variance that weights share, that of their
            common beta. Where each weight has its own, the sum of its row of
            the Fisher matrix: then a change of all by the same amount has the
            same natural gradient as if they shared one variance.
    """

    variable: int
    mean: tf.Tensor
    log_variance: tf.Tensor | None
    fisher: Any


class Perturbation:
    """One kind of noise, on the variables that it claims, in one step.

    Subclasses set `name` and `level`, and implement `__init__`, `sums` and
    `gradient`, and what they need of the rest.

    Attributes:
        name: of the kind.
        level: of the credit that its noise is weighted with.
        automatic: which calls of Keras layers it perturbs where it is the
            optimizer's choice for all layers.
        variables: indices of those that it perturbs.
        noise_size: number of standard normals of a direction that perturb
            weights.
        activations: tensors of the shapes of a direction's further noise.
    """

    name: ClassVar[str]
    level: ClassVar[str] = MEMBER
    automatic: ClassVar[tuple[type[LayerCall], ...]] = ()
    variables: Sequence[int]
    noise_size: int = 0
    activations: tuple[tf.Tensor, ...] = ()

    def __init__(self, claims: Sequence[Any], space: Space) -> None:
        """Binds what `record` has claimed to this step.

        Args:
            claims: in the order in which they were made.
            space: the search distribution, and what is wanted.
        """
        raise NotImplementedError

    @classmethod
    def record(cls, call: LayerCall, recording: Recording) -> Any:
        """The layer's outputs in the mean network; claims what is perturbed.

        By default the kernel, once. `None`: it is left as it is, which only
        calls that are `automatic` can be.
        """
        recording.claim(cls.name, call.kernel, call)
        return call.plain()

    @classmethod
    def adopt(cls, variables: Sequence[Any]) -> list[Any]:
        """Where it is the optimizer's choice for all layers, claims of
        variables that nothing has claimed.
        """
        return []

    @classmethod
    def mixed(
        cls, claims: Sequence[Any], ancestors: set[int] | None
    ) -> list[LayerCall]:
        """The automatic calls whose noise must not reach other examples, but
        does.

        Args:
            claims: of this kind.
            ancestors: ids of the ops that a tensor is computed by, of which
                each example depends on all; `None`: they are not known.
        """
        return []

    @classmethod
    def settled(cls, claims: Sequence[Any], recording: Recording) -> list[Any]:
        """The claims that are kept after the mean network's pass.

        Args:
            claims: in the order in which they were made.
            recording: of that pass.
        """
        return list(claims)

    @classmethod
    def fans(cls, claims: Sequence[Any]) -> list[tuple[list[Any], int]]:
        """Of each call with noise on its outputs the weights, the kernel
        first, and the fan in of a unit; the scale of the noise follows of
        them (see `keras_vo.search.activation_scale`).

        Args:
            claims: see `__init__`.
        """
        return []

    @classmethod
    def check_batch(cls, claims: Sequence[Any], inputs: tf.Tensor) -> None:
        """Checks that what was claimed fits the batch.

        Args:
            claims: see `__init__`.
            inputs: of the model, [batch, ...].
        """

    def activation_bytes(self, signs: int) -> Any:
        """Bytes of what is perturbed beside weights, of a direction: an
        integer or a tensor.
        """
        return 0

    def member(
        self, noise: Noise, sign: float
    ) -> tuple[Mapping[int, tf.Tensor], Any]:
        """The weights of a member, by index, and what `call` needs of it.

        Constraints are applied to them afterwards. They are the values of the
        variables in the member's pass.

        Args:
            noise: of one direction.
            sign: +1, or -1 for the mirrored member.
        """
        return {}, None

    def terms(self, state: Any) -> Mapping[int, Terms]:
        """What the weights of a member are sums of, by index, where they are:
        see `keras_vo.perturbations.shared_inputs`.

        Args:
            state: from `member`.
        """
        return {}

    def call(self, call: LayerCall, state: Any, evaluation: Evaluation) -> Any:
        """The layer's outputs in a member's pass.

        By default those of the member's weights. `None`: they are what they
        would be without this call, of those that are `automatic`.

        Args:
            call: of a layer of this kind.
            state: from `member`.
            evaluation: the member's scope.
        """
        return call.plain()

    def finish(self, state: Any) -> Any:
        """After a member's pass: the records that `sums` needs of it."""
        return ()

    def sums(
        self, noise: Noise, records: Any, rows: Rows
    ) -> dict[str, tf.Tensor]:
        """Sums over a chunk of directions, which chunks and replicas add up.

        Args:
            noise: [chunk, ...].
            records: from `finish`, [chunk, signs, ...].
            rows: what they are summed with. With `ids`, a sum "squares" (see
                `keras_vo.search.signal_to_noise`) is wanted.
        """
        raise NotImplementedError

    def log_ratios(
        self, noise: Noise, signs: Sequence[float], other: Gaussian
    ) -> tf.Tensor:
        """See `Gaussian.log_ratios`, of the variables of this kind.

        Raises:
            ValueError: its members' weights have no density.
        """
        raise ValueError(
            "Expected noise of full rank, whose members' weights have a "
            "density under other search distributions. Received: "
            f"{self.name!r}"
        )

    def totals(self) -> dict[str, tf.Tensor]:
        """Sums over the examples of this replica, which replicas add up."""
        return {}

    def gradient(
        self, sums: Mapping[str, tf.Tensor], count: tf.Tensor
    ) -> Iterable[VariableGradient]:
        """The gradients of the variables.

        Args:
            sums: all of `sums` and `totals`.
            count: over how many results they are: members, or (where the
                level is that of examples, and u is divided by the number of
                members) examples.
        """
        raise NotImplementedError
