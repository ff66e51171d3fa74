"""Effects: a function split into parts of which each needs all of some players, and nothing else."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from apportion.core.attribution import Groups
from apportion.core.config import Configurable
from apportion.core.errors import InputError, ModelError, ScoreError, kind_of
from apportion.core.protocols import Baseline
from apportion.core.question import Question
from apportion.core.score import Logit
from apportion.core.site import Input
from apportion.metrics.fidelity.copies import explained
from apportion.metrics.metric import Subject, as_asked
from apportion.metrics.ranking import by_player, players
from apportion.parts.baselines import Zero
from apportion.planted.polynomial import Polynomial


@dataclass(frozen=True, eq=False)  # subclasses say what makes them equal
class Effects(Configurable):
    """Base of the ways to split a function into effects."""

    @abstractmethod
    def split(self, q: Question, groups: Groups) -> Iterator[tuple[nn.Module, Bool[Tensor, " P"]]]:
        """Give each effect but the constant: a network that is 0 without its players, and which players those are."""


@dataclass(frozen=True)
class HarsanyiEffects(Effects):
    """f_S(z) = Σ_{T ⊆ S} (-1)^{|S|-|T|} f(z on T, x' elsewhere), one for each coalition S; f_S(x) is its dividend.

    All of them add up to f(z) - f(x'). A row of f_S is 2^|S| rows of the network.

    Attributes:
        baseline: x', one point for all examples.
        most: the largest number of players; 2^n - 1 effects are explained.

    Raises:
        InputError: more players, players that differ among examples, or several baselines.
        ModelError: several inputs.

    Source: Harsanyi (1963), written as functions so that an explainer can be asked about each.
    """

    baseline: Baseline = field(default_factory=Zero)
    most: int = 8

    _positive = ("most",)

    def split(self, q: Question, groups: Groups) -> Iterator[tuple[nn.Module, Bool[Tensor, " P"]]]:
        """Go over coalitions, in the order of `AllSubsets`."""
        labels, base = _labels(q, groups), one_baseline(q, self.baseline)
        count = few(int(labels.max()) + 1, self.most)
        for s in range(1, 1 << count):
            inside = ((torch.tensor(s) >> torch.arange(count)) & 1).bool()
            yield _OfCoalition(q.field.model, labels, base, inside), inside


@dataclass(frozen=True)
class TaylorEffects(Effects):
    """The terms c_κ Π (z_i - x'_i)^κ_i of the Taylor series at x', one for each κ; of a `planted.Polynomial` only.

    All terms of the same players add up to their Harsanyi effect; alone they are something else: (z1 - x'1)² z2 and
    z1 (z2 - x'2)² share one coalition, and a method may treat them differently. ReLU networks have no such series:
    their derivatives from the second on are 0 wherever they exist.

    Attributes:
        baseline: x', one point for all examples.

    Raises:
        ModelError: another model.

    Source: Deng et al. (2024), "Unifying fourteen post-hoc attribution methods with Taylor interactions"; equation 16
    of Deng et al. (2025).
    """

    baseline: Baseline = field(default_factory=Zero)

    def split(self, q: Question, groups: Groups) -> Iterator[tuple[nn.Module, Bool[Tensor, " P"]]]:
        """Go over the terms."""
        labels, base = _labels(q, groups), one_baseline(q, self.baseline)
        model = q.field.model
        if not isinstance(model, Polynomial):
            raise ModelError(
                f"{kind_of(model)} for TaylorEffects", "an ap.planted.Polynomial", "take HarsanyiEffects() instead"
            )
        around = model.around(base)
        flat = labels.flatten()
        count = int(flat.max()) + 1
        for exponents, coefficient in around.terms.items():
            used = flat[torch.tensor(exponents) > 0]
            if len(used):
                inside = torch.zeros(count + 1, dtype=torch.bool).index_fill_(0, used % (count + 1), True)
                yield Polynomial({exponents: coefficient}, around.center), inside[:count]


def few(count: int, most: int) -> int:
    """Refuse games of too many players.

    Raises:
        InputError: more than `most`.
    """
    if count > most:
        raise InputError(
            f"{count} players, {2.0**count:,.0f} coalitions",
            f"at most {most}",
            "join elements to fewer players, as with groups=ap.groups.Cells(2)",
        )
    return count


@dataclass(frozen=True, eq=False)
class Shares:
    """What an explainer gave each player of each effect.

    Attributes:
        values: of every player in the explanation of every effect, in units of the score.
        effects: each effect at the example.
        members: which players it needs.
        weights: values over effects; NaN where the effect is 0 to rounding.
    """

    values: Float[Tensor, "B K P"]
    effects: Float[Tensor, "B K"]
    members: Bool[Tensor, "K P"]

    @property
    def weights(self) -> Float[Tensor, "B K P"]:
        tiny = self.effects.abs() <= 1e-9 * self.effects.abs().amax(1, keepdim=True)
        return self.values / self.effects.masked_fill(tiny, torch.nan)[..., None]


def shares(q: Question, subject: Subject, effects: Effects, groups: Groups | None) -> Shares:
    """Explain each effect by itself, once for all metrics of the subject.

    Raises:
        ScoreError: a score other than the logit, by which effects would not add up.
        ConfigError: `External`, which cannot be asked about another model.
    """
    if not isinstance(q.field.score, Logit):
        raise ScoreError(
            f"{type(q.field.score).__name__} of effects", "ap.Logit(), which is linear", "explain the logit"
        )
    _ = subject.for_any_model  # refuses functions
    chosen = players(q, groups)

    def make() -> Shares:
        values, sizes, members = [], [], []
        for model, inside in effects.split(q, chosen):
            other = q.field.with_model(model, rowwise=True).bind(q.inputs, as_asked(q.target), q.ids, q.seed)
            made = explained(subject, other.at(other.x, other.owners, torch.zeros_like(other.owners)))
            values.append(by_player(other, made, chosen).double())
            sizes.append(other.fx.double())
            members.append(inside)
            q.charge(other.account)
        if not values:
            raise ModelError("a constant function", "one with an effect", "leave this metric out")
        return Shares(torch.stack(values, 1), torch.stack(sizes, 1), torch.stack(members).to(q.device))

    return subject.share(("shares", effects, groups), make)


def _labels(q: Question, groups: Groups) -> Tensor:
    """Give each element's player, the same for all examples, shaped as one of them."""
    if not isinstance(q.x, Tensor) or not isinstance(q.field.site, Input):
        raise ModelError("several inputs, or an inner site, for effects", "one input", "judge another metric")
    labels = groups.labels(q.x)
    if len(labels) > 1 and not bool((labels == labels[:1]).all()):
        raise InputError("groups that differ among examples", "the same for all", "judge examples one by one")
    return labels[:1].expand(1, *q.x.shape[1:]).cpu()


def one_baseline(q: Question, baseline: Baseline) -> Tensor:
    """Give the only baseline, [1, ...], as the network takes it."""
    rows = q.references(baseline).rows
    first = rows[:1, 0]
    if rows.shape[1] != 1 or not bool((rows == first[:, None]).all()):
        raise InputError("baselines that differ", "one point for all examples", "write ap.baselines.Given(point[None])")
    return first if q.field.normalize is None else q.field.normalize(first)


class _OfCoalition(nn.Module):
    """A network's Harsanyi effect of some players."""

    def __init__(self, model: Any, labels: Tensor, base: Tensor, inside: Tensor) -> None:
        super().__init__()
        self.model, self.labels, self.base = model, labels, base
        self.inside = inside.nonzero()[:, 0].tolist()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        total, size = None, len(self.inside)
        for t in range(1 << size):
            kept = [p for at, p in enumerate(self.inside) if t >> at & 1]
            keep = torch.isin(self.labels, torch.tensor([-1, *kept])).to(x.device)
            out = self.model(torch.where(keep, x, self.base.to(x)), *args, **kwargs)
            out = out if (size - len(kept)) % 2 == 0 else -out
            total = out if total is None else total + out
        assert total is not None  # the empty coalition at least
        return total
