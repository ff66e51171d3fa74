"""Parameter randomization: a map must change when what the network has learned is taken from it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from apportion.core import tree
from apportion.core.card import Paper
from apportion.core.errors import InputError, kind_of
from apportion.core.explainer import Passes
from apportion.core.question import Question
from apportion.core.site import Input
from apportion.core.tree import Tree
from apportion.metrics.fidelity.copies import at_examples, bound
from apportion.metrics.metric import Found, Judges, Metric, MetricCard, Subject, register
from apportion.metrics.randomization.layers import Draw, randomize, restore, with_layers
from apportion.metrics.randomization.similarities import RankSimilarity, Similarity
from apportion.metrics.scores import Curve, Direction
from apportion.parts.copies import moments
from apportion.parts.noise import Gaussian

_PAPER = Paper("Adebayo, Gilmer, Muelly, Goodfellow, Hardt, Kim", 2018, "Sanity checks for saliency maps", "NeurIPS")


def of_class(q: Question, target: Tensor) -> Question:
    """Ask about other classes of the same examples, also where the score names one."""
    field, score = q.field, q.field.score
    if getattr(score, "target", None) is not None:
        field = field.with_model(field.model)
        field.score = replace(score, target=None)  # pyright: ignore[reportCallIssue]
    return field.bind(q.inputs, target, q.ids, q.seed)


def _copied(q: Question, model: nn.Module) -> Question:
    """Ask a copy of the question's model, with other weights, about the same examples and classes."""
    return bound(q.field.with_copy(model), q)


def _rewritten(q: Question) -> Question:
    """Ask again after weights were written to, on which values at an inner site depend."""
    field = q.field
    if isinstance(field.site, Input) and field.lowered is None:
        return q.rewritten()
    return bound(field, q)


