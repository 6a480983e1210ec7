"""VOOptimizer without a Keras model: steps, state, inner optimizers, errors."""

import copy as python_copy
import math

import keras
import models
import numpy as np
import pytest
import reference
import tensorflow as tf

import keras_vo
from keras_vo.search import noise

STRUCTURES = ["fixed", "isotropic", "layerwise", "separable"]
# Two "layers" (variables without a parent): sizes 2 and 1, d = 3.
GROUPS = {
    "fixed": [[0, 1, 2]],
    "isotropic": [[0, 1, 2]],
    "layerwise": [[0, 1], [2]],
    "separable": [[0], [1], [2]],
}


def make_variables(dtype="float64"):
    return [
        tf.Variable([1.0, -2.0], dtype=dtype),
        tf.Variable([0.5], dtype=dtype),
    ]


def objective(weights):
    """w0^2 + 2 w1^2 + 3 w2^2 + w0 w2"""
    (a, b), (c,) = tf.unstack(weights[0]), tf.unstack(weights[1])
    return a**2 + 2 * b**2 + 3 * c**2 + a * c


def objective_np(w):
    return w[0] ** 2 + 2 * w[1] ** 2 + 3 * w[2] ** 2 + w[0] * w[2]


def make(variance="layerwise", *, rate=1.0, inner=None, **kwargs):
    distribution = {
        key: kwargs.pop(key)
        for key in ("stddev", "learning_rate", "min_stddev", "max_stddev")
        if key in kwargs
    }
    kwargs.setdefault("seed", 3)
    kwargs.setdefault("population_size", 8)
    return keras_vo.VOOptimizer(
        inner or keras.optimizers.SGD(rate),
        search_distribution=keras_vo.GaussianSearchDistribution(
            variance, **{"stddev": 0.5, "learning_rate": 0.1} | distribution
        ),
        **kwargs,
    )


def flat(tensors):
    return np.concatenate([np.ravel(t) for t in tensors])


def noise_of(optimizer, generation, draws, dtype=tf.float64, size=3):
    return models.draw_noise(optimizer.seed, generation, draws, (size,), dtype)


# --- goldens ---

# Noise of three steps, one draw z each (members mu + sigma z, mu - sigma z).
GOLDEN_NOISE = [[1.0, 0.0, 2.0], [0.0, 1.0, -1.0], [2.0, 1.0, 0.0]]
# f(w) = w0 + 10 w1 + 100 w2 is linear, so the + member has the higher loss
# where 1, 10, 100 . z > 0: steps 1 and 3; in step 2, 10 - 100 < 0. Centred
# ranks of two members are 1/2 and -1/2, so with s = +1, -1, +1
#   (u+ - u-) = s, (u+ + u-) = 0,
#   natural gradient of mu = 1/2 s sigma z, regular = 1/2 s z / sigma,
#   gradient of beta = 0. With rate 1 and sigma = 1/2 at every step, mu moves
#   by -s z / 4 or -s z: in total -(z1 - z2 + z3) / 4 = -(3, 0, 3) / 4.
MU = {True: [-0.75, 0.0, -0.75], False: [-3.0, 0.0, -3.0]}
# Independent members with the same loss order: u = f itself less the other
# member's ("identity", N = 2), noise z and the next row below.
IID_NOISE = [
    [[1.0, 0.0, 2.0], [0.0, 1.0, 0.0]],
    [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]],
    [[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]],
]


@pytest.fixture
def fixed_noise(monkeypatch):
    """Lets a test say which noise generation t draws."""

    def use(rows):
        in_turn = iter(rows)

        def draw(base_seed, generation, index, shape, dtype, stream, **_):
            del base_seed, generation, index, stream
            values = np.reshape(next(in_turn), [-1, *shape])
            return tf.constant(values, dtype)

        monkeypatch.setattr(noise, "draw_noise", draw)

    return use


