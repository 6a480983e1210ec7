"""Members and mean satisfy the constraints of their variables."""

import keras
import models
import numpy as np
import pytest
import tensorflow as tf

import keras_vo
from keras_vo import constraints
from keras_vo.search.gaussian import Gaussian
from keras_vo.search.layout import WeightLayout
from keras_vo.search.rules import MaxKL, Proposal, Step

MAX_KL = 0.3


@keras.saving.register_keras_serializable("test_constraints")
class Centered(keras.constraints.Constraint):
    """Columns of mean 0: a linear space, and a user's own constraint."""

    def __call__(self, w):
        return w - keras.ops.mean(w, axis=0, keepdims=True)


def _between(least, most):
    def satisfied(w):
        norms = tf.norm(w, axis=0)
        rounding = 1e-5
        return tf.reduce_all(
            (norms >= least - rounding) & (norms <= most + rounding)
        )

    return satisfied


# A constraint, and whether a weight satisfies it.
CONSTRAINTS = {
    "non_neg": (
        keras.constraints.NonNeg(),
        lambda w: tf.reduce_all(w >= 0),
    ),
    "max_norm": (keras.constraints.MaxNorm(0.6), _between(0.0, 0.6)),
    "unit_norm": (keras.constraints.UnitNorm(), _between(1.0, 1.0)),
    "min_max_norm": (
        keras.constraints.MinMaxNorm(0.4, 0.8),
        _between(0.4, 0.8),
    ),
    "own": (
        Centered(),
        lambda w: tf.reduce_all(tf.abs(tf.reduce_mean(w, axis=0)) < 1e-5),
    ),
}


def where_satisfied(name, value, weight):
    """`value`, NaN if the weight does not satisfy the constraint.

    With `non_neg` by itself, by a square root.
    """
    if name == "non_neg":
        return value + 0.0 * tf.reduce_sum(tf.sqrt(weight))
    nan = tf.constant(np.nan, value.dtype)
    return tf.where(CONSTRAINTS[name][1](weight), value, nan)


def values(variable):
    return tf.convert_to_tensor(variable).numpy()


def divergence(before, sigmas, after, new_sigmas):
    """KL(N(mu, sigma^2) || N(mu', sigma'^2)) in nats, in float64."""
    total = 0.0
    for mu, s, mu2, s2 in zip(before, sigmas, after, new_sigmas, strict=True):
        mu, s, mu2, s2 = (np.asarray(a, "float64") for a in (mu, s, mu2, s2))
        terms = np.log(s2 / s) + (s**2 + (mu - mu2) ** 2) / (2 * s2**2) - 0.5
        total += terms.sum()
    return total


class Steps:
    """Looks at each step of a search over variables."""

    def __init__(self, optimizer, variables):
        self.optimizer, self.variables = optimizer, variables
        self.divergences = []
        self.keep()

    def keep(self):
        self.before = [values(v) for v in self.variables]
        self.sigmas = [s.numpy() for s in self.optimizer.stddevs]

    def step(self):
        after = [values(v) for v in self.variables]
        new = [s.numpy() for s in self.optimizer.stddevs]
        self.divergences.append(
            divergence(self.before, self.sigmas, after, new)
        )
        self.keep()

    def check(self, max_kl):
        """Steps that the bound leaves out of the set, without it go far."""
        assert len(self.divergences) > 5
        if max_kl is None:
            assert max(self.divergences) > MAX_KL
        else:
            assert max(self.divergences) <= max_kl * (1 + 1e-4)


def start():
    """A weight [4, 3], in no set, as initial ones are."""
    return np.random.default_rng(0).normal(size=(4, 3)).astype("float32")


@pytest.mark.parametrize(
    "name, max_kl, graph", [("non_neg", MAX_KL, False), ("own", None, True)]
)
def test_minimize(name, max_kl, graph):
    """Each member is in the set, and after each step the mean; f falls."""
    constraint, satisfied = CONSTRAINTS[name]
    goal = values(constraint(start()[::-1]))
    w = keras.Variable(start())
    w.constraint = constraint
    free = tf.Variable([1.0, -1.0])
    optimizer = models.make_optimizer(
        inner_optimizer=keras.optimizers.Adam(0.2),
        population_size=32,
        max_kl=max_kl,
    )
    optimizer.build([w, free])

    def distance(weights):
        return tf.reduce_sum(tf.square(weights[0] - goal)) + tf.reduce_sum(
            tf.square(weights[1])
        )

    def take_step():
        return optimizer.step(
            lambda weights: where_satisfied(
                name, distance(weights), weights[0]
            ),
            [w, free],
        ).losses

    if graph:
        take_step = tf.function(take_step, autograph=False)
    first = distance([tf.convert_to_tensor(w), free])
    steps = Steps(optimizer, [w, free])
    for _ in range(20):
        assert np.isfinite(take_step()).all()
        assert satisfied(tf.convert_to_tensor(w))
        steps.step()
    steps.divergences.pop(0)  # the first step is one into the set
    steps.check(max_kl)
    assert distance([tf.convert_to_tensor(w), free]) < 0.6 * first


