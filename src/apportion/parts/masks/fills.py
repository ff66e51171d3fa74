"""Fills: what stands where a mask removes."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from apportion.core import tree
from apportion.core.config import Configurable
from apportion.core.errors import InputError, kind_of
from apportion.core.protocols import Owner
from apportion.core.question import Question
from apportion.core.tree import Tree
from apportion.parts.baselines import Baseline, Zero


@dataclass(frozen=True)
class Baselines(Configurable):
    """A baseline's values; several baselines are several draws.

    Attributes:
        base: the baseline.
    """

    base: Baseline = Zero()

    def __call__(self, q: Question, mask: Tree, owner: Owner, draw: Int[Tensor, " R"]) -> Tree:
        """Give each row its example's baselines."""
        return tree.index(q.references(self.base).rows, owner)


@dataclass(frozen=True, eq=False)  # tensors have no single truth value
class Marginal(Configurable):
    """Rows of a data set, whatever the example: the marginal distribution; each row is a draw.

    Attributes:
        data: [k, ...] rows.
    """

    data: Tree

    def __call__(self, q: Question, mask: Tree, owner: Owner, draw: Int[Tensor, " R"]) -> Tree:
        """Give each row all of the data."""

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
