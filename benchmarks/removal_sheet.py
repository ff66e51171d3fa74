"""Methods of removal, surrogates and subsets on bundled pictures; writes results/removal_sheet.{md,json} and sheets.

Each method runs in a process of its own, forked from one that holds the model; what it found is kept, so that an
interrupted run goes on where it stopped. About fifteen minutes a picture on a quiet core.

    python -m benchmarks.removal_sheet
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

import apportion as ap
from apportion.adapters import bundled, zoo
from apportion.core.explainer import Explainer
from apportion.show import maps
from benchmarks.memory import _start_anew, peak
from benchmarks.models import machine
from benchmarks.occlusion_settings import spearman

RESULTS = Path(__file__).parent / "results"
OBJECTS = {"chelsea": "eyes and nose", "coffee": "cup"}
"""What a map is compared with; the whole cat fills its picture."""
FLAT_ON = "coffee"
"""Where budgets are compared."""
ROWS = 16
"""Rows a pass."""
REFERENCE = "Shapley"
CELLS = 14
"""Maps are compared by their means over so many squares a side, since their grains differ."""

LEFT_OUT = {
    "RealTimeSaliency, L2X, CXPlain": "a network is trained first, on many labeled pictures like these",
    "SAGE, LossSHAP": "they explain a loss, SAGE over a data set: two pictures are none",
    "ACE": "it sets one feature for a whole data set, and its Hessian is of all pixels by all pixels",
    "Semivalue": "Shapley and Banzhaf are two of them",
}
"""Methods without a map here, with why."""


@dataclass(frozen=True)
class Entry:
    """A method of the sheet.

    Attributes:
        make: gives the method, for a network and pictures to fit its parts to.
        setting: what a reader must know.
        drawn: whether it stands in the sheet, or is there for time and memory alone.
    """

    make: Callable[[zoo.PictureModel, Tensor], Explainer]
    setting: str
    drawn: bool = True


def entries(steps: int = 800, budget: int = 2000) -> dict[str, Entry]:
    """List them; `steps` are those of extremal perturbation, `budget` that of KernelSHAP, Banzhaf and centred RISE."""
    grey, own = ap.fills.Baselines(ap.baselines.Constant(0.5)), ap.fills.SegmentMean()
    pixels = ap.groups.Superpixels(50)
    players: dict[str, Any] = {"groups": pixels, "fill": own}

    def plain(method: Explainer, setting: str, drawn: bool = True) -> Entry:
        return Entry(lambda model, others: method, setting, drawn)

    def difference(model: zoo.PictureModel, others: Tensor) -> Explainer:
        fill = ap.fills.ConditionalGaussian.fit(others, side=36, patches=5000, samples=5)
        return ap.PredictionDifference(groups=ap.groups.Patches(32, 32), fill=fill)

    def bottleneck(model: zoo.PictureModel, others: Tensor) -> Explainer:
        return ap.InformationBottleneck(ap.subsets.LayerStatistics.fit(model.field(batch_size=ROWS), others))

    # with fewer steps the penalty of the area grows faster, to the same end
    extremal = replace(ap.ExtremalPerturbation((0.05, 0.1, 0.2)), steps=steps, growth=1.0035 ** (800 / steps))
    segments = "50 superpixels in their mean colors"
    local = f"{segments}, 250 samples and as many to judge"
    return {
        "Occlusion, squares": plain(ap.Occlusion(ap.groups.Squares(16), grey), "16 pixels, grey"),
        "Occlusion, windows": plain(ap.Occlusion(ap.groups.Patches(32, 16), grey), "32 pixels by 16, grey"),
        "Occlusion, segments": plain(ap.Occlusion(**players), segments),
        "Occlusion, grey segments": plain(ap.Occlusion(pixels, grey), "50 superpixels, grey"),
        "Shapley, quarter": plain(ap.Shapley(**players, budget=500), f"{segments}, budget 500", drawn=False),
        "RISE, quarter": plain(ap.RISE(budget=500), "500 masks, black", drawn=False),
        "Shapley": plain(ap.Shapley(**players, budget=2000), f"{segments}, budget 2,000"),
        "RISE": plain(ap.RISE(budget=2000), "2,000 masks, black"),
        "InformationBottleneck": Entry(bottleneck, "statistics of the other bundled pictures; log-probability"),
        "MeaningfulPerturbation": plain(ap.MeaningfulPerturbation(), "300 steps, blurred; probability"),
        "LIME": plain(ap.LIME(**players, samples=250), local),
        "CLIME": plain(ap.CLIME(samples=50), "each pixel alone, 50 samples and as many to judge"),
        "KernelSHAP": plain(ap.KernelSHAP(**players, budget=budget), f"{segments}, budget {budget:,}"),
        "RISE, centred": plain(ap.RISE(budget=budget, centred=True), f"{budget:,} masks, black"),
        "Banzhaf": plain(ap.Banzhaf(**players, budget=budget), f"{segments}, budget {budget:,}"),
        "PredictionDifference": Entry(difference, "squares of 32 pixels, 5 draws of a Gaussian; bits of the odds"),
        "GLIME": plain(ap.GLIME(**players, samples=250), local),
        "OptiLIME": plain(ap.OptiLIME(**players, samples=250), local),
        "BayLIME": plain(ap.BayLIME(**players, samples=250), local),
        "SLIME": plain(ap.SLIME(**players, most=500), f"{segments}, 250 to 500 samples twice, 5 features"),
        "ExtremalPerturbation": plain(extremal, f"areas 0.05, 0.1 and 0.2, {steps} steps, blurred"),
    }


@dataclass(frozen=True, eq=False)
class Scene:
    """What is explained.

    Attributes:
        model: the network.
        name: the picture's.
        x: as the network sees it, [1, 3, H, W].
        others: pictures to fit parts to.
        mask: where the object is, [H, W].
    """

    model: zoo.PictureModel
    name: str
    x: Tensor
    others: Tensor
    mask: Tensor

    @classmethod
    def of(cls, model: zoo.PictureModel, name: str) -> Scene:
        """Read a bundled picture, and all others."""
        picture = bundled.picture(name)
        others = [bundled.picture(n) for n in bundled.bundled(installed=True) if n != name]
        truth = bundled.truth(name, OBJECTS[name]).through(model.crop, *picture.pixels.shape[1:])
        x = model.see(picture)
        return cls(model, name, x, model.see(*others), truth.mask(*x.shape[2:]))


def found(a: ap.Attribution, scene: Scene) -> tuple[dict[str, Any], np.ndarray]:
    """Say what a result is worth, and give its map."""
    shown = maps.picture_map(a, size=(scene.x.shape[2], scene.x.shape[3]))
    positive, parts = shown.double().clamp(min=0), a.parts
    share = float(positive[scene.mask].sum() / positive.sum()) if bool(positive.any()) else None
    record: dict[str, Any] = {
        "forward": int(a.cost.forward[0]),
        "backward": int(a.cost.backward[0]),
        "score": float(a.value[0]),
        "gap": None if a.relative_gap is None else float(a.relative_gap[0]),
        "on the object": share,
        "from": float(shown.min()),
        "to": float(shown.max()),
        "warnings": list(a.warnings),
    }
    for name in ("held_out_r2", "csi", "vsi", "precision", "effective_samples", "samples_used", "kernel_width"):
        if isinstance(part := parts.get(name), Tensor) and not bool(part[0].isnan()):  # nothing to judge by
            record[name] = float(part[0])
    # of subsets: how much of the picture, and the score with it or without it
    for name, key in (("held_out_r2_interval",) * 2, ("area", "areas"), ("score", "scores of the subsets")):
        if isinstance(part := parts.get(name), Tensor) and not bool(part[0].isnan().any()):
            record[key] = part[0].flatten().tolist()
    if isinstance(a.groups, Tensor) and (players := 1 + int(a.groups.max())) < shown.numel():
        record["players"] = players
    error = parts.get("standard_error")
    if "precision" not in record and isinstance(error, Tensor) and isinstance(a.values, Tensor):
        spread = float(a.values.max() - a.values.min())
        if spread > 0 and "held_out_r2" not in record:
            record["precision"] = float(error.max()) / spread
    return record, shown.float().numpy()


def run(entry: Entry, scene: Scene, kept: Path) -> None:
    """Explain in this process, and keep what was found in two files."""
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    start = time.process_time()
    method = entry.make(scene.model, scene.others)
    fitting = time.process_time() - start
    field = scene.model.field(batch_size=ROWS)
    q = field.bind(scene.x)
    rows = scene.x.expand(ROWS, -1, -1, -1).contiguous()
    for _ in range(2):  # what only the first passes cost
        q.value(rows, torch.zeros(ROWS, dtype=torch.long))
    _start_anew(cpu)
    before, start = peak(cpu), time.process_time()
    a = method(field, scene.x, target=int(q.target[0, 0]))
    seconds, added = time.process_time() - start, peak(cpu) - before
    record, shown = found(a, scene)
    record = {"setting": entry.setting, "seconds": seconds, "fitting": fitting, "MiB": added, **record}
    np.save(kept.with_suffix(".npy"), shown)
    kept.with_suffix(".json").write_text(json.dumps(record, indent=1))  # last: a record is whole


def explained(
    scene: Scene, listed: Mapping[str, Entry], folder: Path, as_kept: bool = False
) -> dict[str, dict[str, Any]]:
    """Explain by every method that is not yet kept, or leave those out, and give the records with their maps."""
    folder.mkdir(parents=True, exist_ok=True)
    out = {}
    for label, entry in listed.items():
        kept = folder / f"{scene.name}_{'_'.join(label.lower().replace(',', '').split())}"
        known = kept.with_suffix(".json")
        if as_kept and not known.exists():
            continue
        if not known.exists() or json.loads(known.read_text())["setting"] != entry.setting:
            child = multiprocessing.get_context("fork").Process(target=run, args=(entry, scene, kept))
            child.start()
            child.join()
            if child.exitcode:
                raise SystemExit(f"{label} failed on {scene.name}")
            done = json.loads(known.read_text())
            print(f"{scene.name}: {label}, {done['seconds']:.1f} s, {done['MiB']:.0f} MiB", flush=True)
        out[label] = json.loads(known.read_text()) | {"map": torch.from_numpy(np.load(kept.with_suffix(".npy")))}
    return out


def coarse(shown: Tensor) -> Tensor:
    """Average a map over squares."""
    return F.adaptive_avg_pool2d(shown[None, None], CELLS)[0, 0]


def agreement(records: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Correlate ranks between all maps."""
    grids = {label: coarse(r["map"]) for label, r in records.items()}
    return {a: {b: round(spearman(grids[a], grids[b]), 3) for b in grids} for a in grids}


