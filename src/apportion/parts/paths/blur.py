"""The Gaussian scale space as a path: from the blurred example to the sharp one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.core import tree
from apportion.core.attribution import References
from apportion.core.errors import BaselineError
from apportion.core.question import Question
from apportion.core.tree import Tree
from apportion.parts.baselines import Baseline
from apportion.parts.paths.curve import Curve

Border = Literal["reflect", "zero"]
Axes = Literal["HW", "H", "W"]


def scale_matrices(size: int, sigma: Float[Tensor, " S"], border: Border) -> Float[Tensor, "S size size"]:
    """Write one-dimensional Gaussian blurs of several widths as matrices, in float64.

    Kernels are cut at 4 sigma and sum to 1. A sigma of 0 gives the identity. Beyond the border the signal is
    mirrored with its edge repeated, or 0.

    >>> scale_matrices(3, torch.tensor([0.0, 1e4]), "reflect").round(decimals=2)[:, 0].tolist()
    [[1.0, 0.0, 0.0], [0.33, 0.33, 0.33]]
    """
    sigma = sigma.double()
    radius = (4 * sigma + 0.5).floor().clamp(min=1)
    reach = int(radius.max())
    offset = torch.arange(-reach, reach + 1, device=sigma.device)
    weight = torch.exp(-0.5 * (offset / sigma.clamp(min=1e-3)[:, None]) ** 2)  # below 1e-3 all else underflows to 0
    weight = weight * (offset.abs() <= radius[:, None])
    weight = weight / weight.sum(1, keepdim=True)
    i = torch.arange(size, device=sigma.device)
    apart = i - i[:, None]
    if border == "zero":
        return weight[:, apart.clamp(-reach, reach) + reach] * (apart.abs() <= reach)
    period = 2 * size  # of the mirrored signal
    fold = weight.new_zeros(len(sigma), period).index_add_(1, offset % period, weight)
    return fold[:, apart % period] + fold[:, (-1 - i - i[:, None]) % period]


def _views(x: Tensor, axes: Axes) -> tuple[Tensor, tuple[int, ...]]:
    """View rows as [R, M, H, W] or [R, M, T], and name the axes to blur."""
    if x.ndim < 2:
        raise BaselineError(
            f"a blur of input {tuple(x.shape)}", "[R, T], [R, C, T] or [R, C, H, W]", "blurring needs neighbours"
        )
    if x.ndim < 4:
        return x.reshape(len(x), -1, x.shape[-1]), (2,)
    return x.reshape(len(x), -1, *x.shape[-2:]), {"HW": (2, 3), "H": (2,), "W": (3,)}[axes]


def _along(x: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """Multiply one axis of each row by the row's matrix."""
    matrix = matrix.to(x.dtype)
    if x.ndim == 3:
        return x @ matrix.mT
    matrix = matrix[:, None]
    return matrix @ x if axis == 2 else x @ matrix.mT


def _matrices(size: int, sigma: Tensor, border: Border) -> Tensor:
    """Give each row its matrix; rows of a chunk share few widths, each made once."""
    different, which = torch.unique(sigma, return_inverse=True)
    return scale_matrices(size, different, border)[which]


def _corner(x: Tensor, axes: tuple[int, ...], border: Border) -> Tensor:
    """Give one value of each channel, which mirrored blurs leave alone: without it, constant pictures stay exact."""
    if border == "zero":
        return x.new_zeros(())
    for axis in axes:
        x = x.narrow(axis, 0, 1)
    return x


def scale_space(x: Float[Tensor, "R *shape"], sigma: Float[Tensor, " R"], border: Border, axes: Axes) -> Tensor:
    """Blur each row by its own sigma: L(σ).

    Args:
        x: [R, T], [R, C, T], [R, C, H, W], or more axes, the last two of which are blurred.
        sigma: standard deviations, in elements.
        border: what lies beyond it.
        axes: which of H and W to blur.

    Raises:
        BaselineError: rows of single numbers.

    >>> scale_space(torch.tensor([[0.0, 3.0], [0.0, 3.0]]), torch.tensor([0.0, 99.0]), "reflect", "HW")
    tensor([[0.0000, 3.0000],
            [1.5000, 1.5000]])
    """
    view, blurred = _views(x.to(torch.promote_types(x.dtype, torch.float32)), axes)
    base = _corner(view, blurred, border)
    out = view - base
    for axis in blurred:
        out = _along(out, _matrices(view.shape[axis], sigma, border), axis)
    return (out + base).reshape(x.shape).to(x.dtype)


