"""Fast passes: folded batch-norms and channels last change rounding alone, and are off where they could not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apportion as ap
from apportion.core import frozen
from apportion.core.fast import Plan

X = torch.rand(3, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Convolved(nn.Module):
    """Two blocks of convolution, batch-norm and ReLU; `use` may do something else with the first convolution."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor] = lambda conv, norm: norm, flat: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.BatchNorm2d(8, affine=False)
        self.last = nn.Linear(8, 4)
        self.use, self.flat = use, flat
        for norm in (self.norm1, self.norm2):
            norm.get_buffer("running_mean").normal_()
            norm.get_buffer("running_var").uniform_(0.5, 2)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv1(x)
        y = F.relu(self.use(conv, self.norm1(conv)), inplace=True)
        y = F.relu(self.norm2(self.conv2(y)))
        return self.last(y.mean((2, 3)))


def _plan(field: ap.Field) -> Plan:
    plan = field.twin().plan
    assert plan is not None
    return plan


def _asked(model: nn.Module, x: Tensor = X, **options: object) -> tuple[ap.Field, Tensor, Tensor]:
    field = ap.Field(model, **options)  # pyright: ignore[reportArgumentType]
    q = field.bind(x, target=1)
    value, grad = q.value_and_grad(x, torch.arange(len(x)))
    assert torch.allclose(q.value(x, torch.arange(len(x))), value, rtol=1e-6, atol=1e-6)
    return field, value, grad


def _plain(model: nn.Module, x: Tensor = X) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    value = model(leaf)[:, 1]
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


def test_folds_and_stays_as_near_to_double_precision() -> None:
    model = Convolved()
    field, value, grad = _asked(model)
    assert len(_plan(field).folds) == 2
    assert _plan(field).channels_last
    assert str(_plan(field)) == "2 batch-norm(s) folded, channels last"
    assert grad.is_contiguous()
    exact, exact_grad = _plain(copy.deepcopy(model).double(), X.double())
    eager, eager_grad = _plain(model)
    assert not torch.equal(eager_grad, grad)  # else this tests nothing
    for got, own, right in ((value, eager, exact), (grad, eager_grad, exact_grad)):
        assert (got - right).norm() <= 1.2 * (own - right).norm() + 1e-7 * right.norm()


def test_double_precision_runs_as_the_model_says() -> None:
    model = Convolved().double()
    field, value, grad = _asked(model, X.double())
    plain, plain_grad = _plain(model, X.double())
    assert not _plan(field).is_on
    assert torch.equal(value, plain)
    assert torch.allclose(grad, plain_grad, rtol=1e-13, atol=1e-15)


def test_one_switch() -> None:
    model = Convolved()
    field, value, _ = _asked(model, fast=False)
    assert torch.equal(value, _plain(model)[0])
    assert str(_plan(field)) == "as the model says; fast=False"


USES = {
    "sum": lambda conv, norm: conv + norm,
    "product of both": lambda conv, norm: norm * conv.sigmoid(),
    "list": lambda conv, norm: torch.stack([norm, conv]).sum(0),
    "statistic": lambda conv, norm: norm - conv.mean(),
}


@pytest.mark.parametrize("use", USES)
def test_a_convolution_that_is_used_otherwise_is_not_folded(use: str) -> None:
    model = Convolved(USES[use])
    field, value, grad = _asked(model, batch_size=1)
    assert len(_plan(field).folds) == 1
    each = [_plain(model, x) for x in X.split(1)]
    plain, plain_grad = torch.cat([v for v, _ in each]), torch.cat([g for _, g in each])
    assert torch.allclose(value, plain, rtol=1e-5, atol=1e-6)
    assert torch.allclose(grad, plain_grad, rtol=1e-4, atol=1e-6)


class Fickle(Convolved):
    """Uses its first convolution twice, but only for rows of another kind than the first."""

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv1(x)
        y = self.norm1(conv)
        y = F.relu(y + conv if bool((x > 1).any()) else y)
        return self.last(y.mean((2, 3)))


