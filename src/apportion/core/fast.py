"""Fast passes: batch-norms and zeros at the edges folded into convolutions, and channels last in memory.

All change nothing but rounding. A first pass, which runs as the model says, learns which convolution feeds
a batch-norm and nothing else, and which padded picture feeds a convolution and nothing else. Later passes run
that convolution with folded weights, or with padding of its own, and hand the model a stand-in for what lies
between the two operations, which has a shape and no numbers; the second of them exchanges it for the real tensor.
So a model that does anything else with the stand-in is found out before a wrong number is made, and the pass
is repeated as the model says. Stand-ins are on the meta device: where no mode sees an operation, in TorchScript or in
another thread, what it makes of them has no numbers either, and cannot meet real ones without an error. What anything
still holds after a pass, in outputs of whatever make or in a global, is not folded.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from apportion.core import frozen, tree
from apportion.core.derivative import is_memory
from apportion.core.eager import without_compilation
from apportion.core.tree import Tree

if TYPE_CHECKING:
    from apportion.core.twin import Twin

CONVOLUTIONS: dict[Any, int] = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}
_PLACE = {getattr(Tensor, name).__get__ for name in ("device", "is_cuda")}
"""What tells where a tensor is, which a stand-in says of the tensor it stands for."""
_SHAPE_ONLY = {
    Tensor.dim,
    Tensor.size,
    Tensor.numel,
    Tensor.is_floating_point,
    *(getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "is_cuda", "layout")),
}
"""What a model may ask of a stand-in: nothing that depends on its numbers."""


class Unfoldable(Exception):
    """A pass that cannot run with folded batch-norms."""


@dataclass
class Fold:
    """A batch-norm and the convolution before it, by the twin's own tensors.

    Attributes:
        conv: weight and bias of the convolution.
        norm: mean, variance, weight and bias of the batch-norm.
        eps: what it adds to the variance.
        ready: the folded weight and bias, once made.
        made_from: the versions of the tensors they were made from.
    """

    conv: tuple[Tensor, Tensor | None]
    norm: tuple[Tensor, Tensor, Tensor | None, Tensor | None]
    eps: float
    ready: tuple[Tensor, Tensor] | None = None
    made_from: tuple[int, ...] = ()

    def make(self) -> tuple[Tensor, Tensor]:
        """Fold, in double precision: the outcome is rounded once."""
        versions = tuple([t._version for t in self.tensors])
        if self.ready is None or versions != self.made_from:
            self.made_from = versions
            with torch.no_grad():
                (weight, bias), (mean, var, gamma, beta) = self.conv, self.norm
                scale = torch.rsqrt(var.double() + self.eps)
                scale = scale if gamma is None else scale * gamma.double()
                shift = (0 if bias is None else bias.double()) - mean.double()
                shift = shift * scale if beta is None else shift * scale + beta.double()
                folded = (weight * scale.reshape(-1, *[1] * (weight.ndim - 1))).to(weight.dtype)
                self.ready = folded, shift.to(weight.dtype)
        return self.ready

    @cached_property
    def tensors(self) -> list[Tensor]:
        """List what the folded weights depend on."""
        return [t for t in (*self.conv, *self.norm) if t is not None]


Call = tuple[int, int]
"""One call of a convolution in a pass: the id of its weight, and how often it was used before."""


@dataclass
class Plan:
    """What passes of one twin may do.

    Attributes:
        folds: by the call of the convolution.
        pads: which calls of `F.pad` in a pass only feed a convolution, counted from 0.
        channels_last: whether rows of pictures are laid out channels last.
        turn: after which call of a pass they are laid out as usual again; else the first long sum does it.
        why_not: what is left out, and why.
        has_layers: whether passes meet convolutions or batch-norms, which frozen ones stand in for.
        repeats: passes that failed and were made again, not yet on any account.
    """

    folds: dict[Call, Fold] = field(default_factory=dict)
    pads: frozenset[int] = frozenset()
    channels_last: bool = False
    turn: int | None = None
    why_not: str = ""
    has_layers: bool = True
    repeats: int = 0
    _digest: tuple[Any, Any] = ((), None)

    @property
    def is_on(self) -> bool:
        """Whether there is anything to gain, and nothing against it."""
        return self.channels_last or bool(self.folds or self.pads)

    def moved(self, to: Mapping[int, Tensor]) -> Plan:
        """Give the plan of a copy of the network.

        Args:
            to: by the id of each tensor of the network, that of the copy.
        """

        def there(t: Tensor | None) -> Any:
            return None if t is None else to[id(t)]

        folds = {
            (id(to[weight]), n): Fold((there(f.conv[0]), there(f.conv[1])), tuple(map(there, f.norm)), f.eps)  # pyright: ignore[reportArgumentType]
            for (weight, n), f in self.folds.items()
        }
        return replace(self, folds=folds, repeats=0, _digest=((), None))

    def give_up(self, why: str) -> None:
        """Run as the model says from now on."""
        self.why_not, self.channels_last, self.folds, self.pads = why, False, {}, frozenset()

    def drop(self, broken: str, error: Exception) -> None:
        """Leave out what a failed pass could not do, one of the two at a time."""
        if broken or not self.channels_last:
            self.folds, self.pads, why = {}, frozenset(), f"not folded: {broken or error}"
        else:
            self.channels_last, why = False, f"not channels last: {type(error).__name__}, {error}"
        self.why_not = f"{self.why_not}; {why}".strip("; ")

    def refresh(self) -> bool:
        """Fold anew if weights changed since; tell whether they did.

        Weights written to through `.data` keep their version, so their numbers are looked at.
        """
        if not self.folds:
            return False
        unique = {id(t): t for f in self.folds.values() for t in f.tensors}
        now = digest(list(unique.values()))
        changed = not is_alike(now, self._digest)
        if changed:
            self._digest = now
            for fold in self.folds.values():
                fold.ready = None
        return changed

    def __str__(self) -> str:
        counts = (len(self.folds), "batch-norm(s)"), (len(self.pads), "padding(s)")
        folded = [f"{count} {what}" for count, what in counts if count]
        parts = [" and ".join(folded) + " folded"] if folded else []
        parts += ["channels last"] if self.channels_last else []
        how = ", ".join(parts) or "as the model says"
        return f"{how}; {self.why_not}" if self.why_not else how


_ANGLE = 2.399963229728653  # the golden one: no multiple comes near a whole turn early
_RAMP: dict[tuple[torch.device, torch.dtype], Tensor] = {}


def digest(tensors: list[Tensor]) -> tuple[Any, Any]:
    """Tell numbers apart by a sum for each first index, with weights that look random; vectors as they are.

    One read of memory and no wait for the device. No weight of a sum is near 0, so that each element is seen.
    """
    sums = []
    for t in tensors:  # constants, of which no graph is made
        rows = t.detach().reshape(len(t) if t.ndim else 1, -1)
        if rows.shape[1] < 2 or not t.is_floating_point():
            sums.append(rows.flatten().clone())
            continue
        key, count = (t.device, t.dtype), rows.shape[1]
        ramp = _RAMP.get(key)
        if ramp is None or ramp.numel() < count:
            at = torch.arange(max(count, 8192), device=t.device, dtype=torch.float64)
            turned = (at * _ANGLE + 1).sin_()
            ramp = _RAMP[key] = (turned + 0.5 * turned.sign()).to(t.dtype)  # a longer one begins like a shorter
        sums.append(torch.mv(rows, ramp[:count]))
    kinds = sorted({s.dtype for s in sums}, key=str)
    joined = [torch.cat([s for s in sums if s.dtype == kind]) for kind in kinds]
    return tuple([(t.data_ptr(), t.shape, t.stride()) for t in tensors]), joined


def is_alike(one: tuple[Any, Any], other: tuple[Any, Any]) -> bool:
    """Compare two digests bit by bit, where NaN equals itself and zeros have signs."""
    if one[0] != other[0]:
        return False
    pairs = [(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(one[1], other[1], strict=True)]
    return all(torch.equal(a, b) for a, b in pairs)


class Learning(TorchFunctionMode):
    """Watches one pass, and keeps the outputs of its convolutions to see who uses them."""

    def __init__(self, own: Iterable[Tensor]) -> None:
        """Start.

        Args:
            own: the twin's weights and buffers; convolutions with others are made anew in each pass.
        """
        super().__init__()
        self._own = {id(t): t for t in own}
        self._calls: Counter[int] = Counter()
        self._made: dict[int, tuple[Tensor, Call, tuple[Tensor, Tensor | None]]] = {}
        self._uses: Counter[int] = Counter()
        self._norms: dict[int, tuple[tuple[Any, ...], float]] = {}
        self._padded: dict[int, tuple[Tensor, int]] = {}
        self._pads = 0
        self._convolved: set[int] = set()
        self._steps = 0
        self._step_of: dict[int, tuple[Tensor, int]] = {}
        self._is_deep = False
        self._turn: int | None = None
        self._pictures = 0
        self.has_layers = self._is_transformed = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _SHAPE_ONLY:
            for key in _found((args, kwargs), self._made.keys() | self._padded.keys()):
                self._uses[key] += 1
        if func is F.pad or func is F.batch_norm or func in CONVOLUTIONS:
            self.has_layers = self.has_layers or func is not F.pad
            self._is_transformed = self._is_transformed or frozen.is_transformed()
        if func is F.batch_norm:
            self._norm(*args, **kwargs)
        out = func(*args, **kwargs)
        if not self._is_deep:
            self._look_for_turn(func, args, kwargs, out)
        self._steps += 1
        if func is F.pad and isinstance(out, Tensor):
            if out.dtype == torch.float32 and _edges(*args, **kwargs):
                self._padded[id(out)] = out, self._pads
            self._pads += 1
        if func in CONVOLUTIONS and isinstance(out, Tensor):
            self._convolved.add(id(args[0] if args else kwargs["input"]))
            weight, bias = _weights(args, kwargs)
            call = (id(weight), self._calls[id(weight)])
            self._calls[id(weight)] += 1
            if self._is_own(weight, bias) and out.dtype == torch.float32:
                self._made[id(out)] = out, call, (weight, bias)
        return out

    def _look_for_turn(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Count what gains by channels last, up to the first long sum, and see what made its input."""
        if not isinstance(out, Tensor) or out.ndim != 4 or out.dtype != torch.float32:
            return
        if func is F.conv2d:
            weight, _ = _weights(args, kwargs)
            if is_long(weight):
                _, self._turn = self._step_of.get(id(args[0] if args else kwargs["input"]), (None, None))
                self._is_deep = True
                self._step_of.clear()
                return
            self._pictures += max(weight.shape[2:]) > 1
        self._pictures += func in _POOLS
        if id(out) not in self._step_of and not out._is_view():
            self._step_of[id(out)] = out, self._steps

    def _is_own(self, *tensors: Tensor | None) -> bool:
        return all(t is None or (id(t) in self._own and not t.requires_grad) for t in tensors)

    def _norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> None:
        constant = not training and running_mean is not None and running_var is not None
        if id(input) in self._made and constant and self._is_own(running_mean, running_var, weight, bias):
            self._norms[id(input)] = (running_mean, running_var, weight, bias), eps

    def plan(self, outputs: Iterable[Tensor]) -> Plan:
        """Say what passes like this one may do.

        Args:
            outputs: the tensors the model gave.
        """
        if self._is_transformed:
            return Plan(why_not=_TRANSFORMED, has_layers=self.has_layers)
        self._step_of.clear()
        given = {id(t) for t in outputs}
        given |= {key for key, made in self._made.items() if sys.getrefcount(made[0]) > 2}  # by the tuple, and here
        given |= {key for key, pad in self._padded.items() if sys.getrefcount(pad[0]) > 2}
        folds = {}
        for key, (norm, eps) in self._norms.items():
            _, call, conv = self._made[key]
            same = all(t.dtype == torch.float32 for t in (*conv, *norm) if t is not None)
            if self._uses[key] == 1 and key not in given and same:
                folds[call] = Fold(conv, norm, eps)  # pyright: ignore[reportArgumentType]
        alone = [k for k in self._padded if self._uses[k] == 1 and k in self._convolved and k not in given]
        pads = frozenset(self._padded[k][1] for k in alone)
        return Plan(folds, pads, self._pictures > 1, self._turn, has_layers=self.has_layers)


