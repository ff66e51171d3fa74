"""Fields: chunks, memory, inputs and further arguments, normalization, what surrounds a call."""

import gc
import inspect
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import apportion as ap
from apportion.core import errors, tree
from apportion.core.streams import Stream

DOUBLE = torch.float64


def smooth() -> nn.Module:
    return nn.Sequential(OrderedDict(a=nn.Linear(6, 8), b=nn.Tanh(), c=nn.Linear(8, 3))).double()


def recipes() -> list[ap.Explainer]:
    ig = ap.IntegratedGradients(ap.baselines.Noise(0.3, count=2), ap.quadrature.Gauss(3))
    return [
        ap.Gradient(),
        ap.GradientTimesInput(ap.baselines.Constant(0.2)),
        ig,
        ap.SmoothGrad(ig, samples=2),
        ap.SmoothGradSquared(samples=3),
        ap.VarGrad(samples=3),
    ]


def distance(a: ap.Attribution, b: ap.Attribution) -> float:
    pairs = zip(tree.leaves(a.values), tree.leaves(b.values), strict=True)
    return max(float((s - t).abs().max()) for s, t in pairs)


# -- chunks and memory --------------------------------------------------------------------------


@pytest.mark.parametrize("site", [None, ap.At("b")])
@pytest.mark.parametrize("method", recipes(), ids=lambda m: type(m).__name__ + type(getattr(m, "base", m)).__name__)
def test_results_do_not_depend_on_the_chunks(method: ap.Explainer, site: ap.Site | None) -> None:
    net, x = smooth(), torch.randn(3, 6, dtype=DOUBLE)
    whole = method(ap.Field(net, site=site), x)
    for chunk in (1, 7):
        part = method(ap.Field(net, site=site, batch_size=chunk), x)
        assert distance(part, whole) < 1e-13
        assert torch.allclose(part.value, whole.value, atol=1e-14)
        assert torch.equal(part.target, whole.target)
        assert torch.equal(part.cost.forward, whole.cost.forward)
        assert torch.equal(part.cost.backward, whole.cost.backward)
    for b in range(3):
        alone = method(ap.Field(net, site=site), x[b : b + 1])
        assert float((alone.values - whole.values[b : b + 1]).abs().max()) < 1e-13


