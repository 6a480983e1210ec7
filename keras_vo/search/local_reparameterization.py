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
distribution with the same marginals.)

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

from keras_vo.search.credit import Rows

__all__ = [
    "ActivationNoise",
    "activation_variance",
    "column_squares",
    "log_variance_sums",
    "mean_sums",
    "scores",
]


def activation_variance(
    inputs: tf.Tensor, kernel_variance: tf.Tensor, bias_variance: tf.Tensor
) -> tf.Tensor:
    """v = A^2 sigma^2.

    Args:
        inputs: A [..., in].
        kernel_variance: sigma^2 of the kernel, [in, out] or a scalar that all
            its weights share.
        bias_variance: sigma^2 of the bias, [out] or a scalar; 0 without one.

    Returns:
        [..., out], or [..., 1] where all units have the same variance.
    """
    squares = tf.square(inputs)
    if kernel_variance.shape.rank == 0:
        shared = tf.reduce_sum(squares, axis=-1, keepdims=True)
        return kernel_variance * shared + bias_variance
    return tf.linalg.matmul(squares, kernel_variance) + bias_variance


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


def mean_sums(
    inputs: tf.Tensor, score: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Sums for dU/dmu: inputs [M, in] and scores of m [M, units].

    Returns:
        For the kernel [in, units] and for the bias [units].
    """
    kernel = tf.linalg.matmul(inputs, score, transpose_a=True)
    return kernel, tf.reduce_sum(score, axis=0)


def log_variance_sums(
    inputs: tf.Tensor,
    score: tf.Tensor,
    kernel_variance: tf.Tensor,
    bias_variance: tf.Tensor,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Sums for dU/dbeta: inputs [M, in] and scores of v [M, units].

    Returns:
        For the kernel, [in, units], or a scalar (the total) where all its
        weights share one variance; for the bias [units] or a scalar.
    """
    squares = tf.square(inputs)
    if kernel_variance.shape.rank == 0:
        shared = tf.linalg.matvec(
            score, tf.reduce_sum(squares, axis=-1), transpose_a=True
        )
        kernel = kernel_variance * tf.reduce_sum(shared)
    else:
        kernel = kernel_variance * tf.linalg.matmul(
            squares, score, transpose_a=True
        )
    bias = bias_variance * tf.reduce_sum(score, axis=0)
    if bias_variance.shape.rank == 0:
        bias = tf.reduce_sum(bias)
    return kernel, bias


class ActivationNoise:
    """The noise of the activations of one call of a layer.

    Args:
        inputs: A [batch, ..., in] in the mean network.
        units: number of units.
        variances: sigma^2 of the kernel, [in, out] or a scalar, and of the
            bias, [out] or a scalar, if there is one that is searched over.
        adapts: whether sigma is to be changed.
        mask: which positions count, [batch, ...]; `None`: all. The score of
            the others would be noise.

    Attributes:
        has_bias: whether there is a bias that is searched over.
        variance: v in the mean network.
    """

    def __init__(
        self,
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
        self._inputs = _finite(tf.cast(inputs, dtype))
        self._units = units
        self.variance = self.variance_of(self._inputs)

    def variance_of(self, inputs: tf.Tensor) -> tf.Tensor:
        """v from A: see `activation_variance`."""
        return activation_variance(
            inputs, self._kernel_variance, self._bias_variance
        )

    @property
    def shared(self) -> bool:
        """Whether the kernel has a single variance."""
        return self._kernel_variance.shape.rank == 0

    def shared_fisher(self) -> tf.Tensor:
        """Fisher information of a log variance that all weights share.

        It is that of each unit's log v, 1/2, for each example and position.
        """
        counted = tf.ones_like(self._inputs[..., 0])
        if self._mask is not None:
            counted = self._mask
        return 0.5 * self._units * tf.reduce_sum(counted)

    def sums(
        self,
        noise: tf.Tensor,
        record: tuple[tf.Tensor, ...],
        rows: Rows,
    ) -> list[tf.Tensor]:
        """Sums of the scores over a chunk of members, times utilities.

        Args:
            noise: xi [chunk, batch, ..., units]; the second of two signs has
                -xi.
            record: A and v of each member, [chunk, signs, batch, ..., in or
                units]; empty if they are the mean network's.
            rows: with utilities u [chunk, signs, batch].

        Returns:
            For the kernel, then for the bias if there is one: the sum for mu
            and, if sigma is to be changed, the sum for beta; and where each
            weight has a variance of its own, the sum of `_fisher`.
        """
        utilities = rows.utilities
        signs = utilities.shape[1]
        positions = [1] * (noise.shape.rank - 2)
        utilities = tf.reshape(
            utilities, tf.concat([tf.shape(utilities), positions], axis=0)
        )
        if self._mask is not None:
            utilities = utilities * self._mask
        noise = tf.stack([noise, -noise][:signs], axis=1)
        weighted = utilities * noise
        excess = utilities * (tf.square(noise) - 1.0)
        if record:
            inputs, variance = (_finite(values) for values in record)
        else:
            inputs, variance = self._inputs, self.variance
            weighted = tf.reduce_sum(weighted, axis=[0, 1])
            excess = tf.reduce_sum(excess, axis=[0, 1])
        flat, mean_score, variance_score = (
            tf.reshape(values, [-1, values.shape[-1]])
            for values in (inputs, *scores(weighted, excess, variance))
        )
        sums = [mean_sums(flat, mean_score)]
        if self._adapts:
            sums.append(
                log_variance_sums(
                    flat,
                    variance_score,
                    self._kernel_variance,
                    self._bias_variance,
                )
            )
            if not self.shared:
                sums.append(self._fisher(inputs, variance, rows.shares, signs))
        by_weight = list(zip(*sums, strict=True))
        return [
            term for terms in by_weight[: 1 + self.has_bias] for term in terms
        ]

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
        if inputs.shape.rank == self._inputs.shape.rank:
            weight = signs * tf.reduce_sum(shares)
        else:
            ones = [1] * (inputs.shape.rank - 1)
            weight = tf.reshape(shares, [-1, *ones])
        counted = weight * tf.ones_like(inputs[..., :1])
        if self._mask is not None:
            counted = counted * self._mask
        score = tf.math.divide_no_nan(0.5 * counted, variance)
        return log_variance_sums(
            tf.reshape(inputs, [-1, inputs.shape[-1]]),
            tf.reshape(score, [-1, self._units]),
            self._kernel_variance,
            self._bias_variance,
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
            For the kernel [chunk, in], then for the bias [chunk, 1].
        """
        inputs, variance = record or (self._inputs, self.variance)
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
        positions = [1] * (noise.shape.rank - 3)
        utilities = tf.reshape(
            utilities * signs[:, None],
            tf.concat([tf.shape(utilities), positions], axis=0),
        )
        if self._mask is not None:
            utilities = utilities * self._mask[..., 0]
        score, _ = scores(utilities * xi, xi, _finite(variance))
        count = tf.shape(units)[0]
        if record:
            rows = tf.reshape(_finite(inputs), [count, -1, inputs.shape[-1]])
            flat = tf.reshape(score, [count, -1])
            kernel = tf.matmul(flat[:, None], rows)[:, 0]
        else:
            flat = tf.reshape(tf.reduce_sum(score, axis=1), [count, -1])
            kernel = flat @ tf.reshape(inputs, [-1, inputs.shape[-1]])
        bias = tf.reduce_sum(flat, axis=1, keepdims=True)
        return [kernel, bias][: 1 + self.has_bias]


def column_squares(columns: tf.Tensor, units: int) -> tf.Tensor:
    """sum_n |c_n|^2 from one of its `units` columns a direction, [n, rows]."""
    return units * tf.reduce_sum(tf.square(columns))


def _finite(values: tf.Tensor) -> tf.Tensor:
    """Zeros in place of what is not finite: such members have no say."""
    return tf.where(tf.math.is_finite(values), values, 0)