@pytest.mark.parametrize("natural", [True, False])
@pytest.mark.parametrize("variance", STRUCTURES)
def test_three_antithetic_steps_by_hand(variance, natural, fixed_noise):
    fixed_noise(GOLDEN_NOISE)
    variables = [tf.Variable(np.zeros(2)), tf.Variable(np.zeros(1))]
    optimizer = make(variance, population_size=2, natural_gradient=natural)
    for _ in range(3):
        optimizer.minimize(
            lambda w: w[0][0] + 10 * w[0][1] + 100 * w[1][0], variables
        )
    np.testing.assert_allclose(flat(variables), MU[natural], atol=1e-12)
    np.testing.assert_allclose(flat(optimizer.stddevs), 0.5, rtol=1e-12)


# f(w) = w0, sigma0 = 1, two independent members with noise a, b and losses
# a0, b0 (mu0 and sigma0 scale them alike): u = +-(fa - fb), and
#   natural beta_g = 1/(2 D) (fa - fb) (|a_g|^2 - |b_g|^2).
# Rates: mu 1, beta 0.1. Step 1: fa - fb = 1 (sigma = 1), a - b = (1, -1, 2),
# |a|^2 - |b|^2 = (1, -1, 4), so
#   mu = -1/2 (1, -1, 2)
#   beta: isotropic -0.1/6 * 4; layerwise 0, -0.1/2 * 4; separable
#         -0.05 (1, -1, 4).
# Step 2: a = (1, 1, 0), b = 0, fa - fb = sigma0; a - b = (1, 1, 0), squares
# (1, 1, 0). Step 3: a - b = (-1, 1, 1), fa - fb = -sigma0, squares
# (-1, 1, 1).
def test_three_independent_steps_by_hand(fixed_noise):
    first = {  # beta after step 1, from the rules above
        "isotropic": [-0.0666667] * 3,
        "layerwise": [0, 0, -0.2],
        "separable": [-0.05, 0.05, -0.2],
    }
    divisor = {"isotropic": [6] * 3, "layerwise": [4, 4, 2], "separable": [2]}
    sums = {  # |a_g|^2 - |b_g|^2 in steps 2 and 3
        "isotropic": ([2, 2, 2], [1, 1, 1]),
        "layerwise": ([2, 2, 0], [0, 0, 1]),
        "separable": ([1, 1, 0], [-1, 1, 1]),
    }
    for variance in STRUCTURES:
        beta = np.zeros(3)
        mu = np.array([-0.5, 0.5, -1.0])
        if variance != "fixed":
            beta = np.array(first[variance], float)
        for step, difference in ((0, [1, 1, 0]), (1, [-1, 1, 1])):
            sigma = np.exp(beta / 2)
            loss = sigma[0] * (1 if step == 0 else -1)
            mu = mu - 0.5 * loss * sigma * np.array(difference)
            if variance != "fixed":
                change = np.array(sums[variance][step]) * loss
                beta = beta - 0.1 * change / np.array(divisor[variance])
        fixed_noise(IID_NOISE)
        variables = [tf.Variable(np.zeros(2)), tf.Variable(np.zeros(1))]
        optimizer = make(
            variance,
            stddev=1.0,
            population_size=2,
            antithetic=False,
            fitness_shaping="identity",
        )
        for _ in range(3):
            optimizer.minimize(lambda w: w[0][0], variables)
        np.testing.assert_allclose(flat(variables), mu, atol=1e-6)
        np.testing.assert_allclose(
            flat(optimizer.stddevs), np.exp(beta / 2), rtol=1e-6
        )


@pytest.mark.parametrize(
    "case",
    list(
        models.pairwise(
            apart=("shaping", "variance"),  # losses know nothing of sigma
            shaping=list(reference.SHAPINGS),
            variance=STRUCTURES,
            natural=[True, False],
            antithetic=[True, False],
        )
    ),
    ids=models.name_of,
)
def test_steps_match_the_reference(case):
    shaping, variance, natural, antithetic = case.values()
    variables = make_variables()
    optimizer = make(
        variance,
        rate=0.125,
        natural_gradient=natural,
        antithetic=antithetic,
        fitness_shaping=shaping,
    )
    mu = flat(variables)
    beta = np.full(len(GROUPS[variance]), 2 * math.log(0.5))
    for generation in range(3):
        optimizer.minimize(objective, variables)
        mu, beta = reference.search_step(
            objective_np,
            mu,
            beta,
            noise_of(optimizer, generation, 4 if antithetic else 8),
            GROUPS[variance],
            shaping=shaping,
            natural=natural,
            antithetic=antithetic,
            rate=0.125,
            beta_rate=0.0 if variance == "fixed" else 0.1,
        )
    np.testing.assert_allclose(flat(variables), mu, rtol=1e-10)
    sigma = np.empty(3)
    for value, indices in zip(beta, GROUPS[variance], strict=True):
        sigma[indices] = math.exp(value / 2)
    np.testing.assert_allclose(flat(optimizer.stddevs), sigma, rtol=1e-10)


