"""Harsanyi dividends: what each coalition adds beyond all that its parts add."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.core.errors import InputError, kind_of
from apportion.core.game import Game
from apportion.parts.masks.samplers import AllSubsets


def harsanyi(game: Game | Float[Tensor, "*b N"], most: int = 16) -> Float[Tensor, "*b N"]:
    """Give a(S) = Σ_{T ⊆ S} (-1)^{|S|-|T|} v(T), so that v(S) = Σ_{T ⊆ S} a(T) (Harsanyi 1963).

    Args:
        game: a game, of which every coalition is played; or a table of v, [*, 2^n], ordered as `AllSubsets` are:
            entry s for the coalition with player i where bit i of s is 1.
        most: the largest number of players of a game.

    Returns:
        The dividends in the same order and units; 0 for coalitions of players an example does not have.

    Raises:
        InputError: more players, something else, or a table whose length is no power of 2.

    >>> harsanyi(torch.tensor([0.0, 1.0, 2.0, 7.0]))        # x1 + 2 x2 + 4 x1 x2 at (1, 1)
    tensor([0., 1., 2., 4.])
    """
    if isinstance(game, Tensor):
        return _over_subsets(game, -1)
    if not isinstance(game, Game):
        raise InputError(f"{kind_of(game)} as a game", "an ap.Game, or a tensor [*, 2^n]", "write torch.tensor(table)")
    values = torch.cat([game.value(block) for block in AllSubsets(most).blocks(game)], 1)
    have = torch.arange(values.shape[1]) < (1 << game.sizes)[:, None]
    return torch.where(have.to(values.device), _over_subsets(values, -1), torch.zeros_like(values))


def from_dividends(dividends: Float[Tensor, "*b N"]) -> Float[Tensor, "*b N"]:
    """Sum v(S) = Σ_{T ⊆ S} a(T): the inverse of `harsanyi`.

    >>> from_dividends(torch.tensor([0.0, 1.0, 2.0, 4.0]))
    tensor([0., 1., 2., 7.])
    """
    return _over_subsets(dividends, 1)


def shares(dividends: Float[Tensor, "*b N"], each: Float[Tensor, " sizes"]) -> Float[Tensor, "*b P"]:
    """Give each player Σ_{S ∋ i} each[|S|] a(S).

    Args:
        dividends: as `harsanyi` gives them.
        each: for every size 0 to n, the share of a dividend that each of its players gets: 1 / size for Shapley
            values, 2^(1 - size) for Banzhaf values.

    >>> shares(torch.tensor([0.0, 1.0, 2.0, 4.0]), torch.tensor([0.0, 1.0, 0.5]))
    tensor([3., 4.])
    """
    players = _players(dividends)
    if not isinstance(each, Tensor) or tuple(each.shape) != (players + 1,):
        given = f"shares of shape {tuple(each.shape)}" if isinstance(each, Tensor) else f"{kind_of(each)} as shares"
        raise InputError(given, f"a tensor [{players + 1}]", "give one for every size from 0 on")
    member = (torch.arange(dividends.shape[-1])[:, None] >> torch.arange(players)) & 1
    weight = member * each.to(dividends).cpu()[member.sum(1)][:, None]
    return dividends @ weight.to(dividends)


def _players(table: Tensor) -> int:
    if not isinstance(table, Tensor):
        raise InputError(f"{kind_of(table)} as a table", "a tensor [*, 2^n]", "convert with torch.as_tensor")
    n = table.shape[-1].bit_length() - 1 if table.ndim else -1
    if n < 0 or table.shape[-1] != 1 << n:
        raise InputError(f"a table of shape {tuple(table.shape)}", "[*, 2^n]", "give v of every coalition, in order")
    return n


def _over_subsets(table: Tensor, sign: int) -> Tensor:
    """Add to the entries with player i, times a sign, those without; player by player: n 2^n additions."""
    out = table
    for i in range(_players(table)):
        pairs = out.reshape(*table.shape[:-1], -1, 2, 1 << i)
        without, with_ = pairs.unbind(-2)
        out = torch.stack([without, with_ + sign * without], -2).reshape(table.shape)
    return out
