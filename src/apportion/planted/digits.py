"""Digits on textures with exact masks, a network for them; a task of dark objects; digits in grids.

Needs scikit-learn for the digits, and scikit-image and Pillow for the textures; they are imported when asked for.
"""

from __future__ import annotations

import importlib
import time
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from apportion.core.errors import ConfigError
from apportion.planted.grids import CellGrid, tile

SIDE = 48
_TEXTURES = ("brick", "grass", "gravel")
_TRAINED_ON = 0.72
"""Share of the digits, and of each texture's columns, that the training split has; the test split has the rest."""


@dataclass(frozen=True, eq=False)
class Pictures:
    """Pictures whose decisive pixels are known.

    Attributes:
        x: [N, 3, H, W] in [0, 1].
        labels: the class of each.
        masks: the pixels of the object; what is outside says nothing of the class.
        dark: whether the object is darker than its ground.
    """

    x: Float[Tensor, "N 3 H W"]
    labels: Int[Tensor, " N"]
    masks: Bool[Tensor, "N H W"]
    dark: Bool[Tensor, " N"]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor | slice) -> Pictures:
        return Pictures(self.x[rows], self.labels[rows], self.masks[rows], self.dark[rows])


class Trained(NamedTuple):
    """A network after training.

    Attributes:
        model: the network, in eval mode, on pictures in [0, 1].
        accuracy: share of rightly classified pictures of the test split.
        seconds: what training took.
    """

    model: nn.Module
    accuracy: float
    seconds: float


