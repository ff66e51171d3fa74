"""Bad input gets a clear error: what was given, what was expected, what to do."""

import copy
import dataclasses
import pickle
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apportion as ap
from apportion.core import errors

pytestmark = pytest.mark.usefixtures("as_users_run")
DOUBLE = torch.float64


@contextmanager
def clear(kind: type[ap.ApportionError], *words: str) -> Iterator[Any]:
    """Expect an error of ours with all its parts and these words."""
    with pytest.raises(ap.ApportionError) as caught:
        yield caught
    error, text = caught.value, str(caught.value)
    assert type(error) is kind, f"{type(error).__name__}: {text}"
    assert error.given
    assert "To fix: " in text
    for word in words:
        assert word in text, text


def linear(features: int = 3, classes: int = 4) -> nn.Module:
    return nn.Linear(features, classes).double()


def batch(rows: int = 2, features: int = 3) -> Tensor:
    return torch.randn(rows, features, dtype=DOUBLE)


def spatial(x: Tensor) -> Tensor:
    """Outputs [R, 3, 2, 2]."""
    return torch.stack([x[:, :1] * k for k in range(1, 13)], 1).reshape(-1, 3, 2, 2)


# -- targets ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (4, ("target 4", "0 to 3")),
        (-1, ("target -1", "0 to 3")),
        ([0, 4], ("target 4", "0 to 3")),
        (1.0, ("1.0", "integers")),
        (torch.tensor([0.0, 1.0]), ("float", "integers")),
        (True, ("bool", "integers")),
        (torch.tensor([True, False]), ("bool", "integers")),
        ([0, 1, 2], ("(3, 1)", "2 example", "(2,)")),
        (torch.zeros(2, 2, dtype=torch.long), ("(2, 2)", "(2, 1)")),
        (torch.zeros(2, 1, 1, dtype=torch.long), ("(2, 1, 1)",)),
        ((0, 1), ("tuple (0, 1)", "1 index")),
        ("cat", ("'cat'", "int")),
        ([[0], [1, 2]], ("[[0], [1, 2]]", "int")),
        ([None, 1], ("None", "int")),
    ],
    ids=str,
)
def test_target_of_a_classifier(target: Any, words: tuple[str, ...]) -> None:
    field = ap.Field(linear())
    with clear(errors.TargetError, *words):
        field.bind(batch(), target=target)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ((0, 1), ("tuple (0, 1)", "3 index")),
        ((0, 2, 0), ("target 2 on output axis 2", "0 to 1")),
        (1, ("(2, 1)", "(3, 2, 2)", "Region")),
        (None, ("no target", "3 indices")),
    ],
    ids=str,
)
def test_target_of_spatial_outputs(target: Any, words: tuple[str, ...]) -> None:
    with clear(errors.TargetError, *words):
        ap.Field(spatial).bind(batch(), target=target)


@pytest.mark.parametrize("outputs", [lambda x: x.sum(1), lambda x: x.sum(1, keepdim=True)])
@pytest.mark.parametrize("target", [1, -1, 0.0, True, [0, 1], [0, 0, 0]], ids=str)
def test_target_of_a_model_that_gives_one_number(outputs: Callable[[Tensor], Tensor], target: Any) -> None:
    with clear(errors.TargetError):
        ap.Field(outputs).bind(batch(), target=target)
    assert ap.Field(outputs).bind(batch()).target is None


@pytest.mark.parametrize("score", [ap.Logit(1), ap.Contrast(1), ap.Sequence(tokens=(1,)), ap.Loss(labels=1)])
def test_target_that_disagrees_with_the_score(score: ap.Score) -> None:
    outputs = (lambda x: spatial(x).flatten(2)) if isinstance(score, ap.Sequence) else linear()
    with clear(errors.TargetError, "one of them"):
        ap.Field(outputs, score).bind(batch(), target=[0, 1])
    with clear(errors.TargetError, "one of them"):
        ap.Field(outputs, score).bind(batch(), target="cat")


def test_targets_of_the_other_scores() -> None:
    x, net = batch(), nn.Sequential(linear())
    with clear(errors.TargetError, "two classes"):
        ap.Field(net, ap.Contrast(1, 1)).bind(x)
    with clear(errors.ScoreError, "two or more classes"):
        ap.Field(lambda x: x.sum(1), ap.Contrast()).bind(x)
    with clear(errors.TargetError, "Neuron"):
        ap.Field(net, ap.Neuron(ap.At("0"), (1,))).bind(x, target=1)
    with clear(errors.TargetError, "0 to 3"):
        ap.Field(net, ap.Neuron(ap.At("0"), (4,))).bind(x)
    with clear(errors.TargetError, "1 index"):
        ap.Field(net, ap.Neuron(ap.At("0"), (1, 1))).bind(x)
    with clear(errors.TargetError, "without labels"):
        ap.Field(net, ap.Loss()).bind(x)
    with clear(errors.TargetError, "3 targets for 2"):
        ap.Field(net, ap.Loss(fn=lambda z, t: (z[:, 0] - t) ** 2)).bind(x, target=[1.0, 2.0, 3.0])
    with clear(errors.TargetError, "3 targets for 2"):
        ap.Field(net, lambda z, t: z[:, 0] * t).bind(x, target=[1.0, 2.0, 3.0])
    with clear(errors.TargetError, "'cat'"):
        ap.Field(net, lambda z, t: z[:, 0]).bind(x, target="cat")


