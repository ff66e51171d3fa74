"""Fidelity and sensitivity metrics: exact answers, slow twins that read like the papers, planted wrong maps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import apportion as ap
from apportion import planted
from apportion.core.errors import ConfigError, InputError
from apportion.core.game import labels_of
from apportion.metrics import Metric, Scores
from apportion.metrics.fidelity.subsets import lowest
from apportion.metrics.ranking import by_player
from apportion.metrics.statistics import Pearson, Spearman, is_constant, ranks

F64 = torch.float64


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def cnn(channels: int = 3, side: int = 6) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        flat = 4 * side * side
        net = nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(flat, 3))
    return net.double().eval().requires_grad_(False)


NET = cnn()
PICTURES = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(1), dtype=F64)


def slopes() -> tuple[ap.Field, Tensor, Tensor]:
    """A linear score of seven features."""
    w = drawn(7, seed=3)
    return ap.Field(lambda x: x @ w + 0.5), drawn(3, 7, seed=4), w


# -- statistics -----------------------------------------------------------------------------------


def test_correlations_are_scipys_also_with_ties() -> None:
    a, b = drawn(4, 30), drawn(4, 30, seed=1)
    a, b = (a * 2).round(), b + a
    pairs: list[tuple[Any, Any]] = [(Pearson(), stats.pearsonr), (Spearman(), stats.spearmanr)]
    for ours, theirs in pairs:
        expected = [float(theirs(x, y)[0]) for x, y in zip(a.numpy(), b.numpy(), strict=True)]
        assert ours(a, b).tolist() == pytest.approx(expected, abs=1e-12)
    assert np.array_equal(ranks(a).numpy(), stats.rankdata(a.numpy(), axis=1))


def test_a_constant_side_has_no_correlation_whatever_rounding_makes_of_it() -> None:
    terms = torch.full((50, 7), 0.1, dtype=F64)
    sums = torch.stack([terms[0] * k for k in range(1, 8)]).flip(0).cumsum(0)[-1] + drawn(7) * 1e-16
    other = drawn(7, seed=1)
    assert bool(is_constant(sums))
    assert bool(Pearson()(sums, other).isnan())
    assert bool(Spearman()(other, sums).isnan())
    assert not bool(Pearson()(sums + 1e-6 * other, other).isnan())
    assert float(Pearson()(1e-200 * other, other)) == pytest.approx(1)
    small = torch.tensor([1.0, 1.0000001, 1.0])  # float32: one unit in the last place
    assert bool(Pearson()(small, torch.tensor([1.0, 2.0, 3.0])).isnan())


# -- sensitivity-n --------------------------------------------------------------------------------


@pytest.mark.parametrize("correlation", [Pearson(), Spearman()])
def test_sensitivity_n_is_one_for_every_n_on_additive_models_and_exact_maps(correlation: Any) -> None:
    field, x, _ = slopes()
    of_linear = ap.metrics.SensitivityN((0.1, 0.3, 0.5, 0.8), 20, correlation)(field, x, ap.GradientTimesInput())
    p = planted.additive(8)
    of_additive = ap.metrics.SensitivityN((0.1, 0.3, 0.5, 0.8), 20, correlation, fill=_at(p.baseline))(
        ap.Field(p.model), p.x, p.truth
    )
    for found in (of_linear, of_additive):
        curve = found.curves["correlation"]
        assert torch.allclose(curve.y, torch.ones_like(curve.y), atol=1e-12)
        assert torch.allclose(found.values, torch.ones_like(found.values), atol=1e-12)


def _at(baseline: Tensor) -> Any:
    return ap.fills.Baselines(ap.baselines.Given(baseline))


def test_sensitivity_n_rejects_the_negative_and_maps_of_others() -> None:
    field, x, w = slopes()
    metric = ap.metrics.SensitivityN((0.2, 0.4, 0.6), 30)
    right, wrong, shuffled = (metric(field, x, m) for m in (w * x, -w * x, (w * x).roll(1, 1)))
    assert torch.allclose(wrong.values, -torch.ones(3, dtype=F64))
    assert bool((shuffled.values < right.values - 0.2).all())
    scores = metric(field, x, w * x, controls=[ap.controls.Random()])
    assert scores.against(scores.controls["Random"]).interval[0] > 0


class Recorded:
    """Keeps the rows it is given."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.rows = inner, []

    def __call__(self, x: Tensor) -> Tensor:
        self.rows.append(x.detach().clone())
        return self.inner(x)

    def masked(self, x: Tensor) -> list[Tensor]:
        """List the different rows whose elements are those of x or 0, which leaves out checks of the model."""
        rows = torch.cat(self.rows)
        rows = rows[((rows == 0) | (rows == x)).flatten(1).all(1) & (rows == 0).flatten(1).any(1)]
        return list(torch.unique(rows, dim=0))


