"""LIME and its variants: values that can be written down, what authors' code does, and statistics over 2,000 seeds."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import apportion as ap
from apportion.core.errors import ConfigError, InputError
from apportion.methods.surrogate.glime import kept_with
from apportion.parts.surrogate import (
    Best,
    Everything,
    Exponential,
    Forward,
    NormalRows,
    Quartiles,
    Ridge,
    Separate,
    Trust,
    Uniform,
)
from apportion.parts.surrogate.lars import lars
from apportion.parts.surrogate.neighborhoods import Drawn

SEEDS = 2000
ALONE = Trust(reruns=0)
ALL = ap.samplers.AllSubsets()


def linear(*weights: float) -> ap.Field:
    return ap.Field(lambda x: x @ torch.tensor(weights, dtype=x.dtype) + 5)


def curved(x: Tensor) -> Tensor:
    """A game of four players with interactions of every order but the fourth."""
    return x @ torch.tensor([1.0, -2.0, 0.5, 3.0]).to(x) + 2 * x[:, 0] * x[:, 1] - 1.5 * x[:, 1] * x[:, 2] * x[:, 3]


def ones(players: int, batch: int = 1) -> Tensor:
    return torch.ones(batch, players, dtype=torch.float64)


def many(method: ap.Explainer, f=curved, players: int = 4) -> ap.Attribution:
    """One example under many names, each of which has random numbers of its own."""
    return method(ap.Field(f), ones(players, SEEDS), ids=range(SEEDS))


def population(method: Any) -> Tensor:
    """The fit to all coalitions, each with its probability of being drawn times its kernel's weight."""
    z = torch.tensor(list(itertools.product([0.0, 1.0], repeat=4))).double()
    p = getattr(method.sampler, "p", 0.5)
    w = (p ** z.sum(1)) * (1 - p) ** (4 - z.sum(1))
    if isinstance(method, ap.LIME):
        w = w * method.kernel(z, ones(4)[0], torch.tensor(4.0).double())
    x = torch.cat([ones(1, 16), z], 1)
    return torch.linalg.solve(x.T @ (w[:, None] * x), x.T @ (w * curved(z)))[1:]


# -- closed forms -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "factor"), [(1.0, 2 / 3), (0.0, 1.0)])
def test_full_enumeration_of_three_players(alpha: float, factor: float) -> None:
    method = ap.LIME(sampler=ALL, with_x=False, kernel=Uniform(), regression=Ridge(alpha))
    a = method(linear(1.0, -2.0, 3.0), ones(3))
    torch.testing.assert_close(a.values[0], factor * torch.tensor([1.0, -2.0, 3.0]).double())
    assert a.cost.forward.item() == 7  # six coalitions and the empty one, re-runs included


def test_a_thousand_samples_of_half_weight_shrink_by_eight_in_a_thousand() -> None:
    """1000 · 0.5034 / 4 = 125.9, and 125.9 / 126.9 = 0.992: what α = 1 leaves of an effect among many players."""
    weights = torch.tensor([1.0, -1.0] * 15)
    a = ap.LIME(samples=1000, trust=ALONE)(linear(*weights.tolist()), ones(30, 8), ids=range(8))
    factor = float((a.values * weights).mean())
    assert factor == pytest.approx(0.992, abs=1e-3)


def test_intercept_and_ridge_are_there_unless_taken_away() -> None:
    a = ap.LIME()(linear(0.0, 0.0), ones(2))
    assert a.values.abs().max() < 1e-12
    assert a.parts["intercept"].item() == pytest.approx(5)
    assert ap.LIME().regression == Ridge(1.0, intercept=True)
    without = ap.LIME(regression=Ridge(0.0, intercept=False))(linear(0.0, 0.0), ones(2))
    assert without.values.min() > 1  # what the intercept would have taken
    assert ap.LIME().kernel == Exponential(0.25)
    assert ap.LIME().selection == Everything()


