"""DiFull: what a head cannot see gets exactly nothing; a joint Grad-CAM is fooled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import apportion as ap
from apportion import planted
from apportion.core.errors import ConfigError, InputError, ModelError
from apportion.planted.grids import tile, untile
from apportion.planted.networks import _fill


class Residual(nn.Module):
    """A network of the usual traps, in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.body, self.act = nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.norm(self.stem(x)))
        h = h + self.act(self.body(h))
        h = self.act(self.down(h))
        return self.head(torch.flatten(nn.functional.adaptive_avg_pool2d(h, 1), 1))


def cnn() -> nn.Module:
    return _fill(Residual(), 0).float()


def share(values: Tensor, p: planted.CellGrid) -> Tensor:
    """Positive attribution inside, by that of the whole picture; maps are enlarged."""
    values = values.sum(1, keepdim=True) if values.ndim == 4 else values[:, None]
    mass = nn.functional.interpolate(values.relu(), p.truth.shape[1:])[:, 0]
    return (mass * p.truth).sum((1, 2)) / mass.sum((1, 2))


METHODS = [
    ap.Gradient(),
    ap.GradientTimesInput(),
    ap.IntegratedGradients(quadrature=ap.quadrature.Midpoint(4)),
    ap.GuidedBackprop(),
    ap.Occlusion(ap.groups.Patches(4, 4)),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("cell", [0, -1])
def test_di_full_is_exactly_one(method: ap.Explainer, cell: int) -> None:
    p = planted.di_full(cnn(), planted.noise_cells((3, 12, 12)), cell, classes=torch.tensor([1, 2]))
    found = method(ap.Field(p.model), p.x, target=p.target)
    found = found.spread() if isinstance(method, ap.Occlusion) else found
    assert share(found.values, p).tolist() == [1.0, 1.0]


def test_joint_grad_cam_is_near_chance() -> None:
    p = planted.di_full(cnn(), planted.noise_cells((3, 12, 12), examples=12))
    field = ap.Field(p.model)
    assert p.joint is not None
    values = ap.GradCAM(p.joint)(field, p.x, target=p.target).values
    assert 0.15 < share(values, p).mean() < 0.35
    assert p.chance == 0.25
    # LayerCAM weighs each place by its own gradient, which is 0 outside
    found = ap.LayerCAM(p.joint)(field, p.x, target=p.target).values
    assert (share(found, p) == 1).all()


def test_heads_are_the_network_itself() -> None:
    net, cells = cnn(), planted.noise_cells((3, 12, 12))
    p = planted.di_full(net, cells)
    alone = net(cells.flatten(0, 1)).reshape(2, -1)
    assert torch.allclose(p.model(p.x), alone, atol=1e-6)
    assert p.truth.flatten(1).float().mean(1).tolist() == [0.25, 0.25]


def test_di_part_sees_a_margin_only() -> None:
    p = planted.di_part(cnn(), planted.noise_cells((3, 12, 12)))
    values = ap.Gradient()(ap.Field(p.model), p.x, target=p.target).values
    assert (share(values, p) < 1).all()
    assert (share(values, p) > 0.6).all()
    reach = 1 + 1 + 1 * 1  # the receptive field's half width
    wide = torch.zeros_like(p.truth)
    wide[:, : 12 + reach, : 12 + reach] = True
    assert (values.abs().sum(1)[~wide] == 0).all()
    assert p.joint is not None
    maps = ap.LayerCAM(p.joint)(ap.Field(p.model), p.x, target=p.target).values
    assert (share(maps, p) == 1).all()


def test_three_by_three() -> None:
    p = planted.di_full(cnn(), planted.noise_cells((3, 8, 8), examples=1, side=3), cell=4)
    assert p.target is not None
    assert p.x.shape == (1, 3, 24, 24)
    assert p.truth[0, 8:16, 8:16].all()
    assert p.truth.sum() == 64
    values = ap.Gradient()(ap.Field(p.model), p.x, target=p.target).values
    assert share(values, p).item() == 1


def test_tiles() -> None:
    cells = torch.randn(2, 9, 3, 4, 5)
    assert torch.equal(untile(tile(cells), 3), cells)
    with pytest.raises(InputError, match="square number"):
        tile(cells[:, :8])
    with pytest.raises(InputError, match="multiples"):
        untile(torch.zeros(1, 1, 5, 6), 2)


def test_split() -> None:
    net, x = cnn(), torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    for layer in (None, "norm", "down"):
        features, head = planted.split(net, x, layer)
        assert torch.allclose(head(features(x)), net(x), atol=1e-6)
    with pytest.raises(ModelError, match="'body': add reads"):
        planted.split(net, x, "body")  # the skip goes around it
    with pytest.raises(ModelError, match="'act'"):
        planted.split(net, x, "act")  # called three times
    with pytest.raises(ModelError, match="none was found"):
        planted.split(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), torch.zeros(1, 1, 2, 2))


class Viewing(nn.Module):
    """Ask its input how many rows there are, in three ways."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        rows, shape = x.size(0), x.shape
        h = nn.functional.adaptive_avg_pool2d(self.conv(x).relu(), 1).view(rows, -1)
        return self.head(h.reshape(shape[0], -1).view(x.size()[0], 4))


def test_the_number_of_rows_may_be_read_anywhere() -> None:
    net, x = _fill(Viewing(), 0).float(), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    features, head = planted.split(net, x)
    assert torch.equal(head(features(x)), net(x))
    p = planted.di_full(net, planted.noise_cells((3, 8, 8), examples=3))
    assert p.model(p.x).shape == (3, 8)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_what_cannot_be_done_is_told() -> None:
    cells = planted.noise_cells((3, 12, 12))
    with pytest.raises(ModelError, match="cannot trace"):
        planted.di_full(Branching(), cells)
    with pytest.raises(InputError, match="cell 4 of 4"):
        planted.di_full(cnn(), cells, cell=4)
    with pytest.raises(InputError, match="class 5"):
        planted.di_full(cnn(), cells, classes=5)
    pair = planted.split(cnn(), cells[:1, 0])
    assert planted.di_full(pair, cells).joint == ap.At("joint")
    with pytest.raises(ConfigError, match="one of the two"):
        planted.di_full(pair, cells, layer="norm")
    unpadded = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(InputError, match="2 times as many"):
        planted.di_part(unpadded, cells)


def test_the_users_network_is_left_alone() -> None:
    net = cnn().train()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    planted.di_full(net, planted.noise_cells((3, 12, 12)))
    assert net.training
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
