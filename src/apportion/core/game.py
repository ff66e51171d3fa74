"""Games: the score when some players are kept and the rest is filled in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.core import tree
from apportion.core.attribution import Groups, References
from apportion.core.calls import take
from apportion.core.errors import ConfigError, InputError, kind_of
from apportion.core.progress import tick
from apportion.core.protocols import Owner
from apportion.core.question import Question
from apportion.core.score import Score, check_scores
from apportion.core.streams import _GOLDEN, _mix
from apportion.core.tree import Tree

Masks = Bool[Tensor, "*b S P"] | Float[Tensor, "*b S P"]

_AT_ONCE = 1 << 22
"""Entries of masks held at once."""
_REMEMBERED = 1 << 25
"""Bytes of coalitions that are remembered; beyond, a repeated one is evaluated again."""


@dataclass(frozen=True, eq=False)
class Weighted:
    """Draws of a fill that count differently; those of weight 0 are not evaluated.

    Attributes:
        rows: [R, k, ...] values.
        weight: [R, k], each row with sum 1.
    """

    rows: Tree
    weight: Float[Tensor, "R k"]


@runtime_checkable
class Fill(Protocol):
    """Replaces what a mask removes; may depend on the mask and return several draws."""

    def __call__(self, q: Question, mask: Tree, owner: Owner, draw: Int[Tensor, " R"], /) -> Tree | Weighted:
        """Fill rows.

        Args:
            q: the question, for its examples and random streams.
            mask: per element, 1 where the example is kept; shaped as rows.
            owner: the example each row belongs to.
            draw: a number for the random streams, the same wherever the same coalition is met.

        Returns:
            What stands where the mask is 0: [R, k, ...] for k draws.
        """
        ...


@runtime_checkable
class Windows(Protocol):
    """Players that may overlap: an element is kept where all windows over it are."""

    def count(self, like: Tree) -> int:
        """Count the windows."""
        ...

    def kept(self, mask: Bool[Tensor, "R P"], like: Tree) -> Tree:
        """Tell of each element whether it is kept, in a shape that broadcasts to rows of `like`."""
        ...

    def total(self, values: Float[Tensor, "B P"], like: Tree) -> Tree:
        """Sum, for each element, the numbers of the windows over it; shaped as `like`."""
        ...


@dataclass(frozen=True, eq=False)
class Block:
    """Coalitions of every example, made when they are needed.

    Attributes:
        size: how many for each example.
        make: takes numbers [s] below `size` and gives their masks, [s, P] or [B, s, P].
        where: which of them each example is asked, [B, size]; all unless given.
        weight: the weight of each, [size] or [B, size], where the sampler weighs them.
        order: for permutations, [B, m, P]: the players in order; those an example does not have come last.
    """

    size: int
    make: Callable[[Tensor], Tensor]
    where: Tensor | None = None
    weight: Tensor | None = None
    order: Tensor | None = None

    @property
    def masks(self) -> Tensor:
        """All masks at once, [size, P] or [B, size, P]."""
        return self.make(torch.arange(self.size))

    def among(self, active: Bool[Tensor, " B"]) -> Block:
        """Ask some of the examples only."""
        active = active.cpu()[:, None]
        return replace(self, where=active.expand(-1, self.size) if self.where is None else self.where & active)


class Game:
    """v(S): the score of each example with the players in S kept and the rest filled.

    A coalition of an example is evaluated once, however often it is asked, also with a fill that draws random
    numbers: they are keyed by the coalition, so that v is one function of S. v of all players is f(x).

    Attributes:
        question: the examples and what is asked of them.
        players: the number of players, the largest over the examples.
        sizes: the number of players of each example; the columns of a mask beyond it say nothing.
        labels: each element's player, [1 | B, ...]; None for windows, which overlap.
        asked: coalitions asked of each example so far.
        evaluated: those that were evaluated, without the empty and the full one.
    """

    def __init__(
        self,
        question: Question,
        groups: Groups | Windows,
        fill: Fill,
        reduce: Literal["score_of_mean", "mean_of_score"] = "mean_of_score",
    ) -> None:
        """Set up the game.

        Args:
            question: the examples.
            groups: which elements form a player.
            fill: what stands in for absent players.
            reduce: over several draws, score the mean output or average the scores; they differ.

        Raises:
            ConfigError: an unknown reduction.
            InputError: labels that do not fit the input, or leave out a number.
        """
        if reduce not in ("score_of_mean", "mean_of_score"):
            raise ConfigError(
                f"reduce={reduce!r}",
                "'score_of_mean' or 'mean_of_score'",
                "'mean_of_score' averages scores, 'score_of_mean' scores the mean output",
            )
        for part, what in ((groups, "groups"), (fill, "fill")):
            if isinstance(part, type):
                raise ConfigError(f"the class {part.__name__} as {what}", "an instance", f"write {part.__name__}()")
        if not isinstance(groups, Groups | Windows):
            do = "write ap.groups.Elements()"
            if callable(getattr(groups, "sizes", None)):  # weights of sizes, given first
                do = f"write weights={type(groups).__name__}(...)"
            raise ConfigError(f"{kind_of(groups)} as groups", "one of ap.groups", do)
        if not callable(fill):
            raise ConfigError(f"{kind_of(fill)} as fill", "one of ap.fills", "write ap.fills.Baselines()")
        self.question, self.groups, self.reduce = question, groups, reduce
        batch = len(question)
        self.labels: Tree = None
        if isinstance(groups, Groups):
            self.labels = labels_of(groups, question)
            present = _present(question.x, self.labels)
            self.players = present.shape[1] - 1
            self.sizes = (present[:, :-1] * torch.arange(1, self.players + 1)).amax(1)
            _check_used(present[:, :-1], self.sizes)
            covered = ~present[:, -1]
        else:
            self.players = groups.count(question.x)
            self.sizes = torch.full((batch,), self.players)
            every = groups.kept(torch.zeros(1, self.players, dtype=torch.bool), question.x)
            covered = torch.tensor([not any(bool(leaf.any()) for leaf in tree.leaves(every))]).expand(batch)
        self._in_order = (
            isinstance(self.labels, Tensor)
            and len(self.labels) == 1
            and torch.equal(self.labels.cpu().flatten(), torch.arange(self.players))
        )
        within = getattr(fill, "within", None)
        self.fill: Fill = fill if within is None else within(question, self.labels)
        self._named = type(fill).__name__
        self._covered = bool(covered.all())
        self.own: Tensor = torch.arange(self.players) < self.sizes[:, None]
        self.asked = torch.zeros(batch, dtype=torch.long)
        self.evaluated = torch.zeros(batch, dtype=torch.long)
        self.removed, self.changed = torch.zeros_like(self.own), torch.zeros_like(self.own)
        self._place: dict[bytes, int] = {}
        self._held = 0
        self._known: Tensor | None = None

    @property
    def is_ragged(self) -> bool:
        """Whether examples differ in the number of their players."""
        return bool((self.sizes != self.players).any())

    @cached_property
    def references(self) -> References | None:
        """The baselines and the score there, where the fill puts baselines and every element is some player's."""
        of = getattr(self.fill, "references", None)
        return of(self.question) if of is not None and self._covered else None

    @property
    def per_block(self) -> int:
        """How many coalitions samplers put into a block: by the size of an example, whatever the batch."""
        elements = sum(leaf[0].numel() for leaf in tree.leaves(self.question.x))
        return min(1024, max(64, _AT_ONCE // max(elements, 1)))

    def value(
        self, masks: Tensor | Block | Iterable[Tensor | Block], where: Bool[Tensor, "B S"] | None = None
    ) -> Float[Tensor, "B S"]:
        """Play coalitions.

        Args:
            masks: [S, P] for all examples or [B, S, P]; Boolean, or soft in [0, 1]; a sampler's block; or an
                iterator of such.
            where: which of them to play for each example; the others get 0.

        Returns:
            The score of each example under each mask, in units of the score.

        Raises:
            InputError: masks of another shape or range; a fill that puts the example itself in place of every player.
        """
        if not isinstance(masks, Tensor | Block):
            found = [self.value(block) for block in self._listed(masks, where)]
            return torch.cat(found, 1) if found else self._none()
        if isinstance(masks, Block):
            block, count, make = masks, masks.size, masks.make
            where = block.where if where is None else where
        else:
            self._check(masks)
            count, make = masks.shape[-2], lambda at: masks.cpu()[..., at, :]
        if where is not None:
            self._check_where(where, count)
        batch, out = len(self.question), []
        step = max(1, _AT_ONCE // max(1, batch * self.players))
        for start in range(0, count, step):
            at = torch.arange(start, min(start + step, count))
            part = make(at).cpu()
            if isinstance(masks, Block):
                self._check(part)
            part = part.expand(batch, -1, -1)
            out.append(self._part(part, None if where is None else where[:, at].cpu()))
        return torch.cat(out, 1) if out else self._none()

    def _none(self) -> Tensor:
        return torch.zeros(len(self.question), 0, device=self.question.device)

    def _listed(self, masks: Any, where: Any) -> Iterator[Tensor | Block]:
        """Give what an iterator holds, where that is masks."""
        shape = f"(S, {self.players}) or ({len(self.question)}, S, {self.players})"
        tensor = f"a tensor {shape}, a sampler's block, or an iterator of such"
        if not isinstance(masks, Iterable):
            raise InputError(f"{kind_of(masks)} as masks", tensor, "convert with torch.as_tensor")
        if where is not None:
            raise InputError("where= beside an iterator of masks", "one tensor or block of masks", "join them first")
        for block in masks:
            if not isinstance(block, Tensor | Block):
                raise InputError(
                    f"{kind_of(block)} in {kind_of(masks)} of masks", tensor, "write torch.as_tensor(masks)"
                )
            yield block

    def _check_where(self, where: Any, count: int) -> None:
        want = (len(self.question), count)
        if not isinstance(where, Tensor) or where.dtype != torch.bool or tuple(where.shape) != want:
            raise InputError(
                f"where of {tuple(where.shape)}, {where.dtype}"
                if isinstance(where, Tensor)
                else f"{kind_of(where)} as where",
                f"a Boolean tensor of shape {want}",
                "tell of each example and each mask whether to play it",
            )

    def _check(self, masks: Tensor) -> None:
        batch = len(self.question)
        fits = masks.ndim in (2, 3) and masks.shape[-1] == self.players and (masks.ndim == 2 or len(masks) == batch)
        if not fits:
            raise InputError(
                f"masks of shape {tuple(masks.shape)}",
                f"(S, {self.players}) or ({batch}, S, {self.players})",
                "give one column per player",
            )
        if masks.dtype == torch.bool:
            return
        if masks.is_complex():
            raise InputError(f"masks of {masks.dtype}", "Boolean, or soft in [0, 1]", "take the real part")
        if not bool(((masks >= 0) & (masks <= 1)).all()):
            raise InputError(
                f"masks between {float(masks.min()):.4g} and {float(masks.max()):.4g}",
                "Boolean, or soft in [0, 1]",
                "scale soft masks to [0, 1]",
            )

    def _part(self, masks: Tensor, where: Tensor | None) -> Tensor:
        """Play [B, s, P] masks."""
        batch, count, _ = masks.shape
        asked = torch.ones(batch, count, dtype=torch.bool) if where is None else where
        self.asked += asked.sum(1)
        owner, step = asked.nonzero(as_tuple=True)
        flat = masks.flatten(0, 1) if len(owner) == batch * count else masks[owner, step]
        if self.is_ragged:
            flat = flat & self.own[owner] if flat.dtype == torch.bool else flat.masked_fill(~self.own[owner], 0)
        found = self._remembered(flat, owner) if flat.dtype == torch.bool else self._mixed(flat, owner)
        if where is None:
            return found.reshape(batch, count)
        at = (owner * count + step).to(found.device)
        return found.new_zeros(batch * count).index_copy(0, at, found).reshape(batch, count)

    def _mixed(self, masks: Tensor, owner: Tensor) -> Tensor:
        """Give the values of masks of numbers; those all 0 or 1 are coalitions, whatever stands beside."""
        hard = ((masks == 0) | (masks == 1)).all(1)
        parts = []
        if bool(hard.any()):
            parts.append(self._remembered(masks[hard].bool(), owner[hard]))
        if not bool(hard.all()):
            parts.append(self._played(masks[~hard], owner[~hard]))
        order = torch.cat([hard.nonzero()[:, 0], (~hard).nonzero()[:, 0]]).argsort()
        return torch.cat(parts)[order.to(parts[0].device)] if parts else self._none()[:0].reshape(-1)

    def _remembered(self, masks: Tensor, owner: Tensor) -> Tensor:
        """Give the values of coalitions, evaluating those not met before."""
        packed = np.packbits(masks.numpy(), axis=1)
        keys = np.concatenate([owner.numpy().astype("<u4")[:, None].view(np.uint8), packed], 1)
        full = torch.from_numpy((packed == np.packbits(self.own.numpy(), axis=1)[owner.numpy()]).all(1))
        empty = torch.from_numpy(~packed.any(1))
        raw, width = keys.tobytes(), keys.shape[1]
        base = len(self._place)
        fresh: dict[bytes, int] = {}
        first, place = [], []
        for row in range(len(keys)):
            key = raw[row * width : (row + 1) * width]
            at = self._place.get(key)
            if at is None:
                at = fresh.setdefault(key, base + len(fresh))
                if at == base + len(first):
                    first.append(row)
            place.append(at)
        pool = self._known
        if first:
            if len(first) < len(masks):
                masks, owner, full, empty = (t[first] for t in (masks, owner, full, empty))
            new = self._new(masks, owner, full, empty)
            pool = new if pool is None else torch.cat([pool, new])
            room = max(0, _REMEMBERED - self._held) // (width + 100)  # what a dict takes for one
            self._place.update(list(fresh.items())[:room])
            self._held += min(room, len(fresh)) * (width + 100)
            self._known = pool[: len(self._place)]
        return (
            self._none()[:0].reshape(-1)
            if pool is None
            else pool[torch.tensor(place, dtype=torch.long, device=pool.device)]
        )

    def _new(self, masks: Tensor, owner: Tensor, full: Tensor, empty: Tensor) -> Tensor:
        """Evaluate coalitions; what all of the players give is known, and often what none does."""
        known = empty & ~full if bool(empty.any()) and self.known_empty is not None else torch.zeros_like(full)
        rest = ~(full | known)
        q, found, order = self.question, [], []
        for at in (full, known):
            if bool(at.any()):
                values = q.fx if at is full else self.known_empty
                assert values is not None
                found.append(values[owner[at].to(q.device)])
                order.append(at.nonzero()[:, 0])
        if bool(rest.all()):
            return self._played(masks, owner, ~empty)
        if bool(rest.any()):
            found.append(self._played(masks[rest], owner[rest], ~empty[rest]))
            order.append(rest.nonzero()[:, 0])
        return torch.cat(found)[torch.cat(order).argsort().to(q.device)]

    @property
    def known_empty(self) -> Tensor | None:
        """V of no player, where the baselines' scores tell it without a pass."""
        known = self.references
        if known is None or (self.reduce != "mean_of_score" and known.value.shape[1] > 1):
            return None
        return known.value.mean(1)

    def _played(self, masks: Tensor, owner: Tensor, inner: Tensor | None = None) -> Tensor:
        """Run the model on coalitions, a pass of rows at a time.

        Args:
            masks: [R, P].
            owner: the example of each.
            inner: which are neither empty nor full, where that is known.
        """
        q, out, start = self.question, [], 0
        if inner is None:
            inner = masks.bool().any(1) & ~(masks == self.own[owner]).all(1)
        self.evaluated += torch.bincount(owner[inner], minlength=len(q))
        draw = torch.from_numpy(hashed(masks))
        self._expect(_gone(masks), owner)
        while start < len(owner):
            size = max(1, q.field.chunk // int(getattr(self.fill, "draws", 1)))
            at = slice(start, start + size)
            out.append(self._play(masks[at], owner[at].to(q.device), draw[at]))
            start = min(start + size, len(owner))
            tick("coalitions", start, len(owner))
        return torch.cat(out) if out else self._none()[:0].reshape(-1)

    def rows(self, mask: Masks, owner: Owner, draw: Int[Tensor, " R"]) -> Tree:
        """Make the masked points themselves, [R, k, ...], as the game plays them."""
        self._expect(gone := _gone(mask), owner)
        element = self._kept(mask.to(self.question.device), owner)
        x, filled, _ = self._filled(element, owner, draw)
        points = tree.apply(_blend, x, element, filled)
        self._look(x, points, gone, owner)
        return points

    def elements(self, mask: Tensor, owner: Owner) -> Tree:
        """Give each element its player's mask, shaped as rows; an element without a player is kept."""
        q = self.question
        if self._in_order:
            return mask.reshape(len(mask), *self.labels.shape[1:]).expand(-1, *q.x.shape[1:])
        if self.labels is not None:
            return tree.apply(lambda label, x: _spread(mask, label, owner, x), self.labels, q.x)
        if mask.dtype != torch.bool:
            raise InputError("soft masks of windows", "Boolean masks", "use groups that do not overlap")
        assert isinstance(self.groups, Windows)
        return tree.apply(lambda kept, x: kept.expand(-1, *x.shape[1:]), self.groups.kept(mask, q.x), q.x)

    def _kept(self, mask: Tensor, owner: Owner) -> Tree:
        mask = mask if mask.dtype == torch.bool else mask.to(tree.leaves(self.question.x)[0].dtype)
        if self.is_ragged:
            mask = mask.masked_fill(~self.own.to(mask.device)[owner], 1)
        return self.elements(mask, owner)

    def _filled(self, element: Tree, owner: Owner, draw: Tensor) -> tuple[Tree, Tree, Tensor | None]:
        """Give the examples, what else stands where they are not kept, and the weights of its draws."""
        filled = self.fill(self.question, element, owner, draw)
        filled, weight = (filled.rows, filled.weight) if isinstance(filled, Weighted) else (filled, None)
        return tree.of_owners(self.question.x, owner), filled, weight

    def seen(self, element: Tree, owner: Owner, draw: Int[Tensor, " R"], score: Score | None = None) -> Tensor:
        """Score rows under masks of single elements, which players need not have anything to do with.

        Nothing is remembered, and nothing counted among the coalitions.

        Args:
            element: per element, 1 where the example is kept; Boolean, or soft in [0, 1]; shaped as rows.
            owner: the example each row belongs to.
            draw: a number for the random streams of the fill.
            score: another score than the question's; without a target of its own it shares the question's.

        Returns:
            The score of each row, its draws reduced as those of coalitions are.
        """
        self._expect(None, owner)

        def look(x: Tree, points: Tree) -> None:
            if self._looking and self.labels is not None:
                self._look(x, points, self._by_player(tree.apply(_gone, element), owner), owner)

        return self._reduced(element, owner, draw, look, score)

    def _play(self, mask: Tensor, owner: Tensor, draw: Tensor) -> Tensor:
        def look(x: Tree, points: Tree) -> None:
            self._look(x, points, _gone(mask), owner)

        return self._reduced(self._kept(mask.to(self.question.device), owner), owner, draw, look)

    def _reduced(
        self,
        element: Tree,
        owner: Tensor,
        draw: Tensor,
        look: Callable[[Tree, Tree], None] = lambda x, points: None,
        score: Score | None = None,
    ) -> Tensor:
        """Score what the fill makes of masked rows, some of its draws at a time, and reduce them."""
        q, use = self.question, self.question.field.score if score is None else score
        x, filled, weight = self._filled(element, owner, draw)
        count, draws = tree.leaves(filled)[0].shape[:2]
        scored = draws == 1 or self.reduce == "mean_of_score"
        width = draws if weight is not None else max(1, q.field.chunk // count)
        rows, found = 0, []
        row = torch.arange(count, device=q.device)
        for start in range(0, draws, width):
            points = tree.apply(_blend, x, element, tree.apply(lambda f, at=start: f[:, at : at + width], filled))
            look(x, points)
            row = torch.arange(count, device=q.device).repeat_interleave(tree.leaves(points)[0].shape[1])
            flat = tree.apply(lambda p: p.flatten(0, 1), points)
            if weight is not None:
                at = weight.flatten().nonzero()[:, 0]
                flat, row = tree.index(flat, at), row[at]
            found.append(q.value(flat, owner[row], score) if scored else q.outputs(flat, owner[row]))
            rows = rows or len(row)

        def mean(*each: Tensor) -> Tensor:
            first = each[0]
            if not (first.is_floating_point() and first.ndim and first.shape[0] == rows):
                return first
            if weight is not None:
                share = weight.flatten()[weight.flatten() != 0]
                return first.new_zeros(count, *first.shape[1:]).index_add(0, row, first * tree.per_row(share, first))
            return torch.cat([t.reshape(count, -1, *t.shape[1:]) for t in each], 1).mean(1)

        average = tree.map_tensors(mean, *found)
        return average if scored else check_scores(use(average, take(q.target, owner)), count, use)

    # -- does the fill remove anything? -----------------------------------------------------------

    @cached_property
    def _is_told(self) -> bool:
        """Whether it is known beforehand what the fill changes, since it puts the same whatever is kept."""
        q = self.question
        if not getattr(self.fill, "fixed", False):
            return False
        size = max(1, q.field.chunk // int(getattr(self.fill, "draws", 1)))
        for owner in torch.arange(len(q), device=q.device).split(size):
            none = tree.apply(lambda x: torch.zeros_like(x, dtype=torch.bool), tree.index(q.x, owner))
            x, filled, _ = self._filled(none, owner, torch.zeros_like(owner))
            differs = tree.apply(_differs, x, filled)
            found = self._by_window(differs) if self.labels is None else self._by_player(differs, owner)
            if found is None:
                return False
            self.changed[owner.cpu()] = found
        return True

    @property
    def _looking(self) -> bool:
        """Whether it is still to be seen, as points are made, if the fill changes some player."""
        return not self._is_told and not bool((self.changed | ~self.own).all())

    def _expect(self, gone: Tensor | None, owner: Tensor) -> None:
        """Note what a fill leaves as it is where that is known before points are made.

        Args:
            gone: the players removed of each row; None for all.
            owner: the example each row belongs to.
        """
        if not self._is_told or bool((self.changed | ~self.own).all()):
            return
        who = owner.cpu()
        gone = torch.ones_like(self.own[who]) if gone is None else gone.cpu()
        self._note(self.removed, gone, who)
        self._check_changed()

    def _note(self, into: Tensor, found: Tensor, who: Tensor) -> None:
        """Set what is found of the rows of each example."""
        into |= torch.zeros(into.shape, dtype=torch.int32).index_add_(0, who, found.int()).bool() & self.own

    def _look(self, x: Tree, points: Tree, gone: Tensor, owner: Tensor) -> None:
        """Note which players the fill has changed something of, while there are any it was not seen to change."""
        if not self._looking:
            return
        who = owner.cpu()
        pending = gone.cpu() & self.own[who] & ~self.changed[who]
        if self.labels is None:  # of windows, only one that is absent alone can be told
            pending &= gone.cpu().sum(1, keepdim=True) == 1
        rows = pending.any(1).nonzero()[:, 0]
        if not len(rows):
            return
        at, pending = rows.to(owner.device), pending[rows]
        some = (tree.index(x, at), tree.index(points, at), owner[at])
        for into, found in ((self.removed, pending), (self.changed, self._moved(*some) & pending)):
            self._note(into, found, who[rows])
        self._check_changed()

    def _moved(self, x: Tree, points: Tree, owner: Tensor) -> Bool[Tensor, "R P"]:
        """Tell of which players some of the points [R, k, ...] differ from x; of windows, whether anything does."""
        differs = tree.apply(_differs, x, points)
        if self.labels is not None:
            return self._by_player(differs, owner)
        found = torch.stack([d.flatten(1).any(1) for d in tree.leaves(differs)]).any(0)
        return found.cpu()[:, None].expand(-1, self.players)

    def _by_window(self, element: Tree) -> Bool[Tensor, "R P"] | None:
        """Tell over what of which something is so each window lies; None where windows do not let it be told.

        Laying numbers of windows out is linear, so that its transpose counts elements.
        """
        assert isinstance(self.groups, Windows)
        leaves = tree.leaves(element)
        with torch.enable_grad():
            number = torch.zeros(len(leaves[0]), self.players, device=leaves[0].device, requires_grad=True)
            laid = tree.leaves(self.groups.total(number, self.question.x))
            total = torch.stack([(over * so).sum() for over, so in zip(laid, leaves, strict=True)]).sum()
        return (torch.autograd.grad(total, number)[0] > 0).cpu() if total.requires_grad else None

    def _by_player(self, element: Tree, owner: Tensor) -> Bool[Tensor, "R P"]:
        """Tell which players have an element of which something is so."""
        out = torch.zeros(len(owner), self.players + 1, dtype=torch.int32, device=owner.device)
        for leaf, label in zip(tree.leaves(element), tree.leaves(self.labels), strict=True):
            shared = [axis for axis in range(1, leaf.ndim) if label.shape[axis] == 1 < leaf.shape[axis]]
            leaf = leaf.any(tuple(shared), keepdim=True) if shared else leaf
            if self._in_order:
                return leaf.flatten(1).cpu()
            label = label.to(owner.device).flatten(1)
            slot = label.masked_fill(label < 0, self.players)
            out.scatter_add_(1, slot.expand(len(owner), -1) if len(slot) == 1 else slot[owner], leaf.flatten(1).int())
        return out[:, :-1].bool().cpu()

    @property
    def unchanged(self) -> Bool[Tensor, "B P"]:
        """Players that were removed, and stood there as before: the fill gives what the example has."""
        return self.removed & ~self.changed

    def _check_changed(self) -> None:
        same = (self.unchanged | ~self.own).all(1) & (self.sizes > 0)
        if bool(same.any()) and not getattr(self.fill, "may_repeat", False):
            example = int(same.nonzero()[0])
            raise InputError(
                f"a fill ({self._named}) that returns example {example} unchanged, for every one of its "
                f"{int(self.sizes[example])} player(s)",
                "something else than the example where players are absent",
                "choose a fill that differs from it, such as ap.fills.Baselines(ap.baselines.Noise())",
            )

    def warn_unchanged(self) -> None:
        """Record in the question which players the fill left as they were."""
        same = self.unchanged
        if bool(same.any()):
            example = int(same.any(1).nonzero()[0])
            named = same[example].nonzero()[:, 0].tolist()
            self.question.warn(
                f"{self._named} left {int(same.sum())} player(s) as they are, where it was looked: "
                f"of example {example}, {named[:8]}{' and more' if len(named) > 8 else ''}"
            )


def labels_of(groups: Groups, q: Question) -> Tree:
    """Name each element's player; groups that are given for each of the user's examples hold for points made of it."""
    derived = q is not q.root and q.field is q.root.field
    return labels_at(groups, q.x, q.root.x, q.in_root) if derived else groups.labels(q.x)


def labels_at(groups: Groups, rows: Tree, examples: Tree, owner: Tensor) -> Tree:
    """Name the players of points made of examples."""
    own: Any = getattr(groups, "labels_at", None)
    return groups.labels(rows) if own is None else own(rows, examples, owner)


def _blend(x: Tensor, mask: Tensor, other: Tensor) -> Tensor:
    """Keep x where the mask is 1, [R, k, ...]."""
    if mask.dtype == torch.bool:
        return tree.either(mask[:, None], x[:, None], other)
    return torch.lerp(other, x[:, None], mask[:, None].to(x.dtype))


def _differs(x: Tensor, points: Tensor) -> Tensor:
    """Tell which elements some of the points [R, k, ...] have otherwise."""
    return (points != x[:, None]).any(1)


def _gone(mask: Tensor) -> Tensor:
    """Tell what a mask removes; of a soft one, more than half."""
    return ~mask if mask.dtype == torch.bool else mask < 0.5


def hashed(masks: Tensor) -> np.ndarray:
    """Number coalitions by what they are; absent players behind the last one present change nothing."""
    raw = masks.numpy()
    raw = np.packbits(raw, axis=1) if raw.dtype == bool else np.ascontiguousarray(raw, "<f4").view(np.uint8)
    raw = np.pad(raw, ((0, 0), (0, -raw.shape[1] % 8)))
    words = np.ascontiguousarray(raw).view("<u8")
    place = np.arange(1, words.shape[1] + 1, dtype=np.uint64) * _GOLDEN
    mixed = np.where(words == 0, np.uint64(0), _mix(words + place))  # sums of the words alone would cancel
    return (_mix(mixed.sum(1, dtype=np.uint64)) >> np.uint64(1)).astype(np.int64)


def _present(x: Tree, labels: Tree) -> Tensor:
    """Tell which players each example has, and in the last column whether it has elements of none, [B, P + 1]."""
    flat = []
    for label, leaf in zip(tree.leaves(labels), tree.leaves(x), strict=True):
        try:
            label.expand_as(leaf)
        except RuntimeError as error:
            raise InputError(
                f"group labels of shape {tuple(label.shape)} for input {tuple(leaf.shape)}",
                "broadcastable shapes",
                "give labels of the input's shape, with 1 where they are shared",
            ) from error
        flat.append(label.cpu().reshape(len(label), -1))
    batch, players = tree.rows(x), 1 + max(int(f.max()) for f in flat)
    out = torch.zeros(batch, players + 1, dtype=torch.bool)
    for f in flat:
        f = f.masked_fill(f < 0, players)
        out |= torch.zeros(len(f), players + 1, dtype=torch.bool).scatter_(1, f, True)
    return out


def _check_used(present: Tensor, sizes: Tensor) -> None:
    empty = ~present & (torch.arange(present.shape[1]) < sizes[:, None])
    if bool(empty.any()):
        example = int(empty.any(1).nonzero()[0])
        raise InputError(
            f"groups {empty[example].nonzero()[:, 0].tolist()[:8]} without an element in example {example}",
            f"every number below {int(sizes[example])}, the largest label and 1, on some element",
            "number the groups without gaps: torch.unique(labels, return_inverse=True)[1]",
        )


def _spread(mask: Tensor, label: Tensor, owner: Tensor, like: Tensor) -> Tensor:
    """Give each element its player's mask; elements of no player (-1) are always kept."""
    label = label.to(mask.device)
    if len(label) > 1 and len(owner) and bool((owner == owner[0]).all()):
        label = label[owner[:1]]
    padded = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    slot = label.masked_fill(label < 0, mask.shape[1]).flatten(1)
    taken = padded.index_select(1, slot[0]) if len(slot) == 1 else padded.gather(1, slot[owner])
    return taken.reshape(len(mask), *label.shape[1:]).expand(-1, *like.shape[1:])


__all__ = ["Block", "Fill", "Game", "Weighted", "Windows"]
