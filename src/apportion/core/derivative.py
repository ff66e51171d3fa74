"""Derivatives by autograd, with its failures and silences told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from apportion.core.errors import ModelError


def is_memory(error: BaseException) -> bool:
    """Tell whether an error means that memory ran out, by torch's own types and phrases."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(p in text for p in _MEMORY)


_MEMORY = (
    "defaultcpuallocator",
    "out of memory",
    "you tried to allocate",
    "alloc_failed",
    "bad_alloc",
    "bad allocation",
)


def counted_at(copy: Tensor, tensor: Tensor) -> Tensor:
    """Let a copy's gradient be that of the tensor, as it is now, through all its uses.

    Args:
        copy: what is kept.
        tensor: what the model goes on with, perhaps in place.
    """
    copy._counted_at = get_gradient_edge(tensor)  # pyright: ignore[reportAttributeAccessIssue]
    return copy


def _edge(t: Tensor) -> GradientEdge:
    return getattr(t, "_counted_at", None) or get_gradient_edge(t)


def gradients(
    model: Any,
    v: Tensor,
    leafs: list[Tensor],
    *,
    retain_graph: bool = False,
    create_graph: bool = False,
    scale: float = 1,
) -> Sequence[Tensor | None]:
    """Differentiate a number with respect to tensors; None where it does not depend on one.

    Args:
        model: whose backward pass it is, for messages.
        v: what is differentiated.
        leafs: with respect to what.
        retain_graph: whether another pass follows.
        create_graph: whether the outcome will be differentiated.
        scale: of the gradients on their way back, so that few digits hold them; undone in float32.

    Raises:
        ModelError: autograd failed.
    """
    keep = retain_graph or create_graph
    edges = [getattr(t, "_counted_at", t) for t in leafs if t.requires_grad]
    if not edges:
        return [None] * len(leafs)
    try:
        v = v if scale == 1 else v * scale
        found = iter(torch.autograd.grad(v, edges, retain_graph=keep, create_graph=create_graph, allow_unused=True))
        grads = [next(found) if t.requires_grad else None for t in leafs]
        return grads if scale == 1 else [None if g is None else g.float() / scale for g in grads]
    except RuntimeError as error:
        if is_memory(error):
            raise
        raise failed(type(model).__name__, error) from error


def failed(model: str, error: Exception) -> ModelError:
    """Give the error for a backward pass that autograd gave up.

    Args:
        model: whose it is.
        error: what autograd said.
    """
    return ModelError(
        f"the backward pass of {model} failed: {error}",
        "a model that autograd can differentiate (twice, for second derivatives)",
        "look for operations without a derivative, in-place ones on tensors that are needed later, or custom functions",
    )


_STEPS = ("RoundBackward", "FloorBackward", "CeilBackward", "TruncBackward", "SignBackward", "HeavisideBackward")


def only_in_steps(v: Tensor, leafs: Sequence[Tensor]) -> bool:
    """Tell whether every way back from the score to the leafs ends at an operation whose derivative is 0."""
    ends = {_edge(t).node for t in leafs if t.requires_grad}
    seen: set[Any] = set()
    todo: list[Any] = [v.grad_fn]
    stepped = False
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in ends:
            return False
        if node.name().startswith(_STEPS):
            stepped = True
            continue
        todo += [n for n, _ in node.next_functions]
    return stepped
