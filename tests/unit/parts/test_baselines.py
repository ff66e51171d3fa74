"""Baselines in closed form, and against scipy."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import apportion as ap
from apportion.core import tree
from apportion.parts.baselines import Baseline, blur

DOUBLE = torch.float64
ndimage = pytest.importorskip("scipy.ndimage")  # comes with scikit-image


def made(baseline: Baseline, x: object, seed: int = 0, ids: list[str] | None = None):
    field = ap.Field(lambda *xs: sum(x.flatten(1).sum(1) for x in xs))
    return baseline(field.bind(x, seed=seed, ids=ids))


@pytest.fixture
def picture() -> Tensor:
    return torch.randn(2, 3, 7, 9, dtype=DOUBLE)


def test_zero_takes_no_memory(picture: Tensor) -> None:
    rows = made(ap.baselines.Zero(), picture)
    assert rows.shape == (2, 1, 3, 7, 9)
    assert not rows.any()
    assert set(rows.stride()[2:]) == {0}
    assert rows.untyped_storage().nbytes() == picture.element_size()
    q = ap.Field(lambda x: x.flatten(1).sum(1)).bind(picture)
    kept = q.references(ap.baselines.Zero()).rows
    assert kept.untyped_storage().nbytes() == picture.element_size()
    a = ap.IntegratedGradients()(ap.Field(lambda x: x.flatten(1).sum(1)), picture)
    assert a.references is not None
    assert a.references.rows.untyped_storage().nbytes() == picture.element_size()


def test_constant(picture: Tensor) -> None:
    assert made(ap.baselines.Constant(0.25), picture).eq(0.25).all()
    rows = made(ap.baselines.Constant((1.0, 2.0, 3.0)), picture)
    assert rows.shape == (2, 1, 3, 7, 9)
    for c in range(3):
        assert rows[:, :, c].eq(c + 1).all()
    assert made(ap.baselines.Constant((1.0, 2.0)), picture[:, :2, 0, 0]).tolist() == [[[1, 2]]] * 2
    assert made(ap.baselines.Constant(0.1), torch.zeros(1, 1)).item() == torch.tensor(0.1).item()


def test_mean(picture: Tensor) -> None:
    rows = made(ap.baselines.Mean(), picture)
    want = picture.mean((2, 3), keepdim=True).expand_as(picture)
    assert torch.allclose(rows[:, 0], want, atol=1e-15)
    rows = made(ap.baselines.Mean(per_channel=False), picture)
    want = picture.mean((1, 2, 3), keepdim=True).expand_as(picture)
    assert torch.allclose(rows[:, 0], want, atol=1e-15)
    table = picture[:, :, 0, 0]
    assert torch.allclose(made(ap.baselines.Mean(), table)[:, 0], table.mean(1, keepdim=True).expand_as(table))
    single = torch.tensor([1.0, 2.0])
    assert torch.equal(made(ap.baselines.Mean(), single[:, None])[:, 0, 0], single)


@pytest.mark.parametrize("sigma", [0.05, 0.12, 0.2, 0.5, 1.0, 1.7, 3.0, 8.0, 25.0, 60.0])
def test_blur_equals_scipy(picture: Tensor, sigma: float) -> None:
    """Also where the kernel is many times larger than the picture."""
    found = made(ap.baselines.Blurred(sigma), picture)[:, 0].numpy()
    want = ndimage.gaussian_filter(picture.numpy(), (0, 0, sigma, sigma), mode="reflect", truncate=4.0)
    assert np.abs(found - want).max() < 1e-12
    line = picture[:, :, 0]
    want = ndimage.gaussian_filter1d(line.numpy(), sigma, mode="reflect", truncate=4.0)
    assert np.abs(blur(line, sigma).numpy() - want).max() < 1e-12


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 2, 1, 5), (1, 1, 6)])
def test_blur_of_thin_pictures(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=DOUBLE)
    want = ndimage.gaussian_filter(x.numpy(), (0, 0, *[2.0] * (len(shape) - 2)), mode="reflect", truncate=4.0)
    assert np.abs(blur(x, 2.0).numpy() - want).max() < 1e-12


@pytest.mark.parametrize("sigma", [0.3, 2.0, 40.0])
@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
def test_blur_leaves_constants_alone(sigma: float, dtype: torch.dtype) -> None:
    x = torch.full((1, 1, 6, 8), 0.7, dtype=dtype)
    assert float((blur(x, sigma) - x).abs().max()) < (1e-14 if dtype == DOUBLE else 5e-7)


def test_noise_moments() -> None:
    x = torch.zeros(2, 50_000, dtype=DOUBLE)
    n = 100_000
    rows = made(ap.baselines.Noise(2.0, mean=1.0), x, ids=["a", "b"])
    assert rows.shape == (2, 1, 50_000)
    assert abs(float(rows.mean()) - 1) < 5 * 2 / math.sqrt(n)
    assert abs(float(rows.var()) - 4) < 5 * 4 * math.sqrt(2 / n)
    rows = made(ap.baselines.Noise(2.0, mean=1.0, uniform=True), x, ids=["a", "b"])
    assert -1 < float(rows.min()) < -0.99
    assert 2.99 < float(rows.max()) < 3
    assert abs(float(rows.mean()) - 1) < 5 * math.sqrt(4 / 3 / n)
    assert abs(float(rows.var()) - 4 / 3) < 5 * math.sqrt(4**2 * (1 / 5 - 1 / 9) / n)


def test_noise_draws() -> None:
    x = torch.randn(3, 4, dtype=DOUBLE)
    noise = ap.baselines.Noise(count=5)
    rows = made(noise, x)
    assert rows.shape == (3, 5, 4)
    assert noise.draws == 5
    assert len({tuple(r) for r in rows.flatten(0, 1).tolist()}) == 15
    assert torch.equal(made(noise, x[1:2])[0], rows[1])
    assert torch.equal(made(ap.baselines.Noise(count=2), x), rows[:, :2])
    assert not torch.equal(made(noise, x, seed=1), rows)
    again = made(ap.baselines.Noise(sigma=3.0, mean=0.5, count=5), x)
    assert torch.allclose(again, 0.5 + 3 * rows, atol=1e-14)


@pytest.mark.parametrize("shape", [(1, 4), (4,), (3, 4)])
def test_given(shape: tuple[int, ...]) -> None:
    x, value = torch.randn(3, 4, dtype=DOUBLE), torch.randn(shape, dtype=DOUBLE)
    assert torch.equal(made(ap.baselines.Given(value), x)[:, 0], value.expand(3, 4))


def test_given_for_trees() -> None:
    x = {"a": torch.randn(2, 3, dtype=DOUBLE), "b": (torch.randn(2, dtype=DOUBLE),)}
    value = {"b": (torch.tensor([7.0], dtype=DOUBLE),), "a": torch.ones(3, dtype=DOUBLE)}
    field = ap.Field(lambda a, b: a.sum(1) + b[0])
    rows = ap.baselines.Given(value)(field.bind(x))
    assert tree.names(rows) == tree.names(x)
    assert rows["a"].tolist() == [[[1, 1, 1]]] * 2
    assert rows["b"][0].tolist() == [[7], [7]]
    a = ap.IntegratedGradients(ap.baselines.Given(value))(field, x)
    assert torch.allclose(a.values["a"], x["a"] - 1)
    assert torch.allclose(a.values["b"][0], x["b"][0] - 7)


def test_given_follows_the_precision_of_the_field() -> None:
    net, x = nn.Linear(3, 1), torch.randn(2, 3)
    a = ap.GradientTimesInput(ap.baselines.Given(torch.ones(1, 3)))(ap.Field(net, precision=DOUBLE), x)
    assert torch.allclose(a.values, (net.weight.double() * (x.double() - 1)).detach(), atol=1e-14)


def test_at_input() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(2, 3, dtype=DOUBLE)
    inner = ap.baselines.AtInput(ap.baselines.Noise(count=3))
    assert (inner.draws, inner.rows) == (3, 3)
    rows = inner(ap.Field(net, site=ap.At("1")).bind(x, target=0))
    points = made(ap.baselines.Noise(count=3), x)
    assert torch.allclose(rows, net[1](net[0](points)).detach(), atol=1e-14)
    assert ap.baselines.Zero().rows == 0
