"""Sharing: what several methods of one call ask alike is made once, and stands on the account of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from apportion.core.attribution import Cost
from apportion.core.config import Configurable
from apportion.core.site import Input, Site

T = TypeVar("T")

BUDGET = 1 << 27
"""Bytes of inner layers at the examples that are kept for later methods; what is more is read again."""


class AtX(NamedTuple):
    """A pass at the examples themselves, and what is wanted of it.

    Attributes:
        site: what is read; for `Input()` nothing, and the gradient is that with respect to the field's own site.
        grad: whether the score is differentiated there.
    """

    site: Site = Input()
    grad: bool = True


@dataclass(eq=False)
class Account:
    """What was spent on something that several methods use.

    Attributes:
        spent: rows by kind, per example.
        warnings: what was warned of on the way.
        checks: rows spent on looking at the model.
        inner: accounts of what was used in making it.
        payer: the method that asked first.
    """

    spent: Mapping[str, Tensor]
    warnings: dict[str, None] = field(default_factory=dict)
    checks: int = 0
    inner: list[Account] = field(default_factory=list)
    payer: str = ""

    def all(self) -> Iterator[Account]:
        """Go over this account and those within it."""
        yield self
        for one in self.inner:
            yield from one.all()


class Ledger:
    """The accounts of one method: its own, and those it has in common with others.

    Attributes:
        name: the method's.
        accounts: those in common, each once.
    """

    def __init__(self, name: str) -> None:
        """Open it."""
        self.name = name
        self.accounts: list[Account] = []
        self.inside: list[list[Account]] = []  # what was charged while something that is being made was made

    def charge(self, account: Account) -> None:
        """Put an account on the bill, once; whoever is first pays."""
        for inner in self.inside:
            inner.append(account)
        for one in account.all():
            if one not in self.accounts:
                self.accounts.append(one)
                one.payer = one.payer or self.name

    def cost(self, own: Mapping[str, Tensor], checks: int) -> Cost:
        """Sum everything up, and apart from it what others paid."""
        if not self.accounts:
            return Cost(*(own[kind].clone() for kind in ("forward", "backward", "at_x")), checks=checks)
        paid = [a for a in self.accounts if a.payer != self.name]

        def total(of: Iterable[Account], kind: str) -> Tensor:
            return sum((a.spent[kind] for a in of if kind in a.spent), torch.zeros_like(own[kind]))

        shared = None
        if paid:
            rows = (total(paid, kind) for kind in ("forward", "backward", "at_x"))
            names = tuple(dict.fromkeys(a.payer for a in paid))
            shared = Cost(*rows, checks=sum(a.checks for a in paid), shared_with=names)
        rows = (own[kind] + total(self.accounts, kind) for kind in ("forward", "backward", "at_x"))
        everything = checks + sum(a.checks for a in self.accounts)
        return Cost(*rows, checks=everything, shared=shared)


@dataclass(eq=False)
class PassAtX:
    """One pass at the examples for several methods.

    Attributes:
        value: f(x).
        found: for what was asked, gradients or a `Tap`, or the error its asker is to have.
        forward: the account of the way there.
        backward: of the way back.
    """

    value: Tensor
    found: dict[AtX, Any]
    forward: Account
    backward: Account


@dataclass(eq=False)
class Held:
    """A thing that was made, and its account."""

    value: Any
    account: Account


class Common:
    """Keeps what was made while another method of the call has said that it will ask for it.

    What is smaller than the examples is kept for all.
    """

    def __init__(self, size: int) -> None:
        """Start with nothing.

        Args:
            size: numbers in the examples.
        """
        self.size = size
        self.wanted: Counter[Hashable] = Counter()
        self._held: dict[Hashable, Held] = {}
        self.at_x: dict[bool, PassAtX] = {}

    def expect(self, keys: Iterable[Hashable]) -> None:
        """Note that a method will ask for these."""
        self.wanted.update(keys)

    def release(self, keys: Iterable[Hashable]) -> None:
        """Note that it has its answer; what no other wants is let go."""
        for key in keys:
            self.wanted[key] -= 1
            if self.wanted[key] <= 0:
                self._held.pop(key, None)
                if isinstance(key, AtX):
                    for done in self.at_x.values():
                        done.found.pop(key, None)

    def asks_at_x(self, ask: AtX, *, apart: bool) -> list[AtX]:
        """List what is wanted of a pass at the examples that serves one ask; nothing where it serves no other.

        Args:
            ask: the one.
            apart: whether inner sites are read in another pass than the field's own.
        """
        asks = [key for key, count in self.wanted.items() if isinstance(key, AtX) and count > 0]
        asks = [a for a in asks if not apart or (a == AtX()) == (ask == AtX())]
        return asks if ask in asks and sum(self.wanted[a] for a in asks) > 1 else []

    def give(self, charge: Callable[[Account], None], key: Hashable, make: Callable[[], tuple[T, Account]]) -> T:
        """Give what is there, or make it; it is charged either way."""
        held = self._held.get(key)
        if held is None:
            held = Held(*make())
            if self.wanted[key] > 1 or _numbers(held.value) < self.size:
                self._held[key] = held
        charge(held.account)
        return held.value


def is_key(value: Any) -> bool:
    """Tell whether a value can name something."""
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _numbers(value: Any) -> int:
    """Count the numbers in a value's tensors; those of configurations are there anyway."""
    if isinstance(value, Tensor):
        return value.numel()
    if isinstance(value, Mapping):
        return sum(map(_numbers, value.values()))
    if isinstance(value, tuple | list):
        return sum(map(_numbers, value))
    if is_dataclass(value) and not isinstance(value, Configurable | type):
        return sum(_numbers(getattr(value, f.name)) for f in fields(value))
    return 0
