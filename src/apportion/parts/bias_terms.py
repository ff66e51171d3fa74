"""What biases contribute to a score: for each operation its output less its derivative times its input.

Along the gradient's way back, Σ signal ⊙ output - Σ sent ⊙ input is 0 for an operation that is homogeneous of
degree 1 (ReLU, pooling, convolution without bias) and its bias's share of the score otherwise. The sum of these
terms and of gradient × input is the score, whatever the network.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.core import ops, tree
from apportion.core.protocols import Backward, Owner, RulePass
from apportion.core.question import Question
from apportion.core.tree import Tree
from apportion.parts.rules import engine, mode
from apportion.parts.rules.node import Places
from apportion.parts.rules.rule import Call, Rule, Signals
from apportion.parts.rules.table import Rules

_CASTS = frozenset({"to", "type", "type_as"})
_NOISE = 1e3
"""Multiples of the rounding error of its operands below which a difference counts as 0."""


class Term(NamedTuple):
    """A bias term, of one operation or of a module.

    Attributes:
        module: where it ran.
        value: one number per row.
        noise: Σ |signal ⊙ output| + Σ |sent ⊙ input|, times the relative rounding error of the numbers there.
    """

    module: str
    value: Float[Tensor, " R"]
    noise: Float[Tensor, " R"]


class Terms(NamedTuple):
    """Score, gradient × input and bias terms of some rows.

    Attributes:
        value: the score.
        input: gradient × input, at the network's own input.
        layers: for each module the sum of its operations' terms, in the order of the pass; those that are 0 but
            for rounding are left out.
        rest: what is missing: score - gradient × input - all terms.
        noise: the scale of rounding errors, which `rest` is to be compared with.
    """

    value: Float[Tensor, " R"]
    input: Tree
    layers: dict[str, Float[Tensor, " R"]]
    rest: Float[Tensor, " R"]
    noise: Float[Tensor, " R"]


def bias_terms(q: Question, rows: Tree, owner: Owner) -> Terms:
    """Split the score of each row into gradient × input and the bias terms of the layers.

    Rows that operations mix up, as in a model that works with time on its first axis, are asked about again, one
    by one. A remainder that stays is recorded as a warning: an operation outside the vocabulary ran unseen.
    """
    found = _terms(q, rows, owner)
    bad = _missing(found).nonzero()[:, 0].tolist()
    if bad and len(owner) > 1:
        found = _put(found, bad, [_terms(q, tree.index(rows, slice(i, i + 1)), owner[i : i + 1]) for i in bad])
        bad = _missing(found).nonzero()[:, 0].tolist()
    found = found._replace(layers={n: v.to(found.value.dtype) for n, v in found.layers.items()})
    if bad:
        worst = float(found.rest.abs().max())
        q.warn(f"bias terms and gradient × input miss the score by up to {worst:.2g}: an operation ran unseen")
    return found


def _missing(found: Terms) -> Tensor:
    return found.rest.abs() > 10 * _NOISE * found.noise


def _terms(q: Question, rows: Tree, owner: Owner) -> Terms:
    done = q.backward(rows, owner, _BiasRules())
    at_input, each = tree.total(tree.apply(wide, done.relevance)), _by_module(done)
    value = wide(done.value)
    rest = value - at_input - sum((t.value for t in each), torch.zeros_like(value))
    noise = sum((t.noise for t in each), torch.finfo(done.value.dtype).eps * (at_input.abs() + value.abs()))
    layers = {t.module: t.value for t in each if bool((t.value.abs() > _NOISE * t.noise).any())}
    return Terms(done.value, done.relevance, layers, rest, noise)


def _by_module(done: Backward) -> list[Term]:
    """Sum over the operations of each module; chunks may have taken different ways."""
    chunks: list[dict[str, tuple[Tensor, Tensor]]] = []
    for tape in done.tape:
        sums: dict[str, tuple[Tensor, Tensor]] = {}
        for t in cast(list[Term], tape):
            value, noise = sums.get(t.module, (0, 0))
            sums[t.module] = (value + t.value, noise + t.noise)
        chunks.append(sums)
    counts = [len(next(iter(sums.values()))[0]) for sums in chunks if sums]
    if len(counts) != len(chunks):  # nothing but views: no bias anywhere
        return []
    none = [(wide(done.value.new_zeros(n)), wide(done.value.new_zeros(n))) for n in counts]
    names = dict.fromkeys(name for sums in chunks for name in sums)

    def joined(name: str, which: int) -> Tensor:
        return torch.cat([sums.get(name, zero)[which] for sums, zero in zip(chunks, none, strict=True)])

    return [Term(name, joined(name, 0), joined(name, 1)) for name in names]


def _put(found: Terms, at: Sequence[int], single: Sequence[Terms]) -> Terms:
    """Put rows that were asked about alone in their places."""
    names = dict.fromkeys([*found.layers, *(n for s in single for n in s.layers)])
    layers = {n: found.layers.get(n, torch.zeros_like(found.rest)).clone() for n in names}
    rest, noise = found.rest.clone(), found.noise.clone()
    for i, one in zip(at, single, strict=True):
        rest[i], noise[i] = one.rest[0], one.noise[0]
        for name, value in layers.items():
            value[i] = one.layers[name][0] if name in one.layers else 0
    return found._replace(layers=layers, rest=rest, noise=noise)


@dataclass(frozen=True)
class _BiasRules:
    """The gradient, and on the way each operation's bias term on the tape."""

    kind: Literal["gradient"] = "gradient"
    surrogate: bool = False

    def run(
        self,
        forward: Callable[[Tree], Tensor],
        z: Tree,
        reference: Tree | None,
        *,
        start: Literal["score", "one"] = "score",
        record: bool = False,
        differentiable: bool = False,
    ) -> RulePass:
        meter = _Meter(tree.rows(z), Places(sys._getframe()), tree.leaves(z)[0].dtype)
        done = engine.run(Seen(otherwise=meter), forward, z, None, start=start, record=False, differentiable=False)
        return done._replace(tape=meter.terms)


