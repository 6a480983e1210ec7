"""What replicas exchange in a step, and which way is cheaper.

Two ways to the same gradient, of d weights and D draws on R replicas:

    fitness    the N losses are exchanged; every machine draws all of the
               noise again and sums the gradient itself
    gradient   the losses are exchanged; each replica sums the gradient over
               its own draws, and these sums are all-reduced

The losses cost the same in both. What differs is, in seconds,

    fitness    D d / normals + D d / sums
    gradient   (D / R) d / sums
               + 2 (R - 1) latency + 2 (R - 1) / R bytes(d) / bandwidth

with the cost of a ring all-reduce in the last line. (Noise that was kept is
drawn again in the first as well.)
"""

from __future__ import annotations

import dataclasses

__all__ = ["EXCHANGES", "CostModel", "checked_exchange", "cost_model"]

EXCHANGES = ("auto", "fitness", "gradient")


@dataclasses.dataclass(frozen=True)
class CostModel:
    """What a step costs, of which "auto" needs what differs.

    Attributes:
        normals: normals drawn a second.
        sums: numbers of noise summed into the gradient a second.
        latency: seconds that one message takes.
        bandwidth: bytes a second, between two machines.
    """

    normals: float = 1.4e8
    sums: float = 1e9
    latency: float = 1e-4
    bandwidth: float = 1.25e9  # 10 Gbit/s

    def fitness(self, draws: int, noise_size: int) -> float:
        """Seconds to draw all noise of a step and to sum it."""
        return draws * noise_size * (1 / self.normals + 1 / self.sums)

    def gradient(
        self, draws: int, noise_size: int, numbers: int, replicas: int
    ) -> float:
        """Seconds to sum a replica's noise and to all-reduce the sums.

        Args:
            draws: number of draws D of the population.
            noise_size: normals of a draw.
            numbers: how many numbers are all-reduced, 4 bytes each.
            replicas: R.
        """
        hops = 2 * (replicas - 1)
        return (
            draws / replicas * noise_size / self.sums
            + hops * self.latency
            + hops / replicas * 4 * numbers / self.bandwidth
        )

    def cheaper(
        self, draws: int, noise_size: int, numbers: int, replicas: int
    ) -> str:
        """ "fitness" or "gradient"; arguments as of `gradient`."""
        fitness = self.fitness(draws, noise_size)
        gradient = self.gradient(draws, noise_size, numbers, replicas)
        return "fitness" if fitness <= gradient else "gradient"


def cost_model(network: bool) -> CostModel:
    """The default: of a network, or of the memory of one machine."""
    return CostModel() if network else CostModel(latency=1e-5, bandwidth=1e10)


def checked_exchange(exchange: str) -> str:
    """One of `EXCHANGES`."""
    if exchange not in EXCHANGES:
        raise ValueError(
            f"`exchange` must be one of {list(EXCHANGES)}. "
            f"Received: exchange={exchange!r}"
        )
    return exchange
