"""Peak memory of one gradient pass, each variant in a fresh process.

`python -m benchmarks.memory` prints what a pass adds to the process that holds the model.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import lite0

ROWS = 8


def _peak_mib() -> float:
    """Read the peak of this process; `ru_maxrss` would start at the peak of the process that started it."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(variant: str) -> dict[str, float]:
    """Run one variant in this process."""
    torch.set_num_threads(1)
    model, x = lite0(), torch.rand(ROWS, 3, 224, 224)
    with torch.no_grad():
        model(x[:1])
    before = _peak_mib()
    if variant == "own module":
        leaf = x.clone().requires_grad_()
        torch.autograd.grad(model(leaf)[:, 0].sum(), leaf)
    else:
        import apportion as ap

        before = _peak_mib()
        q = ap.Field(model, batch_size=ROWS).bind(x, target=0)
        q.value_and_grad(q.x, torch.arange(ROWS))
    return {"peak_mib": _peak_mib() - before, "process_mib": _peak_mib()}


def compare() -> dict[str, Any]:
    """Run every variant in a process of its own."""
    out = {}
    for variant in ("own module", "field"):
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.memory", "--variant", variant],
            capture_output=True,
            text=True,
            check=True,
        )
        out[variant] = json.loads(done.stdout)
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if given.variant:
        print(json.dumps(measure(given.variant)))
    else:
        found = compare()
        if given.json:
            print(json.dumps(found))
        else:
            for name, peak in found.items():
                print(f"{name:12} {peak['peak_mib']:7.0f} MiB above the loaded model, {ROWS} rows of 224 x 224")
