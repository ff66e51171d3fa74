"""One call over methods, data and metrics: streaming, resuming, sharing, failing."""

from __future__ import annotations

import gc
import json
import os
import re
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import apportion as ap
from apportion.bulk import runner as runners
from apportion.bulk.examples import examples
from apportion.bulk.store import Store
from apportion.core.attribution import Attribution
from apportion.core.config import from_config
from apportion.core.errors import BaselineError, ConfigError, InputError, RegistryError, RuleError
from apportion.core.external import Unregistered
from apportion.core.question import Question
from apportion.metrics import Curve, Direction, Found, Judges, Metric, MetricCard, Scores, Subject
from apportion.metrics.ranking import order
from apportion.metrics.scores import told_once

PAPER = ap.Paper("Nobody", 2020, "For tests", "none")


@dataclass(frozen=True)
class Drop(Metric):
    """f(x) - f(x without its k largest): shares its passes under one key, draws ties, has a curve."""

    card = MetricCard("drop", PAPER, "for tests", Direction.HIGHER, cost="2")

    k: int = 2

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        values = subject.share("curve", lambda: self._curve(q, subject))
        return Found(values[:, self.k], {"drop": Curve(torch.arange(3.0), values, "k", "score")}, {"all": values})

    def _curve(self, q: Question, subject: Subject) -> Tensor:
        best = order(q, subject.map(q).flatten(1))
        rows = []
        for k in range(3):
            gone = q.x.clone().flatten(1).scatter(1, best[:, :k], 0.0)
            rows.append(q.fx - q.value(gone.reshape(q.x.shape), torch.arange(len(q))))
        return torch.stack(rows, 1)

    def passes(self, q: Question) -> ap.Passes:
        return ap.Passes(3, 0, 1)


@dataclass(frozen=True)
class Wobble(Metric):
    """How much the map changes on a noisy copy."""

    card = MetricCard("wobble", PAPER, "for tests", Direction.LOWER, Judges.EXPLAINER)

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        owner = torch.arange(len(q))
        near = q.x + 0.1 * q.stream("wobble").normal(q.x, owner, 0 * owner)
        there = subject.explainer.explain(q.at(near, owner, 0 * owner)).values
        return Found((there - subject.map(q)).flatten(1).norm(dim=1))


@dataclass(frozen=True)
class Inside(Metric):
    """The share of a map where the truth is."""

    card = MetricCard("inside", PAPER, "for tests", Direction.HIGHER, truth="masks [B, 1, H, W]")

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        size = subject.map(q).abs()
        none = truth.flatten(1).sum(1) == 0
        share = (size * truth).flatten(1).sum(1) / size.flatten(1).sum(1)
        return Found(share.masked_fill(none, torch.nan), undefined={"an empty mask": none})


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 3, 3), nn.Softplus(), nn.Flatten(), nn.Linear(48, 3)).double().eval()


