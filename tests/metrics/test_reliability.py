"""Reliability of metrics: published values, slow twins, and metrics that are and are not reliable by construction."""

from __future__ import annotations

import inspect
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import apportion as ap
from apportion.core.attribution import Cost
from apportion.core.errors import InputError
from apportion.metrics import Direction, Scores
from apportion.metrics.scores import counts

m = ap.metrics
NAN = math.nan
KRIPPENDORFF = [  # four observers, twelve units: Krippendorff (2011), Computing Krippendorff's Alpha-Reliability, C
    [1, 2, 3, 3, 2, 1, 4, 1, 2, NAN, NAN, NAN],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NAN, 3],
    [NAN, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NAN],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NAN],
]


def scores(values: Tensor, metric: str = "M", seed: int = 0, direction: Direction = Direction.HIGHER) -> Scores:
    none = torch.zeros(len(values), dtype=torch.long)
    ids = tuple(range(len(values)))
    cost = Cost(none, none, none)
    return Scores(values.double(), {"type": metric}, direction, "", {}, {}, None, ids, seed, cost)


def of(table: Tensor, **more: object) -> dict[str, Scores]:
    """Take examples by methods."""
    return {f"m{k}": scores(column, **more) for k, column in enumerate(table.T)}  # pyright: ignore[reportArgumentType]


def alpha(ratings: Tensor, copy_of: list[int] | None = None) -> float:
    """Krippendorff's coefficient by its table of coincidences; raters that are copies of one are not compared."""
    rater = copy_of or list(range(len(ratings)))
    kinds = sorted({float(v) for v in ratings.flatten() if not math.isnan(v)})
    at = {v: k for k, v in enumerate(kinds)}
    together, marginal = np.zeros((len(kinds), len(kinds))), np.zeros(len(kinds))
    apart = 0
    for unit in ratings.T.tolist():
        pairs = [
            (at[a], at[b])
            for (i, a), (j, b) in itertools.permutations(enumerate(unit), 2)
            if rater[i] != rater[j] and not math.isnan(a) and not math.isnan(b)
        ]
        rated = [(at[v], rater[i]) for i, v in enumerate(unit) if not math.isnan(v)]
        for a, b in pairs:
            together[a, b] += len(rated) / len(pairs)
        for v, r in rated if pairs else []:
            marginal[v] += 1
            apart += sum(r == other for _, other in rated)  # itself, and its copies
    n = marginal.sum()
    distance = np.array([[(marginal[min(c, k) : max(c, k) + 1].sum() - (marginal[c] + marginal[k]) / 2) ** 2
                          for k in range(len(kinds))] for c in range(len(kinds))])  # fmt: skip
    expected = (np.outer(marginal, marginal) * distance).sum() / (n * n - apart)
    return 1 - (together * distance).sum() / n / expected


