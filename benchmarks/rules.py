"""Backward rules on networks of every make: what holds to which precision, what is refused, and what it costs.

`python -m benchmarks.rules` writes results/rules.md and results/rules.json. Networks have random weights, except
EfficientNet-Lite0; accuracy is measured in float64 and, where said, float32, on two examples and their top classes.
Of LRP, biases and other constants are zeroed first; CP-LRP takes attention and gates as constants. Times are medians
of interleaved rounds, of processor time where that computes: other work on the machine still shows in them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import apportion as ap
from apportion.core.protocols import Backward, RuleSet
from benchmarks.models import machine
from benchmarks.networks import NETWORKS, OWN, RELU_ONLY, RELUS, Network, Spelled, make, respell, without_constants

GOALS = {
    "spellings": 0.0,
    "DeepLIFT float64": 1e-9,
    "DeepLIFT float32": 1e-3,
    "LRP-ε": 1e-3,
    "CP-LRP": 1e-3,
    "FullGrad": 1e-9,
}
"""What each column of the first table should not exceed."""
TIMES = {"guided": 1.3, "deconvnet": 1.3, "LRP-ε": 2.5, "DeepLIFT": 4.0}
"""What each column of the second should not exceed, in plain forward and backward passes."""


def sent_back(net: Network, rules: RuleSet, reference: Tensor | None = None, **options: Any) -> Backward:
    """Explain the top class of each example under a rule set."""
    q = ap.Field(net.model, batch_size=len(net.x)).bind(net.x)
    return q.backward(net.x, torch.arange(len(net.x)), rules, reference, **options)


def each(t: Tensor) -> Tensor:
    """Sum over everything but examples."""
    return t.flatten(1).sum(1)


# -- what should hold -------------------------------------------------------------------------------


def spellings(name: str) -> float:
    """The largest relative difference of guided backpropagation's maps between spellings of the ReLU."""
    maps = []
    for act in RELUS.values():
        net = make(name, act=act) if name in OWN and name in RELU_ONLY else make(name)
        if name not in OWN:
            respell(net.model, lambda act=act: Spelled(act))
        maps.append(ap.GuidedBackprop()(ap.Field(net.model), net.x.clone()).values)
    plain = make(name)
    first = ap.GuidedBackprop()(ap.Field(plain.model), plain.x).values
    return float(max((m - first).abs().max() for m in maps) / first.abs().max())


def references(net: Network) -> dict[str, Tensor]:
    """Baselines of zeros, and of the other example: the second is far away in everything."""
    return {"zeros": torch.zeros_like(net.x), "the other example": net.x.flip(0)}


def deep_lift(name: str, dtype: torch.dtype) -> float:
    """|Σ contributions - Δf| / max(|Δf|, 1e-3 Σ |contributions|), the worst of the examples and baselines."""
    net = make(name, dtype)
    worst = 0.0
    for reference in references(net).values():
        done = sent_back(net, ap.rules.deep_lift_rescale(), reference)
        assert done.reference_value is not None
        given, rise = done.relevance, done.value - done.reference_value
        scale = torch.maximum(rise.abs(), 1e-3 * each(given.abs()))
        worst = max(worst, float(((each(given) - rise).abs() / scale).max()))
    return worst


def conservation(name: str, rules: RuleSet) -> float:
    """|ΣR / f - 1| without biases and other constants, the worst example."""
    net = make(name)
    without_constants(net.model)
    done = sent_back(net, rules)
    return float((each(done.relevance) / done.value - 1).abs().max())


def full_grad(name: str) -> float:
    """|∇f·x + Σ biases - f| / max(1, |f|), implicit biases of every operation included; the worst example."""
    net = make(name)
    a = ap.FullGrad()(ap.Field(net.model, batch_size=len(net.x)), net.x)
    assert a.gap is not None
    return float((a.gap.abs() / a.value.abs().clamp(min=1)).max())


