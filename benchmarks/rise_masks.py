"""RISE on a bundled picture: time, and memory by the number of masks; writes results/rise_masks.{md,json,jpg}.

Each number of masks runs in a process of its own. About a minute and a half on one quiet core.

    python -m benchmarks.rise_masks
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

import apportion as ap
from apportion.adapters import bundled, zoo
from apportion.show import maps
from benchmarks.memory import _start_anew, peak
from benchmarks.models import machine

RESULTS = Path(__file__).parent / "results"
BUDGETS = (250, 1000, 2000)
ROWS = 16
"""Masks a pass."""
EDGE, TITLE, SCALE = 4, 22, 36
"""Pixels around a map: beside it, above and below."""


def run(budget: int, name: str, kept: Path) -> dict[str, Any]:
    """Explain a picture in this process, after a few masks that load whatever is needed."""
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    model = zoo.load("efficientnet_lite0")
    x, field = model.see(bundled.picture(name)), model.field(ap.Probability(), batch_size=ROWS)
    ap.RISE(budget=2 * ROWS)(field, x)
    _start_anew(cpu)
    before, start = peak(cpu), time.process_time()
    a = ap.RISE(budget=budget)(field, x)
    seconds, added = time.process_time() - start, peak(cpu) - before
    shown, error = maps.picture_map(a), a.parts["standard_error"]
    a.save(kept)
    grey = maps.under(x[0], maps.RED_BLUE)
    painted = maps.paint(shown - shown.min())
    least, most = float(shown.min()), float(shown.min()) + painted.scale
    panel(Image.fromarray(maps.overlay(painted, grey, 0.6)), budget, least, most).save(kept.with_suffix(".png"))
    return {
        "masks": budget,
        "seconds": round(seconds, 1),
        "milliseconds a mask": round(1000 * seconds / budget, 2),
        "MiB": round(added, 1),
        "from": float(shown.min()),
        "to": float(shown.max()),
        "largest standard error over the range": float(error.max() / (shown.max() - shown.min())),
    }


def panel(picture: Image.Image, budget: int, least: float, most: float) -> Image.Image:
    """Put the number of masks above a map, and below it the scale of its colors from its least value up."""
    out = Image.new("RGB", (picture.width + 2 * EDGE, picture.height + TITLE + SCALE), "white")
    out.paste(picture, (EDGE, TITLE))
    ramp = maps.paint(torch.linspace(0, 1, picture.width)[None].expand(10, -1), percentile=100).rgb
    top = TITLE + picture.height + 6
    out.paste(Image.fromarray(ramp), (EDGE, top))
    draw = ImageDraw.Draw(out)
    draw.rectangle((EDGE, top, EDGE + picture.width - 1, top + 10), outline="gray")
    font = ImageFont.load_default(13)
    draw.text((out.width // 2, TITLE // 2), f"{budget:,} masks", fill="black", font=font, anchor="mm")
    draw.text((EDGE, top + 14), f"{least:.3f}", fill="black", font=font)
    draw.text((EDGE + picture.width, top + 14), f"{most:.3f}", fill="black", font=font, anchor="ra")
    draw.text((out.width // 2, top + 14), "probability", fill="black", font=font, anchor="ma")
    return out


def main() -> None:
    """Run every number of masks, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", default="coffee")
    parser.add_argument("--budget", type=int, help="one, in this process; prints JSON")
    parser.add_argument("--kept", type=Path, help="where its map goes")
    given = parser.parse_args()
    if given.budget:
        print(json.dumps(run(given.budget, given.picture, given.kept)))
        return
    found, pictures = [], []
    with tempfile.TemporaryDirectory() as folder:
        for budget in BUDGETS:
            kept = Path(folder) / f"{budget}.safetensors"
            command = [sys.executable, "-m", "benchmarks.rise_masks", "--picture", given.picture]
            done = subprocess.run(
                [*command, "--budget", str(budget), "--kept", str(kept)], capture_output=True, text=True, check=True
            )
            found.append(json.loads(done.stdout.splitlines()[-1]))
            pictures.append(Image.open(kept.with_suffix(".png")).convert("RGB"))
            print(found[-1], flush=True)
    wide = sum(p.width for p in pictures)
    strip = Image.new("RGB", (wide, pictures[0].height), "white")
    for i, p in enumerate(pictures):
        strip.paste(p, (i * p.width, 0))
    strip.save(RESULTS / "rise_masks.jpg", quality=85, optimize=True)
    record = {"machine": machine(), "picture": given.picture, "rows a pass": ROWS, "runs": found}
    (RESULTS / "rise_masks.json").write_text(json.dumps(record, indent=1))
    lines = [
        "# RISE, by the number of masks",
        "",
        "Made by `python -m benchmarks.rise_masks`: EfficientNet-Lite0, probability of the top class,",
        f"{given.picture}, {ROWS} masks a pass, one thread, processor time; memory is what the run adds to the process",
        "that holds the model, each in a fresh one.",
        "",
        "| masks | seconds | ms a mask | MiB added | largest standard error over the map's range |",
        "|---|---|---|---|---|",
    ]
    for f in found:
        doubt = f["largest standard error over the range"]
        cells = f"{f['masks']} | {f['seconds']} | {f['milliseconds a mask']} | {f['MiB']}"
        lines.append(f"| {cells} | {doubt:.2f} |")
    shown = ", ".join(str(f["masks"]) for f in found)
    lines += ["", f"![RISE of {given.picture} with {shown} masks, from its smallest value up](rise_masks.jpg)", ""]
    (RESULTS / "rise_masks.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
