"""Pieces: on which linear piece every piecewise-linear unit of a forward pass lies, found by operation.

A unit is one entry of what such an operation decides: a ReLU's sign, a max-pool's winner. The decision is
written as a small whole number, its code; two points with equal codes everywhere share one linear region.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from apportion.core import ops, tree
from apportion.core.errors import ModelError
from apportion.core.tree import Tree

_FUNCTORCH = cast(Any, torch._C)._functorch

Take = Callable[[str, Tensor], None]
"""Receives the kind of each piecewise-linear operation and the codes of its units, in the order of the pass."""


class _Depends(IntEnum):
    """How a tensor depends on the followed rows."""

    NOT = 0
    IN_STEPS = 1
    VARIES = 2


_SHAPE_ONLY = frozenset(
    """zeros_like ones_like full_like empty_like rand_like randn_like randint_like new_zeros new_ones new_full
    new_empty new_empty_strided new_tensor""".split()
)
"""They take shape, type and device from their first tensor, and no values."""
_LIKE = frozenset("type_as to expand_as view_as reshape_as".split())
"""They take no values from tensors other than the first."""
_LINEAR_TOO = frozenset(
    """detach data copy fill zero ravel dropout1d dropout2d dropout3d setitem moveaxis swapdims broadcast_tensors
    masked_select scatter_add index_add index_copy take take_along_dim column_stack rot90 fliplr flipud addcmul
    is_pinned retain_grad record_stream""".split()
)
"""Affine operations the vocabulary does not hold, since rules never meet them or must refuse them."""
_STEPS = frozenset("sign sgn floor ceil round trunc fix heaviside floor_divide".split())
"""Constant on each piece; the code is the value."""
_NO_SWITCH = frozenset("eq ne isnan isinf isfinite isclose isneginf isposinf allclose".split())
"""True or false on a set without volume only: they divide the input space into no regions."""
_BY_INDEX = frozenset("max min sort topk median".split())
"""Operations that also return which entries they chose."""
_ARGUMENTS = {
    "relu6": (None, None, 0.0, 6.0),
    "hardsigmoid": (None, None, -3.0, 3.0),
    "hardtanh": ("min_val", "max_val", -1.0, 1.0),
    "clamp": ("min", "max", None, None),
}
"""For operations with two kinks: how their places are named, and where they are unless given."""


class Pieces(TorchFunctionMode):
    """Watch a forward pass and hand on the codes of its piecewise-linear operations.

    Only operations that depend on the followed rows count: what a model computes from its weights or from
    further arguments alone does not change between two points.

    Attributes:
        other: operations on the way that are no choice between linear pieces, or unknown, with their calls.
    """

    def __init__(self, take: Take) -> None:
        """Start watching.

        Args:
            take: what to do with the codes.
        """
        super().__init__()
        self.take = take
        self.other: Counter[str] = Counter()
        self._depends = WeakTensorKeyDictionary()

    def follow(self, rows: Tree) -> Tree:
        """Give rows whose consequences are watched, to be passed to the model in this mode."""
        rows = tree.apply(lambda t: t.detach().view_as(t), rows)  # tensors of our own, to be known again by
        for t in tree.leaves(rows):
            self._depends[t] = _Depends.VARIES
        return rows

    def sees(self, value: Tensor) -> bool:
        """Tell whether the way from the followed rows to a result was seen without a break."""
        return self._of(value) is not _Depends.NOT

    def _of(self, t: Tensor) -> _Depends:
        own = self._own(t)
        return own if own or t._base is None else self._own(t._base)

    def _own(self, t: Tensor) -> _Depends:
        return self._depends.get(t) or _Depends.NOT

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = _name(func)
        tensors = _flatten((args, kwargs))
        depends = [self._of(t) for t in tensors]
        if tensors and isinstance(args[0] if args else None, Tensor):
            if name in _SHAPE_ONLY:
                depends[0] = _Depends.NOT
            if name in _LIKE:
                depends[1:] = [_Depends.NOT] * (len(depends) - 1)
        most = max(depends, default=_Depends.NOT)
        if most is _Depends.VARIES:
            simpler = ops.decomposed(func)
            if simpler is not None:
                with self:
                    return simpler(*args, **kwargs)
            out, gives = self._run(func, name, args, kwargs, [d is _Depends.VARIES for d in depends])
        else:
            self._refuse_transforms(tensors)
            out, gives = func(*args, **kwargs), most
        if gives:
            written = [tensors[0]] if name == "setitem" else []
            for t in [*_flatten(out), *written, *_flatten(kwargs.get("out"))]:
                at = _Depends.IN_STEPS if not _holds_numbers(t) else gives
                for each in (t, t._base):  # writing to a view changes what it is a view of
                    if each is not None and self._own(each) < at:
                        self._depends[each] = at
        return out

    def _run(self, func: Any, name: str, args: Any, kwargs: Any, varying: list[bool]) -> tuple[Any, _Depends]:
        """Run an operation on what varies: its result, and how that depends on the rows."""
        op = ops.lookup(func, args, kwargs)
        kind = (name if op is None else op.kind).removesuffix("_with_indices")
        code = _code(kind, name, args, kwargs)  # before it runs: in place, the result would stand there
        out = func(*args, **kwargs)
        flat = _flatten(out)
        if code is None and op is not None and kind in _BY_INDEX and len(flat) == 2:
            code = _narrow(flat[1], max(t.numel() for t in _flatten(args)))
        if code is not None:
            self.take(kind, code)
            return out, _Depends.VARIES
        if not flat:
            return out, _Depends.NOT if name != "setitem" else _Depends.VARIES
        if not any(_holds_numbers(t) for t in flat) or name in _STEPS:
            if name not in _NO_SWITCH and name not in _LINEAR_TOO:
                for t in flat:
                    self.take(kind, t.clone())  # the model may write to its own
            return out, _Depends.IN_STEPS
        known = name in _LINEAR_TOO if op is None else ops.is_affine(op, varying)
        if not known:
            self.other[kind] += 1
        return out, _Depends.VARIES

    def _refuse_transforms(self, tensors: list[Tensor]) -> None:
        for t in tensors:
            inner = t
            while _FUNCTORCH.is_functorch_wrapped_tensor(inner):
                inner = _FUNCTORCH.get_unwrapped(inner)
                if self._of(inner):
                    raise ModelError(
                        "torch.vmap, or another transform of torch.func, on what depends on the input",
                        "a model of plain torch operations, whose units can be told apart by row",
                        "call the layers on the whole batch instead of mapping them over single examples",
                    )


def places(module: nn.Module | None) -> Callable[[], str]:
    """Give a function that names the innermost module of a model that is running: its name among all modules."""
    names = {} if module is None else {id(m): n for n, m in module.named_modules()}

    def where() -> str:
        frame = sys._getframe(1)
        while frame is not None:
            holder = frame.f_locals.get("self")
            if isinstance(holder, nn.Module) and id(holder) in names:
                return names[id(holder)]
            frame = frame.f_back
        return "" if module is None else "the score"

    return where


def _name(func: Any) -> str:
    """Name a function without underscores, namespaces and overloads."""
    name = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__"):
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    return ops._bare(name.split(".")[0])[0]


def _holds_numbers(t: Tensor) -> bool:
    return t.is_floating_point() or t.is_complex()


def _flatten(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for v in value.values() for t in _flatten(v)]
    if isinstance(value, tuple | list):
        return [t for v in value for t in _flatten(v)]
    return []


def _given(args: Any, kwargs: Any, at: int, *names: str | None, default: Any = None) -> Any:
    for name in names:
        if name in kwargs:
            return kwargs[name]
    return args[at] if len(args) > at else default


def _kinks(kind: str, name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Find where an operation with up to two kinks bends; None where it does not."""
    low_name, high_name, low, high = _ARGUMENTS[kind]
    if low_name is None:
        return low, high
    if name == "clamp_max":
        return None, _given(args, kwargs, 1, high_name)
    if name == "clamp_min":
        return _given(args, kwargs, 1, low_name), None
    return _given(args, kwargs, 1, low_name, default=low), _given(args, kwargs, 2, high_name, default=high)


