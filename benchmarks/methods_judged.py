"""Every method by many metrics: where the answer is known, on digits, on pictures; writes results/methods_judged.*.

Nine problems: a polynomial, a ReLU network, grids whose cells share nothing, tetrominoes hidden by XOR, grids of
digits, an object the network is blind to; a network trained on bundled digits; EfficientNet-Lite0 on the bundled
pictures with marked objects, and again by metrics that ask every method several times, where it is not too slow. What
is finished is kept in a folder, so that an interrupted run goes on where it stopped. About 70 minutes on one quiet
core, most of it for the pictures.

    python -m benchmarks.methods_judged
    python -m benchmarks.methods_judged --only digits
    python -m benchmarks.methods_judged --only          (tables and plots anew, from the record)
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import apportion as ap
from apportion.adapters import bundled, zoo
from apportion.core.explainer import Explainer
from apportion.planted import digits
from apportion.planted.tetrominoes import Scenario
from benchmarks.contenders import UNSUITED, Room, contenders, fitted
from benchmarks.models import machine

B, M = ap.baselines, ap.metrics
RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs/methods-judged.md"
PICTURE = (ap.controls.Random(), ap.controls.CenterGaussian(), ap.controls.Edges(), ap.controls.InputMagnitude())
VECTOR = (ap.controls.Random(), ap.controls.InputMagnitude())


@dataclass(frozen=True)
class Problem:
    """Examples, what is judged on them, and by what.

    Attributes:
        title: of its table.
        told: what a reader must know of the setting.
        room: what methods are set up for.
        x: the examples.
        metrics: by the name of their column.
        target: what is explained; the top class unless given.
        truth: what metrics compare with.
        batch: examples at once.
        controls: what is judged beside.
        ids: of the examples.
        most: passes a method may cost, a backward pass counted twice; slower ones are left out.
    """

    title: str
    told: str
    room: Room
    x: Tensor
    metrics: Mapping[str, ap.metrics.Metric]
    target: Any = None
    truth: Any = None
    batch: int = 64
    controls: tuple[Explainer, ...] = PICTURE
    ids: list[str] | None = None
    most: float = math.inf


# -- where the answer is known --------------------------------------------------------------------


def polynomial() -> Problem:
    """Interactions of all orders, whose Shapley values are known."""
    p = ap.planted.multilinear(features=4, examples=16)
    base = B.Given(p.baseline)
    room = Room(ap.Field(p.model), None, base, ap.groups.Elements(), 16, 64, convolutional=False)
    fill = ap.fills.Baselines(base)
    return Problem(
        "A polynomial of four features",
        "16 points of a multilinear polynomial with a term for every set of features. *Truth*: rank correlation of "
        "magnitudes with the Shapley values. Effects are Harsanyi's.",
        room,
        p.x,
        {
            "truth": M.Agreement("rank_correlation"),
            "sensitivity-n": M.SensitivityN((0.25, 0.5, 0.75), 20, fill=fill),
            "infidelity, scaled": M.Infidelity(M.NoisyBaseline(samples=200, baseline=base), optimal_scale=True),
            "completeness": M.Completeness(base),
            "effects to outsiders": M.AllocationCorrectness(M.HarsanyiEffects(base)),
            "effects incomplete": M.AllocationCompleteness(M.HarsanyiEffects(base)),
        },
        truth={"truth": p.truth},
        controls=VECTOR,
    )


def network() -> Problem:
    """A ReLU network whose right answer is gradient times input."""
    p = ap.planted.homogeneous(features=8, hidden=(16, 12), examples=32)
    room = Room(ap.Field(p.model), None, B.Zero(), ap.groups.Elements(), 16, 128, convolutional=False)
    return Problem(
        "A ReLU network without biases",
        "32 points, 8 features, baseline 0. *Truth*: rank correlation of magnitudes with x ⊙ ∇f(x), which the first "
        "five complete methods of the literature all are here. Invariance: distance of maps on networks with units "
        "permuted, rescaled, and on another that is the same function.",
        room,
        p.x,
        {
            "truth": M.Agreement("rank_correlation"),
            "sensitivity-n": M.SensitivityN((0.25, 0.5, 0.75), 20),
            "infidelity, scaled": M.Infidelity(M.NoisyBaseline(samples=200), optimal_scale=True),
            "completeness": M.Completeness(),
            "implementation invariance": M.ImplementationInvariance(),
            "linearity": M.Linearity(),
            "randomized parameters": M.ParameterRandomization(),
            "moved input": M.MaxSensitivity(samples=8),
        },
        target=p.target,
        truth={"truth": p.truth},
        controls=VECTOR,
    )


def _small_network(channels: int, side: int, classes: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * side * side, classes),
    )


def grid() -> Problem:
    """Grids whose cells have nothing in common, over a network that was never trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, 5),
        ).eval()
    p = ap.planted.di_full(net, ap.planted.noise_cells((3, 16, 16), examples=24), cell=0)
    room = Room(ap.Field(p.model), None, B.Zero(), ap.groups.Squares(4), 16, 200)
    return Problem(
        "Grids whose cells share nothing (DiFull)",
        "24 grids of 2 × 2 cells of noise, each read by its own copy of an untrained network: only one cell has any "
        "influence. Share of the positive mass in it; chance is .25.",
        room,
        p.x,
        {"mass in the cell": M.GridPointingGame()},
        target=p.target,
        truth=[0] * len(p.x),
    )


