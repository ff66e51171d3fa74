"""The guided path: features the score reacts to least move first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.core import tree
from apportion.core.attribution import References
from apportion.core.errors import ConfigError, NonFiniteError
from apportion.core.explainer import Passes
from apportion.core.progress import tick
from apportion.core.question import Question
from apportion.parts.baselines import Baseline, Zero
from apportion.parts.baselines.search import listed
from apportion.parts.paths.path import Legs, Walk
from apportion.parts.paths.trace import Trace, flat, groups, shaped


@dataclass(frozen=True)
class GuidedPath(Trace):
    """The path of Kapishnikov et al. 2021, algorithm 1: low gradients first, near the straight line.

    Step s of N ends where the L1 distance to x is (1 - s/N) of ‖x - x'‖₁. Until it is, the features with the
    lowest |∂f| move: those at or below the quantile, of the gradient at the step's beginning, among all that
    have not yet reached this step's bound; features tied at the quantile move together. Every feature i stays
    at x'_i + α_i (x_i - x'_i) with α_i within `max_dist` of s/N; what lags behind is moved up first.

    Attributes:
        baseline: the starting point x'.
        steps: N, each with one gradient.
        fraction: the quantile; the share of features that move at a time.
        max_dist: how far, as a share of the way, a feature may be from the straight line: 0 is the straight line
            itself, 1 leaves the choice free.
    """

    _positive = ("steps",)

    baseline: Baseline = Zero()
    steps: int = 200
    fraction: float = 0.25
    max_dist: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("fraction", "max_dist"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"GuidedPath({name}={getattr(self, name)})", "a share, 0 to 1", f"write {name}=0.25")

    @property
    def draws(self) -> int:
        return self.baseline.draws

    @property
    def most(self) -> int:
        return self.steps

    def walk(self, q: Question, *, rises: bool = False) -> Walk:
        start = q.references(self.baseline)
        return Walk(self.draws, self._legs(q, start, rises), lambda: start)

    def passes(self, *, rises: bool = False) -> Passes:
        n = self.steps * self.draws
        return self.baseline.added_to(Passes(n, n, at_x=1))

    def _legs(self, q: Question, start: References, rises: bool) -> Iterator[Legs]:
        flats = torch.zeros(len(q), dtype=torch.long, device=q.device)
        done, total = 0, len(q) * self.draws * self.steps
        for owner, branch in groups(q, self.draws):
            held: Legs | None = None
            for leg in self._group(q, start, owner, branch):
                still = tree.total(tree.apply(torch.abs, leg.grad)) == 0
                flats[owner[still]] += 1
                if not rises:
                    yield leg
                elif held is not None:
                    yield replace(held, rise=leg.value - held.value)
                held = leg
                done += len(owner)
                tick("guided path", done, total)
            if rises and held is not None:
                yield replace(held, rise=q.fx[owner] - held.value)
        if bool(flats.any()):
            q.warn(
                f"the gradient was 0 everywhere at up to {int(flats.max())} steps of the guided path, for example(s) "
                f"{listed(q, flats > 0)}: all features moved together there, and these steps give nothing"
            )

    def _group(self, q: Question, start: References, owner: Tensor, branch: Tensor) -> Iterator[Legs]:
        begin, end = tree.apply(lambda r: r[owner, branch], start.rows), tree.index(q.x, owner)
        delta = flat(tree.apply(lambda x, r: (x - r).abs(), end, begin))
        delta = delta.to(torch.promote_types(delta.dtype, torch.float32))
        alpha, point = torch.zeros_like(delta), begin
        for step in range(self.steps):
            try:
                value, grad = q.value_and_grad(point, owner)
            except NonFiniteError as error:
                advice = "start from a baseline where the gradient is finite: a guided path takes it there"
                raise error.advising(advice) from error
            alpha = self._advance(alpha, flat(grad).abs().to(delta), delta, step + 1)
            part = shaped(alpha, end)
            ahead = tree.apply(torch.lerp, begin, end, part)
            t = torch.full((len(owner),), step / self.steps, dtype=torch.float64, device=q.device)
            yield Legs(owner, branch, t, point, value, grad, tree.apply(torch.sub, ahead, point))
            point = ahead

    def _advance(
        self, alpha: Float[Tensor, "R d"], slope: Float[Tensor, "R d"], delta: Float[Tensor, "R d"], step: int
    ) -> Float[Tensor, "R d"]:
        """Choose where on its way each feature is after a step; few rounds, each over all rows and features."""
        if step == self.steps:
            return torch.ones_like(alpha)
        share = step / self.steps
        low, high = (alpha.new_tensor(a) for a in (max(share - self.max_dist, 0), min(share + self.max_dist, 1)))
        alpha = torch.maximum(alpha, low)
        length = delta.sum(1, dtype=torch.float64)
        budget = ((1 - alpha) * delta).sum(1, dtype=torch.float64) - (1 - share) * length
        rounding = 16 * torch.finfo(alpha.dtype).eps * length
        lowest = int(self.fraction * (alpha.shape[1] - 1)) + 1
        going: Int[Tensor, " A"] = (budget > rounding).nonzero()[:, 0]
        while len(going):
            here = alpha[going]
            # features at the bound, or without a way to go, are out, but count for the quantile
            order = slope[going].masked_fill((here >= high) | (delta[going] == 0), torch.inf)
            cut = order.kthvalue(lowest, 1, keepdim=True).values
            chosen = (order <= cut) & torch.isfinite(order)
            reach = ((high - here) * delta[going] * chosen).sum(1, dtype=torch.float64)
            whole = budget[going] >= reach
            gamma = torch.where(whole, 1.0, budget[going] / reach.masked_fill(reach == 0, 1)).to(here)[:, None]
            there = torch.where(whole[:, None], high, here + gamma * (high - here))
            alpha[going] = torch.where(chosen, there, here)
            budget[going] = torch.where(whole, budget[going] - reach, 0.0)
            going = going[whole & (budget[going] > rounding[going]) & chosen.any(1)]
        return alpha
