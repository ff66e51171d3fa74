"""Rank statistics against hand values and SciPy."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor

import apportion as ap
from apportion.bulk.comparison import _gains, compare
from apportion.core.attribution import Cost
from apportion.core.errors import InputError
from apportion.metrics import Curve, Direction, Scores
from apportion.metrics.ranks import _holm, rank_methods
from apportion.metrics.scores import counts
from apportion.metrics.statistics import levels

stats = pytest.importorskip("scipy.stats")


def scores(name: str, values: list[float], direction: Direction = Direction.HIGHER, **more: Scores) -> Scores:
    none = torch.zeros(len(values), dtype=torch.long)
    return Scores(
        torch.tensor(values, dtype=torch.float64),
        {"type": "M"},
        direction,
        name,
        {"type": name},
        {},
        None,
        tuple(range(len(values))),
        0,
        Cost(none, none, none),
        controls=more,
    )


def of(table: dict[str, list[float]], direction: Direction = Direction.HIGHER) -> dict[str, Scores]:
    return {name: scores(name, values, direction) for name, values in table.items()}


TABLE = {
    "a": [5.0, 6.0, 7.0, 9.0, 4.0, 8.0, 5.5],
    "b": [4.0, 4.5, 5.8, 9.2, 2.0, 8.0, 3.1],
    "c": [1, 2, 3, 1, 2, 3, 1.0],
}


def test_wilcoxon_is_exact_by_enumeration_of_signs() -> None:
    """Of 6 differences without ties: the share of the 2⁶ signs whose rank sum is as extreme."""
    a, b = [5.0, 6.0, 7.0, 9.0, 4.0, 8.0], [4.0, 4.5, 5.8, 9.2, 2.0, 5.0]
    d = torch.tensor(a) - torch.tensor(b)
    rank = d.abs().argsort().argsort() + 1.0
    seen = float((rank * (d > 0)).sum())
    signs = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 6)
    sums = signs @ rank
    extreme = float((((sums - 10.5).abs() >= abs(seen - 10.5)).double()).mean())
    found = rank_methods(of({"a": a, "b": b}))
    assert float(found.p[0, 1]) == pytest.approx(extreme, abs=1e-12)
    assert float(found.holm[0, 1]) == float(found.p[0, 1])


@pytest.mark.parametrize("count", [3, 5, 6])
def test_few_differences_among_many_zeros_are_tested_exactly(count: int) -> None:
    """All of one sign: 2 / 2ⁿ, which the normal limit has too low, .043 for .0625 of five."""
    a = [k + 1.0 for k in range(count)] + [0.0] * (20 - count)
    assert float(rank_methods(of({"a": a, "b": [0.0] * 20})).p[0, 1]) == 2.0 ** (1 - count)


def test_a_level_is_no_wider_than_rounding_however_near_neighbors_are() -> None:
    def slowly(row: list[float], rounding: float) -> list[int]:
        out, first, number = [0] * len(row), None, -1
        for k in sorted(range(len(row)), key=lambda k: row[k]):
            if first is None or not row[k] - first <= rounding * max(abs(first), abs(row[k])):
                first, number = row[k], number + 1
            out[k] = number
        return out

    near = 1 - 1e-4 * torch.rand(3, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = torch.cat([near, -near, torch.zeros(3, 2, dtype=torch.float64)], 1)
    for rounding in (0.0, 8e-6, 1e-2):
        assert levels(rows, rounding).tolist() == [slowly(row, rounding) for row in rows.tolist()]
    assert int(levels(rows, 8e-6).max()) > 20


def test_tables_agree_with_scipy_and_by_hand() -> None:
    found = rank_methods(of(TABLE))
    for i, one in enumerate(TABLE.values()):
        for j, other in enumerate(TABLE.values()):
            if i == j:
                assert math.isnan(found.p[i, j])
                continue
            d = [x - y for x, y in zip(one, other, strict=True)]
            assert float(found.p[i, j]) == pytest.approx(stats.wilcoxon(d).pvalue)
            assert float(found.difference[i, j]) == pytest.approx(sum(d) / 7)
            share = sum((v > 0) + (v == 0) / 2 for v in d) / 7
            assert float(found.cles[i, j]) == pytest.approx(share)
            assert float(found.low[i, j]) <= float(found.difference[i, j]) <= float(found.high[i, j])
    chi, p = stats.friedmanchisquare(*TABLE.values())
    assert found.kendall_w == pytest.approx(chi / (7 * 2))  # W = χ² / (B (M - 1)), also with ties
    assert found.kendall_p == pytest.approx(p)
    torch.testing.assert_close(found.mean_rank, torch.tensor([8.5, 13.0, 20.5], dtype=torch.float64) / 7)


def pairwise(one: Scores, other: Scores) -> tuple[list[float], float, float]:
    """Compare two methods alone: the difference with its interval, p and how often the first is better."""
    both = [k for k in range(len(one)) if not math.isnan(one.values[k] - other.values[k])]
    if not both:
        return [math.nan, -math.inf, math.inf], math.nan, math.nan
    times = torch.cat([torch.ones(len(both), 1), counts([one.ids[k] for k in both], one.seed)], 1).double()

    d = (one.values - other.values)[both]
    drawn = (d @ times) / times.sum(0)
    ends = torch.nanquantile(drawn[1:], drawn.new_tensor([0.025, 0.975])).tolist()
    better = -d if one.direction is Direction.LOWER else d
    p = float(stats.wilcoxon(d[d != 0].numpy()).pvalue) if bool((d != 0).any()) else 1.0
    interval = ends if len(both) > 1 else [-math.inf, math.inf]
    return [float(drawn[0]), *interval], p, float(((better > 0).double() + (better == 0) / 2).mean())


@pytest.mark.parametrize("examples", [1, 9, 18, 60])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_all_pairs_at_once_are_the_pairs_one_by_one(examples: int) -> None:
    """Ties, differences of 0, examples without a score, methods that are equal, and one without any score."""
    some = torch.Generator().manual_seed(examples)
    table = torch.rand(6, examples, generator=some, dtype=torch.float64)
    table[1] = (table[1] * 3).round() / 3  # tied differences
    table[2] = (table[0] * 4).round() / 4
    table[3] = table[2]
    table[3, ::4] += 0.25
    table[4, torch.rand(examples, generator=some) < 0.3] = math.nan
    table[5] = math.nan
    rows = {f"m{k}": row.tolist() for k, row in enumerate(table)} | {"equal": table[2].tolist()}
    for direction in (Direction.HIGHER, Direction.LOWER):
        held = of(rows, direction)
        found, better = rank_methods(held), _gains(list(held.values()))
        for (i, one), (j, other) in permutations(enumerate(held.values()), 2):
            by, p, share = pairwise(one, other)
            got = [float(t[i, j]) for t in (found.difference, found.low, found.high)]
            assert got == pytest.approx(by, abs=1e-12, nan_ok=True)
            gain = [-by[0], -by[2], -by[1]] if direction is Direction.LOWER else by
            assert better[:, i, j].tolist() == pytest.approx(gain, abs=1e-12, nan_ok=True)
            assert float(found.p[i, j]) == pytest.approx(p, abs=1e-12, nan_ok=True)
            assert float(found.cles[i, j]) == pytest.approx(share, nan_ok=True)
        same = [float(t[2, 6]) for t in (found.difference, found.p, found.cles)]
        assert same == [0, 1, 0.5]


@pytest.mark.parametrize("statistic", ["mean", "median", "median curve"])
def test_differences_are_those_of_repeated_examples(statistic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apportion.metrics.scores._BLOCK", 3)  # blocks change nothing
    x = torch.linspace(0, 1, 4, dtype=torch.float64)
    y = torch.rand(3, 7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y[1, 2] = math.nan
    areas = torch.trapezoid(y, x, dim=2).tolist()
    held = [
        replace(scores(f"m{k}", a), curves={"c": Curve(x, c, "x", "y")}, statistic=statistic)
        for k, (a, c) in enumerate(zip(areas, y, strict=True))
    ]
    known = [0, 1, 3, 4, 5, 6]
    times = torch.cat([torch.ones(6, 1), counts(known)], 1).int()
    found = []
    for column in times.T:
        repeated = [k for k, n in zip(known, column.tolist(), strict=True) for _ in range(n)]
        if repeated and statistic == "median curve":
            found.append([np.trapezoid(np.median(y[m, repeated].numpy(), 0), x.numpy()) for m in (0, 1)])
        elif repeated:
            how = np.mean if statistic == "mean" else np.median
            found.append([how(held[m].values[repeated].numpy()) for m in (0, 1)])
    both = np.array(found)
    for got, drawn in ((held[0].difference(held[1]), both[:, 0] - both[:, 1]), (held[1].center(), both[:, 1])):
        assert got == pytest.approx([drawn[0], *np.quantile(drawn[1:], [0.025, 0.975])], abs=1e-12)


def test_agreement_of_examples_at_its_ends() -> None:
    same = {name: [float(i)] * 6 for i, name in enumerate("abc")}
    assert rank_methods(of(same)).kendall_w == 1
    orders = list(permutations([1.0, 2.0, 3.0]))  # every order once
    against = {name: [o[i] for o in orders] for i, name in enumerate("abc")}
    assert rank_methods(of(against)).kendall_w == pytest.approx(0)
    tied = rank_methods(of({name: [1.0] * 6 for name in "abc"}))
    assert math.isnan(tied.kendall_w)
    assert float(tied.p[0, 1]) == 1
    assert float(tied.cles[0, 1]) == 0.5


def test_direction_turns_ranks_and_effects_but_not_differences() -> None:
    up, down = rank_methods(of(TABLE)), rank_methods(of(TABLE, Direction.LOWER))
    torch.testing.assert_close(down.mean_rank, 4 - up.mean_rank)
    torch.testing.assert_close(down.cles, up.cles.T, equal_nan=True)
    assert torch.equal(down.difference.nan_to_num(0), up.difference.nan_to_num(0))


def test_holm_steps_down() -> None:
    """0.01 times 4, then 0.03 times 3, then no less than before; a value that is not known counts for nothing."""
    assert _holm([0.04, 0.01, 0.03, math.nan, 0.5])[:3] == pytest.approx([0.09, 0.04, 0.09])
    assert _holm([0.9, 0.8]) == [1.0, 1.0]


def test_examples_without_a_score_take_no_part() -> None:
    table = {k: [*v, {"a": 9.0, "b": math.nan, "c": 1.0}[k]] for k, v in TABLE.items()}
    found, less = rank_methods(of(table)), rank_methods(of(TABLE))
    assert found.complete == 7
    torch.testing.assert_close(found.mean_rank, less.mean_rank)
    assert float(found.p[0, 1]) == float(less.p[0, 1])
    assert float(found.p[0, 2]) != float(less.p[0, 2])  # the pair has one example more
    assert any("7 example(s) on which every method" in w for w in found.warnings)


def test_a_method_without_any_score_takes_no_part() -> None:
    alone, beside = (rank_methods(of({**TABLE, **more})) for more in ({}, {"z": [math.nan] * len(TABLE["a"])}))
    assert beside.mean_rank.tolist()[:-1] == alone.mean_rank.tolist()
    assert math.isnan(beside.mean_rank[-1])
    assert (beside.kendall_w, beside.kendall_p) == (alone.kendall_w, alone.kendall_p)
    assert "z has no score, and takes no part" in beside.warnings
    none = rank_methods(of({"y": [math.nan] * 3, "z": [math.nan] * 3}))
    assert none.mean_rank.isnan().all()


def test_what_does_not_beat_its_control_is_warned_of() -> None:
    control = scores("Random", [5.0, 6.0, 7.0, 9.0, 4.0, 8.0, 5.6])
    held = {
        k: scores(k, v, Random=control) for k, v in {"worse": TABLE["c"], "better": [v + 9 for v in TABLE["a"]]}.items()
    }
    found = rank_methods(held)
    assert [w for w in found.warnings if "worse does not beat Random" in w]
    assert not [w for w in found.warnings if "better does not" in w]
    assert "warning: worse" in repr(found)
    few = rank_methods(of({k: v[:5] for k, v in TABLE.items()}))
    assert any("no difference can be significant" in w for w in few.warnings)
    assert float(few.p[0, 2]) > 0.05


def test_what_only_rounding_tells_apart_is_equal_everywhere() -> None:
    """A similarity of 1, short of it by rounding on each example, against controls at 1; one that is really less."""
    units = torch.rand(12, generator=torch.Generator().manual_seed(0)).double() * 1e-6
    control = scores("Random", [1.0] * 12, Direction.LOWER)
    table = {"blind": (1 - units).tolist(), "also": (1 - units / 3).tolist(), "seeing": (0.99 - 9e3 * units).tolist()}
    for rounding, told in ((7.6e-6, False), (0.0, True)):
        held = {k: replace(scores(k, v, Direction.LOWER, Random=control), rounding=rounding) for k, v in table.items()}
        found = rank_methods(held)
        assert held["blind"].beats("Random") is told
        assert held["seeing"].beats("Random") is True
        assert bool(found.p[0, 1] < 0.05) is told
        assert bool(found.mean_rank[0] == found.mean_rank[1]) is not told
        met = compare({k: {"M": s} for k, s in held.items()}, {"all": ["M"]})
        assert ("blind" in met.dominated.get("also", ())) is told
        assert met.dominated["blind"] == ("seeing",)
    pair = rank_methods({k: s for k, s in held.items() if k != "seeing"} | {"Random": control})
    assert not math.isnan(pair.kendall_w)
    level = rank_methods({k: replace(s, rounding=7.6e-6) for k, s in held.items() if k != "seeing"})
    assert math.isnan(level.kendall_w)
    assert [float(t[0, 1]) for t in (level.difference, level.low, level.high, level.p, level.cles)] == [0, 0, 0, 1, 0.5]


def test_scores_know_the_rounding_of_their_numbers() -> None:
    x = torch.rand(3, 5, generator=torch.Generator().manual_seed(0))
    field = ap.Field(lambda x: (x**2).sum(1))
    one, double = (ap.metrics.Sparseness()(field, v, ap.Gradient()) for v in (x, x.double()))
    assert one.rounding == 64 * 2.0**-23
    assert double.rounding == 64 * 2.0**-52
    assert Scores.join([one, replace(one, rounding=0.0)]).rounding == one.rounding


def test_other_examples_are_refused() -> None:
    with pytest.raises(InputError, match="1 method"):
        rank_methods(of({"a": TABLE["a"]}))
    with pytest.raises(InputError, match="same metric"):
        rank_methods(of({"a": TABLE["a"], "b": TABLE["b"][:5]}))


def test_an_evaluation_ranks_its_methods() -> None:
    x: Tensor = torch.rand(8, 5, generator=torch.Generator().manual_seed(0))
    field = ap.Field(lambda x: (x**2).sum(1))
    found = ap.evaluate(["gradient", "gradient_times_input"], field, x, ["sparseness"], quiet=True)
    ranks = found.ranks("sparseness")
    assert ranks.methods == ("gradient", "gradient_times_input")
    assert float(ranks.cles[1, 0]) == 1.0  # squares are less even than what is squared
    assert "sparseness" in repr(ranks)


def test_every_place_sums_up_as_the_source_does() -> None:
    """Two curves in 20 are 0, the others a little above the control's: the means say less, the medians more."""
    pytest.importorskip("matplotlib")
    x = torch.linspace(0, 1, 3, dtype=torch.float64)
    low = torch.rand(20, 3, generator=torch.Generator().manual_seed(0)).double() / 100 + 0.5
    high = low + 0.02
    high[:2] = 0

    def curved(name: str, y: Tensor, statistic: str) -> Scores:
        curves = {"pic": Curve(x, y, "x", "y")}
        area = torch.trapezoid(y, x, dim=1).tolist()
        return replace(scores(name, area), curves=curves, statistic=statistic)

    for statistic in ("mean", "median", "median curve"):
        control = curved("Random", low, statistic)
        one = replace(curved("one", high, statistic), controls={"Random": control})
        better = statistic != "mean"
        assert one.beats("Random") is better
        assert (one.center()[0] > control.center()[0]) is better
        by, least, most = one.difference(control)
        assert by == pytest.approx(one.center()[0] - control.center()[0])
        assert least < by < most
        assert bool(rank_methods({"one": one, "Random": control}).difference[0, 1] > 0) is better
        assert f"{one.center()[0]:.4g} [" in repr(one)
        assert ("not beaten" in repr(one)) is not better
        figure = one.show()
        assert f"{one.center()[0]:.4g} [" in figure.get_suptitle()
        drawn = torch.as_tensor(figure.axes[0].lines[-1].get_ydata())
        wanted = high.mean(0) if statistic != "median curve" else (high.sort(0).values[9] + high.sort(0).values[10]) / 2
        torch.testing.assert_close(drawn, wanted)
        met = compare({"one": {"M": one}, "Random": {"M": control}}, {"all": ["M"]})
        assert met.standing("all")[0].tolist() == pytest.approx([one.center()[0], control.center()[0]])
        assert ("Random" in met.dominated) is better
        failed = replace(scores("failed", [math.nan] * 20), statistic=statistic)
        assert all(math.isnan(v) for v in (failed.center()[0], failed.difference(one)[0], failed.replicates()[1]))


