"""Ranks of methods by a metric: tests and sizes of their differences over the same examples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from apportion.core.errors import ConfigError, InputError, kind_of
from apportion.metrics.scores import Direction, Scores, differences, verdicts
from apportion.metrics.statistics import leveled, ranks

_EVERY = 13
"""Examples up to which every assignment of signs is tried."""

_EXACT = 50
"""Examples up to which p is exact where no two differences are equal."""

_AT_ONCE = 1 << 22
"""Numbers that a step over pairs holds."""


@dataclass(frozen=True, eq=False, repr=False)
class Ranks:
    """How methods compare by a metric. Tables are [M, M]: row against column, NaN on the diagonal.

    Attributes:
        methods: their names.
        metric: the name of the metric.
        direction: which end is better; where neither is, higher counts as the first rank.
        mean_rank: over the examples where every method that has any has a score, 1 the best, ties by their mean.
        complete: how many these are.
        difference: row minus column over the examples that both have, summed up as the metric's source does.
        low: the lower end of its bootstrap interval at 95 %.
        high: the upper end.
        p: of Wilcoxon's signed-rank test, two-sided.
        holm: the same corrected for all pairs by Holm's procedure.
        cles: how often row is better than column on an example, ties counted half.
        kendall_w: how far examples agree on the ranks: 1 entirely, 0 not at all.
        kendall_p: of the hypothesis that they do not, by χ² with M - 1 degrees of freedom (Friedman's test).
        warnings: scores that do not beat their controls, and what is not to be trusted for want of examples.
    """

    methods: tuple[str, ...]
    metric: str
    direction: Direction
    mean_rank: Float[Tensor, " M"]
    complete: int
    difference: Float[Tensor, "M M"]
    low: Float[Tensor, "M M"]
    high: Float[Tensor, "M M"]
    p: Float[Tensor, "M M"]
    holm: Float[Tensor, "M M"]
    cles: Float[Tensor, "M M"]
    kendall_w: float
    kendall_p: float
    warnings: tuple[str, ...] = ()

    def __repr__(self) -> str:
        order = self.mean_rank.argsort().tolist()
        lines = [f"{self.metric}, {self.direction.value}; Kendall's W {self.kendall_w:.2f} (p {self.kendall_p:.2g})"]
        lines += [f"  {float(self.mean_rank[i]):.2f}  {self.methods[i]}" for i in order]
        for at, i in enumerate(order):
            for j in order[at + 1 :]:
                low, high = float(self.low[i, j]), float(self.high[i, j])
                by = f"{float(self.difference[i, j]):.3g} [{low:.3g}, {high:.3g}]"
                share, p = float(self.cles[i, j]), float(self.holm[i, j])
                lines.append(f"  {self.methods[i]} - {self.methods[j]}: {by}, better on {share:.0%}, Holm p {p:.2g}")
        lines += [f"  warning: {w}" for w in self.warnings]
        return "\n".join(lines)


def rank_methods(scores: Mapping[str, Scores], metric: str | None = None) -> Ranks:
    """Compare methods by one metric over the same examples.

    Differences are those of `Scores.difference`; tests, ranks and effect sizes are of the examples. The signed-rank
    test drops differences of 0 (Wilcoxon 1945); p is exact for up to 13 others, for up to 50 without ties, and else
    by the normal limit. Holm's correction (1979) is over all pairs. The effect size is the common-language one (McGraw
    & Wong 1992) on pairs of the same example: P(row better) + P(equal) / 2. With ranks r[b, m] of M methods on B
    examples, Kendall's coefficient of concordance (Kendall & Babington Smith 1939) is

    W = 12 Σ_m (R_m - B (M + 1) / 2)² / (B² (M³ - M) - B Σ_b T_b),

    where R_m = Σ_b r[b, m] and T_b = Σ (t³ - t) over the ties of t methods on example b.

    Args:
        scores: of each method by one metric, such as `Evaluation.of` gives.
        metric: what to call it; its class unless given.

    Raises:
        InputError: fewer than two methods, or other examples, metrics or settings among them.
        ConfigError: SciPy is not installed.
    """
    if not isinstance(scores, Mapping) or len(scores) < 2 or not all(isinstance(s, Scores) for s in scores.values()):
        raise InputError(
            f"{len(scores)} method(s)" if isinstance(scores, Mapping) else kind_of(scores),
            "a dict of scores of two methods or more",
            "write rank_methods(evaluation.of('a metric'))",
        )
    try:
        from scipy import stats
    except ModuleNotFoundError as error:
        raise ConfigError(
            "scipy is not installed, which tests of ranks need", "the evaluation extra", "pip install scipy"
        ) from error
    names, held = tuple(scores), list(scores.values())
    first, count = held[0], len(scores)
    sign = -1.0 if first.direction is Direction.LOWER else 1.0
    pairs = list(combinations(range(count), 2))
    i, j = torch.tensor(pairs).T
    by = differences([(held[a], held[b]) for a, b in pairs])
    table = leveled(torch.stack([s.values.detach().cpu().double() for s in held], 1), max(s.rounding for s in held))
    share, chance = [], []
    for some in torch.arange(len(pairs)).split(max(1, _AT_ONCE // max(1, len(table)))):
        d = (table[:, i[some]] - table[:, j[some]]).T
        share.append(((sign * d > 0).double() + (d == 0).double() / 2).masked_fill(d.isnan(), torch.nan).nanmean(1))
        chance.append(_signed_ranks(d))
    each, often = torch.cat(chance), torch.cat(share)
    corrected = torch.tensor(_holm(each.tolist()), dtype=torch.float64)
    above = torch.stack([by[0], by[1], by[2], each, corrected, often])
    below = torch.stack([-by[0], -by[2], -by[1], each, corrected, 1 - often])
    tables = torch.full((6, count, count), math.nan, dtype=torch.float64)
    tables[:, i, j], tables[:, j, i] = above, below
    difference, low, high, p, holm, cles = tables
    scored = ~table.isnan().all(0)  # a method without any score takes no part
    some = int(scored.sum())
    whole = table[:, scored][~table[:, scored].isnan().any(1)] if some else table[:0, scored]
    placed = ranks(-sign * whole)
    w = _kendall(placed)
    agreed = float(stats.chi2.sf(len(placed) * (some - 1) * w, some - 1)) if not math.isnan(w) else math.nan
    mean_rank = torch.full((count,), math.nan, dtype=torch.float64)
    if len(placed):
        mean_rank[scored] = placed.mean(0)
    return Ranks(
        names,
        metric or first.name,
        first.direction,
        mean_rank,
        len(placed),
        difference,
        low,
        high,
        p,
        holm,
        cles,
        w,
        agreed,
        tuple(_warnings(scores, len(placed))),
    )


def _signed_ranks(d: Float[Tensor, "P B"]) -> Float[Tensor, " P"]:
    """Test rows of differences by Wilcoxon's signed ranks, two-sided, without zeros; NaN are of no example.

    By every assignment of signs for few; else by the distribution without ties, or its limit, corrected for them.
    """
    from scipy import stats

    p = torch.full((len(d),), math.nan, dtype=torch.float64)
    known = ~d.isnan() & (d != 0)
    p[(d == 0).any(1) & ~known.any(1)] = 1.0
    sizes = known.sum(1)
    for n in sizes.unique().tolist():
        at = (sizes == n).nonzero()[:, 0]
        if not n:
            continue
        v = d[at][known[at]].reshape(len(at), n)
        size = v.abs().sort(1).values
        plain = (size[:, 1:] != size[:, :-1]).all(1)
        if n <= _EVERY:
            p[at] = _by_every_sign(v)
            continue
        for rows, how in ((plain & (n <= _EXACT), "exact"), (~(plain & (n <= _EXACT)), "asymptotic")):
            if bool(rows.any()):
                test: Any = stats.wilcoxon(v[rows].numpy(), method=how, axis=1)
                p[at[rows]] = torch.from_numpy(np.asarray(test.pvalue, dtype=np.float64))
    return p


def _by_every_sign(d: Float[Tensor, "P B"]) -> Float[Tensor, " P"]:
    """Test few differences exactly: twice the share of the assignments of signs with as low or as high a rank sum."""
    r = ranks(d.abs())
    signs = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * d.shape[1]).reshape(-1, d.shape[1])
    found = []
    for some, up in zip(r.split(_AT_ONCE // len(signs)), (d > 0).split(_AT_ONCE // len(signs)), strict=True):
        sums, seen = some @ signs.T, (some * up).sum(1, keepdim=True)  # of halves: exact
        found.append(torch.minimum((sums <= seen).double().mean(1), (sums >= seen).double().mean(1)))
    return (2 * torch.cat(found)).clamp(max=1)


def _holm(p: list[float]) -> list[float]:
    """Correct p-values for their number, stepping down from the smallest; NaN takes no part.

    >>> _holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    known = sorted((v, i) for i, v in enumerate(p) if not math.isnan(v))
    out, least = [math.nan] * len(p), 0.0
    for at, (value, i) in enumerate(known):
        least = max(least, min(1.0, (len(known) - at) * value))
        out[i] = least
    return out


