"""Dividends: sums over subsets by hand, and the values that follow from them."""

from itertools import permutations

import pytest
import torch

import apportion as ap
from apportion.core.errors import InputError
from apportion.parts.masks.dividends import from_dividends, harsanyi, shares

DOUBLE = torch.float64


def subsets(s: int) -> list[int]:
    return [t for t in range(s + 1) if t & s == t]


@pytest.mark.parametrize("players", [0, 1, 2, 5])
def test_against_the_sum_over_subsets(players: int) -> None:
    v = torch.randn(3, 2**players, dtype=DOUBLE)
    a = harsanyi(v)
    for s in range(2**players):
        want = sum((-1) ** (s.bit_count() - t.bit_count()) * v[:, t] for t in subsets(s))
        assert torch.allclose(a[:, s], torch.as_tensor(want), atol=1e-12)
    assert torch.allclose(from_dividends(a), v, atol=1e-12)
    with pytest.raises(InputError, match=r"2\^n"):
        harsanyi(torch.zeros(3))


def test_shares_are_shapley_and_banzhaf_values() -> None:
    """By permutations and by subsets, on a random game of 4 players."""
    v = torch.randn(16, dtype=DOUBLE)
    a = harsanyi(v)
    orders = list(permutations(range(4)))
    shapley, banzhaf = torch.zeros(4, dtype=DOUBLE), torch.zeros(4, dtype=DOUBLE)
    for order in orders:
        s = 0
        for i in order:
            shapley[i] += (v[s | 1 << i] - v[s]) / len(orders)
            s |= 1 << i
    for i in range(4):
        for s in range(16):
            if not s >> i & 1:
                banzhaf[i] += (v[s | 1 << i] - v[s]) / 8
    size = torch.arange(5, dtype=DOUBLE)
    assert torch.allclose(shares(a, 1 / size.clamp(min=1)), shapley, atol=1e-12)
    assert torch.allclose(shares(a, 2 ** (1 - size)), banzhaf, atol=1e-12)
    inside = torch.tensor([[bool(s >> i & 1) for s in range(16)] for i in range(4)])
    means = torch.stack([v[m].mean() - v[~m].mean() for m in inside])
    assert torch.allclose(means, banzhaf, atol=1e-12)


def test_of_and_and_of_the_larger() -> None:
    """AND of 4 players is one dividend, shared by 4, or halved by each of the other 3; max(3, 1) has 3, 1 and -1."""
    q = ap.Field(lambda x: x.prod(1)).bind(torch.ones(1, 4, dtype=DOUBLE))
    a = harsanyi(ap.Game(q, ap.groups.Elements(), ap.fills.Baselines()))
    assert a[0].tolist() == [0.0] * 15 + [1.0]
    size = torch.arange(5, dtype=DOUBLE)
    assert shares(a, 1 / size.clamp(min=1)).tolist() == [[0.25] * 4]
    assert shares(a, 2 ** (1 - size)).tolist() == [[0.125] * 4]
    larger = ap.Field(lambda x: x.amax(1)).bind(torch.tensor([[3.0, 1.0]], dtype=DOUBLE))
    assert harsanyi(ap.Game(larger, ap.groups.Elements(), ap.fills.Baselines())).tolist() == [[0, 3, 1, -1]]


def test_of_a_game() -> None:
    x = torch.tensor([[2.0, 3.0, 5.0], [1.0, 1.0, 7.0]], dtype=DOUBLE)
    q = ap.Field(lambda x: x[:, 0] * x[:, 1] + 2 * x[:, 2] + x.prod(1)).bind(x)
    game = ap.Game(q, ap.groups.Elements(), ap.fills.Baselines())
    assert torch.allclose(harsanyi(game)[0], torch.tensor([0, 0, 0, 6, 10, 0, 0, 30], dtype=DOUBLE))
    ragged = ap.Game(q, ap.groups.Labels(torch.tensor([[0, 1, 2], [0, 0, 0]])), ap.fills.Baselines())
    assert torch.allclose(harsanyi(ragged)[1], torch.tensor([0, 22, 0, 0, 0, 0, 0, 0], dtype=DOUBLE))
    with pytest.raises(InputError, match="at most 2 players"):
        harsanyi(game, most=2)
