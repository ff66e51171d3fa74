"""Any path with any accumulator: the named methods are special cases, and each baseline keeps its map."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import apportion as ap
from apportion import planted
from apportion.core.errors import ConfigError
from apportion.core.explainer import Explainer
from apportion.parts.accumulate import Accumulator
from apportion.parts.paths import Path
from apportion.parts.quadrature import Adaptive, Gauss, Left, Midpoint, MonteCarlo, Power, Quadrature, Right, Trapezoid
from apportion.testing import check_explainer

A, P = ap.accumulate, ap.paths
X = torch.rand(3, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 0.1
TWO = ap.baselines.Several((ap.baselines.Zero(), ap.baselines.Constant(0.4)))
ONES = [ap.baselines.Zero(), ap.baselines.Constant(0.4)]


@pytest.mark.parametrize("explainer", ap.PathMethod.variants(), ids=["dot", "valid", "direction"])
def test_conforms(explainer: Explainer) -> None:
    check_explainer(explainer)


@pytest.mark.parametrize(
    ("named", "path", "accumulator"),
    [
        (ap.IntegratedGradients(TWO, Gauss(9)), P.Straight(TWO, quadrature=Gauss(9)), A.Dot()),
        (ap.SplitIG(TWO, Gauss(9), 0.5), P.Straight(TWO, quadrature=Gauss(9)), A.Split(0.5)),
        (ap.IDGI(P.Straight(TWO)), P.Straight(TWO), A.ImportantDirection()),
        (ap.GuidedIG(TWO, 8), P.GuidedPath(TWO, 8), A.Dot()),
        (ap.SPI(TWO, 2), P.StickBreaking(TWO, 2, quadrature=Midpoint(32)), A.Expectation(each=True)),
        (ap.CrediblePath(TWO, quadrature=Gauss(9)), P.Straight(TWO, quadrature=Gauss(9)), A.ValidFeatures()),
    ],
    ids=lambda v: type(v).__name__,
)
def test_named_methods_are_special_cases(named: Explainer, path: Path, accumulator: Accumulator) -> None:
    field = ap.Field(planted.dense_net())
    a, b = (m(field, X, target=1, ids=range(3)) for m in (named, ap.PathMethod(path, accumulator)))
    assert torch.equal(a.values, b.values)
    assert torch.equal(a.parts["per_baseline"], b.parts["per_baseline"])
    assert (a.claimed_total is None) == (b.claimed_total is None)


@pytest.mark.parametrize("claims", [True, False])
def test_claims_follow_the_accumulator(claims: bool) -> None:
    made = A.Dot() if claims else A.Split()
    a = ap.PathMethod(accumulator=made)(ap.Field(planted.dense_net()), X, target=1)
    assert (a.claimed_total is not None) == claims


def test_recalibration_on_a_curve_of_ones_own() -> None:
    # f = x1² - x2² along (t, t²) from 0 to (1, 1): slopes 2t and -2t²; only the first points towards x by ascent
    field = ap.Field(lambda x: x[:, 0] ** 2 - x[:, 1] ** 2)
    curve = P.Along(lambda x, s, t: s + (x - s) * torch.cat([t, t**2], 1), quadrature=Gauss(12))
    x = torch.ones(1, 2, dtype=torch.float64)
    a = ap.PathMethod(curve, A.ValidFeatures("ascent"))(field, x)
    assert a.values[0].tolist() == pytest.approx([1.0, 0.0], abs=5e-3)
    assert ap.PathMethod(curve)(field, x).values[0].tolist() == pytest.approx([1.0, -1.0], abs=5e-3)
    assert a.parts["valid_share"].tolist() == [0.5]


# -- the map of each baseline -----------------------------------------------------------------------------------


def on(base: ap.baselines.Baseline) -> list[Explainer]:
    """List the path methods that start from a given baseline, without random numbers that depend on how many."""
    return [
        ap.IntegratedGradients(base, Gauss(9)),
        ap.SplitIG(base, Gauss(9), 0.5),
        ap.CrediblePath(base, quadrature=Gauss(9)),
        ap.IDGI(P.Straight(base)),
        ap.GuidedIG(base, 8),
        ap.SAMP(base, 2, 0.3),
        ap.LPI(base, Gauss(4)),
        ap.PathMethod(P.Along(lambda x, s, t: s + t**2 * (x - s), base)),
        ap.PathMethod(P.Salient(base, 2, 0.3), A.Split(0.5)),
    ]


@pytest.mark.parametrize("i", range(len(on(TWO))))
def test_every_baseline_keeps_its_map(i: int) -> None:
    field = ap.Field(planted.dense_net())
    a = on(TWO)[i](field, X, target=1)
    want = torch.stack([on(one)[i](field, X, target=1).values for one in ONES], 1)
    torch.testing.assert_close(a.parts["per_baseline"], want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(a.values, want.mean(1), rtol=1e-10, atol=1e-12)
    assert a.references is not None
    assert a.references.value.shape == (3, 2)


@pytest.mark.parametrize("method", [ap.SPI(TWO, 3), ap.SPIProbability(TWO, 3, top=0.3)], ids=["mean", "probability"])
def test_random_paths_are_averaged_for_each_baseline(method: Explainer) -> None:
    field = ap.Field(planted.dense_net())
    a = method(field, X, target=1, ids=range(3))
    each = a.parts["per_baseline"]
    assert each.shape == (3, 2, 5)
    torch.testing.assert_close(each.mean(1), a.values)
    assert "per_path" not in a.parts
    assert a.references is not None
    assert a.references.rows.shape == (3, 2, 5)  # pyright: ignore[reportAttributeAccessIssue]
    assert a.references.value.shape == (3, 2)
    if isinstance(method, ap.SPI):  # each path is complete, and so is the mean over those from one baseline
        torch.testing.assert_close(each.sum(2), a.value[:, None] - a.references.value, rtol=0, atol=0.02)


def test_draws_keep_no_maps_but_their_error() -> None:
    for draws in (1, 2):
        a = ap.ExpectedGradients(TWO, draws)(ap.Field(planted.dense_net()), X, target=1)
        assert set(a.parts) == {"standard_error"}


def test_one_leg_is_not_taken_for_granted() -> None:
    line = P.Straight(TWO, quadrature=MonteCarlo(3))
    with pytest.raises(ConfigError, match="one leg for each branch"):
        ap.PathMethod(line, A.Expectation(single=True))(ap.Field(planted.dense_net()), X, target=1)
    with pytest.raises(ConfigError, match="one of the two"):
        A.Expectation(single=True, each=True)


# -- valid features, on rules with a node at the example ----------------------------------------------------------


class Hump(nn.Module):
    """tanh(4 x1) + (x2 + 1/2)²: the first slope only falls towards x, the second only grows."""

    def forward(self, x: Tensor) -> Tensor:
        return (4 * x[:, 0]).tanh() + (x[:, 1] + 0.5) ** 2


RULES = [Right(40), Trapezoid(40), Left(40), Power(base=Right(40)), Adaptive(0, 0, max_passes=40), Midpoint(40)]


@pytest.mark.parametrize("rule", RULES, ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("divide", ["valid", "all"])
@pytest.mark.parametrize("test", ["magnitude", "ascent"])
def test_the_example_is_no_point_of_its_path(rule: Quadrature, divide: str, test: str) -> None:
    x = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    field = ap.Field(Hump() if test == "magnitude" else lambda z: 1 - Hump()(z))
    kept = A.ValidFeatures(test, divide=divide)  # pyright: ignore[reportArgumentType]
    a = ap.CrediblePath(ap.baselines.Zero(), valid=kept, quadrature=rule)(field, x)
    # x1's slope is larger everywhere before x, and falls on the way; x2's is smaller. Downhill, none ascends.
    want, none = ([0.0, 2.0], 0.5) if test == "magnitude" else ([0.0, 0.0], 1.0)
    assert a.values[0].tolist() == pytest.approx(want, abs=0.06)
    assert a.values[0, 0] == 0
    assert a.parts["zero_count_share"].tolist() == [none]


def test_all_rules_agree_on_a_network() -> None:
    net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 2)).double()
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    kept = A.ValidFeatures()

    def explained(rule: Quadrature) -> ap.Attribution:
        return ap.CrediblePath(ap.baselines.Zero(), valid=kept, quadrature=rule)(ap.Field(net), x, target=1)

    exact = explained(Midpoint(5000))
    for rule in (Right(800), Trapezoid(800), Adaptive(0, 0, max_passes=800), Gauss(200)):
        a = explained(rule)
        off = (a.values - exact.values).norm() / exact.values.norm()
        assert float(off) < 0.03, rule
        assert torch.equal(a.parts["zero_count_share"], exact.parts["zero_count_share"]), rule
    assert math.isfinite(float(exact.values.sum()))


def test_profiles_count_the_nodes_before_the_example() -> None:
    x = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    for rule in (Right(10), Midpoint(10)):
        assert float(ap.path_profile(P.Straight(quadrature=rule), ap.Field(Hump()), x).valid_share) == 0.5