def test_a_use_the_first_pass_did_not_show_ends_it() -> None:
    model, x = Fickle(), X.clone()
    field = ap.Field(model, batch_size=1)
    q = field.bind(x, target=1)
    assert _plan(field).is_on
    value, grad = q.value_and_grad(x + 1, torch.arange(3))
    plain, plain_grad = _plain(model, x + 1)
    assert torch.allclose(value, plain, rtol=1e-5)
    assert torch.allclose(grad, plain_grad, rtol=1e-4, atol=1e-6)
    assert _plan(field).why_not == "not folded: add reads a convolution before its batch-norm does"
    assert "reads a convolution" in q.attribution(ap.Gradient(), grad).engine["passes"]


class Hiding(Fickle):
    """Swallows what goes wrong inside."""

    def forward(self, x: Tensor) -> Tensor:
        try:
            return super().forward(x)
        except Exception:
            return x.new_zeros(len(x), 4)


def test_a_model_that_hides_the_failure_is_found_out() -> None:
    model = Hiding()
    q = ap.Field(model, batch_size=1).bind(X, target=1)
    assert torch.allclose(q.value(X + 1, torch.arange(3)), _plain(model, X + 1)[0], rtol=1e-5)


class Viewing(Convolved):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm1(self.conv1(x)).view(len(x), -1)[:, :8]) + super().forward(x)


def test_a_model_that_needs_its_layout_keeps_it() -> None:
    field, value, grad = _asked(Viewing())
    plain, plain_grad = _plain(Viewing())
    assert torch.allclose(value, plain, rtol=1e-5)
    assert torch.allclose(grad, plain_grad, rtol=1e-4, atol=1e-6)
    assert _plan(field).why_not.startswith("not channels last: RuntimeError")
    assert len(_plan(field).folds) == 3


@pytest.mark.parametrize("write", ["in place", "data", "buffer", "optimizer"])
def test_other_weights_are_folded_anew(write: str) -> None:
    model = Convolved()
    field, before, _ = _asked(model)
    if write == "in place":
        with torch.no_grad():
            model.conv1.weight.mul_(-2)
    elif write == "data":
        model.conv1.weight.data.mul_(-2)
    elif write == "buffer":
        model.norm1.get_buffer("running_mean").add_(1)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        model(X).square().sum().backward()
        optimizer.step()
    value, _ = field.bind(X, target=1).value_and_grad(X, torch.arange(3))
    assert torch.allclose(value, _plain(model)[0], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(value, before, rtol=1e-3)
    assert len(_plan(field).folds) == 2


def test_weights_written_between_two_passes_of_one_question() -> None:
    model = Convolved()
    q = ap.Field(model).bind(X, target=1)
    q.value(X, torch.arange(3))
    with torch.no_grad():
        model.conv1.weight.mul_(3)
    assert torch.allclose(q.value(X, torch.arange(3)), _plain(model)[0], rtol=1e-5, atol=1e-6)


def test_sites_rules_and_second_derivatives_see_the_model_itself() -> None:
    model = Convolved()
    field = ap.Field(model)
    q = field.bind(X, target=1)
    site = ap.At("conv1")
    _, taps = q.tap(X, torch.arange(3), [site])
    assert torch.equal(taps[site].value, model.conv1(X))
    seen: list[Tensor] = []

    def watch(forward: Callable[..., Tensor], part: Tensor, own: Tensor) -> None:
        seen.append(forward(part, own))

    q.observe(watch, X, torch.arange(3), 1)
    assert torch.equal(seen[0].detach(), _plain(model)[0])
    asked = ap.Field(model).bind(X.clone().requires_grad_(), target=1, differentiable=True)
    assert torch.equal(asked.fx.detach(), _plain(model)[0])


def test_reused_modules_and_own_hooks() -> None:
    class Twice(Convolved):
        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.norm1(self.conv1(x)))
            y = F.relu(self.norm2(self.conv2(y)))
            return self.last(F.relu(self.norm1(self.conv2(y))).mean((2, 3)))

    model = Twice()
    field, value, grad = _asked(model)
    plain, plain_grad = _plain(model)
    assert len(_plan(field).folds) == 3
    assert torch.allclose(value, plain, rtol=1e-5)
    assert torch.allclose(grad, plain_grad, rtol=1e-4, atol=1e-6)
    seen: list[Tensor] = []
    model.conv1.register_forward_hook(lambda m, a, out: seen.append(out.detach().clone()))
    hooked, _, _ = _asked(model)
    assert _plan(hooked).why_not == "hooks of your own"
    assert torch.equal(seen[-1], nn.functional.conv2d(X, model.conv1.weight))