def test_targets_of_sequences_and_regions() -> None:
    x = batch()

    def tokens(x: Tensor) -> Tensor:
        return spatial(x).flatten(2)  # [R, 3 steps, 4 words]

    with clear(errors.ScoreError, "Sequence", "[steps, tokens]"):
        ap.Field(linear(), ap.Sequence()).bind(x)
    with clear(errors.TargetError, "positions (3,)", "-3 to 2"):
        ap.Field(tokens, ap.Sequence((3,))).bind(x)
    with clear(errors.TargetError, "tokens", "0 to 3"):
        ap.Field(tokens, ap.Sequence((0,), (4,))).bind(x)
    with clear(errors.TargetError, "(2, 2)", "(2, 1)"):
        ap.Field(tokens, ap.Sequence((0,), (1, 1))).bind(x)
    with clear(errors.ScoreError, "mask of shape (3, 3)", "(2, 2)"):
        ap.Field(spatial, ap.Region(torch.ones(3, 3))).bind(x)
    with clear(errors.ScoreError, "empty"):
        ap.Field(spatial, ap.Region(torch.zeros(2, 2))).bind(x)
    with clear(errors.ScoreError, "negative"):
        ap.Field(spatial, ap.Region(torch.tensor([[2.0, -1.0], [0.0, 0.0]]))).bind(x)
    with clear(errors.ScoreError, "outputs [rows, classes, *space]"):
        ap.Field(linear(), ap.Region(torch.ones(()))).bind(x)


# -- baselines ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.zeros(2, 4, dtype=DOUBLE), ("(2, 4)", "(1, 3)", "(2, 3)")),
        (torch.zeros(3, 3, dtype=DOUBLE), ("(3, 3)", "(2, 3)")),
        (torch.zeros(1, dtype=DOUBLE), ("(1,)", "(2, 3)")),
        (torch.zeros(1, 3), ("float32", "float64")),
        (torch.zeros(1, 3, dtype=torch.long), ("int64", "float64")),
        (torch.tensor([[0.0, torch.nan, 0.0]], dtype=DOUBLE), ("NaN",)),
        (torch.tensor([[0.0, torch.inf, 0.0]], dtype=DOUBLE), ("infinite",)),
        ((torch.zeros(1, 3, dtype=DOUBLE),), ("tuple",)),
        (0.0, ("float", "Constant")),
    ],
    ids=["features", "rows", "rank", "float32", "int", "nan", "inf", "tree", "number"],
)
def test_given_baseline(value: Any, words: tuple[str, ...]) -> None:
    method = ap.IntegratedGradients(ap.baselines.Given(value))
    with clear(errors.BaselineError, *words):
        method(ap.Field(linear()), batch(), target=0)


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(2, 3, dtype=DOUBLE),
        (torch.zeros(1, 3, dtype=DOUBLE),),
        (torch.zeros(1, 3, dtype=DOUBLE),) * 3,
        {"a": torch.zeros(1, 3, dtype=DOUBLE), "b": torch.zeros(1, 3, dtype=DOUBLE)},
    ],
    ids=["tensor", "short", "long", "dict"],
)
def test_given_baseline_of_another_structure(value: Any) -> None:
    """A tensor must not be taken apart into baselines of the inputs, nor a longer tuple be cut."""
    field = ap.Field(lambda a, b: (a * b).sum(1))
    with clear(errors.BaselineError, "structure", "x[0]"):
        ap.IntegratedGradients(ap.baselines.Given(value))(field, (batch(), batch()))


@dataclasses.dataclass(frozen=True)
class NoDraws(ap.baselines.Baseline):
    """Forgets the axis of draws."""

    def __call__(self, q: ap.Question) -> Any:
        return q.x


@dataclasses.dataclass(frozen=True)
class InTuple(ap.baselines.Baseline):
    """Gives a tuple for a tensor."""

    def __call__(self, q: ap.Question) -> Any:
        return (q.x[:, None],)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ap.IntegratedGradients(cast(Any, ap.baselines.Zero)), ("class Zero as baseline", "instance")),
        (lambda: ap.IntegratedGradients(cast(Any, torch.zeros(3))), ("Tensor as baseline", "Given")),
        (lambda: ap.IntegratedGradients(cast(Any, 0.0)), ("0.0 as baseline", "Given")),
        (lambda: ap.GradientTimesInput(cast(Any, None)), ("NoneType as baseline",)),
        (lambda: ap.IntegratedGradients(quadrature=cast(Any, 32)), ("32 as quadrature", "Gauss(32)")),
        (lambda: ap.SmoothGrad(noise=cast(Any, 0.1)), ("0.1 as noise", "noise.Gaussian")),
        (lambda: ap.SmoothGrad(cast(Any, ap.Gradient)), ("class Gradient as base", "ap.Gradient()")),
        (lambda: ap.SmoothGrad(samples=cast(Any, 2.5)), ("2.5 as samples", "an int")),
        (lambda: ap.GradCAM(relu=cast(Any, "no")), ("'no' as relu", "a bool")),
    ],
)
def test_option_of_another_type(make: Any, words: tuple[str, ...]) -> None:
    with clear(errors.ConfigError, *words):
        make()


