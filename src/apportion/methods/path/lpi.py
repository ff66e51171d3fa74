"""Local path integration."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from apportion.core import tree
from apportion.core.card import Card, Family, Kind, Paper, Principle, Total
from apportion.core.errors import ConfigError
from apportion.core.explainer import Explainer
from apportion.core.question import Question
from apportion.core.registry import register
from apportion.parts.baselines import Baseline, Neighbours, Noise
from apportion.parts.baselines.data import like_input
from apportion.parts.paths.explainer import PathExplainer
from apportion.parts.paths.path import Path, Walk
from apportion.parts.paths.straight import Straight
from apportion.parts.quadrature import Midpoint, MonteCarlo, Quadrature

CARD = Card(
    title="Local path integration",
    paper=Paper(
        "Yang, Akhtar, Wen, Mian",
        2023,
        "Local path integration for attribution",
        "AAAI 2023, doi:10.1609/aaai.v37i3.25422",
    ),
    kind=Kind.SALIENCE,
    intent="Integrated gradients from training examples that the model sees as near, each line sampled at random.",
    cost="n k + k forward, n k backward (n places on the lines from k neighbours), and 1 forward to find them",
    families=(Family.GRADIENT_TIMES_INPUT, Family.PATH),
    measured={
        Principle.COMPLETENESS: False,
        Principle.DUMMY: True,
        Principle.LINEARITY: True,
        Principle.SYMMETRY: False,
        Principle.IMPLEMENTATION_INVARIANCE: True,
    },
    total=Total.DIFFERENCE,
    differentiable=True,
    cautions=(
        "Local only with neighbours fitted to your data: without, baselines are uniform noise in [0, 1].",
        "Says what sets the example apart from others like it, not what makes up its score.",
        "Random places on the lines make it complete in expectation only; give a grid as quadrature for less noise.",
        "The authors' code weights references and then averages plainly, so that values shrink with their number; and "
        "it pairs steps with the wrong references.",
    ),
)


@dataclass(frozen=True)
class WeightedLines(Straight):
    """Straight lines from `Neighbours` that count by the share of the cluster each one stands for."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.baseline, Neighbours):
            raise ConfigError(
                f"weights by density with {type(self.baseline).__name__}",
                "baselines that know their density",
                "write baseline=ap.baselines.Neighbours.fit(field, data, clusters=..., count=...)",
            )

    def walk(self, q: Question, *, rises: bool = False) -> Walk:
        walk = super().walk(q, rises=rises)
        return replace(walk, weight=self._density(q, walk.references().rows).to(q.fx))

    def _density(self, q: Question, rows: tree.Tree) -> Tensor:
        """Find each example's cluster by the rows it got, which needs no pass."""
        assert isinstance(self.baseline, Neighbours)  # by `__post_init__`
        known = like_input(q, self.baseline.references, "neighbours", axes=2)
        found = torch.zeros(len(q), dtype=torch.long, device=q.device)
        for c in reversed(range(len(self.baseline.density))):
            pairs = zip(tree.leaves(rows), tree.leaves(known), strict=True)
            same = torch.stack([(r == k[c]).flatten(1).all(1) for r, k in pairs]).all(0)
            found[same] = c
        return self.baseline.density.to(q.device)[found]


@register(CARD)
@dataclass(frozen=True)
class LPI(PathExplainer):
    """Σ_j w_j (x - r_j) ⊙ mean over α of ∇f(r_j + α (x - r_j)), r_j being neighbours of x; Yang et al. 2023.

    Every (neighbour, step) pair has an α of its own, drawn uniformly from [0, 1], as in the authors' experiments;
    any rule may take its place. Values are in units of the score, with each neighbour's own map in
    `parts["per_baseline"]`.

    Attributes:
        baseline: the neighbours r_j: `ap.baselines.Neighbours`, fitted to training data.
        quadrature: the places α on every line.
        weights: w_j equal, or by "density", the share of its cluster that r_j stands for. Either way they sum
            to 1, and the values to f(x) - Σ_j w_j f(r_j).

    Raises:
        ConfigError: densities asked of baselines that have none.

    >>> import torch, apportion as ap
    >>> field = ap.Field(lambda x: torch.stack([x[:, 0], -x[:, 0]], 1), precision=torch.float64)
    >>> data = torch.tensor([[-2.0], [-2.0], [-3.0], [5.0]])
    >>> near = ap.baselines.Neighbours.fit(field, data, clusters=2, count=2)
    >>> x = torch.tensor([[0.0]])
    >>> [float(LPI(near, weights=w)(field, x, target=0).values.round(decimals=4)) for w in ("equal", "density")]
    [2.5, 2.3333]
    """

    baseline: Baseline = Noise(0.5, mean=0.5, count=20, uniform=True)
    quadrature: Quadrature = MonteCarlo(5)
    weights: Literal["equal", "density"] = "equal"

    @property
    def way(self) -> Path:
        kind = WeightedLines if self.weights == "density" else Straight
        return kind(self.baseline, quadrature=self.quadrature)

    @classmethod
    def variants(cls) -> tuple[Explainer, ...]:
        return (cls(Noise(0.5, mean=0.5, count=4, uniform=True), MonteCarlo(2)), cls(Noise(0.5, count=3), Midpoint(3)))
