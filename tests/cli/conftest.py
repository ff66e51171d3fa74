"""A stranger's model in a file of its own, small pictures, and the command in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from apportion.cli import main

MODEL = """
import torch

def make():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
        torch.nn.Linear(4, 5),
    )

def flat():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 3))

def number():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 1))

def halves():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 3))
    sign = torch.ones(16, 16)
    sign[:, 8:] = -1
    with torch.no_grad():
        net[1].weight.copy_(sign.expand(3, 3, 16, 16).reshape(3, -1) * torch.tensor([[1.0], [0.5], [0.25]]))
        net[1].bias.zero_()
    return net

def half():
    return make().half()

def grid():
    return torch.nn.Conv2d(3, 4, 3)

class Stops(torch.nn.Module):
    calls = 0
    def forward(self, x):
        Stops.calls += 1
        if Stops.calls > 24:
            raise KeyboardInterrupt
        return x.mean((2, 3))

def named():
    from apportion.adapters.image import CenterCrop
    from apportion.adapters.zoo import PictureModel
    import apportion as ap
    names = ("cat", "dog", "missile", "missile", "<b>cup</b>")
    return PictureModel("named", make().eval(), CenterCrop(16), ap.Normalize((0.5,) * 3, (0.5,) * 3), names)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with a model and two pictures, in which the commands run."""
    from PIL import Image

    (tmp_path / "stranger.py").write_text(MODEL)
    draw = np.random.default_rng(0)
    for name in ("one", "two"):
        Image.fromarray(draw.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("stranger", None)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run `apportion` with arguments: exit code, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(a) for a in arguments])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run
