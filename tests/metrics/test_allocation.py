"""Allocation of effects: exact weights on polynomials, methods that share wrongly, games too large; weak dependence."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from benchmarks.allocation import Powers, Written
from torch import Tensor, nn

import apportion as ap
from apportion.core.errors import ApportionError, ConfigError, InputError, ModelError, ScoreError
from apportion.metrics import (
    AllocationCompleteness,
    AllocationCorrectness,
    EffectCompleteness,
    HarsanyiEffects,
    TaylorEffects,
    WeakDependence,
)
from apportion.planted import Polynomial

F64 = torch.float64
X = torch.tensor([[2.0, 3.0, 5.0], [-1.0, 2.0, 0.5]], dtype=F64)
PRODUCT = Polynomial({(1, 1, 0): 1.0})
SQUARE = Polynomial({(2, 1, 0): 1.0})
MIXED = Polynomial({(1, 0, 0): 1.0, (0, 1, 1): 1.0})
TRIPLE = Polynomial({(1, 1, 1): 1.0})
PAIRED = ap.Occlusion(ap.groups.Labels(torch.tensor([0, 1, 1])))
"""The second and the third feature are removed together, and get the same."""


def close(a: Tensor, b: object) -> None:
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype).expand_as(a), rtol=1e-6, atol=1e-9)


def slow_dividends(f: nn.Module, x: Tensor, base: Tensor) -> dict[tuple[int, ...], float]:
    """Give a(S) by its recursion, a(S) = v(S) - Σ_{T ⊂ S} a(T), one coalition after the other."""
    found: dict[tuple[int, ...], float] = {}
    for size in range(len(x) + 1):
        for s in combinations(range(len(x)), size):
            z = base.clone()
            z[list(s)] = x[list(s)]
            smaller = sum(a for t, a in found.items() if set(t) < set(s))
            found[s] = float(f(z[None])[0]) - smaller
    return found


def dense(out: int = 1) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, out))
    return net.double().eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("f", "gxi"), [(PRODUCT, 1.0), (SQUARE, 2.0), (TRIPLE, 2.0)], ids=["x1 x2", "x1^2 x2", "x1 x2 x3"]
)
def test_effect_completeness_on_monomials(f: nn.Module, gxi: float) -> None:
    """Gradient × input sums to the degree times the monomial, occlusion to the number of its features."""
    judge = EffectCompleteness()
    for method in (ap.Shapley(), ap.IntegratedGradients(), ap.DeepLIFT()):
        close(judge(ap.Field(f), X, method).values, 0.0)
    close(judge(ap.Field(f), X, ap.GradientTimesInput()).values, gxi)
    occlusion = 2.0 if f is TRIPLE else 1.0
    close(judge(ap.Field(f), X, ap.Occlusion()).values, occlusion)
    close(judge(ap.Field(f), X, torch.zeros_like(X)).values, 1.0)


def test_effects_that_cancel_make_no_gap_look_large() -> None:
    """x1 - x2 at (1, 1): the score does not change, so that completeness is undefined; effects are 1 and -1."""
    f, x = ap.Field(Polynomial({(1, 0): 1.0, (0, 1): -1.0})), torch.ones(1, 2, dtype=F64)
    found = EffectCompleteness()(f, x, torch.tensor([[1.0, 0.0]]))
    close(found.values, 0.5)
    close(found.parts["effects"], [[1.0, -1.0, 0.0]])
    assert ap.metrics.Completeness()(f, x, torch.ones(1, 2)).values.isnan().all()
    constant = EffectCompleteness()(ap.Field(lambda x: 0 * x.sum(1)), x, torch.ones(1, 2))
    assert constant.values.isnan().all()
    assert constant.undefined["no effects"].all()


@pytest.mark.parametrize("kind", [HarsanyiEffects, TaylorEffects])
def test_weights_of_each_method_on_two_effects(kind: type) -> None:
    """x1 + x2 x3: the weight of x1 for itself, and of x2 and x3 for their product."""
    judge = AllocationCompleteness(effects=kind())
    for method, each in (
        (ap.Shapley(), 0.5),
        (ap.IntegratedGradients(), 0.5),
        (ap.GradientTimesInput(), 1.0),
        (ap.Occlusion(), 1.0),
    ):
        found = judge(ap.Field(MIXED), X, method)
        known = ~found.parts["weights"].isnan().any(2)
        assert known.sum(1).tolist() == [2, 2]
        weights = found.parts["weights"][known].reshape(2, 2, 3)
        rows = weights if kind is HarsanyiEffects else weights.flip(1)  # Taylor terms are sorted by exponents
        close(rows, [[1.0, 0.0, 0.0], [0.0, each, each]])
        product = (X[:, 1] * X[:, 2]).abs()
        close(found.values, (2 * each - 1) * product / (product + X[:, 0].abs()))
        close(AllocationCorrectness(effects=kind())(ap.Field(MIXED), X, method).values, 0.0)


def test_taylor_terms_of_one_coalition_are_shared_differently_by_integrated_gradients_but_not_by_shapley() -> None:
    """x1² x2 + x1 x2² is one Harsanyi effect but two Taylor terms, with weights κ_i / |κ| along a straight line."""
    f = ap.Field(Polynomial({(2, 1): 1.0, (1, 2): 1.0}))
    x = torch.tensor([[2.0, 3.0]], dtype=F64)
    judge = AllocationCompleteness(effects=TaylorEffects())
    close(judge(f, x, ap.IntegratedGradients()).parts["weights"], [[[1 / 3, 2 / 3], [2 / 3, 1 / 3]]])
    close(judge(f, x, ap.Shapley()).parts["weights"], 0.5)
    close(judge(f, x, ap.GradientTimesInput()).parts["weights"], [[[1.0, 2.0], [2.0, 1.0]]])
    both = AllocationCompleteness()(f, x, ap.IntegratedGradients()).parts["weights"][:, 2]
    close(both, [[(12 * 2 / 3 + 18 / 3) / 30, (12 / 3 + 18 * 2 / 3) / 30]])


def test_taylor_terms_that_cancel_leave_no_harsanyi_effect() -> None:
    """x1² x2 - x1 x2² at (1, 1)."""
    f, x = ap.Field(Polynomial({(2, 1): 1.0, (1, 2): -1.0})), torch.ones(1, 2, dtype=F64)
    close(ap.Shapley()(f, x).values, 0.0)
    close(ap.IntegratedGradients()(f, x).values, [[1 / 3, -1 / 3]])
    assert AllocationCompleteness()(f, x, ap.IntegratedGradients()).undefined["no effects"].all()
    close(AllocationCompleteness(TaylorEffects())(f, x, ap.IntegratedGradients()).values, 0.0)


def test_outsiders_who_get_something_are_seen() -> None:
    """Removed together with x2, x3 gets half of x1 x2; the gradient gives no effect to outsiders, whatever its sum."""
    judge = AllocationCorrectness()
    close(judge(ap.Field(PRODUCT), X, PAIRED).values, 0.5)
    close(judge(ap.Field(PRODUCT), X, ap.Gradient()).values, 0.0)
    random = judge(ap.Field(PRODUCT), X, ap.controls.Random())
    assert (random.values > 0).all()


def test_harsanyi_effects_of_a_network_are_its_dividends_and_shapley_values_allocate_them() -> None:
    f, base = dense(), torch.tensor([[0.1, -0.2, 0.3, 0.4]], dtype=F64)
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(1), dtype=F64)
    at = ap.baselines.Given(base)
    effects = HarsanyiEffects(at)
    correct, complete = AllocationCorrectness(effects), AllocationCompleteness(effects)
    shapley, field = ap.Shapley(fill=ap.fills.Baselines(at)), ap.Field(f)
    found = correct(field, x, shapley, target=0)
    slow = [slow_dividends(f, row, base[0]) for row in x]
    order = [tuple(i for i in range(4) if s >> i & 1) for s in range(1, 16)]
    close(found.parts["effects"], [[one[s] for s in order] for one in slow])
    close(found.values, 0.0)
    close(complete(field, x, shapley, target=0).values, 0.0)
    elsewhere = ap.Shapley()  # from another baseline than the effects'
    assert (complete(field, x, elsewhere, target=0).values > 0.01).all()
    close(correct(field, x, elsewhere, target=0).values, 0.0)  # outsiders of an effect are dummies from any


def test_the_two_share_their_explanations_in_one_subject() -> None:
    q = ap.Field(PRODUCT).bind(X)
    subject = ap.metrics.Subject(ap.Gradient())
    first = AllocationCorrectness().judge(q, subject)
    second = AllocationCompleteness().judge(q, subject)
    assert int(first.cost.backward[0]) == 7
    assert int(second.cost.backward[0]) == 0
    one = torch.tensor([True, True, False])
    for factor in (1.0, 2.0):  # effects that differ in a network only are not taken for each other
        parts = Written(((Polynomial({(1, 1, 0): factor}), one),))
        close(AllocationCorrectness(parts).judge(q, subject).parts["effects"], factor * X[:, :1] * X[:, 1:2])


def test_the_taylor_series_of_a_polynomial_is_itself() -> None:
    f = Polynomial({(2, 1, 0): 1.5, (0, 1, 3): -2.0, (0, 0, 0): 4.0})
    point = torch.tensor([0.5, -1.0, 2.0], dtype=F64)
    g = f.around(point)
    close(g(X), f(X))
    slope = torch.autograd.functional.jacobian(lambda z: f(z[None])[0], point)
    close(torch.tensor([g.terms[tuple(int(i == j) for j in range(3))] for i in range(3)]), slope.tolist())


def test_interactions_that_cancel_to_rounding_are_judged() -> None:
    """A linear network has none: in float32 their rows differ by rounding alone, whatever the batch."""
    for seed in range(3):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            net, x = nn.Linear(4, 2), torch.rand(3, 4)
        for metric in (AllocationCorrectness(), AllocationCompleteness()):
            assert bool((metric(ap.Field(net), x, ap.GradientTimesInput()).values < 1e-4).all())


def test_errors() -> None:
    field = ap.Field(lambda x: x.sum(1))
    wide = torch.ones(1, 13)
    for judge in (EffectCompleteness(), AllocationCorrectness(effects=HarsanyiEffects(most=12))):
        with pytest.raises(InputError, match=r"13 players.*\n.*at most 12\n.*groups"):
            judge(field, wide, ap.Gradient())
    with pytest.raises(ModelError, match="Polynomial"):
        AllocationCorrectness(effects=TaylorEffects())(field, X, ap.Gradient())
    with pytest.raises(ScoreError, match="linear"):
        AllocationCorrectness()(ap.Field(dense(2), ap.Probability()), torch.rand(1, 4, dtype=F64), ap.Gradient())
    two = HarsanyiEffects(ap.baselines.Given(torch.stack([torch.zeros(3), torch.ones(3)]).double()))
    with pytest.raises(InputError, match="one point"):
        AllocationCorrectness(two)(field, X, ap.Gradient())
    with pytest.raises(ConfigError, match="External"):
        AllocationCorrectness()(field, X, ap.External(lambda x, target: x))
    for wrong in ({}, {(1,): 1.0, (1, 2): 1.0}, {(-1,): 1.0}):
        with pytest.raises(ApportionError, match="exponent"):
            Polynomial(wrong)
    with pytest.raises(ApportionError, match="center"):
        Polynomial({(1, 1): 1.0}, torch.zeros(3))


def test_weak_dependence_on_a_relu_network() -> None:
    """The gradient is constant within a piece; gradient × input moves with x, as x does where w is constant."""
    f = dense()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(2), dtype=F64)
    judge = WeakDependence(ap.noise.Gaussian(1e-4, relative=False))
    assert (judge(ap.Field(f), x, ap.Gradient(), target=0).values < 1e-9).all()
    found = judge(ap.Field(f), x, ap.GradientTimesInput(), target=0)
    assert (found.parts["copies"] == 10).all()
    assert ((found.values > 0.1) & (found.values < 10)).all()
    ones = judge(ap.Field(lambda z: z.relu().sum(1)), x.abs() + 0.1, ap.GradientTimesInput())
    close(ones.values, 1.0)


def test_a_copy_beyond_a_kink_does_not_count() -> None:
    """At 0.001 from the kink of relu, copies at 1 from x lie on either side: the gradient moves there, and may."""
    f, x = ap.Field(lambda z: z.relu().sum(1)), torch.full((1, 1), 1e-3, dtype=F64)
    found = WeakDependence(ap.noise.Gaussian(1.0, relative=False), samples=20)(f, x, ap.Gradient())
    assert 0 < int(found.parts["copies"]) < 20
    close(found.values, 0.0)


def test_a_curved_function_has_no_pieces() -> None:
    found = WeakDependence()(ap.Field(lambda z: z.exp().sum(1)), X, ap.Gradient())
    assert found.values.isnan().all()
    assert found.undefined["no copy in the linear piece"].all()


def test_rules_on_polynomials_as_powers_of_sums() -> None:
    """Without biases LRP-ε is complete, effect by effect; αβ doubles what has no negative part, in each layer."""
    for terms in ({(2, 1, 0): 1.0}, {(1, 1, 1): 1.0}, {(1, 0, 0): 1.0, (0, 1, 1): -1.0}):
        net = Powers(terms)
        close(net(X), Polynomial(terms)(X))
        parts = Written(tuple((Powers({k: c}), torch.tensor(k) > 0) for k, c in terms.items()))
        found = AllocationCompleteness(parts)(ap.Field(net), X, ap.LRP())
        assert (found.values < 1e-4).all()  # ε takes its part
        assert (AllocationCorrectness(parts)(ap.Field(net), X, ap.LRP()).values < 1e-9).all()
    one = Powers({(1, 0, 0): 1.0})
    alone = Written(((one, torch.tensor([True, False, False])),))
    twice = AllocationCompleteness(alone)(ap.Field(one), X[:1], ap.LRP(ap.rules.alpha_beta()))
    close(twice.parts["weights"], [[[4.0, 0.0, 0.0]]])
