"""Trains one classifier with several worker processes.

Each worker evaluates its share of the population on its shard of the batch;
what they exchange are the losses of the members, or gradients where that is
cheaper. `--num_workers` starts the workers on this machine:

    python examples/multi_worker.py --num_workers=2

On a cluster, start the script once on each machine, with TF_CONFIG in its
environment (https://www.tensorflow.org/guide/distributed_training#TF_CONFIG).
"""

import json
import os
import socket
import subprocess
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags, logging
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_vo
from keras_vo import distribution

FLAGS = flags.FLAGS

flags.DEFINE_integer(
    "num_workers",
    2,
    "Processes to start on this machine; ignored if TF_CONFIG is set.",
)
flags.DEFINE_string(
    "data_path",
    None,
    "mnist.npz, as Keras has it. By default: scikit-learn's 1797 digits.",
)
flags.DEFINE_enum(
    "exchange", "auto", ["auto", "fitness", "gradient"], "What workers send."
)
flags.DEFINE_integer("epochs", 40, "Passes over the images.")
flags.DEFINE_integer("batch_size", 128, "Images of all workers together.")
flags.DEFINE_integer("population_size", 128, "Members of all workers together.")
flags.DEFINE_integer("units", 64, "Of the hidden layer.")
flags.DEFINE_float("learning_rate", 0.02, "Of Adam, at the beginning.")
flags.DEFINE_integer("seed", 0, "Seed of initial weights, batches and noise.")
flags.DEFINE_string(
    "backup_dir",
    None,
    "Where each epoch is saved, for all workers to go on from if one is lost.",
)
flags.DEFINE_float("start_timeout", 300.0, "Seconds to wait for workers.")


def start_workers(count):
    """Runs this script once for each worker: the worst of their exit codes."""
    servers = [socket.create_server(("localhost", 0)) for _ in range(count)]
    addresses = [f"localhost:{s.getsockname()[1]}" for s in servers]
    for server in servers:
        server.close()
    workers = [
        subprocess.Popen(
            [sys.executable, *sys.argv],
            env=os.environ
            | {
                "TF_CONFIG": json.dumps(
                    {
                        "cluster": {"worker": addresses},
                        "task": {"type": "worker", "index": index},
                    }
                )
            },
        )
        for index in range(count)
    ]
    try:
        return max(abs(worker.wait()) for worker in workers)
    finally:
        for worker in workers:
            worker.kill()


def load_data():
    """Training and test images [n, pixels] in [0, 1], and labels [n]."""
    if FLAGS.data_path:
        with np.load(FLAGS.data_path) as data:
            images = [data["x_train"], data["x_test"]]
            labels = [data["y_train"], data["y_test"]]
        images = [x.reshape(len(x), -1).astype("float32") / 255 for x in images]
        return *images, *labels
    x, y = load_digits(return_X_y=True)
    return train_test_split(
        x.astype("float32") / 16, y, test_size=0.2, stratify=y, random_state=0
    )


def make_model(pixels, steps):
    """The compiled MLP, as on one machine."""
    model = keras_vo.VOSequential(
        [
            keras.Input((pixels,)),
            keras.layers.Dense(FLAGS.units, activation="relu"),
            keras.layers.Dense(10),
        ]
    )
    rate = keras.optimizers.schedules.CosineDecay(FLAGS.learning_rate, steps)
    model.compile(
        optimizer=keras_vo.VOOptimizer(
            keras.optimizers.Adam(rate),
            population_size=FLAGS.population_size,
            exchange=FLAGS.exchange,
            seed=FLAGS.seed,
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def train():
    """What one worker does."""
    strategy = distribution.multi_worker_strategy(FLAGS.start_timeout)
    first = distribution.is_first_worker(strategy)
    keras.utils.set_random_seed(FLAGS.seed)  # the same order of images
    x_train, x_test, y_train, y_test = load_data()
    steps = FLAGS.epochs * -(-len(x_train) // FLAGS.batch_size)
    with strategy.scope():  # all that is not as on one machine
        model = make_model(x_train.shape[1], steps)
    callbacks = []
    if FLAGS.backup_dir:
        callbacks.append(keras.callbacks.BackupAndRestore(FLAGS.backup_dir))
    start = time.perf_counter()
    model.fit(
        x_train,
        y_train,
        batch_size=FLAGS.batch_size,
        epochs=FLAGS.epochs,
        callbacks=callbacks,
        verbose="auto" if first else 0,
    )
    elapsed = time.perf_counter() - start
    loss, accuracy = model.evaluate(
        x_test, y_test, batch_size=len(x_test), verbose=0
    )
    if not first:
        return
    generations = int(model.optimizer.generations.numpy())
    stddevs = [float(tf.reduce_mean(s)) for s in model.optimizer.stddevs]
    rows = [
        ("test accuracy", f"{accuracy:.4f}"),
        ("test loss", f"{loss:.4f}"),
        ("workers", f"{strategy.num_replicas_in_sync}"),
        ("exchange", FLAGS.exchange),
        ("training time", f"{elapsed:.1f} s"),
        ("generations", f"{generations}"),
        ("evaluations", f"{generations * FLAGS.population_size}"),
        ("sigma, by weight tensor", " ".join(f"{s:.3g}" for s in stddevs)),
    ]
    width = max(len(name) for name, _ in rows)
    print("\n" + "-" * (width + 22))
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    print("-" * (width + 22))


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Expected flags only. Received: {argv[1:]}")
    logging.set_verbosity(logging.WARNING)
    if FLAGS.num_workers < 1:
        raise app.UsageError(
            "Expected --num_workers of 1 or more. "
            f"Received: {FLAGS.num_workers}"
        )
    if not os.environ.get("TF_CONFIG"):
        sys.exit(start_workers(FLAGS.num_workers))
    train()


if __name__ == "__main__":
    app.run(main)
