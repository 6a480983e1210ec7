"""Members evaluated by an executor of `concurrent.futures`, one a task.

An evaluation that raises, takes too long or is lost with its worker is a
missing result, after some retries. All others go on.
"""

from __future__ import annotations

import collections
import concurrent.futures as futures
import contextlib
import dataclasses
import functools
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np

from keras_vo import checks
from keras_vo.evaluation.pools import Pool

__all__ = ["Evaluations", "Terms", "evaluate"]

# Seconds on top of the time limit, after which workers are taken for lost;
# and those for new ones, that import libraries.
_GRACE, _START = 5.0, 120.0
_POLL = 0.05
# Of executors whose number of workers is not known: weights that are under
# way at once, and members at least.
_MOST_BYTES, _LEAST_AT_ONCE = 2**28, 64


@dataclasses.dataclass(frozen=True)
class Terms:
    """How evaluations are run.

    Attributes:
        timeout: seconds for one; `None`: any.
        retries: further tries of one that has failed.
        progress: whether a progress bar is shown.
    """

    timeout: float | None = None
    retries: int = 0
    progress: bool = False

    @classmethod
    def checked(cls, timeout: Any, retries: Any, progress: Any) -> Terms:
        """Of arguments, or an error."""
        if timeout is not None:
            timeout = checks.checked_number("timeout", timeout)
        retries = checks.checked_integer("retries", retries, least=0)
        return cls(timeout, retries, bool(progress))


@dataclasses.dataclass
class Evaluations:
    """What has become of some members.

    Attributes:
        losses: by member, as scalars; inf in the place of NaN.
        failures: by member, the error that was its last.
    """

    losses: dict[int, np.ndarray]
    failures: dict[int, BaseException]

    def summary(self) -> str:
        """What is missing, in words."""
        kinds = collections.Counter(
            type(error).__name__ for error in self.failures.values()
        )
        counts = ", ".join(f"{n} by {kind}" for kind, n in kinds.items())
        member, error = next(iter(self.failures.items()))
        return f"{counts}; of member {member}: {error!r:.300}"


def evaluate(
    objective: Callable[[list[np.ndarray]], Any],
    population: Sequence[list[np.ndarray]],
    members: Sequence[int],
    executor: futures.Executor,
    terms: Terms,
    maximize: bool = False,
) -> Evaluations:
    """The losses of some members.

    Args:
        objective: from a member's weights to its loss.
        population: of all members' weights.
        members: indices of those that are evaluated.
        executor: any.
        terms: time limit and retries.
        maximize: whether its values are scores. Losses are minus those.
    """
    run = _Run(objective, population, Pool(executor), terms, len(members))
    run.sign = -1 if maximize else 1
    run.queue.extend(members)
    try:
        if terms.timeout is not None:
            run.start_workers()
        while run.queue or run.suspects or run.pending:
            run.submit()
            run.collect()
    finally:  # Ctrl-C, say
        for future in run.pending:
            future.cancel()
    return Evaluations(run.losses, run.failures)


