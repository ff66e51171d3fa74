"""A backward pass that fails inside the model is told as such."""

import pytest
import torch
from torch import Tensor

import apportion as ap


def overwrites(x: Tensor) -> Tensor:
    h = (2 * x).exp()
    h += 1  # exp needs its result in the backward pass
    return h.sum(1)


def test_in_place_on_what_backward_needs() -> None:
    with pytest.raises(ap.ApportionError, match=r"backward pass of function failed(?s:.*)in-place"):
        ap.Gradient()(ap.Field(overwrites), torch.randn(2, 3))
