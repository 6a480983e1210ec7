"""What sensitivities are worth on digits, at equal evaluations.

Networks on scikit-learn's digits, as a stranger would write them, with
VOOptimizer's defaults but for `sensitivity` and `stddev`. Accuracy on a
validation part (a fifth of the images that are not for testing) after so many
steps of 128 evaluations; medians over seeds, least and largest. Prints a JSON
line a run, then a table for each network.

    python benchmarks/sensitivity.py

Networks:
    dense       64-64-10, ReLU, cross-entropy
    standard    that, of standardized pixels
    conv        a convolution, pooling, 10, cross-entropy
    deep        64-32-32-32-32-10 with BatchNormalization
    step        64-64-10, step units, the 0-1 error: only "inputs" can be found
    local       64-64-10, noise on activations
    low_rank    64-64-10, noise of low rank
"""

import itertools
import json
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags
from sklearn.datasets import load_digits

import keras_vo

FLAGS = flags.FLAGS
flags.DEFINE_list(
    "networks",
    ["dense", "standard", "conv", "deep", "step", "local", "low_rank"],
    "Which ones.",
)
flags.DEFINE_list("arms", ["None", "sum", "abs", "inputs"], "Sensitivities.")
flags.DEFINE_list("stddevs", ["auto"], "Sigma at first, of each arm.")
flags.DEFINE_list("seeds", ["0", "1", "2", "3", "4"], "Of each arm.")
flags.DEFINE_list("steps", ["50", "150", "300"], "When it is validated.")
flags.DEFINE_integer("batch_size", 256, "Images of a mini-batch.")
flags.DEFINE_string("inner_optimizer", "adam", "VOOptimizer's.")


def load(seed):
    """Images for training and for validation; those for testing stay out."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))[360:]
    order = np.random.default_rng(1 + seed).permutation(order)
    x, y = x.astype("float32") / 16, y.astype("int32")
    return (x[order[288:]], y[order[288:]]), (x[order[:288]], y[order[:288]])


def step(x):
    return tf.cast(x > 0, tf.float32)


def zero_one_error(y_true, y_pred):
    wrong = tf.argmax(y_pred, -1) != tf.cast(tf.reshape(y_true, [-1]), tf.int64)
    return tf.cast(wrong, tf.float32)


def make_network(name):
    layers = keras.layers
    if name == "conv":
        return [
            layers.Reshape((8, 8, 1)),
            layers.Conv2D(16, 3, activation="relu"),
            layers.MaxPool2D(2),
            layers.Flatten(),
            layers.Dense(10),
        ]
    if name == "deep":
        hidden = [
            [
                layers.Dense(32),
                layers.BatchNormalization(momentum=0.9),
                layers.ReLU(),
            ]
            for _ in range(4)
        ]
        return [*sum(hidden, []), layers.Dense(10)]
    activation = step if name == "step" else "relu"
    return [layers.Dense(64, activation=activation), layers.Dense(10)]


def run(name, arm, stddev, seed):
    """Validation accuracies, by number of steps."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(seed)
    (x, y), (x_val, y_val) = load(seed)
    if name == "standard":
        mean, std = x.mean(0), x.std(0) + 1e-3
        x, x_val = (x - mean) / std, (x_val - mean) / std
    model = keras_vo.VOSequential([keras.Input((64,)), *make_network(name)])
    perturbation = {"local": "local_reparam", "low_rank": "low_rank"}
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(
        optimizer=keras_vo.VOOptimizer(
            FLAGS.inner_optimizer,
            search_distribution=keras_vo.GaussianSearchDistribution(
                stddev=stddev if stddev == "auto" else float(stddev)
            ),
            sensitivity=None if arm == "None" else arm,
            perturbation=perturbation.get(name, "full"),
            seed=seed,
        ),
        loss=zero_one_error if name == "step" else loss,
    )
    batches = tf.data.Dataset.from_tensor_slices((x, y))
    batches = batches.shuffle(len(x), seed=seed).repeat()
    batches = iter(batches.batch(FLAGS.batch_size))
    found, done = {}, 0
    for steps in map(int, FLAGS.steps):
        model.fit(
            tf.data.Dataset.from_generator(
                lambda: batches,
                output_signature=(
                    tf.TensorSpec([None, 64], tf.float32),
                    tf.TensorSpec([None], tf.int32),
                ),
            ),
            steps_per_epoch=steps - done,
            shuffle=False,
            verbose=0,
        )
        logits = model.predict(x_val, verbose=0)
        found[steps] = float(np.mean(logits.argmax(-1) == y_val))
        done = steps
    return found


def main(_):
    for name in FLAGS.networks:
        arms = [
            a for a in FLAGS.arms if name != "step" or a not in ("sum", "abs")
        ]
        cells = {}
        for arm, stddev in itertools.product(arms, FLAGS.stddevs):
            runs = []
            for seed in map(int, FLAGS.seeds):
                runs.append(run(name, arm, stddev, seed))
                line = {
                    "network": name,
                    "arm": arm,
                    "stddev": stddev,
                    "seed": seed,
                }
                print(json.dumps(line | {"accuracy": runs[-1]}), flush=True)
            cells[arm, stddev] = {
                steps: np.sort([r[steps] for r in runs]) for steps in runs[0]
            }
        print(f"\n| {name} | sigma | " + " | ".join(FLAGS.steps) + " |")
        print("|---" * (2 + len(FLAGS.steps)) + "|")
        for arm, of in cells.items():
            texts = [
                f"{np.median(v):.3f} ({v[0]:.3f} to {v[-1]:.3f})"
                for v in of.values()
            ]
            print(f"| {' | '.join(arm)} | " + " | ".join(texts) + " |")
        print(flush=True)


if __name__ == "__main__":
    app.run(main)
