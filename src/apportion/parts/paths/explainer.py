"""The base of the methods that add something up along a path."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from apportion.core import tree
from apportion.core.attribution import Attribution, References
from apportion.core.explainer import Explainer, Passes
from apportion.core.question import Question
from apportion.core.tree import Tree
from apportion.parts.accumulate import Accumulator, Dot
from apportion.parts.paths.path import Path, Walk


@dataclass(frozen=True)
class PathExplainer(Explainer):
    """A path and what is added up along it; a subclass says which."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.way, self.accumulator  # options that make no path are refused here, not when a model is explained

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
        claimed = q.fx[:, None] - walk.start_values()
        _warn_of_zeros(q, start, gathered.values)
        return q.attribution(
            self,
            gathered.values,
            claimed_total=(claimed * walk.shares(q)).sum(1) if self.claims else None,
            references=start,
            parts={**gathered.parts, **walk.parts(), **self._of_riemann(q, walk), **self.companions(q, start)},
        )

    def _of_riemann(self, q: Question, walk: Walk) -> dict[str, Tree]:
        """Give what is known of the Riemann sum; under names that say so where the values are another sum."""
        known = dict(walk.riemann())
        if not known or self.accumulator.riemann:
            return known
        q.warn(
            f"Adaptive refined until the Riemann sum along the path was good, which {type(self.accumulator).__name__} "
            "does not give: the error of these values is not known, parts['riemann_estimated_error'] is that of the sum"
        )
        return {f"riemann_{name}": each for name, each in known.items()}

    def companions(self, q: Question, start: References) -> dict[str, Tree]:
        """Give further parts of the result, from the starting points; what they cost is the method's."""
        return {}

    @property
    def claims(self) -> bool:
        """Whether the values claim a total."""
        return bool(self.card.total)

    def passes(self, q: Question | None = None) -> Passes:
        own, more = self.way.passes(rises=self.accumulator.rises), self.accumulator.rows_at_x
        return own._replace(forward=own.forward + more, backward=own.backward + more)


def _warn_of_zeros(q: Question, start: References, values: Tree) -> None:
    """Name the examples without any value, and why."""
    same = (start.equal_share == 1).all(1)
    nothing = (tree.total(tree.apply(lambda v: (v != 0).double(), values)) == 0) & ~same
    for rows, message in (
        (same, "the starting point equals the input for example(s) {}: all values are 0"),
        (nothing, "all values are 0 for example(s) {}: no gradient on the way from the starting point, or none kept"),
    ):
        found = rows.nonzero()[:, 0].tolist()
        if found:
            q.warn(message.format(", ".join(map(str, found))))
