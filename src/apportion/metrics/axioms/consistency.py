"""Local accuracy, missingness and consistency of additive explanations; continuity of maps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from apportion.core import tree
from apportion.core.attribution import Groups
from apportion.core.card import Kind, Paper
from apportion.core.errors import ConfigError, InputError, kind_of
from apportion.core.explainer import Passes
from apportion.core.game import Fill, Game
from apportion.core.question import Question
from apportion.metrics.axioms.completeness import relative_gap
from apportion.metrics.axioms.effects import few, one_baseline
from apportion.metrics.fidelity.copies import PURPOSE, explained
from apportion.metrics.metric import Found, Judges, Metric, MetricCard, Subject, as_asked, register
from apportion.metrics.ranking import by_player, players
from apportion.metrics.scores import Direction
from apportion.parts.baselines import Baseline, Zero
from apportion.parts.masks.fills import Baselines
from apportion.parts.masks.groups import Cells
from apportion.parts.masks.samplers import AllSubsets
from apportion.parts.noise import Gaussian, NoiseModel

_PAPER = Paper("Lundberg, Lee", 2017, "A unified approach to interpreting model predictions", "NeurIPS")


@register(
    MetricCard(
        title="Local accuracy",
        paper=_PAPER,
        intent="How far φ0 and the values of the features are from summing to the score.",
        direction=Direction.LOWER,
        range=(0.0, None),
        chance="1 for a map of zeros",
        cost="one row forward for each draw of the fill, and f(x)",
        kind=Kind.SALIENCE,
        cautions=("With a fill that draws from data φ0 is the mean score, and a method must explain from there.",),
    )
)
@dataclass(frozen=True)
class LocalAccuracy(Metric):
    """|φ0 + Σφ_i - f(x)| / |f(x) - φ0| with φ0 = v(∅), the score with all players filled.

    `Completeness` is the same against a baseline's score; here absence is the fill's, as `Marginal` draws from data,
    and elements of no player take no part. parts["gap"] is the signed difference.

    Undefined where v(∅) and f(x) differ by no more than rounding.

    Attributes:
        fill: absence; baselines of zero unless given.
        groups: the features; see `ranking.players`.

    Source: Lundberg and Lee (2017), property 1.

    >>> import apportion as ap
    >>> field, x = ap.Field(lambda x: 1 + 3 * x[:, 0]), torch.tensor([[2.0, 1.0]])
    >>> [LocalAccuracy()(field, x, torch.tensor([[v, 0.0]])).values.item() for v in (6.0, 3.0)]
    [0.0, 0.5]
    """

    fill: Fill = field(default_factory=Baselines)
    groups: Groups | None = None

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Score absence, and sum."""
        groups = players(q, self.groups)
        game = Game(q, groups, self.fill)
        none = game.value(torch.zeros(1, game.players, dtype=torch.bool))[:, 0].double()
        phi = by_player(q, subject.map(q), groups).double()
        return relative_gap(q, phi.sum(1), phi.abs().sum(1), none)

    def passes(self, q: Question) -> Passes:
        """Count what the fill draws, and f(x)."""
        return Passes(0, 0, 1, once=int(getattr(self.fill, "draws", 1)), exact=False)


