"""Traces and their methods: values that are known, and slow twins that read like the papers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import apportion as ap
from apportion import planted
from apportion.core.explainer import Explainer
from apportion.methods.path.agi import AGI
from apportion.methods.path.guided_ig import GuidedIG
from apportion.methods.path.ig2 import IG2
from apportion.methods.path.samp import SAMP
from apportion.parts.baselines import Constant, Noise
from apportion.parts.paths.ascent import Ascent
from apportion.parts.paths.guided import GuidedPath
from apportion.parts.paths.representation import Representation
from apportion.parts.paths.salient import Salient
from apportion.testing.principles import measure

MANY = [
    GuidedIG(Constant(0.5), steps=13),
    GuidedIG(steps=7, fraction=0.6, max_dist=1.0),
    AGI(0.07, 6),
    IG2(Constant(0.5), steps=6),
    SAMP(Constant(0.5), size=0.4, eta=0.3),
    SAMP(size=1, eta=1, momentum=0.0, direction="delete"),
]


def points(rows: int = 3, features: int = 5, seed: int = 5) -> Tensor:
    return torch.rand(rows, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slope(f: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    at = x.clone().requires_grad_()
    value = f(at)
    return value.detach(), torch.autograd.grad(value, at)[0]


# -- all of them -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", MANY, ids=str)
def test_linear_scores_come_out_exactly(method: Explainer) -> None:
    layer = nn.Linear(5, 3).double()
    a = method(ap.Field(layer), points(), target=1)
    assert a.references is not None
    want = layer.weight[1] * (points() - a.references.rows.mean(1))
    torch.testing.assert_close(a.values, want.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", MANY, ids=str)
def test_moves_sum_to_the_way_in_order(method: Explainer) -> None:
    q = ap.Field(planted.dense_net()).bind(points(), target=1)
    walk = method.way.walk(q, rises=True)  # pyright: ignore[reportAttributeAccessIssue]
    total, rise = torch.zeros(3, walk.branches, 5, dtype=torch.float64), torch.zeros(3, walk.branches).double()
    last = torch.full((3, walk.branches), -1.0).double()
    at: dict[tuple[int, int], Tensor] = {}
    for legs in walk.legs:
        assert legs.rise is not None
        for i, (b, k) in enumerate(zip(legs.owner.tolist(), legs.branch.tolist(), strict=True)):
            total[b, k] += legs.move[i]
            rise[b, k] += legs.rise[i]
            assert last[b, k] < legs.t[i] <= 1
            last[b, k] = legs.t[i]
            at.setdefault((b, k), legs.point[i])
    start, origin = walk.references(), list(walk.origin or range(walk.branches))
    torch.testing.assert_close(total, q.x[:, None] - start.rows[:, origin], rtol=0, atol=1e-12)
    torch.testing.assert_close(rise, q.fx[:, None] - walk.start_values(), rtol=0, atol=1e-12)
    if isinstance(method, GuidedIG):
        assert all(torch.equal(p, start.rows[key]) for key, p in at.items())


@pytest.mark.parametrize("method", MANY, ids=str)
def test_idgi_is_complete_on_every_trace(method: Explainer) -> None:
    field = ap.Field(planted.dense_net())
    idgi = ap.IDGI(method.way)  # pyright: ignore[reportAttributeAccessIssue]
    a = idgi(field, points(), target=1)
    assert a.gap is not None
    assert float(a.gap.abs().max()) < 1e-12
    said, spent = idgi.passes(), a.cost
    assert (spent.forward <= said.forward + said.once).all()
    assert (spent.backward <= said.backward).all()
    if said.exact:
        assert (spent.forward == said.forward + said.once).all()


@pytest.mark.parametrize(
    ("coarse", "fine"),
    [
        (GuidedIG(steps=20), GuidedIG(steps=200)),
        (AGI(0.04, 10), AGI(0.004, 100)),
        (IG2(steps=10), IG2(steps=100)),
        (SAMP(eta=0.1), SAMP(eta=0.01)),
    ],
    ids=["guided", "agi", "ig2", "samp"],
)
def test_gaps_are_discretization_only(coarse: Explainer, fine: Explainer) -> None:
    field = ap.Field(planted.dense_net(), score=ap.Probability())
    one, two = (m(field, points(), target=1).gap for m in (coarse, fine))
    assert one is not None
    assert two is not None
    assert float(two.abs().max()) < 0.25 * float(one.abs().max())
    assert float(two.abs().max()) < 5e-3


# -- guided ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("max_dist", "want"),
    [(0.0, (0.995, 0.995)), (0.02, (1.054, 0.936)), (0.1, (1.272, 0.720)), (1.0, (1.990, 0.010))],
)
def test_guided_on_a_product(max_dist: float, want: tuple[float, float]) -> None:
    field = ap.Field(planted.Product(), precision=torch.float64)
    a = GuidedIG(max_dist=max_dist)(field, torch.tensor([[1.0, 2.0]]))
    assert a.values[0].tolist() == pytest.approx(want, abs=5e-4)


@pytest.mark.parametrize(
    ("max_dist", "want", "within"),
    [(0.0, (2.2275, 0.7425), 1e-9), (0.02, (2.324, 0.647), 6e-4), (1.0, (3.0, 0.0), 0.031)],
)
def test_guided_on_the_relu_product(max_dist: float, want: tuple[float, float], within: float) -> None:
    # with the choice free, one step of x1 beyond its kink is shared: 1/100 of 3 at 200 steps
    field = ap.Field(planted.ReluProduct(), precision=torch.float64)
    a = GuidedIG(max_dist=max_dist)(field, torch.tensor([[2.0, 3.0]]))
    assert a.values[0].tolist() == pytest.approx(want, abs=within)


def slow_guided(f: Callable, x: Tensor, start: Tensor, steps: int, fraction: float, dist: float) -> Tensor:
    """Algorithm 1 of Kapishnikov et al. 2021 with the bounds of max_dist, feature by feature."""
    d, z, out = len(x), start.clone(), torch.zeros_like(x)
    whole = float((x - start).abs().sum())
    for s in range(steps):
        _, g = slope(f, z)
        before, share = z.clone(), (s + 1) / steps
        low = start + max(share - dist, 0) * (x - start)
        high = start + min(share + dist, 1) * (x - start)
        for i in range(d):
            gone = (z[i] - start[i]) / (x[i] - start[i]) if x[i] != start[i] else 1.0
            if gone < max(share - dist, 0):
                z[i] = low[i]
        while True:
            far = float((x - z).abs().sum()) - (1 - share) * whole
            y = [math.inf if abs(float(z[i] - high[i])) < 1e-15 else abs(float(g[i])) for i in range(d)]
            if far < 1e-12 * whole or min(y) == math.inf:
                break
            bar = sorted(y)[math.floor(fraction * (d - 1))]
            chosen = [i for i in range(d) if y[i] <= bar and y[i] < math.inf]
            gamma = far / sum(abs(float(high[i] - z[i])) for i in chosen)
            for i in chosen:
                z[i] = high[i] if gamma >= 1 else z[i] + gamma * (high[i] - z[i])
        out += g * (z - before)
    return out


@pytest.mark.parametrize(("fraction", "dist"), [(0.25, 0.02), (0.25, 1.0), (0.5, 0.3), (0.0, 0.1), (1.0, 0.2)])
def test_guided_is_its_slow_twin(fraction: float, dist: float) -> None:
    net, x = planted.dense_net(9), points(3, 9)
    x[0, 4] = 0.2  # as the baseline
    a = GuidedIG(Constant(0.2), 17, fraction, dist)(ap.Field(net), x, target=2)
    want = torch.stack(
        [slow_guided(lambda z: net(z[None])[0, 2], r, torch.full_like(r, 0.2), 17, fraction, dist) for r in x]
    )
    torch.testing.assert_close(a.values, want, rtol=1e-10, atol=1e-12)
    wrong = torch.stack(
        [slow_guided(lambda z: -net(z[None])[0, 1], r, torch.full_like(r, 0.2), 17, fraction, dist) for r in x]
    )
    assert not torch.allclose(a.values, wrong, rtol=1e-2)
    if dist == 1:  # a path that ignores the gradients is another one
        straight = ap.IntegratedGradients(Constant(0.2), ap.quadrature.Left(17))(ap.Field(net), x, target=2)
        assert not torch.allclose(a.values, straight.values, rtol=1e-3)


# -- ascent ----------------------------------------------------------------------------------------------------


def ramp(margin: float = 1.0) -> nn.Module:
    """Three classes; the way up each of the others has constant signs, and shrinks the margin by 4 ε a step."""
    layer = nn.Linear(2, 3).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 1.0], [-1.0, -1.0], [-1.0, -1.0]]))
        layer.bias.copy_(torch.tensor([margin, 0.0, -1e-9]))
    return layer


def test_published_ascent_stays_within_a_step_and_does_not_add_up() -> None:
    field, x = ap.Field(ramp(), score=ap.Probability()), torch.zeros(1, 2, dtype=torch.float64)
    base = {"step": 0.02, "iterations": 15, "total": "sum"}
    ours, theirs = (AGI(**base, published=p)(field, x, target=0) for p in (False, True))
    assert ours.references is not None
    assert theirs.references is not None
    # z0 - z1 = 1 + 2 (x1 + x2): with both lowered by .02 k it is 1 - .08 k, below 0 from k = 13 on
    assert ours.parts["steps"].tolist()[0][0] == 13
    assert ours.parts["success"].tolist()[0][0]
    assert float(ours.references.rows[0, 0].abs().max()) == pytest.approx(13 * 0.02)
    assert float(theirs.references.rows.abs().max()) == pytest.approx(0.02)
    assert not theirs.parts["success"].any()
    assert any("did not reach 2 of 2 classes" in w for w in theirs.warnings)
    # the authors' terms: the first at x, the other fourteen at x - ε, all for one move of ε
    z = torch.tensor([1.0, 0.0, -1e-9], dtype=torch.float64)
    terms = []
    for k in (0, 1):
        p = torch.softmax(z + torch.tensor([-0.04, 0.04, 0.04]) * k, 0)
        terms.append(float(p[0] * 2 * (1 - p[0])) * 0.02)
    assert float(theirs.values[0, 0]) == pytest.approx(2 * (terms[0] + 14 * terms[1]), rel=1e-9)
    assert ours.gap is not None
    assert theirs.gap is not None
    assert ours.claimed_total is not None
    assert theirs.claimed_total is not None
    assert abs(float(ours.gap)) < 0.03 * float(ours.claimed_total)
    assert abs(float(theirs.gap)) > 5 * float(theirs.claimed_total)


def test_sum_and_mean_claim_what_they_give() -> None:
    field, x = ap.Field(planted.dense_net(), score=ap.Probability()), points()
    mean, total = (AGI(total=t)(field, x, target=2) for t in ("mean", "sum"))
    torch.testing.assert_close(total.values, 2 * mean.values)
    assert mean.claimed_total is not None
    torch.testing.assert_close(total.claimed_total, 2 * mean.claimed_total)


def slow_agi(net: nn.Module, x: Tensor, target: int, others: list[int], step: float, most: int, published: bool):
    """Algorithm 1 of Pan et al. 2021: one class, one step at a time."""
    out = torch.zeros_like(x)
    for j in others:
        z = x.clone()
        for _ in range(most):
            if int(net(z[None]).argmax()) == j:
                break
            _, up = slope(lambda at, j=j: net(at[None]).softmax(1)[0, j], z)
            _, g = slope(lambda at: net(at[None]).softmax(1)[0, target], z)
            new = ((x if published else z) + step * up.sign()).clamp(0, 1)
            out -= g * (new - (x if published else z))
            z = new
    return out / len(others)


@pytest.mark.parametrize("published", [False, True])
def test_agi_is_its_slow_twin(published: bool) -> None:
    net, x = planted.dense_net(6, 4), points(4, 6)
    field = ap.Field(net, score=ap.Probability(), bounds=(0, 1))
    a = AGI(0.1, 8, published=published)(field, x)
    with torch.no_grad():
        top = net(x).argmax(1).tolist()
    others = [[j for j in range(4) if j != t] for t in top]
    want = [slow_agi(net, r, t, o, 0.1, 8, published) for r, t, o in zip(x, top, others, strict=True)]
    torch.testing.assert_close(a.values, torch.stack(want), rtol=1e-10, atol=1e-12)
    other = [slow_agi(net, r, t, o, 0.1, 8, not published) for r, t, o in zip(x, top, others, strict=True)]
    assert not torch.allclose(a.values, torch.stack(other), rtol=1e-2)


# -- representation --------------------------------------------------------------------------------------------


def test_a_representation_that_is_the_input_gives_integrated_gradients() -> None:
    net = planted.dense_net()
    field, x = ap.Field(net), points()
    a = IG2(Constant(0.3), steps=40, site=ap.At("0", end="input"))(field, x, target=1)
    want = ap.IntegratedGradients(Constant(0.3), ap.quadrature.Right(40))(field, x, target=1)
    torch.testing.assert_close(a.values, want.values, rtol=1e-9, atol=1e-12)
    assert float(a.parts["distance_left"].max()) < 1e-9


def slow_ig2(net: nn.Module, head: int, x: Tensor, reference: Tensor, steps: int, eta: float, target: int):
    """GradPath of Zhuo and Ge 2024 and the sum along it; everything in units of x."""
    z, out = x.clone(), torch.zeros_like(x)
    rep = net[:head](reference[None]).detach()  # pyright: ignore[reportIndexIssue]
    for _ in range(steps):
        _, down = slope(lambda at: ((net[:head](at[None]) - rep) ** 2).sum(), z)  # pyright: ignore[reportIndexIssue]
        _, g = slope(lambda at: net(at[None])[0, target], z)
        new = (z - eta * down / float(down.norm())).clamp(0, 1)
        out += (z - new) * g
        z = new
    return out, z


def test_ig2_is_its_slow_twin_and_complete_in_its_own_units() -> None:
    net, x, refs = planted.dense_net(6), points(3, 6), points(2, 6, seed=8)
    method = IG2(ap.baselines.Data(refs), steps=30, eta=0.02)
    a = method(ap.Field(net, bounds=(0, 1)), x, target=1)
    made = [[slow_ig2(net, 2, r, ref, 30, 0.02, 1) for ref in refs] for r in x]
    want = torch.stack([(m[0][0] + m[1][0]) / 2 for m in made])
    torch.testing.assert_close(a.values, want, rtol=1e-10, atol=1e-12)
    assert a.references is not None
    ends = torch.stack([torch.stack([one[1] for one in m]) for m in made])
    torch.testing.assert_close(a.references.rows, ends, rtol=1e-10, atol=1e-12)
    # the path in other units than the gradient's misses f(x) - f(end) by the scale; in the same ones it is met
    assert a.gap is not None
    assert a.claimed_total is not None
    assert float(a.gap.abs().max()) < 0.05 * float(a.claimed_total.abs().max())
    assert not torch.allclose(255 * want.sum(1), a.claimed_total, rtol=0.5)
    wrong = torch.stack([slow_ig2(net, 1, r, refs[0], 30, 0.02, 1)[0] for r in x])
    assert not torch.allclose(a.values, wrong, rtol=1e-2)


# -- salient ---------------------------------------------------------------------------------------------------


def slow_samp(f: Callable, begin: Tensor, end: Tensor, size: int, eta: float, momentum: float) -> Tensor:
    """The greedy path of Zhang et al. 2024, feature by feature."""
    z, out, mean = begin.clone(), torch.zeros_like(begin), torch.zeros_like(begin)
    whole = float((end - begin).abs().sum())
    while True:
        todo = [i for i in range(len(z)) if z[i] != end[i]]
        if not todo:
            return out
        _, g = slope(f, z)
        mean = momentum * mean + (1 - momentum) * g
        todo.sort(key=lambda i: -abs(float(mean[i] * (end[i] - z[i]))))
        chosen = todo[:size]
        length = sum(abs(float(end[i] - z[i])) for i in chosen)
        part = min(1.0, eta * whole / length) if eta < 1 else 1.0
        new = z.clone()
        for i in chosen:
            new[i] = end[i] if part == 1 else z[i] + part * (end[i] - z[i])
        out += g * (new - z)
        z = new


@pytest.mark.parametrize(("size", "eta", "momentum"), [(2, 1.0, 0.0), (3, 0.05, 0.5), (1, 0.3, 0.9)])
def test_samp_is_its_slow_twin(size: int, eta: float, momentum: float) -> None:
    net, x = planted.dense_net(8), points(3, 8)
    start = torch.full_like(x[0], 0.1)

    def f(z: Tensor) -> Tensor:
        return net(z[None])[0, 1]

    a = SAMP(Constant(0.1), size, eta, momentum)(ap.Field(net), x, target=1)
    insert = torch.stack([slow_samp(f, start, r, size, eta, momentum) for r in x])
    delete = torch.stack([-slow_samp(f, r, start, size, eta, momentum) for r in x])
    torch.testing.assert_close(a.parts["per_path"], torch.stack([insert, delete], 1), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(a.values, (insert + delete) / 2, rtol=1e-10, atol=1e-12)
    assert "per_baseline" not in a.parts
    assert a.references is not None
    assert a.references.rows.shape == (3, 1, 8)  # pyright: ignore[reportAttributeAccessIssue]
    assert not torch.allclose(a.values, insert, rtol=1e-2)


def test_samp_moves_first_what_matters_first() -> None:
    # f = x1 x2 + x1 from 0: only x1 has a slope, goes to 2, and x2 then earns the whole product
    field = ap.Field(lambda x: x[:, 0] * x[:, 1] + x[:, 0], precision=torch.float64)
    x = torch.tensor([[2.0, 3.0]])
    a = SAMP(size=1, eta=1, momentum=0.0, direction="insert")(field, x)
    assert a.values.tolist() == [[2.0, 6.0]]
    # and back: x1 has (3 + 1) 2 = 8 to lose, x2 has 2 · 3 = 6
    a = SAMP(size=1, eta=1, momentum=0.0, direction="delete")(field, x)
    assert a.values.tolist() == [[8.0, 0.0]]


@pytest.mark.parametrize("method", [GuidedIG(), IG2(), SAMP()], ids=lambda m: type(m).__name__)
def test_cards_say_what_the_defaults_do(method: Explainer) -> None:
    # the suite measures default configurations, which are too slow to be among the variants
    found = {p: measure(method, p) for p in method.card.measured}
    assert found == dict(method.card.measured)


def test_paths_of_the_methods() -> None:
    assert GuidedIG().way == GuidedPath()
    assert AGI().way == Ascent()
    assert IG2().way == Representation()
    assert SAMP().way == Salient()
    assert Salient(Noise(count=3)).draws == 6
