"""Fine-tuning with deleted cells: what goes, what stays, and a hole that misleads the model as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import apportion as ap
from apportion.core.errors import ApportionError, ConfigError, InputError, ModelError
from apportion.metrics import FromScratch, InDomain, InDomainSingleDeletion, SingleDeletion, TrainingSet
from apportion.metrics.randomization.layers import randomize, with_layers
from apportion.parts.subsets.trainer import Trainer

WEIGHT = torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=torch.float64)


class Startled(nn.Module):
    """Two classes by the sign of w · x, and a wild guess where an element is 0, which none of the data has."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(8, 2, bias=False, dtype=torch.float64)
        one = torch.cat([WEIGHT / 2, torch.tensor([0.0, 0.0, 0.0, -9.0])])
        self.read.weight.data = torch.stack([-one, one])

    def forward(self, x: Tensor) -> Tensor:
        return self.read(torch.cat([x, (1 - x.abs()).relu()], 1))


def drawn(count: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    size = 1 + torch.rand(count, 4, generator=g, dtype=torch.float64)
    return size * (2 * torch.randint(2, (count, 4), generator=g) - 1)


X, HERE = drawn(192, 0), drawn(12, 1)
TRAIN = TrainingSet(X, (X @ WEIGHT > 0).long())
TUNING = InDomain(trainer=ap.subsets.Trainer(epochs=60, batch=64, lr=0.1))
QUICK = InDomain(trainer=ap.subsets.Trainer(epochs=1, lr=0.01))


class Noting(nn.Module):
    """A network that notes what it reads in training mode."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen.append(x.detach())
        return self.net(x)


def test_a_hole_that_misleads_the_model_does_not_mislead_the_tuned_one() -> None:
    field = ap.Field(Startled().eval())
    truth = HERE * WEIGHT
    tuned = field.with_model(TUNING(field, TRAIN))
    out_of_domain, right = SingleDeletion()(field, HERE, truth), SingleDeletion()(tuned, HERE, ap.GradientTimesInput())
    assert float(out_of_domain.values.mean()) < 0.5  # cell 3 does nothing, and loses most
    assert float(right.values.mean()) > 0.9
    misled = out_of_domain.parts["falls"]
    assert float(SingleDeletion()(field, HERE, misled).values.mean()) == pytest.approx(1)
    assert float(SingleDeletion()(tuned, HERE, misled).values.mean()) < 0.5
    scale = right.parts["falls"].abs().amax(1)
    assert float((right.parts["falls"][:, 3].abs() / scale).max()) < 0.15


def test_one_metric_does_it_all() -> None:
    model = Startled().eval()
    field, metric = ap.Field(model), InDomainSingleDeletion(train=TRAIN, tuning=TUNING)
    found = metric(field, HERE, ap.GradientTimesInput(), controls=[ap.controls.Random()])
    q = field.bind(HERE)
    net = q.for_all(0, lambda: metric._tuned(q))[0][0]
    step_by_step = SingleDeletion()(field.with_model(net), HERE, ap.GradientTimesInput(), target=q.target)
    torch.testing.assert_close(found.values, step_by_step.values)
    torch.testing.assert_close(found.parts["falls"][:, 0], step_by_step.parts["falls"])
    assert float(found.values.mean()) > 0.9
    assert float(found.controls["Random"].values.mean()) < 0.5
    before, after = (float(found.parts[f"accuracy, {when}"][0, 0]) for when in ("before", "after"))
    assert before < 0.8 < after  # one of four cells missing of each
    assert not found.warnings


def test_seeds_are_averaged_and_harm_is_told() -> None:
    harm = InDomain(trainer=ap.subsets.Trainer(epochs=2, lr=30.0))
    m = InDomainSingleDeletion(train=TRAIN, tuning=harm, seeds=2)
    easy = nn.Linear(4, 2, dtype=torch.float64).eval()
    easy.weight.data = torch.stack([-WEIGHT, WEIGHT])
    found = m(ap.Field(easy), HERE, ap.GradientTimesInput())
    assert found.parts["correlations"].shape == found.parts["accuracy, after"].shape == (12, 2)
    assert found.parts["falls"].shape == found.parts["values"].shape == (12, 2, 4)
    torch.testing.assert_close(found.values, found.parts["correlations"].mean(1))
    assert any("lower rate" in w for w in found.warnings)


def test_half_of_the_examples_lose_one_cell_drawn_anew_at_each_step() -> None:
    x = 0.2 + 0.6 * torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    net = Noting(nn.Sequential(nn.Flatten(), nn.Linear(192, 2))).eval()
    field = ap.Field(net, normalize=ap.Normalize((0.9, 0.9, 0.9), (0.5, 0.5, 0.5)))
    many = InDomain(trainer=ap.subsets.Trainer(epochs=20, batch=40))
    tuned = many(field, TrainingSet(x, torch.arange(40) % 2))
    assert isinstance(tuned, Noting)
    seen = torch.cat(tuned.seen)
    assert not net.seen
    gone = (seen == 0).all(1).unfold(1, 2, 2).unfold(2, 2, 2).flatten(3)  # 4 × 4 cells of 2 × 2 pixels
    assert torch.equal(gone.any(3), gone.all(3))
    lost = gone.all(3).flatten(1)
    assert set(lost.sum(1).tolist()) == {0, 1}
    assert 0.45 < float(lost.any(1).double().mean()) < 0.55  # 800 draws
    each = lost.double().mean(0) * 32
    assert float((each - 1).abs().max()) < 0.7
    whole = seen[~lost.any(1)]
    rows = field.normalize(x)  # pyright: ignore[reportOptionalCall]
    assert all(bool((rows == row).flatten(1).all(1).any()) for row in whole[:20])


def test_a_share_of_cells_goes_and_of_several_draws_one() -> None:
    x = torch.full((6, 8), 9.0)
    net = Noting(nn.Linear(8, 2)).eval()
    tuning = InDomain(
        fill=ap.fills.Marginal(torch.tensor([[1.0], [2.0]]).expand(2, 8)),
        count=0.25,
        probability=1.0,
        trainer=ap.subsets.Trainer(epochs=30),
    )
    tuned = tuning(ap.Field(net), TrainingSet(x, torch.arange(6) % 2))
    assert isinstance(tuned, Noting)
    seen = torch.cat(tuned.seen)
    assert set((seen != 9).sum(1).tolist()) == {2}
    assert set(seen.sum(1).tolist()) == {6 * 9 + 2 * 1, 6 * 9 + 2 * 2}


def test_a_step_is_that_of_cross_entropy_on_what_is_left() -> None:
    """All of each example goes, so that chance has no part: Adam's step by hand."""
    x, y = X[:5], TRAIN.y[:5]
    net = nn.Linear(4, 2, dtype=torch.float64).eval()
    fill = ap.fills.Baselines(ap.baselines.Given(torch.full((1, 4), 0.5, dtype=torch.float64)))
    tuning = InDomain(
        ap.groups.Labels(torch.zeros(1, 4, dtype=torch.long)),
        fill,
        probability=1.0,
        trainer=ap.subsets.Trainer(epochs=1, lr=0.1, weight_decay=0.3),
    )
    tuned = tuning(ap.Field(net), TrainingSet(x, y))
    byhand = copy.deepcopy(net)
    optimizer = torch.optim.AdamW(byhand.parameters(), lr=0.1, weight_decay=0.3)
    nn.functional.cross_entropy(byhand(torch.full_like(x, 0.5)), y).backward()
    optimizer.step()
    for a, b in zip(tuned.parameters(), byhand.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def normed() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 2))
    return net.double().eval()


