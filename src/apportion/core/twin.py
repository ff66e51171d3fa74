"""The aliasing twin: the user's model on shared weights, so that the user's own is never touched."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from apportion.core.compiled import Compiled
from apportion.core.errors import ModelError, kind_of
from apportion.core.fast import Plan
from apportion.core.hooks import own_hooks
from apportion.core.state import own_attributes, plain_tensors, survey

_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_LOCKS_GUARD = threading.Lock()


_DATA = 1 << 20
"""Bytes from which an array is data, which a model reads; smaller ones are copied, since it may write to them."""


def unwrap(model: Any) -> Any:
    """Reach the module inside wrappers that only add compilation or replication."""
    while isinstance(model, nn.Module):
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            break
    return model


def _alias(tensor: Tensor, *, copied: bool, precision: torch.dtype | None) -> Tensor:
    out = tensor.detach()
    if precision is not None and out.is_floating_point():
        out = out.to(precision)
    copied = copied or tensor.is_inference()  # which autograd cannot save for a backward pass
    return out.clone() if copied and out.data_ptr() == tensor.data_ptr() else out


def _memo(model: nn.Module, precision: torch.dtype | None) -> dict[int, Any]:
    """Tell `deepcopy` what to put in place of every tensor of the model.

    Parameters share their storage; buffers and tensors in plain attributes are small and some models
    write to them, so those are copied.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None and id(p) not in memo:
                memo[id(p)] = nn.Parameter(_alias(p, copied=False, precision=precision), requires_grad=False)
        for b in module._buffers.values():
            if b is not None and id(b) not in memo:
                memo[id(b)] = _alias(b, copied=True, precision=precision)
    for module in model.modules():  # after all parameters: an attribute may hold one of them
        for t in plain_tensors(own_attributes(module)):
            if isinstance(t, np.ndarray):
                held: Any = t if t.nbytes > _DATA else t.copy()  # which a model may write to, as to a tensor
            elif isinstance(t, nn.Parameter):
                held = nn.Parameter(_alias(t, copied=False, precision=precision), requires_grad=False)
            else:
                held = _alias(t, copied=True, precision=precision)
            memo.setdefault(id(t), held)
    return memo


def copied(model: nn.Module) -> nn.Module:
    """Copy a model with all it holds, also what a pass has left in its attributes, as torch's `weight_norm` does.

    Raises:
        ModelError: it cannot be copied.
    """
    held = (t for m in model.modules() for t in plain_tensors(own_attributes(m)) if isinstance(t, Tensor))
    try:
        return copy.deepcopy(model, {id(t): t.detach().clone() for t in held if not t.is_leaf})
    except Exception as error:
        raise ModelError(
            f"a {type(model).__name__} that cannot be copied ({type(error).__name__}: {error})",
            "a module that copy.deepcopy copies",
            "leave out of its attributes what belongs elsewhere, such as open files",
        ) from error


def fingerprint(model: nn.Module) -> tuple[Any, ...]:
    """Give what marks a model: see `survey`."""
    return survey(model).mark


class Twin:
    """One runnable stand-in for a model, for one thread.

    Attributes:
        module: the module whose sites can be hooked; None for a plain callable.
        note: why this is not an aliasing copy, or None.
        plan: how passes may run faster; None until the first pass of a check has shown it.
        learns: whether the next pass is that one.
        compiled: compiled passes, by the number and shapes of rows.
    """

    def __init__(self, model: Any, precision: torch.dtype | None, *, itself: bool = False) -> None:
        """Build the stand-in.

        Args:
            model: module or callable.
            precision: dtype to cast a copy of the weights to; None shares them.
            itself: whether the module is a copy already, which no other uses, and stands in for itself.

        Raises:
            ModelError: a precision is asked of something that cannot be copied.
        """
        self.note: str | None = None
        self.plan: Plan | None = None
        self.learns = False
        self.compiled: dict[Any, Compiled] = {}
        self.module: nn.Module | None = None
        self._call: Callable[..., Any] = model
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._arrays: list[tuple[np.ndarray, np.ndarray]] = []
        self._lock: threading.RLock | None = None
        if not isinstance(model, nn.Module):
            return
        if itself:
            self.module = model.requires_grad_(False)
            return
        try:
            memo = _memo(model, precision)
            held = [t for m in model.modules() for t in plain_tensors(own_attributes(m)) if isinstance(t, np.ndarray)]
            with torch.no_grad():
                self.module = copy.deepcopy(model, memo)
            self._arrays = [(t, memo[id(t)]) for t in held if memo[id(t)] is not t]
            self._call = self.module
            both = _pairs(model, self.module)
            for own, new in both:
                _share(own, new, precision)
            self._copies = [(own, new) for own, new in both if own.data_ptr() != new.data_ptr()]
        except Exception as error:
            if precision is not None:
                raise ModelError(
                    f"{type(model).__name__} cannot be copied ({error}), so precision={precision} cannot be set",
                    "a copyable model",
                    "cast the model yourself",
                ) from error
            self.module = model
            self.note = f"the model cannot be copied ({type(error).__name__}); it ran under a lock with frozen weights"
            with _LOCKS_GUARD:
                self._lock = _LOCKS.setdefault(model, threading.RLock())
            frozen = {k: _alias(v, copied=False, precision=None) for k, v in model.named_parameters()}
            buffers = {k: _alias(v, copied=True, precision=None) for k, v in model.named_buffers()}
            self._copies = [(v, buffers[k]) for k, v in model.named_buffers()]
            frozen |= buffers
            self._call = lambda *a, **k: torch.func.functional_call(model, frozen, a, k)

    def tensors(self) -> list[Tensor]:
        """List the weights and buffers, which are there whatever the number of rows."""
        return [] if self.module is None else _held(self.module)

    def refresh(self) -> None:
        """Bring what does not share its storage up to date with the user's model."""
        with torch.no_grad():
            for own, new in _unlike(self._copies):  # what is alike stays untouched, and what was made of it valid
                new.copy_(own)
        for own, new in self._arrays:
            if own.tobytes() != new.tobytes():
                new[...] = own

    @contextmanager
    def running(self) -> Iterator[Callable[..., Any]]:
        """Give the callable for one pass; hooks of the pass are set and removed inside."""
        if self._lock is None:
            yield self._call
            return
        with self._lock:
            yield self._call


