"""Samplers: which coalitions are asked, of whom, and how often."""

from itertools import combinations, permutations
from math import comb

import pytest
import torch

import apportion as ap
from apportion.core.errors import ConfigError, InputError
from apportion.parts.masks.samplers import Sampler, shapley_kernel

DOUBLE = torch.float64
RAGGED = torch.tensor([[0, 0, 1, 1], [3, 2, 1, 0], [0, 1, 2, -1]])


def game(players: int = 4, batch: int = 2, seed: int = 0) -> ap.Game:
    x = torch.arange(1.0, 1 + players * batch, dtype=DOUBLE).reshape(batch, players)
    q = ap.Field(lambda x: x.prod(1) + x[:, 0]).bind(x, ids=range(batch), seed=seed)
    return ap.Game(q, ap.groups.Elements(), ap.fills.Baselines())


def ragged(at: list[int] | None = None) -> ap.Game:
    at = at or [0, 1, 2]
    x = torch.arange(1.0, 13, dtype=DOUBLE).reshape(3, 4)[at]
    q = ap.Field(lambda x: (x**2).sum(1)).bind(x, ids=at)
    return ap.Game(q, ap.groups.Labels(RAGGED[at]), ap.fills.Baselines())


def asked(sampler: Sampler, g: ap.Game, budget: int | None = None) -> list[list[tuple[bool, ...]]]:
    """For each example its coalitions, of its own players, in order."""
    out: list[list[tuple[bool, ...]]] = [[] for _ in range(len(g.question))]
    for block in sampler.blocks(g, budget):
        masks = block.masks.expand(len(out), -1, -1)
        for b, mine in enumerate(out):
            for s in range(block.size):
                if block.where is None or bool(block.where[b, s]):
                    mine.append(tuple(masks[b, s, : int(g.sizes[b])].tolist()))
    return out


def test_all_subsets() -> None:
    for mine in asked(ap.samplers.AllSubsets(), game()):
        assert len(mine) == len(set(mine)) == 16
    for mine, n in zip(asked(ap.samplers.AllSubsets(), ragged()), (2, 4, 3), strict=True):
        assert len(mine) == len(set(mine)) == 2**n
    with pytest.raises(InputError, match="all subsets of 5 players") as caught:
        next(ap.samplers.AllSubsets(most=4).blocks(game(5)))
    assert "sample" in str(caught.value)


def test_leave_one_out() -> None:
    for mine, n in zip(asked(ap.samplers.LeaveOneOut(), ragged()), (2, 4, 3), strict=True):
        assert [m.index(False) for m in mine] == list(range(n))
        assert all(sum(m) == n - 1 for m in mine)
    for mine in asked(ap.samplers.LeaveOneOut(alone=True), game()):
        assert [m.index(True) for m in mine] == list(range(4))


def test_permutations_are_chains_of_their_order() -> None:
    g = ragged()
    sampler = ap.samplers.Permutations()
    orders = [0, 0, 0]
    for block in sampler.blocks(g, 7):
        assert block.order is not None
        m = block.order.shape[1]
        masks = block.masks.unflatten(1, (m, 5))
        live = torch.ones(3, block.size, dtype=torch.bool) if block.where is None else block.where
        for b, n in enumerate((2, 4, 3)):
            for j in range(m):
                if not live[b, 5 * j]:
                    continue
                orders[b] += 1
                assert sorted(block.order[b, j, :n].tolist()) == list(range(n))
                for k in range(n + 1):
                    inside = masks[b, j, k, :n].nonzero()[:, 0].tolist()
                    assert inside == sorted(block.order[b, j, :k].tolist())
    assert orders == [7, 2, 3]
    assert [sampler.coalitions(n, 7) for n in (2, 4, 3)] == [7, 6, 6]


def test_permutations_are_uniform() -> None:
    g = game(3, 1)
    found = torch.cat([b.order[0] for b in ap.samplers.Permutations().blocks(g, 12000) if b.order is not None])
    counts = torch.tensor([int((found == torch.tensor(p)).all(1).sum()) for p in permutations(range(3))])
    assert counts.sum() == 6000
    assert ((counts - 1000) ** 2 / 1000).sum() < 20.5  # chi-square with 5 degrees of freedom, 0.1 %


def test_bernoulli() -> None:
    for p in (0.2, 0.5):
        block = torch.cat([b.masks for b in ap.samplers.Bernoulli(p).blocks(game(6), 3000)], 1)
        assert block.shape == (2, 3000, 6)
        assert float((block.double().mean((0, 1)) - p).abs().max()) < 4 * (p * (1 - p) / 6000) ** 0.5
        assert not torch.equal(block[0], block[1])
    with pytest.raises(ConfigError, match="p=1"):
        ap.samplers.Bernoulli(1.0)


