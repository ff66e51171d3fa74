"""Metrics against step-by-step loops and, where it is installed, Quantus; writes results/metrics.{json,md}.

The variants of a row have equal settings and run in interleaved rounds; of each round the ratio of their times is
taken. Rows of the model are counted, and what the variants find is compared. The floor is what the model alone takes
for the rows of ours, ready-made and in the fastest batches. A metric is added as one more `Row`.

    python -m benchmarks.metrics                     # some minutes on one core
    python -m benchmarks.metrics --only region       # rows whose name contains it; the rest of the record stays
    pip install --no-deps quantus pandas opencv-python-headless cachetools && python -m benchmarks.metrics
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import apportion as ap
from apportion.metrics import Scores
from benchmarks import models
from benchmarks.harness import Clock, first_line, interleave, quartiles, versions
from benchmarks.networks import pictures

M, G = ap.metrics, ap.groups
OURS, FLOOR = "apportion", "floor"
BLACK = ap.fills.Baselines(ap.baselines.Zero())
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Case:
    """A network, pictures, the classes that are explained, and maps of them.

    Attributes:
        net: in eval mode.
        x: [B, 3, H, W].
        target: [B].
        maps: shaped as x, without ties.
    """

    net: nn.Module
    x: Tensor
    target: Tensor
    maps: Tensor

    @classmethod
    def of(cls, net: nn.Module, x: Tensor) -> Case:
        """Take each picture's own top class, and random maps."""
        maps = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            return cls(net, x, net(x).argmax(1), maps)


@cache
def cnn() -> Case:
    """Two convolutions on 16 pictures of 32 × 32 pixels."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU()
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(256, 10)).eval().requires_grad_(False)
    return Case.of(net, torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(1)))


def first(case: Case) -> Case:
    """The first picture alone."""
    return Case(case.net, case.x[:1], case.target[:1], case.maps[:1])


@cache
def one() -> Case:
    """The first of those alone."""
    return first(cnn())


@cache
def lite0() -> Case:
    """EfficientNet-Lite0 on the two bundled pictures."""
    return Case.of(models.lite0().requires_grad_(False), pictures((3, 224, 224), 2).float())


@cache
def lite0_one() -> Case:
    """The same on the first of them alone."""
    return first(lite0())


Found = Tensor | Scores | None
Variant = Callable[[], Found]
"""Runs once; gives what it found: curves [B, K] after the start, or scores that have them first."""


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        name: metric/network.
        case: gives the network and pictures.
        variants: by name, ours first: set up on a case. What cannot be set up is reported with its error.
        goals: by variant, the ratio of its time to ours to be reached.
        note: what to know of it.
        backward: whether rows also go back, as for explainers that are asked again.
        together: how many rows of a picture one set of weights can take; all unless given.
    """

    name: str
    case: Callable[[], Case]
    variants: Mapping[str, Callable[[Case], Variant]]
    goals: Mapping[str, float]
    note: str = ""
    backward: bool = False
    together: int | None = None


# -- what is compared -----------------------------------------------------------------------------


def ours(metric: ap.metrics.Metric, explainer: ap.Explainer | None = None) -> Callable[[Case], Variant]:
    """Judge the maps, or an explainer, with one of our metrics; the field is made once, as users do."""

    def make(case: Case) -> Variant:
        field = ap.Field(case.net)
        return lambda: metric(field, case.x, case.maps if explainer is None else explainer, target=case.target)

    return make


