"""Looks: passes outside a method's account, to see what the model is like at the first examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.core import tree
from apportion.core.calls import Calls
from apportion.core.derivative import gradients, is_memory
from apportion.core.fast import SlowPath
from apportion.core.site import Input, Site, SiteInfo


class Looks(Calls):
    """What is looked at rather than asked; counted as checks."""

    def reaching(self, sites: Sequence[Site], alive: Callable[[Site, Tensor], bool] | None = None) -> list[Site]:
        """Choose the sites that the score depends on differentiably, by one pass on the first example.

        Args:
            sites: among which to choose.
            alive: what more must be true of a site and the score's gradient there.
        """
        root = self._root
        key = tuple(sites)
        if alive is None and key in root._reaching:
            return root._reaching[key]
        first = torch.zeros(1, dtype=torch.long, device=self.device)
        rows = tree.apply(lambda t: tree.ordinary(t.detach()[:1]), root.x)
        score = self.field.score
        read = [*sites, *([score.site] if score.site is not None and score.site not in sites else [])]
        with torch.inference_mode(False), torch.enable_grad(), self._lean():
            outputs, values = root._call_at(rows, first, read, differentiate=True)
            v = root._scored(score, outputs if score.site is None else values[score.site], first)
        able = [s for s in sites if v.requires_grad and values[s].requires_grad]
        found = gradients(self.field.model, v.sum(), [values[s] for s in able], scale=self.field.scale) if able else []
        root._checks += 1
        here = [(s, g) for s, g in zip(able, found, strict=True) if g is not None]
        if alive is not None:
            return [s for s, g in here if alive(s, g)]
        root._reaching[key] = [s for s, _ in here]
        return root._reaching[key]

    def shape(self, site: Site) -> tuple[int, ...]:
        """Give the shape of a site for the first example alone, by a pass that counts as a check."""
        root = self._root
        first = torch.zeros(1, dtype=torch.long, device=self.device)
        rows = tree.apply(lambda t: tree.ordinary(t.detach()[:1]), root.x)
        with torch.inference_mode(False), torch.no_grad():
            _, values = root._call_at(rows, first, [site], differentiate=False)
        root._checks += 1
        return tuple(values[site].shape)

    def is_passed_by_all(self, site: Site) -> bool:
        """Tell whether all that the score knows of an input goes through a site, by three passes on the first example.

        With the site held, another input gives the same outputs; past a skip connection it does not.
        """
        root = self._root
        first = torch.zeros(1, dtype=torch.long, device=self.device)
        rows = tree.apply(lambda t: tree.ordinary(t.detach()[:1]), root.inputs)

        def change(t: Tensor) -> Tensor:
            return 0.7 * t.flip(tuple(range(1, t.ndim))) + 0.1 if t.is_floating_point() else t

        with torch.inference_mode(False), torch.no_grad():
            _, values = root._call(self._normalized(rows), first, [site])
            held = {site: values[site]}
            both = [root._call(self._normalized(z), first, (), held)[0] for z in (rows, tree.apply(change, rows))]
        root._checks += 3
        return all(torch.equal(a, b) for a, b in zip(*map(tree.tensors, both), strict=True))

    def sites(self) -> list[SiteInfo]:
        """List the addressable tensors of one forward pass on the first example."""
        return self.once("sites", Looks._listed)

    def _listed(self) -> list[SiteInfo]:
        if self._checked is not None and self._checked.sites is not None:
            return self._checked.sites
        first = torch.zeros(1, dtype=torch.long, device=self.device)
        with torch.inference_mode(False), torch.no_grad():
            seen = self._runner.call(self._normalized(tree.index(self.inputs, first)), first, trace=True).seen
        self._checks += 1
        if self._checked is not None:
            self._checked.sites = seen
        return seen

    def look(
        self,
        owner: Tensor,
        *,
        grad: bool = False,
        companion: bool = False,
        only: int | None = None,
        plain: bool = False,
    ) -> tuple[Any, Any]:
        """Run the model on some examples outside all accounts, for checking it.

        Args:
            owner: examples.
            grad: whether to build the graph.
            companion: change the second row where it equals the first.
            only: run that row alone.
            plain: run as the model says, without folding.

        Returns:
            The outputs, and what the score reads; None for both where memory ran out and fewer rows are left to try.
        """
        owner = owner.to(self.device)
        rows = tree.apply(lambda t: t.detach()[owner], self.inputs)
        if companion:
            rows = tree.apply(_told_apart, rows)
        if only is not None:
            owner, rows = owner[only : only + 1], tree.apply(lambda t: t[only : only + 1], rows)
        inner = self.field.score.site
        sites = [s for s in (self.field.site, inner) if s is not None and not isinstance(s, Input)]
        try:
            with (
                torch.inference_mode(False),
                torch.set_grad_enabled(grad),
                SlowPath() if plain else nullcontext(),
                self._lean(),
            ):
                if grad and isinstance(self.field.site, Input):
                    rows = tree.apply(lambda t: t.clone().requires_grad_(), rows)
                outputs, values = self._call(self._normalized(rows), owner, sites, differentiate=grad)
        except (RuntimeError, MemoryError) as error:
            if not is_memory(error):
                raise
            self._runner.refuse_smaller(len(owner), error)
            self._runner.back_off(len(owner))
            return None, None
        read = outputs if inner is None else values[inner]
        for t in tree.tensors(outputs):
            if t.is_floating_point() and t.ndim and t.shape[0] == len(owner):
                marked = torch.zeros_like(t).masked_fill_(t.isnan(), torch.nan)  # -inf may mask a class on purpose
                self._assert_finite(marked, "the model's output", owner)
        return tree.map_tensors(torch.Tensor.detach, outputs), tree.map_tensors(torch.Tensor.detach, read)

    def score_rows(self, read: Any, owner: Tensor) -> Float[Tensor, " R"]:
        """Score outputs that are there already, for checking the score."""
        with torch.no_grad():
            return self._scored(self.field.score, read, owner.to(self.device))


def _told_apart(t: Tensor) -> Tensor:
    """Change the second of two rows where it equals the first."""
    if not torch.equal(t[0], t[1]):
        return t
    other = t[1:].flip(-1) if t.ndim > 1 else t[1:]
    if t.is_floating_point() and torch.equal(other, t[1:]):
        other = 0.9 * other + 0.1  # stays within [0, 1]
        other = torch.where(other == t[1:], other / 2, other)
    return torch.cat([t[:1], other])
