"""Pictures of scores: what is drawn is what was found."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

import apportion as ap
from apportion.bulk.comparison import compare
from apportion.core.attribution import Cost
from apportion.core.errors import ConfigError, InputError
from apportion.metrics import Curve, Direction, Scores

pytest.importorskip("matplotlib")


def of(name: str, values: list[float], metric: str = "M", direction: Direction = Direction.HIGHER) -> Scores:
    none = torch.zeros(len(values), dtype=torch.long)
    held = torch.tensor(values, dtype=torch.float64)
    ids = tuple(range(len(values)))
    return Scores(held, {"type": metric}, direction, name, {}, {}, None, ids, 0, Cost(none, none, none))


def curved(name: str, y: torch.Tensor, x: torch.Tensor) -> Scores:
    return replace(of(name, y.mean(1).tolist()), curves={"c": Curve(x, y, "share removed", "score")})


def test_the_line_is_the_mean_and_the_band_lies_around_it() -> None:
    y = torch.rand(9, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y[2] = math.nan
    one = curved("one", y, torch.arange(5.0))
    figure = replace(one, controls={"Random": curved("Random", 1 - y, torch.arange(5.0))}).show()
    panel = figure.axes[0]
    lines = {line.get_label(): line for line in panel.lines}
    assert set(lines) == {"one", "Random"}
    torch.testing.assert_close(torch.as_tensor(lines["one"].get_ydata()), y.nanmean(0))
    torch.testing.assert_close(torch.as_tensor(lines["Random"].get_ydata()), 1 - y.nanmean(0))
    band: Any = panel.collections[1].get_paths()[0].vertices
    for k, mean in enumerate(y.nanmean(0).tolist()):
        ends = band[band[:, 0] == k, 1]
        assert ends.min() < mean < ends.max()
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("share removed", "score")


def test_curves_of_the_same_quantities_share_a_panel() -> None:
    """As those of retraining do: the method's own first, rankings that know nothing by their names."""
    y, x = torch.rand(9, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64), torch.arange(5.0)
    own = curved("Gradient", y, x).curves["c"]
    others = {"random": replace(own, y=y / 2), "time": Curve(x, y, "share removed", "seconds")}
    figure = replace(curved("Gradient", y, x), curves={"retrained": own, **others}).show()
    first, second = figure.axes
    lines = {line.get_label(): torch.as_tensor(line.get_ydata()) for line in first.lines}
    assert list(lines) == ["random", "Gradient"]
    torch.testing.assert_close(lines["random"], y.mean(0) / 2)
    torch.testing.assert_close(lines["Gradient"], y.mean(0))
    assert second.get_ylabel() == "seconds"
    assert len({line.get_color() for line in first.lines}) == 2


def test_curves_with_positions_of_their_own_meet_on_a_common_axis() -> None:
    x = torch.tensor([[0.0, 1.0, 2.0, math.nan], [0.0, 0.5, 1.0, 2.0]])
    figure = curved("one", 3 * x.double(), x).show()
    line = figure.axes[0].lines[0]
    torch.testing.assert_close(torch.as_tensor(line.get_ydata()), 3 * torch.as_tensor(line.get_xdata()))
    assert float(line.get_xdata()[-1]) == 2


def test_scores_without_curves_are_dots() -> None:
    one = of("one", [1.0, 2.0, math.nan, 4.0])
    figure = replace(one, controls={"Random": of("Random", [0.0, 1.0, 2.0, 3.0])}).show()
    panel = figure.axes[0]
    assert [t.get_text() for t in panel.get_yticklabels()] == ["one", "Random"]
    assert list(panel.lines[0].get_xdata()) == [1, 2, 4]


def test_titles_fit_their_picture() -> None:
    figure = of("one", [1.0, 2.0], "AMetricWithQuiteALongNameAndNoCurves").show()
    figure.draw_without_rendering()
    title: Any = figure._suptitle
    box = title.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width


