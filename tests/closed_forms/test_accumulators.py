"""Closed forms of what is added up along paths: important directions, splits, expectations."""

import pytest
import torch
from torch import Tensor

import apportion as ap
from apportion import planted
from apportion.parts.paths import Straight
from apportion.parts.quadrature import Gauss, Left, Midpoint


def values(explainer: ap.Explainer, model: torch.nn.Module, *x: float) -> list[float]:
    return explainer(ap.Field(model), torch.tensor([x], dtype=torch.float64)).values[0].tolist()


# -- IDGI, methods.md 3C ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("x", "want"), [((1.0, 1.0), (0.6, 2.4)), ((1.0, 0.0), (0.2, 0.8)), ((-1.0, 1.0), (0.2, 0.8))])
@pytest.mark.parametrize("rule", [Left(3), Midpoint(5), Gauss(4)], ids=str)
def test_idgi_of_a_linear_score_ignores_where_one_came_from(
    x: tuple[float, float], want: tuple[float, float], rule: ap.quadrature.Quadrature
) -> None:
    got = values(ap.IDGI(Straight(quadrature=rule)), planted.Linear([1.0, 2.0]), *x)
    assert got == pytest.approx(want, abs=1e-12)
    assert ap.IntegratedGradients()(
        ap.Field(planted.Linear([1.0, 2.0])), torch.tensor([x], dtype=torch.float64)
    ).values[0].tolist() == pytest.approx([x[0], 2 * x[1]], abs=1e-12)


def test_idgi_of_a_product() -> None:
    field, x = ap.Field(planted.Product()), torch.tensor([[2.0, 3.0]], dtype=torch.float64)
    a = ap.IDGI(Straight(quadrature=Midpoint(7)))(field, x)
    assert a.values[0].tolist() == pytest.approx([6 * 9 / 13, 6 * 4 / 13], abs=1e-12)
    assert a.values[0].tolist() == pytest.approx([4.1538, 1.8462], abs=5e-5)
    assert not a.warnings


def test_idgi_where_the_gradient_vanishes_gives_nothing_and_says_so() -> None:
    field, x = ap.Field(planted.Product()), torch.tensor([[2.0, 3.0]], dtype=torch.float64)
    for n in (1, 2, 10):
        a = ap.IDGI(Straight(quadrature=Left(n)))(field, x)
        assert bool(torch.isfinite(a.values).all())
        assert float(a.values.sum()) == pytest.approx(6 - 6 / n**2, abs=1e-12)
        assert a.gap is not None
        assert float(a.gap) == pytest.approx(-6 / n**2, abs=1e-12)
        assert any("vanished" in w for w in a.warnings)


def slow_idgi(model: torch.nn.Module, x: Tensor, start: Tensor, n: int) -> Tensor:
    """Algorithm 1 of Yang et al. 2023, step by step."""
    out = torch.zeros_like(x)
    for j in range(n):
        at = (start + j / n * (x - start)).requires_grad_()
        here = model(at[None])[0, 1]
        (g,) = torch.autograd.grad(here, at)
        there = model((start + (j + 1) / n * (x - start))[None])[0, 1]
        out += g * g * (there - here).detach() / (g * g).sum()
    return out.detach()