def test_alpha_of_published_ratings() -> None:
    assert m.krippendorff(torch.tensor(KRIPPENDORFF)) == pytest.approx(0.815, abs=5e-4)
    assert m.krippendorff(torch.tensor(KRIPPENDORFF)) == pytest.approx(alpha(torch.tensor(KRIPPENDORFF)), abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_alpha_is_that_of_the_table_of_coincidences(seed: int) -> None:
    some = torch.Generator().manual_seed(seed)
    ratings = torch.randint(0, 4, (5, 6), generator=some).double()
    ratings[torch.rand(5, 6, generator=some) < 0.3] = NAN
    assert m.krippendorff(ratings) == pytest.approx(alpha(ratings), abs=1e-12)


def test_alpha_without_two_ratings_or_two_values_is_undefined() -> None:
    for ratings in ([[1.0, 2.0]], [[1.0, 1.0]] * 3, [[NAN, NAN]] * 2, [[1.0, NAN], [NAN, 2.0]]):
        assert math.isnan(m.krippendorff(torch.tensor(ratings)))


def test_examples_that_agree_and_that_draw_lots() -> None:
    """An order that holds on every example has alpha 1; random scores have about 0, and an interval that holds 0."""
    some = torch.Generator().manual_seed(0)
    noise = torch.rand(40, 5, generator=some)
    assert m.inter_rater(of(torch.arange(5.0) + noise)).tolist() == [1, 1, 1]
    found, low, high = m.inter_rater(of(noise)).tolist()
    assert abs(found) < 0.06
    assert low < 0 < high < 0.15
    backwards = of(torch.arange(5.0) + noise, direction=Direction.LOWER)
    assert m.inter_rater(backwards).tolist() == [1, 1, 1]


@pytest.fixture
def fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw 150 replicates, which slow twins can follow."""
    monkeypatch.setattr("apportion.metrics.scores.counts", lambda ids, seed: counts(ids, seed)[:, :150])
    monkeypatch.setattr("apportion.metrics.reliability.REPLICATES", 150)


@pytest.mark.usefixtures("fewer")
def test_the_interval_of_alpha_compares_no_example_with_its_copy() -> None:
    table = torch.rand(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    table[0, 0] = table[0, 1]
    placed = m_ranks(table)
    drawn = []
    for column in counts(range(6))[:, :150].T.int().tolist():
        copies = [k for k, n in enumerate(column) for _ in range(n)]
        if len(set(copies)) > 1:
            drawn.append(alpha(placed[copies], copies))
    found = m.inter_rater(of(table)).tolist()
    assert found == pytest.approx([alpha(placed), *np.nanquantile(drawn, [0.025, 0.975])], abs=1e-12)


def m_ranks(table: Tensor) -> Tensor:
    stats = pytest.importorskip("scipy.stats")
    return torch.from_numpy(stats.rankdata(table.numpy(), axis=1))


@pytest.mark.usefixtures("fewer")
def test_correlations_and_their_intervals_are_those_of_repeated_examples() -> None:
    stats = pytest.importorskip("scipy.stats")
    table = (torch.rand(9, 3, generator=torch.Generator().manual_seed(2)) * 6).round()  # with ties
    table[4, 2] = NAN
    found = m.inter_method(of(table))
    times = counts(range(9))[:, :150].int()
    for i, j in itertools.permutations(range(3), 2):
        known = [k for k in range(9) if not table[k, [i, j]].isnan().any()]
        drawn = []
        for column in [torch.ones(9), *times.T]:
            rows = [k for k in known for _ in range(int(column[k]))]
            a, b = table[rows, i].numpy(), table[rows, j].numpy()
            drawn.append(stats.spearmanr(a, b)[0] if len(set(a)) > 1 and len(set(b)) > 1 else NAN)
        wanted = [drawn[0], *np.nanquantile(drawn[1:], [0.025, 0.975])]
        assert found[:, i, j].tolist() == pytest.approx(wanted, abs=1e-12)
    assert found.diagonal(dim1=1, dim2=2).isnan().all()


def test_metrics_that_look_at_the_example_alone_and_random_ones() -> None:
    """What only the example decides is the same of all methods, up to its slope; random numbers have nothing shared."""
    some = torch.Generator().manual_seed(0)
    difficulty = torch.rand(40, 1, generator=some)
    same = m.inter_method(of(difficulty * torch.tensor([1.0, 2, 5])))
    assert same[:, 0, 1].tolist() == [1, 1, 1]
    other = m.inter_method(of(torch.rand(40, 3, generator=some)))
    low, high = other[1, 0, 1], other[2, 0, 1]
    assert float(low) < 0 < float(high)


def test_two_metrics_of_one_thing_and_of_nothing() -> None:
    some = torch.Generator().manual_seed(0)
    table = torch.rand(40, 2, generator=some)
    up, down = of(table), of(-table.exp(), metric="N", direction=Direction.LOWER)
    assert m.internal_consistency(up, down).T.tolist() == [[1, 1, 1]] * 2  # high in one is low in the other: both good
    neither = of(-table.exp(), metric="N", direction=Direction.NEITHER)
    assert m.internal_consistency(up, neither).T.tolist() == [[-1, -1, -1]] * 2
    found = m.internal_consistency(up, of(torch.rand(40, 2, generator=some), metric="N"))
    assert bool(((found[1] < 0) & (found[2] > 0)).all())


def test_a_second_run() -> None:
    """Noise of spread s around what an example has: rho falls, and the spread is s; without noise they are 1 and 0."""
    some = torch.Generator().manual_seed(0)
    own = torch.rand(400, 1, generator=some)
    runs = [own + torch.randn(400, 2, generator=some) * torch.tensor([0.0, 10.0]) for _ in range(2)]
    rho, spread = m.test_retest(of(runs[0]), of(runs[1], seed=1))
    assert rho[:, 0].tolist() == [1, 1, 1]
    assert float(rho[1, 1]) < 0 < float(rho[2, 1])
    assert spread.tolist() == pytest.approx([0, 10], rel=0.1)
    with pytest.raises(InputError, match="two seeds"):
        m.test_retest(of(own), of(own))
    with pytest.raises(InputError, match="same methods and examples"):
        m.test_retest(of(own), of(own[:5], seed=1))
    with pytest.raises(InputError, match="same metric"):
        m.test_retest(of(own), of(own, metric="N", seed=1))


def test_what_is_constant_alone_or_missing_is_undefined_and_said() -> None:
    table = torch.rand(8, 3, generator=torch.Generator().manual_seed(0))
    table[:, 1] = 1 + torch.rand(8, generator=torch.Generator().manual_seed(1)) * 1e-7  # rounding of a constant
    table[:, 2] = NAN
    held = {k: replace(s, rounding=1e-5) for k, s in of(table).items()}
    found = m.Reliability.of({k: {"M": s} for k, s in held.items()}, "M")
    assert found.inter_method.isnan().all()
    assert [w for w in found.warnings if "all scores of m1 are equal" in w]
    assert [w for w in found.warnings if "m2 has no score" in w]
    assert not found.inter_rater.isnan().any()
    one = m.Reliability.of({"a": {"M": scores(torch.rand(1))}}, "M")
    assert one.inter_rater.isnan().all()
    assert {w[:10] for w in one.warnings} == {"all scores", "1 example(", "one method"}
    assert "inter-rater alpha nan" in repr(one)
    tied = m.inter_rater(of(torch.ones(8, 3)))
    assert tied.isnan().all()
    with pytest.raises(InputError, match="scores of methods"):
        m.inter_rater({})


def test_examples_in_common_that_are_too_few_are_said() -> None:
    """Each method has five of seven scores or more, but all three have only two in common."""
    table = torch.rand(9, 3, generator=torch.Generator().manual_seed(0))
    table[2:4, 0], table[4:6, 1], table[6:7, 2] = NAN, NAN, NAN
    held = {k: {"M": s, "N": s} for k, s in of(table[:7]).items()}
    (said,) = m.Reliability.of(held, "M", {k: {"M": replace(h["M"], seed=1)} for k, h in held.items()}).warnings
    assert said.startswith("2 example(s) are too few")
    for part in ("alpha (2)", "inter-method correlation (3)", "consistency with N (5)", "test-retest correlation (5)"):
        assert part in said
    table[:7] = torch.rand(7, 3, generator=torch.Generator().manual_seed(1))
    assert not m.Reliability.of({k: {"M": s} for k, s in of(table).items()}, "M").warnings


def test_mistakes_are_named() -> None:
    held = {k: {"M": s} for k, s in of(torch.rand(6, 2)).items()}
    more = {"m0": {**held["m0"], "N": scores(torch.rand(6), "N")}, "m1": held["m1"]}
    for given, again, said in (
        ((held, "Q"), None, "no scores of m0, m1 by 'Q'; there are some by M"),
        ((more, "M"), None, "no scores of m1 by 'N'"),
        ((held, "M"), {"m0": {}, "m1": {}}, "no scores of m0, m1 by 'M'; there are some by nothing"),
    ):
        with pytest.raises(InputError, match=said):
            m.Reliability.of(*given, again)
    unchecked = inspect.unwrap(m.krippendorff)  # tests check annotations, too
    for wrong in ([[1, 2], [1, 2]], torch.ones(3)):
        with pytest.raises(InputError, match="a row for each rater"):
            unchecked(wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match=r"scores\[method\]\[metric\]"):
        inspect.unwrap(m.Reliability.of)(m.Reliability, of(torch.rand(6, 2)), "M")


def test_an_evaluation_tells_its_reliability() -> None:
    x = torch.rand(8, 5, generator=torch.Generator().manual_seed(0))
    field = ap.Field(lambda x: (x**2).sum(1))
    names = ["gradient", "gradient_times_input"]
    first, again = (
        ap.evaluate(names, field, x, ["sparseness", "complexity"], seed=s, quiet=True, controls=()) for s in (0, 1)
    )
    found = first.reliability("sparseness", again)
    assert float(found.inter_rater[0]) == 1.0  # squares are less even than what is squared
    assert found.internal_consistency["complexity"].shape == (3, 2)
    assert bool((found.internal_consistency["complexity"][0] > 0.5).all())  # less complex is more sparse
    assert found.retest is not None
    assert found.retest[0].tolist() == [1, 1]
    assert found.spread is not None
    assert found.spread.tolist() == [0, 0]
    assert "test-retest correlation: 1" in repr(found)
    with pytest.raises(InputError, match="metric 'x'"):
        first.reliability("x")


def test_examples_of_partly_missing_scores_take_no_part_in_alpha() -> None:
    table = torch.rand(9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    holed = table.clone()
    holed[2, 0] = holed[5, 2] = torch.nan
    kept = [k for k in range(9) if k not in (2, 5)]
    want = alpha(table[kept].argsort(1).argsort(1).double())
    assert float(m.inter_rater(of(holed))[0]) == pytest.approx(want)
    assert float(m.inter_rater(of(table))[0]) != pytest.approx(want)


def test_rounding_makes_no_order() -> None:
    base = torch.full((8, 3), 0.7, dtype=torch.float64)
    noise = torch.tensor([0.0, 1e-7, 2e-7], dtype=torch.float64)
    held = {n: replace(s, rounding=1e-6) for n, s in of(base + noise).items()}
    assert m.inter_rater(held).isnan().all()
    assert float(m.inter_rater(of(base + noise))[0]) == pytest.approx(1)


def test_the_ends_of_a_turned_interval_change_places() -> None:
    g = torch.Generator().manual_seed(3)
    one = torch.rand(12, 2, generator=g, dtype=torch.float64)
    other = one + torch.rand(12, 2, generator=g, dtype=torch.float64)
    up, down = of(other, metric="N"), of(-other, metric="N", direction=Direction.LOWER)
    torch.testing.assert_close(m.internal_consistency(of(one), down), m.internal_consistency(of(one), up))
    number, low, high = m.internal_consistency(of(one), down)
    assert bool(((low <= number) & (number <= high)).all())
