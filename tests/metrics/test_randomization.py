"""Randomization: what it does to the parameters, exact similarities, and explainers it must tell apart."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import apportion as ap
from apportion.core.errors import InputError, ModelError
from apportion.metrics import (
    EffectiveRandomization,
    GradientHistograms,
    ParameterRandomization,
    RandomLogit,
    RankSimilarity,
    StructuralSimilarity,
)
from apportion.metrics.randomization.layers import randomize, restore, with_layers


def some(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Odd(nn.Module):
    """Bare parameters, a normalization, and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.gain = nn.Parameter(torch.rand(6) + 1)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second((self.norm(self.first(x)) * self.gain).tanh()).tanh())


def odd() -> Odd:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Odd().double().eval()


# -- what is randomized -----------------------------------------------------------------------------


def test_layers_in_order_with_bare_and_tied_parameters() -> None:
    model, layers = with_layers(ap.Field(odd()).bind(some(2, 6)))
    names = [(name, sorted(own)) for name, own in layers]
    assert names == [
        ("first", ["first.bias", "first.weight", "norm.bias", "norm.weight"]),
        ("(itself)", ["gain"]),
        ("second", ["second.bias"]),
        ("head", ["head.bias", "head.weight"]),
    ]
    assert {p for _, own in layers for p in own} == {n for n, _ in model.named_parameters()}


@pytest.mark.parametrize("draw", ["redrawn", "shuffled"])
def test_parameters_get_new_numbers_of_the_same_size(draw: Any) -> None:
    """Each layer its own: one seed for all would give equal layers equal numbers."""
    layers = [nn.Linear(40, 40).double() for _ in range(2)]
    net = nn.Sequential(*layers)
    net[1].load_state_dict(net[0].state_dict())
    learned = {n: p.detach().clone() for n, p in net.named_parameters()}
    randomize(net, ["0.weight", "1.weight"], draw, 0, learned)
    one, other = layers[0].weight.detach(), layers[1].weight.detach()
    assert not torch.equal(one, other)
    assert torch.equal(layers[0].bias, learned["0.bias"])
    assert float(one.std() / learned["0.weight"].std()) == pytest.approx(1, abs=0.06)
    same = torch.equal(one.flatten().sort().values, learned["0.weight"].flatten().sort().values)
    assert same == (draw == "shuffled")
    assert not torch.equal(one, learned["0.weight"])
    restore(net, learned)
    assert torch.equal(layers[0].weight, learned["0.weight"])


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_layers_are_met_in_the_order_in_which_they_run() -> None:
    """Whichever is defined first: the head is the output's layer."""

    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused, self.head, self.body = nn.Linear(2, 2), nn.Linear(5, 3), nn.Linear(6, 5)
            self.shift = nn.Parameter(torch.ones(5))

        def forward(self, x: Tensor) -> Tensor:
            return self.head((self.body(x) + self.shift).tanh())

    q = ap.Field(Backwards().double()).bind(some(2, 6))
    before = q.cost.forward.tolist()
    assert [name for name, _ in with_layers(q)[1]] == ["body", "(itself)", "head", "unused"]
    assert q.cost.forward.tolist() == before  # it is a look at the model
    assert not q.warnings
    q = ap.Field(Backwards().double(), precision=torch.float32).bind(some(2, 6))  # runs with other tensors
    assert [name for name, _ in with_layers(q)[1]] == ["body", "(itself)", "head", "unused"]
    assert not q.warnings
    scripted = torch.jit.script(nn.Sequential(nn.Linear(6, 3), nn.Tanh()).double())  # which shows no operations
    q = ap.Field(scripted).bind(some(2, 6))
    with_layers(q)
    assert any("order of definition" in w for w in q.warnings)


