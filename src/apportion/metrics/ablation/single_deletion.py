"""Single deletion: whether the cells of a grid rank by their values as by what the score loses without each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from apportion.core import tree
from apportion.core.attribution import Groups
from apportion.core.card import Paper
from apportion.core.config import Json
from apportion.core.errors import InputError
from apportion.core.explainer import Explainer, Passes
from apportion.core.external import fitted
from apportion.core.game import Game
from apportion.core.question import Question
from apportion.core.score import Logit, Score
from apportion.core.streams import key_of as number_of
from apportion.core.tree import Tree
from apportion.metrics.ablation.curves import Removing, seen, sizes
from apportion.metrics.fidelity.copies import of_model
from apportion.metrics.metric import Found, Judges, Metric, MetricCard, Subject, as_asked, key_of, register
from apportion.metrics.ranking import by_player, cells
from apportion.metrics.scores import Direction
from apportion.metrics.statistics import Correlation, Spearman, is_constant
from apportion.metrics.training import InDomain, TrainingSet
from apportion.parts.baselines import UniformNoise
from apportion.parts.masks.fills import Baselines
from apportion.parts.masks.groups import Squares
from apportion.parts.subsets.trainer import Trainer

_PAPER = Paper("Hesse, Schaub-Meyer, Roth", 2024, "Benchmarking the attribution quality of vision models", "NeurIPS")


@register(
    MetricCard(
        title="Single deletion",
        paper=_PAPER,
        intent="Whether cells rank by their values as by how far the score falls when each alone is deleted.",
        direction=Direction.HIGHER,
        range=(-1.0, 1.0),
        chance="0",
        cost="1 row a cell, and 1: 17",
        cautions=(
            "The original trains the model with deleted cells first, as InDomainSingleDeletion does; on another model "
            "the fall also measures how strange a hole is to it.",
            "Cells that matter only together lose nothing alone.",
        ),
    )
)
@dataclass(frozen=True)
class SingleDeletion(Removing):
    """The rank correlation, over the cells of a grid, of summed values and of f(x) - f(x without the cell).

    One number an example in [-1, 1], with the sign of values: nothing is removed twice, and no threshold is chosen.
    It is the in-domain single-deletion score where the model was trained with deleted cells: `InDomain` does that.

    Attributes:
        groups: the cells; 4 × 4 of pictures, and single elements of everything else, unless given.
        fill: what stands where a cell was; the originals are 0 of the network, random numbers, a strong blur.
        score: what falls, the logit in the original.
        correlation: of the two; of ranks in the original.

    Undefined where all cells have one value, or all deletions one effect.

    Source: Hesse et al. (2024).

    >>> import apportion as ap
    >>> field, x = ap.Field(lambda x: x @ torch.tensor([1.0, -1.0, 0.5])), torch.ones(1, 3)
    >>> SingleDeletion()(field, x, ap.Gradient()).values
    tensor([1.], dtype=torch.float64)
    """

    score: Score = Logit()
    correlation: Correlation = Spearman()

    def players(self, q: Question) -> Groups:
        """Choose the cells."""
        return cells(q, self.groups)

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Delete each cell once."""
        groups = self.players(q)
        key = ("falls without each", key_of(groups), key_of(self.fill), key_of(self.score))
        return self.compared(q, subject.map(q), *q.once(key, lambda _: self.falls(q)))

    def compared(self, q: Question, values: Tree, fall: Float[Tensor, "B P"], has: Bool[Tensor, "B P"]) -> Found:
        """Correlate a map's sums with falls.

        Args:
            q: the examples.
            values: the map.
            fall: what the score loses without each cell.
            has: which cells each example has.
        """
        told = by_player(q, values, self.players(q))
        found, flat, same = [], [], []
        for own, a, b in zip(has, tree.wide(told), tree.wide(fall), strict=True):
            found.append(self.correlation(a[own], b[own]))
            flat.append(is_constant(a[own]))
            same.append(is_constant(b[own]))
        undefined = {"cells that all have one value": torch.stack(flat)}
        undefined["deletions that all have one effect"] = (
            torch.stack(same) & ~undefined["cells that all have one value"]
        )
        parts = {"values": told.masked_fill(~has, torch.nan), "falls": fall.masked_fill(~has, torch.nan)}
        return Found(torch.stack(found), parts=parts, undefined=undefined)

    def falls(self, q: Question) -> tuple[Float[Tensor, "B P"], Bool[Tensor, "B P"]]:
        """Give what the score loses without each cell, and which cells each example has."""
        game = Game(q, self.players(q), self.fill)
        batch, count = len(q), game.players
        every = torch.arange(count)
        at_x = q.value(q.x, torch.arange(batch, device=q.device), self.score)
        owner, cell = game.own.nonzero(as_tuple=True)
        fx = seen(game, self.score, owner.to(q.device), cell, lambda at: (cell[at, None] != every).to(q.device))
        fall = at_x.new_zeros(batch, count)
        fall[owner.to(q.device), cell.to(q.device)] = at_x[owner.to(q.device)] - fx
        return fall, game.own.to(q.device)

    def passes(self, q: Question) -> Passes:
        """Count the cells, and the example itself."""
        count = sizes(q, self.players(q))
        rows, alike = 1 + self.fill.draws * int(count.max()), len(count.unique()) == 1
        passes = Passes(0, 0, once=rows, exact=self.fill.exact and alike)
        return self.fill.base.added_to(passes, scored=False) if isinstance(self.fill, Baselines) else passes

    @classmethod
    def variants(cls) -> tuple[Metric, ...]:
        """Give the original, and noise in squares."""
        return cls(), cls(groups=Squares(3), fill=Baselines(UniformNoise(0.0, 1.0, count=2)))


