"""Localization: exact answers, slow twins, and the defects of other libraries."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import apportion as ap
from apportion.core.errors import ConfigError, InputError
from apportion.metrics import (
    EnergyPointingGame,
    ExtendedPointingGame,
    FineGrainedRecognition,
    GridPointingGame,
    PointingGame,
    Region,
    RelevanceRank,
    TopKIntersection,
    WeaklySupervisedLocalization,
)
from apportion.metrics.localization.boxes import largest_component, overlap

FIELD = ap.Field(lambda x: x.sum((1, 2, 3)))
TABLE = ap.Field(lambda x: x.sum(1))
X = torch.zeros(4, 3, 20, 30, dtype=torch.float64)


def some(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def one_hot(row: int, column: int, shape: tuple[int, int] = (20, 30)) -> Tensor:
    m = torch.zeros(1, 1, *shape)
    m[0, 0, row, column] = 1
    return m


def squares() -> Tensor:
    mask = torch.zeros(4, 20, 30, dtype=torch.bool)
    for i in range(4):
        mask[i, 2 + 3 * i : 6 + 3 * i, 5 : 12 + i] = True
    return mask


def ask(metric: Any, m: Tensor, truth: Any, **given: Any) -> Any:
    return metric(FIELD, X[: len(m)], m, truth=truth, **given)


# -- regions ----------------------------------------------------------------------------------------


def test_regions_from_masks_boxes_and_polygons_are_one() -> None:
    mask = torch.zeros(20, 30, dtype=torch.bool)
    mask[3:7, 4:10] = True
    box = Region.of_boxes([(4, 3, 10, 7)], (20, 30))
    polygon = Region.of_polygons([[(4, 3), (10, 3), (10, 7), (4, 7)]], (20, 30))
    for region in (Region.of_mask(mask), Region.of_mask(mask[None].int()), box, polygon):
        assert torch.equal(region.mask, mask)
        assert region.boxes == ((4, 3, 10, 7),)
    hole = Region.of_polygons([[(0, 0), (20, 0), (20, 20), (0, 20)], [(5, 5), (9, 5), (9, 9), (5, 9)]], (20, 30))
    assert int(hole.mask.sum()) == 400  # instances add up; a hole has to be in one polygon


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Region.of_boxes([(4, 3, 4, 7)], (20, 30)), "left < right"),
        (lambda: Region.of_polygons([[(4, 3), (4, 7)]], (20, 30)), "polygon"),
        (lambda: Region.of_mask(torch.rand(20, 30)), "0 and 1"),
        (lambda: Region.of_mask(torch.ones(2, 20, 30)), "mask of shape"),
        (lambda: Region.of_mask("cat"), "array"),
        (lambda: ask(PointingGame(), some(2, 3, 20, 30), squares()[:1]), r"1 truth\(s\) for 2"),
        (lambda: ask(PointingGame(), some(1, 3, 20, 30), [torch.ones(5, 5)]), "5, 5"),
        (lambda: ask(PointingGame(), some(1, 3, 20, 30), None), "no truth"),
        (
            lambda: PointingGame()(ap.Field(lambda x: x.sum(1)), torch.ones(1, 4), torch.ones(1, 4), truth=[1]),
            "pictures",
        ),
        (lambda: ask(GridPointingGame(7), some(1, 3, 20, 30), [0]), "cells of one size"),
        (lambda: ask(GridPointingGame(2), some(1, 3, 20, 30), [4]), "from 0 to 3"),
        (lambda: ask(TopKIntersection(601), some(1, 3, 20, 30), squares()[:1]), "k=601"),
        (lambda: TopKIntersection(1.5), r"k=1\.5"),
        (lambda: WeaklySupervisedLocalization(1.0), "threshold"),
    ],
)
def test_what_is_no_truth(make: Any, says: str) -> None:
    with pytest.raises((ConfigError, InputError), match=says):
        make()


# -- the pointing game ------------------------------------------------------------------------------


def test_the_tolerance_is_in_pixels_of_the_original() -> None:
    """Hit if closer than 15 pixels, strictly; Region.scale says how many pixels of the original one is."""
    mask = torch.zeros(20, 30, dtype=torch.bool)
    mask[:, 0] = True
    for column, scale, hit in ((14, 1.0, 1), (15, 1.0, 0), (7, 2.0, 1), (8, 2.0, 0)):
        region = Region.of_mask(mask, scale=(scale, scale))
        assert ask(PointingGame(), one_hot(3, column), [region]).values.item() == hit
    flat = Region.of_mask(mask, scale=(1.0, 9.0))  # down, across
    assert ask(PointingGame(), one_hot(3, 2), [flat]).values.item() == 0
    assert ask(PointingGame(tolerance=0), one_hot(3, 1), [mask]).values.item() == 0


def test_ties_empty_masks_and_maps_of_zeros_are_no_hits() -> None:
    """Quantus scores an empty mask and a map of zeros as a hit, and any of several maxima."""
    mask = squares()[:1]
    zero = ask(PointingGame(tolerance=0), torch.zeros(1, 1, 20, 30), mask)
    assert zero.values.item() == pytest.approx(float(mask.double().mean()))
    assert zero.parts["tied"].item() == 600
    none = ask(PointingGame(), one_hot(3, 3), [torch.zeros(20, 30, dtype=torch.bool)])
    assert none.undefined["no object"].all()
    two = one_hot(3, 6) + one_hot(19, 29)
    assert ask(PointingGame(tolerance=0), two, mask).values.item() == 0.5


def test_the_pointing_game_point_by_point() -> None:
    maps, mask = some(4, 3, 20, 30), squares()
    found = ask(PointingGame(tolerance=4), maps, mask).values
    for i in range(4):
        summed = maps[i].sum(0)
        row, column = divmod(int(summed.argmax()), 30)
        near = any((row - a) ** 2 + (column - b) ** 2 < 16 for a, b in mask[i].nonzero().tolist())
        assert bool(found[i]) == near
    blurred = ask(PointingGame(tolerance=0, smooth=0.05), 5 * one_hot(0, 29) + 4 * mask[:1, None], mask[:1])
    assert blurred.values.item() == 1  # the object outweighs a single bright pixel


def test_only_examples_of_the_right_class_count_by_option() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(1800, 5)).eval()
    x = torch.rand(4, 3, 20, 30, generator=torch.Generator().manual_seed(2))
    top = net(x).argmax(1)
    other = (top + torch.tensor([0, 1, 0, 1])) % 5
    field, maps = ap.Field(net), some(4, 3, 20, 30).float()
    asked = {"truth": squares(), "target": other}
    found = PointingGame(top=1)(field, x, maps, **asked)
    assert found.undefined["not in the top 1"].tolist() == [False, True, False, True]
    assert not PointingGame(top=5)(field, x, maps, **asked).undefined
    with pytest.raises(InputError, match="top 6"):
        PointingGame(top=6)(field, x, maps, **asked)


def test_extended_pointing_by_its_definition() -> None:
    maps, mask = some(4, 1, 20, 30), squares()
    found = ask(ExtendedPointingGame(levels=10), maps, mask)
    for i in range(4):
        pixels = sorted(((v, p) for p, v in enumerate(maps[i].flatten().tolist()) if v > 0), reverse=True)
        total = sum(v for v, _ in pixels)
        shares = []
        for level in range(1, 11):
            taken, energy = 0, 0.0
            while energy < total * level / 10 * (1 - 1e-12):
                energy += pixels[taken][0]
                taken += 1
            shares.append(sum(bool(mask[i].flatten()[p]) for _, p in pixels[:taken]) / taken)
        assert found.curves["share on the object"].y[i].tolist() == pytest.approx(shares)
        assert found.values[i].item() == pytest.approx(sum(shares) / 10)
    assert ask(ExtendedPointingGame(), -mask[:, None].double(), mask).undefined["a map without a positive value"].all()


# -- mass -------------------------------------------------------------------------------------------


def test_mass_inside_by_hand_and_with_other_signs() -> None:
    """Relevance mass by signed sums is 3 here, beyond 1, where positive parts give .6."""
    mask = torch.zeros(1, 20, 30, dtype=torch.bool)
    mask[0, 0, :2] = True
    m = 3 * one_hot(0, 0) - one_hot(0, 1) + 2 * one_hot(5, 5) - 4 * one_hot(6, 6)
    assert ask(EnergyPointingGame(), m, mask).values.item() == pytest.approx(0.6)
    assert ask(EnergyPointingGame("absolute"), m, mask).values.item() == pytest.approx(0.4)
    assert ask(EnergyPointingGame(), -m.abs(), mask).undefined
    assert ask(EnergyPointingGame(), m, ~mask).values.item() == pytest.approx(0.4)


def test_ranks_inside_by_hand() -> None:
    mask = squares()
    maps = some(4, 1, 20, 30)
    for i in range(4):
        first = maps[i].flatten().argsort(descending=True)
        inside = mask[i].flatten()[first]
        size = int(mask[i].sum())
        here = maps[i : i + 1], mask[i : i + 1]
        assert ask(RelevanceRank(), *here).values.item() == pytest.approx(float(inside[:size].double().mean()))
        assert ask(TopKIntersection(50), *here).values.item() == pytest.approx(float(inside[:50].double().mean()))
        by_size = ask(TopKIntersection(200, reachable=True), *here).values.item()
        assert by_size == pytest.approx(float(inside[:200].sum()) / size)


def test_the_right_map_wins_and_the_wrong_one_loses() -> None:
    mask = squares()
    right, wrong = mask[:, None].double() + 0.01 * some(4, 1, 20, 30), 1 - mask[:, None].double()
    metrics = [
        PointingGame(tolerance=2),
        ExtendedPointingGame(),
        EnergyPointingGame(),
        RelevanceRank(),
        TopKIntersection(20),
        WeaklySupervisedLocalization(),
    ]
    for metric in metrics:
        good, bad = ask(metric, right, mask).values, ask(metric, wrong, mask).values
        assert bool((good > bad).all()), metric


def test_heads_that_see_one_cell_each() -> None:
    """DiFull: gradients of a head that sees one cell lie in that cell, whatever its weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        cell = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1)
        ).eval()
    corners = [(slice(0, 10), slice(0, 15)), (slice(0, 10), slice(15, 30)), (slice(10, 20), slice(0, 15))]
    corners.append((slice(10, 20), slice(15, 30)))
    field = ap.Field(lambda x: torch.cat([cell(x[..., a, b]) for a, b in corners], 1))
    x = torch.rand(4, 3, 20, 30, generator=torch.Generator().manual_seed(3))
    truth = [0, 1, 2, 3]
    for method in (ap.Gradient(), ap.IntegratedGradients(), ap.Occlusion(groups=ap.groups.Squares(5))):
        maps = method(field, x, target=truth)
        spread = maps.spread().values if maps.groups is not None else maps.values
        found = GridPointingGame()(field, x, spread.abs(), truth=truth, target=truth).values
        assert found.tolist() == [1.0] * 4
    chance = GridPointingGame()(field, x, ap.controls.Random(), truth=truth, target=truth).values
    assert bool(((chance > 0.1) & (chance < 0.4)).all())


