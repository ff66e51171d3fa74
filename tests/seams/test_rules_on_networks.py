"""What benchmarks/results/rules.md promises, on the same networks; test_deep_lift_networks has its DeepLIFT."""

from __future__ import annotations

import pytest
import torch
from benchmarks import rules
from benchmarks.networks import NETWORKS, RELU_ONLY, TRANSFORMERS, make, without_constants

import apportion as ap
from apportion.core.errors import RuleError

SMALL = [n for n in NETWORKS if n != "lite0"]


@pytest.fixture(autouse=True)
def _has_transformers(request: pytest.FixtureRequest) -> None:
    if request.node.callspec.params["name"] in TRANSFORMERS:
        pytest.importorskip("transformers")


@pytest.mark.parametrize("name", RELU_ONLY)
def test_guided_backprop_whatever_the_spelling(name: str) -> None:
    assert rules.spellings(name) == 0


@pytest.mark.parametrize("name", [n for n in SMALL if n not in RELU_ONLY])
def test_other_networks_are_refused_by_name(name: str) -> None:
    net = make(name, rows=1)
    for explainer in (ap.GuidedBackprop(), ap.Deconvnet()):
        with pytest.raises(RuleError, match=r"the operation [\w.]+ in .* has no rule"):
            explainer(ap.Field(net.model), net.x)


@pytest.mark.parametrize("name", SMALL)
def test_relevance_is_conserved_without_constants(name: str) -> None:
    assert rules.conservation(name, ap.rules.cp_lrp()) <= 1e-3
    if name in RELU_ONLY:
        assert rules.conservation(name, ap.rules.epsilon()) <= 1e-3


@pytest.mark.parametrize("name", ["vgg", "bert"])
def test_biases_absorb_relevance(name: str) -> None:
    """What the test above measures is not 0 by construction."""
    net, freed = make(name), make(name)
    without_constants(freed.model)
    gaps = []
    for model in (net.model, freed.model):
        done = ap.Field(model).bind(net.x).backward(net.x, torch.arange(2), ap.rules.cp_lrp())
        gaps.append(float((rules.each(done.relevance) / done.value - 1).abs().max()))
    assert gaps[0] > 100 * gaps[1]


@pytest.mark.parametrize("name", SMALL)
def test_full_grad_is_complete(name: str) -> None:
    assert rules.full_grad(name) <= 1e-9
