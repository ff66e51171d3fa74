"""Metrics: frozen definitions that judge a map or an explainer, example by example."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apportion.core import tree
from apportion.core.attribution import Attribution, Cost, Domain, Groups
from apportion.core.card import Kind, Paper
from apportion.core.config import Configurable, Json, is_reproducible, to_config
from apportion.core.errors import ConfigError, InputError, NonFiniteError, kind_of
from apportion.core.explainer import Explainer, Passes
from apportion.core.external import External, GivenMap, fitted
from apportion.core.field import Field
from apportion.core.question import Question
from apportion.core.registry import snake, spelled
from apportion.core.score import Probability, Target
from apportion.core.sharing import Common
from apportion.core.tree import Tree
from apportion.metrics.ranking import players
from apportion.metrics.scores import Curve, Direction, Scores
from apportion.metrics.statistics import NOISE

M = TypeVar("M", bound=type["Metric"])
T = TypeVar("T")


_KEPT = 1 << 20
"""Numbers of one kind that are kept of a batch."""


class Judges(Enum):
    """What a metric must have."""

    MAP = "a map"
    EXPLAINER = "an explainer, which it asks again about other points, targets or models"


@dataclass(frozen=True)
class MetricCard:
    """The record of a metric.

    Attributes:
        title: its usual name.
        paper: where it was defined.
        intent: one sentence.
        direction: which end is better.
        judges: what it must have.
        truth: what it compares with, in words; empty for nothing.
        range: least and greatest value, None where there is no bound.
        statistic: how the source sums up examples, "mean", "median" or "median curve".
        chance: what a random map gets, in words.
        cost: its rows per example in words; `metric.passes(q)` gives the numbers.
        kind: the only kind of map it is made for; None for any.
        cautions: what it rewards or punishes besides what it is meant for.
        blind_is_best: whether maps that know nothing of the model are best by definition, as nothing in them can break
            the rule; controls then decide nothing.
    """

    title: str
    paper: Paper
    intent: str
    direction: Direction
    judges: Judges = Judges.MAP
    truth: str = ""
    range: tuple[float | None, float | None] = (None, None)
    statistic: str = "mean"
    chance: str = ""
    cost: str = "none"
    kind: Kind | None = None
    cautions: tuple[str, ...] = ()
    blind_is_best: bool = False


@dataclass(frozen=True, eq=False)
class Found:
    """What a metric's `measure` gives: see the fields of `Scores`."""

    values: Float[Tensor, " B"]
    curves: Mapping[str, Curve] = field(default_factory=dict)
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    undefined: Mapping[str, Bool[Tensor, " B"]] = field(default_factory=dict)


