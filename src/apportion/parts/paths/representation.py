"""The path that makes the example's representation like that of references."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from apportion.core import tree
from apportion.core.errors import ConfigError, SiteError
from apportion.core.explainer import Passes
from apportion.core.progress import tick
from apportion.core.question import Question
from apportion.core.score import main_output
from apportion.core.site import At, Site
from apportion.core.tree import Tree
from apportion.parts.baselines import Baseline, Zero
from apportion.parts.baselines.search import listed, norm
from apportion.parts.baselines.simple import bounds_of
from apportion.parts.paths.path import Legs, Walk
from apportion.parts.paths.trace import Ends, Record, Trace, groups, unmoved


@dataclass(frozen=True)
class Representation(Trace):
    """GradPath of Zhuo and Ge 2024: from x down the gradient of ‖rep(z) - rep(x_r)‖², a branch per reference x_r.

    z_0 = x, and z_{k+1} = z_k - η u with u that gradient at length 1, into the field's bounds where it declares
    them. Points, steps and gradients are all in units of x. Where the walk ends is GradCF, the branch's
    starting point, from which the path runs back to x; a branch whose gradient vanishes ends there. A model
    whose representation is x itself gives the straight line from each reference.

    Attributes:
        references: the points x_r, which should be examples of other classes.
        steps: of each branch.
        eta: the length η of a step, Euclidean; None for ‖x - x_r‖ / steps. The authors use 256/255 with pictures in
            [0, 1].
        site: the representation; what the last `nn.Linear` of a forward pass is given unless named.
    """

    _positive = ("steps",)

    references: Baseline = Zero()
    steps: int = 201
    eta: float | None = None
    site: Site | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eta is not None and not self.eta > 0:
            raise ConfigError(f"Representation(eta={self.eta})", "a length above 0, or None", "leave it out")

    @property
    def draws(self) -> int:
        return self.references.draws

    @property
    def most(self) -> int:
        return self.steps

    def passes(self, *, rises: bool = False) -> Passes:
        k = self.draws
        forward = k * (self.steps + (4 if rises else 3))
        return self.references.added_to(Passes(forward, 2 * k * self.steps, at_x=1, exact=False))

    def walk(self, q: Question, *, rises: bool = False) -> Walk:
        targets, k = q.references(self.references).rows, self.draws
        ends = Ends(q, k, "Representation")
        left = torch.ones(len(q), k, dtype=torch.float64, device=q.device)
        legs = self._legs(q, targets, self._site(q), ends, left, rises)
        return Walk(k, legs, ends.references, parts=lambda: {"distance_left": left.to(q.fx)})

    def _site(self, q: Question) -> Site | None:
        """Find the representation; None for the outputs."""
        if self.site is not None:
            return self.site
        module = q.field.twin().module
        if isinstance(module, nn.Linear):
            return At("", end="input")
        linear = set() if module is None else {n for n, m in module.named_modules() if isinstance(m, nn.Linear)}
        called = [s.site for s in q.sites() if isinstance(s.site, At) and s.site.name in linear] if linear else []
        if called:
            last = called[-1]
            return At(last.name, last.call, "input")
        if q.field.score.site is not None:
            raise SiteError(
                "a model without nn.Linear, and a score of an inner site",
                "a representation",
                "name it: Representation(site=ap.At(...))",
            )
        q.warn("the model has no nn.Linear: Representation compares outputs; name a site to compare something else")
        return None

    def _reps(self, q: Question, rows: Tree, owner: Tensor, site: Site | None) -> Tensor:
        """Read the representation of points."""
        if site is None:
            rep = main_output(q.outputs(rows, owner))
        else:
            rep = q.tap(rows, owner, [site], grad=False)[1][site].value
        if rep.shape[0] != len(owner) or not rep.is_floating_point():
            raise SiteError(
                f"{site} with values {tuple(rep.shape)} of {rep.dtype} for {len(owner)} row(s)",
                "floating point, rows first",
                "choose another site as representation",
            )
        return rep

    def _legs(
        self, q: Question, targets: Tree, site: Site | None, ends: Ends, left: Tensor, rises: bool
    ) -> Iterator[Legs]:
        done, total = 0, left.numel()
        for owner, branch in groups(q, self.draws, self.steps):
            reference = tree.apply(lambda r, o=owner, b=branch: r[o, b], targets)
            record, end, share = self._descend(q, owner, branch, reference, site)
            left[owner, branch] = share
            ends.put(owner, branch, end)
            value = q.value(end, owner) if rises else torch.zeros(len(owner), dtype=q.fx.dtype, device=q.device)
            yield from record.legs(end, value, back=True, rises=rises)
            done += len(owner)
            tick("representation path", done, total)
        away = left >= 1
        if bool(away.any()):
            q.warn(
                f"the path came no nearer to the representation of {int(away.sum())} reference(s), for "
                f"example(s) {listed(q, away.any(1))}: see parts['distance_left'], or change eta, site or reference"
            )

    def _descend(
        self, q: Question, owner: Tensor, branch: Tensor, reference: Tree, site: Site | None
    ) -> tuple[Record, Tree, Tensor]:
        """Walk from x; give the steps, the ends, and which share of the distance between representations is left."""
        record, limits, first = Record(owner, branch), bounds_of(q), tree.index(q.x, owner)
        rep = self._reps(q, reference, owner, site)
        length = norm(tree.apply(torch.sub, first, reference)) / self.steps
        if self.eta is not None:
            length = torch.full_like(length, self.eta)
        here = tree.apply(torch.clone, first)
        begun = torch.zeros(len(owner), dtype=torch.float64, device=q.device)
        going = torch.arange(len(owner), device=q.device)
        for step in range(self.steps):
            if not len(going):
                break
            point = tree.index(here, going)
            value, grad, way, square = q.steered(point, owner[going], _apart, rep[going], site)
            if step == 0:
                begun = square.double()
            steep = norm(way)
            pace = torch.where(steep > 0, length[going] / steep.masked_fill(steep == 0, 1), 0.0)
            ahead = tree.apply(lambda p, w, s=pace: p - tree.per_row(s, w) * w, point, way)
            if limits is not None:
                ahead = tree.apply(lambda p, lim=limits: p.clamp(*lim), ahead)
            on = ~unmoved(point, ahead)
            rows = going[on]
            record.add(rows, tree.index(point, on), value[on], tree.index(grad, on))
            tree.apply(lambda h, a, r=rows, o=on: h.index_copy_(0, r, a[o]), here, ahead)
            going = rows
        final = _apart(self._reps(q, here, owner, site).double(), rep.double())[0]
        share = torch.where(begun > 0, (final / begun.masked_fill(begun == 0, 1)).sqrt(), 1.0)
        return record, here, share


def _apart(seen: Any, rep: Tensor) -> tuple[Tensor, Tensor]:
    """Give ‖rep(z) - rep(x_r)‖², twice: to differentiate and to keep."""
    value = main_output(seen)
    square = (value - rep).square().reshape(len(rep), -1).sum(1)
    return square, square