# -- boxes ------------------------------------------------------------------------------------------


def test_the_box_of_the_largest_component() -> None:
    m = torch.zeros(1, 1, 20, 30)
    m[0, 0, 2:6, 5:12] = 1.0
    m[0, 0, 15, 20:29] = 1.5  # higher, and smaller
    m[0, 0, 10, 0] = 0.3  # at the threshold of .2 · 1.5, not above it
    found = ask(WeaklySupervisedLocalization(), m, squares()[:1])
    assert found.parts["box"][0].tolist() == [5, 2, 12, 6]
    assert found.values.item() == found.parts["overlap"].item() == 1
    shifted = Region.of_boxes([(5, 4, 12, 8), (0, 0, 1, 1)], (20, 30))
    far = ask(WeaklySupervisedLocalization(), m, [shifted])
    assert far.parts["overlap"].item() == pytest.approx(1 / 3)
    assert far.values.item() == 0
    everything = Region.of_boxes([(0, 0, 30, 15)], (20, 30))
    assert ask(WeaklySupervisedLocalization(), m, [everything]).parts["whole"].item() == 1


def test_overlaps_and_components() -> None:
    assert overlap((0, 0, 4, 4), (4, 0, 8, 4)) == 0
    assert overlap((0, 0, 4, 4), (0, 0, 4, 4)) == 1
    diagonal = torch.eye(3, dtype=torch.bool)
    assert torch.equal(largest_component(diagonal), diagonal)  # corners connect
    assert not largest_component(torch.zeros(2, 2, dtype=torch.bool)).any()


