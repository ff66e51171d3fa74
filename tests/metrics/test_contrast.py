"""Contrasts of models and inputs: the source's arithmetic in numpy, planted pictures, maps that must be rejected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import apportion as ap
from apportion.core.errors import ApportionError, ConfigError, InputError
from apportion.metrics import InputDependence, InputIndependence, ModelContrast, Region

P = ap.planted.shapes_on_textures(12)
OBJECT, SCENE = ap.Field(P.object.model), ap.Field(P.scene.model)
SHAPES, TEXTURES = torch.as_tensor(P.object.target), torch.as_tensor(P.scene.target)
AS_OBJECT: dict[str, Any] = {"target": P.object.target, "truth": list(zip(P.masks, TEXTURES, strict=True))}
AS_SCENE: dict[str, Any] = {"target": P.scene.target, "truth": list(zip(P.masks, P.bare, strict=True))}
REPAINTED: dict[str, Any] = {"target": P.object.target, "truth": list(zip(~P.masks, P.repainted, strict=True))}
MCS = ModelContrast(other=P.scene.model)


def network(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 7 * 8, 3))
    return net.double().eval()


X, OTHER = (torch.rand(5, 3, 9, 10, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (0, 1))
ON = torch.rand(5, 9, 10, generator=torch.Generator().manual_seed(2)) < 0.2


def attributed(net: nn.Module, picture: Tensor, target: int, on: Tensor) -> float:
    """A as the authors' code has it: positive parts, percentiles of numpy, the mean over the object."""
    x = picture[None].clone().requires_grad_()
    map_3d = torch.autograd.grad(net(x)[0, target], x)[0][0].permute(1, 2, 0).numpy()
    map_2d = np.sum(map_3d.clip(min=0), axis=2)
    high, low = np.percentile(map_2d, 99), np.min(map_2d)
    scaled = np.clip((map_2d - low) / (high - low), 0, 1)
    return float(np.sum(scaled * on.numpy()) / np.count_nonzero(on.numpy()))


def test_the_models_contrast_is_the_definition_written_out() -> None:
    f, g = network(0), network(1)
    mine, theirs = f(X).argmax(1), g(X).argmax(1)
    wanted = [attributed(f, X[b], int(mine[b]), ON[b]) - attributed(g, X[b], int(theirs[b]), ON[b]) for b in range(5)]
    for truth in (ON, list(zip(ON, theirs.tolist(), strict=True)), [Region.of_mask(m) for m in ON]):
        found = ModelContrast(other=g)(ap.Field(f), X, ap.Gradient(), truth=truth)
        assert found.values.tolist() == pytest.approx(wanted, abs=1e-12)
    wrong = [(m, (int(c) + 1) % 3) for m, c in zip(ON, theirs, strict=True)]
    unlike = ModelContrast(other=g)(ap.Field(f), X, ap.Gradient(), truth=wrong)
    assert bool(unlike.undefined["another class than the one explained"].all())
    assert bool(ModelContrast(other=g, right=False)(ap.Field(f), X, ap.Gradient(), truth=wrong).values.isfinite().all())


def test_inputs_are_compared_as_in_the_definition() -> None:
    f = network(0)
    target = f(X).argmax(1)
    truth = list(zip(ON, OTHER, strict=True))
    each = [[attributed(f, pictures[b], int(target[b]), ON[b]) for b in range(5)] for pictures in (X, OTHER)]
    field, kept = ap.Field(f), (f(OTHER).argmax(1) == target).tolist()
    assert set(kept) == {True, False}
    for metric, rule in (
        (InputDependence(), lambda a, b: b > a),
        (InputIndependence(), lambda a, b: abs(a - b) < 0.1 * a),
        (InputIndependence(tolerance=0.5), lambda a, b: abs(a - b) < 0.5 * a),
    ):
        found = metric(field, X, ap.Gradient(), truth=truth)
        wanted = [float(rule(a, b)) if k else None for a, b, k in zip(*each, kept, strict=True)]
        assert [None if np.isnan(v) else v for v in found.values.tolist()] == wanted
        assert list(found.undefined) == ["another class than the one explained"]
    assert found.parts["before"].tolist() == pytest.approx(each[0], abs=1e-12)
    assert found.parts["after"].tolist() == pytest.approx(each[1], abs=1e-12)
    torch.testing.assert_close(found.parts["change of outputs"], (f(X) - f(OTHER)).detach().norm(dim=1))


@pytest.mark.parametrize("explainer", [ap.Gradient(), ap.GradientTimesInput()])
def test_planted_pictures_have_known_answers(explainer: ap.Explainer) -> None:
    """The object's model reads the object and nothing else, the scene's all but the object."""
    contrast = MCS(OBJECT, P.object.x, explainer, **AS_OBJECT)
    assert torch.equal(contrast.values, torch.ones(12, dtype=torch.float64))
    dependence = InputDependence()(SCENE, P.scene.x, explainer, **AS_SCENE)
    assert torch.equal(dependence.values, torch.ones(12, dtype=torch.float64))
    assert not bool(dependence.parts["with"].any())
    independence = InputIndependence()(OBJECT, P.object.x, explainer, **REPAINTED)
    assert torch.equal(independence.values, torch.ones(12, dtype=torch.float64))
    assert not bool(independence.parts["change of outputs"].any())


class Colored(ap.Gradient):
    """A map of where the picture is colored, whatever the model."""

    def explain(self, q: Any) -> Any:
        return q.attribution(self, (q.x - q.x.mean(1, keepdim=True)).abs())


class Flat(ap.Gradient):
    """A map of ones."""

    def explain(self, q: Any) -> Any:
        return q.attribution(self, torch.ones_like(q.x))


