"""The aliasing twin: it computes what the user's model computes, and leaves no trace on it."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

import apportion as ap
from apportion.core.errors import ModelError
from apportion.core.twin import Twin, fingerprint, unwrap

DOUBLE = torch.float64


class Tied(nn.Module):
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Linear(5, 3, bias=False)
        self.out = nn.Linear(5, 3, bias=False)
        self.out.weight = self.words.weight
        self.kept = [self.words.weight]
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.linear(x, self.kept[0]) + self.out(2 * x).tanh() * self.words(x)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(5, 3, num_layers=2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x[:, None].expand(-1, 4, -1))[0][:, -1]


class Doubling(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


def _parametrized() -> nn.Module:
    net = nn.Sequential(nn.Linear(5, 3))
    parametrize.register_parametrization(net[0], "weight", Doubling())
    return net


def _old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(5, 3)))


def _triple(_module: nn.Module, _args: Any, out: Tensor) -> Tensor:
    return out * 3


def _hooked() -> nn.Module:
    net = nn.Sequential(nn.Linear(5, 3))
    net[0].register_forward_hook(_triple)
    net.register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    return net


def _normalized() -> nn.Module:
    net = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))
    net(torch.randn(64, 5))
    return net


def _traced() -> nn.Module:
    made: Any = torch.jit.trace(nn.Sequential(nn.Linear(5, 3), nn.Tanh()).eval(), torch.zeros(2, 5))
    return made


KINDS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(5, 3),
    "batch norm": _normalized,
    "tied": Tied,
    "recurrent": Recurrent,
    "attention": lambda: nn.Sequential(
        nn.Unflatten(1, (5, 1)), nn.Linear(1, 4), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Flatten()
    ),
    "parametrized": _parametrized,
    "weight norm": lambda: nn.Sequential(weight_norm(nn.Linear(5, 3))),
    "old weight norm": _old_weight_norm,
    "spectral norm": lambda: nn.Sequential(spectral_norm(nn.Linear(5, 3))),
    "old spectral norm": lambda: nn.Sequential(torch.nn.utils.spectral_norm(nn.Linear(5, 3))),
    "orthogonal": lambda: nn.Sequential(orthogonal(nn.Linear(5, 3))),
    "hooks": _hooked,
    "script": lambda: torch.jit.script(nn.Sequential(nn.Linear(5, 3), nn.Tanh())),
    "traced": _traced,
    "fx": lambda: torch.fx.symbolic_trace(nn.Sequential(nn.Linear(5, 3), nn.Tanh())),
}
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.*deprecated:DeprecationWarning")


def direct(model: nn.Module, x: Tensor, target: int) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    out = model(x)[:, target]
    return out.detach(), torch.autograd.grad(out.sum(), x)[0]


def trace(model: nn.Module) -> dict[str, Any]:
    """Everything an explanation could leave on a model."""
    found: dict[str, Any] = {"keys": list(model.state_dict())}
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        found[name] = (id(t), t.data_ptr(), t._version, t.requires_grad, t.grad, t.detach().clone().numpy().tobytes())
    for name, m in model.named_modules():
        hooks = (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
        attributes = sorted(k for k in vars(m) if k != "weight")
        found[f"module {name}"] = (m.training, [list(h) for h in hooks], type(m), attributes)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_same_numbers_and_no_trace(kind: str) -> None:
    model = KINDS[kind]().eval()
    x = torch.randn(3, 5)
    value, grad = direct(model, x, 1)
    before = trace(model)
    a = ap.Gradient()(ap.Field(model), x, target=1)
    assert trace(model) == before
    assert torch.allclose(a.value, value, atol=1e-6)
    assert torch.allclose(a.values, grad, atol=1e-6)
    assert (["hooks of your own" in w for w in a.warnings] == [True]) if kind == "hooks" else a.warnings == ()


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_shared_not_copied(kind: str) -> None:
    model = KINDS[kind]().eval()
    twin = Twin(model, None).module
    assert twin is not None
    own, new = dict(model.named_parameters()), dict(twin.named_parameters())
    assert list(own) == list(new)
    assert not any(p.requires_grad for p in new.values())
    assert all(own[k].data_ptr() == new[k].data_ptr() for k in own)
    assert all(own[k] is not new[k] for k in own)


def test_tying_is_kept() -> None:
    model = Tied().eval()
    twin: Any = Twin(model, None).module
    assert twin.out.weight is twin.words.weight is twin.kept[0]
    assert twin.out.weight.data_ptr() == model.out.weight.data_ptr()
    cast: Any = Twin(model, DOUBLE).module
    assert cast.out.weight is cast.words.weight is cast.kept[0]
    assert cast.out.weight.dtype == DOUBLE


@pytest.mark.parametrize("precision", [None, DOUBLE])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_changed_in_place_are_seen(kind: str, precision: torch.dtype | None) -> None:
    model = KINDS[kind]().eval()
    x = torch.randn(3, 5)
    field = ap.Field(model, precision=precision)
    first = ap.Gradient()(field, x, target=1).value
    parameters = list(model.parameters())
    for change in (lambda p: p.add_(0.1), lambda p: p.data.mul_(1.5)):
        with torch.no_grad():
            for p in parameters:
                change(p)
        now = ap.Gradient()(field, x, target=1)
        value, grad = direct(model, x, 1)
        assert torch.allclose(now.value.float(), value, atol=1e-5)
        assert torch.allclose(now.values.float(), grad, atol=1e-5)
        assert not torch.allclose(now.value, first, atol=1e-4)


@pytest.mark.parametrize("how", ["add_", "data", "replace"])
def test_buffers_changed_are_seen(how: str) -> None:
    model = _normalized().eval()
    x, field = torch.randn(3, 5), ap.Field(model)
    ap.Gradient()(field, x, target=0)
    mean = model[1].running_mean  # pyright: ignore[reportIndexIssue]
    if how == "add_":
        mean.add_(1)
    elif how == "data":
        mean.data.add_(1)
    else:
        model[1].running_mean = mean + 1  # pyright: ignore[reportIndexIssue]
    assert torch.allclose(ap.Gradient()(field, x, target=0).value, direct(model, x, 0)[0], atol=1e-6)


class Plain(nn.Module):
    """Its function depends on ordinary attributes of many kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.factor = 1.0
        self.act: Any = F.relu
        self.shift = torch.zeros(3)
        self.options = {"powers": [1.0, 2.0]}
        self.none: Any = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.layer(x) * self.factor + self.shift) ** self.options["powers"][1]
        return y if self.none is None else y + self.none


