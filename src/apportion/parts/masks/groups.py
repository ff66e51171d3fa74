"""Groups: which elements are one player; partitions, and windows that overlap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from apportion.core import tree
from apportion.core.attribution import Groups
from apportion.core.config import Configurable
from apportion.core.errors import InputError, kind_of
from apportion.core.game import Windows, labels_at
from apportion.core.tree import Tree
from apportion.parts.masks.columns import Columns, Correlated
from apportion.parts.masks.segments import Felzenszwalb, QuickShift, Superpixels
from apportion.parts.masks.windows import Patches


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


@dataclass(frozen=True)
class Cells(Configurable):
    """A grid of equally many cells each way, with all their channels, row by row; sides differ by a pixel at most.

    Attributes:
        across: cells each way.

    Raises:
        InputError: no pictures, or ones of fewer pixels.

    >>> Cells(2).labels(torch.zeros(1, 3, 2, 5))[0, 0].tolist()
    [[0, 0, 0, 1, 1], [2, 2, 2, 3, 3]]
    """

    _positive = ("across",)

    across: int

    def labels(self, like: Tree) -> Tree:
        """Number the cells."""
        if not isinstance(like, Tensor) or like.ndim != 4 or min(like.shape[2:]) < self.across:
            shapes = [tuple(t.shape) for t in tree.leaves(like)]
            raise InputError(
                f"{self.across} × {self.across} cells of input {shapes}",
                f"one tensor [B, channels, H, W], {self.across} pixels each way at least",
                "use Labels for others",
            )
        down, across = (torch.arange(n, device=like.device) * self.across // n for n in like.shape[2:])
        return (down[:, None] * self.across + across)[None, None]


class ByExample:
    """What groups have in common that are given, and may be for each of the user's examples."""

    labels: Callable[[Tree], Tree]

    def of_each(self, x: Tree) -> bool:
        """Tell whether there is a row for each of these examples, and not one for all."""
        return any(len(t) > 1 for t in self._rows(x))

    def _rows(self, x: Tree) -> list[Tensor]:
        """List what has an axis for examples."""
        raise NotImplementedError

    def labels_at(self, rows: Tree, examples: Tree, owner: Tensor) -> Tree:
        """Name the players of points made of examples: those of their owners."""
        return tree.apply(lambda one: one if len(one) == 1 else one[owner.to(one.device)], self.labels(examples))


