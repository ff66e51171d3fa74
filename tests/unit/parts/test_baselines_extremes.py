"""Baselines at the ends of the range, clipped noise, and several baselines together."""

import json

import pytest
import torch

import apportion as ap
from apportion.core import tree
from apportion.core.config import from_config, to_config
from apportion.core.errors import BaselineError

DOUBLE = torch.float64
X = torch.tensor([[0.0, 0.25, 0.5, 1.0], [0.75, 0.5 + 1e-9, 0.1, 0.9]], dtype=DOUBLE)


def total(*xs):
    return sum(x.flatten(1).sum(1) for x in xs)


def asked(x=X, bounds=(0, 1), **options):
    return ap.Field(total, bounds=bounds, **options).bind(x)


def test_maximum_distance() -> None:
    rows = ap.baselines.MaximumDistance()(asked())
    assert rows.tolist() == [[[1, 1, 0, 0]], [[0, 0, 1, 0]]]
    rows = ap.baselines.MaximumDistance(-1.0, 2.0)(asked())
    assert rows.tolist() == [[[2, 2, -1, -1]], [[-1, -1, 2, -1]]]
    assert ap.baselines.MaximumDistance(0, 4)(asked(bounds=None)).eq(4).all()
    far = (rows[:, 0] - X).abs()
    assert bool((far >= torch.maximum(X + 1, 2 - X) - 1e-15).all())
    assert not bool((ap.baselines.MaximumDistance()(asked())[:, 0] == X).any())


def test_maximum_distance_differs_from_the_nearest_end() -> None:
    assert not torch.equal(ap.baselines.MaximumDistance()(asked())[:, 0], X.round())


def test_black_white() -> None:
    pair = ap.baselines.BlackWhite()
    assert pair.draws == 2
    rows = pair(asked(bounds=(-2, 3)))
    assert rows.shape == (2, 2, 4)
    assert rows[:, 0].eq(-2).all()
    assert rows[:, 1].eq(3).all()
    picture = torch.rand(2, 3, 4, 5, dtype=DOUBLE)
    assert pair(asked(picture)).shape == (2, 2, 3, 4, 5)
    a = ap.IntegratedGradients(pair)(ap.Field(total, bounds=(0, 1)), X)
    assert torch.allclose(a.values, X - 0.5, atol=1e-12)


def test_ends_for_trees() -> None:
    x = {"a": X, "b": (X[:, 0],)}
    q = ap.Field(lambda a, b: a.sum(1) + b[0], bounds=(0, 1)).bind(x)
    for base in (ap.baselines.MaximumDistance(), ap.baselines.BlackWhite()):
        rows = base(q)
        assert tree.names(rows) == tree.names(x)
        assert rows["b"][0].shape == (2, base.draws)


@pytest.mark.parametrize("kind", [ap.baselines.MaximumDistance, ap.baselines.BlackWhite])
def test_ends_need_bounds(kind) -> None:
    with pytest.raises(BaselineError, match=f"{kind.__name__} on a field with no bounds\n.*\n.*bounds=\\(0, 1\\).*low"):
        kind()(asked(bounds=None))
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()
    inner = ap.Field(net, site=ap.At("1"), bounds=(0, 1)).bind(X)
    with pytest.raises(BaselineError, match="bounds of the input only"):
        kind()(inner)
    rows = ap.baselines.AtInput(kind())(inner)
    points = kind()(asked())
    assert torch.allclose(rows, net[:2](points).detach(), atol=1e-14)
    for low, high in [(1.0, None), (None, 1.0), (1.0, 0.0), (1.0, 1.0)]:
        with pytest.raises(BaselineError, match="both with low < high, or neither"):
            kind(low, high)


def test_clipped_noise() -> None:
    for uniform in (False, True):
        free = ap.baselines.Noise(0.7, mean=0.5, count=3, uniform=uniform)
        held = ap.baselines.Noise(0.7, mean=0.5, count=3, uniform=uniform, clip=True)
        x = torch.rand(4, 30, dtype=DOUBLE)
        assert torch.equal(held(asked(x)), free(asked(x)).clamp(0, 1))
        assert bool((free(asked(x)) < 0).any()), "clipping is off unless asked for"
    with pytest.raises(BaselineError, match=r"Noise\(clip=True\) on a field with no bounds"):
        held(asked(bounds=None))


def test_several_concatenates() -> None:
    noise = ap.baselines.Noise(count=3)
    both = ap.baselines.Several((noise, ap.baselines.BlackWhite(), ap.baselines.Zero()))
    assert (both.draws, both.rows, both.backward_rows, both.exact) == (6, 0, 0, True)
    q = asked()
    rows = both(q)
    assert torch.equal(rows[:, :3], noise(q))
    assert torch.equal(rows[:, 3:5], ap.baselines.BlackWhite()(q))
    assert rows[:, 5].eq(0).all()
    a = ap.IntegratedGradients(both)(ap.Field(total, bounds=(0, 1)), X)
    assert torch.allclose(a.values, X - rows.mean(1), atol=1e-12)


def test_several_draws_independently() -> None:
    noise = ap.baselines.Noise()
    rows = ap.baselines.Several((noise, noise, noise))(asked())
    assert len({tuple(r) for r in rows.flatten(0, 1).tolist()}) == 6
    alone = ap.baselines.Several((noise, noise, noise))(asked(X[1:]))
    assert torch.equal(alone[0], rows[1])


def test_several_at_the_input() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1)).double()
    q = ap.Field(net, site=ap.At("1"), bounds=(0, 1)).bind(X)
    bases = ap.baselines.Several((ap.baselines.Zero(), ap.baselines.BlackWhite()))
    rows = ap.baselines.AtInput(bases)(q)
    want = net[:2](torch.tensor([0.0, 0.0, 1.0], dtype=DOUBLE)[:, None].expand(3, 4)).detach()
    assert torch.allclose(rows, want.expand(2, 3, 3), atol=1e-14)


def test_several_needs_one() -> None:
    with pytest.raises(BaselineError, match="Several of no baselines"):
        ap.baselines.Several(())


@pytest.mark.parametrize(
    "base",
    [
        ap.baselines.MaximumDistance(),
        ap.baselines.MaximumDistance(-1.0, 1.0),
        ap.baselines.BlackWhite(0.0, 1.0),
        ap.baselines.Noise(clip=True),
        ap.baselines.Several((ap.baselines.Zero(), ap.baselines.Noise(count=2))),
    ],
    ids=str,
)
def test_configurations_come_back(base: ap.baselines.Baseline) -> None:
    again = from_config(json.loads(json.dumps(to_config(base))))
    assert again == base
    assert torch.equal(again(asked()), base(asked()))
