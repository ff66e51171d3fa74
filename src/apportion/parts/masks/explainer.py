"""The base of the methods that play a game of masks."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from apportion.core import tree
from apportion.core.attribution import Attribution, Domain, Groups
from apportion.core.errors import ConfigError
from apportion.core.explainer import Explainer, Passes
from apportion.core.game import Game, Windows
from apportion.core.question import Question
from apportion.core.site import Input
from apportion.core.tree import Tree
from apportion.parts.masks.fill import Fill
from apportion.parts.masks.fills import Baselines
from apportion.parts.masks.groups import Elements


@dataclass(frozen=True)
class GameMethod(Explainer):
    """Players, and what stands in for absent ones; how their values follow from v(S) is up to the subclass."""

    groups: Groups | Windows = Elements()
    fill: Fill = Baselines()
    reduce: Literal["score_of_mean", "mean_of_score"] = "mean_of_score"

    overlapping: ClassVar[bool] = False
    """Whether the method has a meaning for windows that overlap."""

    def game(self, q: Question) -> Game:
        """Set up the game.

        Raises:
            ConfigError: overlapping windows for a method whose values are of a partition.
        """
        if isinstance(self.groups, Windows) and not self.overlapping:
            raise ConfigError(
                f"{type(self.groups).__name__}, whose groups overlap, for {type(self).__name__}",
                "a partition of the elements",
                "use ap.groups.Squares, Superpixels or Labels; windows are for ap.Occlusion",
            )
        return Game(q, self.groups, self.fill, self.reduce)

    def passes_of(self, coalitions: int, *, exact: bool = True, empty: bool = True) -> Passes:
        """Count the rows of so many coalitions, without the empty and the full one.

        Args:
            coalitions: how many for each example.
            exact: whether they are all different, and each example has as many.
            empty: whether the empty coalition is played too.
        """
        made = Passes(coalitions * self.fill.draws, 0, at_x=1, exact=exact and self.fill.exact)
        return self.fill.added_to(made) if empty else made

    def asks(self, q: Question) -> Iterable[Hashable]:
        base = getattr(self.fill, "base", None)
        return () if base is None else (("references", base), ("once", base))

    def answer(
        self,
        q: Question,
        game: Game,
        values: Float[Tensor, "B P"],
        *,
        standard_error: Float[Tensor, "B P"] | None = None,
        claimed_total: Float[Tensor, " B"] | None = None,
        parts: Mapping[str, Tree] | None = None,
    ) -> Attribution:
        """Give the players' values as a result: shaped as the input where each element is one, else [B, P].

        Args:
            q: the question.
            game: what was played.
            values: of each player; what stands for players an example does not have becomes 0.
            standard_error: of each value, which goes to the parts under that name.
            claimed_total: what they should sum to.
            parts: further companions.
        """
        like = tree.leaves(q.x)[0]
        each = isinstance(self.groups, Elements)

        def placed(v: Tensor) -> Tree:
            v = v.masked_fill(~game.own.to(v.device), 0).to(like.device, like.dtype)
            return elementwise(v, q.x) if each else v

        more = dict(parts or {})
        if standard_error is not None:
            more["standard_error"] = placed(standard_error)
        if game.is_ragged:
            more["sizes"] = game.sizes.to(like.device)
        game.warn_unchanged()
        labels = game.labels
        if not each and labels is not None:
            labels = tree.apply(lambda t, x: t.expand(len(t), *x.shape[1:]), labels, q.x)
        site = Domain.INPUT if isinstance(q.field.site, Input) else Domain.SITE
        return q.attribution(
            self,
            placed(values),
            claimed_total=None if claimed_total is None else claimed_total.to(like.device, like.dtype),
            domain=site if each else Domain.GROUPS,
            references=game.__dict__.get("references"),
            groups=None if each else labels,
            parts=more,
        )


def elementwise(values: Float[Tensor, "B P"], like: Tree) -> Tree:
    """Put one value per element into the shape of the examples.

    >>> import torch
    >>> elementwise(torch.arange(4.0)[None], (torch.zeros(1, 3), torch.zeros(1, 1)))
    (tensor([[0., 1., 2.]]), tensor([[3.]]))
    """
    flat, start = [], 0
    for leaf in tree.leaves(like):
        count = leaf[0].numel()
        flat.append(values[:, start : start + count].reshape(len(values), *leaf.shape[1:]))
        start += count
    return tree.rebuild(like, flat)
