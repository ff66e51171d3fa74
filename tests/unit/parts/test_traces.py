"""What traces do where there is nothing to go by: no gradient, no way, no class to reach, no finite value."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import apportion as ap
from apportion import planted
from apportion.core.errors import ConfigError, NonFiniteError, ScoreError
from apportion.core.explainer import Explainer
from apportion.core.question import Question
from apportion.methods.path.agi import AGI
from apportion.methods.path.guided_ig import GuidedIG
from apportion.methods.path.ig2 import IG2
from apportion.methods.path.samp import SAMP
from apportion.parts.accumulate import Split
from apportion.parts.baselines import Constant
from apportion.parts.paths.ascent import Ascent
from apportion.parts.paths.guided import GuidedPath
from apportion.parts.paths.representation import Representation
from apportion.parts.paths.salient import Salient

X = torch.tensor([[0.2, 0.7], [0.6, 0.3]], dtype=torch.float64)


class Flat(nn.Module):
    """Logits that nothing changes below 5."""

    def forward(self, x: Tensor) -> Tensor:
        z = (x.sum(1) - 5).relu()
        return torch.stack([1 + z, z * 2, z * 3], 1)


@pytest.mark.parametrize("method", [GuidedIG(steps=5), SAMP(), AGI(), IG2(steps=5)], ids=lambda m: type(m).__name__)
def test_no_gradient_anywhere_gives_zeros_and_a_warning(method: Explainer) -> None:
    a = method(ap.Field(Flat(), bounds=(0, 1)), X)
    assert not a.values.any()
    assert a.gap is not None
    assert not a.gap.any()
    assert [w for w in a.warnings if "gradient was 0" in w or "did not reach" in w or "no nearer" in w]


@pytest.mark.parametrize(
    "method", [GuidedIG(Constant(0.5), steps=5), SAMP(Constant(0.5)), IG2(Constant(0.5), steps=5)], ids=str
)
def test_input_equal_to_its_baseline_gets_zeros(method: Explainer) -> None:
    x = torch.full((2, 5), 0.5, dtype=torch.float64)
    x[1, 0] = 0.9
    a = method(ap.Field(planted.dense_net()), x, target=0)
    assert not a.values[0].any()
    assert a.values[1].any()
    assert any("equals the input for example(s) 0:" in w for w in a.warnings)


@pytest.mark.parametrize("method", [GuidedIG(steps=5), GuidedIG(steps=5, max_dist=1.0), SAMP(size=1)], ids=str)
def test_features_at_the_end_already_get_nothing(method: Explainer) -> None:
    x = torch.tensor([[0.0, 0.4, 0.0, 0.9, 0.1]], dtype=torch.float64)
    a = method(ap.Field(planted.dense_net()), x, target=0)
    assert (a.values[0] == 0).tolist() == (x[0] == 0).tolist()


def test_failed_attacks_are_counted_and_kept_apart() -> None:
    layer = nn.Linear(2, 3).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.1]]))
        layer.bias.copy_(torch.tensor([0.8, 0.0, 0.0]))
    a = AGI()(ap.Field(layer, bounds=(0, 1)), X[:1])
    assert a.parts["classes"].tolist() == [[1, 2]]
    assert a.parts["success"].tolist() == [[True, False]]
    assert any("did not reach 1 of 2 classes" in w for w in a.warnings)
    assert not any("no bounds" in w for w in a.warnings)


def test_fewer_classes_than_asked_are_all_taken() -> None:
    a = AGI()(ap.Field(planted.dense_net()), torch.ones(1, 5, dtype=torch.float64))
    assert any("2 other class(es) to climb, fewer than topk = 15" in w for w in a.warnings)
    assert any("no bounds hold" in w for w in a.warnings)
    top = int(a.target[0])
    assert a.parts["classes"][0].tolist() == [c for c in range(3) if c != top]


def test_grid_takes_even_ids_without_the_predicted_and_the_explained_class() -> None:
    layer = nn.Linear(2, 30).double()
    with torch.no_grad():
        layer.weight.fill_(0.01)
        layer.bias.copy_(-torch.arange(30.0))
    field = ap.Field(layer)
    assert Ascent(topk=5)._choose(field.bind(X[:1]))[0].tolist() == [6, 12, 18, 24, 1]
    assert Ascent(topk=5)._choose(field.bind(X[:1], target=12))[0].tolist() == [6, 18, 24, 1, 2]


def test_random_classes_are_the_examples_own() -> None:
    layer = nn.Linear(2, 30).double()
    way, field = Ascent(topk=7, classes="random"), ap.Field(layer)
    both = way._choose(field.bind(X, ids=["a", "b"], seed=3))
    alone = way._choose(field.bind(X[1:], ids=["b"], seed=3))
    assert both.shape == (2, 7)
    assert torch.equal(both[1], alone[0])
    assert len(set(both[0].tolist())) == 7
    assert not torch.equal(both[0], both[1])
    assert not torch.equal(both, way._choose(field.bind(X, ids=["a", "b"], seed=4)))


@pytest.mark.parametrize("method", [GuidedIG(steps=5), SAMP(direction="insert")], ids=lambda m: type(m).__name__)
def test_an_infinite_gradient_at_the_baseline_says_what_to_do(method: Explainer) -> None:
    with pytest.raises(NonFiniteError, match="start from a baseline where the gradient is finite"):
        method(ap.Field(planted.RootSum(), precision=torch.float64), X)


def test_ascent_needs_classes() -> None:
    with pytest.raises(ScoreError, match="Ascent on"):
        AGI()(ap.Field(planted.dense_net(), score=ap.Neuron(ap.At("0"), (1,))), torch.ones(1, 5, dtype=torch.float64))
    field = ap.Field(planted.dense_net(), score=ap.Probability(multilabel=True))
    with pytest.raises(ScoreError, match="exclude none"):
        AGI()(field, torch.ones(1, 5, dtype=torch.float64), target=0)


def test_probabilities_as_outputs_are_told() -> None:
    model = nn.Sequential(planted.dense_net(), nn.Softmax(1))
    a = AGI()(ap.Field(model), torch.ones(1, 5, dtype=torch.float64))
    assert any("look like probabilities" in w for w in a.warnings)


def test_representation_is_what_the_last_linear_layer_is_given() -> None:
    q = ap.Field(planted.dense_net()).bind(torch.ones(1, 5, dtype=torch.float64))
    assert Representation()._site(q) == ap.At("2", 0, "input")
    a = IG2(steps=3)(ap.Field(Flat()), X)
    assert any("has no nn.Linear" in w for w in a.warnings)


def test_starting_points_are_there_only_after_the_walk() -> None:
    q: Question = ap.Field(planted.dense_net()).bind(torch.ones(1, 5, dtype=torch.float64))
    with pytest.raises(ConfigError, match="before its legs were read"):
        Split().gather(q, Ascent().walk(q))


def test_a_salient_path_cut_short_says_so_and_is_whole() -> None:
    path = Salient(size=1, eta=1, momentum=0.0, max_steps=2)
    x = torch.ones(1, 5, dtype=torch.float64)
    a = ap.IDGI(path)(ap.Field(planted.dense_net()), x, target=0)
    assert any("features left after 2 steps" in w for w in a.warnings)
    assert a.gap is not None
    assert float(a.gap.abs().max()) < 1e-12


def test_trees_of_inputs_are_walked_as_one() -> None:
    net, x = planted.dense_net(), torch.rand(2, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole, split = ap.Field(net), ap.Field(lambda a, b: net(torch.cat([a.reshape(len(a), -1), b], 1)))
    parts = (x[:, :2].reshape(2, 1, 2), x[:, 2:])
    for method in (GuidedIG(steps=5), AGI(iterations=3), SAMP(size=1, eta=0.5)):
        one, two = method(whole, x, target=1).values, method(split, parts, target=1).values
        torch.testing.assert_close(one, torch.cat([two[0].reshape(2, 2), two[1]], 1))


def test_guided_choice_scales_to_pictures() -> None:
    generator = torch.Generator().manual_seed(0)
    slope, delta = (torch.rand(2, 150_528, generator=generator) for _ in range(2))
    path, alpha = GuidedPath(), torch.zeros(2, 150_528)
    for step in range(1, 4):
        alpha = path._advance(alpha, slope, delta, step)
        left = ((1 - alpha) * delta).double().sum(1) / delta.double().sum(1)
        torch.testing.assert_close(left, torch.full((2,), 1 - step / 200).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: GuidedPath(fraction=1.5),
        lambda: GuidedPath(max_dist=-0.1),
        lambda: GuidedPath(steps=0),
        lambda: Salient(size=1.5),
        lambda: Salient(momentum=1.0),
        lambda: Representation(eta=0.0),
        lambda: Ascent(topk=0),
    ],
)
def test_impossible_options_are_refused(wrong) -> None:
    with pytest.raises(ConfigError):
        wrong()
