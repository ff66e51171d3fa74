"""Groups: partitions of the elements into players."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from apportion.core import tree
from apportion.core.config import Configurable
from apportion.core.errors import InputError
from apportion.core.tree import Tree


@dataclass(frozen=True)
class Elements(Configurable):
    """Every element a player of its own, counted through all inputs.

    >>> Elements().labels(torch.zeros(1, 2, 2))
    tensor([[[0, 1],
             [2, 3]]])
    """

    def labels(self, like: Tree) -> Tree:
        """Number the elements."""
        return _numbered(like, lambda t: t.shape[1:])


@dataclass(frozen=True)
class Pixels(Configurable):
    """Every position a player, with all its channels (axis 1).

    >>> Pixels().labels(torch.zeros(1, 3, 1, 2)).shape
    torch.Size([1, 1, 1, 2])
    """

    def labels(self, like: Tree) -> Tree:
        """Number the positions."""
        for t in tree.leaves(like):
            if t.ndim < 3:
                raise InputError(f"pixels of input {tuple(t.shape)}", "[B, channels, *space]", "use Elements()")
        return _numbered(like, lambda t: (1, *t.shape[2:]))


def _numbered(like: Tree, shape) -> Tree:
    start = 0
    flat = []
    for t in tree.leaves(like):
        size = torch.Size(shape(t))
        flat.append((start + torch.arange(size.numel(), device=t.device)).reshape(1, *size))
        start += size.numel()
    return tree.rebuild(like, flat)


@dataclass(frozen=True)
class Squares(Configurable):
    """Squares of pixels with all their channels, row by row; the last ones are smaller where they do not fit.

    Attributes:
        side: in pixels.

    >>> Squares(2).labels(torch.zeros(1, 3, 2, 4))[0, 0].tolist()
    [[0, 0, 1, 1], [0, 0, 1, 1]]
    """

    _positive = ("side",)

    side: int

    def labels(self, like: Tree) -> Tree:
        """Number the squares."""
        if not isinstance(like, Tensor) or like.ndim != 4:
            shapes = [tuple(t.shape) for t in tree.leaves(like)]
            raise InputError(f"squares of input {shapes}", "one tensor [B, channels, H, W]", "use Labels for others")
        down = torch.arange(like.shape[2], device=like.device) // self.side
        across = torch.arange(like.shape[3], device=like.device) // self.side
        return (down[:, None] * (int(across[-1]) + 1) + across)[None, None]


@dataclass(frozen=True, eq=False)  # tensors have no single truth value
class Labels(Configurable):
    """Players named by the user: integers from 0, -1 for elements of no player.

    Attributes:
        value: [...] or [1, ...] for all examples, [B, ...] for each; broadcasts to the input. [H, W] labels
            the pixels of a picture with all their channels.

    >>> Labels(torch.tensor([0, 0, 1])).labels(torch.zeros(2, 3)).tolist()
    [[0, 0, 1]]
    """

    value: Tree

    def labels(self, like: Tree) -> Tree:
        """Check and align the labels."""

        def fit(x: Tensor, label: Tensor) -> Tensor:
            if not isinstance(label, Tensor) or label.is_floating_point() or label.dtype == torch.bool:
                raise InputError(
                    f"group labels {type(label).__name__}", "an integer tensor", "convert with torch.as_tensor"
                )
            label = label.to(x.device).long()
            label = label[None] if label.ndim == x.ndim - 1 else label
            label = label[None, None] if label.ndim == x.ndim - 2 and x.ndim > 2 else label
            fits = label.ndim == x.ndim and all(a in (1, b) for a, b in zip(label.shape, x.shape, strict=True))
            if not fits or int(label.min()) < -1:
                raise InputError(
                    f"group labels of shape {tuple(label.shape)} for {tuple(x.shape)}",
                    "a broadcastable shape, labels from 0 (or -1 for no group)",
                    "give the labels of one example, or one row per example",
                )
            return label

        try:
            out = tree.apply(fit, like, self.value)
        except TypeError as error:
            raise InputError(
                f"group labels of {tree.names(self.value)}",
                f"the input's {tree.names(like)}",
                "build the labels with the structure of x",
            ) from error
        if max(int(label.max()) for label in tree.leaves(out)) < 0:
            raise InputError("group labels of which all are -1", "at least one player", "number the players from 0")
        return out
