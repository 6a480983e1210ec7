"""What importance weights of former members are worth in high dimension.

    python benchmarks/importance_weights.py

A population of 64 members makes a step of the search, which is scaled to a KL
divergence, and is then weighted by p'(x) / p(x), as if it were from the new
distribution. Beside it an independent population of p, which did not make the
step, is weighted. Two tables, and their plot beside this file:

    dimension   a linear function of d weights: effective sample sizes, and the
                share that importance mixing keeps
    digits      the gradient at the new distribution of 64-32-10 on 1,149
                digits, at three places of a training: its cosine with the true
                one (the mean of 500 gradients by backpropagation), from 64 new
                members; from the former ones without weights; with weights of
                the whole network, and of each layer by itself

Means over repetitions.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import pathlib

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags
from sklearn.datasets import load_digits

FLAGS = flags.FLAGS
flags.DEFINE_list("dimensions", ["2", "10", "100", "1000", "10000"], "Of f.")
flags.DEFINE_list("max_kls", ["10", "1", "0.1", "0.03", "0.003"], "Of steps.")
flags.DEFINE_integer("repetitions", 100, "Of each cell of the first table.")
flags.DEFINE_list("places", ["0", "100", "400"], "Steps of Adam before.")
flags.DEFINE_integer("gradients", 20, "Repetitions of the second table.")

MEMBERS, SIGMA = 64, 0.1
LAYERS = ((64, 32), (32,), (32, 10), (10,))


def utilities(losses):
    """Centred ranks."""
    ranks = np.argsort(np.argsort(losses))
    return ranks / (len(losses) - 1) - 0.5


def move(z, losses, kl):
    """The step, in units of sigma, that has this divergence."""
    direction = -utilities(losses) @ z
    return direction * np.sqrt(2 * kl) / np.linalg.norm(direction)


def log_weights(z, step):
    """log p'(x) / p(x) of members mu + sigma z; mu moves by sigma step."""
    return z @ step - 0.5 * step @ step


def effective_size(ratios):
    weights = np.exp(ratios - ratios.max())
    return weights.sum() ** 2 / np.square(weights).sum()


def kept(ratios):
    return np.minimum(1.0, np.exp(np.minimum(ratios, 0.0))).mean()


def by_dimension():
    rng = np.random.default_rng(0)
    kls, found = list(map(float, FLAGS.max_kls)), {}
    for d in map(int, FLAGS.dimensions):
        gradient = np.ones(d) / np.sqrt(d)
        for kl in kls:
            rows = []
            for _ in range(FLAGS.repetitions):
                own, other = rng.normal(size=(2, MEMBERS, d))
                step = move(own, own @ gradient, kl)
                ratios = [log_weights(z, step) for z in (own, other)]
                rows.append(
                    [g(r) for g in (effective_size, kept) for r in ratios]
                )
            found[d, kl] = np.mean(rows, axis=0)
    names = ("size, own", "size, others", "kept, own", "kept, others")
    for column, name in enumerate(names):
        print(f"\n| {name}: d, max_kl | " + " | ".join(FLAGS.max_kls) + " |")
        print("|---" * (1 + len(kls)) + "|")
        for d in map(int, FLAGS.dimensions):
            digits = 1 if column < 2 else 2
            cells = [f"{found[d, kl][column]:.{digits}f}" for kl in kls]
            print(f"| {d:,} | " + " | ".join(cells) + " |", flush=True)
    return found


class Network:
    """Losses and gradients of flat weights."""

    def __init__(self):
        x, y = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(x))[:1149]
        self.x = tf.constant(x[order].astype("float32") / 16)
        self.y = tf.constant(y[order])
        self.sizes = [int(np.prod(shape)) for shape in LAYERS]
        self.size = sum(self.sizes)
        self.losses = tf.function(
            lambda w: tf.map_fn(self._loss, w), reduce_retracing=True
        )

    def _loss(self, flat):
        k1, b1, k2, b2 = (
            tf.reshape(part, shape)
            for part, shape in zip(
                tf.split(flat, self.sizes), LAYERS, strict=True
            )
        )
        hidden = tf.nn.relu(self.x @ k1 + b1)
        return tf.reduce_mean(
            tf.nn.sparse_softmax_cross_entropy_with_logits(
                self.y, hidden @ k2 + b2
            )
        )

    @tf.function
    def gradient(self, flat):
        with tf.GradientTape() as tape:
            tape.watch(flat)
            loss = self._loss(flat)
        return tape.gradient(loss, flat)

    def smoothed_gradient(self, mean, rng, count=500):
        """That of E f(mean + sigma z)."""
        total = 0.0
        for _ in range(count):
            z = rng.normal(size=self.size).astype("float32")
            total += self.gradient(mean + np.float32(SIGMA) * z).numpy()
        return total / count

    def trained(self, steps):
        keras.utils.set_random_seed(0)
        initial = keras.initializers.GlorotUniform(0)
        flat = tf.Variable(
            tf.concat(
                [
                    tf.reshape(initial(s) if len(s) > 1 else tf.zeros(s), [-1])
                    for s in LAYERS
                ],
                axis=0,
            )
        )
        adam = keras.optimizers.Adam(0.003)
        for _ in range(steps):
            adam.apply([self.gradient(flat)], [flat])
        return flat.numpy()


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def weighted(z, losses, weights):
    """The gradient of members with weights [N], or by weight [N, d]."""
    shares = weights / weights.sum(axis=0)
    if shares.ndim == 1:
        shares = shares[:, None]
    return np.sum(shares * utilities(losses)[:, None] * z, axis=0)