class Subject:
    """What is judged: a map, an explainer, or a map and the explainer that made it.

    Attributes:
        name: what results call it.
        method: its configuration.
        tensors: those the configuration names by digest.
    """

    def __init__(self, judged: Any, name: str | None = None, made: Attribution | None = None) -> None:
        """Take what the user gave.

        Args:
            judged: an attribution, an explainer, or a tensor or array of maps.
            name: for results; the explainer's class unless given.
            made: what the explainer said of the examples, where it has been asked already.

        Raises:
            ConfigError: something else.
        """
        self._explainer: Explainer | None = None
        self._given: Attribution | None = made
        self._memo: dict[Hashable, Any] = {}
        self.tensors: dict[str, Tensor] = {}
        if isinstance(judged, type) and issubclass(judged, Explainer):
            raise ConfigError(f"the class {judged.__name__} to judge", "an instance", f"write {judged.__name__}()")
        if isinstance(judged, Attribution):
            self._given, self.method = judged, judged.method
            self.tensors.update(judged.tensors)
        else:
            if not isinstance(judged, Explainer):
                judged = _as_given(judged)
            self._explainer = judged
            self.method = to_config(judged, self.tensors)
        own = self.method.get("type", "?") if isinstance(self.method, dict) else "?"
        told = getattr(judged, "name", None)
        self.name: str = name or (told if isinstance(told, str) else own)

    @property
    def explainer(self) -> Explainer:
        """The explainer, or the one that made the map.

        Raises:
            ConfigError: only a map is there, or it was made by user code or changed afterwards.
        """
        if self._explainer is not None and not isinstance(self._explainer, GivenMap):
            return self._explainer
        if self._given is not None and not self._given.postprocessing and self._given.reproducible:
            made_by = self._given.explainer()
            if not isinstance(made_by, GivenMap):
                return made_by
        after = f" after {self._given.postprocessing[-1]}" if self._given and self._given.postprocessing else ""
        raise ConfigError(
            f"a map of {self.name}{after}",
            "an explainer, since this metric asks it again",
            "give the explainer, or ap.External(function) for another library's",
        )

    @property
    def for_any_model(self) -> Explainer:
        """The explainer, where it explains whatever model it is asked about.

        Raises:
            ConfigError: `External`, whose function knows its own model only.
        """
        if isinstance(self.explainer, External):
            raise ConfigError(
                f"ap.External {self.name!r} asked about other models",
                "a method of the library, or a subclass of ap.Explainer",
                "leave this metric out for functions, which know one model",
            )
        return self.explainer

    def attribution(self, q: Question) -> Attribution:
        """Give the map: what was given, or what the explainer says of the examples, once; its passes are not counted.

        Raises:
            InputError: another number of maps than examples, a shape that does not fit, or no map of the input.
            NonFiniteError: NaN or infinity in the map.
        """
        if self._given is None and isinstance(self._explainer, GivenMap) and q is q.root and not q.differentiable:
            self._given = self._explainer.explain(q.aside())
        if self._given is None:
            assert self._explainer is not None  # one of the two is there
            resolved = as_asked(q.target)
            target = q.root.asked if resolved is q.target else resolved  # which tells classes, where the score has one
            asked: dict[str, Any] = {"target": target, "ids": q.ids, "seed": q.seed}
            self._given = self._explainer(q.field, q.inputs, **asked)
        a = self._given
        if a.domain is Domain.GROUPS and a.groups is not None:
            a = a.spread(share=True)  # sums over elements are those over groups
        if a.domain in (Domain.GLOBAL, Domain.COALITIONS, Domain.GROUPS, Domain.TOKENS) and len(a) != len(q):
            raise InputError(
                f"{a.domain.value} values of {self.name}", "a map for each example", "judge a local method"
            )
        for v, n in zip(tree.leaves(a.values), tree.names(a.values), strict=True):
            if len(v) != len(q):
                raise InputError(
                    f"{len(v)} map(s) of {self.name} for {len(q)} example(s)",
                    "one each",
                    "judge them on their examples",
                )
            bad = ~v.isfinite().flatten(1).all(1)
            if bool(bad.any()):
                raise NonFiniteError(
                    f"NaN or infinity in the map {n} of {self.name}, example {int(bad.nonzero()[0])}",
                    "finite numbers",
                    "find out where it comes from: no metric can rank it",
                )
        return a

    def map(self, q: Question) -> Tree:
        """Give the map's values, shaped as the input or with one channel for all.

        Raises:
            InputError: values that do not fit the input.
        """
        values = self.attribution(q).values
        try:
            return tree.apply(lambda v, x: fitted(v, x, self.name), values, q.x)
        except TypeError as error:
            raise InputError(
                f"maps {tree.names(values)} of {self.name}", f"the input's {tree.names(q.x)}", "explain the same input"
            ) from error

    def share(self, key: Hashable, make: Callable[[], T]) -> T:
        """Make something that other metrics of this subject on these examples need too, such as a curve, once.

        Args:
            key: what it is, by value: a configuration as text, for example.
            make: makes it.
        """
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]


def rounding(q: Question) -> float:
    """Give the share by which scores may differ that are equal on paper: half precision's would be half of all."""
    exact = all(leaf.dtype is torch.float64 for leaf in tree.leaves(q.x))
    return NOISE * torch.finfo(torch.float64 if exact else torch.float32).eps


def in_common(q: Question) -> Common:
    """Hold what metrics make of some examples alike for every map, such as scores of perturbed rows."""
    return Common(max(_KEPT, sum(leaf.numel() for leaf in tree.leaves(q.x))))


