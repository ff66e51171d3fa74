"""Fills: what stands where a mask removes."""

from itertools import product
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import apportion as ap
from apportion.core.errors import ConfigError, InputError
from apportion.parts.masks.noisy_linear import impute

DOUBLE = torch.float64


def filled(fill: ap.fills.Baselines | ap.fills.Marginal, x: torch.Tensor, owner: list[int]) -> torch.Tensor:
    q = ap.Field(lambda x: x.sum(1)).bind(x)
    at = torch.tensor(owner)
    return fill(q, torch.ones(len(owner), *x.shape[1:]), at, torch.arange(len(owner)))


def test_baselines_of_the_rows_owners() -> None:
    x = torch.randn(3, 4, dtype=DOUBLE)
    assert not filled(ap.fills.Baselines(), x, [2, 0]).any()
    rows = filled(ap.fills.Baselines(ap.baselines.Mean()), x, [2, 0, 2])
    assert rows.shape == (3, 1, 4)
    assert torch.allclose(rows[:, 0, 0], x.mean(1)[[2, 0, 2]])
    several = filled(ap.fills.Baselines(ap.baselines.Noise(count=3)), x, [1, 1])
    assert several.shape == (2, 3, 4)
    assert torch.equal(several[0], several[1])


def test_marginal_gives_every_row_the_whole_data() -> None:
    data = torch.randn(5, 4, dtype=DOUBLE)
    rows = filled(ap.fills.Marginal(data), torch.randn(3, 4, dtype=DOUBLE), [0, 2])
    assert torch.equal(rows, data.expand(2, 5, 4))
    assert rows.stride(0) == 0


def total(x: Tensor) -> Tensor:
    return x.flatten(1).sum(1)


def masks(players: int) -> Tensor:
    return torch.tensor(list(product([False, True], repeat=players)))


# -- by the coalition, or by the segment --------------------------------------------------------


def test_fresh_noise_is_one_function_of_the_coalition() -> None:
    x = torch.randn(3, 4, dtype=DOUBLE)
    fill = ap.fills.FreshNoise(sigma=2.0, mean=5.0, count=2000)
    game = ap.Game(ap.Field(total).bind(x, ids=range(3)), ap.groups.Elements(), fill)
    found = game.value(masks(4))
    for s, m in enumerate(masks(4)):
        want = (x * m).sum(1) + 5 * (~m).sum()
        assert ((found[:, s] - want).abs() <= 5 * 2 * (float((~m).sum()) / 2000) ** 0.5).all()
    again = ap.Game(ap.Field(total).bind(x[1:], ids=[1, 2]), ap.groups.Elements(), fill)
    assert torch.allclose(again.value(masks(4).flip(0)).flip(1), found[1:], atol=1e-12)


def test_segment_means_channel_by_channel() -> None:
    x = torch.randn(2, 3, 2, 4, dtype=DOUBLE)
    labels = torch.tensor([[[0, 0, 1, 1], [0, -1, 1, 1]], [[0, 1, 2, 2], [0, 1, 2, 2]]])[:, None]
    game = ap.Game(ap.Field(total).bind(x), ap.groups.Labels(labels), ap.fills.SegmentMean())
    points = game.rows(torch.zeros(2, 3, dtype=torch.bool), torch.arange(2), torch.arange(2))[:, 0]
    for b in range(2):
        for c in range(3):
            for p in range(int(labels[b].max()) + 1):
                inside = labels[b, 0] == p
                assert torch.allclose(points[b, c][inside], x[b, c][inside].mean(), atol=1e-12)
    assert points[0, 1, 1, 1] == x[0, 1, 1, 1]
    with pytest.raises(InputError, match="segments that overlap"):
        ap.Game(ap.Field(total).bind(x), ap.groups.Patches(2, 1), ap.fills.SegmentMean())


def test_mask_tokens() -> None:
    net = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(12, 2)).double()
    tokens = torch.tensor([[1, 2, 3, 4], [4, 4, 0, 0]])
    field = ap.Field(net, site=ap.At("0"))
    fill = ap.fills.MaskToken.of(cast(nn.Embedding, net[0]), 0)
    game = ap.Game(field.bind(tokens, target=1), ap.groups.RealTokens(), fill)
    for m in masks(4):
        want = net(torch.where(m, tokens, 0))[:, 1]
        assert torch.allclose(game.value(m[None])[:, 0], want.detach(), atol=1e-12)
    with pytest.raises(InputError, match="a token of 3 features"):
        ap.Game(ap.Field(total).bind(torch.zeros(1, 4)), ap.groups.Elements(), fill)


