"""A Gaussian of patches, from which what is absent is drawn given what surrounds it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.core import tree
from apportion.core.errors import InputError, kind_of
from apportion.core.protocols import Owner
from apportion.core.question import Question
from apportion.core.tree import Tree
from apportion.parts.masks.fill import Fill, kept_pictures


@dataclass(frozen=True, eq=False)  # tensors have no single truth value
class ConditionalGaussian(Fill):
    """Draws from a Gaussian of square patches, given the pixels around what is absent.

    This is the sampler of prediction difference analysis (Zintgraf et al. 2017). For each channel a patch is N(μ, Σ),
    fitted to data. The patch is laid around what is absent, shifted inwards at borders, and the absent pixels w are
    drawn given the others u from N(μ_w + Σ_wu Σ_uu⁻¹ (x_u - μ_u), Σ_ww - Σ_wu Σ_uu⁻¹ Σ_uw), then clipped to what each
    pixel was in the data. Directions in which the data do not vary are left out of the inverse. All channels of a
    pixel are absent together.

    Attributes:
        mean: μ, [C, side²].
        covariance: Σ, [C, side², side²].
        low: the smallest value of each pixel in the data, [C, H, W].
        high: the largest.
        samples: draws for each coalition.

    Raises:
        InputError: pictures of another shape than the data; absent pixels that do not fit into a patch, or some
            channels of a pixel without the others.

    >>> data = torch.randn(50, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    >>> ConditionalGaussian.fit(data, side=4, patches=200).covariance.shape
    torch.Size([1, 16, 16])
    """

    _positive = ("samples",)

    mean: Float[Tensor, "C n"]
    covariance: Float[Tensor, "C n n"]
    low: Float[Tensor, "C H W"]
    high: Float[Tensor, "C H W"]
    samples: int = 10

    @classmethod
    def fit(
        cls, data: Float[Tensor, "N C H W"], side: int = 14, patches: int = 20_000, samples: int = 10, seed: int = 0
    ) -> ConditionalGaussian:
        """Fit the Gaussian to random patches.

        Args:
            data: pictures like those explained, prepared alike.
            side: of a patch, in pixels: what is absent and a margin; the paper removes 10 and goes by 2 on each side.
            patches: how many to draw.
            samples: draws for each coalition.
            seed: of the places of the patches.

        Raises:
            InputError: data that are no pictures, or smaller than a patch; fewer than two patches.
        """
        if not isinstance(data, Tensor) or data.ndim != 4 or min(data.shape[2:]) < side or side < 1 or patches < 2:
            given = f"data of shape {tuple(data.shape)}" if isinstance(data, Tensor) else kind_of(data)
            raise InputError(
                f"{patches} patches of {side} pixels from {given}",
                "two patches or more from pictures [N, C, H, W] at least as large",
                "give pictures, and a smaller side",
            )
        g = torch.Generator().manual_seed(seed)
        n, channels, high, wide = data.shape
        of = torch.randint(n, (patches,), generator=g)
        top = torch.randint(high - side + 1, (patches,), generator=g)
        left = torch.randint(wide - side + 1, (patches,), generator=g)
        rows = (top[:, None] + torch.arange(side))[:, :, None]
        columns = (left[:, None] + torch.arange(side))[:, None, :]
        found = data.detach().cpu().permute(0, 2, 3, 1)[of[:, None, None], rows, columns].double()
        flat = found.permute(3, 0, 1, 2).reshape(channels, patches, side * side)
        mean = flat.mean(1)
        apart = flat - mean[:, None]
        return cls(mean, apart.mT @ apart / (patches - 1), data.amin(0).cpu(), data.amax(0).cpu(), samples)

    @property
    def draws(self) -> int:
        return self.samples

    @property
    def random(self) -> bool:
        return True

    @property
    def side(self) -> int:
        """Of a patch, in pixels."""
        return round(self.mean.shape[1] ** 0.5)

    def __call__(self, q: Question, mask: Tree, owner: Owner, draw: Int[Tensor, " R"]) -> Tree:
        gone = ~kept_pictures(q, mask, "ConditionalGaussian")
        x, side = q.x[owner], self.side
        if tuple(x.shape[1:]) != tuple(self.low.shape):
            raise InputError(
                f"pictures of shape {tuple(x.shape[1:])} for patches from {tuple(self.low.shape)}",
                "pictures like those it was fitted to",
                "fit it to pictures of that shape",
            )
        if bool((gone != gone[:, :1]).any()):
            raise InputError("some channels of a pixel without the others", "whole pixels", "use ap.groups.Squares")
        top, left = (self._corner(gone[:, 0].any(axis), owner) for axis in (2, 1))
        at = torch.arange(side, device=x.device)
        rows, columns = (top[:, None] + at)[:, :, None], (left[:, None] + at)[:, None, :]
        every = torch.arange(len(x), device=x.device)
        absent = gone[every[:, None, None], 0, rows, columns].flatten(1)
        kinds, kind = torch.unique(absent, dim=0, return_inverse=True)
        like = x.new_zeros(1, self.samples, x.shape[1], side * side)
        noise = q.stream("patches").normal(like, owner, draw)
        out = x[:, None].expand(-1, self.samples, *x.shape[1:]).clone()
        for i, pattern in enumerate(kinds):
            if not bool(pattern.any()):
                continue
            of = (kind == i).nonzero()[:, 0]
            w, u = pattern.nonzero()[:, 0], (~pattern).nonzero()[:, 0]
            pixels = x[of[:, None, None], :, rows[of], columns[of]].flatten(1, 2).mT  # [n, C, side²]
            centre, root = self._given(w, u, tree.wide(pixels[..., u]))
            drawn = centre[:, None] + torch.einsum("cvw,nkcw->nkcv", root, noise[of][..., w].to(root))
            y, z = top[of, None] + w // side, left[of, None] + w % side
            limits = [limit.to(drawn)[:, y, z].movedim(0, 1)[:, None] for limit in (self.low, self.high)]
            out[of[:, None], :, :, y, z] = drawn.clamp(*limits).to(x.dtype).permute(0, 3, 1, 2)
        return out

    def _corner(self, gone: Tensor, owner: Tensor) -> Tensor:
        """Find where the patch around what is absent begins along an axis, [R, length]."""
        length = gone.shape[1]
        first, last = gone.int().argmax(1), length - 1 - gone.flip(1).int().argmax(1)
        last = torch.where(gone.any(1), last, first)
        if bool((last - first >= self.side).any()):
            row = int((last - first).argmax())
            raise InputError(
                f"a coalition of example {int(owner[row])} without pixels over {int((last - first)[row]) + 1}",
                f"at most the side of a patch, {self.side}",
                "leave out one small window at a time, or fit larger patches",
            )
        return ((first + last + 1 - self.side) // 2).clamp(0, length - self.side)

    def _given(self, w: Tensor, u: Tensor, known: Float[Tensor, "n C u"]) -> tuple[Tensor, Tensor]:
        """Give the mean of w for each row, [n, C, w], and a root of its covariance, [C, w, w]."""
        mean, cov = self.mean.to(known), self.covariance.to(known)
        across = cov[:, w][:, :, u]
        slope = across @ torch.linalg.pinv(cov[:, u][:, :, u], hermitian=True) if len(u) else across
        centre = mean[:, w] + torch.einsum("cwu,ncu->ncw", slope, known - mean[:, u])
        rest = cov[:, w][:, :, w] - slope @ across.mT
        values, vectors = torch.linalg.eigh((rest + rest.mT) / 2)
        return centre, vectors * values.clamp(min=0).sqrt()[:, None]
