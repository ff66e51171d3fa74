"""What is kept of a model from call to call: never longer than it is true, nor than the model lives."""

import array
import copy
import functools
import gc
import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import apportion as ap
from apportion.core import kept
from apportion.core.errors import ModelError, TargetError
from apportion.core.fast import _RAMP, digest, is_alike
from apportion.core.state import is_open, survey


class Net(nn.Module):
    """Convolution, batch-norm and plain attributes of several kinds."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fn: Any = F.softplus
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.act: Any = nn.ReLU()
        self.head = nn.Linear(4, 3)
        self.drop = nn.Dropout(0.5)
        self.factor, self.options = 1.0, {"powers": [1.0, 2.0]}
        self.register_buffer("table", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.conv(x))).mean((2, 3)) * self.table * self.factor
        return self.fn(self.drop(self.head(y))) ** self.options["powers"][1]


class Counted(nn.Module):
    """Counts the rows it sees, in a list its copies share."""

    def __init__(self, rows: list[int]) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)
        SEEN[id(rows)] = rows
        self.key = id(rows)

    def forward(self, x: Tensor) -> Tensor:
        SEEN[self.key].append(len(x))
        return self.layer(x).tanh()


SEEN: dict[int, list[int]] = {}
X = torch.rand(3, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def net() -> Net:
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model(torch.rand(8, 3, 6, 6))
    return model.eval()


def ask(model: Any, x: Tensor = X, **options: Any) -> ap.Attribution:
    return ap.explain(model, x, "gradient", **{"target": 1, **options})


def direct(model: nn.Module, x: Tensor = X) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    out = model(x)[:, 1]
    return out.detach(), torch.autograd.grad(out.sum(), x)[0]


def test_a_second_call_checks_nothing_and_gives_the_same() -> None:
    model = net()
    first, second = ask(model), ask(model)
    assert first.cost.checks > 0
    assert second.cost.checks == 0
    assert torch.equal(first.values, second.values)
    assert first.engine == second.engine
    other = ap.explain(model, X, "gradient_times_input", target=1)
    assert other.cost.checks == 0


def test_large_weights_do_not_have_others_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apportion.core.fast._RAMP", {})
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 64, 3), nn.BatchNorm2d(64), nn.AdaptiveAvgPool2d(1)]
    large, small = nn.Sequential(*layers, nn.Flatten()).eval(), net()
    assert [ask(m).cost.checks > 0 for m in (small, large, small, large)] == [True, True, False, False]


def test_checks_are_those_of_this_call() -> None:
    """By the count of the model itself."""
    rows: list[int] = []
    model, x = Counted(rows), torch.rand(2, 5)
    field = ap.Field(model, batch_size=2)
    for ask_again in (lambda: ap.Gradient()(field, x, target=0), lambda: ask(model, x, batch_size=2)):
        rows.clear()
        cost = ask_again().cost
        assert sum(rows) == cost.checks + cost.forward.sum() + cost.at_x.sum()
    assert cost.checks == 0


def _add(m: Net) -> None:
    m.conv.weight.add_(0.5)


def _data(m: Net) -> None:
    m.conv.weight.data.mul_(1.5)


def _load(m: Net) -> None:
    m.load_state_dict({k: v + 1 if v.is_floating_point() else v for k, v in m.state_dict().items()})


def _optimizer(m: Net) -> None:
    with torch.enable_grad():
        m(X).sum().backward()
    torch.optim.SGD(m.parameters(), 1.0).step()


def _buffer(m: Net) -> None:
    m.table.data[0] = 3.0


def _statistics(m: Net) -> None:
    m.norm.get_buffer("running_mean").data.add_(1)


def _factor(m: Net) -> None:
    m.factor = 3.0


def _function(m: Net) -> None:
    m.fn = F.relu


def _option(m: Net) -> None:
    m.options["powers"][1] = 3.0


def _module(m: Net) -> None:
    m.act = nn.Tanh()


def _parameter(m: Net) -> None:
    m.head.weight = nn.Parameter(torch.ones(3, 4))


def _set_data(m: Net) -> None:
    m.head.weight.data = torch.ones(3, 4)


def _hook(m: Net) -> None:
    m.conv.register_forward_hook(_thrice)


def _thrice(_module: nn.Module, _args: Any, out: Tensor) -> Tensor:
    return out * 3


def _parametrized(m: Net) -> None:
    parametrize.register_parametrization(m.head, "weight", nn.Softplus())


def _eps(m: Net) -> None:
    m.norm.eps = 1.0


CHANGES = [_add, _data, _load, _optimizer, _buffer, _statistics, _factor, _function, _option, _module, _parameter]
CHANGES += [_set_data, _hook, _parametrized, _eps]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_seen(change: Callable[[Net], None]) -> None:
    model = net()
    before = [ask(model) for _ in range(2)]
    assert before[1].cost.checks == 0
    with torch.no_grad():
        change(model)
    after, (value, grad) = ask(model), direct(model)
    assert torch.allclose(after.value, value, atol=1e-6)
    assert torch.allclose(after.values, grad, atol=1e-6)
    assert not torch.allclose(after.value, before[0].value, atol=1e-4)
    assert after.cost.checks > 0 or change is _buffer  # which is of no batch-norm, and whose version stays


def test_train_mode_is_refused_after_an_answer() -> None:
    model = net()
    ask(model)
    with pytest.raises(ModelError, match="train mode"):
        ask(model.train())
    assert ask(model.eval()).cost.checks == 0


class Switched(nn.Module):
    """Mixes its rows, draws random numbers or counts its calls, once told to by a weight."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.switch = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        mixed = y + self.switch[0] * y.mean(0, keepdim=True)
        return mixed + self.switch[1] * torch.randn(3)


