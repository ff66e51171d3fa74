"""The walk along a curve with nodes placed where they are needed.

On networks of piecewise-linear units the gradient along a path changes in many small, independent jumps, so
that over an interval [a, b] it behaves as a random walk pinned at both ends. The best estimate of its integral
is then the trapezoid, and the expected squared error of that is (b - a)² ‖g(b) - g(a)‖² / 12. Intervals where
this is large are cut. The sum over all of them is an estimate of the map's error, which
`benchmarks/quadrature.py` compares with the true one: .96 times as large in the median.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.core import tree
from apportion.core.attribution import References
from apportion.core.errors import NonFiniteError
from apportion.core.question import Question
from apportion.core.tree import Tree
from apportion.parts.paths.path import Legs, Walk

if TYPE_CHECKING:
    from apportion.parts.paths.curve import Curve
    from apportion.parts.quadrature import Adaptive

_MEMORY = 1 << 29
"""Bytes of gradients kept at a time: all those of a path, of as many paths as fit, of one at least."""

_CUTS = 8
"""The most nodes an interval gets in one round."""


def adaptive_walk(curve: Curve, rule: Adaptive, q: Question, start: References, *, rises: bool) -> Walk:
    """Walk a curve, refining until the tolerances are met or the budget is spent."""
    k, count = curve.draws, len(q) * curve.draws
    found = _Found(*(torch.zeros(len(q), k, dtype=torch.float64, device=q.device) for _ in range(4)))

    def legs() -> Iterator[Legs]:
        size = sum(leaf[0].numel() * leaf.element_size() for leaf in tree.leaves(q.x))
        group = max(1, _MEMORY // max(1, size * rule.max_passes))
        for first in range(0, count, group):
            rows = torch.arange(first, min(first + group, count), device=q.device)
            yield from _Refining(curve, rule, q, start, rows // k, rows % k).run(found, rises)
        for met, what, wanted in (
            (found.met_gap, "the gap", rule.tolerance),
            (found.met_map, "the estimated error of the map", rule.map_tolerance),
        ):
            short = (met == 0).any(1).nonzero()[:, 0].tolist()
            if short:
                q.warn(
                    f"Adaptive stopped at its budget of {rule.max_passes} nodes before {what} was within its tolerance "
                    f"of {wanted:g}, for example(s) {', '.join(map(str, short))}; raise max_passes, or the tolerance"
                )

    def riemann() -> dict[str, Tree]:
        gap, map_ = found.met_gap.bool(), found.met_map.bool()
        error = found.error.to(q.fx)
        return {"estimated_error": error, "converged": gap & map_, "gap_converged": gap, "map_converged": map_}

    return Walk(k, legs(), lambda: start, parts=lambda: {"nodes": found.nodes.long()}, riemann=riemann)


@dataclass(eq=False)
class _Found:
    """What is known of each branch in the end: [B, k] each."""

    error: Tensor
    nodes: Tensor
    met_gap: Tensor
    met_map: Tensor


class _Refining:
    """Nodes and intervals of some branches while they are refined."""

    def __init__(
        self, curve: Curve, rule: Adaptive, q: Question, start: References, owner: Tensor, branch: Tensor
    ) -> None:
        self.curve, self.rule, self.q, self.start = curve, rule, q, start
        self.owner, self.branch, self.count = owner, branch, len(owner)
        device = q.device
        u = torch.linspace(0, 1, min(rule.first, rule.max_passes), dtype=torch.float64, device=device) ** 2
        n = len(u)
        self.path = torch.arange(self.count, device=device).repeat_interleave(n)  # of each node
        self.t = u.repeat(self.count)
        self.value, self.grad = self._evaluate(self.path, self.t)
        left = torch.arange(len(self.t), device=device).reshape(self.count, n)[:, :-1].reshape(-1)
        self.left, self.right = left, left + 1
        self.off, self.jump, self.spread, self.size = self._judge(left, left + 1)

    def _evaluate(self, path: Tensor, t: Tensor) -> tuple[Tensor, Tree]:
        owner, branch = self.owner[path], self.branch[path]
        point = self.curve.point(self.q, self.start, owner, branch, t)
        try:
            return self.q.value_and_grad(point, owner)
        except NonFiniteError as error:
            advice = "take a quadrature without nodes at the ends of the path (Gauss, Midpoint)"
            raise error.advising(advice) from error

    def _move(self, path: Tensor, low: Tensor, high: Tensor) -> Tree:
        return self.curve.move(self.q, self.start, self.owner[path], self.branch[path], (low, high))

    def _judge(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Judge intervals by their trapezoids.

        Returns:
            How far each misses the rise, the expected squared error of its sum, that of its map, and the sum of
            its absolute values.
        """
        found = []
        for i in range(0, len(left), self.q.field.chunk):
            a, b = left[i : i + self.q.field.chunk], right[i : i + self.q.field.chunk]
            move = self._move(self.path[a], self.t[a], self.t[b])

            def both(g: Tensor, m: Tensor, a: Tensor = a, b: Tensor = b) -> tuple[Tensor, Tensor]:
                ga, gb = g.detach()[a], g.detach()[b]
                return (ga + gb) / 2 * m.detach(), (gb - ga) * m.detach()

            pairs = [both(g, m) for g, m in zip(tree.leaves(self.grad), tree.leaves(move), strict=True)]
            terms, jumps = [p[0].double() for p in pairs], [p[1].double() for p in pairs]
            rise = (self.value[b] - self.value[a]).detach().double()
            off = rise - tree.total(terms)
            jump = tree.total(jumps) ** 2 / 12
            spread = tree.total([j**2 for j in jumps]) / 12
            found.append((off, jump, spread, tree.total([m.abs() for m in terms])))
        return tuple(torch.cat(column) for column in zip(*found, strict=True))  # pyright: ignore[reportReturnType]

    def _per_path(self, each: Tensor) -> Float[Tensor, " P"]:
        return each.new_zeros(self.count).index_add_(0, self.path[self.left], each)

    def run(self, found: _Found, rises: bool) -> Iterator[Legs]:
        rule = self.rule
        while True:
            norm = self._norm()
            error = self._per_path(self.spread).sqrt() / norm.clamp(min=torch.finfo(torch.float64).tiny)
            rise = (self.q.fx.detach()[self.owner] - self.start.value.detach()[self.owner, self.branch]).double()
            scale = torch.maximum(rise.abs(), 1e-3 * self._per_path(self.size))
            scale = scale.clamp(min=torch.finfo(torch.float64).tiny)
            gap = self._per_path(self.off).abs() / scale
            nodes = torch.bincount(self.path, minlength=self.count)
            met_map, met_gap = error <= rule.map_tolerance, gap <= rule.tolerance
            active = ~(met_map & met_gap) & (nodes < rule.max_passes)
            if not bool(active.any()):
                break
            self._refine(active, nodes, error, norm, scale, met_map, met_gap)
        at = self.owner, self.branch
        found.error[at], found.nodes[at] = error, nodes.double()
        found.met_gap[at], found.met_map[at] = met_gap.double(), met_map.double()
        yield from self._legs(rises)

    def _norm(self) -> Float[Tensor, " P"]:
        """The L2 norm of each branch's map as it stands."""
        total = tree.sums(self.q.x, self.count)
        order, before, after = self._order()
        for i in range(0, len(order), self.q.field.chunk):
            at = slice(i, i + self.q.field.chunk)
            path = self.path[order[at]]
            move = self._move(path, before[at], after[at])
            tree.add_rows(total, path, tree.apply(lambda g, m, o=order[at]: (g[o] * m / 2).detach(), self.grad, move))
        return tree.total(tree.apply(lambda s: s.double() ** 2, total)).sqrt()

    def _refine(
        self,
        active: Tensor,
        nodes: Tensor,
        error: Tensor,
        norm: Tensor,
        scale: Tensor,
        met_map: Tensor,
        met_gap: Tensor,
    ) -> None:
        rule, path = self.rule, self.path[self.left]
        tiny = torch.finfo(torch.float64).tiny
        # each error counts in units of its tolerance, and not at all once that is met
        wanted = (self.off**2 + self.jump) / (scale[path] * max(rule.tolerance, 1e-12)) ** 2 * ~met_gap[path]
        mapped = self.spread / (norm.clamp(min=tiny)[path] * max(rule.map_tolerance, 1e-12)) ** 2 * ~met_map[path]
        need = (wanted + mapped).float().double()  # coarser, so that rounding decides no ties
        # errors fall as 1 / n: a first guess of what is missing, by half of what is there at most
        more = torch.where(met_gap, nodes * (error / max(rule.map_tolerance, 1e-12) - 1), nodes / 2.0)
        more = torch.minimum(more.clamp(min=2).ceil(), (nodes / 2).ceil()).long()
        more = torch.minimum(more, rule.max_passes - nodes) * active
        cuts = _shares(need, path, more)
        cut = cuts > 0
        times = cuts[cut]
        old_left, old_right, inside = self.left[cut], self.right[cut], path[cut]
        at = torch.arange(len(times), device=times.device).repeat_interleave(times)
        step = torch.arange(len(at), device=at.device) - (times.cumsum(0) - times)[at] + 1
        low, high = self.t[old_left], self.t[old_right]
        t = low[at] + (high - low)[at] * (step.double() / (times[at] + 1))
        new = torch.arange(len(t), device=t.device) + len(self.t)
        value, grad = self._evaluate(inside[at], t)
        self.path, self.t = torch.cat([self.path, inside[at]]), torch.cat([self.t, t])
        self.value = torch.cat([self.value, value])
        self.grad = tree.apply(lambda a, b: torch.cat([a, b]), self.grad, grad)
        first, last = step == 1, step == times[at]
        left = torch.cat([old_left, new])
        right = torch.empty_like(left)
        right[: len(times)] = new[first]
        right[len(times) :] = torch.where(last, old_right[at], new + 1)
        judged = self._judge(left, right)
        keep = ~cut
        self.left, self.right = torch.cat([self.left[keep], left]), torch.cat([self.right[keep], right])
        names = ("off", "jump", "spread", "size")
        for name, fresh in zip(names, judged, strict=True):
            setattr(self, name, torch.cat([getattr(self, name)[keep], fresh]))

    def _order(self) -> tuple[Int[Tensor, " M"], Float[Tensor, " M"], Float[Tensor, " M"]]:
        """Sort the nodes by branch and place, and give the places of each one's neighbours, its own at the ends."""
        order = torch.argsort(self.t, stable=True)
        order = order[torch.argsort(self.path[order], stable=True)]
        path, t = self.path[order], self.t[order]
        same = path[1:] == path[:-1]
        before = torch.cat([t[:1], torch.where(same, t[:-1], t[1:])])
        after = torch.cat([torch.where(same, t[1:], t[:-1]), t[-1:]])
        return order, before, after

    def _legs(self, rises: bool) -> Iterator[Legs]:
        """Give at each node half of both intervals beside it or, with rises, each interval at its beginning."""
        order, before, after = self._order()
        path, t, value = self.path[order], self.t[order], self.value[order]
        rise = torch.cat([torch.where(path[1:] == path[:-1], value[1:], value[:-1]), value[-1:]]) - value
        for i in range(0, len(order), self.q.field.chunk):
            at = slice(i, i + self.q.field.chunk)
            owner, branch = self.owner[path[at]], self.branch[path[at]]
            point = self.curve.point(self.q, self.start, owner, branch, t[at])
            grad = tree.index(self.grad, order[at])
            if rises:
                move = self._move(path[at], t[at], after[at])
                yield Legs(owner, branch, t[at], point, value[at], grad, move, rise[at])
            else:
                move = tree.apply(lambda m: m / 2, self._move(path[at], before[at], after[at]))
                yield Legs(owner, branch, t[at], point, value[at], grad, move)


def _shares(need: Float[Tensor, " I"], path: Int[Tensor, " I"], more: Int[Tensor, " P"]) -> Int[Tensor, " I"]:
    """Deal nodes to intervals: each next one where it lowers Σ need / (cuts + 1)² most, `more` for each path.

    >>> _shares(torch.tensor([9.0, 1.0, 5.0]), torch.tensor([0, 0, 1]), torch.tensor([2, 1])).tolist()
    [2, 0, 1]
    """
    cuts = torch.arange(_CUTS, dtype=need.dtype, device=need.device)
    gain = need[:, None] * (1 / (cuts + 1.0) ** 2 - 1 / (cuts + 2.0) ** 2)
    owner = path[:, None].expand_as(gain).reshape(-1)
    order = torch.argsort(gain.reshape(-1), descending=True, stable=True)
    order = order[torch.argsort(owner[order], stable=True)]
    counts = torch.bincount(owner, minlength=len(more))
    begin = counts.cumsum(0) - counts
    rank = torch.arange(len(order), device=need.device) - begin[owner[order]]
    taken = order[rank < more[owner[order]]]
    return torch.bincount(taken // _CUTS, minlength=len(need))
