"""AttAttr: post-softmax attention as a free input, also inside `scaled_dot_product_attention`."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apportion as ap
from apportion.core.ops import attention


class Block(nn.Module):
    def __init__(self, eager: bool):
        super().__init__()
        self.qkv, self.mlp, self.eager = nn.Linear(6, 18), nn.Linear(6, 6), eager

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 3)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        if self.eager:
            scores = q @ k.transpose(-1, -2) / math.sqrt(3)
            future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            h = F.softmax(scores.masked_fill(future, -torch.inf), dim=-1) @ v
        else:
            h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + h.transpose(1, 2).flatten(2)
        return x + torch.tanh(self.mlp(x))


class Net(nn.Module):
    def __init__(self, eager: bool = False):
        super().__init__()
        self.blocks, self.out = nn.Sequential(Block(eager), Block(eager)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.blocks(x)[:, -1])


def twins() -> tuple[nn.Module, nn.Module, Tensor]:
    fused, eager = Net().double().eval(), Net(eager=True).double().eval()
    eager.load_state_dict(fused.state_dict())
    return fused, eager, torch.randn(3, 5, 6, dtype=torch.float64) * 2


TARGET = [0, 2, 1]


def att_attr(q: ap.Question, rule: ap.quadrature.Quadrature) -> Tensor:
    """A ⊙ ∫ ∂p/∂(αA) dα from the zero baseline; every node of every example is a row."""
    nodes, weights = rule.rule()
    owner = torch.arange(len(q)).repeat_interleave(len(nodes))
    alpha = nodes.repeat(len(q))[:, None, None, None]
    _, grad = q.value_and_grad(alpha * q.x[owner], owner)
    return q.x * (grad.unflatten(0, (len(q), -1)) * weights[:, None, None, None]).sum(1)


@pytest.mark.parametrize("call", [0, 1])
def test_attention_of_each_layer(call: int):
    fused, eager, x = twins()
    site = ap.AtOp("softmax", call=call)
    found = []
    for net in (fused, eager):
        q = ap.Field(net, ap.Probability(), site).bind(x, target=TARGET)
        assert q.x.shape == (3, 2, 5, 5)
        torch.testing.assert_close(q.x.sum(-1), torch.ones(3, 2, 5, dtype=torch.float64))
        assert q.x.triu(1).abs().max() == 0  # causal
        p = net(x).softmax(1)[torch.arange(3), TARGET].detach()
        torch.testing.assert_close(q.fx, p, atol=1e-14, rtol=0)  # overriding by itself changes nothing
        owner = torch.arange(3)
        drop = q.fx - q.value(torch.zeros_like(q.x), owner)
        assert drop.abs().min() > 1e-4
        a = att_attr(q, ap.quadrature.Gauss(14))
        assert (a.flatten(1).sum(1) - drop).abs().max() <= 1e-12
        left = att_attr(q, ap.quadrature.Left(20))  # the authors' rule
        assert (left.flatten(1).sum(1) - drop).abs().max() > 1e-5
        found.append(a)
    torch.testing.assert_close(found[0], found[1], atol=1e-13, rtol=0)


@pytest.mark.parametrize("size", [1, 7, "auto"])
def test_it_is_integrated_gradients_at_that_site(size):
    fused, _, x = twins()
    field = ap.Field(fused, ap.Probability(), ap.AtOp("softmax", call=1), batch_size=size)
    a = ap.IntegratedGradients(quadrature=ap.quadrature.Gauss(14))(field, x, target=TARGET)
    torch.testing.assert_close(a.values, att_attr(field.bind(x, target=TARGET), ap.quadrature.Gauss(14)))
    assert a.gap is not None
    assert a.gap.abs().max() <= 1e-12
    first = ap.Field(fused, ap.Probability(), ap.AtOp("softmax", call=0))
    assert (att_attr(first.bind(x, target=TARGET), ap.quadrature.Gauss(14)) - a.values).abs().max() > 1e-4


def test_the_override_reaches_the_model():
    """Uniform attention written by hand equals the overridden pass."""
    fused, eager, x = twins()
    q = ap.Field(fused, site=ap.AtOp("softmax", call=1)).bind(x, target=1)
    uniform = torch.full_like(q.x, 0.2)
    block = eager.get_submodule("blocks.1")
    assert isinstance(block, Block)
    h = eager.get_submodule("blocks.0")(x)
    v = block.qkv(h).chunk(3, -1)[2]
    h = h + v.mean(1, keepdim=True)
    by_hand = eager.get_submodule("out")((h + torch.tanh(block.mlp(h)))[:, -1])[:, 1]
    torch.testing.assert_close(q.value(uniform, torch.arange(3)), by_hand.detach(), atol=1e-13, rtol=0)


class Torchs(nn.Module):
    """torch's own attention module."""

    def __init__(self):
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.attention(x, x, x, need_weights=False)[0]).mean(1))


