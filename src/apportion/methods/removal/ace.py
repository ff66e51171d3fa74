"""Average causal effect."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.core import tree
from apportion.core.attribution import Attribution
from apportion.core.card import Card, Family, Kind, Need, Paper, Principle
from apportion.core.errors import ConfigError, InputError
from apportion.core.explainer import Explainer, Passes
from apportion.core.field import Field
from apportion.core.question import Question
from apportion.core.registry import register
from apportion.core.tree import Tree
from apportion.parts.feature_moments import FeatureMoments
from apportion.parts.quadrature import Gauss, Quadrature

CARD = Card(
    title="Average causal effect",
    paper=Paper(
        "Chattopadhyay, Manupriya, Sarkar, Balasubramanian",
        2019,
        "Neural network attributions: a causal perspective",
        "ICML 2019, arXiv:1902.02302",
    ),
    kind=Kind.SALIENCE,
    intent="What setting a feature to its value does to the expected score, against its average over the range.",
    cost="features × (nodes + 1) × rank of the covariance forward, twice that backward",
    families=(Family.PERTURBATION,),
    unjudged="Deng et al. 2025 list it among perturbation methods and judge it nowhere",
    measured={
        Principle.COMPLETENESS: False,
        Principle.DUMMY: True,
        Principle.LINEARITY: True,
        Principle.SYMMETRY: False,
        Principle.IMPLEMENTATION_INVARIANCE: True,
    },
    needs=frozenset({Need.DATA, Need.VECTORS}),
    cautions=(
        "The expectation is a Taylor expansion of second order around the data's mean; with ReLU alone the second "
        "order is 0, and what is left is the score at the mean.",
        "Where the score bends within the spread of the data, the expansion can be far off, in sign as well: look at "
        "the mean of many ICE curves beside it, as ap.effect_curves gives them.",
        "The other features keep their mean whatever is done to one: causal only where inputs do not cause each other.",
        "Depends on the example through the value of the feature alone: two examples that share it share its effect.",
        "The range over which the baseline averages decides the values; it is that of the data unless given.",
    ),
)


class Expected(NamedTuple):
    """Interventional expectations at the values asked for.

    Attributes:
        value: their estimate.
        error: its standard error; 0 where traces are exact.
    """

    value: Float[Tensor, "B n"]
    error: Float[Tensor, "B n"]


@register(CARD)
@dataclass(frozen=True)
class ACE(Explainer):
    """E[f | do(xᵢ = α)] at the example's own α, minus its mean over the range of the feature.

    Chattopadhyay et al. 2019: the expectation is f(μ) + ½ Tr(H C) at μ = the data's mean with μᵢ = α, where row and
    column i of the covariance C are 0. Exact for quadratic scores. Values are in units of the score.

    Attributes:
        moments: mean, covariance and range, from `ap.FeatureMoments.fit(data)`.
        quadrature: nodes over the range, for the mean that is taken off; the paper's 1000 equal steps are
            `ap.quadrature.Midpoint(1000)`.
        probes: take each trace as the mean over so many random directions instead of exactly, for many features.

    Raises:
        ConfigError: no moments.
        InputError: examples that are no rows of features, or of others than the moments.

    >>> import torch, apportion as ap
    >>> data = torch.tensor([[-1.0, 0.0], [3.0, 1.0], [1.0, 2.0]])
    >>> field = ap.Field(lambda x: 2 * x[:, 0] + x[:, 1])
    >>> ap.ACE(ap.FeatureMoments.fit(data))(field, torch.tensor([[2.0, 1.0]])).values.round(decimals=3)
    tensor([[2., 0.]])
    """

    moments: FeatureMoments | None = None
    quadrature: Quadrature = Gauss(8)
    probes: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.probes is not None and self.probes < 2:
            raise ConfigError(
                f"ACE(probes={self.probes})", "None for exact traces, or at least 2", "write probes=8, for example"
            )

    def fitted(self, field: Field, data: Tree) -> Explainer:
        return self if self.moments is not None else replace(self, moments=FeatureMoments.fit(data))

    def explain(self, q: Question) -> Attribution:
        x, (low, high), nodes = features(q), self.range(q), self.quadrature.nodes(q)
        d, n = x.shape[1], nodes.count
        at = low + nodes.t.to(x)[:, None] * (high - low)
        beyond = ((x < low) | (x > high)).any(0)
        if bool(beyond.any()):
            q.warn(f"values of feature(s) {beyond.nonzero()[:5, 0].tolist()} lie outside the range of the data")
        alpha = torch.cat([at.T.expand(len(x), d, n), x[..., None]], 2)
        which = torch.arange(d, device=q.device).repeat_interleave(n + 1)
        found = self.expected(q, which, alpha.flatten(1))
        value, error = (t.unflatten(1, (d, n + 1)) for t in found)
        weight = nodes.edges.diff().to(x)
        parts: dict[str, Tree] = {}
        if self.probes is not None:
            parts["standard_error"] = (error[..., n] ** 2 + (error[..., :n] ** 2 * weight**2).sum(2)).sqrt()
        mean = (value[..., :n] * weight).sum(2)
        return q.attribution(self, value[..., n] - mean, parts={**parts, "mean_over_range": mean})

    def range(self, q: Question) -> tuple[Tensor, Tensor]:
        """Give the least and the largest value of each feature."""
        known = self._learned(q)
        return known.low.to(features(q)), known.high.to(features(q))

    def expected(self, q: Question, which: Int[Tensor, " n"], alpha: Float[Tensor, "B n"]) -> Expected:
        """Estimate E[f | do(xᵢ = α)] for each example's class.

        Args:
            q: the question.
            which: the feature i of each column.
            alpha: what it is set to.
        """
        x, known = features(q), self._learned(q)
        mean, factor = known.mean.to(x), known.factor.to(x)
        directions = self.directions(q)
        total, square, first = (x.new_zeros(len(x), len(which)) for _ in range(3))
        stream = q.stream("traces of the average causal effect")
        for step, owner in q.grid(len(which) * directions, "average causal effect"):
            column, k = step // directions, step % directions
            rows = mean.expand(len(step), -1).clone()
            rows.scatter_(1, which[column, None], alpha[owner, column, None])
            if self.probes is None:
                along = factor[k]
            else:
                coin = stream.uniform(x.new_zeros(1, len(factor)), owner, step)
                along = torch.where(coin < 0.5, -1.0, 1.0).to(x) @ factor
            along = along.scatter(1, which[column, None], 0)
            value, _, bent = q.hvp(rows, owner, along)
            trace = (along * bent).sum(1)
            at = (owner, column)
            first.index_put_(at, value / directions, accumulate=True)
            total.index_put_(at, trace, accumulate=True)
            square.index_put_(at, trace**2, accumulate=True)
        if self.probes is None:
            return Expected(first + total / 2, torch.zeros_like(first))
        spread = (square - total**2 / directions).clamp(min=0) / (directions - 1)
        return Expected(first + total / (2 * directions), (spread / directions).sqrt() / 2)

    def directions(self, q: Question) -> int:
        """Count the Hessian-vector products of one trace."""
        return len(self._learned(q).factor) if self.probes is None else self.probes

    def _learned(self, q: Question) -> FeatureMoments:
        if self.moments is None:
            raise ConfigError(
                "ACE without moments", "those of data like the examples", "write ap.ACE(ap.FeatureMoments.fit(data))"
            )
        wide = features(q).shape[1]
        if len(self.moments.mean) != wide:
            raise InputError(
                f"moments of {len(self.moments.mean)} features for examples of {wide}",
                "the features of the examples",
                "fit the moments on data like the examples",
            )
        return self.moments

    def passes(self, q: Question | None = None) -> Passes:
        if q is None:
            raise ConfigError(
                "passes of ACE without a question",
                "one, since they depend on the features",
                "write passes(field.bind(x))",
            )
        if self.moments is None and self.probes is None:
            rank = features(q).shape[1]  # at most: fewer examples than features give fewer
            return Passes(*self._rows(q, rank), at_x=1, exact=False)
        return Passes(*self._rows(q, self.directions(q)), at_x=1)

    def _rows(self, q: Question, directions: int) -> tuple[int, int]:
        rows = features(q).shape[1] * (self.quadrature.n + 1) * directions
        return rows, 2 * rows

    @classmethod
    def variants(cls) -> tuple[Explainer, ...]:
        return (cls(quadrature=Gauss(2)), cls(quadrature=Gauss(2), probes=2))


def features(q: Question) -> Float[Tensor, "B d"]:
    """Give the examples as rows of features.

    Raises:
        InputError: they are something else.
    """
    if not isinstance(q.x, Tensor) or q.x.ndim != 2:
        shapes = [tuple(t.shape) for t in tree.leaves(q.x)]
        raise InputError(
            f"average causal effects of input {shapes}", "rows of features [B, d]", "use Occlusion for pictures"
        )
    return q.x
