"""Scores in closed form."""

import math
from collections import OrderedDict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apportion as ap
from apportion.core.errors import TargetError
from apportion.core.score import main_output, top_class

DOUBLE = torch.float64
Z = torch.tensor([[1.0, -2.0, 0.5], [3.0, 2.5, -1.0], [0.0, 0.0, 4.0]], dtype=DOUBLE)


def scored(score: Any, z: Tensor = Z, target: Any = None) -> list[float]:
    """Score outputs, by a model that gives back its input."""
    q = ap.Field(lambda x: x, score).bind(z, target=target)
    return q.value(q.x, torch.arange(len(z))).tolist()


def test_logit() -> None:
    assert scored(ap.Logit()) == [1, 3, 4]
    assert scored(ap.Logit(), target=1) == [-2, 2.5, 0]
    assert scored(ap.Logit(1)) == [-2, 2.5, 0]
    assert scored(ap.Logit(1), target=1) == [-2, 2.5, 0]
    assert scored(ap.Logit(), target=[2, 0, 1]) == [0.5, 3, 0]
    assert scored(ap.Logit(), target=(2,)) == [0.5, -1, 4]


@pytest.mark.parametrize(
    "target",
    [
        [2, 0, 1],
        torch.tensor([2, 0, 1]),
        torch.tensor([2, 0, 1], dtype=torch.uint8),
        torch.tensor([[2], [0], [1]]),
        np.array([2, 0, 1]),
        [np.int64(2), np.int64(0), np.int64(1)],
    ],
)
def test_spellings_of_a_target_per_example(target: Any) -> None:
    assert scored(ap.Logit(), target=target) == [0.5, 3, 0]
    assert scored(ap.Logit(), Z[:1], np.int64(2)) == [0.5]


def test_probabilities() -> None:
    p = Z.exp() / Z.exp().sum(1, keepdim=True)
    assert scored(ap.Probability()) == pytest.approx(p.amax(1).tolist(), abs=1e-15)
    assert scored(ap.Probability(1)) == pytest.approx(p[:, 1].tolist(), abs=1e-15)
    assert scored(ap.LogProbability(1)) == pytest.approx(p[:, 1].log().tolist(), abs=1e-14)
    sigmoid = 1 / (1 + (-Z).exp())
    assert scored(ap.Probability(1, multilabel=True)) == pytest.approx(sigmoid[:, 1].tolist(), abs=1e-15)
    assert scored(ap.LogProbability(1, multilabel=True)) == pytest.approx(sigmoid[:, 1].log().tolist(), abs=1e-14)
    assert scored(ap.LogOdds(1, multilabel=True)) == Z[:, 1].tolist()


@pytest.mark.parametrize("target", [None, 0, 2, [2, 0, 1]])
def test_log_odds_is_the_logit_of_the_probability(target: Any) -> None:
    p = torch.tensor(scored(ap.Probability(), target=target), dtype=DOUBLE)
    odds = torch.tensor(scored(ap.LogOdds(), target=target), dtype=DOUBLE)
    assert torch.allclose(odds, (p / (1 - p)).log(), rtol=0, atol=1e-12)


def test_log_odds_stays_finite_where_the_probability_rounds_to_one() -> None:
    z = torch.tensor([[800.0, 0.0, -5.0]], dtype=DOUBLE)
    assert scored(ap.LogOdds(), z) == pytest.approx([800 - math.log(1 + math.exp(-5))], abs=1e-12)
    q = ap.Field(lambda x: x, ap.LogOdds()).bind(z)
    _, grad = q.value_and_grad(z, torch.arange(1))
    assert torch.isfinite(grad).all()


def test_one_number_models() -> None:
    z = torch.tensor([-1.5, 0.0, 2.0], dtype=DOUBLE)
    sigmoid = (1 / (1 + (-z).exp())).tolist()
    for model in (lambda x: x[:, 0], lambda x: x):
        for score, want in [
            (ap.Logit(), z.tolist()),
            (ap.LogOdds(), z.tolist()),
            (ap.Probability(), sigmoid),
            (ap.LogProbability(), np.log(sigmoid).tolist()),
        ]:
            for target in (None, 0, [0, 0, 0]):
                q = ap.Field(model, score).bind(z[:, None], target=target)
                assert q.target is None
                assert q.fx.tolist() == pytest.approx(want, abs=1e-14)


def spatial() -> Tensor:
    return torch.randn(2, 3, 4, 5, dtype=DOUBLE)