@pytest.mark.parametrize(
    ("baseline", "words"),
    [
        (NoDraws(), ("(2, 3)", "shape (2, k, 3)")),
        (InTuple(), ("x[0]", "structure")),
        (ap.baselines.Constant((0.0, 1.0)), ("2 channel values", "axis 1")),
        (ap.baselines.Blurred(1.0), ("blur", "[R, C, H, W]")),
    ],
    ids=["rank", "tree", "channels", "blur"],
)
def test_baseline_that_is_not_one(baseline: Any, words: tuple[str, ...]) -> None:
    q = ap.Field(linear()).bind(batch(), target=0)
    with clear(errors.BaselineError, *words):
        q.references(baseline)


@pytest.mark.parametrize("baseline", [ap.baselines.Zero, torch.zeros(1, 3), 0.0, None])
@pytest.mark.parametrize("method", [ap.GradientTimesInput, ap.IntegratedGradients])
def test_method_with_a_baseline_that_is_not_one(method: Any, baseline: Any) -> None:
    with clear(errors.ConfigError, "baseline=", "ap.baselines.Zero()", "ap.baselines.Given(tensor)"):
        method(baseline=baseline)


# -- inputs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.zeros(2, 3, dtype=torch.long), ("int64", "floating point", "At(", "embedding")),
        (torch.zeros(2, 3, dtype=torch.bool), ("bool", "embedding")),
        (torch.zeros(2, 3, dtype=torch.complex64), ("complex64", "floating point")),
        (torch.zeros(0, 3, dtype=DOUBLE), ("(0, 3)", "empty batch", "at least one example")),
        (torch.zeros(2, 0, dtype=DOUBLE), ("(2, 0)", "at least one feature")),
        (torch.zeros((), dtype=DOUBLE), ("single number", "x[None]")),
        ([torch.zeros(2, 3, dtype=DOUBLE), torch.zeros(3, 3, dtype=DOUBLE)], ("(2, 3)", "(3, 3)", "same number")),
        ([[0.0, 1.0, 2.0]], ("x[0][0] is a float", "torch.Tensor")),
        ("text", ("x is a str", "torch.Tensor")),
        (None, ("x is a NoneType", "torch.Tensor")),
        ((), ("empty tree", "at least one tensor")),
        ({}, ("empty tree", "at least one tensor")),
        (torch.zeros(2, 3), ("float32", "float64", "precision=")),
        (torch.zeros(2, 3, dtype=DOUBLE, device="meta"), ("meta",)),
    ],
    ids="int bool complex empty featureless 0-d batches list str none tuple dict dtype meta".split(),
)
@pytest.mark.parametrize("bounds", [None, (0.0, 1.0)])
def test_input(x: Any, words: tuple[str, ...], bounds: Any) -> None:
    with clear(errors.InputError, *words):
        ap.Field(linear(), bounds=bounds).bind(x, target=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_not_finite_input_names_example_and_tensor(value: float) -> None:
    x = {"a": batch(), "b": batch()}
    x["b"][1, 2] = value
    with clear(errors.NonFiniteError, "x['b']", "example 1"):
        ap.Field(lambda a, b: (a * b).sum(1)).bind(x)
    with clear(errors.NonFiniteError, "example 1"):
        ap.Field(lambda x: x).bind(torch.tensor([0.0, value]))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("example", [0, 2])
def test_not_finite_output_names_the_example(value: float, example: int) -> None:
    def model(x: Tensor) -> Tensor:
        return torch.where(x[:, :1] == example, value, x)

    x = torch.arange(3, dtype=DOUBLE)[:, None].expand(3, 2)
    with clear(errors.NonFiniteError, f"example {example}"):
        ap.Gradient()(ap.Field(model, batch_size=2), x, target=0)


def test_a_class_masked_with_minus_infinity_is_no_error() -> None:
    def model(x: Tensor) -> Tensor:
        return torch.cat([x, torch.full_like(x[:, :1], -torch.inf)], 1)

    a = ap.Gradient()(ap.Field(model, ap.LogProbability()), batch(1), target=0)
    assert bool(torch.isfinite(a.values).all())
    with clear(errors.NonFiniteError, "example 0"):
        ap.Gradient()(ap.Field(model), batch(1), target=3)


@pytest.mark.parametrize("chunk", [1, 2, "auto"])
def test_not_finite_gradient_names_the_example(chunk: Any) -> None:
    x = torch.tensor([[1.0], [4.0], [0.0]], dtype=DOUBLE)
    with clear(errors.NonFiniteError, "gradient", "x", "example 2", "float64"):
        ap.Gradient()(ap.Field(lambda x: x.sqrt().sum(1), batch_size=chunk), x)


def test_not_finite_at_the_baseline() -> None:
    with clear(errors.NonFiniteError, "baseline"):
        ap.IntegratedGradients()(ap.Field(lambda x: x.log().sum(1)), batch().abs())


@pytest.mark.parametrize("shift", [0.0, 2.0])
def test_bounds(shift: float) -> None:
    x = torch.rand(2, 3, dtype=DOUBLE) + (shift or -1.0)
    with clear(errors.InputError, "ranges over", "bounds (0.0, 1.0)"):
        ap.Field(linear(), bounds=(0.0, 1.0)).bind(x, target=0)
    ap.Field(linear(), bounds=(-1.0, 3.0)).bind(x, target=0)


@pytest.mark.parametrize("ids", [["a"], ["a", "b", "c"], [], torch.arange(3)])
def test_ids_of_the_wrong_length(ids: Any) -> None:
    with clear(errors.InputError, f"{len(ids)} ids for 2 example"):
        ap.Field(linear()).bind(batch(), target=0, ids=ids)


@pytest.mark.parametrize("seed", [None, 1.5, "a"])
def test_seed(seed: Any) -> None:
    with clear(errors.ConfigError, f"seed={seed!r}", "int"):
        ap.Field(linear()).bind(batch(), target=0, seed=seed)


@pytest.mark.parametrize("extra", [torch.zeros(3, 3), {"w": torch.zeros(1, 3)}, (torch.zeros(3),)])
def test_extra_of_the_wrong_first_axis(extra: Any) -> None:
    with clear(errors.InputError, "extra", "2 example", "Shared"):
        ap.Field(lambda x, w: x @ w, extra=extra).bind(batch())


# -- scores -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("score", "words"),
    [
        (lambda z: z.sum(), ("shape ()", "shape (2,)")),
        (lambda z: z, ("shape (2, 4)", "shape (2,)")),
        (lambda z: z[:, :1], ("shape (2, 1)",)),
        (lambda z: z[:1, 0], ("shape (1,)",)),
        (lambda z: z.argmax(1), ("int64", "floating point")),
        (lambda z: z[:, 0].tolist(), ("list",)),
        (lambda z: None, ("NoneType",)),
        (lambda z: 1.0, ("float",)),
        (lambda z: z[:, 7], ("raised IndexError", "(2, 4)", "one number per row")),
        (lambda z: z.logits, ("raised AttributeError",)),
        (lambda z, t, u: z, ("raised TypeError",)),
    ],
    ids=["scalar", "all", "column", "one", "int", "list", "none", "float", "index", "attribute", "arguments"],
)
def test_score_that_is_not_one_number_per_example(score: Any, words: tuple[str, ...]) -> None:
    with clear(errors.ScoreError, *words) as caught:
        ap.Gradient()(ap.Field(linear(), score), batch())
    if "raised" in words[0]:
        assert caught.value.__cause__ is not None


