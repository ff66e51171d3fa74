"""Allocation of effects: whether a map hands out all of what features do, alone and together, and to the right ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from apportion.core import tree
from apportion.core.attribution import Groups
from apportion.core.card import Kind, Paper
from apportion.core.explainer import Passes
from apportion.core.game import Fill, Game
from apportion.core.question import Question
from apportion.core.tree import Tree
from apportion.metrics.axioms.effects import Effects, HarsanyiEffects, Shares, few, shares
from apportion.metrics.fidelity.copies import by_example, copies, minus, norm
from apportion.metrics.metric import Found, Judges, Metric, MetricCard, Subject, register
from apportion.metrics.ranking import by_player, players
from apportion.metrics.scores import Direction
from apportion.parts.masks.dividends import harsanyi
from apportion.parts.masks.fills import Baselines
from apportion.parts.masks.groups import Cells
from apportion.parts.noise import Gaussian, NoiseModel

_PAPER = Paper(
    "Deng, Zou, Du, Chen, Feng, Yang, Li, Zhang",
    2024,
    "Unifying fourteen post-hoc attribution methods with Taylor interactions",
    "IEEE TPAMI",
)


@register(
    MetricCard(
        title="Effect completeness",
        paper=_PAPER,
        intent="How far the values are from summing to all effects of features, alone and together.",
        direction=Direction.LOWER,
        range=(0.0, None),
        chance="up to 1 for a map of zeros, less where effects cancel",
        cost="one row forward for every coalition",
        kind=Kind.SALIENCE,
        cautions=("Effects given to the wrong features count as given: see `AllocationCorrectness`.",),
    )
)
@dataclass(frozen=True)
class EffectCompleteness(Metric):
    """|Σφ - Σ_S a(S)| / Σ_S |a(S)| over the Harsanyi dividends a(S) of all coalitions but the empty one.

    Taylor effects of the same players add up to a(S), so that their total is this one's. It differs from completeness
    in what is divided by: effects that cancel make no gap look large.

    parts["effects"] has the dividends, in the order of `AllSubsets`; parts["gap"] is the difference in units of the
    score.

    Undefined where no coalition has an effect.

    Attributes:
        fill: what stands in for absent players.
        groups: the players; see `ranking.players`.
        most: the largest number of players.

    Raises:
        InputError: more players.

    Source: Deng et al. (2024), as summed up in section IV-D of Deng et al. (2025).

    >>> import apportion as ap
    >>> field, x = ap.Field(lambda x: x[:, 0] * x[:, 1]), torch.tensor([[2.0, 3.0]])
    >>> [EffectCompleteness()(field, x, m).values.item() for m in (ap.Shapley(), ap.GradientTimesInput())]
    [0.0, 1.0]
    """

    fill: Fill = field(default_factory=Baselines)
    groups: Groups | None = None
    most: int = 12

    _positive = ("most",)

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Play every coalition."""
        groups = players(q, self.groups)
        game = Game(q, groups, self.fill)
        few(game.players, self.most)
        effects = harsanyi(game, self.most).double()[:, 1:]
        total = effects.abs().sum(1)
        gap = by_player(q, subject.map(q), groups).double().sum(1) - effects.sum(1)
        return Found(
            torch.where(total > 0, gap.abs() / total, torch.nan),
            parts={"effects": effects, "gap": gap},
            undefined={"no effects": total == 0},
        )

    def passes(self, q: Question) -> Passes:
        """Count coalitions."""
        return Passes(1 << _count(q, self.groups), 0, 1, once=1, exact=False)

    @classmethod
    def variants(cls) -> tuple[Metric, ...]:
        return (cls(groups=Cells(2)),)


@dataclass(frozen=True)
class _OfEffects(Metric):
    """Base of what is measured effect by effect."""

    effects: Effects = field(default_factory=HarsanyiEffects)
    groups: Groups | None = None

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Explain effects one by one, and add up what is wrong."""
        found = shares(q, subject, self.effects, self.groups)
        total = found.effects.abs().sum(1)
        return Found(
            torch.where(total > 0, self._wrong(found) / total, torch.nan),
            parts={"weights": found.weights, "effects": found.effects},
            undefined={"no effects": total == 0},
        )

    def _wrong(self, found: Shares) -> Tensor:
        raise NotImplementedError

    def passes(self, q: Question) -> Passes:
        """Count f_S(x) for each effect, and the baseline's row."""
        return Passes(0, 0, self.explanations(q) + 1, once=1, exact=False)

    def explanations(self, q: Question) -> int:
        """Once for each effect; rows of an effect are several of the network's."""
        return sum(1 for _ in self.effects.split(q, players(q, self.groups)))

    def questions(self, q: Question) -> int:
        """As many."""
        return self.explanations(q)

    @classmethod
    def variants(cls) -> tuple[Metric, ...]:
        return (cls(groups=Cells(2)),)


