"""Smooth masks of a given area, and pictures that are blurred by a mask."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from apportion.core.config import Configurable
from apportion.core.protocols import Owner
from apportion.parts.baselines.simple import blur


def smooth_max(values: Tensor, coldness: float, dim: int = -1) -> Tensor:
    """Give Σ v e^{c v} / Σ e^{c v}, which is the maximum for large c; Fong et al. 2019.

    >>> round(float(smooth_max(torch.tensor([0.4, 0.5]), 20.0)), 3)
    0.488
    """
    return (values * (coldness * values).softmax(dim)).sum(dim)


class _SmoothMasks(torch.autograd.Function):
    """Smooth maxima of kernel × cell over all cells near a pixel, one offset at a time: memory of one mask."""

    @staticmethod
    def forward(ctx, padded: Tensor, kernel: Tensor, coldness: float) -> Tensor:  # pyright: ignore
        above = below = padded.new_zeros(())
        for _, _, cold in _near(padded, kernel * coldness):
            weight = cold.exp()
            above, below = cold.mul_(weight).add_(above), weight.add_(below)
        out = above.div_(below).div_(coldness)
        ctx.save_for_backward(padded, kernel, out, below)
        ctx.coldness = coldness
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore
        padded, kernel, out, below = ctx.saved_tensors
        high, wide = out.shape[2:]
        slope, share = torch.zeros_like(padded), grad / below
        rest = share * (1 - ctx.coldness * out)
        for i, j, cold in _near(padded, kernel * ctx.coldness):
            one = torch.addcmul(rest, share, cold).mul_(cold.exp_())
            slope[:, 0, i : i + high, j : j + wide] += (kernel[i, j] @ one.flatten(2)).unflatten(1, (high, wide))
        return slope, None, None


def _near(padded: Tensor, kernel: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Go over the cells around each: kernel × cell, [R, step², h, w], a layer for each place within a cell."""
    high, wide = (size - kernel.shape[0] + 1 for size in padded.shape[2:])
    for i in range(kernel.shape[0]):
        for j in range(kernel.shape[1]):
            yield i, j, padded[:, :, i : i + high, j : j + wide] * kernel[i, j][:, None, None]


