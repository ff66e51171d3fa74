"""Colored shapes on grey textures: one set of pictures, a label for the object and one for the scene, a model for each.

The idea is that of BAM (Yang and Kim 2019), which pastes COCO's objects into scenes of Places.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from apportion.planted.digits import _stencils
from apportion.planted.problem import Planted, seeded

_SIDE = 32


def _color(x: Float[Tensor, "R 3 H W"]) -> Float[Tensor, "R 1 H W"]:
    """How far channels differ beyond 0.3; 0, and flat, for grey."""
    red, green, blue = x.split(1, 1)
    sides = (red - green, green - red, green - blue, blue - green)
    return sum(((d - 0.3).relu() for d in sides), torch.zeros_like(red))


class ObjectModel(nn.Module):
    """Tell colored shapes apart, seeing color only: upright bar, lying bar, cross, ring.

    z_c = max over places of <color, T_c>, where T_c is the shape's stencil of norm 1 less so much around it that it
    sums to 0. What is grey has no share and no derivative.
    """

    stencils: Tensor

    def __init__(self) -> None:
        super().__init__()
        shapes = _stencils().float()
        inside, outside = shapes.flatten(1).sum(1), (1 - shapes).flatten(1).sum(1)
        zero_sum = shapes - (1 - shapes) * (inside / outside)[:, None, None]
        self.register_buffer("stencils", (zero_sum / inside.sqrt()[:, None, None])[:, None])

    def forward(self, x: Float[Tensor, "R 3 H W"]) -> Float[Tensor, "R 4"]:
        return F.conv2d(_color(x), self.stencils.to(x.dtype)).amax((2, 3))


class SceneModel(nn.Module):
    """Tell textures apart, seeing steps of brightness between grey neighbors only: lying stripes, upright ones, checks.

    With v and h the mean size of steps down and to the right: v - h, h - v, (v + h) / 2. A step to or from a colored
    pixel is off, so what is colored has no derivative.
    """

    def forward(self, x: Float[Tensor, "R 3 H W"]) -> Float[Tensor, "R 3"]:
        grey, color = x.mean(1, keepdim=True), _color(x)
        down = self._steps(grey[:, :, 1:] - grey[:, :, :-1], color[:, :, 1:] + color[:, :, :-1])
        right = self._steps(grey[..., 1:] - grey[..., :-1], color[..., 1:] + color[..., :-1])
        return torch.stack([down - right, right - down, (down + right) / 2], 1)

    def _steps(self, rise: Tensor, color: Tensor) -> Float[Tensor, " R"]:
        return ((rise - 20 * color).relu() + (-rise - 20 * color).relu()).mean((1, 2, 3))


@dataclass(frozen=True, eq=False, kw_only=True)
class ShapesOnTextures:
    """One set of pictures as two problems.

    Attributes:
        object: the model of shapes; its target is the shape, its truth the mask of it, [n, H, W].
        scene: the model of textures; its target is the texture, its truth all else.
        bare: the same pictures before the shape was pasted.
        repainted: the same shapes on other textures, which the model of shapes cannot tell from the first.
    """

    object: Planted
    scene: Planted
    bare: Float[Tensor, "n 3 H W"]
    repainted: Float[Tensor, "n 3 H W"]

    @property
    def masks(self) -> Bool[Tensor, "n H W"]:
        """Where the shapes are."""
        return self.object.truth


def shapes_on_textures(count: int = 24, seed: int = 0) -> ShapesOnTextures:
    """Paste a shape of one color at a random place on a grey texture, [count, 3, 32, 32] in [0, 1].

    All pairs of shape and texture come in turn, so neither tells the other. Model contrast: attribution inside the
    mask should be larger for the object model than for the scene model; by their derivatives all of the first's is
    inside and all of the second's outside. Input dependence: the scene model attributes less to a region with a shape
    than to the same region of `bare`. Input independence: the object model attributes to all but the shape what it does
    in `repainted`, where its outputs are the same.

    Args:
        count: how many.
        seed: of colors, places, periods and brightness.

    >>> p = shapes_on_textures()
    >>> [torch.equal(q.model(q.x).argmax(1), q.target) for q in (p.object, p.scene)]
    [True, True]
    """
    generator = seeded(seed)
    shapes = _stencils()
    number = torch.arange(count)
    objects, scenes = number % len(shapes), number // len(shapes) % 3
    bare = _textures(scenes, generator)
    x, masks = bare.clone(), torch.zeros(count, _SIDE, _SIDE, dtype=torch.bool)
    side = shapes.shape[1]
    places = torch.randint(_SIDE - side + 1, (count, 2), generator=generator)
    # one channel high and another low, so that it differs from the green one by 0.55 at least
    bright, dark = 0.85 + 0.15 * torch.rand(count, generator=generator), 0.3 * torch.rand(count, generator=generator)
    green_high = torch.randint(2, (count,), generator=generator).bool()
    colors = torch.stack([torch.where(green_high, dark, bright), torch.where(green_high, bright, dark), dark], 1)
    for n, (i, j) in enumerate(places.tolist()):
        masks[n, i : i + side, j : j + side] = shapes[objects[n]]
        x[n] = torch.where(masks[n], colors[n, :, None, None], x[n])
    zero = torch.zeros_like(x[:1])
    return ShapesOnTextures(
        object=Planted(model=ObjectModel().eval(), x=x, baseline=zero, truth=masks, target=objects),
        scene=Planted(model=SceneModel().eval(), x=x, baseline=zero, truth=~masks, target=scenes),
        bare=bare,
        repainted=torch.where(masks[:, None], x, bare.roll(1, 0)),
    )


def _textures(scenes: Tensor, generator: torch.Generator) -> Float[Tensor, "n 3 H W"]:
    count = len(scenes)

    def drawn(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, generator=generator)

    period = torch.randint(2, 5, (count, 1, 1), generator=generator)
    start = torch.randint(8, (count, 2, 1, 1), generator=generator)
    at = torch.arange(_SIDE)
    rows = ((at[:, None] + start[:, 0]) // period) % 2
    columns = ((at[None] + start[:, 1]) // period) % 2
    kinds = scenes[:, None, None]
    field = torch.where(kinds == 0, rows, torch.where(kinds == 1, columns, (rows + columns) % 2))
    grey = drawn(0.3, 0.5) + drawn(0.2, 0.4) * field
    grey = grey + 0.02 * torch.rand(count, _SIDE, _SIDE, generator=generator)
    return grey[:, None].expand(-1, 3, -1, -1).contiguous()
