"""The state of a model: what a twin depends on, seen in one walk over its modules."""

from __future__ import annotations

import enum
import functools
import types
from collections import OrderedDict
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

_DEPTH = 4  # how far into plain attributes tensors and changes are looked for
_REGISTERED = frozenset({"_parameters", "_buffers", "_modules"})
_BY_VALUE = frozenset({bool, int, str, type(None)})
_PLAIN = _BY_VALUE | {float}
_TABLES = frozenset({dict, OrderedDict, set})
_NAMED = (types.FunctionType, types.BuiltinFunctionType, type)
_VALUES = (complex, bytes, np.generic, torch.dtype, torch.device, torch.layout, torch.memory_format, enum.Enum, range)
_TENSORS = frozenset({Tensor, nn.Parameter, nn.Buffer})


class State(NamedTuple):
    """What a model is like at a moment.

    Attributes:
        mark: what a twin depends on: equal as long as one may stay.
        versions: how often each weight and buffer was written to.
    """

    mark: tuple[Any, ...]
    versions: tuple[int, ...]


def survey(model: nn.Module) -> State:
    """Summarize what a twin depends on: a change means that it must be built anew."""
    parts: list[Any] = []
    versions: list[int] = []
    seen: set[int] = set()
    todo: list[Any] = [model]
    while todo:
        module = todo.pop()
        parts.append(id(module))
        if module is None or id(module) in seen:
            continue
        seen.add(id(module))
        kind, own, children = type(module), vars(module), module._modules
        parts += (kind, mark(getattr(kind, "forward", None), 0), tuple(own), tuple(map(type, own.values())))
        parts.append(tuple(children.keys()))
        for tensors in (module._parameters, module._buffers):
            parts.append(tuple(tensors.keys()))
            for t in tensors.values():
                parts.append(id(t))
                if t is not None and t.device.type != "meta" and not nn.parameter.is_lazy(t):
                    parts.append(_layout(t))
                    versions.append(0 if t.is_inference() else t._version)
        registered = (module._parameters, module._buffers, children)
        parts += [  # mostly tables of hooks, and empty
            v if (of := type(v)) in _BY_VALUE else () if of in _TABLES and not v else _attribute(v, of, registered)
            for v in own.values()
        ]
        todo.extend(children.values())
    return State(tuple(parts), tuple(versions))


def _attribute(value: Any, kind: type, registered: tuple[Any, ...]) -> Any:
    return () if any(value is table for table in registered) else mark(value)


def _layout(t: Tensor) -> tuple[Any, ...]:
    """Tell where numbers are and how they lie there; where they start says the offset into the storage, too."""
    if t.layout != torch.strided:
        return t.shape, t.layout, t.dtype
    return t.data_ptr(), t.shape, t.stride(), t.dtype


def own_attributes(module: nn.Module) -> dict[str, Any]:
    """List what a module holds besides its weights, buffers and modules."""
    return {k: v for k, v in vars(module).items() if k not in _REGISTERED}


def inside(value: Any) -> list[Any]:
    """List what a plain attribute holds: entries of containers, attributes of records, parts of loose modules."""
    if isinstance(value, nn.Module):
        held = (*value._parameters.values(), *value._buffers.values(), *value._modules.values())
        return [*held, *own_attributes(value).values()]
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)
    if type(value) is functools.partial:
        return [value.func, value.args, value.keywords, vars(value)]
    if isinstance(value, type) or callable(value) or not hasattr(value, "__dict__"):
        return []
    return list(vars(value).values())


def mark(value: Any, depth: int = _DEPTH) -> Any:
    """Tell whether an attribute is still what it was: by kind and value, and by identity where it has parts.

    What is told by an id alone is something that `is_open` refuses, or that a twin holds.
    """
    kind: Any = type(value)
    if kind in _BY_VALUE:
        return kind, value
    if kind is tuple and _PLAIN.issuperset(map(type, value)):
        return repr(value)
    if isinstance(value, _NAMED):
        cells = _cells(value) if isinstance(value, types.FunctionType) and value.__closure__ else []
        by_value = [c if type(c) in _BY_VALUE or isinstance(c, _NAMED) else id(c) for c in cells]
        return value, tuple(by_value)  # held, so that no other gets its id
    if isinstance(value, nn.Parameter):
        return (id(value), kind) if nn.parameter.is_lazy(value) else (id(value), kind, _layout(value))
    if isinstance(value, Tensor):
        return id(value), kind, 0 if value.is_inference() else value._version
    if isinstance(value, np.generic):
        return kind, value.tobytes()
    if isinstance(value, enum.Enum):
        return value
    if kind is float or isinstance(value, _VALUES):
        return kind, repr(value)  # which tells zeros apart by their sign, and finds NaN equal
    names: Any = ()
    if isinstance(value, nn.Module):
        registered = (value._parameters, value._buffers, value._modules)
        names = (*(tuple(t.keys()) for t in registered), tuple(own_attributes(value)))  # TorchScript's have but keys()
        names += (getattr(kind, "forward", None),)
    elif isinstance(value, dict):
        names = tuple([mark(k, 0) for k in value])
    elif _is_record(value):
        names = tuple(vars(value))
    return id(value), kind, names, tuple([mark(v, depth - 1) for v in inside(value)]) if depth else ()