def test_bayesian_ridge_of_all_coalitions_by_hand() -> None:
    """Z'Z = 8/4 I for three players: the posterior mean is (λ b₀ + 2 a b) / (λ + 2 a)."""
    prior = ap.surrogates.BayesianRidge(0.5, weight_precision=3.0, noise_precision=2.0)
    method = ap.BayLIME(sampler=ALL, with_x=False, kernel=Uniform(), regression=prior)
    a = method(linear(1.0, -2.0, 3.0), ones(3))
    want = (3 * 0.5 + 4 * torch.tensor([1.0, -2.0, 3.0]).double()) / 7
    torch.testing.assert_close(a.values[0], want)
    torch.testing.assert_close(a.parts["posterior_variance"][0], torch.full((3,), 1 / 7).double())


def test_glime_samples_near_the_example() -> None:
    probabilities = [kept_with(s).p for s in (0.25, 0.5, 1.0)]
    assert probabilities == pytest.approx([1.0, 0.982, 0.731], abs=5e-4)
    a = ap.GLIME.near(0.25, samples=64)(linear(1.0, 2.0), ones(2))
    assert "never changed in 64 samples" in " ".join(a.warnings)
    with pytest.raises(ConfigError, match="width above"):
        ap.GLIME.near(0.1)


def test_c_lime_expects_what_smooth_grad_does() -> None:
    square = ap.Field(lambda x: x[:, 0] ** 2)
    noise = ap.noise.Gaussian(0.3, relative=False)
    a = ap.CLIME(noise=noise, samples=4000)(square, torch.tensor([[1.5]], dtype=torch.float64))
    assert a.values.item() == pytest.approx(3.0, abs=0.03)
    wave = ap.Field(lambda x: x.sin().sum(1))  # E cos(x + s n) = cos(x) exp(-s²/2)
    x = torch.tensor([[0.3, 2.0]], dtype=torch.float64)
    a = ap.CLIME(noise=ap.noise.Gaussian(0.8, relative=False), samples=20_000)(wave, x)
    away = (a.values - x.cos() * np.exp(-0.32)) / a.parts["standard_error"]
    assert away.abs().max() < 3.5
    assert (a.values - x.cos()).abs().max() > 0.05  # it is not the gradient


# -- statistics over 2,000 seeds --------------------------------------------------------------------

BONFERRONI = 3.02  # four coefficients of five methods, 1 in 20 for all of them


@pytest.mark.parametrize(
    "method",
    [
        ap.LIME(regression=Ridge(0.0), samples=300, with_x=False, kernel=Exponential(0.6), trust=ALONE),
        ap.GLIME(regression=Ridge(0.0), samples=300, trust=ALONE),
        ap.GLIME(regression=Separate(), samples=300, trust=ALONE),
        ap.CLIME(noise=ap.noise.Gaussian(0.5, relative=False), samples=300, trust=ALONE),
        ap.CLIME(noise=ap.noise.Gaussian(0.5, relative=False), regression=Ridge(0.0), samples=300, trust=ALONE),
    ],
    ids=["lime", "glime", "separate", "clime", "clime-joint"],
)
def test_without_a_penalty_intervals_hold_the_population(method: ap.Explainer) -> None:
    a = many(method)
    slope = torch.tensor([3.0, -1.5, -1.0, 1.5]).double()  # E ∇f, f being linear in each variable: ∇f at x
    want = slope if isinstance(method, ap.CLIME) else population(method)
    error = a.parts["standard_error"]
    covered = ((a.values - want).abs() <= 1.96 * error).double().mean(0)
    assert (covered - 0.95).abs().max() <= 0.02, covered
    away = (a.values.mean(0) - want) / (a.values.std(0) / SEEDS**0.5)
    assert (away.abs() <= BONFERRONI).all(), away


def test_too_many_features_for_all_pairs_are_refused() -> None:
    x = torch.rand(1, 9000)
    with pytest.raises(ConfigError, match="at most 8192"):
        ap.LIME(samples=4)(ap.Field(lambda x: x.sum(1)), x)
    a = ap.CLIME(samples=40)(ap.Field(lambda x: x.sum(1)), x)
    assert a.values.shape == (1, 9000)
    split = Separate()(torch.rand(5, 9000), torch.rand(5), torch.ones(5), torch.ones(9000) > 0)
    assert split.coefficients.shape == (9000,)