# --- ways to call ---


def run(steps=4, graph=True, variables=None, f=objective, **kwargs):
    variables = make_variables() if variables is None else variables
    optimizer = make(**kwargs)

    def step():
        return optimizer.minimize(f, variables)

    if graph:
        step = tf.function(step)
    means = [float(step()) for _ in range(steps)]
    return flat(variables), flat(optimizer.stddevs), means


def test_eager_is_graph_whatever_the_chunks_and_the_memory():
    want = run(steps=2, graph=False, population_size=14)
    for options in (
        {"chunk_size": 5},
        {"memory_budget": 1},  # draws every noise twice
    ):
        got = run(steps=2, population_size=14, **options)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10)


@pytest.mark.parametrize("population_size", [8, 70])
def test_an_eager_objective_is_called_once_a_member(population_size):
    calls = []

    def f(weights):
        calls.append(1)
        return objective(weights)

    make(population_size=population_size, chunk_size=10).minimize(
        f, make_variables()
    )
    assert len(calls) == population_size


def test_a_seed_is_a_trajectory():
    """Drawn from Python's random numbers, or given."""

    def end(seed=None):
        return run(steps=1, graph=False, seed=seed)[0]

    keras.utils.set_random_seed(5)
    first = end()
    assert np.all(end() != first)
    keras.utils.set_random_seed(5)
    np.testing.assert_array_equal(end(), first)
    assert np.all(end(2**63 - 1) != first)


def test_keras_variables_and_numpy_objectives():
    def simulator(weights):
        w = np.concatenate([v.numpy() for v in weights])
        return float(objective_np(w))

    variables = [keras.Variable(v, dtype="float64") for v in make_variables()]
    want = run(steps=2, graph=False)[0]
    got = run(steps=2, graph=False, variables=variables, f=simulator)[0]
    np.testing.assert_allclose(got, want, rtol=1e-10)

    def in_graph(weights):
        w = tf.concat(weights, 0)
        value = tf.numpy_function(objective_np, [w], tf.float64)
        return tf.ensure_shape(value, [])

    got = run(steps=2, f=in_graph)[0]
    np.testing.assert_allclose(got, want, rtol=1e-10)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_lower_precision(dtype):
    """f falls from 10.25 to less than a quarter; seeds 0 to 9: 1.1 at most."""
    variables = make_variables(dtype)
    weights, _, _ = run(variables=variables, rate=0.5, steps=30)
    assert objective_np(weights.astype("float64")) < 2.5
    assert variables[0].dtype.name == dtype


@pytest.mark.parametrize("dtype", [tf.int32, tf.bool])
def test_losses_need_not_be_floating(dtype):
    def f(weights):
        return tf.cast(weights[0][0] > 1.0, dtype)

    weights, _, means = run(f=f, steps=30, rate=0.2)
    assert weights[0] < 1.0 and means[-1] < means[0]


# --- inner optimizers ---