NET = network()
FIELD = ap.Field(NET)
X = torch.rand(7, 1, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
IDS = list("abcdefg")
METHODS = {"gradient": "gradient", "ig": ap.IntegratedGradients(quadrature=ap.quadrature.Gauss(4))}
METRICS = {"drop": Drop(), "drop one": Drop(1), "wobble": Wobble(), "sparse": "sparseness"}


def run(data: Any = X, methods: Any = None, metrics: Any = None, **options: Any) -> ap.Evaluation:
    methods, metrics = METHODS if methods is None else methods, METRICS if metrics is None else metrics
    return ap.evaluate(methods, options.pop("field", FIELD), data, metrics, **{"quiet": True, **options})


def same(one: ap.Evaluation, other: ap.Evaluation, exact: bool = True) -> None:
    """All that was found is equal, to the last bit or but for rounding."""
    if exact:
        a, b = (json.loads(e.to_json()) for e in (one, other))
        assert {**a, "settings": 0} == {**b, "settings": 0}
    assert list(one.scores) == list(other.scores)
    for method, held in one.scores.items():
        for metric, s in held.items():
            t = other.scores[method][metric]
            for u, v in ((s, t), *((s.controls[c], t.controls[c]) for c in s.controls)):
                torch.testing.assert_close(u.values, v.values, rtol=1e-10, atol=1e-12, equal_nan=True)
                assert (u.ids, list(u.undefined), list(u.curves)) == (v.ids, list(v.undefined), list(v.curves))
                assert torch.equal(u.cost.forward, v.cost.forward)


def test_the_scores_are_those_of_the_metrics_alone() -> None:
    found = run(ids=IDS)
    for method, explainer in (("gradient", ap.Gradient()), ("ig", METHODS["ig"])):
        for metric in (Drop(), Drop(1), Wobble()):
            name = {Drop(): "drop", Drop(1): "drop one", Wobble(): "wobble"}[metric]
            alone = metric(FIELD, X, explainer, ids=IDS, controls=[ap.controls.Random()])
            got = found.scores[method][name]
            torch.testing.assert_close(got.values, alone.values, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(got.controls["Random"].values, alone.controls["Random"].values)
            assert (got.of, got.ids, got.metric, got.method) == (method, tuple(IDS), alone.metric, alone.method)


@pytest.mark.parametrize("size", [1, 4])
def test_neither_batches_nor_streaming_change_anything(size: int) -> None:
    whole = run(ids=IDS, target=[0, 1, 2, 0, 1, 2, 0])
    same(whole, run(ids=IDS, target=[0, 1, 2, 0, 1, 2, 0], batch=size), exact=False)
    rows = [slice(0, 4), slice(4, 7)]
    target = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    as_dicts = ({"x": X[r], "target": target[r], "ids": IDS[r]} for r in rows)
    same(whole, run(as_dicts, batch=size), exact=False)
    same(whole, run([(X[r], target[r]) for r in rows], ids=IDS, batch=size), exact=False)


def test_metrics_of_a_method_share_their_curve_and_methods_their_passes() -> None:
    found = run(ids=IDS)
    assert found.scores["ig"]["drop"].cost.forward.tolist() == [3] * 7
    assert found.scores["ig"]["drop one"].cost.forward.tolist() == [0] * 7  # the first one's
    assert found.costs["ig"].forward.tolist() == [5] * 7  # four nodes and the baseline
    seen: list[int] = []

    class Counting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            return NET(x)

    def rows(*methods: str) -> int:
        seen.clear()
        run(methods=list(methods), field=ap.Field(Counting()), metrics=["sparseness"], controls=(), target=0)
        return sum(seen)

    assert rows("gradient", "gradient_times_input") == rows("gradient_times_input")


@pytest.mark.parametrize(
    "metric",
    [
        ap.metrics.SensitivityN((0.2, 0.5), 6),
        ap.metrics.FaithfulnessCorrelation(samples=6),
        ap.metrics.Infidelity(ap.metrics.NoisyBaseline(samples=6)),
        ap.metrics.SingleDeletion(fill=ap.fills.Baselines(ap.baselines.Noise(0.5, count=2))),
    ],
    ids=lambda m: type(m).__name__,
)
def test_rows_that_no_map_changes_are_sent_once_for_all_maps(metric: ap.metrics.Metric) -> None:
    """The values, and what each is billed, are those of the metric alone."""
    seen: list[int] = []

    class Counting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            return NET(x)

    field, maps = (
        ap.Field(Counting()),
        [torch.randn(X.shape, generator=torch.Generator().manual_seed(i)) for i in (1, 2)],
    )
    asked: dict[str, Any] = {"ids": IDS, "target": 0}
    alone = [metric(field, X, m, **asked) for m in maps]

    def rows(given: ap.metrics.Metric, **beside: Any) -> tuple[int, ap.metrics.Scores]:
        seen.clear()
        found = given(field, X, maps[0], **asked, **beside)
        return sum(seen), found

    controls = [ap.External(lambda *_: maps[1], "other")]
    free = ap.metrics.Sparseness()
    once = rows(metric)[0] - rows(free)[0]
    many, beside = rows(metric, controls=controls)
    assert many - rows(free, controls=controls)[0] == once
    sent = []
    for one in (free, metric):
        seen.clear()
        both = run(methods={"one": maps[0], "two": maps[1]}, field=field, metrics=[one], controls=(), **asked)
        sent.append(sum(seen))
    assert sent[1] - sent[0] == int((alone[0].cost.forward + alone[0].cost.at_x).sum())  # f(x) is beside maps, too
    found = (beside, beside.controls["other"])
    for got in (found, tuple(held[both.metrics[0]] for held in both.scores.values())):
        for mine, own in zip(got, alone, strict=True):
            torch.testing.assert_close(mine.values, own.values, rtol=1e-10, atol=1e-12, equal_nan=True)
            assert torch.equal(mine.cost.forward, own.cost.forward)
            assert int(own.cost.forward.min()) > 0


# -- the folder -----------------------------------------------------------------------------------


class Killed(BaseException):
    """What no one catches."""


@pytest.mark.parametrize("after", [1, 5])
def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    whole = run(ids=IDS, batch=3)
    calls = 0
    put = Store.put

    def dying(self: Store, *given: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            raise Killed
        put(self, *given)

    with monkeypatch.context() as m:
        m.setattr(Store, "put", dying)
        with pytest.raises(Killed):
            run(ids=IDS, batch=3, out=tmp_path / "out")
    there = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(there) == after
    before = [p.read_bytes() for p in there]
    asked: list[int] = []
    judge = runners.Runner.judge
    monkeypatch.setattr(
        runners.Runner, "judge", lambda self, b, names, m: (asked.append(len(names)), judge(self, b, names, m))[1]
    )
    resumed = run(ids=IDS, batch=3, out=tmp_path / "out")
    assert sum(asked) == 9 - after
    assert [p.read_bytes() for p in there] == before
    same(whole, resumed)
    asked.clear()
    same(whole, run(ids=IDS, batch=3, out=tmp_path / "out"))
    assert sum(asked) == 0


def test_metrics_are_added_to_a_folder_and_nothing_is_judged_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call: dict[str, Any] = {"methods": ["gradient", "gradient_times_input"], "batch": 4, "out": tmp_path / "out"}
    run(metrics=[Drop()], **call)
    asked: list[tuple[str, ...]] = []
    judge = runners.Runner.judge
    monkeypatch.setattr(
        runners.Runner, "judge", lambda self, b, names, m: (asked.append(tuple(m)), judge(self, b, names, m))[1]
    )
    truth = torch.ones(len(X), 1, *X.shape[2:], dtype=torch.float64)
    both = run(metrics=[Drop(), Inside()], truth=truth, **call)
    assert set(asked) == {("Inside",)}
    same(both, run(methods=call["methods"], metrics=[Drop(), Inside()], truth=truth, batch=4))
    del asked[:]
    same(run(metrics=[Wobble(), Drop()], **call), run(methods=call["methods"], metrics=[Wobble(), Drop()], batch=4))
    assert ("Wobble",) in asked
    del asked[:]
    run(metrics=[Inside(), Wobble()], truth=truth, **call)
    assert not asked
    with pytest.raises(ConfigError, match="truth of batch 0 differ"):
        run(metrics=[Inside()], truth=truth / 2, **call)


def test_half_a_file_is_never_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dying(*_: Any) -> None:
        raise Killed

    run(X[:1], {"gradient": "gradient"}, out=tmp_path)
    with monkeypatch.context() as m:
        m.setattr(os, "replace", dying)
        with pytest.raises(Killed):
            run(X[:1], METHODS, out=tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"metrics": {**METRICS, "drop": Drop(1)}}, "metrics.drop.k was 2 and is 1"),
        ({"methods": {**METHODS, "ig": "integrated_gradients"}}, "methods.ig.quadrature"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"field": ap.Field(NET, ap.Probability())}, "field.score.type"),
        ({"data": X + 1e-9}, "x of batch 0 differ"),
        ({"ids": list("abcdefh")}, "ids of batch 2 differ"),
        ({"target": [0] * 7}, "target of batch 0 differ"),
        ({"batch": 2}, "of batch 0 differ"),
        ({"data": X[:6], "ids": IDS[:6]}, "more batches than the 2"),
    ],
)
def test_other_settings_or_data_are_an_error_that_says_what_differs(
    tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    usual: dict[str, Any] = {"ids": IDS, "batch": 3, "out": tmp_path, "controls": ()}
    run(**usual)
    names = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(ConfigError, match=told.replace(".", r"\.")):
        run(**{**usual, **change})
    assert sorted(p.name for p in tmp_path.iterdir()) == names


def test_other_weights_are_an_error_and_further_methods_are_not(tmp_path: Path) -> None:
    usual: dict[str, Any] = {"ids": IDS, "out": tmp_path}
    first = run(methods={"gradient": "gradient"}, **usual)
    other = network()
    with torch.no_grad():
        next(other.parameters()).mul_(1.0001)
    with pytest.raises(ConfigError, match=r"model\.weights"):
        run(methods={"gradient": "gradient"}, field=ap.Field(other), **usual)
    second = run(**usual)
    same(second, run(ids=IDS))
    same(first, run(methods={"gradient": "gradient"}, **usual))


# -- what is judged -------------------------------------------------------------------------------


def test_a_map_from_elsewhere_is_judged_as_the_attribution_it_came_from() -> None:
    target = [0, 1, 2, 0, 1, 2, 0]
    a = ap.explain(NET, X, ap.IntegratedGradients(), target=target)
    assert isinstance(a, Attribution)
    methods = {
        "attribution": a,
        "tensor": a.values,
        "array": a.values.numpy(),
        "external": ap.External(lambda x, t: ap.explain(NET, x, "integrated_gradients", target=t)),
        "ours": ap.IntegratedGradients(),
    }
    found = run(methods=methods, metrics={"drop": Drop(), "sparse": "sparseness"}, batch=3, ids=IDS)  # a's targets
    for metric in found.metrics:
        held = found.of(metric)
        for name in methods:
            torch.testing.assert_close(held[name].values, held["ours"].values, rtol=1e-9, atol=1e-12)
    assert found.scores["tensor"]["drop"].tensors == {}
    with pytest.raises(InputError, match="explains other targets"):
        run(methods=methods, metrics=["sparseness"], target=1)
    for bad in (a.values[:6], torch.cat([a.values, a.values[:1]])):
        with pytest.raises(InputError, match="map"):
            run(methods={"bad": bad}, metrics=["sparseness"], batch=3)


def test_maps_of_a_layer_are_enlarged_where_that_is_asked_for() -> None:
    """Several of one kind still go together, and the record rebuilds the method."""
    layer = ap.At("0")
    cams = {"cam": ap.GradCAM(layer), "plus": ap.GradCAMPlusPlus(layer), "gradient": ap.Gradient()}
    methods = {name: ap.Resized(cam) for name, cam in cams.items()}
    found = run(methods=methods, metrics=["sparseness", "deletion_auc"], ids=IDS, controls=())
    for name, method in cams.items():
        a = ap.explain(NET, X, method, ids=IDS)
        if name != "gradient":
            a = a.resize((6, 6))
        expected = ap.metrics.Sparseness()(FIELD, X, a, ids=IDS)
        torch.testing.assert_close(found.scores[name]["sparseness"].values, expected.values, equal_nan=True)
        assert from_config(found.scores[name]["sparseness"].method) == methods[name]
    bare = run(methods={"cam": ap.GradCAM(layer)}, metrics=["sparseness"], controls=())
    assert "the shape of the input" in bare.told_failures()[0]


def test_truths_go_with_their_examples() -> None:
    masks = (X > 0.7).double()
    masks[3] = 0
    metrics = {"inside": Inside(), "also": Inside()}
    found = run(metrics=metrics, truth=masks, batch=2, ids=IDS)
    expected = Inside()(FIELD, X, ap.Gradient(), truth=masks, ids=IDS)
    torch.testing.assert_close(found.scores["gradient"]["inside"].values, expected.values, equal_nan=True)
    assert found.failures[0][2:] == ("an empty mask", 1)
    other = run(metrics=metrics, truth={"inside": masks, "also": masks.flip(0)}, batch=2, ids=IDS)
    flipped = Inside()(FIELD, X, ap.Gradient(), truth=masks.flip(0), ids=IDS)
    torch.testing.assert_close(other.scores["gradient"]["also"].values, flipped.values, equal_nan=True)
    maps = ap.explain(NET, X, "gradient")
    agree = {"agree": ap.metrics.Agreement()}
    found = run(methods=["gradient"], metrics=agree, truth=maps, batch=2, controls=())
    assert found.scores["gradient"]["agree"].values.tolist() == [1.0] * 7
    with pytest.raises(ConfigError, match="no truth for also"):
        run(metrics=metrics, truth={"inside": masks})
    with pytest.raises(ConfigError, match="truth"):
        run(truth=masks)
    with pytest.raises(InputError, match="6 truth for 7"):
        run(metrics=metrics, truth=masks[:6])


# -- failures -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Fails(Unregistered):
    """Fails on examples whose first pixel is large."""

    error: type = ValueError

    def explain(self, q: Question) -> Attribution:
        if bool((q.x[:, 0, 0, 0] > 0.5).any()):
            raise self.error("too bright")
        return q.attribution(self, q.x.clone())


def test_one_failure_is_recorded_with_its_reason_and_the_rest_goes_on() -> None:
    bright = X[:, 0, 0, 0] > 0.5
    assert 0 < int(bright.sum()) < 7
    methods = {"fails": Fails(), "gradient": "gradient"}
    for size in (7, 2):
        found = run(methods=methods, metrics={"drop": Drop(), "sparse": "sparseness"}, ids=IDS, batch=size)
        held = found.scores["fails"]["drop"]
        assert torch.equal(held.values.isnan(), bright)
        assert torch.equal(held.undefined["ValueError: too bright"], bright)
        assert torch.equal(held.curves["drop"].y.isnan().all(1), bright)
        whole = run(methods={"gradient": "gradient"}, metrics={"drop": Drop()}, ids=IDS)
        got, expected = found.scores["gradient"]["drop"].values, whole.scores["gradient"]["drop"].values
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        assert any("fails by drop, sparse: undefined for" in note for note in found.notes())
    with pytest.raises(ValueError, match="too bright"):
        run(methods=methods, strict=True)
    everything = run(methods={"fails": Fails(RuleError)}, metrics={"sparse": "sparseness"}, batch=7)
    assert everything.scores["fails"]["sparse"].values.isnan().all()  # an error of the model is not tried again
    assert "undefined" in repr(everything)


def test_a_metric_that_cannot_judge_a_map_says_so() -> None:
    found = run(methods={"map": X.clone(), "gradient": "gradient"}, ids=IDS)
    assert found.scores["map"]["wobble"].values.isnan().all()
    assert found.scores["gradient"]["wobble"].values.isfinite().all()
    (why,) = found.scores["map"]["wobble"].undefined
    told = "a map of map; expected an explainer, since this metric asks it again; to fix: give the explainer, or "
    assert why == f"ConfigError: {told}ap.External(function) for another library's"


@pytest.mark.parametrize(
    ("given", "error", "told"),
    [
        ({"methods": ["gradien"]}, RegistryError, "gradien"),
        ({"methods": [ap.Gradient]}, ConfigError, "an instance"),
        ({"methods": [3]}, ConfigError, "int"),
        ({"methods": [ap.Gradient(), ap.Gradient()]}, ConfigError, "two methods called Gradient"),
        ({"metrics": ["sparsenes"]}, RegistryError, "sparseness"),
        ({"metrics": [Drop]}, ConfigError, "an instance"),
        ({"metrics": []}, ConfigError, "no metric"),
        ({"batch": 0}, ConfigError, "batch=0"),
        ({"out": 3}, ConfigError, "an int as out"),
        ({"data": []}, InputError, "without examples"),
        ({"data": ["a"]}, InputError, "a str as examples"),
        ({"data": 3}, InputError, "an int as data"),
        ({"target": [0, 1]}, InputError, "2 target"),
        ({"ids": ["a"]}, InputError, "1 ids"),
        ({"ids": list("abcdeaf")}, InputError, "the id 'a' for two examples"),
        ({"data": [{"x": X[:2], "ids": [0, 1]}, {"x": X[2:4], "ids": [0, 1]}]}, InputError, "the id 0 for two"),
        ({"data": [(X, X.sum((1, 2, 3)))]}, InputError, "torch.float64 of shape"),
        ({"data": [{"image": X, "label": [0] * 7}]}, InputError, "'label' among the inputs"),
        ({"metrics": ["roar"]}, ConfigError, r"ROAR\(train=...\)"),
        ({"data": [{"x": X, "target": 0}], "target": 1}, InputError, "target given beside"),
        ({"controls": {"gradient": ap.controls.Random()}}, ConfigError, "among methods and controls"),
    ],
)
def test_mistakes_are_told_before_anything_runs(given: dict[str, Any], error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        run(**given)


# -- the result -----------------------------------------------------------------------------------


def test_names_are_found_in_any_spelling_and_controls_by_theirs() -> None:
    found = run(X, ["SmoothGrad"], ["Sparseness", "effective-complexity"], controls=["random", "center-gaussian"])
    plain = run(X, [ap.SmoothGrad()], ["sparseness"], controls=(ap.controls.Random(), ap.controls.CenterGaussian()))
    assert (found.methods, found.controls) == (("SmoothGrad",), ("random", "center-gaussian"))
    torch.testing.assert_close(
        found.scores["SmoothGrad"]["Sparseness"].values, plain.scores["SmoothGrad"]["sparseness"].values
    )
    assert ap.metrics.metric("MoRF") is ap.metrics.metric("morf") is ap.metrics.MoRF
    with pytest.raises(RegistryError, match="'mo_rf'"):
        ap.metrics.metric("MoRFF")
    with pytest.raises(RegistryError, match="'random'"):
        run(controls=["rando"])


def test_stars_are_told_of_where_there_are_some_and_digits_tell_methods_apart() -> None:
    assert "beats" not in repr(run(X, ["gradient"], [Wobble()], controls=()))
    maps = {n: X * v for n, v in (("a", 1.0), ("b", 2.0), ("c", -1.0))}  # whose sparseness is one
    assert "; none beats same beyond chance" in repr(run(X, maps, ["sparseness"], controls={"same": X}))
    found = repr(run(X, {"a": X, "b": X.exp()}, ["sparseness"], controls={"ones": torch.ones_like(X)}))
    assert "* beats ones beyond chance" in found
    near = repr(run(X, {"a": X, "b": X + 1e-4, "c": X + 2e-4}, ["sparseness"], controls=()))
    values = [line.split()[1] for line in near.splitlines()[1:4]]
    assert len(set(values)) == 3
    assert max(map(len, values)) > len("0.123")
    with pytest.raises(InputError, match="a alone to rank"):
        run(X, {"a": X}, ["sparseness"]).ranks("sparseness")


def test_the_sigmoid_of_a_regression_is_told_of() -> None:
    field = ap.Field(lambda x: x.flatten(1).sum(1))
    told = ap.metrics.DeletionAUC()(field, X, ap.Gradient()).warnings
    assert any("sigmoid of the model's one number" in w for w in told)
    told = ap.metrics.DeletionAUC(score=ap.Logit())(field, X, ap.Gradient()).warnings
    assert not any("sigmoid" in w for w in told)


@pytest.mark.filterwarnings("error")
def test_maps_in_a_file_are_read_from_there_and_called_by_their_name(tmp_path: Path) -> None:
    np.save(tmp_path / "maps.npy", X.numpy())
    held = np.load(tmp_path / "maps.npy", mmap_mode="r")
    same(run(X, {"mine": held}, ["sparseness"]), run(X, {"mine": X}, ["sparseness"]))
    with pytest.raises(InputError, match=r"7 map\(s\) of mine"):
        run(X[:5], {"mine": X}, ["sparseness"])
    with pytest.raises(ConfigError, match=r"mine: values of torch.int64"):
        run(X, {"mine": X.long()}, ["sparseness"])


def test_settings_resolved_as_it_ran_are_kept_and_scores_of_others_are_not_compared() -> None:
    x, m, ids = X.repeat(1, 3, 1, 1), torch.rand_like(X).repeat(1, 3, 1, 1), IDS
    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(32, 3)).double().eval()
    plain = ap.metrics.DeletionAUC()(ap.Field(net), x, m, ids=ids, target=0)
    assert plain.resolved["step"] == 6
    assert (plain.resolved["groups"]["type"], plain.resolved["normalize"]) == ("Pixels", None)
    grey = ap.Normalize((0.5,) * 3, (0.25,) * 3)
    normal = ap.metrics.DeletionAUC()(ap.Field(net, normalize=grey), x, m, ids=ids, target=0)
    assert plain.metric == normal.metric
    with pytest.raises(InputError, match=r"with normalize .* beside .*with normalize null"):
        plain.against(normal)
    with pytest.raises(InputError, match="normalize"):
        ap.metrics.rank_methods({"plain": plain, "normal": normal})
    with pytest.raises(InputError, match="normalize"):
        Scores.join([plain, normal])
    logit = ap.metrics.DeletionAUC()(ap.Field(net, ap.Probability()), x, m, ids=ids, target=0)
    with pytest.raises(InputError, match=r"with score .*Probability.* beside .*Logit"):
        plain.against(logit)
    small = ap.metrics.Sparseness()(FIELD, X, X, ids=ids)
    elements = ap.metrics.DeletionAUC()(ap.Field(lambda x: x.sum(1)), X.flatten(1), X.flatten(1))
    assert (small.resolved["groups"]["type"], elements.resolved["groups"]["type"]) == ("Pixels", "Elements")
    assert Scores.join([plain, replace(plain, resolved=plain.resolved | {"step": 8})]).resolved["step"] == [6, 8]


def test_what_differs_tells_methods_of_one_class_apart() -> None:
    found = run(X[:2], [ap.SmoothGrad(samples=2), ap.SmoothGrad(samples=3), "gradient"], [Drop(1), Drop(2)])
    assert found.methods == ("SmoothGrad(samples=2)", "SmoothGrad(samples=3)", "gradient")
    assert found.metrics == ("Drop(k=1)", "Drop(k=2)")


def test_the_table_has_a_record_for_each_example_method_and_metric() -> None:
    found = run(ids=IDS, target=2)
    rows = found.records()
    assert len(rows) == 7 * 4 * 3  # the control beside
    assert [r["id"] for r in rows[:7]] == IDS
    (row,) = [r for r in rows if (r["id"], r["method"], r["metric"]) == ("c", "ig", "drop")]
    assert row["value"] == float(found.scores["ig"]["drop"].values[2])
    assert (row["target"], row["control"], row["undefined"]) == (2, False, "")
    assert {r["method"] for r in rows if r["control"]} == {"Random"}
    assert found.columns["value"].dtype.kind == "f"
    assert found.columns["target"].dtype.kind == "i"


def test_the_result_is_read_back_as_it_was(tmp_path: Path) -> None:
    ids = [("a", 1), 2, 2.5, b"x", "e", True, "g"]
    found = run(ids=ids, methods={**METHODS, "fails": Fails()})
    found.to_json(tmp_path / "found.json")
    again = ap.Evaluation.load(tmp_path / "found.json")
    assert again.to_json() == found.to_json()
    assert again.ids == tuple(ids)
    assert repr(again) == repr(found)
    assert again.scores["ig"]["drop"].beats("Random") == found.scores["ig"]["drop"].beats("Random")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"bad\.json"):
        ap.Evaluation.load(tmp_path / "bad.json")


