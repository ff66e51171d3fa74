"""Scores: what a metric found, example by example, and summaries of them that can be merged."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from apportion.core.attribution import Cost
from apportion.core.config import Json
from apportion.core.errors import ConfigError, InputError, kind_of
from apportion.core.streams import Stream

REPLICATES = 1000
"""Bootstrap replicates of a summary."""

_BLOCK = 2048
"""Examples whose counts are held at once."""

_AT_ONCE = 1 << 22
"""Numbers that a step over replicates or pairs holds."""

_ROUNDING = 64 * torch.finfo(torch.float64).eps
"""Share of two sums by which they may differ when they are of the same numbers."""

LEAST = 6
"""Examples from which chance can be told: with fewer, percentiles of the bootstrap promise too much."""


class Direction(Enum):
    """Which end of a metric is the better one."""

    HIGHER = "higher is better"
    LOWER = "lower is better"
    NEITHER = "neither end is better"


@dataclass(frozen=True, eq=False)
class Curve:
    """A curve for each example: what a number of some x became.

    Attributes:
        x: positions, [K] for all examples or [B, K].
        y: heights, [B, K]; NaN where undefined.
        x_label: what x is, with its unit.
        y_label: what y is, with its unit.
    """

    x: Float[Tensor, "... K"]
    y: Float[Tensor, "B K"]
    x_label: str
    y_label: str


@dataclass(frozen=True, eq=False)
class Summary:
    """The mean over examples with a bootstrap interval, mergeable with that of other examples.

    Each example counts Poisson(1) times in each replicate, drawn from a stream of its id (Chamandy et al. 2012), so
    that summaries of parts of a data set add up to that of the whole.

    Attributes:
        sums: Σ of count times value, with every count 1 first, then in each replicate.
        counts: Σ of counts, likewise.
        undefined: examples without a value, which do not enter.
        level: of the interval.
    """

    sums: Float[Tensor, " R"]
    counts: Float[Tensor, " R"]
    undefined: int
    level: float = 0.95

    @classmethod
    def of(cls, values: Float[Tensor, " B"], ids: Sequence[Any], seed: int = 0, level: float = 0.95) -> Summary:
        """Summarize values; NaN counts as undefined.

        >>> s = Summary.of(torch.tensor([1.0, 2.0, float("nan")]), ["a", "b", "c"])
        >>> s.mean, s.n, s.undefined
        (1.5, 2, 1)
        """
        if not 0 < level < 1:
            raise ConfigError(f"level={level!r}", "between 0 and 1", "write level=.95")
        known = ~values.isnan()
        v = values.detach().cpu().double()[known.cpu()]
        named = [i for i, k in zip(ids, known.tolist(), strict=True) if k]
        sums = torch.zeros(2, 1 + REPLICATES, dtype=torch.float64)
        for part, times in blocks(named, seed):
            sums += _total(torch.stack([v[part], torch.ones_like(v[part])], 1), times).T
        return cls(sums[0], sums[1], int((~known).sum()), level)

    def __add__(self, other: Summary) -> Summary:
        if not isinstance(other, Summary):
            return NotImplemented
        if self.level != other.level or self.sums.shape != other.sums.shape:
            raise ConfigError(
                f"summaries at level {self.level:g} and {other.level:g}", "one level", "summarize both alike"
            )
        return Summary(self.sums + other.sums, self.counts + other.counts, self.undefined + other.undefined, self.level)

    @property
    def n(self) -> int:
        """Examples with a value."""
        return int(self.counts[0])

    @property
    def mean(self) -> float:
        """Over the examples with a value; NaN if there is none."""
        return float(self.sums[0] / self.counts[0]) if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Percentiles of the replicates' means; infinite with fewer than two values, which show no spread."""
        if self.n < 2:
            return (-math.inf, math.inf)
        _, low, high = ends((self.sums / self.counts)[:, None], self.counts[:1], self.level)[:, 0].tolist()
        return low, high

    def __repr__(self) -> str:
        low, high = self.interval
        missing = f", {self.undefined} undefined" if self.undefined else ""
        return f"{self.mean:.4g} [{low:.4g}, {high:.4g}] ({self.n} example(s){missing})"


