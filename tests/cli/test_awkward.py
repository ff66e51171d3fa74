"""Pictures, places and moments that a command meets: odd formats, a disk that is full, an interrupt in the middle."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from apportion.core.attribution import Attribution

pytest.importorskip("cyclopts")
pytest.importorskip("PIL")
pytest.importorskip("matplotlib")

from PIL import Image

Call = Callable[..., tuple[int, str, str]]
OWN = ("--model", "stranger:make", "--size", 16, "--method", "gradient_times_input", "--quiet", "--out", "out")


def values(name: str) -> np.ndarray:
    return Attribution.load(f"out/values/{name}.gradient_times_input.safetensors").values.numpy()


def test_formats_are_explained_alike(folder: Path, call: Call) -> None:
    """One grey picture in every spelling, in a directory with other things: equal maps."""
    place = folder / "pictures"
    (place / "inner").mkdir(parents=True)
    (place / "notes.txt").write_text("no picture")
    shutil.copy("one.png", place / ".hidden.png")
    shutil.copy("one.png", place / "inner" / "deeper.png")
    steps = np.random.default_rng(1).integers(0, 2, (20, 24), dtype=np.uint8) * 255
    grey = Image.fromarray(steps)
    grey.save(place / "grey.png")
    grey.convert("RGB").save(place / "colour.png")
    grey.convert("1").save(place / "bits.png")
    grey.convert("P").save(place / "palette.png")
    grey.convert("RGBA").save(place / "alpha.png")
    grey.convert("RGB").convert("CMYK").save(place / "print.tif")
    Image.fromarray(steps.astype(np.uint16) * 257).save(place / "deep.png")
    turned = grey.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to the right to see it upright
    turned.save(place / "turned.png", exif=exif)
    turned.save(place / "lying.png")
    code, _, err = call("explain", "pictures", *OWN)
    assert code == 0, err
    names = {"grey", "colour", "bits", "palette", "alpha", "print", "deep", "turned", "lying"}
    assert {p.stem for p in Path("out").glob("*.png")} == names
    for name in names - {"lying"}:
        np.testing.assert_allclose(values(name), values("colour"), atol=1e-6, err_msg=name)
    assert np.abs(values("lying") - values("colour")).max() > 1e-3


@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_damaged_pictures_are_refused_before_the_work(folder: Path, call: Call, damage: str) -> None:
    whole = Path("two.png").read_bytes()
    Path("two.png").write_bytes({"truncated": whole[: len(whole) // 2], "text": b"hello", "empty": b""}[damage])
    code, out, err = call("explain", "one.png", "two.png", *OWN)
    assert (code, out) == (2, "")
    assert "two.png" in err.splitlines()[0]
    assert not Path("out").exists()


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "apportion", "explain", *arguments]


def unfinished(place: Path) -> list[Path]:
    """Files that are not whole: neither results that can be read nor an empty tree."""
    left = [p for p in place.rglob("*") if p.is_file()] if place.exists() else []
    bad = [p for p in left if ".unfinished" in str(p) or p.suffix not in (".png", ".safetensors", ".json", ".html")]
    for path in left:
        if path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
        elif path.suffix == ".safetensors":
            Attribution.load(path)
        elif path.suffix == ".html" and not path.read_text().rstrip().endswith("</html>"):
            bad.append(path)
    return bad


@pytest.mark.parametrize("most", [0, 8_000, 40_000])
def test_no_room(folder: Path, most: int) -> None:
    """Files may have so many bytes: none fits, the maps fit, the maps fit and the sheet does not."""
    arguments = ("one.png", "two.png", "--model", "stranger:make", "--size", "16", "--method", "gradient")
    done = subprocess.run(
        command(*arguments, "--quiet", "--out", "out"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)),
        env={"PYTHONDONTWRITEBYTECODE": "1", "PATH": "/usr/bin:/bin", "HOME": str(folder), "MPLCONFIGDIR": "/nowhere"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if "atplotlib" not in line]
    assert "cannot be written" in lines[-3]
    assert "room" in lines[-2]
    assert lines[-1].startswith("To fix: free some space")
    assert "Traceback" not in done.stderr
    assert not unfinished(folder / "out")
    assert not (folder / "out/report.html").exists()
    assert (folder / "out/values").exists() == (most > 0)
    assert not (folder / "out/one.png").exists()


SLOW = """
import pathlib, time, torch

class Slow(torch.nn.Module):
    calls = 0
    def forward(self, x):
        Slow.calls += 1
        if list(pathlib.Path("out").glob("*.png")):
            pathlib.Path("begun").touch()  # the first picture is done, the second is being explained
            time.sleep(0.2)
        return (x * x).mean((2, 3))
