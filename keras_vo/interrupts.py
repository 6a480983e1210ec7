"""What Ctrl-C may not interrupt, and errors that say where they come from."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

__all__ = ["deferred", "named"]


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Lets Ctrl-C wait until what is done in this scope is whole.

    Only Python's main thread gets it; in others this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    former = signal.getsignal(signal.SIGINT)
    if former is None:  # not set by Python, which could not set it again
        yield
        return

    def note(number: int, frame: Any) -> None:
        received.append(number)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)
        if received:
            signal.raise_signal(signal.SIGINT)


@contextlib.contextmanager
def named(note: str) -> Iterator[None]:
    """Adds a note to an exception, which stays what it is.

    Before Python 3.11 tracebacks don't show notes: it is in `__notes__` only.
    """
    try:
        yield
    except Exception as error:
        if hasattr(error, "add_note"):
            error.add_note(note)
        else:
            notes = [*getattr(error, "__notes__", ()), note]
            # PEP 678's name, which Python 3.10 does not know.
            error.__notes__ = notes  # type: ignore[attr-defined]
        raise