def _code(kind: str, name: str, args: Any, kwargs: Any) -> Tensor | None:
    """Tell the linear piece of each unit of one call; None for an operation that has none.

    At a kink the piece is the one whose derivative torch takes.
    """
    h = _given(args, kwargs, 0, "input", "self")
    if kind in ("relu", "leaky_relu", "rrelu", "prelu", "abs"):
        return h > 0
    if kind in _ARGUMENTS:
        return _between(h, *_kinks(kind, name, args, kwargs))
    if kind == "threshold":
        return h > _given(args, kwargs, 1, "threshold")
    if kind in ("hardshrink", "softshrink"):
        half = _given(args, kwargs, 1, "lambd", default=0.5)
        return _between(h, -half, half)
    if kind in ("maximum", "minimum"):
        return h > _given(args, kwargs, 1, "other")
    if "max_pool" in kind:
        return _pool_winners(kind, h, args, kwargs)
    if kind in ("amax", "amin") or (kind in ("max", "min") and len(args) + len(kwargs) == 1):
        return _winners(h, _given(args, kwargs, 1, "dim", default=()), largest=kind.endswith("max"))
    return None


def _between(h: Tensor, low: Any, high: Any) -> Tensor | None:
    """Count the kinks passed: 0, 1 or 2."""
    if low is None:
        return None if high is None else h >= high
    return h > low if high is None else (h > low).to(torch.uint8).add_(h >= high)


def _winners(h: Tensor, dims: Any, *, largest: bool) -> Tensor:
    """Find which entry is the largest, or the smallest, over several axes at once; all of them for none."""
    dims = (dims,) if isinstance(dims, int) else tuple(dims)
    dims = tuple(d % h.ndim for d in dims) or tuple(range(h.ndim))
    flat = h.movedim(dims, tuple(range(-len(dims), 0))).flatten(h.ndim - len(dims)) if h.ndim else h[None]
    return _narrow(flat.argmax(-1) if largest else flat.argmin(-1), flat.shape[-1])


def _pool_winners(kind: str, h: Tensor, args: Any, kwargs: Any) -> Tensor:
    """Find the position each window of a max-pool takes."""
    named = {k: v for k, v in kwargs.items() if k not in ("input", "self", "return_indices")}
    most = 2 if kind.startswith("adaptive") else 6  # arguments before return_indices
    _, index = getattr(F, kind)(h, *args[1:most], **named, return_indices=True)
    return _narrow(index, h[0, 0].numel())


def _narrow(index: Tensor, count: int) -> Tensor:
    """Hold indices below `count` in the fewest bytes."""
    small = torch.uint8 if count <= 1 << 8 else torch.int16 if count <= 1 << 15 else torch.int32
    return index.to(small)
