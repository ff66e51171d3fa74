"""Occlusion where it can be written down, and beside plain loops over windows."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import apportion as ap
from apportion import planted
from apportion.core.errors import ConfigError
from apportion.parts.masks.groups import Patches

DOUBLE = torch.float64


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=DOUBLE)


BENCH: list[tuple[str, Callable[[Tensor], Tensor], Tensor, Tensor]] = [
    ("B1", planted.RootSum(), row(4, 4), row(4, 2)),
    ("B2", planted.ReluProduct(), row(2, 3), row(3, 3)),
    ("B3", planted.Max(), row(3, 1), row(2, 0)),
    ("B3'", planted.Max(), row(2, 2.001), row(0, 0.001)),
    ("B4", planted.Saturated(), row(2), row(1)),
    ("B5", planted.Product(), row(2, 3), row(6, 6)),
    ("B6", planted.Linear([1.0, -2.0], 5.0), row(3, 4), row(3, -8)),
    ("B7", planted.Min(), row(2, 1), row(1, 1)),
]


@pytest.mark.parametrize(("f", "x", "want"), [c[1:] for c in BENCH], ids=[c[0] for c in BENCH])
def test_bench(f: Callable[[Tensor], Tensor], x: Tensor, want: Tensor) -> None:
    found = ap.Occlusion()(ap.Field(f), x)
    assert torch.allclose(found.values, want, atol=1e-12)
    assert found.cost.forward.tolist() == [x.shape[1] if x.shape[1] > 1 else 1]


def test_interactions_are_counted_by_each() -> None:
    """Allocation fidelity fails: the interaction of two features, 3, is given to both; Shapley halves it."""
    found = ap.Occlusion()(ap.Field(planted.ReluProduct()), row(2, 3))
    assert float(found.values.sum()) == 2 * float(found.value)


# -- windows ---------------------------------------------------------------------------------------------


def picture(h: int = 7, w: int = 8, batch: int = 1) -> Tensor:
    return torch.rand(batch, 2, h, w, dtype=DOUBLE, generator=torch.Generator().manual_seed(1)) + 0.1


def starts(length: int, size: int, stride: int) -> list[int]:
    found = list(range(0, length - size + 1, stride))
    return found if found[-1] + size == length else [*found, length - size]


def slow(
    f: Callable[[Tensor], Tensor], x: Tensor, size: int, stride: int, *, summed: bool = False, share: bool = False
) -> Tensor:
    """Cover one window after the other with black, and keep count."""
    total, count = torch.zeros_like(x), torch.zeros_like(x)
    for i in starts(x.shape[2], size, stride):
        for j in starts(x.shape[3], size, stride):
            covered = x.clone()
            covered[:, :, i : i + size, j : j + size] = 0
            loss = f(x) - f(covered)
            loss = loss / (size * size * x.shape[1]) if share else loss
            total[:, :, i : i + size, j : j + size] += loss.reshape(-1, 1, 1, 1)
            count[:, :, i : i + size, j : j + size] += 1
    return total if summed else total / count


@pytest.mark.parametrize(("size", "stride"), [(1, 1), (2, 2), (3, 1), (3, 2), (4, 3), (7, 7)])
@pytest.mark.parametrize(("summed", "share"), [(False, False), (True, False), (False, True), (True, True)])
def test_beside_plain_loops(size: int, stride: int, summed: bool, share: bool) -> None:
    x, net = picture(8, 7, batch=2), planted.conv_net()
    method = ap.Occlusion(Patches(size, stride), summed=summed, per_element=share)
    for batch_size in (3, "auto"):
        field = ap.Field(net, batch_size=batch_size)
        found = method(field, x, target=1)
        want = slow(lambda z: net(z)[:, 1].detach(), x, size, stride, summed=summed, share=share)
        assert torch.allclose(found.spread().values, want, atol=1e-12)
        windows = len(starts(8, size, stride)) * len(starts(7, size, stride))
        assert found.cost.forward.tolist() == [windows, windows]
        assert method.passes(field.bind(x, target=1)).forward == windows


def test_linear_patches() -> None:
    """Of single pixels w ⊙ x, summed over a pixel's channels; of evenly lit pictures w ⊙ x at the borders too."""
    x = picture()
    weight = torch.randn(x.shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(2))
    field = ap.Field(lambda z: (z * weight).sum((1, 2, 3)))
    found = ap.Occlusion(Patches(1))(field, x)
    assert torch.allclose(found.spread().values, (weight * x).sum(1, keepdim=True).expand_as(x), atol=1e-12)
    even, flat = torch.ones_like(x), ap.Field(lambda z: 3 * z.sum((1, 2, 3)))
    for size, stride in ((3, 1), (3, 2), (2, 2)):
        found = ap.Occlusion(Patches(size, stride), per_element=True)(flat, even)
        assert torch.allclose(found.spread().values, 3 * even, atol=1e-12)
    dark = ap.Occlusion(Patches(3, 1), summed=True, per_element=True)(flat, even).spread().values
    assert math.isclose(float(dark[0, 0, 0, 0]), 3)  # one window over the corner, nine over the middle
    assert math.isclose(float(dark[0, 0, 3, 4]), 27)


def test_windows_side_by_side_keep_the_total() -> None:
    x, weight = picture(6, 8), torch.randn(2, 6, 8, dtype=DOUBLE, generator=torch.Generator().manual_seed(2))
    field = ap.Field(lambda z: (z * weight).sum((1, 2, 3)) + 1)
    found = ap.Occlusion(Patches(2), per_element=True)(field, x)
    assert torch.allclose(found.spread().values.sum(), found.value - 1)


def test_groups_get_one_number_each() -> None:
    """Squares are windows side by side; several inputs in one player go together."""
    x, net = picture(8, 8, batch=2), planted.conv_net()
    field = ap.Field(net)
    squares = ap.Occlusion(ap.groups.Squares(4))(field, x, target=1)
    assert squares.values.shape == (2, 4)
    assert torch.allclose(
        squares.spread().values, ap.Occlusion(Patches(4))(field, x, target=1).spread().values, atol=1e-12
    )
    two = ap.Field(lambda a, b: a.sum(1) * b.sum(1))
    labels = (torch.tensor([0, 1]), torch.tensor([1]))
    found = ap.Occlusion(ap.groups.Labels(labels))(two, (row(2, 3), row(4)))
    assert found.values.tolist() == [[20 - 12, 20]]
    one = ap.Occlusion()(two, (row(2, 3), row(4)))
    assert [v.tolist() for v in one.values] == [[[8, 12]], [[20]]]


def test_fills_draws_are_averaged() -> None:
    data = torch.rand(5, 3, dtype=DOUBLE)
    field, x = ap.Field(planted.Product()), row(1, 2, 3)
    found = ap.Occlusion(fill=ap.fills.Marginal(data))(field, x)
    want = torch.tensor([[6 - float((6 / x[0, i] * data[:, i]).mean()) for i in range(3)]], dtype=DOUBLE)
    assert torch.allclose(found.values, want)
    assert found.cost.forward.tolist() == [15]


def test_options_of_windows_are_refused_for_groups() -> None:
    with pytest.raises(ConfigError, match="windows"):
        ap.Occlusion(ap.groups.Squares(2), summed=True)
    with pytest.raises(ConfigError, match="windows"):
        ap.Occlusion(ap.groups.Squares(2), per_element=True)
    with pytest.raises(ConfigError, match="as many as there are parts"):
        ap.Occlusion().passes()
