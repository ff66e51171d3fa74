"""What a planted thing is: a model, points, and the right answer; two models that are one function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from apportion.core.errors import InputError
from apportion.parts.masks.dividends import harsanyi, shares


@dataclass(frozen=True, eq=False, kw_only=True)
class Planted:
    """A model, points, and what is right to say of them; the function that makes it says what `truth` is.

    Attributes:
        model: what `ap.Field` is given.
        x: the points, [n, ...].
        truth: the right answer: values of each feature, a mask of those that matter, ...
        baseline: where attributions start, [1, ...] or [n, ...], for `ap.baselines.Given`.
        target: the output to explain, None where there is one only.
    """

    model: nn.Module
    x: Tensor
    truth: Tensor
    baseline: Tensor
    target: int | Int[Tensor, " n"] | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class PlantedGame(Planted):
    """A planted function of few features, with what each coalition of them adds; `truth` is the Shapley values.

    Attributes:
        dividends: Harsanyi dividends a(S) of v(S) = f(x on S, baseline elsewhere), in the order of `AllSubsets`:
            column s is the coalition with feature i where bit i of s is 1.
    """

    dividends: Float[Tensor, "n N"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Pair:
    """Two models, one function: other(other_x) = model(x), whatever x is, if `other_x` moves along.

    Attributes:
        model: the first.
        other: the second.
        x: points for the first.
        other_x: the same points, as the second takes them.
        baseline: where attributions of the first start, [1, ...].
        other_baseline: the same point, as the second takes it.
        truth: integrated gradients of either, which see the function only.
        target: the output to explain.
    """

    model: nn.Module
    other: nn.Module
    x: Tensor
    other_x: Tensor
    baseline: Tensor
    other_baseline: Tensor
    truth: Tensor | None = None
    target: int | None = None


def dividends(
    model: Callable[[Tensor], Tensor],
    x: Float[Tensor, "n d"],
    baseline: Float[Tensor, "m d"],
    most: int = 12,
) -> Float[Tensor, "n N"]:
    """Evaluate every coalition of features and give Harsanyi dividends, in the order of `AllSubsets`.

    Args:
        model: takes [R, d], gives [R].
        x: the points.
        baseline: what stands for absent features, one for all or one each.
        most: the largest d; 2^d rows are evaluated per point.

    Raises:
        InputError: more features than `most`.

    >>> dividends(lambda z: z[:, 0] * z[:, 1], torch.tensor([[2.0, 3.0]]), torch.zeros(1, 2))
    tensor([[0., 0., 0., 6.]])
    """
    n, d = x.shape
    if d > most:
        raise InputError(f"{d} features, {2**d} coalitions", f"at most {most}", "raise `most`, or take fewer features")
    present = ((torch.arange(1 << d)[:, None] >> torch.arange(d)) & 1).bool().to(x.device)
    rows = torch.where(present, x[:, None], baseline[:, None])
    with torch.no_grad():
        return harsanyi(model(rows.flatten(0, 1)).reshape(n, -1))


def shapley_shares(dividends: Float[Tensor, "n N"]) -> Float[Tensor, "n d"]:
    """Share each dividend equally among the features of its coalition: their Shapley values.

    >>> shapley_shares(torch.tensor([[0.0, 1.0, 0.0, 6.0]]))
    tensor([[4., 3.]])
    """
    players = dividends.shape[1].bit_length() - 1
    sizes = torch.arange(players + 1, dtype=dividends.dtype).clamp(min=1)
    return shares(dividends, 1 / sizes)


def seeded(seed: int) -> torch.Generator:
    """Give a generator of one's own, so that the global random state stays as it is."""
    return torch.Generator().manual_seed(seed)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Draw standard normal numbers in float64."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def away_from_zero(generator: torch.Generator, *shape: int, least: float = 0.3) -> Tensor:
    """Draw numbers of either sign, none nearer 0 than `least`, so that every feature has a say."""
    draws = normal(generator, *shape)
    return torch.where(draws < 0, -1.0, 1.0) * (draws.abs() + least)