def floor(case: Case, rows: int, backward: bool, most: int | None) -> tuple[Variant, str]:
    """Send rows through the network and do nothing else, in the fastest way found: as it is, or as a field does.

    Args:
        case: the network.
        rows: how many.
        backward: whether gradients are taken, too.
        most: rows that may go together.
    """
    q = ap.Field(case.net).bind(case.x, target=case.target)

    def bare(x: Tensor, owner: Tensor) -> None:
        leaf = x.requires_grad_(backward)
        with torch.set_grad_enabled(backward):
            score = case.net(leaf).gather(1, case.target[owner][:, None]).sum()
        if backward:
            torch.autograd.grad(score, leaf)

    kinds: dict[str, tuple[Callable[[Tensor, Tensor], Any], Any]] = {
        "": (bare, torch.contiguous_format),
        ", channels last": (bare, torch.channels_last),
        ", by a field": (q.value_and_grad if backward else q.value, torch.contiguous_format),
    }

    def send(size: int, kind: str, count: int) -> Variant:
        each, layout = kinds[kind]
        owner = torch.arange(count) % len(case.x)
        parts = list(zip(case.x[owner].to(memory_format=layout).split(size), owner.split(size), strict=True))

        def run() -> None:
            for part, own in parts:
                each(part.detach(), own)

        return run

    clock, few = Clock(case.x.device), min(rows, max(32, (1 << 22) // case.x[0].numel()))
    sizes = sorted({min(size, most or rows, rows) for size in (4, 16, 64, 256)})
    taken = {
        (size, kind): min(clock(send(size, kind, few)) for _ in range(2))
        for size in sizes
        if size <= few
        for kind in kinds
    }
    size, kind = min(taken, key=lambda way: taken[way])
    return send(size, kind, rows), f"{size} rows at a time{kind}"


def together(*metrics: ap.metrics.Metric, shared: bool = True) -> Callable[[Case], Variant]:
    """Judge the maps with several of our metrics, which share their curves; or with each alone."""

    def make(case: Case) -> Variant:
        field = ap.Field(case.net)

        def run() -> Scores:
            if not shared:
                first, *_ = (m(field, case.x, case.maps, target=case.target) for m in metrics)
                return first
            q, subject = field.bind(case.x, target=case.target), M.Subject(case.maps)
            first, *_ = (m.judge(q, subject) for m in metrics)
            return first

        return run

    return make


def repeated(times: int, make: Callable[[Case], Variant]) -> Callable[[Case], Variant]:
    """Run something several times."""

    def set_up(case: Case) -> Variant:
        run = make(case)

        def every() -> Found:
            first, *_ = (run() for _ in range(times))
            return first

        return every

    return set_up


def loop(side: int, step: int, summed: bool = True) -> Callable[[Case], Variant]:
    """Remove step by step, all pictures together: the usual loop, through NumPy and back at each step.

    Args:
        side: of squares that go together, with all their channels.
        step: squares that go at a time.
        summed: rank squares; else single values of channels.
    """

    def make(case: Case) -> Variant:
        x, target = case.x.numpy(), case.target.numpy()
        (batch, _), high, wide = x.shape[:2], *x.shape[2:]
        number = np.arange(high)[:, None] // side * (-(-wide // side)) + np.arange(wide) // side
        number = np.broadcast_to(number, x.shape[1:]) if summed else np.arange(x[0].size).reshape(x.shape[1:])
        flat = number.reshape(-1)
        elements = [np.flatnonzero(flat == p) for p in range(flat.max() + 1)] if summed else None

        def run() -> Tensor:
            maps = case.maps.numpy().reshape(batch, -1)
            values = np.stack([np.bincount(flat, m) for m in maps]) if summed else maps
            ranking = np.argsort(-values, axis=1)
            now, out = x.copy(), []
            for start in range(0, ranking.shape[1], step):
                now = now.copy()
                for b in range(batch):
                    gone = ranking[b, start : start + step]
                    at = gone if elements is None else np.concatenate([elements[p] for p in gone])
                    now[b].reshape(-1)[at] = 0.0
                with torch.no_grad():
                    probability = case.net(torch.from_numpy(now)).softmax(1).numpy()
                out.append(probability[np.arange(batch), target])
            return torch.from_numpy(np.stack(out, 1))

        return run

    return make


def quantus(metric: str, falls: bool = False, **options: Any) -> Callable[[Case], Variant]:
    """Run a metric of Quantus on the same maps, or on `gradient`; all examples are one of its batches (64 by default).

    Args:
        metric: its class.
        falls: it gives f(x) less the curve.
        options: its settings.
    """

    def make(case: Case) -> Variant:
        library = importlib.import_module("quantus")
        plain: dict[str, Any] = {"abs": False, "normalise": False, "disable_warnings": True, "return_aggregate": False}
        if metric not in ("MaxSensitivity", "MPRT"):
            plain["perturb_baseline"] = 0.0
        judge = getattr(library, metric)(**plain, **options)
        arrays: dict[str, Any] = {"x_batch": case.x.numpy(), "y_batch": case.target.numpy()}
        arrays |= {"explain_func": gradient} if metric in ("MaxSensitivity", "MPRT") else {"a_batch": case.maps.numpy()}
        at_x = case.net(case.x).softmax(1).gather(1, case.target[:, None]) if falls else None

        def run() -> Found:
            found = judge(model=case.net, channel_first=True, softmax=True, device="cpu", **arrays)
            if metric not in ("PixelFlipping", "RegionPerturbation"):
                return None
            curves = torch.as_tensor(np.asarray(found, dtype=np.float64))
            return curves if at_x is None else at_x - curves

        return run

    return make


def gradient(model: nn.Module, inputs: Any, targets: Any, **_: Any) -> np.ndarray:
    """Explain by the gradient of the logit, in one pass each way, as functions for Quantus do."""
    x = torch.as_tensor(np.asarray(inputs), dtype=torch.float32).requires_grad_()
    score = model(x).gather(1, torch.as_tensor(np.asarray(targets))[:, None]).sum()
    return torch.autograd.grad(score, x)[0].numpy()


def rows() -> list[Row]:
    """List the comparisons."""
    values: dict[str, Any] = {"fill": BLACK, "limit": None}

    def flipping(case: Callable[[], Case], name: str, step: int) -> Row:
        variants = {
            OURS: ours(M.MoRF(groups=G.Elements(), step=step, **values)),
            "Quantus": quantus("PixelFlipping", features_in_step=step),
            "loop": loop(1, step, summed=False),
        }
        note = f"single values of channels, {step} at a time, to 0"
        return Row(f"pixel flipping/{name}", case, variants, {"Quantus": 5.0, "loop": 5.0}, note)

    def perturbation(case: Callable[[], Case], name: str, side: int) -> Row:
        variants = {
            OURS: ours(M.MoRF(groups=G.Squares(side), **values)),
            "Quantus": quantus("RegionPerturbation", falls=True, patch_size=side, regions_evaluation=64),
            "loop": loop(side, 1),
        }
        note = f"64 squares of {side} × {side}, one at a time, to 0"
        return Row(f"region perturbation/{name}", case, variants, {"Quantus": 5.0, "loop": 5.0}, note)

    def infidelity(case: Callable[[], Case], name: str, side: int) -> Row:
        variants = {
            OURS: ours(M.Infidelity(M.SquareRemoval((side,), samples=64))),
            "Quantus": quantus("Infidelity", perturb_patch_sizes=[side], n_perturb_samples=1),
        }
        note = (
            f"64 squares of {side} × {side} to 0: random ones of all places here; there the squares of one grid, which "
            "stay removed, so that it goes through them once (by default ten times, with the same result each time)"
        )
        return Row(f"infidelity/{name}", case, variants, {"Quantus": 5.0}, note)

    def sensitivity_n(case: Callable[[], Case], name: str, step: int, sizes: tuple[float, ...], samples: int) -> Row:
        variants = {
            OURS: ours(M.SensitivityN(sizes, samples, groups=G.Elements(), fill=BLACK)),
            "Quantus": quantus("SensitivityN", features_in_step=step),
        }
        note = (
            f"{len(sizes) * samples} subsets of single values of channels: random ones here, correlated for each "
            "example; there one series in the order of the map, correlated over examples, which is another quantity"
        )
        return Row(f"sensitivity-n/{name}", case, variants, {"Quantus": 5.0}, note)

    def max_sensitivity(case: Callable[[], Case], name: str, samples: int) -> Row:
        variants = {
            OURS: ours(M.MaxSensitivity(samples=samples), ap.Gradient()),
            "Quantus": quantus("MaxSensitivity", nr_samples=samples),
        }
        note = f"{samples} gradients of noisy copies, uniform within ±0.2; both make the map first, ours uncounted"
        return Row(f"max-sensitivity/{name}", case, variants, {"Quantus": 5.0}, note, backward=True)

    def randomization(case: Callable[[], Case], name: str) -> Row:
        variants = {OURS: ours(M.ParameterRandomization(), ap.Gradient()), "Quantus": quantus("MPRT")}
        note = (
            "gradients of the network and of every stage, from the output on, rank correlation; a layer and its "
            "normalization are one stage here and two there, and there the map is made twice: times are per gradient"
        )
        return Row(f"MPRT/{name}", case, variants, {"Quantus": 5.0}, note, backward=True, together=1)

    few = (0.1, 0.2, 0.4, 0.8)
    seven = [make(groups=G.Squares(4), step=1, **values) for make in (M.MoRF, M.LeRF, M.AOPC, M.ABPC)]
    squares: dict[str, Any] = {"groups": G.Squares(4), "step": 1, "fill": BLACK}
    seven += [M.DeletionAUC(**squares), M.InsertionAUC(**squares)]
    seven += [M.InsertionDeletion(M.InsertionAUC(**squares), M.DeletionAUC(**squares))]
    return [
        flipping(cnn, "CNN 32², 16 pictures", 32),
        flipping(one, "CNN 32², 1 picture", 32),
        perturbation(cnn, "CNN 32², 16 pictures", 4),
        perturbation(one, "CNN 32², 1 picture", 4),
        flipping(lite0, "Lite0, 2 pictures", 7168),
        perturbation(lite0, "Lite0, 2 pictures", 28),
        infidelity(cnn, "CNN 32², 16 pictures", 4),
        infidelity(one, "CNN 32², 1 picture", 4),
        infidelity(lite0, "Lite0, 2 pictures", 28),
        sensitivity_n(cnn, "CNN 32², 16 pictures", 32, few, 24),
        sensitivity_n(one, "CNN 32², 1 picture", 32, few, 24),
        sensitivity_n(lite0, "Lite0, 2 pictures", 7168, few[:3], 7),
        max_sensitivity(cnn, "CNN 32², 16 pictures", 50),
        max_sensitivity(one, "CNN 32², 1 picture", 50),
        max_sensitivity(lite0, "Lite0, 2 pictures", 16),
        randomization(cnn, "CNN 32², 16 pictures"),
        randomization(one, "CNN 32², 1 picture"),
        randomization(lite0_one, "Lite0, 1 picture"),
        Row(
            "deletion/Lite0, 2 pictures",
            lite0,
            {OURS: ours(M.DeletionAUC(step=1792, fill=BLACK)), "loop": loop(1, 1792)},
            {"loop": 5.0},
            "the step of RISE's large runs; all channels of a pixel together",
        ),
        Row(
            "seven metrics of removal/CNN 32², 16 pictures",
            cnn,
            {
                OURS: together(*seven),
                "each alone": together(*seven, shared=False),
                "loop, nine curves": repeated(9, loop(4, 1)),
            },
            {},
            "deletion, insertion, their difference, MoRF, LeRF, AOPC and ABPC at equal settings: two curves, run nine "
            "times by metrics that know nothing of each other; not equal work. Rows of ours are those of the first one",
        ),
    ]


# -- measuring ------------------------------------------------------------------------------------


def curve(found: Found) -> tuple[Tensor | None, tuple[float, float] | None]:
    """Read what a variant gave: its curves after the start, and rows forward and backward per example if it counts."""
    if not isinstance(found, Scores):
        return found, None
    first, cost = next(iter(found.curves.values()), None), found.cost
    counts = float((cost.forward + cost.at_x).double().mean()), float(cost.backward.double().mean())
    return None if first is None else first.y[:, 1:], counts


def measure(row: Row, rounds: int, seconds: float) -> dict[str, Any]:
    """Time the variants of a row, count their rows and compare what they find."""
    case, out = row.case(), {"name": row.name, "note": row.note, "examples": 0}
    out["examples"] = batch = len(case.x)
    ready: dict[str, tuple[Variant, int]] = {}
    out["variants"], seen = {}, {}
    for name, make in row.variants.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                run = make(case)
                with watched(case.net if name != OURS else nn.Identity()) as sent:  # ours counts itself
                    found = run()
        except Exception as error:
            out["variants"][name] = {"failed": first_line(error)}
            continue
        seen[name], told = curve(found)
        ready[name] = run, 1
        forward, backward = (n / batch for n in sent) if told is None else told
        out["variants"][name] = {"rows": forward, "backward": backward}
    if OURS in ready and row.goals:
        count = round(out["variants"][OURS]["rows"] * batch)
        run, how = floor(case, count, row.backward, None if row.together is None else row.together * batch)
        ready[FLOOR] = run, 1
        out["variants"][FLOOR] = {"rows": count / batch, "backward": count / batch * row.backward, "how": how}
    times, _ = interleave(ready, Clock(case.x.device), rounds=rounds, seconds=seconds)
    for name, taken in times.items():
        entry = out["variants"][name]
        entry["ms"] = 1e3 * statistics.median(taken) / batch
        if name == OURS:
            continue
        work = 1.0
        if row.together is not None:
            work = entry["backward"] / out["variants"][OURS]["backward"]
        low, middle, high = quartiles([a / b / work for a, b in zip(taken, times[OURS], strict=True)])
        entry |= {"ratio": middle, "low": low, "high": high, "goal": row.goals.get(name)}
        if name == FLOOR:
            continue
        a, b = seen[name], seen[OURS]
        if a is not None and b is not None and a.shape == b.shape:
            entry["apart"] = float((a.double() - b.double()).abs().max())
        if FLOOR in times:
            each = zip(taken, times[FLOOR], strict=True)
            entry["at most"] = statistics.median([a / b / work for a, b in each])
    return out


@contextmanager
def watched(model: nn.Module) -> Iterator[list[float]]:
    """Count rows through a module and its copies, which some libraries make, forward and backward."""
    rows = [0.0, 0.0]
    COUNTS.append(rows)

    def back(grad: Tensor) -> None:
        COUNTS[-1][1] += len(grad)

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        COUNTS[-1][0] += len(output)
        if output.requires_grad:
            output.register_hook(back)

    handle = model.register_forward_hook(hook)
    try:
        yield rows
    finally:
        handle.remove()
        COUNTS.pop()


COUNTS: list[list[float]] = []
"""Rows that are being counted; hooks of copied modules find them here."""


def table(found: list[dict[str, Any]]) -> str:
    """Write the rows as a table."""
    lines = [
        "| metric/network | variant | rows an example, back | ms an example | times ours | at most | curves apart |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found:
        for name, v in row["variants"].items():
            if "failed" in v:
                lines.append(f"| {row['name']} | {name} | {v['failed']} | | | | |")
                continue
            digits = 2 if name == FLOOR else 1
            ratio = f"{v['ratio']:.{digits}f} [{v['low']:.{digits}f}, {v['high']:.{digits}f}]" if "ratio" in v else "1"
            goal = v.get("goal")
            if goal is not None:
                ratio += f", goal {goal:g}: " + ("met" if v["ratio"] >= goal else "**missed**")
            apart = f"{v['apart']:.0e}" if "apart" in v else ""
            most = f"{v['at most']:.1f}" if "at most" in v else ""
            rows = f"{v['rows']:g}" + (f", {v['backward']:g}" if v.get("backward") else "")
            lines.append(f"| {row['name']} | {name} | {rows} | {v['ms']:.3g} | {ratio} | {most} | {apart} |")
    return "\n".join(lines)


HEAD = """# Metrics beside loops

Written by `python -m benchmarks.metrics`. Times are processor times of one thread, medians over interleaved rounds;
ratios are medians [quartiles] over rounds. *Floor*: the model alone on as many rows, ready-made, forward and where the
metric needs it backward, in the fastest of several batches and ways, a field's own among them; what of our time is
beyond it is ours to save. *At most*: the ratio a metric without any work of its own would have. Where that is below the
goal, no implementation that sends these rows can meet it. Rows back are given where there are some.
"""


def page(found: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """Write all rows, what to know of them, and where they were measured."""
    notes = "\n".join(f"- {row['name']}: {row['note']}." for row in found)
    return f"{HEAD}\n{table(found)}\n\n{notes}\n\n{json.dumps(about)}\n"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="rows whose name contains it; the rest of the record stays")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=60.0, help="for the rounds of one row, three at least")
    options = parser.parse_args()
    chosen = [row for row in rows() if not options.only or options.only in row.name]
    about = models.machine() | {"threads": torch.get_num_threads()} | versions(["torch", "quantus"])
    record = RESULTS / "metrics.json"
    held = {r["name"]: r for r in json.loads(record.read_text())["rows"]} if record.exists() else {}
    for row in chosen:
        held[row.name] = measure(row, options.rounds, options.seconds)
        print(table([held[row.name]]), flush=True)
        found = [held[r.name] for r in rows() if r.name in held]  # a run that is cut short leaves what it has
        record.write_text(json.dumps({"about": about, "rows": found}, indent=1) + "\n")
        (RESULTS / "metrics.md").write_text(page(found, about))


if __name__ == "__main__":
    main()
