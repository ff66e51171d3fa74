"""Real time image saliency."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor

from apportion.core.attribution import Attribution, Domain
from apportion.core.card import Card, Family, Kind, Need, Paper
from apportion.core.errors import ConfigError
from apportion.core.explainer import Explainer, Passes
from apportion.core.field import Field
from apportion.core.question import Question
from apportion.core.registry import register
from apportion.core.tree import Tree
from apportion.parts.subsets.masker import Masker, MaskerTraining
from apportion.parts.subsets.pictures import pictures
from apportion.parts.subsets.trainer import Trainer

CARD = Card(
    title="Real time image saliency",
    paper=Paper(
        "Dabkowski, Gal", 2017, "Real time image saliency for black box classifiers", "NIPS 2017, arXiv:1705.07857"
    ),
    kind=Kind.SALIENCE,
    intent="The small region that keeps the class and without which it goes, drawn by a network trained to draw it.",
    cost="1 forward; once, for every picture and step of training: 4 forward, 2 backward",
    families=(Family.INFLUENTIAL_SUBSET, Family.REMOVAL),
    unjudged="Deng et al. 2025 place it among the influential subsets and judge its faithfulness nowhere",
    needs=frozenset({Need.SPATIAL, Need.DATA}),
    signed=False,
    unit="",
    cautions=(
        "The mask is a second network's, as good as its training: look at what pictures keep behind it.",
        "What it learned on one kind of pictures says nothing of another kind.",
        "The class selector is trained along with the masks, where the authors train it first.",
        "The paper's weights differ from those of the authors' code, which are the defaults.",
    ),
)


@register(CARD)
@dataclass(frozen=True)
class RealTimeSaliency(Explainer):
    """|a| / (|a| + |b|), two maps of a masking network on the classifier's own layers; Dabkowski and Gal 2017.

    Values are [B, h, w] on the finest of those layers, between 0 and 1: high where the class is.

    Attributes:
        masker: from `ap.subsets.Masker.fit(field, data)`, or how to train one when `fitted` is called.
        upsample: enlarge to the picture, bilinearly.

    Raises:
        ConfigError: no masker, or a score that is of no single class.
        InputError: not one tensor of pictures.

    >>> import torch, apportion as ap
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(64, 2))
    >>> field, x = ap.Field(net), torch.rand(8, 1, 6, 6)
    >>> masker = ap.subsets.Masker.fit(field, x, ap.subsets.MaskerTraining(trainer=ap.subsets.Trainer(epochs=1)))
    >>> ap.RealTimeSaliency(masker)(field, x[:2]).values.shape
    torch.Size([2, 4, 4])
    """

    masker: Masker | MaskerTraining = MaskerTraining()
    upsample: bool = False

    def fitted(self, field: Field, data: Tree) -> Explainer:
        if isinstance(self.masker, Masker):
            return self
        return replace(self, masker=Masker.fit(field, data, self.masker))

    def explain(self, q: Question) -> Attribution:
        x = pictures(q, "RealTimeSaliency")
        if not isinstance(self.masker, Masker):
            raise ConfigError(
                "RealTimeSaliency() without a masker",
                "one",
                "write RealTimeSaliency(ap.subsets.Masker.fit(field, data))",
            )
        target = q.target
        if not isinstance(target, Tensor) or target.ndim != 2 or target.shape[1] != 1:
            raise ConfigError(
                f"RealTimeSaliency of {type(q.field.score).__name__}", "a score of one class", "explain the logit"
            )
        mask = self.masker(q, target[:, 0])
        if self.upsample:
            mask = F.interpolate(mask, x.shape[2:], mode="bilinear", align_corners=False)
        return q.attribution(self, mask[:, 0], domain=Domain.SITE)

    def passes(self, q: Question | None = None) -> Passes:
        return Passes(1, 0, at_x=1)

    @classmethod
    def variants(cls) -> tuple[Explainer, ...]:
        return (cls(MaskerTraining(scales=2, width=4, trainer=Trainer(epochs=1, batch=12)), upsample=True),)
