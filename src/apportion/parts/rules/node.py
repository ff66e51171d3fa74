"""An operation in the signal track, and what is told of it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from apportion.core.derivative import is_memory
from apportion.core.errors import ApportionError, RuleError, kind_of
from apportion.core.ops import ELEMENTWISE
from apportion.parts.rules.rule import Call, Rule


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


@runtime_checkable
class Taping(Protocol):
    """What a node must know of its pass."""

    differentiable: bool
    record: list[Record] | None


class Node(torch.autograd.Function):
    """An operation in the signal track."""

    @staticmethod
    def forward(ctx: Any, mode: Taping, rule: Rule, call: Call, output: Any, *signals: Tensor) -> Any:
        ctx.mode, ctx.rule, ctx.call = mode, rule, call
        if callable(output):  # it writes to its only input
            ctx.mark_dirty(*signals)
            output(*signals)
            return signals
        held = [t.data_ptr() for t in call.inputs]
        outs = flatten(output)
        own = mode.differentiable  # there the true output stays in use, and the model may overwrite this one
        fresh = [o.detach().clone() if own or o.data_ptr() in held else o.detach() for o in outs]
        ctx.mark_non_differentiable(*[o for o in fresh if not holds_numbers(o)])
        return tuple(fresh)

    @staticmethod
    def backward(ctx: Any, *received: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        call, rule = ctx.call, ctx.rule
        call.check()
        signal = received[0] if len(received) == 1 else received
        shapes = [t.shape for t in call.inputs]  # rules may let go of them, and some have
        try:
            sent = rule.back(call, signal)
        except Exception as error:
            if isinstance(error, ApportionError) or is_memory(error):
                raise
            raise _raised(rule, "back", call, error) from error
        if shapes:
            _check_sent(rule, call.op.kind, sent, shapes)
        if ctx.mode.record is not None:
            pairs = [(i.detach(), s) for i, s in zip(call.inputs, sent, strict=True) if s is not None]
            for out, arrived in zip(flatten(call.output), received, strict=True):
                if holds_numbers(out):
                    into, back = [i for i, _ in pairs], [s for _, s in pairs]
                    ctx.mode.record.append(Record(call.op.kind, call.module, out.detach(), arrived, into, back))
                    pairs = []
        carried = [s for s, c in zip(sent, call.carrying, strict=True) if c]
        return (None, None, None, None, *carried)


def run_forward(rule: Rule, call: Call) -> Any:
    """Run the forward of a rule, and insist that it gives what an operation may give.

    Raises:
        RuleError: the rule raised something, or gave no tensor, or one of another shape than the operation's.
    """
    if type(rule).forward is Rule.forward:  # the model's own operation, whose errors are the model's
        return rule.forward(call)
    try:
        true = rule.forward(call)
    except Exception as error:
        if isinstance(error, ApportionError) or is_memory(error):
            raise
        raise _raised(rule, "forward", call, error) from error
    if _is_ours(rule):
        return true
    if call.op.kind in ELEMENTWISE and len(call.inputs) == 1:
        wanted = [call.inputs[0].shape]
    else:
        with torch.no_grad():
            wanted = [t.shape for t in flatten(call.fn(*call.inputs))]
    given = [t.shape for t in flatten(true)]
    if given != wanted:
        gave = f"shape {_listed(given)}" if given else f"no tensor but {kind_of(true)}"
        raise RuleError(
            f"the forward of the rule {type(rule).__name__} gave {gave} for {call.op.kind} in {_where(call)}",
            f"what the operation gives, of shape {_listed(wanted)}",
            "return call.fn(*call.inputs), or something of its shape",
        )
    return true


def _raised(rule: Rule, part: str, call: Call, error: Exception) -> RuleError:
    own = _is_ours(rule)
    name = "the derivative" if own else f"the rule {type(rule).__name__}"
    return RuleError(
        f"{name} of {call.op.kind} in {_where(call)} raised {type(error).__name__}: {error}",
        "an operation with a derivative" if own else f"a {part} that runs",
        "leave that operation out of the gradient's way" if own else "try the rule on that operation alone",
    )


def _is_ours(rule: Rule) -> bool:
    return type(rule).__module__.startswith("apportion.")


def _listed(shapes: list[torch.Size]) -> str:
    return " and ".join(str(tuple(s)) for s in shapes)


def _where(call: Call) -> str:
    return call.module or "the model"


def _check_sent(rule: Rule, kind: str, sent: Any, shapes: list[torch.Size]) -> None:
    """Insist that a rule gave each input a signal of its shape, or none."""
    several = isinstance(sent, tuple | list)
    given = sent if several else (sent,)
    if several and len(sent) == len(shapes) and all(map(_fits, sent, shapes)):
        return
    told = [None if s is None else tuple(s.shape) if isinstance(s, Tensor) else type(s).__name__ for s in given]
    raise RuleError(
        f"the rule {type(rule).__name__} sent {told if several else 'what is no tuple'} back through {kind}",
        f"a tuple of signals (or None) of the shapes of its inputs, {[tuple(s) for s in shapes]}",
        "return to_first(call, signal) where the first input alone carries one",
    )


def _fits(signal: Any, shape: torch.Size) -> bool:
    if signal is None or not isinstance(signal, Tensor) or signal.shape == shape:
        return signal is None or isinstance(signal, Tensor)
    try:
        return torch.broadcast_shapes(signal.shape, shape) == signal.shape  # autograd sums what was broadcast
    except RuntimeError:
        return False


def holds_numbers(t: Tensor) -> bool:
    """Whether entries are real or complex numbers, not indices or truth values."""
    return t.is_floating_point() or t.is_complex()


def carries(t: Tensor) -> bool:
    """Whether a signal will come back to this tensor."""
    # a leaf is a weight that a plain callable closes over: it does not depend on the input
    return t.requires_grad and not t.is_leaf


def flatten(value: Any) -> list[Tensor]:
    """List the tensors of nested arguments, in order."""
    if isinstance(value, Tensor):
        return [value]
    found: list[Tensor] = []
    if isinstance(value, tuple | list | dict):
        _collect(value, found)
    return found


def _collect(held: Any, found: list[Tensor]) -> None:
    for v in held.values() if isinstance(held, dict) else held:
        if isinstance(v, Tensor):
            found.append(v)
        elif isinstance(v, (tuple, list, dict)):
            _collect(v, found)


def substitute(value: Any, new: Any) -> Any:
    """Put others in place of the tensors of nested arguments.

    Args:
        value: the arguments.
        new: an iterator over what stands there instead.
    """
    if isinstance(value, Tensor):
        return next(new)
    if isinstance(value, dict):
        return {k: substitute(v, new) for k, v in value.items()}
    if isinstance(value, tuple | list) and not isinstance(value, torch.Size):
        made = [substitute(v, new) for v in value]
        return type(value)(made) if type(value) in (tuple, list) else _rebuilt(value, made)
    return value


def _rebuilt(value: Any, made: list[Any]) -> Any:
    """Rebuild a named tuple: torch's take a sequence, Python's one argument a field."""
    return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)


class Places:
    """Names the module that is running, from the frames above the one that made this."""

    def __init__(self, above: FrameType) -> None:
        """Remember where the model's frames begin.

        Args:
            above: the frame of the running function that will call the model.
        """
        self._end = id(above)
        self.names: dict[int, str] = {}
        self.others: dict[str, int] = {}  # further names of modules that have several

    def here(self) -> tuple[str, str]:
        """Give the innermost module's name and class; empty where none runs."""
        inner, outer = self._running()
        if inner is None or outer is None:
            return "", ""
        if id(inner) not in self.names:
            self.names |= {id(m): n for n, m in outer.named_modules()}
            every = outer.named_modules(remove_duplicate=False)
            self.others |= {n: id(m) for n, m in every if self.names[id(m)] != n}
        return self.names.get(id(inner), ""), type(inner).__name__

    def __call__(self) -> str:
        """Describe the innermost module for messages."""
        name, kind = self.here()
        return f"{name or 'the top module'} ({kind})" if kind else ""

    def _running(self) -> tuple[nn.Module | None, nn.Module | None]:
        inner: nn.Module | None = None
        outer: nn.Module | None = None
        frame: FrameType | None = sys._getframe(2)
        while frame is not None and id(frame) != self._end:
            if "self" in frame.f_code.co_varnames[:1]:
                holder = frame.f_locals.get("self")
                if isinstance(holder, nn.Module):
                    inner, outer = inner or holder, holder
            frame = frame.f_back
        return inner, outer
