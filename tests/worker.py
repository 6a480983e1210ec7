"""A worker of a cluster: what the processes of test_multi_worker.py do.

The environment variable TF_CONFIG says which worker it is.
"""

import concurrent.futures as futures
import contextlib
import json
import os
import signal

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

import keras_vo

OPTIONS = {
    "strategy": "keras_vo",  # or "tensorflow"
    "units": [5],
    "optimizer": {},  # arguments of VOOptimizer
    "initial": 0,  # the seed of the initial weights
    "same_batch": True,  # every worker has the whole batch
    "compile": {},
    "fit": {},
    "backup": None,  # a directory
    "checkpoint": None,  # a path
    "monitor": None,  # a path of a CSV file, of which {} is the worker
    "evaluate": True,
    "told": False,
    "kill": None,  # [worker, batch], counted over all epochs
    "result": None,  # a path, of which {} is the worker
    "start_timeout": 60.0,
}


class Kill(keras.callbacks.Callback):
    """Ends the process as a machine that loses its power would."""

    def __init__(self, batch):
        super().__init__()
        self.left = batch

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)


def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(67, 4)).astype("float32")
    return x, (x.sum(1) > 0).astype("int32")


def model(options):
    keras.utils.set_random_seed(options["initial"])
    made = keras_vo.VOSequential(
        [
            keras.Input((4,)),
            *[
                keras.layers.Dense(n, activation="relu")
                for n in options["units"]
            ],
            keras.layers.Dense(2),
        ]
    )
    made.compile(
        optimizer=keras_vo.VOOptimizer(
            **{"population_size": 12, "seed": 3} | options["optimizer"]
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        **options["compile"],
    )
    return made


def square_distance(weights):
    return float(np.sum((np.asarray(weights[0], float) - 1) ** 2))


def told(strategy=None):
    """A search by losses of Python's: each worker finds those of its members.

    That of member 5 is missing.

    Returns:
        The weights after four steps, and how many members were evaluated.
    """
    with strategy.scope() if strategy else contextlib.nullcontext():
        variable = tf.Variable(tf.zeros([4, 3]))
        optimizer = keras_vo.VOOptimizer(population_size=12, seed=5)
    evaluated = 0
    for _ in range(3):
        population = optimizer.ask([variable])
        own = [member for member in population.own if member != 5]
        losses = {i: square_distance(population[i]) for i in own}
        evaluated += len(losses)
        assert optimizer.tell(population, losses).evaluations == 11
    with futures.ThreadPoolExecutor(2) as threads:
        optimizer.minimize(square_distance, [variable], executor=threads)
    result = variable.numpy()
    if strategy:  # one worker has no result at all
        population = optimizer.ask([variable])
        first = 0 in population.own
        losses = {i: square_distance(population[i]) for i in population.own}
        report = optimizer.tell(population, losses if first else {})
        assert report.updated
        assert 0 < report.evaluations < 12
    return result, evaluated


def mixed(strategy=None):
    """Another one, some of whose members are used once more.

    Returns:
        The weights after six steps.
    """
    with strategy.scope() if strategy else contextlib.nullcontext():
        variable = tf.Variable(tf.zeros([4, 3]))
        optimizer = keras_vo.VOOptimizer(
            population_size=12,
            importance_mixing=0.0,
            antithetic=False,
            max_kl=0.1,
            seed=5,
        )
    for _ in range(6):
        population = optimizer.ask([variable])
        losses = {i: square_distance(population[i]) for i in population.own}
        report = optimizer.tell(population, losses)
        assert report.evaluations == len(population)
        assert report.mixing.reused == 12 - len(population)
    assert report.mixing.reused > 3
    return variable.numpy()


def play(strategy=None):
    """A policy that each worker plays the episodes of its members with.

    Returns:
        Its weights, statistics of observations included, and the time steps
        of all workers.
    """
    with strategy.scope() if strategy else contextlib.nullcontext():
        policy = keras.Sequential(
            [
                keras.Input((4,)),
                keras_vo.rl.ObservationNormalization(),
                keras.layers.Dense(2, kernel_initializer="zeros"),
            ]
        )
        optimizer = keras_vo.VOOptimizer(
            keras_vo.rl.ClipUp(0.1), population_size=12, seed=5
        )
    rollouts = keras_vo.rl.Rollouts("CartPole-v1", policy)
    for _ in range(3):
        rollouts.step(optimizer)
    return [v.numpy() for v in policy.weights], rollouts.interactions


def main(options):
    worker = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
    if options["strategy"] == "keras_vo":
        strategy = keras_vo.distribution.multi_worker_strategy(
            options["start_timeout"]
        )
    else:
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
    with strategy.scope():
        trained = model(options)
    x, y = data()
    callbacks = []
    if options["backup"]:
        callbacks.append(keras.callbacks.BackupAndRestore(options["backup"]))
    if options["checkpoint"]:
        callbacks.append(keras.callbacks.ModelCheckpoint(options["checkpoint"]))
    if options["monitor"]:
        path = options["monitor"].format(worker)
        callbacks.append(keras_vo.callbacks.SearchMonitor("step", csv=path))
    if options["kill"] and options["kill"][0] == worker:
        callbacks.append(Kill(options["kill"][1]))
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(16)
    if options["same_batch"]:
        batches = strategy.distribute_datasets_from_function(lambda _: batches)
    history = trained.fit(
        batches,
        **{"verbose": 0, "shuffle": False, "epochs": 4, "callbacks": callbacks}
        | options["fit"],
    ).history
    results = {f"w{i}": v.numpy() for i, v in enumerate(trained.weights)}
    results |= {
        f"s{i}": v.numpy() for i, v in enumerate(trained.optimizer.stddevs)
    }
    results |= {f"history {k}": v for k, v in history.items()}
    if options["evaluate"]:
        results["evaluated"] = trained.evaluate(x, y, batch_size=16, verbose=0)
        results["predicted"] = trained.predict(x, batch_size=16, verbose=0)
    if options["told"]:
        results["told"], evaluated = told(strategy)
        assert evaluated < 3 * 11
        results["mixed"] = mixed(strategy)
        played, results["interactions"] = play(strategy)
        results |= {f"played{i}": w for i, w in enumerate(played)}
    np.savez(options["result"].format(worker), **results)
