"""Regressions, selections and kernels of local surrogates, against closed forms and scikit-learn."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from apportion.core.errors import ConfigError
from apportion.parts.surrogate.kernels import Cosine, Euclid, Exponential, Uniform
from apportion.parts.surrogate.regressions import BayesianRidge, Ridge
from apportion.parts.surrogate.selections import Best, Everything, Forward, HighestWeights
from apportion.parts.surrogate.tables import Quartiles
from apportion.parts.surrogate.trust import coefficient_stability, held_out, variable_stability

sklearn = pytest.importorskip("sklearn.linear_model")


def cube(players: int) -> Tensor:
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=players)), dtype=torch.float64)


def sample(batch: int = 3, count: int = 60, players: int = 7, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    z = torch.randint(0, 2, (batch, count, players), generator=g).double()
    effect = torch.randn(batch, players, 1, generator=g, dtype=torch.float64)
    v = (z @ effect).squeeze(-1) + 2 * z[..., 0] * z[..., 1] + torch.randn(batch, count, generator=g).double() / 5 + 3
    w = torch.rand(batch, count, generator=g).double()
    return z, v, w


def everything(z: Tensor) -> Tensor:
    return torch.ones(*z.shape[:-2], z.shape[-1], dtype=torch.bool)


# -- kernels ----------------------------------------------------------------------------------------


def test_kernel_of_half_a_mask() -> None:
    half = torch.tensor([[1.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    one = torch.ones(4, dtype=torch.float64)
    weight = Exponential(0.25, Cosine())(half, one, torch.tensor(4.0).double())
    assert float(weight) == pytest.approx(0.5034, abs=5e-5)
    # the kernel as the paper writes it, without the code's root, is another one
    assert float(weight) ** 2 == pytest.approx(0.25345, abs=5e-6)


def test_cosine_is_that_of_scikit_learn() -> None:
    from sklearn.metrics.pairwise import cosine_distances

    z = cube(5)
    want = cosine_distances(z.numpy(), np.ones((1, 5)))[:, 0]
    np.testing.assert_allclose(Cosine()(z, torch.ones(5).double()).numpy(), want, atol=1e-12)


def test_kernel_of_tables_grows_with_their_columns() -> None:
    z, center = torch.zeros(1, 9, dtype=torch.float64), torch.zeros(9, dtype=torch.float64)
    z[0, 0] = 3.0
    given = Exponential(0.75, Euclid(), per_root_feature=True)(z, center, torch.tensor(9.0).double())
    assert float(given) == pytest.approx(np.sqrt(np.exp(-(3.0**2) / (0.75 * 3) ** 2)))
    assert Uniform()(z, center, torch.tensor(9.0)).tolist() == [1.0]


# -- ridge ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "factor"), [(1.0, 2 / 3), (0.0, 1.0), (3.0, 0.4)])
def test_ridge_shrinks_eight_coalitions_of_three_players(alpha: float, factor: float) -> None:
    z, w = cube(3), torch.tensor([3.0, -6.0, 9.0], dtype=torch.float64)
    fit = Ridge(alpha)(z, z @ w + 5, torch.ones(8).double(), everything(z))
    torch.testing.assert_close(fit.coefficients, factor * w, rtol=1e-12, atol=1e-12)
    # the intercept is not the value of the empty coalition, unless nothing is shrunk
    torch.testing.assert_close(
        fit.intercept, torch.tensor(5 + (1 - factor) * 3.0, dtype=torch.float64), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_ridge_is_that_of_scikit_learn(alpha: float, intercept: bool) -> None:
    z, v, w = sample()
    fit = Ridge(alpha, intercept)(z, v, w, everything(z))
    for b in range(len(z)):
        theirs = sklearn.Ridge(alpha, fit_intercept=intercept).fit(z[b].numpy(), v[b].numpy(), w[b].numpy())
        np.testing.assert_allclose(fit.coefficients[b].numpy(), theirs.coef_, rtol=1e-9)
        assert float(fit.intercept[b]) == pytest.approx(theirs.intercept_, rel=1e-9)
        np.testing.assert_allclose(fit.predict(z)[b].numpy(), theirs.predict(z[b].numpy()), rtol=1e-9)
        if intercept:
            r2 = theirs.score(z[b].numpy(), v[b].numpy(), w[b].numpy())
            assert float(fit.r2[b]) == pytest.approx(r2, rel=1e-9)


def slow_sandwich(z: Tensor, v: Tensor, w: Tensor, alpha: float) -> Tensor:
    """HC3 standard errors, as books write them, with a column of ones for the intercept."""
    x = torch.cat([torch.ones(len(z), 1).double(), z], 1)
    penalty = alpha * torch.diag(torch.tensor([0.0] + [1.0] * z.shape[1]).double())
    bread = torch.linalg.inv(x.T @ torch.diag(w) @ x + penalty)
    left = v - x @ bread @ x.T @ (w * v)
    hat = torch.diag(x @ bread @ x.T) * w
    meat = x.T @ torch.diag((w * left / (1 - hat)) ** 2) @ x
    return torch.diag(bread @ meat @ bread).sqrt()[1:]


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_standard_errors_are_those_of_the_sandwich(alpha: float) -> None:
    z, v, w = sample()
    fit = Ridge(alpha)(z, v, w, everything(z))
    for b in range(len(z)):
        torch.testing.assert_close(fit.standard_error[b], slow_sandwich(z[b], v[b], w[b], alpha))


def test_features_left_out_are_as_if_they_were_not_there() -> None:
    z, v, w = sample()
    kept = everything(z)
    kept[:, [1, 4]] = False
    rest = [0, 2, 3, 5, 6]
    fit, alone = Ridge()(z, v, w, kept), Ridge()(z[..., rest], v, w, everything(z[..., rest]))
    torch.testing.assert_close(fit.coefficients[:, rest], alone.coefficients)
    torch.testing.assert_close(fit.standard_error[:, rest], alone.standard_error)
    assert not fit.coefficients[:, [1, 4]].any()


def test_samples_that_determine_nothing_are_refused_without_a_penalty() -> None:
    z, v, w = sample(count=5)
    with pytest.raises(ConfigError, match="do not determine"):
        Ridge(0.0)(z, v, w, everything(z))
    z, v, w = sample()
    z[..., 3] = z[..., 2]
    with pytest.raises(ConfigError, match="do not determine"):
        Ridge(0.0)(z, v, w, everything(z))
    Ridge(1.0)(z, v, w, everything(z))


def test_player_that_never_leaves_gets_nothing() -> None:
    z, v, w = sample()
    z[..., 2] = 1
    assert not Ridge(0.0)(z, v, w, everything(z)).coefficients[:, 2].any()


# -- Bayesian ridge ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_evidence_is_maximized_as_scikit_learn_does(seed: int) -> None:
    z, v, w = sample(seed=seed)
    fit = BayesianRidge()(z, v, w, everything(z))
    for b in range(len(z)):
        theirs = sklearn.BayesianRidge().fit(z[b].numpy(), v[b].numpy(), w[b].numpy())
        np.testing.assert_allclose(fit.coefficients[b].numpy(), theirs.coef_, rtol=1e-8)
        np.testing.assert_allclose(fit.parts["posterior_variance"][b].numpy(), np.diag(theirs.sigma_), rtol=1e-8)
        assert float(fit.parts["noise_precision"][b]) == pytest.approx(theirs.alpha_, rel=1e-8)
        assert float(fit.parts["weight_precision"][b]) == pytest.approx(theirs.lambda_, rel=1e-8)
        assert int(fit.parts["rounds"][b]) == theirs.n_iter_
        assert float(fit.intercept[b]) == pytest.approx(theirs.intercept_, rel=1e-8)


def test_full_prior_is_the_weighted_mean_of_prior_and_least_squares() -> None:
    z, v, w = sample(batch=1)
    x = z[0] - (w[0] @ z[0]) / w[0].sum()
    y = v[0] - (w[0] @ v[0]) / w[0].sum()
    precision = 4.0 * x.T @ torch.diag(w[0]) @ x
    plain = torch.linalg.solve(x.T @ torch.diag(w[0]) @ x, x.T @ (w[0] * y))
    prior = torch.full((7,), 0.3).double()
    posterior = torch.linalg.inv(2.0 * torch.eye(7).double() + precision)
    want = posterior @ (2.0 * prior + precision @ plain)
    fit = BayesianRidge(0.3, weight_precision=2.0, noise_precision=4.0)(z, v, w, everything(z))
    torch.testing.assert_close(fit.coefficients[0], want)
    torch.testing.assert_close(fit.parts["posterior_variance"][0], torch.diag(posterior))
    assert int(fit.parts["rounds"][0]) == 0


def test_partial_prior_finds_the_noise_for_a_given_weight_precision() -> None:
    """At the fixed point a = (Σw - γ) / error, by MacKay's equation, with λ as it was given."""
    z, v, w = sample(batch=1)
    fit = BayesianRidge(weight_precision=2.0, tolerance=1e-12)(z, v, w, everything(z))
    assert float(fit.parts["weight_precision"]) == 2.0
    x = (z[0] - (w[0] @ z[0]) / w[0].sum()) * w[0].sqrt()[:, None]
    y = (v[0] - (w[0] @ v[0]) / w[0].sum()) * w[0].sqrt()
    size, noise = torch.linalg.eigvalsh(x.T @ x), float(fit.parts["noise_precision"])
    gamma = float((noise * size / (noise * size + 2)).sum())
    error = float((y - x @ fit.coefficients[0]).square().sum())
    assert noise == pytest.approx((float(w.sum()) - gamma) / error, rel=1e-4)


