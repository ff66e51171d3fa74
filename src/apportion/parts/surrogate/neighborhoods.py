"""Neighborhoods: where around an example a surrogate is fitted, and what it sees of each sample."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.core import tree
from apportion.core.card import Kind
from apportion.core.config import Configurable
from apportion.core.explainer import Explainer
from apportion.core.progress import tick
from apportion.core.protocols import Owner
from apportion.core.question import Question
from apportion.core.tree import Tree
from apportion.parts.noise import Gaussian


class Drawn(NamedTuple):
    """Samples of every example.

    Attributes:
        z: as the surrogate sees them.
        v: the score at each.
        w: how much each counts before the kernel: 1 unless the sampler weighs them, 0 for what an example has not.
    """

    z: Float[Tensor, "B N P"]
    v: Float[Tensor, "B N"]
    w: Float[Tensor, "B N"]


class Local(ABC):
    """A neighborhood of the examples of one question.

    Attributes:
        center: the examples' own features.
        present: which features each example has.
        own: how many samples of a run, its first, are the example itself.
        if_few: what to do where too few samples of re-runs are new to the fit.
        if_idle: what to do about features that never change.
        if_poor: what to do where the score is not linear in the features.
        if_repeats: what follows for the R² where runs repeat themselves.
    """

    own: int = 0
    if_few: str = "draw more"
    if_idle: str = "draw more samples"
    if_poor: str = "take fewer or other players, or a narrower kernel"
    if_repeats: str = "every run has the same samples"
    center: Float[Tensor, "B P"]
    present: Bool[Tensor, "B P"]

    @abstractmethod
    def draw(self, run: int, first: int, count: int, active: Bool[Tensor, " B"] | None = None) -> Drawn:
        """Draw samples, and ask the model for the score at each.

        Args:
            run: numbers independent repetitions.
            first: the number of the first sample within its run; sample 0 may be the example itself.
            count: how many.
            active: the examples that are asked; the others' samples count 0.
        """

    def repeats(self) -> Bool[Tensor, " B"]:
        """Tell of each example whether every run has the same samples: nothing is left to chance, or held out."""
        return self.present.new_zeros(len(self.present))

    def numbered(self, drawn: Drawn, run: int) -> Int[Tensor, "B N"]:
        """Number samples from 0, alike where they are the same; here no two are."""
        return torch.arange(drawn.v.shape[1], device=drawn.v.device).expand(drawn.v.shape) + (run << 32)

    def answer(self, explainer: Explainer, coefficients: Tensor, error: Tensor, parts: Mapping[str, Tree]) -> Any:
        """Give the result, shaped as this neighborhood's features are."""
        raise NotImplementedError


@dataclass(frozen=True)
class Neighborhood(Configurable):
    """Base of neighborhoods made of points, not of coalitions of players."""

    example: ClassVar[str] = "ap.surrogates.Quartiles.fit(data)"
    kind: ClassVar[Kind] = Kind.SALIENCE
    own: ClassVar[int] = 1
    """How many samples of a run are the example itself."""

    @abstractmethod
    def around(self, q: Question) -> Local:
        """Make the neighborhood of a question's examples."""

    def fitted(self, data: Tree) -> Neighborhood:
        """Give the neighborhood with what it must learn from data; most have nothing to learn."""
        return self


class Points(Local):
    """Samples that are points of their own, not mixtures of example and fill."""

    def __init__(self, q: Question, own: int) -> None:
        self.q, self.own = q, own

    @abstractmethod
    def sample(self, run: int, owner: Owner, draw: Owner) -> tuple[Tree, Float[Tensor, "R P"]]:
        """Draw points and their features."""

    def draw(self, run: int, first: int, count: int, active: Bool[Tensor, " B"] | None = None) -> Drawn:
        q, batch = self.q, len(self.q)
        own = self.own if first == 0 else 0
        asked = torch.arange(batch, device=q.device) if active is None else active.nonzero()[:, 0].to(q.device)
        z = torch.zeros(batch, count, self.center.shape[1], dtype=torch.float64, device=q.device)
        v = torch.zeros(batch, count, dtype=torch.float64, device=q.device)
        if own:
            z[:, 0], v[:, 0] = self.center, q.fx.double()
        total, start = (count - own) * len(asked), 0
        while start < total:  # as Question.grid, over those asked alone
            at = torch.arange(start, min(start + q.field.chunk, total), device=q.device)
            step, owner = own + at // len(asked), asked[at % len(asked)]
            points, features = self.sample(run, owner, first + step)
            z[owner, step], v[owner, step] = features.double(), q.value(points, owner).double()
            start += len(at)
            tick("samples", start, total)
        w = torch.ones_like(v)
        return Drawn(z, v, w if active is None else w * active.to(w)[:, None])

    def answer(self, explainer: Explainer, coefficients: Tensor, error: Tensor, parts: Mapping[str, Tree]) -> Any:
        like = self.q.x
        more = {**parts, "standard_error": laid_out(error, like)}
        return self.q.attribution(explainer, laid_out(coefficients, like), parts=more)


def laid_out(values: Float[Tensor, "B P"], like: Tree) -> Tree:
    """Give one number per element the shape of the input."""
    flat, start = [], 0
    for leaf in tree.leaves(like):
        size = leaf[0].numel()
        flat.append(values[:, start : start + size].reshape(-1, *leaf.shape[1:]).to(leaf.dtype))
        start += size
    return tree.rebuild(like, flat)


def flat(x: Tree) -> Float[Tensor, "B P"]:
    """Lay all elements of each example side by side, in float64."""
    return torch.cat([leaf.flatten(1).double() for leaf in tree.leaves(x)], 1)


@dataclass(frozen=True)
class Cloud(Neighborhood):
    """Gaussian noise around the example; the surrogate sees the displacement, in units of the input.

    Attributes:
        noise: its width.
    """

    kind: ClassVar[Kind] = Kind.SENSITIVITY
    own: ClassVar[int] = 0

    noise: Gaussian = Gaussian()

    def around(self, q: Question) -> Local:
        return _Cloud(q, self.noise)


class _Cloud(Points):
    if_poor = "take less noise"

    def __init__(self, q: Question, noise: Gaussian) -> None:
        super().__init__(q, own=0)
        self.noise = noise
        self.center = torch.zeros_like(flat(q.x))
        self.present = torch.ones_like(self.center, dtype=torch.bool)

    def sample(self, run: int, owner: Owner, draw: Owner) -> tuple[Tree, Tensor]:
        points = self.noise(self.q, owner, draw + (run << 32))
        return points, flat(points) - flat(self.q.x)[owner]
