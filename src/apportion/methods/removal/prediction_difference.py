"""Prediction difference analysis."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.core import tree
from apportion.core.attribution import Attribution
from apportion.core.card import Card, Claim, Family, Kind, Need, Paper, Principle
from apportion.core.errors import ConfigError, kind_of
from apportion.core.explainer import Explainer, Passes
from apportion.core.field import Field
from apportion.core.game import Game, Windows
from apportion.core.protocols import Owner
from apportion.core.question import Question
from apportion.core.registry import register
from apportion.core.score import Loss, Probability, cross_entropy, inherited, main_output
from apportion.core.tree import Tree
from apportion.methods.removal.occlusion import on_windows
from apportion.parts.masks.explainer import GameMethod
from apportion.parts.masks.fills import ConditionalGaussian, Fill, Marginal
from apportion.parts.masks.groups import EachInput, Patches

CARD = Card(
    title="Prediction difference analysis",
    paper=Paper(
        "Zintgraf, Cohen, Adel, Welling",
        2017,
        "Visualizing deep neural network decisions: prediction difference analysis",
        "ICLR 2017, arXiv:1702.04595",
    ),
    kind=Kind.SALIENCE,
    intent="The bits of evidence for the class that are lost when a part is not known, averaged over what it might be.",
    cost="players, or windows, × draws of the fill + 1 forward",
    families=(Family.PERTURBATION, Family.REMOVAL, Family.TAYLOR),
    claims=(Claim(Principle.ALLOCATION_FIDELITY, holds=False, source="Deng et al. 2025, Table VII"),),
    measured={
        Principle.COMPLETENESS: False,
        Principle.SENSITIVITY: True,
        Principle.DUMMY: True,
        Principle.LINEARITY: False,
        Principle.SYMMETRY: False,
        Principle.IMPLEMENTATION_INVARIANCE: True,
    },
    needs=frozenset({Need.DATA}),
    unit="bits",
    cautions=(
        "Speaks of the probability of the class, whatever score is explained elsewhere.",
        "What several parts bring about together is given whole to each; what either would do, to none.",
        "The windows at which a neighbour tells all that was covered get little: the draws put it back.",
    ),
)


DRAWS = 10
"""Of each part, as in the paper."""


@dataclass(frozen=True)
class FromData(Fill):
    """A fill that is still to be learned from data, by `fitted`."""

    @property
    def draws(self) -> int:
        return DRAWS

    def __call__(self, q: Question, mask: Tree, owner: Owner, draw: Int[Tensor, " R"]) -> Tree:
        raise ConfigError(
            "PredictionDifference without a fill",
            "what a part might be, from data",
            "give fill=ap.fills.ConditionalGaussian.fit(data), or ap.fills.Marginal(rows) for tables",
        )


@register(CARD)
@dataclass(frozen=True)
class PredictionDifference(GameMethod):
    """log₂ odds(c | x) - log₂ odds(c | x without part i), the weight of evidence; Zintgraf et al. 2017, section 3.

    p(c | x without i) is the mean of p(c) over draws of part i, so that it is the outputs that are averaged and not
    the evidence. Values are in bits, per player, or per position where windows overlap: the mean over those that cover
    it. With several draws `parts["standard_error"]` is what they leave in doubt.

    Attributes:
        groups: the parts; the paper takes every window of 10 pixels, `ap.groups.Patches(10, 1)`.
        fill: what it might be: for windows of pictures `ap.fills.ConditionalGaussian.fit(data)`, as in the paper; for
            tables `ap.fills.Marginal(rows)`.
        examples: the size of the training set, by which probabilities p of K classes become (p N + 1) / (N + K), so
            that none is 0 or 1; None leaves them as they are.

    Raises:
        ConfigError: no fill, or a score that names no class.
        NonFiniteError: probabilities of 0 or 1 without `examples`.

    >>> import torch, apportion as ap
    >>> field = ap.Field(lambda x: torch.stack([x[:, 0], x[:, 0] * 0], 1))
    >>> unsure = ap.fills.Baselines(ap.baselines.Zero())
    >>> a = ap.PredictionDifference(fill=unsure, examples=None)(field, torch.tensor([[2.0, 5.0]]), target=0)
    >>> a.values.round(decimals=3)      # log₂ of odds of e² against 1
    tensor([[2.8850, 0.0000]])
    """

    overlapping: ClassVar[bool] = True

    fill: Fill = FromData()
    examples: int | None = 100_000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.examples is not None and self.examples < 1:
            raise ConfigError(
                f"PredictionDifference(examples={self.examples})", "at least 1, or None", "leave examples out"
            )
        if self.reduce != "mean_of_score":
            raise ConfigError(
                f"PredictionDifference(reduce={self.reduce!r})",
                "'mean_of_score': probabilities are averaged",
                "leave reduce out",
            )

    def fitted(self, field: Field, data: Tree) -> Explainer:
        if not isinstance(self.fill, FromData):
            return self
        if isinstance(self.groups, Patches) and isinstance(self.groups.size, int) and isinstance(data, Tensor):
            side = min(self.groups.size + 4, *data.shape[2:])
            return replace(self, fill=ConditionalGaussian.fit(data, side=side, samples=DRAWS))
        return replace(self, fill=Marginal(tree.apply(lambda t: t[:: max(1, len(t) // DRAWS)][:DRAWS], data)))

    def explain(self, q: Question) -> Attribution:
        game = self.game(q)
        score = Probability(multilabel=bool(getattr(q.field.score, "multilabel", False)))
        everyone = torch.arange(len(q), device=q.device)
        outputs = q.outputs(q.x, everyone)
        if (caution := score.caution(outputs)) is not None:
            q.warn(caution)
        z = main_output(outputs)
        classes = 2 if score.multilabel or z.ndim < 2 or z.shape[1] == 1 else z.shape[1]
        target = q.target
        if not inherited(score, q.field.score, None)[0]:
            score, target = self._of_label(q, score, many=classes > 2 or (z.ndim > 1 and z.shape[1] > 1))
        known = weight_of_evidence(score(outputs, target).double(), self.examples, classes)
        mean, error = (torch.zeros(len(q), game.players, dtype=torch.float64, device=q.device) for _ in range(2))
        every = torch.arange(game.players, device=q.device)
        for step, owner in q.grid(game.players, "prediction differences"):
            here = step < game.sizes.to(q.device)[owner]
            for at in here.nonzero()[:, 0].split(max(1, q.field.chunk // self.fill.draws)):
                s, o = step[at], owner[at]
                mean[o, s], error[o, s] = self._chance(q, game, s[:, None] != every, o, s, score)
        lost = known[:, None] - weight_of_evidence(mean, self.examples, classes)
        game.warn_unchanged()
        error = error * slope(mean, self.examples, classes) if self.fill.draws > 1 and self.fill.exact else None
        if not isinstance(self.groups, Windows):
            return self.answer(q, game, lost, standard_error=error)
        like = tree.leaves(q.x)[0]
        return on_windows(
            self, q, self.groups, lost.to(like.dtype), standard_error=None if error is None else error.to(like.dtype)
        )

    def _of_label(self, q: Question, score: Probability, *, many: bool) -> tuple[Probability, Tensor | None]:
        """Give the probability of what another score than one of a class has as its class, and that class.

        Raises:
            ConfigError: it has none.
        """
        own = q.field.score
        if isinstance(own, Loss) and own.fn is cross_entropy and many:
            return Probability(target=q.target.tolist()), q.target[:, None]
        if many or isinstance(own, Loss):
            raise ConfigError(
                f"PredictionDifference of {kind_of(own)}, which tells of no class",
                "a class, whose probability is asked for",
                "write ap.Field(model), and give the class as target",
            )
        return score, None

    def _chance(
        self, q: Question, game: Game, mask: Tensor, owner: Tensor, draw: Tensor, score: Probability
    ) -> tuple[Tensor, Tensor]:
        """Give the mean probability over draws, and its standard error."""
        if not self.fill.exact:  # draws that count differently
            p = game.seen(game.elements(mask, owner), owner, draw, score).double()
            return p, torch.zeros_like(p)
        rows = game.rows(mask, owner, draw)
        k = tree.leaves(rows)[0].shape[1]
        flat = q.value(tree.apply(lambda r: r.flatten(0, 1), rows), owner.repeat_interleave(k), score)
        p = flat.double().reshape(-1, k)
        return p.mean(1), p.std(1) / k**0.5 if k > 1 else torch.zeros_like(p[:, 0])

    def passes(self, q: Question | None = None) -> Passes:
        if q is None:
            raise ConfigError(
                "passes of PredictionDifference without a question",
                "one, since there are as many as parts",
                "write passes(field.bind(x))",
            )
        game = Game(q, self.groups, self.fill)
        return Passes(1 + game.players * self.fill.draws, 0, at_x=1, exact=self.fill.exact and not game.is_ragged)

    @classmethod
    def variants(cls) -> tuple[Explainer, ...]:
        return (cls(EachInput()),)


def weight_of_evidence(p: Float[Tensor, "..."], examples: int | None, classes: int) -> Float[Tensor, "..."]:
    """Give log₂ odds of probabilities, after Laplace's correction where the number of examples is known.

    >>> p, q = (weight_of_evidence(torch.tensor(v), 100_000, 1000) for v in (0.9, 0.5))
    >>> round(float(p - q), 4)      # 3.1699 without the correction
    3.0611
    """
    p = _corrected(p, examples, classes)
    return (p / (1 - p)).log2()


def slope(p: Float[Tensor, "..."], examples: int | None, classes: int) -> Float[Tensor, "..."]:
    """Differentiate `weight_of_evidence` with respect to p."""
    inner = 1.0 if examples is None else examples / (examples + classes)
    p = _corrected(p, examples, classes)
    return inner / (math.log(2) * p * (1 - p))


def _corrected(p: Tensor, examples: int | None, classes: int) -> Tensor:
    return p if examples is None else (p * examples + 1) / (examples + classes)