def test_a_crop_is_the_resized_box() -> None:
    picture = torch.arange(36.0).reshape(1, 1, 6, 6)
    seen: list[Tensor] = []

    def net(x: Tensor) -> Tensor:
        seen.append(x)
        return x.mean((1, 2, 3))

    m = torch.zeros(1, 1, 6, 6)
    m[0, 0, 2:4, 2:4] = 1
    found = FineGrainedRecognition(score=ap.Logit())(ap.Field(net), picture, m)
    crop = next(x for x in reversed(seen) if len(x) == 2)[0]
    want = nn.functional.interpolate(picture[..., 2:4, 2:4], (6, 6), mode="bilinear")
    torch.testing.assert_close(crop[None], want)
    assert found.parts["area"].item() == pytest.approx(4 / 36)
    wide = FineGrainedRecognition(margin=0.5, score=ap.Logit())(ap.Field(net), picture, m)
    assert wide.parts["area"].item() == pytest.approx(16 / 36)


def test_categories_count_alike() -> None:
    """The pointing game averages over examples of a category first; difficult ones alone by a mask."""
    mask = squares()
    found = ask(PointingGame(tolerance=0), torch.cat([one_hot(3, 6), *[one_hot(0, 0)] * 3]), mask)
    found = replace(found, ids=(0, 1, 2, 3))  # the pictures are one
    (mean, low, high), each = ap.metrics.by_category(found, ["cat", "cat", "dog", "owl"])
    assert 0 == low < mean < high <= 1
    assert found.values.tolist() == [1, 0, 0, 0]
    assert mean == pytest.approx(1 / 6)
    assert {k: v.mean for k, v in each.items()} == {"cat": 0.5, "dog": 0.0, "owl": 0.0}
    (mean, *_), each = ap.metrics.by_category(
        found, ["cat", "cat", "dog", "owl"], where=torch.tensor([1, 0, 1, 0]).bool()
    )
    assert mean == pytest.approx(1 / 2)
    with pytest.raises(InputError, match="3 categories"):
        ap.metrics.by_category(found, ["cat"] * 3)


