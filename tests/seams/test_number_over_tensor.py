"""A number over a tensor is nonlinear, however it is spelled."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import apportion as ap
from apportion.core.errors import RuleError

X = torch.rand(2, 3, dtype=torch.float64) + 0.5
SPELLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "div": lambda x: torch.div(2.0, x),  # pyright: ignore[reportArgumentType, reportCallIssue]
    "true_divide": lambda x: torch.true_divide(2.0, x),  # pyright: ignore[reportArgumentType, reportCallIssue]
    "by name": lambda x: torch.div(2.0, other=x),  # pyright: ignore[reportArgumentType, reportCallIssue]
}


@pytest.mark.parametrize("spelled", SPELLINGS)
def test_it_is_treated_as_the_operator_is(spelled: str):
    divide = SPELLINGS[spelled]
    for method in (ap.LRP(), ap.DeepLIFT()):
        a, b = (method(ap.Field(f), X, target=0).values for f in (lambda x: divide(x + 1), lambda x: 2.0 / (x + 1)))
        torch.testing.assert_close(a, b)
    gap = ap.DeepLIFT()(ap.Field(lambda x: divide(x + 1)), X, target=0).gap
    assert gap is not None
    assert gap.abs().max() <= 1e-12


def test_a_set_without_a_rule_for_it_refuses():
    rules = ap.rules.Rules((("relu", ap.rules.Guided()),))
    q = ap.Field(lambda x: torch.relu(SPELLINGS["div"](x))).bind(X, target=0)
    with pytest.raises(RuleError, match="div"):
        q.backward(X, torch.arange(2), rules)