def test_the_seed_decides_and_nothing_else_changes() -> None:
    net, field = normed(), ap.Field(normed())
    state, held = torch.random.get_rng_state(), copy.deepcopy(field.model.state_dict())
    field.model[0].weight.requires_grad_(False)
    one, two, other = (QUICK(field, TRAIN, seed) for seed in (3, 3, 4))
    assert torch.equal(state, torch.random.get_rng_state())
    assert not any(m.training for m in (*field.model.modules(), *one.modules()))
    assert all(torch.equal(v, held[k]) for k, v in field.model.state_dict().items())
    assert all(p.grad is None for p in field.model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one[4].weight, other[4].weight)  # pyright: ignore
    assert torch.equal(one[0].weight, net[0].weight)  # pyright: ignore
    assert not torch.equal(one[0].bias, net[0].bias)  # pyright: ignore


def test_the_callers_modes_do_not_matter() -> None:
    field = ap.Field(normed())
    usual = QUICK(field, TRAIN)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            other = QUICK(field, TRAIN)
        assert all(torch.equal(a, b) for a, b in zip(usual.parameters(), other.parameters(), strict=True))
    single = ap.Field(normed().float(), precision=torch.float64)  # what is explained in float64 is trained as it is
    few = TrainingSet(X[:16].float(), TRAIN.y[:16])
    assert len(InDomainSingleDeletion(train=few, tuning=QUICK)(single, HERE.float(), ap.Gradient())) == 12


