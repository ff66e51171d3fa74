"""Shares of energy on objects, the other class and the contrast, and points that methods found, through the command."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import apportion as ap
from apportion.adapters import bundled, models
from apportion.cli import work
from apportion.core.attribution import Attribution
from apportion.core.explainer import Passes

pytest.importorskip("cyclopts")
pytest.importorskip("PIL")
pytest.importorskip("matplotlib")

Call = Callable[..., tuple[int, str, str]]
NAMED = ("--model", "stranger:named", "--quiet")


def explain(call: Call, picture: str, *options: object) -> dict[str, Any]:
    """Explain one picture and give its record."""
    code, _, err = call("explain", picture, *NAMED, *options, "--out", "out")
    assert code == 0, err
    (one,) = json.loads(Path("out/report.json").read_text())["pictures"]
    return one


@pytest.mark.parametrize("method", ["gradient", "grad_cam"])
def test_shares_are_those_counted_by_hand(folder: Path, call: Call, method: str) -> None:
    pytest.importorskip("skimage")
    (found,) = explain(call, "coffee", "--method", method, "--contrast", "none")["maps"]
    values = Attribution.load(folder / "out" / found["values"]).values
    if method == "grad_cam":
        values = torch.nn.functional.interpolate(values[None], (16, 16), mode="bilinear")[0][None]
    energy = (values[0].double() ** 2).sum(0)
    network = models.load("stranger:named")
    high, wide = bundled.picture("coffee").pixels.shape[1:]
    assert [one["name"] for one in found["share_of_energy"]] == list(bundled.drawn()["coffee"])
    for one in found["share_of_energy"]:
        truth = bundled.truth("coffee", one["name"]).through(network.crop, high, wide)
        left, top, right, bottom = truth.box
        mask = truth.mask(16, 16)
        assert one["box"] == pytest.approx(float(energy[top:bottom, left:right].sum() / energy.sum()), abs=1e-6)
        assert one["box_area"] == pytest.approx((right - left) * (bottom - top) / 256)
        assert one["mask"] == pytest.approx(float(energy[mask].sum() / energy.sum()), abs=1e-6)
        assert one["mask_area"] == pytest.approx(float(mask.float().mean()))


def test_the_table_shows_the_smallest_box_beside_its_area(folder: Path, call: Call) -> None:
    pytest.importorskip("skimage")
    named = ("--model", "stranger:named", "--out", "out")
    code, out, err = call("explain", "chelsea", "one.png", *named, "--method", "gradient", "--contrast", "none")
    assert code == 0, err
    both = json.loads((folder / "out/report.json").read_text())["pictures"]
    shares = {one["name"]: one for one in both[0]["maps"][0]["share_of_energy"]}
    assert shares["cat"]["box_area"] == shares["cat"]["box"] == 1.0  # cropped to the whole: it tells nothing
    telling = shares["eyes and nose"]
    shown = "/".join(f"{telling[key]:.2f}"[1:] for key in ("box", "box_area"))
    assert re.search(rf"^chelsea +Gradient +none +{re.escape(shown)} +1 \+ 1 ", out, re.M)
    assert re.search(r"^one\.png +Gradient +none +1 \+ 1 ", out, re.M)  # nothing is drawn on it
    assert "chelsea" in out
    assert "eyes and nose" in out
    assert "squares of its values over channels and pixels" in out
    report = " ".join((folder / "out/report.html").read_text().split())
    assert f"eyes and nose: {telling['box']:.2f} of the energy in its box, {telling['box_area']:.2f} of the" in report
    assert f"{telling['mask']:.2f} in its outline, {telling['mask_area']:.2f} of the area" in report
    assert "squares of its values over channels and pixels" in " ".join(report.split())
    assert both[1]["objects"] == []


def test_a_file_with_the_name_of_a_bundled_picture_has_no_marks(folder: Path, call: Call) -> None:
    shutil.copy("one.png", "coffee")
    found = explain(call, "coffee", "--method", "gradient")
    assert found["objects"] == []
    assert found["maps"][0]["share_of_energy"] == []


def test_top_class_runner_up_and_contrast(folder: Path, call: Call) -> None:
    """The contrast's map is the difference of the other two, since this method is linear in the score."""
    own = explain(call, "one.png", "--method", "gradient", "--method", "integrated_gradients")
    assert [m["title"] for m in own["maps"]] == [
        "Gradient",
        "Integrated gradients: top class",
        "Integrated gradients: runner-up",
        "Integrated gradients: contrast (top − runner-up)",
    ]
    first, second = (c["label"] for c in own["classes"][:2])
    assert [m["detail"] for m in own["maps"]] == ["", first, second, f"{first} − {second}"]
    top, other, contrast = (Attribution.load(folder / "out" / m["values"]) for m in own["maps"][1:])
    assert (top.values - other.values).abs().max() > 1e-3
    assert torch.allclose(contrast.values, top.values - other.values, atol=1e-5)
    assert float(contrast.value) > 0
    report = (folder / "out/report.html").read_text()
    for title in ("top class", "runner-up", "contrast (top − runner-up)"):
        assert f"Integrated gradients: {title}</bdi>" in report


