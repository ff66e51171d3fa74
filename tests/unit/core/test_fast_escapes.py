"""What lies between two folded operations never reaches anyone as numbers, whoever reads it and wherever it is kept."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apportion as ap
from apportion.core.derivative import is_memory

KEPT: dict[str, Tensor] = {}


class _Record:
    def __init__(self, held: dict[str, Tensor]) -> None:
        self.held = held


def _gate(a: Tensor) -> Tensor:
    return torch.clamp(a.mean((1, 2, 3)) - 0.6, 0.0, 9.0)  # shut for the first example, the one checked


def _in_thread(f: Tensor) -> Tensor:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_gate, f).result()


def _to_global(f: Tensor, y: Tensor) -> Any:
    KEPT["f"] = f
    return y


def _plain(o: Any) -> Tensor:
    return o[:, 0]


ESCAPES: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], Tensor]]] = {
    "thread": (lambda f, y: y + _in_thread(f)[:, None], _plain),
    "deque": (lambda f, y: (y, deque([f])), lambda o: o[0][:, 0] + o[1][0].mean((1, 2, 3))),
    "record": (lambda f, y: (y, _Record({"f": f})), lambda o: o[0][:, 0] + o[1].held["f"].mean((1, 2, 3))),
    "deep": (lambda f, y: (y, [[[[[[f]]]]]]), lambda o: o[0][:, 0] + o[1][0][0][0][0][0][0].mean((1, 2, 3))),
    "closure": (lambda f, y: (y, lambda: f), lambda o: o[0][:, 0] + o[1]().mean((1, 2, 3))),
    "global": (_to_global, lambda o: o[:, 0] + KEPT["f"].mean((1, 2, 3))),
}


class Net(nn.Module):
    def __init__(self, then: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.c, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.c2, self.fc = nn.Conv2d(4, 4, 3), nn.Linear(4, 3)
        with torch.no_grad():
            assert self.b.running_mean is not None
            self.b.running_mean.normal_()
            self.c.weight.abs_()
        self.then = then

    def forward(self, x: Tensor) -> Any:
        f = self.c(x)
        return self.then(f, self.fc(self.c2(F.relu(self.b(f))).mean((2, 3))))


@pytest.mark.parametrize("how", ESCAPES)
@pytest.mark.parametrize("batch_size", ["auto", 1])
def test_a_convolution_that_is_read_elsewhere_has_its_numbers(how: str, batch_size: Any) -> None:
    """Memory that was never written in their place gave values off by 1e20, in silence."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net(ESCAPES[how][0]).eval()
        x = torch.cat([torch.rand(2, 3, 8, 8) * 0.02, torch.rand(2, 3, 8, 8) * 4])
    fast, plain = (
        ap.Gradient()(ap.Field(model, ESCAPES[how][1], batch_size=batch_size, fast=f), x) for f in (True, False)
    )
    torch.testing.assert_close(fast.values, plain.values)
    torch.testing.assert_close(fast.value, plain.value)


def test_nothing_else_keeps_a_batch_norm_from_being_folded() -> None:
    model = Net(lambda f, y: y).eval()
    found = ap.Gradient()(ap.Field(model), torch.rand(2, 3, 8, 8), target=0)
    assert "1 batch-norm(s) folded" in found.engine["passes"]


def test_a_stand_in_says_where_its_tensor_is() -> None:
    asked: list[Any] = []

    class Asking(Net):
        def forward(self, x: Tensor) -> Any:
            f = self.c(x)
            asked.append((f.device.type, f.is_cuda, f.dtype, f.shape[1:]))
            return self.fc(self.c2(F.relu(self.b(f))).mean((2, 3)))

    model = Asking(lambda f, y: y).eval()
    found = ap.Gradient()(ap.Field(model), torch.rand(2, 3, 8, 8), target=0)
    assert "folded" in found.engine["passes"]
    assert set(asked) == {("cpu", False, torch.float32, torch.Size([4, 8, 8]))}


def test_repeated_passes_are_on_the_account() -> None:
    rows: list[int] = []

    class Turning(Net):
        def forward(self, x: Tensor) -> Any:
            rows.append(len(x))
            f = self.c(x)
            y = self.b(f)
            y = y + f.abs() if bool((x > 2).any()) else y
            return self.fc(self.c2(F.relu(y)).mean((2, 3)))

    field = ap.Field(Turning(lambda f, y: y).eval())
    x = torch.rand(3, 3, 8, 8)
    assert "folded" in ap.Gradient()(field, x, target=0).engine["passes"]
    rows.clear()
    cost = ap.Gradient()(field, x + 3, target=0).cost
    assert int(cost.forward.sum() + cost.at_x.sum()) + cost.checks == sum(rows)


def test_another_autocast_makes_another_plan() -> None:
    model, x = Net(lambda f, y: y).eval(), torch.rand(2, 3, 8, 8)
    field = ap.Field(model)
    ap.Gradient()(field, x, target=0)
    with torch.autocast("cpu", torch.bfloat16):
        inside = ap.Gradient()(field, x, target=0)
        plain = ap.Gradient()(ap.Field(model, fast=False), x, target=0)
    assert "folded" not in inside.engine["passes"]
    torch.testing.assert_close(inside.values, plain.values)


def test_arrays_of_the_user_are_not_written_to_and_their_edits_are_seen() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.calls, self.scale = nn.Linear(4, 2), np.zeros(1), np.ones(1)

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.layer(x) * float(self.scale[0])

    model, x = Counting().eval(), torch.rand(2, 4)
    field = ap.Field(model)
    before = ap.Gradient()(field, x, target=0).values
    assert model.calls.tolist() == [0]
    model.scale[0] = 3
    torch.testing.assert_close(ap.Gradient()(field, x, target=0).values, 3 * before)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: out of memory",
        "HIP out of memory. Tried to allocate 2 GiB",
        "CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "std::bad_alloc",
        "[enforce fail] DefaultCPUAllocator: can't allocate memory",
        "not enough memory: you tried to allocate 3 bytes.",
    ],
)
def test_memory_that_ran_out_is_known_by_its_words(text: str) -> None:
    assert is_memory(RuntimeError(text))
    assert not is_memory(ValueError(text))
    assert not is_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