@pytest.mark.parametrize(
    "make_inner, graph",
    [
        (lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True), False),
        (lambda: keras.optimizers.AdamW(0.1, weight_decay=0.2), True),
        (lambda: keras.optimizers.SGD(0.5, clipnorm=0.1), False),
        (lambda: keras.optimizers.SGD(0.5, global_clipnorm=0.1), False),
        (lambda: keras.optimizers.SGD(0.5, clipvalue=0.05), False),
        (
            lambda: keras.optimizers.SGD(
                keras.optimizers.schedules.PiecewiseConstantDecay(
                    [1, 2], [0.5, 0.1, 0.01]
                )
            ),
            True,
        ),
        (
            lambda: keras.optimizers.Adam(
                0.1, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2
            ),
            True,
        ),
        (
            lambda: keras.optimizers.RMSprop(
                0.1, use_ema=True, ema_momentum=0.8
            ),
            False,
        ),
    ],
    ids="momentum adamw norm global value schedule ema2 ema".split(),
)
def test_the_inner_optimizer_acts_as_on_any_gradient(make_inner, graph):
    """Beside: the same optimizer, given the reference's search gradient."""
    variables, twins = make_variables(), make_variables()
    optimizer = make("fixed", inner=make_inner())
    inner = make_inner()

    def step():
        return optimizer.minimize(objective, variables)

    step = tf.function(step) if graph else step
    for generation in range(4):
        moved, _ = reference.search_step(
            objective_np,
            flat(twins),
            np.array([2 * math.log(0.5)]),
            noise_of(optimizer, generation, 4),
            GROUPS["fixed"],
            beta_rate=0.0,
        )
        gradient = flat(twins) - moved
        inner.apply([gradient[:2], gradient[2:]], twins)
        step()
        np.testing.assert_allclose(flat(variables), flat(twins), rtol=1e-6)
    optimizer.finalize_variable_values(variables)
    inner.finalize_variable_values(twins)
    np.testing.assert_allclose(flat(variables), flat(twins), rtol=1e-6)
    assert int(optimizer.iterations) == int(optimizer.generations) == 4


def test_learning_rate_is_the_inner_optimizers():
    optimizer = keras_vo.VOOptimizer("sgd")
    assert isinstance(optimizer.inner_optimizer, keras.optimizers.SGD)
    optimizer.learning_rate = 0.25
    assert float(optimizer.inner_optimizer.learning_rate) == 0.25
    assert float(optimizer.learning_rate) == 0.25


@pytest.mark.parametrize(
    "inner, more, message",
    [
        (
            keras.optimizers.SGD(0.1, gradient_accumulation_steps=2),
            {},
            "gradient_accumulation_steps=2",
        ),
        (
            keras.optimizers.SGD(0.1, loss_scale_factor=8.0),
            {},
            "loss_scale_factor=8.0",
        ),
        (
            keras.optimizers.SGD(0.1, use_ema=True),
            {"max_kl": 1.0},
            "max_kl=1.0 and use_ema=True",
        ),
        (keras_vo.VOOptimizer(), {}, "moves weights by a gradient"),
        (
            keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)),
            {},
            "moves weights by a gradient",
        ),
        ("steepest", {}, "steepest"),
    ],
)
def test_inner_optimizers_that_cannot_work(inner, more, message):
    with pytest.raises(ValueError, match=message):
        keras_vo.VOOptimizer(inner, **more)


# --- bounds ---


@pytest.mark.parametrize(
    "variance, max_kl",
    [
        ("fixed", 0.05),
        ("isotropic", 1e-4),
        ("layerwise", 0.05),
        ("separable", 1e-4),
        ("separable", 1e4),
    ],
)
def test_max_kl_bounds_the_step_really_taken(variance, max_kl):
    inner = keras.optimizers.AdamW(0.3, weight_decay=0.1)
    variables = make_variables()
    optimizer = make(variance, inner=inner, learning_rate=2.0, max_kl=max_kl)
    optimizer.build(variables)
    for _ in range(3):
        before = flat(variables), flat(optimizer.stddevs)
        optimizer.minimize(objective, variables)
        divergence = reference.kl_divergence(
            *before, flat(variables), flat(optimizer.stddevs)
        )
        assert divergence <= max_kl * (1 + 1e-9)
        if max_kl < 1:
            assert divergence > 0.99 * max_kl
    if max_kl > 1:
        free = make(
            variance,
            inner=keras.optimizers.AdamW(0.3, weight_decay=0.1),
            learning_rate=2.0,
        )
        others = make_variables()
        for _ in range(3):
            free.minimize(objective, others)
        np.testing.assert_array_equal(flat(others), flat(variables))


