"""Bound examples: what every question knows of them, their random streams, its accounts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from apportion.core import tree
from apportion.core.attribution import Cost, References
from apportion.core.config import whole
from apportion.core.errors import ConfigError, InputError
from apportion.core.field import Checked, Field
from apportion.core.protocols import Baseline
from apportion.core.runner import Runner
from apportion.core.score import Score, Target
from apportion.core.sharing import Account, Common, Ledger, is_key
from apportion.core.site import Site
from apportion.core.streams import Stream, content_ids, plain_id
from apportion.core.tree import Tree

if TYPE_CHECKING:
    from apportion.core.question import Question
else:
    Question = Any  # made of what is here; shapes are checked at run time in tests

T = TypeVar("T")


class Bound:
    """Examples taken in for a field, before anything is asked of them."""

    def __init__(self) -> None:
        """Made by `Field.bind` and `at` only."""
        self.field: Field
        self.x: Tree
        self.inputs: Tree
        self.target: Tree
        self.asked: Target = None
        self.seed: int
        self.differentiable: bool
        self._ids: Sequence[Any] | None
        self.below: Tree | None = None  # the model's input under an inner site, where it is not the root's
        self._of: Question | None = None  # the root; None for itself, since a cycle would keep it after its use
        self._in_root: Tensor
        self._home: Question | None = None  # for whose rows baselines are made; None for itself
        self._in_home: Tensor
        self._stream: Callable[[str], Stream] | None = None
        self._at_x: Tensor | None = None
        self._runner: Runner
        self._references: dict[Any, tuple[Baseline, References]]
        self._overrides: dict[int, tuple[Score, Tree]] = {}
        self._checks: int
        self._checked: Checked | None = None
        self._compared: list[Any] = []  # rule sets whose signals were held to float32, and how far they were
        self._under_rules: list[dict[str, Any]] = []
        self._reaching: dict[tuple[Site, ...], list[Site]] = {}
        self._memo: dict[Hashable, Any] = {}
        self.lasting: dict[Hashable, Any] = {}
        self._common: Common | None = None
        self._ledger = Ledger("")

    @classmethod
    def begin(
        cls,
        field: Field,
        x: Tree,
        ids: Sequence[Any] | None = None,
        seed: int = 0,
        differentiable: bool = False,
        *,
        any_dtype: bool = False,
    ) -> Question:
        """Take the examples in, before anything is asked of them."""
        number = whole(seed)
        if number is None:
            raise ConfigError(f"seed={seed!r}", "an int", "give a whole number")
        seed = number
        self: Any = cls()
        self.field, self.seed, self.differentiable = field, seed, differentiable
        self.inputs = self.x = field.admit(x, keep_graph=differentiable, any_dtype=any_dtype)
        batch = len(self)
        if ids is not None:
            given: Any = ids.tolist() if isinstance(ids, Tensor | np.ndarray) else ids
            if isinstance(given, str | bytes) or not isinstance(given, Iterable):
                raise InputError(f"ids={ids!r}", "one id per example, in a list", "or leave ids out")
            named = list(given)
            if not {type(name) for name in named} <= {int, str}:  # which are plain already
                named = [plain_id(name) for name in named]
            if len(named) != batch:
                raise InputError(f"{len(named)} ids for {batch} example(s)", "one id per example", "or leave ids out")
            ids = named
        self._runner, self._references = Runner(field, batch, self.device), {}
        self._ids, self._in_root, self._in_home = ids, self._runner.everyone, self._runner.everyone
        self.target = None
        held, self._checks = field.prepared, 0
        if held.twin.note:
            self.warn(held.twin.note)
        if hooked := held.facts.hooked:
            self.warn(f"hooks of your own ({hooked}) ran in every pass, on rows and modules made here")
        return self

    def __len__(self) -> int:
        return tree.rows(self.x)

    @property
    def device(self) -> torch.device:
        """Where the examples are."""
        return tree.leaves(self.inputs)[0].device

    @cached_property
    def ids(self) -> Sequence[Any]:
        """Names of the examples: the given ones, or a hash of their content; derived rows have their owner's."""
        if self is not self._root:
            return [self._root.ids[i] for i in self._in_root.tolist()]
        return self._ids if self._ids is not None else content_ids(self.inputs)

    @property
    def owners(self) -> Int[Tensor, " B"]:
        """The owner of each row where the rows are the examples."""
        return self._owners()

    def _owners(self) -> Tensor:
        return self._in_root if self is self._root else torch.arange(len(self), device=self.device)

    @property
    def root(self) -> Question:
        """The question first bound, whose examples are the user's."""
        return self._root

    @property
    def _root(self) -> Question:
        itself: Any = self
        return itself if self._of is None else self._of

    @property
    def home(self) -> Question:
        """The question for whose rows baselines are made: the root, or one asked `anew`."""
        itself: Any = self
        return itself if self._home is None else self._home

    @property
    def in_home(self) -> Int[Tensor, " B"]:
        """For each example here, its index in `home`."""
        return self._in_home

    def once(self, key: Hashable, make: Callable[[Question], T]) -> T:
        """Work something out about the user's examples once, and give the same to all who ask by its key."""
        return self._root.keep(key, make)

    def keep(self, key: Hashable, make: Callable[[Question], T]) -> T:
        """Work something out about the examples here, unless it is known by its key."""
        itself: Any = self
        if key not in self._memo:
            self._memo[key] = self.share(("once", key), lambda: make(itself))
        return self._memo[key]

    def for_all(self, key: Hashable, make: Callable[[], T]) -> T:
        """Make what does not depend on the examples, such as a trained network, once for all batches of an evaluation.

        Args:
            key: what it is, by value; it is made anew where that cannot be hashed.
            make: makes it from the field and the seed alone.
        """
        kept = self._root.lasting
        if not is_key(key):
            return make()
        if key not in kept:
            kept[key] = make()
        return kept[key]

    def share(self, key: Hashable, make: Callable[[], T]) -> T:
        """Make something that other methods of the same call ask for too, where they name the key in `asks`.

        Args:
            key: what it is, by value.
            make: makes it from the user's examples alone.
        """
        common = self._common
        if common is None or self is not self._root or not is_key(key):
            return make()
        return common.give(self.charge, key, lambda: self._accounted(make))

    def _accounted(self, make: Callable[[], T]) -> tuple[T, Account]:
        """Make something on an account of its own."""
        runner, inside, checks = self._runner, [], self._checks
        spent, warnings = runner.spent, runner.warnings
        self._ledger.inside.append(inside)
        runner.spent, runner.warnings = {k: torch.zeros_like(v) for k, v in spent.items()}, {}
        self._checks = 0
        try:
            value = make()
            account = Account(runner.spent, runner.warnings, self._checks, inside)
        finally:
            self._ledger.inside.pop()
            runner.spent, runner.warnings, self._checks = spent, warnings | runner.warnings, checks
        return value, account

    def fork(self, common: Common, name: str, account: Account) -> Question:
        """Give the same question for one of several methods, which has an account of its own.

        Args:
            common: what the methods ask alike.
            name: the method's.
            account: what binding took.
        """
        new = self._anew()
        new._common, new._ledger = common, Ledger(name)
        new._ledger.charge(account)
        return new

    def aside(self) -> Question:
        """Give the same question on another account; what one of the two makes for both is made once."""
        if self._common is None:
            self._common = Common(0)
            self._common.wanted["fx"] = 2
        return self.fork(self._common, self._ledger.name, Account({}))

    def rewritten(self) -> Question:
        """Ask the same after the weights of the model were written to, by who owns it, on an account of its own."""
        self.field.twin().refresh()
        new = self._anew()
        new._at_x, new._common, new._ledger, new.lasting = None, None, Ledger(""), {}
        return new

    def _anew(self) -> Any:
        """Ask the same with nothing spent, and nothing made."""
        new: Any = copy.copy(self)
        new._of, new._stream = None, self.stream
        new._runner = copy.copy(self._runner)
        new._runner.spent = {k: torch.zeros_like(v) for k, v in self._runner.spent.items()}
        new._runner.warnings, new._checks = dict(self._runner.warnings), 0
        new._references, new._overrides, new._reaching, new._memo = {}, {}, {}, {}
        new._compared, new._under_rules = [], []
        return new

    @property
    def account(self) -> Account:
        """What was spent here, as an account for others."""
        return Account(self._runner.spent, self._runner.warnings, self._checks, self._ledger.accounts)

    def charge(self, account: Account) -> None:
        """Put what was spent elsewhere on this question's bill."""
        self._ledger.charge(account)
        for one in account.all():
            self._runner.warnings.update(one.warnings)

    @property
    def in_root(self) -> Int[Tensor, " B"]:
        """For each example here, its index in the root."""
        return self._in_root

    def warn(self, message: str) -> None:
        """Record a warning on every result of this question, once."""
        self._runner.warnings[message] = None

    def stream(self, purpose: str) -> Stream:
        """Give random rows for a purpose, keyed by seed, example and draw."""
        return Stream.of(self.seed, self.ids, purpose) if self._stream is None else self._stream(purpose)

    @property
    def cost(self) -> Cost:
        """Rows spent so far, by this question and all that share its account."""
        root = self._root
        return root._ledger.cost(self._runner.spent, root._checks)

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Keep passes out of the methods' accounts: rows sent forward count as checks."""
        before = {k: v.clone() for k, v in self._runner.spent.items()}
        try:
            yield
        finally:
            spent, self._runner.spent = self._runner.spent, before
            self._root._checks += sum(int((spent[k] - before[k]).sum()) for k in ("forward", "at_x"))

    def looked(self, rows: int) -> None:
        """Count rows as checks of the model."""
        self._root._checks += rows

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was recorded by `warn` so far."""
        return tuple(self._runner.warnings)
