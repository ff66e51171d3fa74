"""Prints what fewer digits cost and save: the deviation a field measures, under rules as well, beside the time.

`OMP_NUM_THREADS=1 python -m benchmarks.digits`, in about a minute.
"""

from __future__ import annotations

import statistics

import torch

import apportion as ap
from benchmarks.harness import Clock, interleave
from benchmarks.rows import Setting

DIGITS = ("bf16", "fp16")
COUNT = 4


def measure(name: str, setting: Setting, size: int = 224, rounds: int = 5) -> None:
    """Print a line for each precision: gradients, and those of guided backpropagation."""
    net = setting.net(name, COUNT, size)()
    every = torch.arange(COUNT, device=setting.device)
    fields = {p or "float32": ap.Field(net.model, precision=p, batch_size=COUNT) for p in (None, *DIGITS)}
    asked = {p: f.bind(net.x, target=net.target) for p, f in fields.items()}
    runs = {p: (lambda q=q: q.value_and_grad(net.x, every), 1) for p, q in asked.items()}
    times, _ = interleave(runs, Clock(setting.device), rounds=rounds, seconds=60)
    print(f"{name}: float32 {1e3 * statistics.median(times['float32']) / COUNT:.1f} ms a gradient")
    for p in DIGITS:
        engine = ap.GuidedBackprop()(fields[p], net.x, target=net.target).engine
        plain, (ruled,) = engine["deviation"], engine["deviation_under_rules"]
        faster = statistics.median(a / b for a, b in zip(times["float32"], times[p], strict=True))
        far = [f"{d['relative_error']:.1%}, cosine {d['cosine']:.3f}" for d in (plain, ruled)]
        print(f"  {p}: {faster:.2f} times as fast; gradient {far[0]}; guided backpropagation {far[1]}")


def main() -> None:
    """Measure two networks."""
    torch.set_num_threads(1)
    for name in ("resnet18", "lite0"):
        measure(name, Setting())


if __name__ == "__main__":
    main()
