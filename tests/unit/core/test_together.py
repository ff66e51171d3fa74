"""Several methods in one call: the same results as one by one, from fewer passes."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import apportion as ap
from apportion.core import evaluation, tree
from apportion.core.errors import ConfigError, NoGradientPathError
from apportion.core.explainer import Explainer
from apportion.core.together import answers
from apportion.parts.accumulate import Accumulator
from apportion.show.page import passes

Gauss, Left, Straight = ap.quadrature.Gauss, ap.quadrature.Left, ap.paths.Straight


class Attention(nn.Module):
    """A tiny transformer block behind a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8)
        self.block, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(self.stem(x).flatten(2).transpose(1, 2))
        return self.head((z + self.block(z, z, z)[0]).mean(1))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


@pytest.fixture(params=[convolutional, Attention], ids=["convolutional", "attention"])
def net(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return request.param().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def same(a: ap.Attribution, b: ap.Attribution) -> None:
    """Everything but what was shared is the same, to the bit."""
    names = ("values", "value", "claimed_total", "parts", "target")
    for name in names:
        one, two = (tree.tensors(getattr(r, name)) for r in (a, b))
        assert len(one) == len(two), name
        for s, t in zip(one, two, strict=True):
            assert torch.equal(s, t), f"{name}: {float((s - t).abs().max())}"
    assert a.engine == b.engine
    for kind in ("forward", "backward", "at_x"):
        assert torch.equal(getattr(a.cost, kind), getattr(b.cost, kind)), kind
    assert a.warnings == b.warnings
    assert a.method == b.method
    assert (a.kind, a.domain, a.seed, a.cautions) == (b.kind, b.domain, b.seed, b.cautions)
    assert list(a.parts) == list(b.parts)
    assert (a.references is None) == (b.references is None)
    if a.references is not None and b.references is not None:
        assert torch.equal(a.references.value, b.references.value)


class Rows:
    """Counts rows at a model's door, and those that come back."""

    def __init__(self, net: nn.Module) -> None:
        self.forward = self.backward = 0

        def back(grad: Tensor) -> None:
            self.backward += len(grad)

        def seen(_: nn.Module, args: tuple[Tensor], out: Tensor) -> None:  # a function: methods are copied with models
            self.forward += len(args[0])
            if out.requires_grad:
                out.register_hook(back)

        net.register_forward_hook(seen)


def together(net: nn.Module, x: Tensor, explainers: Sequence[Explainer], **options: Any) -> list[ap.Attribution]:
    """Explain together, and hold the sum of the accounts to what the model saw."""
    seen = Rows(net)
    first = ap.Field(net, batch_size=4).bind(x, target=options.get("target"))  # what checking the model takes
    checks = first.cost.checks
    assert seen.forward >= checks
    seen.forward = seen.backward = 0
    found = ap.explain(net, x, list(explainers), batch_size=4, **options)
    own = [a.cost.own for a in found]
    assert sum(int(c.forward.sum() + c.at_x.sum()) + c.checks for c in own) == seen.forward
    back = sum(int(c.backward.sum()) for c in own)
    looks = sum(c.checks for c in own) - checks  # some of them go back, too
    assert back <= seen.backward <= back + looks
    return found


def check(net: nn.Module, x: Tensor, explainers: Sequence[Explainer], **options: Any) -> list[ap.Attribution]:
    """Explain together and one by one, and compare; once more with fast passes, which the hooks of a count forbid."""
    counted = copy.deepcopy(net)
    found = together(counted, x, explainers, **options)
    fast = ap.explain(net, x, list(explainers), batch_size=4, **options)
    for explainer, a, b in zip(explainers, found, fast, strict=True):
        same(a, explainer(ap.Field(counted, batch_size=4), x, **options))
        same(b, explainer(ap.Field(net, batch_size=4), x, **options))
        assert a.engine != b.engine or not any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    return found


SHARING: dict[str, tuple[Explainer, ...]] = {
    "at x": (ap.Gradient(), ap.GradientTimesInput()),
    "one path": (
        ap.IntegratedGradients(quadrature=Left(6)),
        ap.SplitIG(quadrature=Left(6)),
        ap.IDGI(Straight(quadrature=Left(6))),
    ),
    "one path of several branches": (
        ap.IntegratedGradients(ap.baselines.Noise(0.5, count=2), Left(4)),
        ap.SplitIG(ap.baselines.Noise(0.5, count=2), Left(4), 0.5),
        ap.IDGI(Straight(ap.baselines.Noise(0.5, count=2), quadrature=Left(4))),
    ),
    "copies": (ap.SmoothGrad(samples=3), ap.VarGrad(samples=3), ap.SmoothGradSquared(samples=3)),
    "baselines": (
        ap.IntegratedGradients(quadrature=Gauss(3)),
        ap.GradientTimesInput(),
        ap.IDGI(Straight(quadrature=Left(3))),
    ),
    "adaptive": (
        ap.IntegratedGradients(quadrature=ap.quadrature.Adaptive(max_passes=12)),
        ap.SplitIG(quadrature=ap.quadrature.Adaptive(max_passes=12)),
        ap.IDGI(Straight(quadrature=ap.quadrature.Adaptive(max_passes=12))),
    ),
    "an example met twice": (ap.GradientTimesInput(), ap.GradientTimesInput()),
}

CAMS: dict[str, tuple[Explainer, ...]] = {
    "cams": (ap.GradCAM(), ap.LayerCAM(), ap.HiResCAM(), ap.EigenCAM(), ap.XGradCAM(), ap.GradCAMPlusPlus()),
    "cams and gradients": (ap.GradCAM(), ap.Gradient(), ap.HiResCAM(), ap.GradientTimesInput()),
    "layers": (ap.LayerCAM(ap.At("1")), ap.LayerCAM(ap.At("4")), ap.CAM(), ap.Gradient()),
    "guided": (ap.GuidedGradCAM(), ap.GuidedBackprop(), ap.GradCAM(), ap.ScoreCAM()),
}


@pytest.mark.parametrize("group", SHARING)
@pytest.mark.parametrize("target", [None, 2])
def test_together_is_as_one_by_one(net: nn.Module, x: Tensor, group: str, target: int | None) -> None:
    found = check(net, x, SHARING[group], target=target)
    assert all(a.cost.shared is not None for a in found[1:])


@pytest.mark.parametrize("group", CAMS)
def test_layers_and_gradients_together(x: Tensor, group: str) -> None:
    torch.manual_seed(0)
    for pair in zip(CAMS[group], CAMS[group][1:], strict=False):
        first, second = check(convolutional().eval(), x, pair, target=1)
        assert first.cost.shared is None
        assert second.cost.shared is not None
        looks_inside = [not isinstance(e, ap.Gradient | ap.GradientTimesInput) for e in pair]
        if looks_inside[0] == looks_inside[1] and not isinstance(pair[0], ap.GuidedBackprop):
            assert int(second.cost.shared.forward.min()) >= 1, pair
    check(convolutional().eval(), x, CAMS[group], target=1)


def test_all_registered_methods_together(x: Tensor) -> None:
    torch.manual_seed(0)
    net = convolutional().eval()
    options = {"batch_size": 4, "bounds": (0, 1)}
    names = [name for name, card in ap.methods().items() if ap.Need.VECTORS not in card.needs]
    methods = [ap.method(name).variants()[0].fitted(ap.Field(net, **options), x) for name in names]
    failed = 0
    for explainer, a in zip(methods, answers(ap.Field(net, **options), x[:2], methods, target=1), strict=True):
        if isinstance(a, Exception):
            failed += 1
            with pytest.raises(type(a)):
                explainer(ap.Field(net, **options), x[:2], target=1)
        else:
            same(a, explainer(ap.Field(net, **options), x[:2], target=1))
    assert failed < len(methods) / 4


def sums(found: Sequence[ap.Attribution]) -> tuple[int, int]:
    """Rows forward, f(x) included, and backward of one example over all results."""
    own = [a.cost.own for a in found]
    return sum(int(c.forward[0] + c.at_x[0]) for c in own), sum(int(c.backward[0]) for c in own)


@pytest.mark.parametrize(
    ("explainers", "rows"),
    [
        ((ap.Gradient(), ap.GradientTimesInput(), ap.GradCAM(), ap.HiResCAM()), (2, 1)),  # one pass and f(x')
        (SHARING["one path"], (8, 6)),  # six nodes, f(x') and f(x)
        (SHARING["copies"], (4, 3)),  # three copies, f(x)
        ((ap.LayerCAM(ap.At("1")), ap.LayerCAM(ap.At("4")), ap.EigenCAM()), (1, 1)),
        ((ap.EigenCAM(), ap.EigenCAM(ap.At("1"))), (1, 0)),
        ((ap.IntegratedGradients(quadrature=Left(6)), ap.IntegratedGradients(quadrature=Left(7))), (15, 13)),
        ((ap.IntegratedGradients(quadrature=Left(6)), ap.IDGI(Straight(quadrature=Gauss(3)))), (13, 9)),
    ],
)
def test_what_is_shared_is_made_once(x: Tensor, explainers: tuple[Explainer, ...], rows: tuple[int, int]) -> None:
    torch.manual_seed(0)
    assert sums(together(convolutional().eval(), x, explainers, target=1)) == rows


def test_costs_say_what_was_shared_with_whom(x: Tensor) -> None:
    found = ap.explain(convolutional().eval(), x, ["gradient", "gradient_times_input"], target=0)
    first, second = (a.cost for a in found)
    assert first.shared is None
    assert second.shared is not None
    assert second.shared.shared_with == ("Gradient",)
    assert (int(second.forward[0]), int(second.shared.forward[0]), int(second.own.forward[0])) == (2, 1, 1)
    assert (int(second.backward[0]), int(second.own.backward[0])) == (1, 0)
    assert "shared with Gradient: 1 forward, 1 backward" in repr(found[1])
    assert passes(found[1]) == "2 forward, 1 backward; 1 and 1 of them shared with Gradient"
    twice = ap.explain(convolutional().eval(), x, ["gradient", ap.Gradient()], target=0)
    assert twice[1].cost.shared.shared_with == ("Gradient (method 1)",)


def test_costs_are_kept_in_files(x: Tensor, tmp_path: Path) -> None:
    one, two = ap.explain(convolutional().eval(), x, ["gradient", "gradient_times_input"], target=0)
    for a in (one, two):
        a.save(tmp_path / "a.safetensors")
        back = ap.Attribution.load(tmp_path / "a.safetensors")
        assert torch.equal(back.cost.own.forward, a.cost.own.forward)
        assert (back.cost.shared is None) == (a.cost.shared is None)
        assert a.to("cpu").cost.own.checks == a.cost.own.checks


def test_results_share_no_memory(x: Tensor) -> None:
    net = convolutional().eval()
    one, two = ap.explain(net, x, ["gradient", "gradient"], target=0)
    kept = two.values.clone()
    one.values.zero_()
    one.value.zero_()
    assert torch.equal(two.values, kept)
    assert bool(two.value.any())


@dataclass(frozen=True)
class Failing(Accumulator):
    """Fails while it reads."""

    def reading(self, q: Any, walk: Any) -> Any:
        yield
        raise ConfigError("a leg it does not like", "another", "take one")
        yield


@dataclass(frozen=True)
class BadReader(ap.IntegratedGradients):
    """Integrated gradients, read by that."""

    card = ap.IntegratedGradients.card

    @property
    def accumulator(self) -> Failing:
        return Failing()


def test_a_failure_has_its_methods_name_and_spoils_no_other(x: Tensor) -> None:
    net, good = convolutional().eval(), ap.IntegratedGradients(quadrature=Left(6))
    bad: list[Explainer] = [BadReader(quadrature=Left(6)), ap.GradCAM(ap.At("8")), ap.GradCAM(ap.At("no such layer"))]
    for one in bad:
        for order in ([one, good, ap.Gradient()], [good, ap.Gradient(), one]):
            with pytest.raises(ap.ApportionError, match=type(one).__name__):
                ap.explain(net, x, order, target=1)
            found = list(answers(ap.Field(net), x, order, target=1))
            for explainer, a in zip(order, found, strict=True):
                if explainer is one:
                    assert isinstance(a, ap.ApportionError)
                else:
                    assert isinstance(a, ap.Attribution)
                    same(a, explainer(ap.Field(net), x, target=1))


def test_a_strangers_error_says_where_it_came_from(x: Tensor) -> None:
    @dataclass(frozen=True)
    class Broken(ap.Gradient):
        card = ap.Gradient.card

        def explain(self, q: Any) -> ap.Attribution:
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine") as caught:
        ap.explain(convolutional().eval(), x, ["gradient", Broken()], target=1)
    assert caught.value.__notes__ == ["in Broken (method 2 of 2)"]


def test_gradients_through_values_stay_each_methods_own(x: Tensor) -> None:
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(192, 3), nn.Tanh(), nn.Linear(3, 2)).eval(), x.requires_grad_()
    for a in ap.explain(net, x, ["gradient", "gradient_times_input"], target=1, differentiable=True):
        a.values.sum().backward()  # frees the graph, which a shared one would not survive
        assert a.cost.shared is None


