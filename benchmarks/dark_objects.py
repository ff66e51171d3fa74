"""Attribution mass on dark objects, per method and baseline; writes results/dark_objects.{json,md,png}.

Two tests: a planted task, where a dark object on bright texture alone decides (all mass belongs on it), and digits
on texture with a trained network, dark and light ones apart. A quarter of an hour on one core, training included.

    python -m benchmarks.dark_objects
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import apportion as ap
from apportion.parts.quadrature import Midpoint
from apportion.planted import digits
from benchmarks.models import machine
from benchmarks.removal_curves import interval, shown

B = ap.baselines
STEPS = 150


def found(module: str, name: str) -> Any:
    """Get a method that not every version has, or None."""
    try:
        return getattr(importlib.import_module(f"apportion.methods.path.{module}"), name)
    except ImportError:
        return None


def methods(data: Tensor) -> dict[str, Any]:
    """Give what is compared, each with about 150 gradient evaluations on its paths."""

    def ig(baseline: Any, steps: int = STEPS) -> Any:
        return ap.IntegratedGradients(baseline, Midpoint(steps))

    out = {
        "IG, black": ig(B.Zero()),  # first: the others are compared with it
        "Gradient": ap.Gradient(),
        "IG, white": ig(B.Constant(1.0)),
        "IG, own mean": ig(B.Mean()),
        "IG, blurred": ig(B.Blurred(8.0)),
        "IG, black and white": ig(B.BlackWhite(), STEPS // 2),
        "IG, farthest of black and white": ig(B.MaximumDistance()),
        "IG, mean of the data": ig(B.Given(data.mean(0))),
        "EG, 150 pictures": ap.ExpectedGradients(B.Data(data, 150)),
    }
    guided, blur, agi = found("guided_ig", "GuidedIG"), found("blur_ig", "BlurIG"), found("agi", "AGI")
    if guided is not None:
        out["GuidedIG, black"] = guided(B.Zero(), STEPS)
        out["GuidedIG, own mean"] = guided(B.Mean(), STEPS)
    if blur is not None:
        out["BlurIG"] = blur(16.0, Midpoint(STEPS))
    if agi is not None:
        out["AGI, 3 classes"] = agi(0.01, 50, 3, "random")
    credible = found("credible_path", "CrediblePath")
    if credible is not None:
        out["CrediblePath"] = credible()
        out["CrediblePath, black"] = credible(B.Zero())
        out["IG, credible baselines"] = ig(credible().baseline, STEPS // 3)
    return out


def shares(values: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Give the share of magnitude on the object, and the share of positive values: [B] each, 0 for a map of zeros.

    Channels are summed first, so that a pixel counts once.
    """
    pixels = values.sum(1)
    out = []
    for mass in (pixels.abs(), pixels.clamp(min=0)):
        whole = mass.sum((1, 2))
        out.append((mass * masks).sum((1, 2)) / whole.clamp(min=torch.finfo(whole.dtype).tiny))
    return out[0], out[1]


def measure(model: torch.nn.Module, test: digits.Pictures, data: Tensor, parts: dict[str, Tensor]) -> dict[str, Any]:
    """Explain the class on top, and say for each part of the pictures where the mass is."""
    field = ap.Field(model, bounds=(0, 1), batch_size=128)
    area = test.masks.float().mean((1, 2))
    out: dict[str, Any] = {"area": {p: interval(area[rows]) for p, rows in parts.items()}, "methods": {}}
    black: Tensor | None = None
    for name, explainer in methods(data).items():
        start = time.perf_counter()
        a = explainer(field, test.x)
        mass, positive = shares(a.values, test.masks)
        black = mass if name == "IG, black" else black
        row: dict[str, Any] = {"seconds": round(time.perf_counter() - start, 1)}
        row["backward"] = a.cost.backward.double().mean().item()
        for p, rows in parts.items():
            row[p] = {"mass": interval(mass[rows]), "positive": interval(positive[rows])}
            row[p]["mass over area"] = interval(mass[rows] / area[rows])
            if black is not None:
                row[p]["more than IG, black"] = interval((mass - black)[rows])
        out["methods"][name] = row
        print(name, {p: shown(row[p]["mass"]) for p in parts}, row["seconds"], flush=True)
    return out


