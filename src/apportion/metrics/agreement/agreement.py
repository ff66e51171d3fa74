"""Agreement: what two maps put first, in which order and with which sign."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from apportion.core.attribution import Groups
from apportion.core.card import Paper
from apportion.core.errors import ConfigError, InputError
from apportion.core.question import Question
from apportion.core.tree import Tree
from apportion.metrics.metric import Found, Metric, MetricCard, Subject, register
from apportion.metrics.ranking import by_player, order, players
from apportion.metrics.scores import Direction
from apportion.metrics.statistics import Spearman

Which = Literal["feature", "rank", "sign", "signed_rank", "rank_correlation", "pairwise_rank"]

_PAIRS = 4096
"""Players up to which all pairs are compared."""

CARD = MetricCard(
    title="Agreement of two maps",
    paper=Paper(
        "Krishna, Han, Gu, Wu, Jabbari, Lakkaraju",
        2022,
        "The disagreement problem in explainable machine learning: a practitioner's perspective",
        "arXiv:2202.01602",
    ),
    intent="What share of the players that one map puts first another puts first too.",
    direction=Direction.HIGHER,
    truth="the maps to agree with: another method's, or the right ones",
    range=(-1.0, 1.0),
    chance="k / P for the agreement of features under independent rankings, 0 for correlations",
    cautions=("Two maps may agree because both look like the input: judge a control beside.",),
)


@register(CARD)
@dataclass(frozen=True)
class Agreement(Metric):
    """Agreement of the k players with the largest magnitudes, or of whole rankings; all six are in `parts`.

    With the players T and T' of the two maps that have the k largest |φ|: `feature` |T ∩ T'| / k; `rank` the share of
    places 1 to k that hold the same player; `sign` the share of k in T ∩ T' with equal sign; `signed_rank` both at
    once; `rank_correlation` Spearman's of |φ| over all players; `pairwise_rank` the share of pairs of players that both
    maps order alike, ties only with ties.

    Undefined where a map is constant in magnitude, for `rank_correlation`.

    Attributes:
        of: which one `values` has.
        k: players that count, as a share of all if below 1.
        groups: what is compared, alike for both maps; see `ranking.players`.

    Raises:
        InputError: `pairwise_rank` of more than 4,096 players; others leave it out of `parts` there.

    Source: Krishna et al. (2022), section 3.2.

    >>> import apportion as ap
    >>> field, x = ap.Field(lambda x: x.sum(1)), torch.ones(1, 4)
    >>> one, other = torch.tensor([[4.0, 3.0, -2.0, 1.0]]), torch.tensor([[4.0, 1.0, 3.0, 2.0]])
    >>> s = Agreement(k=3)(field, x, one, truth=other)
    >>> {k: round(float(v), 2) for k, v in s.parts.items()}
    {'feature': 0.67, 'rank': 0.33, 'sign': 0.33, 'signed_rank': 0.33, 'rank_correlation': 0.4, 'pairwise_rank': 0.67}
    """

    of: Which = "feature"
    k: float = 0.1
    groups: Groups | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.k > 0 or (self.k >= 1 and self.k != int(self.k)):
            raise ConfigError(f"k={self.k}", "a whole number of players, or a share below 1", "write k=10 or k=.1")

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Compare the first of both, and the rest where it counts."""
        groups = players(q, self.groups)
        one = by_player(q, subject.map(q), groups).double()
        other = by_player(q, Subject(truth, "truth").map(q), groups).double()
        count = one.shape[1]
        k = max(1, round(self.k * count)) if self.k < 1 else int(self.k)
        if k > count:
            raise InputError(f"k={k} of {count} player(s)", f"at most {count}", "write k=.1 for a tenth of them")
        first, second = order(q, one.abs())[:, :k], order(q, other.abs())[:, :k]
        chosen = torch.zeros_like(one, dtype=torch.bool).scatter(1, second, True)
        both = chosen.gather(1, first)
        alike = (one.sign() == other.sign()).gather(1, first)
        same = first == second
        found = {
            "feature": both.double().mean(1),
            "rank": same.double().mean(1),
            "sign": (both & alike).double().mean(1),
            "signed_rank": (same & alike).double().mean(1),
            "rank_correlation": Spearman()(one.abs(), other.abs()),
        }
        if count <= _PAIRS:
            found["pairwise_rank"] = _pairs_alike(one.abs(), other.abs())
        elif self.of == "pairwise_rank":
            raise InputError(
                f"{count} players for pairwise_rank", f"at most {_PAIRS}", "give groups, such as ap.groups.Squares"
            )
        values = found[self.of]
        return Found(values, parts=found, undefined={"magnitudes that are all equal": values.isnan()})

    def check_truth(self, q: Question, truth: Any) -> None:
        """Lay the maps beside the examples."""
        Subject(truth, "truth").map(q)

    @classmethod
    def variants(cls) -> tuple[Metric, ...]:
        return (cls(), cls("rank_correlation"), cls("pairwise_rank", k=5))

    @classmethod
    def example_truth(cls, x: Tree) -> Any:
        return x.flip(-1) if isinstance(x, Tensor) else x


def _pairs_alike(a: Tensor, b: Tensor) -> Tensor:
    """Give the share of pairs that both order alike, a block of rows of the table of pairs at a time."""
    count = a.shape[1]
    if count < 2:
        return a.new_ones(len(a))
    alike = a.new_zeros(len(a))
    block = max(1, (1 << 22) // (count * max(1, len(a))))
    for i in range(0, count, block):
        left, right = ((v[:, i : i + block, None] - v[:, None]).sign() for v in (a, b))
        alike += (left == right).sum((1, 2)).to(a)
    return (alike - count) / (count * (count - 1))
