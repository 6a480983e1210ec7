"""How each default of VOOptimizer was chosen: one change at a time.

Every row changes one setting of `VOOptimizer()` and runs five tasks with an
equal number of evaluations, median over seeds:

    digits   test accuracy, MLP 64-64-10, |B| = 128, negative log-likelihood
    0-1      the same, trained on the 0-1 error
    mnist    test accuracy, MLP 784-64-10, 5000 images, |B| = 128
    himmel   Himmelblau's function at mu from (0, 0)
    quad     quadratic, 20 dimensions, condition 1e4, f(start) = 1

The last two start from sigma = 1 unless the row says otherwise, as a user
would whose weights are not a network's.

    python benchmarks/defaults.py --mnist path/to/mnist.npz
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_vo

FLAGS = flags.FLAGS
flags.DEFINE_string("mnist", None, "Path of mnist.npz; none: without MNIST.")
flags.DEFINE_integer("seeds", 3, "Seeds of each cell.")
flags.DEFINE_float("budget", 1.0, "Multiplies the evaluations of each task.")
flags.DEFINE_string("only", "", "Rows whose name contains this.")

DISTRIBUTION = keras_vo.VOOptimizer().search_distribution.get_config()
POPULATION = keras_vo.VOOptimizer().population_size
RATE = float(keras_vo.VOOptimizer().learning_rate)

# name: (arguments, those of the search distribution, learning rate)
ROWS = {
    "default": ({}, {}, None),
    **{
        f"population_size={n}": ({"population_size": n}, {}, None)
        for n in (64, 256)
    },
    **{
        f"learning rate {rate}": ({}, {}, rate)
        for rate in (0.001, 0.005, 0.01, 0.05)
    },
    **{f"stddev={s}": ({}, {"stddev": s}, None) for s in (0.05, 0.1, 0.4)},
    **{
        f"variance={v}": ({}, {"variance": v}, None)
        for v in ("fixed", "isotropic", "separable")
    },
    "follow_mean=False": ({}, {"follow_mean": False}, None),
    **{
        f"variance learning rate {rate}": ({}, {"learning_rate": rate}, None)
        for rate in (0.03, 0.1, 0.3, 1.0)
    },
    **{
        f"fitness_shaping={s}": ({"fitness_shaping": s}, {}, None)
        for s in ("identity", "standardize", "nes")
    },
    "natural_gradient=False": ({"natural_gradient": False}, {}, None),
    "antithetic=False": ({"antithetic": False}, {}, None),
    "max_kl=10": ({"max_kl": 10.0}, {}, None),
}


def optimizer(row, seed, **distribution):
    arguments, changes, rate = ROWS[row]
    distribution = DISTRIBUTION | distribution | changes
    return keras_vo.VOOptimizer(
        keras.optimizers.Adam(rate or RATE),
        search_distribution=keras_vo.GaussianSearchDistribution(**distribution),
        seed=seed,
        **arguments,
    )


def zero_one_error(y_true, y_pred):
    wrong = tf.not_equal(
        tf.argmax(y_pred, axis=-1), tf.cast(tf.squeeze(y_true, -1), tf.int64)
    )
    return tf.cast(wrong, tf.float32)


def classify(row, seed, data, loss, units, evaluations):
    keras.backend.clear_session()
    keras.utils.set_random_seed(seed)
    x, x_test, y, y_test = data
    model = keras_vo.VOSequential(
        [
            keras.Input((x.shape[1],)),
            keras.layers.Dense(units, activation="relu"),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    vo = optimizer(row, seed)
    model.compile(optimizer=vo, loss=loss, metrics=["accuracy"])
    steps = int(FLAGS.budget * evaluations) // vo.population_size
    batches = tf.data.Dataset.from_tensor_slices((x, y)).cache()
    batches = batches.shuffle(len(x), seed=seed).repeat().batch(128)
    model.fit(batches, steps_per_epoch=steps, verbose=0)
    return model.evaluate(x_test, y_test, verbose=0)[1]


def minimize(row, seed, objective, start, evaluations):
    mean = tf.Variable(start, dtype=tf.float32)
    stddev = {} if "stddev" in ROWS[row][1] else {"stddev": 1.0}
    vo = optimizer(row, seed, **stddev)
    step = tf.function(lambda: vo.minimize(objective, [mean]))
    for _ in range(int(FLAGS.budget * evaluations) // vo.population_size):
        step()
    return float(objective([tf.convert_to_tensor(mean)]))


def himmelblau(weights):
    x, y = weights[0][0], weights[0][1]
    return (x**2 + y - 11) ** 2 + (x + y**2 - 7) ** 2


def quadratic(weights):
    curvature = tf.constant(np.logspace(0, 4, 20), tf.float32)
    return tf.reduce_sum(curvature * weights[0] ** 2) / tf.reduce_sum(curvature)


def digits():
    x, y = load_digits(return_X_y=True)
    return train_test_split(
        x.astype("float32") / 16,
        y.reshape(-1, 1),
        test_size=0.2,
        stratify=y,
        random_state=0,
    )


def mnist(path):
    with np.load(path) as data:
        some = np.random.default_rng(0).permutation(len(data["x_train"]))[:5000]
        return (
            data["x_train"][some].reshape(-1, 784).astype("float32") / 255,
            data["x_test"].reshape(-1, 784).astype("float32") / 255,
            data["y_train"][some].reshape(-1, 1),
            data["y_test"].reshape(-1, 1),
        )


def main(argv):
    del argv
    small = digits()
    nll = "sparse_categorical_crossentropy"
    tasks = {
        "digits": lambda row, seed: classify(
            row, seed, small, nll, 64, 128 * 1200
        ),
        "0-1": lambda row, seed: classify(
            row, seed, small, zero_one_error, 64, 128 * 1200
        ),
        "himmel": lambda row, seed: minimize(
            row, seed, himmelblau, [0.0, 0.0], 128 * 1000
        ),
        "quad": lambda row, seed: minimize(
            row, seed, quadratic, [1.0] * 20, 128 * 1000
        ),
    }
    if FLAGS.mnist:
        images = mnist(FLAGS.mnist)
        tasks["mnist"] = lambda row, seed: classify(
            row, seed, images, nll, 64, 128 * 400
        )
    print(f"| {'one change':<28} | " + " | ".join(tasks) + " |", flush=True)
    print("|---" * (len(tasks) + 1) + "|", flush=True)
    for row in ROWS:
        if FLAGS.only not in row:
            continue
        cells = []
        for name, task in tasks.items():
            values = [task(row, seed) for seed in range(FLAGS.seeds)]
            style = ".1e" if name in ("himmel", "quad") else ".3f"
            cells.append(f"{np.median(values):{style}}")
        print(f"| {row:<28} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    app.run(main)