def test_additive_scores_are_met_exactly_without_a_penalty() -> None:
    method = ap.GLIME(regression=Ridge(0.0), samples=40, trust=ALONE)
    a = many(method, lambda x: x @ torch.tensor([1.0, -2.0, 0.5, 3.0]).to(x))
    assert (a.values - torch.tensor([1.0, -2.0, 0.5, 3.0]).double()).abs().max() < 1e-9


@pytest.mark.parametrize("kind", [ap.LIME, ap.GLIME])
def test_the_bias_of_the_penalty_shrinks_with_the_budget(kind: Any) -> None:
    def bias(samples: int) -> tuple[float, float]:
        a = many(kind(samples=samples, trust=ALONE))
        found = a.values.mean(0) - population(kind())
        return float(found.norm()), float(found.abs().max() / (a.values.std(0) / SEEDS**0.5).max())

    few, far = bias(50)
    some, _ = bias(200)
    assert far > 5  # it is there, and seen
    assert some < few / 2.5


# -- S-LIME -----------------------------------------------------------------------------------------


def test_lars_is_that_of_scikit_learn() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    g = torch.Generator().manual_seed(3)
    z = torch.randint(0, 2, (5, 80, 8), generator=g).double()
    v = (z @ torch.randn(5, 8, 1, generator=g).double()).squeeze(-1) + z[..., 0] * z[..., 1]
    w = torch.rand(5, 80, generator=g).double()
    way = lars(Drawn(z, v, torch.ones_like(w)), w, torch.ones(5, 8, dtype=torch.bool), 8)
    for b in range(5):
        x = (z[b] - (w[b] @ z[b]) / w[b].sum()) * w[b].sqrt()[:, None]
        y = (v[b] - (w[b] @ v[b]) / w[b].sum()) * w[b].sqrt()
        _, active, _ = linear_model.lars_path(x.numpy(), y.numpy(), method="lar")
        assert way.order[b].tolist() == list(active)


def test_s_lime_draws_until_the_first_features_are_sure() -> None:
    """Beside an example whose features are far apart, one with a near tie: each draws what it needs."""

    def f(x: Tensor) -> Tensor:
        clear = x[:, 1] * (3 * x[:, 2] + 6 * x[:, 3])
        near = (1 - x[:, 1]) * (3 * x[:, 2] + 3.02 * x[:, 3])
        return clear + near + x[:, 2] * x[:, 3] * x[:, 0]

    x = ones(4, 2)
    x[1, 1] = 0
    groups = ap.groups.Labels(torch.tensor([0, -1, 1, 2]))
    method = ap.SLIME(groups=groups, samples=100, most=900, count=1, tolerance=0.0, trust=ALONE)
    a = method(ap.Field(f), x, ids=["clear", "near"])
    assert a.parts["samples_used"].tolist() == [100, 900]
    assert a.parts["settled"].tolist() == [1, 0]
    assert a.values[0].nonzero().flatten().tolist() == [2]
    alone = method(ap.Field(f), x[:1], ids=["clear"])
    torch.testing.assert_close(alone.values, a.values[:1])
    indifferent = replace(method, tolerance=1.0)(ap.Field(f), x, ids=["clear", "near"])
    assert indifferent.parts["samples_used"].tolist() == [100, 100]


def test_s_lime_selects_alike_where_lime_does_not() -> None:
    """Of effects 1 and 1.4 under noise of many others, both select one, 200 times over."""
    weights = torch.tensor([1.4, 1.0] + [0.6, -0.6] * 5)
    field, x = linear(*weights.tolist()), ones(12, 200)
    lime = ap.LIME(samples=60, selection=Forward(1), trust=ALONE)(field, x, ids=range(200))
    s_lime = ap.SLIME(samples=60, most=4000, count=1, trust=ALONE)(field, x, ids=range(200))
    right = [(a.values[:, 0] != 0).double().mean().item() for a in (lime, s_lime)]
    assert right[0] < 0.93
    assert right[1] > 0.97


