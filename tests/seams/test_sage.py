"""SAGE by full enumeration on a full-factorial table: exactly w_i² Var(x_i)."""

import itertools
import math
from typing import Literal

import torch
from torch import Tensor, nn

import apportion as ap

# every combination once: features are exactly independent under the empirical distribution
LEVELS = ([-1.0, 1.0], [-2.0, 0.0, 2.0], [0.0, 0.5, 1.5])
DATA = torch.tensor(list(itertools.product(*LEVELS)), dtype=torch.float64)
WEIGHT = torch.tensor([1.0, -0.75, 2.0], dtype=torch.float64)


def model() -> nn.Module:
    net = nn.Linear(3, 1).double().requires_grad_(False)
    net.weight.copy_(WEIGHT)
    net.bias.fill_(0.3)
    return net


def squared(outputs: Tensor, labels: Tensor) -> Tensor:
    return (outputs[:, 0] - labels) ** 2


def game_values(reduce: Literal["score_of_mean", "mean_of_score"], background: Tensor = DATA) -> dict[int, float]:
    """v(S) = -mean loss over the table, for every S as a bit set."""
    net = model()
    q = ap.Field(net, ap.Loss(squared), batch_size=7).bind(DATA, target=net(DATA)[:, 0])
    game = ap.Game(q, ap.groups.Elements(), ap.fills.Marginal(background), reduce=reduce)
    masks = torch.tensor(list(itertools.product([False, True], repeat=3)))
    values = game.value(iter(masks.split(3)))
    torch.testing.assert_close(values, game.value(masks))
    v = -values.mean(0)
    return {int(sum(int(b) << i for i, b in enumerate(m))): float(v[k]) for k, m in enumerate(masks.tolist())}


def shapley(v: dict[int, float], players: int = 3) -> Tensor:
    out = torch.zeros(players, dtype=torch.float64)
    for i in range(players):
        for s, without in v.items():
            if not s >> i & 1:
                k = s.bit_count()
                weight = math.factorial(k) * math.factorial(players - k - 1) / math.factorial(players)
                out[i] += weight * (v[s | 1 << i] - without)
    return out


def test_additive_model_with_squared_loss():
    expected = WEIGHT**2 * DATA.var(0, correction=0)
    found = shapley(game_values("score_of_mean"))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(found.sum(), model()(DATA).var(correction=0), atol=1e-12, rtol=0)


def test_averaging_losses_instead_of_predictions_is_another_game():
    """The spread of the fills then counts as loss: twice the value here."""
    expected = WEIGHT**2 * DATA.var(0, correction=0)
    other = shapley(game_values("mean_of_score"))
    torch.testing.assert_close(other, 2 * expected, atol=1e-12, rtol=0)


def test_the_background_matters():
    few = shapley(game_values("score_of_mean", DATA[:4]))  # not the table's own distribution
    assert (few - WEIGHT**2 * DATA.var(0, correction=0)).abs().max() > 0.1
