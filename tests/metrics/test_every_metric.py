"""What holds of every registered metric, whatever it measures."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import apportion as ap
from apportion.core.config import from_config
from apportion.core.errors import InputError, NonFiniteError
from apportion.metrics import Judges, Metric, Scores


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(64, 5))
    return net.double().eval()


NET = network()
X = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
IDS = ["a", "b", "c"]


def every() -> Iterator[Metric]:
    for name in ap.metrics.names():
        yield from ap.metrics.metric(name).variants()


def judged(m: Metric, x: Tensor, rows: slice, given: Any = None, batch_size: int | None = None) -> Scores:
    field = ap.Field(NET, batch_size=batch_size or "auto")
    truth = m.example_truth(x)[rows] if m.card.truth else None
    usual = ap.GradientTimesInput() if m.card.judges is Judges.MAP else ap.Gradient()
    judged = usual if given is None else given
    return m(field, x[rows], judged, truth=truth, ids=IDS[rows])


METRICS = list(every())
NAMES = [f"{type(m).__name__}-{i}" for i, m in enumerate(METRICS)]


@pytest.mark.parametrize("m", METRICS, ids=NAMES)
def test_an_example_is_judged_alike_alone_and_in_a_batch_and_in_chunks(m: Metric) -> None:
    whole = judged(m, X, slice(None))
    alone = Scores.join([judged(m, X, slice(i, i + 1)) for i in range(3)])
    chunks = judged(m, X, slice(None), batch_size=2)
    torch.testing.assert_close(whole.values, alone.values, rtol=1e-9, atol=1e-9, equal_nan=True)
    torch.testing.assert_close(whole.values, chunks.values, rtol=1e-9, atol=1e-9, equal_nan=True)
    for name, curve in whole.curves.items():
        torch.testing.assert_close(curve.y, alone.curves[name].y, rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("m", METRICS, ids=NAMES)
def test_the_record_rebuilds_the_metric_and_its_cost_is_declared(m: Metric) -> None:
    found = judged(m, X, slice(None))
    assert from_config(found.metric, dict(found.tensors)) == m.settled()
    q = ap.Field(NET).bind(X, ids=IDS)
    told = m.passes_with(q, ap.Gradient().passes(q))
    spent = (int(found.cost.forward.max()), int(found.cost.backward.max()), int(found.cost.at_x.max()))
    limit = (told.forward + told.once, told.backward + told.once_backward, told.at_x)
    if told.exact:
        assert spent[:2] == limit[:2]
        assert spent[2] <= limit[2]  # free where choosing the target gave it
    else:
        assert all(a <= b for a, b in zip(spent, limit, strict=True)), (spent, limit)
    low, high = m.card.range
    known = found.values[~found.values.isnan()]
    assert low is None or bool((known >= low - 1e-9).all())
    assert high is None or bool((known <= high + 1e-9).all())


UNTRAINED = [
    m for m in METRICS if type(m).__name__ not in ("ROAR", "KAR", "LabelRandomization", "InDomainSingleDeletion")
]  # those train networks, which is no pass


@pytest.mark.parametrize("m", UNTRAINED, ids=lambda m: type(m).__name__)
def test_an_evaluation_tells_its_passes_beforehand(m: Metric) -> None:
    """Also those of a method of several steps and a baseline, which some metrics ask again."""
    x, methods = X[:2], {"it": ap.IntegratedGradients(quadrature=ap.quadrature.Gauss(2))}
    asked: dict[str, Any] = {"truth": m.example_truth(X)[:2] if m.card.truth else None, "ids": IDS[:2]}
    told = ap.evaluate(methods, ap.Field(NET), x, {"m": m}, dry_run=True, **asked)
    found = ap.evaluate(methods, ap.Field(NET), x, {"m": m}, quiet=True, **asked)
    own = m.passes(ap.Field(NET).bind(x, ids=IDS[:2]))
    s = found.scores["it"]["m"]
    costs = [found.costs["it"], s.cost, *(c.cost for c in s.controls.values())]
    alike = 0 if m.card.judges is Judges.EXPLAINER else own.once * len(s.controls)
    spent = (
        int(torch.stack([c.forward + c.at_x for c in costs]).sum(0).max()) - alike
    )  # which stands on every bill and is sent once
    back = int(torch.stack([c.backward for c in costs]).sum(0).max())
    if told.bound:
        assert told.bound == "at most"
        assert spent <= told.forward
        assert back <= told.backward
    else:
        assert (spent, back) == (told.forward, told.backward)
    assert bool(told.bound) <= (not own.exact)


@pytest.mark.parametrize("m", METRICS, ids=NAMES)
def test_the_model_is_left_alone_and_chance_goes_by_the_seed(m: Metric) -> None:
    before, state = copy.deepcopy(NET.state_dict()), torch.random.get_rng_state()
    one, two = judged(m, X, slice(None)), judged(m, X, slice(None))
    assert torch.equal(one.values.nan_to_num(7), two.values.nan_to_num(7))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in NET.state_dict().items())
    assert not any(mod._forward_hooks or mod._backward_hooks for mod in NET.modules())


@pytest.mark.parametrize("m", [m for m in METRICS if m.card.judges is Judges.MAP], ids=lambda m: type(m).__name__)
def test_maps_of_all_kinds(m: Metric) -> None:
    """Arrays, one channel, constant maps and maps of zeros have a stated outcome; NaN and wrong shapes are errors."""
    maps = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    as_array, as_tensor = judged(m, X, slice(None), maps.numpy()), judged(m, X, slice(None), maps)
    assert torch.equal(as_array.values.nan_to_num(7), as_tensor.values.nan_to_num(7))
    for some in (maps[:, :1], maps[:, 0], torch.zeros_like(maps), torch.ones_like(maps)):
        found = judged(m, X, slice(None), some)
        assert len(found) == 3
        missing = found.values.isnan()
        told = torch.stack([torch.zeros(3, dtype=torch.bool), *found.undefined.values()]).any(0)
        assert torch.equal(missing, told)
        assert not bool(found.values.isinf().any())
    with pytest.raises(NonFiniteError, match="NaN"):
        judged(m, X, slice(None), maps.masked_fill(maps > 0.9, torch.nan))
    with pytest.raises(InputError, match=r"shape|map"):
        judged(m, X, slice(None), maps[:, :, :4])


@pytest.mark.parametrize("score", [ap.Logit(2), ap.Contrast(2, 1), ap.LogOdds(2), ap.Contrast()], ids=str)
def test_scores_with_targets_of_their_own_are_judged(score: ap.Score) -> None:
    """An attribution and an explainer of such a field, by a metric that looks at maps and by one that asks again."""
    field, maps = ap.Field(NET, score), ap.metrics.Sparseness()
    a = ap.GradientTimesInput()(field, X)
    assert torch.equal(maps(field, X, a).values, maps(field, X, ap.GradientTimesInput()).values)
    for again in (ap.metrics.MaxSensitivity(samples=2), ap.metrics.ParameterRandomization()):
        assert len(again(field, X, a)) == 3
    if not isinstance(score, ap.Contrast):
        assert len(ap.metrics.RandomLogit()(field, X, a)) == 3
    alike = ap.metrics.ImplementationInvariance()(field, X, ap.Gradient())  # which explain the same two classes
    assert bool((alike.values < 1e-9).all())
    if isinstance(score, ap.Contrast | ap.LogOdds):
        found = ap.evaluate(ap.Gradient(), field, X, [ap.metrics.Linearity(), maps], quiet=True).scores["Gradient"]
        assert bool(found["Linearity"].values.isnan().all())  # which is for logits
        assert torch.equal(found["Sparseness"].values, maps(field, X, ap.Gradient()).values)
    if isinstance(score, ap.Logit):
        assert bool((ap.metrics.Linearity()(field, X, ap.Gradient()).values < 1e-9).all())
