"""Estimators on tables of values: exact ones against the definition, all against each other."""

from itertools import combinations
from math import comb

import pytest
import torch
from torch import Tensor

from apportion.core.errors import ConfigError
from apportion.parts.masks.estimators import Chains, Differences, LeastSquares, Sums
from apportion.parts.masks.weights import BanzhafWeights, LeaveOneOutWeights, ShapleyWeights, SizeWeights

DOUBLE = torch.float64
PLAYERS = 5
COALITIONS = (torch.arange(2**PLAYERS)[:, None] >> torch.arange(PLAYERS) & 1).bool()
WEIGHTS = [ShapleyWeights(), BanzhafWeights(), BanzhafWeights(0.3), LeaveOneOutWeights()]
ALL = torch.ones(2, dtype=torch.bool)


def tables() -> Tensor:
    """Two games; the second one has 3 players, and the others say nothing."""
    table = torch.randn(2, 2**PLAYERS, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    table[1] = table[1, torch.arange(2**PLAYERS) & 7]
    return table


SIZES = torch.tensor([5, 3])


def by_definition(v: Tensor, weights: SizeWeights, players: int) -> Tensor:
    """Σ_{S∌i} p(|S|) (v(S ∪ i) - v(S)), coalition by coalition."""
    p, out = weights.of(players), torch.zeros(PLAYERS, dtype=DOUBLE)
    for i in range(players):
        others = [j for j in range(players) if j != i]
        for size in range(players):
            for s in combinations(others, size):
                index = sum(1 << j for j in s)
                out[i] += p[size] * (v[index | 1 << i] - v[index])
    return out


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("block", [1, 7, 32])
def test_sums(weights: SizeWeights, block: int) -> None:
    v = tables()
    found = Sums(weights, SIZES, PLAYERS)
    for masks, values in zip(COALITIONS.split(block), v.split(block, 1), strict=True):
        found.add(masks, values, ALL)
    want = torch.stack([by_definition(v[b], weights, int(n)) for b, n in enumerate(SIZES)])
    torch.testing.assert_close(found.estimate().values, want, atol=1e-13, rtol=0)
    assert not found.estimate().standard_error.any()


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("players", [1, 2, 7, 40])
def test_weights_are_those_of_a_semivalue(weights: SizeWeights, players: int) -> None:
    each = torch.tensor([comb(players - 1, s) for s in range(players)], dtype=DOUBLE)
    p = weights.of(players)
    assert p.shape == (players,)
    assert bool((p >= 0).all())
    assert float((p * each).sum()) == pytest.approx(1, abs=1e-12)


def test_impossible_probability() -> None:
    with pytest.raises(ConfigError, match="0 < p < 1"):
        BanzhafWeights(1.0)


@pytest.mark.parametrize("block", [1, 7, 32])
def test_least_squares_over_all_coalitions_is_exact(block: int) -> None:
    v = tables()
    found = LeastSquares(SIZES, PLAYERS, 1, v[:, 0], v[:, -1], drawn=False)
    for masks, values in zip(COALITIONS.split(block), v.split(block, 1), strict=True):
        found.add(masks, values, ALL)
    want = torch.stack([by_definition(v[b], ShapleyWeights(), int(n)) for b, n in enumerate(SIZES)])
    torch.testing.assert_close(found.estimate().values, want, atol=1e-12, rtol=0)


def test_all_orders_give_the_shapley_value() -> None:
    v = tables()[:1]
    orders = torch.tensor([p for p in _permutations(PLAYERS)])
    rank = orders.argsort(1)
    masks = (rank[:, None] <= torch.arange(PLAYERS - 1)[:, None]).flatten(0, 1)
    values = v[:, (masks * 2 ** torch.arange(PLAYERS)).sum(1)]
    found = Chains(PLAYERS, 1, v[:, 0], v[:, -1])
    step = 30 * (PLAYERS - 1)
    for m, w in zip(masks.split(step), values.split(step, 1), strict=True):
        found.add(m, w, ALL[:1])
    torch.testing.assert_close(found.estimate().values[0], by_definition(v[0], ShapleyWeights(), 5), atol=1e-13, rtol=0)
    once = Chains(PLAYERS, 1, v[:, 0], v[:, -1])
    once.add(masks, values, ALL[:1])
    torch.testing.assert_close(once.estimate().standard_error, found.estimate().standard_error, atol=1e-13, rtol=0)
    # over all orders the spread is that of the marginal contributions
    drops = (rank[:, :, None] > rank[:, None, :]).long() * 2 ** torch.arange(PLAYERS)
    before = drops.sum(2)
    gains = v[0, before + 2 ** torch.arange(PLAYERS)] - v[0, before]
    want = gains.std(0) / len(orders) ** 0.5
    torch.testing.assert_close(once.estimate().standard_error[0], want, atol=1e-13, rtol=0)


def _permutations(n: int) -> list[tuple[int, ...]]:
    from itertools import permutations

    return list(permutations(range(n)))


def test_differences_over_all_coalitions_are_banzhaf_values() -> None:
    v = tables()
    found = Differences(SIZES, PLAYERS, v[:, -1])
    found.add(COALITIONS, v, ALL)
    want = torch.stack([by_definition(v[b], BanzhafWeights(), int(n)) for b, n in enumerate(SIZES)])
    torch.testing.assert_close(found.estimate().values, want, atol=1e-13, rtol=0)


def test_inactive_examples_stay() -> None:
    v = tables()
    for found in (
        Differences(SIZES, PLAYERS, v[:, -1]),
        LeastSquares(SIZES, PLAYERS, 2, v[:, 0], v[:, -1], drawn=True),
    ):
        found.add(COALITIONS, v, ALL)
        before = found.estimate()
        found.add(COALITIONS[:8], v[:, :8] * 3, torch.tensor([True, False]))
        after = found.estimate()
        for a, b in zip(before, after, strict=True):
            assert torch.equal(a[1], b[1])
            assert not torch.equal(a[0], b[0])


def test_ridge_would_turn_the_values() -> None:
    """A ridge of 1 on the weighted equations moves every value, which is why none is added."""
    v = tables()[:1]
    found = LeastSquares(SIZES[:1], PLAYERS, 1, v[:, 0], v[:, -1], drawn=False)
    found.add(COALITIONS, v, ALL[:1])
    plain = found.estimate().values
    found.square += torch.eye(PLAYERS - 1, dtype=DOUBLE)
    turned = found.estimate().values
    want = by_definition(v[0], ShapleyWeights(), PLAYERS)
    assert float((plain[0] - want).abs().max()) < 1e-12
    assert float((turned[0] - want).abs().max()) > 0.1


def test_too_few_coalitions_are_refused() -> None:
    v = tables()[:1]
    found = LeastSquares(SIZES[:1], PLAYERS, 1, v[:, 0], v[:, -1], drawn=True)
    found.add(COALITIONS[1:4], v[:, 1:4], ALL[:1])
    with pytest.raises(ConfigError, match="3 coalitions for 5 players.*raise budget"):
        found.estimate()
