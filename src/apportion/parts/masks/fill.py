"""What every fill is."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from apportion.core import tree
from apportion.core.attribution import References
from apportion.core.config import Configurable
from apportion.core.errors import InputError
from apportion.core.explainer import Passes
from apportion.core.game import Weighted
from apportion.core.protocols import Owner
from apportion.core.question import Question
from apportion.core.tree import Tree


@dataclass(frozen=True)
class Fill(Configurable):
    """Base of the fills; called with rows of masks, it gives [R, k, ...] values for what they remove."""

    example: ClassVar[str] = "ap.fills.Baselines(ap.baselines.Zero()), or ap.fills.Marginal(rows)"

    may_repeat: ClassVar[bool] = False
    """Whether it may rightly give what the example has, as where the rest of it leaves no other value."""

    fixed: ClassVar[bool] = False
    """Whether it gives an example the same values whatever is kept of it."""

    @property
    def draws(self) -> int:
        """How many points are scored for each coalition, at most."""
        return 1

    @property
    def exact(self) -> bool:
        """Whether every coalition takes exactly that many."""
        return True

    def within(self, q: Question, labels: Tree) -> Fill:
        """Give the fill for a question and its groups: itself, for those that need to know neither beforehand.

        Args:
            q: the question.
            labels: each element's player; None for windows that overlap.
        """
        return self

    def references(self, q: Question) -> References | None:
        """Give the baselines and the score there, for a fill that puts the same wherever a player is absent."""
        return None

    def added_to(self, passes: Passes) -> Passes:
        """Add what the empty coalition costs, once per example, to the passes of others."""
        return passes._replace(once=passes.once + self.draws, exact=passes.exact and self.exact)

    @property
    def random(self) -> bool:
        """Whether it draws numbers of the question's stream, so that what it puts changes with the seed."""
        return False

    @abstractmethod
    def __call__(self, q: Question, mask: Tree, owner: Owner, draw: Int[Tensor, " R"]) -> Tree | Weighted:
        """Make the values; `mask` is 1 where the example is kept, element by element."""


def kept_pictures(q: Question, mask: Tree, what: str) -> Bool[Tensor, "R C H W"]:
    """Give a mask that is Boolean, of one tensor of pictures.

    Raises:
        InputError: soft masks, or other inputs.
    """
    if not isinstance(q.x, Tensor) or q.x.ndim != 4:
        shapes = [tuple(t.shape) for t in tree.leaves(q.x)]
        raise InputError(f"{what} of input {shapes}", "one tensor [B, C, H, W]", "choose another fill, as Baselines")
    return hard(mask, what)


def hard(mask: Tree, what: str) -> Tree:
    """Give masks that are Boolean.

    Raises:
        InputError: soft ones.
    """
    if any(leaf.dtype != torch.bool for leaf in tree.leaves(mask)):
        raise InputError(f"soft masks for {what}", "Boolean masks", "use a fill that does not depend on the mask")
    return mask