def medians(y: Float[Tensor, "B K"], times: Shaped[Tensor, "B R"]) -> Float[Tensor, "R K"]:
    """Give the median of each column, of whose entries each counts so many times; NaN where none does."""
    if not len(y):
        return y.new_full((times.shape[1], y.shape[1]), math.nan)
    found = []
    wide = max(1, _AT_ONCE // len(y))
    for v in y.T:  # a column at a time: there may be a thousand, with a thousand replicates each
        v, order = v.sort()
        middle = []
        for some in times.split(wide, 1):
            total = some[order].cumsum(0, dtype=torch.float64)
            half = total[-1] / 2
            first, next_ = (total >= half).int().argmax(0), (total > half).int().argmax(0)  # two where counts are even
            middle.append((v[first] + v[next_]) / 2)
        found.append(torch.cat(middle))
    return torch.stack(found, 1).masked_fill((times.sum(0) == 0)[:, None], torch.nan)


def blocks(ids: Sequence[Any], seed: int) -> Iterator[tuple[slice, Float[Tensor, "b R"]]]:
    """Draw `counts` for some examples at a time, with a column of ones before them: memory is flat in examples."""
    for start in range(0, len(ids), _BLOCK):
        part = slice(start, start + _BLOCK)
        drawn = counts(ids[part], seed)
        yield part, torch.cat([drawn.new_ones(len(drawn), 1), drawn], 1)


def counts(ids: Sequence[Any], seed: int = 0, replicates: int = REPLICATES) -> Float[Tensor, "B R"]:
    """Draw how often each example counts in each bootstrap replicate: Poisson(1), by its id alone."""
    if not ids:
        return torch.zeros(0, replicates, dtype=torch.float64)
    owner, like = torch.arange(len(ids)), torch.zeros(len(ids), replicates)
    uniform: Tensor = Stream.of(seed, ids, "bootstrap").uniform(like, owner, 0 * owner)
    steps = torch.tensor([math.exp(-1) / math.factorial(k) for k in range(12)], dtype=torch.float64).cumsum(0)
    return torch.searchsorted(steps, uniform.double()).double()


_OF_EXAMPLES = ("step", "insertion step", "deletion step")
"""What goes by the sizes of examples, and follows from the rest."""


def _all_resolved(parts: Sequence[Json]) -> Json:
    """Put together what ran for several examples."""
    found: dict[str, Json] = {}
    for name, value in ((n, v) for p in parts for n, v in p.items()):
        if name in _OF_EXAMPLES and name in found:
            known = found[name] if isinstance(found[name], list) else [found[name]]
            new = value if isinstance(value, list) else [value]
            both = list(dict.fromkeys([*known, *new]))
            found[name] = both if len(both) > 1 else both[0]
        else:
            found[name] = value
    return found


@dataclass(frozen=True, eq=False, repr=False)
class Scores:
    """What a metric found of one attribution, example by example.

    Attributes:
        values: one number per example; NaN where the metric is undefined, and `undefined` says why.
        metric: the metric's configuration: every setting.
        direction: which end is better.
        of: the name of what was judged.
        method: its configuration.
        score: the configuration of the score that was explained.
        target: the resolved target of each example.
        ids: names of the examples.
        seed: of all random numbers.
        cost: rows spent by the metric, without making the map.
        curves: what the number was made from, by name.
        parts: named companions, one row an example.
        undefined: reasons, and for each the examples it holds for.
        controls: what the same metric gives maps that know nothing of the model, by name.
        warnings: what deserves a look.
        statistic: how the source sums up examples: "mean", "median" or "median curve".
        tensors: tensors that configurations name by digest.
        blind_is_best: whether maps that know nothing of the model are best by definition.
        resolved: what ran where the metric's settings leave it to the field or the examples: the normalization, the
            site, the bounds, groups and step; a list where the step differs with the examples.
        rounding: the share of two scores' size by which they may differ and be equal on paper; nothing ranks or tests
            such a difference.
    """

    values: Float[Tensor, " B"]
    metric: Json
    direction: Direction
    of: str
    method: Json
    score: Json
    target: Any
    ids: tuple[Any, ...]
    seed: int
    cost: Cost
    curves: Mapping[str, Curve] = field(default_factory=dict)
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    undefined: Mapping[str, Bool[Tensor, " B"]] = field(default_factory=dict)
    controls: Mapping[str, Scores] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    statistic: str = "mean"
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    blind_is_best: bool = False
    resolved: Json = field(default_factory=dict)
    rounding: float = 0.0

    def __len__(self) -> int:
        return len(self.values)

    @property
    def name(self) -> str:
        """The metric's class."""
        return self.metric["type"]

    def summary(self, level: float = 0.95) -> Summary:
        """Sum up the examples by their mean, mergeable; `center` sums up as the metric's source does."""
        return Summary.of(self.values, self.ids, self.seed, level)

    def median(self, level: float = 0.95) -> tuple[float, float, float]:
        """Sum up the examples by their median, with a bootstrap interval: median, low, high; NaN without a value.

        Where `statistic` is "median curve", it is the area under the curve of medians, which is not the median area.
        """
        return (replace(self, statistic="median") if self.statistic == "mean" else self).center(level)

    def center(self, level: float = 0.95) -> tuple[float, float, float]:
        """Sum up the examples as the source does, by `statistic`: the number, and its bootstrap interval."""
        return centers([self], level)[0]

    def difference(self, other: Scores, level: float = 0.95) -> tuple[float, float, float]:
        """Subtract the center of other scores, over the examples with both values: the number, and its interval.

        Raises:
            InputError: as `against`.
        """
        by, low, high = differences([(self, other)], level)[:, 0].tolist()
        return by, low, high

    def replicates(self, where: Bool[Tensor, " B"] | None = None) -> Float[Tensor, " R"]:
        """Sum up as `center` does: with every example once first, then in each bootstrap replicate.

        Args:
            where: the examples that count, of those with a value; all unless given.
        """
        known = ~self.values.isnan()
        return resampled([(self, (known if where is None else where & known).cpu())])[0][:, 0]

    def against(self, other: Scores) -> Summary:
        """Sum up the differences to scores of the same examples by the same metric: this minus the other.

        Raises:
            InputError: other examples, or another metric.
        """
        self.comparable(other)
        return Summary.of(self.values - other.values, self.ids, self.seed)

    def comparable(self, other: Any) -> None:
        """Refuse scores of other examples, by another metric, or where other settings ran."""
        if not isinstance(other, Scores) or other.ids != self.ids or other.metric != self.metric:
            raise InputError(
                f"scores of {getattr(other, 'of', kind_of(other))} beside those of {self.of}",
                "the same metric, settings and examples",
                "judge both on the same data",
            )
        self._same_settings(other)

    def _same_settings(self, other: Scores) -> None:
        held = [{"score": s.score, **s.resolved} for s in (self, other)]
        for name in held[0]:
            mine, its = (h.get(name) for h in held)
            if name in held[1] and mine != its and name not in _OF_EXAMPLES:
                raise InputError(
                    f"scores of {other.of} with {name} {json.dumps(its)} beside those of {self.of}, "
                    f"with {name} {json.dumps(mine)}",
                    "the same field, and the same settings in what ran",
                    "judge both with one field",
                )

    def beats(self, control: str) -> bool | None:
        """Tell whether `center` lies beyond a control's on the better side, beyond chance.

        None without a direction, where maps that know nothing of the model are best by definition, and with fewer
        than 6 examples that have both values.
        """
        if control not in self.controls:
            raise InputError(
                f"control {control!r}", f"one of {sorted(self.controls)}", "ask for it with controls=[...]"
            )
        return verdicts([(self, self.controls[control])])[0]

    def show(self) -> Any:
        """Draw the curves with bootstrap bands, controls beside, as a Matplotlib figure; needs the image extra."""
        from apportion.show.scores import scores

        return scores(self)

    def records(self) -> list[dict[str, Any]]:
        """List one plain record an example, controls after the judged map."""
        reason = [""] * len(self)
        for why, where in self.undefined.items():
            for i in where.nonzero()[:, 0].tolist():
                reason[i] = why
        target = self.target.tolist() if isinstance(self.target, Tensor) else [self.target] * len(self)
        own = [
            {
                "id": self.ids[i],
                "method": self.of,
                "metric": self.name,
                "value": v,
                "direction": self.direction.value,
                "target": target[i],
                "undefined": reason[i],
            }
            for i, v in enumerate(self.values.tolist())
        ]
        return own + [r for c in self.controls.values() for r in c.records()]

    @staticmethod
    def join(parts: Sequence[Scores]) -> Scores:
        """Put scores of different examples together.

        Raises:
            InputError: nothing, or scores of different metrics or methods.
        """
        if not parts:
            raise InputError("no scores", "one or more", "judge at least one example")
        first = parts[0]
        for other in parts[1:]:
            first._same_settings(other)
            if other.metric != first.metric or other.of != first.of:
                raise InputError(
                    f"scores of {other.of} by {other.name} beside those of {first.of} by {first.name}",
                    "one metric with one configuration, and one method",
                    "join them one by one",
                )
        named = [set(p.controls) for p in parts]
        shared = set.intersection(*named)
        targets = [p.target for p in parts]
        joined = torch.cat(targets) if all(isinstance(t, Tensor) for t in targets) else targets[0]
        reasons = {why for p in parts for why in p.undefined}
        none = [torch.zeros(len(p), dtype=torch.bool, device=p.values.device) for p in parts]
        return replace(
            first,
            values=torch.cat([p.values for p in parts]),
            target=joined,
            ids=tuple(i for p in parts for i in p.ids),
            cost=_joined_cost([p.cost for p in parts]),
            curves={k: _joined_curve([p.curves.get(k) for p in parts], parts) for k in _names(p.curves for p in parts)},
            parts={k: _joined_part([p.parts.get(k) for p in parts], parts) for k in _names(p.parts for p in parts)},
            undefined={
                w: torch.cat([p.undefined.get(w, no) for p, no in zip(parts, none, strict=True)])
                for w in sorted(reasons)
            },
            controls={k: Scores.join([p.controls[k] for p in parts]) for k in first.controls if k in shared},
            warnings=told_once(p.warnings for p in parts),
            resolved=_all_resolved([p.resolved for p in parts]),
            rounding=max(p.rounding for p in parts),
            tensors={k: t for p in parts for k, t in p.tensors.items()},
        )

    def __repr__(self) -> str:
        lines = [f"{self.name} of {self.of}: {worded(self)}; {self.direction.value}"]
        for name, scores in self.controls.items():
            verdict = {True: "beaten", False: "not beaten", None: "beside"}[self.beats(name)]
            lines.append(f"  {name}: {worded(scores)}, {verdict}")
        lines += [f"  undefined for {int(where.sum())}: {why}" for why, where in self.undefined.items()]
        lines += [f"  warning: {w}" for w in self.warnings]
        return "\n".join(lines)


def resampled(asked: Sequence[tuple[Scores, Bool[Tensor, " B"]]]) -> tuple[Float[Tensor, "R C"], Int[Tensor, " A"]]:
    """Sum up scores of the same examples, each over some of these, as `Scores.replicates` does one by one.

    The examples' counts in the replicates are drawn once for all.

    Args:
        asked: scores, and the examples that count, all with a value.

    Returns:
        A column for all that is asked alike, and the column of each.
    """
    keys = [(id(s), m.numpy().tobytes()) for s, m in asked]
    distinct = dict(zip(keys, asked, strict=True))
    place = {key: at for at, key in enumerate(distinct)}
    column = torch.tensor([place[key] for key in keys])
    first = asked[0][0]
    out = torch.empty(1 + REPLICATES, len(distinct), dtype=torch.float64)
    means = torch.tensor([s.statistic == "mean" for s, _ in distinct.values()])
    if bool(means.any()):
        out[:, means] = _means([a for a in distinct.values() if a[0].statistic == "mean"], first.ids, first.seed)
    if not bool(means.all()):
        times = torch.cat([times.to(torch.uint8) for _, times in blocks(first.ids, first.seed)])
        rest = [_median(s, m, times) for s, m in distinct.values() if s.statistic != "mean"]
        out[:, ~means] = torch.stack(rest, 1)
    return out, column


def _total(values: Float[Tensor, "B A"], times: Float[Tensor, "B R"]) -> Float[Tensor, "R A"]:
    """Sum values that count so many times: an infinite one that does not count adds nothing."""
    total = times.T @ values.nan_to_num(0, 0, 0)
    for end in (math.inf, -math.inf):
        at = values == end
        if bool(at.any()):
            total += torch.where(times.T @ at.double() > 0, end, 0.0)
    return total


def _means(asked: Sequence[tuple[Scores, Bool[Tensor, " B"]]], ids: Sequence[Any], seed: int) -> Float[Tensor, "R A"]:
    held = {id(s): s for s, _ in asked}
    masks = {m.numpy().tobytes(): m for _, m in asked}
    values = torch.stack([s.values.detach().cpu().double() for s in held.values()], 1)
    within = torch.stack(list(masks.values()), 1)
    v = torch.tensor([list(held).index(id(s)) for s, _ in asked])
    u = torch.tensor([list(masks).index(m.numpy().tobytes()) for _, m in asked])
    totals = torch.zeros(1 + REPLICATES, len(asked), dtype=torch.float64)
    numbers = torch.zeros(1 + REPLICATES, len(masks), dtype=torch.float64)
    for part, times in blocks(ids, seed):
        inside = within[part]
        totals += _total(values[part][:, v].masked_fill(~inside[:, u], 0), times)
        numbers += times.T @ inside.double()
    return totals / numbers[:, u]


def _median(s: Scores, where: Bool[Tensor, " B"], times: Shaped[Tensor, "B R"]) -> Float[Tensor, " R"]:
    if not bool(where.any()):  # where the metric failed there are no curves, either
        return torch.full((times.shape[1],), math.nan, dtype=torch.float64)
    if s.statistic == "median":
        return medians(s.values.detach().cpu().double()[where][:, None], times[where])[:, 0]
    (curve,) = s.curves.values()
    y = medians(curve.y.detach().cpu().double()[where], times[where])
    return torch.trapezoid(y, curve.x.detach().cpu().double(), dim=1)


def ends(found: Float[Tensor, "R A"], n: Shaped[Tensor, " A"], level: float = 0.95) -> Float[Tensor, "3 A"]:
    """Read replicates over n examples each: the number, and percentiles; infinite below two, which show no spread."""
    if not 0 < level < 1:
        raise ConfigError(f"level={level!r}", "between 0 and 1", "write level=.95")
    ordered = torch.from_numpy(np.sort(found[1:].T.numpy(), axis=1))  # NaN last; a tenth of the time of nanquantile
    drawn = (~ordered.isnan()).sum(1).double()
    low, high = (_at(ordered, end * (drawn - 1).clamp(min=0)) for end in ((1 - level) / 2, (1 + level) / 2))
    return torch.stack([found[0], low.masked_fill(n < 2, -math.inf), high.masked_fill(n < 2, math.inf)])


def _at(ordered: Float[Tensor, "A R"], place: Float[Tensor, " A"]) -> Float[Tensor, " A"]:
    below, above = (ordered.gather(1, p.long()[:, None])[:, 0] for p in (place.floor(), place.ceil()))
    infinite = below.isinf() | above.isinf()
    return torch.where(infinite, below + above, torch.lerp(below, above, place - place.floor()))


Groups = Sequence[Bool[Tensor, " B"]]
"""Examples of each category, of whose sums the mean is taken; none for all examples as one."""


def _of_groups(
    asked: Sequence[tuple[Scores, Bool[Tensor, " B"]]], groups: Groups
) -> tuple[Float[Tensor, "R C"], Int[Tensor, " A"]]:
    """Sum up as `resampled` within each group, then average over the groups that have a value in the replicate."""
    if not groups:
        return resampled(asked)
    found, column = resampled([(s, m & g) for s, m in asked for g in groups])
    return found[:, column].unflatten(1, (len(asked), len(groups))).nanmean(2), torch.arange(len(asked))


def centers(held: Sequence[Scores], level: float = 0.95, groups: Groups = ()) -> list[tuple[float, float, float]]:
    """Sum up scores of the same examples, each as `Scores.center` does."""
    known = [~s.values.isnan().cpu() for s in held]
    found, column = _of_groups(list(zip(held, known, strict=True)), groups)
    told = ends(found[:, column], torch.stack([k.sum() for k in known]), level)
    return [(value, low, high) for value, low, high in told.T.tolist()]


def differences(
    pairs: Sequence[tuple[Scores, Scores]], level: float = 0.95, groups: Groups = ()
) -> Float[Tensor, "3 P"]:
    """Subtract the second's center from the first's, as `Scores.difference` does one by one: numbers, low, high ends.

    Raises:
        InputError: other examples, or another metric, within a pair.
    """
    for one, other in pairs:
        one.comparable(other)
    known = {id(s): ~s.values.isnan().cpu() for pair in pairs for s in pair}
    both = [known[id(one)] & known[id(other)] for one, other in pairs]
    asked = [(pair[side], b) for side in (0, 1) for pair, b in zip(pairs, both, strict=True)]
    found, column = _of_groups(asked, groups)
    n = torch.stack([b.sum() for b in both])
    scale = {key: _scale(s) for key, s in {id(s): s for pair in pairs for s in pair}.items()}
    told = []
    for at in torch.arange(len(pairs)).split(max(1, _AT_ONCE // len(found))):
        one, other = found[:, column[at]], found[:, column[len(pairs) + at]]
        some = [pairs[k] for k in at.tolist()]
        size = torch.tensor([max(scale[id(a)], scale[id(b)]) for a, b in some], dtype=torch.float64)
        share = torch.tensor([max(_ROUNDING, a.rounding, b.rounding) for a, b in some], dtype=torch.float64)
        by = one - other
        same = by.abs() <= share * torch.maximum(torch.maximum(one.abs(), other.abs()), size)
        told.append(ends(by.masked_fill(same & by.isfinite(), 0.0), n[at], level))
    return torch.cat(told, 1)


def _scale(s: Scores) -> float:
    """Give the size of the numbers that a mean is of, which tells how much of it is rounding."""
    size = s.values.detach().double().abs()
    return float(size[size.isfinite()].mean().nan_to_num(0)) if s.statistic == "mean" else 0.0


def verdicts(pairs: Sequence[tuple[Scores, Scores]], groups: Groups = ()) -> list[bool | None]:
    """Tell of scores and a control's whether they are beaten, as `Scores.beats` does one by one."""
    if not pairs:
        return []
    said: list[bool | None] = []
    _, low, high = differences(pairs, groups=groups)
    for (one, other), least, most in zip(pairs, low.tolist(), high.tolist(), strict=True):
        both = int((~(one.values.isnan().cpu() | other.values.isnan().cpu())).sum())
        blind = one.direction is Direction.NEITHER or one.blind_is_best
        won = least > 0 if one.direction is Direction.HIGHER else most < 0
        said.append(None if blind or both < LEAST else won)
    return said


def worded(scores: Scores, level: float = 0.95) -> str:
    """Say what the examples come to, as the source sums them up."""
    if scores.statistic == "mean":
        return repr(scores.summary(level))
    value, low, high = scores.center(level)
    missing = int(scores.values.isnan().sum())
    count = f"{len(scores) - missing} example(s)" + (f", {missing} undefined" if missing else "")
    return f"{scores.statistic} {value:.4g} [{low:.4g}, {high:.4g}] ({count})"


def by_category(
    scores: Scores, categories: Sequence[Any], where: Bool[Tensor, " B"] | None = None, level: float = 0.95
) -> tuple[tuple[float, float, float], dict[Any, Summary]]:
    """Average each category first, then over categories, so that frequent ones do not count for more.

    Args:
        scores: of the examples.
        categories: one an example.
        where: the examples that count, such as `scores.parts["difficult"]`; all unless given.
        level: of the intervals.

    Returns:
        The mean over categories with a defined example, with the ends of its bootstrap interval, of whose replicates
        each averages over the categories that it has; and the summary of each category.

    Raises:
        InputError: another number of categories.
    """
    kept = torch.ones(len(scores), dtype=torch.bool) if where is None else where.cpu()
    named = {c: g & kept for c, g in groups_of(categories, len(scores)).items() if bool((g & kept).any())}
    own = replace(scores, values=scores.values.cpu().masked_fill(~kept, math.nan), statistic="mean")
    found = {}
    for c, group in named.items():
        ids = [i for i, k in zip(scores.ids, group.tolist(), strict=True) if k]
        found[c] = Summary.of(scores.values.cpu()[group], ids, scores.seed, level)
    return centers([own], level, list(named.values()))[0], found


def groups_of(categories: Sequence[Any], count: int) -> dict[Any, Bool[Tensor, " B"]]:
    """Tell of each category which examples are of it.

    Raises:
        InputError: another number of categories than examples.
    """
    if len(categories) != count:
        raise InputError(f"{len(categories)} categories for {count} example(s)", "one each", "give one an example")
    plain = categories.tolist() if isinstance(categories, Tensor) else list(categories)
    return {c: torch.tensor([own == c for own in plain]) for c in dict.fromkeys(plain)}


def _joined_cost(costs: Sequence[Cost]) -> Cost:
    forward, backward, at_x = (torch.cat([getattr(c, n) for c in costs]) for n in ("forward", "backward", "at_x"))
    return Cost(forward, backward, at_x, checks=sum(c.checks for c in costs))


def _names(of: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for one in of for name in one))


def _joined_part(found: Sequence[Tensor | None], parts: Sequence[Scores]) -> Tensor:
    """Join companions; examples without, for which a metric failed, get NaN, and so do players they do not have."""
    like = next(t for t in found if t is not None)
    if len({t.shape[1] for t in found if t is not None and t.ndim == 2}) > 1:  # one number a player, of fewer players
        most = max(t.shape[1] for t in found if t is not None)
        pad = torch.nn.functional.pad
        found = [None if t is None else pad(t, (0, most - t.shape[1]), value=math.nan) for t in found]
        like = next(t for t in found if t is not None)
    if all(t is not None for t in found):
        return torch.cat([t for t in found if t is not None])
    wide = like if like.is_floating_point() else like.double()
    missing = [wide.new_full((len(p), *like.shape[1:]), math.nan) for p in parts]
    return torch.cat([m if t is None else t for t, m in zip(found, missing, strict=True)])


def _joined_curve(found: Sequence[Curve | None], parts: Sequence[Scores]) -> Curve:
    """Join curves; those of examples without, and the ends of shorter ones, are NaN."""
    first = next(c for c in found if c is not None)
    alike = all(c is None or (c.x.ndim == 1 and torch.equal(c.x, first.x)) for c in found)
    most = max(c.y.shape[1] for c in found if c is not None)

    def laid(t: Tensor | None, count: int) -> Tensor:
        if t is None:
            return first.y.new_full((count, most), math.nan)
        return torch.nn.functional.pad(t.expand(count, -1), (0, most - t.shape[-1]), value=math.nan)

    pairs = list(zip(found, parts, strict=True))
    y = torch.cat([laid(None if c is None else c.y, len(p)) for c, p in pairs])
    x = first.x if alike else torch.cat([laid(None if c is None else c.x, len(p)).to(first.x.dtype) for c, p in pairs])
    return Curve(x, y, first.x_label, first.y_label)


__all__ = ["Curve", "Direction", "Scores", "Summary", "by_category", "counts"]


def told_once(parts: Iterable[Iterable[str]]) -> tuple[str, ...]:
    """Give the warnings of several batches once each: the first of those that differ in numbers alone.

    Numbers that not all batches give are said to be of one.
    """
    mark = " (numbers of one batch)"
    held = [tuple(dict.fromkeys(part)) for part in parts]
    found: dict[str, list[str]] = {}
    for warning in (w for part in held for w in part):
        found.setdefault(re.sub(r"\d+(\.\d+)?(e[-+]?\d+)?", "#", warning.removesuffix(mark)), []).append(warning)
    told = []
    for kind, all_told in found.items():
        first = all_told[0].removesuffix(mark)
        everywhere = set(all_told) == {first} and len(all_told) == len(held)
        told.append(first if everywhere or kind == first else first + mark)
    return tuple(told)