LONG = "IntegratedGradients(quadrature=Gauss, baseline.fill=Uniform, points={}, reduce=Mean)"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["m{}", LONG])
@pytest.mark.parametrize(("methods", "metrics"), [(1, 1), (7, 5)])
def test_names_of_any_length_stay_inside_their_picture(name: str, methods: int, metrics: int) -> None:
    found = {}
    for i in range(methods):
        by = {}
        for m in range(metrics):
            control = of(name.format("none"), [0.0, 1.0, 2.0])
            by[f"metric {m}"] = replace(of(name.format(i), [float(i), i * m, 3.0]), controls={control.of: control})
        found[name.format(i)] = by
    held = ap.Evaluation(found, {}, {})
    one = held.scores[name.format(0)]["metric 0"]
    y = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    drawn = [held.show(), one.show(), replace(one, curves={"c": Curve(torch.arange(4.0), y, "k", "score")}).show()]
    if metrics > 1:
        drawn.append(held.compare({"one": ["metric 0"], "other": ["metric 1", "metric 2"]}).show())
    for figure in drawn:
        figure.canvas.draw()
        wide, high = figure.get_size_inches()
        taken: Any = figure.get_tightbbox()
        assert min(taken.x0, taken.y0, wide - taken.x1, high - taken.y1) >= 0
        assert all(p.get_position().width * wide > 1.2 for p in figure.axes if p.axison)


def test_numbers_of_dots_that_are_close_stand_together() -> None:
    found = {str(i): {m: of(str(i), [v, v + 1e-3], m) for m in "ab"} for i, v in enumerate([0.0, 0.01, 5.0])}
    panel = compare(found, {"a": ["a"], "b": ["b"]}).show().axes[0]
    assert [t.get_text() for t in panel.texts] == ["1, 2", "3"]


def judged() -> ap.Evaluation:
    x = torch.rand(8, 5, generator=torch.Generator().manual_seed(0))
    field = ap.Field(lambda x: (x**2).sum(1))
    return ap.evaluate(
        ["gradient", "gradient_times_input"], field, x, ["sparseness", "complexity", "deletion_auc"], quiet=True
    )


def test_an_evaluation_is_drawn_a_panel_a_metric() -> None:
    found = judged()
    figure = found.show()
    titles = [a.get_title() for a in figure.axes]
    assert titles == ["sparseness", "complexity", "deletion_auc"]
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == list(found.methods)
    rows = {(r["metric"], r["method"]): r for r in found.summary()}
    dots = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    for dot, method in zip(dots, found.methods, strict=True):
        row = rows["sparseness", method]
        assert dot.get_xdata()[0] == row["value"]
        assert (dot.get_markerfacecolor() == "white") == (not all(row["beats"].values()))
    assert [a.get_title() for a in found.show(["complexity"]).axes] == ["complexity"]
    with pytest.raises(InputError, match="sparsenes"):
        found.show(["sparsenes"])
    with pytest.raises(InputError, match="no metric"):
        found.show([])
    assert len(found.show("sparseness").axes) == 1
    compared = found.compare()
    assert compared.groups == {"faithfulness": ("deletion_auc",), "complexity": ("sparseness", "complexity")}
    assert len(compared.show().axes) == 1


LOW = Direction.LOWER
TABLE = {
    "best": {"f": [3.0, 4.0, 5.0], "c": [1.0, 1.0, 2.0]},
    "worst": {"f": [1.0, 2.0, 3.0], "c": [2.0, 3.0, 2.5]},
    "mixed": {"f": [9.0, 8.0, 9.0], "c": [7.0, 7.0, 9.0]},
}


def table() -> dict[str, dict[str, Scores]]:
    return {name: {"f": of(name, row["f"], "F"), "c": of(name, row["c"], "C", LOW)} for name, row in TABLE.items()}