@dataclass(frozen=True)
class Seen(Rules):
    """One rule for every operation but views, which have no bias; a change of type rounds, and is no view."""

    fold: bool = False

    def choose(
        self, op: ops.Op, carrying: Sequence[bool], reads_input: bool, dependent: Sequence[bool] = (), module: str = ""
    ) -> tuple[Rule | None, str]:
        return (None, "a view") if op.kind in mode.VIEWS - _CASTS else (self.otherwise, "by its derivative")


class _Meter(Rule):
    """Measures the bias term of each operation, and forgets the operation."""

    def __init__(self, rows: int, where: Places, dtype: torch.dtype) -> None:
        super().__init__()
        self.rows, self.where, self.dtype = rows, where, torch.promote_types(dtype, torch.float32)
        self.order: WeakKeyDictionary[Call, int] = WeakKeyDictionary()
        self.names: list[str] = []
        self.found: dict[int, tuple[Tensor, Tensor]] = {}

    def forward(self, call: Call) -> Any:
        self.order[call] = len(self.names)
        self.names.append(self.where() or "outside modules")
        return super().forward(call)

    def back(self, call: Call, signal: Any) -> Signals:
        out, sent = through(call, signal)
        arrived = [signal] if isinstance(signal, Tensor) else list(signal)
        value, size = cast(Any, 0), cast(Any, 0)
        pairs = [(1, a, o) for a, o in zip(arrived, out, strict=True) if o.is_floating_point()]
        for sign, a, t in (*pairs, *((-1, b, i) for b, i in zip(sent, call.inputs, strict=True) if b is not None)):
            term = product(a.to(self.dtype), t.to(self.dtype))  # one at a time: the largest tensors of the pass
            value = value + sign * by_row(term, self.rows)
            size = size + by_row(term.abs_(), self.rows)
        eps = max(torch.finfo(t.dtype).eps for t in (*out, *call.inputs) if t.is_floating_point())
        self.found[self.order[call]] = (value, eps * size)
        call.inputs = []  # nobody needs them any more
        return sent

    @property
    def terms(self) -> list[Term]:
        """What was found, in the order of the pass; operations that no signal reached have none."""
        return [Term(self.names[i], *self.found[i]) for i in sorted(self.found)]


def through(call: Call, signal: Any) -> tuple[list[Tensor], Signals]:
    """Run an operation, and send a signal back by its derivative."""
    with torch.enable_grad():
        full = [p.detach().requires_grad_(c) for p, c in zip(call.inputs, call.carrying, strict=True)]
        out = tree.tensors(call.fn(*full))
        arrived = [signal] if isinstance(signal, Tensor) else list(signal)
        pairs = [(o, s) for o, s in zip(out, arrived, strict=True) if s is not None and o.requires_grad]
        wanted = [p for p, c in zip(full, call.carrying, strict=True) if c]
        found: Sequence[Tensor | None] = [None] * len(wanted)
        if pairs:
            found = torch.autograd.grad([o for o, _ in pairs], wanted, [s for _, s in pairs], allow_unused=True)
    it = iter(found)
    return [o.detach() for o in out], tuple(next(it) if c else None for c in call.carrying)


def wide(t: Tensor) -> Tensor:
    """Sums of many terms that nearly cancel need all digits there are."""
    return t if t.device.type == "mps" else t.double()


def product(signal: Tensor, value: Tensor) -> Tensor:
    """Multiply; a signal of 0 makes 0 of masked scores too, which are -inf."""
    return torch.where(signal == 0, 0, signal * value)


def by_row(t: Tensor, rows: int) -> Float[Tensor, " R"]:
    """Sum over all but the axis of the rows: the first that has as many entries, or rows before other things.

    That is a guess, which `bias_terms` verifies by the sum of each row. A single row is everything.
    """
    wider = t.dtype if t.device.type == "mps" else torch.float64
    if rows == 1:
        return t.sum(dtype=wider).reshape(1)
    axes = [a for a, n in enumerate(t.shape) if n == rows]
    if not axes:
        axes = [a for a, n in enumerate(t.shape) if n % rows == 0][:1]
        if not axes:
            return (t.sum(dtype=wider) / rows).expand(rows)
        t = t.unflatten(axes[0], (rows, -1))
    others = [a for a in range(t.ndim) if a != axes[0]]
    return t.sum(others, dtype=wider) if others else t.to(wider)
