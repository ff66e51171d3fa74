"""The earth mover's distance: known answers, a linear program, the bound of coarse cells."""

from __future__ import annotations

import sys
from math import hypot, sqrt
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor

import apportion as ap
from apportion.core.errors import ConfigError, InputError, NonFiniteError
from apportion.metrics import EarthMoverSimilarity

FIELD = ap.Field(lambda x: x.sum((1, 2, 3)))


def some(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def ask(m: Tensor, truth: Any, side: int | None = None, **given: Any) -> Any:
    return EarthMoverSimilarity(side)(FIELD, torch.zeros(len(m), 3, *m.shape[2:]).to(m), m, truth=truth, **given)


def points(high: int, wide: int, *at: tuple[int, int]) -> Tensor:
    out = torch.zeros(high, wide, dtype=torch.float64)
    for place in at:
        out[place] = 1
    return out


def test_mass_spread_evenly_over_the_object_is_all_right() -> None:
    mask = points(7, 9, (1, 2), (1, 3), (5, 8))
    for scale in (1.0, -3.0, 1e-30):  # magnitudes, of which the sum does not count
        assert ask(scale * mask[None, None], mask[None]).values.item() == 1
    assert ask(points(7, 9, (1, 2))[None, None], mask[None]).values.item() < 1  # a third of the object is there


def test_a_point_against_a_point() -> None:
    for a, b in (((0, 0), (0, 4)), ((2, 1), (5, 8)), ((0, 0), (6, 8)), ((6, 0), (0, 8))):
        found = ask(points(7, 9, a)[None, None], points(7, 9, b)[None])
        way = hypot(a[0] - b[0], a[1] - b[1])
        assert found.parts["distance"].item() == pytest.approx(way)
        assert found.values.item() == pytest.approx(1 - way / 10)  # √(6² + 8²), between pixels of opposite corners
    assert found.values.item() == pytest.approx(0)
    two = points(7, 9, (0, 0), (0, 8))  # halves go to the middle, each its own way
    assert ask(two[None, None], points(7, 9, (0, 4))[None]).parts["distance"].item() == pytest.approx(4)
    assert ask(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1)).values.item() == 1  # a picture of one pixel


def program(m: np.ndarray, mask: np.ndarray) -> float:
    """Solve min Σ π d over all pairs of pixels, as the definition has it."""
    high, wide = m.shape
    a, b = (np.abs(v).ravel() / np.abs(v).sum() for v in (m, mask.astype(float)))
    n = high * wide
    way = [[hypot(i // wide - j // wide, i % wide - j % wide) for j in range(n)] for i in range(n)]
    sums = np.concatenate([np.kron(np.eye(n), np.ones(n)), np.kron(np.ones(n), np.eye(n))])
    exact = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}  # 1e-7 unless told
    found = linprog(np.ravel(way), A_eq=sums, b_eq=np.concatenate([a, b]), method="highs", options=exact)
    assert found.success
    return 1 - found.fun / hypot(high - 1, wide - 1)


def test_the_linear_program_says_the_same() -> None:
    maps, mask = some(3, 1, 5, 6), some(3, 5, 6, seed=2) > 0.4
    maps[1] = maps[1] ** 9  # nearly all on a few
    found = ask(maps, mask).values
    want = [program(m.numpy(), t.numpy()) for m, t in zip(maps[:, 0], mask, strict=True)]
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-9)
    squared = 1 - ((1 - torch.tensor(want)) ** 2)  # another ground distance would not do
    assert (found - squared).abs().min() > 1e-3


def test_maps_of_channels_and_precisions() -> None:
    maps, mask = some(2, 3, 6, 6), torch.stack([points(6, 6, (1, 1), (1, 2)), points(6, 6, (4, 5))])
    found = ask(maps, mask).values
    torch.testing.assert_close(ask(maps.sum(1, keepdim=True), mask).values, found)
    single = ask(maps.float(), mask).values
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, found.float(), rtol=0, atol=1e-5)
    one_by_one = [ask(maps[i : i + 1], mask[i : i + 1]).values.item() for i in range(2)]
    assert one_by_one == found.tolist()


def test_the_wrong_place_is_worse_the_farther_it_is() -> None:
    mask = points(12, 12, *[(i, j) for i in range(2, 5) for j in range(2, 5)])
    near, far = mask.roll(1, 1), mask.roll((7, 7), (0, 1))
    right, shifted, wrong, even = (
        ask(m[None, None], mask[None]).values.item() for m in (mask, near, far, torch.ones_like(mask))
    )
    assert right > shifted > even > wrong
    assert shifted == pytest.approx(1 - 1 / hypot(11, 11))  # a translation goes by its length


