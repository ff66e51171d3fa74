"""Deletion and insertion (Petsiuk et al. 2018): the class's probability while pixels go, or come, by rank.

What the curves mean depends on choices that are made here once, and stated with every result: pixels are ranked by
their values summed over channels, all channels of a pixel go together, ties go by position, both ends are included,
the area is by trapezoids over the share of pixels and is not divided by the probability at x.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Score = Callable[[Tensor, Tensor], Tensor]
"""Rows [R, C, H, W] and the index [R] of the example each belongs to, to one number [R] each."""


def ranking(values: Tensor) -> Tensor:
    """Rank the pixels of maps [B, C, H, W] or [B, H, W], highest first: [B, H W], rank 0 being the first to go."""
    flat = (values.sum(1) if values.ndim == 4 else values).flatten(1)
    order = flat.argsort(dim=1, descending=True, stable=True)
    ranks = torch.empty_like(order)
    return ranks.scatter_(1, order, torch.arange(flat.shape[1]).expand_as(order).contiguous())


def curve(score: Score, start: Tensor, end: Tensor, ranks: Tensor, steps: int, batch: int = 256) -> Tensor:
    """Score the way from `start` to `end` [B, C, H, W] in equal steps of pixels by rank: [B, steps + 1].

    Deletion goes from the picture to its substrate, insertion from the substrate to the picture.
    """
    count, pixels = ranks.shape
    taken = torch.arange(steps + 1) * pixels // steps
    owner = torch.arange(count).repeat_interleave(steps + 1)
    until = taken.repeat(count)
    out = []
    with torch.no_grad():
        for o, k in zip(owner.split(batch), until.split(batch), strict=True):
            gone = (ranks[o] < k[:, None]).reshape(-1, 1, *start.shape[2:])
            out.append(score(torch.where(gone, end[o], start[o]), o))
    return torch.cat(out).reshape(count, steps + 1)


def area(scores: Tensor) -> Tensor:
    """Integrate curves [B, n + 1] over the share of pixels by trapezoids."""
    return (scores.sum(1) - scores[:, 0] / 2 - scores[:, -1] / 2) / (scores.shape[1] - 1)


def insertion_and_deletion(
    score: Score, x: Tensor, values: Tensor, gone: Tensor, blurred: Tensor, steps: int, batch: int = 256
) -> tuple[Tensor, Tensor]:
    """Give the areas [B] under insertion, from `blurred`, and under deletion, to `gone`."""
    ranks = ranking(values)
    inserted = area(curve(score, blurred.expand_as(x), x, ranks, steps, batch))
    return inserted, area(curve(score, x, gone.expand_as(x), ranks, steps, batch))


def rise_blur(x: Tensor) -> Tensor:
    """Blur as the authors of RISE do: 11 x 11 pixels of a Gaussian with sigma 5, zeros beyond the border.

    Their kernel is a blurred delta with reflecting borders, so it is folded back at the edge and sums to 1.
    """
    from apportion.parts.baselines import blur

    delta = torch.zeros(1, 1, 11, 11)
    delta[..., 5, 5] = 1
    kernel = blur(delta, 5.0).to(x)
    return F.conv2d(x, kernel.expand(x.shape[1], 1, 11, 11), padding=5, groups=x.shape[1])


def random_map(x: Tensor, seed: int = 0) -> Tensor:
    """Rank pixels at random: the control that knows nothing."""
    return torch.rand(len(x), *x.shape[2:], generator=torch.Generator().manual_seed(seed))


def centre_map(x: Tensor) -> Tensor:
    """Rank pixels by their distance from the middle: the control that knows where photographers point."""
    h, w = x.shape[2:]
    i, j = torch.arange(h) - (h - 1) / 2, torch.arange(w) - (w - 1) / 2
    return torch.exp(-((i[:, None] / h) ** 2 + (j / w) ** 2) * 8).expand(len(x), h, w)


def interval(values: Tensor, draws: int = 2000, seed: int = 0) -> dict[str, float]:
    """Give the mean over examples [B] with its 95 % bootstrap interval (percentiles)."""
    generator = torch.Generator().manual_seed(seed)
    values = values.double()
    picks = torch.randint(len(values), (draws, len(values)), generator=generator)
    low, high = values[picks].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"mean": values.mean().item(), "low": low, "high": high}


def shown(found: dict[str, float], digits: int = 3) -> str:
    """Write a mean and its interval."""
    return f"{found['mean']:.{digits}f} [{found['low']:.{digits}f}, {found['high']:.{digits}f}]"
