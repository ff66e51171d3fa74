"""Fills: what stands where a mask removes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from apportion.core import tree
from apportion.core.attribution import References
from apportion.core.derivative import is_memory
from apportion.core.errors import ApportionError, InputError, kind_of
from apportion.core.explainer import Passes
from apportion.core.protocols import Owner
from apportion.core.question import Question
from apportion.core.tree import Tree
from apportion.parts.baselines import Baseline, Given, Zero
from apportion.parts.masks.conditional import Conditional
from apportion.parts.masks.fill import Fill
from apportion.parts.masks.noisy_linear import NoisyLinear
from apportion.parts.masks.patch_gaussian import ConditionalGaussian


@dataclass(frozen=True)
class Baselines(Fill):
    """A baseline's values; several baselines are several draws.

    With `ap.baselines` these are constants, the example's own mean, the mean of data, a blurred example.

    Attributes:
        base: the baseline.
    """

    fixed: ClassVar[bool] = True

    base: Baseline = Zero()

    @property
    def draws(self) -> int:
        return self.base.draws

    @property
    def random(self) -> bool:
        return self.base.random

    def references(self, q: Question) -> References | None:
        return q.references(self.base)

    def added_to(self, passes: Passes) -> Passes:
        return self.base.added_to(passes)

    def __call__(self, q: Question, mask: Tree, owner: Owner, draw: Int[Tensor, " R"]) -> Tree:
        return tree.of_owners(q.baseline_rows(self.base), owner)


@dataclass(frozen=True, eq=False)  # tensors have no single truth value
class Marginal(Fill):
    """Rows of a data set, whatever the example: the marginal distribution; each row is a draw.

    Attributes:
        data: [k, ...] rows.
    """

    fixed: ClassVar[bool] = True

    data: Tree

    @property
    def draws(self) -> int:
        first = tree.leaves(self.data)[0]
        return max(1, len(first)) if isinstance(first, Tensor) else 1  # no rows at all are refused by the call

    def __call__(self, q: Question, mask: Tree, owner: Owner, draw: Int[Tensor, " R"]) -> Tree:
        def spread(x: Tensor, d: Tensor) -> Tensor:
            if not isinstance(d, Tensor) or d.shape[1:] != x.shape[1:] or d.dtype != x.dtype or not len(d):
                if not isinstance(d, Tensor):
                    raise InputError(
                        f"{kind_of(d)} as background rows", "a torch.Tensor", "convert with torch.as_tensor"
                    )
                raise InputError(
                    f"background rows {tuple(d.shape)} of {d.dtype}",
                    f"[k, {tuple(x.shape[1:])}] of {x.dtype}, k at least 1",
                    "take rows of the data the examples come from",
                )
            return d.to(x.device).expand(len(owner), *d.shape)

        try:
            return tree.apply(spread, q.x, self.data)
        except TypeError as error:
            raise InputError(
                f"background rows {tree.names(self.data)}",
                f"the input's {tree.names(q.x)}",
                "build the data with the structure of x",
            ) from error


@dataclass(frozen=True)
class FreshNoise(Fill):
    """Random numbers drawn anew for every coalition: mean + sigma n, n ~ N(0, 1).

    `Baselines(ap.baselines.Noise())` draws once for an example instead, and puts the same wherever a player is absent.

    Attributes:
        sigma: standard deviation, in units of the input.
        mean: centre.
        count: draws for each coalition.

    >>> import apportion as ap
    >>> q = ap.Field(lambda x: x.sum(1)).bind(torch.zeros(1, 2))
    >>> FreshNoise(count=3)(q, torch.zeros(4, 2), torch.zeros(4, dtype=torch.long), torch.arange(4)).shape
    torch.Size([4, 3, 2])
    """

    _positive = ("sigma", "count")

    sigma: float = 1.0
    mean: float = 0.0
    count: int = 1

    @property
    def draws(self) -> int:
        return self.count

    @property
    def random(self) -> bool:
        return True

    def __call__(self, q: Question, mask: Tree, owner: Owner, draw: Int[Tensor, " R"]) -> Tree:
        like = tree.apply(lambda x: x[:1, None].expand(1, self.count, *x.shape[1:]), q.x)
        return tree.apply(lambda n: self.mean + self.sigma * n, q.stream("fresh noise").normal(like, owner, draw))


@dataclass(frozen=True)
class SegmentMean(Fill):
    """The mean of the player's own elements, channel by channel: a superpixel in its mean colour, as LIME paints it.

    Raises:
        InputError: windows that overlap, whose elements have no one segment.

    >>> import apportion as ap
    >>> field, halves = ap.Field(lambda x: x[..., 0].flatten(1).sum(1)), ap.groups.Labels(torch.tensor([[0, 0, 1, 1]]))
    >>> game = ap.Game(field.bind(torch.arange(4.0).reshape(1, 1, 1, 4)), halves, SegmentMean())
    >>> game.value(torch.zeros(1, 2))
    tensor([[0.5000]])
    """

    def within(self, q: Question, labels: Tree) -> Fill:
        if labels is None:
            raise InputError("the mean of segments that overlap", "a partition", "use Squares, Superpixels or Labels")

        def mean(x: Tensor, label: Tensor) -> Tensor:
            own = label.to(x.device).expand_as(x)
            own = own.flatten(2) if x.ndim > 2 else own.flatten(1)[:, None]
            values = x.reshape(own.shape)
            at = own.masked_fill(own < 0, int(own.max()) + 1)
            empty = values.new_zeros(*values.shape[:2], int(at.max()) + 1)
            total = empty.scatter_add(2, at, values)
            count = empty.scatter_add(2, at, torch.ones_like(values))
            return (total / count.clamp(min=1)).gather(2, at).reshape(x.shape)

        return Baselines(Given(tree.apply(mean, q.x, labels)))

    def __call__(self, q: Question, mask: Tree, owner: Owner, draw: Int[Tensor, " R"]) -> Tree:
        raise InputError("the mean of segments without segments", "a game", "play it with ap.Game, or by a method")


@dataclass(frozen=True, eq=False)
class MaskToken(Fill):
    """The embedding of a mask token (or of padding) at every absent position of [B, T, features].

    Attributes:
        vector: [features].

    Raises:
        InputError: positions with other features.

    >>> MaskToken.of(nn.Embedding.from_pretrained(torch.eye(3)), 1).vector
    tensor([0., 1., 0.])
    """

    vector: Float[Tensor, " D"]

    @classmethod
    def of(cls, embedding: nn.Embedding, token: int) -> MaskToken:
        """Take the row of a token from the embedding that is explained."""
        return cls(embedding.weight.detach()[token].clone())

    def within(self, q: Question, labels: Tree) -> Fill:
        x = q.x
        if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[2] != len(self.vector):
            shapes = [tuple(t.shape) for t in tree.leaves(x)]
            raise InputError(
                f"a token of {len(self.vector)} features for {shapes}",
                f"[B, T, {len(self.vector)}]",
                "explain at the embedding, Field(model, site=ap.At('its name'))",
            )
        return Baselines(Given(self.vector.to(x).expand(x.shape[1:])[None]))

    def __call__(self, q: Question, mask: Tree, owner: Owner, draw: Int[Tensor, " R"]) -> Tree:
        return self.within(q, None)(q, mask, owner, draw)  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class Inpainted(Fill):
    """What a function of the user's paints, such as a generative model.

    Attributes:
        paint: takes examples [R, ...] and what of them is kept, 1 or 0, in the same shape, and gives points
            [R, ...], or [R, count, ...]; what it gives where the example is kept is not used.
        count: how many draws it gives.

    Raises:
        InputError: it gives another shape.

    >>> import apportion as ap
    >>> q = ap.Field(lambda x: x.sum(1)).bind(torch.ones(1, 2))
    >>> half = Inpainted(lambda x, kept: (x * kept).sum(1, keepdim=True).expand_as(x) / 2)
    >>> game = ap.Game(q, ap.groups.Elements(), half)
    >>> game.value(torch.tensor([[True, False]]))
    tensor([[1.5000]])
    """

    _positive = ("count",)

    paint: Callable[[Tree, Tree], Tree]
    count: int = 1

    @property
    def draws(self) -> int:
        return self.count

    def __call__(self, q: Question, mask: Tree, owner: Owner, draw: Int[Tensor, " R"]) -> Tree:
        x = tree.index(q.x, owner)
        shapes = [tuple(leaf.shape) for leaf in tree.leaves(x)]

        def fit(leaf: Tensor, painted: Tensor) -> Tensor:
            if not isinstance(painted, Tensor):
                raise InputError(f"{kind_of(painted)} painted for {tuple(leaf.shape)}", "a tensor", "return points")
            painted = painted[:, None] if tuple(painted.shape) == tuple(leaf.shape) else painted
            if tuple(painted.shape) != (len(leaf), self.count, *leaf.shape[1:]):
                raise InputError(
                    f"points painted of shape {tuple(painted.shape)} for {tuple(leaf.shape)}",
                    f"shape {tuple(leaf.shape)}, or with {self.count} draws on the second axis",
                    "return one point per row",
                )
            return painted.to(leaf)

        kept = tree.apply(lambda m, leaf: m.to(leaf.dtype), mask, x)
        try:
            found = self.paint(x, kept)
        except ApportionError:
            raise
        except Exception as error:
            if is_memory(error):
                raise
            raise InputError(
                f"a function that paints raised {type(error).__name__} on examples of shapes {shapes}: {error}",
                "a function of the examples and of what is kept of them",
                "call it yourself on x and torch.ones_like(x) to see",
            ) from error
        try:
            return tree.apply(fit, x, found)
        except TypeError as error:
            raise InputError(
                f"{kind_of(found)} painted, for examples of shapes {shapes}",
                "points with the structure of x",
                "return what the model takes",
            ) from error


__all__ = [
    "Baselines",
    "Conditional",
    "ConditionalGaussian",
    "Fill",
    "FreshNoise",
    "Inpainted",
    "Marginal",
    "MaskToken",
    "NoisyLinear",
    "SegmentMean",
]
