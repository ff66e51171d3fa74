"""Peak memory, each case in a fresh process: what it adds to the process that holds the model.

`python -m benchmarks.memory` prints all; on a GPU (`--device cuda`) the peak of what torch has allocated is read.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import apportion as ap
from apportion.parts.quadrature import Gauss
from benchmarks import models, peers
from benchmarks.harness import OURS, Net, first_line
from benchmarks.rows import Setting, bare

MIB = 1 << 20
FLAT = 64
"""Rows a pass where memory is to stay flat."""


@dataclass(frozen=True)
class Case:
    """Integrated gradients of some examples.

    Attributes:
        who: "apportion", "captum", or "bare" for the passes alone.
        net: the network's name.
        size: pixels a side.
        examples: how many.
        steps: for each.
        batch: rows a pass.
        heap: what glibc does with blocks that are freed; see `HEAPS`.
    """

    who: str
    net: str
    size: int
    examples: int
    steps: int
    batch: int
    heap: str = "usual"


@dataclass(frozen=True)
class MemoryRow:
    """Peaks side by side; the first over the second is the ratio.

    Attributes:
        name: group/network/what.
        cases: by name; one that cannot run is reported.
        at_most: the goal.
    """

    name: str
    cases: Mapping[str, Case]
    at_most: float | None = None


def rows(short: bool) -> list[MemoryRow]:
    """List them: more steps and examples over one pass, and what others take for the same."""
    many = (("small", 32, 64, 1000, 256), ("resnet18", 224, 4, 32, 16))
    out = []
    for net, size, examples, steps, batch in (("vgg11", 64, 2, 4, 4),) if short else many:
        cases = {OURS: Case(OURS, net, size, examples, steps, batch)}
        others = {
            "one pass": Case(OURS, net, size, 1, batch, batch),
            "one bare pass": Case("bare", net, size, 1, batch, batch),
            "captum": Case("captum", net, size, examples, steps, batch),
        }
        name = f"memory/{net}/{steps:,} steps, {examples} examples"
        out.append(MemoryRow(name, cases if short else cases | others, at_most=1.2))
        out += [] if short else _in_other_heaps(out[-1])
    return out if short else [*out, *_flat()]


def _in_other_heaps(row: MemoryRow) -> list[MemoryRow]:
    """Tell what is held from what glibc's heap adds."""

    def within(heap: str) -> dict[str, Case]:
        return {name: replace(row.cases[name], heap=heap) for name in (OURS, "one pass")}

    return [MemoryRow(f"{row.name}, {how}", within(heap), row.at_most) for heap, (how, _) in HEAPS.items() if how]


HEAPS: dict[str, tuple[str, Callable[[], AbstractContextManager[object]]]] = {
    "usual": ("", nullcontext),
    "kept": ("memory kept", ap.keep_memory),
    "given back": ("memory given back", ap.give_back_memory),
}


def _flat() -> list[MemoryRow]:
    """More and more steps, and examples, of 64 × 64 pictures on the small network, each over one pass."""
    several = {f"{n:,} steps": (4, n) for n in (64, 250, 1000)} | {f"{n} examples": (n, 64) for n in (16, 64)}
    several["both: 64 examples, 1,000 steps"] = 64, 1000
    one = Case(OURS, "small", 64, 1, FLAT, FLAT)
    usual = [
        MemoryRow(f"memory/flat/{what}", {OURS: Case(OURS, "small", 64, *size, FLAT), "one pass": one}, at_most=1.2)
        for what, size in several.items()
    ]
    return [each for row in usual for each in (row, *_in_other_heaps(row))]


def peak(device: torch.device) -> float:
    """Read the peak of this process in MiB; `ru_maxrss` would start at the peak of the process that started it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def _start_anew(device: torch.device) -> None:
    """Forget the peak so far, which making many examples may have set, and give back what is free."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is held now


def run(case: Case, net: Net) -> None:
    """Do the work of a case."""
    if case.who == OURS:
        field = ap.Field(net.model, batch_size=case.batch)
        ap.IntegratedGradients(quadrature=Gauss(case.steps))(field, net.x, target=0, ids=range(len(net.x)))
    elif case.who == "captum":
        peers.captum("IntegratedGradients", n_steps=case.steps, internal_batch_size=case.batch)(net)()
    else:
        bare(net, case.steps, case.batch)()


def measure_here(case: Case, device: torch.device) -> float:
    """Run a case in this process, after another of a single row has loaded whatever it needs."""
    torch.set_num_threads(1)
    setting = Setting(device)
    net = setting.net(case.net, case.examples, case.size)()
    run(Case(case.who, case.net, case.size, 1, 1, 1), Net(net.model, net.x[:1]))
    _start_anew(device)
    before = peak(device)
    with HEAPS[case.heap][1]():
        run(case, net)
        return peak(device) - before


def measure(row: MemoryRow, device: torch.device) -> dict[str, Any]:
    """Run every case in a process of its own."""
    found: dict[str, Any] = {}
    for name, case in row.cases.items():
        command = [
            sys.executable,
            "-m",
            "benchmarks.memory",
            "--device",
            device.type,
            "--case",
            json.dumps(asdict(case)),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            found[name] = {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1][:160]}
        else:
            found[name] = {"mib": json.loads(done.stdout.splitlines()[-1])}
    ratios = []
    for other in list(row.cases)[1:]:
        if "mib" in found[OURS] and "mib" in found[other]:
            r = found[OURS]["mib"] / max(found[other]["mib"], 1e-9)
            goal = (
                {"goal": f"≤ {row.at_most:g}", "met": r <= row.at_most} if row.at_most and other == "one pass" else {}
            )
            ratios.append({"name": f"memory over {other}", "median": r, "low": r, "high": r, **goal})
    return {"name": row.name, "variants": found, "ratios": ratios, "machine": models.machine() | {"threads": 1}}


def main() -> None:
    """Run one case, or all in processes of their own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--case", help="one, as JSON; prints MiB")
    given = parser.parse_args()
    device = torch.device(given.device)
    peers.make_torchvision_importable()
    if given.case:
        try:
            print(json.dumps(measure_here(Case(**json.loads(given.case)), device)))
        except ImportError as error:
            raise SystemExit(first_line(error)) from None
        return
    for row in rows(short=False):
        for name, found in measure(row, device)["variants"].items():
            print(f"{row.name}: {name:14} {found.get('failed') or format(found['mib'], '7.0f') + ' MiB'}")


if __name__ == "__main__":
    main()