def sheet(scene: Scene, records: Mapping[str, Mapping[str, Any]], title: str) -> Image.Image:
    """Draw the picture with its object, and every map over it."""
    across = 6
    down = -(-(1 + len(records)) // across)
    figure = Figure(figsize=(1.95 * across, 2.5 * down + 0.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(down, across, squeeze=False).flatten()
    for axis in axes:
        axis.set_axis_off()
    axes[0].imshow(maps.to_rgb(scene.x[0]))
    axes[0].contour(scene.mask.numpy(), levels=[0.5], colors="lime", linewidths=1)
    axes[0].set_title(f"{scene.name}\noutlined: {OBJECTS.get(scene.name, 'the object')}", fontsize=8)
    grey = maps.under(scene.x[0], maps.RED_BLUE)
    for axis, (label, r) in zip(axes[1:], records.items(), strict=False):
        shown = r["map"]
        low = float(shown.min())
        # plain RISE is a mean score everywhere: what differs begins at its least
        painted = maps.paint(shown - low if label == "RISE" else shown)
        axis.imshow(maps.overlay(painted, grey, 0.65), interpolation="nearest")
        share = "" if r["on the object"] is None else f"; on object {r['on the object']:.2f}"
        axis.set_title(f"{label}\nρ = {r['agreement']:.2f}{share}\n{low:.3g} to {float(shown.max()):.3g}", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


def players(picture: Mapping[str, Any]) -> int | None:
    """Count the superpixels, which are about as many as asked for."""
    return picture["methods"][REFERENCE].get("players")


def _number(value: float | None, how: str) -> str:
    return "" if value is None else format(value, how)


def markdown(record: Mapping[str, Any]) -> str:
    """Write the tables."""
    names = list(record["pictures"])
    methods = {n: record["pictures"][n]["methods"] for n in names}
    every = {label: r for n in names for label, r in methods[n].items() if r["drawn"]}
    labels = [label for label in entries() if label in every]
    lines = [
        "# Removal, surrogates and subsets on bundled pictures",
        "",
        "Made by `python -m benchmarks.removal_sheet`: EfficientNet-Lite0, logit of the top class where a method takes",
        f"any score, {ROWS} rows a pass, one thread, processor time, each in a process of its own; memory is what the",
        "run adds to the process that holds the model. *Gap*: of the sum from what is claimed. *R²*: held out.",
        "*Error*: the largest standard error over the range of the values. *Object*: share of the positive values on",
        "the outlined object, whose share of the area stands in the last row. *ρ*: rank correlation with",
        f"{REFERENCE}, over squares of 16 pixels. Of 50 superpixels SLIC makes "
        + " and ".join(f"{players(record['pictures'][n])} on {n}" for n in names)
        + ".",
        "",
        "| method | setting | forward + backward | "
        + " | ".join(f"{n}: seconds | MiB | gap | R² | error | object | ρ" for n in names)
        + " |",
        "|---|---|---|" + "---|" * 7 * len(names),
    ]
    for label in labels:
        one = every[label]
        cells = [label, one["setting"], f"{one['forward']:,} + {one['backward']:,}"]
        for n in names:
            if (r := methods[n].get(label)) is None:
                cells += ["not run", *[""] * 6]
                continue
            cells += [f"{r['seconds']:.1f}", f"{r['MiB']:.0f}", _number(r["gap"], ".1%")]
            cells += [_number(r.get("held_out_r2"), ".2f"), _number(r.get("precision"), ".2f")]
            cells += [_number(r["on the object"], ".2f"), f"{r['agreement']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    area = " | ".join(f"| | | | | {record['pictures'][n]['area']:.2f} |" for n in names)
    lines.append(f"| area of the object | | | {area} |")
    lines += ["", "## Memory, by budget", "", "| | picture | a quarter: seconds | MiB | whole: seconds | MiB |"]
    lines.append("|---|---|---|---|---|---|")
    for label in ("Shapley", "RISE"):
        for n in names:
            both = [methods[n].get(key) for key in (f"{label}, quarter", label)]
            if all(both):
                cells = " | ".join(f"{r['seconds']:.1f} | {r['MiB']:.0f}" for r in both)
                lines.append(f"| {label} | {n} | {cells} |")
    lines += ["", "## Agreement", "", "Rank correlation, mean over the pictures.", ""]
    lines.append("| | " + " | ".join(str(i + 1) for i in range(len(labels))) + " |")
    lines.append("|---|" + "---|" * len(labels))
    for i, a in enumerate(labels):
        each = []
        for b in labels:
            seen = [between[a][b] for n in names if {a, b} <= (between := record["pictures"][n]["agreement"]).keys()]
            each.append(f"{np.mean(seen):.2f}" if seen else "")
        lines.append(f"| {i + 1} {a} | " + " | ".join(each) + " |")
    lines += ["", "## Not here", "", *(f"- {what}: {why}." for what, why in LEFT_OUT.items()), ""]
    lines += [f"![removal, surrogates and subsets on {n}](removal_sheet_{n}.jpg)" for n in names]
    return "\n".join([*lines, ""])


def compared(scene: Scene, records: dict[str, dict[str, Any]], listed: Mapping[str, Entry]) -> dict[str, Any]:
    """Put what is found of a picture together, and each map's agreement with the reference into its record."""
    several = {label: r for label, r in records.items() if listed[label].drawn}
    between = agreement(several)
    for label, r in records.items():
        r["drawn"] = listed[label].drawn
        r["agreement"] = between[label][REFERENCE] if r["drawn"] else None
    methods = {label: {k: v for k, v in r.items() if k != "map"} for label, r in records.items()}
    return {"area": float(scene.mask.float().mean()), "methods": methods, "agreement": between}


def main() -> None:
    """Explain, compare, draw and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="*", default=list(OBJECTS))
    parser.add_argument("--kept", type=Path, default=Path(tempfile.gettempdir()) / "removal_sheet")
    parser.add_argument("--steps", type=int, default=800, help="of extremal perturbation")
    parser.add_argument("--budget", type=int, default=2000, help="of KernelSHAP, Banzhaf and centred RISE")
    parser.add_argument("--without", nargs="*", default=[], choices=list(entries()), help="methods to leave out")
    parser.add_argument("--as-kept", action="store_true", help="run nothing, write what is kept")
    parser.add_argument("--only-run", action="store_true", help="write no results")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = zoo.load("efficientnet_lite0")
    listed = {label: e for label, e in entries(given.steps, given.budget).items() if label not in given.without}
    record: dict[str, Any] = {"machine": machine(), "left out": LEFT_OUT, "pictures": {}}
    for name in given.pictures:
        scene = Scene.of(model, name)
        chosen = {label: e for label, e in listed.items() if e.drawn or name == FLAT_ON}
        records = explained(scene, chosen, given.kept, given.as_kept)
        if given.only_run:
            continue
        record["pictures"][name] = compared(scene, records, chosen)
        target = model.label(int(model.field().bind(scene.x).target[0, 0]))
        title = f"{name}, {target}: red raises the score, each map on a scale of its own; ρ: ranks against {REFERENCE}"
        shown = {label: r for label, r in records.items() if r["drawn"]}
        drawn = sheet(scene, shown, title)
        drawn.save(RESULTS / f"removal_sheet_{name}.jpg", quality=75, optimize=True)
    if not given.only_run:
        (RESULTS / "removal_sheet.json").write_text(json.dumps(record, indent=1))
        (RESULTS / "removal_sheet.md").write_text(markdown(record))


if __name__ == "__main__":
    main()
