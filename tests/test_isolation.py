"""What users' own code does in a member stays in that member.

Each case stands beside a plain twin, which does the same without the effect.
"""

import functools
import random
import warnings

import keras
import models
import numpy as np
import pytest
import tensorflow as tf

import keras_vo
from keras_vo.evaluation import notices
from keras_vo.layers import LocalReparamDense

START = [4.0, -3.0]


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch):
    monkeypatch.setattr(notices, "_said", set())


def minimized(objective, graph, variables=None, steps=5):
    """The trajectory of a search from `START`, and the losses it returned."""
    variables = variables or [tf.Variable(START)]
    optimizer = models.make_optimizer("separable", population_size=6)

    def step():
        return optimizer.minimize(objective(variables), variables)

    step = tf.function(step) if graph else step
    means, losses = [], []
    for _ in range(steps):
        losses.append(float(step()))
        means.append(np.concatenate([np.ravel(v.numpy()) for v in variables]))
    return np.array(means), np.array(losses)


def squares(tensors):
    return tf.add_n([tf.reduce_sum(tf.square(t)) for t in tensors])


def given(variables):
    return squares


def assigned(variables):
    def objective(weights):
        for variable, weight in zip(variables, weights, strict=True):
            variable.assign(weight)
        return squares(variables)

    return objective


def assigned_in_function(variables):
    set_and_sum = tf.function(assigned(variables))
    return lambda weights: set_and_sum(weights)


def assigned_in_part(variables):
    def objective(weights):
        variables[0].scatter_nd_update([[0], [1]], weights[0])
        return squares(variables)

    return objective


def given_to_python(variables, assign=False):
    def program(weight):
        if assign:
            variables[0].assign(weight)
        return np.sum(weight**2)

    return lambda weights: tf.numpy_function(program, weights, tf.float32)


def assigned_in_python(variables):
    return given_to_python(variables, assign=True)


@functools.cache
def twins(objective, graph):
    return minimized(objective, graph)


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize(
    ("objective", "twin"),
    [
        (assigned, given),
        (assigned_in_function, given),
        (assigned_in_part, given),
        (assigned_in_python, given_to_python),
    ],
)
def test_an_objective_that_sets_the_weights(objective, twin, graph):
    """The mean is put back: the same trajectory, to the bit."""
    for got, want in zip(
        minimized(objective, graph), twins(twin, graph), strict=True
    ):
        np.testing.assert_array_equal(got, want)


def test_an_objective_that_sets_the_weights_of_a_model():
    x, y = models.make_data()

    def run(graph, how=None):
        model = models.make_model()
        variables = model.trainable_variables

        def loss():
            losses = keras.losses.sparse_categorical_crossentropy(y, model(x))
            return tf.reduce_mean(losses)

        def objective(weights):
            pairs = list(zip(variables, weights, strict=True))
            if how is None:
                with keras.StatelessScope(pairs):
                    return loss()
            elif how == "set_weights":
                model.set_weights(weights)
            else:
                for variable, weight in pairs:
                    variable.assign(weight)
            return loss()

        return minimized(lambda _: objective, graph, variables, steps=3)[0]

    want = run(False)
    np.testing.assert_array_equal(run(False, "set_weights"), want)
    # In a graph, sums are of another order.
    np.testing.assert_allclose(run(True, "assign"), want, rtol=1e-4, atol=1e-5)


def in_stateless_scope(function):
    """From the variables of a model to an objective; its plain twin."""
    body = keras.Sequential([keras.Input((4,)), keras.layers.Dense(5, "relu")])
    head = keras.layers.Dense(models.CLASSES, activation="softmax")
    x, y = models.make_data()
    model = keras.Sequential([body, head])
    model(x)
    called = tf.function(body) if function else body

    def objective(weights):
        pairs = zip(model.trainable_variables, weights, strict=True)
        with keras.StatelessScope(list(pairs)):
            losses = keras.losses.sparse_categorical_crossentropy(
                y, head(called(x))
            )
        return tf.reduce_mean(losses)

    return lambda _: objective, model.trainable_variables


