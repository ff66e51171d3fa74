"""Compiled parts of a model, run as they were written where a pass must see their operations."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch


class _Eager:
    """Keeps torch.compile away while any pass runs: its stance is one for all threads of the process."""

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._passes, self._compiled, self._stance = 0, 0, cast(Any, None)

    def __enter__(self) -> None:
        with self._change:
            self._change.wait_for(lambda: not self._compiled)
            if not self._passes:
                self._stance = torch.compiler.set_stance("force_eager")
            self._passes += 1

    def __exit__(self, *_: object) -> None:
        with self._change:
            self._passes -= 1
            if not self._passes:
                self._stance.__exit__(None, None, None)

    @contextmanager
    def let_in(self) -> Iterator[bool]:
        """Let a compiled pass of our own run, where no pass keeps the compiler away; those that come wait for it."""
        with self._change:
            free = not self._passes
            self._compiled += free
        try:
            yield free
        finally:
            with self._change:
                self._compiled -= free
                self._change.notify_all()


_EAGER = _Eager()


def without_compilation() -> AbstractContextManager[None]:
    """Run what torch.compile has compiled as it was written: compiled code hides its operations."""
    return _EAGER if "torch._dynamo" in sys.modules else nullcontext()


def with_compilation() -> AbstractContextManager[bool]:
    """Tell whether a compiled pass may run now; it may not while another thread looks into a pass."""
    return _EAGER.let_in()
