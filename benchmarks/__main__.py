"""Measures speed and memory beside bare passes and other libraries; writes results/speed.{json,md,png}.

python -m benchmarks                       # everything, in about an hour on one core
python -m benchmarks --only ig/lite0       # rows whose name contains it; the others stay as they were
python -m benchmarks --short               # small networks, one round, nothing written: does it run?
python -m benchmarks --device cuda         # results/speed_cuda.*
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks import harness, memory, peers, profile, report
from benchmarks.rows import Setting, rows

RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str] | None = None) -> None:
    """Run what is asked for, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help="a part of names; several times for several")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--list", action="store_true", help="names of rows, and nothing else")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    parser.add_argument("--rounds", type=int, default=15, help="at most")
    parser.add_argument("--out", type=Path, help="where the record goes, if not to benchmarks/results")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("this torch sees no CUDA device: leave --device (or DEVICE=) out to run on the CPU")
    device = torch.device(given.device)
    peers.make_torchvision_importable()
    torch.set_num_threads(given.threads)
    timed = rows(Setting(device, given.short))
    traces = device.type == "cuda" or any("profile/".startswith(o) or o.startswith("profile/") for o in given.only)
    chosen = [*timed, *memory.rows(given.short), *(profile.rows(device) if traces else ())]
    for part in given.only:
        if not any(part in r.name for r in chosen):
            names = "python -m benchmarks --list" + " --short" * given.short
            raise SystemExit(f"no row has {part!r} in its name: {names} prints the names")
    chosen = [r for r in chosen if not given.only or any(part in r.name for part in given.only)]
    usual = None if given.short else RESULTS / ("speed.json" if device.type == "cpu" else f"speed_{device.type}.json")
    file = given.out or usual
    found = report.read(file) if given.only and file else {}
    versions = harness.versions(("torch", *peers.PEERS))
    for row in chosen:
        if given.list:
            print(row.name)
        elif isinstance(row, harness.Row):
            found[row.name] = harness.measure(
                row, device=device, rounds=1 if given.short else given.rounds, short=given.short
            )
        elif isinstance(row, memory.MemoryRow):
            found[row.name] = memory.measure(row, device)
        else:
            found[row.name] = profile.measure(row, device, short=given.short)
        if not given.list:
            print(report.summary(found[row.name]), flush=True)
            if file:
                report.write(found, versions, file)
    if file:
        report.draw(found.values(), file.with_suffix(".png"))
    for line in [] if given.short else report.missed(found.values()):
        print("missed:", line)


if __name__ == "__main__":
    main()
