"""The run-time checks of annotations refuse what jaxtyping's own decorator refuses, and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jaxtyping
import pytest
import shape_checks
import torch
from jaxtyping import Float, Int
from torch import Tensor

import apportion as ap


def product(x: Float[Tensor, "a b"], y: Float[Tensor, "b c"], end: int | None = None) -> Float[Tensor, "a c"]:
    return (x @ y)[:end]


def pieces(x: list[Float[Tensor, "n"]], scale: float = 1) -> Iterator[Tensor]:
    return (scale * one for one in x)


def square(n: int) -> Float[Tensor, "n n"]:
    return torch.ones(2, n)


class Pair:
    left: Float[Tensor, "n"]
    right: Float[Tensor, "n"]


ones = torch.ones
CALLS: list[tuple[Any, tuple[Any, ...], bool]] = [
    (product, (ones(2, 3), ones(3, 4)), True),
    (product, (ones(2, 3), ones(2, 3)), False),  # an axis differs between arguments
    (product, (ones(2, 3), ones(3, 4), 1), False),  # between an argument and the result
    (product, (ones(2, 3).long(), ones(3, 4).long()), False),
    (product, (ones(2, 3), ones(3, 4), "1"), False),
    (pieces, ([ones(2)], 2), True),
    (pieces, ([ones(2, 2)],), False),
    (pieces, ([ones(2)], "2"), False),
    (square, (2,), True),
    (square, (3,), False),  # within the result
    (Pair, (ones(2), ones(2)), True),
    (Pair, (ones(2), ones(3)), False),
]


@pytest.mark.parametrize(("made", "args", "welcome"), CALLS)
@pytest.mark.parametrize("decorator", [jaxtyping._decorator.jaxtyped, shape_checks.jaxtyped])
def test_the_same_calls_are_refused(decorator: Any, made: Any, args: tuple[Any, ...], welcome: bool) -> None:
    if isinstance(made, type):
        made = dataclasses.dataclass(
            type("Another", (made,), {"__annotations__": made.__annotations__, "__module__": __name__})
        )
    checked = decorator(typechecker=shape_checks.check)(made)
    if welcome:
        checked(*args)
        return
    with pytest.raises(jaxtyping.TypeCheckError):
        checked(*args)


def test_the_sizes_of_axes_are_told() -> None:
    with pytest.raises(jaxtyping.TypeCheckError) as found:
        shape_checks.jaxtyped(typechecker=None)(product)(ones(2, 3), ones(2, 3))
    assert "a=2" in "".join(found.value.__notes__)


def test_inner_functions_are_told_apart() -> None:
    def of(kind: int) -> Any:
        def one(x: Int[Tensor, "n"]) -> None: ...

        def other(x: Float[Tensor, "n"]) -> None: ...

        return shape_checks.jaxtyped(typechecker=None)((one, other)[kind])

    for _ in range(2):
        of(0)(ones(2).long())
        of(1)(ones(2))
        with pytest.raises(jaxtyping.TypeCheckError):
            of(0)(ones(2))


def test_a_call_with_too_few_arguments_fails_as_ever() -> None:
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'y'"):
        shape_checks.jaxtyped(typechecker=None)(product)(ones(2, 3))


def test_the_library_is_checked() -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        ap.Gradient().passes("3")  # pyright: ignore[reportArgumentType]
    with pytest.raises(jaxtyping.TypeCheckError):
        ap.quadrature.Midpoint("3")  # pyright: ignore[reportArgumentType]
