"""What users give by mistake is refused by one of the library's errors, which says what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import apportion as ap
from apportion.core.errors import ApportionError
from apportion.parts.rules import LinearPatterns, Patterns
from apportion.parts.surrogate.tables import NormalRows, Quartiles


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))


X = torch.rand(16, 1, 5, 5, generator=torch.Generator().manual_seed(0))
Y = torch.arange(16) % 2
MAP = ap.GradCAM()(ap.Field(net()), X, target=0)
FIT: Any = Patterns.fit
ROWS = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
CONDITIONAL: Any = ap.fills.Conditional

MISTAKES: dict[str, tuple[Callable[[ap.Field], Any], str]] = {
    "the input as layer": (lambda f: ap.GradCAM(layer=ap.Input())(f, X), "a layer inside the model"),
    "patterns of no data": (lambda f: FIT(f, None), "as data"),
    "patterns of a model": (lambda f: FIT(f.model, X), "a field"),
    "patterns by a name": (lambda f: FIT(f, X, "linear"), "LinearPatterns"),
    "patterns by a class": (lambda f: FIT(f, X, LinearPatterns), "LinearPatterns"),
    "patterns of a pair": (lambda f: FIT(f, (X, Y)), "one pair"),
    "a number as name": (lambda f: ap.method(3), "the name of a method"),  # pyright: ignore[reportArgumentType]
    "to no size": (lambda f: MAP.resize((0, 4)), "positive ints"),
    "to a number": (lambda f: MAP.resize(0), "positive ints"),  # pyright: ignore[reportArgumentType]
    "to a word": (lambda f: MAP.resize("a"), "positive ints"),  # pyright: ignore[reportArgumentType]
    "to a negative size": (lambda f: MAP.resize((-1, 2)), "positive ints"),
    "to a fraction": (lambda f: MAP.resize((4.5, 2)), "positive ints"),  # pyright: ignore[reportArgumentType]
    "weights in a list": (lambda f: CONDITIONAL(ROWS, [0.5, 0.5]), "a tensor, one for each row"),
    "a table of nothing": (lambda f: ap.LIME(rows=Quartiles()).fitted(f, ROWS[:0]), "two rows"),
    "a table with a gap": (lambda f: ap.LIME(rows=NormalRows()).fitted(f, ROWS / 0), "finite"),
    "compile in words": (lambda f: ap.Field(f.model, compile="no"), "True or False"),  # pyright: ignore[reportArgumentType]
    "fast in words": (lambda f: ap.Field(f.model, fast="no"), "True or False"),  # pyright: ignore[reportArgumentType]
    "unused in words": (lambda f: ap.explain(f.model, X, "gradient", allow_unused="no"), "True or False"),  # pyright: ignore
}


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.usefixtures("as_users_run")
def test_mistakes(name: str) -> None:
    call, said = MISTAKES[name]
    with pytest.raises(ApportionError, match=said) as caught:
        call(ap.Field(net()))
    assert caught.value.do


def test_patterns_of_labelled_batches() -> None:
    field, x = ap.Field(net().double()), X.double()
    plain = Patterns.fit(field, x).layers
    for data in (DataLoader(TensorDataset(x, Y), 2), [(x, Y)], [x[:1], x[1:]]):
        found = Patterns.fit(field, data).layers
        for name, pattern in plain.items():
            torch.testing.assert_close(found[name], pattern)


def test_cam_says_what_is_not_linear() -> None:
    """Weights that are right, and a remainder that changes with the input."""

    class Besides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(1, 2, 3), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.conv(x).mean((2, 3))) + x.square().sum((1, 2, 3))[:, None]

    with pytest.raises(ApportionError, match="weights are constant, but what they leave") as caught:
        ap.CAM(layer=ap.At("conv"))(ap.Field(Besides()), X, target=0)
    assert "0.0" not in str(caught.value)
