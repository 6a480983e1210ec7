"""Ask and tell: the same steps as `minimize`, wherever losses come from."""

import concurrent.futures as futures
import json
import multiprocessing
import pickle

import keras
import models
import numpy as np
import pytest
import reference
import tensorflow as tf

import keras_vo
from keras_vo import fitness_shaping
from keras_vo.population import Seeds


def loss(weights):
    """In float64, by NumPy."""
    return float(sum(np.sum((np.asarray(w, float) - 1) ** 2) for w in weights))


def make_variables(dtype="float32"):
    rng = np.random.default_rng(0)
    return [
        tf.Variable(rng.normal(size=(4, 3)), dtype=dtype),
        tf.Variable(rng.normal(size=5), dtype=dtype),
    ]


def state(variables, optimizer):
    return [v.numpy() for v in [*variables, *optimizer.variables]]


def searched(step, steps=3, dtype="float32", **kwargs):
    """The state of a search after some steps, and the search."""
    variables = make_variables(dtype)
    optimizer = models.make_optimizer(**kwargs)
    for _ in range(steps):
        step(optimizer, variables)
    return state(variables, optimizer), optimizer, variables


def minimize(optimizer, variables):
    optimizer.minimize(loss, variables)


def ask_tell(optimizer, variables):
    population = optimizer.ask(variables)
    return optimizer.tell(population, [loss(w) for w in population])


# --- the same steps ---

