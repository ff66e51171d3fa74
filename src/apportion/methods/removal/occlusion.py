"""Occlusion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.core import tree
from apportion.core.attribution import Attribution, Domain
from apportion.core.card import Card, Claim, Family, Kind, Paper, Principle
from apportion.core.errors import ConfigError
from apportion.core.explainer import Explainer, Passes
from apportion.core.game import Game, Windows
from apportion.core.question import Question
from apportion.core.registry import register
from apportion.core.site import Input
from apportion.core.tree import Tree
from apportion.parts.masks.explainer import GameMethod
from apportion.parts.masks.groups import EachInput, Patches, Pixels
from apportion.parts.masks.samplers import LeaveOneOut

CARD = Card(
    title="Occlusion",
    paper=Paper(
        "Zeiler, Fergus",
        2014,
        "Visualizing and understanding convolutional networks",
        "ECCV 2014, arXiv:1311.2901",
    ),
    kind=Kind.SALIENCE,
    intent="What the score loses when one part is covered and all the rest stays.",
    cost="players, or windows, × draws of the fill forward",
    families=(Family.PERTURBATION, Family.REMOVAL, Family.TAYLOR),
    claims=(
        Claim(Principle.ALLOCATION_FIDELITY, holds=False, source="Deng et al. 2025, Table VII"),
        Claim(
            Principle.INPUT_ROBUSTNESS,
            holds=True,
            source="Deng et al. 2025, section IV-E, under conditions on the model, baseline and summary",
        ),
    ),
    measured={
        Principle.COMPLETENESS: False,
        Principle.SENSITIVITY: True,
        Principle.DUMMY: True,
        Principle.LINEARITY: True,
        Principle.SYMMETRY: True,
        Principle.IMPLEMENTATION_INVARIANCE: True,
        Principle.SHIFT_INVARIANCE: False,
    },
    cautions=(
        "What several parts bring about together is given whole to each of them, so the values may sum to much more "
        "than the score; and where one part would do, each gets nothing, since the other is still there.",
        "Size, stride and fill decide what the map looks like: compare a few before one is believed.",
        "A covered part is not absent: the fill, black by default, is something the model sees.",
    ),
)


@register(CARD)
@dataclass(frozen=True)
class Occlusion(GameMethod):
    """f(x) - f(x without part i), for every part; Zeiler and Fergus 2014, section 4.2.

    Values are in units of the score: on elements, or one for each player of other groups. Windows that overlap give
    each position, with all its channels, the mean over the windows that cover it, of which there are fewer at the
    borders: `a.spread()` draws both.

    Attributes:
        groups: the parts: elements, any of `ap.groups`, or windows with a stride, as `ap.groups.Patches`.
        fill: what stands where a part is removed; several draws are averaged.
        reduce: whether scores of draws are averaged, or outputs.
        summed: sum over the windows that cover an element instead, which darkens the borders, as some codes do.
        per_element: divide each window's loss by its number of elements, so that windows share it out.

    Raises:
        ConfigError: `summed` or `per_element` for groups, whose players are left as they are.

    >>> import torch, apportion as ap
    >>> field = ap.Field(lambda x: (x[:, 0] - 1).relu() * x[:, 1])
    >>> a = ap.Occlusion()(field, torch.tensor([[2.0, 3.0]]))
    >>> a.values, a.value      # both get all of what only both bring about
    (tensor([[3., 3.]]), tensor([3.]))
    """

    overlapping: ClassVar[bool] = True

    summed: bool = False
    per_element: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.summed or self.per_element) and not isinstance(self.groups, Windows):
            raise ConfigError(
                f"summed={self.summed}, per_element={self.per_element} for {type(self.groups).__name__}",
                "windows, of which an element may be in several",
                "give groups=ap.groups.Patches(16, 8), or divide afterwards: a.spread(share=True)",
            )

    def explain(self, q: Question) -> Attribution:
        game = self.game(q)
        lost = q.fx[:, None] - game.value(LeaveOneOut().blocks(game))
        if not isinstance(self.groups, Windows):
            return self.answer(q, game, lost)
        game.warn_unchanged()
        return on_windows(self, q, self.groups, lost, self.summed, self.per_element)

    def passes(self, q: Question | None = None) -> Passes:
        if q is None:
            raise ConfigError(
                "passes of Occlusion without a question",
                "one, since they are as many as there are parts",
                "write passes(field.bind(x))",
            )
        game = Game(q, self.groups, self.fill, self.reduce)
        if game.players == 1:  # nothing is left: the empty coalition, which may be known
            return self.passes_of(0)
        return self.passes_of(game.players, exact=not game.is_ragged, empty=False)

    @classmethod
    def variants(cls) -> tuple[Explainer, ...]:
        return (cls(), cls(EachInput()))


def on_windows(
    explainer: Explainer,
    q: Question,
    windows: Windows,
    values: Float[Tensor, "B P"],
    summed: bool = False,
    per_element: bool = False,
    standard_error: Float[Tensor, "B P"] | None = None,
) -> Attribution:
    """Give each position the mean over the windows that cover it; 0 to what none covers.

    Args:
        explainer: whose result it is.
        q: the question.
        windows: where they lie; patches give one number for a position with all its channels.
        values: of each window.
        summed: take the sum instead.
        per_element: divide each value by the number of elements of its window first.
        standard_error: of each value, on its own, which goes to the parts as that of each mean.
    """
    ones = values.new_ones(1, values.shape[1])
    if per_element:  # laying values out is linear, so that its transpose counts a window's elements
        with torch.enable_grad():
            leaf = ones.clone().requires_grad_()
            (size,) = torch.autograd.grad(tree.total(windows.total(leaf, q.x)).sum(), leaf)
        values = values / size
    like = q.x[:, :1] if isinstance(windows, Patches) else q.x
    laid = windows.total(values, like)
    if not summed:
        laid = tree.apply(lambda v, n: v / n.clamp(min=1), laid, windows.total(ones, like))
    parts: dict[str, Tree] = {}
    if standard_error is not None:
        square = windows.total(standard_error.square(), like)
        parts["standard_error"] = tree.apply(lambda s, n: s.sqrt() / n.clamp(min=1), square, windows.total(ones, like))
    if isinstance(windows, Patches):
        labels = Pixels().labels(q.x).expand(1, *q.x.shape[1:])
        parts = {name: part.flatten(1) for name, part in parts.items()}
        return q.attribution(explainer, laid.flatten(1), domain=Domain.GROUPS, groups=labels, parts=parts)
    place = Domain.INPUT if isinstance(q.field.site, Input) else Domain.SITE
    return q.attribution(explainer, laid, domain=place, parts=parts)
