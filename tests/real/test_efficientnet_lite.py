"""A real pretrained network with the usual traps: reused ReLU6 modules, batch-norm, residual adds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import apportion as ap
from apportion.testing.trace import differences, snapshot

from .conftest import NORMALIZE

CATS = {281, 282, 285}


@pytest.fixture(scope="session")
def field(lite0: nn.Module) -> ap.Field:
    return ap.Field(lite0, bounds=(0, 1), normalize=NORMALIZE)


def test_the_cat_is_a_cat(field: ap.Field, cat: Tensor) -> None:
    q = field.bind(cat)
    assert int(q.target) in CATS


def test_smooth_grad_explains_one_class_on_all_copies(field: ap.Field, cat: Tensor) -> None:
    """Noise changes the top class of many copies; the class explained stays the example's."""
    q = field.bind(cat, ids=["cat"])
    asked: list[int] = []
    tops: list[int] = []

    class Watching(ap.Gradient):
        def explain(self, q: ap.Question) -> ap.Attribution:
            asked.extend(int(t) for t in q.target)
            tops.extend(int(t) for t in q.outputs(q.x, torch.arange(len(q))).argmax(1))
            return super().explain(q)

    ap.SmoothGrad(base=Watching(), samples=25)(field, cat, ids=["cat"])
    assert asked == [int(q.target)] * 25
    assert sum(t != asked[0] for t in tops) >= 5, "the noise must be strong enough for this test to mean something"


def test_alone_and_in_a_batch_and_in_chunks(lite0: nn.Module, pictures: Tensor) -> None:
    """Chunking moves float32 gradients no further than float32 is from float64 (kinks of ReLU6 flip)."""
    options = {"bounds": (0, 1), "normalize": NORMALIZE}
    maps = [
        ap.Gradient()(ap.Field(lite0, batch_size=size, **options), pictures, target=285).values
        for size in (1, 2, "auto")
    ]
    exact = ap.Gradient()(ap.Field(lite0, precision=torch.float64, **options), pictures, target=285).values
    alone = ap.Gradient()(ap.Field(lite0, **options), pictures[1:], target=285).values
    own = float((maps[0].double() - exact).norm() / exact.norm())
    assert own < 0.05
    for other in (*maps[1:], torch.cat([maps[0][:1], alone])):
        assert float((other - maps[0]).norm() / maps[0].norm()) <= own
    in_double = [
        ap.Gradient()(ap.Field(lite0, precision=torch.float64, batch_size=size, **options), pictures, target=285).values
        for size in (1, 2)
    ]
    assert float((in_double[0] - in_double[1]).abs().max() / in_double[0].abs().max()) <= 1e-12


def test_the_model_is_untouched(field: ap.Field, lite0: nn.Module, cat: Tensor) -> None:
    before = snapshot(lite0)
    ap.Gradient()(field, cat)
    ap.GradCAM()(field, cat)
    q = field.bind(cat)
    q.backward(q.x, torch.arange(1), ap.rules.gradient())
    assert differences(before, snapshot(lite0)) == []


def test_the_rules_engine_gives_the_gradient(lite0: nn.Module, cat: Tensor) -> None:
    field = ap.Field(lite0, normalize=NORMALIZE, precision=torch.float64)
    q = field.bind(cat)
    plain = q.value_and_grad(q.x, torch.arange(1))[1]
    ruled = q.backward(q.x, torch.arange(1), ap.rules.gradient())
    std = 128 / 255
    assert torch.allclose(ruled.signal / std, plain, rtol=0, atol=1e-12 * float(plain.abs().max()))


def test_a_rule_set_without_a_rule_for_relu6_refuses_it_by_name(field: ap.Field, cat: Tensor) -> None:
    q = field.bind(cat)
    with pytest.raises(ap.ApportionError, match=r"hardtanh in _swish \(ReLU6\) .* has no rule"):
        q.backward(q.x, torch.arange(1), ap.rules.Rules((("relu", ap.rules.Guided()),)))


def test_a_reused_module_is_an_error_that_lists_its_calls(field: ap.Field, cat: Tensor) -> None:
    site = next(s.site for s in field.sites(cat) if isinstance(s.site, ap.At) and s.site.call == 1)
    assert isinstance(site, ap.At)
    with pytest.raises(ap.ApportionError, match=r"called 2 times (?s:.*)call=0.*call=1"):
        ap.GradCAM(layer=ap.At(site.name))(field, cat)
    assert ap.GradCAM(layer=site)(field, cat).values.ndim == 3


def test_integrated_gradients_tells_its_gap(field: ap.Field, cat: Tensor) -> None:
    a = ap.IntegratedGradients(quadrature=ap.quadrature.Midpoint(16))(field, cat)
    assert a.gap is not None
    assert a.claimed_total is not None
    assert a.gap.item() == pytest.approx(a.values.sum().item() - a.claimed_total.item(), abs=1e-4)
    assert a.references is not None
    assert a.references.top_class is not None
    assert abs(a.gap.item()) > 1e-3, "16 midpoints from black are not complete on this network"


def test_a_gradient_pass_needs_less_memory_than_on_the_users_module() -> None:
    """Peak memory of passes of 8 rows, each in a process of its own."""
    root = Path(__file__).parents[2]

    def peak(who: str) -> float:
        case = {"who": who, "net": "lite0", "size": 224, "examples": 1, "steps": 8, "batch": 8}
        command = [sys.executable, "-m", "benchmarks.memory", "--case", json.dumps(case)]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    field, own = peak("apportion"), peak("bare")
    assert field < own, (field, own)


def test_the_checks_are_kept_from_call_to_call(lite0: nn.Module, cat: Tensor) -> None:
    """Its configuration is in named tuples, which a walk must see through: the second call costs no checks."""
    found = [ap.explain(lite0, cat[..., ::4, ::4], "gradient", normalize=NORMALIZE, target=0) for _ in range(2)]
    assert [a.cost.checks > 0 for a in found] == [True, False]
