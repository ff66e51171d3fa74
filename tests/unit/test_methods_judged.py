"""The table of every method by many metrics: who is in it, how it reads, and that its page quotes it rightly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import contenders as who
from benchmarks import methods_judged as mj

import apportion as ap

ROOT = Path(__file__).parents[2]
RECORD: dict[str, Any] = json.loads((ROOT / "benchmarks/results/methods_judged.json").read_text(encoding="utf-8"))


def test_every_method_is_judged_or_left_out_by_name() -> None:
    p = ap.planted.background_only(8)
    room = who.Room(ap.Field(p.model), p.x, ap.baselines.Zero(), ap.groups.Squares(4), 4, 8)
    listed = [m for some in who.contenders(room).values() for m in some.values()]
    names = {type(m.base if isinstance(m, ap.Resized) else m).__name__ for m in listed}
    left_out = {n.strip() for line in who.UNSUITED for n in line.split(",")}
    assert names | left_out == {ap.method(n).__name__ for n in ap.methods()}
    assert not names & left_out


def test_the_record_has_every_contender_in_every_problem() -> None:
    assert list(RECORD) == list(mj.problems(Path()))
    widest = {n for some in RECORD["digits"]["families"].values() for n in some}
    for name, part in RECORD.items():
        own = {n for some in part["families"].values() for n in some}
        assert own <= widest
        assert {(r["method"]) for r in part["rows"] if not r["control"]} == own
        assert name in ("polynomial", "network") or len({r["method"] for r in part["rows"] if r["control"]}) == 4
    for name in ("digits", "pictures"):
        families = RECORD[name]["families"]
        assert {"gradient", "path", "backward", "CAM", "removal"} <= set(families)
        assert sum(map(len, families.values())) > 50


def judged(value: float, metric: str, method: str, **other: Any) -> dict[str, Any]:
    row = {"metric": metric, "method": method, "value": value, "low": value - 0.1, "high": value + 0.1, "n": 4}
    return row | {"undefined": 0, "direction": "higher is better", "control": False, "beats": {"Random": True}} | other


def part() -> dict[str, Any]:
    lower = {"direction": "lower is better"}
    rows = [judged(v, "up", m) for v, m in ((0.9, "A"), (0.5, "B"), (0.1, "C"))]
    rows += [judged(v, "down", m, **lower) for v, m in ((0.2, "A"), (0.3, "B"), (0.4, "C"))]
    rows += [judged(v, "against", m) for v, m in ((1.0, "A"), (2.0, "B"), (3.0, "C"))]
    rows[2] |= {"n": 0, "value": None, "undefined": 4}
    rows[1] |= {"beats": {"Random": False}, "undefined": 2}
    rows += [judged(0.0, m, "Random", control=True, beats={}) for m in ("up", "down", "against")]
    return {
        "title": "T",
        "told": "told",
        "rows": rows,
        "families": {"one": ["A", "B"], "two": ["C"]},
        "passes": {"A": [1, 1]},
        "dominated": {"B": ["A"]},
        "surely dominated": {},
        "ranks": {"up": {"W": 0.5}, "down": {"W": 1.0}, "against": {}},
        "failures": [("C", "a reason")],
    }


def test_metrics_are_compared_with_their_better_ends_first() -> None:
    between = mj.agreement(part())
    assert between["down"]["against"] == -1
    assert between["down"]["down"] == 1
    assert between["up"]["down"] is None  # of two methods any order agrees or not


def test_the_page_tells_stars_counts_and_reasons() -> None:
    text = mj.markdown({"t": part()})
    assert "| one | A | 1 + 1 | .900* [.800, 1.000] | .200* [.100, .300] |" in text
    assert "| .500 [.400, .600] (4) |" in text
    assert "| two | C | 0 + 0 | – |" in text
    assert "| *beat every control* | | 1 of 2 | 3 of 3 | 3 of 3 |" in text
    assert "- C: a reason" in text


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    mj.draw(part(), tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 5000


def test_a_problem_is_judged_and_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    p = ap.planted.linear(features=4, examples=8)
    room = who.Room(ap.Field(p.model), None, ap.baselines.Zero(), ap.groups.Elements(), 4, 8, convolutional=False)
    few = {"gradient": {"right": ap.GradientTimesInput(ap.baselines.Given(p.baseline)), "wrong": ap.External(_alike)}}
    monkeypatch.setattr(mj, "contenders", lambda r: few)
    metrics = {"n": ap.metrics.SensitivityN((0.5,), 8, fill=ap.fills.Baselines(ap.baselines.Given(p.baseline)))}
    problem = mj.Problem("t", "told", room, p.x, metrics, controls=mj.VECTOR)
    found = mj.judged("t", problem, tmp_path)
    values = {r["method"]: r["value"] for r in found["rows"]}
    assert values["right"] == pytest.approx(1)
    assert abs(values["Random"]) < 0.9
    again = mj.judged("t", problem, tmp_path)
    assert {**again, "seconds of this run": 0} == {**found, "seconds of this run": 0}


def _alike(x: torch.Tensor, target: object) -> torch.Tensor:
    return torch.rand(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)


def test_tables_below_a_problem_are_filled() -> None:
    page = "<!-- t -->\n| | down ↓ |\n|---|---|\n| A | |\n\nwords | of | mine\n| A | |\n"
    told = "<!-- t -->\n| | down ↓ |\n|---|---|\n| A | .200* [.100, .300] |\n\nwords | of | mine\n| A | |\n"
    assert mj.quoted(page, {"t": part()}) == told


def test_the_tables_of_the_page_are_those_of_the_record() -> None:
    text = (ROOT / "docs/methods-judged.md").read_text(encoding="utf-8")
    assert mj.quoted(text, RECORD) == text
    assert text.count("<!-- ") >= 4
    broken = text.replace("* [", " [", 1)
    assert mj.quoted(broken, RECORD) == text


def stars(problem: str, metric: str) -> set[str]:
    rows = [r for r in RECORD[problem]["rows"] if r["metric"] == metric and not r["control"] and r["n"]]
    return {r["method"] for r in rows if r["beats"] and all(r["beats"].values())}


def test_what_the_page_says_of_stars_holds_in_the_record() -> None:
    assert stars("digits", "noise") == {"GradCAMPlusPlus", "ScoreCAM"}
    assert not stars("digits", "moved input")
    assert len(stars("pictures", "insertion - deletion")) == 14
    kept = {"LRP, epsilon plus", "DeepTaylor", "ExcitationBackprop"}
    assert stars("pictures", "sensitivity-n") == kept | {"InformationBottleneck"}
    rows = {r["method"]: r["value"] for r in RECORD["pictures"]["rows"] if r["metric"] == "sensitivity-n" and r["n"]}
    assert max(rows, key=lambda name: rows[name]) == "InformationBottleneck"
    rules = {"RectGrad", "LRP, alpha 2 beta 1", "LRP, gamma and box"}
    assert stars("pictures", "mass on the object") == kept | rules
    assert stars("pictures", "infidelity, scaled") == {"Occlusion"}
    assert not stars("pictures", "points at the object") | stars("pictures", "box")
    asked = {r["method"] for r in RECORD["pictures_again"]["rows"] if not r["control"] and r["n"]}
    for metric in ("random parameters", "of magnitudes"):
        assert stars("pictures_again", metric) == asked
    assert asked - stars("pictures_again", "other class") == {"EigenCAM"}
    assert not stars("pictures_again", "moved input")
