"""Closed forms and slow twins of methods along paths: blurs, sticks, boundaries, spheres, neighbours, validity."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

import apportion as ap
from apportion import planted
from apportion.core.errors import BaselineError, ConfigError
from apportion.methods.path.big import BIG
from apportion.methods.path.blur_ig import BlurIG
from apportion.methods.path.boundary_saliency import BoundarySaliency
from apportion.methods.path.credible_path import CrediblePath
from apportion.methods.path.lpi import LPI
from apportion.methods.path.neflag import NeFLAG
from apportion.methods.path.spi import SPI, SPIProbability
from apportion.parts.accumulate import ValidFeatures
from apportion.parts.baselines import Constant, Given, NearestAdversarial, Neighbours, Noise
from apportion.parts.paths.blur import scale_space
from apportion.parts.quadrature import Gauss, Midpoint, MonteCarlo, Quadrature, Right

PICTURES = torch.rand(2, 2, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
ROWS = torch.rand(3, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def points(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def slope(model: nn.Module, at: Tensor, c: int = 1) -> Tensor:
    at = at.detach().clone().requires_grad_()
    (g,) = torch.autograd.grad(model(at[None])[0, c], at)
    return g


class Weighed(nn.Module):
    """W · x over all of a picture."""

    def __init__(self, even: bool = False) -> None:
        super().__init__()
        self.weight = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
        if even:
            self.weight = torch.ones_like(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight.to(x)).sum((1, 2, 3))


# -- BlurIG ---------------------------------------------------------------------------------------------------


def true_rise(model: nn.Module, x: Tensor, sigma: float, border: str) -> Tensor:
    wide = torch.full((len(x),), sigma, dtype=torch.float64)
    return model(x) - model(scale_space(x, wide, border, "HW"))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("rule", [Gauss(1), Right(3), Midpoint(7), MonteCarlo(2)], ids=str)
@pytest.mark.parametrize("spacing", ["sigma", "variance", "log"])
@pytest.mark.parametrize("border", ["reflect", "zero"])
def test_blur_ig_of_a_linear_score_is_exact_at_any_number_of_steps(rule: Quadrature, spacing: str, border: str) -> None:
    a = BlurIG(50.0, rule, spacing, border)(ap.Field(Weighed()), PICTURES)  # pyright: ignore[reportArgumentType]
    wide = scale_space(PICTURES, torch.full((2,), 50.0, dtype=torch.float64), border, "HW")  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(a.values, Weighed().weight * (PICTURES - wide), rtol=0, atol=1e-12)
    torch.testing.assert_close(a.values.sum((1, 2, 3)), true_rise(Weighed(), PICTURES, 50.0, border))


def published_blur_ig(x: Tensor, steps: int, end: float, root: bool) -> float:
    """The published rule on the sum of a picture: finite differences at σ_s, weighted by the steps between them."""
    sigma = [math.sqrt(s * end / steps) if root else s * end / steps for s in range(steps + 1)]
    total = 0.0
    for s, after in itertools.pairwise(sigma):
        ends = [scale_space(x[None], torch.tensor([v], dtype=torch.float64), "zero", "HW")[0] for v in (s, s + 0.01)]
        total -= (after - s) * float((ends[1] - ends[0]).sum() / 0.01)
    return total


def test_the_published_rule_is_rough_and_its_root_ends_elsewhere() -> None:
    x, total = PICTURES[0], Weighed(even=True)
    true = float(true_rise(total, PICTURES, 50.0, "zero")[0])
    assert abs(published_blur_ig(x, 100, 50.0, root=False) - true) > 1e-2 * true
    near = float(true_rise(total, PICTURES, 50**0.5, "zero")[0])
    rooted = published_blur_ig(x, 400, 50.0, root=True)
    assert abs(rooted - near) < abs(rooted - true) / 3
    ours = BlurIG(50**0.5, Right(5), "variance", "zero")(ap.Field(total), PICTURES)
    assert float(ours.values[0].sum()) == pytest.approx(near, abs=1e-12)


def slow_blur_ig(model: nn.Module, x: Tensor, sigma_max: float, n: int) -> Tensor:
    out = torch.zeros_like(x)

    def scaled(s: float) -> Tensor:
        return scale_space(x[None], torch.tensor([s], dtype=torch.float64), "reflect", "HW")[0]

    for k in range(n):
        wide, middle, narrow = (sigma_max * (1 - (k + part) / n) for part in (0, 0.5, 1))
        out += slope(model, scaled(middle)) * (scaled(narrow) - scaled(wide))
    return out


def test_blur_ig_is_its_slow_twin() -> None:
    model = planted.conv_net()
    a = BlurIG(5.0, Midpoint(9))(ap.Field(model), PICTURES, target=1)
    want = torch.stack([slow_blur_ig(model, x, 5.0, 9) for x in PICTURES])
    torch.testing.assert_close(a.values, want, rtol=1e-10, atol=1e-12)
    straight = ap.IntegratedGradients(ap.baselines.Blurred(5.0), Midpoint(9))(ap.Field(model), PICTURES, target=1)
    assert not torch.allclose(a.values, straight.values, rtol=1e-2)


def test_blur_ig_of_a_constant_picture_and_of_a_table() -> None:
    flat = BlurIG()(ap.Field(planted.conv_net()), torch.full((2, 2, 8, 8), 0.3, dtype=torch.float64), target=1)
    assert not bool(flat.values.any())
    assert any("equals the input" in w for w in flat.warnings)
    table = BlurIG()(ap.Field(planted.dense_net()), ROWS, target=1)
    assert any("not be neighbours" in w for w in table.warnings)
    sequence = BlurIG(2.0)(ap.Field(lambda x: x[:, 0, 1]), points((0.0, 3.0, 0.0))[None])
    assert not bool(sequence.values[0, 0, [0, 2]].any())


# -- SPI ------------------------------------------------------------------------------------------------------


def test_spi_leads_from_shapley_values_to_integrated_gradients() -> None:
    field, x = ap.Field(planted.Product()), points((2.0, 3.0))
    jumps = SPI(paths=1000, alpha=1e-3, quadrature=Midpoint(64), pieces=64)(field, x)
    assert jumps.values[0].tolist() == pytest.approx([3, 3], abs=0.3)
    assert jumps.parts["standard_error"][0].tolist() == pytest.approx([3 / 999**0.5] * 2, rel=0.05)
    line = SPI(paths=2, alpha=300.0)(field, x)
    assert line.values[0].tolist() == pytest.approx([3, 3], abs=0.3)
    assert float(jumps.parts["standard_error"].amax()) * 31 > 20 * float(line.parts["standard_error"].amax())


def test_spi_of_a_linear_score_is_exact_on_every_path() -> None:
    a = SPI(Noise(0.5, count=2), 3, 0.5)(ap.Field(planted.Linear([1.0, -2.0])), points((2.0, 3.0)), ids=["x"])
    assert a.references is not None
    want = torch.tensor([1.0, -2.0]).double() * (points((2.0, 3.0)) - a.references.rows.mean(1))
    torch.testing.assert_close(a.values, want, rtol=0, atol=1e-13)
    assert float(a.cost.forward) == 3 * 2 * 32 + 2  # starts are scored once, whatever the number of paths


def test_spi_probability_counts_paths() -> None:
    x = torch.ones(1, 40, dtype=torch.float64)
    weight = torch.linspace(-1, 1, 40).tolist()
    a = SPIProbability(paths=5)(ap.Field(planted.Linear(weight)), x)
    assert a.values[0].tolist() == [0.0] * 38 + [1.0] * 2  # 5 % of 40
    assert a.claimed_total is None
    mixed = SPIProbability(paths=20, alpha=0.1)(ap.Field(planted.Product()), points((2.0, 2.0)))
    assert 0 < float(mixed.values[0, 0]) < 1
    none = SPIProbability(paths=3)(ap.Field(planted.Linear([-1.0, 0.0])), points((1.0, 1.0)))
    assert not bool(none.values.any())
    assert any("above 0" in w for w in none.warnings)


# -- boundaries -----------------------------------------------------------------------------------------------


def test_big_and_bsm_of_a_binary_linear_score() -> None:
    weight = torch.tensor([1.0, -2.0, 2.0], dtype=torch.float64)
    one = ap.Field(planted.Linear(weight.tolist(), 0.5))
    two = ap.Field(lambda x: torch.stack([x @ weight + 0.5, 0 * x[:, 0]], 1))
    x = points((2.0, 1.0, 1.0))
    for field, target in ((one, None), (two, 0)):
        a = BIG()(field, x, target=target)
        assert a.values[0].tolist() == pytest.approx([0.27778, 1.11111, 1.11111], abs=1e-4)
        assert float(a.values.sum()) == pytest.approx(2.5, abs=1e-5)
        assert bool(a.parts["success"])
        assert float(a.parts["distance"]) == pytest.approx(2.5 / 3, abs=1e-5)
        b = BoundarySaliency()(field, x, target=target)
        assert b.values[0].tolist() == pytest.approx(weight.tolist(), abs=1e-12)
        assert b.gap is None


def test_failed_attacks_are_told() -> None:
    field = ap.Field(planted.Linear([1.0, 0.0], 100.0))
    for method in (BIG(), BoundarySaliency()):
        a = method(field, points((2.0, 1.0), (-99.9, 0.0)))
        assert a.parts["success"].tolist() == [False, True]
        assert any("1 example(s) (0)" in w for w in a.warnings)
        assert bool(torch.isfinite(a.values).all())


def test_attacks_where_the_gradient_is_zero() -> None:
    a = BIG()(ap.Field(planted.Saturated()), points((3.0, 1.0)))
    assert a.parts["success"].tolist() == [False]
    assert not bool(a.values.any())
    assert any("equals the input" in w for w in a.warnings)


def test_attacks_need_a_decision() -> None:
    with pytest.raises(BaselineError):
        BIG()(ap.Field(lambda x: x, score=lambda out: out.sum((1, 2))), PICTURES[:, 0])


def test_big_is_integrated_gradients_from_its_boundary() -> None:
    model, attack = planted.dense_net(), NearestAdversarial((0.5, 1.0, 4.0), steps=10)
    field = ap.Field(model)
    a = BIG(attack, Midpoint(6))(field, ROWS, target=1)
    assert a.references is not None
    for x, there, got in zip(ROWS, a.references.rows[:, 0], a.values, strict=True):
        want = torch.zeros_like(x)
        for k in range(6):
            want += (x - there) / 6 * slope(model, there + (k + 0.5) / 6 * (x - there))
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    b = BoundarySaliency(attack)(field, ROWS, target=1)
    want = torch.stack([slope(model, r) for r in a.references.rows[:, 0]])
    torch.testing.assert_close(b.values, want, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(b.values, ap.Gradient()(field, ROWS, target=1).values, rtol=1e-2)


def test_wrapped_boundaries_are_found_once() -> None:
    attack = NearestAdversarial((4.0,), steps=6)
    a = ap.SmoothGrad(BIG(attack, Midpoint(3)), samples=4)(ap.Field(planted.dense_net(), batch_size=2), ROWS, target=1)
    said = ap.SmoothGrad(BIG(attack, Midpoint(3)), samples=4).passes()
    assert bool((a.cost.backward <= said.backward + said.once_backward).all())
    assert bool((a.cost.forward <= said.forward + said.once).all())


# -- NeFLAG ---------------------------------------------------------------------------------------------------


def test_neflag_of_a_linear_score() -> None:
    weight = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    field, x = ap.Field(planted.Linear(weight.tolist())), points((0.3, 0.1, -0.4))
    unit = weight.square() / weight.norm()
    down = NeFLAG(points=1)(field, x).values[0]
    torch.testing.assert_close(down, unit, rtol=0, atol=1e-12)
    ten = NeFLAG(points=10, steps=200, travel=40.0)(field, x).values[0]
    torch.testing.assert_close(ten, unit, rtol=0, atol=1e-6)
    uniform = NeFLAG(points=40000, sampling="uniform")(field, x)
    torch.testing.assert_close(uniform.values[0], unit / 2, rtol=0, atol=0.02)  # before the flip: -½ w² / ‖w‖
    assert float((uniform.parts["flux"] < 0).double().mean()) == pytest.approx(0.5, abs=0.01)


def test_neflag_says_when_few_points_descend() -> None:
    # a cone around x that falls in a narrow sector only; steps too short to lead there
    def cone(x: Tensor) -> Tensor:
        length = (x.square().sum(1) + 1e-12).sqrt()
        return length - 30 * (x[:, 0] - 0.9 * length).relu()

    field, x = ap.Field(cone), torch.zeros(1, 2, dtype=torch.float64)
    few = NeFLAG(points=40, steps=1, travel=0.01)(field, x, ids=["x"])
    share = float((few.parts["flux"] < 0).double().mean())
    assert 0 < share < 0.5
    assert any("less than half of the points" in w for w in few.warnings)
    assert not any("less than half" in w for w in NeFLAG()(ap.Field(planted.Linear([3.0, -4.0])), x).warnings)


def slow_neflag(model: nn.Module, x: Tensor, epsilon: float, steps: int) -> Tensor:
    """One point, by descent from x."""
    at = x.clone()
    for _ in range(steps):
        g = slope(model, at)
        at = at - 2 * epsilon / steps * g / g.norm()
        if (at - x).norm() > epsilon:
            at = x + epsilon * (at - x) / (at - x).norm()
    n = (at - x) / (at - x).norm()
    g = slope(model, x + epsilon * n)
    return -g * n if float(g @ n) < 0 else torch.zeros_like(x)


def test_neflag_is_its_slow_twin() -> None:
    model = planted.dense_net()
    a = NeFLAG(1, 0.7, 9)(ap.Field(model), ROWS, target=1)
    want = torch.stack([slow_neflag(model, x, 0.7, 9) for x in ROWS])
    torch.testing.assert_close(a.values, want, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(a.values, NeFLAG(1, 0.7, 1)(ap.Field(model), ROWS, target=1).values, rtol=1e-3)


def test_neflag_where_the_score_is_flat() -> None:
    for method in (NeFLAG(), NeFLAG(1), NeFLAG(sampling="uniform")):
        a = method(ap.Field(planted.Saturated()), points((3.0, 1.0)))
        assert not bool(a.values.any())
        assert any("no point with a negative flux" in w for w in a.warnings)


# -- LPI ------------------------------------------------------------------------------------------------------


def slow_lpi(model: nn.Module, x: Tensor, references: Tensor, alphas: list[float], tiled: bool = False) -> Tensor:
    """Every reference with every step; `tiled` pairs them as the published code does."""
    b, k = len(references), len(alphas)
    out = torch.zeros_like(x)
    for j in range(b):
        for s in range(k):
            r = references[(j * k + s) % b] if tiled else references[j]
            out += (x - references[j]) * slope(model, r + alphas[s] * (x - r)) / (b * k)
    return out


def test_lpi_is_its_slow_twin_and_pairs_steps_with_their_reference() -> None:
    model, x = planted.dense_net(), ROWS[:1]
    near = torch.randn(1, 4, 5, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    base = Neighbours(torch.zeros(1, 3, dtype=torch.float64), near, torch.tensor([[0.1, 0.2, 0.3, 0.4]]).double())
    a = LPI(base, Midpoint(3))(ap.Field(model), x, target=1)
    alphas = [1 / 6, 0.5, 5 / 6]
    torch.testing.assert_close(a.values[0], slow_lpi(model, x[0], near[0], alphas), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(a.values[0], slow_lpi(model, x[0], near[0], alphas, tiled=True), rtol=1e-2)
    assert a.parts["per_baseline"].shape == (1, 4, 5)


def test_lpi_weights_sum_to_one_and_keep_the_total() -> None:
    x, near = (
        points((2.0, 3.0), (-1.0, -1.0)),
        torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(8)).double(),
    )
    density = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]], dtype=torch.float64)
    base = Neighbours(torch.tensor([[10.0, -10.0], [-10.0, 10.0]]).double(), near, density)
    field = ap.Field(lambda z: torch.stack([z.sum(1), -z.sum(1) - 0.1], 1))
    cluster = [0, 1]
    a = LPI(base, weights="density")(field, x, target=0)
    want = torch.stack([x[i] - density[c] @ near[c] for i, c in enumerate(cluster)])
    torch.testing.assert_close(a.values, want, rtol=0, atol=1e-12)
    assert a.gap is not None
    assert float(a.gap.abs().max()) < 1e-12
    equal = LPI(base)(field, x, target=0)
    torch.testing.assert_close(equal.values, torch.stack([x[i] - near[c].mean(0) for i, c in enumerate(cluster)]))
    with pytest.raises(ConfigError, match="density"):
        LPI(weights="density")


def test_options_that_make_no_path_are_refused_at_once() -> None:
    for made in (ap.CrediblePath, ap.LPI, ap.BIG):
        with pytest.raises(ConfigError, match="0 or more"):
            made(regions=-1)
    for eta in (0, 1.01, 2):
        with pytest.raises(ConfigError, match="eta"):
            ap.SAMP(eta=eta)
    with pytest.raises(ConfigError, match="total=2 for 3 baselines"):
        ap.CrediblePath(total=2)


def test_lpi_draws_a_place_for_each_reference_and_step() -> None:
    q = ap.Field(planted.dense_net()).bind(ROWS, target=1, ids=range(3))
    legs = list(LPI(Noise(0.5, count=4), MonteCarlo(5)).way.walk(q).legs)
    places = torch.cat([one.t for one in legs])
    assert len(places.unique()) == len(places) == 3 * 4 * 5
    assert 0.3 < float(places.mean()) < 0.7


# -- credible paths -------------------------------------------------------------------------------------------


class Example1(nn.Module):
    """The piecewise-linear F of Akhtar and Jalwana 2023, example 1."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = x[:, 0], x[:, 1]
        low, high = (x <= 1).all(1), (x > 1).all(1)
        return torch.where(high, 4 * a + b + 2, torch.where(low, a + 4 * b + 1, 0 * a))


