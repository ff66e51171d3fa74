"""Curves of one's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.core import tree
from apportion.core.attribution import References
from apportion.core.errors import ConfigError, kind_of
from apportion.core.question import Question
from apportion.core.tree import Tree
from apportion.parts.baselines import Baseline, Zero
from apportion.parts.paths.curve import Curve
from apportion.parts.paths.path import Walk


@dataclass(frozen=True)
class Along(Curve):
    """γ(t) = function(x, start, t), any curve that can be written down.

    The function gets rows of examples, as many rows of starting points, and t, one number a row with as many
    axes as x, so that it multiplies them (for inputs of several tensors, a tree of such). It returns points
    shaped as x, and must lead from start at t = 0 to x at t = 1.

    Attributes:
        function: the curve.
        baseline: the starting point.
        tolerance: how far its ends may be off, as a share of the largest |x - start| of an example.

    Raises:
        ConfigError: a function that raises, misses its ends, or gives points that do not fit.

    >>> import apportion as ap
    >>> from apportion.methods.path.idgi import IDGI
    >>> curve = Along(lambda x, start, t: start + t**2 * (x - start), quadrature=ap.quadrature.Left(4))
    >>> field = ap.Field(lambda x: x.sum(1), precision=torch.float64)
    >>> IDGI(curve)(field, torch.tensor([[1.0, 3.0]])).values.tolist()
    [[2.0, 2.0]]
    """

    _positive = ("tolerance",)

    function: Callable[[Any, Any, Any], Any]
    baseline: Baseline = Zero()
    tolerance: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.function):
            raise ConfigError(
                f"{kind_of(self.function)} as a curve",
                "a function of (x, start, t)",
                "write Along(lambda x, start, t: start + t * (x - start)), for example",
            )

    @property
    def start(self) -> Baseline:
        return self.baseline

    def walk(self, q: Question, *, rises: bool = False) -> Walk:
        self._check_ends(q)
        return super().walk(q, rises=rises)

    def point(
        self,
        q: Question,
        start: References,
        owner: Int[Tensor, " R"],
        branch: Int[Tensor, " R"],
        t: Float[Tensor, " R"],
    ) -> Tree:
        x, r = tree.index(q.x, owner), tree.index(start.rows, (owner, branch))
        try:
            found = self.function(x, r, tree.apply(lambda leaf: tree.per_row(t, leaf), x))
        except Exception as error:
            raise ConfigError(
                f"a curve that raises {type(error).__name__}: {error}",
                "a function of (x, start, t) that gives a point for each row",
                "write Along(lambda x, start, t: start + t * (x - start)), for example",
            ) from error
        expected = "points with the structure, shape and dtype of x, finite for every t from 0 to 1"
        fix = "call the function on one example to see what it gives"
        if tree.names(found) != tree.names(x):
            raise ConfigError(f"a curve through {tree.names(found)}", expected, fix)
        for leaf, like in zip(tree.leaves(found), tree.leaves(x), strict=True):
            if not isinstance(leaf, Tensor) or leaf.shape != like.shape or leaf.dtype != like.dtype:
                given = f"{leaf.dtype} {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else kind_of(leaf)
                raise ConfigError(f"a curve of {given} for x of {like.dtype} {tuple(like.shape)}", expected, fix)
            if not bool(torch.isfinite(leaf).all()):
                raise ConfigError("a curve with points that are NaN or infinite", expected, fix)
        return found

    def _check_ends(self, q: Question) -> None:
        start = q.references(self.baseline)
        owner = torch.arange(len(q), device=q.device).repeat_interleave(self.draws)
        branch = torch.arange(self.draws, device=q.device).repeat(len(q))
        x, r = tree.index(q.x, owner), tree.index(start.rows, (owner, branch))

        def furthest(a: Tree, b: Tree) -> Tensor:
            each = [(s - t).detach().abs().flatten(1).amax(1).double() for s, t in zip(*map(tree.leaves, (a, b)))]  # noqa: B905 - as trees
            return torch.stack(each).amax(0)

        scale = furthest(x, r)
        fine = max(16 * torch.finfo(leaf.dtype).eps for leaf in tree.leaves(x))
        size = torch.stack([leaf.detach().abs().flatten(1).amax(1).double() for leaf in tree.leaves(x)]).amax(0)
        for t, want, name in ((0.0, r, "start"), (1.0, x, "x")):
            at = torch.full((len(owner),), t, dtype=torch.float64, device=q.device)
            off = furthest(self.point(q, start, owner, branch, at), want)
            wrong = off > self.tolerance * scale + fine * (size + scale)
            if bool(wrong.any()):
                i = int(off.argmax())
                raise ConfigError(
                    f"a curve whose γ({t:g}) is {float(off[i]):.3g} away from {name}, for example "
                    f"{int(owner[i])} where x and start differ by up to {float(scale[i]):.3g}",
                    "γ(0) = start and γ(1) = x",
                    "check what the function gives at t = 0 and at t = 1",
                )
