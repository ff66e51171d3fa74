"""The audit of a model under a rule set."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apportion as ap
from apportion.parts.rules import Audit, Epsilon, Plain, Rules, ZBox, audit


class Unknown(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grads[0]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.dense = nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.Linear(12, 4)
        self.layer_norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        h = self.dense(F.relu(self.norm(self.conv(x)), inplace=True).flatten(1))
        h = h * torch.sigmoid(h) * (h > 0.5)
        h = Unknown.apply(self.layer_norm(h))
        return self.head(torch.fft.fft(h).abs().cumsum(1).logcumsumexp(1))  # pyright: ignore[reportOptionalMemberAccess]


X = torch.randn(2, 2, 6)


def rows(found: Audit) -> dict[tuple[str, str], tuple[str, str]]:
    return {(r.kind, r.module): (r.rule, r.why) for r in found.rows}


def test_every_operation_is_listed_with_its_reason() -> None:
    rules = Rules(
        (("layer", Epsilon()), ("relu", Plain()), ("product", Plain())),
        first=ZBox(-5.0, 5.0),
        last=Epsilon(0.5),
        named=(("dense", "layer", Epsilon(0.1)),),
    )
    got = rows(audit(Net(), X, rules))
    top = "the top module (Net)"
    assert got["conv", "conv (Conv1d)"] == ("ZBox(low=-5.0, high=5.0)", "first layer")
    assert got["batch_norm", "norm (BatchNorm1d)"] == ("ZBox(low=-5.0, high=5.0)", "folded into conv")
    assert got["relu", top] == ("own derivative", "by name")
    assert got["flatten", top] == ("affine", "affine")
    assert got["linear", "dense (Linear)"] == ("Epsilon(epsilon=0.1)", "module 'dense'")
    assert got["sigmoid", top] == ("none", "no rule")
    assert got["rsqrt", "layer_norm (LayerNorm)"] == ("none", "no rule, within layer_norm")
    assert got["custom function", ""] == ("none", "not declared")
    assert got["linear", "head (Linear)"] == ("Epsilon(epsilon=0.5)", "last layer")
    found = audit(Net(), X, rules)
    assert ("mul", "takes a mask, index or factor that depends on the input") in {
        (r.kind, r.why) for r in found.without_rule
    }
    assert str(found).splitlines()[0].split() == ["operation", "spelling", "module", "calls", "rule", "why"]
    assert str(found).endswith("call(s) without a rule")
    assert "torch.nn.functional.relu" in str(found)


def test_the_gradient_has_a_rule_for_all_and_a_pass_agrees_with_the_audit() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2), nn.Softmax(-1))
    x = torch.randn(3, 4)
    assert not audit(net, x).without_rule
    assert str(audit(net, x)).endswith("every operation has a rule")
    refused = audit(ap.Field(net, score=ap.Probability()), x, ap.rules.guided_backprop())
    assert [(r.kind, r.count) for r in refused.without_rule][:1] == [("softmax", 1)]
    assert not audit(net, x, ap.rules.deep_lift_rescale()).without_rule


def test_calls_alike_are_counted_together() -> None:
    relu = nn.ReLU()
    found = audit(nn.Sequential(relu, relu, relu), torch.randn(1, 3))
    assert [r.count for r in found.rows if r.kind == "relu"] == [3]


def test_what_cannot_be_seen_into_is_listed() -> None:
    single = lambda row: row.relu()  # noqa: E731
    mapped = audit(torch.vmap(single), torch.randn(2, 3))
    assert [r.kind for r in mapped.without_rule][:1] == ["vmap"]
