"""The nearest point of another class, against decision boundaries that are known."""

import json

import pytest
import torch
from torch import Tensor, nn

import apportion as ap
from apportion.core import tree
from apportion.core.config import from_config, to_config
from apportion.core.errors import BaselineError, ConfigError
from apportion.parts.baselines import NearestAdversarial

DOUBLE = torch.float64
W = torch.tensor([1.0, -2.0, 2.0], dtype=DOUBLE)


def binary(x: Tensor) -> Tensor:
    """f = w·x + b as two classes."""
    f = x @ W.to(x.dtype) + 0.5
    return torch.stack([f, torch.zeros_like(f)], 1)


def network(seed: int = 0, classes: int = 4) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, classes))
    net.double().eval()
    return net


def examples(count: int = 12, seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    return torch.rand(count, 6, dtype=DOUBLE)


def test_binary_linear_model() -> None:
    x = torch.tensor([[2.0, 1.0, 1.0]], dtype=DOUBLE)
    f = float(binary(x)[0, 0])
    assert f == 2.5
    q = ap.Field(binary).bind(x, target=0)
    rows = NearestAdversarial()(q)
    assert rows.shape == (1, 1, 3)
    want = x - f * W / W.square().sum()
    assert float((rows[0] - want).abs().max()) < 1e-6
    assert float(binary(rows[0])[0, 0]) < 0, "beyond the boundary, not before it"
    assert float((rows[0] - (x - 2 * f * W / W.square().sum())).abs().max()) > 0.1
    a = ap.IntegratedGradients(NearestAdversarial())(ap.Field(binary), x, target=0)
    assert torch.allclose(a.values, f * W.square() / 9, atol=1e-6)  # .2778, 1.1111, 1.1111
    assert a.claimed_total is not None
    assert torch.allclose(a.claimed_total, torch.tensor([2.5], dtype=DOUBLE), atol=1e-6)
    assert not a.warnings
    assert a.references is not None
    assert a.references.top_class is not None
    assert a.references.top_class.tolist() == [[1]]
    assert NearestAdversarial().success(q).tolist() == [True]


def test_a_class_that_is_not_the_decision() -> None:
    """Its boundary is looked for from the other side."""
    x = torch.tensor([[2.0, 1.0, 1.0]], dtype=DOUBLE)
    q = ap.Field(binary).bind(x, target=1)
    rows = NearestAdversarial()(q)
    assert float((rows[0] - (x - 2.5 * W / 9)).abs().max()) < 1e-6
    assert float(binary(rows[0])[0, 0]) < 0


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
def test_linear_with_many_classes(dtype: torch.dtype) -> None:
    """The nearest of all hyperplanes: |m_j| / ‖w_c - w_j‖ is least."""
    torch.manual_seed(5)
    w, x = torch.randn(5, 8, dtype=dtype), torch.randn(20, 8, dtype=dtype)
    found = NearestAdversarial(epsilons=(0.1, 0.2, 0.4, 0.8, 1.6, 3.2)).search(ap.Field(lambda x: x @ w.T).bind(x))
    z = (x @ w.T).double()
    top = z.argmax(1)
    gap = z.gather(1, top[:, None]) - z
    apart = (w[top][:, None] - w).double().norm(dim=2)
    exact = torch.where(gap > 0, gap / apart, torch.inf).amin(1)
    assert found.success.all()
    assert bool((found.distance >= exact * (1 - 1e-5)).all()), "nothing is nearer than the nearest"
    # descending the margin may follow another hyperplane than the nearest
    assert float((found.distance / exact).median()) < 1.001
    assert float((found.distance / exact).max()) < 2


def test_points_lie_on_the_boundary() -> None:
    net, x = network(), examples()
    field = ap.Field(net, bounds=(0, 1))
    q = field.bind(x)
    base = NearestAdversarial()
    found = base.search(q)
    assert int(found.success.sum()) >= 6
    assert bool(((found.points >= 0) & (found.points <= 1)).all())
    assert torch.allclose(found.distance, (found.points - x).norm(dim=1))
    z = net(found.points).detach()
    top = net(x).argmax(1)
    own = z.gather(1, top[:, None])[:, 0]
    other = z.scatter(1, top[:, None], -torch.inf).amax(1)
    on = found.success
    assert bool((own < other)[on].all())
    assert float((other - own)[on].max()) < 1e-5
    assert torch.equal(base.success(q), on)
    before = net(x + (1 - 1e-5) * (found.points - x)).argmax(1)
    assert torch.equal(before[on], top[on]), "a hair before it the decision is still x's own"


def test_without_bounds_the_nearest_may_lie_outside() -> None:
    x = torch.tensor([[0.95, 0.05, 0.9]], dtype=DOUBLE)
    free = NearestAdversarial(epsilons=(2.0,)).search(ap.Field(binary).bind(x))
    held = NearestAdversarial(epsilons=(2.0,)).search(ap.Field(binary, bounds=(0, 1)).bind(x))
    assert free.success.all()
    assert held.success.all()
    assert bool((held.points >= 0).all())
    assert bool((held.points <= 1).all())
    assert float(held.distance) > float(free.distance) - 1e-9


def test_batch_and_chunks_change_nothing() -> None:
    net, x = network(), examples()
    for random_start in (False, True):
        base = NearestAdversarial(random_start=random_start)
        whole = base.search(ap.Field(net, bounds=(0, 1)).bind(x))
        small = base.search(ap.Field(net, bounds=(0, 1), batch_size=5).bind(x))
        assert torch.equal(whole.success, small.success)
        assert float((whole.points - small.points).abs().max()) < 1e-12
        back = base.search(ap.Field(net, bounds=(0, 1)).bind(x.flip(0)))
        assert float((whole.points - back.points.flip(0)).abs().max()) < 1e-12
        for i in (0, 7):
            one = base.search(ap.Field(net, bounds=(0, 1)).bind(x[i : i + 1]))
            assert float((whole.points[i] - one.points[0]).abs().max()) < 1e-12
        again = base.search(ap.Field(net, bounds=(0, 1)).bind(x))
        assert torch.equal(whole.points, again.points)


def test_random_starts() -> None:
    net, x = network(), examples()
    base = NearestAdversarial(random_start=True)
    one = base.search(ap.Field(net).bind(x, seed=0))
    two = base.search(ap.Field(net).bind(x, seed=1))
    assert not torch.equal(one.points, two.points)
    # a plateau around x has no slope, and only a random start leaves it
    flat = lambda x: torch.stack([torch.relu(1 - x.square().sum(1)).clamp(max=0.9), x[:, 0] * 0 + 0.5], 1)  # noqa: E731
    x = torch.full((1, 3), 0.01, dtype=DOUBLE)
    stuck = NearestAdversarial().search(ap.Field(flat).bind(x))
    assert not stuck.success.any()
    assert torch.equal(stuck.points, x)
    loose = base.search(ap.Field(flat).bind(x))
    assert loose.success.all()
    assert abs(float(loose.points.norm()) - 0.5**0.5) < 1e-6


def test_failures_are_told() -> None:
    x = torch.tensor([[2.0, 1.0, 1.0], [0.0, 0.2, 0.0], [20.0, 0.0, 0.0]], dtype=DOUBLE)
    field = ap.Field(binary)
    base = NearestAdversarial(epsilons=(0.2, 0.1))
    a = ap.IntegratedGradients(base)(field, x, target=0)
    (warning,) = a.warnings
    assert "within 0.2 of 2 example(s) (0, 2)" in warning
    assert a.references is not None
    assert a.references.top_class is not None
    assert a.references.top_class.tolist() == [[0], [1], [0]]
    q = field.bind(x, target=0)
    found = base.search(q)
    assert found.success.tolist() == [False, True, False]
    assert base.success(q).tolist() == [False, True, False]
    # as far as the largest ball lets it come
    assert torch.allclose(found.points[0], x[0] - 0.2 * W / 3)
    assert found.distance.tolist()[0] == pytest.approx(0.2)


def test_cost_is_within_what_it_says() -> None:
    net, x = network(), examples()
    base = NearestAdversarial()
    a = ap.GradientTimesInput(base)(ap.Field(net, bounds=(0, 1)), x)
    said = ap.GradientTimesInput(base).passes()
    assert not said.exact
    assert not base.exact
    assert (a.cost.forward <= said.forward + said.once).all()
    assert (a.cost.backward <= said.backward + said.once_backward).all()
    assert (a.cost.backward < said.once_backward).any(), "tries that have crossed cost no more"
    assert (base.rows, base.backward_rows) == (2 + 7 * 41 + 24, 280)


def test_trees() -> None:
    x = {"a": torch.tensor([[2.0]], dtype=DOUBLE), "b": torch.tensor([[1.0, 1.0]], dtype=DOUBLE)}
    q = ap.Field(lambda a, b: binary(torch.cat([a, b], 1))).bind(x)
    rows = NearestAdversarial()(q)
    assert tree.names(rows) == tree.names(x)
    want = torch.tensor([2.0, 1.0, 1.0], dtype=DOUBLE) - 2.5 * W / 9
    assert torch.allclose(torch.cat([rows["a"], rows["b"]], 2)[0, 0], want, atol=1e-6)


def test_inner_site() -> None:
    net, x = network(), examples(4)
    q = ap.Field(net, site=ap.At("1")).bind(x)
    base = NearestAdversarial(epsilons=(0.5, 2.0, 8.0))
    found = base.search(q)
    assert found.points.shape == (4, 32)
    changed = net[2:](found.points).argmax(1) != net(x).argmax(1)
    assert torch.equal(changed, found.success)
    assert found.success.all()
    with pytest.raises(BaselineError, match=r"AtInput\(NearestAdversarial\) for a field at"):
        ap.baselines.AtInput(base)(q)


def test_scores_of_other_kinds() -> None:
    net, x = network(), examples(5)
    want = NearestAdversarial().search(ap.Field(net).bind(x))
    for score in (ap.LogOdds(), ap.Probability(), ap.Contrast(), lambda outputs: outputs.square().sum(1)):
        found = NearestAdversarial().search(ap.Field(net, score).bind(x))
        assert torch.equal(found.points, want.points)


def test_outputs_that_are_no_classes() -> None:
    x = examples(2)
    dense = ap.Field(lambda x: torch.stack([x[:, :2], x[:, :2]], 1), ap.Custom(lambda out: out.sum((1, 2))))
    with pytest.raises(BaselineError, match=r"outputs \(2, 2\) per example\n.*\n.*\(f, 0\)"):
        NearestAdversarial()(dense.bind(x))
    with pytest.raises(BaselineError, match="exclude none"):
        NearestAdversarial()(ap.Field(network(), ap.LogOdds(multilabel=True)).bind(x))
    with pytest.raises(BaselineError, match="differentiable question"):
        NearestAdversarial()(ap.Field(network()).bind(x.requires_grad_(), differentiable=True))


def test_one_number_decides_by_its_sign_as_two_logits_would() -> None:
    x = examples(3)

    def number(rows: Tensor) -> Tensor:
        return (2 * rows).tanh().sum(1) - 0.3

    both = ap.Field(lambda rows: torch.stack([number(rows), torch.zeros(len(rows), dtype=rows.dtype)], 1))
    want = NearestAdversarial().search(both.bind(x, target=0))
    for keepdim in (False, True):
        field = ap.Field(lambda rows, keep=keepdim: number(rows)[:, None] if keep else number(rows))
        found = NearestAdversarial().search(field.bind(x))
        torch.testing.assert_close(found.points, want.points, rtol=0, atol=1e-12)
        assert torch.equal(found.success, want.success)


def test_the_search_is_made_once_for_a_question() -> None:
    q = ap.Field(network()).bind(examples(2))
    first = NearestAdversarial().search(q)
    spent = q.cost.forward.clone()
    assert torch.equal(NearestAdversarial().search(q).points, first.points)
    assert torch.equal(q.cost.forward, spent)
    again = q.at(q.x[[1, 1]] + 0.1, torch.tensor([1, 1]), torch.tensor([0, 1]))
    assert torch.equal(NearestAdversarial().search(again).points, first.points[[1, 1]])


def test_bad_options() -> None:
    with pytest.raises(BaselineError, match="one radius or more"):
        NearestAdversarial(epsilons=())
    with pytest.raises(BaselineError, match="all above 0"):
        NearestAdversarial(epsilons=(0.1, 0.0))
    with pytest.raises(BaselineError, match="below 1"):
        NearestAdversarial(tolerance=1.0)
    with pytest.raises(ConfigError, match="steps"):
        NearestAdversarial(steps=0)


def test_configuration_comes_back() -> None:
    base = NearestAdversarial(epsilons=(0.3, 0.9), steps=10, random_start=True)
    again = from_config(json.loads(json.dumps(to_config(base))))
    assert again == base
    q = ap.Field(binary).bind(torch.tensor([[0.2, 0.1, 0.1]], dtype=DOUBLE))
    assert torch.equal(again(q), base(q))
