"""Options that no rule can follow are refused where they are given."""

from typing import Any, cast

import pytest
import torch
from torch import nn

import apportion as ap
from apportion.core.errors import ConfigError, RuleError
from apportion.parts.rules import Epsilon, Gamma, Plain, Rules, ZBox

IMPOSSIBLE = {
    "epsilon": lambda: Epsilon(-1.0),
    "gamma": lambda: Gamma(-1.0),
    "generalized gamma": lambda: ap.rules.GeneralizedGamma(-1.0),
    "alpha beta": lambda: ap.rules.AlphaBeta(1.0, 1.0),
    "box": lambda: ZBox(1.0, 0.0),
    "box of a channel": lambda: ZBox(0.0, (1.0, -1.0)),
    "box of other channels": lambda: ZBox((0.0, 0.0, 0.0), (1.0, 1.0)),
    "softplus": lambda: ap.rules.softplus(0.0),
    "negative softplus": lambda: ap.rules.softplus(-2.0),
    "no pairs": lambda: Rules(cast(Any, ("relu", Plain()))),
    "a string as rule": lambda: Rules(cast(Any, (("relu", "guided"),))),
    "a class as rule": lambda: Rules(cast(Any, (("relu", Plain),))),
    "named without operation": lambda: Rules(named=cast(Any, (("features.*", Plain()),))),
    "audit of a method": lambda: ap.rules.audit(nn.ReLU(), torch.ones(1, 2), cast(Any, ap.LRP())),
    "audit of a name": lambda: ap.rules.audit(nn.ReLU(), torch.ones(1, 2), cast(Any, "lrp")),
    "bias report of a model": lambda: ap.bias_report(cast(Any, nn.Linear(2, 2)), torch.ones(1, 2)),
}


@pytest.mark.parametrize("what", IMPOSSIBLE)
@pytest.mark.usefixtures("as_users_run")
def test_impossible_options_are_refused(what: str) -> None:
    with pytest.raises(ConfigError):
        IMPOSSIBLE[what]()


def test_lrp_on_a_transformer_names_the_rules_for_it() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    with pytest.raises(RuleError, match="attn_lrp"):
        ap.LRP()(ap.Field(net), torch.randn(1, 4), target=0)
    ap.LRP(rules=ap.rules.attn_lrp())(ap.Field(net), torch.randn(1, 4), target=0)