def test_a_model_frozen_as_a_whole_is_trained_as_a_whole() -> None:
    usual, frozen = normed(), normed().requires_grad_(False)
    one, other = (QUICK(ap.Field(net), TRAIN) for net in (usual, frozen))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert not any(p.requires_grad for p in frozen.parameters())


def test_statistics_follow_the_data_unless_they_are_to_stay() -> None:
    field = ap.Field(normed())
    moved, kept = QUICK(field, TRAIN), InDomain(trainer=QUICK.trainer, statistics=False)(field, TRAIN)
    assert not torch.equal(moved[1].running_mean, torch.zeros(6).double())  # pyright: ignore[reportIndexIssue]
    assert torch.equal(kept[1].running_mean, torch.zeros(6).double())  # pyright: ignore[reportIndexIssue]
    assert not torch.equal(kept[1].weight, torch.ones(6).double())  # pyright: ignore[reportIndexIssue]


def test_weights_are_drawn_anew_on_demand() -> None:
    frozen = normed().requires_grad_(False)
    small = ap.subsets.Trainer(epochs=1, lr=1e-9)
    anew = InDomain(trainer=small, anew=True)(ap.Field(frozen), TRAIN)
    assert not torch.allclose(anew[0].weight, frozen[0].weight, atol=0.01)  # pyright: ignore

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    with pytest.raises(ConfigError, match="leave anew out"):
        InDomain(anew=True)(ap.Field(nn.Sequential(nn.Linear(4, 2).double(), Bare()).eval()), TRAIN)


