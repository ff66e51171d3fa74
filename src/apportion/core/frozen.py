"""Frozen layers: convolutions and batch-norms that keep nothing they need only for weight gradients.

PyTorch keeps the input of every convolution and batch-norm for the backward pass, also where weights need
no gradient. The gradient with respect to the input needs the weights alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

_FUNCTORCH, _AUTOGRAD = (getattr(cast(Any, torch._C), name) for name in ("_functorch", "_autograd"))
_DIMENSIONS: dict[Any, int] = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}


class _Convolution(torch.autograd.Function):
    """A convolution with constant weights."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, func: Callable[..., Tensor], weight: Tensor, bias: Any, setting: Any, by_phase: bool
    ) -> Tensor:
        ctx.save_for_backward(weight)
        out = func(x, weight, bias, *setting)
        ctx.by_phase = by_phase and x.device.type == "cpu" and _has_cheap_phases(weight, *setting)
        last = out.ndim == 4 and not out.is_contiguous() and out.is_contiguous(memory_format=torch.channels_last)
        ctx.shape, ctx.setting = x.shape, setting
        ctx.format = torch.channels_last if last else torch.contiguous_format
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (weight,) = ctx.saved_tensors
        (grad,) = grads
        stride, padding, dilation, groups = ctx.setting
        if ctx.by_phase:
            return _gradient_by_phase(grad, weight, stride, padding, ctx.shape), None, None, None, None, None
        # its shape and layout are read, its numbers are not: memory that is never written to costs nothing
        shape_only = torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device, memory_format=ctx.format)
        back = torch.ops.aten.convolution_backward(
            grad,
            shape_only,
            weight,
            None,
            stride,
            padding,
            dilation,
            False,
            [0] * len(stride),
            groups,
            [True, False, False],
        )
        return back[0], None, None, None, None, None


_BLOCK = 16
"""Channels that oneDNN computes together: fewer cost as much."""