AB = points((1.5, 1.5), (4.0, 4.0))


def credible(valid: ValidFeatures, baseline: float = 3.0, total: int = 2000) -> ap.Attribution:
    return CrediblePath(Constant(baseline), total, valid)(ap.Field(Example1()), AB)


def test_example_1_integrals_from_zero() -> None:
    a = ap.IntegratedGradients(quadrature=Midpoint(6000))(ap.Field(Example1()), AB)
    torch.testing.assert_close(a.values, points((3.0, 4.5), (13.0, 7.0)), rtol=0, atol=2e-3)
    assert a.gap is not None
    assert a.gap.tolist() == pytest.approx([-1.0, -1.0], abs=2e-3)  # F jumps by 1 at (1, 1)


def test_example_2_with_raw_gradients_and_at_least() -> None:
    a = credible(ValidFeatures())
    torch.testing.assert_close(a.values, points((-6.0, -1.5), (4.0, 1.0)), rtol=0, atol=1e-10)
    assert a.parts["valid_share"].tolist() == [1.0, 1.0]
    assert not bool(a.parts["zero_count_share"].any())
    assert bool((a.parts["count"] == 2000).all())
    assert not a.warnings
    assert a.gap is not None
    assert float(a.gap.abs().max()) < 1e-10


def test_example_2_as_printed_has_no_valid_point() -> None:
    a = credible(ValidFeatures(strict=True))
    assert not bool(a.values.any())
    assert a.parts["zero_count_share"].tolist() == [1.0, 1.0]
    assert any("without a valid point" in w for w in a.warnings)
    fallen = credible(ValidFeatures(strict=True, empty="integral"))
    torch.testing.assert_close(fallen.values, points((-6.0, -1.5), (4.0, 1.0)), rtol=0, atol=1e-10)


