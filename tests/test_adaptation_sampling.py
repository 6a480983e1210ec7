"""Learning rates that adapt to what weighted members say."""

import keras
import models
import numpy as np
import pytest
import tensorflow as tf
from models import assert_replicas_are_equal, mirrored, scope

import keras_vo
from keras_vo.search import layout
from keras_vo.search.adaptation_sampling import mann_whitney, threshold
from keras_vo.search.gaussian import Gaussian

# --- the test ---


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("missing", [False, True])
def test_mann_whitney_against_scipy(ties, missing):
    """Weights of 0 and c are a sample of fewer members."""
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for _ in range(20):
        losses = rng.normal(size=15)
        if ties:
            losses = np.round(losses)
        known = rng.random(15) < 0.7 if missing else np.ones(15, bool)
        known[:4] = True
        weights = 0.3 * (rng.random(15) < 0.6)
        weights[:2] = 0.3
        got = mann_whitney(
            tf.constant(np.where(known, losses, np.nan)),
            tf.constant(weights),
            tf.constant(known),
        )
        want = stats.mannwhitneyu(
            losses[known & (weights > 0)],
            losses[known],
            alternative="less",
            use_continuity=False,
            method="asymptotic",
        ).pvalue
        np.testing.assert_allclose(got, want, rtol=1e-9)


def test_mann_whitney_of_losses_that_are_not_finite_or_all_equal():
    known = tf.constant([True] * 4)
    ranks = tf.constant([1.0, 2.0, 3.0, 4.0], tf.float64)
    weights = tf.constant([4.0, 3.0, 2.0, 1.0], tf.float64)
    infinite = tf.constant([1.0, 2.0, 3.0, np.inf], tf.float64)
    np.testing.assert_allclose(
        mann_whitney(infinite, weights, known),
        mann_whitney(ranks, weights, known),
    )
    assert mann_whitney(ranks, weights, known) < 0.5
    assert mann_whitney(-ranks, weights, known) > 0.5
    for dtype in ("float32", "float64"):
        ones = tf.ones([127], dtype)
        rising = tf.linspace(tf.zeros([], dtype), 1.0, 127)
        assert mann_whitney(ones, rising, ones > 0) == 0.5
        even = float(mann_whitney(rising, ones, ones > 0))
        assert abs(even - 0.5) < 1e-9


def test_infinite_losses_among_missing_ones():
    losses = np.array([1, 2, 3, 4, np.inf, np.nan, np.inf, np.nan, np.inf, 5])
    weights = np.linspace(1.0, 0.05, 10)
    order = np.argsort(losses)  # what is missing last
    found = [
        mann_whitney(tf.constant(f), tf.constant(w), tf.constant(~np.isnan(f)))
        for f, w in (
            (losses, weights),
            (losses[order], weights[order]),
            (losses[order][:8], weights[order][:8]),
        )
    ]
    np.testing.assert_allclose(found, found[0])


def test_threshold():
    np.testing.assert_allclose([threshold(1), threshold(9)], [1 / 3, 14 / 30])


# --- densities ---


def densities(mean, stddev, x):
    terms = -0.5 * ((x - mean) / stddev) ** 2 - np.log(stddev)
    return terms.sum(-1)


@pytest.mark.parametrize("groups", [(0, 0), (0, 1), None])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("signs", [(1.0,), (1.0, -1.0)])
def test_log_ratios_against_numpy(groups, scaled, signs):
    weights = layout.WeightLayout(((2, 3), (4,)), ("float64",) * 2, groups)
    rng = np.random.default_rng(0)
    mean, new = rng.normal(size=(2, 10))
    beta, new_beta = rng.normal(size=(2, weights.num_groups))
    s = rng.uniform(0.5, 2, size=10) if scaled else np.ones(10)

    def gaussian(mean, beta):
        return Gaussian(
            weights,
            weights.unflatten(tf.constant(mean)),
            tf.constant(beta),
            tf.constant(s) if scaled else None,
        )

    def stddev(beta):
        by_weight = weights.expand(tf.constant(np.exp(beta / 2)))
        return np.broadcast_to(by_weight, 10) / s

    z = rng.normal(size=(5, 10))
    x = np.stack([mean + sign * stddev(beta) * z for sign in signs])
    want = densities(new, stddev(new_beta), x)
    want -= densities(mean, stddev(beta), x)
    one, other = gaussian(mean, beta), gaussian(new, new_beta)
    got = one.log_ratios(tf.constant(z), signs, other)
    np.testing.assert_allclose(got, want, rtol=1e-9)
    some = [g.select([1]) for g in (one, other)]
    part = x[..., 6:]
    want = densities(new[6:], stddev(new_beta)[6:], part)
    want -= densities(mean[6:], stddev(beta)[6:], part)
    got = some[0].log_ratios(tf.constant(z[:, 6:]), signs, some[1])
    np.testing.assert_allclose(got, want, rtol=1e-9)


