"""What surrogates must not claim: fits of one sample, samples they were fitted to, features never told apart."""

import pytest
import torch
from torch import Tensor

import apportion as ap
from apportion.core.errors import ConfigError
from apportion.parts.surrogate import Quartiles, Trust
from apportion.parts.surrogate.lars import lars
from apportion.parts.surrogate.neighborhoods import Drawn

P, S = ap.samplers, ap.surrogates
ALL = P.AllSubsets()


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


def curved(players: int) -> ap.Field:
    g = torch.Generator().manual_seed(players)
    first, last = (torch.randn(n, generator=g, dtype=torch.float64) for n in ((players, 6), (6,)))
    return ap.Field(lambda x: (x @ first.to(x)).tanh() @ last.to(x))


@pytest.mark.parametrize("sampler", [P.Pairs(), P.KernelWeighted(), P.LeaveOneOut(alone=True)])
def test_samplers_without_chance_hold_nothing_out_and_have_no_error(sampler) -> None:
    a = ap.LIME(sampler=sampler, regression=S.Ridge(1e-3))(curved(5), ones(5))
    assert not a.parts["standard_error"].any()
    assert "held_out_r2" not in a.parts
    assert len([w for w in a.warnings if "nothing held out" in w]) == 1
    drawn = ap.LIME(sampler=P.KernelWeighted(), samples=20)(curved(5), ones(5))
    assert bool((drawn.parts["standard_error"] > 0).all())


@pytest.mark.parametrize("sampler", [P.Bernoulli(), P.UniformSizes()])
def test_held_out_are_coalitions_that_are_not_in_the_fit(sampler) -> None:
    a = ap.LIME(sampler=sampler)(curved(5), ones(5))
    assert float(a.parts["held_out"]) == 0
    assert bool(a.parts["held_out_r2"].isnan())
    assert bool(a.parts["held_out_r2_interval"].isnan().all())
    assert any("nothing held out of 1 example(s)" in w and "AllSubsets" in w for w in a.warnings)
    method, field = ap.LIME(sampler=sampler, samples=100, trust=Trust(reruns=2)), curved(8)
    a = method(field, ones(8), ids=["one"])
    local = method.around(field.bind(ones(8), ids=["one"]))
    fitted, *others = ([tuple(z) for z in local.draw(run, 0, 100).z[0].tolist()] for run in range(3))
    new = [z for other in others for z in other[1:] if z not in fitted]
    assert 10 < len(set(new)) < len(new) < 198  # some come twice, and many were in the fit
    assert float(a.parts["held_out"]) == len(set(new))
    z = torch.tensor(new, dtype=torch.float64)
    predicted = z @ a.values[0] + a.parts["intercept"]
    w = S.Exponential(0.25)(z, ones(8)[0], torch.tensor(8.0).double())
    v = field.model(z)  # the baseline is 0, and x is 1
    mean = (w * v).sum() / w.sum()
    want = 1 - (w * (v - predicted).square()).sum() / (w * (v - mean).square()).sum()
    torch.testing.assert_close(a.parts["held_out_r2"][0], want)


def test_of_a_batch_only_examples_with_few_players_go_without() -> None:
    labels = torch.stack([torch.arange(12), torch.arange(12) // 4])
    a = ap.LIME(groups=ap.groups.Labels(labels))(curved(12), ones(12, 2))
    assert a.parts["held_out_r2"].isnan().tolist() == [False, True]
    assert any("held out of 1 example(s)" in w and "of example 1" in w for w in a.warnings)


@pytest.mark.parametrize("samples", [200, 500])  # drawn, and listed
def test_weights_of_a_sampler_count_as_those_of_the_example(samples: int) -> None:
    truth = torch.arange(1, 9).double()
    a = ap.LIME(sampler=P.KernelWeighted(), samples=samples)(ap.Field(lambda x: x @ truth.to(x)), ones(8))
    assert bool((a.values[0] / truth).sub(1).abs().max() < 0.1), a.values


def test_samplers_that_do_not_fit_are_refused() -> None:
    for kind in (ap.LIME, ap.SLIME, ap.GLIME, ap.BayLIME, ap.OptiLIME):
        for sampler in (P.Permutations(), P.SmoothGrids(3)):
            with pytest.raises(ConfigError, match="single coalitions"):
                kind(sampler=sampler)
    with pytest.raises(ConfigError, match=r"ap\.LIME, which draws once"):
        ap.SLIME(sampler=P.KernelWeighted())


@pytest.mark.parametrize("sampler", [P.Bernoulli(), P.UniformSizes(), ALL])
def test_samples_that_s_lime_adds_are_those_of_a_larger_budget(sampler) -> None:
    same = {"sampler": sampler, "regression": S.Ridge(0.0), "kernel": S.Uniform(), "with_x": False}
    grown = ap.SLIME(samples=17, most=60, count=5, level=1e-12, tolerance=0.0, **same)(curved(5), ones(5), ids=[0])
    whole = ap.LIME(samples=60, **same)(curved(5), ones(5), ids=[0])
    torch.testing.assert_close(grown.values, whole.values, rtol=1e-9, atol=1e-12)


def test_r2_without_an_intercept_is_about_the_mean() -> None:
    field = ap.Field(lambda x: 100 + x @ torch.linspace(1, 2, 12).to(x))
    a = ap.LIME(regression=S.Ridge(0.0, intercept=False))(field, ones(12))
    assert float(a.parts["r2"]) < -10
    assert float(a.parts["held_out_r2"]) < -10
    constant = ap.LIME(regression=S.Ridge(0.0, intercept=False))(ap.Field(lambda x: x[:, 0] * 0 + 3), ones(12))
    assert float(constant.parts["r2"]) == 0


def test_constants_of_regressions_are_in_float64() -> None:
    z = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3).double()
    truth, w, kept = torch.tensor([3.0, 6.0, 9.0]).double(), torch.ones(8).double(), torch.ones(3) > 0
    found = S.Ridge(0.3)(z, z @ truth, w, kept).coefficients
    torch.testing.assert_close(found, truth * 2 / 2.3, rtol=1e-14, atol=0)
    prior = S.BayesianRidge(0.1, weight_precision=3.0, noise_precision=1.0)(z, z @ truth, w, kept).coefficients
    torch.testing.assert_close(prior, (0.3 + 2 * truth) / 5, rtol=1e-14, atol=0)


def test_features_without_effect_are_not_ranked() -> None:
    a = ap.LIME(regression=S.Ridge(0.0), trust=Trust(reruns=3))(ap.Field(lambda x: 3 * x[:, 0] + x[:, 1]), ones(20))
    assert float(a.parts["vsi"]) == 1


def test_bay_lime_says_that_it_depends_on_the_unit() -> None:
    small, plain = (
        ap.BayLIME(samples=60)(ap.Field(lambda x, u=u: u * curved(8).model(x)), ones(8), ids=[0]).values / u
        for u in (1e-3, 1.0)
    )
    assert bool(((small - plain).abs() > 1e-3 * plain.abs()).any())
    assert any("unit" in caution for caution in ap.BayLIME.card.cautions)


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
    a = ap.LIME(samples=100)(ap.Field(lambda x: x[:, 0] * 0 + constant), ones(9))
    assert float(a.parts["r2"]) == float(a.parts["held_out_r2"]) == 1
    assert not a.warnings
    assert bool(a.parts["vsi"].isnan())  # which of the features comes first is not defined
    assert bool(a.parts["csi"].isnan())


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