def test_shapley_kernel() -> None:
    """Weights .25, .125, .25 of four players, before they are normalized."""
    weight = shapley_kernel(4)
    assert torch.allclose(weight[1:4] / weight[1] * 0.25, torch.tensor([0.25, 0.125, 0.25], dtype=DOUBLE))
    for n in (1, 2, 5, 9):
        total = sum(comb(n, s) * float(w) for s, w in enumerate(shapley_kernel(n)))
        assert total == pytest.approx(float(n > 1))


def test_kernel_weighted_lists_what_it_can_pay_for() -> None:
    g = ragged()
    sampler = ap.samplers.KernelWeighted()
    (block,) = sampler.blocks(g, 6)
    assert block.weight is not None
    assert torch.allclose(block.weight.sum(1), torch.ones(3, dtype=DOUBLE))
    mine = asked(sampler, g, 6)
    assert len(set(mine[0])) == len(mine[0]) == 2
    assert len(set(mine[2])) == len(mine[2]) == 6
    assert len(mine[1]) == 6  # of 14: three drawn, with their complements
    for a, b in zip(mine[1][::2], mine[1][1::2], strict=True):
        assert all(i != j for i, j in zip(a, b, strict=True))
    assert [sampler.coalitions(n, 6) for n in (2, 4, 3)] == [2, 6, 6]


@pytest.mark.parametrize("paired", [True, False])
def test_kernel_weighted_draws_by_the_kernel(paired: bool) -> None:
    mine = asked(ap.samplers.KernelWeighted(paired), game(6, 1), 60)[0]
    assert len(mine) == 60
    mine = [m for b in range(40) for m in asked(ap.samplers.KernelWeighted(paired), game(6, 1, seed=b), 60)[0]]
    weight = shapley_kernel(6)
    for s in range(1, 6):
        want = comb(6, s) * float(weight[s])
        found = sum(sum(m) == s for m in mine) / len(mine)
        assert abs(found - want) < 4 * (want * (1 - want) / (len(mine) / (2 if paired else 1))) ** 0.5
    of_two = [m for m in mine if sum(m) == 2]
    for pair in combinations(range(6), 2):
        share = sum(all(m[i] for i in pair) for m in of_two) / len(of_two)
        assert abs(share - 1 / 15) < 4 * (1 / 15 / len(of_two)) ** 0.5