def test_chunks_are_of_the_size_asked_for() -> None:
    sizes: list[int] = []

    def model(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return x

    field = ap.Field(model, batch_size=3)
    q = field.bind(torch.randn(7, 2), target=0)
    sizes.clear()
    q.value(q.x, torch.arange(7))
    assert sizes == [3, 3, 1]
    assert (field.chunk, field.is_automatic) == (3, False)


class Limited(nn.Module):
    """Runs out of memory above so many rows."""

    def __init__(self, most: int, error: Callable[[], Exception]) -> None:
        super().__init__()
        self.most, self.error = most, error
        self.inner = smooth()
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        SIZES.append(len(x))
        if len(x) > self.most:
            raise self.error()
        return self.inner(x)


SIZES: list[int] = []
MEMORY: list[Callable[[], Exception]] = [
    lambda: torch.OutOfMemoryError("CUDA out of memory."),
    MemoryError,
    lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."),
]


@pytest.mark.parametrize("error", MEMORY, ids=["cuda", "python", "cpu"])
@pytest.mark.parametrize("most", [1, 2, 3, 5])
def test_memory_backs_off_without_losing_work(most: int, error: Callable[[], Exception]) -> None:
    model, x = Limited(most, error), torch.randn(23, 6, dtype=DOUBLE)
    method = ap.IntegratedGradients(quadrature=ap.quadrature.Gauss(3))
    field = ap.Field(model)
    SIZES.clear()
    a = method(field, x, target=0)
    assert max(SIZES) > most
    assert field.chunk <= most
    assert distance(a, method(ap.Field(model.inner), x, target=0)) < 1e-13
    assert any("memory ran out" in w for w in a.warnings)
    assert a.cost.forward.tolist() == [4] * 23
    done = [n for n in SIZES if n <= most]
    checks = 5 if most > 1 else 3
    assert sum(done) == 23 * (3 + 1 + 1) + checks  # each row ran once: nodes, baseline, f(x)
    SIZES.clear()
    again = method(field, x, target=0)
    assert max(SIZES) <= most  # remembered
    assert again.warnings == ()


def test_chunks_done_before_memory_ran_out_are_kept() -> None:
    sizes: list[int] = []

    def model(x: Tensor) -> Tensor:
        sizes.append(len(x))
        if len(sizes) == 3 and len(x) > 2:  # another process took the memory meanwhile
            raise torch.OutOfMemoryError("no room")
        return x * torch.arange(1, 3)

    field = ap.Field(model)
    q = field.bind(torch.arange(26.0).reshape(13, 2), target=1)
    field.shrink(4)
    sizes.clear()
    assert q.value(q.x, torch.arange(13)).tolist() == (2 * q.x[:, 1]).tolist()
    assert sizes == [4, 4, 4, 2, 2, 1]


@pytest.mark.parametrize("error", MEMORY, ids=["cuda", "python", "cpu"])
def test_memory_that_is_too_small(error: Callable[[], Exception]) -> None:
    x = torch.randn(4, 6, dtype=DOUBLE)
    with pytest.raises(errors.OutOfMemoryError, match="batch_size") as caught:
        ap.Gradient()(ap.Field(Limited(2, error), batch_size=3), x, target=0)
    assert caught.value.__cause__ is not None
    with pytest.raises(errors.OutOfMemoryError, match="batch_size"):
        ap.Gradient()(ap.Field(Limited(1, error), batch_size=3), x, target=0)
    with pytest.raises(errors.OutOfMemoryError, match="single row"):
        ap.Gradient()(ap.Field(Limited(0, error)), x, target=0)
    with pytest.raises(errors.OutOfMemoryError, match="single row"):
        ap.Gradient()(ap.Field(Limited(0, error), batch_size=1), x, target=0)
    with pytest.raises(errors.ModelError, match="other reason"):
        ap.Gradient()(ap.Field(Limited(0, lambda: RuntimeError("other reason"))), x, target=0)


def test_memory_running_out_inside_the_score() -> None:
    def score(z: Tensor) -> Tensor:
        if len(z) > 2:
            raise torch.OutOfMemoryError("no room")
        return z[:, 0]

    a = ap.Gradient()(ap.Field(lambda x: x * 3, score), torch.ones(9, 2))
    assert a.values.tolist() == [[3, 0]] * 9


# -- inputs -------------------------------------------------------------------------------------


def product(a: Tensor, b: Tensor) -> Tensor:
    return (a**2).sum(1) * b.sum(1) + b[:, 0]


@pytest.mark.parametrize("form", ["tuple", "list", "dict", "reordered"])
@pytest.mark.parametrize("chunk", [1, "auto"])
def test_several_inputs(form: str, chunk: Any) -> None:
    """Values of both inputs together sum to the difference."""
    a, b = torch.randn(3, 4, dtype=DOUBLE), torch.randn(3, 2, dtype=DOUBLE)
    forms: dict[str, Any] = {"tuple": (a, b), "list": [a, b], "dict": {"a": a, "b": b}, "reordered": {"b": b, "a": a}}
    found = ap.IntegratedGradients(ap.baselines.Constant(0.3))(ap.Field(product, batch_size=chunk), forms[form])
    assert type(found.values) is type(forms[form])
    start = [torch.full_like(t, 0.3) for t in (a, b)]
    total = product(a, b) - product(*start)
    assert found.claimed_total is not None
    assert found.gap is not None
    assert torch.allclose(found.claimed_total, total, atol=1e-12)
    assert float(found.gap.abs().max()) < 1e-12
    parts = found.values if isinstance(found.values, dict) else dict(zip("ab", found.values, strict=True))
    assert torch.allclose(parts["a"].sum(1) + parts["b"].sum(1), total, atol=1e-12)
    assert parts["a"].shape == a.shape
    smooth = ap.SmoothGrad(samples=4)(ap.Field(product, batch_size=chunk), forms[form])
    assert tree.names(smooth.values) == tree.names(forms[form])


def test_examples_that_are_single_numbers() -> None:
    x = torch.tensor([1.0, 2.0, 3.0], dtype=DOUBLE)
    field = ap.Field(lambda x: x**3)
    a = ap.IntegratedGradients()(field, x)
    assert torch.allclose(a.values, x**3, atol=1e-12)
    assert ap.SmoothGrad(samples=2)(field, x).values.shape == (3,)
    assert ap.Gradient()(ap.Field(lambda x: x**3, batch_size=1), x).values.tolist() == [3, 12, 27]


def test_batch_size_of_any_whole_number() -> None:
    for size in (np.int64(2), np.uint8(2), torch.tensor(2)):
        field = ap.Field(lambda x: x**3, batch_size=size)
        assert type(field.chunk) is int
        assert not field.is_automatic
        assert ap.Gradient()(field, torch.tensor([1.0, 2, 3])).values.tolist() == [3, 12, 27]
    for size in (0, np.int64(-1), True, np.array([2, 3])):
        with pytest.raises(errors.ConfigError, match="batch_size"):
            ap.Field(lambda x: x**3, batch_size=size)  # pyright: ignore[reportArgumentType]


def test_inputs_of_many_axes_and_dtypes() -> None:
    x = torch.randn(2, 3, 1, 2, 2, 2)
    for dtype in (torch.float32, DOUBLE, torch.bfloat16):
        a = ap.GradientTimesInput()(ap.Field(lambda x: (x * 2).flatten(1).sum(1)), x.to(dtype))
        assert a.values.dtype == dtype
        assert torch.equal(a.values, 2 * x.to(dtype))


# -- further arguments --------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 2, "auto"])
def test_further_arguments_follow_their_example(chunk: Any) -> None:
    """Also on the noisy copies of SmoothGrad, whose rows are in another order and number."""
    x, each = torch.randn(3, 4, dtype=DOUBLE), torch.tensor([[1.0], [10.0], [100.0]], dtype=DOUBLE)
    shared = torch.randn(3, 4, dtype=DOUBLE)  # as many rows as examples, yet the same for all
    whole = torch.tensor([1, 2, 3])

    def model(x: Tensor, each: Tensor, shared: Tensor, *, number: float, index: Tensor, flag: bool) -> Tensor:
        assert flag
        assert shared.shape == (3, 4)
        return (x @ shared.T).sum(1) * each[:, 0] * number + index

    def positional(x: Tensor, each: Tensor, shared: Tensor) -> Tensor:
        return model(x, each, shared, number=2.0, index=torch.zeros(()), flag=True)

    named = {"each": each, "shared": ap.Shared(shared), "number": 2.0, "index": whole, "flag": True}
    want = 2 * each * shared.sum(0)
    fields = [
        ap.Field(model, extra=named, batch_size=chunk),
        ap.Field(positional, extra=(each, ap.Shared(shared)), batch_size=chunk),
    ]
    for field in fields:
        assert torch.allclose(ap.Gradient()(field, x).values, want, rtol=1e-13)
        assert torch.allclose(ap.SmoothGrad(samples=5)(field, x).values, want, rtol=1e-13)
        nested = ap.SmoothGrad(ap.IntegratedGradients(), samples=2)(field, x)
        assert nested.gap is not None
        assert float(nested.gap.abs().max()) < 1e-11
        assert float(nested.values.abs().max()) > 1
    q = ap.Field(model, extra=named, batch_size=chunk).bind(x)
    rows, owner = x[[2, 0, 2, 1]], torch.tensor([2, 0, 2, 1])
    assert torch.allclose(q.value(rows, owner), q.fx[owner], rtol=1e-13)


def test_a_single_tensor_is_one_further_argument() -> None:
    x, w = torch.randn(2, 3, dtype=DOUBLE), torch.randn(2, 3, dtype=DOUBLE)
    assert torch.equal(ap.Gradient()(ap.Field(lambda x, w: (x * w).sum(1), extra=w), x).values, w)


def test_trees_of_further_arguments() -> None:
    x = torch.randn(2, 3, dtype=DOUBLE)
    extra = ({"w": [x * 2, ap.Shared(torch.tensor(3.0))]}, None)
    field = ap.Field(lambda x, d, n: (x * d["w"][0] * d["w"][1]).sum(1), extra=extra)
    assert torch.allclose(ap.Gradient()(field, x).values, 6 * x)


# -- units --------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_normalize_gives_attributions_in_the_units_of_the_input(channels: int) -> None:
    """As normalizing inside the model would; the gradient is that of the network, divided by std."""
    norm = ap.Normalize((0.4, 0.5, 0.6)[:channels], (0.1, 0.2, 0.4)[:channels])
    net = nn.Sequential(nn.Conv2d(3, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2)).double()
    x = torch.rand(2, 3, 3, 3, dtype=DOUBLE)
    mean, std = (torch.tensor(v, dtype=DOUBLE).reshape(1, -1, 1, 1) for v in (norm.mean, norm.std))
    z = ((x - mean) / std).requires_grad_()
    (chain,) = torch.autograd.grad(net(z)[:, 1].sum(), z)
    field, inside = ap.Field(net, normalize=norm), ap.Field(lambda x: net((x - mean) / std))
    assert torch.allclose(ap.Gradient()(field, x, target=1).values, chain / std, atol=1e-13)
    for method in (ap.IntegratedGradients(), ap.SmoothGrad(samples=3), ap.GradientTimesInput()):
        one, two = (method(f, x, target=1, seed=3) for f in (field, inside))
        assert distance(one, two) < 1e-12
    inner = ap.Field(net, site=ap.At("0"), normalize=norm).bind(x, target=1)
    assert torch.allclose(inner.x, net[0](z).detach(), atol=1e-14)
    assert torch.allclose(inner.value(inner.x, torch.arange(2)), net(z)[:, 1].detach(), atol=1e-14)


def test_bounds_and_derivatives_go_together_without_a_warning_of_torch() -> None:
    x = torch.rand(2, 6, dtype=DOUBLE).requires_grad_()
    a = ap.IntegratedGradients()(ap.Field(smooth(), bounds=(0, 1)), x, target=1, differentiable=True)
    (slope,) = torch.autograd.grad(a.values.sum(), x)  # pyright: ignore[reportAttributeAccessIssue]
    assert bool(slope.any())


def test_bounds_leave_room_for_rounding() -> None:
    field = ap.Field(lambda x: x, bounds=(0.0, 1.0))
    field.bind(torch.tensor([[1.0000001, -0.0000001]]), target=0)
    with pytest.raises(errors.InputError):
        field.bind(torch.tensor([[1.001, 0.0]]), target=0)


# -- surroundings -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("method", [*recipes(), ap.GradCAM(ap.At("0"))], ids=lambda m: type(m).__name__)
def test_outer_gradient_modes_do_not_matter(method: ap.Explainer, mode: Any) -> None:
    """Neither around the call, nor for what was made inside: inputs, models, baselines."""
    net = (
        nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)).double().eval()
    )
    x = torch.randn(2, 2, 3, 3, dtype=DOUBLE)
    want = method(ap.Field(net), x)
    with mode():
        made = x.clone()
        model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2))
        model = model.double().eval()
        model.load_state_dict(net.state_dict())
        found = method(ap.Field(net), made)
        assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
        assert torch.is_grad_enabled() == (mode is torch.enable_grad)
    assert distance(found, want) == 0
    assert not found.values.is_inference()
    assert not found.values.requires_grad
    assert not found.value.requires_grad
    assert distance(method(ap.Field(model), made), want) == 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_questions_in_outer_gradient_modes(mode: Any) -> None:
    net, x = smooth(), torch.randn(2, 6, dtype=DOUBLE)
    owner = torch.arange(2)
    want = ap.Field(net).bind(x, target=[0, 1])
    with mode():
        target, w = torch.tensor([0, 1]), torch.ones(2, 6, dtype=DOUBLE)
        q = ap.Field(lambda x, w: net(x * w), extra=w).bind(x * 1, target=target)
        value, grad = q.value_and_grad(q.x + 0, owner)
        assert torch.equal(grad, want.value_and_grad(x, owner)[1])
        assert torch.equal(value, want.fx)
        for a, b in zip(q.hvp(q.x, owner, w), want.hvp(x, owner, w), strict=True):
            assert torch.equal(a, b)
        game = ap.Game(q, ap.groups.Elements(), ap.fills.Baselines(ap.baselines.Given(w[:1])))
        assert game.value(torch.eye(6)).shape == (2, 6)
    sites = ap.Field(net).sites(x)
    with mode():
        assert ap.Field(net).sites(x) == sites


