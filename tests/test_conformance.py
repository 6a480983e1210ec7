"""Every kind of perturbation does what all of them have to do.

A new kind is a line of KINDS, and comes then under all of these checks. Only
the public interface is used.
"""

import functools
import itertools
from typing import Any, NamedTuple

import keras
import models
import numpy as np
import pytest
import tensorflow as tf

import keras_vo


class Kind(NamedTuple):
    """A kind of perturbation.

    Attributes:
        layer: the layer of Dense's signature that perturbs so.
        information: Fisher information of the log variance that all weights
            of a kernel [n, m] share, about what is judged at once.
    """

    layer: Any
    information: Any


KINDS = {
    # A chi^2 of all weights, of D degrees of freedom: D / 2.
    "full": Kind(keras.layers.Dense, lambda n, m: n * m / 2),
    # n / 2 from A and m / 2 from B, each known about with m and n as weights.
    "low_rank": Kind(
        keras_vo.layers.LowRankDense, lambda n, m: n * m / (n + m) / 2
    ),
    # Of m activations, whose variances it multiplies.
    "local_reparam": Kind(
        keras_vo.layers.LocalReparamDense, lambda n, m: m / 2
    ),
}


def distribution(variance, stddev=0.2, learning_rate=0.1):
    return keras_vo.GaussianSearchDistribution(
        variance, stddev, learning_rate, min_stddev=1e-12, follow_mean=False
    )


def sigmas(model):
    return np.concatenate([np.ravel(s) for s in model.optimizer.stddevs])


@pytest.fixture
def float64():
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")


# --- a search from its start, saved, resumed and cut otherwise ---


@keras.saving.register_keras_serializable(package="keras_vo_tests")
class Traced(keras_vo.VOSequential):
    """Keeps the graph of each trace of a step."""

    graphs = []

    def compute_loss(self, *args, **kwargs):
        graph = tf.compat.v1.get_default_graph()
        # That of the mean network; the members have graphs of their own.
        name = getattr(graph, "name", "eager")
        if name == "one_step_on_data" and graph not in self.graphs:
            self.graphs.append(graph)
        return super().compute_loss(*args, **kwargs)


class Searched(NamedTuple):
    """What is left of a search: numbers and graphs."""

    cuts: dict
    history: list
    graphs: list
    saved: list
    loaded: list
    went_on: list
    resumed: list


AGAIN = {
    "resumed": {},
    "cut": {"chunk_size": 2, "memory_budget": 1},  # all noise is drawn twice
}
SHAPINGS = {
    "fixed": "identity",
    "isotropic": "standardize",
    "layerwise": "centered_rank",
    "separable": "nes",
}
# Any two values meet, but for some with a structure: closed forms see those.
SETTINGS = [
    ("fixed", "independent", "float64"),
    ("layerwise", "antithetic", "float32"),
    ("isotropic", "antithetic", "float32"),
    ("separable", "independent", "float64"),
    ("layerwise", "independent", "float64"),
    ("fixed", "antithetic", "float32"),
]
CASES = [
    {
        "kind": kind,
        "again": again,
        "structure": structure,
        "sampling": sampling,
        "dtype": dtype,
    }
    for (kind, again), (structure, sampling, dtype) in zip(
        itertools.product(KINDS, AGAIN), itertools.cycle(SETTINGS), strict=False
    )
]


