"""Pictures that come inside installed packages, by name: there without a network connection.

For some, what is on them is drawn by hand: `truth` gives box, outline and the classes that are right.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from apportion.adapters.image import CenterCrop, Picture, read
from apportion.core.errors import ConfigError, InputError, RegistryError, nearest

_INSTALL = {"skimage": "scikit-image", "sklearn": "scikit-learn"}
_FOLDER = {"skimage": "data", "sklearn": "datasets/images"}

_PICTURES = {
    "astronaut": ("skimage", "astronaut.png", "Eileen Collins beside a model of the shuttle; public domain, NASA"),
    "brick": ("skimage", "brick.png", "a brick wall, grey; CC0, CC0Textures"),
    "camera": ("skimage", "camera.png", "a man with a video camera on a tripod, grey; CC0, Lav Varshney"),
    "cell": ("skimage", "cell.png", "a cell in saline, phase image, grey; CC0, Paul Müller et al."),
    "chelsea": ("skimage", "chelsea.png", "Chelsea the cat; CC0, Stefan van der Walt"),
    "clock": (
        "skimage",
        "clock_motion.png",
        "a wall clock in motion, grey; public domain, Stefan van der Walt",
    ),
    "coffee": ("skimage", "coffee.png", "a cup of espresso; CC0, Rachel Michetti"),
    "coins": ("skimage", "coins.png", "24 coins from Pompeii, grey; no known restrictions, Brooklyn Museum"),
    "colorwheel": ("skimage", "color.png", "a colour wheel; no licence stated"),
    "grass": ("skimage", "grass.png", "grass, grey; CC0, linolafett"),
    "gravel": ("skimage", "gravel.png", "gravel, grey; CC0, CC0Textures"),
    "horse": ("skimage", "horse.png", "the silhouette of a horse; CC0, Andreas Preuss"),
    "hubble": ("skimage", "hubble_deep_field.jpg", "Hubble eXtreme Deep Field; public domain, NASA"),
    "immunohistochemistry": ("skimage", "ihc.png", "stained colonic glands; no known restrictions, CMMI"),
    "microaneurysms": ("skimage", "microaneurysms.png", "a detail of a retina, grey; CC0, Andreas Maier"),
    "moon": ("skimage", "moon.png", "the surface of the moon, grey; no licence stated"),
    "motorcycle": (
        "skimage",
        "motorcycle_left.png",
        "a motorcycle in a garage; Middlebury 2014, no licence stated",
    ),
    "page": ("skimage", "page.png", "a scanned page of print, grey; no licence stated"),
    "retina": ("skimage", "retina.jpg", "a human retina; CC0, Mikael Häggström"),
    "rocket": ("skimage", "rocket.jpg", "Falcon 9 on its launch pad; public domain, SpaceX"),
    "text": ("skimage", "text.png", "lines of text, grey; public domain, Wikipedia"),
    "china": ("sklearn", "china.jpg", "a tower of the Summer Palace; CC BY 2.0, danielbuechele"),
    "flower": ("sklearn", "flower.jpg", "a dahlia; CC BY 2.0, vultilion"),
}


def bundled(installed: bool = False) -> dict[str, str]:
    """Describe them: name to content, licence, author and package.

    Args:
        installed: leave out those whose package is not installed here.

    >>> bundled()["chelsea"]
    'Chelsea the cat; CC0, Stefan van der Walt (scikit-image)'
    """
    absent = {p for p in _INSTALL if _root(p) is None} if installed else set()
    return {n: f"{about} ({_INSTALL[p]})" for n, (p, _, about) in _PICTURES.items() if p not in absent}


def _root(package: str) -> Path | None:
    found = importlib.util.find_spec(package)
    return None if found is None or found.origin is None else Path(found.origin).parent


def picture(name: str) -> Picture:
    """Read one of them.

    Raises:
        RegistryError: another name, with those that look like it.
        ConfigError: its package is not installed.

    >>> picture("chelsea").pixels.shape
    torch.Size([3, 300, 451])
    """
    if name not in _PICTURES:
        raise RegistryError(f"no picture named {name!r}", nearest(name, _PICTURES), "list them with bundled()")
    package, file, _ = _PICTURES[name]
    root = _root(package)
    if root is None:
        raise ConfigError(
            f"{package} is not installed, which brings the picture {name!r}",
            "the package, or a file of your own",
            f"pip install {_INSTALL[package]}",
        )
    return read(root / _FOLDER[package] / file, name)


@dataclass(frozen=True)
class Truth:
    """Where an object is on a picture, and which ImageNet classes name it.

    Points are x to the right and y down, in pixels, from the upper left corner of the picture.

    Attributes:
        box: left, top, right, bottom, the last two not included; all 0 if nothing of the object is seen.
        polygons: its outlines, each a tuple of (x, y); the object is all they enclose together.
        classes: right classes, or the nearest where the note says so; none if ImageNet has none.
        note: what was decided while drawing.
    """

    box: tuple[int, int, int, int]
    polygons: tuple[tuple[tuple[float, float], ...], ...]
    classes: tuple[int, ...]
    note: str = ""

    def mask(self, height: int, width: int) -> Bool[Tensor, "H W"]:
        """Fill the outlines: the pixels whose centre is inside.

        Args:
            height: rows of the picture that the points are pixels of.
            width: its columns.

        Raises:
            InputError: the box does not lie in such a picture.

        >>> Truth((1, 0, 3, 2), (((1, 0), (3, 0), (3, 2), (1, 2)),), ()).mask(2, 4).int().tolist()
        [[0, 1, 1, 0], [0, 1, 1, 0]]
        """
        left, top, right, bottom = self.box
        if not (0 <= left <= right <= width and 0 <= top <= bottom <= height):
            raise InputError(
                f"a picture of {height} rows and {width} columns for the box {self.box}",
                "the picture it was drawn on, height first",
                "pass picture.pixels.shape[1:]",
            )
        return self._fill(height, width)

    def _fill(self, height: int, width: int) -> Tensor:
        filled = np.zeros((height, width), dtype=bool)
        x, y = np.arange(width) + 0.5, np.arange(height) + 0.5
        for polygon in self.polygons:
            inside = np.zeros_like(filled)
            for (x0, y0), (x1, y1) in zip(polygon, (*polygon[1:], polygon[0]), strict=True):
                rows = (y0 <= y) != (y1 <= y)
                crossing = x0 + (y[rows] - y0) * (x1 - x0) / (y1 - y0) if rows.any() else y[rows]
                inside[rows] ^= x[None, :] < crossing[:, None]
            filled |= inside
        return torch.from_numpy(filled)

    def through(self, crop: CenterCrop, height: int, width: int) -> Truth:
        """Say the same in pixels of what the network sees.

        The box becomes that of the part that is seen. Outlines may run past the edge of the crop; one with no
        pixel inside is dropped.

        Args:
            crop: what made the picture that the network sees.
            height: rows of the picture before.
            width: its columns before.

        >>> cat = truth("chelsea").through(CenterCrop(224), 300, 451)
        >>> cat.box, round(cat.mask(224, 224).float().mean().item(), 2)
        ((0, 0, 224, 224), 0.94)
        """
        self.mask(height, width)
        left, top, right, bottom = crop.box(height, width)
        across, down = crop.size / (right - left), crop.size / (bottom - top)
        moved = (tuple(((x - left) * across, (y - top) * down) for x, y in p) for p in self.polygons)
        seen = tuple(p for p in moved if Truth((0, 0, 0, 0), (p,), ())._fill(crop.size, crop.size).any())
        mask = Truth((0, 0, 0, 0), seen, ())._fill(crop.size, crop.size)
        return Truth(_extent(mask), seen, self.classes, self.note)


def _extent(mask: Bool[Tensor, "H W"]) -> tuple[int, int, int, int]:
    rows, columns = mask.any(1).nonzero().flatten().tolist(), mask.any(0).nonzero().flatten().tolist()
    return (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) if rows else (0, 0, 0, 0)


@cache
def _drawn() -> dict[str, Any]:
    text = resources.files("apportion.adapters").joinpath("data/objects.json").read_text(encoding="utf-8")
    return json.loads(text)["pictures"]


def drawn() -> dict[str, tuple[str, ...]]:
    """Name the objects that were drawn, by picture, the main one first.

    >>> drawn()["camera"]
    ('camera on tripod', 'man')
    """
    return {name: tuple(entry["objects"]) for name, entry in _drawn().items()}


def truth(name: str, thing: str | None = None) -> Truth:
    """Look up where an object is, in pixels of the picture as `picture` reads it.

    Drawn by eye: within about 3 pixels at sharp edges, 8 at fur, leaves or blur. The package of the picture need not
    be installed.

    Args:
        name: the picture.
        thing: the object; the main one unless given.

    Raises:
        RegistryError: no such picture or object was drawn, with the nearest names.

    >>> tripod = truth("camera")
    >>> tripod.box, tripod.classes
    ((229, 140, 406, 512), (872,))
    """
    entries = _drawn()
    if name not in entries:
        raise RegistryError(
            f"nothing is drawn of a picture named {name!r}", nearest(name, entries), "list them with drawn()"
        )
    objects = entries[name]["objects"]
    wanted = next(iter(objects)) if thing is None else thing
    if wanted not in objects:
        raise RegistryError(
            f"no object {thing!r} is drawn of {name!r}", nearest(wanted, objects), "list them with drawn()"
        )
    one = objects[wanted]
    polygons = tuple(tuple((x, y) for x, y in polygon) for polygon in one["polygons"])
    left, top, right, bottom = one["box"]
    return Truth((left, top, right, bottom), polygons, tuple(one["classes"]), one["note"])
