"""Overhead of the field over the bare loop, and its peak memory; writes results/overhead.json.

Rounds are interleaved, so that drift of the machine hits every variant alike; medians are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import apportion as ap
from benchmarks import memory
from benchmarks.models import lite0, machine, tiny_mlp


def _bare(model: nn.Module, x: Tensor, frozen: bool) -> Callable[[], object]:
    def run() -> object:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(model(leaf)[:, 0].sum(), leaf)

    for p in model.parameters():
        p.requires_grad_(not frozen)
    return run


def _interleaved(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    for run in variants.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def overhead(make: Callable[[], nn.Module], x: Tensor, rounds: int) -> dict[str, Any]:
    """Compare Gradient through the field with the bare loop, on a frozen and on the user's own module."""
    model = make()
    field = ap.Field(model, batch_size=len(x))
    ids = range(len(x))
    explain = ap.Gradient()
    seconds = _interleaved(
        {
            "bare loop, weights need gradient": _bare(make(), x, frozen=False),
            "bare loop, frozen": _bare(make(), x, frozen=True),
            "field": lambda: explain(field, x, target=0, ids=ids),
        },
        rounds,
    )
    return {
        "milliseconds": {k: round(1000 * v, 3) for k, v in seconds.items()},
        "field / bare frozen": round(seconds["field"] / seconds["bare loop, frozen"], 3),
        "field / bare": round(seconds["field"] / seconds["bare loop, weights need gradient"], 3),
    }


def main() -> None:
    """Run everything and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="few rounds, nothing written")
    given = parser.parse_args()
    rounds = 2 if given.short else 9
    record = {
        "machine": machine(),
        "EfficientNet-Lite0, 16 rows of 224 x 224": overhead(lite0, torch.rand(16, 3, 224, 224), rounds),
        "MLP 20-32-3, 10,000 rows": overhead(tiny_mlp, torch.randn(10_000, 20), 5 * rounds),
        "peak memory of a pass, EfficientNet-Lite0, 8 rows": memory.compare(),
    }
    text = json.dumps(record, indent=2)
    print(text)
    if not given.short:
        out = Path(__file__).parent / "results"
        out.mkdir(exist_ok=True)
        (out / "overhead.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