def regression(dtype="float32"):
    """20 examples: the third batch of 8 is smaller."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 4))
    return x.astype(dtype), (x @ rng.normal(size=(4, 3))).astype(dtype)


def small_network(kind, **optimizer):
    """4-5-3, as a user has it: a metric, and nothing built."""
    keras.utils.set_random_seed(1)
    layer = KINDS[kind].layer
    model = Traced([keras.Input((4,)), layer(5, activation="relu"), layer(3)])
    model.compile(
        optimizer=keras_vo.VOOptimizer(
            keras.optimizers.Adam(0.1), seed=4, **optimizer
        ),
        loss="mse",
        metrics=["mae"],
    )
    return model


@pytest.fixture(scope="module", params=CASES, ids=models.name_of)
def searched(request, tmp_path_factory):
    """A search of 45 steps, and more: of the model and of its file.

    The file's is as the model, or is not cut, and runs eagerly.
    """
    case = request.param
    keras.config.set_floatx(case["dtype"])
    keras.config.set_dtype_policy(case["dtype"])
    data = regression(case["dtype"])
    del Traced.graphs[:]
    make = functools.partial(
        small_network,
        case["kind"],
        population_size=32,
        search_distribution=distribution(case["structure"]),
        fitness_shaping=SHAPINGS[case["structure"]],
        antithetic=case["sampling"] == "antithetic",
    )
    cuts = AGAIN[case["again"]]
    model = make(**cuts)
    history = models.fit(model, *data, epochs=15)["loss"]
    graphs = Traced.graphs[:]
    path = tmp_path_factory.mktemp("saved") / "model.keras"
    model.save(path)
    saved = models.search_state(model)
    if cuts:
        other = make()
        other.load_weights(path)
        other.run_eagerly = True
    else:
        other = keras.models.load_model(path)
    loaded = models.search_state(other)
    more = [a[:8] for a in data] if cuts else data
    for m in (model, other):
        models.fit(m, *more, epochs=1)
    yield Searched(
        cuts,
        history,
        graphs,
        saved,
        loaded,
        models.search_state(model),
        models.search_state(other),
    )
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


def test_it_learns(searched):
    """To less than half of its loss, where a network that stays has all of it.

    Seeds 0 to 19 of each kind, with fixed sigma and layerwise, all ended
    below .36: at most 3% of others fail (95% confidence).
    """
    assert searched.history[-1] < 0.5 * searched.history[0]


def test_a_step_is_traced_once_and_has_no_gradient(searched):
    (graph,) = searched.graphs
    definition = graph.as_graph_def()
    functions = definition.library.function
    ops = {n.op for n in definition.node}
    ops |= {n.op for f in functions for n in f.node_def}
    assert "MatMul" in ops or "BatchMatMulV2" in ops
    assert not [op for op in ops - {"StopGradient"} if "Grad" in op]


def test_a_file_holds_the_search_and_cuts_do_not_matter(searched):
    models.assert_same_state(searched.saved, searched.loaded)
    assert np.any(searched.saved[0] != searched.went_on[0])
    if not searched.cuts:
        models.assert_same_state(searched.went_on, searched.resumed)
        return
    exact = searched.saved[0].dtype == "float64"
    for got, want in zip(searched.resumed, searched.went_on, strict=True):
        np.testing.assert_allclose(
            got,
            want,
            rtol=1e-9 if exact else 1e-4,
            atol=1e-12 if exact else 1e-5,
        )


# --- closed forms ---

INPUTS = 4
UNITS = {kind: 2 if i else 3 for i, kind in enumerate(KINDS)}
BLOCKS, STEPS, MEMBERS = 40, 3, 256


def linear_and_quadratic(y_true, y_pred):
    """sum_i t_i Z_i + q sum_i Z_i^2"""
    return tf.reduce_sum(
        y_true[:, :-1] * y_pred + y_true[:, -1:] * y_pred**2, axis=-1
    )


def all_kinds(structure, **optimizer):
    """A layer of each kind, of the same inputs, beside each other; sigma .3."""
    inputs = keras.Input((INPUTS,))
    layers = [
        kind.layer(UNITS[name], use_bias=False, kernel_initializer="zeros")
        for name, kind in KINDS.items()
    ]
    outputs = keras.layers.Concatenate()([layer(inputs) for layer in layers])
    model = keras_vo.VOModel(inputs, outputs)
    model.compile(
        optimizer=keras_vo.VOOptimizer(
            keras.optimizers.SGD(0.01),
            population_size=MEMBERS,
            search_distribution=distribution(structure, 0.3, 1e-4),
            fitness_shaping="identity",
            seed=1002,
            **optimizer,
        ),
        loss=linear_and_quadratic,
    )
    model.optimizer.build(model.trainable_variables)
    return model


def changes(model, x, y):
    """Minus the weights' and log variances' mean change a step, by block."""
    states = []

    def note(*_):
        states.append((models.weights(model), 2 * np.log(sigmas(model))))

    note()
    batches = tf.data.Dataset.from_tensors((x, y)).repeat()
    model.fit(
        batches,
        epochs=BLOCKS,
        steps_per_epoch=STEPS,
        shuffle=False,
        verbose=0,
        callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=note)],
    )
    means, betas = zip(*states, strict=True)
    return -np.diff(means, axis=0) / STEPS, -np.diff(betas, axis=0) / STEPS


def assert_mean(samples, want, error_of):
    """The mean is `want`, where errors of the share `error_of` are seen."""
    error = samples.std(0, ddof=1) / len(samples) ** 0.5
    assert np.all(np.abs(samples.mean(0) - want) < 6 * error)
    assert np.all(6 * error < error_of * np.abs(want))


def slopes():
    """Inputs, targets of a linear loss, and dU/dmu = x' t / B."""
    rng = np.random.default_rng(0)
    x = rng.uniform(1, 2, size=(6, INPUTS))
    t = rng.uniform(1, 2, size=(6, sum(UNITS.values())))
    parts = np.split(x.T @ t / len(x), np.cumsum([*UNITS.values()]), axis=1)
    y = np.concatenate([t, np.zeros((6, 1))], axis=1)
    return x, y, np.concatenate([np.ravel(p) for p in parts])