@pytest.mark.parametrize("variance", ["isotropic", "layerwise", "separable"])
def test_sigma_stays_within_its_bounds(variance):
    _, stddevs, _ = run(
        variance=variance,
        learning_rate=50.0,
        min_stddev=0.4,
        max_stddev=0.6,
        steps=6,
        graph=False,
    )
    assert np.all(stddevs >= 0.4 - 1e-9) and np.all(stddevs <= 0.6 + 1e-9)
    assert np.any(np.isin(stddevs.round(9), [0.4, 0.6]))


def test_fixed_sigma_is_never_changed():
    np.testing.assert_allclose(
        run(variance="fixed", learning_rate=50.0, graph=False)[1],
        np.full(3, 0.5),
        1e-15,
    )


def test_stddevs_have_the_shapes_of_the_variables():
    for variance in STRUCTURES:
        optimizer = make(variance)
        with pytest.raises(ValueError, match="built"):
            optimizer.stddevs  # noqa: B018
        optimizer.build([tf.Variable(tf.zeros([2, 3])), tf.Variable(0.0)])
        assert [tuple(s.shape) for s in optimizer.stddevs] == [(2, 3), ()]


# --- losses that are not finite ---


@pytest.mark.parametrize(
    "shaping, bad",
    [
        ("identity", math.nan),
        ("identity", -math.inf),
        ("standardize", math.inf),
        ("centered_rank", -math.inf),
        ("nes", math.nan),
    ],
)
def test_a_non_finite_member_counts_as_the_worst(bad, shaping):
    """The step equals one in which that member's loss is the worst."""
    ranked = shaping in ("centered_rank", "nes")

    def run_with(replace):
        variables = make_variables()
        optimizer = make(
            fitness_shaping=shaping, antithetic=False, population_size=4
        )
        calls = []

        def f(weights):
            value = float(objective(weights))
            calls.append(value)
            return replace(calls)

        generation = optimizer.step(f, variables)
        return flat(variables), generation

    _, plain = run_with(lambda calls: calls[-1])
    losses = plain.losses.numpy()
    worst = np.delete(losses, 1).max() + (1.0 if ranked else 0.0)
    got, generation = run_with(
        lambda calls: bad if len(calls) == 2 else calls[-1]
    )
    want, _ = run_with(lambda calls: worst if len(calls) == 2 else calls[-1])
    np.testing.assert_allclose(got, want, rtol=1e-12)
    assert int(generation.nonfinite_members) == 1
    np.testing.assert_allclose(
        generation.mean_loss, np.delete(losses, 1).mean()
    )


@pytest.mark.parametrize("graph", [True, False])
def test_a_step_without_any_finite_loss_changes_nothing(graph):
    variables = make_variables()
    optimizer = make(
        inner=keras.optimizers.Adam(0.1, weight_decay=0.1), max_kl=1.0
    )
    scale = tf.Variable(1.0, dtype=tf.float64)

    def step():
        return optimizer.step(lambda w: objective(w) * scale, variables)

    if graph:
        step = tf.function(step)
    first = step()
    state = [v.numpy() for v in (*variables, *optimizer.variables)]
    scale.assign(math.nan)
    empty = step()
    assert int(empty.nonfinite_members) == 8
    assert math.isnan(empty.mean_loss)
    changed = [
        getattr(v, "path", v.name)
        for v, old in zip(
            (*variables, *optimizer.variables), state, strict=True
        )
        if np.any(v.numpy() != old)
    ]
    # Only the counter that gives the next population other noise.
    assert len(changed) == 1 and changed[0].endswith("/iteration")
    assert int(optimizer.iterations) == 1 and int(optimizer.generations) == 2
    scale.assign(1.0)
    assert np.all(step().losses.numpy() != first.losses.numpy())


# --- saving ---


def test_a_resumed_search_is_the_uninterrupted_one():
    """Without a model; of models see test_conformance.py."""
    variables = make_variables()
    optimizer = make("separable", inner=keras.optimizers.Adam(0.1))
    store = {}
    for step in range(4):
        if step == 2:
            optimizer.save_own_variables(store)
            resumed = [tf.Variable(v) for v in variables]
        optimizer.minimize(objective, variables)
    copy = keras_vo.VOOptimizer.from_config(optimizer.get_config())
    copy.build(resumed)
    copy.load_own_variables(store)
    for _ in range(2):
        copy.minimize(objective, resumed)
    np.testing.assert_array_equal(flat(resumed), flat(variables))
    np.testing.assert_array_equal(flat(copy.stddevs), flat(optimizer.stddevs))


