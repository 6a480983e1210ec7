"""What replicas communicate in a step, and which way is cheaper.

Two ways to the same gradient, of d weights and D directions on R replicas:

    fitness    the N losses are communicated; every replica draws the noise of
               all directions again and sums the gradient itself
    gradient   the losses are communicated; each replica sums the gradient over
               its own directions, and these sums are all-reduced

A step takes, in seconds, with the fields of `CostModel` as rates,

    overhead                                    what does not depend on D
    + (N / R) d (1 / perturbed + |B| / evaluation)      members
    + (D / R) d / normals                       the noise of own directions
    + message(N)                                the losses
    + D d / normals + D d / sums                fitness: reconstruction
    or (D / R) d / sums + message(d)            gradient

where |B| is the batch of one replica and a ring all-reduce of n numbers takes

    message(n) = 2 (R - 1) latency + 2 (R - 1) / R  4 n / bandwidth
"""

from __future__ import annotations

import dataclasses

__all__ = ["EXCHANGES", "CostModel", "checked_exchange", "cost_model"]

EXCHANGES = ("auto", "fitness", "gradient")


@dataclasses.dataclass(frozen=True)
class CostModel:
    """Rates, from which the time of a step follows.

    The defaults are those of workers of one CPU core and of TensorFlow's
    all-reduce on a network of 10 Gbit/s: benchmarks/results/replicas.md.

    Attributes:
        normals: normals drawn a second.
        sums: numbers of noise summed into the gradient a second.
        perturbed: weights of members made a second.
        evaluation: weights times examples evaluated a second.
        overhead: seconds of a step that depend on none of these.
        latency: seconds from one machine to the next.
        bandwidth: bytes a second from one machine to the next.
    """

    normals: float = 7e7
    sums: float = 1e9
    perturbed: float = 5e8
    evaluation: float = 5.3e10
    overhead: float = 3.5e-3
    latency: float = 8e-4
    bandwidth: float = 3.4e8

    def message(self, numbers: float, replicas: int) -> float:
        """Seconds of a ring all-reduce of numbers of 4 bytes."""
        hops = 2 * (replicas - 1)
        return (
            hops * self.latency + hops / replicas * 4 * numbers / self.bandwidth
        )

    def exchanged(
        self,
        exchange: str,
        draws: int,
        noise_size: int,
        numbers: int,
        replicas: int,
    ) -> float:
        """Seconds from the losses to the gradient.

        Args:
            exchange: "fitness" or "gradient".
            draws: number of directions D of the population.
            noise_size: normals of a direction.
            numbers: how many numbers the gradients have.
            replicas: R.
        """
        if exchange == "fitness" and replicas > 1:
            return draws * noise_size * (1 / self.normals + 1 / self.sums)
        own = draws / replicas * noise_size / self.sums
        return own + self.message(numbers, replicas)

    def cheaper(
        self, draws: int, noise_size: int, numbers: int, replicas: int
    ) -> str:
        """ "fitness" or "gradient"; arguments as of `exchanged`."""
        fitness, gradient = (
            self.exchanged(exchange, draws, noise_size, numbers, replicas)
            for exchange in ("fitness", "gradient")
        )
        return "fitness" if fitness <= gradient else "gradient"

    def step(
        self,
        exchange: str,
        population_size: int,
        weights: int,
        batch_size: int,
        replicas: int,
        antithetic: bool = True,
    ) -> float:
        """Seconds of a step of full-rank noise.

        Args:
            exchange: "fitness" or "gradient".
            population_size: N.
            weights: d.
            batch_size: examples of each replica.
            replicas: R.
            antithetic: whether a direction serves two members.
        """
        draws = population_size // (2 if antithetic else 1)
        members = population_size / replicas * weights
        return (
            self.overhead
            + members * (1 / self.perturbed + batch_size / self.evaluation)
            + draws / replicas * weights / self.normals
            + self.message(population_size, replicas)
            + self.exchanged(exchange, draws, weights, weights, replicas)
        )


def cost_model(network: bool) -> CostModel:
    """The default: of a network, or of the memory of one machine."""
    return CostModel() if network else CostModel(latency=1e-4, bandwidth=5e9)


def checked_exchange(exchange: str) -> str:
    """One of `EXCHANGES`."""
    if exchange not in EXCHANGES:
        raise ValueError(
            f"`exchange` must be one of {list(EXCHANGES)}. "
            f"Received: exchange={exchange!r}"
        )
    return exchange
