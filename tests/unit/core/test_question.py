"""Questions: derived rows, grids, references, several scores, Hessians."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import apportion as ap

DOUBLE = torch.float64


def cubic(x: Tensor) -> Tensor:
    """Three outputs of known gradients and Hessians."""
    return torch.stack([x.prod(1), (x**3).sum(1), (x[:, 0] * x[:, 1]) ** 2], 1)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 3, dtype=DOUBLE)


@pytest.fixture
def q(x: Tensor) -> ap.Question:
    return ap.Field(cubic).bind(x, target=[0, 1, 2], ids=["a", "b", "c"])


def test_derived_rows_keep_their_owners_target(q: ap.Question, x: Tensor) -> None:
    owner, draw = torch.tensor([2, 0, 2, 1]), torch.tensor([0, 0, 1, 5])
    rows = torch.randn(4, 3, dtype=DOUBLE)
    inner = q.at(rows, owner, draw)
    assert len(inner) == 4
    assert inner.target.flatten().tolist() == [2, 0, 2, 1]
    assert list(inner.ids) == ["c", "a", "c", "b"]
    assert inner.root is q
    assert inner.in_root.tolist() == [2, 0, 2, 1]
    want = cubic(rows).gather(1, torch.tensor([[2], [0], [2], [1]]))[:, 0]
    assert torch.equal(inner.fx, want)
    deeper = inner.at(rows[[3, 0]], torch.tensor([3, 0]), torch.tensor([1, 1]))
    assert deeper.in_root.tolist() == [1, 2]
    assert deeper.target.flatten().tolist() == [1, 2]
    assert list(deeper.ids) == ["b", "c"]


def test_the_top_class_is_that_of_the_example_not_of_the_row() -> None:
    q = ap.Field(lambda x: x).bind(torch.tensor([[1.0, 0.0]]))
    inner = q.at(torch.tensor([[0.0, 5.0]]), torch.tensor([0]), torch.tensor([0]))
    assert inner.fx.tolist() == [0]


def test_derived_streams(q: ap.Question) -> None:
    def noise(question: ap.Question, purpose: str = "p") -> Tensor:
        n = torch.arange(len(question))
        return question.stream(purpose).normal(torch.zeros(len(n), 50), n, torch.zeros_like(n))

    rows, owner, draw = torch.zeros(3, 3, dtype=DOUBLE), torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1])
    inner = q.at(rows, owner, draw)
    found = noise(inner)
    assert len({tuple(r) for r in [*found.tolist(), *noise(q).tolist()]}) == 6
    alone = q.at(rows[:1], torch.tensor([1]), torch.tensor([1]))
    assert torch.equal(noise(alone)[0], found[2])
    assert not torch.equal(noise(inner, "other"), found)
    twice = inner.at(rows, torch.arange(3), torch.zeros(3, dtype=torch.long))
    assert len({tuple(r) for r in [*noise(twice).tolist(), *found.tolist()]}) == 6


def test_costs_and_warnings_of_derived_rows_are_the_roots(q: ap.Question) -> None:
    inner = q.at(torch.zeros(2, 3, dtype=DOUBLE), torch.tensor([1, 1]), torch.tensor([0, 1]))
    inner.value_and_grad(inner.x, torch.tensor([0, 1]))
    inner.value(inner.x[:1], torch.tensor([1]))
    inner.warn("look")
    inner.warn("look")
    a = ap.Gradient().explain(q)
    assert a.cost.forward.tolist() == [1, 4, 1]
    assert a.cost.backward.tolist() == [1, 3, 1]
    assert a.warnings == ("look",)
    assert a.cost.checks == 5


@pytest.mark.parametrize("chunk", [1, 2, 4, 5, 100])
def test_grid_order(chunk: int, x: Tensor) -> None:
    """Every pair once; each example meets its steps in order; blocks of one pass."""
    q = ap.Field(cubic, batch_size=chunk).bind(x, target=0)
    blocks = list(q.grid(4))
    pairs = [(int(o), int(s)) for step, owner in blocks for s, o in zip(step, owner, strict=True)]
    assert sorted(pairs) == [(o, s) for o in range(3) for s in range(4)]
    for example in range(3):
        assert [s for o, s in pairs if o == example] == [0, 1, 2, 3]
    assert [len(s) for s, _ in blocks] == [min(chunk, 12 - i) for i in range(0, 12, chunk)]
    assert list(q.grid(0)) == []


def test_values_and_gradients_of_owned_rows(q: ap.Question) -> None:
    owner = torch.tensor([1, 0, 2, 1, 0])
    rows = torch.randn(5, 3, dtype=DOUBLE, requires_grad=True)
    picked = cubic(rows)[torch.arange(5), owner]
    (want,) = torch.autograd.grad(picked.sum(), rows)
    value, grad = q.value_and_grad(rows.detach(), owner)
    assert torch.equal(value, picked.detach())
    assert torch.allclose(grad, want, atol=1e-15)
    assert torch.equal(q.value(rows, owner), picked.detach())
    assert torch.equal(q.outputs(rows, owner), cubic(rows).detach())


def test_several_scores_share_the_forward_pass(q: ap.Question) -> None:
    owner = torch.arange(3)
    scores = (ap.Logit(), ap.Probability(), ap.LogProbability())
    before = ap.Gradient().explain(q).cost
    values, grads = q.value_and_grad(q.x, owner, scores)
    after = ap.Gradient().explain(q).cost
    assert (after.forward - before.forward).tolist() == [2, 2, 2]  # the scores, and the gradient that asked
    assert (after.backward - before.backward).tolist() == [4, 4, 4]
    for score, v, g in zip(scores, values, grads, strict=True):
        alone = q.value_and_grad(q.x, owner, score)
        assert torch.allclose(v, alone[0], atol=1e-15)
        assert torch.allclose(g, alone[1], atol=1e-15)
    assert torch.equal(q.value(q.x, owner, ap.Probability()), values[1])


def test_hessian_vector_products(q: ap.Question, x: Tensor) -> None:
    v = torch.randn(3, 3, dtype=DOUBLE)
    value, grad, product = q.hvp(x, torch.arange(3), v)
    for b in range(3):
        fn: Callable[[Tensor], Tensor] = lambda t, b=b: cubic(t[None])[0, b]  # noqa: E731
        hessian = torch.autograd.functional.hessian(fn, x[b])
        assert torch.allclose(product[b], hessian @ v[b], atol=1e-12)  # pyright: ignore[reportOperatorIssue]
    assert torch.allclose(grad, q.value_and_grad(x, torch.arange(3))[1])
    assert torch.equal(value, q.fx)
    linear = ap.Field(lambda x: x * 3).bind(x, target=0)
    assert not linear.hvp(x, torch.arange(3), v)[2].any()


def test_references_are_made_once(x: Tensor) -> None:
    calls = []

    def made(question: ap.Question) -> Tensor:
        calls.append(len(question))
        return torch.stack([question.x * 0, question.x * 2], 1)

    q = ap.Field(cubic, batch_size=2).bind(x, target=[0, 1, 2])
    found = q.references(made)
    assert q.references(made) is found
    assert calls == [3]
    assert torch.equal(found.rows, torch.stack([x * 0, x * 2], 1))
    want = cubic(found.rows.flatten(0, 1)).reshape(3, 2, 3)
    assert torch.allclose(found.value, torch.stack([want[b, :, b] for b in range(3)]), atol=1e-15)
    assert found.top_class is not None
    assert torch.equal(found.top_class, want.argmax(2))
    inner = q.at(torch.ones(4, 3, dtype=DOUBLE), torch.tensor([2, 0, 2, 1]), torch.tensor([0, 0, 1, 0]))
    derived = inner.references(made)
    assert calls == [3]
    assert torch.equal(derived.rows, found.rows[[2, 0, 2, 1]])
    assert torch.equal(derived.value, found.value[[2, 0, 2, 1]])
    assert derived.top_class is not None
    assert torch.equal(derived.top_class, found.top_class[[2, 0, 2, 1]])
    assert ap.Gradient().explain(q).cost.forward.tolist() == [3, 3, 3]


def test_share_of_features_equal_to_the_baseline() -> None:
    x = (torch.tensor([[0.0, 1.0, 0.0], [1.0, 1.0, 1.0]]), torch.tensor([0.0, 2.0]))
    q = ap.Field(lambda a, b: a.sum(1) + b).bind(x)
    found = q.references(ap.baselines.Zero())
    assert found.equal_share.tolist() == [[0.75], [0]]
    assert found.top_class is None
    values = ap.IntegratedGradients().explain(q).values
    assert values[0][0].tolist() == [0, pytest.approx(1), 0]
    both = q.references(lambda q: tuple(torch.stack([t * 0, t], 1) for t in q.x))
    assert both.equal_share.tolist() == [[0.75, 1], [0, 1]]


def test_carry_makes_points_at_the_models_input(x: Tensor) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    q = ap.Field(net, site=ap.At("1"), batch_size=2).bind(x, target=0)
    points = torch.randn(3, 2, 3, dtype=DOUBLE)
    seen = []

    def make(question: ap.Question) -> Tensor:
        seen.append(question.x)
        return points

    assert torch.allclose(q.carry(make), net[1](net[0](points)).detach(), atol=1e-14)
    assert torch.equal(seen[0], x)
    assert torch.equal(q.read(x, torch.arange(3)), q.x)
    plain = ap.Field(net).bind(x, target=0)
    assert plain.read(x, torch.arange(3)) is x


def test_cost_of_the_target() -> None:
    x = torch.randn(2, 3, dtype=DOUBLE)
    free = ap.Gradient()(ap.Field(cubic), x).cost
    given = ap.Gradient()(ap.Field(cubic), x, target=1).cost
    assert (free.at_x.tolist(), given.at_x.tolist()) == ([1, 1], [0, 0])
    paid = ap.IntegratedGradients(quadrature=ap.quadrature.Gauss(2))(ap.Field(cubic), x, target=1).cost
    assert (paid.at_x.tolist(), paid.forward.tolist(), paid.backward.tolist()) == ([1, 1], [3, 3], [2, 2])


def test_what_was_found_finite_is_looked_at_again_once_written_to() -> None:
    q = ap.Field(lambda x: x.prod(1)).bind(torch.ones(2, 2))
    _, grad = q.value_and_grad(q.x, q.owners)
    assert q._runner.saw_finite(grad)
    assert not q._runner.saw_finite(grad.clone())
    grad[0, 0] = torch.inf
    assert not q._runner.saw_finite(grad)


def test_rows_that_are_the_examples_are_counted_as_others_are() -> None:
    q = ap.Field(lambda x: x.prod(1)).bind(torch.ones(3, 2))
    assert q._runner.is_everyone(q.owners)
    assert not q._runner.is_everyone(torch.tensor([0, 0, 1]))
    for owner in (q.owners, torch.tensor([2, 0, 0])):
        q.value(q.x, owner)
    assert q.cost.forward.tolist() == [3, 1, 2]