class Fragile(nn.Module):
    """Runs when it is evaluated, and not when it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise RuntimeError("not today")
        return self.net(x)


def uncopied() -> nn.Module:
    net = nn.Linear(4, 2, dtype=torch.float64).eval()
    net.kept = (n for n in range(3))  # pyright: ignore
    return net


WRONG: list[tuple[Callable[[], Any], type[ApportionError], str]] = [
    (lambda: InDomain(count=1.5), ConfigError, "count=1.5"),
    (lambda: InDomain(count=0), ConfigError, "count"),
    (lambda: InDomain(probability=0.0), ConfigError, "probability=0"),
    (lambda: InDomain(ap.groups.Cells), ConfigError, "groups"),  # pyright: ignore[reportArgumentType]
    (lambda: InDomain()(normed(), TRAIN), ConfigError, "Field"),  # pyright: ignore[reportArgumentType]
    (lambda: InDomain()(ap.Field(normed()), X), ConfigError, "TrainingSet"),  # pyright: ignore[reportArgumentType]
    (lambda: InDomain()(ap.Field(uncopied()), TRAIN), ModelError, "cannot be copied"),
    (lambda: InDomain()(ap.Field(lambda x: x[:, :2]), TRAIN), ConfigError, r"torch\.nn\.Module"),
    (lambda: InDomain()(ap.Field(normed(), site=ap.At("0")), TRAIN), ConfigError, "inner site"),
    (lambda: InDomain()(ap.Field(nn.Softmax(1).eval()), TRAIN), ConfigError, "without parameters"),
    (lambda: InDomain(count=5)(ap.Field(normed()), TRAIN), InputError, r"5 cell\(s\)"),
    (lambda: InDomain()(ap.Field(Fragile().eval()), TRAIN), ConfigError, "not today"),
    (
        lambda: InDomainSingleDeletion(train=TRAIN)(ap.Field(normed()), HERE, ap.External(lambda x, t: x)),
        ConfigError,
        "other models",
    ),
    (
        lambda: InDomainSingleDeletion(train=TRAIN)(ap.Field(nn.Linear(3, 2).double().eval()), X[:, :3], ap.Gradient()),
        InputError,
        "another shape",
    ),
]


@pytest.mark.parametrize(("call", "error", "told"), WRONG)
def test_mistakes_are_named(call: Callable[[], Any], error: type[ApportionError], told: str) -> None:
    with pytest.raises((error, TypeError), match=told):  # tests also check annotations
        call()


def test_an_error_in_training_leaves_no_trace() -> None:
    model, state = Fragile().eval(), torch.random.get_rng_state()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match="not today"):
        QUICK(ap.Field(model), TRAIN)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_an_evaluation_trains_once_for_all_batches_and_explainers() -> None:
    metric = InDomainSingleDeletion(train=TrainingSet(X[:16], TRAIN.y[:16]), tuning=QUICK, seeds=2)
    options: dict[str, Any] = {"quiet": True, "controls": []}
    field, methods = ap.Field(normed()), ["gradient", "gradient_times_input"]
    told = ap.evaluate(methods, field, HERE, {"m": metric}, dry_run=True, **options)
    assert "2 training(s)" in str(told)
    one, two = (ap.evaluate(methods, field, HERE, {"m": metric}, batch=n, **options) for n in (12, 5))
    for name in methods:
        torch.testing.assert_close(one.scores[name]["m"].values, two.scores[name]["m"].values)


def test_a_last_batch_of_one_is_no_batch_of_its_own() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).eval()
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    train, trainer = TrainingSet(x, (x[:, 0] > 0).to(torch.int32)), Trainer(epochs=1, batch=4)
    seen = []
    net[0].register_forward_pre_hook(lambda _, given: seen.append(len(given[0])) if torch.is_grad_enabled() else None)
    FromScratch(net, trainer)(x, train.y, 0)
    assert seen == [4, 5]
    assert InDomain(trainer=trainer)(ap.Field(net), train) is not net
    assert [Trainer(batch=b)._sizes(n) for b, n in ((4, 1), (1, 3), (4, 5), (4, 6), (4, 8))] == [
        [1],
        [1, 1, 1],
        [5],
        [4, 2],
        [4, 4],
    ]


@pytest.mark.filterwarnings("ignore:.*(weight_norm|spectral_norm).*:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_weights_that_stay_learned_are_not_from_scratch(norm: Callable[[nn.Module], nn.Module]) -> None:
    net = nn.Sequential(norm(nn.Linear(4, 8)), nn.ReLU(), nn.Linear(8, 2)).eval()
    with pytest.raises(ConfigError, match=r"0\.weight_\w+ of Linear, which its reset_parameters"):
        FromScratch(net)(TRAIN.x, TRAIN.y, 0)
    x = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    q = ap.Field(net).bind(x)
    model, layers = with_layers(q)
    learned = {n: p.detach().clone() for n, p in model.named_parameters()}
    randomize(model, [p for _, own in layers for p in own], "initialized", 0, learned)
    assert not any(torch.equal(p, learned[n]) for n, p in model.named_parameters())


def test_classes_that_the_model_has_not_are_told_of_the_training_set() -> None:
    train = TrainingSet(TRAIN.x, TRAIN.y + 5)
    with pytest.raises(InputError, match="a TrainingSet of classes 5 to"):
        InDomain()(ap.Field(nn.Linear(4, 2, dtype=torch.float64)), train)


def test_defaults_are_the_sources_but_for_what_is_said() -> None:
    trainer = InDomain().trainer
    assert (trainer.epochs, trainer.lr, trainer.weight_decay) == (30, 1e-4, 1e-4)
