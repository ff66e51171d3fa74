"""Retraining: what can still be learned from data of which a map has taken the best, or left only that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from apportion.core import tree
from apportion.core.attribution import Groups
from apportion.core.card import Paper
from apportion.core.config import Json
from apportion.core.errors import ConfigError, InputError
from apportion.core.explainer import Explainer
from apportion.core.progress import tick
from apportion.core.question import Question
from apportion.metrics.ablation.curves import sizes
from apportion.metrics.metric import Found, Judges, Metric, MetricCard, Subject, key_of, register
from apportion.metrics.ranking import by_player, order
from apportion.metrics.scores import Curve, Direction, Scores, counts
from apportion.metrics.training import SmallNetwork, Training, TrainingSet
from apportion.parts.controls import Edges, Random
from apportion.parts.masks.groups import Elements, Pixels
from apportion.parts.subsets.trainer import Trainer

_PAPER = Paper(
    "Hooker, Erhan, Kindermans, Kim",
    2019,
    "A benchmark for interpretability methods in deep neural networks",
    "NeurIPS",
)
_CHANCE = "the accuracy after removal at random, in parts['random']"
_COST = "none of the model explained; a training for each fraction and seed, and as many for each ranking beside"
_CAUTIONS = (
    "What a map takes out is a picture too: the shape of the hole can tell the class, most of all where the label is "
    "explained.",
    "Blurred maps do better (Song et al. 2023): look at the edges, and at the map blurred.",
    "All models are kept until an evaluation ends, since each of its batches is tested on them.",
)


@dataclass(frozen=True, kw_only=True)
class Retraining(Training):
    """Base of the metrics that train models on data changed by maps.

    Attributes:
        fractions: shares of each example's players.
        squared: whether values are squared before they are ranked.
        groups: the players; see `ROAR`.
        labels: whether maps are of each example's label, not of the class the model has highest.
        beside: whether random and edge rankings are done as well.
    """

    _keep: ClassVar[bool]

    trainer: Callable[[Tensor, Tensor, int], nn.Module] | None = SmallNetwork()
    fractions: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    squared: bool = True
    groups: Groups | None = None
    labels: bool = False
    beside: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if not self.fractions or not all(0 < f < 1 for f in self.fractions):
            raise ConfigError(f"{name}(fractions={self.fractions})", "shares between 0 and 1", "write (.1, .5, .9)")

    def resolved(self, q: Question) -> dict[str, Json]:
        return {k: v for k, v in super().resolved(q).items() if k != "groups"}  # which go by the map

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Explain both sets, change them, train and test."""
        y = self._admitted(q, truth)
        parts = {"correct": self._correct(q, subject.explainer, y)}
        whole = ("unmodified", self.train, self.trainer, self.seeds, q.seed, str(q.x.device))
        nets = q.for_all(whole, lambda: self._trained(q, self.train.x.to(q.x.device), "unmodified data"))
        parts["unmodified"] = torch.stack([self.right(net, q.x, y, "unmodified data") for net in nets], 1)
        for name, other in self._others(q).items():
            parts[name] = self._correct(q, other, y)
        shares = torch.tensor(self.fractions, dtype=torch.float64)
        what = "share of players kept, highest first" if self._keep else "share of players removed, highest first"
        drawn = {"retrained": parts["correct"].mean(2), **{n: p.mean(2) for n, p in parts.items() if p.ndim == 3}}
        drawn["unmodified"] = parts["unmodified"].mean(1, keepdim=True).expand_as(drawn["retrained"])
        del drawn["correct"]
        curves = {name: Curve(shares, y, what, "accuracy after retraining") for name, y in drawn.items()}
        return Found(parts["correct"].mean((1, 2)), curves, parts)

    def _others(self, q: Question) -> dict[str, Explainer]:
        edges = {"edges": Edges()} if isinstance(q.x, Tensor) and q.x.ndim == 4 else {}
        return {"random": Random(), **edges} if self.beside else {}

    def trainings(self, q: Question, explainers: Sequence[Explainer]) -> int:
        """Count a training for each seed, and with each of them one for every fraction and ranking."""
        rankings = {key_of(e) for e in (*explainers, *self._others(q).values())}
        return self.seeds * (1 + len(self.fractions) * len(rankings))

    def check_truth(self, q: Question, truth: Any) -> None:
        """Read the classes, and hold the examples to the training set."""
        self._admitted(q, truth)

    def _admitted(self, q: Question, truth: Any) -> Int[Tensor, " B"]:
        x, y = q.x, torch.as_tensor(truth)
        if not isinstance(x, Tensor) or x.shape[1:] != self.train.x.shape[1:] or x.dtype != self.train.x.dtype:
            raise InputError(
                f"examples {[(tuple(t.shape), t.dtype) for t in tree.leaves(x)]}",
                f"[B, ...] as the training set's {tuple(self.train.x.shape)} of {self.train.x.dtype}",
                "judge examples of the same kind",
            )
        if tuple(y.shape) != (len(q),) or y.is_floating_point():
            raise InputError(f"truth {tuple(y.shape)} of {y.dtype}", f"({len(q)},) whole numbers", "give classes")
        return y.to(x.device)

    def _correct(self, q: Question, explainer: Explainer, y: Tensor) -> Float[Tensor, "B K S"]:
        """Tell which examples models get right that were trained on what this explainer leaves."""
        key = (self, key_of(explainer), q.seed, str(q.x.device))
        trained, told = q.for_all(key, lambda: self._retrained(q, explainer))
        warnings = dict(told)
        ranked, found = self._ranked(q, explainer, q.x, y, q.ids, warnings), []
        for share, nets in zip(self.fractions, trained, strict=True):
            after = self._changed(ranked, share)
            found.append(torch.stack([self.right(net, after, y, _changed_by(explainer, share)) for net in nets], 1))
        for warning in warnings:
            q.warn(warning)
        return torch.stack(found, 1)

    def _retrained(self, q: Question, explainer: Explainer) -> tuple[list[list[nn.Module]], dict[str, None]]:
        """Train on what this explainer leaves of the training set, for each fraction and seed."""
        warnings: dict[str, None] = {}
        ids = [f"training {i}" for i in range(len(self.train.x))]
        ranked = self._ranked(q, explainer, self.train.x.to(q.x.device), self.train.y, ids, warnings)
        found = []
        for i, share in enumerate(self.fractions):
            found.append(self._trained(q, self._changed(ranked, share), _changed_by(explainer, share)))
            tick("fractions retrained", i + 1, len(self.fractions))
        return found, warnings

    def _trained(self, q: Question, x: Tensor, what: str) -> list[nn.Module]:
        return [self.fitted(q, x, self.train.y, ("retraining", i), what) for i in range(self.seeds)]

    def _ranked(
        self, q: Question, explainer: Explainer, x: Tensor, y: Tensor, ids: Any, warnings: dict[str, None]
    ) -> tuple[Tensor, ...]:
        """Rank the players of a set of examples: the examples, ranks, counts of players, and players of elements."""
        bound = q.field.bind(x, target=y.tolist() if self.labels else None, ids=ids, seed=q.seed)
        values = Subject(explainer).map(bound)
        warnings.update(dict.fromkeys(bound.warnings))
        groups = self.groups or (Elements() if values.shape == x.shape or x.ndim < 4 else Pixels())
        value = by_player(bound, values.square() if self.squared else values, groups)
        many = sizes(bound, groups).to(x.device)
        absent = torch.arange(value.shape[1], device=x.device) >= many[:, None]
        rank = order(bound, value.masked_fill(absent, -torch.inf)).argsort(1)
        label = groups.labels(x).to(x.device)
        return x, rank, many, label.expand(len(x), *label.shape[1:]).expand_as(x)

    def _changed(self, ranked: tuple[Tensor, ...], share: float) -> Tensor:
        """Put the training set's mean, channel by channel, where players are gone."""
        x, rank, many, label = ranked
        first = rank < (many * share).round()[:, None]
        gone: Bool[Tensor, "B P"] = ~first if self._keep else first
        flat = label.flatten(1)
        at = (gone.gather(1, flat.clamp(min=0)) & (flat >= 0)).reshape(x.shape)
        train = tree.wide(self.train.x)
        mean = train.mean([d for d in range(train.ndim) if d != 1], keepdim=True).to(x)
        return torch.where(at, mean, x)

    @classmethod
    def variants(cls) -> tuple[Metric, ...]:
        """Give one fraction and little data."""
        g = torch.Generator().manual_seed(0)
        x, y = torch.rand(8, 3, 8, 8, generator=g, dtype=torch.float64), torch.arange(8) % 2
        quick = SmallNetwork(Trainer(epochs=1), width=1)
        return (cls(train=TrainingSet(x, y), trainer=quick, fractions=(0.5,), seeds=1, beside=False),)

    @classmethod
    def example_truth(cls, x: Any) -> Any:
        """Give two classes in turn."""
        return torch.arange(len(x)) % 2


