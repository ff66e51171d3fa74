"""Denoising methods beside what they denoise: how noisy maps look, and what is left in them; results/noise.{json,md}.

On EfficientNet-Lite0 with the ten bundled pictures whose objects are marked, and on the digits' network. About 20
minutes on one core, training included; with `--out` and `--weights` what is finished is read.

    python -m benchmarks.noise
    python -m benchmarks.noise --only            (table and sheet anew, from the record)
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import apportion as ap
from apportion.adapters import bundled, zoo
from apportion.core import tree
from apportion.core.explainer import Passes
from apportion.core.external import Unregistered
from apportion.core.question import Question
from apportion.metrics.scores import Scores, Summary
from apportion.parts.baselines import blur
from apportion.parts.quadrature import Gauss, Left
from apportion.planted import digits
from benchmarks.dark_objects import network, right_ones
from benchmarks.models import machine
from benchmarks.quadrature import folded

B, F, M = ap.baselines, ap.fills, ap.metrics
RESULTS = Path(__file__).parent / "results"
COPIES, POINTS = 25, 16
"""Noisy copies of SmoothGrad, and points on a path."""
STAGES = ("lite0", "digits")


@dataclass(frozen=True)
class After(Unregistered):
    """A map that was squared, or blurred by a Gaussian of sigma pixels: the network is asked nothing more.

    Attributes:
        base: what makes the map.
        sigma: in pixels; 0 for none.
        square: square it first.
    """

    base: ap.Explainer
    sigma: float = 0.0
    square: bool = False

    @property
    def kind(self) -> Any:
        return self.base.kind

    def passes(self, q: Question | None = None) -> Passes:
        return self.base.passes(q)

    def explain(self, q: Question) -> ap.Attribution:
        made = self.base.explain(q).values
        if self.square:
            made = tree.apply(Tensor.square, made)
        return q.attribution(self, tree.apply(lambda t: blur(t, self.sigma), made) if self.sigma else made)


@dataclass(frozen=True)
class Setting:
    """A network and pictures.

    Attributes:
        title: what they are.
        field: the logit of the class on top.
        x: pictures in [0, 1].
        masks: where the object is.
        ids: names.
        others: pictures that serve as baselines.
        grey: what stands for nothing on a path and in removal: the network's mean color.
        metrics: how maps are judged.
        batch: pictures at once.
    """

    title: str
    field: ap.Field
    x: Tensor
    masks: list[Tensor]
    ids: list[str]
    others: Tensor
    grey: Any
    metrics: dict[str, Any]
    batch: int


def methods(s: Setting) -> dict[str, dict[str, ap.Explainer]]:
    """List what is denoised, each with what denoises it: the first of a group is what the others are compared with."""
    gradient, squared, times = ap.Gradient(), After(ap.Gradient(), square=True), ap.GradientTimesInput()
    ig = ap.IntegratedGradients(s.grey, Gauss(POINTS))
    noise = ap.noise.Gaussian(0.15)
    return {
        "gradient": {
            "gradient": gradient,
            **{f"gradient, blurred by {k}": After(gradient, float(k)) for k in (1, 2, 4)},
            "SmoothGrad": ap.SmoothGrad(samples=COPIES, noise=noise),
            "guided backpropagation": ap.GuidedBackprop(),
            "deconvolution": ap.Deconvnet(),
        },
        "gradient²": {
            "gradient²": squared,
            **{f"gradient², blurred by {k}": replace(squared, sigma=float(k)) for k in (1, 2, 4)},
            "SmoothGrad²": ap.SmoothGradSquared(samples=COPIES, noise=noise),
            "VarGrad": ap.VarGrad(samples=COPIES, noise=noise),
        },
        "gradient × input": {
            "gradient × input": times,
            **{f"gradient × input, blurred by {k}": After(times, float(k)) for k in (1, 2, 4)},
            "RectGrad": ap.RectGrad(),
            "LRP, ε and z⁺": ap.LRP(ap.rules.epsilon_plus()),
        },
        "integrated gradients": {
            "integrated gradients": ig,
            "integrated gradients, blurred by 2": After(ig, 2.0),
            "SmoothGrad of integrated gradients": ap.SmoothGrad(replace(ig, quadrature=Gauss(8)), 4, noise),
            "guided IG": ap.GuidedIG(s.grey, POINTS),
            "guided IG, path not held to the line": ap.GuidedIG(s.grey, POINTS, max_dist=1.0),
            "IDGI": ap.IDGI(ap.paths.Straight(s.grey, quadrature=Left(POINTS))),
            "split IG": ap.SplitIG(s.grey, Gauss(POINTS)),
            "blur IG": ap.BlurIG(s.x.shape[3] / 6, Gauss(POINTS)),
            "expected gradients": ap.ExpectedGradients(B.Data(s.others, POINTS // 2), 2),
        },
        "guided backpropagation": {
            "guided backpropagation": ap.GuidedBackprop(),
            "guided backpropagation, blurred by 2": After(ap.GuidedBackprop(), 2.0),
            "guided Grad-CAM": ap.GuidedGradCAM(),
        },
        "Grad-CAM++": {
            "Grad-CAM++": ap.Resized(ap.GradCAMPlusPlus()),
            "Smooth Grad-CAM++": ap.Resized(ap.SmoothGradCAMPlusPlus(noise=noise)),
        },
    }


CONTROLS = {
    "white noise": ap.controls.Random(),
    "white noise, blurred by 8": After(ap.controls.Random(), 8.0),
    "the middle": ap.controls.CenterGaussian(),
    "edges": ap.controls.Edges(),
}
"""Maps that know nothing of the network; the second is as quiet as any."""

NOISE = ("variation", "frequency", "flips", "outside")
"""How noisy a map looks, each with what white noise and a blur of the map have."""
LEFT = ("insertion - deletion", "infidelity", "other class")
"""What is left of it."""
BLURRED = ", blurred by "


def metrics(grey: Any, coming: Any, step: int) -> dict[str, Any]:
    """Give how maps are judged on either network."""
    return {
        "variation": M.MapNoise("variation"),
        "frequency": M.MapNoise("frequency"),
        "flips": M.MapNoise("flips"),
        "outside": M.MassOutside(),
        "insertion - deletion": M.InsertionDeletion(
            M.InsertionAUC(fill=coming, step=step), M.DeletionAUC(fill=F.Baselines(grey), step=step)
        ),
        "other class": M.RandomLogit(),
    }


def lite0(names: list[str]) -> Setting:
    """EfficientNet-Lite0 with folded batch-norms, on pictures with a marked object; other ones are baselines."""
    model = zoo.load("efficientnet_lite0")
    plain = model.field()
    field = ap.Field(folded(model.model), normalize=plain.normalize, bounds=(0, 1), batch_size=16)
    x = model.see(*(bundled.picture(n) for n in names)).contiguous(memory_format=torch.channels_last)
    masks = []
    for name in names:
        height, width = bundled.picture(name).pixels.shape[1:]
        masks.append(bundled.truth(name).through(model.crop, height, width).mask(*x.shape[2:]))
    others = model.see(*(bundled.picture(n) for n in bundled.bundled(installed=True) if n not in bundled.drawn()))
    grey = B.NetworkZero()
    judged = metrics(grey, F.Baselines(B.RISEBlur()), 224 * 22)
    return Setting(
        f"EfficientNet-Lite0, {len(x)} bundled pictures", field, x, masks, names, others, grey, judged, 2
    )  # fmt: skip


def of_digits(weights: Path | None, count: int) -> Setting:
    """Digits on texture that the trained network classifies rightly, dark and light ones; grey is 0 to the network."""
    model, accuracy = network(weights)
    test = right_ones(model, count)
    field = ap.Field(model, bounds=(0, 1), batch_size=128)
    grey = B.Constant(0.5)
    judged = metrics(grey, F.Baselines(B.Blurred(8.0)), 96)
    squares = M.SquareRemoval(baseline=grey, sides=(6,), samples=64)
    judged["infidelity"] = M.Infidelity(squares, optimal_scale=True)
    judged["random network"] = M.ParameterRandomization(stages=1)
    title = f"Digits on texture, {len(test)} pictures; accuracy {accuracy:.3f}"
    ids = [f"digit {i}" for i in range(len(test))]
    others = digits.pictures(200, "train").x
    return Setting(title, field, test.x, list(test.masks), ids, others, grey, judged, 25)


# -- measuring ------------------------------------------------------------------------------------


def told(s: Summary) -> dict[str, float]:
    """Give the mean and its interval."""
    low, high = s.interval
    return {"mean": s.mean, "low": low, "high": high}


def as_quiet(name: str, group: list[str], scores: Mapping[str, Mapping[str, Scores]]) -> str | None:
    """Find the least blur of the same map that varies no more than a denoised one; none for the first and for blurs."""
    if name == group[0] or BLURRED in name:
        return None
    varies = {n: scores[n]["variation"].summary().mean for n in group if BLURRED in n or n == name}
    quieter = {n: v for n, v in varies.items() if n != name and v <= varies[name]}
    return max(quieter, key=lambda n: quieter[n]) if quieter else None


def apart(metric: str, s: Scores, other: Scores) -> Summary:
    """Sum up the paired differences of two methods."""
    return shares(s).against(shares(other)) if metric == "infidelity" else s.against(other)


def cell(name: str, s: Scores, before: Scores | None) -> dict[str, Any]:
    """Sum up a method's scores by a metric, with what stands beside, and the paired difference to before."""
    if name == "infidelity":  # over that of zeros: the share of what squares do that is not forecast
        s, before = shares(s), before and shares(before)
    out: dict[str, Any] = told(s.summary())
    if name in NOISE:
        for part in ("white", "blurred"):
            out[part] = told(Summary.of(s.parts[part], s.ids, s.seed))
    if before is not None:
        out["change"] = told(s.against(before))
    missing = int(s.values.isnan().sum())
    return out | ({"undefined": missing} if missing else {})