def key_of(part: Any) -> Hashable:
    """Name a part by its configuration; user code, of which that has but the name, by itself."""
    config = to_config(part)
    return json.dumps(config) if is_reproducible(config) else part


def _as_given(judged: Any) -> GivenMap:
    try:
        return GivenMap(judged, "given map")
    except ConfigError as error:
        raise ConfigError(
            f"{kind_of(judged)} to judge",
            "an attribution, an explainer, or a tensor or array of maps",
            "give what ap.explain returned, or ap.External(function)",
        ) from error


def as_asked(target: Any) -> Any:
    """Spell a resolved target as users give them."""
    return target[:, 0] if isinstance(target, Tensor) and target.ndim == 2 and target.shape[1] == 1 else target


@dataclass(frozen=True)
class Metric(Configurable):
    """Base of the metrics; a subclass is a frozen dataclass of settings with a card and a `measure`."""

    card: ClassVar[MetricCard]

    def __call__(
        self,
        field: Field,
        x: Tree,
        judged: Any,
        *,
        target: Target = None,
        truth: Any = None,
        ids: Sequence[Any] | None = None,
        seed: int = 0,
        controls: Sequence[Explainer] = (),
    ) -> Scores:
        """Judge a map or an explainer.

        Args:
            field: what was explained of which model.
            x: the examples.
            judged: what `ap.explain` gave, an explainer, or a tensor or array of maps; an explainer where the metric
                asks again.
            target: the outputs that were explained; those of the attribution, or each example's top class.
            truth: what is compared with, one entry an example, for metrics that need it.
            ids: one name an example, for its random numbers and its records.
            seed: of all random numbers.
            controls: maps to be judged beside, such as `ap.controls.Random()`.

        Returns:
            A score for each example.

        Raises:
            ConfigError: something that cannot be judged; no truth where one is needed.
            InputError: a map that does not fit.
            NonFiniteError: NaN in a map.
        """
        if not isinstance(field, Field):
            raise ConfigError(f"{kind_of(field)} as field", "an ap.Field", "write ap.Field(model)")
        if isinstance(judged, Attribution) and target is None and getattr(judged.target, "ndim", 1) == 1:
            target = judged.target  # scores of several classes resolve theirs again
        subject = Subject(judged)
        with torch.inference_mode(False):
            q = field.bind(x, target=target, ids=ids, seed=seed)
            return self.judge(q, subject, truth, controls)

    def judge(self, q: Question, subject: Subject, truth: Any = None, controls: Sequence[Explainer] = ()) -> Scores:
        """Judge a subject on a bound question; metrics of one question and subject share what they can."""
        if self.card.truth and truth is None:
            raise ConfigError(f"no truth for {type(self).__name__}", self.card.truth, "give truth=...")
        if not self.card.truth and truth is not None:
            raise ConfigError(f"truth for {type(self).__name__}", "none: it compares with nothing", "leave truth out")
        beside = {}
        if controls:  # what does not depend on the map is made once, and stands on the bill of each
            common, account = in_common(q), q.account
            for control in controls:
                other = Subject(control)
                beside[other.name] = self.judge(q.fork(common, other.name, account), other, truth)
            q = q.fork(common, subject.name, account)
        if self.card.judges is Judges.MAP:
            subject.attribution(q)
        before, warned = q.cost, set(q.warnings)
        found = self.measure(q, subject, truth)
        after = q.cost
        tensors = dict(subject.tensors)
        spent = Cost(
            after.forward - before.forward,
            after.backward - before.backward,
            after.at_x - before.at_x,
            checks=after.checks - before.checks,
        )
        return Scores(
            values=found.values,
            metric=to_config(self.settled(), tensors),
            direction=self.card.direction,
            of=subject.name,
            method=subject.method,
            score=to_config(q.field.score, tensors),
            target=as_asked(q.target),
            ids=tuple(q.ids),
            seed=q.seed,
            cost=spent,
            curves=found.curves,
            parts=found.parts,
            undefined={k: v for k, v in found.undefined.items() if bool(v.any())},
            controls=beside,
            warnings=(*(w for w in q.warnings if w not in warned), *self._cautions(subject, q)),
            statistic=self.card.statistic,
            blind_is_best=self.card.blind_is_best,
            resolved=self.resolved(q),
            rounding=rounding(q),
            tensors=tensors,
        )

    def _cautions(self, subject: Subject, q: Question) -> tuple[str, ...]:
        given, name, found = subject._given, type(self).__name__, []
        if self.card.kind is not None and given is not None and given.kind is not self.card.kind:
            found.append(f"{name} is made for {self.card.kind.value} maps; this is a {given.kind.value}")
        if q.target is None and isinstance(getattr(self, "score", None), Probability):
            told = f"{name} judges the sigmoid of the model's one number, as of a class"
            found.append(f"{told}; for a regression write {name}(score=ap.Logit()), the number itself")
        return tuple(found)

    @abstractmethod
    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Judge a subject: the body of a metric."""

    def settled(self) -> Metric:
        """Name what the settings leave to the machine, such as a program's version, as results record it."""
        return self

    def players(self, q: Question) -> Groups:
        """Choose the groups that a metric with such ranks: its own, or pixels of pictures, or else single elements."""
        return players(q, getattr(self, "groups", None))

    def resolved(self, q: Question) -> dict[str, Json]:
        """Name what runs where the settings leave it to the field or the examples, as results record it."""
        field = q.field
        found: dict[str, Json] = {"normalize": to_config(field.normalize), "site": to_config(field.site)}
        found["bounds"] = to_config(field.bounds)  # within which fills draw
        if getattr(self, "groups", self) is None:
            found["groups"] = to_config(self.players(q))
        return found

    def passes(self, q: Question) -> Passes:
        """Count the rows evaluated per example, without making the map; none unless a metric says otherwise."""
        return Passes(0, 0, 0)

    def explanations(self, q: Question) -> int:
        """Count how often the explainer is asked about each example, or points made of it; it says what that takes."""
        return 0

    def trainings(self, q: Question, explainers: Sequence[Explainer]) -> int:
        """Count the networks that are trained to judge some explainers, by however many batches; none unless told."""
        return 0

    def questions(self, q: Question) -> int:
        """Count the models and targets it is asked about; for each it does anew what it does once, as at baselines."""
        return min(1, self.explanations(q))

    def passes_with(self, q: Question, explainer: Passes) -> Passes:
        """Count the rows evaluated per example, those of the explainer included where it is asked again."""
        own, times, anew = self.passes(q), self.explanations(q), self.questions(q)
        return own._replace(
            forward=own.forward + times * (explainer.forward + explainer.at_x),
            backward=own.backward + times * explainer.backward,
            once=own.once + anew * explainer.once,
            once_backward=own.once_backward + anew * explainer.once_backward,
            exact=own.exact and (explainer.exact or not times),
        )

    def check_truth(self, q: Question, truth: Any) -> None:
        """Refuse truths that do not fit the examples, before anything is asked of a model; nothing unless overridden.

        Raises:
            InputError: what `measure` would refuse.
        """

    @classmethod
    def variants(cls) -> tuple[Metric, ...]:
        """Configurations the conformance suite runs: small ones cover as much."""
        return (cls(),)

    @classmethod
    def example_truth(cls, x: Tree) -> Any:
        """Make up truths for the conformance suite, one entry an example, where the metric compares with one."""
        return None


_METRICS: dict[str, type[Metric]] = {}


def register(card: MetricCard) -> Callable[[M], M]:
    """Give a metric its card and a name, the snake case of its class."""

    def enter(cls: M) -> M:
        cls.card = card
        _METRICS[snake(cls.__name__)] = cls
        return cls

    return enter


def names() -> dict[str, MetricCard]:
    """List the metrics: name to card."""
    return {name: _METRICS[name].card for name in sorted(_METRICS)}


def metric(name: str) -> type[Metric]:
    """Find a metric by its name or that of its class, in any spelling.

    Raises:
        RegistryError: unknown, with the nearest names.
    """
    return _METRICS[spelled(name, _METRICS, "metric", "list them with ap.metrics.names()")]
