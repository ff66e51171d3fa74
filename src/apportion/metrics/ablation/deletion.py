"""Deletion and insertion: how fast the class goes, and comes, with the pixels a map puts first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from apportion.core.card import Paper
from apportion.core.config import Json
from apportion.core.explainer import Passes
from apportion.core.question import Question
from apportion.metrics.ablation.curves import Counts, Removals, Stepwise, area, drawn, new, together
from apportion.metrics.metric import Found, Metric, MetricCard, Subject, register
from apportion.metrics.scores import Direction
from apportion.parts.baselines import RISEBlur
from apportion.parts.masks.fills import Baselines, Fill
from apportion.parts.masks.groups import Squares

_PAPER = Paper("Petsiuk, Das, Saenko", 2018, "RISE: randomized input sampling for explanation", "BMVC")
_OFF = "The pictures between are unlike any the model was trained on, and what it says of them is part of the number."
_CHANCE = "depends on model and substrate; judge ap.controls.Random() beside"


class _Area(Stepwise):
    """The area under a curve."""

    def _found(self, name: str, removals: Removals, gone: Counts, y: Any, inserted: bool) -> Found:
        share = removals.share(gone, y)
        share = 1 - share if inserted else share
        what = "share of players inserted, highest first" if inserted else "share of players removed, highest first"
        beyond = ~new(gone, y)
        curve = drawn(share, y.masked_fill(beyond, torch.nan), what, self.score)
        return Found(area(share, y), {name: curve}, {"ties": removals.ties})

    @classmethod
    def variants(cls) -> tuple[Metric, ...]:
        """Give pixels, and squares up to a limit."""
        return cls(), cls(groups=Squares(2), step=3, limit=10)


@register(
    MetricCard(
        title="Deletion",
        paper=_PAPER,
        intent="How fast the class's probability falls while pixels are removed, those of the highest values first.",
        direction=Direction.LOWER,
        chance=_CHANCE,
        cost="1 row a point: 225 for 224 × 224 pixels",
        cautions=(
            _OFF,
            "Scattered pixels destroy a picture faster than a whole object does: random maps can win.",
        ),
    )
)
@dataclass(frozen=True)
class DeletionAUC(_Area):
    """The area under the score's curve while players are removed, the highest values first; low is good.

    AUC = (Σ_k s_k - s_0/2 - s_n/2) / n over the points s_0 = score at x, ..., s_n = everything gone. Where the last
    step is shorter, trapezoids over the true shares stand for it. Nothing is divided by the score at x.

    The original goes by rows of pixels: 224 at a time of 224 × 224, all channels together, to the mean color.
    Variants: `step=224 * 8` is that of the authors' large runs; other fills are other substrates; `score=ap.Decision()`
    counts decisions, `ap.Logit()` takes what stands before the softmax; `groups=ap.groups.Elements()` ranks each
    channel of a pixel alone.

    Attributes:
        groups: the players; pixels of pictures, and single elements of everything else, unless given.
        fill: the substrate; `ap.fills.Baselines(ap.baselines.Mean())` for each picture's own mean, for example.
        score: what is watched.
        step: players that go at a time; unless given, so many that it takes as many steps as a picture has rows.
        limit: players that go at all; the area is then that over the shares reached, divided by them.

    Raises:
        ConfigError: a step or limit below 1.

    Source: Petsiuk et al. (2018), and their code for all settings.

    >>> import apportion as ap, torch
    >>> field, x = ap.Field(lambda x: x.sum(1)), torch.tensor([[1.0, 2.0]])
    >>> scores = DeletionAUC(score=ap.Logit())(field, x, x)
    >>> scores.values.item(), scores.curves["deletion"].y.tolist()
    (1.25, [[3.0, 1.0, 0.0]])
    """

    def counts(self, q: Question) -> tuple[Counts, bool]:
        """Remove from the highest on."""
        return self.until(q), False

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Remove step by step."""
        gone, lowest = self.counts(q)
        removals = self.removals(q, subject)
        return self._found("deletion", removals, gone, removals(gone, lowest), inserted=False)