"""


def test_interrupt_in_the_middle(folder: Path) -> None:
    (folder / "slow.py").write_text(SLOW)
    methods = (
        "--method",
        "gradient",
        "--method",
        "integrated_gradients",
        "--method",
        "idgi",
        "--method",
        "smooth_grad",
    )
    with subprocess.Popen(
        command("one.png", "two.png", "--model", "slow:Slow", "--size", "16", *methods, "--out", "out"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        until = time.monotonic() + 100
        while not Path("begun").exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert err.strip().splitlines()[-1] == "interrupted; 1 of 2 picture(s) are complete in out, without a report"
    assert [p.name for p in Path("out").iterdir() if p.is_file()] == ["one.png"]
    assert all(p.name.startswith("one.") for p in Path("out/values").iterdir())
    assert not unfinished(folder / "out")


def test_term_is_taken_as_an_interrupt(folder: Path) -> None:
    (folder / "slow.py").write_text(SLOW)
    with subprocess.Popen(
        command(
            "one.png", "two.png", "--model", "slow:Slow", "--size", "16", "--method", "smooth_grad", "--out", "out"
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        until = time.monotonic() + 100
        while not Path("begun").exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert not list(Path("out").glob(".unfinished*"))


@pytest.mark.parametrize("swallowed", [False, True])
def test_interrupt_while_importing(folder: Path, call: Call, monkeypatch: pytest.MonkeyPatch, swallowed: bool) -> None:
    """A package may turn the interrupt into an error of its own."""

    def stopped(_: object) -> bool:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            if swallowed:
                raise ImportError("half a package") from None
            raise
        return True

    monkeypatch.setattr("apportion.cli.commands.run", stopped)
    code, out, err = call("explain", "one.png")
    assert (code, out, err) == (130, "", "\ninterrupted\n")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_suffixes_stay_where_stems_are_equal(folder: Path, call: Call) -> None:
    with Image.open("one.png") as image:
        image.save("one.bmp")
    code, _, err = call("explain", "one.png", "one.bmp", "two.png", *OWN)
    assert code == 0, err
    assert {p.name for p in Path("out").glob("*.png")} == {"one_png.png", "one_bmp.png", "two.png"}


def test_dark_pictures_are_noted(folder: Path, call: Call) -> None:
    Image.fromarray(np.full((20, 20), 1000, dtype=np.uint16)).save("dark.png")
    own = ("--model", "stranger:make", "--size", "16", "--method", "gradient", "--out", "out")
    _, _, err = call("explain", "dark.png", "one.png", *own)
    assert [line[:25] for line in err.splitlines() if "dark:" in line] == ["note: dark.png is very da"]


def test_a_large_gap_is_a_warning(folder: Path, call: Call) -> None:
    (folder / "bent.py").write_text(
        "import torch\nclass Bent(torch.nn.Module):\n    def forward(self, x):\n        return (x**3).mean((2, 3))\n"
    )
    bent = ("--model", "bent:Bent", "--size", "16", "--out", "out", "--contrast", "none")
    methods = ("--method", "gradient_times_input", "--method", "integrated_gradients")
    code, out, err = call("explain", "one.png", "two.png", *bent, *methods)
    assert code == 0, err
    (line,) = [line for line in out.splitlines() if line.startswith("note:")]
    assert line.startswith("note: Gradient × input misses the total")
    assert line.endswith("one.png 200 %, two.png 200 %")
    assert Path("out/report.html").read_text().count("a gap of 200 %") == 2
    sys.modules.pop("bent", None)


def test_the_place_for_results_is_no_suggestion(folder: Path, call: Call) -> None:
    code, _, err = call("explain", "outt", *OWN)
    assert code == 2
    assert "'out'" not in err


def test_estimates_count_what_results_count(folder: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    some = (
        "gradient smooth_grad integrated_gradients guided_ig score_cam lrp deep_lift occlusion banzhaf lime full_grad"
    )
    monkeypatch.setattr("apportion.cli.work.methods", some.split)
    own = ("--model", "stranger:make", "--size", "16", "--methods", "all", "--out", "out")
    code, out, err = call("explain", "one.png", *own)
    assert code == 0, err
    forward, backward = map(int, out.partition(" passes a picture")[0].rpartition("at most ")[2].split(" + "))
    (record,) = json.loads(Path("out/report.json").read_text())["pictures"]
    said = {}
    for line in out.partition("passes a picture")[0].splitlines():
        words = line.replace("at most ", "").split()
        if len(words) == 3 and words[1].isdecimal():
            said[words[0]] = (int(words[1]), int(words[2]), "at most" in line)
    spent = {m["values"].split(".")[1]: (m["forward"], m["backward"]) for m in record["maps"] if "class" not in m}
    for name, (there, back, bound) in said.items():
        assert spent[name] == (there, back) or (bound and spent[name][0] <= there and spent[name][1] <= back), name
    assert sum(m["forward"] for m in record["maps"]) <= forward
    assert sum(m["backward"] for m in record["maps"]) <= backward