@pytest.mark.parametrize("outputs", [None, "text", {"a": 1}, [], ["a", "b"]])
def test_outputs_that_hold_no_tensor(outputs: Any) -> None:
    with clear(errors.ScoreError, "output", "score=lambda"):
        ap.Field(lambda x: outputs).bind(batch())


def test_outputs_of_which_none_is_the_main_one() -> None:
    with clear(errors.ScoreError, "tuple", "score=lambda"):
        ap.Field(lambda x: (x, x)).bind(batch())


@pytest.mark.parametrize("score", [3, "logit", torch.zeros(2)])
def test_score_of_another_type(score: Any) -> None:
    with clear(errors.ScoreError, f"{type(score).__name__} as score"):
        ap.Field(linear(), score)


# -- the state of the model ---------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 4, num_layers=2, dropout=0.5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0][:, -1]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5)), ("1 (Dropout)",)),
        (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), ("1 (BatchNorm1d)",)),
        (nn.Sequential(nn.Linear(3, 4), nn.AlphaDropout()), ("1 (AlphaDropout)",)),
        (Recurrent(), ("rnn (GRU)",)),
    ],
    ids=["dropout", "batch norm", "alpha dropout", "recurrent"],
)
def test_train_mode(model: nn.Module, words: tuple[str, ...]) -> None:
    x = torch.randn(2, 5, 3) if isinstance(model, Recurrent) else torch.randn(2, 3)
    with clear(errors.ModelError, "train mode", "model.eval()", *words):
        ap.Field(model.train()).bind(x, target=0)
    ap.Field(model.eval()).bind(x, target=0)


