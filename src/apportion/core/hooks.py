"""Hooks the user set on a model, which run in our passes too."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

_KINDS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def own_hooks(model: Any) -> str:
    """Name the modules with hooks that are not torch's own, such as weight norm and pruning have; empty for none.

    >>> layer = nn.Linear(1, 1)
    >>> _ = layer.register_forward_hook(lambda module, args, output: None)
    >>> own_hooks(nn.Sequential(layer))
    "on '0'"
    """
    if not isinstance(model, nn.Module):
        return ""
    found = [
        name
        for name, module in model.named_modules()
        if any(not _is_torch(hook) for kind in _KINDS for hook in getattr(module, kind, {}).values())
    ]
    listed = ", ".join(repr(name) if name else "the model" for name in found[:3])
    return f"on {listed}{', ...' if len(found) > 3 else ''}" if found else ""


def _is_torch(hook: Any) -> bool:
    while isinstance(hook, functools.partial):
        hook = hook.func
    module = getattr(hook, "__module__", None) or type(hook).__module__
    return module.split(".")[0] == "torch"
