"""Remove, or keep, and retrain: planted tables and pictures, the definition in loops, trainers, what stands beside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import apportion as ap
from apportion.core.errors import ConfigError, InputError
from apportion.metrics import KAR, ROAR, SmallNetwork, Sparseness, Subject, TrainingSet, accuracy_table


def centroids(x: Tensor, y: Tensor, seed: int) -> nn.Module:
    """The nearest mean of a class: a linear model, trained without chance and at once."""
    flat = x.flatten(1)
    means = torch.stack([flat[y == c].mean(0) for c in range(int(y.max()) + 1)])
    linear = nn.Linear(flat.shape[1], len(means), dtype=x.dtype)
    linear.weight.data, linear.bias.data = means, -means.square().sum(1) / 2
    return nn.Sequential(nn.Flatten(), linear)


def table(n: int, seed: int, features: int = 4) -> tuple[Tensor, Tensor]:
    """The sign of the first feature is the class."""
    x = torch.randn(n, features, generator=torch.Generator().manual_seed(seed)).double()
    return x, (x[:, 0] > 0).long()


def pictures(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Which half is brighter is the class."""
    x = torch.rand(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed)).double()
    y = torch.arange(n) % 2
    x[y == 0, :, :, :3] += 1
    x[y == 1, :, :, 3:] += 1
    return x, y


FIELD = ap.Field(lambda x: torch.stack([-x[:, 0], x[:, 0]], 1))
HALVES = ap.Field(lambda x: torch.stack([x[..., :3].mean((1, 2, 3)), x[..., 3:].mean((1, 2, 3))], 1))
KNOWS = ap.External(lambda x, t: torch.tensor([4.0, 1, 2, 3]).expand_as(x) * 1.0, "knows")
WRONG = ap.External(lambda x, t: torch.tensor([0.0, 1, 2, 3]).expand_as(x) * 1.0, "wrong")


