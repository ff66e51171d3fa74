"""Noisy linear imputation: absent pixels as the mean of their neighbours, all at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.core.errors import InputError
from apportion.core.protocols import Owner
from apportion.core.question import Question
from apportion.core.tree import Tree
from apportion.parts.masks.fill import Fill, kept_pictures


@dataclass(frozen=True)
class NoisyLinear(Fill):
    """Each absent pixel is the weighted mean of its eight neighbours, absent ones included, and noise.

    This is the imputation of ROAD (Rong et al. 2022). Weights are 1/6 for neighbours across an edge and 1/12 across a
    corner, those beyond the border left out and the rest scaled to sum 1. The sparse system over all absent pixels of
    a row is solved by conjugate gradients, all rows together.

    Attributes:
        noise: standard deviation of what is added to the solution, in units of the input.
        tolerance: on the residual, relative to the right-hand side.

    Raises:
        InputError: inputs that are no pictures, soft masks, or a picture without a pixel left.

    >>> import apportion as ap
    >>> q = ap.Field(lambda x: x.flatten(1).sum(1)).bind(torch.arange(9.0).reshape(1, 1, 3, 3))
    >>> kept = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    >>> kept[..., 1, 1] = False
    >>> NoisyLinear(noise=0.0)(q, kept, torch.tensor([0]), torch.tensor([0]))[0, 0, 0, 1]
    tensor([3., 4., 5.])
    """

    _positive = ("tolerance",)
    _not_negative = ("noise",)

    noise: float = 0.01
    tolerance: float = 1e-5

    @property
    def random(self) -> bool:
        return self.noise > 0

    def __call__(self, q: Question, mask: Tree, owner: Owner, draw: Int[Tensor, " R"]) -> Tree:
        kept = kept_pictures(q, mask, "NoisyLinear")
        none = ~kept.flatten(2).any(2).all(1)
        if bool(none.any()):
            raise InputError(
                f"NoisyLinear for example {int(owner[none.nonzero()[0, 0]])} without a pixel left",
                "coalitions that keep some pixels",
                "keep some: limit= of deletion and insertion stops before the last, groups may leave pixels out (-1)",
            )
        x = q.x[owner]
        wide = x.to(torch.promote_types(x.dtype, torch.float32)).flatten(0, 1)
        solved, done = impute(wide, kept.flatten(0, 1), self.tolerance)
        if not done:
            q.warn(f"NoisyLinear: some systems were not solved to {self.tolerance:g}")
        out = solved.reshape(x.shape)
        if self.noise:
            n = q.stream("noisy linear").normal(q.x, owner, draw)
            out = out + self.noise * n
        return out.to(x.dtype)[:, None]


def _neighbours(u: Float[Tensor, "N H W"]) -> Float[Tensor, "N H W"]:
    """Sum the eight neighbours, 1/6 across edges and 1/12 across corners: (1 2 1)' (1 2 1) / 12 without its centre."""
    p = F.pad(u, (1, 1, 1, 1))
    down = p[:, :-2] + 2 * p[:, 1:-1] + p[:, 2:]
    return (down[:, :, :-2] + 2 * down[:, :, 1:-1] + down[:, :, 2:] - 4 * u) / 12


def impute(
    x: Float[Tensor, "N H W"], kept: Bool[Tensor, "N H W"], tolerance: float
) -> tuple[Float[Tensor, "N H W"], bool]:
    """Solve for the pixels that are not kept.

    Args:
        x: maps.
        kept: where they are known; somewhere in each.
        tolerance: as in `NoisyLinear`.

    Returns:
        The maps with what is missing filled, and whether every system was solved to the tolerance.
    """
    gone = (~kept).to(x)
    known = x * kept
    degree = _neighbours(torch.ones_like(x[:1]))

    def apply(u: Tensor) -> Tensor:  # symmetric, and positive definite on the missing pixels
        return gone * (degree * u - _neighbours(u))

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).flatten(1).sum(1)[:, None, None]

    right = gone * _neighbours(known)
    start = known.flatten(1).sum(1) / kept.flatten(1).sum(1)
    u = gone * start[:, None, None]
    r = right - apply(u)
    z = r / degree
    p = z
    rz = dot(r, z)
    goal = tolerance**2 * dot(right, right).clamp(min=torch.finfo(x.dtype).tiny)
    live = dot(r, r) > goal
    for _ in range(10 * (x.shape[1] + x.shape[2])):
        if not bool(live.any()):
            break
        ap = apply(p)
        below = dot(p, ap)
        step = torch.where(live & (below > 0), rz / torch.where(below > 0, below, 1), 0)
        u, r = u + step * p, r - step * ap
        z = r / degree
        new = dot(r, z)
        p = z + torch.where(rz > 0, new / torch.where(rz > 0, rz, 1), 0) * p
        rz = new
        live = live & (dot(r, r) > goal)
    return known + u, not bool(live.any())