@pytest.mark.parametrize(
    "structure, antithetic", [("fixed", True), ("separable", False)]
)
def test_the_search_gradient_is_unbiased(structure, antithetic, float64):
    """f is linear: dU/dmu = x' t / B, and dU/dbeta = 0.

    120 generations of 256 members in 40 blocks. Student's t with 39 degrees of
    freedom is beyond 6 with a probability of 5e-7: of 84 numbers, 4e-5 for
    another seed. A weight's gradient that is off by half is seen.
    """
    model = all_kinds(structure, antithetic=antithetic, natural_gradient=False)
    x, y, want = slopes()
    means, betas = changes(model, x, y)
    assert_mean(means / 0.01, want, 0.5)
    if structure != "fixed":
        error = betas.std(0, ddof=1) / len(betas) ** 0.5
        assert np.all(np.abs(betas.mean(0)) <= 6 * error)


@pytest.mark.parametrize("structure", ["isotropic", "layerwise", "separable"])
def test_the_natural_step_of_sigma(structure, float64):
    """Over the Fisher information of what the weights share.

    f = sum_i Z_i^2 has dU/dbeta = sigma^2 n m, whatever the kind. No weight
    is told from another: where each has its own sigma, the steps are those of
    the layer's. 120 generations of 256 members in 40 blocks; Student's t with
    39 degrees of freedom is beyond 6 with a probability of 5e-7: of 9 numbers,
    5e-6 for another seed. An information that is off by a third is seen.
    """
    model = all_kinds(structure, natural_gradient=True)
    x, y, _ = slopes()
    model.optimizer.learning_rate = 0.0
    quadratic = np.eye(y.shape[1])[-1]
    _, betas = changes(model, np.ones_like(x), 0 * y + quadratic)
    units = np.array([*UNITS.values()])
    gradients = 0.3**2 * INPUTS * units
    fishers = np.array(
        [kind.information(INPUTS, UNITS[k]) for k, kind in KINDS.items()]
    )
    if structure == "isotropic":
        gradients, fishers = gradients.sum(), fishers.sum()
    want = np.broadcast_to(gradients / fishers, len(KINDS))
    blocks = np.split(betas / 1e-4, np.cumsum(INPUTS * units)[:-1], axis=1)
    by_layer = [b.mean(1) for b in blocks]
    assert_mean(np.stack(by_layer, axis=1), want, 0.35)


def graded(variables, inputs):
    """Sensitivities, of which no two of a layer are equal."""
    return [
        tf.reshape(tf.linspace(1.0, 3.0, int(np.prod(v.shape))), v.shape)
        for v in variables
    ]