def test_sensitivity_n_is_its_slow_twin_on_the_very_subsets_it_drew() -> None:
    """A twin by loops, fed the rows the model saw: subsets of n, random, each example's own, pixels whole."""
    maps = drawn(2, 3, 6, 6, seed=5)
    metric = ap.metrics.SensitivityN((0.1, 0.4), 12)
    alone = []
    for i in range(2):
        seen: dict[int, list[Tensor]] = {}
        model = Recorded(NET)
        field = ap.Field(model, batch_size=64)
        found = metric(field, PICTURES[i : i + 1], maps[i : i + 1], target=1, ids=[i])
        for row in model.masked(PICTURES[i : i + 1]):
            gone = (row == 0).all(0)
            assert bool((row[:, ~gone] == PICTURES[i][:, ~gone]).all())
            seen.setdefault(int(gone.sum()), []).append(row)
        assert sorted(seen) == [4, 14]
        for k, n in enumerate((4, 14)):
            told, fall = [], []
            for row in seen[n]:
                gone = (row == 0).all(0)
                told.append(float(maps[i][:, gone].sum()))
                fall.append(float(NET(PICTURES[i : i + 1])[0, 1] - NET(row[None])[0, 1]))
            assert len(told) == 12
            expected = np.corrcoef(told, fall)[0, 1]
            assert float(found.curves["correlation"].y[0, k]) == pytest.approx(expected, abs=1e-9)
        assert found.parts["n"].tolist() == [[4, 14]]
        alone.append(seen)
    patterns = [{tuple((r == 0).all(0).flatten().tolist()) for r in s[14]} for s in alone]
    assert not patterns[0] & patterns[1]  # not one set of subsets for all examples


def test_sensitivity_n_has_what_quantus_has_not() -> None:
    """Subsets are random rather than nested in the map's order, and one example is enough to correlate within."""
    field, x, w = slopes()
    one = ap.metrics.SensitivityN((0.3, 0.5), 30)(field, x[:1], w * x[:1])
    assert one.values.tolist() == pytest.approx([1.0])
    model = Recorded(field.model)
    ap.metrics.SensitivityN((0.3,), 30)(ap.Field(model), x[:1], w * x[:1])
    gone = {tuple((r == 0).tolist()) for r in model.masked(x[:1])}
    top = tuple((((w * x)[0]).argsort(descending=True).argsort() < 2).tolist())
    assert len(gone - {top}) > 5


def test_subsets_have_n_players_and_every_subset_is_as_likely() -> None:
    keys = torch.randint(1 << 23, (2000, 5), generator=torch.Generator().manual_seed(0)).int()
    keys[:500] %= 4  # many ties
    n = torch.randint(1, 5, (2000,), generator=torch.Generator().manual_seed(1))
    drawn_ = lowest(keys, n)
    assert torch.equal(drawn_.sum(1), n)
    assert bool((keys.masked_fill(~drawn_, -1).amax(1) <= keys.masked_fill(drawn_, 1 << 24).amin(1)).all())
    model, x = Recorded(lambda x: x.sum(1)), torch.ones(1, 5, dtype=F64)
    ap.metrics.SensitivityN((0.4,), 2000)(ap.Field(model, batch_size=64), x, drawn(1, 5))
    pairs = torch.unique(torch.cat(model.rows) == 0, dim=0)
    assert int((pairs.sum(1) == 2).sum()) == 10


def test_sizes_that_come_to_the_same_n_are_measured_once() -> None:
    field, x, _ = slopes()
    found = ap.metrics.SensitivityN((0.01, 0.02, 0.5), 5)(field, x, drawn(3, 7))
    y = found.curves["correlation"].y
    assert torch.equal(y[:, 0], y[:, 1])
    assert found.parts["sizes"].tolist() == [2, 2, 2]
    assert torch.allclose(found.values, y[:, 1:].mean(1))
    assert int(found.cost.forward.max()) <= 10


def test_maps_and_scores_that_are_one_number_have_no_sensitivity_n() -> None:
    field, x, _ = slopes()
    metric = ap.metrics.SensitivityN((0.2, 0.5), 10)
    constant = metric(field, x, torch.full_like(x, 0.1))
    assert bool(constant.values.isnan().all())
    assert list(constant.undefined) == ["the map gives every subset the same sum"]
    deaf = metric(ap.Field(lambda x: 5 + 0 * x.sum(1)), x, drawn(3, 7))
    assert list(deaf.undefined) == ["removing any of the subsets changes the score alike"]
    assert bool(metric(field, x[:, :1] * torch.ones(1, 7), torch.zeros(3, 7)).values.isnan().all())
    for wrong in ((), (0.5, 0.2), (0.0, 0.1), (0.5, 1.2)):
        with pytest.raises(ConfigError, match="fractions"):
            ap.metrics.SensitivityN(wrong)