def test_the_summary_says_what_beats_the_controls() -> None:
    found = run(ids=IDS, metrics={"drop": Drop()})
    rows = {r["method"]: r for r in found.summary()}
    assert set(rows) == {"gradient", "ig", "Random"}
    s = found.scores["ig"]["drop"]
    assert rows["ig"]["beats"] == {"Random": s.beats("Random")}
    assert rows["ig"]["value"] == s.summary().mean
    assert (rows["ig"]["low"], rows["ig"]["high"]) == s.summary().interval
    text = repr(found)
    assert "drop ↑" in text
    assert "<table>" in found._repr_html_()


@pytest.mark.parametrize("package", ["pandas", "polars", "pyarrow"])
def test_tables_of_other_packages(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(X[:3], metrics={"drop": Drop()})
    make = {"pandas": found.pandas, "polars": found.polars, "pyarrow": found.arrow}[package]
    with monkeypatch.context() as m:
        m.setitem(__import__("sys").modules, package, None)
        with pytest.raises(ConfigError, match=rf"{package} is not installed[\s\S]*apportion\[evaluation\]"):
            make()
    pytest.importorskip(package)
    table: Any = make()
    names = table.column_names if package == "pyarrow" else list(table.columns)
    assert names == list(found.columns)
    assert len(table) == 9
    column = table["value"]
    assert [float(v) for v in (column.to_pylist() if package == "pyarrow" else column)] == found.columns[
        "value"
    ].tolist()


def test_the_passes_are_told_beforehand(capsys: pytest.CaptureFixture[str]) -> None:
    estimate = run(dry_run=True, metrics={"drop": Drop()}, methods={"ig": METHODS["ig"]}, ids=IDS)
    assert isinstance(estimate, ap.Estimate)
    found = run(metrics={"drop": Drop()}, methods={"ig": METHODS["ig"]}, ids=IDS, quiet=False)
    s = found.scores["ig"]["drop"]
    spent = found.costs["ig"].forward[0] + s.cost.forward[0] + s.controls["Random"].cost.forward[0]
    assert estimate.forward == int(spent) + int(found.costs["ig"].at_x[0])
    assert estimate.backward == int(found.costs["ig"].backward[0])
    assert f"{7 * estimate.forward} + {7 * estimate.backward} for 7 example(s)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "metric", ["aopc", ap.metrics.InsertionDeletion(ap.metrics.InsertionAUC(fill=ap.metrics.AOPC().fill))]
)
def test_noise_between_bounds_that_no_one_declared_is_an_error_before_anything_runs(metric: Any) -> None:
    def never(x: Tensor) -> Tensor:
        raise AssertionError

    name = metric if isinstance(metric, str) else "InsertionDeletion"
    with pytest.raises(BaselineError, match=rf"{name}: UniformNoise[\s\S]*bounds=\(0, 1\)[\s\S]*another fill"):
        ap.evaluate(["gradient"], ap.Field(never), X, [metric])
    known = run(X[:2], ["gradient"], [metric], field=ap.Field(NET, bounds=(0, 1)))
    assert not bool(known.scores["gradient"][name].values.isnan().any())