def test_maps_without_a_positive_value_count_as_in_the_sources() -> None:
    """0 in the grid pointing game, an error for boxes; undefined by option."""
    maps = torch.cat([squares()[:1, None].double(), torch.zeros(2, 1, 20, 30).double(), -squares()[3:, None].double()])
    truth = squares()
    for metric, given in ((GridPointingGame(), [0, 1, 2, 3]), (WeaklySupervisedLocalization(), truth)):
        found = ask(metric, maps, given)
        assert found.values[1:].tolist() == [0.0] * 3
        assert found.values[0] > 0
        assert found.parts["empty"].tolist() == [False, True, True, True]
        assert not found.undefined
        asked = ask(replace(metric, empty=None), maps, given)
        assert asked.values.isnan().tolist() == [False, True, True, True]
        assert len(asked.undefined) == 1
    assert 1 - ask(WeaklySupervisedLocalization(), maps, truth).summary().mean == pytest.approx(0.75)


# -- options, parts and defaults --------------------------------------------------------------------


def test_empty_masks_have_no_value() -> None:
    """Neither a hit nor a miss, whatever the map."""
    none = torch.zeros(1, 20, 30, dtype=torch.bool)
    metrics = [
        PointingGame(),
        PointingGame(tolerance=0),
        ExtendedPointingGame(),
        EnergyPointingGame(),
        EnergyPointingGame("absolute"),
        RelevanceRank(),
        TopKIntersection(20),
        TopKIntersection(20, reachable=True),
        WeaklySupervisedLocalization(),
    ]
    for metric in metrics:
        for m in (some(1, 1, 20, 30), torch.ones(1, 1, 20, 30)):
            found = ask(metric, m, none)
            assert found.values.isnan().all(), metric
            assert found.undefined["no object"].tolist() == [True]