@register(
    MetricCard(
        title="Remove and retrain",
        paper=_PAPER,
        intent="How well a model does that is trained anew on data without what the map values most.",
        direction=Direction.LOWER,
        judges=Judges.EXPLAINER,
        truth="the class of each example, a whole number",
        range=(0, 1),
        chance=_CHANCE,
        cost=_COST,
        cautions=_CAUTIONS,
    )
)
@dataclass(frozen=True, kw_only=True)
class ROAR(Retraining):
    """The accuracy of models trained from scratch on data whose most important values are removed; low is good.

    For each fraction t, the t of an example's values that rank highest become the training set's mean of their channel,
    in the training set and in the examples judged; a model is trained on the first and tested on the second, with
    several seeds. The value of an example is how often it is classified rightly, over fractions and seeds; the curve
    `retrained` has it by fraction, and its mean over the examples is the accuracy. `ap.metrics.accuracy_table` gives
    that with intervals.

    As in the source, each value of a pixel is ranked alone, by its square; `groups=ap.groups.Pixels()` ranks whole
    pixels, by the sum of the squares, and maps with one channel are always ranked so. The source's rescaling of squares
    changes no order. Ties are drawn at random.

    `parts` has 1 for right and 0 for wrong by fraction and seed: `correct`; `random` and `edges` (Sobel), the same for
    rankings that know nothing of the model; `unmodified`, by seed, of models trained and tested on the data as they
    are.
    Maps explain each example's top class, and it is the metric that asks for them, on both sets. With `labels=True`
    they explain the label, which is then told to the retrained model by the holes.

    The trainer is any function of (x, y, seed) that gives a module; torch's own random numbers are seeded before it is
    called and put back afterwards. `SmallNetwork` is for small pictures and tables; `FromScratch(model)` has the
    architecture of yours. `ap.evaluate` trains once for all batches; `trainings` says how often.

    Attributes:
        train: the data models are trained on.
        trainer: trains one.
        fractions: shares of an example's players that go.
        seeds: models for each fraction.
        squared: whether values count by their square; signed values are ranked otherwise.
        groups: the players; single elements, or pixels for maps with one channel, unless given.
        labels: whether maps are of each example's label.
        beside: whether the two rankings that know nothing are done as well, which takes three times as long.

    Raises:
        ConfigError: fractions that are no shares; a trainer that gives no module; a map without its explainer.
        InputError: examples unlike those of the training set; no class for each.

    Source: Hooker et al. (2019), and their code for squares and fractions.

    >>> import apportion as ap
    >>> x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    >>> y, field = (x[:, 0] > 0).long(), ap.Field(lambda x: torch.stack([-x[:, 0], x[:, 0]], 1))
    >>> roar = ROAR(train=TrainingSet(x, y), fractions=(0.3,), seeds=1)
    >>> scores = roar(field, x, ap.Gradient(), truth=y)
    >>> scores.summary().mean < 0.7 < scores.parts["random"].mean().item()
    True
    """

    _keep = False


