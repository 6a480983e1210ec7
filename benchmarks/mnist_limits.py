"""Where local reparameterization wins on MNIST, and where it does not.

Runs examples/mnist.py with wider and wider layers, with losses that have a
value for each image and one that has none, and with convolutions, and prints
a line for each run, of two epochs. A "cnn" has its convolutions perturbed in
weight space, "patches" has one as a dense layer on patches.

    python benchmarks/mnist_limits.py --data_path PATH/mnist.npz
"""

import json

from absl import app, flags
from mnist_curves import WEIGHT_SPACE, run

FLAGS = flags.FLAGS

KINDS = {
    "local": ["--dense=local_reparam"],
    "low_rank": [*WEIGHT_SPACE, "--dense=low_rank", "--population_size=256"],
    "backpropagation": ["--backpropagation", "--learning_rate=0.001"],
}
GROUPS = {
    f"mlp 784-{units}-10, nll": ([f"--units={units}"], list(KINDS))
    for units in (32, 128, 512)
} | {
    "mlp 784-128-10, 0-1 error": (["--loss=zero_one"], ["local", "low_rank"]),
    "mlp 784-128-10, macro F1": (["--loss=f1"], ["low_rank"]),
    "patches, nll": (
        ["--network=patches", "--units=64"],
        ["local", "backpropagation"],
    ),
    "cnn, nll": (
        ["--network=cnn", "--units=64"],
        ["local", "backpropagation"],
    ),
}


def main(argv):
    del argv
    for group, (arguments, kinds) in GROUPS.items():
        for kind in kinds:
            name = f"{group}, {kind}"
            points = run(name, [*KINDS[kind], *arguments, "--epochs=2"])
            row = {"run": name} | points[-1]
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    app.run(main)