@keras.saving.register_keras_serializable(package="keras_vo_tests")
def sign_shaping(losses):
    return tf.sign(losses - tf.reduce_mean(losses))


def test_config_round_trip():
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 100)
    original = keras_vo.VOOptimizer(
        keras.optimizers.AdamW(schedule, weight_decay=0.3),
        24,
        keras_vo.GaussianSearchDistribution("separable", 0.3, 0.7, 0.1, 2.0),
        natural_gradient=False,
        antithetic=False,
        fitness_shaping=sign_shaping,
        max_kl=0.5,
        seed=11,
        chunk_size=4,
        memory_budget=1000,
        name="mine",
    )
    config = keras.optimizers.serialize(original)
    copy = keras.optimizers.deserialize(python_copy.deepcopy(config))
    assert keras.optimizers.serialize(copy) == config
    assert copy.fitness_shaping is sign_shaping
    assert copy.inner_optimizer.weight_decay == 0.3
    default = keras_vo.VOOptimizer()
    assert (
        keras_vo.VOOptimizer.from_config(default.get_config()).get_config()
        == default.get_config()
    )


# --- bad input ---


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"population_size": 7}, "even integer.*population_size=7"),
        ({"population_size": 1, "antithetic": False}, "population_size=1"),
        ({"population_size": 0}, "population_size=0"),
        ({"population_size": 8.0}, "population_size=8.0"),
        ({"inner_optimizer": "adamm"}, "name of one.*'adamm'"),
        ({"search_distribution": "full"}, "layerwise.*'full'"),
        ({"fitness_shaping": "best"}, "centered_rank.*'best'"),
        ({"max_kl": 0}, "`max_kl` must be a positive.*max_kl=0"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"chunk_size": 0.5}, "`chunk_size` must be an integer.*=0.5"),
        ({"memory_budget": float("inf")}, "memory_budget=inf"),
        ({"memory_budget": -5}, "memory_budget=-5"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"learning_rate": 0.1}, "inner_optimizer.*learning_rate"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        keras_vo.VOOptimizer(**arguments)
    if "population_size" in arguments and arguments["population_size"] == 7:
        keras_vo.VOOptimizer(population_size=7, antithetic=False)


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize(
    "f, message",
    [
        (lambda w: w[0], r"scalar.*shape \(2,\)"),
        (lambda w: None, "scalar.*None"),
        (lambda w: w[0][:1], r"scalar.*shape \(1,\)"),
    ],
)
def test_bad_objectives(f, message, graph):
    with pytest.raises(ValueError, match=message):
        run(f=f, graph=graph)


def test_bad_variables():
    with pytest.raises(ValueError, match="at least one trainable"):
        make().minimize(objective, [])
    with pytest.raises(ValueError, match="floating.*'steps.*int32"):
        make().minimize(objective, [tf.Variable([1], name="steps")])
    optimizer = make()
    variables = make_variables()
    optimizer.minimize(objective, variables)
    with pytest.raises(ValueError, match="built with.*Received"):
        optimizer.minimize(objective, make_variables())
    with pytest.raises(ValueError, match="built with.*Received"):
        optimizer.minimize(objective, variables[::-1])


def test_a_callable_shaping_of_the_wrong_shape():
    with pytest.raises(ValueError, match=r"shape \(8,\).*shape \(7,\)"):
        run(fitness_shaping=lambda losses: losses[1:])


def test_gradients_from_another_training_step():
    for call in (
        lambda o: o.scale_loss(tf.constant(1.0)),
        lambda o: o.apply([tf.zeros([2])], make_variables()[:1]),
        lambda o: o.apply_gradients([(tf.zeros([2]), make_variables()[0])]),
    ):
        with pytest.raises(
            ValueError, match="VOModel.*VOTrainStep.*make_variational"
        ):
            call(make())
