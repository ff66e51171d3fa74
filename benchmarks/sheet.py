"""Every method on bundled pictures in one sheet, by the command; writes results/sheet.{md,json} and sheet_*.jpg.

The command takes about five minutes a picture on two quiet cores.

    python -m benchmarks.sheet chelsea coffee
    python -m benchmarks.sheet --made /some/folder      # of what the command has written there
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.models import machine

WIDTH = 1000
"""Of the committed sheets, in pixels."""


def table(found: list[dict[str, Any]]) -> list[str]:
    """Write passes, seconds and gap of every method, a row each."""
    names = [p["picture"] for p in found]
    lines = [
        "| method | forward + backward | " + " | ".join(f"{n}: seconds | gap" for n in names) + " |",
        "|---|---|" + "---|---|" * len(names),
    ]
    by_name = [{m["values"].split(".")[1]: m for m in p["maps"]} for p in found]
    for name in sorted(set.union(*map(set, by_name))):
        rows = [b.get(name) for b in by_name]
        first = next(r for r in rows if r is not None)
        cells = [f"{name}", f"{first['forward']} + {first['backward']}"]
        for row in rows:
            gap = None if row is None else row["relative_gap"]
            cells += ["failed" if row is None else f"{row['seconds']:.1f}", "" if gap is None else f"{gap:.1%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Run the command, and keep its sheets and figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="*", default=["chelsea", "coffee"])
    parser.add_argument("--made", type=Path, help="what the command wrote already")
    options = parser.parse_args()
    out = options.made or Path(tempfile.mkdtemp())
    if options.made is None:
        command = ["-m", "apportion", "explain", *options.pictures, "--methods", "all", "--contrast", "none"]
        subprocess.run([sys.executable, *command, "--out", str(out)], check=True)
    found = json.loads((out / "report.json").read_text())["pictures"]
    results = Path(__file__).parent / "results"
    kept = [{k: p[k] for k in ("picture", "explained", "failures", "passed_over")} for p in found]
    for row, p in zip(kept, found, strict=True):
        row["maps"] = [{k: v for k, v in m.items() if k != "values"} for m in p["maps"]]
        sheet = Image.open(out / f"{p['picture']}.png").convert("RGB")
        sheet = sheet.resize((WIDTH, round(sheet.height * WIDTH / sheet.width)), Image.Resampling.LANCZOS)
        sheet.save(results / f"sheet_{p['picture']}.jpg", quality=70, optimize=True)
    (results / "sheet.json").write_text(json.dumps({"machine": machine(), "pictures": kept}, indent=1))
    head = ["# Every method on bundled pictures", "", "Made by `python -m benchmarks.sheet`: EfficientNet-Lite0, the"]
    head += [
        "top class, gaps as a share of what each method claims its values sum to (none where it claims nothing).",
        "",
    ]
    shown = [f"![every method on {p['picture']}](sheet_{p['picture']}.jpg)" for p in found]
    (results / "sheet.md").write_text("\n".join([*head, *table(found), "", *shown, ""]))


if __name__ == "__main__":
    main()
