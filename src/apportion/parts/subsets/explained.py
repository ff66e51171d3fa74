"""Data for networks that learn to explain: batches bound to a field, and tensors of pictures or tables insisted on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor

from apportion.core import tree
from apportion.core.errors import ConfigError, InputError, kind_of
from apportion.core.field import Field
from apportion.core.question import Question
from apportion.core.score import Score, main_output
from apportion.core.site import Input
from apportion.core.tree import Tree
from apportion.parts.batches import as_integers, batches, is_labelled


def same_field(field: Any, name: str, score: Score | Callable[[Any], Tensor] | None = None) -> Field:
    """Give a field of the same model at its input, for another score.

    Raises:
        ConfigError: something that is no field, or one at an inner site.
    """
    if not isinstance(field, Field) or not isinstance(field.site, Input):
        given = kind_of(field) if not isinstance(field, Field) else f"a field at {field.site}"
        raise ConfigError(f"{name} of {given}", "a field at the model's input", f"write {name}(ap.Field(model), data)")
    return Field(
        field.model,
        field.score if score is None else score,
        extra=field.extra,
        bounds=field.bounds,
        normalize=field.normalize,
        precision=field.precision,
        batch_size="auto" if field.is_automatic else field.chunk,
        allow_unused=field.allow_unused,
    )


def whole_output(outputs: Any) -> Tensor:
    """Score nothing of a class, where the outputs are asked for themselves: so no pass is spent on finding one.

    >>> import torch
    >>> whole_output(torch.ones(2, 3)).tolist()
    [3.0, 3.0]
    """
    return main_output(outputs).flatten(1).sum(1)


def bound(
    field: Field, data: Tree | Iterable[Tree], name: str, seed: int = 0, *, labels: bool = True
) -> Iterator[Question]:
    """Bind batch after batch, with labels beside examples as targets, unless they are to be passed over.

    Raises:
        InputError: a batch that is not one tensor, or no batch.
    """
    met = False
    for batch in batches(data, f"{name}(field, x)"):
        met = True
        labelled = is_labelled(batch)
        yield field.bind(
            one_tensor(batch[0] if labelled else batch, name),
            target=as_integers(batch[1]) if labelled and labels else None,
            seed=seed,
        )
    if not met:
        raise InputError("no data", "at least one batch", "an iterator is spent after one use")


def one_tensor(x: Tree, name: str) -> Tensor:
    """Insist on a single tensor of floating-point numbers.

    Raises:
        InputError: several, or integers.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        shapes = [tuple(t.shape) for t in tree.leaves(x)]
        given = f"{name} of {'integers' if isinstance(x, Tensor) else kind_of(x)} of shapes {shapes}"
        raise InputError(given, "one floating-point tensor", "explain one input, or its embedding")
    return x
