"""Spellings that rules once stumbled over: conversions by method, activations of single numbers."""

import pytest
import torch
from torch import Tensor

import apportion as ap

X = torch.rand(2, 3)


@pytest.mark.parametrize("name", ["float", "int"])
def test_conversions_take_no_number_out(name: str):
    def model(x: Tensor) -> Tensor:
        shown = getattr(x.detach(), name)()
        assert shown.shape == x.shape
        return torch.tanh(x)

    found = ap.LRP()(ap.Field(model), X, target=0)
    assert not any("takes a number out" in w for w in found.warnings)


def test_a_number_taken_out_is_noted():
    def model(x: Tensor) -> Tensor:
        return torch.tanh(x) * float(x.detach()[0, 0])

    found = ap.LRP()(ap.Field(model, batch_size=1), X[:1], target=0)
    assert any("takes a number out" in w for w in found.warnings)


def test_an_activation_of_one_number():
    def model(x: Tensor) -> Tensor:
        return torch.stack([torch.tanh(e.sum()) for e in x])[:, None]

    values = ap.LRP()(ap.Field(model), X, target=0).values
    torch.testing.assert_close(values, X / X.sum(1, keepdim=True) * torch.tanh(X.sum(1, keepdim=True)))
