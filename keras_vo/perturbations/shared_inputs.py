"""Products of inputs that all members share with weights of their own.

The inputs of a network's first layer are the same for all members. With weights
W = M + s sigma Z, of the noise Z of a direction and the sign s of a member,

    x W = x M + s sigma (x Z)

has x M once for all members and x Z once for both of a pair, as one product of
all directions, and no member's W is formed. The members' weights are the same,
so are the losses, to rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from keras_vo.perturbations import graph_ops
from keras_vo.tensorflow_compat import called_for_each_op

__all__ = ["Terms", "products_by_terms"]


class Terms(NamedTuple):
    """What a member's weights are the sum of, mean + factor noise.

    Attributes:
        mean: M, of all members.
        factor: s sigma, a scalar.
        noise: Z, of the direction.
        products: x Z of both members of the direction, by the ids of x and Z;
            filled by use.
    """

    mean: tf.Tensor
    factor: tf.Tensor
    noise: tf.Tensor
    products: dict[tuple[int, int], tuple[tf.Tensor, tf.Tensor]]


@contextlib.contextmanager
def products_by_terms(
    terms: Sequence[tuple[tf.Tensor, Terms]], sources: Sequence[tf.Tensor]
) -> Iterator[None]:
    """A scope in which products with a member's weights are made as above.

    In the graph of members that are vectorized; elsewhere it does nothing.

    Args:
        terms: of weights, matrices, each with what it is the sum of.
        sources: the tensors of the member's noise.
    """
    graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
    if not terms or not graph_ops.is_in_vectorized_loop(terms[0][1].noise):
        yield
        return
    by_id = {id(weights): of for weights, of in terms}

    def product(op_type: str, inputs: Any, outputs: Any, where: Any) -> Any:
        if op_type != "MatMul" or where is not graph:
            return None
        x, weights = inputs
        op = outputs[0].op
        transposed = op.get_attr("transpose_a") or op.get_attr("transpose_b")
        of = by_id.get(id(weights))
        if of is None or transposed or graph_ops.depends(x, sources):
            return None
        result = tf.matmul(x, of.mean) + of.factor * _noise_product(x, of)
        return [tf.ensure_shape(result, outputs[0].shape)]

    with called_for_each_op(product):
        yield


def _noise_product(x: tf.Tensor, of: Terms) -> tf.Tensor:
    """x Z, made once for both members."""
    key = id(x), id(of.noise)
    if key not in of.products:
        # Two more axes: TensorFlow's vectorized form of a product of matrices
        # would transpose the noise of all directions.
        result = tf.matmul(x[None], of.noise[None])[0]
        of.products[key] = result, x  # which lives as long as its id
    return of.products[key][0]