# -- OptiLIME ---------------------------------------------------------------------------------------


def test_opti_lime_finds_the_best_width_of_a_thousand() -> None:
    method = ap.OptiLIME(samples=300, trust=ALONE)
    q = ap.Field(curved).bind(ones(4, 3), ids=range(3))
    local = method.around(q)
    drawn = local.draw(0, 0, 300)
    far = method.distance(drawn.z, local.center)
    widths = torch.logspace(np.log10(0.05), np.log10(5), 1000, dtype=torch.float64)
    heights = []
    for width in widths:
        w = torch.exp(-far.square() / (2 * width**2))
        heights.append(method.objective(drawn, local, w))
    best = torch.stack(heights).amax(0)
    found = method.searched(drawn, local)
    height = method.objective(drawn, local, torch.exp(-far.square() / (2 * found.square()[:, None])))
    assert (height >= best - 1e-3).all()
    r2 = method(ap.Field(curved), ones(4, 3), ids=range(3)).parts["r2"]
    torch.testing.assert_close(torch.where(r2 <= 0.9, r2, 1.8 - r2), height, atol=1e-9, rtol=0)


def test_the_search_of_opti_lime_draws_nothing() -> None:
    """Samples fix the width, in whatever order; another seed has another only because it has other samples."""
    method, field = ap.OptiLIME(samples=60, trust=ALONE), ap.Field(curved)
    widths = []
    for seed in range(4):
        local = method.around(field.bind(ones(4), seed=seed))
        drawn = local.draw(0, 0, 60)
        before = torch.random.get_rng_state()
        width = method.searched(drawn, local)
        assert torch.equal(width, method.searched(drawn, local))
        order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(before, torch.random.get_rng_state())
        turned = Drawn(*(part[:, order] for part in drawn))
        torch.testing.assert_close(method.searched(turned, local), width, rtol=1e-6, atol=0)
        told = method(field, ones(4), seed=seed).parts["kernel_width"]
        torch.testing.assert_close(told, width, rtol=1e-6, atol=0)
        widths.append(float(width))
    assert max(widths) > 1.01 * min(widths)  # samples are few: the width they fix is no property of the score


def test_opti_lime_takes_the_widest_where_all_are_alike() -> None:
    a = ap.OptiLIME(samples=100)(linear(1.0, 2.0, 3.0), ones(3))
    assert a.parts["kernel_width"].item() == pytest.approx(5.0)


# -- tables -----------------------------------------------------------------------------------------


@pytest.fixture
def table() -> Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randn(500, 3, generator=g, dtype=torch.float64) * torch.tensor([1.0, 2.0, 0.5]) + 4


def test_intervals_are_quartiles(table: Tensor) -> None:
    bins = Quartiles.fit(table).bins
    assert bins is not None
    want = np.percentile(table.numpy(), [25, 50, 75], axis=0).T
    np.testing.assert_allclose(bins.edges[:, :3].numpy(), want)
    np.testing.assert_allclose(bins.share.numpy(), 0.25, atol=1e-12)
    inside = table[:, 1][(table[:, 1] > bins.edges[1, 0]) & (table[:, 1] <= bins.edges[1, 1])]
    assert bins.mean[1, 1].item() == pytest.approx(inside.mean().item())
    assert bins.deviation[1, 1].item() == pytest.approx(inside.std(correction=0).item())