@register(
    MetricCard(
        title="In-domain single deletion (IDSDS)",
        paper=_PAPER,
        intent="Whether cells rank by their values as by the score's falls, in a network that knows deleted cells.",
        direction=Direction.HIGHER,
        judges=Judges.EXPLAINER,
        range=(-1.0, 1.0),
        chance="0",
        cost="a fine-tuning for each seed, for all examples and explainers; with it 17 rows, and the explainer's",
        cautions=(
            "It judges the method on the fine-tuned network, which may have learned something else than yours.",
            "Cells that matter only together lose nothing alone.",
            "All networks are kept until an evaluation ends.",
        ),
    )
)
@dataclass(frozen=True, kw_only=True)
class InDomainSingleDeletion(Metric):
    """`SingleDeletion` of the model fine-tuned on examples with deleted cells, whose maps it asks for.

    A copy of the model is trained as `InDomain` says, once for all examples and explainers; it is what is explained and
    what cells are deleted before, by the same groups and fill. The class is the question's: the model's own top class,
    where the source has the label (`target=`). The value is the mean over `seeds` fine-tunings.

    `parts` has by seed `correlations`, and each cell's `values` and `falls`; and of the training set with cells
    deleted from every example the share that is classified rightly: `accuracy, before` and, by seed, `accuracy, after`.
    Where the second is lower a warning says so: then fine-tuning has done harm, and the network is not in-domain.

    Undefined where in one of the networks all cells have one value, or all deletions one effect.

    Attributes:
        train: what the copy is trained on.
        tuning: how; the cells and what replaces them are said here.
        score: what falls.
        correlation: between values and falls.
        seeds: fine-tunings; one in the source.

    Raises:
        ConfigError: a model that cannot be trained; a map without its explainer, or `External`.
        InputError: examples unlike those of the training set.

    Source: Hesse et al. (2024), whose abbreviation is IDSDS, and their code.

    >>> import apportion as ap
    >>> x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    >>> idsds = InDomainSingleDeletion(train=TrainingSet(x, (x[:, 0] > 0).long()))
    >>> found = idsds(ap.Field(torch.nn.Linear(3, 2).eval()), x[:4], ap.GradientTimesInput())
    >>> found.values.tolist(), found.parts["falls"].shape
    ([1.0, 1.0, 1.0, 1.0], torch.Size([4, 1, 3]))
    """

    _positive = ("seeds",)

    train: TrainingSet
    tuning: InDomain = InDomain()
    score: Score = Logit()
    correlation: Correlation = Spearman()
    seeds: int = 1

    @property
    def single(self) -> SingleDeletion:
        """What is measured on each network."""
        return SingleDeletion(self.tuning.groups, self.tuning.fill, self.score, self.correlation)

    def resolved(self, q: Question) -> dict[str, Json]:
        """Name the cells."""
        return super().resolved(q) | self.single.resolved(q)

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Fine-tune, explain, delete."""
        if not isinstance(q.inputs, Tensor) or q.inputs.shape[1:] != self.train.x.shape[1:]:
            raise InputError(
                "examples of another shape than those trained on",
                f"[B, ...] as {tuple(self.train.x.shape)}",
                "judge examples of the same kind",
            )
        _ = subject.for_any_model  # refuses functions
        key = ("in-domain", self.train, self.tuning, self.seeds, q.seed, str(q.inputs.device))
        nets, before, after = q.for_all(key, lambda: self._tuned(q))
        if min(after) < before:
            q.warn(
                f"with deleted cells the fine-tuned network gets {min(after):.1%} of its training set right, and the "
                f"model {before:.1%}: train longer, or at a lower rate"
            )
        found = []
        for i, net in enumerate(nets):
            falls = q.once((key_of(self), "falls", i), lambda _, net=net: self._falls(q, net))
            values = tree.apply(lambda v, x: fitted(v, x, subject.name), of_model(subject, q, net), q.x)
            found.append(self.single.compared(q, values, *falls))
        parts = {name: torch.stack([f.parts[name] for f in found], 1) for name in ("values", "falls")}
        parts["correlations"] = y = torch.stack([f.values for f in found], 1)
        parts["accuracy, before"], parts["accuracy, after"] = (
            y.new_tensor(a).expand(len(q), -1) for a in ([before], after)
        )
        undefined = {why: torch.stack([f.undefined[why] for f in found]).any(0) for why in found[0].undefined}
        return Found(y.mean(1), parts=parts, undefined=undefined)

    def _tuned(self, q: Question) -> tuple[list[nn.Module], float, list[float]]:
        """Fine-tune for each seed, and tell how well the model and the networks do without cells."""
        seeds = [number_of(q.seed, "in-domain", i) % 2**31 for i in range(self.seeds)]
        nets = [self.tuning(q.field, self.train, seed) for seed in seeds]
        model = q.field.model
        before, *after = self.tuning.accuracy(q.field, self.train, [model, *nets], seeds[0])  # pyright: ignore
        return nets, before, after

    def _falls(self, q: Question, net: nn.Module) -> tuple[Tensor, Tensor]:
        other = q.field.with_model(net).bind(q.inputs, as_asked(q.target), q.ids, q.seed)
        falls = self.single.falls(other)
        q.charge(other.account)
        return falls

    def trainings(self, q: Question, explainers: Sequence[Explainer]) -> int:
        """Count the fine-tunings."""
        return self.seeds

    def explanations(self, q: Question) -> int:
        """Once for each network."""
        return self.seeds

    def questions(self, q: Question) -> int:
        """As many."""
        return self.seeds

    def passes(self, q: Question) -> Passes:
        """Count the deletions, for each network."""
        one = self.single.passes(q)
        return one._replace(once=self.seeds * one.once)

    @classmethod
    def variants(cls) -> tuple[Metric, ...]:
        """Give one of pixels' cells and a share of noisy squares, on little data."""
        g = torch.Generator().manual_seed(0)
        train = TrainingSet(torch.rand(8, 3, 8, 8, generator=g, dtype=torch.float64), torch.arange(8) % 5)
        quick = Trainer(epochs=1)
        noisy = InDomain(Squares(3), Baselines(UniformNoise(0.0, 1.0, count=2)), count=0.25, trainer=quick)
        return cls(train=train, tuning=InDomain(trainer=quick)), cls(train=train, tuning=noisy, seeds=2)
