"""Snapshots of everything an explanation must leave as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from apportion.core.config import digest

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Record a model's bits, flags, gradients, hooks and attributes, and the process's random states.

    The state of Python's own `random` is left out: run-time type checkers draw from it.
    """
    out: dict[str, Any] = {
        "state_dict": {k: digest(v) if isinstance(v, torch.Tensor) else repr(v) for k, v in model.state_dict().items()},
        "parameters": {
            n: (id(p), p.data_ptr(), p.requires_grad, None if p.grad is None else digest(p.grad))
            for n, p in model.named_parameters()
        },
        "buffers": {n: (id(b), b.data_ptr()) for n, b in model.named_buffers()},
        "torch random state": digest(torch.get_rng_state()),
        "numpy random state": digest(torch.from_numpy(np.random.get_state()[1].astype(np.int64))),  # noqa: NPY002  # pyright: ignore
        "grad mode": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
    }
    for name, module in model.named_modules():
        own = vars(module)
        out[f"module {name or '(top)'}"] = {
            "id": id(module),
            "training": module.training,
            "hooks": {h: len(own[h]) for h in _HOOKS if h in own},
            "attributes": sorted(own),
            "plain": {k: v for k, v in own.items() if isinstance(v, bool | int | float | str)},
        }
    return out


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Name what changed between two snapshots."""
    return [k for k in {**before, **after} if before.get(k) != after.get(k)]
