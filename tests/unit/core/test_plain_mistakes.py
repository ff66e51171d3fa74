"""Plain mistakes and odd spellings: a clear error where they are made, or the meaning that was meant."""

import copy
import errno
import pickle
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

import apportion as ap
from apportion.core import errors
from apportion.core.derivative import is_memory

pytestmark = pytest.mark.usefixtures("as_users_run")

X = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
Pair = namedtuple("Pair", "a b")


def total(x: Tensor) -> Tensor:
    return x.square().sum(1)


# -- tensors that are not dense -------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # torch says so at the first one
@pytest.mark.parametrize("make", [X.to_sparse, lambda: torch.nested.nested_tensor([X[0], X[1]])])
def test_sparse_and_nested_tensors_are_refused_by_name(make: Any) -> None:
    with pytest.raises(errors.InputError, match="dense tensors"):
        ap.Field(total).bind(make())
    with pytest.raises(errors.InputError, match="dense tensors"):
        ap.Field(lambda x, y: total(x), extra=(make(),)).bind(X)
    with pytest.raises(errors.BaselineError, match="dense tensors"):
        ap.IntegratedGradients(ap.baselines.Given(make()))(ap.Field(total), X)


# -- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: ap.noise.Gaussian("a"), "'a' as sigma of Gaussian"),  # pyright: ignore[reportArgumentType]
        (lambda: ap.noise.Gaussian(torch.inf), "inf as sigma"),
        (lambda: ap.noise.Gaussian(torch.nan), "nan as sigma"),
        (lambda: ap.noise.Gaussian(0.0), "sigma above 0"),
        (lambda: ap.noise.Gaussian(True), "True as sigma"),
        (lambda: ap.baselines.Blurred("a"), "'a' as sigma of Blurred"),  # pyright: ignore[reportArgumentType]
        (lambda: ap.baselines.Blurred(-1), "sigma above 0"),
        (lambda: ap.baselines.Constant("a"), "'a' as value of Constant"),  # pyright: ignore[reportArgumentType]
        (lambda: ap.baselines.Constant((0.0, "a")), "as value of Constant"),  # pyright: ignore[reportArgumentType]
        (lambda: ap.baselines.Noise(count=2.5), "2.5 as count of Noise"),  # pyright: ignore[reportArgumentType]
        (lambda: ap.baselines.Noise(count=0), "count above 0"),
        (lambda: ap.baselines.Noise(mean=torch.inf), "inf as mean"),
        (lambda: ap.Normalize(0.5, 0.5), "0.5 as mean of Normalize"),  # pyright: ignore[reportArgumentType]
        (lambda: ap.Normalize((0.5,), ("a",)), "as std of Normalize"),  # pyright: ignore[reportArgumentType]
        (lambda: ap.quadrature.Gauss(True), "True as n of Gauss"),
        (lambda: ap.quadrature.Gauss(4.0), "4.0 as n of Gauss"),  # pyright: ignore[reportArgumentType]
        (lambda: ap.SmoothGrad(samples=0), "samples above 0"),
        (lambda: ap.groups.Squares(0), "side above 0"),
        (lambda: ap.baselines.AtInput(0.0), "0.0 as base of AtInput"),  # pyright: ignore[reportArgumentType]
        (lambda: ap.At(1), "write At('1')"),  # pyright: ignore[reportArgumentType]
        (lambda: ap.At("0", "1"), "'1' as call of At"),  # pyright: ignore[reportArgumentType]
        (lambda: ap.At("0", -1), "from 0"),
        (lambda: ap.AtOp("softmax", -1), "from 0"),
        (lambda: ap.Probability(multilabel="yes"), "'yes' as multilabel"),  # pyright: ignore[reportArgumentType]
        (lambda: ap.Field(total, bounds=("a", "b")), "bounds=('a', 'b')"),  # pyright: ignore[reportArgumentType]
        (lambda: ap.Field(total, bounds=(0, torch.inf)), "finite"),
        (lambda: ap.Field(total, bounds=(0, torch.nan)), "finite"),
    ],
)
def test_an_impossible_option_is_refused_where_it_is_given(make: Any, word: str) -> None:
    with pytest.raises(errors.ConfigError) as caught:
        make()
    assert word in str(caught.value)
    assert "To fix: " in str(caught.value)


def test_numbers_of_numpy_are_python_s_own() -> None:
    assert ap.quadrature.Gauss(np.int64(4)) == ap.quadrature.Gauss(4)  # pyright: ignore[reportArgumentType]
    assert type(ap.quadrature.Gauss(np.int64(4)).n) is int  # pyright: ignore[reportArgumentType]
    assert type(ap.noise.Gaussian(np.float32(0.5)).sigma) is float  # pyright: ignore[reportArgumentType]
    assert ap.Normalize([0.5], np.array([0.25])) == ap.Normalize((0.5,), (0.25,))  # pyright: ignore[reportArgumentType]
    assert ap.Field(total, bounds=(np.float32(0), 8)).bind(X).field.bounds == (0, 8)  # pyright: ignore[reportArgumentType]