def test_samples_of_a_table_follow_the_data_not_the_example(table: Tensor) -> None:
    seen = []

    def f(x: Tensor) -> Tensor:
        seen.append(x.clone())
        return x.sum(1)

    x = table[:1] + 6  # an outlier
    for continuous, around_x, middle in ((False, False, 4), (True, False, 4), (True, True, None)):
        seen.clear()
        method = ap.LIME.for_tables(table, continuous=continuous, around_x=around_x, samples=3000)
        q = ap.Field(f).bind(x, ids=["outlier"])
        seen.clear()
        drawn = method.around(q).draw(0, 0, 3000)
        rows = torch.cat(seen)
        want = torch.full((3,), 4.0).double() if middle else x[0]
        assert ((rows.mean(0) - want).abs() < 0.2).all(), (continuous, around_x)
        assert drawn.v[0, 0].item() == pytest.approx(x.sum().item())  # the example itself comes first
        if not continuous:
            assert drawn.z[0, 0].tolist() == [1, 1, 1]
            assert ((drawn.z[0].mean(0) - 0.25).abs() < 0.03).all()
            bins = Quartiles.fit(table).bins
            assert bins is not None
            same = bins.find(rows[-2999:]) == bins.find(x)
            assert torch.equal(same.double(), drawn.z[0, 1:])


def test_around_the_mean_or_around_the_example_are_other_slopes(table: Tensor) -> None:
    """f = x²: about the mean 4 the slope is 8 per unit, about x = 10 it is 20; times the deviation."""
    field = ap.Field(lambda x: x[:, 0] ** 2)
    x = torch.tensor([[10.0, 4.0, 4.0]], dtype=torch.float64)
    mean, deviation = table[:, 0].mean().item(), table[:, 0].std(correction=0).item()
    for around_x, want in ((False, 2 * mean), (True, 20.0)):
        rows = NormalRows.fit(table, around_x)
        a = ap.LIME(rows=rows, kernel=Uniform(), regression=Ridge(0.0), samples=8000, trust=ALONE)(field, x)
        near = 4 * a.parts["standard_error"][0, 0].item() + 0.15  # the example itself is among the samples
        assert a.values[0, 0].item() == pytest.approx(want * deviation, abs=near)
        assert a.kind is ap.Kind.SENSITIVITY
    assert NormalRows().around_x is False  # as the authors' code


def test_categories_are_kept_as_they_are() -> None:
    data = torch.tensor([[0.0, 1.0], [0.0, 2.5], [3.0, 1.5], [0.0, 7.0]], dtype=torch.float64)
    seen = []

    def f(x: Tensor) -> Tensor:
        seen.append(x.clone())
        return x[:, 0]

    method = ap.LIME.for_tables(data, categorical=[0], samples=2000)
    a = method(ap.Field(f), torch.tensor([[3.0, 2.0]], dtype=torch.float64))
    rows = torch.cat(seen)[-3998:]  # those before are the checks of the model
    assert set(rows[:, 0].tolist()) == {0.0, 3.0}
    assert (rows[:, 0] == 3).double().mean().item() == pytest.approx(0.25, abs=0.05)
    assert a.values[0, 0].item() == pytest.approx(3.0, abs=0.1)
    assert method.selection == Best(10)


# -- what results say of themselves -----------------------------------------------------------------


def test_results_say_how_far_to_trust_them() -> None:
    a = ap.LIME()(linear(*range(1, 13)), ones(12))
    assert not a.warnings
    assert a.parts["held_out_r2"].item() > 0.99
    assert a.parts["csi"].item() == a.parts["vsi"].item() == 1
    parity = ap.Field(lambda x: (1 - 2 * x).prod(1))  # no linear model explains it
    b = ap.LIME(kernel=Uniform())(parity, ones(12))
    assert any("held-out R²" in w and "below 0.5" in w for w in b.warnings)
    low, high = b.parts["held_out_r2_interval"][0].tolist()
    assert low < b.parts["held_out_r2"].item() < high < 0.5
    c = ap.LIME(trust=ALONE)(linear(1.0, 2.0, 3.0), ones(3))
    assert any("no re-runs" in w for w in c.warnings)
    assert "held_out_r2" not in c.parts


def test_unstable_fits_are_told() -> None:
    """Thirty alike players, forty samples: other runs put others first."""
    a = ap.LIME(samples=40, selection=Forward(3), trust=Trust(reruns=4))(
        ap.Field(lambda x: x.mean(1) + x[:, ::2].prod(1) - x[:, 1::2].prod(1)), ones(30)
    )
    assert a.parts["vsi"].item() < 0.5
    assert any("VSI" in w for w in a.warnings)


