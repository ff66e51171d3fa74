"""RevealCancel against closed forms, an explicit twin, and the definition of its continuity."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apportion as ap
from apportion import planted
from apportion.parts.rules import Contributions, Rescale, RevealCancel, Rules

REVEAL, RESCALE = ap.rules.deep_lift_reveal_cancel(), ap.rules.deep_lift_rescale()


def ask(
    model: Any, x: Tensor, reference: Tensor | None = None, rules: Rules = REVEAL, target: int | None = None
) -> Any:
    baseline = ap.baselines.Zero() if reference is None else ap.baselines.Given(reference)
    return ap.DeepLIFT(baseline, rules)(ap.Field(model), x, target=target)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class MaxNet(nn.Module):
    """max(x1, x2) as ½ [relu(x1 - x2) + relu(x2 - x1) + relu(x1 + x2)], in layers."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(2, 3, bias=False), nn.Linear(3, 1, bias=False)
        self.into.weight.data = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [1.0, 1.0]]).double()
        self.out.weight.data = torch.full((1, 3), 0.5).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.into(x)))[:, 0]


BENCH = {
    "B1": (planted.RootSum(), (4.0, 4.0), (4.0, 2.0)),
    "B3": (planted.Max(), (3.0, 1.0), (2.5, 0.5)),
    "B3 in layers": (MaxNet(), (3.0, 1.0), (2.5, 0.5)),
    "B3'": (planted.Max(), (2.0, 2.001), (1.0, 1.001)),
    "B3' in layers": (MaxNet(), (2.0, 2.001), (1.0, 1.001)),
    "B4": (planted.Saturated(), (2.0, 0.0), (1.0, 0.0)),
    "B6": (planted.Linear([1.0, -2.0], 0.7), (3.0, 5.0), (3.0, -10.0)),
    "B7": (planted.Min(), (2.0, 1.0), (0.5, 0.5)),
}


@pytest.mark.parametrize("name", BENCH)
def test_bench(name: str) -> None:
    model, point, expected = BENCH[name]
    a = ask(model, torch.tensor([point], dtype=torch.float64))
    assert a.values[0].tolist() == pytest.approx(expected, abs=1e-12)
    assert a.gap.abs().max() <= 1e-12


def twin(layers: list[tuple[Tensor, Tensor]], act: Callable[[Tensor], Tensor], x: Tensor, x0: Tensor) -> Tensor:
    """One example through dense layers, the last one without function: the paper's section 3.5.3, number by number."""
    seen = [(x, x0)]
    for w, b in layers[:-1]:
        seen.append((act(w @ seen[-1][0] + b), act(w @ seen[-1][1] + b)))
    m = layers[-1][0][0]  # one multiplier for each input of the last layer
    for (w, b), (h, h0) in zip(layers[-2::-1], seen[-2::-1], strict=True):
        d = h - h0
        new = torch.zeros_like(h)
        for j in range(len(w)):
            part = [float(w[j, i] * d[i]) for i in range(len(d))]
            p, n = sum(c for c in part if c > 0), sum(c for c in part if c < 0)
            z0 = w[j] @ h0 + b[j]
            y, y_p, y_n, y_pn = (act(z0 + t) for t in (0.0, p, n, p + n))
            up = 0.5 * (y_p - y + y_pn - y_n) / p if p else 0.0
            down = 0.5 * (y_n - y + y_pn - y_p) / n if n else 0.0
            for i in range(len(d)):
                mean = 0.5 * (up + down)
                new[i] += m[j] * w[j, i] * (up if part[i] > 0 else down if part[i] < 0 else mean)
        m = new
    return m * (x - x0)


@pytest.mark.parametrize("act", [torch.relu, torch.tanh, F.softplus])
def test_dense_network_by_hand(act: Callable[[Tensor], Tensor]) -> None:
    sizes = (4, 6, 5, 1)
    pairs = pairwise(sizes)
    layers = [(random(b, a, seed=i), random(b, seed=9 + i)) for i, (a, b) in enumerate(pairs)]
    x, x0 = random(3, 4, seed=20), random(3, 4, seed=21)
    x[1, 2] = x0[1, 2]

    def net(h: Tensor) -> Tensor:
        for i, (w, b) in enumerate(layers):
            h = F.linear(h, w, b)
            h = act(h) if i < 2 else h
        return h[:, 0]

    a = ask(net, x, x0)
    expected = torch.stack([twin(layers, act, one, other) for one, other in zip(x, x0, strict=True)])
    torch.testing.assert_close(a.values, expected, atol=1e-13, rtol=1e-11)
    assert a.gap.abs().max() <= 1e-12
    assert (a.values - ask(net, x, x0, RESCALE).values).abs().max() > 1e-2


