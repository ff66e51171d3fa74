"""The engine: a backward pass in which every operation follows its rule, whatever it is called.

Operations are intercepted where PyTorch dispatches them, so that modules, functions, methods, in-place
spellings and reused layers are all the same. Two tracks make attributions differentiable: the values of
the true forward, with their own graph, and the signal track, whose backward is the rules'.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils.weak import WeakTensorKeyDictionary

from apportion.core import ops, tree
from apportion.core.errors import ConfigError, NoGradientPathError, NonFiniteError, RuleError
from apportion.core.protocols import RulePass
from apportion.core.tree import Tree
from apportion.parts.rules.rule import Call, Detached, Plain, Rule

if TYPE_CHECKING:
    from apportion.parts.rules.table import Rules

_FUNCTORCH = cast(Any, torch._C)._functorch

_VIEWS = frozenset(
    """reshape view flatten unflatten permute transpose swapaxes movedim squeeze unsqueeze contiguous
    view_as reshape_as alias _unsafe_view to type type_as T mT t expand expand_as broadcast_to narrow select slice
    getitem split chunk unbind tensor_split split_with_sizes diagonal requires_grad_""".split()
)
"""Operations whose output may share memory with their input: they run as they are, so that it does."""
_WHOLE = frozenset(
    """reshape view flatten unflatten permute transpose swapaxes movedim squeeze unsqueeze contiguous clone
    view_as reshape_as alias _unsafe_view to type type_as T mT t""".split()
)
"""Operations that only rearrange: a layer behind them still reads the input."""
_SETTERS = frozenset({torch.Tensor.__setitem__})
_LIKE = frozenset("type_as to expand_as view_as reshape_as".split())
"""Operations that take shape, type or device, and no values, from tensors other than the first."""
_POINTWISE = frozenset(
    """add sub rsub neg mul rmul div tanh sigmoid erf exp pow square softplus relu relu6 hardtanh hardsigmoid clamp
    log1p""".split()
)
"""Operations of which activations are put together: given one tensor and numbers, they act on each element alone."""
_SCALING = frozenset("neg mul rmul div".split())
"""Those that multiply it by a number."""
_MAKERS = frozenset(
    """zeros_like ones_like full_like empty_like rand_like randn_like randint_like new_zeros new_ones new_full
    new_empty new_empty_strided new_tensor""".split()
)
"""Functions that take only shape, type and device from their first tensor."""


@dataclass(eq=False)
class Record:
    """What one operation received and sent back.

    Attributes:
        kind: the operation.
        module: where it ran.
        output: its output.
        signal: what it received there.
        inputs: the inputs that carry a signal; none at the second and later outputs of one operation.
        sent: what it sent back to each.
    """

    kind: str
    module: str
    output: Tensor
    signal: Tensor
    inputs: list[Tensor]
    sent: list[Tensor]


class _Node(torch.autograd.Function):
    """An operation in the signal track."""

    @staticmethod
    def forward(ctx: Any, mode: _RuleMode, rule: Rule, call: Call, output: Any, *signals: Tensor) -> Any:
        ctx.mode, ctx.rule, ctx.call = mode, rule, call
        held = [t.data_ptr() for t in call.inputs]
        outs = _flatten(output)
        own = mode.differentiable  # there the true output stays in use, and the model may overwrite this one
        fresh = [o.detach().clone() if own or o.data_ptr() in held else o.detach() for o in outs]
        ctx.mark_non_differentiable(*[o for o in fresh if not o.is_floating_point()])
        return tuple(fresh)

    @staticmethod
    def backward(ctx: Any, *received: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        call, rule = ctx.call, ctx.rule
        call.check()
        signal = received[0] if len(received) == 1 else received
        sent = rule.back(call, signal)
        if ctx.mode.record is not None:
            pairs = [(i.detach(), s) for i, s in zip(call.inputs, sent, strict=True) if s is not None]
            for out, arrived in zip(_flatten(call.output), received, strict=True):
                if out.is_floating_point():
                    into, back = [i for i, _ in pairs], [s for _, s in pairs]
                    ctx.mode.record.append(Record(call.op.kind, call.module, out.detach(), arrived, into, back))
                    pairs = []
        carried = [s for s, c in zip(sent, call.carrying, strict=True) if c]
        return (None, None, None, None, *carried)


class _RuleMode(TorchFunctionMode):
    """Sends each operation that carries a signal to its rule."""

    def __init__(self, rules: Rules, *, everything: bool, differentiable: bool, record: bool) -> None:
        super().__init__()
        self.rules, self.everything, self.differentiable = rules, everything, differentiable
        self.record: list[Record] | None = [] if record else None
        self.truth = WeakTensorKeyDictionary()
        self.from_input = WeakTensorKeyDictionary()
        self.viewed = WeakTensorKeyDictionary()
        self.computed = WeakTensorKeyDictionary()
        self.constants = WeakTensorKeyDictionary()
        self.roots = WeakTensorKeyDictionary()
        self.readers: dict[int, list[Call]] = {}
        self.tape: list[tuple[str, list[Tensor]]] = []
        self.phase: Literal["reference", "main"] = "main"
        self.position = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = _flatten((args, kwargs))
        if not tensors:  # the switches of grad mode among others, which must stay as the model sets them
            return func(*args, **kwargs)
        carrying = [_carries(t) for t in tensors]
        # masks, indices and factors computed from what carries: constants to autograd, but not to a rule
        dependent = [not c and self._depends(t) for t, c in zip(tensors, carrying, strict=True)]
        if not any(carrying):
            self._see_transforms(tensors)
            with torch.no_grad():
                out = func(*args, **kwargs)
        else:
            out = self._carried(func, args, kwargs, tensors, carrying, dependent)
        self._follow(func, args, kwargs, tensors, carrying, dependent, out)
        return out

    def _depends(self, t: Tensor) -> bool:
        return t in self.computed or (t._base is not None and t._base in self.computed)

    def _see_transforms(self, tensors: list[Tensor]) -> None:
        """Refuse vmap and its kin on what carries: it hides the gradient from this mode."""
        for t in tensors:
            inner = t
            while _FUNCTORCH.is_functorch_wrapped_tensor(inner):
                inner = _FUNCTORCH.get_unwrapped(inner)
                if _carries(inner):
                    raise RuleError(
                        f"torch.vmap, or another transform of torch.func, in {_where() or 'the model'}",
                        "a model of plain torch operations: rules cannot see into vmap",
                        "call the model on the whole batch instead of mapping it over single examples",
                    )

    def _follow(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        tensors: list[Tensor],
        carrying: list[bool],
        dependent: list[bool],
        out: Any,
    ) -> None:
        """Remember which tensors without gradient were computed from those that carry."""
        sources = [c or d for c, d in zip(carrying, dependent, strict=True)]
        if not any(sources):
            return
        name = getattr(func, "__name__", "")
        first = isinstance(args[0], Tensor) if args else False
        if first and name in _MAKERS and not any(sources[1:]):
            return
        if first and name in _LIKE and not sources[0]:
            return
        written = [tensors[0]] if _overwrites(func, name) else []
        for t in [*_flatten(out), *written, *_flatten(kwargs.get("out"))]:
            for each in (t, t._base):
                if each is not None and not _carries(each) and each not in self.constants:
                    self.computed[each] = True

    def _carried(
        self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], carrying: list[bool], dependent: list[bool]
    ) -> Any:
        """Run an operation of which at least one input carries a signal."""
        if not torch.is_grad_enabled():
            op = ops.lookup(func, args, kwargs)
            if carrying[0] and ((op is not None and op.inplace) or _overwrites(func, getattr(func, "__name__", ""))):
                raise self._refused(func)
            return func(*args, **kwargs)
        simpler = ops.decomposed(func)
        if simpler is not None:
            with self:
                return simpler(*args, **kwargs)
        op = ops.lookup(func, args, kwargs)
        if op is None:
            return self._unknown(func, args, kwargs, tensors, carrying)
        if op.kind == "maximum" and (kept := self._as_relu(tensors, carrying, dependent)) is not None:
            op, args, kwargs = _with_zero(op, tensors, kept), (tensors[kept],), {}
            func, tensors, carrying, dependent = op.pure, [tensors[kept]], [True], [False]
        if op.kind in _LIKE:
            dependent = [False] * len(tensors)
        reads_input = tensors[0] in self.from_input
        try:
            rule = self.rules.pick(op, carrying, reads_input, dependent)
        except LookupError:
            raise self._refused(func, any(dependent)) from None
        if isinstance(rule, Detached):
            return self._constant(op, args, kwargs)
        root = self._root(op, tensors, carrying)
        if op.inplace:
            self._spare(tensors[0])
        if rule is None and op.kind in _VIEWS:
            out = self._view(func, args, kwargs, tensors, carrying)
        elif (rule is None or type(rule) is Plain) and not self.everything:
            out = func(*args, **kwargs)
        else:
            out = self._ruled(rule or Plain(), op, func, args, kwargs, tensors, carrying)
        if reads_input and op.kind in _WHOLE and isinstance(out, Tensor):
            self.from_input[out] = True
        if isinstance(out, Tensor):
            self.roots.pop(out, None)
            if root is not None:
                self.roots[out] = root
        return out

    def _constant(self, op: ops.Op, args: Any, kwargs: Any) -> Any:
        """Run an operation whose output is to be a constant."""
        if self.differentiable or op.inplace:
            raise RuleError(
                f"the rule Detached on {op.kind} in {_where() or 'the model'}, "
                + ("in place" if op.inplace else "in a pass that is to be differentiated"),
                "passes that end at their signals, and operations out of place",
                "ask for signals alone, or use a rule that sends something back",
            )
        with torch.no_grad():
            out = op.pure(*args, **kwargs)
        for t in _flatten(out):
            self.constants[t] = True
        return out

    def _root(self, op: ops.Op, tensors: list[Tensor], carrying: list[bool]) -> tuple[Any, bool] | None:
        """Tell of whose elements alone an output is a function, and whether it is a multiple of them."""
        numbers = [t for t, c in zip(tensors, carrying, strict=True) if not c]
        if op.kind not in _POINTWISE or any(t.ndim for t in numbers):
            return None
        roots = [self._rooted(t) for t, c in zip(tensors, carrying, strict=True) if c]
        if not _agree(roots):
            return None
        return roots[0][0], len(roots) == 1 and roots[0][1] and op.kind in _SCALING

    def _rooted(self, t: Tensor) -> tuple[Any, bool]:
        return self.roots[t] if t in self.roots else (weakref.ref(t), True)

    def _homogeneous(self, op: ops.Op, tensors: list[Tensor], carrying: list[bool]) -> int | None:
        if op.kind not in ("mul", "rmul") or carrying != [True, True]:
            return None
        roots = [self._rooted(t) for t in tensors]
        multiples = [multiple for _, multiple in roots]
        return multiples.index(True) if _agree(roots) and sum(multiples) == 1 else None

    def _as_relu(self, tensors: list[Tensor], carrying: list[bool], dependent: list[bool]) -> int | None:
        """Find the operand of which a maximum is the ReLU: the other one is a constant zero."""
        if len(tensors) != 2 or sum(carrying) != 1 or any(dependent):
            return None
        kept = carrying.index(True)
        h, other = tensors[kept], tensors[1 - kept]
        fits = torch.broadcast_shapes(h.shape, other.shape) == h.shape and torch.result_type(h, other) == h.dtype
        return kept if fits and not bool(other.any()) else None

    def _spare(self, overwritten: Tensor) -> None:
        """Give the calls that will still need what a tensor holds their own copy of it."""
        place = overwritten.untyped_storage().data_ptr()
        for call in self.readers.pop(place, []):
            for i, (t, version) in enumerate(zip(call.inputs, call.versions, strict=True)):
                if t.untyped_storage().data_ptr() == place and t._version == version:
                    call.inputs[i] = t.clone()
                    call.versions[i] = call.inputs[i]._version

    def _view(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], carrying: list[bool]) -> Any:
        """Run a view on both tracks, so that writing to it changes what it is a view of."""
        out = func(*args, **kwargs)
        if not self.differentiable or self.phase == "reference":
            return out
        true: list[Tensor] = []
        for t, c in zip(tensors, carrying, strict=True):
            if c and t not in self.viewed:
                self.truth[t], self.viewed[t] = self.truth[t].clone(), True
            true.append(self.truth[t] if c else t)
        a, k = _substitute((args, kwargs), iter(true))
        for y, v in zip(_flatten(out), _flatten(func(*a, **k)), strict=True):
            self.truth[y], self.viewed[y] = v, True
        return out

    def _unknown(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], carrying: list[bool]) -> Any:
        name = getattr(func, "__name__", "")
        overwrites = _overwrites(func, name)
        if overwrites:
            self._spare(tensors[0])
        if not overwrites or not self.everything:
            out = func(*args, **kwargs)
            if not any(t.requires_grad for t in _flatten(out)) and not overwrites:
                return out
            if self.rules.otherwise is not None:
                if not self.everything:
                    return out
                op = ops.Op(name or str(func), ops.Status.NONLINEAR, func)
                return self._ruled(self.rules.otherwise, op, func, args, kwargs, tensors, carrying)
        raise self._refused(func)

    def _refused(self, func: Any, dependent: bool = False) -> RuleError:
        try:
            name = resolve_name(func)
        except Exception:
            name = None
        name = name or getattr(func, "__name__", str(func))
        where = _where() or "the model"
        if dependent:
            return RuleError(
                f"the operation {name} in {where} takes a mask, index or factor that depends on the input",
                "a constant there: with one computed from the signal the operation is not affine",
                "write relu(h) for h * (h > 0) and the like, or take the derivative with otherwise=Plain()",
            )
        return RuleError(
            f"the operation {name} in {where} carries gradient and has no rule",
            "a rule for it, or an affine operation",
            "add it to the rule set's table, or give Rules(..., otherwise=Plain()) to take its derivative",
        )

    def _ruled(
        self, rule: Rule, op: ops.Op, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], carrying: list[bool]
    ) -> Any:
        if self.phase == "reference":
            self.tape.append((op.kind, [t.detach().clone() for t in tensors]))
            out = op.pure(*args, **kwargs)
            return tensors[0].copy_(out) if op.inplace else out
        values = [self._value(t, c, op.inplace) for t, c in zip(tensors, carrying, strict=True)]

        def fn(*new: Tensor) -> Any:
            it = iter(new)
            a, k = _substitute((args, kwargs), it)
            return op.pure(*a, **k)

        call = Call(op, values, carrying, fn, _named(func, args, kwargs), versions=[v._version for v in values])
        call.reference = self._next_reference(op, tensors)
        call.homogeneous = self._homogeneous(op, tensors, carrying)
        if self.record is not None or rule.relevance:
            call.module = _where()
        if rule.relevance and tensors[0] not in self.from_input:
            raise RuleError(
                f"{type(rule).__name__} on {op.kind} in {_where() or 'the model'}, which does not read the input",
                "the first layer",
                "use a rule that gives gradients for later layers",
            )
        with torch.set_grad_enabled(self.differentiable):
            true = rule.forward(call)
        if self.differentiable:
            call.true_output = true
        else:
            for v in values:
                self.readers.setdefault(v.untyped_storage().data_ptr(), []).append(call)
        nodes = _Node.apply(self, rule, call, true, *[t for t, c in zip(tensors, carrying, strict=True) if c])
        out = _substitute(true, iter(nodes))  # pyright: ignore[reportArgumentType, reportCallIssue]
        if op.inplace:
            out = tensors[0].copy_(out)  # pyright: ignore[reportArgumentType]
        if self.differentiable:
            if op.inplace and tensors[0] in self.viewed:
                true = self.truth[tensors[0]].copy_(true)  # pyright: ignore[reportArgumentType]
            for y, t in zip(_flatten(out), _flatten(true), strict=True):
                self.truth[y] = t
        return out

    def _value(self, t: Tensor, carries: bool, overwritten: bool) -> Tensor:
        if self.differentiable and carries:
            true = self.truth[t]  # a node of its own, so that derivatives by two inputs are partial ones
            return true.clone() if overwritten else true.view_as(true)
        return t.detach().clone() if overwritten else t.detach()

    def _next_reference(self, op: ops.Op, tensors: list[Tensor]) -> list[Tensor] | None:
        if not self.tape:
            return None
        kind, values = self.tape[self.position] if self.position < len(self.tape) else ("nothing more", [])
        self.position += 1
        if kind != op.kind or [v.shape for v in values] != [t.shape for t in tensors]:
            raise RuleError(
                f"input and reference took different paths: {op.kind} against {kind} in {_where() or 'the model'}",
                "the same operations on both",
                "choose a baseline for which the model branches alike",
            )
        return values


def run(
    rules: Rules,
    forward: Callable[[Tree], Tensor],
    z: Tree,
    reference: Tree | None,
    *,
    start: Literal["score", "one"],
    record: bool,
    differentiable: bool,
) -> RulePass:
    """Run `RuleSet.run` for a rule set of this package.

    Raises:
        RuleError: an operation the rules do not know, or one that cannot be seen.
        NonFiniteError: relevance is to start at 1 where the score is 0.
    """
    if start not in ("score", "one"):
        raise ConfigError(f"start={start!r}", "'score' or 'one'", "'score' lets relevance sum to the score, 'one' to 1")
    everything = record or differentiable
    mode = _RuleMode(rules, everything=everything, differentiable=differentiable, record=record)
    reference_value = None
    if reference is not None:
        mode.phase = "reference"
        first = tree.apply(lambda t: t.detach().requires_grad_().clone(), reference)  # no operation of the model
        with mode:
            reference_value = forward(first).detach()
        mode.phase = "main"
    leafs = [t.detach().requires_grad_() for t in tree.leaves(z)]
    starts = []
    for leaf, true in zip(leafs, tree.leaves(z), strict=True):
        first = leaf.clone()
        mode.from_input[first] = True
        if differentiable:
            mode.truth[first] = (true if true.requires_grad else true.detach().requires_grad_()).clone()
        starts.append(first)
    with mode:
        value = forward(tree.rebuild(z, starts))
    if not value.requires_grad:
        raise NoGradientPathError("the score does not depend on the input", "a differentiable path", "")
    if mode.position != len(mode.tape):
        raise RuleError(
            "the reference pass ran more operations than the input's",
            "the same operations on both",
            "choose a baseline for which the model branches alike",
        )
    _check_visible(value)
    true_value = mode.truth[value] if differentiable else value.detach()
    signal = torch.ones_like(value)
    if start == "one":
        if not bool((true_value != 0).all()):
            raise NonFiniteError(
                "relevance starting at 1 where the score is 0", "a score that is not 0", "start='score'"
            )
        signal = 1 / true_value
    found = torch.autograd.grad(value, leafs, signal, create_graph=differentiable, allow_unused=True)
    sent = [torch.zeros_like(t) if s is None else s for s, t in zip(found, leafs, strict=True)]
    return RulePass(true_value, tree.rebuild(z, sent), reference_value, mode.record or [])


def _check_visible(value: Tensor) -> None:
    """Refuse graphs with steps the engine could not see: they would silently follow their own derivative."""
    seen: set[Any] = set()
    todo = [value.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        owner = getattr(type(node), "_forward_cls", None)
        if owner is not None and owner is not _Node:
            raise RuleError(
                f"the model uses the custom autograd function {owner.__qualname__}, which no rule can see into",
                "operations of torch",
                "write its forward with torch operations",
            )
        todo += [n for n, _ in node.next_functions]


def _carries(t: Tensor) -> bool:
    # a leaf is a weight that a plain callable closes over: it does not depend on the input
    return t.requires_grad and not t.is_leaf and t.is_floating_point()


def _overwrites(func: Any, name: str) -> bool:
    inplace = name.startswith("__i") and name[3:-2] in {
        "add",
        "sub",
        "mul",
        "div",
        "truediv",
        "matmul",
        "pow",
        "and",
        "or",
        "xor",
    }
    return func in _SETTERS or inplace or (name.endswith("_") and not name.endswith("__") and name != "requires_grad_")


def _agree(roots: list[tuple[Any, bool]]) -> bool:
    first = roots[0][0]()
    return first is not None and all(root() is first for root, _ in roots)


def _with_zero(op: ops.Op, tensors: list[Tensor], kept: int) -> ops.Op:
    """Give max(h, 0) as an operation of h alone."""
    zero, both = tensors[1 - kept].detach(), op.pure

    def pure(h: Tensor) -> Tensor:
        return both(h, zero) if kept == 0 else both(zero, h)

    return ops.Op("relu", ops.Status.NONLINEAR, pure)


def _where() -> str:
    """Name the innermost module that is running, from the call stack."""
    inner: nn.Module | None = None
    outer: nn.Module | None = None
    frame = sys._getframe(1)
    while frame is not None:
        holder = frame.f_locals.get("self")
        if isinstance(holder, nn.Module):
            inner, outer = inner or holder, holder
        frame = frame.f_back
    if inner is None or outer is None:
        return ""
    name = next((n for n, m in outer.named_modules() if m is inner), "")
    return f"{name or 'the top module'} ({type(inner).__name__})"


def _flatten(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in _flatten(v)]
    if isinstance(value, tuple | list):
        return [t for v in value for t in _flatten(v)]
    return []


def _substitute(value: Any, new: Any) -> Any:
    if isinstance(value, Tensor):
        return next(new)
    if isinstance(value, dict):
        return {k: _substitute(v, new) for k, v in value.items()}
    if isinstance(value, tuple | list) and not isinstance(value, torch.Size):
        return type(value)(_substitute(v, new) for v in value)
    return value


def _named(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Name what rules ask for: the axis of a softmax, the groups of a norm, positional or not."""
    named = {**dict(zip(_parameters(func), args, strict=False)), **kwargs}
    if "dim" not in named and len(args) > 1 and isinstance(args[1], int | tuple | list):
        named["dim"] = args[1]
    return named


_ORDER = {
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "group_norm": ("input", "num_groups", "weight", "bias", "eps"),
    "rms_norm": ("input", "normalized_shape", "weight", "eps"),
}
"""Parameters of functions of torch that are not written in Python."""


@cache
def _parameters(func: Any) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(func).parameters)
    except (TypeError, ValueError):
        return _ORDER.get(getattr(func, "__name__", ""), ())