def test_values_are_on_groups_and_spread() -> None:
    x = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    a = ap.LIME(groups=ap.groups.Squares(2), regression=Ridge(0.0))(ap.Field(lambda x: x.flatten(1).sum(1)), x)
    assert a.domain is ap.Domain.GROUPS
    want = torch.nn.functional.avg_pool2d(x.sum(1), 2) * 4
    torch.testing.assert_close(a.values, want.flatten(1))
    assert a.spread().values.shape[-2:] == (4, 4)


def test_examples_with_fewer_players_are_as_if_alone() -> None:
    labels = torch.stack([torch.arange(16), torch.arange(16) // 2])
    x, field = ones(16, 2), ap.Field(lambda x: curved(x[:, 6:10]) + x.sum(1))
    for kind in (ap.LIME, ap.BayLIME, ap.SLIME, ap.GLIME):
        more = {"samples": 60, "trust": Trust(reruns=3)}
        both = kind(groups=ap.groups.Labels(labels), **more)(field, x, ids=["all", "half"])
        alone = kind(groups=ap.groups.Labels(labels[1:]), **more)(field, x[1:], ids=["half"])
        torch.testing.assert_close(both.values[1, :8], alone.values[0], rtol=1e-9, atol=1e-9)
        assert not both.values[1, 8:].any()
        for name in ("held_out", "held_out_r2"):
            torch.testing.assert_close(both.parts[name][1], alone.parts[name][0], equal_nan=kind is ap.SLIME)


def test_text_removes_any_number_of_words() -> None:
    weights = torch.tensor([3.0, -1.0, 0.5, 2.0, 0.0])
    field = ap.Field(lambda e: (e.sum(-1) * weights.to(e)).sum(1))
    words = ap.groups.Words.of([[0, 0, 1, 2, None]])
    method = replace(ap.LIME.for_text(groups=words, most=2), regression=Ridge(0.0))
    a = method(field, torch.ones(1, 5, 1, dtype=torch.float64))
    assert a.values.nonzero()[:, 1].tolist() == [0, 2]  # the two words that matter most
    game = method.game(field.bind(torch.ones(1, 5, 1, dtype=torch.float64)))
    masks = torch.cat([b.masks[0] for b in ap.samplers.UniformSizes().blocks(game, 3000)])
    sizes = torch.bincount(masks.sum(1), minlength=3) / 3000
    assert ((sizes - 1 / 3).abs() < 0.04).all()  # none, one or two of three are left


def test_mistakes_are_told(table: Tensor) -> None:
    with pytest.raises(ConfigError, match="rows of a table"):
        ap.LIME(rows=Quartiles.fit(table), groups=ap.groups.Squares(2))
    with pytest.raises(ConfigError, match=r"Quartiles.fit\(data\)"):
        ap.LIME(rows=Quartiles())(linear(1.0), ones(1))
    with pytest.raises(InputError, match="learned from 3 columns"):
        ap.LIME(rows=Quartiles.fit(table))(linear(1.0, 2.0), ones(2))
    with pytest.raises(InputError, match="finite tensor"):
        Quartiles.fit(torch.tensor([[float("nan")], [1.0]]))
    with pytest.raises(ConfigError, match="most of at least"):
        ap.SLIME(samples=100, most=50)
    with pytest.raises(ConfigError, match="do not determine"):
        ap.CLIME(noise=ap.noise.Gaussian(1.0, relative=False), samples=3, regression=Ridge(0.0))(
            linear(1.0, 2.0, 3.0), ones(3)
        )
    with pytest.raises(ConfigError, match="the narrowest first"):
        ap.OptiLIME(narrowest=2.0, widest=1.0)


@pytest.mark.parametrize("kind", [ap.LIME, ap.BayLIME, ap.GLIME, ap.SLIME, ap.OptiLIME, ap.CLIME])
def test_cards_hold_of_defaults(kind: type[ap.Explainer]) -> None:
    """Defaults take more passes than the conformance suite runs, and principles are those of defaults."""
    ap.testing.check_explainer(kind(), ["principles"])
