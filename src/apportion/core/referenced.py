"""References: baselines resolved once for the user's examples, with what is asked of them."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.core import tree
from apportion.core.attribution import References
from apportion.core.calls import Calls
from apportion.core.errors import BaselineError, kind_of
from apportion.core.protocols import Baseline
from apportion.core.score import top_class
from apportion.core.tree import Tree

SINGULAR = "choose a baseline where the score is finite: this one is a singular point, as 0 is of log(x)"


class Referenced(Calls):
    """What examples are compared with."""

    def references(self, baseline: Baseline) -> References:
        """Give each example's baselines, made once for the examples of `home`, with what is asked of them.

        Args:
            baseline: makes them.

        Raises:
            BaselineError: wrong shape, dtype, device or values.
        """
        _check_baseline(baseline)
        key = id(baseline)
        if key not in self._references:
            home = self.home
            made = home.share(("references", baseline), lambda: home.references_at(home.baseline_rows(baseline)))
            self._references[key] = (baseline, made)
        made = self._references[key][1]
        if self is self.home:
            return made
        rows = tree.index(made.rows, self._in_home)
        top = None if made.top_class is None else made.top_class[self._in_home]
        share = equal_share(self.x, rows)
        return References(made.value[self._in_home], top, share, rows)

    def baseline_rows(self, baseline: Baseline) -> Tree:
        """Give each example's baselines [B, k, ...] alone, for those who learn the score there in passes of their own.

        Raises:
            BaselineError: as for `references`.
        """
        _check_baseline(baseline)
        home, key = self.home, ("rows", id(baseline))
        if key not in home._memo:
            known = self._references.get(id(baseline))
            home._memo[key] = (baseline, home._baseline_rows(baseline) if known is None else known[1].rows)
        rows = home._memo[key][1]
        return rows if self is home else tree.index(rows, self._in_home)

    def _baseline_rows(self, baseline: Baseline) -> Tree:
        rows = baseline(self)
        if not self.differentiable:
            rows = tree.apply(torch.Tensor.detach, rows)  # a tensor of the user's may carry a graph
        if tree.names(rows) != tree.names(self.x):
            raise BaselineError(
                f"baselines {tree.names(rows)}",
                f"the input's structure {tree.names(self.x)}",
                "return a tree like q.x with k baselines each",
            )
        for leaf, x, name in zip(tree.leaves(rows), tree.leaves(self.x), tree.names(self.x), strict=True):
            k = leaf.shape[1] if leaf.ndim == x.ndim + 1 else 0
            if tuple(leaf.shape) != (x.shape[0], k, *x.shape[1:]) or not k:
                raise BaselineError(
                    f"baselines of shape {tuple(leaf.shape)} for {name} of shape {tuple(x.shape)}",
                    f"shape ({x.shape[0]}, k, {', '.join(map(str, x.shape[1:]))})",
                    "return k baselines per example on the second axis",
                )
            if leaf.dtype != x.dtype or leaf.device != x.device:
                raise BaselineError(
                    f"a baseline of {leaf.dtype} on {leaf.device}",
                    f"{x.dtype} on {x.device}, as the input",
                    "convert it with .to(x)",
                )
            if not tree.is_finite(leaf):
                raise BaselineError(
                    f"a baseline for {name} that is NaN or infinite", "finite values", "check how it was made"
                )
        return rows

    def references_at(self, rows: Tree) -> References:
        """Ask what is asked of baselines about [B, k, ...] points that are finite and shaped as they must be.

        Raises:
            NonFiniteError: a score there that is NaN or infinite.
        """
        k = tree.leaves(rows)[0].shape[1]
        scores, tops = [], []
        for step, owner in self.grid(k, "baselines"):
            points = tree.apply(lambda r: r[owner, step], rows)  # noqa: B023 - used at once
            outputs = self._outputs(points, owner, counted="forward")
            scores.append(self._scored(self.field.score, outputs, owner))
            tops.append(None if self.field.score.site is not None else top_class(outputs))
        known = [t for t in tops if t is not None]
        top = torch.cat(known).reshape(k, len(self)).T if len(known) == len(tops) else None
        score = torch.cat(scores).reshape(k, len(self)).T
        self._assert_finite(
            score.reshape(-1),
            "the score at the baseline itself",
            self._owners().repeat_interleave(k),
            SINGULAR,
        )
        return References(score, top, equal_share(self.x, rows), rows)


def _check_baseline(baseline: Any) -> None:
    if isinstance(baseline, type) or not callable(baseline):
        name = f"the class {baseline.__name__}" if isinstance(baseline, type) else f"{kind_of(baseline)}"
        raise BaselineError(
            f"{name} as baseline",
            "an instance of one of ap.baselines",
            "write ap.baselines.Zero(), or ap.baselines.Given(tensor) for a tensor of your own",
        )


def equal_share(x: Tree, rows: Tree) -> Float[Tensor, "B k"]:
    """Give the share of features at which [B, k, ...] points equal the examples."""
    same = [(r == t[:, None]).reshape(*r.shape[:2], -1) for r, t in zip(tree.leaves(rows), tree.leaves(x), strict=True)]
    return torch.cat(same, 2).double().mean(2)
