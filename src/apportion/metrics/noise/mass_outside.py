"""Mass of a map outside the object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from apportion.core.card import Paper
from apportion.core.question import Question
from apportion.core.tree import Tree
from apportion.metrics.localization.energy import within
from apportion.metrics.localization.pointing import TRUTH, made_up
from apportion.metrics.localization.region import masks, picture_map, regions
from apportion.metrics.metric import Found, Metric, MetricCard, Subject, register
from apportion.metrics.noise.map_noise import beside
from apportion.metrics.scores import Direction

CARD = MetricCard(
    title="Mass outside the object",
    paper=Paper(
        "Arras, Osman, Samek",
        2022,
        "CLEVR-XAI: a benchmark dataset for the ground truth evaluation of neural network explanations",
        "Information Fusion 81",
    ),
    intent="What share of the magnitude of a map is scattered outside the object.",
    direction=Direction.LOWER,
    truth=TRUTH,
    range=(0.0, 1.0),
    chance="the share of the picture that is not the object, as parts['white'] has it",
    cautions=(
        "A classifier may read what surrounds the object: mass there is noise only where it does not.",
        "A blur moves mass over the border of the object, either way.",
    ),
)


@register(CARD)
@dataclass(frozen=True)
class MassOutside(Metric):
    """Σ|m| outside the object over Σ|m|, with m the map, its channels summed: 1 less relevance mass accuracy.

    `parts` has the same of white noise of the map's size (`white`) and of the map blurred (`blurred`).

    Undefined for maps of zeros, and without an object.

    Attributes:
        blur: standard deviation in pixels of the blur that stands beside.

    >>> import apportion as ap
    >>> field, x = ap.Field(lambda x: x.sum((1, 2, 3))), torch.zeros(1, 1, 1, 3)
    >>> mask = torch.tensor([[[True, False, False]]])
    >>> MassOutside()(field, x, torch.tensor([[[[3.0, 1.0, -4.0]]]]), truth=mask).values
    tensor([0.6250])
    """

    blur: float = 2.0

    _positive = ("blur",)

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Sum inside, and all; of the map, of white noise and of the map blurred."""
        m = picture_map(q, subject)
        on = masks(regions(truth, m), m)
        missing = ~on.flatten(1).any(1)
        inside, none = within(m, on, "absolute")
        others = {name: 1 - within(other, on, "absolute")[0] for name, other in beside(q, m, self.blur).items()}
        return Found(
            (1 - inside).masked_fill(missing, torch.nan),
            parts={k: v.masked_fill(missing, torch.nan) for k, v in others.items()},
            undefined={"no object": missing, "a map of zeros": none & ~missing},
        )

    @classmethod
    def example_truth(cls, x: Tree) -> Any:
        return made_up(x)
