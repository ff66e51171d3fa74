"""Baselines that need nothing but the example."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.core import tree
from apportion.core.config import Configurable
from apportion.core.errors import BaselineError, kind_of
from apportion.core.explainer import Passes
from apportion.core.field import Field
from apportion.core.question import Question
from apportion.core.site import Input
from apportion.core.tree import Tree


@dataclass(frozen=True)
class Baseline(Configurable):
    """Base of the baselines; called with a question, it gives [B, k, ...] points at the field's site."""

    example: ClassVar[str] = "ap.baselines.Zero(), or ap.baselines.Given(tensor)"

    @property
    def draws(self) -> int:
        """How many baselines each example gets."""
        return 1

    @property
    def rows(self) -> int:
        """Rows sent forward per example in making them."""
        return 0

    @property
    def backward_rows(self) -> int:
        """Rows sent backward per example in making them."""
        return 0

    @property
    def exact(self) -> bool:
        """Whether every example costs that many rows, rather than at most that many."""
        return True

    @property
    def random(self) -> bool:
        """Whether they are drawn, and change with the seed."""
        return False

    def added_to(self, passes: Passes, *, scored: bool = True) -> Passes:
        """Add what it costs to make these baselines, and to score them unless the passes do, once per example."""
        return passes._replace(
            once=passes.once + (self.draws if scored else 0) + self.rows,
            once_backward=passes.once_backward + self.backward_rows,
            exact=passes.exact and self.exact,
        )

    def check(self, field: Field) -> None:
        """Refuse a field on which no example could have these baselines, before anything is asked.

        Raises:
            BaselineError: with what to declare.
        """

    @abstractmethod
    def __call__(self, q: Question) -> Tree:
        """Make the baselines for the examples of the question."""


def is_at_input(q: Question) -> bool:
    """Tell whether the points asked for stand at the model's input, also for a field at an inner site.

    `AtInput` asks with the inputs themselves as x.
    """
    pairs = zip(tree.leaves(q.x), tree.leaves(q.inputs), strict=False)
    return isinstance(q.field.site, Input) or all(a.data_ptr() == b.data_ptr() for a, b in pairs)


def bounds_of(q: Question) -> tuple[float, float] | None:
    """Give the bounds that hold where the points stand: the field's at its input, none at an inner site."""
    return q.field.bounds if is_at_input(q) else None


def needed_bounds(q: Question, name: str, fix: str) -> tuple[float, float]:
    """Give the bounds for a baseline that has no meaning without.

    Args:
        q: the question.
        name: whose baseline it is.
        fix: what else would do.

    Raises:
        BaselineError: the field declares none, or has a site where they do not hold.
    """
    found = bounds_of(q)
    if found is None:
        raise no_bounds(q.field, name, fix)
    return found


def no_bounds(field: Field, name: str, fix: str) -> BaselineError:
    """Say what a baseline between bounds misses; arguments as for `needed_bounds`."""
    given = "no bounds" if field.bounds is None else f"bounds of the input only, at site {field.site}"
    return BaselineError(
        f"{name} on a field with {given}",
        "the lowest and highest admissible value",
        f"declare Field(..., bounds=(0, 1)), or {fix}",
    )


def _one(fn, q: Question) -> Tree:
    return tree.apply(lambda x: fn(x)[:, None], q.x)


@dataclass(frozen=True)
class Zero(Baseline):
    """0 everywhere: black for pictures in [0, 1], the mean colour for normalized ones."""

    def __call__(self, q: Question) -> Tree:
        return _one(lambda x: x.new_zeros(()).expand_as(x), q)


@dataclass(frozen=True)
class Constant(Baseline):
    """One number everywhere, or one per channel (axis 1).

    Attributes:
        value: a number, or one for each channel.
    """

    value: float | tuple[float, ...]

    def __call__(self, q: Question) -> Tree:
        def fill(x: Tensor) -> Tensor:
            v = torch.tensor(self.value, dtype=x.dtype, device=x.device)
            if v.ndim:
                if x.ndim < 2 or x.shape[1] != len(v):
                    raise BaselineError(
                        f"{len(v)} channel values for input {tuple(x.shape)}",
                        "one per entry of axis 1",
                        "give one value for all, or one per channel",
                    )
                v = v.reshape(1, -1, *[1] * (x.ndim - 2))
            return v.expand_as(x)

        return _one(fill, q)


