"""Ascent paths: from the example up the probability of other classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from apportion.core import tree
from apportion.core.errors import ScoreError
from apportion.core.explainer import Passes
from apportion.core.progress import tick
from apportion.core.question import Question
from apportion.core.score import Contrast, Logit, LogOdds, LogProbability, Probability, main_output
from apportion.core.tree import Tree
from apportion.parts.baselines.search import everyone, listed
from apportion.parts.baselines.simple import bounds_of
from apportion.parts.paths.path import Legs, Walk
from apportion.parts.paths.trace import Ends, Record, Trace, groups, unmoved


@dataclass(frozen=True)
class Ascent(Trace):
    """The adversarial paths of Pan et al. 2021, algorithm 1: a branch for each of several other classes.

    From x, every step adds ε sign ∇p_j, into the field's bounds where it declares them, until class j is the
    highest output. The point reached is the branch's starting point, and the path runs from there back to x.
    An output that is one number z counts as two classes, with logits 0 and z.

    Attributes:
        step: ε, in units of x.
        iterations: the most steps of a branch.
        topk: about how many classes: the ids 0, m, 2m, ... with m = ⌊classes / topk⌋ for "grid", topk + 1 of
            them at most; exactly topk drawn by each example's random stream for "random". The class predicted at
            x is none of them, nor the class explained where there are others; another id takes their place.
        classes: "grid" or "random".
        published: take every step from x itself, as the authors' code does: points stay within ε of x, and moves
            do not add up to the way.
        total: "mean" averages over the branches; "sum" adds them up, value and claim alike.
    """

    _positive = ("step", "iterations", "topk")

    step: float = 0.05
    iterations: int = 15
    topk: int = 15
    classes: Literal["grid", "random"] = "grid"
    published: bool = False
    total: Literal["mean", "sum"] = "mean"

    @property
    def draws(self) -> int:
        return self.topk + (self.classes == "grid")

    @property
    def most(self) -> int:
        return self.iterations

    def passes(self, *, rises: bool = False) -> Passes:
        n = self.draws * self.iterations
        return Passes(1 + n + self.draws * (3 if rises else 2), 2 * n, at_x=1, exact=False)

    def walk(self, q: Question, *, rises: bool = False) -> Walk:
        chosen = self._choose(q)
        k = chosen.shape[1]
        ends = Ends(q, k, "Ascent")
        found = {"success": torch.zeros_like(chosen, dtype=torch.bool), "steps": torch.zeros_like(chosen)}

        def parts() -> Mapping[str, Tree]:
            return {"classes": chosen, **found}

        weight = torch.full(chosen.shape, 1.0 if self.total == "sum" else 1 / k, dtype=q.fx.dtype, device=q.device)
        return Walk(k, self._legs(q, chosen, ends, found, rises), ends.references, weight, parts)

    def _legs(self, q: Question, chosen: Tensor, ends: Ends, found: dict[str, Tensor], rises: bool) -> Iterator[Legs]:
        k = chosen.shape[1]
        done, total = 0, chosen.numel()
        for owner, branch in groups(q, k, self.iterations):
            record, end, reached = self._climb(q, owner, branch, chosen[owner, branch])
            ends.put(owner, branch, end)
            found["success"][owner, branch], found["steps"][owner, branch] = reached, record.counts
            value = q.value(end, owner) if rises else torch.zeros(len(owner), dtype=q.fx.dtype, device=q.device)
            origin = tree.index(q.x, owner) if self.published else None
            yield from record.legs(end, value, back=True, rises=rises, origin=origin)
            done += len(owner)
            tick("ascent", done, total)
        failed = ~found["success"]
        if bool(failed.any()):
            q.warn(
                f"Ascent did not reach {int(failed.sum())} of {total} classes within {self.iterations} steps of "
                f"{self.step:g}, for example(s) {listed(q, failed.any(1))}: those paths start where "
                "the ascent ended; see parts['success']"
            )

    def _climb(self, q: Question, owner: Tensor, branch: Tensor, goal: Tensor) -> tuple[Record, Tree, Tensor]:
        """Climb from x; give the steps, where each row ended, and whether its class was the highest there."""
        record, limits = Record(owner, branch), bounds_of(q)
        first = tree.index(q.x, owner)
        here = tree.apply(torch.clone, first)
        reached = torch.zeros(len(owner), dtype=torch.bool, device=q.device)
        going = torch.arange(len(owner), device=q.device)
        for _ in range(self.iterations):
            if not len(going):
                break
            point = tree.index(here, going)
            value, grad, way, top = q.steered(point, owner[going], _aim, goal[going])
            there = top == goal[going]
            reached[going[there]] = True
            base = tree.index(first, going) if self.published else point
            ahead = tree.apply(lambda p, w: p + self.step * w.sign(), base, way)
            if limits is not None:
                ahead = tree.apply(lambda p, lim=limits: p.clamp(*lim), ahead)
            on = ~there if self.published else ~there & ~unmoved(point, ahead)
            rows = going[on]
            record.add(rows, tree.index(point, on), value[on], tree.index(grad, on))
            tree.apply(lambda h, a, r=rows, o=on: h.index_copy_(0, r, a[o]), here, ahead)
            going = rows
        if len(going):  # those that used all their steps have not been looked at since the last
            last = _logits(q, q.outputs(tree.index(here, going), owner[going]))
            reached[going] = last.argmax(1) == goal[going]
        return record, here, reached

    def _choose(self, q: Question) -> Int[Tensor, "B k"]:
        """Choose the classes whose probability each example climbs."""
        z = _logits(q, q.outputs(q.x, everyone(q)))
        count = z.shape[1]
        if count > 2 and bool((z >= 0).all()) and torch.allclose(z.sum(1), torch.ones_like(z[:, 0]), atol=1e-4):
            q.warn("the outputs look like probabilities, and Ascent climbs a softmax of them again: return logits")
        if bounds_of(q) is None:
            q.warn(
                f"no bounds hold where Ascent climbs: its step {self.step:g} is in units of x, and nothing is clipped"
            )
        wanted = self.topk
        if self.classes == "random":
            who = everyone(q).cpu()
            like = torch.zeros(1, count, dtype=torch.float64)
            order = q.stream("ascent classes").uniform(like, who, torch.zeros_like(who))
            order = order.to(q.device)
        else:
            grid = torch.arange(0, count, max(1, count // self.topk), device=q.device)[: self.topk + 1]
            wanted = len(grid)
            order = torch.arange(count, dtype=torch.float64, device=q.device) + count
            order[grid] -= count
            order = (order / (2 * count)).repeat(len(q), 1)
        if (
            isinstance(q.field.score, Logit | Probability | LogProbability | LogOdds | Contrast)
            and q.target is not None
        ):
            order = order.scatter_add(1, q.target[:, :1], torch.ones_like(order[:, :1]))
        order = order.scatter(1, z.argmax(1, keepdim=True), torch.inf)
        if self.topk > count - 1:
            q.warn(f"Ascent has {count - 1} other class(es) to climb, fewer than topk = {self.topk}")
        return torch.argsort(order, dim=1, stable=True)[:, : min(wanted, count - 1)]


def _aim(outputs: Any, goal: Int[Tensor, " R"]) -> tuple[Float[Tensor, " R"], Int[Tensor, " R"]]:
    """Give log p_j, whose gradient has the signs of that of p_j and does not underflow, and the highest class."""
    z = _two(main_output(outputs))
    return F.log_softmax(z, 1).gather(1, goal[:, None])[:, 0], z.argmax(1)


def _two(z: Tensor) -> Float[Tensor, "R C"]:
    """View one number as two classes."""
    if z.ndim == 1 or (z.ndim == 2 and z.shape[1] == 1):
        z = z.reshape(-1)
        return torch.stack([torch.zeros_like(z), z], 1)
    return z


def _logits(q: Question, outputs: Any) -> Float[Tensor, "R C"]:
    """Find the logits among the outputs.

    Raises:
        ScoreError: outputs that are not one score per class.
    """
    many = bool(getattr(q.field.score, "multilabel", False))
    z = None if q.field.score.site is not None else _two(main_output(outputs))
    if z is None or z.ndim != 2 or many:
        given = (
            "a score of an inner site" if z is None else "classes that exclude none" if many else f"{tuple(z.shape)}"
        )
        raise ScoreError(
            f"Ascent on {given}",
            "outputs [rows, classes] of which the highest is the decision",
            "explain a class of the model's output, or take a path from a baseline",
        )
    return z
