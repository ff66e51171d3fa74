"""Fills: what stands where a mask removes."""

import torch

import apportion as ap

DOUBLE = torch.float64


def filled(fill: ap.fills.Baselines | ap.fills.Marginal, x: torch.Tensor, owner: list[int]) -> torch.Tensor:
    q = ap.Field(lambda x: x.sum(1)).bind(x)
    at = torch.tensor(owner)
    return fill(q, torch.ones(len(owner), *x.shape[1:]), at, torch.arange(len(owner)))


def test_baselines_of_the_rows_owners() -> None:
    x = torch.randn(3, 4, dtype=DOUBLE)
    assert not filled(ap.fills.Baselines(), x, [2, 0]).any()
    rows = filled(ap.fills.Baselines(ap.baselines.Mean()), x, [2, 0, 2])
    assert rows.shape == (3, 1, 4)
    assert torch.allclose(rows[:, 0, 0], x.mean(1)[[2, 0, 2]])
    several = filled(ap.fills.Baselines(ap.baselines.Noise(count=3)), x, [1, 1])
    assert several.shape == (2, 3, 4)
    assert torch.equal(several[0], several[1])


def test_marginal_gives_every_row_the_whole_data() -> None:
    data = torch.randn(5, 4, dtype=DOUBLE)
    rows = filled(ap.fills.Marginal(data), torch.randn(3, 4, dtype=DOUBLE), [0, 2])
    assert torch.equal(rows, data.expand(2, 5, 4))
    assert rows.stride(0) == 0
