"""How far occlusion depends on its settings; writes results/occlusion_settings.{md,json} and a sheet per picture.

Size, stride, segments, fill and score are varied one at a time around patches of 32 pixels at a stride of 16, covered
with grey. Maps are compared by the rank correlation of their pixels, and by how much of their positive values lie on
the object that is drawn by hand on the picture. About two minutes a picture on one core.

    python -m benchmarks.occlusion_settings
"""

from __future__ import annotations

import argparse
import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
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
PICTURES = ("chelsea", "coffee")
G, B = ap.groups, ap.baselines
GREY = B.Constant(0.5)
REFERENCE = "32 px"


def settings() -> dict[str, dict[str, tuple[ap.Occlusion, Any]]]:
    """Give what is varied, by what it is: methods, and the score they explain."""

    def covered(groups: Any, baseline: Any = GREY, score: Any = None) -> tuple[ap.Occlusion, Any]:
        return ap.Occlusion(groups, ap.fills.Baselines(baseline)), score

    usual = G.Patches(32, 16)
    return {
        "size, at half of it as stride": {f"{n} px": covered(G.Patches(n, n // 2)) for n in (16, 32, 64, 112)},
        "stride of 32 px": {f"stride {n}": covered(G.Patches(32, n)) for n in (8, 24, 32)},
        "segments": {
            "squares of 32": covered(G.Squares(32)),
            "SLIC, 50": covered(G.Superpixels(50)),
            "SLIC, 150": covered(G.Superpixels(150)),
            "Felzenszwalb": covered(G.Felzenszwalb(scale=300.0, smallest=150)),
        },
        "fill": {
            "black": covered(usual, B.Zero()),
            "white": covered(usual, B.Constant(1.0)),
            "own mean": covered(usual, B.Mean()),
            "blurred": covered(usual, B.Blurred(12.0)),
            "noise": covered(usual, B.Noise(0.25)),
        },
        "score": {"probability": covered(usual, score=ap.Probability())},
    }


def ranks(flat: Tensor) -> Tensor:
    """Rank numbers, ties by their mean, which maps in steps are full of."""
    _, place, count = flat.unique(return_inverse=True, return_counts=True)
    end = count.cumsum(0).double()
    return (end - (count - 1) / 2)[place]


def spearman(a: Tensor, b: Tensor) -> float:
    """Correlate the ranks of two maps; 0 where one is constant."""
    both = torch.stack([ranks(a.flatten()), ranks(b.flatten())])
    return float(torch.corrcoef(both)[0, 1].nan_to_num(0))


def explained(model: zoo.PictureModel, name: str) -> tuple[Tensor, dict[str, dict[str, Any]]]:
    """Explain a picture with every setting."""
    picture = bundled.picture(name)
    x = model.see(picture)
    thing = next(iter(bundled.drawn()[name]))
    truth = bundled.truth(name, thing).through(model.crop, *picture.pixels.shape[1:])
    mask = truth.mask(*x.shape[2:])
    logit = model.field()
    target = int(logit.bind(x).target[0, 0])
    found: dict[str, dict[str, Any]] = {}
    for what, several in settings().items():
        for label, (method, score) in several.items():
            start = time.process_time()
            a = method(logit if score is None else model.field(score), x, target=target)
            shown = maps.picture_map(a)
            positive = shown.clamp(min=0)
            found[label] = {
                "varied": what,
                "map": shown,
                "rows": int(a.cost.forward[0]),
                "seconds": round(time.process_time() - start, 2),
                "on the object": float(positive[mask].sum() / positive.sum().clamp(min=1e-12)),
                "area": float(mask.float().mean()),
                "largest": float(shown.max()),
            }
            print(name, label, found[label]["rows"], found[label]["seconds"], flush=True)
    return x, found


def sheet(x: Tensor, found: dict[str, dict[str, Any]], title: str) -> Image.Image:
    """Draw one row for each thing varied; the reference stands first in each."""
    kinds = list(settings())
    across = 1 + max(sum(f["varied"] == kind for f in found.values()) for kind in kinds)
    figure = Figure(figsize=(1.75 * across, 2.0 * len(kinds) + 0.3), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(kinds), across, squeeze=False)
    figure.suptitle(title, fontsize=9)
    grey = maps.under(x[0], maps.RED_BLUE)
    for row, kind in zip(axes, kinds, strict=True):
        labels = [n for n, f in found.items() if f["varied"] == kind]
        labels = labels if REFERENCE in labels else [REFERENCE, *labels]
        for place, axis in enumerate(row):
            axis.set_axis_off()
            if place >= len(labels):
                continue
            one = found[labels[place]]
            axis.imshow(maps.overlay(maps.paint(one["map"]), grey, 0.65), interpolation="nearest")
            agreed = "reference" if labels[place] == REFERENCE else f"ρ = {one['agreement']:.2f}"
            axis.set_title(f"{labels[place]}\n{agreed}", fontsize=7)
        row[0].text(-0.06, 0.5, kind, transform=row[0].transAxes, rotation=90, fontsize=7, va="center", ha="right")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


def markdown(record: dict[str, Any]) -> str:
    """Write the tables."""
    names = list(record["pictures"])
    first = record["pictures"][names[0]]
    lines = [
        "# Occlusion, by its settings",
        "",
        "Made by `python -m benchmarks.occlusion_settings`: EfficientNet-Lite0, logit of the top class. ρ is the rank",
        f"correlation of pixels with the reference, patches of {REFERENCE} at a stride of 16 covered with grey; *on",
        "the object* the share of the positive values within the outline drawn by hand, whose share of the area",
        "stands in the last row.",
        "",
        "| setting | rows | " + " | ".join(f"{n}: ρ | on the object" for n in names) + " | mean ρ |",
        "|---|---|" + "---|---|" * len(names) + "---|",
    ]
    for label, one in first.items():
        each = [record["pictures"][n][label] for n in names]
        cells = [f"{e['agreement']:.2f} | {e['on the object']:.2f}" for e in each]
        mean = np.mean([e["agreement"] for e in each])
        lines.append(f"| {one['varied']}: {label} | {one['rows']} | " + " | ".join(cells) + f" | {mean:.2f} |")
    area = [f"| {record['pictures'][n][REFERENCE]['area']:.2f}" for n in names]
    lines.append("| area of the object | | " + " | ".join(area) + " | |")
    lines += [
        "",
        "ρ between settings that vary one thing, over their pairs and the pictures:",
        "",
        "| varied | mean | least |",
    ]
    lines += ["|---|---|---|"]
    lines += [f"| {kind} | {both['mean']:.2f} | {both['least']:.2f} |" for kind, both in record["within"].items()]
    lines += [
        "",
        *(f"![occlusion of {n} by size, stride, segments and fill](occlusion_settings_{n}.jpg)" for n in names),
    ]
    return "\n".join([*lines, ""])


def main() -> None:
    """Explain, compare, draw and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="*", default=PICTURES)
    given = parser.parse_args()
    model = zoo.load("efficientnet_lite0")
    record: dict[str, Any] = {"machine": machine(), "pictures": {}}
    within: dict[str, list[float]] = {}
    for name in given.pictures:
        x, found = explained(model, name)
        for one in found.values():
            one["agreement"] = spearman(one["map"], found[REFERENCE]["map"])
        for kind in settings():
            among = [f["map"] for n, f in found.items() if f["varied"] == kind or n == REFERENCE]
            pairs = [spearman(a, b) for i, a in enumerate(among) for b in among[:i]]
            within.setdefault(kind, []).extend(pairs)
        target = model.label(int(model.field().bind(x).target[0, 0]))
        drawn = sheet(x, found, f"{name}, {target}: red raises the logit; each map has a scale of its own")
        drawn.save(RESULTS / f"occlusion_settings_{name}.jpg", quality=70, optimize=True)
        record["pictures"][name] = {n: {k: v for k, v in f.items() if k != "map"} for n, f in found.items()}
        record["within"] = {k: {"mean": float(np.mean(v)), "least": float(np.min(v))} for k, v in within.items()}
        (RESULTS / "occlusion_settings.json").write_text(json.dumps(record, indent=1))
        (RESULTS / "occlusion_settings.md").write_text(markdown(record))


if __name__ == "__main__":
    main()
