"""SAGE and LossSHAP: what features take away of a loss, and the probabilities of sufficiency and necessity."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn

import apportion as ap
from apportion.core.errors import ConfigError, InputError

DOUBLE = torch.float64
# every combination once: features are independent under the table's own distribution
DATA = torch.tensor(list(product([-1.0, 1.0], [-2.0, 0.0, 2.0], [0.0, 0.5, 1.5])), dtype=DOUBLE)
WEIGHT = torch.tensor([1.0, -0.75, 2.0], dtype=DOUBLE)


def linear(x: Tensor) -> Tensor:
    return x @ WEIGHT.to(x.dtype) + 0.3


def squared(outputs: Tensor, labels: Tensor) -> Tensor:
    return (outputs - labels) ** 2


FIELD = ap.Field(linear, ap.Loss(squared), batch_size=4096)


def gap(a: ap.Attribution) -> float:
    assert a.gap is not None
    return float(a.gap.abs().max())


# -- SAGE -------------------------------------------------------------------------------------------


def test_sage_of_an_additive_model() -> None:
    """w² Var(x), feature by feature, which sums to the variance of the output."""
    a = ap.SAGE()(FIELD, DATA, target=linear(DATA))
    want = WEIGHT**2 * DATA.var(0, correction=0)
    torch.testing.assert_close(a.values, want[None], atol=1e-12, rtol=0)
    assert a.domain is ap.Domain.GLOBAL
    assert gap(a) < 1e-12
    assert a.claimed_total is not None
    assert float(a.claimed_total) == pytest.approx(float(linear(DATA).var(correction=0)), abs=1e-12)


def test_sage_averages_predictions_before_the_loss() -> None:
    """Averaging losses counts the spread of the background too: twice the value here."""
    a = ap.SAGE(reduce="mean_of_score")(FIELD, DATA, target=linear(DATA))
    torch.testing.assert_close(a.values[0], 2 * WEIGHT**2 * DATA.var(0, correction=0), atol=1e-12, rtol=0)


def test_sage_is_the_mean_of_loss_shap() -> None:
    labels = linear(DATA) + torch.randn(len(DATA), generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    each = ap.LossSHAP(fill=ap.fills.Marginal(DATA))(FIELD, DATA, target=labels)
    a = ap.SAGE(fill=ap.fills.Marginal(DATA))(FIELD, DATA, target=labels)
    torch.testing.assert_close(a.values[0], each.values.mean(0), atol=1e-12, rtol=0)
    assert gap(each) < 1e-12
    assert each.values.shape == DATA.shape


def test_sampled_sage_covers_and_stops() -> None:
    """Over seeds the mean is right and intervals hold; a wish for less precision asks for less."""
    want = WEIGHT**2 * DATA.var(0, correction=0)
    rows = DATA[[0, 4, 8, 9, 13, 17]]
    true = ap.SAGE(fill=ap.fills.Marginal(DATA))(FIELD, rows, target=linear(rows)).values[0]
    explain = ap.SAGE(fill=ap.fills.Marginal(DATA), sampler=ap.samplers.Permutations(), budget=24, precision=None)
    found, covered = [], []
    for seed in range(60):
        a = explain(FIELD, rows, target=linear(rows), ids=range(len(rows)), seed=seed)
        found.append(a.values[0])
        covered.append((a.values[0] - true).abs() <= 1.96 * a.parts["standard_error"][0])
    values = torch.stack(found)
    assert bool(((values.mean(0) - true).abs() <= 3 * values.std(0) / len(values) ** 0.5).all())
    assert bool(((torch.stack(covered).double().mean(0) - 0.95).abs() < 0.08).all())
    assert float((true - want).abs().max()) > 0.05  # of these rows, not of the table
    sampler = ap.samplers.Permutations()
    coarse, fine = (
        ap.SAGE(sampler=sampler, budget=400, precision=p)(FIELD, DATA, target=linear(DATA), ids=range(len(DATA)))
        for p in (0.2, 0.01)
    )
    assert float(coarse.parts["precision"]) <= 0.2
    assert int(coarse.cost.forward.max()) <= int(fine.cost.forward.max())


def test_sage_of_groups() -> None:
    pairs = ap.groups.Labels(torch.tensor([0, 1, 1]))
    a = ap.SAGE(groups=pairs)(FIELD, DATA, target=linear(DATA))
    each = WEIGHT**2 * DATA.var(0, correction=0)
    torch.testing.assert_close(a.values, torch.stack([each[0], each[1] + each[2]])[None], atol=1e-12, rtol=0)


def test_sage_of_groups_spreads_and_shows() -> None:
    """Onto one example, whatever the number of examples, and as one map."""
    x = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    field = ap.Field(lambda x: x[:, 0, :2, :2].sum((1, 2)), ap.Loss(squared))
    a = ap.SAGE(groups=ap.groups.Squares(2))(field, x, target=x[:, 0, :2, :2].sum((1, 2)))
    assert a.values.shape == (1, 4)
    laid = a.spread(share=True)
    assert laid.domain is ap.Domain.GLOBAL
    assert laid.values.shape == (1, 1, 4, 4)
    torch.testing.assert_close(laid.values[0, 0, :2, :2], a.values[0, 0].expand(2, 2) / 4)
    assert bool((laid.values[0, 0, 2:].abs() < 1e-9).all())
    for one in (a, laid, ap.SAGE(fill=ap.fills.Baselines(), budget=64)(field, x, target=x[:, 0, 0, 0])):
        assert one.show().size == one.show(x[:1]).resize(one.show().size).size
    with pytest.raises(InputError, match="for one map of all"):
        a.show(x)
    each = ap.groups.Labels(torch.tensor([[0, 0, 1], [0, 1, 1]]))
    with pytest.raises(InputError, match="differ from one example to the next"):
        ap.SAGE(groups=each)(FIELD, DATA[:2], target=linear(DATA[:2]))


@pytest.mark.parametrize("explain", [ap.SAGE(), ap.LossSHAP()], ids=lambda e: type(e).__name__)
def test_a_loss_is_needed(explain: ap.Explainer) -> None:
    with pytest.raises(ConfigError, match=r"Logit as score[\s\S]*ap\.Loss"):
        explain(ap.Field(linear), DATA)
    if isinstance(explain, ap.SAGE):
        with pytest.raises(ConfigError, match="without a question"):
            explain.passes()


def test_loss_shap_is_of_minus_the_loss() -> None:
    """Cross-entropy: values are the Shapley values of the label's log-probability, and rise where it does."""
    net = nn.Linear(3, 4).double()
    x, labels = DATA[:5], torch.tensor([0, 3, 1, 2, 2])
    a = ap.LossSHAP()(ap.Field(net, ap.Loss()), x, target=labels)
    same = ap.Shapley()(ap.Field(net, ap.LogProbability()), x, target=labels)
    torch.testing.assert_close(a.values, same.values, atol=1e-12, rtol=0)
    torch.testing.assert_close(a.claimed_total, same.claimed_total, atol=1e-12, rtol=0)


