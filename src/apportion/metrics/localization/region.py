"""Regions: where the object of an example is, as a mask, boxes or polygons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apportion.core.errors import InputError, kind_of
from apportion.core.question import Question
from apportion.metrics.metric import Metric, Subject

Box = tuple[float, float, float, float]


@dataclass(frozen=True, eq=False)
class Region:
    """Where the object is.

    Attributes:
        mask: [H, W], at the size of the explained picture; `at` rasterizes boxes and polygons.
        boxes: (left, top, right, bottom) of each instance in pixels of the explained picture, right and bottom
            excluded; those of the mask unless given.
        scale: pixels of the original picture to a pixel of the explained one, down and across, for tolerances.
        difficult: whether the example belongs to a difficult subset, for whoever averages.

    Raises:
        InputError: a mask that is no [H, W] of Booleans or 0 and 1; a box without extent.

    >>> Region.of_boxes([(0, 0, 2, 1)], (2, 3)).mask.int().tolist()
    [[1, 1, 0], [0, 0, 0]]
    """

    mask: Bool[Tensor, "H W"]
    boxes: tuple[Box, ...] = ()
    scale: tuple[float, float] = (1.0, 1.0)
    difficult: bool = False

    @classmethod
    def of_mask(cls, mask: Any, *, scale: tuple[float, float] = (1.0, 1.0), difficult: bool = False) -> Region:
        """Take a mask [H, W] or [1, H, W]."""
        if not isinstance(mask, Tensor | np.ndarray | list):
            do = "give 1 where the object is, or ap.metrics.Region for boxes and polygons"
            raise InputError(f"{kind_of(mask)} as mask", "an array [H, W]", do)
        m = torch.as_tensor(mask)
        m = m[0] if m.ndim == 3 and len(m) == 1 else m
        if m.ndim != 2 or not (m.dtype == torch.bool or bool(((m == 0) | (m == 1)).all())):
            raise InputError(
                f"a mask of shape {tuple(m.shape)}, {m.dtype}", "[H, W], Boolean or 0 and 1", "write mask > 0.5"
            )
        m = m.bool()
        return cls(m, () if not bool(m.any()) else (bounding_box(m),), scale, difficult)

    @classmethod
    def of_boxes(
        cls,
        boxes: Sequence[Sequence[float]],
        size: tuple[int, int],
        *,
        scale: tuple[float, float] = (1.0, 1.0),
        difficult: bool = False,
    ) -> Region:
        """Take boxes (left, top, right, bottom) in a picture of `size` (H, W): pixels whose centers they hold."""
        high, wide = size
        down, across = torch.arange(high)[:, None] + 0.5, torch.arange(wide) + 0.5
        mask, kept = torch.zeros(high, wide, dtype=torch.bool), []
        for box in boxes:
            if len(box) != 4 or not (box[0] < box[2] and box[1] < box[3]):
                raise InputError(f"the box {tuple(box)}", "left < right and top < bottom", "give corners in this order")
            left, top, right, bottom = (float(v) for v in box)
            mask |= (across > left) & (across < right) & (down > top) & (down < bottom)
            kept.append((left, top, right, bottom))
        return cls(mask, tuple(kept), scale, difficult)

    @classmethod
    def of_polygons(
        cls,
        polygons: Sequence[Any],
        size: tuple[int, int],
        *,
        scale: tuple[float, float] = (1.0, 1.0),
        difficult: bool = False,
    ) -> Region:
        """Take polygons, each [N, 2] of (x, y), in a picture of `size` (H, W); pixels inside by the even-odd rule.

        >>> Region.of_polygons([[(0, 0), (3, 0), (0, 3)]], (3, 3)).mask.int().tolist()
        [[1, 1, 0], [1, 0, 0], [0, 0, 0]]
        """
        high, wide = size
        mask, boxes = torch.zeros(high, wide, dtype=torch.bool), []
        y, x = torch.arange(high)[:, None].double() + 0.5, torch.arange(wide).double() + 0.5
        for polygon in polygons:
            p = torch.as_tensor(polygon, dtype=torch.float64)
            if p.ndim != 2 or p.shape[1] != 2 or len(p) < 3:
                raise InputError(
                    f"a polygon of shape {tuple(p.shape)}", "[N, 2] with N of 3 or more", "give (x, y) pairs"
                )
            inside = torch.zeros(high, wide, dtype=torch.bool)
            for (ax, ay), (bx, by) in zip(p.tolist(), p.roll(-1, 0).tolist(), strict=True):
                if ay != by:
                    inside ^= ((ay > y) != (by > y)) & (x < (bx - ax) * (y - ay) / (by - ay) + ax)
            mask |= inside
            boxes.append((*p.amin(0).tolist(), *p.amax(0).tolist()))
        return cls(mask, tuple(boxes), scale, difficult)


def bounding_box(mask: Bool[Tensor, "H W"]) -> Box:
    """Give the box around what is True."""
    down, across = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    return float(across[0]), float(down[0]), float(across[-1]) + 1, float(down[-1]) + 1


def regions(truth: Any, maps: Float[Tensor, "B H W"]) -> list[Region]:
    """Read truths, one an example, at the size of the maps.

    Raises:
        InputError: another number of truths, something else than regions and masks, or another size.
    """
    if not isinstance(truth, Tensor | np.ndarray | list | tuple) or len(truth) != len(maps):
        count = f"{len(truth)} truth(s)" if hasattr(truth, "__len__") else kind_of(truth)
        raise InputError(
            f"{count} for {len(maps)} example(s)",
            "a mask [H, W] or an ap.metrics.Region for each, in a list",
            "write ap.metrics.Region.of_boxes([(left, top, right, bottom)], (H, W))",
        )
    found = [one if isinstance(one, Region) else Region.of_mask(one) for one in truth]
    for i, one in enumerate(found):
        if one.mask.shape != maps.shape[1:]:
            raise InputError(
                f"a truth of {tuple(one.mask.shape)} pixels for example {i}",
                f"{tuple(maps.shape[1:])}, as the explained picture",
                "resize and crop it as the picture was",
            )
    return found


def masks(found: Sequence[Region], like: Tensor) -> Bool[Tensor, "B H W"]:
    """Stack the masks."""
    return torch.stack([one.mask for one in found]).to(like.device)


@dataclass(frozen=True)
class OnRegions(Metric):
    """Base of metrics whose truths are regions of pictures."""

    def check_truth(self, q: Question, truth: Any) -> None:
        """Read the truths at the size of the pictures."""
        if isinstance(q.x, Tensor) and q.x.ndim == 4:
            regions(truth, q.x[:, 0])


def picture_map(q: Question, subject: Subject) -> Float[Tensor, "B H W"]:
    """Give the map with its channels summed.

    Raises:
        InputError: a map of something else than pictures.
    """
    values = subject.map(q)
    if not isinstance(values, Tensor) or values.ndim != 4:
        shape = tuple(values.shape) if isinstance(values, Tensor) else "several tensors"
        raise InputError(f"a map of shape {shape}", "pictures [B, channels, H, W]", "localization needs pictures")
    return values.sum(1)


def correct(q: Question, top: int) -> Bool[Tensor, " B"]:
    """Tell whether the target is among the highest outputs; a row forward each.

    Raises:
        InputError: outputs that are not one row of classes.
    """
    owner = torch.arange(len(q), device=q.device)
    out = q.outputs(q.x, owner)
    target = q.target
    classes = isinstance(out, Tensor) and out.ndim == 2 and isinstance(target, Tensor)
    if not classes or not 0 < top <= out.shape[1]:
        raise InputError(f"the top {top} of these outputs", "outputs [B, classes], and targets", "leave `top` out")
    place = target.reshape(len(q), -1)[:, :1]
    return (out > out.gather(1, place)).sum(1) < top