@register(
    MetricCard(
        title="Keep and retrain",
        paper=_PAPER,
        intent="How well a model does that is trained anew on nothing but what the map values most.",
        direction=Direction.HIGHER,
        judges=Judges.EXPLAINER,
        truth="the class of each example, a whole number",
        range=(0, 1),
        chance=_CHANCE,
        cost=_COST,
        cautions=_CAUTIONS,
    )
)
@dataclass(frozen=True, kw_only=True)
class KAR(Retraining):
    """The accuracy of models trained from scratch on what ranks highest; all else is removed. High is good.

    As `ROAR`, with the fraction t that ranks highest kept and the rest set to the mean. The fractions are ROAR's; those
    that the source kept were not compared.

    Attributes:
        train: as for ROAR.
        trainer: likewise.
        fractions: shares of an example's players that stay.
        seeds: trainings of each.
        squared: whether the order is by squares.
        groups: what is ranked.
        labels: whose map it is, the label's or the top class's.
        beside: whether random and edges are done as well.

    Raises:
        ConfigError: as there.
        InputError: as there.

    Source: Hooker et al. (2019).

    >>> import apportion as ap
    >>> x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    >>> y, field = (x[:, 0] > 0).long(), ap.Field(lambda x: torch.stack([-x[:, 0], x[:, 0]], 1))
    >>> kar = KAR(train=TrainingSet(x, y), fractions=(0.3,), seeds=1, beside=False)
    >>> kar(field, x, ap.Gradient(), truth=y).summary().mean > 0.9
    True
    """

    _keep = True


