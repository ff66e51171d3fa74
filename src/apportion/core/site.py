"""Sites: which tensor of the forward pass is explained, read or overridden."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from apportion.core import ops
from apportion.core.config import Configurable
from apportion.core.derivative import counted_at
from apportion.core.errors import ConfigError, SiteError, nearest

_FUNCTORCH = cast(Any, torch._C)._functorch


@dataclass(frozen=True)
class Site(Configurable):
    """Base of the sites."""


@dataclass(frozen=True)
class Input(Site):
    """The model's input, before the declared normalization."""


@dataclass(frozen=True)
class At(Site):
    """One call of a module.

    What is read there is a tensor, and its gradient that of all its uses, also of those past the module; what is
    explained there (`Field(site=...)`) replaces what the module is given or gives, and no other use.

    Attributes:
        name: the module's name as in `model.named_modules()`.
        call: which call of it in one forward pass; None when it is called once.
        end: its `"output"` or its `"input"` (first positional argument).
        index: which entry, where that end is a tuple or dict; None when it holds one tensor.
    """

    name: str
    call: int | None = None
    end: Literal["output", "input"] = "output"
    index: int | str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.name, nn.Module):
            raise ConfigError(
                f"At({type(self.name).__name__}(...)), a module",
                "its name as in model.named_modules(), a str",
                "write [n for n, m in model.named_modules() if m is layer] to find it",
            )
        if not isinstance(self.name, str):
            raise ConfigError(
                f"At({self.name!r})",
                "the module's name as in model.named_modules(), a str",
                f"write At({str(self.name)!r}); field.sites(x) lists the names",
            )
        if self.end not in ("output", "input"):
            raise ConfigError(
                f"At(end={self.end!r})", "'output' or 'input'", "write end='input' for what the module is given"
            )
        super().__post_init__()
        _check_call(self.call)


def _check_call(call: int | None) -> None:
    if call is not None and call < 0:
        raise ConfigError(f"call={call}", "a number from 0", "count the calls of one forward pass from 0")


@dataclass(frozen=True)
class AtOp(Site):
    """The output of one call of an operation, also inside `scaled_dot_product_attention`.

    Attributes:
        op: the operation's name in the vocabulary, such as `"softmax"` for post-softmax attention.
        call: which call of it in one forward pass, counted over all spellings; None when there is one.
    """

    op: str
    call: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_call(self.call)
        if self.op not in ops.STATUS and self.op not in ops._ALIASES.values():
            raise ConfigError(
                f"AtOp({self.op!r})",
                f"an operation; {nearest(self.op, ops.STATUS)}",
                "choose one of the operations of ops.STATUS",
            )


@dataclass(frozen=True)
class SiteInfo:
    """One addressable tensor of a forward pass: its site, the module's class and the tensor's shape."""

    site: Site
    kind: str
    shape: tuple[int, ...]


