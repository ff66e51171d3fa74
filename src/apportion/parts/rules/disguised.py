"""Activations in disguise: ReLUs written as masks of signs or maxima with zero, and others that are spelled out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from apportion.core import ops
from apportion.parts.rules.node import carries

_SIGNS = {"gt": True, "greater": True, "ge": True, "greater_equal": True, "lt": False, "less": False, "le": False}
_SIGNS |= {"less_equal": False}
_CASTS = frozenset("to float double half bfloat16 type type_as clone contiguous".split())
_COPIES = frozenset({"detach"})
_EXTREMES = frozenset({"amax", "max"})
_POINTWISE = frozenset(
    """add sub rsub neg mul rmul div tanh sigmoid erf exp pow square softplus relu relu6 hardtanh hardsigmoid clamp
    log1p""".split()
)
"""Operations of which activations are put together: given one tensor and numbers, they act on each element alone."""
_IN_PLACE_OF = frozenset("view view_as reshape reshape_as alias clone contiguous".split())
"""Operations that give the same elements, where the shape stays."""
_SCALING = frozenset("neg mul rmul div".split())
"""Those that multiply it by a number."""


@dataclass(frozen=True)
class _Sign:
    """A mask that tells the sign of a tensor, as it was at some version."""

    of: Any
    version: int
    positive: bool


@dataclass(frozen=True)
class _Choice:
    """A signal and constants side by side; `signal` where the constant is a single zero tensor."""

    dim: int
    signal: Any


class Disguised:
    """Remembers, during one forward pass, what masks and stacks were made of."""

    def __init__(self) -> None:
        """Start with nothing seen."""
        self._signs = WeakTensorKeyDictionary()
        self._choices = WeakTensorKeyDictionary()
        self._copies = WeakTensorKeyDictionary()

    def see(self, name: str, args: Any, kwargs: Any, dependent: list[bool], out: Any) -> None:
        """Remember the outcome of an operation that may be part of a ReLU.

        Args:
            name: the function's name without underscores.
            args: its positional arguments.
            kwargs: its named ones.
            dependent: for each tensor argument, whether it was computed from the input without carrying.
            out: what it gave.
        """
        if name in ("stack", "cat", "concat", "concatenate"):
            self._see_choice(name, args, kwargs, dependent, out)
            return
        if not isinstance(out, Tensor) or not args or not isinstance(args[0], Tensor):
            return
        if name in _COPIES:
            self._copies[out] = (ref(args[0]), args[0]._version)
        elif name in _SIGNS and len(args) == 2 and _is_zero(args[1], dependent[1:]):
            of, version = self._copies.get(args[0]) or (ref(args[0]), args[0]._version)
            if version == args[0]._version:
                self._signs[out] = _Sign(of, version, _SIGNS[name])
        elif name in _CASTS and args[0] in self._signs:
            self._signs[out] = self._signs[args[0]]

    def _see_choice(self, name: str, args: Any, kwargs: Any, dependent: list[bool], out: Tensor) -> None:
        parts = list(kwargs.get("tensors", args[0] if args else ()))
        held = [p for p in parts if carries(p)]
        if len(held) in (0, len(parts)):
            return
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        signal = None
        if name == "stack" and len(parts) == 2 and not any(dependent):
            other = parts[0] if parts[1] is held[0] else parts[1]
            signal = None if bool(other.any()) else (ref(held[0]), held[0]._version)
        self._choices[out] = _Choice(dim % out.ndim, signal)

    def relu_of(self, op: ops.Op, func: Any, args: Any, tensors: list[Tensor], carrying: list[bool]) -> Tensor | None:
        """Give the tensor of which a call is the ReLU, or None where that cannot be shown."""
        if sum(carrying) != 1:
            return None
        h = tensors[carrying.index(True)]
        if op.kind == "mul" and len(tensors) == 2 and not (op.inplace and tensors[0] is not h):
            return h if self._tells(tensors[1 - carrying.index(True)], h, True) else None
        if op.kind == "where" and len(args) == 3:
            mask, yes, no = (args[1], args[0], args[2]) if func is torch.Tensor.where else args
            kept, other = (yes, no) if yes is h else (no, yes)
            fits = kept is h and self._tells(mask, h, kept is yes) and self._is_constant_zero(other, h)
            return h if fits else None
        if op.kind == "masked_fill" and len(args) == 3 and args[0] is h and self._is_constant_zero(args[2], h):
            return h if self._tells(args[1], h, False) else None
        return None

    def _tells(self, mask: Any, h: Tensor, positive: bool) -> bool:
        sign = self._signs.get(mask) if isinstance(mask, Tensor) else None
        if sign is None or mask._version or mask.shape != h.shape:
            return False
        return sign.of() is h and sign.version == h._version and sign.positive is positive

    def _is_constant_zero(self, value: Any, h: Tensor) -> bool:
        if isinstance(value, Tensor) and value.shape != h.shape and value.ndim:
            return False
        return _is_zero(value, [])

    def choice(self, op: ops.Op, args: Any, kwargs: Any) -> tuple[bool, Tensor | None]:
        """Tell whether a maximum chooses between the signal and constants, and the signal where that is a ReLU."""
        chosen = self._choices.get(args[0]) if op.kind in _EXTREMES and args and isinstance(args[0], Tensor) else None
        if chosen is None:
            return False, None
        dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
        dims = tuple(range(args[0].ndim)) if dims is None else (dims,) if isinstance(dims, int) else tuple(dims)
        if chosen.dim not in {d % args[0].ndim for d in dims}:
            return False, None
        keeps = kwargs.get("keepdim", args[2] if len(args) > 2 else False)
        if chosen.signal is None or len(dims) != 1 or keeps or args[0]._version:
            return True, None
        h = chosen.signal[0]()
        return True, h if h is not None and h._version == chosen.signal[1] else None


def _is_zero(value: Any, dependent: list[bool]) -> bool:
    if isinstance(value, Tensor):
        return not carries(value) and not any(dependent) and not bool(value.any())
    return isinstance(value, int | float) and value == 0


_KEEP_ROOTS = frozenset("unsqueeze reshape view expand getitem expand_as add clamp to clone squeeze".split())
"""Operations on one tensor behind which a square root still counts as one."""
_GATES = frozenset({"sigmoid", "hardsigmoid"})
"""Activations between 0 and 1, which let through what they are multiplied with."""


class SpelledOut:
    """Finds products f(u) g(u) of functions of the same elements, as GELU is often written, and products with gates.

    And what a normalization that is spelled out multiplies with: one over a square root.
    """

    def __init__(self) -> None:
        """Start with every tensor its own root, and no gate."""
        self._roots = WeakTensorKeyDictionary()
        self._gates = WeakTensorKeyDictionary()
        self._square_roots = WeakTensorKeyDictionary()

    def inverts_root(self, op: ops.Op, args: Any, kwargs: Any, tensors: list[Tensor]) -> bool:
        """Tell whether a call gives 1 / √v."""
        if op.kind == "pow":
            return _exponent(args, kwargs) == -0.5
        return op.kind in ("reciprocal", "rdiv") and self._is_root(tensors[0])

    def see_root(
        self, op: ops.Op, args: Any, kwargs: Any, tensors: list[Tensor], carrying: list[bool], out: Any
    ) -> None:
        """Remember a square root, moved, or with something added or as a bound."""
        if not isinstance(out, Tensor):
            return
        handed_on = op.kind in _KEEP_ROOTS and carrying == [True] and self._is_root(tensors[0])
        if handed_on or op.kind == "sqrt" or (op.kind == "pow" and _exponent(args, kwargs) == 0.5):
            self._square_roots[out] = out._version

    def _is_root(self, t: Tensor) -> bool:
        return len(self._square_roots) > 0 and self._square_roots.get(t) == t._version

    def root(self, op: ops.Op, tensors: list[Tensor], carrying: list[bool]) -> tuple[Any, bool] | None:
        """Tell of whose elements alone an output is a function, and whether it is a multiple of them."""
        if op.kind in _IN_PLACE_OF:
            return self._of(tensors[0])
        numbers = [t for t, c in zip(tensors, carrying, strict=True) if not c]
        if op.kind not in _POINTWISE or any(t.ndim for t in numbers):
            return None
        roots = [self._of(t) for t, c in zip(tensors, carrying, strict=True) if c]
        if not _agree(roots):
            return None
        return roots[0][0], len(roots) == 1 and roots[0][1] and op.kind in _SCALING

    def is_gate(self, op: ops.Op, tensors: list[Tensor], carrying: list[bool]) -> bool:
        """Tell whether an operation gives a gate: a sigmoid, or what numbers make of one, such as 1 - z."""
        if op.kind in _GATES or op.kind not in _POINTWISE:
            return op.kind in _GATES
        numbers = all(c or not t.ndim for t, c in zip(tensors, carrying, strict=True))
        return numbers and all(t in self._gates for t, c in zip(tensors, carrying, strict=True) if c)

    def see(self, out: Any, root: tuple[Any, bool] | None, gate: bool) -> None:
        """Remember the root of what an operation gave, and whether it is a gate."""
        if isinstance(out, Tensor):
            self._roots.pop(out, None)
            self._gates.pop(out, None)
            of = None if root is None else root[0]()
            if root is not None and of is not None and of.shape == out.shape:
                self._roots[out] = root
            if gate:
                self._gates[out] = True

    def gated(self, op: ops.Op, tensors: list[Tensor], carrying: list[bool]) -> int | None:
        """Give the factor that a gate is multiplied with; None for any other product."""
        if op.kind not in ("mul", "rmul") or carrying != [True, True]:
            return None
        gates = [t in self._gates for t in tensors]
        return gates.index(False) if sum(gates) == 1 else None

    def homogeneous(self, op: ops.Op, tensors: list[Tensor], carrying: list[bool]) -> int | None:
        """Give the factor of such a product that is u times a constant; None for any other product."""
        if op.kind not in ("mul", "rmul") or carrying != [True, True]:
            return None
        roots = [self._of(t) for t in tensors]
        multiples = [multiple for _, multiple in roots]
        return multiples.index(True) if _agree(roots) and sum(multiples) == 1 else None

    def _of(self, t: Tensor) -> tuple[Any, bool]:
        return self._roots[t] if t in self._roots else (ref(t), True)


def _exponent(args: Any, kwargs: Any) -> Any:
    exponent = kwargs.get("exponent", args[1] if len(args) > 1 else None)
    return None if isinstance(exponent, Tensor) else exponent


def _agree(roots: list[tuple[Any, bool]]) -> bool:
    first = roots[0][0]()
    return first is not None and all(root() is first for root, _ in roots)
