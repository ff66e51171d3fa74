"""AttnLRP and CP-LRP against relevances written out operation by operation, and against numbers by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from benchmarks.networks import make, without_constants
from torch import Tensor, nn

import apportion as ap
from apportion.core.errors import RuleError
from apportion.parts.rules import Detached, Half, Identity, NormIdentity, Plain, Rules, attn_lrp, cp_lrp

EPSILON = 1e-6  # of both rule sets


def relevance(model: Callable[..., Tensor], x: Tensor, rules: Rules, target: int | None = None) -> Tensor:
    score = None if target is not None else (lambda out: out.flatten(1).sum(1))
    q = ap.Field(model, score).bind(x, target=target)
    return q.backward(x, torch.arange(len(x)), rules).relevance


# -- one operation at a time ------------------------------------------------------------------------


def test_softmax_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0, -1.0]], dtype=torch.float64)
    given = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64)
    s = torch.softmax(x, -1)
    q = ap.Field(lambda x: torch.softmax(x, -1), lambda out, _: (out * (given / s)).sum(1)).bind(x, target=0)
    got = q.backward(x, torch.zeros(1, dtype=torch.long), attn_lrp()).relevance
    expected = x * (given - s * given.sum())
    torch.testing.assert_close(got, expected, atol=1e-14, rtol=0)
    torch.testing.assert_close(got, torch.tensor([[-0.0595, -0.4108, -0.2649]], dtype=torch.float64), atol=5e-5, rtol=0)
    assert got.sum() == pytest.approx(-0.735, abs=5e-4)
    assert (got - given).abs().max() > 0.1  # the identity, for one, is another rule


def test_masked_logits_get_nothing() -> None:
    x = torch.tensor([[1.0, 2.0, -1.0]], dtype=torch.float64)
    mask = torch.tensor([0.0, 0.0, -torch.inf], dtype=torch.float64)
    got = relevance(lambda x: torch.softmax(x + mask, -1) * torch.tensor([1.0, 3.0, 5.0]), x, attn_lrp())
    assert got[0, 2] == 0
    assert got.isfinite().all()


def test_products_share_by_halves() -> None:
    a, b = torch.randn(3, 4, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    x = torch.cat([a.flatten(), b.flatten()])[None]

    def product(x: Tensor) -> Tensor:
        left, right = x[:, :12].unflatten(1, (3, 4)), x[:, 12:].unflatten(1, (4, 2))
        return torch.matmul(left, right).flatten(1)

    got = relevance(product, x, Rules((("product", Half()),)))[0]
    each = a[:, :, None] * b[None]  # every term a_ij b_jp of the sums is its own relevance here
    torch.testing.assert_close(got[:12], (each / 2).sum(2).flatten())
    torch.testing.assert_close(got[12:], (each / 2).sum(0).flatten())


NORMS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "layer_norm": (lambda x: F.layer_norm(x, (4,), *affine(4)), (4,)),
    "layer_norm of two axes": (lambda x: torch.layer_norm(x, (3, 4), weight=affine(3, 4)[0]), (3, 4)),
    "rms_norm": (lambda x: F.rms_norm(x, (4,), affine(4)[0]), (4,)),
    "group_norm": (lambda x: F.group_norm(x, 2, *affine(4), 1e-3), (4, 3)),
    "instance_norm": (lambda x: F.instance_norm(x, weight=affine(4)[0]), (4, 3)),
}


def affine(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    gain, shift = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return gain, shift


def spelled(name: str, x: Tensor, spread: Tensor | None = None) -> Tensor:
    """Write a norm in simple operations, by a spread given as a number where it is to be a constant."""
    if name == "rms_norm":
        eps = torch.finfo(x.dtype).eps
        return x * (torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) if spread is None else spread) * affine(4)[0]
    axes: tuple[int, ...] = (-1,)
    rows, eps, shape = x, 1e-5, (4,)
    if name.endswith("axes"):
        axes, shape = (-2, -1), (3, 4)
    elif name == "group_norm":
        rows, eps, shape = x.unflatten(1, (2, 2)), 1e-3, (4, 1)
        axes = (-2, -1)
    elif name == "instance_norm":
        shape = (4, 1)
    if spread is None:
        spread = (rows.var(axes, unbiased=False, keepdim=True) + eps).rsqrt()
    out = ((rows - rows.mean(axes, keepdim=True)) * spread).reshape(x.shape)
    gain, shift = (t.reshape(shape) for t in affine(*(shape if name.endswith("axes") else (4,))))
    return out * gain + (shift if name in ("layer_norm", "group_norm") else 0)


@pytest.mark.parametrize("name", NORMS)
def test_norms_have_a_constant_spread(name: str) -> None:
    norm, shape = NORMS[name]
    x = torch.randn(2, *shape, dtype=torch.float64)
    weight = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(spelled(name, x), norm(x))
    rules = Rules((("layer", Plain()), *((n, NormIdentity()) for n in ("layer_norm", "rms_norm")), *GROUPED))
    got = relevance(lambda x: norm(x) * weight, x, rules)
    # the same with the spread taken as numbers, and then differentiated: it is affine
    leaf = x.clone().requires_grad_()
    rows = x.unflatten(1, (2, 2)) if name == "group_norm" else x
    if name == "rms_norm":
        number = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + torch.finfo(x.dtype).eps)
    else:
        axes = (-2, -1) if name in ("layer_norm of two axes", "group_norm") else (-1,)
        number = (rows.var(axes, unbiased=False, keepdim=True) + (1e-3 if name == "group_norm" else 1e-5)).rsqrt()
    (slope,) = torch.autograd.grad((spelled(name, leaf, number) * weight).sum(), leaf)
    torch.testing.assert_close(got, x * slope, atol=1e-12, rtol=1e-10)
    plain = relevance(lambda x: norm(x) * weight, x, ap.rules.gradient())
    assert (plain - got).abs().max() > 0.01
    # and spelled out, whatever the rule set
    for rules in (attn_lrp(), cp_lrp()):
        again = relevance(lambda x: spelled(name, x) * weight, x, rules)
        torch.testing.assert_close(again, got, atol=1e-10, rtol=1e-8)


GROUPED = (("group_norm", NormIdentity()), ("instance_norm", NormIdentity()))


def test_rms_norm_hands_relevance_on() -> None:
    x, given = torch.randn(2, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    got = relevance(lambda x: F.rms_norm(x, (4,), affine(4)[0]) * given, x, attn_lrp())
    torch.testing.assert_close(got, F.rms_norm(x, (4,), affine(4)[0]) * given)


ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "silu": (F.silu, lambda x: x * torch.sigmoid(x)),
    "silu, the other way round": (F.silu, lambda x: torch.sigmoid(x) * x),
    "gelu": (F.gelu, lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5))),
    "gelu by tanh": (
        lambda x: F.gelu(x, approximate="tanh"),
        lambda x: 0.5 * x * (1.0 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * torch.pow(x, 3.0)))),
    ),
    "quick gelu": (lambda x: F.silu(1.702 * x) / 1.702, lambda x: x * torch.sigmoid(1.702 * x)),
    "hardswish": (F.hardswish, lambda x: x * F.relu6(x + 3) / 6),
    "mish": (F.mish, lambda x: x * torch.tanh(F.softplus(x))),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_hand_relevance_on_however_they_are_spelled(name: str) -> None:
    whole, parts = ACTIVATIONS[name]
    x = torch.randn(3, 5, dtype=torch.float64) * 2
    x[0, 0] = 0
    for rules in (attn_lrp(), cp_lrp()):
        for fn in (whole, parts):
            torch.testing.assert_close(relevance(fn, x, rules), whole(x), atol=1e-12, rtol=1e-6)


def test_gates_share_by_halves() -> None:
    x, w = torch.rand(3, 4, dtype=torch.float64) + 0.5, torch.rand(4, 4, dtype=torch.float64)

    def gated(x: Tensor) -> Tensor:
        return torch.tanh(x @ w) * x

    got = relevance(gated, x, attn_lrp(Plain()))
    half = gated(x) / 2
    through = x * ((half / (x @ w)) @ w.T)
    torch.testing.assert_close(got, half + through, atol=1e-8, rtol=1e-6)


# -- a whole block ----------------------------------------------------------------------------------


class Block(nn.Module):
    """Layer norm, two heads of attention, residual sum, RMS norm, gated layers, residual sum, mean, classes."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.norm1, self.norm2 = nn.LayerNorm(6), nn.RMSNorm(6, eps=1e-6)
        self.q, self.k, self.v, self.o = (nn.Linear(6, 6) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6)
        self.head = nn.Linear(6, 3)

    def heads(self, t: Tensor) -> Tensor:
        return t.unflatten(-1, (2, 3)).transpose(-2, -3)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm1(x)
        q, k, v = self.heads(self.q(n)), self.heads(self.k(n)), self.heads(self.v(n))
        if self.fused:
            h = F.scaled_dot_product_attention(q, k, v)
        else:
            h = torch.softmax(q @ k.transpose(-1, -2) / 3**0.5, -1) @ v
        x = x + self.o(h.transpose(-2, -3).flatten(-2))
        n = self.norm2(x)
        x = x + self.down(F.silu(self.gate(n)) * self.up(n))
        return self.head(x.mean(-2))


