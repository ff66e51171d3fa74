"""L2X."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from apportion.core.attribution import Attribution
from apportion.core.card import Card, Family, Kind, Need, Paper
from apportion.core.errors import ConfigError, InputError
from apportion.core.explainer import Explainer, Passes
from apportion.core.field import Field
from apportion.core.question import Question
from apportion.core.registry import register
from apportion.core.tree import Tree
from apportion.parts.subsets.explained import one_tensor
from apportion.parts.subsets.selector import Selector, SelectorTraining
from apportion.parts.subsets.trainer import Trainer

CARD = Card(
    title="L2X",
    paper=Paper(
        "Chen, Song, Wainwright, Jordan",
        2018,
        "Learning to explain: an information-theoretic perspective on model interpretation",
        "ICML 2018, arXiv:1802.07814",
    ),
    kind=Kind.SALIENCE,
    intent="The k features of each example that tell most of the model's whole answer, by a network trained to pick.",
    cost="none; once: 1 forward per row of data",
    families=(Family.INFLUENTIAL_SUBSET,),
    unjudged="Deng et al. 2025 name neither the method nor its family's faithfulness",
    needs=frozenset({Need.DATA}),
    signed=False,
    scored=False,
    unit="",
    cautions=(
        "What is picked tells of the answer through a second network, which may use the choice itself as a signal: "
        "features can be picked that the model never reads.",
        "One map for all classes: it is the distribution over classes that the features tell of.",
        "As good as its training; look at `fidelity` on data that were not trained on.",
        "Of features that tell the same, one will do.",
        "A feature left out stands at its mean over the data, as inputs are standardized; to the authors, at 0.",
    ),
)


@register(CARD)
@dataclass(frozen=True)
class L2X(Explainer):
    """The choice probabilities of the k features with the largest mutual information I(x_S; y); Chen et al. 2018.

    Values are the softmax over an example's features of the picking network's scores, shaped as the input; they sum to
    1. `parts["picked"]` marks the k highest.

    Attributes:
        selector: from `ap.subsets.Selector.fit(field, data)`, or how to train one when `fitted` is called.

    Raises:
        ConfigError: nothing trained.
        InputError: examples of another shape than those trained on.

    >>> import torch, apportion as ap
    >>> x = torch.randn(2000, 6, generator=torch.Generator().manual_seed(0))
    >>> field = ap.Field(lambda x: torch.stack([4 * x[:, 1], -4 * x[:, 4]], 1))
    >>> how = ap.subsets.SelectorTraining(k=2, width=32, trainer=ap.subsets.Trainer(epochs=5))
    >>> a = ap.L2X(ap.subsets.Selector.fit(field, x, how))(field, x[:3])
    >>> [sorted(row.nonzero()[:, 0].tolist()) for row in a.parts["picked"]]
    [[1, 4], [1, 4], [1, 4]]
    """

    selector: Selector | SelectorTraining = SelectorTraining()

    def fitted(self, field: Field, data: Tree) -> Explainer:
        if isinstance(self.selector, Selector):
            return self
        return replace(self, selector=Selector.fit(field, data, self.selector))

    def explain(self, q: Question) -> Attribution:
        if not isinstance(self.selector, Selector):
            raise ConfigError(
                "L2X() without a trained selector", "one", "write L2X(ap.subsets.Selector.fit(field, data))"
            )
        x = one_tensor(q.x, "L2X")
        if tuple(x.shape[1:]) != self.selector.shape:
            raise InputError(
                f"examples of shape {tuple(x.shape[1:])}", f"{self.selector.shape}, as trained on", "train another"
            )
        with torch.no_grad():
            scores = self.selector.scores(x)
        picked = self.selector.picked(scores)
        return q.attribution(self, scores.softmax(1).reshape(x.shape), parts={"picked": picked.reshape(x.shape)})

    def passes(self, q: Question | None = None) -> Passes:
        return Passes(0, 0, at_x=1)

    @classmethod
    def variants(cls) -> tuple[Explainer, ...]:
        return (cls(SelectorTraining(2, 8, 0.5, Trainer(epochs=1, batch=12))),)