def test_no_result_of_a_callable_keeps_a_graph() -> None:
    """A function around a module has weights that require gradient; results must not hold on to them."""
    net, x = smooth(), torch.randn(2, 6, dtype=DOUBLE)
    owner = torch.arange(2)

    def around(x: Tensor) -> Tensor:
        return net(x)

    q = ap.Field(around).bind(x)
    found = [q.fx, q.value(x, owner), *q.value_and_grad(x, owner), q.outputs(x, owner), *q.hvp(x, owner, x)]
    a = ap.IntegratedGradients()(ap.Field(around), x)
    assert a.references is not None
    found += [a.values, a.value, a.references.value]
    found += [ap.Game(q, ap.groups.Elements(), ap.fills.Baselines()).value(torch.eye(6))]
    assert not any(t.requires_grad for t in found)
    assert all(p.grad is None for p in net.parameters())


def test_global_random_numbers_are_left_alone() -> None:
    net, x = smooth(), torch.randn(3, 6, dtype=DOUBLE)
    before = torch.get_rng_state()
    for method in recipes():
        method(ap.Field(net), x, seed=5)
    q = ap.Field(net).bind(x)
    q.hvp(x, torch.arange(3), x)
    q.sites()
    ap.Game(q, ap.groups.Elements(), ap.fills.Baselines(ap.baselines.Noise(count=2))).value(torch.eye(6))
    Stream.of(0, [1], "p").normal(x, torch.tensor([0]), torch.tensor([0]))
    assert torch.equal(before, torch.get_rng_state())
    first = ap.SmoothGrad(samples=3)(ap.Field(net), x).values
    torch.manual_seed(77)
    assert torch.equal(ap.SmoothGrad(samples=3)(ap.Field(net), x).values, first)
    assert not torch.equal(ap.SmoothGrad(samples=3)(ap.Field(net), x, seed=1).values, first)


