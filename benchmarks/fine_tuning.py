"""Does fine-tuning a trained network by its defaults harm it first?

A network is trained by backpropagation (Adam, crossentropy), then by a
`VOOptimizer`. For each seed, loss and setting one line: the error on the
training data before, its largest rise after any epoch, the error after each;
validation error before and after; learning rate and sigma of the first layer at
the end.

    digits   MLP 64-64-10, 30 epochs of Adam, 80% of the images
    mnist    MLP 784-128-10, 4 epochs of Adam, 10,000 of the training images

    python benchmarks/fine_tuning.py --seeds=0,1,2,3,4
    python benchmarks/fine_tuning.py --task=mnist --mnist=PATH/mnist.npz

A setting is "default" (`VOOptimizer(seed=seed)`), or a sigma and a learning
rate of Adam, as in "0.02:0.002". `--pretrain=0` trains from scratch,
`--head` gives the trained network a new last layer.
"""

import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_vo

FLAGS = flags.FLAGS
# Units, epochs of Adam, epochs of the search.
TASKS = {"digits": ((64, 64, 10), 30, 8), "mnist": ((784, 128, 10), 4, 4)}
flags.DEFINE_enum("task", "digits", list(TASKS), "What is trained.")
flags.DEFINE_string("mnist", None, "Path of mnist.npz.")
flags.DEFINE_list("losses", ["zero_one", "crossentropy"], "Losses to minimise.")
flags.DEFINE_list("settings", ["default"], "See above.")
flags.DEFINE_list("seeds", ["0"], "Seeds of data, weights and noise.")
flags.DEFINE_integer("pretrain", None, "Epochs of Adam; none: the task's.")
flags.DEFINE_integer("epochs", None, "Epochs of the search; none: the task's.")
flags.DEFINE_integer("every", 1, "Epochs from one error to the next.")
flags.DEFINE_bool("head", False, "Whether the last layer is a new one.")


def zero_one_error(y_true, y_pred):
    wrong = tf.argmax(y_pred, -1) != tf.cast(tf.squeeze(y_true, -1), tf.int64)
    return tf.cast(wrong, tf.float32)


LOSSES = {
    "zero_one": zero_one_error,
    "crossentropy": "sparse_categorical_crossentropy",
}


def load(seed):
    """Images and labels [n, 1], of training and of validation."""
    if FLAGS.task == "digits":
        x, y = load_digits(return_X_y=True)
        return train_test_split(
            x.astype("float32") / 16,
            y[:, None],
            test_size=0.2,
            stratify=y,
            random_state=seed,
        )
    with np.load(FLAGS.mnist) as data:
        order = np.random.default_rng(seed).permutation(60000)[:12000]
        x = data["x_train"][order].reshape(-1, 784).astype("float32") / 255
        y = data["y_train"][order, None]
    return x[:10000], x[10000:], y[:10000], y[10000:]


def layers():
    units = TASKS[FLAGS.task][0]
    hidden = [keras.layers.Dense(n, "relu") for n in units[1:-1]]
    return [
        keras.Input(units[:1]),
        *hidden,
        keras.layers.Dense(units[-1], "softmax"),
    ]


def pretrained(seed, x, y):
    """A trained network's weights, those of each layer in a list."""
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(layers())
    model.compile("adam", LOSSES["crossentropy"])
    model.fit(x, y, epochs=epochs(), batch_size=64, verbose=0)
    return [layer.get_weights() for layer in model.layers]


def epochs():
    if FLAGS.pretrain is not None:
        return FLAGS.pretrain
    return TASKS[FLAGS.task][1]


def optimizer(setting, seed):
    if setting == "default":
        return keras_vo.VOOptimizer(seed=seed)
    stddev, rate = map(float, setting.split(":"))
    return keras_vo.VOOptimizer(
        keras.optimizers.Adam(rate),
        search_distribution=keras_vo.GaussianSearchDistribution(stddev=stddev),
        seed=seed,
    )


def error(model, x, y):
    return float(np.mean(model(x).numpy().argmax(1) != y[:, 0]))


def fine_tune(weights, data, loss, setting, seed):
    x, x_val, y, y_val = data
    keras.utils.set_random_seed(seed + 100)  # of a new last layer
    model = keras_vo.VOSequential(layers())
    if epochs():
        kept = weights[: len(weights) - FLAGS.head]
        for layer, values in zip(model.layers, kept, strict=False):
            layer.set_weights(values)
    model.compile(optimizer=optimizer(setting, seed), loss=LOSSES[loss])
    before, validation = error(model, x, y), error(model, x_val, y_val)
    start, errors = time.perf_counter(), []
    for _ in range(0, FLAGS.epochs or TASKS[FLAGS.task][2], FLAGS.every):
        model.fit(x, y, batch_size=128, epochs=FLAGS.every, verbose=0)
        errors.append(error(model, x, y))
    print(
        f"{FLAGS.task} {loss} {setting} seed {seed}: {before:.4f}, rise "
        f"{max(errors) - before:+.4f}, {[round(e, 4) for e in errors]}, "
        f"validation {validation:.4f} to {error(model, x_val, y_val):.4f}, "
        f"rate {float(model.optimizer.learning_rate):.3g}, sigma "
        f"{float(model.optimizer.stddevs[0][0, 0]):.3g}, "
        f"{time.perf_counter() - start:.0f} s",
        flush=True,
    )


def main(_):
    for seed in map(int, FLAGS.seeds):
        data = load(seed)
        weights = pretrained(seed, data[0], data[2])
        for loss in FLAGS.losses:
            for setting in FLAGS.settings:
                fine_tune(weights, data, loss, setting, seed)


if __name__ == "__main__":
    app.run(main)