def test_warnings_do_not_depend_on_batches() -> None:
    """Nor do they come once for each batch."""
    flat = X.clone()
    flat[1:, :, :4] = 0

    def warned(batch: int) -> tuple[str, ...]:
        found = run(flat, ["gradient_times_input"], [ap.metrics.DeletionAUC()], batch=batch)
        return found.scores["gradient_times_input"]["DeletionAUC"].warnings

    assert warned(1) == warned(3) == warned(7)
    assert len(warned(7)) == 1


def test_numbers_of_one_batch_are_not_told_of_all() -> None:
    """Whether batches give other numbers, or some give none; what all give alike stands, as does what has none."""
    told = told_once([["2 of 3 fail", "below 5"], ["1 of 4 fail", "other", "below 5"], ["2 of 3 fail", "below 5"]])
    assert told == ("2 of 3 fail (numbers of one batch)", "below 5", "other")
    assert told_once([told, ["7 of 8 fail", "below 5"]]) == told
    assert told_once([["2 of 3 fail"], []]) == ("2 of 3 fail (numbers of one batch)",)
    assert told_once([told]) == told


def test_categories_count_alike_in_the_table() -> None:
    """Five examples of one class and seven of another: the mean of class means, its interval and verdicts by it."""
    x = X[:1].repeat(12, 1, 1, 1) * torch.linspace(0.5, 1, 12)[:, None, None, None]
    found = run(x, ["gradient"], ["sparseness"], batch=12)
    (own,) = [s for held in found.scores.values() for s in held.values()]
    values = torch.tensor([1.0] * 5 + [0.0] * 7)
    control = replace(own.controls["Random"], values=torch.full((12,), 0.45))
    own = replace(own, values=values, controls={"Random": control})
    found = replace(found, scores={"gradient": {"sparseness": own}})
    plain, by = (found.summary(categories=c)[0] for c in ((), ["a"] * 5 + ["b"] * 7))
    assert plain["value"] == pytest.approx(5 / 12)
    assert (plain["low"] < 0.3, plain["beats"]) == (True, {"Random": False})
    assert (by["low"], by["value"], by["high"], by["beats"]) == (0.5, 0.5, 0.5, {"Random": True})
    with pytest.raises(InputError, match="2 categories for 12"):
        found.summary(categories=["a", "b"])