@pytest.mark.parametrize(
    "structure, antithetic",
    [("fixed", True), ("isotropic", False), ("layerwise", True)]
    + [("separable", False)],
)
def test_with_sensitivities_it_is_unbiased(structure, antithetic, float64):
    """f = sum_i t_i Z_i + Z_i^2 at mu = .5, and sum_i Z_i^2 at mu = 0, where

        dU/dmu_ji   = <x_j (t_i + 2 Z_i)>,
        dU/dbeta_ji = <x_j^2> sigma_ji^2, summed where weights share beta,

    with means over examples and sigma_ji = .3 / s_ji. Of low rank, single
    variances are changed by row and by column only. As above: 6 standard
    errors of 40 blocks; 144 numbers, so 7e-5 for another seed.
    """
    model = all_kinds(
        structure,
        antithetic=antithetic,
        natural_gradient=False,
        sensitivity=graded,
    )
    model.set_weights([np.full(w.shape, 0.5) for w in model.get_weights()])
    model.optimizer.learning_rate = 1e-8  # stays there
    x, y, _ = slopes()
    y[:, -1] = 1.0
    kernels = [v.shape for v in model.trainable_variables]
    units = np.cumsum([m for _, m in kernels])[:-1]
    outputs = x @ np.full((INPUTS, sum(UNITS.values())), 0.5)
    want_mean = np.split(x.T @ (y[:, :-1] + 2 * outputs) / len(x), units, 1)
    means, _ = changes(model, x, y)
    assert_mean(means / 1e-8, np.concatenate(list(map(np.ravel, want_mean))), 1)
    if structure == "fixed":
        return
    model.set_weights([np.zeros(w.shape) for w in model.get_weights()])
    y[:, :-1] = 0.0
    _, betas = changes(model, x, y)
    sigma = [s.numpy() for s in model.optimizer.stddevs]
    want = [(x**2).mean(0)[:, None] * s**2 for s in sigma]
    if structure == "separable":
        low = list(KINDS).index("low_rank")
        w = want[low]
        rows, columns = w.mean(1, keepdims=True), w.mean(0, keepdims=True)
        want[low] = rows + columns - w.mean()
        want = np.concatenate([np.ravel(w) for w in want])
    else:
        want = np.array([w.sum() for w in want])
        if structure == "isotropic":
            want = np.full(len(KINDS), want.sum())
        sizes = np.cumsum([n * m for n, m in kernels])[:-1]
        blocks = np.split(betas, sizes, axis=1)
        betas = np.stack([b.mean(1) for b in blocks], axis=1)
    error = betas.std(0, ddof=1) / len(betas) ** 0.5 / 1e-4
    assert np.all(np.abs(betas.mean(0) / 1e-4 - want) < 6 * error)
    seen = 0.25 * want.max() if structure == "separable" else want
    assert np.all(6 * error < seen)


# --- sigma tends to 0 ---


class Masks(keras.layers.Layer):
    """Leaves out the last position of each example."""

    def call(self, inputs):
        return inputs * 1.0  # the mask is attached to it

    def compute_mask(self, inputs, previous=None):
        ones = keras.ops.ones_like(inputs[:, :, 0], dtype="bool")
        return keras.ops.logical_and(ones, [True, True, False])


def sequences():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 3, 4)).astype("float32")
    return x, x.mean((1, 2), keepdims=True)[:, 0]


def compiled(layers, stddev, inputs, **optimizer):
    keras.utils.set_random_seed(1)
    model = keras_vo.VOSequential([inputs, *layers])
    model.compile(
        optimizer=keras_vo.VOOptimizer(
            keras.optimizers.SGD(0.1),
            population_size=8,
            search_distribution=distribution("layerwise", stddev, 0.1),
            **{"seed": 3, **optimizer},
        ),
        loss="mse",
    )
    model.optimizer.build(model.trainable_variables)
    return model


