"""A real browser, and a page to show in it."""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import apportion as ap
from apportion.show.report import Page, Panel

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars --remote-debugging-pipe"
).split()


# The browser wants its pipe as 3 and 4, numbers that may be anything in this process: renamed in the child.
RENAME = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3]]
os.dup2(ends[0], 3), os.dup2(ends[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """Headless Chromium, driven over its debugging pipe: NUL-ended JSON on file descriptors 3 and 4."""

    def __init__(self, program: str, folder: str) -> None:
        self._in, write = os.pipe()
        read, self._out = os.pipe()
        self._read, self._write = read, write
        command = [sys.executable, "-ISc", RENAME, str(self._in), str(self._out), program, *FLAGS]
        self._process = subprocess.Popen(
            [*command, f"--user-data-dir={folder}", "about:blank"],
            pass_fds=(self._in, self._out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(self._in)
        os.close(self._out)
        self._ids = itertools.count(1)
        self._rest = b""
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        try:
            (page,) = [t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page"]
            attached = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
            self._session = attached["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.call(f"{domain}.enable")
        except BaseException:
            self.close()
            raise

    def _message(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], max(0.0, until - time.monotonic()))
            data = os.read(self._read, 1 << 20) if ready else b""
            if not data:
                raise TimeoutError("the browser does not answer")
            self._rest += data
        one, self._rest = self._rest.split(b"\0", 1)
        return json.loads(one)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send one command and wait for its answer; keep the events that come before it."""
        message: dict[str, Any] = {"id": next(self._ids), "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + 60
        while True:
            got = self._message(until)
            if got.get("id") == message["id"]:
                assert "error" not in got, got
                return got["result"]
            self.events.append(got)

    def open(self, path: Path, width: int = 1280, *, dark: bool = False, reduced: bool = False) -> None:
        """Load a file at a width and wait for it."""
        self.events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        features = [
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
            {"name": "prefers-reduced-motion", "value": "reduce" if reduced else "no-preference"},
        ]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.call("Page.navigate", url=path.as_uri())
        until = time.monotonic() + 60
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self.events.append(self._message(until))

    def run(self, script: str) -> Any:
        """Give an expression's value on the page."""
        got = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in got, got["exceptionDetails"]
        return got["result"].get("value")

    def press(self, key: str, code: int) -> None:
        """Press a key, as a keyboard would."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def complaints(self) -> list[Any]:
        """Errors and warnings of the console, uncaught exceptions, and refused loads."""
        self.run("0")  # all that happened before has been told by now
        bad = []
        for event in self.events:
            method, params = event.get("method"), event.get("params", {})
            if (
                method == "Runtime.exceptionThrown"
                or (method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"))
                or (method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"))
            ):
                bad.append(params)
        return bad

    def loaded(self) -> list[str]:
        """List addresses asked for that are not data inside the file."""
        sent = [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith("data:")]

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """Store what the page looks like."""
        got = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(got["data"]))

    def close(self) -> None:
        """End the browser."""
        try:
            self._session = None
            self.call("Browser.close")
            self._process.wait(10)
        except (OSError, TimeoutError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._read)
        os.close(self._write)


def find() -> str | None:
    """Find a browser on the PATH."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


def install() -> str:
    """Install Chromium where that is possible: the empty string, or why it is not."""
    if not shutil.which("apt-get") or os.geteuid() != 0:
        return "no Chromium on the PATH, and installing it needs apt-get and root: apt-get install -y chromium"
    lock = Path(tempfile.gettempdir()) / "apportion-chromium-tried"
    try:
        lock.touch(exist_ok=False)  # once a machine: another worker may be at it, or it failed before
    except FileExistsError:
        until = time.monotonic() + 240
        while find() is None and time.monotonic() < until and time.time() - lock.stat().st_mtime < 240:
            time.sleep(2)
        return "" if find() else f"Chromium could not be installed before; remove {lock} to try again"
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        for command in (["apt-get", "update", "-qq"], ["apt-get", "install", "-y", "-qq", "chromium"]):
            done = subprocess.run(command, env=environment, timeout=240, capture_output=True, text=True, check=False)
            if done.returncode:
                return f"{' '.join(command)} failed: {done.stderr.strip()[-300:]}"
    except subprocess.TimeoutExpired as error:
        return f"installing Chromium took longer than {error.timeout:.0f} s"
    return "" if find() else "apt-get installed no Chromium"


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Real headless Chromium; skips, saying why, where there is none and none can be installed."""
    reason = "" if find() else install()
    program = find()
    if program is None:
        print(f"browser tests skipped: {reason}")
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        one = Browser(program, folder)
        try:
            yield one
        finally:
            one.close()


@pytest.fixture(scope="session")
def make_page() -> Callable[..., Page]:
    """Make a page about a small network, with names to choose."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.AvgPool2d(4), torch.nn.Flatten()
    )
    net = torch.nn.Sequential(*net, torch.nn.Linear(4 * 4 * 6, 3)).eval()
    x = torch.rand(1, 3, 16, 24)
    methods = (ap.Gradient(), ap.GradientTimesInput(), ap.IntegratedGradients(), ap.GradCAM())
    found = [(m.card.title, m(ap.Field(net, bounds=(0, 1)), x, target=1)) for m in methods]

    def make(
        name: str = "a cat", target: str = "logit of cat", label: str = "cat", title: str = "", extra: str = "black"
    ) -> Page:
        panels = tuple(
            Panel(title or known, replace(a, warnings=(label,), cautions=(*a.cautions, label)), 0.25)
            for known, a in found
        )
        return Page(name, x[0], ((label, 0.9), ("dog", 0.1)), target, panels, ((extra, torch.zeros(3, 16, 24)),))

    return make
