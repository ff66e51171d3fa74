"""Statistics of an explainer over noisy copies of each example, streamed."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.core import tree
from apportion.core.attribution import Domain
from apportion.core.errors import ConfigError
from apportion.core.explainer import Explainer, Passes
from apportion.core.question import Question
from apportion.core.tree import Tree
from apportion.parts.noise import Gaussian


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of an explainer's values over the copies of each example.

    Attributes:
        mean: of the values.
        variance: of the values, divided by the number of copies.
        domain: the base's.
        claimed_total: the mean of what the base claims per copy; None where it claims nothing.
        groups: of values on groups, which element is in which.
        parts: the means of those of the base's parts that are one number per example, such as shares of biases.
    """

    mean: Tree
    variance: Tree
    domain: Domain
    claimed_total: Float[Tensor, " B"] | None
    groups: Tree
    parts: Mapping[str, Float[Tensor, " B"]]


def moments(q: Question, base: Explainer, noise: Gaussian, samples: int, what: str) -> Moments:
    """Run the base on `samples` noisy copies of each example and gather moments on the way.

    Sums are of differences from each example's first copy, so that the variance of a constant is exactly 0.

    Args:
        q: the question; its targets and baselines hold for all copies.
        base: what is run on them.
        noise: makes the copies.
        samples: copies per example.
        what: the name for progress.
    """
    return q.share(moments_key(base, noise, samples), lambda: _moments(q, base, noise, samples, what))


def moments_key(base: Explainer, noise: Gaussian, samples: int) -> Hashable:
    """Name moments, which are the same for all methods that make something of them."""
    return "moments", base, noise, samples


def _moments(q: Question, base: Explainer, noise: Gaussian, samples: int, what: str) -> Moments:
    first = total = square = like = None
    claim: Tensor | None = None
    domain, groups = Domain.INPUT, None
    parts: dict[str, Tensor] = {}
    for draw, owner in q.grid(samples, what):
        one = base.explain(q.at(noise(q, owner, draw), owner, draw))
        domain, groups = one.domain, one.groups
        if groups is not None and any(len(label) > 1 for label in tree.leaves(groups)):
            raise ConfigError(
                f"groups of {type(base).__name__} that differ from copy to copy",
                "groups that are the same for all",
                "fix them, ap.groups.Labels(ap.groups.Superpixels().labels(x[:1])), or use ap.groups.Squares",
            )
        if first is None:
            like, (first, total, square) = one.values, (tree.sums(one.values, len(q)) for _ in range(3))
            claim = None if one.claimed_total is None else one.claimed_total.new_zeros(len(q))
        start = draw == 0
        if bool(start.any()):
            for f, v in zip(tree.leaves(first), tree.leaves(one.values), strict=True):
                f[owner[start]] = v[start].to(f.dtype)
        away = tree.apply(lambda v, f, owner=owner: v - f[owner], one.values, first)
        tree.add_rows(total, owner, away)
        tree.add_rows(square, owner, tree.apply(torch.square, away))
        for name, part in one.parts.items():
            if isinstance(part, Tensor) and part.is_floating_point() and part.shape == owner.shape:
                if name not in parts:
                    parts[name] = tree.sums(part, len(q))
                tree.add_rows(parts[name], owner, part / samples)
        if claim is not None and one.claimed_total is not None:
            claim.index_add_(0, owner, one.claimed_total)
    mean = tree.apply(lambda f, t: f + t / samples, first, total)
    variance = tree.apply(lambda t, s: (s / samples - (t / samples) ** 2).clamp_(min=0), total, square)
    mean, variance = tree.narrow(mean, like), tree.narrow(variance, like)
    return Moments(mean, variance, domain, None if claim is None else claim / samples, groups, parts)


def wrapped(base: Explainer, samples: int, q: Question | None = None) -> Passes:
    """Count the passes of a base on copies; its own f(x) is a forward row of each copy."""
    b = base.passes(q)
    return b._replace(forward=samples * (b.forward + b.at_x), backward=samples * b.backward, at_x=1)
