"""Small models and data that several test files share."""

import contextlib
import itertools

import keras
import numpy as np
import tensorflow as tf

import keras_vo
from keras_vo.search import noise
from keras_vo.search.generators import NEWEST

FEATURES, CLASSES = 4, 3
KERAS_3_10 = keras.__version__.startswith("3.10.")  # the oldest, TF 2.18


def make_data(n=24, seed=0):
    """Three separable classes: x [n, 4], labels [n, 1]."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, CLASSES, size=(n, 1))
    x = rng.normal(size=(n, FEATURES)) + 4 * np.eye(CLASSES, FEATURES)[y[:, 0]]
    return x.astype("float32"), y


def make_layers(**kwargs):
    return [
        keras.layers.Dense(5, activation="relu", **kwargs),
        keras.layers.Dense(CLASSES, activation="softmax"),
    ]


def make_optimizer(search_distribution="layerwise", **kwargs):
    """Nothing that a test could depend on is left to the defaults."""
    if isinstance(search_distribution, str):
        search_distribution = keras_vo.GaussianSearchDistribution(
            search_distribution, stddev=0.2, learning_rate=0.1
        )
    settings = {
        "population_size": 8,
        "seed": 7,
        "inner_optimizer": keras.optimizers.Adam(0.05),
        "search_distribution": search_distribution,
        "natural_gradient": True,
        "antithetic": True,
        "fitness_shaping": "centered_rank",
        "max_kl": None,
    }
    settings |= kwargs
    settings.setdefault("examples_population_size", settings["population_size"])
    return keras_vo.VOOptimizer(**settings)


def make_model(layers=None, optimizer=None, shape=(FEATURES,), **compiling):
    """A compiled VOSequential with the same initial weights every time.

    Its optimizer is built already: if a step creates variables, TensorFlow
    traces it twice.
    """
    keras.utils.set_random_seed(1)
    model = keras_vo.VOSequential(
        [keras.Input(shape), *(layers or make_layers())]
    )
    compiling.setdefault("loss", "sparse_categorical_crossentropy")
    model.compile(optimizer=optimizer or make_optimizer(), **compiling)
    model.optimizer.build(model.trainable_variables)
    return model


def fit(model, *data, **kwargs):
    """Two epochs of three batches in a fixed order."""
    data = data or make_data()
    kwargs = {
        "epochs": 2,
        "batch_size": 8,
        "verbose": 0,
        "shuffle": False,
    } | kwargs
    return model.fit(*data, **kwargs).history


def rewinder(model):
    """A function that puts a model and its search back to where they are."""
    variables = [*model.variables, *model.optimizer.variables]
    values = [v.numpy() for v in variables]

    def rewind():
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)

    return rewind


def accuracy(model, x, y):
    return np.mean(model.predict(x, verbose=0).argmax(-1) == y[:, 0])


class LossSpy:
    """Centred ranks that keep the losses they are given, in a variable."""

    def __init__(self, population_size=8):
        self.losses = tf.Variable(tf.zeros([population_size]))

    def __call__(self, losses):
        self.losses.assign(tf.cast(losses, tf.float32))
        return keras_vo.fitness_shaping.centered_rank(losses)


def member_losses(plain, optimizer, x, y=None):
    """The losses of `optimizer`'s next generation, found by another way.

    Every member's weights are set on `plain`, a compiled model of Keras's own
    with the mean's weights, which is then called in training mode. It is left
    with other weights.
    """

    def objective(values):
        for weight, value in zip(
            plain.trainable_variables, values, strict=True
        ):
            weight.assign(value)
        y_pred = plain(x, training=True)
        return plain.compute_loss(x=x, y=y, y_pred=y_pred, training=True)

    return optimizer.step(objective, plain.trainable_variables).losses.numpy()


def weights(model):
    return np.concatenate([np.ravel(w) for w in model.get_weights()])


def search_state(model):
    """Every number that decides how training goes on."""
    return [weights(model)] + [
        np.asarray(v.numpy()) for v in model.optimizer.variables
    ]


def assert_same_state(first, second):
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


def zero_one_error(y_true, y_pred):
    wrong = tf.argmax(y_pred, -1) != tf.cast(tf.squeeze(y_true, -1), tf.int64)
    return tf.cast(wrong, tf.float32)


def draw_noise(
    seed,
    generation,
    directions,
    shape,
    dtype=tf.float64,
    stream=None,
    generator=NEWEST,
):
    """The noise of directions of a generation, as a search draws it.

    Args:
        seed: base seed of the search.
        generation: number of populations before it.
        directions: how many of them from the first, or their indices.
        shape: of the noise of one.
        dtype: of the noise.
        stream: `None`: noise of weights; else of that call's activations.
        generator: the name of what draws it.

    Returns:
        A NumPy array [directions, *shape].
    """
    if isinstance(directions, int):
        directions = range(directions)
    index = tf.constant(directions, tf.int64)
    return noise.draw_noise(
        tf.constant(seed, tf.int64),
        tf.fill(index.shape, tf.constant(generation, tf.int64)),
        index,
        tuple(shape),
        dtype,
        stream,
        generator,
    ).numpy()


def nodes_of_a_step(model, features=FEATURES, branches=True):
    """All nodes of a training step's graph, and of the functions it calls.

    Without `branches`: not those of the branches of conditions.
    """
    x = np.zeros((8, features), "float32")
    y = np.zeros((8, 1), "int32")
    model.optimizer.build(model.trainable_variables)

    @tf.function(autograph=False)  # as in Keras
    def step(x, y):
        return model.train_step((x, y))

    graph = step.get_concrete_function(tf.constant(x), tf.constant(y)).graph
    definition = graph.as_graph_def(add_shapes=True)
    functions = {f.signature.name: f for f in definition.library.function}
    nodes, todo, seen = [], list(definition.node), set()
    while todo:
        node = todo.pop(0)
        nodes.append(node)
        for name, value in node.attr.items():
            function = value.func.name
            if function in seen or function not in functions:
                continue
            if branches or not name.endswith("_branch"):
                seen.add(function)
                todo += functions[function].node_def
    return nodes


# --- cases ---


def pairwise(apart=(), **factors):
    """Few cases, in which any two values of two factors meet.

    Not necessarily those of the two factors `apart`.
    """

    def pairs(case):
        met = itertools.combinations(zip(factors, case, strict=True), 2)
        return {p for p in met if {p[0][0], p[1][0]} != set(apart)}

    left = {case: pairs(case) for case in itertools.product(*factors.values())}
    missing = set().union(*left.values())
    while missing:
        best = max(left, key=lambda case: len(left[case] & missing))
        missing -= left[best]
        yield dict(zip(factors, best, strict=True))


def in_turn(cases, **factors):
    """Cases that have, of each of these factors too, one value in turn."""
    for number, case in enumerate(cases):
        yield case | {k: v[number % len(v)] for k, v in factors.items()}


def name_of(case):
    return "-".join(map(str, case.values()))


# --- replicas ---


def mirrored(replicas):
    """A strategy of as many logical CPUs.

    TensorFlow's collective operations, the default, know one number of
    devices in a process.
    """
    return tf.distribute.MirroredStrategy(
        [f"CPU:{i}" for i in range(replicas)],
        cross_device_ops=tf.distribute.ReductionToOneDevice(),
    )


def scope(strategy):
    return strategy.scope() if strategy else contextlib.nullcontext()


def assert_replicas_are_equal(strategy, variables):
    for variable in variables:
        value = getattr(variable, "value", variable)
        first, *others = strategy.experimental_local_results(
            variable.value if isinstance(variable, keras.Variable) else value
        )
        for other in others:
            np.testing.assert_array_equal(first, other, err_msg=variable.name)


def assert_goes_on(make, fitted, again, path):
    """Saved and resumed, a search is what goes on, bit by bit; or, cut into
    chunks, nearly.

    Args:
        make: a compiled model, with arguments of its optimizer.
        fitted: from a model to its state after a fit.
        again: "resumed" or "cut".
        path: of a file of weights.
    """
    model = make()
    fitted(model)
    model.save_weights(path)
    cuts = {"chunk_size": 2, "memory_budget": 1} if again == "cut" else {}
    other = make(**cuts)
    other.load_weights(path)
    assert_same_state(search_state(model), search_state(other))
    went_on = fitted(model)
    assert np.isfinite(weights(model)).all()
    if cuts:
        for a, b in zip(went_on, fitted(other), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4)
    else:  # a new model has that state: this one is traced already
        model.load_weights(path)
        assert_same_state(went_on, fitted(model))
