"""Rule sets: which operation follows which rule, as values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from apportion.core import ops
from apportion.core.config import Configurable
from apportion.core.errors import ConfigError, kind_of, nearest
from apportion.core.ops import ELEMENTWISE, LAYERS
from apportion.core.protocols import RulePass
from apportion.core.tree import Tree
from apportion.parts.rules.engine import run
from apportion.parts.rules.rule import Plain, Rule

_PRODUCTS = frozenset(k for k, s in ops.STATUS.items() if s is ops.Status.MULTILINEAR)
GROUPS = ("elementwise", "product", "layer")


@dataclass(frozen=True)
class Rules(Configurable):
    """A rule set: pairs of an operation and its rule.

    The first match counts: an operation by name; then `"layer"` for linear and convolutional layers,
    `"product"` for products of tensors that both carry a signal, `"elementwise"` for functions of one
    element. Operations affine in what carries the signal need no rule: their derivative is right.

    Attributes:
        table: pairs of a name and a rule.
        first: the rule of layers that read the network's input directly, or padded; where none does, a pass is
            refused.
        otherwise: the rule of everything else that is not affine; None refuses it by name.
        last: the rule of the last layers: those behind which no other hands on a signal to them from the score.
        named: rules for single modules: a pattern of their names in the model (`"features.0*"`, as for file
            names), an operation or group, and its rule. They come before all others but `last`. A pass that meets
            one of them nowhere is refused.
        fold: see a layer and the batch-norm right behind it as one layer.
        custom: names of custom autograd functions of the model that may follow their own backward, in passes for
            signals alone; others need the value of each step apart from its signal, which such a function hides.
    """

    table: tuple[tuple[str, Rule], ...] = ()
    first: Rule | None = None
    otherwise: Rule | None = None
    last: Rule | None = None
    named: tuple[tuple[str, str, Rule], ...] = ()
    fold: bool = True
    custom: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_entries("table", self.table, ("an operation",))
        _check_entries("named", self.named, ("a pattern", "an operation"))
        if self.last is not None and (self.last.relevance or self.last.surrogate):
            raise ConfigError(
                f"last={self.last}", "a rule that gives gradients and leaves the forward as it is", "use Epsilon()"
            )
        known = {*ops.STATUS, *ops._ALIASES.values(), *GROUPS}
        for name in (*(n for n, _ in self.table), *(n for _, n, _ in self.named)):
            if name not in known:
                raise ConfigError(
                    f"a rule for {name!r}",
                    f"an operation or one of {GROUPS}; {nearest(name, known)}",
                    "choose one of those names",
                )
            if any(name == other for other in (o for o, r in ops._ALIASES.items() if r != o)):
                raise ConfigError(
                    f"a rule for {name!r}", f"the name {ops._ALIASES[name]!r}, which covers it", "use that name"
                )

    @cached_property
    def by_name(self) -> dict[str, Rule]:
        """The rule of each name in the table."""
        return dict(reversed(self.table))

    def names(self, kinds: Iterable[str]) -> bool:
        """Tell whether there is a rule for one of some operations, by name or by group."""
        known = {*self.by_name, *(name for _, name, _ in self.named)}
        return any(kind in known or _group(kind) in known for kind in kinds)

    @property
    def kind(self) -> Literal["gradient", "relevance"]:
        """What reaches the network's input."""
        given = (self.first, *(r for _, _, r in self.named))
        return "relevance" if any(r is not None and r.relevance for r in given) else "gradient"

    @property
    def surrogate(self) -> bool:
        """Whether a rule replaces the forward."""
        return any(r.surrogate for r in self._all())

    def _all(self) -> list[Rule]:
        given = (*(r for _, r in self.table), *(r for _, _, r in self.named), self.first, self.last, self.otherwise)
        return [r for r in given if r is not None]

    @cached_property
    def looks_back(self) -> bool:
        """Whether a rule asks which calls made its inputs."""
        return any(r.looks_back for r in self._all())

    @cached_property
    def compares(self) -> bool:
        """Whether a rule compares with a reference."""
        return any(r.compares for r in self._all())

    @property
    def scales(self) -> bool:
        """Whether signals may be multiplied on their way back, which few digits need; see `run`."""
        return True

    @property
    def per_example(self) -> bool:
        """Whether a rule must know which elements belong to which example."""
        return any(r.per_example for r in self._all())

    def pick(
        self, op: ops.Op, carrying: Sequence[bool], reads_input: bool, dependent: Sequence[bool] = ()
    ) -> Rule | None:
        """Choose the rule of a call; None for the derivative of an affine one.

        Args:
            op: the operation.
            carrying: for each tensor argument, whether it carries a signal.
            reads_input: whether its first argument is the network's input.
            dependent: for each tensor argument, whether it carries none although it was computed from the
                input, as masks and indices are: such a call follows a rule of its name, or is nonlinear.

        Raises:
            LookupError: neither a rule nor affine.
        """
        return self.choose(op, carrying, reads_input, dependent)[0]

    def choose(
        self, op: ops.Op, carrying: Sequence[bool], reads_input: bool, dependent: Sequence[bool] = (), module: str = ""
    ) -> tuple[Rule | None, str]:
        """Choose as `pick` does, and say why.

        Args:
            op: the operation.
            carrying: as for `pick`.
            reads_input: as for `pick`.
            dependent: as for `pick`.
            module: the name of the module that is running.

        Raises:
            LookupError: nothing fits.
        """
        varies = any(dependent)
        group = self._grouped(op, carrying, varies)
        for pattern, name, rule in self.named:
            if fnmatchcase(module, pattern) and name in (op.kind, group):
                return rule, f"module {pattern!r}"
        if reads_input and self.first is not None and op.kind in LAYERS:
            return self.first, "first layer"
        table = self.by_name
        if op.kind in table:
            return table[op.kind], "by name"
        if group == "layer" and group in table:
            return table[group], group
        if ops.is_affine(op, list(carrying)) and not varies:
            return None, "affine"
        if group in table:
            return table[group], group
        if self.otherwise is None:
            raise LookupError(op.kind)
        return self.otherwise, "otherwise"

    def _grouped(self, op: ops.Op, carrying: Sequence[bool], varies: bool) -> str:
        """Tell to which group a call belongs: as in the table, no matter what it names."""
        if varies:
            return ""
        if op.kind in LAYERS and list(carrying[:2]) != [True, True]:
            return "layer"
        if op.status is ops.Status.MULTILINEAR and sum(carrying) > 1:
            return "product"
        return "elementwise" if op.kind in ELEMENTWISE and not any(carrying[1:]) else ""

    def run(
        self,
        forward: Callable[[Tree], Tensor],
        z: Tree,
        reference: Tree | None,
        *,
        start: Literal["score", "one"] = "score",
        record: bool = False,
        differentiable: bool = False,
        alone: Sequence[torch.Size] | None = None,
        scale: float = 1,
    ) -> RulePass:
        """Send one chunk forward and back; see `Question.backward`."""
        options: dict[str, Any] = {"start": start, "record": record, "differentiable": differentiable}
        return run(self, forward, z, reference, alone=alone, scale=scale, **options)