def test_the_scaled_comparison_rejects_what_lies_below_its_baseline() -> None:
    a = credible(ValidFeatures("scaled", strict=True))
    assert not bool(a.values[0].any())
    assert a.values[1].tolist() == pytest.approx([4.0, 1.0], abs=1e-10)
    assert a.parts["zero_count_share"].tolist() == [1.0, 0.0]


def test_the_scaled_comparison_keeps_what_lies_near() -> None:
    a = credible(ValidFeatures("scaled", strict=True), 2.0)  # (4 - x̃) < 1 where α > ½
    count = a.parts["count"][1, 0]
    assert count[0] == count[1]
    assert abs(int(count[0]) - 1000) < 5 * 500**0.5
    q = ap.Field(Example1()).bind(AB)
    places = torch.cat([one.t[one.owner == 1] for one in ap.paths.Straight(quadrature=MonteCarlo(2000)).walk(q).legs])
    assert int(count[0]) == int((places > 0.5).sum())
    assert a.values[1].tolist() == pytest.approx([8.0, 2.0], abs=1e-10)


def slow_algorithm_2(
    model: nn.Module,
    x: Tensor,
    starts: Tensor,
    alphas: Tensor,
    valid: ValidFeatures,
) -> Tensor:
    """Algorithm 2 with ρ and the accumulator apart, feature by feature; 0 for empty counts."""
    rho = slope(model, x)
    out = torch.zeros_like(x)
    for b, start in enumerate(starts):
        for i in range(len(x)):
            gathered, count, whole = 0.0, 0, 0.0
            for alpha in alphas[b]:
                at = start + alpha * (x - start)
                g = float(slope(model, at)[i])
                toward = float((x - at)[i]) * g
                seen = toward if valid.test == "scaled" else g
                own = float(rho[i])
                if valid.test == "ascent":
                    good = toward > 0 if valid.strict else toward >= 0
                else:
                    smaller = abs(own) > abs(seen) if valid.strict else abs(own) >= abs(seen)
                    good = own * seen > 0 and smaller
                whole += g
                if good:
                    gathered, count = gathered + g, count + 1
            m = len(alphas[b])
            mean = gathered / (count if valid.divide == "valid" else m) if count else 0.0
            if not count and valid.empty == "integral":
                mean = whole / m
            out[i] += float(x[i] - start[i]) * mean
    return out / len(starts)


