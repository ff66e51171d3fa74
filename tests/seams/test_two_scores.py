"""AGI: two scores at one point from one forward pass, along a path that is found step by step."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import apportion as ap


def model() -> nn.Module:
    net = nn.Linear(4, 3).double().requires_grad_(False)
    net.weight.copy_(torch.tensor([[2.0, -1, 0.5, 1], [-1, 1.5, 1, -0.5], [0.5, 0.5, -2, 0.3]]))
    net.bias.copy_(torch.tensor([0.4, -0.2, 0.1]))
    return net


X = torch.tensor([[0.8, 0.2, 0.5, 0.7], [0.6, 0.4, 0.4, 0.5]], dtype=torch.float64)


@dataclass(frozen=True)
class AGI(ap.Explainer):
    """Ascend another class's probability in sign steps; sum -∂p/∂x ⊙ step of the class explained.

    `accumulate=False` restarts every step from x, as the authors' code does.
    """

    other: tuple[int, ...]
    step: float = 0.02
    steps: int = 60
    accumulate: bool = True

    @property
    def kind(self) -> ap.Kind:
        return ap.Kind.SALIENCE

    def explain(self, q: ap.Question) -> ap.Attribution:
        total, point, owner = torch.zeros_like(q.x), q.x, torch.arange(len(q))
        goal = ap.Probability(list(self.other))
        ends = q.x.clone()
        for _ in range(self.steps):
            if not len(owner):
                break
            (_, _), (own, towards) = q.value_and_grad(point, owner, score=(ap.Probability(), goal))
            start = point if self.accumulate else q.x[owner]
            after = (start + self.step * towards.sign()).clamp(0, 1)
            total.index_add_(0, owner, -own * (after - start))
            ends[owner] = after
            there = q.value(after, owner, score=lambda z: z.argmax(1).double())
            left = there != torch.tensor(self.other)[owner]
            point, owner = after[left], owner[left]
        return q.attribution(self, total, claimed_total=q.fx - q.value(ends, torch.arange(len(q))))

    def passes(self, q: ap.Question | None = None) -> ap.Passes:
        return ap.Passes(2 * self.steps + 1, 2 * self.steps, at_x=1)


@dataclass(frozen=True)
class AtOnePoint(AGI):
    """The two gradients alone, once."""

    def explain(self, q: ap.Question) -> ap.Attribution:
        scores = (ap.Probability(), ap.Probability(list(self.other)))
        _, grads = q.value_and_grad(q.x, torch.arange(len(q)), score=scores)
        return q.attribution(self, grads[0], parts={"other": grads[1]})


@pytest.mark.parametrize("size", [1, 2])
def test_one_forward_two_backwards(size: int):
    net = model()
    field = ap.Field(net, ap.Probability(), batch_size=size)
    a = AtOnePoint((1, 2))(field, X, target=0)
    assert (a.cost.forward.tolist(), a.cost.backward.tolist()) == ([1, 1], [2, 2])
    x = X.clone().requires_grad_()
    p = net(x).softmax(1)
    own = torch.autograd.grad(p[:, 0].sum(), x, retain_graph=True)[0]
    other = torch.autograd.grad(p[0, 1] + p[1, 2], x)[0]  # each example's own second class
    torch.testing.assert_close(a.values, own, atol=1e-15, rtol=0)
    torch.testing.assert_close(a.parts["other"], other, atol=1e-15, rtol=0)
    assert (a.values - other).abs().max() > 0.05  # a second score that fell back to the target would be noticed
    # the same as a separate question, which costs another forward
    alone = field.bind(X, target=[1, 2]).value_and_grad(X, torch.arange(2))[1]
    torch.testing.assert_close(a.parts["other"], alone, atol=1e-15, rtol=0)


def test_every_override_has_its_own_target():
    q, owner = ap.Field(model()).bind(X, target=0), torch.tensor([1, 0, 1])
    z = model()(X)[owner].detach()
    rows, each = X[owner], torch.arange(3)
    known: list[tuple[object, Tensor]] = [
        (ap.Logit(), z[:, 0]),
        (ap.Logit(2), z[:, 2]),
        (ap.Logit([1, 2]), z[each, torch.tensor([2, 1, 2])]),
        (ap.Contrast(other=2), z[:, 0] - z[:, 2]),
        (ap.LogProbability(1), z.log_softmax(1)[:, 1]),
        (ap.Loss(labels=[2, 1]), -z.log_softmax(1)[each, torch.tensor([1, 2, 1])]),
        (lambda out: out[:, 1] ** 2, z[:, 1] ** 2),
        (lambda out, target: out.gather(1, target)[:, 0] * 2, z[:, 0] * 2),
    ]
    for score, expected in known:
        torch.testing.assert_close(q.value(rows, owner, score=score), expected)
    derived = q.at(rows, owner, torch.arange(3))  # an override's target follows the user's example
    torch.testing.assert_close(derived.value(rows, each, score=ap.Logit([1, 2])), known[2][1])
    with pytest.raises(ap.ApportionError, match="target 3"):
        q.value(rows, owner, score=ap.Logit(3))


def test_the_sum_follows_the_drop_in_probability():
    field = ap.Field(model(), ap.Probability())
    a = AGI((1, 2))(field, X, target=0)
    assert a.claimed_total is not None
    drop = a.claimed_total
    assert drop.min() > 0.05
    assert ((a.values.sum(1) - drop).abs() < 0.15 * drop).all()  # one-sided sums with finite steps
    fine = AGI((1, 2), step=0.004, steps=300)(field, X, target=0)
    assert fine.claimed_total is not None
    assert ((fine.values.sum(1) - fine.claimed_total).abs() < 0.01 * drop).all()
    # restarting from x, as published, does not telescope
    wrong = AGI((1, 2), accumulate=False, steps=15)(field, X, target=0)
    assert wrong.claimed_total is not None
    assert ((wrong.values.sum(1) - wrong.claimed_total).abs() > wrong.claimed_total).all()