def test_the_record_says_how_it_ran() -> None:
    a = ap.Gradient()(ap.Field(Convolved()), X, target=0)
    assert a.engine["passes"] == "2 batch-norm(s) folded, channels last"
    b = ap.Gradient()(ap.Field(Convolved(), fast=False), X, target=0)
    assert b.engine["passes"] == "as the model says; fast=False"


FRONTS: dict[str, tuple[list[nn.Module], list[bool]]] = {
    "two convolutions": ([nn.Conv2d(3, 8, 3), nn.Conv2d(8, 64, 3), nn.ReLU(inplace=True)], [False, False]),
    "a pool": ([nn.Conv2d(3, 64, 3), nn.ReLU(), nn.MaxPool2d(2)], [False]),
    "neither": ([nn.Conv2d(3, 64, 3), nn.ReLU()], [True]),
    "a padded input": ([nn.Conv2d(3, 64, 3), nn.MaxPool2d(2), nn.ZeroPad2d(1)], [False]),
}


@pytest.mark.parametrize("front", FRONTS)
def test_long_sums_are_not_channels_last(front: str) -> None:
    torch.manual_seed(0)
    layers, last = FRONTS[front]
    layers = [*copy.deepcopy(layers), nn.Conv2d(64, 64, 3), nn.Conv2d(64, 8, 1)]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    field = ap.Field(net)
    q = field.bind(X, target=1)
    formats: list[list[bool]] = []

    class Seen(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            out = super().forward(input)
            formats[-1].append(out.is_contiguous())
            return out

    module = field.twin().module
    assert module is not None
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            layer.__class__ = Seen
    formats.append([])
    value, grad = q.value_and_grad(X, torch.arange(3))
    assert formats == [[*last, True, True]]
    plain, plain_grad = _plain(net)
    assert torch.allclose(value, plain, rtol=1e-5, atol=1e-6)
    assert torch.allclose(grad, plain_grad, rtol=1e-4, atol=1e-7)


def test_deep_networks_stay_as_near_to_double_precision() -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i, o in ((3, 32), (32, 128), (128, 256), (256, 256), (256, 256)):
        norm = nn.BatchNorm2d(o)
        norm.get_buffer("running_mean").normal_(0, 0.1)
        layers += [nn.Conv2d(i, o, 3, padding=1, bias=False), norm, nn.ReLU()]
        nn.init.kaiming_normal_(layers[-3].weight, nonlinearity="relu")  # pyright: ignore[reportArgumentType]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    x = torch.rand(8, 3, 14, 14)
    field = ap.Field(net)
    q = field.bind(x, target=1)
    assert str(_plan(field)) == "5 batch-norm(s) folded, channels last"
    with torch.no_grad():
        exact, eager, fast = copy.deepcopy(net).double()(x.double()), net(x), q.outputs(x, torch.arange(8))
    assert (fast - exact).norm() <= 1.2 * (eager - exact).norm()


def test_another_thread_runs_as_the_model_says_until_it_has_compared() -> None:
    from concurrent.futures import ThreadPoolExecutor

    model = Convolved()
    field = ap.Field(model)
    q = field.bind(X, target=1)
    with ThreadPoolExecutor(1) as pool:
        value = pool.submit(lambda: [q.value(X, torch.arange(3)) for _ in range(2)][1]).result()
        assert torch.equal(value, _plain(model)[0])
        assert pool.submit(lambda: ap.Gradient()(field, X, target=1).engine["passes"]).result().startswith("2 batch")


class Padded(Convolved):
    """Pads by an operation of its own; `use` gets the picture before it, the padded one, and the convolution."""

    def __init__(
        self, edges: tuple[int, ...], conv: nn.Conv2d, use: Callable[..., Tensor] = lambda x, pad, conv: conv(pad)
    ) -> None:
        super().__init__()
        self.edges, self.padded, self.use_pad = edges, conv.eval(), use

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x))) + 1
        y = self.use_pad(y, F.pad(y, self.edges), self.padded)
        return self.last(F.relu(y).mean((2, 3)))


