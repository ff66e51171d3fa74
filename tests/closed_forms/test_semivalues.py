"""Shapley, Banzhaf and other semivalues: games whose answer can be written down, axioms, and estimates of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from math import factorial
from typing import Any

import pytest
import torch
from torch import Tensor

import apportion as ap
from apportion import planted
from apportion.core.errors import ConfigError, InputError
from apportion.core.explainer import Explainer
from apportion.core.game import Block
from apportion.parts.masks.estimators import Chains, Estimate, LeastSquares, estimated

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


def gap(a: ap.Attribution) -> float:
    assert a.gap is not None
    return float(a.gap.abs().max())


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
    assert gap(a) < 1e-12


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
    assert ap.harsanyi(game.values).tolist() == pytest.approx([a[s] for s in sorted(a, key=number)], abs=1e-12)


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
    "permutations": (ap.Shapley(sampler=PERMUTATIONS(), budget=180), shapley),
    "antithetic": (ap.Shapley(sampler=PERMUTATIONS(antithetic=True), budget=360), shapley),
    "stratified": (ap.Shapley(sampler=PERMUTATIONS(rotated=True), budget=720), shapley),
    "maximum sample reuse": (ap.Banzhaf(sampler=BERNOULLI(), budget=150), banzhaf),
    "p = 0.7": (ap.Banzhaf(sampler=BERNOULLI(0.7), budget=200), lambda s, n: 0.7**s * 0.3 ** (n - 1 - s)),
}
"""Unbiased ones, each with sixty independent draws and more of a game of four."""


def interval(estimates: Tensor, tests: int) -> Tensor:
    """Half the width of the interval for the mean of each column, 95 % for all of so many together (Bonferroni)."""
    quantile = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1 - 0.05 / (2 * tests), dtype=DOUBLE))
    return quantile * estimates.std(0) / len(estimates) ** 0.5


@pytest.mark.parametrize("name", ESTIMATES)
def test_unbiased_with_honest_errors(name: str) -> None:
    explain, weight = ESTIMATES[name]
    game = random_game(4, seed=9)
    a = game.ask(explain, SEEDS)
    want, error = by_definition(game, weight), a.parts["standard_error"]
    tests = 4 * len(ESTIMATES)
    assert bool(((a.values.mean(0) - want).abs() <= interval(a.values, tests)).all())
    covered = ((a.values - want).abs() <= 1.96 * error).double().mean(0)
    assert bool(((covered - 0.95).abs() <= 0.02).all()), covered
    assert float((error.square().mean(0).sqrt() / a.values.std(0) - 1).abs().max()) < 0.08  # four of its own errors
    # another value is told apart
    assert bool(((a.values.mean(0) - want - 0.1).abs() > interval(a.values, tests)).all())
    # one example is its own sample
    assert len(a.values[:, 0].unique()) > SEEDS / 2
    torch.testing.assert_close(game.ask(explain, 3).values, a.values[:3], atol=1e-12, rtol=0)
    assert not torch.equal(game.ask(explain, 3, seed=1).values, a.values[:3])


def least_squares(game: Table, sampler: ap.samplers.KernelWeighted, budget: int, seeds: int) -> Tensor:
    """Sampled KernelSHAP with the values read off the table, for many seeds at once."""
    q = game.field().bind(torch.ones(seeds, game.players, dtype=DOUBLE), ids=range(seeds))
    plays = ap.Game(q, ap.groups.Elements(), ap.fills.Baselines())
    drawn = torch.ones(seeds, dtype=torch.bool)
    fit = LeastSquares(plays, 2 if sampler.paired else 1, game.values[:1].expand(seeds), drawn)
    for block in sampler.blocks(plays, budget):
        fit.add(block, game.values[(block.masks * 2 ** torch.arange(game.players)).sum(-1)])
    return fit.estimate().values


@pytest.mark.parametrize("paired", [True, False])
def test_kernel_shap_is_biased_less_and_less(paired: bool) -> None:
    """The squared bias falls as 1 / budget² by theory; a maximum is a game that shows it."""
    index, seeds, few = torch.arange(128), 6000, 52 if paired else 30  # fewer pairs leave a seed unsolved
    game = Table(torch.stack([(index >> i & 1) * (i + 1.0) ** 2 for i in range(7)]).amax(0).double())
    sampler, bias, noise = ap.samplers.KernelWeighted(paired=paired), [], []
    for budget in (few, 120):
        found = least_squares(game, sampler, budget, seeds)
        spread = found.var(0) / seeds
        bias.append(float(((found.mean(0) - by_definition(game, shapley)).square() - spread).mean()))
        noise.append(float(spread.mean()))
    assert bias[0] > 2 * noise[0], "the bias of a small budget shows"
    assert bias[1] < bias[0] / 4
    assert any("it is biased" in c for c in ap.methods()["kernel_shap"].cautions)


def test_errors_of_kernel_shap() -> None:
    game = random_game(6, seed=9)
    for paired in (True, False):
        a = game.ask(ap.KernelSHAP(sampler=ap.samplers.KernelWeighted(paired=paired), budget=60), SEEDS)
        covered = ((a.values - by_definition(game, shapley)).abs() <= 1.96 * a.parts["standard_error"]).double().mean()
        assert 0.925 < float(covered) < 0.965, "without leverages, pairs have 0.91"


def test_errors_of_kernel_shap_where_nothing_is_left_to_judge_by() -> None:
    """With as many pairs as unknowns the fit is exact, which says nothing of its error."""
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    field = ap.Field(lambda x: x.sum(1) + x[:, 0] * x[:, 1] * x[:, 2])
    with pytest.raises(ConfigError) as caught:
        ap.KernelSHAP(budget=12)(field, x, ids=range(20))
    least = re.search(r"give budget=(\d+)", str(caught.value))
    assert least is not None
    a = ap.KernelSHAP(budget=int(least[1]))(field, x, ids=range(20))
    error = a.parts["standard_error"]
    few = error.isinf().any(1)
    assert bool(few.any())
    assert bool((a.parts["precision"][few] == torch.inf).all())
    assert not bool((error == 0).any())


# -- budgets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ESTIMATES)
def test_what_is_evaluated_is_what_is_told(name: str) -> None:
    """Each coalition once; those of 4 players are 16, of which the empty and the full one are known."""
    explain, _ = ESTIMATES[name]
    a = random_game(4).ask(explain, 3)
    assert a.parts["coalitions"].tolist() == [14] * 3
    assert (a.cost.forward == a.parts["coalitions"] + 1).all()
    few = type(explain)(sampler=explain.sampler, budget=60)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    b = random_game(12).ask(few, 3) if "stratified" not in name else random_game(6).ask(few, 3)
    assert int(b.parts["coalitions"].max()) <= 60


def test_precision_stops_early_each_for_itself() -> None:
    table = torch.cat([torch.arange(128).double() * 1e-3 + 0, random_game(7).values])  # player 7: a coin for chaos
    game, x = Table(table), torch.ones(2, 8, dtype=DOUBLE)
    x[0, 7] = 0  # an additive game, of which an order tells all
    explain = ap.Shapley(sampler=PERMUTATIONS(), budget=4000, precision=0.1)
    both = explain(game.field(), x, ids=[0, 1])
    asked = both.parts["coalitions"].tolist()
    assert asked[0] < asked[1] <= 254
    assert bool((both.parts["precision"] <= 0.1).all())
    assert not any("precision" in w for w in both.warnings)
    for i in (0, 1):
        alone = explain(game.field(), x[i : i + 1], ids=[i])
        torch.testing.assert_close(alone.values[0], both.values[i], atol=1e-12, rtol=0)
    short = ap.Shapley(sampler=PERMUTATIONS(), budget=140, precision=0.001)(game.field(), x, ids=[0, 1])
    assert any("short of 0.001" in w for w in short.warnings)


def test_listed_coalitions_are_all_played_whatever_the_precision() -> None:
    """A listing that is cut short is no sample, also beside an example that is drawn and stops early."""
    x = torch.randn(1, 11, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    field = ap.Field(lambda x: x[:, 0] * x[:, 10] * 3 + x[:, 1])
    truth = ap.Shapley()(field, x).values
    torch.testing.assert_close(ap.KernelSHAP(precision=0.05)(field, x).values, truth, atol=1e-9, rtol=0)
    labels = torch.stack([torch.arange(12).clamp(max=10), torch.arange(12)])
    x = torch.cat([x, x[:, :1]], 1).expand(2, -1).clone()
    both = ap.KernelSHAP(precision=0.5, groups=ap.groups.Labels(labels))(field, x, ids=[0, 1])
    torch.testing.assert_close(both.values[0, :11], truth[0], atol=1e-9, rtol=0)
    assert both.parts["coalitions"][1] < 2048


def test_kernel_shap_is_not_judged_before_it_can_be_solved() -> None:
    """The first 64 coalitions do not tell 49 players apart: that is no reason to give up."""
    x = torch.randn(3, 49, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    a = ap.KernelSHAP(precision=0.05)(ap.Field(lambda x: x.sum(1) + 0.1 * x[:, 0] * x[:, 1]), x)
    assert bool(((a.parts["coalitions"] >= 2 * 96) & (a.parts["coalitions"] < 2000)).all())
    truth = x.clone()
    truth[:, :2] += 0.05 * (x[:, :1] * x[:, 1:2])
    assert bool(((a.values - truth).abs().amax(1) <= 0.25 * (truth.amax(1) - truth.amin(1))).all())


def test_banzhaf_goes_on_until_all_players_were_met_both_ways() -> None:
    """Where nearly all are there, 64 coalitions leave some player never absent, whose error is not a number."""
    x = torch.randn(2, 20, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    a = ap.Banzhaf(sampler=BERNOULLI(0.97), precision=0.2, budget=4000)(ap.Field(lambda x: x.sum(1)), x)
    assert bool((a.parts["precision"] <= 0.2).all())
    assert bool((a.parts["coalitions"] > 64).all())


def test_precision_is_over_the_range_of_the_players_there_are() -> None:
    """Values 10 and 11 with an error of 1: players that an example lacks are no values of 0."""
    values, errors = torch.tensor([[10.0, 11.0, 0.0]]), torch.tensor([[1.0, 0.5, 0.0]])
    assert Estimate(values, errors, torch.tensor([[True, True, False]])).precision.tolist() == [1.0]
    assert Estimate(values, errors * torch.nan).precision.tolist() == [float("inf")]


@pytest.mark.parametrize("rotated", [False, True])
def test_examples_stop_alike_beside_others_of_more_players(rotated: bool) -> None:
    labels = torch.stack([torch.arange(40).clamp(max=6), torch.arange(40)])
    x = torch.randn(2, 40, generator=torch.Generator().manual_seed(2), dtype=DOUBLE)
    field = ap.Field(lambda x: x.sum(1) + 2 * (x[:, :4].sum(1).relu()) * x[:, 5])
    method = ap.Shapley(sampler=PERMUTATIONS(rotated=rotated), precision=0.08, budget=4000)
    both = replace(method, groups=ap.groups.Labels(labels))(field, x, ids=[0, 1])
    alone = replace(method, groups=ap.groups.Labels(labels[0]))(field, x[:1], ids=[0])
    assert alone.parts["precision"][0] <= 0.08
    torch.testing.assert_close(both.values[0, :7], alone.values[0], atol=1e-12, rtol=0)
    assert both.parts["coalitions"][0] == alone.parts["coalitions"][0]


def test_ragged_players() -> None:
    """Examples with 3 and 12 players: the first is exact, the second sampled, each as it would be alone."""
    net = ap.Field(lambda x: x.prod(1) + x[:, 0])
    labels = torch.stack([torch.arange(12).clamp(max=2), torch.arange(12)])
    x = torch.rand(2, 12, generator=torch.Generator().manual_seed(0), dtype=DOUBLE) + 0.5
    for method in (ap.Shapley(budget=200), ap.Banzhaf(budget=200), ap.KernelSHAP(budget=200)):
        explain = type(method)(budget=200, groups=ap.groups.Labels(labels))
        a = explain(net, x, ids=[0, 1])
        assert a.values.shape == (2, 12)
        assert a.parts["sizes"].tolist() == [3, 12]
        assert not a.values[0, 3:].any()
        error = a.parts["standard_error"]
        assert not error[0].any()
        assert bool((error[1] > 0).any())
        for i, size in ((0, 3), (1, 12)):
            one = type(method)(budget=200, groups=ap.groups.Labels(labels[i]))(net, x[i : i + 1], ids=[i])
            torch.testing.assert_close(one.values[0], a.values[i, :size], atol=1e-12, rtol=0)


def test_errors() -> None:
    x, net = torch.ones(1, 30, dtype=DOUBLE), ap.Field(lambda x: x.sum(1))
    with pytest.raises(InputError, match=r"2\^30[\s\S]*20 players[\s\S]*sample"):
        ap.Shapley(sampler=ap.samplers.AllSubsets())(net, x)
    with pytest.raises(InputError, match=r"30 players[\s\S]*ap\.Banzhaf"):
        ap.Semivalue(weights=ap.semivalues.BanzhafWeights())(net, x)
    with pytest.raises(ConfigError, match=r"budget=57[\s\S]*at least 58[\s\S]*Superpixels"):
        ap.Shapley(budget=57)(net, x)
    with pytest.raises(ConfigError, match=r"budget=59[\s\S]*at least 60"):
        ap.KernelSHAP(budget=59)(net, x)
    with pytest.raises(ConfigError, match=r"budget=3 for 30 players[\s\S]*at least \d+ coalitions"):
        ap.Banzhaf(budget=3)(net, x)
    with pytest.raises(ConfigError, match="precision"):
        ap.Shapley(precision=0.0)
    with pytest.raises(ConfigError, match="sampler"):
        ap.Shapley(sampler=BERNOULLI())  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="0 < p < 1"):
        ap.semivalues.BanzhafWeights(1.0)


def test_coalitions_that_do_not_tell_players_apart() -> None:
    """Of 12 players, 12 coalitions and their complements can leave two always together."""
    game = random_game(12)
    x = torch.ones(60, 12, dtype=DOUBLE)  # of which one at least will do
    with pytest.raises(ConfigError, match="do not tell 12 players apart"):
        ap.KernelSHAP(budget=24)(game.field(), x, ids=range(60))


@pytest.mark.parametrize("players", [2, 10, 12])
@pytest.mark.parametrize("method", [ap.KernelSHAP, ap.Banzhaf, ap.Shapley])
def test_a_budget_that_is_too_small_names_one_that_will_do(method: Any, players: int) -> None:
    """And the score is not asked for more than f(x) and the empty coalition before."""
    field = ap.Field(lambda x: x.sum(1) + x[:, 0] * x[:, 1])
    x = torch.ones(60, players, dtype=DOUBLE)
    budget = {ap.KernelSHAP: 2 * players if players > 2 else 1}.get(method, 1)
    q = field.bind(x, ids=range(60))
    with pytest.raises(ConfigError, match=f"budget={budget}|do not tell {players} players apart") as caught:
        method(budget=budget).explain(q)
    assert int(q.cost.forward.max()) <= 1
    found = re.search(r"give budget=(\d+)", str(caught.value))
    assert found is not None
    least = int(found[1])
    assert budget < least <= max(2**players - 2, 2) or players > 10
    assert bool(method(budget=least)(field, x, ids=range(60)).values.isfinite().all())


def test_one_player_needs_no_budget() -> None:
    for method in (ap.KernelSHAP, ap.Banzhaf, ap.Shapley):
        assert method(budget=1)(ap.Field(lambda x: x.sum(1)), torch.tensor([[3.0]])).values.tolist() == [[3.0]]


def test_families_of_orders_are_averaged_wherever_blocks_end() -> None:
    """Two examples of 5 and 3 players, each order with its rotations and reverses: 10 and 6 together."""
    sampler = PERMUTATIONS(antithetic=True, rotated=True)
    labels = torch.stack([torch.arange(5), torch.arange(5).clamp(max=2)])
    q = ap.Field(lambda x: x.prod(1) + x[:, 0] ** 2).bind(torch.rand(2, 5, dtype=DOUBLE) + 1, ids=[0, 1])
    game = ap.Game(q, ap.groups.Labels(labels), ap.fills.Baselines())
    blocks = list(sampler.blocks(game, 200))
    found = estimated(blocks, Chains(game, sampler.family))
    order = torch.cat([b.order for b in blocks if b.order is not None], 1)
    for b, (n, family) in enumerate(((5, 10), (3, 6))):
        gains = []
        for one in order[b, : sampler.orders(n, 200), :n].tolist():
            masks = torch.zeros(1, n + 1, 5, dtype=torch.bool)
            for i, player in enumerate(one):
                masks[0, i + 1 :, player] = True
            steps = game.value(masks.expand(2, -1, -1))[b].diff()
            gains.append(torch.zeros(5, dtype=DOUBLE).index_copy(0, torch.tensor(one), steps))
        means = torch.stack(gains).reshape(-1, family, 5).mean(1)
        torch.testing.assert_close(found.values[b], means.mean(0), atol=1e-12, rtol=0)
        error = means.std(0) / len(means) ** 0.5
        if n == 5:  # the product's shares are alike in every family: three that differ could be missed
            rare = 1.5 / len(means) * (means.amax().clamp(min=0) - means.amin().clamp(max=0))
            error = torch.where(error < 1e-12, rare, error)
        torch.testing.assert_close(found.standard_error[b], error, atol=1e-12, rtol=0)
    for size in (1, 3, 7):  # in other blocks
        again = Chains(game, sampler.family)
        whole = torch.cat([game.value(b) for b in blocks], 1).reshape(2, -1, 6)
        asked = torch.cat([torch.ones(2, b.size, dtype=torch.bool) if b.where is None else b.where for b in blocks], 1)
        asked = asked.reshape(2, -1, 6)
        for at in range(0, order.shape[1], size):
            part = order[:, at : at + size]
            block = Block(part.shape[1] * 6, lambda at: at, asked[:, at : at + size].flatten(1), order=part)
            again.add(block, whole[:, at : at + size].flatten(1))
        torch.testing.assert_close(again.estimate().values, found.values, atol=1e-12, rtol=0)
        torch.testing.assert_close(again.estimate().standard_error, found.standard_error, atol=1e-12, rtol=0)


def test_shapiq_agrees() -> None:
    shapiq = pytest.importorskip("shapiq")
    game = random_game(6, seed=11)
    table = {tuple(s): float(game.values[number(s)]) for s in subsets(list(range(6)))}

    def value(coalitions):  # type: ignore[no-untyped-def]
        return [table[tuple(int(i) for i in row.nonzero()[0])] for row in coalitions]

    computer = shapiq.ExactComputer(n_players=6, game=lambda c: torch.tensor(value(c)).numpy())
    for name, index in (("shapley", "SV"), ("banzhaf", "BV")):
        found = computer(index)
        theirs = torch.tensor([float(found[(i,)]) for i in range(6)], dtype=DOUBLE)
        torch.testing.assert_close(game.ask(EXACT[name][0]).values[0], theirs, atol=1e-6, rtol=0)