def _kendall(ranks: Float[Tensor, "B M"]) -> float:
    """Measure how far examples agree on the order of methods; NaN where all tie on all examples."""
    examples, methods = ranks.shape
    sums = ranks.sum(0)
    spread = ((sums - examples * (methods + 1) / 2) ** 2).sum()
    same = (ranks[:, :, None] == ranks[:, None]).double().sum(2)
    ties = (same**2 - 1).sum()  # each of t tied methods adds t² - 1
    most = examples**2 * (methods**3 - methods) - examples * ties
    return float(12 * spread / most) if float(most) > 0 else math.nan


def _warnings(scores: Mapping[str, Scores], complete: int) -> list[str]:
    said = []
    beside = [(s, control) for s in scores.values() for control in s.controls.values()]
    told = iter(verdicts(beside))
    for name, s in scores.items():
        if bool(s.values.isnan().all()):
            said.append(f"{name} has no score, and takes no part")
        lost = [control for control in s.controls if next(told) is False]
        if lost:
            said.append(f"{name} does not beat {', '.join(lost)}: its rank says little")
    if complete < len(next(iter(scores.values()))):
        said.append(f"ranks are of the {complete} example(s) on which every method has a score")
    if complete < 6:
        said.append(f"{complete} example(s): no difference can be significant at 5 %, two-sided")
    return said


__all__ = ["Ranks", "rank_methods"]