@pytest.mark.parametrize("score", [ap.Logit(), ap.Probability(), ap.LogProbability(), ap.LogOdds()])
def test_targets_on_several_axes(score: ap.Score) -> None:
    """The class axis is the first after the rows; the others name a position."""
    z = spatial()
    for target, at in [((2, 3, 1), [(2, 3, 1)] * 2), (torch.tensor([[0, 1, 2], [1, 3, 4]]), [(0, 1, 2), (1, 3, 4)])]:
        flat = torch.stack([z[b, :, i, j] for b, (_, i, j) in enumerate(at)])
        want = scored(score, flat, [c for c, _, _ in at])
        assert scored(score, z, target) == pytest.approx(want, abs=1e-14)


def test_contrast() -> None:
    assert scored(ap.Contrast()) == [0.5, 0.5, 4]  # against the runner-up
    assert scored(ap.Contrast(), target=1) == [-3, -0.5, -4]  # against the highest other
    assert scored(ap.Contrast(other=1)) == [3, 0.5, 4]
    assert scored(ap.Contrast(0, 2)) == [0.5, 4, -4]
    assert scored(ap.Contrast(0, [1, 2, 1])) == [3, 4, 0]
    q = ap.Field(lambda x: x, ap.Contrast()).bind(Z)
    assert q.target.tolist() == [[0, 2], [0, 1], [2, 0]]
    both = q.target.roll(1, 0)  # what is known of one question can be asked in another
    assert ap.Field(lambda x: x, ap.Contrast()).bind(Z, target=both).target.tolist() == both.tolist()
    with pytest.raises(TargetError, match="one of them"):
        ap.Field(lambda x: x, ap.Contrast(other=1)).bind(Z, target=both)


def test_contrast_does_not_follow_the_copies() -> None:
    q = ap.Field(lambda x: x, ap.Contrast()).bind(Z)
    assert q.value(Z[[1, 1]], torch.tensor([0, 1])).tolist() == [3 - -1, 3 - 2.5]


def test_neuron() -> None:
    first, last = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()
    net = nn.Sequential(OrderedDict(a=first, b=nn.ReLU(), c=last))
    q = ap.Field(net, ap.Neuron(ap.At("a"), (2,))).bind(Z)
    assert torch.allclose(q.fx, first(Z)[:, 2], atol=1e-14)
    values, grad = q.value_and_grad(q.x, torch.arange(3))
    assert torch.allclose(grad, first.weight[2].expand(3, 3), atol=1e-14)
    assert torch.equal(values, q.fx)
    deep = ap.Field(net, ap.Neuron(ap.At("c"), (1,)), ap.At("b")).bind(Z)
    assert torch.allclose(deep.value_and_grad(deep.x, torch.arange(3))[1], last.weight[1].expand(3, 4), atol=1e-14)


def test_region() -> None:
    z = spatial()
    shared = torch.zeros(4, 5, dtype=torch.bool)
    shared[1:3, 2:] = True
    want = z[:, 1, 1:3, 2:].mean((1, 2)).tolist()
    assert scored(ap.Region(shared, 1), z) == pytest.approx(want, abs=1e-15)
    weights = torch.rand(2, 4, 5)
    w = weights.double()
    want = ((z[:, 2] * w).sum((1, 2)) / w.sum((1, 2))).tolist()
    assert scored(ap.Region(weights, 2), z) == pytest.approx(want, abs=1e-15)
    want = [((z[b, c] * w[b]).sum() / w[b].sum()).item() for b, c in enumerate((2, 0))]
    assert scored(ap.Region(weights), z, [2, 0]) == pytest.approx(want, abs=1e-15)
    means = (z * w[:, None]).sum((2, 3)) / w.sum((1, 2))[:, None]
    assert scored(ap.Region(weights), z) == pytest.approx(means.amax(1).tolist(), abs=1e-14)


def test_region_follows_the_owners_of_rows() -> None:
    z = spatial()
    mask = torch.zeros(2, 4, 5)
    mask[0, 0, 0] = mask[1, 3, 4] = 1
    q = ap.Field(lambda x: x, ap.Region(mask, 1)).bind(z)
    assert q.value(z[[0, 0]], torch.tensor([1, 0])).tolist() == [z[0, 1, 3, 4], z[0, 1, 0, 0]]


