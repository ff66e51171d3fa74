"""Compiled passes: the same numbers as those as written, or an error; only where nobody looks into a pass."""

from __future__ import annotations

import pickle
import shutil
import threading
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

import apportion as ap
from apportion.core import compiled
from apportion.core.eager import without_compilation
from apportion.core.errors import ConfigError, ModelError

X = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace as ever, and run what was traced as it is: seconds less than Inductor."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")


def _net() -> nn.Module:
    torch.manual_seed(0)
    conv = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*conv, nn.Linear(4, 3)).eval()


def _by(monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
    name = f"apportion_{backend.__name__}"
    torch._dynamo.register_backend(backend, name=name)
    monkeypatch.setattr(compiled, "BACKEND", name)


def _record(field: ap.Field) -> list[dict[str, Any]]:
    return field.engine["compiled"]


def test_values_are_those_as_written_and_a_short_pass_is_filled_up() -> None:
    net = _net()
    field = ap.Field(net, batch_size=4, compile=True)
    q = field.bind(X, target=1)
    checks = q.cost.checks
    rows = torch.rand(11, 3, 8, 8)
    owner = torch.arange(11) % 4
    got = q.value(rows, owner)  # 4, 4 and 3 rows
    assert torch.allclose(got, net(rows)[:, 1], rtol=1e-6, atol=1e-6)
    assert [r["rows"] for r in _record(field)] == [4]
    assert 0 <= _record(field)[0]["away"] <= 1e-6
    assert _record(field)[0]["seconds"] > 0
    assert q.cost.checks == checks + 4
    assert int(q.cost.forward.sum()) == 11
    q.value(rows, owner)
    assert q.cost.checks == checks + 4  # compared once


def test_few_rows_run_as_written() -> None:
    field = ap.Field(_net(), batch_size=8, compile=True)
    q = field.bind(X, target=1)
    q.value(X[:3], torch.arange(3))
    assert _record(field) == []
    q.value(X, torch.arange(4))
    assert [r["rows"] for r in _record(field)] == [8]


def test_a_result_says_that_nothing_was_compiled() -> None:
    field = ap.Field(_net(), compile=True, batch_size=4)
    none = ap.Gradient()(field, X, target=1)
    assert none.engine["compiled"] == []
    assert any("no pass without gradient of 2 to 4 rows" in w for w in none.warnings)
    for a in (ap.ScoreCAM(layer=ap.At("0"))(field, X, target=1), ap.Gradient()(ap.Field(_net()), X, target=1)):
        assert not any("compile" in w for w in a.warnings)
    auto = ap.ScoreCAM(layer=ap.At("0"))(ap.Field(_net(), compile=True), X, target=1)
    assert (auto.engine["compiled"] == []) == any("has compiled nothing" in w for w in auto.warnings)
    assert auto.engine["compiled"] == []


def test_extra_arguments_go_with_their_rows() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, by: Tensor, plus: Tensor) -> Tensor:
            return x.flatten(1)[:, :3] * by[:, None] + plus

    by, plus = torch.tensor([1.0, 2.0, 3.0]), ap.Shared(torch.ones(3))
    field = ap.Field(Scaled(), extra=(by, plus), batch_size=4, compile=True)
    owner = torch.tensor([2, 0, 1])
    got = field.bind(X[:3], target=0).value(X[:3], owner)
    assert torch.equal(got, X[:3].flatten(1)[:, 0] * by[owner] + 1)
    assert len(_record(field)) == 1


def test_methods_give_the_same_map() -> None:
    net = _net()
    layer = ap.At("0")
    methods = {ap.ScoreCAM(layer=layer): 1, ap.IntegratedGradients(): 1, ap.GradCAM(layer=layer): 0, ap.LRP(): 0}
    for method, passes in methods.items():
        same = [method(ap.Field(net, compile=c, batch_size=2), X, target=1) for c in (False, True)]
        assert torch.allclose(same[0].values, same[1].values, rtol=1e-5, atol=1e-6)
        assert "compiled" not in same[0].engine
        assert len(same[1].engine["compiled"]) == passes  # of f(x), f(x') or removals
        assert torch.equal(same[0].cost.forward, same[1].cost.forward)


def test_only_values_are_compiled() -> None:
    """A pass with gradient, at a site or under rules runs as without; target=1 leaves no pass for f(x) alone."""
    field = ap.Field(_net(), compile=True, batch_size=4)
    q = field.bind(X, target=1)
    every = torch.arange(4)
    q.value_and_grad(X, every)
    q.tap(X, every, [ap.At("0")])
    q.tap(X, every, [ap.At("0")], grad=False)
    assert _record(field) == []
    inner = ap.Field(_net(), site=ap.At("0"), compile=True, batch_size=4)
    q = inner.bind(X, target=1)
    q.value(q.x, every)
    assert _record(inner) == []