@dataclass(frozen=True, eq=False)  # tensors have no single truth value
class Labels(ByExample, Configurable):
    """Players named by the user: integers from 0, -1 for elements of no player.

    Attributes:
        value: [...] or [1, ...] for all examples, [B, ...] for each; broadcasts to the input. [H, W] labels
            the pixels of a picture with all their channels.

    >>> Labels(torch.tensor([0, 0, 1])).labels(torch.zeros(2, 3)).tolist()
    [[0, 0, 1]]
    """

    value: Tree

    def _rows(self, x: Tree) -> list[Tensor]:
        pairs = zip(tree.leaves(self.value), tree.leaves(x), strict=False)
        return [v for v, t in pairs if isinstance(v, Tensor) and v.ndim == t.ndim]

    def labels(self, like: Tree) -> Tree:
        """Check and align the labels."""

        def fit(x: Tensor, label: Tensor) -> Tensor:
            if not isinstance(label, Tensor):
                raise InputError(
                    f"{kind_of(label)} as group labels", "an integer tensor", "convert with torch.as_tensor"
                )
            if label.is_floating_point() or label.is_complex() or label.dtype == torch.bool:
                raise InputError(
                    f"group labels of {label.dtype}",
                    "integers from 0, -1 for no group",
                    "write mask.long() - 1 for one group of what is marked, mask.long() for two"
                    if label.dtype == torch.bool
                    else "write labels.long(), if its numbers are whole",
                )
            label = label.to(x.device).long()
            label = label[None] if label.ndim == x.ndim - 1 else label
            label = label[None, None] if label.ndim == x.ndim - 2 and x.ndim > 2 else label
            fits = label.ndim == x.ndim and all(a in (1, b) for a, b in zip(label.shape, x.shape, strict=True))
            if not fits or not label.numel():
                raise InputError(
                    f"group labels of shape {tuple(label.shape)} for {tuple(x.shape)}",
                    "a broadcastable shape",
                    "give the labels of one example, or one row per example",
                )
            if (lowest := int(label.min())) < -1:
                raise InputError(
                    f"a group label of {lowest}",
                    "integers from 0, and -1 for elements of no group",
                    "number the groups from 0: torch.unique(labels, return_inverse=True)[1]",
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


def _positions(like: Tree, what: str) -> Tensor:
    if not isinstance(like, Tensor) or like.ndim not in (2, 3):
        shapes = [tuple(t.shape) for t in tree.leaves(like)]
        raise InputError(
            f"{what} of input {shapes}", "one tensor [B, T] or [B, T, features]", "explain the embedding, ap.At(name)"
        )
    return like


def _fitting(given: Tensor, like: Tensor, what: str) -> Tensor:
    if tuple(given.shape) != tuple(like.shape[:2]):
        raise InputError(
            f"{what} of shape {tuple(given.shape)} for input {tuple(like.shape)}",
            f"shape {tuple(like.shape[:2])}",
            "give one row for each example, as the tokenizer does",
        )
    given = given.to(like.device)
    return given[..., None] if like.ndim == 3 else given


@dataclass(frozen=True, eq=False)  # tensors have no single truth value
class RealTokens(ByExample, Configurable):
    """Each token a player with all its features; padding is none.

    Attributes:
        mask: [B, T], true for tokens that are real, as an attention mask; all unless given.

    >>> RealTokens(torch.tensor([[1, 1, 0], [0, 1, 1]]).bool()).labels(torch.zeros(2, 3)).tolist()
    [[0, 1, -1], [-1, 0, 1]]
    """

    mask: Bool[Tensor, "B T"] | None = None

    def _rows(self, x: Tree) -> list[Tensor]:
        return [] if self.mask is None else [self.mask]

    def labels(self, like: Tree) -> Tree:
        """Number the real tokens of each example."""
        x = _positions(like, "tokens")
        if self.mask is None:
            every = torch.arange(x.shape[1], device=x.device)[None]
            return every[..., None] if x.ndim == 3 else every
        real = _fitting(self.mask.bool(), x, "a mask of tokens")
        return (real.cumsum(1) - 1).masked_fill(~real, -1)


@dataclass(frozen=True, eq=False)
class Words(ByExample, Configurable):
    """The tokens of one word together.

    Attributes:
        word: [B, T], the same number for the tokens of one word, -1 for tokens of none, such as padding.

    >>> words = Words.of([[None, 0, 0, 1], [0, 1, 2, None]])
    >>> words.labels(torch.zeros(2, 4, 8))[..., 0].tolist()
    [[-1, 0, 0, 1], [0, 1, 2, -1]]
    """

    word: Int[Tensor, "B T"]

    @classmethod
    def of(cls, word_ids: Sequence[Sequence[int | None]]) -> Words:
        """Take what tokenizers give: `[encoding.word_ids(b) for b in range(B)]`.

        Raises:
            InputError: rows of different lengths, or of something else than numbers and None.
        """
        do = "give [encoding.word_ids(b) for b in range(B)], of sentences padded to one length"
        try:
            rows = [[-1 if w is None else int(w) for w in row] for row in word_ids]
        except (TypeError, ValueError) as error:
            raise InputError(f"{kind_of(word_ids)} as numbers of words: {error}", "lists of int or None", do) from error
        if not rows or len({len(row) for row in rows}) > 1:
            raise InputError(f"numbers of words of {[len(row) for row in rows][:8]} tokens", "rows of one length", do)
        return cls(torch.tensor(rows))

    def _rows(self, x: Tree) -> list[Tensor]:
        return [self.word]

    def labels(self, like: Tree) -> Tree:
        """Number the words of each example, in order of their numbers."""
        x = _positions(like, "words")
        given = _fitting(self.word, x, "numbers of words")
        out = torch.full_like(given, -1)
        for b, row in enumerate(given):
            real = row >= 0
            out[b][real] = torch.unique(row[real], return_inverse=True)[1]
        return out


@dataclass(frozen=True)
class EachInput(Configurable):
    """Every input of a model of several a player as a whole.

    >>> EachInput().labels((torch.zeros(1, 3), torch.zeros(1, 2, 2)))
    (tensor([[0]]), tensor([[[1]]]))
    """

    def labels(self, like: Tree) -> Tree:
        """Number the inputs."""
        flat = [torch.full((1,) * t.ndim, i, device=t.device) for i, t in enumerate(tree.leaves(like))]
        return tree.rebuild(like, flat)


@dataclass(frozen=True)
class PerInput(Configurable):
    """Groups of its own for each input of a model of several, numbered on from one to the next.

    Attributes:
        parts: one for each input, in the order of the inputs.

    Raises:
        InputError: another number of inputs.

    >>> mixed = PerInput((Squares(2), Elements()))
    >>> [part.flatten().tolist() for part in mixed.labels((torch.zeros(1, 3, 2, 4), torch.zeros(1, 2)))]
    [[0, 0, 1, 1, 0, 0, 1, 1], [2, 3]]
    """

    parts: tuple[Groups | Windows, ...]

    def labels(self, like: Tree) -> Tree:
        """Number the groups of all inputs."""
        return self._joined(like, lambda part, t, _: part.labels(t))

    def labels_at(self, rows: Tree, examples: Tree, owner: Tensor) -> Tree:
        """Number those of points made of examples."""
        of = tree.leaves(examples)
        return self._joined(rows, lambda part, t, i: labels_at(part, t, of[i], owner))

    def _joined(self, like: Tree, labels: Callable[[Groups, Tensor, int], Any]) -> Tree:
        flat = tree.leaves(like)
        if len(flat) != len(self.parts):
            raise InputError(f"{len(self.parts)} groups for {len(flat)} input(s)", "one each", "see tree order of x")
        start, out = torch.zeros(1, dtype=torch.long), []
        for i, (part, t) in enumerate(zip(self.parts, flat, strict=True)):
            if not isinstance(part, Groups):
                raise InputError(f"{kind_of(part)} among groups", "partitions", "use ap.groups.Squares for patches")
            label = labels(part, t, i)
            first = start.to(label.device).reshape(-1, *[1] * (label.ndim - 1))
            out.append(torch.where(label < 0, label, label + first))
            start = start + 1 + label.cpu().flatten(1).amax(1)
        return tree.rebuild(like, out)


__all__ = [
    "Cells",
    "Columns",
    "Correlated",
    "EachInput",
    "Elements",
    "Felzenszwalb",
    "Labels",
    "Patches",
    "PerInput",
    "Pixels",
    "QuickShift",
    "RealTokens",
    "Squares",
    "Superpixels",
    "Words",
]