@pytest.mark.filterwarnings("ignore:The members' losses differ")  # as meant
@pytest.mark.parametrize("kind", KINDS)
def test_without_sigma_the_members_are_the_mean_network(kind):
    """Its masks, batch statistics and dropout, and states it starts from."""
    layer = KINDS[kind].layer
    model = compiled(
        [
            Masks(),
            layer(5, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.5),
            layer(3, activation="relu"),
            keras.layers.SimpleRNN(5, stateful=True, unroll=True),
            layer(1),
        ],
        1e-9,
        keras.Input(batch_shape=(8, 3, 4)),
    )
    for _ in range(3):
        logs = model.train_on_batch(*sequences(), return_dict=True)
        assert logs["loss"] > 0.01
        np.testing.assert_allclose(
            logs["population_loss"], logs["loss"], rtol=1e-5
        )
        model.reset_metrics()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_masked_does_not_count(kind):
    """The first position of an example changes the step, the last does not."""
    layer = KINDS[kind].layer
    model = compiled(
        [
            Masks(),
            layer(3, activation="relu"),
            keras.layers.GlobalAveragePooling1D(),
            layer(1),
        ],
        0.3,
        keras.Input((3, 4)),
        fitness_shaping="identity",
        seed=1003,
    )
    rewind = models.rewinder(model)
    x, y = sequences()

    def stepped(position):
        rewind()
        changed = x.copy()
        changed[:, position] += 3
        model.train_on_batch(changed, y)
        return models.weights(model), sigmas(model)

    unchanged, last, first = map(stepped, ([], -1, 0))
    for want, same, other in zip(unchanged, last, first, strict=True):
        np.testing.assert_allclose(same, want, rtol=1e-5)
        assert np.abs(other - want).max() > 1e-3


# --- lower precision ---


@pytest.mark.parametrize(
    "kind, policy",
    [
        (kind, "mixed_float16" if i else "mixed_bfloat16")
        for i, kind in enumerate(KINDS)
    ],
)
def test_mixed_precision(kind, policy):
    """As above; weights and sigma stay float32, and all weights move."""
    keras.config.set_dtype_policy(policy)
    model = small_network(
        kind,
        population_size=32,
        search_distribution=distribution("layerwise"),
    )
    before = model.get_weights()
    wrapped = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert wrapped == (policy == "mixed_float16")
    losses = models.fit(model, *regression(), epochs=15)["loss"]
    assert losses[-1] < 0.5 * losses[0]
    for new, old in zip(model.get_weights(), before, strict=True):
        assert new.dtype == "float32" and np.all(new != old)
    assert model.predict(np.ones((1, 4)), verbose=0).dtype != "float32"


# --- replicas ---


def whole_batches(strategy):
    """Three batches again and again, of which all replicas have each whole."""
    batches = tf.data.Dataset.from_tensor_slices(regression()).batch(8)
    if not strategy:
        return batches.repeat()
    batches = batches.flat_map(
        lambda *batch: tf.data.Dataset.from_tensors(batch).repeat(2)
    )
    return strategy.distribute_datasets_from_function(
        lambda _: batches.repeat()
    )


@pytest.mark.parametrize(
    "kind, exchange",
    [("full", "gradient"), ("low_rank", "fitness")],
)
def test_two_replicas_are_one(kind, exchange):
    """The same search on the same batches, where losses are of members.

    Where they are of examples each replica has other ones:
    test_optimizer_perturbation.py.
    """
    ends = []
    for strategy in (None, models.mirrored(2)):
        with models.scope(strategy):
            model = small_network(
                kind,
                population_size=10,
                search_distribution=distribution("layerwise"),
                exchange=exchange,
            )
        batches = whole_batches(strategy)
        model.fit(
            batches, epochs=1, steps_per_epoch=3, shuffle=False, verbose=0
        )
        if strategy:
            models.assert_replicas_are_equal(
                strategy, [*model.weights, *model.optimizer.variables]
            )
        ends.append(models.search_state(model))
        assert int(model.optimizer.iterations.numpy()) == 3
        assert np.all(np.isfinite(ends[-1][0]))
    for one, two in zip(*ends, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-7)