def test_infinite_scores_are_infinite_in_sums_and_nothing_else() -> None:
    inf = math.inf
    a, b = scores("a", [0.1, inf, 0.3, 0.2, 0.4, 0.1]), scores("b", [0.2, 0.1, 0.9, 0.3, 0.1, 0.2])
    for s, sign in ((a, 1), (replace(a, values=-a.values), -1)):
        low, high = (-inf, sorted(s.values.tolist())[-1]) if sign < 0 else (0.1, inf)
        assert s.center()[0] == s.summary().mean == sign * inf
        for told in (s.center()[1:], s.summary().interval):
            assert told[sign > 0] == sign * inf
            assert low <= told[0] <= told[1] <= high
    assert b.difference(a)[:2] == (-inf, -inf)
    assert -0.2 < b.difference(a)[2] < 0.5  # of replicates without the infinite one
    assert math.isnan(a.difference(scores("c", [inf] * 6))[0])
    assert (a.summary() + b.summary()).mean == inf
    kept = scores("a", [0.1, inf, 0.3, 0.2, 0.4, 0.1]).replicates(a.values.isfinite())
    assert float(kept[0]) == pytest.approx(0.22)
    assert bool(kept[~kept.isnan()].isfinite().all())


@pytest.mark.parametrize("name", ["completeness", "local_accuracy", "infidelity"])
def test_exact_maps_of_a_linear_model_are_not_ranked_by_their_rounding(name: str) -> None:
    """Three sums of the same terms; what is wrong by a hundredth is not taken for rounding."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3, bias=False), torch.nn.Flatten(), torch.nn.Linear(216, 1))
    x = torch.rand(8, 3, 8, 8)
    exact = ap.explain(net.eval(), x, ap.GradientTimesInput()).values
    maps = {"a": exact, "b": exact * (1 + 1e-7 * torch.rand(exact.shape)), "wrong": exact * 1.01}
    found = ap.evaluate(maps, ap.Field(net), x, [name], quiet=True, controls=())
    ranks = found.ranks(name)
    assert [float(t[0, 1]) for t in (ranks.difference, ranks.low, ranks.high, ranks.p)] == [0, 0, 0, 1]
    assert float(ranks.cles[0, 2]) == 1
    assert bool((found.scores["wrong"][name].values > 0).all())


def test_rounding_goes_by_the_size_of_scores_though_their_mean_is_near_zero() -> None:
    values = torch.tensor([1.0, -1.0, 2.0, -2.0, 3.0, -3.0], dtype=torch.float64)
    base, near, apart = (replace(scores("a", (values + by).tolist()), rounding=1e-6) for by in (0.0, 1e-7, 1e-3))
    assert near.difference(base) == (0, 0, 0)
    assert apart.difference(base)[0] == pytest.approx(1e-3)
