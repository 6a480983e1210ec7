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


def minimized(strategy, steps=20, **arguments):
    """Weights, sigmas and mean losses of a search on a function."""
    with scope(strategy):
        weights = [
            tf.Variable([[0.5, -1.0], [2.0, 0.3]]),
            tf.Variable([0.1, 0.2, 0.3]),
        ]
        optimizer = keras_vo.VOOptimizer(seed=5, **arguments)

    @tf.function
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
    ("variance", "antithetic", "shaping", "natural", "several"),
    [
        ("isotropic", False, "identity", False, {2: "gradient"}),
        ("separable", True, "centered_rank", True, {3: "fitness"}),
    ],
)
def test_one_two_and_three_replicas(
    variance, antithetic, shaping, natural, several
):
    """N = 10: neither members nor pairs divide by two or three replicas.

    `several` is what is exchanged, by the number of replicas.
    """
    arguments = {
        "population_size": 10,
        "search_distribution": variance,
        "antithetic": antithetic,
        "fitness_shaping": shaping,
        "natural_gradient": natural,
    }
    one = minimized(None, **arguments)
    for replicas, kind in several.items():
        assert_close(
            minimized(mirrored(replicas), exchange=kind, **arguments), one
        )


@pytest.mark.parametrize(
    ("replicas", "arguments"),
    [
        (3, {"population_size": 2, "exchange": "fitness"}),  # one pair
        (
            2,
            {"population_size": 22, "chunk_size": 4, "exchange": "gradient"},
        ),
    ],
)
def test_more_replicas_than_pairs_and_chunks_within_replicas(
    replicas, arguments
):
    one = minimized(None, steps=6, **arguments | {"chunk_size": None})
    results = minimized(mirrored(replicas), steps=6, **arguments)
    assert_close(results, one)


def test_the_bound_of_a_step_is_that_of_one_replica():
    arguments = {"population_size": 10, "max_kl": 0.05}
    assert_close(
        minimized(mirrored(2), **arguments), minimized(None, **arguments)
    )


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
            optimizer = keras_vo.VOOptimizer(population_size=6, seed=1)
            optimizer.build([w])
        losses = [run(strategy, optimizer, w) for _ in range(3)]
        return [w.numpy(), *losses]

    def eagerly(strategy, optimizer, w):
        return float(optimizer.minimize(objective, [w]))

    def in_scope(strategy, optimizer, w):
        with strategy.scope():
            return float(optimizer.minimize(objective, [w]))

    def in_replicas(strategy, optimizer, w):
        @tf.function
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
    strategy, layers=None, optimizer=None, batches=None, epochs=4, **options
):
    """A model trained by `fit` for epochs of 3 steps, and its history."""
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
    steps = None
    if batches is None:
        batches = same_batches(strategy)
        steps = 3
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


def test_fit_with_many_kinds_of_layers():
    """Regularizers, batch statistics and masks of dropout; all are scaled or
    seeded by number of replicas in Keras."""
    assert_same_training(
        mirrored(2),
        layers=many_layers,
        optimizer=lambda: {
            "exchange": "fitness",
            "fitness_shaping": "identity",
        },
    )


def with_schedule(kind, **options):
    schedule = keras.optimizers.schedules.ExponentialDecay(0.05, 5, 0.7)
    return lambda: {"inner_optimizer": kind(schedule, **options)}


@pytest.mark.parametrize(
    ("replicas", "optimizer"),
    [
        (
            2,
            with_schedule(
                keras.optimizers.AdamW,
                weight_decay=0.1,
                global_clipnorm=0.01,
                use_ema=True,
            ),
        ),
        (
            3,
            with_schedule(
                keras.optimizers.SGD,
                momentum=0.9,
                weight_decay=0.1,
                clipnorm=0.01,
            ),
        ),
    ],
)
def test_options_of_the_inner_optimizer_and_of_compile(replicas, optimizer):
    """Schedule, weight decay, clipping and EMA; `steps_per_execution` does
    not divide the number of steps."""
    assert_same_training(
        mirrored(replicas), optimizer=optimizer, steps_per_execution=2
    )


def test_eagerly():
    assert_same_training(
        mirrored(2),
        optimizer=lambda: {"population_size": 4},
        run_eagerly=True,
        epochs=1,
    )


