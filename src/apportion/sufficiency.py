"""Sufficiency: how surely some players alone keep the decision, and how surely it is lost without them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.core.attribution import Cost, Groups
from apportion.core.errors import ConfigError, InputError, kind_of
from apportion.core.field import Field
from apportion.core.game import Fill, Game
from apportion.core.score import Decision, Target
from apportion.core.tree import Tree
from apportion.parts.masks.groups import Elements


@dataclass(frozen=True, eq=False)
class Sufficiency:
    """What `sufficiency` found of each example and each of its S coalitions.

    Attributes:
        sufficiency: the probability that the decision is kept when the coalition is and the rest is drawn.
        necessity: the probability that it is lost when the coalition is drawn and the rest is kept.
        draws: of the fill, for each probability.
        cost: rows spent.
        warnings: what deserves a look.
        alike: whether every draw counts, and as much as any other.
    """

    sufficiency: Float[Tensor, "B S"]
    necessity: Float[Tensor, "B S"]
    draws: int
    cost: Cost
    warnings: tuple[str, ...] = ()
    alike: bool = True

    @property
    def standard_errors(self) -> tuple[Float[Tensor, "B S"], Float[Tensor, "B S"]] | None:
        """Of both, √(p (1 - p) / (draws - 1)), were draws a random sample.

        None for a single draw, and for a fill whose draws count by what is kept, as the rows of a `Conditional` that
        agree with it do: a distribution that is given leaves nothing to chance.
        """
        if self.draws < 2 or not self.alike:
            return None
        one, other = ((p * (1 - p) / (self.draws - 1)).sqrt() for p in (self.sufficiency, self.necessity))
        return one, other


def sufficiency(
    field: Field,
    x: Tree,
    coalitions: Tensor,
    *,
    fill: Fill,
    groups: Groups | None = None,
    target: Target = None,
    ids: Sequence[Any] | None = None,
    seed: int = 0,
) -> Sufficiency:
    """Tell how far coalitions suffice for a decision, and how far it needs them.

    PS(S) = P(c(x_S, Z) = c) with the players outside S drawn, the sufficiency of a factor in Watson et al. (2021);
    PN(S) = P(c(Z_S, x) ≠ c) with those in S drawn, the probability of causation of Pearl (1999) against a drawn
    alternative. Watson et al. condition necessity the other way round, on the decision.

    Args:
        field: the model under `ap.Decision()`.
        x: the examples.
        coalitions: Boolean, True for players of S: [S, P] for all examples, or [B, S, P].
        fill: what absent players are drawn from; its draws count alike, or by their weights as in `Conditional`.
        groups: what a player is; elements unless given.
        target: the decision; each example's own unless given.
        ids: names of the examples.
        seed: of all random numbers.

    Raises:
        ConfigError: another score.
        InputError: masks that are not Boolean.

    Source: Watson, Gultchin, Taly, Floridi (2021), Local explanations via necessity and sufficiency, UAI; Pearl
    (1999), Probabilities of causation, Synthese 121.

    >>> import apportion as ap
    >>> both = ap.Field(lambda x: x.prod(1) - 0.5, ap.Decision())      # "yes" where both are 1
    >>> x, rows = torch.ones(1, 2), torch.tensor([[0., 0.], [0., 1.], [1., 0.], [1., 1.]])
    >>> p = ap.sufficiency(both, x, torch.tensor([[True, False]]), fill=ap.fills.Marginal(rows))
    >>> p.sufficiency.tolist(), p.necessity.tolist()
    ([[0.5]], [[0.5]])
    """
    if not isinstance(field, Field) or not isinstance(field.score, Decision):
        raise ConfigError(
            f"{kind_of(field.score)} as score" if isinstance(field, Field) else f"{kind_of(field)} as field",
            "a field whose score is the decision",
            "write ap.Field(model, ap.Decision())",
        )
    if not isinstance(coalitions, Tensor) or coalitions.dtype != torch.bool:
        given = f"coalitions of {coalitions.dtype}" if isinstance(coalitions, Tensor) else kind_of(coalitions)
        raise InputError(given, "a Boolean tensor [S, players] or [B, S, players]", "write masks > 0")
    q = field.bind(x, target, ids, seed)
    game = Game(q, Elements() if groups is None else groups, fill)
    kept = game.value(coalitions)
    lost = 1 - game.value(~coalitions)
    return Sufficiency(kept, lost, int(getattr(fill, "draws", 1)), q.cost, q.warnings, getattr(fill, "exact", True))
