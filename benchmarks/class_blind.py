"""How much a map says of the class: backward rules on random ReLU networks, shallow ones on a picture and deep ones.

`python -m benchmarks.class_blind` writes results/class_blind.json and .png; docs/class-blind.md has the text.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

import apportion as ap

METHODS: dict[str, Callable[[], ap.Explainer]] = {
    "gradient": ap.Gradient,
    "DeepLIFT": ap.DeepLIFT,
    "LRP-ε": ap.LRP,
    "LRP-α2β1": lambda: ap.LRP(ap.rules.alpha_beta(2.0, 1.0), from_one=True),
    "guided": ap.GuidedBackprop,
    "deconvnet": ap.Deconvnet,
    "LRP-z⁺ (α1β0)": lambda: ap.LRP(ap.rules.alpha_beta(1.0, 0.0), from_one=True),
}
"""What is compared. The last three send back positive parts alone, and α2β1 mostly."""

DEPTHS = (1, 2, 4, 8, 16)
"""Hidden layers of the deep networks."""
WIDTHS = (50, 100, 200, 400)
"""Units in each of their layers."""
CLASSES, SEEDS = 5, 4


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's, of two maps."""
    a, b = (t.flatten() - t.mean() for t in (a, b))
    return float(a @ b / (a.norm() * b.norm()).clamp(min=1e-300))


def cosine(a: Tensor, b: Tensor) -> float:
    """Of the angle between two maps."""
    return float(a.flatten() @ b.flatten() / (a.norm() * b.norm()).clamp(min=1e-300))


def between(maps: Iterable[Tensor], alike: Callable[[Tensor, Tensor], float]) -> float:
    """Mean over all pairs of maps of how alike they are, signs aside."""
    return float(np.mean([abs(alike(a, b)) for a, b in combinations(list(maps), 2)]))


# -- one layer, a picture ---------------------------------------------------------------------------


@cache
def camera(side: int = 40) -> Tensor:
    """The head of skimage's photographer, standardized: [1, 1, side, side]."""
    from skimage import data, transform

    image = torch.from_numpy(transform.resize(data.camera()[40:300, 120:380] / 255, (side, side), anti_aliasing=True))
    return ((image - image.mean()) / image.std())[None, None].double()


def shallow(seed: int, filters: int = 128, pool: bool = True) -> nn.Module:
    """One convolution, ReLU, max-pooling or none, classes: all weights random, no biases."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        side = 17 if pool else 34
        layers = [nn.Conv2d(1, filters, 7, bias=False), nn.ReLU(), *([nn.MaxPool2d(2)] if pool else [])]
        net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(filters * side**2, CLASSES, bias=False))
        for p in net.parameters():
            nn.init.normal_(p, std=p[0].numel() ** -0.5)
    return net.double().eval().requires_grad_(False)


def maps_of(method: str, net: nn.Module, x: Tensor) -> list[Tensor]:
    """The map of each class."""
    field = ap.Field(net)
    return [METHODS[method]()(field, x, target=c).values[0] for c in range(CLASSES)]


def recovery(method: str, pool: bool = True) -> dict[str, float]:
    """Correlation of maps with the picture, signs aside, and between classes."""
    x, seen, apart = camera(), [], []
    for seed in range(SEEDS):
        maps = maps_of(method, shallow(seed, pool=pool), x)
        seen += [abs(correlation(m, x[0])) for m in maps]
        apart.append(between(maps, correlation))
    return {"with the picture": float(np.mean(seen)), "between classes": float(np.mean(apart))}


# -- many layers ------------------------------------------------------------------------------------


def deep(depth: int, seed: int, width: int = 100) -> tuple[nn.Module, Tensor]:
    """Dense layers of random weights and small biases with ReLUs, and a positive input."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers += [nn.Linear(width, width), nn.ReLU()]
        net = nn.Sequential(*layers, nn.Linear(width, CLASSES)).double()
        for p in net.parameters():
            nn.init.normal_(p, std=(2 / width) ** 0.5 if p.ndim > 1 else 0.1)
        x = torch.rand(1, width, dtype=torch.float64)
    return net.eval().requires_grad_(False), x


def convergence(method: str, depth: int, width: int = 100) -> dict[str, float]:
    """Cosine and correlation between the maps of classes, signs aside.

    Two random vectors without negative entries have a large cosine; their correlation is 0.
    """
    found: dict[str, list[float]] = {"cosine": [], "correlation": []}
    for seed in range(SEEDS):
        maps = maps_of(method, *deep(depth, seed, width))
        found["cosine"].append(between(maps, cosine))
        found["correlation"].append(between(maps, correlation))
    return {name: float(np.mean(v)) for name, v in found.items()}


# -- the record -------------------------------------------------------------------------------------


def measured() -> dict[str, dict]:
    """Everything, rounded to three digits."""
    record = {
        "a picture, max-pooling": {m: recovery(m) for m in METHODS},
        "a picture, no pooling": {m: recovery(m, pool=False) for m in METHODS},
        "depth": {m: {str(d): convergence(m, d) for d in DEPTHS} for m in METHODS},
        "width, 16 layers": {m: {str(w): convergence(m, 16, w) for w in WIDTHS} for m in ("gradient", "guided")},
    }
    return json.loads(json.dumps(record), parse_float=lambda t: round(float(t), 3))


def draw(record: dict[str, dict], path: Path) -> None:
    """Maps of two classes beside the picture, and cosines against depth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = ("gradient", "guided", "deconvnet")
    figure = plt.figure(figsize=(12, 4.2), layout="constrained")
    left, right = cast(Any, figure.subfigures(1, 2, width_ratios=(1.25, 1.2)))
    axes = left.subplots(2, 4)
    net = shallow(0)
    for row, axis in enumerate(axes[:, 0]):
        axis.imshow(camera()[0, 0], cmap="gray")
        axis.set_ylabel(f"class {row}")
    axes[0, 0].set_title("the picture", fontsize=10)
    for column, method in enumerate(shown, 1):
        for row, values in enumerate(maps_of(method, net, camera())[:2]):
            high = float(values.abs().quantile(0.995))
            axes[row, column].imshow(values[0], cmap="gray", vmin=-high, vmax=high)
        axes[0, column].set_title(method, fontsize=10)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    left.suptitle("one random layer, max-pooling, two classes", fontsize=11)
    axis = right.subplots()
    for method, by_depth in record["depth"].items():
        both = method in ("gradient", "DeepLIFT", "LRP-ε")
        axis.plot(DEPTHS, [v["cosine"] for v in by_depth.values()], "o--" if both else "o-", label=method, ms=3)
    axis.set_xscale("log", base=2)
    axis.set(xticks=DEPTHS, xticklabels=DEPTHS, xlabel="hidden layers", ylim=(0, 1.03))
    axis.set_ylabel("|cosine| between maps of two classes")
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.grid(alpha=0.3)
    right.suptitle("random dense networks, 100 units a layer", fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Measure and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="print, and write nothing")
    given = parser.parse_args()
    record = measured()
    text = json.dumps(record, indent=2, ensure_ascii=False)
    print(text)
    if not given.short:
        out = Path(__file__).parent / "results"
        (out / "class_blind.json").write_text(text + "\n")
        draw(record, out / "class_blind.png")


if __name__ == "__main__":
    main()