@register(
    MetricCard(
        title="Missingness",
        paper=_PAPER,
        intent="How much of the map goes to features that are absent.",
        direction=Direction.LOWER,
        judges=Judges.EXPLAINER,
        range=(0.0, 1.0),
        chance="about 0.5, the share of absent features",
        cost="an explanation for each sample",
        cautions=("Absent means equal to the fill: an explainer with another baseline sees them present.",),
    )
)
@dataclass(frozen=True)
class Missingness(Metric):
    """Σ_{i absent} |φ_i| / Σ |φ_i| where half of the players, drawn at random, have been put to the baseline.

    The mean over `samples` such points. Lundberg and Lee ask for 0. The explainer keeps the baselines it has at x, so
    that what is absent can equal them, as with `Mean` in both.

    Undefined where a map is zero at every one of them.

    Attributes:
        fill: the baseline, with one draw.
        samples: points made of each example.
        groups: the players; see `ranking.players`.

    Raises:
        InputError: a single player.

    Source: Lundberg and Lee (2017), property 2.

    >>> import apportion as ap
    >>> field, x = ap.Field(lambda x: x.sum(1)), torch.ones(1, 4)
    >>> [Missingness()(field, x, m).values.item() for m in (ap.GradientTimesInput(), ap.Gradient())]
    [0.0, 0.5]
    """

    fill: Fill = field(default_factory=Baselines)
    samples: int = 4
    groups: Groups | None = None

    _positive = ("samples",)

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Put players away, and explain what is left."""
        groups = players(q, self.groups)
        game = Game(q, groups, self.fill)
        if int(game.sizes.min()) < 2:
            raise InputError("a single player for Missingness", "two or more", "give finer groups")
        shares = []
        for draw, owner in q.grid(self.samples, "points with absent players"):
            row, at = owner.cpu(), draw.cpu()
            drawn = q.stream("absent").uniform(torch.zeros(len(row), game.players), row, at)
            ranks = drawn.masked_fill(~game.own[row], 2.0).argsort(1).argsort(1)
            present = ranks >= (game.sizes // 2)[row][:, None]
            points = tree.apply(lambda r: r[:, 0], game.rows(present, owner, draw))
            there = q.at(points, owner, draw)  # not anew: baselines are those of x, with which the fill can agree
            size = by_player(there, explained(subject, there), groups).abs().double()
            shares.append((size.masked_fill(present.to(size.device), 0).sum(1)) / size.sum(1))
        found = torch.cat(shares).reshape(self.samples, len(q)).T
        return Found(found.nanmean(1), undefined={"maps of zeros": found.isnan().all(1)})

    def passes(self, q: Question) -> Passes:
        """Count the baseline."""
        return Passes(0, 0, 1, once=1, exact=False)

    def explanations(self, q: Question) -> int:
        """One for each sample."""
        return self.samples

    @classmethod
    def variants(cls) -> tuple[Metric, ...]:
        return (cls(samples=2),)


@register(
    MetricCard(
        title="Consistency",
        paper=_PAPER,
        intent="How much values move against what the players contribute, from one model to another.",
        direction=Direction.LOWER,
        judges=Judges.EXPLAINER,
        range=(0.0, 1.0),
        chance="0 for maps that know nothing of the model; about 0.5 for maps drawn anew for each model",
        blind_is_best=True,
        cost="every coalition of both models, and an explanation of each",
        cautions=(
            "One pair of models is tried: 0 shows no violation there. Adding a term violates few methods' consistency; "
            "pairs that nest otherwise violate more.",
        ),
    )
)
@dataclass(frozen=True)
class Consistency(Metric):
    """Σ (φ_i(f) - φ_i(f'))⁺ / Σ (|φ_i(f)| + |φ_i(f')|) over players i whose contributions are nowhere smaller in f'.

    That is, f'(S ∪ i) - f'(S) ≥ f(S ∪ i) - f(S) for every coalition S, which is looked up by playing all of them; to
    1e-6 of the range of scores. Players for whom ≤ holds count in the other direction, and where both do any change is
    wrong. parts["players"] counts those that can be compared.

    Undefined where there are none, and where both maps are zero.

    Attributes:
        other: f'; unless given f(z) + weight · mean |z - x'|, to which every element adds, made of ReLUs.
        weight: of that term, in units of the score.
        baseline: x', what stands in for absent players, one point for all examples.
        groups: the players; see `ranking.players`.
        most: the largest number of players.

    Raises:
        InputError: more players.
        ConfigError: an `other` that is no function, or `External`.

    Source: Lundberg and Lee (2017), property 3.

    >>> import apportion as ap
    >>> f, x = ap.Field(lambda x: x[:, 0] * x[:, 1]), torch.tensor([[-1.0, 2.0]])
    >>> [round(Consistency()(f, x, m).values.item(), 3) for m in (ap.Shapley(), ap.Gradient())]
    [0.0, 0.1]
    """

    other: Any = None
    weight: float = 1.0
    baseline: Baseline = field(default_factory=Zero)
    groups: Groups | None = None
    most: int = 12

    _positive = ("most", "weight")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.other is not None and not callable(self.other):
            raise ConfigError(f"{kind_of(self.other)} as other", "a model, or None", "give another network")

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Compare contributions, then values."""
        _ = subject.for_any_model  # refuses functions
        groups = players(q, self.groups)
        model = _Added(q.field.model, one_baseline(q, self.baseline), self.weight) if self.other is None else self.other
        other = q.field.with_model(model).bind(q.inputs, as_asked(q.target), q.ids, q.seed)
        plays, values, own = [], [], None
        for one in (q, other):
            game = Game(one, groups, Baselines(self.baseline))
            few(game.players, self.most)
            plays.append(torch.cat([game.value(block) for block in AllSubsets(self.most).blocks(game)], 1).double())
            made = explained(subject, one.at(one.x, one.owners, torch.zeros_like(one.owners)))
            values.append(by_player(one, made, groups).double())
            own = game.own.to(q.device)
        q.charge(other.account)
        assert own is not None
        least = 1e-6 * torch.stack([v.amax(1) - v.amin(1) for v in plays]).amax(0)
        more = plays[1] - plays[0]
        up, down = [], []
        for i in range(own.shape[1]):
            without, with_ = more.reshape(len(q), -1, 2, 1 << i).unbind(2)
            change = (with_ - without).flatten(1)
            up.append((change >= -least[:, None]).all(1))
            down.append((change <= least[:, None]).all(1))
        rises, falls = torch.stack(up, 1) & own, torch.stack(down, 1) & own
        moved = values[1] - values[0]
        wrong = torch.where(rises, (-moved).clamp(min=0), 0) + torch.where(falls, moved.clamp(min=0), 0)
        size = torch.where(rises | falls, values[0].abs() + values[1].abs(), 0).sum(1)
        none = ~(rises | falls).any(1)
        return Found(
            torch.where(size > 0, wrong.sum(1) / size, torch.nan),
            parts={"players": (rises | falls).sum(1)},
            undefined={"no player can be compared": none, "maps of zeros": (size == 0) & ~none},
        )

    def passes(self, q: Question) -> Passes:
        """Count coalitions of both."""
        labels = tree.leaves(players(q, self.groups).labels(q.x))
        return Passes(2 << 1 + max(int(one.max()) for one in labels), 0, 2, once=2, exact=False)

    def explanations(self, q: Question) -> int:
        """Once for each model."""
        return 2

    def questions(self, q: Question) -> int:
        """As many."""
        return self.explanations(q)

    @classmethod
    def variants(cls) -> tuple[Metric, ...]:
        return (cls(groups=Cells(2)),)


