"""Products of inputs that all members share with weights of their own.

The inputs of a network's first layer are the same for all members. With weights
W = M + s sigma Z, of the noise Z of a direction and the sign s of a member,

    x W = x M + s (sigma x) Z

has x M once for all members and (sigma x) Z once for both of a pair, as one
product of all directions, and no member's W is formed. The members' weights are
the same, so are the losses, to rounding.
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
    """What a member's weights are the sum of, mean + sign stddev noise.

    Attributes:
        mean: M, of all members.
        sign: s, a number or a scalar.
        stddev: sigma, a scalar.
        noise: Z, of the direction.
        products: by the id of x, (sigma x) Z of the direction, and x; filled by
            use, for both members.
    """

    mean: tf.Tensor
    sign: Any
    stddev: tf.Tensor
    noise: tf.Tensor
    products: dict[int, tuple[tf.Tensor, tf.Tensor]]

    def sum(self) -> tf.Tensor:
        """The member's weights."""
        return self.mean + self.sign * self.stddev * self.noise

    def product(self, x: tf.Tensor) -> tf.Tensor:
        """x times them, for x of all members."""
        if id(x) not in self.products:
            # Two more axes: TensorFlow's vectorized form of a product of
            # matrices would transpose the noise of all directions.
            of_noise = tf.matmul((self.stddev * x)[None], self.noise[None])[0]
            self.products[id(x)] = of_noise, x  # which lives as long as its id
        of_noise, shared = self.products[id(x)][0], tf.matmul(x, self.mean)
        if isinstance(self.sign, float) and abs(self.sign) == 1:
            return shared + of_noise if self.sign > 0 else shared - of_noise
        return shared + self.sign * of_noise


@contextlib.contextmanager
def products_by_terms(
    terms: Sequence[tuple[tf.Tensor, Terms]], sources: Sequence[tf.Tensor]
) -> Iterator[None]:
    """A scope in which products with a member's weights are made as above.

    In the graph of members that are vectorized; elsewhere it does nothing.

    Args:
        terms: of weights, each with what it is the sum of. Those of another
            dtype than the noise are left alone.
        sources: the tensors of the member's noise.
    """
    graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
    if not terms or not graph_ops.is_in_vectorized_loop(terms[0][1].noise):
        yield
        return
    by_id = {
        id(weights): of
        for weights, of in terms
        if weights.dtype == of.noise.dtype
    }

    def product(op_type: str, inputs: Any, outputs: Any, where: Any) -> Any:
        if op_type != "MatMul" or where is not graph:
            return None
        x, weights = inputs
        op = outputs[0].op
        transposed = op.get_attr("transpose_a") or op.get_attr("transpose_b")
        of = by_id.get(id(weights))
        if of is None or transposed or graph_ops.depends(x, sources):
            return None
        return [tf.ensure_shape(of.product(x), outputs[0].shape)]

    with called_for_each_op(product):
        yield