def refused(name: str, rules: RuleSet, reference: bool = False) -> str:
    """Name the first operation that has no rule, or nothing."""
    net = make(name, rows=2)
    try:
        sent_back(net, rules, torch.zeros_like(net.x) if reference else None)
    except ap.ApportionError as error:
        return str(error).split("\n", 1)[0]
    return ""


def measured(measure: Callable[[], float]) -> float | str:
    """Give a number, or the refusal."""
    try:
        return measure()
    except ap.ApportionError as error:
        return str(error).split("\n", 1)[0]


def accuracy(name: str) -> dict[str, float | str]:
    """Measure one network: a number for each goal, or what was refused."""
    return {
        "spellings": measured(lambda: spellings(name)),
        "DeepLIFT float64": measured(lambda: deep_lift(name, torch.float64)),
        "DeepLIFT float32": measured(lambda: deep_lift(name, torch.float32)),
        "LRP-ε": measured(lambda: conservation(name, ap.rules.epsilon())),
        "CP-LRP": measured(lambda: conservation(name, ap.rules.cp_lrp())),
        "FullGrad": measured(lambda: full_grad(name)),
    }


RULE_SETS: dict[str, tuple[Callable[[], RuleSet], bool]] = {
    "guided": (ap.rules.guided_backprop, False),
    "deconvnet": (ap.rules.deconvnet, False),
    "LRP-ε": (ap.rules.epsilon, False),
    "AttnLRP": (ap.rules.attn_lrp, False),
    "CP-LRP": (ap.rules.cp_lrp, False),
    "DeepLIFT": (ap.rules.deep_lift_rescale, True),
}
"""Rule sets, and whether they compare with a reference."""


# -- what it costs ----------------------------------------------------------------------------------

SIZED: dict[str, tuple[str, dict[str, Any]]] = {
    "ResNet-18 at 128 x 128": (
        "resnet",
        {
            "shape": (3, 128, 128),
            "embedding_size": 64,
            "hidden_sizes": [64, 128, 256, 512],
            "depths": [2, 2, 2, 2],
            "layer_type": "basic",
        },
    ),
    "EfficientNet-Lite0 at 224 x 224": ("lite0", {"shape": (3, 224, 224)}),
    "ViT, 6 layers of 192, at 128 x 128": (
        "vit",
        {
            "shape": (3, 128, 128),
            "image_size": 128,
            "patch_size": 16,
            "hidden_size": 192,
            "num_hidden_layers": 6,
            "num_attention_heads": 3,
            "intermediate_size": 768,
        },
    ),
    "BERT, 4 layers of 256, 64 words": (
        "bert",
        {
            "shape": (64, 256),
            "hidden_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 1024,
        },
    ),
}
"""Networks of a size at which time goes into arithmetic."""


def interleaved(runs: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, float]:
    """Time each in turn, again and again: medians of seconds, of the CPU where that computes."""
    clock, wait = (time.perf_counter, torch.cuda.synchronize) if device == "cuda" else (time.process_time, lambda: None)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            wait()
            start = clock()
            run()
            wait()
            if turn:  # the first is for warming up
                times[name].append(clock() - start)
    return {name: median(t) for name, t in times.items()}


def bare(model: nn.Module, x: Tensor) -> Callable[[], object]:
    """The plain eager loop over the same frozen network."""

    def run() -> object:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(model(leaf)[:, 0].sum(), leaf)

    return run


def cost(name: str, rounds: int, rows: int = 4, device: str = "cpu") -> dict[str, float | str]:
    """Seconds of each method over those of the plain pass; milliseconds of that pass."""
    kind, options = SIZED[name]
    made = make(kind, torch.float32, rows=rows, **options)
    net = Network(name, made.model.to(device), made.x.to(device))
    runs: dict[str, Callable[[], object]] = {"plain": bare(net.model, net.x)}
    field = ap.Field(net.model, batch_size=len(net.x))
    owner, ids = torch.arange(len(net.x), device=device), range(len(net.x))
    out: dict[str, float | str] = {}

    def passing(rules: RuleSet, reference: Tensor | None) -> Callable[[], object]:
        return lambda: field.bind(net.x, target=0, ids=ids).backward(net.x, owner, rules, reference)

    for method, (rules, compares) in RULE_SETS.items():
        run = passing(rules(), torch.zeros_like(net.x) if compares else None)
        try:
            run()
        except ap.ApportionError as error:
            out[method] = str(error).split("\n", 1)[0]
            continue
        runs[method] = run
    runs["gradient"] = lambda: field.bind(net.x, target=0, ids=ids).value_and_grad(net.x, owner)
    seconds = interleaved(runs, rounds, device)
    plain = seconds.pop("plain")
    return {"plain, ms": 1000 * plain, **{m: t / plain for m, t in seconds.items()}, **out}