@register(
    MetricCard(
        title="Allocation correctness",
        paper=_PAPER,
        intent="How much of each effect goes to features that have no part in it.",
        direction=Direction.LOWER,
        judges=Judges.EXPLAINER,
        range=(0.0, None),
        cost="the explainer's for each effect, whose rows are up to 2^n of the network's",
        cautions=(
            "Methods that are not linear in the function may treat an effect alone otherwise than among others.",
            "The explainer's baseline should be that of the effects, else another split is judged.",
        ),
    )
)
@dataclass(frozen=True)
class AllocationCorrectness(_OfEffects):
    """Σ_S Σ_{i∉S} |φ_i(f_S)| / Σ_S |f_S(x)|: what outsiders get when each effect is explained by itself.

    For methods that are linear in the function, φ_i(f_S) / f_S(x) is the weight w_{i,S} with which they hand the effect
    out; the principle asks for 0 outside S. `parts["weights"]` [B, K, P] has them all, and parts["effects"] the f_S(x).

    Undefined where no effect differs from 0.

    Attributes:
        effects: how the function is split: `HarsanyiEffects()`, or `TaylorEffects()` for polynomials.
        groups: the players; see `ranking.players`.

    Source: Deng et al. (2024); equation 16 and section IV-D of Deng et al. (2025).

    >>> import apportion as ap
    >>> net = ap.planted.Polynomial({(1, 1, 0): 1.0})                       # x1 x2, and x3 does nothing
    >>> field, x = ap.Field(net), torch.tensor([[2.0, 3.0, 5.0]])
    >>> one, two = ap.GradientTimesInput(), ap.Occlusion(ap.groups.Labels(torch.tensor([0, 1, 1])))
    >>> [AllocationCorrectness()(field, x, m).values.item() for m in (one, two)]    # x2 and x3 share what both get
    [0.0, 0.5]
    """

    def _wrong(self, found: Shares) -> Tensor:
        return (found.values.abs() * ~found.members).sum((1, 2))


@register(
    MetricCard(
        title="Allocation completeness",
        paper=_PAPER,
        intent="How far the features that have part in an effect are from sharing all of it, and no more.",
        direction=Direction.LOWER,
        judges=Judges.EXPLAINER,
        range=(0.0, None),
        chance="1 where members get nothing",
        cost="as for allocation correctness, with which it shares all explanations",
        cautions=("How members share is left open: equal shares and all to one are both complete.",),
    )
)
@dataclass(frozen=True)
class AllocationCompleteness(_OfEffects):
    """Σ_S |Σ_{i∈S} φ_i(f_S) - f_S(x)| / Σ_S |f_S(x)|: whether weights within each effect sum to 1.

    Occlusion gives each of n members the whole effect, which makes n - 1; gradient × input gives x_i its exponent as
    weight. Fields and parts are those of `AllocationCorrectness`.

    Undefined where no effect differs from 0.

    Attributes:
        effects: what is handed out, `HarsanyiEffects()` unless given.
        groups: players.

    Source: Deng et al. (2024), the last of their three principles.

    >>> import apportion as ap
    >>> field, x = ap.Field(ap.planted.Polynomial({(1, 1): 1.0})), torch.tensor([[2.0, 3.0]])
    >>> [AllocationCompleteness()(field, x, m).values.item() for m in (ap.Shapley(), ap.Occlusion())]
    [0.0, 1.0]
    """

    def _wrong(self, found: Shares) -> Tensor:
        return ((found.values * found.members).sum(2) - found.effects).abs().sum(1)