def test_initialization_is_drawn_as_modules_do() -> None:
    first, norm, second = nn.Linear(50, 40), nn.LayerNorm(40), nn.Linear(40, 40)
    net = nn.Sequential(first, norm, second).double()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(10).add_(0.3)
    learned = {n: p.detach().clone() for n, p in net.named_parameters()}
    state = torch.random.get_rng_state()
    randomize(net, list(learned), "initialized", 0, learned)
    assert torch.equal(state, torch.random.get_rng_state())
    for layer in (first, second):
        bound = layer.in_features**-0.5
        for p in (layer.weight.detach(), layer.bias.detach()):
            assert float(p.abs().max()) <= bound
        assert float(layer.weight.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.1)
    assert not torch.equal(first.weight[:, :40], second.weight)
    assert not torch.equal(norm.weight, torch.ones(40).double())


def test_constant_parameters_change_too() -> None:
    """Quantus resets normalizations to ones and zeros, and leaves bare parameters as they are."""
    norm = nn.LayerNorm(3)
    net = nn.Sequential(nn.Linear(3, 3), norm)
    learned = {n: p.detach().clone() for n, p in net.named_parameters()}
    for draw in ("redrawn", "shuffled"):
        randomize(net, ["1.weight", "1.bias"], draw, 0, learned)
        assert not torch.equal(norm.weight, learned["1.weight"])
        assert not torch.equal(norm.bias, learned["1.bias"])


# -- the metric -------------------------------------------------------------------------------------


def test_stage_by_stage_as_written_down() -> None:
    """A loop over layers from the output on, each explained alone."""
    net, x = odd(), some(3, 6)
    found = ParameterRandomization()(ap.Field(net), x, ap.Gradient(), target=[0, 1, 2], seed=3)
    own = ap.Gradient()(ap.Field(net), x, target=[0, 1, 2]).values
    copied, learned = copy.deepcopy(net), {n: p.detach().clone() for n, p in net.named_parameters()}
    stages = [["head.weight", "head.bias"], ["second.bias"], ["gain"]]
    stages.append(["first.weight", "first.bias", "norm.weight", "norm.bias"])
    for i, names in enumerate(stages):
        randomize(copied, names, "redrawn", 3, learned)
        made = ap.Gradient()(ap.Field(copied), x, target=[0, 1, 2]).values
        want = [np.corrcoef(a.argsort().argsort(), b.argsort().argsort())[0, 1] for a, b in zip(own, made, strict=True)]
        assert found.curves["similarity"].y[:, i].tolist() == pytest.approx(want)
    assert torch.equal(found.values, found.curves["similarity"].y.mean(1))  # the network itself is not in the mean


def test_what_does_not_look_at_the_network_is_found_out() -> None:
    net, x = odd(), some(4, 6)
    beside = [ap.controls.InputMagnitude(), ap.controls.Random()]
    found = ParameterRandomization()(ap.Field(net), x, ap.Gradient(), controls=beside)
    assert found.controls["InputMagnitude"].values.tolist() == pytest.approx([1] * 4)
    assert found.controls["Random"].values.tolist() == pytest.approx([1] * 4)  # the same noise for the same example
    assert bool((found.values < 0.9).all())
    assert found.against(found.controls["InputMagnitude"]).interval[1] < 0


def test_independent_stages_start_from_the_learned_network() -> None:
    net, x = odd(), some(2, 6)
    alone = ParameterRandomization("independent")(ap.Field(net), x, ap.Gradient()).curves["similarity"].y
    down = ParameterRandomization("top_down")(ap.Field(net), x, ap.Gradient()).curves["similarity"].y
    up = ParameterRandomization("bottom_up")(ap.Field(net), x, ap.Gradient()).curves["similarity"].y
    assert torch.allclose(alone[:, 0], up[:, 0])
    assert torch.allclose(down[:, -1], up[:, -1])  # all layers
    assert alone.shape == down.shape == (2, 4)
    assert ParameterRandomization(stages=2)(ap.Field(net), x, ap.Gradient()).curves["similarity"].y.shape == (2, 2)