def test_no_map_meets_sensitivity_1_and_2_on_a_product() -> None:
    """f = x₁x₂ + x₃ at (1, 2, ½): a map that is right of single players is as wrong as can be of pairs, and back."""
    field, x = ap.Field(lambda x: x[:, 0] * x[:, 1] + x[:, 2]), torch.tensor([[1.0, 2.0, 0.5]], dtype=F64)
    for values, expected in (((2.0, 2.0, 0.5), (1.0, -1.0)), ((1.0, 1.0, 1.5), (-1.0, 1.0))):
        found = ap.metrics.SensitivityN((0.33, 0.67), 40)(field, x, torch.tensor([values], dtype=F64))
        assert found.curves["correlation"].y[0].tolist() == pytest.approx(expected)


def test_a_complete_and_linear_map_may_forecast_nothing() -> None:
    """φ_i = c_i (f(x) - f(0)) with fixed shares c is complete, and linear in f, and does not look at the features."""
    w, x, share = drawn(9, seed=3), drawn(30, 9, seed=4), drawn(9, seed=6).softmax(0)
    field = ap.Field(lambda x: x @ w)
    blind = share * (x @ w)[:, None]
    assert torch.allclose(blind.sum(1), x @ w)
    metric = ap.metrics.SensitivityN((0.3, 0.5), 20)
    found = metric(field, x, blind, controls=[ap.controls.Random()])
    low, high = found.summary().interval
    assert low < 0 < high
    assert not found.beats("Random")
    assert metric(field, x, w * x).summary().mean == pytest.approx(1)


# -- faithfulness correlation ---------------------------------------------------------------------


def test_faithfulness_correlation_takes_tables_and_is_sensitivity_n_at_one_n() -> None:
    """Quantus's refuses [B, F]."""
    field, x, w = slopes()
    found = ap.metrics.FaithfulnessCorrelation(size=3, samples=20)(field, x, w * x)
    assert torch.allclose(found.values, torch.ones(3, dtype=F64))
    noise = drawn(3, 7, seed=9)
    of_size = ap.metrics.FaithfulnessCorrelation(size=2, samples=20)(field, x, noise, ids=[0, 1, 2])
    of_share = ap.metrics.FaithfulnessCorrelation(fraction=0.3, samples=20)(field, x, noise, ids=[0, 1, 2])
    at_n = ap.metrics.SensitivityN((0.3,), 20)(field, x, noise, ids=[0, 1, 2])
    assert torch.equal(of_size.values, of_share.values)
    assert torch.equal(of_size.values, at_n.values)
    assert float(ap.metrics.FaithfulnessCorrelation(size=3)(field, x, -w * x).values.max()) == pytest.approx(-1)
    with pytest.raises(ConfigError, match="size=7"):
        ap.metrics.FaithfulnessCorrelation(size=7)(field, x, noise)


# -- infidelity -----------------------------------------------------------------------------------

PERTURBATIONS = [
    ap.metrics.NoisyBaseline(samples=40),
    ap.metrics.GaussianPerturbation(0.3, 40),
    ap.metrics.SquareRemoval((1, 2, 4)),
    ap.metrics.SquareRemoval((1, 3), 25),
]


def _linear_pictures() -> tuple[ap.Field, Tensor, Tensor]:
    w = drawn(3, 6, 6, seed=8)
    return ap.Field(lambda x: (x * w).sum((1, 2, 3)) - 1, bounds=(0, 1)), PICTURES, w


