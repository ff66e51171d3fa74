"""RISE: masks as published, closed forms of linear scores, unbiasedness and standard errors over many seeds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import apportion as ap
from apportion import planted
from apportion.core.errors import ConfigError, InputError
from apportion.core.streams import Stream
from apportion.parts.masks.samplers import SmoothGrids

DOUBLE = torch.float64
ONE = lambda x: x.sum((1, 2, 3)) * 0 + 1  # noqa: E731


def masks(kind: SmoothGrids, space: tuple[int, ...], count: int) -> Tensor:
    stream = Stream.of(0, ["one"], "masks")
    like = torch.zeros(1, 3, *space, dtype=DOUBLE)
    return kind.masks(stream, like, torch.zeros(count, dtype=torch.long), torch.arange(count))[:, 0]


# -- the masks ----------------------------------------------------------------------------------------


def enlarged(grid: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear interpolation point by point, cell centres at halves, the border cell going on outside."""
    out = np.zeros(size)
    for i in range(size[0]):
        for j in range(size[1]):
            total = 0.0
            a, b = (i + 0.5) * grid.shape[0] / size[0] - 0.5, (j + 0.5) * grid.shape[1] / size[1] - 0.5
            for k in range(2):
                for n in range(2):
                    row, column = math.floor(a) + k, math.floor(b) + n
                    weight = (1 - abs(a - row)) * (1 - abs(b - column))
                    total += weight * grid[np.clip(row, 0, grid.shape[0] - 1), np.clip(column, 0, grid.shape[1] - 1)]
            out[i, j] = total
    return out


def test_masks_are_pieces_of_enlarged_grids() -> None:
    """The authors' recipe, with the grid and the shift read from the stream: cells of ceil(H / s), one cell more."""
    kind, space = SmoothGrids(3, 0.4), (7, 8)
    number = Stream.of(0, ["one"], "masks").uniform(
        torch.zeros(1, 11, dtype=DOUBLE), torch.zeros(6, dtype=torch.long), torch.arange(6)
    )
    for mask, drawn in zip(masks(kind, space, 6), number, strict=True):
        grid = (drawn[2:] < 0.4).double().reshape(3, 3).numpy()
        cell = (math.ceil(7 / 3), math.ceil(8 / 3))
        big = enlarged(grid, (4 * cell[0], 4 * cell[1]))
        y, x = int(drawn[0] * cell[0]), int(drawn[1] * cell[1])
        assert np.allclose(mask.numpy(), big[y : y + 7, x : x + 8], atol=1e-12)


def test_mean_of_masks_is_p_everywhere() -> None:
    found = masks(SmoothGrids(3, 0.3), (9, 10), 6000)
    z = (found.mean(0) - 0.3) / (found.std(0) / 6000**0.5)
    assert float(z.abs().max()) < 4.2  # 90 pixels, 1 in 400
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1


def test_larger_budgets_begin_with_the_same_masks() -> None:
    assert torch.equal(masks(SmoothGrids(), (16, 16), 3), masks(SmoothGrids(), (16, 16), 8)[:3])


# -- closed forms --------------------------------------------------------------------------------------


def test_constant_score_gives_a_map_of_one() -> None:
    """Nothing was seen, and every pixel gets about 1: the dummy principle fails by construction."""
    found = ap.RISE(budget=4000)(ap.Field(ONE), torch.rand(1, 3, 16, 16, dtype=DOUBLE))
    assert isinstance(found.values, Tensor)
    assert float(found.values.min()) > 0.9
    assert float(found.values.max()) < 1.1
    centred = ap.RISE(budget=4000, centred=True)(ap.Field(ONE), torch.rand(1, 3, 16, 16, dtype=DOUBLE))
    assert isinstance(centred.values, Tensor)
    assert float(centred.values.abs().max()) < 1e-12


def test_linear_score_with_hard_masks() -> None:
    """E = p Σ w + (1 - p) w_i for the plain map; the centred one gives w, to 2e-3."""
    w, p = [1.0, -2.0, 3.0, 0.5, 0.0], 0.3
    field, x = ap.Field(planted.Linear(w)), torch.ones(1, 5, dtype=DOUBLE)
    weight, hard = torch.tensor(w, dtype=DOUBLE), SmoothGrids(None, p)
    plain = ap.RISE(budget=20_000, masks=hard)(field, x)
    error = plain.parts["standard_error"]
    assert isinstance(plain.values, Tensor)
    assert isinstance(error, Tensor)
    want = p * weight.sum() + (1 - p) * weight
    assert float(((plain.values - want) / error).abs().max()) < 4
    assert float(((plain.values - weight) / error).abs().max()) > 20  # biased, however many masks
    few = ap.RISE(budget=4000, masks=SmoothGrids(None, 0.5), centred=True)(field, x.expand(1000, -1), ids=range(1000))
    assert isinstance(few.values, Tensor)
    assert torch.allclose(few.values.mean(0), weight, atol=6e-3)  # four million masks: three standard errors