def test_sequence() -> None:
    z = torch.randn(2, 4, 6, dtype=DOUBLE)
    p = F.log_softmax(z, 2)
    assert scored(ap.Sequence(), z) == pytest.approx(p[:, -1].amax(1).tolist(), abs=1e-14)
    assert scored(ap.Sequence((0, -2)), z) == pytest.approx((p[:, 0].amax(1) + p[:, 2].amax(1)).tolist(), abs=1e-14)
    want = (p[:, 1, 5] + p[:, 3, 0]).tolist()
    assert scored(ap.Sequence((1, 3), (5, 0)), z) == pytest.approx(want, abs=1e-14)
    assert scored(ap.Sequence((1, 3)), z, [5, 0]) == pytest.approx(want, abs=1e-14)
    each = torch.tensor([[1, 2], [3, 4]])
    want = [(p[0, 1, 1] + p[0, 3, 2]).item(), (p[1, 1, 3] + p[1, 3, 4]).item()]
    assert scored(ap.Sequence((1, 3), each), z) == pytest.approx(want, abs=1e-14)


def test_loss() -> None:
    want = [-math.log(math.exp(z[c]) / sum(math.exp(v) for v in z)) for z, c in zip(Z.tolist(), (2, 0, 1), strict=True)]
    assert scored(ap.Loss(), target=[2, 0, 1]) == pytest.approx(want, abs=1e-14)
    assert scored(ap.Loss(labels=(2, 0, 1))) == pytest.approx(want, abs=1e-14)

    def squares(z: Tensor, y: Tensor) -> Tensor:
        return (z[:, 0] - y) ** 2

    assert scored(ap.Loss(squares), target=[1.5, 0.0, -1.0]) == [0.25, 9, 1]
    assert scored(ap.Loss(squares, labels=2.0)) == [1, 1, 4]


def test_any_callable() -> None:
    assert scored(lambda z: z[:, 0] * 2) == [2, 6, 0]
    assert scored(lambda z, t: z[:, 0] * t, target=[1.0, 2.0, 3.0]) == [1, 6, 0]
    assert scored(lambda z, t: z.gather(1, t[:, None])[:, 0], target=2) == [0.5, -1, 4]


@dataclass
class Answer:
    logits: Tensor
    hidden: tuple[Tensor, ...]


class Named(NamedTuple):
    logits: Tensor
    extra: Tensor


class Record(OrderedDict[str, Any]):
    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)


SHAPES: dict[str, Any] = {
    "dict": lambda x: {"logits": x, "hidden": x * 0},
    "dict of one": lambda x: {"out": x},
    "record": lambda x: Record(logits=x, hidden=(x, x)),
    "dataclass": lambda x: Answer(x, (x, x)),
    "namespace": lambda x: SimpleNamespace(logits=x),
    "named tuple": lambda x: Named(x, x * 0),
    "tuple of one": lambda x: (x,),
    "list": lambda x: [x, "text", None],
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("chunk", [1, 2, "auto"])
def test_containers_of_outputs(name: str, chunk: Any) -> None:
    """The same in one chunk and in several: no chunk is lost on the way to the target."""
    field = ap.Field(SHAPES[name], batch_size=chunk)
    a = ap.GradientTimesInput()(field, Z)
    assert a.target.flatten().tolist() == [0, 0, 2]
    assert a.value.tolist() == [1, 3, 4]
    assert a.values.tolist() == [[1, 0, 0], [3, 0, 0], [0, 0, 4]]
    assert a.references is not None
    assert a.references.top_class is not None


@pytest.mark.parametrize("name", ["record", "dataclass", "namespace", "named tuple"])
@pytest.mark.parametrize("chunk", [1, "auto"])
def test_scores_may_rely_on_the_type_of_outputs(name: str, chunk: Any) -> None:
    net = nn.Sequential(nn.Identity(), Wrapped(SHAPES[name]))
    field = ap.Field(net, lambda out: out.logits[:, 0], ap.At("0"), batch_size=chunk)
    assert ap.Gradient()(field, Z).value.tolist() == [1, 3, 0]
    q = field.bind(Z)
    assert q.outputs(q.x, torch.arange(3)).logits.tolist() == Z.tolist()


class Wrapped(nn.Module):
    def __init__(self, fn: Any) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Any:
        return self.fn(x)


def test_outputs_without_rows_beside_the_logits() -> None:
    """A table or a loss beside the logits is no sign that examples are mixed."""
    table = torch.randn(7, 2, dtype=DOUBLE)
    field = ap.Field(lambda x: {"logits": x, "table": table, "loss": x.mean()})
    assert ap.Gradient()(field, Z).value.tolist() == [1, 3, 4]
    assert ap.Gradient()(field, Z[:1]).value.tolist() == [1]


def test_main_output_and_top_class() -> None:
    assert main_output(Z) is Z
    assert main_output((Z,)) is Z
    assert top_class(Z) is not None
    assert top_class(Z[:, 0]) is None
    assert top_class(Z[:, :1]) is None
    assert top_class((Z, Z)) is None