def test_progress_counts_examples_times_methods() -> None:
    for data in (X, (X[i : i + 3] for i in (0, 3, 6))):
        seen: list[tuple[int, int]] = []

        def note(what: str, done: int, total: int, seen: list[tuple[int, int]] = seen) -> None:
            seen.append((done, total))

        with ap.progress(note):
            run(data, metrics={"drop": Drop()}, batch=3)
        assert seen[-1] == (21, 21)
        assert [d for d, _ in seen] == sorted(d for d, _ in seen)


def test_nothing_of_a_batch_is_kept_but_its_scores() -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def stream() -> Iterator[Tensor]:
        nonlocal most
        for i in range(4):
            gc.collect(1)
            most = max(most, sum(r() is not None for r in alive))
            x = X + i
            alive.append(weakref.ref(x))
            yield x
            del x

    kept: list[weakref.ref[Tensor]] = []

    def external(x: Tensor, target: Tensor) -> Tensor:
        made = x.clone()
        kept.append(weakref.ref(made))
        return made

    found = run(stream(), methods={"external": ap.External(external), "gradient": "gradient"}, controls=())
    gc.collect(1)
    assert most <= 2
    assert sum(r() is not None for r in kept) == 0
    assert len(found) == 28
    assert isinstance(found.scores["gradient"]["drop"], Scores)


