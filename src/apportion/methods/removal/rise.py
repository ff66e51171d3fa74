"""RISE."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from apportion.core import tree
from apportion.core.attribution import Attribution, Domain
from apportion.core.card import Card, Claim, Family, Kind, Paper, Principle
from apportion.core.errors import ConfigError, InputError
from apportion.core.explainer import Explainer, Passes
from apportion.core.game import Game
from apportion.core.question import Question
from apportion.core.registry import register
from apportion.core.site import Input
from apportion.core.tree import Tree
from apportion.parts.masks.fills import Baselines, Fill
from apportion.parts.masks.groups import Elements, Pixels
from apportion.parts.masks.samplers import SmoothGrids

CARD = Card(
    title="RISE",
    paper=Paper(
        "Petsiuk, Das, Saenko",
        2018,
        "RISE: randomized input sampling for explanation of black-box models",
        "BMVC 2018, arXiv:1806.07421",
    ),
    kind=Kind.SALIENCE,
    intent="The mean score of the picture seen through random soft masks that show the pixel.",
    cost="masks forward",
    families=(Family.PERTURBATION, Family.REMOVAL),
    claims=(
        Claim(
            Principle.INPUT_ROBUSTNESS,
            holds=True,
            source="Deng et al. 2025, section IV-E, where the model is locally smooth",
        ),
    ),
    unjudged="Deng et al. 2025 judge its way of averaging, in section IV-E, and not its faithfulness",
    measured={
        Principle.COMPLETENESS: False,
        Principle.SENSITIVITY: True,
        Principle.DUMMY: False,
        Principle.LINEARITY: True,
        Principle.SYMMETRY: False,
        Principle.IMPLEMENTATION_INVARIANCE: True,
    },
    signed=False,
    cautions=(
        "Only the order of its values means something: a score that is 1 for every picture gives a map of 1, and of a "
        "linear score each pixel has a share of all weights besides its own, which more masks do not take away. "
        "RISE(centred=True) has neither.",
        "The grain of the masks is that of the map: nothing finer than a cell is told apart.",
        "What is masked is not absent: the fill, black by default, is a picture too.",
    ),
)

_FEW = 16
"""Examples up to which sums are products of matrices, which do the work of all examples for each row."""
_ROUND = 256
"""Masks after which it is looked whether the precision is reached."""


@dataclass
class _Sums:
    """Sums over masks, per example and pixel; f is taken from f(x), and m from p for the centred variant."""

    count: Tensor
    f: Tensor
    weighted: Tensor
    squared: Tensor

    @classmethod
    def none(cls, batch: int, pixels: int, device: torch.device) -> _Sums:
        zeros = lambda *shape: torch.zeros(*shape, batch, pixels, dtype=torch.float64, device=device)  # noqa: E731
        scalars = torch.zeros(2, batch, dtype=torch.float64, device=device)
        return cls(scalars[0], scalars[1], zeros(2), zeros(3))

    def add(self, owner: Tensor, f: Tensor, m: Tensor) -> None:
        """Add the scores [R] of masks [R, P]."""
        m = m.to(
            torch.promote_types(torch.promote_types(f.dtype, m.dtype), torch.float32)
        )  # the model's may be another
        f = f.to(m.dtype)
        powers = torch.stack([torch.ones_like(f), f, f * f])
        for into, terms in ((self.count, powers[0]), (self.f, f)):
            into.index_add_(0, owner, terms.double())
        for into, rows in ((self.weighted, m), (self.squared, m.square())):
            weight = powers[: len(into)]
            if len(self.count) > _FEW:
                into.index_add_(1, owner, (weight[..., None] * rows).double())
                continue
            mine = F.one_hot(owner, len(self.count)).to(f.dtype).T * weight[:, None]
            into += (mine.flatten(0, 1) @ rows).unflatten(0, (len(into), -1))


@register(CARD)
@dataclass(frozen=True)
class RISE(Explainer):
    """1/(N p) Σ f(x ⊙ M) M over N random masks M, at each position; Petsiuk et al. 2018, equation 6.

    Values are on positions, with all their channels, [B, H · W], and `a.spread()` draws them; rows of features get one
    each. They are in units of the score, and relative to nothing: see `centred`. `parts["standard_error"]` is that
    of each value.

    Attributes:
        budget: the number N of masks. The paper takes 4000, its published notebook 6000.
        masks: how they are drawn. The paper takes 7 cells and p = 0.5; the notebook 8 and 0.1.
        centred: Σ (f - mean f) M / ((N - 1) p (1 - p)) instead. For hard masks it estimates, without bias, by how
            much the score's mean is higher with the position than without: a linear score's w ⊙ (x - x').
            Smooth masks smear that over about a cell.
        fill: what is seen where the mask is 0; with black this is the paper's x ⊙ M.
        precision: stop an example's masks where the largest standard error is at most this share of its values'
            range; looked at every 256 masks. Noise has a range of 2 to 5 errors itself with the default masks, however
            many: only well below 0.1 has the map more in it than that.

    Raises:
        ConfigError: fewer than two masks.
        InputError: examples of several tensors.

    >>> import torch, apportion as ap
    >>> field = ap.Field(lambda x: x.mean((1, 2, 3)))
    >>> a = ap.RISE(budget=32)(field, torch.ones(1, 3, 8, 8), seed=1)
    >>> a.values.shape, a.spread().values.shape
    (torch.Size([1, 64]), torch.Size([1, 3, 8, 8]))
    """

    budget: int = 4000
    masks: SmoothGrids = SmoothGrids()
    centred: bool = False
    fill: Fill = Baselines()
    precision: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget < 2:
            raise ConfigError(f"RISE(budget={self.budget})", "at least 2 masks", "the paper takes 4000")
        if self.precision is not None and self.precision <= 0:
            raise ConfigError(f"RISE(precision={self.precision})", "above 0, or None", "write precision=0.05")

    @property
    def signed(self) -> bool:
        """Whether signs mean something: centred values say which way the score moves, plain ones have its level."""
        return self.centred

    def explain(self, q: Question) -> Attribution:
        x = _pictures(q)
        game = Game(q, Pixels() if x.ndim > 2 else Elements(), self.fill)
        stream, start = q.stream("masks of RISE"), q.fx
        sums = _Sums.none(len(q), game.players, x.device)
        active = torch.ones(len(q), dtype=torch.bool, device=x.device)
        first = 0
        while first < self.budget and bool(active.any()):
            size = self.budget - first if self.precision is None else min(_ROUND, self.budget - first)
            for step, owner in q.grid(size, "RISE"):
                if not bool(active.all()):
                    step, owner = step[active[owner]], owner[active[owner]]
                draw = first + step
                mask = self.masks.masks(stream, x, owner, draw)
                f = game.seen(mask.expand(-1, *x.shape[1:]), owner, draw) - start[owner]
                sums.add(owner, f, mask.flatten(1) - (self.masks.p if self.centred else 0))
            first += size
            if self.precision is not None:
                active = active & ~self._reached(*self._estimates(sums, start))
        game.warn_unchanged()
        value, error = self._estimates(sums, start)
        parts: dict[str, Tree] = {}
        if self.precision is not None:
            parts["masks"] = sums.count.to(x.dtype)
            if missed := int((~self._reached(value, error)).sum()):
                q.warn(f"after {self.budget} masks {missed} example(s) have not reached precision {self.precision:g}")
        parts["standard_error"] = error.to(x.dtype)
        whole = Domain.INPUT if isinstance(q.field.site, Input) else Domain.SITE
        labels = None if x.ndim == 2 else tree.apply(lambda t: t.expand(1, *x.shape[1:]), game.labels)
        return q.attribution(
            self, value.to(x.dtype), domain=whole if labels is None else Domain.GROUPS, groups=labels, parts=parts
        )

    def _estimates(self, sums: _Sums, start: Tensor) -> tuple[Tensor, Tensor]:
        """Give the values and their standard errors."""
        n, p = sums.count[:, None], self.masks.p
        (m, fm), (mm, fmm, ffmm) = sums.weighted, sums.squared
        if not self.centred:
            c = start.double()[:, None]
            value, square, scale, free = (fm + c * m) / n, ffmm + 2 * c * fmm + c**2 * mm, p, 1
        else:
            mean = sums.f[:, None] / n
            value, square, scale, free = (fm - mean * m) / (n - 1), ffmm - 2 * mean * fmm + mean**2 * mm, p * (1 - p), 2
        variance = (square / n - value**2).clamp(min=0) * n / (n - free).clamp(min=1)
        return value / scale, (variance / n).sqrt() / scale

    def _reached(self, value: Tensor, error: Tensor) -> Tensor:
        assert self.precision is not None
        return error.amax(1) <= self.precision * (value.amax(1) - value.amin(1))

    def asks(self, q: Question) -> Iterable[Hashable]:
        return ("fx",)

    def passes(self, q: Question | None = None) -> Passes:
        return Passes(self.budget * self.fill.draws, 0, at_x=1, exact=self.precision is None and self.fill.exact)

    @classmethod
    def variants(cls) -> tuple[Explainer, ...]:
        return (cls(budget=12, masks=SmoothGrids(3)), cls(budget=12, centred=True, masks=SmoothGrids(None, 0.4)))


def _pictures(q: Question) -> Tensor:
    if not isinstance(q.x, Tensor) or q.x.ndim < 2:
        shapes = [tuple(t.shape) for t in tree.leaves(q.x)]
        raise InputError(
            f"masks for {shapes}",
            "one tensor, [B, channels, *space] or [B, features]",
            "use Occlusion, which takes groups over several inputs",
        )
    return q.x
