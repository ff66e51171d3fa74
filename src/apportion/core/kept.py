"""What is kept of a model from one field to the next: its twin, and what checking it has shown."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
from torch import nn

from apportion.core.state import State
from apportion.core.twin import Facts, Twin

_MOST = 4
"""Settings of fields whose twins are kept for one model and thread."""


@dataclass(eq=False)
class Held:
    """A twin, and what is known of the model it stands for.

    Attributes:
        twin: the twin.
        state: of the model when it was built; versions are those the checks are of.
        facts: what the model was seen to be.
        checked: what checks have shown, by kind of example.
        is_open: whether all that would change the twin can be seen; else it serves one call.
        is_ours: whether the model is a copy made here, of which checks stay whatever is written to its weights.
    """

    twin: Twin
    state: State
    facts: Facts
    checked: dict[Any, Any] = field(default_factory=dict)
    is_open: bool = True
    is_ours: bool = False

    def written(self, state: State) -> None:
        """Forget the checks of a model whose weights were written to since."""
        if self.state.versions != state.versions:
            self.state = state
            if not self.is_ours:
                self.checked.clear()


class _OfThread(threading.local):
    """One thread's: a twin serves one."""

    def __init__(self) -> None:
        self.held: OrderedDict[Hashable, Held] = OrderedDict()


_KEPT: dict[int, tuple[ref[nn.Module], _OfThread]] = {}


def find(model: nn.Module, settings: Hashable, state: State) -> Held | None:
    """Give what an earlier field with these settings left, if the model is what it was then.

    Where weights were written to since, the twin may stay and its checks may not.
    """
    entry = _KEPT.get(id(model))
    held = None if entry is None else entry[1].held.get(settings)
    if entry is None or held is None or entry[0]() is not model or held.state.mark != state.mark:
        return None
    held.written(state)
    entry[1].held.move_to_end(settings)
    return held


def keep(model: nn.Module, settings: Hashable, held: Held) -> None:
    """Keep a twin for later fields, as long as the model lives, where all that would change it can be seen."""
    if held.twin.note or not held.is_open:
        return
    key = id(model)
    if key not in _KEPT:
        _KEPT[key] = ref(model, lambda _, kept=_KEPT: kept.pop(key, None)), _OfThread()
    here = _KEPT[key][1].held
    here[settings] = held
    while len(here) > _MOST:
        here.popitem(last=False)


def forget(model: Any, held: Held) -> None:
    """Let go of a twin that is not as it was when it was built."""
    entry = _KEPT.get(id(model))
    here: dict[Hashable, Held] = {} if entry is None else entry[1].held
    for settings in [k for k, v in here.items() if v is held]:
        del here[settings]


def autocast() -> tuple[Any, ...]:
    """Tell in which digits torch computes around a call."""
    return tuple((d, torch.get_autocast_dtype(d)) for d in ("cpu", "cuda") if torch.is_autocast_enabled(d))