def block(fused: bool = False) -> Block:
    torch.manual_seed(3)
    net = Block(fused).double().eval().requires_grad_(False)
    for p in net.parameters():
        p.mul_(2)
    return net


def dense(x: Tensor, z: Tensor, weight: Tensor, r: Tensor, epsilon: float = EPSILON) -> Tensor:
    """R_i = Σ_j x_i w_ji R_j / (z_j + ε sign z_j) of words [t, in] and [t, out]."""
    share = r / (z + epsilon * torch.where(z < 0, -1.0, 1.0))
    return torch.einsum("ti,ji,tj->ti", x, weight, share)


def matrix_product(a: Tensor, b: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """R_ij = Σ_p a_ij b_jp R_ip / (2 O_ip), and so for b."""
    terms = a[:, :, None] * b[None] / (2 * (a @ b))[:, None]
    return (terms * r[:, None]).sum(2), (terms * r[:, None]).sum(0)


def slow_relevance(net: Block, x: Tensor, target: int, values_only: bool) -> Tensor:
    """Relevance of one example [t, 6], each operation as the paper writes it."""
    t = len(x)
    mean, spread = x.mean(-1, keepdim=True), (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    n1 = net.norm1(x)
    q, k, v = net.q(n1), net.k(n1), net.v(n1)
    parts = [(q[:, s], k[:, s], v[:, s]) for s in (slice(0, 3), slice(3, 6))]
    logits = [a @ b.T / 3**0.5 for a, b, _ in parts]
    h = torch.cat([m.softmax(-1) @ c for m, (_, _, c) in zip(logits, parts, strict=True)], -1)
    o = net.o(h)
    x2 = x + o
    n2 = net.norm2(x2)
    g, u = net.gate(n2), net.up(n2)
    act = F.silu(g)
    m = net.down(act * u)
    x3 = x2 + m
    pooled = x3.mean(0, keepdim=True)
    out = net.head(pooled)

    r = torch.zeros_like(out)
    r[0, target] = out[0, target]
    r = dense(pooled, out, net.head.weight, r)
    r = x3 / t / pooled * r
    r_m, r_x2 = m / x3 * r, x2 / x3 * r
    r_p = dense(act * u, m, net.down.weight, r_m)
    r_n2 = dense(n2, g, net.gate.weight, r_p / 2) + dense(n2, u, net.up.weight, r_p / 2)
    r_x2 = r_x2 + r_n2
    r_o, r_x = o / x2 * r_x2, x / x2 * r_x2
    r_h = dense(h, o, net.o.weight, r_o)
    r_q, r_k, r_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for i, ((a, b, c), z) in enumerate(zip(parts, logits, strict=True)):
        at = slice(3 * i, 3 * i + 3)
        s = z.softmax(-1)
        if values_only:
            terms = s[:, :, None] * c[None] / (s @ c)[:, None]
            r_v[:, at] = (terms * r_h[:, None, at]).sum(0)
            continue
        r_s, r_v[:, at] = matrix_product(s, c, r_h[:, at])
        r_z = z * (r_s - s * r_s.sum(-1, keepdim=True))
        r_q[:, at], r_kt = matrix_product(a, b.T, r_z)
        r_k[:, at] = r_kt.T
    r_n1 = dense(n1, v, net.v.weight, r_v)
    r_n1 = r_n1 + dense(n1, q, net.q.weight, r_q) + dense(n1, k, net.k.weight, r_k)
    centering = (torch.eye(6, dtype=x.dtype) - 1 / 6) * net.norm1.weight[:, None]
    return r_x + torch.einsum("ti,ji,tj->ti", x, centering, r_n1 / n1 / spread) + 0 * mean


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("values_only", [True, False])
def test_a_block_written_out(fused: bool, values_only: bool) -> None:
    net, x = block(fused), torch.randn(3, 5, 6, dtype=torch.float64)
    slow = torch.stack([slow_relevance(net, row, 1, values_only) for row in x])
    got = relevance(net, x, cp_lrp() if values_only else attn_lrp(), 1)
    torch.testing.assert_close(got, slow, atol=1e-8, rtol=1e-6)
    other = relevance(net, x, attn_lrp() if values_only else cp_lrp(), 1)
    assert (other - slow).norm() > 0.05 * slow.norm()
    for size in (1, 2):
        q = ap.Field(net, batch_size=size).bind(x, target=1)
        again = q.backward(x, torch.arange(3), cp_lrp() if values_only else attn_lrp()).relevance
        torch.testing.assert_close(again, got, atol=1e-12, rtol=1e-9)


# -- networks as they come --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit", "swin", "bert", "gpt2", "llama", "t5", "convnext", "regnet"])
def test_conserved_without_constants(name: str) -> None:
    pytest.importorskip("transformers")
    net = make(name)
    q = ap.Field(without_constants(net.model)).bind(net.x)
    owner = torch.arange(len(net.x))
    done = q.backward(net.x, owner, cp_lrp(ap.rules.Epsilon(1e-12)))
    kept = done.relevance.flatten(1).sum(1) / done.value
    assert (kept - 1).abs().max() <= 1e-6
    soft = q.backward(net.x, owner, attn_lrp(ap.rules.Epsilon(1e-12)))
    moved = (soft.relevance.flatten(1).sum(1) / soft.value - kept).abs().max()
    assert (moved > 0.01) == (name not in ("convnext", "regnet"))  # a softmax has an offset


def test_fused_attention_is_the_same() -> None:
    pytest.importorskip("transformers")
    maps = [relevance(net.model, net.x, attn_lrp(), 0) for net in both_attentions()]
    torch.testing.assert_close(maps[0], maps[1], atol=1e-10, rtol=1e-9)


def both_attentions() -> list:
    return [make("bert", attn_implementation=how) for how in ("sdpa", "eager")]


# -- mistakes ---------------------------------------------------------------------------------------


def test_what_cannot_be_told_is_refused() -> None:
    x = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    with pytest.raises(RuleError, match=r"sigmoid in the model, which gives 0\.5 at 0"):
        relevance(torch.sigmoid, x, attn_lrp())
    assert relevance(torch.sigmoid, x + 1, attn_lrp()).isfinite().all()
    q = ap.Field(lambda x: torch.softmax(x, -1) * x, lambda out: out.sum(1)).bind(x)
    with pytest.raises(RuleError, match="Detached on softmax"):
        q.backward(x.requires_grad_(), torch.zeros(1, dtype=torch.long), cp_lrp(), differentiable=True)
    with pytest.raises(RuleError, match=r"Detached on rsqrt.* in place"):
        relevance(lambda x: (x + 2).rsqrt_() * x, x.detach(), cp_lrp())
    with pytest.raises(RuleError, match="div"):
        relevance(lambda x: x / x.pow(2).sum(-1, keepdim=True).sqrt(), x.detach(), attn_lrp())
    stats = torch.zeros(2, dtype=x.dtype), torch.full((2,), 4.0, dtype=x.dtype)
    fixed = relevance(
        lambda x: F.instance_norm(x, *stats, use_input_stats=False, eps=0.0), x.detach()[..., None], attn_lrp()
    )
    torch.testing.assert_close(fixed, x.detach()[..., None] / 2)  # running statistics: affine


def test_a_detached_operation_is_a_constant_for_what_follows() -> None:
    x = torch.randn(2, 3, dtype=torch.float64)
    rules = Rules((("softmax", Detached()), ("elementwise", Identity())))
    got = relevance(lambda x: (torch.softmax(x, -1) * 3).mT.mT * x, x, rules)
    torch.testing.assert_close(got, torch.softmax(x, -1) * 3 * x)


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_gates_get_nothing_from_values_alone(name: str) -> None:
    net = make(name)
    field = ap.Field(without_constants(net.model))
    kept = {}
    for gates in (True, False):
        rules = replace(cp_lrp(), table=(("product", Half(gates)), *cp_lrp().table))
        done = field.bind(net.x).backward(net.x, torch.arange(len(net.x)), rules)
        kept[gates] = (done.relevance.flatten(1).sum(1) / done.value - 1).abs().max()
    assert kept[False] <= 1e-3  # what ε absorbs
    assert kept[True] > 5 * kept[False]


def test_a_gate_by_hand() -> None:
    x, w = torch.rand(3, 4, dtype=torch.float64) + 0.5, torch.rand(4, 4, dtype=torch.float64)
    for gated in (
        lambda x: torch.sigmoid(x @ w) * x,
        lambda x: x * (1 - torch.sigmoid(x @ w)),
        lambda x: (1 - F.hardsigmoid(x @ w)) * x,
    ):
        torch.testing.assert_close(relevance(gated, x, cp_lrp()), gated(x))
        assert (relevance(gated, x, attn_lrp()) - gated(x)).abs().max() > 0.01