@dataclass
class Probe:
    """Read and override sites during one forward pass of `model`; use as a context manager.

    What is read is a copy, so that later in-place operations do not change it. Its gradient is that of the
    tensor it was copied from, through all its uses as `retain_grad` gives it: also those inside the module that
    made it, and those that pass the module by. The rows therefore have to carry gradient. A tensor that carries
    none all the same, behind a detach() in the model, becomes the start of a graph, for its later uses.

    An override is narrower: it replaces what this end of the module hands on, no other use of that tensor.
    """

    model: nn.Module | None
    read: Sequence[Site] = ()
    override: Mapping[Site, Tensor] = field(default_factory=dict)
    differentiate: bool = False
    trace: bool = False
    values: dict[Site, Tensor] = field(default_factory=dict)
    seen: list[SiteInfo] = field(default_factory=list)
    _handles: list[Any] = field(default_factory=list)
    _hit: Counter[Site] = field(default_factory=Counter)
    _views: list[tuple[Site, Tensor, int]] = field(default_factory=list)
    _mode: _OpProbe | None = None

    def __enter__(self) -> Probe:
        wanted = [s for s in dict.fromkeys((*self.read, *self.override)) if not isinstance(s, Input)]
        modules: dict[str, list[At]] = {}
        for site in wanted:
            if isinstance(site, At):
                modules.setdefault(site.name, []).append(site)
        try:
            self._hook(modules)
            if self.trace or any(isinstance(s, AtOp) for s in wanted):
                self._mode = _OpProbe(self, [s for s in wanted if isinstance(s, AtOp)])
                self._mode.__enter__()
        except BaseException:
            self._remove()
            raise
        return self

    def _hook(self, modules: dict[str, list[At]]) -> None:
        if not modules and not self.trace:
            return
        if self.model is None:
            raise SiteError(
                f"sites {sorted(modules)} of a plain callable", "a torch.nn.Module", "pass the module itself"
            )
        named = dict(self.model.named_modules(remove_duplicate=False))
        for name in named if self.trace else modules:
            if isinstance(named.get(name), torch.jit.ScriptModule):
                where = repr(name) if name else "the model"
                raise SiteError(f"{where}, TorchScript, which takes no hooks", "an eager module", "pass the original")
        for name, sites in modules.items():
            if name not in named:
                raise SiteError(
                    f"no module named {name!r}", nearest(name, [n for n in named if n]), "list them with field.sites(x)"
                )
            self._attach(named[name], sites)
        if self.trace:
            for name, module in self.model.named_modules():
                if name:
                    self._attach_trace(name, module)

    def _attach(self, module: nn.Module, sites: list[At]) -> None:
        calls = Counter[str]()

        def before(_module: nn.Module, args: tuple[Any, ...]) -> Any:
            changed = self._visit(list(args), [s for s in sites if s.end == "input"], calls["input"], default=0)
            calls["input"] += 1
            return None if changed is None else tuple(changed)

        def after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
            changed = self._visit(output, [s for s in sites if s.end == "output"], calls["output"], default=None)
            calls["output"] += 1
            return changed

        if any(s.end == "input" for s in sites):
            self._handles.append(module.register_forward_pre_hook(before))
        self._handles.append(module.register_forward_hook(after))

    def _attach_trace(self, name: str, module: nn.Module) -> None:
        calls = Counter[str]()

        def after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            for index, tensor in _tensors(output):
                site = At(name, calls["n"], index=index)
                self.seen.append(SiteInfo(site, type(module).__name__, tuple(tensor.shape)))
            calls["n"] += 1

        self._handles.append(module.register_forward_hook(after))

    def _visit(self, held: Any, sites: list[At], call: int, default: int | None) -> Any:
        changed = None
        for site in sites:
            self._hit[site] += 1
            if call != (site.call or 0):
                continue
            index = default if site.index is None else site.index
            tensor, index = _pick(held if changed is None else changed, index, site)
            new = self._exchange(site, tensor)
            changed = _put(held if changed is None else changed, index, new)
        return changed

    def _exchange(self, site: Site, tensor: Tensor) -> Tensor:
        if _FUNCTORCH.is_functorch_wrapped_tensor(tensor):  # which ends with the transform
            raise SiteError(
                f"{site} inside torch.vmap or another transform of torch.func",
                "a site outside, whose tensor has all rows",
                "read another site, or call the layers on the whole batch instead of mapping them over single examples",
            )
        if site in self.override:
            new = self.override[site]
            if new.shape != tensor.shape:
                raise SiteError(f"override of shape {tuple(new.shape)} at {site}", f"shape {tuple(tensor.shape)}", "")
            tensor = new.clone()
        if site not in self.read:
            return tensor
        sloped = self.differentiate and torch.is_grad_enabled() and tensor.is_floating_point()
        if sloped and not tensor.requires_grad:
            held = () if self.model is None else (*self.model.parameters(), *self.model.buffers())
            tensor = (tensor.detach() if any(tensor is t for t in held) else tensor).requires_grad_()
        self.values[site] = counted_at(tensor.clone(), tensor) if sloped else tensor.clone()
        # autograd forbids in-place operations on leafs, and after one on a view it goes another way
        if sloped and tensor._is_view():
            self._views.append((site, tensor, tensor._version))
        return tensor.clone() if sloped and (tensor.is_leaf or tensor._is_view()) else tensor

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._mode is not None:
            self._mode.__exit__(kind, error, trace)
        self._remove()
        if kind is not None:
            return
        for site in (*self.read, *self.override):
            if not isinstance(site, Input):
                self._check(site)
        for site, view, version in self._views:
            if view._version != version and not view.detach().equal(self.values[site].detach()):
                raise SiteError(
                    f"{site} is a view (of a transpose, reshape or slice) that the model changes in place later",
                    "a tensor whose uses autograd can follow",
                    "make that operation out of place, or name the module behind or before",
                )
        self._views.clear()

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _check(self, site: Site) -> None:
        calls = self._hit[site]
        call = getattr(site, "call", None)
        name = f"module {site.name!r}" if isinstance(site, At) else f"operation {getattr(site, 'op', '')!r}"
        if calls == 0:
            seen = sorted(self._mode.counts) if self._mode else []
            raise SiteError(
                f"{name} was not called in the forward pass",
                "a site on the way from input to score",
                f"operations seen: {seen}" if seen else "list the sites with field.sites(x)",
            )
        if call is None and calls > 1:
            listed = ", ".join(str(replace(site, call=i)) for i in range(calls))  # pyright: ignore[reportCallIssue]
            raise SiteError(f"{name} is called {calls} times in one forward pass", f"one of {listed}", "give call=")
        if call is not None and call >= calls:
            raise SiteError(
                f"{name} was called {calls} time(s)", f"call below {calls}; given call={call}", "count calls from 0"
            )


