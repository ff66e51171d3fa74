"""Insertion minus deletion as in Table 1 of Akhtar and Jalwana 2023; writes results/credible.{json,md,png}.

All methods have 150 points on their paths and explain the logit of the class on top. Four stages, each of which
replaces its own part of the record: the digits' network (half an hour on one core), EfficientNet-Lite0 on the ten
bundled pictures with marked objects (half an hour), the ablation of Table 4 and the sweep of the method's own
parameters (ten minutes each, on fewer digits).

    python -m benchmarks.credible
    python -m benchmarks.credible --only ablation sweep
    python -m benchmarks.credible --only          (tables and plot anew, from the record)
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import apportion as ap
from apportion.adapters import bundled, zoo
from apportion.parts.quadrature import Midpoint
from apportion.planted import digits
from benchmarks.dark_objects import found, network
from benchmarks.models import machine
from benchmarks.quadrature import folded
from benchmarks.removal_curves import (
    Score,
    centre_map,
    insertion_and_deletion,
    interval,
    random_map,
    rise_blur,
    shown,
)

B = ap.baselines
POINTS, THREE = 150, 3
ORDER = ("CrediblePath", "IG (A)", "EG, 3 x 50", "IG", "IG (G)")
"""The order that holds on all three models of the paper's Table 1, best first."""


