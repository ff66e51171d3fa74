"""Methods across groups of metrics: which are no better than another one anywhere."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.core.config import Configurable
from apportion.core.errors import ConfigError, kind_of
from apportion.metrics.scores import Direction, Scores, differences, resampled
from apportion.metrics.statistics import levels, ranks

_OF_FAMILY = {
    "ablation": "faithfulness",
    "fidelity": "faithfulness",
    "axioms": "axioms",
    "complexity": "complexity",
    "noise": "complexity",
    "localization": "localization",
    "randomization": "randomization",
}
"""The group that a folder of metrics belongs to; agreement is no merit."""

_ROBUSTNESS = frozenset({"AverageSensitivity", "LocalLipschitz", "MaxSensitivity", "RelativeStability"})
"""Metrics of the folder of fidelity that look at what small changes of the example do to its map."""

_ORDER = ("faithfulness", "complexity", "robustness", "localization", "axioms", "randomization")


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """Methods across groups of metrics. Groups are never added up: what they are worth is the reader's to say.

    Attributes:
        groups: names of metrics by the name of their group.
        scores: of each method by each metric.
        dominated: for each method that is dominated, by which: in every group as good by each metric and better by one.
        surely: the same where the other is better beyond chance by one metric of every group, and nowhere worse
            beyond chance. Each pair stands alone at 95 %: with many methods and one group some pair will by luck.
        left_out: metrics of no group, without a better end, or undefined for every method.
    """

    groups: Mapping[str, tuple[str, ...]]
    scores: Mapping[str, Mapping[str, Scores]]
    dominated: Mapping[str, tuple[str, ...]]
    surely: Mapping[str, tuple[str, ...]]
    left_out: tuple[str, ...] = ()

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods."""
        return tuple(self.scores)

    def standing(self, group: str) -> Float[Tensor, "3 M"]:
        """Give where methods stand in a group: the value, and the ends of its bootstrap interval at 95 %.

        Of a group with one metric that is its `Scores.center`. Of a larger one it is the mean, over its metrics, of
        the rank of the method's center, 1 the best; NaN where one of them is undefined.

        Args:
            group: its name.
        """
        metrics = self.groups[group]
        drawn = []
        for metric in metrics:
            held = [self.scores[m][metric] for m in self.methods]
            found, column = resampled([(s, ~s.values.isnan().cpu()) for s in held])
            sign = 1 if held[0].direction is Direction.LOWER else -1
            drawn.append((sign, max(s.rounding for s in held), found[:, column]))
        if len(metrics) == 1:
            each = drawn[0][2]
        else:
            placed = [ranks(levels(sign * d, r).double()).masked_fill(d.isnan(), torch.nan) for sign, r, d in drawn]
            each = torch.stack(placed).mean(0)
        ends = torch.nanquantile(each[1:], each.new_tensor([0.025, 0.975]), 0)
        return torch.cat([each[:1], ends])

    def show(self, groups: Sequence[str] | None = None) -> Any:
        """Draw every pair of groups as the axes of a panel; needs the image extra.

        Args:
            groups: those to draw; those of faithfulness, complexity, robustness and localization unless given, or
                all where these are no two.
        """
        from apportion.show.scores import comparison

        named = [g for g in self.groups if g in _ORDER[:4]]
        return comparison(self, groups or (named if len(named) > 1 else list(self.groups)))

    def __repr__(self) -> str:
        lines = [f"{group}: {', '.join(metrics)}" for group, metrics in self.groups.items()]
        if self.left_out:
            lines.append(f"left out: {', '.join(self.left_out)}")
        for method in self.methods:
            by = self.dominated.get(method)
            sure = self.surely.get(method)
            told = f"dominated by {', '.join(by)}" if by else "not dominated"
            beyond = f"; beyond chance by {', '.join(sure)}" if sure else ""
            lines.append(f"  {method}: {told}{beyond}")
        return "\n".join(lines)


def compare(
    scores: Mapping[str, Mapping[str, Scores]], groups: Mapping[str, Sequence[str]] | None = None
) -> Comparison:
    """Find the methods that another one dominates in every group of metrics.

    Args:
        scores: `scores[method][metric]`.
        groups: names of metrics by group; by the folder a metric is from unless given.

    Raises:
        ConfigError: a metric that is not there, no group, or one without a metric.
    """
    methods = list(scores)
    there = scores[methods[0]]
    by_folder = groups is None
    if groups is None:
        found: dict[str, list[str]] = {}
        for name, s in there.items():
            if (group := _group(s)) is not None:
                found.setdefault(group, []).append(name)
        groups = {name: found[name] for name in _ORDER if name in found}
    if not isinstance(groups, Mapping) or any(isinstance(m, str) for m in groups.values()):
        raise ConfigError(
            f"{kind_of(groups)} as groups", "names of metrics by group", "write {'mine': ['a metric', 'another']}"
        )
    unknown = [m for metrics in groups.values() for m in metrics if m not in there]
    if unknown:
        raise ConfigError(f"metric {unknown[0]!r} in a group", f"one of {list(there)}", "name metrics of .metrics")
    blind = {m for m in there if all(bool(held[m].values.isnan().all()) for held in scores.values())}
    blind |= {m for m, s in there.items() if s.direction is Direction.NEITHER}
    judging = {g: tuple(m for m in metrics if m not in blind) for g, metrics in groups.items()}
    if by_folder:
        judging = {g: metrics for g, metrics in judging.items() if metrics}
    if not judging or not all(judging.values()):
        raise ConfigError(
            f"groups {dict(judging)}",
            "a metric with a better end, and defined, in every group",
            "give groups={'faithfulness': [...], ...}",
        )
    dominated: dict[str, list[str]] = {}
    surely: dict[str, list[str]] = {}
    better, sure = [], []
    for metrics in judging.values():
        gains = torch.stack([_gains([held[m] for held in scores.values()]) for m in metrics])
        by, low, high = gains.unbind(1)
        better.append((by >= 0).all(0) & (by > 0).any(0))
        sure.append((high >= 0).all(0) & (low > 0).any(0))
    everywhere = torch.stack(better).all(0)
    beyond = everywhere & torch.stack(sure).all(0)
    for i, one in enumerate(methods):
        for found_in, where in ((dominated, everywhere), (surely, beyond)):
            if bool(where[:, i].any()):
                found_in[one] = [methods[k] for k in where[:, i].nonzero()[:, 0].tolist()]
    used = {m for metrics in judging.values() for m in metrics}
    return Comparison(
        judging,
        scores,
        {k: tuple(v) for k, v in dominated.items()},
        {k: tuple(v) for k, v in surely.items()},
        tuple(m for m in there if m not in used),
    )


def _gains(held: Sequence[Scores]) -> Float[Tensor, "3 M M"]:
    """Measure by how much row is better than column on the same examples, with the ends of the interval."""
    out = torch.full((3, len(held), len(held)), torch.nan, dtype=torch.float64)
    pairs = list(itertools.combinations(range(len(held)), 2))
    if not pairs:
        return out
    i, j = torch.tensor(pairs).T
    by, low, high = differences([(held[a], held[b]) for a, b in pairs])
    up, down = torch.stack([by, low, high]), torch.stack([-by, -high, -low])
    if held[0].direction is Direction.LOWER:
        up, down = down, up
    out[:, i, j], out[:, j, i] = up, down
    return out


def _group(s: Scores) -> str | None:
    cls = Configurable._known.get(s.name)
    if cls is None:
        return None
    *_, folder, _ = ("", "", *cls.__module__.split("."))
    return "robustness" if s.name in _ROBUSTNESS else _OF_FAMILY.get(folder)
