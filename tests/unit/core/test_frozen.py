"""Frozen layers give the gradients of PyTorch's own and keep less."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import apportion as ap
from apportion.core.errors import ApportionError, SiteError
from apportion.core.frozen import Frozen

NETS = {
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 4, 9, 8)),
    "conv2d without bias": (nn.Conv2d(4, 4, 3, groups=4, bias=False), (2, 4, 6, 6)),
    "conv2d same": (nn.Conv2d(4, 6, 3, padding="same"), (2, 4, 6, 6)),
    "conv3d": (nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4)),
    "batch-norm": (nn.BatchNorm2d(4), (2, 4, 5, 5)),
    "batch-norm 1d": (nn.BatchNorm1d(4), (3, 4)),
    "plain batch-norm": (nn.BatchNorm2d(4, affine=False), (2, 4, 5, 5)),
}


def _gradient(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    out = net(leaf)
    return out, torch.autograd.grad(out.sin().sum(), leaf)[0]


@pytest.mark.parametrize("name", NETS)
def test_same_gradient(name: str) -> None:
    net, shape = NETS[name]
    net = net.double().eval().requires_grad_(False)
    if "batch-norm" in name:
        net.get_buffer("running_mean").normal_()
        net.get_buffer("running_var").uniform_(0.5, 2)
    x = torch.randn(shape, dtype=torch.float64)
    plain, plain_grad = _gradient(net, x)
    with Frozen():
        lean, lean_grad = _gradient(net, x)
    assert torch.equal(plain, lean)
    assert torch.allclose(plain_grad, lean_grad, rtol=1e-13, atol=1e-15)


def test_keeps_less() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    net = net.eval().requires_grad_(False)

    def kept() -> int:
        held: dict[int, int] = {}
        alive: list[Tensor] = []

        def pack(t: Tensor) -> Tensor:
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            alive.append(t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            net(torch.randn(2, 3, 16, 16, requires_grad=True))
        return sum(held.values())

    plain = kept()
    with Frozen():
        assert kept() < 0.6 * plain


def test_weights_that_need_gradient_get_it() -> None:
    conv = nn.Conv2d(1, 1, 3)
    with Frozen():
        out = conv(torch.randn(1, 1, 5, 5, requires_grad=True))
    out.sum().backward()
    assert conv.weight.grad is not None


def test_training_statistics_are_left_to_pytorch() -> None:
    norm = nn.BatchNorm2d(2).requires_grad_(False).train()
    x = torch.randn(4, 2, 3, 3, requires_grad=True)
    with Frozen():
        out = norm(x)
    assert type(out.grad_fn).__name__ == "NativeBatchNormBackward0"


def test_autocast_is_left_to_pytorch() -> None:
    conv = nn.Conv2d(1, 1, 3).requires_grad_(False)
    with torch.autocast("cpu", dtype=torch.bfloat16), Frozen():
        out = conv(torch.randn(1, 1, 5, 5, requires_grad=True))
    assert out.dtype == torch.bfloat16
    assert type(out.grad_fn).__name__ == "ConvolutionBackward0"


class Made(nn.Module):
    """Two convolutions with a batch-norm between them; `run` says how they are called."""

    def __init__(self, run: Callable[[Made, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.second = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3)
        self.norm.get_buffer("running_mean").normal_()
        self.norm.get_buffer("running_var").uniform_(0.5, 2)
        self.run = run
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x).flatten(2).mean(2)

    def begin(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.first(x)))

    def whole(self, x: Tensor) -> Tensor:
        return torch.tanh(self.second(self.begin(x)))


def _again(f: Callable[..., Tensor], x: Tensor) -> Tensor:
    return cast(Tensor, checkpoint(f, x, use_reentrant=False))


TRANSFORMED: dict[str, Callable[[Made, Tensor], Tensor]] = {
    "checkpoint of all": lambda m, x: _again(m.whole, x),
    "checkpoint of a convolution": lambda m, x: m.second(torch.tanh(m.norm(_again(m.first, x)))),
    "checkpoint of a batch-norm": lambda m, x: m.second(_again(lambda y: torch.tanh(m.norm(y)), m.first(x))),
    "checkpoint of a padded picture": lambda m, x: torch.tanh(_again(m.second, F.pad(m.begin(x), (1, 1, 1, 1)))),
    "checkpoint in part": lambda m, x: torch.tanh(m.second(_again(m.begin, x))),
    "vmap over weights": lambda m, x: torch.func.vmap(lambda w: F.conv2d(x, w))(
        torch.stack([m.first.weight, 2 * m.first.weight])
    ).prod(0),
    "vmap over rows": lambda m, x: torch.func.vmap(lambda row: m.whole(row[None])[0])(x),
    "grad": lambda m, x: torch.func.grad(lambda z: m.whole(z).sum())(x),
    "jvp": lambda m, x: torch.func.jvp(m.whole, (x,), (torch.ones_like(x),))[1],
    "jacrev of rows": lambda m, x: torch.func.vmap(torch.func.jacrev(lambda z: m.begin(z[None])[0, :, :2, :2]))(x).sum(
        (4, 5, 6)
    ),
    "forward mode": lambda m, x: _dual(m.whole, x),
    "complex": lambda m, x: F.conv2d(torch.fft.fft2(x), torch.complex(m.first.weight, m.first.weight.flip(0))).abs(),
}


def _dual(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
    assert tangent is not None
    return tangent


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own, at its first derivative in forward mode
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("how", TRANSFORMED)
def test_models_that_differentiate_or_run_again_themselves(how: str, fast: bool) -> None:
    net = Made(TRANSFORMED[how])
    x = torch.rand(3, 3, 9, 8, generator=torch.Generator().manual_seed(0))
    _, plain = _gradient(nn.Sequential(net, Second()), x)
    a = ap.Gradient()(ap.Field(net, score=lambda out: out[:, 1].sin(), fast=fast), x)
    assert torch.allclose(a.values, plain, rtol=1e-4, atol=1e-6 * float(plain.abs().max()))
    assert float(plain.abs().max()) > 0
    assert fast is False or how == "complex" or "torch.func or in a checkpoint" in a.engine["passes"]


class Second(nn.Module):
    """Takes the second number of each row."""

    def forward(self, out: Tensor) -> Tensor:
        return out[:, 1]


def test_a_checkpoint_the_first_pass_did_not_show() -> None:
    """Folds are left out then, and layers in the checkpoint run as written."""
    net = Made(lambda m, x: m.whole(x) if float(x.detach().amax()) < 2 else _again(m.whole, x))
    x = torch.rand(2, 3, 9, 8, generator=torch.Generator().manual_seed(0))
    x[1] += 3
    field = ap.Field(net, batch_size=1, score=lambda out: out[:, 1].sin())
    a = ap.Gradient()(field, x)
    _, plain = _gradient(nn.Sequential(net, Second()), x[:1])
    _, other = _gradient(nn.Sequential(net, Second()), x[1:])
    assert torch.allclose(a.values, torch.cat([plain, other]), rtol=1e-4, atol=1e-7)
    assert "not folded: the model has layers in" in a.engine["passes"]


def test_memory_of_a_model_that_hooks_cannot_weigh() -> None:
    """Rows per pass are chosen by all it makes, and the pass that could not be weighed is on the account."""
    x = torch.rand(2, 3, 9, 8)
    plain, func = (Made(run) for run in (Made.whole, TRANSFORMED["grad"]))
    both = [ap.Field(m, allow_unused=True) for m in (plain, func)]
    checks = [f.bind(x, target=1).cost.checks for f in both]
    assert checks[1] == checks[0] + 1
    assert both[1].chunk <= both[0].chunk


def test_a_site_in_vmap_is_refused() -> None:
    field = ap.Field(Made(TRANSFORMED["vmap over rows"]))
    with pytest.raises(SiteError, match=r"(?s)inside torch\.vmap .* call the layers on the whole batch"):
        ap.GradCAM(layer=ap.At("first"))(field, torch.rand(2, 3, 9, 8), target=1)


def test_rules_in_vmap_are_refused_with_advice() -> None:
    field = ap.Field(Made(TRANSFORMED["vmap over weights"]))
    with pytest.raises(ApportionError, match=r"call the layers on the whole batch"):
        ap.LRP()(field, torch.rand(2, 3, 9, 8), target=1)
