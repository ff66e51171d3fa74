"""Games: the score of each example under masks."""

from collections.abc import Iterator
from itertools import product
from math import comb
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

import apportion as ap
from apportion.core import game as core_game
from apportion.core.errors import InputError
from apportion.core.game import Weighted
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
    assert cost.forward.tolist() == [14 + 1 + 1] * 3  # coalitions, the empty one by the baseline, gradient
    assert game.asked.tolist() == [16] * 3
    assert game.evaluated.tolist() == [14] * 3


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


def test_coalitions_beside_soft_masks_are_the_same_coalitions(x: Tensor) -> None:
    """v is one function of S, also with a random fill, and however S is written."""
    game = ap.Game(ap.Field(model).bind(x, target=1), ap.groups.Elements(), ap.fills.FreshNoise(count=2))
    masks = all_masks(4)[1:6]
    want = game.value(masks)
    found = game.value(torch.cat([masks.double()[:2], torch.full((1, 4), 0.5, dtype=DOUBLE), masks.double()[2:]]))
    assert torch.equal(found[:, [0, 1, 3, 4, 5]], want)
    assert game.evaluated.tolist() == [6] * 3


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
    assert same[0].unique().numel() == 1  # v is one function of the coalition
    assert len(set(games[2].value(all_masks(4)[1:-1])[0].tolist())) == 14  # others draw others
    alone = ap.Game(ap.Field(model).bind(x[1:2], target=1), ap.groups.Elements(), Random())
    assert torch.allclose(alone.value(masks)[0], want[1], atol=1e-14)


def test_games_of_inner_sites(x: Tensor) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2)).double()
    q = ap.Field(net, site=ap.At("1")).bind(x, target=1)
    game = ap.Game(q, ap.groups.Elements(), ap.fills.Baselines())
    assert game.players == 3
    want = net[2](q.x * torch.tensor([1, 0, 1]))[:, 1]
    assert torch.allclose(game.value(torch.tensor([[1.0, 0.0, 1.0]]))[:, 0], want.detach(), atol=1e-14)


def test_repeated_coalitions_are_evaluated_once(x: Tensor) -> None:
    q = ap.Field(model).bind(x, target=[0, 1, 1])
    game = ap.Game(q, ap.groups.Elements(), ap.fills.Baselines())
    masks = all_masks(4)[torch.randint(16, (200,))]
    found = game.value(masks)
    assert torch.equal(game.value(masks), found)
    distinct = len({tuple(m) for m in masks.tolist() if 0 < sum(m) < 4})
    assert game.evaluated.tolist() == [distinct] * 3
    assert game.asked.tolist() == [400] * 3
    assert q.cost.forward.tolist() == [distinct + 1] * 3
    plain = ap.Game(ap.Field(model).bind(x, target=[0, 1, 1]), ap.groups.Elements(), ap.fills.Baselines())
    for s in range(200):
        assert torch.allclose(plain.value(masks[s : s + 1])[:, 0], found[:, s], atol=1e-14)


def test_deduplication_saves_what_theory_says() -> None:
    """Of m uniform coalitions of 12 players, 4096 (1 - (1 - 1/4096)^m) are distinct on average."""
    x = torch.randn(4, 12, dtype=DOUBLE)
    q = ap.Field(lambda x: x.prod(1)).bind(x, ids=range(4))
    game = ap.Game(q, ap.groups.Elements(), ap.fills.Baselines())
    m = 3000
    for block in ap.samplers.Bernoulli().blocks(game, m):
        game.value(block)
    want = 4096 * (1 - (1 - 1 / 4096) ** m)
    share = (1 - 1 / 4096) ** m
    deviation = (4096 * share * (1 - share * (1 + m / 4096))) ** 0.5  # of the number of empty cells
    assert ((game.evaluated - want).abs() < 4 * deviation + 2).all()
    # chains meet often where they are thin: of 300 orders at most 12 coalitions of 1, and 12 of 11, are new
    chains = ap.Game(q, ap.groups.Elements(), ap.fills.Baselines())
    budget = 300 * 11
    for block in ap.samplers.Permutations().blocks(chains, budget):
        chains.value(block)
    expected = sum(comb(12, s) * (1 - (1 - 1 / comb(12, s)) ** 300) for s in range(1, 12))
    assert ((chains.evaluated - expected).abs() < 4 * expected**0.5).all()
    assert (chains.evaluated < 0.75 * budget).all()


def test_what_is_remembered_is_bounded(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_game, "_REMEMBERED", 1100)
    q = ap.Field(model).bind(x, target=0)
    game = ap.Game(q, ap.groups.Elements(), ap.fills.Baselines())
    masks = all_masks(4)
    want = game.value(masks)
    assert len(game._place) == 10
    assert torch.equal(game.value(masks), want)
    assert game.evaluated.tolist()[2] > 14