def _conv(size: int, **options: int) -> nn.Conv2d:
    torch.manual_seed(1)
    return nn.Conv2d(8, 8, size, **options)  # pyright: ignore[reportArgumentType]


PADS: dict[str, tuple[tuple[int, ...], nn.Conv2d]] = {
    "both sides": ((1, 1, 1, 1), _conv(3)),
    "both sides, and by itself": ((1, 1, 2, 2), _conv(3, padding=1, stride=2)),
    "one side": ((0, 1, 0, 1), _conv(3, stride=2, groups=8)),
    "more left than right": ((2, 1, 1, 2), _conv(5, stride=2, groups=8)),
    "far apart": ((0, 3, 2, 0), _conv(3, groups=8)),
    "one side, of sums": ((0, 1, 0, 1), _conv(3, stride=2)),
    "one side, dilated": ((0, 1, 0, 1), _conv(3, groups=8, dilation=2)),
    "both sides, dilated": ((1, 1, 1, 1), _conv(3, dilation=2)),
    "same": ((1, 1, 1, 1), _conv(3, padding="same")),  # pyright: ignore[reportArgumentType]
    "less": ((-1, -1, 1, 1), _conv(3)),
}


@pytest.mark.parametrize("case", PADS)
def test_convolutions_pad_themselves(case: str) -> None:
    model = Padded(*PADS[case])
    field, value, grad = _asked(model)
    assert len(_plan(field).pads) == (case != "less")
    assert not _plan(field).why_not
    plain, plain_grad = _plain(model)
    assert torch.allclose(value, plain, rtol=1e-5, atol=1e-6)
    assert torch.allclose(grad, plain_grad, rtol=1e-4, atol=1e-7)


def test_double_precision_pads_as_the_model_says() -> None:
    model = Padded((1, 1, 1, 1), _conv(3)).double()
    field, value, _ = _asked(model, X.double())
    assert not _plan(field).is_on
    assert torch.equal(value, _plain(model, X.double())[0])


def _written(x: Tensor, pad: Tensor, conv: nn.Conv2d) -> Tensor:
    x.mul_(2)
    return conv(pad) + x.mean()


PADDED_USES = {
    "sum": lambda x, pad, conv: conv(pad) + pad.mean(),
    "sum before": lambda x, pad, conv: pad.mean() + conv(pad),
    "pool": lambda x, pad, conv: F.max_pool2d(pad, 2),
    "two": lambda x, pad, conv: conv(pad) * conv(pad),
}


@pytest.mark.parametrize("use", PADDED_USES)
def test_padded_pictures_that_are_used_otherwise_are_made(use: str) -> None:
    model = Padded((1, 1, 1, 1), _conv(3), PADDED_USES[use])
    field, value, grad = _asked(model, batch_size=1)
    assert not _plan(field).pads
    each = [_plain(model, x) for x in X.split(1)]
    assert torch.allclose(value, torch.cat([v for v, _ in each]), rtol=1e-5, atol=1e-6)
    assert torch.allclose(grad, torch.cat([g for _, g in each]), rtol=1e-4, atol=1e-6)


