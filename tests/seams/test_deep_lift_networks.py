"""DeepLIFT's sum on unmodified networks of every common make, in float64 and float32, from two baselines."""

from __future__ import annotations

import pytest
import torch
from benchmarks.networks import NETWORKS, TRANSFORMERS, Network, make

import apportion as ap
from apportion.parts.rules import CrossMax, Halfway, Plain, RescaleNorm, Rules

GOAL = {torch.float64: 1e-9, torch.float32: 1e-3}
RESCALE, REVEAL = ap.rules.deep_lift_rescale(), ap.rules.deep_lift_reveal_cancel()


def miss(net: Network, baseline: str = "random", rules: Rules = RESCALE) -> float:
    """The largest gap of an example, as a share of max(|f(x) - f(x')|, 1e-3 Σ |values|)."""
    given = torch.randn(net.x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(net.x)
    start = ap.baselines.Zero() if baseline == "zero" else ap.baselines.Given(given)
    a = ap.DeepLIFT(start, rules)(ap.Field(net.model), net.x, target=1)
    assert a.claimed_total is not None
    assert a.gap is not None
    size = a.values.abs().flatten(1).sum(1)
    return float((a.gap.abs() / torch.maximum(a.claimed_total.abs(), 1e-3 * size)).max())


def built(name: str, dtype: torch.dtype) -> Network:
    if name in TRANSFORMERS:
        pytest.importorskip("transformers")
    return make(name, dtype)


@pytest.mark.parametrize("name", NETWORKS)
def test_complete(name: str) -> None:
    for dtype, goal in GOAL.items():
        net = built(name, dtype)
        for baseline in ("zero", "random"):
            assert miss(net, baseline) <= goal, (dtype, baseline)


@pytest.mark.parametrize("name", ["vgg", "densenet", "residual", "lstm", "gpt2", "swin"])
def test_reveal_cancel_is_complete(name: str) -> None:
    assert miss(built(name, torch.float64), rules=REVEAL) <= 1e-9


@pytest.mark.parametrize(("name", "left_out"), [("vgg", CrossMax), ("bert", Halfway), ("convnext", RescaleNorm)])
def test_each_rule_is_needed(name: str, left_out: type) -> None:
    table = tuple((n, Plain() if isinstance(r, left_out) else r) for n, r in RESCALE.table)
    assert miss(built(name, torch.float64), rules=Rules(table)) > 1e-3


def test_norms_do_not_blow_up() -> None:
    """From a constant baseline each norm would multiply by 1 / √ε, as a product of equals: 1e3 in Llama."""
    net = built("llama", torch.float64)
    a = ap.DeepLIFT()(ap.Field(net.model), net.x, target=1)
    assert a.claimed_total is not None
    assert (a.values.abs().flatten(1).sum(1) / a.claimed_total.abs()).max() <= 100
