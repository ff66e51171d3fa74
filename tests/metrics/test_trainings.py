"""Networks that metrics train: once for all batches, explainers and metrics they serve; architectures of one's own."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import apportion as ap
from apportion.core.errors import ConfigError
from apportion.metrics import KAR, ROAR, FromScratch, SmallNetwork, TrainingSet

G = torch.Generator().manual_seed(0)
X = torch.randn(24, 4, generator=G).double()
Y = (X[:, 0] > 0).long()
FIELD = ap.Field(lambda x: torch.stack([-x[:, 0], x[:, 0]], 1))


class Counting:
    """The nearest mean of a class, and a list of what was asked."""

    def __init__(self) -> None:
        self.seeds: list[int] = []
        self.nets: list[weakref.ref[nn.Module]] = []

    def __call__(self, x: Tensor, y: Tensor, seed: int) -> nn.Module:
        self.seeds.append(seed)
        means = torch.stack([x[y == c].mean(0) for c in (0, 1)])
        linear = nn.Linear(4, 2, dtype=x.dtype)
        linear.weight.data, linear.bias.data = means, -means.square().sum(1) / 2
        self.nets.append(weakref.ref(linear))
        return linear


@pytest.mark.parametrize("metric", [ROAR, KAR])
def test_an_evaluation_trains_once_whatever_its_batches(metric: Any) -> None:
    found, calls = [], []
    for batch in (6, 4, 1):
        m = metric(train=TrainingSet(X, Y), trainer=(count := Counting()), fractions=(0.25, 0.75), seeds=2)
        methods = {"gradient": ap.Gradient(), "again": ap.Gradient(), "by input": ap.GradientTimesInput()}
        found.append(ap.evaluate(methods, FIELD, X[:6], {"m": m}, truth=Y[:6], batch=batch, quiet=True, ids=range(6)))
        calls.append(len(count.seeds))
        q = FIELD.bind(X[:1])
        assert len(count.seeds) == m.trainings(q, [*methods.values(), ap.controls.Random()]) == 2 * (1 + 2 * 3)
        assert len(set(count.seeds)) == 2
    for other in found[1:]:
        for name in ("gradient", "again", "by input"):
            one, two = found[0].scores[name]["m"], other.scores[name]["m"]
            assert torch.equal(one.values, two.values)
            assert one.warnings == two.warnings
            assert all(torch.equal(one.parts[k], two.parts[k]) for k in ("correct", "random", "unmodified"))
    alone = m(FIELD, X[3:5], ap.Gradient(), truth=Y[3:5], ids=[3, 4])  # which trains anew
    assert torch.equal(alone.values, found[0].scores["gradient"]["m"].values[3:5])
    assert len(count.seeds) == calls[-1] + 2 * (1 + 2 * 2)


def test_trainings_are_told_before_and_networks_let_go_after() -> None:
    m = ROAR(train=TrainingSet(X, Y), trainer=(count := Counting()), fractions=(0.5,), seeds=2)
    told = ap.evaluate(["gradient"], FIELD, X, {"m": m}, truth=Y, dry_run=True, quiet=True)
    assert "and 6 training(s) in all" in str(told)
    found = ap.evaluate(["gradient"], FIELD, X, {"m": m}, truth=Y, quiet=True)
    gc.collect()
    assert len(found) == 24
    assert len(count.nets) == 6
    assert not any(net() is not None for net in count.nets)


def test_a_failing_trainer_is_named_and_not_tried_for_every_example() -> None:
    calls: list[int] = []

    def fails(x: Tensor, y: Tensor, seed: int) -> nn.Module:
        calls.append(seed)
        raise RuntimeError("no memory left")

    m = ROAR(train=TrainingSet(X, Y), trainer=fails, fractions=(0.5,), seeds=2, beside=False)
    with pytest.raises(ConfigError, match=r"RuntimeError in the trainer on 0\.5 by Gradient: no memory left"):
        m(FIELD, X, ap.Gradient(), truth=Y)
    calls.clear()
    found = ap.evaluate(["gradient"], FIELD, X, {"m": m}, truth=Y, batch=12, quiet=True, controls=[])
    assert len(calls) == 2
    assert "no memory left" in found.failures[0][2]
    with pytest.raises(ConfigError, match="hashed"):
        ROAR(train=TrainingSet(X, Y), trainer=Unhashable())


class Unhashable:
    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __call__(self, x: Tensor, y: Tensor, seed: int) -> nn.Module:
        return nn.Linear(4, 2)


def test_an_architecture_of_ones_own_starts_anew_and_learns() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.ReLU(), nn.Linear(8, 2)).double()
    net.requires_grad_(False)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    state = torch.random.get_rng_state()
    train = FromScratch(net, ap.subsets.Trainer(epochs=15, batch=8, lr=0.05))
    one, same, other = train(X, Y, 1), train(X, Y, 1), train(X, Y, 2)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not one.training
    assert type(one[1]) is nn.BatchNorm1d  # pyright: ignore[reportIndexIssue]
    assert float((one(X).argmax(1) == Y).double().mean()) == 1
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(next(one.parameters()), next(other.parameters()))
    built = FromScratch(lambda: nn.Linear(4, 2).double(), ap.subsets.Trainer(epochs=40, lr=0.1))(X, Y, 0)
    assert float((built(X).argmax(1) == Y).double().mean()) > 0.9


def test_architectures_that_cannot_start_anew_are_refused() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    with pytest.raises(ConfigError, match="Bare with parameters and no reset_parameters"):
        FromScratch(nn.Sequential(nn.Linear(4, 2), Bare()))(X, Y, 0)
    with pytest.raises(ConfigError, match=r"torch\.nn\.Module"):
        FromScratch(lambda: "net")(X, Y, 0)  # pyright: ignore
    with pytest.raises((ConfigError, TypeError), match="network"):
        FromScratch("net")  # pyright: ignore
    assert SmallNetwork() == SmallNetwork()


def test_without_a_trainer_the_architecture_is_that_of_the_model_explained() -> None:
    net = nn.Linear(4, 2).double().eval()
    small = {"train": TrainingSet(X, Y), "trainer": None, "fractions": (0.5,), "seeds": 1, "beside": False}
    q = ap.Field(net).bind(X[:3])
    found = ROAR(**small).judge(q, ap.metrics.Subject(ap.Gradient()), Y[:3])
    trained = [m for held in q.lasting.values() for m in (held[0][0] if isinstance(held, tuple) else held)]
    assert [type(m) for m in trained] == [nn.Linear] * 2
    assert all(m is not net for m in trained)
    assert len(found) == 3
    with pytest.raises(ConfigError, match="trained anew"):
        ROAR(**small)(FIELD, X[:3], ap.Gradient(), truth=Y[:3])


def test_an_evaluation_that_goes_on_finds_what_it_would_have_found(tmp_path: Any) -> None:
    m = ROAR(train=TrainingSet(X, Y), trainer=(count := Counting()), fractions=(0.5,), seeds=1, beside=False)
    options: dict[str, Any] = {"truth": Y[:6], "batch": 3, "quiet": True, "ids": range(6), "controls": []}
    whole = ap.evaluate(["gradient"], FIELD, X[:6], {"m": m}, **options)
    ap.evaluate(["gradient"], FIELD, X[:6], {"m": m}, **options, out=tmp_path)
    last = sorted(p for p in tmp_path.rglob("*") if p.is_file() and "1" in p.name)
    assert last
    last[-1].unlink()
    again = ap.evaluate(["gradient"], FIELD, X[:6], {"m": m}, **options, out=tmp_path)
    assert torch.equal(whole.scores["gradient"]["m"].values, again.scores["gradient"]["m"].values)
    assert len(count.seeds) == 3 * 2  # it trains again, by the same seeds
    assert len(set(count.seeds)) == 1
