"""The layers of a model, and new parameters for them."""

from __future__ import annotations

import copy
import math
from typing import Literal

import torch
from torch import Tensor, nn

from apportion.core.errors import ModelError, kind_of
from apportion.core.field import Field
from apportion.core.streams import key_of

Draw = Literal["redrawn", "shuffled"]


def with_layers(field: Field) -> tuple[nn.Module, list[tuple[str, list[str]]]]:
    """Copy the field's model, and list its layers from input to output: names, and those of their parameters.

    A layer is a module with parameters of its own, bare ones included, in the order of definition. Scales and shifts of
    normalizations belong to the layer before them: alone, `reset_parameters` would make them ones and zeros, which is
    no draw.

    Raises:
        ModelError: a function, or a model without parameters.
    """
    if not isinstance(field.model, nn.Module):
        raise ModelError(
            f"{kind_of(field.model)} whose parameters are to be randomized", "an nn.Module", "wrap it in a module"
        )
    model = copy.deepcopy(field.model)
    known = {name for name, _ in model.named_parameters()}  # those of tied layers stand under their first name
    found: list[tuple[str, list[str]]] = []
    for name, module in model.named_modules():
        own = [f"{name}.{p}" if name else p for p, _ in module.named_parameters(recurse=False)]
        own = [p for p in own if p in known]
        if not own:
            continue
        if _is_normalization(module) and found:
            found[-1][1].extend(own)
        else:
            found.append((name or "(itself)", own))
    if not found:
        raise ModelError("a model without parameters", "parameters to randomize", "judge another model")
    return model, found


def _is_normalization(module: nn.Module) -> bool:
    return all(p.ndim <= 1 for p in module.parameters(recurse=False)) and "norm" in type(module).__name__.lower()


@torch.no_grad()
def randomize(model: nn.Module, parameters: list[str], draw: Draw, seed: int, like: dict[str, Tensor]) -> None:
    """Give parameters new numbers, in place.

    Args:
        model: the copy.
        parameters: their names.
        draw: "redrawn" from a normal distribution with mean and spread of the learned ones, which every kind of
            parameter has, also bare ones and those whose module knows no initialization; "shuffled" puts the learned
            numbers in another order. Both keep the scale of every layer, so that maps do not change by scale alone.
        seed: of the numbers; each parameter has its own.
        like: the learned numbers.
    """
    table = dict(model.named_parameters())
    for name in parameters:
        learned = like[name]
        g = torch.Generator().manual_seed(key_of(seed, "randomized", name) >> 1)
        flat = learned.detach().flatten().cpu()
        if draw == "shuffled" and not bool((flat == flat[:1]).all()):
            new = flat[torch.randperm(len(flat), generator=g)]
        else:  # constant ones, as of a fresh normalization, have no other order
            spread = float(flat.double().std(correction=0)) if len(flat) > 1 else 0.0
            mean = float(flat.double().mean()) if learned.ndim <= 1 else 0.0
            scale = spread or abs(mean) or 1 / math.sqrt(max(1, len(flat)))
            new = mean + scale * torch.randn(len(flat), generator=g)
        table[name].copy_(new.reshape(learned.shape).to(learned))


@torch.no_grad()
def restore(model: nn.Module, like: dict[str, Tensor]) -> None:
    """Bring the learned parameters back."""
    for name, p in model.named_parameters():
        p.copy_(like[name])