VALIDS = [
    ValidFeatures(),
    ValidFeatures(strict=True),
    ValidFeatures("scaled"),
    ValidFeatures("scaled", strict=True, empty="integral"),
    ValidFeatures("ascent"),
    ValidFeatures("ascent", strict=True, empty="integral"),
    ValidFeatures(divide="all"),
]


@pytest.mark.parametrize("valid", VALIDS, ids=str)
def test_credible_paths_are_algorithm_2(valid: ValidFeatures) -> None:
    model, base = planted.dense_net(), Noise(1.5, count=2)
    q = ap.Field(model).bind(ROWS, target=1, ids=range(3))
    a = CrediblePath(base, 18, valid)(ap.Field(model, batch_size=7), ROWS, target=1, ids=range(3))
    walk = ap.paths.Straight(base, quadrature=MonteCarlo(9)).walk(q)
    places: dict[tuple[int, int], list[float]] = {}
    for legs in walk.legs:
        for owner, branch, t in zip(legs.owner.tolist(), legs.branch.tolist(), legs.t.tolist(), strict=True):
            places.setdefault((owner, branch), []).append(t)
    starts = walk.references().rows
    want = torch.stack(
        [
            slow_algorithm_2(model, x, starts[i], torch.tensor([places[i, 0], places[i, 1]]).double(), valid)
            for i, x in enumerate(ROWS)
        ]
    )
    torch.testing.assert_close(a.values, want, rtol=1e-10, atol=1e-12)
    other = VALIDS[(VALIDS.index(valid) + 2) % len(VALIDS)]
    wrong = CrediblePath(base, 18, other)(ap.Field(model), ROWS, target=1, ids=range(3))
    assert not torch.allclose(wrong.values, want, rtol=1e-3)