def test_strong_prior_wins_and_weak_one_yields() -> None:
    z, v, w = sample(batch=1)
    strong = BayesianRidge(7.0, weight_precision=1e9, noise_precision=1.0)(z, v, w, everything(z))
    weak = BayesianRidge(7.0, weight_precision=1e-9, noise_precision=1.0)(z, v, w, everything(z))
    torch.testing.assert_close(strong.coefficients, torch.full_like(strong.coefficients, 7.0), rtol=1e-6, atol=0)
    torch.testing.assert_close(weak.coefficients, Ridge(0.0)(z, v, w, everything(z)).coefficients)
    with pytest.raises(ConfigError, match="positive number, or None"):
        BayesianRidge(weight_precision=0.0)


# -- selections -------------------------------------------------------------------------------------


def slow_forward(z: np.ndarray, v: np.ndarray, w: np.ndarray, count: int) -> set[int]:
    chosen: list[int] = []
    for _ in range(count):
        scores = {}
        for j in set(range(z.shape[1])) - set(chosen):
            x = z[:, [*chosen, j]]
            scores[j] = sklearn.LinearRegression().fit(x, v, w).score(x, v, w)
        chosen.append(max(scores, key=lambda j: scores[j]))
    return set(chosen)


@pytest.mark.parametrize("count", [1, 3, 6])
def test_forward_adds_what_raises_r2_most(count: int) -> None:
    z, v, w = sample(batch=4, players=9)
    kept = Forward(count)(z, v, w, everything(z), torch.ones(4, 9).double())
    for b in range(4):
        want = slow_forward(z[b].numpy(), v[b].numpy(), w[b].numpy(), count)
        assert set(kept[b].nonzero().flatten().tolist()) == want
    assert torch.equal(Best(count)(z, v, w, everything(z), torch.ones(4, 9).double()), kept)