def test_inpainting_by_hand() -> None:
    x = torch.randn(2, 3, dtype=DOUBLE)
    seen: list[Tensor] = []

    def paint(x: Any, kept: Any) -> Tensor:
        seen.append(kept)
        return torch.stack([torch.full_like(x, 7.0), kept.mean(1, keepdim=True).expand_as(x)], 1)

    game = ap.Game(ap.Field(total).bind(x), ap.groups.Elements(), ap.fills.Inpainted(paint, count=2))
    m = torch.tensor([True, False, False])
    assert torch.allclose(game.value(m[None])[:, 0], x[:, 0] + 7 + 1 / 3, atol=1e-12)
    assert seen[0].tolist() == [[1.0, 0, 0]] * 2
    wrong = ap.Game(ap.Field(total).bind(x), ap.groups.Elements(), ap.fills.Inpainted(lambda x, kept: x[:, :2]))
    with pytest.raises(InputError, match=r"points painted of shape \(2, 2\)"):
        wrong.value(m[None])
    same = ap.Game(ap.Field(total).bind(x), ap.groups.Elements(), ap.fills.Inpainted(lambda x, kept: x))
    with pytest.raises(InputError, match="unchanged, for every one of its 3"):
        same.value(~torch.eye(3, dtype=torch.bool))


# -- the conditional distribution of a table ----------------------------------------------------


def table() -> tuple[Tensor, Tensor]:
    rows = torch.tensor(list(product([0.0, 1.0], [0.0, 1.0, 2.0], [0.0, 1.0])), dtype=DOUBLE)
    return rows, torch.rand(12, dtype=DOUBLE).softmax(0)


@pytest.mark.parametrize("given", ["weights", "rows"])
def test_conditional_is_bayes_rule(given: str) -> None:
    """v(S) = Σ p(x') p(y | x') [x'_S = x_S] / Σ p(x') [x'_S = x_S], row by row."""
    rows, p = table()
    if given == "rows":  # a data set stands for its frequencies
        rows, p = rows[torch.randint(12, (40,))], torch.full((40,), 1 / 40, dtype=DOUBLE)
    net = nn.Linear(3, 4).double()
    x = rows[[0, 5, 7]]
    fill = ap.fills.Conditional(rows, p if given == "weights" else None)
    q = ap.Field(net, ap.Probability()).bind(x, target=2)
    game = ap.Game(q, ap.groups.Elements(), fill)
    found = game.value(masks(3))
    played = 0
    for b in range(3):
        for s, m in enumerate(masks(3)):
            agree = [r for r in range(len(rows)) if all(rows[r, i] == x[b, i] for i in range(3) if m[i])]
            y = net(rows).softmax(1)[:, 2].detach()
            want = sum(float(p[r] * y[r]) for r in agree) / sum(float(p[r]) for r in agree)
            assert found[b, s] == pytest.approx(want, abs=1e-12)
            played += 0 if bool(m.all()) else len(agree)
    assert int(q.cost.forward.sum()) == played


def test_conditional_mistakes() -> None:
    rows, p = table()
    with pytest.raises(ConfigError, match="one for each row"):
        ap.fills.Conditional(rows, p[:3])
    with pytest.raises(ConfigError, match="from -1"):
        ap.fills.Conditional(rows, -torch.ones(12))
    with pytest.raises(ConfigError, match="not finite"):
        ap.fills.Conditional(rows, p * torch.nan)
    with pytest.raises(InputError, match="float as a table"):
        ap.fills.Conditional(rows.tolist())
    with pytest.raises(InputError, match=r"shape \(0, 3\) as a table"):
        ap.fills.Conditional(rows[:0])
    q = ap.Field(total).bind(torch.tensor([[0.0, 5.0, 0.0]], dtype=DOUBLE))
    game = ap.Game(q, ap.groups.Elements(), ap.fills.Conditional(rows, p))
    with pytest.raises(InputError, match="example 0, of which no row"):
        game.value(torch.tensor([[False, True, False]]))
    with pytest.raises(InputError, match="soft masks for Conditional"):
        game.value(torch.full((1, 3), 0.5))


def test_conditional_may_give_what_is_there() -> None:
    """Two columns that are one: either alone tells the other, which is no mistake."""
    rows = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=DOUBLE)
    game = ap.Game(ap.Field(total).bind(rows[1:]), ap.groups.Elements(), ap.fills.Conditional(rows))
    assert game.value(masks(2)).tolist() == [[1.0, 2.0, 2.0, 2.0]]


# -- noisy linear imputation --------------------------------------------------------------------


