"""How much of the time of a method is spent outside the kernels of the model's own passes, on a GPU.

On a CPU, `python -m benchmarks --only profile/` tells the same of torch's operations, on their own account each.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

import apportion as ap
from apportion.parts.quadrature import Gauss
from benchmarks import models
from benchmarks.harness import Variant
from benchmarks.rows import Setting, bare, mine


@dataclass(frozen=True)
class ProfileRow:
    """Integrated gradients of a network, traced.

    Attributes:
        name: group/network.
        net: the network's name.
    """

    name: str
    net: str


def rows(device: torch.device) -> list[ProfileRow]:
    """List them."""
    return [ProfileRow(f"profile/{net}", net) for net in ("lite0", "resnet18", "vit_s")]


def traced(run: Variant, device: torch.device) -> tuple[float, float]:
    """Give wall time and the time of all kernels, in milliseconds, after a warm-up."""
    on_gpu = device.type == "cuda"
    settle = torch.cuda.synchronize if on_gpu else lambda: None
    run()
    settle()
    also = [ProfilerActivity.CUDA] if on_gpu else []
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, *also]) as trace:
        start = time.perf_counter()
        run()
        settle()
        taken = time.perf_counter() - start
    events = trace.key_averages()
    return 1e3 * taken, (kernels(events) if on_gpu else operations(events)) / 1e3


def operations(events: Iterable[Any]) -> float:
    """Add up the microseconds of torch's own operations on the CPU, without what they call."""
    return sum(e.self_cpu_time_total for e in events if e.key.startswith("aten::"))


def kernels(events: Iterable[Any]) -> float:
    """Add up the microseconds of what ran on the GPU itself; operations on the CPU name the same time again."""
    return sum(
        e.self_device_time_total for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation
    )


def measure(row: ProfileRow, device: torch.device, *, short: bool = False) -> dict[str, Any]:
    """Trace our passes and the bare ones: what is more than the bare kernels is ours or idle."""
    net = Setting(device, short).net(row.net, 1)()
    steps, batch = (128, 32) if device.type == "cuda" else (8, 4)
    ours = traced(mine(ap.IntegratedGradients(quadrature=Gauss(steps)), batch_size=batch)(net), device)
    alone = traced(bare(net, steps, batch), device)
    share = {"share outside model kernels": 1 - alone[1] / ours[0], "share idle": 1 - ours[1] / ours[0]}
    return {
        "name": row.name,
        "variants": {"apportion": {"ms": ours[0], "kernels": ours[1]}, "bare": {"ms": alone[0], "kernels": alone[1]}},
        "ratios": [{"name": k, "median": v, "low": v, "high": v} for k, v in share.items()],
        "machine": models.machine() | {"device": device.type, "threads": torch.get_num_threads()},
    }
