"""Games: the score of each example under masks."""

from collections.abc import Iterator
from itertools import product
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

import apportion as ap
from apportion.core.protocols import Owner

DOUBLE = torch.float64


def model(x: Tensor) -> Tensor:
    return torch.stack([x.prod(1), (x**2).sum(1) + x[:, 0]], 1)


def all_masks(players: int) -> Tensor:
    return torch.tensor(list(product([False, True], repeat=players)))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 4, dtype=DOUBLE)


@pytest.mark.parametrize("chunk", [1, 5, "auto"])
def test_values_against_brute_force(x: Tensor, chunk: Any) -> None:
    q = ap.Field(model, batch_size=chunk).bind(x, target=[0, 1, 1])
    game = ap.Game(q, ap.groups.Elements(), ap.fills.Baselines(ap.baselines.Constant(0.5)))
    assert game.players == 4
    masks = all_masks(4)
    found = game.value(masks)
    assert found.shape == (3, 16)
    for b in range(3):
        for s, mask in enumerate(masks.tolist()):
            point = torch.tensor(
                [[v if keep else 0.5 for v, keep in zip(x[b].tolist(), mask, strict=True)]], dtype=DOUBLE
            )
            assert found[b, s] == pytest.approx(model(point)[0, min(b, 1)].item(), abs=1e-14)
    assert torch.allclose(found[:, -1], q.fx)
    cost = ap.Gradient().explain(q).cost
    assert cost.forward.tolist() == [16 + 1 + 1] * 3  # coalitions, baseline, gradient


def test_spellings_of_masks_agree(x: Tensor) -> None:
    q = ap.Field(model).bind(x, target=0)
    game = ap.Game(q, ap.groups.Elements(), ap.fills.Baselines())
    masks = all_masks(4)
    want = game.value(masks)
    assert torch.equal(game.value(masks.float()), want)
    assert torch.equal(game.value(masks.expand(3, 16, 4)), want)
    blocks: Iterator[Tensor] = (masks[i : i + 5] for i in range(0, 16, 5))
    assert torch.equal(game.value(blocks), want)
    assert torch.equal(game.value([masks[:3].expand(3, 3, 4), masks[3:]]), want)
    assert game.value([]).shape == (3, 0)
    assert game.value(masks[:0]).shape == (3, 0)


def test_masks_of_each_example(x: Tensor) -> None:
    q = ap.Field(model).bind(x, target=1)
    game = ap.Game(q, ap.groups.Elements(), ap.fills.Baselines())
    masks = torch.rand(3, 6, 4) > 0.5
    found = game.value(masks)
    for b in range(3):
        assert torch.equal(found[b], game.value(masks[b])[b])


def test_soft_masks_blend(x: Tensor) -> None:
    q = ap.Field(model).bind(x, target=1)
    game = ap.Game(q, ap.groups.Elements(), ap.fills.Baselines(ap.baselines.Constant(2.0)))
    masks = torch.rand(5, 4, dtype=DOUBLE)
    found = game.value(masks)
    for s in range(5):
        point = masks[s] * x + (1 - masks[s]) * 2
        assert torch.allclose(found[:, s], model(point)[:, 1], atol=1e-14)


def test_labels_with_elements_of_no_player(x: Tensor) -> None:
    """They are always kept."""
    q = ap.Field(model).bind(x, target=1)
    game = ap.Game(q, ap.groups.Labels(torch.tensor([1, -1, 0, 1])), ap.fills.Baselines())
    assert game.players == 2
    found = game.value(all_masks(2))
    for s, (p0, p1) in enumerate(all_masks(2).double()):
        keep = torch.stack([p1, torch.tensor(1.0, dtype=DOUBLE), p0, p1])
        assert torch.allclose(found[:, s], model(x * keep)[:, 1], atol=1e-14)


def test_labels_of_each_example(x: Tensor) -> None:
    """Ragged: an example may have fewer players than another."""
    labels = torch.tensor([[0, 0, 1, 1], [2, 1, 0, -1], [0, 0, 0, 0]])
    q = ap.Field(model).bind(x, target=1)
    game = ap.Game(q, ap.groups.Labels(labels), ap.fills.Baselines())
    assert game.players == 3
    masks = all_masks(3)
    found = game.value(masks)
    for b in range(3):
        for s, mask in enumerate(masks.tolist()):
            keep = torch.tensor([label < 0 or mask[label] for label in labels[b].tolist()])
            assert found[b, s] == pytest.approx(model(x[b : b + 1] * keep)[0, 1].item(), abs=1e-14)