@pytest.mark.parametrize("kind", ["scalar", "compute_loss"])
def test_losses_that_keras_does_not_divide(kind):
    """Whatever returns the loss: with the regularizer, it is one replica's."""

    class Model(keras_vo.VOSequential):
        def compute_loss(self, x, y, y_pred, sample_weight, training=True):
            loss = super().compute_loss(x, y, y_pred, sample_weight, training)
            if kind == "compute_loss":
                loss += tf.reduce_mean((y_pred - 1) ** 2)
            return loss

    results = []
    x, y = data(16)
    for strategy in (None, mirrored(2)):
        keras.utils.set_random_seed(2)
        with scope(strategy):
            model = Model(
                [
                    keras.Input((4,)),
                    keras.layers.Dense(2, kernel_regularizer="l2"),
                ]
            )
            model.compile(
                optimizer=keras_vo.VOOptimizer(
                    keras.optimizers.SGD(0.1),
                    population_size=8,
                    seed=1,
                    fitness_shaping="identity",
                ),
                loss=LOSS
                if kind == "compute_loss"
                else lambda y_true, y_pred: tf.reduce_max(y_pred),
            )
        logs = [model.train_on_batch(x, y) for _ in range(3)]
        results.append([np.array(logs), *model.get_weights()])
    assert_close(results[1], results[0])


def test_batch_methods_validation_and_xla():
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
                jit_compile=True,
            )
        logs.append([*model.train_on_batch(x, y), model.test_on_batch(x, y)])
        history = model.fit(x, y, verbose=0, validation_data=(x, y)).history
        assert np.isfinite(history["val_loss"]).all()
    np.testing.assert_allclose(logs[0], logs[1], rtol=1e-5)


def test_two_losses_and_sample_weights():
    x, y = data()
    weights = np.linspace(0, 2, len(x)).astype("float32")
    results = []
    for strategy in (None, mirrored(2)):
        keras.utils.set_random_seed(2)
        with scope(strategy):
            inputs = keras.Input((4,))
            hidden = keras.layers.Dense(5, "relu")(inputs)
            model = keras_vo.VOModel(
                inputs,
                [keras.layers.Dense(2)(hidden), keras.layers.Dense(1)(hidden)],
            )
            model.compile(
                optimizer=keras_vo.VOOptimizer(
                    population_size=8, seed=1, fitness_shaping="identity"
                ),
                loss=[LOSS, "mse"],
            )
        # Every replica gets the whole batch of train_on_batch.
        logs = [
            model.train_on_batch(
                x, [y, y.astype("float32")[:, None]], sample_weight=weights
            )
            for _ in range(3)
        ]
        results.append([*logs, *(w.numpy() for w in model.weights)])
    assert_close(results[1], results[0])


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
    """13 examples in batches of 4 on three replicas: in the last batch two
    replicas have none, in the others one has two and two have one. All have
    moving statistics over all examples."""
    keras.config.set_floatx("float64")
    x, y = data(13)
    x = x.astype("float64") + 1
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(4)
    strategy = mirrored(3)
    model, history = trained(
        strategy,
        layers=lambda: [keras.layers.BatchNormalization(momentum=0.5)],
        batches=batches,
    )
    mean = np.zeros(4)
    for _ in range(4):
        for batch in np.split(x, [4, 8, 12]):
            mean = 0.5 * mean + 0.5 * batch.mean(0)
    np.testing.assert_allclose(
        model.layers[0].moving_mean.numpy(), mean, rtol=1e-9
    )
    assert int(model.optimizer.iterations.numpy()) == 4 * 4
    assert int(model.optimizer.generations.numpy()) == 4 * 4
    assert history["nonfinite_members"] == [0] * 4
    for name in ("loss", "population_loss", "accuracy"):
        assert np.isfinite(history[name]).all(), name
    evaluated = model.evaluate(x, y, batch_size=4, verbose=0)
    predicted = model.predict(x, batch_size=4, verbose=0)
    assert predicted.shape == (13, 2)
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

    @tf.function(reduce_retracing=True)
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