def _changed_by(explainer: Explainer, share: float) -> str:
    return f"{share:g} by {type(explainer).__name__}"


def accuracy_table(scores: Scores) -> list[dict[str, Any]]:
    """List accuracies after retraining: one record for each ranking and fraction, and one for unmodified data.

    Intervals are of a bootstrap over examples and over seeds at once (95 %); with one seed, over examples alone.

    Args:
        scores: of `ROAR` or `KAR`.

    Returns:
        Records with `ranking`, `fraction` (None for unmodified data), `accuracy`, `low`, `high` and `by_seed`.

    Raises:
        InputError: scores of another metric.
    """
    if not {"correct", "unmodified"} <= scores.parts.keys():
        raise InputError(f"scores of {scores.name}", "those of ROAR or KAR", "judge by one of them")
    fractions = scores.metric["fractions"]
    shown = [("unmodified", None, scores.parts["unmodified"])]
    for part, name in (("correct", scores.of), ("random", "random"), ("edges", "edges")):
        if part in scores.parts:
            shown += [(name, f, scores.parts[part][:, i]) for i, f in enumerate(fractions)]
    records = []
    for ranking, fraction, right in shown:
        low, high = _interval(right.double().cpu(), scores)
        by_seed = right.mean(0).tolist()
        records.append(
            {
                "ranking": ranking,
                "fraction": fraction,
                "accuracy": float(right.mean()),
                "low": low,
                "high": high,
                "by_seed": by_seed,
            }
        )
    return records


def _interval(right: Float[Tensor, "B S"], scores: Scores) -> tuple[float, float]:
    examples = counts(scores.ids, scores.seed)
    seeds = counts([f"seed {i}" for i in range(right.shape[1])], scores.seed)
    seeds = torch.ones_like(seeds) if right.shape[1] == 1 else seeds
    times = examples.sum(0) * seeds.sum(0)
    drawn = times > 0
    found = torch.einsum("br,bs,sr->r", examples, right, seeds)[drawn] / times[drawn]
    low, high = torch.quantile(found, found.new_tensor([0.025, 0.975])).tolist()
    return low, high
