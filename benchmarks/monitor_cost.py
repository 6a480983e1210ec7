"""What `SearchMonitor` costs: steps of `fit` with it and without it.

Two models of the same kind are trained in turns in one process, an epoch of
one after an epoch of the other. Reported are the medians of their times, and
that of the ratios of the epochs of one turn; of CPU time too, which depends
less on who else uses the machine. The monitor writes a row of CSV each
step or epoch. One JSON line a cell.

    python benchmarks/monitor_cost.py
"""

import itertools
import json
import os
import tempfile
import threading
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from absl import app, flags

import keras_vo

FLAGS = flags.FLAGS
flags.DEFINE_integer("epochs", 20, "Pairs of epochs in a cell.")
flags.DEFINE_integer("steps", 100, "Steps of an epoch.")
flags.DEFINE_list("every", ["step", "epoch"], "What the monitor records.")
flags.DEFINE_list("variances", ["layerwise"], "Variance structures.")
flags.DEFINE_list("cells", ["0", "1", "2"], "Which of `CELLS`.")

DENSE = keras.layers.Dense
LOCAL = keras_vo.layers.LocalReparamDense
# Units, kind of layers, population size, batch size.
CELLS = (
    ((64, 64, 10), DENSE, 128, 64),
    ((784, 128, 10), DENSE, 256, 128),
    ((784, 128, 10), LOCAL, 16, 256),
)


def make_model(units, layer, population_size, variance):
    keras.utils.set_random_seed(0)
    model = keras_vo.VOSequential(
        [
            keras.Input(units[:1]),
            *[layer(n, activation="relu") for n in units[1:-1]],
            layer(units[-1]),
        ]
    )
    model.compile(
        optimizer=keras_vo.VOOptimizer(
            population_size=population_size,
            examples_population_size=population_size,
            search_distribution=variance,
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


class Turns(keras.callbacks.Callback):
    """Lets the `fit` of another thread have an epoch after each of its own.

    Attributes:
        wall, cpu: seconds of each epoch, and of the process's CPU time.
    """

    def __init__(self):
        super().__init__()
        self.wall, self.cpu = [], []
        self.mine, self.others = threading.Event(), None

    def on_epoch_begin(self, epoch, logs=None):
        self.mine.wait()
        self.mine.clear()
        self.began = time.perf_counter(), time.process_time()

    def on_epoch_end(self, epoch, logs=None):
        self.wall.append(time.perf_counter() - self.began[0])
        self.cpu.append(time.process_time() - self.began[1])
        self.others.set()


def measure(
    units, layer, population_size, batch_size, variance, every, directory
):
    generator = np.random.default_rng(0)
    off, on = Turns(), Turns()
    off.others, on.others = on.mine, off.mine
    monitor = keras_vo.callbacks.SearchMonitor(
        every, csv=os.path.join(directory, "search.csv")
    )

    def fit(callbacks):
        examples = FLAGS.steps * batch_size
        x = generator.normal(size=(examples, units[0])).astype("float32")
        y = generator.integers(0, units[-1], size=(examples, 1))
        make_model(units, layer, population_size, variance).fit(
            x,
            y,
            batch_size=batch_size,
            epochs=1 + FLAGS.epochs,  # the first one traces
            verbose=0,
            callbacks=callbacks,
        )

    # The turn is passed on after the monitor has done what it does at the end
    # of an epoch.
    threads = [
        threading.Thread(target=fit, args=(callbacks,))
        for callbacks in ([off], [monitor, on])
    ]
    for thread in threads:
        thread.start()
    off.mine.set()
    for thread in threads:
        thread.join()
    row = {
        "network": "-".join(map(str, units)),
        "layer": layer.__name__,
        "variance": variance,
        "every": every,
        "population_size": population_size,
        "batch": batch_size,
    }
    for name in ("wall", "cpu"):
        first, second = (np.array(getattr(t, name)[1:]) for t in (off, on))
        row[f"{name}_off_ms"] = 1e3 * np.median(first) / FLAGS.steps
        row[f"{name}_on_ms"] = 1e3 * np.median(second) / FLAGS.steps
        ratios = second / first
        row[f"{name}_ratio"] = np.median(ratios)
        row[f"{name}_quartiles"] = list(np.quantile(ratios, (0.25, 0.75)))
    return keras.tree.map_structure(
        lambda x: round(float(x), 4) if isinstance(x, float) else x, row
    )


def main(argv):
    del argv
    with tempfile.TemporaryDirectory() as directory:
        for cell, *kind in itertools.product(
            FLAGS.cells, FLAGS.variances, FLAGS.every
        ):
            row = measure(*CELLS[int(cell)], *kind, directory)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    app.run(main)
