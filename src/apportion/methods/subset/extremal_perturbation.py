"""Extremal perturbation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from apportion.core.attribution import Attribution, Domain
from apportion.core.card import Card, Family, Kind, Need, Paper
from apportion.core.errors import ConfigError
from apportion.core.explainer import Explainer, Passes
from apportion.core.progress import tick
from apportion.core.question import Question
from apportion.core.registry import register
from apportion.parts.subsets.games import Dual, Preserve, Reward
from apportion.parts.subsets.pictures import pictures
from apportion.parts.subsets.smooth import Pyramid, SmoothMask, area_loss

CARD = Card(
    title="Extremal perturbation",
    paper=Paper(
        "Fong, Patrick, Vedaldi",
        2019,
        "Understanding deep networks via extremal perturbations and smooth masks",
        "ICCV 2019, arXiv:1910.08485",
    ),
    kind=Kind.SALIENCE,
    intent="The region of a given area that keeps the score highest when all else is blurred, learned per picture.",
    cost="(n + 1) a g forward, n a g backward (n steps one after another, a areas, g games: 2 for the dual reward)",
    families=(Family.INFLUENTIAL_SUBSET, Family.REMOVAL),
    unjudged="Deng et al. 2025 place it among the influential subsets and judge its faithfulness nowhere",
    needs=frozenset({Need.SPATIAL}),
    signed=False,
    unit="",
    cautions=(
        "The area is asked for, not found: compare several, and the score that each keeps.",
        "Masks are made of blobs of sigma pixels; nothing thinner than these, or smaller, can be found.",
        "The penalty of the area has the score's units to hold against: with scores in the hundreds, raise `weight`.",
        "Not convex: the region is a local optimum, and 800 steps follow one another.",
        "The search begins with all of the picture in the region: to `Delete` that is a blur of everything, where "
        "scores are flat and the area is settled before the score has a say.",
        "The area is the picture's, so that a region at its border saves an edge, and lies there more often where "
        "scores do not tell, half as often again in searches on noise; margin=True counts that edge, and regions then "
        "keep away from the border.",
    ),
)


@register(CARD)
@dataclass(frozen=True)
class ExtremalPerturbation(Explainer):
    """The mean over areas a of m_a = argmax_m f(x blurred where m is low), with area a; Fong et al. 2019.

    Values are the share of the areas whose region a pixel belongs to, [B, H, W], between 0 and 1. In `parts`: `masks`,
    [B, areas, H, W]; `area`, what each covers, the mean of the mask; `score`, what is left of it in the reward's games,
    [B, areas, games].

    Attributes:
        areas: shares of the picture, each a search of its own; all run side by side.
        reward: `ap.subsets.Preserve()`, `Delete()` or `Dual()`.
        mask: how masks are made of cells.
        steps: of gradient ascent with momentum, each a pass there and back.
        lr: its rate.
        momentum: of the gradients, of which each new one counts the rest.
        weight: what the area's penalty counts at first, in units of the score.
        growth: by which factor it grows each step.
        levels: of blur, from sharp to `sigma`.
        sigma: of the strongest blur, in pixels.
        margin: count in the area also the edge that the mask would have beyond the picture, `SmoothMask.margin`.
        flip: mirror the picture at every other step, as a left and a right show the same.

    Raises:
        ConfigError: areas that are none, or not between 0 and 1.
        InputError: not one tensor of pictures.

    >>> import torch, apportion as ap
    >>> look = lambda x: 20 * x[:, 0, 2:6, 2:6].square().mean((1, 2))   # at a square, whose texture a blur takes away
    >>> x = (torch.arange(16) % 2 * 2.0 - 1).expand(1, 1, 16, 16)
    >>> search = ap.ExtremalPerturbation((0.1,), mask=ap.subsets.SmoothMask(2, 3.0), steps=100, sigma=4.0, flip=False)
    >>> a = search(ap.Field(look), x)
    >>> bool(a.values[0, 2:6, 2:6].mean() > 5 * a.values[0, 8:].mean())
    True
    """

    _positive = ("steps", "lr", "weight", "growth", "sigma")
    _not_negative = ("momentum",)

    areas: tuple[float, ...] = (0.1,)
    reward: Reward = Preserve()
    mask: SmoothMask = SmoothMask()
    steps: int = 800
    lr: float = 0.01
    momentum: float = 0.9
    weight: float = 300.0
    growth: float = 1.0035
    levels: int = 8
    sigma: float = 20.0
    margin: bool = False
    flip: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.areas or not all(0 < a < 1 for a in self.areas):
            raise ConfigError(f"areas={self.areas}", "shares between 0 and 1", "write areas=(0.05, 0.1, 0.2)")
        if self.momentum >= 1:
            raise ConfigError(f"momentum={self.momentum}", "0 or more, below 1", "the paper takes 0.9")
        if self.levels < 2:
            raise ConfigError(f"levels={self.levels}", "2 or more: sharp and blurred", "leave it at 8")

    def explain(self, q: Question) -> Attribution:
        x = pictures(q, "ExtremalPerturbation")
        count = len(self.areas)
        found = [self._search(q, owner, at) for at, owner in q.grid(count, "extremal perturbation")]
        masks, score = (torch.cat([f[i] for f in found]).unflatten(0, (count, len(x))).transpose(0, 1) for i in (0, 1))
        masks = masks[:, :, 0]
        covered = masks.mean((2, 3))
        wanted = covered.new_tensor(self.areas)
        for i, missed in enumerate(((covered - wanted).abs() > 0.25 * wanted).sum(0).tolist()):
            if missed:
                worst = covered[(covered[:, i] - wanted[i]).abs().argmax(), i]
                q.warn(
                    f"area {self.areas[i]} was not reached for {missed} of {len(x)} example(s), at worst {worst:.3g}: "
                    "raise steps or weight, or take finer cells"
                )
        parts = {"masks": masks, "area": covered, "score": score}
        return q.attribution(self, masks.mean(1), domain=Domain.SITE, parts=parts)

    def _search(self, q: Question, owner: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        """Learn the masks of some pairs of example and area, all steps of it."""
        x = pictures(q, "a mask")
        size = x.shape[2:]
        used, here = owner.unique(return_inverse=True)
        pyramid = Pyramid(x[used], self.levels, self.sigma)
        area = torch.tensor(self.areas, dtype=torch.float64)[which.cpu()]
        counted = self.mask.margin if self.margin else lambda mask: mask
        area *= size.numel() / counted(x[:1, :1]).numel()
        cells = x.new_ones(len(owner), 1, *self.mask.cells(size)).requires_grad_()
        optimizer = torch.optim.SGD([cells], lr=self.lr, momentum=self.momentum, dampening=self.momentum)
        games, signs = self.reward.games, self.reward.signs()
        sign = x.new_tensor(signs).repeat_interleave(len(owner))[:, None, None, None]
        for step in range(self.steps):
            with torch.enable_grad():
                mask = self.mask(cells, size)
                rows = torch.cat([pyramid(m, here) for m in self.reward.masks(mask)])
                if self.flip and step % 2 == 0:
                    rows = rows.flip(3)
                _, slope = q.value_and_grad(rows, owner.repeat(games))
                loss = self.weight * self.growth**step * area_loss(counted(mask), area).sum()
                (cells.grad,) = torch.autograd.grad((rows * (-sign * slope)).sum() + loss, cells)
            optimizer.step()
            with torch.no_grad():
                cells.clamp_(0, 1)
            tick("extremal perturbation, steps", step + 1, self.steps)
        with torch.no_grad():
            mask = self.mask(cells, size)
            rows = torch.cat([pyramid(m, here) for m in self.reward.masks(mask)])
            return mask, q.value(rows, owner.repeat(games)).unflatten(0, (games, len(owner))).T

    def passes(self, q: Question | None = None) -> Passes:
        each = len(self.areas) * self.reward.games
        return Passes((self.steps + 1) * each, self.steps * each, at_x=1)

    @classmethod
    def variants(cls) -> tuple[Explainer, ...]:
        return (
            cls((0.2, 0.4), mask=SmoothMask(2, 3.0), steps=3, levels=3, sigma=2.0),
            cls((0.3,), Dual(), SmoothMask(3, 3.0), steps=2, levels=2, sigma=2.0, flip=False),
        )
