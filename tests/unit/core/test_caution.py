"""Scores that warn of outputs they do not fit."""

import pytest
import torch
from torch import nn

import apportion as ap


@pytest.mark.parametrize("score", [ap.Probability(), ap.LogProbability(), ap.LogOdds()])
def test_a_second_softmax_is_noticed(score: ap.Score) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Softmax(1))
    a = ap.Gradient()(ap.Field(net, score), torch.randn(2, 3))
    assert any("look like probabilities" in w for w in a.warnings)


@pytest.mark.parametrize("net", [nn.Linear(3, 4), nn.Sequential(nn.Linear(3, 4), nn.Softmax(1))])
def test_no_warning_without_reason(net: nn.Module) -> None:
    softmax_of_logits = ap.Probability() if isinstance(net, nn.Linear) else ap.Logit()
    assert not ap.Gradient()(ap.Field(net, softmax_of_logits), torch.randn(2, 3)).warnings
