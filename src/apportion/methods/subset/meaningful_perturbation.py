"""Meaningful perturbation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.core.attribution import Attribution, Domain
from apportion.core.card import Card, Family, Kind, Need, Paper
from apportion.core.errors import ConfigError
from apportion.core.explainer import Explainer, Passes
from apportion.core.progress import tick
from apportion.core.question import Question
from apportion.core.registry import register
from apportion.core.score import Probability, Score
from apportion.parts.baselines import Baseline, Blurred, Zero
from apportion.parts.baselines.simple import blur
from apportion.parts.subsets.pictures import asked, pictures, shifted
from apportion.parts.subsets.starts import CircleStart, MaskStart, UniformStart

CARD = Card(
    title="Meaningful perturbation",
    paper=Paper(
        "Fong, Vedaldi", 2017, "Interpretable explanations of black boxes by meaningful perturbation", "ICCV 2017"
    ),
    kind=Kind.SALIENCE,
    intent="The smallest smooth region whose removal takes the class's probability away, learned for each picture.",
    cost="n + 1 + the start's forward, n backward (n steps one after another)",
    families=(Family.INFLUENTIAL_SUBSET, Family.REMOVAL),
    unjudged="Deng et al. 2025 place it among the influential subsets and judge its faithfulness nowhere",
    needs=frozenset({Need.SPATIAL}),
    signed=False,
    unit="",
    cautions=(
        "Not convex: another start or seed may end in another region of equal loss.",
        "What suffices to remove is not all that matters: of two copies of an object it may find one.",
        "The penalties are sums over the mask's cells, so lambda_area and lambda_smooth mean another thing on "
        "another grid, or for another score than a probability.",
        "The removed region is blurred, which a network may answer to in its own way.",
        "Steps follow one another, so only examples fill a pass.",
        "The authors' code takes the derivative as if the mask were not blurred, and squares the slopes of the mask "
        "together before the power beta/2; here the first is exact and the second as printed.",
    ),
)


@register(CARD)
@dataclass(frozen=True)
class MeaningfulPerturbation(Explainer):
    """1 - m*, m* = argmin λ₁ Σ|1 - m| + λ₂ Σ|∇m|^β + f_c(m x + (1 - m) x'); Fong and Vedaldi 2017.

    Values are 1 - m at each pixel, [B, H, W], between 0 and 1: 1 where the picture must go for the class to go. In
    `parts`: `mask`, which is m, [B, H, W]; `score` behind it; `area`, the mean of 1 - m; `loss`.

    Attributes:
        score: f_c; None asks the field's own, whose units the penalties then have to match.
        baseline: x', what stands where the mask is 0.
        steps: of Adam, each a pass there and back.
        lr: its rate.
        lambda_area: λ₁, for each cell that is not kept.
        lambda_smooth: λ₂, for each pair of neighboring cells.
        beta: β, at least 1.
        cell: pixels along the side of a cell of the mask.
        sigma: of the blur of the enlarged mask, in pixels; 0 for none.
        jitter: the picture is moved by fewer than so many pixels under the mask, anew at every step.
        start: where the search starts; `ap.subsets.CircleStart()` or `ap.subsets.UniformStart()`.

    Raises:
        InputError: not one tensor of pictures.

    >>> import torch, apportion as ap
    >>> x = torch.zeros(1, 1, 16, 16)
    >>> x[:, :, 4:8, 4:8] = 1                                       # all the model looks at
    >>> field = ap.Field(lambda x: x[:, 0, 4:8, 4:8].mean((1, 2)))
    >>> search = ap.MeaningfulPerturbation(
    ...     None, ap.baselines.Zero(), steps=30, lambda_smooth=0, cell=4, sigma=0, jitter=0
    ... )
    >>> a = search(field, x)
    >>> a.values[0, ::4, ::4].round(decimals=1).tolist()
    [[0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    """

    _positive = ("steps", "lr", "cell")
    _not_negative = ("lambda_area", "lambda_smooth", "sigma", "jitter")

    score: Score | None = Probability()
    baseline: Baseline = Blurred(10.0)
    steps: int = 300
    lr: float = 0.1
    lambda_area: float = 1e-4
    lambda_smooth: float = 1e-2
    beta: float = 3.0
    cell: int = 8
    sigma: float = 5.0
    jitter: int = 4
    start: MaskStart = CircleStart()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta >= 1:
            raise ConfigError(f"beta={self.beta}", "1 or more: below, the slope is infinite", "write beta=3.0")

    def hidden(self, q: Question) -> Float[Tensor, "B C H W"]:
        """Give x', the mean of several baselines."""
        rows = q.references(self.baseline).rows
        assert isinstance(rows, Tensor)  # as the pictures are
        return rows.mean(1)

    def enlarged(self, cells: Float[Tensor, "R 1 h w"], size: tuple[int, ...]) -> Float[Tensor, "R 1 H W"]:
        """Spread cells over pixels, and blur."""
        grown = cells.repeat_interleave(self.cell, 2).repeat_interleave(self.cell, 3)[..., : size[0], : size[1]]
        return blur(grown, self.sigma) if self.sigma else grown

    def penalty(self, cells: Float[Tensor, "R 1 h w"]) -> Float[Tensor, " R"]:
        """λ₁ Σ|1 - m| + λ₂ Σ|∇m|^β, over cells."""
        rough = sum(cells.diff(dim=axis).abs().pow(self.beta).flatten(1).sum(1) for axis in (2, 3))
        return self.lambda_area * (1 - cells).abs().flatten(1).sum(1) + self.lambda_smooth * rough

    def explain(self, q: Question) -> Attribution:
        pictures(q, "MeaningfulPerturbation")
        kept = [self._search(q, owner) for _, owner in q.grid(1, "meaningful perturbation")]
        mask, value, penalty = (torch.cat([k[i] for k in kept]) for i in range(3))
        parts = {"mask": mask[:, 0], "score": value, "area": 1 - mask.mean((1, 2, 3)), "loss": value + penalty}
        return q.attribution(self, 1 - mask[:, 0], domain=Domain.SITE, parts=parts)

    def _search(self, q: Question, owner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Learn the masks of some examples, all steps of it."""
        x, score = pictures(q, "a mask"), asked(q, self.score)
        size = (math.ceil(x.shape[2] / self.cell), math.ceil(x.shape[3] / self.cell))
        shift = q.stream("jitter")
        shown, hidden = x[owner], self.hidden(q)[owner]
        cells = self.start(q, owner, size, hidden, score).to(x.dtype).clone().requires_grad_()
        optimizer = torch.optim.Adam([cells], lr=self.lr)
        for step in range(self.steps):
            seen, behind = shown, hidden
            if self.jitter:
                by = shift.integers(self.jitter, owner, torch.full_like(owner, step), 2).to(x.device)
                seen, behind = shifted(shown, by), shifted(hidden, by)
            with torch.enable_grad():
                mask = self.enlarged(cells, x.shape[2:])
                rows = mask * seen + (1 - mask) * behind
                _, slope = q.value_and_grad(rows, owner, score)
                (way,) = torch.autograd.grad(rows, cells, slope)
                (own,) = torch.autograd.grad(self.penalty(cells).sum(), cells)
            cells.grad = way + own
            optimizer.step()
            with torch.no_grad():
                cells.clamp_(0, 1)
            tick("meaningful perturbation, steps", step + 1, self.steps)
        with torch.no_grad():
            mask = self.enlarged(cells, x.shape[2:])
            value = q.value(mask * shown + (1 - mask) * hidden, owner, score)
            return mask, value, self.penalty(cells)

    def passes(self, q: Question | None = None) -> Passes:
        return self.baseline.added_to(Passes(self.steps + 1 + self.start.rows, self.steps, at_x=1))

    @classmethod
    def variants(cls) -> tuple[Explainer, ...]:
        return (
            cls(baseline=Blurred(1.0), steps=3, cell=3, sigma=1.0, start=CircleStart(3, sigma=1.0)),
            cls(None, Zero(), steps=2, cell=2, sigma=0.0, jitter=0, start=UniformStart()),
        )