def test_unequal_weights_make_up_the_way_and_not_the_count() -> None:
    # |g| falls towards x = 1 for f = -(2 - x)³: valid are only points with |g| ≤ |g_x|, none but x itself;
    # for f = x² valid are all, and the integral is exact
    rising = CrediblePath(Constant(0.0), quadrature=Gauss(5))(ap.Field(lambda x: x[:, 0] ** 2), points((1.0,)))
    assert float(rising.values) == pytest.approx(1.0, abs=0.02)
    assert float(rising.parts["valid_share"]) == 1.0
    falling = CrediblePath(Constant(0.0), quadrature=Gauss(5))(
        ap.Field(lambda x: -((2 - x[:, 0]) ** 3)), points((1.0,))
    )
    assert float(falling.parts["zero_count_share"]) == 1.0
    assert float(falling.values) == 0.0


def test_credible_paths_where_nothing_moves_or_slopes() -> None:
    same = CrediblePath(Given(AB))(ap.Field(Example1()), AB)
    assert not bool(same.values.any())
    assert any("equals the input" in w for w in same.warnings)
    flat = CrediblePath(Constant(2.0))(ap.Field(planted.Saturated()), points((3.0, 1.0)))
    assert not bool(flat.values.any())
    assert flat.parts["zero_count_share"].tolist() == [1.0]
    assert any("get 0" in w for w in flat.warnings)