@dataclass(eq=False)
class _StandIn:
    """What a model is handed in place of what lies between two operations.

    Attributes:
        tensor: the stand-in.
        real: the tensor that the second operation gets; the stand-in itself once it did.
        of: the fold, or how many zeros are left, right, above and below.
        version: of the real tensor when it was put away.
        real_place: an empty tensor where the real one is.
    """

    tensor: Tensor
    real: Tensor
    of: Fold | list[int]
    version: int
    real_place: Tensor

    @property
    def user(self) -> Any:
        """The operation that may come second; none once it did."""
        if self.real is self.tensor:
            return None
        return F.batch_norm if isinstance(self.of, Fold) else F.conv2d

    @property
    def misuse(self) -> str:
        """What another operation did."""
        what, who = ("convolution", "batch-norm") if isinstance(self.of, Fold) else ("padded picture", "convolution")
        return f"reads a {what} before its {who} does"


_TRANSFORMED = "the model has layers in a transform of torch.func or in a checkpoint"


class Fast(TorchFunctionMode):
    """Runs a pass by a plan."""

    def __init__(self, plan: Plan) -> None:
        """Start one pass."""
        super().__init__()
        self._plan = plan
        self._calls: Counter[int] = Counter()
        self._pads = 0
        self._stand_ins: dict[int, _StandIn] = {}
        self._steps = 0
        self._is_deep = False
        self.broken = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PLACE and self._stand_ins and id(args[0]) in self._stand_ins:
            return func(self._stand_ins[id(args[0])].real_place)
        out = self._run(func, args, kwargs or {})
        if self._steps == self._plan.turn and self._plan.channels_last and isinstance(out, Tensor):
            held = {t.untyped_storage().data_ptr() for t in tree.tensors((args, kwargs or {}))}
            if id(out) not in self._stand_ins and out.untyped_storage().data_ptr() not in held:
                out = _usual(out)
        self._steps += 1
        return out

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if self._stand_ins and func not in _SHAPE_ONLY and (found := _found((args, kwargs), self._stand_ins)):
            held = self._stand_ins[found[0]]
            if func is not held.user or len(found) > 1 or not args or args[0] is not held.tensor:
                self._fail(f"{getattr(func, '__name__', func)} {held.misuse}")
            if frozen.is_transformed():
                self._fail(_TRANSFORMED)
            if func is F.batch_norm:
                return self._normed(*args, **kwargs)
        if (func is F.pad or func in CONVOLUTIONS) and frozen.is_transformed():
            if self._plan.folds or self._plan.pads:
                self._fail(_TRANSFORMED)  # which the first pass did not show
            return func(*args, **kwargs)
        if func is F.pad:
            return self._pad(*args, **kwargs)
        if func not in CONVOLUTIONS:
            return frozen.run(func, args, kwargs) if func is F.batch_norm else func(*args, **kwargs)
        weight, bias = _weights(args, kwargs)
        input = args[0] if args else kwargs["input"]
        rest = {k: v for k, v in kwargs.items() if k not in ("input", "weight", "bias")}
        call = (id(weight), self._calls[id(weight)])
        self._calls[id(weight)] += 1
        fold = self._plan.folds.get(call)
        ready = (weight, bias) if fold is None else fold.make()
        setting = args[3:]
        if id(input) in self._stand_ins:
            held = self._stand_ins[id(input)]
            input, ready, setting, rest = self._unpadded(held, *ready, *setting, **rest)
        self._is_deep = self._is_deep or is_long(weight)
        if self._plan.channels_last and self._is_deep and weight.ndim == 4:
            input = _usual(input)
        out = frozen.run(func, (input, *ready, *setting), rest, by_phase=True)
        return out if fold is None else self._stand_in(out.shape, out, fold)

    def _stand_in(self, shape: Any, real: Tensor, of: Fold | list[int]) -> Tensor:
        tensor = torch.empty(shape, dtype=real.dtype, device="meta")
        self._stand_ins[id(tensor)] = _StandIn(tensor, real, of, real._version, real.new_empty(0))
        return tensor

    def _pad(self, *args: Any, **kwargs: Any) -> Tensor:
        self._pads += 1
        edges = _edges(*args, **kwargs) if self._pads - 1 in self._plan.pads else None
        if edges is None:
            return F.pad(*args, **kwargs)
        real: Tensor = args[0] if args else kwargs["input"]
        left, right, top, bottom = edges
        *rows, height, width = real.shape
        return self._stand_in((*rows, height + top + bottom, width + left + right), real, edges)

    def _unpadded(self, held: _StandIn, weight: Tensor, bias: Tensor | None, *setting: Any, **rest: Any) -> Any:
        """Give what a convolution is called with if it is to pad the picture itself."""
        edges = held.of
        assert isinstance(edges, list)
        if held.real._version != held.version:
            self._fail("a picture was written to after it was padded")
        real, held.real = held.real, held.tensor  # a second use is an error
        named = dict(zip(("stride", "padding", "dilation", "groups"), setting, strict=False)) | rest
        own = _own_padding(edges, weight, **named)
        if own is None:
            return F.pad(real, edges), (weight, bias), setting, rest
        padding, zeros = own
        return real, (F.pad(weight, zeros) if any(zeros) else weight, bias), (), named | {"padding": padding}

    def _normed(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        held = self._stand_ins[id(input)]
        out, fold = held.real, held.of
        assert isinstance(fold, Fold)
        given = (running_mean, running_var, weight, bias)
        if training or eps != fold.eps or any(a is not b for a, b in zip(given, fold.norm, strict=True)):
            self._fail("a batch-norm is another than in the first pass")
        held.real = input  # a second use is an error; the tensor is free to go
        return out

    def _fail(self, why: str) -> None:
        self.broken = why
        raise Unfoldable(why)

    def check(self, outputs: Iterable[Tensor]) -> None:
        """See that the model gave no stand-in away.

        Raises:
            Unfoldable: it did, or the pass failed and the model hid it.
        """
        kept = any(
            sys.getrefcount(s.tensor) > 2 + (s.real is s.tensor)  # by the record, and here
            for s in self._stand_ins.values()
        )
        if not self.broken and (kept or any(t.is_meta for t in outputs)):
            self.broken = "the model gives away what lies between two operations that are run as one"
        if self.broken:
            raise Unfoldable(self.broken)


def _edges(input: Tensor, pad: Any, mode: str = "constant", value: Any = None) -> list[int] | None:
    """Give how many zeros are put left and right of pictures, above and below; None for any other padding."""
    zeros = mode == "constant" and (value is None or value == 0) and isinstance(pad, tuple | list) and len(pad) == 4
    return list(pad) if zeros and input.ndim == 4 and all(type(n) is int and n >= 0 for n in pad) else None


def _own_padding(
    edges: list[int], weight: Tensor, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> tuple[list[int], list[int]] | None:
    """Say how a convolution pads as much itself: by the same on both sides, and by zeros around its weights.

    Zeros among the weights cost products, so they are left to convolutions of single channels.
    """
    if weight.ndim != 4 or isinstance(padding, str):
        return None
    own = [padding, padding] if isinstance(padding, int) else [padding[0], padding[-1]]
    left, right, top, bottom = (n + own[axis] for n, axis in zip(edges, (1, 1, 0, 0), strict=True))
    high, wide = max(top, bottom), max(left, right)
    zeros = [wide - left, wide - right, high - top, high - bottom]
    single = weight.shape[1] == 1 and dilation in (1, (1, 1), [1, 1])
    return ([high, wide], zeros) if single or not any(zeros) else None


_POOLS = {F.max_pool2d, torch.max_pool2d, F.max_pool2d_with_indices}
_LONG = 500


def is_long(weight: Tensor) -> bool:
    """Tell whether each output of a spatial convolution is a long sum.

    With channels last, oneDNN adds such a sum up term by term: 2 to 5 times as far from double precision, so that more
    units end up on the other side of their kink, and hardly faster. From the first of them on, layers run as usual.
    """
    return max(weight.shape[2:]) > 1 and weight[0].numel() >= _LONG


def _weights(args: Any, kwargs: Any) -> tuple[Tensor, Tensor | None]:
    weight = args[1] if len(args) > 1 else kwargs["weight"]
    bias = args[2] if len(args) > 2 else kwargs.get("bias")
    return weight, bias


def _found(held: Any, ids: Any) -> list[int]:
    """List the tensors in arguments whose id is among `ids`."""
    found = []
    for value in held.values() if isinstance(held, dict) else held:
        if isinstance(value, Tensor):
            if id(value) in ids:
                found.append(id(value))
        elif isinstance(value, tuple | list | dict):
            found += _found(value, ids)
    return found


class _ChannelsLast(torch.autograd.Function):
    """A copy with channels last in memory, whose gradient comes back as it does without."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Copy."""
        return x.clone(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Lay the gradient out as usual."""
        return grads[0].contiguous()


class _Usual(torch.autograd.Function):
    """A copy with channels first in memory, whose gradient goes on with channels last."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Copy."""
        return x.contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Lay the gradient out as what came before the copy."""
        return grads[0].contiguous(memory_format=torch.channels_last)


def _usual(x: Tensor) -> Tensor:
    """Lay pictures out as usual."""
    if x.ndim != 4 or x.is_contiguous():
        return x
    return _Usual.apply(x)  # pyright: ignore[reportReturnType]


class SlowPath(TorchFunctionMode):
    """Does nothing but be there, which keeps torch's fused inference kernels away.

    Without gradient, torch's transformer layers switch to kernels that drop padded positions: f would be
    another function where it is valued than where it is differentiated.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def run(
    twin: Twin, forward: Callable[[AbstractContextManager[object], Tree], Any], rows: Tree, *, watched: bool
) -> Any:
    """Run one forward pass, fast where the twin's plan allows it and else as the model says.

    A fast pass that fails is repeated as the model says; where that succeeds, so it stays.

    Args:
        twin: whose plan it is; the first pass of a check makes one.
        forward: calls the model on rows under a mode.
        rows: rows at the network's own input.
        watched: whether someone looks at single operations, which then must be the model's own.

    Returns:
        The model's outputs.
    """
    plan = twin.plan
    if watched or (not twin.learns if plan is None else not plan.is_on):
        return forward(_unfused(rows), tree.apply(_copied, rows))
    if plan is None:
        learning = Learning(twin.tensors())
        with without_compilation():
            outputs = forward(learning, tree.apply(_copied, rows))
        twin.plan, twin.learns = learning.plan(tree.tensors(outputs)), False
        return outputs
    before = dict(plan.folds), plan.pads, plan.channels_last, plan.why_not
    while plan.is_on:
        mode = Fast(plan)
        try:
            with without_compilation():
                outputs = forward(mode, tree.apply(_channels_last if plan.channels_last else _copied, rows))
            mode.check(tree.tensors(outputs))
            return outputs
        except Exception as error:
            if is_memory(error):
                raise
            plan.repeats += 1
            plan.drop(mode.broken, error)
    try:
        return forward(SlowPath(), tree.apply(_copied, rows))
    except Exception:
        plan.folds, plan.pads, plan.channels_last, plan.why_not = before  # it was not the plan that failed
        raise


def _unfused(rows: Tree) -> AbstractContextManager[object]:
    """Keep fused kernels away where they could run: torch leaves them alone where its inputs need a gradient."""
    differentiated = torch.is_grad_enabled() and all(t.requires_grad for t in tree.leaves(rows))
    return nullcontext() if differentiated else SlowPath()


def _copied(t: Tensor) -> Tensor:
    return t.clone() if t.is_leaf else t  # models may write to it


def _channels_last(t: Tensor) -> Tensor:
    if t.ndim == 4 and t.dtype == torch.float32:
        return _ChannelsLast.apply(t)  # pyright: ignore[reportReturnType]
    return _copied(t)