@register(
    MetricCard(
        title="Weak dependence",
        paper=Paper(
            "Srinivas, Fleuret", 2019, "Full-gradient representation for neural network visualization", "NeurIPS"
        ),
        intent="How far the map moves with the input while the network computes the same linear function.",
        direction=Direction.LOWER,
        judges=Judges.EXPLAINER,
        range=(0.0, None),
        chance="about 1 for gradient × input",
        cost="an explanation and a gradient for each copy, and one gradient",
        cautions=(
            "No map is complete and weakly dependent on every piecewise linear function: a choice is measured.",
            "Only piecewise linear functions have pieces: the logits of ReLU networks with max-pooling.",
        ),
    )
)
@dataclass(frozen=True)
class WeakDependence(Metric):
    """max over x' in the linear piece of x of (‖φ(x') - φ(x)‖ / ‖φ(x)‖) / (‖x' - x‖ / ‖x‖).

    In a piece f(z) = w·z + b the map may depend on w and b only, so that 0 is asked for. Copies x' are drawn near x;
    one counts if its gradient agrees with that at x to `least` of its norm, and f(x') with w·x' + b.

    parts["copies"] counts those.

    Undefined where no copy is in the piece, for a map of zeros beside one that is not, and for an input of zeros.

    Attributes:
        noise: how copies are drawn; normal with standard deviation 1e-3 unless given.
        samples: copies of each example.
        least: relative difference below which gradients count as equal.

    Source: Srinivas and Fleuret (2019), weak dependence on inputs; definition 5 of Akhtar and Jalwana (2023).

    >>> import apportion as ap
    >>> f, x = ap.Field(lambda x: torch.relu(x).sum(1)), torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    >>> far = [WeakDependence()(f, x, m).values.item() for m in (ap.Gradient(), ap.GradientTimesInput())]
    >>> [round(v, 6) for v in far]
    [0.0, 1.0]
    """

    noise: NoiseModel = Gaussian(1e-3, relative=False)
    samples: int = 10
    least: float = 1e-5

    _positive = ("samples", "least")

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Explain copies, and keep those in the piece."""
        at = torch.arange(len(q), device=q.device)
        fx, slope = q.value_and_grad(q.x, at)
        phi, inside, far = subject.map(q), [], []
        steep, size, width = norm(slope), norm(phi), norm(q.x)
        rounding = 64 * max(
            torch.finfo(t.dtype).eps for t in tree.leaves(phi) if t.is_floating_point()
        )  # another one in every batch
        for rows, owner, _, again in copies(q, subject, self.noise, self.samples):
            value, there = q.value_and_grad(rows, owner)
            moves = minus(rows, q.x, owner)
            told = _inner(slope, moves, owner)
            same = norm(minus(there, slope, owner)) <= self.least * steep[owner]
            rest = (value.double() - fx.double()[owner] - told).abs()
            inside.append(
                (same & (rest <= self.least * (fx.double()[owner].abs() + steep[owner] * norm(moves)))).double()
            )
            change = norm(minus(again, phi, owner))
            far.append(torch.where(change <= rounding * size[owner], 0.0, change / norm(moves)))
        counts, moved = by_example(inside, len(q)) > 0, by_example(far, len(q))
        worst = torch.where(counts, moved, 0.0).amax(1)
        values = torch.where(worst == 0, 0.0, worst * width / size)
        none, zero, origin = ~counts.any(1), (size == 0) & (worst > 0), width == 0
        return Found(
            values.masked_fill(none | zero | origin, torch.nan),
            parts={"copies": counts.sum(1)},
            undefined={
                "no copy in the linear piece": none,
                "a map of zeros beside one that is not": zero & ~none,
                "an input of zeros": origin & ~none,
            },
        )

    def passes(self, q: Question) -> Passes:
        """Count a gradient for each copy, and the map and the gradient at x."""
        return Passes(self.samples, self.samples, 1, once=1, once_backward=1, exact=False)

    def explanations(self, q: Question) -> int:
        """One for each copy."""
        return self.samples

    def questions(self, q: Question) -> int:
        """As many, since baselines are made for each."""
        return self.explanations(q)

    @classmethod
    def variants(cls) -> tuple[Metric, ...]:
        return (cls(samples=3),)


def _inner(slope: Tree, moves: Tree, owner: Tensor) -> Tensor:
    """Give w·(x' - x) of each row."""
    return tree.total(tree.apply(lambda g, m: tree.wide(g)[owner] * m, slope, moves))


def _count(q: Question, groups: Groups | None) -> int:
    return 1 + max(int(one.max()) for one in tree.leaves(players(q, groups).labels(q.x)))