SAMPLERS: dict[str, tuple[Sampler, int | None]] = {
    "all": (ap.samplers.AllSubsets(), None),
    "leave one out": (ap.samplers.LeaveOneOut(), None),
    "permutations": (ap.samplers.Permutations(), 30),
    "antithetic": (ap.samplers.Permutations(antithetic=True), 30),
    "rotated": (ap.samplers.Permutations(rotated=True), 30),
    "both": (ap.samplers.Permutations(antithetic=True, rotated=True), 30),
    "pairs": (ap.samplers.Pairs(), None),
    "pairs alone": (ap.samplers.Pairs(alone=True), None),
    "bernoulli": (ap.samplers.Bernoulli(), 30),
    "kernel": (ap.samplers.KernelWeighted(), 8),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_batch_changes_nothing(name: str) -> None:
    sampler, budget = SAMPLERS[name]

    def partial(at: list[int]) -> list[list[tuple[bool, ...]]]:  # the full coalition fills up chains of the larger
        return [[m for m in mine if not all(m)] for mine in asked(sampler, ragged(at), budget)]

    whole = partial([0, 1, 2])
    for at in ([0], [2, 0], [1]):
        assert partial(at) == [whole[b] for b in at]


@pytest.mark.parametrize("name", SAMPLERS)
def test_games_evaluate_at_most_what_is_announced(name: str) -> None:
    sampler, budget = SAMPLERS[name]
    g = ragged()
    for block in sampler.blocks(g, budget):
        values = g.value(block)
        assert values.shape == (3, block.size)
        part = g.value(block.among(torch.tensor([False, True, False])))
        assert not part[[0, 2]].any()
        assert torch.equal(part[1], values[1])
    most = torch.tensor([sampler.coalitions(n, budget) for n in (2, 4, 3)])
    assert (g.evaluated <= most).all()
    assert (g.evaluated <= torch.tensor([2, 14, 6])).all()
    assert g.question.cost.forward.tolist() == (g.evaluated + 1).tolist() or name != "all"


@pytest.mark.parametrize("name", ["permutations", "bernoulli", "kernel"])
def test_seeds_and_purposes_give_other_samples(name: str) -> None:
    sampler, _ = SAMPLERS[name]

    def drawn(seed: int, purpose: str) -> torch.Tensor:
        return torch.cat([b.masks for b in sampler.blocks(game(9, 1, seed=seed), 40, purpose)], 1)

    first = drawn(0, "coalitions")
    assert torch.equal(first, drawn(0, "coalitions"))
    assert not torch.equal(first, drawn(1, "coalitions"))
    assert not torch.equal(first, drawn(0, "held out"))
    with pytest.raises(ConfigError, match="budget=1"):
        next(ap.samplers.Permutations().blocks(game(9, 1), 1))


@pytest.mark.parametrize(("antithetic", "rotated"), [(True, False), (False, True), (True, True)])
def test_families_of_permutations(antithetic: bool, rotated: bool) -> None:
    """Reverses follow their orders; of rotations every player is once at every place; of each example's own size."""
    sampler = ap.samplers.Permutations(antithetic, rotated)
    g = ragged()
    blocks = list(sampler.blocks(g, 60))
    order = torch.cat([b.order for b in blocks if b.order is not None], 1)
    for b, n in enumerate((2, 4, 3)):
        family = (n if rotated else 1) * (2 if antithetic else 1)
        count = sampler.orders(n, 60)
        assert count == 60 // (n - 1) // family * family
        mine = order[b, :count, :n].unflatten(0, (-1, family))
        assert torch.equal(mine.sort(-1).values, torch.arange(n).expand_as(mine))
        for one in mine:
            if rotated:
                for half in one.split(n):
                    assert all(half[:, place].unique().numel() == n for place in range(n))
            if antithetic:
                first, second = one[: family // 2], one[family // 2 :]
                assert torch.equal(second, first.flip(-1))
        assert len({tuple(one[0].tolist()) for one in mine}) > 1
    with pytest.raises(ConfigError, match="at least"):
        next(sampler.blocks(g, 3))


def test_pairs() -> None:
    for mine, n in zip(asked(ap.samplers.Pairs(), ragged()), (2, 4, 3), strict=True):
        assert [tuple(i for i, kept in enumerate(m) if not kept) for m in mine] == list(combinations(range(n), 2))
    block = next(ap.samplers.Pairs(alone=True).blocks(game(5)))
    assert block.masks.sum(-1).unique().tolist() == [2]


def pictures(high: int = 20, wide: int = 15, batch: int = 1, seed: int = 0) -> ap.Game:
    x = torch.rand(batch, 2, high, wide, dtype=DOUBLE)
    q = ap.Field(lambda x: x.flatten(1).sum(1)).bind(x, ids=range(batch), seed=seed)
    return ap.Game(q, ap.groups.Pixels(), ap.fills.Baselines())


def test_smooth_grids_by_hand() -> None:
    """The same masks, pixel by pixel, from the same random numbers."""
    sampler, g = ap.samplers.SmoothGrids(4, 0.3), pictures()
    masks = next(sampler.blocks(g, 3)).masks.reshape(3, 20, 15)
    u = g.question.stream("coalitions").uniform(torch.zeros(1, 18), torch.zeros(3, dtype=torch.long), torch.arange(3))
    for k in range(3):
        grid = (u[k, 2:].reshape(4, 4) < 0.3).double()
        top, left = int(u[k, 0] * 5), int(u[k, 1] * 4)
        for i in range(0, 20, 3):
            for j in range(0, 15, 2):
                place = []
                for at, length in ((i + top, 25), (j + left, 20)):
                    where = min(max((at + 0.5) * 4 / length - 0.5, 0), 3)
                    low = min(int(where), 2)
                    place.append((low, where - low))
                (a, s), (b, t) = place
                want = (1 - s) * ((1 - t) * grid[a, b] + t * grid[a, b + 1])
                want += s * ((1 - t) * grid[a + 1, b] + t * grid[a + 1, b + 1])
                assert float(masks[k, i, j]) == pytest.approx(float(want), abs=1e-5)


def test_smooth_grids_keep_p_of_every_pixel() -> None:
    sampler = ap.samplers.SmoothGrids(3, 0.25)
    masks = torch.cat([b.masks for b in sampler.blocks(pictures(), 4000)], 1)[0].double()
    spread = masks.std(0) / 4000**0.5
    assert ((masks.mean(0) - 0.25).abs() < 5 * spread).all()
    whole = torch.cat([b.masks for b in sampler.blocks(pictures(batch=3), 5)], 1)
    alone = torch.cat([b.masks for b in sampler.blocks(pictures(batch=1), 5)], 1)
    assert torch.equal(whole[:1], alone)
    with pytest.raises(InputError, match=r"Pixels\(\)"):
        next(sampler.blocks(game(), 5))
    with pytest.raises(ConfigError, match="p=0"):
        ap.samplers.SmoothGrids(p=0.0)
