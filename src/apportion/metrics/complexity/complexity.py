"""Complexity: the entropy of a map's shares."""

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
    title="Complexity (entropy)",
    paper=Paper("Bhatt, Weller, Moura", 2020, "Evaluating and aggregating feature-based model explanations", "IJCAI"),
    intent="How many players a map spreads its magnitudes over, as the entropy of their shares.",
    direction=Direction.LOWER,
    range=(0.0, None),
    chance="ln P - 0.19 for uniform magnitudes of P players, ln P for a constant map",
    cautions=("It looks at the map alone, and grows with the number of players: compare maps of one size.",),
)


@register(CARD)
@dataclass(frozen=True)
class Complexity(Metric):
    """The entropy -Σ p_i ln p_i of p_i = |φ_i| / Σ|φ|, in nats: 0 where one player has all, ln P where all are equal.

    Undefined for a map of zeros.

    Attributes:
        groups: the players, whose number bounds the entropy; see `ranking.players`.

    Source: Bhatt et al. (2020), definition 3 (μ_C).

    >>> import apportion as ap
    >>> field, x = ap.Field(lambda x: x.sum(1)), torch.ones(2, 2)
    >>> Complexity()(field, x, torch.tensor([[1.0, -1.0], [0.0, 3.0]])).values
    tensor([0.6931, 0.0000])
    """

    groups: Groups | None = None

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Take shares, and their entropy."""
        size = by_player(q, subject.map(q), players(q, self.groups)).abs()
        total = size.sum(1)
        share = size / total[:, None]
        entropy = torch.xlogy(share, share).sum(1).clamp(max=0.0)
        return Found(torch.where(total > 0, entropy.abs(), torch.nan), undefined={"a map of zeros": total == 0})
