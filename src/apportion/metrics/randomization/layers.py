"""The layers of a model, and new parameters for them."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from apportion.core.errors import ModelError, kind_of
from apportion.core.question import Question
from apportion.core.streams import key_of
from apportion.core.twin import copied

Draw = Literal["redrawn", "shuffled", "initialized"]


def with_layers(q: Question) -> tuple[nn.Module, list[tuple[str, list[str]]]]:
    """Copy the question's model, and list its layers from input to output: names, and those of their parameters.

    A layer is a module with parameters of its own, bare ones included, in the order in which a forward pass first meets
    them, whatever the order of definition; what it does not meet comes last. Scales and shifts of normalizations belong
    to the layer before them: alone, `reset_parameters` would make them ones and zeros, which is no draw.

    Raises:
        ModelError: a function, or a model without parameters.
    """
    if not isinstance(q.field.model, nn.Module):
        raise ModelError(
            f"{kind_of(q.field.model)} whose parameters are to be randomized", "an nn.Module", "wrap it in a module"
        )
    model = copied(q.field.model)
    known = {name for name, _ in model.named_parameters()}  # tied ones stand under their first name
    met = _met(q.root)
    if known and not met:
        q.warn("layers are randomized in the order of definition: a forward pass does not show where it meets them")
    layers: list[tuple[float, str, list[str], bool]] = []
    for name, module in model.named_modules():
        own = [f"{name}.{p}" if name else p for p, _ in module.named_parameters(recurse=False)]
        own = [p for p in own if p in known]
        if own:
            place = min(met.get(p, math.inf) for p in own)
            layers.append((place, name or "(itself)", own, _is_normalization(module)))
    found: list[tuple[str, list[str]]] = []
    for _, name, own, norm in sorted(layers, key=lambda one: one[0]):
        if norm and found:
            found[-1][1].extend(own)
        else:
            found.append((name, own))
    if not found:
        raise ModelError("a model without parameters", "parameters to randomize", "judge another model")
    return model, found


def _met(q: Question) -> dict[str, int]:
    """Tell where each parameter is first met when the first example passes the network as it is, unfolded."""
    checked = q._checked
    if checked is not None and checked.met is not None:
        return checked.met
    met: dict[int, int] = {}
    with _Noting(met):
        q.look(torch.zeros(1, dtype=torch.long), plain=True)
    q.looked(1)
    module = q.field.twin().module
    assert module is not None
    found = {name: met[p.data_ptr()] for name, p in module.named_parameters() if p.data_ptr() in met}
    if checked is not None:
        checked.met = found
    return found


class _Noting(TorchFunctionMode):
    """Notes which tensors functions take, in order."""

    def __init__(self, met: dict[int, int]) -> None:
        super().__init__()
        self.met = met

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for held in (*args, *(kwargs or {}).values()):
            for t in held if isinstance(held, list | tuple) else (held,):
                if isinstance(t, Tensor):
                    self.met.setdefault(t.data_ptr(), len(self.met))
        return func(*args, **(kwargs or {}))


def _is_normalization(module: nn.Module) -> bool:
    return all(p.ndim <= 1 for p in module.parameters(recurse=False)) and "norm" in type(module).__name__.lower()


@torch.no_grad()
def randomize(model: nn.Module, parameters: list[str], draw: Draw, seed: int, like: dict[str, Tensor]) -> None:
    """Give parameters new numbers, in place.

    Args:
        model: the copy.
        parameters: their names.
        draw: "redrawn" from a normal distribution with the spread of the learned ones, and for vectors their mean,
            which every kind of parameter has, also bare ones and those whose module knows no initialization;
            "shuffled" puts the learned numbers in another order; "initialized" draws as the module's own
            `reset_parameters` does, and redraws what that leaves as it was, where it has none, and normalizations.
        seed: of the numbers; each parameter has its own.
        like: the learned numbers.
    """
    table = dict(model.named_parameters())
    for name in parameters:
        learned = like[name]
        g = torch.Generator().manual_seed(key_of(seed, "randomized", name) >> 1)
        flat = learned.detach().flatten().cpu()
        new = _initialized(model, name, seed) if draw == "initialized" else None
        if new is not None:
            pass
        elif draw == "shuffled" and not bool((flat == flat[:1]).all()):
            new = flat[torch.randperm(len(flat), generator=g)]
        else:  # constant ones, as of a fresh normalization, have no other order
            spread = float(flat.double().std(correction=0)) if len(flat) > 1 else 0.0
            mean = float(flat.double().mean()) if learned.ndim <= 1 else 0.0
            scale = spread or abs(mean) or 1 / math.sqrt(max(1, len(flat)))
            new = mean + scale * torch.randn(len(flat), generator=g)
        table[name].copy_(new.reshape(learned.shape).to(learned))


def _initialized(model: nn.Module, parameter: str, seed: int) -> Tensor | None:
    """Draw a parameter as its module does, by a seed that parameters of one module share."""
    path, _, leaf = parameter.rpartition(".")
    module = model.get_submodule(path)
    if _is_normalization(module) or not callable(getattr(module, "reset_parameters", None)):
        return None
    fresh: Any = copied(module).cpu()
    for p in fresh.parameters(recurse=False):
        p.fill_(math.nan)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key_of(seed, "initialized", path) >> 1)
        fresh.reset_parameters()
    drawn = dict(fresh.named_parameters(recurse=False))[leaf].detach()
    return None if bool(drawn.isnan().any()) else drawn  # as under `weight_norm`, whose own parameters stay


@torch.no_grad()
def restore(model: nn.Module, like: dict[str, Tensor]) -> None:
    """Bring the learned parameters back."""
    for name, p in model.named_parameters():
        p.copy_(like[name])