def _random(generator: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(*shape, generator=generator)


def _below(generator: torch.Generator, end: int) -> int:
    return int(torch.randint(end, (), generator=generator))


@cache
def _digits() -> tuple[Tensor, Tensor]:
    """Read the digits in a fixed shuffled order: [1797, 8, 8] in [0, 1], and their classes."""
    try:
        found = importlib.import_module("sklearn.datasets").load_digits()
    except ImportError as error:
        raise ConfigError(
            f"{error.name} is not installed, which brings the digits",
            "scikit-learn for the digits, scikit-image and Pillow for the textures",
            "pip install scikit-learn scikit-image pillow",
        ) from error
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    return torch.from_numpy(found.images).float()[order] / 16, torch.from_numpy(found.target).long()[order]


@cache
def _textures() -> Tensor:
    """Read the textures: [3, 512, 512], grey, in [0, 1]."""
    bundled = importlib.import_module("apportion.adapters.bundled")
    return torch.stack([bundled.picture(name).pixels.mean(0) for name in _TEXTURES])


def _ground(generator: torch.Generator, split: str, low: float, high: float, margin: float) -> Tensor:
    """Crop a texture, move its mean to a random colour, clip to [low, high]: [3, SIDE, SIDE]."""
    every = _textures()
    columns = every.shape[2]
    cut = int(_TRAINED_ON * columns)
    left, right = (0, cut) if split == "train" else (cut, columns)
    i, j = _below(generator, every.shape[1] - SIDE + 1), left + _below(generator, right - left - SIDE + 1)
    crop = every[_below(generator, len(every)), i : i + SIDE, j : j + SIDE]
    colour = _random(generator, low + margin, high - margin, 3, 1, 1)
    return (crop - crop.mean() + colour).clamp(low, high)


def pictures(
    count: int,
    split: Literal["train", "test"] = "test",
    seed: int = 0,
    ink: Literal["dark", "light", "both"] = "both",
) -> Pictures:
    """Paste digits at random places on random crops of brick, grass and gravel, [count, 3, 48, 48] in [0, 1].

    The 8 x 8 digits of scikit-learn are enlarged to 24 to 36 pixels and cut at half of full ink, so that masks are
    exact: inside is one colour, within [0, 0.1] (dark) or [0.9, 1] (light) in each channel, outside the texture
    within [0.2, 0.8]. The ground is drawn without regard to the digit. No digit and no part of a texture is in
    both splits.

    Args:
        count: how many.
        split: of digits and textures.
        seed: of all choices; the two splits differ under one seed.
        ink: dark digits, light ones, or both in turn.

    Raises:
        ConfigError: scikit-learn, scikit-image or Pillow is not installed.

    >>> p = pictures(4)
    >>> p.x.shape, p.dark.tolist(), bool(p.x[0][:, p.masks[0]].max() <= 0.1)
    (torch.Size([4, 3, 48, 48]), [True, False, True, False], True)
    """
    generator = torch.Generator().manual_seed(2 * seed + (split == "train"))
    images, classes = _digits()
    first = int(_TRAINED_ON * len(classes))
    own = range(first) if split == "train" else range(first, len(classes))
    x, masks = torch.empty(count, 3, SIDE, SIDE), torch.zeros(count, SIDE, SIDE, dtype=torch.bool)
    labels = torch.empty(count, dtype=torch.long)
    dark = torch.tensor([ink == "dark" or (ink == "both" and n % 2 == 0) for n in range(count)], dtype=torch.bool)
    for n in range(count):
        x[n] = _ground(generator, split, 0.2, 0.8, 0.2)
        pick, size = own[_below(generator, len(own))], 24 + 4 * _below(generator, 4)
        grown = F.interpolate(images[pick][None, None], (size, size), mode="bicubic", align_corners=False)[0, 0]
        i, j = _below(generator, SIDE - size + 1), _below(generator, SIDE - size + 1)
        masks[n, i : i + size, j : j + size] = grown > 0.5
        colour = _random(generator, 0.0, 0.1, 3, 1, 1)
        x[n] = torch.where(masks[n], colour if dark[n] else 1 - colour, x[n])
        labels[n] = classes[pick]
    return Pictures(x, labels, masks, dark)


class _Centred(nn.Module):
    def forward(self, x: Float[Tensor, "R 3 H W"]) -> Float[Tensor, "R 3 H W"]:
        return 4 * (x - 0.5)


def network(seed: int = 0) -> nn.Module:
    """Build an untrained convolutional network [R, 3, 48, 48] in [0, 1] -> [R, 10] of 47,402 parameters.

    Args:
        seed: of its weights; the global random state stays as it is.

    >>> network()(torch.zeros(2, 3, 48, 48)).shape
    torch.Size([2, 10])
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            _Centred(),
            nn.Conv2d(3, 16, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 6 * 6, 10),
        ).eval()


def _fit(model: nn.Module, x: Tensor, labels: Tensor, epochs: int, seed: int, smoothing: float, rate: float) -> None:
    """Train by Adam in batches of 64 with a rising, then falling rate, and freeze."""
    count = len(x)
    batches = -(-count // 64)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * batches)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(count, generator=generator).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), labels[rows], label_smoothing=smoothing).backward()
            optimizer.step()
            schedule.step()
    model.eval()
    for p in model.parameters():
        p.requires_grad_(False)


def train(count: int = 12000, epochs: int = 12, seed: int = 0, test: int = 2000) -> Trained:
    """Train the network on the training split, the same way every time: Adam, batches of 64, falling rate.

    One to three minutes on one core; by default 0.9565 of the test pictures are then classified rightly. The same
    machine and number of threads give the same weights.

    Args:
        count: training pictures.
        epochs: passes over them.
        seed: of weights, pictures and order.
        test: pictures of the test split to score it on.

    Raises:
        ConfigError: a package that brings digits or textures is not installed.

    >>> train(count=64, epochs=1, test=10).model.training
    False
    """
    start = time.perf_counter()
    model, data = network(seed), pictures(count, "train", seed)
    _fit(model, data.x, data.labels, epochs, seed, smoothing=0.05, rate=4e-3)
    seconds = time.perf_counter() - start
    held = pictures(test, "test", seed)
    with torch.no_grad():
        right = torch.cat([model(x).argmax(1) for x in held.x.split(256)]) == held.labels
    return Trained(model, right.float().mean().item(), seconds)


def _stencils() -> Bool[Tensor, "4 11 11"]:
    """Draw the objects of the dark task, a pixel free around each: an upright bar, a lying bar, a cross, a ring."""
    shapes = torch.zeros(4, 11, 11, dtype=torch.bool)
    shapes[0, 1:10, 4:7] = shapes[1, 4:7, 1:10] = True
    shapes[2] = shapes[0] | shapes[1]
    shapes[3, 1:10, 1:10] = True
    shapes[3, 3:8, 3:8] = False
    return shapes


class DarkObjects(nn.Module):
    """Tell dark objects apart, seeing nothing but darkness; four classes.

    d = max(0, 1/4 - mean over channels of x), and z_c = max over places of <d, T_c>, where T_c is the object's stencil
    divided by its norm, less so much evenly around it that T_c sums to 0. Wherever a pixel is brighter than 1/4 its
    value is without effect, so what is bright has no share in any class; an object is dark on something brighter, and
    a picture of one darkness, black too, scores 0 for all. Among objects of one colour the right class wins.
    """

    stencils: Tensor

    def __init__(self) -> None:
        super().__init__()
        shapes = _stencils().float()
        inside, outside = shapes.flatten(1).sum(1), (1 - shapes).flatten(1).sum(1)
        shapes = shapes - (1 - shapes) * (inside / outside)[:, None, None]
        self.register_buffer("stencils", (20 * shapes / inside.sqrt()[:, None, None])[:, None])

    def forward(self, x: Float[Tensor, "R 3 H W"]) -> Float[Tensor, "R 4"]:
        darkness = F.relu(0.25 - x.mean(1, keepdim=True))
        return F.conv2d(darkness, self.stencils).amax((2, 3))


def dark_object_task(count: int, seed: int = 0) -> tuple[DarkObjects, Pictures]:
    """Give pictures with one dark object on a bright texture, and the model that its pixels alone decide.

    Object pixels are within [0, 0.05], all others within [0.5, 1]. However these are changed within [0.25, 1], no
    output moves: attribution of a feature's presence against any bright alternative is 0 outside `masks`.

    Args:
        count: how many.
        seed: of objects, places and textures.

    Raises:
        ConfigError: scikit-image or Pillow is not installed.

    >>> model, p = dark_object_task(8)
    >>> bool((model(p.x).argmax(1) == p.labels).all())
    True
    >>> bright = torch.where(p.masks[:, None], p.x, torch.rand(p.x.shape) * 0.75 + 0.25)
    >>> bool((model(bright) == model(p.x)).all())
    True
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = _stencils()
    x, masks = torch.empty(count, 3, SIDE, SIDE), torch.zeros(count, SIDE, SIDE, dtype=torch.bool)
    labels = torch.randint(len(shapes), (count,), generator=generator)
    side = shapes.shape[1]
    for n in range(count):
        i, j = _below(generator, SIDE - side + 1), _below(generator, SIDE - side + 1)
        masks[n, i : i + side, j : j + side] = shapes[labels[n]]
        ground = _ground(generator, "test", 0.5, 1.0, 0.15)
        x[n] = torch.where(masks[n], _random(generator, 0.0, 0.05, 3, 1, 1), ground)
    return DarkObjects(), Pictures(x, labels, masks, torch.ones(count, dtype=torch.bool))


def pooled_network(seed: int = 0) -> nn.Module:
    """Build an untrained network for the digits as they are, [R, 1, H, W] of any size in [0, 1] -> [R, 10].

    The class is read off features averaged over all places, so it takes grids of digits too.

    Args:
        seed: of its weights, drawn apart from the global random state.

    >>> pooled_network()(torch.zeros(2, 1, 16, 16)).shape
    torch.Size([2, 10])
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, 10),
        ).eval()


def train_pooled(epochs: int = 20, seed: int = 0) -> Trained:
    """Train that network on the training split of the digits, [8, 8]: 4 seconds on one core, 0.976 right on the rest.

    Args:
        epochs: passes over the 1,293 digits.
        seed: of weights and order.

    Raises:
        ConfigError: scikit-learn is not installed.

    >>> train_pooled(epochs=1).accuracy < 0.9
    True
    """
    start = time.perf_counter()
    images, classes = _digits()
    first, model = int(_TRAINED_ON * len(classes)), pooled_network(seed)
    _fit(model, images[:first, None], classes[:first], epochs, seed, smoothing=0.0, rate=8e-3)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        right = model(images[first:, None]).argmax(1) == classes[first:]
    return Trained(model, right.float().mean().item(), seconds)


def grid_game(
    model: nn.Module, count: int = 100, side: int = 2, seed: int = 0, least: float = 0.99, size: int = 8
) -> CellGrid:
    """Lay digits of distinct classes out in grids, for the grid pointing game (Böhle et al. 2021; Rao et al. 2022).

    Truth: the cell that holds the explained class. Example n is explained for its cell n mod side², so that all
    places come equally often. Digits are of the test split, and each is given its class by at least `least`
    probability when alone. Unlike in `di_full` other cells may matter: what can be compared is the order of methods,
    and chance is 1 / side².

    Args:
        model: takes digits [R, 1, size, size] and grids of them, such as `train_pooled().model`.
        count: grids.
        side: cells in a row, at most 3, since classes are distinct.
        seed: of the choice.
        least: probability of its class that a digit must have.
        size: enlarge the digits to so many pixels.

    Raises:
        ConfigError: scikit-learn is missing, the side is out of range, or too few classes have such digits.

    >>> p = grid_game(pooled_network(), count=4, least=0.0)
    >>> p.x.shape, p.truth.flatten(1).sum(1).tolist()
    (torch.Size([4, 1, 16, 16]), [64, 64, 64, 64])
    """
    cells = side * side
    if not 2 <= side <= 3:
        raise ConfigError(f"side={side}", "2 or 3: each cell has a class of its own")
    images, classes = _digits()
    first = int(_TRAINED_ON * len(classes))
    images, classes = images[first:, None], classes[first:]
    if size != images.shape[-1]:
        images = F.interpolate(images, (size, size), mode="bicubic", align_corners=False).clamp(0, 1)
    with torch.no_grad():
        sure = model(images).softmax(1).gather(1, classes[:, None])[:, 0] >= least
    kinds = [(sure & (classes == c)).nonzero()[:, 0] for c in range(10)]
    known = [c for c, rows in enumerate(kinds) if len(rows)]
    if len(known) < cells:
        raise ConfigError(
            f"a model that is sure of {len(known)} classes, at {least} or more",
            f"{cells}, one for each cell",
            "train it longer, or lower `least`",
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.empty(count, cells, dtype=torch.long)
    for n in range(count):
        for k, c in enumerate(torch.randperm(len(known), generator=generator)[:cells].tolist()):
            rows = kinds[known[c]]
            chosen[n, k] = rows[_below(generator, len(rows))]
    place = torch.arange(count) % cells
    truth = (torch.arange(cells) == place[:, None])[:, :, None, None, None].expand(-1, -1, 1, size, size)
    x = tile(images[chosen])
    return CellGrid(
        model=model,
        x=x,
        truth=tile(truth)[:, 0],
        baseline=torch.zeros_like(x[:1]),
        target=classes[chosen].gather(1, place[:, None])[:, 0],
        side=side,
    )