# --- steps ---

MEMBERS = 12


def objective(weights):
    return tf.reduce_sum((weights[0] - 1.0) ** 2) + tf.reduce_sum(
        tf.abs(weights[1])
    )


def variables_of_a_search(dtype="float64"):
    return [
        tf.Variable(tf.zeros([2, 3], dtype)),
        tf.Variable(tf.ones([3], dtype)),
    ]


def search(inner=None, variance="layerwise", **arguments):
    arguments = {"adaptation_sampling": True, "seed": 3} | arguments
    return keras_vo.VOOptimizer(
        inner or keras.optimizers.SGD(0.1),
        MEMBERS,
        variance
        if isinstance(variance, keras_vo.GaussianSearchDistribution)
        else keras_vo.GaussianSearchDistribution(variance, 0.5, 0.1),
        **arguments,
    )


def flat(tensors):
    return np.concatenate([np.ravel(t) for t in tensors])


def p_of(losses, ratios):
    """Without ties but those of a member with itself, by plain loops."""
    weights = np.exp(ratios - ratios.max())
    share = weights / weights.sum()
    n, size = len(losses), 1 / np.sum(share**2)
    u = sum(
        share[j] * ((losses[j] < losses[i]) + 0.5 * (i == j))
        for i in range(n)
        for j in range(n)
    )
    ties = sum((1 + size * w) ** 3 - (1 + size * w) for w in share)
    total = n + size
    variance = total + 1 - ties / (total * (total - 1))
    z = (u / n - 0.5) / np.sqrt(variance / (12 * n * size))
    return 0.5 * tf.math.erfc(z / np.sqrt(2)).numpy()


@pytest.mark.parametrize("variance", ["isotropic", "separable", "fixed"])
def test_rates_against_numpy(variance):
    """Each step asks the population about the step before it."""
    variables, optimizer = variables_of_a_search(), search(variance=variance)
    rate, factor, history, larger = 0.1, 1.0, [], None
    for _ in range(25):
        population = optimizer.ask(variables)
        x = np.stack([flat(w) for w in population])
        mean, stddev = flat(population.means), flat(optimizer.stddevs)
        losses = np.array([float(objective(w)) for w in population])
        optimizer.tell(population, losses)
        if larger is not None:
            better = []
            for other in (
                (larger[0], stddev),
                (mean, larger[1]),
            ):
                ratios = densities(*other, x) - densities(mean, stddev, x)
                better.append(p_of(losses, ratios) < 0.5 - 1 / 30)
            rate = 1.1 * rate if better[0] else 0.9 * rate + 0.1 * 0.1
            if variance != "fixed":
                factor = 1.1 * factor if better[1] else 0.9 * factor + 0.1
            history.append(better)
        new_mean, new_stddev = flat(variables), flat(optimizer.stddevs)
        larger = (
            mean + 3 * (new_mean - mean),
            stddev * (new_stddev / stddev) ** 3,
        )
        np.testing.assert_allclose(optimizer.learning_rate, rate, rtol=1e-5)
        if variance != "fixed":
            got = optimizer._rule_state["variance_rate"]
            np.testing.assert_allclose(got, factor, rtol=1e-5)
    assert 3 < np.sum(history, axis=0)[0] < len(history)


@pytest.mark.parametrize(
    "inner, dtype",
    [
        (lambda: keras.optimizers.Adam(0.01), "float64"),
        (lambda: keras.optimizers.SGD(0.01, momentum=0.9), "float32"),
    ],
    ids=["adam", "momentum"],
)
def test_ask_and_tell_are_minimize(inner, dtype):
    a, b, c = (variables_of_a_search(dtype) for _ in range(3))
    one, other, compiled = (search(inner()) for _ in range(3))
    step = tf.function(lambda: compiled.minimize(objective, c))
    for _ in range(8):
        one.minimize(objective, a)
        step()
        population = other.ask(b)
        other.tell(population, [objective(w).numpy() for w in population])
    for x, y, z in zip(a, b, c, strict=True):
        np.testing.assert_array_equal(x, y)
        np.testing.assert_allclose(x, z, rtol=1e-4)
    assert float(one.learning_rate) == float(other.learning_rate) != 0.01
    np.testing.assert_allclose(
        compiled.learning_rate, one.learning_rate, rtol=1e-4
    )