def shares(s: Scores) -> Scores:
    """Divide infidelities by that of a map of zeros."""
    return replace(s, values=s.values / s.parts["of zeros"])


def run(s: Setting, out: Path) -> dict[str, Any]:
    """Judge every method before and after."""
    groups = methods(s)
    flat = {n: m for group in groups.values() for n, m in group.items()}
    found = ap.evaluate(
        flat, s.field, s.x, s.metrics, controls=CONTROLS, truth={"outside": s.masks}, ids=s.ids, batch=s.batch, out=out
    )
    table: dict[str, Any] = {}
    for title, group in groups.items():
        first, table[title] = found.scores[next(iter(group))], {}
        for name in group:
            own = found.scores[name]
            row = {m: cell(m, own[m], None if own is first else first[m]) for m in s.metrics}
            if (blurred := as_quiet(name, list(group), found.scores)) is not None:
                row["as quiet"] = {"by": blurred} | {
                    m: told(apart(m, own[m], found.scores[blurred][m])) for m in LEFT if m in own
                }
            table[title][name] = row | {"passes": float(found.costs[name].backward.double().mean())}
    one = found.scores[next(iter(flat))]
    return {
        "title": s.title,
        "machine": machine(),
        "methods": found.settings["methods"],
        "metrics": found.settings["metrics"],
        "table": table,
        "controls": {c: {m: cell(m, one[m].controls[c], None) for m in s.metrics} for c in CONTROLS},
        "area": float(torch.stack(s.masks).double().mean()),
        "notes": found.notes(),
    }


