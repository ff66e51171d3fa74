"""Prediction differences: the numbers of the paper's correction, beside plain loops, no window twice."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import apportion as ap
from apportion import planted
from apportion.core.errors import ConfigError, NonFiniteError
from apportion.methods.removal.prediction_difference import slope, weight_of_evidence

DOUBLE = torch.float64


def test_laplace_correction() -> None:
    p = torch.tensor([0.9, 0.5], dtype=DOUBLE, requires_grad=True)
    with_it = weight_of_evidence(p, 100_000, 1000)
    assert round(float((with_it[0] - with_it[1]).detach()), 4) == 3.0611
    without = weight_of_evidence(p.detach(), None, 1000)
    assert round(float(without[0] - without[1]), 4) == 3.1699
    corrected = (p.detach() * 1e5 + 1) / (1e5 + 1000)
    assert [round(v, 6) for v in corrected.tolist()] == [0.891099, 0.495059]
    (found,) = torch.autograd.grad(with_it.sum(), p)
    assert torch.allclose(found, slope(p.detach(), 100_000, 1000))


def evidence(p: float, classes: int, examples: int = 100_000) -> float:
    p = (p * examples + 1) / (examples + classes)
    return math.log2(p / (1 - p))


def chance(net: Callable[[Tensor], Tensor], x: Tensor, c: int) -> float:
    return float(net(x[None]).softmax(1)[0, c].detach())


def test_table_beside_plain_loops() -> None:
    """Feature by feature, row by row: the mean of probabilities, not of evidence."""
    net, x = planted.dense_net(), torch.randn(2, 5, dtype=DOUBLE)
    rows = torch.randn(4, 5, dtype=DOUBLE)
    method = ap.PredictionDifference(fill=ap.fills.Marginal(rows))
    found = method(ap.Field(net, batch_size=3), x, target=2)
    for b in range(2):
        for i in range(5):
            each = []
            for row in rows:
                z = x[b].clone()
                z[i] = row[i]
                each.append(chance(net, z, 2))
            want = evidence(chance(net, x[b], 2), 3) - evidence(sum(each) / 4, 3)
            assert math.isclose(float(found.values[b, i]), want, rel_tol=1e-9, abs_tol=1e-12)
            of_evidence = evidence(chance(net, x[b], 2), 3) - sum(evidence(p, 3) for p in each) / 4
            assert not math.isclose(float(found.values[b, i]), of_evidence, rel_tol=1e-6)
    assert found.cost.forward.tolist() == [21, 21]
    assert method.unit == "bits"


def windows(length: int, size: int, stride: int) -> list[int]:
    starts = list(range(0, length - size + 1, stride))
    return starts if starts[-1] + size == length else [*starts, length - size]


@pytest.mark.parametrize("batch_size", [1, 4, 7, "auto"])
def test_windows_beside_plain_loops(batch_size) -> None:
    """Overlap is averaged, border windows are shifted, and no window counts twice, whatever is left for the last pass.

    The authors' code ran one window more in its last batch; doing so fails here.
    """
    net, c = planted.conv_net(), 1
    x = torch.rand(1, 2, 8, 7, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    rows = torch.rand(2, 2, 8, 7, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    method = ap.PredictionDifference(ap.groups.Patches(3, 2), ap.fills.Marginal(rows))
    found = method(ap.Field(net, batch_size=batch_size), x, target=c)
    places = [(i, j) for i in windows(8, 3, 2) for j in windows(7, 3, 2)]
    assert found.cost.forward.tolist() == [1 + 2 * len(places)]

    def slow(visited: list[tuple[int, int]]) -> Tensor:
        total, count = torch.zeros(8, 7, dtype=DOUBLE), torch.zeros(8, 7, dtype=DOUBLE)
        for i, j in visited:
            each = []
            for row in rows:
                z = x[0].clone()
                z[:, i : i + 3, j : j + 3] = row[:, i : i + 3, j : j + 3]
                each.append(chance(net, z, c))
            total[i : i + 3, j : j + 3] += evidence(chance(net, x[0], c), 3) - evidence(sum(each) / 2, 3)
            count[i : i + 3, j : j + 3] += 1
        return total / count

    assert torch.allclose(found.values.reshape(8, 7), slow(places), atol=1e-9)
    assert not torch.allclose(found.values.reshape(8, 7), slow([*places, places[0]]), atol=1e-9)


def test_draws_given_the_surround() -> None:
    """A picture that is one colour tells all of a covered window: nothing is lost where the draws put it back."""
    shade = torch.rand(60, 1, 1, 1, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    data = shade.expand(-1, 1, 8, 8).contiguous()
    field = ap.Field(lambda x: torch.stack([8 * x[:, 0, 3:5, 3:5].mean((1, 2)), torch.zeros(len(x)).double()], 1))
    near = ap.fills.ConditionalGaussian.fit(data, side=4, patches=500, samples=5)
    unsure = ap.fills.Marginal(data[:10])
    parts = ap.groups.Patches(2, 1)
    x = torch.full((1, 1, 8, 8), 0.9, dtype=DOUBLE)
    given = ap.PredictionDifference(parts, near)(field, x, target=0)
    alone = ap.PredictionDifference(parts, unsure)(field, x, target=0)
    assert float(given.values.abs().max()) < 0.1 * float(alone.values.abs().max())


def test_standard_errors_hold() -> None:
    """Over 2,000 sets of draws: bits differ from those of very many draws by what their errors say."""
    n, k = 2000, 20
    net, x = planted.dense_net(2), torch.tensor([[0.7, -0.4]], dtype=DOUBLE)

    class Normal(ap.fills.Fill):
        """Draws of N(0, 1)."""

        @property
        def draws(self) -> int:
            return k

        def __call__(self, q, mask, owner, draw):
            return q.stream("normal").normal(q.x.new_zeros(1, k, 2), owner, draw)

    found = ap.PredictionDifference(fill=Normal())(ap.Field(net), x.expand(n, -1).contiguous(), target=1, ids=range(n))
    z = torch.randn(400_000, generator=torch.Generator().manual_seed(3), dtype=DOUBLE)
    truth = []
    for i in range(2):
        rows = x.repeat(len(z), 1)
        rows[:, i] = z
        mean = float(net(rows).softmax(1)[:, 1].mean().detach())
        truth.append(evidence(chance(net, x[0], 1), 3) - evidence(mean, 3))
    error = found.parts["standard_error"]
    assert isinstance(error, Tensor)
    want = torch.tensor(truth, dtype=DOUBLE)
    told = error.square().mean(0).sqrt() / found.values.std(0)
    assert bool(((told - 1).abs() < 0.1).all())
    assert bool(((found.values.mean(0) - want).abs() < 0.1 * found.values.std(0)).all())  # curvature: of order 1/k


def test_mistakes_are_named() -> None:
    field, x = ap.Field(planted.dense_net()), torch.randn(1, 5, dtype=DOUBLE)
    with pytest.raises(ConfigError, match="without a fill"):
        ap.PredictionDifference()(field, x, target=0)
    with pytest.raises(ConfigError, match="probabilities are averaged"):
        ap.PredictionDifference(reduce="score_of_mean")
    with pytest.raises(ConfigError, match="at least 1, or None"):
        ap.PredictionDifference(examples=0)
    sure = ap.Field(lambda x: torch.stack([1e4 * x[:, 0], 0 * x[:, 0]], 1))
    black = ap.fills.Baselines()
    with pytest.raises(NonFiniteError):
        ap.PredictionDifference(fill=black, examples=None)(sure, x.abs(), target=0)
    assert bool(ap.PredictionDifference(fill=black)(sure, x.abs(), target=0).values.isfinite().all())
