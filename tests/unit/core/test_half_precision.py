"""Half precision: what the model cannot help is lost, sums are not."""

import pytest
import torch
from torch import nn

import apportion as ap


@pytest.mark.parametrize("explainer", [ap.IntegratedGradients(), ap.SmoothGrad(samples=64)])
def test_sums_are_wide(explainer: ap.Explainer) -> None:
    """For a linear model every gradient is exact, so that only the sums could lose anything."""
    net = nn.Linear(8, 1, bias=False).bfloat16()
    with torch.no_grad():
        net.weight.copy_(1 + torch.arange(8) / 128)
    x = torch.ones(2, 8, dtype=torch.bfloat16)
    values = explainer(ap.Field(net), x).values
    assert values.dtype == torch.bfloat16
    assert torch.equal(values, net.weight.detach().expand(2, 8))