def test_noisy_copies_are_averaged_before_maps_are_compared() -> None:
    """The mean over copies x + noise · range · n, with the same n for both networks, written out."""
    net, x = odd(), some(2, 6)
    copied, learned = copy.deepcopy(net), {n: p.detach().clone() for n, p in net.named_parameters()}
    randomize(copied, list(learned), "redrawn", 1, learned)
    q = ap.Field(net).bind(x, target=0, seed=1)
    means = []
    for model in (net, copied):
        made = []
        for draw in range(4):
            n = q.stream("noise").normal(x, torch.arange(2), torch.full((2,), draw))
            span = (x.amax(1) - x.amin(1))[:, None]
            made.append(ap.Gradient()(ap.Field(model), x + 3.0 * span * n, target=0).values)
        means.append(torch.stack(made).mean(0))
    found = ParameterRandomization(stages=1, samples=4, noise=3.0)(ap.Field(net), x, ap.Gradient(), target=0, seed=1)
    assert found.values.tolist() == pytest.approx(RankSimilarity()(*means).tolist())
    plain = ParameterRandomization(stages=1)(ap.Field(net), x, ap.Gradient(), target=0, seed=1)
    assert not torch.allclose(plain.values, found.values)


def test_the_complexity_of_a_random_networks_map() -> None:
    net, x = odd(), some(3, 6)
    found = EffectiveRandomization(bins=4)(ap.Field(net), x, ap.Gradient(), target=0)
    maps = ap.Gradient()(ap.Field(net), x, target=0).values
    for i in range(3):
        counts = np.histogram(maps[i].numpy(), bins=4)[0] / 6
        assert found.parts["learned"][i].item() == pytest.approx(-sum(c * np.log(c) for c in counts if c))
    flat = EffectiveRandomization()(ap.Field(net), x, ap.controls.AllOnes())
    assert flat.undefined["a map of one value"].all()


def test_bins_by_the_rule_of_freedman_and_diaconis() -> None:
    """Those of the learned network's map, for both."""
    net, x = nn.Sequential(nn.Linear(300, 2)).double(), some(3, 300)
    found = EffectiveRandomization(bins=None)(ap.Field(net), x, ap.GradientTimesInput(), target=0)
    model, layers = with_layers(ap.Field(net).bind(x, target=0))
    learned = {n: p.detach().clone() for n, p in model.named_parameters()}
    randomize(model, [p for _, own in layers for p in own], "redrawn", 0, learned)
    for part, used in (("learned", net), ("random", model)):
        maps = ap.GradientTimesInput()(ap.Field(used), x, target=0).values.numpy()
        own = ap.GradientTimesInput()(ap.Field(net), x, target=0).values.numpy()
        for i in range(3):
            low, high = np.quantile(own[i], (0.25, 0.75))
            bins = int(np.clip(np.ceil(np.ptp(own[i]) / (2 * (high - low) * 300 ** (-1 / 3))), 10, 200))
            counts = np.histogram(maps[i], bins=bins)[0] / 300
            assert found.parts[part][i].item() == pytest.approx(-sum(c * np.log(c) for c in counts if c))
            assert 10 < bins < 200


def test_complexity_rises_by_what_randomization_adds() -> None:
    """(after - before) / before: a network of few weights gets many; a map that asks no network gains nothing."""
    net, x = nn.Linear(60, 2).double(), some(3, 60)
    with torch.no_grad():
        net.weight[:, 3:] = 0
    field = ap.Field(net)
    found = EffectiveRandomization(bins=20)(field, x, ap.Gradient(), target=0)
    before, after = found.parts["learned"], found.parts["random"]
    torch.testing.assert_close(found.values, (after - before) / before)
    assert bool((found.values > 1).all())
    blind = EffectiveRandomization(bins=20)(field, x, ap.controls.InputMagnitude(), target=0)
    assert blind.values.tolist() == [0, 0, 0]


