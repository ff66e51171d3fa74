"""CXPlain."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from apportion.core.attribution import Attribution
from apportion.core.card import Card, Family, Kind, Need, Paper
from apportion.core.errors import ConfigError, InputError
from apportion.core.explainer import Explainer, Passes
from apportion.core.field import Field
from apportion.core.game import Game
from apportion.core.question import Question
from apportion.core.registry import register
from apportion.core.score import LogProbability, Score
from apportion.core.tree import Tree
from apportion.parts.masks.explainer import GameMethod
from apportion.parts.subsets.causal import CausalNetworks, CausalTraining, among, shares
from apportion.parts.subsets.explained import bound, one_tensor, same_field
from apportion.parts.subsets.trainer import Trainer, Weights, gathered, moments, perceptron

CARD = Card(
    title="CXPlain",
    paper=Paper(
        "Schwab, Karlen",
        2019,
        "CXPlain: causal explanations for model interpretation under uncertainty",
        "NeurIPS 2019, arXiv:1910.12336",
    ),
    kind=Kind.SALIENCE,
    intent="Each player's share of what the model's error grows by without it, by networks trained to foretell it.",
    cost="none; once: players + 1 forward per row of data",
    families=(Family.PERTURBATION, Family.REMOVAL),
    unjudged="Deng et al. 2025 do not name it",
    needs=frozenset({Need.DATA}),
    signed=False,
    scored=False,
    unit="",
    cautions=(
        "Players are removed one at a time: of two that say the same, neither is missed.",
        "What lowers the error when it goes counts as 0.",
        "The map is a forecast, for the class the training took (the top one, or the label): `agreement` compares it "
        "with the shares themselves, on data that were not trained on.",
        "The interval is the spread over networks trained on resampled data, not of the removal.",
    ),
)


@register(CARD)
@dataclass(frozen=True)
class CXPlain(GameMethod):
    """The median of networks that foretell ω_i = Δε_i / Σ_j Δε_j, Δε_i = ε(x without i) - ε(x); Schwab, Karlen 2019.

    Values are shares between 0 and 1, in the shape of the input where every element is a player. The networks see each
    element standardized by the data they were trained on. With several networks
    `parts` has `low` and `high`, between which `level` of them lie.

    Attributes:
        networks: from `CXPlain(...).fitted(field, data)`, or how to train them then.
        score: -ε, log p_c of the label or of the top class; None for the field's own.
        level: of the interval.

    Raises:
        ConfigError: nothing trained.
        InputError: examples or players are others than those trained on.

    >>> import torch, apportion as ap
    >>> x = torch.rand(500, 4, generator=torch.Generator().manual_seed(0)) + 1
    >>> field = ap.Field(lambda x: torch.stack([3 * x[:, 0] + x[:, 2], 0 * x[:, 1]], 1))
    >>> trained = ap.CXPlain(score=ap.Logit()).fitted(field, x)
    >>> [round(v, 1) for v in trained(field, torch.full((1, 4), 1.5)).values[0].tolist()]
    [0.7, 0.0, 0.2, 0.0]
    """

    networks: CausalNetworks | CausalTraining = CausalTraining()
    score: Score | None = LogProbability()
    level: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.level < 1:
            raise ConfigError(f"level={self.level}", "a share between 0 and 1", "write level=0.95")

    def grown(self, field: Field, data: Tree | Iterable[Tree]) -> tuple[Tensor, Tensor]:
        """Play: examples, and by how much the error of each grows without each player."""
        return self._grown(field, data)[:2]

    @torch.inference_mode(False)
    def _grown(self, field: Field, data: Tree | Iterable[Tree]) -> tuple[Tensor, Tensor, Tensor]:
        found = []
        for q in bound(same_field(field, "CXPlain().fitted", self.score), data, "CXPlain().fitted"):
            game = Game(q, self.groups, self.fill, self.reduce)
            without = game.value(~torch.eye(game.players, dtype=torch.bool))
            found.append((one_tensor(q.x, "CXPlain"), (q.fx[:, None] - without).to(q.fx.dtype), game.own.to(q.device)))
        x, growth, present = gathered(found)
        return x, growth, present

    @torch.inference_mode(False)
    def fitted(self, field: Field, data: Tree) -> Explainer:
        if isinstance(self.networks, CausalNetworks):
            return self
        how = self.networks
        x, growth, present = self._grown(field, data)
        goal = shares(growth, present)
        mean, std = moments(x)
        seen = (x - mean) / std
        players = growth.shape[1]

        def loss(
            net: Callable[..., Tensor], batch: tuple[Tensor, Tensor, Tensor], generator: torch.Generator
        ) -> Tensor:
            return F.kl_div(among(net(batch[0]), batch[2]).log_softmax(1), batch[1], reduction="batchmean")

        weights: Weights = {}
        for i in range(how.networks):
            generator = torch.Generator().manual_seed(how.trainer.seed + i)
            rows = torch.randint(len(x), (len(x),), generator=generator) if how.networks > 1 else torch.arange(len(x))
            rows = rows.to(x.device)
            found = replace(how.trainer, seed=how.trainer.seed + i).run(
                lambda: perceptron(x[0].numel(), players, how.width),
                (seen[rows], goal[rows], present[rows]),
                loss,
                "a causal network",
            )
            weights |= {f"{i}/{k}": w for k, w in found.items()}
        trained = CausalNetworks(weights, how.networks, tuple(x.shape[1:]), players, how.width, mean, std)
        return replace(self, networks=trained)

    def agreement(self, field: Field, data: Tree | Iterable[Tree]) -> Float[Tensor, " B"]:
        """Correlate values with the shares themselves, example by example; 0 where either is constant."""
        x, growth, present = self._grown(field, data)
        told, known = self._trained(x)(x, present).median(1).values, shares(growth, present)
        mean = 1 / present.sum(1, keepdim=True).to(told)
        a, b = ((t - t.sum(1, keepdim=True) * mean) * present for t in (told, known))
        return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-12)

    def explain(self, q: Question) -> Attribution:
        x = one_tensor(q.x, "CXPlain")
        networks, game = self._trained(x), self.game(q)
        if game.players != networks.players:
            raise InputError(
                f"{game.players} players", f"{networks.players}, as trained on", "keep the groups, or train anew"
            )
        told = networks(x, game.own.to(x.device))
        parts: dict[str, Tree] = {}
        if networks.networks > 1:
            ends = told.new_tensor([(1 - self.level) / 2, (1 + self.level) / 2])
            parts["low"], parts["high"] = told.quantile(ends, 1)
        return self.answer(q, game, told.quantile(0.5, 1), parts=parts)

    def _trained(self, x: Tensor) -> CausalNetworks:
        if not isinstance(self.networks, CausalNetworks):
            raise ConfigError(
                "CXPlain() without trained networks", "trained ones", "write CXPlain().fitted(field, data)"
            )
        if tuple(x.shape[1:]) != self.networks.shape:
            raise InputError(
                f"examples of shape {tuple(x.shape[1:])}", f"{self.networks.shape}, as trained on", "train anew"
            )
        return self.networks

    def passes(self, q: Question | None = None) -> Passes:
        return Passes(0, 0, at_x=1)

    def asks(self, q: Question) -> tuple[()]:
        return ()

    @classmethod
    def variants(cls) -> tuple[Explainer, ...]:
        return (cls(networks=CausalTraining(2, 8, Trainer(epochs=1, batch=12))),)
