"""Learned masks: the numbers of the papers, and twins that read like them, one example and plain loops."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apportion as ap
from apportion import planted
from apportion.core.errors import ConfigError, InputError
from apportion.parts.baselines.simple import blur
from apportion.parts.subsets import SmoothMask, area_loss, smooth_max
from apportion.parts.subsets.pictures import shifted
from apportion.parts.subsets.smooth import Pyramid

F64 = torch.float64


def few(count: int = 2, side: int = 8) -> Tensor:
    return torch.rand(count, 2, side, side, generator=torch.Generator().manual_seed(5), dtype=F64)


# -- extremal perturbation ----------------------------------------------------------------------------


def test_area_loss_of_all_ones_and_of_the_right_area():
    """All ones at a = .1 lose .9, a mask of just that area 0 (methods.md 3G), in any order."""
    ones, area = torch.ones(1, 100, dtype=F64), torch.tensor([0.1])
    right = torch.zeros(1, 100, dtype=F64)
    right[0, torch.randperm(100, generator=torch.Generator().manual_seed(0))[:10]] = 1
    assert float(area_loss(ones, area)) == pytest.approx(0.9, abs=1e-12)
    assert float(area_loss(right, area)) == pytest.approx(0.0, abs=1e-12)
    assert float(area_loss(ones - right, area)) == pytest.approx(0.8, abs=1e-12)


def test_area_loss_is_that_of_the_sorted_mask_and_its_gradient_takes_no_side():
    mask = torch.rand(3, 40, generator=torch.Generator().manual_seed(1), dtype=F64)
    for a in (0.1, 0.25, 0.5):
        goal = torch.zeros(40, dtype=F64)
        goal[int(40 * (1 - a)) :] = 1
        plain = ((mask.sort(1).values - goal) ** 2).mean(1)
        torch.testing.assert_close(area_loss(mask, torch.full((3,), a)), plain)
    flat = torch.full((1, 10), 0.5, dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(area_loss(flat, torch.tensor([0.3])).sum(), flat)
    assert float(slope.max() - slope.min()) == 0  # a sort would raise the last three and lower the others
    goal = torch.tensor([0.0] * 7 + [1.0] * 3, dtype=F64)
    (sided,) = torch.autograd.grad(((flat.sort(dim=1, stable=True).values - goal) ** 2).mean(), flat)
    assert float(sided.max() - sided.min()) > 0.1
    assert float(slope.sum()) == pytest.approx(float(sided.sum()))


def test_smooth_max():
    """A pool of .4 and .5 gives .488 (methods.md 3G)."""
    assert float(smooth_max(torch.tensor([0.4, 0.5], dtype=F64), 20.0)) == pytest.approx(0.488, abs=5e-4)
    assert float(smooth_max(torch.tensor([0.4, 0.5], dtype=F64), 1e4)) == pytest.approx(0.5)


def smooth_mask(cells: Tensor, size: int, step: int, sigma: float, cold: float) -> Tensor:
    """Each pixel by itself, over all cells within reach; the outermost go on outside the grid, centered on it."""
    reach = 1 + math.ceil(sigma / step)
    count = len(cells)
    skip, middle = (count * step - size) // 2, (step - 1) / 2
    out = torch.zeros(size, size, dtype=F64)
    for u in range(skip, skip + size):
        for v in range(skip, skip + size):
            found = []
            for i in range(u // step - reach, u // step + reach + 1):
                for j in range(v // step - reach, v // step + reach + 1):
                    z = math.hypot(u - step * i - middle, v - step * j - middle) / sigma
                    cell = cells[min(max(i, 0), count - 1), min(max(j, 0), count - 1)]
                    found.append(math.exp(-2 * max(z - 0.5, 0) ** 2) * cell)
            values = torch.stack(found)
            out[u - skip, v - skip] = (values * torch.softmax(cold * values, 0)).sum()
    return out


def test_smooth_masks_and_their_gradient():
    cells = torch.rand(1, 1, 3, 3, generator=torch.Generator().manual_seed(2), dtype=F64).requires_grad_()
    fast = SmoothMask(3, 4.0, 20.0)(cells, (8, 8))
    slow = smooth_mask(cells[0, 0], 8, 3, 4.0, 20.0)
    torch.testing.assert_close(fast[0, 0], slow, rtol=1e-12, atol=1e-12)
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(3), dtype=F64)
    (a,) = torch.autograd.grad((fast * weight).sum(), cells)
    (b,) = torch.autograd.grad((slow * weight).sum(), cells)
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    hard = smooth_mask(cells[0, 0], 8, 3, 4.0, 1e3)  # the maximum itself
    assert float((hard - slow).detach().abs().max()) > 1e-2


def test_masks_of_equal_cells_are_no_higher_at_the_border():
    mask = SmoothMask(3, 4.0)(torch.ones(1, 1, 6, 6, dtype=F64), (18, 18))[0, 0]
    torch.testing.assert_close(mask, mask[9:12, 9:12].repeat(6, 6))


@pytest.mark.parametrize(("step", "sigma", "side"), [(3, 6.0, 48), (7, 21.0, 224), (4, 8.0, 46)])
def test_no_border_has_less_of_its_cells_than_the_other(step, sigma, side):
    """What falls slower while all cells fall alike keeps the area: cells from the first pixel on had .44 to 1.8."""
    make = SmoothMask(step, sigma)
    cells = torch.ones(1, 1, *make.cells((side, side)), dtype=F64, requires_grad=True)
    (share,) = torch.autograd.grad(make(cells, (side, side)).sum() / step**2, cells)
    torch.testing.assert_close(share, share.flip(2, 3), rtol=1e-6, atol=1e-6)
    if side % step == 0:
        torch.testing.assert_close(share, torch.ones_like(share), rtol=0, atol=0.1)


def search_of_nothing(margin: bool) -> tuple[float, float]:
    """Seek where every pixel counts the same but for noise: the mean mask at the border and inside."""
    sign = (torch.arange(36)[:, None] + torch.arange(36)) % 2 * 2.0 - 1
    x = sign * (1 + 0.5 * torch.randn(16, 1, 36, 36, generator=torch.Generator().manual_seed(0)))
    search = ap.ExtremalPerturbation(
        (0.15,),
        mask=SmoothMask(3, 6.0),
        steps=200,
        lr=0.02,
        growth=1.01,
        levels=2,
        sigma=8.0,
        flip=False,
        margin=margin,
    )
    search = dataclasses.replace(search, flip=False)
    mask = search(ap.Field(lambda z: 30 * (z * sign).mean((1, 2, 3))), x).values.mean(0)
    inside = mask[3:-3, 3:-3]
    return float((mask.sum() - inside.sum()) / (mask.numel() - inside.numel())), float(inside.mean())


def test_where_nothing_tells_the_border_is_hardly_preferred():
    border, inside = search_of_nothing(margin=False)
    assert 0.5 * inside < border < 2 * inside
    border, inside = search_of_nothing(margin=True)
    assert border < 0.5 * inside


def test_the_margin_is_an_edge_as_any():
    """At σ from the picture e⁻² of what stands at its border."""
    full = SmoothMask(3, 6.0).margin(torch.full((1, 1, 4, 5), 0.5, dtype=F64))[0, 0]
    assert full.shape == (16, 17)
    assert torch.equal(full[6:10, 6:11], torch.full((4, 5), 0.5, dtype=F64))
    assert float(full[0, 8]) == pytest.approx(0.5 * math.exp(-2))
    assert float(full[3, 13]) == pytest.approx(0.5 * math.exp(-2 * (3**2 + 3**2) / 36))


@pytest.mark.parametrize(("at", "margin"), [((8, 8), False), ((0, 8), False), ((16, 16), False), ((0, 8), True)])
def test_the_region_lies_in_the_middle_or_at_the_border_as_the_model_reads(at, margin):
    search = ap.ExtremalPerturbation(
        (64 / 576,), mask=SmoothMask(2, 3.0), steps=200, lr=0.02, growth=1.01, levels=2, sigma=4.0, margin=margin
    )
    search = dataclasses.replace(search, flip=False)
    mask = search(ap.Field(Looking(*at)), stripes()).values[0]
    inside = mask[at[0] : at[0] + 8, at[1] : at[1] + 8]
    assert float(inside.mean()) > 0.7
    assert float(inside.sum()) > 0.6 * float(mask.sum())


def test_pyramid_is_linear_between_levels_and_sharp_at_one():
    x = few(1)
    pyramid, owner = Pyramid(x, 3, 2.0), torch.zeros(1, dtype=torch.long)
    for m, want in ((1.0, x), (0.0, blur(x, 2.0)), (0.25, (blur(x, 2.0) + blur(x, 1.0)) / 2), (0.5, blur(x, 1.0))):
        torch.testing.assert_close(pyramid(torch.full((1, 1, 8, 8), m, dtype=F64), owner), want)


def extremal(
    net: nn.Module, x: Tensor, target: int, area: float, steps: int, *, momentum: float = 0.9, keep: bool = True
) -> Tensor:
    """The search for one picture and one area, as the paper and its code have it, by plain autograd."""
    levels = torch.stack([blur(x, 2.0)[0], blur(x, 1.0)[0], x[0]])
    cells = torch.ones(4, 4, dtype=F64, requires_grad=True)
    velocity = None
    for t in range(steps):
        mask = smooth_mask(cells, 8, 2, 3.0, 20.0)
        kept = mask if keep else 1 - mask
        low = (kept.detach() * 2).floor().clamp(max=1).long()
        share = kept * 2 - low
        z = torch.zeros(2, 8, 8, dtype=F64)
        for u in range(8):
            for v in range(8):
                first, second = levels[low[u, v], :, u, v], levels[low[u, v] + 1, :, u, v]
                z[:, u, v] = first + share[u, v] * (second - first)
        z = z.flip(2) if t % 2 == 0 else z
        goal = torch.zeros(64, dtype=F64)
        goal[int(64 * (1 - area)) :] = 1
        score = net(z[None])[0, target]
        ties = mask.detach().flatten().round(decimals=3)
        shared = torch.stack([goal[(ties.sort().values == v)].mean() for v in ties])
        regular = (mask.flatten() - shared).square().mean()  # the goals of equal values, averaged
        loss = (-score if keep else score) + 300 * 1.0035**t * regular
        (slope,) = torch.autograd.grad(loss, cells)
        velocity = slope if velocity is None else momentum * velocity + (1 - momentum) * slope
        with torch.no_grad():
            cells -= 0.01 * velocity
            cells.clamp_(0, 1)
    return smooth_mask(cells, 8, 2, 3.0, 20.0).detach()


def test_extremal_perturbation_is_its_twin():
    net, x = planted.conv_net(), few()
    areas = (0.2, 0.5)
    search = ap.ExtremalPerturbation(areas, mask=SmoothMask(2, 3.0), steps=4, levels=3, sigma=2.0)
    a = search(ap.Field(net), x, target=[1, 2])
    for b, target in enumerate((1, 2)):
        for i, area in enumerate(areas):
            twin = extremal(net, x[b : b + 1], target, area, 4)
            torch.testing.assert_close(a.parts["masks"][b, i], twin, rtol=1e-9, atol=1e-9)
    search = ap.ExtremalPerturbation((0.2,), ap.subsets.Delete(), SmoothMask(2, 3.0), steps=4, levels=3, sigma=2.0)
    twin = extremal(net, x[:1], 1, 0.2, 4, keep=False)
    torch.testing.assert_close(search(ap.Field(net), x[:1], target=1).parts["masks"][0, 0], twin, rtol=1e-9, atol=1e-9)
    wrong = extremal(net, x[:1], 1, 0.2, 4, momentum=0.5)
    assert float((a.parts["masks"][0, 0] - wrong).abs().max()) > 1e-3
    torch.testing.assert_close(a.values, a.parts["masks"].mean(1))
    torch.testing.assert_close(a.parts["area"], a.parts["masks"].mean((2, 3)))
    z = Pyramid(x, 3, 2.0)(a.parts["masks"][:, 1:2], torch.arange(2))
    torch.testing.assert_close(a.parts["score"][:, 1, 0], net(z)[[0, 1], [1, 2]].detach())


class Looking(nn.Module):
    """Reads the contrast of fine stripes in one square, and nothing else."""

    def __init__(self, top: int, left: int, side: int = 8) -> None:
        super().__init__()
        self.window = (slice(None), 0, slice(top, top + side), slice(left, left + side))

    def forward(self, x: Tensor) -> Tensor:
        inside = x[self.window]
        return 100 * (inside - 0.5).square().mean((1, 2))[:, None]


def stripes(side: int = 24) -> Tensor:
    return (torch.arange(side) % 2).double().expand(1, 1, side, side)


@pytest.mark.parametrize("reward", [ap.subsets.Preserve(), ap.subsets.Dual()])
def test_extremal_perturbation_finds_what_the_model_reads(reward):
    """At the area of the square the mask lies there, at its area."""
    search = ap.ExtremalPerturbation(
        (64 / 576,), reward, SmoothMask(2, 3.0), steps=200, lr=0.02, growth=1.01, levels=2, sigma=4.0, flip=False
    )
    a = search(ap.Field(Looking(4, 12)), stripes())
    mask = a.parts["masks"][0, 0]
    inside = mask[4:12, 12:20].mean()
    assert float(inside) > 0.8
    assert float(inside) > 10 * float((mask.sum() - mask[4:12, 12:20].sum()) / (576 - 64))
    assert float(a.parts["area"]) == pytest.approx(64 / 576, rel=0.25)
    assert not a.warnings
    assert float(a.parts["score"][0, 0, 0]) > 0.75 * float(a.value)
    assert isinstance(reward, ap.subsets.Preserve) or float(a.parts["score"][0, 0, 1]) < 0.1 * float(a.value)


def test_an_area_that_is_not_reached_is_said():
    search = ap.ExtremalPerturbation((0.1,), mask=SmoothMask(2, 3.0), steps=2, sigma=2.0)
    a = search(ap.Field(planted.conv_net()), few(), target=0)
    assert any("area 0.1 was not reached for 2 of 2" in w for w in a.warnings)


def test_what_extremal_perturbation_refuses():
    for areas in ((), (0.0,), (0.2, 1.0)):
        with pytest.raises(ConfigError, match="areas"):
            ap.ExtremalPerturbation(areas)
    with pytest.raises(ConfigError, match="momentum=2"):
        ap.ExtremalPerturbation(momentum=2.0)
    with pytest.raises(InputError, match="pictures"):
        ap.ExtremalPerturbation(steps=1)(ap.Field(planted.dense_net()), torch.randn(2, 5, dtype=F64))


# -- meaningful perturbation --------------------------------------------------------------------------


def meaningful(net: nn.Module, x: Tensor, target: int, steps: int, shifts: Tensor, *, sums: bool = True) -> Tensor:
    """The search for one picture, by plain autograd and Adam by hand; from a mask of halves."""
    hidden = blur(x, 1.0)
    cells = torch.full((1, 1, 4, 4), 0.5, dtype=F64, requires_grad=True)
    first = second = torch.zeros_like(cells).detach()
    for t in range(steps):
        mask = blur(cells.repeat_interleave(2, 2).repeat_interleave(2, 3), 1.0)
        i, j = shifts[t].tolist()
        moved = [F.pad(p, (0, 2, 0, 2), mode="replicate")[:, :, i : i + 8, j : j + 8] for p in (x, hidden)]
        z = mask * moved[0] + (1 - mask) * moved[1]
        loss = net(z).softmax(1)[0, target]
        loss = loss + 2e-3 * ((1 - cells).abs().sum() if sums else (1 - cells).abs().mean())
        for a, b in ((cells[:, :, 1:], cells[:, :, :-1]), (cells[:, :, :, 1:], cells[:, :, :, :-1])):
            loss = loss + 0.1 * (a - b).abs().pow(3).sum()
        (slope,) = torch.autograd.grad(loss, cells)
        first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
        with torch.no_grad():
            step = (first / (1 - 0.9 ** (t + 1))) / ((second / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8)
            cells -= 0.1 * step
            cells.clamp_(0, 1)
    return blur(cells.detach().repeat_interleave(2, 2).repeat_interleave(2, 3), 1.0)


def from_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start at .5 everywhere."""
    monkeypatch.setattr(
        ap.subsets.UniformStart,
        "__call__",
        lambda self, q, owner, cells, *_: q.x.new_full((len(owner), 1, *cells), 0.9),
    )