def test_ragged_players_beyond_an_example_say_nothing(x: Tensor) -> None:
    labels = torch.tensor([[0, 0, 1, 1], [2, 1, 0, -1], [0, 0, 0, 0]])
    q = ap.Field(model).bind(x, target=1)
    game = ap.Game(q, ap.groups.Labels(labels), ap.fills.Baselines())
    assert game.sizes.tolist() == [2, 3, 1]
    assert game.is_ragged
    game.value(all_masks(3))
    assert game.evaluated.tolist() == [2, 6, 0]
    noisy = ap.Game(q, ap.groups.Labels(labels), Random())
    alone = ap.Game(ap.Field(model).bind(x[:1], target=1), ap.groups.Labels(labels[:1]), Random())
    own = torch.tensor([[False, False], [False, True], [True, False]])
    more = torch.cat([own, torch.tensor([[True], [False], [True]])], 1)
    assert torch.allclose(noisy.value(more)[:1], alone.value(own), atol=1e-14)


def test_where_asks_of_some_examples(x: Tensor) -> None:
    q = ap.Field(model).bind(x, target=1)
    game = ap.Game(q, ap.groups.Elements(), ap.fills.Marginal(torch.randn(3, 4, dtype=DOUBLE)))
    masks = all_masks(4)
    where = torch.rand(3, 16) > 0.5
    part = game.value(masks, where)
    assert game.asked.tolist() == where.sum(1).tolist()
    assert torch.equal(part, torch.where(where, game.value(masks), 0))


def test_draws_that_weigh_differently(x: Tensor) -> None:
    data, weight = torch.randn(3, 4, dtype=DOUBLE), torch.tensor([0.25, 0.0, 0.75], dtype=DOUBLE)

    class Table:
        def __call__(self, q: ap.Question, mask: Any, owner: Owner, draw: Tensor) -> Weighted:
            return Weighted(data.expand(len(owner), 3, 4), weight.expand(len(owner), 3))

    for reduce in REDUCTIONS:
        q = ap.Field(model, ap.LogProbability()).bind(x, target=1)
        game = ap.Game(q, ap.groups.Elements(), Table(), reduce)
        found = game.value(all_masks(4))
        for b in range(3):
            for s, mask in enumerate(all_masks(4)):
                z = model(torch.where(mask, x[b], data))
                p = (weight @ z).log_softmax(0) if reduce == "score_of_mean" else weight @ z.log_softmax(1)
                assert found[b, s] == pytest.approx(p[1].item(), abs=1e-12)
        assert q.cost.forward.tolist() == [2 * 15] * 3  # two of three draws, all but the full coalition


def test_empty_groups(x: Tensor) -> None:
    q = ap.Field(model).bind(x, target=1)
    with pytest.raises(InputError, match=r"groups \[1\] without an element in example 0") as caught:
        ap.Game(q, ap.groups.Labels(torch.tensor([0, 0, 2, 2])), ap.fills.Baselines())
    assert "return_inverse" in str(caught.value)


def test_a_fill_that_changes_nothing(x: Tensor) -> None:
    q = ap.Field(model).bind(x, target=1)
    game = ap.Game(q, ap.groups.Elements(), ap.fills.Baselines(ap.baselines.Given(x)))
    with pytest.raises(InputError, match="example 0 unchanged, for every one of its 4 player"):
        game.value(~torch.eye(4, dtype=torch.bool))
    y = x.clone()
    y[1, 2] = 0
    some = ap.Game(ap.Field(model).bind(y, target=1), ap.groups.Elements(), ap.fills.Baselines())
    some.value(~torch.eye(4, dtype=torch.bool))
    assert some.unchanged.nonzero().tolist() == [[1, 2]]


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_what_the_fill_leaves_is_found_whatever_the_batch_size(rows: int) -> None:
    field, masks = ap.Field(lambda x: x.square().sum(1), batch_size=rows), ~torch.eye(20, dtype=torch.bool)
    black = ap.Game(field.bind(torch.zeros(1, 20)), ap.groups.Elements(), ap.fills.Baselines())
    with pytest.raises(InputError, match="for every one of its 20 player"):
        black.value(masks)
    partly = ap.Game(field.bind((torch.arange(20) < 3).float()[None]), ap.groups.Elements(), ap.fills.Baselines())
    partly.value(masks)
    assert partly.unchanged.sum() == 17


SAME = ap.fills.Inpainted(lambda x, kept: x)
NOTHING: dict[str, tuple[ap.Explainer, ap.Explainer]] = {  # with a fixed fill, and with one that looks at the mask
    "occlusion": (ap.Occlusion(), ap.Occlusion(fill=SAME)),
    "rise": (ap.RISE(budget=24), ap.RISE(budget=24, fill=SAME)),
    "bits": (ap.PredictionDifference(fill=ap.fills.Baselines()), ap.PredictionDifference(fill=SAME)),
    "drawn bits": (ap.PredictionDifference(fill=ap.fills.Marginal(torch.zeros(2, 1, 3, 3))), ap.Occlusion(fill=SAME)),
}


