"""Units that change their linear piece from picture to baseline; writes results/regions.{md,json}.

python -m benchmarks.regions
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

import apportion as ap
from apportion.adapters import bundled, zoo
from benchmarks.models import machine

STD = 128 / 255
"""A unit of the network's own input, (x - 127) / 128, in units of the picture, [0, 1]."""


def baselines(x: Tensor) -> dict[str, ap.baselines.Baseline]:
    """Far ones, and ones as near as noise of a thousandth."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) * STD
    return {
        "black": ap.baselines.Zero(),
        "own mean": ap.baselines.Mean(),
        "blur, σ = 2 pixels": ap.baselines.Blurred(2.0),
        "the picture and noise of standard deviation 0.01": ap.baselines.Given(x + 0.01 * noise),
        "the picture and noise of standard deviation 0.001": ap.baselines.Given(x + 0.001 * noise),
    }


def main() -> None:
    """Count, print and write."""
    model = zoo.load("efficientnet_lite0")
    plain = model.field()
    field = ap.Field(plain.model, normalize=plain.normalize)  # noise may leave the bounds of pictures
    rows: dict[str, dict[str, float]] = {}
    for name in bundled.drawn():
        x = model.see(bundled.picture(name))
        rows[name] = {label: float(ap.regions(field, x, b).share[0, 0]) for label, b in baselines(x).items()}
        print(name, rows[name], flush=True)
    lines = [
        "# Units on another linear piece",
        "",
        "Made by `python -m benchmarks.regions`: EfficientNet-Lite0, share of",
    ]
    lines += [f"its ReLU6 units; least, median and most of {len(rows)} bundled pictures.", ""]
    lines += ["| baseline | least | median | most |", "|---|---|---|---|"]
    for label in next(iter(rows.values())):
        share = sorted(r[label] for r in rows.values())
        lines.append(f"| {label} | {share[0]:.2%} | {share[len(share) // 2]:.2%} | {share[-1]:.2%} |")
    out = Path(__file__).parent / "results"
    (out / "regions.json").write_text(json.dumps({"machine": machine(), "share": rows}, indent=1))
    (out / "regions.md").write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