def test_highest_weights_are_those_of_the_example_itself() -> None:
    z, v, w = sample(batch=2, players=9)
    center = torch.ones(2, 9).double()
    kept = HighestWeights(7)(z, v, w, everything(z), center)
    for b in range(2):
        theirs = sklearn.Ridge(0.01).fit(z[b].numpy(), v[b].numpy(), w[b].numpy()).coef_
        assert set(kept[b].nonzero().flatten().tolist()) == set(np.abs(theirs).argsort()[-7:].tolist())
    assert torch.equal(Best(7)(z, v, w, everything(z), center), kept)
    strongest = int(kept[0].nonzero()[0])
    center[0, strongest] = 0  # a feature that is 0 in the example has no part in it
    assert not HighestWeights(7)(z, v, w, everything(z), center)[0, strongest]
    assert Everything()(z, v, w, everything(z), center).all()


# -- trust ------------------------------------------------------------------------------------------


def test_interval_of_held_out_r2_covers() -> None:
    """Of 2,000 held-out samples of 300, 95 ± 2 per cent of the intervals hold the R² of the population."""
    g = torch.Generator().manual_seed(5)
    z = torch.randint(0, 2, (2000, 300, 4), generator=g).double()

    def of(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        v = z @ torch.tensor([1.0, 2.0, 0.5, 0.0]).double() + 2 * z[..., 2] * z[..., 3]
        predicted = z @ torch.tensor([1.1, 2.0, 1.4, 1.0]).double() - 0.4
        return (
            v,
            predicted,
            Exponential(0.25)(z, torch.ones(*z.shape[:-2], 4).double(), torch.full(z.shape[:-2], 4.0).double()),
        )

    true = float(held_out(*of(cube(4)))[0])
    found = held_out(*of(z))
    inside = float(((found.low <= true) & (true <= found.high)).double().mean())
    assert abs(inside - 0.95) <= 0.02
    assert abs(float(found.r2.mean()) - true) < 0.01


def test_r2_of_a_constant_score_and_of_a_wrong_model() -> None:
    v, w = torch.tensor([2.0, 2.0, 2.0]).double(), torch.ones(3).double()
    assert held_out(v, v, w).r2 == 1
    assert held_out(v, v + 1, w).r2 == 0
    spread = torch.tensor([1.0, 2.0, 3.0]).double()
    assert held_out(spread, spread.flip(0), w).r2 < 0


def test_stability_indices_by_hand() -> None:
    """Three runs of four features: sets {0,1}, {0,1}, {0,2} agree fully, by half, by half."""
    b = [torch.tensor(t).double() for t in ([3.0, 2, 0, 0], [3.5, 2, 0, 0], [9.0, 0, 2, 0])]
    kept = [t != 0 for t in b]
    assert float(variable_stability(b, kept, 2)) == pytest.approx((1 + 0.5 + 0.5) / 3)
    errors = [torch.full((4,), 0.5).double()] * 3
    in_play = torch.tensor([True, True, True, False])
    # feature 0: one pair of three overlaps; features 1 and 2: 2 ± 0.98 and 0 ± 0.98 are apart, two pairs each
    assert float(coefficient_stability(b, errors, in_play)) == pytest.approx((1 / 3 + 1 / 3 + 1 / 3) / 3)
    assert float(coefficient_stability([b[0]] * 3, [errors[0] * 0] * 3, in_play)) == 1


def test_quartiles_of_any_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are NumPy's, and not torch's, which takes no more than 16 million rows."""
    monkeypatch.delattr(torch, "quantile")
    data = torch.randn(103, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bins = Quartiles.fit(data).bins
    assert bins is not None
    want = np.quantile(data.numpy(), [0.25, 0.5, 0.75], axis=0).T
    np.testing.assert_allclose(bins.edges[:, :3].numpy(), want, rtol=1e-12)
    first = data[:, 0][data[:, 0] <= want[0, 0]]
    assert float(bins.deviation[0, 0]) == pytest.approx(float(first.std(unbiased=False)))


@pytest.mark.parametrize("intercept", [True, False])
def test_ridge_of_more_features_than_samples_is_the_same_by_way_of_the_samples(intercept: bool) -> None:
    """(ZᵀWZ + α)⁻¹ ZᵀWv, written out with all pairs of features, columns left out and a sample without weight too."""
    g = torch.Generator().manual_seed(0)
    z, v, w = (torch.rand(n, generator=g, dtype=torch.float64) for n in ((9, 25), (9,), (9,)))
    w[2], kept = 0.0, torch.arange(25) != 3
    found = Ridge(0.3, intercept)(z, v, w, kept)
    mean = (lambda t: w @ t / w.sum()) if intercept else (lambda t: 0 * t[0])
    zc, vc = (z - mean(z)) * kept, v - mean(v)
    inverse = torch.linalg.inv(zc.T * w @ zc + 0.3 * torch.eye(25, dtype=z.dtype))
    b = inverse @ zc.T @ (w * vc)
    torch.testing.assert_close(found.coefficients, b, rtol=1e-10, atol=1e-12)
    pull = zc @ inverse
    leverage = w * ((pull * zc).sum(1) + (1 / w.sum() if intercept else 0))
    error = ((w * (vc - zc @ b) / (1 - leverage))[:, None] * pull).square().sum(0).sqrt()
    torch.testing.assert_close(found.standard_error, error, rtol=1e-9, atol=1e-12)
    assert float(found.coefficients[3]) == 0
