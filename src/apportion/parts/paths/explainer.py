"""The base of the methods that add something up along a path."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from apportion.core.attribution import Attribution
from apportion.core.explainer import Explainer, Passes
from apportion.core.question import Question
from apportion.parts.accumulate import Accumulator, Dot
from apportion.parts.paths.path import Path


@dataclass(frozen=True)
class PathExplainer(Explainer):
    """A path and what is added up along it; a subclass says which."""

    @property
    @abstractmethod
    def way(self) -> Path:
        """The path."""

    @property
    def accumulator(self) -> Accumulator:
        """What is made of its legs."""
        return Dot()

    def explain(self, q: Question) -> Attribution:
        walk = self.way.walk(q, rises=self.accumulator.rises)
        gathered = self.accumulator.gather(q, walk)
        start = walk.references()
        claimed = q.fx[:, None] - start.value
        same = (start.equal_share == 1).all(1).nonzero()[:, 0].tolist()
        if same:
            q.warn(f"the starting point equals the input for example(s) {', '.join(map(str, same))}: all values are 0")
        return q.attribution(
            self,
            gathered.values,
            claimed_total=(claimed * walk.shares(q)).sum(1) if self.claims else None,
            references=start,
            parts={**gathered.parts, **walk.parts()},
        )

    @property
    def claims(self) -> bool:
        """Whether the values claim a total."""
        return bool(self.card.total)

    def passes(self, q: Question | None = None) -> Passes:
        return self.way.passes(rises=self.accumulator.rises)