def test_classes_that_share_their_map_and_classes_that_do_not() -> None:
    two = ap.Field(lambda x: torch.stack([x.sum(1), -x.sum(1), (x * torch.arange(6)).sum(1)], 1))
    x = some(3, 6)
    blind = RandomLogit(None)(two, x, ap.controls.InputMagnitude(), target=0)
    assert blind.values.tolist() == pytest.approx([1, 1, 1])
    assert RandomLogit(None)(two, x, ap.GradientTimesInput(), target=0).parts["each"].shape == (3, 2)
    seeing = RandomLogit(None, RankSimilarity(absolute=True))(two, x, ap.GradientTimesInput(), target=0)
    assert bool((seeing.values < 1).all())
    with pytest.raises(InputError, match="classes"):
        RandomLogit()(ap.Field(lambda x: x.sum(1)), x, ap.Gradient())


def test_models_without_parameters_are_refused() -> None:
    with pytest.raises(ModelError, match=r"nn\.Module"):
        ParameterRandomization()(ap.Field(lambda x: x.sum(1)), some(1, 3), ap.Gradient())
    with pytest.raises(ModelError, match="without parameters"):
        ParameterRandomization()(ap.Field(nn.Flatten()), some(1, 3), ap.Gradient(), target=0)


# -- similarities -----------------------------------------------------------------------------------


def test_similarities_against_scikit_image() -> None:
    from skimage.feature import hog
    from skimage.metrics import structural_similarity

    a, b = some(2, 3, 32, 40), some(2, 3, 32, 40, seed=2)
    b = b + a
    ssim, hogs = StructuralSimilarity()(a, b), GradientHistograms()(a, b)
    for i in range(2):
        one, other = (((m := v[i].sum(0).numpy()) - m.min()) / (m.max() - m.min()) for v in (a, b))
        want = structural_similarity(
            one, other, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0, full=True
        )[1][5:-5, 5:-5].mean()
        assert ssim[i].item() == pytest.approx(want, abs=1e-9)
        cells = [hog(v[i].sum(0).numpy(), pixels_per_cell=(8, 8)) for v in (a, b)]
        assert hogs[i].item() == pytest.approx(np.corrcoef(*cells)[0, 1])
    for same in (StructuralSimilarity(), GradientHistograms(), RankSimilarity()):
        assert same(a, a).tolist() == pytest.approx([1, 1])
        assert same(a, torch.ones_like(a)).isnan().all()
    assert RankSimilarity()(a, -a).tolist() == pytest.approx([-1, -1])
    assert RankSimilarity(absolute=True)(a, -a).tolist() == pytest.approx([1, 1])
    for picky in (StructuralSimilarity(), GradientHistograms()):
        with pytest.raises(InputError, match="pixels"):
            picky(a[..., :8, :8], b[..., :8, :8])
        with pytest.raises(InputError, match="pictures"):
            picky(some(2, 6), some(2, 6))


def test_a_copy_with_other_weights_is_checked_once() -> None:
    """One pass shows the layers' order, once for all calls; copies run as the model does, batch-norms folded."""
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten()
    net, x = nn.Sequential(*layers, nn.Linear(16, 3)).eval(), torch.rand(2, 1, 6, 6)

    def judged(stages: int | None) -> ap.metrics.Scores:
        metric = ap.metrics.ParameterRandomization(stages=stages)
        return metric(ap.Field(net), x, ap.Gradient(), target=0)

    one, every = judged(1), judged(None)
    assert every.curves["similarity"].y.shape[1] > 1
    assert (one.cost.checks, every.cost.checks) == (1, 0)
    assert torch.allclose(every.curves["similarity"].y[:, -1], one.curves["similarity"].y[:, -1], atol=1e-6)


def test_a_copy_runs_as_checks_have_shown_of_the_model() -> None:
    """Where folding was given up, it stays so."""
    net, x = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten()).eval(), torch.rand(2, 1, 4, 4)
    field = ap.Field(net)
    for is_on in (True, False):
        field.bind(x, target=0)
        other = field.with_copy(copy.deepcopy(net))
        assert other.bind(x, target=0).cost.checks == 0
        plan, own = other.twin().plan, field.twin().plan
        assert plan is not None
        assert own is not None
        assert plan.is_on == own.is_on == is_on
        own.give_up("for a test")