def test_maps_of_zeros_empty_masks_and_nan() -> None:
    mask = torch.stack([points(5, 5, (1, 1)), torch.zeros(5, 5), points(5, 5, (2, 2))])
    maps = torch.stack([torch.zeros(1, 5, 5), torch.ones(1, 5, 5), torch.ones(1, 5, 5)])
    found = ask(maps, mask)
    assert found.values.isnan().tolist() == [True, True, False]
    assert found.undefined["a map of zeros"].tolist() == [True, False, False]
    assert found.undefined["no object"].tolist() == [False, True, False]
    with pytest.raises(NonFiniteError):
        ask(maps / 0, mask)


@pytest.mark.parametrize("shape", [(16, 16), (13, 22)])
def test_coarse_cells_move_the_value_by_no_more_than_is_said(shape: tuple[int, int]) -> None:
    mask, maps = torch.zeros(2, *shape), some(2, 1, *shape) ** 3
    mask[0, 1:6, 2:7], mask[1, 5, 7] = 1, 1
    found, farthest = ask(maps, mask), hypot(shape[0] - 1, shape[1] - 1)
    for side in (4, 5, 8):
        coarse = ask(maps, mask, side).values
        each = -(-max(shape) // side)
        apart = (coarse - found.values).abs()
        assert bool((apart <= sqrt(2) * (each - 1) / farthest + 1e-12).all())
        assert bool((apart > 0).all())
    assert torch.equal(ask(maps, mask, max(shape)).values, found.values)
    block = torch.zeros(1, 1, 8, 8).double()
    block[..., 2:4, 4:6] = 1  # one cell, whatever lies where in it
    assert ask(points(8, 8, (3, 5))[None, None], block[0], 4).values.item() == 1


def test_what_would_take_minutes_is_refused_unless_asked_for() -> None:
    x, mask = torch.zeros(1, 1, 224, 224), torch.zeros(1, 224, 224)
    mask[0, :50, :50] = 1
    with pytest.raises(InputError, match=r"(?s)224 × 224 pixels .* 2500.*side=32"):
        ask(x, mask)
    with pytest.raises(InputError, match="truth of"):  # before any map is made
        ap.evaluate({"g": ap.Gradient()}, FIELD, x, [EarthMoverSimilarity()], truth=mask)
    assert ask(x + mask, mask, 16).values.item() == 1
    with pytest.raises(ConfigError, match="side"):
        EarthMoverSimilarity(0)


def test_what_pot_does_not_solve_and_without_pot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ot.emd2", lambda *_, **__: (0.0, {"warning": "numItermax reached"}))
    with pytest.raises(InputError, match="example 0 that POT cannot solve: numItermax"):
        ask(torch.ones(1, 1, 4, 4), torch.ones(1, 4, 4))
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(ConfigError, match="evaluation extra"):
        ask(torch.ones(1, 1, 4, 4), torch.ones(1, 4, 4))


CONTROLS = [ap.controls.Laplace(), ap.controls.Edges(), ap.controls.AllOnes()]


def test_the_gradient_finds_tetrominoes_that_are_added_and_edge_filters_do_not() -> None:
    p = ap.planted.tetrominoes(ap.planted.Scenario.LINEAR, count=12)
    found = EarthMoverSimilarity()(ap.Field(p.model), p.x, ap.Gradient(), truth=p.truth, controls=CONTROLS)
    assert found.values.tolist() == pytest.approx([1.0] * 12)  # the same for every pixel of both
    assert all(found.beats(name) for name in found.controls)
    away = ask(1.0 - p.truth[:, None].double(), p.truth)
    assert all(away.values.mean() < s.values.mean() for s in found.controls.values())


def test_edge_filters_beat_the_gradient_by_this_measure_on_xor() -> None:
    """Both tetrominoes decide, and a gradient is nearly all on one: on pixels of the truth, but far from the others."""
    p = ap.planted.tetrominoes(ap.planted.Scenario.XOR, count=40)
    field, asked = ap.Field(p.model), {"truth": p.truth, "controls": CONTROLS}
    gradient = EarthMoverSimilarity()(field, p.x, ap.Gradient(), **asked)
    inside = ap.metrics.EnergyPointingGame("absolute")(field, p.x, ap.Gradient(), **asked)
    assert inside.values.tolist() == pytest.approx([1.0] * 40)
    for name in ("Laplace", "Edges"):
        assert 0.8 < gradient.controls[name].values.mean() < 0.85
        assert gradient.controls[name].values.mean() > gradient.values.mean() + 0.03
    together = torch.where(p.truth[:1], torch.arange(8)[:, None] // 4, 2)[:, None]  # the T, the L, and the rest
    shares = ap.Shapley(ap.groups.Labels(together[0]))(field, p.x)
    right = EarthMoverSimilarity()(field, p.x, shares, **asked)
    assert right.values.tolist() == pytest.approx([1.0] * 40)  # neither says anything alone: half of it each
    assert all(right.beats(name) for name in right.controls)
