"""Maps made without the model: noise, the center, edges, the input's own size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from apportion.core import tree
from apportion.core.attribution import Attribution
from apportion.core.errors import InputError
from apportion.core.external import Unregistered
from apportion.core.question import Question


@dataclass(frozen=True, eq=False)
class Random(Unregistered):
    """White noise, one number a pixel, or an element where there are no pixels; other numbers for each example.

    >>> import apportion as ap
    >>> a = Random()(ap.Field(lambda x: x.sum((1, 2, 3))), torch.zeros(2, 3, 4, 4), ids=["a", "b"])
    >>> a.values.shape, bool((a.values[0] != a.values[1]).all())
    (torch.Size([2, 1, 4, 4]), True)
    """

    def explain(self, q: Question) -> Attribution:
        """Draw the map."""
        like = tree.apply(lambda t: (t[:, :1] if t.ndim > 2 else t).float(), q.x)
        owner = torch.arange(len(q))
        return q.attribution(self, q.stream("random control").normal(like, owner, 0 * owner))


@dataclass(frozen=True, eq=False)
class CenterGaussian(Unregistered):
    """A Gaussian around the middle, the same for every picture: where photographers put things.

    Attributes:
        width: standard deviation, as a share of each side.
    """

    _positive = ("width",)

    width: float = 0.25

    def explain(self, q: Question) -> Attribution:
        """Draw the map."""

        def bump(x: Tensor) -> Tensor:
            _pictures(x, "CenterGaussian")
            sides = [(torch.arange(n, device=x.device) + 0.5) / n - 0.5 for n in x.shape[2:]]
            one = [torch.exp(-0.5 * (s / self.width) ** 2) for s in sides]
            return (one[0][:, None] * one[1])[None, None].expand(len(x), 1, -1, -1).clone()

        return q.attribution(self, tree.apply(bump, q.x))


@dataclass(frozen=True, eq=False)
class Edges(Unregistered):
    """The magnitude of Sobel gradients, summed over channels: an edge detector, which many maps resemble."""

    def explain(self, q: Question) -> Attribution:
        """Filter the pictures."""

        def sobel(x: Tensor) -> Tensor:
            _pictures(x, "Edges")
            wide = x.float()
            down = wide.new_tensor([[-1.0, -2.0, -1.0], [0.0, 0.0, 0.0], [1.0, 2.0, 1.0]])
            both = _filtered(wide, torch.stack([down, down.mT]))
            return both.square().sum(1).sqrt().reshape(x.shape).sum(1, keepdim=True)

        return q.attribution(self, tree.apply(sobel, q.x))


@dataclass(frozen=True, eq=False)
class Laplace(Unregistered):
    """The magnitude of the Laplacian, summed over channels: edges and single bright points, by second differences.

    Beyond the border stands the pixel at the border, as in `scipy.ndimage.laplace`.
    """

    def explain(self, q: Question) -> Attribution:
        """Filter the pictures."""

        def laplace(x: Tensor) -> Tensor:
            _pictures(x, "Laplace")
            wide = x.float()
            around = wide.new_tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])
            return _filtered(wide, around[None]).abs().reshape(x.shape).sum(1, keepdim=True)

        return q.attribution(self, tree.apply(laplace, q.x))


@dataclass(frozen=True, eq=False)
class InputMagnitude(Unregistered):
    """|x|: what every method that multiplies by the input has in common."""

    def explain(self, q: Question) -> Attribution:
        """Take magnitudes."""
        return q.attribution(self, tree.apply(lambda t: t.abs().clone(), q.x))


@dataclass(frozen=True, eq=False)
class AllOnes(Unregistered):
    """The same number everywhere: what a metric gives for no choice at all."""

    def explain(self, q: Question) -> Attribution:
        """Give ones."""
        return q.attribution(self, tree.apply(lambda t: torch.ones_like(t[:, :1] if t.ndim > 2 else t), q.x))


def _filtered(x: Float[Tensor, "B C H W"], by: Float[Tensor, "K 3 3"]) -> Float[Tensor, "BC K H W"]:
    """Correlate every channel with each filter."""
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate").flatten(0, 1)[:, None], by[:, None])


def _pictures(x: Tensor, who: str) -> None:
    if x.ndim != 4:
        raise InputError(
            f"{who} of input {tuple(x.shape)}", "pictures [B, channels, H, W]", "use Random or InputMagnitude"
        )