def test_a_copy_folds_its_own_weights_and_is_asked_anew() -> None:
    """Batch-norms are folded with what the copy holds at the time; f(x) is not that of other weights."""
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    net, x = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 3)).eval(), torch.rand(2, 1, 4, 4)
    field = ap.Field(net)
    q, model = field.bind(x, target=0), copy.deepcopy(net)
    other = field.with_copy(model).bind(x, target=0)
    assert other.field.twin().module is model
    assert str(other.field.twin().plan) == str(field.twin().plan)
    assert "2 batch-norm(s)" in str(other.field.twin().plan)
    assert torch.allclose(other.fx, q.fx)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p))
    again = other.rewritten()
    assert torch.allclose(again.fx, model(x)[:, 0], rtol=1e-4)
    assert not torch.allclose(again.fx, q.fx, rtol=0.1)
    assert torch.allclose(q.value(x, q.owners), net(x)[:, 0], rtol=1e-4)
    assert again.cost.at_x.tolist() == [1, 1]


def test_values_at_an_inner_site_are_those_of_the_randomized_network() -> None:
    """Layers below the site change what is explained there."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).eval(), torch.rand(2, 5)
    field = ap.Field(net, site=ap.At("0"))
    found = ap.metrics.ParameterRandomization("bottom_up")(field, x, ap.GradientTimesInput(), target=1)
    own = ap.GradientTimesInput()(field, x, target=1).values
    model, layers = with_layers(field.bind(x, target=1))
    learned = {n: p.detach().clone() for n, p in model.named_parameters()}
    for i, (_, names) in enumerate(layers):
        randomize(model, names, "redrawn", 0, learned)
        made = ap.GradientTimesInput()(ap.Field(model, site=ap.At("0")), x, target=1).values
        assert found.curves["similarity"].y[:, i].tolist() == pytest.approx(RankSimilarity()(own, made).tolist())


@pytest.mark.parametrize("absolute", [False, True])
def test_many_maps_against_one(absolute: bool) -> None:
    a, *many = (some(3, 4), some(3, 4).flip(1), some(3, 4) ** 2, torch.ones(3, 4))
    for similarity in (RankSimilarity(absolute), StructuralSimilarity(absolute)):
        pictures = isinstance(similarity, StructuralSimilarity)
        maps = [m.repeat(1, 40).reshape(3, 1, 10, 16).repeat(1, 1, 2, 1) if pictures else m for m in (a, *many)]
        to = similarity.to(maps[0])
        for m in maps[1:]:
            assert torch.equal(to(m).nan_to_num(7), similarity(maps[0], m).nan_to_num(7))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_models_that_keep_what_a_pass_computed_are_copied() -> None:
    """Torch's older `weight_norm` leaves a weight with a graph among the attributes, which deepcopy refuses."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inner = nn.utils.weight_norm(nn.Linear(6, 8))
        net = nn.Sequential(inner, nn.Tanh(), nn.Linear(8, 3)).eval()
    x = torch.rand(3, 6, generator=torch.Generator().manual_seed(1))
    net(x)
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(net)
    found = ap.metrics.ParameterRandomization(stages=1)(ap.Field(net), x, ap.Gradient())
    assert bool((found.values < 0.99).all())
    assert bool(ap.metrics.EffectiveRandomization()(ap.Field(net), x, ap.Gradient()).values.isfinite().all())


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_initialization_that_another_parameter_overwrites_is_redrawn() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 3)).eval()
    model, layers = with_layers(ap.Field(net).bind(torch.rand(2, 6)))
    learned = {n: p.detach().clone() for n, p in model.named_parameters()}
    randomize(model, [p for _, own in layers for p in own], "initialized", 0, learned)
    assert all(bool(p.isfinite().all()) and not torch.equal(p, learned[n]) for n, p in model.named_parameters())