def by_loop(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], score: Any, fraction: float, keep: bool
) -> Tensor:
    """Example by example, value by value."""
    mean = train[0].transpose(0, 1).flatten(1).mean(1)

    def changed(x: Tensor) -> Tensor:
        out = []
        for one in x:
            values = (score(one[None])[0] ** 2).flatten().tolist()
            n = round(fraction * len(values))
            first = sorted(range(len(values)), key=lambda i: -values[i])[:n]
            flat = one.clone().flatten()
            for i in range(len(values)):
                if (i in first) != keep:
                    flat[i] = mean[i * len(mean) // len(values)]
            out.append(flat.reshape(one.shape))
        return torch.stack(out)

    net = centroids(changed(train[0]), train[1], 0)
    return (net(changed(test[0])).argmax(1) == test[1]).double()


@pytest.mark.parametrize(("metric", "keep"), [(ROAR, False), (KAR, True)])
def test_loops_give_the_same(metric: Any, keep: bool) -> None:
    for data, field in ((table, FIELD), (pictures, HALVES)):
        train, test = data(20, 0), data(12, 1)
        score = lambda x: torch.sin(7 * x)  # noqa: E731
        m = metric(train=TrainingSet(*train), trainer=centroids, fractions=(0.25, 0.75), seeds=1, beside=False)
        found = m(field, test[0], ap.External(lambda x, t: torch.sin(7 * x)), truth=test[1])
        for i, fraction in enumerate((0.25, 0.75)):
            wanted = by_loop(train, test, score, fraction, keep)
            assert torch.equal(found.parts["correct"][:, i, 0], wanted)
        assert torch.equal(found.values, found.parts["correct"].mean((1, 2)))
        assert torch.equal(found.curves["retrained"].y, found.parts["correct"].mean(2))


def test_who_knows_is_told_from_who_does_not_and_from_chance() -> None:
    (x, y), (tx, ty) = table(200, 0), table(100, 1)
    options: dict[str, Any] = {"train": TrainingSet(x, y), "trainer": centroids, "fractions": (0.25, 0.5), "seeds": 1}
    for metric, sign in ((ROAR, 1), (KAR, -1)):
        good, bad = (metric(**options)(FIELD, tx, e, truth=ty) for e in (KNOWS, WRONG))
        at_random = float(good.parts["random"].mean())
        assert sign * float(good.values.mean()) < sign * at_random < sign * float(bad.values.mean())
        assert float(good.parts["unmodified"].mean()) > 0.9
        assert "edges" not in good.parts
    roar = ROAR(**options)(FIELD, tx, KNOWS, truth=ty)
    assert abs(float(roar.values.mean()) - 0.5) < 0.1
    assert float(ROAR(**options)(FIELD, tx, WRONG, truth=ty).values.mean()) > 0.9
    table_ = accuracy_table(roar)
    assert [(r["ranking"], r["fraction"]) for r in table_[:3]] == [
        ("unmodified", None),
        ("knows", 0.25),
        ("knows", 0.5),
    ]
    assert all(r["low"] <= r["accuracy"] <= r["high"] for r in table_)
    with pytest.raises(InputError, match="ROAR or KAR"):
        accuracy_table(Sparseness()(FIELD, tx, tx))


def test_both_sets_are_changed_and_by_the_training_sets_mean() -> None:
    (x, y), (tx, ty) = pictures(10, 0), pictures(4, 1)
    seen: list[tuple[Tensor, Tensor, int]] = []

    def spy(rows: Tensor, classes: Tensor, seed: int) -> nn.Module:
        seen.append((rows, classes, seed))
        net = centroids(rows, classes, seed)
        net.register_forward_hook(lambda m, given, out: tested.append(given[0]))
        return net

    tested: list[Tensor] = []
    by_value = ap.External(lambda x, t: x.clone(), "input")
    m = ROAR(train=TrainingSet(x, y), trainer=spy, fractions=(0.25,), seeds=2, beside=False)
    m(HALVES, tx, by_value, truth=ty)
    mean = x.mean((0, 2, 3), keepdim=True)
    for given, original in ((seen[0][0], x), (tested[0], tx)):
        gone = given != original
        assert gone.flatten(1).sum(1).tolist() == [27] * len(original)
        assert torch.equal(given[gone], mean.expand_as(given)[gone])
        assert bool((original[gone].min() > original[~gone].flatten().quantile(0.5)).all())
    assert len({s for _, _, s in seen}) == 2
    assert torch.equal(seen[0][1], y)
    assert torch.equal(seen[-1][0], x)  # the unmodified data are learned as well
    assert torch.equal(tested[-1], tx)


def test_pixels_go_whole_for_maps_of_one_channel_and_on_request() -> None:
    (x, y), (tx, ty) = pictures(6, 0), pictures(2, 1)
    one_channel = ap.External(lambda x, t: x[:, :1].clone())
    whole = ap.External(lambda x, t: x.clone())
    for explainer, groups in ((one_channel, None), (whole, ap.groups.Pixels())):
        seen: list[Tensor] = []

        def spy(rows: Tensor, classes: Tensor, seed: int, seen: list[Tensor] = seen) -> nn.Module:
            seen.append(rows)
            return centroids(rows, classes, seed)

        m = ROAR(train=TrainingSet(x, y), trainer=spy, fractions=(0.5,), seeds=1, beside=False, groups=groups)
        m(HALVES, tx, explainer, truth=ty)
        gone = seen[0] != x
        assert torch.equal(gone.any(1), gone.all(1))
        assert gone[:, 0].flatten(1).sum(1).tolist() == [18] * 6


def test_signed_values_rank_otherwise_and_labels_are_explained_on_request() -> None:
    (x, y), (tx, ty) = table(30, 0), table(10, 1)
    asked: list[Tensor] = []

    def negative(x: Tensor, target: Tensor) -> Tensor:
        asked.append(target)
        return torch.tensor([-4.0, 1, 2, 3]).expand_as(x) * 1.0

    options: dict[str, Any] = {"trainer": centroids, "fractions": (0.25,), "seeds": 1, "beside": False}
    squared, signed = (
        ROAR(train=TrainingSet(x, y), squared=s, **options)(FIELD, tx, ap.External(negative), truth=ty)
        for s in (True, False)
    )
    assert float(squared.values.mean()) < 0.8 < float(signed.values.mean())
    flipped = 1 - y
    asked.clear()
    ROAR(train=TrainingSet(x, flipped), labels=True, **options)(FIELD, tx, ap.External(negative), truth=1 - ty)
    assert [a.tolist() for a in asked] == [flipped.tolist(), (1 - ty).tolist()]


def test_rankings_beside_are_made_once_for_all_subjects() -> None:
    (x, y), (tx, ty) = pictures(8, 0), pictures(4, 1)
    calls: list[int] = []

    def counting(rows: Tensor, classes: Tensor, seed: int) -> nn.Module:
        calls.append(seed)
        return centroids(rows, classes, seed)

    m = ROAR(train=TrainingSet(x, y), trainer=counting, fractions=(0.5,), seeds=2)
    q = HALVES.bind(tx, ids=list("abcd"))
    one = m.judge(q, Subject(ap.Gradient()), ty)
    assert len(calls) == 8  # the map's, random, edges, unmodified
    assert list(one.curves) == ["retrained", "random", "edges", "unmodified"]
    two = m.judge(q, Subject(ap.GradientTimesInput()), ty)
    assert len(calls) == 10
    assert torch.equal(one.parts["edges"], two.parts["edges"])
    assert one.cost.forward.tolist() == [0] * 4


def test_a_trainers_chance_is_seeded_and_the_global_state_left_alone() -> None:
    (x, y), (tx, ty) = table(16, 0), table(12, 1)

    def chance(rows: Tensor, classes: Tensor, seed: int) -> nn.Module:
        return nn.Linear(4, 2).double()

    m = ROAR(train=TrainingSet(x, y), trainer=chance, fractions=(0.5,), seeds=3, beside=False)
    before = torch.random.get_rng_state()
    one, two = (m(FIELD, tx, ap.Gradient(), truth=ty, seed=s) for s in (0, 0))
    assert torch.equal(one.parts["correct"], two.parts["correct"])
    assert torch.equal(before, torch.random.get_rng_state())
    assert len({tuple(c) for c in one.parts["correct"][:, 0].T.tolist()}) > 1
    assert len(accuracy_table(one)[1]["by_seed"]) == 3


def test_the_supplied_trainer_learns_pictures_and_tables() -> None:
    before = torch.random.get_rng_state()
    for (x, y), (tx, ty) in ((pictures(40, 0), pictures(40, 1)), (table(200, 0), table(60, 1))):
        net = SmallNetwork(ap.subsets.Trainer(epochs=15, batch=20, lr=0.02), width=4)(x, y, 3)
        assert float((net(tx).argmax(1) == ty).double().mean()) > 0.9
    assert torch.equal(before, torch.random.get_rng_state())


def test_mistakes_are_named() -> None:
    (x, y), (tx, ty) = table(10, 0), table(4, 1)
    data = TrainingSet(x, y)
    roar = ROAR(train=data, trainer=centroids, seeds=1, beside=False)
    assert TrainingSet(x.clone(), y) == data != TrainingSet(x, 1 - y)
    with pytest.raises(ConfigError, match="an explainer"):
        roar(FIELD, tx, tx, truth=ty)
    with pytest.raises(ConfigError, match="no truth"):
        roar(FIELD, tx, ap.Gradient())
    with pytest.raises(InputError, match="whole numbers"):
        roar(FIELD, tx, ap.Gradient(), truth=ty.double())
    with pytest.raises(InputError, match="training set's"):
        roar(ap.Field(lambda x: x), tx[:, :3], ap.Gradient(), truth=ty)
    with pytest.raises(ConfigError, match="shares"):
        ROAR(train=data, fractions=(0.0,))
    with pytest.raises((ConfigError, TypeError), match="trainer"):
        ROAR(train=data, trainer="sgd")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match=r"torch\.nn\.Module"):
        ROAR(train=data, trainer=lambda x, y, s: len, seeds=1)(FIELD, tx, ap.Gradient(), truth=ty)  # pyright: ignore
    with pytest.raises(InputError, match=r"\[B, classes\]"):
        ROAR(train=data, trainer=lambda x, y, s: nn.Flatten(0), seeds=1)(FIELD, tx, ap.Gradient(), truth=ty)
    with pytest.raises(ConfigError, match="whole number each"):
        TrainingSet(x, y[:3])
    with pytest.raises((ConfigError, TypeError), match=r"tensor|y="):
        TrainingSet(x, y.tolist())  # pyright: ignore[reportArgumentType]