def test_an_objective_with_a_function_in_a_stateless_scope():
    """In a graph it sees the scope's weights; eagerly it can't, and is told."""

    def run(function, graph):
        keras.utils.set_random_seed(1)
        objective, variables = in_stateless_scope(function)
        return minimized(objective, graph, variables, steps=2)[0]

    plain = run(False, False)
    np.testing.assert_allclose(run(True, True), plain, atol=1e-5)
    with pytest.warns(UserWarning, match=r"(?s)keras.StatelessScope"):
        run(True, False)


def test_other_variables_of_an_objective_are_its_own():
    """An objective may count its evaluations, in a graph as eagerly."""
    for graph in (False, True):
        count = tf.Variable(0)

        def counting(_, count=count):
            def objective(weights):
                count.assign_add(1)
                return squares(weights)

            return objective

        minimized(counting, graph, steps=2)
        assert count.numpy() == 2 * 6


def reads_the_mean(variables):
    return lambda weights: squares(variables)


def reads_one_of_two(variables):
    return lambda weights: squares([weights[0], variables[1]])


def reads_in_function(variables):
    function = tf.function(lambda: squares(variables))
    function()
    return lambda weights: function()


def reads_in_python(variables):
    return lambda weights: tf.ensure_shape(
        tf.py_function(lambda: squares(variables), [], tf.float32), []
    )


@pytest.mark.parametrize(
    "objective", [reads_the_mean, reads_one_of_two, reads_in_python]
)
def test_an_objective_that_reads_the_mean_is_refused_in_a_graph(objective):
    variables = [tf.Variable([1.0], name="a"), tf.Variable(START, name="b")]
    before = [v.numpy() for v in variables]
    with pytest.raises(ValueError, match=r"reads \[.*'b:0'\], which hold the"):
        minimized(objective, True, variables)
    for variable, value in zip(variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)


@pytest.mark.parametrize("objective", [reads_the_mean, reads_in_function])
def test_an_objective_that_reads_the_mean_is_told_eagerly(objective):
    with pytest.warns(UserWarning, match="exactly the same loss"):
        minimized(objective, False, steps=1)


def test_an_objective_may_read_the_mean_beside_the_weights():
    """A penalty on the distance to the mean, say; nothing is said."""

    def near(variables):
        return lambda weights: (
            squares(weights) + 5.0 * squares([weights[0] - 2.0 * variables[0]])
        )

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        eager = minimized(near, False)
        graph = minimized(near, True)
    np.testing.assert_allclose(eager[0], graph[0], rtol=1e-5)
    assert not np.array_equal(eager[0], minimized(given, False)[0])


class Stop(BaseException):
    pass


def test_an_objective_that_fails_loses_no_mean():
    """Eagerly, whatever it raises: Ctrl-C too."""
    w = tf.Variable(START)
    optimizer = models.make_optimizer("separable")

    def objective(weights):
        w.assign(weights[0])
        raise Stop

    with pytest.raises(Stop):
        optimizer.minimize(objective, [w])
    np.testing.assert_array_equal(w.numpy(), START)


# Models with functions that are traced for the mean network.


class Plain(keras_vo.VOModel):
    def __init__(self, layer=keras.layers.Dense):
        super().__init__()
        self.hidden = layer(5, activation="relu")
        self.out = layer(models.CLASSES, activation="softmax")

    def call(self, inputs):
        return self.out(self.hidden(inputs))


class FunctionCall(Plain):
    @tf.function
    def call(self, inputs):
        return self.out(self.hidden(inputs))