def tetrominoes() -> Problem:
    """Patterns whose class is in neither of them alone."""
    learn = ap.planted.tetrominoes(Scenario.XOR, 4000, seed=1)
    p = ap.planted.tetrominoes(Scenario.XOR, 64, seed=2)
    x, y = learn.x.float(), learn.labels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = _small_network(1, 8, 2)
        optimizer = torch.optim.Adam(net.parameters(), 2e-3, weight_decay=1e-4)
        for _ in range(12):
            for rows in torch.randperm(len(x)).split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
                optimizer.step()
    net.eval().requires_grad_(False)
    test = p.x.float()
    right = (net(test).argmax(1) == p.labels).float().mean()
    room = Room(ap.Field(net), x[:200], B.Zero(), ap.groups.Pixels(), 16, 400)
    return Problem(
        "Tetrominoes, class by XOR",
        f"64 pictures of 8 × 8 with a T and an L in noise, the class in the product of their signs; a network trained "
        f"on 4,000 others classifies {right:.2f} of these rightly. Share of the highest pixels that are of the "
        "patterns, as many as these have.",
        room,
        test,
        {"precision": M.RelevanceRank(), "mass on the patterns": M.EnergyPointingGame()},
        target=p.labels,
        truth=[m.reshape(8, 8) for m in p.truth],
    )


def digit_grid() -> Problem:
    """Grids of digits, each with a class of its own."""
    p = digits.grid_game(digits.train_pooled().model, count=48)
    room = Room(ap.Field(p.model), None, B.Zero(), ap.groups.Squares(2), 16, 300)
    return Problem(
        "Grids of digits",
        "48 grids of 2 × 2 digits of different classes, network trained on single digits. Share of the positive mass "
        "in the cell of the class; chance is .25. Cells share features at their borders and the class is read off a "
        "mean, so 1 is no right answer.",
        room,
        p.x,
        {"mass in the cell": M.GridPointingGame()},
        target=p.target,
        truth=[n % 4 for n in range(len(p.x))],
    )


def blind() -> Problem:
    """An object to which the network is blind."""
    p = ap.planted.background_only(32)
    room = Room(ap.Field(p.model), None, B.Zero(), ap.groups.Squares(4), 16, 200)
    return Problem(
        "An object the network is blind to",
        "32 pictures with an object on a ground whose frame alone decides. *Mass that decides*: share of the positive "
        "mass on the frame. *Points at the object*: whether the maximum lies on the object, which looks good and is "
        "wrong here; the arrow is the metric's own.",
        room,
        p.x,
        {"mass that decides": M.EnergyPointingGame(), "points at the object": M.PointingGame(tolerance=0)},
        target=p.target,
        truth={"mass that decides": [p.truth] * 32, "points at the object": list(p.objects)},
    )


# -- networks that were trained -------------------------------------------------------------------


def _digits_network(weights: Path) -> nn.Module:
    if weights.exists():
        model = digits.network()
        model.load_state_dict(torch.load(weights, weights_only=True))
        return model.eval().requires_grad_(False)
    model = digits.train().model
    torch.save(model.state_dict(), weights)
    return model


