"""1 - macro F1 of the batch as the loss, with each kind of perturbation.

Digits (64-64-10) or MNIST (784-128-10), `VOOptimizer(perturbation=...)` and
nothing else set, some seconds of training after the first step. The score is
macro F1 on test data; with --valid, on the last fifth of the training data,
which is held out then. Takes perturbations * seeds * seconds:

    python benchmarks/f1_loss.py --perturbations=local_reparam
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from absl import app, flags
from keras import layers
from local_perturbation import macro_f1, steps_of
from sklearn.datasets import load_digits
from sklearn.metrics import f1_score

import keras_vo

FLAGS = flags.FLAGS
flags.DEFINE_string("data_path", None, "mnist.npz of Keras; None: digits.")
flags.DEFINE_bool("valid", False, "Score a part of the training data.")
flags.DEFINE_float("learning_rate", None, "Of Adam; None: the default.")
flags.DEFINE_float("stddev", None, 'Initial sigma; None: "auto".')
flags.DEFINE_integer("members", None, "examples_population_size.")
FLAGS.set_default("seconds", 15.0)
FLAGS.set_default("batch_size", 256)
FLAGS.set_default("seeds", [str(seed) for seed in range(10)])


def load():
    """Images and labels to train with, and to score."""
    if FLAGS.data_path:
        with np.load(FLAGS.data_path) as data:
            x = np.concatenate([data["x_train"], data["x_test"]]) / 255
            y = np.concatenate([data["y_train"], data["y_test"]])
        tested = 10_000
    else:
        x, y = load_digits(return_X_y=True)
        x, tested = x / 16, 397
    x = x.reshape(len(x), -1).astype("float32")
    if not FLAGS.data_path:  # MNIST's test images are others' handwriting
        order = np.random.default_rng(0).permutation(len(y))
        x, y = x[order], y[order]
    order = np.random.default_rng(1).permutation(len(y) - tested)
    if FLAGS.valid:
        held_out, rest = np.split(order, [len(order) // 5])
        return (x[rest], y[rest]), (x[held_out], y[held_out])
    return (x[order], y[order]), (x[-tested:], y[-tested:])


def optimizer(perturbation, seed):
    settings = {"perturbation": perturbation, "seed": seed}
    if FLAGS.learning_rate is not None:
        adam = keras.optimizers.Adam(FLAGS.learning_rate)
        settings["inner_optimizer"] = adam
    if FLAGS.stddev is not None:
        settings["search_distribution"] = keras_vo.GaussianSearchDistribution(
            stddev=FLAGS.stddev
        )
    if FLAGS.members is not None:
        settings["examples_population_size"] = FLAGS.members
    return keras_vo.VOOptimizer(**settings)


def run(perturbation, seed, train, scored):
    """Steps, macro F1, and how many classes are ever predicted."""
    keras.utils.set_random_seed(seed)
    inputs = train[0].shape[1]
    model = keras_vo.VOSequential(
        [
            keras.Input((inputs,)),
            layers.Dense(64 if inputs == 64 else 128, activation="relu"),
            layers.Dense(10),
        ]
    )
    model.compile(optimizer=optimizer(perturbation, seed), loss=macro_f1)
    steps = steps_of(model, *train)
    said = model.predict(scored[0], batch_size=1000, verbose=0).argmax(1)
    score = f1_score(scored[1], said, average="macro")
    return steps, score, len(set(said))


def main(_):
    train, scored = load()
    print("| perturbation | seed | steps | macro F1 | classes |")
    print("|---|---|---|---|---|")
    for perturbation in FLAGS.perturbations:
        for seed in map(int, FLAGS.seeds):
            steps, score, classes = run(perturbation, seed, train, scored)
            print(
                f"| {perturbation} | {seed} | {steps} | {score:.4f} | "
                f"{classes} |",
                flush=True,
            )


if __name__ == "__main__":
    app.run(main)
