"""Curves of removal: closed forms, an independent twin, wrong maps, and the errors others were found to make."""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from written_out import rise

import apportion as ap
from apportion.core.errors import BaselineError, ConfigError, InputError
from apportion.metrics import (
    ABPC,
    AOPC,
    ROAD,
    DeletionAUC,
    InsertionAUC,
    InsertionDeletion,
    LeRF,
    Metric,
    MoRF,
    Scores,
    SingleDeletion,
)
from apportion.metrics.metric import Subject
from apportion.parts.masks.fill import Fill
from apportion.planted import additive, linear

E, Z = ap.groups.Elements(), ap.Logit()


def given(baseline: Tensor) -> Fill:
    return ap.fills.Baselines(ap.baselines.Given(baseline))


def weights(p: ap.planted.Planted) -> Tensor:
    return p.model.get_buffer("weight")


def network(classes: int = 4) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(54, classes)
        )
    return net.double().eval().requires_grad_(False)


def pictures(count: int = 2, side: int = 12) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def maps(x: Tensor) -> Tensor:
    return torch.randn(len(x), *x.shape[2:], generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def watched() -> tuple[ap.Field, list[Tensor]]:
    """Give a field, and the list of all rows its model will be given."""
    net, rows = network(), []

    def model(x: Tensor) -> Tensor:
        rows.extend(x.detach().clone())
        return net(x)

    return ap.Field(model), rows


# -- deletion and insertion -----------------------------------------------------------------------


@pytest.mark.parametrize("make", [linear, additive])
def test_areas_on_functions_without_interactions(make: Callable[..., ap.planted.Planted]) -> None:
    """With contributions c in descending order, s_k = f(x) - Σ_{i≤k} c_i, so that each counts n - i + 1/2 steps."""
    p = make(features=7, examples=5)
    n, c = 7, p.truth.sort(1, descending=True).values
    late = (c * (n - torch.arange(1, n + 1) + 0.5) / n).sum(1)
    options: dict[str, Any] = {"fill": given(p.baseline), "score": Z}
    field = ap.Field(p.model)
    found = [m(**options)(field, p.x, p.truth) for m in (DeletionAUC, InsertionAUC)]
    torch.testing.assert_close(found[0].values, p.model(p.x) - late, rtol=0, atol=1e-12)
    torch.testing.assert_close(found[1].values, p.model(p.baseline) + late, rtol=0, atol=1e-12)
    both = InsertionDeletion(InsertionAUC(**options), DeletionAUC(**options))(field, p.x, p.truth)
    torch.testing.assert_close(both.values, 2 * late - c.sum(1), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "m",
    [
        DeletionAUC(score=Z),
        InsertionAUC(fill=DeletionAUC.fill, score=Z),
        InsertionDeletion(InsertionAUC(fill=DeletionAUC.fill, score=Z), DeletionAUC(score=Z)),
    ],
)
def test_a_planted_wrong_map_scores_worse(m: Metric) -> None:
    p = linear(features=8, examples=6)
    field, truth = ap.Field(p.model), weights(p) * p.x
    right = m(field, p.x, truth)
    for wrong in (-truth, truth.roll(3, 1), truth.abs()):
        worse = m(field, p.x, wrong).values - right.values
        assert bool(((worse if m.card.direction.value.startswith("lower") else -worse) >= 0).all())
        assert bool((worse.abs() > 1e-3).any())


@pytest.mark.parametrize("step", [None, 24])
def test_agrees_with_the_definition_written_out(step: int | None) -> None:
    """Steps of a row of pixels, both ends, mean color (zeros after the normalization), the original's blur."""
    net, x = network(), pictures()
    saliency, normalize = maps(x), ap.Normalize((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    field = ap.Field(net, normalize=normalize)
    for m, insert in ((DeletionAUC(step=step), False), (InsertionAUC(step=step), True)):
        found = m(field, x, saliency)
        (curve,) = found.curves.values()
        for b in range(len(x)):
            want, scores = rise(net, normalize(x)[b], saliency[b], step or 12, insert)
            assert float(found.values[b]) == pytest.approx(want, abs=1e-10)
            assert curve.y[b].tolist() == pytest.approx(scores, abs=1e-10)
            assert torch.allclose(curve.x, torch.linspace(0, 1, len(scores)).double())


def test_a_step_that_does_not_divide_removes_every_pixel_once() -> None:
    """144 pixels by 50: 0, 50, 100, 144. The last step is shorter, also in the area."""
    (field, rows), x = watched(), pictures(1)
    found = DeletionAUC(step=50)(field, x, maps(x), target=0)
    (curve,) = found.curves.values()
    torch.testing.assert_close(curve.x, torch.tensor([0, 50, 100, 144]).double() / 144, check_dtype=False)
    y = curve.y[0]
    want = (50 * (y[0] + y[1]) / 2 + 50 * (y[1] + y[2]) / 2 + 44 * (y[2] + y[3]) / 2) / 144
    assert float(found.values) == pytest.approx(float(want), abs=1e-12)
    assert found.cost.forward.tolist() == [4]
    assert {int((row != x[0]).any(0).sum()) for row in rows} == {0, 50, 100, 144}


def test_both_ends_are_points_of_the_curve() -> None:
    x, field = pictures(), ap.Field(network())
    q = field.bind(x)
    at_x = q.value(x, torch.arange(2), ap.Probability())
    at_zero = q.value(0 * x, torch.arange(2), ap.Probability())
    for m in (DeletionAUC(), InsertionAUC(fill=DeletionAUC.fill)):
        (curve,) = m(field, x, maps(x)).curves.values()
        ends = curve.y[:, [0, -1]] if isinstance(m, DeletionAUC) else curve.y[:, [-1, 0]]
        torch.testing.assert_close(ends, torch.stack([at_x, at_zero], 1), rtol=0, atol=1e-12)


def test_the_area_is_a_mean_height_whatever_the_number_of_steps() -> None:
    """A score that does not change has its own height for area, as it would not with steps of width 1."""
    field, x = ap.Field(lambda x: 0 * x.flatten(1).sum(1) + 0.3), pictures()
    for step in (1, 12, 50, 200):
        found = DeletionAUC(step=step, score=Z)(field, x, maps(x))
        torch.testing.assert_close(found.values, torch.full((2,), 0.3, dtype=torch.float64))


def test_a_map_of_one_channel_removes_each_pixel_once_with_all_its_channels() -> None:
    (field, rows), x = watched(), pictures(1, 6)
    scores = [DeletionAUC(step=4)(field, x, m) for m in (maps(x), maps(x)[:, None])]
    spread = DeletionAUC(step=4)(field, x, maps(x)[:, None].expand_as(x) / 3)
    assert torch.equal(scores[0].values, scores[1].values)
    torch.testing.assert_close(scores[0].values, spread.values, rtol=0, atol=1e-12)
    assert scores[0].cost.forward.tolist() == [1 + 9]
    changed = torch.stack(rows) != x
    assert torch.equal(changed.any(1), changed.all(1))


def test_single_values_can_be_the_players_and_then_channels_go_apart() -> None:
    (field, rows), x = watched(), pictures(1, 6)
    values = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = DeletionAUC(groups=E, step=9)(field, x, values)
    assert found.cost.forward.tolist() == [1 + 12]
    assert {int((row != x[0]).sum()) for row in rows} == set(range(0, 109, 9))


def test_ties_are_drawn_and_reported() -> None:
    """A map of zeros must not be the ranking that starts at the top left."""
    (field, rows), x = watched(), pictures(1)
    found = DeletionAUC(step=72)(field, x, torch.zeros(1, 12, 12))
    assert found.parts["ties"].tolist() == [1]
    assert any("ranked at random" in w for w in found.warnings)
    (half,) = (gone for row in rows if int((gone := (row != x[0]).any(0)).sum()) == 72)
    assert 20 < int(half[:6].sum()) < 52
    clear = DeletionAUC()(ap.Field(network()), x, maps(x))
    assert clear.parts["ties"].tolist() == [0]
    assert not clear.warnings


def test_metrics_of_one_subject_share_their_points() -> None:
    x = pictures()
    q, subject = ap.Field(network()).bind(x), Subject(maps(x))
    alike: dict[str, Any] = {"fill": DeletionAUC.fill}
    spent = []
    for m in (DeletionAUC(), InsertionAUC(**alike), InsertionDeletion(InsertionAUC(**alike)), DeletionAUC(step=24)):
        alone = m(ap.Field(network()), x, maps(x))
        shared = m.judge(q, subject)
        spent.append(int(shared.cost.forward[0]))
        torch.testing.assert_close(shared.values, alone.values, rtol=0, atol=1e-12)
    assert spent == [13, 11, 0, 0]
    assert InsertionDeletion(InsertionAUC(**alike)).passes(q).forward == 24
    assert InsertionDeletion().passes(q).forward == 26


def test_two_functions_of_the_users_are_two_fills() -> None:
    """They have one name in the record, and must not share a curve."""
    x = pictures()
    q, subject = ap.Field(network()).bind(x), Subject(maps(x))
    areas = [
        DeletionAUC(fill=ap.fills.Inpainted(lambda x, kept, to=to: torch.full_like(x, to))).judge(q, subject).values
        for to in (0.0, 3.0)
    ]
    assert not torch.equal(*areas)


@dataclass(frozen=True, eq=False)
class Recording(Fill):
    """Zeros; notes how many rows it made are alive at once."""

    made: list
    live: list

    def __call__(self, q: ap.Question, mask: Tensor, owner: Tensor, draw: Tensor) -> Tensor:
        out = torch.zeros_like(q.x[owner])[:, None]
        self.made.append(weakref.ref(out))
        self.live.append(sum(len(rows) for ref in self.made if (rows := ref()) is not None))
        return out


def test_memory_does_not_grow_with_the_number_of_steps() -> None:
    x = pictures(2, 12)
    most = []
    for step in (24, 1):
        fill = Recording([], [])
        DeletionAUC(fill=fill, step=step)(ap.Field(network(), batch_size=8), x, maps(x))
        most.append(max(fill.live))
    assert most[0] <= most[1] <= 16, most


def test_players_may_differ_in_number() -> None:
    """Each example has its own share axis; what is removed is its own players."""
    p = linear(features=6, examples=2)
    labels = ap.groups.Labels(torch.tensor([[0, 1, 2, 3, 4, 5], [0, 0, 1, 1, 2, -1]]))
    truth = weights(p) * p.x
    m = DeletionAUC(groups=labels, score=Z)
    found = m(ap.Field(p.model), p.x, truth)
    (curve,) = found.curves.values()
    assert curve.x.shape == (2, 7)
    assert curve.y.isnan().tolist() == [[False] * 7, [False] * 4 + [True] * 3]
    assert found.cost.forward.tolist() == [7, 4]
    q = ap.Field(p.model).bind(p.x)
    assert m.passes(q).forward == 7
    assert not m.passes(q).exact
    sums = torch.stack([truth[1, :2].sum(), truth[1, 2:4].sum(), truth[1, 4]]).sort(descending=True).values
    heights = p.model(p.x)[1] - torch.tensor([0, *sums.cumsum(0).tolist()], dtype=torch.float64)
    want = (heights[:-1] + heights[1:]).sum() / 2 / 3
    assert float(found.values[1]) == pytest.approx(float(want), abs=1e-12)


def test_mistakes_are_told() -> None:
    x, field = pictures(), ap.Field(network())
    with pytest.raises(ConfigError, match="step=0"):
        DeletionAUC(step=0)
    for groups in (ap.groups.Patches(3, 2), ap.groups.Elements):
        with pytest.raises(ConfigError, match="do not overlap"):
            DeletionAUC(groups=groups)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="odd side"):
        ap.baselines.RISEBlur(side=10)
    with pytest.raises(InputError, match=r"(?s)without a pixel left.*limit="):
        DeletionAUC(fill=ap.fills.NoisyLinear())(field, x, maps(x))
    assert DeletionAUC(fill=ap.fills.NoisyLinear(), limit=100)(field, x, maps(x)).values.isfinite().all()


@pytest.mark.parametrize(
    "fill",
    [
        ap.fills.Baselines(ap.baselines.Mean()),
        ap.fills.Baselines(ap.baselines.Blurred(2.0)),
        ap.fills.FreshNoise(count=2),
        ap.fills.Baselines(ap.baselines.UniformNoise(0.0, 1.0)),
    ],
)
def test_substrates_and_scores_are_options_and_change_the_number(fill: Fill) -> None:
    x, field = pictures(), ap.Field(network())
    base, other = DeletionAUC()(field, x, maps(x)), DeletionAUC(fill=fill)(field, x, maps(x))
    assert bool((base.values != other.values).all())
    assert int(other.cost.forward[0]) == DeletionAUC(fill=fill).passes(field.bind(x)).forward
    assert other.metric["fill"] != base.metric["fill"]
    chosen = DeletionAUC(fill=fill, score=ap.Decision())(field, x, maps(x)).curves["deletion"].y
    assert set(chosen.flatten().tolist()) <= {0.0, 1.0}


# -- regions ----------------------------------------------------------------------------------------


def black(**options: Any) -> dict[str, Any]:
    return {"fill": DeletionAUC.fill, "limit": None, **options}


@pytest.mark.parametrize("make", [linear, additive])
def test_heights_on_functions_without_interactions(make: Callable[..., ap.planted.Planted]) -> None:
    """With contributions c in descending order, c_i is gone at n + 1 - i of n + 1 points; at i from the other end."""
    p = make(features=7, examples=5)
    n, c = 7, p.truth.sort(1, descending=True).values
    i = torch.arange(1, n + 1, dtype=torch.float64)
    morf, lerf = ((c * share / (n + 1)).sum(1) for share in (n + 1 - i, i))
    options = black(fill=given(p.baseline), score=Z)
    field = ap.Field(p.model)
    at_x = p.model(p.x)
    wanted = {MoRF: at_x - morf, LeRF: at_x - lerf, AOPC: morf, ABPC: morf - lerf}
    for m, value in wanted.items():
        torch.testing.assert_close(m(**options)(field, p.x, p.truth).values, value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", [MoRF, LeRF, AOPC, ABPC])
def test_regions_reject_a_planted_wrong_map(make: Any) -> None:
    p = linear(features=8, examples=6)
    field, truth, m = ap.Field(p.model), weights(p) * p.x, make(**black(score=Z))
    right = m(field, p.x, truth)
    for wrong in (-truth, truth.roll(3, 1)):
        worse = right.values - m(field, p.x, wrong).values
        worse = -worse if m.card.direction.value.startswith("lower") else worse
        assert bool((worse >= -1e-12).all())
        assert bool((worse > 1e-3).any())


def regions(net: nn.Module, x: Tensor, saliency: Tensor, noise: Tensor, side: int, most: int) -> tuple[list, list]:
    """Both curves of one picture [C, H, W] as Samek et al. describe them: region by region, each once, k = 0..L."""
    squares = [(i, j) for i in range(0, x.shape[1], side) for j in range(0, x.shape[2], side)]
    relevance = [float(saliency[i : i + side, j : j + side].sum()) for i, j in squares]
    target = int(net(x[None])[0].argmax())
    curves = []
    for sign in (-1, 1):
        now, heights = x.clone(), []
        for k in [None, *sorted(range(len(squares)), key=lambda r: sign * relevance[r])[:most]]:
            if k is not None:
                i, j = squares[k]
                now[:, i : i + side, j : j + side] = noise[:, i : i + side, j : j + side]
            heights.append(float(net(now[None])[0].softmax(0)[target]))
        curves.append(heights)
    return curves[0], curves[1]


@pytest.mark.parametrize("limit", [3, 100])
def test_regions_agree_with_the_definition_written_out(limit: int) -> None:
    """Squares of 5 do not divide 12 pixels; squares at the border are smaller, and are regions all the same."""
    net, x = network(), pictures()
    field, saliency = ap.Field(net, bounds=(0, 1)), maps(x)
    options: dict[str, Any] = {"groups": ap.groups.Squares(5), "limit": limit}
    noise = field.bind(x).baseline_rows(ap.baselines.UniformNoise())[:, 0]
    for b in range(2):
        most, least = regions(net, x[b], saliency[b], noise[b], 5, limit)
        mean = [sum(c) / len(c) for c in (most, least)]
        for make, want in ((MoRF, mean[0]), (LeRF, mean[1]), (AOPC, most[0] - mean[0]), (ABPC, mean[1] - mean[0])):
            found = make(**options)(field, x, saliency)
            assert float(found.values[b]) == pytest.approx(want, abs=1e-12)
        assert found.curves["MoRF"].y[b].tolist() == pytest.approx(most, abs=1e-12)
        assert found.curves["LeRF"].y[b].tolist() == pytest.approx(least, abs=1e-12)


def test_regions_are_the_originals_unless_told() -> None:
    """9 x 9 pixels, one at a time, uniform noise within the bounds, at most a hundred."""
    x = torch.rand(1, 3, 99, 99, generator=torch.Generator().manual_seed(1))
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    found = MoRF()(ap.Field(net, bounds=(0, 1)), x, maps(x))
    curve = found.curves["MoRF"]
    assert found.cost.forward.tolist() == [101]
    torch.testing.assert_close(curve.x, torch.arange(101).double() / 121)
    with pytest.raises(BaselineError, match="bounds"):
        MoRF()(ap.Field(net), x, maps(x))


def test_one_map_is_removed_once_for_all_metrics_of_regions() -> None:
    x = pictures()
    q, subject = ap.Field(network(), bounds=(0, 1)).bind(x), Subject(maps(x))
    options: dict[str, Any] = {"groups": ap.groups.Squares(3)}
    spent = [int(make(**options).judge(q, subject).cost.forward[0]) for make in (MoRF, AOPC, LeRF, ABPC)]
    assert spent == [17, 0, 15, 0]
    assert int(DeletionAUC(**options, fill=MoRF.fill, step=4).judge(q, subject).cost.forward[0]) == 0


# -- ROAD -------------------------------------------------------------------------------------------


def imputed(x: Tensor, gone: Tensor) -> Tensor:
    """Solve the system of Rong et al. for one picture [C, H, W] without noise, pixel by pixel."""
    height, width = gone.shape
    where = {(int(i), int(j)): k for k, (i, j) in enumerate(gone.nonzero())}
    system, right = np.zeros((len(where), len(where))), np.zeros((len(where), len(x)))
    for (i, j), k in where.items():
        around = {
            (i + di, j + dj): (1 / 12 if di and dj else 1 / 6)
            for di in (-1, 0, 1)
            for dj in (-1, 0, 1)
            if (di or dj) and 0 <= i + di < height and 0 <= j + dj < width
        }
        system[k, k] = 1
        for at, weight in around.items():
            share = weight / sum(around.values())
            if at in where:
                system[k, where[at]] -= share
            else:
                right[k] += share * x[:, at[0], at[1]].numpy()
    out = x.clone()
    if where:
        solved = np.linalg.solve(system, right)
        for (i, j), k in where.items():
            out[:, i, j] = torch.from_numpy(solved[k])
    return out


def test_road_agrees_with_the_definition_written_out_on_pictures_of_three_channels() -> None:
    net, x = network(), pictures()
    saliency, fractions = maps(x), ROAD().fractions
    m = ROAD(fill=ap.fills.NoisyLinear(noise=0.0, tolerance=1e-12), score=ap.Probability())
    found = m(ap.Field(net), x, saliency)
    for b in range(2):
        target = int(net(x[b : b + 1]).argmax())
        for name, sign in (("MoRF", -1), ("LeRF", 1)):
            ranking = (sign * saliency[b]).flatten().argsort()
            heights = []
            for fraction in fractions:
                gone = torch.zeros(144, dtype=torch.bool)
                gone[ranking[: int(144 * fraction)]] = True
                row = imputed(x[b], gone.reshape(12, 12))
                heights.append(float(net(row[None])[0].softmax(0)[target]))
            assert found.curves[name].y[b].tolist() == pytest.approx(heights, abs=1e-9)
            assert float(found.parts[name][b]) == pytest.approx(sum(heights) / 7, abs=1e-9)
    torch.testing.assert_close(found.values, found.parts["LeRF"] - found.parts["MoRF"])
    assert found.cost.forward.tolist() == [14, 14]


def test_road_gives_the_accuracy_against_labels_over_all_of_the_data() -> None:
    """Decisions are those of single examples, and their mean over parts is that over the whole."""
    net, x = network(), pictures(6)
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    m, field = ROAD(fill=ap.fills.NoisyLinear(noise=0.0)), ap.Field(net)
    ids = list("abcdef")
    whole = m(field, x, maps(x), target=labels, ids=ids)
    parts = [m(field, x[s], maps(x)[s], target=labels[s], ids=ids[s]) for s in (slice(0, 4), slice(4, 6))]
    joined = Scores.join(parts)
    assert torch.equal(whole.curves["MoRF"].y, joined.curves["MoRF"].y)
    decided = whole.curves["MoRF"].y
    assert set(decided.flatten().tolist()) == {0.0, 1.0}
    assert whole.summary().mean == pytest.approx(float(joined.values.mean()), abs=1e-12)
    assert float(parts[0].values.mean()) != pytest.approx(whole.summary().mean)


def test_road_counts_what_it_removes_where_a_map_is_mostly_zeros() -> None:
    """With 60 % zeros each share is still removed: thresholds at quantiles would stay at 60 %."""
    x = pictures(1)
    (field, rows), saliency = watched(), maps(x)
    saliency.flatten()[saliency.flatten().argsort()[:86]] = 0
    ROAD(fill=ap.fills.NoisyLinear(noise=0.0))(field, x, saliency.clamp(min=0))
    counted = {int((row != x[0]).any(0).sum()) for row in rows}
    assert counted - {0, 144} == {14, 28, 43, 57, 72, 100, 129}  # the model is checked at other points besides


def test_road_rejects_a_planted_wrong_map() -> None:
    """The class is decided by one corner."""

    def corner(x: Tensor) -> Tensor:
        bright = x[:, :, :4, :4].mean((1, 2, 3))
        return torch.stack([bright, 0.8 - bright], 1)

    x = torch.zeros(1, 3, 12, 12)
    x[:, :, :4, :4] = 1
    truth = x[:, :1] + 0.01 * maps(x)[:, None].float()
    right, wrong = (ROAD()(ap.Field(corner), x, m).values for m in (truth, -truth))
    assert float(right) > 0.4
    assert float(wrong) == -float(right)
    with pytest.raises(ConfigError, match="rising"):
        ROAD(fractions=(0.5, 0.1))


def test_a_model_that_gives_probabilities_is_told_that_they_are_softmaxed_again() -> None:
    x = pictures(1)
    found = DeletionAUC()(ap.Field(nn.Sequential(network(), nn.Softmax(1))), x, maps(x))
    assert any("softmax of them again" in w for w in found.warnings)


# -- single deletion --------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [linear, additive])
def test_what_is_lost_without_each_is_what_each_adds(make: Callable[..., ap.planted.Planted]) -> None:
    p = make(features=7, examples=5)
    m, field = SingleDeletion(fill=given(p.baseline)), ap.Field(p.model)
    right = m(field, p.x, p.truth)
    torch.testing.assert_close(right.values, torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(right.parts["falls"], p.truth)
    torch.testing.assert_close(m(field, p.x, -p.truth).values, -torch.ones(5, dtype=torch.float64))
    assert bool((m(field, p.x, p.truth.roll(3, 1)).values < 0.9).all())
    assert right.cost.forward.tolist() == [8] * 5


def test_single_deletion_agrees_with_the_definition_written_out() -> None:
    """16 cells, one deleted at a time and put back; the fall of the logit; scipy's rank correlation."""
    net, x = network(), pictures(2, 14)
    normalize, saliency = ap.Normalize((0.5, 0.4, 0.3), (0.2, 0.25, 0.3)), maps(x)
    found = SingleDeletion()(ap.Field(net, normalize=normalize), x, saliency)
    edges = [0, 4, 7, 11, 14]
    for b in range(2):
        z = normalize(x)[b]
        target = int(net(z[None]).argmax())
        told, fall = [], []
        for i, j in itertools.product(range(4), repeat=2):
            cell = slice(edges[i], edges[i + 1]), slice(edges[j], edges[j + 1])
            without = z.clone()
            without[:, cell[0], cell[1]] = 0
            told.append(float(saliency[b][cell].sum()))
            fall.append(float(net(z[None])[0, target] - net(without[None])[0, target]))
        assert found.parts["falls"][b].tolist() == pytest.approx(fall, abs=1e-12)
        assert float(found.values[b]) == pytest.approx(stats.spearmanr(told, fall)[0], abs=1e-12)


def test_cells_without_an_effect_have_no_correlation() -> None:
    x = pictures(2)
    constant = SingleDeletion()(ap.Field(lambda x: 0 * x.flatten(1).sum(1)), x, maps(x))
    assert bool(constant.values.isnan().all())
    assert list(constant.undefined) == ["deletions that all have one effect"]
    flat = SingleDeletion()(ap.Field(network()), x, torch.ones_like(maps(x)))
    assert list(flat.undefined) == ["cells that all have one value"]


@pytest.mark.parametrize("make", [DeletionAUC, MoRF, SingleDeletion])
def test_examples_with_more_and_fewer_players_are_joined(make: Any) -> None:
    p = linear(features=6, examples=2)
    options: dict[str, Any] = {"fill": DeletionAUC.fill, "score": Z}
    groups = [ap.groups.Labels(torch.tensor([each])) for each in ([0, 1, 2, 3, 4, 5], [0, 0, 1, 1, 2, -1])]
    one, other = (
        make(groups=g, **options)(ap.Field(p.model), p.x[i : i + 1], p.truth[i : i + 1]) for i, g in enumerate(groups)
    )
    joined = Scores.join([one, dataclasses.replace(other, metric=one.metric)])
    both = make(groups=ap.groups.Labels(torch.cat([g.value for g in groups])), **options)(
        ap.Field(p.model), p.x, p.truth
    )
    torch.testing.assert_close(joined.values, both.values)
    for name, curve in both.curves.items():
        torch.testing.assert_close(joined.curves[name].y, curve.y, equal_nan=True)
    for name, part in both.parts.items():
        torch.testing.assert_close(joined.parts[name], part, equal_nan=True)