def on_digits(kept: Path, count: int = 32) -> Problem:
    """Judge on pasted digits, whose pixels are known."""
    model = _digits_network(kept / "digits.pt")
    assert isinstance(model, nn.Sequential)
    test, train = digits.pictures(count, "test", seed=5), digits.pictures(400, "train", seed=9)
    # its first layer is 4 (x - 0.5): said by the field, so that rules for first layers find a convolution there
    looks = ap.Field(model[1:], bounds=(0, 1), normalize=ap.Normalize((0.5,) * 3, (0.25,) * 3))
    grey, players = B.Constant(0.5), ap.groups.Squares(4)
    fill = ap.fills.Baselines(grey)
    with torch.no_grad():
        right = (model(test.x).argmax(1) == test.labels).float().mean()
    room = Room(looks, train.x, grey, players, 16, 300)
    return Problem(
        "A network for digits",
        f"{count} test pictures of 48 × 48, dark and light digits on textures, {right:.2f} classified rightly; the top "
        "class is explained. Removed is to grey, which the network reads as 0, in 144 squares where not by pixels.",
        room,
        test.x,
        {
            "insertion - deletion": M.InsertionDeletion(
                M.InsertionAUC(fill=ap.fills.Baselines(B.Blurred(8.0)), step=96), M.DeletionAUC(step=96)
            ),
            "ABPC": M.ABPC(groups=players, fill=fill),
            "sensitivity-n": M.SensitivityN((0.1, 0.3, 0.5, 0.7), 25, groups=players, fill=fill),
            "infidelity, scaled": M.Infidelity(M.SquareRemoval(samples=200, baseline=grey), optimal_scale=True),
            "completeness": M.Completeness(grey),
            "rank on the digit": M.RelevanceRank(),
            "mass on the digit": M.EnergyPointingGame(),
            "sparseness": M.Sparseness(),
            "noise": M.MapNoise(),
            "moved input": M.MaxSensitivity(ap.noise.UniformBox(0.05), 4),
            "randomized parameters": M.ParameterRandomization(stages=2),
            "other class": M.RandomLogit(),
        },
        truth=list(test.masks),
        batch=16,
    )


def _pictures() -> tuple[zoo.PictureModel, list[str], Tensor, list[Tensor], Tensor]:
    model = zoo.load("efficientnet_lite0")
    names = list(bundled.drawn())
    x = torch.cat([model.see(bundled.picture(n)) for n in names])
    masks = []
    for n in names:
        truth = bundled.truth(n).through(model.crop, *bundled.picture(n).pixels.shape[1:])
        masks.append(truth.mask(*x.shape[2:]))
    others = [n for n in bundled.bundled(installed=True) if n not in names]
    data = torch.cat([model.see(bundled.picture(n)) for n in others])
    return model, names, x, masks, data


def on_pictures() -> Problem:
    """Judge on photographs with marked objects."""
    model, names, x, masks, data = _pictures()
    grey, players = B.NetworkZero(), ap.groups.Squares(16)
    looks = model.field(batch_size=16)
    fill = ap.fills.Baselines(grey)
    room = Room(looks, data, grey, ap.groups.Squares(32), 12, 250, sampled=6)
    step = 224 * 16
    return Problem(
        "EfficientNet-Lite0",
        f"{len(names)} bundled pictures with a marked object, 224 × 224; the top class is explained. Removed is to the "
        "color that the network reads as 0, in 196 squares where not by pixels; methods of removal have 49 squares.",
        room,
        x,
        {
            "insertion - deletion": M.InsertionDeletion(M.InsertionAUC(step=step), M.DeletionAUC(step=step)),
            "sensitivity-n": M.SensitivityN((0.1, 0.3, 0.5, 0.7), 20, groups=players, fill=fill),
            "infidelity, scaled": M.Infidelity(
                M.SquareRemoval((28, 56), samples=60, baseline=grey), optimal_scale=True
            ),
            "completeness": M.Completeness(grey),
            "points at the object": M.PointingGame(),
            "rank on the object": M.RelevanceRank(),
            "mass on the object": M.EnergyPointingGame(),
            "box": M.WeaklySupervisedLocalization(),
            "sparseness": M.Sparseness(),
            "noise": M.MapNoise(),
        },
        truth=masks,
        batch=1,
        ids=names,
    )