def test_seeds() -> None:
    q = ap.Field(total).bind(X, seed=np.int64(1))  # pyright: ignore[reportArgumentType]
    assert type(q.seed) is int
    for seed in (True, np.True_, 1.0, "1", None):
        with pytest.raises(errors.ConfigError, match="seed="):
            ap.Field(total).bind(X, seed=seed)  # pyright: ignore[reportArgumentType]


# -- ids ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [3, "ab", b"ab", torch.tensor(2), np.array(2)], ids=repr)
def test_ids_that_are_no_list(ids: Any) -> None:
    with pytest.raises(errors.InputError, match="one id per example"):
        ap.Field(total).bind(X, ids=ids)


@pytest.mark.parametrize("one", [object(), None, total, (1, object()), Path("a")], ids=lambda v: type(v).__name__)
def test_ids_whose_text_may_change_between_runs(one: Any) -> None:
    with pytest.raises(errors.InputError, match="among the ids"):
        ap.Field(total).bind(X, ids=["a", one])


@pytest.mark.parametrize(
    "ids", [list(np.arange(2)), np.arange(2), torch.arange(2), list(torch.arange(2)), (0, 1), range(2)], ids=repr
)
def test_equal_ids_give_equal_noise_however_they_are_spelled(ids: Any) -> None:
    method = ap.SmoothGrad(samples=2)
    want = method(ap.Field(total), X, ids=[0, 1])
    assert torch.equal(method(ap.Field(total), X, ids=ids).values, want.values)
    assert not torch.equal(method(ap.Field(total), X, ids=["0", "1"]).values, want.values)


def test_ids_of_several_parts() -> None:
    q = ap.Field(total).bind(X, ids=[("set", np.int64(1)), b"raw"])
    assert q.ids == [("set", 1), b"raw"]


# -- storage --------------------------------------------------------------------------------------


def test_saving_to_a_missing_directory(tmp_path: Path) -> None:
    a = ap.Gradient()(ap.Field(total), X)
    with pytest.raises(errors.OutputError, match="a directory that exists"):
        a.save(tmp_path / "missing" / "x")


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = ap.Gradient()(ap.Field(total), X)
    path = tmp_path / "a.safetensors"
    a.save(path)
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        with pytest.raises(errors.OutputError, match="a disk with room"):
            a.abs().save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_named_tuples_come_back_by_position(tmp_path: Path) -> None:
    a = ap.Gradient()(ap.Field(lambda a, b: total(a) + total(b)), Pair(X, X))
    assert isinstance(a.values, Pair)
    a.save(tmp_path / "a")
    back = ap.Attribution.load(tmp_path / "a").values
    assert type(back) is tuple
    assert all(torch.equal(v, w) for v, w in zip(back, a.values, strict=True))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda f: pickle.loads(pickle.dumps(f))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("batch_size", ["auto", 2])
def test_fields_are_copied_with_their_settings(again: Any, batch_size: Any) -> None:
    normalize = ap.Normalize((0.5,), (2.0,))
    field = ap.Field(nn.Linear(3, 2), ap.LogOdds(), bounds=(0, 9), normalize=normalize, batch_size=batch_size)
    want = ap.Gradient()(field, X, target=1)
    new = again(field)
    assert (new.score, new.site, new.bounds, new.normalize) == (field.score, field.site, field.bounds, normalize)
    assert (new.is_automatic, new.chunk) == (batch_size == "auto", 1 if batch_size == "auto" else 2)
    assert torch.equal(ap.Gradient()(new, X, target=1).values, want.values)
    assert new.model is not field.model


# -- what a model is ------------------------------------------------------------------------------


