"""Sparseness: how unequally a map spreads its mass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from apportion.core.attribution import Groups
from apportion.core.card import Paper
from apportion.core.question import Question
from apportion.metrics.metric import Found, Metric, MetricCard, Subject, register
from apportion.metrics.ranking import by_player, players
from apportion.metrics.scores import Direction

CARD = MetricCard(
    title="Sparseness (Gini index)",
    paper=Paper("Chalasani, Chen, Chowdhury, Wu, Jha", 2020, "Concise explanations of neural networks", "ICML"),
    intent="How unequally the magnitudes of a map are spread over the players.",
    direction=Direction.HIGHER,
    range=(0.0, 1.0),
    chance="1/3 for uniform magnitudes, 0 for a constant map",
    cautions=("It looks at the map alone: a single random pixel is the sparsest of maps.",),
)


@register(CARD)
@dataclass(frozen=True)
class Sparseness(Metric):
    """The Gini index of magnitudes: 0 where all are equal, 1 - 1/P where one player has all.

    G = Σ_k (2k - P - 1) |φ|_(k) / (P Σ |φ|), with magnitudes in ascending order, over P players.

    Attributes:
        groups: the players, whose attributions are summed first; see `ranking.players`.

    Undefined for maps of zeros, which have nothing to spread.

    Source: Chalasani et al. (2020), section 4.

    >>> import apportion as ap
    >>> field, x = ap.Field(lambda x: x.sum(1)), torch.ones(2, 4)
    >>> Sparseness()(field, x, torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 5.0]])).values
    tensor([0.0000, 0.7500])
    """

    groups: Groups | None = None

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Sort and sum."""
        size = by_player(q, subject.map(q), players(q, self.groups)).abs().sort(1).values
        count = size.shape[1]
        rank = torch.arange(1, count + 1, device=size.device, dtype=size.dtype)
        total = size.sum(1)
        gini = ((2 * rank - count - 1) * size).sum(1) / (count * total)
        return Found(torch.where(total > 0, gini, torch.nan), undefined={"a map of zeros": total == 0})
