"""The command line: `apportion methods` and `apportion explain`.

Needs the cli extra: `pip install apportion[cli]`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

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
        The exit code: 0, 1 where a method failed on a picture, 2 after a mistake, 130 when interrupted.

    >>> main(["methods", "gradient", "--nonsense"])
    2
    """
    try:
        from apportion.cli.commands import run
    except ModuleNotFoundError as error:
        if error.name not in ("cyclopts", "rich"):
            raise
        return _complain(f"{error.name} is not installed", "the cli extra", "pip install 'apportion[cli]'")
    try:
        whole = run(sys.argv[1:] if arguments is None else list(arguments))
        sys.stdout.flush()
    except KeyboardInterrupt as error:
        print(f"\ninterrupted{f'; {error}' if str(error) else ''}", file=sys.stderr)
        return INTERRUPTED
    except ApportionError as error:
        return _complain(error.given, error.expected, error.do)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0 if whole else FAILED


def _complain(given: str, expected: str, do: str) -> int:
    parts = (given, expected and f"Expected: {expected}", do and f"To fix: {do}")
    lines = [" ".join(part.split()) for part in parts if part]
    print("\n".join("".join(c if c.isprintable() else "�" for c in line) for line in lines), file=sys.stderr)
    return MISTAKE
