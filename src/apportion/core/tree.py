"""Trees of tensors: a tensor, or tuples, lists and dicts of them, with rows on the first axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Tree = Any
"""A Tensor, or a (nested) tuple, list or dict of Tensors."""


def apply(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Apply `fn` leaf by leaf to trees of one structure.

    >>> apply(torch.add, (torch.ones(1), {"a": torch.zeros(1)}), (torch.ones(1), {"a": torch.ones(1)}))
    (tensor([2.]), {'a': tensor([1.])})
    """
    if isinstance(tree, Mapping):
        return {k: apply(fn, v, *(r[k] for r in rest)) for k, v in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(apply(fn, v, *(r[i] for r in rest)) for i, v in enumerate(tree)))
    if isinstance(tree, tuple | list):
        return type(tree)(apply(fn, v, *(r[i] for r in rest)) for i, v in enumerate(tree))
    return fn(tree, *rest)


def leaves(tree: Tree) -> list[Any]:
    """List the leaves in order.

    >>> leaves({"b": 1, "a": (2, 3)})
    [1, 2, 3]
    """
    if isinstance(tree, Mapping):
        return [leaf for v in tree.values() for leaf in leaves(v)]
    if isinstance(tree, tuple | list):
        return [leaf for v in tree for leaf in leaves(v)]
    return [tree]


def names(tree: Tree, prefix: str = "x") -> list[str]:
    """Name each leaf by its path, for messages.

    >>> names({"b": 1, "a": (2, 3)})
    ["x['b']", "x['a'][0]", "x['a'][1]"]
    """
    if isinstance(tree, Mapping):
        return [n for k, v in tree.items() for n in names(v, f"{prefix}[{k!r}]")]
    if isinstance(tree, tuple | list):
        return [n for i, v in enumerate(tree) for n in names(v, f"{prefix}[{i}]")]
    return [prefix]


def rebuild(tree: Tree, flat: list[Any]) -> Tree:
    """Put new leaves into the structure of `tree`.

    >>> rebuild((1, [2]), ["a", "b"])
    ('a', ['b'])
    """
    it = iter(flat)
    return apply(lambda _: next(it), tree)


def rows(tree: Tree) -> int:
    """Count the rows: the length of the first axis."""
    return int(leaves(tree)[0].shape[0])


def index(tree: Tree, at: Any) -> Tree:
    """Take rows by slice, mask or index tensor."""
    return apply(lambda leaf: leaf[at], tree)


def per_row(weight: Tensor, like: Tensor) -> Tensor:
    """View one number per row so that it broadcasts over the row's axes.

    >>> per_row(torch.ones(2), torch.ones(2, 3, 4)).shape
    torch.Size([2, 1, 1])
    """
    return weight.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def total(tree: Tree) -> Tensor:
    """Sum all elements of each row, over all leaves.

    >>> total((torch.ones(2, 3), torch.ones(2)))
    tensor([4., 4.])
    """
    sums = [leaf.flatten(1).sum(1) if leaf.ndim > 1 else leaf for leaf in leaves(tree)]
    return torch.stack(sums).sum(0)


def add_rows(into: Tree, owner: Tensor, values: Tree, weight: Tensor | None = None) -> None:
    """Add each row, times its weight, to its owner's row of `into`, in row order.

    Rows are added one after another, so the sums do not depend on how rows were grouped into chunks.
    """
    for acc, leaf in zip(leaves(into), leaves(values), strict=True):
        term = leaf if weight is None else leaf * per_row(weight, leaf)
        acc.index_add_(0, owner, term.to(acc.dtype))


def all_finite(tree: Tree) -> bool:
    """Tell whether every floating-point leaf is finite."""
    return all(bool(torch.isfinite(leaf).all()) for leaf in leaves(tree) if leaf.is_floating_point())
