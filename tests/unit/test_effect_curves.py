"""Individual and causal curves side by side."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor

import apportion as ap
from apportion import planted
from apportion.core.errors import ConfigError, InputError
from apportion.show.curves import curves

DOUBLE = torch.float64


def data(d: int = 5, n: int = 30) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)


def test_beside_plain_loops() -> None:
    x, net = data()[:2], planted.dense_net()
    ace, field = ap.ACE(ap.FeatureMoments.fit(data())), ap.Field(net, batch_size=7)
    found = ap.effect_curves(ace, field, x, [3, 1], points=5, target=2)
    assert found.feature.tolist() == [3, 1]
    for b in range(2):
        for k, i in enumerate([3, 1]):
            assert found.alpha[k, 0] == data()[:, i].min()
            assert torch.isclose(found.alpha[k, -1], data()[:, i].max())
            for n in range(5):
                z = x[b].clone()
                z[i] = found.alpha[k, n]
                assert torch.isclose(found.individual[b, k, n], net(z[None])[0, 2])
    q = field.bind(x, target=2)
    at = found.alpha[1, 2].expand(2, 1)
    assert torch.allclose(ace.expected(q, torch.tensor([1]), at).value[:, 0], found.expected[:, 1, 2])
    assert torch.allclose(found.value, net(x)[:, 2])
    assert found.cost.forward[0] == 2 * 5 + 2 * 5 * 5  # individual, and five directions each


def test_without_interactions_the_shapes_agree() -> None:
    """f = Σ g_i(x_i) with quadratic g: curves differ by a constant; with a product they do not."""
    ace, x = ap.ACE(ap.FeatureMoments.fit(data())), data()[:3]
    apart = ap.effect_curves(ace, ap.Field(lambda z: (z**2 + z).sum(1)), x)
    assert float(apart.spread.max()) < 1e-12
    together = ap.effect_curves(ace, ap.Field(lambda z: z[:, 0] * z[:, 1]), x)
    assert float(together.spread[:, :2].min()) > 1e-3


def test_effect_is_the_curve_at_the_example_less_its_mean() -> None:
    moments, x = ap.FeatureMoments.fit(data()), data()[:2]
    ace = ap.ACE(moments, ap.quadrature.Trapezoid(65))
    field = ap.Field(planted.dense_net())
    found = ap.effect_curves(ace, field, x, points=65, target=0)
    weight = torch.full((65,), 1 / 64, dtype=DOUBLE)
    weight[[0, -1]] /= 2
    mean = (found.expected * weight).sum(-1)
    parts = ace(field, x, target=0).parts["mean_over_range"]
    assert isinstance(parts, Tensor)
    assert torch.allclose(mean, parts, atol=1e-12)


def test_picture() -> None:
    ace = ap.ACE(ap.FeatureMoments.fit(data()))
    found = ap.effect_curves(ace, ap.Field(planted.dense_net()), data()[:6], points=9)
    figure = curves(found, names=list("abcde"))
    shown = [a for a in figure.axes if a.axison]
    assert [a.get_title() for a in shown] == list("abcde")
    alike = int((found.target == found.target[0]).sum())
    assert len(shown[0].lines) == alike + 4  # ICE, zero, their mean, ACE, the dot
    with pytest.raises(InputError, match="index within"):
        curves(found, example=6)
    with pytest.raises(InputError, match="2 names for 5"):
        curves(found, names=["a", "b"])


@pytest.mark.usefixtures("as_users_run")
def test_mistakes_are_named() -> None:
    with pytest.raises(InputError, match="effect_curves"):
        curves(cast(Any, data()))
    ace, field = ap.ACE(ap.FeatureMoments.fit(data())), ap.Field(planted.dense_net())
    with pytest.raises(ConfigError, match=r"ap\.ACE"):
        ap.effect_curves(cast(Any, ap.Gradient()), field, data()[:1])
    with pytest.raises(ConfigError, match=r"ap\.Field"):
        ap.effect_curves(ace, cast(Any, planted.dense_net()), data()[:1])
    with pytest.raises(ConfigError, match="at least 2"):
        ap.effect_curves(ace, field, data()[:1], points=1)
    with pytest.raises(InputError, match="indices from 0 to 4"):
        ap.effect_curves(ace, field, data()[:1], [5])
    assert "warning" not in repr(ap.effect_curves(ace, field, data()[:1], points=3, target=0))
