"""The command line: `apportion methods`, `explain`, `metrics` and `evaluate`.

Needs the cli extra: `pip install apportion[cli]`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any

from apportion.core.errors import ApportionError

FAILED, MISTAKE, INTERRUPTED = 1, 2, 130
"""Exit codes: some map is missing, something to put right, and stopped by the user."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Errors of ours take three lines on standard error and no traceback: what was given, what was expected,
    what to do.

    Args:
        arguments: the words after `apportion`; those of the process unless given.

    Returns:
        The exit code: 0, 1 where a method failed on a picture, 2 after a mistake, 130 when interrupted or told
        to end.

    >>> main(["methods", "gradient", "--nonsense"])
    2
    """
    with _Stop() as stop:
        try:
            return _main(sys.argv[1:] if arguments is None else list(arguments))
        except KeyboardInterrupt as error:
            return _interrupted(str(error))
        except Exception:
            if stop.asked:  # a package that turned the interrupt into an error of its own
                return _interrupted("")
            raise


def _main(arguments: list[str]) -> int:
    try:
        from apportion.cli.commands import run
    except ModuleNotFoundError as error:
        if error.name not in ("cyclopts", "rich"):
            raise
        return _complain(f"{error.name} is not installed", "the cli extra", "pip install 'apportion[cli]'")
    try:
        whole = run(arguments)
        sys.stdout.flush()
    except ApportionError as error:
        return _complain(error.given, error.expected, error.do)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0 if whole else FAILED


class _Stop:
    """Takes SIGTERM as Ctrl-C while a command runs, and remembers that one of the two came."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Stop:
        if threading.current_thread() is threading.main_thread():
            for which in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(which) in (signal.SIG_DFL, signal.default_int_handler):
                    self._before[which] = signal.signal(which, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for which, handler in self._before.items():
            signal.signal(which, handler)

    def _ask(self, *_: object) -> None:
        self.asked = True
        raise KeyboardInterrupt


def _interrupted(where: str) -> int:
    print(f"\ninterrupted{f'; {where}' if where else ''}", file=sys.stderr)
    return INTERRUPTED


def _complain(given: str, expected: str, do: str) -> int:
    parts = (given, expected and f"Expected: {expected}", do and f"To fix: {do}")
    lines = [" ".join(part.split()) for part in parts if part]
    print("\n".join("".join(c if c.isprintable() else "�" for c in line) for line in lines), file=sys.stderr)
    return MISTAKE