def test_a_target_that_is_not_predicted_stands_beside_the_prediction(folder: Path, call: Call) -> None:
    top = explain(call, "one.png", "--method", "gradient")["classes"][0]["label"]
    target = next(i for i in (0, 1) if f"({i})" not in top)
    own = explain(call, "one.png", "--method", "gradient", "--target", target)
    assert [m["title"] for m in own["maps"]] == [
        "Gradient: top class",
        "Gradient: target",
        "Gradient: contrast (top − target)",
    ]
    found = [Attribution.load(folder / "out" / m["values"]) for m in own["maps"]]
    assert own["maps"][1]["values"] == "values/one.gradient.safetensors"
    assert found[1].target.tolist() == [target]
    assert own["maps"][0]["detail"] == top
    assert torch.allclose(found[2].values, found[0].values - found[1].values, atol=1e-6)


@pytest.mark.parametrize(("contrast", "maps"), [("none", 2), ("one", 4), ("all", 6), ("GradCAM", 4)])
def test_which_methods_are_contrasted(folder: Path, call: Call, contrast: str, maps: int) -> None:
    methods = ("--method", "gradient", "--method", "grad_cam", "--contrast", contrast)
    found = explain(call, "one.png", *methods)["maps"]
    assert len(found) == maps
    if contrast == "GradCAM":
        assert [m["title"].partition(":")[0] for m in found] == ["Gradient", "Grad-CAM", "Grad-CAM", "Grad-CAM"]


def test_a_contrast_is_of_a_method_that_runs(folder: Path, call: Call) -> None:
    code, _, err = call("explain", "one.png", "--model", "stranger:named", "--method", "gradient", "--contrast", "nome")
    assert code == 2
    assert "'none'" in err.splitlines()[1]


def fails_on(monkeypatch: pytest.MonkeyPatch, method: Any, wrong: Callable[[torch.Tensor], bool]) -> None:
    """Break a method on some pictures."""
    whole = method.explain

    def explain(self: Any, q: Any) -> Any:
        if wrong(q.x):
            raise ZeroDivisionError("broken here")
        return whole(self, q)

    monkeypatch.setattr(method, "explain", explain)


@pytest.mark.parametrize("quiet", [False, True])
def test_a_method_that_fails_does_not_stop_the_others(
    folder: Path, call: Call, monkeypatch: pytest.MonkeyPatch, quiet: bool
) -> None:
    seen: list[torch.Tensor] = []

    def second(x: torch.Tensor) -> bool:
        seen.append(x)
        return not torch.equal(x, seen[0])

    fails_on(monkeypatch, ap.GradCAM, second)
    methods = ("--method", "grad_cam", "--method", "gradient", "--contrast", "none")
    named = ("--model", "stranger:named", "--out", "out", *(["--quiet"] if quiet else []))
    code, out, err = call("explain", "one.png", "two.png", *named, *methods)
    assert code == 1
    said = err if quiet else out
    assert "error: two.png: Grad-CAM: ZeroDivisionError: broken here" in said.splitlines()
    assert quiet or re.search(r"^two\.png +Grad-CAM +failed", out, re.M)
    report = json.loads((folder / "out/report.json").read_text())["pictures"]
    assert [[m["title"] for m in one["maps"]] for one in report] == [["Grad-CAM", "Gradient"], ["Gradient"]]
    assert [one["failures"] for one in report] == [{}, {"Grad-CAM": "ZeroDivisionError: broken here"}]
    assert "broken here" in (folder / "out/report.html").read_text()
    assert (folder / "out/two.png").exists()


