"""Fills: what stands where a mask removes."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Int
from torch import Tensor

from apportion.core import tree
from apportion.core.attribution import References
from apportion.core.config import Configurable
from apportion.core.errors import InputError, kind_of
from apportion.core.explainer import Passes
from apportion.core.game import Weighted
from apportion.core.protocols import Owner
from apportion.core.question import Question
from apportion.core.tree import Tree
from apportion.parts.baselines import Baseline, Zero


@dataclass(frozen=True)
class Fill(Configurable):
    """Base of the fills; called with rows of masks, it gives [R, k, ...] values for what they remove."""

    example: ClassVar[str] = "ap.fills.Baselines(), or ap.fills.Marginal(rows)"

    @property
    def draws(self) -> int:
        """How many points are scored for each coalition, at most."""
        return 1

    @property
    def exact(self) -> bool:
        """Whether every coalition takes exactly that many."""
        return True

    def references(self, q: Question) -> References | None:
        """Give the baselines and the score there, for a fill that puts the same wherever a player is absent."""
        return None

    def added_to(self, passes: Passes) -> Passes:
        """Add what the empty coalition costs, once per example, to the passes of others."""
        return passes._replace(once=passes.once + self.draws, exact=passes.exact and self.exact)

    @abstractmethod
    def __call__(self, q: Question, mask: Tree, owner: Owner, draw: Int[Tensor, " R"]) -> Tree | Weighted:
        """Make the values; `mask` is 1 where the example is kept, element by element."""


@dataclass(frozen=True)
class Baselines(Fill):
    """A baseline's values; several baselines are several draws.

    Attributes:
        base: the baseline.
    """

    base: Baseline = Zero()

    @property
    def draws(self) -> int:
        return self.base.draws

    def references(self, q: Question) -> References | None:
        return q.references(self.base)

    def added_to(self, passes: Passes) -> Passes:
        return self.base.added_to(passes)

    def __call__(self, q: Question, mask: Tree, owner: Owner, draw: Int[Tensor, " R"]) -> Tree:
        return tree.index(q.baseline_rows(self.base), owner)


@dataclass(frozen=True, eq=False)  # tensors have no single truth value
class Marginal(Fill):
    """Rows of a data set, whatever the example: the marginal distribution; each row is a draw.

    Attributes:
        data: [k, ...] rows.
    """

    data: Tree

    @property
    def draws(self) -> int:
        first = tree.leaves(self.data)[0]
        return len(first) if isinstance(first, Tensor) else 1

    def __call__(self, q: Question, mask: Tree, owner: Owner, draw: Int[Tensor, " R"]) -> Tree:

        def spread(x: Tensor, d: Tensor) -> Tensor:
            if not isinstance(d, Tensor) or d.shape[1:] != x.shape[1:] or d.dtype != x.dtype:
                if not isinstance(d, Tensor):
                    raise InputError(
                        f"{kind_of(d)} as background rows", "a torch.Tensor", "convert with torch.as_tensor"
                    )
                raise InputError(
                    f"background rows {tuple(d.shape)} of {d.dtype}",
                    f"[k, {tuple(x.shape[1:])}] of {x.dtype}",
                    "take rows of the data the examples come from",
                )
            return d.to(x.device).expand(len(owner), *d.shape)

        try:
            return tree.apply(spread, q.x, self.data)
        except TypeError as error:
            raise InputError(
                f"background rows {tree.names(self.data)}",
                f"the input's {tree.names(q.x)}",
                "build the data with the structure of x",
            ) from error