def test_local_reparameterization_beside_other_noise():
    """Learns from shards, with replicas that stay the same."""
    x, y = data(64)
    model, history = trained(
        mirrored(2),
        layers=lambda: [
            keras_vo.layers.LocalReparamDense(8, "relu"),
            keras.layers.Dense(8, "relu"),
        ],
        optimizer=lambda: {"population_size": 24, "exchange": "fitness"},
        batches=tf.data.Dataset.from_tensor_slices((x, y)).batch(16),
        epochs=7,
    )
    assert history["loss"][-1] < 0.7 * history["loss"][0]
    with pytest.raises(ValueError, match="two for each replica"):
        trained(
            mirrored(3),
            layers=lambda: [keras_vo.layers.LocalReparamDense(8)],
            optimizer=lambda: {"population_size": 4, "antithetic": False},
        )


# --- what is exchanged ---


def collectives(strategy, model):
    """Sizes of what a training step sums over replicas."""
    batch = tuple(tf.constant(v) for v in data(8))

    @tf.function
    def step(*batch):
        return strategy.run(model.train_step, args=(batch,))

    graph = step.get_concrete_function(*batch).graph
    for function in graph.as_graph_def().library.function:
        assert not [n.op for n in function.node_def if "Collective" in n.op]
    return [
        op.inputs[0].shape.num_elements()
        for op in graph.get_operations()
        if "Collective" in op.type
    ]


def test_only_losses_cross_the_network():
    """The graph under TensorFlow's collective operations."""
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    largest = {}
    for noise, kind in [
        ("full", "fitness"),
        ("full", "gradient"),
        ("full", "auto"),
        ("low_rank", "fitness"),
        ("local", "fitness"),
    ]:
        with strategy.scope():
            model = keras_vo.VOSequential(
                [keras.Input((4,)), LAYERS[noise](30), keras.layers.Dense(2)]
            )
            model.compile(
                optimizer=keras_vo.VOOptimizer(
                    population_size=10, exchange=kind
                ),
                loss=LOSS,
            )
            model.optimizer.build(model.trainable_variables)
        largest[noise, kind] = max(collectives(strategy, model))
    size = 4 * 30 + 30 + 30 * 2 + 2
    # The losses of 10 members, and a baseline and a count for each replica.
    assert largest["full", "fitness"] == 10 + 2 * 2
    cheaper = cost.cost_model(network=False).cheaper(5, size, size + 2, 2)
    assert largest["full", "auto"] == largest["full", cheaper]
    assert largest["low_rank", "fitness"] == 10 + 2 * 2
    assert largest["full", "gradient"] >= size
    # Their scores need the activations: their gradients are exchanged.
    assert 4 * 30 + 30 <= largest["local", "fitness"] < size


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
            epochs=4,
            shuffle=False,
            verbose=0,
            callbacks=list(callbacks),
            **options,
        ).history

    class Interrupted(Exception):
        pass

    class Interrupt(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise Interrupted

    whole = made()
    history = fit(
        whole,
        keras.callbacks.ModelCheckpoint(tmp_path / "best.keras"),
        validation_data=(x[36:], y[36:]),
    )
    assert history["val_loss"][-1] < history["val_loss"][0]
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    with pytest.raises(Interrupted):
        fit(made(), backup, Interrupt())
    resumed = made()
    fit(resumed, keras.callbacks.BackupAndRestore(tmp_path / "backup"))
    loaded = keras.models.load_model(tmp_path / "best.keras")
    for other in (resumed, loaded):
        for one, two in zip(whole.weights, other.weights, strict=True):
            np.testing.assert_array_equal(one, two)
        for one, two in zip(
            whole.optimizer.variables, other.optimizer.variables, strict=True
        ):
            np.testing.assert_array_equal(one, two)
    whole.export(tmp_path / "saved", verbose=False)
    saved = tf.saved_model.load(tmp_path / "saved")
    served = saved.serve(x)
    np.testing.assert_allclose(served, loaded.predict(x, verbose=0), rtol=1e-5)


def test_weights_are_loaded_before_training_and_outside_of_the_scope(tmp_path):
    model, _ = trained(mirrored(2))
    model.save_weights(tmp_path / "model.weights.h5")
    with mirrored(2).scope():
        other = keras_vo.VOSequential(
            [
                keras.Input((4,)),
                keras.layers.Dense(5, "relu"),
                keras.layers.Dense(2),
            ]
        )
        other.compile(
            optimizer=keras_vo.VOOptimizer(population_size=10), loss=LOSS
        )
    other.load_weights(tmp_path / "model.weights.h5")
    assert int(other.optimizer.generations.numpy()) == 12
    for one, two in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)


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
