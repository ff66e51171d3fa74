"""Similarities of two maps of one example."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from apportion.core import tree
from apportion.core.config import Configurable
from apportion.core.errors import ConfigError, InputError
from apportion.core.tree import Tree
from apportion.metrics.statistics import Pearson, Spearman


@dataclass(frozen=True)
class Similarity(Configurable):
    """Base of the similarities: two maps an example in, one number an example out, 1 for equal maps; NaN if undefined.

    Attributes:
        absolute: compare magnitudes, so that a map is like its negative.
    """

    example: ClassVar[str] = "ap.metrics.RankSimilarity()"

    absolute: bool = False

    def __call__(self, a: Tree, b: Tree) -> Float[Tensor, " B"]:
        """Compare maps of one shape, examples first."""
        one, other = (tree.apply(torch.abs, m) if self.absolute else m for m in (a, b))
        return self.compare(one, other)

    def to(self, a: Tree) -> Callable[[Tree], Float[Tensor, " B"]]:
        """Compare many maps with one, for which what is worked out of it alone may be kept."""
        return lambda b: self(a, b)

    @abstractmethod
    def compare(self, a: Tree, b: Tree) -> Float[Tensor, " B"]:
        """Compare maps as they are."""


def _pictures(m: Tree, who: str) -> Tensor:
    if not isinstance(m, Tensor) or m.ndim != 4:
        shape = tuple(m.shape) if isinstance(m, Tensor) else "several tensors"
        raise InputError(f"{who} of maps {shape}", "pictures [B, channels, H, W]", "use ap.metrics.RankSimilarity()")
    return m.sum(1).double()


def _flat(m: Tree) -> Float[Tensor, "B N"]:
    return torch.cat([t.flatten(1) for t in tree.leaves(m)], 1)


@dataclass(frozen=True)
class RankSimilarity(Similarity):
    """Spearman's rank correlation over all elements; undefined for constant maps.

    >>> RankSimilarity()(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 4.0, 9.0]]))
    tensor([1.], dtype=torch.float64)
    """

    def compare(self, a: Tree, b: Tree) -> Float[Tensor, " B"]:
        return self._to(a)(b)

    def to(self, a: Tree) -> Callable[[Tree], Float[Tensor, " B"]]:
        """Rank the one map once."""
        of_one = self._to(tree.apply(torch.abs, a) if self.absolute else a)
        return lambda b: of_one(tree.apply(torch.abs, b) if self.absolute else b)

    def _to(self, a: Tree) -> Callable[[Tree], Float[Tensor, " B"]]:
        to = Spearman().to(_flat(a))
        return lambda b: to(_flat(b))


@dataclass(frozen=True)
class StructuralSimilarity(Similarity):
    """SSIM of Wang et al. (2004): Gaussian windows of 11 pixels and σ = 1.5, K = (.01, .03), mean over full windows.

    Channels are summed, and each map is brought to [0, 1] by its own minimum and maximum, as Adebayo et al. (2018) do;
    undefined for constant maps, which that leaves without a scale.

    Raises:
        InputError: maps that are no pictures, or smaller than a window.
    """

    def compare(self, a: Tree, b: Tree) -> Float[Tensor, " B"]:
        one, other = (_pictures(m, "StructuralSimilarity") for m in (a, b))
        if min(one.shape[1:]) < 11:
            raise InputError(f"SSIM of maps {tuple(one.shape[1:])}", "11 × 11 pixels or more", "use another similarity")
        flat = torch.zeros(len(one), dtype=torch.bool, device=one.device)
        scaled = []
        for m in (one, other):
            low, high = m.amin((1, 2), keepdim=True), m.amax((1, 2), keepdim=True)
            flat |= (high <= low)[:, 0, 0]
            scaled.append((m - low) / torch.where(high > low, high - low, 1))
        at = torch.arange(-5, 6, dtype=one.dtype, device=one.device)
        kernel = torch.exp(-0.5 * (at / 1.5) ** 2)
        kernel = kernel / kernel.sum()

        def mean(m: Tensor) -> Tensor:
            return F.conv2d(F.conv2d(m[:, None], kernel[None, None, :, None]), kernel[None, None, None])[:, 0]

        x, y = scaled
        mx, my = mean(x), mean(y)
        vx, vy, vxy = (mean(p) - q for p, q in ((x * x, mx * mx), (y * y, my * my), (x * y, mx * my)))
        c1, c2 = 0.01**2, 0.03**2
        index = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
        return index.mean((1, 2)).masked_fill(flat, torch.nan)


@dataclass(frozen=True)
class GradientHistograms(Similarity):
    """Pearson's correlation of histograms of oriented gradients (HOG, Dalal and Triggs 2005), used by Adebayo et al.

    Cells of `cell` pixels a side, nine orientations, blocks of 3 × 3 cells normalized by L2-Hys: scikit-image's
    `hog` on the maps with channels summed. Undefined for constant maps.

    Attributes:
        cell: in pixels.

    Raises:
        ConfigError: the image extra is not installed.
        InputError: maps that are no pictures, or smaller than a block.
    """

    _positive = ("cell",)

    cell: int = 8

    def compare(self, a: Tree, b: Tree) -> Float[Tensor, " B"]:
        try:
            from skimage.feature import hog
        except ImportError as error:
            raise ConfigError(
                "HOG without scikit-image", "the image extra", "pip install 'apportion[image]'"
            ) from error
        one, other = (_pictures(m, "GradientHistograms") for m in (a, b))
        if min(one.shape[1:]) < 3 * self.cell:
            raise InputError(
                f"HOG of maps {tuple(one.shape[1:])}",
                f"{3 * self.cell} × {3 * self.cell} pixels",
                "choose smaller cells",
            )
        found = [
            torch.stack([torch.from_numpy(hog(p.cpu().numpy(), pixels_per_cell=(self.cell, self.cell))) for p in m])
            for m in (one, other)
        ]
        return Pearson()(*found).to(one.device)
