"""Shapley, Banzhaf and other semivalues: games whose answer can be written down, axioms, and estimates of them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, permutations
from math import factorial

import pytest
import torch
from torch import Tensor

import apportion as ap
from apportion import planted
from apportion.core.errors import ConfigError, InputError
from apportion.core.explainer import Explainer

DOUBLE = torch.float64
BERNOULLI = ap.samplers.Bernoulli


class Table:
    """A game on inputs of 0 and 1, by a table: v(S) stands at the number whose bits are S."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.players = len(values).bit_length() - 1

    def __call__(self, x: Tensor) -> Tensor:
        return self.values[(x.round().long() * 2 ** torch.arange(self.players)).sum(1)].to(x.dtype)

    def field(self) -> ap.Field:
        return ap.Field(self, allow_unused=True, batch_size=100_000)

    def ask(self, explain: Explainer, examples: int = 1, seed: int = 0) -> ap.Attribution:
        x = torch.ones(examples, self.players, dtype=DOUBLE)
        return explain(self.field(), x, ids=range(examples), seed=seed)


def random_game(players: int, seed: int = 0) -> Table:
    return Table(torch.randn(2**players, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE))


def subsets(of: list[int]) -> list[tuple[int, ...]]:
    return [s for size in range(len(of) + 1) for s in combinations(of, size)]


def number(s: tuple[int, ...]) -> int:
    return sum(1 << i for i in s)


def by_definition(game: Table, weight: Callable[[int, int], float]) -> Tensor:
    """Σ_{S∌i} p(|S|) (v(S ∪ i) - v(S)), coalition by coalition."""
    v, n = game.values, game.players
    out = torch.zeros(n, dtype=DOUBLE)
    for i in range(n):
        for s in subsets([j for j in range(n) if j != i]):
            out[i] += weight(len(s), n) * (v[number(s) | 1 << i] - v[number(s)])
    return out


def shapley(s: int, n: int) -> float:
    return factorial(s) * factorial(n - s - 1) / factorial(n)


def banzhaf(s: int, n: int) -> float:
    return 0.5 ** (n - 1)


def last(s: int, n: int) -> float:
    return float(s == n - 1)


EXACT: dict[str, tuple[Explainer, Callable[[int, int], float]]] = {
    "shapley": (ap.Shapley(), shapley),
    "shapley, all subsets": (ap.Shapley(sampler=ap.samplers.AllSubsets()), shapley),
    "kernel shap": (ap.KernelSHAP(), shapley),
    "semivalue, shapley": (ap.Semivalue(weights=ap.semivalues.ShapleyWeights()), shapley),
    "banzhaf": (ap.Banzhaf(), banzhaf),
    "banzhaf, all subsets": (ap.Banzhaf(sampler=ap.samplers.AllSubsets()), banzhaf),
    "semivalue, banzhaf": (ap.Semivalue(weights=ap.semivalues.BanzhafWeights()), banzhaf),
    "semivalue, p = 0.3": (
        ap.Semivalue(weights=ap.semivalues.BanzhafWeights(0.3)),
        lambda s, n: 0.3**s * 0.7 ** (n - 1 - s),
    ),
    "leave one out": (ap.Semivalue(weights=ap.semivalues.LeaveOneOutWeights()), last),
}

# -- exact values -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("players", [1, 2, 5])
def test_definition(name: str, players: int) -> None:
    explain, weight = EXACT[name]
    game = random_game(players, seed=players)
    a = game.ask(explain)
    torch.testing.assert_close(a.values[0], by_definition(game, weight), atol=1e-12, rtol=0)
    if "standard_error" in a.parts:
        assert not a.parts["standard_error"].any()


