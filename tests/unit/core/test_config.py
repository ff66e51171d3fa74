"""Configurations: to JSON and back."""

import functools
import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import apportion as ap
from apportion.core.config import Configurable, digest, from_config, is_reproducible, to_config
from apportion.core.errors import ConfigError


@dataclass(frozen=True)
class Tricky(Configurable):
    """Fields named like the markers of the format."""

    tensor: Any = 1
    callable: Any = 2
    dict: Any = 3
    dtype: Any = torch.float64
    float: Any = math.inf


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Configurable):
        return type(a) is type(b) and all(same(v, vars(b)[k]) for k, v in vars(a).items())
    if isinstance(a, tuple | list):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    return type(a) is type(b) and repr(a) == repr(b)


VALUES = [
    None,
    True,
    3,
    -0.5,
    math.inf,
    -math.inf,
    math.nan,
    "text",
    torch.bfloat16,
    torch.arange(6.0).reshape(2, 3),
    torch.tensor([True, False]),
    torch.randn(3).bfloat16(),
    torch.zeros(0, 2),
    torch.tensor(1.5),
    (1, (2.0, "a"), None),
    {"a": 1, "b": {"callable": 2, "tensor": torch.ones(1)}},
    ap.Logit(3),
    ap.Logit((1, 2)),
    ap.Logit([1, 2]),
    [1, [2.0], (3,)],
    ap.Region(torch.ones(2, 2), 1),
    ap.IntegratedGradients(ap.baselines.Given((torch.zeros(1, 2), torch.ones(1, 3))), ap.quadrature.Gauss(7)),
    ap.SmoothGrad(ap.GradientTimesInput(ap.baselines.AtInput(ap.baselines.Blurred(2.0))), 3, ap.noise.Gaussian(0.1)),
    ap.GradCAM(ap.At("layer", 2, "input", "key")),
    ap.Normalize((0.1, 0.2), (0.3, 0.4)),
    ap.groups.Labels(torch.tensor([0, 1, -1])),
    ap.fills.Marginal(torch.ones(2, 3)),
    ap.rules.epsilon_plus_box((0.0, 0.0), (1.0, 1.0)),
    Tricky(),
    Tricky(torch.ones(2), (1,), {"dict": 1}, None, -math.inf),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda v: f"{type(v).__name__}-{str(v)[:20]}")
def test_round_trip(value: Any) -> None:
    tensors: dict[str, Tensor] = {}
    text = json.dumps(to_config(value, tensors), allow_nan=False)
    assert same(value, from_config(json.loads(text), tensors)), text
    assert is_reproducible(json.loads(text))


def test_numpy_values() -> None:
    assert to_config(np.int64(3)) == 3
    assert to_config(np.float32(0.5)) == 0.5
    assert to_config(np.bool_(True)) is True
    tensors: dict[str, Tensor] = {}
    back = from_config(to_config(np.arange(3), tensors), tensors)
    assert back.tolist() == [0, 1, 2]
    found = ap.Gradient()(ap.Field(lambda x: x, ap.Logit(int(np.int64(1)))), torch.zeros(1, 2))
    assert found.score == {"type": "Logit", "target": 1}


def test_equal_tensors_are_stored_once_and_bits_tell_them_apart() -> None:
    tensors: dict[str, Tensor] = {}
    to_config([torch.ones(2), torch.ones(2), torch.ones(2).double(), torch.ones(1, 2), -torch.zeros(2)], tensors)
    assert len(tensors) == 4
    strided = torch.arange(6.0).reshape(2, 3).T
    assert digest(strided) == digest(strided.contiguous()) != digest(torch.arange(6.0).reshape(3, 2))
    assert digest(torch.tensor(0.0)) != digest(torch.tensor(-0.0))


class Scorer:
    def __call__(self, z: Tensor) -> Tensor:
        return z[:, 0]


def score(z: Tensor) -> Tensor:
    return z[:, 0]


@pytest.mark.parametrize(
    ("fn", "name"),
    [
        (score, f"{__name__}:score"),
        (lambda z: z[:, 0], f"{__name__}:<lambda>"),
        (Scorer(), f"{__name__}:Scorer"),
        (Scorer, f"{__name__}:Scorer"),
        (functools.partial(score), "functools:partial"),
        (torch.relu, "relu"),
    ],
)
def test_callables_are_named_and_marked(fn: Callable[..., Any], name: str) -> None:
    config = json.loads(json.dumps(to_config((1, {"a": fn}))))
    found = config[1]["dict"]["a"]
    assert found["callable"].endswith(name)
    assert found["reproducible"] is False
    assert not is_reproducible(config)
    with pytest.raises(ConfigError, match="user callable"):
        from_config(config)


def test_attribution_of_a_callable_is_not_reproducible() -> None:
    x = torch.zeros(1, 2)
    assert ap.Gradient()(ap.Field(lambda x: x), x, target=0).reproducible
    assert not ap.Gradient()(ap.Field(lambda x: x, score), x).reproducible


@pytest.mark.parametrize("value", [object(), {1: 2}, {3}, 1j, torch.device("cpu"), b"bytes", [object()]])
def test_values_without_a_form(value: Any) -> None:
    with pytest.raises(ConfigError):
        to_config(value)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"type": "NoSuchClass"}, "unknown class 'NoSuchClass'"),
        ({"type": "os:system"}, "unknown class 'os:system'"),
        ({"type": ["Logit"]}, "unknown class"),
        ({"type": "Logit", "taget": 3}, "taget"),
        ({"type": "Region"}, "mask"),
        ({"type": "Blurred", "sigma": -1}, "positive"),
        ({"tensor": "0" * 32}, "not among the stored"),
        ({"dtype": "load"}, "'load'"),
        ({"dtype": "nothing"}, "'nothing'"),
        ({"no": "marker"}, "what to_config writes"),
        ({"type": "Score"}, "Score"),
    ],
)
def test_damaged_configurations(config: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        from_config({"type": "SmoothGrad", "base": config} if "type" in config else config)


def test_reading_imports_nothing(tmp_path: Path) -> None:
    """A file that names a module must not get it imported, nor run anything."""
    (tmp_path / "evil.py").write_text("open('executed', 'w').close()\nclass Boom: pass\n")
    code = """
import sys
from apportion.core.config import from_config
from apportion.core.errors import ConfigError
for config in ({"type": "evil:Boom"}, {"type": "evil.Boom"}, {"callable": "evil:Boom"}, {"type": "builtins:exec"}):
    try:
        from_config(config)
    except ConfigError:
        continue
    sys.exit("built something")
sys.exit("imported" if "evil" in sys.modules else 0)
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert not (tmp_path / "executed").exists()


def test_users_classes_are_found_under_their_module() -> None:
    config = to_config(Tricky())
    assert config["type"] == f"{__name__}:Tricky"
    assert to_config(ap.Gradient())["type"] == "Gradient"
