"""`apportion evaluate` and `apportion metrics`, in this process on a small model and pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import apportion as ap

pytest.importorskip("cyclopts")
pytest.importorskip("PIL")
pytest.importorskip("matplotlib")

Call = Callable[..., tuple[int, str, str]]
OWN = ("one.png", "two.png", "--model", "stranger:make", "--size", 16, "--mean", 0.5)
SOME = ("--method", "gradient", "--method", "grad_cam", "--metric", "sparseness,deletion_auc")


@pytest.mark.usefixtures("folder")
def test_evaluate_says_the_passes_prints_the_table_and_writes_it(call: Call) -> None:
    code, out, err = call("evaluate", *OWN, *SOME, "--out", "new/out")
    assert code == 0, err
    before, table = out.split("\n\n", 1)
    assert "passes a picture, 2 picture(s): about" in before
    for metric in ("sparseness", "deletion_auc"):
        for method in ("gradient", "grad_cam", "random", "edges"):
            assert any(line.split()[:2] == [metric, method] for line in table.splitlines())
    found = ap.Evaluation.load("new/out/evaluation.json")
    assert found.methods == ("gradient", "grad_cam")
    assert found.controls == ("random", "edges")
    assert found.ids == ("one.png", "two.png")
    assert found.scores["grad_cam"]["sparseness"].values.isfinite().all()  # enlarged to the picture
    assert Path("new/out/evaluation.png").read_bytes()[1:4] == b"PNG"
    assert err.splitlines()[-1].startswith("2 picture(s): 2 method(s), 2 metric(s)")


@pytest.mark.usefixtures("folder")
def test_the_same_command_goes_on_and_another_is_an_error(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    own = (*OWN, "--method", "gradient", "--metric", "sparseness", "--quiet")
    assert call("evaluate", *own, "--out", "a") == (0, "", "")
    files = {p.name: p.read_bytes() for p in Path("a/finished").iterdir()}
    assert len(files) == 1 + 2 * 3  # settings; two pictures; a method and two controls
    with monkeypatch.context() as m:
        m.setattr(ap.Gradient, "explain", None)  # not asked again
        assert call("evaluate", *own, "--out", "a")[0] == 0
    assert {p.name: p.read_bytes() for p in Path("a/finished").iterdir()} == files
    code, _, err = call("evaluate", *own, "--out", "a", "--seed", 1)
    assert code == 2
    assert "seed was 0 and is 1" in err


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("--metric", "sparsenes"), "'sparseness'"),
        (("--metric", "agreement"), "use ap.evaluate"),
        (("--metric", "model_contrast"), "the object's region"),
        (("--metric", "label_randomization"), "without train"),
        (("--metric", "pointing_game"), "no object is drawn"),
        (("--method", "gradien"), "'gradient'"),
        (("--control", "rando"), "'random'"),
        (("--nonsense",), "apportion evaluate --help"),
    ],
)
def test_mistakes_take_three_lines(call: Call, given: tuple[str, ...], told: str) -> None:
    code, out, err = call("evaluate", *OWN, *given, "--quiet")
    assert (code, out, len(err.splitlines())) == (2, "", 3)
    assert told in err
    assert not Path("evaluation").exists()


@pytest.mark.usefixtures("folder")
def test_a_method_that_does_not_apply_is_told(call: Call) -> None:
    own = ("one.png", "--model", "stranger:halves", "--size", 16, "--metric", "sparseness")
    code, out, _ = call("evaluate", *own, "--method", "gradient", "--method", "grad_cam")
    assert code == 1
    assert "grad_cam by sparseness: undefined for 1 of 1 example(s)" in out
    assert ap.Evaluation.load("evaluation/evaluation.json").scores["gradient"]["sparseness"].values.isfinite().all()


def test_metrics_are_listed_and_shown(call: Call) -> None:
    code, out, _ = call("metrics")
    assert code == 0
    for name, card in ap.metrics.names().items():
        assert any(line.startswith(f"{name} ") and card.title in line for line in out.splitlines())
    code, out, _ = call("metrics", "Sparseness")
    assert code == 0
    for text in (*ap.metrics.metric("sparseness").card.cautions, "0 to 1", "higher is better"):
        assert text in out
    assert call("metrics", "nothing")[0] == 2
