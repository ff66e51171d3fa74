"""Baselines that well-known measurements put in place of pixels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from apportion.core import tree
from apportion.core.errors import BaselineError, ConfigError
from apportion.core.question import Question
from apportion.core.tree import Tree
from apportion.parts.baselines.extremes import _Ends
from apportion.parts.baselines.simple import Baseline, blur_matrix, is_at_input


def network_zero(q: Question) -> Tree:
    """Give the point [1, C, 1...] (or [1, 1...]) at which the network itself reads zeros."""

    def zero(x: Tensor) -> Tensor:
        normalize = q.field.normalize
        if normalize is None or not is_at_input(q):
            return x.new_zeros([1] * x.ndim)
        return x.new_tensor(normalize.mean).reshape(1, -1, *[1] * (x.ndim - 2))

    return tree.apply(zero, q.x)


@dataclass(frozen=True)
class NetworkZero(Baseline):
    """0 where the network reads: the mean color of `Field(normalize=...)`, and plain 0 without one.

    `Zero` is 0 in units of x, which is black for pictures that the field normalizes.

    >>> import apportion as ap
    >>> field = ap.Field(lambda z: z.flatten(1).sum(1), normalize=ap.Normalize((0.5,), (0.25,)))
    >>> NetworkZero()(field.bind(torch.ones(1, 1, 1, 2))).flatten().tolist()
    [0.5, 0.5]
    """

    def __call__(self, q: Question) -> Tree:
        return tree.apply(lambda x, zero: zero.expand_as(x)[:, None], q.x, network_zero(q))


@dataclass(frozen=True)
class RISEBlur(Baseline):
    """The picture blurred as the authors of RISE do before they insert pixels into it, with zeros around it.

    Their kernel is a Gaussian of a delta on side × side pixels with mirrored borders: it is folded back at its edge and
    sums to 1. The zeros around are those of the network's own input (`NetworkZero`), so that the border fades into the
    mean color. `Blurred` mirrors the picture instead, and cuts nothing of the kernel.

    Attributes:
        side: of the kernel, in pixels; odd.
        sigma: standard deviation, in pixels.

    Raises:
        ConfigError: an even side.
        BaselineError: inputs that are no pictures.

    Source: Petsiuk, Das, Saenko (2018), the authors' code.

    >>> import apportion as ap
    >>> q = ap.Field(lambda x: x.flatten(1).sum(1)).bind(torch.ones(1, 1, 5, 5))
    >>> RISEBlur(side=3, sigma=50.0)(q)[0, 0, 0, :2, :3]
    tensor([[0.4444, 0.6667, 0.6667],
            [0.6667, 1.0000, 1.0000]])
    """

    _positive = ("side", "sigma")

    side: int = 11
    sigma: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.side % 2 == 0:
            raise ConfigError(f"RISEBlur(side={self.side})", "an odd side, which has a middle", "write side=11")

    def kernel(self, like: Tensor) -> Float[Tensor, " side"]:
        """Give the kernel along one axis."""
        return blur_matrix(self.side, self.sigma, like)[:, self.side // 2]

    def __call__(self, q: Question) -> Tree:
        def blurred(x: Tensor, zero: Tensor) -> Tensor:
            if x.ndim != 4:
                raise BaselineError(
                    f"RISEBlur of input {tuple(x.shape)}", "pictures [B, C, H, W]", "use another, as NetworkZero()"
                )
            weight, channels, half = self.kernel(x), x.shape[1], self.side // 2
            down = weight.reshape(1, 1, -1, 1).expand(channels, 1, -1, 1)
            out = F.conv2d(x - zero, down, padding=(half, 0), groups=channels)
            return (F.conv2d(out, down.mT, padding=(0, half), groups=channels) + zero)[:, None]

        return tree.apply(blurred, q.x, network_zero(q))


@dataclass(frozen=True)
class UniformNoise(_Ends):
    """Random numbers between the ends of the admissible range, drawn once for an example: U(low, high).

    Attributes:
        low: the least, in units of x; with `high`, or else the field's bounds.
        high: the greatest.
        count: draws per example.

    Raises:
        BaselineError: neither bounds nor ends, or one end alone.

    >>> import apportion as ap
    >>> q = ap.Field(lambda x: x.sum(1), bounds=(2, 3)).bind(torch.full((1, 50), 2.5))
    >>> draws = UniformNoise()(q)
    >>> bool(((draws > 2) & (draws < 3)).all())
    True
    """

    _positive = ("count",)

    count: int = 1

    @property
    def random(self) -> bool:
        return True

    @property
    def draws(self) -> int:
        return self.count

    def __call__(self, q: Question) -> Tree:
        low, high = self.ends(q)
        owner = torch.arange(len(q)).repeat_interleave(self.count)
        drawn = q.stream("uniform noise").uniform(q.x, owner, torch.arange(self.count).repeat(len(q)))
        return tree.apply(lambda u: (low + (high - low) * u).unflatten(0, (len(q), self.count)), drawn)


__all__ = ["NetworkZero", "RISEBlur", "UniformNoise", "network_zero"]
