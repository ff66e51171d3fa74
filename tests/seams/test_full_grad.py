"""Exact FullGrad from the recorded tape: every operation's implicit bias, whatever the activation."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apportion as ap
from apportion.core.protocols import Backward


class Net(nn.Module):
    """Conv, batch-norm, activation, max-pool, conv, global mean, linear, and in-place steps."""

    def __init__(self, activation: Callable[[Tensor], Tensor]):
        super().__init__()
        self.conv1, self.bn, self.conv2 = (
            nn.Conv2d(2, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 4, 3, padding=1),
        )
        self.fc, self.activation = nn.Linear(4, 3), activation

    def forward(self, x: Tensor) -> Tensor:
        h = F.max_pool2d(self.activation(self.bn(self.conv1(x))), 2)
        r = self.conv2(self.activation(self.bn(h)))
        r += h
        F.relu_(r[:, 2:])  # in place, on a view
        return self.fc(r.mean((2, 3)))


ACTIVATIONS = {
    "relu": lambda t: F.relu(t, inplace=True),
    "relu after use": F.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "silu": lambda t: F.silu(t, inplace=True),
}


def recorded(activation: str, batch_size: int = 4) -> tuple[Backward, Tensor, Tensor]:
    net = Net(ACTIVATIONS[activation]).double().eval()
    for t in (net.bn.running_mean, net.bn.bias):
        assert t is not None
        t.data.normal_()
    x = torch.randn(4, 2, 6, 6, dtype=torch.float64)
    q, owner = ap.Field(net, batch_size=batch_size).bind(x, target=1), torch.arange(4)
    done = q.backward(x, owner, ap.rules.gradient(), record=True)
    torch.testing.assert_close(done.signal, q.value_and_grad(x, owner)[1], atol=1e-14, rtol=0)
    torch.testing.assert_close(done.value, net(x)[:, 1].detach(), atol=1e-14, rtol=0)
    return done, x, done.signal


def per_row(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1) if a.ndim > 1 else a * b


def bias_terms(done: Backward) -> dict[str, Tensor]:
    """⟨signal, output⟩ - Σ ⟨sent, input⟩ per operation: 0 where it is homogeneous of degree 1."""
    terms: dict[str, list[Tensor]] = {}
    for chunk in done.tape:
        found: dict[str, Tensor] = {}
        for i, op in enumerate(reversed(chunk)):
            into = sum((per_row(s, t) for s, t in zip(op.sent, op.inputs, strict=True)), torch.zeros(()))
            found[f"{i} {op.kind} in {op.module}"] = per_row(op.signal, op.output) - into
        for name, term in found.items():
            terms.setdefault(name, []).append(term)
    return {name: torch.cat(term) for name, term in terms.items()}


@pytest.mark.parametrize("batch_size", [4, 1, 3])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_complete_for_every_activation(activation: str, batch_size: int):
    done, x, grad = recorded(activation, batch_size)
    terms = bias_terms(done)
    total = per_row(x, grad) + sum(terms.values())
    assert (total - done.value).abs().max() <= 1e-12
    # each term that is not 0 is needed
    needed = {name: t for name, t in terms.items() if t.abs().max() > 1e-9}
    for name, term in needed.items():
        assert (total - term - done.value).abs().max() > 1e-9, name
    kinds = [name.split()[1] for name in needed]
    assert sorted(set(kinds) - {"tanh", "gelu", "silu"}) == ["batch_norm", "conv", "linear"]
    assert (activation in kinds) == ("relu" not in activation)  # ReLU and max-pool are homogeneous


def test_explicit_biases_alone_are_not_enough():
    """The textbook terms b·∂f/∂b leave out tanh(z) - tanh'(z) z: the gap the review's formula has."""
    for activation, enough in (("relu", True), ("tanh", False), ("gelu", False), ("silu", False)):
        done, x, grad = recorded(activation)
        linear = sum(t for name, t in bias_terms(done).items() if name.split()[1] in ("conv", "linear", "batch_norm"))
        gap = (per_row(x, grad) + linear - done.value).abs().max()
        assert (gap <= 1e-12) == enough, activation
        assert enough or gap > 1e-3


SEVERAL = {
    "max": lambda x: (x * 2 + 1).max(1).values.sum(1),
    "sort": lambda x: (x * 2 + 1).sort(1).values[:, 0].sum(1),
    "var_mean": lambda x: torch.var_mean(torch.tanh(x), 1)[0].sum(1),
    "chunk": lambda x: torch.tanh((x * 2 + 1).chunk(2, 2)[1]).flatten(1).sum(1),
}


@pytest.mark.parametrize("name", [*SEVERAL, "lstm"])
def test_operations_with_several_outputs(name: str):
    lstm, x = nn.LSTM(4, 3, batch_first=True).double(), torch.randn(2, 5, 4, dtype=torch.float64)
    fn = SEVERAL.get(name, lambda x: lstm(x)[0][:, -1].sum(1))
    done = ap.Field(fn).bind(x).backward(x, torch.arange(2), ap.rules.gradient(), record=True)
    total = (x * done.signal).sum() + sum(t.sum() for t in bias_terms(done).values())
    assert (total - fn(x).sum()).abs() <= 1e-12
    assert ((x * done.signal).sum() - fn(x).sum()).abs() > 1e-3


def test_biases_can_be_mapped():
    """The tape keeps each term's place: what a picture of the bias of conv1 needs."""
    done, _, _ = recorded("relu")
    first = next(op for op in reversed(done.tape[0]) if op.kind == "conv")
    assert first.module == "conv1 (Conv2d)"
    assert first.output.shape == first.signal.shape == (4, 4, 6, 6)