def _tensors(held: Any) -> list[tuple[int | str | None, Tensor]]:
    if isinstance(held, Tensor):
        return [(None, held)]
    if isinstance(held, Mapping):
        return [(k, v) for k, v in held.items() if isinstance(v, Tensor)]
    if isinstance(held, tuple | list):
        return [(i, v) for i, v in enumerate(held) if isinstance(v, Tensor)]
    return []


def _pick(held: Any, index: int | str | None, site: At) -> tuple[Tensor, int | str | None]:
    found = _tensors(held)
    if index is None and len(found) == 1:
        return found[0][1], found[0][0]
    match = [t for i, t in found if i == index]
    if len(match) != 1:
        listed = ", ".join(f"index={i!r} {tuple(t.shape)}" for i, t in found) or "no tensor"
        raise SiteError(f"{site} holds {listed}", "one tensor", "give At(..., index=...)")
    return match[0], index


def _put(held: Any, index: int | str | None, new: Tensor) -> Any:
    if index is None:
        return new
    if isinstance(held, Mapping):
        copy = type(held)(held) if type(held) is not dict else dict(held)  # pyright: ignore[reportCallIssue]
        copy[index] = new  # pyright: ignore[reportIndexIssue]
        return copy
    flat = list(held)
    flat[int(index)] = new
    return type(held)(*flat) if hasattr(held, "_fields") else type(held)(flat)


class _OpProbe(TorchFunctionMode):
    """Count operations and exchange the outputs of the wanted calls."""

    def __init__(self, probe: Probe, sites: list[AtOp]) -> None:
        super().__init__()
        self.probe, self.sites = probe, sites
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        simpler = ops.decomposed(func) if self.sites else None
        op = ops.lookup(func, args, kwargs)
        if simpler is None:
            out = func(*args, **kwargs)
        else:
            with self:
                out = simpler(*args, **kwargs)
        if op is None or not isinstance(out, Tensor):
            return out
        call = self.counts[op.kind]
        self.counts[op.kind] += 1
        for site in self.sites:
            if site.op != op.kind:
                continue
            self.probe._hit[site] += 1
            if call == (site.call or 0):
                out = self.probe._exchange(site, out)
        return out
