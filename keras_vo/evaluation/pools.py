"""Process pools that outlive a worker that crashed or hangs.

A `concurrent.futures.ProcessPoolExecutor` one of whose processes has died is
broken for good. `Pool` goes on with another one like it.
"""

from __future__ import annotations

import concurrent.futures as futures
import inspect
import weakref
from typing import Any

__all__ = ["Pool"]

# What took the place of a broken executor.
_replaced: weakref.WeakKeyDictionary[futures.Executor, futures.Executor] = (
    weakref.WeakKeyDictionary()
)


class Pool:
    """An executor, or what has taken its place.

    Args:
        executor: any. If it is a `ProcessPoolExecutor` (no subclass), it is
            replaced where it breaks.

    Attributes:
        is_threads: whether it runs in threads of this process.
        is_processes: whether it can be replaced.
    """

    def __init__(self, executor: futures.Executor) -> None:
        self._given = executor
        self.is_threads = isinstance(executor, futures.ThreadPoolExecutor)
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

    def replace(self) -> None:
        """Ends all processes, and makes others.

        `ProcessPoolExecutor` has no public name for what it was made with.
        """
        former = self._executor
        arguments = {
            name: getattr(former, f"_{name}")
            for name in inspect.signature(
                futures.ProcessPoolExecutor
            ).parameters
            if hasattr(former, f"_{name}")
        }
        processes = list((getattr(former, "_processes", None) or {}).values())
        former.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()
        new = futures.ProcessPoolExecutor(**arguments)
        _replaced[self._given] = new
        weakref.finalize(self._given, new.shutdown, wait=False)
