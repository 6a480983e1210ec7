"""Products of inputs that all members share with weights of their own.

The inputs of a network's first layer are the same for all members. With weights
W = M + s sigma Z, of the noise Z of a direction and the sign s of a member,

    x W = x M + s (sigma x) Z

has x M once for all members and (sigma x) Z once for both of a pair, as one
product of all directions, and no member's W is formed. The members' weights are
the same, so are the losses, to rounding.

Inputs that are not finite are apart from this: of an infinite x the terms are
inf - inf where x W is inf. And so are members that call `tf.gradients`, which
goes through the ops of the graph, and would not come from x M to W.
(`tf.GradientTape` has noted the product of x and W, which it differentiates.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from keras_vo.perturbations import graph_ops
from keras_vo.tensorflow_compat import called_for_each_op

__all__ = ["Terms", "TraceAgainError", "products_by_terms"]

# Of the ops with which tf.gradients begins.
_OF_GRADIENTS = "grad_ys_"


class TraceAgainError(Exception):
    """A member is traced once more; it will be another graph."""


class Terms(NamedTuple):
    """What a member's weights are the sum of, mean + sign stddev noise.

    Attributes:
        mean: M, of all members.
        sign: s, a number or a scalar.
        stddev: sigma, a scalar.
        noise: Z, of the direction.
        products: by the id of x, what is known of it; filled by use, for both
            members.
    """

    mean: tf.Tensor
    sign: Any
    stddev: tf.Tensor
    noise: tf.Tensor
    products: dict[int, _Inputs]

    def sum(self) -> tf.Tensor:
        """The member's weights."""
        return self.mean + self.sign * self.stddev * self.noise

    def product(self, x: tf.Tensor) -> tf.Tensor:
        """x times them, for x of all members."""
        if id(x) not in self.products:
            finite = tf.math.is_finite(x)
            zeros = tf.where(finite, x, tf.zeros_like(x))
            # Two more axes: TensorFlow's vectorized form of a product of
            # matrices would transpose the noise of all directions.
            of_noise = tf.matmul((self.stddev * zeros)[None], self.noise[None])[
                0
            ]
            self.products[id(x)] = _Inputs(
                x, zeros, tf.reduce_all(finite), of_noise
            )
        inputs = self.products[id(x)]
        shared = tf.matmul(inputs.finite, self.mean)
        if isinstance(self.sign, float) and abs(self.sign) == 1:
            signed = tf.add if self.sign > 0 else tf.subtract
            product = signed(shared, inputs.of_noise)
        else:
            product = shared + self.sign * inputs.of_noise
        return tf.cond(
            inputs.are_finite,
            lambda: product,
            lambda: product + tf.matmul(x - inputs.finite, self.sum()),
        )


class _Inputs(NamedTuple):
    """What members share of their inputs.

    Attributes:
        x: which lives as long as its id.
        finite: x with zeros for what is not finite.
        are_finite: whether all are.
        of_noise: (sigma x) Z of the direction.
    """

    x: tf.Tensor
    finite: tf.Tensor
    are_finite: tf.Tensor
    of_noise: tf.Tensor


class Products:
    """What was seen of products with a member's weights.

    Attributes:
        differentiated: whether `tf.gradients` was called, which can't see them.
    """

    differentiated = False


@contextlib.contextmanager
def products_by_terms(
    terms: Sequence[tuple[tf.Tensor, Terms]], sources: Sequence[tf.Tensor]
) -> Iterator[Products]:
    """A scope in which products with a member's weights are made as above.

    In the graph of members that are vectorized; elsewhere it does nothing.
    What they would differentiate is wrong in a scope that says so.

    Args:
        terms: of weights, each with what it is the sum of. Those of another
            dtype than the noise are left alone.
        sources: the tensors of the member's noise.
    """
    seen = Products()
    graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
    if not terms or not graph_ops.is_in_vectorized_loop(terms[0][1].noise):
        yield seen
        return
    by_id = {
        id(weights): of
        for weights, of in terms
        if weights.dtype == of.noise.dtype
    }

    def product(op_type: str, inputs: Any, outputs: Any, where: Any) -> Any:
        if where is not graph or not outputs:
            return None
        op = outputs[0].op
        if op.name.rpartition("/")[2].startswith(_OF_GRADIENTS):
            seen.differentiated = bool(of_use)
        if op_type != "MatMul":
            return None
        x, weights = inputs
        transposed = op.get_attr("transpose_a") or op.get_attr("transpose_b")
        of = by_id.get(id(weights))
        if of is None or transposed or graph_ops.depends(x, sources):
            return None
        made = of.product(x)
        made.set_shape(outputs[0].shape)
        of_use.append(made)
        return [made]

    of_use: list[tf.Tensor] = []
    with called_for_each_op(product):
        yield seen