def test_train_mode_that_changes_nothing_is_no_error() -> None:
    ap.Field(nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.0), nn.LayerNorm(4)).train()).bind(torch.randn(2, 3))


def _functional_dropout(x: Tensor) -> Tensor:
    return F.dropout(x, 0.5, training=True)


def _noisy(x: Tensor) -> Tensor:
    return x + torch.rand(x.shape, dtype=x.dtype)


@pytest.mark.parametrize("model", [_functional_dropout, _noisy])
def test_model_that_draws_random_numbers(model: Callable[[Tensor], Tensor]) -> None:
    before = torch.get_rng_state()
    with clear(errors.ModelError, "draws random numbers", "deterministic"):
        ap.Field(model).bind(torch.ones(2, 64), target=0)
    assert torch.equal(before, torch.get_rng_state())


class Counting(nn.Module):
    """Adds the number of calls to its output."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.calls


class Averaging(nn.Module):
    """Updates a buffer in place at every call."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(3, dtype=DOUBLE))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.mul_(0.9).add_(x.detach().mean(0))
        return x - self.seen


class Replacing(Averaging):
    """Replaces the buffer instead."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + x.detach().mean(0)
        return x - self.seen


class Locked(Averaging):
    """Cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


@pytest.mark.parametrize("kind", [Counting, Averaging, Replacing, Locked])
def test_model_that_keeps_state(kind: type[nn.Module]) -> None:
    model = kind()
    before = copy.deepcopy(model.state_dict())
    with clear(errors.ModelError, "same input gave different outputs", "no state"):
        ap.Field(model).bind(batch(), target=0)
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[k], after[k]) for k in before)
    if isinstance(model, Counting):
        assert model.calls == 0


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    "model",
    [
        lambda x: x - x.mean(0),
        nn.Sequential(nn.Unflatten(1, (3, 1, 1)), nn.Upsample(2), nn.BatchNorm2d(3, track_running_stats=False).double())
        .append(nn.Flatten())
        .eval(),
        lambda x: {"logits": x + x.sum(0, keepdim=True)},
    ],
    ids=["mean", "batch norm", "dict"],
)
def test_model_that_mixes_the_batch(model: Any, rows: int) -> None:
    with clear(errors.ModelError, "other examples", "independent", "batch_size=1"):
        ap.Field(model).bind(batch(rows), target=0)


def test_mixing_model_one_row_at_a_time() -> None:
    a = ap.Gradient()(ap.Field(lambda x: x - x.mean(0) / 2, batch_size=1), batch(3), target=0)
    assert a.values.tolist() == [[0.5, 0.0, 0.0]] * 3


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda x: x.sum(), ("shape ()", "1 row", "first axis")),
        (lambda x: x.sum(1).repeat(2), ("shape (2,)", "1 row")),
        (lambda x: x @ torch.zeros(5, 2, dtype=DOUBLE), ("raised RuntimeError", "(1, 3)")),
        (lambda x, y: x, ("raised TypeError",)),
        (nn.Linear, ("class Linear", "instance")),
        (None, ("NoneType", "torch.nn.Module")),
        (3, ("int", "torch.nn.Module")),
        (nn.Linear(3, 4, device="meta"), ("meta", "load the weights")),
    ],
    ids=["scalar", "rows", "shape", "arguments", "class", "none", "number", "meta"],
)
def test_model_that_cannot_be_asked(model: Any, words: tuple[str, ...]) -> None:
    with clear(errors.ModelError, *words):
        ap.Field(model).bind(torch.randn(2, 3) if isinstance(model, nn.Module) else batch(), target=0)


class Mine(Exception):
    pass


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_exception_of_the_model_is_chained(after: int) -> None:
    """Whatever pass it happens in: the checks, the target or the gradient."""
    calls = []

    def model(x: Tensor) -> Tensor:
        calls.append(len(x))
        if len(calls) > after:
            raise Mine("the reason")
        return x

    with clear(errors.ModelError, "Mine", "the reason", "(") as caught:
        ap.Gradient()(ap.Field(model), batch())
    assert isinstance(caught.value.__cause__, Mine)