def on_pictures_again(most: float = 60) -> Problem:
    """Ask the methods again on photographs: of a random network, of another class, of the input moved."""
    asked = on_pictures()
    return replace(
        asked,
        title="EfficientNet-Lite0, asked again",
        told=f"The same {len(asked.x)} pictures, and the methods that need {most:.0f} passes at most, a backward pass "
        "counted twice. *Random parameters*: signed rank correlation with the map of a network whose parameters are "
        "all drawn anew; *of magnitudes*: the same without signs. *Other class*: with the map of another class. *Moved "
        "input*: the largest change of two copies with uniform noise within .05.",
        metrics={
            "random parameters": M.ParameterRandomization(stages=1),
            "of magnitudes": M.ParameterRandomization(stages=1, similarity=M.RankSimilarity(absolute=True)),
            "other class": M.RandomLogit(),
            "moved input": M.MaxSensitivity(ap.noise.UniformBox(0.05), 2),
        },
        truth=None,
        most=most,
    )


def problems(kept: Path) -> dict[str, Callable[[], Problem]]:
    """List them, in the order of the page."""
    return {
        "polynomial": polynomial,
        "network": network,
        "grid": grid,
        "tetrominoes": tetrominoes,
        "digit_grid": digit_grid,
        "blind": blind,
        "digits": lambda: on_digits(kept),
        "pictures": on_pictures,
        "pictures_again": on_pictures_again,
    }


# -- judging --------------------------------------------------------------------------------------


def judged(name: str, problem: Problem, kept: Path) -> dict[str, Any]:
    """Evaluate every method, or go on with that, and give what a page needs."""
    start = time.perf_counter()
    families = _affordable(fitted(contenders(problem.room), problem.room), problem)
    methods = {n: m for some in families.values() for n, m in some.items()}
    with ap.progress(_said(name)):
        found = ap.evaluate(
            methods,
            problem.room.field,
            problem.x,
            dict(problem.metrics),
            controls=problem.controls,
            truth=problem.truth,
            target=problem.target,
            ids=problem.ids,
            batch=problem.batch,
            out=kept / name,
            quiet=True,
        )
    keep = ("metric", "method", "value", "low", "high", "n", "undefined", "direction", "control", "beats", "statistic")
    compared = found.compare()
    ranks = {}
    for metric in found.metrics:
        try:
            r = found.ranks(metric)
            places = {n: _plain(v) for n, v in zip(r.methods, r.mean_rank.tolist(), strict=True)}
            ranks[metric] = {"W": _plain(float(r.kendall_w)), "mean": places}
        except ap.ApportionError as error:
            ranks[metric] = {"failed": str(error).splitlines()[0]}
    return {
        "title": problem.title,
        "told": problem.told,
        "machine": machine(),
        "examples": len(found),
        "families": {family: list(some) for family, some in families.items()},
        "rows": [{k: _plain(row[k]) for k in keep} for row in found.summary()],
        "passes": {
            n: [float(c.forward.double().mean()), float(c.backward.double().mean())] for n, c in found.costs.items()
        },
        "dominated": {k: list(v) for k, v in compared.dominated.items()},
        "surely dominated": {k: list(v) for k, v in compared.surely.items()},
        "groups": {k: list(v) for k, v in compared.groups.items()},
        "ranks": ranks,
        "failures": sorted({(m, why) for m, _, why, _ in found.failures}),
        "settings": {"methods": found.settings["methods"], "metrics": found.settings["metrics"]},
        "seconds of this run": round(time.perf_counter() - start),
    }


def _affordable(families: dict[str, dict[str, Explainer]], problem: Problem) -> dict[str, dict[str, Explainer]]:
    if problem.most == math.inf:
        return families
    q = problem.room.field.bind(problem.x[:1])
    out: dict[str, dict[str, Explainer]] = {}
    for family, some in families.items():
        costs = {n: m.passes(q) for n, m in some.items()}
        out[family] = {n: some[n] for n, c in costs.items() if c.forward + 2 * c.backward <= problem.most}
    return {family: some for family, some in out.items() if some}


def _said(name: str) -> Callable[[str, int, int], None]:
    last = [0.0]

    def say(what: str, done: int, total: int) -> None:
        if time.monotonic() - last[0] > 30 and what.startswith("evaluate"):
            last[0] = time.monotonic()
            print(f"{name}: {done} of {total}", flush=True)

    return say


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


# -- the page and the plots -----------------------------------------------------------------------


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    if value != 0 and abs(value) < 0.0005:
        return f"{value:.0e}".replace("e-0", "e-")
    text = f"{value:.3f}" if abs(value) < 10 else f"{value:.3g}"
    return text.replace("0.", ".", 1) if abs(value) < 1 else text


