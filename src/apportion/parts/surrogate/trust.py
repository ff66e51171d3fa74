"""How far to trust a local surrogate: R² on samples it has not seen, and whether a re-run says the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.core.config import Configurable
from apportion.parts.surrogate.regressions import rounding
from apportion.parts.surrogate.selections import top

_NORMAL = 1.959963984540054  # the two-sided 95 per cent point

FEWEST = 10
"""Different samples to judge a model on; with fewer, an interval by the normal distribution means nothing."""


@dataclass(frozen=True)
class Trust(Configurable):
    """What is asked of a fit, by further runs with other random numbers, each as dear as the first.

    The first run's model is judged on the samples of the others (R² with a 95 per cent interval), and all runs on
    each other. Without re-runs nothing is known of either, and results say so.

    Attributes:
        reruns: further runs.
        least_r2: a held-out R² below draws a warning.
        least_stability: an index below draws a warning.
        top: where no feature is left out, how many of the largest make the set that is compared.
    """

    _not_negative = ("reruns",)
    _positive = ("top",)

    reruns: int = 1
    least_r2: float = 0.5
    least_stability: float = 0.7
    top: int = 5


class Judged(NamedTuple):
    """A share of explained variance with its interval."""

    r2: Float[Tensor, "*b"]
    low: Float[Tensor, "*b"]
    high: Float[Tensor, "*b"]


def held_out(v: Float[Tensor, "*b N"], predicted: Float[Tensor, "*b N"], w: Float[Tensor, "*b N"]) -> Judged:
    """Give the weighted R² of predictions about their targets' mean, with a 95 per cent interval.

    The interval is that of the logarithm of a ratio of two means, 1 - R², by the delta method, so that it never
    passes 1; it takes the samples as drawn independently of the predictions.

    >>> v = torch.tensor([0.0, 1.0, 2.0, 3.0])
    >>> [round(float(t), 2) for t in held_out(v, v + torch.tensor([0.1, -0.1, 0.1, 0.1]), torch.ones(4))]
    [0.99, 0.98, 1.0]
    """
    mean = (w * v).sum(-1, keepdim=True) / w.sum(-1, keepdim=True)
    missed, spread = w * (v - predicted).square(), w * (v - mean).square()
    a, b = missed.sum(-1), spread.sum(-1)
    least = rounding(v, w)
    known = (a > least) & (b > least)
    ratio = torch.where(known, a / torch.where(known, b, 1), torch.where(a > least, 1.0, 0.0).to(a))
    count = (w > 0).sum(-1)
    away = missed / torch.where(known, a, 1)[..., None] - spread / torch.where(known, b, 1)[..., None]
    error = torch.where(known, (away.square().sum(-1) * count / (count - 1).clamp(min=1)).sqrt(), 0)
    factor = (_NORMAL * error).exp()
    return Judged(1 - ratio, 1 - ratio * factor, 1 - ratio / factor)


def unseen(fitted: Int[Tensor, "*b N"], asked: Int[Tensor, "*b M"]) -> Bool[Tensor, "*b M"]:
    """Mark the samples, by their numbers, that are not among those of a fit.

    >>> unseen(torch.tensor([[3, 1, 3]]), torch.tensor([[1, 2, 3, 4]])).tolist()
    [[False, True, False, True]]
    """
    known = fitted.sort(-1).values
    at = torch.searchsorted(known, asked.contiguous()).clamp(max=known.shape[-1] - 1)
    return known.gather(-1, at) != asked


def different(numbers: Int[Tensor, "*b N"], among: Bool[Tensor, "*b N"]) -> Int[Tensor, "*b"]:
    """Count different numbers, none of them negative.

    >>> different(torch.tensor([5, 7, 5, 9]), torch.tensor([True, True, True, False])).item()
    2
    """
    ordered = numbers.masked_fill(~among, -1).sort(-1).values
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    return (new & (ordered >= 0)).sum(-1)


def coefficient_stability(
    coefficients: Sequence[Float[Tensor, "*b P"]],
    errors: Sequence[Float[Tensor, "*b P"]],
    in_play: Bool[Tensor, "*b P"],
) -> Float[Tensor, "*b"]:
    """Give CSI: over pairs of runs and features, how often 95 per cent intervals overlap; Visani et al. 2020.

    Args:
        coefficients: of each run.
        errors: their standard errors.
        in_play: features that count; those selected in any run.
    """
    b, e = torch.stack(list(coefficients)), _NORMAL * torch.stack(list(errors))
    slack = 1e-9 * b.abs().amax((0, -1), keepdim=True)  # runs that agree to rounding have intervals of no length
    apart = (b[:, None] - b[None]).abs() <= e[:, None] + e[None] + slack
    one, other = torch.triu_indices(len(b), len(b), 1)
    share = apart[one, other].double().mean(0)
    count = in_play.sum(-1)
    return torch.where(count > 0, (share * in_play).sum(-1) / count.clamp(min=1), 1)


def variable_stability(
    coefficients: Sequence[Float[Tensor, "*b P"]], kept: Sequence[Bool[Tensor, "*b P"]], count: int
) -> Float[Tensor, "*b"]:
    """Give VSI: over pairs of runs, the share of the selected features that both selected; Visani et al. 2020.

    Args:
        coefficients: of each run.
        kept: the features each run selected.
        count: where a run selected more, those with the largest coefficients are compared.
    """
    size = torch.stack(list(coefficients)).abs()
    real = size > 1e-9 * size.amax((0, -1), keepdim=True)  # the order of what rounding left means nothing
    sets = torch.stack([top(b, count, k & r) for b, k, r in zip(size, kept, real, strict=True)])
    one, other = torch.triu_indices(len(sets), len(sets), 1)
    size = torch.maximum(sets[one].sum(-1), sets[other].sum(-1))
    both = (sets[one] & sets[other]).sum(-1)
    return torch.where(size > 0, both / size.clamp(min=1), 1).double().mean(0)