def plain_tensors(value: Any, depth: int = _DEPTH + 1) -> list[Tensor | np.ndarray]:
    """Find tensors and arrays kept as ordinary attributes, given by name, also in modules not registered."""
    if isinstance(value, Tensor | np.ndarray):
        return [value]
    return [t for v in inside(value) for t in plain_tensors(v, depth - 1)] if depth else []


def is_open(model: nn.Module) -> bool:
    """Tell whether a survey sees everything that a copy of the model depends on.

    It does not see into closures, hooks with a state, locks, generators of random numbers and the like, nor
    that a tensor in a plain attribute is written to through `.data`. Such parts may lead back to the model, too.
    """
    for module in model.modules():
        kind = type(module)
        if isinstance(module, torch.jit.ScriptModule) or not _is_free(kind.forward):
            return False
        if any("<locals>" in base.__qualname__ for base in kind.__mro__):
            return False
        tensors = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
        if any(type(t) not in _TENSORS or t.is_inference() for t in tensors):
            return False
        if not all(_is_seen(v, _DEPTH) for v in own_attributes(module).values()):
            return False
    return True


def _is_seen(value: Any, depth: int) -> bool:
    kind: Any = type(value)
    if kind in _PLAIN or isinstance(value, (*_VALUES, np.ndarray)) or kind is torch.Size:
        return True
    if isinstance(value, nn.Parameter):
        return kind in _TENSORS and not value.is_inference()
    if isinstance(value, _NAMED):
        return _is_free(value)
    if kind in (dict, OrderedDict) and not all(_is_seen(k, 0) for k in value):
        return False
    container = kind in (dict, OrderedDict, list, tuple, set, frozenset) or _is_named_tuple(value)
    if container and not value:
        return True
    if isinstance(value, nn.Module):
        known = all(t is None or type(t) is nn.Parameter for t in value._parameters.values())
        known = known and not value._buffers and _is_free(type(value).forward)
        return known and depth > 0 and all(_is_seen(v, depth - 1) for v in inside(value))
    if container or kind is functools.partial or _is_record(value):
        return depth > 0 and all(_is_seen(v, depth - 1) for v in inside(value))
    return False


def _is_named_tuple(value: Any) -> bool:
    """Tell whether a tuple has names for its entries, and nothing besides; configurations of networks often are one."""
    return isinstance(value, tuple) and hasattr(type(value), "_fields") and not hasattr(value, "__dict__")


def _is_record(value: Any) -> bool:
    """Tell whether an object is its attributes, and nothing besides."""
    kind = type(value)
    if isinstance(value, Tensor | type) or callable(value) or not hasattr(value, "__dict__"):
        return False
    plain = all(not base.__dict__.get("__slots__") for base in kind.__mro__)
    built_in = any(base.__module__ == "builtins" for base in kind.__mro__ if base is not object)
    return plain and not built_in and "<locals>" not in kind.__qualname__


def _is_free(fn: Any, depth: int = _DEPTH) -> bool:
    """Tell whether a function is the same wherever it is called: it holds nothing that may change."""
    if isinstance(fn, type):
        return "<locals>" not in fn.__qualname__
    if isinstance(fn, types.BuiltinFunctionType):
        return fn.__self__ is None or isinstance(fn.__self__, type | types.ModuleType)
    if not isinstance(fn, types.FunctionType) or not vars(fn).keys() <= {"__wrapped__"}:
        return False
    cells = [*_cells(fn), *vars(fn).values()]
    defaults = (*(fn.__defaults__ or ()), *(fn.__kwdefaults__ or {}).values())
    known = all(
        type(c) in _BY_VALUE or c is fn or (isinstance(c, _NAMED) and depth > 0 and _is_free(c, depth - 1))
        for c in cells
    )
    return known and all(_is_seen(v, 0) for v in defaults)


def _cells(fn: types.FunctionType) -> list[Any]:
    """List what a function holds of where it was made, as a decorated one does."""
    held = []
    for cell in fn.__closure__ or ():
        with suppress(ValueError):  # not filled yet
            held.append(cell.cell_contents)
    return held
