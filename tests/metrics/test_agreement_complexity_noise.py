"""Metrics that look at maps: exact answers, slow twins, and wrong answers they must reject."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import apportion as ap
from apportion.core.errors import ConfigError, InputError
from apportion.metrics import Agreement, Complexity, EffectiveComplexity, MapNoise, MassOutside, Sparseness

X = torch.rand(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LINEAR = ap.Field(lambda x: x @ torch.tensor([3.0, -2.0, 1.0, 0.5, 0.0, 0.0], dtype=torch.float64))
PICTURES = ap.Field(lambda x: x.sum((1, 2, 3)))


def some(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# -- sparseness and entropy -------------------------------------------------------------------------


def gini(values: list[float]) -> float:
    """Mean absolute difference over twice the mean: another formula of the same index."""
    n, mean = len(values), sum(values) / len(values)
    return sum(abs(a - b) for a in values for b in values) / (2 * n * n * mean)


def test_sparseness_is_the_mean_difference() -> None:
    maps = some(3, 6)
    found = Sparseness()(LINEAR, X, maps).values
    assert found.tolist() == pytest.approx([gini(row.abs().tolist()) for row in maps])


def test_entropy_of_known_shares() -> None:
    maps = torch.tensor([[1.0] * 6, [0, 0, 0, 0, 0, -7.0], [3.0, -1.0, 0, 0, 0, 0]])
    found = Complexity()(LINEAR, X, maps).values
    assert found.tolist() == pytest.approx([math.log(6), 0, math.log(4) - 0.75 * math.log(3)])
    assert Complexity()(LINEAR, X, torch.zeros(3, 6)).undefined["a map of zeros"].all()


def test_a_spread_map_is_neither_sparse_nor_simple() -> None:
    sharp, spread = some(3, 6) ** 5, 1 + 0.01 * some(3, 6)
    assert bool((Sparseness()(LINEAR, X, sharp).values > Sparseness()(LINEAR, X, spread).values).all())
    assert bool((Complexity()(LINEAR, X, sharp).values < Complexity()(LINEAR, X, spread).values).all())


def test_effective_complexity_of_a_linear_model() -> None:
    """The right ranking needs the players with weight, the reversed one all of them."""
    x = torch.ones(1, 6, dtype=torch.float64)
    right = ap.GradientTimesInput()(LINEAR, x)
    exact = EffectiveComplexity(tolerance=0.0)
    assert exact(LINEAR, x, right).values.item() == pytest.approx(4 / 6)
    assert exact(LINEAR, x, 1 / (0.1 + right.values.abs())).values.item() == 1
    found = exact(LINEAR, x, right).curves["score"]
    assert found.y[0].tolist() == pytest.approx([0, 3, 1, 2, 2.5, 2.5, 2.5])
    loose = EffectiveComplexity(tolerance=0.2)  # 3 - 2 + 1 is .5 of 2.5 away, one fifth
    assert loose(LINEAR, x, right).values.item() == pytest.approx(3 / 6)


def test_effective_complexity_where_nothing_changes() -> None:
    flat = ap.Field(lambda x: 0 * x.sum(1) + 2)
    assert EffectiveComplexity()(flat, X, some(3, 6)).undefined["removing everything changes nothing"].all()
    with pytest.raises(ConfigError, match="tolerance"):
        EffectiveComplexity(tolerance=1.0)


# -- agreement --------------------------------------------------------------------------------------


def slow(a: list[float], b: list[float], k: int) -> dict[str, float]:
    """The six definitions of Krishna et al. (2022), by loops; for values without ties."""
    n = len(a)
    first, second = (sorted(range(n), key=lambda i, v=v: -abs(v[i])) for v in (a, b))
    place = {i: r for r, i in enumerate(second)}
    both = [i for i in first[:k] if i in second[:k]]
    same = [i for i, j in zip(first[:k], second[:k], strict=True) if i == j]
    pairs = list(itertools.combinations(range(n), 2))
    alike = sum((abs(a[i]) > abs(a[j])) == (abs(b[i]) > abs(b[j])) for i, j in pairs)
    apart = sum((r - place[i]) ** 2 for r, i in enumerate(first))
    return {
        "feature": len(both) / k,
        "rank": len(same) / k,
        "sign": sum(a[i] * b[i] > 0 for i in both) / k,
        "signed_rank": sum(a[i] * b[i] > 0 for i in same) / k,
        "rank_correlation": 1 - 6 * apart / (n * (n * n - 1)),
        "pairwise_rank": alike / len(pairs),
    }


def test_agreement_by_its_definitions() -> None:
    one, other = some(3, 6), some(3, 6, seed=5)
    for k in (1, 2, 4, 6):
        parts = Agreement(k=k)(LINEAR, X, one, truth=other).parts
        for row in range(3):
            want = slow(one[row].tolist(), other[row].tolist(), k)
            assert {name: float(v[row]) for name, v in parts.items()} == pytest.approx(want)


def test_a_map_agrees_with_itself_and_not_with_its_opposite() -> None:
    maps = some(3, 6)
    for v in Agreement(k=3)(LINEAR, X, maps, truth=maps).parts.values():
        assert v.tolist() == [1.0, 1.0, 1.0]
    turned = Agreement(k=3)(LINEAR, X, maps, truth=-maps).parts
    assert turned["feature"].tolist() == [1, 1, 1]
    assert turned["sign"].tolist() == turned["signed_rank"].tolist() == [0, 0, 0]
    upside_down = Agreement("rank_correlation")(LINEAR, X, maps, truth=1 / maps).values
    assert upside_down.tolist() == pytest.approx([-1, -1, -1])


def test_the_gradient_of_a_logistic_regression_agrees_with_its_weights() -> None:
    """The benchmark of OpenXAI: all six are 1 for the class the weights speak for."""
    w = torch.tensor([3.0, -2.0, 1.0, 0.5, -0.2, 0.1], dtype=torch.float64)
    field = ap.Field(lambda x: x @ w, ap.Custom(lambda out: out.sigmoid()))
    found = Agreement(k=6)(field, X, ap.Gradient(), truth=w.expand(3, 6)).parts
    assert all(v.tolist() == pytest.approx([1, 1, 1]) for v in found.values())


def test_ties_are_drawn_and_constant_maps_have_no_correlation() -> None:
    flat = torch.ones(3, 6, dtype=torch.float64)
    found = Agreement("rank_correlation")(LINEAR, X, flat, truth=some(3, 6))
    assert found.undefined["magnitudes that are all equal"].all()
    hits = [float(Agreement(k=1)(LINEAR, X[:1], flat[:1], truth=torch.eye(6)[:1], seed=s).values) for s in range(60)]
    assert 0 < sum(hits) < 30  # a sixth in expectation, where the layout of memory would give 60 or 0


def test_what_cannot_be_compared() -> None:
    maps = some(3, 6)
    with pytest.raises(ConfigError, match="no truth"):
        Agreement()(LINEAR, X, maps)
    with pytest.raises(InputError, match=r"k=7 of 6"):
        Agreement(k=7)(LINEAR, X, maps, truth=maps)
    with pytest.raises(ConfigError, match=r"k=1\.5"):
        Agreement(k=1.5)
    large = torch.zeros(1, 1, 80, 80)
    with pytest.raises(InputError, match="4096"):
        Agreement("pairwise_rank")(PICTURES, large, large, truth=large)
    assert "pairwise_rank" not in Agreement()(PICTURES, large, large, truth=large).parts


# -- noise ------------------------------------------------------------------------------------------


def test_white_noise_is_rough_and_a_blurred_map_is_not() -> None:
    x = torch.zeros(2, 3, 96, 96)
    found = MapNoise()(PICTURES, x, some(2, 1, 96, 96), ids=["a", "b"])
    assert found.values.tolist() == pytest.approx([math.sqrt(8)] * 2, rel=0.03)
    assert found.parts["white"].tolist() == pytest.approx([math.sqrt(8)] * 2, rel=0.03)
    assert bool((found.parts["blurred"] < 0.25 * found.values).all())
    assert found.parts["flips"].tolist() == pytest.approx([0.5, 0.5], abs=0.02)
    share = float((torch.fft.fftfreq(192)[:, None] ** 2 + torch.fft.fftfreq(192) ** 2 > 0.0625).double().mean())
    assert found.parts["frequency"].tolist() == pytest.approx([share] * 2, abs=0.03)


def test_noise_of_maps_that_can_be_counted() -> None:
    x = torch.zeros(1, 1, 4, 4)
    board = (torch.arange(4)[:, None] + torch.arange(4)).remainder(2).double()[None, None] * 2 - 1
    found = MapNoise()(PICTURES, x, board).parts
    assert found["variation"].item() == pytest.approx(24 * 2 / 16)
    assert found["flips"].item() == 1
    assert found["frequency"].item() > 0.8
    ramp = torch.arange(16.0).reshape(1, 1, 1, 16).expand(1, 1, 16, 16).double()
    assert MapNoise("frequency")(PICTURES, torch.zeros(1, 1, 16, 16), ramp).values.item() < 0.01


def test_what_counts_as_fine_is_as_asked() -> None:
    """A wave of .125 cycles a pixel lies above .1 and below .2; a mirrored one leaks a little."""
    wave = torch.cos(torch.pi / 4 * (torch.arange(32) + 0.5)).double().expand(1, 1, 32, 32)
    x = torch.zeros(1, 1, 32, 32)
    shares = [MapNoise("frequency", above=a)(PICTURES, x, wave).values.item() for a in (0.1, 0.2)]
    assert shares == pytest.approx([1, 0], abs=1e-6)


def test_noise_where_there_is_no_map_to_speak_of() -> None:
    x = torch.zeros(1, 1, 4, 4)
    assert MapNoise()(PICTURES, x, torch.zeros(1, 1, 4, 4)).undefined["a map of zeros"].all()
    assert MapNoise("frequency")(PICTURES, x, torch.ones(1, 1, 4, 4)).undefined["a constant map"].all()
    assert MapNoise()(PICTURES, x, torch.ones(1, 1, 4, 4)).values.item() == 0
    with pytest.raises(InputError, match="pictures"):
        MapNoise()(LINEAR, X, some(3, 6))


@pytest.mark.parametrize("size", [1e-30, 1e30])
@pytest.mark.parametrize("of", ["variation", "frequency", "flips"])
def test_noise_knows_no_unit(of: str, size: float) -> None:
    """Squares of gradients may be tiny; in float32 their own squares are 0, and products of neighbours have no sign."""
    x, maps = torch.zeros(2, 1, 16, 16), some(2, 1, 16, 16).float()
    metric = MapNoise(of)  # pyright: ignore[reportArgumentType]
    usual, found = (metric(PICTURES, x, m, ids=["a", "b"]) for m in (maps, size * maps))
    assert found.values.tolist() == pytest.approx(usual.values.tolist(), rel=1e-4)
    assert found.parts["blurred"].tolist() == pytest.approx(usual.parts["blurred"].tolist(), rel=1e-4)


def test_mass_outside_the_object() -> None:
    """Counted by hand; beside it the area outside for white noise, and more than before once a blur has spread it."""
    x, on = torch.zeros(2, 3, 48, 48), torch.zeros(2, 48, 48, dtype=torch.bool)
    on[:, 10:20, 10:20] = True
    maps = torch.zeros(2, 1, 48, 48)
    maps[0, 0, 10, 10], maps[0, 0, 11, 11], maps[0, 0, 40, 40] = 1.0, -1.0, -2.0
    maps[1] = on[1].float()
    found = MassOutside()(PICTURES, x, maps, truth=on, ids=["a", "b"])
    assert found.values.tolist() == [0.5, 0.0]
    assert found.parts["white"].tolist() == pytest.approx([1 - 100 / 48**2] * 2, abs=0.02)
    assert float(found.parts["blurred"][1]) > 0.1
    share = ap.metrics.EnergyPointingGame("absolute")(PICTURES, x, maps, truth=on).values
    assert torch.equal(found.values, 1 - share)
    nothing = MassOutside()(PICTURES, x, 0 * maps, truth=on)
    assert nothing.undefined["a map of zeros"].all()
    assert MassOutside()(PICTURES, x, maps, truth=~(on | ~on)).undefined["no object"].all()


def test_smoothing_lowers_the_noise() -> None:
    """What SmoothGrad is for, on a network with shattered gradients."""
    wave = ap.Field(lambda x: (90 * x).sin().sum((1, 2, 3)) / 45 + (x**2).sum((1, 2, 3)))
    x = torch.linspace(0.5, 1, 256).reshape(1, 1, 16, 16)
    rough = MapNoise()(wave, x, ap.Gradient()).values
    smooth = MapNoise()(wave, x, ap.SmoothGrad(samples=64)).values
    assert float(smooth) < 0.5 * float(rough)
