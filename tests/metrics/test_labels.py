"""Label randomization: the definition in loops, explainers that ignore the model, labels that were not learned."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import rankdata
from torch import Tensor, nn

import apportion as ap
from apportion.core.errors import ConfigError, InputError
from apportion.metrics import FromScratch, LabelRandomization, RankSimilarity, SmallNetwork, TrainingSet

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0)).double()
Y = (X[:, 0] > 0).long()
TRAIN = TrainingSet(X, Y)
LEARNS = SmallNetwork(ap.subsets.Trainer(epochs=60, lr=0.03), 8)
FIELD = ap.Field(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)).double().eval())
HERE = X[:4]


def spearman(one: Any, other: Any) -> float:
    return float(np.corrcoef(rankdata(one), rankdata(other))[0, 1])


class Spy:
    """A linear network of the classes' means, which remembers what it was trained on."""

    def __init__(self) -> None:
        self.asked: list[tuple[Tensor, Tensor, int]] = []
        self.nets: list[nn.Module] = []

    def __call__(self, x: Tensor, y: Tensor, seed: int) -> nn.Module:
        self.asked.append((x, y, seed))
        means = torch.stack([x[y == c].mean(0) for c in (0, 1)])
        noise = torch.randn(means.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
        net = nn.Sequential(nn.Linear(6, 2, dtype=x.dtype), nn.Tanh())
        net[0].weight.data, net[0].bias.data = means + noise / 5, 0 * means[:, 0]
        self.nets.append(net)
        return net


def test_loops_give_the_same() -> None:
    spy = Spy()
    found = LabelRandomization(train=TRAIN, trainer=spy, seeds=3)(FIELD, HERE, ap.Gradient(), target=[0, 1, 1, 0])
    true, permuted = spy.nets[::2], spy.nets[1::2]

    def map_of(net: nn.Module, b: int, target: int) -> Any:
        x = HERE[b : b + 1].clone().requires_grad_()
        return torch.autograd.grad(net(x)[0, target], x)[0][0].numpy()

    for b, target in enumerate([0, 1, 1, 0]):
        for absolute, name in ((False, "signed"), (True, "absolute")):
            how = abs if absolute else (lambda m: m)
            for i in range(3):
                one, other = how(map_of(true[i], b, target)), how(map_of(permuted[i], b, target))
                assert float(found.parts[name][b, i]) == pytest.approx(spearman(one, other), abs=1e-12)
        assert float(found.values[b]) == pytest.approx(float(found.parts["signed"][b].mean()), abs=1e-12)
        pairs = [spearman(map_of(m, b, target), map_of(n, b, target)) for m, n in itertools.combinations(true, 2)]
        assert float(found.parts["between seeds"][b]) == pytest.approx(sum(pairs) / 3, abs=1e-12)
    for i, net in enumerate(spy.nets):
        name = ("accuracy, true labels", "accuracy, permuted labels")[i % 2]
        wanted = float((net(X).argmax(1) == spy.asked[i][1]).double().mean())
        assert found.parts[name][:, i // 2].tolist() == pytest.approx([wanted] * 4)
    by_size = LabelRandomization(train=TRAIN, trainer=Spy(), similarity=RankSimilarity(absolute=True))
    magnitudes = by_size(FIELD, HERE, ap.Gradient(), target=[0, 1, 1, 0])
    torch.testing.assert_close(magnitudes.values, found.parts["absolute"].mean(1))


def test_only_the_labels_of_the_second_are_permuted_each_time_anew() -> None:
    spy, state = Spy(), torch.random.get_rng_state()
    LabelRandomization(train=TRAIN, trainer=spy, seeds=2)(FIELD, HERE, ap.Gradient())
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(x, X) for x, _, _ in spy.asked)
    labels = [y for _, y, _ in spy.asked]
    assert torch.equal(labels[0], Y)
    assert torch.equal(labels[2], Y)
    assert len({tuple(y.tolist()) for y in labels}) == 3
    assert all(sorted(y.tolist()) == sorted(Y.tolist()) for y in labels)
    assert len({seed for _, _, seed in spy.asked}) == 4


def test_who_ignores_the_model_gets_one_and_who_reads_what_it_learned_gets_less() -> None:
    metric = LabelRandomization(train=TRAIN, trainer=LEARNS, seeds=2)
    blind = [ap.controls.InputMagnitude(), ap.controls.Random()]
    found = metric(FIELD, HERE, ap.Gradient(), controls=blind)
    assert [float(s.values.min()) for s in found.controls.values()] == pytest.approx([1, 1])
    assert float(found.values.mean()) < 0.5 < float(found.parts["between seeds"].mean())
    assert float(found.parts["accuracy, permuted labels"].min()) == 1
    assert not any("right" in w for w in found.warnings)
    assert found.cost.forward.tolist() == found.cost.backward.tolist() == [4] * 4
    labels_do_nothing = LabelRandomization(train=TRAIN, trainer=lambda x, y, s: FIELD.model, seeds=2)
    assert labels_do_nothing(FIELD, HERE, ap.Gradient()).values.tolist() == pytest.approx([1] * 4)


def test_a_network_that_has_not_learned_its_labels_is_told() -> None:
    lazy = SmallNetwork(ap.subsets.Trainer(epochs=1), 2)
    found = LabelRandomization(train=TRAIN, trainer=lazy, seeds=1)(FIELD, HERE, ap.Gradient())
    low = float(found.parts["accuracy, permuted labels"].min())
    assert low < 0.95
    assert any(f"permuted labels gets {low:.0%}" in w for w in found.warnings)
    none = LabelRandomization(train=TRAIN, trainer=lazy, seeds=1, learned=0.0)(FIELD, HERE, ap.Gradient())
    assert not any("right" in w for w in none.warnings)
    assert "between seeds" not in none.parts


def test_networks_that_are_trained_already_are_compared_with_the_model() -> None:
    spy = Spy()
    mine, other = spy(X, Y, 0), spy(X, 1 - Y, 1)
    field = ap.Field(mine)
    metric = LabelRandomization(train=TrainingSet(X, 1 - Y), other=(other, mine))
    found = metric(field, HERE, ap.Gradient(), target=1)
    assert metric.trainings(field.bind(HERE), []) == 0
    wanted = RankSimilarity()(*(ap.Gradient()(ap.Field(n), HERE, target=1).values for n in (mine, other)))
    assert torch.equal(found.parts["signed"][:, 0], wanted)
    assert found.parts["signed"][:, 1].tolist() == pytest.approx([1] * 4)
    right = [float((n(X).argmax(1) == 1 - Y).double().mean()) for n in (other, mine)]
    assert found.parts["accuracy, other labels"].tolist() == [right] * 4
    assert set(found.parts) == {"signed", "absolute", "accuracy, other labels"}


def test_networks_are_trained_on_what_they_will_read_and_once_for_all_batches() -> None:
    x, mean = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(1)).double(), (0.2, 0.4, 0.6)
    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(8, 2)).double().eval()
    field = ap.Field(net, normalize=ap.Normalize(mean, (0.5, 0.5, 0.5)))
    seen: list[Tensor] = []

    def spy(rows: Tensor, y: Tensor, seed: int) -> nn.Module:
        seen.append(rows)
        return FromScratch(net, ap.subsets.Trainer(epochs=2))(rows, y, seed)

    train, found = TrainingSet(x, torch.arange(6) % 2), []
    for batch in (6, 4):
        seen.clear()
        metric = {"m": LabelRandomization(train=train, trainer=spy, seeds=2)}
        found.append(ap.evaluate(["gradient", "smooth_grad"], field, x, metric, batch=batch, quiet=True))
        assert len(seen) == 4
    torch.testing.assert_close(seen[0], (x - torch.tensor(mean).double()[:, None, None]) / 0.5)
    for name in ("gradient", "smooth_grad"):
        one, two = (f.scores[name]["m"] for f in found)
        torch.testing.assert_close(one.values, two.values)
        assert one.warnings == two.warnings
    one = LabelRandomization(train=train, seeds=1)  # the model's architecture, from scratch
    before = [p.clone() for p in net.parameters()]
    assert one(field, x[:2], ap.Gradient()).values.shape == (2,)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


def test_mistakes_are_named_and_constant_maps_undefined() -> None:
    metric = LabelRandomization(train=TRAIN, trainer=Spy(), seeds=1)
    found = metric(FIELD, HERE, Constant())
    assert bool(found.values.isnan().all())
    assert bool(found.undefined["a constant map"].all())
    with pytest.raises(ConfigError, match="trained anew"):
        LabelRandomization(train=TRAIN)(ap.Field(lambda x: x[:, :2]), HERE, ap.Gradient())
    with pytest.raises(InputError, match="training set"):
        metric(ap.Field(nn.Linear(3, 2).double()), X[:2, :3], ap.Gradient())
    with pytest.raises(ConfigError, match="other models"):
        metric(FIELD, HERE, ap.External(lambda x, t: x))


class Constant(ap.Gradient):
    """A map of ones."""

    def explain(self, q: Any) -> Any:
        return q.attribution(self, torch.ones_like(q.x))
