"""Judge methods on a network whose right answer is known, by what finds it and by what asks the network.

    python examples/evaluate.py

The network is that of `own_model.py`: it tells stripes that lie from stripes that stand, and the patch with the stripes
is all that it can use. So metrics that compare with the patch (localization) stand beside metrics that ask the network
(faithfulness) and metrics that look at the map alone (complexity). An edge detector knows nothing of the network and
finds the patch better than any method: who looks at localization only will take it for the best explanation.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from own_model import draw, trained

import apportion as ap

COUNT = 16


def main() -> None:
    """Evaluate, stop, go on, and read what comes out."""
    model = trained()
    pictures, labels, inside = draw(COUNT)
    regions = [ap.metrics.Region(mask[0].bool()) for mask in inside]
    asked = {
        "methods": {
            "gradient": ap.Gradient(),
            "integrated gradients": ap.IntegratedGradients(quadrature=ap.quadrature.Gauss(16)),
            "guided backprop": ap.GuidedBackprop(),
            "Grad-CAM": ap.Resized(ap.GradCAM()),
        },
        "field": ap.Field(model, bounds=(0, 1)),
        "metrics": ["insertion_deletion", "energy_pointing_game", "sparseness"],
        "controls": [ap.controls.Random(), ap.controls.Edges()],
        "truth": {"energy_pointing_game": regions},
        "ids": range(COUNT),
        "batch": 8,
    }
    with tempfile.TemporaryDirectory() as folder:
        found = ap.evaluate(data=pictures, target=labels, out=folder, **asked)
        again = ap.evaluate(data=pictures, target=labels, out=folder, quiet=True, **asked)  # nothing is left to do
        assert again.to_json() == found.to_json()
        print(f"{len(list(Path(folder).glob('*.safetensors')))} finished pairs of a batch and a method\n")
    print(found, "\n")
    for note in found.notes():
        print("note:", note)
    print("\n", found.ranks("insertion_deletion"), sep="")
    print("\n", found.compare(), sep="")


if __name__ == "__main__":
    main()
