"""Relative stability: the relative change of a map per change of input, output or representation."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apportion.core import tree
from apportion.core.card import Paper
from apportion.core.config import Configurable
from apportion.core.explainer import Passes
from apportion.core.protocols import Owner
from apportion.core.question import Question
from apportion.core.score import main_output, top_class
from apportion.core.site import AtOp, Site
from apportion.core.tree import Tree
from apportion.metrics.fidelity.copies import PURPOSE, explained, minus, norm
from apportion.metrics.metric import Found, Judges, Metric, MetricCard, Subject, register
from apportion.metrics.scores import Direction
from apportion.parts.noise import Gaussian, NoiseModel, UniformBox

CARD = MetricCard(
    title="Relative input, output and representation stability (RIS, ROS, RRS)",
    paper=Paper(
        "Agarwal, Johnson, Pawelczyk, Krishna, Saxena, Zitnik, Lakkaraju",
        2022,
        "Rethinking stability for attribution-based explanations",
        "arXiv:2203.06877",
    ),
    intent="The largest relative change of a map per change of what the model made of the input.",
    direction=Direction.LOWER,
    judges=Judges.EXPLAINER,
    range=(0.0, None),
    cost="a row for each copy, and an explanation for each that keeps its class",
    cautions=(
        "Relative changes are element by element: the smallest attributions have the greatest say, and those near 0 "
        "nearly all of it.",
        "A map that ignores the input is the most stable of all.",
        "A maximum over draws grows with their number.",
    ),
)


@dataclass(frozen=True)
class Change(Configurable):
    """Base of what a map's change is compared with."""

    example: ClassVar[str] = "ap.metrics.InputChange()"

    relative: ClassVar[bool] = True
    """Whether it counts element by element in units of what it was."""
    rows: ClassVar[int] = 0
    """Rows evaluated for each point, besides the one for its class."""

    @abstractmethod
    def of(self, q: Question, rows: Tree, owner: Owner, outputs: Any) -> Tree:
        """Give what is compared at each row, whose outputs are known."""


@dataclass(frozen=True)
class InputChange(Change):
    """The relative change of the input, ‖(x - x') / x‖₂: RIS."""

    def of(self, q: Question, rows: Tree, owner: Owner, outputs: Any) -> Tree:
        """Give the rows themselves."""
        return rows


@dataclass(frozen=True)
class OutputChange(Change):
    """The change of the outputs, ‖h(x) - h(x')‖₂, of logits where the model gives these: ROS."""

    relative: ClassVar[bool] = False

    def of(self, q: Question, rows: Tree, owner: Owner, outputs: Any) -> Tree:
        """Give the outputs."""
        return main_output(outputs)


@dataclass(frozen=True)
class RepresentationChange(Change):
    """The relative change of an inner layer, ‖(L(x) - L(x')) / L(x)‖₂: RRS.

    Attributes:
        site: the layer, such as `ap.At("features.3")`.
    """

    rows: ClassVar[int] = 1

    site: Site

    def of(self, q: Question, rows: Tree, owner: Owner, outputs: Any) -> Tree:
        """Read the layer."""
        return q.tap(rows, owner, [self.site], grad=False)[1][self.site].value


@register(CARD)
@dataclass(frozen=True)
class RelativeStability(Metric):
    """max_{x'} ‖(Φ(x) - Φ(x')) / Φ(x)‖₂ / max(change, ε) over copies x' with the class of x.

    Copies whose top class is another one are left out and counted in parts["flipped"]; the others stand. Models with a
    single output have no classes to keep.

    Attributes:
        change: `InputChange()` (RIS), `OutputChange()` (ROS) or `RepresentationChange(site)` (RRS).
        noise: how copies are made. The authors' published code has a standard deviation of 0.05 in one version and of
            1e-5 in another.
        samples: copies of each example; 100 in that code.
        epsilon: ε, the least change that is divided by, and the least magnitude of an element of Φ(x), x or L(x)
            whose relative change is taken.

    Undefined where every copy has another class.

    Source: Agarwal et al. (2022): RIS, RRS and ROS.

    >>> import apportion as ap, torch
    >>> square = ap.Field(lambda x: x.square().sum(1))
    >>> found = RelativeStability(samples=3)(square, torch.ones(1, 4, dtype=torch.float64), ap.Gradient())
    >>> round(float(found.values), 6)
    1.0
    """

    _positive = ("samples", "epsilon")

    change: Change = InputChange()
    noise: NoiseModel = Gaussian(0.05, relative=False)
    samples: int = 100
    epsilon: float = 1e-6

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Explain the copies that keep their class, and divide."""
        phi, every = subject.map(q), torch.arange(len(q), device=q.device)
        here = q.outputs(q.x, every)
        at_x, own = self.change.of(q, q.x, every, here), top_class(here)
        most = torch.full((len(q),), -torch.inf, dtype=tree.wide(tree.leaves(q.x)[0]).dtype, device=q.device)
        kept_of = torch.zeros(len(q), dtype=torch.long, device=q.device)
        for draw, owner in q.grid(self.samples, "noisy copies"):
            rows = self.noise(q, owner, draw, PURPOSE)
            outputs = q.outputs(rows, owner)
            kept = _same(top_class(outputs), own, owner)
            if not bool(kept.any()):
                continue
            changed = self._size(self.change.of(q, rows, owner, outputs), at_x, owner, self.change.relative)[kept]
            rows, owner, draw = tree.index(rows, kept), owner[kept], draw[kept]
            moved = self._size(explained(subject, q.anew(rows, owner, draw)), phi, owner, True)
            most = most.scatter_reduce(0, owner, moved / changed.clamp(min=self.epsilon), "amax")
            kept_of += torch.bincount(owner, minlength=len(q))
        none = kept_of == 0
        return Found(
            most.masked_fill(none, torch.nan),
            parts={"flipped": self.samples - kept_of},
            undefined={"every copy changed the class": none},
        )

    def _size(self, rows: Tree, examples: Tree, owner: Owner, relative: bool) -> Float[Tensor, " R"]:
        away = minus(rows, examples, owner)
        if not relative:
            return norm(away)
        return norm(tree.apply(lambda d, e: d / e.abs().clamp(min=self.epsilon)[owner], away, examples))

    def passes(self, q: Question) -> Passes:
        """One row for the class at each copy and at x, and what the change takes besides."""
        return Passes((self.samples + 1) * (1 + self.change.rows), 0, 0, exact=False)

    def explanations(self, q: Question) -> int:
        """One for each copy that keeps its class."""
        return self.samples

    def questions(self, q: Question) -> int:
        """Each is explained with its own baselines."""
        return self.explanations(q)

    @classmethod
    def variants(cls) -> tuple[Metric, ...]:
        """One of each."""
        return (
            cls(samples=3),
            cls(OutputChange(), UniformBox(0.1), 3),
            cls(RepresentationChange(AtOp("relu")), samples=2),
        )


def _same(top: Tensor | None, own: Tensor | None, owner: Owner) -> Bool[Tensor, " R"]:
    if top is None or own is None:
        return torch.ones_like(owner, dtype=torch.bool)
    return top == own[owner]
