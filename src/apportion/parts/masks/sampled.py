"""The base of the methods that estimate values from coalitions, up to a budget or a precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apportion.core.errors import ConfigError
from apportion.core.explainer import Passes
from apportion.core.game import Game
from apportion.core.question import Question
from apportion.parts.masks.estimators import Chains, Estimate, Sums, each_alone, estimated, listed
from apportion.parts.masks.explainer import GameMethod
from apportion.parts.masks.samplers import AllSubsets, Permutations
from apportion.parts.masks.weights import ShapleyWeights, SizeWeights

COST = "at most budget + 1 forward, for each draw of the fill; all 2^n coalitions where the budget pays for them"
"""What methods of this kind cost, for their Cards."""

SAMPLED = (
    "Sampled wherever the budget does not pay for all coalitions: read parts['standard_error'], which counts the "
    "drawing of coalitions, and of a fill that draws only what differs between them."
)
"""What is to be known of their values."""


@dataclass(frozen=True)
class SampledMethod(GameMethod):
    """Values known up to a standard error, which says when to stop.

    Attributes:
        budget: coalitions evaluated for each example at most, without the empty and the full one.
        precision: at which to stop, see `Estimate.precision`; None spends the budget.
    """

    _positive = ("budget",)

    budget: int = 2048
    precision: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.precision is not None and not self.precision > 0:
            raise ConfigError(
                f"{type(self).__name__}(precision={self.precision})",
                "a positive number or None",
                "write precision=0.05 for errors of a twentieth of the range of the values",
            )

    def affordable(self, game: Game) -> Bool[Tensor, " B"]:
        """Tell for which examples the budget pays for all coalitions."""
        return torch.tensor([n <= LISTED and 2**n - 2 <= self.budget for n in game.sizes.tolist()])

    def enough(self, least: int, what: str) -> None:
        """See that the budget will do.

        Raises:
            ConfigError: it will not.
        """
        if self.budget < least:
            raise ConfigError(
                f"budget={self.budget} for {what}",
                f"at least {least} coalitions",
                f"give budget={least} or more, or make fewer players with ap.groups.Squares, Superpixels or Labels",
            )

    def record(self, q: Question, game: Game, found: Estimate, reached: Tensor | None = None) -> dict[str, Tensor]:
        """Give what tells how far to trust the values: coalitions evaluated, precision reached, degrees of freedom.

        Warned of are a precision that was wished for and not reached, standard errors from few draws, those that are
        bounds since nothing varied, and fills that draw at random.
        """
        reached = found.precision if reached is None else reached
        if self.precision is not None and bool((reached > self.precision).any()):
            q.warn(
                f"the budget of {self.budget} coalitions was spent at a precision of {float(reached.max()):.3g}, "
                f"short of {self.precision:g}: the largest standard error over the range of the values"
            )
        if float(fewest := found.fewest.min()) < FEW - 1:
            q.warn(
                f"standard errors come from few draws, at {fewest:.0f} degrees of freedom: intervals of 1.96 of them "
                "hold the value in less than 95 of 100 cases; take Student's t, or a larger budget"
            )
        if found.bounded is not None and bool(found.bounded.any()):
            q.warn(
                f"what {int(found.bounded.sum())} player(s) add did not vary among the draws: their standard errors "
                "are upper bounds by the rule of three, as if it differed by the range seen in 3 of the cases not drawn"
            )
        warn_random(self, q)
        parts = {"coalitions": game.evaluated.to(q.device), "precision": reached}
        return {**parts, "degrees_of_freedom": found.fewest.to(q.device)}

    def at_most(self, q: Question | None) -> Passes:
        """Count passes: the budget, or all coalitions where there are fewer."""
        if q is None:
            return self.passes_of(self.budget, exact=False)
        n = self.game(q).players
        return self.passes_of(min(self.budget, 2**n - 2) if n <= LISTED else self.budget, exact=False)


def warn_random(method: GameMethod, q: Question) -> None:
    """Record that values hold for this draw of the fill alone, where it draws at random."""
    if getattr(method.fill, "random", False):
        q.warn(
            f"values and errors are given this draw of the fill: {type(method.fill).__name__} draws once for each "
            f"coalition, {method.fill.draws} point(s), and values change with the seed by what no standard error "
            "here counts; take more draws, or the spread over seeds"
        )


FEW = 20
"""Independent draws below which a normal interval is too narrow to be left unsaid."""

LISTED = 20
"""The most players whose coalitions are listed: a million."""


@dataclass(frozen=True)
class OrderMethod(SampledMethod):
    """Shapley values of a game, from all coalitions or from orders.

    Attributes:
        sampler: the orders; None takes all coalitions wherever the budget pays for them.
    """

    sampler: AllSubsets | Permutations | None = None

    weights: ClassVar[SizeWeights] = ShapleyWeights()

    def estimate(self, game: Game, judge: Callable[[Estimate], Float[Tensor, " B"]] = each_alone) -> Estimate:
        """Estimate Shapley values of v.

        Raises:
            ConfigError: the budget does not pay for two independent draws.
            InputError: too many players for the sampler.
        """
        if isinstance(self.sampler, AllSubsets):
            return estimated(self.sampler.blocks(game), Sums(game, self.weights))
        exact = self.affordable(game) if self.sampler is None else torch.zeros(len(game.sizes), dtype=torch.bool)
        known = estimated(listed(game, exact, self.weights), Sums(game, self.weights))
        if bool(exact.all()):
            return known
        sampler = Permutations() if self.sampler is None else self.sampler
        n = int(game.sizes.max())
        family = sampler.family(n)
        self.enough(2 * family * max(1, n - 1), f"two draws of {family} order(s) of {n} players each")
        drawn = (b.among(~exact) for b in sampler.blocks(game, self.budget))
        found = estimated(drawn, Chains(game, sampler.family), self.precision, judge)
        return known.where(exact.to(known.values.device), found)

    def at_most(self, q: Question | None) -> Passes:
        if isinstance(self.sampler, AllSubsets) and q is not None:
            return self.passes_of(self.sampler.coalitions(self.game(q).players), exact=False)
        return super().at_most(q)