def dense(x: Tensor, kept: Tensor) -> Tensor:
    """One map, pixel by pixel: each missing pixel equals the weighted mean of its neighbours in the picture."""
    high, wide = x.shape
    missing = [(i, j) for i in range(high) for j in range(wide) if not kept[i, j]]
    a, right = torch.zeros(len(missing), len(missing), dtype=DOUBLE), torch.zeros(len(missing), dtype=DOUBLE)
    for k, (i, j) in enumerate(missing):
        near = [(i + s, j + t, 1 / 12 if s and t else 1 / 6) for s in (-1, 0, 1) for t in (-1, 0, 1) if s or t]
        near = [(s, t, w) for s, t, w in near if 0 <= s < high and 0 <= t < wide]
        whole = sum(w for _, _, w in near)
        a[k, k] = 1
        for s, t, w in near:
            if kept[s, t]:
                right[k] += w / whole * x[s, t]
            else:
                a[k, missing.index((s, t))] -= w / whole
    out = x.clone()
    for (i, j), value in zip(missing, torch.linalg.solve(a, right), strict=True):
        out[i, j] = value
    return out


def test_noisy_linear_solves_the_system() -> None:
    x = torch.randn(5, 6, 7, dtype=DOUBLE)
    kept = torch.rand(5, 6, 7) > torch.tensor([0.1, 0.4, 0.7, 0.9, 0.5])[:, None, None]
    kept[3] = False
    kept[3, 2, 2] = True
    kept[4] = True
    found, done = impute(x, kept, 1e-13)
    assert done
    for k in range(5):
        assert torch.allclose(found[k], dense(x[k], kept[k]), atol=1e-10)
    assert torch.equal(found[kept], x[kept])
    alone, _ = impute(x[2:3], kept[2:3], 1e-13)
    assert torch.equal(alone[0], found[2])
    rough, _ = impute(x.float(), kept, 1e-5)
    assert float((rough - found).abs().max()) < 1e-3


def test_noisy_linear_as_a_fill() -> None:
    x = torch.rand(2, 3, 8, 8, dtype=DOUBLE)
    q = ap.Field(total).bind(x, ids=range(2))
    plain, noisy = (ap.fills.NoisyLinear(noise, 1e-12) for noise in (0.0, 0.1))
    kept = torch.ones(2, 3, 8, 8, dtype=torch.bool)
    kept[:, :, 2:6, 1:5] = False
    owner, draw = torch.arange(2), torch.arange(2)
    smooth = cast(Tensor, plain(q, kept, owner, draw))[:, 0]
    for b, c in product(range(2), range(3)):
        assert torch.allclose(smooth[b, c], dense(x[b, c], kept[b, c]), atol=1e-9)
    rough = cast(Tensor, noisy(q, kept, owner, draw))[:, 0] - smooth
    assert float(rough.std()) == pytest.approx(0.1, rel=0.15)
    game = ap.Game(q, ap.groups.Squares(4), noisy)
    left_out = game.value(~torch.eye(4, dtype=torch.bool))
    alone = ap.Game(ap.Field(total).bind(x[1:], ids=[1]), ap.groups.Squares(4), noisy)
    assert torch.allclose(alone.value(~torch.eye(4, dtype=torch.bool)), left_out[1:], atol=1e-10)
    with pytest.raises(InputError, match="example 0 without a pixel left"):
        game.value(torch.zeros(1, 4, dtype=torch.bool))
    with pytest.raises(InputError, match="soft masks"):
        game.value(torch.full((1, 4), 0.5))
    with pytest.raises(InputError, match="NoisyLinear of input"):
        ap.Game(ap.Field(total).bind(torch.rand(1, 4)), ap.groups.Elements(), plain).value(torch.eye(4))


# -- a Gaussian of patches ----------------------------------------------------------------------


def smooth_data(count: int = 3000) -> Tensor:
    """Pictures of 2 channels whose neighbouring pixels are correlated."""
    x = torch.randn(count, 2, 7, 7, dtype=DOUBLE)
    return nn.functional.avg_pool2d(x, 2, 1) + 0.3 * x[..., :6, :6]


def test_patches_are_fitted_by_their_moments() -> None:
    data = smooth_data(40)
    fit = ap.fills.ConditionalGaussian.fit(data, side=6, patches=4000)
    flat = data.flatten(2)
    for c in range(2):
        assert torch.allclose(fit.mean[c], flat[:, c].mean(0), atol=0.06)  # drawn with replacement
        assert torch.allclose(fit.covariance[c], torch.cov(flat[:, c].T), atol=0.12)
    assert torch.equal(fit.low, data.amin(0))
    again = ap.fills.ConditionalGaussian.fit(data, side=6, patches=4000)
    assert torch.equal(again.covariance, fit.covariance)
    with pytest.raises(InputError, match="patches of 9 pixels"):
        ap.fills.ConditionalGaussian.fit(data, side=9)


