"""Waiting: how often a host would wait for its device, seen by the numbers that are read off tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import apportion as ap

X = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}


class _Reads(TorchDispatchMode):
    """Counts what a host has to wait for: numbers as Python's own, sizes that depend on numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in READS
        return func(*args, **(kwargs or {}))


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()


def _reads(ask: Any, rows: int, batch_size: int) -> int:
    q = ap.Field(_net(), batch_size=batch_size).bind(X, target=1)
    ask(q, X[:1].expand(rows, -1, -1, -1), torch.zeros(rows, dtype=torch.long))  # what is looked at once
    with _Reads() as reads:
        ask(q, X[:1].expand(rows, -1, -1, -1), torch.zeros(rows, dtype=torch.long))
    return reads.count


def test_more_passes_in_a_block_read_no_more() -> None:
    asks = {
        "value": lambda q, rows, owner: q.value(rows, owner),
        "gradient": lambda q, rows, owner: q.value_and_grad(rows, owner),
        "site": lambda q, rows, owner: q.tap(rows, owner, [ap.At("0")]),
    }
    for name, ask in asks.items():
        assert _reads(ask, 16, 2) == _reads(ask, 16, 16), name


def test_a_walk_reads_two_numbers_a_block() -> None:
    """Whether the scores are finite, and whether the gradients are."""
    counts = []
    for steps in (8, 16):
        field = ap.Field(_net(), batch_size=4)
        method = ap.IntegratedGradients(quadrature=ap.quadrature.Gauss(steps))
        method(field, X, target=1)
        with _Reads() as reads:
            method(field, X, target=1)
        counts.append(reads.count)
    assert counts[1] - counts[0] <= 2 * 8


def test_rows_are_counted_when_someone_asks() -> None:
    """As on a GPU, where the owners of rows are there, and nobody waits for them before the end."""
    field = ap.Field(_net(), batch_size=4)
    at_once, later = field.bind(X, target=1), field.bind(X, target=1)
    later._runner._waits = False
    every = torch.tensor([0, 1, 1, 3, 2, 2, 2])
    for q in (at_once, later):
        q.value(X[every], every)
        with q.uncounted():
            q.value_and_grad(X[every], every)
        q.value_and_grad(X[every], every)
    assert len(later._runner._due) == 1
    for kind in ("forward", "backward", "at_x"):
        assert torch.equal(getattr(at_once.cost, kind), getattr(later.cost, kind)), kind
    assert later._runner._due == []
    assert at_once.cost.forward.tolist() == [2, 4, 6, 2]