# -- the table ------------------------------------------------------------------------------------

HEADS = {
    "variation": "variation",
    "frequency": "fine structure",
    "flips": "flips",
    "outside": "mass outside",
    "insertion - deletion": "insertion - deletion",
    "infidelity": "not forecast",
    "other class": "likeness, other class",
    "random network": "likeness, random network",
}

HEAD = f"""# Noise before and after

Made by `python -m benchmarks.noise`. Of each group the first row is what the others denoise. Means over pictures with
95 % bootstrap intervals; an arrow says which way a score went from the first row, where the interval of the paired
difference leaves out 0 and the difference shows in two digits.

- *variation*: total variation over mass. *fine structure*: share of energy above a quarter of a cycle a pixel. *flips*:
  neighbours of different sign. *mass outside*: of magnitude, outside the marked object. After the bar: the same map
  after a Gaussian blur of 2 pixels. White noise has a row of its own.
- *insertion - deletion*: of the class's probability, in 11 steps (digits: 24), from and to what the record says; higher
  is better. *not forecast*: infidelity with the best scale
  over that of a map of zeros: the share of what removing a square does to the logit that the map does not tell; lower
  is better, and 1 is a map that says nothing.
- *likeness*: rank correlation of the map with that of another class, drawn for each picture, and with that of the
  network with random parameters. A map that is the same for all is no explanation of one.
- *passes*: gradient evaluations a picture. SmoothGrad and its kin: {COPIES} copies with noise of 0.15 of the range, for
  integrated gradients 4 copies of 8 points each; Smooth Grad-CAM++: 4. Paths: {POINTS} points, from the network's mean
  color, grey; RectGrad: the default percentile. Blurs in the first column are Gaussian, of so many pixels.
"""


def number(c: Mapping[str, Any], digits: int = 2) -> str:
    """Write a mean, its interval, the way it went, and what a blur has."""
    if math.isnan(c["mean"]):
        return "undefined"
    text = f"{c['mean']:.{digits}f} [{c['low']:.{digits}f}, {c['high']:.{digits}f}]"
    change = c.get("change")
    if change is not None:
        seen = abs(change["mean"]) >= 0.5 * 10**-digits
        text += " ↓" if seen and change["high"] < 0 else " ↑" if seen and change["low"] > 0 else ""
    return text + (f" \\| {c['blurred']['mean']:.{digits}f}" if "blurred" in c else "")


