"""Memory: a rule pass that has ended, or was refused, leaves no tensors behind."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import apportion as ap
from apportion.core.errors import RuleError
from apportion.parts.rules import Epsilon, Plain, Rules

X = torch.rand(2, 6)


NET = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(inplace=True), nn.Linear(5, 3)).eval()
FIELD = ap.Field(NET)
UNKNOWN = ap.Field(lambda x: torch.special.i0(torch.tanh(x * 2)))


def lrp() -> None:
    ap.LRP()(FIELD, X, target=0)


def deep_lift() -> None:
    ap.DeepLIFT()(FIELD, X, target=0)


def differentiable() -> None:
    rows = X.clone().requires_grad_()
    rules = Rules((("layer", Epsilon(0.2)), ("relu", Plain())))
    done = FIELD.bind(X, target=0).backward(rows, torch.arange(2), rules, None, differentiable=True)
    assert torch.autograd.grad(done.relevance.pow(2).sum(), rows)[0].abs().max() > 0


def refused() -> None:
    with pytest.raises(RuleError, match="i0"):
        ap.LRP()(UNKNOWN, X, target=0)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = NET[:1]

    def forward(self, x: Tensor) -> Any:
        return checkpoint(lambda t: self.net(t).relu().tanh(), x, use_reentrant=False)


def checkpointed() -> None:
    for method in (ap.LRP(), ap.DeepLIFT()):
        method(ap.Field(Checkpointed().eval()), X, target=0)


def alive() -> int:
    gc.collect()
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())  # others may lie about their class


@pytest.mark.parametrize("work", [lrp, deep_lift, differentiable, refused, checkpointed])
def test_no_tensor_stays(work: Callable[[], None]):
    work()
    before = alive()
    for _ in range(3):
        work()
    assert alive() <= before  # what tests before this one left may go meanwhile


def test_what_a_callable_closes_over_bears_no_mark() -> None:
    weight, shift, kept = torch.randn(3, 6), torch.zeros(3, requires_grad=True), []

    def model(x: Tensor) -> Tensor:
        kept.append(torch.ones(3) * 2)
        scaled = weight.contiguous().mul_(1.0).to(x.dtype)
        kept.append(x @ scaled.mT + shift + kept[-1])
        return kept[-1].relu()

    for method in (ap.LRP(), ap.DeepLIFT(), ap.GuidedBackprop()):
        method(ap.Field(model), X, target=0)
    ap.rules.audit(model, X)
    assert [vars(t) for t in (weight, shift, *kept)] == [{}] * (2 + len(kept))