@pytest.mark.parametrize(("at", "message"), [(0, "depends on the other examples"), (1, "draws random numbers")])
def test_a_model_is_checked_again_once_its_weights_were_written_to(at: int, message: str) -> None:
    model, x = Switched().eval(), torch.rand(2, 5)
    assert [ask(model, x).cost.checks > 0 for _ in range(2)] == [True, False]
    with torch.no_grad():
        model.switch[at] = 1
    with pytest.raises(ModelError, match=message):
        ask(model, x)


def test_the_forward_of_the_class_is_seen_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Switched().eval(), torch.rand(2, 5)
    ask(model, x)
    monkeypatch.setattr(Switched, "forward", lambda self, x: self.layer(x) - self.layer(x).mean(0))
    with pytest.raises(ModelError, match="depends on the other examples"):
        ask(model, x)


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 1}, {"fast": False}, {"site": ap.At("conv")}, {"normalize": ap.Normalize((0.5,), (0.5,))}],
)
def test_another_way_of_asking_is_checked_for_itself(options: dict[str, Any]) -> None:
    model = net()
    ask(model)
    alone = ask(copy.deepcopy(model), **options)
    for checks in (alone.cost.checks, 0):
        again = ask(model, **options)
        assert again.cost.checks == checks
        assert torch.equal(again.values, alone.values)
        assert again.engine == alone.engine
    assert ask(model).cost.checks == 0


@pytest.mark.parametrize("options", [{"compile": True}, {"precision": torch.float64}])
def test_what_is_large_or_of_one_field_is_not_kept(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apportion.core.compiled.BACKEND", "eager")
    model = net()
    assert all(ask(model, **options).cost.checks > 0 for _ in range(2))
    assert id(model) not in kept._KEPT


def test_another_shape_is_checked_for_itself() -> None:
    model = net()
    ask(model)
    x = torch.rand(3, 3, 8, 8)
    assert [ask(model, x).cost.checks > 0 for _ in range(2)] == [True, False]


def test_further_arguments_are_checked_each_time() -> None:
    model, x, extra = nn.Bilinear(5, 4, 3).eval(), torch.rand(2, 5), torch.rand(2, 4)
    assert all(ask(model, x, extra=extra).cost.checks > 0 for _ in range(2))


def test_the_layers_of_a_model_are_listed_once() -> None:
    """Of three passes to see to the last layer, one is left: whether the score depends on it."""
    model = net()
    first, second = (ap.explain(model, X, "grad_cam", target=1) for _ in range(2))
    assert first.cost.checks > second.cost.checks == 1
    assert torch.equal(first.values, second.values)
    field = ap.Field(model)
    assert field.sites(X) == field.bind(X).sites()
    before = len(field.bind(X).sites())
    model.act = nn.Sequential(nn.ReLU(), nn.Identity())
    assert len(field.bind(X).sites()) == before + 2


def test_rows_a_pass_fit_in_every_field() -> None:
    model = net()
    chunks = []
    for _ in range(2):
        field = ap.Field(model)
        field.bind(X, target=0)
        chunks.append(field.chunk)
    assert chunks[0] == chunks[1] > 1


class _Held(nn.Module):
    """Holds something in a plain attribute."""

    def __init__(self, held: Any) -> None:
        super().__init__()
        self.layer, self.held = nn.Linear(5, 3), held

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).tanh()