def _check_entries(option: str, entries: Any, names: tuple[str, ...]) -> None:
    """Insist on tuples of names that end with a rule."""
    expected = f"a tuple of entries ({', '.join(names)}, a rule)"
    example = "(" + ", ".join(['"features.*"', '"relu"'][-len(names) :]) + ", Guided())"
    for entry in entries:
        if not isinstance(entry, tuple | list) or len(entry) != len(names) + 1:
            raise ConfigError(f"{entry!r} in {option}", expected, f"give {option}=({example},), with the last comma")
        *given, rule = entry
        if not all(isinstance(name, str) for name in given):
            raise ConfigError(f"{entry!r} in {option}", expected, f"give names as strings: {example}")
        if not isinstance(rule, Rule):
            what = repr(rule) if isinstance(rule, str | type) else kind_of(rule)
            raise ConfigError(f"{what} as a rule in {option}", "an instance of a rule", f"write {example}")


def _group(kind: str) -> str:
    if kind in LAYERS:
        return "layer"
    return "elementwise" if kind in ELEMENTWISE else "product" if kind in _PRODUCTS else ""


def gradient() -> Rules:
    """The gradient itself: every operation by its own derivative."""
    return Rules(otherwise=Plain())


POOLS: tuple[tuple[str, Rule], ...] = tuple(
    (name, Plain()) for name in ("max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool2d", "max", "amax")
)
"""Pooling by its own derivative: a maximum passes on to the winner."""