def test_dominated_is_what_another_beats_in_every_group() -> None:
    found = compare(table(), {"faithfulness": ["f"], "complexity": ["c"]})
    assert found.dominated == {"worst": ("best",)}
    assert found.surely == {"worst": ("best",)}
    assert "worst: dominated by best; beyond chance by best" in repr(found)
    assert "mixed: not dominated" in repr(found)
    alone = compare(table(), {"faithfulness": ["f"]})
    assert set(alone.dominated) == {"best", "worst"}  # where one group is all that counts
    stand = found.standing("faithfulness")
    torch.testing.assert_close(stand[0], torch.tensor([4.0, 2.0, 26 / 3], dtype=torch.float64))
    together = compare(table(), {"all": ["f", "c"], "again": ["c"]})
    torch.testing.assert_close(together.standing("all")[0], torch.tensor([1.5, 2.5, 2.0], dtype=torch.float64))


def test_an_equal_method_is_not_dominated_and_an_undefined_one_neither() -> None:
    held = table()
    held["same"] = {k: replace(s, of="same") for k, s in held["best"].items()}
    held["none"] = {k: replace(s, of="none", values=s.values * math.nan) for k, s in held["worst"].items()}
    found = compare(held, {"faithfulness": ["f"], "complexity": ["c"]})
    assert found.dominated == {"worst": ("best", "same")}
    for row in held.values():
        row["u"] = replace(row["f"], values=row["f"].values * math.nan)
    blind = compare(held, {"faithfulness": ["f", "u"], "complexity": ["c"]})
    assert blind.dominated == found.dominated
    ranks = compare(held, {"both": ["f", "c"], "complexity": ["c"]}).standing("both")[0]
    torch.testing.assert_close(ranks[:4], torch.tensor([2.0, 3.5, 2.5, 2.0], dtype=torch.float64))
    assert bool(ranks[4].isnan())  # undefined is no rank, and no better one
    assert blind.left_out == ("u",)


def test_no_axis_adds_groups_up() -> None:
    found = compare(table(), {"faithfulness": ["f"], "complexity": ["c"], "robustness": ["c"]})
    figure = found.show()
    assert len(figure.axes) == 3
    assert figure.axes[0].get_xlabel() == "faithfulness: f"
    assert figure.axes[0].yaxis_inverted()  # less is better, and better is up
    assert not figure.axes[0].xaxis_inverted()
    dots = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    hollow = [dot for dot in dots if dot.get_markerfacecolor() == "white"]
    assert [line.get_label() for line in hollow] == ["worst"]
    told = [t.get_text() for t in figure.legends[0].get_texts()]
    assert told == ["1 best", "2 worst (dominated)", "3 mixed"]
    with pytest.raises(InputError, match="one group"):
        compare(table(), {"faithfulness": ["f"]}).show()


def test_metrics_of_the_library_have_a_group_unless_they_compare_methods() -> None:
    held = {}
    for name in ap.metrics.names():
        held[name] = of("m", [1.0, 2.0], ap.metrics.metric(name).__name__)
    found = compare({"m": held})
    assert {"agreement"} >= set(found.left_out)
    assert "max_sensitivity" in found.groups["robustness"]
    assert "sensitivity" in found.groups["axioms"]
    some = compare({"m": held}, {g: found.groups[g] for g in ("complexity", "localization", "axioms")})
    assert len(some.show().axes) == 1
    assert len(some.show(["axioms", "complexity", "localization"]).axes) == 3
    with pytest.raises(InputError, match="faithfulness"):
        some.show(["faithfulness", "axioms"])


def test_groups_name_metrics_that_are_there_and_have_a_better_end() -> None:
    with pytest.raises(ConfigError, match="'g' in a group"):
        compare(table(), {"faithfulness": ["g"]})
    neither = {n: {"f": replace(h["f"], direction=Direction.NEITHER)} for n, h in table().items()}
    with pytest.raises(ConfigError, match="a better end"):
        compare(neither, {"faithfulness": ["f"]})
    with pytest.raises(ConfigError, match="groups="):
        compare(table())  # of no folder of ours