def sphere(rate, adapts, seed, steps=150):
    """|w|^2 from 3 in 40 dimensions."""
    w = tf.Variable(3 * tf.ones([40]))
    optimizer = keras_vo.VOOptimizer(
        keras.optimizers.SGD(rate),
        16,
        keras_vo.GaussianSearchDistribution(
            "separable", 1.0, 0.1 * rate, min_stddev=1e-12
        ),
        fitness_shaping="nes",
        adaptation_sampling=adapts,
        seed=seed,
    )

    @tf.function
    def steps_of_a_search():
        for _ in tf.range(steps):
            optimizer.minimize(lambda x: tf.reduce_sum(x[0] ** 2), [w])

    steps_of_a_search()
    return float(tf.reduce_sum(w**2))


def test_rates_that_are_ten_times_too_small():
    """Seeds 0 to 9 end at .04 or less, and at 13 or more without."""
    assert sphere(0.1, True, 0) < 0.2 < 5 < sphere(0.1, False, 0)


@pytest.mark.parametrize("factor, first", [(0.01, 0.01), (0.99, 1), (3, 3)])
def test_a_learning_rate_that_is_set(factor, first):
    """It returns to less than before, and to more than it was; a callback that
    lowers an adapted rate by a factor leaves where it returns to.
    """
    variables, optimizer = variables_of_a_search(), search()
    while float(optimizer.learning_rate) < 0.12:
        optimizer.minimize(objective, variables)
    rate = factor * float(optimizer.learning_rate)
    optimizer.learning_rate = rate
    optimizer.minimize(objective, variables)
    got = float(optimizer._rule_state["initial_mean_rate"])
    want = 0.1 if first == 1 else rate
    assert got == pytest.approx(want)
    now = float(optimizer.learning_rate)
    assert now in (
        pytest.approx(1.1 * rate),
        pytest.approx(0.9 * rate + 0.1 * want),
    )


def test_the_variance_adapts_where_the_mean_stays():
    """At an optimum sigma can't fall too fast, as members say."""
    variables = [tf.Variable(tf.zeros([40]))]
    optimizer = search(keras.optimizers.SGD(0.0), "isotropic")

    @tf.function
    def steps():
        for _ in tf.range(30):
            optimizer.minimize(lambda w: tf.reduce_sum(w[0] ** 2), variables)

    steps()
    assert float(optimizer._rule_state["variance_rate"]) > 2
    assert float(optimizer.learning_rate) == 0


def test_steps_without_a_finite_loss_leave_the_rates():
    variables, optimizer = variables_of_a_search(), search()
    for _ in range(4):
        optimizer.minimize(objective, variables)
    before = [v.numpy() for v in optimizer.variables]
    optimizer.minimize(lambda w: np.inf * tf.reduce_sum(w[1] ** 0), variables)
    for old, new in zip(before[1:], optimizer.variables[1:], strict=True):
        np.testing.assert_array_equal(old, new)


def test_missing_members_have_no_say():
    """Infinite losses are the worst; what is missing is as if never drawn."""
    results = []
    for value in (None, np.nan):
        variables, optimizer = variables_of_a_search(), search()
        for _ in range(6):
            population = optimizer.ask(variables)
            losses = [float(objective(w)) for w in population]
            losses[3], losses[5] = value, np.inf
            optimizer.tell(population, losses)
        results.append(flat(variables))
        assert np.isfinite(float(optimizer.learning_rate))
    np.testing.assert_array_equal(*results)


def test_a_step_that_is_shrunk_would_not_be_larger():
    """Where max_kl bounds every step, rates only return."""
    variables, optimizer = variables_of_a_search(), search(max_kl=1e-4)
    for _ in range(6):
        optimizer.minimize(objective, variables)
    assert float(optimizer.learning_rate) == pytest.approx(0.1)


# --- in models ---


def regression():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 4)).astype("float32")
    return x, (x @ rng.normal(size=(4, 3))).astype("float32")


def network(**arguments):
    keras.utils.set_random_seed(1)
    model = keras_vo.VOSequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(5, activation="tanh"),
            keras.layers.Dense(3),
        ]
    )
    settings = {
        "inner_optimizer": keras.optimizers.Adam(0.01),
        "population_size": 16,
        "adaptation_sampling": True,
        "seed": 4,
    }
    model.compile(
        optimizer=keras_vo.VOOptimizer(**settings | arguments), loss="mse"
    )
    return model