def scale_step(
    x: Float[Tensor, "R *shape"], low: Float[Tensor, " R"], high: Float[Tensor, " R"], border: Border, axes: Axes
) -> Tensor:
    """Give L(high) - L(low) of each row, without the cancellation of two pictures that hardly differ."""
    view, blurred = _views(x.to(torch.promote_types(x.dtype, torch.float32)), axes)
    rest = view - _corner(view, blurred, border)
    ends = [tuple(_matrices(view.shape[axis], s, border) for s in (low, high)) for axis in blurred]
    first = ends[0]
    out = _along(rest, first[1] - first[0], blurred[0])
    if len(blurred) == 2:  # A'X B' - A X B = (A' - A) X B' + A X (B' - B)
        second = ends[1]
        out = _along(out, second[1], blurred[1])
        out = out + _along(_along(rest, first[0], blurred[0]), second[1] - second[0], blurred[1])
    return out.reshape(x.shape).to(x.dtype)


@dataclass(frozen=True)
class AtScale(Baseline):
    """The example at one scale: blurred over its last two axes, or over the last one of [B, T] and [B, C, T].

    Unlike `Blurred` it also takes sequences of single numbers, other borders, and one axis out of two.

    Attributes:
        sigma: standard deviation of the kernel, in elements.
        border: the signal mirrored, so that wide blurs tend to the mean, or 0 beyond it.
        axes: which of H and W to blur.

    >>> import apportion as ap
    >>> q = ap.Field(lambda x: x.sum((1, 2))).bind(torch.tensor([[[1.0, 2.0, 6.0]]]))
    >>> AtScale(100.0)(q).round(decimals=3)
    tensor([[[[3., 3., 3.]]]])
    """

    _positive = ("sigma",)

    sigma: float
    border: Border = "reflect"
    axes: Axes = "HW"

    def __call__(self, q: Question) -> Tree:
        sigma = torch.full((len(q),), self.sigma, dtype=torch.float64, device=q.device)
        if any(x.ndim == 2 for x in tree.leaves(q.x)):
            q.warn(
                "an input [B, d] was blurred along its only axis, as a sequence: that mixes features which may not be "
                "neighbours; for tables take another baseline"
            )
        return tree.apply(lambda x: scale_space(x, sigma, self.border, self.axes)[:, None], q.x)


@dataclass(frozen=True)
class BlurScale(Curve):
    """γ(t) = L(σ(t)): the example blurred ever less, from σ_max at t = 0 to nothing at t = 1.

    Moves are differences L(σ') - L(σ) over each cell, so that scores linear in the input come out exactly.
    A noisy copy made by a wrapper ends at its example's own blur: γ(t) then has (1 - t) times what the two
    blurs differ by added to it.

    Attributes:
        sigma_max: the widest kernel's standard deviation, in elements.
        spacing: equal steps of t are equal steps of σ, of σ² ("variance"), or of log(1 + σ).
        border: as for `AtScale`.
        axes: which of H and W to blur; sequences have only one axis.

    >>> BlurScale(8.0, spacing="variance").sigma(torch.tensor([0.0, 0.75, 1.0])).tolist()
    [8.0, 4.0, 0.0]
    """

    _positive = ("sigma_max",)

    sigma_max: float = 50.0
    spacing: Literal["sigma", "variance", "log"] = "sigma"
    border: Border = "reflect"
    axes: Axes = "HW"

    @property
    def start(self) -> Baseline:
        return AtScale(self.sigma_max, self.border, self.axes)

    def sigma(self, t: Float[Tensor, " R"]) -> Float[Tensor, " R"]:
        """Give the standard deviation at t."""
        left = 1 - t.double()
        if self.spacing == "variance":
            return self.sigma_max * left.sqrt()
        if self.spacing == "log":
            return torch.expm1(left * torch.log1p(left.new_tensor(self.sigma_max)))
        return self.sigma_max * left

    def _off(self, q: Question, start: References, owner: Tensor, branch: Tensor) -> Tree | None:
        """Give how far the start lies from the blur of what is explained; None where it is that blur."""
        if q is q.home:
            return None
        widest = torch.full((len(owner),), self.sigma_max, dtype=torch.float64, device=q.device)
        return tree.apply(
            lambda x, r: r[owner, branch] - scale_space(x[owner], widest, self.border, self.axes), q.x, start.rows
        )

    def point(
        self,
        q: Question,
        start: References,
        owner: Int[Tensor, " R"],
        branch: Int[Tensor, " R"],
        t: Float[Tensor, " R"],
    ) -> Tree:
        sigma = self.sigma(t)
        at = tree.apply(lambda x: scale_space(x[owner], sigma, self.border, self.axes), q.x)
        off = self._off(q, start, owner, branch)
        return at if off is None else tree.apply(lambda a, o: a + tree.per_row(1 - t, o) * o, at, off)

    def move(
        self,
        q: Question,
        start: References,
        owner: Int[Tensor, " R"],
        branch: Int[Tensor, " R"],
        cell: tuple[Tensor, Tensor],
    ) -> Tree:
        low, high = (self.sigma(end) for end in cell)
        step = tree.apply(lambda x: scale_step(x[owner], low, high, self.border, self.axes), q.x)
        off = self._off(q, start, owner, branch)
        length = cell[1] - cell[0]
        return step if off is None else tree.apply(lambda s, o: s - tree.per_row(length, o) * o, step, off)
