"""Average drop, drop in deletion, increase in confidence, average gain: exact answers, loops, and what others do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import apportion as ap
from apportion.metrics import AverageDrop, AverageDropInDeletion, AverageGain, IncreaseInConfidence, Subject
from apportion.metrics.ablation.drops import Masking

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
ALL: tuple[type[Masking], ...] = (AverageDrop, AverageDropInDeletion, IncreaseInConfidence, AverageGain)


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3))
    return net.double().eval()


def pictures(n: int = 4) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.rand(n, 3, 6, 6, generator=g).double(), torch.randn(n, 3, 6, 6, generator=g).double()


def by_loop(net: nn.Module, x: Tensor, values: Tensor) -> dict[str, list[float]]:
    """Example by example, on the normalized tensor, as the papers define them."""
    out: dict[str, list[float]] = {m.__name__: [] for m in ALL}
    for one, v in zip(x, values, strict=True):
        z = (one - torch.tensor(MEAN, dtype=torch.float64)[:, None, None]) / torch.tensor(STD, dtype=torch.float64)[
            :, None, None
        ]
        cam = v.sum(0)
        mask = (cam - cam.min()) / (cam.max() - cam.min())
        probability = [float(net(i[None]).detach().softmax(1)[0, 0]) for i in (z, mask * z, (1 - mask) * z)]
        y, kept, rest = probability
        out["AverageDrop"].append(max(0.0, y - kept) / y)
        out["AverageDropInDeletion"].append(max(0.0, y - rest) / y)
        out["IncreaseInConfidence"].append(float(kept > y))
        out["AverageGain"].append(max(0.0, kept - y) / (1 - y))
    return out


@pytest.mark.parametrize("metric", ALL)
def test_a_loop_over_normalized_examples_gives_the_same(metric: type[Masking]) -> None:
    net, (x, values) = network(), pictures()
    field = ap.Field(net, normalize=ap.Normalize(MEAN, STD))
    found = metric()(field, x, values, target=0)
    wanted = by_loop(net, x, values)[metric.__name__]
    assert len({round(w, 6) for w in wanted}) > 1
    torch.testing.assert_close(found.values, torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_the_mask_meets_what_the_network_reads_and_black_is_another_metric() -> None:
    net, (x, values) = network(), pictures()
    field = ap.Field(net, normalize=ap.Normalize(MEAN, STD))
    usual, black = (
        AverageDrop()(field, x, values, target=0),
        AverageDrop(ap.baselines.Zero())(field, x, values, target=0),
    )
    assert not torch.allclose(usual.values, black.values)
    mean, std = (torch.tensor(t, dtype=torch.float64).reshape(1, 3, 1, 1) for t in (MEAN, STD))
    inside = AverageDrop(ap.baselines.Zero())(ap.Field(net), (x - mean) / std, values, target=0)
    torch.testing.assert_close(usual.values, inside.values)


def test_the_map_is_scaled_and_the_drop_divided() -> None:
    """Peers use maps as they are (bvsal), or drops that are not divided by the score at the example (pgc)."""
    net, (x, values) = network(), pictures()
    field = ap.Field(net)
    found = AverageDrop()(field, x, values, target=0)
    again = AverageDrop()(field, x, 7 * values - 3, target=0)
    torch.testing.assert_close(found.values, again.values)
    y, kept = found.parts["at_x"], found.parts["masked"]
    torch.testing.assert_close(found.values, (y - kept).clamp(min=0) / y)
    assert not torch.allclose(found.values, (y - kept).clamp(min=0))
    assert float(AverageDrop()(field, 0 * x + x[:1], values[:1].expand_as(values), target=0).values.std()) == 0


def test_a_map_that_looks_elsewhere_is_told_from_one_that_knows() -> None:
    """Only the left half of the picture counts."""
    x = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(1)).double() + 1
    field = ap.Field(lambda x: x[..., :2].flatten(1).sum(1), score=ap.Logit())
    right = torch.zeros_like(x)
    right[..., :2] = 1
    for metric, of_right, of_wrong in (
        (AverageDrop(score=ap.Logit()), 0, 1),
        (AverageDropInDeletion(score=ap.Logit()), 1, 0),
    ):
        assert metric(field, x, right).values.tolist() == [of_right] * 3
        assert metric(field, x, 1 - right).values.tolist() == [of_wrong] * 3
    found = AverageDrop(score=ap.Logit())(field, x, right)
    assert found.parts["kept"].tolist() == [0.5] * 3
    assert found.parts["all_ones"].tolist() == [0.0] * 3


def test_gains_and_rises_where_the_map_leaves_out_what_speaks_against() -> None:
    field, x = ap.Field(lambda x: x.sum(1)), torch.tensor([[2.0, -1.0], [2.0, 1.0]]).double()
    values = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    before, after = torch.tensor([1.0, 3.0]).double().sigmoid(), torch.tensor([2.0, 2.0]).double().sigmoid()
    assert IncreaseInConfidence()(field, x, values).values.tolist() == [1, 0]
    gain = AverageGain()(field, x, values).values
    torch.testing.assert_close(gain, ((after - before) / (1 - before)).clamp(min=0))
    drop = AverageDrop()(field, x, values).values
    torch.testing.assert_close(drop, ((before - after) / before).clamp(min=0))


def test_what_everything_and_nothing_would_score_is_told() -> None:
    net, (x, values) = network(), pictures()
    field = ap.Field(net)
    at_zero = net(torch.zeros_like(x)).softmax(1)[:, 0]
    y = net(x).softmax(1)[:, 0]
    found = AverageDropInDeletion()(field, x, values, target=0)
    torch.testing.assert_close(found.parts["all_ones"], ((y - at_zero) / y).clamp(min=0).detach())
    both, signed = (AverageDropInDeletion(signed=s)(field, x, values, target=1) for s in (False, True))
    torch.testing.assert_close(signed.values.clamp(min=0), both.values)
    assert bool((signed.values < 0).any())
    mask = (values.sum(1) - values.sum(1).amin((1, 2), True)) / (
        values.sum(1).amax((1, 2), True) - values.sum(1).amin((1, 2), True)
    )
    torch.testing.assert_close(found.parts["kept"], mask.mean((1, 2)))


def test_what_has_no_answer_says_why() -> None:
    field, x = ap.Field(lambda x: x.sum(1), score=ap.Logit()), torch.tensor([[1.0, 2.0], [-1.0, -2.0], [1.0, 2.0]])
    values = torch.tensor([[1.0, 0.0], [1.0, 0.0], [3.0, 3.0]])
    found = AverageDrop(score=ap.Logit())(field, x, values)
    assert found.values.isnan().tolist() == [False, True, True]
    assert [w.tolist() for why, w in found.undefined.items() if "constant" in why] == [[False, False, True]]
    assert [w.tolist() for why, w in found.undefined.items() if "not above 0" in why] == [[False, True, False]]
    gain = AverageGain(score=ap.Logit())(field, x, values)
    assert gain.values.isnan().tolist() == [True, False, True]
    assert IncreaseInConfidence(score=ap.Logit())(field, x, values).values.isnan().tolist() == [False, False, True]


def test_scores_are_averaged_over_baselines_and_shared_by_metrics_of_one_map() -> None:
    x, values = pictures(2)
    field = ap.Field(network())
    two = ap.baselines.Several((ap.baselines.Zero(), ap.baselines.Mean()))
    each = [AverageDrop(b)(field, x, values, target=0).parts["masked"] for b in two.bases]
    torch.testing.assert_close(AverageDrop(two)(field, x, values, target=0).parts["masked"], (each[0] + each[1]) / 2)
    q, subject = field.bind(x, target=0), Subject(values)
    assert AverageDrop().judge(q, subject).cost.forward.tolist() == [2, 2]
    assert IncreaseInConfidence().judge(q, subject).cost.forward.tolist() == [0, 0]
    assert AverageDropInDeletion().judge(q, subject).cost.forward.tolist() == [2, 2]
