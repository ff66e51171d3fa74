"""Reliability: how far what a metric says of methods would be said again, by other examples, metrics or draws."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.core.errors import InputError, kind_of
from apportion.metrics.scores import LEAST, REPLICATES, Direction, Scores, blocks, ends
from apportion.metrics.statistics import levels, ranks

_AT_ONCE = 1 << 22
"""Numbers that a step over replicates or examples holds."""


@dataclass(frozen=True, eq=False, repr=False)
class Reliability:
    """Four measures of how reliable a metric is; where there are three rows, they are number, low and high end.

    Attributes:
        metric: its name.
        methods: names of the methods.
        inter_rater: as of `inter_rater`.
        inter_method: as of `inter_method`.
        internal_consistency: as of `internal_consistency`, with each other metric.
        retest: the correlation of `test_retest`; None where there was no second run.
        spread: the standard deviation of its draws.
        warnings: what is undefined, and what is not to be trusted for want of examples.
    """

    metric: str
    methods: tuple[str, ...]
    inter_rater: Float[Tensor, " 3"]
    inter_method: Float[Tensor, "3 M M"]
    internal_consistency: Mapping[str, Float[Tensor, "3 M"]] = field(default_factory=dict)
    retest: Float[Tensor, "3 M"] | None = None
    spread: Float[Tensor, " M"] | None = None
    warnings: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        scores: Mapping[str, Mapping[str, Scores]],
        metric: str,
        again: Mapping[str, Mapping[str, Scores]] | None = None,
    ) -> Reliability:
        """Measure the reliability of a metric in every way there is data for.

        Args:
            scores: `scores[method][metric]`, of which the other metrics are what it is held to be consistent with.
            metric: its name.
            again: the same with another seed.

        Raises:
            InputError: as of the measures, and where a method has no scores by one of the metrics.
        """
        own = _by(scores, metric)
        alpha, between = inter_rater(own), inter_method(own)
        beside = {other: _by(scores, other) for other in next(iter(scores.values())) if other != metric}
        others = {other: internal_consistency(own, held) for other, held in beside.items()}
        second = None if again is None else _by(again, metric)
        twice = None if second is None else test_retest(own, second)
        said = []
        for name, s in own.items():
            known = s.values[~s.values.isnan()].detach().cpu().double()
            if not len(known):
                said.append(f"{name} has no score, and takes no part")
            elif int(levels(known, s.rounding).amax()) == 0:
                said.append(f"all scores of {name} are equal: no correlation is defined")
        few = {what: n for what, n in _examples(own, beside, second).items() if n < LEAST}
        if few:
            each = ", ".join(f"{what} ({n})" for what, n in few.items())
            said.append(f"{min(few.values())} example(s) are too few to tell reliability from chance: {each}")
        if len(own) < 2:
            said.append("one method: agreement on an order needs two")
        rho, spread = twice or (None, None)
        return cls(metric, tuple(own), alpha, between, others, rho, spread, tuple(said))

    def __repr__(self) -> str:
        lines = [f"{self.metric}: inter-rater alpha {_told(self.inter_rater)}"]
        rows = torch.triu_indices(len(self.methods), len(self.methods), 1)
        if rows.shape[1]:
            lines.append(f"  inter-method correlation: {_range(self.inter_method[0, rows[0], rows[1]])}")
        for other, found in self.internal_consistency.items():
            lines.append(f"  internal consistency with {other}: {_range(found[0])}")
        if self.retest is not None and self.spread is not None:
            lines.append(f"  test-retest correlation: {_range(self.retest[0])}, spread {_range(self.spread)}")
        return "\n".join(lines + [f"  warning: {w}" for w in self.warnings])


def krippendorff(ratings: Float[Tensor, "R U"]) -> float:
    """Measure how far R raters agree on the order of U units, by Krippendorff's alpha for ordinal numbers.

    1 is agreement and 0 what chance gives; less is disagreement beyond it. With n_uc raters who give unit u the value
    c, m_u of them in all, and n_c the sum over units that two raters or more have rated (n = Σ n_c),

    alpha = 1 - (n - 1) Σ_u Σ_ck n_uc n_uk δ²_ck / (m_u - 1) / Σ_ck n_c n_k δ²_ck,

    where δ_ck = Σ_{g=c..k} n_g - (n_c + n_k) / 2 (Krippendorff 2004, *Content Analysis*, chapter 11).

    Args:
        ratings: of each rater for each unit; NaN where there is none.

    Returns:
        NaN where all ratings that count are equal, or none do.

    Raises:
        InputError: anything but a table.

    >>> krippendorff(torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]))
    1.0
    """
    if not isinstance(ratings, Tensor) or ratings.ndim != 2:
        given = f"ratings of shape {tuple(ratings.shape)}" if isinstance(ratings, Tensor) else kind_of(ratings)
        raise InputError(given, "a tensor with a row for each rater, a column for each unit", "use torch.tensor")
    once = torch.ones(len(ratings), 1, dtype=torch.float64)
    return float(_alpha(ratings.detach().cpu().double(), iter([(slice(None), once)]), 1)[0])


def inter_rater(scores: Mapping[str, Scores]) -> Float[Tensor, " 3"]:
    """Measure how far examples agree on the order of methods: `krippendorff` with examples as raters.

    Units are the methods, and ratings their ranks on an example, ties by their mean (Tomsett et al. 2020). Examples
    on which a method has no score do not count, nor do methods that have none at all.

    The interval is of a bootstrap over examples in which no example is compared with its own copies, which would agree.
    It lies too high with few examples: of four methods with a true alpha of .61 its low end was above that in 15 % of
    300 simulations with six examples and 8 % with thirty, where 2.5 % are due.

    Returns:
        Alpha and the ends of its interval at 95 %; NaN with one example, one method, or nothing but ties.

    Raises:
        InputError: no scores, or other examples, metrics or settings among them.
    """
    held = _held(scores)
    table = torch.stack([s.values.detach().cpu().double() for s in held], 1)
    table = table[:, ~table.isnan().all(0)]
    whole = ~table.isnan().any(1) & bool(table.shape[1])
    first, n = held[0], int(whole.sum())
    if not n or table.shape[1] < 2:
        return _undefined(())
    ids = [name for name, k in zip(first.ids, whole.tolist(), strict=True) if k]
    placed = ranks(levels(table[whole], first.rounding).double())
    found = _alpha(placed, blocks(ids, first.seed), 1 + REPLICATES)
    return ends(found[:, None], torch.tensor([n]))[:, 0] if not found[0].isnan() else _undefined(())


def inter_method(scores: Mapping[str, Scores]) -> Float[Tensor, "3 M M"]:
    """Correlate two methods' scores over the examples that both have, by Spearman's coefficient, for all pairs.

    High where a metric says more of the example than of the map (Tomsett et al. 2020).

    Returns:
        Tables of correlations and of the ends of their bootstrap intervals at 95 %; NaN on the diagonal, and where
        scores are constant or there is but one example.

    Raises:
        InputError: as `inter_rater`.
    """
    held = _held(scores)
    out = torch.full((3, len(held), len(held)), math.nan, dtype=torch.float64)
    pairs = [(i, j) for i in range(len(held)) for j in range(i)]
    if pairs:
        i, j = torch.tensor(pairs).T
        out[:, i, j] = out[:, j, i] = _correlated([(held[a], held[b]) for a, b in pairs])
    return out


def internal_consistency(one: Mapping[str, Scores], other: Mapping[str, Scores]) -> Float[Tensor, "3 M"]:
    """Correlate two metrics' scores of each method over examples, by Spearman's coefficient.

    High where the two metrics measure one thing (Tomsett et al. 2020). Where the better ends of the two are opposite,
    the sign is turned: 1 is agreement on which maps are good.

    Returns:
        For each method the correlation and the ends of its bootstrap interval at 95 %; NaN as for `inter_method`.

    Raises:
        InputError: other methods or examples.
    """
    pairs = _paired(one, other)
    a, b = pairs[0]
    turned = {a.direction, b.direction} == {Direction.HIGHER, Direction.LOWER}
    found = _correlated(pairs)
    return -found[[0, 2, 1]] if turned else found


def test_retest(
    first: Mapping[str, Scores], again: Mapping[str, Scores]
) -> tuple[Float[Tensor, "3 M"], Float[Tensor, " M"]]:
    """Compare two runs of a metric that differ in their seed.

    Returns:
        For each method the Spearman correlation of the runs over examples, with the ends of its bootstrap interval at
        95 %; and the standard deviation of a score over draws, √(mean (a - b)² / 2), in the metric's unit.

    Raises:
        InputError: other methods, examples, metrics or settings, or the same seed.
    """
    pairs = _paired(first, again)
    for one, other in pairs:
        one.comparable(other)
        if one.seed == other.seed:
            raise InputError(f"two runs with seed {one.seed}", "two seeds", "evaluate again with seed=1")
    apart = torch.stack([(a.values - b.values).detach().cpu().double().square().nanmean() for a, b in pairs])
    return _correlated(pairs), (apart / 2).sqrt()


test_retest.__test__ = False  # pyright: ignore[reportFunctionMemberAccess]  # its name is no test's, for pytest


def _by(scores: Any, metric: str) -> dict[str, Scores]:
    if not isinstance(scores, Mapping) or not scores or not all(isinstance(s, Mapping) for s in scores.values()):
        raise InputError(kind_of(scores), "scores[method][metric]", "give evaluation.scores")
    without = [name for name, held in scores.items() if metric not in held]
    if without:
        known = ", ".join(dict.fromkeys(name for held in scores.values() for name in held)) or "nothing"
        raise InputError(
            f"no scores of {', '.join(without)} by {metric!r}; there are some by {known}",
            "every method judged by every metric",
            "judge those too, or leave them out",
        )
    return {name: held[metric] for name, held in scores.items()}


def _examples(
    own: Mapping[str, Scores], beside: Mapping[str, Mapping[str, Scores]], again: Mapping[str, Scores] | None
) -> dict[str, int]:
    """Count the examples that each measure is of: the fewest of any pair, without methods that have no score."""
    known = {name: ~s.values.isnan().cpu() for name, s in own.items()}
    known = {name: k for name, k in known.items() if bool(k.any())}
    if not known:
        return {}
    found = {"inter-rater alpha": int(torch.stack(list(known.values())).all(0).sum())}
    between = [int((a & b).sum()) for a, b in combinations(known.values(), 2)]
    if between:
        found["inter-method correlation"] = min(between)
    runs = {f"internal consistency with {other}": held for other, held in beside.items()}
    runs |= {} if again is None else {"test-retest correlation": again}
    for what, held in runs.items():
        found[what] = min(int((k & ~held[name].values.isnan().cpu()).sum()) for name, k in known.items())
    return found


def _held(scores: Mapping[str, Scores]) -> list[Scores]:
    if not isinstance(scores, Mapping) or not scores or not all(isinstance(s, Scores) for s in scores.values()):
        raise InputError(kind_of(scores), "a dict of the scores of methods", "give evaluation.of('a metric')")
    held = list(scores.values())
    for other in held[1:]:
        held[0].comparable(other)
    return held


def _paired(one: Mapping[str, Scores], other: Mapping[str, Scores]) -> list[tuple[Scores, Scores]]:
    a, b = _held(one), _held(other)
    if list(one) != list(other) or a[0].ids != b[0].ids:
        raise InputError(
            f"scores of {', '.join(one)} beside those of {', '.join(other)}",
            "the same methods and examples, in one order",
            "take both from one evaluation, or from two of the same methods and data",
        )
    return list(zip(a, b, strict=True))


def _alpha(
    ratings: Float[Tensor, "B U"], drawn: Iterator[tuple[slice, Float[Tensor, "b K"]]], count: int
) -> Float[Tensor, " K"]:
    """Compute alpha for raters that count K times over, but are no raters beside themselves."""
    known = ~ratings.isnan()
    values, at = ratings[known].unique(return_inverse=True)
    if not len(values):
        return torch.full((count,), math.nan, dtype=torch.float64)
    codes = torch.zeros(ratings.shape, dtype=torch.long).masked_scatter_(known, at)
    units, kinds = ratings.shape[1], len(values)
    n = torch.zeros(count, units * kinds, dtype=torch.float64)
    own = torch.zeros(count, units, dtype=torch.float64)
    some = max(1, _AT_ONCE // (units * kinds))
    for part, times in drawn:
        for c, k, t in zip(codes[part].split(some), known[part].split(some), times.split(some), strict=True):
            one = torch.nn.functional.one_hot(c, kinds).double() * k[..., None]
            n += t.T @ one.flatten(1)
            own += t.T.square() @ k.double()
    n = n.reshape(count, units, kinds)
    pairs = n.sum(2).square() - own  # of different raters
    n = n * (pairs > 0)[..., None]
    m, total = n.sum(2), n.sum(1)
    place = total.cumsum(1) - total / 2  # δ_ck is how far apart the places of c and k are
    place = place - place.mean(1, keepdim=True)

    def apart(n: Tensor) -> Tensor:
        """Sum squared distances over all pairs, from sums over values."""
        q = place if n.ndim == 2 else place[:, None]
        return 2 * (n.sum(-1) * (n * q.square()).sum(-1) - (n * q).sum(-1).square())

    observed = (apart(n) * m / pairs.clamp(min=1)).sum(1) / total.sum(1)
    expected = apart(total) / (total.sum(1).square() - (own * (pairs > 0)).sum(1))
    return (1 - observed / expected).masked_fill((total > 0).sum(1) < 2, math.nan)


def _correlated(pairs: Sequence[tuple[Scores, Scores]]) -> Float[Tensor, "3 P"]:
    """Correlate pairs of scores of the same examples by Spearman's coefficient, with bootstrap intervals."""
    held = {id(s): s for pair in pairs for s in pair}
    known = {key: ~s.values.isnan().cpu() for key, s in held.items()}
    both: dict[bytes, list[int]] = {}
    for at, (a, b) in enumerate(pairs):
        both.setdefault((known[id(a)] & known[id(b)]).numpy().tobytes(), []).append(at)
    first = pairs[0][0]
    drawn = [times.to(torch.uint8) for _, times in blocks(first.ids, first.seed)]
    times = torch.cat(drawn) if drawn else torch.zeros(0, 1 + REPLICATES, dtype=torch.uint8)
    out = torch.full((3, len(pairs)), math.nan, dtype=torch.float64)
    for where in both.values():  # which is once, where nothing is undefined
        within = known[id(pairs[where[0]][0])] & known[id(pairs[where[0]][1])]
        if int(within.sum()) < 2:
            continue
        columns = {id(s): s for at in where for s in pairs[at]}
        values = torch.stack([s.values.detach().cpu().double()[within] for s in columns.values()])
        codes = levels(values, max(s.rounding for s in columns.values()))
        place = {key: at for at, key in enumerate(columns)}
        i, j = torch.tensor([[place[id(s)] for s in pairs[at]] for at in where]).T
        wide = max(1, _AT_ONCE // codes.numel())
        found = torch.cat([_spearman(codes, t.double(), i, j) for t in times[within].split(wide, 1)])
        n = torch.full((len(where),), int(within.sum()))
        out[:, where] = ends(found, n).masked_fill(found[0].isnan(), math.nan)
    return out


def _spearman(codes: Tensor, times: Float[Tensor, "B R"], i: Tensor, j: Tensor) -> Float[Tensor, "R P"]:
    """Correlate the ranks of rows i and j, [C, B], where each example counts so many times."""
    at, weight = codes[..., None].expand(-1, -1, times.shape[1]), times.expand(len(codes), -1, -1)
    level = torch.zeros(weight.shape, dtype=torch.float64).scatter_add_(1, at, weight)
    placed = (level.cumsum(1) - level + (level + 1) / 2).gather(1, at)
    away = (placed - (placed * weight).sum(1, keepdim=True) / times.sum(0)) * times.sqrt()
    z = away.permute(2, 0, 1)
    shared = z @ z.transpose(1, 2)
    size = shared.diagonal(dim1=1, dim2=2)
    found = shared[:, i, j] / (size[:, i] * size[:, j]).sqrt()
    return found.clamp(-1, 1).masked_fill((size[:, i] == 0) | (size[:, j] == 0), math.nan)


def _undefined(shape: tuple[int, ...]) -> Float[Tensor, "3 ..."]:
    return torch.full((3, *shape), math.nan, dtype=torch.float64)


def _told(found: Float[Tensor, " 3"]) -> str:
    return f"{float(found[0]):.2f} [{float(found[1]):.2f}, {float(found[2]):.2f}]"


def _range(values: Any) -> str:
    known = values[~values.isnan()]
    if not len(known):
        return "undefined"
    return f"{float(known.mean()):.3g} on average ({float(known.min()):.3g} to {float(known.max()):.3g})"


__all__ = [
    "Reliability",
    "inter_method",
    "inter_rater",
    "internal_consistency",
    "krippendorff",
    "test_retest",
]