def _has_cheap_phases(weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> bool:
    """Tell whether the gradient below takes less than half of the products of the usual one."""
    if weight.ndim != 4 or groups != 1 or any(d != 1 for d in dilation):
        return False
    channels, (height, width) = weight.shape[1], weight.shape[2:]
    taps = [len(_taps(k, s, p)) for k, s, p in zip((height, width), stride, padding, strict=True)]
    usual = -(-channels // _BLOCK) * height * width
    return 2 * -(-channels * stride[0] * stride[1] // _BLOCK) * taps[0] * taps[1] < usual


def _taps(size: int, stride: int, padding: int) -> range:
    """List how many strides before its place an output may lie that a pixel adds to."""
    return range(-((stride - 1 + padding) // stride), (size - 1 - padding) // stride + 1)


def _gradient_by_phase(grad: Tensor, weight: Tensor, stride: Any, padding: Any, shape: Any) -> Tensor:
    """Take the gradient with respect to the few channels of a picture, where strides are large.

    Pixels that lie equally far from the last multiple of the stride see the same weights. One convolution with
    stride 1 gives them all as channels, which are then put in their places: 3 channels and stride 2 are 12, which
    fill a processor's registers; 3 do not.
    """
    (high, wide), (out, channels) = stride, weight.shape[:2]
    rows, columns = (_taps(k, s, p) for k, s, p in zip(weight.shape[2:], stride, padding, strict=True))
    before = [-(s * taps[0] + p) for s, taps, p in zip(stride, (rows, columns), padding, strict=True)]
    after = [s * len(t) - k - b for s, t, k, b in zip(stride, (rows, columns), weight.shape[2:], before, strict=True)]
    whole = F.pad(weight, (before[1], after[1], before[0], after[0]))
    split = whole.reshape(out, channels, len(rows), high, len(columns), wide).flip(2, 4)
    phases = split.permute(1, 3, 5, 0, 2, 4).reshape(channels * high * wide, out, len(rows), len(columns))
    edge = [
        max(0, taps[-1], -(-size // s) - had - taps[0])
        for taps, size, s, had in zip((rows, columns), shape[2:], stride, grad.shape[2:], strict=True)
    ]
    found = F.conv2d(grad, phases, None, 1, edge)
    begin = [e - taps[-1] for e, taps in zip(edge, (rows, columns), strict=True)]
    height, width = (-(-size // s) for size, s in zip(shape[2:], stride, strict=True))
    found = found[:, :, begin[0] : begin[0] + height, begin[1] : begin[1] + width]
    placed = found.reshape(-1, channels, high, wide, height, width).permute(0, 1, 4, 2, 5, 3)
    return placed.reshape(-1, channels, height * high, width * wide)[:, :, : shape[2], : shape[3]]


class _BatchNorm(torch.autograd.Function):
    """A batch-norm with constant statistics: one factor per channel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, var: Tensor, weight: Any, bias: Any, eps: float) -> Tensor:
        scale = torch.rsqrt(var + eps) if weight is None else weight * torch.rsqrt(var + eps)
        ctx.save_for_backward(scale)
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (scale,) = ctx.saved_tensors
        (grad,) = grads
        return grad * scale.reshape(1, -1, *[1] * (grad.ndim - 2)), None, None, None, None, None


class Frozen(TorchFunctionMode):
    """Runs convolutions and batch-norms with constant weights as above; everything else as it is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


FUNCTIONS: tuple[type, ...] = (_Convolution, _BatchNorm)
"""The autograd functions by which they run."""


def run(func: Any, args: Any, kwargs: Any, *, by_phase: bool = False) -> Any:
    """Run one operation: a convolution or batch-norm with constant weights as above, all else as it is.

    Args:
        func: the operation.
        args: what it is called with.
        kwargs: the same by name.
        by_phase: whether a gradient may come from other products than torch's, where that is faster.
    """
    found = None
    if (func in _DIMENSIONS or func is F.batch_norm) and not _autocast(args) and not is_transformed():
        found = _batch_norm(*args, **kwargs) if func is F.batch_norm else _convolution(func, by_phase, *args, **kwargs)
    return func(*args, **kwargs) if found is None else found


def is_transformed() -> bool:
    """Tell whether the model's own derivatives go on, or a part that it runs again: they need the model's operations.

    Transforms of torch.func and derivatives in forward mode do not know functions like the above, and a checkpoint
    holds what is saved on the way back, where no mode is, against what was saved here.
    """
    if _FUNCTORCH.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return True
    hooks = _AUTOGRAD._top_saved_tensors_default_hooks(True)
    return hooks is not None and getattr(hooks[0], "__module__", None) == checkpoint.__name__


def _autocast(args: Any) -> bool:
    return bool(args) and isinstance(args[0], Tensor) and torch.is_autocast_enabled(args[0].device.type)


def _constant(*tensors: Tensor | None) -> bool:
    return not any(t is not None and t.requires_grad for t in tensors)


def _each(value: Any, count: int) -> list[int] | None:
    if isinstance(value, int):
        return [value] * count
    if isinstance(value, Sequence) and not isinstance(value, str):
        return list(value) * (count if len(value) == 1 else 1)
    return None


def _convolution(
    func: Any,
    by_phase: bool,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:
    count = _DIMENSIONS[func]
    setting = [_each(v, count) for v in (stride, padding, dilation)]
    if input.is_complex() or weight.is_complex():  # which are several real ones, and have a backward pass of each
        return None
    if not input.requires_grad or not _constant(weight, bias) or None in setting or input.ndim != count + 2:
        return None
    return _Convolution.apply(input, func, weight, bias, (*setting, groups), by_phase)  # pyright: ignore[reportReturnType]


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    if training or running_mean is None or running_var is None or not input.requires_grad:
        return None
    if not _constant(running_mean, running_var, weight, bias):
        return None
    return _BatchNorm.apply(input, running_mean, running_var, weight, bias, eps)  # pyright: ignore[reportReturnType]
