"""What surrogates must not claim: fits of one sample, samples they were fitted to, features never told apart."""

import pytest
import torch
from torch import Tensor

import apportion as ap
from apportion.core.errors import ConfigError
from apportion.parts.surrogate import Quartiles, Trust
from apportion.parts.surrogate.lars import lars
from apportion.parts.surrogate.neighborhoods import Drawn

ALL = ap.samplers.AllSubsets()


def ones(players: int, batch: int = 1) -> Tensor:
    return torch.ones(batch, players, dtype=torch.float64)


def table() -> Tensor:
    return torch.randn(300, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method", [ap.LIME, ap.SLIME])
def test_an_example_far_from_the_samples_is_no_perfect_fit(method) -> None:
    field = ap.Field(lambda x: 2 * x[:, 0] + x[:, 1])
    for far, least in ((70.0, 1.001), (6.0, 4.0)):
        a = method.for_tables(table(), continuous=True)(field, torch.tensor([[far, 0.0, 0.0]]))
        if float(a.parts["effective_samples"]) < least:
            assert any("effective samples" in w for w in a.warnings), (far, a.warnings)
        if far == 70:
            assert float(a.parts["effective_samples"]) < least
            assert float(a.parts["r2"]) <= 0
            assert float(a.parts["held_out_r2"]) <= 0
    near = ap.LIME.for_tables(table(), continuous=True, samples=500)(field, torch.zeros(1, 3))
    assert not any("effective samples" in w for w in near.warnings)


def test_the_example_itself_is_not_held_out() -> None:
    """Only the example's score differs: what the re-run draws besides it is constant, whatever the fit says of it."""
    field = ap.Field(lambda x: x.prod(1))
    a = ap.LIME(samples=40, trust=Trust(reruns=1))(field, ones(12))
    assert float(a.parts["r2"]) > 0.5
    assert float(a.parts["held_out_r2"]) <= 0


def test_all_coalitions_leave_nothing_to_hold_out() -> None:
    a = ap.LIME(sampler=ALL)(ap.Field(lambda x: x.prod(1)), ones(4))
    assert "held_out_r2" not in a.parts
    assert bool((a.parts["standard_error"] == 0).all())
    assert any("nothing held out" in w for w in a.warnings)
    parity = ap.LIME(sampler=ALL, kernel=ap.surrogates.Uniform())(ap.Field(lambda x: x.sum(1) % 2), ones(4))
    assert any("nothing held out" in w and "a linear model does not describe" in w for w in parity.warnings)
    for kind in (ap.LIME, ap.SLIME, ap.OptiLIME, ap.BayLIME, ap.GLIME):
        told = kind(sampler=ALL)(ap.Field(lambda x: x.sum(1)), ones(4)).warnings
        assert [w for w in told if "nothing held out: all coalitions" in w and "below" not in w], kind
    alone = ap.LIME(sampler=ALL, trust=Trust(reruns=0))(ap.Field(lambda x: x.sum(1)), ones(4))
    assert not any("no re-runs" in w for w in alone.warnings)  # they would say nothing new
    each = ap.LIME(sampler=ap.samplers.LeaveOneOut())(ap.Field(lambda x: x.sum(1)), ones(4))
    assert any("as few samples fit anything" in w for w in each.warnings)
    assert bool((ap.BayLIME(sampler=ALL)(ap.Field(lambda x: x.prod(1)), ones(4)).parts["standard_error"] > 0).all())


def test_s_lime_does_not_depend_on_the_unit_of_the_score() -> None:
    weights = torch.linspace(1, 1.3, 8, dtype=torch.float64)
    found = []
    for unit in (1.0, 1e-5):
        a = ap.SLIME(count=3, samples=30, most=500)(ap.Field(lambda x, u=unit: u * (x @ weights)), ones(8))
        found.append((a.parts["samples_used"].tolist(), a.parts["settled"].tolist(), (a.values != 0).tolist()))
    assert found[0] == found[1]
    assert found[0][0][0] > 30


def test_features_that_matter_alike_are_not_settled() -> None:
    z = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3).double()[None]
    drawn = Drawn(z, z.sum(-1), torch.ones(1, 8).double())
    assert float(lars(drawn, drawn.w, torch.ones(1, 3) > 0, 1).lead) == pytest.approx(0, abs=1e-12)
    a = ap.SLIME(sampler=ALL, count=1)(ap.Field(lambda x: x.sum(1)), ones(3))
    assert float(a.parts["p_value"]) > 0.05
    assert float(a.parts["settled"]) == 0
    one = ap.SLIME(samples=1, most=1)(ap.Field(lambda x: x.sum(1)), ones(3))
    assert float(one.parts["settled"]) == 0
    assert float(one.parts["r2"]) == 0
    assert any("effective samples" in w for w in one.warnings)


def test_s_lime_ends_when_all_coalitions_are_played() -> None:
    field = ap.Field(lambda x: x[:, 0] * x[:, 1] + x[:, 2] * x[:, 3])
    assert float(ap.SLIME(sampler=ALL, count=2)(field, ones(4)).parts["samples_used"]) <= 17


@pytest.mark.parametrize("constant", [0.1, 1 / 3, 7.0, 0.0, 1e6 / 7])
def test_a_constant_score_is_explained_whatever_its_digits(constant: float) -> None:
    a = ap.LIME(samples=100)(ap.Field(lambda x: x[:, 0] * 0 + constant), ones(5))
    assert float(a.parts["r2"]) == float(a.parts["held_out_r2"]) == 1
    assert not any("held-out" in w for w in a.warnings)


def test_columns_of_categories_and_what_the_table_does_not_hold() -> None:
    data = torch.stack([torch.arange(40.0) % 3, torch.full((40,), 5.0), torch.arange(40.0)], 1)
    for wrong in ([7], [-1]):
        with pytest.raises(ConfigError, match="categorical"):
            Quartiles.fit(data, wrong)
    field, method = ap.Field(lambda x: x.sum(1)), ap.LIME.for_tables(data, [0], samples=200)
    assert not any("not in the table" in w for w in method(field, data[:3]).warnings)
    for row in ([7.0, 5.0, 3.0], [1.0, 6.0, 3.0], [1.0, 4.0, 3.0]):
        assert any("not in the table" in w for w in method(field, torch.tensor([row])).warnings), row
    idle = [w for w in method(field, data[:1]).warnings if "never changed" in w]
    assert idle
    assert "draw more" not in idle[0]
    for make in (ap.LIME.for_tables, ap.SLIME.for_tables):
        with pytest.raises(ConfigError, match="around_x"):
            make(data, around_x=True)
        with pytest.raises(ConfigError, match="categorical"):
            make(data, [0], continuous=True)