BENCH = {
    "B1": (planted.RootSum(), (4.0, 4.0), (4.0, 2.0), (4.0, 2.0), (4.0, 2.0)),
    "B2": (planted.ReluProduct(), (2.0, 3.0), (1.5, 1.5), (1.5, 1.5), (3.0, 3.0)),
    "B3": (planted.Max(), (3.0, 1.0), (2.5, 0.5), (2.5, 0.5), (2.0, 0.0)),
    "B3'": (planted.Max(), (2.0, 2.001), (1.0, 1.001), (1.0, 1.001), (0.0, 0.001)),
    "B4": (planted.Saturated(), (2.0,), (1.0,), (1.0,), (1.0,)),
    "B5": (planted.Product(), (2.0, 3.0), (3.0, 3.0), (3.0, 3.0), (6.0, 6.0)),
    "B6": (planted.Linear([1.0, -2.0, 3.0], 0.5), (1.0, 2.0, -1.0), *3 * ((1.0, -4.0, -3.0),)),
    "B7": (planted.Min(), (2.0, 1.0), (0.5, 0.5), (0.5, 0.5), (1.0, 1.0)),
}


@pytest.mark.parametrize("name", BENCH)
def test_bench(name: str) -> None:
    net, at, *wanted = BENCH[name]
    x = torch.tensor([at], dtype=DOUBLE)
    for explain, want in zip((ap.Shapley(), ap.Banzhaf(), ap.Semivalue()), wanted, strict=True):
        a = explain(ap.Field(net), x)
        torch.testing.assert_close(a.values, torch.tensor([want], dtype=DOUBLE), atol=1e-12, rtol=0)
    a = ap.KernelSHAP()(ap.Field(net), x)
    torch.testing.assert_close(a.values, torch.tensor([wanted[0]], dtype=DOUBLE), atol=1e-12, rtol=0)


def test_baselines_are_averaged() -> None:
    """x1 x2 at (2, 3), against (0, 0) and (1, 1)."""
    two = ap.fills.Baselines(ap.baselines.Data(torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=DOUBLE)))
    a = ap.Shapley(fill=two)(ap.Field(planted.Product()), torch.tensor([[2.0, 3.0]], dtype=DOUBLE))
    torch.testing.assert_close(a.values, torch.tensor([[2.5, 3.0]], dtype=DOUBLE), atol=1e-12, rtol=0)
    assert float(a.gap.abs()) < 1e-12


def dividends(game: Table) -> dict[tuple[int, ...], float]:
    """a(S) = Σ_{T⊆S} (-1)^(|S|-|T|) v(T)."""
    players = list(range(game.players))
    return {
        s: sum((-1) ** (len(s) - len(t)) * float(game.values[number(t)]) for t in subsets(list(s)))
        for s in subsets(players)
    }


def test_dividends_are_shared() -> None:
    """Shapley: a(S) / |S| to each; Banzhaf: a(S) / 2^(|S|-1); leave-one-out: all of a(S)."""
    game = random_game(4, seed=3)
    a = dividends(game)
    shares = {
        "shapley": lambda s: 1 / len(s),
        "banzhaf": lambda s: 0.5 ** (len(s) - 1),
        "leave one out": lambda s: 1.0,
    }
    for name, share in shares.items():
        want = [sum(share(s) * d for s, d in a.items() if i in s) for i in range(4)]
        found = game.ask(EXACT[name][0]).values[0]
        torch.testing.assert_close(found, torch.tensor(want, dtype=DOUBLE), atol=1e-12, rtol=0)


def test_banzhaf_is_a_difference_of_means_and_a_regression() -> None:
    game = random_game(4, seed=4)
    found = game.ask(ap.Banzhaf()).values[0]
    there = (torch.arange(16)[:, None] >> torch.arange(4) & 1).bool()
    means = torch.stack([game.values[there[:, i]].mean() - game.values[~there[:, i]].mean() for i in range(4)])
    torch.testing.assert_close(found, means, atol=1e-12, rtol=0)
    design = torch.cat([there.double(), torch.ones(16, 1, dtype=DOUBLE)], 1)
    fit = torch.linalg.lstsq(design, game.values[:, None]).solution[:4, 0]  # all coalitions weigh alike
    torch.testing.assert_close(found, fit, atol=1e-12, rtol=0)


