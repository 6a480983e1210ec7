"""Peak memory of steps, and the time of imports, each in its own process.

What a process needs at most, as the system counts it (MiB): after the import,
for `model.predict` of one batch, and for steps with populations of any size and
with a network of 10 million weights. Two steps each, through `train_on_batch`,
defaults, |B| = 128. Neither depends on what else the machine does. One JSON
line a row.

    python benchmarks/memory.py
"""

import json
import os
import resource
import subprocess
import sys

import numpy as np
from absl import app, flags

SMALL, LARGE = "784-128-10", "784-3000-2500-10"
ROWS = [
    ("predict", 0, SMALL),
    *(("full", n, SMALL) for n in (256, 1024, 4096, 65536)),
    *(("low_rank", n, SMALL) for n in (256, 4096, 65536)),
    ("predict", 0, LARGE),
    *((kind, 64, LARGE) for kind in ("full", "low_rank")),
]
MODULES = ["tensorflow, keras", "keras_vo"]

FLAGS = flags.FLAGS
flags.DEFINE_string("row", None, "That of one process: kind,N,units.")
flags.DEFINE_integer("imports", 5, "Processes for the time of each import.")
flags.DEFINE_integer("memory_budget", 2**29, "Of VOOptimizer, bytes.")


def peak():
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def measure(kind, population_size, units):
    """A row."""
    import keras

    import keras_vo

    imported = peak()
    sizes = [int(size) for size in units.split("-")]
    model = keras_vo.VOSequential(
        [
            keras.Input((sizes[0],)),
            *(keras.layers.Dense(n, activation="relu") for n in sizes[1:-1]),
            keras.layers.Dense(sizes[-1]),
        ]
    )
    generator = np.random.default_rng(0)
    x = generator.normal(size=(128, sizes[0])).astype("float32")
    y = generator.integers(sizes[-1], size=(128, 1))
    if kind == "predict":
        model.predict(x, batch_size=128, verbose=0)
    else:
        model.compile(
            optimizer=keras_vo.VOOptimizer(
                population_size=population_size,
                perturbation=kind,
                memory_budget=FLAGS.memory_budget,
            ),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        for _ in range(2):
            model.train_on_batch(x, y)
    return {
        "network": units,
        "weights": model.count_params(),
        "what": kind,
        "N": population_size,
        "imported_mib": imported,
        "peak_mib": peak(),
    }


def run(*command):
    """What a process of Python puts out, JSON."""
    return json.loads(
        subprocess.run(
            [sys.executable, *command],
            env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.splitlines()[-1]
    )


def import_seconds(modules):
    """Processor time of an import."""
    return run(
        "-c",
        "import time; start = time.process_time()\n"
        f"import {modules}\n"
        "print(time.process_time() - start)",
    )


def main(argv):
    del argv
    if FLAGS.row:
        kind, size, units = FLAGS.row.split(",")
        print(json.dumps(measure(kind, int(size), units)))
        return
    seconds = [
        [import_seconds(modules) for modules in MODULES]
        for _ in range(FLAGS.imports)
    ]
    ours_over = [ours / base for base, ours in seconds]
    print(
        json.dumps(
            {
                "import_s": dict(
                    zip(MODULES, np.median(seconds, axis=0), strict=True)
                ),
                "ratio": float(np.median(ours_over)),
            }
        )
    )
    for row in ROWS:
        row = ",".join(map(str, row))
        found = run(
            __file__,
            f"--row={row}",
            f"--memory_budget={FLAGS.memory_budget}",
        )
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    app.run(main)
