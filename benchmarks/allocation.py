"""Who is given what: the weights with which fourteen methods hand out the effects of small functions.

`python -m benchmarks.allocation` writes results/allocation.json and results/allocation.md. Three features at (2, 3, 5),
absent at 0, in float64. Each effect of a function is explained by itself; what a feature gets there, over the effect,
is its weight. Polynomials are written as products; for LRP, which knows no products, as sums of powers of weighted
sums; for deep Taylor decomposition, which knows ReLUs only, there is a ReLU network, at (2, .75, .75).

The survey (Deng et al. 2025, section IV-D, Table VI) says of each of the fourteen whether it meets all three principles
of allocation or violates one at least, and not which; its source has not been read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import factorial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import apportion as ap
from apportion.core.attribution import Groups
from apportion.core.errors import ApportionError
from apportion.core.question import Question
from apportion.metrics import AllocationCompleteness, AllocationCorrectness, EffectCompleteness
from apportion.metrics.axioms.effects import Effects

RESULTS = Path(__file__).parent / "results"
HELD = 1e-6
"""Below which a number is rounding."""

X, ZERO = torch.tensor([[2.0, 3.0, 5.0]]).double(), torch.zeros(1, 3).double()
ROWS = torch.tensor([[1.0, 1.0, 1.0], [-1.0, -1.0, -1.0]]).double()
"""What prediction difference draws from: data with mean 0."""

POLYNOMIALS: dict[str, dict[tuple[int, ...], float]] = {
    "x1": {(1, 0, 0): 1.0},
    "x1²": {(2, 0, 0): 1.0},
    "x1 x2": {(1, 1, 0): 1.0},
    "x1² x2": {(2, 1, 0): 1.0},
    "x1 x2 x3": {(1, 1, 1): 1.0},
    "x1 + x2 x3": {(1, 0, 0): 1.0, (0, 1, 1): 1.0},
    "x1 - x2 x3": {(1, 0, 0): 1.0, (0, 1, 1): -1.0},
}


class Powers(nn.Module):
    """A polynomial as Σ_d W_d (V_d x)^d: products by polarization, without products of signals.

    Π_k y_k = 1 / (2^(d-1) d!) Σ_ε Π ε_k (y_1 + Σ_k ε_k y_k)^d over signs ε of all but the first.
    """

    def __init__(self, terms: dict[tuple[int, ...], float]) -> None:
        super().__init__()
        inner: dict[int, list[list[float]]] = {}
        outer: dict[int, list[float]] = {}
        for exponents, c in terms.items():
            factors = [i for i, e in enumerate(exponents) for _ in range(e)]
            d = len(factors)
            for signs in product((1, -1), repeat=d - 1):
                row, sign = [0.0] * len(exponents), 1
                for i, s in zip(factors, (1, *signs), strict=True):
                    row[i] += s
                    sign *= s
                inner.setdefault(d, []).append(row)
                outer.setdefault(d, []).append(c * sign / (2 ** (d - 1) * factorial(d)))
        self.degrees = sorted(inner)
        self.first = nn.ModuleList(_linear(inner[d]) for d in self.degrees)
        self.last = nn.ModuleList(_linear([outer[d]]) for d in self.degrees)

    def forward(self, x: Tensor) -> Tensor:
        parts = [
            last(first(x) ** d if d > 1 else first(x))
            for d, first, last in zip(self.degrees, self.first, self.last, strict=True)
        ]
        return torch.stack(parts).sum(0)[:, 0]


def _linear(weight: list[list[float]], bias: list[float] | None = None) -> nn.Linear:
    w = torch.tensor(weight).double()
    layer = nn.Linear(w.shape[1], w.shape[0], bias=bias is not None).double()
    layer.weight.data.copy_(w)
    if bias is not None:
        layer.bias.data.copy_(torch.tensor(bias).double())
    return layer.requires_grad_(False)


def relu_net(units: list[tuple[list[float], float, float]]) -> nn.Module:
    """Σ c relu(w·x + b)."""
    w, b, c = zip(*units, strict=True)
    return nn.Sequential(_linear(list(w), list(b)), nn.ReLU(), _linear([list(c)]), nn.Flatten(0)).eval()


UNITS: list[tuple[list[float], float, float]] = [
    ([1.0, 0.0, 0.0], 0.0, 1.0),
    ([0.0, 1.0, 1.0], -1.0, 1.0),
    ([0.0, 0.0, 1.0], 0.0, -1.0),
]
RELU, AT = "relu(x1) + relu(x2 + x3 - 1) - relu(x3)", torch.tensor([[2.0, 0.75, 0.75]]).double()
"""At AT: x1 by itself makes 2, x2 and x3 together make ½ that neither makes alone, x3 by itself makes -¾."""


class Gate(nn.Module):
    """relu(x1 - 1) relu(x2)."""

    def forward(self, x: Tensor) -> Tensor:
        return (x[:, 0] - 1).relu() * x[:, 1].relu()


GATE = "relu(x1 - 1) relu(x2)"
"""At (2, 3, 5) both together make 3, neither alone makes anything."""


@dataclass(frozen=True, eq=False)
class Written(Effects):
    """Effects written down by hand."""

    parts: Any = ()

    def split(self, q: Question, groups: Groups) -> Iterator[tuple[nn.Module, Tensor]]:
        yield from self.parts


def pictured(net: nn.Module) -> nn.Module:
    """Let the network read a picture of one row behind a convolution that changes nothing."""
    same = nn.Conv2d(1, 1, 1, bias=False).double().requires_grad_(False)
    same.weight.data.fill_(1.0)
    return nn.Sequential(same, nn.Flatten(), net).eval()


def plain(net: nn.Module) -> nn.Module:
    """Leave it as it is."""
    return net


AT_ZERO = ap.baselines.Given(ZERO)
DRAWS = 4096
"""Of expected gradients, which are exact in expectation only."""
STEPS = ap.IntegratedGradients(quadrature=ap.quadrature.Midpoint(4096))
"""Many, since the ReLU network has a kink on the way."""
PATCH = ap.groups.Labels(torch.tensor([0, 1, 1]))
METHODS: dict[str, tuple[Any, type[nn.Module], bool]] = {
    "gradient × input": (ap.GradientTimesInput(), ap.planted.Polynomial, False),
    "Grad-CAM": (ap.GradCAM(), ap.planted.Polynomial, False),
    "LRP-ε": (ap.LRP(), Powers, False),
    "LRP-αβ (2, 1)": (ap.LRP(ap.rules.alpha_beta()), Powers, False),
    "deep Taylor": (ap.DeepTaylor(), Powers, False),
    "occlusion, one by one": (ap.Occlusion(), ap.planted.Polynomial, False),
    "occlusion, x2 with x3": (ap.Occlusion(PATCH), ap.planted.Polynomial, False),
    "prediction difference": (ap.Occlusion(fill=ap.fills.Marginal(ROWS)), ap.planted.Polynomial, False),
    "integrated gradients": (
        ap.IntegratedGradients(quadrature=ap.quadrature.Midpoint(DRAWS)),
        ap.planted.Polynomial,
        True,
    ),
    "expected gradients": (ap.ExpectedGradients(AT_ZERO, draws=DRAWS), ap.planted.Polynomial, True),
    "DeepLIFT Rescale": (ap.DeepLIFT(), ap.planted.Polynomial, True),
    "DeepLIFT RevealCancel": (ap.DeepLIFT(rules=ap.rules.deep_lift_reveal_cancel()), ap.planted.Polynomial, True),
    "Shapley values": (ap.Shapley(), ap.planted.Polynomial, True),
    "DeepSHAP": (ap.DeepSHAP(AT_ZERO), ap.planted.Polynomial, True),
}
"""The method, how polynomials are written for it, and whether Table VI has it meet all three principles."""


SAMPLED = 6 / DRAWS**0.5
"""What counts as no violation for expected gradients."""


def judged(method: Any, net: nn.Module, x: Tensor, parts: list[tuple[nn.Module, Tensor]], wrap: Any) -> dict[str, Any]:
    """Judge by the three, and give the weights."""
    groups, effects = ap.groups.Elements(), Written(tuple((wrap(m), inside) for m, inside in parts))
    x = x.reshape(1, 1, 1, 3) if wrap is pictured else x
    field = ap.Field(wrap(net))
    q = field.bind(x, ids=[0])
    subject = ap.metrics.Subject(method)
    try:
        correct = AllocationCorrectness(effects, groups).judge(q, subject)
        complete = AllocationCompleteness(effects, groups).judge(q, subject)
        total = EffectCompleteness(groups=groups).judge(q, subject)
    except ApportionError as error:
        return {"refused": str(error).split("\n")[0]}
    values = subject.map(q)
    return {
        "map": _round(values.flatten().tolist()),
        "effects": _round(correct.parts["effects"][0].tolist()),
        "weights": [_round(w) for w in correct.parts["weights"][0].tolist()],
        "effect completeness": _round([float(total.values)])[0],
        "allocation correctness": _round([float(correct.values)])[0],
        "allocation completeness": _round([float(complete.values)])[0],
    }


def _round(values: list[float]) -> list[float]:
    return [0.0 if abs(v) < HELD else round(v, 4) for v in values]


def measured() -> dict[str, dict[str, Any]]:
    """Judge every method on every function."""
    record: dict[str, dict[str, Any]] = {}
    for name, (method, written, _) in METHODS.items():
        wrap = pictured if isinstance(method, ap.GradCAM) else plain
        found = record[name] = {}
        for label, terms in POLYNOMIALS.items():
            parts = [(written({k: c}), torch.tensor(k) > 0) for k, c in terms.items()]
            found[label] = judged(method, written(terms).eval(), X, parts, wrap)
        found[GATE] = judged(method, Gate(), X, [(Gate(), torch.tensor([True, True, False]))], wrap)
        parts = [(relu_net([u]), torch.tensor(u[0]) > 0) for u in UNITS]
        found[RELU] = judged(method, relu_net(UNITS), AT, parts, wrap)
    return record


PRINCIPLES = ("effect completeness", "allocation correctness", "allocation completeness")


def worst(found: dict[str, Any], principle: str) -> float | None:
    """Give the largest violation over the functions that the method explains."""
    return max((f[principle] for f in found.values() if principle in f), default=None)


def table(record: dict[str, dict[str, Any]]) -> str:
    """Write what was found."""
    lines = [
        "# Weights of fourteen methods",
        "",
        "Made by `python -m benchmarks.allocation`. The largest violation over the functions below, as a share",
        "of the sum of magnitudes of effects, to four digits; for expected gradients, of 4096 draws, 0.09 counts as",
        "none. The last columns: the claim of Table VI, and what is found.",
        "",
        "| method | " + " | ".join(PRINCIPLES) + " | survey: meets all | here |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in record.items():
        gaps = [worst(found, p) for p in PRINCIPLES]
        met = all(g is not None and g <= (SAMPLED if name == "expected gradients" else 0) for g in gaps)
        claim = METHODS[name][2]
        said = "as the survey" if met == claim else "**not as the survey**"
        lines.append(f"| {name} | " + " | ".join(f"{g:g}" for g in gaps) + f" | {'yes' if claim else 'no'} | {said} |")
    for label in (*POLYNOMIALS, GATE, RELU):
        example = next(f[label] for f in record.values() if "effects" in f[label])
        at = "(2, 0.75, 0.75)" if label == RELU else "(2, 3, 5)"
        lines += ["", f"## {label} at {at}", "", f"Effects: {', '.join(f'{e:g}' for e in example['effects'])}.", ""]
        lines += ["| method | map | weights of x1, x2, x3 in each effect | the three |", "|---|---|---|---|"]
        for name, found in record.items():
            f = found[label]
            if "refused" in f:
                lines.append(f"| {name} | refused: {f['refused']} | | |")
                continue
            weights = "; ".join(", ".join(f"{w:g}" for w in row) for row in f["weights"])
            three = ", ".join(f"{f[p]:g}" for p in PRINCIPLES)
            lines.append(f"| {name} | {', '.join(f'{v:g}' for v in f['map'])} | {weights} | {three} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write."""
    record = measured()
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "allocation.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (RESULTS / "allocation.md").write_text(table(record), encoding="utf-8")
    print(table(record))


if __name__ == "__main__":
    main()