@dataclass(frozen=True)
class Mean(Baseline):
    """Each example's own mean, per channel or over everything (IG(A) of Akhtar and Jalwana 2023).

    Attributes:
        per_channel: average within each entry of axis 1 rather than over the whole example.
    """

    per_channel: bool = True

    def __call__(self, q: Question) -> Tree:
        def mean(x: Tensor) -> Tensor:
            axes = tuple(range(2 if self.per_channel and x.ndim > 2 else 1, x.ndim))
            return x.mean(axes, keepdim=True).expand_as(x) if axes else x

        return _one(mean, q)


@dataclass(frozen=True)
class Blurred(Baseline):
    """The example under a Gaussian blur over its last one or two axes, with reflecting borders.

    Attributes:
        sigma: standard deviation of the kernel, in elements (pixels).
    """

    _positive = ("sigma",)

    sigma: float

    def __call__(self, q: Question) -> Tree:
        return _one(lambda x: blur(x, self.sigma), q)


def blur_matrix(size: int, sigma: float, like: Tensor, cut: float = 4.0) -> Float[Tensor, "size size"]:
    """Write a one-dimensional Gaussian blur as a matrix; each row sums to 1.

    The kernel is cut at that many sigma and normalized; beyond the border the signal is mirrored, edge repeated.

    >>> blur_matrix(3, 1.0, torch.zeros(1)).sum(1)
    tensor([1., 1., 1.])
    """
    radius = max(1, int(cut * sigma + 0.5))
    offset = torch.arange(-radius, radius + 1)
    weight = torch.exp(-0.5 * (offset.double() / sigma) ** 2)
    weight = weight / weight.sum()
    at = (torch.arange(size)[:, None] + offset).remainder(2 * size)
    at = torch.where(at >= size, 2 * size - 1 - at, at)
    out = torch.zeros(size, size, dtype=torch.float64)
    out.scatter_add_(1, at, weight.expand(size, -1))
    return out.to(like.device, like.dtype)


def blur(x: Float[Tensor, "R *shape"], sigma: float, cut: float = 4.0) -> Float[Tensor, "R *shape"]:
    """Blur the last two axes of [R, C, H, W], or the last of [R, C, T]; the kernel is cut at that many sigma.

    Raises:
        BaselineError: another number of axes.
    """
    if x.ndim not in (3, 4):
        raise BaselineError(
            f"a blur of input {tuple(x.shape)}",
            "[R, C, H, W] or [R, C, T]",
            "blurring needs neighbours; use another",
        )
    out = x @ blur_matrix(x.shape[-1], sigma, x, cut).T
    return blur_matrix(x.shape[-2], sigma, x, cut) @ out if x.ndim == 4 else out


@dataclass(frozen=True)
class Noise(Baseline):
    """Random points: mean + sigma n with n ~ N(0, 1) (IG(G) of Akhtar and Jalwana 2023), or U(0, 1) scaled.

    Attributes:
        sigma: standard deviation; for the uniform kind half the width.
        mean: centre.
        count: baselines per example; their explanations are averaged.
        uniform: draw uniformly from [mean - sigma, mean + sigma].
        clip: clip the draws to the field's bounds, which the distribution above knows nothing of.

    Raises:
        BaselineError: `clip` without bounds.

    >>> import apportion as ap
    >>> q = ap.Field(lambda x: x.sum(1), bounds=(0, 1)).bind(torch.full((1, 50), 0.5))
    >>> draws = Noise(2.0, clip=True)(q)
    >>> draws.min().item(), draws.max().item()
    (0.0, 1.0)
    """

    _positive = ("sigma", "count")

    sigma: float = 1.0
    mean: float = 0.0
    count: int = 1
    uniform: bool = False
    clip: bool = False

    @property
    def random(self) -> bool:
        return True

    @property
    def draws(self) -> int:
        return self.count

    def __call__(self, q: Question) -> Tree:
        limits = needed_bounds(q, "Noise(clip=True)", "leave clip out") if self.clip else (None, None)
        stream, batch = q.stream("baseline noise"), len(q)
        owner = torch.arange(batch).repeat_interleave(self.count)
        draw = torch.arange(self.count).repeat(batch)
        n = stream.uniform(q.x, owner, draw) if self.uniform else stream.normal(q.x, owner, draw)
        low = -1.0 if self.uniform else 0.0
        scale = 2 * self.sigma if self.uniform else self.sigma
        shift = self.mean + low * self.sigma

        def place(t: Tensor) -> Tensor:
            points = shift + scale * t
            return (points.clamp(*limits) if self.clip else points).unflatten(0, (batch, self.count))

        return tree.apply(place, n)


