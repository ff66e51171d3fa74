"""Label randomization: a map must change when the network has learned the same examples by other labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from apportion.core.card import Paper
from apportion.core.errors import InputError
from apportion.core.explainer import Explainer
from apportion.core.question import Question
from apportion.core.streams import key_of
from apportion.core.tree import Tree
from apportion.metrics.fidelity.copies import at_examples, of_model
from apportion.metrics.metric import Found, Judges, Metric, MetricCard, Subject, register
from apportion.metrics.randomization.similarities import RankSimilarity, Similarity
from apportion.metrics.scores import Direction
from apportion.metrics.training import SmallNetwork, Training, TrainingSet
from apportion.parts.subsets.trainer import Trainer


@register(
    MetricCard(
        title="Label randomization",
        paper=Paper(
            "Adebayo, Gilmer, Muelly, Goodfellow, Hardt, Kim", 2018, "Sanity checks for saliency maps", "NeurIPS"
        ),
        intent="How alike the maps of networks are that learned true labels and permuted ones.",
        direction=Direction.LOWER,
        judges=Judges.EXPLAINER,
        range=(-1.0, 1.0),
        chance="1 for a map that does not look at the model; parts['between seeds'] for labels that change nothing",
        cost="two trainings for each seed, for all examples and explainers; the explainer's, twice for each seed",
        cautions=(
            "It says nothing where a network has not learned its labels: see the accuracies in parts.",
            "Maps of two networks differ by their training's chance already: compare with parts['between seeds'].",
            "Methods that multiply by the input stay alike for that alone: judge ap.controls.InputMagnitude() beside.",
            "All networks are kept until an evaluation ends.",
        ),
    )
)
@dataclass(frozen=True, kw_only=True)
class LabelRandomization(Training):
    """The similarity of the maps of two networks of one architecture: trained on true labels, and on permuted ones.

    Both are trained from scratch, from weights and with an order of their own, on the same examples; the labels of the
    second are permuted among all. The class explained is the question's, in both. The value is the mean over `seeds`
    such pairs.

    `parts` has for each pair the similarity with signs and that of magnitudes, `signed` and `absolute`; the shares of
    the training set that the networks get right, `accuracy, true labels` and `accuracy, permuted labels`; and with
    two seeds or more `between seeds`: how alike maps of networks are that learned the same, true labels. A value
    that is not below that shows no effect of labels. Where an accuracy is under `learned` a warning says so: a network
    that has not fitted its labels is not the source's test.

    Undefined where a map is constant.

    Attributes:
        train: the examples and their true labels; with `other`, the labels its networks have learned.
        trainer: trains one, on examples as the network reads them, which is after `Field(normalize=...)`;
            `FromScratch` of the model explained, unless given.
        seeds: pairs.
        similarity: as in `ParameterRandomization`.
        learned: share of the training set that networks have to get right; .95 in the source.
        other: networks trained already on labels of no meaning. Each is compared with the model explained, and none
            is trained; there is no `between seeds` then.

    Raises:
        ConfigError: a model that cannot be trained anew, without a trainer; a trainer that gives no module.
        InputError: examples unlike those of the training set; a network that gives no classes.

    Source: Adebayo et al. (2018), "data randomization test".

    >>> import apportion as ap
    >>> x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    >>> train, net = TrainingSet(x, (x[:, 0] > 0).long()), SmallNetwork(Trainer(epochs=60, lr=0.03), 8)
    >>> beside = [ap.controls.InputMagnitude()]
    >>> metric, field = LabelRandomization(train=train, trainer=net, seeds=2), ap.Field(net(train.x, train.y, 0))
    >>> found = metric(field, x[:3], ap.Gradient(), controls=beside)
    >>> found.controls["InputMagnitude"].values.tolist(), found.parts["accuracy, permuted labels"].min().item()
    ([1.0, 1.0, 1.0], 1.0)
    >>> found.values.mean().item() < found.parts["between seeds"].mean().item()
    True
    """

    _not_negative = ("learned",)

    seeds: int = 3
    similarity: Similarity = field(default_factory=RankSimilarity)
    learned: float = 0.95
    other: tuple[nn.Module, ...] = ()

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Train, or take what is trained; explain both; compare."""
        if not isinstance(q.inputs, Tensor) or q.inputs.shape[1:] != self.train.x.shape[1:]:
            raise InputError(
                "examples of another shape than the training set's",
                f"[B, ...] as {tuple(self.train.x.shape)}",
                "judge examples of the same kind",
            )
        _ = subject.for_any_model  # refuses functions
        if self.other:
            own = [at_examples(subject, q)] * len(self.other)
            nets, accuracies = self.other, {}
        else:
            key = ("labels", self.train, self.trainer, self.seeds, q.seed, str(q.inputs.device))
            true, nets, accuracies = q.for_all(key, lambda: self._trained(q))
            own = [of_model(subject, q, net) for net in true]
        made = [of_model(subject, q, net) for net in nets]
        if self.other:
            accuracies = q.for_all(("labels", self.train, self.other), lambda: self._accuracy(q))
        parts = {
            name: _alike(replace(self.similarity, absolute=absolute), zip(own, made, strict=True))
            for name, absolute in (("signed", False), ("absolute", True))
        }
        y = parts["absolute" if self.similarity.absolute else "signed"]
        for name, shares in accuracies.items():
            parts[f"accuracy, {name}"] = y.new_tensor(shares).expand(len(q), -1)
            if min(shares) < self.learned:
                q.warn(
                    f"a network trained on {name} gets {min(shares):.0%} of its training set right, less than "
                    f"{self.learned:.0%}: what it has not learned tests no map; train longer"
                )
        if not self.other and self.seeds > 1:
            parts["between seeds"] = _alike(self.similarity, combinations(own, 2)).mean(1)
        return Found(y.mean(1), parts=parts, undefined={"a constant map": y.isnan().any(1)})

    def _trained(self, q: Question) -> tuple[list[nn.Module], list[nn.Module], dict[str, list[float]]]:
        """Train all pairs, and tell how much of their training sets they get right."""
        x, y = self._read(q), self.train.y
        nets: dict[str, list[nn.Module]] = {"true labels": [], "permuted labels": []}
        shares: dict[str, list[float]] = {name: [] for name in nets}
        for i in range(self.seeds):
            g = torch.Generator().manual_seed(key_of(q.seed, "permuted labels", i) >> 1)
            permuted = y[torch.randperm(len(y), generator=g).to(y.device)]
            for name, labels in zip(nets, (y, permuted), strict=True):
                nets[name].append(self.fitted(q, x, labels, (name, i), name))
                shares[name].append(float(self.right(nets[name][i], x, labels, name).mean()))
        return nets["true labels"], nets["permuted labels"], shares

    def _accuracy(self, q: Question) -> dict[str, list[float]]:
        x, name = self._read(q), "other labels"
        return {name: [float(self.right(net, x, self.train.y, name).mean()) for net in self.other]}

    def _read(self, q: Question) -> Tensor:
        """Give the training examples as the network reads them."""
        x = self.train.x.to(q.inputs.device)  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
        return x if q.field.normalize is None else q.field.normalize(x)

    def trainings(self, q: Question, explainers: Sequence[Explainer]) -> int:
        """Count both of each seed."""
        return 0 if self.other else 2 * self.seeds

    def explanations(self, q: Question) -> int:
        """Once for each network."""
        return 1 + len(self.other) if self.other else 2 * self.seeds

    def questions(self, q: Question) -> int:
        """As many."""
        return self.explanations(q)

    @classmethod
    def variants(cls) -> tuple[Metric, ...]:
        """Give pairs of small networks, and a copy of one."""
        g = torch.Generator().manual_seed(0)
        train = TrainingSet(torch.rand(10, 3, 8, 8, generator=g, dtype=torch.float64), torch.arange(10) % 5)
        quick = SmallNetwork(Trainer(epochs=1), width=1)
        return (
            cls(train=train, trainer=quick, seeds=2),
            cls(train=train, trainer=quick, seeds=1, similarity=RankSimilarity(absolute=True)),
        )


def _alike(similarity: Similarity, pairs: Iterable[tuple[Tree, Tree]]) -> Float[Tensor, "B S"]:
    return torch.stack([similarity(a, b) for a, b in pairs], 1)
