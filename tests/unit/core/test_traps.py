"""Models and scores that give silently wrong numbers unless one looks: each is noticed or got right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import apportion as ap

DOUBLE = torch.float64


def gradient(model: nn.Module, x: Tensor, target: int = 1) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(model(leaf)[:, target].sum(), leaf)[0]


class CopiesToItself(nn.Linear):
    def __deepcopy__(self, memo: Any) -> CopiesToItself:
        return self


class CopiesInAnotherOrder(nn.Module):
    def __init__(self, flip: bool = False) -> None:
        super().__init__()
        for name in ("b", "a") if flip else ("a", "b"):
            self.add_module(name, nn.Linear(4, 4).double())

    def __deepcopy__(self, memo: Any) -> CopiesInAnotherOrder:
        new = CopiesInAnotherOrder(flip=True)
        new.load_state_dict(self.state_dict())
        return new

    def forward(self, x: Tensor) -> Tensor:
        return self.get_submodule("b")(self.get_submodule("a")(x).tanh())


class CopiesWithoutItsTeacher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.teacher: nn.Module | None = nn.Linear(4, 4).double()
        self.head = nn.Linear(4, 3).double()

    def __deepcopy__(self, memo: Any) -> CopiesWithoutItsTeacher:
        new = CopiesWithoutItsTeacher()
        new.head.load_state_dict(self.head.state_dict())
        new.teacher = None
        return new

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x if self.teacher is None else self.teacher(x).tanh())


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(CopiesToItself(4, 4), nn.Tanh(), nn.Linear(4, 3)).double(),
        CopiesInAnotherOrder,
        CopiesWithoutItsTeacher,
    ],
)
def test_modules_that_copy_themselves(make: Callable[[], nn.Module]) -> None:
    model, x = make().eval(), torch.randn(5, 4, dtype=DOUBLE)
    flags = [(p.requires_grad, p.dtype, p.data_ptr()) for p in model.parameters()]
    a = ap.Gradient()(ap.Field(model), x, target=1)
    assert torch.allclose(a.values, gradient(model, x), rtol=1e-12)
    assert [(p.requires_grad, p.dtype, p.data_ptr()) for p in model.parameters()] == flags


def test_a_precision_never_reaches_the_users_weights() -> None:
    model = nn.Sequential(CopiesToItself(4, 4), nn.Linear(4, 3))
    with pytest.raises(ap.ApportionError, match="cannot be copied"):
        ap.Gradient()(ap.Field(model, precision=DOUBLE), torch.randn(2, 4), target=0)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


class Settings:
    scale = 1.0

    def __init__(self) -> None:
        self.scale = 1.0


class WithLooseParts(nn.Module):
    """Keeps settings in an object and layers in a plain list, as real code does."""

    def __init__(self) -> None:
        super().__init__()
        self.settings = Settings()
        self.layers = [nn.Linear(4, 4).double(), nn.Linear(4, 3).double()]

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](x).tanh()) * self.settings.scale


def test_changes_of_loose_parts_are_seen() -> None:
    model, x = WithLooseParts(), torch.randn(3, 4, dtype=DOUBLE)
    field = ap.Field(model)
    ap.Gradient()(field, x, target=1)
    model.settings.scale = 10.0
    assert torch.allclose(ap.Gradient()(field, x, target=1).values, gradient(model, x), rtol=1e-12)
    with torch.no_grad():
        model.layers[0].weight.mul_(2)
    assert torch.allclose(ap.Gradient()(field, x, target=1).values, gradient(model, x), rtol=1e-12)
    model.layers[1] = nn.Linear(4, 3).double()
    assert torch.allclose(ap.Gradient()(field, x, target=1).values, gradient(model, x), rtol=1e-12)


def test_arrays_are_not_copied() -> None:
    class Holder(nn.Linear):
        data: Any = None

    import numpy as np

    model = Holder(2, 2)
    model.data = np.zeros(1 << 18)
    twin = ap.Field(model)
    twin.bind(torch.zeros(1, 2), target=0)
    module = twin.twin().module
    assert module is not None
    assert module.data is model.data


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=mask).mean(1))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_valued_and_differentiated_is_one_function() -> None:
    """Without gradient torch drops padded positions; the score must not depend on that."""
    model, x = Padded().double().eval(), torch.randn(2, 6, 4, dtype=DOUBLE)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[0, 3:] = True
    q = ap.Field(model, extra={"mask": mask}).bind(x, target=1)
    owner = torch.arange(2)
    assert torch.allclose(q.value(x, owner), q.value_and_grad(x, owner)[0], rtol=1e-12)


@pytest.mark.parametrize(
    ("score", "words"),
    [
        (lambda o: o[:, 1] / o.abs().max(), "depends on the other rows"),
        (lambda o: o.softmax(0)[:, 1], "depends on the other rows"),
        (lambda o: o[:, 1] * torch.rand(len(o)), "different numbers for the same outputs"),
    ],
)
def test_scores_that_mix_rows_or_draw(score: Any, words: str) -> None:
    field, x = ap.Field(nn.Linear(4, 3), score), torch.randn(3, 4)
    state = torch.get_rng_state()
    with pytest.raises(ap.ApportionError, match=words):
        ap.Gradient()(field, x)
    assert torch.equal(torch.get_rng_state(), state)


class Centered(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input - input.mean(0)).tanh()


class RemembersFirst(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 3)
        self.seen: dict[str, Tensor] = {}

    def forward(self, input: Tensor) -> Tensor:
        self.seen.setdefault("first", super().forward(input[:1]).detach())
        return super().forward(input) * self.seen["first"]


@pytest.mark.parametrize("x", [torch.ones(1, 4), torch.ones(3, 4), torch.randn(1, 4), torch.randn(3, 4)])
@pytest.mark.parametrize("model", [Centered(4, 3), RemembersFirst()])
def test_batches_that_mix_and_models_that_remember(model: nn.Module, x: Tensor) -> None:
    with pytest.raises(ap.ApportionError, match="depends on the"):
        ap.Gradient()(ap.Field(model), x, target=1)


class Caches(nn.Linear):
    """Writes to itself, harmlessly."""

    last: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        self.last = super().forward(input)
        return self.last


def test_a_harmless_cache_is_welcome() -> None:
    model = Caches(4, 3)
    assert ap.Gradient()(ap.Field(model), torch.randn(3, 4), target=1).values.shape == (3, 4)
    assert model.last is None
