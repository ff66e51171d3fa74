"""Networks with weights set by hand compute what they say, and their truth is that of exact enumeration."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, product

import pytest
import torch

import apportion as ap
from apportion import planted
from apportion.core.errors import InputError
from apportion.planted import And, Feature, Not, Or
from apportion.planted.hand_weighted import HandWeighted
from apportion.planted.problem import shapley_shares

MAKERS: list[Callable[..., HandWeighted]] = [planted.conflicting, planted.interacting, planted.pertinent_negative]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("seed", [0, 1])
def test_truth_by_enumeration(make: Callable[..., HandWeighted], seed: int) -> None:
    p = make(seed=seed)
    terms = planted.dividends(lambda z: p.model(z)[:, 0], p.x, p.baseline)
    changes = terms.clone()
    changes[:, 0] = 0  # f at the baseline
    assert torch.allclose(changes, p.dividends, atol=1e-12)
    assert torch.allclose(shapley_shares(terms), p.truth)
    assert torch.allclose(p.published.sum(1), p.truth.sum(1))
    fill = ap.fills.Baselines(ap.baselines.Given(p.baseline))
    values = ap.Shapley(fill=fill)(ap.Field(p.model), p.x, target=0).values
    assert torch.allclose(values, p.truth, atol=1e-10)
    again = make(seed=seed)
    assert torch.equal(again.x, p.x)
    assert torch.equal(again.truth, p.truth)


def test_conflicting_is_nothing_to_gradients_where_it_is_cancelled() -> None:
    p = planted.conflicting()
    cancelled = p.x[:, 3:] == 1
    assert cancelled.any()
    assert not cancelled.all()
    for method in (ap.GradientTimesInput(), ap.IntegratedGradients()):
        values = method(ap.Field(p.model), p.x, target=0).values
        assert (values[:, :3][cancelled] == 0).all()
        assert torch.allclose(values[:, :3][~cancelled], p.truth[:, :3][~cancelled])
    assert (p.truth[:, :3][cancelled] != 0).all()
    assert torch.allclose(p.published[:, :3][cancelled], -p.published[:, 3:][cancelled])


def test_interacting_gives_the_partner_its_share() -> None:
    p = planted.interacting()
    on = p.x[:, 3:] == 1
    assert torch.allclose(p.truth[:, :3][~on], p.published[:, :3][~on])
    assert (p.truth[:, 3:][on] != 0).all()
    assert (p.published[:, 3:] == 0).all()


def test_an_absent_feature_needs_a_baseline_of_its_own() -> None:
    p = planted.pertinent_negative()
    absent = p.x[:, 4:] == 0
    assert absent.any()
    field = ap.Field(p.model)
    good = ap.IntegratedGradients(ap.baselines.Given(p.baseline))(field, p.x, target=0).values
    assert torch.allclose(good, p.truth)
    zero = ap.IntegratedGradients()(field, p.x, target=0).values
    assert (zero[:, 4:][absent] == 0).all()
    assert (p.truth[:, 4:][absent] != 0).all()


def test_shattered_gradients() -> None:
    p = planted.shattered()
    weight = torch.where(p.truth > 0, 1.0, -1.0)
    slope = ap.Gradient()(ap.Field(p.model), p.x, target=0).values
    assert ((slope > 0) == (weight > 0)).double().mean() == 0.5  # by chance, exactly
    assert (slope.abs() > 15 * (p.truth / p.x).abs() / 1.4).all()
    # additive: a feature alone makes what is said
    values = ap.Occlusion()(ap.Field(p.model), p.x, target=0).values
    assert torch.allclose(values, p.truth)
    few, many = (
        ap.IntegratedGradients(quadrature=ap.quadrature.Midpoint(n))(ap.Field(p.model), p.x, target=0).values
        for n in (32, 4096)
    )
    assert (many - p.truth).abs().max() < 0.1  # teeth average out, slowly
    assert (few - p.truth).abs().max() > 1.0


FORMULAS = [
    (And(Feature(0), Feature(1)), lambda a, b, c: a and b),
    (Or(Feature(0), Not(Feature(2))), lambda a, b, c: a or not c),
    (And(Feature(0), Or(Feature(1), Not(Feature(2)))), lambda a, b, c: a and (b or not c)),
    (Or(And(Feature(0), Not(Feature(1))), And(Not(Feature(0)), Feature(1))), lambda a, b, c: a != b),
]


@pytest.mark.parametrize(("formula", "plain"), FORMULAS)
def test_boolean(formula: planted.Formula, plain: Callable[..., bool]) -> None:
    p = planted.boolean(formula, features=3)
    table = {bits: bool(plain(*bits)) for bits in product((False, True), repeat=3)}
    rows = [tuple(bool(v) for v in row) for row in p.x.tolist()]
    assert p.model(p.x).tolist() == [float(table[row]) for row in rows]
    for n, row in enumerate(rows):
        # the slow way: subsets by size, kept if no smaller one inside already decides
        found: list[set[int]] = []
        for size in range(4):
            for kept in combinations(range(3), size):
                agree = {table[o] for o in table if all(o[i] == row[i] for i in kept)}
                if len(agree) == 1 and not any(f <= set(kept) for f in found):
                    found.append(set(kept))
        told = [{i for i in range(3) if s >> i & 1} for s in p.sufficient[n].nonzero()[:, 0].tolist()]
        assert sorted(map(sorted, told)) == sorted(map(sorted, found))
        assert set(p.relevant[n].nonzero()[:, 0].tolist()) == set().union(*found)
    values = ap.Shapley()(ap.Field(p.model), p.x).values
    assert torch.allclose(values, p.truth)


def test_wrong_arguments() -> None:
    with pytest.raises(InputError, match=r"features \[0, 3\] of 3"):
        planted.boolean(And(Feature(0), Feature(3)), features=3)
    with pytest.raises(InputError, match="at most 8"):
        planted.boolean(Feature(9))
    for make in (planted.conflicting, planted.interacting):
        with pytest.raises(InputError, match="7 pairs"):
            make(features=7)