def _set_factor(m: Plain) -> None:
    m.factor = 3.0


def _set_act(m: Plain) -> None:
    m.act = torch.tanh


def _set_shift(m: Plain) -> None:
    m.shift = torch.ones(3)


def _add_shift(m: Plain) -> None:
    m.shift.add_(1)


def _set_option(m: Plain) -> None:
    m.options["powers"][1] = 3.0


def _set_none(m: Plain) -> None:
    m.none = 1.0


def _set_parameter(m: Plain) -> None:
    m.layer.weight = nn.Parameter(torch.ones(3, 5))


def _set_data(m: Plain) -> None:
    m.layer.weight.data = torch.ones(3, 5)


def _set_module(m: Plain) -> None:
    m.layer = nn.Linear(5, 3)


def _hook(m: Plain) -> None:
    m.layer.register_forward_hook(_triple)


def _parametrize(m: Plain) -> None:
    parametrize.register_parametrization(m.layer, "weight", Doubling())


@pytest.mark.parametrize(
    "change",
    [
        *(
            _set_factor,
            _set_act,
            _set_shift,
            _add_shift,
            _set_option,
            _set_none,
            _set_parameter,
            _set_data,
            _set_module,
        ),
        *(_hook, _parametrize),
    ],
)
def test_changes_of_the_model_are_seen(change: Callable[[Plain], None]) -> None:
    model, x = Plain().eval(), torch.randn(3, 5)
    field = ap.Field(model)
    before = ap.Gradient()(field, x, target=0)
    change(model)
    after = ap.Gradient()(field, x, target=0)
    value, grad = direct(model, x, 0)
    assert torch.allclose(after.value, value, atol=1e-6)
    assert torch.allclose(after.values, grad, atol=1e-6)
    assert not torch.allclose(after.value, before.value, atol=1e-4)


def test_an_unchanged_model_keeps_its_twin() -> None:
    field = ap.Field(_normalized().eval())
    field.bind(torch.randn(2, 5))
    twin = field.twin()
    field.bind(torch.randn(3, 5))
    assert field.twin() is twin
    assert fingerprint(field.model) == fingerprint(field.model)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "fx"])
def test_precision(kind: str) -> None:
    model = KINDS[kind]().eval()
    x = torch.randn(3, 5)
    before = trace(model)
    a = ap.Gradient()(ap.Field(model, precision=DOUBLE), x, target=1)
    assert trace(model) == before
    assert a.values.dtype == a.value.dtype == DOUBLE
    value, grad = direct(model.double(), x.double(), 1)
    assert torch.allclose(a.value, value, rtol=0, atol=1e-12)
    assert torch.allclose(a.values, grad, rtol=0, atol=1e-12)