def test_weights_written_to_are_seen() -> None:
    net = _net()
    field = ap.Field(net, compile=True, batch_size=4)
    before = field.bind(X, target=1).value(X, torch.arange(4))
    with torch.no_grad():
        net.get_submodule("5").get_parameter("weight").mul_(2)
        net.get_submodule("1").get_buffer("running_mean").add_(0.1)
    after = field.bind(X, target=1).value(X, torch.arange(4))
    assert torch.allclose(after, net(X)[:, 1], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(after, before)


def test_the_users_model_is_left_alone() -> None:
    net = _net()
    state = dict(vars(net))
    ap.Field(net, compile=True, batch_size=4).bind(X, target=1).value(X, torch.arange(4))
    assert vars(net) == state
    assert net(X).requires_grad


def test_the_slow_path_of_transformers_is_compiled() -> None:
    """Without gradient torch's own fused layers drop padded positions: f would be another function."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.TransformerEncoder(layer, 1)

        def forward(self, x: Tensor, pad: Tensor) -> Tensor:
            return self.encoder(x, src_key_padding_mask=pad).sum((1, 2))[:, None] + x.sum((1, 2))[:, None]

    x, pad = torch.rand(4, 5, 8), torch.zeros(4, 5, dtype=torch.bool)
    pad[:, 3:] = True
    field = ap.Field(Masked(), extra=(pad,), batch_size=4, compile=True)
    q = field.bind(x, target=0)
    value, _ = q.value_and_grad(x, torch.arange(4))
    assert torch.allclose(q.value(x, torch.arange(4)), value, rtol=1e-5)
    assert len(_record(field)) == 1


def test_many_networks_of_one_class_are_each_compiled() -> None:
    """torch.compile gives up on a piece of code after a few networks, and would say so in a log only."""
    for width in range(2, 13):
        net = nn.Linear(5, width)
        field = ap.Field(net, compile=True, batch_size=2)
        x = torch.rand(2, 5)
        assert torch.allclose(field.bind(x, target=1).value(x, torch.arange(2)), net(x)[:, 1])
        assert len(_record(field)) == 1


def test_other_numbers_are_refused_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(graph: Any, inputs: Any, **_: Any) -> Any:
        return lambda *args: [1.001 * t for t in graph(*args)]

    _by(monkeypatch, wrong)
    q = ap.Field(_net(), compile=True, batch_size=4).bind(X, target=1)
    for _ in range(2):
        with pytest.raises(ModelError, match=r"compiled outputs of Sequential that are 1\.0e-03"):
            q.value(X, torch.arange(4))


def test_a_model_that_does_not_compile_whole_is_refused() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) if float(x.detach().sum()) > 0 else -x.flatten(1)

    q = ap.Field(Branching(), compile=True, batch_size=4).bind(X, target=1)
    with pytest.raises(ModelError, match=r"torch\.compile failed on Branching"):
        q.value(X, torch.arange(4))
    assert q.value_and_grad(X, torch.arange(4))[0].shape == (4,)


def test_without_a_compiler_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(graph: Any, inputs: Any, **_: Any) -> Any:
        raise RuntimeError("No working C++ compiler found in torch._inductor.config.cpp.cxx: (None, 'g++')")

    _by(monkeypatch, without)
    q = ap.Field(_net(), compile=True, batch_size=4).bind(X, target=1)
    with pytest.raises(ModelError, match=r"install g\+\+ or clang\+\+"):
        q.value(X, torch.arange(4))


def test_an_error_of_the_model_stays_its_own() -> None:
    class Picky(nn.Module):
        def forward(self, x: Tensor, limit: Tensor) -> Tensor:
            if x.shape[0] > 2:
                raise ValueError("too many")
            return x.flatten(1)

    field = ap.Field(Picky(), extra=(torch.zeros(3),), compile=True, batch_size=3)
    q = field.bind(X[:3], target=1)
    with pytest.raises(ModelError, match="Picky raised ValueError on 3 row"):
        q.value(X[:3], torch.arange(3))


def test_what_cannot_be() -> None:
    with pytest.raises(ConfigError, match="precision='bf16'"):
        ap.Field(_net(), compile=True, precision="bf16")


def test_threads_compile_on_their_own() -> None:
    net = _net()
    field = ap.Field(net, compile=True, batch_size=4)
    found: dict[int, Tensor] = {}

    def work(i: int) -> None:
        q = field.bind(X, target=1)
        for _ in range(3):
            q.value_and_grad(X, torch.arange(4))  # runs as written, for all threads while it does
            found[i] = q.value(X, torch.arange(4))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(found) == 3
    for value in found.values():
        assert torch.allclose(value, net(X)[:, 1], rtol=1e-6, atol=1e-6)


def test_a_pass_beside_one_that_is_looked_into_runs_as_written() -> None:
    field = ap.Field(_net(), compile=True, batch_size=4)
    q = field.bind(X, target=1)
    with without_compilation():
        value = q.value(X, torch.arange(4))
    assert _record(field) == []
    assert torch.allclose(q.value(X, torch.arange(4)), value, rtol=1e-6)
    assert len(_record(field)) == 1


def test_the_record_survives(tmp_path: Any) -> None:
    field = ap.Field(_net(), compile=True, batch_size=4)
    a = ap.ScoreCAM(layer=ap.At("0"))(field, X, target=1)
    a.save(tmp_path / "a.safetensors")
    assert ap.Attribution.load(tmp_path / "a.safetensors").engine == a.engine
    again = pickle.loads(pickle.dumps(field))
    assert again.compile
    assert again.engine["compiled"] == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own, on its import
def test_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("Inductor makes C++, and no compiler is here")
    monkeypatch.setattr(compiled, "BACKEND", "inductor")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    x = torch.rand(4, 5)
    field = ap.Field(net, compile=True, batch_size=4)
    assert torch.allclose(field.bind(x, target=1).value(x, torch.arange(4)), net(x)[:, 1], rtol=1e-6, atol=1e-6)
    assert [(r["rows"], r["by"]) for r in _record(field)] == [(4, "inductor")]
