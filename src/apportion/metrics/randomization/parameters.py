"""Parameter randomization: a map must change when what the network has learned is taken from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.core import tree
from apportion.core.card import Paper
from apportion.core.config import Configurable
from apportion.core.explainer import Explainer, Passes
from apportion.core.question import Question
from apportion.core.tree import Tree
from apportion.metrics.metric import Found, Judges, Metric, MetricCard, Subject, as_asked, register
from apportion.metrics.randomization.layers import Draw, randomize, with_layers
from apportion.metrics.randomization.similarities import RankSimilarity, Similarity
from apportion.metrics.scores import Curve, Direction

_PAPER = Paper("Adebayo, Gilmer, Muelly, Goodfellow, Hardt, Kim", 2018, "Sanity checks for saliency maps", "NeurIPS")


def _noisy(q: Question, explainer: Explainer, samples: int, noise: float) -> Tree:
    """Explain the examples, or the mean over noisy copies of them; noise as a share of each example's range."""
    if not samples:
        return explainer.explain(q.at(q.x, _owners(q), torch.zeros(len(q), dtype=torch.long))).values
    sums: Tree = None
    for draw in range(samples):
        at = torch.full((len(q),), draw, dtype=torch.long)

        def add(x: Tensor, n: Tensor) -> Tensor:
            flat = x.flatten(1)
            span = (flat.amax(1) - flat.amin(1)).reshape(-1, *[1] * (x.ndim - 1))
            return x + noise * span * n

        copies = tree.apply(add, q.x, q.stream("noise of randomization").normal(q.x, torch.arange(len(q)), at))
        made = explainer.explain(q.at(copies, _owners(q), at)).values
        sums = made if sums is None else tree.apply(torch.add, sums, made)
    return tree.apply(lambda v: v / samples, sums)


def _owners(q: Question) -> Tensor:
    return torch.arange(len(q), device=q.device)


@register(
    MetricCard(
        title="Model parameter randomization",
        paper=_PAPER,
        intent="How alike the map stays when layers of the network get random parameters.",
        direction=Direction.LOWER,
        judges=Judges.EXPLAINER,
        range=(-1.0, 1.0),
        chance="0 by rank correlation for maps that share nothing; see the curve's last point for what stays",
        cost="the explainer's, once for the network and once for each stage",
        cautions=(
            "Methods that multiply by the input stay alike on sparse pictures for that alone: judge "
            "ap.controls.InputMagnitude() beside, whose similarity is 1.",
            "A low similarity shows that the map depends on the parameters, not that it is right.",
        ),
    )
)
@dataclass(frozen=True)
class ParameterRandomization(Metric):
    """The mean similarity of the map to those of networks with randomized layers, stage by stage.

    "top_down" randomizes the layers one after the other from the output on and keeps those before randomized,
    "bottom_up" from the input on, "independent" one at a time. The class explained stays that of the learned network. The
    mean is over the randomized stages; the network itself, whose similarity is 1, is not among them.

    Undefined where a map is constant.

    Attributes:
        order: of the layers.
        draw: new numbers with the spread of each parameter's own, or its own in another order; buffers stay.
        similarity: `RankSimilarity` (Spearman, signed), `StructuralSimilarity` or `GradientHistograms`, each also of
            magnitudes.
        stages: layers are put together into so many stages at most; all of them alone if None.
        samples: average the map over so many noisy copies first, which takes its own noise out of the comparison: 50
            in the smooth variant (sMPRT) of Hedström et al. (2024); 0 for none.
        noise: of these copies, as a share of each example's range.

    Raises:
        ModelError: a function, or a model without parameters.

    Source: Adebayo et al. (2018), section 3.

    >>> import apportion as ap
    >>> _ = torch.manual_seed(0)
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).eval()
    >>> s = ParameterRandomization()(ap.Field(net), torch.rand(3, 8), ap.Gradient(), controls=[ap.controls.InputMagnitude()])
    >>> s.curves["similarity"].y.shape, bool((s.values < 0.9).all()), s.controls["InputMagnitude"].values.tolist()
    (torch.Size([3, 2]), True, [1.0, 1.0, 1.0])
    """

    order: Literal["top_down", "bottom_up", "independent"] = "top_down"
    draw: Draw = "redrawn"
    similarity: Similarity = field(default_factory=RankSimilarity)
    stages: int | None = None
    samples: int = 0
    noise: float = 0.1

    _not_negative = ("samples", "noise")

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Explain the network, randomize a stage, explain again, and so on."""
        explainer = subject.explainer
        model, layers = with_layers(q.field)
        learned = {n: p.detach().clone() for n, p in model.named_parameters()}
        parts = self._stages(layers)
        own = _noisy(q, explainer, self.samples, self.noise)
        found = []
        for stage in parts:
            if self.order == "independent":
                _restore(model, learned)
            randomize(model, stage, self.draw, q.seed, learned)
            other = q.of_model(model)
            made = _noisy(other, explainer, self.samples, self.noise)
            q.take_account(other)
            found.append(self.similarity(own, made))
        y = torch.stack(found, 1)
        none = y.isnan().any(1)
        return Found(
            y.mean(1),
            curves={"similarity": Curve(torch.arange(1.0, len(parts) + 1, device=y.device), y, "stage", "similarity")},
            undefined={"a constant map": none},
        )

    def _stages(self, layers: list[tuple[str, list[str]]]) -> list[list[str]]:
        names = [own for _, own in layers]
        names = names[::-1] if self.order == "top_down" else names
        count = min(len(names), self.stages or len(names))
        ends = [round(len(names) * (i + 1) / count) for i in range(count)]
        return [[p for own in names[a:b] for p in own] for a, b in zip([0, *ends], ends, strict=False)]

    @classmethod
    def variants(cls) -> tuple[Metric, ...]:
        return (
            cls(),
            cls("independent", "shuffled", RankSimilarity(absolute=True)),
            cls("bottom_up", stages=1, samples=2),
        )
