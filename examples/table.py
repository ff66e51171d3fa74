"""Which measurements made a network call a tumor malignant? LIME on a table, and how far to trust it.

Run it with `python examples/table.py`; it needs scikit-learn, which brings the data. The network is trained in seconds
on the breast cancer data of Wisconsin: 30 measurements of cell nuclei, 569 patients.
"""

from __future__ import annotations

from typing import Any

import torch
from sklearn.datasets import load_breast_cancer
from torch import nn

import apportion as ap


def trained() -> tuple[nn.Module, torch.Tensor, torch.Tensor, list[str]]:
    """Train a small network on three quarters of the patients, and give it with the other quarter."""
    loaded: Any = load_breast_cancer()
    x = torch.as_tensor(loaded.data, dtype=torch.float32)
    y = torch.as_tensor(loaded.target)
    torch.manual_seed(0)
    order = torch.randperm(len(x))
    learn, test = order[:427], order[427:]
    mean, deviation = x[learn].mean(0), x[learn].std(0)

    class Standardized(nn.Module):
        """Takes the measurements as they are: what is explained is what was measured."""

        mean: torch.Tensor
        deviation: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", mean)
            self.register_buffer("deviation", deviation)
            self.layers = nn.Sequential(nn.Linear(30, 24), nn.ReLU(), nn.Linear(24, 2))

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return self.layers((rows - self.mean) / self.deviation)

    net = Standardized()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01, weight_decay=1e-3)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[learn]), y[learn]).backward()
        optimizer.step()
    right = (net(x[test]).argmax(1) == y[test]).float().mean()
    print(f"{float(right):.0%} of {len(test)} patients are classified rightly")
    return net.eval(), x[learn], x[test], [str(name) for name in loaded.feature_names]


def main() -> None:
    """Explain one patient by LIME's settings for tables, some that describe the score and some that do not.

    A warning of a low held-out R² says that the coefficients are those of a poor model: on samples it has not seen, the
    linear model explains less than half of how the score varies, so they are no account of it, however small their
    errors are. Two things help here: all 30 columns instead of six, since each of the others has its part in the
    score, and the columns themselves instead of whether they lie in the patient's quartile.
    """
    net, data, test, names = trained()
    field = ap.Field(net, score=ap.LogOdds())
    malignant = net(test).softmax(1)[:, 0]
    patient = test[malignant.sub(0.9).abs().argmin()][None]  # one that the network is fairly sure of
    asked = {
        "LIME around the patient, all columns": ap.LIME.for_tables(data, continuous=True, around_x=True, most=30),
        "the same around the data's mean, as its authors do": ap.LIME.for_tables(data, continuous=True, most=30),
        "around the patient, six columns": ap.LIME.for_tables(data, continuous=True, around_x=True, most=6),
        "by quartiles, all columns": ap.LIME.for_tables(data, most=30),
        "S-LIME, by quartiles": ap.SLIME.for_tables(data),
    }
    for title, method in asked.items():
        a = method(field, patient, target=0, ids=["patient"])
        low, high = a.parts["held_out_r2_interval"][0].tolist()
        print(f"\n{title}: held-out R² {low:.2f} to {high:.2f}, same features in {float(a.parts['vsi']):.0%}")
        for i in a.values[0].abs().argsort(descending=True)[:4].tolist():
            error = float(a.parts["standard_error"][0, i])
            print(f"  {names[i]:<24} {float(a.values[0, i]):+.2f} ± {1.96 * error:.2f}")
        told = [f"warning: {w}" for w in a.warnings] or ["no warning: the linear model describes the score"]
        print("\n".join(f"  {line}" for line in told))


if __name__ == "__main__":
    main()
