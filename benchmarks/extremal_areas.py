"""Extremal perturbation as its authors set it, on a bundled picture; and where regions lie that tell nothing.

Writes results/extremal_areas.{json,jpg}. About four minutes on one quiet core.

    python -m benchmarks.extremal_areas
"""

from __future__ import annotations

import argparse
import io
import json
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

import apportion as ap
from apportion.adapters import bundled, zoo
from apportion.show import maps
from benchmarks.models import machine

RESULTS = Path(__file__).parent / "results"
AREAS = (0.1, 0.2, 0.4)


def on_picture(name: str, steps: int) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Search regions of a picture: what was reached, the picture, and the masks [areas, H, W]."""
    model = zoo.load("efficientnet_lite0")
    x, field = model.see(bundled.picture(name)), model.field(batch_size=len(AREAS))
    start = time.process_time()
    # with fewer steps the penalty of the area grows faster, to the same end
    a = ap.ExtremalPerturbation(AREAS, steps=steps, growth=1.0035 ** (800 / steps))(field, x)
    seconds = time.process_time() - start
    masks = a.parts["masks"][0]
    record = {
        "picture": name,
        "class": model.label(int(a.target[0])),
        "steps": steps,
        "areas": AREAS,
        "reached": a.parts["area"][0].tolist(),
        "neither in nor out": ((masks > 0.1) & (masks < 0.9)).float().mean((1, 2)).tolist(),
        "logit of the picture": float(a.value[0]),
        "logit of the region": a.parts["score"][0, :, 0].tolist(),
        "seconds": round(seconds, 1),
        "warnings": list(a.warnings),
    }
    return record, x[0], masks


def of_nothing(margin: bool, count: int = 24, side: int = 112) -> Tensor:
    """Search regions of noise for a score that is noise as well; mean mask [H, W] over searches and mirrors."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 1, side, side, generator=generator)
    weight = torch.randn(side, side, generator=generator) / side
    search = ap.ExtremalPerturbation(
        (0.1,), mask=ap.subsets.SmoothMask(7, 14.0), steps=200, growth=1.014, levels=4, sigma=8.0, margin=margin
    )
    a = search(ap.Field(lambda rows: 3 * (rows[:, 0] * weight).sum((1, 2))), x)
    mean = a.values.mean(0)
    mean = mean + mean.T
    mean = mean + mean.flip(0)
    return (mean + mean.flip(1)) / 8


def border(mean: Tensor, wide: int) -> float:
    """Give the mean within so many pixels of the border over the mean of all."""
    inner = mean[wide:-wide, wide:-wide]
    return float((mean.sum() - inner.sum()) / (mean.numel() - inner.numel()) / mean.mean())


def main() -> None:
    """Search, write the record and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", default="coffee")
    parser.add_argument("--steps", type=int, default=800)
    given = parser.parse_args()
    torch.set_num_threads(1)
    means = {margin: of_nothing(margin) for margin in (False, True)}
    edges = {str(margin): border(mean, 14) for margin, mean in means.items()}
    record, x, masks = on_picture(given.picture, given.steps)
    record["border over all, by margin"] = edges
    print(json.dumps(record, indent=1))
    (RESULTS / "extremal_areas.json").write_text(json.dumps({"machine": machine(), **record}, indent=1))

    figure = Figure(figsize=(2 * (len(AREAS) + 3), 2.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(AREAS) + 3)
    for axis in axes:
        axis.set_axis_off()
    shown = torch.from_numpy(maps.to_rgb(x).copy()) / 255
    axes[0].imshow(shown.numpy())
    axes[0].set_title(f"{record['class']}\nlogit {record['logit of the picture']:.1f}", fontsize=8)
    for axis, mask, area, kept in zip(axes[1:], masks, record["reached"], record["logit of the region"], strict=False):
        axis.imshow((shown * (0.15 + 0.85 * mask[..., None])).numpy())
        axis.contour(mask.numpy(), levels=[0.5], colors="lime", linewidths=1)
        axis.set_title(f"area {area:.3f}\nlogit {kept:.1f}", fontsize=8)
    top = max(float(mean.max()) for mean in means.values())
    for axis, (margin, mean) in zip(axes[-2:], means.items(), strict=True):
        axis.imshow(mean.numpy(), cmap="viridis", vmin=0, vmax=top)
        axis.set_title(f"noise, margin={margin}\nborder {edges[str(margin)]:.2f} of the mean", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    Image.open(buffer).convert("RGB").save(RESULTS / "extremal_areas.jpg", quality=80, optimize=True)


if __name__ == "__main__":
    main()