@dataclass(frozen=True, eq=False)
class Counted(Unregistered):
    """Gives x, and counts the examples it was asked about."""

    seen: list[int]

    def explain(self, q: Question) -> Attribution:
        self.seen.append(len(q))
        return q.attribution(self, q.x.clone())


@dataclass(frozen=True)
class OnTables(Metric):
    """Takes no pictures."""

    card = MetricCard("on tables", PAPER, "for tests", Direction.HIGHER)

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        raise InputError(f"examples {tuple(q.x.shape)}", "tables", "leave it out")


def test_what_no_example_can_meet_is_found_out_once_and_maps_are_not_made_again() -> None:
    seen: list[int] = []
    rows: list[int] = []

    def model(x: Tensor) -> Tensor:
        rows.append(len(x))
        return NET(x)

    metrics = {"on tables": OnTables(), "wobble": Wobble()}
    found = run(methods={"counted": Counted(seen)}, metrics=metrics, field=ap.Field(model), ids=IDS, controls=())
    (why,) = found.scores["counted"]["on tables"].undefined
    assert why == "InputError: examples (1, 1, 6, 6); expected tables; to fix: leave it out"
    assert seen == [7, 7]  # the second for wobble
    assert sum(rows) <= 3 * 7  # without bisection


def test_reasons_name_the_examples_by_their_ids_and_what_to_do() -> None:
    maps = X.clone()
    maps[3, 0, 2, 2] = torch.nan
    found = run(methods={"mine": maps}, metrics=["sparseness"], ids=IDS, controls=())
    (line,) = found.told_failures()
    assert "undefined for 1 of 7 example(s) ('d'): NonFiniteError: the attribution is NaN or infinite" in line
    assert "example 0" not in line
    assert "to fix: check the example" in line
    cam = run(methods={"cam": ap.GradCAM(ap.At("0"))}, metrics=["sparseness"], batch=4)
    (line,) = cam.told_failures()
    assert "maps of shape (4, 4)" in line
    assert "ap.Resized(method) does" in line


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"methods": {"mine": torch.rand(7, 6, 6, 1)}}, r"maps of shape \(6, 6, 1\) from 'mine'"),
        ({"methods": {"mine": torch.rand(7, 36)}}, "Resized"),
        ({"metrics": ["pointing_game"], "truth": torch.ones(7, 4, 4, dtype=torch.bool)}, r"pointing_game: a truth of"),
        ({"metrics": ["pointing_game"], "truth": [(0, 0, 3, 3)] * 7}, "truth of pointing_game"),
        ({"metrics": ["pointing_game"], "truth": {"pointing_game": None}}, "no truth"),
        ({"metrics": ["grid_pointing_game"], "truth": [7] * 7}, "from 0 to 3"),
        ({"metrics": ["agreement"], "truth": torch.rand(7, 3, 3)}, "truth of agreement"),
    ],
)
def test_wrong_truths_and_given_maps_are_errors_before_any_method_is_asked(given: dict[str, Any], told: str) -> None:
    seen: list[int] = []
    methods = {"counted": Counted(seen), **given.pop("methods", {})}
    with pytest.raises((InputError, ConfigError), match=told):
        run(methods=methods, **{"metrics": ["sparseness"], **given})
    assert not seen


