"""Curves: blurs, random monotone paths and curves of one's own, as paths."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import apportion as ap
from apportion import planted
from apportion.core import tree
from apportion.core.errors import BaselineError, ConfigError, NonFiniteError
from apportion.methods.path.blur_ig import BlurIG
from apportion.methods.path.spi import SPI, SPIProbability
from apportion.parts.accumulate import Dot
from apportion.parts.paths.blur import AtScale, BlurScale, scale_matrices, scale_space, scale_step
from apportion.parts.paths.given import Along
from apportion.parts.paths.path import Path
from apportion.parts.paths.stick_breaking import StickBreaking
from apportion.parts.quadrature import Adaptive, Gauss, Left, Midpoint, MonteCarlo, Quadrature

PICTURES = torch.rand(3, 2, 6, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
ROWS = torch.rand(3, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.2


def slow_blur(signal: list[float], sigma: float, border: str) -> list[float]:
    """Convolve one signal with a Gaussian cut at 4 sigma, as one would write it down."""
    n, radius = len(signal), max(1, int(4 * sigma + 0.5))
    weights = [math.exp(-0.5 * (o / sigma) ** 2) for o in range(-radius, radius + 1)]
    out = []
    for i in range(n):
        total = 0.0
        for o, w in zip(range(-radius, radius + 1), weights, strict=True):
            j = i + o
            if border == "reflect":
                while not 0 <= j < n:
                    j = -1 - j if j < 0 else 2 * n - 1 - j
                total += w * signal[j]
            elif 0 <= j < n:
                total += w * signal[j]
        out.append(total / sum(weights))
    return out


@pytest.mark.parametrize("border", ["reflect", "zero"])
@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.7, 20.0])
def test_blur_matrices_are_the_slow_convolution(border: str, sigma: float) -> None:
    signal = PICTURES[0, 0, 0]
    both = scale_matrices(8, torch.tensor([0.0, sigma], dtype=torch.float64), border)  # pyright: ignore[reportArgumentType]
    assert torch.equal(both[0], torch.eye(8, dtype=torch.float64))
    torch.testing.assert_close(both[1] @ signal, signal.new_tensor(slow_blur(signal.tolist(), sigma, border)))


def test_blur_agrees_with_scipy() -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    sigma = torch.tensor([0.8, 3.0, 7.0], dtype=torch.float64)
    for border, mode in (("reflect", "reflect"), ("zero", "constant")):
        for axes, each in (("HW", lambda s: (0, s, s)), ("H", lambda s: (0, s, 0)), ("W", lambda s: (0, 0, s))):
            got = scale_space(PICTURES, sigma, border, axes)  # pyright: ignore[reportArgumentType]
            for one, picture, s in zip(got, PICTURES, sigma.tolist(), strict=True):
                want = ndimage.gaussian_filter(picture.numpy(), each(s), mode=mode)
                np.testing.assert_allclose(one.numpy(), want, atol=1e-13)


def test_zero_padding_darkens_and_mirroring_does_not() -> None:
    white = torch.ones(1, 1, 32, 32, dtype=torch.float64)
    wide = torch.tensor([50.0], dtype=torch.float64)
    dark = scale_space(white, wide, "zero", "HW")
    assert float(dark[0, 0, 16, 16]) == pytest.approx(0.063, abs=1e-3)
    assert torch.equal(scale_space(white, wide, "reflect", "HW"), white)


@pytest.mark.parametrize("border", ["reflect", "zero"])
@pytest.mark.parametrize("axes", ["HW", "H", "W"])
@pytest.mark.parametrize("shape", [(3, 5), (3, 2, 5), (3, 2, 6, 8), (3, 2, 2, 4, 3)])
def test_a_step_is_the_difference_of_two_blurs(border: str, axes: str, shape: tuple[int, ...]) -> None:
    x = torch.rand(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    low, high = torch.tensor([[5.0, 2.0, 1.0], [4.0, 0.0, 0.9]], dtype=torch.float64)
    step = scale_step(x, low, high, border, axes)  # pyright: ignore[reportArgumentType]
    ends = [scale_space(x, s, border, axes) for s in (low, high)]  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(step, ends[1] - ends[0], rtol=0, atol=1e-14)


def test_blur_needs_an_axis() -> None:
    q = ap.Field(lambda x: x).bind(torch.ones(3))
    with pytest.raises(BaselineError, match="neighbours"):
        AtScale(1.0)(q)


CURVES: list[Callable[[Quadrature], Path]] = [
    lambda rule: BlurScale(6.0, quadrature=rule),
    lambda rule: BlurScale(6.0, "log", "zero", "W", quadrature=rule),
    lambda rule: BlurScale(3.0, "variance", quadrature=rule),
    lambda rule: StickBreaking(ap.baselines.Noise(0.5, count=2), 3, 2.0, 5, quadrature=rule),
    lambda rule: Along(lambda x, r, t: r + t**3 * (x - r), ap.baselines.Noise(0.5, count=2), quadrature=rule),
]


@pytest.mark.parametrize("make", CURVES)
@pytest.mark.parametrize("rule", [Gauss(5), Left(4), MonteCarlo(4, stratified=True), Adaptive(max_passes=16)], ids=str)
@pytest.mark.parametrize("rises", [False, True])
@pytest.mark.parametrize("size", [4, 1000])
def test_moves_lead_from_start_to_x_and_rises_add_up(
    make: Callable[[Quadrature], Path], rule: Quadrature, rises: bool, size: int
) -> None:
    q = ap.Field(planted.dense_net(), batch_size=size).bind(ROWS, target=1, ids=range(3))
    walk = make(rule).walk(q, rises=rises)
    k, moved, rise = walk.branches, torch.zeros(3 * walk.branches, 5).double(), torch.zeros(3 * walk.branches).double()
    last = torch.full_like(rise, -1)
    for legs in walk.legs:
        moved.index_add_(0, legs.row(k), legs.move)
        for row, t in zip(legs.row(k).tolist(), legs.t.tolist(), strict=True):
            assert t > last[row]
            last[row] = t
        if legs.rise is not None:
            rise.index_add_(0, legs.row(k), legs.rise)
    start, origin = walk.references(), list(walk.origin or range(k))
    torch.testing.assert_close(moved.unflatten(0, (3, k)), q.x[:, None] - start.rows[:, origin], rtol=0, atol=1e-13)
    if rises:
        torch.testing.assert_close(rise.unflatten(0, (3, k)), q.fx[:, None] - walk.start_values(), rtol=0, atol=1e-13)


# -- the engine on x1 x2 at (2, 3), methods.md 3C ------------------------------------------------------------


def bent(x: Tensor, start: Tensor, t: Tensor) -> Tensor:
    return start + torch.cat([t[:, :1] ** 2, t[:, :1]], 1) * (x - start)


def first_x1(x: Tensor, start: Tensor, t: Tensor) -> Tensor:
    t = t[:, :1]
    return start + torch.cat([(2 * t).clamp(max=1), (2 * t - 1).clamp(min=0)], 1) * (x - start)


def engine(path: Path) -> list[float]:
    q = ap.Field(planted.Product()).bind(torch.tensor([[2.0, 3.0]], dtype=torch.float64))
    return Dot().gather(q, path.walk(q)).values[0].tolist()


def test_engine_on_a_product() -> None:
    assert engine(ap.paths.Straight(quadrature=Midpoint(50))) == pytest.approx([3, 3], abs=1e-12)
    assert engine(Along(bent, quadrature=Midpoint(2000))) == pytest.approx([4, 2], abs=1e-6)
    assert engine(Along(first_x1, quadrature=Midpoint(50))) == pytest.approx([0, 6], abs=1e-12)


def test_a_curve_must_lead_from_start_to_x() -> None:
    q = ap.Field(planted.Linear([1.0, 2.0])).bind(torch.tensor([[2.0, 3.0]], dtype=torch.float64))
    with pytest.raises(ConfigError, match=r"γ\(1\) is 1.5 away from x"):
        Along(lambda x, r, t: r + t * (x - r) / 2).walk(q)
    with pytest.raises(ConfigError, match=r"γ\(0\) is 0.3 away from start"):
        Along(lambda x, r, t: r + (0.1 + 0.9 * t) * (x - r)).walk(q)
    with pytest.raises(ConfigError, match="float32"):
        Along(lambda x, r, t: (r + t * (x - r)).float()).walk(q)
    with pytest.raises(ConfigError, match=r"\(2,\)"):
        Along(lambda x, r, t: x[0]).walk(q)
    with pytest.raises(ConfigError, match="NaN"):
        Along(lambda x, r, t: x / 0 - x / 0).walk(q)


def test_a_curve_on_a_tree_of_inputs() -> None:
    def curve(x: dict[str, Tensor], r: dict[str, Tensor], t: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"a": r["a"] + t["a"] ** 2 * (x["a"] - r["a"]), "b": r["b"] + t["b"] * (x["b"] - r["b"])}

    field = ap.Field(lambda a, b: a[:, 0] * b.sum((1, 2)))
    x = {"a": torch.tensor([[2.0]]).double(), "b": torch.tensor([[[1.0, 2.0]]]).double()}
    q = field.bind(x)
    values = Dot().gather(q, Along(curve, quadrature=Midpoint(500)).walk(q)).values
    assert values["a"].flatten().tolist() == pytest.approx([4], abs=1e-4)
    assert values["b"].flatten().tolist() == pytest.approx([2 / 3, 4 / 3], abs=1e-4)


# -- stick-breaking -------------------------------------------------------------------------------------------


def shares(path: StickBreaking, times: int, count: int = 1) -> Tensor:
    """G([0, t]) on a grid of t, [branches, times + 1, d]."""
    q = ap.Field(planted.dense_net()).bind(ROWS[:count], target=1, ids=range(count))
    branch = torch.arange(path.draws).repeat_interleave(times + 1)
    t = (torch.arange(times + 1).double() / times).repeat(path.draws)
    (found,) = path.mass(q, torch.zeros_like(branch), branch, [t])
    return found.unflatten(0, (path.draws, times + 1))


def test_measures_grow_from_0_to_1_and_are_even_on_average() -> None:
    found = shares(StickBreaking(paths=2000, alpha=2.0, pieces=10), 20)
    assert bool((found.diff(dim=1) >= 0).all())
    assert not bool(found[:, 0].any())
    torch.testing.assert_close(found[:, -1], torch.ones_like(found[:, -1]))
    t = torch.arange(21).double()[:, None] / 20
    assert float((found.mean(0) - t).abs().max()) < 0.03
    # a Dirichlet process gives a set of base mass t the variance t (1 - t) / (1 + α)
    ends = slice(2, 20, 4)  # at ends of pieces
    want = (t * (1 - t) / 3)[ends, 0]
    torch.testing.assert_close(found.var(0)[ends].mean(1), want, rtol=0.1, atol=0)


def test_concentration_goes_from_jumps_to_the_line() -> None:
    line = torch.arange(33).double()[:, None] / 32
    far = [float((shares(StickBreaking(paths=20, alpha=a), 32) - line).abs().mean()) for a in (0.01, 1.0, 50.0)]
    assert far[0] > far[1] > far[2]
    assert far[2] < 0.06
    jumps = shares(StickBreaking(paths=20, alpha=0.001), 32).diff(dim=1)
    assert float(jumps.amax(1).mean()) > 0.99


def slow_mass(path: StickBreaking, t: float, kept: list[float], places: list[float]) -> float:
    """Break a stick piece by piece."""
    left, total = 1.0, 0.0
    for u, place in zip(kept, places, strict=True):
        v = 1 - u ** (1 / path.alpha)
        slot = int(place * path.pieces)
        total += v * left * min(max(path.pieces * t - slot, 0.0), 1.0)
        left *= 1 - v
    return total + left * t


@pytest.mark.parametrize("alpha", [0.5, 3.0])
def test_measures_are_the_slow_stick(alpha: float) -> None:
    path = StickBreaking(paths=2, alpha=alpha, pieces=4)
    q = ap.Field(planted.dense_net()).bind(ROWS, target=1, ids=range(3))
    stream, owner = q.stream("stick breaking"), torch.tensor([2])
    (got,) = path.mass(q, owner, torch.tensor([1]), [torch.tensor([0.3], dtype=torch.float64)])
    draws = [2 * (path.atoms + k) for k in range(path.atoms)]
    kept, places = ([stream.uniform(q.x, owner, torch.tensor([d + i]))[0] for d in draws] for i in (0, 1))
    for f in range(5):
        want = slow_mass(path, 0.3, [float(u[f]) for u in kept], [float(u[f]) for u in places])
        assert float(got[0, f]) == pytest.approx(want, abs=1e-12)


def test_every_random_path_is_complete() -> None:
    q = ap.Field(planted.dense_net()).bind(ROWS, target=1, ids=range(3))
    gaps = []
    for n in (8, 64, 512):
        path = StickBreaking(ap.baselines.Noise(0.3, count=2), 3, 1.0, 8, quadrature=Midpoint(n))
        walk = path.walk(q)
        found = Dot().gather(q, walk)
        each = found.parts["per_path"].sum(2)
        gaps.append(float((each - (q.fx[:, None] - walk.start_values())).abs().max()))
    assert gaps[0] / gaps[1] > 30  # second order, as pieces are fixed
    assert gaps[2] < 2e-5
    assert not torch.allclose(found.parts["per_path"][:, 0], found.parts["per_path"][:, 2], rtol=1e-2)


def test_paths_of_an_example_do_not_depend_on_the_batch() -> None:
    field = ap.Field(planted.dense_net())
    whole = SPI(paths=3)(field, ROWS, target=1, ids=["a", "b", "c"])
    alone = SPI(paths=3)(field, ROWS[2:], target=1, ids=["c"])
    torch.testing.assert_close(whole.values[2:], alone.values, rtol=0, atol=1e-14)
    more = SPI(paths=3)(field, ROWS, target=1, ids=["a", "b", "c"], seed=1)
    assert not torch.allclose(whole.values, more.values, rtol=1e-3)


def test_random_paths_know_their_limits() -> None:
    with pytest.raises(ConfigError, match="below 1"):
        StickBreaking(rest=1.5)
    with pytest.raises(ConfigError, match="positive"):
        StickBreaking(alpha=0.0)
    for alpha in (2171.0, 1e9, 1e17, 1.7e308):
        with pytest.raises(ConfigError, match="alpha up to 2,170"):
            SPI(alpha=alpha)
    near = SPI(paths=1, alpha=2170.0, quadrature=Midpoint(4), pieces=4)(ap.Field(planted.dense_net()), ROWS, target=1)
    line = ap.IntegratedGradients(quadrature=Midpoint(4))(ap.Field(planted.dense_net()), ROWS, target=1)
    torch.testing.assert_close(near.values, line.values, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("rule", [Left(4), Adaptive()], ids=["left", "adaptive"])
def test_random_paths_advise_against_nodes_at_the_ends(rule: Quadrature) -> None:
    with pytest.raises(NonFiniteError, match=r"without nodes at the ends of the path"):
        SPI(paths=2, quadrature=rule)(ap.Field(lambda x: x.sqrt().sum(1)), ROWS)


def test_what_is_always_high_has_probability_one() -> None:
    x = ROWS[:1, :2]
    for paths in range(1, 13):  # 1 / 6 and others do not sum to 1 in floating point
        a = SPIProbability(paths=paths, quadrature=Midpoint(2), pieces=2)(ap.Field(planted.Linear([5.0, -1.0])), x)
        assert a.values.tolist() == [[1.0, 0.0]], paths


def test_curves_that_raise_are_told() -> None:
    x = torch.ones(1, 2, dtype=torch.float64)
    for curve in (lambda x, s: x, lambda x, s, t: 1 / 0):
        with pytest.raises(ConfigError, match=r"a curve that raises (TypeError|ZeroDivisionError)"):
            ap.IDGI(Along(curve))(ap.Field(planted.Linear([1.0, 1.0])), x)  # pyright: ignore[reportArgumentType]


def test_blurred_copies_of_a_wrapper_end_at_the_examples_blur() -> None:
    field = ap.Field(planted.conv_net())
    x = torch.rand(2, 2, 8, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    q = field.bind(x, target=1, ids=range(2))
    copies = q.at(x + 0.1, torch.arange(2), torch.zeros(2, dtype=torch.long))
    walk = BlurScale(3.0, quadrature=Gauss(4)).walk(copies)
    moved = torch.zeros_like(x)
    for legs in walk.legs:
        moved.index_add_(0, legs.owner, legs.move)
    torch.testing.assert_close(moved, x + 0.1 - walk.references().rows[:, 0], rtol=0, atol=1e-14)
    smooth = ap.SmoothGrad(BlurIG(3.0, Gauss(4)), samples=2)(field, x, target=1)
    assert tree.all_finite(smooth.values)
