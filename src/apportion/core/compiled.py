"""Compiled passes: forward passes that nobody looks into, by torch.compile, held to what they give as written."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import BaseTorchFunctionMode as _Mode  # keeps fused kernels away, as `SlowPath` does

from apportion.core import tree
from apportion.core.derivative import is_memory
from apportion.core.eager import with_compilation
from apportion.core.errors import ModelError
from apportion.core.tree import Tree

BACKEND = "inductor"
TOLERANCE = 1e-5
"""How far from the outputs as written compiled ones may be, relative to the largest."""


Forward = Callable[..., Any]
"""Calls the model: with a mode, rows, the examples they belong to, and perhaps what is made of the model before."""


class Compiled:
    """Passes of one twin with one number of rows of one shape.

    Attributes:
        rows: how many a pass has; fewer are filled up to it.
        seconds: what compiling took, with the first pass.
        away: how far the outputs were from those as written, relative to the largest.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        """Prepare; the first pass compiles."""
        self.rows, self.seconds, self.away = rows, 0.0, 0.0
        self._graphs = device.type == "cuda" and BACKEND == "inductor"
        self._made = self._compared = 0
        self._call: Callable[..., Any] | None = None

    @property
    def record(self) -> dict[str, Any] | None:
        """What stands on results; None where nothing was compiled."""
        if not self._compared:
            return None
        graphs = {"cuda_graphs": True} if self._graphs else {}
        return {"rows": self.rows, "seconds": round(self.seconds, 2), "away": self.away, "by": BACKEND} | graphs

    def run(self, forward: Forward, z: Tree, examples: Tensor, model: str) -> tuple[Any, int]:
        """Run rows, filled up with copies of the last.

        Args:
            forward: calls the model.
            z: no more rows than a pass has.
            examples: whose they are.
            model: its name, for messages.

        Returns:
            Their outputs, and how many rows were run as written, to compare.

        Raises:
            ModelError: it cannot be compiled, or the outputs are others.
        """
        count = len(examples)
        with with_compilation() as free:
            if not free:
                return _written(forward, z, examples), 0
            outputs, spent = self._run(forward, tree.apply(self._filled, z), self._filled(examples), model)
        return tree.map_tensors(lambda t: t[:count] if t.ndim and len(t) == self.rows else t, outputs), spent

    def _run(self, forward: Forward, z: Tree, examples: Tensor, model: str) -> tuple[Any, int]:
        start = time.perf_counter()
        try:
            outputs = forward(_Mode(), tree.apply(torch.clone, z), examples, self._through)
        except Exception as error:
            if is_memory(error):
                raise
            _written(forward, z, examples)  # raises where the model does
            raise _failed(model, error) from error
        if self._graphs:
            outputs = tree.map_tensors(torch.clone, outputs)  # the next pass writes where these are
        if self._made == self._compared:
            return outputs, 0
        self.seconds += time.perf_counter() - start
        self._compare(_written(forward, z, examples), outputs, model)
        return outputs, self.rows

    def _filled(self, t: Tensor) -> Tensor:
        missing = self.rows - len(t)
        return torch.cat([t, t[-1:].expand(missing, *t.shape[1:])]) if missing else t

    def _through(self, call: Callable[..., Any]) -> Callable[..., Any]:
        if self._call is None:
            one = lambda *args, **kwargs: call(*args, **kwargs)  # noqa: E731, PLW0108
            # torch counts compilations by code object and gives up after a few: each has one of its own
            own = FunctionType(one.__code__.replace(), globals(), closure=one.__closure__)
            self._call = torch.compile(own, backend=self._compile, fullgraph=True, dynamic=False)
        return self._call

    def _compile(self, graph: Any, inputs: Any) -> Any:
        """Be told of each compilation: what runs under another stance of torch.compile is as written."""
        from torch._dynamo.backends.registry import lookup_backend

        options: dict[str, Any] = {}
        if self._graphs:
            options["config_patches"] = torch._inductor.list_mode_options("reduce-overhead")
        done = lookup_backend(BACKEND)(graph, inputs, **options)
        self._made += 1
        return done

    def _compare(self, written: Any, outputs: Any, model: str) -> None:
        away = distance(written, outputs)
        if not away <= TOLERANCE:
            raise ModelError(
                f"compiled outputs of {model} that are {away:.1e} of the largest away from those as written",
                f"no more than {TOLERANCE:g}",
                "leave compile=True out",
            )
        self.away, self._compared = max(self.away, away), self._made


def distance(a: Any, b: Any) -> float:
    """Give the largest difference of two models' outputs, relative to the largest number of each tensor."""
    worst = 0.0
    for s, t in zip(tree.tensors(a), tree.tensors(b), strict=True):
        if s.shape != t.shape or s.dtype != t.dtype:
            return torch.inf
        if not s.is_floating_point() or not s.numel():
            continue
        equal = (s == t) | (s.isnan() & t.isnan())
        scale = 1e-6 + s.nan_to_num(0, 0, 0).abs().amax()
        worst = max(worst, float(torch.where(equal, 0, (s - t).abs() / scale).nan_to_num(torch.inf).amax()))
    return worst


def _written(forward: Forward, z: Tree, examples: Tensor) -> Any:
    """Run rows as the model says."""
    return forward(_Mode(), tree.apply(torch.clone, z), examples)


_TOOLS = {"C++ compiler": "g++ or clang++", "riton": "triton"}


def _failed(model: str, error: Exception) -> ModelError:
    """Say what torch.compile lacks or cannot do."""
    inner = getattr(error, "inner_exception", None) or error
    said = next((line.strip() for line in str(inner).splitlines() if line.strip()), "no message")
    missing = next((tool for words, tool in _TOOLS.items() if words in said), None)
    return ModelError(
        f"torch.compile failed on {model}: {type(inner).__name__}: {said}",
        "a model that compiles in one graph" if missing is None else f"{missing}, which compiled passes are made with",
        "leave compile=True out" if missing is None else f"install {missing}, or leave compile=True out",
    )