def _unlike(pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Choose the pairs whose numbers differ, at one wait for the device."""
    if not pairs or any(own.dtype != new.dtype for own, new in pairs):
        return pairs
    if all(own.device.type == "cpu" for own, _ in pairs):
        return [pair for pair in pairs if not torch.equal(*pair)]
    changed = torch.stack([(own != new).any() for own, new in pairs]).tolist()
    return [pair for pair, is_changed in zip(pairs, changed, strict=True) if is_changed]


def _share(own: Tensor, new: Tensor, precision: torch.dtype | None) -> None:
    """See to it that a copy is as `_memo` wanted it, also where a module copies itself (TorchScript does)."""
    new.requires_grad_(False)
    wanted = _alias(own, copied=not isinstance(own, nn.Parameter), precision=precision)
    apart = isinstance(own, nn.Parameter) and wanted.data_ptr() == own.data_ptr() != new.data_ptr()
    if apart or wanted.dtype != new.dtype:
        new.data = wanted


def _pairs(model: nn.Module, copied: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Pair each weight and buffer with its copy, by name.

    Raises:
        TypeError: the copy is none: a module copies itself in a way of its own.
    """
    mine, other = (
        dict((*m.named_parameters(remove_duplicate=False), *m.named_buffers(remove_duplicate=False)))
        for m in (model, copied)
    )
    if [(n, t.shape) for n, t in sorted(mine.items())] != [(n, t.shape) for n, t in sorted(other.items())]:
        raise TypeError("its copy has other weights")
    own_modules = {id(m) for m in model.modules()}
    scripted = isinstance(model, torch.jit.ScriptModule)
    if any(id(m) in own_modules for m in copied.modules()) or (not scripted and any(mine[n] is other[n] for n in mine)):
        raise TypeError("a part of it copies to itself")
    return [(t, other[n]) for n, t in mine.items()]


def _held(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _iterates(module: nn.Module) -> bool:
    """Tell whether a module in train mode improves an estimate in its buffers with every call."""
    hooks = module._forward_pre_hooks.values()
    return isinstance(module, _SpectralNorm) or any(isinstance(h, SpectralNorm) for h in hooks)


class Facts(NamedTuple):
    """What a model was seen to be.

    Attributes:
        devices: where its weights and buffers are.
        dtypes: those of its weights of floating point.
        hooked: the modules with hooks of the user's, named.
        scripted: whether a part of it is TorchScript.
    """

    devices: frozenset[torch.device] = frozenset()
    dtypes: frozenset[torch.dtype] = frozenset()
    hooked: str = ""
    scripted: bool = False

    def check_device(self, device: torch.device) -> None:
        """Refuse an input that is elsewhere.

        Raises:
            ModelError: it is.
        """
        if len(self.devices) == 1 and device not in self.devices:
            own = str(next(iter(self.devices)))
            raise ModelError(
                f"the input is on {device}, the model on {own}", "one device", f"move the input: x.to({own!r})"
            )


def check_ready(model: Any) -> Facts:
    """Refuse a model that cannot be explained as it stands.

    Raises:
        ModelError: train mode with dropout or batch-norm, weights on no device.
    """
    if not isinstance(model, nn.Module):
        if isinstance(model, torch.export.ExportedProgram):
            raise ModelError("an ExportedProgram", "a module", "pass program.module()")
        if isinstance(model, type):
            raise ModelError(f"the class {model.__name__} as model", "an instance", f"write {model.__name__}(...)")
        if not callable(model):
            raise ModelError(f"{kind_of(model)} as model", "a torch.nn.Module or a callable", "pass the model itself")
        return Facts()
    lazy = next((n for n, p in model.named_parameters() if isinstance(p, nn.parameter.UninitializedParameter)), None)
    if lazy is not None:
        raise ModelError(f"{lazy} is not initialized yet", "weights that hold numbers", "call the model once first")
    exported = isinstance(model, torch.fx.GraphModule)
    for name, module in model.named_modules():
        stochastic = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        batchwise = isinstance(module, nn.modules.batchnorm._NormBase) and not isinstance(
            module, nn.modules.instancenorm._InstanceNorm
        )
        recurrent = isinstance(module, nn.RNNBase) and module.dropout > 0
        if module.training and not exported and (stochastic or batchwise or recurrent or _iterates(module)):
            raise ModelError(
                f"{name or 'the model'} ({type(module).__name__}) is in train mode",
                "eval mode, where each example's output is its own and repeatable",
                "call model.eval() first",
            )
    devices = frozenset(p.device for p in (*model.parameters(), *model.buffers()))
    if any(d.type == "meta" for d in devices):
        raise ModelError("weights on the meta device", "weights that hold numbers", "load the weights first")
    dtypes = frozenset(p.dtype for p in model.parameters() if p.is_floating_point())
    return Facts(devices, dtypes, own_hooks(model), any(isinstance(m, torch.jit.ScriptModule) for m in model.modules()))
