"""Streams: random numbers keyed by seed, example, purpose and draw, whatever the batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.core import tree
from apportion.core.errors import InputError, kind_of
from apportion.core.memory import sent
from apportion.core.tree import Tree

Id = bool | int | float | str | bytes | tuple[Any, ...]
"""What may name an example."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_DRAW = np.uint64(0xD1342543DE82EF95)
_BLOCK = 1 << 16


def _mix(z: np.ndarray) -> np.ndarray:
    """Scramble 64-bit counters in place (the finalizer of SplitMix64, Steele et al. 2014)."""
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def _between(bits: np.ndarray) -> np.ndarray:
    """Turn numbers of 23 bits into U(0, 1), ends excluded."""
    out = bits.astype(np.float32)
    out += np.float32(0.5)
    out *= np.float32(2.0**-23)
    return out


def _halves(bits: np.ndarray) -> np.ndarray:
    """Turn 64 bits each into two numbers of 23, in place."""
    high = bits >> np.uint64(41)
    high <<= np.uint64(32)
    bits &= np.uint64(0x7FFFFF)
    bits |= high
    return bits.astype("<u8", copy=False).view("<u4")


def key_of(*words: object) -> int:
    """Hash words to a 64-bit key.

    >>> key_of(0, "noise") == key_of(0, "noise"), key_of(0, "noise") == key_of(1, "noise")
    (True, False)
    """
    text = "\x1f".join(f"{type(w).__name__}:{w}" for w in words)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def plain_id(name: Any) -> Id:
    """Take a name that reads the same in every process, in one spelling: NumPy's numbers are Python's.

    >>> plain_id(np.int64(3)), plain_id(("a", np.str_("b")))
    (3, ('a', 'b'))

    Raises:
        InputError: an object, whose text may hold its address in memory.
    """
    if isinstance(name, np.generic) or (isinstance(name, Tensor) and name.ndim == 0):
        name = name.item()
    if isinstance(name, tuple):
        return tuple(plain_id(part) for part in name)
    for kind in (bool, int, float, str, bytes):
        if type(name) is kind:
            return name
        if isinstance(name, kind):  # an enumeration's entry, for example
            return kind(name)  # pyright: ignore[reportArgumentType]
    raise InputError(
        f"{kind_of(name)} among the ids",
        "a str, int, float or bytes, or a tuple of them, which key random numbers alike in every run",
        "name the examples by strings, such as their file names",
    )


def content_ids(x: Tree) -> list[str]:
    """Name each example by a hash of its content; the same numbers in a wider dtype are the same content."""
    flat = [leaf.detach().contiguous().cpu() for leaf in tree.leaves(x)]
    flat = [leaf.double() if leaf.is_floating_point() else leaf for leaf in flat]
    out = []
    for b in range(tree.rows(x)):
        h = hashlib.blake2b(digest_size=8)
        for leaf in flat:
            h.update(leaf[b].reshape(-1).contiguous().view(torch.uint8).numpy().data)
        out.append(h.hexdigest())
    return out