def _cell(row: Mapping[str, Any]) -> str:
    if not row["n"]:
        return "–"
    beats = row["beats"].values()
    star = "*" if beats and all(beats) else ""
    few = f" ({row['n']})" if row["undefined"] else ""
    spread = f" [{_number(row['low'])}, {_number(row['high'])}]" if row["n"] > 1 else ""
    return f"{_number(row['value'])}{star}{spread}{few}"


def _by_place(part: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["method"], row["metric"]): row for row in part["rows"]}


def _metrics(part: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["metric"] for row in part["rows"]))


def _controls(part: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in part["rows"] if row["control"]))


def _ups(part: Mapping[str, Any], metric: str) -> bool:
    return next(row["direction"] for row in part["rows"] if row["metric"] == metric).startswith("higher")


def _table(part: Mapping[str, Any]) -> list[str]:
    rows, metrics = _by_place(part), _metrics(part)
    arrows = [f"{m} {'↑' if _ups(part, m) else '↓'}" for m in metrics]
    out = [
        "| family | method | passes | " + " | ".join(arrows) + " | dominated by |",
        "|---|---|---|" + "---|" * (len(metrics) + 1),
    ]
    for family, names in part["families"].items():
        for name in names:
            f, b = part["passes"].get(name, (0, 0))
            cells = [_cell(rows[name, m]) for m in metrics]
            sure, by = part["surely dominated"].get(name, []), part["dominated"].get(name, [])
            told = f"{len(by)}" + (f", beyond chance {len(sure)}" if sure else "") if by else ""
            out.append(f"| {family} | {name} | {f:.0f} + {b:.0f} | " + " | ".join(cells) + f" | {told} |")
    for name in _controls(part):
        out.append(f"| control | {name} | | " + " | ".join(_cell(rows[name, m]) for m in metrics) + " | |")
    beaten = []
    for m in metrics:
        judged_by = [r for (n, k), r in rows.items() if k == m and not r["control"] and r["n"] and r["beats"]]
        beaten.append(f"{sum(all(r['beats'].values()) for r in judged_by)} of {len(judged_by)}")
    out.append("| | *beat every control* | | " + " | ".join(beaten) + " | |")
    agree = [part["ranks"][m].get("W") for m in metrics]
    out.append("| | *agreement of examples, W* | | " + " | ".join(_number(w) for w in agree) + " | |")
    return out


def _orders(part: Mapping[str, Any]) -> tuple[list[str], Tensor]:
    """Give the values of methods by metrics, turned so that high is good: [methods, metrics], NaN where undefined."""
    rows, metrics = _by_place(part), _metrics(part)
    names = [n for some in part["families"].values() for n in some]
    table = [
        [math.nan if (v := rows[n, m]["value"]) is None else v * (1 if _ups(part, m) else -1) for m in metrics]
        for n in names
    ]
    return names, torch.tensor(table, dtype=torch.float64)