SETTINGS = [
    {},
    {"search_distribution": "separable", "antithetic": False},
    {"search_distribution": "fixed", "fitness_shaping": "identity"},
    {"perturbation": "low_rank", "fitness_shaping": "nes"},
    {"perturbation": "low_rank", "antithetic": False, "chunk_size": 3},
    {"dtype": "bfloat16", "fitness_shaping": "standardize"},
    {"natural_gradient": False, "max_kl": 0.01, "chunk_size": 2},
    {"search_distribution": "isotropic", "dtype": "float64"},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_ask_and_tell_is_minimize(settings):
    """Bit for bit: weights, sigma, the inner optimizer, all counters."""
    expected, _, _ = searched(minimize, **settings)
    told, _, _ = searched(ask_tell, **settings)
    models.assert_same_state(told, expected)


def test_in_a_graph_it_is_minimize():
    """Where the same ops compute the loss."""

    def objective(weights):
        return tf.add_n([tf.reduce_sum((w - 1) ** 2) for w in weights])

    def in_graph(optimizer, variables):
        tf.function(lambda: optimizer.minimize(objective, variables))()

    def told(optimizer, variables):
        population = optimizer.ask(variables)
        losses = [objective([tf.constant(a) for a in w]) for w in population]
        optimizer.tell(population, losses)

    for a, b in zip(searched(in_graph)[0], searched(told)[0], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_constraints_hold_in_members():
    def variables():
        w = keras.Variable(np.full(3, 0.1, "float32"))
        w.constraint = keras.constraints.NonNeg()
        return [w]

    ends = []
    for step in (minimize, ask_tell):
        own, optimizer = variables(), models.make_optimizer()
        for _ in range(3):
            step(optimizer, own)
        ends.append(state(own, optimizer))
    models.assert_same_state(*ends)
    population = optimizer.ask(own)
    assert min(w[0].min() for w in population) == 0
    assert population.means[0].min() > 0


def test_the_mean_may_hold_members_meanwhile():
    """As by an objective that assigns the variables that it is asked about."""

    def assigning(optimizer, variables):
        population = optimizer.ask(variables)
        losses = []
        for weights in population:
            for variable, w in zip(variables, weights, strict=True):
                variable.assign(w)
            losses.append(loss([v.numpy() for v in variables]))
        optimizer.tell(population, losses)

    models.assert_same_state(searched(assigning)[0], searched(minimize)[0])


# --- the population ---


def test_a_population_is_a_sequence():
    variables, optimizer = make_variables(), models.make_optimizer()
    population = optimizer.ask(variables)
    assert len(population) == 8
    members = list(population)
    assert len(members) == 8
    for index, weights in enumerate(members):
        assert [w.shape for w in weights] == [(4, 3), (5,)]
        assert all(isinstance(w, np.ndarray) for w in weights)
        for other in (population[index], population[index - 8]):
            models.assert_same_state(weights, other)
    np.testing.assert_array_equal(population[2:4][1][0], members[3][0])
    stacked = population.stacked()
    for index in range(8):
        np.testing.assert_array_equal(stacked[0][index], members[index][0])
    some = population.stacked([5, 1])
    np.testing.assert_array_equal(some[1][0], members[5][1])
    for size in (None, 1, 3, 100):
        chunks = list(population.chunks(size))
        joined = np.concatenate([chunk[1] for chunk in chunks])
        np.testing.assert_array_equal(joined, stacked[1])
        assert max(len(chunk[0]) for chunk in chunks) <= (size or 8)
    # Mirrored pairs, around the mean.
    for w, m, mean in zip(members[0], members[4], variables, strict=True):
        np.testing.assert_allclose((w + m) / 2, mean, atol=1e-6)
    for wrong in (8, -9, "a", 1.5, None):
        with pytest.raises((IndexError, TypeError), match="from 0 to 7"):
            population[wrong]
    assert "generation 0: 8 members of 17 weights" in repr(population)


def test_asked_again_it_is_the_same():
    variables, optimizer = make_variables(), models.make_optimizer()
    before = state(variables, optimizer)[:2]
    first, second = optimizer.ask(variables), optimizer.ask(variables)
    models.assert_same_state(first[3], second[3])
    assert first.seeds == second.seeds
    models.assert_same_state(state(variables, optimizer)[:2], before)
    optimizer.tell(first, np.arange(8.0))
    assert np.any(optimizer.ask(variables)[3][0] != first[3][0])


def test_it_is_small():
    """A pickled population is as large as one member, not as all."""
    variables = [tf.Variable(tf.zeros([100, 100]))]
    population = models.make_optimizer(population_size=100).ask(variables)
    population.kept_tensors()
    assert len(pickle.dumps(population)) < 1.5 * 4 * 100 * 100
    json.dumps(population.seeds)


def losses_of(pickled):
    population = pickle.loads(pickled)
    return [(i, loss(population[i])) for i in reversed(range(len(population)))]


@pytest.mark.slow
def test_evaluated_in_another_process_and_told_after_a_restart(tmp_path):
    """In any order of evaluation; seeds are enough where the search is."""
    expected, _, _ = searched(minimize)
    _, optimizer, variables = searched(minimize, steps=2)
    saved = tf.train.Checkpoint(w=variables, optimizer=optimizer)
    path = saved.save(str(tmp_path / "search"))
    population = optimizer.ask(variables)
    pickled = pickle.dumps(population)
    context = multiprocessing.get_context("forkserver")
    with futures.ProcessPoolExecutor(1, context) as pool:
        pairs = pool.submit(losses_of, pickled).result()

    restored, again = make_variables(), models.make_optimizer(seed=99)
    again.build(restored)
    tf.train.Checkpoint(w=restored, optimizer=again).restore(path)
    seeds = json.loads(json.dumps(population.seeds))
    models.assert_same_state(again.ask(restored, seeds)[1], population[1])

    third, told = make_variables(), models.make_optimizer(seed=98)
    told.build(third)
    tf.train.Checkpoint(w=third, optimizer=told).restore(path)
    told.tell(pickle.loads(pickled), pairs)
    models.assert_same_state(state(third, told), expected)


def model_step(model):
    optimizer = model.optimizer
    population = optimizer.ask(model.trainable_variables)
    optimizer.tell(population, [loss(w) for w in population])


def test_a_keras_file_resumes_it(tmp_path):
    model = models.make_model(optimizer=models.make_optimizer(keep_best=True))
    model_step(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for each in (model, loaded):
        model_step(each)
        model_step(each)
    models.assert_same_state(
        models.search_state(loaded), models.search_state(model)
    )
    assert loaded.optimizer.best_loss == model.optimizer.best_loss


# --- results ---

LOSSES = [4.0, 1.0, 3.0, 0.5, 2.0, 8.0, 0.25, 6.0]


@pytest.mark.parametrize(
    "told",
    [
        LOSSES,
        tuple(LOSSES),
        np.array(LOSSES),
        tf.constant(LOSSES, tf.float64),
        dict(enumerate(LOSSES)),
        {i: LOSSES[i] for i in reversed(range(8))},
        [(i, LOSSES[i]) for i in (3, 1, 0, 2, 7, 6, 5, 4)],
        (loss for loss in LOSSES),
        [tf.constant(loss, tf.float64) for loss in LOSSES],
        [np.array([loss]) for loss in LOSSES],
        np.array(LOSSES, object),
        np.ma.masked_array(LOSSES, mask=[False] * 8),
        [tf.constant(loss, tf.bfloat16) for loss in LOSSES],
    ],
)
def test_losses_in_any_form(told):
    ends = []
    for losses in (LOSSES, told):
        variables, optimizer = make_variables(), models.make_optimizer()
        report = optimizer.tell(optimizer.ask(variables), losses)
        np.testing.assert_array_equal(report.losses, LOSSES)
        ends.append(state(variables, optimizer))
    models.assert_same_state(*ends)


class Series:
    """What pandas has: an array that has an index."""

    def __init__(self, values, index):
        self.values, self.index = values, index

    def items(self):
        return zip(self.index, self.values, strict=True)

    def __array__(self, dtype=None, copy=None):
        return np.array(self.values)


@pytest.mark.parametrize(
    "told",
    [
        np.array([None if n == 2 else loss for n, loss in enumerate(LOSSES)]),
        np.ma.masked_array(
            [-9.0 if n == 2 else loss for n, loss in enumerate(LOSSES)],
            mask=np.arange(8) == 2,
        ),
        Series(
            [loss for n, loss in enumerate(LOSSES) if n != 2][::-1],
            [7, 6, 5, 4, 3, 1, 0],
        ),
    ],
)
def test_missing_in_any_form(told):
    optimizer = models.make_optimizer()
    report = optimizer.tell(optimizer.ask(make_variables()), told)
    expected = [NAN if n == 2 else loss for n, loss in enumerate(LOSSES)]
    np.testing.assert_array_equal(report.losses, expected)


def test_scores():
    ends = []
    for sign in (1, -1):
        variables, optimizer = make_variables(), models.make_optimizer()
        scores = -sign * np.array(LOSSES)
        report = optimizer.tell(
            optimizer.ask(variables), scores, maximize=sign == 1
        )
        np.testing.assert_array_equal(report.losses, LOSSES)
        ends.append(state(variables, optimizer))

    def score(weights):
        return -tf.reduce_sum(weights[0] ** 2)

    for compiled in (False, True):
        variables, optimizer = make_variables(), models.make_optimizer()
        squares = [-score(w) for w in optimizer.ask(variables)]

        def step(optimizer=optimizer, variables=variables):
            return optimizer.minimize(score, variables, maximize=True)

        mean_loss = (tf.function(step) if compiled else step)()
        np.testing.assert_allclose(mean_loss, np.mean(squares), rtol=1e-5)
    models.assert_same_state(*ends)


NAN = float("nan")


@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("variance", ["isotropic", "separable"])
@pytest.mark.parametrize(
    "known",
    [
        [0, 1, 2, 4, 5, 6],  # pairs
        [0, 1, 2, 3, 5],  # and halves
        [0, 1, 6, 7],  # halves alone
        [2, 7],
    ],
)
def test_k_of_n_are_a_population_of_k(known, variance, antithetic):
    """Against NumPy in float64: the mean over k, ranks among k."""
    variables = [tf.Variable(np.arange(6.0))]
    optimizer = models.make_optimizer(
        keras_vo.GaussianSearchDistribution(
            variance, stddev=0.3, learning_rate=0.1, follow_mean=False
        ),
        inner_optimizer=keras.optimizers.SGD(0.5),
        antithetic=antithetic,
    )
    population = optimizer.ask(variables)
    noise = (population.stacked()[0] - population.means[0]) / 0.3
    optimizer.tell(population, {i: LOSSES[i] for i in known})
    utilities = reference.centered_rank(np.array(LOSSES)[known])
    z = noise[known]
    k = len(known)
    natural = 0.3 * (utilities[:, None] * z).sum(0) / k
    np.testing.assert_allclose(
        variables[0], np.arange(6.0) - 0.5 * natural, rtol=1e-9
    )
    excess = z**2 - 1
    if variance == "isotropic":
        excess = np.broadcast_to(excess.mean(1, keepdims=True), excess.shape)
    beta = np.log(0.3**2) - 0.1 * (utilities[:, None] * excess).sum(0) / k
    np.testing.assert_allclose(
        optimizer.stddevs[0], np.exp(beta / 2), rtol=1e-9
    )


def test_missing_is_not_nonfinite():
    """None and NaN have no say; inf is the worst."""
    reports = []
    for missing in (None, NAN, "left out"):
        variables, optimizer = make_variables(), models.make_optimizer()
        losses = dict(enumerate(LOSSES)) | {2: missing, 5: np.inf}
        if missing == "left out":
            del losses[2]
        report = optimizer.tell(optimizer.ask(variables), losses)
        assert (report.missing, report.nonfinite) == (1, 1)
        assert report.evaluations == 7
        assert np.isnan(report.losses[2]) and np.isinf(report.losses[5])
        reports.append(state(variables, optimizer))
    models.assert_same_state(*reports[:2])
    models.assert_same_state(*reports[1:])
    worst = make_variables()
    optimizer = models.make_optimizer()
    optimizer.tell(
        optimizer.ask(worst), dict(enumerate(LOSSES)) | {2: None, 5: 100.0}
    )
    models.assert_same_state(state(worst, optimizer), reports[0])


def test_leave_one_out_of_the_known():
    """b_n: the mean over known members that do not share n's noise."""
    losses = np.random.default_rng(0).normal(size=10)
    for antithetic in (True, False):
        shape = fitness_shaping.get("identity", antithetic)
        for seed in range(20):
            known = np.random.default_rng(seed).random(10) < 0.6
            if known.sum() < 2:
                continue
            expected = np.zeros(10)
            for n in np.flatnonzero(known):
                others = known.copy()
                others[n] = False
                if antithetic:
                    others[(n + 5) % 10] = False
                if not others.any():
                    break
                expected[n] = losses[n] - losses[others].mean()
            else:
                got = fitness_shaping.shaped_known(
                    shape, tf.constant(losses), tf.constant(known)
                )
                np.testing.assert_allclose(got, expected, atol=1e-12)


@pytest.mark.parametrize("losses", [{3: 1.0}, [np.inf] * 8])
def test_nothing_to_compare_is_no_step(losses):
    """But another generation."""
    variables, optimizer = make_variables(), models.make_optimizer()
    optimizer.build(variables)
    before = state(variables, optimizer)
    report = optimizer.tell(optimizer.ask(variables), losses)
    assert not report.updated
    assert (report.best_member is None) == (losses != {3: 1.0})
    assert report.kl == 0
    assert np.isnan(report.gradient_snr)
    assert int(optimizer.generations) == 1
    optimizer.generations.assign(0)
    models.assert_same_state(state(variables, optimizer), before)


WRONG = {
    "too few": ([1.0] * 7, ValueError, "8 numbers.*Received: 7 of them"),
    "too many": (np.zeros(9), ValueError, r"shape \(9,\)"),
    "a matrix": (np.zeros((8, 2)), ValueError, r"shape \(8, 2\)"),
    "no member": ({8: 1.0}, ValueError, "a loss of member 8"),
    "negative": ({-1: 1.0}, ValueError, "a loss of member -1"),
    "a name": ({"a": 1.0}, ValueError, "a loss of member 'a'"),
    "twice": ([(1, 2.0), (1, 3.0)], ValueError, "two losses of member 1"),
    "text": (["x"] * 8, TypeError, "'x' as the loss of member 0"),
    "complex": (np.zeros(8, complex), TypeError, "dtype complex128"),
    "a number": (3.0, ValueError, "Received: 3.0"),
    "nothing": (None, ValueError, "Received: None"),
    "a string": ("12345678", ValueError, "Received: '12345678'"),
    "strings": (["1.5"] * 8, TypeError, "'1.5' as the loss of member 0"),
    "a set": (set(LOSSES), ValueError, "Received: {"),
    "a truth": ({True: 1.0}, ValueError, "a loss of member True"),
    "a vector": ([[1, 2, 3]] * 8, TypeError, "as the loss of member 0"),
    "none": ([None] * 8, ValueError, "one member at least"),
    "empty": ({}, ValueError, "one member at least"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_losses(name):
    """Nothing is lost: the population can be told then."""
    losses, error, message = WRONG[name]
    variables, optimizer = make_variables(), models.make_optimizer()
    population = optimizer.ask(variables)
    before = state(variables, optimizer)
    with pytest.raises(error, match=message):
        optimizer.tell(population, losses)
    models.assert_same_state(state(variables, optimizer), before)
    assert optimizer.tell(population, LOSSES).updated


def test_wrong_populations():
    variables, optimizer = make_variables(), models.make_optimizer()
    with pytest.raises(ValueError, match="exists once the optimizer is built"):
        optimizer.tell(models.make_optimizer().ask(variables), LOSSES)
    population = optimizer.ask(variables)
    with pytest.raises(TypeError, match=r"Expected the population that `ask`"):
        optimizer.tell(LOSSES, population)
    optimizer.tell(population, LOSSES)
    with pytest.raises(ValueError, match="generation 0, which was told"):
        optimizer.tell(population, LOSSES)
    with pytest.raises(TypeError, match="base_seed, gen.*Received: 5"):
        optimizer.ask(variables, 5)
    later = optimizer.ask(variables)
    with pytest.raises(ValueError, match=r"one of generation 1: restore"):
        start = make_variables()
        other = models.make_optimizer()
        other.build(start)
        other.tell(later, LOSSES)
    for other, start in (
        (models.make_optimizer(seed=8), make_variables()),
        (models.make_optimizer(population_size=10), make_variables()),
        (models.make_optimizer(antithetic=False), make_variables()),
        (models.make_optimizer(perturbation="low_rank"), make_variables()),
        (models.make_optimizer("separable"), make_variables()),
        (models.make_optimizer(), [tf.Variable(tf.ones([17]))]),
        (models.make_optimizer(), [v + 1 for v in make_variables()]),
    ):
        start = [tf.Variable(v) for v in start]
        other.build(start)
        with pytest.raises(ValueError, match="one of another, or of other we"):
            other.tell(population, LOSSES)
        with pytest.raises(ValueError, match="one of another, or of other we"):
            other.ask(start, population.seeds)
        assert int(other.generations) == 0


def test_another_sigma_than_that_of_the_members():
    variables, optimizer = make_variables(), models.make_optimizer()
    population = optimizer.ask(variables)
    (beta,) = (v for v in optimizer.variables if v.name == "log_variance")
    beta.assign(beta + 0.1)
    with pytest.raises(ValueError, match="of another, or of other weights"):
        optimizer.tell(population, LOSSES)


def test_asked_while_a_member_is_assigned():
    """The same population: the variables hold no new mean."""
    variables, optimizer = make_variables(), models.make_optimizer()
    population = optimizer.ask(variables)
    for variable, w in zip(variables, population[3], strict=True):
        variable.assign(w)
    again = optimizer.ask(variables)
    models.assert_same_state(again[5], population[5])
    variables[0].assign_add(tf.ones([4, 3]))  # a new mean
    other = optimizer.ask(variables)
    assert np.any(other[5][0] != population[5][0])
    assert optimizer.tell(other, LOSSES).updated


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_variables_without_axes(dtype):
    ends = []
    for step in (minimize, ask_tell):
        variables = [tf.Variable(2.0, dtype=dtype)]
        optimizer = models.make_optimizer()
        for _ in range(3):
            step(optimizer, variables)
        ends.append(state(variables, optimizer))
        assert type(optimizer.ask(variables)[0][0]) is np.ndarray
        for member in optimizer.ask(variables):
            assert type(member[0]) is np.ndarray
    models.assert_same_state(*ends)


class Unhashable(keras.constraints.Constraint):
    def __eq__(self, other):
        return True

    __hash__ = None

    def __call__(self, w):
        return tf.abs(w)


def test_constraints_of_all_kinds():
    w = keras.Variable(np.full(3, 0.1, "float32"))
    optimizer = models.make_optimizer()
    w.constraint = Unhashable()
    population = pickle.loads(pickle.dumps(optimizer.ask([w])))
    assert min(member[0].min() for member in population) > 0
    w.constraint = lambda w: -tf.abs(w)
    population = optimizer.ask([w])
    assert max(member[0].max() for member in population) < 0
    with pytest.raises(TypeError, match="can be pickled.*lambda.* of 'var"):
        pickle.dumps(population)


def test_variables_that_were_set_meanwhile():
    variables, optimizer = make_variables(), models.make_optimizer()
    population = optimizer.ask(variables)
    variables[0].assign_add(tf.ones([4, 3]))
    with pytest.raises(ValueError, match="set since `ask`.*`population.means`"):
        optimizer.tell(population, LOSSES)
    for variable, mean in zip(variables, population.means, strict=True):
        variable.assign(mean)
    optimizer.tell(population, LOSSES)
    expected = make_variables()
    other = models.make_optimizer()
    other.tell(other.ask(expected), LOSSES)
    models.assert_same_state(
        state(variables, optimizer), state(expected, other)
    )


def test_not_in_a_graph():
    variables, optimizer = make_variables(), models.make_optimizer()
    population = optimizer.ask(variables)
    for call in (
        lambda: optimizer.ask(variables),
        lambda: optimizer.tell(population, LOSSES),
        lambda: optimizer.minimize(
            loss, variables, executor=futures.ThreadPoolExecutor(1)
        ),
    ):
        with pytest.raises(RuntimeError, match=r"outside of any `tf.function`"):
            tf.function(call)()
    strategy = models.mirrored(2)
    with pytest.raises(RuntimeError, match="in a replica"):
        strategy.run(lambda: optimizer.tell(population, LOSSES))


# --- the report ---


def test_report():
    """KL and sigma by their definitions; the signal as the monitor has it."""
    variables = [tf.Variable(tf.zeros([3], tf.float64))]
    distribution = keras_vo.GaussianSearchDistribution(
        "isotropic", stddev=0.5, follow_mean=False
    )
    optimizer = models.make_optimizer(distribution)
    with pytest.raises(ValueError, match="keep_best=True"):
        optimizer.build(variables)
        _ = optimizer.best_loss
    assert optimizer.report is None
    report = optimizer.tell(optimizer.ask(variables), LOSSES)
    assert report is optimizer.report
    assert report.generation == 0
    assert report.mean_loss == np.mean(LOSSES)
    assert (report.best_loss, report.best_member) == (0.25, 6)
    sigma = optimizer.stddevs[0].numpy()[0]
    np.testing.assert_allclose(report.sigma, sigma, rtol=1e-12)
    moved = variables[0].numpy()
    kl = np.sum(np.log(sigma / 0.5) + (0.25 + moved**2) / (2 * sigma**2) - 0.5)
    np.testing.assert_allclose(report.kl, kl, rtol=1e-9)
    again = [tf.Variable(tf.zeros([3], tf.float64))]
    other = models.make_optimizer(distribution)
    other.build(again)
    monitor = keras_vo.callbacks.SearchMonitor("step")
    with monitor.attached(other):
        other.tell(other.ask(again), LOSSES)
        monitor.record()
    row = {name: values[0] for name, values in monitor.history.items()}
    np.testing.assert_allclose(row["gradient_snr"], report.gradient_snr)
    np.testing.assert_allclose(row["kl"], report.kl)
    assert row["evaluations"] == 8


def test_the_mean_of_large_losses_is_finite():
    optimizer = models.make_optimizer(population_size=4)
    losses = np.array([3e38, 3e38, 2e38, -3e38], np.float32)
    report = optimizer.tell(optimizer.ask(make_variables()), losses)
    np.testing.assert_allclose(report.mean_loss, 1.25e38)


def test_weights_that_are_nan_were_not_set_since():
    variables = [tf.Variable([np.nan, 1.0])]
    optimizer = models.make_optimizer(population_size=4)
    report = optimizer.tell(optimizer.ask(variables), [1.0, 2.0, 3.0, 4.0])
    assert report.evaluations == 4


@pytest.mark.parametrize("graph", [True, False])
def test_the_best_member_ever(graph):
    variables = make_variables()
    optimizer = models.make_optimizer(keep_best=True)

    def objective(weights):
        return tf.add_n([tf.reduce_sum((w - 1) ** 2) for w in weights])

    def step():
        return optimizer.minimize(objective, variables)

    step = tf.function(step) if graph else step
    best = np.inf
    for _ in range(6):
        population = optimizer.ask(variables)
        assert np.all(np.isfinite(optimizer.best_loss)) == (best < np.inf)
        for weights in population:
            value = float(objective([tf.constant(w) for w in weights]))
            if value < best:
                best, member = value, weights
        step()
        np.testing.assert_allclose(optimizer.best_loss, best, rtol=1e-6)
        models.assert_same_state(optimizer.best_weights, member)
    config = keras_vo.VOOptimizer.from_config(optimizer.get_config())
    assert config.keep_best


def test_keeping_the_best_changes_no_step():
    plain, kept = (
        searched(ask_tell, keep_best=keep_best) for keep_best in (False, True)
    )
    left = [
        v
        for v in kept[1].variables
        if v.name not in ("best_loss", "best_weights")
    ]
    models.assert_same_state([v.numpy() for v in [*kept[2], *left]], plain[0])


def test_files_with_and_without_the_best(tmp_path):
    """A search goes on where `keep_best` is another than it was."""
    for before, after in ((False, True), (True, False)):
        model, other = (
            models.make_model(
                optimizer=models.make_optimizer(keep_best=keep_best)
            )
            for keep_best in (before, after)
        )
        model_step(model)
        path = tmp_path / "model.weights.h5"
        model.save_weights(path)
        other.load_weights(path)
        assert int(other.optimizer.generations) == 1
        if after:
            assert other.optimizer.best_loss == np.inf
        for each in (model, other):
            model_step(each)
        models.assert_same_state(model.get_weights(), other.get_weights())


def test_no_best_without_weights():
    """All noise is on activations: no member has weights."""
    model = models.make_model(
        optimizer=models.make_optimizer(
            perturbation="local_reparam", keep_best=True
        )
    )
    with pytest.raises(ValueError, match="`keep_best` is for members that ha"):
        models.fit(model)


# --- under strategies ---


def test_replicas():
    """All losses are told to all replicas, each of which takes its part."""
    ends = []
    for strategy in (None, models.mirrored(2)):
        with models.scope(strategy):
            variables = make_variables()
            optimizer = models.make_optimizer(keep_best=True)
        for _ in range(3):
            population = optimizer.ask(variables)
            assert list(population.own) == list(range(8))
            losses = [loss(w) for w in population]
            losses[2] = None
            report = optimizer.tell(population, losses)
            assert (report.missing, report.updated) == (1, True)
        ends.append(state(variables, optimizer))
    for a, b in zip(*ends, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_seeds_are_plain_numbers():
    optimizer = models.make_optimizer()
    seeds = optimizer.ask(make_variables()).seeds
    assert all(type(value) in (int, bool, str) for value in seeds)
    assert isinstance(seeds, Seeds)