def spelled(name: str, w: Tensor, b: Tensor) -> Callable[[Tensor], Tensor]:
    def batch_norm(x: Tensor) -> Tensor:
        gain = torch.tensor([2.0, -1.0, 0.5, -3.0], dtype=torch.float64)
        zero = torch.zeros(4, dtype=torch.float64)
        z = F.linear(x, w / gain[:, None])
        return F.batch_norm(z, zero, torch.ones_like(gain) - 1e-5, gain, b)

    return {
        "linear": lambda x: F.linear(x, w, b),
        "matmul and a bias": lambda x: x @ w.T + b,
        "addmm": lambda x: torch.addmm(b, x, w.T),
        "minus": lambda x: b - F.linear(x, -w),
        "scaled": lambda x: F.linear(x, -2 * w, -2 * b) * -0.5,
        "divided": lambda x: F.linear(x, 3 * w, 3 * b) / 3,
        "negated": lambda x: -F.linear(x, -w, -b),
        "batch-norm": batch_norm,
        "convolution": lambda x: F.conv1d(x[:, :, None], w[:, :, None], b)[:, :, 0],
    }[name]


@pytest.mark.parametrize(
    "name",
    ["matmul and a bias", "addmm", "minus", "scaled", "divided", "negated", "batch-norm"],
)
def test_a_layer_however_written(name: str) -> None:
    w, b, head = random(4, 5, seed=1), random(4, seed=2), random(4, seed=3)
    x, x0 = random(3, 5, seed=4), random(3, 5, seed=5)
    expected = ask(lambda x: torch.relu(spelled("linear", w, b)(x)) @ head, x, x0)
    got = ask(lambda x: torch.relu(spelled(name, w, b)(x)) @ head, x, x0)
    torch.testing.assert_close(got.values, expected.values, atol=1e-13, rtol=1e-11)


