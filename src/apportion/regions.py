"""Regions: how far an example is from its baseline, counted in linear pieces of the network.

A network of ReLUs, max-pools and affine layers is linear on each of many regions of its input space. Where x and
x' share one, gradient methods agree on the path between; where they do not, what lies between decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.core import tree
from apportion.core.attribution import Cost
from apportion.core.config import whole
from apportion.core.errors import ConfigError, ModelError, NonFiniteError, kind_of
from apportion.core.explainer import Passes
from apportion.core.field import Field
from apportion.core.pieces import Pieces, places
from apportion.core.question import Question
from apportion.core.score import Target
from apportion.core.tree import Tree
from apportion.parts.baselines import Baseline, Given


@dataclass(frozen=True, eq=False)
class Operation:
    """The units of one call of a piecewise-linear operation.

    Attributes:
        name: the module it runs in, as the site listing names it; "the score" behind the model, "" without modules.
        kind: the operation, the same for every spelling.
        call: which one of its kind in that module, in one forward pass.
        units: how many units it has for one example.
        changed: how many of them lie on another piece at the baseline.
    """

    name: str
    kind: str
    call: int
    units: int
    changed: Int[Tensor, "B k"]

    @property
    def share(self) -> Float[Tensor, "B k"]:
        """The share of these units on another piece, from 0 to 1."""
        return self.changed.double() / max(self.units, 1)

    @property
    def label(self) -> str:
        """Name, kind and, from the second on, the call."""
        call = f"[{self.call}]" if self.call else ""
        return f"{self.name} {self.kind}{call}".strip()


@dataclass(frozen=True, eq=False, repr=False)
class Regions:
    """What `regions` found, for each example and each of its k baselines.

    Attributes:
        share: the share of all units that lie on another linear piece at x' than at x, from 0 to 1.
        operations: the same by operation, in the order of the forward pass.
        crossings: pieces changed within each interval of the line, in order from x' to x; None if not asked.
        units: how many units one example has in all.
        other: operations that are no choice between linear pieces (sigmoid, softmax, products), or are not known,
            with their calls; where there are any, pieces are no regions of linearity.
        cost: rows spent.
        warnings: what deserves a look.
    """

    share: Float[Tensor, "B k"]
    operations: tuple[Operation, ...]
    crossings: Int[Tensor, "B k n"] | None
    units: int
    other: Mapping[str, int]
    cost: Cost
    warnings: tuple[str, ...] = field(default=())

    @property
    def piecewise_linear(self) -> bool:
        """Whether all that was seen is affine or a choice between affine pieces, so that pieces are regions."""
        return not self.other

    @property
    def linear(self) -> Bool[Tensor, "B k"]:
        """Whether the score is known to be affine from x' to x: no unit changes, and the network has only pieces."""
        changed = sum((o.changed for o in self.operations), torch.zeros_like(self.share, dtype=torch.long))
        return (changed == 0) & self.piecewise_linear

    @property
    def crossings_per_unit(self) -> Float[Tensor, "B k"] | None:
        """How often a unit changes its piece on the way, on average; None if the line was not walked."""
        return None if self.crossings is None else self.crossings.sum(-1).double() / max(self.units, 1)

    @property
    def note(self) -> str:
        """What to bear in mind about operations without linear pieces, in a sentence; empty if there are none."""
        if not self.other:
            return ""
        listed = ", ".join(f"{name} ({calls})" for name, calls in self.other.items())
        return f"not piecewise linear, or not known: {listed}; pieces here are not regions of linearity"

    def __repr__(self) -> str:
        batch, k = self.share.shape
        lines = [
            f"Regions of {batch} example(s), {k} baseline(s) each: "
            f"{self.units:,} units in {len(self.operations)} operation(s)",
            f"  on another piece at the baseline: {_range(self.share)} of the units",
        ]
        if self.operations:
            most = max(self.operations, key=lambda o: float(o.share.mean()))
            lines.append(f"  most in {most.label}: {_range(most.share)}")
        if self.crossings is not None and (each := self.crossings_per_unit) is not None:
            where = int(self.crossings.sum((0, 1)).argmax())
            n = self.crossings.shape[-1]
            lines.append(f"  crossings per unit on the line: {float(each.mean()):.3g}; most in interval {where} of {n}")
        lines += [f"  {line}" for line in (self.note, *self.warnings) if line]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Give everything as plain numbers, lists and strings, ready for JSON."""
        return {
            "share": self.share.tolist(),
            "operations": [
                {"name": o.name, "kind": o.kind, "call": o.call, "units": o.units, "share": o.share.tolist()}
                for o in self.operations
            ],
            "crossings": None if self.crossings is None else self.crossings.tolist(),
            "units": self.units,
            "other": dict(self.other),
            "piecewise_linear": self.piecewise_linear,
            "linear": self.linear.tolist(),
            "cost": {
                "forward": self.cost.forward.tolist(),
                "backward": self.cost.backward.tolist(),
                "at_x": self.cost.at_x.tolist(),
                "checks": self.cost.checks,
            },
            "warnings": list(self.warnings),
        }


def regions(
    field: Field,
    x: Tree,
    baseline: Baseline | Tree,
    *,
    target: Target = None,
    along: int = 0,
    ids: Sequence[Any] | None = None,
    seed: int = 0,
) -> Regions:
    """Count the units of a network that lie on another linear piece at the baseline than at the example.

    A unit u has pieces numbered c_u(·): two for a ReLU, three for a ReLU6, as many as entries for a max-pool.
    share = |{u : c_u(x) ≠ c_u(x')}| / |{u}|. With z_i = x' + (i/n)(x - x'), the crossings of interval i are
    |{u : c_u(z_i) ≠ c_u(z_{i+1})}|; a unit that leaves and returns within one interval is not seen. Each piece
    is convex, so a share of 0 in a piecewise-linear network means that f is affine all the way: the condition of
    Proposition 2 of Akhtar and Jalwana, "Towards credible visual model interpretation with path attribution",
    ICML 2023.

    All units that depend on the field's site count, also those the score does not read. Per example and baseline
    it takes max(along, 1) + 2 rows forward, besides what making the baseline costs.

    Args:
        field: what is asked of which model.
        x: examples on the first axis.
        baseline: the points x': one of `ap.baselines`, or a tensor as `ap.baselines.Given` takes it.
        target: as in `Field.bind`; matters where the score itself has pieces.
        along: into how many intervals to cut the line from x' to x; 0 compares the ends only.
        ids: names of the examples, which key random baselines.
        seed: of random baselines.

    Returns:
        Shares (from 0 to 1) and counts of units.

    Raises:
        ConfigError: not a field, or an impossible number of intervals.
        BaselineError: a baseline that does not fit.
        ModelError: operations that change with the input, or cannot be seen, as in TorchScript.
        NonFiniteError: the score is NaN or infinite at an end or on the line.

    >>> field = Field(lambda x: torch.relu(x).sum(1, keepdim=True))
    >>> found = regions(field, torch.tensor([[1.0, 1.0]]), torch.tensor([[-1.0, 2.0]]), along=4)
    >>> found.share.tolist(), found.crossings.tolist()
    ([[0.5]], [[[0, 0, 1, 0]]])
    """
    if not isinstance(field, Field):
        raise ConfigError(f"{kind_of(field)} as field", "an ap.Field", "write regions(ap.Field(model), x, baseline)")
    number = whole(along)
    if number is None or number < 0:
        raise ConfigError(f"along={along!r}", "a whole number from 0", "give the number of intervals, or 0 for none")
    with torch.inference_mode(False):
        q = field.bind(x, target=target, ids=ids, seed=seed)
        _check_visible(q)
        rows = q.references(Given(baseline) if _is_values(baseline) else baseline).rows
        return _count(q, rows, number)


def recorded(q: Question, rows: Tree, intervals: int) -> dict[str, Tree]:
    """Count linear pieces for the result of a method; see `regions`.

    A model whose pieces cannot be counted gets a warning in place of the parts, one without any gets neither.

    Args:
        q: the question, on whose account the rows are.
        rows: the baselines [B, k, ...].
        intervals: as `along` of `regions`; 0 to count nothing.

    Returns:
        "other_piece_share" [B, k], and for several intervals "crossings" [B, k, intervals].
    """
    if not intervals:
        return {}
    try:
        _check_visible(q)
        found = _count(q, rows, intervals)
    except (ModelError, NonFiniteError) as error:
        q.warn(f"linear pieces were not counted: {error.given}")
        return {}
    if not found.units:
        return {}
    parts: dict[str, Tree] = {"other_piece_share": found.share.to(q.fx)}
    if found.crossings is not None and intervals > 1:
        parts["crossings"] = found.crossings.to(q.device)
    return parts


def recording(passes: Passes, lines: int, intervals: int) -> Passes:
    """Add what `recorded` takes; a model it refuses takes less, so that the sum is at most."""
    if not intervals:
        return passes
    return passes._replace(forward=passes.forward + lines * (intervals + 1), exact=False)


def _is_values(baseline: Any) -> bool:
    """Tell tensors, and trees of them, from parts."""
    return isinstance(baseline, Tensor | Mapping | tuple | list)


def _check_visible(q: Question) -> None:
    module = q.field.twin().module
    if module is not None and any(isinstance(m, torch.jit.ScriptModule) for m in module.modules()):
        raise ModelError(
            "a TorchScript module, whose operations cannot be seen", "an eager module", "pass the original"
        )


@dataclass
class _Listing:
    """The piecewise-linear operations of one forward pass: kind, place and shape of each; and the others."""

    seen: list[tuple[str, str, tuple[int, ...]]]
    other: Mapping[str, int]


def _list(q: Question, count: int) -> list[_Listing]:
    """List the operations when the first example stands there `count` times; several lists if they did not fit."""
    where = places(q.field.twin().module)

    def body(forward: Any, part: Tree, own: Tensor) -> _Listing:
        seen: list[tuple[str, str, tuple[int, ...]]] = []
        watch = Pieces(lambda kind, code: seen.append((kind, where(), tuple(code.shape))))
        with torch.no_grad(), watch:
            value = forward(watch.follow(part), own)
        if not watch.sees(value):
            raise ModelError(
                "no operation that leads from the input to the score could be seen",
                "a model of torch operations, whose score depends on the input",
                "look for NumPy, custom autograd functions or compiled parts in the model",
            )
        return _Listing(seen, dict(watch.other))

    first = torch.zeros(count, dtype=torch.long, device=q.device)
    return q.observe(body, tree.index(q.x, first), first, 0)


def _row_axes(one: _Listing, two: _Listing) -> list[int] | None:
    """Find on which axis of each operation's units the rows lie; None where one folds them into another axis."""
    axes = []
    for (_, _, alone), (_, _, both) in zip(one.seen, two.seen, strict=True):
        axis = [i for i, (a, b) in enumerate(zip(alone, both, strict=False)) if a != b]
        if len(alone) != len(both) or len(axis) != 1 or (alone[axis[0]], both[axis[0]]) != (1, 2):
            return None
        axes += axis
    return axes


def _count(q: Question, references: Tree, along: int) -> Regions:
    """Compare codes at the points of all lines, in chunks of rows that hold both ends of each."""
    batch, k, steps = len(q), tree.leaves(references)[0].shape[1], max(along, 1)
    (listed,) = _list(q, 1)
    axes = None
    if q.field.chunk > 1 and batch * k > 1:
        pair = _list(q, 2)
        same = len(pair) == 1 and [s[:2] for s in pair[0].seen] == [s[:2] for s in listed.seen]
        axes = _row_axes(listed, pair[0]) if same else None
    sizes = [torch.Size(shape).numel() for _, _, shape in listed.seen]
    changed = torch.zeros(len(sizes), batch, k, dtype=torch.long)
    crossings = torch.zeros(steps, batch, k, dtype=torch.long)

    def body(forward: Any, pair: tuple[Tree, Tree], own: Tensor) -> tuple[Tensor, Tensor]:
        count = len(own)
        if count > 1 and axes is None:  # where rows cannot be told apart, one at a time
            apart = [body(forward, tree.index(pair, slice(i, i + 1)), own[i : i + 1]) for i in range(count)]
            return torch.cat([a for a, _ in apart], -1), torch.cat([b for _, b in apart], -1)
        start: list[Tensor] = []
        last: list[Tensor] = []
        between = torch.zeros(steps, count, dtype=torch.long, device=own.device)
        ends = torch.zeros(len(sizes), count, dtype=torch.long, device=own.device)
        for step in range(steps + 1):
            seen = 0

            def take(kind: str, code: Tensor, step: int = step) -> None:
                nonlocal seen
                at, seen = seen, seen + 1
                before = last[at : at + 1]
                if at >= len(sizes) or kind != listed.seen[at][0] or code.numel() != count * sizes[at]:
                    raise _branches(kind)
                if not step:
                    last.append(code)
                    start.append(code)
                    return
                if before[0].shape != code.shape:
                    raise _branches(kind)
                axis = axes[at] if axes is not None and count > 1 else None
                between[step - 1] += _per_row(code != before[0], axis)
                if step == steps:
                    ends[at] = _per_row(code != start[at], axis)
                last[at] = code

            watch = Pieces(take)
            with torch.no_grad():
                points = tree.apply(lambda x, r, t=step / steps: x if t == 1 else r + t * (x - r), *pair)
                with watch:
                    forward(watch.follow(points), own)
            if seen != len(sizes):
                raise _branches("nothing more")
        return ends, between

    for draw, owner in q.grid(k, "regions"):
        ends = tree.index(q.x, owner)
        starts = tree.index(references, (owner, draw))
        found = q.observe(body, (ends, starts), owner, steps + 1)
        at = (slice(None), owner.cpu(), draw.cpu())
        changed[at] = torch.cat([f[0] for f in found], -1).cpu()
        crossings[at] = torch.cat([f[1] for f in found], -1).cpu()
    calls: dict[tuple[str, str], int] = {}
    operations = []
    for (kind, name, _), units, moved in zip(listed.seen, sizes, changed, strict=True):
        call = calls[name, kind] = calls.get((name, kind), -1) + 1
        operations.append(Operation(name, kind, call, units, moved))
    units = sum(sizes)
    return Regions(
        share=changed.sum(0).double() / max(units, 1),
        operations=tuple(operations),
        crossings=crossings.permute(1, 2, 0).contiguous() if along else None,
        units=units,
        other=listed.other,
        cost=q.cost,
        warnings=q.warnings,
    )


def _per_row(differs: Tensor, axis: int | None) -> Tensor:
    """Count what differs in each row; in the only one without an axis."""
    return differs.sum() if axis is None else differs.movedim(axis, 0).flatten(1).sum(1)


def _branches(kind: str) -> ModelError:
    return ModelError(
        f"the operations of a forward pass change with the input: {kind}, where the first example had another one",
        "the same operations, on the same shapes, at every point",
        "choose a baseline for which the model branches alike, or compare the branches one by one",
    )


def _range(share: Tensor) -> str:
    low, high = 100 * float(share.min()), 100 * float(share.max())
    return f"{low:.3g} %" if low == high else f"{low:.3g} to {high:.3g} %"
