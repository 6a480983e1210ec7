"""The cells that packages are timed on: a network, a batch, a population.

Nothing is imported but NumPy, which all of their environments have.
"""

from __future__ import annotations

import dataclasses

import numpy as np

__all__ = ["CELLS", "Cell"]


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is timed.

    Attributes:
        units: of a network of dense layers, from the inputs on; ReLU between.
        population_size: N, in antithetic pairs.
        batch: |B|.
        stddev: sigma.
        learning_rate: of Adam, on the gradient of the mean.
    """

    units: tuple[int, ...]
    population_size: int
    batch: int = 128
    stddev: float = 0.05
    learning_rate: float = 0.01

    @property
    def name(self) -> str:
        """As "784-128-10, N = 256"."""
        units = "-".join(map(str, self.units))
        return f"{units}, N = {self.population_size}"

    def data(self) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and the classes that a linear teacher gives them."""
        generator = np.random.default_rng(0)
        x = generator.normal(size=(self.batch, self.units[0]))
        teacher = generator.normal(size=(self.units[0], self.units[-1]))
        labels = np.argmax(x @ teacher, axis=1)
        return x.astype(np.float32), labels.astype(np.int32)

    def weights(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Kernels and biases to begin with, Glorot's."""
        generator = np.random.default_rng(1)
        layers = []
        for n, m in zip(self.units[:-1], self.units[1:], strict=True):
            limit = (6 / (n + m)) ** 0.5
            kernel = generator.uniform(-limit, limit, size=(n, m))
            layers.append((kernel.astype(np.float32), np.zeros(m, np.float32)))
        return layers


CELLS = [
    Cell((64, 64, 10), 256),
    Cell((784, 128, 10), 256),
    Cell((784, 128, 10), 1024),
    Cell((784, 1024, 1024, 10), 64, learning_rate=0.001),
]
