"""Accuracy of each kind of noise, and of backpropagation, on MNIST.

Runs examples/mnist.py one arm after another, then plots test error over
seconds of training and over evaluations (forward passes for one image), and
prints a table. Every arm minimises the negative log-likelihood with a learning
rate that falls to 0 at the arm's end; networks are an MLP 784-128-10, or the
CNNs of the example. Arms with `--shift`, backpropagation's among them, move the
training images by up to a pixel.

    python benchmarks/mnist_curves.py --data_path PATH/mnist.npz
"""

import json
import pathlib
import subprocess
import sys

import matplotlib
import matplotlib.pyplot as plt
from absl import app, flags

matplotlib.use("agg")

FLAGS = flags.FLAGS
flags.DEFINE_string("data_path", None, "See examples/mnist.py.")
flags.DEFINE_string("folder", "out/curves", "Curves; those there are kept.")
flags.DEFINE_string("plot_path", "benchmarks/mnist_curves.png", "The plot.")
flags.DEFINE_list("arms", [], "Names of arms; all by default.")

WEIGHT_SPACE = [
    "--fitness_shaping=centered_rank",
    "--learning_rate=0.02",
    "--stddev=0.2",
    "--batch_size=128",
]
CNN = ["--network=patches", "--units=64", "--shift=1"]
ARMS = {
    "weight space (N = 128)": [
        *WEIGHT_SPACE,
        "--dense=full",
        "--population_size=128",
        "--epochs=6",
    ],
    "low rank (N = 256)": [
        *WEIGHT_SPACE,
        "--dense=low_rank",
        "--population_size=256",
        "--epochs=18",
    ],
    "local reparameterization (N = 16)": ["--epochs=60", "--shift=1"],
    "local reparameterization: patches CNN": [
        *CNN,
        "--stddev=0.05",
        "--epochs=94",
    ],
    "local reparameterization: frozen CNN": [
        "--network=frozen",
        "--units=",
        "--epochs=40",
    ],
    "backpropagation": [
        "--backpropagation",
        "--learning_rate=0.001",
        "--shift=1",
        "--epochs=40",
    ],
    "backpropagation: patches CNN": [
        *CNN,
        "--backpropagation",
        "--learning_rate=0.001",
        "--epochs=40",
    ],
}


def run(name, arguments):
    """The curve of a run of the example, from a file if it is there."""
    path = pathlib.Path(FLAGS.folder) / f"{name.replace(' ', '_')}.json"
    if not path.exists():
        example = pathlib.Path(__file__).parent.parent / "examples" / "mnist.py"
        command = [sys.executable, example, *arguments]
        command += [f"--curve_path={path}", "--plot_path="]
        if FLAGS.data_path:
            command.append(f"--data_path={FLAGS.data_path}")
        subprocess.run(
            [str(part) for part in command],
            check=True,
            stdout=subprocess.DEVNULL,
        )
    return json.loads(path.read_text(encoding="utf-8"))["points"]


def plot(curves, path):
    figure, panels = plt.subplots(
        1, 2, figsize=(10, 5), sharey=True, layout="constrained"
    )
    for name, points in curves.items():
        errors = [100 * (1 - point["accuracy"]) for point in points]
        for axes, key in zip(panels, ("seconds", "evaluations"), strict=True):
            style = "--" if "CNN" in name else "-"
            axes.plot(
                [point[key] for point in points], errors, style, label=name
            )
    panels[0].set(
        xlabel="seconds of training on two cores",
        ylabel="misclassified test images, %",
        xscale="log",
        yscale="log",
    )
    panels[1].set(
        xlabel="evaluations (forward passes for one image)", xscale="log"
    )
    panels[0].set_yticks([1, 2, 3, 5, 10, 20, 50], minor=False)
    panels[0].yaxis.set_major_formatter("{x:g}")
    panels[0].yaxis.set_minor_formatter("")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3)
    for axes in panels:
        axes.grid(alpha=0.3, which="both")
    figure.suptitle("MNIST, MLP 784-128-10 but where it says CNN")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv):
    del argv
    curves = {name: run(name, ARMS[name]) for name in FLAGS.arms or ARMS}
    for name, points in curves.items():
        at_40 = [p["accuracy"] for p in points if p["seconds"] <= 40]
        row = {
            "arm": name,
            "accuracy_after_40_s": at_40[-1] if at_40 else None,
            "accuracy": points[-1]["accuracy"],
            "seconds": points[-1]["seconds"],
            "evaluations": points[-1]["evaluations"],
        }
        print(json.dumps(row), flush=True)
    plot(curves, pathlib.Path(FLAGS.plot_path))


if __name__ == "__main__":
    app.run(main)
