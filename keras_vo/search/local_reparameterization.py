"""Local reparameterization: noise on activations instead of weights.

A dense layer Z = A W (the bias is an input that is always 1) with factorised
Gaussian weights W ~ N(mu, sigma^2) has Gaussian outputs [1, eq. 28-31]:

    Z_i = m_i + sqrt(v_i) xi_i,   xi ~ N(0, I),
    m = A mu,   v = A^2 sigma^2     (squares elementwise)

Sampling xi per example and unit, instead of one W for the whole batch, makes
the examples' losses independent given the inputs, so that the noise of one
example does not blur the gradient of the others. The score of Z gives the
search gradients, with f_b the loss of example b alone and a baseline or any
shaping in u_b:

    dU/dmu_ji      = 1/B sum_b u_b A_bj xi_bi / sqrt(v_bi)
    dU/dsigma^2_ji = 1/B sum_b u_b A_bj^2 (xi_bi^2 - 1) / (2 v_bi)

averaged over the population; dU/dbeta = sigma^2 dU/dsigma^2 for
beta = log sigma^2. Neither the loss nor the network is differentiated.

Inputs of rank 3 and higher have positions between the batch axis and the last
one; each position has a noise of its own, and the sums run over all of them.
(Under one W, positions of one example would be correlated: this is another
distribution with the same marginals.) Where A is not multiplied with a matrix,
`keras_vo.search.operands` says what takes the place of A W, A^2 sigma^2 and the
sums.

References:
    [1] Havtorn, "Variational Optimization of Neural Networks", 2018 (slides).
        Eq. 31b there squares the sum; the sum of squares is meant.
    [2] Kingma, Salimans, Welling, "Variational Dropout and the Local
        Reparameterization Trick", 2015, arXiv 1506.02557.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import tensorflow as tf

from keras_vo.search import credit
from keras_vo.search.operands import Operand

__all__ = [
    "ActivationNoise",
    "column_squares",
    "scores",
]


def scores(
    noise: tf.Tensor, excess: tf.Tensor, variance: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """The scores of the activations, weighted by utilities.

    Args:
        noise: u xi [..., units], or sums of it.
        excess: u (xi^2 - 1), alike.
        variance: v, broadcasts against both.

    Returns:
        u d log p / dm = u xi / sqrt(v) and
        u d log p / dv = u (xi^2 - 1) / (2 v); both 0 where v is 0.
    """
    return (
        tf.math.divide_no_nan(noise, tf.sqrt(variance)),
        tf.math.divide_no_nan(excess, 2.0 * variance),
    )


class ActivationNoise:
    """The noise of the activations of one call of a layer.

    Args:
        operand: how outputs depend on A and the kernel.
        inputs: A [batch, ...] in the mean network.
        units: number of units.
        variances: sigma^2 of the kernel, like it or a scalar, and of the
            bias, [units] or a scalar, if there is one that is searched over.
        adapts: whether sigma is to be changed.
        mask: which positions count, [batch, ...]; `None`: all. The score of
            the others would be noise.

    Attributes:
        has_bias: whether there is a bias that is searched over.
        inputs: A in the mean network, as the operand takes it.
        variance: v in the mean network.
    """

    def __init__(
        self,
        operand: Operand,
        inputs: tf.Tensor,
        units: int,
        variances: Sequence[tf.Tensor],
        adapts: bool,
        mask: tf.Tensor | None = None,
    ) -> None:
        self.has_bias = len(variances) > 1
        self._adapts = adapts
        dtype = variances[0].dtype
        self._mask = None if mask is None else tf.cast(mask, dtype)[..., None]
        self._kernel_variance, self._bias_variance, *_ = (
            *variances,
            tf.zeros([], dtype),
        )
        self._operand = operand
        self._dtype = dtype
        self.inputs = _finite(operand.prepared(inputs, dtype))
        self._units = units
        self.variance = self.variance_of(self.inputs)

    def variance_of(self, inputs: tf.Tensor) -> tf.Tensor:
        """v from A, [..., units], or [..., 1] where it is that of all units."""
        of_kernel = self._operand.variance(inputs, self._kernel_variance)
        return of_kernel + self._bias_variance

    def prepared(self, inputs: tf.Tensor) -> tf.Tensor:
        """A as `variance_of` and `sums` take it."""
        return self._operand.prepared(inputs, self._dtype)

    @property
    def shared(self) -> bool:
        """Whether the kernel has a single variance."""
        return self._kernel_variance.shape.rank == 0

    def shared_fisher(self) -> tf.Tensor:
        """Fisher information of a log variance that all weights share.

        It is that of each unit's log v, 1/2, for each example and position.
        """
        counted = tf.ones_like(self.variance[..., 0])
        if self._mask is not None:
            counted = self._mask
        return 0.5 * self._units * tf.reduce_sum(counted)

    def sums(
        self,
        noise: tf.Tensor,
        record: tuple[tf.Tensor, ...],
        rows: credit.Rows,
    ) -> list[tf.Tensor]:
        """Sums of the scores over a chunk of members, times utilities.

        Args:
            noise: xi [chunk, batch, ..., units]; the second of two signs has
                -xi.
            record: A and v of each member, [chunk, signs, batch, ...]; empty
                if they are the mean network's.
            rows: with utilities u [chunk, signs, batch], or of positions
                [chunk, signs, batch, ...].

        Returns:
            For the kernel, then for the bias if there is one: the sum for mu
            and, if sigma is to be changed, the sum for beta; and where each
            weight has a variance of its own, the sum of `_fisher`.
        """
        utilities = rows.utilities
        signs = utilities.shape[1]
        utilities = _for_positions(utilities, noise.shape.rank + 1)
        if self._mask is not None:
            utilities = utilities * self._mask
        noise = tf.stack([noise, -noise][:signs], axis=1)
        weighted = utilities * noise
        excess = utilities * (tf.square(noise) - 1.0)
        if record:
            inputs, variance = (_finite(values) for values in record)
        else:
            inputs, variance = self.inputs, self.variance
            weighted = tf.reduce_sum(weighted, axis=[0, 1])
            excess = tf.reduce_sum(excess, axis=[0, 1])
        mean_score, variance_score = (
            tf.reshape(values, [-1, self._units])
            for values in scores(weighted, excess, variance)
        )
        flat = self._operand.flat(inputs)
        sums = [
            (
                self._operand.sums(flat, mean_score),
                tf.reduce_sum(mean_score, axis=0),
            )
        ]
        if self._adapts:
            sums.append(self._log_variance_sums(flat, variance_score))
            if not self.shared:
                sums.append(self._fisher(inputs, variance, rows.shares, signs))
        by_weight = list(zip(*sums, strict=True))
        return [
            term for terms in by_weight[: 1 + self.has_bias] for term in terms
        ]

    def _log_variance_sums(
        self, flat: tf.Tensor, score: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Sums for dU/dbeta: inputs [M, ...] and scores of v [M, units].

        Returns:
            For the kernel, like it, or a scalar (the total) where all its
            weights share one variance; for the bias [units] or a scalar.
        """
        kernel = self._operand.square_sums(flat, score, self._kernel_variance)
        bias = self._bias_variance * tf.reduce_sum(score, axis=0)
        if self._bias_variance.shape.rank == 0:
            bias = tf.reduce_sum(bias)
        return kernel, bias

    def _fisher(
        self,
        inputs: tf.Tensor,
        variance: tf.Tensor,
        shares: tf.Tensor,
        signs: int,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Fisher information of each log sigma^2, a mean over members.

        A unit's v has a Fisher information of 1/2 of its logarithm, and

            d log v_i / d beta_ji = s_ji = A_j^2 sigma_ji^2 / v_i

        adds up to 1 over what is contracted, the bias included. The Fisher
        matrix has the entries 1/2 s_ji s_ki, and the sums of its rows are
        1/2 s_ji, here summed over examples and positions.

        Args:
            inputs: A of each member, or of the mean network.
            variance: v, alike.
            shares: of a direction's members in the mean, [chunk].
            signs: how many they are.
        """
        if inputs.shape.rank == self.inputs.shape.rank:
            weight = signs * tf.reduce_sum(shares)
        else:
            ones = [1] * (variance.shape.rank - 1)
            weight = tf.reshape(shares, [-1, *ones])
        counted = weight * tf.ones_like(variance[..., :1])
        if self._mask is not None:
            counted = counted * self._mask
        score = tf.math.divide_no_nan(0.5 * counted, variance)
        score = tf.broadcast_to(
            score, tf.concat([tf.shape(score)[:-1], [self._units]], axis=0)
        )
        return self._log_variance_sums(
            self._operand.flat(inputs), tf.reshape(score, [-1, self._units])
        )

    def columns(
        self,
        noise: tf.Tensor,
        record: tuple[tf.Tensor, ...],
        utilities: tf.Tensor,
        units: tf.Tensor,
    ) -> list[tf.Tensor]:
        """A column of each direction's term of the sums for mu.

        Args:
            noise: as in `sums`, and so are the next two.
            record: A and v.
            utilities: u.
            units: the column of each direction, [chunk].

        Returns:
            For the kernel [chunk, ...], then for the bias [chunk, 1].
        """
        inputs, variance = record or (self.inputs, self.variance)
        pick = functools.partial(tf.gather, axis=-1, batch_dims=1)
        xi = pick(noise, units)[:, None]  # [chunk, 1, batch, ...]
        if variance.shape[-1] == 1:
            variance = variance[..., 0]
        elif record:
            variance = pick(variance, units)
        else:
            variance = tf.gather(variance, units, axis=-1)
            last = variance.shape.rank - 1
            variance = tf.transpose(variance, [last, *range(last)])[:, None]
        signs = tf.constant([1.0, -1.0][: utilities.shape[1]], noise.dtype)
        utilities = _for_positions(utilities, noise.shape.rank)
        utilities *= tf.reshape(signs, [-1] + [1] * (noise.shape.rank - 2))
        if self._mask is not None:
            utilities = utilities * self._mask[..., 0]
        score, _ = scores(utilities * xi, xi, _finite(variance))
        count = tf.shape(units)[0]
        prepared = self._operand.flat(_finite(inputs))
        if record:
            shape = tf.concat([[count, -1], tf.shape(prepared)[1:]], axis=0)
            prepared = tf.ensure_shape(
                tf.reshape(prepared, shape), [None, None, *prepared.shape[1:]]
            )
        else:
            score = tf.reduce_sum(score, axis=1)
        flat = tf.reshape(score, [count, -1])
        kernel = self._operand.columns(prepared, flat, units)
        bias = tf.reduce_sum(flat, axis=1, keepdims=True)
        return [kernel, bias][: 1 + self.has_bias]


def column_squares(columns: tf.Tensor, units: int) -> tf.Tensor:
    """sum_n |c_n|^2 from one of its `units` columns a direction, [n, rows]."""
    return units * tf.reduce_sum(tf.square(columns))


def _for_positions(utilities: tf.Tensor, rank: int) -> tf.Tensor:
    """Utilities [chunk, signs, batch, ...] with axes of 1 behind the last."""
    ones = [1] * (rank - utilities.shape.rank)
    return tf.reshape(utilities, tf.concat([tf.shape(utilities), ones], axis=0))


def _finite(values: tf.Tensor) -> tf.Tensor:
    """Zeros in place of what is not finite: such members have no say."""
    if not values.dtype.is_floating:
        return values
    return tf.where(tf.math.is_finite(values), values, 0)
