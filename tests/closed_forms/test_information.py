"""A small discrete joint distribution with its exact conditional fill: its games of probability are of information."""

from __future__ import annotations

from itertools import combinations, product
from math import factorial, log

import pytest
import torch
from torch import Tensor

import apportion as ap

DOUBLE = torch.float64
# how often each (x0, x1, x2, y) occurs: x0 and x1 go together, x2 tells y where both are 1
COUNTS = {
    (x0, x1, x2, y): 1 + 2 * (x0 == x1) + (x2 == y) * (x0 + x1) + (x0 == y)
    for x0, x1, x2, y in product((0, 1), (0, 1), (0, 1, 2), (0, 1))
}
TOTAL = sum(COUNTS.values())
JOINT = torch.tensor([k for k, n in COUNTS.items() for _ in range(n)], dtype=DOUBLE)
ROWS, LABELS = JOINT[:, :3], JOINT[:, 3].long()
SUBSETS = [s for size in range(4) for s in combinations(range(3), size)]
MASKS = torch.tensor([[i in s for i in range(3)] for s in SUBSETS])


def p(s: tuple[int, ...], x: tuple[int, ...], y: int | None = None) -> float:
    """P(x_S) or P(x_S, y), counted."""
    fits = [n for k, n in COUNTS.items() if all(k[i] == x[i] for i in s) and y in (None, k[3])]
    return sum(fits) / TOTAL


def given(s: tuple[int, ...], x: tuple[int, ...], y: int) -> float:
    return p(s, x, y) / p(s, x)


TABLE = torch.zeros(2, 2, 3, 2, dtype=DOUBLE)
for key in COUNTS:
    TABLE[key] = given((0, 1, 2), key[:3], key[3])


def bayes(x: Tensor) -> Tensor:
    """p(y | x), which no model can better."""
    a, b, c = x.round().long().unbind(1)
    return TABLE[a, b, c].to(x.dtype)


def log_loss(outputs: Tensor, y: Tensor) -> Tensor:
    return -outputs.gather(1, y[:, None])[:, 0].log()


FILL = ap.fills.Conditional(ROWS)
X = torch.tensor([[0, 0, 0], [1, 1, 2], [0, 1, 1], [1, 1, 1]], dtype=DOUBLE)
Y = [0, 1, 0, 1]


def field(score: ap.Score) -> ap.Field:
    return ap.Field(bayes, score, allow_unused=True, batch_size=100_000)


def points() -> list[tuple[tuple[int, ...], int]]:
    return [(tuple(int(v) for v in x), y) for x, y in zip(X.tolist(), Y, strict=True)]


def by_sizes(gain: dict[tuple[tuple[int, ...], int], float]) -> Tensor:
    """Σ_{S∌i} |S|! (2 - |S|)! / 3! · gain(S, i)."""
    out = torch.zeros(3, dtype=DOUBLE)
    for (s, i), g in gain.items():
        out[i] += factorial(len(s)) * factorial(2 - len(s)) / 6 * g
    return out


STEPS = [(s, i) for s in SUBSETS for i in range(3) if i not in s]


def test_values_are_conditional_probabilities() -> None:
    q = field(ap.Logit()).bind(X, target=Y)
    found = ap.Game(q, ap.groups.Elements(), FILL).value(MASKS)
    want = torch.tensor([[given(s, x, y) for s in SUBSETS] for x, y in points()], dtype=DOUBLE)
    torch.testing.assert_close(found, want, atol=1e-9, rtol=0)
    # and not under the marginal distribution, since features go together
    other = ap.Game(field(ap.Logit()).bind(X, target=Y), ap.groups.Elements(), ap.fills.Marginal(ROWS)).value(MASKS)
    assert float((other - want).abs().max()) > 0.01


def test_minus_the_loss_is_pointwise_mutual_information() -> None:
    """v(S) - v(∅) = log p(y | x_S) / p(y), whose Shapley values are means of conditional ones."""
    a = ap.LossSHAP(fill=FILL)(field(ap.Loss(log_loss)), X, target=torch.tensor(Y))
    q = field(ap.Loss(log_loss)).bind(X, target=torch.tensor(Y))
    v = -ap.Game(q, ap.groups.Elements(), FILL, "score_of_mean").value(MASKS)
    for b, (x, y) in enumerate(points()):
        pmi = torch.tensor([log(p(s, x, y) / (p(s, x) * p((), x, y))) for s in SUBSETS], dtype=DOUBLE)
        torch.testing.assert_close(v[b] - v[b, 0], pmi, atol=1e-9, rtol=0)
        more = {(s, i): log(given(tuple(sorted((*s, i))), x, y) / given(s, x, y)) for s, i in STEPS}
        torch.testing.assert_close(a.values[b], by_sizes(more), atol=1e-9, rtol=0)
        assert float(a.values[b].sum()) == pytest.approx(float(pmi[-1]), abs=1e-9)


def conditional_information(i: int, s: tuple[int, ...]) -> float:
    """I(Y; X_i | X_S), summed over what can be."""
    more, out = tuple(sorted((*s, i))), 0.0
    for key, n in COUNTS.items():
        x, y = key[:3], key[3]
        out += n / TOTAL * log(p(more, x, y) * p(s, x) / (p(more, x) * p(s, x, y)))
    return out


def test_sage_is_weighted_conditional_mutual_information() -> None:
    a = ap.SAGE(fill=FILL)(field(ap.Loss(log_loss)), ROWS, target=LABELS, ids=range(len(ROWS)))
    want = by_sizes({(s, i): conditional_information(i, s) for s, i in STEPS})
    torch.testing.assert_close(a.values[0], want, atol=1e-9, rtol=0)
    whole = sum(n / TOTAL * log(given((0, 1, 2), k[:3], k[3]) / p((), k[:3], k[3])) for k, n in COUNTS.items())
    assert float(a.values.sum()) == pytest.approx(whole, abs=1e-9)  # I(Y; X)
    averaged = ap.SAGE(fill=FILL, reduce="mean_of_score")(field(ap.Loss(log_loss)), ROWS, target=LABELS)
    assert float((averaged.values[0] - want).abs().max()) > 1e-3  # losses averaged: not information


def test_copied_features_share_under_the_conditional_fill() -> None:
    """f = x1 with x0 = x1 always: all to x1 by the marginal fill, half to each by the conditional one."""
    rows = torch.tensor([[-1.0, -1.0], [1.0, 1.0]], dtype=DOUBLE)
    net, x = ap.Field(lambda x: x[:, 1] + 0 * x[:, 0]), rows[1:]
    for fill, want in ((ap.fills.Marginal(rows), [0.0, 1.0]), (ap.fills.Conditional(rows), [0.5, 0.5])):
        a = ap.Shapley(fill=fill)(net, x)
        torch.testing.assert_close(a.values[0], torch.tensor(want, dtype=DOUBLE), atol=1e-12, rtol=0)