def agreement(part: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Correlate the order of methods between metrics (Spearman), over the methods both can judge."""
    metrics, (_, table) = _metrics(part), _orders(part)
    out: dict[str, dict[str, float | None]] = {}
    for i, a in enumerate(metrics):
        out[a] = {}
        for j, b in enumerate(metrics):
            both = ~(table[:, i].isnan() | table[:, j].isnan())
            r = float(M.Spearman()(table[both, i][None], table[both, j][None])) if both.sum() > 2 else math.nan
            out[a][b] = _plain(round(r, 3))
    return out


def markdown(record: Mapping[str, Any]) -> str:
    """Write the tables."""
    lines = [
        "# Every method by many metrics",
        "",
        "Made by `python -m benchmarks.methods_judged`. Means over examples with bootstrap intervals at 95 %; where a",
        "metric is undefined for some examples, the number it is defined for stands behind. An arrow gives the better",
        "end. A star: beats every control beyond chance. *Passes*: forward + backward, an example. *Dominated by*: how",
        "many methods are as good in every group of metrics and better in one. *W*: Kendall's coefficient of",
        "concordance of examples on the order of methods. [What it says](../../docs/methods-judged.md).",
    ]
    for part in record.values():
        lines += ["", f"## {part['title']}", "", part["told"], "", *_table(part)]
        if len(_metrics(part)) > 2:
            lines += [
                "",
                "Rank correlation between the orders that two metrics give the methods, each its better end first:",
                "",
            ]
            between = agreement(part)
            lines += ["| | " + " | ".join(between) + " |", "|---|" + "---|" * len(between)]
            for a, row in between.items():
                lines.append(f"| {a} | " + " | ".join(_number(v) for v in row.values()) + " |")
        why: dict[str, list[str]] = {}
        for method, reason in part["failures"]:
            why.setdefault(reason, []).append(method)
        if why:
            lines += ["", "Undefined, for some examples or all:", ""]
            lines += [f"- {', '.join(dict.fromkeys(who))}: {reason}" for reason, who in why.items()]
    lines += ["", "## Nowhere", "", *(f"- {what}: {reason}." for what, reason in UNSUITED.items())]
    return "\n".join([*lines, ""])


def draw(part: Mapping[str, Any], file: Path) -> None:
    """Draw the place of every method by every metric, and what beats no control."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names, table = _orders(part)
    metrics, rows = _metrics(part), _by_place(part)
    place = torch.full_like(table, math.nan)
    for j in range(len(metrics)):
        known = (~table[:, j].isnan()).nonzero()[:, 0]
        above = (table[known, j][None] > table[known, j][:, None]).sum(1)  # ties stand at their best place
        place[known, j] = above.double() / max(1, len(known) - 1)
    figure = Figure(figsize=(2.6 + 0.62 * len(metrics), 1.6 + 0.185 * len(names)), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    shown = axes.imshow(place.numpy(), aspect="auto", cmap="RdYlBu_r", vmin=0, vmax=1)
    for i, name in enumerate(names):
        for j, metric in enumerate(metrics):
            row = rows[name, metric]
            if not row["n"]:
                axes.text(j, i, "–", ha="center", va="center", fontsize=7, color="#888888")
            elif not (row["beats"] and all(row["beats"].values())):
                axes.text(j, i, "×", ha="center", va="center", fontsize=8, color="#222222")
    at = 0
    for some in part["families"].values():
        at += len(some)
        axes.axhline(at - 0.5, color="white", linewidth=2)
    axes.set_xticks(range(len(metrics)), metrics, rotation=55, ha="left", fontsize=8, rotation_mode="anchor")
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(names)), names, fontsize=7.5)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(shown, ax=axes, shrink=0.35, pad=0.02)
    bar.set_ticks([0, 1], labels=["best", "worst"])
    axes.set_title(f"{part['title']}: × does not beat every control; – undefined", fontsize=9, pad=12)
    figure.savefig(file)


def quoted(page: str, record: Mapping[str, Any]) -> str:
    """Fill the tables of a page anew: those below a comment that names a problem, whose rows name methods."""
    lines, rows, metrics = [], None, []
    for line in page.splitlines():
        if line.startswith("<!-- ") and line[5:-4] in record:
            rows, metrics = _by_place(record[line[5:-4]]), []
        elif rows is not None and line.startswith("|"):
            first, *rest = (c.strip() for c in line.strip("|").split("|"))
            if not metrics:
                metrics = [m.rstrip(" ↑↓") for m in rest]
            elif set(first) - set("-"):
                line = f"| {first} | " + " | ".join(_cell(rows[first, m]) for m in metrics) + " |"
        elif line.strip():
            rows = None
        lines.append(line)
    return "\n".join(lines) + ("\n" if page.endswith("\n") else "")


def write(record: Mapping[str, Any]) -> None:
    """Write tables and plots of what is in the record, and the tables of the page that reads it."""
    if PAGE.exists():
        PAGE.write_text(quoted(PAGE.read_text(), record))
    (RESULTS / "methods_judged.md").write_text(markdown(record))
    for name in ("network", "digits", "pictures"):
        if name in record:
            draw(record[name], RESULTS / f"methods_judged_{name}.png")


def main() -> None:
    """Judge, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="names of problems")
    parser.add_argument("--kept", type=Path, default=Path(tempfile.gettempdir()) / "methods_judged")
    given = parser.parse_args()
    given.kept.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    listed = problems(given.kept)
    if given.only and (unknown := set(given.only) - set(listed)):
        raise SystemExit(f"no problem {min(unknown)!r}; there are {', '.join(listed)}")
    for name in listed if given.only is None else given.only:
        part = judged(name, listed[name](), given.kept)
        file = RESULTS / "methods_judged.json"
        record = json.loads(file.read_text()) if file.exists() else {}  # another one may have written since
        record[name] = part
        file.write_text(json.dumps({n: record[n] for n in listed if n in record}, indent=1, allow_nan=False) + "\n")
    write(json.loads((RESULTS / "methods_judged.json").read_text()))


if __name__ == "__main__":
    main()
