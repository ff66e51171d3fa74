"""Configurations: frozen values to JSON and back, tensors by digest, user callables by name."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import math
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from apportion.core.errors import ConfigError

Json = Any
"""What `json.dumps` accepts."""


class Configurable:
    """Base of every value that is stored with a result; subclasses are frozen dataclasses."""

    _known: ClassVar[dict[str, type[Configurable]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Configurable._known[_type_name(cls)] = cls


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
