"""Progress on long work: silent unless asked for."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Report = Callable[[str, int, int], None]
"""Called with what runs, the rows done and the rows in all."""

_report: ContextVar[Report | None] = ContextVar("apportion_progress", default=None)


def tick(what: str, done: int, total: int) -> None:
    """Report to whoever listens."""
    listener = _report.get()
    if listener is not None:
        listener(what, done, total)


@contextmanager
def progress(report: Report | None = None) -> Iterator[None]:
    """Show progress of everything explained inside the block.

    Args:
        report: called with (what, done, total); None writes one line to standard error.

    >>> seen = []
    >>> with progress(lambda what, done, total: seen.append((done, total))):
    ...     tick("demo", 1, 2)
    >>> seen
    [(1, 2)]
    """
    token = _report.set(report or _Line())
    try:
        yield
    finally:
        _report.reset(token)


class _Line:
    """One line on standard error, rewritten at most five times a second."""

    def __init__(self) -> None:
        self.start, self.last = time.monotonic(), 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done < total and now - self.last < 0.2:
            return
        self.last = now
        end = "\n" if done >= total else ""
        sys.stderr.write(f"\r{what}: {done}/{total} rows, {now - self.start:.0f} s{end}")
        sys.stderr.flush()
