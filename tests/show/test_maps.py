"""Maps: the colours are exact, symmetric, and say what they stand for."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import apportion as ap
from apportion.core.errors import ConfigError, InputError, NonFiniteError
from apportion.show import maps
from apportion.show.maps import GREY, ORANGE_PURPLE, RED_BLUE, Colors, paint

RAISES, LOWERS, WHITE = [165, 8, 32], [10, 62, 140], [255, 255, 255]


def gradient(channels: int = 3, size: int = 4) -> ap.Attribution:
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(channels * size * size, 2))
    return ap.Gradient()(ap.Field(net), torch.rand(1, channels, size, size), target=0)


def test_exact_colours_at_zero_and_at_the_scale() -> None:
    painted = paint(torch.tensor([[-2.0, 0.0, 2.0]]), percentile=100)
    assert painted.rgb.tolist() == [[LOWERS, WHITE, RAISES]]
    assert painted.scale == 2.0
    assert painted.beyond == 0


def test_red_raises_and_blue_lowers() -> None:
    low, zero, high = paint(torch.tensor([[-1.0, 0.0, 1.0]])).rgb[0].astype(int)
    assert high[0] > high[2] + 100
    assert low[2] > low[0] + 100
    assert zero.tolist() == WHITE


def test_values_beyond_the_scale_are_counted_and_drawn_in_full_colour() -> None:
    values = torch.cat([torch.linspace(-1, 1, 99), torch.tensor([50.0])])[None]
    painted = paint(values, percentile=99)
    assert painted.scale == 1.0
    assert painted.beyond == pytest.approx(0.01)
    assert painted.rgb[0, -1].tolist() == painted.rgb[0, -2].tolist() == RAISES
    assert "99th percentile" in painted.note
    assert "1.0%" in painted.note


@pytest.mark.parametrize("colors", [RED_BLUE, ORANGE_PURPLE, GREY])
def test_negated_values_swap_the_sides(colors: Colors) -> None:
    values = torch.randn(9, 7)
    one, other = paint(values, colors=colors), paint(-values, colors=colors)
    assert one.scale == other.scale
    assert np.array_equal(np.abs(one.levels), np.abs(other.levels))
    assert np.array_equal(one.levels, -other.levels) == colors.signed


@pytest.mark.parametrize("colors", [RED_BLUE, ORANGE_PURPLE])
def test_both_sides_darken_steadily(colors: Colors) -> None:
    light = colors.palette() @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(light[:128]) >= -0.5).all()
    assert (np.diff(light[127:]) <= 0.5).all()
    assert light[127] == pytest.approx(255)


def test_grey_is_brighter_where_the_magnitude_is_larger() -> None:
    painted = paint(torch.tensor([[-4.0, 0.0, 2.0, 4.0]]), colors=GREY)
    assert painted.rgb[0, :, 0].tolist() == [255, 0, 129, 255]


@pytest.mark.parametrize("shape", [(1, 1), (5, 3)])
def test_zeros_are_white_without_nan(shape: tuple[int, int]) -> None:
    painted = paint(torch.zeros(shape))
    assert (painted.rgb == 255).all()
    assert painted.scale == 0
    assert painted.note == "all values are 0"


@pytest.mark.parametrize("value", [1e-45, -1e-30, 1.0, -3e38])
def test_one_pixel_and_constants_have_the_full_colour(value: float) -> None:
    painted = paint(torch.full((2, 2), value))
    assert (painted.rgb == (RAISES if value > 0 else LOWERS)).all()


def test_a_single_pixel_among_zeros_is_seen() -> None:
    values = torch.zeros(100, 100)
    values[3, 4] = -5.0
    painted = paint(values)
    assert painted.scale == 5.0
    assert painted.rgb[3, 4].tolist() == LOWERS


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=40), st.floats(0, 100, exclude_min=True, allow_nan=False)
)
def test_any_finite_map_is_painted(numbers: list[float], percentile: float) -> None:
    values = torch.tensor([numbers], dtype=torch.float64)
    painted = paint(values, percentile=percentile)
    assert np.isfinite(painted.scale)
    assert painted.scale in values.abs()
    assert 0 <= painted.beyond < 1
    assert painted.rgb.shape == (1, len(numbers), 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(NonFiniteError, match="1 of 2"):
        paint(torch.tensor([[0.0, bad]]))


@pytest.mark.parametrize("percentile", [0, -1, 101, float("nan")])
def test_other_percentiles_are_refused(percentile: float) -> None:
    with pytest.raises(ConfigError, match="percentile"):
        paint(torch.ones(1, 1), percentile=percentile)


def test_the_image_holds_the_same_pixels() -> None:
    painted = paint(torch.randn(6, 5))
    again = Image.open(io.BytesIO(maps.png(painted.image())))
    assert again.mode == "P"
    assert np.array_equal(np.asarray(again.convert("RGB")), painted.rgb)


def test_overlay_runs_from_the_picture_to_the_map() -> None:
    picture, painted = torch.rand(3, 4, 5), paint(torch.randn(4, 5))
    assert np.array_equal(maps.overlay(painted, picture, 0), maps.to_rgb(picture))
    assert np.array_equal(maps.overlay(painted, picture, 1), painted.rgb)
    half = maps.overlay(painted, picture, 0.5).astype(float)
    assert np.abs(half - (maps.to_rgb(picture).astype(float) + painted.rgb) / 2).max() <= 0.5


@pytest.mark.parametrize("opacity", [-0.1, 1.1, float("nan")])
def test_other_opacities_are_refused(opacity: float) -> None:
    with pytest.raises(InputError, match="opacity"):
        maps.overlay(paint(torch.ones(1, 1)), torch.ones(3, 1, 1), opacity)


@pytest.mark.parametrize("picture", [torch.full((3, 2, 2), 1.5), torch.full((3, 2, 2), float("nan"))])
def test_pictures_out_of_range_are_refused(picture: torch.Tensor) -> None:
    with pytest.raises(InputError, match=r"\[0, 1\]"):
        maps.to_rgb(picture)


def test_an_input_map_is_the_sum_over_channels() -> None:
    a = gradient()
    assert torch.equal(maps.picture_map(a), a.values[0].sum(0))
    with pytest.raises(InputError, match="picture that was explained"):
        maps.picture_map(a, size=(8, 8))
    with pytest.raises(InputError, match="example 1 of 1"):
        maps.picture_map(a, 1)


def test_a_site_map_is_enlarged() -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    a = ap.GradCAM(relu=False)(ap.Field(net), torch.rand(1, 1, 5, 5), target=0)
    assert maps.picture_map(a).shape == (3, 3)
    assert torch.equal(maps.picture_map(a, size=(9, 6)), a.resize((9, 6)).values[0, 0])


def test_the_reader_is_told_when_the_sign_is_gone() -> None:
    assert maps.remarks(gradient()) == []
    fine = ap.FullGradSaliency()(ap.Field(torch.nn.Conv2d(1, 1, 3), lambda y: y.sum((1, 2, 3))), torch.rand(1, 1, 6, 6))
    assert "own grid, 6 × 6" in maps.remarks(fine)[0]
    assert not any("grid" in said for said in maps.remarks(fine, (6, 6)))  # as fine as the picture
    assert "sign was taken off" in maps.remarks(gradient().abs())[0]
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3, 1))
    spread = ap.VarGrad(base=ap.Gradient(), samples=2)(ap.Field(net, bounds=(0, 1)), torch.full((1, 3, 1, 1), 0.5))
    assert "no direction" in maps.remarks(spread)[0]


def test_values_that_are_no_map_say_so() -> None:
    a = gradient()
    with pytest.raises(InputError, match="domain 'groups'"):
        maps.picture_map(dataclasses.replace(a.pool(ap.groups.Pixels()), groups=None))
    with pytest.raises(InputError, match="single input"):
        maps.picture_map(dataclasses.replace(a, values=(a.values, a.values)))
    flat = ap.Gradient()(ap.Field(torch.nn.Linear(2, 1)), torch.zeros(1, 2))
    with pytest.raises(InputError, match=r"\[B, C, H, W\]"):
        maps.picture_map(flat)


def test_every_pixel_shows_the_value_of_its_group() -> None:
    x = torch.rand(2, 3, 4, 6)
    field = ap.Field(lambda x: x.flatten(1).sum(1))
    pooled = ap.GradientTimesInput()(field, x).pool(ap.groups.Squares(2))
    for b in range(2):
        drawn = maps.picture_map(pooled, b)
        assert drawn.shape == (4, 6)
        assert torch.allclose(drawn[2:, 4:], pooled.values[b, 5].expand(2, 2))
    spread = pooled.spread()  # a value per position, in every channel; a share of it is each element's own
    assert torch.allclose(maps.picture_map(spread), maps.picture_map(pooled))
    assert torch.allclose(maps.picture_map(pooled.spread(share=True)) * 4, maps.picture_map(pooled))
    assert torch.equal(maps.picture_map(spread.channel_sum()), spread.values[0].sum(0))
    assert "up to 6 groups" in maps.remarks(pooled)[0]
    pooled.show(x)
    with pytest.raises(InputError, match="for a picture of"):
        maps.picture_map(pooled, size=(8, 8))
    rows = ap.Gradient()(ap.Field(torch.nn.Linear(4, 1)), torch.zeros(1, 4)).pool(ap.groups.Columns((2, 2)))
    with pytest.raises(InputError, match="domain 'groups'"):
        maps.picture_map(rows)


@pytest.mark.parametrize("stops", [(), ((256, 0, 0),), ((-1, 0, 0),)])
def test_colours_are_checked(stops: tuple[tuple[int, int, int], ...]) -> None:
    with pytest.raises(ConfigError, match="colours of three integers"):
        Colors(zero=(0, 0, 0), raises=stops, lowers=((1, 1, 1),), meaning="")


def test_direction_is_that_of_the_method_as_it_was_set() -> None:
    field = ap.Field(lambda x: x.mean((1, 2, 3)))
    plain, centred = (ap.RISE(budget=8, centred=c)(field, torch.ones(1, 3, 8, 8)) for c in (False, True))
    assert any("no direction" in said for said in maps.remarks(plain))
    assert not any("no direction" in said for said in maps.remarks(centred))
