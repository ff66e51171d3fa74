"""Single deletion: whether the cells of a grid rank by their values as by what the score loses without each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.core import tree
from apportion.core.attribution import Groups
from apportion.core.card import Paper
from apportion.core.explainer import Passes
from apportion.core.game import Game
from apportion.core.question import Question
from apportion.core.score import Logit, Score
from apportion.metrics.ablation.curves import Removing, seen, sizes
from apportion.metrics.metric import Found, Metric, MetricCard, Subject, key_of, register
from apportion.metrics.ranking import by_player, players
from apportion.metrics.scores import Direction
from apportion.metrics.statistics import Correlation, Spearman, is_constant
from apportion.parts.baselines import UniformNoise
from apportion.parts.masks.fills import Baselines
from apportion.parts.masks.groups import Cells, Squares


@register(
    MetricCard(
        title="Single deletion",
        paper=Paper(
            "Hesse, Schaub-Meyer, Roth", 2024, "Benchmarking the attribution quality of vision models", "NeurIPS"
        ),
        intent="Whether cells rank by their values as by how far the score falls when each alone is deleted.",
        direction=Direction.HIGHER,
        range=(-1.0, 1.0),
        chance="0",
        cost="1 row a cell, and 1: 17",
        cautions=(
            "The original trains the model with deleted cells first (in-domain); on another model the fall also "
            "measures how strange a hole is to it.",
            "Cells that matter only together lose nothing alone.",
        ),
    )
)
@dataclass(frozen=True)
class SingleDeletion(Removing):
    """The rank correlation, over the cells of a grid, of summed values and of f(x) - f(x without the cell).

    One number an example in [-1, 1], with the sign of values: nothing is removed twice, and no threshold is chosen.
    It is the in-domain single-deletion score where the model was trained with deleted cells.

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
        if self.groups is None and isinstance(q.x, Tensor) and q.x.ndim == 4:
            return Cells(4)
        return players(q, self.groups)

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Delete each cell once."""
        groups = self.players(q)
        game, told = Game(q, groups, self.fill), by_player(q, subject.map(q), groups)
        key = ("falls without each", key_of(groups), key_of(self.fill), key_of(self.score))
        fall = q.once(key, lambda _: self._falls(q, game, told.shape[1]))
        values, flat, same = [], [], []
        for own, a, b in zip(game.own.to(q.device), tree.wide(told), tree.wide(fall), strict=True):
            values.append(self.correlation(a[own], b[own]))
            flat.append(is_constant(a[own]))
            same.append(is_constant(b[own]))
        undefined = {"cells that all have one value": torch.stack(flat)}
        undefined["deletions that all have one effect"] = (
            torch.stack(same) & ~undefined["cells that all have one value"]
        )
        missing = ~game.own.to(q.device)
        parts = {"values": told.masked_fill(missing, torch.nan), "falls": fall.masked_fill(missing, torch.nan)}
        return Found(torch.stack(values), parts=parts, undefined=undefined)

    def _falls(self, q: Question, game: Game, count: int) -> Float[Tensor, "B P"]:
        batch, every = len(q), torch.arange(count)
        at_x = q.value(q.x, torch.arange(batch, device=q.device), self.score)
        owner, cell = game.own.nonzero(as_tuple=True)
        fx = seen(game, self.score, owner.to(q.device), cell, lambda at: (cell[at, None] != every).to(q.device))
        fall = at_x.new_zeros(batch, count)
        fall[owner.to(q.device), cell.to(q.device)] = at_x[owner.to(q.device)] - fx
        return fall

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
