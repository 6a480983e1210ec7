"""The members of a population, as the few numbers they are made from.

A direction is a noise vector z; with antithetic sampling it serves two
members, mu + sigma z and mu - sigma z. Members hold no weights and no noise:
whoever has the base seed draws the noise of any of them again [1].

Several replicas evaluate one population, each a shard of its directions. All
then know all losses, from which each computes the same utilities, so that
nothing else has to be communicated [1, algorithm 2].

References:
    [1] Salimans et al., "Evolution Strategies as a Scalable Alternative to
        Reinforcement Learning", arXiv 1703.03864, 2017.
"""

from __future__ import annotations

import dataclasses

import tensorflow as tf

from keras_vo.search.generators import NEWEST

__all__ = ["Members", "Shard"]


@dataclasses.dataclass(frozen=True)
class Shard:
    """The directions that one of several replicas evaluates.

    Attributes:
        directions: number of directions of the whole population.
        start: index of the first one of this replica.
        size: how many it evaluates, at least one.
        counts: False where there are more replicas than directions and this
            one has none: what it evaluates is another one's.
    """

    directions: int
    start: int
    size: int
    counts: bool = True

    @classmethod
    def make(cls, directions: int, replica: int, replicas: int) -> Shard:
        """Shards as equal as they can be."""
        start = replica * directions // replicas
        end = (replica + 1) * directions // replicas
        if start == end:
            return cls(directions, start, 1, counts=False)
        return cls(directions, start, end - start)

    @staticmethod
    def owners(directions: int, replicas: int) -> list[int]:
        """The replica that evaluates each direction."""
        shards = (Shard.make(directions, r, replicas) for r in range(replicas))
        return [
            replica
            for replica, shard in enumerate(shards)
            for _ in range(shard.size * shard.counts)
        ]

    def take(self, values: tf.Tensor) -> tf.Tensor:
        """This replica's rows of [directions, ...]; zeros if none count."""
        own = values[self.start : self.start + self.size]
        return own if self.counts else tf.zeros_like(own)

    def place(self, values: tf.Tensor) -> tf.Tensor:
        """This replica's values among all: a term of a sum over replicas.

        Args:
            values: [signs size], all of the first sign first.

        Returns:
            [signs directions]: 0 for the members of other replicas.
        """
        by_sign = tf.reshape(values, [-1, self.size])
        if not self.counts:
            by_sign = tf.zeros_like(by_sign)
        after = self.directions - self.start - self.size
        return tf.reshape(tf.pad(by_sign, [[0, 0], [self.start, after]]), [-1])


@dataclasses.dataclass(frozen=True)
class Members:
    """A table of directions, with the signs that each is evaluated with.

    Attributes:
        base_seed: scalar int64.
        generation: in which each direction was drawn first, [D] int64.
        index: of each direction in its generation, [D] int64.
        signs: (1, -1) with antithetic sampling, else (1,). Member n + D is
            that of direction n with the second sign.
        total: number of directions of the population they are of.
        origin: the place, in `importance_mixing.Ring`, of the search
            distribution that each direction was drawn from, [D] int64; -1: it
            is that of now. `None`: so are all.
        generator: name of what draws their noise.
    """

    base_seed: tf.Tensor
    generation: tf.Tensor
    index: tf.Tensor
    signs: tuple[float, ...]
    total: int
    origin: tf.Tensor | None = None
    generator: str = NEWEST

    @classmethod
    def of_generation(
        cls,
        base_seed: tf.Tensor,
        generation: tf.Tensor,
        population_size: int,
        antithetic: bool,
        generator: str = NEWEST,
    ) -> Members:
        """The members of a new generation."""
        signs = (1.0, -1.0) if antithetic else (1.0,)
        index = tf.range(population_size // len(signs), dtype=tf.int64)
        generation = tf.fill(index.shape, tf.cast(generation, tf.int64))
        seed = tf.cast(base_seed, tf.int64)
        total = int(index.shape[0])
        return cls(seed, generation, index, signs, total, generator=generator)

    @property
    def directions(self) -> int:
        """D, their number."""
        return int(self.index.shape[0])

    def __len__(self) -> int:
        return self.directions * len(self.signs)

    def number(self, row: int, sign: float) -> int:
        """Of a member in its population, eagerly.

        Args:
            row: of its direction.
            sign: of its noise.
        """
        return int(self.index[row]) + self.total * self.signs.index(sign)

    def direction(self, index: tf.Tensor) -> Members:
        """That of one row of the table."""
        return self.rows(index[None])

    def shard(self, shard: Shard) -> Members:
        """Those of one replica."""
        return self.rows(tf.range(shard.start, shard.start + shard.size))

    def rows(self, rows: tf.Tensor) -> Members:
        """Those of some rows of the table."""
        origin = self.origin
        return dataclasses.replace(
            self,
            generation=tf.gather(self.generation, rows),
            index=tf.gather(self.index, rows),
            origin=None if origin is None else tf.gather(origin, rows),
        )