def test_a_picture_that_is_written_to_after_it_was_padded() -> None:
    model = Padded((1, 1, 1, 1), _conv(3), _written)
    field, value, _ = _asked(model, batch_size=1)
    assert _plan(field).why_not == "not folded: a picture was written to after it was padded"
    assert torch.allclose(value, torch.cat([_plain(model, x)[0] for x in X.split(1)]), rtol=1e-5, atol=1e-6)


STEMS = [
    (7, 2, 3, 33),
    (7, 2, 3, 34),
    (16, 16, 0, 50),
    (4, 4, 0, 32),
    (5, 3, 4, 31),
    (3, (2, 1), (1, 0), 20),
    (8, 3, 1, 29),
]


@pytest.mark.parametrize(("size", "stride", "padding", "side"), STEMS)
def test_the_gradient_of_few_channels_by_phase(size: int, stride: object, padding: object, side: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, size, stride, padding).double().requires_grad_(False)  # pyright: ignore[reportArgumentType]
    x = torch.randn(2, 3, side, side + 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn_like(conv(x))
    (right,) = torch.autograd.grad((conv(x) * weights).sum(), x)
    got = frozen._gradient_by_phase(weights, conv.weight, conv.stride, conv.padding, x.shape)
    assert got.shape == right.shape
    assert torch.allclose(got, right, rtol=1e-12, atol=1e-13)


def test_by_phase_only_where_it_saves_products_and_passes_are_fast() -> None:
    def cheap(conv: nn.Conv2d) -> bool:
        return frozen._has_cheap_phases(conv.weight, conv.stride, conv.padding, conv.dilation, conv.groups)

    assert cheap(nn.Conv2d(3, 64, 7, 2, 3))
    assert cheap(nn.Conv2d(3, 384, 16, 16))
    assert not cheap(nn.Conv2d(3, 64, 7, 1, 3))
    assert not cheap(nn.Conv2d(64, 128, 3, 2, 1))
    assert not cheap(nn.Conv2d(3, 3, 7, 2, 3, groups=3))
    assert not cheap(nn.Conv2d(3, 8, 7, 2, 3, dilation=2))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 7, 2, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).eval()
    plain = _plain(net)[1]
    slow, fast = (_asked(net, fast=on)[2] for on in (False, True))
    assert torch.equal(slow, plain)
    assert not torch.equal(fast, plain)
    assert torch.allclose(fast, plain, rtol=1e-4, atol=1e-7)


def test_a_fast_pass_goes_through_one_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each mode costs Python at every question about a tensor; others are frozen too."""
    layers = [nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3), nn.Flatten()]
    net = nn.Sequential(*layers).eval()
    field = ap.Field(net)
    q = field.bind(X, target=1)
    assert str(_plan(field)) == "1 batch-norm(s) folded, channels last"
    met: list[Any] = []

    def meet(self: frozen.Frozen, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        met.append(func)
        return func(*args, **(kwargs or {}))

    monkeypatch.setattr(frozen.Frozen, "__torch_function__", meet)
    whole: list[Any] = []
    apply = frozen._BatchNorm.apply
    monkeypatch.setattr(frozen._BatchNorm, "apply", lambda *args: whole.append(args) or apply(*args))
    q.value_and_grad(X, torch.arange(3))
    assert torch.nn.functional.conv2d not in met
    assert torch.Tensor.dim not in met
    assert len(whole) == 1


def test_a_map_that_is_changed_is_looked_at_again() -> None:
    q = ap.Field(lambda x: (x**2).sum(1)).bind(torch.ones(2, 3))
    _, grad = q.value_and_grad(q.x, torch.arange(2))
    assert q._runner.saw_finite(grad)
    grad[0, 0] = torch.nan
    with pytest.raises(ap.ApportionError, match="NaN"):
        q.attribution(ap.Gradient(), grad)
