"""Frozen layers give the gradients of PyTorch's own and keep less."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

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