def test_maps_that_know_nothing_of_the_model_are_rejected() -> None:
    for blind in (Colored(), Flat(), ap.controls.Edges(), ap.controls.InputMagnitude()):
        assert not bool(MCS(OBJECT, P.object.x, blind, **AS_OBJECT).values.any())
    dependence = InputDependence()
    assert not bool(dependence(SCENE, P.scene.x, Colored(), **AS_SCENE).values.any())  # the object lights up
    flat = dependence(SCENE, P.scene.x, Flat(), **AS_SCENE)
    assert not bool(flat.values.any())
    assert bool(flat.parts["tied"].all())
    draws = [dependence(SCENE, P.scene.x, ap.controls.Random(), **AS_SCENE, seed=s).values for s in range(8)]
    assert 0.35 < float(torch.stack(draws).mean()) < 0.65
    edges = InputIndependence(tolerance=0.01)(OBJECT, P.object.x, ap.controls.Edges(), **REPAINTED)
    assert float(edges.values.mean()) < 0.5
    # the models the wrong way round
    reversed_ = ModelContrast(other=P.object.model)(
        SCENE, P.scene.x, ap.Gradient(), target=P.scene.target, truth=list(zip(P.masks, SHAPES, strict=True))
    )
    assert torch.equal(reversed_.values, -torch.ones(12, dtype=torch.float64))


def test_functions_are_asked_about_other_inputs() -> None:
    def gradient(x: Tensor, target: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(P.scene.model(x).gather(1, target.reshape(-1, 1)).sum(), x)[0]

    found = InputDependence()(SCENE, P.scene.x, ap.External(gradient), **AS_SCENE)
    assert torch.equal(found.values, torch.ones(12, dtype=torch.float64))


def test_a_map_with_fewer_points_than_the_percentile_cuts_off_is_still_scaled() -> None:
    """One pixel of 200: the 99th percentile is the minimum, by which the source's code divides 0 by 0."""
    m, on = torch.zeros(1, 1, 10, 20), torch.zeros(1, 10, 20, dtype=torch.bool)
    m[0, 0, 3, 4], on[0, 3, 4:6] = 7.0, True
    assert MCS.concept(m, on).tolist() == [0.5]
    assert MCS.concept(-m, on).tolist() == [0.0]


def test_an_evaluation_slices_the_truths(tmp_path: Any) -> None:
    metrics = {"contrast": MCS, "dependence": InputDependence()}
    truth = {"contrast": AS_OBJECT["truth"], "dependence": list(zip(P.masks, P.bare, strict=True))}
    found = ap.evaluate(
        ["gradient"], OBJECT, P.object.x, metrics, truth=truth, batch=5, quiet=True, controls=[], out=tmp_path
    )
    assert torch.equal(found.scores["gradient"]["contrast"].values, torch.ones(12, dtype=torch.float64))
    assert found.scores["gradient"]["dependence"].parts["with"].shape == (12,)


NONE = list(zip(torch.zeros_like(P.masks), P.bare, strict=True))
WRONG: list[tuple[Callable[[], Any], type[ApportionError], str]] = [
    (lambda: ModelContrast(other=3), ConfigError, "as other"),
    (lambda: ModelContrast(other=nn.Linear), ConfigError, "as other"),
    (lambda: InputDependence(percentile=0.0), ConfigError, "percentile"),
    (lambda: InputIndependence(tolerance=-1.0), ConfigError, "tolerance"),
    (lambda: MCS(OBJECT, P.object.x, ap.External(lambda x, t: x), truth=P.masks), ConfigError, "other models"),
    (lambda: MCS(OBJECT, P.object.x, ap.Gradient(), truth=P.masks[:3]), InputError, r"3 truth\(s\)"),
    (lambda: MCS(OBJECT, P.object.x, ap.Gradient(), truth=7), InputError, "one entry an example"),
    (
        lambda: MCS(OBJECT, P.object.x, ap.Gradient(), truth=[(P.masks[0], 1), *P.masks[1:]]),
        InputError,
        "of all, or of none",
    ),
    (
        lambda: MCS(OBJECT, P.object.x, ap.Gradient(), truth=[(m, 0.5) for m in P.masks]),
        InputError,
        "whole numbers",
    ),
    (lambda: InputDependence()(SCENE, P.scene.x, ap.Gradient(), truth=P.masks), InputError, "beside the region"),
    (
        lambda: InputDependence()(SCENE, P.scene.x, ap.Gradient(), truth=[(m, x[:1]) for m, x in AS_SCENE["truth"]]),
        InputError,
        r"\(1, 32, 32\) beside the region of example 0",
    ),
    (
        lambda: InputDependence()(
            ap.Field(lambda x: x.sum((1, 2, 3))), X, ap.Gradient(), truth=list(zip(ON, X, strict=True))
        ),
        InputError,
        "right=False",
    ),
    (lambda: MCS(ap.Field(nn.Linear(3, 2).eval()), torch.rand(1, 3), ap.Gradient(), truth=[1]), InputError, "pictures"),
]


@pytest.mark.parametrize(("call", "error", "told"), WRONG)
def test_mistakes_are_named(call: Callable[[], Any], error: type[ApportionError], told: str) -> None:
    with pytest.raises(error, match=told):
        call()


def test_without_an_object_nothing_is_said() -> None:
    found = InputDependence()(SCENE, P.scene.x, ap.Gradient(), target=P.scene.target, truth=NONE)
    assert bool(found.undefined["no object"].all())
    assert bool(found.values.isnan().all())


def test_defaults_are_the_sources() -> None:
    assert ap.metrics.InputIndependence().tolerance == 0.1
