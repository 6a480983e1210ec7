"""What a search needs of the replicas that it runs on.

The search is told of them by an object: it calls no tf.distribute.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import tensorflow as tf

__all__ = ["Communicator"]


class Communicator(Protocol):
    """One of several replicas in sync.

    Attributes:
        index: of this one.
        count: how many there are.
    """

    @property
    def index(self) -> int: ...

    @property
    def count(self) -> int: ...

    def sum(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Sums over replicas, in one message; of one dtype."""

    def reconstructs(
        self, directions: int, noise_size: int, gradient_size: int
    ) -> bool:
        """Whether each replica sums the gradient over all noise itself.

        Otherwise each sums over its own, and the sums are added up.

        Args:
            directions: of the whole population.
            noise_size: normals of a direction.
            gradient_size: numbers of the gradient.
        """
