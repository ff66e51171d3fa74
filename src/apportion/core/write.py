"""Writing files whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors
from torch import Tensor

from apportion.core.errors import ConfigError, OutputError

_HINTS = {
    errno.ENOSPC: ("a disk with room", "free some space, or write elsewhere"),
    errno.EDQUOT: ("room within your quota", "free some space, or write elsewhere"),
    errno.EACCES: ("a directory you may write to", "choose another, or change its permissions"),
    errno.EPERM: ("a directory you may write to", "choose another, or change its permissions"),
    errno.EROFS: ("a file system that can be written to", "write elsewhere"),
    errno.ENOENT: ("a directory that exists", "create it first, or correct the path"),
    errno.ENOTDIR: ("a directory above the file", "a file stands where a directory should be: choose another path"),
    errno.EISDIR: ("the name of a file", "this is a directory: add a file name"),
    errno.ENAMETOOLONG: ("a shorter name", "shorten the file's name"),
}


@contextmanager
def atomic(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file for writing that appears under its name only when it is complete.

    The bytes go to a hidden neighbour that is renamed at the end; after any exception, also an interrupt, the
    neighbour is removed and whatever had the name before is untouched. A symbolic link is followed.

    Args:
        path: where the file shall be.

    Yields:
        The open binary file.

    Raises:
        OutputError: the directory is missing or may not be written to, the disk is full, the name is a directory's.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with atomic(f"{folder}/a.txt") as file:
    ...         _ = file.write(b"whole")
    ...     os.listdir(folder)
    ['a.txt']
    """
    final = Path(os.path.realpath(path))
    part = final.with_name(f".{secrets.token_hex(8)}.part")
    try:
        if final.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with open(part, "xb") as file:  # as the user's umask has it, unlike a temporary file
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, final)
    except BaseException as error:
        with suppress(OSError):
            part.unlink()
        if not isinstance(error, OSError) or isinstance(error, OutputError):
            raise
        expected, do = _HINTS.get(error.errno or 0, ("a place that can be written to", "write elsewhere"))
        raise OutputError(f"{path} cannot be written: {error.strerror or error}", expected, do) from error


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write all of a file's bytes, or leave no file.

    Raises:
        OutputError: as `atomic` has it.

    >>> write_bytes("/nowhere/at/all.txt", b"")
    Traceback (most recent call last):
    apportion.core.errors.OutputError: /nowhere/at/all.txt cannot be written: No such file or directory
    Expected: a directory that exists
    To fix: create it first, or correct the path
    """
    with atomic(path) as file:
        file.write(data)


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors as one safetensors file, with a record in its header.

    Args:
        path: where.
        tensors: by name.
        header: what `read_tensors` finds under the same keys; anything that JSON holds.

    Raises:
        OutputError: as `atomic` has it.
    """
    kept = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    write_bytes(path, safetensors(kept, metadata={k: json.dumps(v) for k, v in header.items()}))


def read_tensors(path: str | Path, key: str, writer: str) -> tuple[Any, dict[str, Tensor]]:
    """Read a file of `write_tensors`: the record under a key, and the tensors. Nothing in it is executed.

    Args:
        path: where.
        key: of the header.
        writer: what writes such files, for messages.

    Raises:
        ConfigError: the file cannot be read, or has no such record.
    """
    try:
        with safe_open(str(path), "pt") as file:
            meta = (file.metadata() or {}).get(key)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{path}: {error}",
            f"a file written by {writer}",
            "check the path, and that the file was written completely",
        ) from error
    try:
        if meta is not None:
            return json.loads(meta), tensors
    except ValueError:
        pass
    raise ConfigError(
        f"{path} has no record of ours in its header", f"a file written by {writer}", f"write it with {writer}"
    )
