"""Patches: windows that slide over a picture or a series, and may overlap."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apportion.core import tree
from apportion.core.config import Configurable
from apportion.core.errors import ConfigError, InputError
from apportion.core.tree import Tree


@dataclass(frozen=True)
class Patches(Configurable):
    """Windows of one size at every stride over the last axes of [B, C, H, W] or [B, C, T], with all channels.

    Where the stride does not end at the border, a last window is shifted inwards to end there, so that every
    element lies in a window and every window is whole. Elements near the border lie in fewer windows.

    Attributes:
        size: in elements, one number or one per axis.
        stride: from one window to the next; the size unless given, which gives neighbours side by side.

    >>> patches = Patches(2, stride=1)
    >>> patches.count(torch.zeros(1, 1, 3, 4))
    6
    >>> patches.total(torch.ones(1, 6), torch.zeros(1, 1, 3, 4))[0, 0].tolist()
    [[1.0, 2.0, 2.0, 1.0], [2.0, 4.0, 4.0, 2.0], [1.0, 2.0, 2.0, 1.0]]
    """

    size: int | tuple[int, ...]
    stride: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("size", self.size), ("stride", self.stride)):
            flat = value if isinstance(value, tuple) else (1 if value is None else value,)
            if not flat or min(flat) < 1:
                raise ConfigError(f"Patches({name}={value!r})", "positive numbers", f"give {name} above 0")

    def count(self, like: Tree) -> int:
        out = 1
        for over in self._over(like):
            out *= len(over)
        return out

    def kept(self, mask: Bool[Tensor, "R P"], like: Tree) -> Bool[Tensor, "R ..."]:
        return self._laid((~mask).float(), like) == 0

    def total(self, values: Float[Tensor, "B P"], like: Tree) -> Float[Tensor, "B ..."]:
        laid = self._laid(values, like)
        return laid.expand(len(laid), *like.shape[1:])

    def _laid(self, values: Tensor, like: Tensor) -> Tensor:
        """Sum what the windows over each element hold, [R, 1, *space]."""
        over = [o.to(values) for o in self._over(like)]
        out = values.reshape(len(values), *(len(o) for o in over))
        for axis, o in enumerate(over, 1):
            out = (out.movedim(axis, -1) @ o).movedim(-1, axis)
        return out[:, None]

    def _over(self, like: Tree) -> list[Tensor]:
        """For each axis, which elements each window is over, [windows, length]."""
        if not isinstance(like, Tensor) or like.ndim not in (3, 4):
            shapes = [tuple(t.shape) for t in tree.leaves(like)]
            raise InputError(f"patches of input {shapes}", "one tensor [B, C, H, W] or [B, C, T]", "use Labels")
        space = like.shape[2:]
        stride = self.size if self.stride is None else self.stride
        sizes, strides = (v if isinstance(v, tuple) else (v,) * len(space) for v in (self.size, stride))
        if len(sizes) != len(space) or len(strides) != len(space):
            raise InputError(
                f"patches of size {self.size} and stride {stride} on input {tuple(like.shape)}",
                f"one number, or {len(space)}",
                "give one for each axis after the channels",
            )
        return list(_starting(tuple(space), tuple(sizes), tuple(strides)))


@lru_cache(maxsize=16)
def _starting(space: tuple[int, ...], sizes: tuple[int, ...], strides: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Place windows along each axis, [windows, length]."""
    out = []
    with torch.inference_mode(False):
        for length, size, step in zip(space, sizes, strides, strict=True):
            if step > size:
                raise InputError(
                    f"patches of {size} at a stride of {step}", "a stride of at most the size", "leave no gaps"
                )
            if size > length:
                raise InputError(
                    f"patches of {size} on an axis of {length}", f"at most {length}", "choose a smaller size"
                )
            starts = torch.arange(0, length - size + 1, step)
            if int(starts[-1]) + size < length:
                starts = torch.cat([starts, torch.tensor([length - size])])
            at = torch.arange(length)
            out.append((at >= starts[:, None]) & (at < starts[:, None] + size))
    return tuple(out)