def test_labels_beside_tokens_are_labels() -> None:
    tokens, labels = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([1, 0])
    (one,) = examples([(tokens, labels)], 8)
    assert torch.equal(one.x, tokens)
    assert torch.equal(one.target, labels)


def test_nothing_is_told_of_chance_below_six_examples() -> None:
    metrics, controls = {"sparse": "sparseness"}, [ap.controls.Random()]
    best = torch.zeros(6, 1, 6, 6, dtype=torch.float64)
    best[:, 0, 2, 3] = 1 + torch.arange(6)
    few, enough = (run(X[:n], {"best": best[:n]}, metrics, controls=controls, target=0) for n in (5, 6))
    assert enough.scores["best"]["sparse"].beats("Random")
    assert "]*" in repr(enough)
    assert few.scores["best"]["sparse"].beats("Random") is None
    assert "]*" not in repr(few)
    assert "fewer than 6" in repr(few)
    assert any("fewer than 6" in note for note in few.notes())


@pytest.mark.parametrize(("error", "again"), [(OSError, True), (InputError, False)])
def test_errors_that_may_pass_are_not_kept_as_results(tmp_path: Path, error: type[Exception], again: bool) -> None:
    broken = [True]

    def made(x: Tensor, target: Any) -> Tensor:
        if broken[0]:
            raise error("gone for a moment")
        return x

    settings: dict[str, Any] = {"methods": {"it": ap.External(made)}, "metrics": ["sparseness"], "out": tmp_path}
    assert run(**settings).scores["it"]["sparseness"].values.isnan().all()
    with pytest.raises(error, match="gone"):
        run(**settings, strict=True)
    broken[0] = False
    assert run(**settings).scores["it"]["sparseness"].values.isfinite().all() == again


def test_maps_of_other_examples_or_in_another_order_are_an_error() -> None:
    a = ap.explain(NET, X, "gradient", target=0)
    usual: dict[str, Any] = {"methods": {"a": a}, "metrics": ["sparseness"], "target": 0, "ids": IDS}
    assert run(**usual, batch=3).scores["a"]["sparseness"].values.isfinite().all()
    with pytest.raises(InputError, match=r"maps of a made where f\(x\) is .* for example 'a', .*, as for map 6"):
        run(X.flip(0), **usual, batch=3)
    with pytest.raises(InputError, match="maps of the same examples"):
        run(X.roll(1, 0), **usual)
    with pytest.raises(InputError, match="maps of the same examples"):
        run(1 - X, **usual)
    other = ap.Field(NET, score=ap.Probability())
    assert run(**usual, field=other).scores["a"]["sparseness"].values.isfinite().all()


def test_a_loader_that_shuffles_takes_nothing_by_position() -> None:
    pairs = torch.utils.data.TensorDataset(X, torch.zeros(7, dtype=torch.long))
    loader = torch.utils.data.DataLoader(pairs, batch_size=3, shuffle=True)
    assert len(run(loader, metrics=["sparseness"])) == 7
    for given, told in (({"methods": {"mine": X.clone()}}, "mine"), ({"ids": IDS}, "ids")):
        with pytest.raises(InputError, match=f"{told} of all examples beside a DataLoader that shuffles"):
            run(loader, **{"metrics": ["sparseness"], **given})