def test_meaningful_perturbation_is_its_twin(monkeypatch):
    from_given(monkeypatch)
    net, x = planted.conv_net(), few()
    search = ap.MeaningfulPerturbation(
        baseline=ap.baselines.Blurred(1.0),
        steps=6,
        lambda_area=2e-3,
        lambda_smooth=0.1,
        cell=2,
        sigma=1.0,
        jitter=3,
        start=ap.subsets.UniformStart(),
    )
    field = ap.Field(net)
    a = search(field, x, target=[1, 2], seed=4)
    stream = field.bind(x, target=[1, 2], seed=4).stream("jitter")
    for b, target in enumerate((1, 2)):
        shifts = stream.integers(3, torch.full((6,), b), torch.arange(6), 2)
        assert len(shifts.unique(dim=0)) > 2
        mask = meaningful(net, x[b : b + 1], target, 6, shifts)
        torch.testing.assert_close(a.parts["mask"][b], mask[0, 0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(a.values[b], 1 - mask[0, 0], rtol=1e-9, atol=1e-9)
        wrong = meaningful(net, x[b : b + 1], target, 6, shifts, sums=False)  # means in place of sums
        assert float((a.parts["mask"][b] - wrong[0, 0]).abs().max()) > 1e-3
        z = mask * x[b : b + 1] + (1 - mask) * blur(x[b : b + 1], 1.0)
        assert float(a.parts["score"][b]) == pytest.approx(float(net(z).detach().softmax(1)[0, target]))


def test_pictures_are_moved_under_the_mask():
    x, by = few(), torch.tensor([[0, 1], [2, 0]])
    moved = shifted(x, by)
    assert torch.equal(moved[0, :, :, :7], x[0, :, :, 1:])
    assert torch.equal(moved[0, :, :, 7], x[0, :, :, 7])
    assert torch.equal(moved[1, :, :6], x[1, :, 2:])
    assert torch.equal(moved[1, :, 7], x[1, :, 7])


def test_the_circle_is_the_smallest_that_takes_the_score_away():
    """A model of the middle alone: the first disc that covers the square."""

    def middle(x: Tensor) -> Tensor:
        return x[:, 0, 12:20, 12:20].mean((1, 2))

    x = torch.ones(1, 1, 32, 32, dtype=F64)
    start = ap.subsets.CircleStart(25, sigma=0.0)  # radii 0, 1, 2, ..., 24
    q = ap.Field(middle).bind(x)
    mask = start(q, torch.tensor([0]), (32, 32), torch.zeros_like(x), q.field.score)
    radius = math.ceil(math.hypot(4, 4))  # the middle lies at 16, the farthest corner of the square at 12
    squares = (torch.arange(32.0)[:, None] - 16) ** 2 + (torch.arange(32.0) - 16) ** 2
    assert torch.equal(mask[0, 0] == 0, squares <= radius**2)


def test_meaningful_perturbation_removes_what_the_model_reads():
    search = ap.MeaningfulPerturbation(
        None, ap.baselines.Mean(), steps=100, lambda_area=0.02, lambda_smooth=0.02, cell=2, sigma=1.0, jitter=0
    )
    a = search(ap.Field(Looking(4, 12)), stripes())
    gone = a.values[0]
    assert float(gone[4:12, 12:20].mean()) > 0.5
    assert float(gone[4:12, 12:20].mean()) > 4 * float((gone.sum() - gone[4:12, 12:20].sum()) / (576 - 64))
    assert float(a.parts["score"]) < 0.3 * float(a.value)


def test_a_score_of_no_single_class_is_asked_itself_and_that_is_said():
    search = ap.MeaningfulPerturbation(steps=1, cell=2, start=ap.subsets.UniformStart())
    a = search(ap.Field(planted.conv_net(), ap.Contrast(0, 1)), few())
    assert any("Contrast" in w for w in a.warnings)
    assert not search(ap.Field(planted.conv_net(), ap.LogOdds()), few()).warnings
