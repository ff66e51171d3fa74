"""Map error and completeness of every quadrature on real pictures; writes results/quadrature.{json,md,png}.

The reference of each (picture, baseline) pair is a midpoint rule with 2,048 evaluations, crowded near the baseline.
It takes an hour on two cores, and is kept in the folder given by --reference; the rest takes half an hour.

    python -m benchmarks.quadrature --reference /some/folder
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

import apportion as ap
from apportion.adapters import bundled, zoo
from apportion.parts.quadrature import (
    Adaptive,
    Gauss,
    Left,
    Midpoint,
    MonteCarlo,
    Power,
    Quadrature,
    Right,
    Trapezoid,
)
from benchmarks.models import machine

REFERENCE = 2048
SIZES = (16, 32, 64, 128)
FREE = 1e6
"""A tolerance that is always met, so that nodes go where the map needs them."""

TIGHT = 1e-6
"""A tolerance that is never met; the map's is five times that, as in the defaults."""

TO_TOLERANCE = Adaptive(tolerance=0.01, max_passes=256)

BASELINES: dict[str, ap.baselines.Baseline] = {
    "black": ap.baselines.Zero(),
    "mean": ap.baselines.Mean(),
    "blurred": ap.baselines.Blurred(8.0),
}
RULES: dict[str, Callable[[int], Quadrature]] = {
    "Left": Left,
    "Right": Right,
    "Midpoint": Midpoint,
    "Trapezoid": Trapezoid,
    "Gauss": Gauss,
    "Power(Midpoint)": lambda n: Power(base=Midpoint(n)),
    "MonteCarlo": MonteCarlo,
    "Adaptive, map": lambda n: Adaptive(tolerance=FREE, map_tolerance=0, max_passes=n),
    "Adaptive, both": lambda n: Adaptive(tolerance=TIGHT, map_tolerance=5 * TIGHT, max_passes=n),
}


def folded(model: nn.Module) -> nn.Module:
    """Copy EfficientNet-Lite with every batch-norm in its convolution: the same function, in half the time."""
    net = copy.deepcopy(model).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    pairs = ("_conv_stem", "_bn0"), ("_conv_head", "_bn1"), ("_expand_conv", "_bn0")
    pairs += ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")
    for module in net.modules():
        for conv, norm in pairs:
            if conv in module._modules and norm in module._modules:
                c, n = getattr(module, conv), getattr(module, norm)
                c.weight, c.bias = fuse_conv_bn_weights(
                    c.weight, c.bias, n.running_mean, n.running_var, n.eps, n.weight, n.bias
                )
                setattr(module, norm, nn.Identity())
    return net


def reference(field: ap.Field, x: Tensor, baseline: ap.baselines.Baseline, file: Path) -> Tensor:
    """Give the map by 2,048 evaluations, from its file where it is there."""
    if not file.exists():
        a = ap.IntegratedGradients(baseline, Power(base=Midpoint(REFERENCE)))(field, x)
        torch.save({"map": a.values[0]}, file)
    return torch.load(file, weights_only=True)["map"]


def judge(a: ap.Attribution, exact: Tensor) -> dict[str, float]:
    """Give the relative L2 error of the map, and the gap as a share of f(x) - f(x')."""
    assert a.relative_gap is not None
    out = {"map": float((a.values[0] - exact).norm() / exact.norm()), "gap": float(a.relative_gap[0])}
    if "estimated_error" in a.parts:
        out["estimated"] = float(a.parts["estimated_error"][0, 0])
        out["nodes"] = int(a.parts["nodes"][0, 0])
    return out


def measure(folder: Path, pictures: list[str], done: Path, known: bool) -> list[dict[str, Any]]:
    """Run every rule on every pair; rules done already are read from a file beside the references."""
    model = zoo.load("efficientnet_lite0")
    plain = model.field()
    field = ap.Field(folded(model.model), normalize=plain.normalize, bounds=(0, 1), batch_size=16)
    rows: list[dict[str, Any]] = json.loads(done.read_text()) if done.exists() else []
    for name in pictures:
        x = model.see(bundled.picture(name)).contiguous(memory_format=torch.channels_last)
        for label, baseline in BASELINES.items():
            file = folder / f"{label}_{name}.pt"
            row = next((r for r in rows if (r["picture"], r["baseline"]) == (name, label)), None)
            missing = [rule for rule in RULES if row is None or rule not in row["rules"]]
            if not missing or (known and not file.exists()):
                continue
            exact = reference(field, x, baseline, file)
            if row is None:
                ends = judge(ap.IntegratedGradients(baseline, TO_TOLERANCE)(field, x), exact)
                row = {"picture": name, "baseline": label, "rules": {}, "to_tolerance": ends}
                rows.append(row)
            for rule in missing:
                sizes = (*SIZES, 40, 48) if rule.startswith("Adaptive") else SIZES
                row["rules"][rule] = {
                    str(n): judge(ap.IntegratedGradients(baseline, RULES[rule](n))(field, x), exact)
                    for n in sorted(sizes)
                }
            done.write_text(json.dumps(rows))
            print(name, label, row["rules"]["Adaptive, map"]["40"], row["to_tolerance"], flush=True)
    return rows


