"""Ask and tell: a population to evaluate anywhere, and the step of its losses.

population = optimizer.ask(variables)
report = optimizer.tell(population, [loss_of(w) for w in population])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from keras_vo import checks, interrupts
from keras_vo.member_weights import Frame, Weight, fingerprint
from keras_vo.monitor.observer import (
    kl_of,
    observed,
    signal_to_noise_of,
)
from keras_vo.perturbations.scope import Recording
from keras_vo.population import (
    Population,
    Seeds,
    check_seeds,
    checked_seeds,
    equal,
)
from keras_vo.replicas import strategies
from keras_vo.search.credit import MEMBER, Outcomes
from keras_vo.search.importance_mixing import mix
from keras_vo.search.state import Judged
from keras_vo.search_steps import SearchSteps
from keras_vo.told import Found, Report, checked_results

__all__ = ["AskTell"]


class AskTell(SearchSteps):
    """The steps of a search whose losses Python finds."""

    antithetic: bool
    _last_asked: Callable[[], Population] | None = None
    _last_report: Report | None = None

    @property
    def report(self) -> Report | None:
        """Of the last step by `tell` or an executor; `None`: there was none."""
        return self._last_report

    def ask(
        self, variables: Sequence[Any], seeds: Seeds | None = None
    ) -> Population:
        """The population to evaluate next, each member a list of arrays.

        It is the same until `tell` has taken a step by it (also while the
        variables hold one of its members), and the same in any process whose
        search is in the same state (restored from a file, or told the same
        losses). So a population can be evaluated elsewhere
        in three ways: send the weights of its members; send the population,
        pickled, which is as large as one member; or send `population.seeds`,
        a few numbers, to a process that has the search.

        Noise is on the weights themselves: where `perturbation` or layers
        want it on activations, which have no members' weights, it is "full".

        Args:
            variables: Keras or TensorFlow variables, the mean mu. The same
                list in every call.
            seeds: of the population that is wanted, from another process;
                `None`: it is not checked.

        Returns:
            The population, of `population_size` members; with
            `importance_mixing`, those of them that are new.

        Raises:
            TypeError: `variables` is no list of variables.
            ValueError: no variables, others than before, or one of them
                twice; or `seeds` that are of another search or generation.
            RuntimeError: it is called in a `tf.function`, or in a replica.
        """
        self._check_outside("ask")
        variables = checks.checked_variables(variables, "ask({})")
        with strategies.entered(self._strategy):
            self._build_outside_of_replicas(variables)
            self._check_same(variables)
            population = self._asked_again() or self._population()
        if seeds is not None:
            check_seeds(checked_seeds(seeds), population.seeds)
        self._last_asked = lambda: population  # no list: Keras would track it
        return population

    def tell(
        self, population: Population, losses: Any, *, maximize: bool = False
    ) -> Report:
        """Moves mu and sigma by the losses of a population.

        The step is that of `minimize`, bit for bit. Where k of N results are
        there, it is that of a population of these k; one half of an antithetic
        pair counts, too. Members without a result have no say; a result that
        is infinite is worth what the worst one is. (`minimize` counts an
        objective's NaN as one of those. Here it is a missing one.)

        What the variables hold meanwhile does not matter, if it is the mean or
        one of the members: objectives may assign them.

        Args:
            population: from `ask`, of this generation of this search; it may
                have been pickled, and the search restored from a file.
            losses: of the N members of the population, that of member i at
                place i; a dict from i to
                its loss; or pairs (i, loss) in any order. `None`, NaN, and what
                is not there is missing. On several workers
                (MultiWorkerMirroredStrategy), which all call it, each tells
                the losses of `population.own`; the others are not looked at.
            maximize: whether they are scores, of which higher ones are better.

        Returns:
            What the step has found.

        Raises:
            TypeError: no population, or a loss that is no number.
            ValueError: a population of another search, or of another
                generation (it was told already); losses that do not fit it, or
                none at all (unless one member alone is new, see
                `importance_mixing`); variables that were changed since.
            RuntimeError: it is called in a `tf.function`, or in a replica.
        """
        self._check_outside("tell")
        if not isinstance(population, Population):
            raise TypeError(
                "Expected the population that `ask` returned: "
                "`tell(population, losses)`. Received: "
                f"{population!r:.80} of type {type(population)}"
            )
        self._check_built("tell")
        results = checked_results(losses, len(population))
        results = -results if maximize else results
        with strategies.entered(self._strategy):
            self._check_population(population)
            if strategies.worker_count(self._strategy) == 1:
                self._check_any(results, population)
            else:  # which exchange numbers of one dtype
                results = results.astype(np.float64)
            with interrupts.deferred():
                self._start_at(population)
                found = strategies.on_each_replica(
                    lambda: self._tell(population, results)
                )
        report = Report.of(population.generation, found, self._sigma())
        self._last_report = report
        if report.evaluations == 0:  # of all workers
            self._check_any(report.losses, population)
        return report

    def forget_members(self) -> None:
        """Makes all members of the next population new.

        With `importance_mixing`, for another objective, or other data: former
        members would keep the losses that they had.
        """
        self._check_built("forget_members")
        if self.importance_mixing is not None:
            with strategies.entered(self._strategy):
                losses = self._rule_state["mixing_losses"]
                losses.assign(
                    tf.fill(losses.shape, tf.constant(np.nan, tf.float64))
                )
        self._last_asked = None

    def _asked_again(self) -> Population | None:
        """The last population, if the variables hold one of its members, as
        where an objective assigns them.
        """
        if self._last_asked is None:
            return None
        last = self._last_asked()
        now = int(_now(self._seed)), int(_now(self.generations))
        if last.seeds[:2] != now or not self._is_assigned(last):
            return None
        values = list(map(_now, self._trained()))
        return last if last.holds(values) else None

    def _is_assigned(self, population: Population) -> bool:
        """Whether the variables hold something else than the mean."""
        values = list(map(_now, self._trained()))
        return not equal(values, population.rounded_means)

    def _population(self, around: Population | None = None) -> Population:
        """That of this generation.

        Args:
            around: of the search distribution whose mean and sensitivities it
                has; `None`: the mean is what the variables hold.
        """
        variables = self._trained()
        if around is None:
            s = self.measured_sensitivity(None)
            gaussian = self._gaussian(variables, s)
        else:
            gaussian = self._gaussian_around(*around.center)
        weights = tuple(Weight.of(v) for v in variables)
        settings = self._layout, self.choice, self.noise_generator
        frame = Frame(weights, *settings)
        means = [mean.numpy() for mean in gaussian.means]
        log_variance = gaussian.log_variance.numpy()
        s = gaussian.sensitivity
        sensitivity = None if s is None else s.numpy()
        size, directions, places = self.population_size, None, None
        if self.importance_mixing is not None:
            mixed = mix(
                gaussian,
                (_now(self._seed), _now(self.generations)),
                {k: tf.constant(_now(v)) for k, v in self._rule_state.items()},
                self.importance_mixing,
                self.memory_budget,
                self.noise_generator,
            )
            places = np.flatnonzero(mixed.new)
            directions = mixed.members.index.numpy()[places]
            size = len(places)
        seeds = Seeds(
            int(_now(self._seed)),
            int(_now(self.generations)),
            size,
            self.antithetic,
            fingerprint(frame, means, log_variance, sensitivity, directions),
        )
        own: Sequence[int] = range(size)
        if strategies.is_multi_worker(self._strategy):
            signs = 1 + self.antithetic
            total = self.population_size // signs
            here = strategies.own_directions(total)
            own = [
                direction + sign * total
                for sign in range(signs)
                for direction in here
            ]
            if places is not None:
                own = np.flatnonzero(np.isin(places, own)).tolist()
        return Population(
            frame,
            means,
            log_variance,
            sensitivity,
            seeds,
            own,
            self.population_size - size,
            directions,
        )

    @tf.autograph.experimental.do_not_convert
    def _tell(self, population: Population, results: np.ndarray) -> Found:
        """A step, in one replica."""
        variables = self._trained()
        recording = Recording(variables, self.choice)
        search, _ = self.search(
            variables, *population.center, recording, probed=True
        )
        members, mixed = search.ask(), search.mixed
        if mixed is not None:  # 0 stands for what is known already
            told, new = results, mixed.new.numpy()
            results = np.zeros(len(members), told.dtype)
            results[new] = told
        shard = search.shard(members)
        by_sign = results.reshape(len(members.signs), -1)
        own = by_sign[:, shard.start : shard.start + shard.size].reshape(-1)
        losses = tf.constant(own)
        if losses.dtype.size < self._layout.dtype.size:
            losses = tf.cast(losses, self._layout.dtype)
        missing = np.isnan(own)
        outcomes = Outcomes(
            {MEMBER: losses},
            # All replicas have the same objective: no shard has its own.
            baseline=tf.zeros([], losses.dtype),
            missing=tf.constant(missing) if missing.any() else None,
        )
        report = self.take(search, {MEMBER: Judged(members, outcomes)})
        step = observed(search, report, self._moved(variables))
        return Found(
            report.losses,
            report.any_finite,
            kl_of(step),
            signal_to_noise_of(step),
            mixed,
        )

    def _sigma(self) -> float:
        """Root mean square of sigma, or sigma / s, over all weights."""
        stddevs = self._layout.flatten(self.stddevs)
        return float(tf.sqrt(tf.reduce_mean(tf.square(stddevs))))

    def _start_at(self, population: Population) -> None:
        """Sets the variables back to the mean, if a member was evaluated by
        assigning them.
        """
        if not self._is_assigned(population):
            return
        if not population.holds(list(map(_now, self._trained()))):
            raise ValueError(
                "Expected variables that hold the mean of the population, or "
                "the weights of one of its members. Received: others, that "
                "were set since `ask`. To tell its losses, set them back to "
                "`population.means`; to go on from the new weights, ask again"
            )
        self._set_back(population)

    def _set_back(self, population: Population) -> None:
        """Sets the variables to the mean, whatever they hold."""
        with strategies.entered(self._strategy):
            for variable, mean in zip(
                self._trained(), population.rounded_means, strict=True
            ):
                self.assign(variable, mean)

    def _check_population(self, population: Population) -> None:
        """Whether it is that of the search as it is now.

        What the variables hold may have changed meanwhile, if it was asked
        for here: see `_start_at`.
        """
        asked = self._last_asked and self._last_asked()
        known = asked and asked.seeds == population.seeds
        here = self._population(population if known else None)
        check_seeds(population.seeds, here.seeds)

    @staticmethod
    def _check_any(results: np.ndarray, population: Population) -> None:
        if population.needs_a_loss and np.isnan(results).all():
            raise ValueError(
                "Expected the loss of one member at least. Received: none, "
                "all are missing (None or NaN)"
            )

    @staticmethod
    def _check_outside(method: str) -> None:
        if not tf.executing_eagerly() or strategies.in_replica():
            where = "replica" if strategies.in_replica() else "`tf.function`"
            raise RuntimeError(
                f"`{method}` is for losses that Python finds. Expected: a call "
                "outside of any `tf.function` and replica (`minimize` works in "
                f"both). Received: a call in a {where}"
            )


def _now(variable: Any) -> np.ndarray:
    """The value of a variable."""
    return np.asarray(tf.convert_to_tensor(variable).numpy())
