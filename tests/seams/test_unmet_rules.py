"""Rules that no operation meets, functions outside the vocabulary, and what rules have to say."""

from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apportion as ap
from apportion.core.errors import RuleError
from apportion.parts.rules import Epsilon, Flat, Gamma, Plain, Rule, Rules, ZBox, ZPlus

X = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def dense() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).double()


def asked(model: Any, x: Tensor = X) -> Any:
    return ap.Field(model).bind(x)


def sent(model: Any, rules: Rules, **options: Any) -> Any:
    return asked(model).backward(X, torch.arange(len(X)), rules, **options)


def test_a_first_rule_that_meets_no_layer_is_refused() -> None:
    net = dense()
    rules = Rules((("layer", Epsilon()),), first=ZPlus(), otherwise=Plain())
    assert sent(net, rules).relevance.shape == X.shape
    with pytest.raises(RuleError, match=r"first=ZPlus\(\)(.|\n)*no layer reads the input, but mul"):
        sent(lambda x: net(x * 2), rules)
    with pytest.raises(RuleError, match=r"first=ZPlus\(\)(.|\n)*getitem"):
        sent(lambda x: net(x[:, :4]), rules)
    # a layer that a rule of its module has took the place of the first one, as documented
    named = Rules(rules.table, first=ZPlus(), named=(("0", "linear", Epsilon(0.5)),), otherwise=Plain())
    assert sent(net, named).relevance.shape == X.shape


@pytest.mark.parametrize("named", [("0", "conv", ZPlus()), ("1", "layer", ZPlus()), ("0*", "product", Plain())])
def test_a_rule_of_a_module_that_meets_nothing_there_is_refused(named: tuple[str, str, Rule]) -> None:
    with pytest.raises(RuleError, match=f"for '{named[1]}' in '{named[0][0]}"):
        sent(dense(), Rules((("layer", Epsilon()),), named=(named,), otherwise=Plain()))


def test_a_rule_behind_another_of_the_same_layer_is_refused() -> None:
    named: Any = (("*", "layer", ZPlus()), ("0", "linear", Epsilon()))
    with pytest.raises(RuleError, match="an earlier rule has it"):
        sent(dense(), Rules(named=named, otherwise=Plain()))


def test_an_only_layer_is_not_first_and_last_at_once() -> None:
    with pytest.raises(RuleError, match="which is both"):
        sent(nn.Linear(4, 2).double(), Rules(first=Flat(), last=Epsilon(), otherwise=Plain()))


def test_audits_list_them() -> None:
    net = dense()
    rules = Rules(first=ZPlus(), named=(("1", "layer", ZPlus()),), otherwise=Plain())
    rows = ap.rules.audit(lambda x: net(x * 2), X, rules).without_rule
    assert [row.why.split(":")[0] for row in rows] == ["first=ZPlus()", "the rule ZPlus() for 'layer' in '1'"]


def test_first_layers_of_reference_rows_keep_in_step() -> None:
    net, rules = dense(), Rules((("relu", ap.rules.Rescale()),), first=Epsilon(0.0), otherwise=Plain())
    done = asked(net).backward(X, torch.arange(2), rules, torch.zeros_like(X))
    wanted = asked(net).backward(X, torch.arange(2), ap.rules.deep_lift_rescale(), torch.zeros_like(X))
    torch.testing.assert_close(done.signal, wanted.signal)


# -- what rules note --------------------------------------------------------------------------------


def test_notes_of_rules_are_warnings_of_the_question() -> None:
    q = asked(dense())
    q.backward(X, torch.arange(2), Rules((("layer", Gamma()), ("relu", Plain())), first=ZBox(-0.1, 0.1)))
    assert any("leaves the box" in w for w in q.warnings)
    q = asked(dense())
    q.backward(X, torch.arange(2), Rules((("layer", Gamma()), ("relu", Plain()))))
    assert any("GeneralizedGamma" in w for w in q.warnings)


def test_deep_taylor_says_where_relu6_is_at_its_cap() -> None:
    net = nn.Sequential(nn.Linear(4, 5, bias=False), nn.ReLU6(), nn.Linear(5, 1, bias=False)).double()
    cast(Any, net[0]).weight.data.uniform_(0.1, 1)
    cast(Any, net[2]).weight.data.uniform_(0.1, 1)
    relu = nn.Sequential(net[0], nn.ReLU(), net[2])
    x = torch.rand(2, 4, dtype=torch.float64)
    method = ap.DeepTaylor()
    below = method(ap.Field(net), x)
    torch.testing.assert_close(below.values, method(ap.Field(relu), x).values)
    assert not any("cap" in w for w in below.warnings)
    above = method(ap.Field(net), 100 * x)
    assert any("at their cap" in w for w in above.warnings)
    torch.testing.assert_close(above.values.sum(1), net(100 * x).sum(1))  # nothing is lost there


# -- outside the vocabulary -------------------------------------------------------------------------


class Doubling(Rule):
    def back(self, call: Any, signal: Any) -> Any:
        return tuple(None if s is None else 2 * s for s in call.vjp(signal))


def test_functions_outside_the_vocabulary_follow_the_rule_of_all_else() -> None:
    def model(x: Tensor) -> Tensor:
        return torch.special.i0e(x)

    plain = sent(model, Rules(otherwise=Plain())).signal
    for record in (False, True):
        done = sent(model, Rules(otherwise=Doubling()), record=record)
        torch.testing.assert_close(done.signal, 2 * plain)

    def overwriting(x: Tensor) -> Tensor:
        return (x * 1).xlogy_(torch.ones_like(x))

    assert sent(overwriting, Rules(otherwise=Plain())).signal.shape == X.shape
    with pytest.raises(RuleError, match="xlogy_"):
        sent(overwriting, Rules(otherwise=Doubling()))
    names = [row.rule for row in ap.rules.audit(overwriting, X, Rules(otherwise=Doubling())).without_rule]
    assert names == ["none"]


class Thrice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        return 3 * x

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * 3


def test_declared_functions_are_refused_where_each_step_has_to_be_seen() -> None:
    def model(x: Tensor) -> Tensor:
        return F.relu(cast(Any, Thrice).apply(x.clone()))

    rules = Rules(otherwise=Plain(), custom=("Thrice",))
    assert sent(model, rules).signal.shape == X.shape
    with pytest.raises(RuleError, match=r"recorded(.|\n)*leave out record and differentiable"):
        sent(model, rules, record=True)
