"""Files are whole or not there."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from apportion.core.errors import ApportionError, OutputError
from apportion.show.write import atomic, write_bytes


def test_a_file_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with atomic(path) as file:
        file.write(b"half")
        assert not path.exists()
        file.write(b"whole")
    assert path.read_bytes() == b"halfwhole"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("before", [None, b"before"])
def test_nothing_is_left_when_interrupted(tmp_path: Path, error: type[BaseException], before: bytes | None) -> None:
    path = tmp_path / "a.txt"
    if before is not None:
        path.write_bytes(before)

    def write() -> None:
        with atomic(path) as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        write()
    assert (path.read_bytes() if path.exists() else None) == before
    assert len(os.listdir(tmp_path)) == (before is not None)


def test_permissions_are_the_users(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    write_bytes(tmp_path / "ours", b"")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_bytes(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


def test_places_that_cannot_be_written_to_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path, said in [
        (tmp_path / "none" / "a", "a directory that exists"),
        (tmp_path / "file" / "a", "a directory above the file"),
        (tmp_path, "the name of a file"),
    ]:
        with pytest.raises(OutputError, match=said) as caught:
            write_bytes(path, b"x")
        assert str(path) in str(caught.value)
        assert "To fix" in str(caught.value)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_directories_of_others_are_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="directory you may write to"):
            write_bytes(tmp_path / "a", b"x")
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize(
    ("number", "said"), [(errno.ENOSPC, "a disk with room"), (errno.EACCES, "may write"), (errno.EIO, "elsewhere")]
)
def test_what_the_system_says_is_told(tmp_path: Path, monkeypatch, number: int, said: str) -> None:
    def full(_: int) -> None:
        raise OSError(number, os.strerror(number))

    (tmp_path / "a").write_bytes(b"before")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ApportionError, match=said) as caught:
        write_bytes(tmp_path / "a", b"x")
    assert isinstance(caught.value, OSError)
    assert os.strerror(number) in str(caught.value)
    assert (tmp_path / "a").read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["a"]


def test_a_write_that_stops_half_way_leaves_nothing(tmp_path: Path) -> None:
    """A real limit of the system, on files of one process."""
    code = "import sys; from apportion.show.write import write_bytes; write_bytes(sys.argv[1], b'x' * 100_000)"
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "a"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)),
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert "OutputError" in done.stderr, done.stderr
    assert "File too large" in done.stderr
    assert os.listdir(tmp_path) == []
