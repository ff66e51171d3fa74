"""How far a map's mass is from the object, by optimal transport."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, hypot
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from apportion.core.card import Paper
from apportion.core.errors import ConfigError, InputError
from apportion.core.question import Question
from apportion.core.tree import Tree
from apportion.metrics.localization.pointing import TRUTH, made_up
from apportion.metrics.localization.region import OnRegions, masks, picture_map, regions
from apportion.metrics.metric import Found, Metric, MetricCard, Subject, register
from apportion.metrics.scores import Direction

_PAIRS = 1 << 23
"""Pixels by pixels of the object that are solved unasked: some ten seconds."""


@register(
    MetricCard(
        title="Earth mover's distance",
        paper=Paper(
            "Clark, Wilming, Haufe",
            2024,
            "XAI-TRIS: non-linear image benchmarks to test false positive post-hoc attribution of feature importance",
            "Machine Learning 113",
        ),
        intent="How short the way is from a map's mass to the object, evenly spread.",
        direction=Direction.HIGHER,
        truth=TRUTH,
        range=(0.0, 1.0),
        chance="far from 0: an even map has about .8 for a small object in the middle, and .5 for one in a corner",
        cautions=(
            "Most maps have more than .5: only differences from ap.controls.AllOnes(), Edges() and Laplace() tell.",
            "The whole object is asked for: a map wholly on one of two objects may have less than an even one.",
        ),
    )
)
@dataclass(frozen=True)
class EarthMoverSimilarity(OnRegions):
    """1 - EMD / D: the least work that turns |m|, of mass 1, into the object, evenly of mass 1, over the farthest way.

    EMD is min Σ_ij π_ij d_ij over π ≥ 0 with Σ_j π_ij = |m_i| / Σ |m| and Σ_i π_ij = 1 / |object| for its pixels j;
    d_ij is Euclidean, in pixels, and D the largest, between opposite corners. `parts["distance"]` is EMD. The plan is
    exact, by the network simplex of POT, which the authors take too. Their code has D = √(H² + W²), longer by a
    pixel's diagonal; it stops after 200,000 steps, and leaves out examples that fail.

    Time grows with pixels times pixels of the object: for one that covers a fifth 2 ms at 8 × 8, .03 s at 32 × 32, 2 s
    at 64 × 64, and at 224 × 224 more than five minutes. By `side` cells of k × k pixels are transported instead, from
    center to center, which moves the value by at most √2 (k - 1) / D, about 1 / side.

    Undefined without an object, and for zeros, which have no mass to move.

    Attributes:
        side: cells along the longer side; pixels unless given, where they are few enough. Whoever names the picture's
            own size gets pixels, however long that takes.

    Raises:
        ConfigError: POT is not installed.
        InputError: more than 2²³ pairs of pixels, and no `side`.

    Source: Clark et al. (2024), beside the precision of as many pixels as the object has, which is `RelevanceRank`.

    >>> import apportion as ap
    >>> map, mask = torch.tensor([[[[1.0, 0.0, 0.0, 0.0, 0.0]]]]), torch.tensor([[[0, 0, 0, 1, 0]]])
    >>> s = EarthMoverSimilarity()(ap.Field(lambda x: x.sum((1, 2, 3))), torch.zeros(1, 1, 1, 5), map, truth=mask)
    >>> s.values, s.parts["distance"]
    (tensor([0.2500]), tensor([3.]))
    """

    side: int | None = None

    _positive = ("side",)

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Solve example by example."""
        emd2 = _solver()
        m = picture_map(q, subject)
        on = masks(regions(truth, m), m)
        each = self._pixels(on)
        mass, wanted = _cells(m.double().abs(), each), _cells(on.double(), each)
        places = [each * torch.arange(n, dtype=torch.float64) + (each - 1) / 2 for n in mass.shape[1:]]
        at = torch.cartesian_prod(*places)
        missing, none = ~on.flatten(1).any(1), ~mass.flatten(1).any(1)
        work = torch.full((len(m),), torch.nan, dtype=torch.float64)
        for i in (~(missing | none)).nonzero()[:, 0].tolist():
            here, there = mass[i].flatten().cpu(), wanted[i].flatten().cpu()
            ways = torch.cdist(at[here > 0], at[there > 0], compute_mode="donot_use_mm_for_euclid_dist")
            a, b = ((v[v > 0] / v.max()) for v in (here, there))
            work[i] = _least(emd2, a / a.sum(), b / b.sum(), ways, i)
        work = work.to(m)
        farthest = hypot(m.shape[1] - 1, m.shape[2] - 1) or 1.0
        return Found(
            1 - work / farthest,
            parts={"distance": work},
            undefined={"no object": missing, "a map of zeros": none & ~missing},
        )

    def check_truth(self, q: Question, truth: Any) -> None:
        """Refuse pictures that would take long, too."""
        super().check_truth(q, truth)
        _solver()
        if isinstance(q.x, Tensor) and q.x.ndim == 4:
            self._pixels(masks(regions(truth, q.x[:, 0]), q.x))

    def _pixels(self, on: Bool[Tensor, "B H W"]) -> int:
        """Give the pixels along a cell."""
        high, wide = on.shape[1:]
        if self.side is not None:
            return ceil(max(high, wide) / self.side)
        most = int(on.flatten(1).sum(1).max())
        if high * wide * most > _PAIRS:
            raise InputError(
                f"{high} × {wide} pixels to transport to an object of {most}",
                f"{_PAIRS} pairs of them at most, some ten seconds of work",
                "write EarthMoverSimilarity(side=32), for cells that large instead of pixels",
            )
        return 1

    @classmethod
    def variants(cls) -> tuple[Metric, ...]:
        return cls(), cls(side=4)

    @classmethod
    def example_truth(cls, x: Tree) -> Any:
        return made_up(x)


def _solver() -> Callable[..., Any]:
    try:
        from ot import emd2  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ConfigError(
            "POT is not installed, which finds the least work", "the evaluation extra", "pip install pot"
        ) from error
    return emd2


def _cells(t: Float[Tensor, "B H W"], each: int) -> Float[Tensor, "B h w"]:
    """Sum over squares, the last of which the border may cut."""
    return F.avg_pool2d(t[:, None], each, ceil_mode=True, divisor_override=1)[:, 0]


def _least(
    emd2: Callable[..., Any], a: Float[Tensor, " n"], b: Float[Tensor, " m"], ways: Float[Tensor, "n m"], example: int
) -> float:
    work, log = emd2(a.numpy(), b.numpy(), ways.numpy(), numItermax=1 << 30, log=True)
    if log["warning"] is not None:
        raise InputError(
            f"a transport for example {example} that POT cannot solve: {log['warning']}",
            "masses it can tell from rounding",
            "judge this map by another metric",
        )
    return float(work)