@dataclass(frozen=True)
class SmoothMask(Configurable):
    """Masks as smooth maxima of blobs around a grid of cells: m(u) = max_i k(|u - u_i| / σ) m_i.

    k(z) = exp(-2 max(z - 1/2, 0)²), cut where cells are more than ⌈σ/step⌉ + 1 apart. Beyond the border cells repeat
    those at it: with zeros there, masks of equal cells would be highest at the border, which the area then keeps.

    Attributes:
        step: pixels between the cells' centers, each the middle of its square; the grid is centered on the picture,
            else cells at one border have less of it than those at the other, and the area moves there.
        sigma: the blobs' radius, in pixels.
        coldness: of the smooth maximum.

    >>> SmoothMask(step=2, sigma=3.0)(torch.ones(1, 1, 2, 2), (4, 4)).shape
    torch.Size([1, 1, 4, 4])
    """

    _positive = ("step", "sigma", "coldness")

    step: int = 7
    sigma: float = 21.0
    coldness: float = 20.0

    def cells(self, size: tuple[int, ...]) -> tuple[int, int]:
        """Count the cells of a picture."""
        return math.ceil(size[0] / self.step), math.ceil(size[1] / self.step)

    def kernel(self, like: Tensor) -> Float[Tensor, "K K places"]:
        """Give k for each offset between cells and each place within a cell."""
        radius = 1 + math.ceil(self.sigma / self.step)
        place = torch.arange(self.step, dtype=torch.float64) - (self.step - 1) / 2
        away = place - self.step * torch.arange(-radius, radius + 1, dtype=torch.float64)[:, None]  # [K, step]
        z = (away[:, None, :, None] ** 2 + away[None, :, None, :] ** 2).sqrt() / self.sigma
        return (-2 * (z - 0.5).clamp(min=0) ** 2).exp().flatten(2).to(like)

    def __call__(self, cells: Float[Tensor, "R 1 h w"], size: tuple[int, ...]) -> Float[Tensor, "R 1 H W"]:
        """Make masks of cells."""
        kernel = self.kernel(cells)
        padded = F.pad(cells, (kernel.shape[0] // 2,) * 4, mode="replicate")
        layers = _SmoothMasks.apply(padded, kernel, self.coldness)
        assert isinstance(layers, Tensor)
        high, wide = ((n * self.step - s) // 2 for n, s in zip(cells.shape[2:], size, strict=True))
        return F.pixel_shuffle(layers, self.step)[..., high : high + size[0], wide : wide + size[1]].clamp(0, 1)

    def margin(self, mask: Float[Tensor, "R 1 H W"]) -> Float[Tensor, "R 1 high wide"]:
        """Go on with a mask for σ pixels beyond the picture, at a distance d from it by a factor exp(-2 (d/σ)²).

        That is how blobs end inside of the picture: a mask that ends at the border is counted with an edge there too.
        """
        reach = round(self.sigma)
        high, wide = (
            (torch.arange(-reach, size + reach) - (size - 1) / 2).abs().sub((size - 1) / 2).clamp(min=0).to(mask)
            for size in mask.shape[2:]
        )
        falls = (-2 * (high[:, None].square() + wide.square()) / self.sigma**2).exp()
        return F.pad(mask, (reach,) * 4, mode="replicate") * falls


def area_loss(mask: Float[Tensor, "R *shape"], area: Float[Tensor, " R"]) -> Float[Tensor, " R"]:
    """Mean squared difference of the sorted mask from (1 - a) N zeros and a N ones; Fong et al. 2019.

    Which of several equal values comes first would be chance, and bias the mask: values, from 0 to 1, that agree to 3
    decimals share the zeros and ones of their ranks, which hardly moves the loss and makes its gradient the mean
    over all orders.

    >>> [round(float(area_loss(m, torch.tensor([0.1]))), 3) for m in (torch.ones(1, 10), torch.eye(10)[:1])]
    [0.9, 0.0]
    """
    flat = mask.flatten(1)
    key = (flat.detach() * 1e3).round().long()
    count = key.new_zeros(len(key), 1001).scatter_add_(1, key, torch.ones_like(key))
    high = count.cumsum(1)
    zeros = ((1 - area.double()) * flat.shape[1] + 1e-6).floor().long().to(mask.device)[:, None]
    share = (high - torch.maximum(high - count, zeros)).clamp(min=0).to(mask.dtype) / count.clamp(min=1)
    ones = share.gather(1, key)
    return (flat.square() - 2 * flat * ones + ones).mean(1)


class Pyramid:
    """Pictures from blurred to sharp; a mask picks a level at each pixel, linearly between two."""

    def __init__(self, x: Float[Tensor, "B C H W"], levels: int, sigma: float) -> None:
        """Blur.

        Args:
            x: the pictures, which are the last level.
            levels: how many.
            sigma: of the blur of the first, in pixels.
        """
        widths = torch.linspace(sigma, 0, levels).tolist()
        self.levels = torch.stack([blur(x, s) if s else x for s in widths], 1)

    def __call__(self, mask: Float[Tensor, "R 1 H W"], owner: Owner) -> Float[Tensor, "R C H W"]:
        """Blur each picture where the mask is low."""
        place = mask * (self.levels.shape[1] - 1)
        low = place.detach().floor().clamp(max=self.levels.shape[1] - 2)
        at = low.long()[:, 0]
        rows, (high, wide) = owner[:, None, None], at.shape[1:]
        i, j = torch.arange(high, device=at.device)[:, None], torch.arange(wide, device=at.device)
        first, second = (self.levels[rows, at + n, :, i, j].movedim(3, 1) for n in (0, 1))
        return first + (place - low) * (second - first)