def test_exception_of_the_model_that_is_not_an_error_passes() -> None:
    def model(x: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ap.Field(model).bind(batch())


# -- no gradient path ---------------------------------------------------------------------------


def _detached(x: Tensor) -> Tensor:
    return x.detach() * 2


def _unconnected(x: Tensor) -> Tensor:
    with torch.no_grad():
        return x * 2


def _chosen(x: Tensor) -> Tensor:
    return F.one_hot(x.argmax(1), 3).to(x.dtype)


@pytest.mark.parametrize(
    "model", [_detached, _unconnected, _chosen, torch.round, torch.sign, lambda x: (x * 3).floor() / 3]
)
def test_no_gradient_path(model: Any) -> None:
    with clear(errors.NoGradientPathError, "differentiable"):
        ap.Gradient()(ap.Field(model), batch(), target=0)


def test_zero_gradients_that_are_right_pass() -> None:
    x = -batch().abs() - 1
    assert not ap.Gradient()(ap.Field(F.relu), x, target=0).values.any()
    straight = ap.Field(lambda x: x + (x.round() - x).detach())
    assert ap.Gradient()(straight, x, target=0).values[:, 0].tolist() == [1, 1]
    beside = ap.Field(lambda x: x.round() + F.relu(x))
    assert not ap.Gradient()(beside, x, target=0).values.any()


def test_only_one_of_two_inputs_is_used() -> None:
    x = (batch(), batch())
    with clear(errors.NoGradientPathError, "x[1]", "allow_unused=True", "extra="):
        ap.Gradient()(ap.Field(lambda a, b: a.sum(1)), x)
    with clear(errors.NoGradientPathError, "x['b']"):
        ap.Gradient()(ap.Field(lambda a, b: a.sum(1)), {"a": x[0], "b": x[1]})
    a = ap.Gradient()(ap.Field(lambda a, b: a.sum(1), allow_unused=True), x)
    assert torch.equal(a.values[0], torch.ones(2, 3, dtype=DOUBLE))
    assert torch.equal(a.values[1], torch.zeros(2, 3, dtype=DOUBLE))
    assert any("x[1]" in w for w in a.warnings)
    with clear(errors.NoGradientPathError):
        ap.Gradient()(ap.Field(lambda a, b: torch.ones(len(a), requires_grad=True) * 1, allow_unused=True), x)


def test_site_after_what_the_score_reads() -> None:
    net = nn.Sequential(OrderedDict(a=linear(3, 3), b=linear(3, 3)))
    with clear(errors.NoGradientPathError):
        ap.Gradient()(ap.Field(net, ap.Neuron(ap.At("a"), (0,)), ap.At("b")), batch())


# -- sites --------------------------------------------------------------------------------------


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = linear(3, 3)
        self.activation = nn.ReLU()
        self.pair = Pair()
        self.idle = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y, z = self.pair(self.activation(self.encoder(x)))
        return self.activation(y + z)


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + 1, x * 2


@pytest.mark.parametrize(
    ("site", "words"),
    [
        (ap.At("encodr"), ("'encodr'", "nearest", "'encoder'", "field.sites")),
        (ap.At("activation"), ("called 2 times", "call=0", "call=1")),
        (ap.At("activation", call=2), ("2 time", "call=2")),
        (ap.At("idle"), ("not called",)),
        (ap.At("pair"), ("index=0", "index=1", "(1, 3)")),
        (ap.At("pair", index=2), ("index=0", "index=1")),
        (ap.AtOp("softmax"), ("'softmax' was not called", "relu", "linear")),
        (ap.AtOp("relu"), ("called 2 times", "call=0", "call=1")),
    ],
    ids=str,
)
def test_site(site: ap.Site, words: tuple[str, ...]) -> None:
    with clear(errors.SiteError, *words):
        ap.Field(Reused(), site=site).bind(batch(), target=0)
    with clear(errors.SiteError, *words):
        q = ap.Field(Reused()).bind(batch(1), target=0)
        q.tap(q.x, torch.arange(1), [site])


def test_site_of_a_plain_callable() -> None:
    with clear(errors.SiteError, "plain callable", "Module"):
        ap.Field(lambda x: x, site=ap.At("layer")).bind(batch())


def test_site_that_holds_integers_or_no_rows() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.whole, self.one = Whole(), One()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.whole(x) + self.one(x)

    class Whole(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.long()

    class One(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ones(1, 3, dtype=DOUBLE)

    with clear(errors.SiteError, "int64"):
        ap.Field(Odd(), site=ap.At("whole")).bind(batch(), target=0)
    with clear(errors.SiteError, "1 rows for 2"):
        ap.Field(Odd(), site=ap.At("one")).bind(batch(), target=0)


def test_sites_can_be_listed_whatever_the_site_and_the_input() -> None:
    net = nn.Sequential(OrderedDict(words=nn.Embedding(9, 4), flat=nn.Flatten(), top=nn.Linear(12, 2)))
    found = ap.Field(net, site=ap.At("wrds")).sites(torch.zeros(2, 3, dtype=torch.long))
    assert [(s.site, s.shape) for s in found] == [
        (ap.At("words", 0), (1, 3, 4)),
        (ap.At("flat", 0), (1, 12)),
        (ap.At("top", 0), (1, 2)),
    ]
    assert len(ap.Field(net).sites(torch.zeros(2, 3, dtype=torch.long))) == 3


def test_layer_of_grad_cam() -> None:
    with clear(errors.SiteError, "convolutional"):
        ap.GradCAM()(ap.Field(linear()), batch(), target=0)
    with clear(errors.SiteError, "(2, 4)", "[B, channels, h, w]"):
        ap.GradCAM(ap.At("0"))(ap.Field(nn.Sequential(linear())), batch(), target=0)
    with clear(errors.ConfigError, "At('0')"):
        ap.GradCAM(cast(Any, "0"))


# -- exported programs --------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


@pytest.mark.parametrize("rows", [1, 4])
def test_exported_program_of_one_batch_size(rows: int) -> None:
    program = torch.export.export(Small().eval(), (torch.randn(rows, 3),)).module()
    with clear(errors.ModelError, "exported", "dynamic", "dynamic_shapes"):
        ap.Field(program).bind(torch.randn(3, 3), target=0)


def test_exported_program_with_a_dynamic_batch() -> None:
    model = Small().eval()
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(model, (torch.randn(4, 3),), dynamic_shapes=shapes)
    with clear(errors.ModelError, "ExportedProgram", "program.module()"):
        ap.Field(program)
    assert callable(program)
    for rows in (1, 3):
        x = torch.randn(rows, 3)
        found = ap.Gradient()(ap.Field(program.module()), x, target=1)
        assert torch.allclose(found.values, ap.Gradient()(ap.Field(model), x, target=1).values, atol=1e-6)


# -- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, ("batch_size=0", "positive int or 'auto'")),
        ({"batch_size": -1}, ("batch_size=-1",)),
        ({"batch_size": 2.0}, ("batch_size=2.0",)),
        ({"batch_size": True}, ("batch_size=True",)),
        ({"batch_size": "all"}, ("batch_size='all'",)),
        ({"precision": int}, ("precision=<class 'int'>", "torch.dtype")),
        ({"precision": torch.int64}, ("precision=torch.int64", "floating-point")),
        ({"precision": "float64"}, ("precision='float64'",)),
        ({"bounds": (1.0, 0.0)}, ("bounds=(1.0, 0.0)", "low < high")),
        ({"bounds": (0.0,)}, ("bounds=(0.0,)",)),
        ({"bounds": 1.0}, ("bounds=1.0",)),
        ({"bounds": (0.0, torch.nan)}, ("bounds",)),
        ({"site": "layer"}, ("str as site", "At(...)")),
        ({"site": ap.Input}, ("as site", "Input()")),
        ({"normalize": (0.5, 0.5)}, ("normalize=(0.5, 0.5)", "ap.Normalize")),
    ],
    ids=str,
)
def test_option_of_the_field(options: dict[str, Any], words: tuple[str, ...]) -> None:
    with clear(errors.ConfigError, *words):
        ap.Field(linear(), **options)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ap.At("a", end=cast(Any, "middle")),
        lambda: ap.AtOp("sofmax"),
        lambda: ap.Normalize((0.5,), (0.5, 0.5)),
        lambda: ap.Normalize((0.5,), (0.0,)),
        lambda: ap.Neuron(cast(Any, "layer"), (0,)),
        lambda: ap.Neuron(ap.At("layer"), cast(Any, 0)),
        lambda: ap.Region(cast(Any, [[1]])),
        lambda: ap.Sequence(cast(Any, 0)),
        lambda: ap.Sequence(()),
        lambda: ap.baselines.Blurred(0.0),
        lambda: ap.baselines.Blurred(-1.0),
        lambda: ap.baselines.Noise(sigma=0.0),
        lambda: ap.baselines.Noise(count=0),
        lambda: ap.noise.Gaussian(0.0),
        lambda: ap.noise.Gaussian(torch.nan),
        lambda: ap.quadrature.Gauss(0),
        lambda: ap.quadrature.Midpoint(-1),
        lambda: ap.quadrature.Trapezoid(1),
        lambda: ap.quadrature.Left(cast(Any, 2.0)),
        lambda: ap.quadrature.Right(0),
        lambda: ap.SmoothGrad(samples=0),
        lambda: ap.SmoothGradSquared(samples=-1),
        lambda: ap.VarGrad(samples=cast(Any, 2.5)),
        lambda: ap.SmoothGrad(base=cast(Any, ap.Gradient)),
        lambda: ap.SmoothGrad(base=cast(Any, "gradient")),
        lambda: ap.GradCAM(cast(Any, "layer4")),
        lambda: ap.rules.Rules((("reluu", ap.rules.Plain()),)),
    ],
)
def test_option_of_a_part(make: Callable[[], Any]) -> None:
    with clear(errors.ConfigError):
        make()