# -- the record -------------------------------------------------------------------------------------


def cell(value: float | str | None, goal: float | None, notes: list[str]) -> str:
    """Write a number, bold where it misses its goal; a refusal as a note."""
    if value is None:
        return ""
    if isinstance(value, str):
        if value not in notes:
            notes.append(value)
        return f"refused [{notes.index(value) + 1}]"
    text = f"{value:.2f}" if value >= 0.01 and goal is not None and goal >= 1 else f"{value:.1e}" if value else "0"
    return f"**{text}**" if goal is not None and not value <= goal else text


def table(rows: dict[str, dict[str, Any]], goals: dict[str, float], notes: list[str], bound: str) -> list[str]:
    """Lay rows out in Markdown."""
    names = list(dict.fromkeys(k for row in rows.values() for k in row))
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    lines.append(f"| *{bound}* | " + " | ".join(f"*{goals[n]:g}*" if n in goals else "" for n in names) + " |")
    for row, values in rows.items():
        cells = [cell(values.get(n), goals.get(n, 1.0 if n in RULE_SETS else None), notes) for n in names]
        cells = [c.strip("*") if n not in goals else c for n, c in zip(names, cells, strict=True)]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return lines


def report(record: dict[str, Any]) -> str:
    """Write the record as a page."""
    notes: list[str] = []
    lines = ["# Backward rules on networks of every make", "", __doc__ or "", "", "## What holds", ""]
    lines += ["Relative errors; bold where a goal is missed.", ""]
    lines += table(record["accuracy"], GOALS, notes, "goal")
    lines += ["", "## Operations without a rule", ""]
    lines += ["Empty where every operation has one.", ""]
    names = list(RULE_SETS)
    lines += ["| | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for row, found in record["refused"].items():
        lines.append(f"| {row} | " + " | ".join(cell(found[n] or None, None, notes) for n in names) + " |")
    for device, rows in record["cost"].items():
        lines += ["", f"## Time over a plain forward and backward pass, {device}", ""]
        lines += table(rows, TIMES, notes, "goal")
    lines += ["", "## Refusals", "", *(f"{i}. {n}" for i, n in enumerate(notes, 1)), "", "## Machine", ""]
    lines += [f"- {k}: {v}" for k, v in record["machine"].items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure everything and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=list(NETWORKS), help="names of networks")
    parser.add_argument("--rounds", type=int, default=9, help="of timing; 0 for none")
    parser.add_argument("--device", default="cpu", help="where times are taken")
    parser.add_argument("--short", action="store_true", help="print the page and write nothing")
    given = parser.parse_args()
    record: dict[str, Any] = {"accuracy": {}, "refused": {}, "cost": {}}
    for name in given.only:
        record["accuracy"][name] = accuracy(name)
        record["refused"][name] = {m: refused(name, rules(), ref) for m, (rules, ref) in RULE_SETS.items()}
    if given.rounds:
        where = torch.cuda.get_device_name() if given.device == "cuda" else "CPU"
        record["cost"][where] = {n: cost(n, given.rounds, device=given.device) for n in SIZED}
    record["machine"] = machine()
    page = report(record)
    print(page)
    if not given.short:
        out = Path(__file__).parent / "results"
        (out / "rules.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        (out / "rules.md").write_text(page)


if __name__ == "__main__":
    main()
