"""What was measured as JSON, as Markdown tables made from it, and as plots."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import OURS

Found = dict[str, Any]

TITLES = {
    "overhead": "The gradient through a field, over bare loops",
    "ig": "Integrated gradients",
    "compile": "Passes without gradient, compiled",
    "peers": "Other libraries on the same work",
    "methods": "Every method over its own passes",
    "memory": "Peak memory of integrated gradients",
    "scaling": "Scaling of integrated gradients",
    "profile": "Share of time outside the model's kernels",
}
PLOTTED = ("over the bare passes", "times faster than Captum")


def read(file: Path) -> dict[str, Found]:
    """Read rows by name; none where there is no file."""
    return {r["name"]: r for r in json.loads(file.read_text())["rows"]} if file.exists() else {}


def write(rows: Mapping[str, Found], versions: Mapping[str, str], file: Path) -> None:
    """Write rows as JSON, and beside it the tables made of them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(_rounded(r), ensure_ascii=False) for r in rows.values())
    file.write_text(f'{{"versions": {json.dumps(dict(versions))},\n"rows": [\n{lines}\n]}}\n')
    file.with_suffix(".md").write_text(markdown(list(read(file).values()), versions))


def markdown(rows: Sequence[Found], versions: Mapping[str, str]) -> str:
    """Write every group as a table."""
    out = ["# Speed and memory", "", "Made by `make bench`; docs/benchmarks.md says what is measured and how.", ""]
    out += [f"- {line}" for line in dict.fromkeys(_machine(r["machine"]) for r in rows if "machine" in r)]
    out += ["- " + ", ".join(f"{k} {v}" for k, v in versions.items()), ""]
    lost = [f"- {line}" for line in (*missed(rows), *slower(rows), *failing(rows))]
    out += ["## What we lose", "", *(lost or ["Nothing."]), ""]
    for group, title in TITLES.items():
        inside = [r for r in rows if r["name"].split("/")[0] == group]
        if inside:
            out += [f"## {title}", "", *table(inside), ""]
    return "\n".join(out)


def table(rows: Sequence[Found]) -> list[str]:
    """Write rows of one group: variants with median and rows sent, ratios with quartiles and goals, errors."""
    lines = ["| row | variants, ms (rows forward + backward) | ratios: median (quartiles) | from float64 | apart |"]
    lines.append("|---|---|---|---|---|")
    for r in rows:
        name = r["name"].partition("/")[2] + (f", {'×'.join(map(str, r['x']))}" if "x" in r else "")
        if "missing" in r:
            lines.append(f"| {name} | {r['missing']} | | | |")
            continue
        found = r["variants"]
        errors = "; ".join(f"{k} {v['from float64']:.0e}" for k, v in found.items() if "from float64" in v)
        apart = "; ".join(f"{k} {v['apart']:.0e}" for k, v in found.items() if "apart" in v and k != OURS)
        ratios = "; ".join(map(_ratio, r["ratios"]))
        lines.append(
            f"| {name} | {'; '.join(_variant(k, v) for k, v in found.items())} | {ratios} | {errors} | {apart} |"
        )
    return lines


def summary(row: Found) -> str:
    """Say in a line what was found."""
    if "missing" in row:
        return f"{row['name']}: {row['missing']}"
    failed = [f"{k} cannot run here: {v['failed']}" for k, v in row["variants"].items() if "failed" in v]
    return f"{row['name']}: " + "; ".join([*map(_ratio, row["ratios"]), *failed])


def missed(rows: Iterable[Found]) -> list[str]:
    """List the goals that were not met."""
    return [f"{r['name']}: {_ratio(ratio)}" for r in rows for ratio in r.get("ratios", ()) if ratio.get("met") is False]


def slower(rows: Iterable[Found]) -> list[str]:
    """List where another library takes less time for the same work."""
    pairs = [(r["name"], q) for r in rows for q in r.get("ratios", ()) if q["name"].startswith("times faster")]
    return [f"{name}: {_ratio(q)}" for name, q in pairs if "goal" not in q and q["high"] < 1]


def failing(rows: Iterable[Found]) -> list[str]:
    """List what of ours does not run."""
    pairs = [(r["name"], k, v["failed"]) for r in rows for k, v in r.get("variants", {}).items() if "failed" in v]
    return [f"{name}: {k}: {why}" for name, k, why in pairs if k.startswith(OURS)]


def draw(rows: Iterable[Found], file: Path) -> None:
    """Draw ratios over what grows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    series: dict[str, list[Found]] = {}
    for r in rows:
        group, _, rest = r["name"].partition("/")
        if group == "scaling":
            series.setdefault(rest.rpartition("/")[0], []).append(r)
    if not series:
        return
    figure = Figure(figsize=(3.2 * len(series), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (axis, found) in zip(
        figure.subplots(1, len(series), sharey=True, squeeze=False)[0], series.items(), strict=True
    ):
        for name in PLOTTED:
            points = [(int(r["name"].rpartition("/")[2]), q) for r in found for q in r["ratios"] if q["name"] == name]
            if points:
                at, values = zip(*sorted(points, key=lambda p: p[0]), strict=True)
                spread = [[q["median"] - q["low"] for q in values], [q["high"] - q["median"] for q in values]]
                axes.errorbar(
                    at, [q["median"] for q in values], spread, marker="o", markersize=4, label=name, capsize=3
                )
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set(xscale="log", xlabel=axis)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    figure.axes[0].set_ylabel("ratio of times")
    figure.savefig(file, dpi=110)


def _variant(name: str, found: Found) -> str:
    if "failed" in found:
        return f"{name}: cannot run here ({found['failed'].replace('|', '/')})"
    if "mib" in found:
        return f"{name} {found['mib']:.0f} MiB"
    rows = found.get("rows", (0, 0))
    return f"{name} {found['ms']:.3g}" + (f" ({rows[0]:.0f} + {rows[1]:.0f})" if any(rows) else "")


def _ratio(found: Found) -> str:
    goal = f", goal {found['goal']}{'' if found['met'] else ' **missed**'}" if "goal" in found else ""
    why = f" ({found['why']})" if "why" in found and not found["met"] else ""
    return f"{found['name']} {found['median']:.2f} ({found['low']:.2f} to {found['high']:.2f}){goal}{why}"


def _machine(found: Found) -> str:
    gpu = f", {found['gpu']}" if found.get("gpu") else ""
    return f"{found['cpu']}{gpu}, {found['threads']} thread(s), Python {found['python']}, torch {found['torch']}"


def _rounded(found: Any) -> Any:
    if isinstance(found, float):
        return float(f"{found:.4g}")
    if isinstance(found, Mapping):
        return {k: _rounded(v) for k, v in found.items()}
    return [_rounded(v) for v in found] if isinstance(found, list | tuple) else found