def test_the_users_input_keeps_its_state() -> None:
    x = torch.randn(2, 6, dtype=DOUBLE, requires_grad=True)
    bits, version = x.detach().clone(), x._version
    for method in recipes():
        method(ap.Field(smooth()), x)
        method(ap.Field(lambda x: x.mul(2).relu_()), x)
    assert x.requires_grad
    assert x.grad is None
    assert x._version == version
    assert torch.equal(x.detach(), bits)


def test_models_that_write_to_their_input() -> None:
    """They meet a copy: the next pass starts from the same numbers."""
    x = torch.tensor([[1.0, -2.0]], dtype=DOUBLE)

    def model(x: Tensor) -> Tensor:
        return x.mul_(2)

    a = ap.Gradient()(ap.Field(model), x, target=0)
    assert x.tolist() == [[1, -2]]
    assert a.values.tolist() == [[2, 0]]
    assert a.value.tolist() == [2]
    ig = ap.IntegratedGradients()(ap.Field(model), x, target=0)
    assert x.tolist() == [[1, -2]]
    assert ig.values.tolist() == [[pytest.approx(2), 0]]


def test_weight_gradients_are_neither_made_nor_touched() -> None:
    net, x = smooth(), torch.randn(2, 6, dtype=DOUBLE)
    net(x).sum().backward()
    kept = [p.grad for p in net.parameters()]
    bits = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    ap.IntegratedGradients()(ap.Field(net), x)
    for p, grad, b in zip(net.parameters(), kept, bits, strict=True):
        assert p.grad is grad
        assert torch.equal(b, p.grad if p.grad is not None else b * 0)


def test_explain_takes_what_the_field_takes() -> None:
    own = set(inspect.signature(ap.Field).parameters) - {"model", "self"}
    assert own <= set(inspect.signature(ap.explain).parameters) | {"precision", "batch_size", "allow_unused", "fast"}


def test_a_lazy_module_is_refused_until_it_has_weights() -> None:
    with pytest.raises(ap.ApportionError, match=r"0\.weight is not initialized"):
        ap.Field(nn.Sequential(nn.LazyLinear(4))).bind(torch.zeros(2, 3))


def test_a_state_beside_the_outputs_is_not_taken_for_rows() -> None:
    """The states of an LSTM have layers, not rows, on their first axis."""
    lstm = nn.LSTM(4, 3, batch_first=True)
    a = ap.Gradient()(ap.Field(lstm, lambda out: out[0].sum((1, 2))), torch.randn(2, 5, 4))
    assert a.values.shape == (2, 5, 4)


def test_fields_are_freed_with_what_they_ran() -> None:
    def tensors() -> int:
        for _ in range(5):
            net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
            ap.Gradient()(ap.Field(net), torch.ones(1, 3), target=0)
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    tensors()
    assert tensors() == tensors()
