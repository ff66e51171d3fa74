"""Deletion and insertion on models whose curves can be written down."""

from __future__ import annotations

import pytest
import torch
from benchmarks import removal_curves as rc
from torch import Tensor

WEIGHTS = torch.tensor([[4.0, 1.0], [3.0, 2.0]])


def linear(rows: Tensor, owner: Tensor) -> Tensor:
    """Weigh the pixels of a picture of one channel by 4, 1, 3, 2."""
    return (rows[:, 0] * WEIGHTS).sum((1, 2))


X = torch.ones(1, 1, 2, 2)


def test_known_curves() -> None:
    ranks = rc.ranking(WEIGHTS[None])
    assert ranks.tolist() == [[0, 3, 1, 2]]
    deleted = rc.curve(linear, X, 0 * X, ranks, 4)
    assert deleted.tolist() == [[10, 6, 3, 1, 0]]
    assert rc.curve(linear, 0 * X, X, ranks, 4).tolist() == [[0, 4, 7, 9, 10]]
    assert rc.area(deleted).tolist() == [(5 + 6 + 3 + 1) / 4]
    assert rc.curve(linear, X, 0 * X, ranks, 2).tolist() == [[10, 3, 0]]


def test_a_wrong_ranking_is_worse() -> None:
    right = rc.insertion_and_deletion(linear, X, WEIGHTS[None], 0 * X, 0 * X, 4)
    wrong = rc.insertion_and_deletion(linear, X, -WEIGHTS[None], 0 * X, 0 * X, 4)
    assert right[0] > wrong[0]
    assert right[1] < wrong[1]
    assert float(right[0] - right[1]) == pytest.approx(2.5)  # (6.25 - 3.75)
    assert float(wrong[0] - wrong[1]) == pytest.approx(-2.5)


def test_channels_go_together_and_ties_by_position() -> None:
    values = torch.tensor([[[[1.0, 0.0]], [[-1.0, 0.0]]]])  # two channels that cancel
    assert rc.ranking(values).tolist() == [[0, 1]]
    seen = []

    def score(rows: Tensor, owner: Tensor) -> Tensor:
        seen.append(rows)
        return rows.sum((1, 2, 3))

    rc.curve(score, torch.ones(1, 2, 1, 2), torch.zeros(1, 2, 1, 2), rc.ranking(values), 2)
    assert (seen[0][:, 0] == seen[0][:, 1]).all()


def test_chunks_and_owners_do_not_matter() -> None:
    x, end = torch.rand(5, 3, 4, 4), torch.rand(5, 3, 4, 4)
    scale = torch.arange(1.0, 6.0)

    def score(rows: Tensor, owner: Tensor) -> Tensor:
        return rows.mean((1, 2, 3)) * scale[owner]

    ranks = rc.ranking(torch.rand(5, 4, 4))
    whole = rc.curve(score, x, end, ranks, 8, batch=1000)
    assert torch.equal(whole, rc.curve(score, x, end, ranks, 8, batch=7))
    assert torch.allclose(whole[:, 0], x.mean((1, 2, 3)) * scale)
    assert torch.allclose(whole[:, -1], end.mean((1, 2, 3)) * scale)


def test_controls_and_substrate() -> None:
    x = torch.rand(2, 3, 16, 16)
    assert rc.random_map(x).shape == rc.centre_map(x).shape == (2, 16, 16)
    middle = rc.ranking(rc.centre_map(x))[0].reshape(16, 16)
    assert int(middle[7:9, 7:9].max()) == 3
    blurred = rc.rise_blur(torch.ones(1, 3, 31, 31))
    assert blurred[..., 15, 15].flatten().tolist() == pytest.approx([1.0] * 3, abs=1e-5)
    assert float(blurred[0, 0, 0, 0]) < 0.5  # zeros beyond the border


def test_interval_covers_the_mean() -> None:
    found = rc.interval(torch.arange(100.0))
    assert found["low"] < found["mean"] == 49.5 < found["high"]
    assert 9 < found["high"] - found["low"] < 13  # 2 x 1.96 x 28.9 / 10
    assert rc.shown(found, 1).startswith("49.5 [")