class _Added(nn.Module):
    """A network to each of whose outputs weight · mean |z - x'| is added."""

    def __init__(self, model: Any, base: Tensor, weight: float) -> None:
        super().__init__()
        self.model, self.base, self.weight = model, base, weight

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = self.model(x, *args, **kwargs)
        away = x - self.base.to(x)
        size = (torch.relu(away) + torch.relu(-away)).flatten(1).mean(1)
        return out + self.weight * size.reshape(-1, *[1] * (out.ndim - 1))


@register(
    MetricCard(
        title="Continuity",
        paper=Paper(
            "Montavon, Samek, Müller",
            2018,
            "Methods for interpreting and understanding deep neural networks",
            "Digital Signal Processing 73",
        ),
        intent="The largest change of the map for the change of the input, along a small translation.",
        direction=Direction.LOWER,
        judges=Judges.EXPLAINER,
        range=(0.0, None),
        cost="an explanation for each position",
        cautions=(
            "It is in units of the map per unit of input: maps in other units do not compare.",
            "A constant map is the most continuous of all.",
        ),
    )
)
@dataclass(frozen=True)
class Continuity(Metric):
    """max_{x≠x'} ‖R(x) - R(x')‖₁ / ‖x - x'‖₂ over all pairs of positions of the translated example.

    parts["neighbors"] is the largest over positions one step apart.

    Undefined where every position looks the same.

    Attributes:
        steps: pixels by which the picture moves, either way, along `axis`.
        axis: of the input, counted from the end: 1 for width, 2 for height.
        pad: what comes in at the border, in units of x.
        noise: moves at random instead, `steps` copies and the example itself, such as `ap.noise.Gaussian(0.01)`; for
            inputs that cannot be translated.

    Raises:
        InputError: translating several inputs, or examples without such an axis.

    Source: Montavon et al. (2018), section on explanation continuity.

    >>> import apportion as ap
    >>> field, x = ap.Field(lambda x: x.sum((1, 2, 3))), torch.eye(3, dtype=torch.float64)[None, None]
    >>> [round(Continuity(1)(field, x, m).values.item(), 3) for m in (ap.Gradient(), ap.GradientTimesInput())]
    [0.0, 2.236]
    """

    steps: int = 4
    axis: int = 1
    pad: float = 0.0
    noise: NoiseModel | None = None

    _positive = ("steps", "axis")

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Move, explain, and compare all pairs."""
        if self.noise is None and not (isinstance(q.x, Tensor) and q.x.ndim > self.axis + 1):
            given = tuple(q.x.shape) if isinstance(q.x, Tensor) else "several inputs"
            raise InputError(
                f"translation of {given} along axis {self.axis} from the end",
                "pictures or sequences with channels",
                "write noise=ap.noise.Gaussian(0.01)",
            )
        where, maps = [], []
        for draw, owner in q.grid(self.explanations(q), "positions"):
            rows = self._moved(q, draw, owner)
            where.append(_flat(rows))
            maps.append(_flat(explained(subject, q.anew(rows, owner, draw))))
        x, r = (torch.cat(t).unflatten(0, (-1, len(q))).transpose(0, 1) for t in (where, maps))
        away, far = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist"), torch.cdist(r, r, p=1)
        ratio = torch.where(away > 0, far / away, 0.0)
        still = (away == 0).flatten(1).all(1)
        near = ratio.diagonal(1, 1, 2).amax(1) if self.noise is None else ratio[:, 0].amax(1)
        return Found(
            ratio.flatten(1).amax(1).masked_fill(still, torch.nan),
            parts={"neighbors": near},
            undefined={"all positions look the same": still},
        )

    def _moved(self, q: Question, draw: Tensor, owner: Tensor) -> Any:
        if self.noise is not None:
            noisy = self.noise(q, owner, draw, PURPOSE)
            return tree.apply(
                lambda n, x: torch.where((draw == 0).reshape(-1, *[1] * (n.ndim - 1)), x[owner], n), noisy, q.x
            )
        rows, by = q.x[owner], (draw - self.steps).to(q.device)
        length = rows.shape[-self.axis]
        shape = [1] * rows.ndim
        shape[0], shape[-self.axis] = len(rows), length
        source = (torch.arange(length, device=rows.device) - by[:, None]).reshape(shape)
        inside = (source >= 0) & (source < length)
        moved = rows.gather(rows.ndim - self.axis, source.clamp(0, length - 1).expand_as(rows))
        return torch.where(inside, moved, self.pad)

    def explanations(self, q: Question) -> int:
        """One for each position."""
        return self.steps + 1 if self.noise is not None else 2 * self.steps + 1

    def questions(self, q: Question) -> int:
        """Each is compared with baselines of its own."""
        return self.explanations(q)

    @classmethod
    def variants(cls) -> tuple[Metric, ...]:
        return (cls(1), cls(2, noise=Gaussian(0.1)))


def _flat(rows: Any) -> Tensor:
    return torch.cat([tree.wide(leaf).flatten(1) for leaf in tree.leaves(rows)], 1)
