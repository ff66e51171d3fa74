"""The sheet of removal, surrogates and subsets, on a small network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks import removal_sheet as rs

import apportion as ap
from apportion.adapters.image import CenterCrop
from apportion.adapters.zoo import PictureModel
from apportion.core.field import Normalize


def scene() -> rs.Scene:
    """A network that counts the red of the left half, and a picture that is redder there."""
    linear = torch.nn.Linear(3 * 32 * 32, 2)
    net = torch.nn.Sequential(torch.nn.Flatten(), linear).eval()
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[:, :16] = True
    weight = torch.zeros(2, 3, 32, 32)
    weight[1, 0] = mask / 100
    with torch.no_grad():
        linear.weight.copy_(weight.flatten(1))
        linear.bias.copy_(torch.tensor([0.0, 1.0]))
    model = PictureModel("half", net, CenterCrop(32), Normalize((0.0,) * 3, (1.0,) * 3), ("other", "left"))
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return rs.Scene(model, "noise", x, x.roll(8, 2), mask)


def listed() -> dict[str, rs.Entry]:
    """Two methods that are drawn and one that is not."""
    squares = ap.groups.Squares(8)
    made = {
        "Shapley, quarter": ap.Shapley(squares, budget=60),
        "Shapley": ap.Shapley(squares, budget=240),
        "LIME": ap.LIME(groups=squares, samples=100),
        "RISE": ap.RISE(budget=64),
    }
    return {n: rs.Entry(lambda model, others, m=m: m, n, drawn=n != "Shapley, quarter") for n, m in made.items()}


def test_what_is_kept_is_not_run_again_and_the_whole_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, methods = scene(), listed()
    records = rs.explained(one, methods, tmp_path)
    assert records["Shapley"]["on the object"] > 0.999  # all that is red there, and nothing else
    assert records["Shapley"]["gap"] < 1e-4
    assert records["LIME"]["held_out_r2"] > 0.9
    assert records["RISE"]["precision"] > 0
    monkeypatch.setattr(rs, "run", lambda *_: pytest.fail("it was kept"))
    more = methods | {"Banzhaf": methods["LIME"]}
    again = rs.explained(one, more, tmp_path, as_kept=True)
    assert again.keys() == methods.keys()
    assert torch.equal(again["Shapley"]["map"], records["Shapley"]["map"])
    found = rs.compared(one, again, methods)
    assert found["area"] == 0.5
    assert "Shapley, quarter" not in found["agreement"]
    assert found["agreement"]["Shapley"]["LIME"] > 0.7  # half of the squares are 0, in any order to LIME
    wrong = {"right": again["Shapley"], "wrong": {"map": -again["Shapley"]["map"]}}
    assert rs.agreement(wrong)["right"]["wrong"] == pytest.approx(-1)
    other = {**found, "methods": {n: r for n, r in found["methods"].items() if n != "LIME"}}
    other["agreement"] = {a: dict.fromkeys(("Shapley", "RISE"), 1.0) for a in ("Shapley", "RISE")}
    assert "| not run |" in rs.markdown({"pictures": {"noise": found, "less": other}})
    written = rs.markdown({"pictures": {"noise": found}})
    assert "| area of the object | | | | | | | | 0.50 | |" in written
    widths = {line.count("|") for line in written.splitlines() if line.startswith(("| Shapley | Shapley", "| method"))}
    assert len(widths) == 1
    drawn = rs.sheet(one, {n: r for n, r in again.items() if r["drawn"]}, "noise")
    assert np.asarray(drawn).std() > 10


def test_another_setting_is_run_anew(tmp_path: Path) -> None:
    one, entry = scene(), listed()["Shapley"]
    rs.explained(one, {"Shapley": entry}, tmp_path)
    other = rs.Entry(lambda model, others: ap.Occlusion(ap.groups.Squares(8)), "another")
    assert rs.explained(one, {"Shapley": other}, tmp_path)["Shapley"]["forward"] < 20


def test_every_method_of_the_families_is_there_or_left_out_with_a_reason() -> None:
    from apportion.core.registry import method, methods

    named = " ".join([*rs.entries(), *rs.LEFT_OUT]).replace(",", "").split()
    for name in methods():
        family = method(name).__module__.split(".")[2]
        if family in ("removal", "surrogate", "subset"):
            assert method(name).__name__ in named, name