def test_idgi_is_its_slow_twin() -> None:
    model = planted.dense_net()
    x = torch.rand(3, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    a = ap.IDGI(Straight(quadrature=Left(13)))(ap.Field(model), x, target=1)
    want = torch.stack([slow_idgi(model, one, torch.zeros_like(one), 13) for one in x])
    torch.testing.assert_close(a.values, want, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(a.values, ap.IntegratedGradients()(ap.Field(model), x, target=1).values, rtol=1e-2)


# -- Split IG ------------------------------------------------------------------------------------------------


class Rise(torch.nn.Module):
    """min(3 x1, 1.5) + x2 / 2: x1 saturates half-way from 0 to 1."""

    def forward(self, x: Tensor) -> Tensor:
        return (3 * x[:, 0]).clamp(max=1.5) + x[:, 1] / 2


def test_split_at_the_known_place() -> None:
    field, x = ap.Field(Rise()), torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    # f goes 0 → 1.75 at t = .5 → 2 at t = 1; φ = .875 of it is exactly 1.75
    a = ap.SplitIG(quadrature=Midpoint(1000), phi=0.875)(field, x)
    assert float(a.parts["split_at"]) == pytest.approx(0.5, abs=1e-3)
    assert a.parts["unsaturated"][0].tolist() == pytest.approx([1.5, 0.25], abs=2e-3)
    assert a.parts["saturated"][0].tolist() == pytest.approx([0.0, 0.25], abs=4e-3)
    assert torch.equal(a.values, a.parts["unsaturated"])
    assert a.claimed_total is None


@pytest.mark.parametrize("phi", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_split_parts_sum_to_integrated_gradients(phi: float, size: int) -> None:
    field = ap.Field(planted.dense_net(), batch_size=size)
    x = torch.rand(4, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    base = ap.baselines.Noise(0.4, count=2)
    a = ap.SplitIG(base, Gauss(20), phi)(field, x, target=1, ids=range(4))
    whole = ap.IntegratedGradients(base, Gauss(20))(field, x, target=1, ids=range(4))
    torch.testing.assert_close(a.parts["unsaturated"] + a.parts["saturated"], whole.values, rtol=0, atol=1e-13)


def test_split_of_a_falling_score_and_of_one_that_never_passes() -> None:
    x = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    falling = ap.SplitIG(quadrature=Midpoint(1000), phi=0.875)(ap.Field(lambda z: -Rise()(z)), x)
    assert falling.parts["unsaturated"][0].tolist() == pytest.approx([-1.5, -0.25], abs=2e-3)
    late = ap.SplitIG(quadrature=Midpoint(4), phi=0.99)(ap.Field(planted.Linear([1.0, 1.0])), x)
    assert float(late.parts["split_at"]) == 1.0
    assert late.parts["unsaturated"][0].tolist() == pytest.approx([1.0, 1.0])
    assert not bool(late.parts["saturated"].any())
    assert any("never passed" in w for w in late.warnings)


def test_split_of_a_score_that_goes_up_and_down_is_at_its_first_passing() -> None:
    field = ap.Field(lambda z: (8 * z[:, 0]).sin() + z[:, 0])
    x = torch.tensor([[1.0]], dtype=torch.float64)
    a = ap.SplitIG(quadrature=Midpoint(2000), phi=0.5)(field, x)
    rise = float(field.bind(x).fx)
    t = torch.linspace(0, 1, 200001, dtype=torch.float64)
    first = float(t[((8 * t).sin() + t > 0.5 * rise).nonzero()[0, 0]])
    assert float(a.parts["split_at"]) == pytest.approx(first, abs=1e-3)


def test_the_crossing_node_may_be_kept() -> None:
    x = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    linear = ap.Field(planted.Linear([1.0, 1.0]))
    for keep, nodes in ((False, 5), (True, 6)):
        a = ap.SplitIG(quadrature=Midpoint(10), phi=0.5, keep_crossing=keep)(linear, x)
        assert a.values[0].tolist() == pytest.approx([nodes / 10] * 2), keep


# -- expected gradients ----------------------------------------------------------------------------------------


def test_expected_gradients_of_a_linear_score_and_of_a_product() -> None:
    x = torch.tensor([[2.0, 3.0]], dtype=torch.float64)
    rows = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    two = ap.baselines.Data(rows)
    a = ap.ExpectedGradients(two)(ap.Field(planted.Linear([2.0, -1.0])), x)
    assert a.values[0].tolist() == pytest.approx([2 * 1.5, -1 * 2.5], abs=1e-12)
    b = ap.ExpectedGradients(two, draws=20000)(ap.Field(planted.Product()), x)
    assert b.values[0].tolist() == pytest.approx([2.5, 3.0], abs=0.03)
    c = ap.IntegratedGradients(two)(ap.Field(planted.Product()), x)
    assert c.values[0].tolist() == pytest.approx([2.5, 3.0], abs=1e-12)
    assert c.parts["per_baseline"][0].tolist() == [
        pytest.approx([3.0, 3.0], abs=1e-12),
        pytest.approx([2.0, 3.0], abs=1e-12),
    ]