def _rms(values: list[float]) -> float:
    return (sum(v * v for v in values) / len(values)) ** 0.5


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Gather what the pairs say together."""
    table: dict[str, Any] = {}
    for rule in RULES:
        for n in map(str, SIZES):
            found = [r["rules"][rule][n] for r in rows if rule in r["rules"]]
            table.setdefault(rule, {})[n] = {
                "map, median": statistics.median(f["map"] for f in found),
                "map, worst": max(f["map"] for f in found),
                "gap, rms": _rms([f["gap"] for f in found]),
                "pairs": len(found),
            }
    goal = []
    for r in rows:
        gauss, mine, both = r["rules"]["Gauss"]["64"], r["rules"]["Adaptive, map"], r["rules"]["Adaptive, both"]
        reached = [int(n) for n in sorted(mine, key=int) if mine[n]["map"] <= gauss["map"]]
        goal.append(
            {
                "picture": r["picture"],
                "baseline": r["baseline"],
                "Gauss 64": gauss["map"],
                "Adaptive 40": mine["40"]["map"],
                "both 40": both["40"]["map"],
                "reached with": min(reached) if reached else None,
            }
        )
    ends = [r["to_tolerance"] for r in rows]
    estimates = [f["estimated"] / f["map"] for r in rows for f in r["rules"]["Adaptive, map"].values()]
    return {
        "table": table,
        "goal": goal,
        "pairs where Adaptive 40 is at least as near as Gauss 64": sum(g["Adaptive 40"] <= g["Gauss 64"] for g in goal),
        "gap at 40, Adaptive, rms": _rms([r["rules"]["Adaptive, map"]["40"]["gap"] for r in rows]),
        "gap at 40, both, rms": _rms([r["rules"]["Adaptive, both"]["40"]["gap"] for r in rows]),
        "pairs within 1 % inside 256": sum(abs(e["gap"]) <= 0.01 for e in ends),
        "nodes to 1 %, median": statistics.median(e["nodes"] for e in ends),
        "estimated over true error": {
            "median": statistics.median(estimates),
            "least": min(estimates),
            "most": max(estimates),
        },
        "pairs": len(rows),
    }


def markdown(found: dict[str, Any]) -> str:
    """Write the summary as tables."""
    lines = [
        "# Quadratures on real pictures",
        "",
        "Made by `python -m benchmarks.quadrature`: EfficientNet-Lite0, top logit, relative L2 error of the map of",
        f"integrated gradients against {REFERENCE:,} evaluations, and the gap as a share of f(x) - f(x'), over",
        f"{found['pairs']} (picture, baseline) pairs.",
        "",
        "| rule | " + " | ".join(f"{n}: map, median (worst)" for n in SIZES) + " | "
        + " | ".join(f"{n}: gap, rms" for n in SIZES) + " |",
        "|---|" + "---|" * (2 * len(SIZES)),
    ]  # fmt: skip
    for rule, by_size in found["table"].items():
        cells = [by_size[str(n)] for n in SIZES]
        maps = " | ".join(f"{c['map, median']:.3f} ({c['map, worst']:.3f})" for c in cells)
        gaps = " | ".join(f"{c['gap, rms']:.1%}" for c in cells)
        lines.append(f"| {rule}, {cells[0]['pairs']} pairs | {maps} | {gaps} |")
    lines += [
        "",
        "## How many nodes reach the map error of 64 Gauss nodes",
        "",
        "| picture | baseline | Gauss 64 | Adaptive 40, map | both | map, reached with |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {g['picture']} | {g['baseline']} | {g['Gauss 64']:.4f} | {g['Adaptive 40']:.4f} | "
        f"{g['both 40']:.4f} | {g['reached with'] or 'more than 128'} |"
        for g in found["goal"]
    ]
    ratio = found["estimated over true error"]
    lines += [
        "",
        f"With 40 nodes it is at least as near on "
        f"{found['pairs where Adaptive 40 is at least as near as Gauss 64']} of {found['pairs']} pairs.",
        f"`Adaptive(tolerance=0.01)` ends within 1 % on {found['pairs within 1 % inside 256']} of {found['pairs']} "
        f"pairs inside 256 nodes, with {found['nodes to 1 %, median']:.0f} in the median.",
        f"Its estimate of the map's error is {ratio['median']:.2f} times the true one in the median "
        f"({ratio['least']:.2f} to {ratio['most']:.2f}).",
        "",
    ]
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw median map error and root-mean-square gap over evaluations."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for rule in RULES:
        found = {n: [r["rules"][rule][str(n)] for r in rows if rule in r["rules"]] for n in SIZES}
        style = {"marker": "o", "linewidth": 2.4 if rule.startswith("Adaptive") else 1.2, "markersize": 4}
        left.plot(SIZES, [statistics.median(f["map"] for f in found[n]) for n in SIZES], label=rule, **style)
        right.plot(SIZES, [_rms([f["gap"] for f in found[n]]) for n in SIZES], label=rule, **style)
    for axes, title in ((left, "map error (relative L2, median)"), (right, "gap / (f(x) - f(x')), rms")):
        axes.set(xscale="log", yscale="log", xlabel="evaluations of the gradient", title=title)
        axes.set_xticks(SIZES, [str(n) for n in SIZES])
        axes.minorticks_off()
        axes.grid(alpha=0.3, which="both")
    right.legend(fontsize=7, ncols=2)
    figure.savefig(file, dpi=110)


def main() -> None:
    """Measure, and write tables and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, required=True, help="folder of the reference maps")
    parser.add_argument("--pictures", nargs="*", default=list(bundled.drawn()))
    parser.add_argument("--known", action="store_true", help="leave out pairs whose reference is not there yet")
    options = parser.parse_args()
    options.reference.mkdir(parents=True, exist_ok=True)
    rows = measure(options.reference, options.pictures, options.reference / "measured.json", options.known)
    out = Path(__file__).parent / "results"
    found = summary(rows)
    (out / "quadrature.json").write_text(json.dumps({"machine": machine(), "summary": found, "pairs": rows}, indent=1))
    (out / "quadrature.md").write_text(markdown(found))
    draw(rows, out / "quadrature.png")


if __name__ == "__main__":
    main()
