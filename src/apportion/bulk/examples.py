"""Data as batches of examples, each with its targets, truths and names, however users hold them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apportion.core import tree
from apportion.core.attribution import Attribution, Cost, Domain
from apportion.core.config import Configurable, digest, to_config
from apportion.core.errors import ConfigError, InputError, kind_of
from apportion.core.score import Target
from apportion.core.streams import content_ids, plain_id
from apportion.core.tree import Tree
from apportion.parts.batches import as_integers, batches

_NAMES: tuple[str, ...] = ("x", "target", "truth", "ids")
_LABELS = {"label", "labels", "target", "targets"}


@dataclass(frozen=True, eq=False)
class Batch:
    """Some examples, and what is known of each.

    Attributes:
        start: how many examples came before.
        x: the examples.
        target: the outputs explained, as `Field.bind` takes them.
        truth: what metrics compare with; by the name of the metric where that differs.
        ids: their names.
    """

    start: int
    x: Tree
    target: Target
    truth: Any
    ids: tuple[Any, ...]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def rows(self) -> slice:
        """Where they lie among all examples."""
        return slice(self.start, self.start + len(self))

    def part(self, rows: slice) -> Batch:
        """Take some of them."""
        return Batch(
            self.start + rows.indices(len(self))[0],
            tree.index(self.x, rows),
            taken(self.target, rows),
            taken_truth(self.truth, rows),
            self.ids[rows],
        )

    def fingerprint(self) -> dict[str, Any]:
        """Say what they are: equal for equal examples, targets and truths."""
        return {
            "x": [content_ids(self.x), [list(t.shape[1:]) for t in tree.leaves(self.x)]],
            "ids": to_config(self.ids),
            "target": mark(self.target),
            "truth": mark(self.truth),
        }


def examples(
    data: Any, batch: int, target: Target = None, truth: Any = None, ids: Sequence[Any] | None = None
) -> Iterator[Batch]:
    """Go over data in batches of so many examples at most.

    Args:
        data: examples, or an iterable of batches: of x, of pairs (x, labels), which may go on with truths and ids, or
            of dicts with x and any of target, truth and ids.
        batch: the most examples at once.
        target: for all examples, or one for each of all; None for those of the batches.
        truth: one entry for each of all examples, or a dict of such by the name of the metric; likewise.
        ids: one for each of all examples; likewise. A hash of the content where nobody gives any.

    Raises:
        InputError: something that holds no examples, counts that differ, or a thing given twice.

    >>> [len(b) for b in examples(torch.zeros(5, 2), 2)]
    [2, 2, 1]
    """
    start, seen = 0, set()
    if ids is not None and (isinstance(ids, str | bytes) or not isinstance(ids, Iterable)):
        raise InputError(f"ids={ids!r}", "a list of one id an example", "or leave ids out")
    whole = {"target": target, "truth": truth, "ids": ids}
    for held in batches(data, "ap.evaluate(methods, field, x, metrics, target=labels)"):
        own = _parted(held)
        for name, given in whole.items():
            if given is not None and own[name] is not None:
                raise InputError(f"{name} given beside the data and inside it", "one of the two", "leave one out")
        flat = tree.leaves(own["x"])
        bad = [t for t in flat if not isinstance(t, Tensor) or t.ndim == 0]
        if not flat or bad:
            raise InputError(
                f"{kind_of(bad[0]) if bad else 'nothing'} as examples of a batch",
                "tensors with the examples on the first axis",
                "write torch.from_numpy(x)"
                if bad and isinstance(bad[0], np.ndarray)
                else "give batches as x, (x, labels) or {'x': x, 'target': labels, ...}",
            )
        count = len(flat[0])
        span = slice(start, start + count)
        asked = taken(target, span) if own["target"] is None else own["target"]
        truths = taken_truth(truth, span) if own["truth"] is None else own["truth"]
        named = own["ids"] if ids is None else taken(list(ids), span)
        named = content_ids(own["x"]) if named is None else [plain_id(i) for i in named]
        for name, entries in (("target", asked), ("truth", truths), ("ids", named)):
            _check_count(name, entries, count)
        if ids is not None or own["ids"] is not None:
            for name in named:
                if name in seen:
                    raise InputError(
                        f"the id {name!r} for two examples",
                        "one of its own for each of all examples: they key random numbers and the bootstrap",
                        "name examples by their files or positions, or leave ids out",
                    )
                seen.add(name)
        one = Batch(start, own["x"], asked, truths, tuple(named))
        for i in range(0, count, batch):
            yield one.part(slice(i, i + batch))
        start += count
    for name, given in whole.items():
        for entries in given.values() if name == "truth" and isinstance(given, Mapping) else (given,):
            total = _count(entries)
            if total is not None and total != start:
                raise InputError(f"{total} entries of {name} for {start} example(s)", "one each", f"check {name}")


def length(data: Any) -> int | None:
    """Count the examples, where that takes no reading of them."""
    if isinstance(data, Tensor | Mapping | tuple):
        return len(tree.leaves(_parted(data)["x"])[0])
    if isinstance(data, list):
        return sum(len(tree.leaves(_parted(b)["x"])[0]) for b in data)
    held = getattr(data, "dataset", None)
    sized = held is not None and hasattr(held, "__len__") and not getattr(data, "drop_last", False)
    return len(held) if sized else None  # pyright: ignore[reportArgumentType]


def _parted(held: Any) -> dict[str, Any]:
    """Tell apart what a batch holds."""
    nothing: dict[str, Any] = dict.fromkeys(_NAMES)
    if isinstance(held, Mapping) and "x" in held and set(held) <= set(_NAMES):
        return nothing | dict(held)
    named = {k for k, v in held.items() if isinstance(k, str)} if isinstance(held, Mapping) else set()
    labels = {k for k in named if k in _LABELS or (k == "y" and as_integers(held[k]) is not None)}
    if told := sorted(labels):
        raise InputError(
            f"a dict of {', '.join(map(repr, held))}, with {told[0]!r} among the inputs",
            "x, and beside it target, truth or ids",
            "write {'x': examples, 'target': labels}; {'x': {...}} for a model that takes all of it",
        )
    if isinstance(held, tuple | list) and 2 <= len(held) <= len(_NAMES) and isinstance(held[0], Tensor):
        labels = as_integers(held[1]) if held[1] is not None else None
        if held[1] is None or (labels is not None and len(labels) == len(held[0])):
            return nothing | dict(zip(_NAMES, (held[0], labels, *held[2:]), strict=False))
        second = held[1]
        one_each = isinstance(second, Tensor) and second.ndim and second.numel() == len(second) == len(held[0])
        if one_each and labels is None and as_integers(second.flatten()) is not None:
            raise InputError(
                f"{second.dtype} of shape {tuple(second.shape)} beside x",
                f"labels of shape ({len(second)},)",
                "give batches as (x, y.flatten())",
            )
        if one_each and second.is_floating_point() and held[0].ndim > 1:
            raise InputError(
                f"{second.dtype} of shape {tuple(second.shape)} beside x",
                "whole numbers as labels, or nothing: a regression has no classes",
                "give batches as {'x': x}; as {'x': (x, y)} where the model takes both",
            )
    return nothing | {"x": held}


def _count(entries: Any) -> int | None:
    """Count entries of examples; None where one thing is for all."""
    if isinstance(entries, Tensor | np.ndarray):
        return len(entries) if entries.ndim else None
    if isinstance(entries, Attribution):
        return len(entries)
    if isinstance(entries, tuple):  # as a target, one index into several axes
        return None
    return len(entries) if isinstance(entries, Sequence) and not isinstance(entries, str | bytes) else None


def _check_count(name: str, entries: Any, count: int) -> None:
    for one in entries.values() if name == "truth" and isinstance(entries, Mapping) else (entries,):
        found = _count(one)
        if found is not None and found != count:
            raise InputError(f"{found} {name} for {count} example(s)", "one each", f"check {name}")


def taken(entries: Any, rows: slice) -> Any:
    """Take the entries of some examples, or the one thing that is for all."""
    if isinstance(entries, Mapping):
        return {k: taken(v, rows) for k, v in entries.items()}
    if isinstance(entries, Attribution):
        return _taken_maps(entries, rows)
    return entries if _count(entries) is None else entries[rows]


def _taken_maps(a: Attribution, rows: slice) -> Attribution:
    """Take the maps of some examples, without what was made on the way."""
    count = len(a)

    def take(value: Any) -> Any:
        return tree.map_tensors(lambda t: t[rows] if t.ndim and len(t) == count else t, value)

    forward, backward, at_x = (getattr(a.cost, n)[rows] for n in ("forward", "backward", "at_x"))
    return replace(
        a,
        values=tree.index(a.values, rows),
        value=a.value[rows],
        claimed_total=take(a.claimed_total),
        cost=Cost(forward, backward, at_x),
        target=take(a.target),
        parts={},
        references=None,
        groups=take(a.groups) if a.domain is Domain.GROUPS else a.groups,
    )


def taken_truth(truth: Any, rows: slice) -> Any:
    """Take the truths of some examples, of each metric."""
    if isinstance(truth, Mapping):
        return {k: taken_truth(v, rows) for k, v in truth.items()}
    return truth[rows] if isinstance(truth, tuple) else taken(truth, rows)


def mark(value: Any) -> Any:
    """Write a value as JSON that is equal for equal values, tensors by digest.

    Raises:
        ConfigError: a value of which that cannot be said.

    >>> mark([torch.zeros(2), 1]) == mark([torch.zeros(2), 1])
    True
    """
    if isinstance(value, Tensor | np.ndarray):
        return digest(torch.as_tensor(value))
    if isinstance(value, Attribution):
        return mark(value.values)
    if isinstance(value, Mapping):
        return {str(k): mark(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [mark(v) for v in value]
    if is_dataclass(value) and not isinstance(value, type | Configurable):
        return {f.name: mark(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, bytes):
        return hashlib.blake2b(value, digest_size=16).hexdigest()
    found = to_config(value)
    if isinstance(found, dict) and "callable" in found:
        raise ConfigError(
            f"{kind_of(value)} among the data",
            "numbers, strings, tensors, and lists, dicts or dataclasses of these, which can be compared when resuming",
            "give such, or leave out=None",
        )
    return found