def test_nearest_operation_is_named() -> None:
    with clear(errors.ConfigError, "'sofmax'", "'softmax'"):
        ap.AtOp("sofmax")


def test_classes_instead_of_instances() -> None:
    x = batch()
    with clear(errors.ScoreError, "class Logit", "Logit()"):
        ap.Field(linear(), cast(Any, ap.Logit))
    with clear(errors.ConfigError, "class Gradient", "Gradient()"):
        ap.explain(linear(), x, cast(Any, ap.Gradient))
    with clear(errors.ConfigError, "int as method"):
        ap.explain(linear(), x, cast(Any, 3))
    with clear(errors.ConfigError, "Linear as field", "ap.Field(model)"):
        ap.Gradient()(cast(Any, linear()), x)
    q = ap.Field(linear()).bind(x)
    with clear(errors.ConfigError, "class Elements"):
        ap.Game(q, cast(Any, ap.groups.Elements), ap.fills.Baselines())
    with clear(errors.ConfigError, "class Baselines"):
        ap.Game(q, ap.groups.Elements(), cast(Any, ap.fills.Baselines))


def test_unknown_method() -> None:
    with clear(errors.RegistryError, "'integrated_gradient'", "'integrated_gradients'"):
        ap.explain(linear(), batch(), "integrated_gradient")
    with pytest.raises(KeyError):
        ap.method("nothing")


