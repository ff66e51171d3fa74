"""Pictures of scores: curves with their bands, tables with intervals, methods across groups of metrics."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from apportion.bulk.comparison import Comparison
from apportion.bulk.evaluation import Evaluation
from apportion.core.errors import InputError, kind_of
from apportion.metrics.scores import Curve, Direction, Scores, counts, medians, worded

_OWN = "#1f4e9c"
_CONTROLS = ("#8a8a8a", "#b4531f", "#5f8a3a", "#8a5fa0", "#b9a13a")
_DASHES = ("--", ":", "-.", (0, (5, 1)), (0, (1, 1)))
_ARROWS = {Direction.HIGHER: "higher is better →", Direction.LOWER: "← lower is better", Direction.NEITHER: ""}
_ACROSS = 4
"""Panels in a row."""
_LETTERS = 30
"""Letters of a name in a line."""
_LETTER, _LINE = 0.078, 0.16
"""Inches of a letter, roughly, and of a line."""
_NEAR = 0.06
"""Dots nearer than this share of a panel have their numbers in one place, where they would cover each other."""
_POINTS = 101
"""Places at which curves with positions of their own are averaged."""


def scores(found: Scores) -> Figure:
    """Draw the curves behind scores with bootstrap bands at 95 %, controls beside.

    A line is the mean over examples, or their median where the source takes that.

    Curves of the same two quantities share a panel, the first as the map's own and the others by their names. Bands are
    of the examples alone; trainings add to them (`ap.metrics.accuracy_table`).

    Scores without curves are drawn as a dot an example, with their center and its interval.

    Args:
        found: what a metric gave.

    Raises:
        InputError: something else.
    """
    if not isinstance(found, Scores):
        raise InputError(kind_of(found), "what a metric gives", "write scores(metric(field, x, map))")
    shared: dict[tuple[str, str], list[str]] = {}
    for name, curve in found.curves.items():
        shared.setdefault((curve.x_label, curve.y_label), []).append(name)
    names = [own[0] for own in shared.values()]
    beside = list(found.controls.items())
    if names:
        figure, panels = _panels(len(names), 4.2, 3.1)
    else:
        held = {_wrapped(name): s for name, s in ((found.of, found), *beside)}
        figure, panels = _panels(1, 4.2, 1.0 + _high(held, 0.5), left=_wide(held))
        _dots(panels[0], list(held.items()))
    for panel, ((across, up), (name, *others)) in zip(panels, shared.items(), strict=False):
        lines = [(label, other, name) for label, other in beside if name in other.curves]
        lines += [(other, found, other) for other in others]
        for i, (label, of, curve) in enumerate(lines):
            color, dashes = _CONTROLS[i % len(_CONTROLS)], _DASHES[i % len(_DASHES)]
            _curve(panel, of.curves[curve], of, label, color, dashes)
        _curve(panel, found.curves[name], found, found.of, _OWN, "-")
        panel.set_xlabel(across, fontsize=8)
        panel.set_ylabel(up, fontsize=8)
        panel.set_title(name if len(names) > 1 else "", fontsize=9)
        panel.tick_params(labelsize=7)
    title = f"{found.name}: {worded(found)}, {found.direction.value}"
    lines = textwrap.wrap(title, int(14 * figure.get_figwidth()))  # letters to an inch, roughly
    figure.suptitle("\n".join(lines), fontsize=9)
    figure.set_figheight(figure.get_figheight() + _LINE * (len(lines) - 1))
    if names:
        _legend(figure, panels[0].get_legend_handles_labels()[0])
    return figure


def evaluation(found: Evaluation, metrics: Sequence[str] | None = None) -> Figure:
    """Draw methods by metrics: a panel a metric, with intervals; bands are those of the controls.

    A dot is filled where the method beats every control beyond chance.

    Args:
        found: what `ap.evaluate` gave.
        metrics: those to draw, in their order; all unless given.

    Raises:
        InputError: no evaluation, no metric, or one that is not in it.
    """
    if not isinstance(found, Evaluation):
        raise InputError(kind_of(found), "what ap.evaluate gives", "write evaluation(ap.evaluate(...))")
    names = [metrics] if isinstance(metrics, str) else list(found.metrics if metrics is None else metrics)
    if not names:
        raise InputError("no metric to draw", f"some of {', '.join(found.metrics)}", "leave metrics out for all")
    for name in names:
        found.of(name)
    rows = {(r["metric"], r["method"]): r for r in found.summary()}
    labels = [_wrapped(name) for name in found.methods]
    figure, panels = _panels(len(names), 3.0, 1.1 + _high(labels, 0.26), share=True, left=_wide(labels))
    for i, (panel, name) in enumerate(zip(panels, names, strict=False)):
        for n, control in enumerate(found.controls):
            r, color = rows[name, control], _CONTROLS[n % len(_CONTROLS)]
            if r["n"] > 1:
                panel.axvspan(r["low"], r["high"], color=color, alpha=0.25, linewidth=0)
            panel.axvline(r["value"], color=color, linewidth=1, linestyle=_DASHES[n % len(_DASHES)], label=control)
        for y, method in enumerate(found.methods):
            r = rows[name, method]
            if not r["n"]:
                panel.text(0.5, y, "undefined", fontsize=7, ha="center", va="center", transform=_across(panel))
                continue
            if r["n"] > 1:
                panel.plot([r["low"], r["high"]], [y, y], color=_OWN, linewidth=1.6, solid_capstyle="butt")
            won = bool(r["beats"]) and all(r["beats"].values())
            panel.plot([r["value"]], [y], "o", color=_OWN, markersize=5, markerfacecolor=_OWN if won else "white")
        direction = found.scores[found.methods[0]][name].direction
        panel.set_title("\n".join(textwrap.wrap(name, 30)), fontsize=9)
        panel.set_xlabel(_ARROWS[direction], fontsize=8)
        panel.set_yticks(range(len(labels)), labels)
        panel.set_ylim(len(found.methods) - 0.4, -0.6)
        panel.tick_params(labelsize=8, labelleft=i % _ACROSS == 0)
        panel.locator_params(axis="x", nbins=4)
        panel.grid(axis="y", color="#e4e4e4", linewidth=0.6)
        panel.set_axisbelow(True)
    if found.controls:
        _legend(figure, panels[0].get_legend_handles_labels()[0])
    return figure


def comparison(found: Comparison, groups: Sequence[str] | None = None) -> Figure:
    """Draw where methods stand in every pair of groups, better to the right and up; hollow ones are dominated.

    Crosses are bootstrap intervals at 95 %. There is a panel for each pair and no axis for a sum of groups.

    Args:
        found: what `Evaluation.compare` gives.
        groups: those drawn, in their order; all unless given.

    Raises:
        InputError: something else, a single group, or one that is not there.
    """
    if not isinstance(found, Comparison):
        raise InputError(kind_of(found), "what Evaluation.compare gives", "write comparison(found.compare())")
    drawn = list(found.groups if groups is None else groups)
    if unknown := [g for g in drawn if g not in found.groups]:
        raise InputError(f"group {unknown[0]!r}", f"some of {list(found.groups)}", "name groups of .groups")
    pairs = list(itertools.combinations(drawn, 2))
    if not pairs:
        raise InputError("one group of metrics", "two or more", "evaluate by metrics of several groups")
    stand = {g: found.standing(g).numpy() for g in drawn}
    figure, panels = _panels(len(pairs), 3.6, 3.2, across=3)
    colors = _colors(len(found.methods))
    seen = dict.fromkeys(range(len(found.methods)), 0)
    for panel, (one, other) in zip(panels, pairs, strict=False):
        numbers: dict[tuple[float, float], list[str]] = {}
        for i, method in enumerate(found.methods):
            (x, x0, x1), (y, y0, y1) = stand[one][:, i], stand[other][:, i]
            if not np.isfinite([x, y]).all():
                continue
            seen[i] += 1
            panel.plot([x0, x1], [y, y], color=colors[i], linewidth=1)
            panel.plot([x, x], [y0, y1], color=colors[i], linewidth=1)
            face = "white" if method in found.dominated else colors[i]
            panel.plot([x], [y], "o", color=colors[i], markerfacecolor=face, markersize=6, label=method)
            numbers.setdefault((x, y), []).append(str(i + 1))
        panel.margins(0.1)
        for place, some in _apart(panel, numbers).items():
            panel.annotate(", ".join(some), place, xytext=(4, 4), textcoords="offset points", fontsize=7)
        for group, turn, name in (
            (one, panel.invert_xaxis, panel.set_xlabel),
            (other, panel.invert_yaxis, panel.set_ylabel),
        ):
            metrics = found.groups[group]
            alone = found.scores[found.methods[0]][metrics[0]]
            if len(metrics) > 1 or alone.direction is Direction.LOWER:
                turn()
            what = f"{metrics[0]}" if len(metrics) == 1 else f"mean rank of {len(metrics)} metrics"
            name("\n".join(textwrap.wrap(f"{group}: {what}", 2 * _LETTERS)), fontsize=8)
        panel.tick_params(labelsize=7)
    handles = []
    for i, method in enumerate(found.methods):
        face = "white" if method in found.dominated else colors[i]
        told = " (dominated)" if method in found.dominated else ""
        told += "" if seen[i] == len(pairs) else " (undefined in some)" if seen[i] else " (undefined)"
        mark = Line2D([], [], linestyle="", marker="o", color=colors[i], markerfacecolor=face)
        mark.set_label(f"{i + 1} {method}{told}")
        handles.append(mark)
    _legend(figure, handles)
    return figure


def _panels(
    count: int, wide: float, high: float, share: bool = False, across: int = _ACROSS, left: float = 0.6
) -> tuple[Figure, list[Axes]]:
    across = min(across, count)
    down = -(-count // across)
    figure = Figure(figsize=(wide * across + left, high * down + 0.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels: list[Axes] = list(figure.subplots(down, across, squeeze=False, sharey=share).flatten())
    for panel in panels[count:]:
        panel.set_axis_off()
    return figure, panels


def _legend(figure: Figure, handles: Sequence[Any]) -> None:
    wide = figure.get_figwidth()
    labels = [_wrapped(str(h.get_label()), int((wide - 0.8) / _LETTER)) for h in handles]
    if not labels:
        return
    columns = max(1, min(len(labels), int(wide / (_wide(labels, 0.6)))))
    figure.set_figheight(figure.get_figheight() + _high(labels[::columns], 0.18) + 0.1)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def _wrapped(name: str, letters: int = _LETTERS) -> str:
    lines = textwrap.wrap(name.replace("(", "( "), letters)  # which may break there
    return "\n".join(lines).replace("( ", "(")


def _wide(labels: Iterable[str], beside: float = 0.3) -> float:
    """Tell the inches that wrapped labels take."""
    return max(0.6, beside + _LETTER * max(len(line) for label in labels for line in label.split("\n")))


def _high(labels: Iterable[str], least: float) -> float:
    """Tell the inches of rows as high as the highest of their labels."""
    held = list(labels)
    return len(held) * max(least, _LINE * (0.6 + max(label.count("\n") + 1 for label in held)))


def _apart(panel: Axes, numbers: Mapping[tuple[float, float], list[str]]) -> dict[tuple[float, float], list[str]]:
    """Put numbers of dots that lie close together in one place."""
    wide, high = (abs(b - a) or 1.0 for a, b in (panel.get_xlim(), panel.get_ylim()))
    places: dict[tuple[float, float], list[str]] = {}
    for (x, y), some in numbers.items():
        at = next((p for p in places if abs(p[0] - x) < _NEAR * wide and abs(p[1] - y) < _NEAR * high), (x, y))
        places.setdefault(at, []).extend(some)
    return places


def _across(panel: Axes) -> Any:
    return panel.get_yaxis_transform()


def _colors(count: int) -> list[Any]:
    """Choose colors that differ in brightness too."""
    from matplotlib import colormaps

    return [colormaps["viridis"](v) for v in np.linspace(0, 0.85, count)]


def _curve(panel: Axes, curve: Curve, found: Scores, label: str, color: str, dashes: Any) -> None:
    x, y = _on_one_axis(curve)
    known = ~y.isnan()
    times = torch.cat([torch.ones(len(y), 1, dtype=torch.float64), counts(found.ids, found.seed)], 1)
    if found.statistic == "median curve":
        whole = known.all(1)
        means = (
            medians(y[whole], times[whole]) if bool(whole.any()) else y.new_full((times.shape[1], len(x)), torch.nan)
        )
    else:
        means = (times.T @ y.nan_to_num(0)) / (times.T @ known.double())  # without a value: 0/0, which is not drawn
    panel.plot(x, means[0], color=color, linestyle=dashes, linewidth=1.6, label=label)
    if len(y) > 1:
        low, high = torch.nanquantile(means[1:], means.new_tensor([0.025, 0.975]), 0)
        panel.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)


def _on_one_axis(curve: Curve) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay curves on common positions; those with their own are interpolated where all have values."""
    x, y = curve.x.double(), curve.y.double()
    if x.ndim == 1:
        return x, y
    has = ~(x.isnan() | y.isnan())
    rows = [b for b in range(len(y)) if bool(has[b].any())]
    if not rows:
        return x[0], y
    start = max(float(x[b][has[b]].min()) for b in rows)
    end = min(float(x[b][has[b]].max()) for b in rows)
    grid = torch.linspace(start, max(start, end), _POINTS, dtype=torch.float64)
    out = torch.full((len(y), _POINTS), torch.nan, dtype=torch.float64)
    for b in rows:
        at, order = x[b][has[b]].sort()
        out[b] = torch.from_numpy(np.interp(grid.numpy(), at.numpy(), y[b][has[b]][order].numpy()))
    return grid, out


def _dots(panel: Axes, held: Sequence[tuple[str, Scores]]) -> None:
    for row, (_, s) in enumerate(held):
        color = _OWN if row == 0 else _CONTROLS[(row - 1) % len(_CONTROLS)]
        values = s.values[~s.values.isnan()].double().cpu()
        spread = (torch.arange(len(values)) * 0.618034 % 1 - 0.5) * 0.5  # apart, and the same in every drawing
        panel.plot(values, row + spread, ".", color=color, alpha=0.5, markersize=4)
        value, low, high = s.center()
        if len(values) > 1:
            panel.plot([low, high], [row, row], color="black", linewidth=1.6)
        if len(values):
            panel.plot([value], [row], "o", color="black", markersize=5)
    panel.set_yticks(range(len(held)), [name for name, _ in held])
    panel.set_ylim(len(held) - 0.4, -0.6)
    panel.set_xlabel(_ARROWS[held[0][1].direction], fontsize=8)
    panel.tick_params(labelsize=8)


__all__ = ["comparison", "evaluation", "scores"]