@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("name", NOTHING)
def test_methods_that_make_their_own_masks_look_too(name: str, rows: int) -> None:
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(9, 2))
    field, black = ap.Field(net, batch_size=rows), torch.zeros(2, 1, 3, 3)
    black[0] = 1  # the other example is the one that stays
    fixed, other = NOTHING[name]
    for explain, at in ((fixed, 1), (other, 0)):
        with pytest.raises(InputError, match=f"returns example {at} unchanged, for every one of its 9 player"):
            explain(field, black, target=0)
    black[1, 0, 0] = 1
    (told,) = (w for w in fixed(field, black, target=0).warnings if "left" in w)
    assert "6 player(s) as they are, where it was looked: of example 1, [3, 4, 5, 6, 7, 8]" in told
    assert not any("left" in w for w in fixed(field, black + 1, target=0).warnings)


def test_pixels_and_groups_of_examples_of_their_own_are_told_apart() -> None:
    """A colour that only one channel has is a change of the pixel, and of its group in that example alone."""
    x = torch.zeros(2, 3, 2, 2)
    x[0, 1, 0, 1] = x[1, 2, 1, 0] = 1
    q = ap.Field(lambda x: x.flatten(1).sum(1)).bind(x)
    pixels = ap.Game(q, ap.groups.Pixels(), ap.fills.Baselines())
    pixels.value(~torch.eye(4, dtype=torch.bool))
    assert pixels.changed.tolist() == [[False, True, False, False], [False, False, True, False]]
    labels = torch.tensor([[[[0, 1], [2, 2]]], [[[1, 1], [0, -1]]]])
    for fill in (ap.fills.Baselines(), ap.fills.Inpainted(lambda x, kept: x * kept)):
        own = ap.Game(q, ap.groups.Labels(labels), fill)
        own.value(~torch.eye(3, dtype=torch.bool))
        assert own.unchanged.tolist() == [[True, False, True], [False, True, False]]


@pytest.mark.parametrize(
    ("masks", "where", "told"),
    [
        ([[1, 0, 1, 0]], None, "a list in a list of masks"),
        (torch.eye(4).numpy(), None, "ndarray of masks"),
        (None, None, "a NoneType as masks"),
        (3, None, "int as masks"),
        (torch.tensor(1.0), None, r"masks of shape \(\)"),
        (torch.ones(4), None, r"masks of shape \(4,\)"),
        (torch.ones(2, 4, dtype=torch.complex64), None, "complex64"),
        (torch.full((2, 4), torch.nan), None, "masks between nan"),
        (torch.eye(4), torch.ones(3, 3, dtype=torch.bool), r"where of \(3, 3\)"),
        (torch.eye(4), torch.ones(3, 4), r"where of \(3, 4\), torch.float32"),
        (torch.eye(4), [[True] * 4] * 3, "list as where"),
        (iter([torch.eye(4)]), torch.ones(3, 4, dtype=torch.bool), "where= beside an iterator"),
    ],
)
@pytest.mark.usefixtures("as_users_run")
def test_masks_that_are_none(x: Tensor, masks: Any, where: Any, told: str) -> None:
    game = ap.Game(ap.Field(model).bind(x, target=0), ap.groups.Elements(), ap.fills.Baselines())
    with pytest.raises(InputError, match=told) as caught:
        game.value(masks, where)
    assert "To fix: " in str(caught.value)


def test_coalitions_draw_by_numbers_of_their_own() -> None:
    """No two of 2^16 coalitions, nor of those with two of 300 players absent, have the same number."""
    small = torch.tensor([[s >> i & 1 for i in range(16)] for s in range(1 << 16)]).bool()
    assert len(set(core_game.hashed(small).tolist())) == 1 << 16
    i, j = torch.triu_indices(300, 300, 1)
    wide = torch.ones(len(i), 300, dtype=torch.bool)
    wide[torch.arange(len(i)), i] = False
    wide[torch.arange(len(i)), j] = False
    assert len(set(core_game.hashed(wide).tolist())) == len(i)
    assert len(set(core_game.hashed(wide[:2000].float() / 3).tolist())) == 2000
    longer = torch.cat([small[:99], torch.zeros(99, 200, dtype=torch.bool)], 1)
    assert (core_game.hashed(longer) == core_game.hashed(small[:99])).all()


def test_windows_of_a_fixed_fill_are_told_before_they_are_played() -> None:
    """Also of those that were never absent alone; the model runs for none of an example that stays."""
    x = torch.zeros(2, 1, 3, 3)
    x[:, :, 0, 0] = 1
    q = ap.Field(lambda x: x.flatten(1).sum(1)).bind(x)
    game = ap.Game(q, ap.groups.Patches(2, 1), ap.fills.Baselines())
    game.value(torch.tensor([[True, False, False, True], [True, True, False, False]]))
    assert game.unchanged.tolist() == [[False, True, True, True]] * 2
    before = int(q.cost.forward.max())
    same = ap.Game(q, ap.groups.Patches(2, 1), ap.fills.Baselines(ap.baselines.Given(x)))
    with pytest.raises(InputError, match="for every one of its 4 player"):
        same.value(torch.tensor([[True, False, False, True], [False, True, True, False]]))
    assert int(q.cost.forward.max()) == before