def test_players_before_are_not_left_in() -> None:
    """v = x1 + 2 x2 + 3 x3 + 4 x1 x2: a published implementation keeps a view, so that x1 stays 1 from then on."""

    def game(x: Tensor) -> Tensor:
        return x[:, 0] + 2 * x[:, 1] + 3 * x[:, 2] + 4 * x[:, 0] * x[:, 1]

    found = ap.Banzhaf()(ap.Field(game), torch.ones(1, 3, dtype=DOUBLE))
    assert found.values.tolist() == [[3.0, 4.0, 3.0]]
    masks = (torch.arange(8)[:, None] >> torch.arange(3) & 1).double()
    wrong = []
    for i in range(3):
        without = masks.clone()
        without[:, i] = 0
        masks[:, i] = 1  # and is not put back
        wrong.append(float((game(masks) - game(without)).mean()))
    assert wrong == [3.0, 6.0, 3.0]


def test_kernel_shap_has_no_ridge() -> None:
    """A ridge of 1 would shrink what differs from equal shares by 0.75 / 1.75 with four players."""
    want = torch.tensor([-0.962, -0.034, 0.122, 0.366], dtype=DOUBLE)
    game = random_game(4, seed=5)
    there = (torch.arange(16)[:, None] >> torch.arange(4) & 1).double()
    game.values += there @ (want - by_definition(game, shapley))  # players' own contributions are theirs
    a = game.ask(ap.KernelSHAP())
    torch.testing.assert_close(a.values[0], want, atol=1e-12, rtol=0)
    size = there.sum(1).long()
    weight = torch.tensor([0, 0.25, 0.125, 0.25, 0], dtype=DOUBLE)[size]
    weight[0] = weight[15] = 1e9  # the constraint
    square = (there * weight[:, None]).T @ there
    product = (there * weight[:, None]).T @ (game.values - game.values[0])
    plain = torch.linalg.solve(square, product)
    torch.testing.assert_close(plain, want, atol=1e-6, rtol=0)
    ridge = torch.linalg.solve(square + torch.eye(4, dtype=DOUBLE), product)
    torch.testing.assert_close(ridge, torch.tensor([-0.485, -0.087, -0.020, 0.084], dtype=DOUBLE), atol=6e-4, rtol=0)


def test_leave_one_out_takes_many_players() -> None:
    x = torch.randn(2, 300, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    a = ap.Semivalue()(ap.Field(lambda x: x.sum(1) ** 2), x)
    total = x.sum(1, keepdim=True)
    torch.testing.assert_close(a.values, total**2 - (total - x) ** 2, atol=1e-9, rtol=0)
    assert a.cost.forward.tolist() == [300, 300]


# -- axioms -----------------------------------------------------------------------------------------

EFFICIENT = ("shapley", "kernel shap", "semivalue, shapley")
TWO_EFFICIENT = ("banzhaf", "semivalue, banzhaf", "semivalue, p = 0.3")


@pytest.mark.parametrize("name", EXACT)
def test_axioms(name: str) -> None:
    explain = EXACT[name][0]
    f, g = random_game(5, seed=6), random_game(5, seed=7)
    index = torch.arange(32)
    both = Table(2 * f.values - 3 * g.values)
    of_f, of_g = f.ask(explain).values[0], g.ask(explain).values[0]
    torch.testing.assert_close(both.ask(explain).values[0], 2 * of_f - 3 * of_g, atol=1e-12, rtol=0)
    null = Table(f.values[index & ~4])  # player 2 changes nothing
    assert float(null.ask(explain).values[0, 2].abs()) < 1e-12
    dummy = Table(f.values[index & ~4] + 1.5 * (index >> 2 & 1))  # and here what it adds alone
    assert float(dummy.ask(explain).values[0, 2]) == pytest.approx(1.5, abs=1e-12)
    swapped = index & ~3 | (index & 1) << 1 | index >> 1 & 1
    symmetric = Table(f.values + f.values[swapped])  # players 0 and 1 exchanged
    found = symmetric.ask(explain).values[0]
    assert float((found[0] - found[1]).abs()) < 1e-12
    efficient = abs(float(of_f.sum() - f.values[-1] + f.values[0])) < 1e-12
    assert efficient == name.startswith(EFFICIENT)


def merged(game: Table) -> Table:
    """Players 0 and 1 as one, number 0; the others follow."""
    index = torch.arange(len(game.values) // 2)
    return Table(game.values[index >> 1 << 2 | (index & 1) * 3])


@pytest.mark.parametrize("name", EXACT)
def test_two_efficiency(name: str) -> None:
    """Two players merged get what both had, under Banzhaf's weights and no others; for p ≠ 1/2 not even then."""
    explain, game = EXACT[name][0], random_game(5, seed=8)
    apart, together = game.ask(explain).values[0], merged(game).ask(explain).values[0]
    holds = abs(float(apart[:2].sum() - together[0])) < 1e-12
    assert holds == (name in ("banzhaf", "banzhaf, all subsets", "semivalue, banzhaf"))


# -- estimates --------------------------------------------------------------------------------------

SEEDS = 2000
PERMUTATIONS = ap.samplers.Permutations
ESTIMATES: dict[str, tuple[Explainer, Callable[[int, int], float]]] = {
    "permutations": (ap.Shapley(sampler=PERMUTATIONS(), budget=500), shapley),
    "antithetic": (ap.Shapley(sampler=ap.samplers.Antithetic(), budget=1000), shapley),
    "stratified": (ap.Shapley(sampler=ap.samplers.Stratified(3), budget=1500), shapley),
    "maximum sample reuse": (ap.Banzhaf(sampler=BERNOULLI(), budget=300), banzhaf),
    "p = 0.7": (ap.Banzhaf(sampler=BERNOULLI(0.7), budget=400), lambda s, n: 0.7**s * 0.3 ** (n - 1 - s)),
}
"""Unbiased ones, each with a hundred independent draws and more."""


def interval(estimates: Tensor, tests: int) -> Tensor:
    """Half the width of the interval for the mean of each column, 95 % for all of so many together (Bonferroni)."""
    quantile = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1 - 0.05 / (2 * tests), dtype=DOUBLE))
    return quantile * estimates.std(0) / len(estimates) ** 0.5