class Auxiliary(nn.Module):
    """A classifier whose spatial side head is computed last and not scored."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.side = nn.Conv2d(1, 2, 3), nn.Linear(2, 3), nn.Conv2d(2, 4, 1)

    def forward(self, x: Tensor) -> Any:
        h = self.body(x)
        return {"logits": self.head(h.mean((2, 3))), "side": self.side(h)}


@pytest.mark.parametrize("chunk", ["auto", 1])
def test_grad_cam_takes_the_last_layer_the_score_depends_on(chunk: Any) -> None:
    torch.manual_seed(0)
    model, x = Auxiliary(), torch.rand(2, 1, 6, 6)
    a = ap.GradCAM()(ap.Field(model, batch_size=chunk), x, target=1)
    assert torch.equal(a.values, ap.GradCAM(layer=ap.At("body"))(ap.Field(model), x, target=1).values)
    assert (a.cost.forward.tolist(), a.cost.backward.tolist()) == ([1, 1], [1, 1])
    b = ap.SmoothGrad(ap.GradCAM(), samples=2)(ap.Field(model, batch_size=chunk), x, target=1)
    assert b.values.shape == a.values.shape


def test_grad_cam_of_an_inner_unit_takes_a_layer_before_it() -> None:
    model, x = Auxiliary(), torch.rand(2, 1, 6, 6)
    field = ap.Field(model, ap.Neuron(ap.At("side"), (0, 1, 1)))
    assert ap.GradCAM()(field, x).values.shape == (2, 4, 4)


def test_errors_of_a_read_name_the_site() -> None:
    model, x = Auxiliary(), torch.rand(2, 1, 6, 6)
    with pytest.raises(errors.NoGradientPathError, match=r"At\(name='side'") as caught:
        ap.GradCAM(layer=ap.At("side"))(ap.Field(model), x, target=1)
    assert "Input()" not in str(caught.value)
    q = ap.Field(model).bind(x, target=1)
    with pytest.raises(errors.NoGradientPathError, match=r"does not depend on At\(name='side'.*\n.*\n.*another site"):
        q.tap(x, torch.arange(2), [ap.At("body"), ap.At("side")])


def test_grad_cam_without_any_layer_on_the_way() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3))
    field = ap.Field(model, lambda out: out.detach().mean((1, 2, 3)))
    with pytest.raises(errors.NoGradientPathError, match="none of the spatial layers"):
        ap.GradCAM()(field, torch.rand(1, 1, 5, 5))


@pytest.mark.parametrize("make", [parametrizations.spectral_norm, spectral_norm])
def test_spectral_norm_in_train_mode(make: Any) -> None:
    model = nn.Sequential(make(nn.Linear(3, 2)))
    with pytest.raises(errors.ModelError, match="train mode") as caught:
        ap.Field(model).bind(X, target=0)
    assert "model.eval()" in str(caught.value)
    assert ap.Field(model.eval()).bind(X, target=0)


@pytest.mark.parametrize("kind", ["forward_pre", "forward", "full_backward"])
def test_hooks_of_the_user_are_told_of(kind: str) -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    getattr(model[0], f"register_{kind}_hook")(lambda *args: None)
    warnings = ap.Gradient()(ap.Field(model), X, target=0).warnings
    assert ["hooks of your own" in w and "'0'" in w for w in warnings] == [True]


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")  # the old one is what is tested
@pytest.mark.parametrize("make", [weight_norm, parametrizations.weight_norm, spectral_norm])
def test_hooks_of_torch_are_not(make: Any) -> None:
    model = nn.Sequential(make(nn.Linear(3, 2))).eval()
    assert ap.Gradient()(ap.Field(model), X, target=0).warnings == ()


# -- numbers --------------------------------------------------------------------------------------


def test_only_torch_s_own_words_mean_that_memory_ran_out() -> None:
    assert not is_memory(RuntimeError("I can't allocate memory cells: not enough memory neurons"))
    assert is_memory(RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"))
    assert is_memory(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert is_memory(torch.OutOfMemoryError("anything"))
    assert is_memory(MemoryError())

    def model(x: Tensor) -> Tensor:
        raise RuntimeError("can't allocate memory of past events")

    with pytest.raises(errors.ModelError, match="past events"):
        ap.Field(model).bind(X)


def test_a_singular_gradient_off_paths_is_told_without_quadratures() -> None:
    def root(x: Tensor) -> Tensor:
        return x.sqrt().sum(1)

    with pytest.raises(errors.NonFiniteError) as caught:
        ap.Gradient()(ap.Field(root), torch.zeros(1, 2))
    assert "nodes" not in str(caught.value)
    with pytest.raises(errors.NonFiniteError) as caught:
        ap.IntegratedGradients(quadrature=ap.quadrature.Trapezoid(4))(ap.Field(root), X)
    assert "quadrature without nodes at the ends" in str(caught.value)
    with pytest.raises(errors.NonFiniteError) as caught:
        ap.IntegratedGradients()(ap.Field(lambda x: (x - 9).sqrt().sum(1)), X + 9)
    assert "nodes" not in str(caught.value)


def test_a_singular_baseline_is_told_as_such() -> None:
    with pytest.raises(errors.NonFiniteError, match="baseline itself") as caught:
        ap.IntegratedGradients()(ap.Field(lambda x: x.log().sum(1)), X)
    assert "choose a baseline where the score is finite" in str(caught.value)
    assert "quadrature" not in str(caught.value)


def test_a_baseline_that_requires_gradient_leaves_no_graph_behind() -> None:
    baseline = ap.baselines.Given(torch.zeros(1, 3, requires_grad=True))
    for method in (ap.IntegratedGradients(baseline), ap.GradientTimesInput(baseline)):
        a = method(ap.Field(total), X)
        assert not a.values.requires_grad
        assert a.gap is not None
        assert not a.gap.requires_grad
    wanted = X.clone().requires_grad_()
    b = ap.IntegratedGradients(baseline)(ap.Field(total), wanted, differentiable=True)
    assert b.values.requires_grad


class Holder:
    """Outputs with an attribute for logits that is empty."""

    def __init__(self, loss: Tensor) -> None:
        self.logits, self.loss = None, loss


@pytest.mark.parametrize(
    "outputs", [lambda t: {"logits": None, "loss": t}, lambda t: {"logits": [t, t], "loss": t}, Holder]
)
def test_a_loss_is_not_explained_in_place_of_missing_logits(outputs: Any) -> None:
    with pytest.raises(errors.ScoreError, match="logits"):
        ap.Field(lambda x: outputs(total(x))).bind(X)