def test_values_on_groups_of_unequal_size_keep_their_sums() -> None:
    """Shapley values of segments are complete, and right of subsets of segments, of pixels, and by themselves."""
    label = torch.tensor([0, 0, 0, 0, 0, 1, 2, 2])
    weight = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 4.0, -3.0, -3.0], dtype=torch.float64)
    field, x, groups = ap.Field(lambda x: x @ weight), torch.ones(2, 8, dtype=torch.float64), ap.groups.Labels(label)
    shapley = ap.Shapley(groups)
    assert bool((ap.metrics.Completeness()(field, x, shapley).values < 1e-12).all())
    assert bool((ap.metrics.LocalAccuracy()(field, x, shapley).values < 1e-12).all())
    subsets = ap.metrics.SensitivityN((0.5,), 20, groups=groups)
    torch.testing.assert_close(subsets(field, x, shapley).values, torch.ones(2, dtype=torch.float64))
    noise = ap.metrics.Infidelity(ap.metrics.NoisyBaseline(samples=20, sigma=0.0))
    assert bool((noise(field, x, shapley).values < 1e-12).all())
    first = ap.metrics.Agreement(k=1, groups=groups)  # 5, 4 and -6: by sums, not by elements times values
    assert bool((first(field, x, shapley, truth=torch.tensor([[0.0] * 6 + [1.0, 1.0]] * 2)).values == 1).all())


class Scaled(nn.Module):
    def forward(self, x: Tensor, by: Tensor) -> Tensor:
        return torch.stack([(x * by).sum(1), x.sum(1)], 1)


def test_what_each_example_has_of_its_own_is_not_what_the_next_batch_has() -> None:
    x, rows = torch.rand(8, 6), torch.rand(4, 6)
    one, plain = ap.Field(Scaled(), extra={"by": torch.ones(4, 6)}), ap.Field(nn.Linear(6, 3))
    own = ap.IntegratedGradients(ap.baselines.Given(rows))
    labels = ap.Occlusion(groups=ap.groups.Labels(torch.randint(0, 3, (4, 6))))
    wrong: list[tuple[ap.Field, Any, str]] = [
        (one, ap.Gradient(), "4 row.s. in the field"),
        (plain, own, "Given of m with a row for each"),
        (plain, ap.SmoothGrad(own, samples=2), "Given of m with a row for each"),
        (plain, labels, "Labels of m with a row for each"),
        (plain, replace(labels, groups=ap.groups.Labels(torch.zeros(8, 6).long())), "Labels of m with a row for each"),
    ]
    for field, method, told in wrong:
        for data in (x, [x[:4], x[4:]]):
            with pytest.raises(InputError, match=told):
                ap.evaluate({"m": method}, field, data, ["sparseness"], batch=4, quiet=True)
    for field, method, _ in wrong[:4]:
        assert len(ap.evaluate({"m": method}, field, x[:4], ["sparseness"], batch=4, quiet=True)) == 4
    other = ap.Occlusion(groups=ap.groups.Labels(torch.zeros(1, 5).long()))  # which fits no example here
    assert ap.evaluate({"m": other}, plain, x, ["sparseness"], batch=4, quiet=True).failures
    alike = ap.Field(Scaled(), extra={"by": ap.Shared(torch.ones(6))})
    base = ap.IntegratedGradients(ap.baselines.Given(rows[:1]))
    assert len(ap.evaluate({"m": base}, alike, x, ["sparseness"], batch=4, quiet=True)) == 8


def test_mistakes_in_the_call_are_told_as_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    field, x = ap.Field(nn.Linear(6, 3)), torch.rand(4, 6)
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        (x, {"ids": 3}, "ids=3"),
        (x, {"ids": "abcd"}, "ids='abcd'"),
        (x.numpy(), {}, "write torch.from_numpy"),
        ([(x, torch.zeros(4, 1, dtype=torch.long))], {}, "give batches as (x, y.flatten())"),
        ([{"x": x, "y": torch.zeros(4, dtype=torch.long)}], {}, "a dict of 'x', 'y', with 'y' among the inputs"),
    ]
    for data, more, told in wrong:
        with pytest.raises((InputError, TypeError), match=re.escape(told)):  # tests also check annotations
            ap.evaluate(["gradient"], field, data, ["sparseness"], quiet=True, **more)
    monkeypatch.setitem(sys.modules, "ot", None)
    masks = torch.ones(2, 8, 8, dtype=torch.bool)
    pictures = ap.Field(lambda x: x.flatten(1)[:, :3])
    with pytest.raises(ConfigError, match=r"^POT is not installed"):
        ap.evaluate(["gradient"], pictures, torch.rand(2, 3, 8, 8), ["earth_mover_similarity"], truth=masks, quiet=True)


def test_undefined_controls_are_told_once_and_groups_are_a_mapping() -> None:
    found = ap.evaluate(
        ["gradient", "gradient_times_input"],
        ap.Field(nn.Linear(4, 2)),
        torch.rand(7, 4),
        ["sparseness"],
        controls=[ap.controls.Laplace(), ap.controls.Random()],
        quiet=True,
    )
    (name, metric, _, count), *others = found.failures
    assert (name, metric, count, others) == ("Laplace", "sparseness", 7, [])
    assert found.notes()[0].startswith("Laplace by sparseness: undefined for 7 of 7")
    wrong: Any = "faithfulness"
    with pytest.raises((ConfigError, TypeError), match=r"faithfulness|as groups"):
        found.compare(wrong)


def test_bounds_and_what_ran_inside_a_metric_are_in_the_record() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 3)).eval()
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    a, b = (ap.metrics.AOPC()(ap.Field(net, bounds=(low, high)), x, ap.Gradient()) for low, high in ((0, 1), (-5, 5)))
    with pytest.raises(InputError, match=r"bounds \[-5, 5\]"):
        a.against(b)
    own = ap.metrics.InsertionDeletion()(ap.Field(net), x, ap.Gradient())
    both = own.resolved
    coarser = replace(own, resolved=both | {"insertion step": 98, "deletion step": 99})
    assert [Scores.join([own, coarser]).resolved[f"{k} step"][1] for k in ("insertion", "deletion")] == [98, 99]
    assert both["deletion groups"]["type"] == both["insertion groups"]["type"] == "Pixels"
    assert {"insertion step", "deletion step"} <= set(both)
    train = ap.metrics.TrainingSet(x, torch.tensor([0, 1]))
    tuned = ap.metrics.InDomainSingleDeletion(train=train)(ap.Field(net), x, ap.Gradient())
    assert tuned.resolved["groups"]["type"] == "Cells"
