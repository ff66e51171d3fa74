"""The call that takes names."""

import pytest
import torch
from torch import nn

import apportion as ap


@pytest.fixture
def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def test_names_and_explainers_agree(net: nn.Module) -> None:
    x = torch.randn(2, 4, dtype=torch.float64)
    for name in ("gradient", "gradient_times_input", "integrated_gradients", "smooth_grad", "var_grad"):
        found = ap.explain(net, x, name, target=1, seed=3, ids=["a", "b"])
        want = ap.method(name)()(ap.Field(net), x, target=1, seed=3, ids=["a", "b"])
        assert torch.equal(found.values, want.values)
        assert found.method == want.method
    several = ap.explain(net, x, ["gradient", ap.SmoothGrad(samples=2)], target=1)
    assert [a.method["type"] for a in several] == ["Gradient", "SmoothGrad"]
    assert isinstance(ap.explain(net, x, ("gradient",)), list)
    assert ap.explain(net, x, []) == []


def test_everything_reaches_the_field(net: nn.Module) -> None:
    x, w = torch.rand(2, 4, dtype=torch.float64), torch.rand(2, 4, dtype=torch.float64)
    norm = ap.Normalize((0.5,), (0.5,))
    options = {"score": ap.Probability(), "normalize": norm, "bounds": (0.0, 1.0), "extra": w}

    def model(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return net(x * w)

    found = ap.explain(model, x, "gradient", target=2, **options)
    want = ap.Gradient()(ap.Field(model, **options), x, target=2)
    assert torch.equal(found.values, want.values)
    p = net(2 * (x - 0.5) * w).softmax(1)[:, 2]
    assert torch.allclose(found.value, p.detach(), atol=1e-14)
    inner = ap.explain(net, x, "gradient", site=ap.At("1"), target=0)
    assert torch.allclose(inner.values, net[2].weight[0].expand(2, 5))  # pyright: ignore
    with pytest.raises(ap.ApportionError):
        ap.explain(net, x + 1, "gradient", bounds=(0.0, 1.0))


def test_the_registry_lists_what_can_be_named() -> None:
    listed = ap.methods()
    assert list(listed) == sorted(listed)
    assert "integrated_gradients" in listed
    assert all(isinstance(card, ap.Card) for card in listed.values())
    assert ap.method("grad_cam") is ap.GradCAM
    for name in listed:
        assert ap.method(name).card is listed[name]