@pytest.mark.parametrize("perturbation", PERTURBATIONS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("scaled", [False, True])
def test_exact_maps_of_a_linear_model_have_no_infidelity_in_either_unit(perturbation: Any, scaled: bool) -> None:
    """Captum's without its decorator gives 5e-3 to gradient × input here, since it forecasts with I itself."""
    field, x, _ = _linear_pictures()
    metric = ap.metrics.Infidelity(perturbation, scaled)
    for explainer in (ap.Gradient(), ap.GradientTimesInput(), ap.IntegratedGradients()):
        found = metric(field, x, explainer)
        assert float(found.values.max()) <= 1e-12
        assert torch.allclose(found.parts["scale"], torch.ones(2, dtype=F64))
        assert float(found.parts["of zeros"].min()) > 1e-3


@pytest.mark.parametrize("perturbation", PERTURBATIONS, ids=lambda p: type(p).__name__)
def test_wrong_maps_are_less_faithful(perturbation: Any) -> None:
    field, x, w = _linear_pictures()
    metric = ap.metrics.Infidelity(perturbation)
    zeros = metric(field, x, torch.zeros_like(x))
    assert torch.allclose(zeros.values, zeros.parts["of zeros"])
    for wrong in (-w * x, (w * x).roll(1, 3), w.expand_as(x)):
        assert bool((metric(field, x, wrong).values > 1e-3).all())
    by_scale = ap.metrics.Infidelity(perturbation, optimal_scale=True)
    assert float(by_scale(field, x, -3 * w * x).values.max()) <= 1e-12  # its caution
    assert bool((by_scale(field, x, (w * x).roll(1, 3)).values > 1e-3).all())


def test_infidelity_is_its_slow_twin_and_the_authors_noise() -> None:
    """The authors' r = clip(N(0, .2²) + x, x - 1, x), taken away from x, is x less noise clipped to [0, 1]."""
    model = Recorded(NET)
    field = ap.Field(model, bounds=(0, 1), batch_size=64)
    phi = drawn(2, 3, 6, 6, seed=2)
    for answers in ("salience", "sensitivity"):
        for i in range(2):
            model.rows.clear()
            x = PICTURES[i : i + 1]
            metric = ap.metrics.Infidelity(ap.metrics.NoisyBaseline(samples=30))
            found = metric(field, x, ap.GivenMap(phi[i : i + 1], answers=answers), target=2)
            rows = [r for r in torch.cat(model.rows) if bool((r == 0).any())]
            rows = list({tuple(r.flatten().tolist()): r for r in rows}.values())
            assert len(rows) == 30
            told, fall = [], []
            for row in rows:
                taken = x[0] - row
                assert bool((taken <= x[0]).all() and (taken >= x[0] - 1).all())
                weight = taken / x[0] if answers == "salience" else taken
                told.append(float((weight * phi[i]).sum()))
                fall.append(float(NET(x)[0, 2] - NET(row[None])[0, 2]))
            t, d = np.array(told), np.array(fall)
            beta = (t * d).mean() / (t * t).mean()
            assert float(found.values) == pytest.approx(((t - d) ** 2).mean(), rel=1e-9)
            assert float(found.parts["scaled"]) == pytest.approx(((beta * t - d) ** 2).mean(), rel=1e-9)
            assert float(found.parts["scale"]) == pytest.approx(beta, rel=1e-9)
            noise = torch.stack(rows)
            assert float((noise == 0).double().mean()) == pytest.approx(0.5, abs=0.03)
            assert float(noise.square().mean()) == pytest.approx(0.02, abs=0.002)


def test_squares_are_removed_one_at_a_time_each_once_also_where_they_do_not_divide_the_picture() -> None:
    """Quantus erases them one after another, repeats identical work, and fails where they do not fit a whole number."""
    model = Recorded(NET)
    x = PICTURES[:1]
    phi = ap.GradientTimesInput()(ap.Field(NET), x, target=0).values
    metric = ap.metrics.Infidelity(ap.metrics.SquareRemoval((4, 5, 9)))
    found = metric(ap.Field(model, batch_size=64), x, phi, target=0)
    gone = [(r == 0).all(0) for r in model.masked(x)]
    expected = {
        (k, top, left) for k in (4, 5) for top in range(6 - k + 1) for left in range(6 - k + 1)
    }  # 9 does not fit
    seen = []
    for g in gone:
        rows, cols = g.any(1).nonzero()[:, 0], g.any(0).nonzero()[:, 0]
        k = len(rows)
        assert len(cols) == k
        assert int(g.sum()) == k * k
        seen.append((k, int(rows[0]), int(cols[0])))
    assert sorted(seen) == sorted(expected)
    assert int(found.cost.forward[0]) == len(expected)
    errors = []
    for k, top, left in expected:
        row = x.clone()
        row[:, :, top : top + k, left : left + k] = 0
        errors.append(float(phi[0, :, top : top + k, left : left + k].sum() - (NET(x) - NET(row))[0, 0]) ** 2)
    assert float(found.values) == pytest.approx(np.mean(errors), rel=1e-9)


def test_no_two_perturbations_are_the_same() -> None:
    model = Recorded(NET)
    metric = ap.metrics.Infidelity(ap.metrics.NoisyBaseline(samples=20))
    metric(ap.Field(model, batch_size=64), PICTURES[:1], ap.Gradient(), target=0)
    rows = torch.cat(model.rows)
    distinct = torch.unique((rows - PICTURES[:1]).flatten(1), dim=0)
    assert len(distinct) >= 20


def test_one_channel_is_the_slope_of_each_channel_or_what_all_have_together() -> None:
    field = ap.Field(lambda x: (x.sum(1) * torch.arange(36, dtype=F64).reshape(6, 6)).sum((1, 2)), bounds=(0, 1))
    slope = ap.GivenMap(torch.arange(36, dtype=F64).reshape(1, 1, 6, 6).expand(2, -1, -1, -1), answers="sensitivity")
    for perturbation in PERTURBATIONS:
        assert float(ap.metrics.Infidelity(perturbation)(field, PICTURES, slope).values.max()) < 1e-9
    share = (PICTURES.sum(1) * torch.arange(36, dtype=F64).reshape(6, 6))[:, None]
    assert float(ap.metrics.Infidelity(PERTURBATIONS[2])(field, PICTURES, share).values.max()) < 1e-9


def test_elements_at_the_baseline_have_nothing_to_give() -> None:
    field, x, _ = _linear_pictures()
    x = x.clone()
    x[:, :, 0] = 0
    found = ap.metrics.Infidelity(ap.metrics.NoisyBaseline(samples=10))(field, x, ap.GradientTimesInput())
    assert bool(found.values.isfinite().all())
    assert (
        float(ap.metrics.Infidelity(ap.metrics.SquareRemoval((2,)))(field, x, ap.GradientTimesInput()).values.max())
        < 1e-12
    )


def test_perturbations_that_cannot_be_made_are_refused() -> None:
    field, x, w = slopes()
    with pytest.raises(InputError, match="squares"):
        ap.metrics.Infidelity(ap.metrics.SquareRemoval())(field, x, w * x)
    with pytest.raises(InputError, match="6 × 6"):
        ap.metrics.Infidelity(ap.metrics.SquareRemoval((7,)))(ap.Field(NET), PICTURES, PICTURES)
    for wrong in ((), (0,), (2, 2)):
        with pytest.raises(ConfigError, match="sides"):
            ap.metrics.SquareRemoval(wrong)


# -- sensitivity, Lipschitz -----------------------------------------------------------------------


class Watched:
    """Gradients times gain by torch alone, as another library's explainer; keeps the rows it was asked about."""

    def __init__(self, gain: Any = lambda x: 1.0) -> None:
        self.gain, self.rows, self.targets = gain, [], []

    def __call__(self, x: Tensor, target: Tensor) -> Tensor:
        self.rows.append(x.clone())
        self.targets.append(target.clone())
        return self.of(x, target)

    def of(self, x: Tensor, target: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(NET(x).gather(1, target[:, None]).sum(), x)
        return grad * self.gain(x.detach())

    def copies(self, batch: int, example: int) -> list[Tensor]:
        """List the copies of an example, whose map was asked for first."""
        rows = torch.cat(self.rows)[batch:]
        return list(rows.reshape(-1, batch, *rows.shape[1:])[:, example])


def _watched(metric: Metric, watched: Watched, **options: Any) -> Scores:
    return metric(ap.Field(NET, **options), PICTURES, ap.External(watched), target=[1, 2])


@pytest.mark.parametrize("relative", [True, False])
def test_sensitivities_are_their_slow_twins_and_copies_go_together(relative: bool) -> None:
    """Under captum's no_grad such explainers crash; with Quantus each copy is a call of its own."""
    noise = ap.noise.UniformBox(0.2)
    for cls, summed in ((ap.metrics.MaxSensitivity, max), (ap.metrics.AverageSensitivity, np.mean)):
        watched = Watched()
        with torch.no_grad():
            found = _watched(cls(noise, 8, relative), watched)
        assert [len(r) for r in watched.rows] == [2, 16]
        assert torch.cat(watched.targets).tolist() == [1, 2] * 9
        for i in range(2):
            target = torch.tensor([[1, 2][i]])
            phi = watched.of(PICTURES[i : i + 1], target)
            size = float(phi.norm()) if relative else 1.0
            away = []
            for copy in watched.copies(2, i):
                assert float((copy - PICTURES[i]).abs().max()) < 0.2
                away.append(float((watched.of(copy[None], target) - phi).norm()) / size)
            assert float(found.values[i]) == pytest.approx(summed(away), rel=1e-9)
            assert len({round(a, 12) for a in away}) == 8


def test_baselines_made_of_the_input_move_with_it() -> None:
    near = ap.baselines.NearestAdversarial((1.0, 4.0), steps=6)
    blur = ap.IntegratedGradients(ap.baselines.Blurred(1.0), ap.quadrature.Gauss(4))
    field, target = ap.Field(NET), [0, 2]
    for method in (ap.BoundarySaliency(near), blur, ap.SmoothGrad(blur, samples=2, noise=Moved())):
        found = ap.metrics.AverageSensitivity(Moved(), 2, relative=False)(field, PICTURES, method, target=target)
        own = method(field, PICTURES, target=target).values
        want = [(method(field, PICTURES + s, target=target).values - own).flatten(1).norm(dim=1) for s in (0.1, 0.2)]
        torch.testing.assert_close(found.values, (want[0] + want[1]) / 2)
        assert bool((found.values > 1e-3 * own.flatten(1).norm(dim=1)).all())


def test_baselines_at_the_input_of_a_moved_embedding_are_those_of_its_example() -> None:
    """Also where copies that changed their class are left out, so that the rest are as many as examples by chance."""
    words = torch.tensor([[1, 2], [3, 4], [5, 6]])
    net = nn.Sequential(nn.Embedding(9, 3), nn.Flatten(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)).double().eval()
    blank = ap.baselines.Given(torch.tensor([[7, 8], [8, 7], [0, 0]]))
    field, rest = ap.Field(net, site=ap.At("0")), ap.Field(net[1:])
    there = ap.baselines.Given(net[0](blank.value).detach())
    several = ap.baselines.Several((blank, ap.baselines.Given(torch.tensor([0, 1]))))
    method, other = (ap.IntegratedGradients(b, ap.quadrature.Gauss(3)) for b in (ap.baselines.AtInput(blank), there))
    values = net[0](words).detach()
    for k in (1, 3):
        found = ap.metrics.AverageSensitivity(Moved(), k)(field, words, method, target=0, ids=[1, 2, 3]).values
        far = []
        for i in range(3):
            mine = replace(other, baseline=ap.baselines.Given(there.value[i]))
            own = mine(rest, values[i : i + 1], target=0).values
            moved = [mine(rest, values[i : i + 1] + 0.1 * (1 + s), target=0).values for s in range(k)]
            far.append(sum((m - own).norm() for m in moved) / k / own.norm())
        torch.testing.assert_close(found, torch.stack(far))
    owner = torch.tensor([2, 0, 2])
    copies = field.bind(words, target=0).anew(values[owner] + 0.1, owner, torch.tensor([0, 0, 1]))
    made = ap.baselines.AtInput(several)(copies)
    torch.testing.assert_close(made[:, 0], there.value[owner])
    torch.testing.assert_close(made[:, 1], net[0](torch.tensor([0, 1])).detach().expand(3, 2, 3))
    assert torch.equal(there(copies)[:, 0], there.value[owner])


def test_groups_given_for_each_example_are_those_of_its_copies() -> None:
    x, labels = drawn(3, 4), torch.tensor([[0, 0, 1, -1], [0, 1, 1, 1], [1, 0, 1, 0]])
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double().eval()
    field, method = ap.Field(net), ap.Occlusion(ap.groups.Labels(labels))
    found = ap.metrics.AverageSensitivity(Moved(), 2, relative=False)(field, x, method, target=0).values
    for i in range(3):
        mine = ap.Occlusion(ap.groups.Labels(labels[i]))
        maps = [mine(field, x[i : i + 1] + s, target=0).spread(share=True).values for s in (0.0, 0.1, 0.2)]
        torch.testing.assert_close(found[i], sum((m - maps[0]).norm() for m in maps[1:]) / 2)
    owner = torch.tensor([2, 0, 2])
    copies = field.bind(x, target=0).at(x[owner], owner, torch.tensor([0, 0, 1]))
    values = by_player(copies, x[owner], ap.groups.Labels(labels))
    assert torch.equal(values, by_player(field.bind(x[owner]), x[owner], ap.groups.Labels(labels[owner])))
    of_two = ap.groups.PerInput((ap.groups.Elements(), ap.groups.RealTokens(labels >= 0)))
    two = ap.Field(lambda a, b: a.sum(1) + b.sum(1)).bind((x, x)).at((x[owner], x[owner]), owner, owner)
    told = ap.groups.PerInput((ap.groups.Elements(), ap.groups.RealTokens(labels[owner] >= 0)))
    assert torch.equal(labels_of(of_two, two)[1], told.labels(two.x)[1])


@dataclass(frozen=True)
class Moved(ap.noise.Gaussian):
    """Adds .1 to the first copy, .2 to the second."""

    def __call__(self, q: Any, owner: Tensor, draw: Tensor, purpose: str = "noise") -> Tensor:
        return q.x[owner] + 0.1 * (1 + draw.to(q.x).reshape(-1, *[1] * (q.x.ndim - 1)))


def test_a_gradient_of_a_linear_model_does_not_move_and_others_do() -> None:
    field, x, _ = slopes()
    for metric in (ap.metrics.MaxSensitivity(samples=5), ap.metrics.AverageSensitivity(samples=5),
                   ap.metrics.LocalLipschitz(samples=5)):  # fmt: skip
        assert metric(field, x, ap.Gradient()).values.tolist() == [0, 0, 0]
        assert bool((metric(field, x, ap.GradientTimesInput()).values > 0.01).all())
    smooth, jumping = ap.External(lambda x, target: x + 5), ap.External(lambda x, target: (x + 5) * _jump(x))
    for metric in (ap.metrics.MaxSensitivity(samples=5), ap.metrics.AverageSensitivity(samples=5),
                   ap.metrics.LocalLipschitz(samples=5), ap.metrics.RelativeStability(samples=5)):  # fmt: skip
        assert bool((metric(field, x, jumping).values > 2 * metric(field, x, smooth).values).all())


def _jump(x: Tensor) -> Tensor:
    return torch.where(x.sum(1, keepdim=True) % 0.02 < 0.01, 1.0, -3.0)


def test_a_lipschitz_estimate_is_the_steepest_ratio_and_knows_no_neighbour_in_the_batch() -> None:
    """Quantus divides maps by the largest of the whole batch, so a quiet example depends on its neighbours."""
    square = ap.Field(lambda x: (x**2 * torch.tensor([1.0, 3.0], dtype=F64)).sum(1))
    x = torch.tensor([[1.0, 1.0], [1e3, -1e3]], dtype=F64)
    metric = ap.metrics.LocalLipschitz(samples=60)
    both, alone = metric(square, x, ap.Gradient(), ids=[0, 1]), metric(square, x[:1], ap.Gradient(), ids=[0])
    assert float(both.values[0]) == pytest.approx(float(alone.values[0]), rel=1e-12)
    assert 5.5 < float(alone.values) <= 6  # the steepest direction is the second: 2 · 3
    watched = Watched()
    found = _watched(ap.metrics.LocalLipschitz(samples=6), watched)
    phi = watched.of(PICTURES[:1], torch.tensor([1]))
    ratios = [
        float((watched.of(copy[None], torch.tensor([1])) - phi).norm() / (copy - PICTURES[0]).norm())
        for copy in watched.copies(2, 0)
    ]
    assert float(found.values[0]) == pytest.approx(max(ratios), rel=1e-9)
    assert float(found.parts["mean"][0]) == pytest.approx(np.mean(ratios), rel=1e-9)


def test_memory_does_not_grow_with_the_number_of_copies() -> None:
    for metric in (ap.metrics.MaxSensitivity(samples=9), ap.metrics.LocalLipschitz(samples=9),
                   ap.metrics.RelativeStability(samples=9)):  # fmt: skip
        watched = Watched()
        _watched(metric, watched, batch_size=4)
        assert max(len(r) for r in watched.rows) <= 4


def test_maps_of_zeros_and_maps_alone_are_not_judged_by_moving() -> None:
    field, x, w = slopes()
    none = ap.metrics.MaxSensitivity(samples=2)(field, x, ap.External(lambda x, target: 0 * x))
    assert bool(none.values.isnan().all())
    assert list(none.undefined) == ["a map of zeros, relative to which nothing is"]
    plain = ap.metrics.MaxSensitivity(samples=2, relative=False)(field, x, ap.External(lambda x, target: 0 * x))
    assert plain.values.tolist() == [0, 0, 0]
    with pytest.raises(ConfigError, match="asks it again"):
        ap.metrics.MaxSensitivity()(field, x, w * x)


def test_maps_on_groups_are_compared_where_their_elements_are() -> None:
    shapley = ap.Shapley(groups=ap.groups.Squares(3), fill=ap.fills.Baselines(), sampler=ap.samplers.AllSubsets())
    found = ap.metrics.MaxSensitivity(samples=2)(ap.Field(NET), PICTURES, shapley, target=0)
    assert bool((found.values > 0).all())


# -- relative stability ---------------------------------------------------------------------------


def _ratio(a: Tensor, b: Tensor, change: float) -> float:
    relative = (a - b) / a.abs().clamp(min=1e-6)
    return float(relative.norm()) / max(change, 1e-6)


def test_relative_stability_is_its_slow_twin_for_input_output_and_representation() -> None:
    noise = ap.noise.Gaussian(0.05, relative=False)
    site = ap.At("1")
    for change in (ap.metrics.InputChange(), ap.metrics.OutputChange(), ap.metrics.RepresentationChange(site)):
        watched = Watched()
        found = _watched(ap.metrics.RelativeStability(change, noise, 5), watched)
        assert found.parts["flipped"].tolist() == [0, 0]
        for i in range(2):
            x, target = PICTURES[i : i + 1], torch.tensor([[1, 2][i]])
            ratios = []
            for copy in watched.copies(2, i):
                x2 = copy[None]
                if isinstance(change, ap.metrics.InputChange):
                    moved = float(((x - x2) / x.abs().clamp(min=1e-6)).norm())
                elif isinstance(change, ap.metrics.OutputChange):
                    moved = float((NET(x) - NET(x2)).norm())
                else:
                    inner = nn.Sequential(*list(NET.children())[:2])
                    moved = float(((inner(x) - inner(x2)) / inner(x).abs().clamp(min=1e-6)).norm())
                ratios.append(_ratio(watched.of(x, target), watched.of(x2, target), moved))
            assert float(found.values[i]) == pytest.approx(max(ratios), rel=1e-9)


def test_copies_that_change_their_class_are_left_out_and_counted() -> None:
    """Quantus has NaN for an example of which any copy does."""
    seen: list[Tensor] = []

    def cubes(x: Tensor, target: Tensor) -> Tensor:
        seen.append(x.clone())
        return x**3 + 1

    field = ap.Field(lambda x: torch.stack([x[:, 0], x[:, 1]], 1))
    x = torch.tensor([[1.0, 0.99], [5.0, 1.0], [1.0, 1.0]], dtype=F64)
    metric = ap.metrics.RelativeStability(noise=ap.noise.Gaussian(0.05, relative=False), samples=12)
    found = metric(field, x, ap.External(cubes))
    flipped = found.parts["flipped"].tolist()
    assert 0 < flipped[0] < 12
    assert flipped[1] == 0
    assert bool(found.values.isfinite().all())
    asked = torch.cat(seen[1:])
    assert len(asked) == 36 - sum(flipped)
    assert bool((asked[:, 0] >= asked[:, 1]).all())
    one = metric(field, x[:1], ap.External(cubes), ids=["a"])
    kept = seen[-1]
    ratios = [_ratio(x[0] ** 3 + 1, k**3 + 1, float(((x[0] - k) / x[0]).norm())) for k in kept]
    assert float(one.values) == pytest.approx(max(ratios), rel=1e-9)

    always = ap.Field(lambda x: torch.stack([(x[:, 0] - 1).abs() * -1e3 + 1e-6, 0 * x[:, 0]], 1))
    none = metric(always, torch.tensor([[1.0, 0.5]], dtype=F64), ap.External(cubes))
    assert bool(none.values.isnan().all())
    assert list(none.undefined) == ["every copy changed the class"]
    assert none.parts["flipped"].tolist() == [12]


# -- prediction gaps ------------------------------------------------------------------------------


def test_gaps_of_a_linear_score_are_known() -> None:
    """|w_S · ε| for ε ~ N(0, σ²) has the mean σ ‖w_S‖ √(2/π)."""
    field, x, w = slopes()
    options: dict[str, Any] = {"samples": 4000, "score": ap.Logit()}
    important = ap.metrics.PredictionGapImportant((0.43,), **options)(field, x, w + 0 * x)
    rest = ap.metrics.PredictionGapUnimportant((0.43,), **options)(field, x, w + 0 * x)
    size = w.abs().sort(descending=True).values
    factor = 0.1 * (2 / np.pi) ** 0.5
    assert important.values.tolist() == pytest.approx([factor * float(size[:3].norm())] * 3, rel=0.05)
    assert rest.values.tolist() == pytest.approx([factor * float(size[3:].norm())] * 3, rel=0.05)
    wrong = 1 / w.abs() + 0 * x
    assert bool((ap.metrics.PredictionGapImportant(score=ap.Logit())(field, x, wrong).values < important.values).all())
    assert bool((ap.metrics.PredictionGapUnimportant(score=ap.Logit())(field, x, wrong).values > rest.values).all())


@pytest.mark.parametrize("important", [True, False])
def test_gaps_are_their_slow_twin_and_move_the_right_pixels(important: bool) -> None:
    maps = drawn(2, 3, 6, 6, seed=5)
    cls = ap.metrics.PredictionGapImportant if important else ap.metrics.PredictionGapUnimportant
    for i in range(2):
        model, x = Recorded(NET), PICTURES[i : i + 1]
        field = ap.Field(model, batch_size=64)
        found = cls((0.25, 0.5), samples=7)(field, x, maps[i : i + 1], target=1, ids=[i])
        size = maps[i].sum(0).abs().flatten()
        rows = torch.unique(torch.cat(model.rows), dim=0)
        for k, n in enumerate((9, 18)):
            top = torch.zeros(36, dtype=torch.bool)
            top[size.argsort(descending=True)[:n]] = True
            moved = (top if important else ~top).reshape(6, 6)
            mine = [r for r in rows if torch.equal((r != x[0]).any(0), moved)]
            assert len(mine) == 7
            before, after = NET(x).softmax(1)[0, 1], NET(torch.stack(mine)).softmax(1)[:, 1]
            expected = float((after - before).abs().mean())
            assert float(found.curves["gap"].y[0, k]) == pytest.approx(expected, rel=1e-9)
        assert torch.allclose(found.values, found.curves["gap"].y.mean(1))


def test_gaps_of_a_constant_map_take_players_at_random() -> None:
    field, x, _ = slopes()
    found = ap.metrics.PredictionGapImportant((0.4,), samples=3, score=ap.Logit())(field, x, torch.ones_like(x))
    assert found.parts["ties"].tolist() == [1, 1, 1]
    again = ap.metrics.PredictionGapUnimportant((1.0,), samples=3, score=ap.Logit())(field, x, torch.ones_like(x))
    assert again.values.tolist() == [0, 0, 0]


def test_settings_are_those_of_the_originals() -> None:
    """Written out: whoever changes a default changes what is called by the paper's name."""
    n = ap.metrics.SensitivityN()
    assert (n.fractions[0], n.fractions[-1], len(n.fractions), n.samples) == (0.01, 0.9, 17, 100)
    assert ap.metrics.SquareRemoval().sides == tuple(range(1, 11))
    assert ap.metrics.LocalLipschitz().samples == 200
    moved = slopes()
    with torch.random.fork_rng():
        seen: list[Tensor] = []
        watched = ap.External(lambda x, target: (seen.append(x), x)[1], name="watched")
        ap.metrics.LocalLipschitz()(moved[0], moved[1][:1], watched)
    rows = torch.cat([s for s in seen if len(s) > 1])
    assert float((rows - moved[1][:1]).std()) == pytest.approx(0.1, rel=0.1)


def test_a_map_that_was_given_takes_no_pass_that_the_metric_makes_anyway() -> None:
    """f(x) stands beside the map, and the metric needs it: one pass for both, on the metric's bill."""
    model, x = Recorded(lambda x: x.sum(1)), drawn(2, 5)
    field = ap.Field(model)
    field.bind(x)
    model.rows.clear()
    found = ap.metrics.Infidelity(ap.metrics.GaussianPerturbation(0.1, samples=3))(field, x, drawn(2, 5))
    assert found.cost.at_x.tolist() == [1, 1]
    assert sum(len(r) for r in model.rows) == 2 * (1 + 3)