@pytest.mark.parametrize("name", ESTIMATES)
def test_unbiased_with_honest_errors(name: str) -> None:
    explain, weight = ESTIMATES[name]
    game = random_game(6, seed=9)
    a = game.ask(explain, SEEDS)
    want, error = by_definition(game, weight), a.parts["standard_error"]
    tests = 6 * len(ESTIMATES)
    assert bool(((a.values.mean(0) - want).abs() <= interval(a.values, tests)).all())
    covered = ((a.values - want).abs() <= 1.96 * error).double().mean(0)
    assert bool(((covered - 0.95).abs() <= 0.02).all()), covered
    assert float((error.square().mean(0).sqrt() / a.values.std(0) - 1).abs().max()) < 0.06
    # another value is told apart
    assert bool(((a.values.mean(0) - want - 0.1).abs() > interval(a.values, tests)).all())
    # one example is its own sample
    assert len(a.values[:, 0].unique()) > SEEDS / 2
    torch.testing.assert_close(game.ask(explain, 3).values, a.values[:3], atol=1e-12, rtol=0)
    assert not torch.equal(game.ask(explain, 3, seed=1).values, a.values[:3])


@pytest.mark.parametrize("paired", [True, False])
def test_kernel_shap_is_biased_less_and_less(paired: bool) -> None:
    """Four times the budget takes away at least half of the bias, in the mean square over games."""
    bias = []
    for budget in (24, 96, 384):
        apart, noise = 0.0, 0.0
        for seed in range(4):
            game = random_game(7, seed=seed)
            a = game.ask(ap.KernelSHAP(sampler=ap.samplers.KernelWeighted(paired=paired), budget=min(budget, 125)), SEEDS)
            if budget > 125:
                continue
            error = a.values.mean(0) - by_definition(game, shapley)
            apart += float(error.square().mean())
            noise += float((a.values.var(0) / SEEDS).mean())
            assert float(a.gap.abs().max()) < 1e-12
        bias.append((apart, noise))
    assert "biased" in ap.methods()["kernel_shap"].cautions[0]
    assert bias[0][0] > 3 * bias[0][1], "the bias of a small budget shows"
    assert max(0.0, bias[1][0] - bias[1][1]) < (bias[0][0] - bias[0][1]) / 4
