"""The path a model takes: which operations it runs, with which numbers and constants, in the pass of the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from apportion.core.errors import RuleError


@dataclass(frozen=True, eq=False)
class _Step:
    kind: str
    numbers: tuple[Any, ...]
    constants: list[Tensor]
    versions: list[int]

    def agrees(self, constants: list[Tensor]) -> bool:
        """Tell whether constants are the step's; those that the model has overwritten since tell nothing."""
        return len(constants) == len(self.constants) and all(
            t._version != version or _same(t, other)
            for t, version, other in zip(self.constants, self.versions, constants, strict=True)
        )


class Path:
    """Remembers the steps of the reference's pass, and refuses an input for which the model takes others.

    Tensors computed from the input, and their number of rows, are not its matter.
    """

    def __init__(self) -> None:
        """Start at the first step."""
        self._steps: list[_Step] = []
        self._at = 0

    def take(self, kind: str, args: Any, kwargs: Any, constants: list[Tensor]) -> None:
        """Remember a step of the reference's pass.

        Args:
            kind: the operation.
            args: its positional arguments.
            kwargs: its named ones.
            constants: those of its tensors that were not computed from the input.
        """
        versions = [t._version for t in constants]
        self._steps.append(_Step(kind, tuple(_numbers(args, kwargs)), constants, versions))

    def follow(
        self, kind: str, args: Any, kwargs: Any, constants: list[Tensor], where: Callable[[], str], *, numbers: bool
    ) -> None:
        """Compare a step with the reference's.

        Args:
            kind: as for `take`.
            args: as for `take`.
            kwargs: as for `take`.
            constants: as for `take`.
            where: the place in the model, for the message.
            numbers: whether numbers have to agree; those taken out of tensors do not.

        Raises:
            RuleError: it is another, of the same kind.
        """
        if self._at >= len(self._steps):
            return
        kept = self._steps[self._at]
        self._at += 1
        if kept.kind != kind:
            return  # said with the operations that have rules
        given = tuple(_numbers(args, kwargs))
        if numbers and given != kept.numbers:
            raise _other(kind, where(), " against ".join(map(str, _apart(given, kept.numbers))))
        if not kept.agrees(constants):
            raise _other(kind, where(), "a constant against another one")

    def forget(self) -> None:
        """Let go of the constants."""
        self._steps.clear()


def _numbers(*held: Any) -> list[Any]:
    """List what is no tensor in nested arguments, those by name in the order of their names."""
    found: list[Any] = []
    for value in held:
        if value is None or isinstance(value, (int, float, str, slice)):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += _numbers(*value)
        elif isinstance(value, dict) and value:
            found += _numbers(*(value[name] for name in sorted(value)))
    return found


def _apart(given: tuple[Any, ...], kept: tuple[Any, ...]) -> tuple[Any, Any]:
    """Give the first two numbers that differ, or all."""
    pairs = zip(given, kept, strict=False)
    return next(((a, b) for a, b in pairs if a != b), (given, kept))


def _same(a: Tensor, b: Tensor) -> bool:
    if a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()):
        return True
    if a.shape != b.shape:
        return False
    return torch.equal(a, b) or (a.is_floating_point() and torch.equal(a.nan_to_num(), b.nan_to_num()))


def _other(kind: str, where: str, what: str) -> RuleError:
    return RuleError(
        f"input and reference took different paths: {kind} in {where} with {what}",
        "the same operations with the same numbers and constants on both",
        "choose a baseline for which the model branches alike",
    )