def test_inference_mode_and_ids(x: Tensor) -> None:
    net, names = convolutional().eval(), ["a", "b", "c"]
    with torch.inference_mode():
        found = ap.explain(net, x, list(SHARING["copies"]), target=1, ids=names, seed=7)
    for explainer, a in zip(SHARING["copies"], found, strict=True):
        same(a, explainer(ap.Field(net), x, target=1, ids=names, seed=7))


def test_inputs_of_several_tensors(x: Tensor) -> None:
    def model(a: Tensor, b: Tensor) -> Tensor:
        return (a.flatten(1) * b.flatten(1)).tanh()[:, :5]

    for pair in (("gradient", "gradient_times_input"), ("gradient_times_input", "gradient")):
        for explainer, a in zip(pair, ap.explain(model, (x, x + 1), list(pair), target=1), strict=True):
            same(a, ap.explain(model, (x, x + 1), explainer, target=1))


def test_an_unused_input_is_told_to_every_method(x: Tensor) -> None:
    net = convolutional().eval()

    def model(a: Tensor, b: Tensor) -> Tensor:
        return net(a)

    with pytest.raises(NoGradientPathError, match="Gradient"):
        ap.explain(model, (x, x), ["gradient", "gradient_times_input"], target=1)
    for a in ap.explain(model, (x, x), ["gradient", "gradient_times_input"], target=1, allow_unused=True):
        assert any("does not depend on" in w for w in a.warnings)