ARMS = (
    "new",
    "own, unweighted",
    "own, whole network",
    "own, by layer",
    "others, unweighted",
    "others, whole network",
    "others, by layer",
)


def on_digits():
    network = Network()
    rng = np.random.default_rng(1)
    layer_of = np.repeat([0, 0, 1, 1], network.sizes)
    kls, found = list(map(float, FLAGS.max_kls)), {}
    for place in map(int, FLAGS.places):
        mean = network.trained(place)

        def evaluated(mean, size=MEMBERS):
            z = rng.normal(size=(size, network.size)).astype("float32")
            return z, network.losses(mean + np.float32(SIGMA) * z).numpy()

        for kl in kls:
            rows = []
            for _ in range(FLAGS.gradients):
                own, others = evaluated(mean), evaluated(mean)
                step = move(*own, kl).astype("float32")
                after = mean + np.float32(SIGMA) * step
                new = evaluated(after)
                true = network.smoothed_gradient(after, rng, 100)
                row = [cosine(weighted(*new, np.ones(MEMBERS)), true)]
                for z, losses in (own, others):
                    noise = z - step  # as that of the new distribution
                    whole = np.exp(log_weights(z, step))
                    parts = np.stack(
                        [
                            log_weights(
                                z[:, layer_of == i], step[layer_of == i]
                            )
                            for i in range(2)
                        ]
                    )
                    by_layer = np.exp(parts[layer_of].T)
                    row += [
                        cosine(weighted(noise, losses, w), true)
                        for w in (np.ones(MEMBERS), whole, by_layer)
                    ]
                    row += [
                        effective_size(r)
                        for r in (log_weights(z, step), *parts)
                    ]
                rows.append(row)
            found[place, kl] = np.mean(rows, axis=0)
    for place in map(int, FLAGS.places):
        print(f"\n| cosine after {place} steps: max_kl | ", end="")
        print(" | ".join(FLAGS.max_kls) + " |")
        print("|---" * (1 + len(kls)) + "|")
        for arm, column in zip(ARMS, (0, 1, 2, 3, 7, 8, 9), strict=True):
            cells = [f"{found[place, kl][column]:.3f}" for kl in kls]
            print(f"| {arm} | " + " | ".join(cells) + " |", flush=True)
        for name, first in (("own", 4), ("others", 10)):
            cells = [
                " / ".join(f"{v:.0f}" for v in found[place, kl][first:][:3])
                for kl in kls
            ]
            print(f"| size ({name}): network / layers | ", end="")
            print(" | ".join(cells) + " |", flush=True)
    return found


def draw(sizes, cosines):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kls = list(map(float, FLAGS.max_kls))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2))
    for i, d in enumerate(map(int, FLAGS.dimensions)):
        color = f"C{i}"
        own = [sizes[d, kl][0] for kl in kls]
        left.plot(kls, own, f"{color}o-", label=f"d = {d:,}")
    others = [
        np.mean([sizes[int(d), kl][1] for d in FLAGS.dimensions]) for kl in kls
    ]
    left.plot(kls, others, "k--", label="others, any d")
    left.set_title(f"Effective size of {MEMBERS} members that made the step")
    left.set_ylabel("effective sample size")
    place = int(FLAGS.places[0])
    for arm, column in zip(ARMS, (0, 1, 2, 3, 7, 8, 9), strict=True):
        style = "k-" if arm == "new" else "o-" if arm[1] == "w" else "s--"
        right.plot(
            kls, [cosines[place, kl][column] for kl in kls], style, label=arm
        )
    right.set_title(f"Digits, after {place} steps: gradient of the next step")
    right.set_ylabel("cosine with the true gradient")
    for axis in (left, right):
        axis.set_xscale("log")
        axis.set_xlabel("KL divergence of the step, nats")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(pathlib.Path(__file__).with_suffix(".png"), dpi=100)


def main(_):
    draw(by_dimension(), on_digits())


if __name__ == "__main__":
    app.run(main)
