"""Memory: what is there is seen, what is kept is given back, rows per pass are remembered for each shape."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import apportion as ap
from apportion.core import field as field_module
from apportion.core import memory


def test_control_groups_of_both_versions(tmp_path: Path) -> None:
    (tmp_path / "user" / "job").mkdir(parents=True)
    (tmp_path / "user" / "memory.max").write_text("1000\n")
    (tmp_path / "user" / "memory.current").write_text("400\n")
    (tmp_path / "user" / "job" / "memory.max").write_text("max\n")
    (tmp_path / "user" / "job" / "memory.current").write_text("100\n")
    (tmp_path / "memory" / "docker").mkdir(parents=True)
    (tmp_path / "memory" / "docker" / "memory.limit_in_bytes").write_text("500")
    (tmp_path / "memory" / "docker" / "memory.usage_in_bytes").write_text("800")
    own = tmp_path / "cgroup"
    own.write_text("0::/user/job\n5:cpu,cpuacct:/x\n4:memory:/docker\n")
    assert memory._control_groups(own, tmp_path) == [600, 0]
    assert memory._control_groups(tmp_path / "none", tmp_path) == []


def test_a_tight_control_group_makes_passes_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_control_groups", lambda: [1 << 22])
    x = torch.rand(2, 1000)
    field = ap.Field(lambda x: x.exp().exp().sum(1, keepdim=True))
    field.bind(x)
    assert field.chunk <= (1 << 20) // 4000
    monkeypatch.undo()
    larger = ap.Field(lambda x: x.exp().exp().sum(1, keepdim=True))
    larger.bind(x)
    assert larger.chunk > field.chunk


def test_rows_are_chosen_for_each_shape_and_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(field_module, "budget", lambda device: 1 << 20)
    field = ap.Field(lambda x: x.exp().sum(1, keepdim=True))
    field.bind(torch.rand(2, 10))
    small = field.chunk
    field.bind(torch.rand(2, 10_000))
    large = field.chunk
    assert large < small / 100
    field.shrink(large // 2)
    field.bind(torch.rand(2, 10))
    assert field.chunk == small
    field.bind(torch.rand(2, 10_000))
    assert field.chunk == large // 2


def test_passes_on_a_cpu_stay_near_its_cache_unless_few_rows_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(field_module, "budget", lambda device: 1 << 29)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    field = ap.Field(lambda x: x.exp().sum(1, keepdim=True))
    field.bind(torch.rand(2, 10_000))
    assert 64 < field.chunk <= memory.CLOSE // 40_000
    field.bind(torch.rand(2, 1_000_000))
    assert field.chunk == 16


PEAK = """
import sys
from pathlib import Path
import torch, apportion as ap
torch.set_num_threads(1)
net = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 16, 3), torch.nn.ReLU(),
                          torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()).eval()
x = torch.rand(int(sys.argv[2]), 3, 48, 48)
with ap.give_back_memory():  # so that the peak is what was held, and not also the gaps of the heap
    line = ap.quadrature.Midpoint(int(sys.argv[1]))
    ap.IntegratedGradients(quadrature=line)(ap.Field(net, batch_size=32), x, target=0)
print(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_memory_is_flat_in_steps_and_examples() -> None:
    """Ten times the steps on twice the examples: kept gradients would be 340 MiB, one layer of a pass is 4."""

    def peak(steps: int, examples: int) -> int:
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(steps), str(examples)], capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    assert peak(100, 128) - peak(10, 64) <= 20 * 1024


FAULTS = """
import resource
import torch, apportion as ap
size = 1 << 24
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        t = torch.ones(size)
        del t
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
before = faults()
with ap.keep_memory() as made, ap.keep_memory() as again:
    inside = min(faults() for _ in range(4))  # the first takes the blocks, and others may move them once
after = faults()
print(int(made), int(again), before, inside, after, 4 * size // 4096)
"""


def test_kept_memory_is_not_faulted_in_again() -> None:
    """In a process of its own: what other tests made of the heap decides which blocks go back."""
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    made, again, before, inside, after, pages = map(int, done.stdout.split())
    if not made:
        pytest.skip("not glibc")
    assert again
    assert before > 4 * pages  # five blocks, each anew
    assert inside < 0.05 * before
    assert after > 0.25 * pages  # what was kept has gone back: a good part of a block at least comes anew


GAPS = """
import sys
from pathlib import Path
import torch, apportion as ap
def held(): return next(int(l.split()[1]) for l in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in l)
with ap.keep_memory():  # after which freed blocks of 1 MiB stay by themselves
    pass
with (ap.give_back_memory if sys.argv[1] == "give" else ap.keep_memory)() as made:
    blocks = [torch.ones(1 << 18) for _ in range(64)]
    before = held()
    del blocks[::2]
    print(made, before - held())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_gaps_between_blocks_go_back() -> None:
    def gone(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", GAPS, how], capture_output=True, text=True, check=True)
        made, size = done.stdout.split()
        if made != "True":
            pytest.skip("not glibc")
        return int(size)

    assert gone("give") >= 31 * 1024
    assert gone("keep") <= 2 * 1024


@pytest.mark.parametrize("make", [ap.keep_memory, ap.give_back_memory])
def test_one_block_entered_several_times(make: Any) -> None:
    block = make()
    with block as made:
        pass
    for _ in range(2):
        with block, block as again:
            assert made is again
            assert len(memory._made) == 2 * made
        assert memory._made == []

    @make()
    def inside() -> int:
        return len(memory._made)

    assert [inside(), inside()] == [made, made]
    with pytest.raises(ZeroDivisionError), block:
        raise ZeroDivisionError
    assert memory._made == []


def test_keep_memory_elsewhere_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_glibc", lambda: None)
    block = ap.give_back_memory()
    for _ in range(2):
        with ap.keep_memory() as made, block as either:
            assert not made
            assert not either