# -- sufficiency and necessity ----------------------------------------------------------------------

ROWS = torch.tensor(list(product([0.0, 1.0], repeat=3)), dtype=DOUBLE)
COALITIONS = ROWS.bool()


def gate(x: Tensor) -> Tensor:
    """Class 1 where x0 and (x1 or x2)."""
    on = x[:, 0] * torch.maximum(x[:, 1], x[:, 2])
    return torch.stack([0.5 * torch.ones_like(on), on], 1)


def test_sufficiency_and_necessity_of_a_gate() -> None:
    p = ap.sufficiency(
        ap.Field(gate, ap.Decision()), torch.ones(1, 3, dtype=DOUBLE), COALITIONS, fill=ap.fills.Marginal(ROWS)
    )
    at = {tuple(int(v) for v in s): i for i, s in enumerate(COALITIONS.tolist())}
    suffices = {(0, 0, 0): 3 / 8, (1, 0, 0): 3 / 4, (0, 1, 0): 1 / 2, (1, 1, 0): 1, (0, 1, 1): 1 / 2, (1, 1, 1): 1}
    for s, want in suffices.items():
        assert float(p.sufficiency[0, at[s]]) == pytest.approx(want, abs=1e-12)
    needed = {(0, 0, 0): 0, (1, 0, 0): 1 / 2, (0, 1, 0): 0, (0, 1, 1): 1 / 4, (1, 1, 1): 5 / 8}
    for s, want in needed.items():
        assert float(p.necessity[0, at[s]]) == pytest.approx(want, abs=1e-12)
    assert p.draws == 8
    errors = p.standard_errors
    assert errors is not None
    assert float(errors[0][0, at[1, 0, 0]]) == pytest.approx((3 / 16 / 7) ** 0.5, abs=1e-12)
    assert int(p.cost.forward.max()) <= 8 * (2 * 7)


def test_the_decision_is_each_examples_own() -> None:
    x = torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 1.0]], dtype=DOUBLE)
    p = ap.sufficiency(
        ap.Field(gate, ap.Decision()), x, torch.tensor([[True, False, False]]), fill=ap.fills.Marginal(ROWS)
    )
    assert p.sufficiency[:, 0].tolist() == [0.75, 1.0]  # without x0 it is class 0 in any case
    assert p.necessity[:, 0].tolist() == [0.5, 0.5]
    single = ap.sufficiency(
        ap.Field(gate, ap.Decision()), x, torch.tensor([[True, False, False]]), fill=ap.fills.Baselines()
    )
    assert single.standard_errors is None


def test_sufficiency_refuses_other_scores_and_masks() -> None:
    x = torch.ones(1, 3, dtype=DOUBLE)
    with pytest.raises(ConfigError, match=r"Logit as score[\s\S]*ap\.Decision"):
        ap.sufficiency(ap.Field(gate), x, COALITIONS, fill=ap.fills.Baselines())
    with pytest.raises(InputError, match="Boolean"):
        ap.sufficiency(ap.Field(gate, ap.Decision()), x, COALITIONS.double(), fill=ap.fills.Baselines())  # pyright: ignore


def test_decision() -> None:
    z = torch.tensor([[1.0, 3.0], [2.0, 1.0]])
    assert ap.Decision()(z, torch.tensor([[1], [1]])).tolist() == [1.0, 0.0]
    assert ap.Decision()(torch.tensor([0.5, -0.5]), None).tolist() == [1.0, 0.0]
