"""What methods that play games have in common: the shape of their answers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import apportion as ap
from apportion.core.errors import ConfigError, InputError
from apportion.parts.masks.explainer import GameMethod

DOUBLE = torch.float64


@dataclass(frozen=True)
class Left(GameMethod):
    """What leaving each player out takes from the score."""

    card = ap.Card("Left", ap.Paper("nobody", 2026, "a test", "here"), ap.Kind.SALIENCE, "a test", "P forward")

    def explain(self, q: ap.Question) -> ap.Attribution:
        game = self.game(q)
        (block,) = ap.samplers.LeaveOneOut().blocks(game)
        values = q.fx[:, None] - game.value(block)
        return self.answer(q, game, values, standard_error=values * 0 + 1, claimed_total=values.sum(1))

    def passes(self, q: ap.Question | None = None) -> ap.Passes:
        return self.passes_of(0 if q is None else self.game(q).players)


def total(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).sum(1)


def test_elements_are_shaped_as_the_input() -> None:
    x = (torch.randn(2, 2, 3, dtype=DOUBLE), torch.randn(2, 2, dtype=DOUBLE))
    a = Left()(ap.Field(lambda a, b: total(a) + total(b)), x)
    assert a.domain is ap.Domain.INPUT
    assert a.groups is None
    for found, part, error in zip(a.values, x, cast(Any, a.parts["standard_error"]), strict=True):
        assert torch.allclose(found, part, atol=1e-12)
        assert torch.equal(error, torch.ones_like(part))


def test_groups_have_one_value_each_and_spread(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 4, 4, dtype=DOUBLE)
    a = Left(ap.groups.Squares(2))(ap.Field(total), x)
    assert a.domain is ap.Domain.GROUPS
    assert a.values.shape == (2, 4)
    want = x.unflatten(2, (2, 2)).unflatten(4, (2, 2)).sum((1, 3, 5)).flatten(1)
    assert torch.allclose(a.values, want, atol=1e-12)
    assert a.gap is not None
    assert float(a.gap.abs().max()) < 1e-12
    wide = a.spread()
    assert wide.domain is ap.Domain.INPUT
    assert wide.values.shape == x.shape
    assert torch.equal(wide.values[:, 1, 0, 3], a.values[:, 1])
    assert wide.claimed_total is None
    shared = a.spread(share=True)
    assert torch.allclose(shared.values * 12, wide.values)
    assert shared.gap is not None
    assert float(shared.gap.abs().max()) < 1e-12
    a.save(tmp_path / "a.safetensors")
    again = ap.Attribution.load(tmp_path / "a.safetensors")
    assert torch.equal(again.groups, a.groups)
    assert torch.equal(again.spread().values, wide.values)
    with pytest.raises(InputError, match="domain 'input'"):
        wide.spread()


def test_pooled_values_spread_too() -> None:
    x = torch.randn(2, 3, 4, 4, dtype=DOUBLE)
    a = ap.GradientTimesInput()(ap.Field(total), x)
    pooled = a.pool(ap.groups.Squares(2)).spread(share=True)
    assert torch.allclose(pooled.values.sum((1, 2, 3)), a.values.sum((1, 2, 3)), atol=1e-12)
    assert pooled.postprocessing == ("pool", "spread(share=True)")


def test_ragged_players_an_example_does_not_have_get_zero() -> None:
    labels = torch.tensor([[0, 0, 1, 1], [2, 1, 0, -1]])
    x = torch.randn(2, 4, dtype=DOUBLE)
    a = Left(ap.groups.Labels(labels))(ap.Field(total), x)
    assert cast(Any, a.parts["sizes"]).tolist() == [2, 3]
    assert a.values[0, 2] == 0
    assert a.cost.forward.tolist() == [2, 3]
    wide = a.spread().values
    assert torch.allclose(wide[1, :3], x[1, :3], atol=1e-12)
    assert wide[1, 3] == 0


def test_what_is_left_as_it_is_gets_a_warning() -> None:
    x = torch.randn(2, 4, dtype=DOUBLE)
    x[1, 2] = 0
    a = Left()(ap.Field(total), x)
    assert any("1 player" in w and "example 1, [2]" in w for w in a.warnings)


def test_costs_are_what_is_announced() -> None:
    x = torch.randn(2, 4, dtype=DOUBLE)
    data = torch.randn(5, 4, dtype=DOUBLE)
    a = Left(fill=ap.fills.Marginal(data))(ap.Field(total), x)
    assert Left(fill=ap.fills.Marginal(data)).passes_of(4) == ap.Passes(20, 0, 1, once=5)
    assert a.cost.forward.tolist() == [20, 20]
    assert Left().passes_of(4) == ap.Passes(4, 0, 1, once=1)


class Overlapping:
    def count(self, like: torch.Tensor) -> int:
        return 3

    def kept(self, mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        gone = ~mask
        return ~torch.stack([gone[:, 0], gone[:, 0] | gone[:, 1], gone[:, 1] | gone[:, 2], gone[:, 2]], 1)

    def total(self, values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        a, b, c = values.unbind(1)
        return torch.stack([a, a + b, b + c, c], 1)


def test_windows_that_overlap() -> None:
    x = torch.randn(2, 4, dtype=DOUBLE)
    with pytest.raises(ConfigError, match="whose groups overlap, for Left"):
        Left(Overlapping())(ap.Field(total), x)
    game = ap.Game(ap.Field(total).bind(x), Overlapping(), ap.fills.Baselines())
    found = game.value(~torch.eye(3, dtype=torch.bool))
    assert torch.allclose(
        found,
        x[:, [2, 3]].sum(1)[:, None] * torch.tensor([1.0, 0, 0], dtype=DOUBLE)
        + (x[:, 0] + x[:, 3])[:, None] * torch.tensor([0, 1.0, 0], dtype=DOUBLE)
        + (x[:, 0] + x[:, 1])[:, None] * torch.tensor([0, 0, 1.0], dtype=DOUBLE),
    )
    assert game.value(torch.zeros(1, 3, dtype=torch.bool)).abs().max() == 0


def test_noisy_copies_keep_their_groups() -> None:
    x = torch.rand(2, 3, 4, 4, dtype=DOUBLE)
    for wrapper in (ap.SmoothGrad, ap.SmoothGradSquared, ap.VarGrad):
        a = wrapper(Left(ap.groups.Squares(2)), samples=3)(ap.Field(total), x)
        assert a.values.shape == (2, 4)
        assert a.spread().values.shape == x.shape
    with pytest.raises(ConfigError, match="differ from copy to copy"):
        ap.SmoothGrad(Left(ap.groups.Superpixels(4)), samples=3)(ap.Field(total), x)
