"""What is shown of a picture: shares of energy on objects, and points that methods used or found."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import apportion as ap
from apportion.core.errors import InputError
from apportion.show.page import Inside, Marked, Page, Panel, in_words, inside, pictures_of, points, share


def attribution(values: torch.Tensor, **changes: Any) -> ap.Attribution:
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(values[0].numel(), 1))
    made = ap.Gradient()(ap.Field(net), torch.zeros_like(values))
    return replace(made, values=values, **changes)


def test_squares_are_summed_over_channels() -> None:
    values = torch.zeros(1, 3, 2, 2)
    values[0, :, 0, 0] = torch.tensor([1.0, -1.0, 2.0])  # 6, not 2 squared
    values[0, :, 1, 1] = torch.tensor([1.0, -1.0, 0.0])  # does not cancel
    values[0, 0, 1, 0] = -4.0
    found = inside(attribution(values), Marked("left top", (0, 0, 1, 1), torch.eye(2).bool()), (2, 2))
    assert found == Inside("left top", 6 / 24, 1 / 4, 8 / 24, 2 / 4)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_any_magnitude_has_shares(size: float) -> None:
    values = torch.zeros(1, 3, 2, 2)
    values[0, 0] = size
    assert inside(attribution(values), Marked("half", (0, 0, 1, 2)), (2, 2)).box == 0.5


def test_a_map_of_zeros_has_no_share() -> None:
    found = inside(attribution(torch.zeros(1, 3, 2, 2)), Marked("half", (0, 0, 1, 2)), (2, 2))
    assert (found.box, found.box_area) == (None, 0.5)
    assert in_words(found) == "half: a map of zeros has no energy"
    assert share(found.box, found.box_area) == ""


@pytest.mark.parametrize("box", [(0, 0, 3, 2), (1, 0, 1, 2), (-1, 0, 1, 1), (0, 1, 1, 0)])
def test_boxes_lie_on_the_picture(box: tuple[int, int, int, int]) -> None:
    with pytest.raises(InputError, match="inside the picture"):
        Page("p", torch.zeros(3, 2, 2), (), "t", (), (), (Marked("thing", box),))
    with pytest.raises(InputError, match="a mask of its size"):
        Page("p", torch.zeros(3, 2, 2), (), "t", (), (), (Marked("thing", (0, 0, 1, 1), torch.ones(3, 3).bool()),))


def test_the_smallest_box_tells_most() -> None:
    marked = (Marked("all", (0, 0, 2, 2)), Marked("corner", (1, 1, 2, 2)), Marked("row", (0, 0, 2, 1)))
    assert Page("p", torch.zeros(3, 2, 2), (), "t", (), (), marked).telling is marked[1]
    assert Page("p", torch.zeros(3, 2, 2), (), "t", ()).telling is None


PICTURE = torch.full((3, 2, 2), 0.5)


@pytest.mark.parametrize(
    ("name", "part", "drawn"),
    [
        ("boundary_point", PICTURE[None], ["boundary point"]),
        ("counterfactuals", PICTURE.expand(1, 2, 3, 2, 2), ["counterfactuals 1 of 2", "counterfactuals 2 of 2"]),
        ("picture", PICTURE.expand(1, 1, 3, 2, 2), ["picture"]),
        ("points", PICTURE.expand(1, 9, 3, 2, 2), ["points 1 of 9", "points 2 of 9"]),
        ("adversarial", PICTURE[None], ["adversarial"]),
        ("boundary", PICTURE[None], ["boundary"]),
        ("standard_error", PICTURE[None], []),  # a map, of the same shape
        ("per_baseline", PICTURE.expand(1, 2, 3, 2, 2), []),
        ("midpoints", torch.zeros(1, 3, 2, 2), []),
        ("point", torch.zeros(1, 3, 4, 4), []),  # of another size
        ("point", (torch.zeros(1, 3, 2, 2),), []),  # of several inputs
        ("points", torch.zeros(1), []),
    ],
)
def test_points_are_told_from_maps_by_their_names(name: str, part: Any, drawn: list[str]) -> None:
    made = attribution(torch.zeros(1, 3, 2, 2), parts={name: part})
    assert [n for n, _ in points(made, (3, 2, 2))] == drawn


def test_points_are_drawn_once_and_clipped_with_a_word() -> None:
    outside = torch.full((1, 3, 2, 2), 1.5)
    made = attribution(torch.zeros(1, 3, 2, 2), parts={"point": outside})
    nan = attribution(torch.zeros(1, 3, 2, 2), parts={"point": outside * float("nan")})
    panels = [Panel(title, a, 0.0) for title, a in (("A", made), ("B: top class", made), ("C", nan))]
    ((name, one),) = pictures_of(panels, (3, 2, 2))
    assert name == "point of A, B, 1.5 to 1.5, clipped to 0 to 1"
    assert one.eq(1).all()