class Net(nn.Module):
    """Convolutions with and without batch-norm, a residual sum, a dense layer whose output is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.again, self.dense, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(36, 6), nn.Linear(6, 2)
        for i, p in enumerate(self.parameters()):
            p.data = random(*p.shape, seed=i) / max(1, p[0].numel()) ** 0.5
        self.norm.running_mean = random(4, seed=30)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.conv(x)), inplace=True)
        h = F.max_pool2d(torch.relu(h + self.again(h)), 2)
        z = self.dense(h.flatten(1))
        return self.head(torch.relu(z) + torch.sigmoid(z) - z)


def test_convolutions_sums_and_a_layer_read_by_several() -> None:
    net = Net().double().eval()
    x, x0 = random(3, 2, 6, 6, seed=1), random(3, 2, 6, 6, seed=2)
    a, rescaled = ask(net, x, x0, target=1), ask(net, x, x0, RESCALE, target=1)
    assert a.gap.abs().max() <= 1e-13
    assert (a.values - rescaled.values).abs().max() > 1e-3
    alone = torch.cat([ask(net, x[i : i + 1], x0[i : i + 1], target=1).values for i in range(3)])
    torch.testing.assert_close(a.values, alone, atol=1e-14, rtol=1e-12)
    genomics = ask(net, x, x0, ap.rules.deep_lift_genomics(), target=1)
    assert genomics.gap.abs().max() <= 1e-13
    for other in (a, rescaled):
        assert (genomics.values - other.values).abs().max() > 1e-5
    # without what RevealCancel leaves, layers send derivatives: the same as Rescale
    table = tuple((n, Rescale() if isinstance(r, RevealCancel) else r) for n, r in REVEAL.table)
    torch.testing.assert_close(ask(net, x, x0, Rules(table), target=1).values, rescaled.values)
    assert any(isinstance(r, Contributions) for _, r in table)


def halves(h: Tensor) -> Tensor:
    first, second = h.chunk(2, 1)
    return torch.cat([first.relu(), second.relu()], 1)


MOVED: dict[str, Callable[[Tensor], Tensor]] = {
    "reshape": lambda h: h.reshape(-1, 2, 3).relu().flatten(1),
    "flatten": lambda h: h[:, :, None].flatten(1).relu(),
    "transpose": lambda h: h.T.relu().T,
    "contiguous": lambda h: h.mT.contiguous().relu().mT,
    "clone": lambda h: h.clone().relu_(),
    "chunks": halves,
    "slices": lambda h: torch.cat([h[:, :2].relu(), h[:, 2:].relu()], 1),
    "in place": lambda h: h.view(-1, 3, 2).relu_().view(-1, 6),
    "behind a shift": lambda h: (h.view(-1, 2, 3) - 0.3).unsqueeze(1).relu().flatten(1),
}


@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("name", MOVED)
def test_layers_are_seen_through_views(name: str, differentiable: bool) -> None:
    w, b, out = random(6, 4, seed=1), random(6, seed=2), random(6, seed=3)
    x, x0 = random(3, 4, seed=4), random(3, 4, seed=5)
    shift = 0.3 if name == "behind a shift" else 0.0
    given = ask(lambda t: MOVED[name](F.linear(t, w, b)) @ out, x, x0)
    wanted = ask(lambda t: F.linear(t, w, b - shift).relu() @ out, x, x0)
    torch.testing.assert_close(given.values, wanted.values)
    assert not torch.allclose(
        given.values, ask(lambda t: F.linear(t, w, b - shift).relu() @ out, x, x0, RESCALE).values
    )
    assert not any("Rescale" in warning for warning in given.warnings)
    if differentiable:
        field = ap.Field(lambda t: MOVED[name](F.linear(t, w, b)) @ out)
        at = x.clone().requires_grad_()
        kept = ap.DeepLIFT(ap.baselines.Given(x0), REVEAL)(field, at, differentiable=True).values
        torch.testing.assert_close(kept.detach(), wanted.values)
        plain = x.clone().requires_grad_()
        direct = ap.Field(lambda t: F.linear(t, w, b - shift).relu() @ out)
        other = ap.DeepLIFT(ap.baselines.Given(x0), REVEAL)(direct, plain, differentiable=True).values
        weights = random(3, 4, seed=6)
        (slope,) = torch.autograd.grad((kept * weights).sum(), at)
        (expected,) = torch.autograd.grad((other * weights).sum(), plain)
        torch.testing.assert_close(slope, expected)


def test_a_weight_on_the_left_is_a_layer() -> None:
    w, out = random(6, 4, seed=1), random(6, seed=3)
    x, x0 = random(3, 4, seed=4), random(3, 4, seed=5)
    given = ask(lambda t: (w @ t.mT).relu().mT @ out, x, x0)
    wanted = ask(lambda t: F.linear(t, w).relu() @ out, x, x0)
    torch.testing.assert_close(given.values, wanted.values)


def test_what_is_rescale_for_want_of_a_layer_is_told() -> None:
    w, out = random(6, 4, seed=1), random(3, seed=3)
    x, x0 = random(3, 4, seed=4), random(3, 4, seed=5)

    def model(t: Tensor) -> Tensor:
        return F.max_pool1d(F.linear(t, w)[:, None], 2)[:, 0].relu() @ out

    given = ask(model, x, x0)
    torch.testing.assert_close(given.values, ask(model, x, x0, RESCALE).values)
    assert [w for w in given.warnings if "RevealCancel found no layer" in w]
    assert not [w for w in ask(model, x, x0, ap.rules.deep_lift_genomics()).warnings if "RevealCancel" in w]


def test_genomics_preset_tells_dense_from_convolutional() -> None:
    w, head = random(4, 5, seed=1), random(4, seed=3)
    x, x0 = random(3, 5, seed=4), random(3, 5, seed=5)
    zero = torch.zeros(4, dtype=torch.float64)
    for name, like in (("linear", REVEAL), ("matmul and a bias", REVEAL), ("convolution", RESCALE)):
        layer = spelled(name, w, zero)
        got = ask(lambda x, f=layer: torch.relu(f(x)) @ head, x, x0, ap.rules.deep_lift_genomics())
        torch.testing.assert_close(got.values, ask(lambda x, f=layer: torch.relu(f(x)) @ head, x, x0, like).values)


def test_a_layer_that_was_written_to_is_not_taken_for_the_maker() -> None:
    w, head = random(4, 5, seed=1), random(4, seed=3)
    x, x0 = random(3, 5, seed=4), random(3, 5, seed=5)

    def written(x: Tensor) -> Tensor:
        z = F.linear(x, w)
        z.masked_fill_(torch.tensor([False, True, False, False]), 0.7)
        return torch.relu(z) @ head

    a = ask(written, x, x0)
    assert a.gap.abs().max() <= 1e-13
    torch.testing.assert_close(a.values, ask(written, x, x0, RESCALE).values)


def test_can_be_differentiated() -> None:
    net, x, x0 = Net().double().eval(), random(2, 2, 6, 6, seed=1), random(2, 2, 6, 6, seed=2)
    method = ap.DeepLIFT(ap.baselines.Given(x0), REVEAL)
    point = x.clone().requires_grad_()
    values = method(ap.Field(net), point, target=1, differentiable=True).values
    (slope,) = torch.autograd.grad(values[:, 0, 2, 2].sum(), point)
    v, h = random(2, 2, 6, 6, seed=3), 1e-6
    ahead, behind = (method(ap.Field(net), x + s * h * v, target=1).values[:, 0, 2, 2] for s in (1, -1))
    expected = (ahead - behind) / (2 * h)
    torch.testing.assert_close((slope * v).flatten(1).sum(1), expected, atol=1e-5, rtol=1e-5)


# -- continuity -------------------------------------------------------------------------------------

JUMPS = {  # of the values of max(x1, x2) where x1 passes x2 = 2, from baseline 0, the network in layers
    "Rescale": (RESCALE, 2.0),
    "RevealCancel": (REVEAL, 0.0),
}


@pytest.mark.parametrize("name", JUMPS)
def test_jump_at_the_kink_of_the_maximum(name: str) -> None:
    rules, jump = JUMPS[name]
    x = torch.tensor([[2 - 1e-9, 2.0], [2 + 1e-9, 2.0]], dtype=torch.float64)
    for net in (MaxNet(), planted.Max()):
        below, above = ask(net, x, rules=rules).values
        assert (above - below).abs().max() == pytest.approx(jump, abs=1e-6)
