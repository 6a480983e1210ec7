"""Replicas of MirroredStrategy: the same search on one, two and three."""

import math
import operator

import keras
import numpy as np
import pytest
import tensorflow as tf
from models import assert_replicas_are_equal, mirrored, scope

import keras_vo
from keras_vo.replicas import communicator, cost, strategies

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def data(examples=48):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(examples, 4)).astype("float32")
    return x, (x.sum(1) > 0).astype("int32")


def same_batches(strategy, size=16):
    """Batches, of which each replica of `strategy` has every whole one."""
    replicas = strategy.num_replicas_in_sync if strategy else 1
    batches = tf.data.Dataset.from_tensor_slices(data()).batch(size)
    batches = batches.flat_map(
        lambda *batch: tf.data.Dataset.from_tensors(batch).repeat(replicas)
    ).repeat()
    if strategy is None:
        return batches
    return strategy.distribute_datasets_from_function(lambda _: batches)


# --- without a model ---


def with_schedule(kind, **options):
    """Arguments with an inner optimizer that no other search has."""
    schedule = keras.optimizers.schedules.ExponentialDecay(0.05, 5, 0.7)
    return lambda: {"inner_optimizer": kind(schedule, **options)}


def minimized(strategy, steps=10, inner=dict, **arguments):
    """Weights, sigmas and mean losses of a search on a function."""
    with scope(strategy):
        weights = [
            tf.Variable([[0.5, -1.0], [2.0, 0.3]]),
            tf.Variable([0.1, 0.2, 0.3]),
        ]
        optimizer = keras_vo.VOOptimizer(seed=6, **arguments | inner())

    @tf.function(autograph=False)
    def step():
        return optimizer.minimize(
            lambda w: (
                tf.reduce_sum(tf.cos(3 * w[0]))
                + tf.reduce_sum((w[1] - tf.reduce_mean(w[0])) ** 4)
            ),
            weights,
        )

    losses = np.array([step().numpy() for _ in range(steps)])
    if strategy:
        assert_replicas_are_equal(strategy, [*weights, *optimizer.variables])
    assert int(optimizer.generations.numpy()) == steps
    assert int(optimizer.iterations.numpy()) == steps
    return [
        *(w.numpy() for w in weights),
        *(s.numpy() for s in optimizer.stddevs),
        10 + losses,  # some of which are almost 0
    ]