def test_several_inputs_and_channels() -> None:
    a, b = torch.randn(2, 3, 2, 2, dtype=DOUBLE), torch.randn(2, 2, dtype=DOUBLE)

    def both(a: Tensor, b: Tensor) -> Tensor:
        return (a**2).flatten(1).sum(1) * b.sum(1)

    q = ap.Field(both).bind((a, b))
    labels = (torch.arange(4).reshape(1, 1, 2, 2), torch.tensor([4, 0]))  # player 0 spans both inputs
    game = ap.Game(q, ap.groups.Labels(labels), ap.fills.Baselines())
    assert game.players == 5
    mask = torch.tensor([[False, True, True, False, True]])
    keep_a = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=DOUBLE)
    want = both(a * keep_a, b * torch.tensor([1.0, 0.0], dtype=DOUBLE))
    assert torch.allclose(game.value(mask)[:, 0], want, atol=1e-14)
    pixels = ap.Game(ap.Field(lambda a: a.flatten(1).sum(1)).bind(a), ap.groups.Pixels(), ap.fills.Baselines())
    assert pixels.players == 4
    assert torch.allclose(pixels.value(torch.eye(4)), a.sum(1).flatten(1), atol=1e-14)


REDUCTIONS: list[Literal["score_of_mean", "mean_of_score"]] = ["score_of_mean", "mean_of_score"]


@pytest.mark.parametrize("chunk", [1, 3, "auto"])
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("form", ["tensor", "dict", "object"])
def test_both_reductions(x: Tensor, reduce: Literal["score_of_mean", "mean_of_score"], chunk: Any, form: str) -> None:
    shapes: dict[str, Any] = {
        "tensor": model,
        "dict": lambda x: {"logits": model(x), "loss": x.mean() * 0},
        "object": lambda x: SimpleNamespace(logits=model(x)),
    }
    data = torch.randn(5, 4, dtype=DOUBLE)
    q = ap.Field(shapes[form], ap.LogProbability(), batch_size=chunk).bind(x, target=[0, 1, 0])
    game = ap.Game(q, ap.groups.Elements(), ap.fills.Marginal(data), reduce)
    masks = all_masks(4)
    found = game.value(masks)
    for b, c in enumerate((0, 1, 0)):
        for s, mask in enumerate(masks):
            z = model(torch.where(mask, x[b], data))
            p = z.mean(0).log_softmax(0) if reduce == "score_of_mean" else z.log_softmax(1).mean(0)
            assert found[b, s] == pytest.approx(p[c].item(), abs=1e-12)
    other = ap.Game(q, ap.groups.Elements(), ap.fills.Marginal(data), next(r for r in REDUCTIONS if r != reduce))
    assert float((other.value(masks) - found).abs().max()) > 1e-3


class Random:
    """A fill that draws its numbers, and looks at the mask."""

    def __call__(self, q: ap.Question, mask: Any, owner: Owner, draw: Tensor) -> Tensor:
        return q.stream("fill").normal(q.x, owner, draw)[:, None] + mask.double().sum(1)[:, None, None]


def test_fills_do_not_depend_on_chunks_or_blocks(x: Tensor) -> None:
    masks = torch.rand(9, 4) > 0.5
    games = [
        ap.Game(ap.Field(model, batch_size=chunk).bind(x, target=1), ap.groups.Elements(), Random())
        for chunk in (1, 4, 100)
    ]
    want = games[0].value(masks)
    for game in games:
        assert torch.allclose(game.value(masks), want, atol=1e-14)
        for size in (1, 2, 5):
            blocks = (masks[i : i + size] for i in range(0, 9, size))
            assert torch.allclose(game.value(blocks), want, atol=1e-14)
    same = games[2].value(masks[:1].expand(9, 4))
    assert len({round(v, 12) for v in same[0].tolist()}) == 9  # each coalition has a draw of its own
    alone = ap.Game(ap.Field(model).bind(x[1:2], target=1), ap.groups.Elements(), Random())
    assert torch.allclose(alone.value(masks)[0], want[1], atol=1e-14)


def test_games_of_inner_sites(x: Tensor) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2)).double()
    q = ap.Field(net, site=ap.At("1")).bind(x, target=1)
    game = ap.Game(q, ap.groups.Elements(), ap.fills.Baselines())
    assert game.players == 3
    want = net[2](q.x * torch.tensor([1, 0, 1]))[:, 1]
    assert torch.allclose(game.value(torch.tensor([[1.0, 0.0, 1.0]]))[:, 0], want.detach(), atol=1e-14)
