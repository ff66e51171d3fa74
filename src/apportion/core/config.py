"""Configurations: frozen values to JSON and back, tensors by digest, user callables by name."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import math
import operator
import types
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from apportion.core.errors import ConfigError, kind_of, with_article

Json = Any
"""What `json.dumps` accepts."""


class Configurable:
    """Base of every value that is stored with a result; subclasses are frozen dataclasses.

    Their options are held to the annotations; a subclass with a `__post_init__` of its own calls this one's.
    """

    _known: ClassVar[dict[str, type[Configurable]]] = {}
    _positive: ClassVar[tuple[str, ...]] = ()
    """Options that must be above 0."""
    _not_negative: ClassVar[tuple[str, ...]] = ()
    """Options that must be 0 or more."""

    def __post_init__(self) -> None:
        check_options(self)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        name = _type_name(cls)
        other = Configurable._known.get(name, cls)
        if ":" not in name and other.__module__ != cls.__module__:
            raise TypeError(f"two values of the library are called {name}: in {other.__module__} and {cls.__module__}")
        Configurable._known[name] = cls


def whole(value: Any) -> int | None:
    """Read a whole number of any kind, also NumPy's; None for anything else and for Booleans.

    >>> whole(np.int64(3)), whole(True), whole(3.0)
    (3, None, None)
    """
    if isinstance(value, bool | np.bool_) or (isinstance(value, Tensor) and value.dtype == torch.bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def check_options(value: Configurable) -> None:
    """Hold options to their annotations, where those are numbers, names or parts.

    Numbers must be finite, and are stored as Python's own; sequences are stored as tuples.

    Raises:
        ConfigError: an option of another type or range, with an example of the right one.
    """
    hints, name = _hints(type(value)), type(value).__name__
    for f in dataclasses.fields(value):  # pyright: ignore[reportArgumentType]
        given = getattr(value, f.name)
        fit = _fitted(hints.get(f.name, Any), given)
        if fit is _UNFIT:
            wanted, example = _worded(hints[f.name]), _example(hints[f.name])
            plain = isinstance(given, str | int | float | np.generic)
            raise ConfigError(
                f"{given!r} as {f.name} of {name}" if plain else f"{kind_of(given)} as {f.name} of {name}",
                f"an instance: {wanted}" if example else wanted,
                f"write {f.name}={example}" if example else f"give {wanted} for {f.name}",
            )
        if fit is not None and f.name in value._positive and not fit > 0:
            raise ConfigError(f"{name}({f.name}={given!r})", "a positive number", f"give {f.name} above 0")
        if fit is not None and f.name in value._not_negative and fit < 0:
            raise ConfigError(f"{name}({f.name}={given!r})", "0 or more", f"give no negative {f.name}")
        if fit is not given:
            object.__setattr__(value, f.name, fit)


_UNFIT = object()


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    try:
        return get_type_hints(cls)
    except NameError:  # a class defined inside a function may name types only that function knows
        return {}


def _fitted(hint: Any, given: Any) -> Any:
    """Give an option as it is to be stored, or `_UNFIT`; hints that say nothing checkable take all."""
    kind, inner = get_origin(hint), get_args(hint)
    if hint is int:
        number = whole(given)
        return _UNFIT if number is None else number
    if hint is float:
        number = given.item() if isinstance(given, np.number) else given
        real = isinstance(number, int | float) and not isinstance(number, bool)
        return number if real and math.isfinite(number) else _UNFIT
    if hint is bool and isinstance(given, np.bool_):
        return bool(given)
    if hint in (bool, str, types.NoneType) or (isinstance(hint, type) and issubclass(hint, Configurable)):
        return given if isinstance(given, hint) else _UNFIT
    if kind is tuple and inner[1:] == (...,):
        flat = given.tolist() if isinstance(given, np.ndarray | Tensor) and given.ndim == 1 else given
        each = [_fitted(inner[0], v) for v in flat] if isinstance(flat, tuple | list) else [_UNFIT]
        if any(v is _UNFIT for v in each):
            return _UNFIT
        same = isinstance(given, tuple) and all(a is b for a, b in zip(each, given, strict=True))
        return given if same else tuple(each)
    if kind is Literal:
        return given if any(type(given) is type(v) and given == v for v in inner) else _UNFIT
    if kind in (Union, types.UnionType):
        return next((v for v in (_fitted(h, given) for h in inner) if v is not _UNFIT), _UNFIT)
    return given


def _worded(hint: Any) -> str:
    kind, inner = get_origin(hint), get_args(hint)
    if kind is tuple:
        return f"a tuple, each entry {_worded(inner[0])}"
    if kind in (Union, types.UnionType):
        return " or ".join(_worded(h) for h in inner)
    if kind is Literal:
        return " or ".join(map(repr, inner))
    if hint is types.NoneType:
        return "None"
    return "a finite float" if hint is float else with_article(hint.__name__)


def _example(hint: Any) -> str:
    return next((e for e in (getattr(h, "example", "") for h in (hint, *get_args(hint))) if e), "")


def _type_name(cls: type) -> str:
    inside = cls.__module__.split(".")[0] == "apportion"
    return cls.__qualname__ if inside else f"{cls.__module__}:{cls.__qualname__}"


def digest(tensor: Tensor) -> str:
    """Hash a tensor's dtype, shape and bits.

    >>> digest(torch.zeros(2)) == digest(torch.zeros(2)), digest(torch.zeros(2)) == digest(torch.zeros(3))
    (True, False)
    """
    t = tensor.detach().contiguous().cpu()
    h = hashlib.blake2b(f"{t.dtype}{tuple(t.shape)}".encode(), digest_size=16)
    h.update(t.reshape(-1).view(torch.uint8).numpy().data if t.numel() else b"")
    return h.hexdigest()


def to_config(value: Any, tensors: dict[str, Tensor] | None = None) -> Json:
    """Write a value as JSON; tensors go to `tensors` under their digest.

    Raises:
        ConfigError: a value that has no JSON form.
    """
    if tensors is None:
        tensors = {}
    if isinstance(value, np.generic | np.ndarray):
        value = value.item() if value.ndim == 0 else torch.from_numpy(np.ascontiguousarray(value))
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, Tensor):
        key = digest(value)
        tensors[key] = value.detach()
        return {"tensor": key, "shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, tuple | list):  # a list of targets means another thing than a tuple
        flat = [to_config(v, tensors) for v in value]
        return {"list": flat} if isinstance(value, list) else flat
    if isinstance(value, dict):
        if not all(isinstance(k, str) for k in value):
            raise ConfigError(f"a dict with keys {list(value)}", "string keys", "name the entries by strings")
        return {"dict": {k: to_config(v, tensors) for k, v in value.items()}}
    if isinstance(value, Configurable) and dataclasses.is_dataclass(value):
        fields = {f.name: to_config(getattr(value, f.name), tensors) for f in dataclasses.fields(value) if f.init}
        return {"type": _type_name(type(value)), **fields}
    if callable(value):
        target = value if inspect.isroutine(value) or inspect.isclass(value) else type(value)
        name = f"{getattr(target, '__module__', '?')}:{getattr(target, '__qualname__', repr(target))}"
        return {"callable": name, "reproducible": False}
    raise ConfigError(
        f"a value of type {type(value).__name__} in a configuration",
        "None, numbers, strings, tensors, tuples, dicts, callables or frozen dataclasses of the library",
        "make it a field of one of those types",
    )


def from_config(config: Json, tensors: dict[str, Tensor] | None = None) -> Any:
    """Rebuild the value written by `to_config`.

    Only classes that are already imported are built: reading a file never imports anything.

    Raises:
        ConfigError: an unknown class, a missing tensor, or a user callable.
    """
    tensors = {} if tensors is None else tensors
    if isinstance(config, list):
        return tuple(from_config(c, tensors) for c in config)
    if not isinstance(config, dict):
        return config
    if "type" in config:
        return _build(config, tensors)
    if "float" in config:
        return float(config["float"])
    if "tensor" in config:
        if config["tensor"] not in tensors:
            raise ConfigError(
                f"tensor {config['tensor']} is not among the stored ones",
                "a value that is there",
                "pass the tensors that were stored beside the configuration",
            )
        return tensors[config["tensor"]]
    if "callable" in config:
        raise ConfigError(
            f"the configuration names the user callable {config['callable']}",
            "a configuration without user code",
            "rebuild the value by hand, passing the callable",
        )
    if "dtype" in config:
        dtype = getattr(torch, str(config["dtype"]), None)
        if not isinstance(dtype, torch.dtype):
            raise ConfigError(
                f"the dtype {config['dtype']!r}", "a dtype of torch", "read files with the release that wrote them"
            )
        return dtype
    if "list" in config:
        return [from_config(v, tensors) for v in config["list"]]
    if "dict" in config:
        return {k: from_config(v, tensors) for k, v in config["dict"].items()}
    raise ConfigError(
        f"an entry with keys {sorted(config)}", "what to_config writes", "read files with the release that wrote them"
    )


def _build(config: Json, tensors: dict[str, Tensor]) -> Any:
    name = config["type"]
    cls = Configurable._known.get(str(name))
    if cls is None:
        raise ConfigError(f"unknown class {name!r}", "a class that is imported", "import its module first")
    given = {k: from_config(v, tensors) for k, v in config.items() if k != "type"}
    try:
        return cls(**given)
    except TypeError as error:
        raise ConfigError(
            f"options {sorted(given)} for {name}: {error}", "the options of the class", "read it with its own release"
        ) from error


def is_reproducible(config: Json) -> bool:
    """Tell whether a configuration can be rebuilt without the user's code.

    >>> is_reproducible({"type": "Logit", "target": 3}), is_reproducible([{"callable": "m:f"}])
    (True, False)
    """
    if isinstance(config, list):
        return all(is_reproducible(c) for c in config)
    if isinstance(config, dict):
        if "type" not in config and "dict" in config:
            return all(is_reproducible(c) for c in config["dict"].values())
        user_code = "type" not in config and "callable" in config
        return not user_code and all(is_reproducible(c) for c in config.values())
    return True
