"""The vocabulary of operations: every spelling of an op under one name, with what is known of it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import cache
from types import FunctionType
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor


class Status(Enum):
    """What an operation does to the tensors that carry gradient."""

    LINEAR = "affine in all of them jointly"
    MULTILINEAR = "affine while one of them carries gradient, a product otherwise"
    NUMERATOR = "affine in the first, nonlinear in the others"
    NONLINEAR = "nonlinear"
    COMPOSITE = "has a decomposition into simpler operations"


_LINEAR = """add sub rsub neg positive reshape view view_as reshape_as flatten unflatten permute transpose
swapaxes movedim t T mT mean sum cumsum nansum cat concat concatenate stack hstack vstack split chunk unbind
tensor_split split_with_sizes select narrow index_select gather squeeze unsqueeze expand expand_as broadcast_to
contiguous clone to type float double half bfloat16 type_as cpu cuda detach_copy pad constant_pad_nd roll flip
repeat repeat_interleave tile dropout feature_dropout alpha_dropout avg_pool1d avg_pool2d avg_pool3d
adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d interpolate upsample pixel_shuffle
pixel_unshuffle unfold fold getitem masked_fill where instance_norm_stats embedding native_dropout
diagonal diag tril triu scatter index_put _unsafe_view alias lift_fresh real_if_close slice channel_shuffle
_to_copy narrow_copy requires_grad_ fill_diagonal""".split()
_MULTILINEAR = """mul multiply matmul bmm mm mv dot einsum bilinear linear conv1d conv2d conv3d conv_transpose1d
conv_transpose2d conv_transpose3d convolution addmm baddbmm addbmm addmv rmul outer tensordot inner""".split()
_NUMERATOR = """div divide true_divide truediv grid_sample batch_norm native_batch_norm
_native_batch_norm_legit_no_training cudnn_batch_norm""".split()
_NONLINEAR = """relu relu6 hardtanh leaky_relu prelu elu selu celu gelu silu mish tanh sigmoid softplus softsign
hardswish hardsigmoid logsigmoid threshold clamp clamp_min clamp_max clip exp expm1 log log1p log2 log10 sqrt
rsqrt reciprocal rdiv pow rpow square abs sin cos erf softmax log_softmax softmin logsumexp layer_norm
native_layer_norm group_norm rms_norm instance_norm local_response_norm max_pool1d max_pool2d max_pool3d
max_pool2d_with_indices adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d max amax min amin maximum
minimum norm vector_norm normalize cosine_similarity cumprod prod var std var_mean lstm gru rnn_tanh rnn_relu
glu sort topk median logcumsumexp tanhshrink hardshrink softshrink""".split()
_COMPOSITE = ["scaled_dot_product_attention", "multi_head_attention_forward"]

STATUS: dict[str, Status] = {
    **dict.fromkeys(_LINEAR, Status.LINEAR),
    **dict.fromkeys(_MULTILINEAR, Status.MULTILINEAR),
    **dict.fromkeys(_NUMERATOR, Status.NUMERATOR),
    **dict.fromkeys(_NONLINEAR, Status.NONLINEAR),
    **dict.fromkeys(_COMPOSITE, Status.COMPOSITE),
}
"""What is known of each operation, by its name without underscores."""

_ALIASES = {
    "multiply": "mul",
    "divide": "div",
    "true_divide": "div",
    "truediv": "div",
    "concat": "cat",
    "concatenate": "cat",
    "clip": "clamp",
    "clamp_min": "clamp",
    "clamp_max": "clamp",
    "mm": "matmul",
    "bmm": "matmul",
    "rmul": "mul",
    "radd": "add",
    "subtract": "sub",
    "convolution": "conv",
    "conv1d": "conv",
    "conv2d": "conv",
    "conv3d": "conv",
    "_native_batch_norm_legit_no_training": "batch_norm",
    "native_layer_norm": "layer_norm",
    "max_pool2d_with_indices": "max_pool2d",
    "_softmax": "softmax",
    "_log_softmax": "log_softmax",
    "fmax": "maximum",
    "fmin": "minimum",
}


_OF_TWO = {"max": "maximum", "min": "minimum"}
"""Reductions that, given a second tensor, compare two instead."""


@dataclass(frozen=True)
class Op:
    """One operation.

    Attributes:
        kind: its name here (`"relu"`, `"conv"`, `"softmax"`), the same for every spelling.
        status: what is known of it.
        pure: the out-of-place function, which takes the same arguments.
        inplace: whether the call as spelled overwrites its first argument.
    """

    kind: str
    status: Status
    pure: Callable[..., Any]
    inplace: bool = False


def _bare(name: str) -> tuple[str, bool]:
    """Strip underscores: the name and whether it is an in-place spelling."""
    if name.startswith("__") and name.endswith("__"):
        inner = name[2:-2]
        if inner.startswith("i") and inner[1:] in {"add", "sub", "mul", "div", "truediv", "matmul", "pow"}:
            return inner[1:], True
        return inner, False
    if name.endswith("_") and not name.startswith("_"):
        return name[:-1], name != "requires_grad_"
    return name, False


_NAMESPACES = (torch, F, torch.Tensor, cast(Any, torch._C)._nn, torch._C._TensorBase, torch.special)


def _table() -> dict[Any, Op]:
    table: dict[Any, Op] = {}
    wanted = set(STATUS) | set(_ALIASES)
    for space in _NAMESPACES:
        for name in dir(space):
            bare, inplace = _bare(name)
            if bare not in wanted:
                continue
            func = getattr(space, name, None)
            if not callable(func) or inspect.isclass(func) or func in table:
                continue
            pure = func
            if inplace:
                dunder = name.startswith("__")
                pure = getattr(space, f"__{bare}__" if dunder else bare, None) or getattr(torch.Tensor, bare, None)
                if pure is None:
                    continue
            kind = _ALIASES.get(bare, bare)
            table[func] = Op(kind, STATUS.get(bare, STATUS.get(kind, Status.NONLINEAR)), pure, inplace)
    for accessor in ("T", "mT", "real"):
        table[getattr(torch.Tensor, accessor).__get__] = Op(
            accessor, Status.LINEAR, getattr(torch.Tensor, accessor).__get__
        )
    return table


_OPS = _table()


@cache
def _inplace_position(func: Callable[..., Any]) -> int | None:
    try:
        return list(inspect.signature(func).parameters).index("inplace")
    except (TypeError, ValueError):
        return None


def lookup(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Op | None:
    """Find the operation behind a call, or None if it is not in the vocabulary.

    >>> x = torch.ones(1)
    >>> lookup(F.relu, (x, True), {}).kind, lookup(F.relu, (x, True), {}).inplace
    ('relu', True)
    >>> lookup(torch.Tensor.clamp_min_, (x, 0), {}).kind
    'relu'
    """
    op = _OPS.get(func)
    if op is None and isinstance(func, torch._ops.OpOverload):
        bare, inplace = _bare(func._schema.name.split("::")[-1])
        kind = _ALIASES.get(bare, bare)
        status = STATUS.get(bare, STATUS.get(kind))
        op = None if status is None or inplace else Op(kind, status, func)
    if op is None:
        return None
    if (op.kind == "clamp" and _is_relu(func, args, kwargs)) or (op.kind == "threshold" and _is_zero(args, kwargs)):
        op = Op("relu", Status.NONLINEAR, op.pure, op.inplace)
    if op.kind in _OF_TWO and isinstance(kwargs.get("other", args[1] if len(args) > 1 else None), Tensor):
        op = Op(_OF_TWO[op.kind], op.status, op.pure, op.inplace)
    if not op.inplace and func not in {torch.Tensor.to}:
        position = _inplace_position(func)
        if position is not None and (kwargs.get("inplace") or (len(args) > position and args[position])):
            return Op(op.kind, op.status, _without_inplace(func, position), True)
    return op


def _is_relu(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    name = _bare(getattr(func, "__name__", ""))[0]
    low = kwargs.get("min", args[1] if len(args) > 1 else None)
    high = kwargs.get("max", args[2] if len(args) > 2 else None)
    return name != "clamp_max" and isinstance(low, int | float) and low == 0 and high is None


def _is_zero(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return all(
        kwargs.get(name, args[i] if len(args) > i else None) == 0 for i, name in ((1, "threshold"), (2, "value"))
    )


def _without_inplace(func: Callable[..., Any], position: int) -> Callable[..., Any]:
    def pure(*args: Any, **kwargs: Any) -> Any:
        kwargs = {k: v for k, v in kwargs.items() if k != "inplace"}
        return func(*args[:position], *((False,) if len(args) > position else ()), *args[position + 1 :], **kwargs)

    return pure


def is_affine(op: Op, carrying: list[bool]) -> bool:
    """Tell whether a call is affine in the arguments that carry gradient.

    Args:
        op: the operation.
        carrying: for each tensor argument in order, whether it carries gradient.
    """
    if op.status is Status.LINEAR:
        return True
    if op.status is Status.MULTILINEAR:
        return sum(carrying) <= 1
    return op.status is Status.NUMERATOR and not any(carrying[1:])


@cache
def decomposed(func: Any) -> Callable[..., Any] | None:
    """Give a composite operation in simpler ones, which the mode in force sees; None if it is not composite.

    >>> decomposed(F.scaled_dot_product_attention).__name__, decomposed(F.relu)
    ('attention', None)
    """
    if func is F.scaled_dot_product_attention:
        return attention
    if func is not F.multi_head_attention_forward:
        return None
    # its own Python body, without the hand-over to the mode that it starts with
    blind = {**func.__globals__, "has_torch_function": lambda _: False}
    body = FunctionType(func.__code__, blind, func.__name__, func.__defaults__, func.__closure__)
    body.__kwdefaults__ = func.__kwdefaults__
    return body


def attention(
    query: Float[Tensor, "*b h q e"] | Float[Tensor, "*b q e"],
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Scaled dot-product attention in simple operations, so that its softmax can be reached.

    softmax(query keyᵀ · scale + mask) value; dropout must be 0, as in eval mode.
    """
    if enable_gqa:
        key = key.repeat_interleave(query.size(-3) // key.size(-3), -3)
        value = value.repeat_interleave(query.size(-3) // value.size(-3), -3)
    weight = torch.matmul(query * (scale or 1 / math.sqrt(query.size(-1))), key.transpose(-1, -2))
    if is_causal:
        keep = torch.ones(query.size(-2), key.size(-2), dtype=torch.bool, device=query.device).tril()
        weight = weight.masked_fill(~keep, -torch.inf)
    if attn_mask is not None:
        weight = _add_mask(weight, attn_mask)
    return torch.matmul(torch.softmax(weight, -1), value)


def _add_mask(weight: Tensor, mask: Tensor | Bool[Tensor, "..."]) -> Tensor:
    return weight.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else weight + mask
