"""Least-angle regression on weighted samples, batched, with a test at every step."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.parts.surrogate.neighborhoods import Drawn
from apportion.parts.surrogate.regressions import Centered, factor_of, rounding


class Way(NamedTuple):
    """The first steps of a path.

    Attributes:
        order: the features in the order in which they joined, -1 where none was left.
        kept: the same as a mask.
        lead: by how much each was more correlated with the residual than the runner-up, as a weighted mean over
            samples in units of the score's standard deviation; 0 where the score does not vary.
        p_value: how often a lead as large would come by chance, one-sided, by the central limit theorem.
    """

    order: Int[Tensor, "B k"]
    kept: Bool[Tensor, "B P"]
    lead: Float[Tensor, "B k"]
    p_value: Float[Tensor, "B k"]


def lars(drawn: Drawn, w: Float[Tensor, "B N"], present: Bool[Tensor, "B P"], count: int) -> Way:
    """Walk the least-angle path (Efron et al. 2004) until `count` features have joined.

    Features are centered, not scaled. None leaves the path again, unlike in the lasso's.

    Args:
        drawn: the samples.
        w: their weights.
        present: features that may join.
        count: how many are to join.
    """
    c = Centered.of(drawn.z, drawn.v, w, present)
    players = present.shape[1]
    count = min(count, players)
    number = (drawn.w > 0).sum(1)
    kept = torch.zeros_like(present)
    b = torch.zeros_like(c.cross)
    order, leads, p_values = [], [], []
    for _ in range(count):
        # how far to go until the next feature is as correlated with the residual as those on the path
        along = c.cross - (c.gram @ b[..., None]).squeeze(-1)
        height = torch.where(kept, along.abs(), 0).amax(-1)
        sign = torch.where(kept, along.sign(), 0)
        both = kept[:, :, None] & kept[:, None, :]
        lower, _ = factor_of(torch.where(both, c.gram, 0), 0.0, kept)
        direction = torch.where(kept, torch.cholesky_solve(sign[..., None], lower).squeeze(-1), 0)
        slope = (c.gram @ direction[..., None]).squeeze(-1)
        free = present & ~kept & (c.gram.diagonal(dim1=-2, dim2=-1) > 0)
        up, down = (
            torch.where(free & (1 - s * slope > 1e-12), (height[:, None] - s * along) / (1 - s * slope), float("inf"))
            for s in (1, -1)
        )
        meet = torch.minimum(up, down).clamp(min=0)
        step = torch.where(kept.any(-1), meet.amin(-1), 0)
        step = torch.where(torch.isfinite(step), torch.minimum(step, height), 0)
        b = b + step[:, None] * direction
        along = c.cross - (c.gram @ b[..., None]).squeeze(-1)
        size = torch.where(free, along.abs(), -1)
        best, at = size.topk(min(2, players), -1)
        first = at[:, 0]
        joins = best[:, 0] > 0
        if players > 1:
            lead, p = _test(c, b, along, at, number)
            alone = best[:, 1] < 0  # no runner-up: nothing to be told apart
            lead, p = torch.where(joins & ~alone, lead, 0), torch.where(joins & ~alone, p, 0)
        else:
            lead, p = torch.zeros_like(height), torch.zeros_like(height)
        kept = kept | (torch.nn.functional.one_hot(first, players).bool() & joins[:, None])
        order.append(torch.where(joins, first, -1))
        leads.append(lead)
        p_values.append(p)
    return Way(torch.stack(order, 1), kept, torch.stack(leads, 1), torch.stack(p_values, 1))


def _test(c: Centered, b: Tensor, along: Tensor, at: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
    """Test whether the first feature's correlation with the residual exceeds the second's."""
    left = c.v - (c.z @ b[..., None]).squeeze(-1)
    sign = along.gather(1, at).sign()
    pair = c.z.gather(2, at[:, None].expand(-1, c.z.shape[1], -1)) * sign[:, None]
    lead = c.w * left * (pair[..., 0] - pair[..., 1])
    total = lead.sum(-1)
    count = number.to(total).clamp(min=2)
    spread = ((lead.square().sum(-1) - total.square() / count).clamp(min=0) * count / (count - 1)).sqrt()
    score = total / torch.where(spread > 0, spread, 1)
    p = torch.where(spread > 0, torch.special.ndtr(-score), torch.where(total > 0, 0.0, 1.0).to(total))
    weight, varied = c.w.sum(-1), (c.w * c.v.square()).sum(-1)
    varies = varied > rounding(c.v + c.v_mean[..., None], c.w)
    unit = (weight * varied).sqrt()
    return torch.where(varies, total / torch.where(varies, unit, 1), 0), p
