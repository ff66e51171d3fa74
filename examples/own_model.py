"""Explain a network of your own, in a file of your own.

    python examples/own_model.py                                              through the Python interface
    apportion explain coffee --model examples/own_model.py:trained --size 32  through the command line

The network is an ordinary torch module and knows nothing of apportion. It learns here, in a second, to tell
stripes that lie from stripes that stand; so what it should look at is known.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import apportion as ap

SIDE = 32


class Stripes(nn.Module):
    """A small classifier: 0 for lying stripes, 1 for standing ones."""

    def __init__(self) -> None:
        super().__init__()
        self.look = nn.Sequential(nn.Conv2d(3, 8, 5, padding=2), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.decide = nn.Linear(8, 2)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.decide(self.look(pictures).mean((2, 3)))


def draw(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Make grey pictures with a patch of stripes, which way they lie, and where the patch is (1 inside)."""
    random = torch.Generator().manual_seed(0)
    pictures = torch.full((count, 3, SIDE, SIDE), 0.5)
    labels = torch.randint(0, 2, (count,), generator=random)
    inside = torch.zeros(count, 1, SIDE, SIDE)
    wave = (torch.arange(12) // 2 % 2).float().expand(3, 12, 12)
    for i, label in enumerate(labels):
        top, left = torch.randint(0, SIDE - 12, (2,), generator=random).tolist()
        pictures[i, :, top : top + 12, left : left + 12] = wave if label else wave.mT
        inside[i, :, top : top + 12, left : left + 12] = 1
    return pictures, labels, inside


def trained() -> nn.Module:
    """Train the classifier: the function that `--model examples/own_model.py:trained` names."""
    torch.manual_seed(0)
    model = Stripes()
    pictures, labels, _ = draw(256)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(pictures), labels).backward()
        optimizer.step()
    return model.eval()


def main() -> None:
    """Say how much of each map lies on the stripes: from black, the grey around them counts too."""
    model = trained()
    pictures, labels, inside = draw(4)
    field = ap.Field(model, bounds=(0, 1))
    right = int((model(pictures).argmax(1) == labels).sum())
    print(f"{right} of {len(labels)} pictures are classified rightly")
    methods = {
        "gradient": ap.Gradient(),
        "gradient times input": ap.GradientTimesInput(),
        "integrated gradients from black": ap.IntegratedGradients(ap.baselines.Zero()),
        "integrated gradients from the grey around the stripes": ap.IntegratedGradients(ap.baselines.Constant(0.5)),
    }
    for name, method in methods.items():
        a = method(field, pictures)
        size = a.channel_sum().abs().values
        share = (size * inside).sum() / size.sum()
        print(f"{name}: {share:.0%} of the map on the stripes ({inside.mean():.0%} of the picture)")
        print(f"  gap {a.gap_note}")


if __name__ == "__main__":
    main()
