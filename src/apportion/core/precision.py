"""Lowered precision: passes that compute in fewer digits, and how far from float32 that takes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from apportion.core import tree
from apportion.core.errors import ConfigError, InputError, NoGradientPathError, NonFiniteError
from apportion.core.tree import Tree

if TYPE_CHECKING:
    from apportion.core.question import Question

Lowered = Literal["bf16", "fp16", "tf32"]
Precision = torch.dtype | str | None
"""A dtype the whole model is cast to, or the name of a mode in which weights, rows and sums stay in float32."""

NAMES = ("bf16", "fp16", "tf32")
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
SAMPLE = 4
"""Examples on which a precision is compared with float32, at most."""
SCALES = (4096.0, 64.0, 1.0)
"""By which scores are multiplied before an fp16 pass goes back, so that small gradients do not become 0."""
WORST_ERROR, WORST_COSINE = 0.05, 0.99


def check_precision(precision: Any) -> None:
    """Refuse what is no precision.

    Raises:
        ConfigError: it is none.
    """
    named = isinstance(precision, str) and precision in NAMES
    if precision is None or named or (isinstance(precision, torch.dtype) and precision.is_floating_point):
        return
    raise ConfigError(
        f"precision={precision!r}",
        f"a floating-point torch.dtype, one of {', '.join(map(repr, NAMES))}, or None",
        "write torch.float64, for example",
    )


def check_device(precision: Lowered, leaves: list[Tensor]) -> None:
    """Refuse inputs that cannot be computed so.

    Raises:
        InputError: inputs in another dtype than float32, or TF32 without the units for it.
    """
    dtypes = {t.dtype for t in leaves if t.is_floating_point()}
    if not dtypes <= {torch.float32}:
        listed = ", ".join(sorted(map(str, dtypes)))
        raise InputError(
            f"an input of {listed} with precision={precision!r}",
            "float32, in which weights, rows and sums stay",
            "pass x.float(), and a model in float32; a dtype as precision casts the model itself",
        )
    if precision == "tf32" and leaves[0].device.type != "cuda":
        raise InputError(
            f"precision='tf32' on {leaves[0].device}", "an NVIDIA GPU, which has units for it", "use 'bf16' on a CPU"
        )


def lowered(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Give the mode of one forward pass."""
    dtype = _AUTOCAST.get(precision) if isinstance(precision, str) else None
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


@contextmanager
def tensor_cores(precision: Precision) -> Iterator[None]:
    """Let float32 products of forward and backward passes round their factors to TF32."""
    if precision != "tf32":
        yield
        return
    matmul: Any = torch.backends.cuda.matmul
    conv: Any = torch.backends.cudnn
    before = matmul.allow_tf32, conv.allow_tf32
    matmul.allow_tf32 = conv.allow_tf32 = True
    try:
        yield
    finally:
        matmul.allow_tf32, conv.allow_tf32 = before


def widened(outputs: Any) -> Any:
    """Give outputs in float32: scores are computed there."""
    return tree.map_tensors(lambda t: t.float() if t.dtype in (torch.bfloat16, torch.float16) else t, outputs)


def deviation(q: Question) -> dict[str, Any]:
    """Measure how far gradients are from those of float32, on the first examples.

    Returns:
        The largest relative error ‖g - g₃₂‖ / ‖g₃₂‖ and the smallest cosine, over so many examples; the
        largest relative error of the score where nothing can be differentiated. In fp16 also the scale of
        gradients on their way back: the largest of a few at which these examples do not overflow.

    Raises:
        NonFiniteError: there is none.
    """
    count = min(SAMPLE, len(q))
    owner = torch.arange(count, device=q.device)
    rows = tree.apply(lambda t: t[:count], q.x)

    def ask() -> tuple[bool, Tree]:
        try:
            return True, q.value_and_grad(rows, owner)[1]
        except NoGradientPathError:
            return False, q.value(rows, owner)[:, None]

    scales = SCALES if q.field.lowered == "fp16" else (1.0,)
    tried = 0
    mine: Tree = None
    for tried, scale in enumerate(scales, 1):
        q.field.scale = scale
        try:
            with q.uncounted():
                _, mine = ask()
            break
        except NonFiniteError:
            if tried == len(scales):
                raise
    with q.uncounted(), q.field.in_full():
        slopes, right = ask()
    found = {**apart(mine, right), "of": "gradient" if slopes else "score"}
    if not slopes:
        del found["cosine"]
    return found | ({"loss_scale": scales[tried - 1]} if len(scales) > 1 else {})


def apart(a: Tree, b: Tree) -> dict[str, Any]:
    """Give the largest relative error of rows and their smallest cosine, to rows in float32."""
    mine, right = (torch.cat([t.detach().flatten(1).double() for t in tree.leaves(rows)], 1) for rows in (a, b))
    size = right.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    cosine = (mine * right).sum(1) / (mine.norm(dim=1) * size).clamp_min(torch.finfo(torch.float32).tiny)
    return {
        "examples": len(right),
        "relative_error": float(((mine - right).norm(dim=1) / size).max()),
        "cosine": float(cosine.min()),
    }


def complaint(precision: Lowered, found: dict[str, Any]) -> str | None:
    """Put a deviation above the bounds into words; None below."""
    error, cosine = found["relative_error"], found.get("cosine", 1.0)
    if error <= WORST_ERROR and cosine >= WORST_COSINE:
        return None
    near = f", cosine {cosine:.3f}" if "cosine" in found else ""
    return (
        f"precision={precision!r} takes the {found['of']} {error:.1%} away from float32{near} "
        f"(worst of {found['examples']} example(s))"
    )