def lines(part: Mapping[str, Any]) -> list[str]:
    """Write the rows of a network."""
    names = [n for n in HEADS if n in next(iter(part["controls"].values()))]
    out = [
        f"## {part['title']}",
        "",
        f"Objects have {part['area']:.2f} of the area. {part['machine']['cpu']}, torch {part['machine']['torch']}.",
        "",
        "| | " + " | ".join(HEADS[n] for n in names) + " | passes |",
        "|---|" + "---|" * (len(names) + 1),
    ]
    for group in part["table"].values():
        for i, (name, row) in enumerate(group.items()):
            label = name if i else f"**{name}**"
            out.append(f"| {label} | " + " | ".join(number(row[n]) for n in names) + f" | {row['passes']:.0f} |")
    for name, row in part["controls"].items():
        out.append(f"| *{name}* | " + " | ".join(number(row[n]) for n in names) + " | |")
    left = [n for n in LEFT if n in names]
    out += ["", "Paired differences to the least blur of the same map that varies no more:", ""]
    out += ["| | beside | " + " | ".join(HEADS[n] for n in left) + " |", "|---|---|" + "---|" * len(left)]
    for group in part["table"].values():
        for name, row in group.items():
            if (beside := row.get("as quiet")) is not None:
                cells = " | ".join(number({**beside[n], "change": beside[n]}) for n in left)
                out.append(f"| {name} | {beside['by']} | {cells} |")
    return [*out, ""]


def page(record: Mapping[str, Any]) -> str:
    """Write the tables."""
    out = [HEAD]
    for stage in STAGES:
        if stage in record:
            out += lines(record[stage])
    out += [f"![maps before and after on {p}](noise_{p}.jpg)" for p in record.get("pictures", ())]
    return "\n".join([*out, ""])


# -- the sheet ------------------------------------------------------------------------------------


def draw(s: Setting, index: int, file: Path) -> None:
    """Draw the maps of a picture, a row a group, what is denoised first."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    x, groups = s.x[index : index + 1], methods(s)
    columns = max(map(len, groups.values())) + 1
    figure, axes = plt.subplots(len(groups), columns, figsize=(1.5 * columns, 1.75 * len(groups)), layout="constrained")
    flat = {n: m for group in groups.values() for n, m in group.items()}
    maps = {n: m(s.field, x, ids=s.ids[index : index + 1]).values[0].sum(0) for n, m in flat.items()}
    for axis in axes.flat:
        axis.axis("off")
    for row, group in zip(axes, groups.values(), strict=True):
        row[0].imshow(x[0].permute(1, 2, 0).clamp(0, 1))
        for axis, name in zip(row[1:], group, strict=False):
            high = float(maps[name].abs().flatten().quantile(0.99)) or 1.0
            axis.imshow(maps[name], cmap="seismic", vmin=-high, vmax=high, interpolation="nearest")
            axis.set_title(name.replace(", ", ",\n").replace(" of ", "\nof "), fontsize=7)
    figure.savefig(file, dpi=90, pil_kwargs={"quality": 65, "optimize": True})
    plt.close(figure)


def main() -> None:
    """Run the stages asked for; write record, tables and sheets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=STAGES, default=STAGES)
    parser.add_argument("--pictures", nargs="*", default=list(bundled.drawn()), help="for EfficientNet-Lite0")
    parser.add_argument("--count", type=int, default=100, help="digits")
    parser.add_argument("--weights", type=Path, help="file for the digits' network, read where it is there")
    parser.add_argument("--out", type=Path, help="folder that keeps what is finished")
    options = parser.parse_args()
    torch.set_num_threads(1)
    file = RESULTS / "noise.json"
    kept = options.out or Path(tempfile.mkdtemp())
    shown = {"lite0": ("chelsea", 0), "digits": ("digit", 0)}
    for stage in options.only:
        s = lite0(options.pictures) if stage == "lite0" else of_digits(options.weights, options.count)
        found = run(s, kept / stage)
        record: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}  # also of the other stage
        record[stage] = json.loads(json.dumps(found), parse_float=lambda t: round(float(t), 4))
        record["pictures"] = [shown[st][0] for st in STAGES if st in record]
        file.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        draw(s, shown[stage][1], RESULTS / f"noise_{shown[stage][0]}.jpg")
    (RESULTS / "noise.md").write_text(page(json.loads(file.read_text())))


if __name__ == "__main__":
    main()