@dataclass(frozen=True)
class Stream:
    """Random rows for a set of examples; a row depends on its own key and draw alone.

    Each row is filled whole in float32 on the CPU, then cast and moved, so that dtype, device, chunking
    and the other examples change nothing.
    """

    keys: np.ndarray

    @classmethod
    def of(cls, seed: int, ids: Sequence[object], purpose: str) -> Stream:
        """Key one stream per example."""
        return cls(np.array([key_of(seed, i, purpose) for i in ids], dtype=np.uint64))

    def derive(self, owner: Int[Tensor, " R"], draw: Int[Tensor, " R"]) -> Stream:
        """Key one stream per (example, draw), for questions about noisy copies."""
        return Stream(self._row_keys(owner, draw))

    def _row_keys(self, owner: Tensor, draw: Tensor) -> np.ndarray:
        d = draw.cpu().numpy().astype(np.uint64)
        return _mix(self.keys[owner.cpu().numpy()] + (d + np.uint64(1)) * _DRAW)

    def _bits(self, keys: np.ndarray, count: int) -> np.ndarray:
        steps = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
        out = np.empty((len(keys), count), dtype=np.uint64)
        width = max(1, min(count, _BLOCK))
        high = max(1, _BLOCK // width)
        for i in range(0, len(keys), high):  # blocks that stay in cache
            for j in range(0, count, width):
                block = keys[i : i + high, None] + steps[None, j : j + width]
                out[i : i + high, j : j + width] = _mix(_mix(block) ^ np.uint64(0x2545F4914F6CDD1D))
        return out

    def _pairs(self, owner: Tensor, draw: Tensor, count: int, leaf: int) -> np.ndarray:
        """Give 64 random bits for each two numbers, [R, count]."""
        keys = self._row_keys(owner, draw)
        if leaf:
            keys = _mix(keys + np.array([leaf], dtype=np.uint64) * _GOLDEN)  # arrays wrap around silently
        return self._bits(keys, count)

    def uniform(self, like: Tree, owner: Int[Tensor, " R"], draw: Int[Tensor, " R"]) -> Tree:
        """Fill rows shaped as those of `like` with U(0, 1), ends excluded.

        >>> s = Stream.of(0, ["a", "b"], "demo")
        >>> both = s.uniform(torch.zeros(2, 3), torch.tensor([0, 1]), torch.tensor([4, 4]))
        >>> alone = s.uniform(torch.zeros(2, 3), torch.tensor([1]), torch.tensor([4]))
        >>> torch.equal(both[1], alone[0])
        True
        """
        return self._fill(like, owner, draw, lambda bits, n: torch.from_numpy(_between(_halves(bits))[:, :n]))

    def places(self, owner: Int[Tensor, " R"], draw: Int[Tensor, " R"], count: int) -> Int[Tensor, "R count"]:
        """Draw whole numbers below 2²³ which are in the order of those that `uniform` draws.

        >>> s, one = Stream.of(0, ["a"], "demo"), torch.zeros(1, dtype=torch.long)
        >>> torch.equal((s.places(one, one, 5) + 0.5) * 2**-23, s.uniform(torch.zeros(1, 5), one, one))
        True
        """
        return torch.from_numpy(_halves(self._pairs(owner, draw, (count + 1) // 2, 0)).view("<i4")[:, :count])

    def normal(self, like: Tree, owner: Int[Tensor, " R"], draw: Int[Tensor, " R"]) -> Tree:
        """Fill rows shaped as those of `like` with N(0, 1), by the Box-Muller transform."""

        def fill(bits: np.ndarray, n: int) -> Tensor:
            low, high = (_between(b) for b in (bits & np.uint64(0x7FFFFF), bits >> np.uint64(41)))
            radius = torch.from_numpy(low).log_().mul_(-2).sqrt_()
            angle = torch.from_numpy(high).mul_(2 * torch.pi)
            return torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :n]

        return self._fill(like, owner, draw, fill)

    def _fill(self, like: Tree, owner: Tensor, draw: Tensor, fill) -> Tree:
        flat = []
        for i, leaf in enumerate(tree.leaves(like)):
            n = leaf[0].numel()
            values = fill(self._pairs(owner, draw, (n + 1) // 2, i), n)
            flat.append(sent(values.reshape(len(owner), *leaf.shape[1:]), leaf))
        return tree.rebuild(like, flat)

    def integers(
        self, high: int, owner: Int[Tensor, " R"], draw: Int[Tensor, " R"], count: int = 1
    ) -> Int[Tensor, "R count"]:
        """Draw integers in [0, high)."""
        u: Float[Tensor, "R count"] = self.uniform(torch.zeros(1, count), owner, draw)
        return (u.double() * high).long().clamp_(max=high - 1)