def test_precision_of_further_arguments_and_plain_tensors() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.shift = nn.Linear(5, 3), torch.randn(3)

        def forward(self, x: Tensor, each: Tensor, shared: Tensor, *, whole: Tensor) -> Tensor:
            return self.layer(x) * each + self.shift @ shared + whole[:, None]

    extra = (torch.randn(2, 1), ap.Shared(torch.randn(3, 3)))
    q = ap.Field(Net(), extra=extra, precision=DOUBLE)
    with pytest.raises(ModelError):
        q.bind(torch.randn(2, 5))
    net, whole = Net(), torch.tensor([1, 2])
    named = {"each": extra[0], "shared": extra[1], "whole": whole}
    a = ap.Gradient()(ap.Field(net, extra=named, precision=DOUBLE), torch.randn(2, 5), target=0)
    assert torch.allclose(a.values, extra[0].double() * net.layer.weight[0].double().detach(), atol=1e-14)


class Uncopyable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.norm = nn.BatchNorm1d(3)
        self.lock = threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            return self.norm(self.layer(x)).tanh()


def test_uncopyable_model_runs_under_a_lock_and_says_so() -> None:
    model, x = Uncopyable().eval(), torch.randn(3, 5)
    value, grad = direct(model, x, 1)
    before = trace(model)
    field = ap.Field(model)
    a = ap.Gradient()(field, x, target=1)
    assert trace(model) == before
    assert torch.allclose(a.value, value, atol=1e-6)
    assert torch.allclose(a.values, grad, atol=1e-6)
    assert len(a.warnings) == 1
    assert "cannot be copied" in a.warnings[0]
    inner = ap.Gradient()(ap.Field(model, site=ap.At("layer")), x, target=1)
    assert trace(model) == before
    assert inner.values.shape == (3, 3)
    with torch.no_grad():
        model.layer.weight.mul_(2)
        model.norm.running_mean.add_(1)  # pyright: ignore[reportOptionalMemberAccess]
    assert torch.allclose(ap.Gradient()(field, x, target=1).value, direct(model, x, 1)[0], atol=1e-6)


def test_uncopyable_model_cannot_have_a_precision() -> None:
    with pytest.raises(ModelError, match="cannot be copied"):
        ap.Field(Uncopyable().eval(), precision=DOUBLE).bind(torch.randn(2, 5))


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(5, 3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.layer(x))
        if len(x) > 2:
            raise ZeroDivisionError("inside")
        return y


class FailingLocked(Failing):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


@pytest.mark.parametrize("kind", [Failing, FailingLocked])
@pytest.mark.parametrize("site", [ap.Input(), ap.At("layer"), ap.AtOp("linear")])
def test_no_trace_after_an_exception_inside_the_model(kind: type[nn.Module], site: ap.Site) -> None:
    model = kind().eval()
    x = torch.randn(3, 5)
    before, rng = trace(model), torch.get_rng_state()
    with pytest.raises(ModelError, match="inside"):
        ap.Gradient()(ap.Field(model, site=site), x, target=0)
    assert trace(model) == before
    assert torch.equal(rng, torch.get_rng_state())
    assert ap.Gradient()(ap.Field(model, site=site), torch.randn(2, 5), target=0).values.shape[0] == 2


@contextmanager
def many_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("kind", ["batch norm", "attention", "uncopyable"])
@pytest.mark.parametrize("shared", [True, False])
def test_two_threads_explain_one_model(kind: str, shared: bool) -> None:
    """One field used by both threads, or one each; inner sites make both hook the model at once."""
    model = (Uncopyable() if kind == "uncopyable" else KINDS[kind]()).eval()
    inner = {"batch norm": "0", "attention": "1", "uncopyable": "layer"}[kind]
    x = [torch.randn(4, 5) for _ in range(2)]
    fields = [ap.Field(model, site=ap.At(inner), batch_size=2) for _ in range(2)]
    fields = [fields[0]] * 2 if shared else fields
    method = ap.SmoothGrad(ap.IntegratedGradients(quadrature=ap.quadrature.Gauss(3)), samples=3)
    want = [method(fields[i], x[i], target=i, seed=i) for i in range(2)]
    before = trace(model)
    found: list[list[Tensor]] = [[], []]
    start = threading.Barrier(2)

    def work(i: int) -> None:
        start.wait()
        for _ in range(2):
            found[i].append(method(fields[i], x[i], target=i, seed=i).values)

    with many_switches():
        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert trace(model) == before
    for i in range(2):
        assert len(found[i]) == 2
        assert all(torch.equal(v, want[i].values) for v in found[i])


def test_wrappers_are_taken_off() -> None:
    net = nn.Linear(5, 3)
    assert unwrap(nn.DataParallel(net)) is net
    assert unwrap(torch.compile(net)) is net
    assert unwrap(net) is net


def test_train_mode_of_the_user_is_kept() -> None:
    net = nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3)).train()
    for p in net[0].parameters():
        p.requires_grad_(False)
    before = trace(net)
    ap.Gradient()(ap.Field(net), torch.randn(2, 5), target=0)
    assert trace(net) == before
    assert net.training