def dense(base, name, **kwargs):
    """A layer whose outputs are NaN unless its weights satisfy theirs."""

    class Checked(base):
        def call(self, inputs, training=None):
            outputs = super().call(inputs, training=training)
            outputs = where_satisfied(
                name, outputs, tf.convert_to_tensor(self.kernel)
            )
            bias = tf.convert_to_tensor(self.bias)
            return outputs + 0.0 * tf.reduce_sum(tf.sqrt(bias))

    return Checked(
        3,
        kernel_constraint=CONSTRAINTS[name][0],
        bias_constraint="non_neg",
        **kwargs,
    )


@pytest.mark.parametrize(
    "base, name, max_kl, how",
    [
        (keras.layers.Dense, "max_norm", None, {"run_eagerly": True}),
        (keras.layers.Dense, "unit_norm", MAX_KL, {"jit_compile": True}),
        (keras.layers.Dense, "own", None, {}),
        # The kernel W + sigma E is formed, and projected.
        (keras_vo.layers.LowRankDense, "min_max_norm", MAX_KL, {}),
    ],
)
def test_fit(base, name, max_kl, how):
    """Steps of a layer whose constraints hold at the start."""
    x, y = models.make_data(48)
    optimizer = models.make_optimizer(
        inner_optimizer=keras.optimizers.Adam(0.1),
        population_size=32,
        max_kl=max_kl,
    )
    model = models.make_model(
        [dense(base, name), keras.layers.Softmax()], optimizer, **how
    )
    layer = model.layers[0]
    layer.kernel.assign(CONSTRAINTS[name][0](layer.kernel))
    steps = Steps(optimizer, model.trainable_variables)

    def look(batch, logs):
        steps.step()
        assert CONSTRAINTS[name][1](tf.convert_to_tensor(layer.kernel))
        assert values(layer.bias).min() >= 0

    history = models.fit(
        model,
        x,
        y,
        epochs=3 if "run_eagerly" in how else 10,
        batch_size=24 if "run_eagerly" in how else 12,
        callbacks=[keras.callbacks.LambdaCallback(on_train_batch_end=look)],
    )
    assert history["nonfinite_members"][-1] == 0
    assert history["loss"][-1] < history["loss"][0] - 0.1
    steps.check(max_kl)


def test_low_rank_stays_low_rank():
    """That of r (in + out) normals, and of the bias."""
    x, y = models.make_data(8)
    sizes = []

    class Optimizer(keras_vo.VOOptimizer):
        def search(self, *args):
            search, perturbations = super().search(*args)
            sizes.append(perturbations.at("member").noise_size)
            return search, perturbations

    model = models.make_model(
        [keras_vo.layers.LowRankDense(3, kernel_constraint="non_neg")],
        Optimizer(population_size=4),
    )
    model.train_on_batch(x, y)
    assert sizes[0] == sizes[-1] == 4 + 3 + 3


@pytest.mark.parametrize("which", ["kernel_constraint", "bias_constraint"])
def test_local_reparameterization_refuses(which):
    """Before anything is lost; where nothing is searched over, it does not."""
    x, y = models.make_data()
    layer = keras_vo.layers.LocalReparamDense(
        5, name="hidden", **{which: "non_neg"}
    )
    model = models.make_model([layer, keras.layers.Dense(3)])
    before = models.weights(model)
    with pytest.raises(
        ValueError,
        match=r"'hidden'.*no constraint.*Expected: LowRankDense or Dense"
        r".*Received: '.*hidden/.*' with <.*NonNeg",
    ):
        model.train_on_batch(x, y)
    np.testing.assert_array_equal(models.weights(model), before)
    assert model.optimizer.iterations == 0

    layer.trainable = False
    model.compile(optimizer=models.make_optimizer(), loss="mse")
    model.train_on_batch(x, y)
    assert model.optimizer.iterations == 1


def test_raw_tensorflow_variables():
    """Keras applies their constraints to the mean, members have them too."""
    seen = []
    w = tf.Variable([0.1, 3.0], constraint=lambda w: tf.clip_by_value(w, 0, 1))
    optimizer = models.make_optimizer(max_kl=MAX_KL, population_size=64)

    def f(weights):
        seen.append(weights[0].numpy())
        return tf.reduce_sum(weights[0])

    optimizer.minimize(f, [w])
    assert np.min(seen) == 0 and np.max(seen) == 1
    assert 0 <= np.min(w) and np.max(w) <= 1


def test_gradient_is_that_of_what_members_see():
    """f(P(w)) = -max(w, 0): dU/dmu = -Phi(mu / sigma).

    N = 40000 independent members; the terms (f - mean) z / sigma have
    variances of at most 2.84 (of 4 million), so that 0.04 is 4.7 standard
    errors: a false failure in 10^5 or less for all three weights. Without the
    projection of members each would be 1.
    """
    mu, sigma = np.array([0.0, 0.3, 0.6], "float32"), 0.3
    w = keras.Variable(mu)
    w.constraint = keras.constraints.NonNeg()
    optimizer = keras_vo.VOOptimizer(
        keras.optimizers.SGD(1.0),
        population_size=40000,
        search_distribution=keras_vo.GaussianSearchDistribution(
            "fixed", stddev=sigma
        ),
        natural_gradient=False,
        antithetic=False,
        fitness_shaping="identity",
        seed=3,
    )
    tf.function(
        lambda: optimizer.minimize(
            lambda weights: -tf.reduce_sum(weights[0]), [w]
        )
    )()
    want = [0.5, 0.84134, 0.97725]  # Phi(0), Phi(1), Phi(2)
    np.testing.assert_allclose(values(w) - mu, want, atol=0.04)