def markdown(record: dict[str, Any]) -> str:
    """Write the tables."""
    planted, trained = record["planted"], record["digits"]
    area = planted["area"]["dark"]["mean"]
    lines = [
        "# Mass on dark objects",
        "",
        "Made by `python -m benchmarks.dark_objects`. Share of the map's magnitude on the object's pixels, channels",
        "summed, mean over pictures with 95 % bootstrap intervals; logit of the class on top. `passes` are gradient",
        "evaluations per picture, searches for baselines included.",
        "",
        "## Planted: the dark pixels alone decide",
        "",
        f"{record['planted pictures']} pictures. The object has {area:.3f} of the area, and by construction all of the",
        "evidence: 1 is right. `positive` is its share of the positive values.",
        "",
        "| method | mass on the object | positive | passes |",
        "|---|---|---|---|",
    ]
    for name, row in planted["methods"].items():
        d = row["dark"]
        lines.append(f"| {name} | {shown(d['mass'])} | {shown(d['positive'])} | {row['backward']:.0f} |")
    lines += [
        "",
        "## Digits on texture, a trained network",
        "",
        f"{record['digits pictures']} pictures that the network classifies rightly, half of them dark; its accuracy on",
        f"the test split is {record['accuracy']:.3f}. A dark digit has {trained['area']['dark']['mean']:.3f} of the "
        f"area, a light one {trained['area']['light']['mean']:.3f}.",
        "The ground says nothing of the class, but the edge does, so 1 is not to be expected here. The last column",
        "is the difference to black over dark pictures, paired.",
        "",
        "| method | mass, dark | mass, light | mass over area, dark | more than IG, black |",
        "|---|---|---|---|---|",
    ]
    for name, row in trained["methods"].items():
        more = row["dark"].get("more than IG, black")
        lines.append(
            f"| {name} | {shown(row['dark']['mass'])} | {shown(row['light']['mass'])} | "
            f"{shown(row['dark']['mass over area'], 2)} | {'' if more is None else shown(more)} |"
        )
    return "\n".join([*lines, ""])


def draw(record: dict[str, Any], file: Path) -> None:
    """Draw the shares with their intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    sides = ((left, "planted", ("dark",), "dark pixels alone decide: 1 is right"),)
    sides += ((right, "digits", ("dark", "light"), "digits on texture, trained network"),)
    for axes, which, parts, title in sides:
        names = list(record[which]["methods"])
        for n, (part, colour) in enumerate(zip(parts, ("#222222", "#e08a00"), strict=False)):
            places = [i + 0.36 * n for i in range(len(names))]
            rows = [record[which]["methods"][name][part]["mass"] for name in names]
            means = [r["mean"] for r in rows]
            ends = [[max(0, r["mean"] - r["low"]) for r in rows], [max(0, r["high"] - r["mean"]) for r in rows]]
            axes.barh(places, means, 0.36, xerr=ends, color=colour, ecolor="#999999", label=part)
            axes.axvline(record[which]["area"][part]["mean"], color=colour, linestyle=":", linewidth=1)
        axes.set(title=title, xlabel="share of magnitude on the object (dotted: its area)", xlim=(0, 1.02))
        axes.grid(alpha=0.3, axis="x")
    left.set_yticks(range(len(record["planted"]["methods"])), list(record["planted"]["methods"]))
    left.invert_yaxis()
    right.legend()
    figure.savefig(file, dpi=110)


def main() -> None:
    """Measure, and write tables and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=100, help="digits; the planted task has half as many")
    parser.add_argument("--weights", type=Path, help="file for the trained network, read where it is there")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    task, planted = digits.dark_object_task(options.pictures // 2)
    other = digits.dark_object_task(300, seed=1)[1].x
    everyone = {"dark": torch.ones(len(planted), dtype=torch.bool)}
    record: dict[str, Any] = {"machine": machine(), "planted pictures": len(planted)}
    record["planted"] = measure(task, planted, other, everyone)
    model, record["accuracy"] = network(options.weights)
    test = right_ones(model, options.pictures)
    record["digits pictures"] = len(test)
    record["digits"] = measure(model, test, digits.pictures(1000, "train").x, {"dark": test.dark, "light": ~test.dark})
    options.out.mkdir(exist_ok=True)
    (options.out / "dark_objects.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.out / "dark_objects.md").write_text(markdown(record))
    draw(record, options.out / "dark_objects.png")


def network(weights: Path | None) -> tuple[torch.nn.Module, float]:
    """Train the digits' network, or read it where it was kept; with its accuracy on the test split."""
    if weights is not None and weights.exists():
        kept = torch.load(weights, weights_only=True)
        model = digits.network()
        model.load_state_dict(kept["state"])
        return model.requires_grad_(False), kept["accuracy"]
    made = digits.train()
    print(f"trained in {made.seconds:.0f} s, accuracy {made.accuracy:.4f}", flush=True)
    if weights is not None:
        torch.save({"state": made.model.state_dict(), "accuracy": made.accuracy}, weights)
    return made.model, made.accuracy


def right_ones(model: torch.nn.Module, count: int) -> digits.Pictures:
    """Take test pictures that the network classifies rightly, as many dark as light."""
    test = digits.pictures(2 * count, seed=1)
    with torch.no_grad():
        right = torch.cat([model(x).argmax(1) for x in test.x.split(256)]) == test.labels
    rows = [(right & ink).nonzero()[: count // 2, 0] for ink in (test.dark, ~test.dark)]
    return test[torch.cat(rows)]


if __name__ == "__main__":
    main()
