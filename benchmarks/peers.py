"""Steps of keras_vo beside those of other packages, in turn, on one machine.

Each package has a process of its own (in an environment of its own, which `make
bench-peers` makes) that holds its network and its search. They take steps in
turn, so that what the machine does meanwhile meets all of them: a ratio is the
median over rounds of the ratio within a round. All have the same data, the same
first weights, antithetic pairs, centered ranks and Adam; losses are those of
the mean, before and after, so that all that is timed is seen to learn. One JSON
line for each cell and package.

    make bench-peers
    python benchmarks/peers.py --cells=0,1 --packages=keras_vo_full,jax_full
"""

import json
import pathlib
import subprocess
import sys

import numpy as np
from absl import app, flags

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE / "packages"))

from cells import CELLS  # noqa: E402

# Of each package: its environment ("" is this one), and whose step it has.
PACKAGES = {
    "keras_vo_full": "",
    "torch_full": "torch",
    "evotorch_full": "torch",
    "jax_full": "jax",
    "evosax_full": "jax",
    "keras_vo_low_rank": "",
    "jax_rank_1": "jax",
}

FLAGS = flags.FLAGS
flags.DEFINE_list("cells", [str(i) for i in range(len(CELLS))], "Indices.")
flags.DEFINE_list("packages", list(PACKAGES), "Names.")
flags.DEFINE_integer("rounds", 7, "Times that each package has its turn.")
flags.DEFINE_float("turn", 0.7, "Seconds of a turn, at least two steps.")
flags.DEFINE_string("environments", str(HERE.parent / ".venv-peers"), "Folder.")


class Child:
    """The process of one package."""

    def __init__(self, package, cell):
        environment = PACKAGES[package]
        python = sys.executable
        if environment:
            python = str(
                pathlib.Path(FLAGS.environments, environment, "bin/python")
            )
        self.process = subprocess.Popen(
            [python, "child.py", package, str(cell)],
            cwd=HERE / "packages",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.begun = self._read()
        self.seconds = []
        self.loss = self.begun["loss"]
        self.steps = 2
        self.take(2)  # how long a step is

    def _read(self):
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"It ended: {self.process.args}")
        return json.loads(line)

    def take(self, steps):
        """Takes steps; returns the median of their seconds."""
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        found = self._read()
        self.loss = found["loss"]
        median = float(np.median(found["seconds"]))
        self.steps = max(2, round(FLAGS.turn / median))
        return median

    def end(self):
        """Ends the process; returns its peak memory, in MiB."""
        self.process.stdin.close()
        peak = self._read()["peak_mib"]
        self.process.wait()
        return peak


def measure(cell):
    """Rows of one cell, by package."""
    children = {name: Child(name, cell) for name in FLAGS.packages}
    times = {name: [] for name in children}
    for _ in range(FLAGS.rounds):
        for name, child in children.items():
            times[name].append(child.take(child.steps))
    rows = {}
    for name, child in children.items():
        rows[name] = {
            "cell": CELLS[cell].name,
            "package": name,
            "ms": round(1e3 * float(np.median(times[name])), 2),
            "times_of_keras_vo": {
                own: round(
                    float(np.median(np.divide(times[own], times[name]))), 3
                )
                for own in times
                if own.startswith("keras_vo") and own != name
            },
            "import_s": round(child.begun["import_s"], 2),
            "first_step_s": round(child.begun["first_s"], 2),
            "first_loss": round(child.begun["loss"], 4),
            "last_loss": round(child.loss, 4),
            "peak_mib": round(child.end()),
        }
    return rows


def main(argv):
    del argv
    for cell in map(int, FLAGS.cells):
        for row in measure(cell).values():
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    app.run(main)
