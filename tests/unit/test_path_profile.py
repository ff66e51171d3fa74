"""Profiles along paths, where everything on them is known."""

import math

import pytest
import torch
from torch import Tensor

import apportion as ap
from apportion import planted
from apportion.core.errors import ConfigError, InputError
from apportion.parts.paths import Straight
from apportion.parts.quadrature import Adaptive, Gauss, Midpoint, Quadrature, Right
from apportion.show.profile import profile


def test_of_a_saturating_score() -> None:
    field = ap.Field(lambda x: (2 * x).clamp(max=1).sum(1))
    p = ap.path_profile(Straight(quadrature=Midpoint(10)), field, torch.ones(1, 1, dtype=torch.float64))
    t = [0.05 + 0.1 * i for i in range(10)]
    assert p.t[0, 0].tolist() == pytest.approx(t)
    assert p.value[0, 0].tolist() == pytest.approx([min(1, 2 * s) for s in t])
    assert p.slope[0, 0].tolist() == [2.0] * 5 + [0.0] * 5
    assert p.accumulated[0, 0].tolist() == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0] + [1.0] * 5)
    assert float(p.saturated_from(0.85)) == pytest.approx(0.45)
    assert (float(p.start), float(p.end)) == (0.0, 1.0)
    assert p.outside is None


def test_valid_pairs_are_those_of_definition_7() -> None:
    # the gradient is (2 x1, cos x2): the first only grows towards x, the second changes its sign on the way
    field = ap.Field(lambda x: x[:, 0] ** 2 + x[:, 1].sin())
    x = torch.tensor([[1.0, math.pi * 0.9]], dtype=torch.float64)
    p = ap.path_profile(Straight(quadrature=Midpoint(100)), field, x)
    t = p.t[0, 0]
    second = (t * math.pi * 0.9).cos()
    at_x = math.cos(math.pi * 0.9)
    want = (1 + ((second < 0) & (second.abs() <= abs(at_x))).double()) / 2
    assert torch.equal(p.valid[0, 0], want)
    assert 0.5 < float(p.valid_share) < 0.99


def test_ties_are_valid_and_flipped_signs_are_not() -> None:
    x = torch.ones(1, 3, dtype=torch.float64)
    assert float(ap.path_profile(Straight(), ap.Field(planted.Linear([1.0, -2.0, 3.0])), x).valid_share) == 1.0
    away = ap.Field(lambda z: (z - 0.5).abs().sum(1))
    p = ap.path_profile(Straight(quadrature=Midpoint(10)), away, x)
    assert p.valid[0, 0].tolist() == [0.0] * 5 + [1.0] * 5


def test_values_out_of_bounds_are_counted() -> None:
    field = ap.Field(planted.Linear([1.0, 1.0]), bounds=(0, 1))
    x = torch.tensor([[0.5, 1.0]], dtype=torch.float64)
    base = ap.baselines.Constant(-1.0)
    p = ap.path_profile(ap.IntegratedGradients(base, Right(4)), field, x)
    # x1: -.625 -.25 .125 .5; x2: -.5 0 .5 1
    assert p.outside is not None
    assert p.outside[0, 0].tolist() == [1.0, 0.5, 0.0, 0.0]


@pytest.mark.parametrize("rule", [Gauss(9), Adaptive(max_passes=30)], ids=lambda r: type(r).__name__)
def test_what_accumulates_is_the_attribution(rule: Quadrature) -> None:
    field = ap.Field(planted.dense_net())
    x = torch.rand(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    explain = ap.IntegratedGradients(ap.baselines.Noise(0.5, count=2), rule)
    a = explain(field, x, target=1, ids=range(3), seed=4)
    p = ap.path_profile(explain, field, x, target=1, ids=range(3), seed=4)
    last = torch.where(p.t.isnan(), -torch.inf, p.t).argmax(-1, keepdim=True)
    ends = p.accumulated.gather(-1, last)[..., 0]
    torch.testing.assert_close(ends, a.parts["per_baseline"].sum(-1), rtol=0, atol=1e-13)
    assert "PathProfile of 3 example(s), 2 path(s)" in repr(p)
    assert p.to_dict()["t"][0][0][0] == float(p.t[0, 0, 0])


def test_chunks_change_nothing() -> None:
    x = torch.rand(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def profile(size: int) -> list[Tensor]:
        p = ap.path_profile(Straight(), ap.Field(planted.dense_net(), batch_size=size), x, target=1)
        return [p.t, p.value, p.slope, p.accumulated, p.valid]

    for one, other in zip(profile(1), profile(100), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)


def test_methods_without_a_path_are_refused() -> None:
    with pytest.raises(ConfigError, match="path method"):
        ap.path_profile(ap.Gradient(), ap.Field(planted.dense_net()), torch.rand(1, 5).double())


@pytest.mark.usefixtures("as_users_run")
def test_what_is_no_field_and_no_profile_is_told() -> None:
    x = torch.rand(1, 5).double()
    with pytest.raises(ConfigError, match=r"as field\nExpected: an ap.Field"):
        ap.path_profile(ap.IntegratedGradients(), planted.dense_net(), x)  # pyright: ignore[reportArgumentType]
    p = ap.path_profile(ap.IntegratedGradients(), ap.Field(planted.dense_net()), x, target=1)
    for given in ([p, p], 3, {"logit": 3}):
        with pytest.raises(InputError, match="path_profile"):
            profile(given)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("phi", [0, -0.5, 1.5, 2, float("nan")])
def test_a_share_is_from_0_to_1(phi: float) -> None:
    p = ap.path_profile(Straight(), ap.Field(planted.Linear([1.0])), torch.ones(1, 1).double())
    for asked in (lambda: p.saturated_from(phi), lambda: ap.SplitIG(phi=phi)):
        with pytest.raises(ConfigError, match="phi"):
            asked()


def test_profile_and_split_agree_where_the_score_saturates() -> None:
    # the second example ends where it began, on the third score is rounding noise, the fourth only falls
    field = ap.Field(lambda x: (8 * x[:, 0]).sin() * x[:, 1] + x[:, 0] * x[:, 2])
    x = torch.tensor([[1.0, 1, 1], [math.pi / 4, 0, 0], [math.pi / 8, 1, 0], [1.0, 0, -1]], dtype=torch.float64)
    for rule in (Gauss(40), Midpoint(40)):
        a = ap.SplitIG(quadrature=rule)(field, x)
        p = ap.path_profile(ap.IntegratedGradients(quadrature=rule), field, x)
        assert torch.equal(p.saturated_from(0.9), a.parts["split_at"])
        assert float(a.parts["split_at"][1]) == 1
        assert any("no rise to split" in w and "example(s) 1" in w for w in a.warnings)
        assert not any("never passed" in w for w in a.warnings)
