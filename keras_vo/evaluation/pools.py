"""Pools that outlive a worker that crashed or hangs.

A `concurrent.futures.ProcessPoolExecutor` one of whose processes has died is
broken for good, and a thread that hangs is one less. `Pool` goes on with
another executor like it.
"""

from __future__ import annotations

import concurrent.futures as futures
import inspect
import weakref
from typing import Any

__all__ = ["Pool"]

# What took the place of an executor.
_replaced: weakref.WeakKeyDictionary[futures.Executor, futures.Executor] = (
    weakref.WeakKeyDictionary()
)
# Of executors of threads, the evaluations that were given up.
_given_up: weakref.WeakKeyDictionary[futures.Executor, list[Any]] = (
    weakref.WeakKeyDictionary()
)


class Pool:
    """An executor, or what has taken its place.

    Args:
        executor: any. Python's own pools (no subclasses) can be replaced.

    Attributes:
        is_threads: whether it runs in threads of this process.
        is_processes: whether it is a pool of processes.
    """

    def __init__(self, executor: futures.Executor) -> None:
        self._given = executor
        self.is_threads = type(executor) is futures.ThreadPoolExecutor
        self.is_processes = type(executor) is futures.ProcessPoolExecutor

    @property
    def _executor(self) -> futures.Executor:
        return _replaced.get(self._given, self._given)

    def submit(self, *task: Any) -> futures.Future[Any]:
        """As an executor does; a broken one is replaced before it.

        Raises:
            futures.BrokenExecutor: it is broken, and can't be replaced.
        """
        try:
            return self._executor.submit(*task)
        except futures.BrokenExecutor:
            if not self.is_processes:
                raise
            self.replace()
            return self._executor.submit(*task)

    @property
    def workers(self) -> int | None:
        """How many it has; `None`: that is not known."""
        if self.is_processes or self.is_threads:
            return int(getattr(self._executor, "_max_workers"))  # noqa: B009
        return None

    def give_up(self, future: futures.Future[Any]) -> None:
        """Notes that a thread is busy with what no one waits for."""
        _given_up.setdefault(self._executor, []).append(future)

    @property
    def is_stuck(self) -> bool:
        """Whether all its threads are busy so."""
        given_up = _given_up.get(self._executor, [])
        return sum(not f.done() for f in given_up) >= (self.workers or 1)

    def replace(self) -> None:
        """Ends all processes (no one can end a thread), and makes others.

        Executors have no public names for what they were made with.
        """
        former = self._executor
        arguments = {
            name: getattr(former, f"_{name}")
            for name in inspect.signature(type(former)).parameters
            if hasattr(former, f"_{name}")
        }
        processes = list((getattr(former, "_processes", None) or {}).values())
        former.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()
        new = type(former)(**arguments)
        _replaced[self._given] = new
        weakref.finalize(self._given, new.shutdown, wait=False)