def fitted(model):
    model.fit(*regression(), batch_size=8, shuffle=False, verbose=0)
    return models.search_state(model)


CASES = list(
    models.in_turn(
        models.pairwise(
            antithetic=[True, False],
            natural=[True, False],
            max_kl=[None, 1.0],
            sensitivity=[None, "inputs"],
            again=["resumed", "cut"],
        ),
        structure=["fixed", "isotropic", "layerwise", "separable"],
        shaping=["identity", "standardize", "centered_rank", "nes"],
    )
)


@pytest.mark.parametrize("case", CASES, ids=models.name_of)
def test_everything_with_everything(case, tmp_path):
    """Saved and resumed it is what goes on, bit by bit; or cut into chunks."""

    def make(**cuts):
        return network(
            search_distribution=case["structure"],
            fitness_shaping=case["shaping"],
            antithetic=case["antithetic"],
            natural_gradient=case["natural"],
            max_kl=case["max_kl"],
            sensitivity=case["sensitivity"],
            **cuts,
        )

    models.assert_goes_on(
        make, fitted, case["again"], tmp_path / "model.weights.h5"
    )


def test_one_replica_and_two():
    """Each has every whole batch: the trajectory is that of one."""
    x, y = regression()
    found = []
    for strategy, exchange in (
        (None, "auto"),
        (mirrored(2), "fitness"),
        (mirrored(2), "gradient"),
    ):
        with scope(strategy):
            model = network(
                inner_optimizer=keras.optimizers.SGD(0.01), exchange=exchange
            )
        batches = tf.data.Dataset.from_tensors((x, y)).repeat()
        if strategy:
            batches = strategy.distribute_datasets_from_function(
                lambda _, own=batches: own
            )
        model.fit(batches, steps_per_epoch=5, shuffle=False, verbose=0)
        found.append(
            [models.weights(model), model.optimizer.learning_rate.numpy()]
        )
        if strategy:
            assert_replicas_are_equal(strategy, model.optimizer.variables)
    for two in found[1:]:
        np.testing.assert_allclose(found[0][0], two[0], rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(found[0][1], two[1], rtol=1e-5)
    assert found[0][1] != pytest.approx(0.01)


# --- what it does not work with ---


def test_schedules_are_refused():
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 100)
    with pytest.raises(ValueError, match="Received: SGD with a schedule"):
        search(keras.optimizers.SGD(schedule))
    with pytest.raises(ValueError, match="Received: SGD with a schedule"):
        search(keras.optimizers.SGD(lambda: 0.1))
    variables, optimizer = variables_of_a_search(), search()
    optimizer.minimize(objective, variables)
    before = flat(variables)
    optimizer.learning_rate = schedule
    with pytest.raises(ValueError, match="Received: SGD with a schedule"):
        optimizer.minimize(objective, variables)
    np.testing.assert_array_equal(flat(variables), before)


@pytest.mark.parametrize("kind", ["low_rank", "local_reparam", "auto"])
def test_other_noise_is_refused(kind):
    with pytest.raises(ValueError, match='Expected: perturbation="full"'):
        search(perturbation=kind)


@pytest.mark.parametrize(
    "layer",
    [keras_vo.layers.LowRankDense, keras_vo.layers.LocalReparamDense],
    ids=["low_rank", "local_reparam"],
)
@pytest.mark.parametrize("others", [True, False])
def test_layers_with_other_noise_are_refused(layer, others):
    more = [keras.layers.Dense(3)] if others else []
    model = keras_vo.VOSequential([keras.Input((4,)), layer(3), *more])
    model.compile(optimizer=search(), loss="mse")
    said = f"^adaptation_sampling=True.*{model.layers[0].name}/kernel'"
    with pytest.raises(ValueError, match=said):
        model.train_on_batch(*regression())


@pytest.mark.parametrize("value", ["False", "yes", 1.1, None])
def test_neither_true_nor_false(value):
    with pytest.raises(ValueError, match=f"True or False. .*={value!r}$"):
        keras_vo.VOOptimizer(adaptation_sampling=value)


def test_from_its_config():
    optimizer = keras_vo.VOOptimizer(adaptation_sampling=True)
    again = keras_vo.VOOptimizer.from_config(optimizer.get_config())
    assert again.adaptation_sampling is True
    assert keras_vo.VOOptimizer().adaptation_sampling is False