def _function_with_state() -> Any:
    state = [1.0]
    return lambda x: x * state[0]


class _Callable:
    def __call__(self, x: Tensor) -> Tensor:
        return x


class _Record:
    def __init__(self) -> None:
        self.a, self.b = 1, {"c": torch.float32}


class _Slots:
    __slots__ = ("a",)


OPEN = [
    None,
    1,
    "a",
    F.relu,
    torch.relu,
    nn.Linear,
    [1, (2, {"a": 3})],
    _Record(),
    nn.Tanh(),
    functools.partial(F.elu, alpha=2),
]
CLOSED = [_function_with_state(), _Callable(), _Slots(), torch.ones(2), torch.Generator(), [[[[[[1]]]]]], iter([])]


def test_only_models_that_are_seen_through_are_kept() -> None:
    x = torch.rand(2, 5)
    for held in OPEN:
        model = _Held(held).eval()
        assert is_open(model), held
        assert [ask(model, x).cost.checks > 0 for _ in range(2)] == [True, False], held
    for held in CLOSED:
        assert not is_open(_Held(held)), held
    assert [ask(_Held(torch.ones(2)), x).cost.checks > 0 for _ in range(2)] == [True, True]


def test_a_model_with_a_closure_is_not_kept() -> None:
    model: Any = _Held(None).eval()
    x = torch.rand(2, 5)
    model.register_forward_hook(lambda module, args, out: out + model.layer.bias)
    assert not is_open(model)
    assert all(ask(model, x).cost.checks > 0 for _ in range(2))


@pytest.mark.parametrize("make", [net, lambda: _Held(_Record()), lambda: _Held(_function_with_state())])
def test_a_model_is_freed_with_all_that_was_kept_of_it(make: Callable[[], nn.Module]) -> None:
    model: Any = make().eval()
    x = X if isinstance(model, Net) else torch.rand(2, 5)
    ask(model, x)
    gone, key = weakref.ref(model), id(model)
    twins = [weakref.ref(h.twin.module) for h in (kept._KEPT[key][1].held.values() if key in kept._KEPT else ())]
    del model
    gc.collect()
    assert gone() is None
    assert key not in kept._KEPT
    assert all(twin() is None for twin in twins)


def test_a_model_that_holds_itself_in_a_hook_is_freed() -> None:
    model: Any = _Held(None).eval()
    model.register_forward_hook(lambda module, args, out, own=model: out)
    ask(model, torch.rand(2, 5))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_each_thread_has_a_twin_of_its_own() -> None:
    model, found = net(), []

    def work() -> None:
        for _ in range(2):
            found.append((ask(model).cost.checks > 0, threading.get_ident(), ask(model).values))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sum(checked for checked, _, _ in found) == 2
    assert all(torch.equal(values, found[0][2]) for _, _, values in found)


def test_a_survey_sees_shared_and_missing_parts() -> None:
    """Tied weights, a module used twice, a child that is None, weights that are not there yet."""
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight  # pyright: ignore[reportArgumentType]
    one = nn.ReLU()
    model = nn.ModuleDict(
        {"a": tied, "b": one, "c": one, "lazy": nn.LazyLinear(2), "meta": nn.Linear(2, 2, device="meta")}
    )
    model.register_module("none", None)
    before = survey(model)
    assert survey(model) == before
    model["c"] = nn.ReLU()
    assert survey(model).mark != before.mark


def test_buffers_that_are_alike_are_not_written_to() -> None:
    """Folded weights stay valid from bind to bind."""
    field = ap.Field(net())
    field.bind(X, target=0)
    plan = field.twin().plan
    assert plan is not None
    (fold,) = plan.folds.values()
    made = fold.make()
    field.bind(X, target=0)
    assert fold.make() is made
    field.model.norm.running_var.data.add_(1)
    field.bind(X, target=0)
    (fold,) = field.twin().plan.folds.values()  # pyright: ignore[reportOptionalMemberAccess]
    assert fold.make() is not made


