"""Mistakes about games, fills and tables of values are refused by what was given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import apportion as ap
from apportion.core.errors import ConfigError, InputError
from apportion.parts.masks.dividends import from_dividends, shares

pytestmark = pytest.mark.usefixtures("as_users_run")


def test_prediction_difference_takes_the_label_of_a_loss() -> None:
    net = torch.nn.Linear(4, 3).double()
    x, ask = torch.randn(2, 4, dtype=torch.float64), ap.PredictionDifference(fill=ap.fills.Baselines())
    a = ask(ap.Field(net, ap.Loss()), x, target=[2, 0])
    torch.testing.assert_close(a.values, ask(ap.Field(net), x, target=[2, 0]).values)
    y = torch.ones(2, dtype=torch.float64)
    squared, of_sum = (ap.Loss(lambda z, y, f=f: (f(z) - y) ** 2) for f in (lambda z: z, lambda z: z.sum(1)))
    for model, score, target in ((lambda x: x.sum(1), squared, y), (net, of_sum, y), (net, lambda z: z.sum(1), None)):
        with pytest.raises(ConfigError, match="tells of no class"):
            ask(ap.Field(model, score), x, target=target)


@pytest.mark.parametrize("wrong", [[0.0, 1.0], None, torch.zeros(0), torch.tensor(1.0), torch.zeros(3)])
def test_tables_that_are_none(wrong: Any) -> None:
    for call in (ap.harsanyi, from_dividends, lambda v: shares(v, torch.ones(2))):
        with pytest.raises(InputError, match=r"2\^n"):
            call(wrong)
    with pytest.raises(InputError, match=r"shares of shape \(2,\)"):
        shares(torch.zeros(4), torch.ones(2))


@pytest.mark.parametrize("wrong", [[[0, 1], [0]], None, [["a", 1]], []])
def test_words_that_are_none(wrong: Any) -> None:
    with pytest.raises(InputError, match="numbers of words"):
        ap.groups.Words.of(wrong)


def fails(x: Tensor, kept: Tensor) -> Tensor:
    raise KeyError("paint")


@pytest.mark.parametrize("paint", [lambda x, k: None, lambda x, k: (x,), lambda x: x, fails])
def test_functions_that_do_not_paint(paint: Any) -> None:
    with pytest.raises(InputError, match=r"paint"):
        ap.Shapley(fill=ap.fills.Inpainted(paint))(ap.Field(lambda x: x.sum(1)), torch.ones(1, 2))


def test_weights_in_place_of_groups() -> None:
    wrong: Any = ap.semivalues.BanzhafWeights()
    with pytest.raises(ConfigError, match="weights=BanzhafWeights"):
        ap.Semivalue(wrong)(ap.Field(lambda x: x.sum(1)), torch.ones(1, 2))