def test_hard_centred_masks_estimate_banzhaf_values() -> None:
    """At p = ½ on a product of features: E[f | i kept] - E[f | i gone] = ½^(d-1)."""
    field, x = ap.Field(planted.Product()), torch.ones(1, 3, dtype=DOUBLE)
    found = ap.RISE(budget=20_000, masks=SmoothGrids(None), centred=True)(field, x)
    assert isinstance(found.values, Tensor)
    assert torch.allclose(found.values, torch.full((1, 3), 0.25, dtype=DOUBLE), atol=0.02)


# -- 2,000 seeds -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("centred", [False, True])
def test_unbiased_and_covered(centred: bool) -> None:
    """Over 2,000 seeds: the mean is what masks of p give in expectation, and 95 % ± 2 of intervals hold it."""
    n, d, p = 2000, 4, 0.4
    net = planted.dense_net(d)
    x = torch.tensor([[0.8, -1.0, 0.5, 1.2]], dtype=DOUBLE)
    subsets = ((torch.arange(2**d)[:, None] >> torch.arange(d)) & 1).double()
    chance = (p**subsets * (1 - p) ** (1 - subsets)).prod(1)
    f = net(subsets * x)[:, 1].detach()
    shown = (chance * f) @ subsets / p
    want = shown - (chance * f) @ (1 - subsets) / (1 - p) if centred else shown
    method = ap.RISE(budget=200, masks=SmoothGrids(None, p), centred=centred)
    found = method(ap.Field(net), x.expand(n, -1).contiguous(), target=1, ids=range(n))
    error = found.parts["standard_error"]
    assert isinstance(found.values, Tensor)
    assert isinstance(error, Tensor)
    z = (found.values.mean(0) - want) / (found.values.std(0) / n**0.5)
    assert float(z.abs().max()) < 3.3  # Bonferroni over the eight numbers of this test, 1 in 100
    inside = ((found.values - want).abs() <= 1.96 * error).double().mean()
    assert abs(float(inside) - 0.95) <= 0.02


# -- stopping ----------------------------------------------------------------------------------------------


def test_stops_at_the_precision() -> None:
    x = torch.rand(2, 1, 12, 12, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    field = ap.Field(lambda z: z[:, :, :6].mean((1, 2, 3)))
    rough = ap.RISE(budget=8000, precision=0.2)(field, x, ids=[0, 1])
    used, error = rough.parts["masks"], rough.parts["standard_error"]
    assert isinstance(rough.values, Tensor)
    assert isinstance(used, Tensor)
    assert isinstance(error, Tensor)
    assert bool((used < 8000).all())
    assert bool((used % 256 == 0).all())
    assert bool((error.amax(1) <= 0.2 * (rough.values.amax(1) - rough.values.amin(1))).all())
    assert torch.equal(rough.cost.forward.double(), used)
    alone = ap.RISE(budget=8000, precision=0.2)(field, x[1:], ids=[1])
    assert isinstance(alone.values, Tensor)
    assert torch.allclose(alone.values, rough.values[1:], atol=1e-12)
    fine = ap.RISE(budget=300, precision=0.001)(field, x, ids=[0, 1])
    assert any("not reached precision 0.001" in w for w in fine.warnings)
    assert int(fine.cost.forward[0]) == 300


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match="at least 2 masks"):
        ap.RISE(budget=1)
    with pytest.raises(ConfigError, match="probability"):
        SmoothGrids(p=1.0)
    with pytest.raises(ConfigError, match="at least one cell"):
        SmoothGrids(cells=0)
    with pytest.raises(ConfigError, match="above 0"):
        ap.RISE(precision=0.0)
    field = ap.Field(lambda a, b: a.sum(1) + b.sum(1))
    with pytest.raises(InputError, match="one tensor"):
        ap.RISE(budget=4)(field, (torch.ones(1, 2), torch.ones(1, 2)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_scores_of_another_dtype_than_the_input(dtype: torch.dtype) -> None:
    """Sums are of the wider of the two, and never of half precision."""
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    explain = ap.RISE(budget=64)
    want = explain(ap.Field(lambda x: x.mean((1, 2, 3))), x, seed=0).values
    found = explain(ap.Field(lambda x: x.mean((1, 2, 3)).to(dtype)), x, seed=0).values
    torch.testing.assert_close(found, want, atol=2e-3 if dtype == torch.float16 else 1e-6, rtol=0)
