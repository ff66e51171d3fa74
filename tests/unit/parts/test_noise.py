"""Noise on copies of the examples."""

import pytest
import torch

import apportion as ap

DOUBLE = torch.float64


def copies(noise: ap.noise.Gaussian, x: torch.Tensor, owner: list[int], draw: list[int]):
    q = ap.Field(lambda x: x.flatten(1).sum(1), bounds=None).bind(x, ids=list(range(len(x))))
    rows = noise(q, torch.tensor(owner), torch.tensor(draw))
    standard = q.stream("noise").normal(x, torch.tensor(owner), torch.tensor(draw))
    return rows, standard, ap.Gradient().explain(q).warnings


def test_absolute() -> None:
    x = torch.randn(2, 3, 4, dtype=DOUBLE)
    rows, n, warnings = copies(ap.noise.Gaussian(0.3, relative=False), x, [1, 0, 1], [0, 0, 1])
    assert torch.equal(rows, x[[1, 0, 1]] + 0.3 * n)
    assert warnings == ()


def test_relative_to_each_examples_own_range() -> None:
    x = torch.stack([torch.linspace(0, 1, 12), torch.linspace(-50, 50, 12)]).double().reshape(2, 3, 4)
    rows, n, warnings = copies(ap.noise.Gaussian(0.1), x, [0, 1], [0, 0])
    away = rows - x
    assert torch.allclose(away[0], 0.1 * n[0], atol=1e-15)
    assert torch.allclose(away[1], 10 * n[1], atol=1e-12)
    assert warnings == ()


def test_constant_examples_are_warned_of() -> None:
    x = torch.stack([torch.full((4,), 2.0), torch.arange(4.0)]).double()
    rows, _, warnings = copies(ap.noise.Gaussian(0.1), x, [0, 1], [0, 0])
    assert torch.equal(rows[0], x[0])
    assert not torch.equal(rows[1], x[1])
    assert len(warnings) == 1
    assert "constant" in warnings[0]
    _, _, quiet = copies(ap.noise.Gaussian(0.1), x, [1, 1], [0, 1])
    assert quiet == ()
    found = ap.SmoothGrad(samples=2)(ap.Field(lambda x: (x**2).sum(1)), x)
    assert [w for w in found.warnings if "constant" in w]


def test_each_input_has_its_own_range_and_noise() -> None:
    x = (torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 100.0]]))
    q = ap.Field(lambda a, b: (a * b).sum(1)).bind(x)
    rows = ap.noise.Gaussian(0.5)(q, torch.tensor([0]), torch.tensor([0]))
    first, second = (r - t for r, t in zip(rows, x, strict=True))
    assert not torch.allclose(100 * first, second)
    assert float(second.abs().max()) > 10 * float(first.abs().max())


@pytest.mark.parametrize("relative", [True, False])
def test_copies_do_not_depend_on_the_batch(relative: bool) -> None:
    x = torch.randn(3, 5)
    noise = ap.noise.Gaussian(0.2, relative)
    rows, _, _ = copies(noise, x, [0, 1, 2, 2], [4, 4, 4, 5])
    q = ap.Field(lambda x: x.sum(1)).bind(x[2:], ids=[2])
    assert torch.equal(noise(q, torch.tensor([0]), torch.tensor([5]))[0], rows[3])