@register(
    MetricCard(
        title="Insertion",
        paper=_PAPER,
        intent="How fast the class's probability rises while pixels come into a blurred picture, the highest first.",
        direction=Direction.HIGHER,
        chance=_CHANCE,
        cost="1 row a point: 225 for 224 × 224 pixels",
        cautions=(_OFF, "A blurred picture often keeps the class: what pixels can add to it is then small."),
    )
)
@dataclass(frozen=True)
class InsertionAUC(_Area):
    """The area under the score's curve while players come into the substrate, those of the highest values first.

    As `DeletionAUC`, from s_0 = the substrate to s_n = the score at x; high is good. It is the curve of removing the
    lowest values first, read backwards.

    The original's substrate is the picture blurred with zeros around it (`RISEBlur`); with mirrored borders
    (`Blurred`), a wider kernel or a plain color, other numbers come out, up to several times as large.

    Attributes:
        groups: the players; pixels or elements, as for deletion.
        fill: the substrate.
        score: what is watched.
        step: players that come at a time.
        limit: players the substrate lacks at the start; all unless given.

    Source: Petsiuk et al. (2018), with the kernel of their code.

    >>> import apportion as ap, torch
    >>> field, x = ap.Field(lambda x: x.sum(1)), torch.tensor([[1.0, 2.0]])
    >>> black = ap.fills.Baselines(ap.baselines.Zero())
    >>> InsertionAUC(fill=black, score=ap.Logit())(field, x, x).curves["insertion"].y
    tensor([[0., 2., 3.]])
    """

    fill: Fill = Baselines(RISEBlur())

    def counts(self, q: Question) -> tuple[Counts, bool]:
        """Insert step by step into what lacks the lowest, from the highest of them on."""
        return self.ends(q)[:, None] - self.until(q), True

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Insert step by step."""
        gone, lowest = self.counts(q)
        removals = self.removals(q, subject)
        return self._found("insertion", removals, gone, removals(gone, lowest), inserted=True)


@register(
    MetricCard(
        title="Insertion minus deletion",
        paper=_PAPER,
        intent="Insertion less deletion: one number for both, in which what both have in common cancels.",
        direction=Direction.HIGHER,
        chance="0 for a random map with one substrate for both",
        cost="both curves",
        cautions=(_OFF,),
    )
)
@dataclass(frozen=True)
class InsertionDeletion(Metric):
    """The area under the insertion curve less that under the deletion curve.

    Attributes:
        insertion: with its settings.
        deletion: with its own.

    Curves already made for the two are not made again.

    >>> import apportion as ap, torch
    >>> field, x = ap.Field(lambda x: x.sum(1)), torch.tensor([[1.0, 2.0]])
    >>> same = {"fill": ap.fills.Baselines(ap.baselines.Zero()), "score": ap.Logit()}
    >>> InsertionDeletion(InsertionAUC(**same), DeletionAUC(**same))(field, x, x).values
    tensor([0.5000], dtype=torch.float64)
    """

    insertion: InsertionAUC = InsertionAUC()
    deletion: DeletionAUC = DeletionAUC()

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Take the difference."""
        came, went = (m.measure(q, subject, truth) for m in self._both())
        parts = {"insertion": came.values, "deletion": went.values, **came.parts}
        return Found(came.values - went.values, {**came.curves, **went.curves}, parts)

    def passes(self, q: Question) -> Passes:
        """Add the two up; with one substrate their end points are the same."""
        return together(q, self._both())

    def resolved(self, q: Question) -> dict[str, Json]:
        """Name what runs in each half."""
        found = super().resolved(q)
        for name, half in (("insertion", self.insertion), ("deletion", self.deletion)):
            found |= {f"{name} {k}": v for k, v in half.resolved(q).items() if k not in found}
        return found

    def _both(self) -> Iterable[Stepwise]:
        return self.insertion, self.deletion

    @classmethod
    def variants(cls) -> tuple[Metric, ...]:
        """Give the original's substrates, and one for both."""
        return cls(InsertionAUC(step=5), DeletionAUC(step=5)), cls(InsertionAUC(fill=DeletionAUC.fill), DeletionAUC())