# --- the bound on the KL divergence ---


def propose(rule, old, new, stddev=1.0):
    """The mean that the rule makes of a move, and the KL of its step."""
    old = tf.constant(old, tf.float64)
    layout = WeightLayout((tuple(old.shape),), ("float64",), (0,))
    beta = tf.constant([2 * np.log(stddev)], tf.float64)
    gaussian = Gaussian(layout, [old], beta)
    step = Step(gaussian, None, tf.constant(0))
    moved = tf.constant(np.ravel(new), tf.float64)
    proposal = rule.propose(step, Proposal(moved, beta), {})
    kl = gaussian.kl(proposal.mean - gaussian.mean, proposal.log_variance)
    return proposal.mean.numpy(), float(kl), float(proposal.fraction)


def unit(vector):
    return vector / tf.norm(vector)


def test_shrunk_on_a_circle():
    """Half a turn is shrunk along the chord, and back on the circle.

    A chord of length c has KL c^2 / 2.
    """
    angle = 2.0
    new = [np.cos(angle), np.sin(angle)]
    mean, kl, fraction = propose(MaxKL(0.1, unit), [1.0, 0.0], new)
    assert 0 < fraction < 1
    assert 0.099 < kl <= 0.1
    np.testing.assert_allclose(np.linalg.norm(mean), 1, rtol=1e-12)
    # The whole move is within the bound: not a bit of it is changed.
    mean, _, fraction = propose(MaxKL(10.0, unit), [1.0, 0.0], new)
    assert fraction == 1
    np.testing.assert_array_equal(mean, new)


def test_projection_that_raises_the_divergence():
    """To the grid of integers, from 0 to 3: only 0 and 1 are within .5."""
    mean, kl, _ = propose(MaxKL(0.5, tf.round), [0.0], [3.0])
    assert (mean, kl) == (1.0, 0.5)
    mean, kl, _ = propose(MaxKL(0.4, tf.round), [0.0], [3.0])
    assert (mean, kl) == (0.0, 0.0)


def test_start_outside_of_the_set():
    """Its projection is all that is done, be it beyond the bound."""
    mean, kl, _ = propose(MaxKL(0.1, tf.nn.relu), [-2.0, 1.0], [5.0, 0.0])
    np.testing.assert_allclose(mean, [0.0, 1.0], atol=1e-9)
    np.testing.assert_allclose(kl, 2.0, rtol=1e-6)


def test_projection_of_all_weights():
    free, bound = tf.Variable([-1.0]), keras.Variable([[-1.0, 2.0]])
    layout = keras_vo.GaussianSearchDistribution().layout([free, bound])
    assert constraints.projection([free, bound], layout) is None
    bound.constraint = keras.constraints.NonNeg()
    project = constraints.projection([free, bound], layout)
    got = project(tf.constant([-1.0, -1.0, 2.0]))
    np.testing.assert_array_equal(got, [-1.0, 0.0, 2.0])


def test_constraint_of_another_shape():
    w = tf.Variable([1.0, 2.0], constraint=lambda w: w[:1])
    optimizer = models.make_optimizer()
    with pytest.raises(
        ValueError, match=r"the shape of the weight, \(2,\).*of shape \(1,\)"
    ):
        optimizer.minimize(lambda weights: tf.reduce_sum(weights[0]), [w])
    np.testing.assert_array_equal(w, [1.0, 2.0])


# --- replicas ---


def test_two_replicas_are_one():
    constraint = keras.constraints.MaxNorm(0.6)

    def run(strategy):
        with models.scope(strategy):
            w = keras.Variable(start())
            w.constraint = constraint
            raw = tf.Variable(
                [0.5, 0.5],
                constraint=tf.nn.relu,
                aggregation=tf.VariableAggregation.MEAN,
            )
            optimizer = models.make_optimizer(
                inner_optimizer=keras.optimizers.Adam(0.2),
                max_kl=MAX_KL,
                exchange="fitness",
            )

        @tf.function(autograph=False)
        def step():
            return optimizer.minimize(
                lambda weights: sum(tf.reduce_sum(v) for v in weights),
                [w, raw],
            )

        for _ in range(6):
            step()
            assert _between(0.0, 0.6)(tf.convert_to_tensor(w))
            assert values(raw).min() >= 0
        if strategy:
            models.assert_replicas_are_equal(strategy, [w.value, raw])
        return values(w), values(raw)

    two, one = run(models.mirrored(2)), run(None)
    for got, want in zip(two, one, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