def test_boxes_count_for_targets_among_the_highest_outputs() -> None:
    """1 less the mean is the top-1 or top-5 error: a right box of a wrong class is an error."""
    head = nn.Linear(1800, 5)
    nn.init.zeros_(head.weight)
    with torch.no_grad():
        head.bias.copy_(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]))
    net, mask = nn.Sequential(nn.Flatten(), head).eval(), squares()
    asked: dict[str, Any] = {"truth": mask, "target": torch.tensor([0, 1, 2, 4])}
    x = X.float()
    for top, right in ((None, [1, 1, 1, 1]), (1, [1, 0, 0, 0]), (3, [1, 1, 1, 0])):
        found = WeaklySupervisedLocalization(top=top)(ap.Field(net), x, mask[:, None].float(), **asked)
        assert found.values.tolist() == right


def test_difficult_examples_are_marked() -> None:
    made = [Region.of_mask(one, difficult=i % 2 == 1) for i, one in enumerate(squares())]
    found = ask(PointingGame(tolerance=0), torch.cat([one_hot(3, 6)] * 4), made)
    assert found.parts["difficult"].tolist() == [False, True, False, True]
    (mean, *_), each = ap.metrics.by_category(found, ["cat"] * 4, where=found.parts["difficult"])
    assert each["cat"].n == 2
    assert mean == pytest.approx(float(found.values[1::2].mean()))


def test_the_box_holds_what_is_above_a_fifth() -> None:
    """The default for CAM; .15 of the maximum would take in the rim of .19, and .5 lose that of .21."""
    m = torch.zeros(1, 1, 20, 30)
    m[0, 0, 4:16, 4:16] = 0.19
    m[0, 0, 6:14, 6:14] = 0.21
    m[0, 0, 9:11, 9:11] = 1.0
    truth = squares()[:1]
    assert ask(WeaklySupervisedLocalization(), m, truth).parts["box"][0].tolist() == [6, 6, 14, 14]
    assert ask(WeaklySupervisedLocalization(0.15), m, truth).parts["box"][0].tolist() == [4, 4, 16, 16]


def test_crops_are_scored_not_pictures() -> None:
    picture = torch.zeros(2, 1, 6, 6)
    picture[:, 0, 2:4, 2:4] = torch.tensor([8.0, 4.0])[:, None, None]
    found = FineGrainedRecognition(score=ap.Logit())(ap.Field(lambda x: x.mean((1, 2, 3))), picture, picture)
    assert found.values.tolist() == [8, 4]
    torch.testing.assert_close(found.parts["uncropped"], torch.tensor([8.0, 4.0]) * 4 / 36)
    wrong = FineGrainedRecognition(score=ap.Logit())(ap.Field(lambda x: x.mean((1, 2, 3))), picture, 8 - picture)
    assert bool((wrong.values < found.values).all())


@pytest.mark.parametrize("cell", [0, 3])
def test_heads_of_one_cell_by_signed_maps(cell: int) -> None:
    """DiFull by the metric itself: exactly 1 with positive parts only, and near chance for a joint Grad-CAM."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), *pool)
    p = ap.planted.di_full(nn.Sequential(*net, nn.Linear(6, 3)).eval(), ap.planted.noise_cells((3, 12, 12)), cell)
    field, asked = ap.Field(p.model), {"truth": [cell] * len(p.x), "target": p.target}
    occlusion = ap.Occlusion(ap.groups.Patches(4, 4))
    for method in (ap.Gradient(), ap.GradientTimesInput(), ap.GuidedBackprop(), occlusion):
        found = GridPointingGame()(field, p.x, method, **asked)
        some_mass = ~found.parts["empty"]  # covering noise may only ever raise a score
        assert some_mass.any()
        assert (found.values[some_mass] == 1).all(), method
    signed = ap.Gradient()(field, p.x, target=p.target).values.sum(1, keepdim=True)
    outside = torch.where(p.truth[:, None], signed, -1.0)  # negative mass elsewhere counts for nothing
    assert GridPointingGame()(field, p.x, outside, **asked).values.tolist() == [1.0] * len(p.x)
    assert p.joint is not None
    small = ap.GradCAM(p.joint)(field, p.x, target=p.target).values
    large = nn.functional.interpolate(small.reshape(len(p.x), 1, *small.shape[-2:]), p.x.shape[2:])
    assert bool((GridPointingGame()(field, p.x, large, **asked).values < 0.6).all())