def test_where_nothing_could_be_explained_nothing_is_written(
    folder: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails_on(monkeypatch, ap.Gradient, lambda _: True)
    code, _, err = call("explain", "one.png", *NAMED, "--method", "gradient", "--out", "out")
    assert code == 2
    assert err.splitlines()[0] == "Gradient: ZeroDivisionError: broken here"
    assert not (folder / "out").exists()


def test_bounds_of_passes_are_called_so(folder: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ap.Gradient, "passes", lambda self, q=None: Passes(5, 4, 1, 2, 3, exact=False))
    monkeypatch.setattr(work, "methods", lambda: ["gradient", "grad_cam"])
    network = models.load("stranger:named")
    ((picture, _),) = work.read(["one.png"])
    expected = work.estimate(network.field(), work.look(network, picture), work.choose(["gradient"]), None, "none")
    assert expected.rows == (("gradient", 7, 7, False),)
    code, out, _ = call("explain", "one.png", "--model", "stranger:named", "--methods", "all", "--contrast", "none")
    assert code == 0
    assert re.search(r"^gradient +at most 7 +at most 7$", out, re.M)
    assert re.search(r"^grad_cam +1 +1$", out, re.M)
    assert re.search(r"^at most \d+ \+ \d+ passes a picture", out, re.M)


def test_baselines_are_drawn_each_once(folder: Path, call: Call) -> None:
    """Also one that is no constant, and one that leaves the range of pictures."""
    network = models.load("stranger:named")
    ((picture, _),) = work.read(["one.png"])
    seen = work.look(network, picture)
    choices = [
        work.Choice(ap.IntegratedGradients(ap.baselines.Blurred(2.0)), by_name=True),
        work.Choice(ap.IntegratedGradients(ap.baselines.Noise(2.0, count=2)), by_name=True),
        work.Choice(ap.GradientTimesInput(), by_name=True),
    ]
    one = work.explain(network, network.field(), seen, choices, None, 0, lambda _: None, "none")
    from apportion.show.page import baseline

    extra = dict(one.page.extra_pictures)
    assert len(extra) == 3  # black has a word and no picture
    assert baseline(one.panels[-1].attribution) == "black"
    blurred = extra["baseline of Integrated gradients"]
    assert 0 < (blurred - seen.x).abs().max() < 1
    assert blurred.std() > 0
    for number in (1, 2):
        (name,) = (n for n in extra if n.startswith(f"baseline {number} of 2 of Integrated gradients, −"))
        assert name.endswith("clipped to 0 to 1")
        assert extra[name].min() == 0
        assert extra[name].max() == 1
    from apportion.show.report import write_report

    write_report("report.html", [one.page], title="t", model="m")
    report = Path("report.html").read_text()
    assert all(name in report for name in extra)


def test_pictures_are_explained_by_superpixels(folder: Path, call: Call) -> None:
    """Methods that remove elements get superpixels of a picture, and their values are drawn."""
    (choice,) = work.choose(["occlusion"])
    assert choice.explainer.groups == ap.groups.Superpixels()  # pyright: ignore[reportAttributeAccessIssue]
    (lime,) = work.choose(["lime"])
    assert lime.explainer == ap.LIME(groups=ap.groups.Superpixels(), fill=ap.fills.SegmentMean())
    assert work.choose(["gradient"])[0].explainer == ap.Gradient()
    assert [c.explainer for c in work.choose(["gradient,rise"])] == [
        ap.Gradient(),
        ap.RISE(budget=1000, centred=True),
    ]
    code, out, _ = call(
        "explain", "one.png", "--model", "stranger:named", "--method", "occlusion", "--contrast", "none"
    )
    assert code == 0, out
    (stored,) = (folder / "out" / "values").iterdir()
    a = ap.Attribution.load(stored)
    assert a.domain is ap.Domain.GROUPS
    assert a.spread().values.shape[1:] == a.groups.shape[1:]
    assert "groups, shown by all its pixels" in (folder / "out" / "report.html").read_text(encoding="utf-8")