class FunctionOfAutoGraph(Plain):
    @tf.function
    def call(self, inputs):
        if tf.reduce_sum(inputs) > 1e9:
            inputs = 2.0 * inputs
        ones = 0.0
        for _ in range(tf.shape(inputs)[1] // 4):
            ones += 1.0
        return self.out(self.hidden(inputs) * ones)


class FunctionParts(Plain):
    """A function of a layer, and a layer as a function."""

    def __init__(self):
        super().__init__()
        self.fast = tf.function(self.hidden, jit_compile=True)
        self.helper = tf.function(lambda inputs: self.out(inputs))

    def call(self, inputs):
        return self.helper(self.fast(inputs))


class FunctionDense(keras.layers.Dense):
    @tf.function
    def call(self, inputs):
        return super().call(inputs)


class FunctionLayers(Plain):
    def __init__(self):
        super().__init__(FunctionDense)


class FunctionLoss(FunctionLayers):
    @tf.function
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        return super().compute_loss(x, y, y_pred, sample_weight)


class Concrete(Plain):
    """Has what `get_concrete_function` returns, as a loaded model has."""

    traced = None

    def call(self, inputs):
        hidden = self.hidden if self.traced is None else self.traced
        return self.out(hidden(inputs))

    def build_own(self):
        spec = tf.TensorSpec([None, models.FEATURES])
        self.traced = tf.function(self.hidden).get_concrete_function(spec)


class GetWeights(Plain):
    """Evaluates its weights in NumPy."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        def loss(x, y):
            kernel, bias, *out = self.get_weights()
            logits = np.maximum(x @ kernel + bias, 0) @ out[0] + out[1]
            largest = logits.max(-1, keepdims=True)
            total = largest[:, 0] + np.log(np.exp(logits - largest).sum(-1))
            right = np.take_along_axis(logits, y.astype(int), -1)[:, 0]
            return np.float32(np.mean(total - right))

        return tf.numpy_function(loss, [x, y], tf.float32)


def fitted(cls, eager=False, build=True):
    """The population's loss in three steps, and the weights after them."""
    keras.utils.set_random_seed(1)
    model = cls()
    x, y = models.make_data()
    if build:
        model(x[:2])
    if hasattr(model, "build_own"):
        model.build_own()
    model.compile(
        optimizer=models.make_optimizer(),
        loss="sparse_categorical_crossentropy",
        run_eagerly=eager,
    )
    history = models.fit(model, x, y, epochs=1)
    return history["population_loss"], model.get_weights()


@pytest.fixture(scope="module")
def plain():
    return fitted(Plain)


@pytest.mark.parametrize(
    ("cls", "eager"),
    [
        (FunctionCall, True),
        (FunctionOfAutoGraph, False),
        (FunctionParts, False),
        (FunctionLoss, False),
        (Concrete, False),
        (Concrete, True),
        (GetWeights, False),
    ],
)
def test_functions_see_the_members_weights(cls, eager, plain):
    population_loss, weights = fitted(cls, eager)
    np.testing.assert_allclose(population_loss, plain[0], rtol=1e-4)
    for got, want in zip(weights, plain[1], strict=True):
        np.testing.assert_allclose(got, want, atol=1e-3)


@pytest.mark.parametrize("eager", [False, True])
def test_a_program_that_fails_leaves_the_mean(eager):
    """It fails in a member, while the variables hold the member's weights."""
    calls = 0

    def loss(y_true, y_pred):
        def program(y):
            nonlocal calls
            calls += 1
            if calls == 12:  # of 9 in a step
                raise RuntimeError("the program has failed")
            return np.float32(calls)

        return tf.numpy_function(program, [y_pred], tf.float32)

    model = models.make_model(loss=loss, run_eagerly=eager)
    x, y = models.make_data()
    model.train_on_batch(x, y)
    before = model.get_weights()
    with pytest.raises(Exception, match="the program has failed"):
        model.train_on_batch(x, y)
    for got, want in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(got, want)
    model.train_on_batch(x, y)


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("cls", [FunctionCall, FunctionLayers])
def test_a_function_traced_before_the_weights_is_refused(cls, eager):
    """Keras itself finds "no gradients for any variable" there."""
    with pytest.raises(ValueError, match=r"(?s)depends on the weights.*build"):
        fitted(cls, eager, build=False)


class Unused(Plain):
    def build(self, shape):
        self.head = keras.layers.Dense(2)
        self.head.build(shape)


@pytest.mark.parametrize("eager", [False, True])
def test_weights_that_no_loss_depends_on(eager):
    with pytest.warns(UserWarning, match="does not depend on the weights") as w:
        fitted(Unused, eager)
    assert len(w) == 1 and "head" not in str(w[0].message).split("(")[1]


def test_local_noise_in_a_function_is_refused():
    with pytest.raises(ValueError, match="in a function of `tf.function`"):
        fitted(lambda: FunctionCall(LocalReparamDense))


# Random numbers that are no SeedGenerator's.


class Own(keras.layers.Layer):
    """A layer with randomness of its own."""

    def __init__(self, draw, **kwargs):
        super().__init__(**kwargs)
        self.draw = draw

    def call(self, inputs):
        return self.draw(inputs)


def numpys(x):
    return np.random.normal(size=x.shape).astype("float32")


def pythons(x):
    return np.float32(random.random()) + 0 * x


def in_python(function):
    def draw(x):
        return x + tf.ensure_shape(
            tf.numpy_function(function, [x], tf.float32), x.shape
        )

    return draw


def in_branch(x):
    return tf.cond(
        tf.reduce_sum(x) < 1e9,
        lambda: x + tf.random.normal(tf.shape(x)),
        lambda: x,
    )


def of_generator():
    generator = tf.random.Generator.from_seed(1)
    return lambda x: x + generator.normal(tf.shape(x))


def gumbel(x):
    return x - tf.math.log(1e-6 - tf.math.log(tf.random.uniform(tf.shape(x))))


def of_parameters(x):
    rate = tf.abs(x) + 1.0
    return (
        x
        + tf.random.poisson([], rate)
        + tf.random.gamma([2], rate)[0]
        + tf.cast(tf.random.categorical(x, models.FEATURES), x.dtype)
    )


def function():
    return tf.function(lambda x: x + tf.random.normal(tf.shape(x)))


# Layers with randomness of their own, together where they work alike.
RANDOM = {
    "ops": lambda: [
        lambda x: x + tf.random.normal(tf.shape(x)),
        lambda x: x + tf.random.truncated_normal(tf.shape(x)),
        lambda x: tf.nn.dropout(x, 0.5),
        gumbel,
        of_parameters,
        tf.random.shuffle,
        lambda x: (
            x + tf.cast(tf.random.uniform(tf.shape(x), 0, 5, tf.int32), x.dtype)
        ),
    ],
    "functions": lambda: [in_branch, function(), of_generator()],
    "python": lambda: [in_python(numpys), in_python(pythons)],
}
TINY = 1e-6  # a standard deviation that by itself changes losses by less


def spread(layers, eager=False, generations=(0,), loss="mse"):
    """Of members' losses in a step of a search that hardly moves; their mean.

    For each of the generations, from the same state of the model, but from
    other states of TensorFlow's, NumPy's and Python's own randomness.
    """
    distribution = keras_vo.GaussianSearchDistribution("fixed", stddev=TINY)
    keras.utils.set_random_seed(1)
    model = models.make_model(
        [*layers, keras.layers.Dense(models.FEATURES)],
        models.make_optimizer(distribution),
        loss=loss,
        run_eagerly=eager,
    )
    losses = []
    take_step = model.optimizer.take_step

    def spy(*args, **kwargs):
        report = take_step(*args, **kwargs)
        losses.append(report.losses)
        return report

    model.optimizer.take_step = spy
    x, _ = models.make_data()
    tf.random.set_seed(int.from_bytes(random.SystemRandom().randbytes(3)))

    def step(data):
        model.train_step(data)
        return losses[-1]

    step = step if eager else tf.function(step, autograph=False)
    rewind, results = models.rewinder(model), []
    for generation in generations:
        rewind()
        model.optimizer.generations.assign(generation)
        np.random.seed()
        random.seed()
        found = step((tf.constant(x), tf.constant(x))).numpy()
        results.append((np.ptp(found) / np.mean(found), np.mean(found)))
    return results


def weighted_loss(y_true, y_pred):
    square = tf.reduce_mean(tf.square(y_true - y_pred), axis=-1)
    return tf.random.uniform([]) * square


@pytest.mark.parametrize("name", RANDOM)
def test_members_draw_the_same_and_so_does_a_resumed_run(name):
    def run(*generations):
        layers = [Own(draw) for draw in RANDOM[name]()]
        loss = weighted_loss if name == "ops" else "mse"
        return spread(layers, generations=generations, loss=loss)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (difference, mean), (_, later) = run(0, 1)
        ((_, again),) = run(0)
    assert difference < 1e-3
    np.testing.assert_allclose(again, mean, rtol=1e-5)
    assert abs(later - mean) > 1e-4 * mean


def repeated(x):
    return tf.while_loop(
        lambda i, _: i < 3,
        lambda i, x: (i + 1, x + tf.random.normal(tf.shape(x))),
        [0, x],
    )[1]


def test_what_differs_from_member_to_member_is_named_once(monkeypatch):
    """In a loop, in a function that was traced before, and eagerly."""
    spec = tf.TensorSpec([None, models.FEATURES])
    traced = tf.function(
        lambda x: x + tf.random.uniform(tf.shape(x))
    ).get_concrete_function(spec)
    # Eagerly, what a traced function draws is not seen.
    for eager in (False, True):
        monkeypatch.setattr(notices, "_said", set())
        with pytest.warns(UserWarning) as warned:
            for _ in range(2 if eager else 1):
                layers = [Own(repeated), Own(traced)]
                ((difference, _),) = spread(layers, eager)
                assert difference > 1e-3
        ops = [str(w.message).split()[2] for w in warned]
        assert ops == ["RandomStandardNormal", "RandomUniform"][: 2 - eager]
        assert all("SeedGenerator" in str(w.message) for w in warned)


def test_a_loss_that_samples_is_named():
    def loss(y_true, y_pred):
        labels = tf.cast(tf.argmax(y_true, axis=-1), tf.int64)[:, None]
        sampled, *_ = tf.random.log_uniform_candidate_sampler(
            labels, 1, 2, unique=True, range_max=models.FEATURES
        )
        return tf.reduce_sum(tf.gather(y_pred, sampled, axis=-1), axis=-1)

    with pytest.warns(UserWarning, match="The op LogUniformCandidateSampler"):
        spread([], loss=loss)


def test_the_state_of_python_and_numpy_goes_on():
    """As if members had drawn nothing: what the mean's pass drew remains."""
    model = models.make_model([Own(in_python(numpys)), keras.layers.Dense(3)])
    random.seed(5)
    untouched = random.random()
    np.random.seed(5)
    random.seed(5)
    models.fit(model, epochs=1)
    got = np.random.normal(), random.random()
    np.random.seed(5)
    np.random.normal(size=[3, 8, models.FEATURES])
    assert got == (np.random.normal(), untouched)


# Variables that Keras does not know.


class Counts(keras.layers.Layer):
    """Counts its calls, and returns more the more it has counted."""

    def __init__(self):
        super().__init__()
        self.count = tf.Variable(0.0, trainable=False)

    def call(self, inputs):
        self.count.assign_add(1.0)
        return inputs * (1.0 + 0.1 * tf.convert_to_tensor(self.count))


class CountingLoss(keras.losses.Loss):
    def __init__(self):
        super().__init__()
        self.count = tf.Variable(0.0)

    def call(self, y_true, y_pred):
        self.count.assign_add(1.0)
        return keras.losses.sparse_categorical_crossentropy(y_true, y_pred)


@pytest.mark.parametrize("eager", [False, True])
def test_counters_count_steps_not_members(eager):
    """In a layer, in a function of a layer and in a loss."""
    layers, loss = [Counts(), Counts()], CountingLoss()
    count = tf.function(lambda: layers[1].count.assign_add(1.0))
    layers[1].call = lambda inputs: (
        count(),
        inputs * (1.0 + 0.1 * layers[1].count),
    )[1]
    model = models.make_model(
        [*layers, *models.make_layers()], loss=loss, run_eagerly=eager
    )
    counts = [counting.count for counting in (*layers, loss)]
    for variable in counts:
        variable.assign(0.0)
    models.fit(model, epochs=1)
    assert [variable.numpy() for variable in counts] == [3, 3, 3]  # batches


@pytest.mark.parametrize("eager", [False, True])
def test_a_state_that_is_no_variable_is_named(eager, monkeypatch):
    key = tf.constant([1], tf.int64)
    table = tf.lookup.experimental.MutableHashTable(tf.int64, tf.float32, 0.0)
    queue = tf.queue.FIFOQueue(100, tf.float32, shapes=[()])
    numbers = iter(tf.data.Dataset.range(100))

    def from_table(x):
        table.insert(key, table.lookup(key) + 1.0)
        return x * tf.reshape(table.lookup(key), [])

    def from_queue(x):
        queue.enqueue(1.0)
        return x * tf.cast(queue.size(), tf.float32)

    draws = (
        from_table,
        from_queue,
        lambda x: x * tf.cast(next(numbers), tf.float32),
        lambda x: x * tf.cast(tf.timestamp(), tf.float32),
    )
    monkeypatch.setattr(notices, "_said", set())
    with pytest.warns(UserWarning) as warned:
        spread([Own(draw) for draw in draws], eager)
    told = [str(w.message) for w in warned if "no variable" in str(w.message)]
    assert [message.split()[2] for message in told] == [
        "IteratorGetNext",
        "LookupTableInsertV2",
        "QueueEnqueueV2",
        "Timestamp",
    ]


@pytest.mark.parametrize("eager", [False, True])
def test_losses_of_examples_count_once(eager):
    """Their weights take a further pass of the mean network's losses."""
    loss = CountingLoss()
    model = models.make_model(
        [LocalReparamDense(models.CLASSES, "softmax")],
        loss=loss,
        run_eagerly=eager,
    )
    models.fit(model, epochs=1)
    assert float(loss.count.numpy()) == 3


def test_both_members_of_a_pair_see_the_same_count():
    """With sigma so small, their losses differ by what they count only."""
    assert spread([Counts()])[0][0] < 1e-3


def test_two_replicas_keep_their_members_apart():
    """The sum over replicas of what one does alone: a loss of halves."""
    x, y = models.make_data(8)

    def run(cls, strategy=None):
        with models.scope(strategy):
            keras.utils.set_random_seed(1)
            model = cls()
            model(x[:2])
            model.compile(
                optimizer=models.make_optimizer(),
                loss="sparse_categorical_crossentropy",
                run_eagerly=not strategy,
            )
        logs = model.train_on_batch(x, y, return_dict=True)
        return logs["population_loss"]

    two = models.mirrored(2)
    want = run(Plain)
    assert run(FunctionOfAutoGraph, two) == pytest.approx(want, rel=1e-4)
    with pytest.warns(UserWarning, match="on 2 replicas at once"):
        run(GetWeights, two)


# Programs that are called.


def test_calls_of_a_program_never_overlap_and_are_no_more_than_members():
    running, most, calls = 0, 0, 0

    def program(weights):
        nonlocal running, most, calls
        running, calls = running + 1, calls + 1
        most = max(most, running)
        tf.linalg.inv(np.eye(100) + 1.0)  # lets other threads run
        running -= 1
        return np.float32(np.sum(weights**2))

    for size, chunk in [(34, 3), (8, None)]:
        optimizer = models.make_optimizer(
            population_size=size, chunk_size=chunk
        )
        w = tf.Variable(START)

        @tf.function
        def step(w=w, optimizer=optimizer):
            return optimizer.minimize(
                lambda ws: tf.numpy_function(program, ws, tf.float32), [w]
            )

        calls = 0
        step()
        assert calls == size
    assert most == 1