@register(
    MetricCard(
        title="Model parameter randomization",
        paper=_PAPER,
        intent="How alike the map stays when layers of the network get random parameters.",
        direction=Direction.LOWER,
        judges=Judges.EXPLAINER,
        range=(-1.0, 1.0),
        chance="1 for maps that know nothing of the model; 0 by rank correlation for maps that share nothing",
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
    "bottom_up" from the input on, in the order in which a forward pass meets them, "independent" one at a time. The
    class explained stays that of the learned network. The mean is over the randomized stages; the network itself,
    whose similarity is 1, is not among them.

    Undefined where a map is constant.

    Attributes:
        order: of the layers.
        draw: new numbers with the spread of each parameter's own, or its own in another order; "initialized" as modules
            draw before training, which is the source's, and changes the scale of maps as well. Buffers stay.
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
    >>> beside = [ap.controls.InputMagnitude()]
    >>> s = ParameterRandomization()(ap.Field(net), torch.rand(3, 8), ap.Gradient(), controls=beside)
    >>> s.curves["similarity"].y.shape, bool((s.values < 0.9).all()), s.controls["InputMagnitude"].values.tolist()
    (torch.Size([3, 2]), True, [1.0, 1.0, 1.0])
    """

    order: Literal["top_down", "bottom_up", "independent"] = "top_down"
    draw: Draw = "redrawn"
    similarity: Similarity = field(default_factory=RankSimilarity)
    stages: int | None = None
    samples: int = 0
    noise: float = 0.1

    _not_negative = ("samples",)
    _positive = ("noise",)

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Explain the network, randomize a stage, explain again, and so on."""
        _ = subject.for_any_model  # refuses functions
        model, layers = with_layers(q)
        learned = {n: p.detach().clone() for n, p in model.named_parameters()}
        parts = self._stages(layers)
        to_own, other = self.similarity.to(self._maps(subject, q)), None
        found = []
        for stage in parts:
            if self.order == "independent":
                restore(model, learned)
            randomize(model, stage, self.draw, q.seed, learned)
            other = _copied(q, model) if other is None else _rewritten(other)
            found.append(to_own(self._maps(subject, other)))
            q.charge(other.account)
        y = torch.stack(found, 1)
        none = y.isnan().any(1)
        return Found(
            y.mean(1),
            curves={"similarity": Curve(torch.arange(1.0, len(parts) + 1, device=y.device), y, "stage", "similarity")},
            undefined={"a constant map": none},
        )

    def _maps(self, subject: Subject, q: Question) -> Tree:
        if not self.samples:
            return at_examples(subject, q)
        return moments(q, subject.explainer, Gaussian(self.noise), self.samples, "noisy copies").mean

    def _stages(self, layers: list[tuple[str, list[str]]]) -> list[list[str]]:
        names = [own for _, own in layers]
        names = names[::-1] if self.order == "top_down" else names
        count = min(len(names), self.stages or len(names))
        ends = [round(len(names) * (i + 1) / count) for i in range(count)]
        return [[p for own in names[a:b] for p in own] for a, b in zip([0, *ends], ends, strict=False)]

    def explanations(self, q: Question) -> int:
        """Once for the network and once for each stage, each time all noisy copies."""
        return self.questions(q) * (self.samples or 1)

    def questions(self, q: Question) -> int:
        """Count the network, and that of each stage."""
        return 1 + len(self._stages(with_layers(q)[1]))

    @classmethod
    def variants(cls) -> tuple[Metric, ...]:
        return (
            cls(),
            cls("independent", "shuffled", RankSimilarity(absolute=True)),
            cls("bottom_up", stages=1, samples=2),
        )


@register(
    MetricCard(
        title="Effect of parameter randomization on complexity (eMPRT)",
        paper=Paper(
            "Hedström, Weber, Lapuschkin, Höhne",
            2024,
            "A fresh look at sanity checks for saliency maps",
            "xAI, CCIS 2153",
        ),
        intent="How much more complex the map gets when all parameters are random.",
        direction=Direction.HIGHER,
        judges=Judges.EXPLAINER,
        chance="0 for a map that does not look at the parameters",
        cost="the explainer's, twice",
        cautions=(
            "A random network may give a map of few values, as by dead units, for which less complexity is right.",
        ),
    )
)
@dataclass(frozen=True)
class EffectiveRandomization(Metric):
    """(H(ê) - H(e)) / H(e), with H the entropy of a histogram of the map, of the learned and of a random network.

    Undefined where the learned network's map has one value.

    Attributes:
        bins: of the histogram, between the map's least and greatest value; None goes by the rule of Freedman and
            Diaconis for the learned network's map, 10 to 200. The source leaves it to such rules.
        draw: as in `ParameterRandomization`.

    Source: Hedström et al. (2024), section 4.2.

    >>> import apportion as ap
    >>> net = torch.nn.Sequential(torch.nn.Linear(6, 2)).eval()
    >>> s = EffectiveRandomization()(ap.Field(net), torch.rand(2, 6), ap.controls.InputMagnitude())
    >>> s.values
    tensor([0., 0.], dtype=torch.float64)
    """

    bins: int | None = 100
    draw: Draw = "redrawn"

    _positive = ("bins",)

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Explain both networks, and count."""
        _ = subject.for_any_model  # refuses functions
        model, layers = with_layers(q)
        learned = {n: p.detach().clone() for n, p in model.named_parameters()}
        randomize(model, [p for _, own in layers for p in own], self.draw, q.seed, learned)
        own = at_examples(subject, q)
        bins = _bins(own) if self.bins is None else torch.full((len(q), 1), self.bins, device=q.device)
        random = _copied(q, model)
        before, after = _entropy(own, bins), _entropy(at_examples(subject, random), bins)
        q.charge(random.account)
        none = before == 0
        return Found(
            torch.where(none, torch.nan, (after - before) / before),
            parts={"learned": before, "random": after},
            undefined={"a map of one value": none},
        )

    def explanations(self, q: Question) -> int:
        """Once for each network."""
        return 2

    def questions(self, q: Question) -> int:
        """As many."""
        return self.explanations(q)

    @classmethod
    def variants(cls) -> tuple[Metric, ...]:
        return (cls(bins=20), cls(None, "shuffled"))


def _bins(m: Tree) -> Int[Tensor, "B 1"]:
    """Count bins by Freedman and Diaconis: range / (2 IQR N^(-1/3)), from 10 to 200."""
    flat = torch.cat([t.flatten(1).double() for t in tree.leaves(m)], 1)
    ranked, last = flat.sort(1).values, flat.shape[1] - 1
    low, high = (
        torch.lerp(ranked[:, int(p * last)], ranked[:, math.ceil(p * last)], p * last % 1) for p in (0.25, 0.75)
    )
    wide = 2 * (high - low) / flat.shape[1] ** (1 / 3)
    return ((ranked[:, -1] - ranked[:, 0]) / wide).nan_to_num(10, 200).ceil().clamp(10, 200).long()[:, None]


def _entropy(m: Tree, bins: Int[Tensor, "B 1"]) -> Float[Tensor, " B"]:
    """Give the entropy of each map's histogram, in nats."""
    flat = torch.cat([t.flatten(1).double() for t in tree.leaves(m)], 1)
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    span = torch.where(high > low, high - low, 1)
    at = ((flat - low) / span * bins).long().clamp(max=bins - 1)  # the greatest value belongs to the last bin
    share = torch.zeros(len(flat), int(bins.max()), dtype=flat.dtype, device=flat.device)
    share = share.scatter_add_(1, at, torch.ones_like(flat)) / flat.shape[1]
    return -torch.xlogy(share, share).sum(1)


@register(
    MetricCard(
        title="Random logit (class agnosticism)",
        paper=Paper(
            "Sixt, Granz, Landgraf", 2020, "When explanations lie: why many modified BP attributions fail", "ICML"
        ),
        intent="How alike the maps for the class and for other classes are.",
        direction=Direction.LOWER,
        judges=Judges.EXPLAINER,
        range=(-1.0, 1.0),
        chance="1 for a map that does not look at the class",
        cost="the explainer's, once for the class and once for each other class",
        cautions=("Classes may share their evidence: compare methods, and do not expect 0.",),
    )
)
@dataclass(frozen=True)
class RandomLogit(Metric):
    """The mean similarity of the map of the class to those of other classes, drawn for each example.

    Undefined where a map is constant.

    Attributes:
        classes: others that are asked; all of them if None or more than there are.
        similarity: of two maps; the source has SSIM, and ranks are what can be compared over methods.

    Raises:
        InputError: a model whose outputs are not two or more classes, or examples without one target each.

    Source: Sixt et al. (2020), section 4.2.

    >>> import apportion as ap
    >>> field = ap.Field(lambda x: torch.stack([x.sum(1), -x.sum(1)], 1))
    >>> RandomLogit()(field, torch.tensor([[1.0, 2.0, 3.0]]), ap.GradientTimesInput()).values
    tensor([-1.], dtype=torch.float64)
    """

    classes: int | None = 1
    similarity: Similarity = field(default_factory=RankSimilarity)

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Explain the class and the others."""
        outputs, target = q.outputs(q.x, q.owners), q.target
        fits = isinstance(outputs, Tensor) and outputs.ndim == 2 and outputs.shape[1] > 1
        if not fits or not isinstance(target, Tensor) or target.ndim != 2 or target.shape[1] != 1:
            shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else kind_of(outputs)
            raise InputError(
                f"outputs {shape} for RandomLogit", "[B, classes], and one target each", "judge a classifier"
            )
        others = outputs.shape[1] - 1
        owner = torch.arange(len(q))
        drawn = q.stream("other classes").uniform(torch.zeros(len(q), others), owner, 0 * owner).argsort(1)
        own = at_examples(subject, q)
        found = []
        for k in range(min(self.classes or others, others)):
            rank = drawn[:, k].to(target.device)
            other = of_class(q, rank + (rank >= target[:, 0]))
            found.append(self.similarity(own, at_examples(subject, other)))
            q.charge(other.account)
        y = torch.stack(found, 1)
        return Found(y.mean(1), parts={"each": y}, undefined={"a constant map": y.isnan().any(1)})

    def passes(self, q: Question) -> Passes:
        """Count the pass that tells how many classes there are."""
        return Passes(1, 0, 0)

    def explanations(self, q: Question) -> int:
        """Once for the class, and once for each other one."""
        with q.uncounted():
            outputs = q.outputs(q.x[:1], q.owners[:1])  # pyright: ignore[reportArgumentType, reportIndexIssue]
        return 1 + min(self.classes or outputs.shape[1], outputs.shape[1] - 1)

    def questions(self, q: Question) -> int:
        """As many."""
        return self.explanations(q)

    @classmethod
    def variants(cls) -> tuple[Metric, ...]:
        return (cls(), cls(None, RankSimilarity(absolute=True)))