@dataclass(frozen=True, eq=False)  # tensors have no single truth value
class Given(Baseline):
    """A tensor (or tree) of one's own: [1, ...] or [...] for all examples, [B, ...] for each.

    Attributes:
        value: the baseline, at the field's site.
    """

    value: Tree

    def of_each(self, x: Tree) -> bool:
        """Tell whether there is a baseline for each of these examples, and not one for all."""
        pairs = zip(tree.leaves(self.value), tree.leaves(x), strict=False)
        return any(v.ndim == t.ndim and len(v) > 1 for v, t in pairs)

    def __call__(self, q: Question) -> Tree:
        def fit(x: Tensor, v: Tensor) -> Tensor:
            if not isinstance(v, Tensor):
                raise BaselineError(f"{kind_of(v)} as baseline", "a torch.Tensor", "use Constant for numbers")
            if not tree.is_dense(v):
                raise BaselineError("a sparse or nested baseline", "dense tensors", "convert it with .to_dense()")
            if tuple(v.shape) == tuple(x.shape[1:]):
                v = v[None]
            if tuple(v.shape[1:]) != tuple(x.shape[1:]) or v.shape[0] not in (1, count):
                raise BaselineError(
                    f"a baseline of shape {tuple(v.shape)} for input {(count, *x.shape[1:])}",
                    f"shape {(1, *x.shape[1:])} or {(count, *x.shape[1:])}",
                    "index or expand it to one of these shapes",
                )
            if q.field.precision is not None and v.is_floating_point():
                v = v.to(x.dtype)  # as the input itself was
            if v.dtype != x.dtype or v.device != x.device:
                raise BaselineError(
                    f"a baseline of {v.dtype} on {v.device}",
                    f"{x.dtype} on {x.device}, as the input",
                    "convert it with .to(x)",
                )
            return (v if len(v) == 1 else v[q.in_root]).expand_as(x)[:, None]  # a copy has what its example has

        count = len(q.root)
        try:
            return tree.apply(fit, q.x, self.value)
        except TypeError as error:
            raise BaselineError(
                f"a baseline of names {tree.names(self.value)}",
                f"the input's structure {tree.names(q.x)}",
                "build Given with the structure of x",
            ) from error


@dataclass(frozen=True)
class AtInput(Baseline):
    """A baseline made at the model's input and carried forward to the field's site.

    Attributes:
        base: the baseline at the input.
    """

    base: Baseline

    @property
    def draws(self) -> int:
        return self.base.draws

    @property
    def random(self) -> bool:
        return self.base.random

    @property
    def rows(self) -> int:
        return self.base.draws + self.base.rows

    @property
    def backward_rows(self) -> int:
        return self.base.backward_rows

    @property
    def exact(self) -> bool:
        return self.base.exact

    def __call__(self, q: Question) -> Tree:
        return q.carry(self.base)


@dataclass(frozen=True)
class Several(Baseline):
    """The baselines of several kinds, one after another; their explanations are averaged with equal weight.

    A base that draws random points draws others here than in another place of the tuple, so that two alike
    give independent points; the first draws what it draws alone.

    Attributes:
        bases: the baselines.

    Raises:
        BaselineError: no bases.

    >>> Several((Zero(), Noise(count=3))).draws
    4
    """

    bases: tuple[Baseline, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.bases:
            raise BaselineError("Several of no baselines", "one or more", "write Several((Zero(), Blurred(8)))")

    @property
    def draws(self) -> int:
        return sum(b.draws for b in self.bases)

    @property
    def random(self) -> bool:
        return any(b.random for b in self.bases)

    @property
    def rows(self) -> int:
        return sum(b.rows for b in self.bases)

    @property
    def backward_rows(self) -> int:
        return sum(b.backward_rows for b in self.bases)

    @property
    def exact(self) -> bool:
        return all(b.exact for b in self.bases)

    def __call__(self, q: Question) -> Tree:
        owner = torch.arange(len(q), device=q.device)
        made = []
        for place, base in enumerate(self.bases):
            # the same examples with streams of their own
            asked = q if place == 0 else q.at(q.x, owner, torch.full_like(owner, place))
            made.append(base(asked))
        return tree.apply(lambda *each: torch.cat(each, 1), *made)
