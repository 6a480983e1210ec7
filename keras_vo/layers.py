"""Dense layers that are perturbed in ways of their own.

While a population is evaluated, each of these layers asks the current scope
(see `keras_vo.perturbations.scope`) for its perturbation. Everywhere else they
are `keras.layers.Dense`.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import keras

from keras_vo.keras_compat import layers_of
from keras_vo.perturbations import registry
from keras_vo.perturbations.calls import DenseCall, floating_inputs
from keras_vo.perturbations.scope import current_scope

__all__ = ["LocalReparamDense", "LowRankDense"]


class PerturbedDense(keras.layers.Dense):
    """`Dense` that asks the current scope for its perturbation.

    Attributes:
        perturbation: its kind, by name.
    """

    perturbation: ClassVar[str]

    def call(self, inputs: Any, training: Any = None) -> Any:
        scope = current_scope()
        if scope is None or not scope.searches(self.kernel):
            return super().call(inputs, training=training)
        outputs = scope.call(
            registry.get(self.perturbation),
            DenseCall(
                self.name,
                self.kernel,
                self.bias,
                floating_inputs(self, inputs),
                self.perturbation_options(),
            ),
        )
        return outputs if self.activation is None else self.activation(outputs)

    def perturbation_options(self) -> Mapping[str, Any]:
        """What the layer says to its kind of perturbation."""
        return {}


@keras.saving.register_keras_serializable(package="keras_vo")
class LocalReparamDense(PerturbedDense):
    """`keras.layers.Dense`, trained by local reparameterization.

    Where other layers give each member of the population one noise vector
    over their weights, which all examples of the batch share, this one
    perturbs its outputs, freshly for each member, example and unit:

        Z = m + sqrt(v) xi,   xi ~ N(0, 1),
        m = A mu,   v = A^2 sigma^2     [1, eq. 28-31; 2]

    with the layer's inputs A (1 for the bias), weights mu and their sigma.
    The marginal distribution of each example's outputs is the same, but the
    examples no longer share their noise, and each has the credit of its own
    loss, so that the search gradient has far less variance. The gradients, for
    the weights and for sigma, are in
    `keras_vo.search.local_reparameterization`.

    An example's credit is its own loss, of a loss whose `reduction` is a mean
    or a sum over the batch (Keras's are) or a `compute_loss` that returns a
    tensor [batch]. Of a loss with one number for the batch (F1 over the batch)
    it is that of the batch in which the example alone is perturbed: see
    `keras_vo.evaluation.whole_batch`. `add_loss`, activity regularizers and
    regularizers of this layer's own weights are refused, as no gradient would
    come of them; for weight decay, set `weight_decay` of the inner optimizer.
    Constraints of its weights are refused too: no member has weights of its
    own. (`VOOptimizer(perturbation="local_reparam")` perturbs layers of Keras
    alike, and leaves those where that is not possible.)

    Members with noise on activations have no noise on weights: they are
    another population, of `examples_population_size` members.

    Everywhere but in the evaluation of a population (inference, metrics of
    `fit`, `.keras` files, SavedModels) it is `keras.layers.Dense`, with the
    same arguments and weights.

    Inputs may have rank 2 and higher, [batch, ..., in]: as in Dense, the last
    axis is contracted. The noise is then independent for each position
    between the first and the last axis too, as it is for each example; under
    one perturbed kernel the positions would be correlated. All positions of
    an example have the credit of its loss, but for those that the inputs' mask
    leaves out.

    What an example does to others through the statistics of a
    BatchNormalization behind this layer is not credited to it; nor is what
    another layer computes from this one's weights (tied weights). A batch of
    sparse inputs is made dense in training. With LoRA or quantization enabled
    it is Dense.

    Args:
        *args: those of `keras.layers.Dense`.
        **kwargs: those of `keras.layers.Dense`.

    References:
        [1] Havtorn, "Variational Optimization of Neural Networks", 2018.
        [2] Kingma, Salimans, Welling, "Variational Dropout and the Local
            Reparameterization Trick", 2015, arXiv 1506.02557.
    """

    perturbation = "local_reparam"


@keras.saving.register_keras_serializable(package="keras_vo")
class LowRankDense(PerturbedDense):
    """`keras.layers.Dense` whose kernel is perturbed by noise of low rank.

    A member's kernel is W + sigma E with E = A^T B / sqrt(r) and standard
    normal A [r, in] and B [r, out], applied as

        x (W + sigma E) = x W + sigma (x A^T) B / sqrt(r)              [1]

    Members share the product with W, no perturbed kernel is formed, and
    r (in + out) numbers are drawn instead of in * out: steps on wide layers
    and with large populations are several times faster than with full-rank
    noise. The bias is perturbed as any other weight. Where each weight has a
    variance of its own ("separable"), a step moves log sigma^2 of the kernel
    by a term for each row and one for each column. The gradients are in
    `keras_vo.perturbations.low_rank`. (A regularizer or a constraint of the
    kernel reads the perturbed kernel, which is then formed; with a constraint
    members share no product.) A batch of sparse inputs is made dense in
    training.

    Everywhere but in the evaluation of a population (inference, metrics of
    `fit`, `.keras` files, SavedModels) it is `keras.layers.Dense`, with the
    same weights.

    Args:
        units: number of outputs.
        *args: further arguments of `keras.layers.Dense`.
        rank: the rank r of the noise, 1 or more.
        **kwargs: those of `keras.layers.Dense`.

    Raises:
        ValueError: `rank` is not a positive integer.

    References:
        [1] Sarkar et al., "Evolution Strategies at the Hyperscale", 2025,
            arXiv 2511.16652.
    """

    perturbation = "low_rank"

    def __init__(
        self, units: int, *args: Any, rank: int = 1, **kwargs: Any
    ) -> None:
        super().__init__(units, *args, **kwargs)
        self.rank = _checked_rank(rank)

    def perturbation_options(self) -> Mapping[str, Any]:
        return {"rank": self.rank}

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "rank": self.rank}


def _checked_rank(rank: int) -> int:
    try:
        value = operator.index(rank)
    except TypeError:
        value = 0
    if value < 1:
        raise ValueError(
            f"`rank` must be a positive integer. Received: rank={rank!r}"
        )
    return value


KINDS = {
    "full": keras.layers.Dense,
    "local_reparam": LocalReparamDense,
    "low_rank": LowRankDense,
}


def convert_dense(model: Any, dense: str) -> None:
    """Turns all Dense layers of `model`, in place, into those of one kind.

    Subclasses of Dense other than this module's are left as they are.

    Args:
        model: a layer or model.
        dense: "full", "local_reparam" or "low_rank" (of rank 1, where a layer
            is not a `LowRankDense` already).

    Raises:
        ValueError: another `dense`.
    """
    if dense not in KINDS:
        raise ValueError(
            f"`dense` must be one of {list(KINDS)}. Received: dense={dense!r}"
        )
    for layer in layers_of(model):
        if type(layer) in KINDS.values():
            if dense == "low_rank":
                layer.rank = getattr(layer, "rank", 1)
            elif hasattr(layer, "rank"):
                del layer.rank
            layer.__class__ = KINDS[dense]


@contextlib.contextmanager
def as_dense(model: Any) -> Iterator[None]:
    """Lets a model's layers be Dense, for a file that names their classes."""
    classes = [
        (layer, type(layer))
        for layer in layers_of(model)
        if isinstance(layer, PerturbedDense)
    ]
    for layer, _ in classes:
        layer.__class__ = keras.layers.Dense
    try:
        yield
    finally:
        for layer, original in classes:
            layer.__class__ = original