def test_channels_of_normalize() -> None:
    with clear(errors.InputError, "(1, 3)", "2 channel"):
        ap.Field(linear(), normalize=ap.Normalize((0.0, 0.0), (1.0, 1.0))).bind(batch())
    with clear(errors.InputError, "several inputs with normalize="):
        ap.Field(lambda a, b: a, normalize=ap.Normalize((0.0,), (1.0,))).bind((batch(), batch()))


# -- games, groups and reductions ---------------------------------------------------------------


def test_games() -> None:
    q = ap.Field(linear()).bind(batch())
    with clear(errors.ConfigError, "reduce='mean'", "score_of_mean"):
        ap.Game(q, ap.groups.Elements(), ap.fills.Baselines(), cast(Any, "mean"))
    game = ap.Game(q, ap.groups.Elements(), ap.fills.Baselines())
    for shape in [(4, 2), (3,), (3, 4, 3), (1, 1, 4, 3)]:
        with clear(errors.InputError, f"masks of shape {shape}", "(S, 3)", "(2, S, 3)"):
            game.value(torch.ones(shape))
    for wrong in (1.5, -0.5, torch.nan):
        with clear(errors.InputError, "Boolean, or soft in [0, 1]"):
            game.value(torch.full((1, 3), wrong))
    with clear(errors.InputError, "background", "float32"):
        ap.Game(q, ap.groups.Elements(), ap.fills.Marginal(torch.zeros(2, 3))).value(torch.zeros(1, 3))
    with clear(errors.InputError, "background"):
        ap.Game(q, ap.groups.Elements(), ap.fills.Marginal(torch.zeros(2, 4, dtype=DOUBLE))).value(torch.zeros(1, 3))
    with clear(errors.InputError, "list", "Tensor"):
        ap.Game(q, ap.groups.Elements(), ap.fills.Marginal([0.0])).value(torch.zeros(1, 3))


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(4, dtype=torch.long),
        torch.zeros(3, 3, dtype=torch.long),
        torch.zeros(3),
        torch.zeros(3, dtype=torch.bool),
        torch.full((3,), -1),
        torch.tensor([0, 1, -2]),
        [0, 0, 1],
        (torch.zeros(3, dtype=torch.long),),
    ],
    ids=["features", "rows", "float", "bool", "nobody", "negative", "list", "tree"],
)
def test_group_labels(value: Any) -> None:
    q = ap.Field(linear()).bind(batch())
    with clear(errors.InputError, "label"):
        ap.Game(q, ap.groups.Labels(value), ap.fills.Baselines())
    with clear(errors.InputError, "label"):
        ap.Gradient().explain(q).pool(ap.groups.Labels(value))


def test_group_labels_of_another_structure() -> None:
    a = ap.Gradient()(ap.Field(lambda a, b: (a * b).sum(1)), (batch(), batch()))
    for value in (torch.zeros(2, 3, dtype=torch.long), (torch.zeros(3, dtype=torch.long),)):
        with clear(errors.InputError, "x[1]"):
            a.pool(ap.groups.Labels(value))


def test_pixels_of_a_table() -> None:
    with clear(errors.InputError, "Elements()"):
        ap.groups.Pixels().labels(batch())


def test_rows_and_owners_that_do_not_match() -> None:
    q = ap.Field(linear()).bind(batch())
    with clear(errors.InputError, "(2, 3)", "3 owner"):
        q.value(q.x, torch.tensor([0, 1, 1]))


def test_scores_of_several_sites_in_one_pass() -> None:
    q = ap.Field(nn.Sequential(linear())).bind(batch())
    with clear(errors.ConfigError, "one site in one pass"):
        q.value_and_grad(q.x, torch.arange(2), (ap.Logit(), ap.Neuron(ap.At("0"), (0,))))


def test_every_error_has_a_cause_and_a_fix() -> None:
    kinds = ap.ApportionError.__subclasses__()
    assert len(kinds) >= 12
    for kind in kinds:
        assert kind.cause
        assert kind.fix
        assert f"`{kind.__name__}`" in errors.errors_table()
        assert str(kind("given", "expected", "do")) == "given\nExpected: expected\nTo fix: do"
        again = pickle.loads(pickle.dumps(kind("given", "expected", "do")))
        assert type(again) is kind
        assert str(again) == str(kind("given", "expected", "do"))