class _Run:
    """The evaluation of one generation.

    Attributes:
        queue: members to be submitted.
        suspects: members that ran when the pool broke: they run alone, so
            that it is known who breaks it.
        pending: those that were submitted.
        sign: -1 if values are scores, else 1.
    """

    sign = 1

    def __init__(
        self,
        objective: Callable[[list[np.ndarray]], Any],
        population: Sequence[list[np.ndarray]],
        pool: Pool,
        terms: Terms,
        count: int,
    ) -> None:
        self._population = population
        self._pool, self._terms = pool, terms
        self._task: Callable[..., Any] = objective
        if terms.timeout is not None:
            self._task = functools.partial(_limited, objective, terms.timeout)
        self.queue: collections.deque[int] = collections.deque()
        self.suspects: collections.deque[int] = collections.deque()
        self.pending: dict[futures.Future[Any], int] = {}
        self.losses: dict[int, np.ndarray] = {}
        self.failures: dict[int, BaseException] = {}
        self._tries: collections.Counter[int] = collections.Counter()
        self._running_since: dict[int, float] = {}
        self._last_sign_of_life = time.monotonic()
        bytes_each = max(getattr(population, "bytes_each", 1), 1)
        self._most = max(_MOST_BYTES // bytes_each, _LEAST_AT_ONCE)
        self._bar = None
        if terms.progress:
            self._bar = keras.utils.Progbar(count, unit_name="member")

    def start_workers(self) -> None:
        """Waits until the processes of a pool have imported what they need.

        Else that time would be taken for that of a member. If none can be
        started, all that is left fails.
        """
        if not self._pool.is_processes:
            return
        members = len(self.queue) + len(self.suspects)
        try:
            self._pool.start(self._task, members, _START)
        # Before Python 3.11 that is another TimeoutError than the builtin one.
        except (futures.BrokenExecutor, futures.TimeoutError) as error:
            for member in (*self.suspects, *self.queue):
                self._tries[member] = self._terms.retries
                self._fail(member, error)
            self.suspects.clear()
            self.queue.clear()
        except Exception:  # it can't be pickled, as each member will say
            pass
        self._last_sign_of_life = time.monotonic()

    def submit(self) -> None:
        """As many members as may be under way at once."""
        workers = self._pool.workers
        most = 2 * workers + 1 if workers else self._most
        if self.suspects:
            if not self.pending:
                self._submit(self.suspects.popleft())
            return
        while self.queue and len(self.pending) < most:
            self._submit(self.queue.popleft())

    def _submit(self, member: int) -> None:
        try:
            future = self._pool.submit(self._task, self._population[member])
        except futures.BrokenExecutor as error:
            self._fail(member, error)
            return
        if not self.pending:
            self._last_sign_of_life = time.monotonic()
        self.pending[future] = member

    def collect(self) -> None:
        """What is done by now; waits until anything is."""
        timeout = self._terms.timeout
        done, _ = futures.wait(
            self.pending,
            timeout=None if timeout is None else _POLL,
            return_when=futures.FIRST_COMPLETED,
        )
        broken = []
        for future in done:
            member = self.pending.pop(future)
            self._last_sign_of_life = time.monotonic()
            try:
                self._succeed(member, future.result())
            except futures.BrokenExecutor as error:
                broken.append((member, error))
            except futures.CancelledError:  # another search's new pool
                self.queue.append(member)
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                self._fail(member, error)
        if broken:
            self._break(broken)
        if timeout is not None and self.pending:
            self._expire(timeout)

    def _succeed(self, member: int, value: Any) -> None:
        loss = self.sign * checks.checked_scalar(value).numpy()
        self.losses[member] = np.where(
            np.isnan(loss), np.array(np.inf, loss.dtype), loss
        )
        self._show()

    def _fail(self, member: int, error: BaseException) -> None:
        self._tries[member] += 1
        self._running_since.pop(member, None)
        if self._tries[member] <= self._terms.retries:
            self.queue.append(member)
            return
        self.failures[member] = error
        self._show()

    def _show(self) -> None:
        if self._bar is not None:
            self._bar.update(len(self.losses) + len(self.failures))

    def _break(self, broken: Sequence[tuple[int, BaseException]]) -> None:
        """Goes on after a worker has died.

        Of a process pool all that were under way are lost with it.
        """
        if self._pool.is_processes:
            lost = [member for member, _ in broken]
            self._replace([*lost, *self.pending.values()], broken[0][1])
            return
        for member, error in broken:
            self._fail(member, error)

    def _replace(self, lost: list[int], error: BaseException) -> None:
        """Makes a new pool; says who broke the former one, if that is known."""
        self.pending.clear()
        self._pool.replace()
        if len(lost) == 1:
            self._fail(lost[0], error)
        else:
            self.suspects.extend(lost)
        self.start_workers()

    def _expire(self, timeout: float) -> None:
        """Gives those up that take too long, or that will never come."""
        now = time.monotonic()
        if self._pool.is_threads:
            self._expire_threads(timeout, now)
            return
        silent = now - self._last_sign_of_life
        known = self._pool.is_processes or self.losses or self.failures
        if self._pool.workers_are_renewed or not known:
            timeout += _START
        if silent <= timeout + _GRACE:
            return
        lost = list(self.pending.values())
        if self._pool.is_processes:
            self._replace(lost, _too_long(self._terms.timeout))
            return
        for future in self.pending:
            future.cancel()
        self.pending.clear()
        for member in lost:
            self._fail(member, _too_long(self._terms.timeout))

    def _expire_threads(self, timeout: float, now: float) -> None:
        """Gives threads up, which nothing can interrupt."""
        for future, member in list(self.pending.items()):
            if future.running():
                since = self._running_since.setdefault(member, now)
                if now - since > timeout:
                    del self.pending[future]
                    self._pool.give_up(future)
                    self._fail(member, _too_long(timeout))
        if self._pool.is_stuck:
            self.queue.extendleft(self.pending.values())
            self.pending.clear()
            self._pool.replace()


def _limited(
    objective: Callable[[Any], Any], timeout: float, weights: Any
) -> Any:
    """`objective(weights)` in a worker, within a time limit."""
    start = time.monotonic()
    with _alarm(timeout):
        value = objective(weights)
    if time.monotonic() - start > timeout:  # nothing could interrupt it
        raise _too_long(timeout)
    return value


@contextlib.contextmanager
def _alarm(timeout: float) -> Iterator[None]:
    """A scope that raises after so many seconds, where that is possible.

    That is in the main thread of a process, as those of process pools are.
    """

    def ring(number: int, frame: Any) -> None:
        raise _too_long(timeout)

    main = threading.current_thread() is threading.main_thread()
    if not main or not hasattr(signal, "setitimer"):
        yield
        return
    former = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, timeout)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def _too_long(timeout: float | None) -> TimeoutError:
    return TimeoutError(f"no result within {timeout:g} s")
