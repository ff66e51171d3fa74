"""A folder of results to which a run only adds: one file for each finished pair of a batch and a method."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apportion.core.attribution import Cost
from apportion.core.config import Json
from apportion.core.errors import ConfigError, OutputError
from apportion.core.write import read_tensors, write_bytes, write_tensors
from apportion.metrics.scores import Curve, Direction, Scores

_KINDS = {kind.__name__: kind for kind in (Scores, Curve, Cost)}
_PLAIN = {"Scores": ("metric", "method", "score", "resolved")}
"""Fields that are JSON already."""

_GROWING = ("methods", "controls", "metrics")
"""Settings to which names may be added."""


def pack(value: Any, put: Callable[[Tensor], Json]) -> Json:
    """Write scores, and what they hold, as JSON.

    Args:
        value: scores, costs, curves, tensors, containers of these, or plain values.
        put: stores a tensor and says where.
    """
    if isinstance(value, Tensor):
        return {"tensor": put(value.detach().cpu())}
    if isinstance(value, Enum):
        return value.name
    if type(value).__name__ in _KINDS:
        plain = _PLAIN.get(type(value).__name__, ())
        held = {f.name: getattr(value, f.name) for f in fields(value)}
        return {"is": type(value).__name__} | {k: v if k in plain else pack(v, put) for k, v in held.items()}
    if isinstance(value, Mapping):
        return {"dict": {k: pack(v, put) for k, v in value.items()}}
    if isinstance(value, tuple | list):
        return {"tuple" if isinstance(value, tuple) else "list": [pack(v, put) for v in value]}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    return {"float": repr(value)} if isinstance(value, float) and not math.isfinite(value) else value


def unpack(record: Json, take: Callable[[Json], Tensor]) -> Any:
    """Read what `pack` wrote."""
    if not isinstance(record, dict):
        return record
    if "tensor" in record:
        return take(record["tensor"])
    if "is" in record:
        plain = _PLAIN.get(record["is"], ())
        held = {k: v if k in plain else unpack(v, take) for k, v in record.items() if k != "is"}
        if "direction" in held:
            held["direction"] = Direction[held["direction"]]
        return _KINDS[record["is"]](**held)
    if "bytes" in record:
        return bytes.fromhex(record["bytes"])
    if "float" in record:
        return float(record["float"])
    for kind, make in (("tuple", tuple), ("list", list)):
        if kind in record:
            return make(unpack(v, take) for v in record[kind])
    return {k: unpack(v, take) for k, v in record["dict"].items()}


def as_numbers(t: Tensor) -> Json:
    """Write a tensor as JSON that gives the same bits back; what JSON has no number for stands as a word.

    >>> as_numbers(torch.tensor([1.0, float("nan")]))
    {'dtype': 'float32', 'shape': [2], 'values': [1.0, 'nan']}
    """
    flat = t.flatten().tolist()
    if t.is_floating_point():
        flat = [v if math.isfinite(v) else repr(v) for v in flat]
    return {"dtype": str(t.dtype).removeprefix("torch."), "shape": list(t.shape), "values": flat}


def from_numbers(record: Json) -> Tensor:
    """Read what `as_numbers` wrote."""
    dtype = getattr(torch, record["dtype"])
    values = [float(v) if isinstance(v, str) else v for v in record["values"]]
    return torch.tensor(values, dtype=dtype).reshape(record["shape"])


class Store:
    """A folder of results: the settings, and the files of finished pairs, each written whole or not at all.

    Attributes:
        folder: where it is.
    """

    def __init__(self, folder: str | os.PathLike[str], settings: Mapping[str, Json]) -> None:
        """Open the folder, or make it.

        Args:
            folder: a new or empty one, or that of an earlier run with these settings.
            settings: what results depend on besides the data. Under "methods", "controls" and "metrics" new names may
                be added; everything else must be as it was.

        Raises:
            ConfigError: the folder holds results of other settings; it says which.
            OutputError: it cannot be written to.
        """
        self.folder = Path(folder)
        path = self.folder / "settings.json"
        now = json.loads(json.dumps(dict(settings)))
        if path.is_file():
            before = _read_json(path)
            different = list(_differences(before, now))
            if different:
                raise ConfigError(
                    f"{self.folder} holds results of other settings: {'; '.join(different[:4])}"
                    + (f"; and {len(different) - 4} more" if len(different) > 4 else ""),
                    "the settings it was begun with",
                    "give another folder, or the settings of before",
                )
            for group in _GROWING:
                now[group] = before[group] | now[group]
            if now == before:
                return
        elif self.folder.is_dir() and any(self.folder.glob("*.safetensors")):
            raise ConfigError(
                f"{self.folder} holds results without settings.json", "a folder of ap.evaluate", "give another folder"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"{folder} cannot be made: {error.strerror or error}", "a place for a folder", "give another"
            ) from error
        write_bytes(path, f"{json.dumps(now, indent=1)}\n".encode())

    def _path(self, batch: int, name: str) -> Path:
        safe = re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:40]
        return (
            self.folder / f"{batch:06d}.{safe}-{hashlib.blake2b(name.encode(), digest_size=4).hexdigest()}.safetensors"
        )

    def put(self, batch: int, name: str, fingerprint: Json, found: Any) -> None:
        """Add what was found of a batch by a method.

        Args:
            batch: its number.
            name: the method's.
            fingerprint: of the batch.
            found: what `pack` takes.

        Raises:
            OutputError: it cannot be written.
        """
        path, tensors = self._path(batch, name), {}
        if path.is_file():  # what was found before goes on with further metrics, which may have no truth
            before = read_tensors(path, "apportion_evaluation", "ap.evaluate")[0]["data"]
            fingerprint = fingerprint | {"truth": _all_truths(before["truth"], fingerprint["truth"])}

        def keep(t: Tensor) -> str:
            tensors[key := str(len(tensors))] = t
            return key

        record = {"version": 1, "name": name, "data": fingerprint, "found": pack(found, keep)}
        write_tensors(path, tensors, {"apportion_evaluation": record})

    def get(self, batch: int, name: str, fingerprint: Json) -> Any:
        """Give what was found of a batch by a method, None where it has not been finished.

        Raises:
            ConfigError: it was found of other data, and it says what differs; or the file is damaged.
        """
        path = self._path(batch, name)
        if not path.is_file():
            return None
        try:
            record, tensors = read_tensors(path, "apportion_evaluation", "ap.evaluate")
        except ConfigError as error:
            raise ConfigError(error.given, error.expected, "remove it: the same call makes it again") from error
        try:
            now = json.loads(json.dumps(fingerprint))
            different = [k for k in now if not _fits(record["data"][k], now[k], k)]
            if not different and record["name"] == name:
                return unpack(record["found"], tensors.__getitem__)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"{path} has a damaged record ({type(error).__name__}: {error})",
                "a file written by ap.evaluate",
                "remove it: the same call makes it again",
            ) from error
        raise ConfigError(
            f"{self.folder} holds results of other data: {', '.join(different)} of batch {batch} differ",
            "the data and the batches it was begun with",
            "give another folder, or the data of before, in the same order and with the same batch=",
        )

    def end(self, batches: int) -> None:
        """See that nothing lies here of batches that the data does not have.

        Raises:
            ConfigError: there were more batches before.
        """
        ours = [p.name for p in self.folder.glob("*.*.safetensors") if p.name[:6].isdigit()]
        beyond = [name for name in ours if int(name[:6]) >= batches]
        if beyond:
            raise ConfigError(
                f"{self.folder} holds results of more batches than the {batches} of the data: {min(beyond)}",
                "the data it was begun with",
                "give another folder, or all of the data",
            )


def _fits(before: Json, now: Json, name: str) -> bool:
    """Compare a part of two fingerprints; truths may come with the metric that needs them."""
    if name == "truth" and isinstance(before, dict) and isinstance(now, dict):
        return all(before[k] == now[k] for k in before if k in now)
    return before == now or (name == "truth" and None in (before, now))


def _all_truths(before: Json, now: Json) -> Json:
    if isinstance(before, dict) and isinstance(now, dict):
        return before | now
    return before if now is None else now


def _read_json(path: Path) -> Json:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict) and all(isinstance(found.get(k), dict) for k in _GROWING):
            return found
    except (OSError, ValueError):
        pass
    raise ConfigError(f"{path} cannot be read", "the settings that ap.evaluate wrote", "give another folder")


def _differences(before: Json, now: Json, place: str = "") -> Iterable[str]:
    """Say where two records differ; names of methods, controls and metrics may be missing from either."""
    if isinstance(before, dict) and isinstance(now, dict):
        optional = place in _GROWING
        for key in dict.fromkeys([*before, *now]):
            inner = f"{place}.{key}" if place else key
            if key in before and key in now:
                yield from _differences(before[key], now[key], inner)
            elif not optional:
                yield f"{inner} was {'given' if key in before else 'not given'} before"
    elif before != now:
        yield f"{place} was {_short(before)} and is {_short(now)}"


def _short(value: Json) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
