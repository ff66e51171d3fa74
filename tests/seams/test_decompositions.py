"""Operations taken apart: the same values and derivatives, and DeepLIFT complete through each."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apportion as ap
from apportion.core import ops
from apportion.core.errors import RuleError
from apportion.parts.rules import Epsilon, Plain, Rules, decompose

DEEP_LIFT = ap.rules.deep_lift_rescale()
SIZES = {"x": (3, 4, 6)}
W = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
V = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
ONE = torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) + 0.5


def normed(t: Tensor) -> tuple[Tensor, Tensor]:
    """Two views of the input, the second one positive."""
    return t.sin(), t.cos() + 2


def filled(x: Tensor) -> Tensor:
    out = torch.zeros(len(x), 2, 6, dtype=x.dtype)
    out[:, 1] = x[:, 0].sin()
    out[:, 0] = x[:, 1] * x[:, 2]
    return out


def copied(x: Tensor) -> Tensor:
    out = x.new_empty(x.shape)
    out.copy_(x.sin() * x)
    return out


CASES: dict[str, Callable[[Tensor], Tensor]] = {
    "layer_norm": lambda x: F.layer_norm(x, (4, 6), V, V.cos()),
    "layer_norm of the last axis": lambda x: torch.layer_norm(x, (6,), ONE),
    "rms_norm": lambda x: F.rms_norm(x, (6,), ONE, 1e-3),
    "rms_norm without eps": lambda x: F.rms_norm(x, (4, 6)),
    "group_norm": lambda x: F.group_norm(x, 2, ONE[:4], ONE[2:]),
    "group_norm of pictures": lambda x: F.group_norm(x.unflatten(2, (2, 3)), 1),
    "instance_norm": lambda x: F.instance_norm(x, weight=ONE[:4], bias=ONE[2:]),
    "instance_norm by running statistics": lambda x: F.instance_norm(
        x, ONE[:4].clone(), ONE[2:].clone(), use_input_stats=False
    ),
    "local_response_norm": lambda x: F.local_response_norm(x, 3, alpha=0.5),
    "var": lambda x: x.var(-1),
    "var by position": lambda x: torch.var(x, (1, 2), False, True),
    "var with correction": lambda x: torch.var(x, 1, correction=0),
    "std": lambda x: x.std((1, 2), keepdim=True),
    "var_mean": lambda x: torch.stack(torch.var_mean(x, 1)).sum(0),
    "std_mean": lambda x: torch.stack(torch.std_mean(x, 1, keepdim=True)).sum(0),
    "norm": lambda x: x.norm(dim=-1),
    "norm of order 1": lambda x: torch.norm(x, 1, (1, 2)),
    "norm of order 3": lambda x: torch.linalg.vector_norm(x, 3, (1, 2), keepdim=True),
    "normalize": lambda x: F.normalize(x, dim=1),
    "cosine_similarity": lambda x: F.cosine_similarity(*normed(x), dim=2),
    "softmin": lambda x: F.softmin(x, -1),
    "softmax method": lambda x: x.softmax(1),
    "quotient": lambda x: normed(x)[0] / normed(x)[1],
    "quotient of a constant": lambda x: V / normed(x)[1],
    "quotient of a number": lambda x: 2 / normed(x)[1],
    "quotient in place": lambda x: (x.sin() * 1).div_(normed(x)[1]),
    "power": lambda x: normed(x)[1] ** normed(x)[0],
    "power of a constant": lambda x: torch.pow(ONE, x),
    "power of a number": lambda x: 2**x,
    "power by a constant": lambda x: normed(x)[1] ** ONE,
    "prod": lambda x: x.prod(1),
    "prod, kept": lambda x: torch.prod(x, 1, keepdim=True),
    "cumprod": lambda x: x[:, :3].cumprod(1),
    "addcmul": lambda x: torch.addcmul(x, x.sin(), normed(x)[1], value=0.5),
    "addcdiv": lambda x: torch.addcdiv(x, x.sin(), normed(x)[1], value=0.5),
    "lerp": lambda x: torch.lerp(x, x.sin(), x.cos()),
    "addmm": lambda x: torch.addmm(W[0], x.flatten(0, 1), W).unflatten(0, (-1, 4)),
    "addmm to what carries": lambda x: torch.addmm(x.flatten(0, 1)[:, :5], x.flatten(0, 1), W, beta=2).unflatten(
        0, (-1, 4)
    ),
    "baddbmm": lambda x: torch.baddbmm(x[:, :, :4], x, x.transpose(1, 2), beta=0.5, alpha=2),
    "einsum": lambda x: torch.einsum("bij,bkj->bik", x, x.sin()),
    "einsum of three": lambda x: torch.einsum("bij,bkj,bkl->bil", x, x.sin(), x.cos()),
    "einsum of three, implicit": lambda x: torch.einsum("...i,...i,...i", x, x.sin(), x.cos()),
    "einsum with a constant": lambda x: torch.einsum("bij,jk->bik", x, W),
    "glu": lambda x: F.glu(x, 2),
    "prelu": lambda x: F.prelu(x, ONE[:4]),
    "minimum of zero": lambda x: torch.minimum(x, torch.zeros((), dtype=x.dtype)),
    "real Fourier transform": lambda x: torch.fft.irfft(torch.fft.rfft(x, n=5) * W[0, :3], n=6),
    "setitem": filled,
    "copy": copied,
}


def points() -> Tensor:
    return torch.randn(SIZES["x"], dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def model(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: (fn(x).flatten(1) if fn(x).ndim > 1 else fn(x)[:, None]).cos().sum(1)


def gap(fn: Callable[[Tensor], Tensor], rules: Rules = DEEP_LIFT, **options: Any) -> Tensor:
    x = points()
    done = ap.Field(fn).bind(x).backward(x, torch.arange(3), rules, 0.7 * x.flip(0) + 0.1, **options)
    assert done.reference_value is not None
    return (done.relevance.flatten(1).sum(1) - done.value + done.reference_value).abs().max()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("record", [False, True])
def test_deep_lift_is_complete(name: str, record: bool) -> None:
    assert gap(model(CASES[name]), record=record) <= 1e-11


@pytest.mark.parametrize("name", CASES)
def test_taken_apart_it_is_the_same(name: str) -> None:
    x, owner = points(), torch.arange(3)
    q = ap.Field(model(CASES[name])).bind(x)
    value, grad = q.value_and_grad(x, owner)
    apart = Rules((("product", Plain()), ("elementwise", Plain()), ("layer", Plain())), otherwise=Plain())
    for rules in (apart, ap.rules.gradient()):
        done = q.backward(x, owner, rules)
        torch.testing.assert_close(done.value, value, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(done.signal, grad, rtol=1e-9, atol=1e-11)


def test_a_rule_of_its_own_name_wins() -> None:
    x, owner = points(), torch.arange(3)
    q = ap.Field(lambda t: F.layer_norm(t, (6,)).sum((1, 2))).bind(x)
    named = Rules((("layer_norm", Plain()), *DEEP_LIFT.table))
    unnamed = Rules(tuple(pair for pair in DEEP_LIFT.table if pair[0] != "layer_norm"))
    kinds = [r.kind for r in q.backward(x, owner, named, x.flip(0), record=True).tape[0]]
    apart = [r.kind for r in q.backward(x, owner, unnamed, x.flip(0), record=True).tape[0]]
    assert (kinds.count("layer_norm"), kinds.count("rsqrt")) == (1, 0)
    assert (apart.count("layer_norm"), apart.count("rsqrt")) == (0, 1)


LAYERS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: F.linear(x, W.T),
    "matmul": lambda x: x @ W,
    "torch.matmul": lambda x: torch.matmul(x, W),
    "mm": lambda x: torch.mm(x.flatten(0, 1), W).unflatten(0, (-1, 4)),
    "addmm": lambda x: torch.addmm(torch.zeros(5, dtype=x.dtype), x.flatten(0, 1), W).unflatten(0, (-1, 4)),
    "1x1 convolution": lambda x: F.conv1d(x.transpose(1, 2), W.T[:, :, None]).transpose(1, 2),
    "transposed convolution": lambda x: F.conv_transpose1d(x.transpose(1, 2), W[:, :, None]).transpose(1, 2),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("rule", [Epsilon(0.3), ap.rules.ZPlus()])
def test_a_linear_layer_is_one_however_it_is_written(name: str, rule: Any) -> None:
    x, owner = points(), torch.arange(3)
    rules = Rules((("layer", rule), ("relu", Plain())))

    def signal(fn: Callable[[Tensor], Tensor], rules: Rules) -> Any:
        return ap.Field(lambda t: fn(t).relu().sum((1, 2))).bind(x).backward(x, owner, rules).signal

    got, want = signal(LAYERS[name], rules), signal(LAYERS["linear"], rules)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)
    assert (got - signal(LAYERS[name], ap.rules.gradient())).abs().max() > 1e-3


RECURRENT = {
    "lstm": lambda **o: nn.LSTM(6, 5, **o),
    "gru": lambda **o: nn.GRU(6, 5, **o),
    "rnn": lambda **o: nn.RNN(6, 5, **o),
    "rnn with relu": lambda **o: nn.RNN(6, 5, nonlinearity="relu", **o),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"batch_first": True},
    "both ways, two levels": {"batch_first": True, "bidirectional": True, "num_layers": 2},
    "without bias": {"batch_first": True, "bias": False},
    "projected": {"batch_first": True, "proj_size": 3, "bidirectional": True},
}


class Recurrent(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.double().eval()
        for p in self.parameters():
            p.data.mul_(2)

    def forward(self, x: Tensor) -> Tensor:
        out, state = self.layer(x)
        ends = state if isinstance(state, tuple) else (state,)
        return out.sin().sum((1, 2)) + sum(s.cos().sum((0, 2)) for s in ends)


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.parametrize("option", OPTIONS)
def test_recurrent_layers(name: str, option: str) -> None:
    if option == "projected" and name != "lstm":
        return
    torch.manual_seed(0)
    net = Recurrent(RECURRENT[name](**OPTIONS[option]))
    x, owner = points(), torch.arange(3)
    assert gap(net) <= 1e-11
    q = ap.Field(net).bind(x)
    value, grad = q.value_and_grad(x, owner)
    apart = Rules((("product", Plain()), ("layer", Plain()), ("elementwise", Plain())))
    done = q.backward(x, owner, apart)
    torch.testing.assert_close(done.value, value, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(done.signal, grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells_are_steps_of_their_layers(cell: type[nn.Module]) -> None:
    torch.manual_seed(0)
    one = cell(6, 5).double()

    def forward(x: Tensor) -> Tensor:
        state = one(x[:, 0])
        state = one(x[:, 1], state)
        return (state[0] * state[1] if isinstance(state, tuple) else state).sum(1)

    assert gap(forward) <= 1e-12


def test_packed_sequences_are_refused_by_name() -> None:
    layer = nn.LSTM(6, 5, batch_first=True).double()

    def forward(x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.full((len(x),), 4), batch_first=True)
        return layer(packed)[0].data.sum()[None].expand(len(x))

    x = points()
    with pytest.raises(RuleError, match=r"_pack_padded_sequence.*has no rule"):
        ap.Field(forward, batch_size=1).bind(x).backward(x, torch.arange(3), DEEP_LIFT, x.flip(0))
    data = torch.nn.utils.rnn.pack_sequence([points()[0]])
    args = (data.data, data.batch_sizes, (), [], True, 1, 0.0, False, False)
    assert decompose.find(ops.Op("lstm", ops.Status.NONLINEAR, torch.lstm), torch.lstm, args, [True]) is None


def test_a_maximum_between_signal_and_constant_is_refused_where_relu_has_a_rule() -> None:
    def forward(x: Tensor) -> Tensor:
        return torch.cat([x[:, None], torch.zeros_like(x)[:, None]], 1).amax(1).sum((1, 2))

    x, owner = points(), torch.arange(3)
    q = ap.Field(forward).bind(x)
    with pytest.raises(RuleError, match=r"amax in the model chooses between the signal and constants"):
        q.backward(x, owner, ap.rules.guided_backprop())
    torch.testing.assert_close(q.backward(x, owner, ap.rules.gradient()).signal, q.value_and_grad(x, owner)[1])
    beside = ap.Field(lambda x: torch.cat([x, torch.zeros_like(x)], 1).amax(2).sum(1)).bind(x)  # along another axis
    beside.backward(x, owner, ap.rules.guided_backprop())


TAKEN: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda h: h.detach().abs().max().item(),
    "float": lambda h: float(h.detach().sum()),
    "tolist": lambda h: h.detach().tolist()[0][0][0],
    "numpy": lambda h: float(h.detach().numpy().mean()),
    "int": lambda h: int(h.argmax()),
}


@pytest.mark.parametrize("name", TAKEN)
def test_numbers_taken_out_are_told(name: str) -> None:
    class Scales(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * TAKEN[name](x)).relu().sum((1, 2))

    x = points()
    q = ap.Field(Scales(), batch_size=1).bind(x)
    q.backward(x, torch.arange(3), ap.rules.guided_backprop())
    assert any("the top module (Scales) takes a number out" in w for w in q.warnings)
    quiet = ap.Field(lambda x: (x * float(V.sum()) if x.sum().bool() else x).relu().sum((1, 2)), batch_size=1).bind(x)
    quiet.backward(x, torch.arange(3), ap.rules.guided_backprop())
    assert not quiet.warnings


def test_transformer_encoder_of_torch() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, activation="gelu")
    net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval()
    assert gap(lambda x: net(x).sin().sum((1, 2))) <= 1e-10
