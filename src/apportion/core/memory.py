"""Memory: how much there is, and how to keep what was used from going back to the system between passes."""

from __future__ import annotations

import ctypes
import platform
import threading
from contextlib import AbstractContextManager, ContextDecorator
from pathlib import Path

import torch
from torch import Tensor

CLOSE = 3 << 24
"""Bytes of a pass for each thread of a CPU: with more, small networks took up to twice as long a row.

The heap gives back what is beyond 64 MiB, and has it zeroed anew in the next pass.
"""
_CPU_BUDGET = 1 << 29
_CGROUPS = Path("/sys/fs/cgroup")


def budget(device: torch.device) -> int:
    """Say how many bytes the rows of one pass may keep for the way back.

    A quarter of what is free, and on a CPU no more than 512 MiB: larger passes were slower per row, not faster.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (torch.cuda.mem_get_info(device)[0] + unused) // 2
    return min(_CPU_BUDGET, available() // 4)


def available() -> int:
    """Say how many bytes this process may still take: what the system has, and its control group allows."""
    found = [_system(), *_control_groups()]
    return min((n for n in found if n is not None), default=4 * _CPU_BUDGET)


def _system() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def _control_groups(own: Path = Path("/proc/self/cgroup"), root: Path = _CGROUPS) -> list[int]:
    """List what each control group above this process leaves, in both versions of their interface."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []
    left = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "memory" if controllers else root
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        place = top / path.strip("/")
        for group in [place, *place.parents]:
            limit, used = (_number(group / name) for name in names)
            if limit is not None and used is not None:
                left.append(max(0, limit - used))
            if group == top:
                break
    return left


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return None


def sent(t: Tensor, like: Tensor) -> Tensor:
    """Bring a tensor to the device and dtype of another; to a GPU from pinned memory, so that no host waits for it.

    >>> sent(torch.ones(1), torch.ones(1, dtype=torch.float64)).dtype
    torch.float64
    """
    t = t.to(like.dtype)
    if t.device.type == "cpu" and like.device.type == "cuda":
        return t.pin_memory().to(like.device, non_blocking=True)
    return t.to(like.device)


# -- glibc's allocator ------------------------------------------------------------------------------

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_Setting = dict[int, int]
_KEPT: _Setting = {_MMAP_THRESHOLD: 1 << 30, _TRIM_THRESHOLD: 2**31 - 1}
_GIVEN_BACK: _Setting = {_MMAP_THRESHOLD: 1 << 16, _TRIM_THRESHOLD: 1 << 17}
_AFTER: _Setting = {_MMAP_THRESHOLD: 1 << 25, _TRIM_THRESHOLD: 1 << 26}
_made: list[tuple[object, _Setting]] = []  # of blocks that run, the newest last: its setting holds
_guard = threading.Lock()


def keep_memory() -> AbstractContextManager[bool]:
    """Keep freed memory in the process for the next pass, where the C library is glibc; a no-op elsewhere.

    By default glibc gives every block of more than 32 MiB back to the system when it is freed, and the top
    of its heap as well. The next pass has it zeroed, page by page: 15 to 30 % of a pass on a CPU. Inside
    this block memory stays. At the end what is free goes back, and the thresholds are those glibc's own
    adjustment ends at where large blocks are freed, 32 and 64 MiB; the adjustment itself cannot be had back.
    One setting holds for the whole process and all its threads; blocks may be nested and may overlap, also
    blocks of one object.

    Returns:
        A context manager that gives whether the setting was made.

    >>> with keep_memory() as made:
    ...     _ = torch.ones(3)
    """
    return _Block(_KEPT)


def give_back_memory() -> AbstractContextManager[bool]:
    """Give freed memory back to the system at once, where the C library is glibc; a no-op elsewhere.

    By default glibc serves most blocks from a heap, in which differing sizes leave gaps: the peak of many
    passes was up to twice what is held. Inside this block everything of 64 KiB and more is mapped on its
    own, and the peak is what is held. The price is that every pass has its memory zeroed anew. The end is
    that of `keep_memory`; where both run, the block entered last decides.

    Returns:
        What begins a block, as often as it is entered, and says whether it was set.

    >>> with give_back_memory() as set_:
    ...     _ = torch.ones(3)
    """
    return _Block(_GIVEN_BACK)


class _Block(ContextDecorator, AbstractContextManager[bool]):
    def __init__(self, setting: _Setting) -> None:
        self._setting = setting
        self._entered: list[tuple[ctypes.CDLL, tuple[object, _Setting]] | None] = []  # and not left yet

    def __enter__(self) -> bool:
        libc, own = _glibc(), (object(), self._setting)
        with _guard:
            self._entered.append(None if libc is None else (libc, own))
            if libc is None:
                return False
            _made.append(own)
            return _apply(libc, self._setting)

    def __exit__(self, *_: object) -> None:
        with _guard:
            if (entered := self._entered.pop()) is None:
                return
            libc, own = entered
            _made.remove(own)
            _apply(libc, _made[-1][1] if _made else _AFTER)
            if not _made:
                libc.malloc_trim(0)


def _apply(libc: ctypes.CDLL, setting: _Setting) -> bool:
    return all(bool(libc.mallopt(what, size)) for what, size in setting.items())


def _glibc() -> ctypes.CDLL | None:
    if platform.libc_ver()[0] != "glibc":
        return None
    try:
        libc = ctypes.CDLL(None)
        return libc if all(hasattr(libc, name) for name in ("mallopt", "malloc_trim")) else None
    except (OSError, AttributeError):
        return None