def _edits() -> dict[str, Callable[[Tensor], Any]]:
    def at(i: int, to: float) -> Callable[[Tensor], Any]:
        return lambda t: t.view(-1)[i].fill_(to)

    return {
        "first": at(0, 5),
        "second": at(1, 5),
        "last": at(-1, 5),
        "sign": lambda t: t.view(-1)[0].neg_(),
        "swap": lambda t: t.view(-1)[:2].copy_(t.view(-1)[:2].flip(0).clone()),
        "rows": lambda t: t.copy_(t.flip(0).clone()),
        "all signs": lambda t: t.neg_(),
        "little": lambda t: t.view(-1)[0].mul_(1 + 1e-4),
    }


@pytest.mark.parametrize("edit", _edits())
@pytest.mark.parametrize("name", ["0.weight", "0.bias", "1.weight", "1.bias"])
def test_each_element_of_folded_weights_is_looked_at(name: str, edit: str) -> None:
    """Written to past the versions, so that the numbers alone tell."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model: Any = nn.Sequential(*layers, nn.Linear(4, 3))
    for t in (model[1].weight, model[1].bias):
        t.data.uniform_(0.5, 1)
    model = model.eval()
    field = ap.Field(model)
    for t in (ap.Gradient()(field, X, target=1), ask(model)):
        assert "1 batch-norm(s) folded" in t.engine["passes"]
    _edits()[edit](model.get_parameter(name).data)
    value, grad = direct(model)
    for found in (ap.Gradient()(field, X, target=1), ask(model)):
        assert torch.allclose(found.value, value, atol=1e-6, rtol=1e-6)
        assert torch.allclose(found.values, grad, atol=1e-6)


@pytest.mark.parametrize("size", [(1,), (4,), (1, 1), (4, 3, 3, 3), (2, 5000), (1, 9000)])
def test_a_digest_tells_every_single_element(size: tuple[int, ...]) -> None:
    gen = torch.Generator().manual_seed(0)
    held = torch.randn(size, generator=gen)
    held.view(-1)[0] = 1e6 if held.numel() == 4 else 1.0  # beside which a sum would lose the others
    before = digest([held])
    assert is_alike(digest([held]), before)
    count = held.numel()
    for i in {0, 1 % count, count // 2, count - 1}:
        for change in (lambda v: -v, lambda v: v + 0.1, lambda v: 0 * v):
            old = held.view(-1)[i].clone()
            held.view(-1)[i] = change(old)
            assert not is_alike(digest([held]), before), (i, old)
            held.view(-1)[i] = old
    assert is_alike(digest([held]), before)
    empty = torch.full((3,), torch.nan)
    assert is_alike(digest([empty]), digest([empty]))
    assert all((ramp.abs() >= 0.5).all() for ramp in _RAMP.values())


class Square(nn.Module):
    """Square weights, a plain attribute of any kind and a function that reads it."""

    def __init__(self, held: Any, read: Callable[[Any, Tensor], Tensor] = lambda held, x: x) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.held = nn.Linear(5, 5), held
        READ[id(self)] = read
        self.key = id(self)

    def forward(self, x: Tensor) -> Tensor:
        return READ[self.key](self.held, self.layer(x))


READ: dict[int, Callable[[Any, Tensor], Tensor]] = {}
V = torch.rand(2, 5, generator=torch.Generator().manual_seed(1))


def agrees(field: ap.Field) -> None:
    value, grad = direct(field.model, V)
    for found in (ap.Gradient()(field, V, target=1), ask(field.model, V)):
        assert torch.allclose(found.value, value, atol=1e-6)
        assert torch.allclose(found.values, grad, atol=1e-6)


def _transposed(m: Square) -> None:
    m.layer.weight.data = m.layer.weight.data.T


def _transposed_in_place(m: Square) -> None:
    with torch.no_grad():
        m.layer.weight.t_()


@pytest.mark.parametrize("change", [_transposed, _transposed_in_place])
def test_another_view_of_the_same_weights_is_seen(change: Callable[[Square], None]) -> None:
    field = ap.Field(Square(None).eval())
    agrees(field)
    change(field.model)
    agrees(field)


def test_turned_kernels_and_fewer_outputs_are_seen() -> None:
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 4)).eval()
    field = ap.Field(model)
    ap.Gradient()(field, X, target=3)
    model[0].weight.data = model[0].weight.data.transpose(2, 3)
    assert torch.allclose(ap.Gradient()(field, X, target=1).values, direct(model)[1], atol=1e-6)
    assert torch.allclose(ask(model).values, direct(model)[1], atol=1e-6)
    model[3].weight.data, model[3].bias.data = model[3].weight.data[:2], model[3].bias.data[:2]
    for again in (lambda: ap.Gradient()(field, X, target=3), lambda: ask(model, target=3)):
        with pytest.raises(TargetError):
            again()


def _leak(x: Tensor, k: float) -> Tensor:
    return F.leaky_relu(x, k)


def test_no_other_object_is_taken_for_one_that_is_gone() -> None:
    """By its id, which is used again."""
    model = Square(None, lambda held, x: held(x)).eval()
    field = ap.Field(model)
    for i in range(30):
        model.held = functools.partial(_leak, k=i % 7 / 7)
        if i % 2:
            agrees(field)
    for i in range(10):
        model.held = functools.partial(_leak, k=complex(i % 3).real)
        agrees(field)


class _Twice:
    times = 2.0


class _Thrice:
    times = 3.0


def test_the_class_of_an_attribute_is_seen() -> None:
    model: Any = Square(_Twice(), lambda held, x: x * held.times).eval()
    field = ap.Field(model)
    agrees(field)
    model.held.__class__ = _Thrice
    agrees(field)
    for kind in (_Twice, _Thrice, _Twice):
        del model.held
        model.held = kind()
        agrees(field)
    model = Square([nn.ReLU()], lambda held, x: held[0](x)).eval()
    field = ap.Field(model)
    agrees(field)
    model.held[0].__class__ = nn.Tanh
    agrees(field)
    model = Square(1, lambda held, x: x * (2 if held is True else 3)).eval()
    field = ap.Field(model)
    agrees(field)
    model.held = True
    agrees(field)


class _Scale:
    def __init__(self) -> None:
        self.k = 2.0

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.k

    def hook(self, _module: nn.Module, _args: Any, out: Tensor) -> Tensor:
        return out * self.k


@dataclass
class _Slotted:
    __slots__ = ("k",)
    k: float


def _set_item(held: Any) -> None:
    held[0] = 7.0


def _set_k(held: Any) -> None:
    held.k = 7.0


def _set_ten(held: Any) -> None:
    held.k = 10.0


class _Loose(tuple[Any, ...]):
    _fields = ()


UNSEEN: dict[str, tuple[Callable[[], Any], Callable[[Any, Tensor], Tensor], Callable[[Any], Any]]] = {
    "callable object": (_Scale, lambda held, x: held(x), _set_k),
    "slots": (lambda: _Slotted(2.0), lambda held, x: x * held.k, _set_k),
    "bound method": (lambda: _Scale().__call__, lambda held, x: held(x), lambda held: _set_k(held.__self__)),
    "method of a module": (
        lambda: nn.Softplus().forward,
        lambda held, x: held(x),
        lambda held: setattr(held.__self__, "beta", 7.0),
    ),
    "module in a partial": (
        lambda: functools.partial(torch.Tensor.mul, other=nn.Linear(1, 1).weight),
        lambda held, x: held(x),
        lambda held: held.keywords["other"].data.fill_(7),
    ),
    "list in a partial": (
        lambda: functools.partial(_by_first, by=[2.0]),
        lambda held, x: held(x),
        lambda held: _set_item(held.keywords["by"]),
    ),
    "array in a partial": (
        lambda: functools.partial(_by_first, by=np.array([2.0])),
        lambda held, x: held(x),
        lambda held: _set_item(held.keywords["by"]),
    ),
    "deque": (lambda: deque([2.0]), lambda held, x: x * held[0], _set_item),
    "named tuple": (lambda: _Options(powers=[2.0]), lambda held, x: x * held.powers[0], lambda h: _set_item(h.powers)),
    "tuple with more": (lambda: _set_k(held := _Loose()) or held, lambda held, x: x * (held.k - 5), _set_ten),
    "array": (lambda: array.array("d", [2.0]), lambda held, x: x * held[0], _set_item),
    "deep": (
        lambda: [[[[[[2.0]]]]]],
        lambda held, x: x * held[0][0][0][0][0][0],
        lambda h: _set_item(h[0][0][0][0][0]),
    ),
    "numpy at depth": (
        lambda: [[[[np.ones(1)]]]],
        lambda held, x: x * held[0][0][0][0][0],
        lambda h: _set_item(h[0][0][0][0]),
    ),
    "weight at depth": (
        lambda: [[[[nn.Parameter(torch.ones(1))]]]],
        lambda held, x: x * held[0][0][0][0],
        lambda h: h[0][0][0][0].data.fill_(7),
    ),
    "tensor": (lambda: torch.ones(5), lambda held, x: x * held, lambda held: held.data.fill_(7)),
    "data": (
        lambda: torch.ones(5),
        lambda held, x: x * held,
        lambda held: setattr(held, "data", torch.full((5,), 7.0)),
    ),
    "hidden module": (
        lambda: [nn.Softplus()],
        lambda held, x: held[0](x),
        lambda held: setattr(held[0], "beta", 7.0),
    ),
}


def _by_first(x: Tensor, by: Any) -> Tensor:
    return x * float(by[0])


@pytest.mark.parametrize("kind", UNSEEN)
def test_what_cannot_be_seen_into_is_taken_anew_in_each_call(kind: str) -> None:
    make, read, change = UNSEEN[kind]
    model: Any = Square(make(), read).eval()
    field = ap.Field(model)
    agrees(field)
    before = direct(model, V)[0]
    change(model.held)
    assert not torch.allclose(before, direct(model, V)[0])
    agrees(field)


def test_a_hook_with_a_state_is_taken_anew() -> None:
    model, scale = Square(None).eval(), _Scale()
    model.layer.register_forward_hook(scale.hook)
    field = ap.Field(model)
    agrees(field)
    scale.k = 7.0
    agrees(field)


@dataclass
class _Config:
    width: int = 5
    names: tuple[str, ...] = ("a", "b")
    dtype: torch.dtype = torch.float32
    layers: dict[str, Any] = field(
        default_factory=lambda: {"norm": functools.partial(nn.LayerNorm, eps=1e-6), "k": [1.5]}
    )


class _Options(NamedTuple):
    width: int = 5
    powers: Any = None


def test_ordinary_models_stay_kept() -> None:
    """In later fields and in the same one."""
    ordinary = [
        (3, "a", 1.5, (1, 2), ("a", 2.0), torch.nan),
        _Config(),
        [_Options(), _Options(3, [1.0])],
        functools.partial(F.leaky_relu, negative_slope=0.2),
        functools.partial(nn.LayerNorm, eps=1e-6),
        {"activation": F.gelu, "act": nn.GELU, "sizes": torch.Size([1, 2]), 3: np.float64(2)},
        nn.Identity(),
        [nn.Identity(), nn.ReLU()],
        np.ones(3),
        1j,
        torch.device("cpu"),
    ]
    for held in ordinary:
        model, x = nn.Sequential(nn.Identity(), _Held(held), nn.GELU()).eval(), torch.rand(2, 5)
        assert [ask(model, x).cost.checks > 0 for _ in range(3)] == [True, False, False], held
        field = ap.Field(model)
        field.bind(x, target=0)
        twin = field.twin()
        field.bind(x, target=0)
        assert field.twin() is twin


def test_an_ordinary_transformer_stays_kept() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
    )
    model, x = transformers.ViTForImageClassification(config).eval(), torch.rand(2, 3, 8, 8)
    assert is_open(model)
    assert [ask(model, x, score=_logits, target=None).cost.checks > 0 for _ in range(2)] == [True, False]


def _logits(outputs: Any) -> Tensor:
    return outputs.logits[:, 0]


def test_a_field_checks_anew_once_weights_were_written_to() -> None:
    model, x = Switched().eval(), torch.rand(2, 5)
    field = ap.Field(model)
    ap.Gradient()(field, x, target=1)
    with torch.no_grad():
        model.switch[0] = 1
    with pytest.raises(ModelError, match="depends on the other examples"):
        ap.Gradient()(field, x, target=1)
