"""Maps of inner layers of EfficientNet-Lite0 on a picture: which agree, and what the layer decides.

`python -m benchmarks.cam` writes docs/cam.png and prints how far apart the maps of the first row are.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from PIL import Image
from torch import Tensor

import apportion as ap
from apportion.adapters import bundled, zoo
from apportion.show import maps

OUT = Path(__file__).parent.parent / "docs" / "cam.png"
ALIKE = {
    "CAM": ap.CAM(),
    "Grad-CAM": ap.GradCAM(relu=False),
    "HiResCAM": ap.HiResCAM(relu=False),
    "XGrad-CAM": ap.XGradCAM(relu=False),
}
"""Equal but for a factor where the head is a mean and one linear layer; without ReLU, to see both signs."""


def layers(field: ap.Field, x: Tensor) -> dict[int, ap.Site]:
    """Name the last module of each resolution."""
    found: dict[int, ap.Site] = {}
    for s in field.sites(x):
        if len(s.shape) == 4 and s.shape[2] == s.shape[3] > 1:
            found[s.shape[2]] = s.site
    return found


def main() -> None:
    """Explain, compare, draw."""
    model = zoo.efficientnet_lite(0)
    x = model.see(bundled.picture("chelsea"))
    field = model.field()
    with torch.no_grad():
        first, second = model.model(model.normalize(x))[0].topk(2).indices.tolist()
    found = {name: method(field, x, target=first) for name, method in ALIKE.items()}
    flat = torch.stack([a.values.flatten() for a in found.values()])
    flat = flat / flat.norm(dim=1, keepdim=True)
    print("cosines with CAM:", *(f"{name} {c:.7f}" for name, c in zip(found, (flat @ flat[0]).tolist(), strict=True)))
    at = layers(field, x)
    for side in (14, 28, 56):
        found[f"LayerCAM, {side} × {side}"] = ap.LayerCAM(at[side])(field, x, target=first)
    eigen, other = (ap.EigenCAM()(field, x, target=c) for c in (first, second))
    found["Eigen-CAM, any class"] = eigen
    print("Eigen-CAM of two classes equal:", torch.equal(eigen.values, other.values))
    gap = ap.GradCAM(relu=False)(field, x, target=second)
    c = torch.nn.functional.cosine_similarity(found["Grad-CAM"].values.flatten(), gap.values.flatten(), dim=0)
    print(f"{model.label(first)}, {model.label(second)}: cosine of their Grad-CAM maps {float(c):.3f}")
    figure, axes = plt.subplots(2, 4, figsize=(8, 4.3), dpi=80, layout="constrained")
    for ax, (name, a) in zip(axes.flat, found.items(), strict=True):
        painted = maps.paint(maps.picture_map(a, size=(224, 224)))
        ax.imshow(maps.overlay(painted, x[0], 0.75))
        ax.set_title(name, fontsize=9)
        ax.set_axis_off()
    figure.savefig(OUT)
    Image.open(OUT).convert("RGB").quantize(224).save(OUT, optimize=True)
    print(f"{OUT.name}: {OUT.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