def test_credible_paths_by_default_and_their_budget() -> None:
    a = CrediblePath()(ap.Field(planted.conv_net(), bounds=(0, 1)), PICTURES, target=1)
    assert a.references is not None
    assert a.references.rows.shape == (2, 3, 2, 8, 8)
    assert float((a.references.rows - PICTURES[:, None]).abs().min()) >= 5 / 255 - 1e-9
    assert bool(torch.isfinite(a.values).all())
    with pytest.raises(ConfigError, match="2 for 3 baselines"):
        CrediblePath(total=2)


# -- integrated gradients of and at inner sites ------------------------------------------------------------------


def test_integrated_gradients_at_a_layer_and_of_a_neuron() -> None:
    net = planted.dense_net()
    after, x = net.get_submodule("2"), ROWS
    weight = after.get_parameter("weight").detach()
    hidden = torch.tanh(net.get_submodule("0")(x)).detach()
    layer = ap.IntegratedGradients()(ap.Field(net, site=ap.At("1")), x, target=1)
    torch.testing.assert_close(layer.values, hidden * weight[1], rtol=0, atol=1e-12)
    neuron = ap.IntegratedGradients()(ap.Field(net, score=ap.Neuron(ap.At("1"), (3,))), x)
    alone = ap.IntegratedGradients()(ap.Field(lambda z: torch.tanh(net.get_submodule("0")(z))), x, target=3)
    torch.testing.assert_close(neuron.values, alone.values, rtol=0, atol=1e-12)
    for method in (SPI(paths=2), CrediblePath(Constant(0.1), 6), NeFLAG(2), LPI(Constant(0.0))):
        found = method(ap.Field(net, site=ap.At("1")), x, target=1)
        assert found.values.shape == (3, 16)
        assert bool(torch.isfinite(found.values).all())
