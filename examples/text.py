"""Which words made a network call a review friendly? LIME on text, with words as players.

Run it with `python examples/text.py`; the sentences are made up here, and the network learns them in seconds.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import nn

import apportion as ap

GOOD = "warm friendly fresh lovely generous quick".split()
BAD = "cold rude stale dull slow noisy".split()
PLAIN = "the soup was and service seemed a little on monday evening".split()
WORDS = ["<pad>", "<mask>", "not", *GOOD, *BAD, *PLAIN]
NUMBER = {word: i for i, word in enumerate(WORDS)}


class Reviews(nn.Module):
    """Embeds words, looks at each with its neighbors, and takes the strongest sign of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(WORDS), 16, padding_idx=0)
        self.pairs = nn.Conv1d(16, 32, 3, padding=1)
        self.out = nn.Linear(32, 2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        seen = self.pairs(self.embedding(tokens).transpose(1, 2)).relu()
        return self.out(seen.amax(2))


def sentence(draw: random.Random) -> tuple[list[str], int]:
    """Make up a review: one judgment among plain words, turned around by "not" before it."""
    good, turned = draw.random() < 0.5, draw.random() < 0.4
    judged = [draw.choice(GOOD if good else BAD)]
    words = [draw.choice(PLAIN) for _ in range(6)]
    at = draw.randrange(7)
    words[at:at] = ["not", *judged] if turned else judged
    return words, int(good != turned)


def encoded(sentences: Sequence[Sequence[str]]) -> torch.Tensor:
    """Number words, padded to 8."""
    return torch.tensor([[NUMBER[w] for w in s] + [0] * (8 - len(s)) for s in sentences])


def trained() -> Reviews:
    """Train on 2,000 reviews."""
    torch.manual_seed(0)
    draw = random.Random(0)
    made = [sentence(draw) for _ in range(2000)]
    x, y = encoded([words for words, _ in made]), torch.tensor([label for _, label in made])
    net = Reviews()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(150):  # words are masked now and then, so that the mask comes to mean nothing
        hidden = torch.where((torch.rand(x.shape) < 0.1) & (x > 0), NUMBER["<mask>"], x)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(hidden), y).backward()
        optimizer.step()
    right = (net(x).argmax(1) == y).float().mean()
    print(f"{float(right):.0%} of the reviews are classified rightly")
    return net.eval()


def main() -> None:
    """Explain one review; the model takes numbers, so what is explained is its embedding."""
    net = trained()
    words = "the service was not rude and a little warm".split()[:8]
    x = encoded([words])
    field = ap.Field(net, score=ap.LogOdds(), site=ap.At("embedding"))
    fill = ap.fills.MaskToken.of(net.embedding, NUMBER["<mask>"])
    players = ap.groups.RealTokens(x > 0)
    for title, method in {
        "LIME": ap.LIME.for_text(fill, players, samples=1000),
        "exact, by all subsets": ap.LIME(
            groups=players, fill=fill, sampler=ap.samplers.AllSubsets(), regression=ap.surrogates.Ridge(0.0)
        ),
    }.items():
        a = method(field, x, target=1, ids=["review"])
        fit = f"R² {float(a.parts['r2']):.2f} of all coalitions"
        if "held_out_r2" in a.parts and not bool(a.parts["held_out_r2"].isnan()):
            low, high = a.parts["held_out_r2_interval"][0].tolist()
            new = int(a.parts["held_out"])
            fit = f"held-out R² {low:.2f} to {high:.2f} on {new} coalitions that are not in the fit"
        print(f"\n{title}: {int(a.cost.forward)} passes, {fit}")
        print("  " + "  ".join(f"{w} {v:+.1f}" for w, v in zip(words, a.values[0].tolist(), strict=True)))
        for warning in a.warnings:
            print(f"  warning: {warning}")


if __name__ == "__main__":
    main()
