"""Pools that outlive a worker that crashed or hangs.

A `concurrent.futures.ProcessPoolExecutor` one of whose processes has died is
broken for good, and a thread that hangs is one less. `Pool` goes on with
another executor like it, which ends when the former one is shut down.
"""

from __future__ import annotations

import concurrent.futures as futures
import inspect
import os
import time
import weakref
from collections.abc import Callable
from typing import Any

__all__ = ["Pool"]

# What took the place of an executor.
_replaced: weakref.WeakKeyDictionary[futures.Executor, futures.Executor] = (
    weakref.WeakKeyDictionary()
)
_shut_down: weakref.WeakSet[futures.Executor] = weakref.WeakSet()
# Of executors of threads, the evaluations that were given up.
_given_up: weakref.WeakKeyDictionary[futures.Executor, list[Any]] = (
    weakref.WeakKeyDictionary()
)

# Of executors of processes, the numbers of those that have begun.
_begun: weakref.WeakKeyDictionary[futures.Executor, set[int]] = (
    weakref.WeakKeyDictionary()
)
_PAUSE = 0.02  # seconds in which another process may take a task


class Pool:
    """An executor, or what has taken its place.

    Args:
        executor: any. Those of Python, and their subclasses, can be replaced
            (by Python's).

    Attributes:
        is_threads: whether it runs in threads of this process.
        is_processes: whether it is a pool of processes.
    """

    def __init__(self, executor: futures.Executor) -> None:
        self._given = executor
        self._used = self._now()
        self.is_threads = isinstance(executor, futures.ThreadPoolExecutor)
        self.is_processes = isinstance(executor, futures.ProcessPoolExecutor)

    def _now(self) -> futures.Executor:
        if self._given in _shut_down:
            raise RuntimeError("cannot schedule new futures after shutdown")
        return _replaced.get(self._given, self._given)

    def submit(
        self, function: Callable[..., Any], *args: Any
    ) -> futures.Future[Any]:
        """As an executor does; a broken one is replaced before it.

        Raises:
            futures.BrokenExecutor: it is broken, and can't be replaced.
            RuntimeError: it was shut down.
        """
        self._used = self._now()
        try:
            return self._used.submit(function, *args)
        except futures.BrokenExecutor:
            if not self.is_processes:
                raise
            self.replace()
            self._used = self._now()
            return self._used.submit(function, *args)

    def start(
        self, task: Callable[..., Any], count: int, seconds: float
    ) -> None:
        """Waits until processes have imported what a task needs.

        Args:
            task: that can be pickled.
            count: of processes, where there are as many.
            seconds: to wait.

        Raises:
            futures.BrokenExecutor, futures.TimeoutError: they can't begin.
        """
        end = time.monotonic() + seconds
        count = min(count, self.workers or 1)
        numbers = _begun.setdefault(self._now(), set())
        while len(numbers) < count and time.monotonic() < end:
            begun = [self.submit(_number, task) for _ in range(count)]
            for future in begun:
                left = max(end - time.monotonic(), 0.0)
                numbers.add(future.result(left))

    @property
    def workers(self) -> int | None:
        """How many it has; `None`: that is not known."""
        if self.is_processes or self.is_threads:
            # No public name has it; an attribute would look like our own.
            return int(getattr(self._given, "_max_workers"))  # noqa: B009
        return None

    @property
    def workers_are_renewed(self) -> bool:
        """Whether processes end after some tasks."""
        return getattr(self._given, "_max_tasks_per_child", None) is not None

    def give_up(self, future: futures.Future[Any]) -> None:
        """Notes that a thread is busy with what no one waits for."""
        _given_up.setdefault(self._used, []).append(future)

    @property
    def is_stuck(self) -> bool:
        """Whether all its threads are busy so."""
        given_up = _given_up.get(self._used, [])
        return sum(not f.done() for f in given_up) >= (self.workers or 1)

    def replace(self) -> None:
        """Ends all processes (no one can end a thread), and makes others;
        unless another search has done so.

        Executors have no public names for what they were made with.
        """
        former = self._used
        if self._now() is not former:
            return
        kind = (
            futures.ThreadPoolExecutor
            if self.is_threads
            else futures.ProcessPoolExecutor
        )
        arguments = {
            name: getattr(self._given, f"_{name}")
            for name in inspect.signature(kind).parameters
            if hasattr(self._given, f"_{name}")
        }
        processes = list((getattr(former, "_processes", None) or {}).values())
        if former is not self._given:
            former.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()
        new = kind(**arguments)
        if self._given not in _replaced:
            _end_with(self._given)
        _replaced[self._given] = new


def _number(task: Callable[..., Any]) -> int:
    """The number of the process that this runs in, which has the task."""
    del task
    time.sleep(_PAUSE)
    return os.getpid()


def _end_with(executor: futures.Executor) -> None:
    """Lets what replaces `executor` end when that is shut down."""
    shutdown = executor.shutdown

    def both(wait: bool = True, *, cancel_futures: bool = False) -> None:
        _shut_down.add(executor)
        if (other := _replaced.pop(executor, None)) is not None:
            other.shutdown(wait, cancel_futures=cancel_futures)
        shutdown(wait, cancel_futures=cancel_futures)

    # Of this object only: `with` calls it, and nothing else says it is over.
    executor.shutdown = both  # type: ignore[method-assign]
