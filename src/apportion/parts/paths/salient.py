"""The salient path: the features that change the score most move first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.core import tree
from apportion.core.attribution import References
from apportion.core.errors import ConfigError, NonFiniteError
from apportion.core.explainer import Passes
from apportion.core.progress import tick
from apportion.core.question import Question
from apportion.core.tree import Tree
from apportion.parts.baselines import Baseline, Zero
from apportion.parts.baselines.search import listed
from apportion.parts.paths.path import Legs, Walk
from apportion.parts.paths.trace import Record, Trace, flat, groups, shaped


@dataclass(frozen=True)
class Salient(Trace):
    """The manipulation path of Zhang et al. 2024: in every step, the features with the largest |m_i δ_i| move.

    δ is what is left of the way, and m = λ m + (1 - λ) ∇f a running gradient that chooses, while legs carry ∇f
    itself. Chosen features go to the end of their way, or all by the same part of what is left where a step
    would be longer than η ‖x - x'‖₁. Features tied at the limit are chosen together; where fewer than wanted
    change the score at all, those with the longest way left come after them.

    Attributes:
        baseline: the point x'.
        size: how many features a step moves, as a number, or as a share of all for a fraction up to 1.0.
        eta: the longest step η, as a share of the whole way in L1; 1 for no limit.
        momentum: λ.
        direction: "insert" walks from x' to x, "delete" from x to x' with the path read backwards, and "both"
            makes a branch of each.
        max_steps: the last step goes all the way; matters for a `size` in numbers.
    """

    _positive = ("size", "eta", "max_steps")

    baseline: Baseline = Zero()
    size: int | float = 1 / 14
    eta: float = 0.02
    momentum: float = 0.5
    direction: Literal["insert", "delete", "both"] = "both"
    max_steps: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.size, float) and self.size > 1:
            raise ConfigError(f"Salient(size={self.size})", "a whole number, or a share up to 1.0", "write size=0.05")
        if not self.eta <= 1:
            raise ConfigError(f"Salient(eta={self.eta})", "a share of the way, up to 1 for no limit", "write eta=1")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"Salient(momentum={self.momentum})", "0 or more, below 1", "write momentum=0.5")

    @property
    def draws(self) -> int:
        return self.baseline.draws * len(self._ways)

    @property
    def _ways(self) -> tuple[bool, ...]:
        """For each branch of a baseline, whether it is walked from x back."""
        return {"insert": (False,), "delete": (True,), "both": (False, True)}[self.direction]

    @property
    def most(self) -> int:
        if isinstance(self.size, int):
            return self.max_steps
        short = 0 if self.eta == 1 else math.floor(1 / self.eta) + 1
        return min(self.max_steps, math.ceil(1 / self.size) + short)

    def passes(self, *, rises: bool = False) -> Passes:
        n = self.most * self.draws
        return self.baseline.added_to(Passes(n, n, at_x=1, exact=False))

    def walk(self, q: Question, *, rises: bool = False) -> Walk:
        once, k = q.references(self.baseline), len(self._ways)
        start = References(
            once.value.repeat_interleave(k, 1),
            None if once.top_class is None else once.top_class.repeat_interleave(k, 1),
            once.equal_share.repeat_interleave(k, 1),
            tree.apply(lambda r: r.repeat_interleave(k, 1), once.rows),
        )
        return Walk(
            self.draws, self._legs(q, start, rises), lambda: once, origin=tuple(b // k for b in range(self.draws))
        )

    def _legs(self, q: Question, start: References, rises: bool) -> Iterator[Legs]:
        back = torch.tensor(self._ways, device=q.device)
        done, total, cut_short = 0, len(q) * self.draws, torch.zeros(len(q), dtype=torch.bool, device=q.device)
        still = torch.zeros_like(cut_short)
        for owner, branch in groups(q, self.draws, self.most):
            for way in sorted(set(self._ways)):
                mine = back[branch % len(self._ways)] == way
                own, br = owner[mine], branch[mine]
                if not len(own):
                    continue
                low, high = tree.apply(lambda r, o=own, b=br: r[o, b], start.rows), tree.index(q.x, own)
                record, late, flats = self._walked(q, own, br, *((high, low) if way else (low, high)))
                cut_short[own[late]] = True
                still[own[flats]] = True
                end, value = (low, start.value[own, br]) if way else (high, q.fx[own])
                yield from record.legs(end, value, back=way, rises=rises)
            done += len(owner)
            tick("salient path", done, total)
        if bool(cut_short.any()):
            q.warn(
                f"the salient path had features left after {self.most} steps for example(s) "
                f"{listed(q, cut_short)}: its last step took them all; raise max_steps"
            )
        if bool(still.any()):
            q.warn(
                f"the gradient was 0 everywhere at steps of the salient path, for example(s) "
                f"{listed(q, still)}: features moved by distance there, and these steps give nothing"
            )

    def _walked(
        self, q: Question, owner: Tensor, branch: Tensor, begin: Tree, end: Tree
    ) -> tuple[Record, Tensor, Tensor]:
        """Walk from `begin` to `end`; also tell which rows were cut short, and which met a gradient of 0."""
        record = Record(owner, branch)
        delta = flat(tree.apply(lambda e, b: (e - b).abs(), end, begin))
        delta = delta.to(torch.promote_types(delta.dtype, torch.float32))
        size = self.size if isinstance(self.size, int) else math.ceil(self.size * delta.shape[1])
        length = delta.sum(1, dtype=torch.float64)
        beta, mean = torch.zeros_like(delta), torch.zeros_like(delta)
        flats = torch.zeros(len(owner), dtype=torch.bool, device=q.device)
        going = (length > 0).nonzero()[:, 0]
        for _ in range(self.most):
            if not len(going):
                break
            low, high, part = (tree.index(t, going) for t in (begin, end, shaped(beta, end)))
            point = tree.apply(torch.lerp, low, high, part)
            try:
                value, grad = q.value_and_grad(point, owner[going])
            except NonFiniteError as error:
                advice = "start from a baseline where the gradient is finite: a salient path takes it there"
                raise error.advising(advice) from error
            record.add(going, point, value, grad)
            slope = flat(grad).to(delta)
            flats[going] |= ~slope.any(1)
            mean[going] = self.momentum * mean[going] + (1 - self.momentum) * slope
            beta[going] = self._advance(
                beta[going], mean[going], delta[going], min(size, delta.shape[1]), length[going]
            )
            going = going[((beta[going] < 1) & (delta[going] > 0)).any(1)]
        return record, going, flats.nonzero()[:, 0]

    def _advance(
        self, beta: Float[Tensor, "R d"], mean: Tensor, delta: Tensor, size: int, length: Float[Tensor, " R"]
    ) -> Float[Tensor, "R d"]:
        """Choose how much of its way each feature has gone after a step."""
        left = (1 - beta) * delta
        done = (beta >= 1) | (delta == 0)
        gain = (mean * left).abs()
        # behind all that change the score: the rest, longest way first
        order = torch.where(gain > 0, gain, left / left.amax(1, keepdim=True).clamp(min=1e-30) - 2)
        order = order.masked_fill(done, -torch.inf)
        cut = order.kthvalue(order.shape[1] - size + 1, 1, keepdim=True).values
        chosen = (order >= cut) & ~done
        reach = (left * chosen).sum(1, dtype=torch.float64)
        limit = self.eta * length if self.eta < 1 else torch.full_like(length, torch.inf)
        part = torch.where(reach > limit, limit / reach.masked_fill(reach == 0, 1), 1.0).to(beta)[:, None]
        there = torch.where(part < 1, beta + part * (1 - beta), 1.0)
        return torch.where(chosen, there, beta)