def assert_close(results, expected):
    for one, other in zip(results, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


@pytest.mark.parametrize(
    ("replicas", "inner", "arguments"),
    [
        (
            2,
            dict,
            {
                "search_distribution": "isotropic",
                "antithetic": False,
                "fitness_shaping": "identity",
                "natural_gradient": False,
                "exchange": "gradient",
            },
        ),
        (
            3,
            with_schedule(
                keras.optimizers.SGD,
                momentum=0.9,
                weight_decay=0.1,
                clipnorm=0.01,
            ),
            {
                "search_distribution": "separable",
                "antithetic": True,
                "fitness_shaping": "centered_rank",
                "natural_gradient": True,
                "exchange": "fitness",
            },
        ),
    ],
)
def test_one_two_and_three_replicas(replicas, inner, arguments):
    """N = 10: neither members nor pairs divide by two or three replicas."""
    arguments |= {"inner": inner, "population_size": 10}
    assert_close(
        minimized(mirrored(replicas), **arguments),
        minimized(None, **arguments),
    )


@pytest.mark.parametrize(
    ("replicas", "chunk_size", "arguments"),
    [
        (3, None, {"population_size": 2, "exchange": "fitness"}),  # one pair
        (
            2,
            4,
            {"population_size": 22, "exchange": "gradient", "max_kl": 0.05},
        ),
    ],
)
def test_more_replicas_than_pairs_and_chunks_within_replicas(
    replicas, chunk_size, arguments
):
    """The second with a bound that holds for one replica's steps."""
    one = minimized(None, steps=6, **arguments)
    results = minimized(
        mirrored(replicas), steps=6, chunk_size=chunk_size, **arguments
    )
    assert_close(results, one)


def test_a_loss_that_is_nowhere_finite_changes_nothing():
    strategy = mirrored(2)
    with strategy.scope():
        w = tf.Variable([1.0, 2.0])
        optimizer = keras_vo.VOOptimizer(population_size=8)
    step = tf.function(
        lambda: optimizer.minimize(lambda w: math.nan * w[0][0], [w])
    )
    assert np.isnan(step().numpy())
    np.testing.assert_array_equal(w.numpy(), [1.0, 2.0])
    assert int(optimizer.iterations.numpy()) == 0
    assert int(optimizer.generations.numpy()) == 1


def test_minimize_in_every_context():
    def objective(weights):
        return tf.reduce_sum((weights[0] - 1.0) ** 2)

    def searched(run):
        strategy = mirrored(2)
        with strategy.scope():
            w = tf.Variable([3.0, -2.0])
            optimizer = keras_vo.VOOptimizer(population_size=4, seed=1)
            optimizer.build([w])
        losses = [run(strategy, optimizer, w) for _ in range(2)]
        return [w.numpy(), *losses]

    def eagerly(strategy, optimizer, w):
        return float(optimizer.minimize(objective, [w]))

    def in_scope(strategy, optimizer, w):
        with strategy.scope():
            return float(optimizer.minimize(objective, [w]))

    def in_replicas(strategy, optimizer, w):
        @tf.function(autograph=False)
        def step():
            return strategy.run(lambda: optimizer.minimize(objective, [w]))

        losses = strategy.experimental_local_results(step())
        assert float(losses[0]) == float(losses[1])
        return float(losses[0])

    expected = searched(eagerly)
    for run in (in_scope, in_replicas):
        assert_close(searched(run), expected)


# --- through fit ---


def trained(
    strategy,
    layers=None,
    optimizer=None,
    batches=None,
    epochs=4,
    steps=3,
    **options,
):
    """A model trained by `fit`, and its history.

    For epochs of `steps` steps, or of all `batches`.
    """
    keras.utils.set_random_seed(1)
    with scope(strategy):
        model = keras_vo.VOSequential(
            [
                keras.Input((4,)),
                *(layers() if layers else [keras.layers.Dense(5, "relu")]),
                keras.layers.Dense(2),
            ]
        )
        arguments = {"population_size": 10, "seed": 3}
        model.compile(
            optimizer=keras_vo.VOOptimizer(
                **arguments | (optimizer() if optimizer else {})
            ),
            loss=LOSS,
            metrics=["accuracy"],
            **options,
        )
    if batches is None:
        batches = same_batches(strategy)
    else:
        steps = None
    history = model.fit(
        batches, epochs=epochs, steps_per_epoch=steps, shuffle=False, verbose=0
    ).history
    if strategy:
        assert_replicas_are_equal(
            strategy, [*model.weights, *model.optimizer.variables]
        )
    return model, history


def assert_same_training(strategy, **arguments):
    model, history = trained(strategy, **arguments)
    expected, expected_history = trained(None, **arguments)
    for one, other in zip(model.weights, expected.weights, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)
    assert_close(model.optimizer.stddevs, expected.optimizer.stddevs)
    assert history.keys() == expected_history.keys()
    for name, values in history.items():
        np.testing.assert_allclose(values, expected_history[name], rtol=1e-5)


def many_layers():
    return [
        keras_vo.layers.LowRankDense(6, kernel_regularizer="l2"),
        keras.layers.BatchNormalization(),
        keras.layers.Dropout(0.2),
        keras.layers.Dense(5, "relu", bias_regularizer="l1"),
    ]


def test_fit_with_many_kinds_of_layers_and_options():
    """Regularizers, batch statistics and masks of dropout; all are scaled or
    seeded by number of replicas in Keras. Schedule, weight decay, clipping and
    EMA; `steps_per_execution` does not divide the number of steps."""
    inner = with_schedule(
        keras.optimizers.AdamW,
        weight_decay=0.1,
        global_clipnorm=0.01,
        use_ema=True,
    )
    assert_same_training(
        mirrored(2),
        layers=many_layers,
        optimizer=lambda: {
            "exchange": "fitness",
            "fitness_shaping": "identity",
            **inner(),
        },
        steps_per_execution=2,
        epochs=2,
    )


def test_eagerly():
    assert_same_training(
        mirrored(2),
        layers=list,
        optimizer=lambda: {"population_size": 4},
        run_eagerly=True,
        epochs=1,
        steps=2,
    )


def two_outputs():
    """A model of two losses and one of its own, and a regularizer."""

    class Model(keras_vo.VOModel):
        def compute_loss(self, x, y, y_pred, sample_weight, training=True):
            loss = super().compute_loss(x, y, y_pred, sample_weight, training)
            return loss + tf.reduce_mean((y_pred[1] - 1) ** 2)

    inputs = keras.Input((4,))
    layer = keras.layers.Dense(2, kernel_regularizer="l2")
    return Model(inputs, [layer(inputs), keras.layers.Dense(1)(inputs)])


def one_output():
    return keras_vo.VOSequential(
        [keras.Input((4,)), keras.layers.Dense(2, kernel_regularizer="l2")]
    )


@pytest.mark.parametrize(
    ("make", "loss"),
    [
        (two_outputs, [LOSS, "mse"]),
        (one_output, lambda y_true, y_pred: tf.reduce_max(y_pred)),
    ],
    ids=["compute_loss", "scalar"],
)
def test_losses_that_keras_does_not_divide(make, loss):
    """Whatever returns the loss: with the regularizer, it is one replica's.

    So it is with sample weights, which are the two losses'.
    """
    x, y = data(16)
    targets, weights = y, None
    if make is two_outputs:
        targets = [y, y.astype("float32")[:, None]]
        weights = np.linspace(0, 2, len(x)).astype("float32")
    results = []
    for strategy in (None, mirrored(2)):
        keras.utils.set_random_seed(2)
        with scope(strategy):
            model = make()
            model.compile(
                optimizer=keras_vo.VOOptimizer(
                    keras.optimizers.SGD(0.1),
                    population_size=8,
                    seed=1,
                    fitness_shaping="identity",
                ),
                loss=loss,
            )
        # Every replica gets the whole batch of train_on_batch.
        logs = [
            model.train_on_batch(x, targets, sample_weight=weights)
            for _ in range(3)
        ]
        results.append([np.array(logs), *model.get_weights()])
    assert_close(results[1], results[0])


def test_batch_methods_and_xla():
    """With steps_per_execution, of which a single batch is one."""
    x, y = data(16)
    logs = []
    for strategy in (None, mirrored(2)):
        keras.utils.set_random_seed(2)
        with scope(strategy):
            model = keras_vo.VOSequential(
                [keras.Input((4,)), keras.layers.Dense(2)]
            )
            model.compile(
                optimizer=keras_vo.VOOptimizer(population_size=4, seed=1),
                loss=LOSS,
                steps_per_execution=2,
                jit_compile=strategy is not None,
            )
        logs.append([*model.train_on_batch(x, y), LOSS(y, model(x))])
        model.reset_metrics()
    np.testing.assert_allclose(logs[1], logs[0], rtol=1e-5)
    np.testing.assert_allclose(
        model.test_on_batch(x, y), logs[0][-1], rtol=1e-5
    )


def test_the_end_of_data_of_unknown_size_is_no_step():
    """TensorFlow runs on to what does not depend on the missing batch."""
    x, y = data()
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(16)
    strategy = mirrored(2)
    with strategy.scope():
        model = keras_vo.VOSequential(
            [keras.Input((4,)), keras.layers.Dense(2)]
        )
        model.compile(
            optimizer=keras_vo.VOOptimizer(population_size=4), loss=LOSS
        )
    with pytest.warns(UserWarning, match="ran out of data"):  # Keras's own
        model.fit(
            strategy.distribute_datasets_from_function(
                lambda _: batches.filter(lambda *_: True)
            ),
            epochs=2,
            shuffle=False,
            verbose=0,
        )
    # Three batches, which the replicas have in turn: two steps an epoch.
    assert int(model.optimizer.generations.numpy()) == 4
    assert int(model.optimizer.iterations.numpy()) == 4


# --- sharded batches ---


def test_replicas_without_examples():
    """11 examples in batches of 5 on two replicas: in the last batch one
    replica has none, in the others they have three and two. Both have moving
    statistics over all examples, and learn, with noise of each example beside
    that of weights."""
    keras.config.set_floatx("float64")
    x, y = data(11)
    x = x.astype("float64") + 1
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(5)
    times, epochs = 8, 2  # of 24 steps
    model, history = trained(
        mirrored(2),
        layers=lambda: [
            keras.layers.BatchNormalization(momentum=0.5),
            keras_vo.layers.LocalReparamDense(8, "relu"),
        ],
        optimizer=lambda: {
            "population_size": 24,
            "examples_population_size": 12,
            "exchange": "fitness",
        },
        batches=batches.repeat(times),
        epochs=epochs,
    )
    mean = np.zeros(4)
    for _ in range(times * epochs):
        for batch in np.split(x, [5, 10]):
            mean = 0.5 * mean + 0.5 * batch.mean(0)
    np.testing.assert_allclose(
        model.layers[0].moving_mean.numpy(), mean, rtol=1e-9
    )
    assert int(model.optimizer.iterations.numpy()) == 48
    assert int(model.optimizer.generations.numpy()) == 48
    assert history["nonfinite_members"] == [0] * epochs
    for name in ("loss", "population_loss", "accuracy"):
        assert np.isfinite(history[name]).all(), name
    assert history["loss"][-1] < 0.7 * history["loss"][0]
    evaluated = model.evaluate(x, y, batch_size=5, verbose=0)
    predicted = model.predict(x, batch_size=5, verbose=0)
    assert predicted.shape == (11, 2)
    np.testing.assert_allclose(evaluated[0], LOSS(y, predicted), rtol=1e-5)
    np.testing.assert_allclose(
        evaluated[1], np.mean(predicted.argmax(1) == y), rtol=1e-6
    )


def test_weights_of_examples_on_other_shards():
    """Linear loss; the second shard's examples have a thousand times the
    weight of the first's. Ranks know no weights: were they of mean 1 on each
    shard, both would count the same."""
    strategy = mirrored(2)
    with strategy.scope():
        model = keras_vo.VOSequential(
            [
                keras.Input((2,)),
                keras_vo.layers.LocalReparamDense(
                    1, kernel_initializer="zeros", use_bias=False
                ),
            ]
        )
        model.compile(
            optimizer=keras_vo.VOOptimizer(
                keras.optimizers.SGD(1.0), population_size=256, seed=0
            ),
            loss=lambda y_true, y_pred: y_pred,
        )
    x = np.float32([[1, 0], [1, 0], [0, 1], [0, 1]])
    weights = np.float32([1e-3, 1e-3, 1, 1])
    batches = tf.data.Dataset.from_tensors((x, 0 * x[:, :1], weights))
    model.fit(batches, shuffle=False, verbose=0)
    light, heavy = model.get_weights()[0].ravel()
    assert heavy < 0
    assert abs(light) < 0.02 * abs(heavy)


LAYERS = {
    "full": keras.layers.Dense,
    "low_rank": keras_vo.layers.LowRankDense,
    "local": keras_vo.layers.LocalReparamDense,
}


@pytest.mark.parametrize(
    ("noise", "kind"),
    [
        ("full", "gradient"),
        ("local", "fitness"),
    ],
)
def test_sharded_gradients_are_unbiased(noise, kind):
    """f = mean_b x_b w is linear, so that dU/dw = mean_b x_b over all shards.

    200 steps of SGD at rate 1, each from w = 0, on batches of 7 examples, of
    which the replicas have 4 and 3 in half of the steps and 3 and 4 in the
    other half. Six weights within 4.5 standard errors: fails by chance once
    in 25000 (7e-6 each). The errors are below 0.17, so that a gradient that
    is summed instead of averaged (off by 1), of one shard only (off by up to
    2) or of a wrong share of the members is seen.
    """
    strategy = mirrored(2)
    with strategy.scope():
        model = keras_vo.VOSequential(
            [keras.Input((3,)), LAYERS[noise](2, kernel_initializer="zeros")]
        )
        model.compile(
            optimizer=keras_vo.VOOptimizer(
                keras.optimizers.SGD(1.0),
                population_size=12,
                natural_gradient=False,
                fitness_shaping="identity",
                search_distribution="fixed",
                exchange=kind,
                seed=2,
            ),
            loss=lambda y_true, y_pred: tf.reduce_sum(y_pred, -1),
        )
    x = np.random.default_rng(1).normal(1.0, 1.0, (7, 3)).astype("float32")
    shards = [(x[:4], x[4:]), (x[4:], x[:4])]
    kernel, bias = model.trainable_variables

    @tf.function(input_signature=[tf.TensorSpec([None, 3])] * 2)
    def step(*shards):
        def replica(*shards):
            mine = tf.gather(
                [0, 1],
                tf.distribute.get_replica_context().replica_id_in_sync_group,
            )
            rows = tf.cond(mine == 0, lambda: shards[0], lambda: shards[1])
            rows = tf.ensure_shape(rows, [None, 3])
            model.train_step((rows, tf.zeros(tf.shape(rows)[:1])))

        strategy.run(replica, args=shards)

    model.optimizer.build(model.trainable_variables)
    gradients = []
    for index in range(200):
        kernel.assign(tf.zeros_like(kernel))
        bias.assign(tf.zeros_like(bias))
        step(*(tf.constant(s) for s in shards[index % 2]))
        gradients.append(-kernel.numpy())
    gradients = np.stack(gradients)
    error = gradients.std(0) / np.sqrt(len(gradients))
    assert error.max() < 0.17
    expected = np.tile(x.mean(0)[:, None], (1, 2))
    # The mean of two shards' means, not of all examples.
    expected = (
        np.tile((x[:4].mean(0) + x[4:].mean(0))[:, None] / 2, (1, 2))
        if noise != "local"
        else expected
    )
    assert np.abs((gradients.mean(0) - expected) / error).max() < 4.5


# --- what is exchanged ---


def largest_sum(strategy, step, *arguments):
    """The greatest size of what a step on replicas sums over them."""

    @tf.function(autograph=False)
    def run():
        return strategy.run(step, args=arguments)

    graph = run.get_concrete_function().graph
    for function in graph.as_graph_def().library.function:
        assert not [n.op for n in function.node_def if "Collective" in n.op]
    return max(
        op.inputs[0].shape.num_elements()
        for op in graph.get_operations()
        if "Collective" in op.type
    )


def test_only_losses_cross_the_network():
    """The graph under TensorFlow's collective operations."""
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    size, largest = 200, {}
    for kind in ("fitness", "gradient", "auto"):
        with strategy.scope():
            w = tf.Variable(tf.zeros([size]))
            optimizer = keras_vo.VOOptimizer(population_size=10, exchange=kind)
            optimizer.build([w])

        def step(optimizer=optimizer, w=w):
            optimizer.minimize(lambda w: tf.reduce_sum(w[0]), [w])

        largest[kind] = largest_sum(strategy, step)
    # The losses of 10 members, and a baseline and a count for each replica.
    assert largest["fitness"] == 10 + 2 * 2
    assert largest["gradient"] >= size
    cheaper = cost.cost_model(network=False).cheaper(5, size, size + 1, 2)
    assert largest["auto"] == largest[cheaper]
    with strategy.scope():
        model = keras_vo.VOSequential(
            [
                keras.Input((4,)),
                LAYERS["low_rank"](30),
                LAYERS["local"](2),
            ]
        )
        model.compile(
            optimizer=keras_vo.VOOptimizer(
                population_size=10, exchange="fitness"
            ),
            loss=LOSS,
        )
        model.optimizer.build(model.trainable_variables)
    batch = tuple(tf.constant(v) for v in data(8))
    # The second layer's scores need the activations: its gradient is
    # exchanged, and losses in place of the first one's.
    local = 30 * 2 + 2
    got = largest_sum(strategy, model.train_step, batch)
    assert local <= got < 4 * 30 + 30


# --- Keras around it ---


def test_callbacks_saving_and_resuming(tmp_path):
    """Resumed = uninterrupted; what is saved loads without a strategy."""
    x, y = data()
    strategy = mirrored(2)

    def made():
        keras.utils.set_random_seed(3)
        with strategy.scope():
            model = keras_vo.VOSequential(
                [keras.Input((4,)), keras.layers.Dense(2)]
            )
            model.compile(
                optimizer=keras_vo.VOOptimizer(population_size=8, seed=1),
                loss=LOSS,
                metrics=["accuracy"],
            )
        return model

    def fit(model, *callbacks, **options):
        return model.fit(
            x[:36],
            y[:36],
            batch_size=16,
            epochs=2,
            shuffle=False,
            verbose=0,
            callbacks=list(callbacks),
            **options,
        ).history

    class Interrupted(Exception):
        pass

    class Interrupt(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                raise Interrupted

    whole = made()
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    with pytest.raises(Interrupted):
        fit(whole, backup, Interrupt())
    history = fit(
        whole,
        keras.callbacks.ModelCheckpoint(tmp_path / "best.keras"),
        initial_epoch=1,
        validation_data=(x[36:], y[36:]),
    )
    resumed = made()
    fit(resumed, keras.callbacks.BackupAndRestore(tmp_path / "backup"))
    loaded = keras.models.load_model(tmp_path / "best.keras")
    whole.save_weights(tmp_path / "model.weights.h5")
    # Before training, and outside of the scope.
    other = made()
    other.load_weights(tmp_path / "model.weights.h5")
    assert int(whole.optimizer.generations.numpy()) == 6
    for another in (resumed, loaded, other):
        for one, two in zip(whole.weights, another.weights, strict=True):
            np.testing.assert_array_equal(one, two)
        for one, two in zip(
            whole.optimizer.variables, another.optimizer.variables, strict=True
        ):
            np.testing.assert_array_equal(one, two)
    np.testing.assert_allclose(
        history["val_loss"], [LOSS(y[36:], loaded(x[36:]))], rtol=1e-5
    )
    whole.export(tmp_path / "saved", verbose=False)
    saved = tf.saved_model.load(tmp_path / "saved")
    np.testing.assert_allclose(saved.serve(x), loaded(x), rtol=1e-5, atol=1e-6)


# --- errors ---


def test_what_is_made_outside_of_the_scope_is_refused():
    strategy = mirrored(2)
    x, y = data()

    def made():
        return keras_vo.VOSequential([keras.Input((4,)), keras.layers.Dense(2)])

    outside = keras_vo.VOOptimizer(population_size=4)
    inner = keras.optimizers.Adam()
    with strategy.scope():
        half = keras_vo.VOOptimizer(inner, population_size=4)
    for optimizer in (outside, half):
        with strategy.scope():
            model = made()
            model.compile(optimizer=optimizer, loss=LOSS)
        with pytest.raises(ValueError, match=r"strategy\.scope"):
            model.fit(x, y, verbose=0)
    model = made()
    with strategy.scope():
        model.compile(
            optimizer=keras_vo.VOOptimizer(population_size=4), loss=LOSS
        )
        with pytest.raises(ValueError, match=r"strategy\.scope"):
            model.fit(x, y, verbose=0)


def test_overwriting_by_the_average_is_refused():
    with mirrored(2).scope():
        w = tf.Variable([1.0])
        optimizer = keras_vo.VOOptimizer(
            keras.optimizers.SGD(0.1, use_ema=True, ema_overwrite_frequency=2)
        )
        with pytest.raises(ValueError, match="ema_overwrite_frequency=2"):
            optimizer.build([w])


def test_an_optimizer_is_built_before_replicas_run():
    strategy = mirrored(2)
    with strategy.scope():
        w = tf.Variable([1.0])
        optimizer = keras_vo.VOOptimizer(population_size=4)
    with pytest.raises(ValueError, match="built before"):
        strategy.run(
            lambda: optimizer.minimize(lambda w: tf.reduce_sum(w[0]), [w])
        )


@pytest.mark.parametrize(
    "name",
    [
        "TPUStrategy",
        "ParameterServerStrategy",
        "experimental.CentralStorageStrategy",
    ],
)
def test_other_strategies_are_refused(name, monkeypatch):
    """Of their class only: TPUs and parameter servers can't be had here."""
    kind = operator.attrgetter(name)(tf.distribute)
    monkeypatch.setattr(tf.distribute, "has_strategy", lambda: True)
    monkeypatch.setattr(
        tf.distribute, "get_strategy", lambda: object.__new__(kind)
    )
    with pytest.raises(NotImplementedError, match=name.split(".")[-1]):
        keras_vo.VOOptimizer()


def test_exchange_is_checked_and_saved():
    with pytest.raises(ValueError, match="exchange='losses'"):
        keras_vo.VOOptimizer(exchange="losses")
    config = keras_vo.VOOptimizer(exchange="gradient").get_config()
    restored = keras_vo.VOOptimizer.from_config(config)
    assert restored.exchange == "gradient"


def test_the_cost_model():
    """By hand: D = 100 draws of 1000 normals, 500 numbers, R = 4."""
    costs = cost.CostModel(
        normals=1e6,
        sums=1e7,
        perturbed=1e7,
        evaluation=1e8,
        overhead=0.5,
        latency=1e-3,
        bandwidth=1e5,
    )
    assert costs.message(500, 4) == pytest.approx(6e-3 + 6 / 4 * 2000 / 1e5)
    assert costs.message(500, 1) == 0
    sizes = (100, 1000, 500, 4)
    assert costs.exchanged("fitness", *sizes) == pytest.approx(0.1 + 0.01)
    assert costs.exchanged("gradient", *sizes) == pytest.approx(0.0025 + 0.036)
    assert costs.cheaper(*sizes) == "gradient"
    assert costs.cheaper(10, 1000, 500, 4) == "fitness"
    # 50 members of 1000 weights: made in 5 ms, on 8 examples in 4 ms.
    assert costs.step("fitness", 200, 1000, 8, 4) == pytest.approx(
        0.5 + 0.009 + 0.025 + costs.message(200, 4) + 0.11
    )
    # One replica draws its noise once and sends nothing.
    assert costs.step("fitness", 200, 1000, 8, 1) == pytest.approx(
        0.5 + 0.036 + 0.1 + 0.01
    )


def test_outside_of_strategies_there_is_one_replica():
    assert communicator.current_replicas() == communicator.Replicas(0, 1)
    assert strategies.current_strategy() is None
    assert not strategies.in_replica()