def test_draws_have_the_conditional_moments() -> None:
    """Of w given u, from the inverse of the whole covariance: mean μ_w - Λ_ww⁻¹ Λ_wu (x_u - μ_u), covariance Λ_ww⁻¹."""
    data = smooth_data()
    fit = ap.fills.ConditionalGaussian.fit(data, side=4, patches=6000, samples=4000)
    wide = ap.fills.ConditionalGaussian(fit.mean, fit.covariance, fit.low - 99, fit.high + 99, 4000)
    x = data[:3]
    kept = torch.ones(3, 2, 6, 6, dtype=torch.bool)
    corners = [(0, 0), (2, 3), (4, 2)]  # the patch is shifted at the first border and at the last
    patches = [(0, 0), (1, 2), (2, 1)]
    for b, (i, j) in enumerate(corners):
        kept[b, :, i : i + 2, j : j + 2] = False
    q = ap.Field(total).bind(x, ids=range(3))
    points = cast(Tensor, wide(q, kept, torch.arange(3), torch.zeros(3, dtype=torch.long)))
    assert torch.equal(points[:, 0][kept], x[kept])
    for b, (i, j) in enumerate(patches):
        for c in range(2):
            gone = ~kept[b, c, i : i + 4, j : j + 4].flatten()
            inverse = torch.linalg.inv(fit.covariance[c])
            spread = torch.linalg.inv(inverse[gone][:, gone])
            away = (x[b, c, i : i + 4, j : j + 4].flatten() - fit.mean[c])[~gone]
            mean = fit.mean[c][gone] - spread @ inverse[gone][:, ~gone] @ away
            drawn = points[b, :, c, i : i + 4, j : j + 4].flatten(1)[:, gone]
            error = 5 * (spread.diagonal() / 4000).sqrt()
            assert ((drawn.mean(0) - mean).abs() < error).all()
            assert torch.allclose(torch.cov(drawn.T), spread, atol=float(spread.diagonal().max()) * 0.12)
    alone = cast(Tensor, wide(ap.Field(total).bind(x[1:2], ids=[1]), kept[1:2], *torch.zeros(2, 1, dtype=torch.long)))
    assert torch.allclose(alone[0], points[1], atol=1e-9)


def test_draws_stay_within_what_data_were() -> None:
    data = smooth_data(200)
    fit = ap.fills.ConditionalGaussian.fit(data, side=4, patches=500, samples=50)
    tight = ap.fills.ConditionalGaussian(fit.mean, fit.covariance, fit.low * 0 - 0.1, fit.high * 0 + 0.1, 50)
    game = ap.Game(ap.Field(total).bind(data[:2]), ap.groups.Squares(2), tight)
    points = game.rows(~torch.eye(9, dtype=torch.bool)[:2], torch.arange(2), torch.arange(2))
    assert points.shape == (2, 50, 2, 6, 6)
    assert float(points[0, :, :, :2, :2].abs().max()) <= 0.1
    with pytest.raises(InputError, match="without pixels over 6"):
        game.value(torch.zeros(1, 9, dtype=torch.bool))
    flat = torch.zeros(30, 1, 6, 6, dtype=DOUBLE)
    flat[:, :, 3] = torch.randn(30, 1, 6, dtype=DOUBLE)
    dead = ap.fills.ConditionalGaussian.fit(flat, side=4, patches=300)  # a singular covariance
    game = ap.Game(ap.Field(total).bind(flat[:1]), ap.groups.Squares(2), dead)
    assert torch.isfinite(game.value(~torch.eye(9, dtype=torch.bool))).all()


def test_patches_of_other_pictures() -> None:
    fit = ap.fills.ConditionalGaussian.fit(smooth_data(20), side=4, patches=50)
    for x, what in ((torch.zeros(1, 2, 5, 6), "for patches from"), (torch.zeros(1, 5), "of input")):
        game = ap.Game(ap.Field(total).bind(x), ap.groups.Elements(), fit)
        with pytest.raises(InputError, match=what):
            game.value(~torch.eye(game.players, dtype=torch.bool)[:1])
    game = ap.Game(ap.Field(total).bind(smooth_data(1)), ap.groups.Elements(), fit)
    with pytest.raises(InputError, match="some channels of a pixel"):
        game.value(~torch.eye(72, dtype=torch.bool)[:1])


def test_no_rows_at_all_are_refused() -> None:
    q = ap.Field(lambda x: x.sum(1)).bind(torch.ones(2, 4))
    with pytest.raises(InputError, match=r"background rows \(0, 4\)") as caught:
        ap.Game(q, ap.groups.Elements(), ap.fills.Marginal(torch.zeros(0, 4))).value(torch.zeros(1, 4).bool())
    assert "k at least 1" in str(caught.value)
