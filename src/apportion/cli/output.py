"""Where results go: a directory that is known to be writable, in which every file is whole or not there."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from apportion.core.errors import OutputError

_LONGEST = 80
_RESERVED = frozenset({"con", "prn", "aux", "nul", *(f"{p}{i}" for p in ("com", "lpt") for i in range(1, 10))})


class Output:
    """A directory for results.

    Files are written beside their place and moved there when complete, so that an interruption or a full
    disk leaves no part of one. Directories made here are removed again where nothing came to lie in them.

    >>> with Output(Path(tempfile.mkdtemp()) / "new") as out:
    ...     with out.file("a/b.txt") as path:
    ...         _ = path.write_text("whole")
    >>> [p.name for p in out.written]
    ['b.txt']
    """

    def __init__(self, folder: str | Path, inputs: Iterable[Path] = ()) -> None:
        """Name the directory.

        Args:
            folder: made where it is not there.
            inputs: files that must not be written over.
        """
        self.folder = Path(folder)
        self.written: list[Path] = []
        self._inputs = {p.resolve() for p in inputs}
        self._names: set[str] = {"report"}
        self._made: list[Path] = []
        self._staging: Path | None = None

    def __enter__(self) -> Output:
        """Make the directory and try it.

        Raises:
            OutputError: it cannot be made or written to.
        """
        way = [*reversed(self.folder.parents), self.folder]
        for part in way:
            if part.is_file():
                raise OutputError(f"{part} is a file, as --out", "a directory", "give another --out")
        try:
            for parent in way:
                if not parent.is_dir():
                    parent.mkdir()
                    self._made.append(parent)
            self._staging = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=self.folder))
            (self._staging / "try").write_bytes(b"x")
        except OSError as error:
            self.__exit__()
            raise _no_room(self.folder, error) from error
        return self

    def __exit__(self, *_: object) -> None:
        if self._staging is not None:
            shutil.rmtree(self._staging, ignore_errors=True)
        for folder in reversed(self._made):
            with contextlib.suppress(OSError):  # not empty: it holds results
                folder.rmdir()

    @contextlib.contextmanager
    def file(self, name: str) -> Iterator[Path]:
        """Write a file: to the path given, which becomes the file when the block ends well.

        Args:
            name: its path inside the directory.

        Raises:
            OutputError: it cannot be written whole.
        """
        assert self._staging is not None  # entered
        place = self.folder / name
        draft = self._staging / place.name
        try:
            yield draft
            if not place.parent.is_dir():
                place.parent.mkdir()
                self._made.append(place.parent)
            os.replace(draft, place)
        except SafetensorError as error:
            raise OutputError(
                f"{place} cannot be written: {error}", "a place with room", "free some space, or give another --out"
            ) from error
        except OutputError as error:
            if isinstance(error.__cause__, OSError):
                raise _no_room(place, error.__cause__) from error
            raise OutputError(error.given.replace(str(draft), str(place)), error.expected, error.do) from error
        except OSError as error:
            raise _no_room(place, error) from error
        self.written.append(place)

    def name(self, wanted: str, suffixes: Iterable[str]) -> str:
        """Choose a file name that is safe on every system and not taken in this run.

        Args:
            wanted: any text.
            suffixes: endings of the files to come, none of which may fall on an input.

        >>> out = Output("out")
        >>> out.name("../a b.png", [".png"]), out.name("A B", [".png"]), out.name("A_B", [".png"])
        ('a_b.png', 'A_B', 'A_B-2')
        """
        base = wanted.replace("\\", "/").rsplit("/", 1)[-1]
        safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in base).strip("._")[:_LONGEST] or "picture"
        if safe.partition(".")[0].casefold() in _RESERVED:
            safe = f"_{safe}"
        suffixes = list(suffixes)
        for count in range(1, 10**9):
            name = safe if count == 1 else f"{safe}-{count}"
            falls = any((self.folder / (name + s)).resolve() in self._inputs for s in suffixes)
            if name.casefold() not in self._names and not falls:
                self._names.add(name.casefold())
                return name
        raise AssertionError("names run out")


def _no_room(place: Path, error: OSError) -> OutputError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return OutputError(
        f"{place} cannot be written: {error.strerror or error}",
        "room on the disk" if full else "a directory that can be written to",
        "free some space, or give another --out" if full else "give another --out, or change its permissions",
    )