def methods(data: Tensor) -> dict[str, Any]:
    """Give the columns of Table 1, as far as they are here, and EG with a baseline for every point."""
    out: dict[str, Any] = {
        "IG": ap.IntegratedGradients(B.Zero(), Midpoint(POINTS)),
        "IG (G)": ap.IntegratedGradients(B.Noise(0.25, 0.5, clip=True), Midpoint(POINTS)),
        "IG (A)": ap.IntegratedGradients(B.Mean(), Midpoint(POINTS)),
        "EG, 3 x 50": ap.ExpectedGradients(B.Data(data, THREE), POINTS // THREE),
    }
    if len(data) >= POINTS:
        out["EG, 150 x 1"] = ap.ExpectedGradients(B.Data(data, POINTS))
    agi, credible = found("agi", "AGI"), found("credible_path", "CrediblePath")
    if agi is not None:
        out["AGI"] = agi(0.001, POINTS // THREE, THREE, "random")
    if credible is not None:
        out["CrediblePath"] = credible()
    return out


def probability(model: torch.nn.Module, target: Tensor) -> Score:
    """Give the probability of each row's class."""

    def score(rows: Tensor, owner: Tensor) -> Tensor:
        return model(rows).softmax(1).gather(1, target[owner, None])[:, 0]

    return score


class Game:
    """Pictures, the probability that is followed, and what takes a pixel's place."""

    def __init__(self, score: Score, x: Tensor, substrates: dict[str, tuple[Tensor, Tensor]], steps: int, batch: int):
        self.score, self.x, self.substrates, self.steps, self.batch = score, x, substrates, steps, batch

    def play(self, values: Tensor) -> dict[str, Tensor]:
        """Give insertion, deletion and their difference, [B] each, for each choice of substrates."""
        out = {}
        for name, (gone, blurred) in self.substrates.items():
            up, down = insertion_and_deletion(self.score, self.x, values, gone, blurred, self.steps, self.batch)
            out |= {f"{name}: insertion": up, f"{name}: deletion": down, name: up - down}
        return out

    def left(self) -> dict[str, float]:
        """Say how much of the class the substrates hold themselves: mean probability."""
        owner, out = torch.arange(len(self.x)), {}
        for name, pair in self.substrates.items():
            for which, t in zip(("deletion", "insertion"), pair, strict=True):
                with torch.no_grad():
                    rows = t.expand_as(self.x)
                    each = [self.score(rows[o], o) for o in owner.split(self.batch)]
                out[f"{name}: {which}"] = torch.cat(each).mean().item()
        return out


def digits_game(model: torch.nn.Module, test: digits.Pictures) -> tuple[ap.Field, Game]:
    """Set up the digits: grey is 0 to the network, as RISE's mean colour is; a wide blur fits pictures of 48 pixels."""
    field = ap.Field(model, bounds=(0, 1), batch_size=128)
    with torch.no_grad():
        target = model(test.x).argmax(1)
    grey, black, blurred = torch.full((1, 3, 1, 1), 0.5), torch.zeros(1, 3, 1, 1), B.blur(test.x, 8.0)
    substrates = {"grey, blurred": (grey, blurred), "black, black": (black, black)}
    return field, Game(probability(model, target), test.x, substrates, 24, 256)


def summarize(per_picture: dict[str, dict[str, Tensor]], parts: dict[str, Tensor]) -> dict[str, Any]:
    """Give intervals for every method and part, and of the paired difference to IG."""
    out: dict[str, Any] = {}
    for name, scores in per_picture.items():
        out[name] = {}
        for part, rows in parts.items():
            cell = {key: interval(value[rows]) for key, value in scores.items()}
            first = next(key for key in scores if ":" not in key)
            if "IG" in per_picture and name != "IG":
                cell["minus IG"] = interval((scores[first] - per_picture["IG"][first])[rows])
            out[name][part] = cell
    return out


def in_order(table: dict[str, Any], part: str, key: str) -> dict[str, Any]:
    """Say whether the paper's order holds among those methods that are here."""
    names = [n for n in ORDER if n in table]
    means = {n: table[n][part][key]["mean"] for n in names}
    return {"here": sorted(means, key=lambda n: -means[n]), "paper": names, "holds": names == sorted(
        means, key=lambda n: -means[n])}  # fmt: skip


def run_digits(model: torch.nn.Module, count: int) -> dict[str, Any]:
    """Play the game on digits, dark and light ones apart."""
    test = digits.pictures(count, seed=2)
    field, game = digits_game(model, test)
    parts = {"all": test.dark | True, "dark": test.dark, "light": ~test.dark}
    scores = {"random map": game.play(random_map(test.x)), "centre": game.play(centre_map(test.x))}
    scores["exact mask"] = game.play(test.masks.float())
    cost, seconds, notes = {}, {}, {}
    for name, explainer in methods(digits.pictures(1000, "train").x).items():
        start = time.perf_counter()
        a = explainer(field, test.x)
        scores[name] = game.play(a.values)
        cost[name] = a.cost.backward.double().mean().item()
        seconds[name] = round(time.perf_counter() - start, 1)
        notes[name] = {
            k: a.parts[k].double().mean().item() for k in ("valid_share", "zero_count_share") if k in a.parts
        }
        print(name, shown(interval(scores[name]["grey, blurred"])), f"{cost[name]:.0f}", seconds[name], flush=True)
    table = summarize(scores, parts)
    return {
        "machine": machine(),
        "pictures": count,
        "accuracy": float((a.target.flatten() == test.labels).float().mean()),
        "left by the substrate": game.left(),
        "table": table,
        "backward": cost,
        "seconds": seconds,
        "notes": notes,
        "order": {p: {k: in_order(table, p, k) for k in game.substrates} for p in parts},
    }


def run_lite0(names: list[str], done: Path | None) -> dict[str, Any]:
    """Play the game on the bundled pictures with marked objects; finished pictures are kept in a file."""
    model = zoo.load("efficientnet_lite0")
    plain = model.field()
    assert plain.normalize is not None
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (plain.normalize.mean, plain.normalize.std))
    fast = folded(model.model)
    field = ap.Field(fast, normalize=plain.normalize, bounds=(0, 1), batch_size=16)
    every = {n: model.see(bundled.picture(n)) for n in bundled.bundled(installed=True)}
    rows: dict[str, Any] = json.loads(done.read_text()) if done is not None and done.exists() else {}
    for name in names:
        if name in rows:
            continue
        x = every[name].contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            z = fast((x - mean) / std)
        target = z.argmax(1)
        score = probability(fast, target)
        game = Game(
            lambda r, o, s=score: s((r - mean) / std, o),
            x, {"mean colour, RISE's blur": (mean, rise_blur(x))}, 28, 16,
        )  # fmt: skip
        truth = bundled.truth(name)
        height, width = bundled.picture(name).pixels.shape[1:]
        mask = truth.through(model.crop, height, width).mask(x.shape[2], x.shape[3])
        maps = {"random map": random_map(x), "centre": centre_map(x), "drawn mask": mask.float()[None]}
        cost = {}
        for label, explainer in methods(torch.cat([v for k, v in every.items() if k != name])).items():
            a = explainer(field, x)
            maps[label], cost[label] = a.values, float(a.cost.backward[0])
        played = {k: {n: float(v[0]) for n, v in game.play(m.contiguous()).items()} for k, m in maps.items()}
        rows[name] = {"scores": played, "backward": cost, "left": game.left(), "target": int(target),
                      "probability": float(z.softmax(1).max())}  # fmt: skip
        print(name, {k: round(v["mean colour, RISE's blur"], 3) for k, v in played.items()}, flush=True)
        if done is not None:
            done.write_text(json.dumps(rows))
    keys = next(iter(rows.values()))
    scores = {
        m: {k: torch.tensor([r["scores"][m][k] for r in rows.values()]) for k in one}
        for m, one in keys["scores"].items()
    }
    table = summarize(scores, {"all": torch.ones(len(rows), dtype=torch.bool)})
    return {
        "machine": machine(),
        "pictures": rows,
        "left by the substrate": {k: sum(r["left"][k] for r in rows.values()) / len(rows) for k in keys["left"]},
        "table": table,
        "backward": {m: sum(r["backward"][m] for r in rows.values()) / len(rows) for m in keys["backward"]},
        "order": {"all": {"mean colour, RISE's blur": in_order(table, "all", "mean colour, RISE's blur")}},
    }


def variants(stage: str) -> dict[str, Any]:
    """Give the settings of the ablation, or of the sweep: one thing changed at a time."""
    credible = found("credible_path", "CrediblePath")
    if credible is None:
        return {}
    from apportion.parts.accumulate import ValidFeatures

    base = credible().baseline

    def starts(*sigmas: float) -> Any:
        return B.Several(tuple(B.Blurred(s) for s in sigmas))

    def with_baseline(**changes: Any) -> Any:
        return credible(type(base)(**{"init": base.init, **changes}))

    if stage == "ablation":
        one, every = type(base)(B.Blurred(8.0)), Midpoint(POINTS)
        return {
            "black, all points (IG)": ap.IntegratedGradients(B.Zero(), every),
            "black, valid points (the paper's Our + IG_Baseline)": credible(B.Zero()),
            "own mean, all points (IG (A))": ap.IntegratedGradients(B.Mean(), every),
            "own mean, valid points": credible(B.Mean()),
            "one blur, no search, all points": ap.IntegratedGradients(B.Blurred(8.0), every),
            "one blur, no search, valid points": credible(B.Blurred(8.0)),
            "one credible baseline, all points": ap.IntegratedGradients(one, every),
            "one credible baseline, valid points (Single_Baseline)": credible(one),
            "three credible baselines, all points": ap.IntegratedGradients(base, Midpoint(POINTS // THREE)),
            "three credible baselines, valid points (Proposed)": credible(),
            "three credible baselines, valid points, > as printed": credible(valid=ValidFeatures(strict=True)),
            "three credible baselines, test as printed": credible(valid=ValidFeatures("scaled")),
            "three credible baselines, recalibrated": credible(valid=ValidFeatures("ascent")),
            "three credible baselines, divided by all": credible(valid=ValidFeatures(divide="all")),
        }
    return {
        "as it is": credible(),
        "init: blurs 1, 2, 4": with_baseline(init=starts(1.0, 2.0, 4.0)),
        "init: blurs 8, 16, 32": with_baseline(init=starts(8.0, 16.0, 32.0)),
        "init: uniform noise": with_baseline(init=B.Noise(0.5, 0.5, count=3, uniform=True)),
        "eps = 0.25": with_baseline(eps=0.25),
        "eps = 4": with_baseline(eps=4.0),
        "eta = 0.25 / 255": with_baseline(eta=0.25 / 255),
        "eta = 4 / 255": with_baseline(eta=4 / 255),
        "delta = 1 / 255": with_baseline(delta=1 / 255),
        "delta = 25 / 255": with_baseline(delta=25 / 255),
        "descend the distance": with_baseline(descend="distance"),
        "K = 30": credible(total=30),
        "K = 300": credible(total=300),
        "B = 1 (blur 8)": with_baseline(init=B.Blurred(8.0)),
        "B = 6 (blurs 2 to 32)": with_baseline(init=starts(2.0, 4.0, 6.0, 8.0, 16.0, 32.0)),
    }


def run_variants(model: torch.nn.Module, stage: str, count: int) -> dict[str, Any]:
    """Play the game with every setting, on digits."""
    test = digits.pictures(count, seed=3)
    field, game = digits_game(model, test)
    del game.substrates["black, black"]
    rows, first = {}, None
    for name, explainer in variants(stage).items():
        a = explainer(field, test.x)
        score = game.play(a.values)["grey, blurred"]
        first = score if first is None else first
        mass = a.values.sum(1).abs()
        share = (mass * test.masks).sum((1, 2)) / mass.sum((1, 2)).clamp(min=1e-30)
        rows[name] = {
            "difference": interval(score),
            "minus the first": interval(score - first),
            "mass on the digit, dark": interval(share[test.dark]),
            "backward": a.cost.backward.double().mean().item(),
        } | {k: a.parts[k].double().mean().item() for k in ("valid_share", "zero_count_share") if k in a.parts}
        distance = getattr(getattr(explainer, "baseline", None), "distance", None)
        if distance is not None:
            away = torch.cat([distance(field.bind(x)) for x in test.x.split(256)])
            rows[name]["logit distance, median"] = away.median().item()
        print(stage, name, shown(rows[name]["difference"]), round(rows[name]["backward"]), flush=True)
    return {"pictures": count, "area, dark": test.masks[test.dark].float().mean().item(), "rows": rows}


def _sentence(order: dict[str, Any]) -> str:
    said = "holds" if order["holds"] else "does not hold"
    return f"The paper's order {' > '.join(order['paper'])} {said}; here it is {' > '.join(order['here'])}."


def markdown(record: dict[str, Any]) -> str:
    """Write the tables."""
    lines = [
        "# Insertion minus deletion: credible path attribution",
        "",
        "Made by `python -m benchmarks.credible`. Area under insertion minus area under deletion, of the probability",
        "of the class on top, over the share of pixels; pixels ranked by values summed over channels; mean over",
        "pictures with 95 % bootstrap intervals. `passes` are gradient evaluations per picture: 150 on the paths, and",
        "what searching for baselines costs besides. AGI has at most 150 on its paths and as many for the ascents; it",
        "stops where the other class is reached.",
    ]
    for stage, title in (("digits", "Digits on texture"), ("lite0", "EfficientNet-Lite0, bundled pictures")):
        if stage not in record:
            continue
        part = record[stage]
        table, parts = part["table"], list(next(iter(part["table"].values())))
        keys = [k for k in next(iter(table.values()))["all"] if ":" not in k and k != "minus IG"]
        count = part["pictures"] if isinstance(part["pictures"], int) else len(part["pictures"])
        about = f"{count} pictures" + (f", accuracy {part['accuracy']:.3f}." if "accuracy" in part else ".")
        left = ", ".join(f"{k} {v:.3f}" for k, v in part["left by the substrate"].items())
        lines += ["", f"## {title}", "", f"{about} Mean probability of the class at the substrate alone: {left}.", ""]
        heads = [f"{k}: {p}" for k in keys for p in parts]
        heads += ["minus IG, paired", f"insertion ({keys[0]})", f"deletion ({keys[0]})", "passes"]
        lines += ["| method | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
        for name, row in sorted(table.items(), key=lambda item: -item[1]["all"][keys[0]]["mean"]):
            cells = [shown(row[p][k]) for k in keys for p in parts]
            cells += [shown(row["all"]["minus IG"]) if "minus IG" in row["all"] else ""]
            cells += [f"{row['all'][f'{keys[0]}: {w}']['mean']:.3f}" for w in ("insertion", "deletion")]
            cells += [f"{part['backward'][name]:.0f}" if name in part["backward"] else ""]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
        for p, orders in part["order"].items():
            lines += [f"- {k}, {p}: {_sentence(order)}" for k, order in orders.items()]
    for stage, title in (("ablation", "Ablation, as Table 4"), ("sweep", "Own parameters, one changed at a time")):
        if stage not in record:
            continue
        part = record[stage]
        lines += [
            "",
            f"## {title}",
            "",
            f"{part['pictures']} digits on texture; deletion to grey, insertion from the blur. Dark digits have "
            f"{part['area, dark']:.3f} of the area.",
            "",
            "| setting | difference | minus the first, paired | mass on dark digits | valid pairs | features without "
            "any | logit distance, median | passes |",
            "|---|" + "---|" * 7,
        ]
        for name, row in part["rows"].items():
            extra = [f"{row[k]:.2f}" if k in row else "" for k in ("valid_share", "zero_count_share")]
            extra.append(f"{row['logit distance, median']:.2f}" if "logit distance, median" in row else "")
            lines.append(
                f"| {name} | {shown(row['difference'])} | {shown(row['minus the first'])} | "
                f"{shown(row['mass on the digit, dark'])} | {' | '.join(extra)} | {row['backward']:.0f} |"
            )
    return "\n".join([*lines, ""])


def draw(record: dict[str, Any], file: Path) -> None:
    """Draw the differences with their intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    stages = [s for s in ("digits", "lite0") if s in record]
    figure = Figure(figsize=(5.8 * len(stages), 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, stage in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages, strict=True):
        table = record[stage]["table"]
        parts = [p for p in ("dark", "light") if p in next(iter(table.values()))] or ["all"]
        first = next(k for k in next(iter(table.values()))["all"] if ":" not in k)
        names = sorted(table, key=lambda n: -table[n]["all"][first]["mean"])
        for n, part in enumerate(parts):
            rows = [table[name][part][first] for name in names]
            ends = [[r["mean"] - r["low"] for r in rows], [r["high"] - r["mean"] for r in rows]]
            colour = {"dark": "#222222", "light": "#e08a00"}.get(part, "#2a6f97")
            places = [i + 0.3 * n for i in range(len(names))]
            axes.errorbar([r["mean"] for r in rows], places, xerr=ends, fmt="o", color=colour, capsize=3, label=part)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.axvline(0, color="#999999", linewidth=1)
        axes.set(title=f"{stage}: {first}", xlabel="insertion - deletion")
        axes.grid(alpha=0.3, axis="x")
        axes.legend()
    figure.savefig(file, dpi=110)


def main() -> None:
    """Run the stages asked for, and write record, tables and plot."""
    stages = ("digits", "lite0", "ablation", "sweep")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=stages, default=stages)
    parser.add_argument("--count", type=int, default=500, help="digits; the ablation has a fifth, the sweep a tenth")
    parser.add_argument("--pictures", nargs="*", default=list(bundled.drawn()), help="for EfficientNet-Lite0")
    parser.add_argument("--weights", type=Path, help="file for the digits' network, read where it is there")
    parser.add_argument("--done", type=Path, help="file for finished pictures of EfficientNet-Lite0")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = None if set(options.only) <= {"lite0"} else network(options.weights)[0]
    options.out.mkdir(exist_ok=True)
    file = options.out / "credible.json"
    for stage in options.only:
        start = time.perf_counter()
        if stage == "lite0":
            part = run_lite0(options.pictures, options.done)
        else:
            assert model is not None
            share = {"ablation": 5, "sweep": 10}.get(stage)
            part = (
                run_digits(model, options.count)
                if share is None
                else run_variants(model, stage, options.count // share)
            )
        part["stage seconds"] = round(time.perf_counter() - start)
        record = json.loads(file.read_text()) if file.exists() else {}  # another stage may have been written since
        record[stage] = part
        file.write_text(json.dumps(record, indent=1) + "\n")
    record = json.loads(file.read_text())
    (options.out / "credible.md").write_text(markdown(record))
    if {"digits", "lite0"} & set(record):
        draw(record, options.out / "credible.png")


if __name__ == "__main__":
    main()