def test_inside_torchs_own_module():
    net, x = Torchs().double().eval(), torch.randn(3, 5, 6, dtype=torch.float64)
    q = ap.Field(net, ap.Probability(), ap.AtOp("softmax")).bind(x, target=TARGET)
    weights = net.attention(x, x, x, average_attn_weights=False)[1]
    torch.testing.assert_close(q.x, weights.detach())
    drop = q.fx - q.value(torch.zeros_like(q.x), torch.arange(3))
    assert (att_attr(q, ap.quadrature.Gauss(14)).flatten(1).sum(1) - drop).abs().max() <= 1e-12
    _, taps = q.tap(q.x, torch.arange(3), [ap.AtOp("scaled_dot_product_attention")], grad=False)
    v = net.attention.in_proj_weight[12:] @ x.transpose(1, 2) + net.attention.in_proj_bias[12:, None]
    by_hand = weights @ v.unflatten(1, (2, 3)).transpose(-1, -2)
    torch.testing.assert_close(next(iter(taps.values())).value, by_hand.detach())
    rules = ap.rules.deep_lift_rescale()
    done = ap.Field(net).bind(x, target=TARGET).backward(x, torch.arange(3), rules, torch.zeros_like(x))
    assert done.reference_value is not None
    assert (done.relevance.sum((1, 2)) - done.value + done.reference_value).abs().max() <= 1e-12


def test_left_rule_bias():
    """a² from 0 to 1: the left rule with 20 and 64 nodes gives .95 and .984."""
    q = ap.Field(lambda a: (a**2).sum((1, 2, 3)), score=lambda out: out).bind(torch.ones(1, 1, 1, 1).double())
    for n, expected in ((20, 0.95), (64, 1 - 1 / 64)):
        torch.testing.assert_close(float(att_attr(q, ap.quadrature.Left(n))), expected)
    torch.testing.assert_close(float(att_attr(q, ap.quadrature.Gauss(2))), 1.0)


def test_errors_say_what_was_seen():
    fused, _, x = twins()
    cases = {
        ap.AtOp("layer_norm"): r"'layer_norm' was not called(.|\n)*operations seen:.*'softmax'",
        ap.AtOp("softmax"): r"called 2 times(.|\n)*call=0.*call=1",
        ap.AtOp("softmax", call=2): r"was called 2 time\(s\)",
    }
    for site, message in cases.items():
        with pytest.raises(ap.ApportionError, match=message):
            ap.Field(fused, site=site).bind(x, target=0)
    with pytest.raises(ap.ApportionError, match="softmax"):
        ap.AtOp("sotfmax")


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_query_that_may_look_at_nothing_gets_zeros(kind: str):
    mask = torch.ones(3, 3, dtype=torch.bool).tril()
    mask[1] = False
    given = mask if kind == "bool" else torch.zeros(3, 3).double().masked_fill(~mask, -torch.inf)
    weight, x = torch.randn(2, 4).double(), torch.randn(2, 3, 2).double()

    def fused(t: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(t, t, t, attn_mask=given).flatten(1)[:, :4] @ weight.T

    def by_hand(t: Tensor) -> Tensor:
        rows = [t[:, 0], torch.zeros(t.shape[0], 2, dtype=t.dtype)]  # the first looks at itself alone
        return torch.cat(rows, 1) @ weight.T

    torch.testing.assert_close(fused(x), by_hand(x))
    # half of a product's relevance under AttnLRP is the scores', which a softmax over one of them keeps
    for method, part in ((ap.DeepLIFT(), 1.0), (ap.LRP(rules=ap.rules.attn_lrp()), 0.5)):
        a = method(ap.Field(fused), x, target=0).values
        assert a[:, 1:].abs().max() <= 1e-12
        assert (a.sum((1, 2)) - part * fused(x)[:, 0]).abs().max() <= 1e-3
    sent = ap.Field(fused).bind(x, target=0).backward(x, torch.arange(2), ap.rules.gradient()).relevance
    torch.testing.assert_close(sent[:, 0], x[:, 0] * weight[:1, :2])


def test_scale_zero_is_a_scale_and_dropout_is_refused():
    x = torch.randn(2, 3, 2).double()

    field = ap.Field(lambda t: F.scaled_dot_product_attention(t, t, t, scale=0.0).flatten(1))
    done = field.bind(x, target=0)
    value = done.backward(x, torch.arange(2), ap.rules.gradient(), record=True).value
    torch.testing.assert_close(value, x.mean(1)[:, 0])
    with pytest.raises(ap.ApportionError, match=r"dropout_p=0\.3"):
        attention(x, x, x, dropout_p=0.3)