def test_another_site(x: Tensor) -> None:
    net = convolutional().eval()
    for explainer, a in zip(
        SHARING["one path"], ap.explain(net, x, list(SHARING["one path"]), target=1, site=ap.At("2")), strict=True
    ):
        same(a, ap.explain(net, x, explainer, target=1, site=ap.At("2")))


def test_a_question_ends_with_its_use(x: Tensor) -> None:
    gc.disable()
    try:
        for once in (None, 1):
            q = ap.Field(convolutional().eval()).bind(x, target=once)
            ap.SmoothGrad(ap.IntegratedGradients(quadrature=Gauss(2)), samples=2).explain(q)
            there = weakref.ref(q)
            del q
            assert there() is None
    finally:
        gc.enable()


class Peak(TorchDispatchMode):
    """Bytes of the tensors that operations made, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.alive = Counter[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree.tensors(out):
            storage = t.untyped_storage()
            where, size = storage.data_ptr(), storage.nbytes()
            self.now += 0 if self.alive[where] else size
            self.alive[where] += 1
            self.most = max(self.most, self.now)
            weakref.finalize(t, self._gone, where, size)
        return out

    def _gone(self, where: int, size: int) -> None:
        self.alive[where] -= 1
        self.now -= 0 if self.alive[where] else size


def test_memory_does_not_grow_with_the_number_of_methods() -> None:
    """The most tensor memory alive at a time: of each further method its running sums, and nothing of a chunk."""
    x = torch.rand(8, 3, 32, 32)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 8), nn.Tanh(), nn.Linear(8, 4)).eval()
    sizes = []
    for count in (2, 8):
        path = [ap.SplitIG(quadrature=Left(64), phi=0.1 * (i + 1)) for i in range(count)]
        with Peak() as peak:
            found = ap.explain(net, x, path, target=1, batch_size=16)
        assert len(found) == count
        sizes.append(peak.most)
        del found
    sums, chunk = 2 * 8 * x.numel(), 16 * 4 * x[0].numel()  # before and after φ, in double precision
    assert sizes[1] - sizes[0] <= 6 * sums + chunk, (sizes, sums, chunk)
    assert 6 * 2 * chunk > 6 * sums / 2 + chunk  # what the terms of one block in each method would add is more


def test_what_later_methods_ask_is_let_go_after_the_last() -> None:
    """Maps at x are held while a later method asks for them, and references that differ are not gathered."""
    x = torch.rand(8, 3, 64, 64)
    net = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 4), nn.Tanh()).eval()
    sizes = []
    for count in (3, 8):
        shifts = [ap.GradientTimesInput(ap.baselines.Noise(0.1 * (i + 1))) for i in range(count)]
        with Peak() as peak:
            answered = answers(ap.Field(net, batch_size=8), x, shifts, target=1)
            for a in answered:
                assert isinstance(a, ap.Attribution)
                del a
        sizes.append(peak.most)
    assert sizes[1] <= sizes[0] + x.numel(), (sizes, 4 * x.numel())


AT_X = (ap.Gradient(), ap.LayerCAM(ap.At("1")), ap.GradientTimesInput(), ap.LayerCAM(ap.At("4")), ap.EigenCAM())


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("rows", [1, 2])
def test_passes_at_x_in_chunks(x: Tensor, rows: int, fast: bool) -> None:
    net = convolutional().eval()
    field = ap.Field(net, batch_size=rows, fast=fast)
    for explainer, a in zip(AT_X, answers(field, x, AT_X), strict=True):
        assert isinstance(a, ap.Attribution)
        same(a, explainer(field, x))


@pytest.mark.parametrize(
    "options",
    [
        {"site": ap.At("2")},
        {"score": ap.Neuron(ap.At("4"), (1, 2, 2))},
        {"score": ap.Probability(), "precision": torch.float64},
        {"normalize": ap.Normalize((0.5,), (0.25,))},
    ],
    ids=["site", "inner score", "double", "normalized"],
)
def test_passes_at_x_of_other_questions(x: Tensor, options: dict[str, Any]) -> None:
    asked = [ap.Gradient(), ap.LayerCAM(ap.At("4")), ap.GradientTimesInput(), ap.GradCAM(ap.At("4"))]
    for fast in (True, False):
        field = ap.Field(convolutional().eval(), fast=fast, **options)
        target = None if isinstance(options.get("score"), ap.Neuron) else 1
        for explainer, a in zip(asked, answers(field, x, asked, target=target), strict=True):
            if isinstance(a, Exception):
                with pytest.raises(type(a)):
                    explainer(field, x, target=target)
            else:
                same(a, explainer(field, x, target=target))


def test_layers_beyond_the_budget_are_read_again(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = (ap.LayerCAM(ap.At("1")), ap.GradCAM(ap.At("4")), ap.LayerCAM(ap.At("4")), ap.HiResCAM(ap.At("1")))
    net = convolutional().eval()
    monkeypatch.setattr(evaluation, "BUDGET", 2 * 4 * 3 * 6 * 64)  # the first layer and its gradient, no more
    assert sums(together(copy.deepcopy(net), x, asked, target=1)) == (3, 3)
    monkeypatch.setattr(evaluation, "BUDGET", 0)
    assert sums(check(net, x, asked, target=1)) == (3, 3)  # what is asked first is there anyway
    assert sums(check(net, x, (*asked[:2], ap.EigenCAM(ap.At("1"))), target=1)) == (2, 2)
